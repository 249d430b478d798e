"""State dicts of guarded models: those of plain LoRA models, checked as a whole before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from guardspace_kernels.guard.adapted import LEAK_TOLERANCE
from guardspace_kernels.integrations.peft_layer import GuardedLinear

_EXTRA_STATE = nn.modules.module._EXTRA_STATE_KEY_SUFFIX


def agree(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    """Whether the two are equal up to a relative ``tolerance``; False for other shapes and for non-finite values."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = (t.detach().to(ours.device, torch.float64) for t in (ours, theirs))
    size = ours.abs().max().clamp_min(torch.finfo(torch.float64).tiny)  # no square overflows
    return bool(torch.isfinite(theirs).all() and ((ours - theirs) / size).norm() <= tolerance * (ours / size).norm())


def check_factors(layer: GuardedLinear, A_P: torch.Tensor, B: torch.Tensor, where: str) -> None:
    """ValueError unless the adapter (r, d_in), (d_out, r) that is to be loaded fits and lies in the null space."""
    if A_P.shape != layer.shapes[0] or B.shape != layer.shapes[1]:
        raise ValueError(
            f"{where}: the adapter has shapes {tuple(A_P.shape)} and {tuple(B.shape)}, expected "
            f"{tuple(layer.shapes[0])} and {tuple(layer.shapes[1])}"
        )
    if A_P.dtype not in LEAK_TOLERANCE or not B.is_floating_point():
        raise ValueError(f"{where}: the adapter is of {A_P.dtype} and {B.dtype}, not of floating-point numbers")
    if not (torch.isfinite(A_P).all() and torch.isfinite(B).all()):
        raise ValueError(f"{where}: the adapter holds non-finite values")
    leak = layer.leak(A_P)
    if not leak <= LEAK_TOLERANCE[A_P.dtype]:
        raise ValueError(
            f"{where}: the adapter acts outside the null space (‖A Q‖/‖A‖ = {leak:.1e}); it was not trained under "
            "this plan, or the file was altered"
        )


def to_plain_lora(layer: GuardedLinear, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Hook after a guarded layer's state dict was taken."""
    key_A, key_B = _keys(layer, prefix)
    key_weight = f"{prefix}base_layer.weight"
    if layer.weight_is_residual and not layer.merged and key_weight in state:
        state[key_weight] = layer.base_weight_as_stored()
    if key_A not in state or key_B not in state:
        return
    # The projector is the plan's; plain PEFT has none.
    state.pop(f"{prefix}projector.{_EXTRA_STATE}", None)
    _, G = layer.delta_factors()
    state[key_A] = G.to(layer.A.dtype)
    if layer.frozen_B is not None:
        state[key_B] = torch.cat([layer.B.detach(), -layer.frozen_B.to(layer.B.dtype)], dim=1)


def from_plain_lora(layer: GuardedLinear, state: dict[str, Any], prefix: str, metadata: Any, *_: Any) -> None:
    """Hook before a guarded layer's state dict is loaded."""
    check_layer_state(layer, state, prefix, metadata)
    key_A, key_B = _keys(layer, prefix)
    key_weight = f"{prefix}base_layer.weight"
    if layer.projector is not None:
        state[f"{prefix}projector.{_EXTRA_STATE}"] = layer.projector.get_extra_state()
    if layer.weight_is_residual and key_weight in state:
        state[key_weight] = layer.get_base_layer().weight.detach()
    if key_A in state:
        rank = layer.shapes[0][0]
        state[key_A], state[key_B] = state[key_A][:rank], state[key_B][:, :rank]


def check_layer_state(layer: GuardedLinear, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """ValueError unless what ``state`` holds for the layer is the state of this layer, trained under this plan."""
    where = prefix.removeprefix("base_model.model.").rstrip(".")
    if layer.merged and any(key.startswith(prefix) for key in state):
        raise ValueError(f"{where}: its adapter is merged; unmerge before loading a state")
    key_A, key_B = _keys(layer, prefix)
    _check_base(layer, state, f"{prefix}base_layer.", metadata, where)
    A, B = state.get(key_A), state.get(key_B)
    if A is None and B is None:
        return
    if A is None or B is None:
        raise ValueError(f"{where}: the state holds one of lora_A and lora_B without the other")
    rank = layer.shapes[0][0]
    rows = rank if layer.frozen_A is None else 2 * rank
    if not (isinstance(A, torch.Tensor) and isinstance(B, torch.Tensor)):
        raise ValueError(f"{where}: lora_A and lora_B must be tensors, got {type(A).__name__} and {type(B).__name__}")
    if A.dim() != 2 or A.shape[0] != rows or B.dim() != 2 or B.shape[1] != rows:
        raise ValueError(
            f"{where}: a guarded layer's state has {rows} adapter rows, [A P; A0 P], got shapes {tuple(A.shape)} and "
            f"{tuple(B.shape)}; it is not the state of this guarded model"
        )
    if layer.frozen_A is not None and layer.frozen_B is not None:
        for ours, theirs in ((layer.frozen_A, A[rank:]), (layer.frozen_B, -B[:, rank:])):
            if not agree(ours, theirs, 1e-2):
                raise ValueError(f"{where}: the state starts from another plan (its frozen rows differ)")
    check_factors(layer, A[:rank], B[:, :rank], where)


def _check_base(layer: GuardedLinear, state: dict[str, Any], prefix: str, metadata: Any, where: str) -> None:
    assign = bool(metadata.get("assign_to_params_buffers", False))
    for name, ours in layer.get_base_layer().named_parameters(recurse=False):
        theirs = state.get(f"{prefix}{name}")
        if theirs is None or ours.is_meta:
            continue
        ours = layer.base_weight_as_stored() if name == "weight" else ours.detach()
        if not isinstance(theirs, torch.Tensor) or not _equal(ours, theirs.detach(), exactly=assign):
            raise ValueError(
                f"{where}: the state's {name} is not that of the base model the plan was made for; load an adapter "
                "alone, or attach the guard to the other model"
            )


def _equal(ours: torch.Tensor, theirs: torch.Tensor, *, exactly: bool) -> bool:
    """Whether the values are equal, after a cast of theirs unless ``exactly``."""
    theirs = theirs.to(ours.device, theirs.dtype if exactly else ours.dtype)
    dtype = torch.promote_types(ours.dtype, theirs.dtype)
    return torch.equal(ours.to(dtype), theirs.to(dtype))


def check_model_state(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Raises what would refuse ``state`` before any parameter is changed.

    Raises:
        ValueError: it is not the state of one of the guarded layers. RuntimeError: a shape does not fit, which
            ``load_state_dict`` would say after it has loaded the other entries.
    """
    for name, module in model.named_modules():
        if isinstance(module, GuardedLinear):
            check_layer_state(module, state, f"{prefix}{name}.", metadata)
    expected = _expected(model, prefix)
    given = {key: getattr(value, "shape", None) for key, value in state.items() if key in expected}
    _refuse({"size mismatch": [key for key, shape in given.items() if shape != expected[key]]})


class CheckedState:
    """Of a module that holds guarded layers."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module, but a state that is refused changes nothing.

        Raises:
            RuntimeError: missing or unknown keys if ``strict``, or shapes that do not fit. ValueError: it is not the
                state of this guarded model.
        """
        expected = _expected(self, "") if strict else {}  # type: ignore[arg-type]
        if expected:
            unknown = [key for key in state_dict if key not in expected and not key.endswith(_EXTRA_STATE)]
            _refuse({"missing": [key for key in expected if key not in state_dict], "unknown": unknown})
        return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]


def _expected(model: nn.Module, prefix: str) -> dict[str, torch.Size]:
    """Key -> shape of the model's state; empty where hooks of other modules decide what fits."""
    expected: dict[str, torch.Size] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        place = f"{prefix}{name}." if name else prefix
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                expected[place + key] = tensor.shape
        if module._load_state_dict_pre_hooks and not isinstance(module, GuardedLinear):
            return {}
    for name, module in model.named_modules():
        if isinstance(module, GuardedLinear) and module.frozen_A is not None:
            key_A, key_B = _keys(module, f"{prefix}{name}.")
            (rank, d_in), (d_out, _) = module.shapes
            expected[key_A], expected[key_B] = torch.Size((2 * rank, d_in)), torch.Size((d_out, 2 * rank))
    return expected


def _refuse(wrong: dict[str, list[str]]) -> None:
    if any(wrong.values()):
        found = "; ".join(f"{what}: {', '.join(keys[:3])} ({len(keys)})" for what, keys in wrong.items() if keys)
        raise RuntimeError(f"the state dict does not fit this guarded model, and nothing of it was loaded. {found}")


def _keys(layer: GuardedLinear, prefix: str) -> tuple[str, str]:
    """Of lora_A and lora_B."""
    return f"{prefix}lora_A.{layer.adapter}.weight", f"{prefix}lora_B.{layer.adapter}.weight"
