"""Null projection ``G ← G − (G Q) Qᵀ``: one matrix, and gradients with parameters of a whole model's optimiser step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from guardspace_kernels.ops import null_project_

from . import baselines
from .timing import Case, Contestant, label, pytest_case

OP = "null_projection"
CONTESTANTS = ("ours", "addmm_", "addmm_ compiled", "dense P")
_compiled = torch.compile(baselines.project_addmm_, dynamic=True)

#: Widths that the seven linear layers of a SmolLM2 block read; layers of one group share a basis.
SMOLLM2_BLOCK = ((576, 3), (576, 1), (576, 2), (1536, 1))
SMOLLM2_BLOCKS = 30


def cases(size: str, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Always float32, the dtype of adapters, gradients and bases; ``dtypes`` does not matter."""
    del dtypes
    widths, ranks, shares, blocks = {
        "tiny": ((12,), (2,), (3,), 1),
        "quick": ((576, 2048), (16,), (3,), SMOLLM2_BLOCKS),
        "default": ((576, 1024, 2048, 4096), (16, 128), (10, 3), SMOLLM2_BLOCKS),
        "full": ((576, 1024, 2048, 4096), (16, 128), (10, 3), SMOLLM2_BLOCKS),
    }[size]
    one = [{"r": r, "d": d, "k": round(d / share)} for d in widths for r in ranks for share in shares]
    return [*one, {"r": 2 if size == "tiny" else 16, "blocks": blocks}]


def flops(r: int, d: int, k: int, dense: bool = False) -> int:
    return 2 * r * d * d if dense else 4 * r * d * k


def least_bytes(r: int, d: int) -> int:
    """G is read and written; the basis comes on top, once for the layers that share it."""
    return 4 * 2 * r * d


def _basis(d: int, k: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k))[0].contiguous()


def build(r: int, d: int = 0, k: int = 0, blocks: int = 0) -> Case:
    """One (r, d) matrix; or, with ``blocks``, the gradients and the parameters A of that many SmolLM2 blocks."""
    torch.manual_seed(0)
    groups = [(d, 1)] if not blocks else [group for _ in range(blocks) for group in SMOLLM2_BLOCK]
    bases, projectors = [], []
    for width, layers in groups:
        Q = _basis(width, k or round(width / 3))
        bases += [Q] * layers
        projectors += [baselines.dense_projector(Q, torch.float32)] * layers
    # Gradients, and beside them parameters.
    start = [[torch.randn(r, Q.shape[0]) for Q in bases] for _ in range(2 if blocks else 1)]

    def ours(matrices: list[Tensor]) -> list[Tensor]:
        if blocks:
            null_project_(matrices, bases)
        else:
            null_project_(matrices[0], bases[0])
        return matrices

    def apply(name: str, matrices: list[Tensor]) -> list[Tensor]:
        return {
            "ours": lambda: ours(matrices),
            "addmm_": lambda: baselines.each(baselines.project_addmm_, matrices, bases),
            "addmm_ compiled": lambda: baselines.each(_compiled, matrices, bases),
            "dense P": lambda: baselines.each(baselines.project_dense, matrices, projectors),
        }[name]()

    def exact() -> dict[str, Tensor]:
        projected = [G.double() - (G.double() @ Q.double()) @ Q.double().T for G, Q in _pairs(start, bases)]
        return {"G": torch.cat([G.flatten() for G in projected])}

    def contestant(name: str) -> Contestant:
        own = [[G.clone() for G in matrices] for matrices in start]

        def project_all(lists: list[list[Tensor]]) -> list[list[Tensor]]:
            return [apply(name, matrices) for matrices in lists]

        def fresh() -> list[list[Tensor]]:
            return project_all([[G.clone() for G in matrices] for matrices in start])

        def leak() -> dict[str, float]:
            pairs = list(_pairs(fresh(), bases))
            leaked = sum((G.double() @ Q.double()).square().sum() for G, Q in pairs)
            return {"leak": float((leaked / sum(G.double().square().sum() for G, _ in pairs)) ** 0.5)}

        return Contestant(
            lambda: project_all(own),
            lambda: {"G": torch.cat([G.flatten() for matrices in fresh() for G in matrices])},
            exact,
            "dense P" if name == "dense P" else "addmm_",  # sums of d terms round more than sums of k
            len(start) * sum(flops(r, *Q.shape, dense=name == "dense P") for Q in bases),
            leak,
        )

    read = sum(Q.nbytes for Q in {id(Q): Q for Q in bases}.values())
    least = len(start) * (read + sum(least_bytes(r, Q.shape[0]) for Q in bases))
    shape = {"r": r, "blocks": blocks} if blocks else {"r": r, "d": d, "k": k}
    return Case(
        OP, {**shape, "dtype": "float32"}, {n: contestant(n) for n in CONTESTANTS}, torch.float32, least
    )  # fmt: skip


def _pairs(lists: list[list[Tensor]], bases: list[Tensor]) -> Any:
    return ((G, Q) for matrices in lists for G, Q in zip(matrices, bases, strict=True))


@pytest.mark.parametrize("params", cases("quick", ()), ids=label)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_null_projection(benchmark: Any, params: dict[str, Any], name: str) -> None:
    pytest_case(benchmark, build(**params), name)
