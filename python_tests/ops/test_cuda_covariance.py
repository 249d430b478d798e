"""The CUDA kernels of the covariance, compiled for the CPU, against float64."""

from __future__ import annotations

import math

import cuda_on_cpu
import pytest
import torch
from backends import Guarded, automatic, cuda_kernels, same_bits  # noqa: F401
from oracle import assert_as_exact_as_plain, error
from torch.library import opcheck

from guardspace_kernels import dispatch
from guardspace_kernels.ops import covariance_update_, symmetrize_

pytestmark = [automatic, pytest.mark.cuda_on_cpu, pytest.mark.usefixtures("cuda_kernels")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: (tokens, width): less than a tile, one, several, and a remainder; aligned and not.
SIZES = ((1, 1), (31, 16), (32, 64), (33, 37), (65, 130), (70, 160), (200, 128), (9, 257))

LAYOUTS = {
    "3-D": lambda: torch.randn(3, 5, 48),
    "one vector": lambda: torch.randn(48),
    "no token": lambda: torch.randn(0, 48),
    "no batch": lambda: torch.randn(0, 4, 48),
    "batch second": lambda: torch.randn(5, 3, 48).transpose(0, 1),
    "every second column": lambda: torch.randn(11, 96)[:, ::2],
    "every second row": lambda: torch.randn(22, 48)[::2],
    "column-major": lambda: torch.randn(48, 11).T,
    "expanded": lambda: torch.randn(1, 3, 48).expand(4, 3, 48),
    "one row again and again": lambda: torch.randn(1, 48).expand(7, 48),
    "columns of a wider one": lambda: torch.randn(11, 80)[:, 16:64],
    "not aligned": lambda: torch.randn(11, 80)[:, 3:51],
    "rows of odd length": lambda: torch.randn(11, 51)[:, :48],
}


def expected(start, x, mask, scale, dtype):
    """The lower triangle of start + scale · Xᵀ diag(mask) X, formed in ``dtype``."""
    X = x.reshape(-1, x.shape[-1]).to(dtype)
    if mask is not None:
        X = X[mask.reshape(-1) != 0]
    return (start.to(dtype) + scale * (X.T @ X)).tril()


def check(start, x, mask=None, scale=1.0, case=""):
    C = start.clone()
    covariance_update_(C, x, mask, scale)
    assert same_bits(C.triu(1), start.triu(1)), case
    plain, truth = (expected(start, x, mask, scale, dtype) for dtype in (torch.float32, torch.float64))
    assert_as_exact_as_plain(C.tril(), plain, truth, case)
    return C


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(dtype):
    for T, d in SIZES:
        for mask in (None, torch.rand(T) < 0.6):
            check(torch.randn(d, d), torch.randn(T, d).to(dtype), mask, 0.7, (T, d))


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, masked):
    x = LAYOUTS[layout]().to(dtype)
    check(torch.randn(48, 48), x, torch.rand(x.shape[:-1]) < 0.6 if masked else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_of_few_columns_are_split_into_slices(dtype, cuda_kernels):  # noqa: F811
    x, mask = torch.randn(3100, 40).to(dtype), torch.rand(3100) < 0.6
    cuda_on_cpu.take_counters(cuda_kernels)
    C = check(torch.randn(40, 40), x, mask, 0.7)
    assert cuda_on_cpu.take_counters(cuda_kernels)["launches"] == 2
    again = C.clone().zero_()
    covariance_update_(again, x, mask)
    other = C.clone().zero_()
    covariance_update_(other, x, mask)
    assert same_bits(again, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_contribute_nothing_even_when_not_finite(dtype, bad):
    x = torch.randn(3, 40, 48).to(dtype)
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[0, :25], mask[2, 30:] = 0, 0  # left padded, full, right padded
    clean, C = torch.zeros(48, 48), torch.zeros(48, 48)
    covariance_update_(clean, x, mask)
    x[mask == 0] = bad
    covariance_update_(C, x, mask)
    assert same_bits(C, clean) and clean.abs().sum() > 0


def test_a_bad_row_that_counts_is_not_hidden():
    x, C = torch.randn(4, 48), torch.zeros(48, 48)
    x[2, 5] = math.nan
    covariance_update_(C, x)
    assert C[5, :6].isnan().all() and C[5:, 5].isnan().all() and C.isnan().sum() == 48


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_any_non_zero_mask_entry_counts_once(dtype):
    mask = torch.tensor([1, 0, 7, -1, 0, 2**32, 1]).to(dtype)
    check(torch.zeros(16, 16), torch.randn(7, 16), mask)
    check(torch.zeros(16, 16), torch.randn(2, 2, 16), torch.stack([mask[:2], mask[2:4]]).T)


@pytest.mark.parametrize("d", [48, 37, 70], ids=["aligned", "not aligned", "two tiles"])
def test_accumulators_inside_of_larger_ones(d):
    x, lower = torch.randn(20, d), torch.ones(d, d).tril().bool()
    for margin in (5, 16):
        C = Guarded.around(torch.zeros(d, d).masked_fill(~lower, math.nan), margin)
        covariance_update_(C.matrix, x)
        assert C.matrix[~lower].isnan().all() and C.intact()
        symmetrize_(C.matrix)
        assert torch.equal(C.matrix, C.matrix.T) and C.intact()
        assert_as_exact_as_plain(C.matrix, x.T @ x, x.double().T @ x.double())


def test_strided_accumulators_are_written_in_place():
    storage, x = torch.zeros(96, 96), torch.randn(9, 48)
    for C in (storage[::2, ::2], storage.T[1::2, 1::2]):
        covariance_update_(C, x)
        symmetrize_(C)
        assert_as_exact_as_plain(C, x.T @ x, x.double().T @ x.double())
    assert storage[1::2, ::2].count_nonzero() == 0 and storage[::2, 1::2].count_nonzero() == 0


def mixed(copies=1):
    """Accumulators, inputs and masks of several widths, dtypes and alignments; one without tokens."""
    xs = [torch.randn(T, d).to(dtype) for T, d, dtype in [
        (70, 160, torch.bfloat16), (5, 16, torch.bfloat16), (0, 48, torch.bfloat16), (65, 37, torch.bfloat16),
        (33, 64, torch.float32), (90, 80, torch.float32), (7, 32, torch.float16),
    ] * copies]  # fmt: skip
    masks = [torch.rand(len(x)) < 0.6 if i % 2 else None for i, x in enumerate(xs)]
    return [torch.randn(x.shape[1], x.shape[1]) for x in xs], xs, masks


def test_a_list_takes_one_launch_for_each_dtype_and_has_the_bits_of_one_call_each(cuda_kernels):  # noqa: F811
    starts, xs, masks = mixed()
    Cs, singly = ([start.clone() for start in starts] for _ in range(2))
    cuda_on_cpu.take_counters(cuda_kernels)
    covariance_update_(Cs, xs, masks, 0.7)
    assert cuda_on_cpu.take_counters(cuda_kernels)["launches"] == 3
    for C, x, mask in zip(singly, xs, masks, strict=True):
        covariance_update_(C, x, mask, 0.7)
    assert all(map(same_bits, Cs, singly))


def test_more_items_than_the_arguments_of_one_launch_hold(cuda_kernels):  # noqa: F811
    xs = [torch.randn(3, 4 + i % 3) for i in range(150)]
    Cs = [torch.zeros(x.shape[1], x.shape[1]) for x in xs]
    cuda_on_cpu.take_counters(cuda_kernels)
    covariance_update_(Cs, xs)
    assert cuda_on_cpu.take_counters(cuda_kernels)["launches"] > 1
    for C, x in zip(Cs, xs, strict=True):
        assert_as_exact_as_plain(C, (x.T @ x).tril(), (x.double().T @ x.double()).tril())


def test_an_accumulator_that_is_given_twice_gets_both():
    C, x, y = torch.zeros(48, 48), torch.randn(9, 48), torch.randn(70, 48)
    covariance_update_([C, C], [x, y])
    both = torch.cat([x, y])
    assert_as_exact_as_plain(
        C, *(expected(torch.zeros(48, 48), both, None, 1.0, t) for t in (torch.float32, torch.float64))
    )


def test_tensor_cores_accumulate_no_more_than_a_step():
    """They truncate, and so does the shim: over many tokens that would show, as it does in plain float32."""
    x = torch.rand(4096, 8) + 0.5
    for dtype in DTYPES:
        C, X = torch.zeros(8, 8), x.to(dtype)
        covariance_update_(C, X)
        assert error(C, (X.double().T @ X.double()).tril()) <= 5e-7


@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9, 17])
def test_every_tile_below_the_diagonal_is_formed(blocks):
    d = 64 * blocks
    x = torch.randn(2, d)
    check(torch.zeros(d, d), x)


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_it_costs(dtype, masked, cuda_kernels):  # noqa: F811
    """Products as theory says, no conflict of banks, and bytes by tiles."""
    tile, T, d = (64 if dtype == torch.float32 else 128), 96, 384
    x, C = torch.randn(T, d).to(dtype), torch.zeros(d, d)
    mask = torch.ones(T, dtype=torch.bool) if masked else None
    cuda_on_cpu.take_counters(cuda_kernels)
    covariance_update_(C, x, mask)
    counted = cuda_on_cpu.take_counters(cuda_kernels)
    high = d // tile
    tiles = high * (high + 1) // 2
    per_tile = tile * tile * T // (16 * 8 * 16) if dtype != torch.float32 else 3 * tile * tile * T // (16 * 8 * 8)
    assert counted["products"] == tiles * per_tile and counted["conflicts"] == 0
    copied = (tiles * 2 - high) * tile * T * x.element_size()  # a tile on the diagonal reads its columns once
    lower = d * (d + 1) // 2 * 4
    mask_bytes = tiles * T * tile * x.element_size() // 16 if masked else 0  # one for each 16 bytes of an operand
    assert counted["bytes_read"] == copied + lower + mask_bytes
    assert counted["bytes_written"] == lower
    least = T * d * x.element_size() + lower
    assert counted["bytes_read"] <= (high + 1) * least


def test_other_dtypes_are_refused_and_left_to_the_reference(cuda_kernels):  # noqa: F811
    x, C = torch.randn(5, 16, dtype=torch.float64), torch.zeros(16, 16, dtype=torch.float64)
    cuda_on_cpu.take_counters(cuda_kernels)
    covariance_update_(C, x)
    assert cuda_on_cpu.take_counters(cuda_kernels)["launches"] == 0
    assert dispatch.can_use("covariance", C, x, backend="cuda") == (
        False,
        "a tensor is torch.float64; the CUDA kernels compute in float32",
    )


def test_the_op_is_registered_as_torch_wants_it():
    for name, arguments in {
        "covariance_update_": (torch.zeros(16, 16), torch.randn(5, 16)),
        "symmetrize_": (torch.randn(16, 16),),
    }.items():
        opcheck(getattr(torch.ops.guardspace, name).default, arguments)
