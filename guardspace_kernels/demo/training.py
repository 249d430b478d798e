"""A small fine-tuning loop, the same for plain LoRA and for a guarded model."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

Example = tuple[list[int], list[int]]  # token ids of the prompt, token ids of the answer (with its end token)
AdapterState = dict[str, Tensor]


@dataclass
class TrainingRun:
    """What one fine-tuning run did: losses in nats per answer token, and seconds of all steps and of the median one."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    step_seconds: float = 0.0
    snapshot_step: int | None = None
    snapshot: AdapterState | None = None

    def smoothed(self, window: int = 5) -> float:
        """Mean of the last `window` losses."""
        last = self.losses[-window:]
        return sum(last) / len(last)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one user message, up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_answer(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of a complete answer, with the end token."""
    return [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def left_padded(sequences: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `position_ids` of a batch, each (batch, longest)."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {
        name: t.to(device)
        for name, t in zip(("input_ids", "attention_mask", "position_ids"), (ids, mask, positions), strict=True)
    }


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


def _batches(examples: Sequence[Example], batch_size: int, rng: random.Random) -> Iterator[list[Example]]:
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
    model: nn.Module,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    pad: int,
    seed: int,
    description: str,
    warmup: int = 4,
    window: int = 5,
    snapshot_at: float | None = None,
) -> TrainingRun:
    """Train the parameters that require a gradient with AdamW (no weight decay), clipping at norm 1.

    The learning rate rises over `warmup` steps and falls linearly to a tenth. With `snapshot_at` the adapter is copied
    when the mean of the last `window` losses first reaches that value.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    batches = _batches(examples, batch_size, random.Random(seed))
    run, times = TrainingRun(), [time.perf_counter()]
    model.train()
    with tqdm(range(steps), desc=description, unit="step") as bar:
        for step in bar:
            factor = min(1.0, (step + 1) / warmup) * (1 - 0.9 * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
            logits, labels = answer_logits(model, next(batches), pad)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.losses.append(loss.item())
            bar.set_postfix(loss=f"{run.losses[-1]:.3f}")
            reached = snapshot_at is not None and len(run.losses) >= window and run.smoothed(window) <= snapshot_at
            if reached and run.snapshot is None:
                run.snapshot, run.snapshot_step = adapter_state(model), step + 1
            times.append(time.perf_counter())
    model.eval()
    run.seconds = times[-1] - times[0]
    run.step_seconds = median(b - a for a, b in pairwise(times))
    return run
