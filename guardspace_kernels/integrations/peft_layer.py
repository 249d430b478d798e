"""The layer of a guarded model: PEFT's LoRA layer, confined to the null space."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from guardspace_kernels.guard.attach import LayerGuard
from guardspace_kernels.guard.layers import is_conv1d, linear_weight
from guardspace_kernels.nn import NullSpaceProjector
from guardspace_kernels.nn.projected_lora_linear import delta_factors
from guardspace_kernels.ops import projected_lora


class GuardedLinear(LoraLinear):
    """PEFT's LoRA layer with the adapter confined to the null space: ``ΔW = s (B A − B₀A₀) P``.

    ``lora_A`` and ``lora_B`` keep PEFT's names. ``A P`` is formed in every forward (*forward* mode), unless
    :func:`guardspace_kernels.guard_optimizer` keeps ``A = A P`` itself (*step* mode). The layer's state dict is that
    of the equivalent plain LoRA of rank 2r, ``lora_A = [A P; A₀P]`` and ``lora_B = [B, −B₀]`` at the same scaling:
    what is taken out of the model means the same in plain PEFT, and a dict that does not is refused on loading.
    """

    adapter: str
    projector: NullSpaceProjector | None
    frozen_A: torch.Tensor | None
    frozen_B: torch.Tensor | None

    def install_guard(
        self, adapter: str, guard: LayerGuard, projector: NullSpaceProjector | None, residual: str
    ) -> None:
        """Sets the adapter to its start and confines it; called once by :func:`attach_guard`."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        with torch.no_grad():
            A.copy_(guard.A0)
            B.copy_(guard.B0)
        self.adapter = adapter
        # PEFT gives every layer the configuration's value, whichever of Linear and Conv1D it is.
        self.fan_in_fan_out = is_conv1d(self.get_base_layer())
        self.projector = projector
        self.step_mode = False
        self.weight_is_residual = guard.frozen and residual == "frozen"
        self.register_buffer("frozen_A", A.detach().clone() if guard.frozen else None, persistent=False)
        self.register_buffer("frozen_B", B.detach().clone() if guard.frozen else None, persistent=False)
        if self.weight_is_residual:
            self._add_frozen_to_weight(-1.0)
        self.register_state_dict_post_hook(_to_plain_lora)
        self.register_load_state_dict_pre_hook(_from_plain_lora)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy is in no optimiser's hands: its parameters lost the hooks that step mode relies on.
        self.step_mode = False

    @property
    def guarded(self) -> bool:
        return hasattr(self, "adapter")

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if self.guarded:
            raise second_adapter(adapter_name)
        super().update_layer(adapter_name, *args, **kwargs)

    @property
    def step_mode(self) -> bool:
        """Whether an optimiser keeps this very A in the null space: one that took its place is projected in forward."""
        return self._kept_A is not None and self._kept_A[0] is self.A

    @step_mode.setter
    def step_mode(self, on: bool) -> None:
        self._kept_A = (self.A,) if on else None

    @property
    def A(self) -> nn.Parameter:
        return self.lora_A[self.adapter].weight

    @property
    def B(self) -> nn.Parameter:
        return self.lora_B[self.adapter].weight

    @property
    def scale(self) -> float:
        return float(self.scaling[self.adapter])

    @property
    def frozen_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A₀P, B₀); only where the adapter did not start at zero."""
        if self.frozen_A is None or self.frozen_B is None:
            raise RuntimeError("this adapter started at zero: it has no frozen factors")
        return self.frozen_A, self.frozen_B

    @torch.no_grad()
    def _add_frozen_to_weight(self, sign: float) -> None:
        weight = linear_weight(self.get_base_layer())
        weight.copy_(weight + sign * self._frozen_delta())

    def _frozen_delta(self) -> torch.Tensor:
        """``s·B₀A₀P`` (d_out, d_in)."""
        A, B = self.frozen_factors
        dtype = torch.promote_types(A.dtype, torch.float32)
        return self.scale * (B.to(dtype) @ A.to(dtype))

    def restore_base(self) -> None:
        """Puts B₀A₀P back into the weight where ``residual="frozen"`` took it out (up to rounding)."""
        if self.weight_is_residual and not self.merged:
            self._add_frozen_to_weight(1.0)
            self.weight_is_residual = False

    def leak(self, A: torch.Tensor | None = None) -> float:
        """``‖A − A P‖ / ‖A‖`` of the adapter's A, or of another; in forward mode a leak of A itself is harmless."""
        if self.projector is None:
            return 0.0
        A = (self.A.detach() if A is None else A).to(self.A.device, torch.float32)
        outside = A - self.projector.project_(A.clone())
        return float(outside.norm() / A.norm().clamp_min(torch.finfo(torch.float32).tiny))

    def delta_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(F, G) with ``ΔW = F G`` against the base weight; RuntimeError if step mode's invariant is broken."""
        self.check_invariant()
        return delta_factors(self.A, self.B, self.projector, self.scale, self.frozen_A, self.frozen_B)

    def check_invariant(self) -> None:
        """In step mode the forward relies on ``A = A P``: RuntimeError if someone moved A out of the null space."""
        if self.step_mode and self.leak() > LEAK_TOLERANCE[self.A.dtype]:
            raise RuntimeError(
                f"the adapter left the null space (‖A − A P‖/‖A‖ = {self.leak():.1e}): in step mode only the guarded "
                "optimiser may change it. Remove the optimiser guard to return to forward mode, which is always exact"
            )

    def base_weight(self) -> torch.Tensor:
        """The weight W of the base model (d_out, d_in), also where the layer holds W_res."""
        weight = linear_weight(self.get_base_layer()).detach()
        return weight + self._frozen_delta() if self.weight_is_residual else weight

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging adds to the layer's weight; PEFT's merge and unmerge call this."""
        F, G = self.delta_factors()
        if self.weight_is_residual:
            rank = self.A.shape[0]
            F, G = F[:, :rank], G[:rank]
        delta = F @ G
        return (delta.T if self.fan_in_fan_out else delta).to(linear_weight(self.get_base_layer()).dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.guarded:
            raise RuntimeError("this layer has no guard yet; build the model with attach_guard(model, plan)")
        if args or any(value is not None for value in kwargs.values()):
            raise ValueError(
                f"a guarded layer takes its input alone, got also {sorted(kwargs) or 'positional arguments'}"
            )
        base = self.get_base_layer()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            return self.base_layer(x)
        if self.disable_adapters:
            if not self.weight_is_residual:
                return self.base_layer(x)
            A0, B0 = self.frozen_factors
            return projected_lora(x, linear_weight(base), A0, B0, scale=self.scale, bias=base.bias)
        dropout = self.lora_dropout[self.adapter]
        virtual = not self.weight_is_residual
        project = self.projector is not None and (self._kept_A is None or not self.step_mode)
        return projected_lora(
            x,
            linear_weight(base),
            self.A,
            self.B,
            self.projector.basis if project and self.projector is not None else None,
            self.projector.complement if self.projector is not None else True,
            self.scale,
            base.bias,
            self.frozen_A if virtual else None,
            self.frozen_B if virtual else None,
            dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0,
        )

    def load_factors(self, A_P: torch.Tensor, B: torch.Tensor, where: str) -> None:
        """ValueError unless the adapter (r, d_in), (d_out, r) that is to be loaded lies in the null space."""
        if A_P.shape != self.A.shape or B.shape != self.B.shape:
            raise ValueError(
                f"{where}: the adapter has shapes {tuple(A_P.shape)} and {tuple(B.shape)}, expected "
                f"{tuple(self.A.shape)} and {tuple(self.B.shape)}"
            )
        if not (torch.isfinite(A_P).all() and torch.isfinite(B).all()):
            raise ValueError(f"{where}: the adapter holds non-finite values")
        leak = self.leak(A_P)
        if leak > LEAK_TOLERANCE[A_P.dtype]:
            raise ValueError(
                f"{where}: the adapter acts outside the null space (‖A Q‖/‖A‖ = {leak:.1e}); it was not trained under "
                "this plan, or the file was altered"
            )


def agree(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    """Whether the two are equal up to a relative ``tolerance``; False for other shapes and for NaN."""
    return ours.shape == theirs.shape and bool((ours - theirs.to(ours)).norm() <= tolerance * ours.norm())


def second_adapter(name: str) -> ValueError:
    return ValueError(
        f"a guarded model takes no second adapter ({name!r}): it would not be confined to the null space. "
        "A preference trainer that adds one as its reference policy takes ref_model= instead"
    )


# What rounding A P to its dtype leaves outside the null space, with a wide margin.
LEAK_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _extra_state_key(prefix: str) -> str:
    return f"{prefix}projector.{nn.modules.module._EXTRA_STATE_KEY_SUFFIX}"


def _to_plain_lora(layer: GuardedLinear, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    key_A, key_B = (f"{prefix}{name}.{layer.adapter}.weight" for name in ("lora_A", "lora_B"))
    if key_A not in state or key_B not in state:
        return
    # The projector is the plan's; plain PEFT has none.
    state.pop(_extra_state_key(prefix), None)
    _, G = layer.delta_factors()
    state[key_A] = G.to(layer.A.dtype)
    if layer.frozen_B is not None:
        state[key_B] = torch.cat([layer.B.detach(), -layer.frozen_B.to(layer.B.dtype)], dim=1)


def _from_plain_lora(layer: GuardedLinear, state: dict[str, Any], prefix: str, *_: Any) -> None:
    key_A, key_B = (f"{prefix}{name}.{layer.adapter}.weight" for name in ("lora_A", "lora_B"))
    if layer.projector is not None:
        state[_extra_state_key(prefix)] = layer.projector.get_extra_state()
    A, B = state.get(key_A), state.get(key_B)
    if A is None and B is None:
        return
    rank = layer.A.shape[0]
    rows = rank if layer.frozen_A is None else 2 * rank
    where = prefix.removeprefix("base_model.model.").rstrip(".")
    if A is None or B is None:
        raise ValueError(f"{where}: the state holds one of lora_A and lora_B without the other")
    if A.shape[0] != rows or B.dim() != 2 or B.shape[1] != rows:
        raise ValueError(
            f"{where}: a guarded layer's state has {rows} adapter rows, [A P; A0 P], got shapes {tuple(A.shape)} and "
            f"{tuple(B.shape)}; it is not the state of this guarded model"
        )
    if layer.frozen_A is not None and layer.frozen_B is not None:
        for ours, theirs in ((layer.frozen_A, A[rank:]), (layer.frozen_B, -B[:, rank:])):
            if not agree(ours, theirs, 1e-2):
                raise ValueError(f"{where}: the state starts from another plan (its frozen rows differ)")
    layer.load_factors(A[:rank], B[:, :rank], where)
    state[key_A], state[key_B] = A[:rank], B[:, :rank]
