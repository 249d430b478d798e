"""``python -m benchmarks.run``: checks every contestant in float64, times them by turns, prints and stores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import (
    bench_covariance,
    bench_fused_lora,
    bench_host,
    bench_null_projection,
    bench_planning,
    bench_projected_lora,
    bench_training_step,
)
from . import targets as goals
from .timing import CPU, Row, cpu_line, environment, label, measure, peaks, read_json, write_json

MODULES = {
    m.OP: m
    for m in (
        bench_training_step,
        bench_host,
        bench_projected_lora,
        bench_covariance,
        bench_fused_lora,
        bench_null_projection,
        bench_planning,
    )
}
DTYPES = ("bfloat16", "float32")
#: What is measured on a GPU: single ops.
ON_GPU = ("covariance", "projected_lora", "fused_lora", "null_projection")
#: Speed-ups are told over these two: the plain PyTorch form that a competent person writes, and the naive one.
YARDSTICKS = {
    "covariance": ("addmm_ float32", "paper's hook"),
    "projected_lora": ("folded eager", "dense P per token"),
    "fused_lora": ("ours, apart", "frozen linears"),
    "null_projection": ("addmm_", "dense P"),
    "planning": ("paper's route",),
    "training_step": ("PEFT LoRA", "naive GuardSpace"),
    "host": ("PEFT LoRA", "frozen linear"),
}
#: Seconds of alternation per case and fewest rounds.
EFFORT = {"tiny": (0.0, 2), "quick": (2.0, 5), "default": (2.0, 5), "full": (10.0, 7)}


def table(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    if markdown:
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *rows)
    )


def case_table(rows: list[Row], markdown: bool) -> str:
    """The contestants of one case."""
    op = rows[0]["op"]
    numbers = {row["contestant"]: row for row in rows if row["refused"] is None}
    yardsticks = [name for name in YARDSTICKS[op] if any(row["contestant"] == name for row in rows)]
    facts = [key for key in _FACTS if any(key in row for row in rows)]
    shares = ("of_peak", "of_bandwidth") if any(row.get("bytes") for row in rows) else ()
    header = [label(rows[0]["shape"]), "ms", "quartiles", *(f"× {name}" for name in yardsticks)]
    header += [*(_SHARES[key] for key in shares), "error", *(key.replace("_", " ") for key in facts)]
    if any(row["refused"] for row in rows):
        header.append("refused")
    beside = numbers.get(yardsticks[0], {}) if yardsticks else {}
    lines = []
    for row in rows:
        error = "–" if row["error"] is None else f"{row['error']:.0e}"
        if row["refused"] is not None:
            blank = ["–"] * (2 + len(yardsticks) + len(shares))
            lines.append([row["contestant"], *blank, error, *["–"] * len(facts), row["refused"]])
            continue
        low, high = (1e3 * q for q in row["quartiles"])
        line = [row["contestant"], f"{1e3 * row['seconds']:.3g}", f"{low:.3g}–{high:.3g}"]
        for name in yardsticks:
            line.append(f"{numbers[name]['seconds'] / row['seconds']:.2f}" if name in numbers else "–")
        line += [*(f"{row[key]:.0%}" for key in shares), error]
        line += [_fact(key, row, beside) for key in facts]
        lines.append([*line, *[""] * (len(header) - len(line))])
    return table(header, lines, markdown)


_SHARES = {"of_peak": "of peak", "of_bandwidth": "of copy"}
_FACTS: dict[str, Callable[[float], str]] = {
    "fastest": lambda value: f"{1e3 * value:.3g} ms",
    "tokens/s": lambda value: f"{value:.0f}",
    **dict.fromkeys(("saved", "saved_model", "peak_memory"), lambda value: _bytes(value)),
    **dict.fromkeys(("protected", "share"), lambda value: f"{value:.0%}"),
    "energy": lambda value: f"{value:.4f}",
    "leak": lambda value: f"{value:.0e}",
    "instructions": lambda value: f"{value / 1e3:.0f} k",
    **dict.fromkeys(("aten", "launches", "kernels", "python"), lambda value: f"{value:.0f}"),
}
_OF_YARDSTICK = ("instructions", "aten", "launches", "python")


def _fact(key: str, row: Row, yardstick: Row) -> str:
    if key not in row:
        return "–"
    share = key in _OF_YARDSTICK and yardstick.get(key)
    return _FACTS[key](row[key]) + (f" ({row[key] / share:.2f})" if share else "")


def _bytes(value: float) -> str:
    return f"{value / 2**20:.1f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"


def targets_table(rows: list[Row], markdown: bool) -> str:
    return table(goals.HEADER, goals.report(rows), markdown)


def comparison(new: list[Row], old: list[Row], markdown: bool) -> str:
    """Old time over new time, row by row, and their geometric means: above 1 is faster now."""

    def times(rows: list[Row]) -> dict[tuple[str, str, str], float]:
        return {(r["op"], r["contestant"], label(r["shape"])): r["seconds"] for r in rows if r["refused"] is None}

    now, before = times(new), times(old)
    ratios = {key: before[key] / now[key] for key in now if key in before}
    lines = [[*key, f"{1e3 * before[key]:.3g}", f"{1e3 * now[key]:.3g}", f"{r:.2f}"] for key, r in ratios.items()]
    for op, contestant in dict.fromkeys(key[:2] for key in ratios):
        mean = goals.geometric_mean(r for key, r in ratios.items() if key[:2] == (op, contestant))
        lines.append([op, contestant, "geometric mean", "", "", f"{mean:.2f}"])
    return table(["op", "contestant", "shape", "ms before", "ms now", "× faster"], lines, markdown)


def chosen_cases(
    size: str, ops: list[str], dtypes: tuple[str, ...], containing: str
) -> dict[str, list[dict[str, Any]]]:
    """The cases of each op whose label has ``containing`` in it; ValueError where no op has any."""
    cases = {op: list(MODULES[op].cases(size, dtypes)) for op in ops}
    chosen = {op: [case for case in all_ if containing in label(case)] for op, all_ in cases.items()}
    if not any(chosen.values()):
        labels = "; ".join(label(case) for all_ in cases.values() for case in all_)
        raise ValueError(f"{containing!r} is in the label of no case; with this size and these ops there are: {labels}")
    return chosen


def run(
    size: str,
    ops: list[str],
    dtypes: tuple[str, ...],
    threads: int,
    out: Path | None,
    markdown: bool,
    device: torch.device = CPU,
    only: list[str] | None = None,
    containing: str = "",
    rounds: int | None = None,
) -> dict[str, Any]:
    """Measures, prints, and returns what it writes into ``out`` after every case: an interrupted run leaves that.

    Of the cases those whose label has ``containing`` in it. With ``rounds`` each is called so often, not at least.
    """
    chosen = chosen_cases(size, ops, dtypes, containing)
    result: dict[str, Any] = {"environment": environment(threads, device), "size": size}
    load = result["environment"]["load"]
    if load is not None and load > 0.5:
        print(f"warning: load average {load:.2f} before the start; the machine is not idle", file=sys.stderr)
    torch.set_num_threads(threads)
    result["peaks"] = peaks(threads, small=size == "tiny", device=device)
    rows: list[Row] = []
    result["rows"] = rows
    env, found = result["environment"], result["peaks"]
    print(f"{env.get('gpu', cpu_line(env))}, torch {torch.__version__}, {'; '.join(env['backends'])}")
    rates = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in found["flops"].items())
    print(f"peak: {rates} ({found['flops_source']}); copy {found['copy'] / 1e9:.1f} GB/s")
    budget, least = EFFORT[size]
    for op in filter(chosen.get, ops):
        torch.set_num_threads(getattr(MODULES[op], "THREADS", threads))
        print(f"\n{'## ' if markdown else ''}{op}", flush=True)
        for params in chosen[op]:
            with device:
                case = MODULES[op].build(**params)
            fewest = min(least, getattr(MODULES[op], "ROUNDS", least))
            if size != "tiny":
                fewest = max(fewest, getattr(MODULES[op], "LEAST_ROUNDS", 0))
            most = rounds or (2 if size == "tiny" else 50)
            measured = measure(case, found, device, only, budget=budget, least=rounds or fewest, most=most)
            del case
            rows += measured
            if measured:
                print("\n" + case_table(measured, markdown), flush=True)
            if out is not None:
                write_json(out, result)
    return result


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", help="two shapes an op: minutes")
    sizes.add_argument(
        "--full", dest="size", action="store_const", const="full", help="every shape of the targets: hours"
    )
    sizes.add_argument("--tiny", dest="size", action="store_const", const="tiny", help=argparse.SUPPRESS)
    parser.add_argument("--op", nargs="+", choices=MODULES, help="default: all; on a GPU " + ", ".join(ON_GPU))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants that are timed, such as 'plain LoRA'")
    parser.add_argument("--case", default="", metavar="TEXT", help="cases whose label has TEXT in it, as 'd_in=576'")
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help="calls of each contestant; with 1 that alone, not warmed up"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file of the results, such as benchmarks/results/NAME.json")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="against the results of an earlier run")
    parser.add_argument("--targets", type=Path, nargs="+", metavar="FILE", help="measure nothing; judge these results")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    args = parser.parse_args(argv)
    device, ops = torch.device(args.device), args.op or list(ON_GPU if args.device == "cuda" else MODULES)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device; `make bench` measures the CPU")
    if device.type == "cuda" and (elsewhere := [op for op in ops if op not in ON_GPU]):
        parser.error(f"--op {' '.join(elsewhere)}: measured on the CPU only; on a GPU {', '.join(ON_GPU)}")
    before = read_json([args.compare])["rows"] if args.compare else None
    if args.targets:
        result = read_json(args.targets)
    else:
        size, dtypes = args.size or "default", tuple(args.dtype)
        try:
            chosen_cases(size, ops, dtypes, args.case)
        except ValueError as error:
            parser.error(f"--case: {error}")
        result = run(
            size, ops, dtypes, args.threads, args.out, args.markdown, device, args.only, args.case, args.rounds
        )
    rows = result["rows"]
    print("\n" + targets_table(rows, args.markdown))
    if before is not None:
        print("\n" + comparison(rows, before, args.markdown))
    if told := goals.verdict(rows, result.get("environment", {})):
        print("\n" + told)
    return 1 if any(row["refused"] for row in rows if row["contestant"].startswith("ours")) else 0


if __name__ == "__main__":
    sys.exit(main())
