"""The Triton kernels: whether they are here, and which chip they run on. Triton is imported at the first launch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from guardspace_kernels import dispatch
from guardspace_kernels.ops._library import overlaps_itself

#: Types of devices that the kernels run on. Tests add "cpu", where Triton's interpreter runs them.
devices = {"cuda"}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Chips that run the rows of another one: the same instructions and at least its shared memory.
_LIKE = {(8, 0): "sm80", (8, 6): "sm89", (8, 9): "sm89", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}


def register(op: str, accepts: dispatch.Accepts, *entries: str) -> None:
    """As ``dispatch.register`` with functions of ``ops/<op>/triton_kernels.py``, or the reason why not."""
    if importlib.util.find_spec("triton") is None:
        dispatch.unavailable(op, "triton", "Triton is not installed")
    else:
        dispatch.register(op, "triton", accepts, **{entry: _later(op, entry) for entry in entries})


def _later(op: str, entry: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"guardspace_kernels.ops.{op}.triton_kernels"), entry)(*args)

    return call


@cache
def target(device: torch.device) -> str | None:
    """The chip of ``_triton_table`` whose rows run on this device; None if there is none."""
    if device.type == "cpu":  # the interpreter
        return "sm80"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return name if name == "gfx942" else None
    if properties.major == 12:
        return "sm120"
    return _LIKE.get((properties.major, properties.minor))


def accepts(*tensors: torch.Tensor | None) -> tuple[bool, str]:
    """Whether every tensor is a dense one on a GPU that the kernels know, and of at most float32."""
    for t in tensors:
        if t is None:
            continue
        if t.device.type not in devices or t.layout != torch.strided:
            return False, f"a tensor is on {t.device} with layout {t.layout}; the Triton kernels take dense GPU tensors"
        if t.is_floating_point() and t.dtype not in _DTYPES:
            return False, f"a tensor is {t.dtype}; the Triton kernels compute in float32"
        if target(t.device) is None:
            return False, f"no launch configurations for {t.device}; Ampere or newer, or gfx942, is needed"
    return True, "dense GPU tensors"


def accepts_written(out: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[bool, str]:
    """The same, where ``out`` is written and so must not lie over itself."""
    ok, reason = accepts(out, *tensors)
    overlap = overlaps_itself(out) if ok else ""
    return (False, overlap) if overlap else (ok, reason)
