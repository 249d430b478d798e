"""Launches of Triton kernels: a row of the table for each, and pointers of many tensors in one launch."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl

from guardspace_kernels.ops._triton import target
from guardspace_kernels.ops._triton_table import GROUP, KERNELS, Row, rows_for

_TABLES: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()
_MOST_TABLES = 256
_CAPTURED: list[torch.Tensor] = []  # graphs read these as long as they live
# Pinned memory cannot be had while a graph is captured: this much is set aside for the tables of captures.
_SPARE: list[torch.Tensor] = []
_SPARES, _WIDEST = 32, max(len(kernel.arguments) for kernel in KERNELS.values())


def launch(function: Any, row: Row, grid: int | tuple[int, ...], arguments: dict[str, Any], **variant: Any) -> Any:
    """Runs a kernel with the row's constants and the call's ``variant``; both must be what the table says.

    Returns Triton's compiled kernel; None by the interpreter, and where there is no program to run.
    """
    kernel = KERNELS[row.kernel]
    if list(arguments) != list(kernel.arguments) or variant not in kernel.variants:
        raise AssertionError(f"{row.kernel}: called with {list(arguments)} and {variant}, unlike the table")
    grid = (grid,) if isinstance(grid, int) else grid
    if not all(grid):
        return None
    with _current(_device(arguments)):  # Triton asks for the current one
        return function[grid](**arguments, **variant, **row.constants, num_warps=row.warps, num_stages=row.stages)


class Again:
    """A launch that was made, once more: the compiled kernel and its arguments as numbers: Triton binds nothing.

    It holds no tensor of the call but the table. Addresses and numbers that changed since must be of the same kind for
    Triton: multiples of 16 as before, as all are that PyTorch allocates.
    """

    def __init__(
        self, kernel: Any, names: Sequence[str], programs: int, arguments: dict[str, Any], table: torch.Tensor | None
    ) -> None:
        self._kernel, self._grid, self._table = kernel, (programs, 1, 1), table
        self._at = {name: i for i, name in enumerate(names)}
        self._values = [_address(arguments[name]) for name in names]

    def __call__(self, **changed: Any) -> None:
        values = self._values.copy()
        for name, value in changed.items():
            values[self._at[name]] = _address(value)
        if self._grid[0]:
            self._kernel[self._grid](*values)


def _address(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def launch_items(
    function: Any, items: Sequence[tuple[Row, int, dict[str, Any]]], shared: dict[str, Any] | None = None
) -> list[Again] | None:
    """Runs a kernel on many items of one device, in one launch for each row, dtypes and alignment among them.

    Args:
        items: (row, number of programs, the item's own arguments in the kernel's order). Of several items the kernel
            finds its own in TABLE, whose columns are those arguments and where the item's programs begin; of a single
            one it gets them as they are, so that Triton sees their alignment and nothing is sent to the device.
        shared: arguments after TABLE and n that are those of all items.

    Returns:
        The launches, to be made again on this stream with the same items; None if one of them cannot.
    """
    groups: dict[Any, list[tuple[Row, int, dict[str, Any]]]] = {}
    for row, programs, item in items:
        dtypes = tuple(value.dtype for value in item.values() if isinstance(value, torch.Tensor))
        hints = [_number(item[name]) for name in KERNELS[row.kernel].aligned if name in item]
        group = (row.key, dtypes, not any(number % 16 for number in hints))
        groups.setdefault(group, []).append((row, programs, item))
    made: list[Again | None] = []
    for (*_, well), members in groups.items():
        for start in range(0, len(members), GROUP):
            made += _launch_group(function, members[start : start + GROUP], shared or {}, well)
    again = [one for one in made if one is not None]
    return again if len(again) == len(made) else None


def _launch_group(
    function: Any, items: list[tuple[Row, int, dict[str, Any]]], shared: dict[str, Any], well: bool
) -> list[Again | None]:
    def run(row: Row, programs: int, item: dict[str, Any], **variant: bool) -> Again | None:
        arguments = {**item, **shared}
        kernel = launch(function, row, programs, arguments, **variant)
        if kernel is None and programs:
            return None
        return Again(kernel, function.arg_names, programs, {**arguments, **variant, **row.constants}, sent)

    row, _, first = items[0]
    sent = None
    if len(items) > 1:
        begins = accumulate((programs for _, programs, _ in items), initial=0)
        numbers = [(*map(_number, item.values()), begin) for (_, _, item), begin in zip(items, begins, strict=False)]
        sent = table(numbers, _device(first))
    if sent is not None:
        total = sum(programs for _, programs, _ in items)
        # Triton compiles anew for sizes of another kind, of the first item too, although they are not read.
        unread = {name: value if isinstance(value, torch.Tensor) else 0 for name, value in first.items()}
        return [run(row, total, {**unread, "TABLE": sent, "n": len(items)}, GROUPED=True, ALIGNED=well)]
    no_table = torch.empty(0, dtype=torch.int64, device=_device(first))
    return [
        run(row, programs, {**item, "TABLE": no_table, "n": 0}, GROUPED=False, ALIGNED=False)
        for row, programs, item in items
    ]


def _number(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else int(value)


def _device(item: dict[str, Any]) -> torch.device:
    return next(value.device for value in item.values() if isinstance(value, torch.Tensor))


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose(
    kernel: str,
    device: torch.device,
    sizes: tuple[int, ...] = (),
    trial: Callable[[Row], object] | None = None,
    among: Sequence[Row] | None = None,
) -> Row:
    """The row for a launch: the first in the table, or ``among`` others, whose ``least`` sizes are reached.

    With ``GUARDSPACE_AUTOTUNE=1`` the quickest by ``trial``, which runs the kernel into scratch memory; the choice is
    kept in ``$XDG_CACHE_HOME/guardspace_kernels`` for sizes of the same powers of two. Nothing is tried while a CUDA
    graph is captured.
    """
    chip = target(device)
    assert chip is not None
    rows = among or rows_for(kernel, chip)
    if trial is not None and len(rows) > 1 and device.type == "cuda" and os.environ.get("GUARDSPACE_AUTOTUNE") == "1":
        known = _choices(torch.cuda.get_device_name(device))
        name = f"{kernel} {[max(size, 1).bit_length() for size in sizes]}"
        by_key = {row.key: row for row in rows}
        if known.get(name) in by_key:
            return by_key[known[name]]
        with _current(device):
            if not torch.cuda.is_current_stream_capturing():
                best = min(rows, key=lambda row: _seconds(lambda: trial(row)))
                known[name] = best.key
                _write_choices(torch.cuda.get_device_name(device), known)
                return best
    return next(row for row in rows if all(size >= least for size, least in zip(sizes, row.least, strict=False)))


def _seconds(run: Callable[[], object]) -> float:
    with suppress(triton.OutOfResources):
        run()
        times = []
        for _ in range(5):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return median(times)
    return float("inf")


def _choices_file(device_name: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "guardspace_kernels" / f"{device_name.replace(' ', '-')}-triton-{triton.__version__}.json"


@functools.cache
def _choices(device_name: str) -> dict[str, str]:
    with suppress(OSError, ValueError, RecursionError):
        read = json.loads(_choices_file(device_name).read_text(encoding="utf-8"))
        if isinstance(read, dict):
            return {name: key for name, key in read.items() if isinstance(key, str)}
    return {}


def _write_choices(device_name: str, choices: dict[str, str]) -> None:
    path = _choices_file(device_name)
    with suppress(OSError):  # a cache that cannot be written is tried again by the next process
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", text=True)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(choices, indent=1, sort_keys=True))
        os.replace(temporary, path)


def table(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor | None:
    """(n, columns) int64 on the device: pointers, sizes and strides of n items that one launch serves.

    The same numbers are sent once: parameters and their gradients stay where they are from step to step. While a CUDA
    graph is captured, new ones are sent from memory that was set aside when the first table was, and stays, since
    every replay sends them again; None if there is none left.
    """
    if device.type != "cuda":
        return _kept(rows, device, lambda host: host)
    with _current(device):
        if torch.cuda.is_current_stream_capturing():
            return _captured(rows, device)
        while len(_SPARE) < _SPARES:
            _SPARE.append(torch.empty(GROUP * _WIDEST, dtype=torch.int64, device="cpu").pin_memory())
        stream = torch.cuda.current_stream(device)
        sent = _kept(rows, device, lambda host: host.pin_memory().to(device, non_blocking=True), stream)
        sent.record_stream(stream)
        return sent


def _kept(
    rows: Sequence[Sequence[int]],
    device: torch.device,
    send: Callable[[torch.Tensor], torch.Tensor],
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    # Another stream, such as another thread's, would not wait for the copy, and read addresses that are not there yet.
    key = (device, stream, *map(tuple, rows))
    found = _TABLES.pop(key, None)
    _TABLES[key] = found = send(torch.tensor(rows, dtype=torch.int64, device="cpu")) if found is None else found
    if len(_TABLES) > _MOST_TABLES:
        _TABLES.popitem(last=False)
    return found


def _captured(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor | None:
    wanted = tuple(map(tuple, rows))
    # Whatever stream it was sent on: the device is synchronised when a capture begins.
    found = next((sent for key, sent in _TABLES.items() if key[0] == device and key[2:] == wanted), None)
    if found is not None:
        _CAPTURED.append(found)
        return found
    if not _SPARE:
        return None
    numbers = torch.tensor(rows, dtype=torch.int64, device="cpu")
    host = _SPARE.pop()[: numbers.numel()].view(numbers.shape).copy_(numbers)
    _CAPTURED.append(host)
    return torch.empty(host.shape, dtype=torch.int64, device=device).copy_(host, non_blocking=True)


def blocks(n: int, size: int) -> int:
    """``triton.cdiv``, which takes microseconds outside of a kernel."""
    return -(-n // size)


_MOST = tl.constexpr(GROUP)


@triton.jit
def locate(TABLE, n, pid, COLUMNS: tl.constexpr):
    """Where in the table the item of program ``pid`` stands: the last column says where each one's programs begin."""
    i = tl.arange(0, _MOST)
    starts = tl.load(TABLE + i * COLUMNS + (COLUMNS - 1), mask=i < n, other=9223372036854775807)
    return TABLE + (tl.sum((starts <= pid).to(tl.int32)) - 1) * COLUMNS
