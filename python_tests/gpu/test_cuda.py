"""Ops, solvers and the whole method on CUDA tensors, against float64 on the CPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from guard.guard_helpers import (
    PROMPTS,
    batch_of,
    collect,
    hand_made,
    perturb,
    plan_for,
    relative_error,
    tiny_gpt2,
    tiny_llama,
)
from oracle import DTYPES, assert_as_exact_as_plain, dense_projector, error, orthonormal

import guardspace_kernels as gk
from guardspace_kernels.guard.fingerprint import TensorMark
from guardspace_kernels.guard.null_space import null_space
from guardspace_kernels.guard.safety_subspace import DampedCovariance, trailing_subspace
from guardspace_kernels.ops import covariance_update_, null_project_, projected_lora, squared_drift, symmetrize_

pytestmark = pytest.mark.gpu

FORWARD = torch.ops.guardspace.projected_lora_forward
D = 37

LAYOUTS = {
    "ragged": lambda d: torch.randn(13, d, dtype=torch.float64),
    "many tokens": lambda d: torch.randn(3, 700, d, dtype=torch.float64),
    "one vector": lambda d: torch.randn(d, dtype=torch.float64),
    "no token": lambda d: torch.randn(0, 4, d, dtype=torch.float64),
    "batch second": lambda d: torch.randn(5, 3, d, dtype=torch.float64).transpose(0, 1),
    "every second column": lambda d: torch.randn(11, 2 * d, dtype=torch.float64)[:, ::2],
    "column-major": lambda d: torch.randn(d, 11, dtype=torch.float64).T,
    "expanded": lambda d: torch.randn(1, 3, d, dtype=torch.float64).expand(4, 3, d),
}

EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_KERNELS = pytest.mark.usefixtures("kernels")


def as_exact_as_plain(actual, plain, truth):
    assert_as_exact_as_plain(actual.detach().cpu(), plain.detach().cpu(), truth.detach())


def on(device, t, dtype=None):
    """On the device with the same strides."""
    return t.to(device, dtype) if isinstance(t, torch.Tensor) else t


@EACH_KERNELS
@EACH_LAYOUT
@EACH_DTYPE
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
def test_covariance_update(device, dtype, layout, masked):
    x = on(device, LAYOUTS[layout](D), dtype)
    mask = torch.rand(x.shape[:-1], device=device) < 0.6 if masked else None
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    start = torch.randn(D, D, dtype=accumulator, device=device)
    C = start.clone()
    assert covariance_update_(C, x, mask, 0.7) is None and C.device == start.device
    keep = torch.ones(x.shape[:-1], device=device) if mask is None else mask
    rows = (x * keep.unsqueeze(-1).to(dtype)).reshape(-1, D).to(accumulator)
    exact = rows.cpu().double()
    as_exact_as_plain(
        C.tril(), (start + 0.7 * (rows.T @ rows)).tril(), start.cpu().double().tril() + 0.7 * (exact.T @ exact).tril()
    )
    assert torch.equal(C.triu(1), start.triu(1))


@EACH_KERNELS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_rows_may_hold_anything(device, bad):
    x, mask = torch.randn(3, 4, D, device=device), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [7, 1, 0, 0]])
    mask = mask.to(device)
    clean, C = torch.zeros(2, D, D, device=device)
    covariance_update_(clean, x, mask)
    x[mask == 0] = bad
    covariance_update_(C, x, mask)
    assert torch.equal(C, clean) and clean.abs().sum() > 0


@EACH_KERNELS
def test_a_list_of_covariances_and_symmetrize(device):
    xs = [torch.randn(40, D, device=device), torch.randn(2, 5, 7, device=device).bfloat16()]
    Cs, singly = ([torch.zeros(x.shape[-1], x.shape[-1], device=device) for x in xs] for _ in range(2))
    covariance_update_(Cs, xs)
    for C, single, x in zip(Cs, singly, xs, strict=True):
        covariance_update_(single, x)
        assert torch.equal(C, single)
        symmetrize_(C)
        rows = x.cpu().double().reshape(-1, x.shape[-1])
        assert torch.equal(C, C.T) and error(C.cpu(), rows.T @ rows) < 1e-6


@EACH_DTYPE
def test_squared_drift(device, dtype):
    F, G, X = (torch.randn(*s, dtype=torch.float64) for s in ((29, 4), (4, D), (50, D)))
    F, G = F.to(dtype), G.to(dtype)
    lower = (X.T @ X).tril()
    got = squared_drift(on(device, lower), on(device, F), on(device, G))
    assert got.dtype == torch.float64 and got.device.type == device.type
    assert relative_error(got.cpu(), (X @ G.double().T @ F.double().T).square().sum()) < 1e-12


D_OUT, R, R0, K = 29, 3, 4, 11

#: What is present in a call: the basis and its kind, the bias, the frozen pair.
CASES = {
    "range basis": (True, True, False, False),
    "null basis, frozen pair": (True, False, False, True),
    "no basis, bias": (False, True, True, False),
    "everything": (True, True, True, True),
}


def lora_call(device, dtype, case="everything", adapter=None):
    """Keyword arguments of one call but x: the adapter in dtype ``adapter``, the rest in ``dtype``."""
    basis, complement, bias, frozen = CASES[case]
    adapter = adapter or dtype

    def normal(kind, *shape):
        return torch.randn(*shape, dtype=torch.float64).to(device, kind)

    return {
        "weight": normal(dtype, D_OUT, D),
        "lora_A": normal(adapter, R, D),
        "lora_B": normal(adapter, D_OUT, R),
        "basis": orthonormal(D, K, adapter).to(device) if basis else None,
        "complement": complement,
        "scale": 1.7,
        "bias": normal(dtype, D_OUT) if bias else None,
        "frozen_A": normal(adapter, R0, D) if frozen else None,
        "frozen_B": normal(adapter, D_OUT, R0) if frozen else None,
    }


def lora_textbook(x, call, dtype, device, dy, drop=None):
    """``y = x W_resᵀ + s·((drop(x) P) Aᵀ) Bᵀ + b`` with dense matrices in ``dtype``; y and the gradients of x, A, B."""
    call = {name: on(device, t, dtype) for name, t in call.items()}
    x, A, B = (t.detach().to(device, dtype).requires_grad_() for t in (x, call["lora_A"], call["lora_B"]))
    basis = None if call["basis"] is None else call["basis"].cpu()
    P = dense_projector(basis, call["complement"], D).to(device, dtype)
    W_res = call["weight"]
    if call["frozen_A"] is not None:
        W_res = W_res - call["scale"] * call["frozen_B"] @ call["frozen_A"]
    dropped = x if drop is None else x * drop.to(device, dtype)
    y = x @ W_res.T + call["scale"] * ((dropped @ P) @ A.T) @ B.T
    y = y if call["bias"] is None else y + call["bias"]
    y.backward(dy.to(device, dtype))
    return y, x.grad, A.grad, B.grad


def lora_ours(x, call, dy, **more):
    x, A, B = (t.detach().requires_grad_() for t in (x, call["lora_A"], call["lora_B"]))
    y = projected_lora(x, **{**call, "lora_A": A, "lora_B": B}, **more)
    y.backward(dy)
    return y, x.grad, A.grad, B.grad


@EACH_KERNELS
@EACH_LAYOUT
@EACH_DTYPE
@pytest.mark.parametrize("case", CASES)
def test_projected_lora_and_its_gradients(device, dtype, case, layout):
    x, call = on(device, LAYOUTS[layout](D), dtype), lora_call(device, dtype, case)
    dy = torch.randn(*x.shape[:-1], D_OUT, dtype=torch.float64).to(device, dtype)
    ours = lora_ours(x, call, dy)
    plain, truth = lora_textbook(x, call, dtype, device, dy), lora_textbook(x, call, torch.float64, "cpu", dy)
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert a.device == x.device
        if x.numel():
            as_exact_as_plain(a, b, c)
        else:
            assert a.shape == c.shape and not a.any()


@EACH_KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_adapter_beside_a_half_precision_layer(device, dtype):
    x, call = torch.randn(2, 9, D).to(device, dtype), lora_call(device, dtype, adapter=torch.float32)
    dy = torch.randn(2, 9, D_OUT).to(device, dtype)
    ours = lora_ours(x, call, dy)
    plain, truth = lora_textbook(x, call, dtype, device, dy), lora_textbook(x, call, torch.float64, "cpu", dy)
    for a, b, c, wanted in zip(ours, plain, truth, (dtype, dtype, torch.float32, torch.float32), strict=True):
        assert a.dtype == wanted
        as_exact_as_plain(a.to(dtype), b, c)


@EACH_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["range basis", "null basis, frozen pair"])
def test_dropout_is_a_function_of_the_seed(device, dtype, case):
    x, call = torch.randn(3, 50, D).to(device, dtype), lora_call(device, dtype, case)
    eye = torch.eye(D, dtype=dtype, device=device)

    def factors(seed):  # with W = 0 and A = B = I the layer returns drop(1)
        return projected_lora(torch.ones_like(x), torch.zeros_like(eye), eye, eye, dropout=0.25, seed=seed)

    drop = factors(5)
    assert torch.equal(drop, factors(torch.tensor(5))) and torch.equal(drop, factors(torch.tensor(5, device=device)))
    assert not torch.equal(drop, factors(6)) and abs(float((drop == 0).double().mean()) - 0.25) < 0.03
    dy = torch.randn(3, 50, D_OUT).to(device, dtype)
    ours = lora_ours(x, call, dy, dropout=0.25, seed=5)
    plain = lora_textbook(x, call, dtype, device, dy, drop)
    truth = lora_textbook(x, call, torch.float64, "cpu", dy, drop)
    for a, b, c in zip(ours, plain, truth, strict=True):
        as_exact_as_plain(a, b, c)


@EACH_KERNELS
def test_autocast_leaves_the_fold_in_float32(device):
    x, call = torch.randn(40, D, device=device), lora_call(device, torch.float32, "range basis")
    call["weight"].zero_()
    protected = torch.randn(40, K, device=device) @ call["basis"].T
    with torch.autocast(device.type, torch.bfloat16):
        y, free = (projected_lora(t, **call) for t in (protected, x))
    assert y.dtype == free.dtype == torch.bfloat16
    # Only A P, which is rounded to bfloat16 once, leaks: a fold in bfloat16 would leak several times as much.
    assert float(y.float().norm() / free.float().norm()) < 4e-3


@EACH_KERNELS
@EACH_LAYOUT
@EACH_DTYPE
@pytest.mark.parametrize("complement", [True, False], ids=["range", "null"])
def test_null_project(device, dtype, layout, complement):
    g, basis = LAYOUTS[layout](D).to(dtype), orthonormal(D, K, torch.promote_types(dtype, torch.float32))
    if layout == "expanded":
        g = g.contiguous()
    P = dense_projector(basis, complement, D)
    G = on(device, g).clone()
    assert null_project_(G, on(device, basis), complement) is None
    plain = (on(device, g).to(basis.dtype) @ on(device, P, basis.dtype)).to(dtype)
    as_exact_as_plain(G, plain, g.double() @ P)


@EACH_KERNELS
def test_a_list_of_projections(device):
    gs = [torch.randn(4, D, device=device), torch.randn(2, 3, 10, device=device, dtype=torch.bfloat16)]
    bases = [orthonormal(D, K, torch.float32).to(device), orthonormal(10, 7, torch.float32).to(device)]
    singly = [g.clone() for g in gs]
    null_project_(gs, bases, [True, False])
    for g, single, basis, complement in zip(gs, singly, bases, (True, False), strict=True):
        before = single.clone()
        null_project_(single, basis, complement)
        assert torch.equal(g, single) and not torch.equal(g, before)


def op_arguments(device):
    """Name -> (function of fresh tensors that returns what it computed, its tensors)."""
    call = lora_call(device, torch.float32)
    basis = call["basis"]
    x, g, C = (torch.randn(*s, device=device) for s in ((2, 9, D), (6, D), (D, D)))
    mask = torch.rand(2, 9, device=device) < 0.5

    def update(C, x):
        covariance_update_(C, x * 2, mask)
        symmetrize_(C)
        return C + 1

    def project(g, x):
        g, x = g * 2, x * 2
        null_project_(g, basis)
        null_project_([g, x], [basis, basis], [True, False])
        return g + 1, x + 1

    def layer(x, A, B):
        return projected_lora(x * 2, **{**call, "lora_A": A, "lora_B": B}, dropout=0.0) + 1

    def drift(C, F, G):
        return squared_drift(C, F * 2, G) + 1

    A, B = call["lora_A"], call["lora_B"]
    return {"update": (update, (C, x)), "project": (project, (g, x)), "lora": (layer, (x, A, B)),
            "drift": (drift, (C, B, A))}  # fmt: skip


@EACH_KERNELS
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["update", "project", "lora", "drift"])
def test_compiles_to_one_graph(device, name):
    function, tensors = op_arguments(device)[name]
    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        leaves = [t.clone().requires_grad_(name == "lora") for t in tensors]
        result = run(*leaves)
        result = list(result) if isinstance(result, tuple) else [result]
        if name == "lora":
            result[0].square().sum().backward()
            result += [leaf.grad for leaf in leaves]
        results.append(result)
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager.double()) < 1e-5


@pytest.fixture
def tf32(device, matmul_precision):
    """What trainers allow; where there are TF32 units the fixture makes sure that it shows."""
    matmul_precision("high")
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        x = torch.randn(500, 256, device=device)
        assert error((x.T @ x).cpu(), x.cpu().double().T @ x.cpu().double()) > 2e-5


@EACH_KERNELS
@pytest.mark.usefixtures("tf32")
def test_tf32_does_not_reach_covariances_and_projections(device):
    x, d = torch.randn(500, 256, device=device), 256
    C, basis = torch.zeros(d, d, device=device), orthonormal(d, 100, torch.float32)
    exact, P = x.cpu().double(), dense_projector(basis, True, d)
    covariance_update_(C, x)
    assert error(C.tril().cpu(), (exact.T @ exact).tril()) < 2e-6
    g = x.clone()
    null_project_(g, on(device, basis))
    assert error(g.cpu(), exact @ P) < 2e-6
    W, A, B = (torch.randn(*s, device=device) for s in ((8, d), (4, d), (8, 4)))
    fold = FORWARD(x, W, A, B, on(device, basis), True, 1.0, None, None, None, 0.0, None, None)[2]
    assert error(fold.cpu(), A.cpu().double() @ P) < 2e-6


@pytest.mark.usefixtures("tf32")
def test_tf32_does_not_reach_the_solvers(device):
    C = decaying_covariance(300)
    space = null_space(C.float().to(device), torch.empty(0, 300, device=device), protect=0.99)
    assert space.basis.dtype == torch.float32
    Q = space.basis.cpu().double()
    assert (Q.T @ Q - torch.eye(Q.shape[1])).abs().max() < 2e-6
    W = torch.randn(320, 300, dtype=torch.float64)
    energy, least = trailing_energies(W.float().to(device), C.float().to(device), 16)
    assert energy <= 1.01 * least


@EACH_KERNELS
def test_no_op_waits_for_the_device(cuda):
    prepared = op_arguments(cuda)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for function, tensors in prepared.values():
            function(*tensors)
        function, tensors = prepared["lora"]
        function(*(t.detach().requires_grad_() for t in tensors)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@EACH_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_inside_a_cuda_graph(cuda, dtype):
    call = lora_call(cuda, dtype, adapter=torch.float32)
    x, C = torch.zeros(2, 9, D, device=cuda, dtype=dtype), torch.zeros(D, D, device=cuda)
    mask, g = torch.ones(2, 9, device=cuda, dtype=torch.long), torch.zeros(6, D, device=cuda)

    def work():
        covariance_update_(C, x, mask)
        null_project_(g, call["basis"])
        return projected_lora(x, **call)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = work()
    C.zero_()
    for _ in range(2):
        x.copy_(torch.randn(2, 9, D))
        mask.copy_(torch.rand(2, 9) < 0.5)
        g.normal_()
        expected, expected_g = C.clone(), g.clone()
        covariance_update_(expected, x, mask)
        null_project_(expected_g, call["basis"])
        graph.replay()
        assert error(C.tril(), expected.double().tril()) < 1e-6 and error(g, expected_g.double()) < 1e-6
        assert error(y, projected_lora(x, **call).double()) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_tensors_on_two_devices_are_refused(cuda):
    x, call = torch.randn(4, D), lora_call(cuda, torch.float32)
    with pytest.raises(ValueError, match=r"covariance_update_: x is on cpu but covariance is on cuda:0"):
        covariance_update_(torch.zeros(D, D, device=cuda), x)
    with pytest.raises(ValueError, match=r"null_project_: basis is on cuda:0 but g is on cpu"):
        null_project_(x, call["basis"])
    with pytest.raises(ValueError, match=r"projected_lora: weight is on cuda:0 but x is on cpu"):
        projected_lora(x, **call)


def decaying_covariance(d, tokens=None):
    """Power-law columns in a random basis."""
    X = torch.randn(tokens or 4 * d, d, dtype=torch.float64) * torch.arange(1, d + 1).double() ** -0.7
    X = X @ orthonormal(d, d)
    return X.T @ X


def trailing_energies(weight, covariance, rank):
    """(‖U_rᵀ W C_d‖², the smallest possible), in float64 on the CPU; checks U and σ on the way."""
    U, sigma = trailing_subspace(weight, covariance, rank)
    assert U.device == sigma.device == weight.device and U.shape == (weight.shape[0], rank)
    U, sigma = U.cpu().double(), sigma.cpu().double()
    assert (U.T @ U - torch.eye(rank)).abs().max() < 1e-6
    M = weight.cpu().double() @ DampedCovariance(covariance.cpu()).matrix
    energy = float((U.T @ M).square().sum())
    assert energy == pytest.approx(float(sigma.square().sum()), rel=1e-6)
    return energy, float(torch.linalg.svdvals(M)[-rank:].square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape, rank", [((400, 160), 16), ((160, 400), 16), ((256, 256), 16), ((40, 24), 8), ((24, 40), 8)], ids=str
)
def test_trailing_subspace(device, shape, rank, dtype):
    weight = torch.randn(*shape, dtype=torch.float64).to(device, dtype)
    covariance = decaying_covariance(shape[1], tokens=shape[1] // 2).float().to(device)
    energy, least = trailing_energies(weight, covariance, rank)
    assert 0 < energy <= 1.01 * least


def gapped_covariance(d, leading=20):
    """``leading`` eigenvalues in [1, 3], the rest near 1e-4: a cut that rounding cannot move."""
    values = torch.cat([torch.linspace(1e-4, 2e-4, d - leading), torch.linspace(1, 3, leading)]).double()
    E = orthonormal(d, d)
    return E @ torch.diag(values) @ E.T


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize(
    "d, options, tolerance",
    [
        (300, {"protect": 0.99}, 1e-4),  # in float32
        (300, {"rule": "rank", "protect_dims": 20}, 1e-9),
        (64, {"protect": 0.99}, 1e-9),
        (30, {"protect": 0.99}, 1e-9),  # more than half: the null basis
    ],
    ids=str,
)
def test_null_space(device, d, options, tolerance, sinks):
    C, sinks = gapped_covariance(d), torch.randn(sinks, d, dtype=torch.float64)
    ours, truth = null_space(C.to(device), sinks.to(device), **options), null_space(C, sinks, **options)
    assert ours.basis.device.type == device.type
    assert ours.basis.dtype == (torch.float32 if tolerance > 1e-9 else torch.float64)
    assert (ours.protected, ours.complement, ours.sink_directions) == (20 + len(sinks), d > 30, len(sinks))
    assert ours.free_energy == pytest.approx(truth.free_energy, abs=tolerance)
    mine, exact = (dense_projector(space.basis.cpu(), space.complement, d) for space in (ours, truth))
    assert float((mine - exact).norm()) < tolerance


def moved(model, device, dtype=None):
    return copy.deepcopy(model).to(device, dtype)


def logits(model, batch, device):
    batch = {key: value.to(device) for key, value in batch.items()}
    with torch.no_grad():
        return model.eval()(**batch).logits[batch["attention_mask"].bool()]


def train(guarded, device, steps=6, autocast=False, **options):
    """AdamW on random tokens; leaves the model in eval mode."""
    optimizer = torch.optim.AdamW([p for p in guarded.parameters() if p.requires_grad], lr=1e-2, **options)
    batch = {key: value.to(device) for key, value in batch_of().items()}
    generator = torch.Generator().manual_seed(0)
    guarded.train()
    for _ in range(steps):
        ids = torch.randint(1, 60, batch["input_ids"].shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = guarded(input_ids=ids, attention_mask=batch["attention_mask"], labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return guarded.eval()


@EACH_DTYPE
def test_marks_of_values_are_those_of_the_cpu(device, dtype):
    t = torch.randn(300, 7000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    t[0, :3] = torch.tensor([0.0, 1e30, 1e-30])  # infinite and zero in float16
    for held in (t, t.bfloat16().to(dtype), t[:, :5].T):
        assert TensorMark.of(held.to(device)) == TensorMark.of(held)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_statistics_equal_those_on_the_cpu(device, make, side):
    base = make()
    ours, theirs = collect(moved(base, device), [batch_of(side=side)]), collect(base, [batch_of(side=side)])
    assert ours.fingerprint == theirs.fingerprint and ours.prompts == theirs.prompts
    truth = hand_made(moved(base, "cpu", torch.float64), PROMPTS, ours.layers)
    for a, b in zip(ours.inputs, theirs.inputs, strict=True):
        assert a.covariance.device.type == a.sinks.device.type == "cpu"
        assert (a.layers, a.tokens, a.sink_tokens) == (b.layers, b.tokens, b.sink_tokens)
        assert relative_error(a.covariance.cpu(), truth[a.layers[0]][1]) < 1e-5
        assert a.sinks.shape == b.sinks.shape and relative_error(a.sinks.cpu(), b.sinks) < 1e-5


@pytest.mark.usefixtures("tf32")
def test_tf32_does_not_reach_the_statistics(device):
    """The model itself runs in float64, so that what is seen is the library's."""
    base = tiny_llama(dtype=torch.float64)
    stats = collect(moved(base, device), dtype=torch.float32)
    truth = hand_made(base, PROMPTS, stats.layers)
    for entry in stats.inputs:
        assert relative_error(entry.covariance.cpu(), truth[entry.layers[0]][1]) < 1e-6


def test_statistics_saved_and_loaded(device, tmp_path):
    base = tiny_llama()
    model = moved(base, device)
    stats = collect(model, checkpoint=tmp_path / "checkpoint")
    again = collect(model, checkpoint=tmp_path / "checkpoint")
    collect(base, checkpoint=tmp_path / "begun")
    gone_on = collect(model, [batch_of(), batch_of()], checkpoint=tmp_path / "begun")
    stats.save(tmp_path / "stats")
    loaded = gk.CalibrationStatistics.load(tmp_path / "stats")
    for a, b, c in zip(stats.inputs, loaded.inputs, again.inputs, strict=True):
        assert torch.equal(a.covariance.cpu(), b.covariance) and torch.equal(a.sinks.cpu(), b.sinks)
        assert torch.equal(a.covariance, c.covariance) and a.tokens == b.tokens == c.tokens
    twice = stats.merge(again)
    assert torch.equal(twice.inputs[0].covariance, 2 * stats.inputs[0].covariance)
    for a, b in zip(twice.inputs, gone_on.inputs, strict=True):  # begun on the CPU
        assert a.tokens == b.tokens and relative_error(b.covariance, a.covariance) < 1e-4
    # What was collected on the device serves the model on the CPU, and the other way round.
    plans = [plan_for(model, stats), plan_for(model, loaded), plan_for(base, loaded)]
    for plan in plans[1:]:
        for mine, other in zip(plans[0].spaces, plan.spaces, strict=True):
            assert (mine.protected, mine.complement) == (other.protected, other.complement)
            assert mine.basis.device.type == "cpu"
            projectors = [dense_projector(s.basis, s.complement, len(s.basis)) for s in (mine, other)]
            assert float((projectors[0] - projectors[1]).norm()) < 1e-5
        for name, layer in plans[0].layers.items():
            products = [p.layers[name].B0.double() @ p.layers[name].A0.double() for p in (plans[0], plan)]
            assert relative_error(*products) < 1e-3, (name, layer.warnings)


def test_statistics_of_a_process_group(device, tmp_path, monkeypatch):
    """NCCL reduces tensors on GPUs only."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    stats = collect(moved(tiny_llama(), device))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        reduced = stats.all_reduce()
    finally:
        dist.destroy_process_group()
    for a, b in zip(stats.inputs, reduced.inputs, strict=True):
        assert b.covariance.device.type == "cpu"
        assert torch.equal(a.covariance, b.covariance) and a.tokens == b.tokens


TRAININGS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "autocast": (torch.float32, {"autocast": True}),
    "fused optimiser": (torch.float32, {"fused": True}),
}


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_from_statistics_to_a_plain_adapter(device, make, training, tmp_path):
    dtype, options = TRAININGS[training]
    base = moved(make(), device, dtype)
    # Fewer tokens than dimensions, in float64: what is protected is protected wholly.
    stats = collect(base, dtype=torch.float64)
    plan = plan_for(base, stats, protect=1.0, dropout=0.1)
    guarded = gk.attach_guard(copy.deepcopy(base), plan)
    assert {p.device.type for p in guarded.parameters()} == {device.type}
    before = logits(base, batch_of(), device)
    coarse = 1e-4 if dtype == torch.float32 else 5e-2
    assert relative_error(logits(guarded, batch_of(), device), before) < coarse

    train(guarded, device, steps=20, **options)  # far enough to show in bfloat16
    free = gk.attach_guard(copy.deepcopy(base), plan_for(base, stats, projector=False, dropout=0.1))
    assert gk.certify(train(free, device, **options), stats).max_drift > 1e-2
    report = gk.certify(guarded, stats)
    assert 0 < report.max_drift < 2e-5
    for layer in guarded.guarded_layers().values():
        F, G = layer.delta_factors()
        assert float((F @ G).norm() / layer.base_weight().float().norm()) > 1e-3  # it did learn

    exported = gk.export_lora(guarded, tmp_path, stats=stats)
    assert max(exported.leak.values()) < 1e-6 and max(exported.drift.values()) < 2e-5
    plain = peft.PeftModel.from_pretrained(base, tmp_path)
    here, elsewhere = batch_of(), batch_of([[30, 31, 32, 33, 34, 35, 36], [41, 42, 43]])
    ours = logits(guarded, elsewhere, device)
    assert relative_error(logits(plain, elsewhere, device), ours) < coarse
    with plain.disable_adapter():
        assert relative_error(ours, logits(plain, elsewhere, device)) > 3 * coarse
    assert relative_error(logits(guarded, here, device), before) < coarse


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
def test_a_saved_adapter_resumes_exactly(device, residual, tmp_path):
    base = moved(tiny_llama(), device)
    plan = plan_for(base)
    plan.save(tmp_path / "plan")
    guarded = train(gk.attach_guard(copy.deepcopy(base), plan, residual=residual), device)
    guarded.save_pretrained(tmp_path / "adapter")
    resumed = gk.attach_guard(copy.deepcopy(base), gk.GuardPlan.load(tmp_path / "plan"), residual=residual)
    resumed.load_adapter(tmp_path / "adapter")
    ours, theirs = guarded.guarded_layers(), resumed.guarded_layers()
    assert all(torch.equal(m.A, theirs[name].A) and torch.equal(m.B, theirs[name].B) for name, m in ours.items())
    assert torch.equal(logits(guarded, batch_of(), device), logits(resumed, batch_of(), device))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_step_mode_follows_forward_mode(device, fused):
    base = moved(tiny_llama(), device)
    forward, step = (gk.attach_guard(copy.deepcopy(base), plan_for(base)) for _ in range(2))
    train(forward, device, fused=fused)
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-2, fused=fused)
    batch = {key: value.to(device) for key, value in batch_of().items()}
    generator = torch.Generator().manual_seed(0)
    step.train()
    with gk.guard_optimizer(optimizer, step):
        for _ in range(6):
            ids = torch.randint(1, 60, batch["input_ids"].shape, generator=generator).to(device)
            step(input_ids=ids, attention_mask=batch["attention_mask"], labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(layer.leak() < 1e-6 for layer in step.guarded_layers().values())
    other = forward.guarded_layers()
    for name, layer in step.guarded_layers().items():
        (F, G), (F_other, G_other) = layer.delta_factors(), other[name].delta_factors()
        assert relative_error(F @ G, F_other @ G_other) < 1e-3


def test_the_certificate_equals_that_of_the_cpu(device):
    base = tiny_llama()
    stats = collect(base)
    reports = []
    for where in ("cpu", device):
        model = moved(base, where)
        guarded = perturb(gk.attach_guard(model, plan_for(base, stats)))
        reports.append(gk.certify(guarded, stats, heldout=[batch_of(side="left")], answer_tokens=3))
    assert reports[0].max_drift > 1e-3
    for a, b in zip(*(report.layers for report in reports), strict=True):
        for field in ("drift", "bound", "sink_drift", "heldout_drift", "heldout_outside"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-3, abs=1e-7), (a.name, field)
    assert reports[0].heldout.kl == pytest.approx(reports[1].heldout.kl, rel=1e-3)


FRESH = """
import sys, torch
torch.set_num_threads(4)
from guard.guard_helpers import collect, plan_for, tiny_llama
model = tiny_llama().to(sys.argv[1])
plan_for(model, collect(model))
"""


def test_planning_is_the_first_linear_algebra_of_a_process(device):
    """CUDA's linear algebra is loaded at its first use, which must not be on several threads at once."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[1]), *sys.path])}
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", FRESH, str(device)], env=environment, capture_output=True, text=True, timeout=240
        )
        assert run.returncode == 0, run.stderr
