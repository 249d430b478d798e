"""The linear layers of a model: which ones, and their weights."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer whose weight is stored as (d_in, d_out)."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel trains; any other model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` divided its parameters among processes, so that a forward needs all of them."""
    return any(hasattr(module, "unshard") for module in model.modules())


def base_model(model: nn.Module) -> nn.Module:
    """The model under a PeftModel; any other model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The layer's weight as (d_out, d_in): a view, whatever the storage."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if is_conv1d(module) else weight


def layer_weight(model: nn.Module, name: str) -> torch.Tensor:
    """Layer ``name``'s weight as (d_out, d_in), with its values wherever they are."""
    module = model.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    weight = parameter_values(model, f"{name}.weight", weight)
    return weight.T if is_conv1d(module) else weight


def parameter_values(model: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The parameter itself, a sharded one gathered, and for one that accelerate offloaded what it would load."""
    gather = getattr(parameter, "full_tensor", None)
    if callable(gather):
        return gather()
    if not parameter.is_meta:
        return parameter
    path = name.split(".")
    for split in reversed(range(len(path))):
        hook = getattr(model.get_submodule(".".join(path[:split])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            with suppress(KeyError):
                stored = (getattr(one, "weights_map", None) or {})[".".join(path[split:])]
                return stored.to(parameter.dtype)
    raise ValueError(f"parameter {name} is on the meta device and offloaded nowhere: load the model first")


def find_layers(model: nn.Module, target_modules: str | Sequence[str] = "all-linear") -> dict[str, nn.Module]:
    """Name -> module of the linear layers to guard, in the model's order.

    Args:
        target_modules: "all-linear" (every Linear or Conv1D but the output embedding), a regular expression that must
            match the whole name, or a list of names or name endings, all as in PEFT.

    Raises:
        TypeError: the model carries adapters or is a FullyShardedDataParallel, a layer's weight is not a floating-point
            matrix (quantised), or the target includes experts whose weights are one parameter (E, ...).
        ValueError: nothing matches, or an entry of the list matches nothing.
    """
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)
    }
    flat = [name for name, module in model.named_modules() if type(module).__name__ == "FullyShardedDataParallel"]
    if flat:
        raise TypeError(
            f"FullyShardedDataParallel (module {flat[0]!r}) hides the weights of its layers; shard the model with "
            "torch.distributed.fsdp.fully_shard, or give it unsharded"
        )
    adapted = [name for name in linear if ".base_layer" in name or "lora_" in name]
    if adapted:
        raise TypeError(
            f"model already carries adapters (found {adapted[0]}); pass the base model, before attach_guard or PEFT"
        )
    for name, parameter in _fused_experts(model):
        if _names(target_modules, name, linear):
            raise TypeError(
                f"target_modules={target_modules!r} includes {name}, the weights of all experts as one parameter of "
                f"shape {tuple(parameter.shape)}, which cannot be guarded; name the other layers in target_modules, in "
                "a list or an expression that leaves it out: the experts then stay frozen, as every weight without an "
                "adapter"
            )
    if target_modules == "all-linear":
        get_output = getattr(model, "get_output_embeddings", None)
        head = get_output() if callable(get_output) else None
        found = {name: m for name, m in linear.items() if m is not head and name.rsplit(".", 1)[-1] != "lm_head"}
    elif isinstance(target_modules, str):
        found = {name: m for name, m in linear.items() if re.fullmatch(target_modules, name)}
    else:
        wanted = set(target_modules)
        found = {name: m for name, m in linear.items() if name in wanted}
        if len(found) < len(wanted):
            matches = {entry: [n for n in linear if n == entry or n.endswith("." + entry)] for entry in wanted}
            idle = sorted(entry for entry, names in matches.items() if not names)
            if idle and len(idle) < len(wanted):
                raise ValueError(f"target_modules entry {idle[0]!r} matches no Linear or Conv1D layer")
            chosen = {name for names in matches.values() for name in names}
            found = {name: m for name, m in linear.items() if name in chosen}
    if not found:
        raise ValueError(
            f"target_modules={target_modules!r} matches no Linear or Conv1D layer; the model has "
            f"{sorted({name.rsplit('.', 1)[-1] for name in linear})}"
        )
    for name, module in found.items():
        weight = linear_weight(module)
        if weight.dim() != 2 or not weight.is_floating_point():
            raise TypeError(
                f"layer {name}: weight has dtype {weight.dtype} and shape {tuple(weight.shape)}; only floating-point "
                "matrices can be guarded (load the model without quantisation)"
            )
    return found


def _fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of three dimensions that belong to experts, by their name or their module's class."""
    for prefix, module in model.named_modules():
        if isinstance(module, _ConvNd):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            about = f"{name} {type(module).__name__}".lower()
            if parameter.dim() == 3 and ("expert" in about or "moe" in about):
                yield name, parameter


def _names(target_modules: str | Sequence[str], parameter: str, linear: Collection[str]) -> bool:
    """Whether a target is meant for this parameter or the module that holds it."""
    owner = parameter.rpartition(".")[0]
    if isinstance(target_modules, str):
        expression = ".*" if target_modules == "all-linear" else target_modules
        return any(re.fullmatch(expression, name) for name in (parameter, owner))
    return any(f".{name}".endswith(f".{e}") for e in target_modules if e not in linear for name in (parameter, owner))
