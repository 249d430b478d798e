"""The layer of a guarded model: PEFT's LoRA layer, confined to the null space."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from guardspace_kernels.guard.adapted import LEAK_TOLERANCE
from guardspace_kernels.guard.attach import LayerGuard, compute_device, computes_weight
from guardspace_kernels.guard.fingerprint import TensorMark
from guardspace_kernels.guard.layers import is_conv1d, parameter_values
from guardspace_kernels.nn import NullSpaceProjector
from guardspace_kernels.nn.projected_lora_linear import delta_factors, has_hooks, merged_weight
from guardspace_kernels.ops import projected_lora
from guardspace_kernels.ops._library import full_float32_products
from guardspace_kernels.ops.projected_lora import eager
from guardspace_kernels.ops.projected_lora.algebra import Layer


class GuardedLinear(LoraLinear):
    """PEFT's LoRA layer with the adapter confined to the null space: ``ΔW = s (B A − B₀A₀) P``.

    ``lora_A`` and ``lora_B`` keep PEFT's names. ``A P`` is formed in every forward (*forward* mode), unless
    :func:`guardspace_kernels.guard_optimizer` keeps ``A = A P`` itself (*step* mode). Where the base layer is not a
    plain linear layer without hooks, the layer calls it and adds ``s·x (A P)ᵀ Bᵀ − s·x (A₀P)ᵀ B₀ᵀ``.

    The layer's state dict is that of the equivalent plain LoRA of rank 2r beside the base weight W, ``lora_A = [A P;
    A₀P]`` and ``lora_B = [B, −B₀]`` at the same scaling: what is taken out of the model means the same in plain PEFT,
    and a dict that does not is refused on loading.

    Base weights come back bit for bit: ``merge`` keeps the weight that it overwrites until ``unmerge``, and
    ``residual="frozen"`` keeps W, each a copy in host memory.
    """

    #: Whether :meth:`install_guard` was called.
    guarded = False
    adapter: str
    projector: NullSpaceProjector | None
    frozen_A: torch.Tensor | None
    frozen_B: torch.Tensor | None
    #: What ``merge`` and ``residual="frozen"`` overwrote, in host memory.
    _unmerged: torch.Tensor | None = None
    _base_weight: torch.Tensor | None = None
    #: In step mode: whether a forward with gradients came since the optimiser's step.
    was_trained = False

    def install_guard(
        self, adapter: str, guard: LayerGuard, projector: NullSpaceProjector | None, residual: str
    ) -> None:
        """Sets the adapter to its start and confines it; called once by :func:`attach_guard`."""
        base = self.get_base_layer()
        for factor, start in ((self.lora_A[adapter], guard.A0), (self.lora_B[adapter], guard.B0)):
            factor.to_empty(
                device=compute_device(guard.name, base)
            )  # PEFT puts it on the meta device beside an offloaded weight
            with torch.no_grad():
                factor.weight.copy_(start)
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        self.adapter, self.guarded = adapter, True
        self.guard = guard
        # PEFT gives every layer the configuration's value, whichever of Linear and Conv1D it is.
        self.fan_in_fan_out = is_conv1d(base)
        self.projector = projector
        self.step_mode = False
        self.shapes = A.shape, B.shape
        self.calls_base = guard.own_forward
        self._spare = eager.Spare()
        self.weight_is_residual = guard.frozen and residual == "frozen"
        self.register_buffer("frozen_A", A.detach().clone() if guard.frozen else None, persistent=False)
        self.register_buffer("frozen_B", B.detach().clone() if guard.frozen else None, persistent=False)
        if self.weight_is_residual:
            self._install_residual()

    @torch.no_grad()
    def _install_residual(self) -> None:
        self._frozen_scale = float(self.scaling[self.adapter])
        weight = self.get_base_layer().weight
        self._base_weight = weight.detach().to("cpu", copy=True)
        weight.copy_(weight - self._oriented(self._frozen_delta()))
        self._residual_mark = TensorMark.of(weight)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._spare = eager.Spare()  # not moved, and its memory is wanted where the layer was
        return super()._apply(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy is in no optimiser's hands: its parameters lost the hooks that step mode relies on.
        self.step_mode = False

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if self.guarded:
            raise second_adapter(adapter_name)
        super().update_layer(adapter_name, *args, **kwargs)

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if self.guarded and names != [self.adapter]:
            raise second_adapter(", ".join(names))
        super().set_adapter(adapter_names, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        raise kept_adapter()

    @property
    def step_mode(self) -> bool:
        """Whether an optimiser keeps this very A in the null space: one that took its place is projected in forward."""
        return self._kept_A is not None and self._kept_A[0] is self.A

    @step_mode.setter
    def step_mode(self, on: bool) -> None:
        self._kept_A = (self.A,) if on else None
        self.was_trained = False

    @property
    def A(self) -> nn.Parameter:
        return self._factor("lora_A")

    @property
    def B(self) -> nn.Parameter:
        return self._factor("lora_B")

    def _factor(self, name: str) -> nn.Parameter:
        # By the dictionaries: an optimiser in step mode asks every layer in every step.
        factor: nn.Parameter = self._modules[name]._modules[self.adapter].weight
        return factor

    @property
    def scale(self) -> float:
        scale = float(self.scaling[self.adapter])
        if self.weight_is_residual and scale != self._frozen_scale:
            raise self._refusal(
                RuntimeError,
                f'the scaling is {scale:g}, but residual="frozen" took s·B₀A₀P off the weight with s = '
                f'{self._frozen_scale:g}; set it back, or attach with residual="virtual", which takes any scaling',
            )
        return scale

    @property
    def frozen_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A₀P, B₀); only where the adapter did not start at zero."""
        if self.frozen_A is None or self.frozen_B is None:
            raise RuntimeError("this adapter started at zero: it has no frozen factors")
        return self.frozen_A, self.frozen_B

    def _frozen_delta(self) -> torch.Tensor:
        """``s·B₀A₀P`` (d_out, d_in)."""
        A, B = self.frozen_factors
        dtype = torch.promote_types(A.dtype, torch.float32)
        with full_float32_products():
            return self.scale * (B.to(dtype) @ A.to(dtype))

    def _oriented(self, matrix: torch.Tensor) -> torch.Tensor:
        """(d_out, d_in) as the layer stores its weight, or back."""
        return matrix.T if self.fan_in_fan_out else matrix

    def leak(self, A: torch.Tensor | None = None) -> float:
        """``‖A − A P‖ / ‖A‖`` of the adapter's A, or of another; in forward mode a leak of A itself is harmless."""
        if self.projector is None:
            return 0.0
        A = (self.A if A is None else A).detach().to(self.A.device, torch.float64)
        A = A / A.abs().max().clamp_min(torch.finfo(torch.float64).tiny)  # no square overflows
        outside = A - self.projector.project_(A.clone())
        return float(outside.norm() / A.norm().clamp_min(torch.finfo(torch.float64).tiny))

    def delta_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(F, G) with ``ΔW = F G`` against the base weight; RuntimeError if what it rests on was changed."""
        self.check_invariant()
        return delta_factors(self.A, self.B, self.projector, self.scale, self.frozen_A, self.frozen_B)

    def check_invariant(self) -> None:
        """RuntimeError if the factors are not those that the layer was given, or the frozen pair is not the plan's.

        In step mode the forward relies on ``A = A P``: then also if someone moved A out of the null space.
        """
        A, B = self.A, self.B
        if A.shape != self.shapes[0] or B.shape != self.shapes[1]:
            raise self._replaced()
        if A.is_meta or B.is_meta:
            raise self._refusal(
                RuntimeError,
                "the adapter is on the meta device, without values; offload the base model "
                "before attach_guard, which leaves the adapter where it computes",
            )
        if not self._holds_start():
            raise self._refusal(
                RuntimeError,
                "the frozen pair A₀P, B₀ is not the plan's: something wrote into it. Attach the guard anew",
            )
        if self.step_mode and not self.leak() <= LEAK_TOLERANCE[A.dtype]:
            raise self._refusal(
                RuntimeError,
                f"the adapter left the null space (‖A − A P‖/‖A‖ = {self.leak():.1e}): in step mode only the guarded "
                "optimiser may change it. Remove the optimiser guard to return to forward mode, which is always exact",
            )

    def _refusal(self, kind: type[Exception], what: str) -> Exception:
        return kind(f"layer {self.guard.name}: {what}")

    def _holds_start(self) -> bool:
        if self.frozen_A is None or self.frozen_B is None:
            return not self.guard.frozen and self.frozen_A is None and self.frozen_B is None
        pairs = ((self.frozen_A, self.guard.A0), (self.frozen_B, self.guard.B0))
        return all(_is_cast_of(ours, start.to(ours.device)) for ours, start in pairs)

    def _replaced(self) -> Exception:
        return self._refusal(
            RuntimeError,
            f"lora_A and lora_B have shapes {tuple(self.A.shape)} and {tuple(self.B.shape)}, the guard was attached "
            f"with {tuple(self.shapes[0])} and {tuple(self.shapes[1])}: another adapter was put in their place, or "
            "they were sharded. Attach the guard anew and use its load_adapter",
        )

    def base_weight(self) -> torch.Tensor:
        """The weight W of the base model (d_out, d_in), also where the layer holds W_res or the weight is offloaded."""
        return self._oriented(self.base_weight_as_stored().to(self.A.device))

    def base_weight_as_stored(self) -> torch.Tensor:
        """The same, as the base layer stores it and wherever that is."""
        base = self.get_base_layer()
        if self._base_weight is not None:
            return self._base_weight.to(base.weight.dtype)
        return parameter_values(base, "weight", base.weight).detach()

    def residual_difference(self) -> str:
        """What became of the W_res that ``residual="frozen"`` wrote: "", "changed" or "rounded to ..."."""
        return TensorMark.of(self.get_base_layer().weight).difference(self._residual_mark)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging adds to the layer's weight."""
        F, G = self.delta_factors()
        if self.weight_is_residual:
            rank = self.A.shape[0]
            F, G = F[:, :rank], G[:rank]
        with full_float32_products():
            delta = F @ G
        return self._oriented(delta).to(self.get_base_layer().weight.dtype)

    # ---- merging

    def check_mergeable(self) -> None:
        """ValueError if ``W + ΔW`` in the base layer's weight would not give the outputs of base and adapter."""
        base = self.get_base_layer()
        reason = ""
        if self.guard.shared:
            reason = (
                f"its weight is also that of {self.guard.shared}, which would change with it; give it its own first"
            )
        elif base._forward_hooks or base._forward_pre_hooks:
            reason = f"its {type(base).__name__} has hooks, which would act on the adapter too"
        elif computes_weight(base):
            reason = "its weight is computed from other parameters"
        if reason:
            raise self._refusal(ValueError, f"it cannot be merged: {reason}. export_lora needs no merging")
        if not all(torch.isfinite(t).all() for t in self.delta_factors()):
            raise self._refusal(
                ValueError, "it cannot be merged: the adapter holds non-finite values; its training diverged"
            )

    def _merged_weight(self) -> torch.Tensor:
        """``W + ΔW``, rounded once, as the layer stores it."""
        self.check_mergeable()
        if self.get_base_layer().weight.is_meta:
            raise self._refusal(
                ValueError,
                "it cannot be merged: its weight is offloaded; use merge_adapter or "
                "merge_and_unload of the model, which load it",
            )
        return self._oriented(merged_weight(self.base_weight(), *self.delta_factors()))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes ``W + ΔW``, rounded once, into the base weight; what it overwrites is kept in host memory.

        Every merge is safe in PEFT's sense: a result that is not finite raises and changes nothing.

        Raises:
            ValueError: a weight that is shared with another module or offloaded, a base layer with hooks, or a result
                that is not finite.
        """
        if self.adapter not in check_adapters_to_merge(self, adapter_names):
            return
        weight, merged = self.get_base_layer().weight, self._merged_weight()
        self._unmerged = weight.detach().to("cpu", copy=True)
        weight.copy_(merged)
        self.merged_adapters.append(self.adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the base weight back, bit for bit."""
        if self._unmerged is None:
            super().unmerge()  # warns that nothing is merged
            return
        self._write(self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    def _write(self, values: torch.Tensor) -> None:
        weight = self.get_base_layer().weight
        if weight.is_meta:
            raise self._refusal(
                RuntimeError, "the base weight is offloaded and cannot be put back; use unmerge_adapter of the model"
            )
        weight.copy_(values)

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer with ``W + ΔW``, or as it was, bit for bit; PEFT calls it to unload the model."""
        if merge and self.adapter in check_adapters_to_merge(self, adapter_names):
            self._write(self._merged_weight())
        elif not self.merged and self._base_weight is not None:
            self._write(self._base_weight)
        return self.get_base_layer()

    # ---- running

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not (args or kwargs or torch.compiler.is_dynamo_compiling()):
            y = self._eager(x)
            if y is not None:
                return y
        return self._forward(x, *args, **kwargs)

    def _eager(self, x: torch.Tensor) -> torch.Tensor | None:
        """The forward of a layer that trains or predicts in plain eager mode; None for every other case.

        ``nn.Module`` finds parameters by a method call each: reading them here from the dictionaries they are in takes
        a twentieth of that.
        """
        own = self.__dict__
        if (
            "guarded" not in own
            or own.get("_disable_adapters")
            or own["merged_adapters"]
            or own["calls_base"]
            or (own["weight_is_residual"] and own["scaling"][own["adapter"]] != own["_frozen_scale"])
        ):
            return None
        modules, buffers, adapter = own["_modules"], own["_buffers"], own["adapter"]
        base, projector = modules["base_layer"], modules.get("projector")
        parameters = base._parameters
        weight = parameters.get("weight")
        if weight is None or has_hooks(base):
            return None
        A = modules["lora_A"]._modules[adapter]._parameters.get("weight")
        B = modules["lora_B"]._modules[adapter]._parameters.get("weight")
        if A is None or B is None:
            return None
        dropout = modules["lora_dropout"]._modules[adapter]
        kept = own["_kept_A"]
        projected = kept is not None and kept[0] is A
        if projected and torch.is_grad_enabled():
            own["was_trained"] = True
        virtual = not own["weight_is_residual"]
        return eager.run(
            own["_spare"],
            self._check_factors,
            x,
            A,
            B,
            Layer(
                weight.t() if own["fan_in_fan_out"] else weight,
                parameters.get("bias"),
                None if projector is None else projector._buffers["basis"],
                projector is None or projector.complement,
                float(own["scaling"][adapter]),
                buffers["frozen_A"] if virtual else None,
                buffers["frozen_B"] if virtual else None,
                None,
                None,
                projected,
            ),
            dropout.p if own["training"] and isinstance(dropout, nn.Dropout) else 0.0,
        )

    def _check_factors(self) -> None:
        if self.A.shape != self.shapes[0] or self.B.shape != self.shapes[1]:
            raise self._replaced()

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.guarded:
            raise RuntimeError("this layer has no guard yet; build the model with attach_guard(model, plan)")
        if args or (kwargs and any(value is not None for value in kwargs.values())):
            raise ValueError(
                f"a guarded layer takes its input alone, got also {sorted(kwargs) or 'positional arguments'}"
            )
        base, disabled = self.base_layer, self.disable_adapters
        if self.merged:
            if not disabled:
                return base(x)
            self.unmerge()
        hooked = has_hooks(base)
        if self.weight_is_residual and hooked:
            raise self._refusal(
                RuntimeError,
                f'the base layer {type(base).__name__} has hooks, which would see W_res under residual="frozen"; '
                'remove them, or attach with residual="virtual"',
            )
        if disabled:
            if not self.weight_is_residual:
                return base(x)
            A0, B0 = self.frozen_factors
            return projected_lora(x, self._oriented(base.weight), A0, B0, scale=self.scale, bias=base.bias)
        self._check_factors()
        A, B = self.A, self.B
        if self.step_mode and torch.is_grad_enabled():
            self.was_trained = True
        if hooked or self.calls_base:
            y = base(x)
            return y + self._adapter_output(x, A, B).to(y.dtype)
        dropout = self.lora_dropout[self.adapter]
        virtual = not self.weight_is_residual
        return projected_lora(
            x,
            self._oriented(base.weight),
            A,
            B,
            self.projector.basis if self.projector is not None else None,
            self.projector.complement if self.projector is not None else True,
            self.scale,
            base.bias,
            self.frozen_A if virtual else None,
            self.frozen_B if virtual else None,
            dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0,
            projected=self.step_mode,
        )

    def _adapter_output(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """``s·drop(x) (A P)ᵀ Bᵀ − s·x (A₀P)ᵀ B₀ᵀ``, one product with the B factors so that the two cancel before
        rounding; without the second term where the base computes with W_res."""
        if A.is_meta or B.is_meta:
            self.check_invariant()
        A_P = _Fold.apply(A, self.projector, self.step_mode).to(x.dtype)
        h = functional.linear(self.lora_dropout[self.adapter](x), A_P)
        B = self.scale * B
        if self.frozen_A is not None and self.frozen_B is not None and not self.weight_is_residual:
            h = torch.cat([h, functional.linear(x, self.frozen_A.to(x.dtype))], dim=-1)
            B = torch.cat([B, -self.scale * self.frozen_B.to(B.dtype)], dim=1)
        return functional.linear(h, B.to(x.dtype))


class _Fold(torch.autograd.Function):
    """``A P`` in at least float32, whatever autocast or TF32 say, and its gradient ``∂A = ∂(A P) P``.

    ``projected``: A = A P already, and only the gradient is projected.
    """

    @staticmethod
    def forward(ctx: Any, A: torch.Tensor, projector: NullSpaceProjector | None, projected: bool) -> torch.Tensor:
        ctx.projector, ctx.dtype = projector, A.dtype
        A_P = A.to(torch.promote_types(A.dtype, torch.float32), copy=True)
        return A_P if projector is None or projected else projector.project_(A_P)

    @staticmethod
    def backward(ctx: Any, dA_P: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        dA = dA_P.clone()
        return (dA if ctx.projector is None else ctx.projector.project_(dA)).to(ctx.dtype), None, None


def _is_cast_of(ours: torch.Tensor, start: torch.Tensor) -> bool:
    """Whether ``ours`` is ``start`` in its dtype, on the way through a narrower one perhaps."""
    ways = (ours.dtype, torch.bfloat16, torch.float16)
    return ours.shape == start.shape and any(torch.equal(ours, start.to(way).to(ours.dtype)) for way in ways)


def second_adapter(name: str) -> ValueError:
    return ValueError(
        f"a guarded model takes no second adapter ({name!r}): it would not be confined to the null space. "
        "A preference trainer that adds one as its reference policy takes ref_model= instead; TRL's GRPO and RLOO, "
        "which take none, need beta=0"
    )


def kept_adapter() -> ValueError:
    return ValueError("a guarded model keeps its only adapter; model.unload() returns the base model without it")
