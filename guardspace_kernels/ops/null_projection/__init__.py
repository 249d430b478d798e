"""In-place projection onto the harmful-resistant null space: ``G ← G P`` without ever forming P; AdamW within it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from guardspace_kernels import dispatch
from guardspace_kernels.arguments import shown
from guardspace_kernels.ops import _triton
from guardspace_kernels.ops._library import (
    LIBRARY,
    define,
    forbid_grad,
    overlaps_itself,
    plain_eager,
    require_basis,
    require_dense,
    require_float,
    require_same_device,
    shape,
)
from guardspace_kernels.ops.null_projection import cpu_kernels, cuda_kernels, gpu, reference  # noqa: F401  # the import registers them
from guardspace_kernels.ops.null_projection.reference import Update

__all__ = ["null_project_", "projected_adamw_"]

dispatch.register(
    "null_projection",
    "reference",
    null_project_=reference.null_project_,
    projected_adamw_=reference.projected_adamw_,
)
_triton.register("null_projection", _triton.accepts_written, "null_project_", "projected_adamw_")


def _check(g: torch.Tensor, basis: torch.Tensor, op: str = "null_project_", name: str = "g") -> None:
    require_float(op, **{name: g})
    if g.dim() < 1:
        raise ValueError(f"{op}: {name} must be (..., d), got a scalar")
    require_basis(op, basis, g.shape[-1], name)
    require_same_device(op, name, g, basis=basis)


def _check_list(g: Sequence[torch.Tensor], basis: Sequence[torch.Tensor], complement: Sequence[bool]) -> None:
    if not len(g) == len(basis) == len(complement):
        raise ValueError(
            "null_project_: g, basis and complement must be lists of one length, "
            f"got {len(g)}, {len(basis)} and {len(complement)}"
        )
    for i, (one, its_basis) in enumerate(zip(g, basis, strict=True)):
        _check(one, its_basis, f"null_project_[{i}]")


def _project(g: torch.Tensor, basis: torch.Tensor, complement: bool = True) -> None:
    _check(g, basis)
    dispatch.resolve("null_projection", "null_project_", g, basis)([(g, basis, complement)])


def _project_fake(g: torch.Tensor, basis: torch.Tensor, complement: bool = True) -> None:
    _check(g, basis)


def _project_list(g: Sequence[torch.Tensor], basis: Sequence[torch.Tensor], complement: Sequence[bool]) -> None:
    _check_list(g, basis, complement)
    items = list(zip(g, basis, complement, strict=True))
    dispatch.call_all("null_projection", "null_project_", items, lambda item: item[:2])


def _updates(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    bases: Sequence[torch.Tensor],
    complements: Sequence[bool],
    *settings: float,
) -> list[Update]:
    lists = {
        "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "bases": bases,
        "complements": complements,
    }  # fmt: skip
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"projected_adamw_: {name} must be as many as params, {len(params)}, got {len(values)}")
    if len({id(param) for param in params}) < len(params):
        raise ValueError("projected_adamw_: a matrix occurs twice among params; give each one once")
    _check_settings(*settings)
    updates = [Update(*item, settings) for item in zip(params, *lists.values(), strict=True)]  # type: ignore[call-arg]
    for i, update in enumerate(updates):
        _check_update(f"projected_adamw_[{i}]", update)
    return updates


def _check_settings(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"projected_adamw_: beta1 and beta2 must be in [0, 1), got {beta1} and {beta2}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"projected_adamw_: {name} must be 0 or more, and finite, got {value}")


def _check_update(op: str, u: Update) -> None:
    _check(u.param, u.basis, op, "param")
    require_dense(op, grad=u.grad, exp_avg=u.exp_avg, exp_avg_sq=u.exp_avg_sq, step=u.step)
    for name, t in (("grad", u.grad), ("exp_avg", u.exp_avg), ("exp_avg_sq", u.exp_avg_sq)):
        if t.shape != u.param.shape or t.dtype != u.param.dtype or t.device != u.param.device:
            raise ValueError(
                f"{op}: {name} must be as param, {u.param.dtype} of shape {shape(u.param)} on {u.param.device}, "
                f"got {t.dtype} of shape {shape(t)} on {t.device}"
            )
        if t is not u.grad and (overlap := overlaps_itself(t)):
            raise ValueError(f"{op}: {name}: {overlap}; give it memory of its own")
    if u.step.dim() or u.step.dtype != torch.float32 or u.step.device != u.param.device:
        raise ValueError(
            f"{op}: step must be a 0-d float32 tensor on {u.param.device}, where param is, "
            f"got {u.step.dtype} of shape {shape(u.step)} on {u.step.device}"
        )


def _adamw(*arguments: Any) -> None:
    updates = _updates(*arguments)
    dispatch.call_all("null_projection", "projected_adamw_", updates, lambda update: (update.param, update.basis))


def _adamw_fake(*arguments: Any) -> None:
    _updates(*arguments)


define(
    "null_project_(Tensor(a!) g, Tensor basis, bool complement=True) -> ()",
    _project,
    _project_fake,
)
define(
    "null_project_list_(Tensor(a!)[] g, Tensor[] basis, bool[] complement) -> ()",
    _project_list,
    _check_list,
    keeps_memory=True,
)
define(
    "projected_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor[] steps, Tensor[] bases, bool[] complements, "
    "float lr, float beta1, float beta2, float eps, float weight_decay) -> ()",
    _adamw,
    _adamw_fake,
    keeps_memory=True,
)
_project_op = torch.ops.guardspace.null_project_.default
_project_list_op = torch.ops.guardspace.null_project_list_.default
LIBRARY.impl("null_project_", forbid_grad("null_project_", _project_op), "Autograd")
LIBRARY.impl("null_project_list_", forbid_grad("null_project_", _project_list_op), "Autograd")
_adamw_op = torch.ops.guardspace.projected_adamw_.default
LIBRARY.impl("projected_adamw_", forbid_grad("projected_adamw_", _adamw_op), "Autograd")


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
    if plain_eager():
        if dispatch.direct("null_projection", "null_project_direct", g, basis, complement):
            return
        lists = ([g], [basis]) if isinstance(g, torch.Tensor) else (g, basis)
        if gpu.done_again("null_project_", lists, complement, (0,)):
            return
    if isinstance(g, torch.Tensor):
        if not isinstance(basis, torch.Tensor) or not isinstance(complement, bool):
            raise TypeError(
                "null_project_: with one tensor g, basis must be one tensor and complement one bool, got "
                f"{shown(basis)} and {shown(complement)}"
            )
        _project_op(g, basis, complement)
        return
    if not isinstance(g, Iterable):
        raise TypeError(f"null_project_: g must be a tensor or a list of them, got {type(g).__name__}")
    if isinstance(basis, torch.Tensor) or not isinstance(basis, Iterable):
        got = f"one tensor of shape {shape(basis)}" if isinstance(basis, torch.Tensor) else type(basis).__name__
        raise TypeError(f"null_project_: with a list g, basis must be a list, got {got}")
    g = list(g)
    _project_list_op(g, list(basis), _each("null_project_", "complement", complement, len(g)))


def _each(op: str, name: str, value: bool | Sequence[bool], count: int) -> list[bool]:
    """One bool for each of ``count``; the schema would take None for False, and so the other projector."""
    if isinstance(value, bool):
        return [value] * count
    if not isinstance(value, (list, tuple)) or not set(map(type, value)) <= {bool}:
        raise TypeError(f"{op}: {name} must be True, False or a list of them, got {shown(value)}")
    return list(value)


def projected_adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    bases: Sequence[torch.Tensor],
    complements: bool | Sequence[bool] = True,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW in the null space, in place, for matrices A with gradients G and moments M, V.

    ``G ← G P``, ``M ← β₁ M + (1 − β₁) G``, ``V ← β₂ V + (1 − β₂) G²``, and with t the number of this step
    ``A ← ((1 − lr·λ) A − lr / (1 − β₁ᵗ) · M / (√(V / (1 − β₂ᵗ)) + ε)) P``: the step of ``torch.optim.AdamW`` between
    two projections. P as in :func:`null_project_`. Computed in float32, or in float64 for such matrices.

    Args:
        params: A (..., d) each, float64, float32, float16 or bfloat16, any strides; each matrix once.
        grads: G, only read. exp_avgs, exp_avg_sqs: M and V. All as their params in shape, dtype and device.
        steps: t, counted from one, for each matrix: a 0-d float32 tensor on its device, so that a CUDA graph may
            count. It is only read.
        bases: (d, k) each. complements: one value for all or a list.
        lr, beta1, beta2, eps, weight_decay: as in ``torch.optim.AdamW``, one value for all.

    Raises:
        TypeError, ValueError: a dtype, shape, device, list length or beta that does not fit; a matrix twice.
        RuntimeError: in grad mode, if a param requires grad.
    """
    settings = (lr, beta1, beta2, eps, weight_decay)
    lists = {
        "params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps,
        "bases": bases,
    }  # fmt: skip
    if plain_eager() and set(map(type, settings)) <= {float, int}:
        _check_settings(*settings)
        arguments = (*lists.values(), complements, *settings)
        if dispatch.direct("null_projection", "projected_adamw_direct", *arguments):
            return
        if gpu.done_again("projected_adamw_", tuple(lists.values()), complements, (0, 2, 3), *settings):
            return
    for name, values in lists.items():
        if isinstance(values, (str, torch.Tensor)) or not isinstance(values, Iterable):
            raise TypeError(f"projected_adamw_: {name} must be a list of tensors, got {shown(values)}")
    params = list(params)
    _adamw_op(
        params, list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps), list(bases),
        _each("projected_adamw_", "complements", complements, len(params)), *settings,
    )  # fmt: skip
