"""Null-space projection on a GPU: tensors as matrices, which each backend projects, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from guardspace_kernels.ops._library import rows, unit_inner, written
from guardspace_kernels.ops.null_projection.reference import Projection, Update

#: (g, out, basis, complement): out ← g P
Item = tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]


def null_project_(project: Callable[[list[Item]], None], projections: list[Projection]) -> None:
    """By ``project``, which takes matrices whose rows are contiguous."""
    projections = [projection for projection in projections if projection[0].numel()]
    if len({g.data_ptr() for g, *_ in projections}) < len(projections):  # one matrix twice: one after the other
        for projection in projections:
            null_project_(project, [projection])
        return
    flats = [unit_inner(rows(g)) for g, *_ in projections]
    project([(flat, flat, basis, complement) for flat, (_, basis, complement) in zip(flats, projections, strict=True)])
    _write_back([(g, flat) for (g, *_), flat in zip(projections, flats, strict=True)])


def projected_adamw_(step: Callable[[list[Update], list[list[torch.Tensor]]], None], updates: list[Update]) -> None:
    """By ``step``, which takes param, grad, exp_avg and exp_avg_sq of each update as such matrices."""
    flats = [[unit_inner(rows(t)) for t in (u.param, u.grad, u.exp_avg, u.exp_avg_sq)] for u in updates]
    step(updates, flats)
    for u, (a, _, m, v) in zip(updates, flats, strict=True):
        _write_back([(u.param, a), (u.exp_avg, m), (u.exp_avg_sq, v)])


def _write_back(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for t, flat in pairs:
        if flat.data_ptr() != t.data_ptr():
            t.copy_(flat.view(t.shape))
    written(*(t for t, _ in pairs))
