"""``python -m benchmarks.gpu_kernels``: what the kernels of each backend take on a CUDA device, and what a call takes.

"Device" is the time of a CUDA graph's replay, a tenth of ten calls: what the GPU does, without the host. "Call" is that
of ten calls, one after the other, from Python: where it is longer, the host is what limits. Medians of five.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import guardspace_kernels as gk
from guardspace_kernels.ops import covariance_update_, null_project_, projected_adamw_, projected_lora

from .run import table
from .timing import write_json

CALLS = 10
TOKENS = 8192
BACKENDS = ("triton", "cuda", "reference")
Work = Callable[[], Any]


def call_and_device(work: Work) -> tuple[float, float]:
    """Milliseconds of a call from Python, and of what it does on the device."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                work()
        return tuple(_median(run) for run in (lambda: [work() for _ in range(CALLS)], graph.replay))  # type: ignore[return-value]


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


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _basis(d: int, k: int) -> torch.Tensor:
    return torch.linalg.qr(_randn(d, k))[0].contiguous()


def ours(x, W, A, B, basis, dy):  # type: ignore[no-untyped-def]
    return torch.autograd.grad(projected_lora(x, W, A, B, basis), (x, A, B), dy)


def plain_lora(x, W, A, B, dy):  # type: ignore[no-untyped-def]
    return torch.autograd.grad(x @ W.T + (x @ A.T) @ B.T, (x, A, B), dy)


def frozen_layer(x, W, dy):  # type: ignore[no-untyped-def]
    return torch.autograd.grad(x @ W.T, x, dy)


def layers() -> Iterator[tuple[str, dict[str, Work]]]:
    """Forward and backward of one layer in bfloat16: y, dx, dA and dB."""
    for d, r in ((2048, 16), (4096, 16), (4096, 64)):
        x, W, dy = (_randn(*shape, dtype=torch.bfloat16) for shape in ((TOKENS, d), (d, d), (TOKENS, d)))
        A, B, basis = _randn(r, d).requires_grad_(), _randn(d, r).requires_grad_(), _basis(d, d // 8)
        halves = [t.detach().bfloat16().requires_grad_() for t in (A, B)]
        x.requires_grad_()
        yield (
            f"layer {d} × {d}, r = {r}",
            {
                "": partial(ours, x, W, A, B, basis, dy),
                "plain LoRA, no projector": partial(plain_lora, x, W, *halves, dy),
                "frozen layer": partial(frozen_layer, x, W, dy),
            },
        )


def in_float32(Cs: list[torch.Tensor], xs: list[torch.Tensor]) -> None:
    for C, x in zip(Cs, xs, strict=True):
        C.addmm_(x.float().T, x.float())


def covariances() -> Iterator[tuple[str, dict[str, Work]]]:
    for dtype in (torch.bfloat16, torch.float32):
        for d, count in ((4096, 1), (1024, 8)):
            xs = [_randn(TOKENS, d, dtype=dtype) for _ in range(count)]
            Cs = [torch.zeros(d, d, device="cuda") for _ in xs]
            name = f"{count} covariances of {d}, {str(dtype)[6:]}"
            yield name, {"": partial(covariance_update_, Cs, xs), "addmm_ in float32": partial(in_float32, Cs, xs)}


def projections() -> Iterator[tuple[str, dict[str, Work]]]:
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    for r, d, k, count in ((16, 4096, 512, 64), (64, 4096, 1024, 28)):
        params, grads, firsts = ([_randn(r, d) for _ in range(count)] for _ in range(3))
        seconds = [torch.rand(r, d, device="cuda") for _ in params]
        steps, bases = [torch.ones((), device="cuda") for _ in params], [_basis(d, k) for _ in params]
        kinds = [True] * count
        adamw = partial(projected_adamw_, params, grads, firsts, seconds, steps, bases, kinds, **settings)
        yield f"{count} projections ({r} × {d}, k = {k})", {"": partial(null_project_, grads, bases, kinds)}
        yield f"AdamW between {count} pairs of them", {"": adamw}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device: torch.cuda.is_available() is False")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for work in (layers, covariances, projections):
        for name, contestants in work():
            for contestant, run in contestants.items():
                for backend in (contestant,) if contestant else BACKENDS:
                    with gk.use_backend("auto" if contestant else backend):
                        call, device = call_and_device(run)
                    rows.append({"work": name, "by": backend, "device_ms": device, "call_ms": call})
            torch.cuda.empty_cache()
    lines = [[row["work"], row["by"], f"{row['device_ms']:.3f}", f"{row['call_ms']:.3f}"] for row in rows]
    where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": TOKENS}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(table(["work", "by", "device ms", "call ms"], lines, True))
    if args.out:
        write_json(args.out, {**where, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
