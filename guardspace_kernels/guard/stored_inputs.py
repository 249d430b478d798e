"""What statistics and checkpoints must hold to be possible, checked as they are read."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from guardspace_kernels.guard.files import StoredTensor, check_shapes
from guardspace_kernels.guard.null_space import is_finite
from guardspace_kernels.guard.sampling import KINDS, kinds_of

_DTYPES = (torch.float32, torch.float64)
_ROW_DTYPES = (*_DTYPES, torch.float16, torch.bfloat16)  # as a model computes


def checked_inputs(
    path: str | os.PathLike[str],
    tensors: Mapping[str, StoredTensor],
    entries: Sequence[Mapping[str, Any]],
    layers: Collection[str],
    zeros: bool = False,
) -> dict[str, StoredTensor]:
    """The tensors of a file with an input per entry; covariances are checked whenever they are read.

    Args:
        entries: with ``layers``, ``tokens``, ``sink_tokens`` and, where some were held out, ``held_tokens``.
        layers: that there can be.
        zeros: whether a covariance of some tokens may be zero, as it may be before the last batch.

    Raises:
        ValueError: a layer that is unknown or there twice, tensors that are missing, superfluous, of other shapes or
            dtypes, or not finite, or counts that do not agree; the message names file and layer.
    """
    expected: dict[str, tuple[tuple[int | None, ...], tuple[torch.dtype, ...]]] = {}
    for i in range(len(entries)):
        expected |= {f"{i}.sinks": ((None, None), _DTYPES), f"{i}.covariance": ((None,), _DTYPES)}
        if f"{i}.held" in tensors:
            expected[f"{i}.held"] = (None,), _DTYPES
        if f"{i}.keys" in tensors:
            expected |= {f"{i}.keys": ((None,), (torch.int64,)), f"{i}.rows": ((None, None), _ROW_DTYPES)}
    check_shapes(path, tensors, expected)
    seen: set[str] = set()
    checked = dict(tensors)
    for i, entry in enumerate(entries):
        what = f"{os.fspath(path)}: the statistics of layer {entry['layers'][0]}"
        for name in entry["layers"]:
            if name in seen or name not in layers:
                raise ValueError(f"{what} are of {name}, which is {'there twice' if name in seen else 'unknown'}")
            seen.add(name)
        held_tokens = entry.get("held_tokens", 0)
        mine = {name: tensors.get(f"{i}.{name}") for name in ("sinks", "covariance", "held", "keys", "rows")}
        why = _wrong_shapes(**mine) or _wrong_counts(**mine, **{**entry, "held_tokens": held_tokens})
        if why:
            raise ValueError(f"{what} {why}; collect them again")
        for name, tokens in (("covariance", entry["tokens"]), ("held", held_tokens)):
            stored = mine[name]
            if stored is not None:
                read = partial(_triangle, what, stored, tokens, zeros or name == "held")
                checked[f"{i}.{name}"] = replace(stored, read=read)
    return checked


def _wrong_shapes(
    sinks: StoredTensor,
    covariance: StoredTensor,
    held: StoredTensor | None,
    keys: StoredTensor | None,
    rows: StoredTensor | None,
) -> str:
    """What is wrong with them; empty if nothing is."""
    d = sinks.shape[1]
    for triangle in (covariance, held):
        if triangle is not None and (d == 0 or triangle.shape != (d * (d + 1) // 2,) or triangle.dtype != sinks.dtype):
            return (
                f"do not fit: {sinks.dtype} inputs of {d} features, a triangle of {triangle.shape[0]} entries in "
                f"{triangle.dtype}"
            )
    if keys is not None and rows is not None and rows.shape != (keys.shape[0], d):
        return f"do not fit: {keys.shape[0]} keys of sampled rows, which are {rows.shape}, of {d} features"
    return ""


def _wrong_counts(
    sinks: StoredTensor,
    keys: StoredTensor | None,
    rows: StoredTensor | None,
    held: StoredTensor | None,
    *,
    tokens: int,
    sink_tokens: int,
    held_tokens: int,
    **_: Any,
) -> str:
    """Likewise, of numbers and of the tensors that are read at once."""
    distinct = sinks.shape[0]
    if distinct > sink_tokens or (distinct == 0 and sink_tokens > 0):
        return f"hold {distinct} distinct first tokens of {sink_tokens}"
    if held_tokens > (0 if held is None else tokens):
        return f"hold {held_tokens} tokens out of {tokens}"
    if not is_finite(sinks.read()):
        return "hold non-finite first tokens"
    if rows is not None and not is_finite(rows.read()):
        return "hold non-finite sampled rows"
    marks = torch.empty(0, dtype=torch.int64) if keys is None else keys.read()
    if (marks < 0).any() or (marks.diff() <= 0).any() or (kinds_of(marks) >= len(KINDS)).any():
        return "hold sampled rows whose keys are out of order"
    return ""


def _triangle(what: str, stored: StoredTensor, tokens: int, zeros: bool) -> torch.Tensor:
    triangle = stored.read()
    row = torch.arange((math.isqrt(8 * triangle.numel() + 1) - 1) // 2)
    diagonal = triangle[row * (row + 3) // 2]
    largest = float(diagonal.max())
    why = ""
    if not is_finite(triangle):
        why = "non-finite values"
    elif float(diagonal.min()) < 0:
        why = "a negative diagonal"
    elif max(abs(float(extreme)) for extreme in triangle.aminmax()) > (1 + 1e-3) * largest:
        why = "entries that are larger than any on the diagonal"
    elif tokens == 0 and largest > 0:
        why = "a covariance of no token that is not zero"
    elif tokens > 0 and largest == 0 and not zeros:
        why = f"a covariance of {tokens} tokens that is zero"
    if why:
        raise ValueError(f"{what} hold {why}; collect them again, or leave the layer out of target_modules")
    return triangle
