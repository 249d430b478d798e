"""Projected LoRA of a layer in plain eager mode: one autograd node over the algebra, without the dispatcher's hops.

A layer keeps ``[A P; A₀P]`` and ``[s·B | −s·B₀]`` as standing buffers. A forward takes them and writes A P and s·B. The
graph holds them until it is freed: backward reads what its own forward wrote, whatever became of A and B since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from guardspace_kernels import dispatch
from guardspace_kernels.ops._library import AUTOCAST, plain_eager, rows
from guardspace_kernels.ops.projected_lora import _check, algebra
from guardspace_kernels.ops.projected_lora.algebra import Dropout, Factors, Layer, Primitives

_OP = "projected_lora"
_PLAIN = frozenset((torch.Tensor, nn.Parameter))
_SPARE = 2  # buffers that a layer keeps: checkpointing holds one while it recomputes the forward with another
_NOWHERE = -1
_WORTH_A_COPY = 2**14  # entries of h, from which its frozen half is not kept for backward

_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled


class Standing(Factors):
    """Buffers of one layer, for inputs of one dtype and device."""

    __slots__ = ("backend", "device", "dtype", "frozen", "primitives", "set_scale", "shapes", "stream")

    backend: str | None
    device: torch.device
    dtype: torch.dtype
    frozen: torch.Tensor | None
    stream: int | None
    primitives: Primitives
    set_scale: float
    shapes: tuple[torch.Size, torch.Size]


class Spare(list[Standing]):
    """The buffers of one layer that no graph holds. A copy of the layer starts without."""

    def __reduce__(self) -> tuple[type[Spare], tuple[()]]:
        return (Spare, ())


class _Lease:
    """Gives buffers back when the graph that reads them is freed."""

    __slots__ = ("factors", "spare")

    def __init__(self, factors: Standing, spare: Spare) -> None:
        self.factors, self.spare = factors, spare

    def __del__(self) -> None:
        if len(self.spare) < _SPARE and self.factors.stream != _NOWHERE:
            self.spare.append(self.factors)


def run(
    spare: Spare,
    check: Callable[[], None],
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    layer: Layer,
    dropout: float = 0.0,
) -> torch.Tensor | None:
    """``projected_lora`` with gradients to x, A and B, equal to it bit for bit; None where the op must be called.

    ``check`` is called beside the op's own checks whenever buffers are made: for the first input, and for one of
    another dtype or device. ``dropout`` is a probability, whose seed is drawn here; ``layer`` has none.
    """
    if not plain_eager() or x.layout is not torch.strided:
        return None
    for t in (x, A, B, layer.weight, layer.bias, layer.basis):
        if t is not None and type(t) not in _PLAIN:  # a subclass has a say in what is called on it
            return None
    if _any_autocast() and torch.is_autocast_enabled(kind := x.device.type):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            if x.dtype is not torch.float64:
                dtype = torch.get_autocast_dtype(kind)
                bias = None if layer.bias is None else layer.bias.to(dtype)
                x, layer = x.to(dtype), layer._replace(weight=layer.weight.to(dtype), bias=bias)
            return _run(spare, check, x, A, B, layer, dropout)
    return _run(spare, check, x, A, B, layer, dropout)


def _run(
    spare: Spare,
    check: Callable[[], None],
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    layer: Layer,
    dropout: float,
) -> torch.Tensor:
    try:
        factors = spare.pop()
    except IndexError:
        factors = None
    dtype = x.dtype
    if (
        factors is None
        or factors.dtype is not dtype
        or layer.weight.dtype is not dtype
        or factors.frozen is not layer.frozen_A
        or factors.backend != dispatch.requested_backend()
        or factors.set_scale != layer.scale
        or factors.shapes != (A.shape, B.shape)
        or factors.device != x.device
        or (factors.stream is not None and factors.stream != _stream(x))
    ):
        check()
        factors = _standing(x, A, B, layer)
    try:
        if _grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
            return _apply(x, A, B, (factors, layer, spare, dropout))
        y = _forward(None, x, A, B, (factors, layer, spare, dropout))
    except (IndexError, RuntimeError, TypeError, ValueError):
        _checked(x, A, B, layer)  # says what does not fit: what was checked at first may have changed since
        raise
    _Lease(factors, spare)
    return y


def _stream(x: torch.Tensor) -> int | None:
    """The stream on which buffers for x serve again; ``_NOWHERE`` in a CUDA graph, whose replays write to them."""
    if x.device.type != "cuda":
        return None
    if torch.cuda.is_current_stream_capturing():
        return _NOWHERE
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def _checked(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, layer: Layer) -> None:
    _check(
        x, layer.weight, A, B, layer.basis, layer.bias, layer.frozen_A, layer.frozen_B, 0.0, None, layer.output_sizes
    )


def _standing(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, layer: Layer) -> Standing:
    _checked(x, A, B, layer)
    with torch.inference_mode(False), torch.no_grad():  # a later forward outside of inference mode writes to them
        factors = Standing(A, B, layer, x.dtype)
    factors.dtype, factors.device, factors.stream = x.dtype, x.device, _stream(x)
    factors.frozen, factors.set_scale, factors.shapes = layer.frozen_A, layer.scale, (A.shape, B.shape)
    factors.backend = dispatch.requested_backend()
    factors.primitives = dispatch.resolve(_OP, "primitives", x, layer.weight, A, B, layer.basis)()
    return factors


def _forward(ctx: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, call: Any) -> torch.Tensor:
    factors, layer, spare, dropout = call
    if dropout:
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{_OP}: dropout must be in [0, 1), got {dropout}")
        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
        layer = layer._replace(dropout=Dropout(dropout, seed))
    primitives = factors.primitives
    found = None if primitives.layer_forward is None else primitives.layer_forward(x, A, B, factors, layer)
    flat = found is not None or x.dim() == 2
    if found is not None:
        tokens, (y, h) = x, found
    else:
        algebra.form(primitives, factors, A, B, layer)
        tokens = x if flat else x.flatten(0, -2) if x.dim() > 2 else rows(x)
        y, h = algebra.forward(primitives, tokens, factors, layer)
    if ctx is not None:
        if h.size(1) > factors.rank and h.numel() > _WORTH_A_COPY:
            h = h[:, : factors.rank].contiguous()
        ctx.save_for_backward(tokens, h, layer.weight, layer.basis)
        ctx.lease, ctx.layer, ctx.A, ctx.B = _Lease(factors, spare), layer, A, B
        ctx.shape = None if flat else x.shape
    if not flat:
        y.resize_(*x.shape[:-1], y.size(1))  # autograd would refuse to change a view of what is made here in place
    return y


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, h, _, _ = ctx.saved_tensors  # W and the basis for autograd's check that nothing wrote to them
    factors, shape = ctx.lease.factors, ctx.shape
    needs = ctx.needs_input_grad[:3]
    whole = factors.primitives.layer_backward
    if whole is not None:
        found = whole(dy, x, h, factors, ctx.A, ctx.B, ctx.layer, needs)
        if found is not None:
            dx, dA, dB = found
            return (dx if shape is None or dx is None else dx.view(shape)), dA, dB
    if x.dim() != 2:
        shape, x = x.shape, rows(x)
    if shape is not None:
        dy = rows(dy)
    try:
        dx, dA, dB = algebra.backward(factors.primitives, dy, x, h, factors, ctx.A, ctx.B, ctx.layer, needs)
    except (RuntimeError, TypeError):  # dy may be a batch of gradients, which has no memory of its own
        dx, dA, dB = _by_the_op(dy, x, h, factors, ctx, needs)
    return (dx if shape is None or dx is None else dx.view(shape)), dA, dB


def _by_the_op(
    dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, factors: Standing, ctx: Any, needs: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients by the registered op, which takes a batch of them apart. B is read anew."""
    layer, rank = ctx.layer, factors.rank
    p, seed = layer.dropout or (0.0, None)
    found = torch.ops.guardspace.projected_lora_backward(
        dy, x, h[:, :rank], factors.A_P, layer.weight, ctx.A, ctx.B, layer.basis, layer.complement, layer.scale,
        layer.frozen_A, layer.frozen_B, p, seed, layer.output_sizes, list(needs), factors.backend or "auto",
    )  # fmt: skip
    return [grad if needed else None for grad, needed in zip(found, needs, strict=True)]


class _Node(torch.autograd.Function):
    forward = staticmethod(_forward)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if _grad_enabled():
            return (*_Gradients.apply(ctx, dy, ctx.saved_tensors[0], ctx.A, ctx.B), None)
        if _any_autocast():
            with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
                return (*_backward(ctx, dy), None)
        return (*_backward(ctx, dy), None)


# Function.apply in Python looks for transforms of functorch, which are excluded here, in every argument.
_apply: Any = super(torch.autograd.Function, _Node).apply


class _Gradients(torch.autograd.Function):
    """The gradients where a graph of backward is asked for: they are constants of it."""

    @staticmethod
    def forward(ctx: Any, of: Any, dy: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return _backward(of, dy)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{_OP} cannot be differentiated twice (create_graph=True is not supported)")
