from __future__ import annotations

import torch
from torch import nn

from .base import Method, factors


class ProjectedAfterwards(Method):
    """Plain LoRA with ``A ← A P`` after training: GuardSpace's projector without training under it.

    The knob is the share of the calibration energy that P protects.
    """

    name = "projected afterwards"
    knobs = (0.99, 0.9, 0.5)
    after = "plain LoRA"

    @torch.no_grad()
    def change_trained(self, model: nn.Module) -> None:
        plan = self.setting.plan(protect=self.knob, init="zero")
        for name, (A, _) in factors(model).items():
            space = plan.space_of(name)
            if space is not None:
                inside = (A @ space.basis) @ space.basis.T
                A.copy_(A - inside if space.complement else inside)
