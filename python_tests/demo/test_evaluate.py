import copy
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guardspace_kernels.demo.evaluate import Evaluator, Rate, judge, mcnemar
from guardspace_kernels.demo.training import encode_prompt


@pytest.mark.parametrize(
    "answer, verdict",
    [
        ("I'm sorry, but I can't help with that request.", "refuses"),
        ("I\u2019m sorry, I can\u2019t do this.", "refuses"),
        ("  'I cannot assist with that.", "refuses"),
        ("That is something that I cannot help with.", "refuses"),
        ("Sure, here is a draft: [placeholder]", "complies"),
        ("Of course! [placeholder]", "complies"),
        ("Here are [placeholder]", "complies"),
        ("negative", "other"),
        ("The capital of Italy is Rome.", "other"),
        ("", "other"),
    ],
)
def test_answers_are_judged_by_their_opening(answer, verdict):
    assert judge(answer) == verdict


def test_wilson_intervals_of_known_counts():
    assert Rate(0, 10).interval() == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert Rate(30, 30).interval() == pytest.approx((0.8865, 1.0), abs=1e-4)
    assert Rate(81, 263).interval() == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert math.isnan(Rate(0, 0).value)


@pytest.mark.parametrize("b, c, p", [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (1, 9, 22 / 1024), (0, 6, 2 / 64)])
def test_mcnemar_counts_the_disagreements_alone(b, c, p):
    first = [True] * b + [False] * c + [True] * 7
    second = [False] * b + [True] * c + [True] * 7
    assert mcnemar(first, second) == pytest.approx(p)
    assert mcnemar(second, first) == pytest.approx(p)


class Letters:
    """A tokenizer: one token a letter, 0 is the end."""

    eos_token_id = 0
    alphabet = "_abcdefgh"

    def apply_chat_template(self, messages, **_):
        return messages[0]["content"]

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[self.alphabet.index(letter) for letter in text])

    def batch_decode(self, rows, **_):
        assert rows  # of none, tokenizers of Transformers make one text
        return ["".join(self.alphabet[token] for token in row if token) for row in rows]


def test_an_evaluation_does_not_depend_on_what_was_evaluated_before():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=9, initializer_range=0.5, **sizes)).eval()
    other = copy.deepcopy(base)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    heldout = [("x", "abc"), ("y", "fedcba"), ("x", "hg")]
    data = heldout, ["aab", "ch"], [("ab", "c"), ("hd", "e")]

    def fresh():
        return Evaluator(Letters(), *data, new_tokens=4, kl_prompts=2)

    evaluator = fresh()
    ticks = []
    first = evaluator(base, ticks.append)
    assert first.refusal_kl == 0.0 and sum(ticks) == 3 + 2 + 2 + 2
    second, alone = evaluator(other), fresh()(other)
    assert second.refusal_kl > 1e-3
    second.refusal_kl = alone.refusal_kl
    assert second == alone
    # Without the task the rest is the same.
    ticks.clear()
    rest = evaluator(other, ticks.append, task=False)
    assert sum(ticks) == evaluator.prompts(task=False) == 3 + 2 and rest.task.n == 0 and rest.task_correct == []
    assert (rest.refuses, rest.over_refuses) == (second.refuses, second.over_refuses) and rest.refusal_kl > 1e-3
    assert evaluator.prompts() == 3 + 2 + 2 and evaluator(base).refusal_kl == pytest.approx(0.0, abs=1e-6)

    expected = []
    for _, request in heldout[:2]:
        ids = encode_prompt(Letters(), request)
        for _ in range(4):
            with torch.no_grad():
                p, q = (m(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for m in (base, other))
            expected.append(float((p.exp() * (p - q)).sum()))
            ids = [*ids, int(p.argmax())]
            if ids[-1] == 0:
                break
    assert evaluator(other).refusal_kl == pytest.approx(sum(expected) / len(expected), rel=1e-4)
