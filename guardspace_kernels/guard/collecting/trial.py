"""What is tried on one prompt before a batch of a new kind is collected: which tokens a layer reads, whether its output
is the product of its weight, and whether padding and packing leave the prompt what it is alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from guardspace_kernels.guard.batches import TOKEN_KINDS, Batch, forward_batch
from guardspace_kernels.guard.collecting.witness import Witness, listed, rounded_otherwise
from guardspace_kernels.guard.layers import base_model, output_embedding
from guardspace_kernels.guard.lockstep import Lockstep
from guardspace_kernels.guard.routing import Routing
from guardspace_kernels.guard.tokens import DECODER, PACKING, PROMPTS, Tokens, tokens_of

_LONGEST = 16  # tokens of a prompt without padding, of which only shapes are wanted
_Kind = tuple[tuple[str, ...], ...]  # of a row: what each of its streams has beside a prompt
_Key = tuple[tuple[str, ...], _Kind]  # entries of a batch, which may lead through other parts of a model, and a kind


class Trial:
    """Runs a prompt alone, and as it stands in its batch, before the first batch of every kind.

    A layer reads a stream of tokens if its input has that stream's shape in forwards of other sizes too. Alone, a
    prompt has no padding and the positions that the model gives it by itself; in its batch, the inputs of all layers
    must be the same at its tokens, up to rounding: with ``position_ids`` that follow the mask, or else without.
    ``outputs``: whether hooks on a layer must leave its output the product of its weight.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        routing: Routing,
        lockstep: Lockstep,
        *,
        outputs: bool = True,
    ) -> None:
        self.model, self.layers, self.routing, self.lockstep = model, layers, routing, lockstep
        self.outputs = outputs
        self.stream: dict[str, str] = {}
        self.logits = None if output_embedding(model) in list(layers.values()) else 1
        self._positions: dict[_Key, bool] = {}  # of what has been tried, whether it needs positions of ours
        self._takes_positions = "position_ids" in inspect.signature(base_model(model).forward).parameters

    def forward(self, batch: Batch, index: int, logits: int | None = None) -> Any:
        """Of a whole batch, as :meth:`look` found that it must be run."""
        entries = _entries(batch)
        needed = {self._positions[entries, kind] for kind in _kinds(batch, tokens_of(batch, index)) if any(kind)}
        if len(needed) > 1:
            raise ValueError(f"batch {index}: this model needs all prompts of a batch padded on one side")
        return forward_batch(self.model, batch, logits=logits or self.logits, positions=needed != {False})

    def look(self, batch: Batch, index: int) -> None:
        """Tries what is new in the batch.

        Raises:
            ValueError: a layer does not read the prompts' tokens, or what it reads of a prompt changes with padding or
                with its neighbours in a packed row; the message names the layer and says what to do.
            TypeError: a layer's output is not the product of its weight.
        """
        streams, entries = tokens_of(batch, index), _entries(batch)
        kinds = _kinds(batch, streams)
        mine = {(entries, kind) for kind in kinds} - self._positions.keys()
        new = {key for keys in self.lockstep.gathered(mine) for key in keys}
        for key in sorted(new, key=lambda key: (not any(key[1]), repr(key))):
            if any(key[1]) or not any(k[0] == key[0] and any(k[1]) for k in self._positions):
                self._try(batch, index, streams, kinds, key)
            self._positions.setdefault(key, False)

    def confirm(self, batch: Batch, index: int, late: Mapping[str, str]) -> None:
        """That layers first reached in this batch read the stream whose shape they have: in a forward of the batch
        that is one token shorter."""
        if not any(self.lockstep.gathered(len(late))):
            return
        streams = tokens_of(batch, index)
        sizes = {key: tokens.mask.shape[1] for key, tokens in streams.items()}
        rows = range(len(next(iter(streams.values())).mask))
        drop = _shortened(sizes, len(rows), 1)
        columns = {key: list(range(size - drop[key])) for key, size in sizes.items()}
        seen = self._run(_part(batch, streams, rows, columns, ("labels",)), index, True, True)
        with self.lockstep.step():
            seen.check()
            wrong = [name for name, key in late.items() if self.stream.get(name) != key]
            if wrong:
                raise ValueError(
                    f"layer {listed(wrong)} is first reached in batch {index}, but not with one token less, so that "
                    "nobody knows whether it reads the prompts' tokens; put such a batch first, or leave the layer out "
                    "of target_modules"
                )

    def _run(self, batch: Batch, index: int, positions: bool, learns: bool) -> Witness:
        seen = Witness(self.layers, self.routing, self.stream, learns, self.outputs)
        with seen.counting(tokens_of(batch, index)):
            forward_batch(self.model, batch, logits=self.logits, positions=positions)
        return seen

    def _try(
        self, batch: Batch, index: int, streams: Mapping[str, Tokens], kinds: Sequence[_Kind], entries: _Key
    ) -> None:
        kind = entries[1]
        row = _row_to_try(streams, kinds, kind)
        with self.lockstep.step():
            rows = _rows_to_try(batch, streams, row, index, padded=any(kind))
        case = _Case(batch, streams, row, rows, any(kind))
        alone = self._run(case.alone(), index, False, True)
        with self.lockstep.step():
            alone.check()
        if not any(kind):
            return
        free = self._takes_positions and "position_ids" not in batch
        for positions in (True, False) if free else (False,):
            found = self._difference(alone, case, case.places, index, positions)
            if not any(self.lockstep.gathered(found)):
                self._positions[entries] = positions
                return
        sides = {side for flags in kind for side in flags}
        other = {"left": "right", "right": "left"}.get(next(iter(sides))) if len(sides) == 1 else None
        works = False
        if other is not None:
            places = {key: case.moved(key, other) for key in streams}
            works = not all(
                any(self.lockstep.gathered(self._difference(alone, case, places, index, positions)))
                for positions in ((True, False) if free else (False,))
            )
        with self.lockstep.step():
            raise ValueError(_advice(index, found or "on another rank", sides, other if works else None))

    def _difference(
        self, alone: Witness, case: _Case, places: Mapping[str, list[int]], index: int, positions: bool
    ) -> str | None:
        """The layer that reads something else of a prompt in its row, at these places, than alone; and by how much."""
        seen = self._run(case.part(case.rows[:1], places, ("labels",)), index, positions, False)
        least = max(1e-3, 8 * alone.eps)
        errors = self._errors(alone, seen, case, places)
        beyond = {name: error for name, error in errors.items() if not error <= least}
        if any(self.lockstep.gathered(len(beyond))):
            rounding = self._rounding(alone, case, index)
            beyond = {name: error for name, error in beyond.items() if not error <= 1.5 * rounding[name]}
        if not beyond:
            return None
        which = max(beyond, key=lambda name: beyond[name])
        return f"{which} ({beyond[which]:.2g})"

    def _errors(
        self, alone: Witness, seen: Witness, case: _Case, places: Mapping[str, list[int]] | None
    ) -> dict[str, float]:
        """Of every layer the relative difference of what it read of the prompt, at these places of its row or, without
        any, alone again."""
        errors = {}
        for name, sketches in alone.sketches.items():
            stream = self.stream[name]
            count = len(case.prompt[stream])
            which = list(range(count)) if places is None else case.among_real(stream, places[stream])
            a, b = sketches[:count], seen.sketches.get(name, sketches[:0])
            b = b[which] if len(b) else b
            errors[name] = max(_relative(a[:1], b[:1]), _relative(a[1:], b[1:]))
        return errors

    def _rounding(self, alone: Witness, case: _Case, index: int) -> dict[str, float]:
        """Of every layer the difference that rounding can make: the prompt alone, twice, with noise of the size of eps
        on what every linear layer makes. Of tens of blocks in 16 bits it is no constant times eps, and a router may
        choose another expert; what is not rounding is seen where it begins, before it has grown."""
        if not alone.rounding:
            for seed in range(2):
                with rounded_otherwise(self.model, seed):
                    noisy = self._errors(alone, self._run(case.alone(), index, False, False), case, None)
                finite = {name: error if math.isfinite(error) else 0.0 for name, error in noisy.items()}
                alone.rounding = {name: max(error, alone.rounding.get(name, 0.0)) for name, error in finite.items()}
        return alone.rounding


def _relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """How far y is from x; 0 where x tells nothing."""
    if not x.numel() or not x.isfinite().all():
        return 0.0
    error = float((x - y).norm()) / max(float(x.norm()), 1e-30) if x.shape == y.shape else math.inf
    return math.inf if math.isnan(error) else error


class _Case:
    """A prompt in a row of a batch, and what of both is run."""

    def __init__(
        self, batch: Batch, streams: Mapping[str, Tokens], row: int, rows: Sequence[int], padded: bool
    ) -> None:
        self.batch, self.streams, self.row, self.rows = batch, streams, row, rows
        whole = {key: _prompt(tokens, row) for key, tokens in streams.items()}
        if not padded and all(isinstance(v, torch.Tensor) and _stream(n, v, streams) for n, v in batch.items()):
            whole = {key: places[:_LONGEST] for key, places in whole.items()}
        packed = any(int(tokens.first[row].sum()) > 1 for tokens in streams.values())
        sizes = {key: len(places) for key, places in whole.items()}
        drop = dict.fromkeys(sizes, 0) if packed else _shortened(sizes, len(rows), 0 if padded else 1)
        self.prompt = {key: places[: len(places) - drop[key]] for key, places in whole.items()}
        # In its row the same tokens are left out, so that the model may look at later ones.
        left_out = {key: set(places[len(places) - drop[key] :]) for key, places in whole.items()}
        self.places = {
            key: [i for i in range(tokens.mask.shape[1]) if i not in left_out[key]] for key, tokens in streams.items()
        }

    def alone(self) -> Batch:
        return self.part(self.rows, self.prompt, ("labels", "decoder_position_ids", *PACKING))

    def part(self, rows: Sequence[int], places: Mapping[str, list[int]], without: Sequence[str]) -> Batch:
        return _part(self.batch, self.streams, rows, places, without)

    def moved(self, key: str, side: str) -> list[int]:
        """The places with the padding on that side."""
        prompt = set(self.prompt[key])
        padding = [i for i in self.places[key] if i not in prompt]
        return self.prompt[key] + padding if side == "right" else padding + self.prompt[key]

    def among_real(self, key: str, places: Sequence[int]) -> list[int]:
        """Which of the real tokens at those places are the prompt's."""
        real, prompt = self.streams[key].mask[self.row].tolist(), set(self.prompt[key])
        return [n for n, i in enumerate(i for i in places if real[i]) if i in prompt]


def _entries(batch: Batch) -> tuple[str, ...]:
    """What the model is given, but for labels, which change nothing that a layer reads."""
    return tuple(sorted(set(batch) - {TOKEN_KINDS, "labels"}))


def _kinds(batch: Batch, streams: Mapping[str, Tokens]) -> list[_Kind]:
    """Of each row."""
    flags = []
    for key, tokens in streams.items():
        mask = tokens.mask.cpu()
        changes = (mask[:, 1:] != mask[:, :-1]).sum(dim=1)
        left, right = ~mask[:, 0], ~mask[:, -1]
        has = {
            "left": left,
            "right": right,
            "inside": changes > left.long() + right.long(),
            "packed": tokens.first.cpu().sum(dim=1) > 1,
            "placed": torch.full_like(left, key == PROMPTS and "position_ids" in batch),
        }
        flags.append([tuple(flag for flag, rows in has.items() if rows[i]) for i in range(len(mask))])
    return list(zip(*flags, strict=True))


def _row_to_try(streams: Mapping[str, Tokens], kinds: Sequence[_Kind], kind: _Kind) -> int:
    """Of the rows of that kind the one with most of both, tokens and padding; the first if there is none."""
    real = sum(tokens.mask.sum(dim=1).cpu() for tokens in streams.values())
    padding = sum((~tokens.mask).sum(dim=1).cpu() for tokens in streams.values())
    rows = [i for i, one in enumerate(kinds) if one == kind]
    return max(rows, key=lambda i: min(int(real[i]), int(padding[i])), default=0)  # type: ignore[index]


def _prompt(tokens: Tokens, row: int) -> list[int]:
    """The places of a row's prompt; of a packed row, those of the longest that is not the first."""
    places = tokens.mask[row].nonzero().flatten().tolist()
    starts = [n for n, i in enumerate(places) if tokens.first[row, i]]
    ends = [*starts[1:], len(places)]
    return max((places[a:b] for a, b in list(zip(starts, ends, strict=True))[-max(1, len(starts) - 1) :]), key=len)


def _rows_to_try(batch: Batch, streams: Mapping[str, Tokens], row: int, index: int, padded: bool) -> list[int]:
    """The row twice, so that (tokens, prompts, d) is seen; all rows where entries of others than tokens belong to no
    row."""
    prompts = len(next(iter(streams.values())).mask)
    odd = [
        name
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
        and value.dim()
        and not _stream(name, value, streams)
        and len(value) != prompts
    ]
    if not odd:
        return [row, row]
    if padded and prompts > 1:
        raise ValueError(
            f"batch {index}: whether padding changes what the model reads cannot be tried, since {odd[0]} of shape "
            f"{tuple(batch[odd[0]].shape)} is not divided among {prompts} prompts; give one prompt a batch"
        )
    return list(range(prompts))


def _stream(name: str, value: torch.Tensor, streams: Mapping[str, Tokens]) -> str | None:
    """Which tokens an entry of a batch has a value for each of, if it has."""
    key = DECODER if DECODER in streams and name.startswith(("decoder_", "labels")) else PROMPTS
    if key not in streams:
        return None
    rows, places = streams[key].mask.shape
    if name == "position_ids":
        return key if value.shape[-1] == places else None
    # Pixels and frames may have such a shape by chance.
    of_tokens = name.endswith(("mask", "inputs_embeds")) or (value.dim() == 2 and not value.is_floating_point())
    return key if of_tokens and value.shape[:2] == (rows, places) else None


def _part(
    batch: Batch,
    streams: Mapping[str, Tokens],
    rows: Sequence[int],
    places: Mapping[str, list[int]],
    without: Sequence[str],
) -> dict[str, Any]:
    """Some rows of a batch, and of those some places."""
    made: dict[str, Any] = {}
    prompts, which = len(next(iter(streams.values())).mask), list(rows)
    for name, value in batch.items():
        if name in without:
            continue
        key = _stream(name, value, streams) if isinstance(value, torch.Tensor) else None
        if key is not None and name == "position_ids":
            value = value.expand(*value.shape[:-2], prompts, value.shape[-1])
            made[name] = value[..., which, :][..., places[key]]
        elif key is not None:
            made[name] = value[which][:, places[key]]
        elif isinstance(value, torch.Tensor) and value.dim() and len(value) == prompts:
            made[name] = value[which]
        else:
            made[name] = value
    return made


def _shortened(sizes: Mapping[str, int], rows: int, least: int) -> dict[str, int]:
    """How many tokens to leave out of each stream, so that no two numbers of rows and tokens are equal."""
    drop: dict[str, int] = {}
    for key, size in sizes.items():
        taken = {rows, *(sizes[other] - n for other, n in drop.items())}
        drop[key] = next((n for n in range(least, size) if size - n not in taken), 0)
    return drop


def _advice(index: int, found: str, sides: set[str], works: str | None) -> str:
    if "packed" in sides:
        what, advice = "packed with others into a row", "give each prompt a row of its own"
    elif "inside" in sides:
        what, advice = "with masked tokens inside", "take them out"
    elif sides == {"placed"}:
        what, advice = "at the batch's position_ids", "leave position_ids to the model"
    else:
        what = f"padded on the {' and the '.join(sorted(sides - {'placed'}))}"
        advice = "give batches of prompts of one length, without padding"
        if works:
            advice = f"pad on the {works}, or {advice}"
        if "left" in sides:
            advice += " (answer_tokens pads on the left)"
    return (
        f"batch {index}: a prompt {what} is not read as it is alone, by the relative difference of what reaches layer "
        f"{found}; {advice}"
    )
