"""What is trained beside an adapter: which of it the adapter's file holds, as PEFT's does, and what would be lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from guardspace_kernels.guard.fingerprint import ROUNDED, TensorMark, tensor_fingerprint
from guardspace_kernels.guard.layers import adapted_base, named_submodules, peft_model
from guardspace_kernels.guard.weights import weights_of
from guardspace_kernels.nn import ProjectedLoraLinear

_NOTED = "guarded_base_weights"
_Note = tuple[torch.dtype, tuple[int, ...], str]


def note_weights(base: nn.Module) -> None:
    """Remembers on the base model what its weights are, so that what became of them shows when an adapter is saved."""
    known: dict[int, _Note] = {}
    noted: dict[str, _Note] = {}
    for weight in weights_of(base):
        t = weight.tensor
        if id(t) not in known:
            known[id(t)] = (t.dtype, tuple(t.shape), "" if t.is_meta else tensor_fingerprint(t))
        noted[weight.name] = known[id(t)]
    setattr(base, _NOTED, noted)


def weights_beside(model: nn.Module) -> dict[str, torch.Tensor]:
    """Key in PEFT's file -> tensor (the parameter itself) of what PEFT saves beside the factors.

    The copies of ``modules_to_save``, the rows of ``trainable_token_indices``, and embeddings that were resized since
    :func:`note_weights`, whole.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = adapted_base(model)
    found: dict[str, torch.Tensor] = {}
    for name, module in named_submodules(base):
        if isinstance(module, AuxiliaryTrainingWrapper):
            state = module.state_dict(keep_vars=True)
            for adapter in module.active_adapters:
                held = module.adapter_state_dict(adapter, state)
                found.update({f"base_model.model.{name}.{key}": t for key, t in held.items()})
    noted: dict[str, _Note] = getattr(base, _NOTED, {})
    for name, module in _embeddings(base):
        note = noted.get(f"{name}.weight")
        if note is not None and tuple(module.weight.shape) != note[1]:
            found.update({f"base_model.model.{name}.{key}": t for key, t in module.state_dict(keep_vars=True).items()})
    return found


def _embeddings(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """Input and output embedding of a Transformers model, by name, but those that PEFT has wrapped."""
    names = {module: name for name, module in named_submodules(base)}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(base, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Linear | nn.Embedding) and module in names:
            yield names[module], module


def check_unchanged(model: nn.Module, beside: dict[str, torch.Tensor]) -> None:
    """ValueError that names the base weights and buffers that are others than at :func:`note_weights`, bit for bit, and
    that ``beside`` does not hold. One pass over the weights, at memory speed; what was cast since is not compared, and
    what was only rounded, by a cast there and back, is none of them."""
    base = adapted_base(model)
    plan = getattr(peft_model(model), "guard_plan", None)
    marks: dict[str, TensorMark] = (plan and plan.model.weights) or {}
    noted: dict[str, _Note] = getattr(base, _NOTED, {})
    residuals = {f"{n}.weight" for n, m in named_submodules(base) if getattr(m, "weight_is_residual", False)}
    changed = []
    for weight in weights_of(base, adapted=True):
        t, note = weight.tensor, noted.get(weight.name)
        if note is None or t.is_meta or t.dtype != note[0] or weight.name in residuals:
            continue
        if f"base_model.model.{weight.name}" not in beside and tensor_fingerprint(t) != note[2]:
            mark = marks.get(weight.name)
            if mark is None or not TensorMark.of(t).difference(mark).startswith(ROUNDED):
                changed.append(weight.name)
    if changed:
        raise ValueError(
            f"changed since attach_guard: {_shown(changed)}. The adapter's file does not hold them, and on the base "
            "model it would give other outputs. Restore them, or have them trained and saved as PEFT does, by "
            "attach_guard(..., modules_to_save=[...])"
        )


def check_trained(model: nn.Module, beside: dict[str, torch.Tensor] | None = None) -> None:
    """ValueError unless the adapter's file holds whatever is trained.

    Names the weights or biases of guarded layers that are trainable, which must stay those of the base model, and else
    whatever trainable parameter neither belongs to an adapter nor is in :func:`weights_beside`; and the layers whose
    running statistics change while they train.
    """
    held = {id(t) for t in (weights_beside(model) if beside is None else beside).values()}
    names: dict[int, str] = {}
    of_layers: dict[int, str] = {}
    modules: Iterator[tuple[str, Any]] = named_submodules(adapted_base(model))
    for name, module in modules:
        names.update({id(p): f"{name}.{key}".lstrip(".") for key, p in module._parameters.items()})
        if isinstance(module, ProjectedLoraLinear):
            held.update((id(module.lora_A), id(module.lora_B)))
        elif hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
            held.update(id(part[adapter].weight) for adapter in active for part in (module.lora_A, module.lora_B))
            of_layers.update({id(p): name for p in module.get_base_layer().parameters()})
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held}
    lost = {key: names.get(key, name) for key, name in trained.items()}
    for key in lost.keys() & of_layers.keys():
        raise ValueError(
            f"layer {of_layers[key]}: its base {lost[key].rsplit('.', 1)[-1]} is trainable, and with it what the plan "
            "protects would move; freeze it with requires_grad_(False)"
        )
    if lost:
        raise ValueError(
            f"trainable beside the adapter: {_shown(list(lost.values()))}. The adapter's file would not hold them, and "
            "what they learn would be lost. Freeze them with requires_grad_(False), or have them trained and saved as "
            "PEFT does, by attach_guard(..., modules_to_save=[...]); what is outside of the PeftModel, save apart and "
            "give that alone"
        )
    _check_running_statistics(model, held)


def _check_running_statistics(model: nn.Module, held: set[int]) -> None:
    running = [
        name
        for name, module in model.named_modules()
        if module.training
        and getattr(module, "track_running_stats", False)
        and ".original_module" not in name  # PEFT runs the copy
        and held.isdisjoint(id(buffer) for buffer in module.buffers())
    ]
    if running:
        raise ValueError(
            f"running statistics change in training: {_shown(running)}. The adapter's file would not hold them; put "
            "these modules into eval() mode, or have them saved by attach_guard(..., modules_to_save=[...])"
        )


@torch.no_grad()
def load_beside(folder: str, model: nn.Module, theirs: dict[str, torch.Tensor]) -> None:
    """Copies what a folder, or another model, holds beside its factors; ValueError, before anything is copied, unless
    it is what the model has there, name by name."""
    ours = weights_beside(model)
    for key in sorted({*ours, *theirs}):
        name = key.removeprefix("base_model.model.")
        if key not in theirs:
            raise ValueError(f"{folder} was saved without {name}, which this model trains or has resized")
        if key not in ours:
            raise ValueError(
                f"{folder} holds {name}, which this model's plan has not. Give attach_guard the same "
                "modules_to_save, or resize the embeddings first, as it was done before saving"
            )
        if ours[key].shape != theirs[key].shape or not torch.isfinite(theirs[key]).all():
            raise ValueError(
                f"{folder}: {name} has shape {tuple(theirs[key].shape)} or non-finite values, expected "
                f"{tuple(ours[key].shape)}"
            )
    for key, t in ours.items():
        t.copy_(theirs[key])


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
