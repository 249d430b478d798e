"""Export: the guarded adapter as a plain LoRA on the untouched base model."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from guardspace_kernels.arguments import instance, shown, writable_folder
from guardspace_kernels.guard.adapted import adapted_layers
from guardspace_kernels.guard.adapter_folder import ADAPTER_CONFIG, write_adapter
from guardspace_kernels.guard.atomic import write_json
from guardspace_kernels.guard.beside import check_trained, check_unchanged, weights_beside
from guardspace_kernels.guard.certificate import check_statistics, covariances, relative_drift
from guardspace_kernels.guard.drift import largest
from guardspace_kernels.guard.layers import adapted_base
from guardspace_kernels.guard.peft_description import auto_mapping, target_modules, task_type
from guardspace_kernels.guard.plan import serving_remark
from guardspace_kernels.guard.statistics import CalibrationStatistics

if TYPE_CHECKING:
    from peft import LoraConfig


# Of an adapter's factors. PEFT casts others on loading, or cannot read them.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class ExportReport:
    """What rounding to the export dtype cost, per layer.

    Attributes:
        leak: ``‖ΔW (I − P)‖_F / ‖ΔW‖_F`` of the rounded factors; 0 would be exact, and is that of a layer that has not
            moved.
        drift: ``‖ΔW X‖_F / ‖W X‖_F`` of the rounded factors on the calibration tokens, where statistics were given.
    """

    path: str
    dtype: str
    rank: int
    leak: dict[str, float]
    drift: dict[str, float]

    def __str__(self) -> str:
        text = f"rank-{self.rank} LoRA in {self.dtype} at {self.path}: worst leak {largest(self.leak.values()):.1e}"
        text += f", worst drift {largest(self.drift.values()):.1e}" if self.drift else ""
        remark = serving_remark(self.rank)
        return f"{text}; {remark}" if remark else text

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, atomically."""
        write_json(path, asdict(self))


def peft_key(layer: str, factor: str) -> str:
    """The name of a factor in PEFT's adapter file."""
    return f"base_model.model.{layer}.{factor}.weight"


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
        ValueError: there is no guarded layer, an adapter that is not finite or overflows ``dtype``, a ``dtype`` that is
            not of 16, 32 or 64 floating-point bits, statistics of other weights, or something trainable or changed
            that the files would not hold: they hold the adapter, ``modules_to_save``, and embeddings resized since
            ``attach_guard``.
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
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"dtype must be torch.float32, float16, bfloat16 or float64, got {dtype}")
    if stats is not None:
        instance("stats", stats, CalibrationStatistics, "a CalibrationStatistics or None")
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no guarded layer; nothing to export")
    beside = weights_beside(model)
    check_trained(model, beside)
    check_unchanged(model, beside)
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in beside.items()}
    leak: dict[str, float] = {}
    drift: dict[str, float] = {}
    rounded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
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
        leak[name], rounded[name] = layer.leak(F, G), (F, G)
    if stats is not None:
        found = {
            name: relative_drift(*rounded[name], layers[name].weight, C)
            for names, _, C in covariances(layers, stats)
            for name in names
        }
        drift = {name: found[name] for name in layers}
    base = adapted_base(model)
    task = task_type(base)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_modules(base, list(layers)),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        base_model_name_or_path=getattr(base, "name_or_path", None) or None,
        task_type=task,
        auto_mapping=auto_mapping(base, task),
        **_trained_modules(base, next(iter(layers.values())).module),
        inference_mode=True,
    )
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set's order changes from process to process
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for key, t in tensors.items() if key not in beside})
    return tensors, _config_text(config), ExportReport(os.fspath(path), "/".join(dtypes), rank, leak, drift)


def _trained_modules(base: nn.Module, layer: Any) -> dict[str, Any]:
    """What the configuration of the layers' adapter says of the modules that are trained whole, or by rows."""
    active = getattr(layer, "active_adapters", [None])[0]
    config = getattr(base, "peft_config", {}).get(active)
    return {name: getattr(config, name, None) for name in ("modules_to_save", "trainable_token_indices")}


def _config_text(config: LoraConfig) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        return (Path(scratch) / ADAPTER_CONFIG).read_text()
