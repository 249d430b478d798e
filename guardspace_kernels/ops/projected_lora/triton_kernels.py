"""Projected LoRA by Triton: the rank-r update inside the base product, dropout without a stored mask, and gradients
that read x once and, at small ranks, dy once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from guardspace_kernels.ops._library import unit_inner
from guardspace_kernels.ops._triton import target
from guardspace_kernels.ops._triton_launch import blocks, choose, launch
from guardspace_kernels.ops._triton_table import Row, rows_for
from guardspace_kernels.ops.null_projection.triton_kernels import project
from guardspace_kernels.ops.projected_lora import gpu
from guardspace_kernels.ops.projected_lora.algebra import Primitives
from guardspace_kernels.ops.projected_lora.gpu import Dropout, dropout_of

_PROGRAMS = 256  # about two for each multiprocessor of a large chip
_MOST_SLICES = 8  # of columns
_LEAST_TOKENS = 512  # in a slice of tokens: its sum is r × d, its share of x 512 × d

_TALL = tl.constexpr(8)  # blocks of tokens that share blocks of weights in the cache
_RANK = tl.constexpr(16)  # of the update's rank at a time


@triton.jit
def _kept(SEED, threshold, i, start, BLOCK: tl.constexpr):
    """Which entries of rows i and columns start + [0, BLOCK) dropout keeps: a counter's four words, four columns."""
    four = (start // 4 + tl.arange(0, BLOCK // 4))[None, :] + tl.zeros_like(i)
    zero = tl.zeros_like(four)
    a, b, c, d = tl.philox(tl.load(SEED), four, i + zero, zero, zero)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return (words >> 1).to(tl.int32) >= threshold


@triton.jit
def _plus_update(total, H, UP, i, n, T, N, begin, end, stride_h, stride_up, PRECISION: tl.constexpr):
    """``total + H[:, begin:end] UP[begin:end]``."""
    for start in tl.range(begin, end, _RANK, num_stages=1):
        j = start + tl.arange(0, _RANK)
        h = tl.load(H + i.to(tl.int64) * stride_h + j, mask=(i < T) & (j < end), other=0.0)
        up = tl.load(UP + j[:, None].to(tl.int64) * stride_up + n, mask=(j[:, None] < end) & (n < N), other=0.0)
        total = tl.dot(h, up, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["threshold"])
def linear(
    X, W, BIAS, H, UP, Y, SEED, T, N, K, R, dropped, stride_x, stride_w, stride_h, stride_up, stride_y, biased, add,
    threshold, factor,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Y = [Y +] X Wᵀ + bias + H UP``, dropout's mask and factor on what the first ``dropped`` rows of UP add.

    W has ``ROWS`` of adjacent elements, else columns. The update comes first, so that dropout needs no second tile.
    """
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first = pid // (_TALL * blocks_n) * _TALL
    tall = tl.minimum(tl.cdiv(T, BLOCK_T) - first, _TALL)
    pid %= _TALL * blocks_n
    i = (first + pid % tall) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    start_n = pid // tall * BLOCK_N
    n = start_n + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    if dropped > 0:
        total = _plus_update(total, H, UP, i, n, T, N, 0, dropped, stride_h, stride_up, PRECISION)
        total = tl.where(_kept(SEED, threshold, i, start_n, BLOCK_N), total * factor, 0.0)
    total = _plus_update(total, H, UP, i, n, T, N, dropped, R, stride_h, stride_up, PRECISION)
    m = tl.arange(0, BLOCK_K)
    x_at = X + i.to(tl.int64) * stride_x
    w_at = W + n.to(tl.int64) * stride_w if ROWS else W + n
    for start in range(0, K, BLOCK_K):
        k = start + m
        x = tl.load(x_at + k, mask=(i < T) & (k < K), other=0.0)
        k = k[:, None]
        w = tl.load(w_at + (k if ROWS else k.to(tl.int64) * stride_w), mask=(k < K) & (n < N), other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    total += tl.load(BIAS + n, mask=(n < N) & (biased != 0), other=0.0).to(tl.float32)
    inside = (i < T) & (n < N)
    y_at = Y + i.to(tl.int64) * stride_y + n
    total += tl.load(y_at, mask=inside & (add != 0), other=0.0).to(tl.float32)
    tl.store(y_at, total.to(Y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def down(
    X, DOWN, E, H, OUT, SEED, T, d, R, r, slices, stride_x, stride_down, stride_e, threshold, factor,
    OUTER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``H[slice] = drop(X) DOWNᵀ`` (T, R), summed over a slice of d.

    With ``OUTER`` no dropout, and ``OUT[block] = Eᵀ X`` (r, d), summed over a block of tokens, of the same tiles of X.
    """
    pid = tl.program_id(0)
    blocks_r = tl.cdiv(R, BLOCK_R)
    j = pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    part = pid // blocks_r % slices
    block = (pid // blocks_r // slices).to(tl.int64)
    i = pid // blocks_r // slices * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    if OUTER:
        t, j_ = block * BLOCK_T + tl.arange(0, BLOCK_T), j[:, None]
        e = tl.load(E + t * stride_e + j_, mask=(t < T) & (j_ < r), other=0.0)
    for start in range(part * BLOCK_D, d, slices * BLOCK_D):
        m = start + tl.arange(0, BLOCK_D)
        x = tl.load(X + i.to(tl.int64) * stride_x + m, mask=(i < T) & (m < d), other=0.0)
        if not OUTER:
            x = tl.where(_kept(SEED, threshold, i, start, BLOCK_D), x, 0.0)
        m_ = m[:, None]
        w = tl.load(DOWN + j.to(tl.int64) * stride_down + m_, mask=(m_ < d) & (j < R), other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
        if OUTER:
            tile = tl.dot(e, x, input_precision=PRECISION)
            tl.store(OUT + (block * r + j_) * d + m, tile, mask=(j_ < r) & (m < d))
    tl.store(H + (part.to(tl.int64) * T + i) * R + j, total * factor, mask=(i < T) & (j < R))


@triton.jit(do_not_specialize=["threshold"])
def outer(
    E, X, OUT, SEED, T, d, r, slices, stride_e, stride_x, threshold, factor,
    DROPOUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``OUT[slice] = Eᵀ drop(X)`` (r, d), summed over a slice of the tokens."""
    pid = tl.program_id(0)
    blocks_r = tl.cdiv(r, BLOCK_R)
    j = pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    part = pid // blocks_r % slices
    start_m = pid // blocks_r // slices * BLOCK_D
    m = start_m + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for start in range(part * BLOCK_T, T, slices * BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        e = tl.load(E + i.to(tl.int64) * stride_e + j, mask=(i < T) & (j < r), other=0.0)
        i = i[:, None]
        x = tl.load(X + i.to(tl.int64) * stride_x + m, mask=(i < T) & (m < d), other=0.0)
        if DROPOUT:
            x = tl.where(_kept(SEED, threshold, i, start_m, BLOCK_D), x, 0.0)
        total = tl.dot(e, x, total, input_precision=PRECISION)
    tl.store(OUT + (part * r + j).to(tl.int64) * d + m, total * factor, mask=(j < r) & (m < d))


# In the table kernels of their own: float32 has other tiles.
linear_float32, down_float32, outer_float32 = linear, down, outer


def _name(kernel: str, x: torch.Tensor) -> str:
    return f"projected_lora.{kernel}_float32" if x.dtype == torch.float32 else f"projected_lora.{kernel}"


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    up: torch.Tensor,
    dropped: int = 0,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """``x Wᵀ + bias + h up``, with dropout's mask and factor on what the first ``dropped`` rows of up add."""
    (T, K), N = x.shape, weight.shape[0]
    kernel, chip = _name("linear", x), target(x.device)
    assert chip is not None
    dropout = dropout or dropout_of(0.0, None, x.device)
    tiles = blocks(T, 128) * blocks(N, 128)

    def update(*arguments: Any) -> None:
        partial(_tiles, choose(kernel, x.device, (0, tiles)), add=True)(*arguments)

    def form(row: Row) -> torch.Tensor:
        if row.constants:
            y = x.new_empty((T, N))
            return _tiles(row, x, weight, bias, unit_inner(h), unit_inner(up), y, dropped, dropout)
        return gpu.by_library(update, x, weight, bias, unit_inner(h), up, dropped, dropout)

    library = Row(kernel, (chip,), {}, warps=0, stages=0, least=(gpu.library_from(x.dtype, T, chip),))
    return form(choose(kernel, x.device, (K, tiles, T), form, (library, *rows_for(kernel, chip))))


def _tiles(
    row: Row,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    up: torch.Tensor,
    y: torch.Tensor,
    dropped: int,
    dropout: Dropout,
    add: bool = False,
) -> torch.Tensor:
    (T, K), (N, _), R = x.shape, weight.shape, up.shape[0]
    by_rows = weight.stride(0) != 1 or weight.stride(1) == 1
    w = unit_inner(weight if by_rows else weight.T)
    arguments = {
        "X": x, "W": w, "BIAS": x if bias is None else bias.contiguous(), "H": h, "UP": up, "Y": y,
        "SEED": dropout.seed, "T": T, "N": N, "K": K, "R": R, "dropped": dropped, "stride_x": x.stride(0),
        "stride_w": w.stride(0), "stride_h": h.stride(0), "stride_up": up.stride(0), "stride_y": y.stride(0),
        "biased": int(bias is not None), "add": int(add), "threshold": dropout.threshold, "factor": dropout.factor,
    }  # fmt: skip
    programs = blocks(T, row.constants["BLOCK_T"]) * blocks(N, row.constants["BLOCK_N"])
    launch(linear, row, programs, arguments, ROWS=by_rows)
    return y


def _down(
    x: torch.Tensor, w: torch.Tensor, dropout: Dropout, h: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``drop(x) wᵀ`` in x's dtype. Given h, without dropout, and ``hᵀ x``."""
    (T, d), R, r = x.shape, w.shape[0], 0 if h is None else h.shape[1]
    row = choose(_name("down", x), x.device)
    high = blocks(T, row.constants["BLOCK_T"])
    programs = high * blocks(R, row.constants["BLOCK_R"])
    most = min(_MOST_SLICES, blocks(d, row.constants["BLOCK_D"]))
    slices = max(1, min(most, _PROGRAMS // max(1, programs)))
    H = x.new_empty((slices, T, R), dtype=torch.float32)
    OUT = x.new_empty((high, r, d), dtype=torch.float32)
    e = x if h is None else h
    arguments = {
        "X": x, "DOWN": w, "E": e, "H": H, "OUT": OUT, "SEED": dropout.seed, "T": T, "d": d, "R": R, "r": r,
        "slices": slices, "stride_x": x.stride(0), "stride_down": w.stride(0), "stride_e": e.stride(0),
        "threshold": dropout.threshold, "factor": dropout.factor,
    }  # fmt: skip
    launch(down, row, programs * slices, arguments, OUTER=h is not None)
    return (H[0] if slices == 1 else H.sum(0)).to(x.dtype), OUT.sum(0)


def _outer(e: torch.Tensor, x: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
    """``eᵀ drop(x)`` (r, d) in float32."""
    (T, d), r = x.shape, e.shape[1]
    row = choose(_name("outer", x), x.device)
    programs = blocks(r, row.constants["BLOCK_R"]) * blocks(d, row.constants["BLOCK_D"])
    slices = max(1, min(_PROGRAMS // max(1, programs), T // _LEAST_TOKENS))
    OUT = x.new_empty((slices, r, d), dtype=torch.float32)
    drops = dropout is not None and dropout.threshold > 0
    dropout = dropout or dropout_of(0.0, None, x.device)
    arguments = {
        "E": e, "X": x, "OUT": OUT, "SEED": dropout.seed, "T": T, "d": d, "r": r, "slices": slices,
        "stride_e": e.stride(0), "stride_x": x.stride(0), "threshold": dropout.threshold, "factor": dropout.factor,
    }  # fmt: skip
    launch(outer, row, programs * slices, arguments, DROPOUT=drops)
    return OUT[0] if slices == 1 else OUT.sum(0)


def _one_pass(grad: torch.Tensor, r: int) -> bool:
    """Whether dB's partial sums, 8·r/BLOCK_T bytes for every entry of dy, cost less than to read dy once more.

    Of float32 the two products of one tile do not fit into the registers.
    """
    return grad.dtype != torch.float32 and 8 * r < 2 * choose("projected_lora.down", grad.device).constants["BLOCK_T"]


def _fold(A: torch.Tensor, basis: torch.Tensor, complement: bool, out: torch.Tensor) -> None:
    project([(unit_inner(A), out, basis, complement)])


_PASSES = gpu.Passes(_linear, _down, _outer, _fold, _one_pass)
_PRIMITIVES = gpu.primitives(_PASSES)


def primitives() -> Primitives:
    return _PRIMITIVES
