"""What an adapter layer needs of a plan, checked against the model it is to be attached to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from guardspace_kernels.guard.layers import find_layers
from guardspace_kernels.guard.plan import GuardPlan


@dataclass(frozen=True)
class LayerGuard:
    """One layer's share of a plan: ``ΔW = s (B A − B₀A₀) P`` starts from A = A₀P, B = B₀.

    A0 (r, d_in), B0 (d_out, r), basis (d_in, k) or None, float32. ``frozen``: whether B₀A₀ is taken off the weight.
    """

    A0: torch.Tensor
    B0: torch.Tensor
    basis: torch.Tensor | None
    complement: bool
    frozen: bool


def layer_guards(model: nn.Module, plan: GuardPlan) -> Iterator[tuple[str, LayerGuard]]:
    """(name, guard) of every layer of the plan; layers that read the same tensor get the same basis object.

    Raises:
        TypeError: the model carries adapters already. ValueError: the plan is of another model.
    """
    names = list(find_layers(model, list(plan.layers)))
    plan.model.check_model(model, names, "the plan's statistics")
    for name in names:
        layer, space = plan.layers[name], plan.space_of(name)
        yield (
            name,
            LayerGuard(
                layer.A0,
                layer.B0,
                None if space is None else space.basis,
                space is None or space.complement,
                plan.has_frozen,
            ),
        )
