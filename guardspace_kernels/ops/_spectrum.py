"""All eigenvalues of a symmetric matrix, and those of its eigenvectors that are asked for."""

from __future__ import annotations

import torch

from guardspace_kernels.ops import _cpu
from guardspace_kernels.ops.covariance import covariance_update_

_PANEL = 32  # rows at a time that are made tridiagonal

# Vectors are orthonormal to this from the start, or to the second and after one step of orthonormalisation.
_ORTHONORMAL, _NEARLY = 1e-6, 1e-3
_PROBES = 4


class Spectrum:
    """``A = E Λ Eᵀ`` (d, d). ``values`` (d,), ascending, of A's dtype.

    On a CPU in float32 by the extension's kernels, which spare the vectors that nobody asks for and the divide and
    conquer: 1.5 times as fast as LAPACK at d = 1536 where half are asked for. In float64 or on a GPU, without the
    extension, or where the vectors fail a check, by ``torch.linalg.eigh``.
    """

    def __init__(self, A: torch.Tensor) -> None:
        self._A = A
        self._E: torch.Tensor | None = None
        found = None
        if A.dtype == torch.float32 and A.device.type == "cpu" and _cpu.extension is not None:
            found = _tridiagonal(A)
        if found is None:
            self.values, self._E = torch.linalg.eigh(A)
        else:
            self.values, self._form = found

    def vectors(self, first: int, last: int) -> torch.Tensor:
        """(d, last − first): orthonormal to rounding, of ``values[first:last]``."""
        if first == last:
            return self._A.new_empty(len(self._A), 0)
        if self._E is None:
            E = self._form.vectors(first, last)
            error = _error(E)
            if error < _NEARLY and self._holds(E, self.values[first:last]):
                return E if error < _ORTHONORMAL else orthonormalised(E)
            self._E = torch.linalg.eigh(self._A.double()).eigenvectors.to(self._A.dtype)
        E = self._E[:, first:last]
        return orthonormalised(E) if E.dtype == torch.float32 else E  # those of LAPACK to 1e-5 only

    def _holds(self, E: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether ``A E = E Λ``, as a few random combinations of the columns tell."""
        random = torch.randn(E.shape[1], _PROBES, generator=torch.Generator().manual_seed(0), dtype=E.dtype)
        combined, scaled = (E @ torch.cat([random, values[:, None] * random], dim=1)).split(_PROBES, dim=1)
        missed = (combined.T @ self._A).T - scaled  # A is symmetric, and MKL slower the other way round
        rounding = len(E) * torch.finfo(E.dtype).eps * self.values.abs().max()
        return bool(missed.norm() <= rounding * random.norm())


def orthonormalised(E: torch.Tensor) -> torch.Tensor:
    """Of nearly orthonormal columns: one Newton step, which squares what they lack."""
    return 1.5 * E - 0.5 * E @ (E.T @ E)


def _error(E: torch.Tensor) -> float:
    """The largest entry of ``EᵀE − I``."""
    gram = E.new_zeros(E.shape[1], E.shape[1])
    covariance_update_(gram, E)
    gram.diagonal().sub_(1)
    return float(gram.abs().max()) if gram.numel() else 0.0


class _Tridiagonal:
    """``A / scale = Q T Qᵀ`` with Q in reflections: in row i of ``rows`` from column i + 1 on, and ``tau`` (d − 1,)."""

    def __init__(self, rows: torch.Tensor, tau: torch.Tensor, diagonal: torch.Tensor, beside: torch.Tensor) -> None:
        self.rows, self.tau, self.diagonal, self.beside = rows, tau, diagonal, beside
        self.values = diagonal

    def find_values(self) -> bool:
        values, beside = self.diagonal.clone(), self.beside.clone()
        found = bool(_cpu.extension.tridiagonal_values(_row(values), _row(beside)))
        self.values = values.sort().values
        return found

    def vectors(self, first: int, last: int) -> torch.Tensor:
        d = len(self.diagonal)
        of_T = self.diagonal.new_empty(last - first, d)
        wanted = self.values[first:last].contiguous()
        views = _row(self.diagonal), _row(self.beside), _row(wanted), _cpu.view(of_T)
        _cpu.extension.tridiagonal_vectors(*views, torch.get_num_threads())
        E = of_T.float()
        _cpu.extension.tridiagonal_reflect(_cpu.view(self.rows), _row(self.tau), _cpu.view(E), torch.get_num_threads())
        return E.T


def _row(t: torch.Tensor) -> _cpu.View:
    return _cpu.view(t[None])


def _tridiagonal(A: torch.Tensor) -> tuple[torch.Tensor, _Tridiagonal] | None:
    """Of A, its values included; None where they are not found."""
    d = len(A)
    scale = max(map(abs, map(float, A.aminmax())))  # without a matrix of magnitudes
    if d < 2 or not scale > 0:
        return None
    rest = A / scale
    form = _Tridiagonal(rest, A.new_zeros(d - 1), A.new_zeros(d, dtype=torch.float64), A.new_zeros(d - 1).double())
    both = A.new_empty(2, _PANEL, d)
    for start in range(0, d, _PANEL):
        size = min(_PANEL, d - start)
        v, w = both[:, :size, : d - start]
        _cpu.extension.tridiagonal_panel(
            _cpu.view(rest[start:, start:]), _cpu.view(v), _cpu.view(w), _row(form.diagonal[start:]),
            _row(form.beside[start:]), _row(form.tau[start:]), torch.get_num_threads(),
        )  # fmt: skip
    if not form.find_values():
        return None
    return (scale * form.values).to(A.dtype), form
