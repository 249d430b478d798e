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

_PARTS = ("sinks", "covariance", "held", "keys", "rows")
_DTYPES = (torch.float32, torch.float64)
_ROW_DTYPES = (*_DTYPES, torch.float16, torch.bfloat16)  # as a model computes


def check_prompts(path: str | os.PathLike[str], header: Mapping[str, Any], least: int = 1) -> None:
    """ValueError unless a file counts ``least`` prompts or more, and no fewer than it holds out, tells apart or judges,
    nor judges fewer than were refused."""
    prompts, held, distinct = header["prompts"], header.get("held_prompts", 0), len(header.get("distinct", ()))
    judged, refused = header.get("judged", 0), header.get("refused", 0)
    if prompts < max(least, held, distinct, judged) or judged < refused:
        raise ValueError(
            f"{os.fspath(path)} counts {prompts} prompts, but {least} or more were collected, {held} of them can be "
            f"held out, {distinct} are distinct, {judged} were judged and {refused} refused; the file was altered: "
            "make it again"
        )


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
        mine = {part: tensors[f"{i}.{part}"] for part in _PARTS if f"{i}.{part}" in tensors}
        why = _wrong_shapes(mine) or _wrong_content(mine, entry)
        if why:
            raise ValueError(f"{what} {why}; collect them again")
        for part, tokens in (("covariance", entry["tokens"]), ("held", entry.get("held_tokens", 0))):
            if part in mine:
                read = partial(_triangle, what, mine[part], tokens, zeros or part == "held")
                checked[f"{i}.{part}"] = replace(mine[part], read=read)
    return checked


def _wrong_shapes(mine: Mapping[str, StoredTensor]) -> str:
    """What is wrong with an input's tensors; empty if nothing is."""
    d, dtype = mine["sinks"].shape[1], mine["sinks"].dtype
    for triangle in [mine[part] for part in ("covariance", "held") if part in mine]:
        if d == 0 or triangle.shape != (d * (d + 1) // 2,) or triangle.dtype != dtype:
            return (
                f"do not fit: {dtype} inputs of {d} features, a triangle of {triangle.shape[0]} entries in "
                f"{triangle.dtype}"
            )
    if "keys" in mine and mine["rows"].shape != (mine["keys"].shape[0], d):
        return (
            f"do not fit: {mine['keys'].shape[0]} keys of sampled rows, which are {mine['rows'].shape}, of {d} features"
        )
    return ""


def _wrong_content(mine: Mapping[str, StoredTensor], entry: Mapping[str, Any]) -> str:
    """Likewise, in numbers and in the tensors that are read at once."""
    distinct, held_tokens = mine["sinks"].shape[0], entry.get("held_tokens", 0)
    if distinct > entry["sink_tokens"] or (distinct == 0 and entry["sink_tokens"] > 0):
        return f"hold {distinct} distinct first tokens of {entry['sink_tokens']}"
    if held_tokens > (entry["tokens"] if "held" in mine else 0):
        return (
            f"hold out {held_tokens} of {entry['tokens']} tokens, " + ("with" if "held" in mine else "without") + " C"
        )
    if not is_finite(mine["sinks"].read()):
        return "hold non-finite first tokens"
    if "keys" not in mine:
        return ""
    if not is_finite(mine["rows"].read()):
        return "hold non-finite sampled rows"
    keys = mine["keys"].read()
    if (keys < 0).any() or (keys.diff() <= 0).any() or (kinds_of(keys) >= len(KINDS)).any():
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
