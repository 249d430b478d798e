"""The ``guardspace`` op namespace and the checks that all ops share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

LIBRARY = torch.library.Library("guardspace", "DEF")

AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], *, keeps_memory: bool = False) -> None:
    """Defines an op whose ``kernel`` serves every device and whose ``fake`` gives shapes only.

    ``keeps_memory``: it keeps memory on a GPU from call to call, so that inductor must leave it out of CUDA graphs that
    it makes.
    """
    name = schema[: schema.index("(")]
    # Products inside a kernel would be autocast, whatever dtype it asks for; and a result that is a view of what only
    # the kernel saw could not be changed in place. Writes to an argument stay visible to autograd.
    excluded = AUTOCAST if "!" in schema else AUTOCAST | VIEWS

    def alone(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return kernel(*args)

    unsafe = (torch.Tag.cudagraph_unsafe,) if keeps_memory and hasattr(torch.Tag, "cudagraph_unsafe") else ()
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *unsafe))
    LIBRARY.impl(name, alone, "CompositeExplicitAutograd")
    torch.library.register_fake(f"guardspace::{name}", fake, lib=LIBRARY)


def forbid_grad(op: str, overload: Any) -> Callable[..., None]:
    """An Autograd kernel for an in-place op without a derivative.

    It raises if a tensor that would be written requires grad in grad mode or has a tangent of forward mode: autograd
    would not see the write.
    """

    def kernel(target: Any, *args: Any) -> None:
        tensors = target if isinstance(target, (list, tuple)) else [target]
        if differentiated(*tensors):
            raise RuntimeError(
                f"{op}: the tensor to be written requires grad, or has a tangent, and this in-place op has no "
                "derivative; call it under torch.no_grad(), or on .grad / .data / .detach()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            overload(target, *args)

    return kernel


def plain_eager() -> bool:
    """Whether only eager mode sees a call: no compiler, mode, transform or tangent, which need registered ops."""
    return not (
        torch.compiler.is_dynamo_compiling()  # every other compiler traces within a dispatch mode
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and not _only_default_devices())
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state()
    )


def _only_default_devices() -> bool:
    """Whether no mode but ``torch.set_default_device`` or a device as a context sees what is called."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must see a call with these, in reverse or in forward mode (which ``no_grad`` leaves on).

    The dispatcher lets None pass for a Tensor: the op's checks refuse it.
    """
    if torch.is_grad_enabled():
        for t in tensors:  # in every layer's forward: any() of a generator takes twice as long
            if t is not None and t.requires_grad:
                return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def without_grad(overload: Any) -> Callable[..., Any]:
    """An Autograd kernel for an op whose result is a measurement: no gradient flows through it."""

    def kernel(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    return kernel


def shape(t: torch.Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def rows(t: torch.Tensor) -> torch.Tensor:
    """(..., d) as (tokens, d): a view unless the leading dimensions have no common stride."""
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def unit_inner(t: torch.Tensor) -> torch.Tensor:
    """The matrix itself if its rows are contiguous, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def written(*tensors: torch.Tensor) -> None:
    """Tells autograd that a kernel wrote to these: it would not notice a write through a pointer."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # tensors of inference mode have no version, and are few: to ask each one takes longer
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def overlaps_itself(t: torch.Tensor) -> str:
    """Why a kernel must not write to this tensor; empty if it may."""
    if any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True)):
        return f"the tensor to be written, strides {t.stride()}, is expanded: its entries share memory"
    return ""


def require_dense(op: str, **tensors: torch.Tensor) -> None:
    """The first of an op's checks: the dispatcher lets None pass for a tensor. Kernels read memory by strides."""
    for name, t in tensors.items():
        if t is None:
            raise TypeError(f"{op}: {name} must be a tensor, got None")
        if t.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got the layout {t.layout}; call {name}.to_dense()")


def require_float(op: str, **tensors: torch.Tensor) -> None:
    for name, t in tensors.items():
        if t is None or t.layout != torch.strided:
            require_dense(op, **{name: t})
        if t.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be float64, float32, float16 or bfloat16, got {t.dtype} of shape {shape(t)}"
            )


def require_same_device(op: str, first: str, reference: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != reference.device:
            raise ValueError(
                f"{op}: {name} is on {t.device} but {first} is on {reference.device}; move them to one device"
            )


def require_basis(op: str, basis: torch.Tensor, d: int, owner: str) -> None:
    """A thin orthonormal basis is (d, k) with k <= d."""
    require_float(op, basis=basis)
    if basis.dim() != 2 or basis.shape[0] != d or basis.shape[1] > d:
        raise ValueError(
            f"{op}: basis must be (d, k) with d = {d} (the last dimension of {owner}) and k <= d, "
            f"got shape {shape(basis)}"
        )


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The widest of the dtypes, at least float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


# From torch 2.9 each backend has a setting of its own, and reading the process-wide one raises where they differ.
_PRECISIONS: tuple[Any, ...] = tuple(
    backend
    for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(backend, "fp32_precision")
)


_inside = 0  # how many contexts of full_float32_products are open, on all threads
_reduced: dict[Any, str] = {}  # what they found set lower
_changing = threading.Lock()


def _allow_no_reduced_products() -> None:
    """Called with every entry: someone may have allowed them again since the first."""
    for backend in _PRECISIONS:
        if backend.fp32_precision not in ("ieee", "none"):
            _reduced[backend] = backend.fp32_precision
            backend.fp32_precision = "ieee"
    if not _PRECISIONS and torch.get_float32_matmul_precision() != "highest":
        _reduced[None] = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")


def _restore_reduced_products() -> None:
    for backend, precision in _reduced.items():
        if backend is None:
            torch.set_float32_matmul_precision(precision)
        else:
            backend.fp32_precision = precision
    _reduced.clear()


@contextmanager
def full_float32_products() -> Iterator[None]:
    """Matrix products of float32 inputs with float32 multiplications, under autocast too.

    Trainers often allow TF32 or bf16 products (``torch.set_float32_matmul_precision``); their rounding, 2e-4 of the
    largest entry, would hide the null space of a covariance, whose threshold lies below 1e-6. The setting is the
    process's: while any thread is inside, all multiply in float32, and the last one out restores what was set.
    """
    global _inside
    with _changing:
        _allow_no_reduced_products()
        _inside += 1
    try:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            yield
    finally:
        with _changing:
            _inside -= 1
            if _inside == 0:
                _restore_reduced_products()
