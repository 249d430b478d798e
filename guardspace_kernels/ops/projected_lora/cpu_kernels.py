"""Projected LoRA by the C++ kernels: ``A P`` in one pass, dropout without a stored mask, dA and dB that read x and dy
once, and the rank-r update inside the base product, ``[x | h] [W | s·B]ᵀ``, where that beats PyTorch's own product."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from guardspace_kernels.ops._cpu import accepts as dense
from guardspace_kernels.ops._cpu import extension, register, view
from guardspace_kernels.ops._library import compute_dtype, rows
from guardspace_kernels.ops.null_projection import cpu_kernels as null_projection
from guardspace_kernels.ops.projected_lora import reference


def accepts(
    x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, basis: torch.Tensor | None
) -> tuple[bool, str]:
    return dense(x, weight, lora_A, lora_B, basis)


def fold(lora_A: torch.Tensor, basis: torch.Tensor | None, complement: bool, dtype: torch.dtype) -> torch.Tensor:
    """``A P`` (r, d_in), rounded once to ``dtype``."""
    if basis is None:
        return lora_A.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not null_projection.accepts(lora_A, basis)[0]:
        return reference.fold(lora_A, basis, complement, dtype)
    A_P = torch.empty(lora_A.shape, dtype=dtype)
    null_projection.project_into(A_P, lora_A, basis, complement)
    return A_P


def uses_own_product(dtype: torch.dtype, tokens: int, d_in: int, d_out: int) -> bool:
    """Whether ``[x | h] [W | up]ᵀ`` is one product of the C++ kernels, or PyTorch's with the rank-r update after it.

    Measured on two cores with AVX-512. MKL reaches 75% of an AMD Zen 4's peak in float32 and float64, so the kernels
    win once there are enough tokens to pay for packing W. In bfloat16 oneDNN runs at 93% of it where the CPU has
    instructions for that, and loses only on weights small enough for its fixed costs to show. Without such instructions
    and in float16 PyTorch has no fast product at all. A handful of outputs is not worth packing x for.
    """
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and "avx512_bf16" not in extension.supported_isas())
    if slow:
        return dtype == torch.float16 or tokens >= 128
    if d_out < 256:
        return False
    return tokens >= 32 and d_in * d_out <= 2**19 if dtype == torch.bfloat16 else tokens >= 128


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    up: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h) with ``y = x Wᵀ + bias + h upᵀ``; h is given, or ``x downᵀ``, or has no columns."""
    tokens, d_in = x.shape
    d_out = weight.shape[0]
    if not uses_own_product(x.dtype, tokens, d_in, d_out):
        y = F.linear(x, weight, bias)
        if down is not None:
            h = F.linear(x, down)
        if up is None or h is None:
            return y, x.new_empty((tokens, 0))
        return y.addmm_(h, up.T), h
    if down is not None:
        h = x.new_empty((tokens, down.shape[0]))
    if up is None or h is None:
        up, h = x.new_empty((d_out, 0)), x.new_empty((tokens, 0))
    y = x.new_empty((tokens, d_out))
    extension.lora_linear(
        view(x), view(weight), None if bias is None else view(bias[None]), None if down is None else view(down),
        view(up), view(h), view(y), torch.get_num_threads(),
    )  # fmt: skip
    return y, h


def _outer(h: torch.Tensor, x: torch.Tensor, out: torch.Tensor, scale: float) -> torch.Tensor:
    """``out ← scale · hᵀ x``, summed in at least float32 and rounded once."""
    extension.outer_product(view(h), view(x), view(out), scale, torch.get_num_threads())
    return out


def dropped(x: torch.Tensor, dropout: float, seed: torch.Tensor | None) -> torch.Tensor:
    return x if dropout == 0.0 else _drop(x, torch.empty(x.shape, dtype=x.dtype), dropout, seed, accumulate=False)


def _drop(
    x: torch.Tensor, out: torch.Tensor, dropout: float, seed: torch.Tensor | None, *, accumulate: bool
) -> torch.Tensor:
    assert seed is not None
    extension.dropout(view(x), view(out), dropout, int(seed), accumulate, torch.get_num_threads())
    return out


def forward(
    x: torch.Tensor, bias: torch.Tensor | None, layer: reference.Layer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, lora_A, lora_B, basis, complement, scale, frozen_A, frozen_B, dropout, seed, sizes = layer
    tokens, r, dtype = rows(x), lora_A.shape[0], x.dtype
    A_P = fold(lora_A, basis, complement, dtype)
    down, up = A_P, reference.spread((scale * lora_B).to(dtype), sizes)
    if frozen_A is not None and frozen_B is not None:
        down = torch.cat([down, frozen_A.to(dtype)])
        up = torch.cat([up, reference.spread((-scale * frozen_B).to(dtype), sizes)], dim=1)
    if dropout == 0.0:
        y, h = _linear(tokens, weight, bias, up=up, down=down)
    else:  # the frozen pair, if there is one, takes x as it is
        h = torch.cat([_linear(dropped(tokens, dropout, seed), down[:r])[0], _linear(tokens, down[r:])[0]], dim=1)
        y, h = _linear(tokens, weight, bias, up=up, h=h)
    shape = x.shape[:-1]
    return y.view(*shape, y.shape[1]), h[:, :r].contiguous().view(*shape, r), A_P


def backward(
    dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A_P: torch.Tensor, layer: reference.Layer, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, lora_A, lora_B, basis, complement, scale, frozen_A, frozen_B, dropout, seed, sizes = layer
    grad, tokens, r, dtype = rows(dy), rows(x), lora_A.shape[0], x.dtype
    needs_x, needs_A, needs_B = needs
    dx, dA, dB = (dy.new_empty(0) for _ in needs)
    down, up = reference.spread((scale * lora_B).to(dtype), sizes).T, A_P.T
    frozen_down, frozen_up = None, None
    if frozen_A is not None and frozen_B is not None:
        frozen_down = reference.spread((-scale * frozen_B).to(dtype), sizes).T
        frozen_up = frozen_A.to(dtype).T
    if needs_x and dropout == 0.0:
        if frozen_down is not None and frozen_up is not None:
            down, up = torch.cat([down, frozen_down]), torch.cat([up, frozen_up], dim=1)
        dx, dh = _linear(grad, weight.T, up=up, down=down)
        dh = dh[:, :r]
    else:
        dh, _ = _linear(grad, down)
    if needs_x and dropout > 0.0:
        dx, _ = _linear(grad, weight.T, up=frozen_up, down=frozen_down)
        # Dropout's derivative is the same mask and factor, applied to the adapter's share of the gradient.
        _drop(_linear(dh, up)[0], dx, dropout, seed, accumulate=True)
    if needs_A:
        wide = torch.empty(lora_A.shape, dtype=compute_dtype(lora_A.dtype, dtype))
        dA = fold(_outer(dh, dropped(tokens, dropout, seed), wide, 1.0), basis, complement, lora_A.dtype)
    if needs_B:
        dB = torch.empty(lora_B.shape, dtype=lora_B.dtype)
        rank, start = lora_B.shape[1], 0
        for i, size in enumerate(sizes or [len(lora_B)]):
            end = start + size
            _outer(rows(h)[:, i * rank : (i + 1) * rank], grad[:, start:end], dB[start:end].T, scale)
            start = end
    return dx.view(x.shape) if needs_x else dx, dA, dB


register("projected_lora", accepts, forward=forward, backward=backward)
