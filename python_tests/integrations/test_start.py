"""A guarded adapter that starts from one that was trained without a guard."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import guardspace_kernels as gk

KINDS = ["llama", "gpt2", "classifier"]


def plain(tiny, kind="llama", seed=1, **config):
    """A plain LoRA with a change in every layer of the plan, none of it confined."""
    base = tiny.base(kind)
    layers = [*tiny.plan(kind).layers]
    task = "SEQ_CLS" if kind == "classifier" else None
    config = {"r": 2, "lora_alpha": 5, "target_modules": layers, "task_type": task, **config}
    if kind != "llama":
        config["fan_in_fan_out"] = True
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def dense(basis, complement):
    onto = basis.double() @ basis.double().T
    return torch.eye(len(basis), dtype=torch.float64) - onto if complement else onto


def wanted(model, plan):
    """Layer -> s B A P in float64, by the plain model's own scaling and the plan's dense projector."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            space = plan.space_of(name)
            BA = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            found[name] = layer.scaling["default"] * BA @ dense(space.basis, space.complement)
    return {name: change.detach() for name, change in found.items()}


def close(tiny, model, changes, tolerance=2e-6):
    for name, layer in model.guarded_layers().items():
        assert (tiny.delta(layer) - changes[name]).norm() <= tolerance * changes[name].norm(), name


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}, {"lora_alpha": 3}])
@pytest.mark.parametrize("source", ["folder", "model"])
def test_it_starts_with_what_lies_in_the_null_space(tiny, tmp_path, source, config, residual):
    start, plan = plain(tiny, **config), tiny.plan()
    changes = wanted(start, plan)
    start.save_pretrained(tmp_path)
    base = tiny.base()
    model = gk.attach_guard(base, plan, start=tmp_path if source == "folder" else start, residual=residual).eval()
    close(tiny, model, changes)
    assert tiny.drift(model)[0] < 1e-6
    for layer in model.guarded_layers().values():
        assert layer.scale == plan.config.scale and layer.leak() < 1e-6 and layer.frozen_A is None
    report = gk.certify(model, tiny.statistics())
    assert all(row.drift <= row.bound for row in report.layers) and report.max_drift > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_saves_loads_exports_and_merges_as_any_other(tiny, tmp_path, kind):
    start, plan = plain(tiny, kind), tiny.plan(kind)
    save = {"modules_to_save": ["score"]} if kind == "classifier" else {}
    start.save_pretrained(tmp_path / "plain")
    model = gk.attach_guard(tiny.base(kind), plan, start=tmp_path / "plain", **save)
    close(tiny, model, wanted(start, plan))
    begun = tiny.logits(model, kind)
    tiny.train(model, kind=kind)
    model.eval()
    protected, free = tiny.drift(model)
    assert protected < 1e-6 < 1e-3 < free
    trained = tiny.logits(model, kind)
    assert (trained - begun).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "guarded")
    exported = gk.export_lora(model, tmp_path / "exported", stats=tiny.statistics(kind))
    assert exported.rank == 2 and max(exported.leak.values()) < 1e-6
    for folder in ("guarded", "exported"):
        loaded = peft.PeftModel.from_pretrained(tiny.base(kind), str(tmp_path / folder)).eval()
        assert (tiny.logits(loaded, kind) - trained).abs().max() < 1e-5
        if not save:
            report = gk.certify(loaded, tiny.statistics(kind), plan=plan)
            assert report.max_drift == pytest.approx(gk.certify(model, tiny.statistics(kind)).max_drift, rel=1e-4)
    # Its own folder is a start too: from there on the exact factors load.
    for other in (start, tmp_path / "plain", tmp_path / "guarded"):
        again = gk.attach_guard(tiny.base(kind), plan, start=other, **save)
        again.load_adapter(tmp_path / "guarded")
        assert torch.equal(tiny.logits(again, kind), trained)
    state = model.state_dict()
    again.load_state_dict(state)
    assert (tiny.logits(again, kind) - trained).abs().max() < 1e-5
    assert (tiny.logits(model.merge_and_unload(), kind) - trained).abs().max() < 1e-4


def test_step_mode_trains_it_alike(tiny, tmp_path):
    runs = []
    for step_mode in (False, True):
        model = gk.attach_guard(tiny.base(), tiny.plan(), start=plain(tiny))
        optimizer = tiny.adamw(tiny.trainable(model))
        if step_mode:
            gk.guard_optimizer(optimizer, model)
        runs.append((tiny.train(model, optimizer), tiny.logits(model.eval())))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    assert (runs[0][1] - runs[1][1]).abs().max() < 1e-3


def test_what_was_saved_with_a_start_is_not_loaded_without_one(tiny, tmp_path):
    """The same A and B would be another change there."""
    begun, other = gk.attach_guard(tiny.base(), tiny.plan(), start=plain(tiny)), tiny.guarded()
    begun.save_pretrained(tmp_path / "begun")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"begun was saved by a model that was attached from a start.*start=FOLDER"):
        other.load_adapter(tmp_path / "begun")
    with pytest.raises(ValueError, match=r"other was saved by a model that was attached without start; attach"):
        begun.load_adapter(tmp_path / "other")
    third = gk.attach_guard(tiny.base(), tiny.plan(protect=0.8), start=plain(tiny))
    with pytest.raises(ValueError, match="saved under another plan"):
        third.load_adapter(tmp_path / "begun")


def _drop(folder, name):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: t for k, t in weights.items() if name not in k}, folder / "adapter_model.safetensors")


def _change(name, value):
    def change(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, name: value}))

    return change


def _nan(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")


def _renamed(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k.replace("q_proj", "qkv"): t for k, t in weights.items()}, folder / "adapter_model.safetensors")


REFUSED = {
    "another rank": ({"r": 3}, None, r"^start has rank 3 in layer \S+, the plan 2; plan with GuardConfig\(rank=3\)"),
    "some ranks": ({"rank_pattern": {"q_proj": 1}}, None, r"^start has rank 1 in layer \S+q_proj, the plan 2"),
    "fewer layers": (
        {"target_modules": ["q_proj", "v_proj"]},
        None,
        r"^start adapts 4 layers, the plan is of 14: \S+k_proj is not in start; plan .*target_modules=\['q_proj', 'v_p",
    ),
    "more layers": (
        {"target_modules": ["lm_head", "q_proj"]}, None, r"^start adapts 3 layers.*lm_head is not in the plan; plan for"
    ),
    "DoRA": ({"use_dora": True}, None, r"^start was trained with use_dora=True: its change .*Train a plain LoRA, or"),
    "biases": ({"bias": "all"}, None, r"^start was trained with bias='all'"),
    "PiSSA": ({"init_lora_weights": "pissa"}, None, r"^start was trained with init_lora_weights='pissa', which moved"),
    "another head": ({"modules_to_save": ["lm_head"]}, None, r"^start holds lm_head\.weight, which this model's plan"),
    "another base": ({}, _renamed, r"^start adapts layer \S+qkv, which the model does not have; it is of another base"),
    "half a layer": ({}, lambda folder: _drop(folder, "0.mlp.up_proj.lora_B"), r"^start: .*lacks a factor of layer"),
    "a lost layer": ({}, lambda folder: _drop(folder, "0.mlp.up_proj"), r"up_proj is not in start; plan for"),
    "another file": ({}, _change("r", 4), r"^start: .* gives layer \S+ rank 4, its factors have 2; save it again"),
    "another kind": ({}, _change("peft_type", "IA3"), r"^start: .* is of peft_type 'IA3'; a LoRA is needed"),
    "a later field": ({}, _change("use_new_thing", True), r"^start: .* has the field 'use_new_thing'"),
    "diverged": ({}, _nan, r"^start: .*: the adapter holds non-finite values; its training diverged"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_start(tiny, tmp_path, case):
    config, spoil, message = REFUSED[case]
    start, base = plain(tiny, **config), tiny.base()
    start.save_pretrained(tmp_path)
    if spoil:
        spoil(tmp_path)
    modules = [type(module) for module in base.modules()]
    expected = {name: t.clone() for name, t in base.state_dict().items()}
    sources = [tmp_path] if spoil else [tmp_path, start]
    for source in sources:
        with pytest.raises(ValueError, match=message):
            gk.attach_guard(base, tiny.plan(), start=source)
        assert [type(module) for module in base.modules()] == modules
        assert all(torch.equal(t, expected[name]) for name, t in base.state_dict().items())
    gk.attach_guard(base, tiny.plan())


def test_an_adapter_of_other_widths(tiny, tmp_path):
    start = plain(tiny)
    start.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights = {k: t[:, :12].contiguous() if "lora_A" in k else t for k, t in weights.items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"^start changes layer \S+ by a matrix .*: the adapter is of another base model"
    ):
        gk.attach_guard(tiny.base(), tiny.plan(), start=tmp_path)


def test_the_model_that_carries_it_is_no_base_model(tiny):
    start = plain(tiny)
    with pytest.raises(TypeError, match="model already carries adapters"):
        gk.attach_guard(start.get_base_model(), tiny.plan(), start=start)
    ia3 = peft.get_peft_model(tiny.base(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"start is of peft_type \S*IA3; a LoRA is needed"):
        gk.attach_guard(tiny.base(), tiny.plan(), start=ia3)
