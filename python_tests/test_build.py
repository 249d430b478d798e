"""The build: what it does without a compiler, what the objects may define, and which OpenMP the module shares."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from backends import extension, require_extension

from guardspace_kernels.ops import _cuda

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shlex.split(os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), ""))
X86 = platform.machine() in ("x86_64", "AMD64")
MODULE = "guardspace_kernels/_cpu*.so"
INFO = "guardspace_kernels/_build_info.json"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")


def run(*command, **environment):
    env = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    cwd = env.pop("CWD", ROOT)
    return subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)


def output(*command, **environment):
    result = run(*command, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def tree(tmp_path):
    """What a build needs of the source tree."""
    tree = tmp_path / "tree"
    package = tree / "guardspace_kernels"
    package.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    shutil.copy(ROOT / "guardspace_kernels" / "__init__.py", package)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    return tree


@pytest.fixture
def recipe(monkeypatch):
    """setup.py as a module."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CXX", shlex.join(COMPILER))
    for name in ("CPPFLAGS", "CXXFLAGS", "LDFLAGS", "ARCHFLAGS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("guardspace_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def build(tree, hook="inplace", **environment):
    """Builds in one of the ways that pip or a person would; what it wrote is in ``tree`` or ``tree/out``."""
    if hook == "inplace":
        command = ["setup.py", "build_ext", "--inplace"]
    else:
        command = ["-c", f"from setuptools import build_meta as b; b.build_{hook}('out')"]
    (tree / "out").mkdir(exist_ok=True)
    return run(
        sys.executable, *command, CWD=tree, **{"GUARDSPACE_REQUIRE_EXT": None, "GUARDSPACE_CUDA": "0", **environment}
    )


NO_COMPILER = {"CXX": None, "PATH": "/nonexistent"}
REASONS = [
    (NO_COMPILER, "no C\\+\\+ compiler was found .* install one: apt install g\\+\\+"),
    ({"CXX": "/bin/false"}, "/bin/false cannot build a C\\+\\+17 extension module: exit status 1"),
    ({"CXX": "no-such-compiler -x"}, "CXX=no-such-compiler -x, but there is no program no-such-compiler"),
]


@pytest.mark.parametrize("environment, reason", REASONS, ids=["none", "fails", "missing"])
def test_without_a_compiler_there_is_no_extension_but_a_reason(tree, environment, reason):
    stale = tree / "guardspace_kernels" / f"_cpu{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    stale.write_text("of an earlier build")
    result = build(tree, **environment)
    assert result.returncode == 0, result.stderr
    assert re.search(f"installed without its C\\+\\+ kernels: .*{reason}", result.stderr)
    assert re.search(reason, json.loads((tree / INFO).read_text())["not_built"])
    assert not stale.exists()


@pytest.mark.parametrize("hook", ["wheel", "editable"])
def test_pip_installs_without_a_compiler(tree, hook):
    result = build(tree, hook, **NO_COMPILER)
    assert result.returncode == 0, result.stderr
    if hook == "wheel":
        wheel = zipfile.ZipFile(next((tree / "out").glob("*.whl")))
        assert [name for name in wheel.namelist() if "guardspace_kernels/_" in name] == [
            "guardspace_kernels/__init__.py",
            INFO,
        ]
        info = wheel.read(INFO)
    else:
        info = (tree / INFO).read_text()
    assert json.loads(info).keys() == {"version", "not_built", "cuda"}


@pytest.mark.parametrize("environment, reason", REASONS, ids=["none", "fails", "missing"])
def test_a_required_extension_fails_the_build(tree, environment, reason):
    result = build(tree, GUARDSPACE_REQUIRE_EXT="1", **environment)
    assert result.returncode == 1
    assert re.search(f"GUARDSPACE_REQUIRE_EXT is set, but .*{reason}", result.stderr)
    assert not (tree / INFO).exists() and not list(tree.glob(MODULE))


@needs_compiler
@pytest.mark.parametrize("required", ["0", "1"])
def test_a_failed_compilation_shows_the_compilers_output_and_keeps_its_first_error(tree, required):
    with open(tree / "csrc" / "cpu" / "kernels.h", "a") as header:
        header.write("#error broken on purpose\n")
    result = build(tree, GUARDSPACE_REQUIRE_EXT=required)
    assert "kernels.h" in result.stdout and "#error broken on purpose" in result.stdout
    assert result.returncode == int(required)
    if required == "0":
        assert re.search(
            "the compilation failed: .*kernels.h.*broken on purpose", json.loads((tree / INFO).read_text())["not_built"]
        )


@pytest.fixture
def picky_compiler(tmp_path, recipe, monkeypatch):
    """A compiler that does not know some flags, as an old GCC or Apple's clang does not."""

    def make(*refused):
        script = tmp_path / "picky c++"  # and a path with a space
        cases = "|".join(f"*' {flag} '*" for flag in refused)
        script.write_text(
            f"#!/bin/sh\ncase \" $* \" in {cases}) echo 'error: unknown option' >&2; exit 1;; esac\n"
            f'exec {shlex.join(COMPILER)} "$@"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", shlex.quote(str(script)))
        return recipe.probe_compiler()

    return make


@needs_compiler
def test_a_compiler_without_openmp_or_an_instruction_set_builds_the_rest(recipe, picky_compiler):
    tools = picky_compiler("-fopenmp", "-mavx512bf16")
    assert not tools.openmp and "-fopenmp" not in tools.flags + tools.link_flags
    assert list(tools.isas) == (["baseline", "avx2", "avx512"] if X86 else ["baseline"])
    notes = ["without OpenMP, so that kernels run on one thread: error: unknown option"]
    assert tools.info()["notes"] == notes + (["without avx512_bf16: error: unknown option"] if X86 else [])
    graph = recipe.build_graph(tools, Path("a b"), Path("a b/_cpu.so"))
    macros = re.findall(r"-DGUARDSPACE_(?:HAS_|ISA=)(\w+)", graph)
    assert set(macros) == set(tools.isas)
    assert "build a$ b/_cpu.so: link a$ b/covariance.baseline.o" in graph


NVCC = """#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release 11.8, V11.8.89";;
    --list-gpu-code) printf 'sm_70\\nsm_80\\nsm_86\\nsm_90\\n';;
    *{failing}*) echo "error: {complaint}" >&2; exit 1;;
    *) for last; do :; done; echo "$@" > "$last";;
esac
"""


@pytest.fixture
def fake_nvcc(tmp_path):
    """The environment of a build without a C++ compiler and with an nvcc which writes its arguments instead of code."""

    def make(failing="never", complaint=""):
        folder = tmp_path / "cuda" / "bin"
        folder.mkdir(parents=True)
        (folder / "nvcc").write_text(NVCC.format(failing=failing, complaint=complaint))
        (folder / "nvcc").chmod(0o755)
        tools = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        return {"CXX": "/bin/false", "CUDA_HOME": str(folder.parent), "GUARDSPACE_CUDA": None, "PATH": tools}

    return make


def cuda_info(tree):
    return json.loads((tree / INFO).read_text())["cuda"]


def test_nvcc_builds_for_the_chips_that_it_knows_whatever_becomes_of_the_cpp_kernels(tree, fake_nvcc):
    result = build(tree, **fake_nvcc())
    assert result.returncode == 0, result.stderr
    assert cuda_info(tree) == {"nvcc": "release 11.8", "chips": ["sm_80", "sm_86", "sm_90"]}
    linked = (tree / "guardspace_kernels" / "_cuda.so").read_text()
    assert "-shared -cudart static" in linked and "--exclude-libs=ALL" in linked
    for source in (tree / "csrc" / "cuda").glob("*.cu"):
        made = re.search(rf"\S*/{source.stem}\.o", linked)[0]
        command = (tree / made).read_text()
        assert "-gencode=arch=compute_80,code=[sm_80,sm_86,sm_90,compute_80]" in command and str(source.name) in command


FAILURES = [
    ("probe.cu", "does not work: error: unsupported GNU"),
    ("covariance.cu", "compilation failed: .*unsupported"),
]


@pytest.mark.parametrize("failing, reason", FAILURES, ids=["probe", "kernel"])
@pytest.mark.parametrize("required", ["auto", "1"])
def test_an_nvcc_that_fails_is_a_reason_or_an_error(tree, fake_nvcc, failing, reason, required):
    stale = tree / "guardspace_kernels" / "_cuda.so"
    stale.write_text("of an earlier build")
    result = build(tree, **{**fake_nvcc(failing, "unsupported GNU version"), "GUARDSPACE_CUDA": required})
    if required == "1":
        assert result.returncode == 1 and re.search(f"GUARDSPACE_CUDA is set, but .*{reason}", result.stderr)
    else:
        assert result.returncode == 0 and re.search(reason, cuda_info(tree)["not_built"]) and not stale.exists()
        assert re.search(f"installed without its CUDA kernels: .*{reason}", result.stderr)


def test_without_nvcc_or_where_they_are_not_wanted_there_are_no_cuda_kernels(tree, fake_nvcc):
    assert build(tree, **{**fake_nvcc(), "GUARDSPACE_CUDA": "0"}).returncode == 0
    assert cuda_info(tree) == {"not_built": "GUARDSPACE_CUDA is 0"}


def test_where_nvcc_is_looked_for(recipe, monkeypatch):
    monkeypatch.delenv("GUARDSPACE_CUDA", raising=False)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    asked = []
    monkeypatch.setattr(recipe.shutil, "which", lambda name, path=None: asked.append((name, path)))
    with pytest.raises(recipe.NotBuilt, match="nvcc was not found in CUDA_HOME/bin or on PATH; install the CUDA"):
        recipe.probe_nvcc()
    assert asked == [("nvcc", None), ("nvcc", "/usr/local/cuda/bin")]


needs_cuda_library = pytest.mark.skipif(_cuda.library is None, reason="the CUDA kernels are not built")


@needs_cuda_library
@pytest.mark.skipif(not shutil.which("readelf") or not shutil.which("nm"), reason="needs binutils")
def test_the_cuda_library_shows_its_functions_alone_and_needs_no_part_of_cuda():
    path = _cuda.library._name
    exported = {line.split()[-1] for line in output("nm", "-D", "--defined-only", path).splitlines()}
    assert exported == {f"guardspace_cuda_{name}" for name in _cuda._FUNCTIONS}
    assert not re.findall(r"NEEDED.*\[(lib(?:cu|torch|c10|python|gomp).*)\]", output("readelf", "--dynamic", path))


PROGRAM = """
#include <stdio.h>
#include "guardspace_cuda.h"

int main(void) {
    int count = -1, error = guardspace_cuda_device_count(&count);
    guardspace_lora_outer call = {0};
    call.dtype = 9;
    printf("%d\\n%s\\n", error != 0, error ? guardspace_cuda_error_text(error) : "");
    error = guardspace_cuda_lora_outer(&call, 1.0f, NULL, 0, NULL);
    printf("%d\\n%s\\n", error, guardspace_cuda_error_text(error));
    return 0;
}
"""


@needs_cuda_library
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_a_c_program_calls_the_library(tmp_path):
    (tmp_path / "program.c").write_text(PROGRAM)
    library, program = _cuda.library._name, tmp_path / "program"
    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{ROOT / 'csrc' / 'cuda'}"]
    output("gcc", *flags, tmp_path / "program.c", library, "-o", program)
    failed, text, *wrong = output(program, LD_LIBRARY_PATH=str(Path(library).parent)).splitlines()
    assert failed == str(int(bool(_cuda.no_driver()))) and text == _cuda.no_driver()
    assert wrong == ["-1", "lora_outer: items[0]: dtype is 9; 1 (float32), 2 (float16) or 3 (bfloat16) was expected"]


@needs_compiler
def test_the_flags_of_the_environment_come_last(recipe, monkeypatch):
    for name, value in {"CPPFLAGS": "-DONE", "CXXFLAGS": "-O1 -DTWO='a b'", "LDFLAGS": "-L/some/where"}.items():
        monkeypatch.setenv(name, value)
    tools = recipe.probe_compiler()
    assert tools.flags[-3:] == ["-DONE", "-O1", "-DTWO=a b"] and tools.link_flags[-1] == "-L/some/where"
    assert set(tools.isas) == ({"baseline", *recipe.X86_ISAS} if X86 else {"baseline"})


@pytest.mark.parametrize("tool", ["ninja", "pybind11"])
def test_a_build_without_isolation_says_which_tool_it_lacks(recipe, monkeypatch, tool):
    monkeypatch.setitem(sys.modules, tool, None)
    monkeypatch.setenv("PATH", "/nonexistent")
    find = {"ninja": recipe.find_ninja, "pybind11": recipe.pybind11_headers}[tool]
    with pytest.raises(recipe.NotBuilt, match=f"{tool} was not found; pip install {tool}, or build without"):
        find()


def test_a_source_distribution_holds_the_kernels(tree):
    result = build(tree, "sdist", **NO_COMPILER)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next((tree / "out").glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources and sources <= names and "setup.py" in names


@pytest.fixture
def objects(recipe, tmp_path):
    """The folder of the objects that an installation of this source tree leaves, brought up to date."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    for _ in range(2):
        text = output(*command, GUARDSPACE_REQUIRE_EXT="1", GUARDSPACE_CUDA="0")
    assert "no work to do" in text  # the second time
    tools = json.loads((tmp_path / "lib" / INFO).read_text())
    assert list((tmp_path / "lib").glob(MODULE))
    folder = next(folder for folder in (ROOT / "build").glob("temp.*") if sys.implementation.cache_tag in folder.name)
    return folder, tools["isas"]


def external_symbols(*files):
    """(file, type, name) of what other objects could take from them; a weak one (W, V, u) from any of them."""
    lines = output("nm", "--extern-only", "--defined-only", "--demangle", "--print-file-name", *files).splitlines()
    symbols = [re.match(r"(.*):\S* +(\S) (.*)", line).groups() for line in lines]
    return [symbol for symbol in symbols if symbol[2] != "DW.ref.__gxx_personality_v0"]  # an address, not code


needs_nm = pytest.mark.skipif(not shutil.which("nm") or sys.platform != "linux", reason="needs binutils")


@pytest.mark.slow
@needs_compiler
@needs_nm
def test_an_object_defines_only_what_belongs_to_its_instruction_set(objects, recipe):
    """An inline function that two objects define is kept once: the copy of AVX-512, perhaps, on a CPU without it."""
    folder, isas = objects
    for isa in isas:
        files = [folder / f"{source.stem}.{isa}.o" for source in recipe.KERNELS]
        symbols = external_symbols(*files)
        assert not [s for s in symbols if s[1] not in "TDRB" or not s[2].startswith(f"guardspace::{isa}::")]
        assert {Path(s[0]) for s in symbols} == set(files)


@needs_compiler
@needs_nm
def test_nothing_that_inlining_hides_is_shared_between_instruction_sets(recipe, tmp_path):
    """As above, with what another compiler may not inline: all of it has to lie in unnamed namespaces."""
    isa, flags = ("avx2", recipe.X86_ISAS["avx2"][0]) if X86 else ("baseline", [])
    for source in recipe.KERNELS:
        target = tmp_path / f"{source.stem}.o"
        options = [*recipe.FLAGS, "-O0", "-fno-inline", "-fopenmp", f"-DGUARDSPACE_ISA={isa}", *flags]
        output(*COMPILER, *options, "-c", source, "-o", target)
        symbols = external_symbols(target)
        assert symbols and not [s for s in symbols if not s[2].startswith(f"guardspace::{isa}::")]


def aarch64_compiler():
    """The cross compiler for aarch64, if there is one: GCC's, or the Clang in the wheel ``ziglang``."""
    if shutil.which("aarch64-linux-gnu-g++"):
        return ["aarch64-linux-gnu-g++"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    return None


@pytest.mark.skipif(not aarch64_compiler(), reason="needs aarch64-linux-gnu-g++, or pip install ziglang")
def test_the_baseline_compiles_for_aarch64(recipe, tmp_path):
    caches = {f"ZIG_{scope}_CACHE_DIR": str(tmp_path) for scope in ("GLOBAL", "LOCAL")}
    for source in (*recipe.KERNELS, recipe.DISPATCH):
        macros = ["-DGUARDSPACE_ISA=baseline", "-DGUARDSPACE_HAS_baseline", "-Wno-unknown-pragmas"]
        output(*aarch64_compiler(), *recipe.FLAGS, *macros, "-c", source, "-o", tmp_path / "kernel.o", **caches)
        machine = (tmp_path / "kernel.o").read_bytes()[18:20]
        assert machine == b"\xb7\x00"  # EM_AARCH64


LIBGOMP = """
import torch
from guardspace_kernels import _cpu
print(_cpu.__file__)
print(*sorted({line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if "libgomp" in line}), sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_extension_shares_the_openmp_runtime_of_torch():
    """Two runtimes would have a pool of threads each, and share the cores badly."""
    require_extension()
    if not extension.openmp():
        pytest.skip("built without OpenMP")
    if not (Path(torch.__file__).parent / "lib" / "libgomp.so.1").exists():
        pytest.skip("this torch brings no libgomp.so.1 that could be shared")
    path, *runtimes = output(sys.executable, "-c", LIBGOMP).splitlines()
    assert len(runtimes) == 1 and "torch" in runtimes[0]
    if shutil.which("readelf"):
        needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "--dynamic", path))
        assert "libgomp.so.1" in needed and not [name for name in needed if "torch" in name or "c10" in name]
