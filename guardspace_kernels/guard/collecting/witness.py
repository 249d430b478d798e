"""What the layers of a model read in a trial, and by how much rounding may change it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from guardspace_kernels.guard.collecting.collector import Collector
from guardspace_kernels.guard.layers import check_output, is_conv1d, linear_weight
from guardspace_kernels.guard.routing import Routing
from guardspace_kernels.guard.sampling import Marks
from guardspace_kernels.guard.tokens import Tokens, misfit

_SKETCH = 16


class Witness(Collector):
    """Keeps a sketch X R, R random (d, 16), of the real tokens that every layer reads; learns the streams at first."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        routing: Routing,
        stream: dict[str, str],
        learns: bool,
        outputs: bool,
    ) -> None:
        super().__init__(layers, layers, torch.float32, False, routing, stream)
        self.learns, self.outputs = learns, outputs
        self.sketches: dict[str, torch.Tensor] = {}
        self.eps = 0.0
        self.rounding: dict[str, float] = {}  # by how much each sketch may differ by rounding, once measured
        self.errors: dict[str, Exception] = {}

    def tokens_read(self, name: str, x: torch.Tensor) -> Tokens | None:
        if not self.learns:
            return super().tokens_read(name, x)
        fitting = [key for key, tokens in self.streams.items() if tokens.fits(x)]
        known = self.stream.get(name)
        if len(fitting) == 1 and known in (None, fitting[0]):
            assert isinstance(self.stream, dict)
            self.stream[name] = fitting[0]
            return self.streams[fitting[0]]
        if x.dim() > 2 or self.routing.look(name, x) is None:
            self.errors.setdefault(name, ValueError(misfit(name, x, self.streams)))
        return None

    def see(self, name: str, x: torch.Tensor, tokens: Tokens | None) -> None:
        if tokens is None:
            return
        rows = tokens.rows(x)
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(rows.shape[1], _SKETCH, generator=generator, dtype=torch.float32).to(rows.device)
        self.eps = max(self.eps, torch.finfo(x.dtype).eps)
        self.sketches.setdefault(name, (rows.float() @ sketch).cpu())

    @contextmanager
    def counting(self, streams: Mapping[str, Tokens], marks: Marks | None = None) -> Iterator[None]:
        with ExitStack() as stack:
            if self.learns and self.outputs:
                for name, module in self.layers.items():
                    if module._forward_hooks or module._forward_pre_hooks:
                        self._compare_output(stack, name, module)
            with super().counting(streams, marks):
                yield

    def _compare_output(self, stack: ExitStack, name: str, module: nn.Module) -> None:
        """With the product of what comes in, before all hooks of others, and what leaves after them."""
        read: list[torch.Tensor] = []
        wanted: list[torch.Tensor] = []

        def begin(_module: nn.Module, args: tuple[Any, ...]) -> None:
            read[:] = [x.detach().clone() for x in args[:1]]

        def multiply(_module: nn.Module, _args: Any) -> None:  # after the hooks that gather a sharded weight
            if read and not linear_weight(module).is_meta:
                bias = module.bias if isinstance(module.bias, torch.Tensor) else None
                wanted[:] = [F.linear(read[0], linear_weight(module), bias)]

        def end(_module: nn.Module, _args: Any, result: Any) -> None:
            try:
                for product in wanted:
                    check_output(name, result, product)
            except TypeError as error:
                self.errors.setdefault(name, error)
            read.clear()
            wanted.clear()

        stack.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
        stack.callback(module.register_forward_pre_hook(multiply).remove)
        stack.callback(module.register_forward_hook(end).remove)

    def check(self) -> None:
        """What was found in the forward; here, since ranks of a sharded model must end a forward together."""
        if not self.errors:
            return
        first, *others = self.errors
        also = f" (so do {len(others)} more: {listed(others)})" if others else ""
        raise type(self.errors[first])(f"{self.errors[first]}{also}")


def listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def rounded_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Within, everything that a linear layer or an embedding makes is multiplied by 1 + eps N(0, 1)."""
    generators: dict[torch.device, torch.Generator] = {}

    def hook(_module: nn.Module, _args: Any, result: Any) -> Any:
        if not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return None
        if result.device not in generators:
            generators[result.device] = torch.Generator(result.device).manual_seed(seed)
        generator = generators[result.device]
        noise = torch.randn(result.shape, generator=generator, dtype=torch.float32, device=result.device)
        return (result * (1 + torch.finfo(result.dtype).eps * noise)).to(result.dtype)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module):
                stack.callback(module.register_forward_hook(hook).remove)
        yield
