"""Calibration statistics: covariances of the inputs of every guarded layer on safety-triggering prompts."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from guardspace_kernels.arguments import instance
from guardspace_kernels.guard import forms
from guardspace_kernels.guard.files import StoredTensor, open_tensors, save_tensors
from guardspace_kernels.guard.fingerprint import ModelFingerprint, fingerprint_form
from guardspace_kernels.guard.sampling import EQUAL, FEWEST_PROMPTS, KINDS, Sample, fewest
from guardspace_kernels.guard.stored_inputs import check_prompts, checked_inputs
from guardspace_kernels.ops import symmetrize_

_KIND = "calibration statistics"
_PART = 1 << 24  # entries that are copied from a GPU at a time
_INPUT = forms.fields(
    {"layers": forms.several(forms.text, 1), "tokens": forms.count, "sink_tokens": forms.count},
    {"routed": forms.flag, "held_tokens": forms.count},
)
_HEADER = forms.fields(
    {"prompts": forms.count, "inputs": forms.several(_INPUT), "fingerprint": fingerprint_form},
    {
        "held_prompts": forms.count,
        "kind_tokens": forms.exactly(*3 * [forms.count]),
        "kind_weights": forms.exactly(*3 * [forms.number]),
        "distinct": forms.several(forms.count, at_most=FEWEST_PROMPTS),
        "judged": forms.count,
        "refused": forms.count,
    },
)


class InputStatistics:
    """Statistics of one tensor that one or more layers read, on the CPU.

    Attributes:
        layers: names of the layers that read it (q/k/v, for instance).
        features: d.
        covariance: C = Xᵀ X (d, d), symmetric, un-normalised, over all real tokens but the first of each prompt,
            weighted where the statistics weigh kinds of tokens. Kept as a triangle, in memory or in a file: every
            access makes a new matrix. It can be assigned.
        tokens: T, the number of rows in X.
        sinks: (n, d), the distinct inputs seen at the first real token of a prompt (the attention sink), and at the
            others of a shared beginning where ``separate_prefix`` kept them apart.
        sink_tokens: how many such tokens were seen.
        routed: whether its layers belong to an expert, which reads the tokens that a router gives it, or none.
        sample: some of the rows, up to 32 of each kind of token (template, request, answer), unweighted; no rows for
            an expert, None in statistics of versions that kept none.
        held, held_tokens: the part of C (its triangle) and of T that is of every fourth prompt, chosen by a hash of its
            tokens, at a few inputs spread over the depth; None at the others.
    """

    def __init__(
        self,
        layers: list[str],
        covariance: torch.Tensor | StoredTensor,
        tokens: int,
        sinks: torch.Tensor,
        sink_tokens: int,
        routed: bool = False,
        sample: Sample | None = None,
        held: torch.Tensor | StoredTensor | None = None,
        held_tokens: int = 0,
    ) -> None:
        """``covariance`` is (d, d), or its lower triangle as :func:`packed` gives it."""
        self.layers, self.tokens, self.sink_tokens = layers, tokens, sink_tokens
        self.routed, self.sample, self.held, self.held_tokens = routed, sample, held, held_tokens
        self.sinks = sinks.cpu()
        self.features = sinks.shape[1]
        self.stored = covariance
        if isinstance(covariance, torch.Tensor) and covariance.dim() == 2:
            self.covariance = covariance

    def triangle(self) -> torch.Tensor:
        """The lower triangle of C, (d (d + 1) / 2,)."""
        return _read(self.stored)

    def held_on(self, device: torch.device | str) -> torch.Tensor | None:
        """The covariance of the prompts that can be held out, (d, d), made on that device; None where there is none."""
        return None if self.held is None else unpacked(_read(self.held).to(device))

    def covariance_on(self, device: torch.device | str) -> torch.Tensor:
        """C, made on that device."""
        return unpacked(self.triangle().to(device))

    def lower_on(self, device: torch.device | str) -> torch.Tensor:
        """The lower triangle of C as a matrix, made on that device; above the diagonal it is zero."""
        return _lower(self.triangle().to(device))

    @property
    def covariance(self) -> torch.Tensor:
        return self.covariance_on("cpu")

    @covariance.setter
    def covariance(self, C: torch.Tensor) -> None:
        self.stored = on_cpu(packed(C))

    def __reduce__(self) -> tuple[Any, ...]:
        held = None if self.held is None else _read(self.held)
        state = self.layers, self.triangle(), self.tokens, self.sinks, self.sink_tokens, self.routed, self.sample, held
        return InputStatistics, (*state, self.held_tokens)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor | StoredTensor]:
        """For a file: all but the numbers and names."""
        found: dict[str, torch.Tensor | StoredTensor] = {"covariance": self.stored, "sinks": self.sinks}
        if self.sample is not None:
            found |= {"keys": self.sample.keys, "rows": self.sample.rows}
        if self.held is not None:
            found["held"] = self.held
        return {f"{prefix}.{name}": t for name, t in found.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, StoredTensor], prefix: str, **numbers: Any) -> InputStatistics:
        """From :meth:`tensors` in a file, where covariances stay until they are asked for, and its other arguments."""
        sinks = tensors[f"{prefix}.sinks"].read()
        numbers["sample"] = None
        if f"{prefix}.keys" in tensors:
            numbers["sample"] = Sample(tensors[f"{prefix}.keys"].read(), tensors[f"{prefix}.rows"].read())
        held = tensors.get(f"{prefix}.held")
        return cls(covariance=tensors[f"{prefix}.covariance"], sinks=sinks, held=held, **numbers)

    def merge(self, other: InputStatistics) -> InputStatistics:
        """Of both sets of prompts together; what only one of them has a part of is left out."""
        sample, held = None, None
        if self.sample is not None and other.sample is not None:
            sample = self.sample.merge(other.sample)
        if self.held is not None and other.held is not None:
            held = _read(self.held) + _read(other.held)
        return InputStatistics(
            list(self.layers),
            self.triangle() + other.triangle(),
            self.tokens + other.tokens,
            _union([self.sinks, other.sinks]),
            self.sink_tokens + other.sink_tokens,
            self.routed or other.routed,
            sample,
            held,
            0 if held is None else self.held_tokens + other.held_tokens,
        )


@dataclass
class CalibrationStatistics:
    """One :class:`InputStatistics` per distinct layer input, from :func:`guardspace_kernels.collect_statistics`.

    Bound to the weights of the model it was collected on. ``save``/``load`` use one safetensors file.

    Attributes:
        prompts: how many were counted. held_prompts: how many of them can be held out.
        kind_tokens: how many tokens, the first ones apart, are of each kind: template, request, answer.
        kind_weights: with which they are counted.
        distinct: hashes of different prompts among them, 16 if there are as many; none in statistics that do not tell.
        judged, refused: of how many prompts the model's own answer was judged, and how many of these it refused.
    """

    inputs: list[InputStatistics]
    fingerprint: ModelFingerprint
    prompts: int
    held_prompts: int = 0
    kind_tokens: tuple[int, ...] = (0, 0, 0)
    kind_weights: tuple[float, ...] = EQUAL
    distinct: tuple[int, ...] = ()
    judged: int = 0
    refused: int = 0

    @property
    def refused_share(self) -> float | None:
        """Of the prompts whose answers were judged, the share that the model refused; None if none was."""
        return self.refused / self.judged if self.judged else None

    @property
    def weighting(self) -> str:
        """How kinds of tokens are weighted, in words; empty where they count alike."""
        if self.kind_weights == EQUAL:
            return ""
        return ", ".join(f"{kind} {weight:g}" for kind, weight in zip(KINDS, self.kind_weights, strict=True))

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
        instance("other", other, CalibrationStatistics, "a CalibrationStatistics")
        self.fingerprint.check(other.fingerprint, "the statistics to merge")
        if [e.layers for e in self.inputs] != [e.layers for e in other.inputs]:
            raise ValueError("the statistics to merge cover other layers, or group them otherwise")
        if self.kind_weights != other.kind_weights:
            raise ValueError(
                f"the statistics to merge weigh kinds of tokens by {self.kind_weights} and {other.kind_weights}; "
                "collect both with the same kind_weights"
            )
        merged = [a.merge(b) for a, b in zip(self.inputs, other.inputs, strict=True)]
        kinds = tuple(a + b for a, b in zip(self.kind_tokens, other.kind_tokens, strict=True))
        prompts, held = self.prompts + other.prompts, self.held_prompts + other.held_prompts
        distinct = _distinct(self.distinct, other.distinct)
        counts = self.judged + other.judged, self.refused + other.refused
        return CalibrationStatistics(
            merged, self.fingerprint, prompts, held, kinds, self.kind_weights, distinct, *counts
        )

    def all_reduce(self, group: Any = None) -> CalibrationStatistics:
        """The statistics of all processes of a ``torch.distributed`` group together, the same on each of them.

        Every process collects on prompts of its own and then calls this. ValueError, on every process, unless all
        have the same model, layers and dtype.
        """
        import torch.distributed as dist

        covered = [self.kind_weights, *((entry.layers, str(entry.sinks.dtype)) for entry in self.inputs)]
        parts = [(e.sinks, e.sample, e.held is not None) for e in self.inputs]
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (self.fingerprint.model, covered, self.distinct, parts), group)
        for rank, (*what, _, _) in enumerate(gathered):
            if what != list(gathered[0][:2]):
                raise ValueError(f"the statistics of ranks 0 and {rank} are of other models, layers, weights or dtypes")
        # NCCL reduces tensors on GPUs only.
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

        def summed(t: torch.Tensor) -> torch.Tensor:
            t = t.to(device, copy=True)
            dist.all_reduce(t, group=group)
            return t.cpu()

        whole = torch.tensor([self.prompts, self.held_prompts, self.judged, self.refused, *self.kind_tokens])
        each = torch.tensor([(e.tokens, e.sink_tokens, e.held_tokens) for e in self.inputs])
        prompts, held_prompts, judged, refused, *kinds = summed(whole).tolist()
        reduced = []
        for entry, counts, *theirs in zip(
            self.inputs, summed(each).tolist(), *(entries for *_, entries in gathered), strict=True
        ):
            tokens, sink_tokens, held_tokens = counts
            samples = [sample for _, sample, _ in theirs]
            held = entry.held is not None and all(has for *_, has in theirs)
            reduced.append(
                InputStatistics(
                    list(entry.layers),
                    summed(entry.triangle()),
                    tokens,
                    _union([sinks for sinks, *_ in theirs]),
                    sink_tokens,
                    entry.routed,
                    None if None in samples else functools.reduce(Sample.merge, samples),
                    summed(_read(entry.held)) if held else None,
                    held_tokens if held else 0,
                )
            )
        distinct = functools.reduce(_distinct, (told for *_, told, _ in gathered))
        counts = prompts, held_prompts, tuple(kinds)
        return CalibrationStatistics(reduced, self.fingerprint, *counts, self.kind_weights, distinct, judged, refused)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically: of every covariance its lower triangle."""
        tensors: dict[str, torch.Tensor | StoredTensor] = {}
        inputs = []
        for i, entry in enumerate(self.inputs):
            tensors |= entry.tensors(str(i))
            names = ("layers", "tokens", "sink_tokens", "routed", "held_tokens")
            inputs.append({name: getattr(entry, name) for name in names})
        header = {
            "prompts": self.prompts,
            "held_prompts": self.held_prompts,
            "kind_tokens": self.kind_tokens,
            "kind_weights": self.kind_weights,
            "distinct": self.distinct,
            "judged": self.judged,
            "refused": self.refused,
            "inputs": inputs,
            "fingerprint": self.fingerprint.to_header(),
        }
        save_tensors(path, _KIND, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationStatistics:
        """Opens what :meth:`save` wrote.

        Covariances stay in the file until they are asked for, one by one, and are checked whenever they are read.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is of another kind, was altered or damaged, or
                holds what statistics cannot be, such as non-finite values; the message names file and layer.
        """
        tensors, header = open_tensors(path, _KIND, _HEADER)
        check_prompts(path, header)
        tensors = checked_inputs(path, tensors, header["inputs"], header["fingerprint"]["layers"])
        inputs = [InputStatistics.of(tensors, str(i), **entry) for i, entry in enumerate(header["inputs"])]
        counts = header.get("held_prompts", 0), tuple(header.get("kind_tokens", (0, 0, 0)))
        weights, distinct = tuple(header.get("kind_weights", EQUAL)), tuple(header.get("distinct", ()))
        fingerprint, judged = ModelFingerprint.from_header(header["fingerprint"]), header.get("judged", 0)
        return cls(inputs, fingerprint, header["prompts"], *counts, weights, distinct, judged, header.get("refused", 0))

    def __repr__(self) -> str:
        tokens = max((entry.tokens for entry in self.inputs), default=0)
        judged = f", {self.refused} of {self.judged} refused" if self.judged else ""
        return (
            f"CalibrationStatistics({len(self._by_layer)} layers, {len(self.inputs)} distinct inputs, "
            f"{self.prompts} prompts, {tokens} tokens{judged})"
        )


def _read(t: torch.Tensor | StoredTensor) -> torch.Tensor:
    return t.read() if isinstance(t, StoredTensor) else t


def _distinct(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Of both; unknown where one is."""
    return tuple(fewest(a, b)) if a and b else ()


def packed(C: torch.Tensor) -> torch.Tensor:
    """The lower triangle, row after row: (d (d + 1) / 2,)."""
    if C.is_cuda:
        return C[_triangular(len(C), C.device)]
    # By numpy, whose slices cost less: 0.27 ms instead of 1.3 for 576 rows, of which a model has a hundred thousand.
    return torch.from_numpy(np.concatenate([row[: i + 1] for i, row in enumerate(C.detach().numpy())]))


def on_cpu(t: torch.Tensor) -> torch.Tensor:
    """``t.cpu()``, from a GPU by parts through page-locked memory: in one piece, 11 GB of triangles took 9 s from an
    H100, a fraction of what its bus carries."""
    if not t.is_cuda:
        return t.cpu()
    size = min(_PART, t.numel())
    with torch.cuda.device(t.device):  # on whose stream an event is recorded
        return _staged(t, [torch.empty(size, dtype=t.dtype, pin_memory=True) for _ in range(2)], torch.cuda.Event)


def _staged(t: torch.Tensor, buffers: list[torch.Tensor], event: Callable[[], Any]) -> torch.Tensor:
    """While one buffer is filled from the device, what lies in the other goes to memory that nobody has touched yet."""
    made, under_way = torch.empty(t.shape, dtype=t.dtype), None
    size = max(1, len(buffers[0]))
    for i, (source, target) in enumerate(zip(t.reshape(-1).split(size), made.view(-1).split(size), strict=True)):
        buffer, filled = buffers[i % 2][: len(source)], event()
        buffer.copy_(source, non_blocking=True)
        filled.record()
        if under_way is not None:
            _land(*under_way)
        under_way = filled, buffer, target
    if under_way is not None:
        _land(*under_way)
    return made


def _land(filled: Any, buffer: torch.Tensor, target: torch.Tensor) -> None:
    filled.synchronize()
    target.copy_(buffer)


def _triangular(d: int, device: torch.device) -> torch.Tensor:
    """A mask: on a GPU one launch where a CPU is quicker row by row."""
    return torch.ones(d, d, dtype=torch.bool, device=device).tril()


def unpacked(triangle: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix whose lower triangle it is."""
    C = _lower(triangle)
    symmetrize_(C)
    return C


def _lower(triangle: torch.Tensor) -> torch.Tensor:
    d = (math.isqrt(8 * triangle.numel() + 1) - 1) // 2
    C = triangle.new_zeros(d, d)
    if C.is_cuda:
        C[_triangular(d, C.device)] = triangle
    else:
        # Row by row through NumPy, whose views cost a tenth of torch's.
        rows, entries, end = C.numpy(), triangle.numpy(), 0
        for i, row in enumerate(rows):
            row[: i + 1] = entries[end : end + i + 1]
            end += i + 1
    return C


def _union(sinks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The distinct rows of all, whatever their order."""
    rows = torch.cat(list(sinks))
    order = sorted(range(len(rows)), key=lambda i: rows[i].tolist())
    return distinct(rows[order], rows[:0])


def distinct(candidates: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """``known`` plus those rows of ``candidates`` that differ from every earlier one by more than rounding."""
    rows = candidates.to(known.dtype)
    # Statistics are kept in float32 at least: what bfloat16 can hold came from a model in it, and rounds as coarsely.
    coarse = torch.equal(rows.bfloat16().to(rows.dtype), rows) or torch.equal(rows.half().to(rows.dtype), rows)
    tolerance = 2e-2 if coarse else 1e-3
    rows = rows[_apart(rows, known, tolerance)]
    found = [known]
    while len(rows):
        found.append(rows[:1])
        rows = rows[1:]
        rows = rows[_apart(rows, found[-1], tolerance)]
    return torch.cat(found) if len(found) > 1 else known


def _apart(rows: torch.Tensor, known: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Which rows differ from every known one."""
    # Not by a product: distances of a thousandth would drown in its rounding.
    distances = torch.cdist(known, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return (distances > tolerance * known.norm(dim=1, keepdim=True)).all(dim=0)
