"""Null-space projection in plain PyTorch: the oracle."""

from __future__ import annotations

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


def null_project_(projections: list[Projection]) -> None:
    for g, basis, complement in projections:
        g.copy_(project(g, basis, complement))
