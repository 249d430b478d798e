"""What PEFT is told of a base model: which of its layers are meant, and which task it has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from guardspace_kernels.guard.layers import named_submodules


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


def task_type(base: nn.Module) -> str | None:
    """PEFT's task of the model, so that ``AutoPeftModelFor…`` builds its class and PEFT calls it as that class is
    called; None for one that is not called with ``input_ids``, such as Whisper, whose arguments PEFT's classes for
    tasks would drop or name twice, and for any that is not of Transformers."""
    if getattr(base, "main_input_name", None) != "input_ids":
        return None
    from transformers.models.auto import modeling_auto as auto

    seq2seq = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    generating = "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
    tasks: dict[str, Any] = {
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
    }
    classes = {cls.__name__ for cls in type(base).__mro__}
    for task, names in tasks.items():
        known = {name for entry in names.values() for name in ((entry,) if isinstance(entry, str) else entry)}
        if classes & known:
            return task
    return generating if hasattr(base, "prepare_inputs_for_generation") else None


def auto_mapping(base: nn.Module, task: str | None) -> dict[str, str] | None:
    """By which ``AutoPeftModel`` finds the class of a model without a task."""
    if task is not None or not hasattr(base, "from_pretrained"):
        return None
    return {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
