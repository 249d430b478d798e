"""How far a plan's protection carries: to held-out prompts, to each kind of token, to every token alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from guardspace_kernels.guard import forms
from guardspace_kernels.guard.null_space import NullSpace
from guardspace_kernels.guard.sampling import FEWEST_PROMPTS, KINDS, Sample

# A share outside is remarkable if it is so many times that of the calibration energy, and more than so much.
_APART, _LITTLE = 3.0, 0.02


@dataclass
class InputCoverage:
    """Shares of ``‖P x‖²`` in ``‖x‖²`` for one space: what lies outside of the protected directions.

    Attributes:
        energy: over all calibration tokens, ``tr(P C) / tr(C)``.
        kinds: the same over the sampled tokens of each kind that there are.
        alike: by kind, the mean of the tokens' own shares ``‖P x‖² / ‖x‖²``, however large or small they are.
        rest, heldout: ``tr(P' C') / tr(C')`` over the calibration prompts that were not held out and over those that
            were, P' being planned without them; None where none are kept.
    """

    energy: float
    kinds: dict[str, float]
    alike: dict[str, float]
    rest: float | None = None
    heldout: float | None = None

    @property
    def limit(self) -> float:
        """Above it a share is remarkable."""
        return max(_APART * self.energy, _LITTLE)

    @property
    def kinds_apart(self) -> bool:
        """Whether some kinds of tokens take the protection from others."""
        return bool(self.kinds) and min(self.kinds.values()) <= self.limit < max(self.kinds.values())

    @property
    def few_hold_all(self) -> bool:
        """Whether few tokens, not one kind of them, take the protection from the others."""
        within = any(m > max(_APART * self.kinds[kind], _LITTLE) for kind, m in self.alike.items())
        return bool(self.kinds) and (within or min(self.kinds.values()) > self.limit)

    def warnings(self) -> list[str]:
        """What a user should know about the layers that read this input."""
        found = []
        if self.few_hold_all:
            most = max(self.alike.values())
            found.append(f"few tokens hold the energy: {self.energy:.1%} of it lies outside, but {most:.1%} of a token")
        if self.kinds_apart:
            found.append(f"outside lies {shown(self.kinds)}")
        return found


def shown(kinds: dict[str, float]) -> str:
    return ", ".join(f"{share:.1%} of {kind}" for kind, share in kinds.items())


def measured(space: NullSpace, sample: Sample | None) -> InputCoverage:
    """The coverage of an input by its sampled rows."""
    if sample is None:
        return InputCoverage(space.free_energy, {}, {})
    return sampled(space.free_energy, sample, space.outside(sample.rows.to(space.basis)).double())


def sampled(energy: float, sample: Sample, outside: torch.Tensor) -> InputCoverage:
    """The coverage by rows of which ``outside`` (n,) are ``‖P x‖²``, in float64."""
    coverage, whole = InputCoverage(energy, {}, {}), sample.rows.double().square().sum(dim=1)
    for i, kind in enumerate(KINDS):
        mine = (sample.kinds == i) & (whole > 0)
        if mine.any():
            coverage.kinds[kind] = float(outside[mine].sum() / whole[mine].sum())
            coverage.alike[kind] = float((outside[mine] / whole[mine]).mean())
    return coverage


_INPUT = forms.fields(
    {"energy": forms.number, "kinds": forms.named(forms.number), "alike": forms.named(forms.number)},
    {"rest": forms.maybe(forms.number), "heldout": forms.maybe(forms.number)},
)
#: The form of :meth:`Coverage.to_dict`.
COVERAGE = forms.fields(
    {
        "prompts": forms.count,
        "held_prompts": forms.count,
        "inputs": forms.several(_INPUT),
        "weighting": forms.text,
    }
)


@dataclass
class Coverage:
    """How far a plan's protection carries.

    Attributes:
        prompts: of the statistics. held_prompts: how many of them could be held out.
        inputs: of each of the plan's spaces. weighting: of kinds of tokens in the energy, in words; empty if none.
    """

    prompts: int
    held_prompts: int
    inputs: list[InputCoverage]
    weighting: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Coverage:
        inputs = [InputCoverage(**entry) for entry in entries["inputs"]]
        return cls(entries["prompts"], entries["held_prompts"], inputs, entries["weighting"])

    def mean(self, name: str) -> float | None:
        """Of ``energy``, ``rest`` or ``heldout`` over the inputs that have it."""
        return _mean([value for one in self.inputs if (value := getattr(one, name)) is not None])

    def by_kind(self, name: str) -> dict[str, float]:
        """Of ``kinds`` or ``alike`` over the inputs."""
        means = {kind: _mean([of[kind] for one in self.inputs if kind in (of := getattr(one, name))]) for kind in KINDS}
        return {kind: mean for kind, mean in means.items() if mean is not None}

    def __str__(self) -> str:
        rest, heldout, kinds = self.mean("rest"), self.mean("heldout"), self.by_kind("kinds")
        if not kinds:
            return (
                "how far protection carries cannot be told: the statistics hold no sample of rows. Those of earlier "
                "versions hold none, nor do inputs of experts; collect them again, with other layers as well"
            )
        if rest is None or heldout is None:
            lines = [
                f"how far protection carries to held-out prompts cannot be told: of {self.prompts} prompts none could "
                "be held out; collect statistics on more"
            ]
        else:
            lines = [
                f"protection carries to held-out prompts: {rest:.2%} of the calibration energy lies outside of it, "
                f"{heldout:.2%} of held-out prompts' ({self.held_prompts} of {self.prompts}, planned without them)"
            ]
        if self.prompts < FEWEST_PROMPTS:
            lines.append(f"warning: planned from {self.prompts} prompts, fewer than {FEWEST_PROMPTS}: collect more")
        lines.append(f"by kind of token, outside lies {shown(kinds)}")
        if self.weighting:
            lines.append(f"energy is that of tokens weighted by kind: {self.weighting}")
        return "\n".join([*lines, *self._warnings()])

    def _warnings(self) -> list[str]:
        apart, few = (
            dataclasses.replace(self, inputs=[one for one in self.inputs if getattr(one, name)])
            for name in ("kinds_apart", "few_hold_all")
        )
        found = []
        if apart.inputs:
            kinds = apart.by_kind("kinds")
            found.append(
                f"warning: at {len(apart.inputs)} of {len(self.inputs)} inputs some kinds of tokens take the "
                f"protection from others, and outside lies {shown(kinds)}: keep the beginning that all prompts "
                "share apart (collect_statistics(separate_prefix=...)), give a kind less weight "
                f'(kind_weights={{"{min(kinds, key=lambda kind: kinds[kind])}": 0.1}}), or raise protect'
            )
        if few.inputs:
            found.append(
                f"warning: at {len(few.inputs)} of {len(self.inputs)} inputs few tokens hold the energy, and of tokens "
                f"taken alike {max(few.by_kind('alike').values()):.1%} lies outside: keep a shared beginning apart "
                "(collect_statistics(separate_prefix=...)), mark them by token_kinds and give them less weight "
                "(kind_weights=...), or raise protect"
            )
        return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
