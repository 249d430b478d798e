"""The figure of an inspection."""

from __future__ import annotations

import os
from typing import Any

from guardspace_kernels.guard.atomic import write_atomic
from guardspace_kernels.guard.inspection import InputCapacity, Inspection

_INK, _FAINT, _GRID = "#30343b", "#9aa0a8", "#e6e7ea"
_COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#8073ac", "#b8860b", "#35978f")


def draw(report: Inspection, path: str | os.PathLike[str]) -> None:
    """A PNG, written atomically: what each level leaves, the spectra with the paper's threshold, and the sinks or, with
    other statistics, held-out prompts and the task. ModuleNotFoundError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _capacity(left, report)
    _spectra(middle, report)
    if report.inputs[0].task is not None or report.inputs[0].heldout is not None:
        _others(right, report)
    else:
        _sinks(right, report)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.grid(color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8.5)
    write_atomic(path, lambda file: figure.savefig(file, format="png", facecolor="white"))


def kinds(report: Inspection) -> dict[str, list[InputCapacity]]:
    """Inputs by the last names of the layers that read them, in the model's order."""
    found: dict[str, list[InputCapacity]] = {}
    for one in report.inputs:
        found.setdefault(", ".join(name.rsplit(".", 1)[-1] for name in one.layers), []).append(one)
    return found


def _levels(axes: Any, report: Inspection) -> list[int]:
    positions = list(range(len(report.levels)))
    axes.set_xticks(positions, [f"{level:g}" for level in report.levels])
    axes.set_xlabel("protect: share of the calibration energy", color=_INK)
    if report.recommended is not None:
        at = report.levels.index(report.recommended)
        axes.axvline(at, color=_FAINT, linewidth=1.2, linestyle=(0, (5, 3)))
    return positions


def _capacity(axes: Any, report: Inspection) -> None:
    x = _levels(axes, report)
    axes.plot(x, [100 * report.free(i) for i in x], color=_INK, linewidth=2.2, label="mean of all inputs")
    axes.plot(x, [100 * report.least(i) for i in x], color=_INK, linewidth=1, linestyle=":", label="least")
    for colour, (kind, inputs) in zip(_COLOURS, kinds(report).items(), strict=False):
        shares = [100 * sum(1 - one.protected[i] / one.features for one in inputs) / len(inputs) for i in x]
        axes.plot(x, shares, color=colour, linewidth=1.3, label=kind)
    axes.set_ylim(0, 102)
    axes.set_ylabel("dimensions left to learn with, %", color=_INK)
    advice = "" if report.recommended is None else f"; {report.recommended:g} recommended"
    axes.set_title(f"What protection costs{advice}", fontsize=11, color=_INK, loc="left")


def _spectra(axes: Any, report: Inspection) -> None:
    for colour, (kind, inputs) in zip(_COLOURS, kinds(report).items(), strict=False):
        for i, one in enumerate(inputs):
            x, y = zip(*((100 * rank, value) for rank, value in one.spectrum if value > 0), strict=True)
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35, label=None if i else kind)
    axes.axhline(1e-6, color=_INK, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.annotate("the paper's threshold", (0, 1e-6), (6, 4), textcoords="offset points", fontsize=8.5, color=_INK)
    axes.set_yscale("log")
    axes.set_ylim(1e-9, 2)
    axes.set_xlim(0, 100)
    axes.set_xlabel("eigenvectors of C, % of the dimensions", color=_INK)
    axes.set_ylabel("eigenvalue / largest", color=_INK)
    paper = sum(one.paper / one.features for one in report.inputs) / len(report.inputs)
    axes.set_title(f"The paper's threshold protects {paper:.0%} of the dimensions", fontsize=11, color=_INK, loc="left")


def _sinks(axes: Any, report: Inspection) -> None:
    for colour, (kind, inputs) in zip(_COLOURS, kinds(report).items(), strict=False):
        axes.plot(
            range(len(inputs)), [100 * one.sink_share for one in inputs], color=colour, marker="o", markersize=3,
            linewidth=1, label=kind,
        )  # fmt: skip
    axes.set_ylim(0, 102)
    axes.set_xlabel("block", color=_INK)
    axes.set_ylabel("first tokens' share of the energy, %", color=_INK)
    axes.set_title("The attention sink, kept out of C", fontsize=11, color=_INK, loc="left")


def _others(axes: Any, report: Inspection) -> None:
    x = _levels(axes, report)
    titles: list[str] = []
    axes.plot(x, [report.mean("outside", i) for i in x], color=_FAINT, linewidth=1.5, label="calibration: |Px|/|x|")
    if report.inputs[0].heldout is not None:
        held = [report.mean("heldout", i) for i in x]
        axes.plot(x, held, color=_COLOURS[0], linewidth=2, label="held-out harmful prompts: |Px|/|x|")
        if report.recommended is not None:
            titles.append(f"held-out {held[report.levels.index(report.recommended)]:.2f} outside")
        for prompts, value in report.prompt_curve:
            at = report.levels.index(report.recommended or report.levels[0])
            axes.plot([at], [value], marker="o", markersize=4, color=_COLOURS[0])
            axes.annotate(f"{prompts} prompts", (at, value), (6, 2), textcoords="offset points", fontsize=8, color=_INK)
    if report.inputs[0].task is not None:
        share = [report.mean("task", i) for i in x]
        axes.plot(x, share, color=_COLOURS[1], linewidth=2, label="task: share of the energy in reach")
        if report.recommended is not None:
            titles.append(f"task {share[report.levels.index(report.recommended)]:.0%} in reach")
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share outside the protected directions", color=_INK)
    axes.set_title(
        f"At {report.recommended:g}: {', '.join(titles)}" if titles else "", fontsize=11, color=_INK, loc="left"
    )
