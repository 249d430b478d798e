"""How the CUDA kernels of the null projection are launched, and what they cost, compiled for the CPU."""

from __future__ import annotations

import cuda_on_cpu
import pytest
import torch
from backends import automatic, cuda_kernels, same_bits  # noqa: F401
from oracle import FLOOR, dense_projector, orthonormal
from test_gpu_null_projection import (
    DTYPES,
    SETTINGS,
    assert_exact,
    assert_same_update,
    mixed,
    project_list,
    projected,
    states,
    wider,
)
from torch.library import opcheck

from guardspace_kernels import dispatch
from guardspace_kernels.ops import null_project_, projected_adamw_
from guardspace_kernels.ops.null_projection import cuda_kernels as kernels

pytestmark = [automatic, pytest.mark.cuda_on_cpu, pytest.mark.usefixtures("cuda_kernels")]

PRODUCT = 16 * 8 * 8 / 3  # of three by TF32


@pytest.fixture
def count(cuda_kernels):  # noqa: F811
    """What the shim has counted since the last time."""
    cuda_on_cpu.take_counters(cuda_kernels)
    return lambda: cuda_on_cpu.take_counters(cuda_kernels)


def test_a_list_of_all_kinds(count):
    items = mixed()
    results = project_list(items)
    assert count()["launches"] == 5  # few rows and many, onto the bases and back, and a sum of slices
    for result, item in zip(results, items, strict=True):
        assert_exact(result, *item, f"{tuple(result.shape)}:")
    assert all(same_bits(a, b) for a, b in zip(project_list(items), results, strict=True))


def test_more_items_than_the_arguments_of_one_launch_hold(count):
    items = [(torch.randn(2, 48), orthonormal(48, 20, torch.float32), True) for _ in range(140)]
    results = project_list(items)
    launches = count()["launches"]
    assert 4 < launches < 12
    for result, item in zip(results, items, strict=True):
        assert_exact(result, *item)


def test_few_matrices_are_split_into_slices(count):
    for r, d, slices in ((4, 12 * 32, 8), (20, 33, 2), (4, 32, 1)):
        g, basis = torch.randn(r, d), orthonormal(d, 20, torch.float32)
        result = projected(g, basis)
        assert_exact(result, g, basis, True)
        counted = count()
        assert counted["launches"] == 2 + (slices > 1)
        sums = 4 * r * 20  # of one slice, with what rounds it up to 64 bytes
        assert counted["bytes_written"] == slices * sums + (slices > 1) * -(-sums // 64) * 64 + 4 * r * d
        assert same_bits(projected(g, basis), result)
        count()


def test_slices_of_other_items_have_no_step():
    """The widest item decides how many slices there are."""
    items = [(torch.randn(3, d), orthonormal(d, 3, torch.float32), True) for d in (5, 700)]
    for result, item in zip(project_list(items), items, strict=True):
        assert_exact(result, *item)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_may_have_another_dtype(dtype, out_dtype):
    for (r, d, k), complement in (((5, 33, 9), True), ((20, 64, 16), False)):
        g, basis = torch.randn(r, d).to(dtype), orthonormal(d, k, torch.float32)
        out = torch.full((r, d), torch.nan, dtype=out_dtype)
        kernels.project([(g, out, basis, complement)])
        truth = g.double() @ dense_projector(basis, complement, d)
        assert (out.double() - truth).abs().max() <= 2 * FLOOR[out_dtype] * truth.abs().max()
    kernels.project([])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r, tile", [(16, 16), (64, 64)])
def test_what_a_projection_costs(dtype, r, tile, count):
    d, k = 256, 64
    g, basis = torch.randn(r, d).to(dtype), orthonormal(d, k, torch.float32)
    projected(g, basis)
    counted = count()
    assert counted["products"] == 2 * r * d * k / PRODUCT and counted["conflicts"] == 0
    entry, slices, sums = g.element_size(), 8, 4 * r * k
    # G, the basis, the slices' sums; for each 64 columns H, and their rows of the basis; G once more.
    assert (
        counted["bytes_read"] == r * d * entry + 4 * d * k + slices * sums + d // 64 * sums + 4 * d * k + r * d * entry
    )
    assert counted["bytes_written"] == slices * sums + sums + r * d * entry
    least = 2 * 4 * d * k + 3 * r * d * entry + 2 * sums
    assert counted["bytes_read"] + counted["bytes_written"] <= least * (1.5 if r == 16 else 2.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_of_one_and_of_all(dtype, count):
    sizes = [(1, 31, 9), (16, 64, 64), (33, 48, 0), (20, 160, 48), (2, 1, 1)]
    lists = states(sizes, dtype)
    before = wider(lists, dtype)
    projected_adamw_(*lists, **SETTINGS)
    assert count()["launches"] == 2 * (2 + 1 + 2)  # two heights onto the bases, sums of slices, two heights back
    assert_same_update(lists, before)
    assert all(same_bits(g, old) for g, old in zip(lists[1], before[1], strict=True))
    assert lists[4] == before[4]
    for u in zip(*wider(before, dtype), strict=True):
        one = [[value] for value in u]
        old = wider(one, dtype)
        projected_adamw_(*one, **SETTINGS)
        assert_same_update(one, old)


def test_other_dtypes_are_refused_and_left_to_the_reference(count):
    g, basis = torch.randn(5, 16, dtype=torch.float64), orthonormal(16, 4, torch.float64)
    null_project_(g, basis)
    assert (g @ basis).abs().max() < 1e-12 and count()["launches"] == 0
    assert dispatch.can_use("null_projection", g, basis, backend="cuda") == (
        False,
        "a tensor is torch.float64; the CUDA kernels compute in float32",
    )


def test_the_ops_are_registered_as_torch_wants_them():
    items = [[t] for t in (torch.randn(3, 16), orthonormal(16, 4, torch.float32), True)]
    opcheck(torch.ops.guardspace.null_project_.default, [values[0] for values in items])
    opcheck(torch.ops.guardspace.null_project_list_.default, items)
    opcheck(torch.ops.guardspace.projected_adamw_.default, [*states([(3, 17, 4)], torch.float32), *SETTINGS.values()])
