"""Triton's interpreter, with bfloat16 mended: it computes on the raw bits of a bfloat16 and truncates casts to it."""

from __future__ import annotations

import os

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    reason = "a CUDA device is here: Triton's interpreter takes a run of its own, with TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)

_Builder = interpreter.InterpreterBuilder
_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def _is_bfloat16(handle: interpreter.TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: interpreter.TensorHandle) -> np.ndarray:
    if not _is_bfloat16(handle):
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even, NaN kept."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if not (_is_bfloat16(a) or _is_bfloat16(b)):
        return ORIGINAL["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
    product = np.matmul(_widened(a), _widened(b), dtype=np.float32)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _binary(self, left, right, op):
    if not _is_bfloat16(left):
        return ORIGINAL["binary_op"](self, left, right, op)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        result = op(_widened(left), _widened(right))
    if op in _COMPARISONS:
        return interpreter.TensorHandle(result, tl.int1)
    return interpreter.TensorHandle(_rounded(result), left.dtype.scalar)


def _unary(self, value, op):
    if not _is_bfloat16(value):
        return ORIGINAL["unary_op"](self, value, op)
    return interpreter.TensorHandle(_rounded(op(_widened(value))), value.dtype.scalar)


def _cast(self, source, wanted):
    to = wanted.scalar
    if _is_bfloat16(source) == (to == tl.bfloat16):
        return ORIGINAL["cast_impl"](self, source, wanted)
    if to == tl.bfloat16:
        return interpreter.TensorHandle(_rounded(source.data.astype(np.float32)), to)
    return interpreter.TensorHandle(_widened(source).astype(interpreter._get_np_dtype(to)), to)


def _cast_rounding(self, source, wanted, rounding):
    if tl.bfloat16 in (source.dtype.scalar, wanted.scalar):
        return _cast(self, source, wanted)
    return ORIGINAL["create_fp_to_fp"](self, source, wanted, rounding)


_MENDED = {
    "create_dot": _dot,
    "binary_op": _binary,
    "unary_op": _unary,
    "cast_impl": _cast,
    "create_fp_to_fp": _cast_rounding,
}
ORIGINAL = {name: getattr(_Builder, name) for name in _MENDED}


def mend() -> None:
    """For the whole process; again is harmless."""
    for name, function in _MENDED.items():
        setattr(_Builder, name, function)
