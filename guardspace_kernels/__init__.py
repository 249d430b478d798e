"""GuardSpace as a library: fine-tune an aligned language model without losing its refusals.

Five verbs: :func:`collect_statistics`, :func:`plan_guard`, :func:`attach_guard`, :func:`certify`,
:func:`export_lora`; :func:`read_prompts` and :func:`prompt_batches` make batches of a file of prompts, and
:func:`evaluate_refusals` tells what a model refuses. The ops below them are in :mod:`guardspace_kernels.ops`, drop-in
modules in :mod:`guardspace_kernels.nn`. Importing the package needs torch alone; everything else is imported where it
is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from guardspace_kernels import dispatch, ops
from guardspace_kernels.dispatch import use_backend

if TYPE_CHECKING:
    from guardspace_kernels import nn
    from guardspace_kernels.evaluate.callback import EvaluationCallback
    from guardspace_kernels.evaluate.refusals import RefusalEvaluator, evaluate_refusals
    from guardspace_kernels.evaluate.report import EvaluationReport
    from guardspace_kernels.guard.certificate import certify
    from guardspace_kernels.guard.collection import collect_statistics
    from guardspace_kernels.guard.drift import DriftExceededError, DriftReport
    from guardspace_kernels.guard.export import ExportReport, export_lora
    from guardspace_kernels.guard.judges import judge_opening
    from guardspace_kernels.guard.plan import GuardConfig, GuardPlan
    from guardspace_kernels.guard.planning import plan_guard
    from guardspace_kernels.guard.prompt_files import read_prompts
    from guardspace_kernels.guard.statistics import CalibrationStatistics
    from guardspace_kernels.integrations.chat import prompt_batches
    from guardspace_kernels.integrations.monitor import DriftMonitor
    from guardspace_kernels.integrations.optim import GuardedAdamW, guard_optimizer
    from guardspace_kernels.integrations.peft import attach_guard
    from guardspace_kernels.integrations.transformers import GuardCallback

__version__ = "0.1.0"

_LAZY = {
    "EvaluationCallback": "evaluate.callback",
    "EvaluationReport": "evaluate.report",
    "RefusalEvaluator": "evaluate.refusals",
    "evaluate_refusals": "evaluate.refusals",
    "judge_opening": "guard.judges",
    "CalibrationStatistics": "guard.statistics",
    "read_prompts": "guard.prompt_files",
    "prompt_batches": "integrations.chat",
    "collect_statistics": "guard.collection",
    "GuardConfig": "guard.plan",
    "GuardPlan": "guard.plan",
    "plan_guard": "guard.planning",
    "attach_guard": "integrations.peft",
    "DriftExceededError": "guard.drift",
    "DriftReport": "guard.drift",
    "certify": "guard.certificate",
    "ExportReport": "guard.export",
    "export_lora": "guard.export",
    "GuardedAdamW": "integrations.optim",
    "guard_optimizer": "integrations.optim",
    "GuardCallback": "integrations.transformers",
    "DriftMonitor": "integrations.monitor",
}

__all__ = ["dispatch", "nn", "ops", "use_backend", *_LAZY]


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("guardspace_kernels.nn")
    if name in _LAZY:
        value = getattr(importlib.import_module(f"guardspace_kernels.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
