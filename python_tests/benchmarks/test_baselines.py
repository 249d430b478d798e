"""The baselines compute what they say, and plain PEFT is PEFT."""

import pytest
import torch
from torch import nn

from benchmarks import (
    baselines,
    bench_covariance,
    bench_fused_lora,
    bench_null_projection,
    bench_planning,
    bench_projected_lora,
)

DTYPES = ("bfloat16", "float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peft_lora_is_the_arithmetic_of_pefts_layer(dtype):
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(24, 20, bias=False)).to(dtype)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=False))
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.dtype == B.dtype == torch.float32
    x, dy = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True), torch.randn(3, 5, 20, dtype=dtype)
    theirs = model(x)
    ours = baselines.peft_lora(x, layer.base_layer.weight, A, B, layer.scaling["default"])
    grads = [torch.autograd.grad(y, (x, A, B), dy) for y in (theirs, ours)]
    assert torch.equal(ours, theirs)
    assert all(torch.equal(mine, its) for mine, its in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "module", [bench_covariance, bench_projected_lora, bench_fused_lora, bench_null_projection, bench_planning]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_contestant_computes_the_case(module, dtype):
    for params in module.cases("tiny", (dtype,)):
        case = module.build(**params)
        assert tuple(case.contestants) == tuple(module.CONTESTANTS)
        refused = {name for name in case.contestants if case.refusal(name)}
        # A bfloat16 product of bfloat16 inputs is not accurate enough for a covariance; it is listed to show that.
        assert refused == ({"own dtype"} if module is bench_covariance and dtype == "bfloat16" else set())


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_unguarded_leak(dtype):
    torch_dtype = getattr(torch, dtype)
    Q = torch.linalg.qr(torch.randn(30, 10))[0]
    A = torch.randn(4, 30)
    for name, way in bench_projected_lora.ways(Q, torch_dtype).items():
        if name == "frozen linear":
            continue
        leak = bench_projected_lora.leak(way, A.to(way.adapter or torch_dtype), Q, torch_dtype)
        assert leak > 0.2 if way.computes == "plain" else leak < (1e-2 if dtype == "bfloat16" else 1e-5), name


def test_dense_p_module_starts_at_the_base_layer():
    linear = nn.Linear(12, 9)
    Q = torch.linalg.qr(torch.randn(12, 4))[0]
    P = baselines.dense_projector(Q, torch.float32)
    naive = baselines.DensePLinear(linear.weight, linear.bias, torch.randn(3, 12), torch.randn(9, 3), P, 2.0)
    x = torch.randn(5, 12)
    torch.testing.assert_close(naive(x), linear(x))
    with torch.no_grad():
        naive.lora_A.normal_()
    protected = torch.randn(5, 4) @ Q.T
    torch.testing.assert_close(naive(protected), linear(protected))


def test_hooks_of_the_covariance_look_for_non_finite_values():
    x = torch.randn(4, 6)
    x[1, 2] = float("inf")
    with pytest.raises(ValueError, match="non-finite"):
        baselines.cov_corda_hook(torch.zeros(6, 6), x)
