"""The trailing subspace of one layer, and the plan of a whole model, beside the route of the paper's code."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import guardspace_kernels as gk
from guardspace_kernels.guard.layers import linear_weight
from guardspace_kernels.guard.safety_subspace import DampedCovariance, trailing_subspace

from . import baselines
from .bench_training_step import _model
from .timing import Case, Contestant, label, pytest_case

OP = "planning"
ROUNDS = 3  # a contestant takes up to a minute
CONTESTANTS = ("ours", "paper's route")
SHAPES = (
    (576, 576, 16), (1536, 576, 16), (576, 1536, 16), (1024, 1024, 64), (2816, 1024, 64), (1024, 2816, 64),
    (2048, 2048, 16), (2048, 2048, 128),
)  # fmt: skip


def cases(size: str, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Statistics are float32, whatever the model's dtype."""
    shapes = {
        "tiny": ((160, 150, 4),),
        "quick": ((576, 576, 16), (576, 1536, 16)),
        "full": (*SHAPES, (4096, 4096, 128)),
    }.get(size, SHAPES)
    layers = [{"d_out": d_out, "d_in": d_in, "r": r, "dtype": "float32"} for d_out, d_in, r in shapes]
    models = {"tiny": ["tiny"], "quick": []}.get(size, ["SmolLM2-135M"])
    return [*layers, *({"model": name, "r": 2 if name == "tiny" else 16, "dtype": "float32"} for name in models)]


def build(r: int, dtype: str, **shape: Any) -> Case:
    return _whole_model(shape["model"], r) if "model" in shape else _one_layer(shape["d_out"], shape["d_in"], r)


def layer(d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """A weight, and a covariance of decaying spectrum in random directions with one outlier feature."""
    torch.manual_seed(0)
    X = torch.randn(2 * d_in, d_in) * torch.logspace(0, -3, d_in) @ torch.linalg.qr(torch.randn(d_in, d_in)).Q
    X[:, 5] *= 50
    return torch.randn(d_out, d_in) / d_in**0.5, X.T @ X


def _one_layer(d_out: int, d_in: int, r: int) -> Case:
    W, C = layer(d_out, d_in)

    def contestant(solve: Callable[[], Tensor]) -> Contestant:
        @cache
        def found() -> Tensor:
            return solve()

        def outputs() -> dict[str, Tensor]:
            U = found().double()
            return {"UᵀU": U.T @ U}

        def facts() -> dict[str, float]:
            M = W.double() @ DampedCovariance(C).matrix
            smallest = float(torch.linalg.svdvals(M)[-r:].square().sum())
            return {"energy": float((found().double().T @ M).square().sum()) / smallest}

        truth = {"UᵀU": torch.eye(r, dtype=torch.float64)}
        return Contestant(solve, outputs, lambda: truth, "paper's route", 0, facts)

    contestants = {
        "ours": contestant(lambda: trailing_subspace(W, C, r)[0]),
        "paper's route": contestant(lambda: baselines.trailing_paper(W, C, r)[0]),
    }
    shape = {"d_out": d_out, "d_in": d_in, "r": r, "dtype": "float32"}
    return Case(OP, shape, contestants, torch.float32, 4 * (d_out * d_in + d_in * d_in))


def _whole_model(name: str, r: int) -> Case:
    """From random tokens, as many as there are in 100 short prompts."""
    model = _model(name, torch.float32)
    tokens = (2, 16) if name == "tiny" else (16, 256)
    ids = torch.randint(model.config.vocab_size, tokens, generator=torch.Generator().manual_seed(0))
    stats = gk.collect_statistics(model, [{"input_ids": ids}], progress=False)
    config = gk.GuardConfig(rank=r, protect=0.5 if name == "tiny" else 0.99)

    def ours() -> dict[str, Tensor]:
        plan = gk.plan_guard(model, stats, config, progress=False, allow_few_prompts=True)
        return {name: layer.B0 for name, layer in plan.layers.items()}

    def paper() -> dict[str, Tensor]:
        """Layer by layer, a null space and a start for each, whether or not their inputs are the same tensor."""
        found = {}
        for name in stats.layers:
            C = stats.for_layer(name).covariance
            baselines.null_space_paper(C)
            found[name] = baselines.trailing_paper(linear_weight(model.get_submodule(name)).detach(), C, r)[0]
        return found

    def contestant(solve: Callable[[], dict[str, Tensor]]) -> Contestant:
        def outputs() -> dict[str, Tensor]:
            # One number that says that every layer has columns of full rank.
            return {"rank": torch.tensor(float(min(torch.linalg.matrix_rank(B) for B in solve().values())))}

        return Contestant(solve, outputs, lambda: {"rank": torch.tensor(float(r)).double()}, "ours", 0)

    shape = {"model": name, "r": r, "dtype": "float32"}
    least = sum(4 * entry.features**2 for entry in stats.inputs)
    return Case(OP, shape, {"ours": contestant(ours), "paper's route": contestant(paper)}, torch.float32, least)


_build = lru_cache(maxsize=1)(lambda **params: build(**params))


@pytest.mark.parametrize("params", cases("quick", ("float32",)), ids=label)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_planning(benchmark: Any, params: dict[str, Any], name: str) -> None:
    pytest_case(benchmark, _build(**params), name)
