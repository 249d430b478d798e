import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guardspace_kernels.demo.training import adapter_state, answer_logits, load_adapter_state, train
from guardspace_kernels.evaluate.generation import left_padded

EXAMPLES = [([3, 4, 5], [6, 1]), ([7, 8], [9, 10, 1]), ([11] * 6, [12, 1]), ([5, 9], [6, 1])]


def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def fit(*models, **options):
    settings = {"steps": 12, "batch_size": 2, "learning_rate": 0.02, "pad": 1, "seed": 0, "description": "test"}
    return train(models, EXAMPLES, **{**settings, **options})


def test_padding_is_left_and_positions_follow_it():
    batch = left_padded([[3, 4], [5, 6, 7]], pad=1)
    assert batch["input_ids"].tolist() == [[1, 3, 4], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]


def test_logits_are_those_that_predict_the_answers():
    model = tiny()
    logits, labels = answer_logits(model, EXAMPLES, pad=1)
    assert labels.tolist() == [token for _, answer in EXAMPLES for token in answer]
    expected = []
    for prompt, answer in EXAMPLES:
        alone = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        expected.append(alone[len(prompt) - 1 : -1])
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_training_learns_and_repeats_itself():
    (first,), (second,) = fit(tiny(), steps=60), fit(tiny(), steps=60)
    assert first.losses == second.losses
    assert first.smoothed() < first.losses[0] - 0.2


def test_models_take_turns_at_the_same_batches_and_learn_what_each_learns_alone():
    read = []
    models = [tiny() for _ in range(3)]
    with torch.no_grad():
        for i, model in enumerate(models):
            model.get_base_model().lm_head.weight += i
            model.register_forward_pre_hook(
                lambda _, __, kwargs, i=i: read.append((i, kwargs["input_ids"])), with_kwargs=True
            )
    states = [copy.deepcopy(model) for model in models]
    runs = fit(*models, steps=4)
    assert [i for i, _ in read] == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert all(torch.equal(ids, read[n - n % 3][1]) for n, (_, ids) in enumerate(read))
    for run, model, start in zip(runs, models, states, strict=True):
        assert len(run.seconds) == 4 and min(run.seconds) > 0 and not model.training
        assert fit(start, steps=4)[0].losses == run.losses
        assert all(torch.equal(t, adapter_state(start)[name]) for name, t in adapter_state(model).items())


def test_adapters_are_kept_where_the_running_mean_is_lowest_and_found_where_it_first_reached_a_loss():
    model = tiny()
    (reference,), (run,) = fit(tiny()), fit(model, keep=[model])
    assert not reference.lowest and reference.losses == run.losses
    means = {step: sum(run.losses[step - 5 : step]) / 5 for step in range(5, 13)}
    assert all(run.smoothed(step) == mean for step, mean in means.items())
    for loss in (*means.values(), means[5] + 1):
        step, state = run.reached(loss)
        assert step == next(step for step, mean in means.items() if mean <= loss)
    assert run.reached(min(means.values()) - 1e-9) is None
    assert run.lowest[-1][0] == 12
    assert all(torch.equal(t, run.lowest[-1][1][name]) for name, t in adapter_state(model).items())
    step, state = run.lowest[0]
    load_adapter_state(model, state)
    assert all(torch.equal(t, state[name]) for name, t in adapter_state(model).items())


def test_an_adapter_state_of_another_model_is_refused():
    with pytest.raises(ValueError, match="belongs to another model"):
        load_adapter_state(tiny(), {"elsewhere": torch.zeros(1)})
