"""The CUDA C++ kernels: whether they are here, and calls of the functions of ``csrc/cuda/guardspace_cuda.h``."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

from guardspace_kernels import dispatch
from guardspace_kernels.ops._library import overlaps_itself

#: Types of devices that the kernels run on. Tests add "cpu", with the kernels compiled for it as ``library``.
devices = {"cuda"}

_DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
#: An int, an int64, a float, a double, a pointer, a string or packed items.
_TYPES = {
    "i": ctypes.c_int, "q": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double, "p": ctypes.c_void_p,
    "s": ctypes.c_char_p,
}  # fmt: skip
#: Function -> types of its result and its arguments.
_FUNCTIONS = {
    "error_text": "si",
    "device_count": "ip",
    "covariance_workspace": "qsq",
    "covariance_update": "isqfpqp",
    "symmetrize": "ipqqp",
    "null_project_workspace": "qsq",
    "null_project": "isqpqp",
    "projected_adamw_workspace": "qsq",
    "projected_adamw": "isqdddddpqp",
    "lora_linear": "isfp",
    "lora_down_workspace": "qs",
    "lora_down": "isfpqp",
    "lora_outer_workspace": "qs",
    "lora_outer": "isfpqp",
}


def load(path: Path | str) -> ctypes.CDLL:
    """The library, with the types of its functions."""
    loaded = ctypes.CDLL(str(path))
    for name, types in _FUNCTIONS.items():
        function = getattr(loaded, f"guardspace_cuda_{name}")
        function.restype, *function.argtypes = (_TYPES[kind] for kind in types)
    return loaded


library: ctypes.CDLL | None
try:
    library = load(Path(__file__).parents[1] / "_cuda.so")
except OSError as error:
    library = None
    _REASON = f"the CUDA kernels are not built or do not load ({error}); `guardspace env` says why"


def register(op: str, accepts: dispatch.Accepts, **functions: Callable[..., Any]) -> None:
    """As ``dispatch.register`` if the library is here, else the reason why not."""
    if library is None:
        dispatch.unavailable(op, "cuda", _REASON)
    else:
        dispatch.register(op, "cuda", accepts, **functions)


@cache
def no_driver() -> str:
    """Why there is no device; empty if there is a driver. It is not asked: processes forked later could not use it."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        count = ctypes.c_int()
        return error_text(_function("device_count")(ctypes.byref(count)))
    return ""


@cache
def _is_known(device: torch.device) -> bool:
    return device.type == "cpu" or (not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0))


def accepts(*tensors: torch.Tensor | None) -> tuple[bool, str]:
    """Whether every tensor is a dense one on a GPU that the kernels run on, and of at most float32."""
    if no_driver():
        return False, f"no CUDA driver: {no_driver()}"
    for t in tensors:
        if t is None:
            continue
        if t.device.type not in devices or t.layout != torch.strided:
            return False, f"a tensor is on {t.device} with layout {t.layout}; the CUDA kernels take dense CUDA tensors"
        if t.is_floating_point() and t.dtype not in _DTYPES:
            return False, f"a tensor is {t.dtype}; the CUDA kernels compute in float32"
        if not _is_known(t.device):
            return False, f"{t.device} is not an NVIDIA GPU of compute capability 8.0 or higher"
    return True, "dense CUDA tensors"


def accepts_written(out: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[bool, str]:
    """The same, where ``out`` is written and so must not lie over itself."""
    ok, reason = accepts(out, *tensors)
    overlap = overlaps_itself(out) if ok else ""
    return (False, overlap) if overlap else (ok, reason)


def _function(name: str) -> Callable[..., Any]:
    return getattr(library, f"guardspace_cuda_{name}")


def error_text(error: int) -> str:
    return _function("error_text")(error).decode()


def call(name: str, device: torch.device, *arguments: Any) -> None:
    """Runs a function on the current stream of ``device``, which is its last argument; RuntimeError if it fails."""
    on_device: AbstractContextManager[Any] = nullcontext()
    stream = None
    if device.type == "cuda":
        on_device, stream = torch.cuda.device(device), torch.cuda.current_stream(device).cuda_stream
    with on_device:
        error = _function(name)(*arguments, stream)
    if error:
        raise RuntimeError(f"guardspace_cuda_{name}: error {error}: {error_text(error)}")


def workspace(name: str, device: torch.device, *arguments: Any) -> torch.Tensor:
    """As many numbers of float32 as the function says that a call needs bytes."""
    return torch.empty(workspace_size(name, *arguments), dtype=torch.float32, device=device)


def workspace_size(name: str, *arguments: Any) -> int:
    """The same, how many they are."""
    needed = _function(name)(*arguments)
    if needed < 0:
        raise RuntimeError(f"guardspace_cuda_{name}: {error_text(needed)}")
    return needed // 4


def packed(items: Iterable[tuple[torch.Tensor | int | None, ...]]) -> bytes:
    """Items as C reads them, structures of 64-bit fields: addresses of tensors, and numbers."""
    numbers = [_number(field) for item in items for field in item]
    return struct.pack(f"{len(numbers)}q", *numbers)


def _number(field: torch.Tensor | int | None) -> int:
    if field is None:
        return 0
    return field.data_ptr() if isinstance(field, torch.Tensor) else int(field)


def dtype_of(t: torch.Tensor) -> int:
    return _DTYPES[t.dtype]
