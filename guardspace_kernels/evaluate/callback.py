"""Refusals while a model is being trained."""

from __future__ import annotations

from typing import Any

import torch

from guardspace_kernels.arguments import integer
from guardspace_kernels.evaluate.refusals import Harmful, RefusalEvaluator
from guardspace_kernels.evaluate.report import EvaluationReport
from guardspace_kernels.guard.layers import is_sharded
from guardspace_kernels.integrations.transformers import LoggingCallback


class EvaluationCallback(LoggingCallback):
    """Tells during a training, guarded or not, how many harmful prompts the model still refuses.

    ``Trainer(..., callbacks=[EvaluationCallback(tokenizer, harmful)])`` evaluates before the first step, every
    ``every`` steps and after the last one, and adds to what is logged at that step: ``guard/refuses``,
    ``guard/complies``, ``guard/refusal_mass`` and, where there is what they need, ``guard/over_refuses``,
    ``guard/task`` and ``guard/kl``, to the model before the first step; a training that goes on from a checkpoint has
    no such model, and no KL. The model's mode, gradients and the state of torch's random generators stay as they are.

    The main process alone evaluates, with the whole model; the others wait at their next exchange. For W&B, TensorBoard
    and other reporters, ``trainer.callback_handler.callbacks.insert(0, callback)`` puts it before them; what was found
    before the first step stands in ``trainer.state.log_history`` alone.

    Attributes:
        reports: step -> :class:`EvaluationReport`, 0 before the first step. Those after it have that one as ``base``.

    Args:
        tokenizer: the model's.
        harmful: prompts that were in no calibration, as :func:`guardspace_kernels.evaluate_refusals` takes them. An
            evaluation of a hundred takes about as long as some training steps.
        every: how many steps pass from one evaluation to the next.
        options: ``lookalikes``, ``task``, ``judge``, ``answer_tokens``, ``task_tokens``, ``batch_size``,
            ``kl_prompts`` and ``chat``, as of :func:`guardspace_kernels.evaluate_refusals`; ``progress`` is off unless
            given.

    Raises:
        TypeError, ValueError: as of :func:`guardspace_kernels.evaluate_refusals`; what the model cannot read, before
            the first step. TypeError: a model that is divided among processes.
    """

    def __init__(self, tokenizer: Any, harmful: Harmful, every: int = 100, **options: Any) -> None:
        self.every = integer("every", every, 1)
        self.evaluator = RefusalEvaluator(tokenizer, harmful, **{"progress": False, **options})
        self.reports: dict[int, EvaluationReport] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if is_sharded(model):
            raise TypeError("model is sharded (FSDP, fully_shard): its answers need all of it in one process")
        self.reports = {}
        if state.is_world_process_zero:
            if state.global_step:
                self.evaluator.forget_base()
            else:
                values = self._evaluated(model, state, base=True)
                state.log_history.append({**values, "step": 0, "epoch": 0.0})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            main = state.is_world_process_zero
            self.log_with_step(control, self._evaluated(kwargs["model"], state) if main else {})

    def _evaluated(self, model: Any, state: Any, base: bool = False) -> dict[str, float]:
        """The numbers to log."""
        with torch.random.fork_rng(range(torch.cuda.device_count())):  # a judge may be a model, too
            report = self.evaluator.set_base(model) if base else self.evaluator(model)
        report.base = self.reports.get(0)
        self.reports[state.global_step] = report
        rates = {name: getattr(report, name) for name in ("refuses", "complies", "over_refuses", "task")}
        values = {name: rate.value for name, rate in rates.items() if rate.n}
        values |= {name: value for name in ("refusal_mass", "kl") if (value := getattr(report, name)) is not None}
        return {f"guard/{name}": value for name, value in values.items()}
