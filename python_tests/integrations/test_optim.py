"""Forward mode is exact under any optimiser; step mode is the same trajectory where it is accepted."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from transformers.optimization import Adafactor

import guardspace_kernels as gk

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(torch|peft|transformers|accelerate)")

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam decoupled": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "NAdam decoupled": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam decoupled": lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=3e-3, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
REFUSED = {
    "Adam with L2": (lambda p: torch.optim.Adam(p, weight_decay=0.1), "step mode with Adam needs weight_decay=0 or"),
    "NAdam with L2": (lambda p: torch.optim.NAdam(p, weight_decay=0.1), "NAdam needs weight_decay=0 or decoupled"),
    "RAdam with L2": (lambda p: torch.optim.RAdam(p, weight_decay=0.1), "RAdam needs weight_decay=0 or decoupled"),
    "Adamax with L2": (lambda p: torch.optim.Adamax(p, weight_decay=0.1), "Adamax needs weight_decay=0:"),
    "RMSprop with L2": (lambda p: torch.optim.RMSprop(p, weight_decay=0.1), "RMSprop needs weight_decay=0:"),
    "Adagrad with L2": (lambda p: torch.optim.Adagrad(p, weight_decay=0.1), "Adagrad needs weight_decay=0:"),
    "L2 in a later group": (
        lambda p: torch.optim.Adam([{"params": p[:1]}, {"params": p[1:], "weight_decay": 0.1}]),
        "step mode with Adam needs weight_decay=0 or",
    ),
    "torch Adafactor": (lambda p: torch.optim.Adafactor(p), "not exact with Adafactor"),
    "transformers Adafactor": (lambda p: Adafactor(p), "not exact with Adafactor"),
    "LBFGS": (lambda p: torch.optim.LBFGS(p), "not exact with LBFGS"),
    "unknown": (lambda p: type("Novel", (torch.optim.AdamW,), {})(p), "with Novel.*leave guard_optimizer out"),
}  # fmt: skip


def projected(model):
    return torch.cat([m.projector(m.A.detach()).flatten() for m in model.guarded_layers().values()])


def worst_leak(model):
    return max(layer.leak() for layer in model.guarded_layers().values())


# ---- forward mode


@pytest.mark.parametrize(
    "name", [*OPTIMIZERS, "Adam with L2", "Adamax with L2", "torch Adafactor", "LBFGS", "Adafactor"]
)
def test_forward_mode_protects_under_any_optimizer(tiny, name):
    make = OPTIMIZERS.get(name) or {**REFUSED, "Adafactor": REFUSED["transformers Adafactor"]}[name][0]
    model = tiny.guarded()
    optimizer = make(tiny.trainable(model))
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] or 1e-2
        if "Adafactor" in name:
            group.update(lr=1e-2, relative_step=False)
    if name == "LBFGS":

        def closure():
            optimizer.zero_grad()
            loss = model(**tiny.batch()).loss
            loss.backward()
            return loss

        optimizer.step(closure)
    else:
        tiny.train(model, optimizer, steps=8)
    protected, free = tiny.drift(model)
    assert protected < 1e-6
    assert free > 3e-4
    assert (worst_leak(model) > 1e-3) == (name not in ("SGD", "LBFGS"))  # A itself wanders; A P does not


def test_forward_mode_sees_edits_without_a_version_counter(tiny):
    model = tiny.guarded()
    before = tiny.logits(model)
    layer = model.guarded_layers()["model.layers.0.mlp.up_proj"]
    version = layer.A._version
    layer.A.data += torch.ones_like(layer.A)
    assert layer.A._version == version
    assert (tiny.logits(model) - before).abs().max() > 1e-3
    assert tiny.drift(model)[0] < 1e-6


def test_projecting_the_gradient_or_the_matrix_alone_is_not_enough(tiny):
    """{gradient, step} is forward mode; the gradient alone leaks under AdamW; the step alone is another trajectory."""

    def run(*projections):
        model = tiny.guarded(dtype=torch.float64)
        optimizer = tiny.adamw(tiny.trainable(model))
        layers = list(model.guarded_layers().values())
        projectors = [layer.projector for layer in layers]
        for layer in layers:
            layer.projector = None if projections else layer.projector  # a plain adapter, projected by hand
        for step in range(10):
            model(**tiny.batch(seed=step)).loss.backward()
            for layer, projector in zip(layers, projectors, strict=True):
                if "gradient" in projections:
                    projector.project_(layer.A.grad)
            torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 0.1)
            optimizer.step()
            for layer, projector in zip(layers, projectors, strict=True):
                if "step" in projections:
                    projector.project_(layer.A)
            optimizer.zero_grad()
        for layer, projector in zip(layers, projectors, strict=True):
            layer.projector, layer.step_mode = projector, bool(projections)
        leaks = [float((tiny.delta(m) @ tiny.directions(m)[0]).norm() / tiny.delta(m).norm()) for m in layers]
        return projected(model), max(leaks)

    forward, forward_leak = run()
    both, both_leak = run("gradient", "step")
    _, gradient_leak = run("gradient")
    step, step_leak = run("step")
    assert max(forward_leak, both_leak, step_leak) < 1e-12
    assert gradient_leak > 0.05
    assert (both - forward).norm() < 1e-10 * forward.norm()
    assert (step - forward).norm() > 1e-3 * forward.norm()


# ---- step mode


@pytest.mark.parametrize("name, residual", [*((name, "virtual") for name in OPTIMIZERS), ("AdamW fused", "frozen")])
def test_step_mode_is_the_same_trajectory(tiny, name, residual):
    """Losses and A P, with clipping and accumulated gradients."""
    results = []
    for step_mode in (False, True):
        model = tiny.guarded(dtype=torch.float64, residual=residual)
        optimizer = OPTIMIZERS[name](tiny.trainable(model))
        if step_mode:
            gk.guard_optimizer(optimizer, model)
        losses = tiny.train(model, optimizer, steps=8, clip=0.1, accumulate=2)
        results.append((torch.tensor(losses, dtype=torch.float64), projected(model), tiny.logits(model)))
        start = projected(tiny.guarded(dtype=torch.float64))
        assert (results[-1][1] - start).norm() > 1e-2 * start.norm()
        if step_mode:
            assert worst_leak(model) < 1e-6  # measured in float32
            assert tiny.drift(model)[0] < 1e-12
    for forward, step in zip(*results, strict=True):
        assert (forward - step).norm() < 1e-10 * forward.norm()


def test_step_mode_drifts_by_rounding_only_in_float32(tiny):
    model = tiny.guarded()
    optimizer = tiny.adamw(tiny.trainable(model), fused=True)
    gk.guard_optimizer(optimizer, model)
    tiny.train(model, optimizer, steps=8)
    protected, free = tiny.drift(model)
    assert protected < 1e-6 < 5e-3 < free


def test_step_mode_starts_from_a_matrix_that_wandered(tiny):
    """Switching after some steps in forward mode changes no output."""
    model = tiny.guarded(dtype=torch.float64)
    optimizer = tiny.adamw(tiny.trainable(model))
    tiny.train(model, optimizer)
    before = tiny.logits(model)
    assert worst_leak(model) > 1e-3
    gk.guard_optimizer(optimizer, model)
    assert worst_leak(model) < 1e-6
    assert (tiny.logits(model) - before).abs().max() < 1e-12


def test_gradients_are_projected_before_clipping(tiny):
    model = tiny.guarded()
    optimizer = tiny.adamw(tiny.trainable(model))
    gk.guard_optimizer(optimizer, model)
    plain = tiny.guarded()
    for layer in plain.guarded_layers().values():
        layer.projector = None
    for micro in range(2):
        for one in (model, plain):
            one(**tiny.batch(seed=micro)).loss.backward()
        for name, layer in model.guarded_layers().items():
            Q, _ = tiny.directions(layer)
            # What is left after the projection may be a small part of what was rounded before it.
            raw = plain.guarded_layers()[name].A.grad
            assert (layer.A.grad.double() @ Q).norm() < 3e-7 * raw.norm()
            assert (raw.double() @ Q).norm() > 0.1 * raw.norm()


def test_remove_returns_to_forward_mode(tiny):
    model = tiny.guarded()
    optimizer = tiny.adamw(tiny.trainable(model))
    guard = gk.guard_optimizer(optimizer, model)
    tiny.train(model, optimizer, steps=2)
    guard.remove()
    guard.remove()  # twice is once
    assert not any(layer.step_mode for layer in model.guarded_layers().values())
    tiny.train(model, optimizer, steps=3)
    assert worst_leak(model) > 1e-3  # nothing projects A any more
    assert tiny.drift(model)[0] < 1e-6
    with gk.guard_optimizer(optimizer, model):
        assert worst_leak(model) < 1e-5
    assert not any(layer.step_mode for layer in model.guarded_layers().values())


def test_accelerate_wrapped_optimizer(tiny):
    model = tiny.guarded()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, tiny.adamw(tiny.trainable(model)))
    gk.guard_optimizer(optimizer, prepared)
    losses = tiny.train(prepared, optimizer)
    alone = tiny.guarded()
    assert losses == pytest.approx(tiny.train(alone, tiny.adamw(tiny.trainable(alone))), rel=1e-5)
    assert worst_leak(model) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_other_optimizers_are_refused_by_name(tiny, name):
    make, message = REFUSED[name]
    model = tiny.guarded()
    with pytest.raises(TypeError, match=message):
        gk.guard_optimizer(make(tiny.trainable(model)), model)
    assert not any(layer.step_mode for layer in model.guarded_layers().values())


def test_other_models_and_optimizers_are_refused(tiny):
    model = tiny.guarded()
    parameters = tiny.trainable(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no guarded layer"):
        gk.guard_optimizer(tiny.adamw(parameters), tiny.base())
    with pytest.raises(ValueError, match="lora_A of 1 of 14 guarded layers"):
        gk.guard_optimizer(tiny.adamw(parameters[1:]), model)
    with pytest.raises(ValueError, match="lora_A of 14 of 14"):
        gk.guard_optimizer(tiny.adamw(parameters), copy.deepcopy(model))
    optimizer = tiny.adamw(parameters)
    guard = gk.guard_optimizer(optimizer, model)
    with pytest.raises(ValueError, match="step mode already"):
        gk.guard_optimizer(tiny.adamw(parameters), model)
    guard.remove()
    gk.guard_optimizer(tiny.adamw(parameters), model)


def test_broken_invariant_is_never_written(tiny, tmp_path):
    model = tiny.guarded()
    optimizer = tiny.adamw(tiny.trainable(model))
    guard = gk.guard_optimizer(optimizer, model)
    layer = model.guarded_layers()["model.layers.0.mlp.up_proj"]
    layer.A.data += 0.1 * torch.ones_like(layer.A)
    for use in (
        lambda: model.save_pretrained(tmp_path),
        lambda: gk.export_lora(model, tmp_path),
        lambda: gk.certify(model, tiny.statistics()),
        model.state_dict,
        model.merge_and_unload,
    ):
        with pytest.raises(RuntimeError, match=r"left the null space .*Remove the optimiser guard"):
            use()
    assert not list(tmp_path.iterdir())
    guard.remove()
    model.save_pretrained(tmp_path)
    assert tiny.drift(model)[0] < 1e-6


def test_adapter_loaded_in_step_mode_keeps_the_invariant(tiny, tmp_path):
    wandered = tiny.guarded()
    tiny.train(wandered)
    wandered.save_pretrained(tmp_path)
    assert worst_leak(wandered) > 1e-3
    model = tiny.guarded()
    optimizer = tiny.adamw(tiny.trainable(model))
    gk.guard_optimizer(optimizer, model)
    model.load_adapter(tmp_path)
    assert worst_leak(model) < 1e-5
    assert (tiny.logits(model) - tiny.logits(wandered)).abs().max() < 1e-5


# ---- GuardedAdamW


def guarded_groups(tiny, model):
    """Three groups, each of lora_A and lora_B, the second one with settings of its own."""
    parameters = tiny.trainable(model)
    settings = {"weight_decay": 0.3, "betas": (0.8, 0.99), "eps": 1e-6}
    groups = [{"params": some} for some in (parameters[:5], parameters[5:16], parameters[16:])]
    groups[1].update(lr=3e-3, **settings)
    return groups


def trained(tiny, optimizer_of, dtype=torch.float64, steps=20, **kwargs):
    model = tiny.guarded(dtype=dtype)
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step // 3))
    losses = []
    for _ in range(steps // 4):
        losses += tiny.train(model, optimizer, steps=4, **kwargs)
        schedule.step()
    return model, optimizer, torch.tensor(losses, dtype=torch.float64)


def adamw_with_guard(tiny):
    def make(model):
        optimizer = tiny.adamw(guarded_groups(tiny, model))
        gk.guard_optimizer(optimizer, model)
        return optimizer

    return make


def guarded_adamw(tiny):
    return lambda model: gk.GuardedAdamW(model, guarded_groups(tiny, model), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("training", [{}, {"clip": 0.1, "accumulate": 2}], ids=["plain", "clipped, accumulated"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=str)
def test_guarded_adamw_is_adamw_in_step_mode(tiny, dtype, tolerance, training):
    expected, theirs, losses = trained(tiny, adamw_with_guard(tiny), dtype, **training)
    model, ours, our_losses = trained(tiny, guarded_adamw(tiny), dtype, **training)
    assert (our_losses - losses).norm() < tolerance * losses.norm()
    start = projected(tiny.guarded(dtype=dtype))
    assert (projected(expected) - start).norm() > 1e-2 * start.norm()
    for a, b in zip(tiny.trainable(model), tiny.trainable(expected), strict=True):
        assert (a - b).norm() < tolerance * b.norm()
        assert ours.state[a].keys() == theirs.state[b].keys()
        assert ours.state[a]["step"] == theirs.state[b]["step"] == 20
        for name in ("exp_avg", "exp_avg_sq"):
            assert (ours.state[a][name] - theirs.state[b][name]).norm() <= tolerance * theirs.state[b][name].norm()
    assert worst_leak(model) < 1e-6
    assert tiny.drift(model)[0] < (1e-12 if dtype == torch.float64 else 1e-6)


def test_guarded_adamw_skips_parameters_without_a_gradient(tiny):
    model = tiny.guarded()
    optimizer = gk.GuardedAdamW(model)
    model(**tiny.batch()).loss.backward()
    first, *others = tiny.trainable(model)
    first.grad, before = None, first.detach().clone()
    optimizer.step()
    assert torch.equal(first, before) and first not in optimizer.state
    assert all(optimizer.state[p]["step"] == 1 for p in others)
    optimizer.zero_grad()
    assert all(p.grad is None for p in others)


def test_guarded_adamw_takes_a_closure(tiny):
    model = tiny.guarded()
    optimizer = gk.GuardedAdamW(model)

    def closure():
        optimizer.zero_grad()
        loss = model(**tiny.batch()).loss
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


@pytest.mark.parametrize("source", ["AdamW", "GuardedAdamW"])
@pytest.mark.parametrize("target", ["AdamW", "GuardedAdamW"])
def test_states_of_adamw_and_guarded_adamw_are_the_same(tiny, source, target):
    makers = {"AdamW": adamw_with_guard(tiny), "GuardedAdamW": guarded_adamw(tiny)}
    model, optimizer, _ = trained(tiny, makers[source], steps=4)
    state = copy.deepcopy(optimizer.state_dict())
    other = tiny.guarded(dtype=torch.float64)
    resumed = makers[target](other)
    with torch.no_grad():
        for a, b in zip(tiny.trainable(other), tiny.trainable(model), strict=True):
            a.copy_(b)
    resumed.load_state_dict(state)
    assert [group["lr"] for group in resumed.param_groups] == [group["lr"] for group in optimizer.param_groups]
    tiny.train(model, optimizer)
    tiny.train(other, resumed)
    for a, b in zip(tiny.trainable(other), tiny.trainable(model), strict=True):
        assert (a - b).norm() < 1e-10 * b.norm()
        assert resumed.state[a]["step"] == optimizer.state[b]["step"] == 8


def test_without_its_guard_a_guarded_adamw_leaves_forward_mode(tiny):
    model = tiny.guarded()
    optimizer = gk.GuardedAdamW(model)
    assert all(layer.step_mode for layer in model.guarded_layers().values())
    optimizer.remove_guard()
    assert not any(layer.step_mode for layer in model.guarded_layers().values())
    tiny.train(model)
    assert worst_leak(model) > 1e-3 and tiny.drift(model)[0] < 1e-6
    gk.GuardedAdamW(model)


def test_guarded_adamw_refuses_by_name(tiny):
    model = tiny.guarded()
    parameters = tiny.trainable(model)
    for arguments, message in (
        ({"params": [{"params": parameters, "amsgrad": True}]}, "has no amsgrad; use torch.optim.AdamW with"),
        ({"params": [{"params": parameters, "maximize": True}]}, "has no maximize; use torch.optim.AdamW with"),
        ({"lr": torch.tensor(0.1)}, "takes lr as a number, got a tensor; use torch.optim.AdamW with"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got 1\.0"),
        ({"lr": -0.1}, "lr must be 0 or more, got -0.1"),
        ({"eps": -1.0}, "eps must be 0 or more, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be 0 or more, got nan"),
        ({"params": parameters[1:]}, "does not hold the lora_A of 1 of 14 guarded layers"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.GuardedAdamW(model, **arguments)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no guarded layer"):
        gk.GuardedAdamW(tiny.base())
    assert not any(layer.step_mode for layer in model.guarded_layers().values())

    optimizer = gk.GuardedAdamW(model)
    with pytest.raises(ValueError, match="step mode already"):
        gk.GuardedAdamW(model)
    with pytest.raises(TypeError, match="GuardedAdamW guards its model by itself; leave guard_optimizer and"):
        gk.guard_optimizer(optimizer, model)
    state = torch.optim.AdamW(parameters, amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="has no amsgrad"):
        optimizer.load_state_dict(state)
    parameters[1].grad = torch.zeros_like(parameters[1]).to_sparse()
    with pytest.raises(RuntimeError, match="takes no sparse gradients; build the embedding with sparse=False"):
        optimizer.step()
