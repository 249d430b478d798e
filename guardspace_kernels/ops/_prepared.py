"""What a GPU backend prepared for a list of tensors, done again without Python's work for each of them.

An optimiser projects the same matrices in every step. The first call checks them, chooses rows of the table and packs
addresses; as long as addresses, sizes, strides, dtypes and devices are the same, the next ones only launch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from guardspace_kernels import dispatch
from guardspace_kernels.ops._cpu import READS_TENSORS, extension
from guardspace_kernels.ops._library import differentiated

Lists = tuple[Sequence[torch.Tensor], ...]

_PLANS: OrderedDict[Hashable, Callable[..., None]] = OrderedDict()
_MOST_PLANS = 256
_changing = threading.Lock()


def any_kept() -> bool:
    return bool(_PLANS)


def keep(entry: str, lists: Lists, flags: Sequence[bool], again: Callable[..., None]) -> None:
    """``again`` does ``entry`` for these tensors once more; it holds none of them, and takes settings that change."""
    key = _key(entry, lists, flags)
    if key is not None:
        with _changing:
            _PLANS[key] = again
            if len(_PLANS) > _MOST_PLANS:
                _PLANS.popitem(last=False)


def run(entry: str, lists: Lists, flags: Sequence[bool], *settings: float) -> bool:
    """Whether an earlier call had these tensors on this stream: then it was done again, unless autograd must see it.

    The first list is written.
    """
    key = _key(entry, lists, flags)
    with _changing:
        again = _PLANS.pop(key, None)
        if again is None:
            return False
        _PLANS[key] = again  # the most recent one
    if differentiated(*lists[0]):
        return False
    device = lists[0][0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        again(*settings)
    return True


def _key(entry: str, lists: Lists, flags: Sequence[bool]) -> Hashable:
    """None where nothing may be kept: a graph that is captured lives longer than a plan and what it holds."""
    described = _described(lists) if lists[0] else None
    if described is None:
        return None
    device, stream = lists[0][0].device, None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        # Another stream would not wait for what a plan sent to the device.
        stream = torch.cuda.current_stream(device).cuda_stream
    return entry, dispatch.BACKENDS, dispatch.requested_backend(), device, stream, tuple(flags), described


def _described(lists: Lists) -> Hashable:
    if READS_TENSORS:
        return extension.describe(lists)
    tensors = [t for members in lists for t in members]
    if not all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout == torch.strided for t in tensors):
        return None
    facts: list[Any] = [len(members) for members in lists]
    for t in tensors:
        facts += (t.data_ptr(), t.dtype, t.device, t.shape, t.stride(), t.is_neg())
    return tuple(facts)
