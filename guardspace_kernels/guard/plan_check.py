"""What every plan satisfies, whoever made it: a fingerprint tells that a plan is whole, not that it protects."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from guardspace_kernels.guard.null_space import NullSpace, is_finite
from guardspace_kernels.ops import null_project_
from guardspace_kernels.ops._library import full_float32_products

if TYPE_CHECKING:
    from guardspace_kernels.guard.plan import GuardConfig, GuardPlan, LayerPlan

# Relative. Rounding leaves 2e-6 at most where d = 8192, and 1e-7 where it is a few hundred.
_ORTHONORMAL = 1e-5
_OUTSIDE = 1e-5
# The solver sums eigenvalues in float32 or better, and the sinks only add to what is protected.
_ENERGY = 1e-4
_PROBES = 4
_DTYPES = (torch.float32, torch.float64)


@full_float32_products()
def check_plan(plan: GuardPlan) -> None:
    """ValueError that names the layer unless the plan can be what its configuration asks for.

    Shapes, dtypes and indices; finite values; ``QᵀQ = I``, by random vectors z, whose ``‖QᵀQ z − z‖ / ‖z‖`` is
    ``‖QᵀQ − I‖_F / √k`` on average; the thinner of the two bases; ``A₀P = A₀``; at most the share of the energy free
    that the configuration leaves. It takes 4 d k products per basis and 4 r d k per layer.
    """
    if not plan.layers:
        raise ValueError("the plan has no layer; plan again")
    if plan.coverage is not None and len(plan.coverage.inputs) != len(plan.spaces):
        raise ValueError(
            f"the plan's coverage is of {len(plan.coverage.inputs)} of {len(plan.spaces)} spaces; plan again"
        )
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "big"))  # nobody can prepare for it
    first = {layer.space: name for name, layer in reversed(plan.layers.items()) if _index(layer, len(plan.spaces))}
    for i, space in enumerate(plan.spaces):
        if i not in first:
            raise ValueError(f"space {i} of the plan belongs to no layer; plan again")
        why = _wrong_space(space, plan.config, generator)
        if why:
            raise _refused(first[i], why)
    for name, layer in plan.layers.items():
        why = _wrong_layer(name, layer, plan)
        if why:
            raise _refused(name, why)


def _refused(name: str, why: str) -> ValueError:
    return ValueError(f"layer {name}: {why}; it was altered. Take the original, or plan again")


def _index(layer: LayerPlan, spaces: int) -> bool:
    if not _whole(layer.space) or not 0 <= layer.space < spaces:
        raise _refused(layer.name, f"the plan's space is number {layer.space!r} of {spaces}")
    return True


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong_space(space: NullSpace | None, config: GuardConfig, generator: torch.Generator) -> str:
    """What is wrong with it; empty if nothing is."""
    if (space is not None) != config.projector:
        return f"the plan has {'no ' if space is None else ''}protected space with projector={config.projector}"
    if space is None:
        return ""
    basis, protected = space.basis, space.protected
    if basis.dim() != 2 or basis.dtype not in _DTYPES or not is_finite(basis):
        return (
            f"the plan's basis is not a finite matrix in float32 or float64 ({basis.dtype}, shape {tuple(basis.shape)})"
        )
    d, k = basis.shape
    if not _whole(protected) or not 0 <= protected < d or k != (protected if space.complement else d - protected):
        return f"the plan's basis has {k} of {d} dimensions, for {protected!r} protected ones"
    if space.complement != (protected <= d - protected):
        return f"the plan's basis, of {protected} protected and {d - protected} free dimensions, is not the thinner one"
    if not _whole(space.sink_directions) or not 0 <= space.sink_directions <= protected:
        return f"the plan protects {space.sink_directions!r} directions of first tokens among {protected}"
    z = torch.randn(k, _PROBES, generator=generator, dtype=basis.dtype)
    error = float((basis.T @ (basis @ z) - z).norm() / z.norm()) if k else 0.0
    if not error <= _ORTHONORMAL:
        return f"the columns of the plan's basis are not orthonormal (‖QᵀQ z − z‖ / ‖z‖ = {error:.1e})"
    return _wrong_energy(space, config)


def _wrong_energy(space: NullSpace, config: GuardConfig) -> str:
    free = space.free_energy
    if not 0.0 <= free <= 1.0:
        return f"the plan leaves a share {free!r} of the energy free"
    if space.protected == 0 and free < 1.0 - _ENERGY:
        return f"the plan protects no dimension, yet leaves only a share {free:.4g} of the energy free"
    if config.rule == "energy" and free > 1.0 - config.protect + _ENERGY:
        return f"the plan leaves a share {free:.4g} of the energy free with protect={config.protect}"
    if config.rule == "rank" and space.protected != (config.protect_dims or 0) + space.sink_directions:
        return (
            f"the plan protects {space.protected} dimensions, {space.sink_directions} of them for first tokens, with "
            f"protect_dims={config.protect_dims}"
        )
    return ""


def _wrong_layer(name: str, layer: LayerPlan, plan: GuardPlan) -> str:
    d_out, d_in = layer.shape
    rank, space = plan.config.rank, plan.spaces[layer.space]
    if layer.name != name or name not in plan.model.layers or name in plan.left_out:
        return f"the plan has it as {layer.name}, with{'' if name in plan.model.layers else 'out'} a hash of its weight"
    if not 1 <= rank <= min(d_out, d_in):
        return f"the plan's rank {rank} is above min(d_out, d_in) = {min(d_out, d_in)}"
    for factor, shape in ((layer.A0, (rank, d_in)), (layer.B0, (d_out, rank))):
        if factor.shape != shape or factor.dtype not in _DTYPES or not is_finite(factor):
            found = f"{factor.dtype}, {tuple(factor.shape)}"
            return f"the plan's starting factor is not a finite {shape} in float32 or float64 ({found})"
    if not plan.has_frozen and layer.B0.any():
        return 'the plan\'s B₀ is not zero with init="zero"'
    if space is None:
        return ""
    if space.basis.shape[0] != d_in:
        return f"the plan's basis is of {space.basis.shape[0]} dimensions, the layer reads {d_in}"
    moved = layer.A0.clone()
    null_project_(moved, space.basis, space.complement)
    outside = float((moved - layer.A0).norm())
    if not outside <= _OUTSIDE * float(layer.A0.norm()):
        return f"the plan's A₀ is outside the null space (‖A₀P − A₀‖ / ‖A₀‖ = {outside / float(layer.A0.norm()):.1e})"
    return ""
