"""Every way a competent person would write the three ops in plain PyTorch; nothing here imports our kernels.

Symbols: x (T, d_in) tokens, W (d_out, d_in) the frozen weight, A (r, d_in) and B (d_out, r) the adapter, s its scale,
Q (d_in, k) an orthonormal basis of the protected directions, P = I − Q Qᵀ the dense projector, C (d, d) a covariance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dense_projector(Q: Tensor, dtype: torch.dtype) -> Tensor:
    """``P = I − Q Qᵀ`` (d, d), formed in float64."""
    return (torch.eye(Q.shape[0], dtype=torch.float64) - Q.double() @ Q.double().T).to(dtype)


# Projected LoRA: forwards, differentiated by autograd.


def plain_lora(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """No guard at all; adapters in x's dtype."""
    return F.linear(x, W) + F.linear(F.linear(x, A), B) * s


def peft_lora(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """PEFT's default beside a half-precision base: float32 adapters, x cast up to them, the sum cast back."""
    y = F.linear(x, W)
    return (y + F.linear(F.linear(x.to(A.dtype), A), B) * s).to(y.dtype)


def dense_p(x: Tensor, W: Tensor, A: Tensor, B: Tensor, P: Tensor, s: float) -> Tensor:
    """Naive GuardSpace: P is one more d_in × d_in linear layer for every token."""
    return F.linear(x, W) + F.linear(F.linear(F.linear(x, P), A), B) * s


def low_rank_p(x: Tensor, W: Tensor, A: Tensor, B: Tensor, Q: Tensor, s: float) -> Tensor:
    """P by its thin basis, still for every token."""
    return F.linear(x, W) + F.linear(F.linear(x - (x @ Q) @ Q.T, A), B) * s


def folded(x: Tensor, W: Tensor, A: Tensor, B: Tensor, Q: Tensor, s: float) -> Tensor:
    """P folded into A: ``(x P) Aᵀ = x (A P)ᵀ``. A, B and Q in float32; A P and B are rounded to x's dtype."""
    A_P = A - (A @ Q) @ Q.T
    return F.linear(x, W) + F.linear(F.linear(x, A_P.to(x.dtype)), B.to(x.dtype)) * s


class _FoldedAddmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, Q: Tensor, s: float) -> Tensor:
        A_P = torch.addmm(A, A @ Q, Q.T, alpha=-1).to(x.dtype)
        h = x @ A_P.T
        ctx.save_for_backward(x, h, A_P, W, B, Q)
        ctx.s = s
        return F.linear(x, W).addmm_(h, B.to(x.dtype).T, alpha=s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, h, A_P, W, B, Q = ctx.saved_tensors
        dh = (dy @ B.to(x.dtype)).mul_(ctx.s)
        dx = (dy @ W).addmm_(dh, A_P)
        dA = (dh.T @ x).to(B.dtype)
        dB = (dy.T @ h).to(B.dtype).mul_(ctx.s)
        return dx, None, dA.addmm_(dA @ Q, Q.T, alpha=-1), dB, None, None


def folded_addmm(x: Tensor, W: Tensor, A: Tensor, B: Tensor, Q: Tensor, s: float) -> Tensor:
    """Folded, with a backward of its own and every low-rank update added in place: the best that eager torch does."""
    y: Tensor = _FoldedAddmm.apply(x, W, A, B, Q, s)
    return y


class DensePLinear(nn.Module):
    """Naive GuardSpace as a module: residual weight, dense P and adapter in the dtype of the base weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, P: Tensor, s: float) -> None:
        super().__init__()
        dtype = weight.dtype
        residual = weight.float() - s * (B @ A) @ P
        self.weight = nn.Parameter(residual.to(dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype))
        self.register_buffer("P", P.to(dtype))
        self.s = s

    def forward(self, x: Tensor) -> Tensor:
        y = dense_p(x, self.weight, self.lora_A, self.lora_B, self.P, self.s)
        return y if self.bias is None else y + self.bias


# Covariance: each adds to C in place.


def cov_own_dtype(C: Tensor, x: Tensor) -> None:
    """``Xᵀ X`` in x's dtype. In bfloat16 the product is rounded to 8 bits, more than the null space's share."""
    C += x.T @ x


def cov_addmm(C: Tensor, x: Tensor) -> None:
    """A float32 copy of x, then one BLAS call."""
    x = x.float()
    C.addmm_(x.T, x)


def cov_paper_hook(C: Tensor, x: Tensor) -> None:
    """The hook of the paper's code: a float32 copy, divided by its largest entry, the product, the sum."""
    x = x.float()
    x = x / x.max()
    C += x.T @ x


def cov_corda_hook(C: Tensor, x: Tensor) -> None:
    """The same as PEFT's CorDA does it, which also looks for non-finite values in the input and in the product."""
    x = x.float()
    x = x / x.max().abs()
    if x.isnan().any() or x.isinf().any():
        raise ValueError("non-finite input")
    product = x.T @ x
    if product.isnan().any() or product.isinf().any():
        raise ValueError("non-finite covariance")
    C += product


# Null projection of gradients and parameters.


def project_dense(G: Tensor, P: Tensor) -> Tensor:
    return G @ P


def project_addmm_(G: Tensor, Q: Tensor) -> Tensor:
    return G.addmm_(G @ Q, Q.T, alpha=-1)


def each(project: Any, matrices: Sequence[Tensor], projectors: Sequence[Tensor]) -> list[Tensor]:
    """A model's layers one after another."""
    return [project(G, projector) for G, projector in zip(matrices, projectors, strict=True)]


def trailing_paper(W: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_r, σ_r and V_rᵀ C⁻¹ as the paper's code gets them: C damped until its inverse inverts it, then a full SVD."""
    eye, damping = torch.eye(len(C)), 0.01
    while True:
        damped = C + damping * C.diagonal().mean() * eye
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            break
        damping *= 2
    U, sigma, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    return U[:, -r:], sigma[-r:], Vh[-r:] @ inverse


def null_space_paper(C: Tensor) -> Tensor:
    """P as the paper's code forms it."""
    values, vectors = torch.linalg.eigh(C)
    N = vectors[:, values <= torch.clamp(1e-6 * values[-1], min=1e-8)]
    return N @ N.T
