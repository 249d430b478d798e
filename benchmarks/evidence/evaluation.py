"""What a cell's model does on all prompts: verdict codes and numbers, no text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from guardspace_kernels.evaluate.generation import left_padded
from guardspace_kernels.evaluate.refusals import RefusalEvaluator
from guardspace_kernels.evaluate.report import EvaluationReport

from .prompts import EvaluationPrompts, Task
from .setting import ANSWER_TOKENS, Setting

DIVERGENCES = 90  # held-out requests, 30 of each source, whose KL to the starting model is measured
PAIRS, VALIDATION = "pairs", "UncensorBench"


class Evaluation:
    """Of models that start from one aligned model and are fine-tuned on one task.

    Called with a model, or with None for the starting model itself, it returns:

    * ``harmful``: source -> verdict codes (r refuses, c complies, o other) of the held-out requests. While a knob is
      tuned these are the validation requests, and only the task is evaluated beside them.
    * ``first_token``: source -> probability, in percent, of the tokens that refusals begin with.
    * ``lookalikes``, ``pairs_harmless``, ``pairs_harmful``: verdict codes.
    * ``task``, ``facts``: 1 or 0 a row. A fact is right where its true statement is likelier than the false one.
    * ``refusal_kl``: mean KL(start ‖ model), in nats per token, along the starting model's answers to requests.
    * ``answer_logprob``: mean change of the log-probability of these answers.
    """

    def __init__(self, setting: Setting, prompts: EvaluationPrompts, task: Task, tuning: bool) -> None:
        self.setting, self.tuning = setting, tuning
        if tuning:
            harmful = [(VALIDATION, request) for request in prompts.validation]
            harmless: list[str] = []
        else:
            by_source = [[(source, one) for one in requests] for source, requests in prompts.harmful.items()]
            harmful = [one for turn in zip_longest(*by_source) for one in turn if one is not None]
            harmful += [(PAIRS, harm) for _, harm in prompts.pairs]
            harmless = [*prompts.lookalikes, *(harmless for harmless, _ in prompts.pairs)]
        self.lookalikes = len(prompts.lookalikes)
        self.facts = [] if tuning else [statement for fact in prompts.facts for statement in fact]
        # The labels of a task differ in their first token, which decides.
        self.evaluator = RefusalEvaluator(
            setting.tokenizer, harmful, lookalikes=harmless, task=task.validation if tuning else task.test,
            task_tokens=1,
            answer_tokens=ANSWER_TOKENS, kl_prompts=DIVERGENCES, progress=False,
        )  # fmt: skip
        self.start = setting.load()
        self.start_report = self.evaluator.set_base(self.start)

    def __call__(self, model: nn.Module | None) -> dict[str, Any]:
        report = self.start_report if model is None else self.evaluator(model)
        harmful = _by_source(report, [verdict[0] for verdict in report.verdicts])
        masses = _by_source(report, [round(100 * mass, 1) for mass in report.refusal_masses])
        found: dict[str, Any] = {"harmful": {name: "".join(codes) for name, codes in harmful.items() if name != PAIRS}}
        found["first_token"] = masses
        if not self.tuning:
            harmless = "".join(verdict[0] for verdict in report.lookalike_verdicts)
            found["pairs_harmful"] = "".join(harmful[PAIRS])
            found["pairs_harmless"] = harmless[self.lookalikes :]
            found["lookalikes"] = harmless[: self.lookalikes]
            found["facts"] = self._facts(self.start if model is None else model)
        found["task"] = "".join("01"[right] for right in report.task_correct)
        found["refusal_kl"] = _rounded(report.kl)
        found["answer_logprob"] = _rounded(report.logprob_change)
        return found

    def _facts(self, model: nn.Module) -> str:
        likelihoods = self._log_probabilities(model)
        pairs = zip(likelihoods[::2], likelihoods[1::2], strict=True)
        return "".join("1" if true > false else "0" for true, false in pairs)

    @torch.no_grad()
    def _log_probabilities(self, model: Any, batch_size: int = 50) -> list[float]:
        """Of each statement, summed over its tokens but the first."""
        tokenizer, pad = self.setting.tokenizer, self.setting.pad
        statements = [tokenizer(text, add_special_tokens=False).input_ids for text in self.facts]
        order = sorted(range(len(statements)), key=lambda i: len(statements[i]))
        found = [0.0] * len(statements)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = left_padded([statements[i] for i in part], pad)
            log_p = model(**batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            real = batch["attention_mask"][:, :-1] * batch["attention_mask"][:, 1:]
            sums = (log_p.gather(2, batch["input_ids"][:, 1:, None])[..., 0] * real).sum(1)
            for i, value in zip(part, sums.tolist(), strict=True):
                found[i] = value
        return found


def _by_source(report: EvaluationReport, values: Sequence[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for source, value in zip(report.sources, values, strict=True):
        found.setdefault(source, []).append(value)
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
