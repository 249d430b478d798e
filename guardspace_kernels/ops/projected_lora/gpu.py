"""Projected LoRA on a GPU: what the Triton and CUDA kernels have in common, and where PyTorch's products are taken.

Dropout keeps an entry by a word of Philox whose counter is the entry's place and whose key is the seed, which the
kernels read on the device: forward and both gradients find the same mask, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from guardspace_kernels.ops._library import unit_inner
from guardspace_kernels.ops.projected_lora import algebra
from guardspace_kernels.ops.projected_lora.algebra import Primitives

FEW = 64  # tokens: fewer do not fill a tile, and the library splits K for them


class Dropout(NamedTuple):
    seed: torch.Tensor
    threshold: int  # of the upper 31 bits of a word
    factor: float


def dropout_of(p: float, seed: torch.Tensor | None, device: torch.device) -> Dropout:
    if p == 0.0 or seed is None:
        return Dropout(torch.empty(0, dtype=torch.int64, device=device), 0, 1.0)
    if seed.device != device:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"projected_lora: seed is on {seed.device}, and a CUDA graph would drop the same entries in every "
                f"replay; pass a tensor on {device} and change it in place between replays"
            )
        seed = seed.to(device, non_blocking=True)
    return Dropout(seed, min(round(p * 2**31), 2**31 - 1), 1.0 / (1.0 - p))


@dataclass
class Passes:
    """What a backend does.

    ``linear(x, weight, bias, h, up, dropped, dropout)`` is ``x Wᵀ + bias + h up``, with dropout's mask and
    factor on what the first ``dropped`` rows of up add. ``down(x, w, dropout, h=None)`` is ``drop(x) wᵀ`` in x's dtype
    and, given h and without dropout, ``hᵀ x`` in float32. ``outer(e, x, dropout)`` is ``eᵀ drop(x)`` in float32,
    ``fold(A, basis, complement, out)`` writes ``A P``, and ``one_pass(dy, r)`` says whether ``down`` forms dh and dB.
    """

    linear: Callable[..., torch.Tensor]
    down: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    outer: Callable[..., torch.Tensor]
    fold: Callable[..., None]
    one_pass: Callable[[torch.Tensor, int], bool]


# Of tokens: below it the host limits a layer, and PyTorch's product takes less of it than a launch of ours.
OWN_OUTER_FROM = 4096


def primitives(passes: Passes) -> Primitives:
    """A backend's passes as what the algebra is made of."""

    def linear(
        x: torch.Tensor,
        M: torch.Tensor,
        bias: torch.Tensor | None,
        h: torch.Tensor,
        N: torch.Tensor,
        dropped: int = 0,
        dropout: algebra.Dropout | None = None,
    ) -> torch.Tensor:
        return passes.linear(unit_inner(x), M.t(), bias, h, N, dropped, on_device(dropout, x.device))

    def down(x: torch.Tensor, M: torch.Tensor, dropout: algebra.Dropout | None = None) -> torch.Tensor:
        if dropout is None:
            return torch.mm(x, M)
        return passes.down(unit_inner(x), unit_inner(M.t()), on_device(dropout, x.device))[0]

    def outer(
        e: torch.Tensor,
        x: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        dropout: algebra.Dropout | None = None,
        transposed: bool = False,
    ) -> None:
        e = e[:, : out.size(int(transposed))]
        if dropout is None and len(x) < OWN_OUTER_FROM and out.dtype is x.dtype:
            left, right = (x, e) if transposed else (e, x)
            out.addmm_(left.t(), right, beta=0, alpha=scale)  # one launch, which does not read what is there
            return
        if dropout is None and len(x) < OWN_OUTER_FROM:
            product = torch.mm(x.t(), e) if transposed else torch.mm(e.t(), x)
        else:
            product = passes.outer(unit_inner(e), unit_inner(x), on_device(dropout, x.device))
            product = product.t() if transposed else product
        if scale == 1.0:
            out.copy_(product)
        else:
            torch.mul(product, scale, out=out)

    def down_outer(x: torch.Tensor, M: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        if len(x) < OWN_OUTER_FROM or not passes.one_pass(x, e.shape[1]):
            return None
        return passes.down(unit_inner(x), unit_inner(M.t()), on_device(None, x.device), unit_inner(e))

    return Primitives(linear, down, outer, lambda *arguments: passes.fold(*arguments), down_outer)


def on_device(dropout: algebra.Dropout | None, device: torch.device) -> Dropout:
    return dropout_of(0.0, None, device) if dropout is None else dropout_of(dropout.p, dropout.seed, device)


def library_from(dtype: torch.dtype, tokens: int, chip: str) -> int:
    """The number of products in a sum from which PyTorch's product and ``addmm_`` are taken for the base product.

    In 16 bits on an H100 they were faster than either kernel at every size that was timed, K = 256 to 4096 (8192
    tokens, 512 to 4096 outputs): 1.02 to 1.6 times. For other chips nothing was timed, and peaks are weighed: a kernel
    with the update inside saves writing and reading y once more, a share 2·peak/(bandwidth·K) of the product's time:
    306/K on an A100, 562/K on a B200, 493/K on an MI300X. That is taken to outweigh the library's lead where mma.sync
    feeds the tensor cores, which compiled kernels use as well as the library (15% at K = 2048), and up to half that K
    elsewhere (48% and more). Three products of TF32 outrun one of float32, but not one of TF32 where the user allows
    those.
    """
    if tokens < FEW:
        return 0
    if dtype == torch.float32 and chip.startswith("sm"):
        return 0 if allows_tf32() else 2**31
    return {"sm80": 2049, "sm89": 2049, "sm90": 0, "sm120": 2049}.get(chip, 1025)


def allows_tf32() -> bool:
    settings = torch.backends.cuda.matmul
    # From torch 2.9 on reading the older setting raises where the two differ.
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32


def by_library(
    tiles: Callable[..., object],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    up: torch.Tensor,
    dropped: int,
    dropout: Dropout,
) -> torch.Tensor:
    """``x Wᵀ + bias + h up`` by PyTorch's products; what dropout applies to is added to y by ``tiles``."""
    y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    if not dropped:
        return y.addmm_(h, up)
    if dropped < len(up):
        y.addmm_(h[:, dropped:], up[dropped:])
    tiles(x[:, :0], weight[:, :0], None, h[:, :dropped], unit_inner(up[:dropped]), y, dropped, dropout)
    return y
