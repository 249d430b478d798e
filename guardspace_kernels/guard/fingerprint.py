"""Fingerprints: what identifies a tensor, and the weights of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from guardspace_kernels.guard.layers import parameter_values

_TABLE_WIDTH = 512


def tensor_fingerprint(t: torch.Tensor) -> str:
    """A hash of a tensor's dtype, shape and bits that does not depend on its device, strides or the thread count.

    The bits are laid out as a table of 64-bit words; SHA-256 runs over its wrapping row and column sums (and the few
    words left over). At memory speed it tells models apart by accident, not against someone who forges one.
    """
    if t.is_meta:
        raise ValueError(f"a weight of shape {tuple(t.shape)} is on the meta device: load the model first")
    digest = hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode())
    data = t.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # part of a larger buffer, where 64-bit words cannot begin
        data = data.clone()
    whole = data.numel() - data.numel() % (8 * _TABLE_WIDTH)
    table = data[:whole].view(torch.int64).reshape(-1, _TABLE_WIDTH)
    for part in (table.sum(dim=0), table.sum(dim=1), data[whole:]):
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class ModelFingerprint:
    """What identifies a model: a hash over all of its parameters, and one for each layer concerned."""

    model: str
    layers: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[str]) -> ModelFingerprint:
        """Of a sharded model in every process at once; one parameter at a time is gathered, or read from a disk."""
        shards: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
        for module in shards:
            module.reshard()  # the last forward may have left parameters gathered, in the dtype it computed in
        # A tied weight counts under each of its names: whether two are one tensor changes with where a model is kept.
        parameters = sorted(model.named_parameters(remove_duplicate=False))
        marks: dict[int, str] = {}
        for name, p in parameters:
            if id(p) not in marks:
                marks[id(p)] = tensor_fingerprint(parameter_values(model, name, p))
        each = {name: marks[id(p)] for name, p in parameters}
        whole = hashlib.sha256("\n".join(f"{name} {value}" for name, value in each.items()).encode())
        return cls(whole.hexdigest()[:32], {name: each[f"{name}.weight"] for name in layers})

    def check(self, other: ModelFingerprint, subject: str) -> None:
        """ValueError that says which layers differ unless both are of the same weights."""
        if self.model == other.model and all(self.layers.get(n) == v for n, v in other.layers.items()):
            return
        differing = [name for name, value in other.layers.items() if self.layers.get(name) != value]
        where = f"layer {differing[0]} differs" if differing else "a weight outside the guarded layers differs"
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise ValueError(
            f"{subject} belong to another model: {where}{more}. They are bound to the weights they were made from; "
            "collect statistics and plan again for this model"
        )
