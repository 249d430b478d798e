"""The performance targets on CPUs, judged by code from a file of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .timing import Row, cpu_line, label

Values = dict[str, float]  # shape -> value
_STEP, _PREPARATION = "training_step", "preparation"


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


@dataclass(frozen=True)
class Target:
    """``value(rows of one shape by contestant, our contestant)``, whose geometric mean over the shapes of ``op`` that
    ``where`` selects is to be at least (or at most) ``wanted``; where it is a speed-up no shape may be below 0.95."""

    what: str
    against: str
    op: str
    where: Callable[[dict[str, Any]], bool]
    value: Callable[[dict[str, Row], str], float]
    wanted: float
    at_least: bool = True
    unit: str = "×"
    ours: str = "ours"

    def values(self, rows: list[Row], variant: str = "") -> Values:
        """By shape, of our contestant or a variant of it; shapes where one is missing or was refused are left out."""
        found = {}
        for shape, contestants in by_shape(rows, self.op, self.where).items():
            try:
                found[shape] = self.value(contestants, self.ours + variant)
            except KeyError:
                continue
        return found

    def met(self, rows: list[Row]) -> bool | None:
        """None if nothing was measured. A refused shape of ours is a miss."""
        values = list(self.values(rows).values())
        refused = any(
            r["refused"] for r in rows if r["op"] == self.op and r["contestant"] == self.ours and self.where(r["shape"])
        )
        if not values:
            return False if refused else None
        mean = geometric_mean(values)
        good = mean >= self.wanted and min(values) >= 0.95 if self.at_least else mean <= self.wanted
        return good and not refused


def by_shape(rows: list[Row], op: str, where: Callable[[dict[str, Any]], bool]) -> dict[str, dict[str, Row]]:
    """Shape -> contestant -> row, of those that have a number."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["op"] == op and row["refused"] is None and where(row["shape"]):
            found.setdefault(label(row["shape"]), {})[row["contestant"]] = row
    return found


def _speedup(baseline: str) -> Callable[[dict[str, Row], str], float]:
    return lambda rows, ours: rows[baseline]["seconds"] / rows[ours]["seconds"]


def _of_ideal(rows: dict[str, Row], ours: str) -> float:
    frozen = rows["frozen linear"]
    return rows[ours]["seconds"] / (frozen["seconds"] * (1 + frozen["rho"]))


def _of_flop_ratio(rows: dict[str, Row], ours: str) -> float:
    naive, mine = rows["dense P per token"], rows[ours]
    return (naive["seconds"] / mine["seconds"]) / (naive["flops"] / mine["flops"])


def _saved(rows: dict[str, Row], ours: str) -> float:
    return rows[ours]["saved"] / rows["PEFT LoRA"]["saved"]


def _of_peft(*keys: str) -> Callable[[dict[str, Row], str], float]:
    """What is counted, of what PEFT's LoRA takes."""
    return lambda rows, ours: sum(rows[ours][key] for key in keys) / sum(rows["PEFT LoRA"][key] for key in keys)


def _step_mode(rows: dict[str, Row], ours: str) -> float:
    return rows[ours.replace("ours", "ours, step mode")]["seconds"] / rows[ours]["seconds"]


def _long(dtype: str) -> Callable[[dict[str, Any]], bool]:
    """Targets hold from 256 tokens; fewer are shown and not judged."""
    return lambda shape: shape["dtype"] == dtype and shape["T"] >= 256


def _dtype(dtype: str) -> Callable[[dict[str, Any]], bool]:
    return lambda shape: shape["dtype"] == dtype


def _step(dtype: str, text: str) -> Callable[[dict[str, Any]], bool]:
    return lambda shape: shape["dtype"] == dtype and shape.get("text") == text


def _preparation(wide: bool | None = None) -> Callable[[dict[str, Any]], bool]:
    """In a wide model the eigendecompositions of the down-projections' inputs, which both ways need, take longest."""
    return lambda shape: wide is None or (shape["intermediate"] >= 4 * shape["hidden"]) == wide


def _plan_speedup(rows: dict[str, Row], ours: str) -> float:
    return rows["paper's way"]["plan"] / rows[ours]["plan"]


def _preparation_memory(rows: dict[str, Row], ours: str) -> float:
    naive = rows["paper's way"]
    return rows[f"{ours}, a quarter of the memory"]["peak"] / (naive["peak"] + naive["kept"])


def _matrix(shape: dict[str, Any]) -> bool:
    return "d" in shape


def _model(shape: dict[str, Any]) -> bool:
    return "blocks" in shape


#: Counts of a small layer, forward and backward, of those of PEFT's: our contestant, what is counted, at most. CI tests
#: them as well (python_tests/benchmarks/test_counting.py).
HOST = {
    ("ours", "instructions"): 0.80,
    ("ours, step mode", "instructions"): 0.65,
    ("ours", "calls"): 1.0,
    ("ours, step mode", "calls"): 1.0,
    ("ours", "launches"): 1.0,
    ("ours, step mode", "launches"): 1.0,
}
COUNTED = {"instructions": ("instructions",), "calls": ("aten", "kernels"), "launches": ("launches",)}


def _layer(dtype: str) -> Callable[[dict[str, Any]], bool]:
    return lambda shape: "layers" in shape and shape["dtype"] == dtype


def _host() -> list[Target]:
    layers = [
        Target(f"{what} of a small layer {dtype}{ours.removeprefix('ours')}", "PEFT's LoRA layer", "host",
               _layer(dtype), _of_peft(*COUNTED[what]), most, False, ours=ours)
        for (ours, what), most in HOST.items() for dtype in ("float32", "bfloat16")
    ]  # fmt: skip
    model = ("host", lambda shape: "model" in shape)
    return [
        *layers,
        Target("host time of a tiny model's step", "plain PEFT LoRA", *model, _of_peft("seconds"), 0.90, False),
        Target("instructions of a tiny model's step", "plain PEFT LoRA", *model, _of_peft("instructions"), 0.90, False),
    ]


def targets() -> list[Target]:
    both = ("bfloat16", "float32")
    lora, null = "projected_lora", "null_projection"
    eager = "`G.addmm_(G @ Q, Q.T, alpha=-1)`"
    return [
        *_host(),
        Target("covariance bfloat16", "`x.float()`, `addmm_`", "covariance", _long("bfloat16"),
               _speedup("addmm_ float32"), 4.2),
        Target("covariance bfloat16", "the paper's hook", "covariance", _long("bfloat16"),
               _speedup("paper's hook"), 4.5),
        Target("covariance float32", "`addmm_`", "covariance", _long("float32"), _speedup("addmm_ float32"), 2.0),
        *(Target(f"LoRA layer {d}", "frozen linear · (1 + ρ)", lora, _long(d), _of_ideal, 1.04, False) for d in both),
        *(Target(f"LoRA layer {d}", "plain LoRA", lora, _long(d), _speedup("plain LoRA"), 1.0) for d in both),
        Target("LoRA layer bfloat16", "PEFT's default", lora, _long("bfloat16"), _speedup("PEFT LoRA"), 1.4),
        *(Target(f"LoRA layer {d}", "dense P, of the FLOP ratio", lora, _long(d), _of_flop_ratio, 0.97) for d in both),
        Target("LoRA layer float32, own GEMM (optional)", "frozen linear alone", lora, _long("float32"),
               lambda rows, ours: rows[ours]["seconds"] / rows["frozen linear"]["seconds"], 0.95, False),
        Target("null projection", "`G @ P` dense", null, _matrix, _speedup("dense P"), 4.0),
        Target("null projection", eager, null, _matrix, _speedup("addmm_"), 1.5),
        Target("guard in an optimiser step, whole model", f"a loop of {eager}", null, _model, _speedup("addmm_"), 1.6),
        *(Target(f"q/k/v and gate/up of SmolLM2, fused, {d}", "the separate frozen linears", "fused_lora", _dtype(d),
                 lambda rows, ours: rows[ours]["seconds"] / rows["frozen linears"]["seconds"], 1.0, False)
          for d in both),
        Target("trailing subspace of a layer", "SVD, inverse and damping loop", "planning",
               lambda shape: "d_in" in shape, _speedup("paper's route"), 6.0),
        Target("plan of SmolLM2", "the paper's route", "planning",
               lambda shape: shape.get("model") == "SmolLM2-135M", _speedup("paper's route"), 4.0),
        Target("plan of one block of 1024/2816", "the paper's route", "planning",
               lambda shape: shape.get("model") == "one block of 1024/2816", _speedup("paper's route"), 2.5),
        Target("plan of Qwen2.5-0.5B's and Llama-3.2-1B's shapes", "the paper's route", "planning",
               lambda shape: shape.get("model") in ("Qwen2.5-0.5B", "Llama-3.2-1B"), _speedup("paper's route"), 2.5),
        *(Target(f"SmolLM2 step, {text}, {d}", "plain PEFT LoRA", _STEP, _step(d, text), _of_peft("seconds"), 0.92,
                 False) for d in both for text in ("demo", "packed")),
        *(Target(f"step mode, {op}", "forward mode", op, lambda _: True, _step_mode, 1.0, False)
          for op in (_STEP, "host")),
        *(Target(f"SmolLM2 step {d}", "naive GuardSpace", _STEP, _dtype(d), _speedup("naive GuardSpace"), wanted)
          for d, wanted in zip(both, (1.7, 1.9), strict=True)),
        Target("collecting statistics", "a bare forward", _PREPARATION, _preparation(),
               lambda rows, ours: rows[ours]["collect"] / rows[ours]["forward"], 1.25, False),
        Target("seconds of the plan of SmolLM2", "–", _PREPARATION, lambda shape: shape["model"] == "SmolLM2-135M",
               lambda rows, ours: rows[ours]["plan"], 8.0, False, " s"),
        Target("plan of a model", "the paper's way", _PREPARATION, _preparation(wide=False), _plan_speedup, 3.5),
        Target("plan of a model with wide down-projections", "the paper's way", _PREPARATION, _preparation(wide=True),
               _plan_speedup, 2.5),
        Target("memory of a preparation under a budget", "the paper's way", _PREPARATION, _preparation(),
               _preparation_memory, 0.25, False),
        *(Target(f"saved for backward, {what} {d}", "plain PEFT LoRA", op, where(d), _saved, 1.0, False)
          for what, op, where in (("LoRA layer", lora, _long), ("a layer of SmolLM2", _STEP, _dtype)) for d in both),
    ]  # fmt: skip


def guard_share(rows: list[Row]) -> Values:
    """The projections of a whole model's optimiser step over a training step, by the step's shape."""
    guard = [r["ours"]["seconds"] for r in by_shape(rows, "null_projection", _model).values() if "ours" in r]
    steps = by_shape(rows, _STEP, lambda shape: True)
    return {shape: guard[0] / r["ours"]["seconds"] for shape, r in steps.items() if guard and "ours" in r}


def report(rows: list[Row]) -> list[list[str]]:
    """Rows of the table *target | measured here*: geometric mean, worst shape, and the mean with a frozen residual."""
    lines = []
    for target in targets():
        values, sign = target.values(rows), "≥" if target.at_least else "≤"
        wanted, unit = f"{sign} {target.wanted:g}{target.unit}", target.unit
        if values:
            pick = min if target.at_least else max
            worst = pick(values, key=lambda shape: values[shape])
            frozen = target.values(rows, ", frozen residual")
            measured = [f"{geometric_mean(values.values()):.2f}{unit}", f"{values[worst]:.2f}{unit} ({worst})"]
            measured.append(f"{geometric_mean(frozen.values()):.2f}{unit}" if frozen else "–")
        else:
            measured = ["–", "–", "–"]
        verdict = {True: "met", False: "missed", None: "not measured"}[target.met(rows)]
        lines.append([target.what, target.against, wanted, *measured, verdict])
    shares = guard_share(rows)
    worst = max(shares, key=lambda shape: shares[shape], default="")
    lines.append(
        ["guard in an optimiser step, whole model", "a training step", "≤ 2%"]
        + ([f"{geometric_mean(shares.values()):.2%}", f"{shares[worst]:.2%} ({worst})", "–"] if shares else ["–"] * 3)
        + [("met" if shares[worst] <= 0.02 else "missed") if shares else "not measured"]
    )
    return lines


HEADER = ["what", "against", "target", "geometric mean", "worst shape", "frozen residual", ""]


def verdict(rows: list[Row], environment: dict[str, Any]) -> str:
    """What a training step on real prompts costs here, in one sentence; empty if none was measured."""
    text = {"demo": "the demo's batches", "packed": "8 × 128 tokens"}
    told = []
    for row in rows:
        shape = row["shape"]
        if row["op"] == _STEP and row["contestant"] == "ours" and row["refused"] is None and "text" in shape:
            plain = by_shape(rows, _STEP, lambda other, shape=shape: other == shape)[label(shape)].get("PEFT LoRA")
            if plain is not None:
                what = f"{text[shape['text']]}, {shape['dtype']}"
                told.append(f"{row['seconds'] / plain['seconds']:.2f}× ({what})")
    if not told:
        return ""
    return (
        f"On this CPU ({cpu_line(environment)}) a guarded training step takes {', '.join(told)} of plain LoRA's time."
    )
