"""The shim that runs CUDA kernels on the CPU: it computes what the device does, and finds the bugs it is there to find.

Small kernels stand beside their tests; all of them are one library.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import cuda_on_cpu
import pytest
import sanitize
import torch
from backends import bits
from oracle import error

from guardspace_kernels.ops import _cuda

pytestmark = [
    pytest.mark.cuda_on_cpu,
    pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not() or "there is a compiler"),
]

HEADER = """
#include "cuda_shim.h"
using namespace guardspace;
struct Arguments {
    const float* in;
    float* out;
};
"""
#: ``in`` and ``out`` are what the test gives, ``memory`` is a block's shared memory, ``t`` the thread.
KERNEL = """
__global__ void NAME(const Arguments arguments) {
    [[maybe_unused]] const int t = threadIdx.x, lane = t % 32;
    [[maybe_unused]] const float* in = arguments.in;
    [[maybe_unused]] const auto* words = reinterpret_cast<const uint32_t*>(in);
    [[maybe_unused]] float* out = arguments.out;
    [[maybe_unused]] float* memory = reinterpret_cast<float*>(shared_memory());
    BODY
}
extern "C" __attribute__((visibility("default"))) int run_NAME(const float* in, float* out) {
    return launch(NAME, BLOCKS, THREADS, SHARED, nullptr, Arguments{in, out});
}
"""


@dataclass
class Kernel:
    """A kernel with this body."""

    body: str
    threads: int = 64
    shared: int = 256
    blocks: int = 1

    def source(self, name: str) -> str:
        text = KERNEL.replace("NAME", name).replace("BODY", self.body).replace("BLOCKS", str(self.blocks))
        return text.replace("THREADS", str(self.threads)).replace("SHARED", str(self.shared))


KERNELS: dict[str, Kernel] = {}


def kernel(name: str, *arguments, **named) -> str:
    assert name not in KERNELS
    KERNELS[name] = Kernel(*arguments, **named)
    return name


def compiled(folder, kernels: dict[str, Kernel], *flags: str) -> str:
    text = HEADER + "".join(one.source(name) for name, one in kernels.items())
    (folder / "kernels.cu").write_text(text)
    return cuda_on_cpu.built(folder, ("-O1", *flags))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return ctypes.CDLL(compiled(tmp_path_factory.mktemp("kernels"), KERNELS))


@pytest.fixture
def run(loaded) -> Callable[..., torch.Tensor]:
    """Runs a kernel by its name on ``given``; what it has written into ``size`` numbers, or RuntimeError."""

    def call(name: str, given: torch.Tensor | None = None, size: int = 64, schedule: int = 0) -> torch.Tensor:
        out = torch.full((size,), math.nan)
        loaded.shim_set_schedule(schedule)
        function = getattr(loaded, f"run_{name}")
        function.argtypes = [ctypes.c_void_p] * 2
        loaded.shim_failure.restype = ctypes.c_char_p
        given = torch.arange(64.0) if given is None else given
        if function(given.data_ptr(), out.data_ptr()):
            raise RuntimeError(loaded.shim_failure().decode())
        return out

    return call


def ints(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int32)


# Where the PTX ISA says that entries lie, in its own words: "Matrix Fragments for mma.m16n8k16 with floating point
# type" and the same of m16n8k8 with .tf32.


def isa_entry(operand: str, tf32: bool, lane: int, i: int) -> tuple[int, int]:
    group, thread_in_group = lane >> 2, lane % 4
    if operand == "d":
        return (group if i < 2 else group + 8), thread_in_group * 2 + (i & 1)
    if operand == "a" and tf32:
        return (group if i in (0, 2) else group + 8), (thread_in_group if i in (0, 1) else thread_in_group + 4)
    if operand == "a":
        row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
        return row, thread_in_group * 2 + (i & 1) + (0 if i < 4 else 8)
    if tf32:
        return (thread_in_group if i == 0 else thread_in_group + 4), group
    return thread_in_group * 2 + (i & 1) + (0 if i < 2 else 8), group


#: Operand, whether of TF32, its shape, elements of a lane.
OPERANDS = [
    ("a", False, (16, 16), 8), ("b", False, (16, 8), 4), ("d", False, (16, 8), 4),
    ("a", True, (16, 8), 4), ("b", True, (8, 8), 2), ("d", True, (16, 8), 4),
]  # fmt: skip


def layout(operand: str, tf32: bool) -> list[list[tuple[int, int]]]:
    """By lane and element, the entry."""
    count = next(n for name, kind, _, n in OPERANDS if (name, kind) == (operand, tf32))
    return [[isa_entry(operand, tf32, lane, i) for i in range(count)] for lane in range(32)]


@cache
def triton_layout(operand: str, tf32: bool) -> list[list[tuple[int, int]]]:
    """The same from Triton, which describes each bit of the lane's and the element's number."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    language = pytest.importorskip("triton.experimental.gluon.language")
    from triton._C.libtriton import gluon_ir, ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    if not hasattr(gluon_ir.GluonOpBuilder, "to_linear_layout"):
        pytest.skip(f"Triton {triton.__version__} does not tell its layouts")
    context = ir.context()
    ir.load_dialects(context)
    CUDABackend(GPUTarget("cuda", 80, 32)).load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    of = language.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    if operand != "d":
        of = language.DotOperandLayout("ab".index(operand), of, 1 if tf32 else 2)
    shape = next(shape for name, kind, shape, _ in OPERANDS if (name, kind) == (operand, tf32))
    linear = builder.to_linear_layout(of._to_ir(builder), list(shape))

    def entry(lane: int, i: int) -> tuple[int, int]:
        bases = [b for n, bases in ((lane, linear.lane_bases), (i, linear.reg_bases)) for b in set_bits(n, bases)]
        return sum(b[0] for b in bases), sum(b[1] for b in bases)

    return [[entry(lane, i) for i in range(2 ** len(linear.reg_bases))] for lane in range(32)]


def set_bits(number: int, bases: list[list[int]]) -> list[list[int]]:
    assert number < 2 ** len(bases)
    return [basis for bit, basis in enumerate(bases) if number >> bit & 1]


@pytest.mark.parametrize("operand, tf32, shape, count", OPERANDS)
@pytest.mark.parametrize("source", [layout, triton_layout], ids=["PTX", "Triton"])
def test_fragments_lie_where_the_device_has_them(loaded, source, operand, tf32, shape, count):
    expected = source(operand, tf32)
    assert [len(lane) for lane in expected] == [count] * 32
    assert sorted(itertools.chain(*expected)) == list(itertools.product(*map(range, shape)))
    row, col = ctypes.c_int(), ctypes.c_int()
    for lane, i in itertools.product(range(32), range(count)):
        loaded.shim_entry(ctypes.c_char(operand.encode()), tf32, lane, i, ctypes.byref(row), ctypes.byref(col))
        assert (row.value, col.value) == expected[lane][i]


# A 16 × 16 matrix of 16-bit numbers, each its own index.
kernel(
    "matrices",
    """
    auto* m = reinterpret_cast<uint16_t*>(memory);
    for (int i = lane; i < 256; i += 32) m[i] = static_cast<uint16_t>(i);
    __syncwarp();
    uint32_t rows[4], cols[4];
    ldmatrix<false>(rows, m + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix<true>(cols, m + lane % 16 * 16 + lane / 16 * 8);
    memcpy(out + lane * 4, rows, 16);
    memcpy(out + 128 + lane * 4, cols, 16);
    """,
    threads=32,
    shared=512,
)


@pytest.mark.parametrize("source", [layout, triton_layout], ids=["PTX", "Triton"])
def test_ldmatrix_brings_fragments(run, source):
    rows, cols = run("matrices", size=256).view(torch.int16).reshape(2, 32, 8).tolist()
    a, b = source("a", False), source("b", False)
    for lane in range(32):
        assert [divmod(x, 16) for x in rows[lane]] == a[lane]
        first, second = cols[lane][:4], cols[lane][4:]  # columns 0-7 and 8-15 of a right operand
        assert [divmod(x, 16) for x in first] == b[lane]
        assert [divmod(x - 8, 16) for x in second] == b[lane]


for index, E in enumerate(("float", "float16", "bfloat16")):
    kernel(
        f"product_{index}",
        f"""
        uint32_t a[4], b[2];
        float d[4];
        memcpy(a, words + lane * 10, 16);
        memcpy(b, words + lane * 10 + 4, 8);
        memcpy(d, words + lane * 10 + 6, 16);
        mma<{E}>(d, a, b);
        memcpy(out + lane * 4, d, 16);
        """,
        threads=32,
    )

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def product(run, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """d + a b by the shim's mma, from and to where PTX has the entries."""
    tf32 = a.dtype == torch.float32

    def fragments(m: torch.Tensor, operand: str) -> torch.Tensor:
        entries = torch.tensor(layout(operand, tf32))
        return m[entries[..., 0], entries[..., 1]].contiguous().view(torch.float32)

    given = torch.cat([fragments(a, "a"), fragments(b, "b"), fragments(d, "d")], dim=1).contiguous()
    out = run(f"product_{DTYPES.index(a.dtype)}", given, 128)
    result, entries = torch.empty(16, 8), torch.tensor(layout("d", tf32))
    result[entries[..., 0], entries[..., 1]] = out.reshape(32, 4)
    return result


def toward_zero(x: torch.Tensor) -> torch.Tensor:
    """float64 as float32, never larger in size."""
    nearest = x.float()
    return torch.where(nearest.double().abs() > x.abs(), torch.nextafter(nearest, torch.zeros(())), nearest)


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers whose products and sums float64 holds exactly."""
    depth, most = (8 if dtype == torch.float32 else 16), (255 if dtype == torch.bfloat16 else 1023)
    a, b = (torch.randint(-most, most, size).to(dtype) / 64 for size in ((16, depth), (depth, 8)))
    return a, b, torch.randn(16, 8) * 1e4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mma_multiplies_exactly_and_truncates_the_sum(run, dtype):
    rounds_up = 0
    for _ in range(10):
        a, b, d = operands(dtype)
        exact = d.double() + a.double() @ b.double()
        assert torch.equal(product(run, a, b, d), toward_zero(exact))
        rounds_up += (exact.float().double().abs() > exact.abs()).sum()
    assert rounds_up > 100


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mma_of_numbers_that_are_not_finite(run, dtype):
    a, b, d = operands(dtype)
    a[3, 2], a[5, 1], a[9, 4] = math.nan, math.inf, -math.inf
    b[1, 6], b[4, 7] = 0, 0
    d[11, 3], d[12, 0], d[13, 1] = math.nan, math.inf, -math.inf
    exact = d.double() + a.double() @ b.double()
    assert exact.isinf().any() and exact[5, 6].isnan() and exact[9, 7].isnan()
    assert torch.equal(product(run, a, b, d).nan_to_num(-1), toward_zero(exact).nan_to_num(-1))


def test_mma_does_not_read_more_of_a_number_than_tf32_has(run):
    a, b, d = operands(torch.float32)
    more_a, more_b = ((ints(m) | torch.randint(0, 2**13, m.shape, dtype=torch.int32)).view(m.dtype) for m in (a, b))
    assert not torch.equal(a, more_a) and torch.equal(product(run, more_a, more_b, d), product(run, a, b, d))


kernel(
    "narrow",
    """
    for (int i = t; i < 65536; i += 64) {
        out[i] = to_tf32(in[i]);
        const float16 half = rounded<float16>(in[i]);
        const bfloat16 brain = rounded<bfloat16>(in[i]);
        memcpy(reinterpret_cast<uint16_t*>(out + 65536) + i, &half, 2);
        memcpy(reinterpret_cast<uint16_t*>(out + 65536) + 65536 + i, &brain, 2);
    }
    """,
)
kernel(
    "widen",
    """
    for (int i = t; i < 65536; i += 64) {
        out[i] = widened(float16{static_cast<uint16_t>(i)});
        out[65536 + i] = widened(bfloat16{static_cast<uint16_t>(i)});
    }
    """,
)
PATTERNS = torch.arange(65536, dtype=torch.int32).to(torch.int16)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal with the sign of zero, any NaN being like any other."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(bits(a)[~a.isnan()], bits(b)[~b.isnan()])
    )


def tf32(x: torch.Tensor) -> torch.Tensor:
    """To eleven bits, the nearest, ties away from zero."""
    x = x.double()
    unit = torch.ldexp(torch.ones(()).double(), torch.frexp(x).exponent.clamp(min=-125) - 11)
    return torch.where(x.isfinite(), torch.copysign((x.abs() / unit + 0.5).floor() * unit, x), x).float()


def between(dtype: torch.dtype) -> torch.Tensor:
    """Halfway from each finite number to the next away from zero: ties, which exist in float32."""
    low = PATTERNS.view(dtype)
    high = (PATTERNS + 1).view(dtype)
    middle = (low.double() + high.double()) / 2
    return torch.where(middle.isfinite(), middle, 0).float()


@pytest.mark.parametrize(
    "numbers",
    [
        lambda: torch.randint(-(2**31), 2**31, (65536,)).to(torch.int32),
        lambda: ints(torch.randn(65536)) & -(2**12),  # of which one in two lies between two of TF32
        lambda: (torch.arange(65536) << 16).to(torch.int32),
        lambda: ints(between(torch.float16)),
        lambda: ints(between(torch.float16)) + 1,
        lambda: ints(between(torch.float16)) - 1,
        lambda: ints(between(torch.bfloat16)),
        lambda: ints(between(torch.bfloat16)) + 1,
        lambda: ints(between(torch.bfloat16)) - 1,
    ],
    ids=[
        "any bits",
        "TF32",
        "bfloat16",
        *(f"{t}{x}" for t in ("float16 ties", "bfloat16 ties") for x in ("", "+", "-")),
    ],
)
def test_conversions_round_as_the_device_does(run, numbers):
    x = numbers().contiguous().view(torch.float32)
    out = run("narrow", x, 2 * 65536)
    half, brain = out[65536:].view(torch.int16).reshape(2, 65536)
    assert same(out[:65536], tf32(x))
    assert same(half.view(torch.float16), x.half()) and same(brain.view(torch.bfloat16), x.bfloat16())


def test_conversions_widen_exactly(run):
    half, brain = run("widen", size=2 * 65536).reshape(2, 65536)
    assert same(half, PATTERNS.view(torch.float16).float()) and same(brain, PATTERNS.view(torch.bfloat16).float())


kernel("old_memory", "out[blockIdx.x * 64 + t] = memory[t]; memory[t] = 1;", blocks=3)


def test_a_block_finds_nothing_in_shared_memory(run):
    assert run("old_memory", size=192).isnan().all()


kernel(
    "groups",
    """
    const auto record = [&](int row) {
        for (int i = 0; i < 5; ++i) out[row * 160 + i * 32 + t] = memory[i * 32 + t];
    };
    for (int i = 0; i < 5; ++i) {
        cp_async<4>(memory + i * 32 + t, in + i, 4);
        if (i < 4) cp_async_commit();
    }
    record(0);
    cp_async_wait<3>();
    record(1);
    cp_async_wait<1>();
    record(2);
    cp_async_wait<0>();
    record(3);
    cp_async_commit();
    record(4);
    cp_async_wait<0>();
    record(5);
    """,
    threads=32,
    shared=640,
)


def test_copies_arrive_group_by_group_when_they_are_waited_for(run):
    arrived = run("groups", torch.arange(5.0), 6 * 160).reshape(6, 5, 32)
    assert torch.equal(arrived[:, :, :1].expand(6, 5, 32).isnan(), arrived.isnan())
    assert [(~row[:, 0].isnan()).sum() for row in arrived] == [0, 1, 3, 4, 4, 5]
    assert torch.equal(arrived[5], torch.arange(5.0)[:, None].expand(5, 32))
    assert all(torch.equal(row[:n], arrived[5, :n]) for row, n in zip(arrived, (0, 1, 3, 4, 4, 5), strict=True))


kernel(
    "short_copies",
    """
    cp_async<16>(memory + 4 * t, in, t % 17);
    cp_async<4>(memory + 256 + t, in, t % 5);
    cp_async_commit();
    cp_async_wait<0>();
    memcpy(out + 4 * t, memory + 4 * t, 16);
    out[256 + t] = memory[256 + t];
    """,
    shared=1280,
)


def test_what_a_copy_does_not_bring_is_zero(run):
    given = torch.randint(1, 256, (16,), dtype=torch.uint8)
    out = run("short_copies", given, 320).view(torch.uint8)
    for size, copied in ((16, out[:1024].reshape(64, 16)), (4, out[1024:].reshape(64, 4))):
        for t, row in enumerate(copied):
            n = t % (size + 1)
            assert torch.equal(row[:n], given[:n]) and not row[n:].any()


kernel(
    "counted",
    """
    store(out + t, load(in + t));
    load(reinterpret_cast<const uint8_t*>(in));
    cp_async<16>(memory + 4 * t, in, 6);
    cp_async_commit();
    cp_async_wait<0>();
    uint32_t a[4], b[2] = {};
    float d[4] = {};
    ldmatrix<false>(a, memory + 4 * lane);
    for (int i = 0; i < 3; ++i) mma<float16>(d, a, b);
    load_shared(memory + lane);
    """,
    shared=1024,
    blocks=5,
)


def test_counters(run, loaded):
    cuda_on_cpu.take_counters(loaded)
    for _ in range(2):
        run("counted")
    counted = cuda_on_cpu.take_counters(loaded)
    threads, warps = 2 * 5 * 64, 2 * 5 * 2
    assert counted == {
        "bytes_read": threads * (4 + 1 + 6), "bytes_written": threads * 4, "products": warps * 3, "matrices": warps,
        "reads": warps, "conflicts": 0, "launches": 2,
    }  # fmt: skip
    assert not any(cuda_on_cpu.take_counters(loaded).values())


kernel(
    "rows",
    """
    uint32_t r[4];
    ldmatrix<false>(r, memory + lane * words[0] / 4);
    """,
    threads=32,
    shared=8192,
)
kernel("numbers", "load_shared(memory + lane * words[0] / 4);", threads=32, shared=8192)


@pytest.mark.parametrize(
    "name, stride, conflicts",
    [
        ("numbers", 4, 0), ("numbers", 0, 0), ("numbers", 8, 1), ("numbers", 12, 0), ("numbers", 32, 7),
        ("numbers", 128, 31), ("numbers", 132, 0),
        ("rows", 16, 0), ("rows", 32, 4 * 1), ("rows", 64, 4 * 3), ("rows", 128, 4 * 7), ("rows", 128 + 16, 0),
    ],
)  # fmt: skip
def test_conflicts_of_banks(run, loaded, name, stride, conflicts):
    """Lanes, or rows of a matrix, that are ``stride`` bytes apart."""
    cuda_on_cpu.take_counters(loaded)
    run(name, torch.tensor([stride], dtype=torch.int32))
    assert cuda_on_cpu.take_counters(loaded)["conflicts"] == conflicts


kernel(
    "shuffles",
    """
    out[t] = __shfl_sync(0xffffffff, in[t], lane + 5);
    out[64 + t] = __shfl_xor_sync(0xffffffff, in[t], 6);
    out[128 + t] = __shfl_down_sync(0xffffffff, in[t], 3);
    """,
)


def test_shuffles(run):
    warp, lane = torch.arange(64) // 32 * 32, torch.arange(64) % 32
    sources = [(lane + 5) % 32, lane ^ 6, torch.where(lane < 29, lane + 3, lane)]
    for schedule in cuda_on_cpu.SCHEDULES:
        out = run("shuffles", size=192, schedule=schedule).reshape(3, 64)
        assert all(torch.equal(row, (warp + source).float()) for row, source in zip(out, sources, strict=True))


kernel(
    "order",
    """
    for (int i = 0; i < 4; ++i) {
        if (lane == 0) {
            const int n = static_cast<int>(out[0]++);
            out[1 + n] = t / 32;
        }
        __syncwarp();
    }
    """,
    threads=128,
    shared=0,
)


def test_schedules_differ(loaded):
    orders = []
    for schedule in cuda_on_cpu.SCHEDULES:
        out = torch.zeros(17)
        loaded.shim_set_schedule(schedule)
        assert loaded.run_order(None, ctypes.c_void_p(out.data_ptr())) == 0
        assert out[0] == 16
        orders.append(out[1:].tolist())
    forward = [warp for warp in range(4) for _ in range(4)]
    assert orders[0] == forward and orders[1] == forward[::-1]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


#: Kernels with a piece that is wrong or right, those two, and where the right one takes out[t] from.
RACES = {
    "no barrier, forward": ("memory[t] = in[t]; $ out[t] = memory[t | 32];", "", "__syncthreads();", lambda t: t | 32),
    "no barrier, backward": ("memory[t] = in[t]; $ out[t] = memory[t % 32];", "", "__syncthreads();", lambda t: t % 32),
    "no barrier before the next write": (
        "memory[t] = in[t]; __syncthreads(); out[t] = memory[t ^ 32]; $ memory[t] = -1;",
        "", "__syncthreads();", lambda t: t ^ 32,
    ),
    "no barrier of the warp": (
        "memory[t] = in[t]; $ out[t] = memory[t ^ 1];",
        "", "__syncwarp();", lambda t: t ^ 1,
    ),
    "a barrier of the warp only": (
        "memory[t] = in[t]; $ out[t] = memory[t ^ 32];",
        "__syncwarp();", "__syncthreads();", lambda t: t ^ 32,
    ),
    "a copy is read early": (
        "cp_async<4>(memory + t, in + t, 4); cp_async_commit(); $ out[t] = memory[t]; cp_async_wait<0>();",
        "", "cp_async_wait<0>();", lambda t: t,
    ),
    "a copy of another thread is read early": (
        "cp_async<4>(memory + t, in + t, 4); cp_async_commit(); cp_async_wait<0>(); $ out[t] = memory[t ^ 32];",
        "", "__syncthreads();", lambda t: t ^ 32,
    ),
    "the barrier stands before the wait": (
        "cp_async<4>(memory + t, in + t, 4); cp_async_commit(); $ out[t] = memory[t ^ 32];",
        "__syncthreads(); cp_async_wait<0>();", "cp_async_wait<0>(); __syncthreads();", lambda t: t ^ 32,
    ),
    "one group too few is waited for": (
        """cp_async<4>(memory + t, in, 4); cp_async_commit();
        cp_async<4>(memory + t, in + t, 4); cp_async_commit(); $ out[t] = memory[t]; cp_async_wait<0>();""",
        "cp_async_wait<1>();", "cp_async_wait<0>();", lambda t: t,
    ),
    "not committed": (
        """cp_async<4>(memory + t, in + t, 4); $ cp_async_wait<0>();
        out[t] = memory[t]; cp_async_commit(); cp_async_wait<0>();""",
        "", "cp_async_commit();", lambda t: t,
    ),
    "a copy overwrites what is still read": (
        """memory[t] = in[t]; __syncthreads(); out[t] = memory[t ^ 32]; $
        cp_async<4>(memory + t, in, 4); cp_async_commit(); cp_async_wait<0>();""",
        "", "__syncthreads();", lambda t: t ^ 32,
    ),
    "an entry outside of shared memory is read": (
        "memory[t] = in[t]; out[t] = memory[$];", "t + 1 - t % 2", "t", lambda t: t,
    ),
}  # fmt: skip

for index, (body, wrong, right, _) in enumerate(RACES.values()):
    kernel(f"race_{index}_wrong", body.replace("$", wrong))
    kernel(f"race_{index}_right", body.replace("$", right))


@pytest.mark.parametrize("name", RACES)
def test_what_is_not_ordered_shows_under_a_schedule(run, name):
    index, expected = list(RACES).index(name), RACES[name][3](torch.arange(64)).float()
    for schedule in cuda_on_cpu.SCHEDULES:
        assert torch.equal(run(f"race_{index}_right", schedule=schedule), expected), schedule
    assert not all(torch.equal(run(f"race_{index}_wrong", schedule=s), expected) for s in cuda_on_cpu.SCHEDULES[:2])


ALIGNED16 = "cp.async of 16 bytes is not aligned"
BYTES = "cp.async of a wrong number of bytes"
COPY_OUTSIDE = "cp.async writes outside of shared memory"
PENDING = "a thread ends with asynchronous copies that nobody waited for"
WRITE_OUTSIDE = "a write outside of shared memory"
REFUSED = "a launch that some chip refuses"
DIVERGE = "lanes of warp  diverge in an operation of the whole warp"
#: Kernels and what the launch says of them.
ERRORS: dict[str, tuple[Kernel, str]] = {
    "a barrier for one warp": (Kernel("if (t < 32) __syncthreads();"), "a barrier that 32 of 64 threads reach"),
    "a barrier for some lanes": (Kernel("if (t < 40) __syncthreads();"), "a barrier that 40 of 64 threads reach"),
    "an operation for some lanes": (Kernel("if (lane < 31) __syncwarp();"), DIVERGE),
    "a product for some lanes": (
        Kernel("float d[4] = {}; uint32_t a[4] = {}, b[2] = {}; if (lane != 7) mma<bfloat16>(d, a, b);"), DIVERGE,
    ),
    "several operations at once": (Kernel("if (lane < 16) __syncwarp(); else load_shared(memory + lane);"), DIVERGE),
    "an operation beside a barrier": (Kernel("if (lane < 16) { __syncwarp(); } else { __syncthreads(); }"), DIVERGE),
    "products of several types": (
        Kernel("""float d[4] = {}; uint32_t a[4] = {}, b[2] = {};
            if (lane < 16) mma<bfloat16>(d, a, b); else mma<float16>(d, a, b);"""), DIVERGE,
    ),
    "matrices as they are and transposed": (
        Kernel("uint32_t r[4]; if (lane < 16) ldmatrix<true>(r, memory); else ldmatrix<false>(r, memory);"), DIVERGE,
    ),
    "a copy to where it is not aligned": (Kernel("cp_async<16>(memory + 1, in, 16);"), ALIGNED16),
    "a copy from where it is not aligned": (Kernel("cp_async<16>(memory, in + 2, 16);"), ALIGNED16),
    "a small copy that is not aligned": (
        Kernel("cp_async<4>(memory, reinterpret_cast<const char*>(in) + 2, 4);"), "cp.async of 4 bytes is not aligned",
    ),
    "a copy of too many bytes": (Kernel("cp_async<4>(memory, in, 8);"), BYTES),
    "a copy of less than none": (Kernel("cp_async<4>(memory, in, -4);"), BYTES),
    "a copy beyond shared memory": (
        Kernel("cp_async<16>(memory + 4 * t, in, 16); cp_async_commit(); cp_async_wait<0>();"), COPY_OUTSIDE,
    ),
    "a copy before shared memory": (Kernel("cp_async<4>(memory - 1, in, 0);"), COPY_OUTSIDE),
    "a copy that nobody waits for": (
        Kernel("cp_async<4>(memory + t, in, 4); cp_async_commit(); cp_async_commit(); cp_async_wait<2>();"),
        PENDING,
    ),
    "a copy that is not even committed": (
        Kernel("if (t == 9) { cp_async<4>(memory + t, in, 4); } cp_async_wait<0>();"),
        PENDING,
    ),
    "a matrix that is not aligned": (
        Kernel("uint32_t r[4]; ldmatrix<false>(r, memory + 2);"), "ldmatrix is not aligned",
    ),
    "a matrix beyond shared memory": (
        Kernel("uint32_t r[4]; ldmatrix<false>(r, memory + 4 * lane);"), "ldmatrix reads outside of shared memory",
    ),
    "a number beyond shared memory": (Kernel("load_shared(memory + 1 + t);"), "a read outside of shared memory"),
    "a write beyond shared memory": (Kernel("memory[t + 1] = 0;"), WRITE_OUTSIDE),
    "a write before shared memory": (Kernel("if (t == 3) memory[-1] = NAN;"), WRITE_OUTSIDE),
    "a write of the last block": (Kernel("memory[t + blockIdx.x / 2] = 0;", blocks=3), WRITE_OUTSIDE),
    "half a warp": (Kernel("", threads=48), REFUSED),
    "too many threads": (Kernel("", threads=1056), REFUSED),
    "too much shared memory": (Kernel("", shared=100 * 1024), REFUSED),
    "no block": (Kernel("", blocks=0), REFUSED),
}  # fmt: skip
KERNELS |= {f"error_{index}": one for index, (one, _) in enumerate(ERRORS.values())}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_use_ends_the_launch_with_an_error(run, name):
    index, text = list(ERRORS).index(name), ERRORS[name][1]
    for schedule in cuda_on_cpu.SCHEDULES:
        with pytest.raises(RuntimeError) as caught:
            run(f"error_{index}", schedule=schedule)
        assert re.sub(r" \(thread \d+\)|(?<=of warp )\d+", "", str(caught.value)) == text
        assert torch.equal(run("race_0_right"), torch.arange(64.0).int().__or__(32).float())  # the next one runs again


# The real kernels, with a piece of their text replaced.


def wrong_kernels(folder, file: str, piece: str, instead: str) -> ctypes.CDLL:
    for path in cuda_on_cpu.SOURCES.iterdir():
        if path.suffix != ".cu" or path.stem in ("covariance", "errors"):
            shutil.copy(path, folder)
    text = (folder / file).read_text()
    assert piece in text
    (folder / file).write_text(text.replace(piece, instead))
    loaded = cuda_on_cpu.library(folder, ("-O1",))
    for name in ("error_text", "covariance_workspace", "covariance_update", "symmetrize"):
        function = getattr(loaded, f"guardspace_cuda_{name}")
        function.restype, *function.argtypes = (_cuda._TYPES[kind] for kind in _cuda._FUNCTIONS[name])
    return loaded


def update(loaded, C: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """C += Xᵀ diag(mask) X, mirrored."""
    fields = (C, x, mask, *x.shape, C.stride(0), x.stride(0), _cuda.dtype_of(x))
    items = _cuda.packed([fields])
    bytes_ = loaded.guardspace_cuda_covariance_workspace(items, 1)
    workspace = torch.full((bytes_ // 4,), math.nan)
    error = loaded.guardspace_cuda_covariance_update(items, 1, 1.0, workspace.data_ptr(), bytes_, None)
    error = error or loaded.guardspace_cuda_symmetrize(C.data_ptr(), len(C), C.stride(0), None)
    if error:
        raise RuntimeError(loaded.guardspace_cuda_error_text(error).decode())


def check(loaded) -> None:
    """What the tests of the covariance check, in small. Of 2047 tokens no slices are made."""
    for tokens, width, masked in ((200, 40, True), (37, 131, False), (2047, 8, False)):
        surrounded = torch.full((tokens + 2, width + 16), math.nan, dtype=torch.float16)
        x = surrounded[1:-1, 8:-8].copy_(torch.rand(tokens, width) + 0.5)
        mask = torch.rand(tokens) < 0.6 if masked else None
        C = torch.zeros(width, width)
        cuda_on_cpu.take_counters(loaded)
        update(loaded, C, x, mask)
        conflicts = cuda_on_cpu.take_counters(loaded)["conflicts"]
        X = x if mask is None else x[mask]
        wrong = error(C, X.double().T @ X.double())
        assert wrong <= 1e-6, f"an error of {wrong:.1e}"
        assert conflicts == 0, f"{conflicts} conflicts"


WRONG = {
    "nothing": ("covariance.cu", "", "", None),
    "no barrier in the pipeline": ("product.cuh", "__syncthreads();", "", "nan"),
    "no barrier in the mirror": ("covariance.cu", "__syncthreads();", "", "nan"),
    "one group too few is waited for": (
        "product.cuh", "cp_async_wait<T::stages - 2>", "cp_async_wait<T::stages - 1>", "nobody waited for",
    ),
    "one step too few": ("product.cuh", "step < steps; ++step", "step < steps - 1; ++step", "nobody waited for"),
    "one stage too few": ("product.cuh", "% T::stages", "% (T::stages - 1)", "nan"),
    "no diagonal": ("covariance.cu", "c <= r", "c < r", "e[-+]"),
    "a row too many": ("product.cuh", "row + r < from.rows", "row + r <= from.rows", "nan"),
    "the mask of the next token": ("covariance.cu", "load(item.mask + token", "load(item.mask + 1 + token", "e[-+]"),
    "tensor cores accumulate": ("covariance.cu", "multiply_exactly<T, P, P>", "multiply<T, P, P>", "e-0[56]"),
    "swapped registers": (
        "product.cuh", "first[1] = two[1], second[0] = two[2]", "first[1] = two[2], second[0] = two[1]", "e[-+]",
    ),
    "rows without padding": (
        "product.cuh", "stride = cols + (sizeof(E) == 4 && along_sum ? 4 : 8)", "stride = cols", "conflicts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bugs_in_the_kernels_are_found(name, tmp_path):
    *change, text = WRONG[name]
    loaded = wrong_kernels(tmp_path, *change)
    for schedule in cuda_on_cpu.SCHEDULES[:2]:
        loaded.shim_set_schedule(schedule)
        if text is None:
            check(loaded)
        else:
            with pytest.raises((AssertionError, RuntimeError), match=text):
                check(loaded)


# In a process of its own, as a report ends it.
PROBES = {
    "right": Kernel(
        """
        uint32_t a[4], b[2] = {0x3f803f80, 0x3f803f80};
        float d[4] = {};
        cp_async<16>(memory + 4 * lane, in + 4 * lane, 16);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        ldmatrix<true>(a, memory + 4 * lane);
        mma<bfloat16>(d, a, b);
        __syncthreads();
        store(out + t, load(in + t) + __shfl_xor_sync(0xffffffff, d[t % 4], 3));
        """,
        threads=256, shared=512, blocks=2,
    ),
    "fails": Kernel(
        "if (t > 99) __syncthreads(); float d[4]; memcpy(d, in, 16); if (t > 9) __syncwarp();", threads=256
    ),
    "reads": Kernel("store(out + t, load(in + t + 1));", threads=256),
    "writes": Kernel("store(out + t + 1, load(in + t));", threads=256),
    "copies": Kernel(
        "cp_async<4>(memory + t, in + t + 1, 4); cp_async_commit(); cp_async_wait<0>();", threads=256, shared=1024
    ),
    "shifts": Kernel("out[t] = static_cast<float>(1 << (static_cast<int>(in[t]) + 32));", threads=256),
    "remembers": Kernel(
        """
        const float* kept;
        {
            float here[4] = {in[t], in[t], in[t], in[t]};
            kept = here;
            __syncwarp();
            out[t] = here[lane % 4];
        }
        __syncwarp();
        out[t] += kept[lane % 4];
        """,
        threads=256,
    ),
}  # fmt: skip
#: Calls of kernels one after the other -> what the sanitizers must say.
REPORTS = {
    "right fails right fails right": "",
    "right reads": "heap-buffer-overflow.*READ of size 4",
    "fails writes": "heap-buffer-overflow.*WRITE of size 4",
    "right copies": "heap-buffer-overflow.*READ of size 4",
    "fails shifts": "runtime error: shift exponent 32 is too large",
    "right remembers": "stack-use-after-scope",
}
PROGRAM = """
import ctypes, sys
loaded = ctypes.CDLL(sys.argv[1])
given, out = (ctypes.c_float * 256)(), (ctypes.c_float * 256)()
for name in sys.argv[2].split():
    error = getattr(loaded, "run_" + name)(given, out)
    assert (error != 0) == (name == "fails"), (name, error)
print("ended")
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> str:
    """The path of a library that is sanitized, whatever the others are."""
    try:
        sanitize.preload()
    except SystemExit as reason:
        pytest.skip(str(reason))
    return compiled(tmp_path_factory.mktemp("sanitized"), PROBES, *sanitize.FLAGS.split(), "-w")


@pytest.mark.parametrize("calls", REPORTS)
def test_sanitizers_see_into_kernels(sanitized, calls):
    environment = {**os.environ, "LD_PRELOAD": sanitize.preload(), **sanitize.OPTIONS["cuda"]}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, sanitized, calls], env=environment, capture_output=True, text=True
    )
    if REPORTS[calls]:
        assert ended.returncode != 0 and re.search(REPORTS[calls], ended.stderr, re.DOTALL), ended.stderr
        assert "kernels.cu" in ended.stderr
    else:
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ended\n", "")
