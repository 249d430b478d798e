"""Null-space projection, and AdamW between two of them, by the CUDA kernels: a few launches for all matrices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from guardspace_kernels.ops import _cuda
from guardspace_kernels.ops._cuda import call, dtype_of, packed, workspace
from guardspace_kernels.ops._library import unit_inner
from guardspace_kernels.ops.null_projection import gpu
from guardspace_kernels.ops.null_projection.gpu import Item
from guardspace_kernels.ops.null_projection.reference import Update

accepts = _cuda.accepts_written


def _call(name: str, items: list[tuple[Any, ...]], device: torch.device, *settings: float) -> None:
    arguments = packed(items), len(items)
    sums = workspace(f"{name}_workspace", device, *arguments)
    call(name, device, *arguments, *settings, sums.data_ptr(), sums.nbytes)


def project(items: Sequence[Item]) -> None:
    """``out ← g P`` for matrices g, out (r, d) whose rows are contiguous, and a basis (d, k) of any dtype."""
    if not items:
        return
    bases = [unit_inner(basis.float()) for _, _, basis, _ in items]
    fields = [
        (out, g, basis, *g.shape, basis.shape[1], out.stride(0), g.stride(0), basis.stride(0), dtype_of(out),
         dtype_of(g), complement)
        for (g, out, _, complement), basis in zip(items, bases, strict=True)
    ]  # fmt: skip
    _call("null_project", fields, items[0][0].device)


def _step(updates: list[Update], flats: list[list[torch.Tensor]]) -> None:
    bases = [unit_inner(u.basis.float()) for u in updates]
    fields = [
        (*flat, u.step, basis, *flat[0].shape, basis.shape[1], *(t.stride(0) for t in (*flat, basis)),
         dtype_of(flat[0]), u.complement)
        for u, flat, basis in zip(updates, flats, bases, strict=True)
    ]  # fmt: skip
    _call("projected_adamw", fields, updates[0].param.device, *updates[0].settings)


null_project_ = partial(gpu.null_project_, project)
projected_adamw_ = partial(gpu.projected_adamw_, _step)

_cuda.register("null_projection", accepts, null_project_=null_project_, projected_adamw_=projected_adamw_)
