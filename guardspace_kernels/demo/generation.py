"""Greedy answers to many prompts: a beginning that all share is read once, and guessed answers are checked at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from .training import left_padded

Tick = Callable[[int], Any]
Watch = Callable[[list[int], Tensor], Any]

_WORTH_SHARING = 64  # tokens saved; a forward of its own costs about as much
_TOGETHER = 8  # batches whose answers go on together


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    end: int,
    guesses: Sequence[Sequence[int]] | None = None,
    batch_size: int = 24,
    tick: Tick | None = None,
    watch: Watch | None = None,
) -> list[list[int]]:
    """Greedy answers as token ids, the end token included where the model gave one; in the order of `prompts`.

    A beginning that all prompts share is read once. Prompts are read in batches of similar lengths, and answers go on
    in larger ones: token by token a forward costs much beside its rows. A guess is read together with its prompt. As
    far as the model's own choices agree with it, they are the answer, and so is the first that does not; from there on
    it is made token by token. Up to rounding no answer depends on a guess.

    Args:
        guesses: whole answers, which end with `end` or hold `new_tokens` tokens.
        batch_size: of prompts that are read together; answers of eight batches go on together.
        tick: called with the number of prompts that have become done.
        watch: called for every batch with the indices of its prompts and the logits at the positions that predict the
            guesses, (prompts, longest guess, vocabulary), where shorter ones stand on the right.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    waiting: list[tuple[list[int], _Reader]] = []

    def unfinished(indices: list[int]) -> list[int]:
        rows = [row for row, i in enumerate(indices) if len(answers[i]) < new_tokens and answers[i][-1] != end]
        if tick and len(rows) < len(indices):
            tick(len(indices) - len(rows))
        return rows

    def go_on() -> None:
        going = [i for indices, _ in waiting for i in indices]
        reader = _Reader.joined([reader for _, reader in waiting])
        waiting.clear()
        while going:
            chosen = reader.read([answers[i][-1:] for i in going], keep=1)[:, -1].argmax(-1)
            for i, token in zip(going, chosen.tolist(), strict=True):
                answers[i].append(token)
            rows = unfinished(going)
            if rows and len(rows) < len(going):
                reader.select(rows)
            going = [going[row] for row in rows]

    shared, beginning = _beginning(model, prompts)
    # Longest first, so that memory runs out at once or never.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - len(guesses[i] if guesses else ()))
    for indices in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        guessed = [list(guesses[i]) if guesses else [] for i in indices]
        reader = _Reader.joined([beginning] * len(indices)) if beginning else _Reader(model)
        unread = [[*prompts[i][shared:], *guess[:-1]] for i, guess in zip(indices, guessed, strict=True)]
        logits = reader.read(unread, keep=max(1, *map(len, guessed)))
        if watch:
            watch(indices, logits)
        for i, own, guess in zip(indices, logits.argmax(-1).tolist(), guessed, strict=True):
            answers[i] = _agreed(own[-max(1, len(guess)) :], guess, end)
        reader.forget([max(0, len(guess) - len(answers[i])) for i, guess in zip(indices, guessed, strict=True)])
        if rows := unfinished(indices):
            reader.select(rows)
            waiting.append(([indices[row] for row in rows], reader))
        if len(waiting) == _TOGETHER:
            go_on()
    if waiting:
        go_on()
    return answers


def _agreed(own: list[int], guess: list[int], end: int) -> list[int]:
    """What the model chose where it read the guess, up to its first choice of another token, or its end."""
    last = next((n for n, (a, b) in enumerate(zip(own, guess, strict=False)) if a != b or a == end), len(own))
    return own[: last + 1]


def _beginning(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[int, _Reader | None]:
    """How many tokens all prompts begin with, and a reader of these; none where that would not pay."""
    shared = next((n for n, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1), 0)
    shared = min(shared, min(map(len, prompts), default=1) - 1)
    if shared * (len(prompts) - 1) < _WORTH_SHARING:
        return 0, None
    reader = _Reader(model)
    reader.read([list(prompts[0][:shared])], keep=1)
    return shared, reader


class _Reader:
    """A model that has read some tokens of every row, and goes on from there."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.cache: Any = None
        self.mask = torch.empty(1, 0, dtype=torch.long, device=self.device)

    def read(self, tokens: list[list[int]], keep: int) -> Tensor:
        """Logits (rows, keep, vocabulary) at the last positions of each row's next tokens, which end together."""
        batch = left_padded(tokens, 0, self.device)
        positions = batch["position_ids"] + self.mask.sum(dim=1, keepdim=True)
        mask = self.mask.expand(len(tokens), -1)
        self.mask = torch.cat([mask, batch["attention_mask"]], dim=1)
        output = self.model(
            input_ids=batch["input_ids"],
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        self.cache = output.past_key_values
        return output.logits

    def forget(self, counts: list[int]) -> None:
        """Of each row so many of the tokens that it read last."""
        places = torch.arange(self.mask.shape[1], 0, -1, device=self.device)
        self.mask = self.mask * (places > torch.tensor(counts, device=self.device)[:, None])

    @classmethod
    def joined(cls, readers: list[_Reader]) -> _Reader:
        """The rows of all of them, one reader's after the other's."""
        whole = cls(readers[0].model)
        longest = max(reader.mask.shape[1] for reader in readers)

        def stacked(tensors: Iterable[Tensor], dim: int) -> Tensor:
            return torch.cat([F.pad(t, (0, 0) * (t.ndim - 1 - dim) + (longest - t.shape[dim], 0)) for t in tensors])

        whole.mask, whole.cache = stacked((reader.mask for reader in readers), 1), DynamicCache()
        for i, layers in enumerate(zip(*(reader.cache.layers for reader in readers), strict=True)):
            whole.cache.update(
                *(stacked((getattr(layer, name) for layer in layers), 2) for name in ("keys", "values")), i
            )
        return whole

    def select(self, rows: list[int]) -> None:
        """Goes on with these rows, in this order."""
        which = torch.tensor(rows, device=self.device)
        self.cache.batch_select_indices(which)
        self.mask = self.mask[which]
