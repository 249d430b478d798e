"""A forward pre-hook that accumulates the covariance of a layer's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from guardspace_kernels.arguments import instance, integer, shown
from guardspace_kernels.ops import covariance_update_, symmetrize_


class CovarianceAccumulator(nn.Module):
    """Accumulates ``C = Xᵀ X`` and the number of tokens T over every input that an attached layer reads.

    Use::

        accumulator = CovarianceAccumulator(layer.in_features)
        with accumulator.attached(layer), accumulator.masked(batch["attention_mask"]):
            model(**batch)
        C = accumulator.covariance()

    Args:
        features: d, the last dimension of the inputs.
        dtype: of C, float32 or float64.
        device: of C; inputs must be on the same one.
    """

    lower: torch.Tensor
    tokens: torch.Tensor

    def __init__(
        self, features: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        features = integer("features", features, 0)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {shown(dtype)}")
        self.register_buffer("lower", torch.zeros(features, features, dtype=dtype, device=device))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64, device=device))
        self._mask: torch.Tensor | None = None
        self._handle: RemovableHandle | None = None

    @torch.no_grad()
    def update(self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> None:
        """Adds ``scale · Xᵀ X`` of x (..., d) without rows where mask (...) is zero. Never waits for the device."""
        instance("x", x, torch.Tensor, "a tensor (..., d)")
        covariance_update_(self.lower, x.detach(), mask, scale)
        self.tokens += x.shape[:-1].numel() if mask is None else mask.bool().sum()

    def covariance(self) -> torch.Tensor:
        """A full, symmetric copy of C (d, d). ValueError if it is not finite; here it waits for the device."""
        if not torch.isfinite(self.lower.diagonal()).all():  # |C_ij|² <= C_ii C_jj: no other entry overflows before
            raise ValueError(
                f"the covariance is not finite: an input held NaN or infinity, or its squares overflow "
                f"{self.lower.dtype}; mask such rows, or accumulate in float64"
            )
        C = self.lower.clone()
        symmetrize_(C)
        return C

    def attach(self, module: nn.Module) -> None:
        """Counts every input of ``module`` from now on. RuntimeError if attached already."""
        instance("module", module, nn.Module, "a torch.nn.Module")
        if self._handle is not None:
            raise RuntimeError("this CovarianceAccumulator is attached already; detach() it first")
        self._handle = module.register_forward_pre_hook(self._hook, with_kwargs=True)

    def detach(self) -> None:
        """Removes the hook; nothing happens if there is none."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def attached(self, module: nn.Module) -> Iterator[CovarianceAccumulator]:
        """Attached within the context, detached whatever happens."""
        self.attach(module)
        try:
            yield self
        finally:
            self.detach()

    @contextmanager
    def masked(self, mask: torch.Tensor | None) -> Iterator[None]:
        """Within the context only rows where ``mask`` is non-zero count."""
        previous, self._mask = self._mask, mask
        try:
            yield
        finally:
            self._mask = previous

    def _hook(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = next(iter((*inputs, *named.values())), None)
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"the first input of {type(module).__name__} must be a tensor, got {type(x).__name__}")
        self.update(x, self._mask)

    def extra_repr(self) -> str:
        return f"features={self.lower.shape[0]}, dtype={self.lower.dtype}, attached={self._handle is not None}"
