"""Null-space projection by the C++ kernels: all pairs in one call, the basis read once, r × k temporaries."""

from __future__ import annotations

from typing import Any

import torch

from guardspace_kernels.ops._cpu import READS_TENSORS, accepts_written, extension, register, view
from guardspace_kernels.ops._library import compute_dtype, rows, written
from guardspace_kernels.ops.null_projection import reference
from guardspace_kernels.ops.null_projection.reference import Projection, Update


def accepts(g: torch.Tensor, basis: torch.Tensor) -> tuple[bool, str]:
    if basis.dtype != compute_dtype(g.dtype, basis.dtype):
        return False, f"basis is {basis.dtype}; the C++ kernels read it in place, in {compute_dtype(g.dtype)}"
    return accepts_written(g, basis)


def null_project_(projections: list[Projection]) -> None:
    if len({g.data_ptr() for g, *_ in projections}) < len(projections):  # one matrix twice: one after the other
        for projection in projections:
            null_project_([projection])
        return
    items, copies = [], []
    for g, basis, complement in projections:
        flat = rows(g)
        items.append((view(flat), view(flat), view(basis), complement))
        copies.append(flat)
    extension.null_project(items, torch.get_num_threads())
    written(*(g for g, *_ in projections))
    for (g, _, _), flat in zip(projections, copies, strict=True):
        if flat.data_ptr() != g.data_ptr():
            g.copy_(flat.view(g.shape))


def null_project_direct(g: Any, basis: Any, complement: Any) -> bool:
    """One call into C++ for a matrix or all of a list, whose sizes, strides, dtypes and devices it reads and checks."""
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    if not extension.null_project_tensors(g, basis, complement, grad, threads):
        return False
    written(*((g,) if isinstance(g, torch.Tensor) else g))
    return True


def projected_adamw_direct(
    params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, steps: Any, bases: Any, complements: Any, *settings: float
) -> bool:
    """Projections of all gradients, PyTorch's fused AdamW and projections of all matrices: a call each.

    For float32 and float64: in 16 bits gradients would be rounded once more than in :func:`projected_adamw_`.
    """
    lists = [params, grads, exp_avgs, exp_avg_sqs, steps]
    if not all(isinstance(values, (list, tuple)) and values for values in lists):
        return False
    if not extension.adamw_tensors_fit(lists, torch.is_grad_enabled()):
        return False
    lr, beta1, beta2, eps, weight_decay = settings
    with torch.no_grad():
        gradients = torch._foreach_mul(grads, 1.0)
        if not null_project_direct(gradients, bases, complements):
            return False
        torch._fused_adamw_(
            params, gradients, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, maximize=False, lr=lr, beta1=beta1,
            beta2=beta2, eps=eps, weight_decay=weight_decay,
        )  # fmt: skip
        written(*exp_avgs, *exp_avg_sqs)
        return null_project_direct(params, bases, complements)


def project_into(out: torch.Tensor, g: torch.Tensor, basis: torch.Tensor, complement: bool) -> None:
    """``out ← g P`` (r, d), each in its own dtype."""
    if READS_TENSORS:
        extension.project(out, g, basis, complement, torch.get_num_threads())
    else:
        extension.project(view(out), view(g), view(basis), complement, torch.get_num_threads())


def projected_adamw_(updates: list[Update]) -> None:
    reference.projected_adamw_(updates, null_project_)


register(
    "null_projection",
    accepts,
    null_project_=null_project_,
    null_project_direct=null_project_direct,
    projected_adamw_=projected_adamw_,
    projected_adamw_direct=projected_adamw_direct,
)
