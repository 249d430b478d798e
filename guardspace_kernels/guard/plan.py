"""The plan: for every layer its protected directions and the adapter's starting point. Inspect it before training."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass, field

import torch

from guardspace_kernels.arguments import boolean, choice, integer, number
from guardspace_kernels.guard import forms
from guardspace_kernels.guard.coverage import COVERAGE, Coverage
from guardspace_kernels.guard.files import check_shapes, open_tensors, save_tensors
from guardspace_kernels.guard.fingerprint import ModelFingerprint, fingerprint_form
from guardspace_kernels.guard.null_space import RULES, NullSpace
from guardspace_kernels.guard.plan_check import check_plan
from guardspace_kernels.guard.safety_subspace import INITS

_KIND = "guard plan"
_CONFIG = {
    "rank": forms.count,
    "alpha": forms.maybe(forms.number),
    "protect": forms.number,
    "rule": forms.one_of(RULES),
    "protect_dims": forms.maybe(forms.count),
    "init": forms.one_of(INITS),
    "projector": forms.flag,
    "damping": forms.number,
    "dropout": forms.number,
    "seed": forms.whole,
}
_SPACE = {
    "complement": forms.flag,
    "protected": forms.count,
    "sink_directions": forms.count,
    "free_energy": forms.number,
}
_LAYER = forms.exactly(forms.text, forms.exactly(forms.count, forms.count), forms.count, forms.several(forms.text))
_HEADER = forms.fields(
    {
        "config": forms.fields(_CONFIG),
        "model": fingerprint_form,
        "layers": forms.several(_LAYER, 1),
        "spaces": forms.several(forms.maybe(forms.fields(_SPACE)), 1),
        "fingerprint": forms.text,
    },
    {"left_out": forms.named(forms.text), "coverage": forms.maybe(COVERAGE)},
)


# The ranks that vLLM's --max-lora-rank can be set to. It serves adapters up to that, by default up to 16.
_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def serving_remark(rank: int) -> str:
    """What a server must be told, or cannot do, for an exported adapter of this rank; empty up to vLLM's default."""
    if rank > _SERVED_RANKS[-1]:
        return (
            f"servers refuse rank {rank} (vLLM takes at most {_SERVED_RANKS[-1]}): merge the adapter, or plan with a "
            "lower rank"
        )
    needed = next(served for served in _SERVED_RANKS if served >= rank)
    return f"vLLM needs --max-lora-rank {needed}" if needed > 16 else ""


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
        share = "a share in (0, 1], such as 0.99"
        checked = {
            "rank": integer("rank", self.rank, 1),
            "protect": number("protect", self.protect, share, lambda x: 0 < x <= 1),
            "rule": choice("rule", self.rule, RULES),
            "init": choice("init", self.init, INITS),
            "projector": boolean("projector", self.projector),
            "damping": number("damping", self.damping, "0 or more", lambda x: x >= 0),
            "dropout": number("dropout", self.dropout, "in [0, 1)", lambda x: 0 <= x < 1),
            "seed": integer("seed", self.seed),
        }
        if self.alpha is not None:
            checked["alpha"] = number("alpha", self.alpha, "positive", lambda x: x > 0)
        if (self.rule == "rank") != (self.protect_dims is not None):
            raise ValueError('protect_dims must be given with rule="rank", and only with it')
        if self.protect_dims is not None:
            checked["protect_dims"] = integer("protect_dims", self.protect_dims, 0)
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # as plain Python: what is saved has the same hash when it is read

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
        coverage: how far protection carries; None without the projector and in plans of versions that did not tell.
    """

    config: GuardConfig
    layers: dict[str, LayerPlan]
    spaces: list[NullSpace | None]
    model: ModelFingerprint
    left_out: dict[str, str] = field(default_factory=dict)
    coverage: Coverage | None = None

    def space_of(self, name: str) -> NullSpace | None:
        """Of the layer's input; KeyError that lists what there is."""
        if name not in self.layers:
            raise KeyError(f"name {name!r} is no layer of the plan; there are {len(self.layers)}: {[*self.layers][:3]}")
        return self.spaces[self.layers[name].space]

    @property
    def has_frozen(self) -> bool:
        """Whether the adapter starts away from zero, so that the residual W_res differs from W."""
        return self.config.init != "zero"

    @property
    def fingerprint(self) -> str:
        """A hash of everything in the plan."""
        digest = hashlib.sha256(repr((self.config, self.model.model)).encode())
        if self.model.weights is not None:
            digest.update(repr(sorted(self.model.weights.items())).encode())
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
        if self.coverage:
            digest.update(repr(self.coverage).encode())
        return digest.hexdigest()[:32]

    def __str__(self) -> str:
        width = max([len(name) for name in (*self.layers, *self.left_out)] + [5])
        lines = [] if self.coverage is None else [str(self.coverage)]
        lines.append(
            f"{'layer':{width}}  {'d_out':>6} {'d_in':>6}  {'protected':>9} {'energy':>8} {'free':>8} {'capacity':>8}  "
            "warnings"
        )
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
        rank = self.config.rank * (2 if self.has_frozen else 1)
        text += f"; exported as rank {rank}: {serving_remark(rank)}" if serving_remark(rank) else ""
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
            "model": self.model.to_header(),
            "layers": [[x.name, x.shape, x.space, x.warnings] for x in self.layers.values()],
            "spaces": spaces,
            "left_out": self.left_out,
            "coverage": self.coverage and self.coverage.to_dict(),
            "fingerprint": self.fingerprint,
        }
        save_tensors(path, _KIND, tensors, header)

    def check(self) -> None:
        """ValueError that names the layer unless the plan protects what its configuration asks for.

        Indices, shapes, dtypes, finite values, ``QᵀQ = I``, ``A₀P = A₀``, which of the two bases it is and the share of
        the energy that it leaves free. Of the statistics it was made from it knows nothing.
        """
        check_plan(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GuardPlan:
        """Reads what :meth:`save` wrote, and checks it.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is of another kind, its content was altered, or it
                does not protect what its configuration asks for (:meth:`check`).
        """
        stored, header = open_tensors(path, _KIND, _HEADER)
        about, rank = header["layers"], header["config"]["rank"]
        shapes: dict[str, tuple[int | None, ...]] = {}
        for i, (_, (d_out, d_in), *_) in enumerate(about):
            shapes |= {f"layer.{i}.A0": (rank, d_in), f"layer.{i}.B0": (d_out, rank)}
        shapes |= {f"space.{i}.basis": (None, None) for i, entry in enumerate(header["spaces"]) if entry is not None}
        check_shapes(path, stored, {name: (shape, (torch.float32,)) for name, shape in shapes.items()})
        tensors = {name: t.read() for name, t in stored.items()}
        layers = {
            name: LayerPlan(
                name, (shape[0], shape[1]), tensors[f"layer.{i}.A0"], tensors[f"layer.{i}.B0"], space, warnings
            )
            for i, (name, shape, space, warnings) in enumerate(about)
        }
        spaces = [
            None if entry is None else NullSpace(basis=tensors[f"space.{i}.basis"], **entry)
            for i, entry in enumerate(header["spaces"])
        ]
        try:
            if len(layers) < len(about):
                raise ValueError("a layer is there twice")
            config, model = GuardConfig(**header["config"]), ModelFingerprint.from_header(header["model"])
            told = header.get("coverage")
            coverage = None if told is None else Coverage.from_dict(told)
            plan = cls(config, layers, spaces, model, header.get("left_out", {}), coverage)
            plan.check()
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
        if plan.fingerprint != header["fingerprint"]:
            raise ValueError(f"{os.fspath(path)}: the plan's content does not match its fingerprint; it was altered")
        return plan
