"""In-place projection onto the harmful-resistant null space: ``G ← G P`` without ever forming P."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from guardspace_kernels import dispatch
from guardspace_kernels.ops import _triton
from guardspace_kernels.ops._library import (
    LIBRARY,
    define,
    forbid_grad,
    require_basis,
    require_float,
    require_same_device,
    shape,
)
from guardspace_kernels.ops.null_projection import cpu_kernels, reference  # noqa: F401  # the import registers them

__all__ = ["null_project_"]

dispatch.register("null_projection", "reference", null_project_=reference.null_project_)
_triton.register("null_projection", _triton.accepts_written, "null_project_")


def _check(g: torch.Tensor, basis: torch.Tensor, where: str = "") -> None:
    op = "null_project_" + where
    require_float(op, g=g)
    if g.dim() < 1:
        raise ValueError(f"{op}: g must be (..., d), got a scalar")
    require_basis(op, basis, g.shape[-1], "g")
    require_same_device(op, "g", g, basis=basis)


def _check_list(g: Sequence[torch.Tensor], basis: Sequence[torch.Tensor], complement: Sequence[bool]) -> None:
    if not len(g) == len(basis) == len(complement):
        raise ValueError(
            "null_project_: g, basis and complement must be lists of one length, "
            f"got {len(g)}, {len(basis)} and {len(complement)}"
        )
    for i, (one, its_basis) in enumerate(zip(g, basis, strict=True)):
        _check(one, its_basis, f"[{i}]")


def _project(g: torch.Tensor, basis: torch.Tensor, complement: bool = True) -> None:
    _check(g, basis)
    dispatch.resolve("null_projection", "null_project_", g, basis)([(g, basis, complement)])


def _project_fake(g: torch.Tensor, basis: torch.Tensor, complement: bool = True) -> None:
    _check(g, basis)


def _project_list(g: Sequence[torch.Tensor], basis: Sequence[torch.Tensor], complement: Sequence[bool]) -> None:
    _check_list(g, basis, complement)
    items = list(zip(g, basis, complement, strict=True))
    dispatch.call_all("null_projection", "null_project_", items, lambda item: item[:2])


define(
    "null_project_(Tensor(a!) g, Tensor basis, bool complement=True) -> ()",
    _project,
    _project_fake,
)
define(
    "null_project_list_(Tensor(a!)[] g, Tensor[] basis, bool[] complement) -> ()",
    _project_list,
    _check_list,
)
_project_op = torch.ops.guardspace.null_project_.default
_project_list_op = torch.ops.guardspace.null_project_list_.default
LIBRARY.impl("null_project_", forbid_grad("null_project_", _project_op), "Autograd")
LIBRARY.impl("null_project_list_", forbid_grad("null_project_", _project_list_op), "Autograd")


def null_project_(
    g: torch.Tensor | Sequence[torch.Tensor],
    basis: torch.Tensor | Sequence[torch.Tensor],
    complement: bool | Sequence[bool] = True,
) -> None:
    """Projects gradients or adapter matrices onto the null space, in place.

    ``complement=True``: ``G ← G − (G Q) Qᵀ`` with ``basis`` = Q, an orthonormal basis of the *protected* directions.
    ``complement=False``: ``G ← (G N) Nᵀ`` with ``basis`` = N, an orthonormal basis of the null space itself.
    Computed in the wider of the two dtypes and at least float32, then rounded once to the dtype of G.

    Projecting only the gradient does not keep an Adam-trained matrix in the null space: project the matrix after the
    step as well (:func:`guardspace_kernels.guard_optimizer` does both).

    Args:
        g: (..., d), float64, float32, float16 or bfloat16, any strides; or a list of such tensors.
        basis: (d, k), k <= d, orthonormal columns; for a list of g, a list of the same length.
        complement: which of the two forms; for a list of g, one value for all or a list.

    Raises:
        TypeError, ValueError: a dtype, shape, device or list length that does not fit.
        RuntimeError: in grad mode, if a g requires grad (a leaf parameter, for instance).

    Source: the null-space projector of GuardSpace (arXiv 2510.14301), applied as in gradient projection methods.
    """
    if isinstance(g, torch.Tensor):
        if not isinstance(basis, torch.Tensor) or not isinstance(complement, bool):
            raise TypeError("null_project_: with one tensor g, basis must be one tensor and complement one bool")
        _project_op(g, basis, complement)
        return
    if isinstance(basis, torch.Tensor):
        raise TypeError(f"null_project_: with a list g, basis must be a list, got one tensor of shape {shape(basis)}")
    complements = [complement] * len(g) if isinstance(complement, bool) else list(complement)
    _project_list_op(list(g), list(basis), complements)
