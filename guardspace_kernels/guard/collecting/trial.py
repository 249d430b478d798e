"""What is tried on one prompt before a batch of a new kind is collected: which tokens a layer reads, whether its output
is the product of its weight, and whether padding and packing leave the prompt what it is alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from guardspace_kernels.guard.batches import TOKEN_KINDS, Batch, forward_batch
from guardspace_kernels.guard.collecting.collector import Collector
from guardspace_kernels.guard.layers import base_model, check_output, linear_weight, output_embedding
from guardspace_kernels.guard.lockstep import Lockstep
from guardspace_kernels.guard.routing import Routing
from guardspace_kernels.guard.sampling import Marks
from guardspace_kernels.guard.tokens import DECODER, PACKING, PROMPTS, Tokens, misfit, tokens_of

_LONGEST = 16  # tokens of a prompt without padding, of which only shapes are wanted
_SKETCH = 16
_Kind = tuple[tuple[str, ...], ...]  # of a row: what each of its streams has beside a prompt
_Key = tuple[tuple[str, ...], _Kind]  # entries of a batch, which may lead through other parts of a model, and a kind


class _Witness(Collector):
    """Keeps a sketch X R, R random (d, 16), of the real tokens that every layer reads; learns the streams at first."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        routing: Routing,
        stream: dict[str, str],
        learns: bool,
        outputs: bool,
    ) -> None:
        super().__init__(layers, layers, torch.float32, False, routing, stream)
        self.learns, self.outputs = learns, outputs
        self.sketches: dict[str, torch.Tensor] = {}
        self.eps = 0.0
        self.errors: dict[str, Exception] = {}

    def tokens_read(self, name: str, x: torch.Tensor) -> Tokens | None:
        if not self.learns:
            return super().tokens_read(name, x)
        fitting = [key for key, tokens in self.streams.items() if tokens.fits(x)]
        known = self.stream.get(name)
        if len(fitting) == 1 and known in (None, fitting[0]):
            assert isinstance(self.stream, dict)
            self.stream[name] = fitting[0]
            return self.streams[fitting[0]]
        if x.dim() > 2 or self.routing.look(name, x) is None:
            self.errors.setdefault(name, ValueError(misfit(name, x, self.streams)))
        return None

    def see(self, name: str, x: torch.Tensor, tokens: Tokens | None) -> None:
        if tokens is None:
            return
        rows = tokens.rows(x)
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(rows.shape[1], _SKETCH, generator=generator).to(rows.device)
        self.eps = max(self.eps, torch.finfo(x.dtype).eps)
        self.sketches.setdefault(name, (rows.float() @ sketch).cpu())

    @contextmanager
    def counting(self, streams: Mapping[str, Tokens], marks: Marks | None = None) -> Iterator[None]:
        with ExitStack() as stack:
            if self.learns and self.outputs:
                for name, module in self.layers.items():
                    if module._forward_hooks or module._forward_pre_hooks:
                        self._compare_output(stack, name, module)
            with super().counting(streams, marks):
                yield

    def _compare_output(self, stack: ExitStack, name: str, module: nn.Module) -> None:
        """With the product of what comes in, before all hooks of others, and what leaves after them."""
        read: list[torch.Tensor] = []
        wanted: list[torch.Tensor] = []

        def begin(_module: nn.Module, args: tuple[Any, ...]) -> None:
            read[:] = [x.detach().clone() for x in args[:1]]

        def multiply(_module: nn.Module, _args: Any) -> None:  # after the hooks that gather a sharded weight
            if read and not linear_weight(module).is_meta:
                bias = module.bias if isinstance(module.bias, torch.Tensor) else None
                wanted[:] = [F.linear(read[0], linear_weight(module), bias)]

        def end(_module: nn.Module, _args: Any, result: Any) -> None:
            try:
                for product in wanted:
                    check_output(name, result, product)
            except TypeError as error:
                self.errors.setdefault(name, error)
            read.clear()
            wanted.clear()

        stack.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
        stack.callback(module.register_forward_pre_hook(multiply).remove)
        stack.callback(module.register_forward_hook(end).remove)

    def check(self) -> None:
        """What was found in the forward; here, since ranks of a sharded model must end a forward together."""
        if not self.errors:
            return
        first, *others = self.errors
        also = f" (so do {len(others)} more: {listed(others)})" if others else ""
        raise type(self.errors[first])(f"{self.errors[first]}{also}")


def listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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

    def _run(self, batch: Batch, index: int, positions: bool, learns: bool) -> _Witness:
        seen = _Witness(self.layers, self.routing, self.stream, learns, self.outputs)
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
        self, alone: _Witness, case: _Case, places: Mapping[str, list[int]], index: int, positions: bool
    ) -> str | None:
        """The layer that reads something else of a prompt in its row, at these places, than alone; and by how much."""
        seen = self._run(case.part(case.rows[:1], places, ("labels",)), index, positions, False)
        worst, which = 0.0, None
        for name, sketches in alone.sketches.items():
            stream = self.stream[name]
            a = sketches[: len(case.prompt[stream])]
            b = seen.sketches.get(name, a[:0])
            b = b[case.among_real(stream, places[stream])] if len(b) else b
            for x, y in ((a[:1], b[:1]), (a[1:], b[1:])):
                if x.isfinite().all() and x.numel():
                    size = float(x.norm())
                    error = float((x - y).norm()) / max(size, 1e-30) if x.shape == y.shape else float("inf")
                    if not error <= worst:
                        worst, which = error, name
        return None if worst <= max(1e-3, 8 * alone.eps) else f"{which} ({worst:.2g})"


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
