"""Refusals in a Trainer."""

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

HARMFUL, LOOKALIKES, TASK = ["3 4 5", "6 7", "8"], ["9 10", "11"], [("12 13", "14")]


class Numbers:
    """A tokenizer of numbers."""

    eos_token_id, chat_template = 1, None

    def apply_chat_template(self, messages, **_):
        raise AssertionError

    def __call__(self, text, **_):
        return {"input_ids": [int(n) if n.isdigit() else 2 for n in text.split()]}

    def batch_decode(self, rows, **_):
        return [" ".join(map(str, row)) for row in rows]


def judge(prompt, answer):
    torch.rand(3)  # as a model that samples would
    return "refuses" if int(answer.split()[0]) % 2 else "complies"


def callback(**options):
    given = {"lookalikes": LOOKALIKES, "task": TASK, "judge": judge, "answer_tokens": 4, "chat": False, **options}
    return gk.EvaluationCallback(Numbers(), HARMFUL, **given)


def build(tiny, kind):
    if kind == "guarded":
        return tiny.guarded()
    torch.manual_seed(4)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", lora_dropout=0.2)
    return peft.get_peft_model(tiny.base(), config)


class Snapshot(TrainerCallback):
    """The model after some step, to be evaluated anew."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            self.state = {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["guarded", "plain"])
def test_a_run_logs_its_refusals_and_is_the_same_as_without(tiny, tmp_path, kind):
    stats, evaluation, snapshot = tiny.statistics(), callback(every=4), Snapshot(4)
    callbacks = [gk.DriftMonitor(stats, every=4), evaluation, snapshot]
    run = trainer(tiny, build(tiny, kind), tmp_path, callbacks, logging_steps=3)
    run.train()
    logged = {entry["step"]: entry for entry in run.state.log_history if "guard/refuses" in entry}
    assert sorted(logged) == sorted(evaluation.reports) == [0, 4, 6]
    for step, entry in logged.items():
        report = evaluation.reports[step]
        assert entry["guard/refuses"] == report.refuses.value and entry["guard/complies"] == report.complies.value
        assert entry["guard/over_refuses"] == report.over_refuses.value and entry["guard/task"] == report.task.value
        assert entry["guard/refusal_mass"] == report.refusal_mass and entry["guard/kl"] == report.kl
        assert report.base is (None if step == 0 else evaluation.reports[0])
        assert ("loss" in entry and "guard/drift_mean" in entry) or step == 0
    # What it says is what anyone finds of the model of that step.
    model = build(tiny, kind)
    evaluator = callback().evaluator
    before = evaluator.set_base(model)
    assert before == evaluation.reports[0]
    model.load_state_dict(snapshot.state)
    again = evaluator(model)
    assert again.answers == evaluation.reports[4].answers
    assert again.kl == pytest.approx(evaluation.reports[4].kl, rel=1e-3) and again.kl > 0
    # The training is the one without it: modes, dropout's random numbers, gradients.
    without = trainer(tiny, build(tiny, kind), tmp_path / "without", logging_steps=3)
    without.train()
    assert same(weights(run.model), weights(without.model)) and losses(run)[0] == losses(without)[0]
    assert run.model.training == without.model.training


def test_step_mode_and_a_training_that_goes_on(tiny, tmp_path):
    evaluation = callback(every=2)
    first = trainer(
        tiny, tiny.guarded(), tmp_path, [gk.GuardCallback(), evaluation], save_strategy="steps", save_steps=2
    )
    first.train()
    assert sorted(evaluation.reports) == [0, 2, 4, 6] and evaluation.reports[6].kl > 0
    resumed = callback(every=2)
    second = trainer(tiny, tiny.guarded(), tmp_path, [resumed], save_strategy="steps", save_steps=2)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sorted(resumed.reports) == [6] and resumed.reports[6].kl is None


def test_what_cannot_be_evaluated_is_said_before_the_first_step(tiny, tmp_path):
    evaluation = callback(answer_tokens=62)
    run = trainer(tiny, tiny.guarded(), tmp_path, [evaluation])
    with pytest.raises(ValueError, match="harmful prompt 1 has 3 tokens, and 62 more are to follow, but model has 64"):
        run.train()
    assert run.state.global_step == 0
    model = tiny.guarded()
    next(iter(model.modules())).unshard = lambda: None
    with pytest.raises(TypeError, match="model is sharded"):
        callback().on_train_begin(None, run.state, None, model=model)
