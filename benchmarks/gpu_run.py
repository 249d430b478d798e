"""``python -m benchmarks.gpu_run``: all that a short time on a GPU is to tell, in order of importance.

Every step is a process of its own with a time limit of its own, so that one that hangs or dies loses none of the
others, and a step that is stopped keeps the rows that it has written. Results go to ``--out`` ($OUT): ``gpu_run.json``
with how each step ended, and a file for each step. To be committed they are copied to ``benchmarks/results/CHIP``;
``truth.json`` there tells the next run which tests passed, and on which sources.

* truth: the tests of the marker gpu, first those that did not pass the last time or concern what changed since.
* training: steps of models of four blocks, guarded and not (``gpu_training.py``).
* layers: what a layer, a covariance and a projection take on the device and of the host (``gpu_kernels.py``).
* tuning: tiles of the kernels, and from which sizes on the library's product is taken (``gpu_tuning.py``).
* ncu: counters of the two slowest kernels of ours.

``--smoke`` runs all of it in tiny sizes on the CPU. The CUDA kernels must be built before (``GUARDSPACE_CUDA=1``), or
be brought along as ``guardspace_kernels/_cuda.so``, LoRAFusion as ``build/lorafusion``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .timing import commit, read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
#: Seconds. Together with what starting takes they stay below ten minutes.
LIMITS = {"truth": 150, "training": 120, "layers": 90, "tuning": 120, "ncu": 40}
#: Of its limit a step keeps so many seconds to end by itself.
_GRACE = 6

Row = dict[str, Any]


class Record:
    """The rows of a step, on the disk as soon as they are known, and until when it may go on."""

    def __init__(self, path: Path, seconds: float, **head: Any) -> None:
        self.path, self.head, self.rows = path, head, list[Row]()
        self.until = time.monotonic() + seconds
        self.write()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
        self.write()

    def write(self) -> None:
        write_json(self.path, {**self.head, "rows": self.rows})

    def left(self) -> float:
        return self.until - time.monotonic()

    def attempt(self, row: Row, measured: Callable[[], Row], least: float = 1.0) -> None:
        """Adds ``row`` and what ``measured`` gives, or why it gives nothing; not with less than ``least`` seconds."""
        if self.left() < least:
            self.add({**row, "left_out": "no time was left"})
            return
        try:
            found = measured()
        except Exception as error:  # whatever one raises, the others go on
            found = {"failed": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
        self.add({**row, **found})


def run_step(name: str, command: Sequence[str], limit: float, out: Path) -> Row:
    """Runs one in a session of its own, all of which ends at the limit."""
    out.mkdir(parents=True, exist_ok=True)
    log, start = out / f"{name}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    ended = "ok" if code == 0 else f"stopped after {limit:g} s" if code is None else f"exit {code}"
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    return {"step": name, "ended": ended, "seconds": round(time.monotonic() - start, 1), "tail": tail}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu_run"))
    parser.add_argument("--steps", default=",".join(LIMITS), help="of these only, with commas")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--step", choices=LIMITS, help=argparse.SUPPRESS)  # the process of one
    args = parser.parse_args(argv)
    if unknown := set(args.steps.split(",")) - LIMITS.keys():
        parser.error(f"unknown steps {sorted(unknown)}; there are {', '.join(LIMITS)}")
    if args.step:
        if args.smoke:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return _STEPS[args.step](args.out, LIMITS[args.step] - _GRACE, args.smoke)
    done: list[Row] = []
    for name in args.steps.split(","):
        command = [sys.executable, "-m", "benchmarks.gpu_run", "--step", name, "--out", str(args.out.resolve())]
        done.append(run_step(name, [*command, *(["--smoke"] if args.smoke else [])], LIMITS[name], args.out))
        print("{step}: {ended}, {seconds} s".format(**done[-1]), flush=True)
        write_json(args.out / "gpu_run.json", {**_where(), "smoke": args.smoke, "rows": done})
    return 0 if all(row["ended"] == "ok" for row in done) else 1


def _where() -> Row:
    """The machine, without a look through CUDA, which would take the GPU's memory beside the steps."""
    query = "--query-gpu=name,driver_version,clocks.max.sm,power.limit"
    gpu = "none"
    if shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
        gpu = done.stdout.strip() or "none"
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "peft")}
    return {
        "gpu": gpu,
        "commit": commit(),
        "python": sys.version.split()[0],
        **versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# ---- truth


#: What the sources below a folder do -> words in the names of the tests that concern it.
TOPICS = {
    "guardspace_kernels/ops/covariance": ("covariance", "drift", "statistics", "masked"),
    "guardspace_kernels/ops/null_projection": ("project", "step_mode", "graph"),
    "guardspace_kernels/ops/projected_lora": ("lora", "layer", "dropout", "base_product", "autocast", "graph"),
    "guardspace_kernels/ops/_": ("kernels", "graph", "compiles", "alignment"),
    "guardspace_kernels/guard": ("statistics", "subspace", "null_space", "certificate", "planning", "adapter"),
    "guardspace_kernels/integrations": ("step_mode", "adapter", "resumes"),
    "guardspace_kernels/nn": ("lora", "layer"),
    "csrc/cuda": ("[cuda", "-cuda"),
}


def sources() -> dict[str, str]:
    """Path -> a hash, of what the tests run."""
    files = [path for folder in ("guardspace_kernels", "csrc/cuda", "python_tests/gpu") for path in _files(folder)]
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(files)}


def _files(folder: str) -> Iterator[Path]:
    return (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".h"))


def urgency(test: str, passed: set[str], changed: Sequence[str]) -> int:
    """0 for a test that did not pass the last time, 1 for one that concerns what changed since, 2 for the others."""
    if test not in passed:
        return 0
    words = {word for folder, words in TOPICS.items() for word in words if any(p.startswith(folder) for p in changed)}
    return 1 if any(word in test for word in words) or test.split("::")[0] in changed else 2


class _Tests:
    """A plugin of pytest: the order, and a row as soon as a test has ended."""

    def __init__(self, record: Record, last: Row) -> None:
        self.record = record
        self.passed = {row["test"] for row in last.get("rows", []) if row["outcome"] == "passed"}
        now, before = record.head["sources"], last.get("sources", {})
        self.changed = [path for path, hash_ in now.items() if before.get(path) != hash_]

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: urgency(item.nodeid, self.passed, self.changed))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        self.record.add(row if report.outcome != "failed" else {**row, "why": report.longreprtext[-2000:]})
        if self.record.left() < 0:
            import pytest

            pytest.exit("no time is left", returncode=0)


def truth(out: Path, seconds: float, smoke: bool) -> int:
    import pytest
    import torch

    last = _last("truth.json")
    record = Record(out / "truth.json", seconds, sources=sources())
    arguments = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu", "python_tests/gpu"]
    if smoke:
        os.environ["GUARDSPACE_TEST_DEVICE"] = "cpu"
        arguments += ["-k", "test_squared_drift or base_product"]
    elif not torch.cuda.is_available():
        print("torch.cuda.is_available() is False")
        return 1
    code = pytest.main(arguments, plugins=[_Tests(record, last)])
    return int(code)


def _last(name: str) -> Row:
    """That of the newest run whose results were committed; empty if there is none."""
    found = sorted((ROOT / "benchmarks" / "results").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    return read_json(found[-1:]) if found else {}


# ---- the other steps


def _training(out: Path, seconds: float, smoke: bool) -> int:
    from . import gpu_training

    gpu_training.run(Record(out / "training.json", seconds), smoke)
    return 0


def _layers(out: Path, seconds: float, smoke: bool) -> int:
    from . import gpu_kernels

    gpu_kernels.run(Record(out / "layers.json", seconds), smoke)
    return 0


def _tuning(out: Path, seconds: float, smoke: bool) -> int:
    if smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from . import gpu_tuning

    gpu_tuning.run(Record(out / "tuning.json", seconds), smoke)
    return 0


def _ncu(out: Path, seconds: float, smoke: bool) -> int:
    record = Record(out / "ncu.json", seconds)
    layers = read_json([out / "layers.json"])["rows"] if (out / "layers.json").exists() else []
    slowest = slowest_kernels(layers)
    if not shutil.which("ncu"):
        record.add({"left_out": "ncu is not installed", "kernels": slowest})
        return 0
    for kernel in slowest:
        command = ["ncu", "--csv", "--set", "basic", "--section", "WarpStateStats", "--launch-count", "1"]
        command += ["--kernel-name", f"regex:{kernel['kernel']}", sys.executable, "-m", "benchmarks.gpu_kernels"]
        command += ["--once", "--work", kernel["work"], "--by", kernel["by"]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, record.left()))
        record.add({**kernel, "csv": [line for line in done.stdout.splitlines() if line.startswith('"')]})
    return 0


def slowest_kernels(rows: Sequence[Row], count: int = 2) -> list[Row]:
    """Of ours, by the time of one launch; each name once."""
    found: dict[str, Row] = {}
    for row in rows:
        for kernel, microseconds in (row.get("kernels") or {}).items():
            if microseconds > found.get(kernel, {}).get("microseconds", 0.0):
                names = {"kernel": kernel, "work": row["work"], "by": row["by"]}
                found[kernel] = {**names, "microseconds": microseconds}
    return sorted(found.values(), key=lambda row: -row["microseconds"])[:count]


_STEPS = {"truth": truth, "training": _training, "layers": _layers, "tuning": _tuning, "ncu": _ncu}


if __name__ == "__main__":
    sys.exit(main())
