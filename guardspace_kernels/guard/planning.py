"""Planning: the solves that decide, layer by layer, what is protected and where the adapter starts."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from guardspace_kernels.arguments import boolean, instance
from guardspace_kernels.guard.coverage import Coverage, InputCoverage, measured
from guardspace_kernels.guard.judges import warn_of_unrefused
from guardspace_kernels.guard.layers import (
    check_bare,
    find_layers,
    is_sharded,
    layer_weight,
    linear_weight,
    unwrapped,
)
from guardspace_kernels.guard.null_space import EmptyNullSpaceError, NullSpace, is_finite, null_space
from guardspace_kernels.guard.passes import parse_bytes, release_memory
from guardspace_kernels.guard.plan import GuardConfig, GuardPlan, LayerPlan
from guardspace_kernels.guard.safety_subspace import DampedCovariance, starting_factors, trailing_subspace_and_rows
from guardspace_kernels.guard.sampling import FEWEST_PROMPTS
from guardspace_kernels.guard.statistics import CalibrationStatistics, InputStatistics
from guardspace_kernels.guard.threads import use_threads
from guardspace_kernels.ops import null_project_
from guardspace_kernels.ops._library import full_float32_products

# So many columns keep a thread of LAPACK busy.
_COLUMNS_PER_THREAD = 1024

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass
class _Solved:
    """One input's part of a plan, or why its layers are left out."""

    space: NullSpace | None = None
    coverage: InputCoverage | None = None
    layers: list[LayerPlan] = field(default_factory=list)
    left_out: str = ""


def _space_for(
    entry: InputStatistics, covariance: torch.Tensor, config: GuardConfig, held_tokens: int = 0
) -> NullSpace | None:
    """From its covariance, or from that of all but so many tokens that are held out."""
    layer = entry.layers[0]
    if entry.tokens == 0:
        raise ValueError(f"layer {layer}: no token was counted; collect statistics on longer prompts")
    if not (is_finite(covariance) and is_finite(entry.sinks)):
        raise ValueError(f"layer {layer}: the statistics hold non-finite values; collect them again")
    if not config.projector:
        return None
    if not held_tokens and not covariance.diagonal().any():
        raise ValueError(
            f"layer {layer}: its input is zero at all {entry.tokens} tokens; leave it out of target_modules"
        )
    try:
        space = null_space(
            covariance,
            entry.sinks.to(covariance.device),
            tokens=entry.tokens - held_tokens,
            rule=config.rule,
            protect=config.protect,
            protect_dims=config.protect_dims,
        )
    except EmptyNullSpaceError as error:
        raise EmptyNullSpaceError(
            f"layer {layer}: {error}, so its adapter could never learn; {_protect_less(config)}, or leave the layer out"
        ) from error
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}; collect the statistics again") from error
    space.basis = space.basis.float().cpu()
    return space


def _protect_less(config: GuardConfig) -> str:
    """What to change so that fewer directions are protected."""
    return {
        "energy": f"lower protect (now {config.protect})",
        "rank": f"lower protect_dims (now {config.protect_dims})",
        "paper": 'use rule="energy" (an outlier or plentiful tokens defeat the paper\'s threshold)',
    }[config.rule]


def _carried(entry: InputStatistics, config: GuardConfig, device: torch.device) -> tuple[float, float] | None:
    """Shares of energy outside of a space that is planned without the prompts that can be held out: of the others', and
    of theirs. None where there are none, or nothing else."""
    if not 0 < entry.held_tokens < entry.tokens:
        return None
    held = entry.held_on(device)
    assert held is not None
    rest = entry.covariance_on(device) - held
    del held  # the solve needs most of the memory: no other matrix lies beside it
    try:
        space = _space_for(entry, rest, config, entry.held_tokens)
    except ValueError:  # nothing is left to learn with, or nothing is left
        return None
    del rest
    held = entry.held_on(device)
    return None if space is None or held is None else (space.free_energy, space.share_outside(held))


def _coverage(entry: InputStatistics, space: NullSpace, carried: tuple[float, float] | None) -> InputCoverage:
    coverage = measured(space, entry.sample)
    if carried is not None:
        coverage.rest, coverage.heldout = carried
    return coverage


def _check_enough(stats: CalibrationStatistics, allowed: bool) -> None:
    different = min(stats.prompts, len(stats.distinct)) if stats.distinct else stats.prompts
    if different < FEWEST_PROMPTS and not allowed:
        alike = f", of which {different} differ" if different < stats.prompts else ""
        raise ValueError(
            f"the statistics are of {stats.prompts} prompts{alike}, fewer than {FEWEST_PROMPTS}: what they protect "
            "carries little to other prompts; collect statistics on more, or pass allow_few_prompts=True"
        )


def _undetermined(entry: InputStatistics, space: NullSpace | None) -> str:
    """Why an input's null space cannot be told; empty if it can."""
    if entry.tokens == 0:
        return "saw no calibration token"
    directions = 0 if space is None else space.protected - space.sink_directions
    if 2 * directions > entry.tokens:
        return f"{directions} directions to protect, but only {entry.tokens} calibration tokens"
    return ""


def _space_warnings(entry: InputStatistics, solved: _Solved, rank: int) -> list[str]:
    if solved.space is None or solved.coverage is None:
        return []
    d, warnings = entry.features, []
    if entry.tokens < d:
        warnings.append(f"only {entry.tokens} calibration tokens for {d} dimensions")
    if d - solved.space.protected < rank:
        warnings.append(f"{d - solved.space.protected} free dimensions for rank {rank}")
    return [*warnings, *solved.coverage.warnings()]


def plan_guard(
    model: nn.Module,
    stats: CalibrationStatistics,
    config: GuardConfig | None = None,
    *,
    target_modules: str | Sequence[str] | None = None,
    progress: bool = True,
    max_memory: int | str | None = None,
    allow_few_prompts: bool = False,
    allow_unrefused: bool = False,
) -> GuardPlan:
    """Decides, layer by layer, what is protected and where the adapter starts.

    Per distinct input: the null space of its covariance by ``config.rule``, sink directions protected. Per layer: the
    trailing left singular subspace U_r of ``W C``, hence ``s·B₀A₀ = U_r U_rᵀ W`` and the start ``A₀P, B₀``. Bases are
    thin, shared between layers that read the same tensor, and kept in float32; nothing of the model is changed.

    An input of which fewer than two tokens were seen for each direction to protect (those of the sinks apart) has an
    undetermined null space. An expert reads only the tokens that are routed to it: its layers then get no adapter,
    hence keep their outputs exactly, and are listed in :attr:`GuardPlan.left_out`. Elsewhere the plan is refused, as it
    is from fewer than 16 prompts. In simulations (spectra ``λ_i = i^-1 .. i^-2`` of 256 dimensions, half of the energy
    in three directions of each prompt's own, ``protect=0.99``) 2% to 9% of the energy of other prompts lay outside the
    protected directions with that many, and up to 60% with less.

    :attr:`GuardPlan.coverage` tells how far protection carries: every fourth prompt, chosen when the statistics were
    collected, is held out at a few inputs; the same rule is applied to ``C − C_h``, and ``tr(P C_h) / tr(C_h)``
    compared with what lies outside of the others. The whole plan, made from all prompts, protects a little more.

    Args:
        model: the base model that ``stats`` were collected on, or a copy of it; DistributedDataParallel is unwrapped,
            and weights that accelerate offloaded are loaded for their solve. A sharded one (``fully_shard``) is
            refused: plan with an unsharded copy.
        config: default ``GuardConfig()``.
        target_modules: a subset of the layers in ``stats`` (as in :func:`collect_statistics`); default all.
        max_memory: bytes, or a text such as "4GB", that the solves which run at the same time may take, on the CPU or
            on one GPU; at least one runs, whatever it takes. The plan itself, which grows meanwhile, comes on top.
        allow_few_prompts: plan from fewer prompts or tokens all the same.
        allow_unrefused: no warning where the statistics tell that the model refused fewer than 80% of the prompts.

    Raises:
        EmptyNullSpaceError: a layer whose adapter could not learn, and what to change.
        TypeError: the model is sharded.
        ValueError: statistics of another model or layer, of too few prompts or tokens, non-finite ones, a rank above
            min(d_out, d_in), or experts alone that all saw too few tokens; the message names the layer.

    Source: GuardSpace (arXiv 2510.14301).
    """
    check_bare(model)
    instance("stats", stats, CalibrationStatistics, "a CalibrationStatistics")
    instance("config", config, (GuardConfig, type(None)), "a GuardConfig or None")
    progress = boolean("progress", progress)
    allow_few_prompts = boolean("allow_few_prompts", allow_few_prompts)
    allow_unrefused = boolean("allow_unrefused", allow_unrefused)
    parse_bytes("max_memory", max_memory)
    config, model = config or GuardConfig(), unwrapped(model)
    if is_sharded(model):
        raise TypeError(
            "model is sharded (fully_shard), and solves need whole weights: save the statistics, and plan "
            "in one process with an unsharded copy of the model"
        )
    modules = dict(model.named_modules())
    absent = [name for name in stats.layers if name not in modules]
    if absent:
        raise ValueError(
            f"the statistics belong to another model: this one has no layer {absent[0]}; collect them for this model"
        )
    names = list(find_layers(model, stats.layers if target_modules is None else target_modules))
    missing = [name for name in names if name not in stats.layers]
    if missing:
        raise ValueError(f"layer {missing[0]} has no statistics; collect them with it in target_modules")
    stats.fingerprint.check_model(model, names, "the statistics")
    if config.projector:
        _check_enough(stats, allow_few_prompts)
        warn_of_unrefused(stats.judged, stats.refused, allow_unrefused)

    used = [entry for entry in stats.inputs if any(name in names for name in entry.layers)]

    def solve(entry: InputStatistics) -> _Solved:
        mine = [name for name in entry.layers if name in names]
        if entry.routed and entry.tokens == 0:
            bar.update(1 + len(mine))
            return _Solved(left_out=_undetermined(entry, None))
        weights = {name: layer_weight(model, name).detach() for name in mine}
        device = next(iter(weights.values())).device
        carried = _carried(entry, config, device) if config.projector else None
        covariance = entry.covariance_on(device)
        space = _space_for(entry, covariance, config)
        bar.update()
        reason = _undetermined(entry, space)
        if reason and entry.routed:
            bar.update(len(weights))
            return _Solved(left_out=reason)
        if reason and not allow_few_prompts:
            raise ValueError(
                f"layer {mine[0]}: {reason}, fewer than two each: what they protect carries little to other prompts; "
                f"collect statistics on more, {_protect_less(config)}, or pass allow_few_prompts=True"
            )
        damped = DampedCovariance(covariance, config.damping) if config.init != "zero" else None
        del covariance
        solved = _Solved(space, None if space is None else _coverage(entry, space, carried))
        for name, weight in weights.items():
            solved.layers.append(_plan_layer(name, weight, entry, solved, damped, config))
            bar.update()
        return solved

    def size(entry: InputStatistics) -> int:
        return solve_bytes(entry.features, max(linear_weight(model.get_submodule(n)).numel() for n in entry.layers))

    # The setting is the process's: solves that changed and restored it on their own would disturb each other.
    bar = tqdm(total=len(used) + len(names), desc="plan", unit="solve", disable=not progress)
    with full_float32_products(), bar:
        cores = 1 if any(p.is_cuda for p in model.parameters()) else torch.get_num_threads()
        threads = [solve_threads(entry.features, cores) for entry in used]
        solved = _in_parallel(solve, used, size, parse_bytes("max_memory", max_memory), cores, threads)
    reasons = {
        name: one.left_out for entry, one in zip(used, solved, strict=True) if one.left_out for name in entry.layers
    }
    left_out = {name: reasons[name] for name in names if name in reasons}
    kept = [one for one in solved if not one.left_out]
    of_layer = {layer.name: dataclasses.replace(layer, space=i) for i, one in enumerate(kept) for layer in one.layers}
    if not of_layer:
        name, reason = next(iter(left_out.items()))
        raise ValueError(
            f"every layer is left out, first {name} ({reason}); collect statistics on more prompts, "
            f"{_protect_less(config)}, or add layers to target_modules"
        )
    layers = {name: of_layer[name] for name in names if name in of_layer}
    told = [one.coverage for one in kept if one.coverage is not None]
    coverage = Coverage(stats.prompts, stats.held_prompts, told, stats.weighting) if told else None
    spaces = [one.space for one in kept]
    return GuardPlan(config, layers, spaces, stats.fingerprint.restricted(layers), left_out, coverage)


def solve_bytes(features: int, weight: int) -> int:
    """What the solves for an input and a layer of ``weight`` entries take at most on a CPU: 16 to 20 bytes per entry of
    C and 14 per entry of the weight were measured, 40 per entry of C where the eigendecomposition is in float64."""
    return 40 * features**2 + 14 * weight


def solve_threads(features: int, cores: int) -> int:
    """How many of so many cores the solves for an input take. On two, an eigendecomposition of 2816 columns is 2.1
    times as fast, one of 1536 columns 1.8 times, where two side by side are done in the time of one."""
    return max(1, min(features // _COLUMNS_PER_THREAD, cores))


def _in_parallel(
    solve: Callable[[_Item], _Result],
    items: Sequence[_Item],
    size: Callable[[_Item], int],
    budget: int | None,
    cores: int,
    threads: Sequence[int],
) -> list[_Result]:
    """Results in the order of ``items``, begun with the largest: as many at a time as the cores, of which each takes
    ``threads``, and a budget allow. One at a time on a GPU, which a solve fills, and where torch loads its solvers
    once, in whichever thread asks, and not twice."""
    next_one, changed, taken, busy = threading.Lock(), threading.Condition(), 0, 0

    def within_budget(i: int) -> _Result:
        nonlocal taken, busy
        mine = size(items[i])
        # The lock keeps their order: a wide one that waits for cores is not overtaken by narrow ones.
        with next_one, changed:
            changed.wait_for(
                lambda: busy == 0 or (busy + threads[i] <= cores and (budget is None or taken + mine <= budget))
            )
            taken, busy = taken + mine, busy + threads[i]
        try:
            use_threads(threads[i])
            return solve(items[i])
        finally:
            if budget is not None:
                release_memory()
            with changed:
                taken, busy = taken - mine, busy - threads[i]
                changed.notify_all()

    with ThreadPoolExecutor(cores) as pool:
        largest_first = sorted(range(len(items)), key=lambda i: -size(items[i]))
        futures = {i: pool.submit(within_budget, i) for i in largest_first}
        try:
            return [futures[i].result() for i in range(len(items))]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _plan_layer(
    name: str,
    weight: torch.Tensor,
    entry: InputStatistics,
    solved: _Solved,
    damped: DampedCovariance | None,
    config: GuardConfig,
) -> LayerPlan:
    d_out, d_in = weight.shape
    if config.rank > min(d_out, d_in):
        raise ValueError(
            f"layer {name}: rank {config.rank} is above min(d_out, d_in) = {min(d_out, d_in)}; "
            "lower rank or leave the layer out"
        )
    if entry.features != d_in:
        raise ValueError(f"layer {name}: its statistics have {entry.features} features but it reads {d_in}")
    warnings = _space_warnings(entry, solved, config.rank)
    if damped is None:
        # Seeded by the layer's name, so that the result does not depend on the order of the solves.
        seed = int.from_bytes(hashlib.sha256(f"{config.seed} {name}".encode()).digest()[:7], "big")
        uniform = torch.rand(config.rank, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        A0 = (2.0 * uniform - 1.0) / math.sqrt(d_in)
        B0 = torch.zeros(d_out, config.rank, dtype=torch.float64)
    else:
        U, sigma, rows = trailing_subspace_and_rows(weight.to(damped.matrix.device), damped, config.rank)
        A0, B0, dead = starting_factors(weight, U, sigma, config.scale, config.init, rows)
        if dead:
            warnings.append(f"{dead} of {config.rank} starting directions carry no weight and start at zero")
        A0, B0 = A0.cpu(), B0.cpu()
    if solved.space is not None:
        null_project_(A0, solved.space.basis, solved.space.complement)
    return LayerPlan(name, (d_out, d_in), A0.float(), B0.float().contiguous(), 0, warnings)
