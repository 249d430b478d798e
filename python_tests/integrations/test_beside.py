"""What is trained beside the adapter: saved as PEFT saves it, or refused before the run."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import guardspace_kernels as gk

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(torch|peft|transformers)")


def unfreeze(model, *names):
    for name, p in model.named_parameters():
        if name.removeprefix("base_model.model.").replace(".base_layer", "") in names:
            p.requires_grad_(True)
    return model


def uses(tiny, model, folder):
    return [
        lambda: model(**tiny.batch()),
        lambda: gk.GuardedAdamW(model),
        lambda: gk.guard_optimizer(tiny.adamw(tiny.trainable(model)), model),
        lambda: model.save_pretrained(folder),
        lambda: gk.export_lora(model, folder),
        lambda: gk.export_lora(nn.ModuleList([model]), folder),
    ]


LOST = {
    "norm": (["model.norm.weight"], r"trainable beside the adapter: model\.norm\.weight\. "),
    "norms": (
        ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"],
        r"trainable beside the adapter: model\.embed_tokens\.weight, model\.layers\.0\.input_layernorm\.weight, "
        r"model\.norm\.weight and 1 more\. .*modules_to_save=\[",
    ),
    "base weight": (
        ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"],
        r"layer model\.layers\.1\.mlp\.up_proj: its base weight is trainable, .*freeze it with requires_grad_\(False\)",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_what_saving_would_lose_is_refused_before_the_first_step(tiny, case, tmp_path):
    names, message = LOST[case]
    model = unfreeze(tiny.guarded(), *names)
    for use in uses(tiny, model, tmp_path):
        with pytest.raises(ValueError, match=message):
            use()
    assert not list(tmp_path.iterdir())
    assert not any(layer.step_mode for layer in model.guarded_layers().values())
    tiny.logits(model)  # without gradients nothing is trained
    model.requires_grad_(False)
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind, layer", [("gpt2", "transformer.h.0.attn.c_attn"), ("plain", "up")])
def test_the_bias_of_a_guarded_layer_stays_frozen(tiny, kind, layer, tmp_path):
    model = unfreeze(tiny.guarded(kind), f"{layer}.bias")
    with pytest.raises(ValueError, match=rf"layer {layer}: its base bias is trainable"):
        model(**tiny.batch(kind))
    with pytest.raises(ValueError, match=rf"layer {layer}: its base bias is trainable"):
        gk.export_lora(model, tmp_path)


def test_what_is_unfrozen_later_is_seen_when_training_begins_again(tiny):
    model = tiny.guarded()
    tiny.train(model, steps=1)
    unfreeze(model, "model.norm.weight")
    model.eval()
    model.train()
    with pytest.raises(ValueError, match=r"trainable beside the adapter: model\.norm\.weight"):
        model(**tiny.batch())
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="trainable beside"):
        twin(**tiny.batch())


def test_a_head_outside_of_the_guarded_model_is_named(tiny, tmp_path):
    class WithValueHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy, self.value = tiny.guarded(), nn.Linear(16, 1)

    model = WithValueHead()
    gk.GuardedAdamW(model)
    with pytest.raises(ValueError, match=r"beside the adapter: value\.weight, value\.bias\. .*give that alone"):
        gk.export_lora(model, tmp_path)
    gk.export_lora(model.policy, tmp_path)


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
def test_what_was_trained_and_frozen_again_is_named(tiny, residual, tmp_path):
    model = tiny.guarded(residual=residual)
    tiny.train(model)
    base = model.get_base_model()
    with torch.no_grad():
        base.model.norm.weight[3] += 1e-3
        base.model.layers[0].mlp.up_proj.get_base_layer().weight[0, 0] += 1e-3
        base.lm_head.weight.mul_(1.01)
    named = r"model\.layers\.0\.mlp\.up_proj\.weight, model\.norm\.weight, lm_head\.weight\. "
    if residual == "frozen":  # that weight is W_res
        named = named.replace(r"model\.layers\.0\.mlp\.up_proj\.weight, ", "")
    for use in (lambda: model.save_pretrained(tmp_path), lambda: gk.export_lora(model, tmp_path)):
        with pytest.raises(ValueError, match=f"changed since attach_guard: {named}"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
def test_a_model_that_is_only_cast_is_saved(tiny, residual, tmp_path):
    model = tiny.guarded(residual=residual).bfloat16()
    tiny.train(model)
    model.save_pretrained(tmp_path)
    model.float()  # the weights stay rounded
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.get_base_model().model.norm.weight[3] += 1e-3
    with pytest.raises(ValueError, match=r"changed since attach_guard: model\.norm\.weight\. "):
        model.save_pretrained(tmp_path)


def test_running_statistics_are_saved_or_refused(tmp_path):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc, self.bn = nn.Embedding(60, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, input_ids):
            return self.bn(self.fc(self.embed(input_ids)).transpose(1, 2))

    ids = torch.randint(60, (4, 5))
    stats = gk.collect_statistics(Normed().eval(), [{"input_ids": ids}], progress=False)
    plan = gk.plan_guard(
        Normed().eval(), stats, gk.GuardConfig(rank=2, protect=0.5), progress=False, allow_few_prompts=True
    )
    model = gk.attach_guard(Normed(), plan)
    with pytest.raises(ValueError, match=r"running statistics change in training: \S*bn\. .*put these modules into"):
        model(ids)
    model.eval()(ids)
    model.save_pretrained(tmp_path)
    model = gk.attach_guard(Normed(), plan, modules_to_save=["bn"]).train()
    model(ids).square().sum().backward()
    model.eval().save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(Normed(), str(tmp_path)).eval()
    torch.testing.assert_close(plain(ids), model(ids))
    fresh = gk.attach_guard(Normed(), plan, modules_to_save=["bn"]).eval()
    fresh.load_adapter(tmp_path)
    assert torch.equal(fresh(ids), model(ids))


# ---- saved as PEFT saves it


@pytest.mark.parametrize("name", ["lm_head", "model.norm", "embed_tokens"])
def test_modules_to_save_are_trained_saved_and_resumed(tiny, name, tmp_path):
    model = gk.attach_guard(tiny.base(), tiny.plan(), modules_to_save=[name])
    copied = [p for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save.default" in n]
    assert len(copied) == 1
    before = copied[0].detach().clone()
    tiny.train(model.train(), gk.GuardedAdamW(model, lr=1e-2))
    assert not torch.equal(copied[0], before)
    assert tiny.drift(model)[0] < 1e-6
    model.save_pretrained(tmp_path)
    trained = tiny.logits(model.eval())
    plain = peft.PeftModel.from_pretrained(tiny.base(), str(tmp_path)).eval()
    assert (tiny.logits(plain) - trained).abs().max() < 1e-5 * trained.abs().max()
    fresh = gk.attach_guard(tiny.base(), tiny.plan(), modules_to_save=[name]).eval()
    assert (tiny.logits(fresh) - trained).abs().max() > 1e-2
    fresh.load_adapter(tmp_path)
    assert torch.equal(tiny.logits(fresh), trained)
    bare = tiny.guarded()
    with pytest.raises(
        ValueError, match=rf"holds \S*{name}\.weight, which this model's plan has not\. .*same modules_to"
    ):
        bare.load_adapter(tmp_path)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=rf"was saved without \S*{name}\.weight, which this model trains"):
        fresh.load_adapter(tmp_path / "bare")
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.base()))


@pytest.mark.parametrize("names", [["mlp"], ["lm_head", "model.layers.0.self_attn.q_proj"], ["layers"], ["proj"]])
def test_modules_to_save_leave_guarded_layers_out(tiny, names):
    base = tiny.base()
    with pytest.raises(ValueError, match=r"layer model\.layers\.\S+ is guarded, and modules_to_save includes it by '"):
        gk.attach_guard(base, tiny.plan(), modules_to_save=names)
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_are_saved_whole(tiny, tied, tmp_path):
    def resized(model):
        torch.manual_seed(4)
        model.resize_token_embeddings(70, mean_resizing=False)
        return model

    def base():
        model = tiny.base()
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        return model

    plan = tiny.plan()
    if tied:
        stats = gk.collect_statistics(base(), [{"input_ids": tiny.batch()["input_ids"][:, :4]}], progress=False)
        plan = gk.plan_guard(base(), stats, plan.config, progress=False, allow_few_prompts=True)
    model = resized(gk.attach_guard(base(), plan)).eval()
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.weight.requires_grad_(True)
    tiny.train(model)
    ids = torch.tensor([[3, 66, 9, 69]])
    trained = model(ids).logits.detach()
    model.save_pretrained(tmp_path / "saved")
    gk.export_lora(model, tmp_path / "exported", dtype=torch.float32)
    keys = set(load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} < keys
    for folder in ("saved", "exported"):
        plain = peft.PeftModel.from_pretrained(resized(base()), str(tmp_path / folder)).eval()
        assert (plain(ids).logits - trained).abs().max() < 1e-5 * trained.abs().max()
    fresh = gk.attach_guard(base(), plan).eval()
    with pytest.raises(ValueError, match=r"holds lm_head\.weight, .*resize the embeddings first"):
        fresh.load_adapter(tmp_path / "saved")
    resized(fresh).load_adapter(tmp_path / "saved")
    assert torch.equal(fresh(ids).logits, trained)


def test_the_head_of_a_classifier_is_trained_and_saved(tiny, tmp_path):
    kind = "classifier"
    base = tiny.base(kind)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.score.weight.normal_()  # as a head that is fresh, and that nobody saved
    stats = gk.collect_statistics(base, [{"input_ids": tiny.batch(kind, 7)["input_ids"][:, :4]}], progress=False)
    plan = gk.plan_guard(base, stats, tiny.plan(kind).config, progress=False, allow_few_prompts=True)
    model = gk.attach_guard(base, plan)
    tiny.train(model, kind=kind)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter")).eval()
    expected = tiny.logits(model.eval(), kind)
    assert (tiny.logits(loaded, kind) - expected).abs().max() < 1e-5 * expected.abs().max()
