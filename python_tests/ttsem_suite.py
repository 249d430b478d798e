"""Calls of the ops on a GPU that does not exist, for ``python -m ttsem.sanitize pytest``; test_ttsem.py runs them.

ttsem executes what Triton's own front end compiled, where the interpreter executes the Python of a kernel. It knows the
tensors that a launch is given, but not those whose addresses stand in a table: here every call has one item. The
kernels at the end have bugs, and their tests pass when ttsem says so.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from oracle import assert_as_exact_as_plain, orthonormal

import guardspace_kernels as gk
from guardspace_kernels.ops import (
    _triton,
    _triton_table,
    covariance_update_,
    null_project_,
    projected_lora,
    symmetrize_,
)
from guardspace_kernels.ops.projected_lora import triton_tma

EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_triton, "devices", {"cuda", "cpu"})  # inside of an op its tensors look like the CPU's
    with gk.use_backend("triton"):
        yield


@EACH_DTYPE
@pytest.mark.parametrize("T, d", [(70, 72), (33, 130)])
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
def test_covariance_update(dtype, T, d, masked):
    x = torch.randn(T, d, device="cuda").to(dtype)
    mask = torch.rand(T, device="cuda") < 0.6 if masked else None
    C = torch.zeros(d, d, device="cuda")
    covariance_update_(C, x, mask, 0.5)
    kept = x.cpu().float() if mask is None else x.cpu().float()[mask.cpu()]
    assert_as_exact_as_plain(
        C.cpu().tril(), (0.5 * (kept.T @ kept)).tril(), (0.5 * (kept.double().T @ kept.double())).tril()
    )


def test_covariance_of_slices_of_tokens():
    x, C = torch.randn(2100, 40, device="cuda").bfloat16(), torch.zeros(40, 40, device="cuda")
    covariance_update_(C, x)
    kept = x.cpu().float()
    assert_as_exact_as_plain(C.cpu().tril(), (kept.T @ kept).tril(), (kept.double().T @ kept.double()).tril())


def test_symmetrize():
    C = torch.randn(130, 130, device="cuda")
    lower = C.cpu().tril()
    symmetrize_(C)
    assert torch.equal(C.cpu(), lower + lower.tril(-1).T)


@EACH_DTYPE
@pytest.mark.parametrize("complement", [True, False], ids=["range", "null"])
@pytest.mark.parametrize("r, d, k", [(5, 100, 30), (40, 96, 48)])
def test_null_project(dtype, complement, r, d, k):
    G, Q = torch.randn(r, d).to(dtype), orthonormal(d, k, torch.float32)

    def projected(G, Q):
        onto = (G @ Q) @ Q.T
        return G - onto if complement else onto

    ours = G.to("cuda")
    null_project_(ours, Q.to("cuda"), complement)
    assert_as_exact_as_plain(ours.cpu(), projected(G.float(), Q).to(dtype), projected(G.double(), Q.double()))


@EACH_DTYPE
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_projected_lora(dtype, dropout):
    T, d_in, d_out, r, k = 70, 72, 50, 5, 24  # fewer than 64 tokens are left to the library
    x, W, dy = torch.randn(T, d_in).to(dtype), torch.randn(d_out, d_in).to(dtype), torch.randn(T, d_out).to(dtype)
    A, B, Q = torch.randn(r, d_in), torch.randn(d_out, r), orthonormal(d_in, k, torch.float32)

    def gradients(x, W, A, B, Q, dy, layer):
        x, A, B = (t.detach().requires_grad_() for t in (x, A, B))
        y = layer(x, W, A, B, Q)
        y.backward(dy)
        return [t.detach().cpu() for t in (y, x.grad, A.grad, B.grad)]

    def ours(x, W, A, B, Q):
        return projected_lora(x, W, A, B, Q, True, 1.7, dropout=dropout, seed=torch.tensor(7))

    def textbook(x, W, A, B, Q):
        A_P = A - (A @ Q) @ Q.T
        return x @ W.T + 1.7 * (x @ A_P.to(x.dtype).T) @ B.to(x.dtype).T

    found = gradients(*(t.to("cuda") for t in (x, W, A, B, Q, dy)), ours)
    assert all(t.isfinite().all() for t in found)
    if dropout == 0.0:
        plain = gradients(x, W, A, B, Q, dy, textbook)
        truth = gradients(*(t.double() for t in (x, W, A, B, Q, dy)), textbook)
        for mine, theirs, exact in zip(found, plain, truth, strict=True):
            assert_as_exact_as_plain(mine, theirs, exact)


TMA_ROWS = [row for row in _triton_table.ROWS if row.kernel == "projected_lora.linear_tma"]


@pytest.mark.parametrize("by_rows", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("row", TMA_ROWS, ids=lambda row: f"{row.targets[0]} {row.key}")
def test_the_base_product_by_tma(row, by_rows, monkeypatch):
    """Without a bias: ttsem gives back what a launch wrote to its tensors, not to its descriptors alone, and then y is
    among the former."""
    monkeypatch.setattr(triton_tma, "_processors", lambda device: 3)  # fewer than the tiles
    x, W, h, up = (torch.randn(*shape).bfloat16() for shape in ((200, 72), (72, 520), (200, 24), (24, 520)))
    right = [t.T.contiguous().to("cuda").T if by_rows else t.to("cuda") for t in (W, up)]
    y = triton_tma.linear(row, x.to("cuda"), right[0], None, h.to("cuda"), right[1])
    exact = x.double() @ W.double() + h.double() @ up.double()
    assert_as_exact_as_plain(y.cpu(), x @ W + h @ up, exact)


@triton.jit
def add_program(X, Y, last_read, last_written, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < last_read)
    tl.store(Y + i, x + tl.program_id(0), mask=i < last_written)  # two programs never store the same


def added(x, last_read=40, last_written=40, step=16):
    y = torch.zeros(40, device="cuda")
    add_program[(triton.cdiv(40, step),)](x, y, last_read, last_written, STEP=step, BLOCK=16)
    return y.cpu()


def test_a_clean_kernel_passes():
    x = torch.randn(40, device="cuda")
    assert torch.equal(added(x), x.cpu() + torch.arange(40) // 16)


@pytest.mark.parametrize(
    "bug, reason",
    [
        ({"last_read": 41}, "reads 1 element.* past the end of the tensor passed as `X`"),
        ({"last_written": 41}, "writes 1 element.* past the end of the tensor passed as `Y`"),
        ({"step": 15}, "both touch element 15 of `Y`"),
    ],
    ids=["a load", "a store", "a race"],
)
def test_a_kernel_with_a_bug_is_caught(bug, reason):
    with pytest.raises(Exception, match=reason):  # ttsem's own, of the module that runs as __main__
        added(torch.randn(40, device="cuda"), **bug)


def test_what_nobody_wrote_is_nan():
    assert added(torch.empty(40, device="cuda")).isnan().all()
