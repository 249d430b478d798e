"""Figures of the cells that there are: safety–utility plane, refusals against poison and drift, contrasts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from guardspace_kernels.guard.atomic import write_atomic

from .cells import KNOBS, OURS, PLAIN
from .report import Condition, conditions, contrasts, held_out, share
from .statistics import Outcomes, mean

#: One colour a method in every figure; ours is the only red.
COLOURS = {
    PLAIN: "#1f77b4", OURS: "#d62728", "replay": "#2ca02c", "AsFT": "#9467bd", "LoRA-Null v2": "#8c564b",
    "SBR": "#e377c2", "Safe LoRA": "#bcbd22", "small learning rate": "#17becf", "projected afterwards": "#ff7f0e",
    "SafeGrad": "#7f7f7f",
}  # fmt: skip
_INK, _GRID = "#30343b", "#e6e7ea"


def draw(folder: Path, target: Path) -> list[Path]:
    """Draws each figure that has cells into `target`; returns the files."""
    every = [one for one in conditions(folder) if one.runs]
    found = [one for one in every if one.knob == KNOBS[one.method] and one.poison != "obedience"]
    files = []
    for name, figure in (
        ("plane", _plane(found)),
        ("poison", _poison(found)),
        ("drift", _drift(every)),
        ("contrasts", _forest(folder)),
    ):
        if figure is not None:
            files.append(target / f"{name}.png")
            write_atomic(files[-1], lambda stream, figure=figure: figure.savefig(stream, format="png"))
    return files


def new_figure(panels: int, height: float = 4.4) -> tuple[Figure, Sequence[Any]]:
    """A figure with so many panels in a row."""
    figure = Figure(figsize=(1.2 + 5.0 * panels, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def finish(figure: Figure, panels: Sequence[Any], columns: int = 5) -> Figure:
    """The same look for all, with one legend below."""
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=_INK, labelsize=9)
        panel.grid(color=_GRID, linewidth=0.7)
        panel.set_axisbelow(True)
    handles = {label: h for panel in panels for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _tasks(found: Sequence[Condition]) -> list[str]:
    return list(dict.fromkeys(one.task for one in found))


def _bootstrap_means(*outcomes: Outcomes, resamples: int = 400) -> np.ndarray:
    """(resamples, outcomes): means with prompts and seeds resampled; seeds together, prompts of each apart."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(resamples):
        seeds = rng.integers(len(outcomes[0]), size=len(outcomes[0]))
        rows.append([mean(one[seeds][:, rng.integers(one.shape[1], size=one.shape[1])]) for one in outcomes])
    return np.array(rows)


def _plane(found: Sequence[Condition]) -> Figure | None:
    """Refusals kept against task accuracy: an ellipse at the smallest share of poison, an arrow to the largest."""
    tasks = _tasks(found)
    if not tasks:
        return None
    figure, panels = new_figure(len(tasks))
    for panel, task in zip(panels, tasks, strict=True):
        for method in dict.fromkeys(one.method for one in found if one.task == task):
            by_poison = {float(one.poison): one for one in found if (one.task, one.method) == (task, method)}
            first = by_poison[min(by_poison)]
            drawn = 100 * _bootstrap_means(first.right(), first.kept)
            centre = 100 * mean(first.right()), 100 * mean(first.kept)
            values, vectors = np.linalg.eigh(np.cov(drawn.T))
            width, height = 2 * np.sqrt(5.99 * np.maximum(values, 1e-6))
            angle = float(np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0])))
            colour = COLOURS[method]
            panel.add_patch(Ellipse(centre, width, height, angle=angle, color=colour, alpha=0.18, linewidth=0))
            panel.plot(*centre, "o", color=colour, markersize=6, label=method)
            if len(by_poison) > 1:
                last = by_poison[max(by_poison)]
                end = 100 * mean(last.right()), 100 * mean(last.kept)
                panel.annotate("", end, centre, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.4})
        panel.set(xlabel="task accuracy, %", ylim=(-4, 104), title=task)
    panels[0].set_ylabel("refusals kept, %", color=_INK)
    figure.suptitle("The smallest share of poison, with 95% ellipses; arrows lead to the largest", fontsize=10)
    return finish(figure, panels)


def _poison(found: Sequence[Condition]) -> Figure | None:
    """Refusals kept against the share of poison, with 95% bands, for methods with more than one share."""
    tasks = _tasks(found)
    lines = {
        (task, method): sorted((float(one.poison), one) for one in found if (one.task, one.method) == (task, method))
        for task in tasks
        for method in COLOURS
    }
    lines = {key: line for key, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    figure, panels = new_figure(len(tasks))
    for panel, task in zip(panels, tasks, strict=True):
        for (of, method), line in lines.items():
            if of != task:
                continue
            shares = [100 * poison for poison, _ in line]
            bands = [np.quantile(100 * _bootstrap_means(one.kept), (0.025, 0.975)) for _, one in line]
            colour = COLOURS[method]
            panel.plot(shares, [100 * mean(one.kept) for _, one in line], "o-", color=colour, label=method)
            panel.fill_between(shares, *zip(*bands, strict=True), color=colour, alpha=0.15, linewidth=0)
        panel.set(xlabel="rows that are agreeing stubs, %", ylim=(-4, 104), title=task)
    panels[0].set_ylabel("refusals kept, %", color=_INK)
    return finish(figure, panels)


def _drift(found: Sequence[Condition]) -> Figure | None:
    """A dot a run: refusals against the mean drift of the layers on calibration tokens."""
    if not found:
        return None
    figure, panels = new_figure(1)
    for method in dict.fromkeys(one.method for one in found):
        runs = [run for one in found if one.method == method for run in one.runs.values()]
        drifts = [sum(map(float, run["drift"].values())) / len(run["drift"]) for run in runs]
        panels[0].plot(
            drifts, [100 * share(held_out(run)) for run in runs], "o", color=COLOURS[method], alpha=0.7,
            markersize=5, label=method,
        )  # fmt: skip
    panels[0].set_xscale("log")
    panels[0].set(
        xlabel="mean relative drift of the layers on calibration prompts", ylabel="held-out requests refused, %",
        ylim=(-4, 104), title="Does the certificate predict behaviour? A dot a run",
    )  # fmt: skip
    return finish(figure, panels, columns=3)


def _forest(folder: Path) -> Figure | None:
    """GuardSpace minus each method, refusals kept, with unadjusted 95% intervals; a row a method and condition."""
    rows = [
        (f"{one.rival}, {one.task}, poison {poison}", one)
        for poison in ("0.1", "0")
        for one in contrasts(folder, poison)
    ]
    if not rows:
        return None
    figure, panels = new_figure(1, height=1.2 + 0.26 * len(rows))
    for place, (_, one) in enumerate(rows):
        low, high = one.kept.interval
        colour = COLOURS[one.rival]
        panels[0].plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2)
        panels[0].plot([100 * one.kept.estimate], [place], "o", color=colour, markersize=6)
    panels[0].axvline(0, color=_INK, linewidth=0.8)
    panels[0].set_yticks(range(len(rows)), [label for label, _ in rows])
    panels[0].set(
        ylim=(len(rows) - 0.5, -0.5), xlabel="points of refusals kept, GuardSpace minus method",
    )  # fmt: skip
    return finish(figure, panels)
