"""The C++ kernels for the CPU: whether they are here, and tensors as they take them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from guardspace_kernels import dispatch
from guardspace_kernels.ops._library import overlaps_itself

# After torch, whose OpenMP runtime the extension then shares.
extension: Any
try:
    extension = importlib.import_module("guardspace_kernels._cpu")
except ImportError as error:
    extension = None
    _REASON = f"the C++ extension is not built or does not load ({error}); `guardspace env` says why"

#: Whether PyTorch has the C functions by which the extension reads tensors, from 2.10 on.
READS_TENSORS = extension is not None and hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
if READS_TENSORS:
    exchange = torch.Tensor.__dlpack_c_exchange_api__
    extension.read_tensors(exchange, (torch.Tensor, torch.nn.Parameter), torch.Tensor.is_neg)

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

View = tuple[int, int, int, int, int, int]


def register(op: str, accepts: dispatch.Accepts, **functions: Callable[..., Any]) -> None:
    """As ``dispatch.register`` if the extension is here, else the reason why not."""
    if extension is None:
        dispatch.unavailable(op, "cpu", _REASON)
    else:
        dispatch.register(op, "cpu", accepts, **functions)


def accepts(*tensors: torch.Tensor | None) -> tuple[bool, str]:
    """Whether every tensor is a dense one on the CPU."""
    for t in tensors:
        if t is not None and (t.device.type != "cpu" or t.layout != torch.strided):
            return False, f"a tensor is on {t.device} with layout {t.layout}; the C++ kernels take dense CPU tensors"
    return True, "dense CPU tensors"


def accepts_written(target: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[bool, str]:
    """The same, where ``target`` is written and so must not lie over itself."""
    ok, reason = accepts(target, *tensors)
    overlap = overlaps_itself(target) if ok else ""
    return (False, overlap) if overlap else (ok, reason)


def view(t: torch.Tensor) -> View:
    """A 2-D tensor as the kernels take it; the caller keeps ``t`` alive during the call."""
    rows, cols = t.shape
    return (t.data_ptr(), _DTYPES[t.dtype], rows, cols, t.stride(0), t.stride(1))
