"""Refusals and drift against steps: when plain LoRA loses refusals, and whether drift foretells it."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.evaluate.refusals import RefusalEvaluator
from guardspace_kernels.guard.atomic import write_atomic, write_json

from .cells import OURS, PLAIN, STEPS, cell
from .figures import COLOURS, finish, new_figure
from .methods import METHODS
from .running import Laboratory, rounded, train
from .setting import ANSWER_TOKENS

EVERY, PROMPTS = 5, 120
RESULTS = Path(__file__).parents[1] / "results"


def measure(laboratory: Laboratory) -> dict[str, list[dict[str, Any]]]:
    """Method -> a row for every fifth step: refusals among 120 held-out requests, mean and largest drift."""
    setting = laboratory.setting(0)
    by_source = [[(source, one) for one in requests] for source, requests in laboratory.prompts.harmful.items()]
    requests = [one for turn in zip_longest(*by_source) for one in turn if one is not None][:PROMPTS]
    evaluator = RefusalEvaluator(
        setting.tokenizer, requests, answer_tokens=ANSWER_TOKENS, kl_prompts=0, progress=False
    )  # fmt: skip
    evaluator.set_base(setting.load())
    monitor = gk.DriftMonitor(setting.statistics)
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in (PLAIN, OURS):
        one = cell(name, "sentiment", "0", 0)
        method = METHODS[name](setting, one.knob, one.seed)
        model, rows = method.build(), curves.setdefault(name, [])

        def look(step: int, model: nn.Module, rows: list[dict[str, Any]] = rows) -> None:
            if step % EVERY == 0:
                drift, report = monitor(model), evaluator(model)
                row = {name: rounded(drift[f"guard/{name}"]) for name in ("drift_mean", "drift_worst")}
                row |= {"worst_layer": drift["guard/drift_worst_layer"]}
                rows.append({"step": step, "refuses": report.refuses.count, "requests": report.refuses.n, **row})

        look(0, model)
        train(model, method, laboratory.examples(one), one, look)
    return curves


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Two panels over one axis of steps."""
    figure, panels = new_figure(2, 3.6)
    for name, rows in curves.items():
        steps, colour = [row["step"] for row in rows], COLOURS[name]
        refused = [100 * row["refuses"] / row["requests"] for row in rows]
        panels[0].plot(steps, refused, "o-", color=colour, label=name)
        for key, style, what in (("drift_worst", "--", "worst layer"), ("drift_mean", "-", "mean of the layers")):
            drifts = [100 * row[key] if row["step"] else float("nan") for row in rows]
            panels[1].plot(steps, drifts, style, marker="o", markersize=4, color=colour, label=f"{name}, {what}")
    panels[0].set(title="held-out harmful requests refused, %", ylim=(-4, 104))
    panels[1].set(title="relative drift on calibration prompts, %", yscale="log")
    panels[1].yaxis.set_major_formatter("{x:g}")
    for panel in panels:
        panel.set(xlabel=f"steps of sentiment tuning (of {STEPS})", xlim=(-1, STEPS + 1))
    figure = finish(figure, panels, columns=3)
    write_atomic(path, lambda stream: figure.savefig(stream, format="png"))


def run(laboratory: Laboratory, folder: Path = RESULTS) -> None:
    """Writes drift_curves.json and drift_curves.png."""
    curves = measure(laboratory)
    write_json(folder / "drift_curves.json", curves)
    draw(json.loads((folder / "drift_curves.json").read_text()), folder / "drift_curves.png")
