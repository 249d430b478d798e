"""The implementations that the tests choose from: backends, instruction sets of the C++ kernels, numbers of threads."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cuda_on_cpu
import pytest
import torch

import guardspace_kernels as gk
from guardspace_kernels import dispatch
from guardspace_kernels.ops import _cuda, _prepared, _triton, covariance_update_
from guardspace_kernels.ops._cpu import extension

#: All that this CPU has; only the one that GUARDSPACE_ISA names, where it is set.
ISAS: list[str] = []
if extension is not None:
    ISAS = [os.environ["GUARDSPACE_ISA"]] if os.environ.get("GUARDSPACE_ISA") else extension.supported_isas()

THREADS = (1, 2, 4)


def require_extension() -> None:
    """Skips a test of the C++ kernels where they are not built, or fails it where they must be."""
    if extension is None:
        must = os.environ.get("GUARDSPACE_REQUIRE_EXT") == "1"
        (pytest.fail if must else pytest.skip)("the C++ extension is not built or does not load")


@pytest.fixture(params=["reference", pytest.param("cpu", marks=pytest.mark.cpu_kernels)])
def backend(request) -> Iterator[str]:
    """The reference; then the automatic choice, which prefers the C++ kernels for what they accept.

    A test for which one run is enough, on whatever is here, asks for it with :data:`automatic`.
    """
    if request.param == "cpu":
        require_extension()
    with gk.use_backend("reference" if request.param == "reference" else "auto"):
        yield request.param


def use_triton(monkeypatch: pytest.MonkeyPatch, watched: bool = True) -> None:
    """The Triton kernels for what they accept, under Triton's interpreter on CPU tensors; else the reference.

    A sanitizer watches them: python_tests/triton_sanitizer.py. It must know the tensors, not only their addresses.
    """
    triton_interpreter = pytest.importorskip("triton_interpreter", reason="Triton is not installed")
    triton_interpreter.mend()
    if watched:
        importlib.import_module("triton_sanitizer").watch(monkeypatch)
    monkeypatch.setattr(dispatch, "BACKENDS", ("triton", "reference"))
    monkeypatch.setattr(_prepared, "_PLANS", OrderedDict())
    monkeypatch.setattr(_triton, "devices", {"cpu"})


def use_cuda(monkeypatch: pytest.MonkeyPatch, schedule: int) -> ctypes.CDLL:
    """The CUDA kernels for what they accept, compiled for the CPU, under a schedule of warps; else the reference."""
    if reason := cuda_on_cpu.why_not():
        pytest.skip(reason)
    loaded = cuda_on_cpu.kernels()
    loaded.shim_set_schedule(schedule)
    for name, value in {"library": loaded, "devices": {"cpu"}, "no_driver": lambda: ""}.items():
        monkeypatch.setattr(_cuda, name, value)
    for op in dispatch.OPS:
        module = importlib.import_module(f"guardspace_kernels.ops.{op}.cuda_kernels")
        entries = dispatch._registry[op, "reference"].functions
        functions = {entry: getattr(module, entry) for entry in entries}
        monkeypatch.setitem(dispatch._registry, (op, "cuda"), dispatch.Implementation(functions, module.accepts))
    monkeypatch.setattr(dispatch, "BACKENDS", ("cuda", "reference"))
    monkeypatch.setattr(_prepared, "_PLANS", OrderedDict())
    return loaded


@pytest.fixture
def triton_kernels(monkeypatch) -> None:
    use_triton(monkeypatch)


@pytest.fixture(params=cuda_on_cpu.TESTED, ids="schedule {}".format)
def cuda_kernels(request, monkeypatch) -> ctypes.CDLL:
    return use_cuda(monkeypatch, request.param)


_BOTH = [pytest.param(f"cuda {schedule}", marks=pytest.mark.cuda_on_cpu) for schedule in cuda_on_cpu.TESTED]


@pytest.fixture(params=["triton", *_BOTH])
def gpu_kernels(request, monkeypatch) -> str:
    """Each of them, one after the other."""
    name, *schedule = request.param.split()
    if name == "triton":
        use_triton(monkeypatch)
    else:
        use_cuda(monkeypatch, int(*schedule))
    return name


automatic = pytest.mark.parametrize("backend", ["automatic"], indirect=True)


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    before = extension.isa()
    extension.use_isa(name)
    try:
        yield
    finally:
        extension.use_isa(before)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=ISAS or ["none"])
def isa(request) -> Iterator[str]:
    """Every instruction set; the C++ kernels or an error."""
    require_extension()
    with use_isa(request.param), gk.use_backend("cpu"):
        poison_scratch()
        yield request.param


def calls(run: Callable[[], Any]) -> int:
    """How many functions, Python's and C's, Python calls for ``run``; the garbage collector's callbacks are not its."""
    count = 0

    def seen(_frame: Any, event: str, _function: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def poison_scratch(megabytes: float = 4) -> None:
    """Fills the kernels' scratch memory, which they keep between calls, with ones: NaN in every dtype."""
    x = torch.full((int(megabytes * 2**20 / 4 / 48), 48), -1, dtype=torch.int32).view(torch.float32)
    covariance_update_(torch.zeros(48, 48), x)


def on_all_threads(call: Callable[[], Any]) -> list[Any]:
    """The results of ``call()`` on 1, 2 and 4 threads."""
    results = []
    for count in THREADS:
        with use_threads(count):
            results.append(call())
    return results


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN included."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


@dataclass
class Guarded:
    """A matrix inside a larger buffer that holds NaN before, after and between its rows."""

    matrix: torch.Tensor
    buffer: torch.Tensor

    @classmethod
    def around(cls, matrix: torch.Tensor, margin: int = 5) -> Guarded:
        rows, cols = matrix.shape
        buffer = torch.full((rows + 2, cols + 2 * margin), torch.nan, dtype=matrix.dtype)
        inner = buffer[1:-1, margin : margin + cols]
        inner.copy_(matrix)
        return cls(inner, buffer)

    def intact(self) -> bool:
        outside = self.buffer.clone()
        cols = self.matrix.shape[1]
        margin = (outside.shape[1] - cols) // 2
        outside[1:-1, margin : margin + cols] = torch.nan
        return same_bits(outside, torch.full_like(outside, torch.nan))
