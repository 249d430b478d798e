"""``python -m benchmarks.gpu_static``: what the GPU kernels compile to, for every chip they run on, without a GPU.

Every row of ``guardspace_kernels/ops/_triton_table.py`` is compiled ahead of time for its targets, dtypes and variants;
registers, stack, shared memory and instructions are read off the machine code. ``violations`` says what no kernel may
do, ``regressions`` what became worse than in ``results/gpu_static.json``; ``results/gpu_static.md`` is for people.
``cuda_static`` does the same for the CUDA kernels, where they are built.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardspace_kernels.ops._triton_table import KERNELS, ROWS, Row

from . import cuda_static
from .timing import read_json, write_json

RESULTS = Path(__file__).parent / "results"
PINNED, TABLE = RESULTS / "gpu_static.json", RESULTS / "gpu_static.md"
HINT = "if it is meant to be so, run `make gpu-static` and commit benchmarks/results/gpu_static.*"
#: Registers that a compilation may need above those of the pinned one.
SLACK = 8

Entry = dict[str, Any]
#: The fields by which an entry is known.
KEY = ("kernel", "row", "target", "dtypes", "variant")


@dataclass(frozen=True)
class Chip:
    """What a block may have (``shared`` bytes), and what the blocks of one multiprocessor share."""

    shared: int
    shared_of_all: int
    warps: int
    blocks: int


_KB = 1024
#: CUDA's programming guide, compute capabilities; a block's last KB of shared memory is the driver's.
CHIPS = {
    "sm80": Chip(163 * _KB, 164 * _KB, 64, 32),
    "sm86": Chip(99 * _KB, 100 * _KB, 48, 16),
    "sm89": Chip(99 * _KB, 100 * _KB, 48, 24),
    "sm90": Chip(227 * _KB, 228 * _KB, 64, 32),
    "sm100": Chip(227 * _KB, 228 * _KB, 64, 32),
    "sm120": Chip(99 * _KB, 100 * _KB, 48, 24),
    "gfx942": Chip(64 * _KB, 64 * _KB, 32, 32),
}


def occupancy(target: str, registers: int, warps: int, shared: int, tensor_memory: int = 0) -> tuple[int, str]:
    """Blocks that a multiprocessor holds at once, and what there is too little of for one more.

    ``tensor_memory``: columns, of which a multiprocessor of sm100 has 512.
    """
    chip, nvidia = CHIPS[target], target.startswith("sm")
    # 65536 registers, handed out to a warp by 256; on AMD 512 a lane in each of four SIMDs, handed out by 8.
    per_warp = -(-registers // 8) * 8
    held = 65536 // (32 * per_warp) if nvidia else 4 * min(8, 512 // per_warp)
    limits = {
        "blocks": chip.blocks,
        "registers": held // warps,
        "shared memory": chip.shared_of_all // (shared + _KB * nvidia) if shared else chip.blocks,
        "tensor memory": 512 // tensor_memory if tensor_memory else chip.blocks,
        "threads": chip.warps // warps,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


@dataclass(frozen=True)
class Job:
    """One compilation."""

    row: Row
    target: str
    dtypes: str
    variant: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> Entry:
        variant = " ".join(f"{name}={value}" for name, value in self.variant)
        values = (self.row.kernel, self.row.key, self.target, self.dtypes, variant)
        return dict(zip(KEY, values, strict=True))


def jobs(rows: Iterable[Row] = ROWS) -> Iterator[Job]:
    for row in rows:
        kernel = KERNELS[row.kernel]
        for target in row.targets:
            for dtypes in kernel.dtypes:
                for variant in kernel.variants:
                    yield Job(row, target, dtypes, tuple(variant.items()))


def compile_job(job: Job) -> Entry:
    """In a process of its own (:func:`workers`): Triton must not have been told to interpret."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    row, kernel = job.row, KERNELS[job.row.kernel]
    op, name = row.kernel.split(".")
    function = getattr(importlib.import_module(f"guardspace_kernels.ops.{op}.{kernel.module}"), name)
    dtypes = dict(zip(("*x", "*y", "*z"), job.dtypes.split(), strict=False))
    signature = {
        argument: f"*{dtypes[kind]}" if kind in dtypes else kind for argument, kind in kernel.arguments.items()
    }
    constants = {**dict(job.variant), **row.constants}
    tiles = kernel.descriptors(constants)
    signature |= {argument: f"tensordesc<{dtypes['*x']}{[*tile]}>" for argument, tile in tiles.items()}
    hints = {(list(signature).index(argument),): [["tt.divisibility", 16]] for argument in kernel.aligned}
    signature |= dict.fromkeys(constants, "constexpr")
    nvidia = job.target.startswith("sm")
    compiled = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants, attrs=hints),
        target=GPUTarget("cuda", int(job.target[2:]), 32) if nvidia else GPUTarget("hip", job.target, 64),
        options={"num_warps": row.warps, "num_stages": row.stages},
    )
    machine_code = compiled.asm["cubin"] if nvidia else compiled.asm["amdgcn"].encode()
    return {
        **job.key,
        "warps": compiled.metadata.num_warps,  # with those that warp specialisation adds
        "stages": row.stages,
        "products": compiled.asm["ttir"].count("tt.dot "),
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        **_remembered(machine_code, _read_cubin if nvidia else _read_amdgcn),
    }


def _remembered(machine_code: bytes, read: Any) -> Entry:
    """To disassemble takes as long as to compile, and Triton's own cache knows nothing of it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guardspace_kernels" / "gpu_static"
    path = cache / f"{hashlib.sha256(machine_code).hexdigest()}.json"
    if not path.exists():
        write_json(path, read(machine_code))
    return json.loads(path.read_text(encoding="utf-8"))


def _read_cubin(cubin: bytes) -> Entry:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(name: str, option: str) -> str:
            command = [str(tools / name), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = tool("cuobjdump", "-res-usage"), tool("nvdisasm", "-c")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    return {
        "registers": registers,
        "stack": stack,
        "spills": _count(r"STL|LDL", code),
        "mma": _count(r"HMMA|HGMMA|UTC\w*MMA", code),
        "async": _count(r"LDGSTS|UTMALDG", code),
    }


def _read_amdgcn(assembly: bytes) -> Entry:
    code = assembly.decode()

    def fact(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # type: ignore[index]

    return {
        "registers": fact("vgpr_count"),
        "stack": fact("private_segment_fixed_size"),
        "spills": fact("vgpr_spill_count") + fact("sgpr_spill_count"),
        "mma": _count("v_mfma_", code),
        "async": 0,
    }


def _count(instruction: str, code: str) -> int:
    return len(re.findall(rf"\b(?:{instruction})", code))


def _not_interpreted() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def workers(count: int) -> ProcessPoolExecutor:
    """Processes that compile."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _not_interpreted)


def violations(entry: Entry) -> list[str]:
    """What no kernel may do."""
    chip, found = CHIPS[entry["target"]], []
    if entry["stack"] or entry["spills"]:
        found.append(f"{entry['stack']} bytes of stack and {entry['spills']} spills: a smaller tile, or more warps")
    if entry["shared"] > chip.shared:
        found.append(f"{entry['shared']} bytes of shared memory, of {chip.shared}: a smaller tile, or fewer stages")
    elif not blocks(entry)[0]:
        found.append("not one block fits a multiprocessor: fewer warps, or a smaller tile")
    if entry["products"] and not entry["mma"]:
        found.append("products without tensor cores: another PRECISION, or tiles that they take")
    if copies_ahead(entry) and not entry["async"]:
        found.append(f"{entry['stages']} stages, but nothing is copied asynchronously: loads that are wide enough")
    return [f"{name(entry)}: {reason}" for reason in found]


def copies_ahead(entry: Entry) -> bool:
    """Whether its loads are meant to run ahead of its products: asynchronous copies take 4 bytes at least, which
    unaligned rows of 16-bit numbers do not promise."""
    aligned = "GROUPED=True ALIGNED=False" not in entry["variant"] or "16" not in entry["dtypes"]
    return bool(entry["target"].startswith("sm") and entry["stages"] > 1 and entry["products"] and aligned)


def regressions(entry: Entry, pinned: Entry) -> list[str]:
    """What became worse than what is pinned."""
    found = []
    if entry["registers"] > pinned["registers"] + SLACK:
        found.append(f"{entry['registers']} registers, {pinned['registers']} before")
    if entry["shared"] > pinned["shared"]:
        found.append(f"{entry['shared']} bytes of shared memory, {pinned['shared']} before")
    for field, what in (("mma", "tensor-core instructions"), ("async", "asynchronous copies")):
        if entry[field] < pinned[field]:
            found.append(f"{entry[field]} {what}, {pinned[field]} before")
    return [f"{name(entry)}: {reason}; {HINT}" for reason in found]


def name(entry: Entry) -> str:
    return " ".join(f"{entry[field]}" for field in KEY if entry[field])


def blocks(entry: Entry) -> tuple[int, str]:
    return occupancy(entry["target"], *(entry[field] for field in ("registers", "warps", "shared", "tensor_memory")))


def render(entries: list[Entry], cuda: Entry) -> str:
    from . import roofline  # the processes that compile need none of what it imports
    from .run import table

    parts = [_HEAD]
    for kernel in dict.fromkeys(entry["kernel"] for entry in entries):
        lines = _lines([entry for entry in entries if entry["kernel"] == kernel])
        parts.append(f"### {kernel}\n\n{table(_HEADER, lines, True)}")
    return "\n\n".join([*parts, cuda_static.render(cuda), roofline.render()]) + "\n"


_HEADER = [
    "tile", "warps", "stages", "dtype", "chip", "registers", "spills", "shared KB", "blocks per SM", "limit",
    "tensor-core instructions", "asynchronous copies",
]  # fmt: skip


def _lines(entries: list[Entry]) -> list[list[str]]:
    """A line for each row, chip and group of dtypes: the variants of a call as ranges, dtypes of equal lines as one."""
    variants: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        variants.setdefault((entry["row"], entry["target"], entry["dtypes"]), []).append(entry)
    lines: dict[tuple[str, ...], list[str]] = {}
    for (row, target, dtypes), group in variants.items():
        tile, warps, stages = re.fullmatch(r"(.*) warps=(\d+) stages=(\d+)", row).groups()  # type: ignore[union-attr]
        held = [blocks(entry) for entry in group]
        numbers = [_range(entry[field] for entry in group) for field in ("registers", "spills")]
        numbers.append(_range(round(entry["shared"] / _KB) for entry in group))
        numbers += [_range(count for count, _ in held), ", ".join(sorted({limit for _, limit in held}))]
        numbers += [_range(entry[field] for entry in group) for field in ("mma", "async")]
        lines.setdefault((tile, warps, stages, target, *numbers), []).append(dtypes.replace(" ", "→"))
    return [
        [tile, warps, stages, ", ".join(dtypes), target, *numbers]
        for (tile, warps, stages, target, *numbers), dtypes in lines.items()
    ]


def _range(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]}–{found[-1]}"


_HEAD = """# The GPU kernels, as compiled

**Static evidence; no GPU was used. Bounds, not timings.** `make gpu-static` writes this file.

## The Triton kernels

Every launch configuration of the table is compiled ahead of time for each of its chips by Triton's own compilers and
read off the machine code. sm80 is an A100, sm89 an L4 or RTX 40, sm90 an H100 or H200, sm100 a B200, sm120 an RTX 50,
gfx942 an MI300. Ranges are those of a kernel's variants: one item or many in a launch, aligned or not.
"Blocks per SM" follows from registers, shared memory and threads, and "limit" says of which there is too little for
one more. Instructions are counted in the code, not as executed."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; compare with what is pinned")
    parser.add_argument("--kernel", default="", help="of these kernels only: a part of their names; writes nothing")
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels only; the others stay as they are pinned")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    wanted = [job for job in jobs() if args.kernel in job.row.kernel and not args.cuda]
    with workers(args.processes) as pool:
        entries = list(pool.map(compile_job, wanted, chunksize=2))
    problems = [reason for entry in entries for reason in violations(entry)]
    version = importlib.metadata.version("triton")
    library, nvcc = cuda_static.library()
    cuda = {"nvcc": nvcc, "rows": [] if library is None or args.kernel else cuda_static.entries(library)}
    problems += [reason for entry in cuda["rows"] for reason in cuda_static.violations(entry)]
    if args.kernel or args.check:
        if not args.cuda:
            problems += compared(entries, version, whole=not args.kernel)
        if cuda["rows"]:
            problems += cuda_static.compared(cuda["rows"], nvcc, read_json([PINNED])["cuda"])
    else:
        pinned = {"triton": version, "rows": entries, "cuda": cuda}
        if args.cuda:
            pinned = {**read_json([PINNED]), "cuda": cuda}
        elif library is None:
            pinned["cuda"] = read_json([PINNED])["cuda"]
        write_json(PINNED, pinned)
        TABLE.write_text(render(pinned["rows"], pinned["cuda"]), encoding="utf-8")
    count = len(entries) + len(cuda["rows"])
    print("\n".join([*problems, f"{count} compilations, {len(problems)} problems"]))
    return 1 if problems else 0


def compared(entries: list[Entry], version: str, whole: bool = True) -> list[str]:
    """With what is pinned, for the version of Triton that it was pinned with."""
    result = read_json([PINNED])
    if result["triton"] != version:
        return []
    pinned = {name(entry): entry for entry in result["rows"]}
    missing = [f"{name(entry)}: not in {PINNED.name}; {HINT}" for entry in entries if name(entry) not in pinned]
    unknown = sorted(pinned.keys() - {name(entry) for entry in entries}) if whole else []
    return [
        *missing,
        *(f"{key}: in {PINNED.name}, but not in the table of kernels; {HINT}" for key in unknown),
        *(reason for e in entries if name(e) in pinned for reason in regressions(e, pinned[name(e)])),
    ]


if __name__ == "__main__":
    sys.exit(main())
