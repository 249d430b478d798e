"""A saved adapter as plain PEFT deploys it, with everything in its folder accounted for."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from guardspace_kernels.guard.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS

# What one loader or another takes instead of adapter_model.safetensors, or beside it.
_RIVALS = ("adapter_model.bin", "adapter_model.pt", "new_embeddings.safetensors", "new_embeddings.bin")


def deployed_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """The base model with the LoRA of ``folder``, loaded by PEFT as whoever deploys it does.

    What :func:`guardspace_kernels.certify` says of the returned model holds for the folder. Its layers have the
    scaling, ranks and factors that PEFT gives them, and whatever else the folder changes is in the model, where it is
    compared with the base model.

    Args:
        model: the base model; its linear layers are wrapped in place, as PEFT does.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        FileNotFoundError, ValueError: see :func:`check_adapter_folder`. ValueError: PEFT cannot load the folder, leaves
            out a tensor of it or makes one up.
    """
    check_adapter_folder(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing tensors, which are an error below
            deployed = PeftModel.from_pretrained(model, folder)
            loaded = deployed.load_adapter(folder, deployed.active_adapter)  # again, to be told what was loaded
    except Exception as error:
        lines = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        raise ValueError(f"adapter: {os.fspath(folder)} cannot be loaded onto the model by PEFT: {said}") from error
    weights = Path(folder) / ADAPTER_WEIGHTS
    if loaded.unexpected_keys:
        raise ValueError(
            f"adapter: {weights} holds {loaded.unexpected_keys[0]}, for which its configuration has no place: it is "
            "not loaded here, and may be elsewhere; save the adapter again"
        )
    if loaded.missing_keys:
        raise ValueError(f"adapter: {weights} lacks {loaded.missing_keys[0]}, which starts at random; save it again")
    return deployed


def check_adapter_folder(folder: str | os.PathLike[str], argument: str = "adapter") -> dict[str, Any]:
    """The configuration in the folder of a LoRA that every loader reads alike; no tensor is read.

    Raises:
        FileNotFoundError: ``adapter_config.json`` or ``adapter_model.safetensors`` is missing: PEFT would ask the Hub,
            or read a pickle. ValueError: the configuration is broken, not a LoRA's, or has a field that this PEFT
            ignores and another may not; or a file lies there that other loaders take instead. The message names the
            field or file.
    """
    path = Path(folder)
    if not (path / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{argument}: {path} holds no {ADAPTER_CONFIG}; give the folder of save_pretrained")
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{argument}: {path} holds no {ADAPTER_WEIGHTS}; other formats, pickles among them, are not read: save the "
            "adapter with safe_serialization=True"
        )
    try:
        config: Any = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {path / ADAPTER_CONFIG} is no configuration of PEFT: {error}") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ValueError(f"{argument}: {path / ADAPTER_CONFIG} is no configuration of PEFT: 'peft_type' is missing")
    if config["peft_type"] != "LORA":
        raise ValueError(f"{argument}: {path} is of peft_type {config['peft_type']!r}; a LoRA is needed")
    known = {field.name for field in fields(LoraConfig)} - {"runtime_config"}
    # A later PEFT writes its new fields too: what is off there is off here.
    ignored = sorted(name for name, value in config.items() if name not in known and value not in (None, False, {}, []))
    if ignored:
        raise ValueError(
            f"{argument}: {path / ADAPTER_CONFIG} has the field {ignored[0]!r}, which this version of PEFT ignores and "
            "another may not; remove it, or use the version that the adapter is deployed with"
        )
    rivals = [name for name in _RIVALS if (path / name).exists()]
    if rivals:
        raise ValueError(
            f"{argument}: {path} holds {rivals[0]} too, which other loaders take instead; remove one of them"
        )
    return config
