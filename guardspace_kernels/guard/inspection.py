"""What statistics say before a plan is made: how much protection costs, input by input and for the model."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from guardspace_kernels.guard.files import write_text
from guardspace_kernels.guard.null_space import free_dimensions
from guardspace_kernels.guard.statistics import CalibrationStatistics, InputStatistics

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


@dataclass
class InputCapacity:
    """One distinct layer input.

    Attributes:
        protected: at each of the levels, how many leading eigenvectors of C hold that share of tr(C); sinks apart.
        outside: at each level ``√(tr(P C) / tr(C))``, the part of a calibration input that stays unprotected.
        paper: how many eigenvectors the paper's threshold ``λ > max(1e-8, 1e-6·λ_max)`` protects.
        sink_share: first tokens' share of all energy, their distinct inputs taken as equally frequent.
    """

    layers: list[str]
    features: int
    tokens: int
    protected: list[int]
    outside: list[float]
    paper: int
    sink_share: float


@dataclass
class Inspection:
    """What :func:`inspect_statistics` returns; ``print`` it or ``save`` it as JSON."""

    levels: list[float]
    inputs: list[InputCapacity]
    prompts: int

    def free(self, level: int) -> float:
        """The share of the dimensions that is left to learn with at ``levels[level]``, averaged over the inputs."""
        return sum(1 - i.protected[level] / i.features for i in self.inputs) / len(self.inputs)

    def to_dict(self) -> dict[str, Any]:
        return {"free": [self.free(i) for i in range(len(self.levels))], **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=2))

    def __str__(self) -> str:
        lines = [f"{'protect':>8} {'free dimensions':>16} {'least':>8} {'outside':>9}"]
        for i, level in enumerate(self.levels):
            least = min(1 - one.protected[i] / one.features for one in self.inputs)
            outside = sum(one.outside[i] for one in self.inputs) / len(self.inputs)
            lines.append(f"{level:8g} {self.free(i):16.1%} {least:8.1%} {outside:9.3f}")
        paper = sum(one.paper / one.features for one in self.inputs) / len(self.inputs)
        lines.append(f"the paper's threshold protects {paper:.1%} of the dimensions on average")
        few = [one for one in self.inputs if one.tokens < one.features]
        if few:
            lines.append(
                f"{len(few)} of {len(self.inputs)} inputs saw fewer tokens than they have dimensions, first "
                f"{few[0].layers[0]} ({few[0].tokens} for {few[0].features}): other prompts may use directions that "
                "are not protected; collect on more"
            )
        return "\n".join(lines)


def inspect_statistics(stats: CalibrationStatistics, *, progress: bool = True) -> Inspection:
    """The safety-capacity curve: for each share of energy protected, what is left to learn with.

    With the eigenvalues λ of C in float64, in descending order, a level p protects the fewest leading ones whose sum is
    at least p·tr(C), as ``GuardConfig(protect=p)`` does before it adds the sinks.

    Raises:
        ValueError: no inputs, or a covariance that is zero or not finite; names the layer.

    Source: the energy rule of :func:`guardspace_kernels.guard.null_space.null_space`.
    """
    if not stats.inputs:
        raise ValueError("stats holds no inputs; collect them first")
    bar = tqdm(stats.inputs, desc="inspect", unit="input", disable=not progress)
    return Inspection(list(LEVELS), [_capacity(entry) for entry in bar], stats.prompts)


def _capacity(entry: InputStatistics) -> InputCapacity:
    C = entry.covariance.double()
    if not torch.isfinite(C).all() or C.trace() <= 0:
        raise ValueError(f"layer {entry.layers[0]}: its covariance is zero or not finite; collect the statistics again")
    eigenvalues = torch.linalg.eigvalsh(C).clamp_min(0.0)
    total = float(eigenvalues.sum())
    free = [free_dimensions(eigenvalues, protect=level) for level in LEVELS]
    outside = [math.sqrt(float(eigenvalues[:n].sum()) / total) for n in free]
    paper = len(C) - free_dimensions(eigenvalues, rule="paper")
    sinks = float(entry.sinks.double().square().sum(dim=1).mean()) * entry.sink_tokens if len(entry.sinks) else 0.0
    d = len(C)
    share = sinks / (sinks + total)
    return InputCapacity(list(entry.layers), d, entry.tokens, [d - n for n in free], outside, paper, share)
