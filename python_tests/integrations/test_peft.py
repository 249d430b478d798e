"""attach_guard: a PeftModel like any other, confined to the null space, whatever is done to it."""

from __future__ import annotations

import copy
import io
import shutil

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import guardspace_kernels as gk
import guardspace_kernels.integrations.peft as peft_module
from guardspace_kernels.guard.files import load_tensors, save_tensors
from guardspace_kernels.integrations.peft_layer import GuardedLinear

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(torch|peft|transformers)")

ADAPTER, GUARD = "adapter_model.safetensors", "guardspace.safetensors"
KINDS = ["llama", "gpt2", "plain", "classifier"]


def close(a, b, tolerance=2e-6):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def factors(model):
    return {n: (m.A.detach().clone(), m.B.detach().clone()) for n, m in model.guarded_layers().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))


@pytest.fixture(scope="module")
def trained(tiny):
    """A guarded model after a few steps; not to be changed."""
    model = tiny.guarded()
    tiny.train(model)
    return model


@pytest.fixture
def saved(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    return tmp_path


# ---- attaching


@pytest.mark.parametrize("kind", KINDS)
def test_is_a_peft_model_that_trains_lora_A_and_lora_B_alone(tiny, kind):
    model = tiny.guarded(kind)
    assert isinstance(model, PeftModel)
    task = {"plain": None, "classifier": "SEQ_CLS"}.get(kind, "CAUSAL_LM")
    assert type(model).__bases__[1] is (peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] if task else PeftModel)
    layers = list(tiny.plan(kind).layers)
    expected = {f"base_model.model.{n}.{f}.default.weight" for n in layers for f in ("lora_A", "lora_B")}
    head = {"base_model.model.score.modules_to_save.default.weight"} if kind == "classifier" else set()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected | head
    trainable, total = model.get_nb_trainable_parameters()
    trainable -= sum(model.get_parameter(name).numel() for name in head)
    total -= sum(model.get_parameter(name).numel() for name in head)
    assert trainable == sum(2 * (d_out + d_in) for d_out, d_in in (p.shape for p in tiny.plan(kind).layers.values()))
    assert total == trainable + sum(p.numel() for p in tiny.base(kind).parameters())


def test_looks_like_a_peft_model_to_trainers(tiny, capsys):
    model = tiny.guarded()
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.peft_type, config.task_type) == (2, 3.0, "LORA", "CAUSAL_LM")
    assert model.get_base_model() is model.base_model.model
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
    assert model.active_adapters == ["default"] and model.config.vocab_size == 64
    model.set_adapter("default")
    assert model.get_model_status().enabled is True
    model.print_trainable_parameters()
    assert "trainable params: 928 " in capsys.readouterr().out


def test_base_prepared_for_kbit_training_is_guarded_and_learns(tiny):
    model = peft.prepare_model_for_kbit_training(tiny.base(), use_gradient_checkpointing=False)
    model = gk.attach_guard(model, tiny.plan())
    tiny.train(model)
    assert tiny.drift(model)[0] < 1e-6 < tiny.drift(model)[1]


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("init", ["balanced", "paper", "zero"])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_base_model(tiny, kind, init, residual):
    model = tiny.guarded(kind, residual=residual, init=init)
    assert close(tiny.logits(model, kind), tiny.logits(tiny.base(kind), kind))
    B = next(iter(model.guarded_layers().values())).B
    assert bool((B == 0).all()) == (init == "zero")


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["", "checkpoint", "reentrant checkpoint"])
def test_a_model_that_changes_outputs_in_place_trains_like_one_that_does_not(tiny, residual, checkpointed):
    """As Falcon adds its residual; activations and dropout may be in place as well."""
    gradients = []
    for inplace in (False, True):
        model = tiny.guarded("plain", residual=residual).train()
        up, down = (model.get_base_model().get_submodule(name) for name in ("up", "down"))

        def block(x, up=up, down=down, inplace=inplace):
            y = torch.nn.functional.relu(up(x), inplace)
            z = torch.nn.functional.dropout(down(y), 0.3, True, inplace)
            return z.add_(1.0) if inplace else z + 1.0

        x = model.get_base_model().embed(tiny.batch("plain")["input_ids"]).detach().requires_grad_()
        torch.manual_seed(1)
        output = block(x) if checkpointed is None else checkpoint(block, x, use_reentrant=checkpointed)
        output.square().mean().backward()
        gradients.append([p.grad for layer in (up, down) for p in (layer.A, layer.B)])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
def test_float64_stays_float64(tiny, residual):
    model = tiny.guarded(dtype=torch.float64, residual=residual)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert close(tiny.logits(model), tiny.logits(tiny.base(dtype=torch.float64)), 1e-13)
    model = model.unload()
    assert close(tiny.logits(model), tiny.logits(tiny.base(dtype=torch.float64)), 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_residual_never_touches_the_base(tiny, kind):
    model = tiny.guarded(kind)
    tiny.train(model, kind=kind)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, kind), tiny.logits(tiny.base(kind), kind))
    plain = dict(model.unload().named_parameters())
    # PEFT trains the head of a classification model, and gives it back so.
    assert all(torch.equal(p, plain[n]) != (n == "score.weight") for n, p in tiny.base(kind).named_parameters())


@pytest.mark.parametrize("setting", ["autocast", "medium", "bf16 for one backend"])
def test_reduced_products_do_not_reach_the_weights(tiny, setting, matmul_precision):
    """What residual="frozen" writes and what merging adds are formed in float32, whatever trainers allow."""

    def weights():
        model = tiny.guarded(residual="frozen")
        frozen = {name: layer.get_base_layer().weight.clone() for name, layer in model.guarded_layers().items()}
        with torch.no_grad():
            for layer in model.guarded_layers().values():
                layer.B.add_(0.1)
        return frozen, {name: layer.get_delta_weight("default") for name, layer in model.guarded_layers().items()}

    expected = weights()
    if setting != "autocast":
        matmul_precision(setting)
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
        for ours, theirs in zip(weights(), expected, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_frozen_residual_writes_the_weight_and_restores_it(tiny):
    model = tiny.guarded(residual="frozen")
    tiny.train(model)
    layer = model.guarded_layers()["model.layers.0.mlp.up_proj"]
    original = tiny.base().model.layers[0].mlp.up_proj.weight
    assert (layer.get_base_layer().weight - original).norm() > 0.01 * original.norm()
    assert close(layer.base_weight(), original)
    with model.disable_adapter():
        assert close(tiny.logits(model), tiny.logits(tiny.base()))
    model = model.unload()
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert close(model.model.layers[0].mlp.up_proj.weight, original)
    assert close(tiny.logits(model), tiny.logits(tiny.base()))


def test_residuals_train_to_the_same_model(tiny):
    virtual, frozen = (tiny.guarded(residual=r) for r in ("virtual", "frozen"))
    losses = [tiny.train(m, torch.optim.SGD(tiny.trainable(m), lr=0.05)) for m in (virtual, frozen)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert close(tiny.logits(virtual), tiny.logits(frozen), 1e-4)


def test_without_projector_nothing_is_protected(tiny):
    model = tiny.guarded(projector=False)
    assert close(tiny.logits(model), tiny.logits(tiny.base()))
    tiny.train(model)
    layer, reference = (m.guarded_layers()["model.layers.0.mlp.up_proj"] for m in (model, tiny.guarded()))
    Q, _ = tiny.directions(reference)
    assert (tiny.delta(layer) @ Q).norm() > 1e-2
    with pytest.raises(ValueError, match="no guarded layer"):
        gk.guard_optimizer(tiny.adamw(tiny.trainable(model)), model)


def test_layer_whose_name_ends_another_is_guarded_alone(tiny, tmp_path):
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 8)
            self.block = torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 8)})

        def forward(self, input_ids):
            return self.block["fc"](self.fc(self.embed(input_ids)).tanh())

    ids = tiny.batch()["input_ids"]
    stats = gk.collect_statistics(Nested(), [{"input_ids": ids[:, :2]}], target_modules="fc", progress=False)
    plan = gk.plan_guard(Nested(), stats, gk.GuardConfig(rank=1, protect=0.5), progress=False, allow_few_prompts=True)
    model = gk.attach_guard(Nested(), plan)
    assert list(model.guarded_layers()) == ["fc"]
    next(iter(model.guarded_layers().values())).B.data.add_(1)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(Nested(), str(tmp_path))
    assert close(plain(ids), model(ids), 1e-5) and not close(model(ids), Nested()(ids), 1e-2)


def test_attach_refuses(tiny):
    with pytest.raises(ValueError, match=r"residual must be one of .*got 'real'"):
        tiny.guarded(residual="real")
    with pytest.raises(TypeError, match="carries adapters"):
        gk.attach_guard(tiny.guarded(), tiny.plan())
    other = tiny.base()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"another model: layer model\.layers\.1\.mlp\.up_proj differs"):
        gk.attach_guard(other, tiny.plan())
    assert type(other.model.layers[0].mlp.up_proj) is torch.nn.Linear


def fail_at(monkeypatch, target, call):
    """The call-th call of ``target`` (class or module, name) does its work and then raises."""
    original, calls = getattr(*target), []

    def failing(*args, **kwargs):
        original(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            raise MemoryError("no memory left")

    monkeypatch.setattr(*target, failing)


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize(
    "target, call",
    [
        ((GuardedLinear, "install_guard"), 3),
        ((GuardedLinear, "update_layer"), 3),
        ((peft.PeftModelForCausalLM, "__init__"), 1),
        ((peft_module, "_install"), 1),
    ],
    ids=["installing", "wrapping", "wrapped", "installed"],
)
def test_attach_that_fails_leaves_the_base_as_it_was(tiny, monkeypatch, target, call, residual):
    base, reference = tiny.base(), tiny.base()
    reference.lm_head.weight = reference.model.embed_tokens.weight
    base.lm_head.weight = base.model.embed_tokens.weight
    plan = tied_plan(tiny)
    base.model.norm.weight.requires_grad_(False)
    base.model.layers[0].mlp.train()
    modules, parameters = list(base.modules()), {n: (p, p.requires_grad) for n, p in base.named_parameters()}
    attributes, config, settings = set(vars(base)), base.config, base.config.to_dict()
    modes = [m.training for m in modules]
    fail_at(monkeypatch, target, call)
    with pytest.raises(MemoryError):
        gk.attach_guard(base, plan, residual=residual)
    assert list(base.modules()) == modules and set(vars(base)) == attributes and [m.training for m in modules] == modes
    assert base.config is config and base.config.to_dict() == settings
    now = dict(base.named_parameters())
    assert all(now[n] is p and p.requires_grad == flag for n, (p, flag) in parameters.items())
    assert all(torch.equal(p, dict(reference.named_parameters())[n]) for n, p in now.items())
    assert base.lm_head.weight is base.model.embed_tokens.weight
    monkeypatch.undo()
    assert close(tiny.logits(gk.attach_guard(base, plan, residual=residual)), tiny.logits(reference))


def tied_plan(tiny):
    base = tiny.base()
    base.lm_head.weight = base.model.embed_tokens.weight
    stats = gk.collect_statistics(base, [{"input_ids": tiny.batch(seed=7)["input_ids"][:, :4]}], progress=False)
    return gk.plan_guard(base, stats, gk.GuardConfig(rank=2, protect=0.9), progress=False, allow_few_prompts=True)


def test_layers_that_peft_does_not_find_leave_the_base_as_it_was(tiny, monkeypatch):
    base = tiny.base()
    modules = list(base.modules())
    monkeypatch.setattr(peft_module, "target_modules", lambda *_: ["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="PEFT adapted other layers than planned"):
        gk.attach_guard(base, tiny.plan())
    assert list(base.modules()) == modules and not hasattr(base, "peft_config")


# ---- running and training


@pytest.mark.parametrize("kind", KINDS)
def test_protected_inputs_do_not_move_and_free_ones_do(tiny, kind):
    model = tiny.guarded(kind)
    tiny.train(model, kind=kind, steps=6)
    protected, free = tiny.drift(model)
    assert protected < 1e-6
    assert free > 5e-3
    assert not close(tiny.logits(model, kind), tiny.logits(tiny.base(kind), kind), 1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_with_cache(tiny, kind, trained):
    model = trained if kind == "llama" else tiny.guarded(kind)
    prompt = tiny.batch(kind)["input_ids"]
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=prompt, use_cache=True, **arguments)
    assert torch.equal(cached, model.generate(input_ids=prompt, use_cache=False, **arguments))
    ids = prompt
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached[0, : prompt.shape[1] + 2], ids[0, : prompt.shape[1] + 2])


def gradients(model, tiny, kind="llama"):
    torch.manual_seed(1)
    model.zero_grad()
    model(**tiny.batch(kind)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(tiny, use_reentrant):
    model = tiny.guarded(dropout=0.3).train()
    plain = gradients(model, tiny)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    runs = []
    handle = model.guarded_layers()["model.layers.0.mlp.up_proj"].register_forward_hook(lambda *_: runs.append(1))
    checkpointed = gradients(model, tiny)
    handle.remove()
    assert len(runs) == 2
    assert all(torch.equal(g, checkpointed[n]) for n, g in plain.items())


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_compiles_without_graph_break(tiny, kind, mode):
    model = tiny.guarded(kind)
    optimizer = tiny.adamw(tiny.trainable(model))
    if mode == "step":
        gk.guard_optimizer(optimizer, model)
    expected, eager = tiny.logits(model, kind), gradients(model, tiny, kind)
    torch._dynamo.reset()
    inner = model.get_base_model()
    inner.forward = torch.compile(inner.forward, backend="aot_eager", fullgraph=True)
    assert close(tiny.logits(model, kind), expected)
    assert all(close(g, eager[n], 1e-5) for n, g in gradients(model, tiny, kind).items())
    for layer in model.guarded_layers().values():
        layer.A.data.mul_(2)  # without its version counter
    assert not close(tiny.logits(model, kind), expected, 1e-3)


def test_the_whole_model_compiles_without_graph_break(tiny):
    model = tiny.guarded().train()
    eager = gradients(model, tiny)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = gk.GuardedAdamW(model)
    assert all(close(g, eager[n.removeprefix("_orig_mod.")], 1e-5) for n, g in gradients(compiled, tiny).items())
    optimizer.step()
    assert close(compiled(**tiny.batch()).loss, model(**tiny.batch()).loss, 1e-5)
    optimizer.remove_guard()
    assert close(compiled(**tiny.batch()).loss, model(**tiny.batch()).loss, 1e-5)


def test_compiles_with_dropout(tiny):
    model = tiny.guarded("plain", dropout=0.5).train()
    eager = gradients(model, tiny, "plain")
    torch._dynamo.reset()
    inner = model.get_base_model()
    inner.forward = torch.compile(inner.forward, backend="aot_eager", fullgraph=True)
    assert all(close(g, eager[n], 1e-5) for n, g in gradients(model, tiny, "plain").items())


def test_bfloat16_base_with_float32_adapters_trains(tiny):
    model = tiny.guarded(dtype=torch.bfloat16)
    assert {p.dtype for p in tiny.trainable(model)} == {torch.float32}
    assert close(tiny.logits(model).float(), tiny.logits(tiny.base(dtype=torch.bfloat16)).float(), 0.05)
    losses = [tiny.train(model, steps=1)[0] for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    protected, free = tiny.drift(model)
    assert protected < 3e-3 < 6e-3 < free


def test_adapter_cast_to_bfloat16_saves_and_loads(tiny, tmp_path):
    model = tiny.guarded(dtype=torch.bfloat16).to(torch.bfloat16)
    tiny.train(model)
    model.save_pretrained(tmp_path)
    fresh = tiny.guarded(dtype=torch.bfloat16).to(torch.bfloat16)
    fresh.load_adapter(tmp_path)
    assert same(factors(fresh), factors(model))
    assert torch.equal(tiny.logits(fresh), tiny.logits(model))


def test_autocast(tiny, trained):
    with torch.autocast("cpu", torch.bfloat16):
        half = tiny.logits(trained)
        model = tiny.guarded()
        model(**tiny.batch()).loss.backward()
    assert half.dtype == torch.bfloat16
    assert close(half.float(), tiny.logits(trained), 0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in tiny.trainable(model))


def test_dropout_in_training_only(tiny):
    model, plain = tiny.guarded(dropout=0.5), tiny.guarded()
    for m in (model, plain):
        for i, layer in enumerate(m.guarded_layers().values()):
            layer.B.data.add_(torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(i)))
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    model.train()
    assert not close(tiny.logits(model), tiny.logits(plain), 1e-2)
    assert not torch.equal(tiny.logits(model), tiny.logits(model))
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.base()))


def test_per_request_adapters_are_refused(tiny):
    with pytest.raises(ValueError, match="takes its input alone"):
        tiny.guarded()(**tiny.batch(), adapter_names=["default"] * 4)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_are_independent_and_in_forward_mode(tiny, how):
    model = tiny.guarded()
    tiny.train(model)
    optimizer = tiny.adamw(tiny.trainable(model))
    guard = gk.guard_optimizer(optimizer, model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    before = tiny.logits(model)
    assert close(tiny.logits(twin), before)
    assert len({id(m.projector) for m in twin.guarded_layers().values()}) == 8  # shared where the input is shared
    tiny.train(twin, steps=6)
    assert torch.equal(tiny.logits(model), before)
    assert tiny.drift(twin)[0] < 1e-6
    state = get_peft_model_state_dict(twin)
    for name, (_, B) in factors(twin).items():
        assert torch.equal(state[f"base_model.model.{name}.lora_B.weight"][:, :2], B)
    guard.remove()


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_distributed_data_parallel(tiny, tmp_path, mode):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, alone = tiny.guarded(), tiny.guarded()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = tiny.adamw(tiny.trainable(model))
        if mode == "step":
            gk.guard_optimizer(optimizer, wrapped)
        losses = tiny.train(wrapped, optimizer, clip=0.1)
    finally:
        torch.distributed.destroy_process_group()
    assert losses == pytest.approx(tiny.train(alone, tiny.adamw(tiny.trainable(alone)), clip=0.1), rel=1e-5)
    assert tiny.drift(model)[0] < 1e-6


# ---- merging


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload(tiny, kind, residual):
    model = tiny.guarded(kind, residual=residual)
    tiny.train(model, kind=kind)
    expected = tiny.logits(model, kind)
    merged = model.merge_and_unload(safe_merge=residual == "frozen")
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert close(tiny.logits(merged, kind), expected, 1e-5)


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
def test_merge_adapter_and_back(tiny, residual, tmp_path):
    model = tiny.guarded(residual=residual)
    tiny.train(model)
    expected = tiny.logits(model)
    model.merge_adapter()
    assert model.guarded_layers()["model.layers.0.mlp.up_proj"].merged
    assert close(tiny.logits(model), expected, 1e-5)
    with pytest.raises(ValueError, match="merged"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.unmerge_adapter()
    assert close(tiny.logits(model), expected, 1e-5)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges, as PEFT does
        assert close(tiny.logits(model), tiny.logits(tiny.base()), 1e-5)
    model.merge_adapter()
    assert close(tiny.logits(model.unload()), expected, 1e-5)  # what is merged stays merged, as in PEFT


# ---- saving and loading


@pytest.mark.parametrize("init", ["balanced", "zero"])
@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_loads_what_is_saved(tiny, tmp_path, kind, residual, init):
    model = tiny.guarded(kind, residual=residual, init=init)
    tiny.train(model, kind=kind)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", ADAPTER, GUARD]
    plain = PeftModel.from_pretrained(tiny.base(kind), str(tmp_path)).eval()
    assert not hasattr(plain, "guard_plan")
    assert plain.peft_config["default"].r == (2 if init == "zero" else 4)
    assert close(tiny.logits(plain, kind), tiny.logits(model, kind), 1e-5)
    assert not close(tiny.logits(plain, kind), tiny.logits(tiny.base(kind), kind), 1e-3)


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
def test_load_adapter_is_exact(tiny, saved, trained, residual):
    fresh = tiny.guarded(residual=residual)
    assert not same(factors(fresh), factors(trained))
    result = fresh.train().load_adapter(saved, is_trainable=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], []) and fresh.training
    assert same(factors(fresh), factors(trained))
    assert close(tiny.logits(fresh.eval()), tiny.logits(trained))
    fresh.train().load_adapter(saved)
    assert not fresh.training


def test_plan_file_and_adapter_folder_restore_the_model(tiny, saved, trained, tmp_path):
    tiny.plan().save(tmp_path / "plan.safetensors")
    fresh = gk.attach_guard(tiny.base(), gk.GuardPlan.load(tmp_path / "plan.safetensors")).eval()
    fresh.load_adapter(saved)
    assert torch.equal(tiny.logits(fresh), tiny.logits(trained))


def test_another_adapter_name(tiny, tmp_path):
    model = tiny.guarded(adapter_name="guard")
    tiny.train(model)
    model.save_pretrained(tmp_path)
    assert close(tiny.logits(PeftModel.from_pretrained(tiny.base(), str(tmp_path)).eval()), tiny.logits(model), 1e-5)
    fresh = tiny.guarded(adapter_name="guard")
    fresh.load_adapter(tmp_path, "guard")
    assert torch.equal(tiny.logits(fresh), tiny.logits(model))
    with pytest.raises(ValueError, match="one adapter, 'guard'"):
        fresh.load_adapter(tmp_path)


def test_save_options(tiny, trained, tmp_path):
    trained.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not (tmp_path / "worker").exists()
    with pytest.raises(ValueError, match=r"selected_adapters must be \['default'\]"):
        trained.save_pretrained(tmp_path, selected_adapters=["other"])
    with pytest.warns(UserWarning, match="always saved as safetensors"):
        trained.save_pretrained(tmp_path, safe_serialization=False, selected_adapters=["default"])
    assert (tmp_path / ADAPTER).exists() and not (tmp_path / "adapter_model.bin").exists()


LAYER = "model.layers.1.self_attn.v_proj"


def edit(file, change):
    """Changes one tensor of the exported adapter."""

    def apply(folder, tiny):
        tensors = load_file(folder / ADAPTER)
        key = f"base_model.model.{LAYER}.{file}.weight"
        tensors[key] = change(tensors[key].clone())
        save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})

    return apply


def edit_guard(factor, change):
    def apply(folder, tiny):
        tensors, header = load_tensors(folder / GUARD, "guarded adapter")
        tensors[f"{LAYER}.{factor}"] = change(tensors[f"{LAYER}.{factor}"].clone())
        kind = header.pop("kind")
        save_tensors(folder / GUARD, kind, tensors, header)

    return apply


def poke(row, column, value):
    def change(t):
        t[row, column] = value
        return t

    return change


def move_into_protected(folder, tiny):
    """Both files say the same, and it leaves the null space."""
    Q, _ = tiny.directions(tiny.guarded().guarded_layers()[LAYER])
    edit("lora_A", lambda t: torch.cat([t[:2] + Q.T[:2].float(), t[2:]]))(folder, tiny)
    edit_guard("A", lambda t: t + Q.T[:2].float())(folder, tiny)


def another_plan(folder, tiny):
    shutil.rmtree(folder)
    tiny.guarded(protect=0.8).save_pretrained(folder)


def plain_lora(folder, tiny, r=2):
    shutil.rmtree(folder)
    config = LoraConfig(r=r, lora_alpha=1.5 * r, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(tiny.base(), config).save_pretrained(folder)


def drop_layer(folder, tiny):
    tensors, header = load_tensors(folder / GUARD, "guarded adapter")
    save_tensors(folder / GUARD, header.pop("kind"), {k: t for k, t in tensors.items() if LAYER not in k}, header)


TAMPERINGS = {
    "exported A edited": (edit("lora_A", poke(0, 0, 0.3)), ValueError, f"layer {LAYER}: .*(outside|disagree)"),
    "exported A scaled": (edit("lora_A", lambda t: 1.01 * t), ValueError, "disagree"),
    "exported frozen A edited": (edit("lora_A", poke(2, 0, 0.3)), ValueError, "disagree"),
    "exported B edited": (edit("lora_B", poke(0, 0, 0.3)), ValueError, "disagree"),
    "exported frozen B edited": (edit("lora_B", poke(0, 2, 0.3)), ValueError, "disagree"),
    "exported A NaN": (edit("lora_A", poke(0, 0, torch.nan)), ValueError, "non-finite"),
    "exported frozen A NaN": (edit("lora_A", poke(3, 0, torch.nan)), ValueError, "disagree"),
    "exported B NaN": (edit("lora_B", poke(0, 0, torch.nan)), ValueError, "disagree"),
    "exported A of rank 1": (edit("lora_A", lambda t: t[:1].clone()), ValueError, r"shapes \(1, 16\)"),
    "exported A of rank 3": (edit("lora_A", lambda t: t[:3].clone()), ValueError, "disagree"),
    "A edited": (edit_guard("A", lambda t: 1.01 * t), ValueError, "disagree"),
    "A NaN": (edit_guard("A", poke(0, 0, torch.nan)), ValueError, "non-finite"),
    "A of another shape": (edit_guard("A", lambda t: t[:, :8].clone()), ValueError, r"saved A has shape \(2, 8\)"),
    "B edited": (edit_guard("B", poke(0, 0, 0.3)), ValueError, "disagree"),
    "B inf": (edit_guard("B", poke(0, 0, torch.inf)), ValueError, "non-finite"),
    "B of another shape": (edit_guard("B", lambda t: t[:3].clone()), ValueError, r"\(3, 2\), expected"),
    "both moved into the protected span": (move_into_protected, ValueError, "acts outside the null space"),
    "a layer is missing": (drop_layer, ValueError, f"layer {LAYER}: the saved adapter does not cover it"),
    "another plan": (another_plan, ValueError, "another plan"),
    "plain LoRA": (plain_lora, FileNotFoundError, f"has no {GUARD}.*PeftModel.from_pretrained"),
    "no guard file": (lambda folder, _: (folder / GUARD).unlink(), FileNotFoundError, f"has no {GUARD}"),
    "no adapter file": (lambda folder, _: (folder / ADAPTER).unlink(), FileNotFoundError, ADAPTER),
    "guard file is another": (
        lambda folder, tiny: tiny.plan().save(folder / GUARD),
        ValueError,
        "not a guarded adapter file .*but a guard plan",
    ),
    "guard file cut short": (
        lambda folder, _: (folder / GUARD).write_bytes((folder / GUARD).read_bytes()[:-8]),
        ValueError,
        "not a readable safetensors",
    ),
    "adapter file cut short": (
        lambda folder, _: (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-8]),
        ValueError,
        "not a readable safetensors",
    ),
}


@pytest.mark.parametrize("case", TAMPERINGS)
def test_altered_adapter_is_refused_and_changes_nothing(tiny, saved, case):
    apply, error, message = TAMPERINGS[case]
    apply(saved, tiny)
    model = tiny.guarded()
    before = factors(model)
    with pytest.raises(error, match=message):
        model.load_adapter(saved)
    assert same(factors(model), before)


# ---- state dicts


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("init", ["balanced", "zero"])
def test_state_dict_is_that_of_a_plain_lora(tiny, init, residual):
    model = tiny.guarded(init=init, residual=residual)
    tiny.train(model)
    rank = 2 if init == "zero" else 4

    def plain(r):
        config = LoraConfig(r=r, lora_alpha=1.5 * r, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(tiny.base(), config).eval()

    extracted = get_peft_model_state_dict(model)
    assert all("lora_A" in key or "lora_B" in key for key in extracted)
    from_adapter = plain(rank)
    set_peft_model_state_dict(from_adapter, extracted)
    assert close(tiny.logits(from_adapter), tiny.logits(model), 1e-5)
    if residual == "virtual":
        whole = plain(rank)
        whole.load_state_dict(model.state_dict())
        assert close(tiny.logits(whole), tiny.logits(model), 1e-5)
    if rank != 2:
        for load in (set_peft_model_state_dict, lambda m, s: m.load_state_dict(s, strict=False)):
            with pytest.raises(RuntimeError, match="size mismatch"):
                load(plain(2), extracted if load is set_peft_model_state_dict else model.state_dict())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("init", ["balanced", "zero"])
def test_state_dict_round_trip(tiny, init, assign):
    model, fresh, other = (tiny.guarded(init=init) for _ in range(3))
    tiny.train(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = fresh.load_state_dict(state, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert close(tiny.logits(fresh), tiny.logits(model), 1e-5)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())  # ours is left alone
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert close(tiny.logits(other), tiny.logits(model), 1e-5)


def state_changes(tiny):
    key = f"base_model.model.{LAYER}.lora_{{}}.default.weight".format
    Q, _ = tiny.directions(tiny.guarded().guarded_layers()[LAYER])
    return {
        "rank r": (key("A"), lambda t: t[:2], "4 adapter rows"),
        "B of rank r": (key("B"), lambda t: t[:, :2], "4 adapter rows"),
        "another start": (key("A"), lambda t: torch.cat([t[:2], 1.1 * t[2:]]), "another plan"),
        "another B0": (key("B"), lambda t: torch.cat([t[:, :2], -t[:, 2:]], 1), "another plan"),
        "NaN in the start": (key("A"), lambda t: poke(3, 0, torch.nan)(t), "another plan"),
        "NaN": (key("A"), lambda t: poke(0, 0, torch.nan)(t), "non-finite"),
        "outside": (key("A"), lambda t: torch.cat([t[:2] + Q.T[:2].float(), t[2:]]), "outside the null space"),
        "A alone": (key("B"), None, "one of lora_A and lora_B"),
    }


CHANGES = ["rank r", "B of rank r", "another start", "another B0", "NaN in the start", "NaN", "outside", "A alone"]


@pytest.mark.parametrize("case", CHANGES)
def test_foreign_state_dict_is_refused(tiny, trained, case):
    key, change, message = state_changes(tiny)[case]
    state = {k: v.clone() for k, v in trained.state_dict().items()}
    value = state.pop(key)
    if change is not None:
        state[key] = change(value)
    model = tiny.guarded()
    before = factors(model)[LAYER]
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(before, factors(model)[LAYER], strict=True))


# ---- one adapter, and no other


@pytest.mark.parametrize(
    "add",
    [
        lambda m: m.add_adapter("second", LoraConfig(target_modules=["q_proj"])),
        lambda m: m.base_model.model.add_adapter(LoraConfig(target_modules=["q_proj"]), "second"),
        lambda m: m.add_weighted_adapter(["default"], [0.5], "second"),
        lambda m: get_peft_model(m, LoraConfig(target_modules=["q_proj"])),
    ],
    ids=["add_adapter", "transformers", "add_weighted_adapter", "get_peft_model"],
)
def test_second_adapter_is_refused(tiny, tmp_path, add):
    model = tiny.guarded()
    with pytest.raises(ValueError, match="no second adapter"):
        add(model)
    assert close(tiny.logits(model), tiny.logits(tiny.base()))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["lm_head"], modules_to_save=["norm"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q_proj"]),
        peft.LNTuningConfig(target_modules=["norm"]),
        peft.TrainableTokensConfig(token_indices=[3]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_of_other_kinds_on_top_are_refused_and_taken_out(tiny, tmp_path, config):
    model = tiny.guarded()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="no second adapter"):
        get_peft_model(model, config)
    assert names == [name for name, _ in model.named_modules()]
    assert len(tiny.trainable(model)) == 28
    assert close(tiny.logits(model), tiny.logits(tiny.base()))
    gk.certify(model, tiny.statistics())
    model.save_pretrained(tmp_path)


def test_adapter_put_into_the_inner_model_is_neither_certified_nor_saved(tiny, tmp_path):
    model = tiny.guarded()
    model.get_base_model().add_adapter(LoraConfig(target_modules=["lm_head"]))
    for use in (lambda: gk.certify(model, tiny.statistics()), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="layer lm_head: an adapter without a guard was put into a guarded model"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["plain", "own", "plain of another rank"])
def test_hotswap_is_refused_before_it_changes_anything(tiny, saved, which):
    from peft.utils.hotswap import hotswap_adapter

    if which != "own":
        plain_lora(saved, tiny, r=2 if which == "plain" else 3)
    model = tiny.guarded()
    before = factors(model)
    with pytest.raises(ValueError, match="a guarded model takes no other adapter: use its load_adapter"):
        hotswap_adapter(model, str(saved), "default", torch_device="cpu")
    assert same(factors(model), before) and len(tiny.trainable(model)) == 28


def larger_rank(model):
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    prepare_model_for_compiled_hotswap(model, target_rank=8)


def other_tensors(model):
    """What peft.utils.hotswap does beneath its checks."""
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    state = {k.replace(".weight", ".default.weight"): v for k, v in get_peft_model_state_dict(model).items()}
    hotswap_adapter_from_state_dict(model, state, "default", LoraConfig(r=4, lora_alpha=4))


def write_data(model):
    next(iter(model.guarded_layers().values())).B.data = torch.zeros(16, 5)


@pytest.mark.parametrize("change", [larger_rank, other_tensors, write_data])
def test_factors_of_other_shapes_are_noticed_at_the_next_use(tiny, tmp_path, change):
    model = tiny.guarded()
    change(model)
    for use in (
        lambda: tiny.logits(model),
        lambda: gk.certify(model, tiny.statistics()),
        lambda: model.save_pretrained(tmp_path),
        model.merge_adapter,
        model.state_dict,
    ):
        with pytest.raises(
            RuntimeError, match=r"layer model\.layers\.0\.\S+: .*have shapes .* attached with .*another adapter"
        ):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["frozen_A", "frozen_B"])
def test_changed_frozen_pair_is_neither_certified_nor_saved(tiny, tmp_path, name):
    model = tiny.guarded()
    getattr(model.guarded_layers()[LAYER], name)[0, 0] += 1e-4
    for use in (
        lambda: gk.certify(model, tiny.statistics()),
        lambda: model.save_pretrained(tmp_path),
        model.state_dict,
    ):
        with pytest.raises(RuntimeError, match=rf"layer {LAYER}: the frozen pair A₀P, B₀ is not the plan's"):
            use()
    cast = tiny.guarded().bfloat16().float()  # a cast rounds it, which is no change
    assert cast.guarded_layers()[LAYER].delta_factors()[1].shape == (4, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.base_model.delete_adapter("default"), "keeps its only adapter"),
        (lambda m: m.base_model.set_adapter("other"), "no second adapter"),
        (lambda m: m.base_model.set_adapter([]), "no second adapter"),
        (lambda m: m.base_model.inject_adapter(m.get_base_model(), "other"), "no second adapter"),
        (lambda m: m.guarded_layers()[LAYER].delete_adapter("default"), "keeps its only adapter"),
    ],
    ids=["delete", "set", "set none", "inject", "layer"],
)
def test_changes_through_the_inner_models_are_refused(tiny, tmp_path, change, message):
    model = tiny.guarded()
    with pytest.raises(ValueError, match=message):
        change(model)
    assert close(tiny.logits(model), tiny.logits(tiny.base()))
    model.save_pretrained(tmp_path)
    assert len(tiny.trainable(model)) == 28


def test_other_ways_to_another_adapter_are_refused(tiny, saved):
    model = tiny.guarded()
    with pytest.raises(ValueError, match="one adapter, 'default'"):
        model.load_adapter(saved, "second")
    with pytest.raises(TypeError, match=r"attach_guard\(model, GuardPlan\.load\(path\)\)"):
        type(model).from_pretrained(tiny.base(), saved)
    with pytest.raises(ValueError, match="unload"):
        model.delete_adapter("default")
