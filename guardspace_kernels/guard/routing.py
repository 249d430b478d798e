"""Routed experts: which tokens the rows are that a router hands to an expert, and experts that got none."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from guardspace_kernels.guard.tokens import Tokens, misfit

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Call:
    """A module that is being called with x; of each row of x, once they are known, whether it is a real token and
    whether that is the first of its prompt."""

    name: str
    x: torch.Tensor
    real: torch.Tensor | None = None
    first: torch.Tensor | None = None

    @cached_property
    def rows(self) -> torch.Tensor:
        return _bits(self.x.reshape(-1, self.x.shape[-1]))

    @cached_property
    def table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the distinct rows: (hashes, ascending; a place of each; how many of its places are real; and first)."""
        assert self.real is not None and self.first is not None
        hashes, which = torch.unique(_hashes(self.rows), return_inverse=True)
        place = torch.empty_like(hashes).scatter_(0, which, torch.arange(len(which), device=which.device))
        real, first = (torch.zeros_like(hashes).index_add(0, which, of.long()) for of in (self.real, self.first))
        return hashes, place, real, first

    def find(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(real, first) of rows that are all among this call's, else None."""
        if not (_comparable(rows, self.rows) and len(self.rows)):
            return None
        hashes, place, real, first = self.table
        at = torch.searchsorted(hashes, _hashes(rows)).clamp_max(len(hashes) - 1)
        if not torch.equal(self.rows[place[at]], rows):
            return None
        times = _times_before(at)
        return times < real[at], times < first[at]


def _bits(rows: torch.Tensor) -> torch.Tensor:
    """As integers: a copy of NaN is equal to it, and −0 is not 0."""
    return rows.detach().contiguous().view(_BITS[rows.element_size()])


def _comparable(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.device, a.dtype, a.shape[1:]) == (b.device, b.dtype, b.shape[1:])


def _hashes(rows: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**63), 2**63 - 1, rows.shape[1:], generator=generator)
    return (rows.long() * weights.to(rows.device)).sum(dim=1)


def _times_before(values: torch.Tensor) -> torch.Tensor:
    """How often each value stands before its place."""
    order = values.argsort(stable=True)
    ascending = values[order]
    places = torch.arange(len(values), device=values.device)
    return torch.empty_like(places).scatter_(0, order, places - torch.searchsorted(ascending, ascending))


class Routing:
    """Tells which tokens a layer reads, within :meth:`watching`.

    An input whose leading dimensions are those of a mask holds its tokens in its order. An expert is called with some
    rows (n, d) of what the module around it was called with: they are found there bit by bit. Equal rows
    are interchangeable: a router sends them to the same experts, where as many count as real, or first, as there are
    real, or first, ones (padding may equal the last token of its prompt). What is read further inside and is no copy,
    such as the input of an expert's down projection, has the rows of the expert, in their order.

    Attributes:
        containers: prefixes of the names of layers in what were found to be lists of experts.
        flat: of lists that may be some: a module in one was called with every token, in order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = {name: module for name, module in model.named_modules() if any(True for _ in module.children())}
        self.containers: set[str] = set()
        self.flat: set[str] = set()
        self.streams: Mapping[str, Tokens] = {}
        self.calls: list[_Call] = []
        self.thread = 0

    @contextmanager
    def watching(self, streams: Mapping[str, Tokens]) -> Iterator[None]:
        """Of a forward that reads these tokens; hooks go whatever happens."""
        self.streams, self.calls, self.thread = streams, [], threading.get_ident()
        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(self._begin(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._end))
        try:
            yield
        finally:
            self.streams, self.calls = {}, []
            for handle in handles:
                handle.remove()

    def check_thread(self) -> None:
        """RuntimeError in a forward of any thread but the one that watches."""
        if threading.get_ident() != self.thread:
            raise RuntimeError(
                "this model is running under collect_statistics or certify in another thread, whose hooks would count "
                "this forward as well; wait until that has ended, or run a copy of the model"
            )

    def _begin(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.check_thread()
            given = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point())
            self.calls.append(_Call(name, next(given, torch.empty(0))))

        return hook

    def _end(self, *_: Any) -> None:
        self.calls.pop()

    def tokens(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of the real and of the first tokens of x (..., d), the input of layer ``name``: both x.shape[:-1].

        ValueError that names the layer where they are not known.
        """
        fitting = [tokens for tokens in self.streams.values() if tokens.fits(x)]
        if len(fitting) == 1:
            shape = x.shape[:-1]
            return fitting[0].mask.to(x.device).reshape(shape), fitting[0].apart.to(x.device).reshape(shape)
        found = self.look(name, x)
        if found is None:
            raise ValueError(misfit(name, x, self.streams))
        return found

    def look(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As :meth:`tokens`, for x (n, d); None where they are not known."""
        around: _Call | None = None
        for call in [*self.calls, _Call(name, x)]:
            if call.real is None:
                self._place(call, around)
            if call.real is not None:
                around = call
        return None if call.real is None or call.first is None else (call.real, call.first)

    def _place(self, call: _Call, around: _Call | None) -> None:
        x = call.x
        alone = x.dim() == 2 and around is None
        fitting = [t for t in self.streams.values() if t.fits(x) or (alone and len(x) == t.mask.numel())]
        if fitting:
            if len(fitting) == 1:  # else it may be the encoder's or the decoder's
                call.real, call.first = (of.flatten().to(x.device) for of in (fitting[0].mask, fitting[0].apart))
        elif x.dim() == 2 and around is not None and around.real is not None and around.first is not None:
            same = _comparable(around.rows, call.rows) and torch.equal(around.rows, call.rows)
            found = None if same else around.find(call.rows)
            container = call.name[: call.name.rfind(".") + 1]
            if found is not None:
                if container:  # not the whole model, for a layer that reads the last token, say
                    self.containers.add(container)
                call.real, call.first = found
            elif len(x) == len(around.real):
                # Prompts flattened to rows keep their order; (tokens, prompts, d), for instance, would not.
                call.real, call.first = around.real.to(x.device), around.first.to(x.device)
                if isinstance(self.modules.get(container[:-1]), (nn.ModuleList, nn.ModuleDict)):
                    self.flat.add(container)

    def lost(self, unreached: Sequence[str]) -> list[str]:
        """Those of the layers that no token reached that are not of experts. A list of which some modules got every
        token and others none is one of experts."""
        self.containers |= {c for c in self.flat if any(name.startswith(c) for name in unreached)}
        return [name for name in unreached if not self.routed(name)]

    def routed(self, name: str) -> bool:
        """Whether the layer belongs to an expert."""
        return any(name.startswith(container) for container in self.containers)


def grouped_as_siblings(
    names: Sequence[str], groups: Iterable[Sequence[str]], containers: Iterable[str]
) -> list[list[str]]:
    """Groups of layers that no token reached: those of an expert as its siblings' in ``groups``, which read one tensor,
    the others each on its own."""

    def split(name: str) -> tuple[str, str, str]:
        """(container, expert, the rest)."""
        container = max((c for c in containers if name.startswith(c)), key=len, default=name)
        expert, _, rest = name[len(container) :].partition(".")
        return container, expert, rest

    places: dict[tuple[str, str], tuple[str, int]] = {}
    for group in groups:
        for i, name in enumerate(group):
            container, _, rest = split(name)
            places.setdefault((container, rest), (split(group[0])[2], i))
    made: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    for name in names:
        container, expert, rest = split(name)
        leader, i = places.get((container, rest), (rest, 0))
        made.setdefault((container, expert, leader), []).append((i, name))
    return [[name for _, name in sorted(group)] for group in made.values()]
