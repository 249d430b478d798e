"""The harmful-resistant null space of a layer's input, as the thinner of two orthonormal bases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from guardspace_kernels.ops._library import full_float32_products
from guardspace_kernels.ops._spectrum import Spectrum, orthonormalised

RULES = ("energy", "rank", "paper")

# From here on an eigendecomposition in float32, which takes half the time of one in float64, is tried first.
_WIDE = 256

# Of T tokens C has rank T: T + 10 random combinations of its columns span its range to rounding, and as many again tell
# what they miss: at most this share of what the rule leaves unprotected.
_MORE, _PROBES, _NEGLIGIBLE = 10, 10, 1e-2

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

    def outside(self, rows: torch.Tensor) -> torch.Tensor:
        """``‖P x‖²`` (n,) of rows (n, d) in the basis's dtype."""
        along = rows @ self.basis
        return (rows - along @ self.basis.T if self.complement else along).square().sum(dim=1)

    def share_outside(self, covariance: torch.Tensor) -> float:
        """``tr(P C) / tr(C)`` of any covariance, 0 of a zero one; in float64."""
        basis = self.basis.to(covariance.device, torch.float64)
        C = covariance.double()
        total, along = float(C.diagonal().sum()), float(((C @ basis) * basis).sum())
        outside = total - along if self.complement else along
        return min(max(outside / total, 0.0), 1.0) if total > 0 else 0.0


def is_finite(t: torch.Tensor) -> bool:
    """Without NaN or infinity; ``torch.isfinite`` takes 20 times as long, and a mask."""
    return t.numel() == 0 or all(math.isfinite(extreme) for extreme in t.aminmax())


@full_float32_products()
def null_space(
    covariance: torch.Tensor,
    sinks: torch.Tensor,
    *,
    tokens: int | None = None,
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
        tokens: T, how many tokens C was accumulated from. Where they are few, C is solved in its range, T wide instead
            of d, with the same answer: a C that has more than that, which the rule would see, is solved as a whole.

    Raises:
        EmptyNullSpaceError: no dimension is left. ValueError: C is zero, not finite or at the lower end of its
            dtype's range, or the rule is unknown.

    Source: GuardSpace (arXiv 2510.14301), the harmful-resistant null space.
    """
    d = covariance.shape[0]
    if not is_finite(covariance):
        raise ValueError("the covariance holds non-finite values")
    if covariance.diagonal().sum() <= 0:
        raise ValueError("the covariance is zero: no token was counted, or none with an input but zero")
    largest, limits = float(covariance.diagonal().max()), torch.finfo(covariance.dtype)
    if largest < limits.tiny / limits.eps:
        raise ValueError(
            f"the covariance underflows {covariance.dtype}: its largest diagonal entry is {largest:.1e}, and the small "
            "ones were rounded away; collect the statistics in float64, or scale the inputs"
        )
    if rule != "paper" and not 1e-20 < largest < 1e20:
        covariance = covariance.double() / largest  # these rules know no scale, but float32 has a range
    free_of = partial(free_dimensions, rule=rule, protect=protect, protect_dims=protect_dims)
    C = covariance.to(torch.float32 if rule == "energy" and d >= _WIDE else torch.float64)
    solved = _solved(C, tokens, free_of)
    if C.dtype == torch.float32:
        rounding = d * torch.finfo(torch.float32).eps * solved.values[-1]
        if (1.0 - protect) * solved.values.sum() < 10 * rounding:
            C = covariance.double()
            solved = _solved(C, tokens, free_of)
    free = free_of(solved.values)
    if free <= 0:
        raise EmptyNullSpaceError(f"the rule leaves no null space: all {d} dimensions are protected")
    thin = d - free <= free
    basis = solved.leading(d - free) if thin else solved.trailing(free)
    outside = _directions_outside(_units(sinks).to(C.dtype), basis, thin)
    added = outside.shape[1]
    if added >= free:
        raise EmptyNullSpaceError(
            f"the rule leaves {free} dimensions and {added} distinct first-token directions take them all"
        )
    protected = d - free + added
    complement = protected <= d - protected
    if complement:
        basis = torch.cat([basis, outside], dim=1)
    else:
        basis = solved.trailing(free) if thin else basis
        if added:
            # `outside` lies in the span of this basis: rotated, its first columns are that span, and go.
            reflectors, tau = torch.geqrf(basis.T @ outside)
            basis = torch.ormqr(reflectors, tau, basis, left=False)[:, added:]
    # The protected eigenvectors hold their eigenvalues: no product of C with a whole basis tells more.
    held = solved.values[free:].double().sum() + ((C @ outside) * outside).double().sum()
    free_energy = min(max(1.0 - float(held / C.diagonal().double().sum()), 0.0), 1.0)
    return NullSpace(basis.contiguous(), complement, protected, added, free_energy)


class _Solved:
    """All eigenvalues of C, ascending, and those of its eigenvectors that are asked for, orthonormal: the whole of C,
    or its restriction to the range of Q (d, m), outside of which eigenvalues are 0 and any vectors do."""

    def __init__(self, spectrum: Spectrum, Q: torch.Tensor | None = None) -> None:
        self.spectrum, self.Q = spectrum, Q
        self.solved = len(spectrum.values)
        self.values = spectrum.values
        if Q is not None:
            self.values = torch.cat([Q.new_zeros(len(Q) - self.solved), self.values.clamp_min(0.0)])

    def leading(self, count: int) -> torch.Tensor:
        """The last ``count`` of all."""
        if count > self.solved:
            return self._completed()[:, -count:]
        return self._lifted(self.spectrum.vectors(self.solved - count, self.solved))

    def trailing(self, count: int) -> torch.Tensor:
        """The first ``count`` of all."""
        return self.spectrum.vectors(0, count) if self.Q is None else self._completed()[:, :count]

    def _lifted(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors if self.Q is None else _exact(self.Q @ vectors)

    def _completed(self) -> torch.Tensor:
        """(d, d): others before those of the range."""
        E = self._lifted(self.spectrum.vectors(0, self.solved))
        return _exact(torch.cat([torch.linalg.qr(E, mode="complete").Q[:, self.solved :], E], dim=1))


def _exact(E: torch.Tensor) -> torch.Tensor:
    """Products and QR in float32 leave columns orthonormal to 1e-5 only."""
    return orthonormalised(E) if E.dtype == torch.float32 else E


def _solved(C: torch.Tensor, tokens: int | None, free_of: Callable[[torch.Tensor], int]) -> _Solved:
    """In the span of ``C Ω`` for a random Ω if C is of few tokens and what it has outside of that span,
    ``‖(I − Q Qᵀ) C‖_F`` as a few more random vectors tell it, is rounding or negligible beside what the rule leaves
    unprotected; else as a whole."""
    d = len(C)
    m = d if tokens is None else tokens + _MORE
    if (3 if C.dtype == torch.float32 else 2) * m <= d:  # in float32 the whole takes half the time of LAPACK's
        random = torch.randn(d, m + _PROBES, generator=torch.Generator().manual_seed(0), dtype=C.dtype)
        images, probes = (C @ random.to(C.device)).split([m, _PROBES], dim=1)
        Q = torch.linalg.qr(images).Q
        solved = _Solved(Spectrum(Q.T @ (C @ Q)), Q)
        missed = float((probes - Q @ (Q.T @ probes)).double().norm()) / math.sqrt(_PROBES)
        unprotected = float(solved.values[: free_of(solved.values)].double().sum())
        rounding = d * torch.finfo(torch.float64).eps * float(solved.values[-1])
        if missed <= max(_NEGLIGIBLE * unprotected / math.sqrt(d), rounding):
            return solved
    return _Solved(Spectrum(C))


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


def _units(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, d) of norm 1, or 0 for a zero one, in float64; their squares may lie outside of their dtype's range."""
    if rows.numel() == 0:
        return rows.double()
    tiny = torch.finfo(torch.float64).tiny
    rows = rows.double() / rows.abs().amax(dim=1, keepdim=True).double().clamp_min(tiny)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(tiny)


def _directions_outside(sinks: torch.Tensor, basis: torch.Tensor, complement: bool) -> torch.Tensor:
    """An orthonormal basis (d, m) of what the sinks, of norm 1, add to the protected directions, which ``basis`` spans,
    or what it spans if not ``complement``."""

    def outside(columns: torch.Tensor) -> torch.Tensor:
        along = basis @ (basis.T @ columns)
        return columns - along if complement else along

    units = outside(sinks.T)
    if units.shape[1] == 0:
        return units
    U, sigma, _ = torch.linalg.svd(units, full_matrices=False)
    # A small remainder is orthogonal to the protected ones less exactly than to its own columns: once more.
    return torch.linalg.qr(outside(U[:, sigma > _SINK_TOLERANCE])).Q
