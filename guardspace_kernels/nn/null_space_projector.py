"""The null-space projector of one layer as a module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from guardspace_kernels.arguments import boolean, instance, shown
from guardspace_kernels.ops import null_project_
from guardspace_kernels.ops._library import compute_dtype, full_float32_products, require_basis

#: max |QᵀQ z − z| that is taken for rounding, with a wide margin: eigenvectors in float32 reach 1e-5.
ORTHONORMAL = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}
_PROBES = 8

#: The name of the form in a state dict.
FORM = nn.modules.module._EXTRA_STATE_KEY_SUFFIX


def orthonormal_error(basis: torch.Tensor) -> float:
    """max |QᵀQ z − z| over random signs z, which sees every wrong column; NaN if the basis (d, k) is not finite."""
    basis = basis.detach().to(compute_dtype(basis.dtype))
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "big"))  # nobody can prepare for it
    z = torch.randint(2, (basis.shape[1], _PROBES), generator=generator, device="cpu").to(basis) * 2 - 1
    with full_float32_products():
        error = basis.T @ (basis @ z) - z
    return float(error.abs().max()) if error.numel() else 0.0


def is_orthonormal(basis: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the columns of a basis are, up to what rounding to ``dtype``, by default its own, leaves."""
    return orthonormal_error(basis) <= ORTHONORMAL[dtype or basis.dtype]


def refuse_state(module: nn.Module, problems: list[str]) -> None:
    """RuntimeError with the problems, if there are any, before anything is loaded."""
    if problems:
        raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {type(module).__name__}:", *problems]))


class NullSpaceProjector(nn.Module):
    """Holds a thin orthonormal basis and applies P with it; P itself, (d, d), is never formed.

    ``complement=True``: the basis spans the protected directions, ``P = I − Q Qᵀ``. ``False``: it spans the null
    space, ``P = N Nᵀ``. ``forward(x)`` returns ``x P`` and is differentiable; :meth:`project_` works in place. Casting
    the module to another dtype leaves the basis in its own: rounded to bfloat16 it would leak 1e-3.

    A state dict brings basis and form together, whatever the number of columns; one whose basis is not orthonormal, or
    one without the other, is refused before anything is loaded.

    Args:
        basis: (d, k), k <= d, float64, float32, float16 or bfloat16, orthonormal columns.
        complement: which of the two forms. persistent: whether the basis is part of state dicts.

    Raises:
        TypeError, ValueError: a basis of another shape or dtype, not finite, or not orthonormal.
    """

    basis: torch.Tensor

    def __init__(self, basis: torch.Tensor, complement: bool = True, persistent: bool = True) -> None:
        super().__init__()
        instance("basis", basis, torch.Tensor, "a tensor (d, k)")
        complement, persistent = boolean("complement", complement), boolean("persistent", persistent)
        if basis.dim() != 2:
            raise ValueError(f"basis must be (d, k), got shape {tuple(basis.shape)}")
        require_basis("NullSpaceProjector", basis, basis.shape[0], "basis")
        if not basis.is_meta and not is_orthonormal(basis):
            raise ValueError(
                f"NullSpaceProjector: basis {tuple(basis.shape)} must be finite with orthonormal columns, got max "
                f"|QᵀQ z − z| = {orthonormal_error(basis):.1e}; take torch.linalg.qr(basis).Q of independent columns"
            )
        self.register_buffer("basis", basis.detach(), persistent=persistent)
        self.complement = complement

    @property
    def protected(self) -> int:
        """Dimension of the protected space."""
        d, k = self.basis.shape
        return k if self.complement else d - k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x P`` (..., d) in the dtype of x, formed in the wider of its and the basis's, under autocast too."""
        if not isinstance(x, torch.Tensor) or x.dim() < 1 or x.shape[-1] != self.basis.shape[0]:
            raise ValueError(f"x must be a tensor (..., d) with d = {self.basis.shape[0]}, got {shown(x)}")
        dtype = torch.promote_types(x.dtype, self.basis.dtype)
        with torch.autocast(x.device.type, enabled=False):
            wide, basis = x.to(dtype), self.basis.to(dtype)
            onto_basis = (wide @ basis) @ basis.T
            return (wide - onto_basis if self.complement else onto_basis).to(x.dtype)

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

    def state_problems(self, state: Mapping[str, Any], prefix: str = "") -> list[str]:
        """Why what ``state`` holds under ``prefix`` is not loaded; nothing is changed."""
        name, form_name = f"{prefix}basis", f"{prefix}{FORM}"
        basis, form, kept = state.get(name), state.get(form_name), self.basis
        if form is not None and not _is_flag(form):
            return [f"{form_name} must be one boolean, whether the basis spans the protected directions, got {form!r}"]
        if "basis" in self._non_persistent_buffers_set:
            same = form is None or bool(form) == self.complement
            return [] if same else [f"{form_name}: the state is of the other form, and this projector keeps its basis"]
        if basis is None and form is None:
            return []
        if basis is None or form is None:
            return [f"{name} and {form_name}, its form, are loaded together, got one of them"]
        if not isinstance(basis, torch.Tensor) or basis.dtype not in ORTHONORMAL:
            return [f"{name} must be a floating-point tensor, got {getattr(basis, 'dtype', type(basis).__name__)}"]
        d, k = kept.shape
        if basis.dim() != 2 or basis.shape[0] != d or basis.shape[1] > d:
            return [
                f"size mismatch for {name}: saved with shape {tuple(basis.shape)}, ours is {(d, k)}, up to {d} columns"
            ]
        if not basis.is_meta and not is_orthonormal(basis, kept.dtype):
            off = orthonormal_error(basis)
            return [
                f"{name} is not orthonormal (max |QᵀQ z − z| = {off:.1e}): altered, not finite, or rounded when saved"
            ]
        return []

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        refuse_state(self, self.state_problems(state_dict, prefix))
        basis = state_dict.get(f"{prefix}basis")
        if basis is not None and "basis" not in self._non_persistent_buffers_set:
            # The number of columns is data, not architecture: a file's basis replaces ours, in whichever form it is.
            self.basis = basis.detach().to(self.basis, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.complement)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.complement = bool(state)


def _is_flag(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.numel() == 1 and not value.is_meta
