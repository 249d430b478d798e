"""Step mode: keep ``A = A P`` as an invariant of the optimiser instead of forming ``A P`` in every forward."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from guardspace_kernels.ops import null_project_


def _decoupled(group: dict[str, Any]) -> bool:
    return not group.get("weight_decay") or bool(group.get("decoupled_weight_decay"))


def _any_decay(_group: dict[str, Any]) -> bool:
    return True


def _no_decay(group: dict[str, Any]) -> bool:
    return not group.get("weight_decay")


# Optimisers whose update sees A only through its gradient, apart from a decay that scales A as a whole.
_SUPPORTED: dict[type[torch.optim.Optimizer], tuple[Callable[[dict[str, Any]], bool], str]] = {
    torch.optim.AdamW: (_any_decay, ""),
    torch.optim.SGD: (_any_decay, ""),
    torch.optim.Adam: (_decoupled, "weight_decay=0 or decoupled_weight_decay=True"),
    torch.optim.NAdam: (_decoupled, "weight_decay=0 or decoupled_weight_decay=True"),
    torch.optim.RAdam: (_decoupled, "weight_decay=0 or decoupled_weight_decay=True"),
    torch.optim.Adamax: (_no_decay, "weight_decay=0"),
    torch.optim.RMSprop: (_no_decay, "weight_decay=0"),
    torch.optim.Adagrad: (_no_decay, "weight_decay=0"),
}


class OptimizerGuard:
    """Handle of :func:`guard_optimizer`. ``remove()``, or leaving it as a context, returns to forward mode."""

    def __init__(self, handles: list[RemovableHandle], layers: list[Any]) -> None:
        self._handles = handles
        self._layers = layers

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.step_mode = False
        self._handles, self._layers = [], []

    def __enter__(self) -> OptimizerGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    entry = _SUPPORTED.get(type(optimizer))
    if entry is None:
        supported = ", ".join(cls.__name__ for cls in _SUPPORTED)
        raise TypeError(
            f"step mode is not exact with {name}, whose update may see A otherwise than through its gradient; "
            f"supported: {supported}. Forward mode, the default, is exact with every optimiser: "
            "leave guard_optimizer out"
        )
    accepts, condition = entry
    if not all(accepts(group) for group in optimizer.param_groups):
        raise TypeError(
            f"step mode with {name} needs {condition}: a weight decay inside its gradient is rescaled element by "
            "element and leaves the null space. Use AdamW, or forward mode (no guard_optimizer)"
        )


def guard_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerGuard:
    """Switches a guarded model to step mode: gradient of A projected before clipping, A projected after the step.

    Saves the ``4·r·d_in·k`` FLOPs of ``A P`` per layer and forward. The trajectory of ``A P`` is that of forward mode,
    gradient clipping included, because each gradient is projected as soon as it is accumulated. While the guard is on,
    only this optimiser may change A; saving and certifying check that.

    Args:
        optimizer: AdamW, SGD, or Adam, NAdam, RAdam with decoupled or no decay, Adamax, RMSprop, Adagrad without
            decay. An ``accelerate`` wrapper is unwrapped.
        model: the guarded model; it may be wrapped (DistributedDataParallel).

    Returns:
        A handle; ``remove()`` returns to forward mode.

    Raises:
        TypeError: another optimiser, or a decay that is not exact in step mode; refused by name.
        ValueError: the model has no guarded layer, or the optimiser does not hold every lora_A.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    _check_optimizer(optimizer)
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "step_mode") and m.projector is not None]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no guarded layer; build it with attach_guard(model, plan)")
    if any(layer.step_mode for layer in layers):
        raise ValueError("the model is in step mode already; remove the first guard before adding another")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [layer for layer in layers if id(layer.A) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold the lora_A of {len(missing)} of {len(layers)} guarded layers; build it from "
            "model.parameters() after attach_guard"
        )

    bases = [layer.projector.basis for layer in layers]
    complements = [layer.projector.complement for layer in layers]

    def project_gradient(layer: Any) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            layer.projector.project_(parameter.grad)

        return hook

    @torch.no_grad()
    def project_parameters(*_: Any) -> None:
        null_project_([layer.A for layer in layers], bases, complements)

    project_parameters()
    handles = [layer.A.register_post_accumulate_grad_hook(project_gradient(layer)) for layer in layers]
    handles.append(optimizer.register_step_post_hook(project_parameters))
    for layer in layers:
        layer.step_mode = True
    return OptimizerGuard(handles, layers)
