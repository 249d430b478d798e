"""Projected LoRA: ``y = x Wᵀ + b + s·drop(x) (A P)ᵀ Bᵀ − s·x (A₀P)ᵀ B₀ᵀ`` and its gradients.

The projector is folded into the small matrix, ``A_P = A P``, in every forward, so P is never applied to a token.
With ``dh = s·dy B``::

    dx   = dy W + drop'(dh A_P) − s·(dy B₀) A₀P
    dA   = (dhᵀ drop(x)) P
    dB   = s·dyᵀ h,   h = drop(x) A_Pᵀ

Backward keeps x, h (..., r) and the (r, d_in) matrix A_P; W, b, the basis and the frozen pair get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from guardspace_kernels import dispatch
from guardspace_kernels.arguments import instance, shown
from guardspace_kernels.ops import _triton
from guardspace_kernels.ops._library import (
    AUTOCAST,
    LIBRARY,
    define,
    differentiated,
    require_basis,
    require_dense,
    require_float,
    require_same_device,
    rows,
    shape,
)
from guardspace_kernels.ops.projected_lora import algebra, aten, cpu_kernels, cuda_kernels  # noqa: F401  # they register
from guardspace_kernels.ops.projected_lora.algebra import Dropout, Factors, Layer

__all__ = ["projected_lora"]

_OP = "projected_lora"

_triton.register(_OP, _triton.accepts, "primitives")


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    basis: torch.Tensor | None,
    bias: torch.Tensor | None,
    frozen_A: torch.Tensor | None,
    frozen_B: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
    output_sizes: Sequence[int] | None,
) -> None:
    require_float(_OP, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B)
    if weight.dim() != 2:
        raise ValueError(f"{_OP}: weight must be (d_out, d_in), got shape {shape(weight)}")
    d_out, d_in = weight.shape
    if x.shape[-1:] != (d_in,):
        raise ValueError(f"{_OP}: x must be (..., d_in) with d_in = {d_in} (weight is {shape(weight)}), got {shape(x)}")
    if bias is not None:
        require_dense(_OP, bias=bias)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"{_OP}: x, weight and bias must share one dtype (x is never cast), got x {x.dtype}, weight "
            f"{weight.dtype}" + (f", bias {bias.dtype}" if bias is not None else "")
        )
    if bias is not None and bias.shape != (d_out,):
        raise ValueError(f"{_OP}: bias must be (d_out,) = ({d_out},), got shape {shape(bias)}")
    parts = 1 if output_sizes is None else len(output_sizes)
    if output_sizes is not None and (parts < 1 or min(output_sizes) < 1 or sum(output_sizes) != d_out):
        raise ValueError(
            f"{_OP}: output_sizes must be positive and add up to d_out = {d_out}, got {list(output_sizes)}"
        )
    _check_pair("lora", lora_A, lora_B, d_in, d_out, parts)
    if basis is not None:
        require_basis(_OP, basis, d_in, "x")
    if (frozen_A is None) != (frozen_B is None):
        raise ValueError(f"{_OP}: frozen_A and frozen_B must be given together, or neither")
    if frozen_A is not None and frozen_B is not None:
        require_float(_OP, frozen_A=frozen_A, frozen_B=frozen_B)
        _check_pair("frozen", frozen_A, frozen_B, d_in, d_out, parts)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{_OP}: dropout must be in [0, 1), got {dropout}")
    if dropout > 0.0 and (seed is None or seed.dtype != torch.int64 or seed.dim() != 0):
        got = "None" if seed is None else f"{seed.dtype} of shape {shape(seed)}"
        raise ValueError(f"{_OP}: dropout > 0 needs seed, a 0-dimensional int64 tensor, got {got}")
    if seed is not None:
        require_dense(_OP, seed=seed)
        if seed.device.type != "cpu" and seed.device != x.device:
            raise ValueError(f"{_OP}: seed must be on the CPU or on {x.device}, where x is, got one on {seed.device}")
    require_same_device(
        _OP, "x", x, weight=weight, lora_A=lora_A, lora_B=lora_B, basis=basis, bias=bias,
        frozen_A=frozen_A, frozen_B=frozen_B,
    )  # fmt: skip


def _check_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    A_P: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    basis: torch.Tensor | None,
    complement: bool,
    scale: float,
    frozen_A: torch.Tensor | None,
    frozen_B: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
    sizes: Sequence[int] | None,
    needs: list[bool],
    backend: str | None,
) -> None:
    _check(x, weight, lora_A, lora_B, basis, None, frozen_A, frozen_B, dropout, seed, sizes)
    tokens, rows = x.shape[:-1], lora_A.shape[0]
    expected = (("dy", dy, (*tokens, weight.shape[0])), ("h", h, (*tokens, rows)), ("A_P", A_P, tuple(lora_A.shape)))
    for name, t, size in expected:
        if t is None or t.layout != torch.strided:
            require_dense(_OP, **{name: t})
        if t.shape != size or t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"{_OP}: {name} must be {x.dtype} of shape {size} on {x.device} (x is {shape(x)}, weight "
                f"{shape(weight)}, lora_A {shape(lora_A)}), got {t.dtype} of shape {shape(t)} on {t.device}"
            )
    if len(needs) != 3:
        raise ValueError(f"{_OP}: needs must tell of x, lora_A and lora_B, three values, got {len(needs)}")


def check_layer(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    basis: torch.Tensor | None,
    output_sizes: Sequence[int] | None = None,
) -> None:
    """TypeError or ValueError unless the op would take these with some x: for modules that hold them."""
    tensors = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    for name, t in (("bias", bias), ("basis", basis)):
        if t is not None:
            tensors[name] = t
    for name, t in tensors.items():
        instance(name, t, torch.Tensor, "a tensor")
    require_float(_OP, **tensors)
    require_same_device(_OP, "weight", tensors.pop("weight"), **tensors)
    if weight.dim() != 2:
        raise ValueError(f"{_OP}: weight must be (d_out, d_in), got shape {shape(weight)}")
    _check(weight[:0], weight, lora_A, lora_B, basis, bias, None, None, 0.0, None, output_sizes)


def _check_pair(kind: str, A: torch.Tensor, B: torch.Tensor, d_in: int, d_out: int, parts: int) -> None:
    if A.shape[1:] != (d_in,) or A.shape[0] < 1 or A.shape[0] % parts:
        times = "" if parts == 1 else f"{parts} · "
        raise ValueError(
            f"{_OP}: {kind}_A must be ({times}r, d_in) with r >= 1 and d_in = {d_in}, got shape {shape(A)}"
        )
    r = A.shape[0] // parts
    if B.shape != (d_out, r):
        raise ValueError(
            f"{_OP}: {kind}_B must be (d_out, r) = ({d_out}, {r}) ({kind}_A is {shape(A)}), got {shape(B)}"
        )


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    basis: torch.Tensor | None,
    complement: bool,
    scale: float,
    bias: torch.Tensor | None,
    frozen_A: torch.Tensor | None,
    frozen_B: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
    output_sizes: Sequence[int] | None,
    projected: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, weight, lora_A, lora_B, basis, bias, frozen_A, frozen_B, dropout, seed, output_sizes)
    primitives = dispatch.resolve(_OP, "primitives", x, weight, lora_A, lora_B, basis)()
    layer = Layer(
        weight, bias, basis, complement, scale, frozen_A, frozen_B, _dropout(dropout, seed), output_sizes, projected
    )
    factors = Factors(lora_A, lora_B, layer, x.dtype)
    whole = primitives.layer_forward
    found = None if whole is None else whole(x, lora_A, lora_B, factors, layer)
    if found is None:
        algebra.form(primitives, factors, lora_A, lora_B, layer)
        found = algebra.forward(primitives, rows(x), factors, layer)
    y, h = found
    tokens, r = x.shape[:-1], factors.rank
    y = y.view(*tokens, y.shape[-1])
    if len(factors.down) > r:
        return y, h[:, :r].contiguous().view(*tokens, r), factors.A_P.clone()
    return y, h.view(*tokens, r), factors.down


def _dropout(p: float, seed: torch.Tensor | None) -> Dropout | None:
    return None if p == 0.0 or seed is None else Dropout(p, seed)


def _forward_fake(
    x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lora_B, basis, _complement, _scale, bias, frozen_A, frozen_B, dropout, seed, output_sizes = rest[:10]
    _check(x, weight, lora_A, lora_B, basis, bias, frozen_A, frozen_B, dropout, seed, output_sizes)
    tokens = x.shape[:-1]
    return (
        x.new_empty((*tokens, weight.shape[0])),
        x.new_empty((*tokens, lora_A.shape[0])),
        x.new_empty(lora_A.shape),
    )


def _backward(
    dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A_P: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_backward(dy, x, h, A_P, *rest)
    weight, A, B, basis, complement, scale, frozen_A, frozen_B, dropout, seed, sizes, needs, backend = rest
    primitives = dispatch.resolve(_OP, "primitives", x, weight, A, B, basis, backend=backend)()
    layer = Layer(weight, None, basis, complement, scale, frozen_A, frozen_B, _dropout(dropout, seed), sizes)
    factors = Factors(A, B, layer, x.dtype)
    algebra.form(primitives, factors, A_P, B, layer._replace(basis=None))
    whole = primitives.layer_backward
    found = None if whole is None else whole(dy, x, rows(h), factors, A, B, layer, needs)
    if found is None:
        found = algebra.backward(primitives, rows(dy), rows(x), rows(h), factors, A, B, layer, needs)
    dx, dA, dB = (dy.new_empty(0) if grad is None else grad.contiguous() for grad in found)
    return dx.view(x.shape) if needs[0] else dx, dA, dB


def _backward_fake(
    dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A_P: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_backward(dy, x, h, A_P, *rest)
    dx, dA, dB = (
        t.new_empty(t.shape) if needed else dy.new_empty(0) for t, needed in zip((x, *rest[1:3]), rest[-2], strict=True)
    )
    return dx, dA, dB


_TAIL = "Tensor? frozen_A, Tensor? frozen_B, float dropout, Tensor? seed, int[]? output_sizes"
define(
    "projected_lora_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? basis, bool complement, "
    f"float scale, Tensor? bias, {_TAIL}, bool projected=False) -> (Tensor y, Tensor h, Tensor A_P)",
    _forward,
    _forward_fake,
)
define(
    "projected_lora_backward(Tensor dy, Tensor x, Tensor h, Tensor A_P, Tensor weight, Tensor lora_A, Tensor lora_B, "
    f"Tensor? basis, bool complement, float scale, {_TAIL}, bool[] needs, str? backend) "
    "-> (Tensor dx, Tensor dA, Tensor dB)",
    _backward,
    _backward_fake,
)
_forward_op = torch.ops.guardspace.projected_lora_forward.default
_backward_op = torch.ops.guardspace.projected_lora_backward.default


class _ProjectedLora(torch.autograd.Function):
    """The derivative, registered as the op's own: torch.library.register_autograd takes 60 µs more per call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, h, A_P = _forward_op(*arguments)
        x, weight, lora_A, lora_B, basis, complement, scale, _, frozen_A, frozen_B, dropout, seed, sizes, *_ = arguments
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(h, A_P)
        ctx.save_for_backward(x, h, A_P, weight, lora_A, lora_B, basis, frozen_A, frozen_B, seed)
        ctx.complement, ctx.scale, ctx.dropout, ctx.output_sizes = complement, scale, dropout, sizes
        # Each backend draws masks of its own. While a graph is traced no backend has run yet.
        ctx.backend = (dispatch.requested_backend() or "auto") if dropout and type(y) is torch.Tensor else None
        return y, h, A_P

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        nothing = (None,) * 14
        if dy is None:
            return nothing
        x, h, A_P, weight, lora_A, lora_B, basis, frozen_A, frozen_B, seed = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
        dx, dA, dB = _autograd_of_backward(
            dy, x, h, A_P, weight, lora_A, lora_B, basis, ctx.complement, ctx.scale, frozen_A, frozen_B,
            ctx.dropout, seed, ctx.output_sizes, needs, ctx.backend,
        )  # fmt: skip
        return (dx if needs[0] else None, None, dA if needs[1] else None, dB if needs[2] else None, *nothing[4:])

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{_OP} has no forward-mode derivative; take reverse mode (backward, torch.autograd.grad)")


def _autograd(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, _weight, lora_A, lora_B = arguments[:4]
    if differentiated(x, lora_A, lora_B):
        return _ProjectedLora.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*arguments)


def _autograd_of_backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            return _backward_op(*arguments)
    return _Backward.apply(*arguments)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return _backward_op(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{_OP} cannot be differentiated twice (create_graph=True is not supported)")


LIBRARY.impl("projected_lora_forward", _autograd, "Autograd")
LIBRARY.impl("projected_lora_backward", _autograd_of_backward, "Autograd")


def _composite(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    basis: torch.Tensor | None = None,
    complement: bool = True,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    frozen_A: torch.Tensor | None = None,
    frozen_B: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    output_sizes: Sequence[int] | None = None,
    projected: bool = False,
) -> torch.Tensor:
    y, _h, _A_P = _forward_op(
        x, weight, lora_A, lora_B, basis, complement, scale, bias, frozen_A, frozen_B, dropout, seed, output_sizes,
        projected,
    )  # fmt: skip
    return y


LIBRARY.define(
    "projected_lora(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? basis=None, bool complement=True, "
    "float scale=1.0, Tensor? bias=None, Tensor? frozen_A=None, Tensor? frozen_B=None, float dropout=0.0, "
    "Tensor? seed=None, int[]? output_sizes=None, bool projected=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("projected_lora", _composite, "CompositeImplicitAutograd")
_op = torch.ops.guardspace.projected_lora.default


def _register_autocast(device_type: str, key: str) -> None:
    """Autocast casts what a linear layer would cast: x, weight and bias. The fold A P stays in float32."""

    def kernel(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        arguments = list(rest)
        if x is not None and weight is not None and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias_index = 5
            if len(arguments) > bias_index and arguments[bias_index] is not None:
                arguments[bias_index] = arguments[bias_index].to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return _op(x, weight, *arguments)

    LIBRARY.impl("projected_lora", kernel, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


def projected_lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    basis: torch.Tensor | None = None,
    complement: bool = True,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    frozen_A: torch.Tensor | None = None,
    frozen_B: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    output_sizes: Sequence[int] | None = None,
    projected: bool = False,
) -> torch.Tensor:
    """A frozen linear layer plus a LoRA adapter that cannot act outside the null space.

    ``y = x Wᵀ + b + s·drop(x) (A P)ᵀ Bᵀ − s·x (A₀P)ᵀ B₀ᵀ``, with ``P = I − Q Qᵀ`` (``complement=True``, basis = Q,
    the protected directions) or ``P = N Nᵀ`` (``complement=False``, basis = N); without a basis P = I and this is
    plain LoRA. ``A P`` is formed in at least float32 in every call, 4·r·d_in·k FLOPs, and rounded once to x's dtype.

    Gradients flow to x, lora_A and lora_B; weight, bias, basis and the frozen pair get none. For backward the op keeps
    x, an (..., r) activation and the (r, d_in) matrix A P. The result cannot be differentiated twice.

    Args:
        x: (..., d_in), any strides, may be empty; never cast (under autocast it is, as for any linear layer).
        weight: (d_out, d_in) in the dtype of x; any strides, so a transposed Conv1D weight is passed as a view.
        lora_A, lora_B: (r, d_in) and (d_out, r), any float dtype (float32 beside a bfloat16 x is the usual case).
        basis: (d_in, k) with orthonormal columns, any float dtype.
        complement: whether ``basis`` spans the protected directions (True) or the null space (False).
        scale: PEFT's scaling s.
        bias: (d_out,) in the dtype of x.
        frozen_A, frozen_B: A₀P (r₀, d_in) and B₀ (d_out, r₀): the virtual residual, W_res = W − s·B₀A₀P without a
            write to W. Dropout does not apply to it.
        dropout: probability in [0, 1) of zeroing an entry of the adapter's input.
        seed: int or 0-dimensional int64 tensor that determines the dropout mask; drawn from torch's default CPU
            generator if absent. A tensor keeps ``torch.compile`` from specialising on its value.
        output_sizes: for layers that read one input (q, k and v, say) as one: the d_out of each. Their weights, biases,
            lora_A and lora_B are then stacked by rows, (Σ d_out, d_in), (parts · r, d_in) and (Σ d_out, r), and so is
            y by columns; each part has the rank r and an adapter of its own.
        projected: lora_A is known to satisfy A = A P, which an optimiser keeps: A P is not formed, and only the
            gradient of A is projected.

    Returns:
        y (..., d_out) in the dtype of x.

    Raises:
        TypeError: dtypes of x, weight and bias differ or are not floating. ValueError: a shape, device or dropout
            that does not fit. RuntimeError: second or forward-mode derivatives are asked for.

    Source: GuardSpace (arXiv 2510.14301), with the projector folded into A: (x P) Aᵀ = x (A P)ᵀ.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{_OP}: x must be a tensor, got {type(x).__name__}")
    for name, flag in (("complement", complement), ("projected", projected)):
        if flag is not True and flag is not False:
            raise TypeError(f"{_OP}: {name} must be True or False, got {shown(flag)}")
    if dropout and seed is None:
        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
    elif isinstance(seed, int):
        seed = torch.tensor(seed, dtype=torch.int64, device="cpu")
    # The composite op only serves autocast and torch.ops: without them its call is skipped.
    compiled = torch.compiler.is_compiling()
    run = _op if compiled or torch.is_autocast_enabled(x.device.type) else _composite
    return run(
        x, weight, lora_A, lora_B, basis, complement, scale, bias, frozen_A, frozen_B, dropout, seed, output_sizes,
        projected,
    )  # fmt: skip
