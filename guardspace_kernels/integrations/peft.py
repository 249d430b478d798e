"""GuardSpace as a PEFT model: ``attach_guard`` and what the model does otherwise than a plain one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from peft import (
    LoraConfig,
    LoraModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from guardspace_kernels.arguments import choice, instance
from guardspace_kernels.guard.adapted import LEAK_TOLERANCE
from guardspace_kernels.guard.adapter_folder import ADAPTER_WEIGHTS, GUARD_FILE, read_adapter, write_adapter
from guardspace_kernels.guard.attach import LayerGuard, compute_device, layer_guards, undone_on_failure
from guardspace_kernels.guard.beside import check_trained, load_beside, note_weights, weights_beside
from guardspace_kernels.guard.export import peft_key, plain_lora
from guardspace_kernels.guard.layers import is_conv1d, named_submodules, sharding, unwrapped
from guardspace_kernels.guard.peft_description import target_modules, task_type
from guardspace_kernels.guard.plan import GuardPlan
from guardspace_kernels.integrations.peft_layer import GuardedLinear, kept_adapter, second_adapter
from guardspace_kernels.integrations.peft_state import (
    CheckedState,
    agree,
    check_factors,
    check_model_state,
    from_plain_lora,
    to_plain_lora,
)
from guardspace_kernels.integrations.start import read_start
from guardspace_kernels.nn import NullSpaceProjector
from guardspace_kernels.nn.projected_lora_linear import delta_factors

RESIDUALS = ("virtual", "frozen")
_STARTED = ", started from an adapter"
_WITH_START = "from a start of its own; attach_guard(model, plan, start=FOLDER) with this folder, then load it"


class GuardedLoraModel(CheckedState, LoraModel):
    """The ``base_model`` of a guarded PeftModel."""

    def delete_adapter(self, adapter_name: str) -> None:
        raise kept_adapter()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        raise second_adapter(adapter_name)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in guarded_layers(self.model).values():
            layer.check_mergeable()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any) -> None:
        check_model_state(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def guarded_layers(base: nn.Module) -> dict[str, GuardedLinear]:
    """Name in the base model -> layer."""
    return {name: m for name, m in named_submodules(base) if isinstance(m, GuardedLinear)}


class GuardedModelMixin(CheckedState):
    """What a guarded PeftModel does otherwise than a plain one: saving, loading, unloading."""

    guard_plan: GuardPlan
    #: Whether it started from an adapter that was trained before, so that no residual is taken off.
    has_start = False
    #: What ``modules_to_save`` wrapped, as attach_guard was asked to.
    own_wrappers: Sequence[nn.Module] = ()
    _trainable_checked = False

    def check_trainable(self, kind: str = "") -> None:
        """What would lose a run at its first checkpoint, before its first step; ``kind``: what sharded a wrapper of it.

        Raises:
            TypeError: the model is sharded. ValueError: something is trainable that no file of the adapter holds.
        """
        kind = kind or sharding(self)  # type: ignore[arg-type]
        factors = (part[m.adapter] for m in self.guarded_layers().values() for part in (m.lora_A, m.lora_B))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        # Without processes it is torch.func that puts other tensors there.
        if distributed and not kind and not all(isinstance(f._parameters.get("weight"), nn.Parameter) for f in factors):
            kind = "FullyShardedDataParallel"
        if kind:
            raise TypeError(
                f"a guarded model is not trained divided by {kind}: its adapter could not be saved, exported or "
                "certified. Train it whole in each process, with DistributedDataParallel or DeepSpeed ZeRO-1 or 2"
            )
        check_trained(self)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Any:
        if mode and not self.get_base_model().training:  # type: ignore[attr-defined]
            self._trainable_checked = False
        return super().train(mode)  # type: ignore[misc]

    def guarded_layers(self) -> dict[str, GuardedLinear]:
        """Name in the base model -> layer."""
        return guarded_layers(self.get_base_model())  # type: ignore[attr-defined]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes the plain rank-2r LoRA of :func:`guardspace_kernels.export_lora`, which any PEFT loads onto the
        untouched base model, and beside it ``guardspace.safetensors``, from which training resumes exactly. Both hold
        ``modules_to_save`` too, and the embeddings if they were resized.

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
        tensors.update(weights_beside(self))  # type: ignore[arg-type]
        weights, config, _ = plain_lora(self, save_directory)  # type: ignore[arg-type]
        write_adapter(save_directory, weights, config, (tensors, self._origin))

    @property
    def _origin(self) -> str:
        """What the factors are a change against: with another plan, or another residual, they would mean another."""
        return self.guard_plan.fingerprint + _STARTED * self.has_start

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
        if saved.plan.removesuffix(_STARTED) == self.guard_plan.fingerprint and saved.plan != self._origin:
            raise ValueError(
                f"{os.fspath(model_id)} was saved by a model that was attached "
                + ("without start; attach the guard without it" if self.has_start else _WITH_START)
            )
        if saved.plan != self._origin:
            raise ValueError(
                f"{os.fspath(model_id)} was saved under another plan; attach the plan it was trained with (plan.save)"
            )
        layers, factors = self.guarded_layers(), saved.factors
        merged = [name for name, layer in layers.items() if layer.merged]
        if merged:
            raise ValueError(f"layer {merged[0]}: its adapter is merged; unmerge before loading another")
        for name, layer in layers.items():
            self._check_saved(f"{os.fspath(model_id)}: layer {name}", name, layer, factors, saved.exported)
        if saved.altered:
            raise ValueError(
                f"{os.fspath(model_id)}: {saved.altered} is not what was saved with {GUARD_FILE}; it was altered, or "
                "another export took its place. Restore it, or save again"
            )
        theirs = {key: t for key, t in factors.items() if key.removesuffix(".A").removesuffix(".B") not in layers}
        load_beside(os.fspath(model_id), self, theirs)  # type: ignore[arg-type]
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
        where: str,
        name: str,
        layer: GuardedLinear,
        tensors: dict[str, torch.Tensor],
        exported: dict[str, torch.Tensor] | None,
    ) -> None:
        """ValueError unless the saved factors fit the layer, and the plain LoRA of them says the same."""
        wanted = {"A": f"{name}.A", "B": f"{name}.B"}
        plain = {"A": peft_key(name, "lora_A"), "B": peft_key(name, "lora_B")}
        missing = [key for key in wanted.values() if key not in tensors]
        if missing or (exported is not None and any(key not in exported for key in plain.values())):
            raise ValueError(f"{where}: the saved adapter does not cover it")
        mine = [tensors[key] for key in wanted.values()] + [exported[key] for key in plain.values() if exported]
        if not all(t.is_floating_point() for t in mine):
            raise ValueError(f"{where}: the saved adapter is in {', '.join(sorted({str(t.dtype) for t in mine}))}")
        A, B, device = tensors[wanted["A"]], tensors[wanted["B"]], layer.A.device
        if A.shape != layer.shapes[0] or not torch.isfinite(A).all():
            raise ValueError(f"{where}: the saved A has shape {tuple(A.shape)} or non-finite values")
        if exported is None:
            A_P = A.to(device, copy=True)
            A_P = A_P if layer.projector is None else layer.projector.project_(A_P)
            check_factors(layer, A_P, B, where)
            return
        A_P, scaled_B = exported[plain["A"]], exported[plain["B"]]
        check_factors(layer, A_P[: layer.shapes[0][0]] if A_P.dim() else A_P, B, where)
        F, G = delta_factors(
            A.to(device), B.to(device), layer.projector, layer.scale, layer.frozen_A, layer.frozen_B
        )  # fmt: skip
        tolerance = max(1e-4, LEAK_TOLERANCE[A_P.dtype])
        if not (agree(G, A_P, tolerance) and agree(F, scaled_B, tolerance)):
            raise ValueError(f"{where}: {GUARD_FILE} and {ADAPTER_WEIGHTS} disagree; one of them was altered")

    def add_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        raise second_adapter(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        raise kept_adapter()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "a guarded model is built from its plan: attach_guard(model, GuardPlan.load(path)).load_adapter(folder). "
            "To use a saved adapter without training on, peft.PeftModel.from_pretrained(model, folder) gives the same"
        )

    @property
    def peft_config(self) -> Any:
        return self.base_model.peft_config  # type: ignore[attr-defined]  # super() would break a compiled graph

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        # The last thing that PEFT does when it puts other adapters into this model, or on top of it.
        for parent in list(self.modules()):  # type: ignore[attr-defined]
            for name, child in parent._modules.items():
                if isinstance(child, BaseTunerLayer) and not isinstance(child, GuardedLinear):
                    parent._modules[name] = child.base_layer
                elif isinstance(child, AuxiliaryTrainingWrapper) and child not in self.own_wrappers:
                    parent._modules[name] = child.original_module
        raise second_adapter(", ".join(value))


def _before_forward(model: Any, _inputs: Any) -> None:
    if not model._trainable_checked and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if getattr(model, "_is_replica", False):
            return  # of DataParallel, which gives it tensors in the place of parameters for one forward
        model.check_trainable()
        model._trainable_checked = True


class GuardedPeftModel(GuardedModelMixin, PeftModel):
    """A guarded :class:`peft.PeftModel`."""


class GuardedPeftModelForCausalLM(GuardedModelMixin, PeftModelForCausalLM):
    """A guarded :class:`peft.PeftModelForCausalLM`."""


class GuardedPeftModelForSeq2SeqLM(GuardedModelMixin, PeftModelForSeq2SeqLM):
    """A guarded :class:`peft.PeftModelForSeq2SeqLM`."""


class GuardedPeftModelForSequenceClassification(GuardedModelMixin, PeftModelForSequenceClassification):
    """A guarded :class:`peft.PeftModelForSequenceClassification`, which trains and saves the head as that does."""


class GuardedPeftModelForTokenClassification(GuardedModelMixin, PeftModelForTokenClassification):
    """A guarded :class:`peft.PeftModelForTokenClassification`, which trains and saves the head as that does."""


class GuardedPeftModelForQuestionAnswering(GuardedModelMixin, PeftModelForQuestionAnswering):
    """A guarded :class:`peft.PeftModelForQuestionAnswering`, which trains and saves the head as that does."""


class GuardedPeftModelForFeatureExtraction(GuardedModelMixin, PeftModelForFeatureExtraction):
    """A guarded :class:`peft.PeftModelForFeatureExtraction`."""


GuardedModel = (
    GuardedPeftModel
    | GuardedPeftModelForCausalLM
    | GuardedPeftModelForSeq2SeqLM
    | GuardedPeftModelForSequenceClassification
    | GuardedPeftModelForTokenClassification
    | GuardedPeftModelForQuestionAnswering
    | GuardedPeftModelForFeatureExtraction
)
_OF_TASK: dict[str | None, Any] = {
    None: GuardedPeftModel,
    "CAUSAL_LM": GuardedPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": GuardedPeftModelForSeq2SeqLM,
    "SEQ_CLS": GuardedPeftModelForSequenceClassification,
    "TOKEN_CLS": GuardedPeftModelForTokenClassification,
    "QUESTION_ANS": GuardedPeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": GuardedPeftModelForFeatureExtraction,
}


# What PEFT's class for a task trains and saves whole.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def _check_modules_to_save(names: Sequence[str], guarded: Collection[str]) -> None:
    for layer in guarded:
        parts = layer.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        for name in names:
            if any(module.endswith(name) for module in above):  # as PEFT finds modules_to_save
                raise ValueError(
                    f"layer {layer} is guarded, and modules_to_save includes it by {name!r} (a classification model's "
                    "head is included without being named): what is trained whole is not confined. Leave it out of one"
                )


def attach_guard(
    model: nn.Module,
    plan: GuardPlan,
    *,
    residual: str = "virtual",
    adapter_name: str = "default",
    modules_to_save: Sequence[str] | None = None,
    start: str | os.PathLike[str] | PeftModel | None = None,
) -> GuardedModel:
    """Gives the model an adapter that cannot change what the plan protects; any trainer trains it, no hook needed.

    ``y = x W_resᵀ + s·x (A P)ᵀ Bᵀ + b`` with ``W_res = W − s·B₀A₀P``, A = A₀P and B = B₀: at the start the output is
    the base model's. Exact under any optimiser, because ``A P`` is formed in every forward. Biases stay frozen.

    Args:
        model: the base model of the plan, or a copy of it; its linear layers are wrapped in place, as PEFT does. Out of
            ``torch.compile`` or DistributedDataParallel it is taken: wrap what is returned.
        plan: of :func:`plan_guard`.
        residual: "virtual" never touches W (``y = W x + [sB | −sB₀]([A P; A₀P] x)``) and calls a base layer that has
            hooks or a forward of its own; "frozen" writes W_res into W, rounded to its dtype, and saves the extra rank.
            It keeps a copy of W in host memory, which ``unload`` puts back.
        adapter_name: PEFT's name of the adapter.
        modules_to_save: names of modules that are trained whole and saved beside the adapter, as in PEFT: a head,
            norms. The plan protects nothing of what they do. A classification model's head is one without being named.
        start: a LoRA that was trained without a guard, of the plan's rank and layers: the folder of its
            ``save_pretrained``, or a PeftModel on another copy of the base model. The model then starts from what of
            it lies in the null space, ``ΔW = s' B A P`` with its own scaling s', and with no residual. Expect the task
            to be lost in part or wholly, until some guarded steps have brought it back. What it trained whole beside
            its factors is taken over, if ``modules_to_save`` names it.

    Returns:
        A ``peft.PeftModel``, of PEFT's class for the model's task (``PeftModelForCausalLM`` for a model that generates
        from ``input_ids``), with ``lora_A`` and ``lora_B`` in float32, unless the model is in float64. Its first
        forward with gradients raises where something is trainable that saving would lose, or where the model was
        sharded. ``state_dict`` gives copies: an average of weights must be kept over ``parameters()``.

    Raises:
        TypeError: the model has adapters already, or is sharded. ValueError: the plan is of another model, ``residual``
            is unknown, or "frozen" for a weight that is shared, offloaded or read by hooks, or ``modules_to_save``
            includes a guarded layer; ``start`` is no plain LoRA, or has other layers or another rank than the plan.
            Whatever it raises, the model is as it was.

    Source: GuardSpace (arXiv 2510.14301).
    """
    instance("model", model, nn.Module, "a torch.nn.Module")
    instance("plan", plan, GuardPlan, "a GuardPlan")
    choice("residual", residual, RESIDUALS)
    instance("adapter_name", adapter_name, str, "a text")
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name must be a name without a dot, got {adapter_name!r}")
    model = unwrapped(model)
    kind = sharding(model)
    if kind:
        raise TypeError(
            f"model is divided by {kind} among processes, each of which would start and train an adapter of its own; "
            "attach the guard to a whole model"
        )
    begun = None if start is None else read_start(start)
    guards = dict(layer_guards(model, plan, residual, None if begun is None else begun.factors))
    modules = {name: model.get_submodule(name) for name in guards}
    task = task_type(model)
    _check_modules_to_save((*(modules_to_save or ()), *_HEADS.get(task or "", ())), guards)
    config = LoraConfig(
        r=plan.config.rank,
        lora_alpha=plan.config.scale * plan.config.rank,
        target_modules=target_modules(model, list(guards)),
        lora_dropout=plan.config.dropout,
        init_lora_weights=False,
        fan_in_fan_out=any(is_conv1d(module) for module in modules.values()),
        task_type=task,
        modules_to_save=None if modules_to_save is None else list(modules_to_save),
    )
    config._register_custom_module({type(module): GuardedLinear for module in modules.values()})
    with undone_on_failure(model):
        note_weights(model)
        guarded: Any = _OF_TASK[task](model, config, adapter_name=adapter_name)
        guarded.base_model.__class__ = GuardedLoraModel
        guarded.guard_plan = plan
        _install(guarded.guarded_layers(), guards, adapter_name, residual)
        if begun is not None:
            guarded.has_start = True
            load_beside("start", guarded, begun.beside)
    guarded.own_wrappers = [module for module in guarded.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    guarded.register_forward_pre_hook(_before_forward)
    config.alpha_pattern = {_NO_HOTSWAP: config.lora_alpha}
    made: GuardedModel = guarded
    return made


# Names no layer. PEFT's hotswap_adapter, which would copy any adapter over A and B, asks whether the two patterns are
# equal before it begins, and prints them.
_NO_HOTSWAP = "a guarded model takes no other adapter: use its load_adapter"


def _install(layers: dict[str, GuardedLinear], guards: dict[str, LayerGuard], adapter_name: str, residual: str) -> None:
    if set(layers) != set(guards):
        raise ValueError(f"PEFT adapted other layers than planned: {sorted(set(layers) ^ set(guards))[:3]}")
    projectors: dict[Any, NullSpaceProjector] = {}
    for name, guard in guards.items():
        projector = None
        if guard.basis is not None:
            # One module for all layers that read the same tensor, so that moving the model keeps one basis.
            key = id(guard.basis), compute_device(name, layers[name].get_base_layer())
            if key not in projectors:
                projectors[key] = NullSpaceProjector(guard.basis.to(key[1]), guard.complement, persistent=False)
            projector = projectors[key]
        layers[name].install_guard(adapter_name, guard, projector, residual)
        layers[name].register_state_dict_post_hook(to_plain_lora)
        layers[name].register_load_state_dict_pre_hook(from_plain_lora)
