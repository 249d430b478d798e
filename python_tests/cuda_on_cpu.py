"""The CUDA kernels compiled for the CPU, with cuda_shim.h: a library with the functions of guardspace_cuda.h."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from guardspace_kernels.ops import _cuda

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
SHIM = ROOT / "python_tests"
BUILD = ROOT / "build" / "cuda_on_cpu"
COMPILER = shlex.split(os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), ""))
FLAGS = [
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter",
    f"-I{SHIM}", "-march=native",
]  # fmt: skip
#: As python_tests/sanitize.py sets it for all that it builds.
OPTIMISE = shlex.split(os.environ.get("GUARDSPACE_SHIM_FLAGS", "-O2"))

COUNTERS = ("bytes_read", "bytes_written", "products", "matrices", "reads", "conflicts", "launches")
SCHEDULES = (0, 1, 2, 3)
#: Those that the tests of kernels take: with sanitizers one, as the order of warps changes no address.
TESTED = SCHEDULES[:1] if "GUARDSPACE_SHIM_FLAGS" in os.environ else SCHEDULES[:2]


def why_not() -> str:
    """Why the kernels cannot be compiled for this CPU; empty if they can."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return "the shim's fibers are switched by x86-64 code for Linux"
    return "" if COMPILER else "there is no C++ compiler"


@cache
def built(folder: Path = SOURCES, extra: Sequence[str] = ()) -> str:
    """The path of a library of all .cu files in ``folder``, compiled when they or what they include has changed.

    ``extra`` are more flags. RuntimeError with the compiler's words if it refuses.
    """
    command = [*COMPILER, *FLAGS, *OPTIMISE, *extra]
    known = [shlex.join(command).encode()]
    for path in sorted([*folder.iterdir(), *SHIM.glob("cuda_shim.*")]):
        known += [path.name.encode(), path.read_bytes()]
    key = hashlib.sha256(b"\0".join(known)).hexdigest()[:16]
    command.append(f"-I{folder}")
    target = BUILD / f"{key}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that want the same, one compiles
        if not target.exists():
            _compile(command, sorted(folder.glob("*.cu")), target)
    return str(target)


def _compile(command: list[str], sources: list[Path], target: Path) -> None:
    folder = target.with_suffix(f".{os.getpid()}")
    folder.mkdir()
    running = []
    for source in (*sources, SHIM / "cuda_shim.cpp"):
        out = folder / f"{source.stem}.o"
        arguments = [*command, "-x", "c++", "-c", str(source), "-o", str(out)]
        running.append((out, subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)))
    complaints = "".join(process.communicate()[1] for _, process in running)
    if any(process.returncode for _, process in running):
        raise RuntimeError(complaints)
    if complaints:
        raise RuntimeError(f"warnings: {complaints}")
    temporary = folder / "library.so"
    subprocess.run([*command, "-shared", *(str(out) for out, _ in running), "-o", str(temporary)], check=True)
    os.replace(temporary, target)
    shutil.rmtree(folder)


def library(folder: Path = SOURCES, extra: Sequence[str] = ()) -> ctypes.CDLL:
    return ctypes.CDLL(built(folder, extra))


def kernels() -> ctypes.CDLL:
    """Those of this source tree."""
    return _cuda.load(built())


def take_counters(loaded: ctypes.CDLL) -> dict[str, int]:
    """What was counted since the last time."""
    numbers = (ctypes.c_int64 * len(COUNTERS))()
    loaded.shim_take_counters(numbers)
    return dict(zip(COUNTERS, numbers, strict=True))
