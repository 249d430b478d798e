"""Export: the guarded adapter as a plain LoRA on the untouched base model."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from guardspace_kernels.arguments import instance, shown, writable_folder
from guardspace_kernels.guard.adapter_folder import ADAPTER_CONFIG, write_adapter
from guardspace_kernels.guard.atomic import write_text
from guardspace_kernels.guard.certificate import adapted_layers, check_statistics, relative_drift
from guardspace_kernels.guard.layers import adapted_base, named_submodules
from guardspace_kernels.guard.statistics import CalibrationStatistics

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class ExportReport:
    """What rounding to the export dtype cost, per layer.

    Attributes:
        leak: ``‖ΔW (I − P)‖_F / ‖ΔW‖_F`` of the rounded factors; 0 would be exact.
        drift: ``‖ΔW X‖_F / ‖W X‖_F`` of the rounded factors on the calibration tokens, where statistics were given.
    """

    path: str
    dtype: str
    rank: int
    leak: dict[str, float]
    drift: dict[str, float]

    def __str__(self) -> str:
        text = f"rank-{self.rank} LoRA in {self.dtype} at {self.path}: worst leak {max(self.leak.values()):.1e}"
        return text + (f", worst drift {max(self.drift.values()):.1e}" if self.drift else "")

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, atomically."""
        write_text(path, json.dumps(asdict(self), indent=2))


def peft_key(layer: str, factor: str) -> str:
    """The name of a factor in PEFT's adapter file."""
    return f"base_model.model.{layer}.{factor}.weight"


def target_modules(base: nn.Module, names: Sequence[str]) -> list[str] | str:
    """How PEFT is told of these layers of the base model, and of no other module: by their last names, where those are
    exact, or else by the full ones, or else by an expression (a full name is an ending too, for PEFT).

    Exact by PEFT's own matching over all modules, of whatever kind: it refuses a file whose target catches a container.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    known = list(_bare_names(base))
    choices = (sorted({name.rsplit(".", 1)[-1] for name in names}), sorted(names))
    for choice in choices:
        config = LoraConfig(target_modules=choice)
        if {name for name in known if check_target_module_exists(config, name)} == set(names):
            return choice
    return "|".join(re.escape(name) for name in names)


def _bare_names(base: nn.Module) -> Iterator[str]:
    """The names that the base model's modules have without adapters."""
    inside: tuple[str, ...] = ()
    for name, module in named_submodules(base):
        if name.startswith(inside):
            continue
        if hasattr(module, "lora_A") or hasattr(module, "modules_to_save"):
            inside += (f"{name}.",)
        yield name


def export_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    stats: CalibrationStatistics | None = None,
) -> ExportReport:
    """Writes the adapter as a plain PEFT LoRA of rank 2r on the untouched base model.

    ``W + ΔW = W + [s·B | −s·B₀] [A P; A₀P]``, with ``lora_alpha`` equal to the rank so that the scaling is 1. Any PEFT
    or vLLM user loads it without this library, onto the base model that ``attach_guard`` was given.

    Args:
        model: a guarded model, or any module with :class:`~guardspace_kernels.nn.ProjectedLoraLinear` layers. It may be
            wrapped (``torch.compile``, DistributedDataParallel) or part of another module.
        path: folder for ``adapter_model.safetensors`` and ``adapter_config.json``. Over those of an older adapter both
            are replaced; a kill leaves the old ones, the new ones, or no configuration, which PEFT refuses.
        dtype: of the factors; default that of the adapter. Rounding breaks "zero": the report measures by how much.
        stats: adds the drift on the calibration tokens, after rounding, to the report.

    Raises:
        ValueError: there is no guarded layer, an adapter that is not finite or overflows ``dtype``, or statistics of
            other weights.
    """
    weights, config, report = plain_lora(model, path, dtype, stats)
    write_adapter(path, weights, config)
    return report


def plain_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    stats: CalibrationStatistics | None = None,
) -> tuple[dict[str, torch.Tensor], str, ExportReport]:
    """(weights, configuration, report) of :func:`export_lora`, for that path; writes nothing."""
    from peft import LoraConfig

    instance("model", model, nn.Module, "a torch.nn.Module")
    path = writable_folder("path", path)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {shown(dtype)}")
    if stats is not None:
        instance("stats", stats, CalibrationStatistics, "a CalibrationStatistics or None")
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no guarded layer; nothing to export")
    tensors: dict[str, torch.Tensor] = {}
    leak: dict[str, float] = {}
    drift: dict[str, float] = {}
    if stats is not None:
        check_statistics(model, layers, stats)
    rank = max(layer.G.shape[0] for layer in layers.values())
    for name, layer in layers.items():
        F, G = (t.to(dtype or layer.dtype) for t in (layer.F, layer.G))
        if not (torch.isfinite(F).all() and torch.isfinite(G).all()):
            raise ValueError(f"layer {name}: the adapter overflows {F.dtype}; export it as bfloat16 or float32")
        # One rank for all layers: zeros where a layer has less.
        missing = rank - G.shape[0]
        tensors[peft_key(name, "lora_A")] = nn.functional.pad(G, (0, 0, 0, missing)).cpu().contiguous()
        tensors[peft_key(name, "lora_B")] = nn.functional.pad(F, (0, missing)).cpu().contiguous()
        leak[name] = layer.leak(F, G)
        if stats is not None:
            drift[name] = relative_drift(F, G, layer.weight, stats.for_layer(name).covariance)
    base = adapted_base(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_modules(base, list(layers)),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        base_model_name_or_path=getattr(base, "name_or_path", None) or None,
        task_type="CAUSAL_LM" if hasattr(base, "prepare_inputs_for_generation") else None,
        inference_mode=True,
    )
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set's order changes from process to process
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    return tensors, _config_text(config), ExportReport(os.fspath(path), "/".join(dtypes), rank, leak, drift)


def _config_text(config: LoraConfig) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        return (Path(scratch) / ADAPTER_CONFIG).read_text()
