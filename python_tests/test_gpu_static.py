"""The GPU kernels compiled ahead of time for every chip: what no kernel may do, and what is pinned."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from guardspace_kernels.ops._triton_table import AMD, KERNELS, NVIDIA, ROWS

pytest.importorskip("triton", reason="Triton is not installed")
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import cuda_static, gpu_static, timing

GOOD = {
    "kernel": "op.kernel", "row": "BLOCK=64 warps=8 stages=3", "target": "sm80", "dtypes": "bf16", "variant": "",
    "warps": 8, "stages": 3, "products": 1, "shared": 49152, "tensor_memory": 0, "registers": 128, "stack": 0,
    "spills": 0, "mma": 64, "async": 12,
}  # fmt: skip
NAME = "op.kernel BLOCK=64 warps=8 stages=3 sm80 bf16"


CUDA = {
    "kernel": "op.kernel<bf16>", "target": "sm80", "threads": 256, "registers": 128, "stack": 0, "spills": 0, "mma": 64,
    "matrices": 8, "async": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def pinned():
    return timing.read_json([gpu_static.PINNED])


@pytest.fixture(scope="module")
def worker():
    with gpu_static.workers(1) as pool:
        yield pool


def test_the_committed_report_is_that_of_the_table(pinned):
    assert {gpu_static.name(entry) for entry in pinned["rows"]} == {
        gpu_static.name(job.key) for job in gpu_static.jobs()
    }, gpu_static.HINT
    assert gpu_static.TABLE.read_text(encoding="utf-8") == gpu_static.render(pinned["rows"], pinned["cuda"]), (
        gpu_static.HINT
    )
    assert not [reason for entry in pinned["rows"] for reason in gpu_static.violations(entry)]
    assert not [reason for entry in pinned["cuda"]["rows"] for reason in cuda_static.violations(entry)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_compiles_for_every_chip_as_well_as_before(worker, kernel):
    entries = list(worker.map(gpu_static.compile_job, gpu_static.jobs(row for row in ROWS if row.kernel == kernel)))
    problems = [reason for entry in entries for reason in gpu_static.violations(entry)]
    problems += gpu_static.compared(entries, importlib.metadata.version("triton"), whole=False)
    assert entries and not problems, "\n".join(problems)


def planted(worker, kernel, dtypes, target, warps=None, **constants):
    row = next(row for row in ROWS if row.kernel == kernel and target in row.targets)
    row = replace(row, constants={**row.constants, **constants}, warps=warps or row.warps)
    job = next(job for job in gpu_static.jobs([row]) if (job.target, job.dtypes) == (target, dtypes))
    return gpu_static.violations(worker.submit(gpu_static.compile_job, job).result())


def test_a_tile_that_spills_is_refused(worker):
    problems = planted(worker, "covariance.add_tiles", "bf16", "sm80", warps=4, BLOCK=128)
    assert len(problems) == 1 and "bytes of stack" in problems[0] and problems[0].startswith("covariance.add_tiles ")


def test_a_product_in_registers_is_refused(worker):
    (problem,) = planted(worker, "covariance.add_tiles_float32", "fp32", "sm80", BLOCK=32, PRECISION="ieee")
    assert "products without tensor cores" in problem


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"stack": 8}, "8 bytes of stack and 0 spills: a smaller tile, or more warps"),
        ({"spills": 3}, "0 bytes of stack and 3 spills"),
        ({"shared": 163 * 1024 + 1}, "166913 bytes of shared memory, of 166912: a smaller tile, or fewer stages"),
        ({"shared": 163 * 1024}, None),
        ({"registers": 255, "warps": 16}, "not one block fits a multiprocessor"),
        ({"mma": 0}, "products without tensor cores: another PRECISION, or tiles that they take"),
        ({"mma": 0, "products": 0, "async": 0}, None),
        ({"async": 0}, "3 stages, but nothing is copied asynchronously"),
        ({"async": 0, "stages": 1}, None),
        ({"async": 0, "target": "gfx942"}, None),
        ({"async": 0, "variant": "GROUPED=True ALIGNED=False"}, None),
        ({"async": 0, "variant": "GROUPED=True ALIGNED=False", "dtypes": "fp32"}, "nothing is copied"),
    ],
)
def test_violations(change, reason):
    found = gpu_static.violations({**GOOD, **change})
    assert len(found) == (reason is not None)
    assert reason is None or (reason in found[0] and found[0].startswith("op.kernel BLOCK=64"))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"registers": 136, "mma": 65, "async": 13, "shared": 0}, None),
        ({"registers": 137}, "137 registers, 128 before"),
        ({"shared": 49153}, "49153 bytes of shared memory, 49152 before"),
        ({"mma": 63}, "63 tensor-core instructions, 64 before"),
        ({"async": 11}, "11 asynchronous copies, 12 before"),
    ],
)
def test_regressions(change, reason):
    found = gpu_static.regressions({**GOOD, **change}, GOOD)
    assert found == ([] if reason is None else [f"{NAME}: {reason}; {gpu_static.HINT}"])


def test_what_is_pinned_and_what_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_static, "PINNED", tmp_path / "pinned.json")
    timing.write_json(gpu_static.PINNED, {"triton": "3.8.0", "rows": [GOOD]})
    assert gpu_static.compared([GOOD], "3.8.0") == []
    other = {**GOOD, "target": "sm90"}
    assert gpu_static.compared([other], "3.8.0") == [
        f"{NAME.replace('sm80', 'sm90')}: not in pinned.json; {gpu_static.HINT}",
        f"{NAME}: in pinned.json, but not in the table of kernels; {gpu_static.HINT}",
    ]
    assert gpu_static.compared([{**GOOD, "mma": 1}], "3.8.0", whole=False)[0].startswith(f"{NAME}: 1 tensor-core")
    assert gpu_static.compared([other], "3.9.0") == []  # another compiler


@pytest.mark.parametrize(
    "target, registers, warps, shared, tensor_memory, expected",
    [
        ("sm80", 255, 8, 49152, 0, (1, "registers")),  # 8 warps of 8192 registers: all 65536
        ("sm80", 128, 8, 98304, 0, (1, "shared memory")),  # 96 + 1 of 164 KB
        ("sm90", 115, 8, 98304, 0, (2, "registers")),  # 120 · 32 a warp: 17 warps
        ("sm90", 90, 8, 163864, 0, (1, "shared memory")),
        ("sm80", 32, 4, 0, 0, (16, "registers")),
        ("sm89", 24, 4, 0, 0, (12, "threads")),  # 48 warps
        ("sm80", 16, 1, 0, 0, (32, "blocks")),
        ("sm100", 64, 4, 1024, 256, (2, "tensor memory")),
        ("gfx942", 168, 8, 32768, 0, (1, "registers")),  # 3 waves in each of 4 SIMDs
        ("gfx942", 64, 4, 32768, 0, (2, "shared memory")),
        ("sm80", 255, 16, 0, 0, (0, "registers")),
    ],
)
def test_occupancy(target, registers, warps, shared, tensor_memory, expected):
    assert gpu_static.occupancy(target, registers, warps, shared, tensor_memory) == expected


def test_every_chip_of_the_table_is_known():
    assert gpu_static.CHIPS.keys() == {*NVIDIA, *AMD, "sm86"}


def test_equal_lines_of_the_report_are_one():
    entries = [
        {**GOOD, "variant": "GROUPED=False"},
        {**GOOD, "variant": "GROUPED=True", "registers": 120},
        {**GOOD, "variant": "GROUPED=False", "dtypes": "fp16 bf16"},
        {**GOOD, "variant": "GROUPED=True", "dtypes": "fp16 bf16", "registers": 120},
        {**GOOD, "target": "sm90", "shared": 100 * 1024},
    ]
    assert gpu_static._lines(entries) == [
        ["BLOCK=64", "8", "3", "bf16, fp16→bf16", "sm80", "120–128", "0", "48", "2", "registers", "64", "12"],
        ["BLOCK=64", "8", "3", "bf16", "sm90", "128", "0", "100", "2", "registers", "64", "12"],
    ]
    text = gpu_static.render(entries, {"nvcc": "release 13.0", "rows": [CUDA]})
    assert "**Static evidence; no GPU was used. Bounds, not timings.**" in text
    assert "### op.kernel\n\n| tile | warps | stages |" in text and "## Roofline" in text
    assert "| `op.kernel<bf16>` | 256 | 128 | 0 | 2 | 64 | 8 | 4 |" in text


# ---- the CUDA kernels


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(cuda_static.library()[0] is None, reason=cuda_static.library()[1])
def test_the_cuda_kernels_compile_for_every_chip_as_well_as_before(pinned):
    path, nvcc = cuda_static.library()
    entries = cuda_static.entries(path)
    assert {entry["target"] for entry in entries} >= {"sm80", "sm90"}
    problems = [reason for entry in entries for reason in cuda_static.violations(entry)]
    problems += cuda_static.compared(entries, nvcc, pinned["cuda"])
    assert not problems, "\n".join(problems)


SPILLS = """
namespace guardspace { namespace {
__global__ void __launch_bounds__(64) spills(float* x, int n) {
    float many[200];
    for (int i = 0; i < 200; ++i) many[i] = x[i * n];
    for (int i = 0; i < n; ++i) x[i] = many[i % 200];
}
} }
void keep() { guardspace::spills<<<1, 1>>>(nullptr, 0); }
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
def test_a_cuda_kernel_that_spills_and_has_no_products_is_refused(tmp_path):
    source, library = tmp_path / "planted.cu", tmp_path / "planted.so"
    source.write_text(SPILLS)
    subprocess.run(["nvcc", "-shared", "-Xcompiler=-fPIC", "-arch=sm_80", source, "-o", library], check=True)
    (entry,) = cuda_static.entries(library)
    assert entry["kernel"] == "planted.spills" and entry["target"] == "sm80" and entry["stack"] >= 800
    reasons = " ".join(cuda_static.violations(entry))
    assert "bytes of stack" in reasons and "products without tensor cores" in reasons and "no asynchronous" in reasons


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"stack": 8}, "8 bytes of stack and 0 spills"),
        ({"registers": 129}, "129 registers leave room for 1 blocks, not 2"),
        ({"mma": 0}, "products without tensor cores"),
        ({"matrices": 0}, "fragments without ldmatrix"),
        ({"matrices": 0, "kernel": "op.kernel<fp32>"}, None),
        ({"async": 0}, "no asynchronous copies"),
        ({"kernel": "op.add_slices", "mma": 0, "matrices": 0, "async": 0}, None),
    ],
)
def test_violations_of_cuda_kernels(change, reason):
    found = cuda_static.violations({**CUDA, **change})
    assert len(found) == (reason is not None) and (reason is None or reason in found[0])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"registers": 136, "mma": 65}, None),
        ({"registers": 137}, "137 registers, 128 before"),
        ({"mma": 63}, "63 tensor-core instructions, 64 before"),
        ({"matrices": 7}, "7 ldmatrix, 8 before"),
        ({"async": 3}, "3 asynchronous copies, 4 before"),
    ],
)
def test_regressions_of_cuda_kernels(change, reason):
    pinned = {"nvcc": "release 13.0", "rows": [CUDA]}
    found = cuda_static.compared([{**CUDA, **change}], "release 13.0", pinned)
    assert found == ([] if reason is None else [f"op.kernel<bf16> sm80: {reason}; {gpu_static.HINT}"])
    assert cuda_static.compared([{**CUDA, **change}], "release 12.9", pinned) == []  # another compiler
    assert len(cuda_static.compared([], "release 13.0", pinned)) == 1
