"""ProjectedLoraLinear: what it shares, keeps, saves and merges."""

from __future__ import annotations

import copy

import pytest
import torch
from backends import automatic
from oracle import dense_projector, error, orthonormal
from torch import nn

from guardspace_kernels.nn import FusedProjectedLoraLinear, ProjectedLoraLinear

D_IN, D_OUT, R, K = 19, 13, 3, 6


def linear(dtype=torch.float64, bias=True):
    return nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype)


def start(dtype=torch.float64):
    return torch.randn(R, D_IN, dtype=dtype), torch.randn(D_OUT, R, dtype=dtype)


def trained(layer):
    """The layer with another A and B, as after some steps."""
    with torch.no_grad():
        layer.lora_A.add_(torch.randn_like(layer.lora_A))
        layer.lora_B.add_(torch.randn_like(layer.lora_B))
    return layer


def build(base=None, *, init=True, dtype=torch.float64, k=K, **options):
    base = linear() if base is None else base
    return ProjectedLoraLinear.from_linear(
        base, R, orthonormal(D_IN, k, dtype), init=start(dtype) if init else None, dtype=dtype, **options
    )


@pytest.mark.parametrize("complement", [True, False], ids=["range basis", "null basis"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("init", [True, False], ids=["given", "default init"])
def test_the_output_is_unchanged_at_the_start(init, bias, complement):
    base, x = linear(bias=bias), torch.randn(4, 5, D_IN, dtype=torch.float64)
    layer = build(base, init=init, complement=complement)
    assert error(layer(x), base(x).double()) < 1e-13
    assert error(trained(layer)(x), base(x).double()) > 0.1


@pytest.mark.parametrize("complement", [True, False], ids=["range basis", "null basis"])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_forward_equals_the_textbook_layer(alpha, complement):
    base, basis, (A0, B0) = linear(), orthonormal(D_IN, K), start()
    options = {"complement": complement, "alpha": alpha, "dtype": torch.float64}
    layer = trained(ProjectedLoraLinear.from_linear(base, R, basis, init=(A0, B0), **options))
    s, P = (2.0 if alpha is None else alpha / R), dense_projector(basis, complement, D_IN)
    x = torch.randn(7, D_IN, dtype=torch.float64)
    W_res = base.weight - s * B0 @ A0 @ P
    expected = x @ W_res.T + s * ((x @ P) @ layer.lora_A.T) @ layer.lora_B.T + base.bias
    assert layer.scale == s and error(layer(x), expected.detach()) < 1e-14


def test_protected_inputs_keep_their_output_whatever_is_trained():
    base, basis = linear(), orthonormal(D_IN, K)
    layer = trained(ProjectedLoraLinear.from_linear(base, R, basis, init=start(), dtype=torch.float64))
    x = torch.randn(7, K, dtype=torch.float64) @ basis.T
    assert error(layer(x).detach(), base(x).detach()) < 1e-13  # of an adapter a hundred times as large


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("init", [True, False])
def test_merge_is_an_ordinary_layer_with_the_same_output(init, bias):
    base = linear(bias=bias)
    layer = trained(build(base, init=init))
    merged, x = layer.merge(), torch.randn(7, D_IN, dtype=torch.float64)
    assert type(merged) is nn.Linear and (merged.bias is not None) == bias
    assert error(merged(x), layer(x).detach()) < 1e-14
    F, G = layer.delta_factors()
    assert error(base.weight.detach() + F @ G, merged.weight.detach()) < 1e-14
    pointers = {t.data_ptr() for t in layer.state_dict().values() if t is not None}
    assert pointers.isdisjoint(t.data_ptr() for t in merged.parameters())


@pytest.mark.parametrize("setting", ["autocast", "medium", "bf16 for one backend"])
def test_merge_and_the_delta_ignore_reduced_precision(setting, matmul_precision):
    basis = orthonormal(96, 32, torch.float32)
    init = torch.randn(64, 96), torch.randn(128, 64)
    layer = trained(ProjectedLoraLinear.from_linear(nn.Linear(96, 128), 64, basis, init=init))
    expected = layer.merge().weight
    if setting != "autocast":
        matmul_precision(setting)
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
        assert torch.equal(layer.merge().weight, expected)


def test_merge_of_a_float64_layer_keeps_its_precision():
    base = linear()
    layer = trained(ProjectedLoraLinear.from_linear(base, R, orthonormal(D_IN, K)))
    F, G = layer.delta_factors()
    assert F.dtype == torch.float32
    assert error(layer.merge().weight, base.weight + F.double() @ G.double()) < 1e-15


@pytest.mark.parametrize("value, dtype", [(torch.nan, torch.float64), (1e6, torch.float16)], ids=["NaN", "overflow"])
def test_merge_that_is_not_finite_is_refused(value, dtype):
    layer = build(linear(dtype), dtype=torch.float32)
    with torch.no_grad():
        layer.lora_B.fill_(value)
    with pytest.raises(ValueError, match=rf"merged weight is not finite in {dtype}"):
        layer.merge()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["subclass", "hook", "pre-hook", "forward", "parametrisation"])
def test_layers_that_are_more_than_their_weight_are_not_replaced(kind):
    base = Doubled(D_IN, D_OUT, dtype=torch.float64) if kind == "subclass" else linear()
    if kind == "hook":
        base.register_forward_hook(lambda _m, _a, y: 2 * y)
    elif kind == "pre-hook":
        base.register_forward_pre_hook(lambda _m, args: (2 * args[0],))
    elif kind == "forward":
        base.forward = lambda x: 2 * nn.functional.linear(x, base.weight)
    elif kind == "parametrisation":
        nn.utils.parametrize.register_parametrization(base, "weight", nn.Identity())
    with pytest.raises(TypeError, match=r"linear must be a plain torch\.nn\.Linear, .*which would be lost"):
        build(base)
    with pytest.raises(TypeError, match="linear must be a plain"):
        FusedProjectedLoraLinear.from_linears([linear(), base], R, orthonormal(D_IN, K))


def test_delta_factors_are_not_rounded_to_half_precision():
    layer = trained(build(linear(torch.bfloat16), dtype=torch.float32)).to(torch.bfloat16)
    F, G = layer.delta_factors()
    assert F.dtype == G.dtype == torch.float32
    live = G[:R]  # A is bfloat16 now; A P is not
    assert (live @ layer.projector.basis).norm() < 1e-6 * live.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_the_base_layer_is_shared_and_frozen(bias):
    base = linear(bias=bias)
    before = base.weight.detach().clone()
    layer = build(base)
    assert layer.weight.data_ptr() == base.weight.data_ptr() and base.weight.requires_grad
    assert not bias or layer.bias.data_ptr() == base.bias.data_ptr()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layer(torch.randn(3, D_IN, dtype=torch.float64)).sum().backward()
    assert layer.weight.grad is None and base.weight.grad is None and layer.lora_A.grad is not None
    trained(layer).merge()
    assert torch.equal(base.weight, before)


def test_the_initial_factors_are_copied():
    A0, B0 = start()
    A, B = A0.clone(), B0.clone()
    trained(ProjectedLoraLinear.from_linear(linear(), R, orthonormal(D_IN, K), init=(A0, B0), dtype=torch.float64))
    assert torch.equal(A, A0) and torch.equal(B, B0)


@pytest.mark.parametrize("fused", [False, True])
def test_training_never_moves_a_protected_output(fused):
    layer = build(linear(torch.float32), dtype=torch.float32)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.02, weight_decay=0.1, fused=fused)
    protected = torch.randn(7, K) @ layer.projector.basis.T
    before, x = layer(protected).detach(), torch.randn(30, D_IN)
    first = layer(x).square().mean().item()
    for _ in range(40):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert layer(x).square().mean() < 0.9 * first
    assert error(layer(protected).detach(), before.double()) < 2e-5


@pytest.mark.parametrize("to", ["same", "other width", "other form"])
def test_the_state_dict_round_trips(to):
    source = trained(build(k=K))
    target = build(source_base := linear(), k={"same": K}.get(to, K + 2), complement=to != "other form")
    result = target.load_state_dict(copy.deepcopy(source.state_dict()))
    x = torch.randn(7, D_IN, dtype=torch.float64)
    assert not result.missing_keys and not result.unexpected_keys
    assert target.projector.complement and target.projector.protected == K
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name
    assert error(target(x).detach(), source(x).detach()) < 1e-14
    assert target.weight.data_ptr() == source_base.weight.data_ptr()


def test_a_null_basis_is_loaded_as_one():
    source, target = build(k=K, complement=False), build(k=K)
    target.load_state_dict(source.state_dict())
    assert not target.projector.complement and target.projector.protected == D_IN - K


@pytest.mark.parametrize("change", ["another width of x", "no virtual residual"])
def test_a_state_dict_of_another_layer_is_refused(change):
    source = (
        ProjectedLoraLinear.from_linear(nn.Linear(D_IN + 1, D_OUT), R, orthonormal(D_IN + 1, K, torch.float32))
        if change == "another width of x"
        else build(init=False)
    )
    with pytest.raises(RuntimeError, match=r"size mismatch for projector\.basis|Missing key.*frozen_A"):
        build(init=True).load_state_dict(source.state_dict())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s | {"projector.basis": 2 * s["projector.basis"]}, "projector.basis is not orthonormal"),
        (lambda s: s | {"projector._extra_state": torch.tensor(False)}, "frozen_A acts outside the null space of the"),
        (lambda s: s | {"projector._extra_state": torch.tensor(1.0)}, "projector._extra_state must be one boolean"),
        (lambda s: s | {"frozen_A": s["frozen_A"] + 0.1}, r"frozen_A acts outside .* \(‖A₀P Q‖/‖A₀P‖ = .*altered"),
        (lambda s: s | {"frozen_A": s["frozen_A"].float() + 1e30}, "frozen_A acts outside"),
        (lambda s: s | {"frozen_B": s["frozen_B"] * torch.inf}, "frozen_B holds non-finite values"),
        (lambda s: s | {"lora_A": s["lora_A"] * torch.nan}, "lora_A holds non-finite values"),
        (lambda s: s | {"lora_B": s["lora_B"][:, :1]}, r"size mismatch for (0\.)?lora_B: saved as \(13, 1\), ours"),
        (lambda s: s | {"weight": s["weight"][:1]}, "size mismatch for (0.)?weight"),
        (lambda s: s | {"bias": 1.0}, "size mismatch for (0.)?bias: saved as float"),
    ],
)
def test_a_refused_state_changes_nothing(change, message, nested):
    layer, source = build(k=K + 2), trained(build(k=K))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    state = change(source.state_dict())
    module = nn.Sequential(layer) if nested else layer
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"Error.* in loading state_dict for ProjectedLoraLinear.*\n.*{message}"):
            module.load_state_dict({f"0.{k}": v for k, v in state.items()} if nested else state, strict=strict)
        assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s | {"extra": torch.ones(1)}, r"Unexpected key\(s\) in state_dict: extra"),
        (lambda s: {k: v for k, v in s.items() if "frozen" not in k}, r"Missing key\(s\) .*: frozen_A, frozen_B"),
    ],
)
def test_a_state_with_other_keys_changes_nothing_unless_asked_to(change, message):
    layer, source = build(), trained(build())
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(change(source.state_dict()))
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_a_part_of_a_state_is_loaded_where_asked_to():
    layer, source = build(), trained(build())
    part = {name: source.state_dict()[name] for name in ("lora_A", "lora_B")}
    layer.load_state_dict(part, strict=False)
    assert torch.equal(layer.lora_A, source.lora_A) and torch.equal(layer.lora_B, source.lora_B)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casting_leaves_the_basis_in_its_dtype(cast):
    layer = cast(nn.Sequential(build(linear(torch.float32), dtype=torch.float32)))[0]
    dtype = layer.weight.dtype
    assert dtype != torch.float32 and layer.lora_A.dtype == layer.frozen_A.dtype == dtype
    assert layer.projector.basis.dtype == torch.float32
    assert layer(torch.randn(2, D_IN, dtype=dtype)).dtype == dtype


def test_dropout_acts_in_training_mode_only():
    layer, x = trained(build(dropout=0.5)), torch.randn(7, D_IN, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and error(layer(x), layer.merge()(x).detach()) < 1e-14


def test_deep_copies_are_independent():
    layer = build()
    other = trained(copy.deepcopy(layer))
    assert other.lora_A.data_ptr() != layer.lora_A.data_ptr() and not torch.equal(other.lora_A, layer.lora_A)


def test_default_init_is_that_of_lora():
    layer = build(linear(torch.float32), init=False, dtype=torch.float32)
    assert not layer.lora_B.any() and layer.lora_A.abs().sum() > 0 and layer.frozen_A is layer.frozen_B is None
    assert layer.lora_A.abs().max() <= 2 * (1 / D_IN) ** 0.5
    assert (layer.lora_A @ layer.projector.basis).norm() < 1e-6


@automatic
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_to_one_graph():
    layer = trained(build(dropout=0.2)).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 9):
        x = torch.randn(tokens, D_IN, dtype=torch.float64)
        assert error(compiled(x).detach(), layer(x).detach()) < 1e-14


def test_repr_names_what_matters():
    text = repr(build(dropout=0.1, alpha=6))
    for word in (
        f"in_features={D_IN}",
        f"out_features={D_OUT}",
        "bias=True",
        f"rank={R}",
        f"protected={K}",
        "scale=2",
        "dropout=0.1",
    ):
        assert word in text
    assert "dropout" not in repr(build())


@pytest.mark.parametrize(
    "change, exception, message",
    [
        ({"linear": nn.Conv1d(3, 4, 1)}, TypeError, r"linear must be a torch\.nn\.Linear, got Conv1d"),
        ({"rank": 0}, ValueError, rf"rank must be from 1 to min\(d_out, d_in\) = {D_OUT}, got 0"),
        ({"rank": D_OUT + 1}, ValueError, f"= {D_OUT}, got {D_OUT + 1}"),
        (
            {"basis": torch.eye(D_IN + 1)[:, :2]},
            ValueError,
            rf"basis must be \(d, k\) with d = {D_IN} .*\({D_IN + 1}, 2\)",
        ),
        ({"basis": torch.ones(D_IN)}, ValueError, rf"basis must be \(d, k\) with d = 19 .*, got shape \({D_IN},\)"),
        (
            {"init": (torch.ones(R, D_IN), torch.ones(R, D_OUT))},
            ValueError,
            rf"init must be \(A0, B0\) of shapes \({R}, {D_IN}\) and \({D_OUT}, {R}\), got .* \({R}, {D_OUT}\)",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(change, exception, message):
    call = {"linear": linear(torch.float32), "rank": R, "basis": orthonormal(D_IN, K, torch.float32)}
    with pytest.raises(exception, match=message):
        ProjectedLoraLinear.from_linear(**{**call, **change})


@pytest.mark.parametrize("biases", [(True, True, True), (False, True, False), (False, False, False)], ids=str)
@pytest.mark.parametrize("init", [True, False], ids=["given", "default init"])
def test_fused_layers_equal_the_layers_apart(init, biases):
    sizes = [13, 4, 9]
    linears = [nn.Linear(D_IN, n, bias, dtype=torch.float64) for n, bias in zip(sizes, biases, strict=True)]
    pairs = [(torch.randn(R, D_IN), torch.randn(n, R)) for n in sizes] if init else None
    basis, options = orthonormal(D_IN, K), {"alpha": 5.0, "dtype": torch.float64}
    fused = trained(FusedProjectedLoraLinear.from_linears(linears, R, basis, init=pairs, **options))
    apart = []
    for i, (linear, A, B) in enumerate(
        zip(linears, fused.lora_A.split(R), fused.lora_B.split(sizes), strict=True)
    ):  # fmt: skip
        apart.append(
            ProjectedLoraLinear.from_linear(linear, R, basis, init=pairs[i] if init else None, **options)
        )  # fmt: skip
        apart[i].lora_A.data, apart[i].lora_B.data = A.detach().clone(), B.detach().clone()
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    outputs = fused(x)
    assert isinstance(outputs, tuple) and [y.shape[-1] for y in outputs] == sizes
    for y, layer, ordinary in zip(outputs, apart, fused.unfuse(), strict=True):
        assert error(y.detach(), layer(x).detach()) < 1e-13
        assert type(ordinary) is nn.Linear and (ordinary.bias is not None) == any(biases)
        assert error(ordinary(x).detach(), y.detach()) < 1e-13
    sum(y.square().sum() for y in outputs).backward()
    sum(layer(x).square().sum() for layer in apart).backward()
    assert error(fused.lora_A.grad, torch.cat([layer.lora_A.grad for layer in apart])) < 1e-13
    assert error(fused.lora_B.grad, torch.cat([layer.lora_B.grad for layer in apart])) < 1e-13
    again = copy.deepcopy(fused)
    again.load_state_dict(fused.state_dict())
    assert "output_sizes=[13, 4, 9]" in repr(again)


def test_outputs_of_fused_layers_may_be_changed_in_place_one_by_one():
    linears = [nn.Linear(D_IN, n, dtype=torch.float64) for n in (13, 4, 9)]
    layer = trained(FusedProjectedLoraLinear.from_linears(linears, R, orthonormal(D_IN, K), dtype=torch.float64))
    x, results = torch.randn(2, 5, D_IN, dtype=torch.float64), []
    for inplace in (False, True):
        layer.zero_grad()
        q, k, v = layer(x)
        kept = k.square()  # saves k for backward: what happens to q and v must not count as a change of it
        q = nn.functional.relu(q, inplace=inplace)
        v = v.mul_(3.0) if inplace else v * 3.0
        (q.square().sum() + kept.sum() + v.square().sum()).backward()
        results.append([q.detach(), k.detach(), v.detach(), layer.lora_A.grad, layer.lora_B.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@automatic
@pytest.mark.usefixtures("fresh_compiler")
def test_fused_layers_compile_to_one_graph():
    linears = [nn.Linear(D_IN, n) for n in (13, 4, 9)]
    layer = FusedProjectedLoraLinear.from_linears(linears, R, orthonormal(D_IN, K, torch.float32))
    trained(layer)

    def block(x):
        q, k, v = layer(x)
        q += 1
        return q.sum() * k + v.sum()

    x, results = torch.randn(2, 5, D_IN), []
    for function in (block, torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")):
        layer.zero_grad()
        function(x).sum().backward()
        results.append([layer.lora_A.grad.double(), layer.lora_B.grad.double()])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) < 1e-5


def test_layers_that_cannot_be_fused_are_refused():
    basis = orthonormal(D_IN, K, torch.float32)
    with pytest.raises(ValueError, match="linears must be layers of one d_in, dtype and device"):
        FusedProjectedLoraLinear.from_linears(
            [nn.Linear(D_IN, 8), nn.Linear(D_IN, 8, dtype=torch.bfloat16)], R, basis
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"init must have one \(A0, B0\) per layer, 2, got 1"):
        FusedProjectedLoraLinear.from_linears([nn.Linear(D_IN, 8)] * 2, R, basis, init=[start(torch.float32)])
    with pytest.raises(ValueError, match="linears must hold at least one layer"):
        FusedProjectedLoraLinear.from_linears([], R, basis)
