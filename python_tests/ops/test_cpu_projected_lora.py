"""The C++ kernels of projected LoRA, on every instruction set, against autograd of the textbook layer in float64."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from backends import ISAS, Guarded, on_all_threads, poison_scratch, same_bits, use_isa, use_threads
from oracle import DTYPES, FLOOR, assert_as_exact_as_plain, error, orthonormal

from guardspace_kernels.ops import projected_lora
from guardspace_kernels.ops._cpu import extension, view
from guardspace_kernels.ops.projected_lora import cpu_kernels

pytestmark = pytest.mark.cpu_kernels

RANKS = (1, 3, 8, 16, 49, 130, 256)
TOKENS = (1, 2, 33, 49, 300)
SIZES = ((1, 1), (7, 5), (48, 49), (97, 33), (33, 98), (145, 130), (260, 101))
#: What is present beside x, W, A and B, in turn.
PARTS = (
    {},
    {"basis": True, "bias": True},
    {"basis": True, "complement": False, "frozen": True},
    {"bias": True, "frozen": True},
)


@pytest.fixture
def backend():
    """The instruction set's fixture insists on the kernels."""


@pytest.fixture(autouse=True)
def _own_product(monkeypatch):
    """The kernels form the base product too, one product after another, whatever is faster."""
    monkeypatch.setattr(cpu_kernels, "uses_own_product", lambda *_: True)
    in_one_call(monkeypatch, False)


def in_one_call(monkeypatch, whole):
    monkeypatch.setattr(cpu_kernels, "tokens_of_one_call", lambda *_: (1, sys.maxsize if whole else 0))


def layer(dtype, r, d_in, d_out, basis=False, complement=True, bias=False, frozen=False, adapter=None):
    """The arguments of one call but x; A and B in ``adapter``, or in at least float32."""
    adapter = adapter or torch.promote_types(dtype, torch.float32)

    def normal(*shape, dtype=dtype):
        t = torch.randn(*shape, dtype=torch.float64).to(dtype)
        return t.abs() if d_in == d_out == 1 else t  # a single sum that cancels says nothing of its error

    return {
        "weight": normal(d_out, d_in),
        "lora_A": normal(r, d_in, dtype=adapter),
        "lora_B": normal(d_out, r, dtype=adapter),
        "basis": orthonormal(d_in, d_in // 3, adapter) if basis else None,
        "complement": complement,
        "scale": 0.7,
        "bias": normal(d_out) if bias else None,
        "frozen_A": normal(r, d_in, dtype=adapter) if frozen else None,
        "frozen_B": normal(d_out, r, dtype=adapter) if frozen else None,
    }


def textbook(x, call, dtype, keep=None):
    """The layer with P folded into A, in ``dtype``; and the leaves x, A, B."""
    leaves = [
        t.detach().to(torch.promote_types(dtype, t.dtype)).requires_grad_() for t in (x, call["lora_A"], call["lora_B"])
    ]
    x, A, B = leaves
    s, basis = call["scale"], call["basis"]
    if basis is not None:
        onto = (A @ basis.to(A.dtype)) @ basis.to(A.dtype).T
        A = A - onto if call["complement"] else onto
    y = x @ call["weight"].to(dtype).T
    if call["bias"] is not None:
        y = y + call["bias"].to(dtype)
    y = y + ((x if keep is None else x * keep.to(dtype)) @ A.to(dtype).T) @ (s * B).to(dtype).T
    if call["frozen_A"] is not None:
        y = y - (x @ call["frozen_A"].to(dtype).T) @ (s * call["frozen_B"]).to(dtype).T
    return y, *leaves


def run(x, call, dy, needs=(True, True, True), **more):
    """y and the gradients of x, A and B (None for those that are not needed)."""
    leaves = [
        t.detach().requires_grad_(need) for t, need in zip((x, call["lora_A"], call["lora_B"]), needs, strict=True)
    ]
    y = projected_lora(leaves[0], **{**call, "lora_A": leaves[1], "lora_B": leaves[2]}, **more)
    if any(needs):
        y.backward(dy)
    return y.detach(), *(leaf.grad for leaf in leaves)


def gradients(y, leaves, dy):
    y.backward(dy.to(y.dtype))
    return y.detach(), *(leaf.grad for leaf in leaves)


def assert_exact(results, x, call, dy, keep=None, case=""):
    plain, truth = textbook(x, call, x.dtype, keep), textbook(x, call, torch.float64, keep)
    plain, truth = gradients(plain[0], plain[1:], dy), gradients(truth[0], truth[1:], dy)
    for name, ours, theirs, true in zip(("y", "dx", "dA", "dB"), results, plain, truth, strict=True):
        if true.numel() == 1:  # no largest of many entries: one rounding to x's dtype is granted
            ours, theirs = ours.to(x.dtype), theirs.to(x.dtype)
        if true.numel() and true.abs().max() > 0:
            assert_as_exact_as_plain(ours, theirs, true, f"{name} of {case}")
        else:
            assert not ours.any(), case


def same(results, others):
    return all(same_bits(a, b) for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank_size_and_number_of_tokens(isa, dtype, r, monkeypatch):
    parts, cases = itertools.cycle(PARTS), {}
    for i, T in enumerate(TOKENS):
        for d_in, d_out in SIZES[i if r <= 16 else i + 1 : i + 3]:  # one number says little of a long sum
            call = layer(dtype, r, d_in, d_out, **next(parts))
            x, dy = torch.randn(T, d_in).to(dtype), torch.randn(T, d_out).to(dtype)
            cases[T, d_in, d_out] = (x, call, dy) if d_in > 1 else (x.abs(), {**call, "frozen_A": None}, dy.abs())
        next(parts)
    results = {case: run(*inputs) for case, inputs in cases.items()}
    for case, inputs in cases.items():
        assert_exact(results[case], *inputs, case=f"T, d_in, d_out = {case}")
    for threads, whole in ((1, True), (4, False)):  # of one call's threads others tell: both give the same bits
        in_one_call(monkeypatch, whole)
        with use_threads(threads):
            for case, inputs in cases.items():
                assert same(run(*inputs), results[case]), (threads, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_base_product_of_pytorch_is_as_exact(isa, dtype, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "uses_own_product", lambda *_: False)
    for (T, d_in, d_out, r), parts in zip(((1, 7, 5, 3), (33, 48, 50, 16), (50, 145, 33, 130)), PARTS[1:], strict=True):
        x, call = torch.randn(T, d_in).to(dtype), layer(dtype, r, d_in, d_out, **parts)
        dy = torch.randn(T, d_out).to(dtype)
        assert_exact(run(x, call, dy), x, call, dy, case=(T, d_in, d_out, r))


class Cpu:
    def __init__(self, *isas, amd=True):
        self.isas, self.made_by_amd = [*isas, "baseline"], amd

    def supported_isas(self):
        return self.isas

    def isa(self):
        return self.isas[0]

    def amd(self):
        return self.made_by_amd


def test_whose_base_product_it_is_follows_the_rule(monkeypatch):
    monkeypatch.undo()
    wide = (torch.float32, torch.float64)
    newest = ("avx512_bf16", "avx512", "avx2")
    for cpu in (Cpu(*newest), Cpu(*newest, amd=False), Cpu("avx2"), Cpu()):
        monkeypatch.setattr(cpu_kernels, "extension", cpu)
        native = "avx512_bf16" in cpu.supported_isas()
        wider = native and cpu.amd()  # than the vectors of MKL

        def ours(dtype, tokens, d_in=576, d_out=576):
            return cpu_kernels.uses_own_product(dtype, tokens, d_in, d_out)

        for dtype in wide:
            assert [ours(dtype, tokens, 576, 1536) for tokens in (1, 127, 341, 342, 4096)] == (
                [False, False, wider, True, True]
            )
            assert ours(dtype, 4096, 4096, 4096) and not ours(dtype, 4096, 512, 511)
            assert ours(dtype, 128) == ours(dtype, 4096, 1536, 1024) == wider
        assert all(ours(torch.float16, tokens, d_out=d_out) for tokens in (1, 4096) for d_out in (1, 4096))
        assert [ours(torch.bfloat16, tokens) for tokens in (31, 32, 127, 128)] == (
            [False, True, True, False] if native else [False, False, False, True]
        )
        assert ours(torch.bfloat16, 4096, 576, 1536) == (not native) == ours(torch.bfloat16, 4096, d_out=255)
        assert ours(torch.bfloat16, 64, d_out=16) is False


def test_which_layers_are_one_call_follows_the_rule(monkeypatch):
    monkeypatch.undo()
    tiles = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(tiles))
    for cpu in (Cpu("avx512_bf16", "avx2"), Cpu("avx512_bf16", "avx2", amd=False), Cpu("avx2")):
        monkeypatch.setattr(cpu_kernels, "extension", cpu)
        cpu_kernels.tokens_of_one_call.cache_clear()

        def most(dtype, d_in, d_out):
            return cpu_kernels.tokens_of_one_call(dtype, d_in, d_out)

        native, never = cpu.isa() == "avx512_bf16", (1, 0)
        if native and cpu.amd():
            assert most(torch.float32, 576, 576) == (11, 2048) and most(torch.float64, 64, 64) == (1, 2048)
        else:
            assert most(torch.float32, 576, 576) == never and most(torch.float64, 64, 64) == (1, 64)
        assert most(torch.float16, 4096, 4096) == (1, sys.maxsize)
        if native:
            assert most(torch.bfloat16, 2048, 2048) == never and most(torch.bfloat16, 512, 512) == (1, 1024)
            tiles.append(True)
            cpu_kernels.tokens_of_one_call.cache_clear()
            assert most(torch.bfloat16, 512, 512) == (1, 16)
            tiles.clear()
        else:
            assert most(torch.bfloat16, 2048, 2048) == (8, sys.maxsize)
            assert most(torch.bfloat16, 128, 128) == (1, sys.maxsize)
    cpu_kernels.tokens_of_one_call.cache_clear()


@pytest.mark.parametrize("what", ["W", "bias", "A", "B", "basis", "h", "y", "down"])
def test_a_call_that_does_not_fit_writes_nothing(what):
    T, d, r, n = 5, 16, 3, 8
    given = {
        "x": torch.randn(T, d), "A": torch.randn(r, d), "B": torch.randn(n, r), "basis": orthonormal(d, 4),
        "complement": True, "W": torch.randn(n, d), "bias": torch.randn(n), "down": torch.zeros(r, d),
        "up": torch.zeros(n, r), "scale": 1.0, "h": torch.zeros(T, r), "y": torch.zeros(T, n), "threads": 1,
    }  # fmt: skip
    assert extension.layer_forward(*given.values())
    backward = {
        "dy": torch.randn(T, n), "x": given["x"], "h": given["h"].clone(), "rank": r, "basis": given["basis"],
        "complement": True, "W": given["W"], "down": given["down"].clone(), "up": given["up"].clone(), "scale": 1.0,
        "dx": torch.zeros(T, d), "A": torch.zeros(r, d), "B": torch.zeros(n, r), "threads": 1,
    }  # fmt: skip
    assert extension.layer_backward(*backward.values())
    written = {name: given[name].zero_() for name in ("down", "up", "h", "y")}
    gradients = {name: backward[name].zero_() for name in ("dx", "A", "B")}
    for wrong in (given[what][:-1], given[what].to("meta"), torch.randn(2, 2, 2, 2), given[what].to(torch.float16)):
        assert not extension.layer_forward(*(given | {what: wrong}).values())
        if what in backward and (what not in "AB" or wrong.dtype != torch.float16):  # gradients of any dtype
            assert not extension.layer_backward(*(backward | {what: wrong}).values())
    assert not any(t.any() for t in (*written.values(), *gradients.values()))


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_of_every_dtype(isa, dtype, adapter, monkeypatch):
    for T, d_in, d_out, r in ((1, 48, 20, 3), (50, 33, 98, 49)):
        call = layer(dtype, r, d_in, d_out, basis=True, frozen=True, adapter=adapter)
        x, dy = torch.randn(T, d_in).to(dtype), torch.randn(T, d_out).to(dtype)
        results = run(x, call, dy)
        assert [t.dtype for t in results] == [dtype, dtype, adapter, adapter]
        rounding = FLOOR[dtype] + FLOOR[adapter]
        truth = textbook(x, call, torch.float64)
        for ours, true in zip(results, gradients(truth[0], truth[1:], dy), strict=True):
            assert error(ours, true) < 4 * rounding
        in_one_call(monkeypatch, True)
        assert same(results, run(x, call, dy))
        in_one_call(monkeypatch, False)


#: From n, which draws a tensor of a shape, and the size.
LAYOUTS = {
    "wide rows": lambda n, T, d: n(T, d + 9)[:, 4 : 4 + d],
    "every third row": lambda n, T, d: n(3 * T, d)[1::3],
    "every second column": lambda n, T, d: n(T, 2 * d)[:, 1::2],
    "column-major": lambda n, T, d: n(d, T).T,
    "one row, repeated": lambda n, T, d: n(1, d).expand(T, d),
    "one entry, repeated": lambda n, T, d: n(1, 1).expand(T, d),
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(isa, layout, dtype, dropout, monkeypatch):
    more = {"dropout": dropout, "seed": 5} if dropout else {}
    for T, d_in, d_out, r in ((1, 7, 5, 3), (50, 97, 49, 49)):

        def laid_out(rows, cols):
            return LAYOUTS[layout](lambda *shape: torch.randn(*shape).to(dtype), rows, cols)

        call, x, dy = layer(dtype, r, d_in, d_out, bias=True, frozen=True), laid_out(T, d_in), laid_out(T, d_out)
        call["weight"], call["bias"] = laid_out(d_out, d_in), laid_out(2, d_out)[1]
        call["lora_A"], call["lora_B"] = laid_out(r, d_in), laid_out(d_out, r)
        plain = {name: t.contiguous() if isinstance(t, torch.Tensor) else t for name, t in call.items()}
        in_one_call(monkeypatch, True)
        ours = run(x, call, dy, **more)
        in_one_call(monkeypatch, False)
        assert same(ours, run(x.contiguous(), plain, dy.contiguous(), **more))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_call_of_no_token_and_of_no_direction(isa, dtype, monkeypatch):
    for T, k in ((0, 4), (1, 0), (33, 33), (50, 0)):
        for complement in (True, False):
            call = layer(dtype, 17, 33, 49, bias=True, frozen=True) | {"complement": complement}
            call["basis"] = orthonormal(33, k, call["lora_A"].dtype)
            x, dy = torch.randn(T, 33).to(dtype), torch.randn(T, 49).to(dtype)
            in_one_call(monkeypatch, True)
            ours = run(x, call, dy)
            in_one_call(monkeypatch, False)
            assert same(ours, run(x, call, dy)), (T, k, complement)
            assert complement or k or not ours[2].any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_subset_of_the_gradients_is_that_of_all(isa, dtype, dropout, monkeypatch):
    x, call, dy = torch.randn(50, 97).to(dtype), layer(dtype, 17, 97, 49, **PARTS[2]), torch.randn(50, 49).to(dtype)
    everything = run(x, call, dy, dropout=dropout, seed=3)
    in_one_call(monkeypatch, True)
    for needs in itertools.product((True, False), repeat=3):
        y, *grads = run(x, call, dy, needs, dropout=dropout, seed=3)
        assert same_bits(y, everything[0])
        for need, grad, expected in zip(needs, grads, everything[1:], strict=True):
            assert same_bits(grad, expected) if need else grad is None


def mask(T, d, p=0.5, seed=3, dtype=torch.float32, threads=2):
    """The factors of dropout: those of ones."""
    ones, out = torch.ones(T, d, dtype=dtype), torch.full((T, d), torch.nan, dtype=dtype)
    extension.dropout(view(ones), view(out), p, seed, False, threads)
    return out


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_in_forward_and_backward_is_the_mask_of_the_kernel(isa, dtype, p):
    """1/(1 − p) of p = 0.5 is exact; the factors of the others are rounded as those of the textbook layer here."""
    for (T, d_in, d_out, r), parts in zip(((1, 7, 5, 3), (33, 48, 50, 16), (50, 145, 33, 130)), PARTS[1:], strict=True):
        x, call = torch.randn(T, d_in).to(dtype), layer(dtype, r, d_in, d_out, **parts)
        dy = torch.randn(T, d_out).to(dtype)
        results = run(x, call, dy, dropout=p, seed=9)
        keep = (mask(T, d_in, p, 9) > 0).double() / (1 - p)
        assert_exact(results, x, call, dy, keep, case=(T, d_in, d_out, r))
        for others in on_all_threads(lambda: run(x, call, dy, dropout=p, seed=9)):  # noqa: B023
            assert same(others, results)


def test_a_mask_depends_on_seed_and_place_alone(isa):
    everything = mask(70, 200)
    with use_isa(ISAS[-1]):
        assert same_bits(mask(70, 200), everything)
    for threads in (1, 2, 4):
        assert same_bits(mask(70, 200, threads=threads), everything)
    for T, d in ((1, 1), (7, 33), (70, 17), (2, 200)):
        for dtype in DTYPES:
            assert same_bits(mask(T, d, dtype=dtype), everything[:T, :d].to(dtype))
    ones, strided = torch.ones(200, 70), torch.full((140, 400), torch.nan)[::2, ::2]
    extension.dropout(view(ones.T), view(strided), 0.5, 3, False, 2)
    assert same_bits(strided, everything) and torch.isnan(strided._base).sum() == 140 * 400 - 70 * 200


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 0.9, 1 - 2.0**-40])
def test_a_mask_drops_its_share_of_every_row_and_column(isa, p):
    T, d = 1500, 97
    factors = mask(T, d, p)
    dropped = (factors == 0).double()
    assert set(factors.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p)).item()}
    sigma = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) <= 5 * sigma / (T * d) ** 0.5
    assert (dropped.mean(0) - p).abs().max() <= 5 * sigma / T**0.5
    assert (dropped.mean(1) - p).abs().max() <= 6 * sigma / d**0.5 + 3 / d


def test_masks_of_neighbouring_rows_columns_and_seeds_are_independent(isa):
    T, d = 1500, 97
    one = mask(T, d) > 0
    seeds = [4, 2, -3, 3 + 2**32, 3 + 2**33, -(2**63), 2**63 - 1]
    others = {
        **{f"row + {n}": (one[:-n], one[n:]) for n in (1, 2, 16, 64)},
        **{f"column + {n}": (one[:, :-n], one[:, n:]) for n in (1, 2, 8, 16, 32)},
        "diagonal": (one[:-1, :-1], one[1:, 1:]),
        **{f"seed {seed}": (one, mask(T, d, seed=seed) > 0) for seed in seeds},
    }
    for name, (a, b) in others.items():
        assert abs((a == b).double().mean() - 0.5) < 5 * 0.5 / a.numel() ** 0.5, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_adds_to_what_is_there_where_it_accumulates(isa, dtype):
    x, start = torch.randn(33, 49).to(dtype), torch.randn(33, 49).to(dtype)
    x[3, 5], start[4, 6] = torch.nan, torch.inf
    keep = mask(33, 49, 0.5, 8, dtype)
    for accumulate in (False, True):
        out = Guarded.around(start)
        inputs = Guarded.around(x)
        extension.dropout(view(inputs.matrix), view(out.matrix), 0.5, 8, accumulate, 2)
        share = torch.where(keep > 0, 2 * x.double(), 0.0)
        expected = (share + start.double() if accumulate else share).to(dtype)
        torch.testing.assert_close(out.matrix, expected, rtol=FLOOR[dtype], atol=FLOOR[dtype], equal_nan=True)
        assert out.intact() and inputs.intact()


def bad_rows(t):
    return (~t.isfinite()).any(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_entry_shows_in_what_it_belongs_to_only(isa, dtype, bad):
    for T, d_in, d_out, r, t, i, o in ((33, 97, 50, 3, 32, 96, 0), (1, 7, 5, 16, 0, 0, 4), (50, 33, 98, 49, 0, 1, 97)):
        x, dy = torch.randn(T, d_in).to(dtype), torch.randn(T, d_out).to(dtype)
        call = layer(dtype, r, d_in, d_out, bias=True, frozen=True)
        broken = x.clone()
        broken[t, i] = bad
        y, dx, dA, dB = run(broken, call, dy)
        assert bad_rows(y) == [t] and dx.isfinite().all()
        assert bad_rows(dA.T) == [i] and (not dA[:, i].isfinite().any()) and bad_rows(dB) == list(range(d_out))
        broken = dy.clone()
        broken[t, o] = bad
        y, dx, dA, dB = run(x, call, broken)
        assert y.isfinite().all() and bad_rows(dx) == [t] and bad_rows(dB) == [o] and bad_rows(dA) == list(range(r))
        call["weight"][o, i] = bad
        y, dx, *_ = run(x, call, dy)
        assert bad_rows(y.T) == [o] and bad_rows(dx.T) == [i]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_and_large_numbers_pass_through(isa, dtype):
    """With W = I the layer is a copy; ``vdpbf16ps`` takes subnormal bfloat16 numbers as zeros."""
    info = torch.finfo(dtype)
    smallest, largest = info.smallest_normal, info.max
    values = [0.0, smallest, -smallest / 2, smallest / 4, largest, -largest, 1.0, largest / 3]
    x = torch.tensor(values * 7, dtype=torch.float64).view(2, -1).to(dtype)
    call = layer(dtype, 2, x.shape[1], x.shape[1], bias=False)
    call["weight"] = torch.eye(x.shape[1], dtype=dtype)
    for name in ("lora_A", "lora_B"):
        call[name].zero_()
    for out in run(x, call, x)[:2]:
        allowed = smallest if dtype == torch.bfloat16 else 0.0
        assert ((out.double() - x.double()).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_the_operands_of_the_product_is_read_or_written(isa, dtype):
    for T, K, N, R, extra in (
        (1, 1, 1, 1, 0),
        (33, 31, 49, 3, 2),
        (50, 97, 98, 17, 16),
        (3, 8, 0, 5, 0),
        (2, 3, 4, 0, 0),
        (5, 0, 7, 2, 1),
        (0, 3, 4, 2, 1),
    ):
        poison_scratch(1)
        sizes = {"x": (T, K), "w": (N, K), "bias": (1, N), "down": (R, K), "up": (N, R), "h": (T, R), "y": (T, N)}
        m = {name: Guarded.around(torch.randn(*size).to(dtype)) for name, size in sizes.items()}
        h0, threads = m["h"].matrix.clone(), 1 + extra % 3

        def product(down, bias):
            names = ("x", "w", bias, down, "up", "h", "y")
            extension.lora_linear(*(name and view(m[name].matrix) for name in names), threads)  # noqa: B023
            assert all(t.intact() for t in m.values())  # noqa: B023
            assert all(t.matrix.isfinite().all() for t in m.values())  # noqa: B023

        def check(bias):
            x, w, up, h = (m[name].matrix.double() for name in ("x", "w", "up", "h"))  # noqa: B023
            truth = x @ w.T + h @ up.T + (m["bias"].matrix.double() if bias else 0)  # noqa: B023
            y = m["y"].matrix  # noqa: B023
            assert error(y, truth) <= FLOOR[dtype] * 2 if truth.any() else not y.any()

        product(None, "bias")
        assert same_bits(m["h"].matrix, h0)
        check(True)
        product("down", None)
        check(False)
        if R:
            h = m["x"].matrix.double() @ m["down"].matrix.double().T
            assert error(m["h"].matrix, h) <= FLOOR[dtype] * 2 if h.any() else not m["h"].matrix.any()


@pytest.mark.parametrize("out_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_outer_product_of_every_size(isa, dtype, out_dtype):
    """More tokens than are summed at a time (512 or 1024), and a result of either order in memory."""
    out_dtype = out_dtype or dtype
    for T, r, d in ((0, 3, 5), (1, 1, 1), (33, 16, 49), (1025, 49, 97), (1500, 3, 260), (513, 130, 7)):
        h, x = (Guarded.around(torch.randn(T, n).to(dtype)) for n in (r, d))
        truth = -0.3 * (h.matrix.double().T @ x.matrix.double())
        results = []
        for transposed, threads in itertools.product((False, True), (1, 2, 4)):
            poison_scratch(1)
            out = Guarded.around(torch.zeros(*((d, r) if transposed else (r, d)), dtype=out_dtype))
            target = out.matrix.T if transposed else out.matrix
            extension.outer_product(view(h.matrix), view(x.matrix), view(target), -0.3, threads)
            assert out.intact() and h.intact() and x.intact()
            results.append(target)
        if T:
            assert error(results[0], truth) <= FLOOR[out_dtype] * 2
        else:
            assert not results[0].any()
        assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_weights_and_tokens_than_are_packed_at_a_time(isa, dtype):
    """4 MB of packed weights and 16 MB of tokens at a time: here several of both."""
    T, d_out = (400, 120) if dtype == torch.float32 else (720, 200)
    x, call = torch.randn(T, 12_001).to(dtype), layer(dtype, 3, 12_001, d_out, bias=True)
    dy = torch.randn(T, d_out).to(dtype)
    results = run(x, call, dy)
    assert_exact(results, x, call, dy)
    parts = {name: call[name][-7:] for name in ("weight", "lora_B", "bias")}
    assert same_bits(projected_lora(x[-50:], **{**call, **parts}), results[0][-50:, -7:])
