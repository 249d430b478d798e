"""The certificate: how far the adapter moves outputs on harmful prompts, exactly and measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from guardspace_kernels.arguments import instance, integer, iterable, number
from guardspace_kernels.guard.adapted import LEAK_TOLERANCE, AdaptedLayer, adapted_layers, held_in, triangle
from guardspace_kernels.guard.batches import Batch
from guardspace_kernels.guard.drift import DriftExceededError, DriftReport, LayerDrift, root_ratio
from guardspace_kernels.guard.fingerprint import ROUNDED, ModelFingerprint
from guardspace_kernels.guard.heldout import measure_heldout
from guardspace_kernels.guard.layers import peft_model
from guardspace_kernels.guard.null_space import is_finite
from guardspace_kernels.guard.plan import GuardPlan
from guardspace_kernels.guard.statistics import CalibrationStatistics, InputStatistics
from guardspace_kernels.nn import NullSpaceProjector
from guardspace_kernels.ops import covariance_update_, squared_drift


def squared_change(F: torch.Tensor, G: torch.Tensor, covariance: torch.Tensor) -> float:
    """``‖F G X‖_F² = Σ (FᵀF) ∘ (G C Gᵀ)``."""
    return max(float(squared_drift(covariance.to(G.device), F, G)), 0.0)


def squared_output(weight: torch.Tensor, covariance: torch.Tensor) -> float:
    """``‖W X‖_F² = tr(W C Wᵀ) = Σ (WᵀW) ∘ C``, in float64; of both only the lower triangle is formed and read."""
    W = weight.double()
    C = covariance.to(W.device)
    gram = torch.zeros_like(C, dtype=W.dtype)
    covariance_update_(gram, W)
    return max(float(2 * (gram * C).sum() - (gram.diagonal() * C.diagonal()).sum()), 0.0)


def relative_drift(F: torch.Tensor, G: torch.Tensor, weight: torch.Tensor, covariance: torch.Tensor) -> float:
    """``‖F G X‖_F / ‖W X‖_F``."""
    return root_ratio(squared_change(F, G, covariance), squared_output(weight, covariance))


def certify(
    model: nn.Module,
    stats: CalibrationStatistics,
    heldout: Iterable[Batch] | None = None,
    *,
    plan: GuardPlan | None = None,
    answer_tokens: int = 12,
    max_drift: float | None = None,
) -> DriftReport:
    """Certifies how far the adapter moves each layer's output on harmful prompts.

    Exact and without a pass over data: ``‖ΔW X‖_F² = Σ (FᵀF) ∘ (G C Gᵀ)`` from the stored covariance, relative to
    ``‖W X‖_F² = tr(W C Wᵀ)``. X holds the calibration tokens but the first of each prompt, which are judged apart, and
    where the statistics weigh kinds of tokens, ``C = Σ_k w_k X_kᵀ X_k``, both are sums of tokens so weighted. The
    inputs X are the base model's: layers are judged one by one, each at the inputs that the base model feeds it.

    All other weights are compared with those of the model that the statistics were collected on. If one differs, the
    report names it and promises nothing. Weights that were only rounded, by casting the model, are noted.

    Args:
        model: a guarded model, or a plain PEFT LoRA on the same base model for comparison.
        stats: the statistics that the plan was made from, or others of the same base model.
        heldout: batches of prompts of the same kind that were not in ``stats``. Adds measured drift per layer, the
            next-token KL to the base model and the change of the log-probability of the base model's own answers. A
            batch may bring these along, marked 2 in ``token_kinds`` as for :func:`collect_statistics`; else they are
            generated, greedily.
        plan: of a plain LoRA that was exported from a guarded model, or is a sum of such: it must lie in the plan's
            null space. PEFT's ``add_weighted_adapter`` keeps it there by ``cat``, ``linear`` and, up to rounding,
            ``svd``, not by ways that drop single entries (``ties``, ``dare``, ``magnitude_prune``).
        answer_tokens: length of those answers, where they are generated.
        max_drift: raise if a layer drifts by more, or if nothing is promised (:meth:`DriftReport.failure`).

    Raises:
        DriftExceededError: see ``max_drift``; names the worst layer and carries the report.
        ValueError: no adapted layer, one whose adapter is merged or switched off, or outside of ``plan``; no statistics
            for one, statistics of other weights, non-finite or zero ones; ``heldout`` for a model whose base weights
            changed. The message names the layer or weight.

    Source: GuardSpace's null-space condition (arXiv 2510.14301), turned into a number.
    """
    instance("model", model, nn.Module, "a torch.nn.Module")
    instance("stats", stats, CalibrationStatistics, "a CalibrationStatistics")
    if heldout is not None:
        iterable("heldout", heldout, "a list, or another iterable, of batches")
    if plan is not None:
        instance("plan", plan, GuardPlan, "a GuardPlan or None")
    answer_tokens = integer("answer_tokens", answer_tokens, 1)
    if max_drift is not None:
        max_drift = number("max_drift", max_drift, "a number of 0 or more", lambda x: x >= 0)
    layers, model = judged_layers(model), peft_model(model)
    plan = _plan_for(model, plan)
    if plan is not None:
        layers = {name: _under_plan(name, layer, plan) for name, layer in layers.items()}
    changes = check_statistics(model, layers, stats, plan)
    rows = _certify_layers(layers, stats)
    tokens = max(entry.tokens for entry in stats.inputs)
    report = DriftReport(rows, tokens, stats.prompts, stats.fingerprint.model)
    report.changed = {name: what for name, what in changes.items() if not what.startswith(ROUNDED)}
    _add_notes(report, layers, stats, plan, changes)
    if heldout is not None:
        if report.changed:
            _require_base(model, layers, stats)
        measure_heldout(model, layers, {row.name: row for row in rows}, heldout, answer_tokens, report)
    failure = report.failure(max_drift)
    if max_drift is not None and failure:
        raise DriftExceededError(failure, report, {row.name: row.drift for row in rows})
    return report


def judged_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Its adapted layers; ValueError if there is none, or if an adapter is switched off."""
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{type(peft_model(model)).__name__} has no adapted layer; nothing to certify")
    off = [name for name, layer in layers.items() if getattr(layer.module, "disable_adapters", False)]
    if off:
        raise ValueError(f"layer {off[0]}: its adapter is switched off; certify the model as it will be used")
    return layers


def _plan_for(model: nn.Module, plan: GuardPlan | None) -> GuardPlan | None:
    """The plan of a guarded model, or the one given for a plain LoRA."""
    own: GuardPlan | None = getattr(model, "guard_plan", None)
    if own is not None and plan is not None and own.fingerprint != plan.fingerprint:
        raise ValueError("the model is guarded by another plan than the one given; leave plan out")
    return own or plan


def _under_plan(name: str, layer: AdaptedLayer, plan: GuardPlan) -> AdaptedLayer:
    """The layer with its projector; ValueError if its adapter acts outside of the null space."""
    if layer.projector is not None:
        return layer
    if name not in plan.layers:
        raise ValueError(f"layer {name} carries an adapter, but the plan has none for it")
    space = plan.space_of(name)
    if space is None:
        return layer
    projector = NullSpaceProjector(space.basis.to(layer.G.device), space.complement)
    outside = layer.G - projector.project_(layer.G.clone())
    # Row i counts as much as column i of F makes of it: an SVD of a sum, as PEFT's, has rows that act on nothing.
    weights = layer.F.norm(dim=0)[:, None]
    leak = float((weights * outside).norm() / (weights * layer.G).norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not leak <= LEAK_TOLERANCE[held_in(layer.G)]:
        raise ValueError(
            f"layer {name}: the adapter acts outside the null space (‖A Q‖/‖A‖ = {leak:.1e}); it was not trained under "
            "this plan, or the file was altered, or it was made of adapters that had been rounded or were of other "
            "plans: export those of one plan in float32 before they are added up"
        )
    return replace(layer, projector=projector)


def _add_notes(
    report: DriftReport,
    layers: dict[str, AdaptedLayer],
    stats: CalibrationStatistics,
    plan: GuardPlan | None,
    changes: dict[str, str],
) -> None:
    if any(layer.projector is None for layer in layers.values()):
        report.notes.append("no projector: an ordinary adapter, whose drift is bounded only by its norm")
    if plan is not None and plan.left_out:
        report.notes.append(f"{len(plan.left_out)} layers are left out of the plan and stay frozen")
    if stats.weighting:
        report.notes.append(f"the calibration tokens are weighted by kind, as in the statistics: {stats.weighting}")
    if blank := blank_layers(layers, stats):
        report.notes.append(f"{blank} layers read none of the calibration tokens: their drift says nothing")
    since_plan = "" if plan is None else _rounded_to(plan.model.differences(stats.fingerprint))
    if since_plan:
        report.notes.append(
            f"the statistics are of the base model rounded to {since_plan}, the plan is of the one before: it protects "
            "that one's inputs"
        )
    rounded = {name: what for name, what in changes.items() if what.startswith(ROUNDED)}
    if rounded:
        report.notes.append(
            f"{len(rounded)} base weights were rounded to {_rounded_to(rounded)} after the statistics "
            "were collected: drift is what the adapter does to the rounded model, at inputs of the one before; what "
            "rounding itself does is not in it, nor in numbers on held-out prompts"
        )


def blank_layers(layers: dict[str, AdaptedLayer], stats: CalibrationStatistics) -> int:
    """How many of them read no calibration token; ValueError if none did."""
    blank = sum(stats.for_layer(name).tokens == 0 for name in layers)
    if blank == len(layers):
        raise ValueError("no adapted layer read a calibration token, so that nothing can be told; collect on others")
    return blank


def check_statistics(
    model: nn.Module, layers: dict[str, AdaptedLayer], stats: CalibrationStatistics, plan: GuardPlan | None = None
) -> dict[str, str]:
    """ValueError unless the statistics are of these layers and of the base model's weights; names the layer.

    Returns:
        What became of the other weights since the statistics were collected, by name, and of all weights that were
        rounded; see :meth:`ModelFingerprint.differences`.
    """
    for name in layers:
        if name not in stats.layers:
            raise ValueError(f"layer {name} has no statistics; collect them with it in target_modules")
    found = _base_differences(model, layers, stats, adapted=True)
    for name in layers:
        difference = found.get(f"{name}.weight", "")
        if difference and not difference.startswith(ROUNDED):
            raise ValueError(
                f"layer {name}: its base weight is not the one the statistics were collected on ({difference}); "
                "collect them again"
            )
    plan = _plan_for(model, plan)
    if plan is not None and not _rounded_to(plan.model.differences(mine := stats.fingerprint.restricted(layers))):
        plan.model.check(mine, "the statistics")
    return found


def _rounded_to(differences: dict[str, str]) -> str:
    """The dtypes that weights were rounded to, where nothing else differs; else empty."""
    if not all(what.startswith(ROUNDED) for what in differences.values()):
        return ""
    return " and ".join(sorted({what.removeprefix(ROUNDED) for what in differences.values()}))


def _base_differences(
    model: nn.Module, layers: dict[str, AdaptedLayer], stats: CalibrationStatistics, adapted: bool
) -> dict[str, str]:
    mine = stats.fingerprint.restricted(layers)
    now = ModelFingerprint.of(peft_model(model), list(layers), version=mine.version, adapted=adapted)
    found = mine.differences(now)
    for name, layer in layers.items():
        module: Any = layer.module
        if getattr(module, "weight_is_residual", False):
            # The layer holds W_res, and keeps W, which attach_guard compared with the plan's.
            found.pop(f"{name}.weight", None)
            if residual := module.residual_difference():
                found[f"{name}.weight"] = residual
    return found


def _require_base(model: nn.Module, layers: dict[str, AdaptedLayer], stats: CalibrationStatistics) -> None:
    """ValueError unless the model is the base model while its adapter is switched off."""
    found = _base_differences(model, layers, stats, adapted=False)
    name = next((name for name, what in found.items() if not what.startswith(ROUNDED)), None)
    if name is not None:
        raise ValueError(
            f"heldout compares with the base model, but {name} ({found[name]}) is not the base model's, and is not put "
            "back while the adapter is switched off; certify without heldout"
        )


def checked_covariance(name: str, entry: InputStatistics, device: torch.device | str = "cpu") -> torch.Tensor:
    """C's lower triangle as a matrix; ValueError that names the layer if no drift can be told from it: every adapter
    would pass, or none."""
    covariance = entry.lower_on(device)
    if not (is_finite(covariance) and is_finite(entry.sinks)):
        raise ValueError(f"layer {name}: the statistics hold non-finite values; collect them again")
    if entry.tokens == 0 and not entry.routed:
        raise ValueError(f"layer {name}: no token was counted; collect statistics on longer prompts")
    diagonal = covariance.diagonal()
    if bool((diagonal < 0).any()) or (entry.tokens > 0 and not bool((diagonal > 0).any())):
        raise ValueError(
            f"layer {name}: the statistics of {entry.tokens} tokens have "
            f"{'a negative variance' if bool((diagonal < 0).any()) else 'no energy'}; collect them again"
        )
    return covariance


def covariances(
    layers: dict[str, AdaptedLayer], stats: CalibrationStatistics
) -> Iterator[tuple[list[str], InputStatistics, torch.Tensor]]:
    """(names, their input's statistics, its C's lower triangle as a matrix): one at a time, with all the layers that
    read that input."""
    readers: dict[int, list[str]] = {}
    for name in layers:
        readers.setdefault(id(stats.for_layer(name)), []).append(name)
    for names in readers.values():
        entry = stats.for_layer(names[0])
        yield names, entry, checked_covariance(names[0], entry, layers[names[0]].G.device)


def _certify_layers(layers: dict[str, AdaptedLayer], stats: CalibrationStatistics) -> list[LayerDrift]:
    rows = {}
    for names, entry, C in covariances(layers, stats):
        free: dict[NullSpaceProjector | None, float] = {}
        for name in names:
            projector = layers[name].projector
            if projector not in free:
                free[projector] = _free_energy(projector, C)
            rows[name] = _certify_layer(name, layers[name], entry.sinks, C, free[projector])
    return [rows[name] for name in layers]


def _free_energy(projector: NullSpaceProjector | None, C: torch.Tensor) -> float:
    """``tr(P C)``, which is ``tr C − Σ Q ∘ (C Q)`` or ``Σ N ∘ (C N)``, in float64, from the lower triangle of C."""
    C = C.double()
    if projector is None:
        return float(C.trace())
    basis = projector.basis.double()
    C = C.to(basis.device)
    within = 2 * ((C @ basis) * basis).sum() - (C.diagonal() @ basis.square()).sum()
    return float((C.trace() - within if projector.complement else within).clamp_min(0.0))


def _certify_layer(
    name: str, layer: AdaptedLayer, sinks: torch.Tensor, C: torch.Tensor, free_energy: float
) -> LayerDrift:
    output = squared_output(layer.weight, C)
    spectral = _spectral_norm(layer.F.double(), layer.G.double())
    sinks = sinks.double().to(layer.F.device)
    sink_drift = 0.0
    if sinks.numel():
        moved = (sinks @ layer.G.double().T) @ layer.F.double().T
        kept = sinks @ layer.weight.double().T
        sink_drift = float((moved.norm(dim=1) / kept.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)).max())
    drift = root_ratio(squared_change(layer.F, layer.G, C), output)
    return LayerDrift(name, drift, root_ratio(spectral**2 * free_energy, output), sink_drift)


def _spectral_norm(F: torch.Tensor, G: torch.Tensor) -> float:
    """``‖F G‖₂`` through the r'×r' triangles of F and Gᵀ."""
    return float(torch.linalg.matrix_norm(triangle(F) @ triangle(G.T).T, ord=2))
