"""The C++ kernels of the null projection, on every instruction set, against float64."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backends import Guarded, calls, on_all_threads, poison_scratch, same_bits, use_threads
from oracle import DTYPES, FLOOR, dense_projector, orthonormal
from torch.utils._python_dispatch import TorchDispatchMode

from guardspace_kernels.ops import null_project_, null_projection, projected_adamw_
from guardspace_kernels.ops._cpu import READS_TENSORS, extension
from guardspace_kernels.ops.null_projection import cpu_kernels, reference

pytestmark = pytest.mark.cpu_kernels
reads_tensors = pytest.mark.skipif(not READS_TENSORS, reason="this PyTorch has no C functions to read tensors")

RANKS = (1, 3, 16, 47, 48, 49, 130)
#: (d, k): no column, one, all; odd and even; more than are kept in registers or read at a time (128 and 512).
BASES = [
    (1, 0),
    (1, 1),
    (2, 1),
    (7, 3),
    (12, 12),
    (13, 0),
    (47, 11),
    (48, 48),
    (49, 24),
    (97, 33),
    (130, 129),
    (257, 130),
]
LONG_BASES = [(600, 520), (1030, 513)]
FORMS = pytest.mark.parametrize("complement", [True, False], ids=["range basis", "null basis"])
#: dtypes of g and basis
PAIRS = [
    *((dtype, torch.float32) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *((dtype, torch.float64) for dtype in DTYPES),
]


@pytest.fixture
def backend():
    """The instruction set's fixture insists on the kernels."""


def projected(g, basis, complement):
    g = g.clone()
    null_project_(g, basis, complement)
    return g


def assert_exact(result, g, basis, complement, case=""):
    """As exact as two products in plain PyTorch, relative to the largest entry of G, whatever is left of it."""
    truth = g.double() @ dense_projector(basis, complement, g.shape[-1])
    plain = reference.project(g, basis, complement).to(g.dtype)
    largest = g.double().abs().max() if g.numel() else 1.0
    errors = [(t.double() - truth).abs().max().item() / largest if t.numel() else 0.0 for t in (result, plain)]
    assert result.dtype == g.dtype
    assert errors[0] <= 2 * errors[1] + FLOOR[g.dtype], f"{case} {errors[0]:.2e}, plain {errors[1]:.2e}"


@FORMS
@pytest.mark.parametrize("dtype, basis_dtype", PAIRS, ids=str)
def test_every_rank_and_basis(isa, dtype, basis_dtype, complement):
    cases = {}
    for r, (d, k) in [*itertools.product(RANKS, BASES), *zip((3, 49), LONG_BASES, strict=True)]:
        cases[r, d, k] = torch.randn(r, d).to(dtype), orthonormal(d, k, basis_dtype)
    results = {case: projected(*inputs, complement) for case, inputs in cases.items()}
    for case, inputs in cases.items():
        assert_exact(results[case], *inputs, complement, f"r, d, k = {case}:")
    for threads in {1, 2, 4} - {torch.get_num_threads()}:
        with use_threads(threads):
            for case, inputs in cases.items():
                assert same_bits(projected(*inputs, complement), results[case]), (threads, case)


LAYOUTS = {
    "wide rows": lambda r, d: torch.full((r, d + 9), torch.nan, dtype=torch.float64)[:, 4 : 4 + d],
    "every third row": lambda r, d: torch.full((3 * r, d), torch.nan, dtype=torch.float64)[1::3],
    "every second column": lambda r, d: torch.full((r, 2 * d), torch.nan, dtype=torch.float64)[:, 1::2],
    "column-major": lambda r, d: torch.full((d, r), torch.nan, dtype=torch.float64).T,
}


def laid_out(t, layout):
    """The view of a larger buffer of NaN that holds ``t``, and the buffer."""
    view = LAYOUTS[layout](*t.shape)
    buffer = view._base.to(t.dtype)
    return buffer.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(t), buffer


@FORMS
@pytest.mark.parametrize("dtype, basis_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("of", ["g", "basis"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(isa, layout, of, dtype, basis_dtype, complement):
    for r, d, k in ((1, 7, 3), (50, 49, 24), (3, 140, 130)):
        g, basis = torch.randn(r, d).to(dtype), orthonormal(d, k, basis_dtype)
        t = g if of == "g" else basis
        strided, buffer = laid_out(t, layout)
        before = buffer.clone()
        expected = projected(g, basis, complement)
        if of == "g":
            null_project_(strided, basis, complement)
            assert same_bits(strided, expected)
            strided.copy_(t)
        else:
            null_project_(g, strided, complement)
            assert same_bits(g, expected)
        assert same_bits(buffer, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_dimensions_than_two(isa, dtype):
    basis = orthonormal(31, 9, torch.promote_types(dtype, torch.float32))
    for g in (torch.randn(3, 5, 31), torch.randn(31), torch.randn(2, 0, 31), torch.randn(5, 3, 31).transpose(0, 1)):
        g = g.to(dtype)
        expected = projected(g.reshape(-1, 31).clone(), basis, True).view(g.shape)
        null_project_(g, basis)
        assert same_bits(g, expected)


LISTS = {
    "few and large, all threads on each": [(130, 257, 130), (16, 97, 33), (1, 600, 20)],
    "one": [(16, 1030, 513)],
    "many and small, a thread on each": [(r, d, k) for r in (1, 16, 49) for d, k in BASES],
}


@pytest.mark.parametrize("sizes", LISTS)
def test_a_list_equals_one_call_each_bit_for_bit(isa, sizes):
    pairs, forms = itertools.cycle(PAIRS), itertools.cycle([True, False, False])
    items = [
        (torch.randn(r, d).to(dtype), orthonormal(d, k, basis_dtype), complement)
        for (r, d, k), (dtype, basis_dtype), complement in zip(LISTS[sizes], pairs, forms, strict=False)
    ]
    singly = [projected(*item) for item in items]

    def together():
        gs = [g.clone() for g, *_ in items]
        null_project_(gs, [basis for _, basis, _ in items], [complement for *_, complement in items])
        return gs

    for gs in on_all_threads(together):
        assert all(same_bits(a, b) for a, b in zip(gs, singly, strict=True))


def test_one_matrix_twice_in_a_list_is_projected_twice(isa):
    g, one, two = torch.randn(20, 60), orthonormal(60, 7, torch.float32), orthonormal(60, 9, torch.float32)
    expected = projected(projected(g, one, True), two, False)
    other = torch.randn(3, 60)
    null_project_([g, other, g], [one, one, two], [True, True, False])
    assert same_bits(g, expected) and (other @ one).abs().max() < 1e-5


class Watched(TorchDispatchMode):
    """What PyTorch's dispatcher is asked for; a call that sees a mode takes the way of the registered ops."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@reads_tensors
def test_a_list_of_any_length_is_one_call_into_the_kernels(monkeypatch):
    made = []
    project = extension.null_project_tensors
    monkeypatch.setattr(extension, "null_project_tensors", lambda *given: made.append(project(*given)) or made[-1])
    monkeypatch.setattr(null_projection, "_project_list_op", None)  # no call of the dispatcher
    counts = set()
    for length in (1, 2, 50):
        gs, basis = [torch.randn(2, 31) for _ in range(length)], orthonormal(31, 9, torch.float32)
        with torch.no_grad():
            counts.add(calls(lambda: null_project_(gs, [basis] * length)))  # noqa: B023
        assert all((g @ basis).abs().max() < 1e-5 for g in gs)
    assert made == [True] * 3 and len(counts) == 1 and counts.pop() <= 26


@reads_tensors
def test_both_ways_into_the_kernels_give_the_same_bits(isa):
    pairs, forms = itertools.cycle(PAIRS), [True, False] * 4
    items = [(torch.randn(3, 5, d), k) for d, k in BASES[:8]]
    gs = [g.to(dtype) for (g, _), (dtype, _) in zip(items, pairs, strict=False)]
    bases = [orthonormal(g.shape[-1], k, dtype) for (g, k), (_, dtype) in zip(items, pairs, strict=False)]
    expected = [g.clone() for g in gs]
    with Watched() as watched:
        null_project_(expected, bases, forms)
    assert "guardspace.null_project_list_.default" in watched.seen
    null_project_(gs, bases, forms)
    assert all(same_bits(g, one) for g, one in zip(gs, expected, strict=True))


UNUSUAL = {
    "a subclass": lambda g: g.as_subclass(type("Own", (torch.Tensor,), {})),
    "without a view as a matrix": lambda g: g.expand(2, 3, *g.shape).clone().transpose(0, 1)[..., :2, :],
    "a tensor of inference mode": lambda g: torch.inference_mode()(g.clone)(),
    "a tuple": lambda g: (g.clone(), g.clone()),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_tensors_are_projected_too(isa, kind):
    basis = orthonormal(31, 9, torch.float32)
    g = UNUSUAL[kind](torch.randn(4, 31))
    gs = list(g) if isinstance(g, tuple) else [g]
    expected = [projected(one.detach().contiguous(), basis, True) for one in gs]
    null_project_(*((g, (basis, basis)) if isinstance(g, tuple) else (g, basis)))
    assert all(torch.equal(one.as_subclass(torch.Tensor), want) for one, want in zip(gs, expected, strict=True))


def test_a_basis_whose_memory_holds_other_signs_is_read_as_it_is_meant(isa):
    g, basis = torch.randn(4, 31), orthonormal(31, 9, torch.float32)
    signs = torch.ones(9)
    signs[::2] = -1
    negated = torch.complex(basis, -basis * signs).conj().imag
    assert negated.is_neg()
    expected = projected(g, basis * signs, False)
    torch.testing.assert_close(projected(g, negated, False), expected, rtol=0, atol=0)


def test_a_list_may_be_asked_for_again_with_other_tensors_in_the_same_objects(isa):
    basis = orthonormal(31, 9, torch.float32)
    parameters = [torch.nn.Parameter(torch.randn(4, 31)) for _ in range(3)]
    with torch.no_grad():
        for make in (lambda: torch.randn(4, 31), lambda: torch.randn(31, 4).T, lambda: torch.randn(5, 31).double()):
            values = [make() for _ in parameters]
            bases = [basis.to(values[0].dtype)] * len(values)
            expected = [projected(value, bases[0], True) for value in values]
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data = value
            null_project_(parameters, bases)
            assert all(same_bits(p.detach(), one) for p, one in zip(parameters, expected, strict=True))


def test_threads_project_at_once(isa):
    basis = orthonormal(97, 33, torch.float32)
    lists = [[torch.randn(16, 97) for _ in range(8)] for _ in range(4)]
    expected = [[projected(g, basis, True) for g in gs] for gs in lists]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda gs: null_project_(gs, [basis] * 8), lists))
    for gs, ones in zip(lists, expected, strict=True):
        assert all(same_bits(g, one) for g, one in zip(gs, ones, strict=True))


@FORMS
def test_projecting_twice_is_projecting_once(isa, complement):
    for r, d, k in ((16, 97, 33), (130, 257, 130)):
        basis = orthonormal(d, k, torch.float64)
        once = projected(torch.randn(r, d, dtype=torch.float64), basis, complement)
        torch.testing.assert_close(projected(once, basis, complement), once, rtol=0, atol=1e-13)


@FORMS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype, basis_dtype", PAIRS, ids=str)
def test_a_bad_entry_shows_in_its_row_only(isa, dtype, basis_dtype, bad, complement):
    for r, d, k, i, j in ((1, 13, 3, 0, 12), (50, 49, 24, 47, 0), (49, 140, 131, 48, 139)):
        g, basis = torch.randn(r, d).to(dtype), orthonormal(d, k, basis_dtype)
        g[i, j] = bad
        finite = projected(g, basis, complement).isfinite()
        assert not finite[i].any() and finite[torch.arange(r) != i].all()


@pytest.mark.parametrize("dtype, basis_dtype", PAIRS, ids=str)
def test_nothing_beyond_the_operands_is_read_or_written(isa, dtype, basis_dtype):
    for (r, d, k), complement in itertools.product(
        ((1, 1, 1), (3, 13, 5), (50, 49, 47), (16, 140, 129)), (True, False)
    ):
        poison_scratch(1)
        g, basis = Guarded.around(torch.randn(r, d).to(dtype)), Guarded.around(orthonormal(d, k, basis_dtype))
        expected = projected(g.matrix.clone(), basis.matrix.clone(), complement)
        poison_scratch(1)
        null_project_(g.matrix, basis.matrix, complement)
        assert same_bits(g.matrix, expected) and expected.isfinite().all() and g.intact() and basis.intact()


# ---- AdamW

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def updates(count, dtype=torch.float32, d=31):
    lists = [[torch.randn(3, d, dtype=dtype) for _ in range(count)] for _ in range(3)]
    lists.append([torch.rand(3, d, dtype=dtype) for _ in range(count)])
    return [*lists, [torch.tensor(float(i + 1)) for i in range(count)], [orthonormal(d, 9, dtype)] * count]


@reads_tensors
def test_a_step_of_adamw_is_a_few_calls_for_a_list_of_any_length(monkeypatch):
    monkeypatch.setattr(null_projection, "_adamw_op", None)
    counts = set()
    with torch.no_grad():
        projected_adamw_(*updates(1), **SETTINGS)  # what PyTorch does in the first call of a process alone
    for length in (1, 2, 50):
        lists = updates(length)
        with torch.no_grad():
            counts.add(calls(lambda: projected_adamw_(*lists, **SETTINGS)))  # noqa: B023
        assert all((a @ lists[5][0]).abs().max() < 1e-5 for a in lists[0])
    assert len(counts) == 1 and counts.pop() <= 70


@reads_tensors
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_both_ways_through_a_step_of_adamw_agree(isa, dtype, complement):
    lists = updates(3, dtype)
    twin = [[t.clone() for t in values] for values in lists]
    versions = [lists[i][0]._version for i in range(4)]
    with Watched() as watched:
        projected_adamw_(*twin, complement, **SETTINGS)
    assert "guardspace.projected_adamw_.default" in watched.seen
    projected_adamw_(*lists, complement, **SETTINGS)
    for ours, theirs in zip(lists[:5], twin[:5], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    assert [lists[i][0]._version > version for i, version in enumerate(versions)] == [True, False, True, True]


@pytest.mark.parametrize("unusual", ["strided", "bfloat16", "twice", "another shape", "float64 steps", "grad"])
def test_what_the_fused_step_would_not_check_takes_the_way_of_the_op(unusual):
    lists = updates(2)
    if unusual == "strided":
        lists[2] = [torch.randn(31, 3).T for _ in range(2)]
    elif unusual == "bfloat16":
        lists[:4] = [[t.bfloat16() for t in values] for values in lists[:4]]
    elif unusual == "twice":
        lists[0][1] = lists[0][0]
    elif unusual == "another shape":
        lists[1][1] = torch.randn(1, 31)
    elif unusual == "float64 steps":
        lists[4][0] = lists[4][0].double()
    else:
        lists[0][1].requires_grad_()
    before = [[t.detach().clone() for t in values] for values in lists]
    given = (*lists, True, *SETTINGS.values())
    assert not cpu_kernels.projected_adamw_direct(*given)
    assert all(
        torch.equal(t, old) for new, olds in zip(lists, before, strict=True) for t, old in zip(new, olds, strict=True)
    )


def converted(source, to, d=64, stride=1):
    """``source`` through the kernels' conversions: the projection onto all, with an empty basis."""
    wide = torch.promote_types(torch.promote_types(source.dtype, to), torch.float32)
    g = torch.empty(len(source) // d, d * stride, dtype=source.dtype)[:, ::stride].copy_(source.view(-1, d))
    out = torch.full((len(g), d * stride), torch.nan, dtype=to)[:, ::stride]
    cpu_kernels.project_into(out, g, torch.empty(d, 0, dtype=wide), True)
    return out.reshape(-1)


def assert_converts(source, to, dtype_of_values=None):
    expected = source.to(to)
    for d, stride in ((64, 1), (64, 2), (1, 1), (8, 1)):
        for result in on_all_threads(lambda: converted(source, to, d, stride)):  # noqa: B023
            assert torch.equal(result.isnan(), expected.isnan())
            number = ~expected.isnan()
            assert same_bits(result[number], expected[number])


HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)


def every(half):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)


@HALVES
@pytest.mark.parametrize("to", [torch.float32, torch.float64, None], ids=str)
def test_every_half_precision_number_is_read_exactly(isa, half, to):
    assert_converts(every(half), to or half)


@HALVES
@pytest.mark.parametrize("source", [torch.float32, torch.float64], ids=str)
def test_halves_are_rounded_to_nearest_ties_to_even(isa, half, source):
    """Every half, the middle between it and the next one away from zero, and the float32 numbers beside the middle."""
    values = every(half)
    following = (values.view(torch.int16) + 1).view(half)
    middle = ((values.double() + following.double()) / 2).float()  # exact
    middle = torch.where(values.abs() == torch.finfo(half).max, values.double() * (1 + 2.0**-12), middle).float()
    up, down = (middle.nextafter(middle * factor) for factor in (2, 0.5))
    assert_converts(torch.cat([values.float(), middle, up, down]).to(source), half)


@HALVES
def test_overflow_underflow_and_special_numbers_are_those_of_torch(isa, half):
    largest = torch.finfo(half).max
    border = {torch.float16: 65520.0, torch.bfloat16: 2.0**128 - 2.0**119}[half]  # rounds to infinity, as a tie
    numbers = [0.0, largest, 3.3e38, torch.inf, torch.nan, 1e-45, 1e-40, 2.0**-25, 2.0**-24, 2.0**-126, 6e-8, 3e-8, 1.0]
    values = torch.tensor([*numbers, border, border * (1 - 2.0**-23), 65504.0, 65519.99], dtype=torch.float64).float()
    # NaN with the lowest bit alone, which rounding would lose, and with all of them, which it would carry over.
    nans = torch.tensor([0x7F800001, 0x7F807FFF, 0x7FBFFFFF, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    values = torch.cat([values, nans.view(torch.float32)])
    random = torch.randint(-(2**31), 2**31, (2**15 - 2 * len(values),)).to(torch.int32).view(torch.float32)
    assert_converts(torch.cat([values, -values, random]), half)
