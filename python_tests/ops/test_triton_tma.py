"""The base product that reads through TMA descriptors, under Triton's interpreter, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import automatic, triton_kernels  # noqa: F401
from oracle import assert_as_exact_as_plain

from guardspace_kernels.ops import _triton_table

pytest.importorskip("triton_interpreter", reason="Triton is not installed")
triton_tma = pytest.importorskip("guardspace_kernels.ops.projected_lora.triton_tma")

pytestmark = [automatic, pytest.mark.usefixtures("triton_kernels")]

ROWS = [row for row in _triton_table.ROWS if row.kernel == "projected_lora.linear_tma"]
SMALL = replace(ROWS[0], constants={**ROWS[0].constants, "BLOCK_T": 16, "BLOCK_N": 32, "BLOCK_K": 16, "BLOCK_R": 16})


def operands(T, K, N, R, dtype, by_rows=False):
    """x, W, bias, h and up; W and up as they are, or the transposes of what is stored."""
    x, W, bias, h, up = (torch.randn(*shape).to(dtype) for shape in ((T, K), (K, N), (N,), (T, R), (R, N)))
    return (x, W.T.contiguous().T, bias, h, up.T.contiguous().T) if by_rows else (x, W, bias, h, up)


def product(x, W, bias, h, up):
    y = x @ W + h @ up
    return y if bias is None else y + bias


def assert_exact(row, *arguments):
    double = [None if t is None else t.double() for t in arguments]
    ours = triton_tma.linear(row, *arguments)
    assert ours.dtype == arguments[0].dtype and ours.is_contiguous()
    assert_as_exact_as_plain(ours, product(*arguments), product(*double))


@pytest.mark.parametrize("by_rows", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.targets[0]} {row.key}")
def test_rows_of_the_table(row, by_rows):
    assert_exact(row, *operands(140, 72, 264, 24, torch.bfloat16, by_rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_rows", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize(
    "T, K, N, R",
    [(70, 40, 72, 24), (1, 16, 32, 8), (16, 8, 8, 40), (300, 32, 64, 16)],
    ids=["ragged", "one token", "narrow", "more tiles than programs"],
)
def test_sizes(T, K, N, R, by_rows, dtype):
    assert_exact(SMALL, *operands(T, K, N, R, dtype, by_rows))


def test_without_a_bias_and_beside_other_columns():
    x, W, _, h, up = operands(40, 32, 48, 16, torch.float16)
    wide = torch.full((40, 64), torch.nan).half()
    wide[:, 8:40] = x
    assert_exact(SMALL, wide[:, 8:40], W, None, h, up)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"x": lambda x: x.float()}, "x is torch.float32; the TMA kernel multiplies 16-bit numbers"),
        ({"x": lambda x: x[:0]}, "x is empty"),
        ({"x": lambda x: x[:, 1:]}, r"x, stored as \(40, 31\), has strides \(32, 1\) and starts at 0x"),
        ({"h": lambda h: h[:, ::2]}, r"h, stored as \(40, 8\), has strides \(16, 2\) and starts at 0x"),
        ({"up": lambda up: up[:, :44].contiguous()}, r"up, stored as \(16, 44\), has strides \(44, 1\)"),
        ({"up": lambda up: up.T.contiguous().T}, r"up, stored as \(16, 48\), has .* in the same orientation"),
        ({"up": lambda up: up[:0]}, "up is empty"),
        ({"W": lambda W: W[:, :44]}, "y has 44 columns; with a multiple of 8"),
    ],
)
def test_what_no_descriptor_takes_is_refused(change, reason):
    names = ("x", "W", "bias", "h", "up")
    arguments = dict(zip(names, operands(40, 32, 48, 16, torch.float16), strict=True))
    arguments |= {name: make(arguments[name]) for name, make in change.items()}
    with pytest.raises(ValueError, match=f"projected_lora by TMA: {reason}"):
        triton_tma.linear(SMALL, *arguments.values())


def test_a_specialised_row_takes_one_tile_of_the_update():
    row = next(row for row in ROWS if row.constants["SPECIALIZE"])
    with pytest.raises(ValueError, match="the update has rank 40; a specialised row takes 32 at most"):
        triton_tma.linear(row, *operands(8, 16, 16, 40, torch.float16))
