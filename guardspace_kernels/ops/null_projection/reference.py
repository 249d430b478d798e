"""Null-space projection, and AdamW between two of them, in plain PyTorch: the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from guardspace_kernels.ops._library import compute_dtype, full_float32_products


def project(g: torch.Tensor, basis: torch.Tensor, complement: bool) -> torch.Tensor:
    """``g P`` in the wider of the two dtypes, at least float32: (..., d) with P never formed."""
    dtype = compute_dtype(g.dtype, basis.dtype)
    g, basis = g.to(dtype), basis.to(dtype)
    with full_float32_products():
        onto_basis = (g @ basis) @ basis.T
    return g - onto_basis if complement else onto_basis


#: (g, basis, complement)
Projection = tuple[torch.Tensor, torch.Tensor, bool]


class Update(NamedTuple):
    """One matrix of ``projected_adamw_``."""

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    basis: torch.Tensor
    complement: bool
    settings: tuple[float, float, float, float, float]  #: lr, beta1, beta2, eps, weight_decay: one for all


def null_project_(projections: list[Projection]) -> None:
    for g, basis, complement in projections:
        g.copy_(project(g, basis, complement))


def projected_adamw_(updates: list[Update], project_: Callable[[list[Projection]], None] = null_project_) -> None:
    gradients = [u.grad.to(compute_dtype(u.grad.dtype), copy=True) for u in updates]
    project_([(gradient, u.basis, u.complement) for gradient, u in zip(gradients, updates, strict=True)])
    for gradient, u in zip(gradients, updates, strict=True):
        _adamw(u, gradient)
    project_([(u.param, u.basis, u.complement) for u in updates])


def _adamw(u: Update, gradient: torch.Tensor) -> None:
    lr, beta1, beta2, eps, weight_decay = u.settings
    step, dtype = u.step.double(), gradient.dtype
    first = u.exp_avg.to(dtype).lerp(gradient, 1 - beta1)
    second = beta2 * u.exp_avg_sq.to(dtype) + (1 - beta2) * gradient.square()
    denominator = (second / (1 - beta2**step)).sqrt() + eps
    u.exp_avg.copy_(first)
    u.exp_avg_sq.copy_(second)
    u.param.copy_((1 - lr * weight_decay) * u.param.to(dtype) - lr / (1 - beta1**step) * first / denominator)
