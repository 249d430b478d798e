"""Step mode: keep ``A = A P`` as an invariant of the optimiser instead of forming ``A P`` in every forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from guardspace_kernels.arguments import instance, iterable, number, shown
from guardspace_kernels.guard.layers import sharding
from guardspace_kernels.ops import null_project_, projected_adamw_


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


_active: set[OptimizerGuard] = set()


def _before_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for guard in tuple(_active):
        guard.before_step(optimizer)


class OptimizerGuard:
    """Handle of :func:`guard_optimizer`. ``remove()``, or leaving it as a context, returns to forward mode.

    So does whatever takes A out of the optimiser's hands: another optimiser that steps it, the end of this one, a
    parameter that is replaced. While another one steps anything between a backward and this one's step, which may be a
    framework's that steps copies of A, the layers are in forward mode until this one steps. Step mode is never left on
    without a projection after the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: list[Any]) -> None:
        self._layers = layers
        # A swap leaves the object and changes the tensor in it, which loses the hook of the gradient.
        self._held = [(layer.A, layer.A._cdata) for layer in layers]
        self._optimizer = weakref.ref(optimizer)
        self._end = weakref.finalize(optimizer, self.remove)
        self._end.atexit = False
        self._handles: list[Any] = []
        self._step_mode(True)
        if _before_any_step not in _global_optimizer_pre_hooks.values():
            register_optimizer_step_pre_hook(_before_any_step)
        _active.add(self)

    def _step_mode(self, on: bool) -> None:
        if on:
            self.after_step()
        for layer in self._layers:
            layer.step_mode = on

    def remove(self) -> None:
        _active.discard(self)
        self._end.detach()
        for handle in self._handles:
            handle.remove()
        self._step_mode(False)
        self._handles, self._layers, self._held = [], [], []

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Of any optimiser; RuntimeError if ours lost a parameter that it guards, TypeError for a decay set since."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if optimizer is not self._optimizer():
            if any(id(A) in held for A, _ in self._held):
                self.remove()
            elif any(layer.was_trained for layer in self._layers):
                # It may step copies of A: DeepSpeed puts an optimiser of its own, over flat copies of all parameters,
                # in the place of the one that it is given, which then never steps.
                self._step_mode(False)
            return
        lost = 0
        for layer, (A, tensor) in zip(self._layers, self._held, strict=True):
            layer.__dict__["was_trained"] = False  # nn.Module's own way takes longer than the projection
            lost += layer.A is not A or A._cdata != tensor or id(A) not in held
        try:
            if lost:
                raise RuntimeError(
                    f"the lora_A of {lost} of {len(self._layers)} guarded layers was replaced since "
                    f"{type(optimizer).__name__} was guarded, by a framework, a conversion or an edit of its groups. "
                    "The layers are back in forward mode, which is exact with every optimiser; guard an optimiser "
                    "after the last such change"
                )
            _check_groups(optimizer)
        except Exception:
            self.remove()
            raise
        if not all(layer.step_mode for layer in self._layers):
            self._step_mode(True)

    @torch.no_grad()
    def after_step(self, *_: Any) -> None:
        if self._layers:
            null_project_([A for A, _ in self._held], *_projectors(self._layers))

    def __enter__(self) -> OptimizerGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, GuardedAdamW):
        raise TypeError(f"{name} guards its model by itself; leave guard_optimizer and GuardCallback out")
    if type(optimizer) not in _SUPPORTED:
        supported = ", ".join(cls.__name__ for cls in _SUPPORTED)
        raise TypeError(
            f"step mode is not exact with {name}, whose update may see A otherwise than through its gradient; "
            f"supported: {supported}. Forward mode, the default, is exact with every optimiser: "
            "leave guard_optimizer out"
        )
    _check_groups(optimizer)


def _check_groups(optimizer: torch.optim.Optimizer) -> None:
    name, (accepts, condition) = type(optimizer).__name__, _SUPPORTED.get(type(optimizer), (_any_decay, ""))
    if not all(accepts(group) for group in optimizer.param_groups):
        raise TypeError(
            f"step mode with {name} needs {condition}: a weight decay inside its gradient is rescaled element by "
            "element and leaves the null space. Use AdamW, or forward mode (no guard_optimizer)"
        )


def guard_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerGuard:
    """Switches a guarded model to step mode: gradient of A projected before clipping, A projected after the step.

    Saves the ``4·r·d_in·k`` FLOPs of ``A P`` per layer and forward. The trajectory of ``A P`` is that of forward mode,
    gradient clipping included, because the backward of a layer projects its gradient. While the guard is on,
    only this optimiser may change A; saving and certifying check that. The layers return to forward mode when another
    optimiser steps A, when this one is deleted, and when a parameter is replaced: then its next step raises. From
    another optimiser's step between backward and this one's step on they are in forward mode until this one steps
    (DeepSpeed puts its own in place of the one that it is given).

    Args:
        optimizer: AdamW, SGD, or Adam, NAdam, RAdam with decoupled or no decay, Adamax, RMSprop, Adagrad without
            decay. An ``accelerate`` wrapper is unwrapped.
        model: the guarded model; it may be wrapped (DistributedDataParallel).

    Returns:
        A handle; ``remove()`` returns to forward mode.

    Raises:
        TypeError: another optimiser, or a decay that is not exact in step mode; refused by name.
        ValueError: the model has no guarded layer, or the optimiser does not hold every lora_A.
        RuntimeError: from ``optimizer.step``, where a lora_A was replaced since.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    _check_optimizer(optimizer)
    layers = _guarded_layers(model)
    _check_held(optimizer, layers)
    guard = OptimizerGuard(optimizer, layers)
    guard._handles.append(optimizer.register_step_post_hook(guard.after_step))
    return guard


def _guarded_layers(model: nn.Module) -> list[Any]:
    instance("model", model, nn.Module, "a torch.nn.Module")
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "step_mode") and m.projector is not None]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no guarded layer; build it with attach_guard(model, plan)")
    for inside in model.modules():
        check = getattr(type(inside), "check_trainable", None)
        if check is not None:
            check(inside, sharding(model))
    if any(layer.step_mode for layer in layers):
        raise ValueError(
            "the model is in step mode already; remove the first guard before adding another: remove() of what "
            "guard_optimizer returned, remove_guard() of a GuardedAdamW, or delete that optimiser"
        )
    return layers


def _check_held(optimizer: torch.optim.Optimizer, layers: list[Any]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [layer for layer in layers if id(layer.A) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold the lora_A of {len(missing)} of {len(layers)} guarded layers; build it from "
            "model.parameters() after attach_guard"
        )


def _projectors(layers: list[Any]) -> tuple[list[torch.Tensor], list[bool]]:
    # By the dictionaries: nn.Module.__getattr__ takes longer than a small matrix, and these are read after every step.
    projectors = [layer._modules["projector"] for layer in layers]
    return [one._buffers["basis"] for one in projectors], [one.complement for one in projectors]


_Lists = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


class GuardedAdamW(torch.optim.Optimizer):
    """AdamW and step mode in one: what ``torch.optim.AdamW`` with :func:`guard_optimizer` computes, in fewer launches.

    Every trainable parameter takes the step of AdamW; the lora_A of guarded layers takes it between two projections,
    ``G ← G P``, then with the moments M, V of the projected gradient and t the number of the step

        ``A ← ((1 − lr·λ) A − lr / (1 − β₁ᵗ) · M / (√(V / (1 − β₂ᵗ)) + ε)) P``,

    all layers at once (:func:`guardspace_kernels.ops.projected_adamw_`). The trajectory is that of forward mode with
    AdamW. Gradient clipping included: the backward of a layer projects its gradient as well, so that norms
    taken between ``backward`` and ``step`` are those of projected gradients. P is idempotent, so the step projects
    again without asking who has.

    The state is that of ``torch.optim.AdamW``, ``step``, ``exp_avg`` and ``exp_avg_sq``, and either loads the other's.
    While the guard is on, only this optimiser may change A; saving and certifying check that.

    Args:
        model: the guarded model; it may be wrapped (DistributedDataParallel).
        params: parameters or groups of them as for any optimiser; by default all trainable ones of the model. They
            must hold every lora_A.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; groups may have their own.

    Raises:
        ValueError: a model without guarded layers or in step mode already, parameters that lack a lora_A, a setting
            out of range; AMSGrad, ``maximize`` or an lr that is a tensor, in a group or in a state to be loaded.
        RuntimeError: from ``step``, for a sparse gradient, or where a lora_A is no longer the parameter that it was: a
            framework (DeepSpeed, FSDP), a conversion or an edit of the groups replaced it. The layers are then back in
            forward mode.
        TypeError: from copying or pickling it.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        layers = _guarded_layers(model)
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        iterable("params", params, "parameters or groups of them")
        params = list(params)
        if not params:
            raise ValueError("params is empty: at least the model's lora_A are needed")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        _check_held(self, layers)
        self._projectors = {layer.A: layer.projector for layer in layers}
        self._guard = OptimizerGuard(self, layers)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a GuardedAdamW is bound to its model and is neither copied nor pickled; build GuardedAdamW(model) and "
            "load this one's state_dict()"
        )

    def remove_guard(self) -> None:
        """Returns the layers to forward mode, for another optimiser."""
        self._guard.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of ``torch.optim.AdamW``."""
        for group in state_dict["param_groups"]:
            _check_group(group)
        super().load_state_dict(state_dict)
        for p, state in self.state.items():  # AdamW keeps its count on the CPU, unless it is fused
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the loss of ``closure``, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_group(group)
            trained = [p for p in group["params"] if p.grad is not None]
            guarded: list[torch.Tensor] = []
            others: list[torch.Tensor] = []
            for p in trained:
                (guarded if p in self._projectors else others).append(p)
            (beta1, beta2), settings = group["betas"], {name: group[name] for name in ("lr", "eps", "weight_decay")}
            for on_gpu in (True, False):
                mine = [p for p in others if p.is_cuda == on_gpu]
                if not mine:
                    continue
                params, grads, exp_avgs, exp_avg_sqs, steps = self._lists(mine)
                adamw(
                    params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=not on_gpu, fused=on_gpu, amsgrad=False,
                    beta1=beta1, beta2=beta2, maximize=False, **settings,
                )  # fmt: skip
            if guarded:
                lists = self._lists(guarded)
                torch._foreach_add_(lists[4], 1.0)
                projectors = [self._projectors[p] for p in guarded]
                bases, complements = [one.basis for one in projectors], [one.complement for one in projectors]
                projected_adamw_(*lists, bases, complements, beta1=beta1, beta2=beta2, **settings)
        return loss

    def _lists(self, params: list[torch.Tensor]) -> _Lists:
        """Params, gradients, first and second moments and steps."""
        lists: _Lists = (params, [], [], [], [])
        for p in params:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError("GuardedAdamW takes no sparse gradients; build the embedding with sparse=False")
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            values = (p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
            for members, value in zip(lists[1:], values, strict=True):
                members.append(value)
        return lists


def _check_group(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"GuardedAdamW has no {name}; use torch.optim.AdamW with guard_optimizer")
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, torch.Tensor):
        raise ValueError("GuardedAdamW takes lr as a number, got a tensor; use torch.optim.AdamW with guard_optimizer")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"GuardedAdamW: betas must be two numbers in [0, 1), got {shown(betas)}")
    for beta in betas:
        number("GuardedAdamW: betas", beta, "in [0, 1)", lambda x: x >= 0 and x < 1)
    for name in ("lr", "eps", "weight_decay"):
        number(f"GuardedAdamW: {name}", group[name], "0 or more", lambda x: x >= 0)
