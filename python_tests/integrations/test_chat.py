"""Prompts through chat templates as published models have them, and templates that would lose a request."""

import pytest
import torch

from guardspace_kernels.integrations.chat import prompt_batches

WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<system>", "<assistant>", *(f"w{i}" for i in range(20))]
PLAIN = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = "{% for m in messages %}<{{ m.role }}> {{ m.content[0]['text'] }} <eos> {% endfor %}"
VISION = (
    "{% for m in messages %}<{{ m.role }}> {% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %} <eos> {% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
NO_SYSTEM_AT_ALL = "{% for m in messages if m.role == 'user' %}<user> {{ m.content }} <eos> {% endfor %}"
SWALLOWS = "<user> <eos>"
AS_JSON = "{% for m in messages %}<{{ m.role }}> {{ m.content | tojson }} <eos> {% endfor %}"
SEVERAL = [{"role": "user", "content": [{"type": "text", "text": "w5"}, {"type": "text", "text": "w6"}]}]
TALK = [{"role": "system", "content": "w1 w2"}, {"role": "user", "content": "w3"}]


def tokenizer(template, **tokens):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **tokens)
    fast.chat_template = template
    return fast


def text_of(batches):
    """What each prompt became."""
    return [
        " ".join(WORDS[i] for i in ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize(
    "template, answer", [(PLAIN, " <assistant>"), (PARTS, ""), (VISION, "")], ids=["text", "parts", "vision"]
)
def test_requests_arrive_whether_the_template_wants_text_or_parts(template, answer):
    made = prompt_batches(tokenizer(template), ["w5 w6", TALK, "w7"], 2)
    assert text_of(made) == [
        f"<user> w5 w6 <eos>{answer}",
        f"<system> w1 w2 <eos> <user> w3 <eos>{answer}",
        f"<user> w7 <eos>{answer}",
    ]


@pytest.mark.parametrize("template", [PLAIN, PARTS, VISION], ids=["text", "parts", "vision"])
def test_conversations_in_parts_are_never_written_as_code(template):
    talk = [{"role": "user", "content": [{"type": "text", "text": "w5 w6"}]}]
    assert text_of(prompt_batches(tokenizer(template), [talk]))[0].startswith("<user> w5 w6 <eos>")


def test_batches_are_padded_on_the_left_with_the_tokenizers_own_token():
    [batch] = prompt_batches(tokenizer(PLAIN, eos_token="<eos>"), ["w5", "w5 w6 w7"])
    assert batch["input_ids"][0, :2].tolist() == [1, 1] and batch["input_ids"].dtype == torch.int64
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    padded = tokenizer(PLAIN, pad_token="<pad>", eos_token="<eos>")
    assert prompt_batches(padded, ["w5", "w5 w6"])[0]["input_ids"][0, 0] == 0
    assert padded.padding_side == "right"  # as it was


def test_a_finished_conversation_gets_no_prompt_for_another_answer():
    finished = [*TALK, {"role": "assistant", "content": "w9"}]
    assert text_of(prompt_batches(tokenizer(PLAIN), [finished]))[0].endswith("<assistant> w9 <eos>")


def test_raw_prompts_get_the_tokenizers_special_tokens_and_no_template():
    assert text_of(prompt_batches(tokenizer(None), ["w5 w6"], chat=False)) == ["w5 w6"]


@pytest.mark.parametrize(
    "template, prompts, options, words",
    [
        (SWALLOWS, ["w5"], {}, "prompt 1: the tokenizer's chat template leaves a message out"),
        (NO_SYSTEM_AT_ALL, ["w5", TALK], {}, "prompt 2: the tokenizer's chat template leaves a message out"),
        (NO_SYSTEM, ["w5", TALK], {}, "prompt 2: the .* template raises TemplateError: System role not supported"),
        ("{{ messages[3].content }}", ["w5"], {}, "prompt 1: the .* template raises UndefinedError"),
        ("{% for m in", ["w5"], {}, "prompt 1: the .* template raises TemplateSyntaxError"),
        (None, ["w5"], {}, "the tokenizer has no chat template"),
        (PLAIN, [SEVERAL], {}, "prompt 1: the tokenizer's chat template leaves a message out"),
        (AS_JSON, [SEVERAL], {}, "prompt 1: the tokenizer's chat template leaves a message out"),
        (PLAIN, ["w5", "w5 w6"], {"max_tokens": 4}, "prompt 2 has 5 tokens, above max_tokens = 4; shorten it"),
        (PLAIN, [TALK], {"chat": False}, "prompt 1 is a conversation, which only a chat template makes"),
        (PLAIN, ["w5", " "], {}, "prompt 2: expected a text that is not empty"),
        (PLAIN, [], {}, "prompts is empty"),
        (PLAIN, [[{"role": "user"}]], {}, 'prompt 1: expected messages with "role" and "content"'),
    ],
)
def test_what_would_lose_a_request_is_refused(template, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        prompt_batches(tokenizer(template), prompts, **options)


def test_a_processor_is_refused_by_name():
    from transformers import ProcessorMixin

    class TinyProcessor(ProcessorMixin):
        def __init__(self):
            self.tokenizer, self.chat_template = tokenizer(PLAIN), PLAIN

    with pytest.raises(TypeError, match=r"tokenizer is a processor, TinyProcessor, .*give its tokenizer \(processor\."):
        prompt_batches(TinyProcessor(), ["w1"])
