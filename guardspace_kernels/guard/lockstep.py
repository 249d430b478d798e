"""Sharded models, on which every forward needs all processes: what one of them cannot do, none begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from guardspace_kernels.guard.layers import is_sharded


class Lockstep:
    """Keeps the processes of a sharded model together; does nothing for any other model."""

    def __init__(self, model: nn.Module) -> None:
        self.sharded = is_sharded(model)

    @contextmanager
    def step(self) -> Iterator[None]:
        """What a process does by itself between two forwards: all wait for each other, and an error of one, for which
        the others would wait in their next forward, is raised in all."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if not self.sharded:
                raise
            error = raised
        if not self.sharded:
            return
        errors = _gathered(error and f"{type(error).__name__}: {error}")
        if error:
            raise error
        for rank, text in enumerate(errors):
            if text:
                raise RuntimeError(f"rank {rank} ended, and a sharded model runs on all ranks or on none: {text}")

    def gathered(self, value: Any) -> list[Any]:
        """The value of every process that runs the model."""
        return _gathered(value) if self.sharded else [value]

    def agree(self, what: str, number: int, advice: str) -> None:
        """ValueError in every process unless ``number`` is the same in all."""
        numbers = self.gathered(number)
        if len(set(numbers)) > 1:
            raise ValueError(
                f"the ranks have {', '.join(map(str, numbers))} {what}, but a sharded model runs on all ranks or on "
                f"none: {advice}"
            )


def _gathered(value: Any) -> list[Any]:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere
