"""The layers of a model that carry an adapter, and what it adds to their weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from guardspace_kernels.guard.layers import adapted_base, is_conv1d, named_submodules, parameter_values, sharding
from guardspace_kernels.nn import NullSpaceProjector, ProjectedLoraLinear

#: What rounding A P to its dtype leaves outside the null space, ‖A − A P‖ / ‖A‖, with a wide margin.
LEAK_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer with a low-rank change: ``ΔW = F G`` against ``weight`` W (d_out, d_in)."""

    module: nn.Module
    read_weight: Callable[[], torch.Tensor]
    F: torch.Tensor
    G: torch.Tensor
    dtype: torch.dtype
    projector: NullSpaceProjector | None
    fan_in_fan_out: bool

    @property
    def weight(self) -> torch.Tensor:
        """W, gathered or copied to the adapter's device where it lies elsewhere, at every access."""
        return self.read_weight()

    def leak(self, F: torch.Tensor, G: torch.Tensor) -> float:
        """``‖F G (I − P)‖_F / ‖F G‖_F`` of this layer's factors as they were rounded; 0 for a layer without a
        projector, which promises nothing, and for one that has not moved, where both norms are rounding errors."""
        if self.projector is None or not self.moved:
            return 0.0
        F, G = F.double(), G.double()
        outside = G - self.projector.project_(G.clone())
        size = _squared_norm(F, G)
        return math.sqrt(_squared_norm(F, outside) / size) if size > 0 else 0.0

    @property
    def moved(self) -> bool:
        """Whether ΔW is more than what rounding the adapter leaves of ``s·BA − s·B₀A₀`` at its start."""
        F, G = self.F.double(), self.G.double()
        summands = float((F.square().sum(dim=0) * G.square().sum(dim=1)).sum())
        rounding = max(torch.finfo(self.dtype).eps, 1e-6)  # bases are orthonormal to float32, whatever A is in
        return _squared_norm(F, G) > rounding**2 * summands


def _squared_norm(F: torch.Tensor, G: torch.Tensor) -> float:
    """``‖F G‖_F²``."""
    return max(float(((F.T @ F @ G) * G).sum()), 0.0)


def held_in(t: torch.Tensor) -> torch.dtype:
    """The dtype that its values were rounded to, whichever holds them now: PEFT loads adapters into float32."""
    rounded = (torch.bfloat16, torch.float16)
    return next((dtype for dtype in rounded if torch.equal(t.to(dtype).to(t.dtype), t)), t.dtype)


def triangle(F: torch.Tensor) -> torch.Tensor:
    """R of F = Q R: ``‖R z‖ = ‖F z‖`` for every z, with r'×r' numbers instead of d_out×r'."""
    return torch.linalg.qr(F, mode="r").R


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Name in the base model -> adapted layer, for guarded layers and for plain PEFT LoRA layers.

    Raises:
        TypeError: a layer's parameters are divided among processes.
        ValueError: several models with adapters, adapters outside of the one or without a guard beside guarded ones, a
            merged or non-finite adapter, one that is no plain LoRA of a Linear or Conv1D.
    """
    found = {}
    named = dict(named_submodules(adapted_base(model)))
    inside = set(named.values())
    outside = [name for name, module in model.named_modules() if _is_adapted(module) and module not in inside]
    if outside:
        raise ValueError(f"layer {outside[0]} has an adapter outside of the model that PEFT adapted; give that model")
    for name, module in named.items():
        if isinstance(module, ProjectedLoraLinear):
            F, G = module.delta_factors()
            found[name] = AdaptedLayer(
                module, module.weight.detach, F, G, module.lora_A.dtype, module.projector, False
            )  # fmt: skip
        elif _is_adapted(module):
            found[name] = _peft_layer(name, module)
        if name in found and not all(torch.isfinite(t).all() for t in (found[name].F, found[name].G)):
            raise ValueError(f"layer {name}: the adapter holds non-finite values; its training diverged")
    guarded = [name for name, layer in found.items() if hasattr(layer.module, "delta_factors")]
    if guarded and len(guarded) < len(found):
        plain = next(name for name in found if name not in guarded)
        raise ValueError(f"layer {plain}: an adapter without a guard was put into a guarded model; take it out again")
    return found


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, ProjectedLoraLinear) or (hasattr(module, "lora_A") and hasattr(module, "get_base_layer"))


def _peft_layer(name: str, module: Any) -> AdaptedLayer:
    kind = sharding(module)
    if kind:
        raise TypeError(
            f"layer {name}: its parameters are divided by {kind} among processes; gather them first (after "
            "fully_shard, unshard() of each module), or use a model that is whole in one process"
        )
    if module.merged:
        raise ValueError(f"layer {name}: its adapter is merged; certify and export before merging, or unmerge first")
    base = module.get_base_layer()
    if hasattr(module, "delta_factors"):
        F, G = module.delta_factors()
        return AdaptedLayer(
            module, module.base_weight, F, G, module.A.dtype, module.projector, module.fan_in_fan_out
        )  # fmt: skip
    if not (isinstance(base, nn.Linear) or is_conv1d(base)):
        raise ValueError(
            f"layer {name}: its adapter changes a {type(base).__name__}; only those of Linear and Conv1D can be judged"
        )
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if len(active) != 1:
        raise ValueError(f"layer {name}: exactly one LoRA adapter must be active, got {active}")
    if getattr(module, "lora_variant", {}).get(active[0]) is not None:
        raise ValueError(f"layer {name}: only plain LoRA changes the weight by B A; DoRA and other variants do not")
    if module.lora_B[active[0]].bias is not None:
        raise ValueError(f"layer {name}: its adapter has a bias (lora_bias), which moves every output; train without")
    A, B = module.lora_A[active[0]].weight.detach(), module.lora_B[active[0]].weight.detach()
    if A.is_meta or B.is_meta:
        raise ValueError(f"layer {name}: its adapter is on the meta device, without values; load it first")
    F, G = module.scaling[active[0]] * B.float(), A.float()
    return AdaptedLayer(module, partial(_base_weight, base), F, G, A.dtype, None, is_conv1d(base))


def _base_weight(base: Any) -> torch.Tensor:
    weight = parameter_values(base, "weight", base.weight).detach()
    return weight.T if is_conv1d(base) else weight
