from __future__ import annotations

from typing import Any

import torch
from torch import nn

import guardspace_kernels as gk

from .base import Method


class GuardSpace(Method):
    """GuardSpace (arXiv 2510.14301) as this library has it: ``ΔW = s (B A P − B₀ A₀ P)``.

    The knob is the share of the calibration energy that P protects.
    """

    name = "GuardSpace"
    knobs = (0.99, 0.9, 0.999)

    def plan(self) -> gk.GuardPlan:
        return self.setting.plan(protect=self.knob)

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model: Any = gk.attach_guard(self.setting.load(), self.plan())
        return model
