"""What an adapter layer needs of a plan, checked against the model it is to be attached to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from guardspace_kernels.guard.layers import find_layers, is_conv1d
from guardspace_kernels.guard.plan import GuardPlan
from guardspace_kernels.nn.projected_lora_linear import has_hooks
from guardspace_kernels.ops import null_project_


@dataclass(frozen=True)
class LayerGuard:
    """One layer's share of a plan: ``ΔW = s (B A − B₀A₀) P`` starts from A = A₀P, B = B₀.

    A0 (r, d_in), B0 (d_out, r), basis (d_in, k) or None, float32. ``frozen``: whether B₀A₀ is taken off the weight;
    else ``ΔW = s B A P``, which is zero at the start or the change of an adapter that was trained before.
    ``own_forward``: the layer's class has a forward of its own, which was seen to compute x Wᵀ + b. ``shared``: another
    module that has the same weight, or "".
    """

    name: str
    A0: torch.Tensor
    B0: torch.Tensor
    basis: torch.Tensor | None
    complement: bool
    frozen: bool
    own_forward: bool = False
    shared: str = ""


def layer_guards(
    model: nn.Module,
    plan: GuardPlan,
    residual: str = "virtual",
    start: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Iterator[tuple[str, LayerGuard]]:
    """(name, guard) of every layer of the plan; layers that read the same tensor get the same basis object.

    Args:
        start: layer -> (F, G), whose ``F G P`` is the change that the layer starts with.

    Raises:
        TypeError: the model carries adapters already. ValueError: the plan is of another model or does not protect
            what its configuration asks for, a weight cannot hold W_res where ``residual`` is "frozen", or ``start``
            is of other layers, shapes or another rank.
    """
    plan.check()
    layers = find_layers(model, list(plan.layers))
    plan.model.check_model(model, list(layers), "the plan's statistics")
    if start is not None:
        _check_start(model, plan, start)
    sharing = shared_weights(model, layers)
    for name, module in layers.items():
        layer, space = plan.layers[name], plan.space_of(name)
        guard = LayerGuard(
            name,
            layer.A0,
            layer.B0,
            None if space is None else space.basis,
            space is None or space.complement,
            plan.has_frozen,
            own_forward=type(module).forward not in _plain_forwards(module),
            shared=sharing.get(name, ""),
        )
        if start is not None:
            guard = _started(guard, *start[name], plan.config.scale)
        if residual == "frozen" and guard.frozen:
            _check_holds_residual(module, guard)
        yield name, guard


def _started(guard: LayerGuard, F: torch.Tensor, G: torch.Tensor, scale: float) -> LayerGuard:
    """The guard that starts with ``s·B₀A₀ = F G P``, and takes nothing off the weight."""
    A_P = G.to("cpu", copy=True)
    if guard.basis is not None:
        null_project_(A_P, guard.basis, guard.complement)
    return replace(guard, A0=A_P, B0=F.cpu() / scale, frozen=False)


def _check_start(model: nn.Module, plan: GuardPlan, start: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """ValueError that names layer and remedy unless it adapts the plan's layers, and these alone, with its rank."""
    lacking = [name for name in plan.layers if name not in start]
    unplanned = [name for name in start if name not in plan.layers]
    known = dict(model.named_modules())
    foreign = [name for name in unplanned if name not in known]
    if foreign:
        raise ValueError(f"start adapts layer {foreign[0]}, which the model does not have; it is of another base model")
    if lacking or unplanned:
        name = (unplanned or lacking)[0]
        endings = sorted({one.rsplit(".", 1)[-1] for one in start})
        raise ValueError(
            f"start adapts {len(start)} layers, the plan is of {len(plan.layers)}: {name} is not in "
            f"{'the plan' if unplanned else 'start'}; plan for the adapter's own layers, target_modules={endings}"
        )
    for name, (F, G) in start.items():
        shape, rank = (F.shape[0], G.shape[1]), G.shape[0]
        if shape != plan.layers[name].shape:
            raise ValueError(
                f"start changes layer {name} by a matrix {tuple(shape)}, its weight is {plan.layers[name].shape}: the "
                "adapter is of another base model"
            )
        if rank != plan.config.rank:
            raise ValueError(
                f"start has rank {rank} in layer {name}, the plan {plan.config.rank}; plan with "
                f"GuardConfig(rank={rank})"
            )


def _plain_forwards(module: nn.Module) -> tuple[Any, ...]:
    if not is_conv1d(module):
        return (nn.Linear.forward,)
    from transformers.pytorch_utils import Conv1D

    return (Conv1D.forward,)


def computes_weight(module: nn.Module) -> bool:
    """Whether the weight is not a parameter but a function of others (``torch.nn.utils.parametrize``)."""
    return is_parametrized(module, "weight") or not isinstance(module.weight, nn.Parameter)


def _check_holds_residual(module: nn.Module, guard: LayerGuard) -> None:
    if module.weight.is_meta:
        reason = "is offloaded"
    elif guard.shared:
        reason = f"is also that of {guard.shared}, which would read W_res too"
    elif computes_weight(module):
        reason = "is computed from other parameters"
    elif has_hooks(module):
        reason = f"is read by hooks of its {type(module).__name__}, which would see W_res"
    else:
        return
    raise ValueError(
        f'layer {guard.name}: residual="frozen" would write into its weight, which {reason}; '
        'attach with residual="virtual"'
    )


def shared_weights(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """Layer -> what else reads the memory of its weight: a tied parameter, or the same module under a second name."""
    holders: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(_memory(parameter), []).append(f"{name}.{key}".lstrip("."))
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    shared = {}
    for name, module in layers.items():
        others = [other for other in holders.get(_memory(module.weight), ()) if other != f"{name}.weight"]
        if others:
            shared[name] = others[0]
        elif places[id(module)] > 1:
            shared[name] = "the same module under another name"
    return shared


def _memory(parameter: Any) -> Any:
    plain = type(parameter) is nn.Parameter and not parameter.is_meta
    return (parameter.device, parameter.data_ptr()) if plain else id(parameter)


def compute_device(name: str, module: Any) -> torch.device:
    """Where a layer computes: where its weight is, or where accelerate loads an offloaded one to."""
    if not module.weight.is_meta:
        return torch.device(module.weight.device)
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise ValueError(
        f"layer {name}: its weight is on the meta device and no hook of its own loads it; load the model first"
    )


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Gives the model back as it was if the context raises: its modules, weights, attributes and trainable flags."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    holders = [holder for holder in (model, getattr(model, "config", None)) if hasattr(holder, "__dict__")]
    attributes = [(vars(holder), dict(vars(holder))) for holder in holders]
    try:
        yield
    except BaseException:
        wrapped: list[Any] = [module for module in model.modules() if getattr(module, "guarded", False)]
        for module in wrapped:
            module.unload_and_optionally_merge_module(False, False, None)
        for now, before in (*attributes, *((module._modules, own) for module, own in children)):
            now.clear()
            now.update(before)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise
