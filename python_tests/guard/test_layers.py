import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from guard_helpers import PlainModel, collect, plan_for, tiny_gpt2, tiny_llama
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.guard.layers import (
    base_model,
    find_layers,
    is_conv1d,
    linear_weight,
)

LLAMA_LAYERS = [
    f"model.layers.{i}.{part}"
    for i in range(2)
    for part in (
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    )
]


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_is_every_layer_but_the_output_embedding(tied):
    assert list(find_layers(tiny_llama(tied=tied))) == LLAMA_LAYERS


def test_all_linear_finds_conv1d():
    layers = find_layers(tiny_gpt2())
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(layers) == [f"transformer.h.{i}.{part}" for i in range(2) for part in parts]
    assert all(is_conv1d(module) for module in layers.values())
    assert linear_weight(layers["transformer.h.0.attn.c_attn"]).shape == (72, 24)


def test_an_output_embedding_of_another_name_is_left_out():
    model = PlainModel()
    assert list(find_layers(model)) == ["q", "k", "out"]
    model.get_output_embeddings = lambda: model.out
    assert list(find_layers(model)) == ["q", "k"]
    assert list(find_layers(model, ["out"])) == ["out"]  # unless asked for


@pytest.mark.parametrize(
    "target, wanted",
    [
        (["q_proj", "v_proj"], [n for n in LLAMA_LAYERS if n.endswith(("q_proj", "v_proj"))]),
        (["self_attn.o_proj"], [n for n in LLAMA_LAYERS if n.endswith("o_proj")]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["model.layers.0.mlp.up_proj", "q_proj"], [LLAMA_LAYERS[0], LLAMA_LAYERS[5], LLAMA_LAYERS[7]]),
        (r".*layers\.1\..*(q|down)_proj", [LLAMA_LAYERS[7], LLAMA_LAYERS[13]]),
        (["lm_head"], ["lm_head"]),
        (("q_proj",), [LLAMA_LAYERS[0], LLAMA_LAYERS[7]]),
    ],
)
def test_target_modules(target, wanted):
    assert list(find_layers(tiny_llama(), target)) == wanted


@pytest.mark.parametrize("target", [["proj"], "q_proj", [], "model", ["embed_tokens"], ".*layers"])
def test_no_match_says_what_there_is(target):
    with pytest.raises(ValueError, match=r"matches no Linear or Conv1D layer; the model has .*'down_proj'.*'q_proj'"):
        find_layers(tiny_llama(), target)


def test_adapters_and_quantised_weights_are_refused():
    import peft

    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(TypeError, match=r"already carries adapters .*pass the base model"):
            find_layers(model)
    model = PlainModel()
    model.k.weight = nn.Parameter(torch.zeros(8, 10, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"layer k: weight has dtype torch.int8.*without quantisation"):
        find_layers(model)
    assert list(find_layers(model, ["q"])) == ["q"]


def test_base_model():
    import peft

    model = tiny_llama()
    assert base_model(model) is model
    assert base_model(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))) is model


def test_an_entry_that_matches_nothing_is_named():
    with pytest.raises(ValueError, match="'q_porj' matches no Linear or Conv1D layer"):
        find_layers(tiny_llama(), ["k_proj", "q_porj"])


class Scaled(nn.Linear):
    """The weight is codes, the scale is apart."""

    def forward(self, x):
        return super().forward(x) * 0.5


class FakeQuantised(nn.Linear):
    """Rounds the weight to 7 bits at each call: off by 1e-2 only."""

    def forward(self, x):
        step = self.weight.abs().max() / 63
        return F.linear(x, (self.weight / step).round() * step, self.bias)


class Failing(nn.Linear):
    def forward(self, x):
        raise RuntimeError("needs a kernel")


class TwoFactors(nn.Linear):
    """Another way to write the same product."""

    def forward(self, x):
        return (x.flatten(0, 1) @ self.weight.T + self.bias).unflatten(0, x.shape[:2])


class Codes(torch.Tensor):
    """Says float32, as quantised tensors of other libraries do, but holds no such values."""


def with_k(kind, dtype=torch.float32):
    model = PlainModel().to(dtype)
    model.k.__class__ = kind
    model.k.bias = nn.Parameter(torch.ones(8, dtype=dtype))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Scaled, FakeQuantised, Failing])
def test_layers_that_do_not_multiply_by_their_weight_are_refused_by_name(kind, dtype):
    model, clean = with_k(kind, dtype), with_k(nn.Linear, dtype)
    wanted = {Failing: "layer k: Failing has a forward of its own, which fails on rows .*needs a kernel"}.get(
        kind, r"layer k: its output is not x Wᵀ \+ b of its weight \(they differ by .*leave the layer out of target_mod"
    )
    stats = collect(clean)
    plan = plan_for(clean, stats, protect=0.3)
    for use in (collect, lambda model: plan_for(model, stats, protect=0.3), lambda m: gk.attach_guard(m, plan)):
        with pytest.raises(TypeError, match=wanted):
            use(copy.deepcopy(model))
    assert list(find_layers(model, ["q", "out"])) == ["q", "out"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_forward_of_its_own_that_is_the_product_is_accepted(dtype):
    model = with_k(TwoFactors, dtype).train()
    model.q.forward = functools.partial(nn.Linear.forward, model.q)
    assert list(find_layers(model)) == ["q", "k", "out"] and model.k.training and model.q.training
    gpt2 = tiny_gpt2(dtype=dtype)
    layer = gpt2.transformer.h[0].attn.c_attn
    layer.__class__ = type("Named", (type(layer),), {"forward": lambda self, x: x @ self.weight + self.bias})
    assert len(find_layers(gpt2)) == 8
    layer.__class__ = type("Doubled", (type(layer),), {"forward": lambda self, x: 2 * (x @ self.weight + self.bias)})
    with pytest.raises(TypeError, match=r"layer transformer\.h\.0\.attn\.c_attn: its output is not x W"):
        find_layers(gpt2)


def test_weights_that_are_no_matrix_of_the_layer_are_refused_by_name():
    model = PlainModel()
    torch.nn.utils.parametrizations.weight_norm(model.k)
    wanted = r"layer k: it has no parameter weight of its own \(\w*Linear: parametrised, or packed\)"
    with pytest.raises(TypeError, match=wanted):
        collect(model)
    model = PlainModel()
    del model.k.weight
    with pytest.raises(TypeError, match=wanted):
        collect(model)
    model = PlainModel()
    model.k.weight = nn.Parameter(torch.zeros(8, 10).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"layer k: weight has dtype torch\.float8_e4m3fn and shape \(8, 10\); only"):
        collect(model)
    model = PlainModel()
    model.k.weight = nn.Parameter(torch.zeros(8, 10).as_subclass(Codes))
    with pytest.raises(
        TypeError, match=r"layer k: weight is a Codes and has dtype torch\.float32 .*without quantisation"
    ):
        collect(model)


@pytest.mark.parametrize("labels", [1, 3])
def test_all_linear_leaves_heads_out(labels):
    config = tiny_llama().config
    config.num_labels = labels
    assert list(find_layers(transformers.LlamaForSequenceClassification(config))) == LLAMA_LAYERS

    class Valued(nn.Module):
        """As a model with a value head around it."""

        def __init__(self):
            super().__init__()
            self.inner, self.v_head = PlainModel(), nn.Linear(10, labels)

    names = ["inner.q", "inner.k", "inner.out"]
    assert list(find_layers(Valued())) == names + ["v_head"] * (labels > 1)
    assert list(find_layers(Valued(), ["v_head"])) == ["v_head"]


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_layers_whose_weight_a_kernel_reads_are_left_out(kind):
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "expand": 2}
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if kind == "Mamba2" else {}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    assert list(find_layers(model)) == ["backbone.layers.0.mixer.in_proj"]
    wanted = rf"layer backbone\.layers\.0\.mixer\.out_proj: {kind}Mixer reads its weight without calling it"
    with pytest.raises(TypeError, match=wanted):
        find_layers(model, ["out_proj"])
    with pytest.raises(TypeError, match=r"layer out_proj: MultiheadAttention reads its weight without calling it"):
        find_layers(nn.MultiheadAttention(8, 2), ["out_proj"])
