"""The figure of an evaluation."""

from __future__ import annotations

import os

from guardspace_kernels.evaluate.rates import Rate
from guardspace_kernels.evaluate.report import EvaluationReport
from guardspace_kernels.guard.atomic import write_atomic

_INK, _FAINT, _GRID = "#30343b", "#9aa0a8", "#e6e7ea"


def draw(report: EvaluationReport, path: str | os.PathLike[str]) -> None:
    """A PNG, written atomically: each rate with its 95% interval, the base model's in grey; ModuleNotFoundError without
    matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(report)
    figure = Figure(figsize=(7.5, 1.3 + 0.42 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    base = dict(_rows(report.base)) if report.base is not None else {}
    for place, (name, rate) in enumerate(rows):
        for one, colour, shift in ((base.get(name), _FAINT, 0.14), (rate, "#2166ac", -0.14 if base else 0.0)):
            if one is not None:
                low, high = one.interval()
                axes.plot([100 * low, 100 * high], [place + shift] * 2, color=colour, linewidth=2)
                axes.plot([100 * one.value], [place + shift], "o", color=colour, markersize=7)
    for label, colour in (("model", "#2166ac"), *([("base model", _FAINT)] if base else [])):
        axes.plot([], [], "o-", color=colour, label=label)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set(xlim=(-2, 102), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xlabel("% of the prompts, with 95% Wilson intervals", color=_INK)
    axes.set_title(f"Greedy answers, judged by {report.judge}", loc="left", fontsize=10.5, color=_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(axis="x", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    if base:
        figure.legend(frameon=False, fontsize=9, loc="outside lower right", ncols=2)
    write_atomic(path, lambda file: figure.savefig(file, format="png", facecolor="white"))


def _rows(report: EvaluationReport) -> list[tuple[str, Rate]]:
    rows = [("refuses", report.refuses), ("complies", report.complies), ("other", report.other)]
    sources = report.by_source
    if len(sources) > 1:
        rows += [(f"refuses, {source}", rates["refuses"]) for source, rates in sources.items()]
    rows += [("refuses look-alikes", report.over_refuses), ("task right", report.task)]
    return [(name, rate) for name, rate in rows if rate.n]
