"""Drift in a Trainer."""

from __future__ import annotations

import peft
import pytest
import torch
from test_transformers import losses, same, trainer, weights
from transformers import TrainerCallback

import guardspace_kernels as gk

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def build(tiny, kind):
    if kind == "guarded":
        return tiny.guarded()
    torch.manual_seed(4)
    return peft.get_peft_model(tiny.base(), peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))


class Certify(TrainerCallback):
    """What certify says after every step."""

    def __init__(self, stats):
        self.stats, self.means = stats, {}

    def on_step_end(self, args, state, control, model, **kwargs):
        rows = gk.certify(model, self.stats).layers
        self.means[state.global_step] = sum(row.drift for row in rows) / len(rows)


def logged(run):
    return {entry["step"]: entry for entry in run.state.log_history if "guard/drift_mean" in entry}


@pytest.mark.parametrize("kind", ["guarded", "plain"])
def test_a_run_logs_its_drift_and_is_the_same_as_without(tiny, tmp_path, kind):
    stats = tiny.statistics()
    certify, seen = Certify(stats), []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append("guard/drift_mean" in logs)

    monitor = gk.DriftMonitor(stats, every=4)
    run = trainer(tiny, build(tiny, kind), tmp_path, [monitor, certify, Reporter()], logging_steps=3)
    run.train()
    entries = logged(run)
    assert sorted(entries) == [4, 6]  # and after the last step
    for step, entry in entries.items():
        assert entry["guard/drift_mean"] == pytest.approx(certify.means[step], rel=1e-6)
        assert entry["guard/drift_worst"] >= entry["guard/drift_mean"] > 1e-5
        assert entry["guard/drift_worst_layer"] in stats.layers and "loss" in entry
    assert sorted(entry["step"] for entry in run.state.log_history if "loss" in entry) == [3, 4, 6]
    assert seen == [False, True, True, False]
    without = trainer(tiny, build(tiny, kind), tmp_path / "without", logging_steps=3)
    without.train()
    assert same(weights(run.model), weights(without.model)) and losses(run)[0] == losses(without)[0]
    values = monitor(run.model)  # a plain function, too
    assert values["guard/drift_mean"] == entries[6]["guard/drift_mean"] and len(values) == 3


@pytest.mark.parametrize("step_mode", [False, True])
def test_max_drift_stops_the_run(tiny, tmp_path, step_mode):
    stats = tiny.statistics()
    monitor = gk.DriftMonitor(stats, every=2, max_drift=2e-3, per_layer=True)
    run = trainer(
        tiny,
        tiny.guarded(),
        tmp_path / "stopped",
        [monitor, *([gk.GuardCallback()] if step_mode else [])],
        max_steps=40,
    )
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append("guard/drift_mean" in logs)

    run.callback_handler.callbacks.insert(0, Reporter())
    run.callback_handler.callbacks.insert(0, run.pop_callback(monitor))
    with pytest.warns(UserWarning, match=r"^layer \S+ drifts by .* above max_drift = 2.00e-03: training stops at step"):
        run.train()
    entries = logged(run)
    stopped = run.state.global_step
    assert stopped < 40 and stopped == max(entries) and stopped % 2 == 0
    assert [step for step, entry in entries.items() if entry["guard/drift_worst"] > 2e-3] == [stopped]
    assert f"guard/drift/{entries[stopped]['guard/drift_worst_layer']}" in entries[stopped]
    assert seen == [*[False, True] * (stopped // 2), False]  # a summary at the end
    with pytest.raises(gk.DriftExceededError):
        monitor(run.model)


def test_statistics_are_checked_before_the_first_step(tiny, tmp_path):
    steps = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    run = trainer(tiny, tiny.guarded(), tmp_path, [gk.DriftMonitor(tiny.statistics("gpt2")), Watch()])
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj has no statistics"):
        run.train()
    assert not steps


def test_of_several_processes_the_main_one_logs_and_each_one_can_stop(tiny):
    """The others only ask for the log, where the Trainer gathers the loss from all of them."""
    from transformers import TrainerControl, TrainerState

    model, stats = tiny.guarded(), tiny.statistics()
    tiny.train(model)
    for limit in (None, 1e-9):
        monitor, control = gk.DriftMonitor(stats, every=2, max_drift=limit), TrainerControl()
        state = TrainerState(global_step=2, max_steps=9, is_world_process_zero=False)
        measured = []
        monitor.layer_drifts = lambda model, of=monitor, into=measured: (
            into.append(model) or type(of).layer_drifts(of, model)
        )
        monitor.on_train_begin(None, state, control, model=model)
        monitor.on_step_end(None, state, control, model=model)
        logs = {}
        state.log_history.append(logs)
        monitor.on_log(None, state, control, logs=logs)
        assert control.should_log and not logs
        assert control.should_training_stop == bool(measured) == (limit is not None)
