"""``python -m benchmarks.bench_preparation``: statistics and plan of a whole model, against the paper's way.

Each contestant runs in a process of its own: seconds, the largest resident set (VmHWM) above the loaded model, bytes on
disk. ``python -m benchmarks.run --targets FILE`` judges what ``--out`` stores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import guardspace_kernels as gk
from guardspace_kernels.guard.batches import evaluating, forward_batch
from guardspace_kernels.guard.estimate import Estimate, estimate_preparation
from guardspace_kernels.guard.layers import find_layers, linear_weight

from . import baselines
from .bench_planning import SHAPES, build_model
from .run import table
from .timing import Row, environment, write_json

OP = "preparation"
RANK, PROMPTS, BATCH = 16, 120, 8
#: Up to this width the paper's way solves every layer; of a wider model it solves one layer of each shape.
SOLVE_ALL = 2048
MODELS = ("SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B")
CONTESTANTS = ("ours", "ours, a quarter of the memory", "paper's way")
HEADER = [
    "model", "", "bare forward s", "collect s", "save s", "plan s", "memory above the model", "on disk",
    "estimate / measured",
]  # fmt: skip


def prompts(vocabulary: int, count: int = PROMPTS) -> list[Tensor]:
    """Random tokens behind the same first one, of the lengths of short requests in a chat template with an answer."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 46, (count,), generator=generator).tolist()
    rows = [torch.randint(1, vocabulary, (length,), generator=generator) for length in lengths]
    for row in rows:
        row[0] = 1
    return rows


def padded(rows: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    batches = []
    for i in range(0, len(rows), BATCH):
        part = rows[i : i + BATCH]
        ids = nn.utils.rnn.pad_sequence(list(part), batch_first=True, padding_side="left")
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True, padding_side="left")
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def run_contestant(name: str, contestant: str, blocks: int | None) -> dict[str, Any]:
    """In this process: the numbers of one contestant."""
    model = build_model(name, blocks)
    rows = prompts(model.config.vocab_size, 6 if name == "tiny" else PROMPTS)
    batches = padded(rows)

    def bare(part: Sequence[dict[str, Tensor]] = batches) -> None:
        with evaluating(model):
            for batch in part:
                forward_batch(model, batch)

    bare(batches[:1])
    _, first = _timed(bare)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, file) for file in ("statistics", "plan")]
        run = _paper if contestant.startswith("paper") else _ours
        result = run(model, rows, batches, files, contestant)
        peak = _resident("VmHWM") - before
        sizes = [os.path.getsize(file) for file in files if os.path.exists(file)]
    _, last = _timed(bare)  # before and after, so that a machine that slows down slows both sides of the ratio
    return {"forward": (first + last) / 2, "peak": peak, "disk": sum(sizes), **result}


def _ours(
    model: nn.Module, rows: list[Tensor], batches: list[dict[str, Tensor]], files: list[str], contestant: str
) -> dict[str, Any]:
    config = gk.GuardConfig(rank=2 if len(rows) < PROMPTS else RANK, protect=0.5 if len(rows) < PROMPTS else 0.99)
    budget = None
    if "quarter" in contestant:
        widths = [entry.features for entry in _inputs(model)]
        budget = max(sum(4 * d * d for d in widths) // 4, 7 * max(widths) ** 2)  # at least the widest and its triangle

    stats, collected = _timed(lambda: gk.collect_statistics(model, batches, progress=False, max_memory=budget))
    _, saved = _timed(lambda: stats.save(files[0]))
    if budget:
        stats = gk.CalibrationStatistics.load(files[0])
    plan, planned = _timed(
        lambda: gk.plan_guard(model, stats, config, progress=False, max_memory=budget, allow_few_prompts=True)
    )
    plan.save(files[1])
    return {"collect": collected, "save": saved, "plan": planned}


def _inputs(model: nn.Module) -> list[Any]:
    from guardspace_kernels.guard.collecting.scout import distinct_inputs

    return distinct_inputs(model, find_layers(model))


def _paper(
    model: nn.Module, rows: list[Tensor], batches: list[dict[str, Tensor]], files: list[str], contestant: str
) -> dict[str, Any]:
    """A covariance per layer, one prompt at a time; per layer an eigendecomposition, an inverse and a full SVD.

    Of a wide model one layer of each shape is solved and its time multiplied (``one_per_shape``); ``kept`` are the
    bytes of the projectors that were then not formed.
    """
    layers = find_layers(model)
    weights = {name: linear_weight(module).detach() for name, module in layers.items()}
    C = {name: torch.zeros(W.shape[1], W.shape[1]) for name, W in weights.items()}

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, args: baselines.cov_paper_hook(C[name], args[0].reshape(-1, args[0].shape[-1]))

    def collect() -> None:
        handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
        with evaluating(model):
            for row in rows:
                forward_batch(model, {"input_ids": row[None]})
        for handle in handles:
            handle.remove()

    rank = 2 if len(rows) < PROMPTS else RANK
    projectors = []  # of all layers: kept beside the covariances until the adapters are built, and saved like them

    def solve(name: str) -> None:
        projectors.append(baselines.null_space_paper(C[name]))
        baselines.trailing_paper(weights[name], C[name], rank)

    _, collected = _timed(collect)
    one_per_shape = max(W.shape[1] for W in weights.values()) > SOLVE_ALL
    of_shape: dict[tuple[int, ...], list[str]] = {}
    for name, W in weights.items():
        of_shape.setdefault(tuple(W.shape), []).append(name)
    seconds = 0.0
    for names in of_shape.values():
        solved = [names[len(names) // 2]] if one_per_shape else names
        seconds += sum(_timed(partial(solve, name))[1] for name in solved) * len(names) / len(solved)
    matrices = sum(c.nbytes for c in C.values())
    return {
        "collect": collected, "plan": seconds, "disk": 2 * matrices, "one_per_shape": one_per_shape,
        "kept": matrices - sum(P.nbytes for P in projectors),
    }  # fmt: skip


def _run_in_process(name: str, contestant: str, blocks: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_preparation", "--child", name, contestant]
    if blocks:
        command += ["--blocks", str(blocks)]
    here = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{contestant} on {name} failed:\n{done.stderr[-3000:]}")
    return row(name, contestant, blocks, json.loads(done.stdout.splitlines()[-1]))


def row(name: str, contestant: str, blocks: int | None, measured: dict[str, Any]) -> Row:
    """In the form of every other result; ``hidden`` and ``intermediate`` tell which target holds."""
    hidden, intermediate, depth, *_ = SHAPES.get(name, (576, 1536, 30))
    shape = {
        "model": name, "hidden": hidden, "intermediate": intermediate, "blocks": blocks or depth, "r": RANK,
        "dtype": "float32",
    }  # fmt: skip
    seconds = measured["collect"] + measured["plan"]
    return {"op": OP, "shape": shape, "contestant": contestant, "refused": None, "seconds": seconds, **measured}


def _estimate(name: str, blocks: int | None) -> Estimate:
    model = build_model(name, blocks) if name not in SHAPES else _on_meta(name, blocks)
    tokens = sum(map(len, prompts(1000)))
    return estimate_preparation(
        model, prompts=PROMPTS, tokens_per_prompt=round(tokens / PROMPTS), rank=RANK,
        dtype=torch.bfloat16 if name == "Llama-2-7B" else torch.float32,
    )  # fmt: skip


def _on_meta(name: str, blocks: int | None) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, blocks)


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def rows_of(rows: list[Row]) -> list[list[str]]:
    lines = []
    for r in rows:
        guess, shape = r.get("estimate"), r["shape"]
        whole = SHAPES.get(shape["model"], (0, 0, shape["blocks"]))[2] == shape["blocks"]
        lines.append([
            shape["model"] + ("" if whole else f", {shape['blocks']} blocks"),
            r["contestant"],
            f"{r['forward']:.3g}",
            f"{r['collect']:.3g} ({r['collect'] / r['forward']:.2f}×)",
            f"{r['save']:.3g}" if "save" in r else "–",
            f"{r['plan']:.3g}" + ("*" if r.get("one_per_shape") else ""),
            _size(r["peak"] + r.get("kept", 0)),
            _size(r["disk"]),
            ", ".join(f"{key} {guess[key] / r[key]:.2f}" for key in guess) if guess else "",
        ])  # fmt: skip
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_preparation", description=__doc__)
    parser.add_argument("--model", nargs="+", choices=("SmolLM2-135M", *SHAPES), default=list(MODELS))
    parser.add_argument("--contestant", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--blocks", type=int, help="of the random models: fewer than they have")
    parser.add_argument("--estimate-only", action="store_true", help="print estimates and run nothing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(run_contestant(*args.child, args.blocks)))
        return 0
    threads = torch.get_num_threads()
    result: dict[str, Any] = {"environment": environment(threads), "rows": []}
    for name in args.model:
        blocks = args.blocks if name in SHAPES else None
        guess = _estimate(name, blocks) if name != "tiny" else None
        if guess is not None:
            print(f"{name}: {guess}\n", flush=True)
        for contestant in [] if args.estimate_only else args.contestant:
            measured = _run_in_process(name, contestant, blocks)
            if guess is not None and contestant == "ours":
                measured["estimate"] = {"collect": guess.collect_seconds, "plan": guess.plan_seconds}
            result["rows"].append(measured)
            print(table(HEADER, rows_of(result["rows"]), True) + "\n", flush=True)
            if args.out:
                write_json(args.out, result)
    if any(one.get("one_per_shape") for one in result["rows"]):
        print("* extrapolated from one layer per shape; the projectors not formed are added to the memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
