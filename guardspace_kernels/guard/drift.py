"""What a certificate says: drift per layer and on held-out prompts, and whether anything is promised."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from guardspace_kernels.guard.atomic import write_json


class DriftExceededError(RuntimeError):
    """Less is promised than ``max_drift`` asks for.

    Attributes:
        report: the whole :class:`DriftReport` of ``certify``; None where a monitor raised it.
        drift: layer -> its drift on the calibration tokens.
    """

    def __init__(self, message: str, report: DriftReport | None, drift: dict[str, float]) -> None:
        super().__init__(message)
        self.report, self.drift = report, drift


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

    @property
    def largest(self) -> float:
        """Of ``drift`` and ``sink_drift``."""
        return largest([self.drift, self.sink_drift])


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
    """What :func:`certify` returns: a statement about activations and next-token distributions, never "safe".

    Attributes:
        changed: name -> what became of it, for every weight beside the adapted layers that is not the base model's:
            "changed", "resized from ... to ...", "added" or "missing". Nothing is promised unless it is empty.
    """

    layers: list[LayerDrift]
    tokens: int
    prompts: int
    model: str
    heldout: HeldOut | None = None
    notes: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)

    @property
    def worst(self) -> LayerDrift:
        """The layer with the largest drift, sink included; one whose drift is NaN before any other."""
        return max(self.layers, key=lambda layer: (math.isnan(layer.largest), layer.largest))

    @property
    def max_drift(self) -> float:
        return self.worst.largest

    def failure(self, max_drift: float | None = None) -> str:
        """Why less is promised than that no layer drifts by more than ``max_drift``; empty if it is promised.

        Whatever the bound, nothing is where another weight is not the base model's or a number is not finite.
        """
        if self.changed:
            return f"{in_words(self.changed)} beside the adapter: nothing is promised of this model"
        drift, where = self.max_drift, f"layer {self.worst.name} drifts by {self.max_drift:.2e} on harmful prompts"
        if not math.isfinite(drift):
            return f"{where}: nothing is promised of it"
        measured = [] if self.heldout is None else [self.heldout.kl, self.heldout.answer_logprob_change]
        measured += [layer.heldout_drift for layer in self.layers if layer.heldout_drift is not None]
        if not all(map(math.isfinite, measured)):
            return "numbers on held-out prompts are not finite: nothing is promised of this model"
        exceeded = max_drift is not None and not drift <= max_drift
        return f"{where}, above max_drift = {max_drift:.2e}" if exceeded else ""

    def to_dict(self) -> dict[str, Any]:
        return {"max_drift": self.max_drift, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, atomically; NaN and infinity are the strings "NaN" and "Infinity"."""
        write_json(path, self.to_dict())

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
        if self.changed:
            lines.append(f"{in_words(self.changed)} beside the adapter: nothing is promised of this model")
        return "\n".join([*lines, *self.notes])


def root_ratio(numerator: float, denominator: float) -> float:
    """The root of their ratio; NaN where a sum overflowed on both sides or is NaN itself."""
    if denominator != 0:
        return math.sqrt(numerator / denominator)
    return 0.0 if numerator == 0 else numerator * math.inf


def largest(values: Iterable[float]) -> float:
    """Python's ``max``, but NaN if any of them is: what is not known may be anything."""
    return max(values, key=lambda value: (math.isnan(value), value))


def in_words(changed: dict[str, str]) -> str:
    """A few of them in words."""
    shown = ", ".join(f"{name} ({what})" for name, what in [*changed.items()][:3])
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"the model differs from the base model in {shown}{more}"
