"""The Triton and CUDA kernels of the null projection and of AdamW within it, on CPU tensors, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import Guarded, automatic, gpu_kernels, same_bits  # noqa: F401
from oracle import FLOOR, dense_projector, orthonormal

from guardspace_kernels.ops import null_project_, projected_adamw_
from guardspace_kernels.ops.null_projection import reference

pytestmark = [automatic, pytest.mark.usefixtures("gpu_kernels")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: (r, d, k): one row to several tiles; ragged and aligned; no column, one, all.
SIZES = [(1, 31, 9), (16, 64, 64), (20, 48, 0), (33, 130, 97), (128, 64, 32), (3, 1, 1), (1, 1, 0), (16, 160, 48)]
FORMS = pytest.mark.parametrize("complement", [True, False], ids=["range basis", "null basis"])


def projected(g, basis, complement=True):
    g = g.clone()
    null_project_(g, basis, complement)
    return g


def assert_close(result, plain, truth, largest, case=""):
    """At most twice the error of plain PyTorch, relative to the largest entry of the input."""
    errors = [(t.double() - truth).abs().max().item() / largest if t.numel() else 0.0 for t in (result, plain)]
    assert result.dtype == plain.dtype
    assert errors[0] <= 2 * errors[1] + FLOOR[result.dtype], f"{case} {errors[0]:.2e}, plain {errors[1]:.2e}"


def assert_exact(result, g, basis, complement, case=""):
    truth = g.double() @ dense_projector(basis, complement, g.shape[-1])
    plain = reference.project(g, basis, complement).to(g.dtype)
    assert_close(result, plain, truth, g.double().abs().max().item() if g.numel() else 1.0, case)


@FORMS
@pytest.mark.parametrize(
    "dtype, basis_dtype", [*((dtype, torch.float32) for dtype in DTYPES), (torch.float32, torch.bfloat16)], ids=str
)
def test_every_rank_and_basis(dtype, basis_dtype, complement):
    for r, d, k in SIZES:
        g, basis = torch.randn(r, d).to(dtype), orthonormal(d, k, basis_dtype)
        result = projected(g, basis, complement)
        assert_exact(result, g, basis, complement, f"r, d, k = {r, d, k}:")
        assert same_bits(projected(g, basis, complement), result)


def mixed():
    """Items of every dtype, alignment and height of tile, as (g, basis, complement)."""
    sizes = [(1, 31, 9), (5, 17, 3), (20, 130, 97), (16, 64, 64), (32, 48, 0), (33, 35, 3), (40, 64, 32)]
    return [
        (torch.randn(r, d).to(dtype), orthonormal(d, k, torch.float32), i % 3 == 0)
        for i, ((r, d, k), dtype) in enumerate(itertools.product(sizes, DTYPES))
    ]


def project_list(items):
    gs = [g.clone() for g, *_ in items]
    null_project_(gs, [basis for _, basis, _ in items], [complement for *_, complement in items])
    return gs


def test_one_matrix_twice_in_a_list_is_projected_twice():
    g, one, two = torch.randn(20, 60), orthonormal(60, 7, torch.float32), orthonormal(60, 9, torch.float32)
    expected = projected(projected(g, one), two, False)
    other = torch.randn(3, 60)
    null_project_([g, other, g], [one, one, two], [True, True, False])
    assert same_bits(g, expected) and (other @ one).abs().max() < 1e-5


LAYOUTS = {
    "wide rows": lambda r, d: torch.full((r, d + 9), torch.nan)[:, 4 : 4 + d],
    "every third row": lambda r, d: torch.full((3 * r, d), torch.nan)[1::3],
    "every second column": lambda r, d: torch.full((r, 2 * d), torch.nan)[:, 1::2],
    "column-major": lambda r, d: torch.full((d, r), torch.nan).T,
}


@FORMS
@pytest.mark.parametrize("of", ["g", "basis"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout, of, complement):
    for r, d, k in ((1, 7, 3), (50, 48, 16)):
        g, basis = torch.randn(r, d), orthonormal(d, k, torch.float32)
        expected = projected(g, basis, complement)
        source = g if of == "g" else basis
        view = LAYOUTS[layout](*source.shape).copy_(source)
        before = view._base.clone()
        result, its_basis = (view, basis) if of == "g" else (g, view)
        null_project_(result, its_basis, complement)
        assert same_bits(result, expected)
        view.copy_(source)
        assert same_bits(view._base, before)


def test_other_dimensions_than_two():
    basis = orthonormal(31, 9, torch.float32)
    for g in (torch.randn(3, 5, 31), torch.randn(31), torch.randn(2, 0, 31), torch.randn(5, 3, 31).transpose(0, 1)):
        expected = projected(g.reshape(-1, 31).clone(), basis).view(g.shape)
        assert same_bits(projected(g, basis), expected)
        null_project_(g, basis)
        assert same_bits(g, expected)
    empty = torch.ones(3, 0)
    null_project_([empty, torch.ones(0, 4)], [torch.ones(0, 0), torch.ones(4, 2)])
    null_project_([], [])


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_the_operands_is_read_or_written(dtype, complement):
    guarded = [
        (Guarded.around(torch.randn(r, d).to(dtype)), Guarded.around(orthonormal(d, k, torch.float32)))
        for r, d, k in ((1, 1, 1), (3, 13, 5), (50, 49, 47), (16, 128, 96))
    ]
    for items in ([pair] for pair in guarded), [guarded]:
        for pairs in items:
            expected = [projected(g.matrix.clone(), basis.matrix.clone(), complement) for g, basis in pairs]
            null_project_([g.matrix for g, _ in pairs], [basis.matrix for _, basis in pairs], complement)
            for (g, basis), one in zip(pairs, expected, strict=True):
                torch.testing.assert_close(g.matrix, one, rtol=0, atol=2 * FLOOR[dtype])
                assert g.matrix.isfinite().all() and g.intact() and basis.intact()


@FORMS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_entry_shows_in_its_row_only(bad, complement):
    for r, d, k, i, j in ((1, 13, 3, 0, 12), (50, 49, 24, 31, 0), (49, 140, 131, 32, 139)):
        g, basis = torch.randn(r, d), orthonormal(d, k, torch.float32)
        g[i, j] = bad
        finite = projected(g, basis, complement).isfinite()
        assert not finite[i].any() and finite[torch.arange(r) != i].all()


def test_an_empty_basis_keeps_the_bits():
    g = torch.tensor([[0.0, -0.0, 1.5, torch.inf]])
    assert same_bits(projected(g, torch.empty(4, 0)), g)
    assert same_bits(projected(g, torch.empty(4, 0), False), torch.zeros(1, 4))


def test_autograd_notices_the_write():
    g = torch.randn(3, 31)
    y = (g * torch.ones(3, 31, requires_grad=True)).sum()
    null_project_(g, orthonormal(31, 9, torch.float32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# ---- AdamW

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def states(sizes, dtype, start=3):
    """Lists of params, grads, first and second moments, steps, bases and complements."""
    lists = [[], [], [], [], [], [], []]
    for i, (r, d, k) in enumerate(sizes):
        tensors = [torch.randn(r, d).to(dtype) for _ in range(3)]
        tensors += [torch.rand(r, d).to(dtype), torch.tensor(float(start + i)), orthonormal(d, k, torch.float32)]
        for values, value in zip(lists, [*tensors, i % 3 != 1], strict=True):
            values.append(value)
    return lists


def wider(lists, dtype):
    return [[t.to(dtype, copy=True) if i < 4 else t for t in values] for i, values in enumerate(lists)]


def reference_adamw(lists, settings=SETTINGS):
    reference.projected_adamw_([reference.Update(*u, tuple(settings.values())) for u in zip(*lists, strict=True)])
    return lists


def assert_same_update(lists, before, settings=SETTINGS):
    truth = reference_adamw(wider(before, torch.float64), settings)
    plain = reference_adamw(wider(before, before[0][0].dtype), settings)
    for i, name in ((0, "param"), (2, "exp_avg"), (3, "exp_avg_sq")):
        for result, one, exact in zip(lists[i], plain[i], truth[i], strict=True):
            assert_close(result, one, exact, exact.abs().max().item() if exact.numel() else 1.0, name)


@pytest.mark.parametrize("beta1, beta2", [(0.0, 0.0), (0.5, 0.9), (0.999, 0.99999)])
@pytest.mark.parametrize("step", [1, 2, 30, 40, 100000])
def test_bias_correction_is_exact_in_float32(beta1, beta2, step):
    lists = states([(3, 17, 4)], torch.float32, step)
    before = wider(lists, torch.float32)
    settings = {**SETTINGS, "beta1": beta1, "beta2": beta2, "eps": 0.1}
    projected_adamw_(*lists, **settings)
    assert_same_update(lists, before, settings)


def test_the_first_step_of_adamw():
    """Its moments are ``1 − beta`` times what float32 makes of the gradient: ``1 − 0.9999`` in float32 is 2e-4 off."""
    params, grads, firsts, seconds, *rest = states([(3, 17, 4)], torch.float32, 1)
    lists = [params, grads, [firsts[0].zero_()], [seconds[0].zero_()], *rest]
    before = wider(lists, torch.float32)
    settings = {**SETTINGS, "beta2": 0.9999}
    projected_adamw_(*lists, **settings)
    assert_same_update(lists, before, settings)


def test_adamw_of_strided_matrices():
    lists = states([(7, 17, 4)], torch.float32)
    expected = wider(lists, torch.float32)
    projected_adamw_(*expected, **SETTINGS)
    for layout in LAYOUTS.values():
        views = [[layout(7, 17).copy_(t) for t in values] if i < 4 else values for i, values in enumerate(lists)]
        outside = [values[0]._base.isnan().sum() for values in views[:4]]
        projected_adamw_(*views, **SETTINGS)
        for i in (0, 2, 3):
            assert same_bits(views[i][0], expected[i][0])
        assert [values[0]._base.isnan().sum() for values in views[:4]] == outside


def test_adamw_counts_as_a_write():
    lists = states([(3, 17, 4)], torch.float32)
    versions = [lists[i][0]._version for i in range(4)]
    projected_adamw_(*lists, **SETTINGS)
    assert [lists[i][0]._version > version for i, version in enumerate(versions)] == [True, False, True, True]
