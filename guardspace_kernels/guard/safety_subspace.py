"""The safety-irrelevant trailing subspace of a layer's output, and the adapter's starting point in it."""

from __future__ import annotations

import torch

INITS = ("balanced", "paper", "zero")


def trailing_subspace(
    weight: torch.Tensor, covariance: torch.Tensor, rank: int, damping: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``rank`` smallest singular values of ``W C_d`` and their left singular vectors.

    ``C_d = C + δ·mean(diag C)·I``; a thin SVD in float64 of the triangle of ``W C_d``, so the vectors are orthonormal
    and none of them lies outside the range of a tall W.

    Args:
        weight: (d_out, d_in). covariance: (d_in, d_in), symmetric. rank: 1 to min(d_out, d_in). damping: δ.

    Returns:
        (U_r, σ_r): (d_out, rank) and (rank,), float64, σ descending.

    Source: GuardSpace (arXiv 2510.14301). There the adapter starts from ``U_r Σ_r V_rᵀ C⁻¹``, which equals
    ``U_r U_rᵀ W``: neither the right vectors nor an inverse are needed.
    """
    d_out, d_in = weight.shape
    if not 1 <= rank <= min(d_out, d_in):
        raise ValueError(f"rank must be from 1 to min(d_out, d_in) = {min(d_out, d_in)}, got {rank}")
    C = covariance.double()
    M = weight.double() @ C + damping * C.diagonal().mean() * weight.double()
    if d_out < d_in:
        # Mᵀ = Q R: the left singular vectors of M are the right ones of R.
        _, sigma, Vh = torch.linalg.svd(torch.linalg.qr(M.T, mode="r").R)
        return Vh.T[:, -rank:].contiguous(), sigma[-rank:]
    Q, R = torch.linalg.qr(M)
    U, sigma, _ = torch.linalg.svd(R)
    return Q @ U[:, -rank:], sigma[-rank:]


def starting_factors(
    weight: torch.Tensor, U: torch.Tensor, sigma: torch.Tensor, scale: float, init: str
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(A₀, B₀, dead) with ``s·B₀A₀ = U_r U_rᵀ W``, before the projection of A₀.

    ``B₀ = U_r diag(c)``, ``A₀ = diag(1/(s·c)) U_rᵀ W`` with ``c_i = (‖u_iᵀW‖/s)^½`` (``init="balanced"``: row i of A₀
    and column i of B₀ have equal norms) or ``c_i = (σ_i/s)^½`` (``init="paper"``). A row with ``‖u_iᵀW‖`` at rounding
    level is set to zero and its column of B₀ kept, so that it can still learn; ``dead`` counts those.
    """
    rows = U.T @ weight.double()
    norms = rows.norm(dim=1)
    # Float32's for every dtype, that of the factors: all trailing rows of a large bfloat16 weight lie under bfloat16's.
    rounding = torch.finfo(torch.float32).eps * weight.double().norm()
    dead = norms <= rounding
    c = ((norms if init == "balanced" else sigma) / scale).sqrt()
    usable = ~dead & (c > 0)
    typical = c[usable].median() if usable.any() else c.new_ones(())
    c = torch.where(usable, c, typical)
    A0 = torch.where(usable[:, None], rows / (scale * c)[:, None], rows.new_zeros(()))
    return A0, U * c, int((~usable).sum())
