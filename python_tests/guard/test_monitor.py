"""The drift of adapted layers while they are trained, in a loop of one's own."""

import copy
import math
import warnings

import peft
import pytest
import torch
from guard_helpers import PlainModel, batch_of, collect, perturb, plan_for, tiny_gpt2, tiny_llama

import guardspace_kernels as gk
from guardspace_kernels.guard import certificate, monitor
from guardspace_kernels.guard.monitor import DriftMeter
from guardspace_kernels.nn import ProjectedLoraLinear

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain_lora(model, **config):
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **config}))


def guarded(model, stats, **options):
    return gk.attach_guard(model, plan_for(model, stats), **options)


BUILD = {
    "plain": lambda model, stats: plain_lora(model),
    "guarded": guarded,
    "frozen": lambda model, stats: guarded(model, stats, residual="frozen"),
}


def train(model, watch=lambda model: None, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = batch_of()
    model.train()
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        watch(model)
        optimizer.step()
        optimizer.zero_grad()
        watch(model)
    return model


def state_of(model):
    """All that a measurement must leave alone."""
    return (
        [(name, p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone(), p._version)
         for name, p in model.named_parameters()],
        [module.training for module in model.modules()],
        torch.get_rng_state(),
    )  # fmt: skip


def same_state(a, b):
    (ours, modes, rng), (theirs, their_modes, their_rng) = a, b
    return (
        modes == their_modes
        and torch.equal(rng, their_rng)
        and all(
            x[0] == y[0]
            and torch.equal(x[1], y[1])
            and x[2] == y[2]
            and x[4] == y[4]
            and (x[3] is None) == (y[3] is None)
            and (x[3] is None or torch.equal(x[3], y[3]))
            for x, y in zip(ours, theirs, strict=True)
        )
    )


@pytest.mark.parametrize("kind", BUILD)
def test_a_loop_is_measured_as_certify_does_and_left_alone(kind):
    base = tiny_llama()
    stats = collect(base)
    seen = []
    meter = DriftMeter(stats, per_layer=True)

    def watch(model):
        before = state_of(model)
        values = meter(model)
        assert same_state(before, state_of(model))
        report = gk.certify(model, stats)
        drifts = {row.name: row.drift for row in report.layers}
        for name, drift in drifts.items():
            assert values[f"guard/drift/{name}"] == pytest.approx(drift, rel=1e-6, abs=1e-12)
        worst = max(drifts, key=drifts.get)
        assert values["guard/drift_worst"] == pytest.approx(drifts[worst], rel=1e-6, abs=1e-12)
        assert drifts[values["guard/drift_worst_layer"]] == pytest.approx(drifts[worst], rel=1e-6, abs=1e-12)
        mean = math.fsum(drifts.values()) / len(drifts)
        assert values["guard/drift_mean"] == pytest.approx(mean, rel=1e-6, abs=1e-12)
        assert len(values) == 3 + len(stats.layers)
        seen.append(values["guard/drift_mean"])

    watched = train(BUILD[kind](copy.deepcopy(base), stats), watch)
    unwatched = train(BUILD[kind](copy.deepcopy(base), stats))
    assert len(seen) == 8 and seen[0] < 1e-6 < 1e-3 < seen[-1]
    for (name, ours), theirs in zip(watched.named_parameters(), unwatched.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_what_does_not_change_is_computed_once(monkeypatch, tmp_path):
    model = tiny_llama()
    collect(model).save(tmp_path / "stats")
    stats = gk.CalibrationStatistics.load(tmp_path / "stats")
    calls = {"outputs": 0, "checks": 0, "read": 0}

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(monitor, "squared_output", counted("outputs", monitor.squared_output))
    monkeypatch.setattr(monitor, "check_statistics", counted("checks", monitor.check_statistics))
    monkeypatch.setattr(certificate, "checked_covariance", counted("read", certificate.checked_covariance))
    meter = DriftMeter(stats)
    one, other = plain_lora(model), perturb(plain_lora(tiny_llama()))
    for _ in range(3):
        meter(one)
    inputs = len(stats.inputs)
    assert calls == {"outputs": len(stats.layers), "checks": 1, "read": 3 * inputs} and inputs < len(stats.layers)
    drift = meter(other)["guard/drift_mean"]
    assert calls["checks"] == 2 and drift > 0
    assert meter(one)["guard/drift_mean"] == 0 and calls["checks"] == 3
    assert not any(isinstance(entry.stored, torch.Tensor) for entry in stats.inputs)  # still in their file


def test_max_drift_raises_with_the_layer():
    model = tiny_llama()
    stats = collect(model)
    plain = perturb(plain_lora(model))
    drifts = DriftMeter(stats).layer_drifts(plain)
    worst = max(drifts, key=drifts.get)
    assert DriftMeter(stats, max_drift=drifts[worst])(plain)["guard/drift_worst_layer"] == worst
    with pytest.raises(gk.DriftExceededError, match=rf"^layer {worst} drifts by .* above max_drift = ") as caught:
        DriftMeter(stats, max_drift=0.99 * drifts[worst])(plain)
    assert caught.value.report is None and caught.value.drift == drifts
    meter = DriftMeter(stats, max_drift=1e9)
    assert "layer b drifts by nan" in meter.failure({"a": 1.0, "b": math.nan, "c": 2.0})


def test_models_that_cannot_be_judged():
    model = tiny_llama()
    stats = collect(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapted layer"):
        DriftMeter(stats)(model)
    plain = perturb(plain_lora(copy.deepcopy(model)))
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.k_proj has no statistics; collect them"):
        DriftMeter(collect(model, target_modules=["q_proj"]))(plain)
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj: its base weight is not the one"):
        DriftMeter(stats)(plain_lora(changed))
    with plain.disable_adapter(), pytest.raises(ValueError, match="its adapter is switched off"):
        DriftMeter(stats)(plain)
    with torch.no_grad():
        plain.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"up_proj: the adapter holds non-finite values; its training diverged"):
        DriftMeter(stats, max_drift=1e9)(plain)


def test_sharded_parameters_are_refused():
    model = tiny_llama()
    stats = collect(model)
    plain = plain_lora(model)
    plain.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].weight.ds_id = 0
    with pytest.raises(
        TypeError, match=r"layer model\.layers\.1\.mlp\.up_proj: its parameters are divided by DeepSpeed"
    ):
        DriftMeter(stats)(plain)


def test_weights_that_differ_beside_the_adapter_are_named_once():
    model = tiny_gpt2()
    stats = collect(model)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] += 1.0
    plain = plain_lora(model, target_modules=["c_attn"], fan_in_fan_out=True)
    meter = DriftMeter(stats)
    with pytest.warns(UserWarning, match=r"in transformer\.ln_f\.weight \(changed\) beside the adapter: the drift"):
        meter(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meter(plain)


def test_layers_without_peft():
    model = PlainModel()
    stats = collect(model)
    space = plan_for(model, stats).space_of("q")
    model.q = ProjectedLoraLinear.from_linear(model.q, 2, space.basis, complement=space.complement)
    perturb(model)
    assert DriftMeter(stats).layer_drifts(model) == {"q": gk.certify(model, stats).layers[0].drift}
