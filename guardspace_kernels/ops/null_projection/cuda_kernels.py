"""Null-space projection, and AdamW between two of them, by the CUDA kernels: a few launches for all matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from guardspace_kernels.ops import _cuda
from guardspace_kernels.ops._cuda import call, dtype_of, packed, workspace_size
from guardspace_kernels.ops.null_projection import gpu
from guardspace_kernels.ops.null_projection.gpu import Item, as_read
from guardspace_kernels.ops.null_projection.reference import Update

accepts = _cuda.accepts_written


def _call(name: str, items: list[tuple[Any, ...]], device: torch.device, *settings: float) -> Callable[..., None]:
    """Calls the function of that name, and gives what calls it again with other settings."""
    arguments = packed(items), len(items)
    size = workspace_size(f"{name}_workspace", *arguments)

    def again(*settings: float) -> None:
        sums = torch.empty(size, dtype=torch.float32, device=device)
        call(name, device, *arguments, *settings, sums.data_ptr(), sums.nbytes)

    again(*settings)
    return again


def project(items: Sequence[Item]) -> Callable[..., None] | None:
    """``out ← g P`` for matrices g, out (r, d) whose rows are contiguous, and a basis (d, k) of any dtype.

    Returns what does it again for the same addresses.
    """
    if not items:
        return None
    items = [(g, out, as_read(basis), complement) for g, out, basis, complement in items]
    fields = [
        (out, g, basis, *g.shape, basis.shape[1], out.stride(0), g.stride(0), basis.stride(0), dtype_of(out),
         dtype_of(g), complement)
        for g, out, basis, complement in items
    ]  # fmt: skip
    return _call("null_project", fields, items[0][0].device)


def _step(updates: list[Update], flats: list[list[torch.Tensor]]) -> Callable[..., None]:
    fields = [
        (*flat, u.step, u.basis, *flat[0].shape, u.basis.shape[1], *(t.stride(0) for t in (*flat, u.basis)),
         dtype_of(flat[0]), u.complement)
        for u, flat in zip(updates, flats, strict=True)
    ]  # fmt: skip
    return _call("projected_adamw", fields, updates[0].param.device, *updates[0].settings)


null_project_ = partial(gpu.null_project_, project)
projected_adamw_ = partial(gpu.projected_adamw_, _step)

_cuda.register("null_projection", accepts, null_project_=null_project_, projected_adamw_=projected_adamw_)
