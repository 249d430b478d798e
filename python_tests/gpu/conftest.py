"""These tests run on a CUDA device; with GUARDSPACE_TEST_DEVICE=cpu on the CPU, which tests the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import guardspace_kernels as gk
from guardspace_kernels import dispatch
from guardspace_kernels.ops import _cuda


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """Where a test computes; float64 truth is computed on the CPU."""
    chosen = torch.device(os.environ.get("GUARDSPACE_TEST_DEVICE", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    # On the CPU the C++ kernels would answer, which no CUDA tensor ever meets.
    with gk.use_backend("reference" if chosen.type == "cpu" else "auto"):
        yield chosen


@pytest.fixture
def cuda(device) -> torch.device:
    """The device, for what only CUDA has."""
    if device.type != "cuda":
        pytest.skip(f"the CUDA runtime's own features do not exist on {device}")
    return device


@pytest.fixture(params=["triton", "cuda"])
def kernels(request, device, monkeypatch) -> str:
    """The kernels of one backend, each in turn; the reference for what they do not take."""
    if device.type == "cuda":
        if request.param == "cuda" and _cuda.library is None:
            must = os.environ.get("GUARDSPACE_CUDA") == "1"
            (pytest.fail if must else pytest.skip)("the CUDA kernels are not built or do not load")
        monkeypatch.setattr(dispatch, "BACKENDS", (request.param, "reference"))
    elif request.param == "cuda":
        pytest.skip("on the CPU the reference runs, once is enough")
    return request.param
