"""The null-space projector of one layer as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from guardspace_kernels.ops import null_project_
from guardspace_kernels.ops._library import require_basis


class NullSpaceProjector(nn.Module):
    """Holds a thin orthonormal basis and applies P with it; P itself, (d, d), is never formed.

    ``complement=True``: the basis spans the protected directions, ``P = I − Q Qᵀ``. ``False``: it spans the null
    space, ``P = N Nᵀ``. ``forward(x)`` returns ``x P`` and is differentiable; :meth:`project_` works in place. Casting
    the module to another dtype leaves the basis in its own: rounded to bfloat16 it would leak 1e-3.
    """

    basis: torch.Tensor

    def __init__(self, basis: torch.Tensor, complement: bool = True, persistent: bool = True) -> None:
        super().__init__()
        if basis.dim() != 2:
            raise ValueError(f"basis must be (d, k), got shape {tuple(basis.shape)}")
        require_basis("NullSpaceProjector", basis, basis.shape[0], "basis")
        self.register_buffer("basis", basis.detach(), persistent=persistent)
        self.complement = complement

    @property
    def protected(self) -> int:
        """Dimension of the protected space."""
        d, k = self.basis.shape
        return k if self.complement else d - k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        onto_basis = (x @ self.basis.to(x.dtype)) @ self.basis.to(x.dtype).T
        return x - onto_basis if self.complement else onto_basis

    @torch.no_grad()
    def project_(self, g: torch.Tensor) -> torch.Tensor:
        """``g ← g P`` in place, for g (..., d); returns g. Works on parameters too: it runs under ``no_grad``."""
        null_project_(g, self.basis, self.complement)
        return g

    def extra_repr(self) -> str:
        return f"features={self.basis.shape[0]}, protected={self.protected}"

    def _apply(self, fn: Any, recurse: bool = True) -> NullSpaceProjector:
        basis = self.basis
        super()._apply(fn, recurse)
        if self.basis.dtype != basis.dtype:
            self.basis = basis.to(self.basis.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The number of columns is data, not architecture: a file's basis replaces ours, in whichever form it is.
        saved = state_dict.get(prefix + "basis")
        if saved is not None and saved.dim() == 2 and saved.shape[0] == self.basis.shape[0]:
            self.basis = self.basis.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.complement)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.complement = bool(state)
