"""The CUDA kernels as a library: whether it answers without a driver, and what it says of wrong arguments."""

from __future__ import annotations

import cuda_on_cpu
import pytest
import torch
from backends import automatic, cuda_kernels  # noqa: F401

from guardspace_kernels import dispatch
from guardspace_kernels.ops import _cuda, covariance_update_


def test_triton_is_preferred():
    assert dispatch.BACKENDS.index("triton") < dispatch.BACKENDS.index("cuda") < dispatch.BACKENDS.index("cpu")


@pytest.mark.skipif(_cuda.library is None, reason="the CUDA kernels are not built")
def test_without_a_driver_the_backend_says_so(monkeypatch):
    if not (reason := _cuda.no_driver()):
        pytest.skip("there is a CUDA driver")
    assert "driver" in reason
    for op, count in (("covariance", 2), ("null_projection", 2), ("projected_lora", 5)):
        ok, why = dispatch.can_use(op, *[torch.zeros(2, 2)] * count, backend="cuda")
        assert (ok, why) == (False, f"no CUDA driver: {reason}")
    monkeypatch.setenv("GUARDSPACE_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' was requested but cannot run covariance: no CUDA driver: CUDA "):
        covariance_update_(torch.zeros(2, 2), torch.zeros(3, 2))


@pytest.mark.skipif(_cuda.library is not None, reason="the CUDA kernels are built")
def test_without_the_library_the_backend_says_so():
    ok, why = dispatch.can_use("covariance", torch.zeros(2, 2), torch.zeros(3, 2), backend="cuda")
    assert not ok and "not built" in why and "guardspace env" in why


needs_shim = pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not() or "there is a compiler")


@pytest.fixture(scope="module")
def loaded():
    return cuda_on_cpu.kernels()


def update(loaded, workspace_bytes=0, **change):
    """The text of the error of a call that is right but for ``change``."""
    C, x = torch.zeros(4, 4), torch.zeros(3, 4)
    fields = {
        "covariance": C.data_ptr(), "x": x.data_ptr(), "mask": 0, "tokens": 3, "width": 4, "stride_covariance": 4,
        "stride_x": 4, "dtype": 1,
    }  # fmt: skip
    items = _cuda.packed([tuple({**fields, **change}.values())])
    error = loaded.guardspace_cuda_covariance_update(items, 1, 1.0, None, workspace_bytes, None)
    text = loaded.guardspace_cuda_error_text(error).decode() if error else ""
    if change:
        assert (loaded.guardspace_cuda_covariance_workspace(items, 1) == -1) == ("workspace" not in text and error < 0)
    return text


@needs_shim
@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize(
    "change, text",
    [
        ({}, ""),
        ({"dtype": 0}, "items[0]: dtype is 0; 1 (float32), 2 (float16) or 3 (bfloat16) was expected"),
        ({"x": 0}, "items[0]: x is at (nil); it must be a multiple of its entries' 4 bytes, and not NULL"),
        ({"covariance": 6}, "items[0]: covariance is at 0x6; it must be a multiple of its entries' 4 bytes"),
        ({"tokens": -1}, "items[0]: x is (-1, 4); sizes must be from 0 to 2000000000"),
        ({"width": 2**31}, "items[0]: x is (3, 2147483648); sizes must be from 0 to 2000000000"),
        ({"stride_x": -4}, "items[0]: x is (3, 4) with a row stride of -4; from 0 to 2000000000 was expected"),
        ({"stride_covariance": 3}, "items[0]: covariance is (4, 4) with a row stride of 3; from 4 to 2000000000 was"),
        ({"tokens": 4000}, "workspace has 0 bytes at (nil), 192 were expected"),
    ],
)
def test_wrong_covariance_updates_are_named(loaded, change, text):
    got = update(loaded, **change)
    assert got.startswith("covariance_update: " + text) if text else got == ""


@needs_shim
@pytest.mark.cuda_on_cpu
def test_a_call_that_fails_is_an_error_in_python(monkeypatch, loaded):
    monkeypatch.setattr(_cuda, "library", loaded)
    with pytest.raises(RuntimeError, match=r"guardspace_cuda_symmetrize: error -1: .*covariance is \(-3, -3\)"):
        _cuda.call("symmetrize", torch.device("cpu"), 0, -3, 4)
    with pytest.raises(RuntimeError, match=r"guardspace_cuda_covariance_workspace: .*dtype is 7"):
        _cuda.workspace("covariance_workspace", torch.device("cpu"), _cuda.packed([(0, 0, None, 1, 1, 1, 1, 7)]), 1)


@needs_shim
@pytest.mark.cuda_on_cpu
def test_nothing_to_do_is_no_error(loaded):
    assert update(loaded, tokens=0, x=0) == "" and update(loaded, width=0, x=0, covariance=0) == ""
    assert loaded.guardspace_cuda_covariance_update(b"", 0, 1.0, None, 0, None) == 0
    assert loaded.guardspace_cuda_symmetrize(None, 0, 0, None) == 0


def test_every_declared_function_is_known_to_python():
    header = (cuda_on_cpu.SOURCES / "guardspace_cuda.h").read_text(encoding="utf-8")
    declared = {word.split("(")[0] for word in header.split("guardspace_cuda_")[1:] if "(" in word.split()[0]}
    assert declared == set(_cuda._FUNCTIONS)
