import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import guardspace_kernels as gk
from guardspace_kernels.evaluate.refusals import opening_tokens

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


class Letters:
    """A tokenizer: one token a letter, 0 is the end."""

    eos_token_id = 0
    alphabet = "_abcdefgh"
    chat_template = "there is one"

    def apply_chat_template(self, messages, **_):
        return messages[-1]["content"]

    def __call__(self, text, **_):
        return {"input_ids": [max(0, self.alphabet.find(letter)) for letter in text]}

    def batch_decode(self, rows, **_):
        assert rows  # of none, tokenizers of Transformers make one text
        return ["".join(self.alphabet[token] for token in row if token) for row in rows]


def judge(prompt, answer):
    """Of letters; looks at both texts."""
    return "refuses" if answer[:1] in "abc" else "complies" if prompt[:1] in answer else "other"


HARMFUL = [("x", "abc"), ("y", "fedcba"), ("x", "hg")]
DATA = {"lookalikes": ["aab", "ch"], "task": [("ab", "cd"), ("hd", "e")], "judge": judge}
OPTIONS = {**DATA, "answer_tokens": 4, "kl_prompts": 2, "progress": False}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=9, initializer_range=0.5, eos_token_id=0, bos_token_id=None, **SIZES)
    base = LlamaForCausalLM(config).eval()
    other = copy.deepcopy(base)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return base, other


def greedy(model, text, tokens):
    """Letters and log-probabilities (tokens, vocabulary) of an answer, without a cache."""
    ids = Letters()(text)["input_ids"]
    answer, rows = [], []
    while len(answer) < tokens and 0 not in answer:
        with torch.no_grad():
            rows.append(model(torch.tensor([ids + answer])).logits[0, -1].log_softmax(-1))
        answer.append(int(rows[-1].argmax()))
    return answer, torch.stack(rows)


def test_a_report_is_what_each_prompt_alone_gives(models):
    base, other = models
    evaluator = gk.RefusalEvaluator(Letters(), HARMFUL, **OPTIONS)
    before, report = evaluator.set_base(base), evaluator(other)
    for model, one in ((base, before), (other, report)):
        answers = [Letters().batch_decode([greedy(model, p, 4)[0]])[0] for p in ("abc", "fedcba", "hg", "aab", "ch")]
        assert one.answers + one.lookalike_answers == answers
        assert one.verdicts == [judge(p, a) for (_, p), a in zip(HARMFUL, answers[:3], strict=True)]
        assert one.lookalike_verdicts == [judge(p, a) for p, a in zip(DATA["lookalikes"], answers[3:], strict=True)]
        task = [Letters().batch_decode([greedy(model, p, 2)[0]])[0] for p, _ in DATA["task"]]
        assert one.task_correct == [t.startswith(w) or w == t for t, (_, w) in zip(task, DATA["task"], strict=True)]
        for (_, prompt), mass in zip(HARMFUL, one.refusal_masses, strict=True):
            assert mass == pytest.approx(
                float(greedy(model, prompt, 1)[1][0].exp()[evaluator.openings].sum()), rel=1e-4
            )
    assert report.sources == ["x", "y", "x"] and report.by_source["x"]["refuses"].n == 2
    assert before.kl == before.logprob_change == 0.0
    kls, tokens = [], 0
    for i, (_, prompt) in enumerate(HARMFUL[:2]):
        answer, p = greedy(base, prompt, 4)
        ids = Letters()(prompt)["input_ids"] + answer[:-1]
        with torch.no_grad():
            q = other(torch.tensor([ids])).logits[0, -len(answer) :].log_softmax(-1)
        kls.append(float((p.exp() * (p - q)).sum()))
        tokens += len(answer)
        chosen = torch.tensor(answer)[:, None]
        change = float((q.gather(1, chosen) - p.gather(1, chosen)).sum())
        assert report.logprob_changes[i] == pytest.approx(change, rel=1e-3)
    assert report.kl == pytest.approx(sum(kls) / tokens, rel=1e-3) and report.kl > 1e-3


def test_an_evaluation_does_not_depend_on_what_was_evaluated_before(models):
    base, other = models
    evaluator = gk.RefusalEvaluator(Letters(), HARMFUL, **OPTIONS)
    evaluator.set_base(base)
    evaluator(base)
    second, alone = evaluator(other), gk.RefusalEvaluator(Letters(), HARMFUL, **OPTIONS)(other)
    assert alone.kl is None and alone.base is None
    assert second.verdicts == alone.verdicts and second.answers == alone.answers
    assert second.refusal_masses == pytest.approx(alone.refusal_masses, rel=1e-4)
    rest = evaluator(other, task=False)
    assert rest.task.n == 0 and rest.verdicts == second.verdicts and rest.kl == pytest.approx(second.kl)
    assert evaluator(base).kl == pytest.approx(0.0, abs=1e-6)


def test_sources_by_name_are_taken_in_turn(models):
    harmful = {"x": ["abc", "hg"], "y": ["fedcba"]}
    report = gk.evaluate_refusals(models[0], Letters(), harmful, base=models[1], **OPTIONS)
    other_form = gk.evaluate_refusals(models[0], Letters(), HARMFUL[:2] + HARMFUL[2:], base=models[1], **OPTIONS)
    assert report == other_form and report.sources == ["x", "y", "x"]
    assert report.base.answers != report.answers and report.kl > 1e-3
    plain = gk.evaluate_refusals(models[0], Letters(), ["abc"], progress=False)
    assert plain.sources == ["harmful"] and plain.judge == "judge_opening"


def test_an_adapter_is_switched_off_for_the_base_and_all_is_left_as_it_was(models):
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(models[0])
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    name, frozen = next((n, p) for n, p in adapted.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    adapted.train()
    adapted.base_model.model.lm_head.eval()
    modes = [m.training for m in adapted.modules()]
    wants = {n: p.requires_grad for n, p in adapted.named_parameters()}
    report = gk.evaluate_refusals(adapted, Letters(), HARMFUL, base="adapter_off", **OPTIONS)
    assert [m.training for m in adapted.modules()] == modes
    assert {n: p.requires_grad for n, p in adapted.named_parameters()} == wants and not wants[name]
    expected = gk.RefusalEvaluator(Letters(), HARMFUL, **OPTIONS)
    assert report.base == expected.set_base(base)
    assert report.verdicts == expected(adapted).verdicts and report.kl > 1e-3
    with pytest.raises(TypeError, match=r'base is "adapter_off", which needs a peft\.PeftModel'):
        gk.evaluate_refusals(base, Letters(), HARMFUL, base="adapter_off", progress=False)


def test_a_task_is_right_where_the_answer_begins_as_expected(models):
    answer = Letters().batch_decode([greedy(models[0], "ab", 3)[0]])[0]
    assert len(answer) == 3
    wrong = "h" if answer[0] != "h" else "a"
    for expected, tokens, right in (
        (answer[:2].upper(), None, True),
        (answer, 1, True),  # cut short by the number of tokens
        (answer[0] + wrong, None, answer[1] == wrong),
        (wrong, None, False),
    ):
        task = [("ab", expected)]
        report = gk.evaluate_refusals(
            models[0], Letters(), ["abc"], task=task, task_tokens=tokens, judge=judge, progress=False
        )
        assert report.task_correct == [right], expected


class Words(Letters):
    """One token a word; "sorry" and its capital are known, "I" too."""

    unk_token_id = 3
    words = ("<end>", "I", "Sorry", "<unk>", "sorry", "user:", "hello")

    def __call__(self, text, **_):
        return {"input_ids": [self.words.index(w) if w in self.words else 3 for w in text.split()]}

    def batch_decode(self, rows, **_):
        return [" ".join(self.words[token] for token in row) for row in rows]


def test_the_tokens_that_refusals_begin_with_are_those_after_a_prompt():
    assert opening_tokens(Words(), "user: hello ") == [1, 2, 4]
    # Where no space stands between, it makes one unknown word of a phrase and what is before it.
    assert opening_tokens(Words(), "user: hello") == [1, 2, 4]
    assert opening_tokens(Letters(), "abc") == [1]  # "as an ai": other first letters are unknown, hence the end


def test_answers_to_conversations_are_judged_by_the_last_request(models):
    asked = []

    def remember(prompt, answer):
        asked.append(prompt)
        return "other"

    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]

    class All(Letters):
        def apply_chat_template(self, messages, **_):
            return "".join(m["content"] for m in messages)

    gk.evaluate_refusals(models[0], All(), [talk, "ab"], judge=remember, progress=False)
    assert asked == ["d", "ab"]
    with pytest.raises(ValueError, match="harmful prompt 1 ends with an assistant's message"):
        gk.evaluate_refusals(models[0], All(), [talk[:2]], progress=False)


def test_models_that_cannot_read_the_prompts_are_refused(models):
    config = LlamaConfig(vocab_size=9, max_position_embeddings=12, **SIZES)
    short = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="harmful prompt 2 has 3 tokens, and 10 more are to follow, but model has 12"):
        gk.evaluate_refusals(short, Letters(), ["a", "abc"], answer_tokens=10, progress=False)
    fewer = LlamaForCausalLM(LlamaConfig(vocab_size=3, **SIZES))
    with pytest.raises(ValueError, match="lookalike 1 holds token 5, but model knows 3; give"):
        gk.evaluate_refusals(fewer, Letters(), ["ab"], lookalikes=["ae"], progress=False)
    with pytest.raises(ValueError, match=r"judge must return one of .* got True for answer 2"):
        gk.evaluate_refusals(
            models[0], Letters(), ["ab", "cd"], judge=lambda p, a: p == "cd" or "other", progress=False
        )


def test_reports_are_saved_without_texts_unless_asked(models, tmp_path):
    report = gk.evaluate_refusals(models[1], Letters(), HARMFUL, base=models[0], **OPTIONS)
    path = tmp_path / "new" / "report.json"
    report.save(path)
    loaded = gk.EvaluationReport.load(path)
    assert loaded.answers == loaded.lookalike_answers == loaded.base.answers == []
    assert (
        loaded.verdicts == report.verdicts and loaded.kl == report.kl and loaded.base.verdicts == report.base.verdicts
    )
    assert str(loaded) == str(report) and loaded.compare(report)["refuses"].value == 0.0
    written = json.loads(path.read_text())
    assert written["rates"]["refuses"]["count"] == report.refuses.count and set(written["verdicts"]) <= set("rco")
    report.save(path, answers=True)
    assert gk.EvaluationReport.load(path) == report


def test_a_report_of_a_broken_model_is_saved_and_read(models, tmp_path):
    broken = copy.deepcopy(models[0])
    broken.lm_head.weight.data.fill_(float("nan"))
    report = gk.evaluate_refusals(broken, Words(), ["hello"], base=models[0], progress=False)
    report.save(tmp_path / "r")
    loaded = gk.EvaluationReport.load(tmp_path / "r")
    assert loaded.kl != loaded.kl and loaded.refusal_mass != loaded.refusal_mass


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": "x"}, "is not a report of guardspace evaluate"),
        ({"verdicts": "rrx"}, "verdicts must be a text of r, c, o, got 'rrx'"),
        ({"verdicts": "rr"}, "verdicts are of 2 prompts, others of 3"),
        ({"refusal_masses": [0.5]}, "verdicts are of 3 prompts, others of 1"),
        ({"kl_tokens": [4]}, "kls are of 2 prompts, others of 1"),
        ({"kls": ["x", 1.0]}, r"kls\[0\] must be a finite number"),
        ({"sources": [3, "a", "b"]}, r"sources\[0\] must be a text"),
        ({"more": 1}, "unknown entry 'more'"),
        ({"base": {"prompts": "x"}}, "base lacks judge"),
    ],
)
def test_altered_reports_are_refused(models, tmp_path, change, words):
    path = tmp_path / "report.json"
    gk.evaluate_refusals(models[1], Letters(), HARMFUL, base=models[0], **OPTIONS).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        gk.EvaluationReport.load(path)


def test_only_reports_on_the_same_prompts_are_compared(models):
    reports = [
        gk.evaluate_refusals(models[i], Letters(), HARMFUL[: 3 - cut], **{**OPTIONS, "answer_tokens": tokens})
        for i, cut, tokens in ((0, 0, 4), (1, 0, 4), (1, 1, 4), (1, 0, 3))
    ]
    found = reports[0].compare(reports[1])
    assert set(found) == {"refuses", "over_refuses", "task"}
    assert found["refuses"].second == reports[1].refuses and found["refuses"].first == reports[0].refuses
    with pytest.raises(ValueError, match="other differs in prompts"):
        reports[0].compare(reports[2])
    with pytest.raises(ValueError, match="other differs in answer_tokens: 3, not 4; evaluate"):
        reports[0].compare(reports[3])


def test_a_report_is_drawn(models, tmp_path):
    pytest.importorskip("matplotlib")
    gk.evaluate_refusals(models[1], Letters(), HARMFUL, base=models[0], **OPTIONS).plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
