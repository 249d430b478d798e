"""Null-space projection, and AdamW between two of them, by Triton: a few launches for all matrices of a model.

A projection takes two: the first forms ``H = G basis``, the second ``G − H basisᵀ`` or ``H basisᵀ``; each reads every
basis once, blocks of rows that share it side by side. Where the matrices are too few to fill the chip the first one
splits d into slices, which are summed in one order: the same call gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from guardspace_kernels.ops._triton_launch import blocks, choose, launch_items, locate
from guardspace_kernels.ops._triton_table import Row
from guardspace_kernels.ops.null_projection import gpu
from guardspace_kernels.ops.null_projection.gpu import Item, as_read
from guardspace_kernels.ops.null_projection.reference import Update

_PROGRAMS = 256  # about two for each multiprocessor of a large chip
_MOST_SLICES = 8


@triton.jit
def onto_basis(
    G, BASIS, r, d, k, stride_g, stride_b, h, TABLE, n, H, slices, stride_h,
    GROUPED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``H[slice] = G[:, slice] basis[slice]``, (r, k) for each slice of d, from ``H[slice] + h`` on."""
    pid = tl.program_id(0)
    if GROUPED:
        item = locate(TABLE, n, pid, 9)
        G, BASIS = tl.load(item).to(G.dtype), tl.load(item + 1).to(BASIS.dtype)
        r, d, k = tl.load(item + 2).to(tl.int32), tl.load(item + 3).to(tl.int32), tl.load(item + 4).to(tl.int32)
        stride_g, stride_b, h = tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)
        pid -= tl.load(item + 8).to(tl.int32)
        if ALIGNED:
            G, d, stride_g = tl.multiple_of(G, 16), tl.multiple_of(d, 16), tl.multiple_of(stride_g, 16)
    blocks_r = tl.cdiv(r, BLOCK_R)
    part = pid // blocks_r % slices
    i = (pid % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    j = (pid // blocks_r // slices) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(part * BLOCK_D, d, slices * BLOCK_D):
        m = start + tl.arange(0, BLOCK_D)
        g = tl.load(G + i.to(tl.int64) * stride_g + m, mask=(i < r) & (m < d), other=0.0)
        b = tl.load(BASIS + m[:, None].to(tl.int64) * stride_b + j, mask=(m[:, None] < d) & (j < k), other=0.0)
        total = tl.dot(g.to(tl.float32), b, total, input_precision=PRECISION)
    tl.store(H + part * stride_h + h + i.to(tl.int64) * k + j, total, mask=(i < r) & (j < k))


@triton.jit
def _times_basis(
    H, BASIS, i, m, r, d, k, stride_b, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The entries (i, m) of ``H basisᵀ``."""
    total = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        onto = tl.load(H + i.to(tl.int64) * k + j, mask=(i < r) & (j < k), other=0.0)
        b = tl.load(BASIS + m[:, None].to(tl.int64) * stride_b + j, mask=(m[:, None] < d) & (j < k), other=0.0)
        total = tl.dot(onto, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def from_basis(
    G, OUT, BASIS, r, d, k, stride_g, stride_out, stride_b, complement, h, TABLE, n, H,
    GROUPED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``OUT = G − H basisᵀ``, or ``H basisᵀ``."""
    pid = tl.program_id(0)
    if GROUPED:
        item = locate(TABLE, n, pid, 12)
        G, OUT, BASIS = tl.load(item).to(G.dtype), tl.load(item + 1).to(OUT.dtype), tl.load(item + 2).to(BASIS.dtype)
        r, d, k = tl.load(item + 3).to(tl.int32), tl.load(item + 4).to(tl.int32), tl.load(item + 5).to(tl.int32)
        stride_g, stride_out, stride_b = tl.load(item + 6), tl.load(item + 7), tl.load(item + 8)
        complement, h = tl.load(item + 9).to(tl.int32), tl.load(item + 10)
        pid -= tl.load(item + 11).to(tl.int32)
        if ALIGNED:
            G, OUT, d = tl.multiple_of(G, 16), tl.multiple_of(OUT, 16), tl.multiple_of(d, 16)
            stride_g, stride_out = tl.multiple_of(stride_g, 16), tl.multiple_of(stride_out, 16)
    blocks_r = tl.cdiv(r, BLOCK_R)
    i = (pid % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    m = (pid // blocks_r) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (i < r) & (m < d)
    result = _times_basis(H + h, BASIS, i, m, r, d, k, stride_b, BLOCK_R, BLOCK_K, BLOCK_D, PRECISION)
    if complement != 0:
        result = tl.load(G + i.to(tl.int64) * stride_g + m, mask=inside, other=0.0).to(tl.float32) - result
    tl.store(OUT + i.to(tl.int64) * stride_out + m, result.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _bias_correction(step, log_beta):
    """``1 − betaᵗ``, which cancels in float32 for the first steps of a beta near one: there its power series."""
    y = step * log_beta
    series = 1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7)))))
    return tl.where(y > -0.35, -y * series, 1 - tl.exp(y))


@triton.jit
def adamw_from_basis(
    G, A, M, V, STEP, BASIS, r, d, k, stride_g, stride_a, stride_m, stride_v, stride_b, complement, h, TABLE, n, H,
    lr, decay, eps, rest1, rest2, log_beta1, log_beta2,
    GROUPED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As ``from_basis``, but what AdamW makes of the projected gradient is written, to A, M and V."""
    pid = tl.program_id(0)
    if GROUPED:
        item = locate(TABLE, n, pid, 17)
        G, A = tl.load(item).to(G.dtype), tl.load(item + 1).to(A.dtype)
        M, V = tl.load(item + 2).to(M.dtype), tl.load(item + 3).to(V.dtype)
        STEP, BASIS = tl.load(item + 4).to(STEP.dtype), tl.load(item + 5).to(BASIS.dtype)
        r, d, k = tl.load(item + 6).to(tl.int32), tl.load(item + 7).to(tl.int32), tl.load(item + 8).to(tl.int32)
        stride_g, stride_a, stride_m = tl.load(item + 9), tl.load(item + 10), tl.load(item + 11)
        stride_v, stride_b = tl.load(item + 12), tl.load(item + 13)
        complement, h = tl.load(item + 14).to(tl.int32), tl.load(item + 15)
        pid -= tl.load(item + 16).to(tl.int32)
        if ALIGNED:
            G, A, M, V = tl.multiple_of(G, 16), tl.multiple_of(A, 16), tl.multiple_of(M, 16), tl.multiple_of(V, 16)
            stride_g, stride_a = tl.multiple_of(stride_g, 16), tl.multiple_of(stride_a, 16)
            stride_m, stride_v, d = tl.multiple_of(stride_m, 16), tl.multiple_of(stride_v, 16), tl.multiple_of(d, 16)
    blocks_r = tl.cdiv(r, BLOCK_R)
    i = (pid % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    m = (pid // blocks_r) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (i < r) & (m < d)
    g = _times_basis(H + h, BASIS, i, m, r, d, k, stride_b, BLOCK_R, BLOCK_K, BLOCK_D, PRECISION)
    i = i.to(tl.int64)
    if complement != 0:
        g = tl.load(G + i * stride_g + m, mask=inside, other=0.0).to(tl.float32) - g
    first = tl.load(M + i * stride_m + m, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(V + i * stride_v + m, mask=inside, other=0.0).to(tl.float32)
    first += rest1 * (g - first)  # 1 − beta, which float32 would round
    second += rest2 * (g * g - second)
    tl.store(M + i * stride_m + m, first.to(M.dtype.element_ty), mask=inside)
    tl.store(V + i * stride_v + m, second.to(V.dtype.element_ty), mask=inside)
    step = tl.load(STEP)
    step_size = lr / _bias_correction(step, log_beta1)
    denominator = tl.sqrt(second / _bias_correction(step, log_beta2)) + eps
    a = tl.load(A + i * stride_a + m, mask=inside, other=0.0).to(tl.float32)
    a = decay * a - step_size * first / denominator
    tl.store(A + i * stride_a + m, a.to(A.dtype.element_ty), mask=inside)


def _rows(kernel: str, matrices: list[torch.Tensor]) -> list[Row]:
    by_rank = {r: choose(kernel, matrices[0].device, (r,)) for r in {len(matrix) for matrix in matrices}}
    return [by_rank[len(matrix)] for matrix in matrices]


def _programs(row: Row, r: int, block: str, size: int) -> int:
    return blocks(r, row.constants["BLOCK_R"]) * blocks(size, row.constants[block])


def _onto_bases(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, list[int], Callable[[], torch.Tensor] | None]:
    """``H = G basis`` of all pairs, one after the other; where each begins; what forms H again, if that can be."""
    chosen = _rows("null_projection.onto_basis", [g for g, _ in pairs])
    programs = [_programs(row, g.shape[0], "BLOCK_K", b.shape[1]) for row, (g, b) in zip(chosen, pairs, strict=True)]
    blocks_d = max(blocks(g.shape[1], row.constants["BLOCK_D"]) for row, (g, _) in zip(chosen, pairs, strict=True))
    slices = max(1, min(_MOST_SLICES, blocks_d, _PROGRAMS // max(1, sum(programs))))
    items, offsets, offset = [], [], 0
    for row, count, (g, basis) in zip(chosen, programs, pairs, strict=True):
        (r, d), k = g.shape, basis.shape[1]
        item = {
            "G": g, "BASIS": basis, "r": r, "d": d, "k": k, "stride_g": g.stride(0), "stride_b": basis.stride(0),
            "h": offset,
        }  # fmt: skip
        items.append((row, count * slices, item))
        offsets.append(offset)
        offset += blocks(r * k, 16) * 16
    options: dict[str, Any] = {"dtype": torch.float32, "device": pairs[0][0].device}
    H = torch.empty((slices, offset), **options)
    launches = launch_items(onto_basis, items, {"H": H, "slices": slices, "stride_h": offset})
    if launches is None:
        return _summed(H), offsets, None

    def again() -> torch.Tensor:
        H = torch.empty((slices, offset), **options)
        for launch in launches:
            launch(H=H)
        return _summed(H)

    return _summed(H), offsets, again


def _summed(H: torch.Tensor) -> torch.Tensor:
    return H[0] if len(H) == 1 else H.sum(0)


def _back(
    kernel: Any, launches: list[Any], H: torch.Tensor, form: Callable[[], torch.Tensor] | None, shared: dict[str, Any]
) -> Callable[..., None] | None:
    """Launches what reads H, and gives a function that does all again, with other ``shared`` arguments than now."""
    made = launch_items(kernel, launches, {"H": H, **shared})
    if form is None or made is None:
        return None

    def again(**changed: Any) -> None:
        H = form()
        for launch in made:
            launch(H=H, **changed)

    return again


def project(items: Sequence[Item]) -> Callable[[], None] | None:
    """``out ← g P`` for matrices g, out (r, d) whose rows are contiguous, and a basis (d, k) of any dtype.

    Returns what does it again for the same addresses; None if nothing can.
    """
    if not items:
        return None
    items = [(g, out, as_read(basis), complement) for g, out, basis, complement in items]
    H, offsets, form = _onto_bases([(g, basis) for g, _, basis, _ in items])
    chosen = _rows("null_projection.from_basis", [g for g, *_ in items])
    launches = []
    for row, (g, out, basis, complement), h in zip(chosen, items, offsets, strict=True):
        r, d = g.shape
        item = {
            "G": g, "OUT": out, "BASIS": basis, "r": r, "d": d, "k": basis.shape[1], "stride_g": g.stride(0),
            "stride_out": out.stride(0), "stride_b": basis.stride(0), "complement": int(complement), "h": h,
        }  # fmt: skip
        launches.append((row, _programs(row, r, "BLOCK_D", d), item))
    return _back(from_basis, launches, H, form, {})


def _adamw(updates: list[Update], flats: list[list[torch.Tensor]]) -> Callable[..., None] | None:
    """M, V and A of AdamW by the projected gradients; A is not projected yet. ``flats`` are A, G, M, V as matrices."""
    H, offsets, form = _onto_bases([(g, u.basis) for (_, g, *_), u in zip(flats, updates, strict=True)])
    chosen = _rows("null_projection.adamw_from_basis", [a for a, *_ in flats])
    launches = []
    for row, update, (a, g, m, v), h in zip(chosen, updates, flats, offsets, strict=True):
        (r, d), basis = a.shape, update.basis
        item = {
            "G": g, "A": a, "M": m, "V": v, "STEP": update.step, "BASIS": basis, "r": r, "d": d, "k": basis.shape[1],
            "stride_g": g.stride(0), "stride_a": a.stride(0), "stride_m": m.stride(0), "stride_v": v.stride(0),
            "stride_b": basis.stride(0), "complement": int(update.complement), "h": h,
        }  # fmt: skip
        launches.append((row, _programs(row, r, "BLOCK_D", d), item))
    return _back(adamw_from_basis, launches, H, form, _arguments_of(*updates[0].settings))


def _arguments_of(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> dict[str, float]:
    numbers = {"lr": lr, "decay": 1 - lr * weight_decay, "eps": eps, "rest1": 1 - beta1, "rest2": 1 - beta2}
    return {**numbers, "log_beta1": _log(beta1), "log_beta2": _log(beta2)}


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _adamw_and_project(updates: list[Update], flats: list[list[torch.Tensor]]) -> Callable[..., None] | None:
    step = _adamw(updates, flats)
    back = project([(a, a, u.basis, u.complement) for u, (a, *_) in zip(updates, flats, strict=True)])
    if step is None or back is None:
        return None

    def again(*settings: float) -> None:
        step(**_arguments_of(*settings))
        back()

    return again


null_project_ = partial(gpu.null_project_, project)
projected_adamw_ = partial(gpu.projected_adamw_, _adamw_and_project)
