"""The base product with the rank-r update in its epilogue, by a persistent Triton kernel that reads through TMA.

Nothing chooses it yet. On the chips that it is for ``gpu.library_from`` takes PyTorch's product, until a measurement
(``python -m benchmarks.gpu_run``) says otherwise.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from guardspace_kernels.ops._triton_launch import blocks, launch
from guardspace_kernels.ops._triton_table import KERNELS, Row


@triton.jit
def _plus_update(total, H, UP, t, n, j, ROWS: tl.constexpr):
    if ROWS:
        total = tl.dot(H.load([t, j]), UP.load([n, j]).T, total)
    else:
        total = tl.dot(H.load([t, j]), UP.load([j, n]), total)
    return total


@triton.jit
def linear_tma(
    X, W, BIAS, H, UP, Y, T, N, K, R, programs, biased,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """``Y = X W + bias + H UP``; each program takes every ``programs``-th tile.

    W is (K, N) and UP is (R, N), or with ``ROWS`` the transposes of both. All but BIAS are descriptors: what lies
    outside of a matrix is read as zero and not written, so no tile needs a mask.
    """
    MOST: tl.constexpr = 8  # blocks of tokens share blocks of weights in the cache
    blocks_t, blocks_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_t * blocks_n, programs, warp_specialize=SPECIALIZE):
        first = tile // (MOST * blocks_n) * MOST
        tall = tl.minimum(blocks_t - first, MOST)
        inside = tile % (MOST * blocks_n)
        t = (first + inside % tall) * BLOCK_T
        n = inside // tall * BLOCK_N
        total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for step in tl.range(0, tl.cdiv(K, BLOCK_K)):
            k = step * BLOCK_K
            x = X.load([t, k])
            if ROWS:
                total = tl.dot(x, W.load([n, k]).T, total)
            else:
                total = tl.dot(x, W.load([k, n]), total)
        if SPECIALIZE:  # R ≤ BLOCK_R: of a specialised loop Triton 3.8 pipelines one inner loop, not two
            total = _plus_update(total, H, UP, t, n, 0, ROWS)
        else:
            for step in tl.range(0, tl.cdiv(R, BLOCK_R), num_stages=2):
                total = _plus_update(total, H, UP, t, n, step * BLOCK_R, ROWS)
        column = n + tl.arange(0, BLOCK_N)
        total += tl.load(BIAS + column, mask=(column < N) & (biased != 0), other=0.0).to(tl.float32)
        Y.store([t, n], total.to(Y.dtype))


def accepts(row: Row, x: torch.Tensor, weight: torch.Tensor, h: torch.Tensor, up: torch.Tensor) -> tuple[bool, str]:
    """Whether the kernel takes these operands of ``x weight + h up``, and why not."""
    if row.constants["SPECIALIZE"] and len(up) > row.constants["BLOCK_R"]:
        return False, f"the update has rank {len(up)}; a specialised row takes {row.constants['BLOCK_R']} at most"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False, f"x is {x.dtype}; the TMA kernel multiplies 16-bit numbers"
    by_rows = _by_rows(weight)
    stored = {"x": x, "weight": weight.T if by_rows else weight, "h": h, "up": up.T if by_rows else up}
    for name, matrix in stored.items():
        if not matrix.numel():
            return False, f"{name} is empty, and a descriptor needs a matrix"
        if matrix.stride(1) != 1 or matrix.stride(0) % 8 or matrix.data_ptr() % 16:
            return False, (
                f"{name}, stored as {tuple(matrix.shape)}, has strides {matrix.stride()} and starts at "
                f"{matrix.data_ptr():#x}; a descriptor needs adjacent columns, and rows that start at multiples of 16 "
                "bytes, of weight and up in the same orientation"
            )
    if weight.shape[1] % 8:
        return False, f"y has {weight.shape[1]} columns; with a multiple of 8 its rows start at multiples of 16 bytes"
    return True, "16-bit matrices whose rows start at multiples of 16 bytes"


def linear(
    row: Row, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """``x weight + bias + h up`` by a row of the table.

    Args:
        x: (T, K). weight: (K, N). bias: (N,). h: (T, R). up: (R, N). All of x's dtype, float16 or bfloat16. weight and
            up are row-major both, or both transposed views of such matrices.

    Raises:
        ValueError: what :func:`accepts` refuses.
    """
    ok, reason = accepts(row, x, weight, h, up)
    if not ok:
        raise ValueError(f"projected_lora by TMA: {reason}")
    (T, K), N, by_rows = x.shape, weight.shape[1], _by_rows(weight)
    y = x.new_empty((T, N))
    matrices = {"X": x, "W": weight.T if by_rows else weight, "H": h, "UP": up.T if by_rows else up, "Y": y}
    shapes = KERNELS[row.kernel].descriptors({**row.constants, "ROWS": by_rows})
    described = {name: TensorDescriptor.from_tensor(matrices[name], [*shape]) for name, shape in shapes.items()}
    tiles = blocks(T, row.constants["BLOCK_T"]) * blocks(N, row.constants["BLOCK_N"])
    programs = min(tiles, _processors(x.device))
    bias_at = y if bias is None else bias.contiguous()  # y is not read
    arguments = {
        "X": described["X"], "W": described["W"], "BIAS": bias_at, "H": described["H"], "UP": described["UP"],
        "Y": described["Y"], "T": T, "N": N, "K": K, "R": up.shape[0], "programs": programs,
        "biased": int(bias is not None),
    }  # fmt: skip
    launch(linear_tma, row, programs, arguments, ROWS=by_rows)
    return y


def _by_rows(weight: torch.Tensor) -> bool:
    """Whether (K, N) is the transpose of what is stored."""
    return weight.stride(1) != 1


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # of the interpreter: fewer than the tiles of a test
    return torch.cuda.get_device_properties(device).multi_processor_count
