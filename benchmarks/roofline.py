"""Lower bounds on the time of the ops on GPUs, from data sheets: what each way of computing must calculate and move.

A way is a sequence of kernels, none of which can take less than its FLOPs at the peak rate, nor less than its bytes at
the memory's full bandwidth, each tensor moved once. Nothing here is a timing.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import bench_covariance, bench_null_projection
from .bench_projected_lora import protected_dims
from .run import table

#: Dense bfloat16 FLOP/s and bytes/s of the SXM boards with 80 GB, by NVIDIA's data sheets.
GPUS = {"A100": (312e12, 2.039e12), "H100": (989e12, 3.35e12)}

#: (d_in, d_out) of the linear layers of a block.
MODELS = {
    "Llama-2-7B": {"q, k, v, o": (4096, 4096), "gate, up": (4096, 11008), "down": (11008, 4096)},
    "Llama-3-8B": {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)},
    "Qwen2-7B": {"q, o": (3584, 3584), "k, v": (3584, 512), "gate, up": (3584, 18944), "down": (18944, 3584)},
}
TOKENS, RANK = 4096, 16
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Kernel:
    flops: int
    bytes: int

    def seconds(self, gpu: str) -> float:
        peak, bandwidth = GPUS[gpu]
        return max(self.flops / peak, self.bytes / bandwidth)


Way = tuple[Kernel, ...]


def product(m: int, n: int, k: int, *, adds: bool = False, element: int = BF16) -> Kernel:
    """An (m, k) matrix by a (k, n) one; ``adds``: to what is there."""
    return Kernel(2 * m * n * k, element * (m * k + k * n + (1 + adds) * m * n))


def elementwise(numbers: int, tensors: int) -> Kernel:
    return Kernel(0, BF16 * numbers * tensors)


def lora_ways(T: int, d_in: int, d_out: int, r: int) -> dict[str, Way]:
    """Forward and backward (dx, dA, dB) of a layer in bfloat16 whose basis protects a third of d_in, by way."""
    k = protected_dims(d_in)
    y, dx = product(T, d_out, d_in), product(T, d_in, d_out)
    h, dh = product(T, r, d_in), product(T, r, d_out)
    dA, dB = product(r, d_in, T), product(d_out, r, T)
    fold: Way = 2 * (product(r, k, d_in, element=FP32), product(r, d_in, k, element=FP32, adds=True))  # A P, dA P
    # The update of rank r in the epilogue of the large product: y and dx are written once.
    fused_y = Kernel(y.flops + 2 * T * r * d_out, y.bytes + BF16 * r * (T + d_out))
    fused_dx = Kernel(dx.flops + 2 * T * r * d_in, dx.bytes + BF16 * r * (T + d_in))
    # dy is read once for both.
    dh_dB = Kernel(dh.flops + dB.flops, BF16 * (T * d_out + 2 * r * d_out + 2 * T * r))
    # Autograd of y + s · (h Bᵀ): the product, the scaled one, the sum; and backwards.
    up: Way = (product(T, d_out, r), elementwise(T * d_out, 2), elementwise(T * d_out, 3))
    down: Way = (elementwise(T * d_out, 2), dh, dB, dA, product(T, d_in, r))
    eager: Way = (y, h, *up, *down, dx, elementwise(T * d_in, 3))
    dense_p: Way = (product(T, d_in, d_in), product(T, d_in, d_in))
    return {
        "ours, fused": (h, fused_y, dh_dB, dA, fused_dx, *fold),
        "ours, two calls": (
            h, y, product(T, d_out, r, adds=True), dh_dB, dA, dx, product(T, d_in, r, adds=True), *fold,
        ),
        "folded eager": (*eager, *fold),
        "plain LoRA": eager,
        "dense P per token": (*eager, *dense_p),
        "frozen linear": (y, dx),
    }  # fmt: skip


def covariance_ways(T: int, d: int) -> dict[str, Way]:
    return {
        "ours": (Kernel(bench_covariance.flops(T, d, True), bench_covariance.least_bytes(T, d, BF16)),),
        "whole product": (Kernel(bench_covariance.flops(T, d, False), BF16 * T * d + 2 * FP32 * d * d),),
    }


def projection_ways(r: int, d: int) -> dict[str, Way]:
    """In float32. G is read by both launches of ours, and the basis too."""
    k = protected_dims(d)
    return {
        "ours": (product(r, k, d, element=FP32), product(r, d, k, element=FP32, adds=True)),
        "dense P": (Kernel(bench_null_projection.flops(r, d, k, dense=True), product(r, d, d, element=FP32).bytes),),
    }


HEADER = ["layer", "d_in → d_out", "way", "GFLOP", "MB", "FLOP / byte", "A100 ms ≥", "H100 ms ≥"]


def lines(layer: str, shape: str, ways: dict[str, Way]) -> list[list[str]]:
    found = []
    for name, way in ways.items():
        flops, moved = sum(kernel.flops for kernel in way), sum(kernel.bytes for kernel in way)
        bounds = [f"{1e3 * sum(kernel.seconds(gpu) for kernel in way):.3f}" for gpu in GPUS]
        found.append([layer, shape, name, _short(flops / 1e9), _short(moved / 1e6), f"{flops / moved:.0f}", *bounds])
    return found


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.2g}"


def render() -> str:
    sections = [_HEAD]
    for model, layers in MODELS.items():
        rows = []
        for layer, (d_in, d_out) in layers.items():
            rows += lines(layer, f"{d_in} → {d_out}", lora_ways(TOKENS, d_in, d_out, RANK))
        sections.append(f"### LoRA layer, forward and backward: {model}\n\n{table(HEADER, rows, True)}")
    widths = sorted({d_in for layers in MODELS.values() for d_in, _ in layers.values()})
    for title, ways in (
        ("Covariance", {d: covariance_ways(TOKENS, d) for d in widths}),
        (f"Null projection of one ({RANK}, d) matrix", {d: projection_ways(RANK, d) for d in widths}),
    ):
        rows = [line[2:] for d in widths for line in lines("", "", {f"d = {d}: {n}": w for n, w in ways[d].items()})]
        sections.append(f"### {title}\n\n{table(HEADER[2:], rows, True)}")
    return "\n\n".join(sections)


_SHEETS = "; ".join(f"{gpu} {peak / 1e12:.0f} TFLOP/s, {bytes / 1e12:g} TB/s" for gpu, (peak, bytes) in GPUS.items())
_HEAD = f"""## Roofline

Lower bounds: no kernel of a way can take less than its FLOPs at the peak rate, nor less than its bytes at the memory's
full bandwidth; those of a way's kernels are added, as if nothing stayed in a cache from one to the next. Data sheets,
SXM with 80 GB, dense bfloat16: {_SHEETS}.
{TOKENS} tokens; adapters of rank {RANK} in bfloat16; a third of d_in protected by a float32 basis. What separates the
ways is algebra and traffic: how near a kernel comes to its bound, only a GPU can say."""
