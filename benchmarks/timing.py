"""What the benchmarks share: a case and its contestants, the check before any number, and timing by turns."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardspace_kernels import dispatch
from guardspace_kernels.env_report import cpu_flags
from guardspace_kernels.ops import _cpu

Run = Callable[[], object]
Clock = Callable[[Run, int], float]  # seconds per call, of so many calls
Row = dict[str, Any]

CPU = torch.device("cpu")

#: Relative errors that are granted whatever plain PyTorch achieves: a few roundings of the largest entry.
FLOOR = {torch.float32: 5e-7, torch.bfloat16: 8e-3}
#: Relative errors that are refused whatever plain PyTorch achieves, so that the yardstick itself is checked too.
CEILING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass
class Contestant:
    """One way of computing a case.

    ``run`` is what is timed. ``outputs`` computes once from a fresh start; it is compared with ``truth`` in float64 and
    may be at most twice as wrong as the contestant named ``plain``, plus the floor. ``flops`` are its own, by formula.
    ``facts`` adds columns (leak, saved bytes, peak memory); it is called after the timing. ``share`` is the part of the
    case that ``run`` does: seconds are extrapolated from it, and their row says so.
    """

    run: Run
    outputs: Callable[[], dict[str, Tensor]]
    truth: Callable[[], dict[str, Tensor]]
    plain: str
    flops: int
    facts: Callable[[], dict[str, float]] = dict
    share: float = 1.0


@dataclass
class Case:
    """One shape of one op.

    ``accuracy``: the dtype whose rounding is granted. ``bytes``: what any implementation must at least read and write.
    ``rho``: FLOPs of the guarded adapter over those of the frozen linear layer.
    """

    op: str
    shape: dict[str, Any]
    contestants: dict[str, Contestant]
    accuracy: torch.dtype
    bytes: int
    rho: float | None = None
    rounds: int | None = None  # of a case that takes minutes
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    def error(self, name: str) -> dict[str, float]:
        """Per output the largest error relative to the largest entry of the truth."""
        if name not in self.errors:
            contestant = self.contestants[name]
            truth, outputs = contestant.truth(), contestant.outputs()
            if truth.keys() != outputs.keys():
                raise ValueError(f"gave {sorted(outputs)}, not {sorted(truth)}")
            self.errors[name] = {key: relative_error(outputs[key], truth[key]) for key in truth}
        return self.errors[name]

    def refusal(self, name: str) -> str | None:
        """Why this contestant gets no number, or None."""
        try:
            mine, plain = self.error(name), self.error(self.contestants[name].plain)
        except Exception as error:  # whatever it raises, the others go on
            return f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for key, value in mine.items():
            bound = min(2 * plain[key] + FLOOR[self.accuracy], CEILING[self.accuracy])
            if not value <= bound:  # NaN too
                return f"error of {key} {value:.1e} > {bound:.1e}"
        return None


def relative_error(actual: Tensor, truth: Tensor) -> float:
    if actual.shape != truth.shape:
        return float("nan")
    return float((actual.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-300))


def saved_bytes(run: Callable[[], object], constants: Iterable[Tensor]) -> int:
    """Bytes that ``run`` keeps for backward: every storage once, without parameters and buffers (``constants``)."""
    known = {t.untyped_storage().data_ptr() for t in constants}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


def wall_clock(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


class CudaClock:
    """CUDA events around each call, before which 256 MB are written: more than any L2 holds, so nothing is in it."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(2**28, dtype=torch.int8, device=device)

    def __call__(self, run: Run, calls: int) -> float:
        events = []
        for _ in range(calls):
            self.flush.zero_()
            torch.cuda._sleep(1_000_000)  # half a millisecond in which Python gets ahead: its time is not the kernel's
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / 1e3 / calls


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else wall_clock


_LONG = 1.0  # seconds of a call that is certainly not repeated within a turn


def time_by_turns(
    runs: dict[str, Run],
    *,
    budget: float,
    least: int = 5,
    most: int = 50,
    block: float = 2e-3,
    clock: Clock = wall_clock,
) -> dict[str, list[float]]:
    """Seconds per call of each, measured in turns so that a busy moment hits all: ``least`` rounds, then up to
    ``most`` while ``budget`` seconds last. Calls shorter than ``block`` seconds are repeated within a turn."""
    inner = {}
    for name, run in runs.items():
        first = clock(run, 1)  # warms up
        inner[name] = 1 if first > _LONG else max(1, int(block / max(clock(run, 1), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, deadline = list(runs), time.perf_counter() + budget
    enabled = gc.isenabled()
    gc.disable()
    try:
        for done in range(most):
            if done >= least and time.perf_counter() > deadline:
                break
            for name in order:
                times[name].append(clock(runs[name], inner[name]))
            order.append(order.pop(0))
            gc.collect()
    finally:
        if enabled:
            gc.enable()
    return times


def measure(
    case: Case, peaks: dict[str, Any], device: torch.device = CPU, only: Sequence[str] | None = None, **timing: Any
) -> list[Row]:
    """A row per contestant, or of ``only`` these. One that fails its check gets the reason instead of a number.

    With ``most=1`` each is called once before it is checked, as a case of minutes may be by what that call gave.
    """
    wanted = {name: c for name, c in case.contestants.items() if only is None or name in only}
    clock, once = clock_of(device), timing.get("most") == 1
    times = {name: [clock(c.run, 1)] for name, c in wanted.items()} if once else {}
    with device:
        refusals = {name: case.refusal(name) for name in wanted}
    if case.rounds is not None:
        timing["least"] = min(timing.get("least", case.rounds), case.rounds)
    if not once:
        runs = {n: c.run for n, c in wanted.items() if refusals[n] is None}
        times = time_by_turns(runs, clock=clock, **timing)  # a device as context costs microseconds a call
    rows = []
    for name, contestant in wanted.items():
        row: Row = {"op": case.op, "shape": case.shape, "contestant": name, "refused": refusals[name]}
        row["error"] = max(case.errors[name].values()) if name in case.errors else None
        if refusals[name] is None:
            seconds = [one / contestant.share for one in times[name]]
            row |= {} if contestant.share == 1 else {"share": contestant.share}
            several = len(seconds) > 1
            low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if several else 3 * seconds
            peak = peaks["flops"][case.shape["dtype"]]
            row |= {"seconds": median, "fastest": min(seconds), "quartiles": [low, high], "rounds": len(seconds)}
            row |= {"flops": contestant.flops, "bytes": case.bytes, "rho": case.rho}
            row |= {"of_peak": contestant.flops / median / peak, "of_bandwidth": case.bytes / median / peaks["copy"]}
            with device if device.type != "cpu" else nullcontext():  # whose every call passes a mode
                row |= contestant.facts()
            if "tokens" in row:
                row["tokens/s"] = row["tokens"] / median
        rows.append(row)
    return rows


def pytest_case(benchmark: Any, case: Case, name: str) -> None:
    """Body of the pytest-benchmark tests: what fails its check is not timed, and is a failure if it is ours."""
    import pytest

    refused = case.refusal(name)
    if refused is not None:
        (pytest.fail if name.startswith("ours") else pytest.skip)(refused)
    benchmark.group = f"{case.op} {label(case.shape)}"
    benchmark.extra_info.update(flops=case.contestants[name].flops, bytes=case.bytes)
    benchmark(case.contestants[name].run)


def label(shape: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items())


def peaks(threads: int, small: bool = False, device: torch.device = CPU) -> dict[str, Any]:
    """FLOP/s by dtype and bytes/s of a copy, on ``threads`` threads or a GPU, and how the former was found."""
    dtypes, clock = (torch.float32, torch.bfloat16), clock_of(device)
    if device.type == "cpu" and _cpu.extension is not None:
        seconds = 0.01 if small else 0.3
        rates = [_cpu.extension.peak_flops(_cpu._DTYPES[dtype], seconds, threads) for dtype in dtypes]
        source = f"multiply-adds in registers, {_cpu.extension.isa()}"
    else:
        n = 256 if small else 2048 if device.type == "cpu" else 8192
        squares = [torch.ones(n, n, dtype=dtype, device=device) for dtype in dtypes]
        rates = [2 * n**3 / _best(partial(torch.mm, square, square), clock) for square in squares]
        source = f"torch.mm, n={n}"
    flops = {str(dtype).removeprefix("torch."): rate for dtype, rate in zip(dtypes, rates, strict=True)}
    buffer = torch.ones((1 if small else 256) * 2**18, device=device)
    target = torch.empty_like(buffer)
    copy = 2 * buffer.nbytes / _best(lambda: target.copy_(buffer), clock)
    return {"flops": flops, "flops_source": source, "copy": copy}


def _best(run: Run, clock: Clock, repeats: int = 5) -> float:
    run()
    return min(clock(run, 1) for _ in range(repeats))


def environment(threads: int, device: torch.device = CPU) -> dict[str, Any]:
    """Machine, versions, threads, date and commit. Call it before anything is computed: it reads the load."""
    versions = {}
    for package in ("guardspace-kernels", "torch", "transformers", "peft", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu_model(),
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "flags": cpu_flags(),
        "torch_level": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "threads": threads,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "backends": [f"{op}: {backend}" for op, backend, registered, _ in dispatch.status() if registered],
        "isa": None if _cpu.extension is None else _cpu.extension.isa(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def cpu_line(environment: dict[str, Any]) -> str:
    """The processor by what decides the speed here: the instruction sets that torch uses of it."""
    level, bf16 = environment["torch_level"], "avx512_bf16" in environment["flags"]
    kind = {"AVX512": "AVX-512 with bf16" if bf16 else "AVX-512"}.get(level, level)
    return f"{environment['cpu']}, {kind}, {environment['threads']} of {environment['cores']} threads"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit, with a + when files differ from it; None outside a clone."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Written beside the target and renamed, so that nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=".write-", text=True)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(_json(value))
            file.flush()
            os.fsync(file.fileno())  # what is renamed before it is on the disk may be empty after a crash
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def _json(value: Any) -> str:
    """A line per row of a result file, so that a change of one shows as one line."""
    if not isinstance(value, dict) or not isinstance(value.get("rows"), list):
        return json.dumps(value, indent=1) + "\n"
    head = "".join(f"{json.dumps(key)}: {_json(item).rstrip()},\n" for key, item in value.items() if key != "rows")
    rows = ",\n".join(json.dumps(row) for row in value["rows"])
    return f'{{\n{head}"rows": [\n{rows}\n]\n}}\n'


def read_json(paths: Iterable[Path]) -> dict[str, Any]:
    """One or more result files as one: the rows of all, the environment of the first."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {**results[0], "rows": [row for result in results for row in result["rows"]]}
