"""What a call costs the host, counted instead of timed: instructions, calls of ATen ops and kernels, Python calls."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .timing import Run

ROUNDS = 3


@cache
def why_not() -> str:
    """Why instructions cannot be counted here; empty if they can. RuntimeError where they must be.

    ``GUARDSPACE_REQUIRE_VALGRIND=1`` says that they must.
    """
    missing = [program for program in ("valgrind", "vgdb") if shutil.which(program) is None]
    reason = f"{' and '.join(missing)} not on the PATH: install valgrind" if missing else ""
    if not torch._C._valgrind_supported_platform():
        reason = "this build of torch does not know how to switch valgrind on and off"
    if reason and os.environ.get("GUARDSPACE_REQUIRE_VALGRIND") == "1":
        raise RuntimeError(f"instructions must be counted (GUARDSPACE_REQUIRE_VALGRIND=1): {reason}")
    return reason


def instructions(module: str, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Instructions of one call of each contestant of each case, on one thread, all in one process under callgrind.

    ``module.runs(**case)`` builds the calls by contestant. Each is made twice before it is counted, and the cyclic
    garbage collector is off. Two runs differ by about 1%. valgrind emulates AVX2 and hides what is above it.
    RuntimeError with the words of the process if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="guardspace-callgrind-") as folder:
        out, names = Path(folder, "out"), Path(folder, "names.json")
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        command += [f"--callgrind-out-file={out}", sys.executable, "-m", "benchmarks.counting", module]
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(
            [*command, json.dumps(cases), str(names)], cwd=Path(__file__).parents[1], env={**os.environ, **one_thread},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the process that counts instructions failed:\n{done.stderr[-2000:]}")
        counted: list[list[str]] = json.loads(names.read_text(encoding="utf-8"))
        parts = iter(range(1, 1 + sum(map(len, counted))))
        return [{name: _total(Path(f"{out}.{next(parts)}")) / ROUNDS for name in case} for case in counted]


def _total(dump: Path) -> int:
    found = re.search(r"^totals: (\d+)", dump.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None or found[1] == "0":
        raise RuntimeError(f"callgrind counted nothing in {dump.name}")
    return int(found[1])


def _instrument() -> None:
    """Switches callgrind on. Until then imports run at a tenth of their speed instead of a fiftieth."""
    command = ["vgdb", f"--pid={os.getpid()}", "instrumentation", "on"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as asked:
        while asked.poll() is None:  # only who executes instructions hears it
            pass
        if asked.returncode:
            raise RuntimeError(f"vgdb could not switch callgrind on, exit {asked.returncode}")


def _count(module: str, cases: list[dict[str, Any]], names: Path) -> None:
    torch.set_num_threads(1)
    built = [importlib.import_module(module).runs(**case) for case in cases]
    _instrument()
    gc.collect()
    gc.disable()
    for runs in built:
        for run in runs.values():  # no case before its turn: an optimiser's step ends the step mode of others
            run()
            run()
            torch._C._valgrind_toggle()
            for _ in range(ROUNDS):
                run()
            torch._C._valgrind_toggle_and_dump_stats()
    names.write_text(json.dumps([list(runs) for runs in built]), encoding="utf-8")


def calls(run: Run) -> dict[str, float]:
    """What one call, backward included, calls.

    ``aten``: ATen ops that pass the dispatcher, nested ones too. ``kernels``: functions of our compiled extension.
    ``launches``: these, and the ATen ops that compute something, which views, allocations and composites do not: each
    is a kernel on a GPU. ``python``: Python's functions and builtins.
    """
    run()
    found = {"aten": 0, "launches": 0, "kernels": 0, "python": -1}  # the switching off of the profiler is seen too

    def count(_frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            found["python"] += 1
            found["kernels"] += event == "c_call" and argument.__module__ == "guardspace_kernels._cpu"

    gc.disable()  # its callbacks are nobody's calls
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write to stderr whenever it starts and stops
    # No dispatch mode: under one, layers leave their eager path.
    with torch.autograd.profiler.profile(record_shapes=True) as profiled:
        run()
    for event in profiled.function_events:
        if event.name.startswith("aten::"):
            found["aten"] += 1
            found["launches"] += _launches(event)
    found["launches"] += found["kernels"]
    return dict(found)


_NO_KERNEL = re.compile(
    r"aten::(_?empty\w*|new_empty\w*|resize\w*|set_|_unsafe_view|_reshape_alias|is_\w+|result_type)$"
)
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")
_PRODUCTS = ("aten::addmm", "aten::baddbmm", "aten::addmv")  # which first copy what they add to


def _launches(event: Any) -> bool:
    if _NO_KERNEL.match(event.name) or (event.name in _COPIES and not any(event.input_shapes)):
        return False  # a number in another dtype stays on the host
    schemas = torch._C._jit_get_schemas_for_operator(event.name)
    if any(r.alias_info is not None and not r.alias_info.is_write for schema in schemas for r in schema.returns):
        return False  # a view
    return event.name in _PRODUCTS or not _launches_inside(event)


def _launches_inside(event: Any) -> bool:
    return any(_launches(child) or _launches_inside(child) for child in event.cpu_children)


if __name__ == "__main__":
    _count(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
