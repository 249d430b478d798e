"""``python -m benchmarks.evidence run | report | curves``."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .cells import KNOBS, RESULTS, START, TIERS, Cell, missing, save
from .report import chosen_knobs, report


def seconds(text: str) -> float:
    """Of such as "150m", "2h" or "90s"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be such as 150m, 2h or 90s, got {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="work through the cells that are missing")
    run.add_argument("--budget", type=seconds, help="begin no cell after that time, e.g. 150m")
    run.add_argument("--tier", nargs="+", choices=TIERS, default=list(TIERS), help="of cells (default: all, in order)")
    run.add_argument("--method", nargs="+", metavar="NAME", help="these methods alone")
    run.add_argument("--threads", type=int, help="of PyTorch (default: all cores)")
    run.add_argument("--data", type=Path, metavar="FOLDER", help="with the AG News files of AsFT's repository")
    show = commands.add_parser("report", help="tables of the cells that are there, and figures")
    show.add_argument("--figures", type=Path, metavar="FOLDER", help="draw the figures there")
    curves = commands.add_parser("curves", help="refusals and drift against steps, into benchmarks/results")
    curves.add_argument("--threads", type=int, help="of PyTorch (default: all cores)")
    for command in (run, show):
        command.add_argument("--folder", type=Path, default=RESULTS, help="of the cells (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "report":
        print(report(options.folder))
        if options.figures:
            from .figures import draw

            draw(options.folder, options.figures)
        return 0
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.command == "curves":
        from .curves import run as run_curves
        from .running import Laboratory

        run_curves(Laboratory())
        return 0
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    from .running import Laboratory

    began, laboratory = time.monotonic(), Laboratory(options.data, options.folder)
    left = [one for one in missing(options.folder, options.tier) if not options.method or one.method in options.method]
    if options.data is None:
        left = [one for one in left if one.task != "agnews"]
    for number, one in enumerate(left, 1):
        if options.budget is not None and time.monotonic() - began > options.budget:
            print(f"the budget is spent; {len(left) - number + 1} cells are left")
            break
        if problem := not_ready(options.folder, one):
            print(f"{one} is not run: {problem}", file=sys.stderr)
            return 1
        started = time.monotonic()
        result = laboratory.run(one)
        path = save(options.folder, one, result)
        print(f"{number} of {len(left)}: {one}: {time.monotonic() - started:.0f} s, {path.name}", flush=True)
    return 0


def not_ready(folder: Path, one: Cell) -> str:
    """Why a cell must not be run yet; empty if it may be: its method's knob is not the one that was chosen."""
    if one.tuning or one.method == START:
        return ""
    chosen = chosen_knobs(folder).get(one.method)
    if chosen is None:
        return f"tier tune has not tried every knob of {one.method}"
    if chosen != KNOBS[one.method]:
        return f"tier tune chose {chosen:g} for {one.method}; set KNOBS in benchmarks/evidence/cells.py"
    return ""


if __name__ == "__main__":
    sys.exit(main())
