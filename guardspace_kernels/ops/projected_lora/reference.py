"""Projected LoRA in plain PyTorch: the oracle. P is folded into A and never meets a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from guardspace_kernels.ops._library import rows
from guardspace_kernels.ops.null_projection.reference import project


class Layer(NamedTuple):
    """What forward and backward have in common; see the op for the meanings."""

    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    basis: torch.Tensor | None
    complement: bool
    scale: float
    frozen_A: torch.Tensor | None
    frozen_B: torch.Tensor | None
    dropout: float
    seed: torch.Tensor | None
    output_sizes: Sequence[int] | None = None


def spread(lora_B: torch.Tensor, output_sizes: Sequence[int] | None) -> torch.Tensor:
    """(d_out, r) with the B of every part below the other, as the block diagonal (d_out, parts · r)."""
    return lora_B if output_sizes is None else torch.block_diag(*lora_B.split(list(output_sizes)))


def gather(dB: torch.Tensor, output_sizes: Sequence[int] | None) -> torch.Tensor:
    """The diagonal blocks of (d_out, parts · r), one below the other: (d_out, r)."""
    if output_sizes is None:
        return dB
    rank = dB.shape[1] // len(output_sizes)
    blocks = dB.split(list(output_sizes))
    return torch.cat([block[:, i * rank : (i + 1) * rank] for i, block in enumerate(blocks)])


def fold(lora_A: torch.Tensor, basis: torch.Tensor | None, complement: bool, dtype: torch.dtype) -> torch.Tensor:
    """``A_P = A P`` (r, d_in), formed in at least float32; a contiguous tensor of its own even without a basis."""
    if basis is None:
        return lora_A.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return project(lora_A, basis, complement).to(dtype).contiguous()


def dropped(x: torch.Tensor, dropout: float, seed: torch.Tensor | None) -> torch.Tensor:
    """Dropout whose mask is a function of the seed alone, so that backward rebuilds it instead of storing it."""
    if dropout == 0.0 or seed is None:
        return x
    generator = torch.Generator(device=x.device).manual_seed(int(seed.item()))
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= dropout
    return torch.where(keep, x / (1.0 - dropout), x.new_zeros(()))


def forward(
    x: torch.Tensor, bias: torch.Tensor | None, layer: Layer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, A_P) with h = drop(x) A_Pᵀ of shape (..., r) and A_P in the dtype of x."""
    weight, lora_A, lora_B, basis, complement, scale, frozen_A, frozen_B, dropout, seed, sizes = layer
    A_P = fold(lora_A, basis, complement, x.dtype)
    h = F.linear(dropped(x, dropout, seed), A_P)
    y = _plus_product(F.linear(x, weight, bias), h, scale * spread(lora_B, sizes).T)
    if frozen_A is not None and frozen_B is not None:
        y = _plus_product(y, F.linear(x, frozen_A.to(x.dtype)), -scale * spread(frozen_B, sizes).T)
    return y, h, A_P


def _plus_product(y: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``y + left @ right`` in y's memory and dtype, rounded once; y is (..., d), left (..., r), right (r, d)."""
    y.view(y.shape[:-1].numel(), y.shape[-1]).addmm_(rows(left), right.to(y.dtype))
    return y


def backward(
    dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A_P: torch.Tensor, layer: Layer, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dA, dB); an empty tensor for each that ``needs`` = [x, A, B] does not ask for."""
    weight, lora_A, lora_B, basis, complement, scale, frozen_A, frozen_B, dropout, seed, sizes = layer
    needs_x, needs_A, needs_B = needs
    dx, dA, dB = (dy.new_empty(0) for _ in needs)
    dh = dy @ (scale * spread(lora_B, sizes)).to(x.dtype)
    if needs_x:
        dx = torch.matmul(dy, weight)
        # Dropout's derivative is the same mask and factor, applied to the adapter's share of the gradient.
        dx = dx + dropped(dh @ A_P, dropout, seed) if dropout else _plus_product(dx, dh, A_P)
        if frozen_A is not None and frozen_B is not None:
            dx = _plus_product(dx, dy @ (-scale * spread(frozen_B, sizes)).to(x.dtype), frozen_A)
    if needs_A:
        dA_P = rows(dh).T @ rows(dropped(x, dropout, seed))
        dA = fold(dA_P, basis, complement, lora_A.dtype)
    if needs_B:
        dB = gather(rows(dy).T @ rows(h), sizes)
        dB = (dB * scale).to(lora_B.dtype)
    return dx, dA, dB
