"""Projected LoRA by the C++ kernels: ``A P`` in one pass, and the rank-r update inside the base product,
``[x | h] [W | s·B]ᵀ``, where that is faster than PyTorch's own."""

from __future__ import annotations

import torch

from guardspace_kernels.ops._cpu import accepts as dense
from guardspace_kernels.ops._cpu import extension, register, rows, view
from guardspace_kernels.ops._library import compute_dtype
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


# Below, packing the weight costs more than it saves (measured at d = 576 to 2048 on two cores with AVX-512).
_FEW_TOKENS = 128


def uses_own_product(dtype: torch.dtype, tokens: int, dropout: float) -> bool:
    """Whether the base product is the C++ kernels', with the adapter inside it, or PyTorch's with the adapter beside.

    PyTorch's wins for few tokens, and in bfloat16 on CPUs with bfloat16 instructions, where oneDNN runs at 93% of their
    peak. The kernels win in float32 and float64 (MKL reached 75% of an AMD Zen 4's peak), and in float16, and in
    bfloat16 without such instructions, where PyTorch has no fast product. Dropout is always the kernels', so that
    forward and backward have one mask.
    """
    if dropout > 0.0:
        return True
    if dtype == torch.bfloat16 and "avx512_bf16" in extension.supported_isas():
        return False
    return tokens >= _FEW_TOKENS or dtype == torch.float16


def dropped(x: torch.Tensor, dropout: float, seed: torch.Tensor | None) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    _drop(x, out, dropout, seed, accumulate=False)
    return out


def _drop(x: torch.Tensor, out: torch.Tensor, dropout: float, seed: torch.Tensor | None, *, accumulate: bool) -> None:
    assert seed is not None
    extension.dropout(view(x), view(out), dropout, int(seed), accumulate, torch.get_num_threads())


def _product(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    up: torch.Tensor | None,
    h: torch.Tensor | None,
    *,
    down: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x Wᵀ + bias + h upᵀ`` (T, N); with ``down``, h (T, r) is written first, as ``x downᵀ``."""
    tokens, d = x.shape
    weight = x.new_empty((0, d)) if weight is None else weight
    h = x.new_empty((tokens, 0)) if h is None else h
    up = x.new_empty((weight.shape[0], h.shape[1])) if up is None else up
    y = torch.empty((tokens, weight.shape[0]), dtype=x.dtype)
    extension.lora_linear(
        view(x), view(weight), None if bias is None else view(bias[None]), None if down is None else view(down),
        view(up), view(h), view(y), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _outer(h: torch.Tensor, x: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    extension.outer_product(view(h), view(x), view(out), scale, torch.get_num_threads())


def forward(
    x: torch.Tensor, bias: torch.Tensor | None, layer: reference.Layer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = rows(x)
    if not uses_own_product(x.dtype, len(tokens), layer.dropout):
        return reference.forward(x, bias, layer, fold)
    weight, lora_A, lora_B, basis, complement, scale, frozen_A, frozen_B, dropout, seed = layer
    r = lora_A.shape[0]
    A_P = fold(lora_A, basis, complement, x.dtype)
    down, up = A_P, (scale * lora_B).to(x.dtype)
    if frozen_A is not None and frozen_B is not None:
        down = torch.cat([down, frozen_A.to(x.dtype)])
        up = torch.cat([up, (-scale * frozen_B).to(x.dtype)], dim=1)
    h = torch.empty((tokens.shape[0], down.shape[0]), dtype=x.dtype)
    if dropout == 0.0:
        y = _product(tokens, weight, up, h, down=down, bias=bias)
    else:
        _product(dropped(tokens, dropout, seed), None, None, h[:, :r], down=down[:r])
        if down.shape[0] > r:
            _product(tokens, None, None, h[:, r:], down=down[r:])
        y = _product(tokens, weight, up, h, bias=bias)
    shape = x.shape[:-1]
    return y.view(*shape, y.shape[1]), h[:, :r].contiguous().view(*shape, r), A_P


def backward(
    dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A_P: torch.Tensor, layer: reference.Layer, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, tokens = rows(dy), rows(x)
    if not uses_own_product(x.dtype, len(tokens), layer.dropout):
        return reference.backward(dy, x, h, A_P, layer, needs, fold)
    weight, lora_A, lora_B, basis, complement, scale, frozen_A, frozen_B, dropout, seed = layer
    needs_x, needs_A, needs_B = needs
    dx, dA, dB = (dy.new_empty(0) for _ in needs)
    r, dtype = lora_A.shape[0], x.dtype
    down, up = (scale * lora_B).to(dtype).T, A_P.T
    r0, frozen_down, frozen_up = 0, None, None
    if frozen_A is not None and frozen_B is not None:
        r0, frozen_down, frozen_up = frozen_A.shape[0], (-scale * frozen_B).to(dtype).T, frozen_A.to(dtype).T
    dh = torch.empty((len(grad), r + r0), dtype=dtype)
    if needs_x and dropout == 0.0:
        if frozen_down is not None and frozen_up is not None:
            down, up = torch.cat([down, frozen_down]), torch.cat([up, frozen_up], dim=1)
        dx = _product(grad, weight.T, up, dh, down=down)
    else:
        _product(grad, None, None, dh[:, :r], down=down)
    dh = dh[:, :r]
    if needs_x and dropout > 0.0:
        virtual = None if frozen_down is None else torch.empty((len(grad), r0), dtype=dtype)
        dx = _product(grad, weight.T, frozen_up, virtual, down=frozen_down)
        # Dropout's derivative is the same mask and factor, applied to the adapter's share of the gradient.
        share = _product(dh, up, None, None)
        _drop(share, dx, dropout, seed, accumulate=True)
    if needs_A:
        wide = torch.empty(lora_A.shape, dtype=compute_dtype(lora_A.dtype, dtype))
        _outer(dh, dropped(tokens, dropout, seed) if dropout else tokens, wide, 1.0)
        dA = fold(wide, basis, complement, lora_A.dtype)
    if needs_B:
        dB = torch.empty(lora_B.shape, dtype=lora_B.dtype)
        _outer(rows(h), grad, dB.T, scale)
    return dx.view(x.shape) if needs_x else dx, dA, dB


register("projected_lora", accepts, forward=forward, backward=backward)
