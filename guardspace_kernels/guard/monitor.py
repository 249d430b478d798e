"""Drift while a model is being trained: of a certificate what can be told between two steps."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from guardspace_kernels.arguments import boolean, instance, number
from guardspace_kernels.guard.adapted import AdaptedLayer
from guardspace_kernels.guard.certificate import (
    blank_layers,
    check_statistics,
    covariances,
    judged_layers,
    squared_change,
    squared_output,
)
from guardspace_kernels.guard.drift import DriftExceededError, in_words, root_ratio
from guardspace_kernels.guard.fingerprint import ROUNDED
from guardspace_kernels.guard.layers import peft_model
from guardspace_kernels.guard.statistics import CalibrationStatistics


class DriftMeter:
    """The relative drift ``‖ΔW X‖_F / ‖W X‖_F`` of every adapted layer, guarded or plain LoRA, at any moment.

    Exact, as :func:`guardspace_kernels.certify` gives it: ``‖ΔW X‖_F² = Σ (FᵀF) ∘ (G C Gᵀ)`` with ``ΔW = F G``, in
    float64. ``‖W X‖_F``, which training does not change, is computed at the first call and kept. A later call costs
    ``r' d²`` products per layer, r' = r or 2r, and one reading of the statistics, from their file if they were loaded
    from one. In memory are the factors of all layers and one covariance at a time, ``6 d²`` bytes in float32. Modes,
    gradients and the state of random generators stay as they are. First tokens, and what is trained beside the
    adapter, are left to ``certify``.

    Args:
        stats: of the base model, on safety-triggering prompts.
        max_drift: raise where a layer drifts by more.
        per_layer: give the drift of every layer too.
    """

    def __init__(
        self, stats: CalibrationStatistics, *, max_drift: float | None = None, per_layer: bool = False
    ) -> None:
        instance("stats", stats, CalibrationStatistics, "a CalibrationStatistics")
        if max_drift is not None:
            max_drift = number("max_drift", max_drift, "a number of 0 or more", lambda x: x >= 0)
        self.stats, self.max_drift, self.per_layer = stats, max_drift, boolean("per_layer", per_layer)
        self._model: Any = lambda: None
        self._outputs: dict[str, float] = {}

    @torch.no_grad()
    def layer_drifts(self, model: nn.Module) -> dict[str, float]:
        """Layer -> its drift now.

        Raises:
            TypeError: a layer's parameters are divided among processes. ValueError: no adapted layer, or one whose
                adapter is not finite, merged, switched off or of another kind; no statistics for one, or statistics of
                other weights.
        """
        instance("model", model, nn.Module, "a torch.nn.Module")
        layers, model = judged_layers(model), peft_model(model)
        if self._model() is not model or self._outputs.keys() != layers.keys():
            self._check(model, layers)
        found = {}
        for names, _, C in covariances(layers, self.stats):
            for name in names:
                if name not in self._outputs:
                    self._outputs[name] = squared_output(layers[name].weight, C)
                found[name] = root_ratio(squared_change(layers[name].F, layers[name].G, C), self._outputs[name])
        return {name: found[name] for name in layers}

    def _check(self, model: nn.Module, layers: dict[str, AdaptedLayer]) -> None:
        changes = check_statistics(model, layers, self.stats)
        blank_layers(layers, self.stats)
        changed = {name: what for name, what in changes.items() if not what.startswith(ROUNDED)}
        if changed:
            warnings.warn(
                f"{in_words(changed)} beside the adapter: the drift does not tell what that does", stacklevel=4
            )
        self._model, self._outputs = weakref.ref(model), {}

    def values(self, drifts: dict[str, float]) -> dict[str, Any]:
        """What is logged of them."""
        worst = _worst(drifts)
        values: dict[str, Any] = {
            "guard/drift_mean": sum(drifts.values()) / len(drifts),
            "guard/drift_worst": drifts[worst],
            "guard/drift_worst_layer": worst,
        }
        return values | ({f"guard/drift/{name}": drift for name, drift in drifts.items()} if self.per_layer else {})

    def failure(self, drifts: dict[str, float]) -> str:
        """Which layer drifts by more than ``max_drift``; empty if none does."""
        worst = _worst(drifts)
        if self.max_drift is None or drifts[worst] <= self.max_drift:
            return ""
        return f"layer {worst} drifts by {drifts[worst]:.2e} on harmful prompts, above max_drift = {self.max_drift:.2e}"

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """``guard/drift_mean``, ``guard/drift_worst``, the name ``guard/drift_worst_layer``, and ``guard/drift/NAME``
        of each layer where ``per_layer`` asks for it.

        Raises:
            DriftExceededError: a layer drifts by more than ``max_drift``. Others: see :meth:`layer_drifts`.
        """
        drifts = self.layer_drifts(model)
        if failure := self.failure(drifts):
            raise DriftExceededError(failure, None, drifts)
        return self.values(drifts)


def _worst(drifts: dict[str, float]) -> str:
    """The layer with the largest; one whose drift is NaN before any other."""
    return max(drifts, key=lambda name: (math.isnan(drifts[name]), drifts[name]))
