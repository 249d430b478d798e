"""Covariance accumulation by the CUDA kernels: tiles on and below the diagonal only, all pairs in a few launches."""

from __future__ import annotations

import torch

from guardspace_kernels.ops import _cuda
from guardspace_kernels.ops._cuda import call, dtype_of, packed, workspace
from guardspace_kernels.ops._library import rows, unit_inner, written
from guardspace_kernels.ops.covariance.reference import Update, squared_drift

accepts = _cuda.accepts_written


def covariance_update_(updates: list[Update]) -> None:
    accumulators, scales = {C.data_ptr() for C, *_ in updates}, {scale for *_, scale in updates}
    if len(accumulators) < len(updates) or len(scales) > 1:  # one accumulator twice: one after the other
        for update in updates:
            covariance_update_([update])
        return
    items, copies, alive = [], [], []
    for C, x, mask, _ in updates:
        x, direct = unit_inner(rows(x)), unit_inner(C)
        if mask is not None:
            mask = (mask if mask.dtype == torch.bool else mask != 0).reshape(-1).contiguous()
        items.append((direct, x, mask, *x.shape, direct.stride(0), x.stride(0), dtype_of(x)))
        copies.append(direct)
        alive += [x, mask]
    device, arguments = updates[0][0].device, (packed(items), len(items))
    sums = workspace("covariance_workspace", device, *arguments)
    call("covariance_update", device, *arguments, scales.pop(), sums.data_ptr(), sums.nbytes)
    for (C, *_), direct in zip(updates, copies, strict=True):
        if direct is not C:
            C.copy_(direct)
    written(*(C for C, *_ in updates))


def symmetrize_(covariance: torch.Tensor) -> None:
    C = unit_inner(covariance)
    call("symmetrize", C.device, C.data_ptr(), C.shape[0], C.stride(0))
    if C is not covariance:
        covariance.copy_(C)
    written(covariance)


_cuda.register(
    "covariance",
    accepts,
    covariance_update_=covariance_update_,
    symmetrize_=symmetrize_,
    squared_drift=squared_drift,
)
