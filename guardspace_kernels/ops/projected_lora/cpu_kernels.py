"""Projected LoRA by the C++ kernels: ``A P`` in one pass, dropout without a stored mask, dA and dB that read x and dy
once, the rank-r update inside the base product, ``[x | h] [M; N]``, and all of a layer in one call, where these beat
PyTorch's own products."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache

import torch

from guardspace_kernels.ops._cpu import READS_TENSORS, extension, register, view
from guardspace_kernels.ops._cpu import accepts as dense
from guardspace_kernels.ops._library import compute_dtype
from guardspace_kernels.ops.null_projection import cpu_kernels as null_projection
from guardspace_kernels.ops.projected_lora import aten
from guardspace_kernels.ops.projected_lora.algebra import Dropout, Factors, Gradients, Layer, Primitives


def accepts(
    x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, basis: torch.Tensor | None
) -> tuple[bool, str]:
    return dense(x, weight, lora_A, lora_B, basis)


def slow_in_pytorch(dtype: torch.dtype) -> bool:
    """Whether PyTorch has no fast product of this dtype on this CPU."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and "avx512_bf16" not in extension.supported_isas())


def _wider_than_mkl() -> bool:
    """Whether the kernels take wider vectors than MKL, which uses 256 bits on CPUs of AMD."""
    return bool(extension.isa().startswith("avx512") and extension.amd())


def uses_own_product(dtype: torch.dtype, tokens: int, d_in: int, d_out: int) -> bool:
    """Whether ``[x | h] [M; N]``, with ``h = x D`` before it, is one product of the C++ kernels, or three of PyTorch's.

    Measured on two AMD cores with AVX-512 and bfloat16 (MKL and oneDNN of torch 2.13), forward and backward, r = 16 and
    32. In float32 and float64 the kernels read x once, and do not read y again: 0.75 to 1.00 of the time from 128
    tokens on; smaller weights and fewer tokens take up to twice as long. With the registers of AVX2 this pays where y
    is large beside x alone. In bfloat16 they take 0.99 to 1.2, but 0.76 to 0.98 where oneDNN's fixed costs show.
    Without instructions for bfloat16 and in float16 PyTorch has no fast product at all, but a handful of tokens is not
    worth packing W for.
    """
    if dtype is torch.float32 or dtype is torch.float64:
        if tokens >= 128 and d_in * d_out >= 2**18 and _wider_than_mkl():
            return True
        return d_out >= 1024 and d_out >= d_in and tokens * d_out >= 2**19
    if slow_in_pytorch(dtype):
        return dtype == torch.float16 or tokens >= 128
    return 32 <= tokens < 128 and d_in * d_out <= 2**19 and d_out >= 128


def linear(
    x: torch.Tensor,
    M: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    N: torch.Tensor,
    dropped: int = 0,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    if dropout is not None:
        y = linear(x, M, bias, h[:, dropped:], N[dropped:])
        update = _product(h[:, :dropped], N[:dropped])
        extension.dropout(view(update), view(y), dropout.p, int(dropout.seed), True, torch.get_num_threads())
        return y
    tokens, d_in = x.shape
    d_out = M.shape[1]
    if not uses_own_product(x.dtype, tokens, d_in, d_out):
        y = torch.mm(x, M) if bias is None else torch.addmm(bias, x, M)
        return y.addmm_(h, N)
    return _own_linear(x, M, bias, h, N)


def _own_linear(
    x: torch.Tensor,
    M: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    N: torch.Tensor,
    D: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x M + bias + h N`` as one product; with D, ``x D`` is written to h first."""
    y = x.new_empty((x.shape[0], M.shape[1]))
    extension.lora_linear(
        view(x), view(M.t()), None if bias is None else view(bias[None]), None if D is None else view(D.t()),
        view(N.t()), view(h), view(y), torch.get_num_threads(),
    )  # fmt: skip
    return y


def down_linear(
    x: torch.Tensor, D: torch.Tensor, M: torch.Tensor, bias: torch.Tensor | None, N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, d_in = x.shape
    if not uses_own_product(x.dtype, tokens, d_in, M.shape[1]):
        h = torch.mm(x, D)
        y = torch.mm(x, M) if bias is None else torch.addmm(bias, x, M)
        return h, y.addmm_(h, N)
    h = x.new_empty((tokens, D.shape[1]))
    return h, _own_linear(x, M, bias, h, N, D)


def _product(x: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    tokens, d_in = x.shape
    if not uses_own_product(x.dtype, tokens, d_in, M.shape[1]):
        return torch.mm(x, M)
    return _own_linear(x, M, None, x.new_empty((x.shape[0], 0)), x.new_empty((0, M.shape[1])))


def down(x: torch.Tensor, M: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
    return _product(x if dropout is None else masked(x, dropout), M)


def outer(
    e: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    dropout: Dropout | None = None,
    transposed: bool = False,
) -> None:
    if dropout is not None:
        x = masked(x, dropout)
    if READS_TENSORS:
        extension.outer_product(e, x, out, scale, torch.get_num_threads(), transposed)
    else:
        extension.outer_product(view(e), view(x), view(out), scale, torch.get_num_threads(), transposed)


def fold(A: torch.Tensor, basis: torch.Tensor, complement: bool, out: torch.Tensor) -> None:
    if compute_dtype(A.dtype, basis.dtype) is basis.dtype:  # the kernel reads it in place
        null_projection.project_into(out, A, basis, complement)
    else:
        aten.fold(A, basis, complement, out)


@lru_cache(maxsize=1024)
def tokens_of_one_call(dtype: torch.dtype, d_in: int, d_out: int) -> tuple[int, int]:
    """The fewest and the most tokens of which the layer is one call of the C++ kernels.

    Beside the calls it spares reading x and dy twice, and loses what packing W takes. Measured on an AMD CPU of two
    cores with MKL and oneDNN of torch 2.13, forward and backward, r = 16, one thread and two. float32 with AVX-512: 0.7
    to 1.0 of the time in this range. float32 with AVX2: 0.8 to 0.95. bfloat16: 0.35 to 1.0; where oneDNN multiplies
    tiles (AMX, not measured) its fixed cost alone is spared. Where PyTorch has no fast product of the dtype the range
    has no end.
    """
    weights = d_in * d_out
    if slow_in_pytorch(dtype):
        return (1 if dtype is torch.float16 or weights <= 2**14 else 8), sys.maxsize
    if dtype is torch.bfloat16:
        products = 2**22 if torch.cpu._is_amx_tile_supported() else 2**28
        return 1, products // weights if weights <= 2**20 else 0
    if _wider_than_mkl():
        return -(-weights // 2**15), 2048
    return 1, 2**18 // weights if weights <= 2**15 else 0


def _one_call(x: torch.Tensor, layer: Layer) -> bool:
    """Whether a layer's calls cost more than its products."""
    if layer.dropout is not None or layer.output_sizes is not None:
        return False
    d_out, d_in = layer.weight.shape
    if not d_in or not d_out:
        return False
    fewest, most = tokens_of_one_call(x.dtype, d_in, d_out)
    return fewest * d_in <= x.numel() <= most * d_in


def layer_forward(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, factors: Factors, layer: Layer
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not _one_call(x, layer):
        return None
    d_out, d_in = layer.weight.shape
    y = x.new_empty((*x.shape[:-1], d_out))
    h = x.new_empty((x.numel() // d_in, factors.down.size(0)))
    done = extension.layer_forward(
        x, A, B, None if layer.projected else layer.basis, layer.complement, layer.weight, layer.bias, factors.down,
        factors.up, layer.scale, h, y, torch.get_num_threads(),
    )  # fmt: skip
    return (y, h) if done else None


def layer_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    factors: Factors,
    A: torch.Tensor,
    B: torch.Tensor,
    layer: Layer,
    needs: Sequence[bool],
) -> Gradients | None:
    if not _one_call(x, layer) or compute_dtype(A.dtype, x.dtype) is not A.dtype:  # dA would be rounded twice
        return None
    needs_x, needs_A, needs_B = needs
    dx = torch.empty_like(x) if needs_x else None
    dA = torch.empty_like(A) if needs_A else None
    dB = torch.empty_like(B) if needs_B else None
    done = extension.layer_backward(
        dy, x, h, factors.rank, layer.basis, layer.complement, layer.weight, factors.down, factors.up, layer.scale,
        dx, dA, dB, torch.get_num_threads(),
    )  # fmt: skip
    return (dx, dA, dB) if done else None


def masked(x: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """``drop(x)``."""
    out = x.new_empty(x.shape)
    extension.dropout(view(x), view(out), dropout.p, int(dropout.seed), False, torch.get_num_threads())
    return out


_PRIMITIVES = Primitives(linear, down, outer, fold, down_linear=down_linear)
if READS_TENSORS:
    _PRIMITIVES = _PRIMITIVES._replace(layer_forward=layer_forward, layer_backward=layer_backward)


def primitives() -> Primitives:
    return _PRIMITIVES


register("projected_lora", accepts, primitives=primitives)
