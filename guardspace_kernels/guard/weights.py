"""The weights of a base model inside whatever adapters surround them, under the names that the base model gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from guardspace_kernels.guard.layers import parameter_values, unwrapped
from guardspace_kernels.nn import ProjectedLoraLinear


class Weight(NamedTuple):
    """A parameter or persistent buffer: its name in the base model and its path in the model at hand."""

    name: str
    path: str
    tensor: torch.Tensor
    is_parameter: bool

    def values(self, model: nn.Module) -> torch.Tensor:
        """Gathered where it is sharded, read where it is offloaded; ValueError if it has no values anywhere."""
        return parameter_values(model, self.path, self.tensor)


def weights_of(model: nn.Module, *, adapted: bool = False) -> Iterator[Weight]:
    """Every parameter and persistent buffer of the base model, also where PEFT or a guard wraps its modules.

    Persistent buffers count because running averages change outputs; the others are made by code from the
    configuration, and differ from one version to the next. A shared tensor comes under each of its names. What LoRA and
    guarded layers add is left out; what anything else adds comes under a name that the base model does not have.

    Args:
        adapted: with the modules and rows that ``modules_to_save`` and ``trainable_token_indices`` put in the place of
            the base model's while their adapter is active; otherwise what ``disable_adapter`` leaves.
    """
    yield from _walk(model, "", "", adapted)


def _walk(module: nn.Module, name: str, path: str, adapted: bool) -> Iterator[Weight]:
    inner, skipped = _wrapped(module, adapted)
    if inner:
        rows = _trained_rows(module) if adapted else None
        for weight in _walk(module.get_submodule(inner), name, _join(path, inner), adapted):
            if rows is not None and weight.name == _join(name, "weight"):
                weight = weight._replace(tensor=rows)
            yield weight
    for key, parameter in module._parameters.items():
        if parameter is not None and key not in skipped:
            yield Weight(_join(name, key), _join(path, key), parameter, True)
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in skipped and key not in module._non_persistent_buffers_set:
            yield Weight(_join(name, key), _join(path, key), buffer, False)
    for key, child in module._modules.items():
        if child is not None and key not in skipped:
            yield from _walk(child, _join(name, key), _join(path, key), adapted)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _wrapped(module: nn.Module, adapted: bool) -> tuple[str, set[str]]:
    """(path of the child that stands for the base model's module, or empty; names in ``module`` to leave out).

    PEFT's classes are known by what they have, so that the method need not import PEFT. By their class, since several
    pass on the attributes of what they wrap.
    """
    cls, everything = type(module), {*module._parameters, *module._buffers, *module._modules}
    inside = unwrapped(module)
    if inside is not module:
        return next(path for path, one in module.named_modules() if one is inside), everything
    if isinstance(module, ProjectedLoraLinear):
        return "", everything - {"weight", "bias"}
    if hasattr(cls, "get_base_model") and "base_model" in module._modules:  # PeftModel
        return "base_model", {"base_model"}
    if hasattr(cls, "inject_adapter") and "model" in module._modules:
        return "model", {"model"}
    if hasattr(cls, "get_base_layer") and "base_layer" in module._modules:
        lora = everything if "lora_A" in module._modules else set()
        return "base_layer", {"base_layer", "trainable_tokens_delta", "trainable_tokens_original", *lora}
    if "token_adapter" in module._modules:
        return "token_adapter", {"token_adapter", "original_module"}
    if "modules_to_save" in module._modules and "original_module" in module._modules:
        # As the wrapper chooses: the original where no copy belongs to the active adapter.
        wrapper: Any = module
        copies = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.modules_to_save]
        copy = adapted and not wrapper.disable_adapters and copies
        return f"modules_to_save.{copies[0]}" if copy else "original_module", {"modules_to_save", "original_module"}
    return "", set()


def _trained_rows(layer: Any) -> torch.Tensor | None:
    """The embedding with its trained rows in place, as PEFT's ``TrainableTokensLayer`` forms it; None elsewhere."""
    if "trainable_tokens_delta" not in layer._modules or layer.disable_adapters or layer.merged:
        return None
    active = [adapter for adapter in layer.active_adapters if adapter in layer.trainable_tokens_delta]
    return layer.get_merged_weights(active).detach() if active else None
