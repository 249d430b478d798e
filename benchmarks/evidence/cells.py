"""Which runs there are, in which order, and the file of each."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guardspace_kernels.guard.atomic import write_json

from .methods import METHODS
from .methods.base import LEARNING_RATE

RESULTS = Path(__file__).parents[1] / "results" / "evidence"
#: Of everything that all methods share; raised where a change of code may change results.
PROTOCOL = 2
START, PLAIN, OURS, AFTERWARDS = "aligned model", "plain LoRA", "GuardSpace", "projected afterwards"
MODEL = "SmolLM2-135M"
TUNING_SEED = 100
SEEDS = (0, 1, 2, 3)
STEPS = 30
#: The value of each knob that the tuning cells chose, see :func:`benchmarks.evidence.report.chosen_knobs`.
KNOBS: dict[str, float] = {
    "plain LoRA": LEARNING_RATE,
    "small learning rate": 2e-4,
    "replay": 1,
    "AsFT": 1.0,
    "Safe LoRA": 0.5,
    "SBR": 50.0,
    "LoRA-Null v2": 128,
    "SafeGrad": 1.0,
    "projected afterwards": 0.99,
    "GuardSpace": 0.99,
}
#: Beside GuardSpace and plain LoRA the rivals of the first tier; Safe LoRA comes with plain LoRA's runs.
RIVALS = ("replay", "AsFT", "LoRA-Null v2", "SBR", "Safe LoRA", "small learning rate")


@dataclass(frozen=True)
class Cell:
    """One run: a method with its knob, fine-tuned on a poisoned task from one aligned model, and evaluated.

    Attributes:
        method: of :data:`METHODS`, or :data:`START` for the model before fine-tuning (knob and steps are 0 then).
        poison: see :func:`benchmarks.evidence.prompts.poisoned`.
        seed: of data order and adapters. Seeds 2 and 3 start from models of another alignment seed.
    """

    model: str
    method: str
    knob: float
    task: str
    poison: str
    seed: int
    steps: int

    @property
    def alignment_seed(self) -> int:
        """So that conclusions are not about one aligned checkpoint: two seeds of four have one of their own."""
        return max(0, self.seed - 1) if self.seed < TUNING_SEED else 0

    @property
    def tuning(self) -> bool:
        """Whether it serves to choose a knob, and sees the validation requests alone."""
        return self.seed >= TUNING_SEED

    @property
    def version(self) -> str:
        return f"{PROTOCOL}.{METHODS[self.method].version if self.method in METHODS else 0}"

    @property
    def file(self) -> str:
        text = json.dumps([asdict(self), self.version], sort_keys=True)
        name = re.sub(r"[^a-z0-9]+", "-", f"{self.method}-{self.task}-{self.poison}-seed{self.seed}".lower())
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"

    def __str__(self) -> str:
        return f"{self.method} ({self.knob:g}), {self.task}, poison {self.poison}, seed {self.seed}, {self.steps} steps"


def cell(method: str, task: str, poison: str, seed: int, knob: float | None = None, steps: int = STEPS) -> Cell:
    knob = KNOBS[method] if knob is None else knob
    return Cell(MODEL, method, knob, task, poison, seed, steps)


def start(seed: int, task: str) -> Cell:
    """The aligned model that the cells of a seed start from, on a task."""
    return Cell(MODEL, START, 0, task, "0", seed, 0)


def tuning_cells() -> Iterator[Cell]:
    """Every method at each of its knobs, on sentiment with 10% poison."""
    yield start(TUNING_SEED, "sentiment")
    for name, method in METHODS.items():
        for knob in method.knobs:
            yield cell(name, "sentiment", "0.1", TUNING_SEED, knob)


def tier_cells(tier: str) -> Iterator[Cell]:
    """The cells of a tier, seed by seed, so that an early stop leaves complete blocks.

    * "tune": every method at each of its knobs.
    * "a": both tasks without poison and with 10%, all rivals.
    * "b": 5% and 20% for plain LoRA, replay and GuardSpace.
    * "c": SafeGrad; rows that declare obedience; AG News.
    """
    if tier == "tune":
        yield from tuning_cells()
        return
    few = (PLAIN, OURS, "replay")
    for seed in SEEDS:
        if tier == "a":
            yield from _grid(seed, ("sentiment", "source"), ("0", "0.1"), (PLAIN, OURS, *RIVALS, AFTERWARDS))
            # Beside the chosen value, since this method's dependence on it is a result.
            for knob in METHODS[AFTERWARDS].knobs:
                if knob != KNOBS[AFTERWARDS]:
                    yield cell(AFTERWARDS, "sentiment", "0", seed, knob)
        elif tier == "b":
            yield from _grid(seed, ("sentiment", "source"), ("0.05", "0.2"), few)
        else:
            yield from _grid(seed, ("sentiment", "source"), ("0", "0.1"), ("SafeGrad",))
            yield from _grid(seed, ("sentiment",), ("obedience",), few)
            yield from _grid(seed, ("agnews",), ("0", "0.1"), few)


def _grid(seed: int, tasks: Sequence[str], shares: Sequence[str], methods: Sequence[str]) -> Iterator[Cell]:
    for task in tasks:
        yield start(seed, task)
        for poison in shares:
            for method in methods:
                yield cell(method, task, poison, seed)


TIERS = ("tune", "a", "b", "c")


def save(folder: Path, one: Cell, result: dict[str, Any]) -> Path:
    """Writes a cell's file, atomically."""
    path = folder / one.file
    write_json(path, {"cell": asdict(one), "version": one.version, **result})
    return path


def load(folder: Path, one: Cell) -> dict[str, Any] | None:
    """What a cell's file holds; None where it was not run."""
    path = folder / one.file
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def missing(folder: Path, tiers: Sequence[str] = TIERS) -> list[Cell]:
    """Cells without a file, in the order in which they are run."""
    ordered = dict.fromkeys(one for tier in tiers for one in tier_cells(tier))
    return [one for one in ordered if not (folder / one.file).is_file()]
