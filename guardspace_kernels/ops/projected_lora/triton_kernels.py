"""Projected LoRA by Triton: the rank-r update inside the base product, dropout without a stored mask, and gradients
that read x once and, at small ranks, dy once.

Dropout keeps an entry by a word of Philox whose counter is the entry's place and whose key is the seed, which the
kernels read on the device: forward and both gradients find the same mask, and nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from guardspace_kernels.ops._library import rows, unit_inner
from guardspace_kernels.ops._triton import target
from guardspace_kernels.ops._triton_launch import blocks, choose, launch
from guardspace_kernels.ops._triton_table import Row, rows_for
from guardspace_kernels.ops.null_projection.triton_kernels import project
from guardspace_kernels.ops.projected_lora import reference

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


class _Dropout(NamedTuple):
    seed: torch.Tensor
    threshold: int  # of the upper 31 bits of a word
    factor: float


def _dropout(p: float, seed: torch.Tensor | None, device: torch.device) -> _Dropout:
    if p == 0.0 or seed is None:
        return _Dropout(torch.empty(0, dtype=torch.int64, device=device), 0, 1.0)
    if seed.device != device:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"projected_lora: seed is on {seed.device}, and a CUDA graph would drop the same entries in every "
                f"replay; pass a tensor on {device} and change it in place between replays"
            )
        seed = seed.to(device, non_blocking=True)
    return _Dropout(seed, min(round(p * 2**31), 2**31 - 1), 1.0 / (1.0 - p))


def _library_from(dtype: torch.dtype, chip: str) -> int:
    """The number of products in a sum from which PyTorch's product and ``addmm_`` are taken for the base product.

    Nothing was timed: this weighs peaks. A kernel with the update inside saves writing and reading y once more, in 16
    bits a share 2·peak/(bandwidth·K) of the product's time: 306/K on an A100, 590/K on an H100, 562/K on a B200,
    493/K on an MI300X. That is taken to outweigh the library's lead where mma.sync feeds the tensor cores, which
    compiled kernels use as well as the library (15% at K = 2048), and up to half that K elsewhere (48% and more).
    Three products of TF32 outrun one of float32, but not one of TF32 where the user allows those.
    """
    if dtype == torch.float32 and chip.startswith("sm"):
        return 0 if _allows_tf32() else 2**31
    return 2049 if chip in ("sm80", "sm89", "sm120") else 1025


def _allows_tf32() -> bool:
    settings = torch.backends.cuda.matmul
    # From torch 2.9 on reading the older setting raises where the two differ.
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32


_FEW = 64  # tokens: fewer do not fill a tile, and the library splits K for them


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    up: torch.Tensor,
    dropped: int = 0,
    dropout: _Dropout | None = None,
) -> torch.Tensor:
    """``x Wᵀ + bias + h up``, with dropout's mask and factor on what the first ``dropped`` rows of up add."""
    (T, K), N = x.shape, weight.shape[0]
    kernel, chip = _name("linear", x), target(x.device)
    assert chip is not None
    dropout = dropout or _dropout(0.0, None, x.device)
    tiles = blocks(T, 128) * blocks(N, 128)

    def form(row: Row) -> torch.Tensor:
        if row.constants:
            return _tiles(row, x, weight, bias, h, up, x.new_empty((T, N)), dropped, dropout)
        y = F.linear(x, weight, bias)
        if dropped < len(up):
            y.addmm_(h[:, dropped:], up[dropped:])
        if dropped:
            row = choose(kernel, x.device, (0, tiles))
            _tiles(row, x[:, :0], weight[:, :0], None, h[:, :dropped], up[:dropped], y, dropped, dropout, add=True)
        return y

    least = (_library_from(x.dtype, chip),) if T >= _FEW else ()
    library = Row(kernel, (chip,), {}, warps=0, stages=0, least=least)
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
    dropout: _Dropout,
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
    x: torch.Tensor, w: torch.Tensor, dropout: _Dropout, h: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``drop(x) wᵀ`` in x's dtype. Given h, without dropout, and what adds up to ``hᵀ x`` by blocks of tokens."""
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
    return (H[0] if slices == 1 else H.sum(0)).to(x.dtype), OUT


def _outer(e: torch.Tensor, x: torch.Tensor, dropout: _Dropout | None = None) -> torch.Tensor:
    """``eᵀ drop(x)`` (r, d) in float32."""
    (T, d), r = x.shape, e.shape[1]
    row = choose(_name("outer", x), x.device)
    programs = blocks(r, row.constants["BLOCK_R"]) * blocks(d, row.constants["BLOCK_D"])
    slices = max(1, min(_PROGRAMS // max(1, programs), T // _LEAST_TOKENS))
    OUT = x.new_empty((slices, r, d), dtype=torch.float32)
    drops = dropout is not None and dropout.threshold > 0
    dropout = dropout or _dropout(0.0, None, x.device)
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


def _fold(A: torch.Tensor, basis: torch.Tensor | None, complement: bool, dtype: torch.dtype) -> torch.Tensor:
    if basis is None:
        return reference.fold(A, basis, complement, dtype)
    A_P = A.new_empty(A.shape, dtype=dtype)
    project([(unit_inner(A), A_P, basis, complement)])
    return A_P


def _rows_of_up(scale: float, lora_B: torch.Tensor, layer: reference.Layer) -> torch.Tensor:
    """``(scale · B)ᵀ`` (r, d_out) in the dtype of x: with contiguous rows it serves ``h up`` and ``dy upᵀ``."""
    B = reference.spread(lora_B, layer.output_sizes)
    return torch.mul(B.T, scale, out=B.new_empty(B.T.shape, dtype=layer.weight.dtype))


def forward(
    x: torch.Tensor, bias: torch.Tensor | None, layer: reference.Layer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, lora_A, lora_B, basis, complement, scale, frozen_A, frozen_B, dropout, seed, _ = layer
    tokens, r, dtype = unit_inner(rows(x)), lora_A.shape[0], x.dtype
    A_P = _fold(lora_A, basis, complement, dtype)
    down, up = A_P, _rows_of_up(scale, lora_B, layer)
    if frozen_A is not None and frozen_B is not None:
        down = torch.cat([A_P, frozen_A.to(dtype)])
        up = torch.cat([up, _rows_of_up(-scale, frozen_B, layer)])
    if dropout == 0.0:
        h = F.linear(tokens, down)
    else:  # the frozen pair, if there is one, takes x as it is
        h, _ = _down(tokens, A_P, _dropout(dropout, seed, x.device))
        if len(down) > r:
            h = torch.cat([h, F.linear(tokens, down[r:])], dim=1)
    y = _linear(tokens, weight, bias, h, up)
    shape = x.shape[:-1]
    return y.view(*shape, y.shape[1]), h[:, :r].contiguous().view(*shape, r), A_P


def backward(
    dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A_P: torch.Tensor, layer: reference.Layer, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, lora_A, lora_B, basis, complement, scale, frozen_A, frozen_B, dropout, seed, sizes = layer
    grad, h, r = unit_inner(rows(dy)), rows(h), lora_A.shape[0]
    drop = _dropout(dropout, seed, x.device)
    needs_x, needs_A, needs_B = needs
    dx, dA, dB, dh = (dy.new_empty(0) for _ in range(4))
    up, down = A_P, _rows_of_up(scale, lora_B, layer)
    if needs_x and frozen_A is not None and frozen_B is not None:
        up = torch.cat([A_P, frozen_A.to(x.dtype)])
        down = torch.cat([down, _rows_of_up(-scale, frozen_B, layer)])
    if needs_B and (needs_x or needs_A) and _one_pass(grad, r):
        dh, parts = _down(grad, down, _dropout(0.0, None, x.device), h)
        dB = parts.sum(0)
    else:
        if needs_x or needs_A:
            dh = F.linear(grad, down)
        if needs_B:
            dB = _outer(h, grad)
    if needs_x:
        dx = _linear(grad, weight.T, None, dh, up, r if dropout else 0, drop).view(x.shape)
    if needs_A:
        dA = _fold(_outer(dh[:, :r], unit_inner(rows(x)), drop), basis, complement, lora_A.dtype)
    if needs_B:
        dB = torch.mul(reference.gather(dB.T, sizes), scale, out=lora_B.new_empty(lora_B.shape))
    return dx, dA, dB
