"""Wrapped models: every function sees the model inside, or refuses the wrapper by name."""

from __future__ import annotations

import copy
import os

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.optim.swa_utils import AveragedModel

import guardspace_kernels as gk
from guardspace_kernels.guard.estimate import estimate_preparation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(torch|peft|transformers)", "ignore::FutureWarning")


class Holder(nn.Module):
    """A user's own module."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.other = policy, nn.Linear(3, 3).requires_grad_(False)

    def forward(self, **batch):
        return self.policy(**batch)


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "nested": lambda model: nn.DataParallel(compiled(nn.DataParallel(model))),
    "AveragedModel": AveragedModel,
    "checkpoint": checkpoint_wrapper,
    "holder": Holder,
    "holder of a wrapper": lambda model: Holder(nn.ModuleList([compiled(model)])),
}
ADAPTED = {**WRAPPERS, "tuner": lambda model: model.base_model, "base": lambda model: model.get_base_model()}


def files(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    model = tiny.guarded()
    tiny.train(model)
    folder = tmp_path_factory.mktemp("bare")
    gk.export_lora(model, folder)
    return model, files(folder)


@pytest.mark.parametrize("name", ADAPTED)
def test_a_wrapped_model_exports_the_bytes_of_the_bare_one_and_certifies(tiny, trained, name, tmp_path):
    model, wanted = trained
    wrapped = ADAPTED[name](model)
    gk.export_lora(wrapped, tmp_path)
    assert files(tmp_path) == wanted
    report = gk.certify(wrapped, tiny.statistics())
    assert report.to_dict() == gk.certify(model, tiny.statistics()).to_dict()
    assert len(report.layers) == 14


def test_a_plain_lora_is_found_in_its_wrapper_too(tiny, tmp_path):
    plain = peft.get_peft_model(tiny.base(), peft.LoraConfig(target_modules=["q_proj"]))
    assert [row.name for row in gk.certify(Holder(compiled(plain)), tiny.statistics()).layers] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_held_out_prompts_go_through_the_model_inside(tiny, trained):
    batch = {"input_ids": tiny.batch(seed=5)["input_ids"]}
    bare, held = (gk.certify(m, tiny.statistics(), [batch]).heldout for m in (trained[0], nn.DataParallel(trained[0])))
    assert bare == held


def test_distributed_data_parallel_exports_and_certifies(tiny, trained, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(trained[0])
        gk.export_lora(wrapped, tmp_path / "adapter")
        assert len(gk.certify(wrapped, tiny.statistics()).layers) == 14
    finally:
        torch.distributed.destroy_process_group()
    assert files(tmp_path / "adapter") == trained[1]


@pytest.mark.parametrize("how", ["compile", "checkpoint", "base compiled"])
def test_blocks_wrapped_after_attaching_keep_their_names(tiny, trained, how, tmp_path):
    model = copy.deepcopy(trained[0])
    inner = model.get_base_model().model
    if how == "compile":
        for i, block in enumerate(inner.layers):
            inner.layers[i] = compiled(block)
    elif how == "checkpoint":
        apply_activation_checkpointing(inner, check_fn=lambda m: "DecoderLayer" in type(m).__name__)
    else:
        model.base_model.model = compiled(model.base_model.model)
    assert any("_orig_mod" in n or "_checkpoint_wrapped" in n for n, _ in model.named_modules())
    gk.export_lora(model, tmp_path / "export")
    assert files(tmp_path / "export") == trained[1]
    model.save_pretrained(tmp_path / "saved")
    fresh = tiny.guarded()
    fresh.load_adapter(tmp_path / "saved")
    assert torch.equal(tiny.logits(fresh), tiny.logits(trained[0]))


@pytest.mark.parametrize("name", ["compile", "DataParallel", "nested", "AveragedModel", "checkpoint"])
def test_a_wrapped_base_is_collected_planned_and_guarded_as_the_bare_one(tiny, name, tmp_path):
    wrapped = WRAPPERS[name](tiny.base())
    batches = [{"input_ids": tiny.batch(seed=7)["input_ids"][:, :4]}]
    estimate = {"prompts": 4, "tokens_per_prompt": 4, "rank": 2}
    collection = estimate_preparation(wrapped, **estimate).collection
    assert collection == estimate_preparation(tiny.base(), **estimate).collection
    stats = gk.collect_statistics(wrapped, batches, progress=False)
    assert stats.fingerprint == tiny.statistics().fingerprint
    made = gk.plan_guard(wrapped, stats, tiny.plan().config, progress=False, allow_few_prompts=True)
    assert made.fingerprint == tiny.plan().fingerprint
    model = gk.attach_guard(wrapped, tiny.plan())
    gk.export_lora(model, tmp_path / "ours")
    gk.export_lora(tiny.guarded(), tmp_path / "bare")
    assert files(tmp_path / "ours") == files(tmp_path / "bare")


def test_blocks_wrapped_before_attaching_are_refused(tiny):
    model = tiny.base()
    model.model.layers[1] = compiled(model.model.layers[1])
    batches = [{"input_ids": tiny.batch()["input_ids"]}]
    for use in (
        lambda: gk.collect_statistics(model, batches, progress=False),
        lambda: gk.attach_guard(model, tiny.plan()),
    ):
        with pytest.raises(TypeError, match=r"module 'model\.layers\.1' is wrapped in OptimizedModule.*after attach"):
            use()


@pytest.mark.parametrize("make", [lambda _, model: gk.GuardedAdamW(model), gk.guard_optimizer])
@pytest.mark.parametrize("name", WRAPPERS)
def test_optimisers_guard_the_model_inside(tiny, name, make):
    model = tiny.guarded()
    wrapped = WRAPPERS[name](model)
    inside = next(m for m in wrapped.modules() if hasattr(m, "guard_plan"))
    optimizer = tiny.adamw(tiny.trainable(wrapped))
    guard = make(optimizer, wrapped)
    assert guard is not None
    assert all(layer.step_mode for layer in inside.guarded_layers().values())


def test_several_models_or_stray_adapters_are_refused(tiny, tmp_path):
    two = nn.ModuleDict({"policy": tiny.guarded(), "reward": tiny.guarded()})
    stray = nn.ModuleDict({"policy": tiny.guarded()})
    layer = next(iter(tiny.guarded().guarded_layers().values()))
    stray["head"] = gk.nn.ProjectedLoraLinear.from_linear(nn.Linear(16, 4), 2, layer.projector.basis)
    for model, message in (
        (two, r"ModuleDict holds 2 models with adapters \(LlamaForCausalLM, LlamaForCausalLM\); give one of them"),
        (stray, "layer head has an adapter outside of the model that PEFT adapted; give that model"),
    ):
        for use in (lambda m: gk.export_lora(m, tmp_path), lambda m: gk.certify(m, tiny.statistics())):
            with pytest.raises(ValueError, match=message):
                use(model)
    assert not list(tmp_path.iterdir())


# ---- models that are divided among processes


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fully_sharded(model, where):
    from torch.distributed.fsdp import fully_shard

    if where == "blocks":
        for block in (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers:
            fully_shard(block)
    else:
        fully_shard(model.get_base_model() if where == "base" else model)
    return model


def flat(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def partitioned(model):
    """What DeepSpeed's ZeRO-3 marks a parameter with."""
    for p in model.parameters():
        p.ds_id = id(p)
    return model


def on_a_mesh(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parallelize_module(base.lm_head, init_device_mesh("cpu", (1,)), ColwiseParallel())
    return model


SHARDED = {
    "fully_shard": (lambda model: fully_sharded(model, "blocks"), "fully_shard"),
    "fully_shard of the root": (lambda model: fully_sharded(model, "root"), "fully_shard"),
    "ZeRO-3": (partitioned, "DeepSpeed ZeRO-3"),
    "mesh": (on_a_mesh, "a device mesh"),
}
SHARDED_LATER = {
    **SHARDED,
    "fully_shard of the base": (lambda model: fully_sharded(model, "base"), "fully_shard"),
    "FSDP1": (flat, "FullyShardedDataParallel"),
}


@pytest.mark.parametrize("how", SHARDED)
def test_a_sharded_base_is_not_guarded(tiny, one_process, how):
    shard, kind = SHARDED[how]
    model = shard(tiny.base())
    with pytest.raises(TypeError, match=rf"model is divided by {kind} among processes, .* attach the guard to a whole"):
        gk.attach_guard(model, tiny.plan())


@pytest.mark.parametrize("how", SHARDED_LATER)
def test_a_guarded_model_that_is_sharded_is_refused_at_its_first_forward_in_training(tiny, one_process, how):
    shard, kind = SHARDED_LATER[how]
    model = tiny.guarded()
    model(**tiny.batch())  # before, all is well
    optimizer = tiny.adamw(tiny.trainable(model))
    wrapped = shard(model).train()
    message = f"is not trained divided by {kind}: .* with DistributedDataParallel or DeepSpeed ZeRO-1"
    for make in (gk.GuardedAdamW, lambda m: gk.guard_optimizer(optimizer, m), lambda m: m(**tiny.batch())):
        with pytest.raises(TypeError, match=message):
            make(wrapped)


def test_a_sharded_adapter_is_not_exported_by_halves(tiny, trained, one_process, tmp_path):
    model = fully_sharded(copy.deepcopy(trained[0]), "blocks")
    for use in (lambda: gk.export_lora(model, tmp_path / "adapter"), lambda: gk.certify(model, tiny.statistics())):
        with pytest.raises(TypeError, match=r"layer model\.layers\.0\.\S+: its parameters are divided by .*gather"):
            use()
    for module in model.modules():
        if hasattr(type(module), "unshard"):
            module.unshard()
    gk.export_lora(model, tmp_path / "adapter")
    assert files(tmp_path / "adapter") == trained[1]


def test_replicas_of_data_parallel_train(tiny, monkeypatch):
    """What the Trainer makes of a model on a machine with several GPUs that was started without torchrun."""
    import importlib

    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [[t.view_as(t) for t in tensors] for _ in devices],
    )
    model, whole, batch = tiny.guarded().train(), tiny.guarded().train(), tiny.batch()
    for replica in replicate.replicate(model, [0, 1]):
        (replica(**batch).loss / 2).backward()
    whole(**batch).loss.backward()
    gradients = [{name: p.grad for name, p in m.named_parameters() if p.requires_grad} for m in (model, whole)]
    torch.testing.assert_close(*gradients)


def test_a_functional_call_puts_other_tensors_in_place(tiny):
    model, whole, batch = tiny.guarded().train(), tiny.guarded().train(), tiny.batch()
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    loss = torch.func.functional_call(model, given, (), batch).loss
    whole(**batch).loss.backward()
    theirs = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
    torch.testing.assert_close(dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True)), theirs)
