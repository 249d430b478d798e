"""The C++ kernels of the covariance, on every instruction set, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import Guarded, calls, on_all_threads, poison_scratch, same_bits, use_threads
from oracle import DTYPES, assert_as_exact_as_plain, error

from guardspace_kernels.ops import covariance, covariance_update_, squared_drift, symmetrize_
from guardspace_kernels.ops._cpu import READS_TENSORS, extension, view

pytestmark = pytest.mark.cpu_kernels

ACCUMULATORS = (torch.float32, torch.float64)
WIDTHS = (1, 2, 7, 12, 13, 47, 48, 49, 96, 130, 200)
TOKENS = (0, 1, 2, 3, 31, 33, 300, 1100, 3000)
#: Every width with every number of tokens up to 300, and a few with more.
SHAPES = [(T, d) for T, d in itertools.product(TOKENS, WIDTHS) if T <= 300 or d in (13, 49, 130)]

MASKS = {
    "none": lambda tokens: None,
    "alternating": lambda tokens: torch.arange(tokens) % 2 == 0,
    "odd": lambda tokens: torch.arange(tokens) % 2 == 1,
    "random": lambda tokens: torch.rand(tokens) < 0.3,
    "zero": lambda tokens: torch.zeros(tokens, dtype=torch.bool),
}


@pytest.fixture
def backend():
    """The instruction set's fixture insists on the kernels."""


def update(start, x, mask=None, scale=1.0):
    C = start.clone()
    covariance_update_(C, x, mask, scale)
    return C


def expected(start, x, mask, scale, dtype):
    """The lower triangle of start + scale · Xᵀ diag(mask) X, formed in ``dtype``."""
    rows = x.to(dtype) if mask is None else x[mask].to(dtype)
    return (start.to(dtype) + scale * (rows.T @ rows)).tril()


@pytest.mark.skipif(not READS_TENSORS, reason="tensors are read one by one in Python")
def test_a_list_of_any_length_is_one_call_into_the_kernels(monkeypatch):
    monkeypatch.setattr(covariance, "_update_op", None)
    monkeypatch.setattr(covariance, "_update_list_op", None)
    counts = set()
    for length in (1, 2, 50):
        xs, masks = [torch.randn(2, 3, 13) for _ in range(length)], [torch.tensor([[1, 0, 2], [0, 1, 1]])] * length
        Cs = [torch.zeros(13, 13) for _ in xs]
        counts.add(calls(lambda: covariance_update_(Cs, xs, masks)))  # noqa: B023
        for C, x in zip(Cs, xs, strict=True):
            kept = x[masks[0].bool()]
            torch.testing.assert_close(C.tril(), (kept.T @ kept).tril())
    covariance_update_(Cs[0], xs[0], masks[0])
    assert len(counts) == 1 and counts.pop() <= 30


LAID_OUT = {
    "dense": lambda mask: mask,
    "columns": lambda mask: mask.T.contiguous().T,
    "expanded": lambda mask: mask[:1].expand(mask.shape),
    "every second": lambda mask: mask.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAID_OUT)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_masks_of_every_dtype_and_layout(isa, dtype, layout):
    start, x = torch.zeros(13, 13), torch.randn(4, 6, 13)
    whole = torch.randint(2, (4, 6)) * (256 if dtype.itemsize > 1 else 1)  # whose lowest byte is zero
    mask = LAID_OUT[layout](whole.to(dtype))
    assert same_bits(update(start, x, mask), update(start, x, mask.bool().contiguous()))
    torch.testing.assert_close(update(start, x, mask).tril(), expected(start, x, mask.bool(), 1.0, torch.float32))
    assert same_bits(update(start, x[0, 0], mask[0, 0]), update(start, x[:1, 0], mask[:1, 0]))


@pytest.mark.parametrize("accumulator", ACCUMULATORS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width_and_number_of_tokens(isa, dtype, accumulator):
    wide = torch.promote_types(dtype, accumulator)
    masks, results = itertools.cycle(MASKS), {}
    inputs = {}
    for T, d in SHAPES:
        name = next(masks) if T > 1 else "none"
        inputs[T, d, name] = torch.randn(d, d, dtype=accumulator), torch.randn(T, d).to(dtype), MASKS[name](T)
    for case, (start, x, mask) in inputs.items():
        results[case] = update(start, x, mask, 0.7)
        plain = expected(start, x, mask, 0.7, wide).to(accumulator)
        assert_as_exact_as_plain(
            results[case].tril(), plain, expected(start, x, mask, 0.7, torch.float64), f"T, d, mask = {case}:"
        )
        assert same_bits(results[case].triu(1), start.triu(1)), case
    for threads in (1, 2, 4):
        with use_threads(threads):
            for case, (start, x, mask) in inputs.items():
                assert same_bits(update(start, x, mask, 0.7), results[case]), (threads, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_count_the_same_rows_as_taking_them_out(isa, mask, dtype):
    for T, d in itertools.product((1, 2, 3, 31, 32, 33, 63, 65, 130), (5, 49)):
        start, x, keep = torch.randn(d, d), torch.randn(T, d).to(dtype), MASKS[mask](T)
        kept = x if keep is None else x[keep]
        if keep is not None:
            x[~keep] = torch.nan
        assert same_bits(update(start, x, keep), update(start, kept)), (T, d)


#: From n, which draws a tensor of a shape, and the size.
LAYOUTS = {
    "wide rows": lambda n, T, d: n(T, d + 7)[:, 3 : 3 + d],
    "every third row": lambda n, T, d: n(3 * T, d)[1::3],
    "every second column": lambda n, T, d: n(T, 2 * d)[:, 1::2],
    "column-major": lambda n, T, d: n(d, T).T,
    "one row, repeated": lambda n, T, d: n(1, d).expand(T, d),
    "one column, repeated": lambda n, T, d: n(T, 1).expand(T, d),
    "batch second": lambda n, T, d: n(T, 3, d).transpose(0, 1),
    "3-D": lambda n, T, d: n(T, 2, d + 1)[:, :, :d],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_x_and_mask_change_nothing(isa, layout, dtype):
    for T, d in ((1, 1), (3, 13), (33, 49), (70, 100)):
        x = LAYOUTS[layout](lambda *shape: torch.randn(*shape).to(dtype), T, d)
        mask = torch.rand(*x.shape[:-1], 2)[..., 1] < 0.7
        start, rows = torch.zeros(d, d), x.reshape(-1, d).contiguous()
        assert same_bits(update(start, x), update(start, rows))
        assert same_bits(update(start, x, mask), update(start, rows, mask.reshape(-1).contiguous()))


@pytest.mark.parametrize("layout", ["every second", "column-major", "wide rows"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS, ids=str)
def test_accumulators_of_any_stride(isa, accumulator, layout):
    for d in (1, 13, 49, 130):
        storage = torch.randn(2 * d, 2 * d, dtype=accumulator)
        C = {"every second": storage[1::2, ::2], "column-major": storage[:d, :d].T, "wide rows": storage[d:, :d]}[
            layout
        ]
        x, before, start = torch.randn(40, d), storage.clone(), C.clone()
        covariance_update_(C, x)
        truth = expected(start, x, None, 1.0, torch.float64)
        assert_as_exact_as_plain(C.tril(), expected(start, x, None, 1.0, accumulator), truth, d)
        lower = C.tril()
        symmetrize_(C)
        assert same_bits(C, lower + lower.tril(-1).T)
        C.copy_(start)
        assert same_bits(storage, before)  # nothing beyond the view was written


def test_more_rows_than_are_packed_at_a_time(isa):
    """Sums of several chunks, beside small members of the list; 192 bytes of a packed row, 16 MB at a time."""
    big, small = torch.randn(180_000, 48), torch.randn(33, 7)
    mask = torch.arange(len(big)) % 4 != 0
    items = [(big, None), (small, None), (big, mask), (big.bfloat16()[:, :47], mask), (big[:100_000].double(), None)]
    Cs = [torch.zeros(x.shape[1], x.shape[1]) for x, _ in items]
    covariance_update_(Cs, [x for x, _ in items], [mask for _, mask in items])
    for C, (x, mask) in zip(Cs, items, strict=True):
        assert same_bits(C, update(torch.zeros_like(C), x, mask))
        truth = expected(torch.zeros_like(C), x, mask, 1.0, torch.float64)
        plain = expected(torch.zeros_like(C), x, mask, 1.0, torch.promote_types(x.dtype, torch.float32)).float()
        assert_as_exact_as_plain(C, plain, truth, x.dtype)


def members(accumulators=ACCUMULATORS):
    """Lists of mixed widths, dtypes, masks and sizes."""
    sizes = itertools.cycle([(33, 13), (1, 1), (300, 130), (0, 5), (64, 48), (7, 200), (129, 49)])
    for (dtype, accumulator, mask), (T, d) in zip(itertools.product(DTYPES, accumulators, MASKS), sizes, strict=False):
        yield torch.randn(d, d, dtype=accumulator), torch.randn(T, d).to(dtype), MASKS[mask](T)


def test_a_list_equals_one_call_each_bit_for_bit(isa):
    items = list(members())
    singly = [update(C, x, mask, -0.3) for C, x, mask in items]

    def together():
        Cs = [C.clone() for C, _, _ in items]
        covariance_update_(Cs, [x for _, x, _ in items], [mask for _, _, mask in items], -0.3)
        return Cs

    for Cs in on_all_threads(together):
        assert all(same_bits(a, b) for a, b in zip(Cs, singly, strict=True))


def test_one_accumulator_twice_in_a_list_gets_both(isa):
    x, y, start = torch.randn(50, 60), torch.randn(30, 60).bfloat16(), torch.randn(60, 60)
    C, other = start.clone(), torch.zeros(7, 7)
    covariance_update_([C, other, C], [x, torch.randn(5, 7), y])
    assert same_bits(C, update(update(start, x), y))
    assert other.diagonal().all()


def test_an_empty_list_and_empty_members(isa):
    covariance_update_([], [])
    C = torch.randn(0, 0)
    covariance_update_([C, C], [torch.randn(5, 0), torch.randn(0, 0)])
    symmetrize_(C)
    assert squared_drift(C, torch.randn(3, 2), torch.randn(2, 0)) == 0
    assert squared_drift(torch.randn(50, 50), torch.randn(3, 0), torch.randn(0, 50)) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_entry_shows_in_its_row_and_column_only(isa, dtype, bad):
    for T, d, t, j in ((1, 13, 0, 12), (33, 49, 32, 0), (70, 130, 5, 50)):
        x = torch.randn(T, d).to(dtype)
        x[t, j] = bad
        finite = update(torch.zeros(d, d), x).isfinite()
        touched = torch.zeros(d, d, dtype=torch.bool)
        touched[j], touched[:, j] = True, True
        assert torch.equal(~finite, touched.tril())
        mask = torch.arange(T) != t
        assert update(torch.zeros(d, d), x, mask).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_the_operands_is_read_or_written(isa, dtype):
    for T, d in ((1, 1), (2, 13), (33, 47), (31, 50), (65, 97)):
        poison_scratch(1)
        C, x = Guarded.around(torch.zeros(d, d)), Guarded.around(torch.randn(T, d).to(dtype))
        C.matrix[torch.ones(d, d).triu(1).bool()] = torch.nan
        padded = torch.full((T + 64,), 2, dtype=torch.uint8).bool()  # rows before and after the mask would count
        padded[32 : 32 + T] = False
        covariance_update_(C.matrix, x.matrix, padded[32 : 32 + T])
        assert not C.matrix.tril().any()
        covariance_update_(C.matrix, x.matrix)
        assert C.matrix.tril().isfinite().all() and C.intact() and x.intact()
        assert C.matrix[torch.ones(d, d).triu(1).bool()].isnan().all()
        symmetrize_(C.matrix)
        assert C.matrix.isfinite().all() and C.intact() and torch.equal(C.matrix, C.matrix.T)


@pytest.mark.parametrize("accumulator", ACCUMULATORS, ids=str)
def test_symmetrize_mirrors_every_width(isa, accumulator):
    for d in (*WIDTHS, 31, 32, 33, 64, 65):
        C = torch.randn(d, d, dtype=accumulator)
        for result in on_all_threads(lambda: mirrored(C)):  # noqa: B023
            assert same_bits(result, C.tril() + C.tril(-1).T), d


def mirrored(C):
    C = C.clone()
    symmetrize_(C)
    return C


@pytest.mark.parametrize("accumulator", ACCUMULATORS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_drift_is_the_dense_formula(isa, dtype, accumulator):
    for d, r, d_out in ((1, 1, 1), (13, 3, 5), (24, 1, 9), (48, 16, 50), (49, 47, 3), (130, 49, 60), (200, 130, 20)):
        x = torch.randn(d + 3, d, dtype=torch.float64)
        C = (x.T @ x).to(accumulator)
        C[torch.ones(d, d).triu(1).bool()] = torch.nan
        F, G = torch.randn(d_out, r).to(dtype), torch.randn(r, d).to(dtype)
        symmetric = C.double().tril() + C.double().tril(-1).T
        delta = F.double() @ G.double()
        truth = (delta @ symmetric * delta).sum()
        drifts = on_all_threads(lambda: squared_drift(C, F, G))  # noqa: B023
        assert error(drifts[0], truth) < 1e-12, (d, r, d_out)
        assert all(same_bits(drift, drifts[0]) for drift in drifts)
        strided = torch.full((2 * d, 3 * d), torch.nan, dtype=accumulator)[::2, ::3]
        strided.copy_(C)
        assert error(squared_drift(strided, F.T.contiguous().T, G.T.contiguous().T), truth) < 1e-12


def test_the_quadratic_form_reads_its_operands_only(isa):
    for d, r in ((1, 1), (13, 2), (49, 17)):
        poison_scratch(1)
        C, u, v = (Guarded.around(torch.randn(*s, dtype=torch.float64)) for s in ((d, d), (r, d), (r, d)))
        v.matrix.copy_(u.matrix)
        from_rows = (u.matrix.T @ v.matrix * (C.matrix.tril() + C.matrix.tril(-1).T)).sum()
        form = extension.quadratic_form(*(view(t.matrix) for t in (C, u, v)), 2)
        assert abs(form - from_rows.item()) < 1e-12 * (u.matrix.T @ v.matrix * C.matrix).abs().sum()
