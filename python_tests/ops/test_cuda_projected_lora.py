"""The CUDA kernels of projected LoRA, compiled for the CPU, against the textbook layer in float64."""

from __future__ import annotations

import itertools

import cuda_on_cpu
import pytest
import torch
from backends import automatic, cuda_kernels, same_bits  # noqa: F401
from oracle import FLOOR, assert_as_exact_as_plain, error
from test_cpu_projected_lora import LAYOUTS, PARTS, assert_exact, bad_rows, gradients, layer, run, same, textbook

from guardspace_kernels import dispatch
from guardspace_kernels.ops import projected_lora
from guardspace_kernels.ops.projected_lora import cuda_kernels as kernels
from guardspace_kernels.ops.projected_lora import gpu

pytestmark = [automatic, pytest.mark.cuda_on_cpu, pytest.mark.usefixtures("called")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANKS = (1, 3, 16, 20, 70)
#: T, d_in, d_out: one tile and several, aligned and ragged.
SIZES = ((70, 97, 40), (1, 33, 20), (64, 64, 128), (130, 40, 136))
FORMS = ("fused", "two calls")


@pytest.fixture(params=["fused"])
def form(request):
    return request.param


@pytest.fixture
def called(cuda_kernels, form, monkeypatch):  # noqa: F811
    """The functions that are called; the base product has the form that the test asks for."""
    monkeypatch.setattr(gpu, "library_from", lambda *_: 0 if form == "two calls" else 2**31)
    monkeypatch.setattr(gpu, "OWN_OUTER_FROM", 0)
    names, call = [], kernels.call

    def counted(name, *arguments):
        names.append(name.removeprefix("lora_"))
        call(name, *arguments)

    monkeypatch.setattr(kernels, "call", counted)
    return names


both_forms = pytest.mark.parametrize("form", FORMS, indirect=True)


def drawn(T, d_in, d_out, r, dtype, **parts):
    return torch.randn(T, d_in).to(dtype), layer(dtype, r, d_in, d_out, **parts), torch.randn(T, d_out).to(dtype)


def philox(counters, seed):
    """Philox4x32-10 (Salmon et al. 2011) of counters (n, 4), as Python numbers."""
    words = []
    for counter in counters:
        c, key = list(counter), [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [b >> 32 ^ c[1] ^ key[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ key[1], a & 0xFFFFFFFF]
            key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
        words.append(c)
    return torch.tensor(words)


def mask(T, d, p, seed):
    counters = [(four, row, 0, 0) for row in range(T) for four in range(-(-d // 4))]
    words = philox(counters, seed & (2**64 - 1)).reshape(T, -1)[:, :d]
    return words >> 1 >= gpu.dropout_of(p, torch.tensor(seed), torch.device("cpu")).threshold


def test_philox_is_the_published_generator():
    """Known answers of Random123, Salmon et al. 2011."""
    assert philox([(0, 0, 0, 0)], 0)[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**32 - 1
    assert philox([(ones,) * 4], 2**64 - 1)[0].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@both_forms
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank_size_and_number_of_tokens(dtype, r, called, form):
    start = RANKS.index(r) + DTYPES.index(dtype) + FORMS.index(form)
    for i in (start, start + 1):
        size, parts = SIZES[i % len(SIZES)], PARTS[(i + r) % len(PARTS)]
        x, call, dy = drawn(*size, r, dtype, **parts)
        called.clear()
        results = run(x, call, dy)
        assert_exact(results, x, call, dy, case=size)
        base = ["linear"] * (form == "fused")
        gradient_of_B = "down" if dtype != torch.float32 and r < 32 else "outer"
        assert called == [*base, gradient_of_B, *base, "outer"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_blocks_of_tokens_than_share_weights(dtype):
    T = 9 * (64 if dtype == torch.float32 else 128) + 1
    x, W, bias, h, up = (torch.randn(*size).to(dtype) for size in ((T, 17), (130, 17), (130,), (T, 3), (3, 130)))
    for weight in (W, W.T.contiguous().T):
        y = kernels._linear(x, weight, bias, h, up)
        truth = x.double() @ W.double().T + bias.double() + h.double() @ up.double()
        assert error(y, truth) <= FLOOR[dtype]


@pytest.mark.parametrize("dtype, dropout, r", [(torch.bfloat16, 0.0, 3), (torch.float32, 0.5, 20)], ids=str)
def test_sums_over_slices_have_one_order(dtype, dropout, r, cuda_kernels):  # noqa: F811
    """Three slices of tokens for dA, several slices of d for h and dh, and many blocks of tokens for dB."""
    T = 1600
    x, call, dy = drawn(T, 70, 70, r, dtype)
    results = run(x, call, dy, dropout=dropout, seed=2)
    assert_exact(results, x, call, dy, factors(T, 70, dropout, 2))
    cuda_on_cpu.take_counters(cuda_kernels)
    assert same(run(x, call, dy, dropout=dropout, seed=2), results)
    # linear twice, outer or down and outer, and the sums of their slices
    assert cuda_on_cpu.take_counters(cuda_kernels)["launches"] == (8 if dropout else 6)


def factors(T, d, p, seed):
    return mask(T, d, p, seed).double() / (1 - p) if p else None


@pytest.mark.parametrize("basis", [None, "range", "null"])
@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_of_every_dtype(dtype, adapter, basis):
    parts = {"basis": basis is not None, "complement": basis != "null"}
    x, call, dy = drawn(50, 33, 40, 3, dtype, frozen=True, adapter=adapter, **parts)
    results = run(x, call, dy)
    assert [t.dtype for t in results] == [dtype, dtype, adapter, adapter]
    truth = textbook(x, call, torch.float64)
    for ours, true in zip(results, gradients(truth[0], truth[1:], dy), strict=True):
        assert error(ours, true) < 4 * (FLOOR[dtype] + FLOOR[adapter])


def test_a_basis_without_columns_projects_nothing():
    x, call, dy = drawn(20, 33, 40, 3, torch.float32)
    everything = run(x, call, dy)
    assert same(run(x, {**call, "basis": torch.empty(33, 0)}, dy), everything)


@both_forms
@pytest.mark.parametrize("dtype, dropout", [(torch.float32, 0.5), (torch.bfloat16, 0.0)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout, dtype, dropout):
    more = {"dropout": dropout, "seed": 5} if dropout else {}

    def laid_out(rows, cols):
        return LAYOUTS[layout](lambda *shape: torch.randn(*shape).to(dtype), rows, cols)

    for T, d_in, d_out, r in ((1, 33, 20, 3), (70, 97, 40, 3)):
        call, x, dy = layer(dtype, r, d_in, d_out, bias=True, frozen=True), laid_out(T, d_in), laid_out(T, d_out)
        call["weight"], call["bias"] = laid_out(d_out, d_in), laid_out(2, d_out)[1]
        call["lora_A"], call["lora_B"] = laid_out(r, d_in), laid_out(d_out, r)
        plain = {name: t.contiguous() if isinstance(t, torch.Tensor) else t for name, t in call.items()}
        results, others = run(x, call, dy, **more), run(x.contiguous(), plain, dy.contiguous(), **more)
        for ours, theirs in zip(results, others, strict=True):  # PyTorch's products sum in another order
            assert_as_exact_as_plain(ours, theirs, theirs.double())


@both_forms
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_token_and_leading_dimensions(dropout):
    call = layer(torch.float32, 3, 33, 40, basis=True, bias=True, frozen=True)
    for shape in ((0,), (2, 0), (2, 3, 5), ()):
        x, dy = torch.randn(*shape, 33), torch.randn(*shape, 40)
        results = run(x, call, dy, dropout=dropout, seed=1)
        assert [t.shape for t in results] == [dy.shape, x.shape, (3, 33), (40, 3)]
        if x.numel():
            flat = run(x.reshape(-1, 33), call, dy.reshape(-1, 40), dropout=dropout, seed=1)
            assert same((results[0].reshape(-1, 40), results[1].reshape(-1, 33), *results[2:]), flat)
        else:
            assert not results[2].any() and not results[3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_token_of_16_bits_leaves_no_gradient(dtype):
    x, call, dy = drawn(0, 33, 40, 3, dtype)
    assert not any(t.any() for t in run(x, call, dy))


@pytest.mark.parametrize("dtype, dropout", [(torch.float32, 0.3), (torch.bfloat16, 0.0)], ids=str)
def test_every_subset_of_the_gradients_is_that_of_all(dtype, dropout):
    x, call, dy = drawn(20, 33, 20, 3, dtype, **PARTS[2])
    everything = run(x, call, dy, dropout=dropout, seed=3)
    for needs in itertools.product((True, False), repeat=3):
        y, *grads = run(x, call, dy, needs, dropout=dropout, seed=3)
        assert same_bits(y, everything[0])
        for need, grad, expected in zip(needs, grads, everything[1:], strict=True):
            if need:  # what is read once or twice is summed in different orders
                assert_as_exact_as_plain(grad, expected, expected.double())
            else:
                assert grad is None


@both_forms
@pytest.mark.parametrize("dtype, p", [(torch.float32, 0.1), (torch.bfloat16, 0.5), (torch.float16, 0.9)], ids=str)
def test_forward_and_both_gradients_drop_the_entries_that_philox_says(dtype, p, called, form):
    for size, r, parts in zip(SIZES[:3], (3, 16, 40), PARTS[1:], strict=True):
        x, call, dy = drawn(*size, r, dtype, **parts)
        called.clear()
        results = run(x, call, dy, dropout=p, seed=9)
        assert_exact(results, x, call, dy, factors(*size[:2], p, 9), case=(size, r))
        assert called[0] == "down" and called[-1] == "outer"
        # In two calls a launch without a base product adds dropout's share of dx.
        assert called.count("linear") == (2 if form == "fused" else 1)


@pytest.mark.parametrize("seed", [0, -1, 3 + 2**32, -(2**63), 2**63 - 1])
def test_every_bit_of_the_seed_counts(seed):
    x, call, dy = drawn(20, 48, 20, 3, torch.float32)
    assert_exact(run(x, call, dy, dropout=0.5, seed=seed), x, call, dy, factors(20, 48, 0.5, seed))


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bad_entry_shows_in_what_it_belongs_to_only(dtype):
    for T, d_in, d_out, r, t, i, o in ((130, 97, 150, 3, 129, 96, 0), (1, 33, 20, 16, 0, 0, 4)):
        x, call, dy = drawn(T, d_in, d_out, r, dtype, bias=True, frozen=True)
        broken = x.clone()
        broken[t, i] = torch.nan
        y, dx, dA, dB = run(broken, call, dy)
        assert bad_rows(y) == [t] and dx.isfinite().all()
        assert bad_rows(dA.T) == [i] and bad_rows(dB) == list(range(d_out))
        broken = dy.clone()
        broken[t, o] = torch.inf
        y, dx, dA, dB = run(x, call, broken)
        assert y.isfinite().all() and bad_rows(dx) == [t] and bad_rows(dB) == [o] and bad_rows(dA) == list(range(r))
        call["weight"][o, i] = torch.nan
        y, dx, *_ = run(x, call, dy)
        assert bad_rows(y.T) == [o] and bad_rows(dx.T) == [i]


def test_dropped_entries_do_not_leak(monkeypatch):
    x, call, dy = drawn(70, 97, 40, 3, torch.float32)
    monkeypatch.setattr(kernels._PASSES, "linear", lambda x, weight, bias, h, up, *_: h @ up)  # W sees all of x
    dropped = ~mask(70, 97, 0.5, 9)
    y, _, dA, dB = run(x, call, dy, (False, True, True), dropout=0.5, seed=9)
    assert dropped.any()
    x[dropped] = torch.nan
    others = run(x, call, dy, (False, True, True), dropout=0.5, seed=9)
    assert same((y, dA, dB), (others[0], *others[2:]))


PRODUCT = 16 * 8 * 16


@pytest.mark.parametrize("by_rows", [True, False], ids=["W by rows", "W by columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_base_product_costs(dtype, by_rows, cuda_kernels):  # noqa: F811
    T, K, N, r = 128, 96, 256, 16
    x, W, h, up = (torch.randn(*size).to(dtype) for size in ((T, K), (N, K), (T, r), (r, N)))
    cuda_on_cpu.take_counters(cuda_kernels)
    kernels._linear(x, W if by_rows else W.T.contiguous().T, None, h, up)
    counted = cuda_on_cpu.take_counters(cuda_kernels)
    tile, factor = (64, 6) if dtype == torch.float32 else (128, 1)  # three products of half the depth
    assert counted["products"] == factor * T * N * (K + 32) // PRODUCT and counted["conflicts"] == 0
    entry = x.element_size()
    assert counted["bytes_read"] == T * N * (2 * (K + r)) // tile * entry  # each tile reads its rows and columns
    assert counted["bytes_written"] == T * N * entry


@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_skinny_products_cost(dtype, r, cuda_kernels):  # noqa: F811
    T, d = 128, 256
    x, e, w = (torch.randn(*size).to(dtype) for size in ((T, d), (T, r), (r, d)))
    entry, factor = x.element_size(), 6 if dtype == torch.float32 else 1
    nothing = gpu.dropout_of(0.0, None, x.device)
    cuda_on_cpu.take_counters(cuda_kernels)
    kernels._outer(e, x)
    counted = cuda_on_cpu.take_counters(cuda_kernels)
    assert counted["products"] == factor * T * d * r // PRODUCT and counted["conflicts"] == 0
    columns = 64 if dtype == torch.float32 else 128
    assert counted["bytes_read"] == T * (d + r * d // columns) * entry
    assert counted["bytes_written"] == 4 * r * d

    with_outer = dtype != torch.float32
    kernels._down(x, w, nothing, e if with_outer else None)
    counted = cuda_on_cpu.take_counters(cuda_kernels)
    assert counted["products"] == factor * (1 + with_outer) * T * d * r // PRODUCT and counted["conflicts"] == 0
    step, rows = (64 if with_outer and r == 16 else 32), 128 if with_outer else 64
    slices, high = min(8, d // step), T // rows
    assert slices > 1
    read = T * d + high * r * d + with_outer * slices * T * r  # x once
    assert counted["bytes_read"] == read * entry + 4 * slices * T * r
    assert counted["bytes_written"] == 4 * slices * T * r + T * r * entry + with_outer * 4 * r * d


def test_other_dtypes_are_refused_and_left_to_the_reference(called):
    x, call, dy = drawn(5, 16, 16, 2, torch.float64)
    assert_exact(run(x, call, dy), x, call, dy)
    assert not called
    arguments = (x, call["weight"], call["lora_A"], call["lora_B"], None)
    assert dispatch.can_use("projected_lora", *arguments, backend="cuda") == (
        False,
        "a tensor is torch.float64; the CUDA kernels compute in float32",
    )


def test_the_ops_are_registered_as_torch_wants_them():
    x, call, dy = drawn(20, 33, 40, 3, torch.bfloat16, basis=True, frozen=True)
    layer_of = [call[name] for name in ("weight", "lora_A", "lora_B", "basis", "complement", "scale")]
    pair, dropout = [call["frozen_A"], call["frozen_B"]], [0.5, torch.tensor(3)]
    forward, backward = (getattr(torch.ops.guardspace, f"projected_lora_{name}") for name in ("forward", "backward"))
    _, h, A_P = forward(x, *layer_of, None, *pair, *dropout, None)
    torch.library.opcheck(backward.default, (dy, x, h, A_P, *layer_of, *pair, *dropout, None, [True] * 3, None))
    for leaf in (x, call["lora_A"], call["lora_B"]):
        leaf.requires_grad_()
    torch.library.opcheck(forward.default, (x, *layer_of, None, *pair, *dropout, None))


def test_compiled_as_a_full_graph(called):
    x, call, dy = drawn(20, 33, 40, 3, torch.float32, basis=True, bias=True)
    expected = run(x, call, dy)
    called.clear()
    leaves = [t.detach().requires_grad_() for t in (x, call["lora_A"], call["lora_B"])]

    def layer_of(x, A, B):
        return projected_lora(x, **{**call, "lora_A": A, "lora_B": B})

    y = torch.compile(layer_of, fullgraph=True, backend="aot_eager")(*leaves)
    y.backward(dy)
    assert same((y.detach(), *(leaf.grad for leaf in leaves)), expected) and called
