"""Which rows of the table are quickest on this GPU, as lines for ``ops/_triton_table.py``, and where the library wins.

* Base products with a rank-r update: PyTorch's product and ``addmm_``, the kernel of tiles, and the persistent kernel
  that reads through TMA, whose rows vary. ``library_from`` is to be the least K from which the library is quickest.
* Layers with the best of them.
* Projections of 64 rows: one kernel's row varies, the others stay.

Each is compared with the library's result first: a row that is wrong has an error and no time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import guardspace_kernels as gk
from guardspace_kernels.ops import _prepared, _triton, _triton_table, null_project_
from guardspace_kernels.ops._triton_launch import target
from guardspace_kernels.ops._triton_table import Row as Launch
from guardspace_kernels.ops.projected_lora import gpu, triton_kernels, triton_tma

from .gpu_kernels import TINY, Sizes, call_and_device, ours

if TYPE_CHECKING:
    from .gpu_run import Record, Row

#: T, K, N of base products, in order of importance: layers of Llama-3.2-1B and Llama-2-7B, then more of K.
PRODUCTS = (
    (2048, 2048, 2048), (16384, 4096, 4096), (512, 2048, 2048), (2048, 2048, 8192), (2048, 8192, 2048),
    (16384, 4096, 11008), (8192, 512, 4096), (8192, 1024, 4096), (8192, 256, 4096),
)  # fmt: skip
RANK = 32  # the virtual residual's of rank 16
#: r, d, k and how many.
PROJECTION = (64, 4096, 1024, 28)
_ERRORS = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}


def as_line(row: Launch) -> str:
    """As the table would say it."""
    least = f", least={row.least}" if row.least else ""
    return f'Row("{row.kernel}", {row.targets}, {row.constants}, warps={row.warps}, stages={row.stages}{least})'


def tma_rows(chip: str) -> Iterator[Launch]:
    """Those of the table, then their neighbours."""
    table = _triton_table.rows_for("projected_lora.linear_tma", chip)
    if not table:
        return
    yield from table
    for block_t, block_n, block_k, warps, stages in (
        (128, 128, 64, 4, 4), (128, 128, 64, 8, 5), (128, 128, 128, 8, 3), (256, 128, 64, 8, 3), (64, 256, 64, 4, 4),
        (64, 128, 64, 4, 4), (64, 128, 128, 4, 3),
    ):  # fmt: skip
        sizes = {"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_K": block_k}
        row = replace(table[0], constants={**table[0].constants, **sizes}, warps=warps, stages=stages)
        if row not in table:
            yield row


def projection_rows(kernel: str, chip: str) -> Iterator[Launch]:
    """Tiles for many rows: the table's, then others that fit an H100's registers in both kernels."""
    first = _triton_table.rows_for(kernel, chip)[0]
    yield first
    for block_r, block_k, block_d in ((64, 64, 64), (64, 32, 64), (32, 64, 64), (16, 64, 64), (64, 64, 32)):
        for warps in (4, 8):
            sizes = {"BLOCK_R": block_r, "BLOCK_K": block_k, "BLOCK_D": block_d}
            yield replace(first, constants={**first.constants, **sizes}, warps=warps, stages=3)


@contextmanager
def first_choice(row: Launch) -> Iterator[None]:
    """The row goes before all others of its kernel, also where an earlier call would be made again."""
    before = _triton_table.ROWS[:]
    _triton_table.ROWS.insert(0, replace(row, least=()))
    _prepared._PLANS.clear()
    try:
        yield
    finally:
        _triton_table.ROWS[:] = before
        _prepared._PLANS.clear()


def checked(work: Callable[[], torch.Tensor], wanted: torch.Tensor) -> Row:
    """Milliseconds on the device; RuntimeError for a result that is not that of the library."""
    found = work()
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    if not error <= _ERRORS[found.dtype]:
        raise RuntimeError(f"the result is wrong, relative error {error:.1e}")
    call, device = call_and_device(work)
    return {"ms": call if device is None else device, "error": error}


def products(
    record: Record, sizes: Sizes, shapes: tuple[tuple[int, int, int], ...], chip: str, rows: list[Launch]
) -> None:
    dtype = torch.bfloat16 if sizes.device == "cuda" else torch.float16  # the interpreter computes on bfloat16's bits
    for (T, K, N), backward in itertools.product(shapes, (False, True)):
        x, W, h, up = (sizes.randn(*shape, dtype=dtype) for shape in ((T, K), (K, N), (T, RANK), (RANK, N)))
        W, h = W / K**0.5, h / RANK**0.5
        if not backward:  # y = x Wᵀ + h upᵀ of stored W and up, where dx = dy W + dh down
            W, up = W.T.contiguous().T, up.T.contiguous().T
        head = {"what": "product", "T": T, "K": K, "N": N, "backward": backward}
        wanted = x @ W + h @ up

        def library(x: Any = x, W: Any = W, h: Any = h, up: Any = up) -> torch.Tensor:
            return (x @ W).addmm_(h, up)

        record.attempt({**head, "by": "library"}, partial(checked, library, wanted))
        drops = gpu.dropout_of(0.0, None, x.device)
        for row in _triton_table.rows_for("projected_lora.linear", chip):
            y = torch.empty_like(wanted)
            tiles = partial(triton_kernels._tiles, row, x, W.T, None, h, up.contiguous(), y, 0, drops)
            record.attempt({**head, "by": "tiles", "row": as_line(row)}, partial(checked, tiles, wanted))
        for row in rows:
            work = partial(triton_tma.linear, row, x, W, None, h, up)
            record.attempt({**head, "by": "tma", "row": as_line(row)}, partial(checked, work, wanted))
        if sizes.device == "cuda":
            torch.cuda.empty_cache()


def quickest(rows: list[Row], among: list[Launch], count: int = 3) -> list[Launch]:
    """Those whose times as shares of the quickest of each product have the least sum, of those timed most often."""
    times: dict[str, list[float]] = {}
    for members in _groups(rows).values():
        least = min(row["ms"] for row in members)
        for row in members:
            times.setdefault(row.get("row", ""), []).append(row["ms"] / least)
    timed = [row for row in among if as_line(row) in times]
    return sorted(timed, key=lambda row: (-len(times[as_line(row)]), sum(times[as_line(row)])))[:count]


@contextmanager
def base_product(row: Launch) -> Iterator[list[int]]:
    """Layers take the TMA form where it accepts; gives a list whose length is how often."""
    passes, taken = triton_kernels._PASSES, list[int]()
    before = passes.linear

    def linear(x, weight, bias, h, up, dropped=0, dropout=None):  # type: ignore[no-untyped-def]
        if dropped or not triton_tma.accepts(row, x, weight.T, h, up)[0]:
            return before(x, weight, bias, h, up, dropped, dropout)
        taken.append(1)
        return triton_tma.linear(row, x, weight.T, bias, h, up)

    passes.linear = linear
    try:
        yield taken
    finally:
        passes.linear = before


def whole_layers(record: Record, sizes: Sizes, rows: list[Launch]) -> None:
    """Forward and backward of a guarded layer, with the library's base product and with the best of the TMA forms."""
    dtype = torch.bfloat16 if sizes.device == "cuda" else torch.float16
    for d, r in sizes.layers:
        x, W, dy = (sizes.randn(*shape, dtype=dtype) for shape in ((sizes.tokens, d), (d, d), (sizes.tokens, d)))
        A, B = sizes.randn(r, d).requires_grad_(), sizes.randn(d, r).requires_grad_()
        work = partial(ours, x.requires_grad_(), W, A, B, sizes.basis(d, d // 8), dy)
        for row in (None, *rows):
            head = {"what": "layer", "T": sizes.tokens, "K": d, "N": d, "rank": r, "by": "tma" if row else "library"}

            def measured(row: Launch | None = row, work: Any = work) -> Row:
                with gk.use_backend("triton"), base_product(row) if row else nullcontext([1]) as taken:
                    call, device = call_and_device(work)
                if not taken:
                    raise RuntimeError("the layer has operands that the TMA form does not take")
                return {"ms": call if device is None else device, "call_ms": call}

            record.attempt({**head, "row": as_line(row)} if row else head, measured)


def projections(record: Record, sizes: Sizes, size: tuple[int, int, int, int], chip: str, most: int) -> None:
    r, d, k, count = size
    grads, bases, kinds = [sizes.randn(r, d) for _ in range(count)], [sizes.basis(d, k)] * count, [True] * count
    bases = [basis.clone() for basis in bases]  # each read from memory
    wanted = grads[0] - (grads[0] @ bases[0]) @ bases[0].T

    def work() -> torch.Tensor:
        null_project_(grads, bases, kinds)
        return grads[0]

    for kernel in ("null_projection.onto_basis", "null_projection.from_basis"):
        for row in itertools.islice(projection_rows(kernel, chip), most):
            with first_choice(row), gk.use_backend("triton"):
                record.attempt({"what": kernel, "by": kernel, "row": as_line(row)}, partial(checked, work, wanted))


def verdicts(rows: list[Row]) -> Iterator[Row]:
    """The quickest of each product and of each projection, as a share of the library's time or the table's row's; and
    from which K on it is the library."""
    groups = _groups(rows)
    for group, members in groups.items():
        winner = min(members, key=lambda row: row["ms"])
        beside = next((row["ms"] for row in members if row["by"] == "library"), members[0]["ms"])
        name = " ".join(str(part) for part in group if part is not None)
        yield {"best": name, "by": winner["by"], "line": winner.get("row"), "of": winner["ms"] / beside}
    timed = [(group[2], _library_wins(members)) for group, members in groups.items() if group[0] == "product"]
    won, lost = ([K for K, wins in timed if wins == by_library] for by_library in (True, False))
    if timed:
        yield {
            "best": "library_from",
            "K": max(lost) + 1 if lost else 0,
            "won at": sorted(won),
            "lost at": sorted(lost),
        }


def _groups(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Those that have a time, by what they time."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "ms" in row:
            group = (row["what"], *(row.get(name) for name in ("T", "K", "N", "rank", "backward")))
            groups.setdefault(group, []).append(row)
    return groups


def _library_wins(rows: list[Row]) -> bool:
    return min(rows, key=lambda row: row["ms"])["by"] == "library"


def run(record: Record, smoke: bool) -> None:
    torch.manual_seed(0)
    chip = "sm90" if smoke else target(torch.device("cuda"))
    if chip is None:
        record.add({"left_out": "the Triton kernels have no rows for this chip"})
        return
    sizes, shapes, size, most = Sizes(), PRODUCTS, PROJECTION, 100
    if smoke:
        _triton.devices.add("cpu")  # where Triton's interpreter runs the kernels
        sizes, shapes, size, most = TINY, ((48, 64, 64),), (4, 32, 8, 2), 2
    rows = list(tma_rows(chip))[:most]
    products(record, sizes, shapes[:2], chip, rows)
    rows = quickest(record.rows, rows)
    whole_layers(record, sizes, rows[:1])
    projections(record, sizes, size, chip, most)
    products(record, sizes, shapes[2:], chip, rows)
    for row in verdicts(record.rows):
        record.add(row)
