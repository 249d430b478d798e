"""Collection: one pass of a model over prompts, with hooks that accumulate covariances, and its checkpoint."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from guardspace_kernels.guard.batches import (
    Batch,
    check_ids,
    checked_mask,
    evaluating,
    first_tokens,
    forward_batch,
    to_device,
    with_answers,
)
from guardspace_kernels.guard.files import load_tensors, save_tensors
from guardspace_kernels.guard.layers import ModelFingerprint, find_layers, linear_weight, tensor_fingerprint
from guardspace_kernels.guard.statistics import CalibrationStatistics, InputStatistics, distinct, packed, unpacked
from guardspace_kernels.nn import CovarianceAccumulator


class _Input:
    """One distinct layer input while it is being collected."""

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device, batch: int) -> None:
        self.layers: list[str] = []
        self.features = features
        self.first_batch = batch
        self.accumulator = CovarianceAccumulator(features, dtype, device)
        self.sinks = torch.empty(0, features, dtype=dtype, device=device)
        self.new_sinks: list[torch.Tensor] = []
        self.sink_tokens = 0
        self.tensor: weakref.ref[torch.Tensor] | None = None
        self.version = 0

    def statistics(self) -> InputStatistics:
        """What was collected; frees the accumulator."""
        triangle = packed(self.accumulator.lower).cpu()
        tokens = int(self.accumulator.tokens)
        del self.accumulator
        return InputStatistics(self.layers, triangle, tokens, self.sinks, self.sink_tokens)

    def read(self, x: torch.Tensor) -> bool:
        """Whether x is the very tensor this input was last updated with."""
        return self.tensor is not None and self.tensor() is x and self.version == _version(x)


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


class _Collector:
    """The hooks of one collection: routes each layer's input to its accumulator, once per distinct tensor."""

    def __init__(self, layers: Mapping[str, nn.Module], dtype: torch.dtype, sink: bool) -> None:
        self.layers = layers
        self.dtype = dtype
        self.sink = sink
        self.inputs: list[_Input] = []
        self.input_of: dict[str, _Input] = {}
        self.mask = torch.empty(0)
        self.first = torch.empty(0)
        self.batch = 0

    @contextmanager
    def counting(self, mask: torch.Tensor) -> Iterator[None]:
        """Within the context every forward of a layer counts; hooks go whatever happens."""
        self.mask, self.first = mask, first_tokens(mask)
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if not args:
                raise TypeError(f"layer {name} is called with keywords alone; leave it out of target_modules")
            self.see(name, args[0])

        return hook

    def see(self, name: str, x: torch.Tensor) -> None:
        mine = self.input_of.get(name)
        if mine is None:
            # A layer first reached in a later batch does not join an input that has seen earlier ones.
            mine = next((i for i in self.inputs if i.first_batch == self.batch and i.read(x)), None)
            fresh = mine is None
            if mine is None:
                mine = _Input(x.shape[-1], self.dtype, x.device, self.batch)
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

    def update(self, name: str, mine: _Input, x: torch.Tensor) -> None:
        mine.tensor, mine.version = weakref.ref(x), _version(x)
        rows = x
        if x.shape[:-1] != self.mask.shape:
            # Prompts flattened to (rows, d) keep the mask's order; other shapes, as (tokens, prompts, d), may not.
            if x.dim() != 2 or x.shape[0] != self.mask.numel():
                raise ValueError(
                    f"layer {name}: input of shape {tuple(x.shape)} does not match the attention mask "
                    f"{tuple(self.mask.shape)}; such layers (routed experts, cross-attention) cannot be collected: "
                    "leave them out of target_modules"
                )
            rows = x.reshape(*self.mask.shape, x.shape[-1])
        mask = self.mask.to(x.device)
        if self.sink:
            first = self.first.to(x.device)
            mine.new_sinks.append(rows[first].detach().to(self.dtype))
            mask = mask & ~first
        mine.accumulator.update(rows, mask)

    def end_batch(self) -> None:
        """Looks for non-finite values, one device synchronisation for all layers, and keeps distinct sinks."""
        diagonals = torch.stack([i.accumulator.lower.diagonal().sum().cpu() for i in self.inputs])
        sinks = torch.stack([sum((s.sum().cpu() for s in i.new_sinks), torch.zeros(())) for i in self.inputs])
        for mine, finite in zip(self.inputs, torch.isfinite(diagonals) & torch.isfinite(sinks), strict=True):
            if not finite:
                raise ValueError(
                    f"batch {self.batch}: the input of layer {mine.layers[0]} holds non-finite values (or overflows "
                    f"{self.dtype}); the statistics would be worthless. Check the model's dtype and the prompts"
                )
            for rows in mine.new_sinks:
                mine.sinks = distinct(rows, mine.sinks)
                mine.sink_tokens += rows.shape[0]
            mine.new_sinks = []
        self.batch += 1


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
        if self.path is None:
            return
        self.batches.append(_batch_hash(batch))
        self.prompts, self.saved = prompts, save
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

    def _name(self) -> str:
        assert self.path is not None
        return f"the checkpoint {os.fspath(self.path)}"

    def _advice(self) -> str:
        return "give the arguments of the first call, or another checkpoint file"

    def _save(self, path: str | os.PathLike[str]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        inputs = []
        for i, one in enumerate(self.collector.inputs):
            tensors[f"{i}.covariance"], tensors[f"{i}.sinks"] = packed(one.accumulator.lower), one.sinks
            tokens = int(one.accumulator.tokens)
            inputs.append([one.layers, tokens, one.sink_tokens, one.first_batch])
        header = {
            "inputs": inputs,
            "batches": self.batches,
            "prompts": self.prompts,
            "options": self.options,
            "fingerprint": {"model": self.fingerprint.model, "layers": self.fingerprint.layers},
        }
        save_tensors(path, self.KIND, tensors, header)

    def _load(self, path: str | os.PathLike[str]) -> None:
        tensors, header = load_tensors(path, self.KIND)
        if header["options"] != self.options:
            raise ValueError(
                f"{self._name()} was made with {header['options']}, this call has {self.options}; {self._advice()}"
            )
        self.fingerprint.check(ModelFingerprint(**header["fingerprint"]), f"the statistics in {self._name()}")
        for i, (names, tokens, sink_tokens, first_batch) in enumerate(header["inputs"]):
            lower, sinks = tensors[f"{i}.covariance"], tensors[f"{i}.sinks"]
            device = linear_weight(self.collector.layers[names[0]]).device
            one = _Input(sinks.shape[1], sinks.dtype, device, first_batch)
            one.layers, one.sinks, one.sink_tokens = names, sinks.to(device), sink_tokens
            one.accumulator.lower.copy_(unpacked(lower))
            one.accumulator.tokens.fill_(tokens)
            self.collector.inputs.append(one)
            self.collector.input_of.update(dict.fromkeys(names, one))
        self.batches, self.prompts = header["batches"], header["prompts"]
        self.resumed = self.collector.batch = len(self.batches)


def _batch_hash(batch: Batch) -> str:
    digest = hashlib.sha256()
    for key in sorted(batch):
        value = batch[key]
        digest.update(f"{key} {tensor_fingerprint(value) if isinstance(value, torch.Tensor) else value!r}".encode())
    return digest.hexdigest()[:32]


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
) -> CalibrationStatistics:
    """One pass over safety-triggering prompts: ``C = Xᵀ X`` of the input of every guarded layer.

    Padding never counts, on either side. Layers that read the same tensor (q/k/v, gate/up) share one covariance. The
    first real token of each prompt, the attention sink, whose input can dwarf all others and is the same in every
    prompt, is kept out of C; its distinct inputs are kept apart and will be protected as directions of their own.

    Args:
        model: the aligned base model, without adapters. It is run in eval mode and left in the mode it was in.
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
            themselves, so choose a larger number for a large model). If it exists, those batches are not run again:
            the same call with the same batches goes on, and ends with the same bits as an uninterrupted one.

    Returns:
        :class:`CalibrationStatistics`.

    Raises:
        TypeError, ValueError: an unusable model, dtype or batch (empty, all padding, shapes that differ), or a
            non-finite activation; the message names batch and layer. Hooks are removed whatever happens.

    Source: GuardSpace (arXiv 2510.14301), the covariances of its sections on both subspaces.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    if answer_tokens < 0:
        raise ValueError(f"answer_tokens must be 0 or more, got {answer_tokens}")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be 1 or more, got {checkpoint_every}")
    layers = find_layers(model, target_modules)
    fingerprint = ModelFingerprint.of(model, list(layers))
    options = {
        "answer_tokens": answer_tokens, "separate_sink": separate_sink, "dtype": str(dtype), "layers": len(layers)
    }  # fmt: skip
    collector = _Collector(layers, dtype, separate_sink)
    state = _Checkpoint(checkpoint, collector, fingerprint, options)
    prompts, index = state.prompts, -1
    with evaluating(model):
        for index, raw in enumerate(tqdm(batches, desc="statistics", unit="batch", disable=not progress)):
            checked_mask(raw, index)
            check_ids(model, raw, index)
            if state.has(index, raw):
                continue
            batch = to_device(model, raw)
            if answer_tokens:
                batch = with_answers(model, batch, answer_tokens)
            with collector.counting(checked_mask(batch, index)):
                forward_batch(model, batch)
            collector.end_batch()
            prompts += collector.mask.shape[0]
            state.add(raw, prompts, save=(index + 1) % checkpoint_every == 0)
    state.end(index + 1)
    if prompts == 0:
        raise ValueError("batches is empty: at least one prompt is needed")
    unseen = [name for name in layers if name not in collector.input_of]
    if unseen:
        raise ValueError(f"layer {unseen[0]} was never reached by the forward pass; leave it out of target_modules")
    inputs = [i.statistics() for i in collector.inputs]
    return CalibrationStatistics(inputs, fingerprint, prompts)
