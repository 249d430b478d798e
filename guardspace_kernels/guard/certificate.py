"""The certificate: how far the adapter moves outputs on harmful prompts, exactly and measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from guardspace_kernels.arguments import instance, integer, iterable, number
from guardspace_kernels.guard.adapted import LEAK_TOLERANCE, AdaptedLayer, adapted_layers
from guardspace_kernels.guard.batches import (
    Batch,
    check_ids,
    check_length,
    checked_mask,
    evaluating,
    to_device,
    with_answers,
)
from guardspace_kernels.guard.collecting.trial import Trial
from guardspace_kernels.guard.drift import DriftExceededError, DriftReport, HeldOut, LayerDrift
from guardspace_kernels.guard.fingerprint import ROUNDED, ModelFingerprint
from guardspace_kernels.guard.layers import peft_model
from guardspace_kernels.guard.lockstep import Lockstep
from guardspace_kernels.guard.null_space import is_finite
from guardspace_kernels.guard.plan import GuardPlan
from guardspace_kernels.guard.routing import Routing
from guardspace_kernels.guard.statistics import CalibrationStatistics, InputStatistics
from guardspace_kernels.guard.tokens import tokens_of
from guardspace_kernels.nn import NullSpaceProjector
from guardspace_kernels.ops import squared_drift
from guardspace_kernels.ops._library import full_float32_products


def _squared_drift(F: torch.Tensor, G: torch.Tensor, covariance: torch.Tensor) -> float:
    return max(float(squared_drift(covariance.to(G.device), F, G)), 0.0)


def squared_output(weight: torch.Tensor, covariance: torch.Tensor) -> float:
    """``‖W X‖_F² = tr(W C Wᵀ)``."""
    W = weight.double()
    return max(float(((W @ covariance.double().to(W.device)) * W).sum()), 0.0)


def relative_drift(F: torch.Tensor, G: torch.Tensor, weight: torch.Tensor, covariance: torch.Tensor) -> float:
    """``‖F G X‖_F / ‖W X‖_F``."""
    return _ratio(_squared_drift(F, G, covariance), squared_output(weight, covariance))


def _ratio(numerator: float, denominator: float) -> float:
    """The root of their ratio; NaN where a sum overflowed on both sides or is NaN itself."""
    if denominator != 0:
        return math.sqrt(numerator / denominator)
    return 0.0 if numerator == 0 else numerator * math.inf


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
            next-token KL to the base model and the change of the log-probability of the base model's own answers.
        plan: of a plain LoRA that was exported from a guarded model: it must lie in the plan's null space.
        answer_tokens: length of those answers.
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
    layers, model = adapted_layers(model), peft_model(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapted layer; nothing to certify")
    off = [name for name, layer in layers.items() if getattr(layer.module, "disable_adapters", False)]
    if off:
        raise ValueError(f"layer {off[0]}: its adapter is switched off; certify the model as it will be used")
    plan = _plan_for(model, plan)
    if plan is not None:
        layers = {name: _under_plan(name, layer, plan) for name, layer in layers.items()}
    changes = check_statistics(model, layers, stats, plan)
    rows = [_certify_layer(name, layer, stats.for_layer(name)) for name, layer in layers.items()]
    tokens = max(entry.tokens for entry in stats.inputs)
    report = DriftReport(rows, tokens, stats.prompts, stats.fingerprint.model)
    report.changed = {name: what for name, what in changes.items() if not what.startswith(ROUNDED)}
    _add_notes(report, layers, stats, plan, changes)
    if heldout is not None:
        if report.changed:
            _require_base(model, layers, stats)
        _measure_heldout(model, layers, {row.name: row for row in rows}, heldout, answer_tokens, report)
    failure = report.failure(max_drift)
    if max_drift is not None and failure:
        raise DriftExceededError(failure, report)
    return report


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
    leak = float(outside.norm() / layer.G.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not leak <= LEAK_TOLERANCE[layer.dtype]:
        raise ValueError(
            f"layer {name}: the adapter acts outside the null space (‖A Q‖/‖A‖ = {leak:.1e}); it was not trained under "
            "this plan, or the file was altered"
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
    blank = sum(stats.for_layer(name).tokens == 0 for name in layers)
    if blank == len(layers):
        raise ValueError("no adapted layer read a calibration token, so that nothing can be told; collect on others")
    if blank:
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
    """C; ValueError that names the layer if no drift can be told from it: every adapter would pass, or none."""
    covariance = entry.covariance_on(device)
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


def _certify_layer(name: str, layer: AdaptedLayer, entry: InputStatistics) -> LayerDrift:
    covariance = checked_covariance(name, entry, layer.weight.device)
    output = squared_output(layer.weight, covariance)
    free_energy = float(covariance.double().trace())
    if layer.projector is not None:
        C = covariance.to(layer.projector.basis.device, torch.float64, copy=True)
        free_energy = float(layer.projector.project_(C).trace().clamp_min(0.0))
    spectral = _spectral_norm(layer.F.double(), layer.G.double())
    sinks = entry.sinks.double().to(layer.F.device)
    sink_drift = 0.0
    if sinks.numel():
        moved = (sinks @ layer.G.double().T) @ layer.F.double().T
        kept = sinks @ layer.weight.double().T
        sink_drift = float((moved.norm(dim=1) / kept.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)).max())
    drift = _ratio(_squared_drift(layer.F, layer.G, covariance), output)
    return LayerDrift(name, drift, _ratio(spectral**2 * free_energy, output), sink_drift)


def _spectral_norm(F: torch.Tensor, G: torch.Tensor) -> float:
    """``‖F G‖₂`` through the r'×r' triangles of F and Gᵀ."""
    triangle_F = torch.linalg.qr(F, mode="r").R
    triangle_G = torch.linalg.qr(G.T, mode="r").R
    return float(torch.linalg.matrix_norm(triangle_F @ triangle_G.T, ord=2))


def _measure_heldout(
    model: nn.Module,
    layers: dict[str, AdaptedLayer],
    rows: dict[str, LayerDrift],
    batches: Iterable[Batch],
    answer_tokens: int,
    report: DriftReport,
) -> None:
    disable_adapter = getattr(model, "disable_adapter", None)
    if not callable(disable_adapter):
        raise TypeError("heldout needs a peft.PeftModel (attach_guard returns one): the base model is run as well")
    if answer_tokens < 1:
        raise ValueError(f"answer_tokens must be 1 or more, got {answer_tokens}")
    meters = {name: _Meter(layer) for name, layer in layers.items()}
    routing = Routing(model)
    modules = {name: layer.module for name, layer in layers.items()}
    trial = Trial(model, modules, routing, Lockstep(model), outputs=False)
    prompts, positions, kl, change = 0, 0, 0.0, 0.0
    with evaluating(model):
        for index, raw in enumerate(batches):
            checked_mask(raw, index)
            check_ids(model, raw, index)
            check_length(model, raw, index, answer_tokens)
            with disable_adapter():
                batch = with_answers(model, to_device(model, raw), answer_tokens)
                mask = batch["attention_mask"].bool()
                trial.look(batch, index)
                # Fewer than asked for where every answer of the batch ended early.
                answered = mask.shape[1] - raw["input_ids"].shape[1]
                handles = [
                    layers[name].module.register_forward_hook(meter.hook(name, routing))
                    for name, meter in meters.items()
                ]
                try:
                    with routing.watching(tokens_of(batch, index)):
                        base = _last_logprobs(trial, batch, index, answered)
                finally:
                    for handle in handles:
                        handle.remove()
            ours = _last_logprobs(trial, batch, index, answered)
            answers, counted = batch["input_ids"][:, -answered:], mask[:, -answered:]
            # A token that the base model excludes adds nothing, though its logarithm is infinite.
            terms = torch.where(base.isneginf(), 0.0, base.exp() * (base - ours))
            kl += float((terms.sum(dim=-1) * counted).sum())
            picked = (ours - base).gather(2, answers[..., None]).squeeze(2)
            change += float((picked * counted).sum())
            positions += int(counted.sum())
            prompts += answers.shape[0]
    if prompts == 0:
        raise ValueError("heldout is empty: at least one prompt is needed")
    for name, meter in meters.items():
        if meter.tokens:
            rows[name].heldout_drift = _ratio(meter.moved, meter.output)
            rows[name].heldout_outside = _ratio(meter.outside, meter.inputs)
    report.heldout = HeldOut(prompts, positions, kl / positions, change / prompts)


def _last_logprobs(trial: Trial, batch: Batch, index: int, answer_tokens: int) -> torch.Tensor:
    """Log-probabilities at the positions that predict the answer: (prompts, answer_tokens, vocabulary)."""
    logits = trial.forward(batch, index, logits=answer_tokens + 1).logits
    return logits[:, -answer_tokens - 1 : -1].float().log_softmax(dim=-1)


class _Meter:
    """Sums of squares over held-out tokens at one layer's base input x: ‖ΔW x‖², ‖W x‖², ‖P x‖², ‖x‖²."""

    def __init__(self, layer: AdaptedLayer) -> None:
        self.layer = layer
        self.moved = self.output = self.outside = self.inputs = 0.0
        self.tokens = 0

    def hook(self, name: str, routing: Routing) -> Any:
        @full_float32_products()
        def hook(_module: nn.Module, args: tuple[Any, ...], _output: torch.Tensor) -> None:
            real, first = routing.tokens(name, args[0])
            x = args[0][real & ~first].float()
            self.tokens += len(x)
            # Not through FᵀF, whose cancellation in float32 would put a floor of 3e-4 under the drift.
            self.moved += float((x @ self.layer.G.float().T @ self.layer.F.float().T).square().sum())
            self.output += float((x @ self.layer.weight.float().T).square().sum())
            free = x if self.layer.projector is None else self.layer.projector.project_(x.clone())
            self.outside += float(free.square().sum())
            self.inputs += float(x.square().sum())

        return hook
