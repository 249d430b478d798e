"""Streaming covariance accumulation: the lower triangle of ``C += scale · Xᵀ diag(mask) X``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from guardspace_kernels import dispatch
from guardspace_kernels.arguments import shown
from guardspace_kernels.ops import _triton
from guardspace_kernels.ops._library import (
    LIBRARY,
    define,
    forbid_grad,
    plain_eager,
    require_dense,
    require_float,
    require_same_device,
    shape,
    without_grad,
)
from guardspace_kernels.ops.covariance import cpu_kernels, cuda_kernels, reference  # noqa: F401  # the import registers them

__all__ = ["covariance_update_", "squared_drift", "symmetrize_"]

dispatch.register(
    "covariance",
    "reference",
    covariance_update_=reference.covariance_update_,
    symmetrize_=reference.symmetrize_,
    squared_drift=reference.squared_drift,
)
_triton.register("covariance", _triton.accepts_written, "covariance_update_", "symmetrize_", "squared_drift")


def _check_covariance(op: str, covariance: torch.Tensor) -> None:
    require_dense(op, covariance=covariance)
    if covariance.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: covariance must be float32 or float64, got {covariance.dtype}")
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"{op}: covariance must be square (d, d), got shape {shape(covariance)}")


def _check_update(covariance: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, where: str = "") -> None:
    op = "covariance_update_" + where
    _check_covariance(op, covariance)
    require_float(op, x=x)
    if x.dim() < 1 or x.shape[-1] != covariance.shape[0]:
        raise ValueError(
            f"{op}: x must be (..., d) with d = {covariance.shape[0]} (covariance is {shape(covariance)}), "
            f"got shape {shape(x)}"
        )
    if mask is not None:
        require_dense(op, mask=mask)
        if mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise TypeError(f"{op}: mask must be boolean or integer (non-zero = counted), got {mask.dtype}")
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{op}: mask must have the shape of x without its last dimension, {shape(x)[:-1]}, got {shape(mask)}"
            )
    require_same_device(op, "covariance", covariance, x=x, mask=mask)


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"covariance_update_: scale must be finite, got {scale}")


def _update(covariance: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> None:
    _check_update(covariance, x, mask)
    _check_scale(scale)
    dispatch.resolve("covariance", "covariance_update_", covariance, x, mask)([(covariance, x, mask, scale)])


def _update_fake(
    covariance: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0
) -> None:
    _check_update(covariance, x, mask)


def _check_update_list(
    covariance: Sequence[torch.Tensor],
    x: Sequence[torch.Tensor],
    mask: Sequence[torch.Tensor | None],
    scale: float = 1.0,
) -> None:
    if not len(covariance) == len(x) == len(mask):
        raise ValueError(
            "covariance_update_: covariance, x and mask must be lists of one length, "
            f"got {len(covariance)}, {len(x)} and {len(mask)}"
        )
    for i, arguments in enumerate(zip(covariance, x, mask, strict=True)):
        _check_update(*arguments, f"[{i}]")


def _update_list(
    covariance: Sequence[torch.Tensor],
    x: Sequence[torch.Tensor],
    mask: Sequence[torch.Tensor | None],
    scale: float = 1.0,
) -> None:
    _check_update_list(covariance, x, mask, scale)
    _check_scale(scale)
    items = [(*arguments, scale) for arguments in zip(covariance, x, mask, strict=True)]
    dispatch.call_all("covariance", "covariance_update_", items, lambda item: item[:3])


def _check_squared_drift(covariance: torch.Tensor, F: torch.Tensor, G: torch.Tensor) -> None:
    op = "squared_drift"
    _check_covariance(op, covariance)
    require_float(op, F=F, G=G)
    if G.dim() != 2 or G.shape[1] != covariance.shape[0]:
        raise ValueError(
            f"{op}: G must be (r, d) with d = {covariance.shape[0]} (covariance is {shape(covariance)}), got {shape(G)}"
        )
    if F.dim() != 2 or F.shape[1] != G.shape[0]:
        raise ValueError(f"{op}: F must be (d_out, r) with r = {G.shape[0]} (G is {shape(G)}), got {shape(F)}")
    require_same_device(op, "covariance", covariance, F=F, G=G)


def _squared_drift(covariance: torch.Tensor, F: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    _check_squared_drift(covariance, F, G)
    return dispatch.resolve("covariance", "squared_drift", covariance, F, G)(covariance, F, G)


def _squared_drift_fake(covariance: torch.Tensor, F: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    _check_squared_drift(covariance, F, G)
    return covariance.new_empty((), dtype=torch.float64)


def _symmetrize(covariance: torch.Tensor) -> None:
    _check_covariance("symmetrize_", covariance)
    dispatch.resolve("covariance", "symmetrize_", covariance)(covariance)


def _symmetrize_fake(covariance: torch.Tensor) -> None:
    _check_covariance("symmetrize_", covariance)


define(
    "covariance_update_(Tensor(a!) covariance, Tensor x, Tensor? mask=None, float scale=1.0) -> ()",
    _update,
    _update_fake,
)
define(
    "covariance_update_list_(Tensor(a!)[] covariance, Tensor[] x, Tensor?[] mask, float scale=1.0) -> ()",
    _update_list,
    _check_update_list,
    keeps_memory=True,
)
define("symmetrize_(Tensor(a!) covariance) -> ()", _symmetrize, _symmetrize_fake)
define("squared_drift(Tensor covariance, Tensor F, Tensor G) -> Tensor", _squared_drift, _squared_drift_fake)
_update_op = torch.ops.guardspace.covariance_update_.default
_update_list_op = torch.ops.guardspace.covariance_update_list_.default
_symmetrize_op = torch.ops.guardspace.symmetrize_.default
LIBRARY.impl("covariance_update_", forbid_grad("covariance_update_", _update_op), "Autograd")
LIBRARY.impl("covariance_update_list_", forbid_grad("covariance_update_", _update_list_op), "Autograd")
_squared_drift_op = torch.ops.guardspace.squared_drift.default
LIBRARY.impl("squared_drift", without_grad(_squared_drift_op), "Autograd")
LIBRARY.impl("symmetrize_", forbid_grad("symmetrize_", _symmetrize_op), "Autograd")


def covariance_update_(
    covariance: torch.Tensor | Sequence[torch.Tensor],
    x: torch.Tensor | Sequence[torch.Tensor],
    mask: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    scale: float = 1.0,
) -> None:
    """Adds one batch of activations to a covariance, in place: the lower triangle of ``C += scale · Xᵀ diag(mask) X``.

    X is ``x`` flattened to (T, d). As with BLAS ``syrk`` only the lower triangle (diagonal included) is written;
    call :func:`symmetrize_` once before reading C as a whole. Products and sums are formed in the wider of the two
    dtypes and at least float32, whatever ``torch.set_float32_matmul_precision`` says. The op never waits for the
    device, so it does not look for non-finite values; rows with a zero mask contribute nothing even when they hold
    NaN or Inf. Sums that overflow, from entries of 1e19 on in float32 and of 1e154 in float64, become infinite and stay
    so; the diagonal tells, and whoever reads C must look, as :meth:`CovarianceAccumulator.covariance` does.

    Args:
        covariance: (d, d), float32 or float64; written in place. Or a list of them, of any widths, that do not overlap:
            one call for many layers keeps every thread busy.
        x: (..., d), float64, float32, float16 or bfloat16; any strides; may be empty. No gradient flows to it. For a
            list of covariances, a list of the same length.
        mask: (...), boolean or integer, the shape of ``x`` without its last dimension; non-zero rows count. For a
            list, a list whose entries may be None, or None.
        scale: factor of the whole update.

    Raises:
        TypeError: a dtype other than the above, or a list beside a tensor. ValueError: a shape, device or list length
            that does not fit.
        RuntimeError: ``covariance`` requires grad in grad mode.

    Source: the accumulation of activations' second moments in GuardSpace (arXiv 2510.14301) and CorDA.
    """
    if plain_eager() and dispatch.direct("covariance", "covariance_update_direct", covariance, x, mask, scale):
        return
    if isinstance(covariance, torch.Tensor):
        if not isinstance(x, torch.Tensor) or not (mask is None or isinstance(mask, torch.Tensor)):
            raise TypeError(
                "covariance_update_: with one covariance, x must be one tensor and mask a tensor or None, got "
                f"{shown(x)} and {shown(mask)}"
            )
        _update_op(covariance, x, mask, scale)
        return
    if not isinstance(covariance, Iterable):
        got = type(covariance).__name__
        raise TypeError(f"covariance_update_: covariance must be a tensor or a list of them, got {got}")
    if any(isinstance(t, torch.Tensor) or not isinstance(t, Iterable) for t in (x, [] if mask is None else mask)):
        raise TypeError("covariance_update_: with a list of covariances, x and mask must be lists too")
    _update_list_op(list(covariance), list(x), [None] * len(x) if mask is None else list(mask), scale)


def squared_drift(covariance: torch.Tensor, F: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """How far a low-rank change ``ΔW = F G`` moves a layer's outputs: ``‖F G X‖_F² = Σ (FᵀF) ∘ (G C Gᵀ)``, in float64.

    ΔW is never formed, and of C = Xᵀ X only the lower triangle is read.

    Args:
        covariance: C (d, d), float32 or float64.
        F, G: (d_out, r) and (r, d), any float dtype.

    Returns:
        A 0-dimensional float64 tensor; no gradient flows through it.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit.

    Source: GuardSpace's null-space condition (arXiv 2510.14301), turned into a number.
    """
    return _squared_drift_op(covariance, F, G)


def symmetrize_(covariance: torch.Tensor) -> None:
    """Mirrors the lower triangle of a (d, d) float32 or float64 tensor into its upper one, in place.

    Raises:
        TypeError, ValueError: not a square float32 or float64 tensor. RuntimeError: it requires grad in grad mode.
    """
    _symmetrize_op(covariance)
