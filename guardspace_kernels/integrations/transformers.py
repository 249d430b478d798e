"""A callback for the Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from guardspace_kernels.integrations.optim import OptimizerGuard, guard_optimizer


class GuardCallback(TrainerCallback):
    """Trains a guarded model in step mode: ``Trainer(..., callbacks=[GuardCallback()])``.

    Optional: without it the Trainer trains in forward mode, to the same result. See
    :func:`guardspace_kernels.guard_optimizer` for what step mode saves and which optimisers it takes.
    """

    def __init__(self) -> None:
        self._guard: OptimizerGuard | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)  # an interrupted run left its guard on
        self._guard = guard_optimizer(kwargs["optimizer"], kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
