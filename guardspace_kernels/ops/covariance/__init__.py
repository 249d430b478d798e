"""Streaming covariance accumulation: the lower triangle of ``C += scale · Xᵀ diag(mask) X``."""

from __future__ import annotations

import torch

from guardspace_kernels import dispatch
from guardspace_kernels.ops._library import (
    LIBRARY,
    define,
    forbid_grad,
    require_float,
    require_same_device,
    shape,
)
from guardspace_kernels.ops.covariance import reference

__all__ = ["covariance_update_", "symmetrize_"]

dispatch.register(
    "covariance",
    "reference",
    covariance_update_=reference.covariance_update_,
    symmetrize_=reference.symmetrize_,
)


def _check_covariance(op: str, covariance: torch.Tensor) -> None:
    if covariance.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: covariance must be float32 or float64, got {covariance.dtype}")
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"{op}: covariance must be square (d, d), got shape {shape(covariance)}")


def _check_update(covariance: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None) -> None:
    op = "covariance_update_"
    _check_covariance(op, covariance)
    require_float(op, x=x)
    if x.dim() < 1 or x.shape[-1] != covariance.shape[0]:
        raise ValueError(
            f"{op}: x must be (..., d) with d = {covariance.shape[0]} (covariance is {shape(covariance)}), "
            f"got shape {shape(x)}"
        )
    if mask is not None:
        if mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise TypeError(f"{op}: mask must be boolean or integer (non-zero = counted), got {mask.dtype}")
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{op}: mask must have the shape of x without its last dimension, {shape(x)[:-1]}, got {shape(mask)}"
            )
    require_same_device(op, "covariance", covariance, x=x, mask=mask)


def _update(covariance: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> None:
    _check_update(covariance, x, mask)
    dispatch.resolve("covariance", "covariance_update_", covariance, x, mask)(covariance, x, mask, scale)


def _update_fake(
    covariance: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0
) -> None:
    _check_update(covariance, x, mask)


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
define("symmetrize_(Tensor(a!) covariance) -> ()", _symmetrize, _symmetrize_fake)
_update_op = torch.ops.guardspace.covariance_update_.default
_symmetrize_op = torch.ops.guardspace.symmetrize_.default
LIBRARY.impl("covariance_update_", forbid_grad("covariance_update_", _update_op), "Autograd")
LIBRARY.impl("symmetrize_", forbid_grad("symmetrize_", _symmetrize_op), "Autograd")


def covariance_update_(
    covariance: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0
) -> None:
    """Adds one batch of activations to a covariance, in place: the lower triangle of ``C += scale · Xᵀ diag(mask) X``.

    X is ``x`` flattened to (T, d). As with BLAS ``syrk`` only the lower triangle (diagonal included) is written;
    call :func:`symmetrize_` once before reading C as a whole. Products and sums are formed in the wider of the two
    dtypes and at least float32, whatever ``torch.set_float32_matmul_precision`` says. The op never waits for the
    device, so it does not look for non-finite values; rows with a zero mask contribute nothing even when they hold
    NaN or Inf.

    Args:
        covariance: (d, d), float32 or float64; written in place.
        x: (..., d), float64, float32, float16 or bfloat16; any strides; may be empty. No gradient flows to it.
        mask: (...), boolean or integer, the shape of ``x`` without its last dimension; non-zero rows count.
        scale: factor of the whole update.

    Raises:
        TypeError: a dtype other than the above. ValueError: a shape or device that does not fit.
        RuntimeError: ``covariance`` requires grad in grad mode.

    Source: the accumulation of activations' second moments in GuardSpace (arXiv 2510.14301) and CorDA.
    """
    _update_op(covariance, x, mask, scale)


def symmetrize_(covariance: torch.Tensor) -> None:
    """Mirrors the lower triangle of a (d, d) float32 or float64 tensor into its upper one, in place.

    Raises:
        TypeError, ValueError: not a square float32 or float64 tensor. RuntimeError: it requires grad in grad mode.
    """
    _symmetrize_op(covariance)
