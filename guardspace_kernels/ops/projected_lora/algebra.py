"""Forward and backward of projected LoRA over the few products that a backend brings.

Rows times right operands throughout: with x (T, d_in), ``down = [A P; A₀P]`` (r', d_in), ``up = [s·B | −s·B₀]``
(d_out, r') and r' = r, or 2r with a frozen pair,

    h = x downᵀ,   y = x Wᵀ + b + h upᵀ
    dh = dy up,    dx = dy W + dh down,   dA = (dh₁ᵀ x) P,   dB = s·dyᵀ h₁,

where h₁, dh₁ are the first r columns. Dropout acts on the x of h₁ and dA, and on what dh₁ adds to dx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from guardspace_kernels.ops._library import compute_dtype

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Dropout(NamedTuple):
    """An entry is dropped with probability p; seed, a 0-dimensional int64 tensor, determines which."""

    p: float
    seed: torch.Tensor


class Primitives(NamedTuple):
    """What a backend brings; every tensor is a matrix.

    ``linear(x, M, bias, h, N, dropped, dropout)`` is ``x M + bias + h N`` in x's dtype, with dropout's mask and factor
    on what the first ``dropped`` columns of h add. ``down(x, M, dropout)`` is ``drop(x) M`` in x's dtype.
    ``outer(e, x, out, scale, dropout, transposed)`` writes ``scale·eᵀ drop(x)`` to ``out``, or its transpose, where e
    has as many columns as ``out`` has rows (columns), or more, of which the first count.
    ``fold(A, basis, complement, out)`` writes ``A P``, formed in at least float32, to ``out``, which may be A.
    ``down_outer(x, M, e)`` is (``x M``, ``eᵀ x`` in float32) in one pass over x, or None where two are faster.
    ``down_linear(x, D, M, bias, N)`` is (``h = x D``, ``x M + bias + h N``); ``down`` and ``linear`` without it.
    ``layer_forward(x, A, B, factors, layer)`` is :func:`form` and :func:`forward` in one call, and
    ``layer_backward(dy, x, h, factors, A, B, layer, needs)`` is :func:`backward`, for x and dy (..., d); or None where
    single products are faster.
    """

    linear: Callable[..., torch.Tensor]
    down: Callable[..., torch.Tensor]
    outer: Callable[..., None]
    fold: Callable[[torch.Tensor, torch.Tensor, bool, torch.Tensor], None]
    down_outer: Callable[..., tuple[torch.Tensor, torch.Tensor] | None] | None = None
    down_linear: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    layer_forward: Callable[..., tuple[torch.Tensor, torch.Tensor] | None] | None = None
    layer_backward: Callable[..., Gradients | None] | None = None


class Layer(NamedTuple):
    """What forward and backward have in common beside x, A and B; see the op for the meanings."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    basis: torch.Tensor | None
    complement: bool
    scale: float
    frozen_A: torch.Tensor | None
    frozen_B: torch.Tensor | None
    dropout: Dropout | None = None
    output_sizes: Sequence[int] | None = None
    projected: bool = False


class Factors:
    """``down`` and ``up`` of a layer in the dtype of x, with the frozen pair in place; :func:`form` fills the rest."""

    __slots__ = ("A_P", "B", "down", "down_T", "rank", "scale", "up", "up_T")

    def __init__(self, A: torch.Tensor, B: torch.Tensor, layer: Layer, dtype: torch.dtype) -> None:
        rank, frozen = len(A), 0 if layer.frozen_A is None else len(layer.frozen_A)
        self.rank = rank
        # A number is made a tensor in every product.
        self.scale = torch.tensor(layer.scale, dtype=compute_dtype(B.dtype), device="cpu")
        self.down = A.new_empty((rank + frozen, A.shape[1]), dtype=dtype)
        self.up = B.new_empty((B.shape[0], rank + frozen), dtype=dtype)
        self.A_P, self.B = self.down[:rank], self.up[:, :rank]
        self.down_T, self.up_T = self.down.t(), self.up.t()
        if layer.frozen_A is not None and layer.frozen_B is not None:
            self.down[rank:] = layer.frozen_A
            torch.mul(spread(layer.frozen_B, layer.output_sizes), -self.scale, out=self.up[:, rank:])


def form(primitives: Primitives, factors: Factors, A: torch.Tensor, B: torch.Tensor, layer: Layer) -> None:
    """Writes ``A P`` and ``s·B`` into their places, each rounded once to the dtype of x."""
    if layer.basis is None or layer.projected:
        factors.A_P.copy_(A)
    else:
        primitives.fold(A, layer.basis, layer.complement, factors.A_P)
    torch.mul(B if layer.output_sizes is None else spread(B, layer.output_sizes), factors.scale, out=factors.B)


def forward(
    primitives: Primitives, x: torch.Tensor, factors: Factors, layer: Layer
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h) of x (T, d_in)."""
    if layer.dropout is None:
        if primitives.down_linear is not None:
            h, y = primitives.down_linear(x, factors.down_T, layer.weight.t(), layer.bias, factors.up_T)
            return y, h
        h = primitives.down(x, factors.down_T)
    else:
        h, rank = primitives.down(x, factors.down_T[:, : factors.rank], layer.dropout), factors.rank
        if len(factors.down) > rank:
            h = torch.cat([h, primitives.down(x, factors.down_T[:, rank:])], dim=1)
    return primitives.linear(x, layer.weight.t(), layer.bias, h, factors.up_T), h


def backward(
    primitives: Primitives,
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    factors: Factors,
    A: torch.Tensor,
    B: torch.Tensor,
    layer: Layer,
    needs: Sequence[bool],
) -> Gradients:
    """(dx, dA, dB), None for each that ``needs`` = (x, A, B) does not ask for; of h the first r columns are read."""
    needs_x, needs_A, needs_B = needs
    rank, dropout = factors.rank, layer.dropout
    dx = dA = dB = pair = None
    if needs_B and primitives.down_outer is not None:
        pair = primitives.down_outer(dy, factors.up, h[:, :rank])
    if pair is not None:
        dh, hTdy = pair
        dB = torch.mul(_rows_of_parts(hTdy.t(), layer.output_sizes), layer.scale, out=B.new_empty(B.shape))
    else:
        if needs_x and dropout is None and primitives.down_linear is not None:
            dh, dx = primitives.down_linear(dy, factors.up, layer.weight, None, factors.down)
        elif needs_x or needs_A:
            dh = primitives.down(dy, factors.up)
        if needs_B:
            dB = _gradient_of_B(primitives, dy, h, B, layer)
    if needs_x and dx is None:
        if dropout is None:
            dx = primitives.linear(dy, layer.weight, None, dh, factors.down)
        else:
            dx = primitives.linear(dy, layer.weight, None, dh, factors.down, rank, dropout)
    if needs_A:
        wide = compute_dtype(A.dtype, x.dtype)
        dA = torch.empty_like(A) if A.dtype is wide else torch.empty_like(A, dtype=wide)
        primitives.outer(dh, x, dA, 1.0, dropout)
        if layer.basis is not None:
            primitives.fold(dA, layer.basis, layer.complement, dA)
        if wide is not A.dtype:
            dA = dA.to(A.dtype)
    return dx, dA, dB


def _gradient_of_B(
    primitives: Primitives, dy: torch.Tensor, h: torch.Tensor, B: torch.Tensor, layer: Layer
) -> torch.Tensor:
    dB = torch.empty_like(B)
    if layer.output_sizes is None:
        primitives.outer(h, dy, dB, layer.scale, None, True)
        return dB
    rank, start = B.shape[1], 0
    for i, size in enumerate(layer.output_sizes):
        end = start + size
        primitives.outer(h[:, i * rank : (i + 1) * rank], dy[:, start:end], dB[start:end], layer.scale, None, True)
        start = end
    return dB


def spread(lora_B: torch.Tensor, output_sizes: Sequence[int] | None) -> torch.Tensor:
    """(d_out, r) with the B of every part below the other, as the block diagonal (d_out, parts · r)."""
    return lora_B if output_sizes is None else torch.block_diag(*lora_B.split(list(output_sizes)))


def _rows_of_parts(dB: torch.Tensor, output_sizes: Sequence[int] | None) -> torch.Tensor:
    """The diagonal blocks of (d_out, parts · r), one below the other: (d_out, r)."""
    if output_sizes is None:
        return dB
    rank = dB.shape[1] // len(output_sizes)
    blocks = dB.split(list(output_sizes))
    return torch.cat([block[:, i * rank : (i + 1) * rank] for i, block in enumerate(blocks)])
