"""Projected LoRA by PyTorch's own products, on any device."""

from __future__ import annotations

import torch

from guardspace_kernels import dispatch
from guardspace_kernels.ops.null_projection.reference import project
from guardspace_kernels.ops.projected_lora.algebra import Dropout, Primitives


def linear(
    x: torch.Tensor,
    M: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    N: torch.Tensor,
    dropped: int = 0,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    y = torch.mm(x, M) if bias is None else torch.addmm(bias, x, M)
    if dropout is None:
        return y.addmm_(h, N)
    y.add_(masked(torch.mm(h[:, :dropped], N[:dropped]), dropout))
    return y.addmm_(h[:, dropped:], N[dropped:])


def down(x: torch.Tensor, M: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
    return torch.mm(masked(x, dropout), M)


def outer(
    e: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    dropout: Dropout | None = None,
    transposed: bool = False,
) -> None:
    product = torch.mm(e[:, : out.size(int(transposed))].t(), masked(x, dropout)).to(out.dtype).mul_(scale)
    out.copy_(product.t() if transposed else product)


def fold(A: torch.Tensor, basis: torch.Tensor, complement: bool, out: torch.Tensor) -> None:
    out.copy_(project(A, basis, complement))


def masked(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Dropout whose mask is a function of the seed alone, so that backward rebuilds it instead of storing it."""
    if dropout is None:
        return x
    generator = torch.Generator(device=x.device).manual_seed(int(dropout.seed.item()))
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= dropout.p
    return torch.where(keep, x / (1.0 - dropout.p), x.new_zeros(()))


_PRIMITIVES = Primitives(linear, down, outer, fold)


def primitives() -> Primitives:
    return _PRIMITIVES


dispatch.register("projected_lora", "reference", primitives=primitives)
