from dataclasses import replace

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guardspace_kernels.demo import experiment
from guardspace_kernels.demo.experiment import GUARDED, PLAIN, POISON, SENTIMENT, STOPPED
from guardspace_kernels.demo.training import adapter_state, train

EXAMPLES = [([3, 4, 5], [6, 1]), ([7, 8], [9, 10, 1]), ([11] * 6, [12, 1]), ([5, 9], [6, 1])]


def tiny(guarded):
    """Both are plain LoRA; by its alpha the guarded one learns less, or more."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
    config = peft.LoraConfig(
        r=2, lora_alpha=tiny.alpha if guarded else 2, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


@pytest.fixture
def run():
    run = object.__new__(experiment._Experiment)
    run.settings = replace(experiment.FULL, steps=12, batch_size=2, learning_rate=0.02)
    run.seed, run.pad, run.seconds, run.evaluated = 0, 1, {}, []
    run.build, run.examples = tiny, lambda task: EXAMPLES

    def evaluate_merged(model, label, task):
        run.evaluated.append((label, task, adapter_state(model)))
        return object()

    run.evaluate_merged = evaluate_merged
    return run


def alone(steps):
    model = tiny(guarded=False)
    (trained,) = train(
        [model], EXAMPLES, steps=12, batch_size=2, learning_rate=0.02, pad=1, seed=0, description="", keep=[model]
    )
    return trained, dict(trained.lowest).get(steps)


@pytest.mark.parametrize("task", [SENTIMENT, POISON])
def test_methods_are_compared_at_equal_steps_and_at_equal_loss(run, task):
    tiny.alpha, rows, seen = 1, [], []
    experiment._compare(run, task, "name", rows, lambda guarded, model: seen.append(guarded))
    assert [row.method for row in rows] == [PLAIN, STOPPED, GUARDED] and seen == [True, False]
    plain, stopped, guarded = rows
    assert plain.steps == guarded.steps == len(plain.step_seconds) == len(guarded.step_seconds) == 12
    assert plain.loss < guarded.loss and 5 <= stopped.steps < 12
    trained, state = alone(stopped.steps)
    assert plain.loss == trained.smoothed() and stopped.loss == trained.smoothed(stopped.steps) <= guarded.loss
    assert all(trained.smoothed(step) > guarded.loss for step in range(5, stopped.steps))
    assert [name for name, _, _ in run.evaluated] == [
        f"name: test {GUARDED}",
        f"name: test {PLAIN}",
        "name: test LoRA, same loss",
    ]
    assert all(asked == (task == SENTIMENT) for _, asked, _ in run.evaluated)
    assert all(torch.equal(t, state[name]) for name, t in run.evaluated[-1][2].items())


def test_no_copy_is_taken_where_plain_lora_never_came_down_to_the_loss(run):
    tiny.alpha, rows = 8, []
    experiment._compare(run, POISON, "name", rows)
    plain, stopped, guarded = rows
    assert plain.loss > guarded.loss and stopped.evaluation is None and stopped.steps == 0 and len(run.evaluated) == 2


def test_batches_mark_the_answers_that_come_with_prompts(run):
    first, second = run.batches([[3, 4, 5], [6], [7, 8]], 2)
    assert set(first) == {"input_ids", "attention_mask"} and first["input_ids"].tolist() == [[1, 6], [7, 8]]
    assert first["attention_mask"].tolist() == [[0, 1], [1, 1]] and second["input_ids"].tolist() == [[3, 4, 5]]
    (batch,) = run.batches([[3, 4, 5], [6]], 2, [[9], [9, 8]])
    assert batch["input_ids"].tolist() == [[1, 6, 9, 8], [3, 4, 5, 9]]
    marked = (batch["token_kinds"] == 2) & batch["attention_mask"].bool()
    assert marked.tolist() == [[False, False, True, True], [False, False, False, True]]
