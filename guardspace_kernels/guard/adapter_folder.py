"""The folder of a saved adapter: a plain PEFT LoRA and, beside it, the file from which training resumes.

A rename replaces one file; these are two or three, in a folder with files of others (an optimiser's, a model card). So
the file for resuming goes first. It holds all that :func:`read_adapter` needs, and the hashes of the others' contents
before and after: whatever a kill leaves is told from an alteration and is, to a guarded model, the old or the new
adapter. To plain PEFT as well: weights of other shapes or layers than the configuration's never lie beside it, since it
is removed before they come and is there again after them.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from guardspace_kernels.guard import forms
from guardspace_kernels.guard.atomic import Staged, locked, staged, sync_folder
from guardspace_kernels.guard.files import OpenFile, describe, write_tensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
#: The file beside a saved adapter from which training resumes exactly.
GUARD_FILE = "guardspace.safetensors"
_KIND = "guarded adapter"

_HASHES = forms.exactly(forms.text, forms.maybe(forms.text))  # [of the new content, of what was there before]
_HEADER = forms.fields(
    {"plan": forms.text}, {"files": forms.fields({ADAPTER_WEIGHTS: _HASHES, ADAPTER_CONFIG: _HASHES})}
)


def write_adapter(
    folder: str | os.PathLike[str],
    weights: Mapping[str, torch.Tensor],
    config: str,
    resume: tuple[Mapping[str, torch.Tensor], str] | None = None,
) -> None:
    """Writes the adapter's files, all of them whole before the first gets its name; of two writers, one follows the
    other.

    Args:
        weights, config: content of ``adapter_model.safetensors`` and ``adapter_config.json``.
        resume: for ``guardspace.safetensors``: the trained factors by name, and the fingerprint of their plan.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        new_weights = stack.enter_context(staged(folder / ADAPTER_WEIGHTS))
        write_tensors(new_weights.file, weights)
        new_config = stack.enter_context(staged(folder / ADAPTER_CONFIG))
        new_config.file.write(config.encode())
        for new in (new_weights, new_config):
            new.flush()
        stack.enter_context(locked(folder))
        hashes = {one.target.name: _hashes(one) for one in (new_weights, new_config)}
        if resume is not None:
            tensors, plan = resume
            guard = stack.enter_context(staged(folder / GUARD_FILE))
            write_tensors(guard.file, tensors, describe(_KIND, {"plan": plan, "files": hashes}))
            guard.flush()
            guard.rename()
        after, before = hashes[ADAPTER_CONFIG]
        if before not in (after, None):
            new_config.target.unlink()
            sync_folder(folder)
        new_weights.rename()
        new_config.rename()


def _hashes(new: Staged) -> tuple[str | None, str | None]:
    return _sha256(new.temporary), _sha256(new.target)


def _sha256(path: Path | None) -> str | None:
    """Of a file; None if there is none."""
    digest = hashlib.sha256()
    try:
        with open(path or "", "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except FileNotFoundError:
        return None
    return digest.hexdigest()


@dataclass(frozen=True)
class SavedAdapter:
    """What :func:`read_adapter` found.

    Attributes:
        factors: the trained factors by name. plan: the fingerprint of their plan.
        exported: the tensors of the plain LoRA; None where saving was interrupted, so that it is not that of
            ``factors``.
        altered: which of the plain LoRA's files is not the one that was saved; empty if both are, or if the folder was
            written by an earlier version, which did not note it.
    """

    factors: dict[str, torch.Tensor]
    plan: str
    exported: dict[str, torch.Tensor] | None
    altered: str


def read_adapter(folder: str | os.PathLike[str]) -> SavedAdapter:
    """Reads a folder of :func:`write_adapter`, each file once and none while another process or thread writes them.

    Warns where saving was interrupted: the factors are the new ones, the plain LoRA beside them is not.

    Raises:
        FileNotFoundError: a file is missing. ValueError: one is not what it should be, or was altered.
    """
    folder = Path(folder)
    if not (folder / GUARD_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {GUARD_FILE}: not a folder saved by a guarded model. A plain LoRA is not confined to the "
            "null space and is not loaded into one; use peft.PeftModel.from_pretrained for it"
        )
    with locked(folder, shared=True):
        guard = OpenFile(folder / GUARD_FILE, f"a {_KIND} file")
        header = guard.described(_KIND, _HEADER)
        factors = {name: t.read() for name, t in guard.tensors.items()}
        weights = OpenFile(folder / ADAPTER_WEIGHTS, "a file with the adapter's weights")
        exported = {name: t.read() for name, t in weights.tensors.items()}
        found = {ADAPTER_WEIGHTS: weights.sha256(), ADAPTER_CONFIG: _sha256(folder / ADAPTER_CONFIG)}
    noted: dict[str, Any] = header.get("files", {})
    changed = [name for name, (after, _) in noted.items() if found[name] != after]
    if not changed or not _interrupted(noted, found):
        return SavedAdapter(factors, header["plan"], exported, ", ".join(changed))
    warnings.warn(
        f"saving to {folder} was interrupted: {GUARD_FILE} is complete and is loaded, {' and '.join(changed)} are not "
        "its own. Save again before the folder is loaded by anything else",
        stacklevel=3,
    )
    return SavedAdapter(factors, header["plan"], None, "")


def _interrupted(noted: Mapping[str, Any], found: Mapping[str, str | None]) -> bool:
    """Whether a kill in :func:`write_adapter`, after its first rename, leaves these two files."""
    (after, before), (_, config) = noted[ADAPTER_WEIGHTS], noted[ADAPTER_CONFIG]
    state = found[ADAPTER_WEIGHTS], found[ADAPTER_CONFIG]
    return state in [(before, config), (before, None), (after, None)]
