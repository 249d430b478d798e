"""Null-space projection on a GPU: tensors as matrices, which each backend projects, and back; the same again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from guardspace_kernels.ops import _prepared
from guardspace_kernels.ops._library import rows, unit_inner, written
from guardspace_kernels.ops.null_projection.reference import Projection, Update

#: (g, out, basis, complement): out ← g P
Item = tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]
#: Does once more what was done, for tensors at the same addresses, with other settings of AdamW; None if nothing can.
Again = Callable[..., None] | None
Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


def null_project_(project: Callable[[list[Item]], Again], projections: list[Projection]) -> None:
    """By ``project``, which takes matrices whose rows are contiguous."""
    filled = [projection for projection in projections if projection[0].numel()]
    if len({g.data_ptr() for g, *_ in filled}) < len(filled):  # one matrix twice: one after the other
        for projection in filled:
            null_project_(project, [projection])
        return
    flats = [(g, unit_inner(rows(g))) for g, *_ in filled]
    bases = [(basis, as_read(basis)) for _, basis, _ in filled]
    again = project([(g, g, basis, c) for (_, g), (_, basis), (*_, c) in zip(flats, bases, filled, strict=True)])
    _write_back(flats)
    if again is not None and _in_place([*flats, *bases]):
        gs, given, complements = zip(*projections, strict=True)
        _prepared.keep("null_project_", (gs, given), complements, again)


def projected_adamw_(step: Callable[[list[Update], list[list[torch.Tensor]]], Again], updates: list[Update]) -> None:
    """By ``step``, which takes updates with such bases, and param, grad, exp_avg and exp_avg_sq as such matrices."""
    pairs = [[(t, unit_inner(rows(t))) for t in (u.param, u.grad, u.exp_avg, u.exp_avg_sq)] for u in updates]
    bases = [(u.basis, as_read(u.basis)) for u in updates]
    read = [u._replace(basis=basis) for u, (_, basis) in zip(updates, bases, strict=True)]
    again = step(read, [[flat for _, flat in matrices] for matrices in pairs])
    for param, _, *moments in pairs:
        _write_back([param, *moments])
    if again is not None and _in_place([*bases, *(pair for matrices in pairs for pair in matrices)]):
        *lists, complements, _ = zip(*updates, strict=True)
        _prepared.keep("projected_adamw_", tuple(lists), complements, again)


def as_read(basis: torch.Tensor) -> torch.Tensor:
    """The basis itself if kernels can read it, else a copy."""
    return unit_inner(basis.float())


def _in_place(pairs: Pairs) -> bool:
    return all(read.data_ptr() == given.data_ptr() for given, read in pairs)


def _write_back(pairs: Pairs) -> None:
    for t, flat in pairs:
        if flat.data_ptr() != t.data_ptr():
            t.copy_(flat.view(t.shape))
    written(*(t for t, _ in pairs))


def done_again(entry: str, lists: tuple[Any, ...], complement: Any, changed: Iterable[int], *settings: float) -> bool:
    """Whether an earlier call had the same arguments, as the caller gave them: then it was done again.

    ``changed`` are the numbers of the lists that are written.
    """
    if not _prepared.any_kept() or not all(isinstance(members, (list, tuple)) for members in lists):
        return False
    flags = [complement] * len(lists[0]) if isinstance(complement, bool) else complement
    if not isinstance(flags, (list, tuple)) or not set(map(type, flags)) <= {bool}:
        return False
    if not _prepared.run(entry, lists, flags, *settings):
        return False
    for i in changed:
        written(*lists[i])
    return True
