"""Covariance accumulation, ``C += Xᵀ X``: half of the product is enough, and no float32 copy of X."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from guardspace_kernels.ops import covariance_update_

from . import baselines
from .timing import Case, Contestant, label, pytest_case

OP = "covariance"
CONTESTANTS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "ours": covariance_update_,
    "addmm_ float32": baselines.cov_addmm,
    "own dtype": baselines.cov_own_dtype,
    "paper's hook": baselines.cov_paper_hook,
    "CorDA's hook": baselines.cov_corda_hook,
}


def cases(size: str, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    tokens, widths = {
        "tiny": ((5,), (8,)),
        "quick": ((1024,), (576, 2048)),
        "default": ((8, 256, 1024, 4096), (576, 2048, 4096)),
        "full": ((1, 8, 32, 256, 1024, 4096), (576, 2048, 4096)),
    }[size]
    return [{"T": T, "d": d, "dtype": dtype} for dtype in dtypes for d in widths for T in tokens]


def flops(T: int, d: int, symmetric: bool) -> int:
    return T * d * (d + 1) if symmetric else 2 * T * d * d


def least_bytes(T: int, d: int, x_bytes: int) -> int:
    """x is read, the lower triangle of C read and written."""
    return T * d * x_bytes + 2 * 4 * d * (d + 1) // 2


def build(T: int, d: int, dtype: str) -> Case:
    torch.manual_seed(0)
    x = torch.randn(T, d).to(getattr(torch, dtype))
    truth: list[Tensor] = []

    def exact() -> dict[str, Tensor]:
        if not truth:
            truth.append((x.double().T @ x.double()).tril())
        return {"C": truth[0]}

    def contestant(name: str) -> Contestant:
        add = CONTESTANTS[name]
        C = torch.zeros(d, d)

        def outputs() -> dict[str, Tensor]:
            fresh = torch.zeros(d, d)
            add(fresh, x)
            # The hooks normalise by the largest entry; the exact factor is taken out again.
            factor = x.float().max().item() ** 2 if "hook" in name else 1.0
            return {"C": fresh.tril().mul_(factor)}

        return Contestant(lambda: add(C, x), outputs, exact, "addmm_ float32", flops(T, d, name == "ours"))

    contestants = {name: contestant(name) for name in CONTESTANTS}
    # A float32 sum is asked for, whatever the dtype of x.
    shape = {"T": T, "d": d, "dtype": dtype}
    return Case(OP, shape, contestants, torch.float32, least_bytes(T, d, x.element_size()))


@pytest.mark.parametrize("params", cases("quick", ("bfloat16", "float32")), ids=label)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_covariance(benchmark: Any, params: dict[str, Any], name: str) -> None:
    pytest_case(benchmark, build(**params), name)
