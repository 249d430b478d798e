import pytest
import torch
from guard_helpers import PlainModel, tiny_gpt2, tiny_llama
from torch import nn

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
