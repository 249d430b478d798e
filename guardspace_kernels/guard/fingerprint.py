"""Fingerprints: what identifies a tensor by its bits or its values, and the weights of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from guardspace_kernels.guard import forms
from guardspace_kernels.guard.threads import use_threads
from guardspace_kernels.guard.weights import weights_of

#: Of the fingerprints that are made now. Those of version 1 marked the bits of parameters, whatever dtype held them.
VERSION = 2
#: How :meth:`TensorMark.difference` begins where a cast to a narrower dtype made it.
ROUNDED = "rounded to "
_TABLE_WIDTH = 512
# From narrow to wide: every value of the first two is one of the third, and that one of the fourth.
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Entries at a time: what a core caches, for each thread, and what fills a GPU.
_CPU_BLOCK, _GPU_BLOCK = 2**18, 2**24
_SPLIT = 2**15  # entries that torch splits among its threads


def tensor_fingerprint(t: torch.Tensor) -> str:
    """A hash of a tensor's dtype, shape and bits that does not depend on its device, strides or the thread count.

    The bits are laid out as a table of 64-bit words; SHA-256 runs over its wrapping row and column sums (and the few
    words left over). At memory speed it tells models apart by accident, not against someone who forges one.
    """
    if t.is_meta:
        raise _no_values(t)
    digest = hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode())
    data = t.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # part of a larger buffer, where 64-bit words cannot begin
        data = data.clone()
    whole = data.numel() - data.numel() % (8 * _TABLE_WIDTH)
    table = data[:whole].view(torch.int64).reshape(-1, _TABLE_WIDTH)
    for part in (table.sum(dim=0), table.sum(dim=1), data[whole:]):
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _no_values(t: torch.Tensor) -> ValueError:
    return ValueError(f"a weight of shape {tuple(t.shape)} is on the meta device: load the model first")


class _BlockHash:
    """The hash of a tensor that comes in blocks; of whole rows of the table, all but the last."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._digest = hashlib.sha256(f"values {_name(dtype)} {shape}".encode())
        self._columns: torch.Tensor | None = None

    def update(self, block: torch.Tensor) -> None:
        table = block.view(torch.int64).view(-1, _TABLE_WIDTH)
        self._digest.update(table.sum(dim=1).cpu().numpy().tobytes())
        columns = table.sum(dim=0)
        self._columns = columns if self._columns is None else self._columns + columns

    def finish(self, rest: torch.Tensor) -> str:
        for part in (self._columns, rest.view(torch.uint8)):
            if part is not None:
                self._digest.update(part.cpu().numpy().tobytes())
        return self._digest.hexdigest()[:32]


def _lies_here(t: torch.Tensor) -> bool:
    """Whole, and in the memory of a CPU: not sharded, offloaded, or quantised behind a subclass."""
    return t.device.type == "cpu" and type(t) in (torch.Tensor, nn.Parameter)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """On a CPU by NumPy, in a fifth of ``torch.equal``'s time."""
    return torch.equal(a, b) if a.device.type != "cpu" else np.array_equal(a.numpy(), b.numpy())


@dataclass(frozen=True)
class TensorMark:
    """What identifies the values of a tensor, whatever dtype holds them.

    Attributes:
        shape: of the tensor.
        exact: the narrowest of bfloat16, float16, float32 and float64 that holds every value without loss; float16
            beside bfloat16 where both do. A dtype other than these four stands for itself.
        hashes: dtype -> hash of the values rounded to it, from the narrowest to ``exact``, by which a tensor that was
            rounded later is recognised.
    """

    shape: tuple[int, ...]
    exact: tuple[str, ...]
    hashes: dict[str, str]

    @property
    def value(self) -> str:
        """The hash of the values: equal for equal values, in whichever dtypes."""
        return self.hashes[self.exact[0]]

    @classmethod
    def of(cls, t: torch.Tensor) -> TensorMark:
        """One pass, in blocks with small temporaries; independent of device, strides and threads.

        NaN equals nothing: a tensor that holds one is only recognised in its own dtype. ValueError on the meta device.
        """
        if t.is_meta:
            raise _no_values(t)
        shape = tuple(t.shape)
        if t.dtype not in _FLOATS:
            return cls(shape, (_name(t.dtype),), {_name(t.dtype): tensor_fingerprint(t)})
        data = t.detach().contiguous().reshape(-1)
        if data.storage_offset() * data.element_size() % 8:
            data = data.clone()
        dtypes = [dtype for dtype in _FLOATS if dtype.itemsize <= max(t.dtype.itemsize, 2)]
        hashes = {dtype: _BlockHash(dtype, shape) for dtype in dtypes}
        holds = set(dtypes)
        step = _CPU_BLOCK * torch.get_num_threads() if t.device.type == "cpu" else _GPU_BLOCK
        whole = data.numel() - data.numel() % (4 * _TABLE_WIDTH)  # whole rows of words in the narrowest dtype too
        marks = {}
        for begin in (*range(0, whole, step), whole):
            block = data[begin : begin + step][: whole - begin] if begin < whole else data[whole:]
            wide = block.float()  # 16-bit to 16-bit takes ten times as long as by way of it, which loses nothing
            if t.dtype == torch.float64 and len(holds) > 1 and not _equal(wide.double(), block):
                holds = {torch.float64}
            for dtype, made in hashes.items():
                rounded = block if dtype == t.dtype else wide.to(dtype)
                if dtype in holds and dtype not in (t.dtype, torch.float32) and not _equal(rounded.float(), wide):
                    holds.discard(dtype)
                if begin < whole:
                    made.update(rounded)
                else:
                    marks[dtype] = made.finish(rounded)
        narrowest = next(dtype for dtype in dtypes if dtype in holds)
        exact = [dtype for dtype in dtypes if dtype in holds and dtype.itemsize == narrowest.itemsize]
        kept = [dtype for dtype in dtypes if dtype.itemsize <= max(narrowest.itemsize, 2)]
        return cls(shape, tuple(map(_name, exact)), {_name(dtype): marks[dtype] for dtype in kept})

    @classmethod
    def _from_header(cls, mark: Any) -> TensorMark:
        return cls(tuple(mark["shape"]), tuple(mark["exact"]), mark["hashes"])

    def difference(self, original: TensorMark) -> str:
        """How this tensor came from ``original``: empty if the values are the same."""
        if self.value == original.value:
            return ""
        if self.shape != original.shape:
            return f"resized from {original.shape} to {self.shape}"
        for dtype in self.exact:
            if original.hashes.get(dtype) == self.hashes[dtype]:
                return f"{ROUNDED}{dtype}"
        return "changed"


def _mark(value: Any, where: str) -> dict[str, Any]:
    """The form of a :class:`TensorMark`."""
    read: dict[str, Any] = _MARK(value, where)
    if not set(read["exact"]) <= set(read["hashes"]):
        raise ValueError(f"{where} lacks a hash of {read['exact'][0]}")
    return read


_MARK = forms.fields(
    {
        "shape": forms.several(forms.count),
        "exact": forms.several(forms.text, at_least=1),
        "hashes": forms.named(forms.text),
    }
)
_FIRST_FORM = forms.fields({"model": forms.text, "layers": forms.named(forms.text)})
_FORM = forms.fields(
    {
        "version": forms.count,
        "model": forms.text,
        "layers": forms.named(forms.text),
        "weights": forms.named(_mark),
    }
)


def fingerprint_form(value: Any, where: str) -> Any:
    """The form of :meth:`ModelFingerprint.to_header`."""
    ModelFingerprint.from_header(value, where)
    return value


@dataclass(frozen=True)
class ModelFingerprint:
    """What identifies a model: the values of all of its weights.

    Attributes:
        model: one hash over all of them.
        layers: hashes of the weights of the layers concerned.
        weights: name -> mark of every parameter and persistent buffer. None in fingerprints of version 1, whose hashes
            are of the bits of parameters: those know a model in its own dtype only.
    """

    model: str
    layers: dict[str, str]
    weights: dict[str, TensorMark] | None = None

    @property
    def version(self) -> int:
        return 1 if self.weights is None else VERSION

    @classmethod
    def of(
        cls, model: nn.Module, layers: Sequence[str], *, version: int = VERSION, adapted: bool = False
    ) -> ModelFingerprint:
        """Of a sharded model in every process at once; one weight at a time is gathered, or read from a disk.

        Adapters do not count, unless ``adapted`` asks for what they put in the place of base weights, as
        :func:`~guardspace_kernels.guard.weights.weights_of` describes it.
        """
        shards: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
        for module in shards:
            module.reshard()  # the last forward may have left parameters gathered, in the dtype it computed in
        # A tied weight counts under each of its names: whether two are one tensor changes with where a model is kept.
        known: dict[int, TensorMark | str | Future[TensorMark | str]] = {}
        mark_of: Callable[[torch.Tensor], TensorMark | str] = tensor_fingerprint if version == 1 else TensorMark.of
        weights = list(weights_of(model, adapted=adapted))  # all at once: an id is one tensor's while that lives
        if version == 1:
            weights = [weight for weight in weights if weight.is_parameter]
        # One thread for each weight: those of one operation would wait for each other after every block.
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=partial(use_threads, 1)) as pool:
            for weight in weights:
                if id(weight.tensor) in known:
                    continue
                try:
                    if _lies_here(weight.tensor) and weight.tensor.numel() >= _SPLIT:
                        known[id(weight.tensor)] = pool.submit(mark_of, weight.tensor)
                    else:
                        # No name for the values: the next ones would be gathered while it still held these.
                        known[id(weight.tensor)] = mark_of(weight.values(model))
                except (AssertionError, NotImplementedError) as error:  # of tensors that are not what they seem
                    raise TypeError(
                        f"weight {weight.name} is a {type(weight.tensor).__name__}, whose values cannot be read; load "
                        "the model without quantisation"
                    ) from error
        found = {key: mark.result() if isinstance(mark, Future) else mark for key, mark in known.items()}
        marks: dict[str, Any] = {weight.name: found[id(weight.tensor)] for weight in weights}
        hashes = marks if version == 1 else {name: mark.value for name, mark in marks.items()}
        of_layers = {name: hashes[f"{name}.weight"] for name in layers}
        return cls(_hash_of(hashes), of_layers, None if version == 1 else marks)

    @classmethod
    def from_header(cls, header: Any, where: str = "fingerprint") -> ModelFingerprint:
        """What :meth:`to_header` gave, of any version; ValueError that names the place if it is not that."""
        if not isinstance(header, dict) or "version" not in header:
            return cls(**_FIRST_FORM(header, where))
        if header["version"] != VERSION:
            raise ValueError(f"{where}.version is {header['version']!r}; this library reads {VERSION}, or none")
        read = _FORM(header, where)
        weights = {name: TensorMark._from_header(mark) for name, mark in read["weights"].items()}
        made = cls(_hash_of({name: mark.value for name, mark in weights.items()}), read["layers"], weights)
        marks = {name: weights.get(f"{name}.weight") for name in made.layers}
        if made.model != read["model"] or any(m is None or m.value != made.layers[name] for name, m in marks.items()):
            raise ValueError(f"{where} contradicts itself; it was altered")
        return made

    def to_header(self) -> dict[str, Any]:
        """As JSON holds it."""
        header: dict[str, Any] = {"model": self.model, "layers": self.layers}
        if self.weights is None:
            return header
        return {"version": self.version, **header, "weights": {name: asdict(m) for name, m in self.weights.items()}}

    def restricted(self, layers: Iterable[str]) -> ModelFingerprint:
        """Of the same model, with some of the layers."""
        return replace(self, layers={name: self.layers[name] for name in layers})

    def differences(self, other: ModelFingerprint) -> dict[str, str]:
        """Name -> what became of it, for every weight of ``other`` that is not as in this model: "rounded to bfloat16",
        "resized from ... to ...", "changed", "added" or "missing". Both must be of one version; those of version 1 know
        their layers and whether anything else differs."""
        if self.weights is None or other.weights is None:
            layers = [f"{name}.weight" for name, value in other.layers.items() if self.layers.get(name) != value]
            if self.model != other.model and not layers:
                layers = ["a weight outside the guarded layers"]
            return dict.fromkeys(layers, "changed")
        found = {}
        for name in sorted({*self.weights, *other.weights}):
            mine, theirs = self.weights.get(name), other.weights.get(name)
            if mine is None or theirs is None:
                found[name] = "added" if mine is None else "missing"
            elif difference := theirs.difference(mine):
                found[name] = difference
        return found

    def check_model(self, model: nn.Module, layers: Sequence[str], subject: str) -> None:
        """ValueError that says what differs unless ``model`` has these weights, in whichever dtype."""
        self.check(ModelFingerprint.of(model, layers, version=self.version), subject)

    def check(self, other: ModelFingerprint, subject: str) -> None:
        """ValueError that says what differs unless both are of the same weights."""
        if self.version != other.version:
            raise ValueError(
                f"{subject} cannot be compared: fingerprints of versions {self.version} and {other.version}; collect "
                "statistics again with one version of this library"
            )
        if self.model == other.model and all(self.layers.get(n) == v for n, v in other.layers.items()):
            return
        found = self.differences(other)
        layers = [name for name, value in other.layers.items() if self.layers.get(name) != value]
        if layers:
            what = found.get(f"{layers[0]}.weight", "changed")
            where = f"layer {layers[0]} differs" + ("" if what == "changed" else f", {what}")
        else:
            where = "a weight outside the guarded layers differs"
            where += "".join(f": {name} {what}" for name, what in [*found.items()][:1] if self.weights)
        others = len(layers or found) - 1
        more = f" (and {others} more)" if others > 0 else ""
        raise ValueError(
            f"{subject} belong to another model: {where}{more}. They are bound to the weights they were made from; "
            "collect statistics and plan again for this model"
        )


def _hash_of(hashes: Mapping[str, str]) -> str:
    whole = "\n".join(f"{name} {value}" for name, value in sorted(hashes.items()))
    return hashlib.sha256(whole.encode()).hexdigest()[:32]
