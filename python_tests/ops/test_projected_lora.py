"""projected_lora against the textbook layer: dense P, dense W_res, everything in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from backends import automatic, require_extension
from oracle import DTYPES, assert_as_exact_as_plain, dense_projector, error, orthonormal
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import guardspace_kernels as gk
from guardspace_kernels.ops import projected_lora

OPS = torch.ops.guardspace
D_IN, D_OUT, R, R0, K = 37, 29, 3, 4, 11

LAYOUTS = {
    "ragged": lambda: torch.randn(13, D_IN, dtype=torch.float64),
    "one token": lambda: torch.randn(1, D_IN, dtype=torch.float64),
    "one vector": lambda: torch.randn(D_IN, dtype=torch.float64),
    "3-D": lambda: torch.randn(3, 5, D_IN, dtype=torch.float64),
    "no token": lambda: torch.randn(0, D_IN, dtype=torch.float64),
    "no sequence": lambda: torch.randn(2, 0, D_IN, dtype=torch.float64),
    "batch second": lambda: torch.randn(5, 3, D_IN, dtype=torch.float64).transpose(0, 1),
    "every second column": lambda: torch.randn(7, 2 * D_IN, dtype=torch.float64)[:, ::2],
    "column-major": lambda: torch.randn(D_IN, 7, dtype=torch.float64).T,
    "expanded": lambda: torch.randn(1, 3, D_IN, dtype=torch.float64).expand(4, 3, D_IN),
}

#: What is present in a call: the basis and its kind, the bias, the frozen pair.
CASES = {
    "range basis": {"basis": True},
    "null basis": {"basis": True, "complement": False},
    "no basis": {"basis": False},
    "bias and frozen pair": {"basis": True, "bias": True, "frozen": True},
    "null basis, frozen pair": {"basis": True, "complement": False, "frozen": True},
}


def arguments(dtype=torch.float64, basis=True, complement=True, bias=False, frozen=False, adapter=None, scale=1.7):
    """Keyword arguments of one call but x: the adapter in dtype ``adapter``, the rest in ``dtype``."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    adapter = adapter or dtype
    return {
        "weight": normal(D_OUT, D_IN).to(dtype),
        "lora_A": normal(R, D_IN).to(adapter),
        "lora_B": normal(D_OUT, R).to(adapter),
        "basis": orthonormal(D_IN, K, adapter) if basis else None,
        "complement": complement,
        "scale": scale,
        "bias": normal(D_OUT).to(dtype) if bias else None,
        "frozen_A": normal(R0, D_IN).to(adapter) if frozen else None,
        "frozen_B": normal(D_OUT, R0).to(adapter) if frozen else None,
    }


def textbook(x, call, dtype=torch.float64, keep=None):
    """``y = x W_resᵀ + s·((drop(x) P) Aᵀ) Bᵀ + b``: y and the leaves x, A, B, all in ``dtype`` (float64: the truth)."""
    x, A, B = (t.detach().to(dtype).requires_grad_() for t in (x, call["lora_A"], call["lora_B"]))
    P = dense_projector(call["basis"], call["complement"], D_IN).to(dtype)
    W_res = call["weight"].to(dtype)
    if call["frozen_A"] is not None:
        W_res = W_res - call["scale"] * call["frozen_B"].to(dtype) @ call["frozen_A"].to(dtype)
    y = x @ W_res.T + call["scale"] * (((x if keep is None else x * keep.to(dtype)) @ P) @ A.T) @ B.T
    return (y if call["bias"] is None else y + call["bias"].to(dtype)), x, A, B


def run(x, call, **more):
    """The op, with leaves x, A, B of its own (x keeps its strides)."""
    x, A, B = (t.detach().requires_grad_() for t in (x, call["lora_A"], call["lora_B"]))
    return projected_lora(x, **{**call, "lora_A": A, "lora_B": B}, **more), x, A, B


def dropout_factors(shape, dtype, dropout, seed):
    """Black-box view of the dropout mask: with W = 0 and A = B = I the layer returns drop(1)."""
    eye = torch.eye(D_IN, dtype=dtype)
    return projected_lora(torch.ones(shape, dtype=dtype), torch.zeros_like(eye), eye, eye, dropout=dropout, seed=seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_equal_the_textbook_layer(dtype, case, layout):
    x, call = LAYOUTS[layout]().to(dtype), arguments(dtype, **CASES[case])
    results, plain, truth = (f for f in (run(x, call), textbook(x, call, dtype), textbook(x, call)))
    dy = torch.randn(results[0].shape, dtype=torch.float64).to(dtype)
    for y, *_ in (results, plain, truth):
        y.backward(dy.to(y.dtype))
    assert_as_exact_as_plain(results[0], plain[0], truth[0])
    for ours, theirs, true in zip(results[1:], plain[1:], truth[1:], strict=True):
        if x.numel():
            assert_as_exact_as_plain(ours.grad, theirs.grad, true.grad)
        else:
            assert ours.grad.shape == ours.shape and not ours.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_weight_and_strided_adapters_are_read_as_views(dtype):
    x, call = LAYOUTS["3-D"]().to(dtype), arguments(dtype, bias=True, frozen=True)
    contiguous = run(x, call)[0]
    for name, t in call.items():
        if isinstance(t, torch.Tensor) and t.dim() == 2:
            call[name] = t.T.contiguous().T
    (y, *ours), (plain, *theirs), (truth, *true) = run(x, call), textbook(x, call, dtype), textbook(x, call)
    for result in (y, plain, truth):
        result.backward(torch.ones_like(result))  # expanded by autograd: stride 0
    assert_as_exact_as_plain(y, contiguous.detach(), truth)
    for a, b, c in zip(ours, theirs, true, strict=True):
        assert_as_exact_as_plain(a.grad, b.grad, c.grad)


@pytest.mark.parametrize("reduction", ["sum", "transposed"])
def test_incoming_gradients_of_any_stride(reduction):
    x, call = LAYOUTS["3-D"](), arguments(frozen=True)
    ours, truth = run(x, call), textbook(x, call)
    for y, *_ in (ours, truth):
        (y.sum() if reduction == "sum" else (y.transpose(0, 2) * torch.arange(3.0)).sum()).backward()
    for a, b in zip(ours[1:], truth[1:], strict=True):
        assert error(a.grad, b.grad) < 1e-13


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_the_gradients_that_are_asked_for(needed):
    x, call = LAYOUTS["ragged"](), arguments(frozen=True)
    leaves = [t.requires_grad_(need) for t, need in zip((x, call["lora_A"], call["lora_B"]), needed, strict=True)]
    projected_lora(x, **call).square().sum().backward()
    y, *true = textbook(x, call)
    y.square().sum().backward()
    for leaf, expected, need in zip(leaves, true, needed, strict=True):
        assert (leaf.grad is not None) == need
        assert not need or error(leaf.grad, expected.grad) < 1e-13


def test_weight_bias_basis_and_frozen_pair_get_no_gradient():
    x, call = LAYOUTS["ragged"]().requires_grad_(), arguments(bias=True, frozen=True)
    for t in call.values():
        if isinstance(t, torch.Tensor):
            t.requires_grad_()
    projected_lora(x, **call).sum().backward()
    with_grad = {name for name, t in call.items() if isinstance(t, torch.Tensor) and t.grad is not None}
    assert with_grad == {"lora_A", "lora_B"} and x.grad is not None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_passes_gradcheck(case, dropout):
    x, call = torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True), arguments(**CASES[case])
    A, B = call.pop("lora_A").requires_grad_(), call.pop("lora_B").requires_grad_()

    def layer(x, A, B):
        return projected_lora(x, lora_A=A, lora_B=B, **call, dropout=dropout, seed=5)

    assert torch.autograd.gradcheck(layer, (x, A, B))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_second_derivatives_are_refused(dtype):
    y, x, *_ = run(LAYOUTS["ragged"]().to(dtype), arguments(dtype))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="projected_lora cannot be differentiated twice"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_derivatives_are_refused(name, grad):
    """Rather than a tangent that is lost; under no_grad as well, which leaves forward mode on."""
    call = {"x": LAYOUTS["ragged"](), **arguments()}
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        projected_lora(**call)
        call[name] = forward_ad.make_dual(call[name], torch.ones_like(call[name]))
        with pytest.raises(RuntimeError, match="projected_lora has no forward-mode derivative; take reverse mode"):
            projected_lora(**call)
        call[name] = forward_ad.unpack_dual(call[name]).primal
    if name == "x":
        with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
            torch.func.jvp(lambda x: projected_lora(**{**call, "x": x}), (LAYOUTS["ragged"](),), (LAYOUTS["ragged"](),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_float32_adapters_beside_half_precision_activations(case, dtype):
    x = LAYOUTS["3-D"]().to(dtype)
    call = arguments(dtype, adapter=torch.float32, **CASES[case])
    (y, *ours), (truth, *true) = run(x, call), textbook(x, call)
    low = {name: t.to(dtype) if isinstance(t, torch.Tensor) else t for name, t in call.items()}
    plain, *theirs = textbook(x, low, dtype)
    dy = torch.randn(y.shape).to(dtype)
    for result in (y, plain, truth):
        result.backward(dy.to(result.dtype))
    assert y.dtype == dtype and [t.grad.dtype for t in ours] == [dtype, torch.float32, torch.float32]
    assert_as_exact_as_plain(y, plain, truth)
    for a, b, c in zip(ours, theirs, true, strict=True):
        assert_as_exact_as_plain(a.grad.to(dtype), b.grad, c.grad)


def folded(lora_A, basis, dtype):
    """Black-box view of the A P that meets the tokens: with x = I, W = 0 and B = I the layer returns (A P)ᵀ."""
    return projected_lora(
        torch.eye(D_IN, dtype=dtype), torch.zeros(R, D_IN, dtype=dtype), lora_A, torch.eye(R), basis
    ).T.double()


@pytest.mark.parametrize("setting", ["plain", "autocast", "medium", "bf16 for one backend"])
@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.float64], ids=str)
def test_the_fold_is_formed_in_float32_and_rounded_once(basis_dtype, setting, matmul_precision):
    A, Q = torch.randn(R, D_IN), orthonormal(D_IN, K, basis_dtype)
    exact = A.double() @ dense_projector(Q, True, D_IN)
    if setting not in ("plain", "autocast"):
        matmul_precision(setting)
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
        A_P = folded(A, Q, torch.float32 if setting == "autocast" else torch.bfloat16)
    assert error(A_P, exact) < 2.0**-8
    same = exact.bfloat16().double() == A_P
    assert same.double().mean() > 0.97  # the rest: ties, decided by float32's last bits


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast_casts_tokens_and_keeps_the_adapter_in_float32(inside):
    x, call = torch.randn(2, 5, D_IN), arguments(torch.float32, bias=True, frozen=True)
    low = {**call, "weight": call["weight"].bfloat16(), "bias": call["bias"].bfloat16()}
    expected, *theirs = run(x.bfloat16(), low)
    expected.float().square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        y, *ours = run(x, call)
        assert y.dtype == torch.bfloat16
        if inside:
            y.float().square().sum().backward()
    if not inside:
        y.float().square().sum().backward()
    assert torch.equal(y, expected)
    assert all(t.grad.dtype == torch.float32 for t in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad, b.grad.float())
    _, A, _ = ours
    assert (A.grad @ call["basis"]).norm() < 1e-6 * A.grad.norm()


def test_autocast_leaves_float64_alone():
    x, call = LAYOUTS["3-D"](), arguments(bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = projected_lora(x, **call)
    assert torch.equal(y, projected_lora(x, **call))


@pytest.mark.parametrize(
    "dtype, autocast, bound",
    [
        (torch.float64, False, 1e-14),
        (torch.float32, False, 1e-6),
        (torch.float16, False, 1e-3),
        (torch.bfloat16, False, 8e-3),
        (torch.float32, True, 8e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("complement", [True, False], ids=["range basis", "null basis"])
def test_protected_inputs_get_no_output_from_the_adapter(complement, dtype, autocast, bound):
    """Beyond the rounding of x, of A P and of the result, relative to what plain LoRA does to other inputs."""
    call = arguments(dtype, adapter=torch.promote_types(dtype, torch.float32), complement=complement)
    call["weight"].zero_()
    P = dense_projector(call["basis"], complement, D_IN)
    x = torch.randn(64, D_IN, dtype=torch.float64)
    protected = (x - x @ P).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        leak = projected_lora(protected, **call).norm() / projected_lora(x.to(dtype), **{**call, "basis": None}).norm()
    assert leak < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen pair"])
def test_dropout_acts_on_the_input_of_the_adapter_alone(dtype, frozen):
    x, call = LAYOUTS["3-D"]().to(dtype), arguments(dtype, frozen=frozen, bias=True)
    keep = dropout_factors(x.shape, dtype, 0.5, 11)
    (y, *ours), (plain, *theirs) = run(x, call, dropout=0.5, seed=11), textbook(x, call, dtype, keep)
    truth, *true = textbook(x, call, keep=keep)
    for result in (y, plain, truth):
        result.sum().backward()
    assert_as_exact_as_plain(y, plain, truth)
    for a, b, c in zip(ours, theirs, true, strict=True):
        assert_as_exact_as_plain(a.grad, b.grad, c.grad)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_rescales_the_rest(dropout):
    factors = dropout_factors((4000, D_IN), torch.float32, dropout, 3)
    assert set(factors.unique().tolist()) == {0.0, torch.tensor(1 / (1 - dropout)).item()}
    share = (factors == 0).double().mean().item()
    assert abs(share - dropout) < 5 * (dropout * (1 - dropout) / factors.numel()) ** 0.5


def test_the_seed_determines_the_dropout_mask():
    shape = (9, D_IN)
    by_int = dropout_factors(shape, torch.float32, 0.5, 3)
    assert torch.equal(by_int, dropout_factors(shape, torch.float32, 0.5, torch.tensor(3)))
    assert not torch.equal(by_int, dropout_factors(shape, torch.float32, 0.5, 4))
    torch.manual_seed(1)
    drawn = dropout_factors(shape, torch.float32, 0.5, None)
    assert not torch.equal(drawn, dropout_factors(shape, torch.float32, 0.5, None))
    torch.manual_seed(1)
    assert torch.equal(drawn, dropout_factors(shape, torch.float32, 0.5, None))


def test_neither_a_given_seed_nor_no_dropout_touches_the_global_generator():
    state, x, call = torch.get_rng_state(), LAYOUTS["ragged"](), arguments()
    run(x, call, dropout=0.5, seed=1)[0].sum().backward()
    state_after = torch.get_rng_state()
    assert not torch.equal(state, state_after)  # arguments() itself drew
    run(x, call, dropout=0.5, seed=1)[0].sum().backward()
    run(x, call)[0].sum().backward()
    assert torch.equal(torch.get_rng_state(), state_after)


@automatic
@pytest.mark.cpu_kernels
@pytest.mark.parametrize("name, other", [("reference", "auto"), ("auto", "reference"), ("cpu", "reference")])
def test_a_backward_pass_takes_the_masks_of_its_forward_pass_whatever_is_asked_for_meanwhile(name, other):
    require_extension()
    x, call, gradients = LAYOUTS["3-D"](), arguments(), []
    for outside in (name, other):
        with gk.use_backend(name):
            y, *leaves = run(x, call, dropout=0.5, seed=1)
        with gk.use_backend(outside):
            gradients.append(torch.autograd.grad(y.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointing_redraws_the_same_dropout():
    x, call = LAYOUTS["3-D"](), arguments(frozen=True)

    def layer(x, A, B):
        return projected_lora(x, **{**call, "lora_A": A, "lora_B": B}, dropout=0.3).square()

    grads = []
    for wrap in (lambda *leaves: layer(*leaves), lambda *leaves: checkpoint(layer, *leaves, use_reentrant=False)):
        leaves = [t.clone().requires_grad_() for t in (x, call["lora_A"], call["lora_B"])]
        torch.manual_seed(4)
        y = wrap(*leaves)
        torch.rand(3)  # what follows the layer draws too
        y.sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(grad.abs().sum() > 0 for grad in grads[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_x_and_one_activation_of_width_r(adapter, dropout):
    x = torch.randn(6, 50, D_IN).bfloat16().requires_grad_()
    call = arguments(torch.bfloat16, adapter=adapter, bias=True, frozen=True)
    call["lora_A"].requires_grad_()
    call["lora_B"].requires_grad_()
    given = {t.untyped_storage().data_ptr() for t in (x, *call.values()) if isinstance(t, torch.Tensor)}
    extra = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in given:
            extra.append((tuple(t.shape), t.element_size() * t.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        projected_lora(x, **call, dropout=dropout)
    seed = 8 if dropout else 0
    assert sum(size for _, size in extra) == 2 * (6 * 50 * R + R * D_IN) + seed, extra


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank_is_width", [False, True])
def test_no_output_shares_memory_with_an_input_or_another_output(case, rank_is_width):
    x, call = LAYOUTS["ragged"](), arguments(**CASES[case])
    if rank_is_width:
        call.update(lora_A=torch.eye(D_IN, dtype=torch.float64), lora_B=torch.zeros(D_OUT, D_IN, dtype=torch.float64))
    inputs = [x, *(t for t in call.values() if isinstance(t, torch.Tensor))]
    before = [t.clone() for t in inputs]
    tail = [call[name] for name in ("frozen_A", "frozen_B")]
    head = [call[name] for name in ("weight", "lora_A", "lora_B", "basis", "complement", "scale")]
    y, h, A_P = OPS.projected_lora_forward(x, *head, call["bias"], *tail, 0.0, None, None)
    grads = OPS.projected_lora_backward(torch.ones_like(y), x, h, A_P, *head, *tail, 0.0, None, None, [True] * 3, None)
    pointers = [t.untyped_storage().data_ptr() for t in (y, h, A_P, *grads, *inputs)]
    assert len(set(pointers)) == len(pointers)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


SIZES = [9, 1, 19]  # of D_OUT outputs


def fused_arguments(dtype=torch.float64, **case):
    """Keyword arguments of one call for the layers of SIZES, and of a call for each."""
    call = {**arguments(dtype, **case), "output_sizes": SIZES}
    for A in ("lora_A", "frozen_A"):
        if call[A] is not None:
            call[A] = torch.cat([call[A] + i for i in range(len(SIZES))])
    alone = []
    for i, (weight, lora_B) in enumerate(zip(call["weight"].split(SIZES), call["lora_B"].split(SIZES), strict=True)):
        alone.append({**call, "weight": weight, "lora_B": lora_B, "output_sizes": None})
        alone[i]["lora_A"] = call["lora_A"][i * R : (i + 1) * R]
        if call["bias"] is not None:
            alone[i]["bias"] = call["bias"].split(SIZES)[i]
        if call["frozen_A"] is not None:
            alone[i]["frozen_A"] = call["frozen_A"][i * R0 : (i + 1) * R0]
            alone[i]["frozen_B"] = call["frozen_B"].split(SIZES)[i]
    return call, alone


def run_each(x, dy, calls, **more):
    """y, dx, dA, dB of a call per layer, stacked as one call stacks them."""
    results = [run(x, call, **more) for call in calls]
    for (y, *_), part in zip(results, dy.split(SIZES, dim=-1), strict=True):
        y.backward(part)
    ys, xs, As, Bs = zip(*results, strict=True)
    dx = torch.stack([x.grad for x in xs]).sum(0)
    return torch.cat(ys, -1).detach(), dx, torch.cat([A.grad for A in As]), torch.cat([B.grad for B in Bs])


@pytest.mark.parametrize("dtype, dropout", [*((dtype, 0.0) for dtype in DTYPES), (torch.float64, 0.4)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_layers_of_one_input_as_one_call_equal_a_call_each(dtype, dropout, case):
    more = {"dropout": dropout, "seed": 3}
    x, (call, calls) = LAYOUTS["3-D"]().to(dtype), fused_arguments(dtype, **CASES[case])
    y, *leaves = run(x, call, **more)
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    plain = run_each(x, dy, calls, **more)
    exact = [{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in one.items()} for one in calls]
    truth = run_each(x.double(), dy.double(), exact, **more)
    for ours, theirs, true in zip((y.detach(), *(t.grad for t in leaves)), plain, truth, strict=True):
        assert_as_exact_as_plain(ours, theirs, true)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"output_sizes": [9, 19]}, r"output_sizes must be positive and add up to d_out = 29, got \[9, 19\]"),
        ({"output_sizes": [30, -1]}, r"output_sizes must be positive"),
        ({"output_sizes": []}, r"output_sizes must be positive"),
        ({"lora_A": torch.zeros(4, D_IN)}, r"lora_A must be \(3 · r, d_in\)"),
        ({"lora_B": torch.zeros(D_OUT, 9)}, r"lora_B must be \(d_out, r\) = \(29, 3\)"),
    ],
)
def test_output_sizes_that_do_not_fit_are_refused(change, message):
    call, _ = fused_arguments(torch.float32)
    with pytest.raises(ValueError, match=message):
        projected_lora(torch.randn(2, D_IN), **{**call, **change})


SAMPLES = {
    **{name: {"case": case} for name, case in CASES.items()},
    "without grad": {"case": CASES["bias and frozen pair"], "grad": False},
    "dropout": {"case": CASES["bias and frozen pair"], "dropout": 0.3},
    "dropout, without grad": {"case": CASES["range basis"], "dropout": 0.3, "grad": False},
    "half": {"case": {**CASES["bias and frozen pair"], "dtype": torch.bfloat16, "adapter": torch.float32}},
    "no token": {"case": CASES["bias and frozen pair"], "layout": "no token"},
    "one vector": {"case": CASES["bias and frozen pair"], "layout": "one vector"},
    "batch second": {"case": CASES["bias and frozen pair"], "layout": "batch second"},
    "column-major": {"case": CASES["range basis"], "layout": "column-major"},
    "transposed matrices": {"case": CASES["bias and frozen pair"], "transposed": True},
    "transposed matrices, no basis": {"case": CASES["no basis"], "transposed": True},
    "layers of one input": {"case": CASES["bias and frozen pair"], "fused": True},
}


def sample(case, grad=True, dropout=0.0, layout="ragged", transposed=False, fused=False):
    """Positional arguments of one call."""
    call = fused_arguments(**case)[0] if fused else arguments(**case)
    sizes = [call.pop("output_sizes")] if fused else []
    x = LAYOUTS[layout]().to(call["weight"].dtype)
    if transposed:
        call = {k: v.T.contiguous().T if isinstance(v, torch.Tensor) and v.dim() == 2 else v for k, v in call.items()}
    for t in (x, call["lora_A"], call["lora_B"]):
        t.requires_grad_(grad)
    return (x, *call.values(), dropout, torch.tensor(7) if dropout else None, *sizes)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_public_op_passes_opcheck(name):
    # Its half-precision gradients differ between eager and compiled in the order of additions.
    opcheck(OPS.projected_lora.default, sample(**SAMPLES[name]), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "name", ["bias and frozen pair", "dropout", "half", "no token", "transposed matrices, no basis"]
)
def test_the_forward_op_passes_opcheck(name):
    opcheck(OPS.projected_lora_forward.default, (*sample(**SAMPLES[name]), None), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_the_backward_op_passes_opcheck(needs):
    x, *head, bias, frozen_A, frozen_B, dropout, seed = sample(CASES["bias and frozen pair"], grad=False, dropout=0.3)
    y, h, A_P = OPS.projected_lora_forward(x, *head, bias, frozen_A, frozen_B, dropout, seed, None)
    opcheck(
        OPS.projected_lora_backward.default,
        (torch.randn_like(y), x, h, A_P, *head, frozen_A, frozen_B, dropout, seed, None, list(needs), None),
    )


@automatic
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "case, more, compiler, autocast",
    [
        ("range basis", {}, "aot_eager", False),
        ("no basis", {}, "aot_eager", False),
        ("bias and frozen pair", {"dropout": 0.3, "seed": torch.tensor(5)}, "aot_eager", False),
        ("bias and frozen pair", {"dropout": 0.3, "seed": torch.tensor(5)}, "aot_eager", True),
        ("null basis, frozen pair", {}, "inductor", False),
    ],
    ids=["range basis", "no basis", "all", "all, autocast", "inductor"],
)
def test_compiles_to_one_graph_for_every_token_count(case, more, compiler, autocast):
    counter, call = CompileCounterWithBackend(compiler), arguments(torch.float32, **CASES[case])

    def layer(x, A, B):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return projected_lora(x * 2, **{**call, "lora_A": A, "lora_B": B}, **more) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for tokens in (7, 12):
        x, results = torch.randn(2, tokens, D_IN), []
        for function in (layer, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, call["lora_A"], call["lora_B"])]
            y = function(*leaves)
            y.float().square().mean().backward()
            results.append([y, *(leaf.grad for leaf in leaves)])
        tolerance = 2e-2 if autocast else 1e-5
        for eager, other in zip(*results, strict=True):
            assert eager.dtype == other.dtype
            assert error(other, eager.double()) < tolerance
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1] > 0


@automatic
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_the_seed_drawn_inside():
    call = arguments(torch.float32)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def layer(x, A, B):
        return projected_lora(x, **{**call, "lora_A": A, "lora_B": B}, dropout=0.5)

    A, B = call["lora_A"].requires_grad_(), call["lora_B"].requires_grad_()
    x = torch.randn(9, D_IN)
    first, second = layer(x, A, B), layer(x, A, B)
    assert not torch.equal(first, second)
    first.sum().backward()
    # y = x Wᵀ + s·h Bᵀ with the h of this very mask: the gradient of B ties backward's mask to forward's.
    adapter = (first - x @ call["weight"].T).detach()
    h = torch.linalg.lstsq(B.detach().double(), adapter.double().T).solution.T / call["scale"]
    assert error(B.grad, call["scale"] * h.sum(0).expand(D_OUT, R)) < 1e-4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_without_autograd(mode):
    x, call = LAYOUTS["ragged"](), arguments(frozen=True)
    with mode():
        y = projected_lora(x, **call)
    assert error(y, textbook(x, call)[0].detach()) < 1e-14


#: What models do to a layer's output; each returns a new tensor, or the given one where ``inplace``.
CHANGES = {
    "addition": lambda y, x, inplace: y.add_(x[..., :1]) if inplace else y + x[..., :1],
    "activation": lambda y, x, inplace: F.silu(y, inplace=inplace),
    "dropout": lambda y, x, inplace: F.dropout(y, 0.5, True, inplace),
    "its first half": lambda y, x, inplace: _first_half_doubled(y if inplace else y.clone()),
}


def _first_half_doubled(y):
    y[..., : D_OUT // 2] *= 2
    return y


@pytest.mark.parametrize("case, more", [("bias and frozen pair", {}), ("range basis", {"dropout": 0.3, "seed": 5})])
@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["", "checkpoint", "reentrant checkpoint"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_output_may_be_changed_in_place(change, checkpointed, case, more):
    call, results = arguments(**CASES[case]), []
    for layout in ("3-D", "ragged"):
        for inplace in (False, True):
            x, A, B = (t.clone().requires_grad_() for t in (LAYOUTS[layout](), call["lora_A"], call["lora_B"]))
            x.data.fill_(0.7)

            def block(x, A, B, inplace=inplace):
                return CHANGES[change](projected_lora(x, **{**call, "lora_A": A, "lora_B": B}, **more), x, inplace)

            torch.manual_seed(4)
            y = block(x, A, B) if checkpointed is None else checkpoint(block, x, A, B, use_reentrant=checkpointed)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, A.grad, B.grad])
        expected, actual = results[-2:]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_an_output_without_a_graph_may_be_changed_in_place():
    x, call = LAYOUTS["3-D"](), arguments(bias=True)
    with torch.no_grad():
        y = projected_lora(x, **call)
    factor = torch.full((D_OUT,), 2.0, dtype=torch.float64, requires_grad=True)
    expected = y * factor.detach()
    assert torch.equal(y.mul_(factor).detach(), expected)


@automatic
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_where_the_output_is_changed_in_place():
    call, x = arguments(torch.float32, bias=True, frozen=True), torch.randn(2, 7, D_IN)

    def block(x, A, B):
        y = projected_lora(x, **{**call, "lora_A": A, "lora_B": B})
        y += x[..., :1]
        return y

    results = []
    for function in (block, torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, call["lora_A"], call["lora_B"])]
        y = function(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager.double()) < 1e-5


def good(**changes):
    call = {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "lora_A": torch.ones(1, 3), "lora_B": torch.ones(4, 1)}
    return {**call, **changes}


@pytest.mark.parametrize(
    "changes, exception, message",
    [
        ({"x": torch.ones(2, 3).long()}, TypeError, r"x must be float64.*got torch.int64 of shape \(2, 3\)"),
        ({"weight": torch.ones(4, 3).long()}, TypeError, "weight must be float64.*got torch.int64"),
        ({"lora_A": torch.ones(1, 3).long()}, TypeError, "lora_A must be float64.*got torch.int64"),
        ({"lora_B": torch.ones(4, 1).long()}, TypeError, "lora_B must be float64.*got torch.int64"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must be \(d_out, d_in\), got shape \(3,\)"),
        ({"x": torch.ones(2, 5)}, ValueError, r"x must be \(\.\.\., d_in\) with d_in = 3 .*\(4, 3\)\), got \(2, 5\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \(\.\.\., d_in\) with d_in = 3 .*got \(\)"),
        ({"x": torch.ones(2, 3).half()}, TypeError, "must share one dtype.*got x torch.float16, weight torch.float32"),
        ({"bias": torch.ones(4).half()}, TypeError, "must share one dtype.*bias torch.float16"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \(d_out,\) = \(4,\), got shape \(3,\)"),
        ({"lora_A": torch.ones(1, 4)}, ValueError, r"lora_A must be \(r, d_in\) .*d_in = 3, got shape \(1, 4\)"),
        ({"lora_A": torch.ones(3)}, ValueError, r"lora_A must be \(r, d_in\) .*got shape \(3,\)"),
        ({"lora_A": torch.ones(0, 3)}, ValueError, r"lora_A must be \(r, d_in\) with r >= 1 .*got shape \(0, 3\)"),
        ({"lora_B": torch.ones(4, 2)}, ValueError, r"lora_B must be \(d_out, r\) = \(4, 1\) .*got \(4, 2\)"),
        ({"basis": torch.ones(4, 2)}, ValueError, r"basis must be \(d, k\) with d = 3 .*of x.*got shape \(4, 2\)"),
        ({"basis": torch.ones(3, 4)}, ValueError, r"basis must be \(d, k\) .*k <= d, got shape \(3, 4\)"),
        ({"basis": torch.ones(3, 1).long()}, TypeError, "basis must be float64.*got torch.int64"),
        ({"frozen_A": torch.ones(1, 3)}, ValueError, "frozen_A and frozen_B must be given together, or neither"),
        ({"frozen_B": torch.ones(4, 1)}, ValueError, "frozen_A and frozen_B must be given together, or neither"),
        (
            {"frozen_A": torch.ones(1, 4), "frozen_B": torch.ones(4, 1)},
            ValueError,
            r"frozen_A must be \(r, d_in\) .*d_in = 3, got shape \(1, 4\)",
        ),
        (
            {"frozen_A": torch.ones(2, 3), "frozen_B": torch.ones(4, 1)},
            ValueError,
            r"frozen_B must be \(d_out, r\) = \(4, 2\) .*got \(4, 1\)",
        ),
        (
            {"frozen_A": torch.ones(2, 3).int(), "frozen_B": torch.ones(4, 2)},
            TypeError,
            "frozen_A must be float64.*got torch.int32",
        ),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1\.0"),
        ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0\.1"),
        ({"dropout": 0.1, "seed": torch.ones(1).long()}, ValueError, r"seed, a 0-dimensional int64 .*of shape \(1,\)"),
        ({"dropout": 0.1, "seed": torch.tensor(1.0)}, ValueError, "0-dimensional int64 tensor, got torch.float32"),
        *(
            ({name: torch.ones(*size, device="meta")}, ValueError, f"{name} is on meta but x is on cpu")
            for name, *size in (("weight", 4, 3), ("lora_A", 1, 3), ("lora_B", 4, 1), ("basis", 3, 1), ("bias", 4))
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(changes, exception, message):
    with pytest.raises(exception, match=f"projected_lora: .*{message}"):
        projected_lora(**good(**changes))


def test_the_op_itself_refuses_dropout_without_a_seed():
    call = good()
    with pytest.raises(ValueError, match="dropout > 0 needs seed, a 0-dimensional int64 tensor, got None"):
        OPS.projected_lora(*call.values(), dropout=0.5)


def test_the_good_call_is_good():
    y = projected_lora(**good())
    assert torch.equal(y, F.linear(torch.ones(2, 3), torch.ones(4, 3)) + 3)


@pytest.mark.parametrize("d_in, d_out", [(0, 4), (5, 0), (0, 0)])
def test_layers_without_features(d_in, d_out):
    x, A, B = (torch.randn(*size, requires_grad=True) for size in ((2, 3, d_in), (2, d_in), (d_out, 2)))
    y = projected_lora(x, torch.randn(d_out, d_in), A, B, torch.randn(d_in, 0))
    assert y.shape == (2, 3, d_out) and not y.any()
    y.sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in (x, A, B))
