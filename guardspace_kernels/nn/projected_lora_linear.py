"""Linear layers with a projected LoRA adapter, for trainers without PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from guardspace_kernels.arguments import boolean, instance, integer, iterable, number, shown
from guardspace_kernels.nn.null_space_projector import FORM, NullSpaceProjector, refuse_state
from guardspace_kernels.ops import null_project_, projected_lora
from guardspace_kernels.ops._library import FLOATS, full_float32_products
from guardspace_kernels.ops.projected_lora import check_layer, eager
from guardspace_kernels.ops.projected_lora.algebra import Layer, spread


def delta_factors(
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    projector: NullSpaceProjector | None,
    scale: float,
    frozen_A: torch.Tensor | None,
    frozen_B: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The change of the layer against its base weight, ``ΔW = F G``, as factors of rank r or 2r.

    ``F = [s·B | −s·B₀]`` (d_out, r') and ``G = [A P; A₀P]`` (r', d_in), in at least float32 and never rounded below.
    """
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    A_P = lora_A.detach().to(dtype, copy=True)
    if projector is not None:
        projector.project_(A_P)
    F = scale * lora_B.detach().to(dtype)
    if frozen_A is None or frozen_B is None:
        return F, A_P
    return torch.cat([F, -scale * frozen_B.to(dtype)], dim=1), torch.cat([A_P, frozen_A.to(dtype)], dim=0)


# What rounding A₀P to its dtype leaves outside the null space, with a wide margin.
_LEAK = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _outside(name: str, frozen_A: torch.Tensor, basis: torch.Tensor, complement: bool) -> list[str]:
    """Why A₀P does not belong to a basis, if it does not."""
    A = frozen_A.detach().double()  # float32's norms overflow from 2e19 on
    inside = A.clone()
    null_project_(inside, basis.detach(), complement)
    leak = float((A - inside).norm() / A.norm().clamp_min(torch.finfo(A.dtype).tiny))
    if leak <= _LEAK[frozen_A.dtype]:
        return []
    return [f"{name} acts outside the null space of the basis (‖A₀P Q‖/‖A₀P‖ = {leak:.1e}): one of them was altered"]


@torch.no_grad()
def merged_weight(weight: torch.Tensor, F: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """``W + F G`` (d_out, d_in) in the widest dtype, rounded once to that of W; ValueError if it is not finite."""
    dtype = torch.promote_types(weight.dtype, F.dtype)
    with full_float32_products():
        merged = (weight.to(dtype) + F.to(dtype) @ G.to(dtype)).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError(
            f"the merged weight is not finite in {merged.dtype}: the adapter diverged, or the dtype overflows"
        )
    return merged


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before, after or instead of the module's own forward or backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _nothing() -> None:
    """The op's own checks are all that such a layer needs."""


class ProjectedLoraLinear(nn.Module):
    """``y = x Wᵀ + b + s·drop(x) (A P)ᵀ Bᵀ − s·x (A₀P)ᵀ B₀ᵀ`` with frozen W and b and trainable A and B.

    Exact under any optimiser, since ``A P`` is formed in every forward. Build it with :meth:`from_linear`.

    Parameters and buffers: ``weight`` (d_out, d_in) and ``bias`` (d_out,), frozen; ``lora_A`` (r, d_in) and
    ``lora_B`` (d_out, r), trainable; ``projector.basis`` (d_in, k); ``frozen_A`` (r, d_in) and ``frozen_B`` (d_out, r),
    the virtual residual, absent when the adapter starts at zero. See :func:`guardspace_kernels.ops.projected_lora`.
    """

    frozen_A: torch.Tensor | None
    frozen_B: torch.Tensor | None
    output_sizes: list[int] | None = None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        basis: torch.Tensor,
        *,
        complement: bool = True,
        scale: float = 1.0,
        dropout: float = 0.0,
        virtual_residual: bool = False,
        output_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        complement = boolean("complement", complement)
        virtual_residual = boolean("virtual_residual", virtual_residual)
        scale = number("scale", scale, "a number", lambda x: True)
        dropout = number("dropout", dropout, "in [0, 1)", lambda x: 0 <= x < 1)
        check_layer(weight, bias, lora_A, lora_B, basis, output_sizes)
        if output_sizes is not None:
            self.output_sizes = list(output_sizes)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.projector = NullSpaceProjector(basis, complement)
        A_P = self.projector.project_(lora_A.detach().clone())
        self.lora_A = nn.Parameter(A_P)
        self.lora_B = nn.Parameter(lora_B.detach().clone())
        self.register_buffer("frozen_A", A_P.clone() if virtual_residual else None)
        self.register_buffer("frozen_B", lora_B.detach().clone() if virtual_residual else None)
        self.scale = scale
        self.dropout = dropout
        self._spare = eager.Spare()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._spare = eager.Spare()  # not moved, and its memory is wanted where the layer was
        return super()._apply(*args, **kwargs)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        basis: torch.Tensor,
        *,
        complement: bool = True,
        alpha: float | None = None,
        dropout: float = 0.0,
        init: tuple[torch.Tensor, torch.Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ProjectedLoraLinear:
        """Wraps ``linear`` without copying or changing its weight.

        Args:
            linear: the layer to adapt.
            rank: r, from 1 to min(d_out, d_in).
            basis: (d_in, k), orthonormal columns: the protected directions (``complement=True``) or the null space.
            alpha: the scaling is ``alpha / rank``; default ``2 * rank``.
            dropout: probability of dropping an entry of the adapter's input while training.
            init: (A₀, B₀) to start from, of shapes (r, d_in) and (d_out, r); the layer's output is unchanged at the
                start, through the virtual residual. Without it A is Kaiming-uniform and B zero, as in plain LoRA.
            dtype: of A and B.

        Raises:
            TypeError, ValueError: an argument of another type or shape.
        """
        instance("linear", linear, nn.Linear, "a torch.nn.Linear")
        if type(linear).forward is not nn.Linear.forward or has_hooks(linear) or "weight" not in linear._parameters:
            raise TypeError(
                f"linear must be a plain torch.nn.Linear, whose place is taken: {type(linear).__name__} has a forward, "
                "hooks or a parametrisation of its own, which would be lost; take them off"
            )
        instance("basis", basis, torch.Tensor, "a tensor (d_in, k)")
        rank = integer("rank", rank)
        if alpha is not None:
            alpha = number("alpha", alpha, "positive", lambda x: x > 0)
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be one of {FLOATS}, got {shown(dtype)}")
        d_out, d_in = linear.weight.shape
        if not 1 <= rank <= min(d_out, d_in):
            raise ValueError(f"rank must be from 1 to min(d_out, d_in) = {min(d_out, d_in)}, got {rank}")
        device = linear.weight.device
        if init is None:
            lora_A = torch.empty(rank, d_in, dtype=dtype, device=device)
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
            lora_B = torch.zeros(d_out, rank, dtype=dtype, device=device)
        else:
            if not (isinstance(init, (tuple, list)) and [isinstance(t, torch.Tensor) for t in init] == [True, True]):
                raise TypeError(f"init must be a pair of tensors (A0, B0), got {shown(init)}")
            lora_A, lora_B = (t.to(device=device, dtype=dtype) for t in init)
            if lora_A.shape != (rank, d_in) or lora_B.shape != (d_out, rank):
                raise ValueError(
                    f"init must be (A0, B0) of shapes ({rank}, {d_in}) and ({d_out}, {rank}), "
                    f"got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
                )
        return cls(
            linear.weight,
            linear.bias,
            lora_A,
            lora_B,
            basis.to(device),
            complement=complement,
            scale=(2 * rank if alpha is None else alpha) / rank,
            dropout=dropout,
            virtual_residual=init is not None,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        if not torch.compiler.is_dynamo_compiling():
            own, buffers = self.__dict__["_parameters"], self.__dict__["_buffers"]
            projector = self.__dict__["_modules"]["projector"]
            layer = Layer(
                own["weight"], own.get("bias"), projector._buffers["basis"], projector.complement, self.scale,
                buffers["frozen_A"], buffers["frozen_B"], None, self.output_sizes,
            )  # fmt: skip
            y = eager.run(self._spare, _nothing, x, own["lora_A"], own["lora_B"], layer, dropout)
            if y is not None:
                return y
        return projected_lora(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.projector.basis,
            self.projector.complement,
            self.scale,
            self.bias,
            self.frozen_A,
            self.frozen_B,
            dropout,
            output_sizes=self.output_sizes,
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """As ``nn.Module.load_state_dict``, but all or nothing: what is refused changes nothing.

        Raises:
            RuntimeError: with ``strict``, missing or unexpected keys; entries of another shape or not finite; a basis
                that is not orthonormal; a frozen A₀P that does not lie in the null space of the basis.
        """
        if strict:
            ours, theirs = self.state_dict().keys(), state_dict.keys()
            refuse_state(
                self,
                [
                    f"{what} key(s) in state_dict: {', '.join(sorted(keys))}"
                    for what, keys in (("Missing", ours - theirs), ("Unexpected", theirs - ours))
                    if keys
                ],
            )
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Before this module's entries are copied, and those of the projector, which come after it.
        refuse_state(self, self._state_problems(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _state_problems(self, state: Mapping[str, Any], prefix: str) -> list[str]:
        problems = self.projector.state_problems(state, f"{prefix}projector.")
        for name, ours in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            key = prefix + name
            theirs = state.get(key, ours)
            if not isinstance(theirs, torch.Tensor) or theirs.shape != ours.shape:
                got = tuple(theirs.shape) if isinstance(theirs, torch.Tensor) else type(theirs).__name__
                problems.append(f"size mismatch for {key}: saved as {got}, ours is {tuple(ours.shape)}")
            elif name not in ("weight", "bias") and not theirs.is_meta and not torch.isfinite(theirs).all():
                problems.append(f"{key} holds non-finite values")
        frozen_A = state.get(f"{prefix}frozen_A", self.frozen_A)
        if not problems and frozen_A is not None and not frozen_A.is_meta:
            basis = state.get(f"{prefix}projector.basis", self.projector.basis)
            complement = bool(state.get(f"{prefix}projector.{FORM}", self.projector.complement))
            problems += _outside(f"{prefix}frozen_A", frozen_A, basis.to(frozen_A.device), complement)
        return problems

    def delta_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(F, G) with ``ΔW = F G`` against :attr:`weight`; see :func:`delta_factors`."""
        return delta_factors(self.lora_A, self.lora_B, self.projector, self.scale, self.frozen_A, self.frozen_B)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """An ordinary linear layer with weight ``W + ΔW``, rounded to the dtype of W (which moves protected outputs
        by about its rounding error). ValueError if it is not finite."""
        F, G = self.delta_factors()
        d_out, d_in = self.weight.shape
        merged = nn.Linear(d_in, d_out, bias=self.bias is not None, device="meta")
        merged.weight = nn.Parameter(merged_weight(self.weight, F, G), requires_grad=False)
        if self.bias is not None:
            merged.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return merged

    def extra_repr(self) -> str:
        d_out, d_in = self.weight.shape
        text = (
            f"in_features={d_in}, out_features={d_out}, bias={self.bias is not None}, rank={self.lora_A.shape[0]}, "
            f"protected={self.projector.protected}, scale={self.scale:g}"
        )
        return text + (f", dropout={self.dropout:g}" if self.dropout else "")


class FusedProjectedLoraLinear(ProjectedLoraLinear):
    """Linear layers that read one input, such as q, k and v or gate and up, as one product over their stacked weights.

    Each has an adapter of its own; all share the basis, as layers with one input do. ``forward`` returns a tuple, one
    output per layer, in order. Build it with :meth:`from_linears`; :meth:`unfuse` gives ordinary layers back.

    Parameters and buffers are those of :class:`ProjectedLoraLinear` stacked by rows: ``weight`` (Σ d_out, d_in),
    ``lora_A`` (layers · r, d_in), ``lora_B`` (Σ d_out, r).
    """

    output_sizes: list[int]

    @classmethod
    def from_linears(
        cls,
        linears: Sequence[nn.Linear],
        rank: int,
        basis: torch.Tensor,
        *,
        complement: bool = True,
        alpha: float | None = None,
        dropout: float = 0.0,
        init: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> FusedProjectedLoraLinear:
        """Copies the weights of ``linears`` into one.

        Args:
            linears: layers of one d_in, dtype and device; a missing bias beside present ones counts as zero.
            init: one (A₀, B₀) per layer, or None. The rest as in :meth:`ProjectedLoraLinear.from_linear`.

        Raises:
            TypeError, ValueError: an argument of another type or shape.
        """
        iterable("linears", linears, "a list of torch.nn.Linear")
        linears = list(linears)
        if not linears:
            raise ValueError("linears must hold at least one layer, got none")
        for linear in linears:
            instance("linears", linear, nn.Linear, "a list of torch.nn.Linear")
        kinds = {(linear.weight.shape[1], linear.weight.dtype, linear.weight.device) for linear in linears}
        if len(kinds) != 1:
            raise ValueError(f"linears must be layers of one d_in, dtype and device, got {sorted(map(str, kinds))}")
        if init is not None:
            instance("init", init, (list, tuple), "a list of pairs (A0, B0)")
        if init is not None and len(init) != len(linears):
            raise ValueError(f"init must have one (A0, B0) per layer, {len(linears)}, got {len(init)}")
        starts = [None] * len(linears) if init is None else list(init)
        parts = [
            ProjectedLoraLinear.from_linear(
                linear, rank, basis, complement=complement, alpha=alpha, dropout=dropout, init=start, dtype=dtype
            )
            for linear, start in zip(linears, starts, strict=True)
        ]
        bias = None
        if any(part.bias is not None for part in parts):
            bias = torch.cat(
                [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
            )
        return cls(
            torch.cat([part.weight for part in parts]),
            bias,
            torch.cat([part.lora_A for part in parts]),
            torch.cat([part.lora_B for part in parts]),
            parts[0].projector.basis,
            complement=complement,
            scale=parts[0].scale,
            dropout=dropout,
            virtual_residual=init is not None,
            output_sizes=[len(part.weight) for part in parts],
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        # Not split: autograd refuses in-place changes of what one call gave as several views. Nothing else holds y.
        return tuple(torch.unsafe_split_with_sizes(super().forward(x), self.output_sizes, dim=-1))

    def delta_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(F, G) with ``ΔW = F G`` of the stacked layers; F is block diagonal."""
        F, G = super().delta_factors()
        return torch.cat([spread(B, self.output_sizes) for B in F.split(self.lora_B.shape[1], dim=1)], dim=1), G

    def unfuse(self) -> list[nn.Linear]:
        """Ordinary linear layers with weights ``W + ΔW``, as :meth:`merge` rounds them."""
        merged, layers = self.merge(), []
        biases = [None] * len(self.output_sizes) if merged.bias is None else merged.bias.split(self.output_sizes)
        for weight, bias in zip(merged.weight.split(self.output_sizes), biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            if bias is not None:
                layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
            layers.append(layer)
        return layers

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, output_sizes={self.output_sizes}"
