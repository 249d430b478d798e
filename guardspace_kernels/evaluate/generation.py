"""Greedy answers to many prompts: a beginning that all share is read once, and guessed answers are checked at once."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from guardspace_kernels.guard.batches import forward_batch, with_answers
from guardspace_kernels.guard.layers import base_model

Tick = Callable[[int], Any]
Watch = Callable[[list[int], Tensor], Any]

_WORTH_SHARING = 64  # tokens saved; a forward of its own costs about as much
_TOGETHER = 8  # batches whose answers go on together


def left_padded(sequences: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``position_ids`` of a batch, each (batch, longest)."""
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


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    end: int | Collection[int],
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

    That needs a cache which keeps the keys and values of all tokens. Of a model with another one (sliding windows,
    recurrent states, none) ``model.generate`` makes the answers, to prompts of one length at a time.

    Args:
        model: a causal language model of Transformers, in eval mode, with or without adapters.
        end: the token, or the tokens, that end an answer.
        guesses: whole answers, which end with an end token or hold ``new_tokens`` tokens.
        batch_size: of prompts that are read together; answers of eight batches go on together.
        tick: called with the number of prompts that have become done.
        watch: called for every batch with the indices of its prompts and the logits at the positions that predict the
            guesses, or the first token where none is guessed, (prompts, longest guess or 1, vocabulary); shorter ones
            stand on the right.
    """
    ends = frozenset([end] if isinstance(end, int) else end)
    options: dict[str, Any] = {"guesses": guesses, "batch_size": batch_size, "tick": tick, "watch": watch}
    try:
        return _with_joined_caches(model, prompts, new_tokens, ends, **options)
    except _OtherCacheError:  # told by the first forward, before anything was reported
        return _by_length(model, prompts, new_tokens, ends, **options)


class _OtherCacheError(Exception):
    """The model's cache is not one whose rows can be cut, padded and joined."""


def _with_joined_caches(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: frozenset[int],
    *,
    guesses: Sequence[Sequence[int]] | None,
    batch_size: int,
    tick: Tick | None,
    watch: Watch | None,
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    waiting: list[tuple[list[int], _Reader]] = []

    def unfinished(indices: list[int]) -> list[int]:
        rows = [row for row, i in enumerate(indices) if len(answers[i]) < new_tokens and answers[i][-1] not in ends]
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
            answers[i] = _agreed(own[-max(1, len(guess)) :], guess, ends)
        reader.forget([max(0, len(guess) - len(answers[i])) for i, guess in zip(indices, guessed, strict=True)])
        if rows := unfinished(indices):
            reader.select(rows)
            waiting.append(([indices[row] for row in rows], reader))
        if len(waiting) == _TOGETHER:
            go_on()
    if waiting:
        go_on()
    return answers


def _by_length(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: frozenset[int],
    *,
    guesses: Sequence[Sequence[int]] | None,
    batch_size: int,
    tick: Tick | None,
    watch: Watch | None,
) -> list[list[int]]:
    """Nothing is padded: a recurrent model may read its padding."""
    device = _device(model)
    answers: list[list[int]] = [[] for _ in prompts]
    if watch:
        read = [[*prompt, *(guesses[i] if guesses else ())[:-1]] for i, prompt in enumerate(prompts)]
        for indices in _alike(read, batch_size):
            keep = max(len(guesses[i]) if guesses else 1 for i in indices)
            batch = {"input_ids": torch.tensor([read[i] for i in indices], device=device)}
            watch(indices, forward_batch(model, batch, keep).logits[:, -keep:])
    for indices in _alike(prompts, batch_size):
        batch = {"input_ids": torch.tensor([list(prompts[i]) for i in indices], device=device)}
        whole = with_answers(model, batch, new_tokens, ends)["input_ids"]
        for i, row in zip(indices, whole[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            last = next((n for n, token in enumerate(row) if token in ends), len(row))
            answers[i] = row[: last + 1]
        if tick:
            tick(len(indices))
    return answers


def _device(model: nn.Module) -> torch.device:
    """Where its inputs go. Accelerate moves them where it keeps the weights elsewhere, and shows none here."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _alike(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Batches of those of one length, longest first."""
    groups = defaultdict(list)
    for i, sequence in enumerate(sequences):
        groups[len(sequence)].append(i)
    for length in sorted(groups, reverse=True):
        yield from (groups[length][i : i + batch_size] for i in range(0, len(groups[length]), batch_size))


def _agreed(own: list[int], guess: list[int], ends: frozenset[int]) -> list[int]:
    """What the model chose where it read the guess, up to its first choice of another token, or its end."""
    last = next((n for n, (a, b) in enumerate(zip(own, guess, strict=False)) if a != b or a in ends), len(own))
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
        self.device = _device(model)
        self.takes = inspect.signature(base_model(model).forward).parameters
        self.cache: Any = None
        self.mask = torch.empty(1, 0, dtype=torch.long, device=self.device)

    def read(self, tokens: list[list[int]], keep: int) -> Tensor:
        """Logits (rows, keep, vocabulary) at the last positions of each row's next tokens, which end together."""
        batch = left_padded(tokens, 0, self.device)
        positions = batch["position_ids"] + self.mask.sum(dim=1, keepdim=True)
        mask = self.mask.expand(len(tokens), -1)
        self.mask = torch.cat([mask, batch["attention_mask"]], dim=1)
        # Positions, not a number: a number makes a strided slice, for which torch copies a frozen output embedding once
        # for every row, 12 of the 19 seconds of a forward of 64 prompts.
        optional = {"position_ids": positions, "logits_to_keep": torch.arange(-keep, 0, device=self.device)}
        output = self.model(
            input_ids=batch["input_ids"],
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self.takes},
        )
        self.cache = getattr(output, "past_key_values", None)
        if type(self.cache) is not DynamicCache or {*map(type, self.cache.layers)} != {DynamicLayer}:
            raise _OtherCacheError
        logits: Tensor = output.logits[:, -keep:]
        return logits

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
        which = torch.tensor(rows)  # on the CPU: a model may have its layers on several devices
        self.cache.batch_select_indices(which)
        self.mask = self.mask[which]
