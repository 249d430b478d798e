"""Which implementation of an op runs: the backend interface.

Every op registers one or more implementations here, each under a backend name and with a predicate that answers
``(ok, reason)`` for concrete arguments. :func:`resolve` picks the first backend in :data:`BACKENDS` that accepts;
``GUARDSPACE_BACKEND`` or :func:`use_backend` insist on one, and then a refusal is an error that repeats the reason.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

#: Backends in order of preference. ``reference`` is plain PyTorch, accepts everything, and is the oracle of the tests.
BACKENDS = ("triton", "cuda", "cpu", "reference")
OPS = ("covariance", "projected_lora", "null_projection")

Accepts = Callable[..., tuple[bool, str]]


@dataclass(frozen=True)
class Implementation:
    """One backend's implementation of one op: its entry points by name, and the predicate for their arguments."""

    functions: dict[str, Callable[..., Any]]
    accepts: Accepts


_registry: dict[tuple[str, str], Implementation] = {}
_missing: dict[tuple[str, str], str] = {}


@dataclass(eq=False)
class _Choice:
    """One :func:`use_backend` that is open."""

    name: str


_open: list[_Choice] = []  # in the whole process; the last one holds
_own: ContextVar[tuple[_Choice, ...]] = ContextVar("guardspace_own_choices", default=())  # of this thread or task
_changing = threading.Lock()

# Every call of an op asks for the variable; os.environ.get takes a microsecond to raise and catch that it is not set.
_environment: Any = getattr(os.environ, "_data", os.environ)
_VARIABLE: Any = os.environ.encodekey("GUARDSPACE_BACKEND") if _environment is not os.environ else "GUARDSPACE_BACKEND"


def _always(*_args: Any) -> tuple[bool, str]:
    return True, "accepts every argument"


def register(op: str, backend: str, accepts: Accepts = _always, **functions: Callable[..., Any]) -> None:
    """Registers ``functions`` (entry point name -> callable) as ``backend``'s implementation of ``op``."""
    _check_names(op, backend)
    _registry[op, backend] = Implementation(functions, accepts)


def unavailable(op: str, backend: str, reason: str) -> None:
    """Says why this installation has no ``backend`` implementation of ``op``."""
    _check_names(op, backend)
    _missing[op, backend] = reason


def _check_names(op: str, backend: str) -> None:
    if op not in OPS:
        raise ValueError(f"op must be one of {OPS}, got {op!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def _why_missing(op: str, backend: str) -> str:
    return _missing.get((op, backend), f"this build has no {backend} implementation of {op}")


def requested_backend() -> str | None:
    """The backend that :func:`use_backend` or ``GUARDSPACE_BACKEND`` insists on, or None for automatic choice."""
    name = _open[-1].name if _open else ""
    if not name and _VARIABLE in _environment:
        name = os.environ.get("GUARDSPACE_BACKEND", "")
    if not name or name == "auto":
        return None
    if name not in BACKENDS:
        raise ValueError(f"GUARDSPACE_BACKEND must be 'auto' or one of {BACKENDS}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every op runs on backend ``name`` (or 'auto'), in the whole process.

    The choice is process-wide, not per thread, because autograd runs backward passes on threads of its own: every
    thread sees it, that of a data loader or a pool included. Contexts of one thread or task nest. Different choices of
    several cannot hold at once, and the second one is refused; equal ones may overlap in any order.

    A backward pass through dropout runs on the backend that its forward pass was told to use: each draws masks of its
    own. Where the forward pass is repeated or deferred (checkpointing, ``torch.compile``) keep both in one context.

    Raises:
        ValueError: an unknown name. RuntimeError: another thread or task insists on another backend.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"name must be 'auto' or one of {BACKENDS}, got {name!r}")
    choice, own = _Choice(name), _own.get()
    with _changing:
        for other in _open:
            if other.name != name and other not in own:
                raise RuntimeError(
                    f"use_backend({name!r}): another thread or task is within use_backend({other.name!r}), and the "
                    "choice holds in the whole process; wait until that context ends, or choose the same backend"
                )
        _open.append(choice)
    _own.set((*own, choice))
    try:
        yield
    finally:
        _own.set(tuple(one for one in _own.get() if one is not choice))  # generators may end in another order
        with _changing:
            _open.remove(choice)


def can_use(op: str, *args: Any, backend: str) -> tuple[bool, str]:
    """Whether ``backend`` runs ``op`` on these arguments, and why (not)."""
    implementation = _registry.get((op, backend))
    if implementation is None:
        return False, _why_missing(op, backend)
    return implementation.accepts(*args)


def resolve(op: str, entry: str, *args: Any, backend: str | None = None) -> Callable[..., Any]:
    """The function that runs ``entry`` of ``op`` on ``args``; RuntimeError if the requested backend refuses.

    ``backend`` is the request of an earlier call, 'auto' included; None asks for the one of now.
    """
    name = backend or requested_backend() or "auto"
    if name != "auto":
        ok, reason = can_use(op, *args, backend=name)
        if not ok:
            raise RuntimeError(f"backend {name!r} was requested but cannot run {op}: {reason}")
        return _registry[op, name].functions[entry]
    for candidate in BACKENDS:
        implementation = _registry.get((op, candidate))
        if implementation is not None and implementation.accepts(*args)[0]:
            return implementation.functions[entry]
    raise RuntimeError(f"no backend can run {op}; import guardspace_kernels.ops to register the reference")


def call_all(op: str, entry: str, items: list[Any], arguments: Callable[[Any], tuple[Any, ...]]) -> None:
    """Runs ``entry``, which takes a list, on the items of each backend and device at once.

    ``arguments`` are those of resolve, the first of them a tensor.
    """
    groups: dict[Any, list[Any]] = {}
    for item in items:
        its_arguments = arguments(item)
        groups.setdefault((resolve(op, entry, *its_arguments), its_arguments[0].device), []).append(item)
    for (function, _), members in groups.items():
        function(members)


def direct(op: str, entry: str, *args: Any) -> bool:
    """Whether a backend did the work of a public function at once, past PyTorch's dispatcher and the op's checks.

    Of the backends in order of preference those are asked that registered ``entry``. It gets the arguments as the
    caller gave them, and leaves untouched what it does not take, errors included, to the op.
    """
    name = requested_backend()
    for backend in BACKENDS if name is None else (name,):
        implementation = _registry.get((op, backend))
        if implementation is not None and entry in implementation.functions and implementation.functions[entry](*args):
            return True
    return False


def status() -> list[tuple[str, str, bool, str]]:
    """For the environment report: (op, backend, registered, reason) for every pair."""
    rows = []
    for op in OPS:
        for backend in BACKENDS:
            registered = (op, backend) in _registry
            reason = "registered" if registered else _why_missing(op, backend)
            rows.append((op, backend, registered, reason))
    return rows
