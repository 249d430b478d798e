"""Covariance accumulation in plain PyTorch: the oracle."""

from __future__ import annotations

import torch

from guardspace_kernels.ops._library import compute_dtype, full_float32_products, rows

#: (covariance, x, mask, scale)
Update = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]


def covariance_update_(updates: list[Update]) -> None:
    for update in updates:
        _update(*update)


def _update(covariance: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, scale: float) -> None:
    X = rows(x).to(compute_dtype(x.dtype, covariance.dtype))
    if mask is not None:
        # where, not a product: 0 * NaN would poison the sum.
        X = torch.where(mask.reshape(-1, 1).bool(), X, X.new_zeros(()))
    with full_float32_products():
        product = X.T @ X
    covariance.add_(product.tril_(), alpha=scale)


def symmetrize_(covariance: torch.Tensor) -> None:
    covariance.copy_(covariance.tril() + covariance.tril(-1).T)


def squared_drift(covariance: torch.Tensor, F: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    F, G, lower = F.double(), G.double(), covariance.double().tril()
    gram, weighted = F.T @ F, G @ lower
    # G C Gᵀ from C's lower triangle L with its diagonal D: G L Gᵀ + (G L Gᵀ)ᵀ − G D Gᵀ
    half = weighted @ G.T
    return (gram * (half + half.T - (G * lower.diagonal()) @ G.T)).sum()
