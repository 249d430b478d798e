"""What held-out prompts show of an adapter: drift measured at every layer, and the model's own answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from guardspace_kernels.guard.adapted import AdaptedLayer, triangle
from guardspace_kernels.guard.batches import (
    TOKEN_KINDS,
    Batch,
    check_ids,
    check_length,
    checked_mask,
    evaluating,
    to_device,
    with_answers,
)
from guardspace_kernels.guard.collecting.trial import Trial
from guardspace_kernels.guard.drift import DriftReport, HeldOut, LayerDrift, root_ratio
from guardspace_kernels.guard.exclusive import version_of
from guardspace_kernels.guard.lockstep import Lockstep
from guardspace_kernels.guard.routing import Routing
from guardspace_kernels.guard.sampling import ANSWER, checked_kinds
from guardspace_kernels.guard.tokens import tokens_of
from guardspace_kernels.nn import NullSpaceProjector
from guardspace_kernels.ops._library import full_float32_products


def measure_heldout(
    model: nn.Module,
    layers: dict[str, AdaptedLayer],
    rows: dict[str, LayerDrift],
    batches: Iterable[Batch],
    answer_tokens: int,
    report: DriftReport,
) -> None:
    """Runs the base model and the adapted one over the prompts and the base model's own answers; fills ``rows`` and
    ``report``."""
    disable_adapter = getattr(model, "disable_adapter", None)
    if not callable(disable_adapter):
        raise TypeError("heldout needs a peft.PeftModel (attach_guard returns one): the base model is run as well")
    if answer_tokens < 1:
        raise ValueError(f"answer_tokens must be 1 or more, got {answer_tokens}")
    routing = Routing(model)
    read = _Input(routing)
    meters = {name: _Meter(name, layer, read) for name, layer in layers.items()}
    modules = {name: layer.module for name, layer in layers.items()}
    trial = Trial(model, modules, routing, Lockstep(model), outputs=False)
    prompts, positions, kl, change = 0, 0, 0.0, 0.0
    with evaluating(model):
        for index, raw in enumerate(batches):
            checked_mask(raw, index)
            check_ids(model, raw, index)
            with disable_adapter():
                batch, answer = _answered(model, to_device(model, raw), index, answer_tokens)
                trial.look(batch, index)
                # Fewer than asked for where every answer of the batch ended early.
                answered = answer.shape[1] - int(answer.any(dim=0).nonzero()[0])
                # Before the hooks of others, which may change the output.
                handles = [modules[name].register_forward_hook(m, prepend=True) for name, m in meters.items()]
                try:
                    with routing.watching(tokens_of(batch, index)):
                        base = _last_logprobs(trial, batch, index, answered)
                finally:
                    read.x = None
                    for handle in handles:
                        handle.remove()
            ours = _last_logprobs(trial, batch, index, answered)
            answers, counted = batch["input_ids"][:, -answered:], answer[:, -answered:]
            # A token that the base model excludes adds nothing, though its logarithm is infinite.
            terms = torch.where(base.isneginf(), 0.0, base.exp() * (base - ours))
            kl += float((terms.sum(dim=-1) * counted).sum())
            picked = (ours - base).gather(2, answers[..., None]).squeeze(2)
            change += float((picked * counted).sum())
            positions += int(counted.sum())
            prompts += answers.shape[0]
    if prompts == 0:
        raise ValueError("heldout is empty: at least one prompt is needed")
    for name, meter in meters.items():
        if meter.tokens:
            moved, output, outside, inputs = meter.sums.tolist()
            rows[name].heldout_drift = root_ratio(moved, output)
            rows[name].heldout_outside = root_ratio(outside, inputs)
    report.heldout = HeldOut(prompts, positions, kl / positions, change / prompts)


def _answered(
    model: nn.Module, batch: Batch, index: int, answer_tokens: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The batch with answers, its own where its ``token_kinds`` mark some, and a mask (prompts, tokens) of them."""
    mask = checked_mask(batch, index)
    kinds = batch.get(TOKEN_KINDS)
    own = None if kinds is None else mask & (checked_kinds(kinds, index, mask).to(mask.device) == ANSWER)
    if own is None or not own.any():
        check_length(model, batch, index, answer_tokens)
        whole = with_answers(model, batch, answer_tokens)
        answer = whole["attention_mask"].bool()
        answer[:, : mask.shape[1]] = False
        return whole, answer
    check_length(model, batch, index)
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))  # whether a token stands before
    wrong = (~own.any(dim=1) | (own & ~before).any(dim=1)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"batch {index}: {TOKEN_KINDS} mark answers (2), but those of prompt {wrong[0]} are none, or begin with "
            "its first token; mark an answer behind every prompt of the batch, or none for the model to make them"
        )
    return dict(batch), own


def _last_logprobs(trial: Trial, batch: Batch, index: int, answer_tokens: int) -> torch.Tensor:
    """Log-probabilities at the positions that predict the answer: (prompts, answer_tokens, vocabulary)."""
    logits = trial.forward(batch, index, logits=answer_tokens + 1).logits
    return logits[:, -answer_tokens - 1 : -1].float().log_softmax(dim=-1)


class _Input:
    """What layers that read one tensor, one after the other, share: its rows that count, and ‖x‖², ‖P x‖²."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.x: torch.Tensor | None = None
        self.version = 0

    def see(self, name: str, x: torch.Tensor) -> None:
        if x is self.x and version_of(x) == self.version:
            return
        self.x, self.version = x, version_of(x)
        real, first = self.routing.tokens(name, x)
        self.counted = real & ~first
        self.rows = x[self.counted].float()
        self.energy: dict[NullSpaceProjector | None, torch.Tensor] = {None: _energy(self.rows)}

    def outside(self, projector: NullSpaceProjector | None) -> torch.Tensor:
        if projector not in self.energy and projector is not None:
            self.energy[projector] = _energy(projector.project_(self.rows.clone()))
        return self.energy[projector]


class _Meter:
    """A hook that sums squares over held-out tokens at a layer's base input x: ‖ΔW x‖², ‖W x‖², ‖P x‖², ‖x‖²."""

    def __init__(self, name: str, layer: AdaptedLayer, read: _Input) -> None:
        self.name, self.layer, self.read = name, layer, read
        self.tokens = 0
        self.sums = torch.zeros(4, dtype=torch.float64)
        # Not through FᵀF, whose cancellation in float32 would put a floor of 3e-4 under the drift.
        self.triangle, self.G = triangle(layer.F.double()).float(), layer.G.float()
        module: Any = layer.module
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        self.biased = base.bias is not None

    @full_float32_products()
    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.read.see(self.name, args[0])
        x = self.read.rows
        self.tokens += len(x)
        moved = _energy(x @ self.G.T @ self.triangle.T)
        # The layer has just made W x; with a bias on top, which may be far larger, it is made again.
        product = x @ self.layer.weight.float().T if self.biased else output[self.read.counted]
        sums = [moved, _energy(product), self.read.outside(self.layer.projector), self.read.energy[None]]
        self.sums = self.sums.to(x.device) + torch.stack(sums)


def _energy(x: torch.Tensor) -> torch.Tensor:
    return x.float().square().sum(dtype=torch.float64)
