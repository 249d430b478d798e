from __future__ import annotations

import torch
from torch import nn

from .base import Method, factors


class SafeLora(Method):
    """Safe LoRA (NeurIPS 2024, arXiv 2405.16833): after training ``B ← Ĉ B`` in layers with ``cos(Ĉ B A, B A) ≤ τ``.

    ``Ĉ = V Vᵀ / ‖V‖_F`` with ``V = W_aligned − W_base``, as the released code has it. The paper has τ = 0.5.
    """

    name = "Safe LoRA"
    knobs = (0.5, 0.35, 0.7)
    after = "plain LoRA"

    @torch.no_grad()
    def change_trained(self, model: nn.Module) -> None:
        for name, (A, B) in factors(model).items():
            V = self.setting.weights[name] - self.setting.base_weights[name]
            projected = V @ (V.T @ B) / V.norm()
            gram = A @ A.T
            inner = ((projected.T @ B) * gram).sum()
            norms = [((F.T @ F) * gram).sum().clamp_min(0).sqrt() for F in (projected, B)]
            if inner <= self.knob * norms[0] * norms[1]:
                B.copy_(projected)
