"""Files that are whole or absent: everything is written under a temporary name and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_METADATA_KEY = "guardspace"
_VERSIONS = {"calibration statistics": 2}  # of the other kinds: 1


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


def save_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]
) -> None:
    """A safetensors file with a JSON header that says what it is."""
    from safetensors.torch import save_file

    metadata = {"format": "pt", _METADATA_KEY: json.dumps({"kind": kind, "version": _VERSIONS.get(kind, 1), **header})}
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomic(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, header) of a file written by :func:`save_tensors`; ValueError if it is of another kind."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)} does not exist (a {kind} file was expected)")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
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
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a readable safetensors file: {error}") from error
