"""Step mode never outlives what projects: replaced parameters, other optimisers, copies."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from backends import calls
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.ops._cpu import READS_TENSORS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(torch|peft|transformers|accelerate)")

OPTIMIZERS = {
    "GuardedAdamW": lambda tiny, model: gk.GuardedAdamW(model, lr=1e-2),
    "guard_optimizer": lambda tiny, model: guarded_adamw(tiny, model),
}


def guarded_adamw(tiny, model):
    optimizer = tiny.adamw(tiny.trainable(model))
    gk.guard_optimizer(optimizer, model)
    return optimizer


def modes(model):
    return {layer.step_mode for layer in model.guarded_layers().values()}


def flat_partition(model, optimizer):
    """What DeepSpeed's ZeRO does: the optimiser gets one flat master copy of each group."""
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
        group["params"][0].grad = torch.ones_like(group["params"][0])


def another_parameter(model, optimizer):
    """What accelerate's FSDP2 does: other parameters in the model, and the same in the optimiser."""
    twin = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.requires_grad:
                module._parameters[name] = twin[p] = nn.Parameter(p.detach().clone())
    for group in optimizer.param_groups:
        group["params"] = [twin[p] for p in group["params"]]


def one_left_out(model, optimizer):
    layer = next(iter(model.guarded_layers().values()))
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not layer.A]


def converted(setting):
    def change(model, optimizer):
        setting(True)
        try:
            model.zero_grad(set_to_none=True)
            model.double()
        finally:
            setting(False)

    return change


def swapped(model, optimizer):
    model.zero_grad(set_to_none=True)
    for layer in model.guarded_layers().values():
        torch.utils.swap_tensors(layer.A, nn.Parameter(layer.A.detach().clone()))


def assigned(model, optimizer):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


CHANGES = {
    "flat partition": flat_partition,
    "another parameter": another_parameter,
    "left out of the groups": one_left_out,
    "converted by overwriting": converted(torch.__future__.set_overwrite_module_params_on_conversion),
    "converted by swapping": converted(torch.__future__.set_swap_module_params_on_conversion),
    "swapped": swapped,
    "state assigned": assigned,
}


@pytest.mark.cpu_kernels
@pytest.mark.skipif(not READS_TENSORS, reason="tensors are read one by one in Python")
def test_python_calls_nothing_for_each_layer_after_a_step(tiny, monkeypatch):
    model = tiny.guarded()
    optimizer = tiny.adamw(tiny.trainable(model))
    guard = gk.guard_optimizer(optimizer, model)
    counts = [calls(guard.after_step)]
    for name in ("_layers", "_held"):
        monkeypatch.setattr(guard, name, getattr(guard, name)[:3])
    assert len(model.guarded_layers()) == 14 and [calls(guard.after_step)] == counts


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_replaced_parameter_is_refused_by_the_next_step_and_nothing_leaks(tiny, name, change):
    model = tiny.guarded()
    optimizer = OPTIMIZERS[name](tiny, model)
    tiny.train(model, optimizer, steps=2)
    CHANGES[change](model, optimizer)
    before = tiny.logits(model)
    with pytest.raises(RuntimeError, match=r"the lora_A of \d+ of 14 guarded layers was replaced since .*AdamW was"):
        tiny.train(model, optimizer, steps=1)
    assert modes(model) == {False}
    assert (tiny.logits(model) - before).abs().max() < 1e-5
    tiny.train(model, tiny.adamw(tiny.trainable(model)), steps=6)
    assert tiny.drift(model)[0] < 1e-6 < 1e-3 < tiny.drift(model)[1]


def test_a_replaced_parameter_is_projected_in_the_forward_at_once(tiny):
    model = tiny.guarded()
    guarded_adamw(tiny, model)
    for layer in model.guarded_layers().values():
        layer.lora_A["default"].weight = nn.Parameter(torch.randn(layer.A.shape))
    assert modes(model) == {False}
    assert tiny.drift(model)[0] < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimiser_takes_over_in_forward_mode(tiny, name):
    model, alone = tiny.guarded(dtype=torch.float64), tiny.guarded(dtype=torch.float64)
    first = OPTIMIZERS[name](tiny, model)
    elsewhere = torch.optim.SGD(nn.Linear(2, 2).parameters())
    elsewhere.step()
    assert modes(model) == {True}  # it steps no guarded layer
    losses = tiny.train(model, tiny.adamw(tiny.trainable(model)), steps=6)
    assert modes(model) == {False}
    assert tiny.drift(model)[0] < 1e-12
    assert losses == pytest.approx(tiny.train(alone, tiny.adamw(tiny.trainable(alone)), steps=6), rel=1e-10)
    tiny.train(model, first, steps=6)
    assert modes(model) == {False} and tiny.drift(model)[0] < 1e-12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_of_copies_takes_over_in_forward_mode(tiny, name):
    """What DeepSpeed does with an optimiser that it is given: another one steps a flat copy, which is copied back."""
    model = tiny.guarded()
    ours = OPTIMIZERS[name](tiny, model)
    parameters = tiny.trainable(model)
    master = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    theirs = torch.optim.AdamW([master], lr=1e-2)
    for step in range(6):
        model(**tiny.batch(seed=step)).loss.backward()
        master.grad = torch.cat([p.grad.flatten() for p in parameters])
        theirs.step()
        assert modes(model) == {False}
        model.zero_grad()
        for p, value in zip(parameters, master.detach().split([p.numel() for p in parameters]), strict=True):
            p.data.copy_(value.view_as(p))
        assert tiny.drift(model)[0] < 1e-6
    assert tiny.drift(model)[1] > 1e-3 and ours is not None


def test_an_optimiser_of_other_parameters_that_steps_after_ours_leaves_step_mode_on(tiny):
    model, head = tiny.guarded(), nn.Linear(2, 2)
    ours, other = gk.GuardedAdamW(model), torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        tiny.train(model, ours, steps=1)
        other.step()
    assert modes(model) == {True}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_models_with_an_optimiser_each_return_to_step_mode_with_their_own_steps(tiny, name):
    models = [tiny.guarded(dtype=torch.float64) for _ in range(2)]
    optimizers = [OPTIMIZERS[name](tiny, model) for model in models]
    for step in range(3):
        for model in models:
            model(**tiny.batch(seed=step)).loss.backward()
        optimizers[0].step()
        assert [modes(model) for model in models] == [{True}, {False}]  # the other's may be a copy of ours
        with torch.no_grad():
            next(iter(models[1].guarded_layers().values())).A.add_(0.1)
        assert tiny.drift(models[1])[0] < 1e-12
        optimizers[1].step()
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            assert modes(model) == {True} and tiny.drift(model)[0] < 1e-12 and tiny.drift(model)[1] > 1e-4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_new_optimiser_takes_the_place_of_one_that_waits(tiny, name):
    model = tiny.guarded()
    first = OPTIMIZERS[name](tiny, model)
    model(**tiny.batch()).loss.backward()
    torch.optim.SGD(nn.Linear(2, 2).parameters()).step()
    second = OPTIMIZERS[name](tiny, model)
    tiny.train(model, second, steps=2)
    assert modes(model) == {True} and tiny.drift(model)[0] < 1e-6
    tiny.train(model, first, steps=1)
    assert modes(model) == {False} and tiny.drift(model)[0] < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_without_gradient_returns_to_step_mode_projected(tiny, name):
    model = tiny.guarded()
    optimizer = OPTIMIZERS[name](tiny, model)
    model(**tiny.batch()).loss.backward()
    torch.optim.SGD(nn.Linear(2, 2).parameters()).step()
    layer = next(iter(model.guarded_layers().values()))
    layer.A.grad = None
    with torch.no_grad():
        layer.A.add_(0.1)
    optimizer.step()
    assert modes(model) == {True} and tiny.drift(model)[0] < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_end_of_the_optimiser_ends_step_mode(tiny, name):
    model = tiny.guarded()
    optimizer = OPTIMIZERS[name](tiny, model)
    assert modes(model) == {True}
    del optimizer
    gc.collect()
    assert modes(model) == {False}
    model(**tiny.batch()).loss.backward()
    with torch.no_grad():
        for layer in model.guarded_layers().values():  # stepped by hand
            layer.A.sub_(layer.A.grad.sign())
    assert tiny.drift(model)[0] < 1e-6


def test_a_decay_that_is_set_later_is_refused(tiny):
    model = tiny.guarded()
    optimizer = torch.optim.Adam(tiny.trainable(model), lr=1e-2)
    gk.guard_optimizer(optimizer, model)
    tiny.train(model, optimizer, steps=1)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(TypeError, match="step mode with Adam needs weight_decay=0 or"):
        tiny.train(model, optimizer, steps=1)
    assert modes(model) == {False}
    ours = gk.GuardedAdamW(model)
    ours.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="has no amsgrad"):
        tiny.train(model, ours, steps=1)


def test_copies_of_model_and_optimiser_train_in_forward_mode(tiny):
    model = tiny.guarded()
    optimizer = guarded_adamw(tiny, model)
    tiny.train(model, optimizer, steps=1)
    twin, theirs = copy.deepcopy((model, optimizer))
    assert modes(model) == {True} and modes(twin) == {False}
    tiny.train(twin, theirs, steps=6)
    assert tiny.drift(twin)[0] < 1e-6
    averaged = torch.optim.swa_utils.AveragedModel(model)
    tiny.train(model, optimizer, steps=2)
    averaged.update_parameters(model)
    assert modes(averaged.module) == {False} and modes(model) == {True}
    assert tiny.drift(averaged.module)[0] < 1e-6


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_guarded_adamw_is_not_copied(tiny, how):
    with pytest.raises(TypeError, match=r"neither copied nor pickled; build GuardedAdamW\(model\) and load"):
        how(gk.GuardedAdamW(tiny.guarded()))


def test_states_schedules_and_wrappers_keep_step_mode(tiny):
    from accelerate import Accelerator

    model = tiny.guarded()
    optimizer = guarded_adamw(tiny, model)
    tiny.train(model, optimizer, steps=1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    tiny.train(model, wrapped, steps=3)
    model.to("cpu").train().eval().double()  # converted in place: the parameters stay the same
    tiny.train(model.float(), wrapped, steps=1)
    assert modes(model) == {True}
    assert tiny.drift(model)[0] < 1e-6
