from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor, nn

from guardspace_kernels.demo.training import Example

from .base import Method, factors


class AsFT(Method):
    """AsFT (arXiv 2506.08473): ``L = L_task + λ Σ ‖(I − Ĉ) B A‖_F²``, ``Ĉ = V Vᵀ / ‖V‖_F``, ``V = W_aligned − W_base``.

    Ĉ divides by the norm, not by its square, as the released code does. ``(I − Ĉ) B A = Z A`` with
    ``Z = B − V (Vᵀ B) / ‖V‖``, and ``‖Z A‖_F² = Σ ZᵀZ ∘ A Aᵀ``, so that no d × d matrix is formed. The paper has
    λ = 1. Our alignment changed each weight by a matrix of rank 16, up to rounding into bfloat16, and V is known.
    """

    name = "AsFT"
    knobs = (1.0, 0.1, 10.0)

    @cached_property
    def directions(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (V, ‖V‖_F)."""
        changes = {name: W - self.setting.base_weights[name] for name, W in self.setting.weights.items()}
        return {name: (V, V.norm()) for name, V in changes.items()}

    def loss(self, model: nn.Module, batch: Sequence[Example]) -> Tensor:
        penalty = []
        for name, (A, B) in factors(model).items():
            V, norm = self.directions[name]
            Z = B - V @ (V.T @ B) / norm
            penalty.append(((Z.T @ Z) * (A @ A.T)).sum())
        return self.cross_entropy(model, batch) + self.knob * sum(penalty)
