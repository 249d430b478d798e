"""CovarianceAccumulator: what its hook counts, and when."""

from __future__ import annotations

import pytest
import torch
from oracle import error
from torch import nn

from guardspace_kernels.nn import CovarianceAccumulator

D = 7


def covariance(x):
    return x.double().reshape(-1, D).T @ x.double().reshape(-1, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_batch_of_the_attached_layer_counts(dtype):
    layer, accumulator = nn.Linear(D, 3), CovarianceAccumulator(D, dtype)
    batches = [torch.randn(2, 5, D), torch.randn(3, D), torch.randn(0, D)]
    with accumulator.attached(layer) as same:
        assert same is accumulator
        for x in batches:
            layer(x)
    layer(torch.randn(9, D))  # detached again
    C = accumulator.covariance()
    assert C.dtype == dtype and error(C, sum(covariance(x) for x in batches)) < 1e-6
    assert accumulator.tokens == 13
    assert torch.equal(C, C.T)


def test_an_input_by_name_counts_and_one_that_is_no_tensor_is_refused():
    layer, accumulator, x = nn.Linear(D, 3), CovarianceAccumulator(D), torch.randn(5, D)
    with accumulator.attached(layer):
        layer(input=x)
        for call in (lambda: layer(), lambda: layer(None), lambda: layer([x])):
            with pytest.raises(TypeError, match=r"first input of Linear must be a tensor, got (NoneType|list)"):
                call()
    assert error(accumulator.covariance(), covariance(x)) < 1e-6


@pytest.mark.parametrize(
    "x, dtype",
    [
        (1e20 * torch.ones(2, D), torch.float32),
        (1e200 * torch.ones(2, D, dtype=torch.float64), torch.float64),
        (torch.full((2, D), torch.nan), torch.float32),
        (torch.tensor([[0.0] * (D - 1) + [-torch.inf]]), torch.float64),
    ],
)
def test_a_covariance_that_overflows_is_refused_when_it_is_read(x, dtype):
    accumulator = CovarianceAccumulator(D, dtype)
    accumulator.update(torch.randn(5, D))
    accumulator.covariance()
    accumulator.update(x)
    with pytest.raises(ValueError, match=rf"the covariance is not finite: .* overflow {dtype}; mask such rows, or"):
        accumulator.covariance()


def test_float16_inputs_of_any_size_do_not_overflow():
    accumulator, x = CovarianceAccumulator(D), torch.full((3000, D), 65504.0).half()
    accumulator.update(x)
    assert error(accumulator.covariance(), covariance(x)) < 1e-6


def test_reading_the_covariance_does_not_change_it():
    accumulator = CovarianceAccumulator(D)
    x = torch.randn(5, D)
    accumulator.update(x)
    accumulator.covariance().zero_()
    accumulator.update(x)
    assert error(accumulator.covariance(), 2 * covariance(x)) < 1e-6


def test_only_unmasked_rows_count_and_only_within_the_context():
    layer, accumulator = nn.Linear(D, 3), CovarianceAccumulator(D)
    x, mask = torch.randn(2, 4, D), torch.tensor([[0, 1, 1, 2], [1, 1, 0, 0]])
    x[mask == 0] = float("nan")
    with accumulator.attached(layer):
        with accumulator.masked(mask):
            layer(x)
        assert accumulator.tokens == 5
        layer(torch.ones(1, D))
    kept = torch.cat([x[mask != 0], torch.ones(1, D)])
    assert accumulator.tokens == 6 and error(accumulator.covariance(), covariance(kept)) < 1e-6


def test_masks_nest_and_end_with_an_exception():
    accumulator, layer = CovarianceAccumulator(D), nn.Linear(D, 3)
    accumulator.attach(layer)
    with accumulator.masked(torch.tensor([True, False])):
        with accumulator.masked(None):
            layer(torch.ones(2, D))
        with pytest.raises(KeyError), accumulator.masked(torch.tensor([False, False])):
            raise KeyError
        layer(torch.ones(2, D))
    assert accumulator.tokens == 3


def test_the_hook_is_removed_whatever_happens():
    layer, accumulator = nn.Linear(D, 3), CovarianceAccumulator(D)
    with pytest.raises(ValueError, match="x must be"), accumulator.attached(layer):
        layer(torch.randn(2, D + 1))
    assert not layer._forward_pre_hooks
    assert accumulator.tokens == 0 and not accumulator.lower.any()


def test_attaching_twice_is_refused_and_detaching_twice_is_not():
    layer, accumulator = nn.Linear(D, 3), CovarianceAccumulator(D)
    accumulator.attach(layer)
    with pytest.raises(RuntimeError, match=r"attached already; detach\(\) it first"):
        accumulator.attach(nn.Linear(D, 3))
    accumulator.detach()
    accumulator.detach()
    accumulator.attach(layer)
    layer(torch.randn(2, D))
    assert accumulator.tokens == 2


def test_other_hooks_stay():
    layer, calls = nn.Linear(D, 3), []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with CovarianceAccumulator(D).attached(layer):
        pass
    layer(torch.randn(2, D))
    assert calls == [1]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_layer_runs_as_without_it(mode):
    layer, accumulator = nn.Linear(D, 3), CovarianceAccumulator(D)
    with mode():
        x = torch.randn(2, D)
        if not x.is_inference():
            x.requires_grad_()
        expected = layer(x)
        with accumulator.attached(layer):
            y = layer(x)
    assert torch.equal(y, expected) and y.requires_grad == expected.requires_grad
    assert not accumulator.lower.requires_grad and accumulator.tokens == 2


def test_half_precision_inputs_under_autocast_keep_float32_products():
    x, accumulator = torch.randn(64, D).bfloat16(), CovarianceAccumulator(D)
    layer = nn.Linear(D, 3)
    with accumulator.attached(layer), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert error(accumulator.covariance(), covariance(x)) < 1e-6


def test_the_state_dict_round_trips():
    accumulator, other = CovarianceAccumulator(D), CovarianceAccumulator(D)
    accumulator.update(torch.randn(5, D))
    other.load_state_dict(accumulator.state_dict())
    assert torch.equal(other.covariance(), accumulator.covariance()) and other.tokens == 5


def test_repr_names_what_matters():
    accumulator = CovarianceAccumulator(D, torch.float64)
    assert f"features={D}, dtype=torch.float64, attached=False" in repr(accumulator)
    with accumulator.attached(nn.Linear(D, 3)):
        assert "attached=True" in repr(accumulator)
