"""The tests of the C++ kernels under AddressSanitizer and UBSan, on every instruction set that this CPU has.

Before them those of the CUDA kernels, compiled for the CPU. ``make sanitize`` runs it; arguments go to pytest, and
GUARDSPACE_ISA restricts it to one instruction set, or with "cuda" to the CUDA kernels. torch's tensors come from
AddressSanitizer's malloc, so that a kernel that reads or writes one byte too far ends the run with a report. Tests of
the kernels themselves take every instruction set by the fixture ``isa``; those of what Python makes of them run once.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
PACKAGE = BUILD / "lib" / "guardspace_kernels"
COMPILER = os.environ.get("CXX") or "g++"  # on macOS c++ is clang, which has other runtimes
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1"
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")  # without the last they would miss C++ exceptions

# Scratch memory and fresh tensors hold NaN, in every dtype, until something is written to them.
ASAN = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=67108864"
# The fibers of the CUDA kernels switch between stacks: with frames on the heap they would take twice the time.
OPTIONS = {
    run: {"ASAN_OPTIONS": f"{ASAN}:detect_stack_use_after_return={kept}", "UBSAN_OPTIONS": "print_stacktrace=1"}
    for run, kept in (("cuda", 0), ("cpu", 1))
}
MARKERS = {"cuda": "cuda_on_cpu", "cpu": "cpu_kernels"}
#: Left out: tests of what torch makes of the ops and of how a process starts, which reach no other code of the kernels.
OTHERS = "not (opcheck or gradcheck or as_torch_wants or environment_variable)"


def pytest_configure() -> None:
    """As a plugin of pytest: the sanitized extension is loaded, before any conftest.py can put another one first."""
    from guardspace_kernels import _cpu

    if Path(_cpu.__file__).parent != PACKAGE:
        pytest.exit(f"not the sanitized extension in {PACKAGE} would be tested, but {_cpu.__file__}", returncode=1)


def build() -> None:
    """A sanitized copy of the package, so that the one in use stays as it is."""
    shutil.rmtree(BUILD / "lib", ignore_errors=True)  # modules that no longer exist; the objects are kept
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", PACKAGE.parent, "--build-temp", BUILD / "temp"]
    environment = {
        **os.environ,
        "CXX": COMPILER,
        "CXXFLAGS": FLAGS,
        "GUARDSPACE_REQUIRE_EXT": "1",
        "GUARDSPACE_CUDA": "0",
    }
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def preload() -> str:
    """The compiler's runtimes, which must be loaded before anything allocates."""
    paths = []
    for name in RUNTIMES:
        command = [*shlex.split(COMPILER), f"-print-file-name={name}"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        if not os.path.isabs(paths[-1]):
            sys.exit(f"{COMPILER} has no {name}: set CXX to a GCC that comes with its sanitizers")
    return ":".join(paths)


def main(arguments: list[str]) -> int:
    build()
    environment = {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # there are several processes of several threads
        **os.environ,
        "GUARDSPACE_REQUIRE_EXT": "1",
        "PYTHONSAFEPATH": "1",  # `python -c` in a test would find the package in ROOT first
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(ROOT / "python_tests")]),
        "LD_PRELOAD": preload(),
        "GUARDSPACE_SHIM_FLAGS": FLAGS,
    }
    # Pytest's handler of signals and its capture of file descriptors would hide the sanitizers' reports.
    options = ["-p", "sanitize", "-p", "no:faulthandler", "-p", "no:cacheprovider", "--capture=sys", "-k", OTHERS]
    if not any(Path(ROOT, argument.split("::")[0]).exists() for argument in arguments):
        options += ["python_tests/ops", "python_tests/nn"]
    isa = environment.pop("GUARDSPACE_ISA", "")
    for run in [isa if isa == "cuda" else "cpu"] if isa else MARKERS:
        print(f"== {isa or run}", flush=True)
        pytest_ = Path(sys.executable).with_name("pytest")  # python -m would put ROOT first
        chosen = OPTIONS[run] | ({"GUARDSPACE_ISA": isa} if isa and run == "cpu" else {})
        command = [pytest_, "-m", MARKERS[run], *options, *arguments]
        status = subprocess.run(command, cwd=ROOT, env={**environment, **chosen}).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
