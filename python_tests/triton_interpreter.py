"""Triton's interpreter, with bfloat16 mended: it computes on the raw bits of a bfloat16 and truncates casts to it."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel of this package is decorated

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_ORIGINAL = {name: getattr(_Builder, name) for name in ("create_dot", "binary_op", "cast_impl", "create_fp_to_fp")}
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
        return _ORIGINAL["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
    product = np.matmul(_widened(a), _widened(b), dtype=np.float32)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _binary(self, left, right, op):
    if not _is_bfloat16(left):
        return _ORIGINAL["binary_op"](self, left, right, op)
    result = op(_widened(left), _widened(right))
    return interpreter.TensorHandle(result if op in _COMPARISONS else _rounded(result), left.dtype.scalar)


def _cast(self, source, wanted):
    to = wanted.scalar
    if to == tl.bfloat16 and source.dtype.scalar in (tl.float32, tl.float16):
        return interpreter.TensorHandle(_rounded(source.data.astype(np.float32)), to)
    if _is_bfloat16(source) and to != tl.bfloat16:
        return interpreter.TensorHandle(_widened(source).astype(interpreter._get_np_dtype(to)), to)
    return _ORIGINAL["cast_impl"](self, source, wanted)


def _cast_float(self, source, wanted, rounding):
    if tl.bfloat16 in (source.dtype.scalar, wanted.scalar):
        return self.cast_impl(source, wanted)
    return _ORIGINAL["create_fp_to_fp"](self, source, wanted, rounding)


def mend() -> None:
    """For the whole process; again is harmless."""
    _Builder.create_dot, _Builder.binary_op, _Builder.cast_impl = _dot, _binary, _cast
    _Builder.create_fp_to_fp = _cast_float
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(_Builder, name, lambda self, source, wanted: self.cast_impl(source, wanted))
