"""The Triton kernels of the covariance, under Triton's interpreter, against float64."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from backends import Guarded, automatic, same_bits, triton_kernels  # noqa: F401
from oracle import assert_as_exact_as_plain
from torch.library import opcheck

from guardspace_kernels import dispatch
from guardspace_kernels.ops import _triton_table, covariance_update_, squared_drift, symmetrize_

pytest.importorskip("triton_interpreter", reason="Triton is not installed")
triton, tl, kernels, _triton_launch = map(
    pytest.importorskip,
    (
        "triton",
        "triton.language",
        "guardspace_kernels.ops.covariance.triton_kernels",
        "guardspace_kernels.ops._triton_launch",
    ),
)

pytestmark = [automatic, pytest.mark.usefixtures("triton_kernels")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS = (1, 31, 64, 65, 200)
#: Aligned and not; less than a tile, one, several, and a remainder.
WIDTHS = (1, 16, 37, 64, 130, 160)
#: Every size of tile that some chip has.
ROWS = {
    f"{row.kernel.split('.')[1]} {row.constants['BLOCK']}": row
    for chip in ("sm80", "sm90")
    for kernel in ("covariance.add_tiles", "covariance.add_tiles_float32")
    for row in _triton_table.rows_for(kernel, chip)
}

LAYOUTS = {
    "3-D": lambda: torch.randn(3, 5, 48),
    "one vector": lambda: torch.randn(48),
    "no token": lambda: torch.randn(0, 48),
    "no batch": lambda: torch.randn(0, 4, 48),
    "batch second": lambda: torch.randn(5, 3, 48).transpose(0, 1),
    "every second column": lambda: torch.randn(11, 96)[:, ::2],
    "every second row": lambda: torch.randn(22, 48)[::2],
    "column-major": lambda: torch.randn(48, 11).T,
    "expanded": lambda: torch.randn(1, 3, 48).expand(4, 3, 48),
    "one row again and again": lambda: torch.randn(1, 48).expand(7, 48),
    "columns of a wider one": lambda: torch.randn(11, 80)[:, 16:64],
    "not aligned": lambda: torch.randn(11, 80)[:, 3:51],
    "rows of odd length": lambda: torch.randn(11, 51)[:, :48],
}


@pytest.fixture
def launched(monkeypatch):
    """What is launched: (kernel, programs, size of tile, slices)."""
    calls, launch = [], _triton_launch.launch

    def counted(function, row, grid, arguments, **variant):
        slices = None if variant["GROUPED"] else arguments["slices"]
        calls.append((row.kernel.split(".")[1], grid, row.constants["BLOCK"], slices))
        launch(function, row, grid, arguments, **variant)

    monkeypatch.setattr(_triton_launch, "launch", counted)
    return calls


def insist(monkeypatch, row, least_tokens):
    """On this row, and on slices from so many tokens on."""
    choose = kernels.choose
    monkeypatch.setattr(
        kernels, "choose", lambda kernel, *rest: row if kernel.startswith("covariance.add_t") else choose(kernel, *rest)
    )
    monkeypatch.setattr(kernels, "_LEAST_TOKENS", least_tokens)


def expected(start, x, mask, scale, dtype):
    """The lower triangle of start + scale · Xᵀ diag(mask) X, formed in ``dtype``."""
    X = x.reshape(-1, x.shape[-1]).to(dtype)
    if mask is not None:
        X = X[mask.reshape(-1) != 0]
    return (start.to(dtype) + scale * (X.T @ X)).tril()


def check(start, x, mask=None, scale=1.0, case=""):
    C = start.clone()
    covariance_update_(C, x, mask, scale)
    assert same_bits(C.triu(1), start.triu(1)), case
    plain, truth = (expected(start, x, mask, scale, dtype) for dtype in (torch.float32, torch.float64))
    assert_as_exact_as_plain(C.tril(), plain, truth, case)
    return C


@pytest.mark.parametrize("least_tokens", [math.inf, 64], ids=["one slice", "slices"])
@pytest.mark.parametrize("name", ROWS)
def test_every_tile_width_and_number_of_tokens(name, least_tokens, monkeypatch, launched):
    insist(monkeypatch, ROWS[name], least_tokens)
    dtypes = itertools.cycle([torch.float32] if "float32" in name else [torch.float16, torch.bfloat16])
    for T, d in itertools.product(TOKENS, WIDTHS):
        if least_tokens > T > 65 or (least_tokens < T and d in (16, 37)):
            continue
        mask = torch.rand(T) < 0.6 if (T + d) % 2 else None
        check(torch.randn(d, d), torch.randn(T, d).to(next(dtypes)), mask, 0.7, (T, d))
    slices = {call[3] for call in launched}
    assert slices == ({1} if least_tokens == math.inf else {1, 3})


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, masked):
    x = LAYOUTS[layout]().to(dtype)
    check(torch.randn(48, 48), x, torch.rand(x.shape[:-1]) < 0.6 if masked else None)


def test_rows_that_are_laid_out_well_are_read_in_place(monkeypatch):
    read = []
    monkeypatch.setattr(kernels, "add", lambda items, scale: read.extend(x.data_ptr() for _, _, x, _ in items))
    for layout in ("3-D", "every second row", "columns of a wider one", "not aligned", "rows of odd length"):
        x = LAYOUTS[layout]()
        covariance_update_(torch.zeros(48, 48), x)
        assert (read.pop() == x.data_ptr()) == (layout not in ("not aligned", "rows of odd length")), layout


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_any_non_zero_mask_entry_counts_once(dtype):
    mask = torch.tensor([1, 0, 7, -1, 0, 2**32, 1]).to(dtype)  # for int64 one that int32 takes for zero
    assert dtype != torch.int64 or mask[5] == 2**32
    check(torch.zeros(16, 16), torch.randn(7, 16), mask)
    check(torch.zeros(16, 16), torch.randn(4, 16), torch.stack([mask[:2], mask[2:4]], 1).reshape(-1))
    check(torch.zeros(16, 16), torch.randn(2, 2, 16), torch.stack([mask[:2], mask[2:4]]).T)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_contribute_nothing_even_when_not_finite(dtype, bad):
    x = torch.randn(3, 40, 48).to(dtype)
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[0, :25], mask[2, 30:] = 0, 0  # left padded, full, right padded
    clean, C = torch.zeros(48, 48), torch.zeros(48, 48)
    covariance_update_(clean, x, mask)
    x[mask == 0] = bad
    covariance_update_(C, x, mask)
    assert same_bits(C, clean) and clean.abs().sum() > 0


def test_a_bad_row_that_counts_is_not_hidden():
    x, C = torch.randn(4, 48), torch.zeros(48, 48)
    x[2, 5] = math.nan
    covariance_update_(C, x)
    assert C[5, :6].isnan().all() and C[5:, 5].isnan().all() and C.isnan().sum() == 48


@pytest.mark.parametrize("d", [48, 37], ids=["aligned", "not aligned"])
def test_accumulators_inside_of_larger_ones(d):
    x, lower = torch.randn(20, d), torch.ones(d, d).tril().bool()
    for margin in (5, 16):
        C = Guarded.around(torch.zeros(d, d).masked_fill(~lower, math.nan), margin)
        covariance_update_(C.matrix, x)
        assert C.matrix[~lower].isnan().all() and C.intact()
        symmetrize_(C.matrix)
        assert torch.equal(C.matrix, C.matrix.T) and C.intact()
        assert_as_exact_as_plain(C.matrix, x.T @ x, x.double().T @ x.double())


def test_strided_accumulators_are_written_in_place():
    storage, x = torch.zeros(96, 96), torch.randn(9, 48)
    for C in (storage[::2, ::2], storage.T[1::2, 1::2]):
        covariance_update_(C, x)
        symmetrize_(C)
        assert_as_exact_as_plain(C, x.T @ x, x.double().T @ x.double())
    assert storage[1::2, ::2].count_nonzero() == 0 and storage[::2, 1::2].count_nonzero() == 0


def test_updates_accumulate():
    x, C = torch.randn(130, 48).bfloat16(), torch.zeros(48, 48)
    for part in x.split([1, 60, 69]):
        covariance_update_(C, part, None, 0.5)
    assert_as_exact_as_plain(
        C, *(expected(torch.zeros(48, 48), x, None, 0.5, t) for t in (torch.float32, torch.float64))
    )


def mixed():
    """Accumulators, inputs and masks of several widths, dtypes and alignments; one without tokens."""
    xs = [torch.randn(T, d).to(dtype) for T, d, dtype in [
        (70, 160, torch.bfloat16), (5, 16, torch.bfloat16), (0, 48, torch.bfloat16), (65, 37, torch.bfloat16),
        (33, 64, torch.float32), (90, 80, torch.float32), (7, 32, torch.float16),
    ]]  # fmt: skip
    masks = [torch.rand(len(x)) < 0.6 if i % 2 else None for i, x in enumerate(xs)]
    return [torch.randn(x.shape[1], x.shape[1]) for x in xs], xs, masks


@pytest.mark.parametrize("least_tokens", [1024, 30], ids=["one slice", "slices"])
def test_a_list_is_as_exact_as_one_call_each(least_tokens, monkeypatch, launched):
    monkeypatch.setattr(kernels, "_LEAST_TOKENS", least_tokens)
    starts, xs, masks = mixed()
    Cs = [start.clone() for start in starts]
    covariance_update_(Cs, xs, masks, 0.7)
    for start, C, x, mask in zip(starts, Cs, xs, masks, strict=True):
        assert same_bits(C.triu(1), start.triu(1))
        assert_as_exact_as_plain(C.tril(), *(expected(start, x, mask, 0.7, t) for t in (torch.float32, torch.float64)))
    first = ["add_tiles", "add_tiles_float32", "add_tiles"]  # one launch for each dtype
    assert [name for name, *_ in launched] == (first if least_tokens == 1024 else [*first, "add_parts"])


def test_without_slices_a_list_has_the_bits_of_one_call_each():
    Cs, xs, masks = mixed()
    singly = [C.clone() for C in Cs]
    covariance_update_(Cs, xs, masks)
    for C, x, mask in zip(singly, xs, masks, strict=True):
        covariance_update_(C, x, mask)
    assert all(map(same_bits, Cs, singly))


def test_an_accumulator_that_is_given_twice_gets_both():
    C, x, y = torch.zeros(48, 48), torch.randn(9, 48), torch.randn(70, 48)
    covariance_update_([C, C], [x, y])
    both = torch.cat([x, y])
    assert_as_exact_as_plain(
        C, *(expected(torch.zeros(48, 48), both, None, 1.0, t) for t in (torch.float32, torch.float64))
    )


def test_each_update_has_its_scale():
    x, C, D = torch.randn(9, 16), torch.zeros(16, 16), torch.zeros(16, 16)
    kernels.covariance_update_([(C, x, None, 1.0), (D, x, None, 2.0)])
    assert same_bits(2 * C, D) and C.count_nonzero() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_LEAST_TOKENS", 32)
    x, mask = torch.randn(300, 80).to(dtype), torch.rand(300) < 0.6
    Cs = [torch.zeros(80, 80) for _ in range(2)]
    for C in Cs:
        covariance_update_(C, x, mask)
    assert same_bits(*Cs)


@pytest.mark.parametrize("T, d, block, slices", [
    (1023, 16, 64, 1), (2048, 16, 64, 2), (9000, 16, 64, 8), (300_000, 16, 64, 264), (300_000, 576, 64, 5),
    (300_000, 1024, 64, 1), (300_000, 2047, 128, 1), (300_000, 2048, 128, 1),
])  # fmt: skip
def test_slices_follow_from_the_shapes(T, d, block, slices, monkeypatch):
    launches = []
    monkeypatch.setattr(kernels, "launch_items", lambda function, items, shared: launches.append((items, shared)))
    covariance_update_(torch.zeros(d, d), torch.zeros(1, d).bfloat16().expand(T, d))
    (((row, programs, item),), shared), (second, _) = launches
    tiles = math.ceil(d / block) * (math.ceil(d / block) + 1) // 2
    assert (row.constants["BLOCK"], programs, item["slices"]) == (block, tiles * slices, slices)
    assert len(second) == (slices > 1) and shared["PARTS"].nbytes <= 2 * 264 * 128**2 * 4
    assert shared["PARTS"].numel() == (item["d"] ** 2 * slices if slices > 1 else 0)


def test_the_sums_of_a_list_share_their_bound(monkeypatch):
    launches = []
    monkeypatch.setattr(kernels, "launch_items", lambda function, items, shared: launches.append((items, shared)))
    Cs = [torch.zeros(d, d) for d in (576, 64, 320, 16)]
    covariance_update_(Cs, [torch.zeros(1, len(C)).expand(300_000, -1) for C in Cs])
    (first, shared), (second, _) = launches
    assert [item["slices"] for _, _, item in first] == [264 // (45 + 1 + 15 + 1)] * 4
    begins = [item["parts"] for _, _, item in second]
    assert begins == [4 * sum(len(C) ** 2 for C in Cs[:i]) for i in range(4)]
    assert shared["PARTS"].numel() == 4 * sum(len(C) ** 2 for C in Cs)


@triton.jit
def decode(ROW, COLUMN, begin, end, blocks, TILES: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.minimum(begin + at, end - 1)
    if TILES:
        i, j = kernels.lower_tile(t, blocks)
    else:
        i, j = kernels.triangle(t)
    tl.store(ROW + at, i, mask=begin + at < end)
    tl.store(COLUMN + at, j, mask=begin + at < end)


def decoded(begin, end, blocks=0):
    i, j = (torch.empty(end - begin, dtype=torch.int32) for _ in range(2))
    decode[(triton.cdiv(end - begin, 4096),)](i, j, begin, end, blocks, TILES=blocks > 0, BLOCK=4096)
    return i.long(), j.long()


@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9, 16, 100, 513])
def test_every_tile_of_the_lower_triangle_is_decoded_once(blocks):
    tiles = blocks * (blocks + 1) // 2  # up to 131841
    i, j = decoded(0, tiles, blocks)
    assert ((j >= 0) & (j <= i) & (i < blocks)).all()
    assert torch.unique(i * blocks + j).numel() == tiles


@pytest.mark.parametrize("error", [-3e-7, 0, 3e-7])  # GPUs approximate roots
@pytest.mark.parametrize("row", [1 << 10, 5792, 1 << 14, 46000])
def test_decoding_is_exact_where_float32_is_not(row, error, monkeypatch):
    monkeypatch.setattr(tl, "sqrt", lambda x: tl.math.sqrt(x) * (1 + error))
    begin, end = (row * (row + 1) // 2 + side for side in (-2048, 2048))
    i, j = decoded(begin, end)
    truth = torch.tensor([(math.isqrt(8 * t + 1) - 1) // 2 for t in range(begin, end)])
    assert torch.equal(i, truth) and torch.equal(j, torch.arange(begin, end) - truth * (truth + 1) // 2)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from guardspace_kernels.ops._triton_table import KERNELS, rows_for
from guardspace_kernels.ops.covariance.triton_kernels import add_tiles

row = rows_for("{kernel}", "sm90")[-1]
kernel = KERNELS[row.kernel]
constants = {{**kernel.variants[0], **row.constants}}
signature = kernel.arguments | {{"X": f"*{{kernel.dtypes[0]}}"}} | dict.fromkeys(constants, "constexpr")
source = triton.compiler.ASTSource(fn=add_tiles, signature=signature, constexprs=constants)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"])
"""


@pytest.mark.parametrize("kernel", ["covariance.add_tiles", "covariance.add_tiles_float32"])
def test_tensor_cores_accumulate_no_more_than_one_tile(kernel):
    """The interpreter adds in float32: only compiled code shows whether each product begins at zero."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE.format(kernel=kernel)]
    code = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    (start,) = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", code)
    assert f"{start} = arith.constant dense<0.000000e+00>" in code


@pytest.mark.parametrize("d", [0, 1, 16, 63, 64, 65, 200])
def test_symmetrize_mirrors_the_lower_triangle(d):
    C = torch.randn(d, d)
    C.masked_fill_(torch.ones(d, d).triu(1).bool(), math.nan)
    expected = C.tril() + C.tril(-1).T if d == 0 else torch.where(C.isnan(), C.T, C)
    symmetrize_(C)
    assert same_bits(C, expected)


def test_squared_drift_is_the_references():
    C, F, G = torch.randn(16, 16), torch.randn(5, 3), torch.randn(3, 16)
    drift = squared_drift(C, F, G)
    with dispatch.use_backend("reference"):
        assert same_bits(drift, squared_drift(C, F, G))


def test_float64_is_left_to_the_reference():
    for C, x in (
        (torch.zeros(16, 16), torch.randn(9, 16).double()),
        (torch.zeros(16, 16).double(), torch.randn(9, 16)),
    ):
        ok, reason = dispatch.can_use("covariance", C, x, None, backend="triton")
        assert not ok and reason == "a tensor is torch.float64; the Triton kernels compute in float32"
        covariance_update_(C, x)
        assert torch.allclose(C.double(), (x.double().T @ x.double()).tril())


def test_autograd_notices_the_writes():
    C = torch.randn(16, 16)
    for write in (lambda: covariance_update_(C, torch.randn(4, 16)), lambda: symmetrize_(C)):
        y = (C * torch.ones(16, 16, requires_grad=True)).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3).bool()], ids=["all rows", "masked"])
def test_the_ops_pass_opcheck(mask):
    ops = torch.ops.guardspace
    opcheck(ops.covariance_update_.default, (torch.zeros(16, 16), torch.randn(2, 3, 16), mask, 0.5))
    opcheck(ops.symmetrize_.default, (torch.randn(16, 16),))


def test_autotuning_writes_to_scratch_memory_only(monkeypatch, tmp_path):
    tried = []

    def seconds(run):
        run()
        tried.append(0)
        return -len(tried)

    def choose(kernel, device, *rest):
        return _triton_launch.choose(kernel, torch.device("cuda") if rest else device, *rest)

    monkeypatch.setenv("GUARDSPACE_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_triton_launch, "_seconds", seconds)
    monkeypatch.setattr(_triton_launch, "target", lambda device: "sm90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H")
    monkeypatch.setattr(_triton_launch, "_current", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kernels, "choose", choose)
    _triton_launch._choices.cache_clear()
    check(torch.randn(48, 48), torch.randn(9, 48), torch.rand(9) < 0.6, 0.5)
    _triton_launch._choices.cache_clear()
    (file,) = tmp_path.rglob("*.json")
    assert len(tried) == 2 and "BLOCK=64" in json.loads(file.read_text())["covariance.add_tiles_float32 [1, 4, 6]"]
