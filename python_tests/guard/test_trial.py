"""What is tried before collecting: which tokens a layer reads, and whether a prompt is read as it is alone."""

import pytest
import torch
import transformers
from guard_helpers import PROMPTS, PlainModel, batch_of, collect, hand_made, perturb, plan_for, tiny_gpt2, tiny_llama
from test_statistics import check_equal
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.guard import heldout
from guardspace_kernels.guard.collection import plan_collection

ANSWERS = ([2, 8, 7], [2, 4, 4, 9, 3, 5], [2, 9], [2, 6, 3], [2, 3, 9, 4])
SINGLY = [{"input_ids": torch.tensor([prompt])} for prompt in PROMPTS]


def randomised(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tiny_t5():
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return randomised(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))


def tiny_bart(decoder_alone=False):
    parts = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (
        ("layers", 1), ("attention_heads", 4), ("ffn_dim", 48),
    )}  # fmt: skip
    config = transformers.BartConfig(vocab_size=60, d_model=32, is_encoder_decoder=not decoder_alone, **parts)
    config.is_decoder = decoder_alone
    kind = transformers.BartForCausalLM if decoder_alone else transformers.BartForConditionalGeneration
    return randomised(kind(config))


def encoded(side, width=None):
    answers = batch_of(ANSWERS, side, width)
    return {**batch_of(side=side), **{f"decoder_{name}": value for name, value in answers.items()}}


@torch.no_grad()
def hand_made_pairs(model, names):
    """As :func:`hand_made`, of every prompt with its answer, alone."""
    made = {}
    for name in names:
        rows = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, rows=rows: rows.append(args[0].double().reshape(-1, args[0].shape[-1]))
        )
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([answer]))
        handle.remove()
        X = torch.cat([x[1:] for x in rows])
        made[name] = X, X.T @ X, torch.stack([x[0] for x in rows])
    return made


@pytest.mark.parametrize("options", [{}, {"max_memory": "40kB"}], ids=str)
@pytest.mark.parametrize("width", [None, 9], ids=["other lengths", "equal lengths"])
@pytest.mark.parametrize("make, side", [(tiny_t5, "left"), (tiny_t5, "right"), (tiny_bart, "right")])
def test_layers_of_an_encoder_decoder_are_counted_by_the_tokens_that_they_read(make, side, width, options):
    model = make()
    stats = collect(model, [encoded(side, width)], **options)
    made = hand_made_pairs(model, stats.layers)
    check_equal(stats, made)
    crossing = [name for name in stats.layers if "EncDecAttention.k" in name or "encoder_attn.k_proj" in name]
    assert crossing and all(stats.for_layer(n).tokens == sum(map(len, PROMPTS)) - len(PROMPTS) for n in crossing)
    assert {entry.sink_tokens for entry in stats.inputs} == {len(PROMPTS)} and stats.prompts == len(PROMPTS)


def test_what_an_encoder_decoder_makes_up_is_refused():
    for model in (tiny_t5(), tiny_bart()):
        with pytest.raises(ValueError, match=r"batch 0 has no decoder_input_ids: .* is an encoder-decoder model; give"):
            collect(model)
        with pytest.raises(ValueError, match=r"answer_tokens continues prompts, .* is an encoder-decoder model"):
            collect(model, [encoded("right")], answer_tokens=2)


def test_padding_of_the_decoder_alone_is_tried_too():
    sides = {**batch_of(), **{f"decoder_{name}": value for name, value in batch_of(ANSWERS, "left").items()}}
    with pytest.raises(ValueError, match=r"padded on the left and the right is not read as it is alone"):
        collect(tiny_bart(), [sides])


def test_a_decoder_of_speech_is_collected_without_its_encoder():
    parts = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (
        ("layers", 1), ("attention_heads", 4), ("ffn_dim", 48),
    )}  # fmt: skip
    sizes = {"vocab_size": 60, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = randomised(
        transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **parts, **tokens))
    )
    ids = {f"decoder_{name}": value for name, value in batch_of(ANSWERS).items()}
    batches = [{"input_features": torch.randn(len(ANSWERS), 8, 40), **ids}]
    stats = collect(model, batches, target_modules=r".*decoder.*(self_attn\..*|fc\d|encoder_attn\.(q|out)_proj)")
    assert {entry.tokens for entry in stats.inputs} == {sum(map(len, ANSWERS)) - len(ANSWERS)}
    assert stats.prompts == len(ANSWERS) and {entry.sink_tokens for entry in stats.inputs} == {len(ANSWERS)}
    with pytest.raises(ValueError, match=r"encoder_attn\.k_proj: input of shape \(2, 20, 32\) does not match"):
        collect(model, batches, target_modules=["encoder_attn.k_proj"])


class Tower(PlainModel):
    """Reads an image beside the prompt, of as many patches as it is given; or as many latents as learned."""

    def __init__(self, latents=9):
        super().__init__()
        self.tower, self.latents = nn.Linear(10, 10), nn.Parameter(torch.randn(latents, 10))

    def forward(self, input_ids, attention_mask=None, pixel_values=None):
        seen = self.latents.expand(len(input_ids), -1, -1) if pixel_values is None else pixel_values
        return super().forward(input_ids) + self.tower(seen).mean()


def test_the_shape_of_the_mask_alone_does_not_make_tokens():
    why = r"layer tower: input of shape \(2, \d, 10\) does not match the attention mask \(2, \d\): it does not read the"
    pictures = {"pixel_values": torch.randn(5, 9, 10)}
    for extra in ({}, pictures):
        for use in (collect, plan_collection):
            with pytest.raises(ValueError, match=why):
                use(Tower(), [{**batch_of(), **extra}])
    names = ["q", "k", "out"]
    stats = collect(Tower(), [{**batch_of(), **pictures}], target_modules=names)
    check_equal(stats, hand_made(PlainModel(), PROMPTS, names))
    # Seen first in a later batch, of other entries.
    with pytest.raises(ValueError, match=why):
        collect(Tower(latents=4), [batch_of(PROMPTS[:1]), {**batch_of(), **pictures}], target_modules=["q", "tower"])


class Later(PlainModel):
    """Reads another tensor of the shape of the prompts' tokens once token 49 is seen."""

    def __init__(self, follows):
        super().__init__()
        self.late, self.follows, self.latents = nn.Linear(10, 10), follows, nn.Parameter(torch.randn(3, 10))

    def forward(self, input_ids, attention_mask=None):
        y = super().forward(input_ids)
        if (input_ids == 49).any():
            h = self.embed(input_ids)
            y = y + self.late(h if self.follows else self.latents.expand(len(h), -1, -1)).mean()
        return y


def test_a_layer_that_is_reached_late_is_tried_then():
    batches = [batch_of(PROMPTS[:2]), batch_of([[49, 5, 3], [8, 2, 4]])]
    stats = collect(Later(True), batches)
    assert stats.for_layer("late").tokens == 4 and stats.for_layer("late").layers == ["late"]
    with pytest.raises(ValueError, match=r"layer late: input of shape \(2, 3, 10\) does not match .* \(2, 1\)"):
        collect(Later(False), batches)
    with pytest.raises(
        ValueError, match=r"layer late is first reached in batch 1, but not with one token less, so that"
    ):
        collect(Later(True), [batches[0], batch_of([[5, 3, 49], [8, 2, 4]])])


def test_entries_of_no_row_need_one_prompt_a_batch():
    class Flat(Tower):
        def forward(self, input_ids, attention_mask=None, pixel_values=None):
            return super().forward(input_ids, pixel_values=pixel_values.reshape(1, -1, 10))

    patches = {"pixel_values": torch.randn(13, 10)}
    with pytest.raises(ValueError, match=r"pixel_values of shape \(13, 10\) is not divided among 5 prompts; give one"):
        collect(Flat(), [{**batch_of(), **patches}], target_modules=["q"])
    equal = [[5, 9, 3], [5, 2, 6], [8, 3, 9]]
    for batches in ([{**batch_of(equal), **patches}], [{**batch_of([p], "left", 5), **patches} for p in equal]):
        check_equal(collect(Flat(), batches, target_modules=["q"]), hand_made(PlainModel(), equal, ["q"]))


def packed(prompts=PROMPTS, **extra):
    ids = torch.cat([torch.tensor(prompt) for prompt in prompts])[None]
    places = torch.cat([torch.arange(len(prompt)) for prompt in prompts])[None]
    return {"input_ids": ids, "position_ids": places, **extra}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_packed_prompts_are_prompts_of_their_own(make):
    model = make()
    stats = collect(model, [packed()])
    check_equal(stats, hand_made(model, PROMPTS, stats.layers))
    assert stats.prompts == len(PROMPTS) and {entry.sink_tokens for entry in stats.inputs} == {len(PROMPTS)}
    # With a mask the model lets prompts read each other.
    mask = torch.ones(1, sum(map(len, PROMPTS)), dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"a prompt packed with others into a row is not read as it is alone.*row of its"
    ):
        collect(model, [packed(attention_mask=mask)])
    with pytest.raises(ValueError, match="batch 0 has seq_idx, as packed prompts do, but no position_ids; give both"):
        collect(model, [{"input_ids": mask, "seq_idx": mask}])


def test_positions_of_the_caller_are_tried():
    ids = torch.tensor([PROMPTS[0]])
    places = torch.arange(6)[None]
    model = tiny_gpt2()
    stats = collect(model, [{"input_ids": ids, "position_ids": places}])
    check_equal(stats, hand_made(model, [PROMPTS[0]], stats.layers))
    with pytest.raises(
        ValueError, match=r"at the batch's position_ids is not read as it is alone.*leave position_ids to"
    ):
        collect(model, [{"input_ids": ids, "position_ids": places + 3}])
    collect(tiny_llama(), [{"input_ids": ids, "position_ids": places + 3}])  # its positions are relative


def offset_positions(kind):
    """Models whose positions begin behind that of the padding token, 1."""
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
    wide = {"intermediate_size": 48, "max_position_embeddings": 40}
    if kind == "roberta":
        return randomised(transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes, **wide)))
    config = transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32)
    return randomised(transformers.OPTForCausalLM(config))


@pytest.mark.parametrize("kind", ["roberta", "opt"])
def test_positions_that_do_not_begin_at_zero(kind):
    model = offset_positions(kind)
    for batches in (SINGLY, [batch_of()]):
        stats = collect(model, batches)
        check_equal(stats, hand_made(model, PROMPTS, stats.layers))
    left = batch_of(side="left")
    left["input_ids"][left["attention_mask"] == 0] = 1
    check_equal(collect(model, [left]), hand_made(model, PROMPTS, stats.layers))
    if kind == "roberta":  # which counts tokens that are not the padding token
        with pytest.raises(
            ValueError, match=r"padded on the left is not read as it is alone.*; pad on the right, or give"
        ):
            collect(model, [batch_of(side="left")])


def recurrent(kind):
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}
    if kind == "rwkv":
        return transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes, attention_hidden_size=32, rescale_every=0))
    wide = {"intermediate_size": 48, "num_attention_heads": 4, "lru_width": 32, "attention_window_size": 16}
    config = transformers.RecurrentGemmaConfig(**sizes, **wide, use_cache=False)
    return transformers.RecurrentGemmaForCausalLM(config)


@pytest.mark.parametrize("kind", ["rwkv", "recurrent gemma", "bart's decoder"])
def test_models_that_read_padding_on_the_left_are_refused_with_it_alone(kind):
    model, target = (
        (tiny_bart(True), ["self_attn.q_proj", "fc1"]) if "bart" in kind else (recurrent(kind), "all-linear")
    )
    model = randomised(model)
    stats = collect(model, [batch_of()], target_modules=target)
    made = hand_made(model, PROMPTS, stats.layers)
    check_equal(stats, made)
    check_equal(collect(model, SINGLY, target_modules=target), made)
    wanted = (
        r"batch 1: a prompt padded on the left is not read as it is alone, by the relative difference of what reaches"
    )
    wanted += r" layer \S+ \([\d.e+]+\); pad on the right, or give batches of prompts of one length, without padding"
    for options in ({}, {"max_memory": "1MB"}):
        with pytest.raises(ValueError, match=wanted):
            collect(model, [batch_of(PROMPTS[:2]), batch_of(PROMPTS[2:], "left")], target_modules=target, **options)


class Reader(PlainModel):
    """Adds the mean of all places, or of those behind: padded or not."""

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        return self.out(torch.tanh(self.q(h) + self.k(h))) + self.late(h + h.mean(dim=1, keepdim=True))

    def __init__(self):
        super().__init__()
        self.late = nn.Linear(10, 10)


def test_models_that_read_padding_anywhere_are_refused():
    one_length = [batch_of([prompt]) for prompt in PROMPTS]
    stats = collect(Reader(), one_length)
    check_equal(stats, hand_made(Reader(), PROMPTS, stats.layers))
    for side in ("left", "right"):
        with pytest.raises(
            ValueError, match=rf"padded on the {side} is not read .* layer late .*\); give batches of prom"
        ):
            collect(Reader(), [batch_of(side=side)])
    holes = {"input_ids": torch.tensor([[5, 9, 3, 7]]), "attention_mask": torch.tensor([[1, 1, 0, 1]])}
    with pytest.raises(
        ValueError, match=r"a prompt with masked tokens inside is not read as it is alone.*; take them out"
    ):
        collect(Reader(), [holes])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(dtype):
    model = tiny_llama(num_hidden_layers=8, initializer_range=0.1).to(dtype)
    for side in ("left", "right"):
        assert collect(model, [batch_of(side=side)]).inputs[0].tokens == sum(map(len, PROMPTS)) - len(PROMPTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_rounding_that_grows_through_many_blocks_is_no_difference(kind, dtype):
    sizes = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=48))
    else:  # rounding sends tokens to other experts
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_hidden_layers=24))
    ids = torch.randint(3, 60, (2, 24))
    for padding in (slice(0, 8), slice(16, 24)):
        mask = torch.ones_like(ids)
        mask[0, padding] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        stats = collect(model.to(dtype).eval(), [batch], target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        assert stats.inputs[0].tokens == 16 + 24 - 2


@pytest.mark.parametrize("kind", ["rwkv", "recurrent gemma", "bart's decoder", "padding is read"])
def test_what_is_read_otherwise_is_refused_in_16_bits_too(kind):
    model, target = Reader(), "all-linear"
    if kind != "padding is read":
        model = randomised(tiny_bart(True) if "bart" in kind else recurrent(kind))
        target = ["self_attn.q_proj", "fc1"] if "bart" in kind else "all-linear"
    with pytest.raises(ValueError, match="padded on the left is not read as it is alone"):
        collect(model.bfloat16(), [batch_of(side="left")], target_modules=target)


def test_a_default_dtype_of_16_bits_is_no_difference():
    model = tiny_llama(dtype=torch.bfloat16)
    wanted = collect(model, [batch_of(), batch_of(side="left")])
    torch.set_default_dtype(torch.bfloat16)
    try:
        stats = collect(model, [batch_of(), batch_of(side="left")])
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(stats.inputs, wanted.inputs, strict=True):
        assert torch.equal(a.covariance, b.covariance) and torch.equal(a.sinks, b.sinks)


def test_hooks_that_change_a_layer_are_refused_and_others_are_not():
    model, called = tiny_llama(), []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda *_: called.append(1))
    layer.register_forward_pre_hook(lambda *_: called.append(1))
    plain = collect(tiny_llama())
    stats = collect(model)
    assert called and all(
        torch.equal(a.covariance, b.covariance) for a, b in zip(stats.inputs, plain.inputs, strict=True)
    )
    wanted = r"layer model\.layers\.0\.mlp\.up_proj: its output is not x Wᵀ \+ b .* or a hook changes it.*hooks off"
    for add, change in (
        (layer.register_forward_hook, lambda _module, _args, result: result + 0.1),
        (layer.register_forward_pre_hook, lambda _module, args: (args[0] * 1.01,)),
    ):
        handle = add(change)
        with pytest.raises(TypeError, match=wanted):
            collect(model)
        handle.remove()
    collect(model)


def test_latent_attention_and_a_guarded_head():
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(**sizes, **latent, first_k_dense_replace=2, num_key_value_heads=4)
    model = randomised(transformers.DeepseekV3ForCausalLM(config))
    for side in ("left", "right"):
        stats = collect(model, [batch_of(side=side)])
        assert "model.layers.0.self_attn.kv_b_proj" in stats.layers
        check_equal(stats, hand_made(model, PROMPTS, stats.layers))
    model = tiny_llama()
    stats = collect(model, target_modules=["lm_head", "q_proj"])
    check_equal(stats, hand_made(model, PROMPTS, stats.layers))


def test_layers_that_are_never_reached_are_all_named():
    model = PlainModel()
    model.spare = nn.ModuleList([nn.Linear(3, 3) for _ in range(10)])
    with pytest.raises(
        ValueError, match=r"10 layers were never reached by the forward pass: spare\.0, .*spare\.7 and 2 more;"
    ):
        collect(model)


def test_held_out_prompts_are_run_as_they_are_alone(monkeypatch):
    model = offset_positions("opt")
    stats = collect(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats, protect=0.3)))
    passed, forward = [], heldout.Trial.forward

    def watched(self, batch, index, logits=None):
        handle = self.model.register_forward_pre_hook(
            lambda _module, _args, kwargs: passed.append("position_ids" in kwargs), with_kwargs=True
        )
        result = forward(self, batch, index, logits)
        handle.remove()
        return result

    monkeypatch.setattr(heldout.Trial, "forward", watched)
    report = gk.certify(guarded, stats, heldout=[batch_of(side="left")], answer_tokens=3)
    assert report.heldout.kl > 0 and len(passed) == 2
