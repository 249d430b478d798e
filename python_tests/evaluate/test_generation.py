import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guardspace_kernels.evaluate import generation
from guardspace_kernels.evaluate.generation import generate

NEW, END = 6, 1
BEGINNING = [2, 3, 4] * 12  # long enough to be read once for all
PROMPTS = [[5, 6, 7], [8, 9], [10] * 6, [5, 9, 11, 12], [7], [13, 2]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=20, num_key_value_heads=2, initializer_range=0.4, **sizes)
    return LlamaForCausalLM(config).eval()


def alone(model, prompt):
    """Greedy, token by token, without a cache."""
    answer = []
    while len(answer) < NEW and END not in answer:
        with torch.no_grad():
            answer.append(int(model(input_ids=torch.tensor([prompt + answer])).logits[0, -1].argmax()))
    return answer


@pytest.fixture(scope="module", params=[[], BEGINNING], ids=["short", "shared"])
def case(model, request):
    prompts = [request.param + prompt for prompt in PROMPTS]
    answers = [alone(model, prompt) for prompt in prompts]
    assert len({len(answer) for answer in answers}) > 1  # some end early
    return prompts, answers


def count_tokens(model):
    read = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: read.append(kw["input_ids"].numel()), with_kwargs=True)
    return read, hook


@pytest.mark.parametrize("batch_size, together", [(4, 6), (2, 6), (1, 2), (2, 1)])
def test_answers_are_those_of_each_prompt_alone(model, case, batch_size, together, monkeypatch):
    prompts, answers = case
    monkeypatch.setattr(generation, "_TOGETHER", together)
    done = []
    assert generate(model, prompts, new_tokens=NEW, end=END, batch_size=batch_size, tick=done.append) == answers
    assert sum(done) == len(prompts) and min(done) > 0


def test_answers_of_several_batches_go_on_together(model, case):
    prompts, answers = case
    read, hook = count_tokens(model)
    assert generate(model, prompts, new_tokens=NEW, end=END, batch_size=2) == answers
    hook.remove()
    going = [sum(len(answer) > step for answer in answers) for step in range(1, NEW)]
    assert read[-len(going) :] == going and len(read) == (4 if len(prompts[0]) > 30 else 3) + len(going)


def test_a_shared_beginning_is_read_once(model, case):
    prompts, _ = case
    read, hook = count_tokens(model)
    generate(model, prompts, new_tokens=1, end=END)
    hook.remove()
    longest = max(map(len, PROMPTS))
    assert read == ([len(BEGINNING), len(PROMPTS) * longest] if len(prompts[0]) > 30 else [len(PROMPTS) * longest])


def changed(answer, place):
    """Another answer, whole, that agrees with this one as far as that place."""
    rest = [15 if token != 15 else 16 for token in answer[place:]]
    return (answer[:place] + rest + [17] * NEW)[:NEW]


@pytest.mark.parametrize("place", [0, 1, 3])
def test_answers_do_not_depend_on_guesses(model, case, place):
    prompts, answers = case
    wrong = [changed(answer, place) for answer in answers]
    mixed = [guess if i % 2 else answer for i, (guess, answer) in enumerate(zip(wrong, answers, strict=True))]
    for guesses in (wrong, mixed):
        assert generate(model, prompts, new_tokens=NEW, end=END, guesses=guesses) == answers


def test_right_guesses_need_one_forward_and_show_their_logits(model, case):
    prompts, answers = case
    seen = {}
    read, hook = count_tokens(model)
    made = generate(
        model,
        prompts,
        new_tokens=NEW,
        end=END,
        guesses=answers,
        watch=lambda indices, logits: seen.update(zip(indices, logits, strict=True)),
    )
    hook.remove()
    assert made == answers and len(read) == (2 if len(prompts[0]) > 30 else 1)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(seen[i][-len(answer) :], expected, rtol=1e-4, atol=1e-5)


def made(kind):
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shared = {"vocab_size": 20, "initializer_range": 0.4, "bos_token_id": None, "eos_token_id": END, "pad_token_id": 0}
    torch.manual_seed(3)
    if kind == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**sizes, **shared, num_key_value_heads=2)).eval()
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **shared)).eval()
    if kind == "mistral":  # reads the last four tokens alone
        return t.MistralForCausalLM(t.MistralConfig(**sizes, **shared, num_key_value_heads=2, sliding_window=4)).eval()
    if kind == "mamba":
        return t.MambaForCausalLM(t.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, **shared)).eval()

    class NoSlicing(t.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
            return super().forward(
                input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache,
                position_ids=(attention_mask.cumsum(1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
                if attention_mask is not None
                else None,
            )  # fmt: skip

    return NoSlicing(t.LlamaConfig(**sizes, **shared)).eval()


@pytest.mark.parametrize("beginning", [[], BEGINNING], ids=["short", "shared"])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mistral", "mamba", "no slicing"])
def test_models_of_other_kinds(kind, beginning):
    model = made(kind)
    prompts = [beginning + prompt for prompt in PROMPTS]
    answers = [alone(model, prompt) for prompt in prompts]
    mixed = [changed(answer, 1) if i % 2 else answer for i, answer in enumerate(answers)]
    for guesses in (None, answers, mixed):
        seen, done = {}, []
        got = generate(
            model, prompts, new_tokens=NEW, end=[END, 19], guesses=guesses, batch_size=4, tick=done.append,
            watch=lambda indices, logits, seen=seen: seen.update(zip(indices, logits, strict=True)),
        )  # fmt: skip
        cut = [a[: a.index(19) + 1] if 19 in a else a for a in answers]
        assert got == cut and sum(done) == len(prompts)
        for i, prompt in enumerate(prompts):
            tokens = prompt + (guesses[i][:-1] if guesses else [])
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([tokens])).logits[0, len(prompt) - 1 :]
            torch.testing.assert_close(seen[i][-len(expected) :], expected, rtol=1e-4, atol=1e-4)


def test_a_model_whose_weights_are_offloaded(model, case):
    accelerate = pytest.importorskip("accelerate")
    prompts, answers = case
    offloaded = copy.deepcopy(model)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    assert generate(offloaded, prompts, new_tokens=NEW, end=END) == answers
