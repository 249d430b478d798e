import copy
import dataclasses
import json
import math
import os

import peft
import pytest
import torch
from guard_helpers import (
    MODELS,
    PROMPTS,
    PlainModel,
    batch_of,
    collect,
    dense_projector,
    hand_made,
    perturb,
    plan_for,
    tiny_llama,
    weight_of,
)
from safetensors.torch import load_file
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.guard.export import ExportReport
from guardspace_kernels.nn import ProjectedLoraLinear


def output(model, batch=None):
    """Logits at the real tokens (or the plain model's output)."""
    batch = batch or batch_of()
    with torch.no_grad():
        out = model.eval()(**batch)
    return getattr(out, "logits", out)[batch["attention_mask"].bool()]


def plainly_loaded(model, path):
    return peft.PeftModel.from_pretrained(model, path)


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("config", [{}, {"alpha": 1.5}, {"init": "zero", "alpha": 9.0}, {"init": "paper"}])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "plain"])
def test_plain_peft_loads_it_and_gives_our_outputs(kind, config, residual, tmp_path):
    base = MODELS[kind]()
    plan = plan_for(base, **config)
    guarded = perturb(gk.attach_guard(copy.deepcopy(base), plan, residual=residual))
    report = gk.export_lora(guarded, tmp_path / "adapter")
    rank = 3 if config.get("init") == "zero" else 6
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (report.rank, report.dtype) == (rank, "float32") and report.drift == {}
    assert report.path == str(tmp_path / "adapter") and max(report.leak.values()) < 1e-6
    untouched, ours = output(base), output(guarded)
    loaded = plainly_loaded(base, tmp_path / "adapter")
    assert type(loaded) is (peft.PeftModel if kind == "plain" else peft.PeftModelForCausalLM)
    assert float((ours - untouched).abs().max()) > 1e-2
    torch.testing.assert_close(output(loaded), ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(loaded.merge_and_unload()), ours, rtol=1e-4, atol=1e-4)


def test_the_files_hold_a_plain_lora_and_nothing_else(tmp_path):
    base = tiny_llama()
    guarded = perturb(gk.attach_guard(copy.deepcopy(base), plan_for(base)))
    gk.export_lora(guarded, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["bias"]) == (6, 6, False, "none")
    assert (config["task_type"], config["peft_type"], config["inference_mode"]) == ("CAUSAL_LM", "LORA", True)
    assert "guard" not in json.dumps(config).lower()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = [name for name, m in base.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    assert set(tensors) == {f"base_model.model.{n}.lora_{x}.weight" for n in names for x in "AB"}
    delta = copy.deepcopy(guarded).double().merge_and_unload()
    for name in names:
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        torch.testing.assert_close(B @ A, weight_of(delta, name) - weight_of(base, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "target, wanted",
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*layers\.1\..*[qv]_proj", {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}),
    ],
)
def test_target_modules_are_short_where_that_is_exact(target, wanted, tmp_path):
    base = tiny_llama()
    stats = collect(base, target_modules=target)
    guarded = perturb(gk.attach_guard(copy.deepcopy(base), plan_for(base, stats)))
    gk.export_lora(guarded, tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == wanted
    loaded = plainly_loaded(base, tmp_path)
    adapted = [n.removeprefix("base_model.model.") for n, m in loaded.named_modules() if hasattr(m, "lora_A")]
    assert adapted == stats.layers
    torch.testing.assert_close(output(loaded), output(guarded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, coarse", [(torch.bfloat16, 1e-3), (torch.float16, 1e-4), (torch.float32, 1e-8)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_rounding_costs_is_measured_from_what_the_file_holds(kind, dtype, coarse, tmp_path):
    base = MODELS[kind]()
    stats = collect(base)
    plan = plan_for(base, stats, protect=0.95)
    guarded = perturb(gk.attach_guard(copy.deepcopy(base), plan))
    report = gk.export_lora(guarded, tmp_path, dtype=dtype, stats=stats)
    assert report.dtype == str(dtype).removeprefix("torch.")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    made = hand_made(base, PROMPTS, stats.layers)
    assert set(report.leak) == set(report.drift) == set(stats.layers)
    for name in stats.layers:
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert A.dtype == B.dtype == dtype
        dW = B.double() @ A.double()
        space, X = plan.space_of(name), made[name][0]
        outside = dW - dW @ dense_projector(space.basis, space.complement)
        assert report.leak[name] == pytest.approx(float(outside.norm() / dW.norm()), rel=1e-2, abs=2e-7)
        drift = float((X @ dW.T).norm() / (X @ weight_of(base, name).T).norm())
        assert report.drift[name] == pytest.approx(drift, rel=1e-4)
    assert coarse / 10 < max(report.leak.values()) < 30 * coarse
    assert f"rank-6 LoRA in {report.dtype}" in str(report) and f"{max(report.drift.values()):.1e}" in str(report)
    report.save(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["leak"] == report.leak and read["drift"] == report.drift and read["rank"] == 6


def test_without_a_projector_there_is_no_leak_to_speak_of(tmp_path):
    base = tiny_llama()
    guarded = perturb(gk.attach_guard(base, plan_for(base, projector=False)))
    assert set(gk.export_lora(guarded, tmp_path, dtype=torch.bfloat16).leak.values()) == {0.0}


@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])
def test_modules_without_peft_are_exported(ranks, tmp_path):
    """Layers of other ranks (with and without a virtual residual) become one LoRA of the largest."""
    base = PlainModel()
    plan = plan_for(base, rank=2)
    ours = copy.deepcopy(base)
    for name, rank, init in (("q", ranks[0], plan.layers["q"]), ("out", ranks[1], None)):
        space = plan.space_of(name)
        layer = ProjectedLoraLinear.from_linear(
            ours.get_submodule(name),
            rank,
            space.basis,
            complement=space.complement,
            alpha=5.0,
            init=(init.A0, init.B0) if init else None,
        )
        setattr(ours, name, layer)
    perturb(ours, size=1.0)
    with pytest.raises(ValueError, match=r"trainable beside the adapter: embed\.weight, k\.weight\. .*Freeze them"):
        gk.export_lora(ours, tmp_path)
    ours.embed.requires_grad_(False)
    ours.k.requires_grad_(False)
    report = gk.export_lora(ours, tmp_path)
    assert report.rank == 4 and set(report.leak) == {"q", "out"} and max(report.leak.values()) < 1e-6
    untouched = output(base)
    loaded = plainly_loaded(base, tmp_path)
    assert float((output(loaded) - untouched).abs().max()) > 1e-2
    torch.testing.assert_close(output(loaded), output(ours), rtol=1e-4, atol=1e-5)


def test_layers_that_have_not_moved_leak_nothing(tmp_path):
    for kind in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            base = MODELS[kind]()
            guarded = gk.attach_guard(base, plan_for(base))
            guarded = guarded.to(dtype) if dtype != torch.float32 else guarded
            leak = gk.export_lora(guarded, tmp_path, dtype=torch.bfloat16).leak
            assert set(leak.values()) == {0.0}
    layer = next(iter(guarded.guarded_layers().values()))
    with torch.no_grad():
        layer.B.add_(layer.B.abs().mean() * 0.1)
    leak = gk.export_lora(guarded, tmp_path, dtype=torch.bfloat16).leak
    assert sum(value > 0 for value in leak.values()) == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.bool, torch.complex64, "bfloat16"], ids=str)
def test_other_dtypes_are_refused_before_anything_is_written(dtype, tmp_path):
    base = PlainModel()
    guarded = gk.attach_guard(base, plan_for(base))
    error, message = TypeError, "dtype must be a floating-point torch.dtype or None, got"
    if dtype is torch.float8_e4m3fn:
        error, message = ValueError, "dtype must be torch.float32, float16, bfloat16 or float64, got torch.float8"
    with pytest.raises(error, match=message):
        gk.export_lora(guarded, tmp_path / "adapter", dtype=dtype)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "rank, remark",
    [(8, ""), (16, ""), (20, "vLLM needs --max-lora-rank 32"), (256, "vLLM needs --max-lora-rank 256"),
     (514, "servers refuse rank 514 (vLLM takes at most 512): merge the adapter, or plan with a lower rank")],
)  # fmt: skip
def test_the_report_says_what_a_server_must_be_told(rank, remark):
    report = ExportReport("adapter", "float32", rank, {"q": 0.0}, {})
    assert str(report) == f"rank-{rank} LoRA in float32 at adapter: worst leak 0.0e+00" + (f"; {remark}" * bool(remark))


def test_a_plan_of_a_rank_that_servers_refuse_says_so(monkeypatch):
    base = PlainModel()
    plan = plan_for(base, rank=3)
    assert "exported" not in plan.summary()
    plan.config = dataclasses.replace(plan.config, rank=257)
    assert "exported as rank 514: servers refuse rank 514" in plan.summary()
    plan.config = dataclasses.replace(plan.config, rank=16, init="zero")
    assert "exported" not in plan.summary()


def test_what_cannot_be_exported_leaves_nothing_behind(tmp_path):
    base = tiny_llama()
    stats = collect(base)
    guarded = perturb(gk.attach_guard(copy.deepcopy(base), plan_for(base, stats)))
    path = tmp_path / "adapter"
    with pytest.raises(ValueError, match="LlamaForCausalLM has no guarded layer; nothing to export"):
        gk.export_lora(base, path)
    other = tiny_llama(seed=1)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj: its base weight is not the one"):
        gk.export_lora(guarded, path, stats=collect(other))
    guarded.merge_adapter()
    with pytest.raises(ValueError, match="its adapter is merged; certify and export before merging, or unmerge first"):
        gk.export_lora(guarded, path)
    guarded.unmerge_adapter()
    layer = guarded.guarded_layers()["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.B[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj: the adapter overflows torch\.float16"):
        gk.export_lora(guarded, path, dtype=torch.float16)
    with torch.no_grad():
        layer.B[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj: the adapter holds non-finite values"):
        gk.export_lora(guarded, path)
    assert not path.exists()


def test_export_changes_nothing_and_replaces_an_older_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny_llama()
    guarded = perturb(gk.attach_guard(base, plan_for(base)))
    state = copy.deepcopy(guarded.state_dict())
    gk.export_lora(guarded, "adapter")
    first = load_file("adapter/adapter_model.safetensors")
    assert all(torch.equal(t, state[name]) for name, t in guarded.state_dict().items())
    gk.export_lora(perturb(guarded, seed=2), "adapter")
    second = load_file("adapter/adapter_model.safetensors")
    assert any(not torch.equal(second[name], t) for name, t in first.items())
    assert sorted(os.listdir("adapter")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_exported_adapters_certify_like_the_guarded_model(tmp_path):
    base = tiny_llama()
    stats = collect(base)
    guarded = perturb(gk.attach_guard(copy.deepcopy(base), plan_for(base, stats)))
    gk.export_lora(guarded, tmp_path)
    ours, theirs = gk.certify(guarded, stats), gk.certify(plainly_loaded(base, tmp_path), stats)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert math.isclose(a.drift, b.drift, rel_tol=1e-4)


class Blocks(nn.Module):
    """Numbered blocks that are containers, with names that end each other's."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(60, 8)
        if kind == "sequential":  # layers are called 0 and 2, and so is a block
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
        elif kind == "ctrl":  # h.0.ffn.0 is a layer, h.0 a block
            self.h = nn.ModuleList(nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(8, 8))}) for _ in range(2))
        elif kind == "full name ends another":
            self.dense = nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"dense": nn.ModuleDict({"dense": nn.Linear(8, 8)})})
        else:
            self.mlp, self.other = nn.Linear(8, 8), nn.ModuleDict({"mlp": nn.ModuleDict({"fc": nn.Linear(8, 8)})})
        self.order = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        for name in self.order:
            h = h + self.get_submodule(name)(h).tanh()
        return h


@pytest.mark.parametrize(
    "kind, target, wanted",
    [
        ("sequential", "all-linear", {f"blocks.{i}.{j}" for i in range(3) for j in (0, 2)}),
        ("sequential", ["blocks.1.0"], {"blocks.1.0"}),
        ("ctrl", "all-linear", {"h.0.ffn.0", "h.1.ffn.0"}),
        ("full name ends another", ["inner.dense.dense"], {"inner.dense.dense"}),
        ("full name ends another", r"dense", "dense"),
        ("container of the same name", r"mlp", "mlp"),
        ("container of the same name", ["fc"], {"fc"}),
    ],
)
def test_target_modules_catch_no_container(kind, target, wanted, tmp_path):
    base = Blocks(kind)
    batches = [batch_of()]
    stats = gk.collect_statistics(base, batches, target_modules=target, progress=False)
    guarded = perturb(gk.attach_guard(copy.deepcopy(base), plan_for(base, stats, rank=2, protect=0.5)))
    assert list(guarded.guarded_layers()) == stats.layers
    gk.export_lora(guarded, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert (saved if isinstance(saved, str) else set(saved)) == wanted
    untouched = output(base)
    loaded = plainly_loaded(base, tmp_path)
    assert [n for n, m in loaded.get_base_model().named_modules() if hasattr(m, "lora_A")] == stats.layers
    torch.testing.assert_close(output(loaded), output(guarded), rtol=1e-4, atol=1e-4)
    assert float((output(loaded) - untouched).abs().max()) > 1e-3
