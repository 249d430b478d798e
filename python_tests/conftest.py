"""Seeds, clean settings, and uninitialised memory that shows."""

from __future__ import annotations

import os
import sys

import pytest
import setuptools  # noqa: F401  # before distutils is, or torch's inductor cannot import it in the same process
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._device import _device_constructors

# Before Triton is imported, be it by torch: its own functions are interpreted too, or cannot be called by what is. On a
# machine with a GPU the kernels run there; the interpreter's tests then take a run with this set from outside.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Nothing is fetched: a name that is no folder is refused at once, where there is a network and where there is none.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_device_constructors()  # remembered: torch.device("meta") must know torch.empty itself, not the one poisoned below


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _automatic_backend(monkeypatch):
    monkeypatch.delenv("GUARDSPACE_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """What this package allocates without initialising it holds NaN, so that a kernel that skips an entry is caught."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            result = allocate(*args, **kwargs)
            ours = sys._getframe(1).f_globals.get("__name__", "").startswith("guardspace_kernels")
            if ours and result.is_floating_point() and not isinstance(result, FakeTensor) and not result.is_meta:
                result.detach().fill_(float("nan"))
            return result

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def fresh_compiler():
    """Nothing compiled before counts against the limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def matmul_precision():
    """A function that sets how float32 products may be rounded; undone at the end."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]

    def choose(name):
        if name == "bf16 for one backend":  # reading the process-wide setting raises from then on
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        else:
            torch.set_float32_matmul_precision(name)

    yield choose
    torch.set_float32_matmul_precision("highest")
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision
