"""The eager path of a guarded layer beside the registered op: equal bit for bit, and what backward reads."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from backends import automatic, same_bits
from oracle import orthonormal
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import guardspace_kernels as gk
from guardspace_kernels.ops import projected_lora
from guardspace_kernels.ops.projected_lora import algebra, cpu_kernels, eager
from guardspace_kernels.ops.projected_lora.algebra import Layer

D_IN, D_OUT, R = 40, 24, 3


def nothing():
    pass


@pytest.fixture(params=["one call", "single products"], autouse=True)
def way(request, monkeypatch):
    """The backend's own choice, which for these sizes is one call, and the other."""
    if request.param == "single products":
        monkeypatch.setattr(cpu_kernels, "tokens_of_one_call", lambda *_: (1, 0))


class Made(nn.Module):
    """A layer by the eager path (``direct``) or by the op, of the same tensors."""

    def __init__(self, dtype=torch.float32, adapter=None, frozen=True, bias=False, basis=True, complement=True,
                 projected=False, dropout=0.0, sizes=None):  # fmt: skip
        super().__init__()
        adapter = adapter or torch.promote_types(dtype, torch.float32)
        parts = len(sizes or [D_OUT])
        self.A = nn.Parameter(torch.randn(R * parts, D_IN).to(adapter))
        self.B = nn.Parameter(torch.randn(D_OUT, R).to(adapter))
        self.spare = eager.Spare()
        Q = orthonormal(D_IN, 7 if complement else 33, torch.promote_types(adapter, torch.float32))
        pair = (torch.randn(R * parts, D_IN).to(adapter), torch.randn(D_OUT, R).to(adapter)) if frozen else (None, None)
        self.layer = Layer(
            torch.randn(D_OUT, D_IN).to(dtype), torch.randn(D_OUT).to(dtype) if bias else None, Q if basis else None,
            complement, 0.7, *pair, None, sizes, projected,
        )  # fmt: skip
        self.dropout = dropout

    def direct(self, x):
        y = eager.run(self.spare, nothing, x, self.A, self.B, self.layer, self.dropout)
        assert y is not None
        return y

    def op(self, x):
        weight, bias, basis, complement, scale, frozen_A, frozen_B, _, sizes, projected = self.layer
        return projected_lora(
            x, weight, self.A, self.B, basis, complement, scale, bias, frozen_A, frozen_B, self.dropout, None, sizes,
            projected,
        )  # fmt: skip

    def gradients(self, run, x, dy=None):
        """y, dx, dA, dB."""
        x = x.detach().requires_grad_()
        torch.manual_seed(0)
        y = run(x)
        y.backward(torch.ones_like(y) if dy is None else dy)
        grads = [x.grad, self.A.grad, self.B.grad]
        self.A.grad = self.B.grad = None
        return [y.detach(), *grads]


def assert_same(ours, theirs):
    for name, a, b in zip(("y", "dx", "dA", "dB"), ours, theirs, strict=True):
        assert a.shape == b.shape and same_bits(a, b), name


CASES = {
    "default": {},
    "zero start": {"frozen": False},
    "bias": {"bias": True},
    "null basis": {"complement": False},
    "no basis": {"basis": False},
    "step mode": {"projected": True},
    "dropout": {"dropout": 0.4},
    "layers of one input": {"sizes": [7, 17]},
    "adapter in 16 bits": {"adapter": torch.bfloat16},
}


@pytest.mark.parametrize("shape", [(5,), (2, 5), (130,), (1, 2, 3), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_op_bit_for_bit(case, dtype, shape):
    made = Made(dtype, **CASES[case])
    for _ in range(2):  # with new buffers, and with standing ones
        x = torch.randn(*shape, D_IN).to(dtype)
        assert_same(made.gradients(made.direct, x), made.gradients(made.op, x))
    assert len(made.spare) == 1
    with torch.no_grad():
        torch.manual_seed(0)
        y = made.direct(x)
        torch.manual_seed(0)
        assert same_bits(y, made.op(x))
    assert len(made.spare) == 1


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_under_autocast_it_equals_the_op(inside):
    made = Made(bias=True)
    x = torch.randn(2, 5, D_IN)

    def gradients(run):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(leaf)
            if inside:
                y.sum().backward()
        if not inside:
            y.sum().backward()
        grads = [y.detach(), leaf.grad, made.A.grad, made.B.grad]
        made.A.grad = made.B.grad = None
        return grads

    ours = gradients(made.direct)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    assert_same(ours, gradients(made.op))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_default_device_changes_nothing(dropout):
    made, x = Made(dropout=dropout), torch.randn(2, 5, D_IN)
    expected = made.gradients(made.op, x)
    with torch.device("meta"):
        assert_same(made.gradients(made.direct, x), expected)
        assert_same(made.gradients(made.op, x), expected)


def change_in_place(t):
    t.mul_(-2.0)


def change_uncounted(t):
    t.data.mul_(-2.0)


def change_storage(t):
    t.data = -2.0 * t.data


@pytest.mark.parametrize("change", [change_in_place, change_uncounted, change_storage])
@pytest.mark.parametrize("frozen", [True, False])
def test_backward_reads_what_its_own_forward_used(frozen, change):
    """Several forwards before a backward, with A and B changed in between, as pipelines and preference losses do."""
    made = Made(frozen=frozen)
    xs = [torch.randn(4, D_IN) for _ in range(3)]
    truths, ys = [], []
    for x in xs:
        truths.append(made.gradients(made.op, x))
        leaf = x.clone().requires_grad_()
        ys.append((leaf, made.direct(leaf)))
        with torch.no_grad():
            change(made.A)
            change(made.B)
    for (leaf, y), truth in reversed(list(zip(ys, truths, strict=True))):
        y.sum().backward()
        assert_same([y.detach(), leaf.grad, made.A.grad, made.B.grad], truth)
        made.A.grad = made.B.grad = None
    del leaf, y
    ys.clear()
    gc.collect()
    assert len(made.spare) == 2  # the third buffers were not kept


def test_a_graph_that_is_kept_keeps_its_buffers():
    made = Made()
    x = torch.randn(4, D_IN, requires_grad=True)
    y = made.direct(x)
    y.sum().backward(retain_graph=True)
    first, made.A.grad = made.A.grad, None
    assert not made.spare
    with torch.no_grad():
        made.A.mul_(3.0)
    made.gradients(made.direct, torch.randn(2, D_IN))
    y.sum().backward()
    assert same_bits(made.A.grad, first)
    del y
    assert made.spare


@pytest.mark.parametrize("what", ["weight", "basis", "x"])
def test_what_autograd_saved_must_not_be_written_to_before_backward(what):
    made = Made()
    x = torch.randn(4, D_IN, requires_grad=True)
    inputs = x * 1.0
    y = made.direct(inputs)
    with torch.no_grad():
        (inputs if what == "x" else getattr(made.layer, what)).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["default", "dropout"])
def test_checkpointing_recomputes_with_other_buffers(case, reentrant):
    made = Made(**CASES[case])
    x = torch.randn(4, D_IN)
    plain = made.gradients(made.direct, x)
    for _ in range(3):
        assert_same(
            made.gradients(lambda leaf: checkpoint(made.direct, leaf, use_reentrant=reentrant), x),
            plain,
        )
    assert 1 <= len(made.spare) <= 2


def test_the_output_may_be_changed_in_place():
    made = Made()
    x = torch.randn(2, 3, D_IN)
    ours = made.gradients(lambda leaf: made.direct(leaf).mul_(2.0), x)
    assert_same(ours, made.gradients(lambda leaf: made.op(leaf).mul_(2.0), x))


def test_buffers_made_in_inference_mode_serve_training():
    made = Made()
    with torch.inference_mode():
        made.direct(torch.randn(4, D_IN))
    x = torch.randn(4, D_IN)
    assert_same(made.gradients(made.direct, x), made.gradients(made.op, x))
    with torch.inference_mode():
        assert same_bits(made.direct(x), made.op(x))


def test_copies_have_buffers_of_their_own():
    made = Made()
    made.direct(torch.randn(4, D_IN))
    twin = copy.deepcopy(made)
    assert made.spare and not twin.spare
    x = torch.randn(4, D_IN)
    assert_same(twin.gradients(twin.direct, x), made.gradients(made.direct, x))


@pytest.mark.parametrize("change", ["scale", "frozen pair", "dtype", "rank", "backend"])
def test_buffers_of_something_else_are_not_used(change):
    made = Made()
    made.direct(torch.randn(4, D_IN))
    if change == "scale":
        made.layer = made.layer._replace(scale=-3.0)
    elif change == "frozen pair":
        made.layer = made.layer._replace(frozen_A=2.0 * made.layer.frozen_A)
    elif change == "dtype":
        made.layer = made.layer._replace(weight=made.layer.weight.double())
    elif change == "rank":
        made.A.data, made.B.data = torch.randn(R + 2, D_IN), torch.randn(D_OUT, R + 2)
    x = torch.randn(4, D_IN, dtype=made.layer.weight.dtype)
    if change == "backend":
        with gk.use_backend("reference"):
            assert_same(made.gradients(made.direct, x), made.gradients(made.op, x))
            made.direct(x)
        return
    assert_same(made.gradients(made.direct, x), made.gradients(made.op, x))


@pytest.mark.parametrize("later", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize(
    "x, exception, message",
    [
        (torch.randn(4, D_IN + 1), ValueError, r"x must be \(\.\.\., d_in\) with d_in = 40"),
        (torch.randn(4, D_IN).double(), TypeError, "must share one dtype"),
        (torch.ones(4, D_IN, dtype=torch.int64), TypeError, "x must be float64, float32"),
        (torch.tensor(1.0), ValueError, r"x must be \(\.\.\., d_in\)"),
    ],
)
def test_bad_inputs_are_refused_as_the_op_refuses_them(x, exception, message, later):
    made = Made()
    if later:
        made.direct(torch.randn(4, D_IN))
    with pytest.raises(exception, match=message):
        made.direct(x)
    good = torch.randn(4, D_IN)
    assert_same(made.gradients(made.direct, good), made.gradients(made.op, good))


def test_tensors_that_no_longer_fit_are_refused_not_read():
    for change in ("basis", "bias", "weight", "B"):
        made = Made(torch.float16, bias=True)  # whose products are all kernels of ours
        made.direct(torch.randn(4, D_IN).half())
        if change == "B":
            made.B.data = torch.randn(D_OUT - 1, R)
        else:
            t = getattr(made.layer, change)
            made.layer = made.layer._replace(**{change: t[: len(t) - 1].clone()})
        with pytest.raises((ValueError, RuntimeError), match="must be"):
            made.direct(torch.randn(4, D_IN).half())


def test_dropout_of_everything_is_refused():
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        Made(dropout=1.0).direct(torch.randn(4, D_IN))


def test_a_second_derivative_is_refused():
    made = Made()
    x = torch.randn(4, D_IN, requires_grad=True)
    (dx,) = torch.autograd.grad(made.direct(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()


@automatic
def test_gradients_are_those_of_finite_differences():
    made = Made(torch.float64)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True)

    def run(x, A, B):
        return eager.run(made.spare, nothing, x, A, B, made.layer._replace(basis=None))

    assert torch.autograd.gradcheck(run, (x, made.A, made.B))


def test_a_batch_of_gradients_is_that_of_each():
    made = Made(torch.float64)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True)
    dys = torch.randn(4, 2, 3, D_OUT, dtype=torch.float64)
    y = made.direct(x)
    (batch,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    each = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys])
    torch.testing.assert_close(batch, each)


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class SeenToo(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@automatic
def test_whatever_else_would_see_the_call_gets_the_op():
    made = Made()
    x = torch.randn(4, D_IN)

    def left_to_the_op(x):
        return eager.run(made.spare, nothing, x, made.A, made.B, made.layer) is None

    assert not left_to_the_op(x)
    assert left_to_the_op(x.as_subclass(Subclass)) and left_to_the_op(x.to_sparse())
    for mode in (Seen(), SeenToo()):
        with mode:
            assert left_to_the_op(x)
    seen = []
    torch.vmap(lambda one: seen.append(left_to_the_op(x)) or one)(x)
    torch.func.grad(lambda one: seen.append(left_to_the_op(x)) or one.sum())(x)
    assert seen == [True, True]


@automatic
def test_threads_take_turns_at_the_buffers():
    made = Made()
    xs = [torch.randn(16, D_IN) for _ in range(4)]
    truths = [made.gradients(made.op, x)[:2] for x in xs]
    wrong = []

    def work(x, truth):
        for _ in range(50):
            leaf = x.clone().requires_grad_()
            y = made.direct(leaf)
            (dx,) = torch.autograd.grad(y.sum(), leaf)
            if not (same_bits(y.detach(), truth[0]) and same_bits(dx, truth[1])):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, truths, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(made.spare) <= 2


@automatic
def test_of_a_long_input_the_frozen_half_of_h_is_not_kept():
    made = Made()
    saved = []
    x = torch.randn(2**14, D_IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made.direct(x)
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    constants = {t.untyped_storage().data_ptr() for t in (x, made.layer.weight, made.layer.basis)}
    assert sum(size for place, size in kept.items() if place not in constants) == 4 * 2**14 * R


@automatic
def test_a_captured_graph_keeps_its_buffers_for_itself(monkeypatch):
    made, x = Made(), torch.randn(4, D_IN)
    monkeypatch.setattr(eager, "_stream", lambda x: eager._NOWHERE)
    made.direct(x)
    assert not made.spare
    monkeypatch.setattr(eager, "_stream", lambda x: 7)
    made.direct(x)
    mine = made.spare[0]
    made.direct(x)
    assert made.spare[0] is mine
    monkeypatch.setattr(eager, "_stream", lambda x: 8)
    made.direct(x)
    assert made.spare[0] is not mine


def test_factors_are_rounded_once():
    made = Made(torch.bfloat16)
    factors = algebra.Factors(made.A, made.B, made.layer, torch.bfloat16)
    assert same_bits(factors.up[:, R:], (-made.layer.scale * made.layer.frozen_B).bfloat16())
