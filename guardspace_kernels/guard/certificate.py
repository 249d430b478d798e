"""The certificate: how far the adapter moves outputs on harmful prompts, exactly and measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from guardspace_kernels.arguments import instance, integer, iterable, number
from guardspace_kernels.guard.atomic import write_text
from guardspace_kernels.guard.batches import (
    Batch,
    check_ids,
    check_length,
    checked_mask,
    evaluating,
    forward_batch,
    to_device,
    with_answers,
)
from guardspace_kernels.guard.fingerprint import ModelFingerprint
from guardspace_kernels.guard.layers import adapted_base, is_conv1d, linear_weight, named_submodules, peft_model
from guardspace_kernels.guard.routing import Routing
from guardspace_kernels.guard.statistics import CalibrationStatistics, InputStatistics
from guardspace_kernels.nn import NullSpaceProjector, ProjectedLoraLinear
from guardspace_kernels.ops import squared_drift


class DriftExceededError(RuntimeError):
    """A layer drifts by more than ``max_drift``; ``report`` holds the whole :class:`DriftReport`."""

    def __init__(self, message: str, report: DriftReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer with a low-rank change: ``ΔW = F G`` against ``weight`` W (d_out, d_in)."""

    module: nn.Module
    weight: torch.Tensor
    F: torch.Tensor
    G: torch.Tensor
    dtype: torch.dtype
    projector: NullSpaceProjector | None
    fan_in_fan_out: bool

    def leak(self, F: torch.Tensor, G: torch.Tensor) -> float:
        """``‖F G (I − P)‖_F / ‖F G‖_F``; 0 for a layer without a projector, which promises nothing."""
        if self.projector is None:
            return 0.0
        F, G = F.double(), G.double()
        outside = G - self.projector.project_(G.clone())
        gram = F.T @ F
        size = ((gram @ G) * G).sum()
        return math.sqrt(max(float(((gram @ outside) * outside).sum()), 0.0) / float(size)) if size > 0 else 0.0


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Name in the base model -> adapted layer, for guarded layers and for plain PEFT LoRA layers.

    Raises:
        ValueError: several models with adapters, adapters outside of the one, a merged or non-finite adapter.
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
            weight, dtype, projector = module.weight.detach(), module.lora_A.dtype, module.projector
            found[name] = AdaptedLayer(module, weight, F, G, dtype, projector, False)
        elif _is_adapted(module):
            found[name] = _peft_layer(name, module)
        if name in found and not all(torch.isfinite(t).all() for t in (found[name].F, found[name].G)):
            raise ValueError(f"layer {name}: the adapter holds non-finite values; its training diverged")
    return found


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, ProjectedLoraLinear) or (hasattr(module, "lora_A") and hasattr(module, "get_base_layer"))


def _peft_layer(name: str, module: Any) -> AdaptedLayer:
    if module.merged:
        raise ValueError(f"layer {name}: its adapter is merged; certify and export before merging, or unmerge first")
    base = module.get_base_layer()
    if hasattr(module, "delta_factors"):
        F, G = module.delta_factors()
        return AdaptedLayer(
            module, module.base_weight(), F, G, module.A.dtype, module.projector, module.fan_in_fan_out
        )  # fmt: skip
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if len(active) != 1:
        raise ValueError(f"layer {name}: exactly one LoRA adapter must be active, got {active}")
    if getattr(module, "lora_variant", {}).get(active[0]) is not None:
        raise ValueError(f"layer {name}: only plain LoRA changes the weight by B A; DoRA and other variants do not")
    A, B = module.lora_A[active[0]].weight.detach(), module.lora_B[active[0]].weight.detach()
    F, G = module.scaling[active[0]] * B.float(), A.float()
    return AdaptedLayer(module, linear_weight(base).detach(), F, G, A.dtype, None, is_conv1d(base))


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
    return math.sqrt(numerator / denominator) if denominator > 0 else (0.0 if numerator == 0 else math.inf)


@dataclass
class LayerDrift:
    """One layer's drift.

    Attributes:
        drift: ``‖ΔW X‖_F / ‖W X‖_F`` on the calibration tokens, exact.
        bound: ``‖ΔW‖₂ · √tr(P C) / ‖W X‖_F``, which holds, up to the rounding of the basis (1e-6), for any adapter of
            the same norm under the same plan.
        sink_drift: the largest ``‖ΔW s‖ / ‖W s‖`` over the first-token inputs s.
        heldout_drift: ``‖ΔW x‖ / ‖W x‖`` (root of the ratio of sums) measured on held-out tokens, or None.
        heldout_outside: ``‖P x‖ / ‖x‖`` likewise: how much of a held-out input the plan did not protect, or None. Both
            are None for an expert that no held-out token reached.
    """

    name: str
    drift: float
    bound: float
    sink_drift: float
    heldout_drift: float | None = None
    heldout_outside: float | None = None


@dataclass
class HeldOut:
    """What held-out prompts show of the whole model, at the positions where the base model's own answer is decided.

    Attributes:
        kl: mean KL(base ‖ adapted) of the next-token distribution, in nats.
        answer_logprob_change: mean change, per prompt, of the log-probability of the base model's own answer.
    """

    prompts: int
    positions: int
    kl: float
    answer_logprob_change: float


@dataclass
class DriftReport:
    """What :func:`certify` returns: a statement about activations and next-token distributions, never "safe"."""

    layers: list[LayerDrift]
    tokens: int
    prompts: int
    model: str
    heldout: HeldOut | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> LayerDrift:
        """The layer with the largest drift, sink included."""
        return max(self.layers, key=lambda layer: max(layer.drift, layer.sink_drift))

    @property
    def max_drift(self) -> float:
        return max(self.worst.drift, self.worst.sink_drift)

    def to_dict(self) -> dict[str, Any]:
        return {"max_drift": self.max_drift, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=2))

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        head = f"{'layer':{width}}  {'drift':>9} {'bound':>9} {'sink':>9}"
        if self.heldout:
            head += f" {'held-out':>9} {'outside':>9}"
        lines = [head]
        for layer in self.layers:
            row = f"{layer.name:{width}}  {layer.drift:9.2e} {layer.bound:9.2e} {layer.sink_drift:9.2e}"
            if layer.heldout_drift is not None:
                row += f" {layer.heldout_drift:9.2e} {layer.heldout_outside:9.2e}"
            lines.append(row)
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """The report in a few lines."""
        mean = sum(layer.drift for layer in self.layers) / len(self.layers)
        lines = [
            f"drift on {self.tokens} calibration tokens of {self.prompts} prompts (first tokens apart): "
            f"mean {mean:.2e}, worst {self.max_drift:.2e} at {self.worst.name}"
        ]
        if self.heldout:
            measured = [layer.heldout_drift for layer in self.layers if layer.heldout_drift is not None] or [0.0]
            lines.append(
                f"on {self.heldout.prompts} held-out prompts: mean drift {sum(measured) / len(measured):.2e}, "
                f"next-token KL {self.heldout.kl:.3g} nats, log-probability of the base model's own answers "
                f"{self.heldout.answer_logprob_change:+.3g}"
            )
        return "\n".join([*lines, *self.notes])


def certify(
    model: nn.Module,
    stats: CalibrationStatistics,
    heldout: Iterable[Batch] | None = None,
    *,
    answer_tokens: int = 12,
    max_drift: float | None = None,
) -> DriftReport:
    """Certifies how far the adapter moves each layer's output on harmful prompts.

    Exact and without a pass over data: ``‖ΔW X‖_F² = Σ (FᵀF) ∘ (G C Gᵀ)`` from the stored covariance, relative to
    ``‖W X‖_F² = tr(W C Wᵀ)``. X holds the calibration tokens but the first of each prompt, which are judged apart. The
    inputs X are the base model's: layers are judged one by one, each at the inputs that the base model feeds it.

    Args:
        model: a guarded model, or a plain PEFT LoRA on the same base model for comparison.
        stats: the statistics that the plan was made from, or others of the same base model.
        heldout: batches of prompts of the same kind that were not in ``stats``. Adds measured drift per layer, the
            next-token KL to the base model and the change of the log-probability of the base model's own answers.
        answer_tokens: length of those answers.
        max_drift: raise if a layer drifts by more.

    Raises:
        DriftExceededError: see ``max_drift``; names the worst layer and carries the report.
        ValueError: no adapted layer, no statistics for one, or statistics of other weights; names the layer.

    Source: GuardSpace's null-space condition (arXiv 2510.14301), turned into a number.
    """
    instance("model", model, nn.Module, "a torch.nn.Module")
    instance("stats", stats, CalibrationStatistics, "a CalibrationStatistics")
    if heldout is not None:
        iterable("heldout", heldout, "a list, or another iterable, of batches")
    answer_tokens = integer("answer_tokens", answer_tokens, 1)
    if max_drift is not None:
        max_drift = number("max_drift", max_drift, "a number of 0 or more", lambda x: x >= 0)
    layers, model = adapted_layers(model), peft_model(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapted layer; nothing to certify")
    check_statistics(model, layers, stats)
    rows = [_certify_layer(name, layer, stats.for_layer(name)) for name, layer in layers.items()]
    tokens = max(entry.tokens for entry in stats.inputs)
    report = DriftReport(rows, tokens, stats.prompts, stats.fingerprint.model)
    if any(layer.projector is None for layer in layers.values()):
        report.notes.append("no projector: an ordinary adapter, whose drift is bounded only by its norm")
    left_out = getattr(getattr(model, "guard_plan", None), "left_out", {})
    if left_out:
        report.notes.append(f"{len(left_out)} layers are left out of the plan and stay frozen")
    blank = sum(stats.for_layer(name).tokens == 0 for name in layers)
    if blank:
        report.notes.append(f"{blank} layers read none of the calibration tokens: their drift says nothing")
    if heldout is not None:
        _measure_heldout(model, layers, {row.name: row for row in rows}, heldout, answer_tokens, report)
    if max_drift is not None and not report.max_drift <= max_drift:
        raise DriftExceededError(
            f"layer {report.worst.name} drifts by {report.max_drift:.2e} on harmful prompts, above max_drift = "
            f"{max_drift:.2e}",
            report,
        )
    return report


def check_statistics(model: nn.Module, layers: dict[str, AdaptedLayer], stats: CalibrationStatistics) -> dict[str, str]:
    """ValueError unless the statistics are of these layers and of the base model's weights; names the layer.

    Returns:
        What became of the other weights since the statistics were collected, by name; and of these, where the model was
        cast to a narrower dtype. See :meth:`ModelFingerprint.differences`.
    """
    for name in layers:
        if name not in stats.layers:
            raise ValueError(f"layer {name} has no statistics; collect them with it in target_modules")
    mine = stats.fingerprint.restricted(layers)
    found = mine.differences(ModelFingerprint.of(model, list(layers), version=mine.version, adapted=True))
    for name, layer in layers.items():
        module: Any = layer.module
        if getattr(module, "weight_is_residual", False):
            # The layer holds W_res, and keeps W, which attach_guard compared with the plan's.
            found.pop(f"{name}.weight", None)
            if residual := module.residual_difference():
                found[f"{name}.weight"] = residual
        difference = found.get(f"{name}.weight", "")
        if difference and not difference.startswith("rounded"):
            raise ValueError(
                f"layer {name}: its base weight is not the one the statistics were collected on ({difference}); "
                "collect them again"
            )
    plan = getattr(model, "guard_plan", None)
    if plan is not None:
        plan.model.check(mine, "the statistics")
    return found


def _certify_layer(name: str, layer: AdaptedLayer, entry: InputStatistics) -> LayerDrift:
    covariance = entry.covariance_on(layer.weight.device)
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
    prompts, positions, kl, change = 0, 0, 0.0, 0.0
    with evaluating(model):
        for index, raw in enumerate(batches):
            checked_mask(raw, index)
            check_ids(model, raw, index)
            check_length(model, raw, index, answer_tokens)
            with disable_adapter():
                batch = with_answers(model, to_device(model, raw), answer_tokens)
                mask = batch["attention_mask"].bool()
                # Fewer than asked for where every answer of the batch ended early.
                answered = mask.shape[1] - raw["input_ids"].shape[1]
                handles = [
                    layers[name].module.register_forward_hook(meter.hook(name, routing))
                    for name, meter in meters.items()
                ]
                try:
                    with routing.watching(mask):
                        base = _last_logprobs(model, batch, answered)
                finally:
                    for handle in handles:
                        handle.remove()
            ours = _last_logprobs(model, batch, answered)
            answers, counted = batch["input_ids"][:, -answered:], mask[:, -answered:]
            kl += float(((base.exp() * (base - ours)).sum(dim=-1) * counted).sum())
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


def _last_logprobs(model: nn.Module, batch: Batch, answer_tokens: int) -> torch.Tensor:
    """Log-probabilities at the positions that predict the answer: (prompts, answer_tokens, vocabulary)."""
    logits = forward_batch(model, batch, logits=answer_tokens + 1).logits
    return logits[:, -answer_tokens - 1 : -1].float().log_softmax(dim=-1)


class _Meter:
    """Sums of squares over held-out tokens at one layer's base input x: ‖ΔW x‖², ‖W x‖², ‖P x‖², ‖x‖²."""

    def __init__(self, layer: AdaptedLayer) -> None:
        self.layer = layer
        self.moved = self.output = self.outside = self.inputs = 0.0
        self.tokens = 0

    def hook(self, name: str, routing: Routing) -> Any:
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
