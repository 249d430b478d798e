"""An adapter that was trained without a guard, as the start of a guarded one."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key

from guardspace_kernels.arguments import instance, path, shown
from guardspace_kernels.guard.adapted import adapted_layers
from guardspace_kernels.guard.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from guardspace_kernels.guard.beside import weights_beside
from guardspace_kernels.guard.files import OpenFile
from guardspace_kernels.integrations.deployed import check_adapter_folder

# What a configuration says of a plain LoRA. Any other field, of this PEFT or a later one, makes another of it.
_PLAIN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "trainable_token_indices", "ensure_weight_tying", "init_lora_weights", "eva_config", "loftq_config",
    "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
# Ways to begin that leave the base weight as it is. The others move a part of it into the adapter.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class StartAdapter:
    """A plain LoRA: layer -> (F, G) with ``ΔW = F G``, s in F, and by their keys the tensors beside its factors."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    beside: dict[str, torch.Tensor]


def read_start(start: str | os.PathLike[str] | PeftModel) -> StartAdapter:
    """What the ``start`` of ``attach_guard`` holds: a PeftModel with its one active LoRA, or the folder of one.

    Raises:
        TypeError: neither of the two. FileNotFoundError: no adapter in the folder. ValueError: no LoRA, one whose
            change is not B A of the base weight (DoRA, a bias, a start that moved the weight), or a broken one.
    """
    if isinstance(start, PeftModel):
        _check_config(start.peft_config[start.active_adapter])
        layers = adapted_layers(start)
        return StartAdapter({name: (layer.F, layer.G) for name, layer in layers.items()}, weights_beside(start))
    instance("start", start, (str, os.PathLike), "the folder of a LoRA, or a peft.PeftModel")
    folder = Path(path("start", start))
    check_adapter_folder(folder, "start")
    config = LoraConfig.from_pretrained(os.fspath(folder))
    _check_config(config)
    stored = OpenFile(folder / ADAPTER_WEIGHTS, "a file with the adapter's weights").tensors
    names = [key.removeprefix(_PREFIX).removesuffix(_A) for key in stored if key.endswith(_A)]
    factors = {}
    for name in names:
        keys = _PREFIX + name + _A, _PREFIX + name + _B
        if not all(key in stored for key in keys):
            raise ValueError(
                f"start: {folder / ADAPTER_WEIGHTS} lacks a factor of layer {name}; save the adapter again"
            )
        factors[name] = _factors(folder, name, config, *(stored[key].read() for key in keys))
    beside = {key: t.read() for key, t in stored.items() if not key.endswith((_A, _B))}
    return StartAdapter(factors, beside)


def _check_config(config: Any) -> None:
    """ValueError unless the adapter's change is ``s B A``, of the base model's own weights."""
    if not isinstance(config, LoraConfig):
        raise ValueError(f"start is of peft_type {getattr(config, 'peft_type', None)}; a LoRA is needed")
    others = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _PLAIN}
    set_ = {name: value for name, value in others.items() if value not in (None, False, "none", {}, [])}
    for name, value in set_.items():
        raise ValueError(
            f"start was trained with {name}={shown(value)}: its change of a layer may be another than s B A, which is "
            "what a guard can start from. Train a plain LoRA, or attach the guard without start"
        )
    if config.init_lora_weights not in _INITS:
        raise ValueError(
            f"start was trained with init_lora_weights={config.init_lora_weights!r}, which moved a part of the base "
            "weight into the adapter; save it with path_initial_model_for_weight_conversion, as a plain LoRA"
        )


def _factors(
    folder: Path, name: str, config: LoraConfig, A: torch.Tensor, B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"start: {folder}: the factors of layer {name} are {tuple(A.shape)} and {tuple(B.shape)}")
    if not all(t.is_floating_point() and bool(torch.isfinite(t).all()) for t in (A, B)):
        raise ValueError(f"start: {folder}: layer {name}: the adapter holds non-finite values; its training diverged")
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    if rank != len(A):
        raise ValueError(
            f"start: {folder / ADAPTER_CONFIG} gives layer {name} rank {rank}, its factors have {len(A)}; save it again"
        )
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank) * B.to(dtype), A.to(dtype)
