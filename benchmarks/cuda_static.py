"""What the CUDA kernels compile to, for every chip, read off the library that the build has left, without a GPU.

A part of ``python -m benchmarks.gpu_static``, which writes what is found here into the same files.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from guardspace_kernels.build_info import build_config
from guardspace_kernels.ops import _cuda

Entry = dict[str, Any]
#: Registers that a compilation may need above those of the pinned one.
SLACK = 8
#: Blocks of one kernel that a multiprocessor is meant to hold, so that one computes while another waits.
BLOCKS = 2
_INSTRUCTIONS = {"mma": "tensor-core instructions", "matrices": "ldmatrix", "async": "asynchronous copies"}
#: Kernels that only copy and add.
_WITHOUT_PRODUCTS = ("add_slices", "mirror")


def library() -> tuple[Path | None, str]:
    """The library, and which nvcc compiled it; or None, and the reason."""
    config = build_config().get("cuda", {})
    if _cuda.library is None or "nvcc" not in config:
        return None, config.get("not_built", "the CUDA kernels are not built")
    return Path(_cuda.library._name), config["nvcc"]


def entries(path: Path) -> list[Entry]:
    """One for each kernel and chip."""
    with tempfile.TemporaryDirectory() as folder:
        _tool("cuobjdump", "-xelf", "all", str(path), folder=folder)
        with ThreadPoolExecutor(2) as pool:
            found = [entry for read in pool.map(_read, Path(folder).glob("*.cubin")) for entry in read]
    return sorted(found, key=lambda entry: (entry["kernel"], len(entry["target"]), entry["target"]))


def _tool(name: str, *arguments: str, folder: str | None = None) -> str:
    """What one of the tools in Triton's wheel prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True, cwd=folder).stdout


def _read(cubin: Path) -> Iterator[Entry]:
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", str(cubin)))
    if not usage:
        return
    attributes = _sections(r"^\.nv\.info\.(\w+)$", _tool("cuobjdump", "-elf", str(cubin)))
    codes = _sections(r"^\.text\.(\w+):$", _tool("nvdisasm", "-c", str(cubin)))
    for function, registers, stack in usage:
        threads = re.search(r"MAX_THREADS\n.*\n\s*Value:\s*(\w+)", attributes[function])
        yield {
            "kernel": _name(function),
            "target": re.search(r"\.(sm_\d+)\.", cubin.name)[1].replace("_", ""),  # type: ignore[index]
            "threads": int(threads[1], 16),  # type: ignore[index]
            "registers": int(registers),
            "stack": int(stack),
            **{
                field: len(re.findall(rf"\b(?:{instruction})\b", codes[function]))
                for field, instruction in (
                    ("spills", "STL|LDL"), ("mma", "HMMA"), ("matrices", "LDSM"), ("async", "LDGSTS"),
                )
            },
        }  # fmt: skip


def _sections(title: str, text: str) -> dict[str, str]:
    """What follows each title, by what it names."""
    _, *parts = re.split(title, text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _name(function: str) -> str:
    """projected_lora.outer<bf16, 64>, of a mangled name."""
    op = re.search(r"_\d+_([a-z]\w*?)_cu_", function)[1]  # type: ignore[index]
    text = subprocess.run(["c++filt", function], capture_output=True, text=True, check=True).stdout
    kernel = re.search(r"::(\w+(?:<.*?>)?)\(", text.replace("(anonymous namespace)", ""))[1]  # type: ignore[index]
    for ours, theirs in {
        "bf16": "__nv_bfloat16", "fp16": "__half", "fp32": "float", "by rows": "(guardspace::Adjacent)0",
        "by columns": "(guardspace::Adjacent)1",
    }.items():  # fmt: skip
        kernel = kernel.replace(theirs, ours)
    return f"{op}.{kernel}"


def key(entry: Entry) -> str:
    return f"{entry['kernel']} {entry['target']}"


def blocks(entry: Entry) -> int:
    """That a multiprocessor holds at once, if shared memory allows."""
    from .gpu_static import occupancy

    return occupancy(entry["target"], entry["registers"], entry["threads"] // 32, 0)[0]


def violations(entry: Entry) -> list[str]:
    """What no kernel may do."""
    found = []
    if entry["stack"] or entry["spills"]:
        found.append(f"{entry['stack']} bytes of stack and {entry['spills']} spills: a smaller tile, or more warps")
    if blocks(entry) < BLOCKS:
        found.append(f"{entry['registers']} registers leave room for {blocks(entry)} blocks, not {BLOCKS}")
    if not any(name in entry["kernel"] for name in _WITHOUT_PRODUCTS):
        halves = any(dtype in entry["kernel"] for dtype in ("bf16", "fp16"))
        wanted = {"mma": "products without tensor cores", "async": "no asynchronous copies"}
        wanted |= {"matrices": "fragments without ldmatrix"} if halves else {}
        found += [reason for field, reason in wanted.items() if not entry[field]]
    return [f"{key(entry)}: {reason}" for reason in found]


def compared(found: list[Entry], nvcc: str, pinned: Entry) -> list[str]:
    """What became worse than what is pinned, for the nvcc that it was pinned with."""
    from .gpu_static import HINT

    if nvcc != pinned["nvcc"]:
        return []
    before, problems = {key(entry): entry for entry in pinned["rows"]}, []
    names = {key(entry) for entry in found}
    problems += [
        f"{name}: on one side only of what is compiled and what is pinned" for name in sorted(names ^ before.keys())
    ]
    for entry in found:
        if (old := before.get(key(entry))) is None:
            continue
        if entry["registers"] > old["registers"] + SLACK:
            problems.append(f"{key(entry)}: {entry['registers']} registers, {old['registers']} before")
        problems += [
            f"{key(entry)}: {entry[field]} {what}, {old[field]} before"
            for field, what in _INSTRUCTIONS.items()
            if entry[field] < old[field]
        ]
    return [f"{problem}; {HINT}" for problem in problems]


def render(pinned: Entry) -> str:
    """A line for each kernel, ranges over the chips."""
    from .gpu_static import _range
    from .run import table

    kernels: dict[str, list[Entry]] = {}
    for entry in pinned["rows"]:
        kernels.setdefault(entry["kernel"], []).append({**entry, "blocks": blocks(entry)})
    fields = ("threads", "registers", "spills", "blocks", "mma", "matrices", "async")
    rows = [[f"`{name}`", *(_range(e[field] for e in group) for field in fields)] for name, group in kernels.items()]
    return f"{_HEAD.format(**pinned)}\n\n{table(_HEADER, rows, True)}"


_HEADER = [
    "kernel", "threads", "registers", "spills", "blocks per SM", "tensor-core instructions", "ldmatrix",
    "asynchronous copies",
]  # fmt: skip
_HEAD = """## The CUDA kernels

`csrc/cuda`, compiled by nvcc ({nvcc}) from one PTX for sm80, sm86 (RTX 30), sm89, sm90, sm100 and sm120: ranges are
those of the chips. "Blocks per SM" is what registers and threads allow; a block's shared memory is chosen at launch,
and is at most 99 KB, what the smallest of these chips has. `add_slices` and `mirror` only copy and add."""
