"""Drift, live, in any training: a callback for the Hugging Face Trainer that is a plain function of a model too."""

from __future__ import annotations

import warnings
from typing import Any

from guardspace_kernels.arguments import integer
from guardspace_kernels.guard.monitor import DriftMeter
from guardspace_kernels.guard.statistics import CalibrationStatistics
from guardspace_kernels.integrations.transformers import LoggingCallback


class DriftMonitor(DriftMeter, LoggingCallback):
    """Tells while a LoRA is being trained, guarded or plain, how far each layer has drifted on harmful prompts.

    In a Trainer, ``Trainer(..., callbacks=[DriftMonitor(stats)])``: every ``every`` steps and after the last one it
    adds ``guard/drift_mean``, ``guard/drift_worst`` and the layer's name to what is logged at that step. Above
    ``max_drift`` it warns and stops the training, once that step is logged and saved as usual. In a loop of your own,
    ``monitor(model)`` returns the same numbers, and raises instead; see :class:`DriftMeter` for what they are and cost.

    Of several processes the main one logs; with ``max_drift`` each one judges its own copy, so that all stop together.
    For W&B, TensorBoard and other reporters, ``trainer.callback_handler.callbacks.insert(0, monitor)`` puts it before
    them.

    Args:
        stats: of the base model, on safety-triggering prompts.
        every: how many steps of a Trainer pass from one measurement to the next.
        max_drift: a drift that is too much; None only measures.
        per_layer: log the drift of every layer too, as ``guard/drift/NAME``.

    Raises:
        TypeError, ValueError: before a Trainer's first step, for statistics or layers that cannot be judged, as
            :meth:`DriftMeter.layer_drifts` describes them; later for an adapter that diverged.

    Source: GuardSpace's null-space condition (arXiv 2510.14301), turned into a number.
    """

    def __init__(
        self,
        stats: CalibrationStatistics,
        every: int = 50,
        max_drift: float | None = None,
        *,
        per_layer: bool = False,
    ) -> None:
        super().__init__(stats, max_drift=max_drift, per_layer=per_layer)
        self.every = integer("every", every, 1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._judges(state):
            self.layer_drifts(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        drifts = self.layer_drifts(kwargs["model"]) if self._judges(state) else {}
        self.log_with_step(control, self.values(drifts) if state.is_world_process_zero else {})
        if drifts and (failure := self.failure(drifts)):
            control.should_training_stop = True
            if state.is_world_process_zero:
                warnings.warn(f"{failure}: training stops at step {state.global_step}", stacklevel=2)

    def _judges(self, state: Any) -> bool:
        """Whether this process does."""
        return bool(state.is_world_process_zero) or self.max_drift is not None
