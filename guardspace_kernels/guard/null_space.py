"""The harmful-resistant null space of a layer's input, as the thinner of two orthonormal bases."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from guardspace_kernels.ops._library import full_float32_products

RULES = ("energy", "rank", "paper")

# From here on an eigendecomposition in float32, which takes half the time of one in float64, is tried first.
_WIDE = 256

# A sink direction is added to the protected ones where less than this share of it lies outside them already.
_SINK_TOLERANCE = 1e-3


class EmptyNullSpaceError(ValueError):
    """Nothing is left for the adapter: with P = 0 it could never learn."""


@dataclass
class NullSpace:
    """``P = I − Q Qᵀ`` or ``P = N Nᵀ``.

    Attributes:
        basis: (d, k), Q if ``complement`` else N; the thinner of the two.
        complement: whether the basis spans the protected directions.
        protected: dimension of the protected space, sink directions included.
        sink_directions: how many of them the sinks added.
        free_energy: tr(P C) / tr(C), the share of the calibration energy that the adapter can act on.
    """

    basis: torch.Tensor
    complement: bool
    protected: int
    sink_directions: int
    free_energy: float


def null_space(
    covariance: torch.Tensor,
    sinks: torch.Tensor,
    *,
    rule: str = "energy",
    protect: float = 0.99,
    protect_dims: int | None = None,
) -> NullSpace:
    """Splits the input space of a layer into protected directions and the null space.

    With ``C = E Λ Eᵀ`` the smallest set of leading eigenvectors is protected such that

    * ``rule="energy"``: the others hold at most ``1 − protect`` of tr(C);
    * ``rule="rank"``: there are ``protect_dims`` of them;
    * ``rule="paper"``: the others have ``λ ≤ max(1e-8, 1e-6·λ_max)``, as the code of the paper.

    The span of ``sinks`` is protected as well. Solved in float64, or in float32 where d is large and float32's rounding
    is far below what the rule leaves unprotected; the basis has the dtype of the solve.

    Args:
        covariance: (d, d), symmetric. sinks: (n, d), n may be 0.

    Raises:
        EmptyNullSpaceError: no dimension is left. ValueError: C is zero or not finite, or the rule is unknown.

    Source: GuardSpace (arXiv 2510.14301), the harmful-resistant null space.
    """
    d = covariance.shape[0]
    if not torch.isfinite(covariance).all():
        raise ValueError("the covariance holds non-finite values")
    if covariance.diagonal().sum() <= 0:
        raise ValueError("the covariance is zero: no token was counted")
    C = covariance.to(torch.float32 if rule == "energy" and d >= _WIDE else torch.float64)
    eigenvalues, E = torch.linalg.eigh(C)
    if C.dtype == torch.float32:
        rounding = d * torch.finfo(torch.float32).eps * eigenvalues[-1]
        if (1.0 - protect) * eigenvalues.sum() < 10 * rounding:
            C = covariance.double()
            eigenvalues, E = torch.linalg.eigh(C)
    free = free_dimensions(eigenvalues, rule=rule, protect=protect, protect_dims=protect_dims)
    if free <= 0:
        raise EmptyNullSpaceError(f"the rule leaves no null space: all {d} dimensions are protected")
    N, Q = E[:, :free], E[:, free:]
    outside = _directions_outside(sinks.to(C.dtype), Q)
    added = outside.shape[1]
    if added >= free:
        raise EmptyNullSpaceError(
            f"the rule leaves {free} dimensions and {added} distinct first-token directions take them all"
        )
    if added:
        # `outside` lies in span(N): rotate N so that its first columns are that span, and give those to Q.
        reflectors, tau = torch.geqrf(N.T @ outside)
        N = torch.ormqr(reflectors, tau, N, left=False)
        N, Q = N[:, added:], torch.cat([Q, N[:, :added]], dim=1)
    protected = Q.shape[1]
    complement = protected <= d - protected
    basis = Q if complement else N
    with full_float32_products():
        if C.dtype == torch.float32:
            basis = 1.5 * basis - 0.5 * basis @ (basis.T @ basis)  # float32 eigenvectors are orthogonal to 1e-5 only
        held = float(((C @ basis) * basis).double().sum() / C.diagonal().double().sum())
    free_energy = min(max(1.0 - held if complement else held, 0.0), 1.0)
    return NullSpace(basis.contiguous(), complement, protected, added, free_energy)


def free_dimensions(
    eigenvalues: torch.Tensor, *, rule: str = "energy", protect: float = 0.99, protect_dims: int | None = None
) -> int:
    """How many of C's ascending ``eigenvalues`` (d,) a rule of :func:`null_space` leaves free."""
    d = len(eigenvalues)
    eigenvalues = eigenvalues.double().clamp_min(0.0)
    largest = eigenvalues[-1]
    if rule == "energy":
        # Eigenvalues at rounding level are zeros: without the slack, protect=1 would protect noise.
        slack = d * torch.finfo(torch.float64).eps * largest
        return int((eigenvalues.cumsum(0) <= (1.0 - protect) * eigenvalues.sum() + slack).sum())
    if rule == "rank":
        if protect_dims is None:
            raise ValueError('rule="rank" needs protect_dims')
        return d - protect_dims
    if rule == "paper":
        return int((eigenvalues <= torch.clamp(1e-6 * largest, min=1e-8)).sum())
    raise ValueError(f"rule must be one of {RULES}, got {rule!r}")


def _directions_outside(sinks: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (d, m) of what the sinks add to span(Q)."""
    norms = sinks.norm(dim=1, keepdim=True)
    units = (sinks / norms.clamp_min(torch.finfo(torch.float64).tiny)).T
    units = units - Q @ (Q.T @ units)
    if units.shape[1] == 0:
        return units
    U, sigma, _ = torch.linalg.svd(units, full_matrices=False)
    return U[:, sigma > _SINK_TOLERANCE]
