"""A guarded LoRA layer, forward and backward (dx, dA, dB), beside a frozen, a plain and a naively guarded one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from guardspace_kernels.ops import projected_lora
from guardspace_kernels.ops.projected_lora import eager
from guardspace_kernels.ops.projected_lora.algebra import Layer

from . import baselines
from .timing import Case, Contestant, label, pytest_case, saved_bytes

OP = "projected_lora"
SCALE = 2.0
SHAPES = ((576, 576), (576, 1536), (2048, 2048), (2048, 5632), (4096, 4096))


def cases(size: str, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    tokens, shapes, ranks = {
        "tiny": ((7,), ((12, 10),), (2,)),
        "quick": ((1024,), ((576, 576), (2048, 2048)), (16,)),
        "default": ((8, 256, 1024, 4096), SHAPES, (16, 128)),
        "full": ((1, 8, 32, 256, 1024, 4096), SHAPES, (8, 16, 64, 128)),
    }[size]
    return [
        {"T": T, "d_in": d_in, "d_out": d_out, "r": r, "dtype": dtype}
        for dtype in dtypes
        for d_in, d_out in shapes
        for r in ranks
        for T in tokens
        if r == 16 or size == "tiny" or (T >= 256 and (T <= 1024 or size == "full"))  # else one rank is enough
    ]


def protected_dims(d_in: int) -> int:
    return round(d_in / 3)


@dataclass(frozen=True)
class Flops:
    """Of one forward and backward: the frozen layer (y and dx), the adapter (h, y; dh, dx, dA, dB), ``A P`` with
    ``∂A·P``, a frozen pair of rank r, and P applied to x and its gradient as a dense matrix or by its basis."""

    base: int
    adapter: int
    fold: int
    frozen_pair: int
    dense_p: int
    low_rank_p: int

    @classmethod
    def of(cls, T: int, d_in: int, d_out: int, r: int) -> Flops:
        k = protected_dims(d_in)
        return cls(
            base=4 * T * d_in * d_out,
            adapter=6 * T * r * (d_in + d_out),
            fold=8 * r * d_in * k,
            frozen_pair=4 * T * r * (d_in + d_out),
            dense_p=4 * T * d_in * d_in,
            low_rank_p=8 * T * d_in * k,
        )

    @property
    def rho(self) -> float:
        return (self.adapter + self.fold) / self.base

    def counted(self, *parts: str) -> int:
        return sum(getattr(self, part) for part in ("base", *parts))


def least_bytes(T: int, d_in: int, d_out: int, r: int, element: int) -> int:
    """Forward: x, W, y. Backward: dy, W, x, dx. Twice the basis, and A, B and their gradients, in float32."""
    return element * T * (3 * d_in + 2 * d_out) + 2 * element * d_in * d_out + 8 * (
        d_in * protected_dims(d_in) + r * (d_in + d_out)
    )  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A contestant before it has data: ``layer(x, W, A, B, A0, B0)``, the dtype of its adapter (None: that of x), the
    function it computes, its parts of :class:`Flops`, and what it holds besides W, A and B."""

    layer: Callable[..., Tensor]
    adapter: torch.dtype | None
    computes: str
    parts: tuple[str, ...]
    holds: tuple[Tensor, ...] = ()


CONTESTANTS = (
    "ours", "ours, frozen residual", "folded addmm_", "folded eager", "folded compiled", "low-rank P per token",
    "dense P per token", "plain LoRA", "PEFT LoRA", "frozen linear",
)  # fmt: skip
_compiled = torch.compile(baselines.folded, dynamic=True)


def _guarded(Q: Tensor, virtual: bool = True) -> Callable[..., Tensor]:
    """A layer of ``attach_guard`` as eager mode runs it, with its standing buffers."""
    spare = eager.Spare()

    def layer(x: Tensor, W: Tensor, A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None) -> Tensor:
        A0, B0 = (A0, B0) if virtual else (None, None)
        y = eager.run(spare, lambda: None, x, A, B, Layer(W, None, Q, True, SCALE, A0, B0))
        return projected_lora(x, W, A, B, Q, True, SCALE, None, A0, B0) if y is None else y

    return layer


def ways(Q: Tensor, dtype: torch.dtype) -> dict[str, Way]:
    s, f32, guarded = SCALE, torch.float32, ("adapter", "fold")
    P, Q_x = baselines.dense_projector(Q, dtype), Q.to(dtype)
    folded: dict[str, Callable[..., Tensor]] = {
        "folded addmm_": lambda x, W, A, B, *_: baselines.folded_addmm(x, W, A, B, Q, s),
        "folded eager": lambda x, W, A, B, *_: baselines.folded(x, W, A, B, Q, s),
        "folded compiled": lambda x, W, A, B, *_: _compiled(x, W, A, B, Q, s),
    }
    return {
        "ours": Way(
            _guarded(Q),
            f32, "virtual", (*guarded, "frozen_pair"), (Q,),
        ),
        "ours, frozen residual": Way(
            _guarded(Q, virtual=False), f32, "guarded", guarded, (Q,)
        ),
        **{name: Way(layer, f32, "guarded", guarded, (Q,)) for name, layer in folded.items()},
        "low-rank P per token": Way(
            lambda x, W, A, B, *_: baselines.low_rank_p(x, W, A, B, Q_x, s),
            None, "guarded", ("adapter", "low_rank_p"), (Q_x,),
        ),
        "dense P per token": Way(
            lambda x, W, A, B, *_: baselines.dense_p(x, W, A, B, P, s), None, "guarded", ("adapter", "dense_p"), (P,)
        ),
        "plain LoRA": Way(
            lambda x, W, A, B, *_: baselines.plain_lora(x, W, A, B, s), None, "plain", ("adapter",)
        ),
        "PEFT LoRA": Way(
            lambda x, W, A, B, *_: baselines.peft_lora(x, W, A, B, s), f32, "plain", ("adapter",)
        ),
        "frozen linear": Way(lambda x, W, *_: torch.nn.functional.linear(x, W), None, "frozen", ()),
    }  # fmt: skip


#: Whose error bounds that of the others.
_PLAIN = {"guarded": "folded eager", "virtual": "folded eager", "plain": "plain LoRA", "frozen": "frozen linear"}


def build(T: int, d_in: int, d_out: int, r: int, dtype: str) -> Case:
    torch.manual_seed(0)
    x_dtype: torch.dtype = getattr(torch, dtype)
    Q = torch.linalg.qr(torch.randn(d_in, protected_dims(d_in)))[0].contiguous()
    x = torch.randn(T, d_in).to(x_dtype).requires_grad_()
    W = (torch.randn(d_out, d_in) / d_in**0.5).to(x_dtype)
    A, B = torch.randn(r, d_in) / d_in**0.5, torch.randn(d_out, r) / r**0.5
    A0, B0 = torch.randn(r, d_in) / d_in**0.5, torch.randn(d_out, r) / r**0.5
    A0 -= (A0 @ Q) @ Q.T
    dy = torch.randn(T, d_out).to(x_dtype)
    # y and dx are compared at these rows; dA and dB see every token.
    rows = torch.arange(T) if T <= 256 else torch.cat([torch.arange(64), 64 + torch.randperm(T - 64)[:192]])
    flops = Flops.of(T, d_in, d_out, r)

    @cache
    def truth(computes: str) -> dict[str, Tensor]:
        x64, dy64, W64, A64, B64 = (t.detach().double() for t in (x, dy, W, A, B))
        result = {"y": x64[rows] @ W64.T, "dx": dy64[rows] @ W64}
        if computes == "frozen":
            return result
        Q64 = Q.double()

        def project(t: Tensor) -> Tensor:
            return t if computes == "plain" else t - (t @ Q64) @ Q64.T

        A_P = project(A64)
        h, dh = x64 @ A_P.T, SCALE * (dy64 @ B64)
        result["y"] += SCALE * h[rows] @ B64.T
        result["dx"] += dh[rows] @ A_P
        if computes == "virtual":
            result["y"] -= SCALE * (x64[rows] @ A0.double().T) @ B0.double().T
            result["dx"] -= SCALE * (dy64[rows] @ B0.double()) @ A0.double()
        return {**result, "dA": project(dh.T @ x64), "dB": SCALE * (dy64.T @ h)}

    def contestant(way: Way) -> Contestant:
        own_A, own_B = (t.to(way.adapter or x_dtype).requires_grad_() for t in (A.clone(), B.clone()))
        wanted = {"dx": x} if way.computes == "frozen" else {"dx": x, "dA": own_A, "dB": own_B}
        inputs = tuple(wanted.values())

        def forward() -> Tensor:
            return way.layer(x, W, own_A, own_B, A0, B0)

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), inputs, dy)

        def outputs() -> dict[str, Tensor]:
            y = forward()
            grads = dict(zip(wanted, torch.autograd.grad(y, inputs, dy), strict=True))
            for name, value in (("y", y), *grads.items()):
                if not torch.isfinite(value).all():
                    raise ValueError(f"{name} is not finite")
            return {**grads, "y": y.detach()[rows], "dx": grads["dx"][rows]}

        def facts() -> dict[str, float]:
            found: dict[str, float] = {"saved": saved_bytes(forward, (W, own_A, own_B, A0, B0, *way.holds))}
            if way.computes in ("guarded", "virtual"):
                found["leak"] = leak(way, own_A.detach(), Q, x_dtype)
            return found

        plain, cost = _PLAIN[way.computes], flops.counted(*way.parts)
        return Contestant(run, outputs, lambda: truth(way.computes), plain, cost, facts)

    contestants = {name: contestant(way) for name, way in ways(Q, x_dtype).items()}
    shape = {"T": T, "d_in": d_in, "d_out": d_out, "r": r, "dtype": dtype}
    return Case(OP, shape, contestants, x_dtype, least_bytes(T, d_in, d_out, r, x.element_size()), flops.rho)


@torch.no_grad()
def leak(way: Way, A: Tensor, Q: Tensor, dtype: torch.dtype) -> float:
    """``‖A_P Q‖ / ‖A_P‖`` of the A_P that the layer applies: its answer to the unit vectors with W = 0 and B = I."""
    r, d_in = A.shape
    zero = torch.zeros(r, d_in)
    A_P = way.layer(
        torch.eye(d_in, dtype=dtype), zero.to(dtype), A, torch.eye(r, dtype=A.dtype), zero, torch.zeros(r, r)
    ).T.double()  # fmt: skip
    return float((A_P @ Q.double()).norm() / A_P.norm())


@pytest.mark.parametrize("params", cases("quick", ("bfloat16", "float32")), ids=label)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_projected_lora(benchmark: Any, params: dict[str, Any], name: str) -> None:
    pytest_case(benchmark, build(**params), name)
