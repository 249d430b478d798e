"""A file with the state of a collection, from which an interrupted one goes on."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch

from guardspace_kernels.guard import forms
from guardspace_kernels.guard.batches import Batch
from guardspace_kernels.guard.collecting.collector import CollectedInput, Collector
from guardspace_kernels.guard.files import StoredTensor, open_tensors, save_tensors
from guardspace_kernels.guard.fingerprint import ModelFingerprint, fingerprint_form, tensor_fingerprint
from guardspace_kernels.guard.layers import linear_weight
from guardspace_kernels.guard.sampling import FEWEST_PROMPTS, kept
from guardspace_kernels.guard.statistics import InputStatistics
from guardspace_kernels.guard.stored_inputs import check_prompts, checked_inputs

_INPUT = forms.exactly(forms.several(forms.text, 1), *4 * [forms.count])
_HEADER = forms.fields(
    {
        "inputs": forms.several(_INPUT),
        "routed": forms.exactly(forms.several(forms.text), forms.several(forms.text)),
        "batches": forms.several(forms.text),
        "prompts": forms.count,
        "held_prompts": forms.count,
        "kind_tokens": forms.exactly(*3 * [forms.count]),
        "distinct": forms.several(forms.count, at_most=FEWEST_PROMPTS),
        "options": forms.named(lambda value, _: value),  # compared with the call's
        "fingerprint": fingerprint_form,
    },
    {"judged": forms.count, "refused": forms.count},
)


class Checkpoint:
    """A file with the state of a collection after some batches; does nothing without a path."""

    KIND = "statistics checkpoint"

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        collector: Collector,
        fingerprint: ModelFingerprint,
        options: dict[str, Any],
    ) -> None:
        self.path, self.collector, self.fingerprint, self.options = path, collector, fingerprint, options
        self.prompts = self.judged = self.refused = 0
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

    def add(self, batch: Batch, prompts: int, save: bool, judged: int = 0, refused: int = 0) -> None:
        self.prompts, self.judged, self.refused = self.prompts + prompts, self.judged + judged, self.refused + refused
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
        tensors, header = self._open(self.path)
        if header["batches"] != self.batches:
            raise ValueError(f"another process wrote {self._name()}; give each process a file of its own")
        return [
            InputStatistics.of(
                tensors, str(i), layers=names, tokens=tokens, sink_tokens=sink_tokens, held_tokens=held_tokens
            )
            for i, (names, tokens, sink_tokens, _, held_tokens) in enumerate(header["inputs"])
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
            entry = one.so_far()
            tensors |= entry.tensors(str(i))
            inputs.append([entry.layers, entry.tokens, entry.sink_tokens, one.first_batch, entry.held_tokens])
        sampler = self.collector.sampler
        header = {
            "inputs": inputs,
            "routed": [sorted(self.collector.routing.containers), sorted(self.collector.routing.flat)],
            "batches": self.batches,
            "prompts": self.prompts,
            "held_prompts": sampler.held_prompts,
            "kind_tokens": sampler.kind_tokens,
            "distinct": sampler.distinct,
            "judged": self.judged,
            "refused": self.refused,
            "options": self.options,
            "fingerprint": self.fingerprint.to_header(),
        }
        save_tensors(path, self.KIND, tensors, header)

    def _open(self, path: str | os.PathLike[str]) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
        tensors, header = open_tensors(path, self.KIND, _HEADER)
        check_prompts(path, header, len(header["batches"]))
        names = ("layers", "tokens", "sink_tokens", "first_batch", "held_tokens")
        entries = [dict(zip(names, entry, strict=True)) for entry in header["inputs"]]
        return checked_inputs(path, tensors, entries, header["fingerprint"]["layers"], zeros=True), header

    def _load(self, path: str | os.PathLike[str]) -> None:
        tensors, header = self._open(path)
        if header["options"] != self.options:
            raise ValueError(
                f"{self._name()} was made with {header['options']}, this call has {self.options}; {self._advice()}"
            )
        self.fingerprint.check(ModelFingerprint.from_header(header["fingerprint"]), f"the statistics in {self._name()}")
        sampler = self.collector.sampler
        for i, (names, tokens, sink_tokens, first_batch, held_tokens) in enumerate(header["inputs"]):
            entry = InputStatistics.of(
                tensors, str(i), layers=names, tokens=tokens, sink_tokens=sink_tokens, held_tokens=held_tokens
            )
            sinks = entry.sinks
            self._check(names, sinks, first_batch, len(header["batches"]))
            one = CollectedInput(sinks.shape[1], sinks.dtype, sinks.device, first_batch)  # it follows its first tensor
            one.layers, one.sinks, one.sink_tokens = names, sinks, sink_tokens
            one.accumulator.lower.copy_(entry.covariance)
            one.accumulator.tokens.fill_(tokens)
            if entry.held is not None:
                one.hold(entry.held_on("cpu"), held_tokens)
            if entry.sample is not None and len(entry.sample.keys):
                one.sample = entry.sample
                sampler.keys = torch.cat([sampler.keys, entry.sample.keys])
            self.collector.inputs.append(one)
            self.collector.input_of.update(dict.fromkeys(names, one))
        sampler.keys = sampler.keys[kept(sampler.keys)]
        sampler.held_prompts, sampler.kind_tokens = header["held_prompts"], header["kind_tokens"]
        sampler.distinct = header["distinct"]
        containers, flat = header["routed"]
        self.collector.routing.containers.update(containers)
        self.collector.routing.flat.update(flat)
        self.batches, self.prompts = header["batches"], header["prompts"]
        self.judged, self.refused = header.get("judged", 0), header.get("refused", 0)
        self.resumed = self.collector.batch = len(self.batches)

    def _check(self, names: list[str], sinks: torch.Tensor, first_batch: int, batches: int) -> None:
        """ValueError unless an input in the file can be one of this call."""
        for name in names:
            wanted = linear_weight(self.collector.layers[name]).shape[1] if name in self.collector.layers else 0
            if (sinks.shape[1], sinks.dtype) != (wanted, self.collector.dtype) or first_batch >= batches:
                raise ValueError(
                    f"{self._name()} holds an input of layer {name} from batch {first_batch} of {batches} on, in "
                    f"{sinks.dtype} and with {sinks.shape[1]} features, which this call cannot have; {self._advice()}"
                )


def _batch_hash(batch: Batch) -> str:
    digest = hashlib.sha256()
    for key in sorted(batch):
        value = batch[key]
        digest.update(f"{key} {tensor_fingerprint(value) if isinstance(value, torch.Tensor) else value!r}".encode())
    return digest.hexdigest()[:32]
