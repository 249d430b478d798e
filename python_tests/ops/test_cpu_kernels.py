"""What the C++ kernels have in common: the choice of an instruction set, threads, and random shapes and strides."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backends import ISAS, THREADS, require_extension, same_bits, use_isa, use_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_as_exact_as_plain, dense_projector, orthonormal

import guardspace_kernels as gk
from guardspace_kernels import dispatch
from guardspace_kernels.ops import covariance_update_, null_project_, projected_lora
from guardspace_kernels.ops._cpu import extension, view
from guardspace_kernels.ops.null_projection import reference as null_projection
from guardspace_kernels.ops.projected_lora import cpu_kernels

pytestmark = pytest.mark.cpu_kernels


@pytest.fixture
def backend():
    """The C++ kernels or an error."""
    require_extension()
    with gk.use_backend("cpu"):
        yield


def test_the_kernels_are_what_runs_by_default():
    x, C = torch.randn(4, 3), torch.zeros(3, 3)
    calls = {
        "covariance": (("covariance_update_", "symmetrize_", "squared_drift"), (C, x, None)),
        "null_projection": (("null_project_",), (x, C)),
        "projected_lora": (("primitives",), (x, C, x, x, None)),
    }
    with gk.use_backend("auto"):
        for op, (entries, arguments) in calls.items():
            for entry in entries:
                assert dispatch.resolve(op, entry, *arguments).__module__ == f"guardspace_kernels.ops.{op}.cpu_kernels"


@pytest.mark.parametrize(
    "strange", [torch.zeros(3, 3, device="meta"), torch.eye(3).to_sparse()], ids=["meta", "sparse"]
)
def test_tensors_that_are_not_dense_or_elsewhere_are_refused_with_the_reason(strange):
    dense = torch.zeros(3, 3)
    for op, arguments in (
        ("covariance", (dense, strange, None)),
        ("covariance", (strange, dense, None)),
        ("null_projection", (dense, strange)),
        ("projected_lora", (dense, dense, dense, strange, None)),
        ("projected_lora", (dense, dense, dense, dense, strange)),
    ):
        ok, reason = dispatch.can_use(op, *arguments, backend="cpu")
        assert not ok and f"{strange.device}" in reason and f"{strange.layout}" in reason


def test_a_basis_that_is_narrower_than_the_arithmetic_is_left_to_the_reference():
    for g, basis in ((torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16)):
        arguments = torch.zeros(3, 4, dtype=g), torch.zeros(4, 2, dtype=basis)
        ok, reason = dispatch.can_use("null_projection", *arguments, backend="cpu")
        assert not ok and f"basis is {basis}" in reason


def test_every_instruction_set_can_be_chosen_and_no_other():
    before = extension.isa()
    assert extension.supported_isas()[-1] == "baseline" and set(ISAS) <= set(extension.supported_isas())
    for name in ISAS:
        with use_isa(name):
            assert extension.isa() == name
    with pytest.raises(ValueError, match=r"GUARDSPACE_ISA must be one of .*baseline on this CPU, got sse9"):
        extension.use_isa("sse9")
    assert extension.isa() == before


@pytest.mark.parametrize("wanted", ["", "baseline", "sse9"])
def test_the_environment_variable_chooses_at_the_start(wanted):
    code = "import torch; from guardspace_kernels import _cpu; print(_cpu.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GUARDSPACE_ISA": wanted, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if wanted == "sse9":
        assert done.returncode == 1 and "GUARDSPACE_ISA must be one of" in done.stderr and "got sse9" in done.stderr
    else:
        assert done.stdout.strip() == (wanted or extension.supported_isas()[0]), done.stderr


@pytest.mark.parametrize("dtype, name", [(0, "float64"), (1, "float32"), (3, "bfloat16")], ids=str)
def test_the_peak_is_measured(isa, dtype, name):
    assert 1e8 < extension.peak_flops(dtype, 0.003, 1) < 1e13


def operands(seed):
    """Of sizes that differ between seeds. The basis is made here: torch's QR is not the same bit for bit every time."""
    n = 30 + 23 * seed
    sizes = {"x": (3 * n, n), "g": (16 + seed, n), "h": (3, n), "W": (n + 1, n), "A": (5, n), "B": (n + 1, 5)}
    drawn = {name: torch.randn(*size) for name, size in {**sizes, "dy": (3 * n, n + 1)}.items()}
    return {"seed": seed, "basis": orthonormal(n, n // 3, torch.float32), **drawn}


def work(seed, basis, x, g, h, W, A, B, dy):
    """All ops; what they write is their own."""
    tokens, n = x.shape
    C, D = torch.zeros(n, n), torch.zeros(n, n)
    covariance_update_([C, D], [x, x.bfloat16()], [None, torch.arange(tokens) % 3 == 0], 0.5)
    drift = torch.tensor(extension.quadratic_form(view(C), view(g), view(g), torch.get_num_threads()))
    null_project_([g := g.clone(), h := h.bfloat16()], [basis, basis])
    x, A, B = (t.clone().requires_grad_() for t in (x, A, B))
    y = projected_lora(x, W, A, B, basis, dropout=0.5, seed=seed)
    y.backward(dy)
    return {
        "C": C, "D": D, "drift": drift, "g": g, "h": h,
        "y": y.detach(), "dx": x.grad, "dA": A.grad, "dB": B.grad,
    }  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_python_do_not_disturb_each_other(isa, threads):
    cases = [operands(seed) for seed in range(6)]
    with use_threads(threads):
        expected = [work(**case) for case in cases]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda case: work(**case), 3 * cases))
    wrong = {
        (i % 6, name): (result[name] - expected[i % 6][name]).abs().max()
        for i, result in enumerate(results)
        for name in result
        if not same_bits(result[name], expected[i % 6][name])
    }
    assert not wrong


@st.composite
def matrices(draw, rows, cols, dtype):
    """A normal matrix of these sizes: its columns or rows apart, in either order, from the middle of a buffer."""
    row_step, col_step = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    top, left, transposed = draw(st.integers(0, 2)), draw(st.integers(0, 17)), draw(st.booleans())
    size = (rows, cols) if not transposed else (cols, rows)
    buffer = torch.full((top + size[0] * row_step + 1, left + size[1] * col_step + 1), torch.nan, dtype=dtype)
    inner = buffer[top : top + size[0] * row_step : row_step, left : left + size[1] * col_step : col_step]
    inner = inner.T if transposed else inner
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return inner.copy_(torch.randn(rows, cols, generator=generator, dtype=torch.float64))


DTYPE, ISA, COUNT = st.sampled_from(DTYPES), st.sampled_from(ISAS or ["none"]), st.sampled_from(THREADS)
SIZE = st.one_of(st.integers(1, 20), st.integers(21, 150))
SHORT = settings(max_examples=25, deadline=None, derandomize=True)


def around(view):
    """The buffer of a view, with NaN where the view is."""
    base = view._base if view._base is not None else view
    copy = base.clone()
    copy.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(torch.nan)
    return copy


@SHORT
@given(st.data(), ISA, COUNT, st.integers(1, 3))
def test_any_list_of_covariances(data, isa, threads, members):
    Cs, xs, masks, starts, scale = [], [], [], [], data.draw(st.floats(-3, 3))
    for _ in range(members):
        T, d, dtype = data.draw(SIZE) - 1, data.draw(SIZE), data.draw(DTYPE)
        Cs.append(data.draw(matrices(d, d, data.draw(st.sampled_from([torch.float32, torch.float64])))))
        xs.append(data.draw(matrices(T, d, dtype)))
        masks.append(data.draw(st.sampled_from([None, torch.arange(T) % 3 != 0, torch.zeros(T).int()])))
        starts.append(Cs[-1].clone())
    with use_isa(isa), use_threads(threads), gk.use_backend("cpu"):
        covariance_update_(Cs, xs, masks, scale)
    for C, x, mask, start in zip(Cs, xs, masks, starts, strict=True):
        rows = x if mask is None else x[mask.bool()]
        wide = torch.promote_types(torch.promote_types(x.dtype, C.dtype), torch.float32)
        plain, truth = ((start.to(t) + scale * (rows.to(t).T @ rows.to(t))).tril() for t in (wide, torch.float64))
        assert_as_exact_as_plain(C.tril(), plain.to(C.dtype), truth)
        assert same_bits(C.triu(1), start.triu(1)) and around(C).isnan().all() and around(x).isnan().all()


@SHORT
@given(st.data(), ISA, COUNT, st.integers(1, 3))
def test_any_list_of_projections(data, isa, threads, members):
    gs, bases, complements, starts = [], [], [], []
    for _ in range(members):
        r, d, dtype = data.draw(SIZE), data.draw(SIZE), data.draw(DTYPE)
        k = data.draw(st.integers(0, d - 1))
        gs.append(data.draw(matrices(r, d, dtype)))
        wide = torch.promote_types(dtype, torch.float32)
        bases.append(data.draw(matrices(d, k, data.draw(st.sampled_from([wide, torch.float64])))))
        bases[-1].copy_(orthonormal(d, k))
        complements.append(data.draw(st.booleans()))
        starts.append(gs[-1].clone())
    with use_isa(isa), use_threads(threads), gk.use_backend("cpu"):
        null_project_(gs, bases, complements)
    for g, basis, complement, start in zip(gs, bases, complements, starts, strict=True):
        truth = start.double() @ dense_projector(basis, complement, g.shape[1])
        plain = null_projection.project(start, basis, complement).to(g.dtype)
        if truth.abs().max() > 0.05:  # else the rounding is that of what was subtracted
            assert_as_exact_as_plain(g, plain, truth)
        assert around(g).isnan().all() and around(basis).isnan().all()


@SHORT
@given(st.data(), ISA, COUNT, DTYPE, SIZE, SIZE, SIZE, SIZE, st.booleans(), st.booleans())
def test_any_projected_lora(data, isa, threads, dtype, T, d_in, d_out, r, biased, dropout):
    most = data.draw(st.sampled_from([0, sys.maxsize]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "uses_own_product", lambda *_: True)
        patch.setattr(cpu_kernels, "tokens_of_one_call", lambda *_: (1, most))
        check_projected_lora(data, isa, threads, dtype, T, d_in, d_out, r, biased, dropout)


def check_projected_lora(data, isa, threads, dtype, T, d_in, d_out, r, biased, dropout):
    x, W, dy = (data.draw(matrices(*size, dtype)) for size in ((T, d_in), (d_out, d_in), (T, d_out)))
    A, B = (
        data.draw(matrices(*size, data.draw(st.sampled_from([dtype, torch.float64]))))
        for size in ((r, d_in), (d_out, r))
    )
    bias = data.draw(matrices(1, d_out, dtype))[0] if biased else None
    keep = None

    def call(leaves, dtype=None):
        if dtype is None:
            return projected_lora(leaves[0], W, *leaves[1:], scale=0.5, bias=bias, dropout=0.5 * dropout, seed=7)
        inputs = leaves[0].to(dtype) if keep is None else leaves[0].to(dtype) * keep.to(dtype)
        y = leaves[0].to(dtype) @ W.to(dtype).T + (0 if bias is None else bias.to(dtype))
        return y + (inputs @ leaves[1].to(dtype).T) @ (0.5 * leaves[2]).to(dtype).T

    results = []
    for kind in (None, dtype, torch.float64):
        if kind is None:
            leaves = [t.detach().requires_grad_() for t in (x, A, B)]
        else:
            leaves = [t.detach().to(torch.promote_types(kind, t.dtype)).requires_grad_() for t in (x, A, B)]
        with use_isa(isa), use_threads(threads), gk.use_backend("cpu"):
            if dropout and kind is not None and keep is None:
                eye, zero = torch.eye(d_in, dtype=dtype), torch.zeros(d_in, d_in, dtype=dtype)
                keep = projected_lora(torch.ones(T, d_in, dtype=dtype), zero, eye, eye, dropout=0.5, seed=7)
            y = call(leaves, kind)
            y.backward(dy.to(y.dtype))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs, true in zip(*results, strict=True):
        if true.abs().max() > 0:
            assert_as_exact_as_plain(ours, theirs, true)
        else:
            assert not ours.any()
    assert all(around(t).isnan().all() for t in (x, W, dy, A, B))
