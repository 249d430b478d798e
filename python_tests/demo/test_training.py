import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guardspace_kernels.demo.training import adapter_state, answer_logits, left_padded, load_adapter_state, train

EXAMPLES = [([3, 4, 5], [6, 1]), ([7, 8], [9, 10, 1]), ([11] * 6, [12, 1]), ([5, 9], [6, 1])]


def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def fit(model, **options):
    settings = {"steps": 12, "batch_size": 2, "learning_rate": 0.02, "pad": 1, "seed": 0, "description": "test"}
    return train(model, EXAMPLES, **{**settings, **options})


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
    first, second = fit(tiny(), steps=60), fit(tiny(), steps=60)
    assert first.losses == second.losses
    assert first.smoothed() < first.losses[0] - 0.2


def test_the_snapshot_is_taken_when_the_running_mean_first_reaches_the_loss():
    reference = fit(tiny())
    means = [sum(reference.losses[i - 5 : i]) / 5 for i in range(5, 13)]
    target = means[3]
    step = 5 + next(i for i, value in enumerate(means) if value <= target)
    run = fit(tiny(), snapshot_at=target)
    assert run.snapshot_step == step
    again = tiny()
    fit(again, steps=12, snapshot_at=-1.0)
    assert fit(tiny(), snapshot_at=-1.0).snapshot is None
    load_adapter_state(again, run.snapshot)
    assert all(torch.equal(t, run.snapshot[name]) for name, t in adapter_state(again).items())


def test_an_adapter_state_of_another_model_is_refused():
    with pytest.raises(ValueError, match="belongs to another model"):
        load_adapter_state(tiny(), {"elsewhere": torch.zeros(1)})
