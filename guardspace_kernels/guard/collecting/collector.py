"""The hooks of a collection: every guarded layer's input goes to the covariance of that input."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from guardspace_kernels.guard.exclusive import version_of
from guardspace_kernels.guard.files import StoredTensor
from guardspace_kernels.guard.layers import is_conv1d, is_sharded
from guardspace_kernels.guard.routing import Routing
from guardspace_kernels.guard.sampling import EQUAL, Marks, Sample, Sampler, kept, probed
from guardspace_kernels.guard.statistics import InputStatistics, distinct, on_cpu, packed
from guardspace_kernels.guard.tokens import Tokens, misfit
from guardspace_kernels.nn import CovarianceAccumulator


class CollectedInput:
    """One distinct layer input while it is being collected."""

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device, batch: int) -> None:
        self.layers: list[str] = []
        self.first_batch = batch
        self.accumulator = CovarianceAccumulator(features, dtype, device)
        self.sinks = torch.empty(0, features, dtype=dtype, device=device)
        self.new_sinks: list[torch.Tensor] = []
        self.sink_tokens = 0
        self.sample: Sample | None = None
        self.new_rows: list[Sample] = []
        self.held: CovarianceAccumulator | None = None
        self.tensor: weakref.ref[torch.Tensor] | None = None
        self.version = 0

    def hold(self, C: torch.Tensor | None = None, tokens: int = 0) -> None:
        """From now on the covariance of the prompts that can be held out is kept as well; of ``tokens`` it is C."""
        mine = self.accumulator.lower
        self.held = CovarianceAccumulator(len(mine), mine.dtype, mine.device)
        if C is not None:
            self.held.lower.copy_(C)
            self.held.tokens.fill_(tokens)

    def so_far(self) -> InputStatistics:
        """What was collected; triangles are made when they are written."""
        held = None if self.held is None else _triangle(self.held)
        held_tokens = 0 if self.held is None else int(self.held.tokens)
        sample = self.sample or Sample(torch.empty(0, dtype=torch.int64), self.sinks[:0])
        return InputStatistics(
            self.layers,
            _triangle(self.accumulator),
            int(self.accumulator.tokens),
            self.sinks,
            self.sink_tokens,
            False,
            Sample(sample.keys, sample.rows.cpu()),
            held,
            held_tokens,
        )

    def statistics(self) -> InputStatistics:
        """What was collected; frees the accumulators."""
        made = self.so_far()
        made.stored = made.triangle()
        if isinstance(made.held, StoredTensor):
            made.held = made.held.read()
        del self.accumulator, self.held
        return made

    def settle(self) -> None:
        """At the end of a batch: of the rows that joined those that stay are kept."""
        for new in self.new_rows:
            old = self.sample or Sample(new.keys[:0], new.rows[:0])
            keys, rows = torch.cat([old.keys, new.keys]), torch.cat([old.rows, new.rows])
            which = kept(keys)
            self.sample = Sample(keys[which], rows[which.to(rows.device)])
        self.new_rows = []

    def to(self, device: torch.device) -> None:
        self.accumulator.to(device)
        self.sinks = self.sinks.to(device)
        if self.held is not None:
            self.held.to(device)
        if self.sample is not None:
            self.sample.rows = self.sample.rows.to(device)

    def read(self, x: torch.Tensor) -> bool:
        """Whether x is the very tensor this input was last updated with."""
        return self.tensor is not None and self.tensor() is x and self.version == version_of(x)


def _triangle(accumulator: CovarianceAccumulator) -> StoredTensor:
    C = accumulator.lower
    return StoredTensor(C.dtype, (len(C) * (len(C) + 1) // 2,), lambda: on_cpu(packed(C)))


class EnoughError(Exception):
    """Raised in a hook: nothing more of this forward is wanted."""


class Collector:
    """The hooks of one collection: routes each layer's input to its accumulator, once per distinct tensor."""

    def __init__(
        self,
        guarded: Mapping[str, nn.Module],
        names: Iterable[str],
        dtype: torch.dtype,
        sink: bool,
        routing: Routing,
        stream: Mapping[str, str],
        probes: set[str] | None = None,
        weights: Sequence[float] = EQUAL,
    ) -> None:
        """Collects for ``names``, some of the guarded layers; ``probes`` are among those. ``stream``: which tokens of a
        batch a layer reads. ``weights`` by kind."""
        self.guarded = guarded
        self.layers = {name: guarded[name] for name in names}
        self.dtype = dtype
        self.sink = sink
        self.routing = routing
        self.stream = stream
        self.late: dict[str, str] = {}  # layers whose stream nobody knows, and that of the shape of their input
        self.sampler = Sampler(probed(list(guarded)) if probes is None else probes, weights)
        self.inputs: list[CollectedInput] = []
        self.input_of: dict[str, CollectedInput] = {}
        self.streams: Mapping[str, Tokens] = {}
        self.batch = 0
        self.called: list[str] = []
        self.waiting: set[str] = set()  # what a forward is run for; empty: let it end by itself

    @contextmanager
    def counting(self, streams: Mapping[str, Tokens], marks: Marks | None = None) -> Iterator[None]:
        """Within the context every forward of a layer counts; hooks go whatever happens.

        Without ``marks`` of the tokens no rows are kept, and no prompts to hold out.

        All guarded layers multiply real tokens only, whichever of them are collected, since the bits of a product
        depend on its number of rows; but those whose input is not (prompts, tokens, d), such as experts, and those of
        classes with a forward of their own.
        """
        self.streams, self.called, self.late = streams, [], {}
        padded = any(tokens.real is not None for tokens in streams.values())
        if marks is not None:
            self.sampler.begin(marks, streams, self.sink)
        handles = []
        for name, module in self.guarded.items():
            plain = type(module).forward is nn.Linear.forward or is_conv1d(module)
            cut = plain and padded
            # Before those of others as well: an adapter reads x, whatever a hook then makes of it for the base layer.
            handles.append(module.register_forward_pre_hook(self._hook(name, cut), prepend=True))
            if cut:
                # Before the hooks of others, which are used to the whole output.
                handles.append(module.register_forward_hook(self._whole, prepend=True))
        try:
            with self.routing.watching(streams):
                yield
        finally:
            self.streams = {}
            self.sampler.end()
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, cut: bool) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            self.routing.check_thread()
            if not args:
                raise TypeError(f"layer {name} is called with keywords alone; leave it out of target_modules")
            x = args[0]
            tokens = self.tokens_read(name, x)
            if name in self.layers:
                self.called.append(name)
                self.see(name, x, tokens)
                self.arrived(name)
            if not cut or tokens is None or tokens.real is None:
                return None
            return (tokens.rows(x), *args[1:])

        return hook

    def tokens_read(self, name: str, x: torch.Tensor) -> Tokens | None:
        """The tokens that x (rows, places, d) holds; None for what may be an expert's input, (n, d)."""
        if name in self.stream:
            tokens = self.streams[self.stream[name]]
            if tokens.fits(x):
                return tokens
        elif x.dim() == 2:
            return None
        else:
            fitting = [key for key, tokens in self.streams.items() if tokens.fits(x)]
            if len(fitting) == 1:
                self.late[name] = fitting[0]
                return self.streams[fitting[0]]
        raise ValueError(misfit(name, x, self.streams))

    def once(self, model: nn.Module) -> bool:
        """Whether the last forward called every layer once: one like it may end where the last of them is reached.

        Not with experts, which may be called more often, or not at all, for other prompts, nor where sharded modules
        run collectives that every process must reach.
        """
        experts = (*self.routing.containers, *self.routing.flat)
        routed = any(name.startswith(experts) for name in self.layers)
        return sorted(self.called) == sorted(self.layers) and not routed and not is_sharded(model)

    def _whole(self, module: nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor | None:
        """Padding gets the output of zeros: those that mix tokens otherwise than by attention set it to zero first."""
        for tokens in self.streams.values():
            x = tokens.source(args[0])
            if x is not None and tokens.real is not None:
                whole = result.new_zeros(tokens.mask.numel(), result.shape[-1])
                if isinstance(module.bias, torch.Tensor) and not module.bias.is_meta:
                    whole += module.bias
                whole.index_copy_(0, tokens.real.to(result.device), result)
                return whole.reshape(*x.shape[:-1], -1)
        return None

    def arrived(self, name: str) -> None:
        """Ends the forward if it was the last thing to wait for."""
        if name in self.waiting:
            self.waiting.remove(name)
            if not self.waiting:
                raise EnoughError

    def see(self, name: str, x: torch.Tensor, tokens: Tokens | None) -> None:
        mine = self.input_of.get(name)
        if mine is None:
            # A layer first reached in a later batch does not join an input that has seen earlier ones.
            mine = next((i for i in self.inputs if i.first_batch == self.batch and i.read(x)), None)
            fresh = mine is None
            if mine is None:
                mine = self.begin(x)
                self.inputs.append(mine)
            mine.layers.append(name)
            self.input_of[name] = mine
            probe = name in self.sampler.probes and mine.held is None
            if probe:
                mine.hold()
            if fresh:
                self.update(name, mine, x, tokens)
            elif probe:
                self.hold(mine, x, tokens)
        elif mine.layers[0] == name:
            self.update(name, mine, x, tokens)
        elif not mine.read(x):
            raise RuntimeError(
                f"layer {name} read the same tensor as {mine.layers[0]} in the first batch but another one now; "
                "collect the two in separate calls (target_modules=...)"
            )

    def begin(self, x: torch.Tensor) -> CollectedInput:
        return CollectedInput(x.shape[-1], self.dtype, x.device, self.batch)

    def update(self, name: str, mine: CollectedInput, x: torch.Tensor, tokens: Tokens | None) -> None:
        mine.tensor, mine.version = weakref.ref(x), version_of(x)
        mine.to(x.device)
        prompts = next(iter(self.streams.values()))
        if self.sampler.parts and tokens is not prompts:
            raise ValueError(
                f"layer {name} reads other tokens than the prompts', or rows of some, as an expert does, and of which "
                "kinds they are is not known: leave it out of target_modules, or leave kind_weights out"
            )
        if tokens is not None:
            rows, counted, first = tokens.rows(x), None, tokens.starts.to(x.device)
            if self.sink:
                counted = tokens.later.to(x.device)
            new = self.sampler.new
            if len(new) and tokens is prompts:
                mine.new_rows.append(Sample(self.sampler.new_keys, rows.index_select(0, new.to(x.device))))
            self.hold(mine, x, tokens)
        else:
            real, is_first = self.routing.tokens(name, x)
            rows, counted, first = x, real & ~is_first if self.sink else real, is_first.nonzero().flatten()
        if self.sink:
            mine.new_sinks.append(rows.index_select(0, first).to(self.dtype))
        if not self.sampler.parts:
            mine.accumulator.update(rows, counted)
        for part, weight in self.sampler.parts:
            mine.accumulator.update(rows, part.to(x.device), weight)

    def hold(self, mine: CollectedInput, x: torch.Tensor, tokens: Tokens | None) -> None:
        """Counts prompts that can be held out, where the input keeps them."""
        held = None if tokens is None else self.sampler.held.get(id(tokens))
        if tokens is not None and mine.held is not None and held is not None:
            rows = tokens.rows(x).index_select(0, held.to(x.device))
            if not self.sampler.parts:
                mine.held.update(rows)
            for part, weight in self.sampler.parts:
                mine.held.update(rows, part[held].to(x.device), weight)

    def end_batch(self) -> None:
        """Looks for non-finite values, one device synchronisation for all layers, and keeps distinct sinks."""
        self.batch += 1
        if not self.inputs:
            return
        diagonals = torch.stack([i.accumulator.lower.diagonal().sum().cpu() for i in self.inputs])
        sinks = torch.stack([sum((s.square().sum().cpu() for s in i.new_sinks), torch.zeros(())) for i in self.inputs])
        for mine, finite in zip(self.inputs, torch.isfinite(diagonals) & torch.isfinite(sinks), strict=True):
            if not finite:
                raise ValueError(
                    f"batch {self.batch - 1}: the input of layer {mine.layers[0]} holds non-finite values (or "
                    f"overflows {self.dtype}); the statistics would be worthless. Check the model's dtype and the "
                    "prompts"
                )
            for rows in mine.new_sinks:
                mine.sinks = distinct(rows, mine.sinks)
                mine.sink_tokens += rows.shape[0]
            mine.new_sinks = []
            mine.settle()
