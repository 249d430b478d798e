"""A small fine-tuning loop, the same for plain LoRA and for a guarded model."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from guardspace_kernels.evaluate.generation import left_padded

Example = tuple[list[int], list[int]]  # token ids of the prompt, token ids of the answer (with its end token)
AdapterState = dict[str, Tensor]

_WINDOW = 5  # losses in a running mean


@dataclass
class TrainingRun:
    """What one fine-tuning run did: losses in nats per answer token, and the seconds of each step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lowest: list[tuple[int, AdapterState]] = field(default_factory=list)

    def smoothed(self, steps: int | None = None) -> float:
        """Mean of the last five losses, of the whole run or of its first `steps` steps."""
        last = self.losses[:steps][-_WINDOW:]
        return sum(last) / len(last)

    def reached(self, loss: float) -> tuple[int, AdapterState] | None:
        """The first of the steps in `lowest` after which the mean of the last five losses was `loss` or less."""
        return next(((step, state) for step, state in self.lowest if self.smoothed(step) <= loss), None)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one user message, up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_answer(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of a complete answer, with the end token."""
    return [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def answer_logits(model: nn.Module, examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) at the positions that predict an answer token, and those tokens (n,).

    Padding on the left puts all answers at the end of the batch, so the LM head runs only there.
    """
    device = next(model.parameters()).device
    batch = left_padded([prompt + answer for prompt, answer in examples], pad, device)
    longest = max(len(answer) for _, answer in examples)
    labels = torch.full((len(examples), longest), -100, device=device)
    for row, (_, answer) in enumerate(examples):
        labels[row, longest - len(answer) :] = torch.tensor(answer, device=device)
    logits = model(**batch, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
    kept = labels != -100
    return logits[kept].float(), labels[kept]


def example_batches(examples: Sequence[Example], batch_size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Endless shuffled batches of similar lengths (sorted within four batches, which saves padding)."""
    while True:
        order = rng.sample(range(len(examples)), len(examples))
        batches: list[list[int]] = []
        for start in range(0, len(order), 4 * batch_size):
            block = sorted(order[start : start + 4 * batch_size], key=lambda i: sum(map(len, examples[i])))
            batches += [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
        batches = [batch for batch in batches if len(batch) == batch_size]
        rng.shuffle(batches)
        yield from ([examples[i] for i in batch] for batch in batches)


def adapter_state(model: nn.Module) -> AdapterState:
    """A copy of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def load_adapter_state(model: nn.Module, state: AdapterState) -> None:
    """Write `state` into the trainable parameters of `model`; raises ValueError unless the names agree."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != state.keys():
        raise ValueError("the adapter state belongs to another model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def train(
    models: Sequence[nn.Module],
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    pad: int,
    seed: int,
    description: str,
    warmup: int = 4,
    keep: Sequence[nn.Module] = (),
) -> list[TrainingRun]:
    """Train what requires a gradient in each model with AdamW (no weight decay), clipping at norm 1.

    The models take turns at each batch, and the first one changes: a machine's speed changes by a quarter within a
    minute, so that only steps next to each other can be compared. The learning rate rises over `warmup` steps and falls
    linearly to a tenth. Of the models in `keep` the adapter is copied at every step after which the mean of the last
    five losses is the lowest so far.
    """
    batches = example_batches(examples, batch_size, random.Random(seed))
    trainings = [_Training(model) for model in models]
    with tqdm(range(steps), desc=description, unit="step") as bar:
        for step in bar:
            rate = learning_rate * (min(1.0, (step + 1) / warmup) * (1 - 0.9 * step / steps))
            batch, first = next(batches), step % len(trainings)
            for training in trainings[first:] + trainings[:first]:
                training.step(batch, rate, pad)
            for training in trainings:
                if training.model in keep:
                    training.keep()
            bar.set_postfix_str(", ".join(f"loss={training.run.losses[-1]:.3f}" for training in trainings))
    for model in models:
        model.eval()
    return [training.run for training in trainings]


class _Training:
    """One model on its way."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.run = model.train(), TrainingRun()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0)

    def step(self, batch: list[Example], learning_rate: float, pad: int) -> None:
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = F.cross_entropy(*answer_logits(self.model, batch, pad))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.run.losses.append(loss.item())
        self.run.seconds.append(time.perf_counter() - started)

    def keep(self) -> None:
        run, step = self.run, len(self.run.losses)
        if step >= _WINDOW and (not run.lowest or run.smoothed() < run.smoothed(run.lowest[-1][0])):
            run.lowest.append((step, adapter_state(self.model)))
