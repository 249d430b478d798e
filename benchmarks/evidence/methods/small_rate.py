from __future__ import annotations

from .base import Method


class SmallRate(Method):
    """Plain LoRA at a smaller learning rate, which by itself keeps much of the refusals (arXiv 2508.12531)."""

    name = "small learning rate"
    knobs = (1e-4, 5e-5, 2e-4)

    @property
    def learning_rate(self) -> float:
        return self.knob
