"""Covariance accumulation by Triton: tiles on and below the diagonal only, no float32 copy of X, all pairs in a launch.

Where there are too few tiles to fill a GPU, the tokens are split into slices, whose sums a second launch adds in one
order: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from guardspace_kernels.ops._library import rows, unit_inner, written
from guardspace_kernels.ops._triton_launch import blocks, choose, launch, launch_items, locate
from guardspace_kernels.ops._triton_table import Row
from guardspace_kernels.ops.covariance.reference import Update, squared_drift  # noqa: F401  # few products: as it is

#: (row, C, X, mask)
Item = tuple[Row, torch.Tensor, torch.Tensor, torch.Tensor | None]

#: Programs from which tokens are not split further: two for each multiprocessor of an H100. Slices are kept as (d, d)
#: matrices, so they take at most 2 · 264 tiles of float32: 35 MB for tiles of 128, whatever the call.
_PROGRAMS = 264
#: A slice of fewer tokens costs more in traffic of its sums than it saves.
_LEAST_TOKENS = 1024

#: How many rows of tiles are walked together, column by column, so that programs that run at once share columns of X.
_BAND = tl.constexpr(8)


@triton.jit
def triangle(t):
    """Row and column of entry t of a lower triangle, counted row by row; exact for t below 2^30."""
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i -= (i * (i + 1) // 2 > t).to(tl.int32)  # float32 may put the root on the other side of a whole number
    i += ((i + 1) * (i + 2) // 2 <= t).to(tl.int32)
    return i, t - i * (i + 1) // 2


@triton.jit
def lower_tile(t, blocks):
    """Row and column of tile t of the lower triangle of ``blocks`` rows of tiles, counted band by band."""
    i, j = triangle(t)
    band = i // _BAND * _BAND
    t -= band * (band + 1) // 2
    height = tl.minimum(blocks - band, _BAND)
    i, j = triangle(tl.maximum(t - band * height, 0))
    left = t < band * height
    return band + tl.where(left, t % height, i), tl.where(left, t // height, band + j)


@triton.jit
def add_tiles(
    X, C, MASK, T, d, stride_x, stride_c, masked, slices, parts, TABLE, n, scale, PARTS,
    GROUPED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of ``C += scale · Xᵀ diag(MASK) X``, or of a slice's product, kept from ``PARTS + parts`` on."""
    pid = tl.program_id(0)
    if GROUPED:
        item = locate(TABLE, n, pid, 11)
        X, C, MASK = tl.load(item).to(X.dtype), tl.load(item + 1).to(C.dtype), tl.load(item + 2).to(MASK.dtype)
        T, d = tl.load(item + 3).to(tl.int32), tl.load(item + 4).to(tl.int32)
        stride_x, stride_c, masked = tl.load(item + 5), tl.load(item + 6), tl.load(item + 7).to(tl.int32)
        slices, parts = tl.load(item + 8).to(tl.int32), tl.load(item + 9)
        pid -= tl.load(item + 10).to(tl.int32)
        if ALIGNED:
            X, C, parts = tl.multiple_of(X, 16), tl.multiple_of(C, 16), tl.multiple_of(parts, 16)
            d, stride_x, stride_c = tl.multiple_of(d, 16), tl.multiple_of(stride_x, 16), tl.multiple_of(stride_c, 16)
    blocks = tl.cdiv(d, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    part = pid // tiles
    i, j = lower_tile(pid % tiles, blocks)
    i, j = i * BLOCK + tl.arange(0, BLOCK)[:, None], j * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(part * BLOCK_T, T, slices * BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        counts = (t < T) & (tl.load(MASK + t, mask=(t < T) & (masked != 0), other=1) != 0)
        row = t.to(tl.int64) * stride_x
        a = tl.load(X + row + i, mask=counts & (i < d), other=0.0)
        b = tl.load(X + row[:, None] + j, mask=counts[:, None] & (j < d), other=0.0)
        # Tensor cores truncate when they accumulate: 3e-6 of a sum over 2048 tokens, above the threshold of the null
        # space. The limit on their accumulation keeps the compiler from moving this addition into them.
        total += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=BLOCK_T)
    inside = (i < d) & (j <= i)
    if slices == 1:
        at = C + i.to(tl.int64) * stride_c + j
        tl.store(at, tl.load(at, mask=inside, other=0.0) + scale * total, mask=inside)
    else:
        tl.store(PARTS + parts + (part * d + i).to(tl.int64) * d + j, total, mask=inside)


# In the table a kernel of its own: float32 has other tiles.
add_tiles_float32 = add_tiles


@triton.jit
def add_parts(
    C, d, stride_c, slices, parts, TABLE, n, scale, PARTS,
    GROUPED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of ``C += scale · Σ`` over the slices."""
    pid = tl.program_id(0)
    if GROUPED:
        item = locate(TABLE, n, pid, 6)
        C, d, stride_c = tl.load(item).to(C.dtype), tl.load(item + 1).to(tl.int32), tl.load(item + 2)
        slices, parts = tl.load(item + 3).to(tl.int32), tl.load(item + 4)
        pid -= tl.load(item + 5).to(tl.int32)
        if ALIGNED:
            C, parts = tl.multiple_of(C, 16), tl.multiple_of(parts, 16)
            d, stride_c = tl.multiple_of(d, 16), tl.multiple_of(stride_c, 16)
    i, j = triangle(pid)
    i, j = i * BLOCK + tl.arange(0, BLOCK)[:, None], j * BLOCK + tl.arange(0, BLOCK)
    inside = (i < d) & (j <= i)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for part in range(slices):
        total += tl.load(PARTS + parts + (part * d + i).to(tl.int64) * d + j, mask=inside, other=0.0)
    at = C + i.to(tl.int64) * stride_c + j
    tl.store(at, tl.load(at, mask=inside, other=0.0) + scale * total, mask=inside)


@triton.jit
def mirror(C, d, stride_c, BLOCK: tl.constexpr):
    """A tile below the diagonal into its place above it; what is read is nowhere written."""
    i, j = triangle(tl.program_id(0))
    i, j = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    i_, j_ = i[:, None], j[:, None]
    tile = tl.load(C + i_.to(tl.int64) * stride_c + j, mask=(i_ < d) & (j < i_), other=0.0)
    tl.store(C + j_.to(tl.int64) * stride_c + i, tl.trans(tile), mask=(i < d) & (j_ < i))


def _tiles(d: int, block: int) -> int:
    high = blocks(d, block)
    return high * (high + 1) // 2


def _up(n: int) -> int:
    return blocks(n, 16) * 16


def _aligned(t: torch.Tensor, height: int) -> torch.Tensor:
    """A matrix whose rows are contiguous and begin at multiples of 16: this one, or a copy padded with zeros."""
    if t.stride(1) == 1 and not (t.data_ptr() % 16 or t.stride(0) % 16 or t.shape[1] % 16):
        return t
    copy = t.new_zeros(height, _up(t.shape[1]))
    copy[: t.shape[0], : t.shape[1]] = t
    return copy


def add(items: Sequence[Item], scale: float) -> None:
    """``C += scale · Xᵀ diag(mask) X``, all of them laid out well, the masks flat and int32."""
    tiles = [_tiles(C.shape[0], row.constants["BLOCK"]) for row, C, *_ in items]
    most = _PROGRAMS // sum(tiles)
    first, second, offset = [], [], 0
    for (row, C, x, mask), count in zip(items, tiles, strict=True):
        T, d = x.shape
        slices = max(1, min(most, T // _LEAST_TOKENS))
        unread = torch.empty(0, dtype=torch.int32, device=x.device) if mask is None else mask
        sums = {"slices": slices, "parts": offset}
        item = {
            "X": x, "C": C, "MASK": unread, "T": T, "d": d, "stride_x": x.stride(0), "stride_c": C.stride(0),
            "masked": int(mask is not None), **sums,
        }  # fmt: skip
        first.append((row, count * slices, item))
        if slices > 1:
            row = choose("covariance.add_parts", C.device)
            item = {"C": C, "d": d, "stride_c": C.stride(0), **sums}
            second.append((row, _tiles(d, row.constants["BLOCK"]), item))
            offset += slices * d * d
    shared = {"scale": scale, "PARTS": torch.empty(offset, dtype=torch.float32, device=items[0][1].device)}
    launch_items(add_tiles, first, shared)
    launch_items(add_parts, second, shared)


def _row(C: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, tiles: int) -> Row:
    kernel = "covariance.add_tiles" if x.element_size() == 2 else "covariance.add_tiles_float32"
    return choose(kernel, C.device, (tiles, *x.shape), lambda row: add([(row, torch.zeros_like(C), x, mask)], 1.0))


def covariance_update_(updates: list[Update]) -> None:
    accumulators, scales = {C.data_ptr() for C, *_ in updates}, {scale for *_, scale in updates}
    if len(accumulators) < len(updates) or len(scales) > 1:  # one accumulator twice: one after the other
        for update in updates:
            covariance_update_([update])
        return
    operands = []
    for C, x, mask, _ in updates:
        x = rows(x)
        if mask is not None:
            mask = (mask != 0 if mask.element_size() == 8 else mask).to(torch.int32).reshape(-1)
        operands.append((_aligned(C, _up(C.shape[0])), _aligned(x, x.shape[0]), mask))
    filled = [operand for operand in operands if operand[1].numel()]
    if filled:
        tiles = sum(_tiles(C.shape[0], 128) for C, *_ in filled)
        add([(_row(*operand, tiles), *operand) for operand in filled], scales.pop())
    for (C, *_), (direct, *_) in zip(updates, operands, strict=True):
        if direct is not C:
            C.copy_(direct[: C.shape[0], : C.shape[0]])
    written(*(C for C, *_ in updates))


def symmetrize_(covariance: torch.Tensor) -> None:
    C = unit_inner(covariance)
    row = choose("covariance.mirror", C.device)
    grid = _tiles(C.shape[0], row.constants["BLOCK"])
    launch(mirror, row, grid, {"C": C, "d": C.shape[0], "stride_c": C.stride(0)})
    if C is not covariance:
        covariance.copy_(C)
    written(covariance)
