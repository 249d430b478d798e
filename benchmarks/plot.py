"""``python -m benchmarks.plot FILE``: time against tokens, time against rank, and a bar per baseline, as PNG."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .targets import by_shape, geometric_mean
from .timing import Row, read_json

OURS = "#d62728"
#: One colour a contestant in every figure; ours is the only red.
COLOURS = {
    "ours": OURS, "ours, frozen residual": "#ff9896", "ours, step mode": "#e377c2",
    "frozen linear": "#7f7f7f", "plain LoRA": "#1f77b4", "PEFT LoRA": "#17becf", "folded eager": "#2ca02c",
    "folded addmm_": "#98df8a", "low-rank P per token": "#bcbd22", "dense P per token": "#8c564b",
    "naive GuardSpace": "#8c564b",
}  # fmt: skip
_OTHER = "#aec7e8"
_LINES = [name for name in COLOURS if name not in ("ours, step mode", "naive GuardSpace")]


def _most_common_layer(rows: list[Row]) -> dict[str, Any]:
    """The layer shape with the most rows; among equals that nearest to 2048 → 2048."""
    counts = Counter((row["shape"]["d_in"], row["shape"]["d_out"]) for row in rows)
    d_in, d_out = min(counts, key=lambda shape: (-counts[shape], abs(shape[0] - 2048) + abs(shape[1] - 2048)))
    return {"d_in": d_in, "d_out": d_out}


def lines(rows: list[Row], axis: str, fixed: dict[str, Any], title: str, path: Path) -> None:
    """Time of the LoRA layer against ``axis`` at the ``fixed`` rest of the shape, a panel per dtype."""
    lora = [row for row in rows if row["op"] == "projected_lora" and row["refused"] is None]
    dtypes = list(dict.fromkeys(row["shape"]["dtype"] for row in lora))
    figure, panels = plt.subplots(1, max(1, len(dtypes)), figsize=(10, 4.6), squeeze=False, layout="constrained")
    for panel, dtype in zip(panels[0], dtypes, strict=False):
        where = {**fixed, "dtype": dtype}
        chosen = [row for row in lora if all(row["shape"][key] == value for key, value in where.items())]
        ticks = sorted({row["shape"][axis] for row in chosen})
        for name in _LINES:
            points = sorted((row["shape"][axis], 1e3 * row["seconds"]) for row in chosen if row["contestant"] == name)
            if points:
                ours = name == "ours"
                panel.plot(*zip(*points, strict=True), color=COLOURS[name], label=name, marker="o", markersize=4,
                           linewidth=2.6 if ours else 1.4, zorder=3 if ours else 2)  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        if axis == "T":
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("")
        else:
            panel.set_ylim(bottom=0)
        panel.set(title=dtype, xlabel={"T": "tokens", "r": "rank r"}[axis], ylabel="forward + backward, ms")
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    _finish(figure, panels[0][0].get_legend_handles_labels(), path)


def bars(rows: list[Row], path: Path) -> None:
    """Per op and dtype: geometric mean over the shapes of each contestant's time, in units of ours."""
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for op, dtype in dict.fromkeys((row["op"], row["shape"]["dtype"]) for row in rows):
        shapes = by_shape(rows, op, lambda shape, dtype=dtype: shape["dtype"] == dtype and shape.get("T", 256) >= 256)
        ratios: dict[str, list[float]] = {}
        for contestants in shapes.values():
            for name, row in contestants.items() if "ours" in contestants else ():
                ratios.setdefault(name, []).append(row["seconds"] / contestants["ours"]["seconds"])
        if ratios:
            groups[op, dtype] = {name: geometric_mean(values) for name, values in ratios.items()}
    columns = min(2, len(groups))
    height = -(-len(groups) // columns)
    figure, panels = plt.subplots(height, columns, figsize=(11, 2.9 * height), squeeze=False, layout="constrained")
    for panel in panels.flat[len(groups) :]:
        panel.set_visible(False)
    for panel, ((op, dtype), means) in zip(panels.flat, groups.items(), strict=False):
        names = sorted(means, key=lambda name: -means[name])
        panel.axvline(1.0, color=OURS, linewidth=1, linestyle="--", zorder=0)
        drawn = panel.barh(names, [means[name] for name in names], color=[COLOURS.get(n, _OTHER) for n in names])
        labels = panel.bar_label(drawn, fmt="%.2f", padding=3)
        for text in labels:
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        panel.margins(x=0.12)
        panel.set(title=f"{op.replace('_', ' ')}, {dtype}", xlabel="time, ours = 1 (geometric mean over the shapes)")
    figure.suptitle("Every way of writing it")
    _finish(figure, ([], []), path)


def _finish(figure: Any, legend: tuple[list[Any], list[Any]], path: Path) -> None:
    if legend[0]:
        figure.legend(*legend, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Writes what the rows allow; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    lora = [row for row in rows if row["op"] == "projected_lora" and row["refused"] is None]
    if lora:
        layer = _most_common_layer(lora)
        name = f"LoRA layer {layer['d_in']} → {layer['d_out']}"
        rank = Counter(row["shape"]["r"] for row in lora).most_common(1)[0][0]
        tokens = min({row["shape"]["T"] for row in lora}, key=lambda T: abs(T - 1024))
        for axis, fixed, rest in (("T", {"r": rank}, f"rank {rank}"), ("r", {"T": tokens}, f"{tokens} tokens")):
            written.append(folder / {"T": "tokens.png", "r": "rank.png"}[axis])
            lines(rows, axis, {**layer, **fixed}, f"{name}, {rest}", written[-1])
    if any(
        row["refused"] is None and row["contestant"] == "ours" and row["shape"].get("T", 256) >= 256 for row in rows
    ):
        written.append(folder / "baselines.png")
        bars(rows, written[-1])
    return written


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="results of python -m benchmarks.run --out")
    parser.add_argument("--out", type=Path, help="folder of the figures; default: that of the first file")
    args = parser.parse_args(argv)
    for path in plot(read_json(args.files)["rows"], args.out or args.files[0].parent):
        print(path)


if __name__ == "__main__":
    main()
