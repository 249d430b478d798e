"""What statistics say before a plan is made: how much protection costs, input by input and for the model."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from guardspace_kernels.arguments import boolean, instance, integer, iterable
from guardspace_kernels.guard.atomic import write_json
from guardspace_kernels.guard.coverage import Coverage, InputCoverage, sampled
from guardspace_kernels.guard.null_space import EmptyNullSpaceError, free_dimensions, null_space
from guardspace_kernels.guard.statistics import CalibrationStatistics, InputStatistics

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)

# A level is recommended that leaves this share of the dimensions free on average: a rule of thumb, from one model and
# two tasks, where 43% were enough to learn as well as plain LoRA.
_FREE = 1 / 3
# More prompts are advised as long as the last doubling lowers what is outside on held-out prompts by this share.
_WORTHWHILE = 0.1
_POINTS = 24  # of a spectrum


@dataclass
class InputCapacity:
    """One distinct layer input.

    Attributes:
        protected: at each of the levels, how many leading eigenvectors of C hold that share of tr(C); sinks apart.
        outside: at each level ``√(tr(P C) / tr(C))``, the part of a calibration input that stays unprotected.
        paper: how many eigenvectors the paper's threshold ``λ > max(1e-8, 1e-6·λ_max)`` protects.
        sink_share: first tokens' share of all energy, their distinct inputs taken as equally frequent.
        spectrum: pairs (rank / d, λ / λ_max) at logarithmic and at equal distances.
        task: at each level ``tr(P C') / tr(C')`` of a task's inputs, the energy that the adapter can act on.
        heldout: at each level ``√(tr(P C') / tr(C'))`` of held-out prompts; to be compared with ``outside``.
        coverage: at each level what a plan would tell of this input; None where eigenvectors were not needed otherwise,
            but for a few inputs at which prompts can be held out.
    """

    layers: list[str]
    features: int
    tokens: int
    protected: list[int]
    outside: list[float]
    paper: int
    sink_share: float
    spectrum: list[list[float]]
    task: list[float] | None = None
    heldout: list[float] | None = None
    coverage: list[InputCoverage] | None = None


@dataclass
class Inspection:
    """What :func:`inspect_statistics` returns; ``print`` it or ``save`` it as JSON.

    Attributes:
        recommended: a value for ``GuardConfig(protect=)``, or None where no level will do; ``reason`` says why.
        prompt_curve: pairs (prompts, mean of held-out ``√(tr(P C') / tr(C'))`` at the recommended level), where parts
            were given.
        left_out: layers of experts to which some of the statistics routed no token.
        held_prompts: how many of the prompts could be held out.
    """

    levels: list[float]
    inputs: list[InputCapacity]
    prompts: int
    recommended: float | None
    reason: str
    prompt_curve: list[list[float]]
    left_out: list[str] = field(default_factory=list)
    held_prompts: int = 0

    def free(self, level: int) -> float:
        """The share of the dimensions that is left to learn with at ``levels[level]``, averaged over the inputs."""
        return sum(1 - i.protected[level] / i.features for i in self.inputs) / len(self.inputs)

    def least(self, level: int) -> float:
        """The same of the input that has least left."""
        return min(1 - one.protected[level] / one.features for one in self.inputs)

    def mean(self, name: str, level: int) -> float:
        """Of ``outside``, ``task`` or ``heldout`` over the inputs."""
        return sum(getattr(one, name)[level] for one in self.inputs) / len(self.inputs)

    def coverage(self, level: int) -> Coverage:
        """How far protection would carry at ``levels[level]``, as far as inputs tell."""
        told = [one.coverage[level] for one in self.inputs if one.coverage]
        return Coverage(self.prompts, self.held_prompts, told)

    def to_dict(self) -> dict[str, Any]:
        return {"free": [self.free(i) for i in range(len(self.levels))], **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, atomically."""
        write_json(path, self.to_dict(), indent=None)

    def __str__(self) -> str:
        extra = [name for name in ("heldout", "task") if getattr(self.inputs[0], name) is not None]
        titles = {"heldout": "held-out", "task": "task"}
        head = f"{'protect':>8} {'free dimensions':>16} {'least':>8} {'outside':>9}"
        lines = [head + "".join(f" {titles[name]:>9}" for name in extra)]
        for i, level in enumerate(self.levels):
            line = f"{level:8g} {self.free(i):16.1%} {self.least(i):8.1%} {self.mean('outside', i):9.3f}"
            lines.append(line + "".join(f" {self.mean(name, i):9.3f}" for name in extra))
        lines.append(
            "outside: the part of an input that stays unprotected, |Px|/|x|; the drift of a layer's output is at most "
            "that times what the adapter changes"
        )
        if "task" in extra:
            lines.append("task: the share of the energy of the task's inputs that the adapter can act on")
        paper = sum(one.paper / one.features for one in self.inputs) / len(self.inputs)
        lines.append(f"the paper's threshold protects {paper:.1%} of the dimensions on average")
        few = [one for one in self.inputs if one.tokens < one.features]
        if few:
            lines.append(
                f"{len(few)} of {len(self.inputs)} inputs saw fewer tokens than they have dimensions, first "
                f"{few[0].layers[0]} ({few[0].tokens} for {few[0].features}): other prompts may use directions that "
                "are not protected; collect on more"
            )
        if self.left_out:
            lines.append(
                f"left out: {len(self.left_out)} layers of experts to which some of the statistics routed no token, "
                f"first {self.left_out[0]}"
            )
        if self.prompt_curve:
            curve = ", ".join(f"{outside:.3f} of {prompts}" for prompts, outside in self.prompt_curve)
            lines.append(f"held-out |Px|/|x| by calibration prompts: {curve}; {self.enough_prompts()}")
        if any(one.coverage for one in self.inputs):
            at = self.levels[-1] if self.recommended is None else self.recommended
            lines.append(f"at protect={at:g}, {self.coverage(self.levels.index(at))}")
        return "\n".join([*lines, f"recommended: {self.reason}"])

    def enough_prompts(self) -> str:
        """Whether the last doubling of the calibration prompts still helped the held-out ones."""
        last, outside = self.prompt_curve[-1]
        halves = [value for prompts, value in self.prompt_curve if 2 * prompts <= last]
        if not halves:
            return "give parts of half as many prompts to see whether they are enough"
        gain = 1 - outside / halves[-1]
        if gain > _WORTHWHILE:
            return f"the last doubling lowered it by {gain:.0%}: more prompts would help"
        return f"the last doubling lowered it by {gain:.0%} only: enough prompts"


def inspect_statistics(
    stats: CalibrationStatistics | Sequence[CalibrationStatistics],
    *,
    task: CalibrationStatistics | None = None,
    heldout: CalibrationStatistics | None = None,
    rank: int = 16,
    progress: bool = True,
) -> Inspection:
    """The safety-capacity curve: for each share of energy protected, what is left to learn with.

    With the eigenvalues λ of C in float64, in descending order, a level p protects the fewest leading ones whose sum is
    at least p·tr(C), as ``GuardConfig(protect=p)`` does before it adds the sinks. Recommended is the highest level that
    leaves a third of the dimensions free on average and ``rank`` of them in every input: a rule of thumb.

    Args:
        stats: of the calibration prompts, or parts of them, which are merged one after the other.
        task: statistics of the same model on prompts of the fine-tuning task.
        heldout: the same on harmful prompts that are not in ``stats``; with parts it tells if there were enough.

    Raises:
        ValueError: no inputs, a covariance that is zero or not finite, or statistics of another model; names the layer.

    Source: the energy rule of :func:`guardspace_kernels.guard.null_space.null_space`.
    """
    if not isinstance(stats, CalibrationStatistics):
        iterable("stats", stats, "a CalibrationStatistics or a list of them")
    parts = [stats] if isinstance(stats, CalibrationStatistics) else list(stats)
    for part in parts:
        instance("stats", part, CalibrationStatistics, "a CalibrationStatistics or a list of them")
    for name, other in (("task", task), ("heldout", heldout)):
        instance(name, other, (CalibrationStatistics, type(None)), "a CalibrationStatistics or None")
    integer("rank", rank, 1)
    boolean("progress", progress)
    if not parts or not parts[0].inputs:
        raise ValueError("stats holds no inputs; collect them first")
    merged = [parts[0]]
    for part in parts[1:]:
        merged.append(merged[-1].merge(part))
    whole = merged[-1]
    for name, other in (("task", task), ("heldout", heldout)):
        if other is not None:
            whole.fingerprint.check(other.fingerprint, f"the statistics given as {name}")
    given = [merged[0], *(other for other in (task, heldout) if other is not None)]
    unseen = {
        name
        for entry in whole.inputs
        for name in entry.layers
        if entry.routed and not all(other.for_layer(name).tokens for other in given)
    }
    bar = tqdm(
        [e for e in whole.inputs if e.layers[0] not in unseen], desc="inspect", unit="input", disable=not progress
    )
    inputs = [_capacity(entry, task, heldout) for entry in bar]
    recommended, reason = _recommend(inputs, rank)
    left_out = [name for name in whole.layers if name in unseen]
    report = Inspection(list(LEVELS), inputs, whole.prompts, recommended, reason, [], left_out, whole.held_prompts)
    if heldout is not None and len(merged) > 1 and recommended is not None:
        at = LEVELS.index(recommended)
        for some in tqdm(merged[:-1], desc="inspect parts", unit="part", disable=not progress):
            shares = [_outside(e, heldout, recommended) for e in some.inputs if e.layers[0] not in unseen]
            report.prompt_curve.append([some.prompts, sum(shares) / len(shares)])
        report.prompt_curve.append([whole.prompts, report.mean("heldout", at)])
    return report


def _recommend(inputs: Sequence[InputCapacity], rank: int) -> tuple[float | None, str]:
    for i in reversed(range(len(LEVELS))):
        free = sum(1 - one.protected[i] / one.features for one in inputs) / len(inputs)
        least = min(inputs, key=lambda one: one.features - one.protected[i])
        if free >= _FREE and least.features - least.protected[i] >= rank:
            text = f"protect={LEVELS[i]:g}, the highest level that leaves a third of the dimensions free on average"
            return LEVELS[i], text + f" ({free:.0%}) and {rank} in every input"
    return None, f"none of the levels leaves a third of the dimensions free and {rank} in every input; lower the rank"


def _eigen(C: torch.Tensor, entry: InputStatistics, vectors: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of an input's C, ascending and at least 0, and its eigenvectors, which are left out (d, 0) unless
    asked for: they take two thirds of the time."""
    C = C.double()
    if not torch.isfinite(C).all() or C.trace() <= 0:
        raise ValueError(f"layer {entry.layers[0]}: its covariance is zero or not finite; collect the statistics again")
    values, E = torch.linalg.eigh(C) if vectors else (torch.linalg.eigvalsh(C), C[:, :0])
    return values.clamp_min(0.0), E


def _outside(entry: InputStatistics, other: CalibrationStatistics, level: float) -> float:
    """``√(tr(P C') / tr(C'))`` at one level, of another's covariance C' of the same input. By a plan's null space, in
    half the time of all eigenvectors in float64."""
    C, total = _other_covariance(entry.layers[0], other)
    try:
        space = null_space(entry.covariance, entry.sinks[:0], tokens=entry.tokens, protect=level)
    except EmptyNullSpaceError:
        return 0.0
    basis = space.basis.double()
    share = float(((C @ basis) * basis).sum()) / total
    return math.sqrt(max(1.0 - share if space.complement else share, 0.0))


def _other_covariance(layer: str, other: CalibrationStatistics) -> tuple[torch.Tensor, float]:
    """(C', tr(C')) of other statistics."""
    C = other.for_layer(layer).covariance.double()
    total = float(C.trace())
    if not total > 0 or not math.isfinite(total):
        raise ValueError(f"layer {layer}: the other statistics' covariance is zero or not finite; collect them again")
    return C, total


def _energies(
    layer: str, eigenvalues: torch.Tensor, E: torch.Tensor, other: CalibrationStatistics
) -> list[float]:  # fmt: skip
    C, total = _other_covariance(layer, other)
    along = ((E.T @ C) * E.T).sum(dim=1).clamp_min(0.0)
    return [float(along[: free_dimensions(eigenvalues, protect=level)].sum()) / total for level in LEVELS]


def _capacity(
    entry: InputStatistics, task: CalibrationStatistics | None, heldout: CalibrationStatistics | None
) -> InputCapacity:
    probe = 0 < entry.held_tokens < entry.tokens
    eigenvalues, E = _eigen(entry.covariance, entry, vectors=task is not None or heldout is not None or probe)
    d, total = len(eigenvalues), float(eigenvalues.sum())
    free = [free_dimensions(eigenvalues, protect=level) for level in LEVELS]
    outside = [math.sqrt(float(eigenvalues[:n].sum()) / total) for n in free]
    paper = d - free_dimensions(eigenvalues, rule="paper")
    sinks = float(entry.sinks.double().square().sum(dim=1).mean()) * entry.sink_tokens if len(entry.sinks) else 0.0
    steps = [i / (_POINTS - 1) for i in range(_POINTS)]
    ranks = sorted({max(1, round(n)) for x in steps for n in (d**x, d * x)})  # the head falls fast, the tail far
    spectrum = [[n / d, float(eigenvalues[d - n] / eigenvalues[-1])] for n in ranks]
    layer = entry.layers[0]
    return InputCapacity(
        list(entry.layers), d, entry.tokens, [d - n for n in free], outside, paper, sinks / (sinks + total), spectrum,
        None if task is None else _energies(layer, eigenvalues, E, task),
        None if heldout is None else [math.sqrt(share) for share in _energies(layer, eigenvalues, E, heldout)],
        _coverage(entry, E, free, outside),
    )  # fmt: skip


def _coverage(entry: InputStatistics, E: torch.Tensor, free: list[int], outside: list[float]) -> list[InputCoverage]:
    """At each level, with C's eigenvectors, of which so many are ``free``; empty without them, or without a sample."""
    if not E.numel() or entry.sample is None or not len(entry.sample.keys):
        return []
    along = (entry.sample.rows.double() @ E).square().cumsum(dim=1)
    told = [sampled(o**2, entry.sample, along[:, n - 1]) for n, o in zip(free, outside, strict=True)]
    held = entry.held_on("cpu")
    if held is not None and 0 < entry.held_tokens < entry.tokens:
        C_h = held.double()
        eigenvalues, E = _eigen(entry.covariance.double() - C_h, entry, True)
        total, energies = float(eigenvalues.sum()), ((E.T @ C_h) * E.T).sum(dim=1).clamp_min(0.0)
        for one, level in zip(told, LEVELS, strict=True):
            n = free_dimensions(eigenvalues, protect=level)
            one.rest, one.heldout = float(eigenvalues[:n].sum()) / total, float(energies[:n].sum() / energies.sum())
    return told
