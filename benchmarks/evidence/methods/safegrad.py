from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guardspace_kernels.demo.training import Example, answer_logits

from .base import Method

ROWS = 4  # of refusals a step


class SafeGrad(Method):
    """SafeGrad (arXiv 2508.07172): the task's gradient g without its part against the alignment's gradient a.

    ``a = ∇ KL(p₀ ‖ p)`` on refusals; where ``⟨g, a⟩ < 0``, over all parameters together, ``g ← g − ⟨g, a⟩ / ‖a‖² · a``.
    The step is taken on ``g + ρ a``. The paper has ρ = 1.
    """

    name = "SafeGrad"
    knobs = (1.0, 0.3, 3.0)

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.step = 0

    def divergence(self, model: Any, rows: Sequence[Example]) -> Tensor:
        """``KL(p₀ ‖ p)`` in nats per answer token; p₀ is the model without its adapter."""
        with torch.no_grad(), model.disable_adapter():
            before = answer_logits(model, rows, self.setting.pad)[0].log_softmax(-1)
        after = answer_logits(model, rows, self.setting.pad)[0].log_softmax(-1)
        return nn.functional.kl_div(after, before, log_target=True, reduction="batchmean")

    def change_gradients(self, model: nn.Module) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = self.divergence(model, self.safety_rows(ROWS, self.step))
        self.step += 1
        alignment = torch.autograd.grad(loss, parameters)
        inner = sum(float((p.grad * a).sum()) for p, a in zip(parameters, alignment, strict=True))
        size = sum(float(a.square().sum()) for a in alignment)
        share = min(inner, 0.0) / size if size else 0.0
        for p, a in zip(parameters, alignment, strict=True):
            p.grad.add_(a, alpha=self.knob - share)  # type: ignore[union-attr]
