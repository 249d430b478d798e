"""Null-space projection by Triton: two launches for all matrices, whatever their number, and r × k temporaries.

The first forms ``H = G basis``, the second ``G − H basisᵀ`` or ``H basisᵀ``; each reads every basis once. H comes in
as many parts as there are slices of d, whose sum has one order: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from guardspace_kernels.ops._library import rows, written
from guardspace_kernels.ops._triton_launch import choose, launch_items, locate, unit_inner
from guardspace_kernels.ops.null_projection.reference import Projection

#: (g, out, basis, complement): out ← g P
Item = tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]


@triton.jit
def onto_basis(
    G, BASIS, r, d, k, stride_g, stride_b, h, TABLE, n, H,
    GROUPED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``H[slice] = G[:, slice] basis[slice]``, (r, k) for each slice of d, from ``H + h`` on."""
    pid = tl.program_id(0)
    if GROUPED:
        item = locate(TABLE, n, pid, 9)
        G, BASIS = tl.load(item).to(G.dtype), tl.load(item + 1).to(BASIS.dtype)
        r, d, k = tl.load(item + 2).to(tl.int32), tl.load(item + 3).to(tl.int32), tl.load(item + 4).to(tl.int32)
        stride_g, stride_b, h = tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)
        pid -= tl.load(item + 8).to(tl.int32)
        if ALIGNED:
            G, BASIS, h = tl.multiple_of(G, 16), tl.multiple_of(BASIS, 16), tl.multiple_of(h, 16)
            d, k = tl.multiple_of(d, 16), tl.multiple_of(k, 16)
            stride_g, stride_b = tl.multiple_of(stride_g, 16), tl.multiple_of(stride_b, 16)
    blocks_k = tl.cdiv(k, BLOCK_K)
    part = pid % SLICES
    i = (pid // SLICES // blocks_k) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    j = (pid // SLICES % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(part * BLOCK_D, d, SLICES * BLOCK_D):
        m = start + tl.arange(0, BLOCK_D)
        g = tl.load(G + i.to(tl.int64) * stride_g + m, mask=(i < r) & (m < d), other=0.0)
        b = tl.load(BASIS + m[:, None].to(tl.int64) * stride_b + j, mask=(m[:, None] < d) & (j < k), other=0.0)
        total = tl.dot(g.to(tl.float32), b, total, input_precision=PRECISION)
    tl.store(H + h + (part * r + i).to(tl.int64) * k + j, total, mask=(i < r) & (j < k))


@triton.jit
def from_basis(
    G, OUT, BASIS, r, d, k, stride_g, stride_out, stride_b, complement, h, TABLE, n, H,
    GROUPED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``OUT = G − H basisᵀ``, or ``H basisᵀ``, with H the sum of its slices."""
    pid = tl.program_id(0)
    if GROUPED:
        item = locate(TABLE, n, pid, 12)
        G, OUT, BASIS = tl.load(item).to(G.dtype), tl.load(item + 1).to(OUT.dtype), tl.load(item + 2).to(BASIS.dtype)
        r, d, k = tl.load(item + 3).to(tl.int32), tl.load(item + 4).to(tl.int32), tl.load(item + 5).to(tl.int32)
        stride_g, stride_out, stride_b = tl.load(item + 6), tl.load(item + 7), tl.load(item + 8)
        complement, h = tl.load(item + 9).to(tl.int32), tl.load(item + 10)
        pid -= tl.load(item + 11).to(tl.int32)
        if ALIGNED:
            G, OUT, BASIS = tl.multiple_of(G, 16), tl.multiple_of(OUT, 16), tl.multiple_of(BASIS, 16)
            d, k, h = tl.multiple_of(d, 16), tl.multiple_of(k, 16), tl.multiple_of(h, 16)
            stride_g, stride_out = tl.multiple_of(stride_g, 16), tl.multiple_of(stride_out, 16)
            stride_b = tl.multiple_of(stride_b, 16)
    blocks_d = tl.cdiv(d, BLOCK_D)
    i = (pid // blocks_d) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    m = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (i < r) & (m < d)
    total = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        onto = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        for part in tl.static_range(SLICES):
            onto += tl.load(H + h + (part * r + i).to(tl.int64) * k + j, mask=(i < r) & (j < k), other=0.0)
        b = tl.load(BASIS + m[:, None].to(tl.int64) * stride_b + j, mask=(m[:, None] < d) & (j < k), other=0.0)
        total = tl.dot(onto, tl.trans(b), total, input_precision=PRECISION)
    if complement != 0:
        total = tl.load(G + i.to(tl.int64) * stride_g + m, mask=inside, other=0.0).to(tl.float32) - total
    tl.store(OUT + i.to(tl.int64) * stride_out + m, total.to(OUT.dtype.element_ty), mask=inside)


def project(items: Sequence[Item]) -> None:
    """``out ← g P`` for matrices g, out (r, d) whose rows are contiguous, and a basis (d, k) of any dtype."""
    first, second, offset = [], [], 0
    for g, out, basis, complement in items:
        basis = unit_inner(basis.float())
        (r, d), k = g.shape, basis.shape[1]
        row = choose("null_projection.onto_basis", g.device, (r,))
        block_r, slices = row.constants["BLOCK_R"], row.constants["SLICES"]
        sizes = {"r": r, "d": d, "k": k, "stride_g": g.stride(0)}
        item = {"G": g, "BASIS": basis, **sizes, "stride_b": basis.stride(0), "h": offset}
        first.append((row, triton.cdiv(r, block_r) * triton.cdiv(k, row.constants["BLOCK_K"]) * slices, item))
        row = choose("null_projection.from_basis", g.device, (r,))
        item = {
            "G": g, "OUT": out, "BASIS": basis, **sizes, "stride_out": out.stride(0), "stride_b": basis.stride(0),
            "complement": int(complement), "h": offset,
        }  # fmt: skip
        second.append((row, triton.cdiv(r, block_r) * triton.cdiv(d, row.constants["BLOCK_D"]), item))
        offset += slices * r * k
    if items:
        H = torch.empty(offset, dtype=torch.float32, device=items[0][0].device)
        launch_items(onto_basis, first, {"H": H})
        launch_items(from_basis, second, {"H": H})


def null_project_(projections: list[Projection]) -> None:
    if len({g.data_ptr() for g, *_ in projections}) < len(projections):  # one matrix twice: one after the other
        for projection in projections:
            null_project_([projection])
        return
    items = []
    for g, basis, complement in projections:
        flat = unit_inner(rows(g))
        items.append((flat, flat, basis, complement))
    project(items)
    for (g, *_), (flat, *_) in zip(projections, items, strict=True):
        if flat.data_ptr() != g.data_ptr():
            g.copy_(flat.view(g.shape))
    written(*(g for g, *_ in projections))
