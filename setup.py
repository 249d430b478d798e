"""Builds guardspace_kernels._cpu, the C++ kernels, and _cuda.so, the CUDA kernels; everything else about the package is
in pyproject.toml.

The C++ kernels are compiled once per instruction set, the CUDA kernels by nvcc where it is found, by ninja, without
torch. Where that cannot be done the installation succeeds all the same: the ops run on what is there, and ``guardspace
env`` tells the reason, which is left in _build_info.json beside the module because pip shows no output of a build that
succeeds. GUARDSPACE_REQUIRE_EXT=1 makes an error of it for the C++ kernels, GUARDSPACE_CUDA=1 for the CUDA kernels;
GUARDSPACE_CUDA=0 leaves them out. CXX, CPPFLAGS, CXXFLAGS and LDFLAGS mean what they mean to make; flags given there
win over ours.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
#: Beside the baseline: its flags, and an instruction that the assembler, often older than the compiler, must know too.
X86_ISAS = {
    "avx2": (["-mavx2", "-mfma"], "vfmadd231ps %ymm0, %ymm1, %ymm2"),
    "avx512": (_AVX512, "vpaddb %zmm0, %zmm1, %zmm2"),
    "avx512_bf16": ([*_AVX512, "-mavx512bf16"], "vdpbf16ps %zmm0, %zmm1, %zmm2"),
}
DISPATCH = Path("csrc/cpu/dispatch.cpp")
BINDINGS = Path("csrc/bindings_cpu.cpp")
KERNELS = sorted(set(Path("csrc/cpu").glob("*.cpp")) - {DISPATCH})  # each compiled once per instruction set
HEADERS = sorted(Path("csrc").rglob("*.h"))
CUDA_KERNELS = sorted(Path("csrc/cuda").glob("*.cu"))
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc/cuda"]
#: Code is built for these; drivers of other chips compile the PTX that comes with it.
CUDA_CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
BUILD_INFO = "_build_info.json"


class NotBuilt(Exception):
    """Why there are no compiled kernels, and what to do about it."""


@dataclass
class Toolchain:
    """A compiler that works, and what it can do."""

    compiler: list[str]
    flags: list[str]
    link_flags: list[str]
    isas: dict[str, list[str]] = field(default_factory=lambda: {"baseline": []})
    openmp: bool = False
    notes: list[str] = field(default_factory=list)

    def info(self) -> dict[str, object]:
        version = _run([*self.compiler, "--version"]).stdout.strip().splitlines()
        return {
            "compiler": version[0] if version else shlex.join(self.compiler),
            "flags": shlex.join(self.flags),
            "isas": list(self.isas),
            "openmp": self.openmp,
            "notes": self.notes,
        }


@dataclass
class CudaToolchain:
    """An nvcc that works, and the chips that it knows."""

    nvcc: str
    chips: list[str]

    @property
    def flags(self) -> list[str]:
        # One PTX for all chips: it needs nothing that sm_80 lacks, and to make it takes most of the time.
        return [*CUDA_FLAGS, f"-gencode=arch=compute_80,code=[{','.join([*self.chips, 'compute_80'])}]"]

    def info(self) -> dict[str, object]:
        version = re.search(r"release [\d.]+", _run([self.nvcc, "--version"]).stdout)
        return {"nvcc": version[0] if version else self.nvcc, "chips": self.chips}


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}  # complaint() reads English
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)


def complaint(output: str, status: int) -> str:
    """The one line of a compiler's or ninja's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|undefined reference", line, re.IGNORECASE)]
    return (errors or lines[-1:] or [f"exit status {status}, without a message"])[0][:300]


def find_compiler() -> list[str]:
    if sys.platform == "win32":
        raise NotBuilt("the compiled kernels are not available for Windows; use WSL for them")
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise NotBuilt(
                f"CXX={os.environ['CXX']}, but there is no program {command[0]}; unset it or name a compiler"
            )
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NotBuilt(
        "no C++ compiler was found (CXX is not set, and c++, g++ and clang++ are not on PATH); "
        "install one: apt install g++, dnf install gcc-c++, or on macOS xcode-select --install"
    )


def probe_compiler() -> Toolchain:
    """Finds the compiler and tries what differs between compilers: OpenMP and the instruction sets."""
    compiler = find_compiler()
    user = {name: shlex.split(os.environ.get(name, "")) for name in ("ARCHFLAGS", "CPPFLAGS", "CXXFLAGS", "LDFLAGS")}
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    python = ["-isystem", sysconfig.get_path("include")]

    def trouble(source: str, *flags: str) -> str:
        """What the compiler says against ``source``; empty if it takes it."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "probe.cpp")
            file.write_text(source + "\n", encoding="utf-8")
            everything = [*FLAGS, *flags, *user["ARCHFLAGS"], *user["CPPFLAGS"], *user["CXXFLAGS"]]
            run = _run([*compiler, *everything, str(file), "-o", str(Path(folder, "probe.so")), *user["LDFLAGS"]])
            return complaint(run.stdout + run.stderr, run.returncode) if run.returncode else ""

    wrong = trouble("#include <Python.h>\n#include <string>\nstd::string probe() { return {}; }", *python, *shared)
    if wrong:
        hint = "install Python's headers (apt install python3-dev)" if "Python.h" in wrong else "mend or change CXX"
        raise NotBuilt(f"{shlex.join(compiler)} cannot build a C++17 extension module: {wrong}; {hint}")

    openmp = ["-fopenmp"]
    # Linked as a program: a module may leave symbols undefined, and would then not load.
    team = "int main() {\nint n = 0;\n#pragma omp parallel reduction(+ : n)\nn += 1;\nreturn n;\n}"
    without_openmp = trouble(team, *openmp)
    if without_openmp:
        openmp = ["-Wno-unknown-pragmas", "-Wno-unused-parameter"]  # the pragmas, and the numbers of threads
    common = [*user["ARCHFLAGS"], *openmp]
    tools = Toolchain(
        compiler,
        flags=[*FLAGS, *common, *user["CPPFLAGS"], *user["CXXFLAGS"]],
        link_flags=[*shared, *common, *user["CXXFLAGS"], *user["LDFLAGS"]],
        openmp=not without_openmp,
    )
    if without_openmp:
        tools.notes.append(f"without OpenMP, so that kernels run on one thread: {without_openmp}")
    if not trouble("#ifndef __x86_64__\n#error another machine\n#endif", "-c"):
        for isa, (flags, instruction) in X86_ISAS.items():
            wrong = trouble(f'void probe() {{ __asm__("{instruction.replace("%", "%%")}" :); }}', "-c", *flags)
            if wrong:
                tools.notes.append(f"without {isa}: {wrong}")
            else:
                tools.isas[isa] = flags
    return tools


def probe_nvcc() -> CudaToolchain:
    """Finds nvcc and tries whether it gets along with its host compiler."""
    if os.environ.get("GUARDSPACE_CUDA") == "0":
        raise NotBuilt("GUARDSPACE_CUDA is 0")
    folders = [Path(home, "bin") for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(map(str, folders))) if folders else None
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None or sys.platform != "linux":
        raise NotBuilt("nvcc was not found in CUDA_HOME/bin or on PATH; install the CUDA toolkit, 11.8 or newer")
    known = _run([nvcc, "--list-gpu-code"]).stdout.split()
    tools = CudaToolchain(nvcc, [chip for chip in CUDA_CHIPS if chip in known])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "probe.cu")
        file.write_text("__global__ void probe() {}\n", encoding="utf-8")
        run = _run([nvcc, *tools.flags, "-c", str(file), "-o", str(Path(folder, "probe.o"))])
        if run.returncode:
            wrong = complaint(run.stdout + run.stderr, run.returncode)
            raise NotBuilt(f"{nvcc} does not work: {wrong}; NVCC_CCBIN names another host compiler")
    return tools


def find_ninja() -> str:
    """PyPI's before the system's: two versions that take turns would not read each other's logs, and compile anew."""
    try:
        from ninja import BIN_DIR  # empty in an isolated build, which has it on PATH
    except ImportError:
        BIN_DIR = ""
    ninja = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if ninja is None:
        raise NotBuilt("ninja was not found; pip install ninja, or build without --no-build-isolation")
    return ninja


def pybind11_headers() -> str:
    try:
        import pybind11
    except ImportError:
        raise NotBuilt("pybind11 was not found; pip install pybind11, or build without --no-build-isolation") from None
    return pybind11.get_include()


def _escaped(path: object) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _variable(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def cuda_graph(tools: CudaToolchain, folder: Path, library: Path) -> str:
    """As ``build_graph``; nothing but the functions of guardspace_cuda.h is visible in ``library``."""
    lines = [
        f"builddir = {_escaped(folder)}",
        f"nvcc = {_variable([tools.nvcc])}",
        "rule compile",
        f"  command = $nvcc {_variable(tools.flags)} -MD -MF $out.d -c $in -o $out",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc -shared -cudart static -Xlinker --exclude-libs=ALL $in -o $out",
        "  description = $out",
    ]
    objects = [_escaped(folder / f"{source.stem}.o") for source in CUDA_KERNELS]
    for source, made in zip(CUDA_KERNELS, objects, strict=True):
        lines.append(f"build {made}: compile {_escaped(source)}")
    lines.append(f"build {_escaped(library)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build_graph(tools: Toolchain, folder: Path, module: Path) -> str:
    """The text of build.ninja, which compiles into ``folder`` and links ``module``."""
    lines = [
        f"builddir = {_escaped(folder)}",
        f"cxx = {_variable(tools.compiler)}",
        f"flags = {_variable(tools.flags)}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in -o $out {_variable(tools.link_flags)}",
        "  description = $out",
    ]
    objects = []

    def compile(source: Path, name: str, more: list[str]) -> None:
        objects.append(_escaped(folder / f"{name}.o"))
        lines.extend([f"build {objects[-1]}: compile {_escaped(source)}", f"  more = {_variable(more)}"])

    for source in KERNELS:
        for isa, flags in tools.isas.items():
            compile(source, f"{source.stem}.{isa}", [f"-DGUARDSPACE_ISA={isa}", *flags])
    compile(DISPATCH, DISPATCH.stem, [f"-DGUARDSPACE_HAS_{isa}" for isa in tools.isas])
    compile(BINDINGS, BINDINGS.stem, ["-isystem", sysconfig.get_path("include")])
    lines.append(f"build {_escaped(module)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def run_ninja(graph: Path, text: str, jobs: int | None, **environment: str) -> None:
    """Builds all that has changed since the last time."""
    ninja = find_ninja()
    graph.parent.mkdir(parents=True, exist_ok=True)
    graph.write_text(text, encoding="utf-8")
    process = subprocess.Popen(
        [ninja, "-f", str(graph), *(["-j", str(jobs)] if jobs else [])],
        env={**os.environ, "LC_ALL": "C", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    output = []
    for line in process.stdout:
        print(line, end="", flush=True)
        output.append(line)
    if process.wait():
        wrong = complaint("".join(output), process.returncode)
        raise NotBuilt(f"the compilation failed: {wrong}; pip install -v shows all of it")


def build_module(folder: Path, jobs: int | None) -> tuple[Path, dict[str, object]]:
    """The C++ kernels in ``folder``, and what they were built with."""
    tools = probe_compiler()
    module = folder / "_cpu.so"
    # By the environment and not by a flag: in an isolated build pybind11 lies elsewhere every time, and another command
    # would compile the bindings again.
    include = os.pathsep.join(filter(None, [pybind11_headers(), os.environ.get("CPLUS_INCLUDE_PATH")]))
    run_ninja(folder / "build.ninja", build_graph(tools, folder, module), jobs, CPLUS_INCLUDE_PATH=include)
    return module, tools.info()


def build_cuda(folder: Path, jobs: int | None) -> tuple[Path, dict[str, object]]:
    """The same of the CUDA kernels."""
    tools = probe_nvcc()
    library = folder / "_cuda.so"
    run_ninja(folder / "build.ninja", cuda_graph(tools, folder, library), jobs)
    return library, tools.info()


class BuildExt(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # pip's folder is thrown away, and the next editable installation would start anew
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

    def _outputs(self) -> list[Path]:
        """Both libraries, which may not exist, and the information about them, in ``build_lib``."""
        module = Path(self.build_lib, self.get_ext_filename("guardspace_kernels._cpu"))
        return [module, module.with_name("_cuda.so"), module.with_name(BUILD_INFO)]

    def _in_source_tree(self, output: Path) -> Path:
        return Path(self.get_finalized_command("build_py").get_package_dir("guardspace_kernels"), output.name)

    def build_extension(self, ext: Extension) -> None:
        module, library, info_file = self._outputs()
        info_file.parent.mkdir(parents=True, exist_ok=True)
        info: dict[str, object] = {"version": self.distribution.get_version()}
        folder = Path(self.build_temp)
        info |= self._built(ext, "C++", "GUARDSPACE_REQUIRE_EXT", build_module, folder, module)
        info["cuda"] = self._built(ext, "CUDA", "GUARDSPACE_CUDA", build_cuda, folder / "cuda", library)
        info_file.write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")

    def _built(
        self, ext: Extension, kind: str, variable: str, build: Callable[..., Any], folder: Path, target: Path
    ) -> dict[str, object]:
        """What ``target`` was built with, or why it was not: an error if ``variable`` is 1."""
        target.unlink(missing_ok=True)  # of an earlier build: better none than one of other sources
        try:
            made, info = build(folder, self.parallel)
        except NotBuilt as reason:
            ext.optional = os.environ.get(variable, "0") in ("", "0", "auto")
            if not ext.optional:
                raise CompileError(f"{variable} is set, but {reason}") from None
            print(
                f"\nguardspace_kernels is installed without its {kind} kernels: {reason}.\n"
                "The ops run on what is there. With that mended, install again; `guardspace env` tells what is used.\n",
                file=sys.stderr,
            )
            return {"not_built": str(reason)}
        shutil.copy2(made, target)
        return info

    def copy_extensions_to_source(self) -> None:
        for output in self._outputs():
            copy = self._in_source_tree(output)
            copy.unlink(missing_ok=True)  # never written in place: a process may have it mapped
            if output.exists():
                shutil.copy2(output, copy)

    def get_outputs(self) -> list[str]:
        return [str(output) for output in self._outputs() if output.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {output: str(self._in_source_tree(Path(output))) for output in self.get_outputs()}


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "guardspace_kernels._cpu",
                sources=[str(source) for source in (*KERNELS, DISPATCH, BINDINGS)],
                depends=[str(header) for header in HEADERS],
            )
        ],
        cmdclass={"build_ext": BuildExt},
    )
