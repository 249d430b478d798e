"""Calibration statistics: covariances of the inputs of every guarded layer on safety-triggering prompts."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from guardspace_kernels.guard.files import load_tensors, save_tensors
from guardspace_kernels.guard.layers import (
    ModelFingerprint,
    base_model,
    find_layers,
    linear_weight,
    tensor_fingerprint,
)
from guardspace_kernels.nn import CovarianceAccumulator
from guardspace_kernels.ops import symmetrize_

_KIND = "calibration statistics"
Batch = Mapping[str, torch.Tensor]


@dataclass
class InputStatistics:
    """Statistics of one tensor that one or more layers read.

    Attributes:
        layers: names of the layers that read it (q/k/v, for instance).
        covariance: C = Xᵀ X (d, d), symmetric, un-normalised, over all real tokens but the first of each prompt.
        tokens: T, the number of rows in X.
        sinks: (n, d), the distinct inputs seen at the first real token of a prompt (the attention sink).
        sink_tokens: how many first tokens were seen.
    """

    layers: list[str]
    covariance: torch.Tensor
    tokens: int
    sinks: torch.Tensor
    sink_tokens: int


@dataclass
class CalibrationStatistics:
    """What :func:`collect_statistics` returns: one :class:`InputStatistics` per distinct layer input.

    Bound to the weights of the model it was collected on. ``save``/``load`` use one safetensors file.
    """

    inputs: list[InputStatistics]
    fingerprint: ModelFingerprint
    prompts: int

    def __post_init__(self) -> None:
        self._by_layer = {name: entry for entry in self.inputs for name in entry.layers}

    @property
    def layers(self) -> list[str]:
        """Names of all covered layers, in the model's order."""
        return [name for name in self.fingerprint.layers if name in self._by_layer]

    def for_layer(self, name: str) -> InputStatistics:
        """The statistics of the input of layer ``name``; KeyError that lists what there is."""
        if name not in self._by_layer:
            raise KeyError(f"no statistics for layer {name}; there are {len(self._by_layer)}, e.g. {self.layers[:3]}")
        return self._by_layer[name]

    def merge(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """The statistics of both sets of prompts together; ``a.merge(b)`` is ``b.merge(a)`` bit for bit.

        ValueError unless both are of the same model and layers.
        """
        self.fingerprint.check(other.fingerprint, "the statistics to merge")
        if [e.layers for e in self.inputs] != [e.layers for e in other.inputs]:
            raise ValueError("the statistics to merge cover other layers, or group them otherwise")
        merged = []
        for a, b in zip(self.inputs, other.inputs, strict=True):
            merged.append(
                InputStatistics(
                    list(a.layers),
                    a.covariance + b.covariance,
                    a.tokens + b.tokens,
                    _union([a.sinks, b.sinks]),
                    a.sink_tokens + b.sink_tokens,
                )
            )
        return CalibrationStatistics(merged, self.fingerprint, self.prompts + other.prompts)

    def all_reduce(self, group: Any = None) -> CalibrationStatistics:
        """The statistics of all processes of a ``torch.distributed`` group together, the same on each of them.

        Every process collects on prompts of its own and then calls this. ValueError, on every process, unless all
        have the same model and layers.
        """
        import torch.distributed as dist

        mine = (self.fingerprint.model, [entry.layers for entry in self.inputs], [e.sinks.cpu() for e in self.inputs])
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, mine, group)
        for rank, (model, layers, _) in enumerate(gathered):
            if (model, layers) != gathered[0][:2]:
                raise ValueError(f"the statistics of ranks 0 and {rank} are of other models or layers")
        # NCCL reduces tensors on GPUs only.
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        counts = torch.tensor([self.prompts, *(n for e in self.inputs for n in (e.tokens, e.sink_tokens))])
        counts = counts.to(device)
        dist.all_reduce(counts, group=group)
        prompts, *rest = counts.tolist()
        reduced = []
        for i, entry in enumerate(self.inputs):
            packed = _packed(entry.covariance).to(device)
            dist.all_reduce(packed, group=group)
            sinks = _union([theirs[i] for *_, theirs in gathered]).to(entry.sinks.device)
            covariance = _unpacked(packed.to(entry.covariance.device))
            reduced.append(InputStatistics(list(entry.layers), covariance, rest[2 * i], sinks, rest[2 * i + 1]))
        return CalibrationStatistics(reduced, self.fingerprint, prompts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically: of every covariance its lower triangle."""
        tensors: dict[str, torch.Tensor] = {}
        inputs = []
        for i, entry in enumerate(self.inputs):
            tensors[f"{i}.covariance"], tensors[f"{i}.sinks"] = _packed(entry.covariance), entry.sinks
            inputs.append({"layers": entry.layers, "tokens": entry.tokens, "sink_tokens": entry.sink_tokens})
        header = {
            "prompts": self.prompts,
            "inputs": inputs,
            "fingerprint": {"model": self.fingerprint.model, "layers": self.fingerprint.layers},
        }
        save_tensors(path, _KIND, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationStatistics:
        """Reads what :meth:`save` wrote; FileNotFoundError or ValueError if it is not such a file."""
        tensors, header = load_tensors(path, _KIND)
        inputs = [
            InputStatistics(
                entry["layers"],
                _unpacked(tensors[f"{i}.covariance"]),
                entry["tokens"],
                tensors[f"{i}.sinks"],
                entry["sink_tokens"],
            )
            for i, entry in enumerate(header["inputs"])
        ]
        return cls(inputs, ModelFingerprint(**header["fingerprint"]), header["prompts"])

    def __repr__(self) -> str:
        tokens = self.inputs[0].tokens if self.inputs else 0
        return (
            f"CalibrationStatistics({len(self._by_layer)} layers, {len(self.inputs)} distinct inputs, "
            f"{self.prompts} prompts, {tokens} tokens)"
        )


def _packed(C: torch.Tensor) -> torch.Tensor:
    """The lower triangle, row after row: (d (d + 1) / 2,)."""
    return torch.cat([row[: i + 1] for i, row in enumerate(C.unbind())])


def _unpacked(triangle: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix whose lower triangle it is."""
    d = (math.isqrt(8 * triangle.numel() + 1) - 1) // 2
    C = triangle.new_zeros(d, d)
    for row, part in zip(C.unbind(), triangle.split(list(range(1, d + 1))), strict=True):
        row[: len(part)] = part
    symmetrize_(C)
    return C


def _union(sinks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The distinct rows of all, whatever their order."""
    rows = torch.cat(list(sinks))
    order = sorted(range(len(rows)), key=lambda i: rows[i].tolist())
    return _distinct(rows[order], rows[:0])


def _distinct(candidates: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """``known`` plus those rows of ``candidates`` that differ from every earlier one by more than rounding."""
    rows = candidates.to(known.dtype)
    # Statistics are kept in float32 at least: what bfloat16 can hold came from a model in it, and rounds as coarsely.
    coarse = torch.equal(rows.bfloat16().to(rows.dtype), rows) or torch.equal(rows.half().to(rows.dtype), rows)
    tolerance = 2e-2 if coarse else 1e-3
    for row in rows:
        if bool(((known - row).norm(dim=1) > tolerance * known.norm(dim=1)).all()):
            known = torch.cat([known, row[None]])
    return known


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
                mine.sinks = _distinct(rows, mine.sinks)
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
            tensors[f"{i}.covariance"], tensors[f"{i}.sinks"] = _packed(one.accumulator.lower), one.sinks
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
            one.accumulator.lower.copy_(_unpacked(lower))
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


def checked_mask(batch: Batch, index: int) -> torch.Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch {index} must be a mapping such as {{'input_ids': ..., 'attention_mask': ...}}, got "
            f"{type(batch).__name__}; pass a list of such batches"
        )
    ids = batch.get("input_ids")
    mask = batch.get("attention_mask")
    for name, value in (("input_ids", ids), ("attention_mask", mask)):
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(
                f"batch {index}: {name} must be a tensor, got {type(value).__name__}; tokenize with return_tensors='pt'"
            )
    if mask is None:
        if ids is None:
            raise ValueError(f"batch {index} needs input_ids or an attention_mask; it has {sorted(batch)}")
        mask = torch.ones_like(ids)
    if mask.dim() != 2:
        raise ValueError(f"batch {index}: attention_mask must be (prompts, tokens), got shape {tuple(mask.shape)}")
    if ids is not None and ids.shape != mask.shape:
        raise ValueError(
            f"batch {index}: attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)} differ in shape"
        )
    mask = mask.bool()
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"batch {index}: prompt {empty[0]} is all padding (its attention_mask has no 1)")
    return mask


def check_ids(model: nn.Module, batch: Batch, index: int) -> None:
    """ValueError that names the prompt if it holds a token that the model does not know (another tokenizer's)."""
    get_embeddings = getattr(model, "get_input_embeddings", None)
    known = getattr(get_embeddings() if callable(get_embeddings) else None, "num_embeddings", None)
    ids = batch.get("input_ids")
    if known is None or ids is None:
        return
    unknown = ((ids < 0) | (ids >= known)).nonzero()
    if len(unknown):
        prompt, place = unknown[0].tolist()
        raise ValueError(
            f"batch {index}: prompt {prompt} holds token {int(ids[prompt, place])}, but the model knows {known} "
            "tokens; tokenize with this model's tokenizer"
        )


def first_tokens(mask: torch.Tensor) -> torch.Tensor:
    """A mask of each row's first real token, on whichever side the padding is."""
    first = torch.zeros_like(mask)
    first[torch.arange(mask.shape[0], device=mask.device), mask.int().argmax(dim=1)] = True
    return first


def with_answers(model: nn.Module, batch: Batch, answer_tokens: int) -> dict[str, torch.Tensor]:
    """The batch with the first tokens of the model's own greedy answers appended, padded on the left.

    An answer ends with its first end-of-sequence token; what follows it is masked.
    """
    extra = sorted(set(batch) - {"input_ids", "attention_mask", "labels"})
    if extra or "input_ids" not in batch:
        raise ValueError(f"answer_tokens needs batches of input_ids and attention_mask alone, got also {extra}")
    generate = getattr(model, "generate", None)
    if not callable(generate):
        raise TypeError(f"answer_tokens needs a model with .generate(), got {type(model).__name__}")
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).long()
    order = mask.argsort(dim=1, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = getattr(config, "pad_token_id", None)
    pad = pad if pad is not None else (ends[0] if ends else 0)
    whole = generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=answer_tokens, do_sample=False, pad_token_id=pad
    )
    answer = whole[:, ids.shape[1] :]
    ended = torch.isin(answer, torch.tensor(ends, device=answer.device)) if ends else torch.zeros_like(answer).bool()
    before_end = (ended.long().cumsum(dim=1) - ended.long()) == 0
    return {"input_ids": whole, "attention_mask": torch.cat([mask, before_end.long()], dim=1)}


def forward_batch(model: nn.Module, batch: Batch, logits: int = 1) -> Any:
    """``model(**batch)`` with positions that follow the mask (left padding moves absolute ones), without a cache and,
    where the model knows how and no labels ask for more, with the logits of the last ``logits`` positions only."""
    accepted = inspect.signature(base_model(model).forward).parameters
    arguments: dict[str, Any] = dict(batch)
    mask = batch.get("attention_mask")
    if "position_ids" in accepted and "position_ids" not in batch and mask is not None and mask.dim() == 2:
        arguments["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    if "use_cache" in accepted:
        arguments.setdefault("use_cache", False)
    if "logits_to_keep" in accepted and "labels" not in batch:
        ids = batch.get("input_ids")
        # Positions, not a number: a number makes a strided slice, for which torch copies a frozen output embedding
        # once per prompt (10.1 s against 2.7 s for 64 prompts of 38 tokens).
        kept = logits if ids is None else torch.arange(ids.shape[1], device=ids.device)[-logits:]
        arguments.setdefault("logits_to_keep", kept)
    return model(**arguments)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients within the context; every module is left in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def to_device(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


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
    inputs = [
        InputStatistics(
            i.layers, i.accumulator.covariance(), int(i.accumulator.tokens), i.sinks, i.sink_tokens
        )
        for i in collector.inputs
    ]  # fmt: skip
    return CalibrationStatistics(inputs, fingerprint, prompts)
