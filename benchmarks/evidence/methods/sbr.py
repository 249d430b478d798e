from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from guardspace_kernels.demo.training import Example
from guardspace_kernels.evaluate.generation import left_padded

from .base import Method

ANCHORS = 8


class SafetyAnchor(Method):
    """Safety bottleneck regularisation (arXiv 2605.05995): ``L = L_task + λ · MSE(h(anchor), h₀(anchor))``.

    h is the last hidden state at the last token of a prompt, h₀ that of the starting model; the anchors are 8 fixed
    calibration requests. The paper has λ = 50.
    """

    name = "SBR"
    knobs = (50.0, 5.0, 500.0)

    @cached_property
    def anchors(self) -> dict[str, Tensor]:
        prompts = sorted(self.setting.calibration, key=len)
        return left_padded([prompts[i * len(prompts) // ANCHORS] for i in range(ANCHORS)], self.setting.pad)

    def hidden(self, model: Any) -> Tensor:
        """(anchors, d)."""
        decoder = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
        return decoder(**self.anchors, use_cache=False).last_hidden_state[:, -1]

    @cached_property
    def reference(self) -> Tensor:
        with torch.no_grad():
            return self.hidden(self.setting.load())

    def loss(self, model: nn.Module, batch: Sequence[Example]) -> Tensor:
        distance = nn.functional.mse_loss(self.hidden(model), self.reference)
        return self.cross_entropy(model, batch) + self.knob * distance
