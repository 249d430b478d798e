"""Files that are whole or absent: everything is written under a temporary name and renamed."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

_METADATA_KEY = "guardspace"
_VERSIONS = {"calibration statistics": 2}  # of the other kinds: 1
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary name beside ``path``, then renames; creates missing parent folders."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not in memory until ``read``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    def __deepcopy__(self, _memo: Any) -> StoredTensor:
        return self


class _OpenFile:
    """It may be renamed or deleted meanwhile."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # open as long as a tensor of it is wanted
        self._lock = threading.Lock()

    def header(self) -> tuple[dict[str, Any], int]:
        """(the JSON header of a safetensors file, where the data begin)."""
        length = int.from_bytes(self._file.read(8), "little")
        return json.loads(self._file.read(length)), 8 + length

    def read(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        t = torch.empty(shape, dtype=dtype)
        view = t.reshape(-1).view(torch.uint8).numpy().data
        with self._lock:
            self._file.seek(offset)
            while view:
                count = self._file.readinto(view)
                if not count:
                    raise OSError(f"{self._file.name} was cut short after it was opened")
                view = view[count:]
        return t

    def __del__(self) -> None:
        self._file.close()


def save_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, torch.Tensor | StoredTensor],
    header: Mapping[str, Any],
) -> None:
    """A safetensors file with a JSON header that says what it is; stored tensors pass through memory one by one."""
    about = json.dumps({"kind": kind, "version": _VERSIONS.get(kind, 1), **header})
    # Wider types first, as the format's own writer orders them, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", _METADATA_KEY: about}}
    end = 0
    for name in names:
        t = tensors[name]
        begin, end = end, end + math.prod(t.shape) * t.dtype.itemsize
        entries[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                t = tensors[name]
                t = t.read() if isinstance(t, StoredTensor) else t.detach().cpu().contiguous()
                file.write(t.reshape(-1).view(torch.uint8).numpy().data)

    write_atomic(path, write)


def open_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """(tensors, header) of a file of :func:`save_tensors`; ValueError if it is of another kind."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)} does not exist (a {kind} file was expected)")
    file = _OpenFile(path)
    try:
        with safe_open(path, framework="pt") as checked:
            header = json.loads((checked.metadata() or {}).get(_METADATA_KEY, "{}"))
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a readable safetensors file: {error}") from error
    if header.get("kind") != kind:
        raise ValueError(
            f"{os.fspath(path)} is not a {kind} file of this library"
            + (f" but a {header['kind']} file" if header.get("kind") else "")
        )
    version = _VERSIONS.get(kind, 1)
    if header["version"] != version:
        raise ValueError(
            f"{os.fspath(path)} has format version {header['version']}, this library reads {version}; "
            "write it again with this version"
        )
    entries, begin = file.header()
    del entries["__metadata__"]
    tensors = {}
    for name, entry in entries.items():
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        tensors[name] = StoredTensor(dtype, shape, partial(file.read, dtype, shape, begin + entry["data_offsets"][0]))
    return tensors, header


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """As :func:`open_tensors`, with every tensor in memory."""
    tensors, header = open_tensors(path, kind)
    return {name: t.read() for name, t in tensors.items()}, header
