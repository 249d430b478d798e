import copy
import pickle

import pytest
import torch
import transformers
from guard_helpers import (
    MODELS,
    PROMPTS,
    PlainModel,
    batch_of,
    collect,
    hand_made,
    relative_error,
    tiny_gpt2,
    tiny_llama,
)
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.guard.batches import forward_batch
from guardspace_kernels.guard.files import save_tensors
from guardspace_kernels.guard.statistics import _staged, distinct, on_cpu, packed, unpacked


def check_equal(stats, made, tolerance=2e-5):
    """The statistics against (X, C, first inputs) made by hand."""
    assert set(stats.layers) == set(made)
    for name, (X, C, firsts) in made.items():
        entry = stats.for_layer(name)
        assert entry.tokens == X.shape[0], name
        assert relative_error(entry.covariance, C) < tolerance, name
        assert torch.equal(entry.covariance, entry.covariance.T)
        if len(entry.sinks):  # each first input is there, and nothing else is
            distances = torch.cdist(entry.sinks.double(), firsts) / firsts.norm(dim=1)
            assert distances.min(dim=0).values.max() < 2e-3 and distances.min(dim=1).values.max() < 2e-3


def same_statistics(a, b, tolerance=2e-5):
    assert [e.layers for e in a.inputs] == [e.layers for e in b.inputs]
    for x, y in zip(a.inputs, b.inputs, strict=True):
        assert (x.tokens, x.sink_tokens, x.sinks.shape) == (y.tokens, y.sink_tokens, y.sinks.shape)
        assert relative_error(x.covariance, y.covariance) < tolerance
        if len(x.sinks):  # a set: in whatever order
            assert torch.cdist(x.sinks, y.sinks).min(dim=1).values.max() < 1e-3 * y.sinks.norm()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equal_to_hand_made_covariances_whatever_the_padding(kind, side):
    model = MODELS[kind]()
    stats = collect(model, [batch_of(side=side)])
    check_equal(stats, hand_made(model, PROMPTS, stats.layers))
    assert stats.prompts == len(PROMPTS)
    assert all(entry.sink_tokens == len(PROMPTS) for entry in stats.inputs)
    assert all(len(entry.sinks) == 2 for entry in stats.inputs)  # prompts begin with one of two tokens


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_batch_or_many(kind):
    model = MODELS[kind]()
    one = collect(model, [batch_of()])
    many = collect(model, [batch_of(PROMPTS[:1]), batch_of(PROMPTS[1:4], "left", 13), batch_of(PROMPTS[4:])])
    same_statistics(one, many)


def test_left_and_right_padding_agree_to_rounding_in_float64():
    for kind in ("llama", "gpt2"):
        model = MODELS[kind](dtype=torch.float64)
        right, left = (collect(model, [batch_of(side=side)], dtype=torch.float64) for side in ("right", "left"))
        same_statistics(right, left, 1e-12)
        check_equal(right, hand_made(model, PROMPTS, right.layers), 1e-12)
        assert all(entry.covariance.dtype == torch.float64 for entry in right.inputs)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_guarded_layers_compute_real_tokens_only(kind, side):
    model, batch, rows, outputs = MODELS[kind](), batch_of(side=side), [], []
    layers = [model.get_submodule(name) for name in collect(model).layers]
    for layer in layers:
        forward = layer.forward
        layer.forward = lambda x, forward=forward: rows.append(x.shape[:-1].numel()) or forward(x)
        layer.register_forward_hook(lambda _module, _args, result: outputs.append(result))
    collect(model, [batch])
    # Before, a forward of one's own is tried with a few rows, and one prompt alone and in its row.
    tried, n = [4] * len(layers), len(layers)
    assert len(rows) == 4 * n and len(outputs) == 3 * n
    real = int(batch["attention_mask"].sum())
    assert rows[:n] == tried and rows[-n:] == [real] * n and real < batch["input_ids"].numel()
    assert max(rows[:-n]) < 2 * max(map(len, PROMPTS))
    del outputs[:-n]
    assert all(y.shape[:-1] == batch["input_ids"].shape and y.isfinite().all() for y in outputs)
    # Somebody else's hook sees at each real token what it would see without collecting.
    collected, mask = list(outputs), batch["attention_mask"].bool()
    outputs.clear()
    with torch.no_grad():
        forward_batch(model, batch)
    for y, wanted in zip(collected, outputs, strict=True):
        assert relative_error(y[mask], wanted[mask]) < 1e-5


def mixing_model(kind):
    """Two layers, the first of which mixes tokens by a convolution or a recurrent state."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {**sizes, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    linear = {f"linear_{what}": 2 if "num" in what else 16 for what in (
        "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim",
    )}  # fmt: skip
    torch.manual_seed(0)
    if kind == "lfm2":
        layers = ["conv", "full_attention"]
        config = transformers.Lfm2Config(**heads, layer_types=layers, block_auto_adjust_ff_dim=False)
        return transformers.Lfm2ForCausalLM(config)
    if kind == "mamba2":
        state = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8}
        return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **state))
    layers = ["linear_attention", "full_attention"]
    config = transformers.Qwen3_5TextConfig(**heads, **linear, head_dim=16, layer_types=layers)
    return transformers.Qwen3_5ForCausalLM(config)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["lfm2", "mamba2", "qwen3_5"])
def test_padding_leaves_no_trace_where_tokens_are_mixed_without_attention(kind, side):
    model, lengths = mixing_model(kind).eval(), (9, 5)
    singly = [{"input_ids": torch.randint(1, 64, (1, n)), "attention_mask": torch.ones(1, n).long()} for n in lengths]
    padding = (4, 0) if side == "left" else (0, 4)
    short = {key: torch.nn.functional.pad(value, padding) for key, value in singly[1].items()}
    together = {key: torch.cat([singly[0][key], short[key]]) for key in short}
    expected, stats = collect(model, singly), collect(model, [together])
    for one, entry in zip(expected.inputs, stats.inputs, strict=True):
        assert one.tokens == entry.tokens
        assert relative_error(entry.covariance, one.covariance) < 1e-5


def test_an_output_has_the_shape_of_its_flattened_input():
    shapes = []

    class Flat(PlainModel):
        def forward(self, input_ids, attention_mask=None):
            y = self.q(self.embed(input_ids).reshape(-1, 10))
            shapes.append(tuple(y.shape))
            return y

    batch = batch_of()
    collect(Flat(), [batch, batch], target_modules=["q"])
    # A prompt twice, and in its row; the second forward has ended before.
    assert shapes == [(8, 8), (9, 8), (batch["input_ids"].numel(), 8)]


class TwiceModel(PlainModel):
    """Calls its last layer twice."""

    def forward(self, input_ids, attention_mask=None):
        return self.out(super().forward(input_ids)[..., :8])


@pytest.mark.parametrize("make, heads", [(tiny_llama, 1), (TwiceModel, 3)])
def test_a_forward_ends_with_the_last_layer_if_each_is_called_once(make, heads):
    model, ran, batches = make(), [], [batch_of(PROMPTS[i : i + 2]) for i in (0, 2, 3)]
    if make is tiny_llama:
        model.lm_head.register_forward_pre_hook(lambda *_: ran.append(1))
    else:
        model.register_forward_hook(lambda *_: ran.append(1))
    stats = collect(model, batches)
    assert len(ran) == heads + 2  # a prompt alone and in its row
    check_equal(stats, hand_made(model, [p for i in (0, 2, 3) for p in PROMPTS[i : i + 2]], stats.layers))


def test_no_mask_counts_every_token():
    model = tiny_llama()
    prompts = [PROMPTS[0], PROMPTS[0][::-1]]
    stats = collect(model, [{"input_ids": torch.tensor(prompts)}])
    check_equal(stats, hand_made(model, prompts, stats.layers))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_mask_with_holes_is_the_prompt_without_them(kind):
    model = MODELS[kind]()
    ids, mask = torch.tensor([[50, 5, 9, 50, 50, 3, 7, 50]]), torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0]])
    holes = {"input_ids": ids, "attention_mask": mask}
    stats = collect(model, [holes])
    check_equal(stats, hand_made(model, [[5, 9, 3, 7]], stats.layers))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "plain"])
def test_without_a_separate_sink_every_token_counts(kind):
    model = MODELS[kind]()
    stats = collect(model, separate_sink=False)
    check_equal(stats, hand_made(model, PROMPTS, stats.layers, separate_sink=False))
    assert all(len(entry.sinks) == 0 and entry.sink_tokens == 0 for entry in stats.inputs)
    assert stats.inputs[0].tokens == sum(map(len, PROMPTS))


def test_bfloat16_activations_are_summed_in_float32():
    model = tiny_llama(dtype=torch.bfloat16)
    prompt = torch.arange(2, 50)
    stats = collect(model, [{"input_ids": prompt[None]}])
    check_equal(stats, hand_made(model, [prompt.tolist()], stats.layers), 1e-6)


def test_other_batch_entries_reach_the_model():
    model = tiny_llama()
    batch = batch_of([PROMPTS[0]])
    embedded = {"inputs_embeds": model.model.embed_tokens(batch["input_ids"]).detach()}
    same_statistics(collect(model, [batch]), collect(model, [{**embedded, "attention_mask": batch["attention_mask"]}]))
    same_statistics(collect(model, [batch]), collect(model, [{**batch, "labels": batch["input_ids"]}]))


def test_layers_that_read_one_tensor_share_one_entry():
    groups = [e.layers for e in collect(tiny_llama()).inputs[:4]]
    layer = "model.layers.0."
    assert groups == [
        [f"{layer}self_attn.{x}_proj" for x in "qkv"],
        [f"{layer}self_attn.o_proj"],
        [f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"],
        [f"{layer}mlp.down_proj"],
    ]


@pytest.mark.parametrize(
    "reads, groups",
    [("same", [["q", "k"], ["out"]]), ("other", [["q"], ["k"], ["out"]]), ("inplace", [["q"], ["k"], ["out"]])],
)
def test_sharing_follows_the_tensors_not_the_names(reads, groups):
    model = PlainModel(reads)
    stats = collect(model, [batch_of(), batch_of(PROMPTS[:2])])
    assert [e.layers for e in stats.inputs] == groups
    check_equal(stats, hand_made(model, [*PROMPTS, *PROMPTS[:2]], stats.layers))


def test_layers_that_stop_sharing_are_refused():
    with pytest.raises(RuntimeError, match="layer k read the same tensor as q in the first batch but another one now"):
        collect(PlainModel("flip"), [batch_of(), batch_of([[5, 49]])])


@pytest.mark.parametrize("target, count", [(["q_proj", "v_proj"], 4), (r".*layers\.1\..*", 7), ("all-linear", 14)])
def test_target_modules(target, count):
    model = tiny_llama(tied=True)
    stats = collect(model, target_modules=target)
    assert len(stats.layers) == count and "lm_head" not in stats.layers
    check_equal(stats, hand_made(model, PROMPTS, stats.layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distinct_is_row_by_row(dtype):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 20, generator=generator, dtype=dtype) * 10.0 ** torch.arange(4)[:, None]
    steps = 10.0 ** torch.linspace(-5, -1, 41, dtype=dtype)[torch.randperm(41, generator=generator)]
    noise = torch.randn(41, 20, generator=generator, dtype=dtype)
    rows = centres[torch.arange(41) % 4]
    rows = rows + (steps / noise.norm(dim=1) * rows.norm(dim=1))[:, None] * noise
    wanted = list(centres[:2])
    for row in rows:
        if all((one - row).double().norm() > 1e-3 * one.double().norm() for one in wanted):
            wanted.append(row)
    assert 5 < len(wanted) < 35
    assert torch.equal(distinct(rows, centres[:2]), torch.stack(wanted))
    assert torch.equal(distinct(rows[:0], centres[:1]), centres[:1])


def test_distinct_sinks():
    model = PlainModel()
    prompts = [[1, 5], [2, 5], [1, 6], [3, 5]]
    with torch.no_grad():
        model.embed.weight[2] = model.embed.weight[1] * (1 + 1e-5)  # rounding
        model.embed.weight[3] = model.embed.weight[1] * 1.01
    assert len(collect(model, [batch_of(prompts)]).for_layer("q").sinks) == 2
    assert len(collect(model, [batch_of([p]) for p in prompts]).for_layer("q").sinks) == 2
    model = model.to(torch.bfloat16)  # there 1% is rounding
    stats = collect(model, [batch_of([p]) for p in prompts])
    assert len(stats.for_layer("q").sinks) == 1
    assert len(stats.merge(collect(model, [batch_of(prompts[3:])])).for_layer("q").sinks) == 1
    assert stats.for_layer("q").sink_tokens == 4


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_are_generated_and_counted(kind, side):
    model = MODELS[kind](dtype=torch.float64)
    whole = [model.generate(torch.tensor([p]), max_new_tokens=5, do_sample=False)[0].tolist() for p in PROMPTS]
    batches = [batch_of(PROMPTS[:3], side), batch_of(PROMPTS[3:], side)]
    stats = collect(model, batches, answer_tokens=5, dtype=torch.float64)
    assert stats.inputs[0].tokens == sum(map(len, PROMPTS)) + 4 * len(PROMPTS)
    check_equal(stats, hand_made(model, whole, stats.layers), 1e-10)


@pytest.mark.parametrize("as_list", [False, True])
def test_answers_end_with_their_first_end_of_sequence_token(as_list):
    model = tiny_llama(dtype=torch.float64)
    answers = [
        model.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False)[0, len(p) :].tolist() for p in PROMPTS
    ]
    counts = {token: [a.index(token) + 1 if token in a else 6 for a in answers] for token in range(60)}
    eos = max(counts, key=lambda token: len(set(counts[token])))
    assert len(set(counts[eos])) > 1, "the answers must differ in length for this test to test anything"
    model.generation_config.eos_token_id = [59, eos] if as_list else eos
    stats = collect(model, answer_tokens=6, dtype=torch.float64)
    whole = [[*p, *a[:n]] for p, a, n in zip(PROMPTS, answers, counts[eos], strict=True)]
    check_equal(stats, hand_made(model, whole, stats.layers), 1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "early_stopping": True},
        {"do_sample": True, "temperature": 5.0, "top_k": 3},
        {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1},
        {"return_dict_in_generate": True, "output_scores": True},
        {"min_new_tokens": 5, "forced_eos_token_id": 7, "suppress_tokens": [11]},
        {"max_length": 3, "num_return_sequences": 1, "stop_strings": ["a"]},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
    ids=str,
)
def test_answers_are_greedy_whatever_the_generation_settings(settings):
    plain = collect(tiny_llama(), answer_tokens=5)
    model = tiny_llama()
    model.generation_config.update(**settings)
    before = model.generation_config
    same_statistics(collect(model, answer_tokens=5), plain, 1e-7)
    assert model.generation_config is before and all(getattr(before, k) == v for k, v in settings.items())


def test_answers_need_a_model_that_generates_and_plain_batches():
    with pytest.raises(TypeError, match=r"answer_tokens needs a model with \.generate\(\), got PlainModel"):
        collect(PlainModel(), answer_tokens=2)
    extra = {**batch_of(), "position_ids": torch.zeros(5, 9, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"input_ids and attention_mask alone, got also \['position_ids'\]"):
        collect(tiny_llama(), [extra], answer_tokens=2)
    with pytest.raises(ValueError, match="answer_tokens must be 0 or more, got -1"):
        collect(tiny_llama(), answer_tokens=-1)


def hooks_of(model):
    return {name: list(m._forward_pre_hooks) + list(m._forward_hooks) for name, m in model.named_modules()}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training, fails):
    model = tiny_llama().train(training)
    model.model.layers[0].mlp.train(not training)  # a part in another mode
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda *_: seen.append(1))  # somebody else's

    def fail(*_):
        if fails and len(seen) == 4:
            raise RuntimeError("out of memory")

    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(fail)
    modes = {name: m.training for name, m in model.named_modules()}
    hooks, state = hooks_of(model), copy.deepcopy(model.state_dict())
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            collect(model, [batch_of(), batch_of()])
    else:
        collect(model, [batch_of(), batch_of()])
    assert hooks_of(model) == hooks and len(seen) == 4  # a prompt alone, in its row, and two batches
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_while_collecting():
    model = tiny_gpt2().train()  # dropout 0.1
    stats = collect(model)
    check_equal(stats, hand_made(model, PROMPTS, stats.layers))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activations_name_layer_and_batch(value):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = value
    with pytest.raises(ValueError, match=r"batch 0: the input of layer model\.layers\.1\.mlp\.down_proj holds non-fin"):
        collect(model)
    model = PlainModel()
    with torch.no_grad():
        model.embed.weight[13] = value
    for prompt in ([5, 13], [13, 5]):  # as any token, and as the first one
        with pytest.raises(ValueError, match="batch 1: the input of layer q holds non-finite values"):
            collect(model, [batch_of(PROMPTS[:3]), batch_of([prompt])])


@pytest.mark.parametrize("value, dtype", [(1e20, torch.float32), (1e200, torch.float64)])
def test_activations_whose_squares_overflow_name_layer_and_batch(value, dtype):
    model = PlainModel().to(dtype)
    with torch.no_grad():
        model.embed.weight[13] = value
    for prompt in ([5, 13], [13, 5]):  # as any token, and as the first one, whose norm would be infinite
        with pytest.raises(ValueError, match=rf"batch 1: the input of layer q holds .* \(or overflows {dtype}\)"):
            collect(model, [batch_of(PROMPTS[:3]), batch_of([prompt])], dtype=dtype)


def test_non_finite_padding_counts_for_nothing():
    model = PlainModel()
    clean = collect(model)
    with torch.no_grad():
        model.embed.weight[50] = float("nan")
    same_statistics(collect(model), clean)


IDS = torch.ones(2, 3, dtype=torch.long)
PADDED = torch.tensor([[1, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    "batches, error, match",
    [
        ([], ValueError, "batches is empty"),
        ([{"input_ids": IDS[:0]}], ValueError, "batch 0 holds no prompt"),
        ([{"input_ids": IDS.float()}], TypeError, "batch 0: input_ids must be integers, got torch.float32"),
        ([{"input_ids": IDS, "attention_mask": PADDED}], ValueError, "batch 0: prompt 1 is all padding"),
        ([batch_of(), {"input_ids": IDS[:, :0]}], ValueError, "batch 1: prompt 0 is all padding"),
        ([{"input_ids": IDS, "attention_mask": IDS[:, :2]}], ValueError, r"mask \(2, 2\) and input_ids \(2, 3\)"),
        ([{"input_ids": IDS[0]}], ValueError, r"must be \(prompts, tokens\), got shape \(3,\)"),
        ([{"labels": IDS}], ValueError, r"batch 0 needs input_ids or an attention_mask; it has \['labels'\]"),
        ({"input_ids": IDS}, TypeError, r"batch 0 must be a mapping .* got str; pass a list of such batches"),
        ([IDS], TypeError, r"batch 0 must be a mapping .* got Tensor"),
    ],
)
def test_unusable_batches(batches, error, match):
    with pytest.raises(error, match=match):
        collect(PlainModel(), batches)


def test_unusable_arguments():
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32 or torch\.float64, got torch\.float16"):
        collect(PlainModel(), dtype=torch.float16)
    with pytest.raises(ValueError, match="matches no Linear or Conv1D layer"):
        collect(PlainModel(), target_modules=["query"])
    model = PlainModel()
    model.unused = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="layer unused was never reached by the forward pass; leave it out"):
        collect(model)
    assert collect(model, target_modules=["q", "k"]).layers == ["q", "k"]


@pytest.mark.parametrize("layout", ["flat", "transposed", "pooled"])
def test_inputs_of_other_shapes(layout):
    class Reshaped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc = torch.nn.Embedding(60, 6), torch.nn.Linear(6, 6)

        def forward(self, input_ids, attention_mask=None):
            h = self.embed(input_ids)
            return self.fc({"flat": h.reshape(-1, 6), "transposed": h.transpose(0, 1), "pooled": h.mean(dim=1)}[layout])

    model = Reshaped()
    if layout == "flat":
        stats = collect(model)
        check_equal(stats, hand_made(model, PROMPTS, ["fc"]))
    else:  # (tokens, prompts, d) has as many rows, in another order: the mask would hit the wrong ones
        shape, why = {
            "transposed": (r"\(4, 2, 6\)", "it does not read the prompts' tokens in their order"),
            "pooled": (r"\(2, 6\)", "it reads one row of each prompt, as a pooler or a classifier does"),
        }[layout]
        match = rf"layer fc: input of shape {shape} does not match the attention mask \(2, 4\): {why}.*leave them out"
        for batches in ([batch_of()], [batch_of([PROMPTS[0][:5]] * 5)]):  # as many prompts as tokens
            with pytest.raises(ValueError, match=match):
                collect(model, batches)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "plain"])
def test_save_and_load(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stats = collect(MODELS[kind]())
    stats.save("statistics.safetensors")  # a bare name
    loaded = gk.CalibrationStatistics.load("statistics.safetensors")
    assert loaded.fingerprint == stats.fingerprint and loaded.prompts == stats.prompts
    assert loaded.layers == stats.layers and repr(loaded) == repr(stats)
    for a, b in zip(stats.inputs, loaded.inputs, strict=True):
        assert (a.layers, a.tokens, a.sink_tokens) == (b.layers, b.tokens, b.sink_tokens)
        assert torch.equal(a.covariance, b.covariance) and torch.equal(a.sinks, b.sinks)


def test_loaded_statistics_stay_in_the_file_and_can_be_changed_copied_and_pickled(tmp_path):
    stats = collect(tiny_llama())
    stats.save(tmp_path / "s")
    loaded = gk.CalibrationStatistics.load(tmp_path / "s")
    loaded.save(tmp_path / "s")  # onto the very file that it reads
    (tmp_path / "s").unlink()
    for other in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert all(torch.equal(a.covariance, b.covariance) for a, b in zip(stats.inputs, other.inputs, strict=True))
    C = loaded.inputs[0].covariance
    loaded.inputs[0].covariance = 2 * C
    assert torch.equal(loaded.inputs[0].covariance, 2 * C)
    loaded.inputs[0].covariance.zero_()
    assert torch.equal(loaded.inputs[0].covariance, 2 * C)


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(FileNotFoundError, match="a calibration statistics file was expected"):
        gk.CalibrationStatistics.load(path)
    save_tensors(path, "guard plan", {"x": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="is not a calibration statistics file of this library but a guard plan file"):
        gk.CalibrationStatistics.load(path)
    collect(PlainModel()).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        gk.CalibrationStatistics.load(path)


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_merge_equals_collecting_both(kind):
    model = MODELS[kind]()
    first, second, both = (collect(model, [batch_of(p)]) for p in (PROMPTS[:2], PROMPTS[2:], PROMPTS))
    merged = first.merge(second)
    same_statistics(merged, both)
    assert merged.prompts == len(PROMPTS) and merged.layers == both.layers
    check_equal(merged, hand_made(model, PROMPTS, both.layers))
    assert first.prompts == 2 and first.inputs[0].sink_tokens == 2  # neither is changed


def test_merge_refuses_other_models_and_layers():
    mine = collect(PlainModel())
    with pytest.raises(ValueError, match="the statistics to merge belong to another model: layer q differs"):
        mine.merge(collect(PlainModel(seed=1)))
    model = PlainModel()
    subset = collect(model, target_modules=["q"])
    for one, other in ((mine, subset), (subset, mine)):
        with pytest.raises(ValueError, match=r"to merge (cover other layers|belong to another model: layer k)"):
            one.merge(other)
    regrouped = collect(PlainModel("other"))
    with pytest.raises(ValueError, match="cover other layers, or group them otherwise"):
        mine.merge(regrouped)


def test_for_layer_and_repr():
    stats = collect(PlainModel())
    with pytest.raises(KeyError, match="no statistics for layer v; there are 3"):
        stats.for_layer("v")
    counted = sum(map(len, PROMPTS)) - len(PROMPTS)
    assert repr(stats) == f"CalibrationStatistics(3 layers, 2 distinct inputs, 5 prompts, {counted} tokens)"
    kept = {"layers", "features", "stored", "tokens", "sinks", "sink_tokens", "routed"}
    assert vars(stats.inputs[0]).keys() == kept | {"sample", "held", "held_tokens"}


class LateReader(nn.Module):
    """The second layer reads what the first does, but only in batches with token 19."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.early, self.late = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return self.early(x) + self.late(x) if (input_ids == 19).any() else self.early(x)


LATE = [{"input_ids": torch.tensor([[3, place, 4, 2, 1]] * 2)} for place in (5, 19, 19)]


def test_a_layer_reached_late_does_not_inherit_earlier_batches():
    stats = collect(LateReader(), LATE)
    early, late = stats.for_layer("early"), stats.for_layer("late")
    assert early.layers == ["early"]
    assert late.layers == ["late"]
    assert (early.tokens, late.tokens) == (3 * 2 * 4, 2 * 2 * 4)


def test_a_layer_called_with_keywords_alone_is_named():
    class KeywordModel(PlainModel):
        def forward(self, input_ids, attention_mask=None):
            return self.q(input=self.embed(input_ids))

    with pytest.raises(TypeError, match="layer q is called with keywords alone"):
        gk.collect_statistics(KeywordModel(), [{"input_ids": torch.ones(1, 3, dtype=torch.long)}], progress=False)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
def test_lists_instead_of_tensors_are_named(name):
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long), name: [[1, 1, 1]]}
    with pytest.raises(TypeError, match=f"batch 0: {name} must be a tensor, got list; tokenize with return_tensors"):
        gk.collect_statistics(PlainModel(), [batch], progress=False)


@pytest.mark.parametrize("token", [60, -1])
def test_tokens_of_another_tokenizer_name_the_prompt(token):
    model, second = tiny_llama(), batch_of()
    second["input_ids"][2, 1] = token
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=rf"batch 1: prompt 2 holds token {token}, but the model knows 60 tokens"):
        collect(model, [batch_of(), second])
    assert len(ran) == 3  # a prompt alone, in its row, and the first batch


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (61,), (5, 7), (3, 0)], ids=str)
def test_a_part_is_filled_while_another_is_emptied(shape):
    """A copy from a GPU, which here is done when its event is waited for, as late as it may be there."""
    log = []

    class Late(torch.Tensor):
        """A page-locked buffer that is written when its event is waited for."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.copy_ and isinstance(args[0], Late):
                assert kwargs == {"non_blocking": True}
                queue.append((args[0].as_subclass(torch.Tensor), args[1].clone()))
                return args[0]
            return super().__torch_function__(function, types, args, kwargs or {})

    queue = []

    class Event:
        def record(self):
            self.copies, self.number = list(queue), len([what for what, _ in log if what == "record"])
            log.append(("record", self.number))
            queue.clear()

        def synchronize(self):
            log.append(("wait", self.number))
            for target, source in self.copies:
                target.copy_(source)

    t = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    buffers = [torch.full((4,), float("nan"), dtype=torch.float64).as_subclass(Late) for _ in range(2)]
    made = _staged(t, buffers, Event)
    assert torch.equal(made, t) and type(made) is torch.Tensor and made.is_contiguous()
    parts = -(-t.numel() // 4)
    if parts:
        first = [("record", 0), *(step for i in range(1, parts) for step in (("record", i), ("wait", i - 1)))]
        assert log == [*first, ("wait", parts - 1)]


def test_triangles_come_back_whole():
    C = torch.randn(37, 37)
    C = C + C.T
    assert torch.equal(unpacked(on_cpu(packed(C))), C)
