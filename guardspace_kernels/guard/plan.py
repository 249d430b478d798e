"""The plan: for every layer its protected directions and the adapter's starting point. Inspect it before training."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from guardspace_kernels.guard.files import load_tensors, save_tensors
from guardspace_kernels.guard.fingerprint import ModelFingerprint
from guardspace_kernels.guard.layers import (
    find_layers,
    is_sharded,
    layer_weight,
    linear_weight,
    unwrapped,
)
from guardspace_kernels.guard.null_space import RULES, EmptyNullSpaceError, NullSpace, is_finite, null_space
from guardspace_kernels.guard.passes import parse_bytes, release_memory
from guardspace_kernels.guard.safety_subspace import INITS, DampedCovariance, starting_factors, trailing_subspace
from guardspace_kernels.guard.statistics import CalibrationStatistics, InputStatistics
from guardspace_kernels.ops import null_project_
from guardspace_kernels.ops._library import full_float32_products

_KIND = "guard plan"
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class GuardConfig:
    """How to guard.

    Attributes:
        rank: r of the adapter, from 1 to the smallest min(d_out, d_in) of the layers.
        alpha: PEFT's ``lora_alpha``; the scaling is ``s = alpha / rank``. Default ``2 * rank``.
        protect: ``rule="energy"``: the share of the calibration energy, in (0, 1], that the protected directions hold.
            Higher is safer and leaves less to learn with.
        rule: "energy"; "rank": protect ``protect_dims`` leading eigenvectors in every layer; or "paper": the
            threshold of the paper's code, ``λ ≤ max(1e-8, 1e-6·λ_max)``, at the mercy of outliers.
        protect_dims: for ``rule="rank"``.
        init: where the adapter starts: "balanced" (the safety-irrelevant trailing subspace of the weight, factors of
            equal norms), "paper" (the same, scaled by singular values) or "zero" (B = 0, as plain LoRA).
        projector: False leaves the null-space projector out: an ablation, nothing is protected.
        damping: δ in ``C + δ·mean(diag C)·I`` before the trailing subspace is taken.
        dropout: on the adapter's input while training.
        seed: of the random A of ``init="zero"``.
    """

    rank: int = 16
    alpha: float | None = None
    protect: float = 0.99
    rule: str = "energy"
    protect_dims: int | None = None
    init: str = "balanced"
    projector: bool = True
    damping: float = 0.01
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a positive integer, got {self.rank!r}")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha must be positive, got {self.alpha!r}")
        if not 0.0 < self.protect <= 1.0:
            raise ValueError(f"protect must be a share in (0, 1], such as 0.99, got {self.protect!r}")
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {self.rule!r}")
        if (self.rule == "rank") != (self.protect_dims is not None):
            raise ValueError('protect_dims must be given with rule="rank", and only with it')
        if self.protect_dims is not None and self.protect_dims < 0:
            raise ValueError(f"protect_dims must be 0 or more, got {self.protect_dims}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {self.init!r}")
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must be 0 or more, got {self.damping}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def scale(self) -> float:
        """PEFT's scaling s."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


@dataclass
class LayerPlan:
    """One layer of a plan.

    Attributes:
        name, shape: of the layer, shape = (d_out, d_in).
        A0: A₀P (r, d_in), float32; B0: B₀ (d_out, r), float32, zero for ``init="zero"``.
        space: index into :attr:`GuardPlan.spaces`.
        warnings: what a user should know about this layer.
    """

    name: str
    shape: tuple[int, int]
    A0: torch.Tensor
    B0: torch.Tensor
    space: int
    warnings: list[str] = field(default_factory=list)


@dataclass
class GuardPlan:
    """What :func:`plan_guard` returns. ``print(plan)`` shows a row per layer; ``save``/``load`` use one file.

    Attributes:
        spaces: one :class:`NullSpace` per distinct layer input, shared by the layers that read it (float32 bases);
            None where the configuration leaves the projector out.
        left_out: name -> reason, of the layers of experts that saw too few tokens to tell what to protect. They get no
            adapter and stay frozen.
    """

    config: GuardConfig
    layers: dict[str, LayerPlan]
    spaces: list[NullSpace | None]
    model: ModelFingerprint
    left_out: dict[str, str] = field(default_factory=dict)

    def space_of(self, name: str) -> NullSpace | None:
        return self.spaces[self.layers[name].space]

    @property
    def has_frozen(self) -> bool:
        """Whether the adapter starts away from zero, so that the residual W_res differs from W."""
        return self.config.init != "zero"

    @property
    def fingerprint(self) -> str:
        """A hash of everything in the plan."""
        digest = hashlib.sha256(repr((self.config, self.model.model)).encode())
        for name, layer in self.layers.items():
            digest.update(repr((name, layer.shape, layer.space, layer.warnings, self.model.layers[name])).encode())
            for t in (layer.A0, layer.B0):
                digest.update(t.contiguous().numpy().tobytes())
        for space in self.spaces:
            if space is not None:
                shown = (space.complement, space.protected, space.sink_directions, space.free_energy)
                digest.update(repr(shown).encode())
                digest.update(space.basis.contiguous().numpy().tobytes())
        if self.left_out:
            digest.update(repr(self.left_out).encode())
        return digest.hexdigest()[:32]

    def __str__(self) -> str:
        width = max([len(name) for name in (*self.layers, *self.left_out)] + [5])
        lines = [
            f"{'layer':{width}}  {'d_out':>6} {'d_in':>6}  {'protected':>9} {'energy':>8} {'free':>8} {'capacity':>8}  "
            "warnings"
        ]
        for name, layer in self.layers.items():
            d_out, d_in = layer.shape
            space = self.space_of(name)
            protected, energy, free = (0, 0.0, 1.0)
            if space is not None:
                protected, energy, free = space.protected, 1.0 - space.free_energy, space.free_energy
            lines.append(
                f"{name:{width}}  {d_out:6d} {d_in:6d}  {protected:9d} {energy:8.3%} {free:8.3%} "
                f"{1 - protected / d_in:8.1%}  {'; '.join(layer.warnings)}".rstrip()
            )
        lines += [f"{name:{width}}  left out: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line for the whole plan."""
        shares = [
            0.0 if space is None else space.protected / self.layers[name].shape[1]
            for name, space in ((name, self.space_of(name)) for name in self.layers)
        ]
        warned = sum(bool(layer.warnings) for layer in self.layers.values())
        text = (
            f"{len(self.layers)} layers, rank {self.config.rank}, scale {self.config.scale:g}: on average "
            f"{sum(shares) / len(shares):.1%} of the dimensions protected (from {min(shares):.1%} to {max(shares):.1%})"
        )
        text += f"; {warned} layers with warnings" if warned else ""
        return text + (f"; {len(self.left_out)} layers left out, which stay frozen" if self.left_out else "")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically."""
        tensors: dict[str, torch.Tensor] = {}
        for i, layer in enumerate(self.layers.values()):
            tensors[f"layer.{i}.A0"], tensors[f"layer.{i}.B0"] = layer.A0, layer.B0
        spaces: list[dict[str, object] | None] = []
        for i, space in enumerate(self.spaces):
            if space is None:
                spaces.append(None)
                continue
            tensors[f"space.{i}.basis"] = space.basis
            spaces.append({f.name: getattr(space, f.name) for f in dataclasses.fields(space) if f.name != "basis"})
        header = {
            "config": dataclasses.asdict(self.config),
            "model": dataclasses.asdict(self.model),
            "layers": [[x.name, x.shape, x.space, x.warnings] for x in self.layers.values()],
            "spaces": spaces,
            "left_out": self.left_out,
            "fingerprint": self.fingerprint,
        }
        save_tensors(path, _KIND, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GuardPlan:
        """Reads what :meth:`save` wrote; ValueError if the file is of another kind or its content was altered."""
        tensors, header = load_tensors(path, _KIND)
        layers = {
            name: LayerPlan(
                name, (shape[0], shape[1]), tensors[f"layer.{i}.A0"], tensors[f"layer.{i}.B0"], space, warnings
            )
            for i, (name, shape, space, warnings) in enumerate(header["layers"])
        }
        spaces = [
            None if entry is None else NullSpace(basis=tensors[f"space.{i}.basis"], **entry)
            for i, entry in enumerate(header["spaces"])
        ]
        config, model = GuardConfig(**header["config"]), ModelFingerprint(**header["model"])
        plan = cls(config, layers, spaces, model, header.get("left_out", {}))
        if plan.fingerprint != header["fingerprint"]:
            raise ValueError(f"{os.fspath(path)}: the plan's content does not match its fingerprint; it was altered")
        return plan


def _space_for(entry: InputStatistics, covariance: torch.Tensor, config: GuardConfig) -> NullSpace | None:
    layer = entry.layers[0]
    if entry.tokens == 0:
        raise ValueError(f"layer {layer}: no token was counted; collect statistics on longer prompts")
    if not (is_finite(covariance) and is_finite(entry.sinks)):
        raise ValueError(f"layer {layer}: the statistics hold non-finite values; collect them again")
    if not config.projector:
        return None
    try:
        space = null_space(
            covariance,
            entry.sinks.to(covariance.device),
            tokens=entry.tokens,
            rule=config.rule,
            protect=config.protect,
            protect_dims=config.protect_dims,
        )
    except EmptyNullSpaceError as error:
        change = {
            "energy": f"lower protect (now {config.protect})",
            "rank": f"lower protect_dims (now {config.protect_dims})",
            "paper": 'use rule="energy" (an outlier or plentiful tokens defeat the paper\'s threshold)',
        }[config.rule]
        raise EmptyNullSpaceError(
            f"layer {layer}: {error}, so its adapter could never learn; {change}, or leave the layer out"
        ) from error
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}; collect the statistics again") from error
    space.basis = space.basis.float().cpu()
    return space


def _undetermined(entry: InputStatistics, space: NullSpace | None) -> str:
    """Why an expert's input gets no adapter; empty if it gets one."""
    if entry.tokens == 0:
        return "saw no calibration token"
    directions = 0 if space is None else space.protected - space.sink_directions
    if 2 * directions > entry.tokens:
        return f"{directions} directions to protect, but only {entry.tokens} calibration tokens"
    return ""


def _space_warnings(entry: InputStatistics, space: NullSpace, rank: int) -> list[str]:
    d = entry.features
    warnings = []
    if entry.tokens < d:
        warnings.append(f"only {entry.tokens} calibration tokens for {d} dimensions")
    if d - space.protected < rank:
        warnings.append(f"{d - space.protected} free dimensions for rank {rank}")
    return warnings


def plan_guard(
    model: nn.Module,
    stats: CalibrationStatistics,
    config: GuardConfig | None = None,
    *,
    target_modules: str | Sequence[str] | None = None,
    progress: bool = True,
    max_memory: int | str | None = None,
) -> GuardPlan:
    """Decides, layer by layer, what is protected and where the adapter starts.

    Per distinct input: the null space of its covariance by ``config.rule``, sink directions protected. Per layer: the
    trailing left singular subspace U_r of ``W C``, hence ``s·B₀A₀ = U_r U_rᵀ W`` and the start ``A₀P, B₀``. Bases are
    thin, shared between layers that read the same tensor, and kept in float32; nothing of the model is changed.

    An expert reads only the tokens that are routed to it. One that saw none, or fewer than two for each direction to
    protect (those of the sinks apart), has an undetermined null space: its layers get no adapter, hence keep their
    outputs exactly, and are listed in :attr:`GuardPlan.left_out`.

    Args:
        model: the base model that ``stats`` were collected on, or a copy of it; DistributedDataParallel is unwrapped,
            and weights that accelerate offloaded are loaded for their solve. A sharded one (``fully_shard``) is
            refused: plan with an unsharded copy.
        config: default ``GuardConfig()``.
        target_modules: a subset of the layers in ``stats`` (as in :func:`collect_statistics`); default all.
        max_memory: bytes, or a text such as "4GB", that the solves which run at the same time may take, on the CPU or
            on one GPU; at least one runs, whatever it takes. The plan itself, which grows meanwhile, comes on top.

    Raises:
        EmptyNullSpaceError: a layer whose adapter could not learn, and what to change.
        TypeError: the model is sharded.
        ValueError: statistics of another model or layer, non-finite statistics, a rank above min(d_out, d_in), or
            experts alone that all saw too few tokens; the message names the layer.

    Source: GuardSpace (arXiv 2510.14301).
    """
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
    stats.fingerprint.check(ModelFingerprint.of(model, names), "the statistics")

    used = [entry for entry in stats.inputs if any(name in names for name in entry.layers)]

    def solve(entry: InputStatistics) -> tuple[NullSpace | None, list[LayerPlan], str]:
        mine = [name for name in entry.layers if name in names]
        if entry.routed and entry.tokens == 0:
            bar.update(1 + len(mine))
            return None, [], _undetermined(entry, None)
        weights = {name: layer_weight(model, name).detach() for name in mine}
        covariance = entry.covariance_on(next(iter(weights.values())).device)
        space = _space_for(entry, covariance, config)
        bar.update()
        reason = _undetermined(entry, space) if entry.routed else ""
        if reason:
            bar.update(len(weights))
            return space, [], reason
        damped = DampedCovariance(covariance, config.damping) if config.init != "zero" else None
        del covariance
        planned = []
        for name, weight in weights.items():
            planned.append(_plan_layer(name, weight, entry, space, damped, config))
            bar.update()
        return space, planned, ""

    def size(entry: InputStatistics) -> int:
        return solve_bytes(entry.features, max(linear_weight(model.get_submodule(n)).numel() for n in entry.layers))

    # The setting is the process's: solves that changed and restored it on their own would disturb each other.
    bar = tqdm(total=len(used) + len(names), desc="plan", unit="solve", disable=not progress)
    with full_float32_products(), bar:
        # A wide input takes longest: begun last, it would keep one core busy while the others wait.
        workers = 1 if any(p.is_cuda for p in model.parameters()) else torch.get_num_threads()
        solved = _in_parallel(solve, used, size, parse_bytes("max_memory", max_memory), workers)
    reasons = {
        name: reason for entry, (*_, reason) in zip(used, solved, strict=True) if reason for name in entry.layers
    }
    left_out = {name: reasons[name] for name in names if name in reasons}
    spaces: list[NullSpace | None] = []
    of_layer: dict[str, LayerPlan] = {}
    for space, planned, reason in solved:
        if not reason:
            of_layer.update({layer.name: dataclasses.replace(layer, space=len(spaces)) for layer in planned})
            spaces.append(space)
    if not of_layer:
        name, reason = next(iter(left_out.items()))
        raise ValueError(
            f"every layer is left out, first {name} ({reason}); collect statistics on more prompts, lower protect, or "
            "add layers to target_modules"
        )
    layers = {name: of_layer[name] for name in names if name in of_layer}
    fingerprint = ModelFingerprint(stats.fingerprint.model, {n: stats.fingerprint.layers[n] for n in layers})
    return GuardPlan(config, layers, spaces, fingerprint, left_out)


def solve_bytes(features: int, weight: int) -> int:
    """What the solves for an input and a layer of ``weight`` entries take at most on a CPU: 16 to 20 bytes per entry of
    C and 14 per entry of the weight were measured, 40 per entry of C where the eigendecomposition is in float64."""
    return 40 * features**2 + 14 * weight


def _in_parallel(
    solve: Callable[[_Item], _Result],
    items: Sequence[_Item],
    size: Callable[[_Item], int],
    budget: int | None,
    workers: int,
) -> list[_Result]:
    """Results in the order of ``items``, begun with the largest; on a CPU one single-threaded solve per core, since
    LAPACK gains little from threads at these sizes, and of those only as many as a budget allows. One at a time on a
    GPU, which a solve fills, and where torch loads its solvers once, in whichever thread asks, and not twice."""
    threads = torch.get_num_threads()
    changed, taken = threading.Condition(), 0

    def within_budget(item: _Item) -> _Result:
        nonlocal taken
        mine = size(item)
        with changed:
            changed.wait_for(lambda: taken == 0 or budget is None or taken + mine <= budget)
            taken += mine
        try:
            return solve(item)
        finally:
            if budget is not None:
                release_memory()
            with changed:
                taken -= mine
                changed.notify_all()

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        largest_first = sorted(range(len(items)), key=lambda i: -size(items[i]))
        futures = {i: pool.submit(within_budget, items[i]) for i in largest_first}
        try:
            return [futures[i].result() for i in range(len(items))]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)  # the workers' 1 would be what every later thread starts with


def _plan_layer(
    name: str,
    weight: torch.Tensor,
    entry: InputStatistics,
    space: NullSpace | None,
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
    warnings = [] if space is None else _space_warnings(entry, space, config.rank)
    if damped is None:
        # Seeded by the layer's name, so that the result does not depend on the order of the solves.
        seed = int.from_bytes(hashlib.sha256(f"{config.seed} {name}".encode()).digest()[:7], "big")
        uniform = torch.rand(config.rank, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        A0 = (2.0 * uniform - 1.0) / math.sqrt(d_in)
        B0 = torch.zeros(d_out, config.rank, dtype=torch.float64)
    else:
        U, sigma = trailing_subspace(weight.to(damped.matrix.device), damped, config.rank)
        A0, B0, dead = starting_factors(weight, U, sigma, config.scale, config.init)
        if dead:
            warnings.append(f"{dead} of {config.rank} starting directions carry no weight and start at zero")
        A0, B0 = A0.cpu(), B0.cpu()
    if space is not None:
        null_project_(A0, space.basis, space.complement)
    return LayerPlan(name, (d_out, d_in), A0.float(), B0.float().contiguous(), 0, warnings)
