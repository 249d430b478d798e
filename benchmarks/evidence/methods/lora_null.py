from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from .base import Method, factors


class LoraNull(Method):
    """LoRA-Null v2 (AAAI 2026, arXiv 2503.02659) on the harmful prompts: A is frozen, B is trained.

    U_n (d_in, r) are the eigenvectors of C's r smallest eigenvalues. ``T = W U_n U_nᵀ = B₀ A₀`` by its SVD,
    ``B₀ = U √S``, ``A₀ = √S Vᵀ``, and ``W ← W − T``. ``ΔW = (B − B₀) A₀`` then acts on U_n alone. The paper calibrates
    on knowledge, and has r = 128; r is the knob.
    """

    name = "LoRA-Null v2"
    knobs = (128, 16, 64)

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        rank = round(self.knob)
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        model: Any = peft.get_peft_model(self.setting.load(), config)
        base = model.get_base_model()
        with torch.no_grad():
            for name, (A, B) in factors(model).items():
                layer = base.get_submodule(name).base_layer
                U_n = self.setting.lowest_directions(name, rank)
                W_n = layer.weight @ U_n  # T = W_n U_nᵀ has the singular values of W_n
                U, S, Vt = torch.linalg.svd(W_n, full_matrices=False)
                kept = len(S)
                A.zero_()
                B.zero_()
                B[:, :kept] = U * S.sqrt()
                A[:kept] = S.sqrt()[:, None] * (Vt @ U_n.T)
                layer.weight -= W_n @ U_n.T
                A.requires_grad_(False)
        return model
