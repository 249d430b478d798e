"""The trailing subspace of one layer, and the plan of a whole model, beside the route of the paper's code."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guardspace_kernels as gk
from guardspace_kernels.guard.layers import linear_weight
from guardspace_kernels.guard.safety_subspace import DampedCovariance, trailing_subspace
from guardspace_kernels.guard.statistics import packed

from . import baselines
from .bench_training_step import _model
from .timing import Case, Contestant, label, pytest_case

OP = "planning"
ROUNDS = 3  # a contestant takes up to a minute
CONTESTANTS = ("ours", "paper's route")
LAYERS = (
    (576, 576, 16), (1536, 576, 16), (576, 1536, 16), (1024, 1024, 64), (2816, 1024, 64), (1024, 2816, 64),
    (2048, 2048, 16), (2048, 2048, 128),
)  # fmt: skip
#: hidden, intermediate, blocks, heads, key-value heads; random weights and a small vocabulary.
SHAPES = {
    "tiny": (24, 40, 2, 4, 2),
    "one block of 1024/2816": (1024, 2816, 1, 16, 16),
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8),
    "Llama-2-7B": (4096, 11008, 32, 32, 32),
}
#: One block of 1024 with a down-projection of 2816; models whose down-projections are wider, all blocks.
BLOCK, WIDE = "one block of 1024/2816", ("Qwen2.5-0.5B", "Llama-3.2-1B")
TOKENS = 3889  # in 120 short prompts


def cases(size: str, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Statistics are float32, whatever the model's dtype."""
    shapes = {
        "tiny": ((160, 150, 4),),
        "quick": ((576, 576, 16), (576, 1536, 16)),
        "full": (*LAYERS, (4096, 4096, 128)),
    }.get(size, LAYERS)
    layers = [{"d_out": d_out, "d_in": d_in, "r": r, "dtype": "float32"} for d_out, d_in, r in shapes]
    models = {
        "tiny": ["tiny", "tiny block"], "quick": [], "full": ["SmolLM2-135M", BLOCK, *WIDE],
    }.get(size, ["SmolLM2-135M", BLOCK])  # fmt: skip
    return [*layers, *({"model": name, "r": 2 if "tiny" in name else 16, "dtype": "float32"} for name in models)]


def build(r: int, dtype: str, **shape: Any) -> Case:
    if "model" not in shape:
        return _one_layer(shape["d_out"], shape["d_in"], r)
    name = shape["model"]
    return _whole_model(name, r, *(_from_tokens(name) if name in ("tiny", "SmolLM2-135M") else _from_spectra(name)))


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


def build_model(name: str, blocks: int | None) -> nn.Module:
    if name not in SHAPES:
        return _model(name, torch.float32)
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, depth, heads, kv = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks or depth, vocab_size=1024,
        num_attention_heads=heads, num_key_value_heads=kv, attention_bias=name.startswith("Qwen"),
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _from_tokens(name: str) -> tuple[nn.Module, gk.CalibrationStatistics]:
    """A model and its statistics of random tokens, as many as there are in 100 short prompts."""
    model = _model(name, torch.float32)
    tokens = (2, 16) if name == "tiny" else (16, 256)
    ids = torch.randint(model.config.vocab_size, tokens, generator=torch.Generator().manual_seed(0))
    return model, gk.collect_statistics(model, [{"input_ids": ids}], progress=False)


def _from_spectra(name: str) -> tuple[nn.Module, gk.CalibrationStatistics]:
    """A random model, and statistics of tokens whose features decay as ``i^-0.7`` in random directions.

    Those of the first block serve all: every block is solved, but no more are kept.
    """
    model = build_model("tiny" if name == "tiny block" else name, None)
    stats = gk.collect_statistics(model, [{"input_ids": torch.ones(1, 2, dtype=torch.int64)}], progress=False)
    made: dict[tuple[str, int], Tensor] = {}
    for entry in stats.inputs:
        d = entry.features
        of_block = re.sub(r"\d+", "", entry.layers[0]), d
        if of_block not in made:
            generator = torch.Generator().manual_seed(len(made))
            X = torch.randn(TOKENS, d, generator=generator) * torch.arange(1, d + 1) ** -0.7
            made[of_block] = packed(_gram(X @ torch.randn(d, d, generator=generator)))
        entry.stored, entry.tokens = made[of_block], TOKENS
        entry.held, entry.held_tokens = None, 0
    return model, stats


def _gram(X: Tensor) -> Tensor:
    C = X.new_zeros(X.shape[1], X.shape[1])
    gk.ops.covariance_update_(C, X)
    return C


def _whole_model(name: str, r: int, model: nn.Module, stats: gk.CalibrationStatistics) -> Case:
    """The plan of all layers. The paper's route solves one block of a wide model: all would take it half an hour."""
    config = gk.GuardConfig(rank=r, protect=0.5 if "tiny" in name else 0.99)
    solved = len(stats.layers) // (SHAPES[name][2] if name in WIDE else 1)

    def ours() -> dict[str, Tensor]:
        plan = gk.plan_guard(model, stats, config, progress=False, allow_few_prompts=True)
        return {name: layer.B0 for name, layer in plan.layers.items()}

    def paper() -> dict[str, Tensor]:
        """Layer by layer, a null space and a start for each, whether or not their inputs are the same tensor."""
        found = {}
        for name in stats.layers[:solved]:
            C = stats.for_layer(name).covariance
            baselines.null_space_paper(C)
            found[name] = baselines.trailing_paper(linear_weight(model.get_submodule(name)).detach(), C, r)[0]
        return found

    def contestant(solve: Callable[[], dict[str, Tensor]], share: float = 1.0) -> Contestant:
        last: dict[str, Tensor] = {}

        def run() -> None:
            last.update(solve())

        def outputs() -> dict[str, Tensor]:
            # One number that says that every layer has columns of full rank.
            found = last or solve()
            return {"rank": torch.tensor(float(min(torch.linalg.matrix_rank(B) for B in found.values())))}

        truth = {"rank": torch.tensor(float(r)).double()}
        return Contestant(run, outputs, lambda: truth, "ours", 0, share=share)

    shape = {"model": name, "r": r, "dtype": "float32"}
    least = sum(4 * entry.features**2 for entry in stats.inputs)
    contestants = {"ours": contestant(ours), "paper's route": contestant(paper, solved / len(stats.layers))}
    return Case(OP, shape, contestants, torch.float32, least, rounds=1 if name in WIDE else None)


_build = lru_cache(maxsize=1)(lambda **params: build(**params))


@pytest.mark.parametrize("params", cases("quick", ("float32",)), ids=label)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_planning(benchmark: Any, params: dict[str, Any], name: str) -> None:
    pytest_case(benchmark, _build(**params), name)
