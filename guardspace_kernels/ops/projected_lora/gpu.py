"""Projected LoRA on a GPU: forward and backward in a few passes over x and dy, which each backend brings.

Dropout keeps an entry by a word of Philox whose counter is the entry's place and whose key is the seed, which the
kernels read on the device: forward and both gradients find the same mask, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from guardspace_kernels.ops._library import rows, unit_inner
from guardspace_kernels.ops.projected_lora import reference

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

    ``linear(x, weight, bias, h, up, dropped=0, dropout=None)`` is ``x Wᵀ + bias + h up``, with dropout's mask and
    factor on what the first ``dropped`` rows of up add. ``down(x, w, dropout, h=None)`` is ``drop(x) wᵀ`` in x's dtype
    and, given h and without dropout, ``hᵀ x`` in float32. ``outer(e, x, dropout=None)`` is ``eᵀ drop(x)`` in float32,
    ``fold(A, basis, complement, dtype)`` is ``A P``, and ``one_pass(dy, r)`` says whether ``down`` forms dh and dB.
    """

    linear: Callable[..., torch.Tensor]
    down: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    outer: Callable[..., torch.Tensor]
    fold: Callable[..., torch.Tensor]
    one_pass: Callable[[torch.Tensor, int], bool]


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
    """``x Wᵀ + bias + h up`` by PyTorch's products; what dropout applies to is added to y by ``tiles(…, y, …)``."""
    y = F.linear(x, weight, bias)
    if dropped < len(up):
        y.addmm_(h[:, dropped:], up[dropped:])
    if dropped:
        tiles(x[:, :0], weight[:, :0], None, h[:, :dropped], up[:dropped], y, dropped, dropout)
    return y


def _rows_of_up(scale: float, lora_B: torch.Tensor, layer: reference.Layer) -> torch.Tensor:
    """``(scale · B)ᵀ`` (r, d_out) in the dtype of x: with contiguous rows it serves ``h up`` and ``dy upᵀ``."""
    B = reference.spread(lora_B, layer.output_sizes)
    return torch.mul(B.T, scale, out=B.new_empty(B.T.shape, dtype=layer.weight.dtype))


def forward(
    passes: Passes, x: torch.Tensor, bias: torch.Tensor | None, layer: reference.Layer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, lora_A, lora_B, basis, complement, scale, frozen_A, frozen_B, dropout, seed, _ = layer
    tokens, r, dtype = unit_inner(rows(x)), lora_A.shape[0], x.dtype
    A_P = passes.fold(lora_A, basis, complement, dtype)
    down, up = A_P, _rows_of_up(scale, lora_B, layer)
    if frozen_A is not None and frozen_B is not None:
        down = torch.cat([A_P, frozen_A.to(dtype)])
        up = torch.cat([up, _rows_of_up(-scale, frozen_B, layer)])
    if dropout == 0.0:
        h = F.linear(tokens, down)
    else:  # the frozen pair, if there is one, takes x as it is
        h, _ = passes.down(tokens, A_P, dropout_of(dropout, seed, x.device))
        if len(down) > r:
            h = torch.cat([h, F.linear(tokens, down[r:])], dim=1)
    y = passes.linear(tokens, weight, bias, h, up)
    shape = x.shape[:-1]
    return y.view(*shape, y.shape[1]), h[:, :r].contiguous().view(*shape, r), A_P


def backward(
    passes: Passes,
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    A_P: torch.Tensor,
    layer: reference.Layer,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, lora_A, lora_B, basis, complement, scale, frozen_A, frozen_B, dropout, seed, sizes = layer
    grad, h, A_P, r = unit_inner(rows(dy)), unit_inner(rows(h)), unit_inner(A_P), lora_A.shape[0]
    drop = dropout_of(dropout, seed, x.device)
    needs_x, needs_A, needs_B = needs
    dx, dA, dB, dh = (dy.new_empty(0) for _ in range(4))
    up, down = A_P, _rows_of_up(scale, lora_B, layer)
    if needs_x and frozen_A is not None and frozen_B is not None:
        up = torch.cat([A_P, frozen_A.to(x.dtype)])
        down = torch.cat([down, _rows_of_up(-scale, frozen_B, layer)])
    if needs_B and (needs_x or needs_A) and passes.one_pass(grad, r):
        dh, dB = passes.down(grad, down, dropout_of(0.0, None, x.device), h)
    else:
        if needs_x or needs_A:
            dh = F.linear(grad, down)
        if needs_B:
            dB = passes.outer(h, grad)
    if needs_x:
        dx = passes.linear(grad, weight.T, None, dh, up, r if dropout else 0, drop).view(x.shape)
    if needs_A:
        dA = passes.fold(passes.outer(dh[:, :r], unit_inner(rows(x)), drop), basis, complement, lora_A.dtype)
    if needs_B:
        dB = torch.mul(reference.gather(dB.T, sizes), scale, out=lora_B.new_empty(lora_B.shape))
    return dx, dA, dB
