"""One caller at a time: what hooks count and modes change is the whole model's, whichever thread runs it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from guardspace_kernels.guard.layers import is_sharded

_LOCK = threading.Lock()
_HOLDERS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # modules in use, by which thread


def version_of(x: torch.Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if x.is_inference() else x._version


@contextmanager
def exclusively(model: nn.Module) -> Iterator[None]:
    """No other thread may be within this context for the model, or for one that shares a module with it.

    RuntimeError if one is. A thread may be within it more than once.
    """
    me = threading.get_ident()
    with _LOCK:
        modules = list(model.modules())
        if any(_HOLDERS.get(module, me) != me for module in modules):
            raise RuntimeError(
                f"{type(model).__name__} is in use by collect_statistics or certify in another thread, or shares "
                "modules with a model that is; wait until that has ended, or run a copy of the model"
            )
        mine = [module for module in modules if module not in _HOLDERS]
        _HOLDERS.update(dict.fromkeys(mine, me))
    try:
        yield
    finally:
        with _LOCK:
            for module in mine:
                _HOLDERS.pop(module, None)


class Unchanged:
    """Says whether anybody trained or moved a model since: by its modes, and by its parameters' memory and versions."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = self._state()

    def _state(self) -> dict[str, tuple[int, int]]:
        if is_sharded(self.model):  # then forwards gather parameters into other memory, and so do those loaded for one
            return {}
        return {name: (p.data_ptr(), version_of(p)) for name, p in self.model.named_parameters() if not p.is_meta}

    def check(self) -> None:
        """RuntimeError that names what changed."""
        training = next((name for name, module in self.model.named_modules() if module.training), None)
        if training is not None:
            what = f"module {training or type(self.model).__name__} was put into training mode"
        else:
            now = self._state()
            changed = [name for name, state in self.state.items() if now.get(name, state) != state]
            if not changed:
                return
            what = f"parameter {changed[0]} was changed"
        raise RuntimeError(
            f"{what} while statistics were collected, by another thread, the iterable of batches or the "
            "model's own forward: they would be of no one model; collect from one that nothing changes meanwhile"
        )
