"""Guarded layers that read one input, fused into one product, beside the same layers apart, guarded and frozen."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from guardspace_kernels.ops import projected_lora

from .bench_projected_lora import SCALE, Flops, protected_dims
from .timing import Case, Contestant, label, pytest_case

OP = "fused_lora"
#: SmolLM2-135M's: d_in and the d_out of each layer.
LAYERS = {"q, k, v": (576, (576, 192, 192)), "gate, up": (576, (1536, 1536)), "tiny": (12, (10, 7))}
CONTESTANTS = ("ours", "ours, apart", "frozen linears")


def cases(size: str, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    tokens: tuple[int, ...] = {"tiny": (7,), "quick": (1024,)}.get(size, (256, 1024, 4096))
    layers = ["tiny"] if size == "tiny" else ["q, k, v", "gate, up"]
    r = 2 if size == "tiny" else 16
    return [{"T": T, "layers": name, "r": r, "dtype": dtype} for dtype in dtypes for name in layers for T in tokens]


def build(T: int, layers: str, r: int, dtype: str) -> Case:
    torch.manual_seed(0)
    x_dtype: torch.dtype = getattr(torch, dtype)
    d_in, sizes = LAYERS[layers]
    d_out, parts = sum(sizes), len(sizes)
    Q = torch.linalg.qr(torch.randn(d_in, protected_dims(d_in)))[0].contiguous()
    x = torch.randn(T, d_in).to(x_dtype).requires_grad_()
    W = (torch.randn(d_out, d_in) / d_in**0.5).to(x_dtype)
    A = (torch.randn(parts * r, d_in) / d_in**0.5).requires_grad_()
    B = (torch.randn(d_out, r) / r**0.5).requires_grad_()
    # The layers apart have tensors of their own, as modules do.
    Ws = [part.clone() for part in W.split(sizes)]
    As = [part.detach().clone().requires_grad_() for part in A.split(r)]
    Bs = [part.detach().clone().requires_grad_() for part in B.split(sizes)]
    dys = [torch.randn(T, size).to(x_dtype) for size in sizes]

    @cache
    def truth(guarded: bool) -> dict[str, Tensor]:
        x64, Q64 = x.detach().double(), Q.double()
        found: dict[str, list[Tensor]] = {"y": [], "dx": [], "dA": [], "dB": []}
        for weight, lora_A, lora_B, dy in zip(Ws, As, Bs, dys, strict=True):
            dy64, B64, A64 = dy.double(), lora_B.detach().double(), lora_A.detach().double()
            A_P = A64 - (A64 @ Q64) @ Q64.T
            h, dh = x64 @ A_P.T, SCALE * (dy64 @ B64)
            found["y"].append(x64 @ weight.double().T + guarded * SCALE * h @ B64.T)
            found["dx"].append(dy64 @ weight.double() + guarded * dh @ A_P)
            dA = dh.T @ x64
            found["dA"].append(dA - (dA @ Q64) @ Q64.T)
            found["dB"].append(SCALE * (dy64.T @ h))
        y, dx = torch.cat(found["y"], -1), torch.stack(found["dx"]).sum(0)
        return {"y": y, "dx": dx, "dA": torch.cat(found["dA"]), "dB": torch.cat(found["dB"])} if guarded else {
            "y": y, "dx": dx
        }  # fmt: skip

    def fused() -> tuple[Tensor, ...]:
        return projected_lora(x, W, A, B, Q, True, SCALE, output_sizes=sizes).split(sizes, -1)

    def apart() -> tuple[Tensor, ...]:
        return tuple(projected_lora(x, *layer, Q, True, SCALE) for layer in zip(Ws, As, Bs, strict=True))

    def frozen() -> tuple[Tensor, ...]:
        return tuple(torch.nn.functional.linear(x, weight) for weight in Ws)

    def contestant(forward: Callable[[], tuple[Tensor, ...]], leaves: tuple[Tensor, ...], flops: int) -> Contestant:
        guarded, plain = len(leaves) > 0, "ours, apart" if leaves else "frozen linears"

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), (x, *leaves), dys)

        def outputs() -> dict[str, Tensor]:
            dx, *grads = run()
            found = {"y": torch.cat([y.detach() for y in forward()], -1), "dx": dx}
            if guarded:
                half = len(grads) // 2
                found |= {"dA": torch.cat(grads[:half]), "dB": torch.cat(grads[half:])}
            return found

        return Contestant(run, outputs, lambda: truth(guarded), plain, flops)

    each = [Flops.of(T, d_in, size, r) for size in sizes]
    guarded = sum(flops.counted("adapter", "fold") for flops in each)
    contestants = {
        "ours": contestant(fused, (A, B), guarded),
        "ours, apart": contestant(apart, (*As, *Bs), guarded),
        "frozen linears": contestant(frozen, (), sum(flops.base for flops in each)),
    }
    element = x.element_size()
    least = element * T * (3 * d_in + 2 * d_out) + 2 * element * d_in * d_out
    return Case(OP, {"T": T, "layers": layers, "r": r, "dtype": dtype}, contestants, x_dtype, least)


@pytest.mark.parametrize("params", cases("quick", ("bfloat16", "float32")), ids=label)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_fused_lora(benchmark: Any, params: dict[str, Any], name: str) -> None:
    pytest_case(benchmark, build(**params), name)
