"""The safety-irrelevant trailing subspace of a layer's output, and the adapter's starting point in it.

The trailing left singular vectors of M = W C are the leading eigenvectors of (M Mᵀ)⁻¹. A block Krylov space of that
inverse holds them after a few steps, and applying the inverse takes triangles of W and C only: M is formed and
factored for wide W alone.
"""

from __future__ import annotations

import torch

from guardspace_kernels.ops import covariance_update_
from guardspace_kernels.ops._library import full_float32_products

INITS = ("balanced", "paper", "zero")

# A Krylov space is grown until the residuals of its Ritz vectors say that another step would lower the energy by less
# than this share; by less than the second where the answer then fails the check, as it may where the small singular
# values lie close. What they say is 30% to 100% of what all further steps together gain.
_TOLERANCES = 1e-3, 2e-4
# An answer is kept if its energy is what its Ritz values promise, and if it was found in float32 also if another
# application of the inverse leaves that energy where it is, both in float64 and to these tolerances.
_SAME_ENERGY, _SAME_AFTER = 5e-3, 2e-2
_MOST_STEPS = 16


class DampedCovariance:
    """``C_d = C + δ·mean(diag C)·I`` (d, d) and its Cholesky factors, for all layers that read one input."""

    def __init__(self, covariance: torch.Tensor, damping: float = 0.01) -> None:
        self.matrix = covariance.to(torch.float64, copy=True)
        self.matrix.diagonal().add_(damping * self.matrix.diagonal().mean())
        self._factors: dict[torch.dtype, torch.Tensor] = {}

    def factor(self, dtype: torch.dtype) -> torch.Tensor:
        """Lower triangular; LinAlgError if the matrix is not positive definite in ``dtype``."""
        if dtype not in self._factors:
            self._factors[dtype] = torch.linalg.cholesky(self.matrix.to(dtype))
        return self._factors[dtype]


def trailing_subspace(
    weight: torch.Tensor, covariance: torch.Tensor | DampedCovariance, rank: int, damping: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``rank`` smallest singular values of ``W C_d`` and their left singular vectors.

    ``C_d = C + δ·mean(diag C)·I``. By block Krylov iteration on ``(W C_d² Wᵀ)⁻¹``: in float32 where W is not
    square and the result stands up to a check in float64, else in float64, else (small or degenerate problems) by a
    thin SVD. Of a tall W of full rank the vectors lie in its range, to 1e-5 where float32 found them. The energy
    ``‖U_rᵀ W C_d‖²`` is at most 1% above the smallest possible.

    Args:
        weight: (d_out, d_in). covariance: (d_in, d_in), symmetric. rank: 1 to min(d_out, d_in). damping: δ, unless
            the covariance is damped already.

    Returns:
        (U_r, σ_r): (d_out, rank), orthonormal to 1e-12, and (rank,), float64, σ descending.

    Source: GuardSpace (arXiv 2510.14301). There the adapter starts from ``U_r Σ_r V_rᵀ C⁻¹``, which equals
    ``U_r U_rᵀ W``: neither the right vectors nor an inverse are needed.
    """
    return trailing_subspace_and_rows(weight, covariance, rank, damping)[:2]


_Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def trailing_subspace_and_rows(
    weight: torch.Tensor, covariance: torch.Tensor | DampedCovariance, rank: int, damping: float = 0.01
) -> _Found:
    """:func:`trailing_subspace`, and ``U_rᵀ W`` (rank, d_in), of which the check is made."""
    size = min(weight.shape)
    if not 1 <= rank <= size:
        raise ValueError(f"rank must be from 1 to min(d_out, d_in) = {size}, got {rank}")
    C = covariance if isinstance(covariance, DampedCovariance) else DampedCovariance(covariance, damping)
    with full_float32_products():
        if size >= 4 * rank and size >= 128:  # else a Krylov space would be most of the whole
            # The smallest singular values of a square W are far below the next ones: float32 hardly resolves them.
            square = weight.shape[0] == weight.shape[1]
            for dtype in (torch.float64,) if square else (torch.float32, torch.float64):
                found = _by_krylov(weight, C, rank, dtype)
                if found is not None:
                    return found
        W = weight.double()
        U, sigma = _by_svd(W @ C.matrix, rank)
        return U, sigma, U.T @ W


def _by_svd(M: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    if M.shape[0] < M.shape[1]:
        # Mᵀ = Q R: the left singular vectors of M are the right ones of R.
        _, sigma, Vh = torch.linalg.svd(torch.linalg.qr(M.T, mode="r").R)
        return Vh.T[:, -rank:].contiguous(), sigma[-rank:]
    Q, R = torch.linalg.qr(M)
    U, sigma, _ = torch.linalg.svd(R)
    return Q @ U[:, -rank:], sigma[-rank:]


class _Inverse:
    """``(M Mᵀ)⁻¹`` in coordinates of the range that the vectors lie in: ``min(d_out, d_in)`` of them."""

    def __init__(self, weight: torch.Tensor, C: DampedCovariance, dtype: torch.dtype) -> None:
        W = weight.to(dtype)
        d_out, d_in = W.shape
        self.size, self.dtype, self.device = min(d_out, d_in), dtype, weight.device
        self._W: torch.Tensor | None = None
        self._pivots: torch.Tensor | None = None
        self._L: torch.Tensor | None = None
        if d_out < d_in:  # M = Rᵀ Qᵀ
            self._R = torch.linalg.qr((W @ C.matrix.to(dtype)).T, mode="r").R.T
        elif d_out == d_in:  # M = P L U C
            self._L = C.factor(dtype)
            self._R, self._pivots, _ = torch.linalg.lu_factor_ex(W)
        else:  # M = Q R C with Q = W R⁻¹ and WᵀW = RᵀR: half of a QR's work, and what it loses is found by the check
            self._L, self._W = C.factor(dtype), W
            gram = torch.zeros_like(C.matrix, dtype=dtype)
            covariance_update_(gram, W)
            self._R = torch.linalg.cholesky(gram).T
        # A singular W: a tiny pivot makes its null vectors the first to be found.
        diagonal = self._R.diagonal()
        floor = torch.finfo(dtype).eps * diagonal.abs().max().clamp_min(torch.finfo(dtype).tiny)
        diagonal.copy_(torch.where(diagonal.abs() < floor, torch.where(diagonal < 0, -floor, floor), diagonal))

    def apply(self, Y: torch.Tensor) -> torch.Tensor:
        if self._L is None:
            Z = torch.linalg.solve_triangular(self._R, Y, upper=False)
            return torch.linalg.solve_triangular(self._R.T, Z, upper=True)
        if self._pivots is None:
            Z = torch.linalg.solve_triangular(self._R, Y, upper=True)
        else:
            Z = torch.linalg.lu_solve(self._R, self._pivots, Y)
        for _ in range(2):  # cholesky_solve would copy the factor each time
            Z = torch.linalg.solve_triangular(self._L, Z, upper=False)
            Z = torch.linalg.solve_triangular(self._L.T, Z, upper=True)
        if self._pivots is None:
            return torch.linalg.solve_triangular(self._R.T, Z, upper=False)
        return torch.linalg.lu_solve(self._R, self._pivots, Z, adjoint=True)

    def lift(self, Y: torch.Tensor) -> torch.Tensor:
        """To the layer's output, (d_out, columns)."""
        return Y if self._W is None else self._W @ torch.linalg.solve_triangular(self._R, Y, upper=True)


def _by_krylov(weight: torch.Tensor, C: DampedCovariance, rank: int, dtype: torch.dtype) -> _Found | None:
    """The answer, or None where ``dtype`` does not find it."""
    try:
        inverse = _Inverse(weight, C, dtype)
        for tolerance in _TOLERANCES:
            found = _smallest(inverse, rank, tolerance)
            checked = None if found is None else _checked(weight, C, inverse, *found)
            if checked is not None:
                return checked
    except torch.linalg.LinAlgError:
        pass
    return None


def _checked(
    weight: torch.Tensor, C: DampedCovariance, inverse: _Inverse, V: torch.Tensor, energy: float
) -> _Found | None:
    U = _orthonormal(inverse.lift(V).double())
    columns = [U, inverse.lift(inverse.apply(V)).double()] if inverse.dtype == torch.float32 else [U]
    # In one pass over W and C, which takes longer than the products.
    of_W = torch.cat(columns, dim=1).T @ weight.double()
    rows, *again = (of_W @ C.matrix).split(V.shape[1])
    values, mix = torch.linalg.eigh(rows @ rows.T)
    true = float(values.sum())
    if not 0 < true <= (1 + _SAME_ENERGY) * energy:
        return None
    if again:
        after = (again[0].square().sum(1) / columns[1].square().sum(0)).sum()
        if not abs(float(after) / true - 1) <= _SAME_AFTER:
            return None
    mix = mix.flip(1)
    return U @ mix, values.flip(0).clamp_min(0).sqrt(), mix.T @ of_W[: len(rows)]


def _smallest(inverse: _Inverse, rank: int, tolerance: float) -> tuple[torch.Tensor, float] | None:
    """(V, Σ σ²): the ``rank`` leading Ritz vectors of the inverse in a block Krylov space, applied to once more and
    orthonormal, and the sum of the reciprocals of their Ritz values, which are at most those of the exact answer."""
    block = min(rank + 8, inverse.size)
    start = torch.randn(inverse.size, block, generator=torch.Generator().manual_seed(0), dtype=inverse.dtype)
    basis = _orthonormal(inverse.apply(start.to(inverse.device)))
    images = inverse.apply(basis)
    H = (basis.T @ images).double()
    for _ in range(_MOST_STEPS):
        if not torch.isfinite(H).all():
            return None
        ritz, mix = (x[..., -rank:] for x in torch.linalg.eigh((H + H.T) / 2))
        if ritz[0] <= 0:
            return None
        energy = float((1 / ritz).sum())
        vectors = mix.to(basis.dtype)
        V = images @ vectors  # the Ritz vectors after one more application, which costs nothing
        residuals = (V - basis @ (vectors * ritz.to(basis.dtype))).double().square().sum(0)
        left = float((residuals / ritz**3).sum())
        if left <= tolerance * energy:
            return _orthonormal(V), energy
        if basis.shape[1] + block > inverse.size:
            return None
        V = images[:, -block:]
        for _ in range(2):
            V = _orthonormal(V - basis @ (basis.T @ V))
        basis, images = torch.cat([basis, V], dim=1), torch.cat([images, inverse.apply(V)], dim=1)
        columns = (basis.T @ images[:, -block:]).double()
        H = torch.cat([torch.cat([H, columns[:-block].T]), columns], dim=1)
    return None


def _orthonormal(Y: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(Y).Q


def starting_factors(
    weight: torch.Tensor,
    U: torch.Tensor,
    sigma: torch.Tensor,
    scale: float,
    init: str,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(A₀, B₀, dead) with ``s·B₀A₀ = U_r U_rᵀ W``, before the projection of A₀; ``rows`` are ``U_rᵀ W`` if known.

    ``B₀ = U_r diag(c)``, ``A₀ = diag(1/(s·c)) U_rᵀ W`` with ``c_i = (‖u_iᵀW‖/s)^½`` (``init="balanced"``: row i of A₀
    and column i of B₀ have equal norms) or ``c_i = (σ_i/s)^½`` (``init="paper"``). A row with ``‖u_iᵀW‖`` at rounding
    level is set to zero and its column of B₀ kept, so that it can still learn; ``dead`` counts those.
    """
    rows = U.T @ weight.double() if rows is None else rows
    norms = rows.norm(dim=1)
    # Float32's for every dtype, that of the factors: all trailing rows of a large bfloat16 weight lie under bfloat16's.
    rounding = torch.finfo(torch.float32).eps * torch.linalg.vector_norm(weight, dtype=torch.float64)
    dead = norms <= rounding
    c = ((norms if init == "balanced" else sigma) / scale).sqrt()
    usable = ~dead & (c > 0)
    typical = c[usable].median() if usable.any() else c.new_ones(())
    c = torch.where(usable, c, typical)
    A0 = torch.where(usable[:, None], rows / (scale * c)[:, None], rows.new_zeros(()))
    return A0, U * c, int((~usable).sum())
