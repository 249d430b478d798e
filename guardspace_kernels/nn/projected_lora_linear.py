"""A linear layer with a projected LoRA adapter, for trainers without PEFT."""

from __future__ import annotations

import math

import torch
from torch import nn

from guardspace_kernels.nn.null_space_projector import NullSpaceProjector
from guardspace_kernels.ops import projected_lora
from guardspace_kernels.ops._library import full_float32_products


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


class ProjectedLoraLinear(nn.Module):
    """``y = x Wᵀ + b + s·drop(x) (A P)ᵀ Bᵀ − s·x (A₀P)ᵀ B₀ᵀ`` with frozen W and b and trainable A and B.

    Exact under any optimiser, since ``A P`` is formed in every forward. Build it with :meth:`from_linear`.

    Parameters and buffers: ``weight`` (d_out, d_in) and ``bias`` (d_out,), frozen; ``lora_A`` (r, d_in) and
    ``lora_B`` (d_out, r), trainable; ``projector.basis`` (d_in, k); ``frozen_A`` (r, d_in) and ``frozen_B`` (d_out, r),
    the virtual residual, absent when the adapter starts at zero. See :func:`guardspace_kernels.ops.projected_lora`.
    """

    frozen_A: torch.Tensor | None
    frozen_B: torch.Tensor | None

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
    ) -> None:
        super().__init__()
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
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        d_out, d_in = linear.weight.shape
        if not 1 <= rank <= min(d_out, d_in):
            raise ValueError(f"rank must be from 1 to min(d_out, d_in) = {min(d_out, d_in)}, got {rank}")
        device = linear.weight.device
        if init is None:
            lora_A = torch.empty(rank, d_in, dtype=dtype, device=device)
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
            lora_B = torch.zeros(d_out, rank, dtype=dtype, device=device)
        else:
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
            self.dropout if self.training else 0.0,
        )

    def delta_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(F, G) with ``ΔW = F G`` against :attr:`weight`; see :func:`delta_factors`."""
        return delta_factors(self.lora_A, self.lora_B, self.projector, self.scale, self.frozen_A, self.frozen_B)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """An ordinary linear layer with weight ``W + ΔW``, rounded to the dtype of W (which moves protected outputs
        by about its rounding error)."""
        F, G = self.delta_factors()
        d_out, d_in = self.weight.shape
        merged = nn.Linear(d_in, d_out, bias=self.bias is not None, device="meta")
        with full_float32_products():
            weight = (self.weight.to(F.dtype) + F @ G).to(self.weight.dtype)
        merged.weight = nn.Parameter(weight, requires_grad=False)
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
