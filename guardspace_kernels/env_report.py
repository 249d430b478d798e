"""``guardspace env``: one page about this installation."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform

import torch

import guardspace_kernels
from guardspace_kernels import dispatch
from guardspace_kernels.build_info import build_config

_PACKAGES = ("transformers", "peft", "accelerate", "trl", "safetensors", "numpy", "triton")
_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_flags() -> list[str]:
    """Those of the instruction sets that matter here which the CPU reports (Linux only; empty elsewhere)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            text = file.read()
    except OSError:
        return []
    lines = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    found = set(lines[0].split(":", 1)[1].split()) if lines else set()
    return [flag for flag in _CPU_FLAGS if flag in found]


def cpu_extension() -> list[tuple[str, str]]:
    """Rows about the compiled CPU kernels: what they were built with and use, or why there are none."""
    config = build_config()
    try:
        extension = importlib.import_module("guardspace_kernels._cpu")  # after torch, whose libgomp it then shares
    except ImportError as error:
        if "not_built" in config:
            return [("cpu extension", f"not built: {config['not_built']}; then install guardspace_kernels again")]
        return [("cpu extension", f"does not load: {error}; install guardspace_kernels again")]
    try:
        isa = f"{extension.isa()} in use"
    except ValueError as error:  # GUARDSPACE_ISA names one that is not there
        isa = str(error)
    built = ", ".join(config.get("isas", ["unknown"]))
    compiler, flags = (config.get(key, f"unknown {key}") for key in ("compiler", "flags"))
    return [
        ("cpu extension", f"{isa}; built: {built}; {'OpenMP' if extension.openmp() else 'without OpenMP'}"),
        ("cpu extension built", f"{compiler}: {flags}"),
        *(("cpu extension note", note) for note in config.get("notes", [])),
        ("GUARDSPACE_ISA", os.environ.get("GUARDSPACE_ISA") or "not set (automatic)"),
    ]


def cuda_kernels() -> tuple[str, str]:
    """The row about the CUDA kernels: what they were built with, or why there are none."""
    config = build_config()
    config = config.get("cuda", config)
    if "not_built" in config:
        return "cuda kernels", f"not built: {config['not_built']}; then install guardspace_kernels again"
    chips, nvcc = (config.get(key, f"unknown {key}") for key in ("chips", "nvcc"))
    return "cuda kernels", f"built for {', '.join(chips)} by nvcc, {nvcc}"


def environment_report() -> str:
    """Versions, CPU features, GPUs, and each backend with the reason why it is or is not used."""
    rows = [
        ("guardspace_kernels", guardspace_kernels.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'}"),
        *((package, _version(package)) for package in _PACKAGES),
        ("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, {' '.join(cpu_flags()) or 'flags unknown'}"),
        ("torch cpu level", torch.backends.cpu.get_cpu_capability()),
        *cpu_extension(),
        cuda_kernels(),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            rows.append((f"gpu {i}", f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})"))
    else:
        rows.append(("gpu", "none visible to torch"))
    rows.append(("GUARDSPACE_BACKEND", os.environ.get("GUARDSPACE_BACKEND", "not set (automatic)")))
    lines = [f"{name:20} {value}" for name, value in rows]
    lines.append("")
    requested = None
    try:
        requested = dispatch.requested_backend()
    except ValueError as error:
        lines += [str(error), ""]  # every op would raise it
    for op in dispatch.OPS:
        taken = requested
        for _, backend, registered, reason in (row for row in dispatch.status() if row[0] == op):
            used = registered and taken in (None, backend)
            if used and taken is None:
                taken = backend
            elif registered and not used:
                reason = f"registered, but {taken} is preferred or requested"
            lines.append(f"{op:16} {backend:10} {'used' if used else '-':5} {reason}")
    return "\n".join(lines)
