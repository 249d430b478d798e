"""The estimator's sizes are exact, its times add up, and it needs no weights."""

import pytest
import torch
from guard_helpers import collect, plan_for, tiny_gpt2, tiny_llama
from test_passes import BATCHES

from guardspace_kernels.guard import estimate
from guardspace_kernels.guard.estimate import estimate_preparation


@pytest.fixture
def unit(monkeypatch):
    """Every sample takes one second."""
    monkeypatch.setattr(estimate, "_seconds", lambda run, device: run() is None or 1.0)


def test_sizes_are_those_of_the_files(tmp_path):
    model = tiny_llama()
    guess = estimate_preparation(model, prompts=10, tokens_per_prompt=8, rank=3)
    stats = collect(model, BATCHES)
    stats.save(tmp_path / "s")
    plan = plan_for(model, stats)
    plan.save(tmp_path / "p")
    covariances = [one.features for one in stats.inputs for _ in range(1 + (one.held is not None))]
    assert len(covariances) == len(stats.inputs) + 1
    triangles = sum(4 * d * (d + 1) // 2 for d in covariances)
    samples = sum(one.sample.rows.nbytes + one.sample.keys.nbytes for one in stats.inputs)
    assert guess.collection.stored_bytes == triangles
    assert triangles <= (tmp_path / "s").stat().st_size - samples <= triangles + 20_000  # sinks and header
    assert guess.collection.whole_bytes == sum(4 * d**2 for d in covariances)
    held = sum(t.nbytes for space in plan.spaces for t in [space.basis])
    held += sum(t.nbytes for layer in plan.layers.values() for t in (layer.A0, layer.B0))
    assert held <= guess.plan_bytes


@pytest.mark.parametrize("make, budget", [(tiny_llama, 40_000), (tiny_gpt2, 80_000)])
def test_a_model_without_weights_gives_the_same(make, budget, unit):
    options = {"prompts": 10, "tokens_per_prompt": 8, "answer_tokens": 2, "max_memory": budget}
    real = estimate_preparation(make(), **options)
    assert estimate_preparation(make().to("meta"), **options) == real
    assert len(real.collection.passes) > 1
    assert "collect" in str(real) and "plan" in str(real) and "passes instead of" in str(real)


def test_times_add_up(unit, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model = tiny_llama()
    small = estimate_preparation(model, prompts=16, tokens_per_prompt=8, answer_tokens=3, batch_size=8)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert small.forward_seconds == pytest.approx(2 * weights / (48 * 32))
    assert small.generate_seconds == pytest.approx(3 * small.forward_seconds)
    assert small.covariance_seconds == 2 * 8  # two batches, eight distinct inputs
    # A null space for each input, one without the prompts that are held out, a start for each layer.
    assert small.plan_seconds == 8 + 1 + 14
    assert small.tokens == 16 * 11


def test_wide_layers_are_scaled_by_the_cube(monkeypatch):
    widths = []
    monkeypatch.setattr(estimate, "_seconds", lambda run, device: run() or 2.0)
    seconds = estimate._solve_seconds(4096, lambda d: widths.append(d) or (lambda: None), torch.device("cpu"))
    assert widths == [1024] and seconds == 2.0 * 4**3
    assert estimate._solve_seconds(640, lambda d: widths.append(d) or (lambda: None), torch.device("cpu")) == 2.0
    assert widths == [1024, 640]
