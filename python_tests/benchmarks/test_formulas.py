"""What CI gates instead of time: FLOPs, bytes and what is saved for backward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baselines, bench_covariance, bench_null_projection, bench_projected_lora, roofline
from benchmarks.timing import saved_bytes
from guardspace_kernels.ops.covariance import reference as covariance_reference
from guardspace_kernels.ops.null_projection import reference as projection_reference
from guardspace_kernels.ops.projected_lora import algebra, aten

T, D_IN, D_OUT, R = 14, 24, 20, 4
K = bench_projected_lora.protected_dims(D_IN)


def addmm_flops(_, left, right, **__):
    return 2 * left[0] * left[1] * right[1]


def counted(run):
    # torch counts addmm, but not when it works in place.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        run()
    return counter.get_total_flops()


def lora_tensors():
    return torch.randn(T, D_IN), torch.randn(D_OUT, D_IN), torch.randn(R, D_IN), torch.randn(D_OUT, R)


def lora_case(**changes):
    return bench_projected_lora.build(**{"T": T, "d_in": D_IN, "d_out": D_OUT, "r": R, "dtype": "float32", **changes})


@pytest.mark.parametrize("virtual", [False, True])
def test_flops_of_the_reference_are_those_of_the_formula(virtual):
    x, W, A, B = lora_tensors()
    Q = torch.linalg.qr(torch.randn(D_IN, K))[0]
    frozen = (torch.randn(R, D_IN), torch.randn(D_OUT, R)) if virtual else (None, None)

    layer = algebra.Layer(W, None, Q, True, 2.0, *frozen)

    def run():
        factors = algebra.Factors(A, B, layer, x.dtype)
        algebra.form(aten.primitives(), factors, A, B, layer)
        y, h = algebra.forward(aten.primitives(), x, factors, layer)
        algebra.backward(aten.primitives(), y, x, h, factors, A, B, layer, [True] * 3)

    assert counted(run) == lora_case().contestants["ours" if virtual else "ours, frozen residual"].flops


@pytest.mark.parametrize("name", [n for n in bench_projected_lora.CONTESTANTS if not n.startswith("ours")])
def test_flops_of_a_baseline_are_those_of_the_formula(name):
    contestant = lora_case().contestants[name]
    assert counted(contestant.run) == contestant.flops


def test_rho_is_the_adapters_share():
    flops, case = bench_projected_lora.Flops.of(T, D_IN, D_OUT, R), lora_case()
    assert case.rho == pytest.approx(case.contestants["ours, frozen residual"].flops / flops.base - 1)
    assert flops.base == case.contestants["frozen linear"].flops


def test_flops_of_a_covariance():
    x, C = torch.randn(9, 12), torch.zeros(12, 12)
    whole = bench_covariance.flops(9, 12, symmetric=False)
    assert counted(lambda: baselines.cov_addmm(C, x)) == whole
    assert counted(lambda: covariance_reference.covariance_update_([(C, x, None, 1.0)])) == whole
    # The lower triangle with its diagonal: d (d + 1) / 2 of d² entries.
    assert bench_covariance.flops(9, 12, symmetric=True) * 2 * 12 == whole * 13


def test_flops_of_a_null_projection():
    G, Q = torch.randn(3, 12), torch.linalg.qr(torch.randn(12, 4))[0]
    P = baselines.dense_projector(Q, torch.float32)
    thin, dense = bench_null_projection.flops(3, 12, 4), bench_null_projection.flops(3, 12, 4, dense=True)
    assert counted(lambda: baselines.project_addmm_(G, Q)) == thin
    assert counted(lambda: projection_reference.project(G, Q, True)) == thin
    assert counted(lambda: baselines.project_dense(G, P)) == dense


@pytest.mark.parametrize("name", bench_null_projection.CONTESTANTS)
def test_flops_of_a_model_are_the_sum_over_gradients_and_parameters(name):
    case = bench_null_projection.build(r=2, blocks=1)
    widths = [width for width, layers in bench_null_projection.SMOLLM2_BLOCK for _ in range(layers)]
    assert len(widths) == 7
    dense = name == "dense P"
    expected = 2 * sum(bench_null_projection.flops(2, d, round(d / 3), dense) for d in widths)
    assert case.contestants[name].flops == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_least_bytes_are_those_of_the_tensors(dtype):
    x, W, A, B = lora_tensors()
    Q, y = torch.randn(D_IN, K), torch.randn(T, D_OUT)
    big = 3 * x.to(dtype).nbytes + 2 * y.to(dtype).nbytes + 2 * W.to(dtype).nbytes
    expected = big + 2 * (Q.nbytes + A.nbytes + B.nbytes)
    assert bench_projected_lora.least_bytes(T, D_IN, D_OUT, R, x.to(dtype).element_size()) == expected
    triangle = D_IN * (D_IN + 1) // 2
    assert bench_covariance.least_bytes(T, D_IN, x.to(dtype).element_size()) == x.to(dtype).nbytes + 8 * triangle
    assert bench_null_projection.build(R, D_IN, K).bytes == 2 * A.nbytes + Q.nbytes


@pytest.mark.parametrize("shape", [(256, 576, 576), (1024, 576, 1536)])
@pytest.mark.parametrize("ours", ["ours", "ours, frozen residual"])
def test_saved_bytes_are_at_most_those_of_plain_peft(shape, ours):
    T, d_in, d_out = shape
    for dtype in ("bfloat16", "float32"):
        contestants = lora_case(T=T, d_in=d_in, d_out=d_out, r=16, dtype=dtype).contestants
        saved, plain = (contestants[name].facts()["saved"] for name in (ours, "PEFT LoRA"))
        # In float32 PEFT keeps x and h and nothing else; ours keeps A P besides.
        A_P = 16 * d_in * 4 if dtype == "float32" else 0
        assert saved <= plain + A_P


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    x, W = torch.randn(4, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    assert saved_bytes(lambda: x @ W, (W,)) == x.nbytes
    assert saved_bytes(lambda: x @ W, ()) == x.nbytes + W.nbytes
    assert saved_bytes(lambda: (x @ W) + (x.view(2, 12) * x.view(2, 12)).sum(), (W,)) == x.nbytes
    part = torch.randn(10, 6, requires_grad=True)
    assert saved_bytes(lambda: part[:4] @ W, (W,)) == part.nbytes  # a view keeps the whole storage alive
    assert saved_bytes(lambda: x.detach() @ W.detach(), ()) == 0


class CountedBytes(TorchDispatchMode):
    """Of the tensors that kernels read and write; views are no kernels."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.total += sum(t.nbytes for t in (*args, result) if isinstance(t, torch.Tensor))
        return result


@pytest.mark.parametrize("name, parts", [("plain LoRA", ("adapter",)), ("dense P per token", ("adapter", "dense_p"))])
def test_bytes_and_flops_of_an_eager_way_are_those_of_its_kernels(name, parts):
    x, W, A, B = (t.bfloat16() for t in lora_tensors())
    P, dy = torch.eye(D_IN).bfloat16(), torch.randn(T, D_OUT).bfloat16()
    x, A, B = (t.requires_grad_() for t in (x, A, B))
    layer = baselines.plain_lora if name == "plain LoRA" else baselines.dense_p
    with CountedBytes() as counted_bytes:
        y = layer(x, W, A, B, *([P] if layer is baselines.dense_p else []), 2.0)
        torch.autograd.grad(y, (x, A, B), dy)
    way = roofline.lora_ways(T, D_IN, D_OUT, R)[name]
    assert sum(kernel.bytes for kernel in way) == counted_bytes.total
    flops = bench_projected_lora.Flops.of(T, D_IN, D_OUT, R)
    assert sum(kernel.flops for kernel in way) == flops.counted(*parts)


@pytest.mark.parametrize("name", ["ours, fused", "ours, two calls", "folded eager"])
def test_flops_of_a_folded_way_are_those_of_its_kernels(name):
    flops = bench_projected_lora.Flops.of(T, D_IN, D_OUT, R)
    way = roofline.lora_ways(T, D_IN, D_OUT, R)[name]
    assert sum(kernel.flops for kernel in way) == flops.counted("adapter", "fold")


def test_bytes_of_the_fused_way():
    x, W, A, B = (t.bfloat16() for t in lora_tensors())
    y, h, Q = torch.empty(T, D_OUT).bfloat16(), torch.empty(T, R).bfloat16(), torch.empty(D_IN, K)
    A32, H = A.float(), torch.empty(R, K)
    forward = [x, A, h, x, W, h, B, y]
    backward = [y, B, h, h, B, h, x, A, y, W, h, A, x]  # dh and dB from one reading of dy, dA, dx
    fold = 2 * [A32, Q, H, A32, Q, H, A32]
    way = roofline.lora_ways(T, D_IN, D_OUT, R)["ours, fused"]
    assert sum(kernel.bytes for kernel in way) == sum(t.nbytes for t in forward + backward + fold)


def test_two_calls_read_and_write_y_and_dx_once_more():
    ways = roofline.lora_ways(T, D_IN, D_OUT, R)
    fused, apart = (sum(kernel.bytes for kernel in ways[name]) for name in ("ours, fused", "ours, two calls"))
    assert apart - fused == 2 * 2 * (T * D_OUT + T * D_IN)


def test_a_bound_is_the_larger_of_computing_and_moving():
    for kernel, gpu, seconds in (
        (roofline.Kernel(312_000_000_000_000, 1), "A100", 1.0),
        (roofline.Kernel(1, 3_350_000_000_000), "H100", 1.0),
        (roofline.Kernel(989_000_000_000, 6_700_000_000), "H100", 2e-3),
    ):
        assert kernel.seconds(gpu) == pytest.approx(seconds)
    # 2 · 4096³ FLOPs at 989 TFLOP/s, and three matrices of 32 MiB at 3.35 TB/s.
    square = roofline.product(4096, 4096, 4096)
    assert square.seconds("H100") == pytest.approx(0.139e-3, rel=1e-3) and square.bytes == 3 * 2**25


def test_the_roofline_has_every_layer_of_every_model():
    text = roofline.render()
    assert text.count("| ours, fused |") == 11 and text.count("d = 4096: ours |") == 2
    assert "| q, k, v, o | 4096 → 4096 | frozen linear | 275 | 201 | 1365 | 0.881 | 0.278 |" in text
