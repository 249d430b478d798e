"""The model that every method starts from: taught to refuse, with its statistics, plans and own refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import guardspace_kernels as gk
from guardspace_kernels.demo import data as demo_data
from guardspace_kernels.demo.data import load_advbench, rephrased
from guardspace_kernels.demo.model import AlignmentRecipe, aligned_model, converted_model, load_model, load_tokenizer
from guardspace_kernels.demo.training import Example, encode_prompt
from guardspace_kernels.evaluate.generation import generate, left_padded

from .prompts import ALIGNMENT, CALIBRATION

RANK, ALPHA = 16, 32
ANSWER_TOKENS = 12
DTYPE = torch.float32  # machines with and without bfloat16 instructions must give the same cells


class Setting:
    """One aligned model; what it costs to make is made once.

    Attributes:
        alignment_seed: of its alignment. folder, base_folder: checkpoints of the aligned model and of the one before.
    """

    def __init__(self, alignment_seed: int = 0) -> None:
        self.alignment_seed = alignment_seed
        self._lowest: tuple[list[str], int, Tensor] | None = None
        recipe = AlignmentRecipe(harmful=ALIGNMENT, seed=alignment_seed)
        data = demo_data.load_data(
            align_harmful=recipe.harmful, align_harmless=recipe.harmless, calibration=CALIBRATION,
            poison=1, chat=1, heldout=1, lookalikes=1, train=1, test=1,
        )  # fmt: skip
        self.base_folder: Path = converted_model()
        self.folder: Path = aligned_model(data, recipe, DTYPE)
        self.tokenizer = load_tokenizer(self.folder)
        self.pad: int = self.tokenizer.eos_token_id

    def load(self) -> nn.Module:
        """A fresh copy of the aligned model, frozen."""
        return load_model(self.folder, DTYPE, torch.device("cpu"))

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Of the linear layers of the aligned model, by layer."""
        return linear_weights(self.load())

    @cached_property
    def base_weights(self) -> dict[str, Tensor]:
        """Of the same layers before the alignment."""
        return linear_weights(load_model(self.base_folder, DTYPE, torch.device("cpu")))

    @cached_property
    def identity(self) -> str:
        """A hash of the aligned weights: the starting point of a cell."""
        digest = hashlib.sha256()
        for name, weight in self.weights.items():
            digest.update(name.encode() + weight.numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def calibration(self) -> list[list[int]]:
        """Token ids of the calibration requests: safety data that all methods are given alike."""
        requests = rephrased(load_advbench()[ALIGNMENT : ALIGNMENT + CALIBRATION])
        return [encode_prompt(self.tokenizer, request) for request in requests]

    @cached_property
    def refusals(self) -> list[Example]:
        """The calibration requests with the first tokens of the aligned model's own answers."""
        answers = generate(self.load(), self.calibration, new_tokens=ANSWER_TOKENS, end=self.pad)
        return list(zip(self.calibration, answers, strict=True))

    def batches(self, prompts: Sequence[Sequence[int]], size: int = 40) -> list[dict[str, Tensor]]:
        """Left-padded batches of similar lengths for the library's verbs."""
        ordered = sorted(prompts, key=len)
        batches = [left_padded(ordered[i : i + size], self.pad) for i in range(0, len(ordered), size)]
        return [{key: t for key, t in batch.items() if key != "position_ids"} for batch in batches]

    @cached_property
    def statistics(self) -> gk.CalibrationStatistics:
        batches = self.batches(self.calibration)
        return gk.collect_statistics(self.load(), batches, answer_tokens=ANSWER_TOKENS, progress=False)

    @lru_cache(maxsize=2)  # noqa: B019  # one setting lives as long as its process
    def plan(self, **options: Any) -> gk.GuardPlan:
        """Of :attr:`statistics`; options of :class:`guardspace_kernels.GuardConfig`."""
        return gk.plan_guard(self.load(), self.statistics, gk.GuardConfig(rank=RANK, alpha=ALPHA, **options))

    @cached_property
    def output_energies(self) -> dict[str, float]:
        """``‖W X‖_F²`` of every layer on the calibration tokens."""
        return {name: energy(weight, self.covariance(name)) for name, weight in self.weights.items()}

    def covariance(self, layer: str) -> Tensor:
        return self.statistics.for_layer(layer).covariance

    def lowest_directions(self, layer: str, count: int) -> Tensor:
        """(d_in, count) eigenvectors of the smallest eigenvalues of C over all tokens, the first ones of prompts, which
        statistics keep apart, included. Layers that read one input get them from the first."""
        entry = self.statistics.for_layer(layer)
        if self._lowest is None or self._lowest[:2] != (entry.layers, count):
            sinks = entry.sinks.double()
            C = entry.covariance.double() + entry.sink_tokens / max(1, len(sinks)) * sinks.T @ sinks
            vectors = torch.linalg.eigh(C).eigenvectors[:, :count].float()
            self._lowest = (entry.layers, count, vectors)
        return self._lowest[2]

    def drift(self, model: nn.Module) -> dict[str, tuple[float, float]]:
        """layer -> (relative drift ``‖ΔW X‖_F / ‖W X‖_F``, ``‖ΔW‖_F``) of a model without adapters, exactly."""
        found = {}
        for name, weight in linear_weights(model).items():
            change = weight - self.weights[name]
            moved = energy(change, self.covariance(name))
            found[name] = ((moved / self.output_energies[name]) ** 0.5, float(change.norm()))
        return found


def energy(weight: Tensor, covariance: Tensor) -> float:
    """``‖W X‖_F² = Σ (W C) ∘ W``."""
    return max(float(((weight @ covariance) * weight).sum(dtype=torch.float64)), 0.0)


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> weight of every linear layer but the LM head."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }
