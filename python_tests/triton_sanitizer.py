"""A sanitizer over Triton's interpreter: lanes outside of the launch's tensors, and programs that race.

Every lane that a mask lets through must lie on an element of a tensor that the launch was given, as an argument or in
its table of items; elements between the rows of a view are not its own. Programs run one after the other here and side
by side on a GPU, so none may read or write what another one writes, be it the same value, and atomics are no excuse:
their order would decide the last bits. A program may read an address and then write it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import triton_interpreter  # noqa: F401  # before Triton
from triton.runtime import interpreter

from guardspace_kernels.ops import _triton_launch

_MANY = -1


class Fault(AssertionError):
    pass


class _View:
    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.element = name, tensor.element_size()
        self.begin = tensor.data_ptr()
        self.steps: list[tuple[int, int]] = []  # (bytes, count), widest first
        by_stride = sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True)
        for stride, size in ((stride * self.element, size) for stride, size in by_stride if stride and size > 1):
            if self.steps and self.steps[-1][0] == stride * size:
                size *= self.steps.pop()[1]
            self.steps.append((stride, size))
        self.end = self.begin + sum(step * (count - 1) for step, count in self.steps) + self.element

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        rest = addresses - self.begin
        inside = (rest >= 0) & (addresses < self.end)
        for step, count in self.steps:
            index, rest = np.divmod(rest, step)
            inside &= index < count
        return inside & (rest == 0)


class _Launch:
    """The elements that one launch may touch, and the programs that did."""

    def __init__(self, kernel: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.kernel = kernel
        self.views = sorted((_View(name, t) for name, t in tensors if t.numel()), key=lambda view: view.begin)
        regions: list[list[int]] = []
        for view in self.views:
            if regions and view.begin <= regions[-1][1]:
                regions[-1][1] = max(regions[-1][1], view.end)
            else:
                regions.append([view.begin, view.end])
        self.begins = np.array([begin for begin, _ in regions], dtype=np.int64)
        self.offsets = np.cumsum([0, *(end - begin for begin, end in regions)])
        self.reader, self.writer, self.lane = (np.zeros(self.offsets[-1], dtype=np.int32) for _ in range(3))

    def touch(self, does: str, program: tuple[int, ...], number: int, pointers: Any, mask: Any) -> None:
        """``program`` loads or stores; ``number`` is its own, from 1 on."""
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64)
        if not addresses.size:
            return
        element = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        low, high = addresses.min(), addresses.max()
        outside = np.ones(addresses.shape, dtype=bool)
        for view in self.views:
            if view.element == element and view.begin <= high and view.end > low and outside.any():
                outside &= ~view.holds(addresses)
        if outside.any():
            raise Fault(f"{self.kernel}: program {program} {does} {self._where(addresses[outside])}")
        region = np.searchsorted(self.begins, addresses, "right") - 1
        at = self.offsets[region] + (addresses - self.begins[region])
        writer, reader = self.writer[at], self.reader[at]
        if does == "loads":
            if ((writer != 0) & (writer != number)).any():
                raise Fault(f"{self.kernel}: program {program} loads what another program stores in the same launch")
            self.reader[at] = np.where((reader == 0) | (reader == number), number, _MANY)
            return
        if ((writer != 0) & (writer != number)).any():
            raise Fault(f"{self.kernel}: program {program} stores where another program stores in the same launch")
        if ((reader != 0) & (reader != number)).any():
            raise Fault(f"{self.kernel}: program {program} stores what another program loads in the same launch")
        self.lane[at] = lanes = np.arange(at.size)
        if (self.lane[at] != lanes).any():
            raise Fault(f"{self.kernel}: two lanes of one store of program {program} have the same address")
        self.writer[at] = number

    def _where(self, addresses: np.ndarray) -> str:
        if not self.views:
            return "elements, but the launch has no tensors"
        first = int(addresses[0])
        near = min(self.views, key=lambda view: max(view.begin - first, first - view.end + 1, 0))
        where = "between the rows of"
        if first < near.begin:
            where = f"{(near.begin - first) / near.element:g} before"
        elif first >= near.end:
            where = f"{(first - near.end) / near.element + 1:g} past the end of"
        return f"{addresses.size} elements outside of the launch's tensors, the first one {where} {near.name}"


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    matrices = (
        (name, getattr(value, "base", value)) for name, value in arguments.items()
    )  # a descriptor's is its base
    return ((name, matrix) for name, matrix in matrices if isinstance(matrix, torch.Tensor))


def watch(monkeypatch) -> None:
    """Every kernel that the interpreter runs from now on, until ``monkeypatch`` is undone."""
    items: list[tuple[str, torch.Tensor]] = []
    launches: list[_Launch] = []
    run, launch_group = interpreter.GridExecutor.__call__, _triton_launch._launch_group

    def watched_group(function, members, *rest):
        items.extend(tensor for _, _, item in members for tensor in _tensors(item))
        try:
            return launch_group(function, members, *rest)
        finally:
            items.clear()

    def watched_run(self, *args, **kwargs):
        arguments = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
        launches.append(_Launch(self.fn.__name__, [*_tensors(arguments), *items]))
        try:
            return run(self, *args, **kwargs)
        finally:
            launches.pop()

    def touching(does, name):
        original = getattr(interpreter.InterpreterBuilder, name)
        position = {"create_atomic_rmw": (1, 3), "create_masked_load": (0, 1), "create_masked_store": (0, 2)}[name]

        def touch(self, *args, **kwargs):
            pointers, mask = (args[i] for i in position)
            if launches:
                width, height, _ = self.grid_dim
                x, y, z = self.grid_idx
                launches[-1].touch(does, self.grid_idx, 1 + x + width * (y + height * z), pointers, mask)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, touch)

    touching("loads", "create_masked_load")
    touching("stores", "create_masked_store")
    touching("stores", "create_atomic_rmw")
    monkeypatch.setattr(_triton_launch, "_launch_group", watched_group)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched_run)
