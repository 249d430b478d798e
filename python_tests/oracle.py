"""Truth in float64, from the textbook formulas with a dense projector, and the rule by which results are judged."""

from __future__ import annotations

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: Relative errors that are granted whatever plain PyTorch achieves: a few roundings of the largest entry.
FLOOR = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def orthonormal(d: int, k: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A random orthonormal basis (d, k)."""
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64))[0].to(dtype)


def dense_projector(basis: torch.Tensor | None, complement: bool, d: int) -> torch.Tensor:
    """P (d, d): I, or I − Q Qᵀ, or N Nᵀ."""
    if basis is None:
        return torch.eye(d, dtype=torch.float64)
    onto_basis = basis.double() @ basis.double().T
    return torch.eye(d, dtype=torch.float64) - onto_basis if complement else onto_basis


def error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest error relative to the largest entry of the truth."""
    assert actual.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    return ((actual.double() - truth).abs().max() / truth.abs().max()).item()


def assert_as_exact_as_plain(actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, case: object = "") -> None:
    """Error against float64 at most twice that of plain PyTorch in the same dtype, plus the floor."""
    assert actual.dtype == plain.dtype
    bound = 2 * error(plain, truth) + FLOOR[actual.dtype]
    assert error(actual, truth) <= bound, f"{case} {error(actual, truth):.2e} > {bound:.2e}"
