"""GuardSpace as a PEFT model: ``attach_guard`` and what the model does otherwise than a plain one."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from guardspace_kernels.arguments import choice, instance
from guardspace_kernels.guard.adapter_folder import ADAPTER_WEIGHTS, GUARD_FILE, read_adapter, write_adapter
from guardspace_kernels.guard.attach import layer_guards
from guardspace_kernels.guard.export import peft_key, plain_lora, target_modules
from guardspace_kernels.guard.layers import is_conv1d, named_submodules, unwrapped
from guardspace_kernels.guard.plan import GuardPlan
from guardspace_kernels.integrations.peft_layer import LEAK_TOLERANCE, GuardedLinear, agree, second_adapter
from guardspace_kernels.nn import NullSpaceProjector
from guardspace_kernels.nn.projected_lora_linear import delta_factors

RESIDUALS = ("virtual", "frozen")


class GuardedModelMixin:
    """What a guarded PeftModel does otherwise than a plain one: saving, loading, unloading."""

    guard_plan: GuardPlan

    def guarded_layers(self) -> dict[str, GuardedLinear]:
        """Name in the base model -> layer."""
        base = self.get_base_model()  # type: ignore[attr-defined]
        return {name: m for name, m in named_submodules(base) if isinstance(m, GuardedLinear)}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes the plain rank-2r LoRA of :func:`guardspace_kernels.export_lora`, which any PEFT loads onto the
        untouched base model, and beside it ``guardspace.safetensors``, from which training resumes exactly.

        Over an older adapter: after a kill at any point :meth:`load_adapter` finds the old one or the new one."""
        adapter = self.active_adapter  # type: ignore[attr-defined]
        if selected_adapters not in (None, [adapter]):
            raise ValueError(f"selected_adapters must be [{adapter!r}], the only adapter, got {selected_adapters}")
        if not is_main_process:
            return
        if not safe_serialization:
            # Not an error: a trainer that asks for it would lose the run at its first checkpoint.
            warnings.warn("a guarded adapter is always saved as safetensors", stacklevel=2)
        layers = self.guarded_layers()
        tensors = {f"{name}.{key}": t for name, m in layers.items() for key, t in (("A", m.A), ("B", m.B))}
        weights, config, _ = plain_lora(self, save_directory)  # type: ignore[arg-type]
        write_adapter(save_directory, weights, config, (tensors, self.guard_plan.fingerprint))

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str = "default", is_trainable: bool = False, **kwargs: Any
    ) -> _IncompatibleKeys:
        """Restores what :meth:`save_pretrained` wrote, exactly.

        Raises:
            FileNotFoundError: not a folder written by a guarded model. ValueError: saved under another plan, altered,
                or acting outside the null space; nothing is loaded then. It warns where saving was interrupted: what
                was to be saved is loaded.
        """
        adapter = self.active_adapter  # type: ignore[attr-defined]
        if adapter_name != adapter:
            raise ValueError(f"a guarded model has one adapter, {adapter!r}; load into it, not into {adapter_name!r}")
        saved = read_adapter(model_id)
        if saved.plan != self.guard_plan.fingerprint:
            raise ValueError(
                f"{os.fspath(model_id)} was saved under another plan; attach the plan it was trained with (plan.save)"
            )
        layers, factors = self.guarded_layers(), saved.factors
        for name, layer in layers.items():
            self._check_saved(name, layer, factors, saved.exported)
        if saved.altered:
            raise ValueError(
                f"{os.fspath(model_id)}: {saved.altered} is not what was saved with {GUARD_FILE}; it was altered, or "
                "another export took its place. Restore it, or save again"
            )
        if len(factors) > 2 * len(layers):
            raise ValueError(f"{os.fspath(model_id)}: {GUARD_FILE} holds layers that this model's plan has not")
        with torch.no_grad():
            for name, layer in layers.items():
                layer.A.copy_(factors[f"{name}.A"])
                layer.B.copy_(factors[f"{name}.B"])
                if layer.step_mode and layer.projector is not None:
                    layer.projector.project_(layer.A)
        if not is_trainable:
            self.eval()  # type: ignore[attr-defined]
        return _IncompatibleKeys([], [])

    @staticmethod
    def _check_saved(
        name: str, layer: GuardedLinear, tensors: dict[str, torch.Tensor], exported: dict[str, torch.Tensor] | None
    ) -> None:
        """ValueError unless the saved factors fit the layer, and the plain LoRA of them says the same."""
        wanted = {"A": f"{name}.A", "B": f"{name}.B"}
        plain = {"A": peft_key(name, "lora_A"), "B": peft_key(name, "lora_B")}
        missing = [key for key in wanted.values() if key not in tensors]
        if missing or (exported is not None and any(key not in exported for key in plain.values())):
            raise ValueError(f"layer {name}: the saved adapter does not cover it")
        A, B, device = tensors[wanted["A"]], tensors[wanted["B"]], layer.A.device
        if A.shape != layer.A.shape or not torch.isfinite(A).all():
            raise ValueError(f"layer {name}: the saved A has shape {tuple(A.shape)} or non-finite values")
        if exported is None:
            A_P = A.to(device, copy=True)
            layer.load_factors(A_P if layer.projector is None else layer.projector.project_(A_P), B, f"layer {name}")
            return
        A_P, scaled_B = exported[plain["A"]], exported[plain["B"]]
        layer.load_factors(A_P[: layer.A.shape[0]] if A_P.dim() else A_P, B, f"layer {name}")
        F, G = delta_factors(
            A.to(device), B.to(device), layer.projector, layer.scale, layer.frozen_A, layer.frozen_B
        )  # fmt: skip
        tolerance = max(1e-4, LEAK_TOLERANCE[A_P.dtype])
        if not (agree(G, A_P, tolerance) and agree(F, scaled_B, tolerance)):
            raise ValueError(f"layer {name}: {GUARD_FILE} and {ADAPTER_WEIGHTS} disagree; one of them was altered")

    def add_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        raise second_adapter(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        raise ValueError("a guarded model keeps its only adapter; model.unload() returns the base model without it")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "a guarded model is built from its plan: attach_guard(model, GuardPlan.load(path)).load_adapter(folder). "
            "To use a saved adapter without training on, peft.PeftModel.from_pretrained(model, folder) gives the same"
        )

    def unload(self) -> nn.Module:
        """The base model without the adapter, its weights restored where ``residual="frozen"`` changed them."""
        for layer in self.guarded_layers().values():
            layer.restore_base()
        return self.base_model.unload()  # type: ignore[attr-defined]


class GuardedPeftModel(GuardedModelMixin, PeftModel):
    """A guarded :class:`peft.PeftModel`."""


class GuardedPeftModelForCausalLM(GuardedModelMixin, PeftModelForCausalLM):
    """A guarded :class:`peft.PeftModelForCausalLM`."""


def attach_guard(
    model: nn.Module, plan: GuardPlan, *, residual: str = "virtual", adapter_name: str = "default"
) -> GuardedPeftModel | GuardedPeftModelForCausalLM:
    """Gives the model an adapter that cannot change what the plan protects; any trainer trains it, no hook needed.

    ``y = x W_resᵀ + s·x (A P)ᵀ Bᵀ + b`` with ``W_res = W − s·B₀A₀P``, A = A₀P and B = B₀: at the start the output is
    the base model's. Exact under any optimiser, because ``A P`` is formed in every forward. Biases stay frozen.

    Args:
        model: the base model of the plan, or a copy of it; its linear layers are wrapped in place, as PEFT does. Out of
            ``torch.compile`` or DistributedDataParallel it is taken: wrap what is returned.
        plan: of :func:`plan_guard`.
        residual: "virtual" never touches W (``y = W x + [sB | −sB₀]([A P; A₀P] x)``); "frozen" writes W_res into it
            and saves the extra rank, but rounds W to its dtype.
        adapter_name: PEFT's name of the adapter.

    Returns:
        A ``peft.PeftModel`` (``PeftModelForCausalLM`` for a model that generates) with ``lora_A`` and ``lora_B`` in
        float32, unless the model is in float64.

    Raises:
        TypeError: the model has adapters already. ValueError: the plan is of another model, or ``residual`` is unknown.

    Source: GuardSpace (arXiv 2510.14301).
    """
    instance("model", model, nn.Module, "a torch.nn.Module")
    instance("plan", plan, GuardPlan, "a GuardPlan")
    choice("residual", residual, RESIDUALS)
    instance("adapter_name", adapter_name, str, "a text")
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name must be a name without a dot, got {adapter_name!r}")
    model = unwrapped(model)
    guards = dict(layer_guards(model, plan))
    modules = {name: model.get_submodule(name) for name in guards}
    transposed = any(is_conv1d(module) for module in modules.values())
    causal = hasattr(model, "prepare_inputs_for_generation")
    config = LoraConfig(
        r=plan.config.rank,
        lora_alpha=plan.config.scale * plan.config.rank,
        target_modules=target_modules(model, list(guards)),
        lora_dropout=plan.config.dropout,
        init_lora_weights=False,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM" if causal else None,
    )
    config._register_custom_module({type(module): GuardedLinear for module in modules.values()})
    cls = GuardedPeftModelForCausalLM if causal else GuardedPeftModel
    guarded = cls(model, config, adapter_name=adapter_name)
    guarded.guard_plan = plan
    projectors: dict[int, NullSpaceProjector] = {}
    layers = guarded.guarded_layers()
    if set(layers) != set(guards):
        raise ValueError(f"PEFT adapted other layers than planned: {sorted(set(layers) ^ set(guards))[:3]}")
    for name, guard in guards.items():
        projector = None
        if guard.basis is not None:
            # One module for all layers that read the same tensor, so that moving the model keeps one basis.
            device = layers[name].get_base_layer().weight.device
            projector = projectors.setdefault(
                id(guard.basis), NullSpaceProjector(guard.basis.to(device), guard.complement, persistent=False)
            )
        layers[name].install_guard(adapter_name, guard, projector, residual)
    return guarded
