"""Collection under a memory budget: which inputs in which pass, and passes that start where the last one ended."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(name: str, size: int | str | None) -> int | None:
    """4_000_000_000, "4GB" or "3.5GiB" -> bytes; ValueError that names the argument."""
    if size is None:
        return None
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?i?B)?\s*", str(size), re.IGNORECASE)
    unit = _UNITS.get((match[2] or "").upper()) if match else None
    try:
        number = float(match[1]) * unit if match and unit else 0.0
    except ValueError:
        number = 0.0
    if number < 1:
        raise ValueError(f'{name} must be a number of bytes such as "4GB" or "512MiB", got {size!r}')
    return int(number)


def show_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def release_memory() -> None:
    """Gives memory that was freed back to the system, where glibc keeps it: an arena for each thread that solves."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class LayerInput:
    """A tensor that one or more layers read; ``after`` is how many blocks had ended when the first one read it, and
    ``held`` whether it has a second covariance, of prompts that can be held out."""

    layers: tuple[str, ...]
    features: int
    after: int
    held: bool = False

    def bytes(self, dtype: torch.dtype) -> int:
        """Of its covariances, while they are accumulated."""
        return (1 + self.held) * self.features**2 * dtype.itemsize


@dataclass(frozen=True)
class CollectionPlan:
    """How :func:`guardspace_kernels.collect_statistics` will go about it.

    Attributes:
        passes: the inputs that each pass accumulates.
        replay: whether a pass starts from the outputs of the block where the one before ended. Otherwise every pass
            begins at the first block.
        whole_bytes: covariances of all inputs at once. stored_bytes: the same as triangles, in a file.
        live_bytes: the most that covariances, one triangle and the outputs kept for the next pass take at once.
    """

    passes: list[list[LayerInput]]
    replay: bool
    whole_bytes: int
    stored_bytes: int
    live_bytes: int

    def __str__(self) -> str:
        text = (
            f"{sum(map(len, self.passes))} distinct inputs, {show_bytes(self.stored_bytes)} as a file, "
            f"{show_bytes(self.live_bytes)} of memory, "
        )
        if len(self.passes) == 1:
            return text + "one pass"
        how = "each block runs about once" if self.replay else "each from the model's first block"
        return text + f"{len(self.passes)} passes instead of {show_bytes(self.whole_bytes)}, {how}"


def plan_passes(
    inputs: Sequence[LayerInput], dtype: torch.dtype, budget: int | None, output_bytes: int | None
) -> CollectionPlan:
    """Packs the inputs, in the model's order, into as few passes as a budget in bytes allows.

    Args:
        output_bytes: of one block's outputs for all prompts, or None where they cannot be replayed. They are kept if
            they take at most a quarter of the budget.

    Raises:
        ValueError: the widest input alone does not fit; the message names it and says what would do.
    """
    triangle = max(one.features * (one.features + 1) // 2 for one in inputs) * dtype.itemsize
    whole, stored = _bytes(inputs, dtype)
    # At the end every covariance in turn becomes a triangle.
    at_once = whole + triangle
    if budget is None or at_once <= budget:
        return CollectionPlan([list(inputs)], False, whole, stored, at_once)
    replay = output_bytes is not None and output_bytes <= budget // 4
    kept = output_bytes if replay and output_bytes is not None else 0
    available = budget - kept - triangle
    plain = [replace(one, held=False) for one in inputs]
    widest = max(plain, key=lambda one: one.features)
    if widest.bytes(dtype) > available:
        raise ValueError(
            f"max_memory is {show_bytes(budget)}, but the input of layer {widest.layers[0]} with {widest.features} "
            f"features needs {show_bytes(widest.bytes(dtype) + triangle + kept)} alone; give that much or leave it out"
        )
    passes = _packed(plain, dtype, available)
    with_held = _packed(inputs, dtype, available)
    # What can be told of held-out prompts is worth no further pass, and no refusal.
    if len(with_held) == len(passes) and all(one.bytes(dtype) <= available for one in inputs):
        passes = with_held
    whole, stored = _bytes([one for part in passes for one in part], dtype)
    most = max(sum(one.bytes(dtype) for one in part) for part in passes)
    return CollectionPlan(passes, replay, whole, stored, most + triangle + kept)


def _bytes(inputs: Sequence[LayerInput], dtype: torch.dtype) -> tuple[int, int]:
    """(of their covariances, of those as triangles)."""
    sizes = [one.bytes(dtype) for one in inputs]
    triangles = [size * (one.features + 1) // (2 * one.features) for one, size in zip(inputs, sizes, strict=True)]
    return sum(sizes), sum(triangles)


def _packed(inputs: Sequence[LayerInput], dtype: torch.dtype, available: int) -> list[list[LayerInput]]:
    """In their order, in as few passes as can be."""
    passes: list[list[LayerInput]] = []
    filled = 0
    for one in inputs:
        size = one.bytes(dtype)
        if not passes or filled + size > available:
            passes.append([])
            filled = 0
        passes[-1].append(one)
        filled += size
    return passes


def blocks_of(model: nn.Module, layers: Sequence[str]) -> list[nn.Module]:
    """The modules of the list that holds most of the layers: a transformer's blocks; empty if there is none."""
    best: tuple[int, list[nn.Module]] = (0, [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside = sum(layer.startswith(f"{name}.") for layer in layers)
            best = max(best, (inside, list(module)), key=lambda pair: pair[0])  # the outermost of equals
    return best[1]


def output_of(result: Any) -> torch.Tensor | None:
    """The hidden states that a block returned, alone or as the only entry of a tuple."""
    if isinstance(result, tuple) and len(result) == 1:
        result = result[0]
    return result if isinstance(result, torch.Tensor) else None


class Replay:
    """Runs of a model that begin behind a block, with what it returned for the same batch in an earlier run.

    The model's own forward calls every block, so that masks and positions are as ever; blocks that have been done
    return at once.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.done = self.next = 0
        self._outputs: dict[int, Any] = {}  # by batch, of block ``done − 1``
        self._kept: dict[int, Any] = {}  # the same for ``next − 1``

    def begin(self, done: int, following: int) -> None:
        """Of the runs to come the first ``done`` blocks need not run, and of those after them the first
        ``following``."""
        if done == self.next and done != self.done:
            self._outputs, self._kept = self._kept, {}
        self.done, self.next = done, following

    @property
    def keeps(self) -> bool:
        """Whether a run has an output to keep for those after it."""
        return self.next > self.done

    @contextmanager
    def run(self, batch: int, kept: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Within, the model runs on that batch; ``kept`` is called when its output is kept."""
        with ExitStack() as stack:
            if batch in self._outputs:
                stack.enter_context(self._skipping(_copied(self._outputs[batch])))
            if self.keeps:

                def keep(_module: nn.Module, _args: Any, result: Any) -> None:
                    if output_of(result) is not None:  # other results are not replayed
                        self._kept[batch] = _copied(result)
                    kept()

                handle = self.blocks[self.next - 1].register_forward_hook(keep)
                stack.callback(handle.remove)
            yield
        if self.keeps:
            self._outputs.pop(batch, None)

    @contextmanager
    def _skipping(self, result: Any) -> Iterator[None]:
        def passed(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if isinstance(result, tuple) else hidden

        skipped = self.blocks[: self.done]
        before = [block.__dict__.get("forward") for block in skipped]  # accelerate, too, puts one there
        try:
            for block in skipped:
                block.__dict__["forward"] = passed
            skipped[-1].__dict__["forward"] = lambda *args, **kwargs: result
            yield
        finally:
            for block, forward in zip(skipped, before, strict=True):
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = forward


def _copied(result: Any) -> Any:
    """A model may add to a block's output in place."""
    return (_copied(result[0]),) if isinstance(result, tuple) else result.clone()
