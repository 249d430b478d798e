"""How many kernels a GPU would launch for some work, counted on the CPU.

PyTorch's profiler tells which ATen operations ran, without being seen by them: an eager layer takes the path that it
takes on a GPU. Ours are counted where they are launched: Triton's are not run at all, the CUDA ones run on the CPU
(``cuda_shim.h`` counts). A copy between dtypes or layouts, a fill and a reduction are a launch each, a product too.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cuda_on_cpu
import pytest
from backends import use_cuda, use_triton
from torch.profiler import ProfilerActivity, profile

from guardspace_kernels.integrations import optim
from guardspace_kernels.ops import _triton

#: Of these what they call counts.
COMPOSITE = {
    "clone", "contiguous", "empty_like", "flatten", "linear", "matmul", "new_zeros", "numpy_T", "ones", "ones_like",
    "reshape", "to", "_to_copy", "type_as", "unflatten", "zeros", "zeros_like",
}  # fmt: skip
#: Views and memory.
NOTHING = {
    "alias", "as_strided", "chunk", "detach", "detach_", "empty", "empty_strided", "expand", "expand_as", "lift_fresh",
    "narrow", "new_empty", "new_empty_strided", "permute", "resize_", "resolve_conj", "resolve_neg", "result_type",
    "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "swapaxes", "t", "transpose", "unbind",
    "unsqueeze", "view", "view_as", "_reshape_alias", "_unsafe_view",
}  # fmt: skip


@contextmanager
def on_a_gpu(backend: str) -> Iterator[Callable[[], int]]:
    """CPU tensors are taken for those of an H100 by the kernels of ``backend``, "triton" or "cuda".

    Gives a function that says how many of ours were launched since it was asked the last time.
    """
    with pytest.MonkeyPatch.context() as patch:
        if backend == "cuda":
            loaded = use_cuda(patch, 0)

            def taken() -> int:
                return cuda_on_cpu.take_counters(loaded)["launches"]
        else:
            use_triton(patch)
            from triton.runtime import interpreter

            launched: list[Any] = []
            patch.setattr(interpreter.GridExecutor, "__call__", lambda self, *args, **kwargs: launched.append(self.fn))

            def taken() -> int:
                count = len(launched)
                launched.clear()
                return count

        for name, module in list(sys.modules.items()):
            if name.startswith("guardspace_kernels.ops") and getattr(module, "target", None) is _triton.target:
                if module is not _triton:
                    patch.setattr(module, "target", lambda device: "sm90")
        adamw = optim.adamw  # what it asks for by where a parameter is exists on the CPU too
        patch.setattr(
            optim, "adamw", lambda *args, **kwargs: adamw(*args, **{**kwargs, "foreach": False, "fused": True})
        )
        yield taken


def counted(work: Callable[[], Any], ours: Callable[[], int] = lambda: 0) -> Counter[str]:
    """Launches of ATen's operations by their names, and "ours"."""
    ours()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        work()
    found = Counter({"ours": ours()})
    for event in profiler.events():
        if event.cpu_parent is None:
            found.update(_launches(event))
    return +found


def _launches(event: Any) -> Iterator[str]:
    name = event.name.removeprefix("aten::")
    if name == event.name or name in COMPOSITE:
        for child in event.cpu_children:
            yield from _launches(child)
    elif name not in NOTHING:
        yield name
        if name == "addmm" and len(event.input_shapes[0]) == 2:
            yield "copy_"  # of the first summand, where the product is then added
