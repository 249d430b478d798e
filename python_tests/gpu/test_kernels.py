"""What only a GPU can say about the Triton and CUDA kernels: which are chosen, graphs, many items, 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, assert_as_exact_as_plain, error, orthonormal

from guardspace_kernels import dispatch
from guardspace_kernels.ops import (
    _triton,
    _triton_table,
    covariance_update_,
    null_project_,
    projected_lora,
    symmetrize_,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

D_IN, D_OUT, R, K = 160, 96, 5, 48
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def operands(device, dtype):
    return {
        "covariance": (torch.zeros(D_IN, D_IN, device=device), torch.ones(9, D_IN, device=device, dtype=dtype)),
        "null_projection": (
            torch.ones(R, D_IN, device=device, dtype=dtype),
            torch.ones(D_IN, K, device=device),
        ),
        "projected_lora": tuple(
            torch.ones(*shape, device=device, dtype=dtype)
            for shape in ((9, D_IN), (D_OUT, D_IN), (R, D_IN), (D_OUT, R), (D_IN, K))
        ),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", dispatch.OPS)
def test_the_kernels_take_what_is_on_a_gpu(device, op, dtype, kernels):
    ok, reason = dispatch.can_use(op, *operands(device, dtype)[op], backend=kernels)
    assert ok == (device.type == "cuda" and dtype != torch.float64), reason
    if device.type != "cuda":
        assert "on cpu" in reason
    elif not ok:
        assert "torch.float64" in reason


def captured(device, work):
    """A function that replays ``work`` as a CUDA graph, captured when it has run before; on the CPU ``work`` itself."""
    if device.type == "cpu":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay():
        graph.replay()
        return result

    return replay


def matrices(device, count=7):
    """Of mixed heights, widths and dtypes, each with a basis, of both kinds."""
    found = []
    for i in range(count):
        r, d = (1, R, 33)[i % 3], (D_IN, 96, 75)[i % 3]
        G = torch.randn(r, d, device=device).to((torch.float32, torch.bfloat16)[i % 2])
        found.append((G, orthonormal(d, d // 3, torch.float32).to(device), i % 2 == 0))
    return found


def fill(tensors):
    for t in tensors:
        t.copy_(torch.randn(t.shape))


def test_a_list_of_projections_inside_a_graph(device):
    Gs, bases, complements = map(list, zip(*matrices(device), strict=True))
    replay = captured(device, lambda: null_project_(Gs, bases, complements))
    for _ in range(2):
        fill(Gs)
        expected = [G.clone() for G in Gs]
        for G, basis, complement in zip(expected, bases, complements, strict=True):
            null_project_(G, basis, complement)
        replay()
        for G, wanted in zip(Gs, expected, strict=True):
            assert torch.equal(G, wanted)


def test_a_list_that_first_runs_inside_a_graph(cuda):
    """Its table of addresses was never sent: item by item, then."""
    Gs, bases, complements = map(list, zip(*matrices(cuda), strict=True))
    others = [G.clone() for G in Gs]
    null_project_(others, bases, complements)  # compiled, for other addresses
    for G, basis, complement in zip(others, bases, complements, strict=True):
        null_project_(G, basis, complement)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        null_project_(Gs, bases, complements)
    fill(Gs)
    expected = [G.clone() for G in Gs]
    null_project_(expected, bases, complements)
    graph.replay()
    assert all(torch.equal(G, wanted) for G, wanted in zip(Gs, expected, strict=True))


@EACH_DTYPE
def test_covariances_inside_a_graph(device, dtype):
    xs = [torch.zeros(T, d, device=device, dtype=dtype) for T, d in ((3000, 75), (40, D_IN), (1, 96))]
    Cs = [torch.zeros(x.shape[1], x.shape[1], device=device) for x in xs]
    masks = [torch.ones(x.shape[0], device=device, dtype=torch.bool) for x in xs]
    replay = captured(device, lambda: covariance_update_(Cs, xs, masks))
    for C in Cs:
        C.zero_()
    expected = [C.clone() for C in Cs]
    for _ in range(2):
        fill(xs)
        for mask in masks:
            mask.copy_(torch.rand(mask.shape) < 0.7)
        for C, x, mask in zip(expected, xs, masks, strict=True):
            covariance_update_(C, x, mask)
        replay()
        for C, wanted in zip(Cs, expected, strict=True):
            assert error(C.cpu(), wanted.cpu().double()) < 1e-6


def layer(device, dtype, frozen=False):
    """x, A and B, which require grad, and a function of them."""
    x = torch.randn(2, 40, D_IN).to(device, dtype).requires_grad_()
    A, B = (torch.randn(*shape).to(device).requires_grad_() for shape in ((R, D_IN), (D_OUT, R)))
    W, bias = torch.randn(D_OUT, D_IN).to(device, dtype), torch.randn(D_OUT).to(device, dtype)
    basis = orthonormal(D_IN, K, torch.float32).to(device)
    pair = [torch.randn(*shape).to(device) for shape in ((R, D_IN), (D_OUT, R))] if frozen else [None, None]
    seed = torch.tensor(3, device=device)

    def forward(dropout=0.0):
        return projected_lora(x, W, A, B, basis, True, 1.7, bias, *pair, dropout=dropout, seed=seed)

    return (x, A, B), forward


@EACH_DTYPE
@pytest.mark.parametrize("frozen, dropout", [(False, 0.0), (True, 0.3)], ids=["plain", "frozen pair, dropout"])
def test_a_training_step_of_a_layer_inside_a_graph(device, dtype, frozen, dropout):
    leaves, forward = layer(device, dtype, frozen)
    dy = torch.randn(2, 40, D_OUT).to(device, dtype)

    def work():
        y = forward(dropout)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    replay = captured(device, work)
    for _ in range(2):
        with torch.no_grad():
            fill(leaves)
        expected = [t.clone() for t in work()]
        for mine, wanted in zip(replay(), expected, strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.usefixtures("fresh_compiler")
@EACH_DTYPE
def test_a_compiled_layer(device, dtype):
    leaves, forward = layer(device, dtype, frozen=True)
    dy = torch.randn(2, 40, D_OUT).to(device, dtype)
    results = []
    for run in (forward, torch.compile(forward, fullgraph=True)):
        y = run()
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled.cpu(), eager.cpu().double()) < (1e-5 if dtype == torch.float32 else 1e-2)


@EACH_DTYPE
def test_the_same_bits_every_time(device, dtype):
    x = torch.randn(5000, 75).to(device, dtype)
    leaves, forward = layer(device, dtype, frozen=True)

    def all_of_it():
        C, (G, basis, _) = torch.zeros(75, 75, device=device), first
        covariance_update_(C, x)
        symmetrize_(C)
        G = G.clone()
        null_project_(G, basis)
        y = forward(0.3)
        return [C, G, y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    first = matrices(device, 1)[0]
    for a, b in zip(all_of_it(), all_of_it(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shift", [0, 1, 8], ids=["aligned", "by one element", "by 16 bytes"])
def test_any_alignment(device, shift):
    x = torch.randn(30 * 101 + shift).to(device).bfloat16()[shift:].view(30, 101)[:, : 101 - shift]
    C = torch.zeros(x.shape[1], x.shape[1], device=device)
    covariance_update_(C, x)
    rows = x.cpu().double()
    plain = x.cpu().float().T @ x.cpu().float()
    assert_as_exact_as_plain(C.cpu().tril(), plain.tril(), (rows.T @ rows).tril())


def test_tensors_of_more_than_2_to_the_31_elements(cuda):
    d, T = 256, 2**23 + 4096
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free GPU memory")
    x = torch.zeros(T, d, device=cuda, dtype=torch.bfloat16)
    x[-300:] = torch.randn(300, d)
    C, expected = torch.zeros(2, d, d, device=cuda)
    covariance_update_(C, x)
    covariance_update_(expected, x[-300:].clone())
    assert error(C, expected.double()) < 1e-6
    A, B, W = (torch.randn(*shape, device=cuda) for shape in ((4, d), (16, 4), (16, d)))
    y = projected_lora(x, W.bfloat16(), A, B)
    tail = projected_lora(x[-300:].clone(), W.bfloat16(), A, B)
    assert error(y[-300:], tail.double()) < 1e-2 and not y[:-300].any()


def test_choices_by_measurement_are_kept_and_change_nothing(cuda, kernels, tmp_path, monkeypatch):
    if kernels != "triton":
        pytest.skip("only Triton's launches have a choice")
    monkeypatch.setenv("GUARDSPACE_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = torch.randn(2000, 600, device=cuda).bfloat16()
    C = torch.zeros(600, 600, device=cuda)
    covariance_update_(C, x)
    exact = x.cpu().double().T @ x.cpu().double()
    plain = x.float().T @ x.float()
    assert_as_exact_as_plain(C.cpu().tril(), plain.cpu().tril(), exact.tril())
    (choices,) = (tmp_path / "guardspace_kernels").glob("*.json")
    assert "covariance.add_tiles" in choices.read_text(encoding="utf-8")


@pytest.mark.parametrize("by_rows", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, K, N, R", [(3000, 1032, 2056, 24), (40, 64, 128, 8)], ids=["many tiles", "one tile"])
def test_the_base_product_by_tma(cuda, kernels, T, K, N, R, dtype, by_rows):
    kernel = "projected_lora.linear_tma"
    rows = [row for row in _triton_table.ROWS if row.kernel == kernel and _triton.target(cuda) in row.targets]
    if kernels != "triton" or not rows:
        pytest.skip("Triton's, on chips with TMA")
    from guardspace_kernels.ops.projected_lora import triton_tma

    x, W, bias, h, up = (torch.randn(*s, device=cuda).to(dtype) for s in ((T, K), (K, N), (N,), (T, R), (R, N)))
    plain, exact = x @ W + bias + h @ up, x.double() @ W.double() + bias.double() + h.double() @ up.double()
    W, up = (t.T.contiguous().T if by_rows else t for t in (W, up))
    for row in rows:
        replay = captured(cuda, lambda row=row: triton_tma.linear(row, x, W, bias, h, up))
        for y in (triton_tma.linear(row, x, W, bias, h, up), replay()):
            assert_as_exact_as_plain(y, plain, exact, row.key)
