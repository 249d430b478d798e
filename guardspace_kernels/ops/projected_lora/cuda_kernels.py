"""Projected LoRA by the CUDA kernels: the rank-r update inside the base product, dropout without a stored mask, and
gradients that read x once and, at small ranks, dy once."""

from __future__ import annotations

from functools import partial

import torch

from guardspace_kernels.ops import _cuda
from guardspace_kernels.ops._cuda import call, dtype_of, packed, workspace
from guardspace_kernels.ops._library import unit_inner
from guardspace_kernels.ops._triton import target
from guardspace_kernels.ops.null_projection.cuda_kernels import project
from guardspace_kernels.ops.projected_lora import gpu
from guardspace_kernels.ops.projected_lora.algebra import Primitives
from guardspace_kernels.ops.projected_lora.gpu import Dropout, dropout_of

_LIBRARY_ALWAYS = "sm90"  # in float32 too the library was 1.25 times as fast as these kernels on an H100
_BLOCK_T = 128  # of lora_down, csrc/cuda/projected_lora.cu


def accepts(
    x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, basis: torch.Tensor | None
) -> tuple[bool, str]:
    return _cuda.accepts(x, weight, lora_A, lora_B, basis)


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    up: torch.Tensor,
    dropped: int = 0,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    dropout = dropout or dropout_of(0.0, None, x.device)
    (T, K), N = x.shape, weight.shape[0]
    if gpu.library_from(x.dtype, T, chip := target(x.device) or "sm80") <= K or chip == _LIBRARY_ALWAYS:
        return gpu.by_library(partial(_tiles, add=True), x, weight, bias, unit_inner(h), up, dropped, dropout)
    return _tiles(x, weight, bias, unit_inner(h), unit_inner(up), x.new_empty((T, N)), dropped, dropout)


def _tiles(
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
    by_rows = weight.stride(0) != 1 or weight.stride(1) == 1
    w = unit_inner(weight if by_rows else weight.T)
    bias = None if bias is None else bias.contiguous()
    item = (
        y, x, w, bias, h, up, dropout.seed, *x.shape, *y.shape[1:], len(up), dropped, y.stride(0), x.stride(0),
        w.stride(0), h.stride(0), up.stride(0), not by_rows, add, dropout.threshold, dtype_of(x),
    )  # fmt: skip
    call("lora_linear", x.device, packed([item]), dropout.factor)
    return y


def _down(
    x: torch.Tensor, w: torch.Tensor, dropout: Dropout, h: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    (T, d), R, r = x.shape, len(w), 0 if h is None else h.shape[1]
    H, OUT = x.new_empty((T, R)), x.new_empty((r, d), dtype=torch.float32)
    stride = 0 if h is None else h.stride(0)
    item = packed([(
        H, OUT, x, w, h, dropout.seed, T, d, R, r, x.stride(0), w.stride(0), stride, dropout.threshold, dtype_of(x)
    )])  # fmt: skip
    sums = workspace("lora_down_workspace", x.device, item)
    call("lora_down", x.device, item, dropout.factor, sums.data_ptr(), sums.nbytes)
    return H, OUT


def _outer(e: torch.Tensor, x: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
    (T, d), r = x.shape, e.shape[1]
    dropout = dropout or dropout_of(0.0, None, x.device)
    OUT = x.new_empty((r, d), dtype=torch.float32)
    item = packed([(
        OUT, e, x, dropout.seed, T, d, r, e.stride(0), x.stride(0), dropout.threshold, dtype_of(x)
    )])  # fmt: skip
    sums = workspace("lora_outer_workspace", x.device, item)
    call("lora_outer", x.device, item, dropout.factor, sums.data_ptr(), sums.nbytes)
    return OUT


def _one_pass(grad: torch.Tensor, r: int) -> bool:
    """Whether dB's partial sums, 8·r/BLOCK_T bytes for every entry of dy, cost less than to read dy once more."""
    return grad.dtype != torch.float32 and 8 * r < 2 * _BLOCK_T


def _fold(A: torch.Tensor, basis: torch.Tensor, complement: bool, out: torch.Tensor) -> None:
    project([(unit_inner(A), out, basis, complement)])


_PASSES = gpu.Passes(_linear, _down, _outer, _fold, _one_pass)
_PRIMITIVES = gpu.primitives(_PASSES)


def primitives() -> Primitives:
    return _PRIMITIVES


_cuda.register("projected_lora", accepts, primitives=primitives)
