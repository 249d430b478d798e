"""What is kept beside covariances: kinds of tokens, a few rows of every input, and prompts that can be held out.

All of it is chosen by hashes of the prompts' tokens, so that it depends neither on the order of the prompts, nor on how
they are batched or divided among processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from guardspace_kernels.arguments import instance, number, shown
from guardspace_kernels.guard.batches import TOKEN_KINDS, Batch
from guardspace_kernels.guard.tokens import Tokens

KINDS = ("template", "request", "answer")
TEMPLATE, REQUEST, ANSWER = range(3)

EQUAL = (1.0, 1.0, 1.0)

SAMPLED = 32  # rows of each kind
_HELD = 4  # one prompt in so many is held out
_PROBES = 8  # inputs at which it is, but one of 16 at most: each takes a covariance more
_HASH_BITS = 60

# A plan from fewer prompts is refused: what it protects is theirs alone.
FEWEST_PROMPTS = 16


@dataclass(eq=False)
class Sample:
    """Some of the rows that an input was collected from.

    Attributes:
        keys: (n,) int64, ascending: the kind of each row's token, above a hash of its prompt and place.
        rows: (n, d), as the layer read them: in the model's dtype.
    """

    keys: torch.Tensor
    rows: torch.Tensor

    @property
    def kinds(self) -> torch.Tensor:
        """(n,) indices into :data:`KINDS`."""
        return kinds_of(self.keys)

    def merge(self, other: Sample) -> Sample:
        """The sample of both; ``a.merge(b)`` is ``b.merge(a)`` bit for bit."""
        # The same token may have been read with other rounding: the order of the two must not decide.
        first, second = sorted((self, other), key=lambda one: (one.keys.tolist(), _bytes(one.rows)))
        keys = torch.cat([first.keys, second.keys])
        which = kept(keys)
        return Sample(keys[which], torch.cat([first.rows, second.rows])[which])


def kinds_of(keys: torch.Tensor) -> torch.Tensor:
    """(n,) indices into :data:`KINDS`."""
    return keys >> _HASH_BITS


def kept(keys: torch.Tensor) -> torch.Tensor:
    """Indices of the sample of all rows with these keys, in ascending order of the keys: of each kind the smallest."""
    distinct, first = np.unique(keys.numpy(), return_index=True)
    bounds = np.searchsorted(distinct >> _HASH_BITS, np.arange(len(KINDS) + 1))
    taken = [first[begin : min(end, begin + SAMPLED)] for begin, end in pairwise(bounds)]
    return torch.from_numpy(np.concatenate(taken))


@dataclass
class Marks:
    """Of a batch's tokens, as the model reads them, answers included: all (prompts, tokens), on the CPU.

    Attributes:
        kinds: indices into :data:`KINDS`. keys: see :class:`Sample`. held: whether the prompt can be held out.
    """

    kinds: torch.Tensor
    keys: torch.Tensor
    held: torch.Tensor


def marks(batch: Batch, mask: torch.Tensor, kinds: torch.Tensor, whole: torch.Tensor) -> Marks:
    """Of a batch with that mask and those kinds, which became ``whole`` (a mask) if answers were appended."""
    mask, whole = mask.cpu(), whole.cpu()
    if whole.shape != mask.shape:  # answers need padding on the left
        kinds = kinds.gather(1, mask.long().argsort(dim=1, stable=True))
        kinds = torch.nn.functional.pad(kinds, (0, whole.shape[1] - mask.shape[1]), value=ANSWER)
    hashes = _prompt_hashes(batch, mask)
    places = (whole.long().cumsum(dim=1) - 1).clamp_min(0).numpy().astype(np.uint64)
    mixed = _mixed(hashes[:, None] + places * np.uint64(0x9E3779B97F4A7C15))
    keys = torch.from_numpy((mixed >> np.uint64(64 - _HASH_BITS)).astype(np.int64)) | (kinds << _HASH_BITS)
    held = torch.from_numpy(hashes % np.uint64(_HELD) == 0)
    return Marks(kinds, keys, held[:, None].expand(whole.shape))


def _bytes(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that spreads neighbours."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))


def _prompt_hashes(batch: Batch, mask: torch.Tensor) -> np.ndarray:
    """(prompts,) of what the model is given of each prompt, padding apart."""
    digests = [hashlib.sha256() for _ in mask]
    for key in sorted(set(batch) - {"attention_mask", TOKEN_KINDS}):
        value = batch[key]
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) != len(mask):
            continue
        value = value.detach().cpu()
        for digest, row, real in zip(digests, value, mask, strict=True):
            row = row[real] if value.shape[:2] == mask.shape else row
            digest.update(f"{key} {row.dtype} {tuple(row.shape)}".encode())
            digest.update(_bytes(row))
    return np.array([int.from_bytes(digest.digest()[:8], "little") for digest in digests], dtype=np.uint64)


class Sampler:
    """Of one collection: which rows of a batch go into the samples, and which are of prompts that can be held out.

    Attributes:
        probes: the layers at whose inputs prompts can be held out. keys: of the sample of all rows so far.
        held_prompts, kind_tokens, distinct: see :class:`guardspace_kernels.guard.statistics.CalibrationStatistics`.
        new: of the real tokens of the batch's prompts, in the mask's order: indices of those that join the samples.
        held: by the id of a stream of tokens, indices of its real ones to hold out, where there are any.
        parts: masks of the prompts' tokens that count, with their weights; empty where all count alike.
    """

    def __init__(self, probes: set[str], weights: Sequence[float] = EQUAL) -> None:
        self.probes, self.weights = probes, weights
        self.keys = torch.empty(0, dtype=torch.int64)
        self.held_prompts = 0
        self.kind_tokens = [0] * len(KINDS)
        self.distinct: list[int] = []
        self.new = self.new_keys = self.keys
        self.held: dict[int, torch.Tensor] = {}
        self.parts: list[tuple[torch.Tensor, float]] = []

    def begin(self, marks: Marks, streams: Mapping[str, Tokens], sink: bool) -> None:
        """A batch of those tokens, the prompts' first; with ``sink`` the first tokens of prompts do not count."""
        prompts, *_ = streams.values()
        real = prompts.mask.cpu()
        counted = prompts.later.cpu() if sink else torch.ones(int(real.sum()), dtype=torch.bool)
        kinds, keys = marks.kinds[real], marks.keys[real]
        places = counted.nonzero().flatten()
        known = torch.cat([self.keys, keys[places]])
        which = kept(known)
        self.new = places[which[which >= len(self.keys)] - len(self.keys)]
        self.new_keys = keys[self.new]
        self.keys = known[which]
        rows = marks.held[:, :1]
        if rows.any():
            for tokens in streams.values():
                held = rows.expand(tokens.mask.shape)[tokens.mask.cpu()]
                self.held[id(tokens)] = (held & tokens.later.cpu() if sink else held).nonzero().flatten()
        first = prompts.first.cpu()
        self.held_prompts += int((first & rows).sum())
        # Less bits, which JSON holds exactly; a first token may be of other kinds in other batches.
        self.distinct = fewest(self.distinct, ((marks.keys[first] & (2**_HASH_BITS - 1)) >> 8).tolist())
        if any(weight != 1.0 for weight in self.weights):
            given = torch.tensor(self.weights, dtype=torch.float64)[kinds]
            self.parts = [(counted & (given == w), w) for w in sorted(set(self.weights)) if w > 0]
        for kind, count in enumerate(kinds[counted].bincount(minlength=len(KINDS)).tolist()):
            self.kind_tokens[kind] += count

    def end(self) -> None:
        self.new = self.new_keys = self.keys[:0]
        self.held, self.parts = {}, []


def fewest(a: Iterable[int], b: Iterable[int]) -> list[int]:
    """Of hashes of different prompts in either as many, the smallest, as tell whether there are enough."""
    return sorted({*a, *b})[:FEWEST_PROMPTS]


class Template:
    """Finds the kinds of tokens where a batch does not say: the template is what all prompts begin and end with.

    All prompts of a batch, that is, and the very first prompt, so that batches of one prompt will do.

    Attributes:
        before: how many tokens the latest batch's prompts, and the first one, begin with: all, if there is but one.
    """

    def __init__(self) -> None:
        self.first: list[int] | None = None
        self.before = 0

    def kinds(self, batch: Batch, index: int, mask: torch.Tensor) -> torch.Tensor:
        """(prompts, tokens) int64, on the CPU; ValueError if the batch's own ``token_kinds`` are none."""
        given, ids, mask = batch.get(TOKEN_KINDS), batch.get("input_ids"), mask.cpu()
        kinds = torch.full(mask.shape, REQUEST)
        if ids is not None and len(ids):
            prompts = [row[real].tolist() for row, real in zip(ids.cpu(), mask, strict=True)]
            self.first = self.first or prompts[0]
            before, after = _shared([self.first, *prompts])
            # Of one prompt nobody knows yet where the template ends.
            self.before = len(self.first) if all(prompt == self.first for prompt in prompts) else before
            places = mask.long().cumsum(dim=1) - 1
            kinds[(places < before) | (places >= mask.sum(dim=1, keepdim=True) - after)] = TEMPLATE
        return kinds if given is None else checked_kinds(given, index, mask)


def checked_kinds(given: torch.Tensor, index: int, mask: torch.Tensor) -> torch.Tensor:
    """A batch's own ``token_kinds``, int64, on the CPU; ValueError if they are none."""
    if not isinstance(given, torch.Tensor) or given.shape != mask.shape or given.is_floating_point():
        shape = tuple(getattr(given, "shape", ())) or type(given).__name__
        raise ValueError(
            f"batch {index}: {TOKEN_KINDS} must be integers of the shape of the mask, {tuple(mask.shape)}, got {shape}"
        )
    given = given.cpu().long()
    if len(given[mask]) and not (int(given[mask].min()) >= 0 and int(given[mask].max()) < len(KINDS)):
        raise ValueError(
            f"batch {index}: {TOKEN_KINDS} must be 0 (template), 1 (request) or 2 (answer), got values from "
            f"{int(given[mask].min())} to {int(given[mask].max())}"
        )
    return given


def checked_weights(given: Mapping[str, float] | None) -> tuple[float, ...]:
    """By kind, in the order of :data:`KINDS`; TypeError or ValueError that names the argument."""
    given = {} if given is None else given
    wanted = f"a mapping of {', '.join(KINDS)} to numbers, or None"
    instance("kind_weights", given, Mapping, wanted)
    if not set(given) <= set(KINDS):
        raise ValueError(f"kind_weights must be {wanted}, got {shown(given)}")
    weights = tuple(
        float(number(f"kind_weights[{kind!r}]", given.get(kind, 1.0), "a number of 0 or more", lambda w: w >= 0))
        for kind in KINDS
    )
    if not any(weights):
        raise ValueError("kind_weights must leave one kind a weight above 0, got 0 for all")
    return weights


def _shared(prompts: Sequence[list[int]]) -> tuple[int, int]:
    """How many tokens all prompts begin with, and end with; none where they are all the same prompt."""
    if all(prompt == prompts[0] for prompt in prompts):
        return 0, 0

    def common(limit: int, *, end: bool) -> int:
        count = 0
        while count < limit and len({p[-1 - count if end else count] for p in prompts}) == 1:
            count += 1
        return count

    shortest = min(map(len, prompts))
    before = common(shortest, end=False)
    return before, common(shortest - before, end=True)


def probed(layers: Sequence[str]) -> set[str]:
    """Layers at whose inputs prompts can be held out: a few, spread over the depth.

    Not in experts where there are others: which prompt an expert's row is of is not known.
    """

    def nested(name: str) -> bool:
        return sum(part.isdigit() for part in name.split(".")) > 1

    candidates = [name for name in layers if not nested(name)] or list(layers)
    count = max(1, min(_PROBES, len(candidates) // 16))
    if count == 1:
        return {candidates[len(candidates) // 2]}
    return {candidates[i * (len(candidates) - 1) // (count - 1)] for i in range(count)}
