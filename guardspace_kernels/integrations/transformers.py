"""Callbacks for the Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from guardspace_kernels.integrations.optim import OptimizerGuard, guard_optimizer


class LoggingCallback(TrainerCallback):
    """A callback whose numbers of a step stand in what the Trainer logs of that step, loss and all.

    A Trainer's own reporters are called before the callbacks that it is given: to have them see the numbers too, put
    the callback before them, ``trainer.callback_handler.callbacks.insert(0, callback)``.
    """

    _unlogged: dict[str, Any] | None = None

    def log_with_step(self, control: Any, values: dict[str, Any]) -> None:
        """From ``on_step_end``, in every process, since the Trainer gathers the loss: of the main one the values."""
        self._unlogged, control.should_log = values, True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for written in (kwargs["logs"], state.log_history[-1]):
            written.update(self._unlogged or {})
        self._unlogged = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._unlogged = None  # of a run that was interrupted before it logged


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
