"""``python -m benchmarks.gpu_kernels``: what the kernels of each backend take on a CUDA device, and what a call takes.

"Device" is the time of a CUDA graph's replay, a tenth of ten calls: what the GPU does, without the host. "Call" is that
of ten calls, one after the other, from Python: where it is longer, the host is what limits. Medians of five.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.ops import covariance_update_, null_project_, projected_adamw_, projected_lora
from guardspace_kernels.ops._triton_table import KERNELS

from .gpu_training import random_plan
from .run import table
from .timing import write_json

if TYPE_CHECKING:
    from .gpu_run import Record, Row

CALLS = 10
#: LoRAFusion's sources (https://github.com/CentML/lorafusion), where somebody has put them.
LORAFUSION = Path(__file__).resolve().parents[1] / "build" / "lorafusion"
Work = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    device: str = "cuda"
    tokens: int = 8192
    layers: tuple[tuple[int, int], ...] = ((2048, 16), (4096, 16), (4096, 64))  # d, r
    covariances: tuple[tuple[int, int], ...] = ((4096, 1), (1024, 8))  # d, how many
    projections: tuple[tuple[int, int, int, int], ...] = (
        (16, 4096, 512, 64),
        (64, 4096, 1024, 28),
    )  # r, d, k, how many
    backends: tuple[str, ...] = ("triton", "cuda", "reference")

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def basis(self, d: int, k: int) -> torch.Tensor:
        return torch.linalg.qr(self.randn(d, k))[0].contiguous()


TINY = Sizes("cpu", 72, ((16, 8),), ((24, 2),), ((2, 16, 4, 2),), ("reference",))


def call_and_device(work: Work) -> tuple[float, float | None]:
    """Milliseconds of a call from Python, and of what it does on the device; None without one."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start), None
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                work()
        return _median(lambda: [work() for _ in range(CALLS)]), _median(graph.replay)


def _median(run: Work) -> float:
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / CALLS)
    return statistics.median(times[1:])


def kernel_times(work: Work) -> dict[str, float]:
    """Microseconds of a launch of each of our kernels in it."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    ours = {kernel.rpartition(".")[2].removesuffix("_float32") for kernel in KERNELS}
    return {
        event.key: event.self_device_time_total / event.count
        for event in profiler.key_averages()
        if event.key in ours or "guardspace" in event.key
    }


def ours(x, W, A, B, basis, dy):  # type: ignore[no-untyped-def]
    return torch.autograd.grad(projected_lora(x, W, A, B, basis), (x, A, B), dy)


def plain_lora(x, W, A, B, dy):  # type: ignore[no-untyped-def]
    return torch.autograd.grad(x @ W.T + (x @ A.T) @ B.T, (x, A, B), dy)


def frozen_layer(x, W, dy):  # type: ignore[no-untyped-def]
    return torch.autograd.grad(x @ W.T, x, dy)


def fused_lora(x, W, A, B, dy):  # type: ignore[no-untyped-def]
    if str(LORAFUSION) not in sys.path:
        sys.path.insert(0, str(LORAFUSION))
    fused = importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora
    return torch.autograd.grad(fused(x[None], W, A, B, 1.0), (x, A, B), dy[None])


def in_model(model, x, dy):  # type: ignore[no-untyped-def]
    return torch.autograd.grad(model(x), (x, *(p for p in model.parameters() if p.requires_grad)), dy)


class _One(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.proj = nn.Linear(*weight.T.shape, bias=False, device=weight.device, dtype=weight.dtype)
        self.proj.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def _models(weight: torch.Tensor, r: int) -> dict[str, nn.Module]:
    """A layer as people train it: PEFT's, and ours in both modes."""
    from peft import LoraConfig, get_peft_model

    plan = random_plan(_One(weight), r, weight.device)
    guarded = {name: gk.attach_guard(_One(weight), plan) for name in ("guarded layer", "guarded layer, step mode")}
    step_mode = guarded["guarded layer, step mode"]
    optimizer = torch.optim.AdamW([p for p in step_mode.parameters() if p.requires_grad])
    gk.guard_optimizer(optimizer, step_mode)
    step_mode.kept_optimizer = [optimizer]  # whose end would end step mode
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["proj"])
    in_bfloat16 = get_peft_model(_One(weight), config, autocast_adapter_dtype=False)
    return {"PEFT's layer": get_peft_model(_One(weight), config), "PEFT's layer in bfloat16": in_bfloat16, **guarded}


def layers(sizes: Sizes) -> Iterator[tuple[str, dict[str, Work]]]:
    """Forward and backward of one layer in bfloat16: y, dx, dA and dB."""
    for d, r in sizes.layers:
        shapes = ((sizes.tokens, d), (d, d), (sizes.tokens, d))
        x, W, dy = (sizes.randn(*shape, dtype=torch.bfloat16) for shape in shapes)
        A, B, basis = sizes.randn(r, d).requires_grad_(), sizes.randn(d, r).requires_grad_(), sizes.basis(d, d // 8)
        halves = [t.detach().bfloat16().requires_grad_() for t in (A, B)]
        x.requires_grad_()
        contestants = {
            "": partial(ours, x, W, A, B, basis, dy),
            "plain LoRA, no projector": partial(plain_lora, x, W, *halves, dy),
            "frozen layer": partial(frozen_layer, x, W, dy),
            **{name: partial(in_model, model, x, dy) for name, model in _models(W, r).items()},
        }
        if LORAFUSION.exists():
            contestants["LoRAFusion's layer"] = partial(fused_lora, x, W, *halves, dy)
        yield f"layer {d} × {d}, r = {r}", contestants


def in_float32(Cs: list[torch.Tensor], xs: list[torch.Tensor]) -> None:
    for C, x in zip(Cs, xs, strict=True):
        C.addmm_(x.float().T, x.float())


def covariances(sizes: Sizes) -> Iterator[tuple[str, dict[str, Work]]]:
    for dtype in (torch.bfloat16, torch.float32):
        for d, count in sizes.covariances:
            xs = [sizes.randn(sizes.tokens, d, dtype=dtype) for _ in range(count)]
            Cs = [torch.zeros(d, d, device=sizes.device) for _ in xs]
            name = f"{count} covariances of {d}, {str(dtype)[6:]}"
            yield name, {"": partial(covariance_update_, Cs, xs), "addmm_ in float32": partial(in_float32, Cs, xs)}


def projections(sizes: Sizes) -> Iterator[tuple[str, dict[str, Work]]]:
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    for r, d, k, count in sizes.projections:
        params, grads, firsts = ([sizes.randn(r, d) for _ in range(count)] for _ in range(3))
        seconds = [torch.rand(r, d, device=sizes.device) for _ in params]
        steps = [torch.ones((), device=sizes.device) for _ in params]
        bases, kinds = [sizes.basis(d, k) for _ in params], [True] * count
        adamw = partial(projected_adamw_, params, grads, firsts, seconds, steps, bases, kinds, **settings)
        yield f"{count} projections ({r} × {d}, k = {k})", {"": partial(null_project_, grads, bases, kinds)}
        yield f"AdamW between {count} pairs of them", {"": adamw}


def contests(sizes: Sizes) -> Iterator[tuple[Row, str, Work]]:
    """(work and by whom, the backend it runs on, what to run)."""
    for works in (layers, covariances, projections):
        for name, contestants in works(sizes):
            for contestant, run in contestants.items():
                for backend in ("auto",) if contestant else sizes.backends:
                    yield {"work": name, "by": contestant or backend}, backend, run
            if sizes.device == "cuda":
                torch.cuda.empty_cache()


def run(record: Record, smoke: bool) -> None:
    torch.manual_seed(0)
    sizes = TINY if smoke else Sizes()
    for row, backend, work in contests(sizes):

        def measured(work: Work = work, backend: str = backend) -> Row:
            with gk.use_backend(backend):
                call, device = call_and_device(work)
                kernels = kernel_times(work) if backend in ("triton", "cuda") else {}
            return {"device_ms": device, "call_ms": call, "kernels": kernels}

        record.attempt(row, measured)


def _once(work: str, by: str) -> None:
    for row, backend, run in contests(Sizes()):
        if (row["work"], row["by"]) == (work, by):
            with gk.use_backend(backend):
                run()
            torch.cuda.synchronize()
            return
    sys.exit(f"there is no {work!r} by {by!r}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--once", action="store_true", help="run --work --by once, for a profiler to watch")
    parser.add_argument("--work", default="")
    parser.add_argument("--by", default="")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device: torch.cuda.is_available() is False")
    torch.manual_seed(0)
    if args.once:
        _once(args.work, args.by)
        return 0
    rows: list[dict[str, Any]] = []
    for row, backend, work in contests(Sizes()):
        with gk.use_backend(backend):
            call, device = call_and_device(work)
        rows.append({**row, "device_ms": device, "call_ms": call})
    lines = [[row["work"], row["by"], f"{row['device_ms']:.3f}", f"{row['call_ms']:.3f}"] for row in rows]
    where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": Sizes.tokens}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(table(["work", "by", "device ms", "call ms"], lines, True))
    if args.out:
        write_json(args.out, {**where, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
