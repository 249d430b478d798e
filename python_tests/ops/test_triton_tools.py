"""What the tests of the Triton kernels stand on: the interpreter's bfloat16, and the sanitizer over it."""

from __future__ import annotations

import pytest
import torch
from backends import automatic, bits, same_bits

from guardspace_kernels.ops import _triton_table

triton_interpreter = pytest.importorskip("triton_interpreter", reason="Triton is not installed")
triton, tl, triton_sanitizer, _triton_launch = map(
    pytest.importorskip,
    ("triton", "triton.language", "triton_sanitizer", "guardspace_kernels.ops._triton_launch"),
)

pytestmark = automatic


@triton.jit
def cast(X, Y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i).to(Y.dtype.element_ty))


@triton.jit
def arithmetic(X, Y, SUM, PRODUCT, NEGATIVE, LESS, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(X + i), tl.load(Y + i)
    tl.store(SUM + i, x + y)
    tl.store(PRODUCT + i, x * y)
    tl.store(NEGATIVE + i, -x)
    tl.store(LESS + i, x < y)


@triton.jit
def product(X, Y, OUT, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)
    tl.store(OUT + i * BLOCK + j, tl.dot(tl.load(X + i * BLOCK + j), tl.load(Y + i * BLOCK + j)))


def every_bfloat16():
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def floats_around_every_bfloat16():
    """Ties, their neighbours, NaN, both zeros, subnormal numbers, and what overflows to infinity."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return ((torch.arange(2**16, dtype=torch.int32) << 16) + low[:, None]).flatten().view(torch.float32)


def cast_to(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    cast[(triton.cdiv(x.numel(), 1 << 16),)](x, y, BLOCK=min(x.numel(), 1 << 16))
    return y


def same(a, b):
    """Bit for bit, but any NaN for a NaN."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


@pytest.fixture
def mended(monkeypatch):
    for name, original in triton_interpreter.ORIGINAL.items():
        monkeypatch.setattr(triton_interpreter._Builder, name, original)
    triton_interpreter.mend()


@pytest.fixture
def unmended(monkeypatch):
    for name, original in triton_interpreter.ORIGINAL.items():
        monkeypatch.setattr(triton_interpreter._Builder, name, original)


CASTS = {
    "float32": (floats_around_every_bfloat16, torch.bfloat16),
    "to float32": (every_bfloat16, torch.float32),
    "to float16": (every_bfloat16, torch.float16),
    "float16": (lambda: torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16), torch.bfloat16),
    "int32": (lambda: torch.arange(-(2**15), 2**15, dtype=torch.int32) * 65521, torch.bfloat16),
    "int64": (lambda: torch.arange(-(2**15), 2**15) * 140737488355327, torch.bfloat16),
    "bool": (lambda: torch.tensor([True, False] * 8), torch.bfloat16),
    "to int32": (lambda: torch.linspace(-3e4, 3e4, 2**12).bfloat16(), torch.int32),
}


@pytest.mark.usefixtures("mended")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", CASTS)
def test_casts_of_bfloat16_are_those_of_torch(name):
    make, dtype = CASTS[name]
    x = make()
    assert same(cast_to(x, dtype), x.to(dtype))


def calculated(x, y):
    results = [torch.empty_like(x) for _ in range(3)] + [torch.empty(x.shape, dtype=torch.bool)]
    arithmetic[(1,)](x, y, *results, BLOCK=x.numel())
    return results


def expected(x, y):
    return [x + y, x * y, -x, x < y]


@pytest.fixture
def numbers():
    x = torch.cat([torch.randn(2**12), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38, 1.0])])
    x = x.repeat(2)[: 2**12 + 8].bfloat16()[8:]
    return x, x.roll(1)


@pytest.mark.usefixtures("mended")
def test_bfloat16_adds_multiplies_negates_and_compares_as_torch_does(numbers):
    for name, ours, theirs in zip(
        ("sum", "product", "negative", "less"), calculated(*numbers), expected(*numbers), strict=True
    ):
        assert same(ours, theirs), name


def multiplied(x, y):
    out = torch.empty(x.shape, dtype=torch.float32)
    product[(1,)](x, y, out, BLOCK=x.shape[0])
    return out


@pytest.fixture
def matrices():
    # Whole numbers: every sum is exact in float32, in any order.
    return [torch.randint(-200, 200, (64, 64)).bfloat16() for _ in range(2)]


@pytest.mark.usefixtures("mended")
def test_products_of_bfloat16_matrices_are_summed_in_float32(matrices):
    x, y = matrices
    assert same_bits(multiplied(x, y), x.float() @ y.float())


@pytest.mark.usefixtures("mended")
def test_the_mend_leaves_other_dtypes_alone():
    x, y = torch.randn(2, 64)
    assert all(same(a, b) for a, b in zip(calculated(x, y), expected(x, y), strict=True))
    assert same(cast_to(x, torch.float16), x.half())
    assert same(cast_to(torch.arange(-8, 8), torch.int32), torch.arange(-8, 8, dtype=torch.int32))


@pytest.mark.usefixtures("unmended")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_by_itself_is_still_wrong_with_bfloat16(numbers, matrices):
    """The day that one of these fails, a part of the mend has become unnecessary."""
    for name in ("float32", "int32", "int64", "bool"):
        make, dtype = CASTS[name]
        assert not same(cast_to(make(), dtype), make().to(dtype)), name
    wrong = [not same(a, b) for a, b in zip(calculated(*numbers), expected(*numbers), strict=True)]
    assert wrong == [True] * 4
    x, y = matrices
    assert not same(multiplied(x, y), x.float() @ y.float())


# The sanitizer. The planted bugs give the right numbers here, all but the last one.


@pytest.fixture
def watched(monkeypatch):
    triton_interpreter.mend()
    triton_sanitizer.watch(monkeypatch)


def refused(*reasons):
    return pytest.raises(triton.runtime.errors.InterpreterError, match=".*".join(reasons))


@triton.jit
def copy(X, Y, last_read, last_written, shift, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + shift + i, mask=i < last_read, other=0.0), mask=i < last_written)


def copied(x, y, last_read=40, last_written=40, shift=0, step=16):
    copy[(triton.cdiv(40, step),)](x, y, last_read, last_written, shift, STEP=step, BLOCK=16)


@pytest.fixture
def vectors():
    """Two of 40 elements, with memory around them."""
    return [torch.randn(80)[16:56] for _ in range(2)]


@pytest.mark.usefixtures("watched")
def test_a_clean_kernel_passes(vectors):
    x, y = vectors
    copied(x, y)
    assert torch.equal(x, y)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(
    "bug, reason",
    [
        ({"last_read": 41}, r"program \(2, 0, 0\) loads 1 elements outside.*first one 1 past the end of argument 0"),
        (
            {"last_written": 41},
            r"program \(2, 0, 0\) stores 1 elements outside.*first one 1 past the end of argument 1",
        ),
        ({"last_read": 1000}, "loads 8 elements outside"),
        ({"shift": -1}, "loads 1 elements outside.*first one 1 before argument 0"),
        ({"step": 15}, r"program \(1, 0, 0\) stores where another program stores in the same launch"),
    ],
    ids=["a load", "a store", "no mask", "before", "overlapping stores"],
)
def test_a_flat_kernel_with_a_bug_is_caught(vectors, bug, reason):
    with refused(reason):
        copied(*vectors, **bug)


@triton.jit
def copy_rows(X, Y, stride, d, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)
    tl.store(Y + i * stride + j, tl.load(X + i * stride + j, mask=j < d), mask=j < d)


@pytest.mark.usefixtures("watched")
def test_elements_between_the_rows_of_a_view_are_not_its_own():
    x, y = torch.randn(2, 16, 20)[:, :, 3:13]
    copy_rows[(1,)](x, y, 20, 10, BLOCK=16)
    assert torch.equal(x, y)
    with refused("loads 16 elements outside", "between the rows of argument 0"):
        copy_rows[(1,)](x, y, 20, 11, BLOCK=16)
    every_second = torch.randn(16, 40)[:, ::2]
    with refused("loads 128 elements outside", "between the rows of argument 0"):
        copy_rows[(1,)](every_second, y, 40, 16, BLOCK=16)


@triton.jit
def take_bits(X, Y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X.to(Y.dtype) + i))


@pytest.mark.usefixtures("watched")
def test_a_pointer_to_elements_of_another_size_is_caught():
    take_bits[(1,)](torch.randn(16), torch.zeros(16, dtype=torch.int32), BLOCK=16)
    with refused("loads 16 elements outside"):
        take_bits[(1,)](torch.randn(16), torch.zeros(16, dtype=torch.int16), BLOCK=16)


@triton.jit
def fill_pairs(Y, BLOCK: tl.constexpr):
    tl.store(Y + tl.arange(0, BLOCK) // 2, 1.0)


@pytest.mark.usefixtures("watched")
def test_two_lanes_of_one_store_at_one_address_are_caught():
    with refused(r"two lanes of one store of program \(0, 0, 0\) have the same address"):
        fill_pairs[(1,)](torch.zeros(8), BLOCK=16)


@triton.jit
def double(X, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + i, 2 * tl.load(X + (i + shift + 64) % 64))


@pytest.mark.usefixtures("watched")
def test_programs_that_read_what_others_write_are_caught():
    x = torch.ones(64)
    double[(4,)](x, 0, BLOCK=16)  # in place, each its own
    assert torch.equal(x, torch.full((64,), 2.0))
    with refused(r"program \(1, 0, 0\) stores what another program loads"):
        double[(4,)](x, 16, BLOCK=16)
    with refused(r"program \(1, 0, 0\) loads what another program stores"):
        double[(4,)](x, -16, BLOCK=16)


@triton.jit
def spread_first(X, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(X + (3 - tl.program_id(0)) * BLOCK + i, tl.load(X + i))


@pytest.mark.usefixtures("watched")
def test_a_program_that_writes_what_it_and_others_read_is_caught():
    with refused(r"program \(3, 0, 0\) stores what another program loads"):
        spread_first[(4,)](torch.randn(64), BLOCK=16)


@triton.jit
def add_slice(X, OUT, T, SLICES: tl.constexpr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for t in range(tl.program_id(0), T, SLICES):
        total += tl.load(X + t * BLOCK + j)
    if ATOMIC:
        tl.atomic_add(OUT + j, total)
    else:
        tl.store(OUT + j, tl.load(OUT + j) + total)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("atomic, does", [(False, "loads what"), (True, "stores where")])
def test_a_sum_over_slices_without_a_second_stage_is_caught(atomic, does):
    x, out = torch.randn(9, 16), torch.zeros(16)
    add_slice[(1,)](x, out, 9, SLICES=1, ATOMIC=atomic, BLOCK=16)
    torch.testing.assert_close(out, x.sum(0))
    with refused(rf"program \(1, 0, 0\) {does} another program stores in the same launch"):
        add_slice[(2,)](x, out, 9, SLICES=2, ATOMIC=atomic, BLOCK=16)


@triton.jit
def copy_item(X, Y, size, TABLE, n, GROUPED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    if GROUPED:
        item = _triton_launch.locate(TABLE, n, pid, 4)
        X, Y, size = tl.load(item).to(X.dtype), tl.load(item + 1).to(Y.dtype), tl.load(item + 2).to(tl.int32)
        pid -= tl.load(item + 3).to(tl.int32)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < size), mask=i < size)


@pytest.fixture
def copy_item_row(monkeypatch):
    kernel = _triton_table.Kernel(
        {"X": "*fp32", "Y": "*fp32", "size": "i32", "TABLE": "*i64", "n": "i32"}, ("",), (), _triton_table._GROUPED
    )
    monkeypatch.setitem(_triton_table.KERNELS, "tools.copy_item", kernel)
    return _triton_table.Row("tools.copy_item", ("sm80",), {"BLOCK": 16}, warps=4, stages=1)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("count", [1, 3])
def test_tensors_that_a_kernel_finds_in_its_table_are_known(copy_item_row, count):
    xs, ys = torch.randn(count, 24), torch.zeros(count, 24)

    def launch(size):
        items = [(copy_item_row, 2, {"X": x[:20], "Y": y[:20], "size": size}) for x, y in zip(xs, ys, strict=True)]
        _triton_launch.launch_items(copy_item, items)

    launch(20)
    assert torch.equal(ys[:, :20], xs[:, :20]) and not ys[:, 20:].any()
    with refused("copy_item: program", "loads 1 elements outside of the launch's tensors", "1 past the end of X"):
        launch(21)
