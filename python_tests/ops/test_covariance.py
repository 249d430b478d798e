"""covariance_update_ and symmetrize_ against Xᵀ X in float64."""

from __future__ import annotations

import math

import pytest
import torch
from backends import automatic
from oracle import DTYPES, assert_as_exact_as_plain, error
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from guardspace_kernels.ops import covariance_update_, squared_drift, symmetrize_

OPS = torch.ops.guardspace
D = 23

LAYOUTS = {
    "ragged": lambda: torch.randn(37, D, dtype=torch.float64),
    "one token": lambda: torch.randn(1, D, dtype=torch.float64),
    "one vector": lambda: torch.randn(D, dtype=torch.float64),
    "3-D": lambda: torch.randn(3, 5, D, dtype=torch.float64),
    "4-D": lambda: torch.randn(2, 3, 2, D, dtype=torch.float64),
    "no token": lambda: torch.randn(0, D, dtype=torch.float64),
    "no batch": lambda: torch.randn(0, 4, D, dtype=torch.float64),
    "batch second": lambda: torch.randn(5, 3, D, dtype=torch.float64).transpose(0, 1),
    "every second column": lambda: torch.randn(11, 2 * D, dtype=torch.float64)[:, ::2],
    "column-major": lambda: torch.randn(D, 11, dtype=torch.float64).T,
    "expanded": lambda: torch.randn(1, 3, D, dtype=torch.float64).expand(4, 3, D),
}


def textbook(covariance, x, mask=None, scale=1.0):
    """C + scale · Xᵀ diag(mask) X as a loop over tokens, in float64."""
    C = covariance.double().clone()
    rows = x.double().reshape(-1, x.shape[-1])
    keep = [True] * len(rows) if mask is None else [bool(m) for m in mask.reshape(-1)]
    for row, kept in zip(rows, keep, strict=True):
        if kept:
            C += scale * torch.outer(row, row)
    return C


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lower_triangle_equals_the_sum_of_outer_products(dtype, accumulator, layout, masked):
    x = LAYOUTS[layout]()
    x = x.to(dtype) if dtype != torch.float64 else x  # .to keeps the strides
    mask = torch.rand(x.shape[:-1]) < 0.6 if masked else None
    start = torch.randn(D, D, dtype=accumulator)
    C = start.clone()
    assert covariance_update_(C, x, mask, 0.7) is None
    truth = textbook(start, x, mask, 0.7).tril()
    wide = x.reshape(-1, D).to(torch.promote_types(dtype, accumulator))
    wide = wide if mask is None else wide * mask.reshape(-1, 1)
    assert_as_exact_as_plain(C.tril(), (start + 0.7 * (wide.T @ wide)).to(accumulator).tril(), truth)


@pytest.mark.parametrize("mask", [torch.tensor([1, 0, 7, -1]), torch.tensor([True, False, True, True])], ids=str)
def test_any_non_zero_mask_entry_counts_once(mask):
    x, C = torch.randn(4, D), torch.zeros(D, D)
    covariance_update_(C, x, mask)
    torch.testing.assert_close(C.double(), textbook(torch.zeros(D, D), x[[0, 2, 3]]).tril(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_rows_contribute_nothing_even_when_not_finite(bad):
    x = torch.randn(3, 4, D)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])  # left padded, full, right padded
    clean, C = torch.zeros(D, D), torch.zeros(D, D)
    covariance_update_(clean, x, mask)
    x[mask == 0] = bad
    covariance_update_(C, x, mask)
    assert torch.equal(C, clean) and clean.abs().sum() > 0


def test_a_bad_row_that_counts_is_not_hidden():
    x, C = torch.randn(4, D), torch.zeros(D, D)
    x[2, 5] = math.nan
    covariance_update_(C, x)
    assert C.tril().isnan().any()


def test_the_upper_triangle_is_neither_read_nor_written():
    upper = torch.ones(D, D).triu(1).bool()
    C = torch.zeros(D, D).masked_fill(upper, math.nan)
    covariance_update_(C, torch.randn(9, D))
    assert C[upper].isnan().all() and C[~upper].isfinite().all()
    symmetrize_(C)
    assert C.isfinite().all() and torch.equal(C, C.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_symmetrize_mirrors_the_lower_triangle(dtype):
    C = torch.randn(D, D, dtype=dtype)
    expected = torch.tensor([[C[max(i, j), min(i, j)] for j in range(D)] for i in range(D)], dtype=dtype)
    assert symmetrize_(C) is None
    assert torch.equal(C, expected)


def test_strided_accumulators_are_written_in_place():
    storage = torch.zeros(2 * D, 2 * D)
    x = torch.randn(9, D)
    covariance_update_(storage[::2, ::2], x)
    symmetrize_(storage[::2, ::2])
    assert error(storage[::2, ::2], textbook(torch.zeros(D, D), x)) < 1e-6
    assert storage[1::2].count_nonzero() == 0 and storage[:, 1::2].count_nonzero() == 0


def test_an_accumulator_that_overlaps_itself_is_refused():
    C = torch.zeros(1, 1)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory"):
        covariance_update_(C.expand(D, D), torch.randn(9, D))
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory"):
        symmetrize_(C.expand(D, D))
    assert C.item() == 0


def test_a_list_equals_one_call_each():
    xs = [torch.randn(9, D), torch.randn(2, 5, 7).bfloat16(), torch.randn(3, D, dtype=torch.float64)]
    masks = [None, torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 1, 1]]), torch.tensor([True, False, True])]
    for more in ((), (None, 0.5), (masks,), (masks, 0.5)):
        Cs, singly = ([torch.zeros(x.shape[-1], x.shape[-1]) for x in xs] for _ in range(2))
        covariance_update_(Cs, xs, *more)
        for i, (C, x) in enumerate(zip(singly, xs, strict=True)):
            covariance_update_(C, x, more[0] and more[0][i] if more else None, *more[1:])
        assert all(torch.equal(a, b) for a, b in zip(Cs, singly, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_drift_is_the_dense_formula(dtype):
    x, F, G = torch.randn(40, D, dtype=torch.float64), torch.randn(5, 3).to(dtype), torch.randn(3, D).to(dtype)
    C = (x.T @ x).masked_fill(torch.ones(D, D).triu(1).bool(), math.nan)
    truth = (F.double() @ G.double() @ x.T).square().sum()
    drift = squared_drift(C, F, G)
    assert drift.dtype == torch.float64 and drift.shape == () and error(drift, truth) < 1e-13


@pytest.mark.parametrize("precision", ["highest", "high", "medium", "bf16 for one backend"])
def test_products_stay_in_float32_whatever_the_matmul_precision(precision, matmul_precision):
    x = torch.randn(512, 96)
    expected, C = torch.zeros(96, 96), torch.zeros(96, 96)
    covariance_update_(expected, x)
    matmul_precision(precision)
    settings = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    covariance_update_(C, x)
    assert torch.equal(C, expected)
    assert settings == (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_of_half_precision_inputs_are_not_rounded(dtype, autocast):
    """A product rounded to bfloat16 has an error of 2e-3 of the largest entry, and 2e-4 on average."""
    x = torch.randn(256, D).to(dtype)
    C = torch.zeros(D, D)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        covariance_update_(C, x)
    assert error(C.tril(), textbook(torch.zeros(D, D), x).tril()) < 1e-6


def test_many_small_updates_accumulate_in_float32():
    x, C = torch.randn(300, D).bfloat16(), torch.zeros(D, D)
    for row in x:
        covariance_update_(C, row)
    assert error(C.tril(), textbook(torch.zeros(D, D), x).tril()) < 2e-6


def test_inputs_that_require_grad_get_none_and_leave_the_covariance_a_constant():
    x, C = torch.randn(4, D, requires_grad=True), torch.zeros(D, D)
    covariance_update_(C, x)
    assert not C.requires_grad and x.grad is None


def test_no_gradient_flows_through_squared_drift():
    C, F, G = torch.eye(D), torch.randn(4, 2, requires_grad=True), torch.randn(2, D, requires_grad=True)
    assert not squared_drift(C, F, G).requires_grad


@pytest.mark.parametrize(
    "call", [lambda C: covariance_update_(C, torch.ones(2, D)), symmetrize_], ids=["update", "sym"]
)
def test_a_covariance_that_requires_grad_is_refused_in_grad_mode(call):
    C = torch.zeros(D, D, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"requires grad.*torch\.no_grad\(\)"):
        call(C)
    with torch.no_grad():
        call(C)


def test_autograd_notices_the_write():
    C = torch.randn(D, D)
    y = (C * torch.ones(D, D, requires_grad=True)).sum()
    covariance_update_(C, torch.randn(4, D))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


SAMPLES = {
    "plain": lambda: ((torch.zeros(D, D), torch.randn(5, D)), {}),
    "mask and scale": lambda: ((torch.zeros(D, D), torch.randn(2, 3, D), torch.ones(2, 3).bool(), 0.5), {}),
    "keywords": lambda: ((torch.zeros(D, D), torch.randn(2, 3, D)), {"mask": torch.ones(2, 3).int(), "scale": 2.0}),
    "x with grad": lambda: ((torch.zeros(D, D), torch.randn(5, D, requires_grad=True)), {}),
    "no token": lambda: ((torch.zeros(D, D), torch.randn(0, D)), {}),
    "strided": lambda: ((torch.zeros(D, 2 * D)[:, ::2], torch.randn(D, 5).T), {}),
    "half": lambda: ((torch.zeros(D, D, dtype=torch.float64), torch.randn(5, D).bfloat16()), {}),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_covariance_update_passes_opcheck(sample):
    opcheck(OPS.covariance_update_.default, *SAMPLES[sample]())


def test_symmetrize_passes_opcheck():
    opcheck(OPS.symmetrize_.default, (torch.randn(D, D),))


@automatic
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_for_every_token_count(compiler):
    counter = CompileCounterWithBackend(compiler)

    def step(C, x, mask):
        covariance_update_(C, x * 2, mask, 0.5)
        symmetrize_(C)
        return C + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (7, 12):
        x, mask = torch.randn(2, tokens, D), torch.rand(2, tokens) < 0.5
        C = torch.zeros(D, D)
        expected = torch.zeros(D, D)
        torch.testing.assert_close(compiled(C, x, mask), step(expected, x, mask))
        torch.testing.assert_close(C, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        (
            (torch.zeros(3, 3).half(), torch.ones(2, 3)),
            TypeError,
            r"covariance must be float32 or float64, got .*float16",
        ),
        ((torch.zeros(3, 4), torch.ones(2, 3)), ValueError, r"covariance must be square \(d, d\), got shape \(3, 4\)"),
        ((torch.zeros(3), torch.ones(2, 3)), ValueError, r"covariance must be square \(d, d\), got shape \(3,\)"),
        (
            (torch.zeros(3, 3), torch.ones(2, 3).long()),
            TypeError,
            r"x must be float64.*got torch.int64 of shape \(2, 3\)",
        ),
        ((torch.zeros(3, 3), torch.ones(2, 4)), ValueError, r"x must be \(\.\.\., d\) with d = 3 .*got shape \(2, 4\)"),
        ((torch.zeros(3, 3), torch.tensor(1.0)), ValueError, r"x must be \(\.\.\., d\) with d = 3 .*got shape \(\)"),
        ((torch.zeros(3, 3), torch.ones(2, 3), torch.ones(2)), TypeError, r"mask must be boolean or integer.*float32"),
        (
            (torch.zeros(3, 3), torch.ones(2, 3), torch.ones(2, 3).bool()),
            ValueError,
            r"mask must have the shape of x without its last dimension, \(2,\), got \(2, 3\)",
        ),
        ((torch.zeros(3, 3), torch.ones(2, 3, device="meta")), ValueError, "x is on meta but covariance is on cpu"),
        (
            (torch.zeros(3, 3), torch.ones(2, 3), torch.ones(2, device="meta").bool()),
            ValueError,
            "mask is on meta but covariance is on cpu",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, exception, message):
    with pytest.raises(exception, match=f"covariance_update_: {message}"):
        covariance_update_(*arguments)


@pytest.mark.parametrize(
    "covariance, exception, message",
    [
        (torch.zeros(2, 3), ValueError, r"square \(d, d\), got shape \(2, 3\)"),
        (torch.zeros(2, 2).bool(), TypeError, "float32"),
    ],
)
def test_symmetrize_refuses_by_name(covariance, exception, message):
    with pytest.raises(exception, match=f"symmetrize_: covariance must be .*{message}"):
        symmetrize_(covariance)


def test_inputs_without_features():
    C = torch.zeros(0, 0)
    covariance_update_(C, torch.randn(2, 3, 0), torch.ones(2, 3, dtype=torch.bool))
    assert C.shape == (0, 0)
