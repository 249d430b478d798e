"""Files of tensors: safetensors with a header that says what they are, and hashes of the header and every tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NoReturn

import torch

from guardspace_kernels.arguments import path as checked_path
from guardspace_kernels.guard import forms
from guardspace_kernels.guard.atomic import write_atomic

_METADATA_KEY = "guardspace"
_HASHES_KEY = "sha256"
# Of each kind the version that is written, and the earliest that is read: of those before them, files had no hashes.
_VERSIONS = {"calibration statistics": (3, 2), "statistics checkpoint": (2, 2)}
_OTHER_VERSIONS = (2, 1)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# The hash of the header is the first thing in it, at a fixed place. It is that of the header with zeros there.
_START = f'{{"__metadata__":{{"{_HASHES_KEY}":"'.encode()
_NO_HASH = "0" * 64
_CHUNK = 1 << 20  # read and hashed while it is in the processor's cache
_LARGEST_HEADER = 100_000_000  # of the format

_ENTRY = forms.fields(
    {
        "dtype": forms.one_of(_DTYPES),
        "shape": forms.several(forms.count, at_most=8),
        "data_offsets": forms.exactly(forms.count, forms.count),
    }
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not in memory until ``read``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    def __deepcopy__(self, _memo: Any) -> StoredTensor:
        return self


def _bytes(t: torch.Tensor) -> memoryview:
    return t.reshape(-1).view(torch.uint8).numpy().data


class _Source:
    """A file through one descriptor: it may be renamed, replaced or deleted meanwhile."""

    def __init__(self, path: str | os.PathLike[str], expected: str) -> None:
        self.path = checked_path("path", path)
        if os.path.isdir(path):
            raise IsADirectoryError(f"{self.path} is a folder ({expected} was expected)")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{self.path} does not exist ({expected} was expected)")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # open as long as a tensor of it is wanted
        self.size = os.fstat(self._file.fileno()).st_size

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, into: memoryview, offset: int, seen: Callable[[memoryview], object] = lambda _: None) -> None:
        while into:
            count = os.preadv(self._file.fileno(), [into[:_CHUNK]], offset)
            if not count:
                raise OSError(f"{self.path} was cut short after it was opened")
            seen(into[:count])
            into, offset = into[count:], offset + count

    def tensor(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int, digest: str | None
    ) -> torch.Tensor:
        t = torch.empty(shape, dtype=dtype)
        found = hashlib.sha256()
        self.read(_bytes(t), offset, found.update if digest else lambda _: None)
        if digest and found.hexdigest() != digest:
            raise self.altered(f"tensor {name!r}")
        return t

    def altered(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path}: {what} does not match its hash; the file was altered or damaged. Make it again, or restore "
            "it from a copy"
        )

    def broken(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is not a readable safetensors file: {why}")


class OpenFile:
    """A safetensors file of this library or another, opened once; its header is checked.

    Attributes:
        tensors: by name, in memory only when they are read. metadata: the texts in its header.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file. ValueError: it is not a safetensors file, or its
            header was altered.
    """

    def __init__(self, path: str | os.PathLike[str], expected: str) -> None:
        self._source = _Source(path, expected)
        self._text = self._header()
        entries = self._parsed(self._text, "the header")
        try:
            self.metadata: dict[str, str] = forms.named(forms.text)(entries.pop("__metadata__", {}), "__metadata__")
            entries = forms.named(_ENTRY)(entries, "tensors")
        except ValueError as error:
            raise self._source.broken(str(error)) from error
        self._hashes = self._checked_hashes(list(entries))
        self.tensors = self._located(entries)

    def _header(self) -> bytes:
        size = self._source.size
        if size < 8:
            raise self._source.broken(f"it has {size} bytes")
        length = bytearray(8)
        self._source.read(memoryview(length), 0)
        bytes_ = int.from_bytes(length, "little")
        if not 2 <= bytes_ <= min(size - 8, _LARGEST_HEADER):
            raise self._source.broken(f"its header is to take {bytes_} of {size} bytes")
        text = bytearray(bytes_)
        self._source.read(memoryview(text), 8)
        return bytes(text)

    def _parsed(self, text: str | bytes, what: str) -> dict[str, Any]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            made = dict(pairs)
            if len(made) < len(pairs):
                raise ValueError("a name is there twice")
            return made

        def constant(name: str) -> NoReturn:
            raise ValueError(f"{name} is not JSON")

        try:
            value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        except RecursionError as error:
            raise self._source.broken(f"{what} is nested too deeply") from error
        except ValueError as error:
            raise self._source.broken(f"{what} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise self._source.broken(f"{what} is not a JSON object")
        return value

    def _checked_hashes(self, names: list[str]) -> dict[str, str]:
        """Of the tensors; empty if the file has none."""
        hashes = self.metadata.get(_HASHES_KEY)
        if hashes is None:
            return {}
        begin = len(_START)
        unsigned = self._text[:begin] + _NO_HASH.encode() + self._text[begin + 64 :]
        if (
            not self._text.startswith(_START)
            or not re.fullmatch(f"[0-9a-f]{{{64 * (1 + len(names))}}}", hashes)
            or hashlib.sha256(unsigned).hexdigest() != hashes[:64]
        ):
            raise self._source.altered("the header")
        return {name: hashes[64 * i : 64 * (i + 1)] for i, name in enumerate(names, 1)}

    def _located(self, entries: dict[str, Any]) -> dict[str, StoredTensor]:
        start, end, tensors = 8 + len(self._text), 0, {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            possible = math.prod(n for n in shape if n) < 2**53  # of an empty tensor's other sizes too
            if not possible or begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                raise self._source.broken(
                    f"tensor {name!r}, {entry['dtype']} of shape {shape}, is said to be at bytes {begin} to {stop}; "
                    f"the one before it ends at {end}"
                )
            end = stop
            read = partial(self._source.tensor, name, dtype, shape, start + begin, self._hashes.get(name))
            tensors[name] = StoredTensor(dtype, shape, read)
        if start + end != self._source.size:
            raise self._source.broken(f"it has {self._source.size} bytes, its header describes {start + end}")
        return tensors

    def sha256(self) -> str:
        """Of the whole file."""
        digest, chunk, size = hashlib.sha256(), memoryview(bytearray(_CHUNK)), self._source.size
        for offset in range(0, size, _CHUNK):
            self._source.read(chunk[: min(_CHUNK, size - offset)], offset, digest.update)
        return digest.hexdigest()

    def described(self, kind: str, form: forms.Form | None = None) -> dict[str, Any]:
        """The description that :func:`save_tensors` wrote; ValueError unless it is of this kind and form."""
        about, path = self._parsed(self.metadata.get(_METADATA_KEY, "{}"), "its description"), self._source.path
        if about.get("kind") != kind:
            found = f" but a {about['kind']} file" if isinstance(about.get("kind"), str) else ""
            raise ValueError(f"{path} is not a {kind} file of this library{found}")
        version, earliest = _VERSIONS.get(kind, _OTHER_VERSIONS)
        if about.get("version") not in (version, earliest):
            raise ValueError(
                f"{path} has format version {reprlib.repr(about.get('version'))}, this library reads {version}; "
                "write it again with this version"
            )
        if not self._hashes:
            if about["version"] == version:
                raise self._source.altered("the header, which lacks its hashes,")
            warnings.warn(
                f"{path} was written by an earlier version and holds no hashes: damage to it may go unnoticed. Save it "
                "again",
                stacklevel=4,
            )
        if form is not None:
            form({name: value for name, value in about.items() if name not in ("kind", "version")}, f"{path}: header")
        return about


def write_tensors(file: BinaryIO, tensors: Mapping[str, torch.Tensor | StoredTensor], about: str | None = None) -> None:
    """Writes a safetensors file: a plain one, or with a description and with hashes, which are put into their place in
    the header after the tensors, so that each passes through memory once."""
    for name, t in tensors.items():
        if t.dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} has dtype {t.dtype}; files hold {', '.join(map(str, _NAMES))}")
    # Wider types first, as the format's own writer orders them, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    hashes = [_NO_HASH] * (1 + len(names))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    if about is not None:
        entries = {"__metadata__": {_HASHES_KEY: "".join(hashes), "format": "pt", _METADATA_KEY: about}}
    end = 0
    for name in names:
        t = tensors[name]
        begin, end = end, end + math.prod(t.shape) * t.dtype.itemsize
        entries[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for i, name in enumerate(names, 1):
        t = tensors[name]
        data = _bytes(t.read() if isinstance(t, StoredTensor) else t.detach().cpu().contiguous())
        if about is not None:
            hashes[i] = hashlib.sha256(data).hexdigest()
        file.write(data)
    if about is not None:
        begin = len(_START)
        body = begin + 64 * len(hashes)
        hashes[0] = hashlib.sha256(text[:begin] + "".join(hashes).encode() + text[body:]).hexdigest()
        file.seek(8 + begin)
        file.write("".join(hashes).encode())


def describe(kind: str, header: Mapping[str, Any]) -> str:
    """What :meth:`OpenFile.described` reads."""
    return json.dumps({"kind": kind, "version": _VERSIONS.get(kind, _OTHER_VERSIONS)[0], **header})


def save_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, torch.Tensor | StoredTensor],
    header: Mapping[str, Any],
) -> None:
    """A safetensors file with a JSON header that says what it is, and SHA-256 hashes of the header and each tensor;
    stored tensors pass through memory one by one."""
    about = describe(kind, header)
    write_atomic(path, lambda file: write_tensors(file, tensors, about))


def open_tensors(
    path: str | os.PathLike[str], kind: str, form: forms.Form | None = None
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """(tensors, header) of a file of :func:`save_tensors`.

    Warns of a file of an earlier version, which has no hashes.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is of another kind or version, its header was altered,
            or it is not of the ``form``; a tensor that was altered raises ValueError when it is read, each time.
    """
    file = OpenFile(path, f"a {kind} file")
    return file.tensors, file.described(kind, form)


def load_tensors(
    path: str | os.PathLike[str], kind: str, form: forms.Form | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """As :func:`open_tensors`, with every tensor in memory."""
    tensors, header = open_tensors(path, kind, form)
    return {name: t.read() for name, t in tensors.items()}, header


def check_shapes(
    path: str | os.PathLike[str],
    tensors: Mapping[str, StoredTensor | torch.Tensor],
    expected: Mapping[str, tuple[tuple[int | None, ...], tuple[torch.dtype, ...]]],
) -> None:
    """ValueError unless the file holds these tensors, no others, in these shapes (None: any size) and dtypes."""
    for name in [*expected, *tensors]:
        if name not in tensors:
            raise ValueError(f"{os.fspath(path)} lacks the tensor {name!r}")
        if name not in expected:
            raise ValueError(f"{os.fspath(path)} has a tensor {name!r}, which belongs to nothing in its header")
        shape, (wanted, dtypes) = tuple(tensors[name].shape), expected[name]
        fits = len(shape) == len(wanted) and all(w in (None, n) for n, w in zip(shape, wanted, strict=True))
        if not fits or tensors[name].dtype not in dtypes:
            sizes = ", ".join("any" if n is None else str(n) for n in wanted)
            raise ValueError(
                f"{os.fspath(path)}: tensor {name!r} is {tensors[name].dtype} of shape {shape}, expected "
                f"{' or '.join(map(str, dtypes))} of shape ({sizes})"
            )
