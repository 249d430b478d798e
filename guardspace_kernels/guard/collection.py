"""Collection: one pass of a model over prompts, with hooks that accumulate covariances, and its checkpoint."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm.auto import tqdm

from guardspace_kernels.guard.batches import (
    Batch,
    check_answerable,
    check_ids,
    checked_mask,
    evaluating,
    first_tokens,
    forward_batch,
    to_device,
    with_answers,
)
from guardspace_kernels.guard.files import StoredTensor, open_tensors, save_tensors
from guardspace_kernels.guard.fingerprint import ModelFingerprint, tensor_fingerprint
from guardspace_kernels.guard.layers import (
    find_layers,
    is_conv1d,
    is_sharded,
    linear_weight,
    unwrapped,
)
from guardspace_kernels.guard.lockstep import Lockstep
from guardspace_kernels.guard.passes import (
    CollectionPlan,
    LayerInput,
    Replay,
    blocks_of,
    output_of,
    parse_bytes,
    plan_passes,
    release_memory,
)
from guardspace_kernels.guard.routing import Routing, grouped_as_siblings
from guardspace_kernels.guard.statistics import CalibrationStatistics, InputStatistics, distinct, packed, unpacked
from guardspace_kernels.nn import CovarianceAccumulator

_NO_PROMPT = "batches is empty: at least one prompt is needed"
_OUTPUT = "the output for the next pass"  # among names of layers, which have no spaces


class _Input:
    """One distinct layer input while it is being collected."""

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device, batch: int) -> None:
        self.layers: list[str] = []
        self.first_batch = batch
        self.accumulator = CovarianceAccumulator(features, dtype, device)
        self.sinks = torch.empty(0, features, dtype=dtype, device=device)
        self.new_sinks: list[torch.Tensor] = []
        self.sink_tokens = 0
        self.tensor: weakref.ref[torch.Tensor] | None = None
        self.version = 0

    def triangle(self) -> StoredTensor:
        """Of the covariance, made when it is written."""
        C = self.accumulator.lower
        return StoredTensor(C.dtype, (len(C) * (len(C) + 1) // 2,), lambda: packed(C).cpu())

    def statistics(self) -> InputStatistics:
        """What was collected; frees the accumulator."""
        triangle, tokens = self.triangle().read(), int(self.accumulator.tokens)
        del self.accumulator
        return InputStatistics(self.layers, triangle, tokens, self.sinks, self.sink_tokens)

    def to(self, device: torch.device) -> None:
        self.accumulator.to(device)
        self.sinks = self.sinks.to(device)

    def read(self, x: torch.Tensor) -> bool:
        """Whether x is the very tensor this input was last updated with."""
        return self.tensor is not None and self.tensor() is x and self.version == _version(x)


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


class _EnoughError(Exception):
    """Raised in a hook: nothing more of this forward is wanted."""


class _Collector:
    """The hooks of one collection: routes each layer's input to its accumulator, once per distinct tensor."""

    def __init__(
        self, guarded: Mapping[str, nn.Module], names: Iterable[str], dtype: torch.dtype, sink: bool, routing: Routing
    ) -> None:
        """Collects for ``names``, some of the guarded layers."""
        self.guarded = guarded
        self.layers = {name: guarded[name] for name in names}
        self.dtype = dtype
        self.sink = sink
        self.routing = routing
        self.inputs: list[_Input] = []
        self.input_of: dict[str, _Input] = {}
        self.mask = self.counted = self.first = torch.empty(0)
        self.real: torch.Tensor | None = None  # indices of the real tokens, where there are others
        self.latest: tuple[torch.Tensor, int, torch.Tensor] | None = None  # an input, its version, its real rows
        self.batch = 0
        self.called: list[str] = []
        self.waiting: set[str] = set()  # what a forward is run for; empty: let it end by itself

    @contextmanager
    def counting(self, mask: torch.Tensor) -> Iterator[None]:
        """Within the context every forward of a layer counts; hooks go whatever happens.

        All guarded layers multiply real tokens only, whichever of them are collected, since the bits of a product
        depend on its number of rows; but those whose input is not (prompts, tokens, d), such as experts, and those of
        classes with a forward of their own.
        """
        self.mask, self.real, self.called = mask, None, []
        first, flat = first_tokens(mask)[mask], mask.flatten()
        self.first, self.counted = first.nonzero().flatten(), ~first
        if not flat.all():
            self.real = flat.nonzero().flatten()
        handles = []
        for name, module in self.guarded.items():
            plain = type(module).forward is nn.Linear.forward or is_conv1d(module)
            cut = plain and self.real is not None
            handles.append(module.register_forward_pre_hook(self._hook(name, cut)))
            if cut:
                # Before the hooks of others, which are used to the whole output.
                handles.append(module.register_forward_hook(self._whole, prepend=True))
        try:
            with self.routing.watching(mask):
                yield
        finally:
            self.latest = None
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, cut: bool) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args:
                raise TypeError(f"layer {name} is called with keywords alone; leave it out of target_modules")
            if name in self.layers:
                self.called.append(name)
                self.see(name, args[0])
                self.arrived(name)
            if not cut or args[0].shape[:-1] != self.mask.shape:
                return None
            return (self.rows_of(args[0]), *args[1:])

        return hook

    def rows_of(self, x: torch.Tensor) -> torch.Tensor:
        """The real tokens (T, d) of an input in the mask's order, (prompts, tokens, d)."""
        flat = x.reshape(-1, x.shape[-1])
        if self.real is None:
            return flat
        if self.latest is None or self.latest[0] is not x or self.latest[1] != _version(x):
            self.latest = x, _version(x), flat.index_select(0, self.real.to(x.device))
        return self.latest[2]

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
        if self.latest is None or args[0] is not self.latest[2]:
            return None
        assert self.real is not None
        whole = result.new_zeros(self.mask.numel(), result.shape[-1])
        if isinstance(module.bias, torch.Tensor) and not module.bias.is_meta:
            whole += module.bias
        return whole.index_copy_(0, self.real.to(result.device), result).reshape(*self.mask.shape, -1)

    def arrived(self, name: str) -> None:
        """Ends the forward if it was the last thing to wait for."""
        if name in self.waiting:
            self.waiting.remove(name)
            if not self.waiting:
                raise _EnoughError

    def see(self, name: str, x: torch.Tensor) -> None:
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
            if fresh:
                self.update(name, mine, x)
        elif mine.layers[0] == name:
            self.update(name, mine, x)
        elif not mine.read(x):
            raise RuntimeError(
                f"layer {name} read the same tensor as {mine.layers[0]} in the first batch but another one now; "
                "collect the two in separate calls (target_modules=...)"
            )

    def begin(self, x: torch.Tensor) -> _Input:
        return _Input(x.shape[-1], self.dtype, x.device, self.batch)

    def update(self, name: str, mine: _Input, x: torch.Tensor) -> None:
        mine.tensor, mine.version = weakref.ref(x), _version(x)
        mine.to(x.device)
        if x.shape[:-1] == self.mask.shape:
            rows, counted, first = self.rows_of(x), None, self.first.to(x.device)
            if self.sink:
                counted = self.counted.to(x.device)
        else:
            real, is_first = self.routing.tokens(name, x)
            rows, counted, first = x, real & ~is_first if self.sink else real, is_first.nonzero().flatten()
        if self.sink:
            mine.new_sinks.append(rows.index_select(0, first).to(self.dtype))
        mine.accumulator.update(rows, counted)

    def end_batch(self) -> None:
        """Looks for non-finite values, one device synchronisation for all layers, and keeps distinct sinks."""
        self.batch += 1
        if not self.inputs:
            return
        diagonals = torch.stack([i.accumulator.lower.diagonal().sum().cpu() for i in self.inputs])
        sinks = torch.stack([sum((s.sum().cpu() for s in i.new_sinks), torch.zeros(())) for i in self.inputs])
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


class _Checkpoint:
    """A file with the state of a collection after some batches; does nothing without a path."""

    KIND = "statistics checkpoint"

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        collector: _Collector,
        fingerprint: ModelFingerprint,
        options: dict[str, Any],
    ) -> None:
        self.path, self.collector, self.fingerprint, self.options = path, collector, fingerprint, options
        self.prompts = 0
        self.batches: list[str] = []  # a hash of each that is in the state
        self.resumed = 0
        self.saved = True
        if path is not None and os.path.exists(path):
            self._load(path)

    def has(self, index: int, batch: Batch) -> bool:
        """Whether the file has this batch; ValueError if it has another one in its place."""
        if index >= self.resumed:
            return False
        if _batch_hash(batch) != self.batches[index]:
            raise ValueError(f"batch {index} is not the one that {self._name()} was made from; {self._advice()}")
        return True

    def add(self, batch: Batch, prompts: int, save: bool) -> None:
        self.prompts += prompts
        if self.path is None:
            return
        self.batches.append(_batch_hash(batch))
        self.saved = save
        if save:
            self._save(self.path)

    def end(self, seen: int) -> None:
        """After the last of ``seen`` batches."""
        if seen < self.resumed:
            raise ValueError(
                f"there are {seen} batches, but {self._name()} was made from {self.resumed}; {self._advice()}"
            )
        if self.path is not None and not self.saved:
            self._save(self.path)

    def statistics(self) -> list[InputStatistics]:
        """What is in the file, left there."""
        assert self.path is not None
        tensors, header = open_tensors(self.path, self.KIND)
        if header["batches"] != self.batches:
            raise ValueError(f"another process wrote {self._name()}; give each process a file of its own")
        return [
            InputStatistics(names, tensors[f"{i}.covariance"], tokens, tensors[f"{i}.sinks"].read(), sink_tokens)
            for i, (names, tokens, sink_tokens, _) in enumerate(header["inputs"])
        ]

    def _name(self) -> str:
        assert self.path is not None
        return f"the checkpoint {os.fspath(self.path)}"

    def _advice(self) -> str:
        return "give the arguments of the first call, or another checkpoint file"

    def _save(self, path: str | os.PathLike[str]) -> None:
        tensors: dict[str, torch.Tensor | StoredTensor] = {}
        inputs = []
        for i, one in enumerate(self.collector.inputs):
            tensors[f"{i}.covariance"], tensors[f"{i}.sinks"] = one.triangle(), one.sinks
            tokens = int(one.accumulator.tokens)
            inputs.append([one.layers, tokens, one.sink_tokens, one.first_batch])
        header = {
            "inputs": inputs,
            "routed": [sorted(self.collector.routing.containers), sorted(self.collector.routing.flat)],
            "batches": self.batches,
            "prompts": self.prompts,
            "options": self.options,
            "fingerprint": {"model": self.fingerprint.model, "layers": self.fingerprint.layers},
        }
        save_tensors(path, self.KIND, tensors, header)

    def _load(self, path: str | os.PathLike[str]) -> None:
        tensors, header = open_tensors(path, self.KIND)
        if header["options"] != self.options:
            raise ValueError(
                f"{self._name()} was made with {header['options']}, this call has {self.options}; {self._advice()}"
            )
        self.fingerprint.check(ModelFingerprint(**header["fingerprint"]), f"the statistics in {self._name()}")
        for i, (names, tokens, sink_tokens, first_batch) in enumerate(header["inputs"]):
            sinks = tensors[f"{i}.sinks"].read()
            one = _Input(sinks.shape[1], sinks.dtype, sinks.device, first_batch)  # it follows its first tensor
            one.layers, one.sinks, one.sink_tokens = names, sinks, sink_tokens
            one.accumulator.lower.copy_(unpacked(tensors[f"{i}.covariance"].read()))
            one.accumulator.tokens.fill_(tokens)
            self.collector.inputs.append(one)
            self.collector.input_of.update(dict.fromkeys(names, one))
        containers, flat = header.get("routed", [[], []])
        self.collector.routing.containers.update(containers)
        self.collector.routing.flat.update(flat)
        self.batches, self.prompts = header["batches"], header["prompts"]
        self.resumed = self.collector.batch = len(self.batches)


def _batch_hash(batch: Batch) -> str:
    digest = hashlib.sha256()
    for key in sorted(batch):
        value = batch[key]
        digest.update(f"{key} {tensor_fingerprint(value) if isinstance(value, torch.Tensor) else value!r}".encode())
    return digest.hexdigest()[:32]


class _Scout(_Collector):
    """Sees in one forward which layers read which tensor, and between which blocks; accumulates nothing."""

    def __init__(self, layers: Mapping[str, nn.Module], blocks: Sequence[nn.Module], routing: Routing) -> None:
        super().__init__(layers, layers, torch.float32, False, routing)
        self.blocks = blocks
        self.begun: list[int] = []
        self.results: list[torch.Tensor | None] = []
        self.after: dict[str, int] = {}
        self.read: dict[str, str] = {}  # fingerprints, by the layers of the second half of the blocks

    @contextmanager
    def counting(self, mask: torch.Tensor) -> Iterator[None]:
        handles = []
        for i, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(lambda _module, _args, i=i: self.begun.append(i)))
            handles.append(
                block.register_forward_hook(lambda _module, _args, result: self.results.append(output_of(result)))
            )
        try:
            with super().counting(mask):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def see(self, name: str, x: torch.Tensor) -> None:
        self.after.setdefault(name, len(self.results))
        if not x.is_meta and self.blocks and len(self.results) >= len(self.blocks) // 2:
            self.read[name] = tensor_fingerprint(x)
        super().see(name, x)

    def begin(self, x: torch.Tensor) -> _Input:
        return _Input(0, self.dtype, x.device, self.batch)

    def update(self, name: str, mine: _Input, x: torch.Tensor) -> None:
        mine.tensor, mine.version = weakref.ref(x), _version(x)
        if x.shape[:-1] != self.mask.shape and not x.is_meta:
            self.routing.look(name, x)

    def layer_inputs(self) -> list[LayerInput]:
        """In the order of the model; layers that were not reached are at the end."""
        groups = [one.layers for one in self.inputs]
        lists = self.routing.containers | self.routing.flat
        groups += grouped_as_siblings([name for name in self.layers if name not in self.after], groups, lists)
        return [
            LayerInput(tuple(g), linear_weight(self.layers[g[0]]).shape[1], self.after.get(g[0], 0)) for g in groups
        ]


def distinct_inputs(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[LayerInput]:
    """Which of the layers read the same tensor, from a forward of a few tokens; of a model on the meta device too.

    TypeError if that one's forward does not run there, as where a router's choice of experts needs values.
    """
    scout = _Scout(layers, blocks_of(model, list(layers)), Routing(model))
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate loads as the forward goes
    device = torch.device("cpu") if offloaded else next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(scout.counting(torch.ones(1, 4, dtype=torch.bool)))
        if device.type == "meta":  # a forward may look at values, of masks for instance, that only fake tensors have
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # Other tokens than the first, for other experts.
        try:
            forward_batch(model, {"input_ids": torch.arange(4, device=device)[None]})
        except RuntimeError as error:
            if device.type != "meta":
                raise
            raise TypeError(
                f"this model's forward does not run on the meta device, without values ({error}): routed experts need "
                "them; load the model's weights for an estimate"
            ) from error
    return scout.layer_inputs()


def _scouted(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch, routing: Routing
) -> tuple[list[LayerInput], Replay | None, int, bool]:
    """(distinct inputs, replay, bytes of a block's output per token, whether a forward may be left early)."""
    blocks = blocks_of(model, list(layers))
    mask = checked_mask(batch, 0)
    scout = _Scout(layers, blocks, routing)
    replay = Replay(blocks)
    replay.begin(0, len(blocks) // 2)
    with replay.run(0), scout.counting(mask):
        forward_batch(model, batch)
    once = scout.once(model)
    in_order = len(blocks) > 1 and scout.begun == list(range(len(blocks)))
    results = [result for result in scout.results if result is not None]
    if not (once and in_order and len(results) == len(blocks)):
        return scout.layer_inputs(), None, 0, once
    # What the second half of the blocks reads may depend on the first half through its output only. In between the
    # model sees the prompts reversed, so that whatever else the first half leaves behind is wrong.
    if "input_ids" in batch:
        forward_batch(model, {**batch, "input_ids": batch["input_ids"].flip(1)})
    replay.begin(len(blocks) // 2, len(blocks) // 2)
    again = _Scout(layers, blocks, routing)
    with replay.run(0), again.counting(mask):
        forward_batch(model, batch)
    per_token = results[0].nbytes // mask.numel()
    return scout.layer_inputs(), Replay(blocks) if again.read == scout.read else None, per_token, once


def plan_collection(
    model: nn.Module,
    batches: Sequence[Batch],
    target_modules: str | Sequence[str] = "all-linear",
    *,
    answer_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    max_memory: int | str | None = None,
) -> CollectionPlan:
    """What :func:`collect_statistics` would do with these arguments, from a forward of the first batch."""
    model, lockstep = unwrapped(model), Lockstep(unwrapped(model))
    with evaluating(model):
        layers, routing = find_layers(model, target_modules), Routing(model)
        batches = _check_all(model, batches, answer_tokens, lockstep)
        return _planned(model, layers, batches, answer_tokens, dtype, max_memory, routing)[0]


def _check(model: nn.Module, batch: Batch, index: int, answer_tokens: int) -> None:
    checked_mask(batch, index)
    check_ids(model, batch, index)
    if answer_tokens:
        check_answerable(model, batch)


def _check_all(model: nn.Module, batches: Iterable[Batch], answer_tokens: int, lockstep: Lockstep) -> list[Batch]:
    """The batches as a list, looked at before the first forward."""
    with lockstep.step():
        batches = list(batches)
        for index, batch in enumerate(batches):
            _check(model, batch, index, answer_tokens)
        if not batches:
            raise ValueError(_NO_PROMPT)
    advice = "divide the prompts among as many batches on every rank; their sizes may differ"
    lockstep.agree("batches", len(batches), advice)
    return batches


def _planned(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    answer_tokens: int,
    dtype: torch.dtype,
    max_memory: int | str | None,
    routing: Routing,
) -> tuple[CollectionPlan, Replay | None, bool]:
    budget = parse_bytes("max_memory", max_memory)
    tokens = sum(mask.shape[0] * (mask.shape[1] + answer_tokens) for mask in map(checked_mask, batches, count()))
    inputs, replay, per_token, once = _scouted(model, layers, to_device(model, batches[0]), routing)
    plan = plan_passes(inputs, dtype, budget, per_token * tokens if replay else None)
    return plan, replay if plan.replay else None, once


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    target_modules: str | Sequence[str] = "all-linear",
    *,
    answer_tokens: int = 0,
    separate_sink: bool = True,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    max_memory: int | str | None = None,
) -> CalibrationStatistics:
    """One pass over safety-triggering prompts: ``C = Xᵀ X`` of the input of every guarded layer.

    Padding never counts, on either side, and guarded layers do not compute it: at padding their output is that of
    zeros. A forward ends where the last layer is reached if the first forward called each of them once. Layers
    that read the same tensor (q/k/v, gate/up) share one covariance. The first real token of each prompt, the attention
    sink, whose input can dwarf all others and is the same in every prompt, is kept out of C; its distinct inputs are
    kept apart and will be protected as directions of their own.

    Of a layer in a routed expert, a module called with rows (n, d) of what the module around it reads, C holds the
    tokens that were routed to it. An expert that none reached has statistics of no token.

    Args:
        model: the aligned base model, without adapters. It is run in eval mode and left in the mode it was in.
            DistributedDataParallel is unwrapped. With a model sharded by ``fully_shard`` every process makes this call,
            each with prompts of its own in as many batches; parameters are gathered one by one for the fingerprint.
            Layers that accelerate offloaded, to memory or disk, are loaded by its hooks.
        batches: mappings passed as ``model(**batch)``: ``input_ids`` and, where there is padding,
            ``attention_mask`` (prompts, tokens); any batch sizes. Use harmful requests that the model refuses,
            through its chat template.
        target_modules: "all-linear" (every Linear and Conv1D but the output embedding), a regular expression, or a
            list of name endings.
        answer_tokens: generate this many tokens of the model's own greedy answer and include them: refusing is
            decided there.
        separate_sink: False counts the first token as any other.
        dtype: of C: float32 or float64 (for ``rule="paper"``, whose threshold float32 hardly resolves).
        progress: show a progress bar.
        checkpoint: a file that holds the state after every ``checkpoint_every`` batches (the size of the statistics
            themselves, so choose a larger number for a large model); each process needs its own. If it exists, those
            batches are not run again: the same call with the same batches goes on, and ends with the same bits as an
            uninterrupted one.
        max_memory: bytes, or a text such as "4GB", that the covariances may take while they are accumulated. What does
            not fit waits for further passes, which start from the outputs of the block where the last one ended if the
            model is a plain chain of blocks, else from the beginning; all batches are then held in memory. Finished
            triangles go into files: beside the checkpoint, as ``checkpoint.0``, ``.1``..., or deleted ones in the
            folder for temporary files (``TMPDIR``). The plan is shown before; the bits are those of a single pass.

    Returns:
        :class:`CalibrationStatistics`.

    Raises:
        TypeError, ValueError: an unusable model, dtype or batch (empty, all padding, shapes that differ), or a
            non-finite activation; the message names batch and layer. Hooks are removed whatever happens.
        RuntimeError: another process of a sharded model raised one of these. Only an error within a forward, such as a
            lack of memory, leaves the others waiting there; ``torchrun`` ends them.

    Source: GuardSpace (arXiv 2510.14301), the covariances of its sections on both subspaces.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    if answer_tokens < 0:
        raise ValueError(f"answer_tokens must be 0 or more, got {answer_tokens}")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be 1 or more, got {checkpoint_every}")
    model = unwrapped(model)
    lockstep = Lockstep(model)
    layers = find_layers(model, target_modules)
    if max_memory is not None or lockstep.sharded:
        batches = _check_all(model, batches, answer_tokens, lockstep)
    fingerprint = ModelFingerprint.of(model, list(layers))
    options = {"answer_tokens": answer_tokens, "separate_sink": separate_sink, "dtype": str(dtype)}
    routing = Routing(model)
    passes, replay, once = [list(layers)], None, False
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if max_memory is not None:
            assert isinstance(batches, list)
            plan, replay, once = _planned(model, layers, batches, answer_tokens, dtype, max_memory, routing)
            passes = [[name for one in part for name in one.layers] for part in plan.passes]
            starts = [min(one.after for one in part) for part in plan.passes]
            if progress:
                tqdm.write(f"statistics: {plan}", file=sys.stderr)
        several = len(passes) > 1
        if several and checkpoint is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="guardspace-"))
        inputs: list[InputStatistics] = []
        unseen: list[str] = []
        answered: dict[int, Batch] = {}
        prompts = 0
        for number, names in enumerate(passes):
            collector = _Collector(layers, names, dtype, separate_sink, routing)
            path, every = checkpoint, checkpoint_every
            if several and checkpoint is None:
                path, every = os.path.join(folder, str(number)), sys.maxsize
            elif several and checkpoint is not None:
                path = f"{os.fspath(checkpoint)}.{number}"
            about = {**options, "layers": f"{len(names)} from {names[0]} to {names[-1]}"}
            with lockstep.step():
                state = _Checkpoint(path, collector, fingerprint, about)
            lockstep.agree("batches in their checkpoints", state.resumed, "delete the checkpoints and begin again")
            if replay:
                replay.begin(starts[number], starts[min(number + 1, len(passes) - 1)])
            index = -1
            label = f"statistics {number + 1}/{len(passes)}" if several else "statistics"
            for index, raw in enumerate(tqdm(batches, desc=label, unit="batch", disable=not progress)):
                with lockstep.step():
                    _check(model, raw, index, answer_tokens)
                    if state.has(index, raw):
                        continue
                batch = answered.get(index) or to_device(model, raw)
                if answer_tokens and index not in answered:
                    batch = with_answers(model, batch, answer_tokens)
                    if several:
                        answered[index] = batch
                with ExitStack() as running:
                    running.enter_context(collector.counting(checked_mask(batch, index)))
                    if replay:
                        running.enter_context(replay.run(index, partial(collector.arrived, _OUTPUT)))
                    if once:
                        collector.waiting = {*names, _OUTPUT} if replay and replay.keeps else set(names)
                        running.enter_context(suppress(_EnoughError))
                    forward_batch(model, batch)
                once = once or (not several and collector.once(model))
                with lockstep.step():
                    collector.end_batch()
                    state.add(raw, collector.mask.shape[0], save=(index + 1) % every == 0)
            with lockstep.step():
                state.end(index + 1)
                prompts = state.prompts
                if prompts == 0:
                    raise ValueError(_NO_PROMPT)
                idle = [name for name in names if name not in collector.input_of]
                lost = routing.lost(idle)
                if lost:
                    raise ValueError(
                        f"layer {lost[0]} was never reached by the forward pass; leave it out of target_modules"
                    )
                unseen += idle
                inputs += state.statistics() if several else [one.statistics() for one in collector.inputs]
            del collector, state
            if max_memory is not None:
                release_memory()
    for group in grouped_as_siblings(unseen, [one.layers for one in inputs], routing.containers):
        inputs.append(_of_no_token(group, linear_weight(layers[group[0]]).shape[1], dtype))
    # Which expert is reached first depends on the prompts: statistics of others must have the same order to be merged.
    order = {name: i for i, name in enumerate(layers)}
    for one in inputs:
        one.routed = routing.routed(one.layers[0])
    inputs.sort(key=lambda one: order[one.layers[0]] if one.routed else -1)
    return CalibrationStatistics(inputs, fingerprint, prompts)


def _of_no_token(layers: list[str], features: int, dtype: torch.dtype) -> InputStatistics:
    shape = (features * (features + 1) // 2,)
    zeros = StoredTensor(dtype, shape, lambda: torch.zeros(shape, dtype=dtype))
    return InputStatistics(layers, zeros, 0, torch.empty(0, features, dtype=dtype), 0)
