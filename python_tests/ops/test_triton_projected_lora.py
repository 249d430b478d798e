"""The Triton kernels of projected LoRA, under Triton's interpreter, against the textbook layer in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import automatic, same_bits, triton_kernels  # noqa: F401
from oracle import FLOOR, assert_as_exact_as_plain, error
from test_cpu_projected_lora import LAYOUTS, PARTS, assert_exact, bad_rows, gradients, layer, run, same, textbook

from guardspace_kernels import dispatch
from guardspace_kernels.ops import _triton_table, projected_lora
from guardspace_kernels.ops.projected_lora import gpu

pytest.importorskip("triton_interpreter", reason="Triton is not installed")
triton, tl, kernels = map(
    pytest.importorskip,
    ("triton", "triton.language", "guardspace_kernels.ops.projected_lora.triton_kernels"),
)
_kept = kernels._kept

pytestmark = [automatic, pytest.mark.usefixtures("triton_kernels", "launched")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANKS = (1, 3, 16, 20, 40)
#: T, d_in, d_out: one tile and several, aligned and ragged.
SIZES = ((70, 97, 40), (1, 33, 20), (64, 64, 128), (130, 40, 70))
FORMS = ("fused", "two calls")


@pytest.fixture(params=["fused"])
def form(request):
    return request.param


@pytest.fixture
def launched(triton_kernels, form, monkeypatch):  # noqa: F811
    """What is launched, as (kernel, variant); the base product has the form that the test asks for."""
    monkeypatch.setattr(gpu, "library_from", lambda *_: 0 if form == "two calls" else 2**31)
    monkeypatch.setattr(gpu, "OWN_OUTER_FROM", 0)
    calls, launch = [], kernels.launch

    def counted(function, row, grid, arguments, **variant):
        calls.append((row.kernel.split(".")[1].removesuffix("_float32"), variant))
        launch(function, row, grid, arguments, **variant)

    monkeypatch.setattr(kernels, "launch", counted)
    return calls


both_forms = pytest.mark.parametrize("form", FORMS, indirect=True)


def drawn(T, d_in, d_out, r, dtype, **parts):
    return torch.randn(T, d_in).to(dtype), layer(dtype, r, d_in, d_out, **parts), torch.randn(T, d_out).to(dtype)


@triton.jit
def keep(OUT, SEED, threshold, T, d, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    i = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    start = tl.program_id(1) * BLOCK_D
    m = start + tl.arange(0, BLOCK_D)
    tl.store(OUT + i * d + m, _kept(SEED, threshold, i, start, BLOCK_D), mask=(i < T) & (m < d))


def mask(T, d, p=0.5, seed=3, block=128):
    out, dropout = torch.empty(T, d, dtype=torch.bool), gpu.dropout_of(p, torch.tensor(seed), torch.device("cpu"))
    keep[triton.cdiv(T, block), triton.cdiv(d, block)](
        out, dropout.seed, dropout.threshold, T, d, BLOCK_T=block, BLOCK_D=block
    )
    return out


def factors(T, d, p, seed):
    return mask(T, d, p, seed).double() / (1 - p) if p else None


@both_forms
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank_size_and_number_of_tokens(dtype, r, launched, form):
    start = RANKS.index(r) + DTYPES.index(dtype) + FORMS.index(form)
    for i in (start, start + 1):
        size, parts = SIZES[i % len(SIZES)], PARTS[(i + r) % len(PARTS)]
        x, call, dy = drawn(*size, r, dtype, **parts)
        launched.clear()
        results = run(x, call, dy)
        assert_exact(results, x, call, dy, case=size)
        one_pass = dtype != torch.float32 and r < 32
        base = [[("linear", {"ROWS": rows})] if form == "fused" else [] for rows in (True, False)]
        gradient_of_B = ("down", {"OUTER": True}) if one_pass else ("outer", {"DROPOUT": False})
        assert launched == [*base[0], gradient_of_B, *base[1], ("outer", {"DROPOUT": False})]


def rows_of(kernel):
    """Those that differ in their tiles."""
    return [row for row in _triton_table.ROWS if row.kernel == f"projected_lora.{kernel}" and "sm80" in row.targets]


@pytest.mark.parametrize("row", rows_of("linear"), ids=lambda row: row.key)
def test_more_blocks_of_tokens_than_share_weights_by_every_row(row):
    T, N = 9 * row.constants["BLOCK_T"] + 1, row.constants["BLOCK_N"] + 1
    x, W, bias, h, up = (torch.randn(*size).bfloat16() for size in ((T, 33), (N, 33), (N,), (T, 3), (3, N)))
    y = kernels._tiles(row, x, W, bias, h, up, x.new_empty(T, N), 0, gpu.dropout_of(0.0, None, x.device))
    assert error(y, x.double() @ W.double().T + bias.double() + h.double() @ up.double()) <= FLOOR[torch.bfloat16]


@pytest.mark.parametrize("dtype, dropout", [(torch.bfloat16, 0.0), (torch.float32, 0.5)], ids=str)
def test_sums_over_slices_have_one_order(dtype, dropout, monkeypatch):
    """More slices of tokens for dA than blocks of them, two slices of d for h and dh, two blocks of tokens for dB."""
    monkeypatch.setattr(kernels, "_LEAST_TOKENS", 16)
    x, call, dy = drawn(150, 70, 70, 3, dtype)
    results = run(x, call, dy, dropout=dropout, seed=2)
    assert_exact(results, x, call, dy, factors(150, 70, dropout, 2))
    assert same(run(x, call, dy, dropout=dropout, seed=2), results)


def test_the_kernels_run_where_nothing_insists_on_them(launched):
    assert dispatch.requested_backend() is None
    run(*drawn(3, 16, 16, 2, torch.float32))
    assert launched


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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_that_read_one_input_as_one(dtype):
    sizes, r, d_in, T = [40, 7, 33], 5, 48, 70
    parts = [layer(dtype, r, d_in, size, bias=True, frozen=True) for size in sizes]
    names = ("weight", "bias", "lora_A", "lora_B", "frozen_A", "frozen_B")
    basis = layer(dtype, r, d_in, 5, basis=True)["basis"]
    stacked = {**parts[0], "basis": basis, **{name: torch.cat([part[name] for part in parts]) for name in names}}
    x, dy = torch.randn(T, d_in).to(dtype), torch.randn(T, sum(sizes)).to(dtype)
    y, dx, dA, dB = run(x, stacked, dy, output_sizes=sizes)
    dxs = []
    for part, its_y, its_dy, its_dA, its_dB in zip(
        parts, y.split(sizes, 1), dy.split(sizes, 1), dA.split(r), dB.split(sizes), strict=True
    ):
        call = {**part, "basis": basis}
        truth = gradients(*(lambda t: (t[0], t[1:]))(textbook(x, call, torch.float64)), its_dy)
        dxs.append(truth[1])
        for ours, true in zip((its_y, its_dA, its_dB), (truth[0], *truth[2:]), strict=True):
            assert error(ours, true) <= 4 * FLOOR[dtype]
    assert error(dx, sum(dxs)) <= 4 * FLOOR[dtype]


@both_forms
@pytest.mark.parametrize("dtype, p", [(torch.float32, 0.1), (torch.bfloat16, 0.5), (torch.float16, 0.9)], ids=str)
def test_forward_and_both_gradients_drop_the_same_entries(dtype, p, launched, form):
    for size, r, parts in zip(SIZES[:3], (3, 16, 40), PARTS[1:], strict=True):
        x, call, dy = drawn(*size, r, dtype, **parts)
        launched.clear()
        results = run(x, call, dy, dropout=p, seed=9)
        assert_exact(results, x, call, dy, factors(*size[:2], p, 9), case=(size, r))
        assert launched[0] == ("down", {"OUTER": False}) and launched[-1] == ("outer", {"DROPOUT": True})
        # In two calls a launch without a base product adds dropout's share of dx.
        assert [call for call in launched if call[0] == "linear"] == (
            [("linear", {"ROWS": True}), ("linear", {"ROWS": False})][form == "two calls" :]
        )


def test_a_mask_depends_on_seed_and_place_alone():
    everything = mask(150, 200)
    for T, d, block in ((150, 200, 16), (150, 200, 64), (7, 33, 128), (2, 200, 32)):
        assert torch.equal(mask(T, d, block=block), everything[:T, :d])


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 1 - 2.0**-40])
def test_a_mask_drops_its_share_of_every_row_and_column(p):
    T, d = 1500, 200
    dropped = (~mask(T, d, p)).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) <= 5 * sigma / (T * d) ** 0.5
    assert (dropped.mean(0) - p).abs().max() <= 5 * sigma / T**0.5 + 3 / T
    assert (dropped.mean(1) - p).abs().max() <= 6 * sigma / d**0.5 + 3 / d


def test_masks_of_neighbouring_rows_columns_and_seeds_are_independent():
    T, d = 1500, 200
    one = mask(T, d)
    seeds = [4, 2, -3, 3 + 2**32, 3 + 2**33, -(2**63), 2**63 - 1]
    others = {
        **{f"row + {n}": (one[:-n], one[n:]) for n in (1, 2, 16, 64, 128)},
        **{f"column + {n}": (one[:, :-n], one[:, n:]) for n in (1, 2, 3, 4, 8, 16, 32, 64)},
        "diagonal": (one[:-1, :-1], one[1:, 1:]),
        **{f"seed {seed}": (one, mask(T, d, seed=seed)) for seed in seeds},
    }
    for name, (a, b) in others.items():
        assert abs((a == b).double().mean() - 0.5) < 5 * 0.5 / a.numel() ** 0.5, name


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
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
    monkeypatch.setattr(kernels._PASSES, "linear", lambda x, weight, bias, h, up, *_: h @ up)  # W sees every entry of x
    dropped = ~mask(70, 97, 0.5, 9)
    y, _, dA, dB = run(x, call, dy, (False, True, True), dropout=0.5, seed=9)
    assert dropped.any()
    x[dropped] = torch.nan
    others = run(x, call, dy, (False, True, True), dropout=0.5, seed=9)
    assert same((y, dA, dB), (others[0], *others[2:]))


def test_a_seed_that_a_graph_would_keep_is_refused(monkeypatch):
    seed, device = torch.tensor(3), torch.device("meta")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gpu.dropout_of(0.5, seed, device).seed.device == device
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu.dropout_of(0.5, seed, seed.device).seed is seed
    with pytest.raises(RuntimeError, match=r"seed is on cpu.*CUDA graph.*every replay; pass a tensor on meta"):
        gpu.dropout_of(0.5, seed, device)


def test_whose_base_product_it_is_follows_the_rule(monkeypatch):
    monkeypatch.undo()
    half, full = torch.bfloat16, torch.float32
    assert [gpu.library_from(half, 64, chip) for chip in ("sm80", "sm89", "sm120")] == [2049] * 3
    assert [gpu.library_from(half, 64, chip) for chip in ("sm90", "sm100", "gfx942")] == [0, 1025, 1025]
    monkeypatch.setattr(gpu, "allows_tf32", lambda: False)
    assert [gpu.library_from(full, 64, chip) for chip in ("sm80", "sm90", "gfx942")] == [2**31, 2**31, 1025]
    monkeypatch.setattr(gpu, "allows_tf32", lambda: True)
    assert [gpu.library_from(full, 64, chip) for chip in ("sm80", "sm90", "gfx942")] == [0, 0, 1025]


def test_the_setting_that_allows_tf32_is_read_where_it_is():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(precision)
            assert gpu.allows_tf32() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("K, T, forms", [(2048, 64, ["linear"]), (2049, 64, []), (2048, 63, [])])
def test_long_sums_and_few_tokens_take_the_library(K, T, forms, monkeypatch):
    monkeypatch.undo()
    chosen, choose = [], kernels.choose

    def recorded(kernel, *rest):
        row = choose(kernel, *rest)
        chosen.extend([kernel.split(".")[1]] if row.constants else [])
        return row

    monkeypatch.setattr(kernels, "choose", recorded)
    monkeypatch.setattr(kernels, "_tiles", lambda row, x, weight, bias, h, up, y, *_: y)
    x, W, h, up = (torch.zeros(*size, dtype=torch.bfloat16) for size in ((T, K), (16, K), (T, 1), (1, 16)))
    kernels._linear(x, W, None, h, up)
    assert chosen == forms


def test_the_time_that_each_form_takes_may_decide(monkeypatch):
    """Both are tried, on a stand-in for a GPU; the library's product is one of the rows to choose from."""
    tried = []

    def choose(kernel, device, sizes=(), trial=None, among=None):
        if among is None:
            return kernels.rows_for(kernel, "sm80")[0]
        tried.extend((row.constants.get("BLOCK_T"), trial(row)) for row in among)
        return among[0]

    monkeypatch.setattr(kernels, "choose", choose)
    x, call, _ = drawn(20, 33, 40, 3, torch.float32, frozen=True, bias=True)
    h, up = torch.randn(20, 3), torch.randn(3, 40)
    y = kernels._linear(x, call["weight"], call["bias"], h, up)
    truth = x.double() @ call["weight"].double().T + call["bias"].double() + h.double() @ up.double()
    assert [block for block, _ in tried] == [None, 128]
    assert all(error(result, truth) <= FLOOR[torch.float32] for result in (y, *(result for _, result in tried)))


def test_other_dtypes_are_refused_and_left_to_the_reference(launched):
    x, call, dy = drawn(5, 16, 16, 2, torch.float64)
    assert_exact(run(x, call, dy), x, call, dy)
    assert not launched
    arguments = (x, call["weight"], call["lora_A"], call["lora_B"], None)
    assert dispatch.can_use("projected_lora", *arguments, backend="triton") == (
        False,
        "a tensor is torch.float64; the Triton kernels compute in float32",
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


def test_compiled_as_a_full_graph(launched):
    x, call, dy = drawn(20, 33, 40, 3, torch.float32, basis=True, bias=True)
    expected = run(x, call, dy)
    launched.clear()
    leaves = [t.detach().requires_grad_() for t in (x, call["lora_A"], call["lora_B"])]

    def layer_of(x, A, B):
        return projected_lora(x, **{**call, "lora_A": A, "lora_B": B})

    y = torch.compile(layer_of, fullgraph=True, backend="aot_eager")(*leaves)
    y.backward(dy)
    assert same((y.detach(), *(leaf.grad for leaf in leaves)), expected) and launched
