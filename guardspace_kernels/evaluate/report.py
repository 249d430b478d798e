"""What an evaluation found, prompt by prompt and in rates."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from guardspace_kernels.arguments import boolean, instance, readable_file
from guardspace_kernels.evaluate.rates import PairedDifference, Rate
from guardspace_kernels.guard import forms
from guardspace_kernels.guard.atomic import write_json
from guardspace_kernels.guard.judges import VERDICTS

_KIND = "guardspace evaluation"
_CODES = {verdict[0]: verdict for verdict in VERDICTS}  # r, c, o


@dataclass
class EvaluationReport:
    """What one model answers; from :func:`guardspace_kernels.evaluate_refusals`. Lists are in the order of the prompts.

    Rates are of greedy answers' openings: what a model may say later, or when it is sampled, is not in them.

    Attributes:
        prompts: a hash of all prompts' tokens. Reports are compared where it is the same.
        judge: the name of the judge.
        answer_tokens: how many tokens of each answer were judged.
        sources: of each harmful prompt, where it is from.
        verdicts: of each answer to a harmful prompt, "refuses", "complies" or "other".
        refusal_masses: of each harmful prompt, the probability that the model gives, at the first token of its answer,
            to the tokens that refusals begin with. Needs no judge. Empty where the tokenizer has no such token.
        lookalike_verdicts, lookalike_masses: the same of harmless prompts that look harmful.
        task_correct: of each task example, whether the answer begins as expected.
        kls: of the first harmful prompts, the mean over the base model's own answer of KL(base ‖ model) of the next
            token, in nats. Empty without a base model.
        logprob_changes: of the same prompts, by how much the log-probability of that whole answer changes.
        kl_tokens: how many tokens each of these answers has.
        answers, lookalike_answers: texts; empty in a report that was saved without them.
        base: the base model's report, where there is one.
    """

    prompts: str
    judge: str
    answer_tokens: int
    sources: list[str]
    verdicts: list[str]
    refusal_masses: list[float]
    lookalike_verdicts: list[str] = field(default_factory=list)
    lookalike_masses: list[float] = field(default_factory=list)
    task_correct: list[bool] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    logprob_changes: list[float] = field(default_factory=list)
    kl_tokens: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list, repr=False)
    lookalike_answers: list[str] = field(default_factory=list, repr=False)
    base: EvaluationReport | None = field(default=None, repr=False)

    @property
    def refuses(self) -> Rate:
        return _rate(self.verdicts, "refuses")

    @property
    def complies(self) -> Rate:
        return _rate(self.verdicts, "complies")

    @property
    def other(self) -> Rate:
        return _rate(self.verdicts, "other")

    @property
    def by_source(self) -> dict[str, dict[str, Rate]]:
        """Source -> verdict -> its rate."""
        parts = {
            source: [v for v, s in zip(self.verdicts, self.sources, strict=True) if s == source]
            for source in sorted(set(self.sources))
        }
        return {source: {v: _rate(part, v) for v in VERDICTS} for source, part in parts.items()}

    @property
    def over_refuses(self) -> Rate:
        return _rate(self.lookalike_verdicts, "refuses")

    @property
    def task(self) -> Rate:
        return Rate(sum(self.task_correct), len(self.task_correct))

    @property
    def refusal_mass(self) -> float | None:
        """Mean of ``refusal_masses``; None where there are none."""
        return _mean(self.refusal_masses)

    @property
    def lookalike_mass(self) -> float | None:
        return _mean(self.lookalike_masses)

    @property
    def kl(self) -> float | None:
        """Mean KL(base ‖ model) per token of the base model's own answers, in nats; None without a base model."""
        total = sum(kl * tokens for kl, tokens in zip(self.kls, self.kl_tokens, strict=True))
        return total / sum(self.kl_tokens) if self.kl_tokens else None

    @property
    def logprob_change(self) -> float | None:
        """Mean of ``logprob_changes``; None without a base model."""
        return _mean(self.logprob_changes)

    def compare(self, other: EvaluationReport) -> dict[str, PairedDifference]:
        """What the other model's rates differ from this one's by, prompt by prompt: "refuses" and, where both have
        them, "over_refuses" and "task".

        Each has an interval (Newcombe) and the p-value of an exact McNemar test. Prompts are what varies in it: it says
        nothing of other seeds of a training.

        Raises:
            TypeError: no report. ValueError: it is of other prompts, another judge or number of answer tokens.
        """
        instance("other", other, EvaluationReport, "an EvaluationReport")
        for name in ("prompts", "judge", "answer_tokens"):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                raise ValueError(f"other differs in {name}: {others!r}, not {mine!r}; evaluate both models alike")
        found = {"refuses": _paired(self.verdicts, other.verdicts)}
        if self.lookalike_verdicts:
            found["over_refuses"] = _paired(self.lookalike_verdicts, other.lookalike_verdicts)
        if self.task_correct and other.task_correct:
            found["task"] = PairedDifference.of(self.task_correct, other.task_correct)
        return found

    def to_dict(self, answers: bool = False) -> dict[str, Any]:
        """For JSON: verdicts as a text of their first letters (r, c, o), the task as one of 1 and 0."""
        values = asdict(self)
        for name in ("verdicts", "lookalike_verdicts"):
            values[name] = "".join(verdict[0] for verdict in values[name])
        values["task_correct"] = "".join("01"[right] for right in self.task_correct)
        if not answers:
            del values["answers"], values["lookalike_answers"]
        values["base"] = self.base and self.base.to_dict(answers)
        return {"kind": _KIND, "rates": self._rates(), **values}

    def _rates(self) -> dict[str, Any]:
        """What readers of the file look for first; nothing of it is read back."""
        rates = {name: getattr(self, name) for name in (*VERDICTS, "over_refuses", "task")}
        rates |= {f"refuses, {source}": rates["refuses"] for source, rates in self.by_source.items()}
        found: dict[str, Any] = {
            name: {"count": rate.count, "n": rate.n, "interval": list(rate.interval())}
            for name, rate in rates.items()
            if rate.n
        }
        return found | {n: getattr(self, n) for n in ("refusal_mass", "lookalike_mass", "kl", "logprob_change")}

    def save(self, path: str | os.PathLike[str], answers: bool = False) -> None:
        """As JSON, atomically; with the answers' texts if asked for, which may be harmful themselves."""
        write_json(path, self.to_dict(boolean("answers", answers)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvaluationReport:
        """What :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is no such report, or its lists do not agree.
        """
        path = readable_file("path", path, "a report of guardspace evaluate --json")
        with open(path, encoding="utf-8") as file:
            try:
                value = json.load(file)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"path: {path} is no JSON: {error}") from error
        if not isinstance(value, dict) or value.get("kind") != _KIND:
            raise ValueError(f"path: {path} is not a report of guardspace evaluate --json")
        return cls._of(value, path)

    @classmethod
    def _of(cls, value: dict[str, Any], path: str) -> EvaluationReport:
        known = _REPORT({name: one for name, one in value.items() if name not in ("kind", "rates")}, path)
        base = known.pop("base", None)
        for name in ("verdicts", "lookalike_verdicts"):
            known[name] = [_CODES[code] for code in known[name]]
        report = cls(**{**known, "task_correct": [digit == "1" for digit in known["task_correct"]]})
        report.base = base and cls._of(base, f"{path}: base")
        for name, lists in (
            ("verdicts", (report.sources, report.refusal_masses, report.answers)),
            ("lookalike_verdicts", (report.lookalike_masses, report.lookalike_answers)),
            ("kls", (report.logprob_changes, report.kl_tokens)),
        ):
            for one in lists:
                if len(one) != len(getattr(report, name)) and (one or name == "kls" or one is report.sources):
                    raise ValueError(
                        f"{path}: {name} are of {len(getattr(report, name))} prompts, others of {len(one)}"
                    )
        return report

    def plot(self, path: str | os.PathLike[str]) -> None:
        """A PNG of the rates with their intervals, beside the base model's; ModuleNotFoundError without matplotlib."""
        from guardspace_kernels.evaluate.figure import draw

        draw(self, path)

    def __str__(self) -> str:
        lines = [f"judged by {self.judge}, on the first {self.answer_tokens} tokens of greedy answers"]
        lines.append(
            f"harmful prompts   refuses {self.refuses}; complies {self.complies.count}, other {self.other.count}"
        )
        if len(self.by_source) > 1:
            lines += [f"  {source}: refuses {rates['refuses']}" for source, rates in self.by_source.items()]
        if self.lookalike_verdicts:
            lines.append(f"look-alikes       refuses {self.over_refuses}")
        if self.task_correct:
            lines.append(f"task              right {self.task}")
        if self.refusal_mass is not None:
            also = f", look-alikes {self.lookalike_mass:.1%}" if self.lookalike_mass is not None else ""
            lines.append(f"first token       {self.refusal_mass:.1%} on openings of refusals (harmful prompts{also})")
        if self.base is not None:
            if self.kl is not None:
                lines.append(
                    f"base model        KL {abs(self.kl):.3g} nats a token along its own answers to {len(self.kls)} "
                    f"prompts, whose log-probability changes by {self.logprob_change:+.3g}"
                )
            names = {"refuses": "harmful prompts", "over_refuses": "look-alikes", "task": "task"}
            lines += [f"  {names[name]}: {one}" for name, one in self.base.compare(self).items()]
        return "\n".join(lines)


def _paired(first: Sequence[str], second: Sequence[str]) -> PairedDifference:
    return PairedDifference.of([v == "refuses" for v in first], [v == "refuses" for v in second])


def _rate(verdicts: Sequence[str], verdict: str) -> Rate:
    return Rate(sum(v == verdict for v in verdicts), len(verdicts))


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _letters(letters: str) -> forms.Form:
    def form(value: Any, where: str) -> str:
        forms.text(value, where)
        if set(value) - set(letters):
            raise ValueError(f"{where} must be a text of {', '.join(letters)}, got {value[:40]!r}")
        return str(value)

    return form


def _real(value: Any, where: str) -> float:
    """A model that is broken gives NaN, which JSON has as a text."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else float(forms.number(value, where))


_REPORT = forms.fields(
    {
        "prompts": forms.text,
        "judge": forms.text,
        "answer_tokens": forms.count,
        "sources": forms.several(forms.text),
        "verdicts": _letters("rco"),
        "lookalike_verdicts": _letters("rco"),
        "task_correct": _letters("01"),
        "kl_tokens": forms.several(forms.count),
        **dict.fromkeys(
            ("refusal_masses", "lookalike_masses", "kls", "logprob_changes"), forms.several(_real)
        ),
    },
    {
        "answers": forms.several(forms.text),
        "lookalike_answers": forms.several(forms.text),
        "base": forms.maybe(forms.named(lambda value, _: value)),
    },
)  # fmt: skip
