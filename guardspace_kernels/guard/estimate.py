"""What collecting statistics and planning will take, before either is begun."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import nn

from guardspace_kernels.guard.collecting.scout import distinct_inputs
from guardspace_kernels.guard.layers import find_layers, linear_weight, unwrapped
from guardspace_kernels.guard.null_space import null_space
from guardspace_kernels.guard.passes import CollectionPlan, parse_bytes, plan_passes, show_bytes
from guardspace_kernels.guard.planning import solve_bytes, solve_threads
from guardspace_kernels.guard.safety_subspace import DampedCovariance, trailing_subspace
from guardspace_kernels.guard.threads import use_threads
from guardspace_kernels.ops import covariance_update_

# Solves of wider layers are timed at this width and scaled by the cube of the ratio.
_WIDEST = 1024


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of a preparation; the times are extrapolated from samples taken on this machine.

    Attributes:
        forward_seconds: of the linear layers of the model on the prompts and answers, without statistics.
        generate_seconds: of the answers. covariance_seconds: what the statistics add to the forward.
        plan_seconds: of the solves. collection: passes, memory and the size of the statistics' file.
        solver_bytes: of the largest solves that run at the same time. plan_bytes: at most, of the plan's file.
    """

    device: str
    tokens: int
    generate_seconds: float
    forward_seconds: float
    covariance_seconds: float
    plan_seconds: float
    collection: CollectionPlan
    solver_bytes: int
    plan_bytes: int

    @property
    def collect_seconds(self) -> float:
        """Of collect_statistics without answers."""
        return self.forward_seconds + self.covariance_seconds

    def __str__(self) -> str:
        return "\n".join(
            [
                f"estimate for {self.tokens} tokens on {self.device}, extrapolated from samples of a few seconds",
                f"collect  {_duration(self.collect_seconds)} ({_duration(self.forward_seconds)} of it the model's own "
                f"forward), answers {_duration(self.generate_seconds)}; {self.collection}",
                f"plan     {_duration(self.plan_seconds)}, {show_bytes(self.solver_bytes)} of memory for solves, "
                f"at most {show_bytes(self.plan_bytes)} as a file",
            ]
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def estimate_preparation(
    model: nn.Module,
    *,
    prompts: int,
    tokens_per_prompt: int,
    answer_tokens: int = 0,
    batch_size: int = 8,
    rank: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_memory: int | str | None = None,
) -> Estimate:
    """Times a product, a covariance update and the solves of each distinct shape, and adds up what the model has.

    A forward of T tokens has ``2 T Σ d_out d_in`` FLOPs, of which the sample gives the rate; a covariance costs what
    the sample of its width costs, once per batch; a solve of a layer wider than 1024 takes the time of one shrunk to
    1024, tokens and all, times the cube of the ratio. Attention, embeddings and the reading of the model are left out.

    Args:
        model: may be on the meta device: nothing but its shapes is used.
        dtype, device: what it will run in and on; default the dtype of its weights, the CPU.

    Raises:
        ValueError: as :func:`guardspace_kernels.collect_statistics` for the model and ``max_memory``.
    """
    model = unwrapped(model)
    layers = find_layers(model, target_modules)
    inputs = distinct_inputs(model, layers)
    device = torch.device(device)
    dtype = dtype or next(model.parameters()).dtype
    shapes = {name: (linear_weight(m).shape[0], linear_weight(m).shape[1]) for name, m in layers.items()}
    batches = -(-prompts // batch_size)
    rows = min(batch_size, prompts) * (tokens_per_prompt + answer_tokens)
    tokens = prompts * (tokens_per_prompt + answer_tokens)

    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    d_out, d_in = max(shapes.values(), key=lambda shape: shape[0] * shape[1])
    W = torch.randn(min(d_out, 8192), min(d_in, 4096), device=device).to(dtype)

    def product(count: int) -> float:
        """Seconds for each weight of the model, of a product with so many rows."""
        x = torch.randn(count, W.shape[1], device=device).to(dtype)
        return _seconds(lambda: torch.nn.functional.linear(x, W), device) / W.numel()

    forward = batches * weights * product(rows)
    generate = batches * weights * answer_tokens * product(batch_size) if answer_tokens else 0.0
    update: dict[int, float] = {}
    for d in {one.features for one in inputs}:
        x = torch.randn(rows, d, device=device).to(dtype)
        C = torch.zeros(d, d, device=device)
        update[d] = _seconds(lambda C=C, x=x: covariance_update_(C, x), device)  # type: ignore[misc]
    covariances = batches * sum(update[one.features] for one in inputs)

    threads = torch.get_num_threads()
    workers = 1 if device.type == "cuda" else threads
    with ThreadPoolExecutor(1, initializer=partial(use_threads, 1) if workers > 1 else None) as alone:
        null = {
            d: alone.submit(_solve_seconds, d, partial(_null_space, d, tokens, device), device).result() for d in update
        }
        trailing = {
            shape: alone.submit(_solve_seconds, max(shape), partial(_trailing, shape, rank, device), device).result()
            for shape in set(shapes.values())
        }
    solves = sum((1 + one.held) * null[one.features] for one in inputs) + sum(
        trailing[shape] for shape in shapes.values()
    )
    largest = sorted(
        (
            (solve_bytes(one.features, max(shapes[n][0] for n in one.layers) * one.features), one.features)
            for one in inputs
        ),
        reverse=True,
    )
    cores_taken = accumulate(solve_threads(features, workers) for _, features in largest)
    bases = sum(4 * one.features * (one.features // 2) for one in inputs)
    factors = sum(4 * rank * sum(shape) for shape in shapes.values())
    hidden = max(one.features for one in inputs) * tokens * dtype.itemsize
    return Estimate(
        f"{device} with {threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device),
        tokens,
        generate,
        forward,
        covariances,
        solves / workers,
        plan_passes(inputs, torch.float32, parse_bytes("max_memory", max_memory), hidden),
        sum(size for (size, _), taken in zip(largest, cores_taken, strict=True) if taken <= workers),
        bases + factors,
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The best of three after one to warm up."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _solve_seconds(width: int, run: Callable[[int], Callable[[], object]], device: torch.device) -> float:
    sample = width if device.type == "cuda" else min(width, _WIDEST)
    return _seconds(run(sample), device) * (width / sample) ** 3


def _covariance(d: int, tokens: int, device: torch.device) -> torch.Tensor:
    x = torch.randn(tokens, d, device=device) * torch.logspace(0, -2, d, device=device)
    return x.T @ x


def _null_space(d: int, tokens: int, device: torch.device, sample: int) -> Callable[[], object]:
    """Of an input of d features, shrunk to ``sample`` of them."""
    tokens = max(tokens * sample // d, 2)
    C, sinks = _covariance(sample, tokens, device), torch.empty(0, sample, device=device)
    return lambda: null_space(C, sinks, tokens=tokens)


def _trailing(shape: tuple[int, int], rank: int, device: torch.device, sample: int) -> Callable[[], object]:
    """Of a layer of that shape, shrunk until its longer side is ``sample``."""
    d_out, d_in = (max(1, round(n * sample / max(shape))) for n in shape)
    W, C = torch.randn(d_out, d_in, device=device), _covariance(d_in, 2 * d_in, device)
    return lambda: trailing_subspace(W, DampedCovariance(C), min(rank, d_out, d_in))
