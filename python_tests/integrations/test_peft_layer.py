"""A guarded layer: merging and back, shared weights, bases that are no plain linear layers, offloaded ones."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import guardspace_kernels as gk
from guardspace_kernels.integrations.peft_layer import _Fold
from guardspace_kernels.ops.projected_lora import cpu_kernels

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(torch|peft|transformers|accelerate)")

LAYER = "model.layers.0.mlp.up_proj"
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def close(a, b, tolerance=2e-6):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def weights(model):
    """Name in the base model -> its parameters, the adapters' left out."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = {n: p.detach().clone() for n, p in base.named_parameters() if "lora_" not in n}
    return {n.replace(".base_layer", ""): p for n, p in named.items()}


def moved(model, size=0.2):
    """Stands for training, in every dtype."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.guarded_layers().values():
            for p in (layer.A, layer.B):
                p.add_(size * p.abs().mean() * torch.randn(p.shape, generator=generator).to(p))
    return model


def layer_of(model, name=LAYER):
    return model.guarded_layers()[name]


# ---- merging


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_base_weights_are_bit_for_bit_after_merging_and_back(tiny, kind, residual, dtype):
    model = moved(tiny.guarded(kind, dtype=dtype, residual=residual))
    before, identities = weights(model), {n: id(p) for n, p in model.named_parameters()}
    for cycle in range(5):
        model.merge_adapter(safe_merge=bool(cycle % 2))
        changed = weights(model)
        assert not all(same_bits(changed[n], p) for n, p in before.items())
        if cycle == 3:
            with model.disable_adapter():
                tiny.logits(model, kind)  # unmerges
        else:
            model.unmerge_adapter()
        moved(model)
    assert all(same_bits(weights(model)[n], p) for n, p in before.items())
    assert identities == {n: id(p) for n, p in model.named_parameters()}
    gk.certify(model, tiny.statistics(kind, dtype))
    base, restored = weights(tiny.base(kind, dtype)), weights(model.unload())
    assert base.keys() == restored.keys() and all(same_bits(restored[n], p) for n, p in base.items())


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_weight_is_rounded_once(tiny, kind, residual):
    model = moved(tiny.guarded(kind, dtype=torch.bfloat16, residual=residual))
    base = dict(tiny.base(kind, torch.bfloat16).named_modules())
    deltas = {n: (F.double() @ G.double(), m.fan_in_fan_out) for n, m in model.guarded_layers().items()
              for F, G in [m.delta_factors()]}  # fmt: skip
    merged = dict(model.merge_and_unload().named_modules())
    for name, (delta, transposed) in deltas.items():
        exact = base[name].weight.double() + (delta.T if transposed else delta)
        assert ((merged[name].weight.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "cast", "cast and back"])
@pytest.mark.parametrize("residual", ["virtual", "frozen"])
def test_what_is_done_to_a_merged_model_leaves_its_base_weights(tiny, how, residual):
    model = moved(tiny.guarded(residual=residual))
    expected, base = tiny.logits(model), weights(tiny.base())
    model.merge_adapter()
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    else:
        model = model.to(torch.bfloat16)
        if how == "cast and back":
            model = model.to(torch.float32)
    model.unmerge_adapter()
    if how in ("deepcopy", "torch.save"):
        assert close(tiny.logits(model), expected)
    restored = weights(model.unload())
    guarded = [n for n, _ in tiny.base().named_parameters() if n.removesuffix(".weight") in tiny.plan().layers]
    assert all(same_bits(restored[n], base[n].to(restored[n].dtype)) for n in guarded)


def test_merge_and_unload_keeps_no_copy(tiny):
    model = moved(tiny.guarded())
    held = weakref.ref(layer_of(model))
    merged = model.merge_and_unload()
    del model
    gc.collect()
    assert held() is None and type(merged.model.layers[0].mlp.up_proj) is nn.Linear


def test_unloading_by_the_inner_model_restores_the_frozen_residual(tiny):
    base, restored = weights(tiny.base()), weights(moved(tiny.guarded(residual="frozen")).base_model.unload())
    assert all(same_bits(restored[n], p) for n, p in base.items())


def hooked(layer):
    layer.get_base_layer().register_forward_hook(lambda _m, _a, y: y + 1)


def parametrized(layer):
    parametrize.register_parametrization(layer.get_base_layer(), "weight", nn.Identity())


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda layer: layer.A.data.fill_(torch.nan), "non-finite"),
        (hooked, "its Linear has hooks"),
        (parametrized, "computed from other parameters"),
    ],
    ids=["NaN", "hook", "parametrization"],
)
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_refused_merge_changes_nothing(tiny, merge, spoil, message):
    model = moved(tiny.guarded())
    last = list(model.guarded_layers().values())[-1]
    spoil(last)
    before = weights(model)
    with pytest.raises(ValueError, match=rf"layer model\.layers\.1\.mlp\.down_proj: .*cannot be merged.*{message}"):
        getattr(model, merge)()
    assert not any(layer.merged for layer in model.guarded_layers().values()) and len(model.guarded_layers()) == 14
    assert all(same_bits(weights(model)[n], p) for n, p in before.items())


def test_merge_that_overflows_is_refused(tiny):
    layer = layer_of(tiny.guarded(dtype=torch.float16))
    before = layer.base_weight().clone()
    layer.B.data.mul_(1e7)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        layer.merge()
    assert not layer.merged and same_bits(layer.get_base_layer().weight, before)


def test_merged_model_takes_no_other_adapter(tiny, tmp_path):
    model = moved(tiny.guarded())
    model.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter is merged; unmerge before loading"):
        model.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="adapter is merged; unmerge before loading"):
        model.load_state_dict(state)


# ---- the frozen residual


def test_changed_scaling_under_a_frozen_residual_is_refused(tiny, tmp_path):
    model = moved(tiny.guarded(residual="frozen"))
    layer_of(model).set_scale("default", 0.5)
    for use in (
        lambda: tiny.logits(model),
        lambda: gk.export_lora(model, tmp_path),
        lambda: gk.certify(model, tiny.statistics()),
        model.merge_adapter,
        model.state_dict,
    ):
        with pytest.raises(
            RuntimeError, match=rf"layer {LAYER}: the scaling is 0\.75, but residual=.frozen. took .* with s = 1\.5"
        ):
            use()
    base, restored = weights(tiny.base()), weights(model.unload())
    assert all(same_bits(restored[n], p) for n, p in base.items())


def test_scaling_may_change_under_a_virtual_residual(tiny, monkeypatch):
    from peft.helpers import rescale_adapter_scale

    model = moved(tiny.guarded())
    expected = tiny.logits(model)
    with rescale_adapter_scale(model, 0.0):
        # Bit for bit where the base product is PyTorch's; the kernels form it where that is faster.
        torch.testing.assert_close(tiny.logits(model), tiny.logits(tiny.base()), rtol=0, atol=1e-6)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernels, "tokens_of_one_call", lambda *_: (1, 0))
            assert torch.equal(tiny.logits(model), tiny.logits(tiny.base()))
    assert torch.equal(tiny.logits(model), expected)


def test_certify_checks_the_weight_that_a_frozen_residual_runs_on(tiny):
    model = moved(tiny.guarded(residual="frozen"))
    assert gk.certify(model, tiny.statistics()).max_drift < 0.2
    layer_of(model).get_base_layer().weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match=rf"layer {LAYER}: its base weight is not the one .*changed"):
        gk.certify(model, tiny.statistics())


def test_state_of_a_frozen_residual_is_that_of_a_virtual_one(tiny):
    frozen, virtual = moved(tiny.guarded(residual="frozen")), tiny.guarded()
    state = {k: v.clone() for k, v in frozen.state_dict().items()}
    virtual.load_state_dict(state)
    assert close(tiny.logits(virtual), tiny.logits(frozen), 1e-5)
    fresh = tiny.guarded(residual="frozen")
    fresh.load_state_dict(virtual.state_dict())
    assert close(tiny.logits(fresh), tiny.logits(frozen), 1e-5)


# ---- shared weights


class Tied(nn.Module):
    """The output head is the embedding; the two inner layers are one module under two names."""

    def __init__(self, tie="parameter"):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(64, 12)
        self.fc = nn.Linear(12, 12)
        self.again = self.fc if tie == "module" else nn.Linear(12, 12)
        self.head = nn.Linear(12, 64, bias=False)
        if tie == "parameter":
            self.head.weight = self.embed.weight
        elif tie == "memory":
            self.head.weight = nn.Parameter(self.embed.weight.data)

    def forward(self, input_ids):
        return self.head(self.again(self.fc(self.embed(input_ids)).tanh()).tanh())


def tied(tie, residual="virtual"):
    ids = torch.tensor([[1, 2, 3, 4], [1, 5, 6, 7]])
    target = "fc" if tie == "module" else "head"
    stats = gk.collect_statistics(Tied(tie), [{"input_ids": ids}], target_modules=[target], progress=False)
    config = gk.GuardConfig(rank=2, protect=0.5)
    plan = gk.plan_guard(Tied(tie), stats, config, progress=False, allow_few_prompts=True)
    base = Tied(tie)
    return base, lambda: gk.attach_guard(base, plan, residual=residual)


@pytest.mark.parametrize("tie", ["parameter", "memory", "module"])
def test_residual_is_not_written_into_a_shared_weight(tie):
    base, attach = tied(tie, "frozen")
    layer, other = ("fc", "the same module") if tie == "module" else ("head", r"embed\.weight")
    with pytest.raises(ValueError, match=rf"layer {layer}: residual=.frozen. .*also that of {other}.*virtual"):
        attach()
    assert all(same_bits(p, q) for p, q in zip(base.parameters(), Tied(tie).parameters(), strict=True))


@pytest.mark.parametrize("tie", ["parameter", "memory", "module"])
def test_nothing_is_merged_into_a_shared_weight(tie):
    _base, attach = tied(tie)
    ids = torch.arange(6)[None]
    model = attach()
    assert close(model(ids), Tied(tie)(ids))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be merged: its weight is also that of .*export_lora"):
            merge()
    assert all(same_bits(p, q) for p, q in zip(model.unload().parameters(), Tied(tie).parameters(), strict=True))


# ---- bases that are no plain linear layers


def steer(layer):
    layer.register_forward_hook(lambda _m, _a, y: y * 1.5 + 0.1)


def steer_before(layer):
    layer.register_forward_pre_hook(lambda _m, args: (args[0] * 0.5 + 0.1,))


def replace_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 1.5


WAYS = {"forward hook": steer, "pre-hook": steer_before, "forward of the instance": replace_forward}


def adapter_of(layer, x):
    F, G = layer.delta_factors()
    return x.double() @ (F.double() @ G.double()).T


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind, name", [("llama", LAYER), ("gpt2", "transformer.h.0.mlp.c_fc")])
def test_hooks_of_the_base_act_on_the_base_alone(tiny, kind, name, way, when):
    base, model = tiny.base(kind), tiny.base(kind)
    WAYS[way](base.get_submodule(name))
    if when == "before":
        WAYS[way](model.get_submodule(name))
        if way == "forward of the instance":
            with pytest.raises(TypeError, match=rf"layer {name}: its output is not x Wᵀ \+ b"):
                gk.attach_guard(model, tiny.plan(kind))
            return
    model = gk.attach_guard(model, tiny.plan(kind)).eval()
    layer = layer_of(model, name)
    if when == "after":
        WAYS[way](layer.get_base_layer())
    assert close(tiny.logits(model, kind), tiny.logits(base, kind), 5e-6)
    assert not close(tiny.logits(base, kind), tiny.logits(tiny.base(kind), kind), 1e-3)
    moved(model)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
    expected = base.get_submodule(name)(x).double() + adapter_of(layer, x)
    assert close(layer(x).double(), expected, 1e-5)
    with model.disable_adapter():
        assert torch.equal(layer(x), base.get_submodule(name)(x))


def test_statistics_are_of_what_the_adapter_reads(tiny):
    """Before hooks of the base; those that change its output, and so what later layers read, are refused."""
    model, seen = tiny.base(), []
    model.get_submodule(LAYER).register_forward_pre_hook(lambda _module, args: seen.append(1) or args[0].clone())
    batches = [{"input_ids": tiny.batch(seed=7)["input_ids"][:, :4]}]
    stats = gk.collect_statistics(model, batches, target_modules=[LAYER], progress=False)
    assert seen and close(stats.for_layer(LAYER).covariance, tiny.statistics().for_layer(LAYER).covariance)
    steer_before(model.get_submodule(LAYER))
    with pytest.raises(TypeError, match=rf"layer {LAYER}: its output is not x Wᵀ \+ b .*take its hooks off"):
        gk.collect_statistics(model, batches, target_modules=[LAYER], progress=False)


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_layer_that_calls_its_base_has_the_gradients_of_one_that_does_not(tiny, mode):
    plain, watched = (moved(tiny.guarded()) for _ in range(2))
    seen = []
    for layer in watched.guarded_layers().values():
        layer.get_base_layer().register_forward_hook(lambda *_: seen.append(1))
    if mode == "step":
        for model in (plain, watched):
            gk.guard_optimizer(tiny.adamw(tiny.trainable(model)), model)
    grads = []
    for model in (plain, watched):
        model(**tiny.batch()).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(seen) == 14
    assert all(close(grads[1][n], g, 1e-5) for n, g in grads[0].items())


def test_hooks_on_the_gradient_of_the_base_run(tiny):
    model, seen = tiny.guarded(), []
    layer_of(model).get_base_layer().register_full_backward_hook(lambda *_: seen.append(1))
    model(**tiny.batch()).loss.backward()
    assert seen == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_that_calls_its_base_stays_in_the_null_space_under_autocast(tiny, dtype):
    layer = layer_of(moved(tiny.guarded(dtype=dtype), 2.0))
    layer.get_base_layer().register_forward_hook(lambda *_: None)
    Q = tiny.directions(layer)[0].T.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        with_adapter = layer(Q).float()
        layer.enable_adapters(False)
        without = layer(Q).float()
        layer.enable_adapters(True)
    assert (with_adapter - without).norm() < 1e-2 * without.norm()
    F, _G = layer.delta_factors()
    plain = (F[:, :2] @ layer.A.detach().float()).norm() / layer.base_weight().float().norm()
    assert plain > 0.1  # without the projector it would show


def test_fold_is_in_float32_under_autocast(tiny):
    layer = layer_of(moved(tiny.guarded()))
    with torch.autocast("cpu", torch.bfloat16):
        A_P = _Fold.apply(layer.A, layer.projector, False)
    assert A_P.dtype == torch.float32 and layer.leak(A_P) < 1e-6


def test_dropout_of_a_layer_that_calls_its_base(tiny):
    model = moved(tiny.guarded(dropout=0.5)).train()
    for layer in model.guarded_layers().values():
        layer.get_base_layer().register_forward_hook(lambda *_: None)
    assert not torch.equal(tiny.logits(model), tiny.logits(model))
    assert close(tiny.logits(model.eval()), tiny.logits(moved(tiny.guarded())), 1e-5)


class Rounded(nn.Linear):
    """The same products in another way, as kernels of others do."""

    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.weight) + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
def test_subclass_with_a_forward_of_its_own_is_called(tiny, residual):
    base = tiny.base("plain")
    own = Rounded(12, 20)
    own.load_state_dict(base.up.state_dict())
    base.up = own
    weight = own.weight.detach().clone()
    stats = gk.collect_statistics(base, [{"input_ids": tiny.batch()["input_ids"][:, :4]}], progress=False)
    plan = gk.plan_guard(base, stats, gk.GuardConfig(rank=2, protect=0.9), progress=False, allow_few_prompts=True)
    model = gk.attach_guard(base, plan, residual=residual)
    wanted = tiny.logits(tiny.base("plain"), "plain")
    with mock.patch.object(Rounded, "forward", autospec=True, side_effect=Rounded.forward) as called:
        assert close(tiny.logits(model, "plain"), wanted)
        assert called.call_count == 1
    with model.disable_adapter():
        assert close(tiny.logits(model, "plain"), wanted)
    tiny.train(model, kind="plain")
    moved = tiny.logits(model, "plain")
    assert not close(moved, wanted)
    model.merge_adapter()
    assert close(tiny.logits(model, "plain"), moved)
    model.unmerge_adapter()
    assert close(tiny.logits(model, "plain"), moved)
    assert torch.equal(model.unload().up.weight, weight)


def test_frozen_residual_takes_no_hooks(tiny):
    base = tiny.base()
    steer(base.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=rf"layer {LAYER}: residual=.frozen. .*hooks of its Linear"):
        gk.attach_guard(base, tiny.plan(), residual="frozen")
    model = tiny.guarded(residual="frozen")
    steer(layer_of(model).get_base_layer())
    with pytest.raises(RuntimeError, match=rf"layer {LAYER}: the base layer Linear has hooks.*W_res"):
        tiny.logits(model)


# ---- accelerate's offloading


@pytest.fixture(params=["cpu", "disk"])
def offload(request, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def apply(model):
        if request.param == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, str(tmp_path / "weights"), execution_device=torch.device("cpu"))
        return model

    return apply


def test_offloaded_base_trains_certifies_exports_and_merges(tiny, offload, tmp_path):
    model, reference = gk.attach_guard(offload(tiny.base()), tiny.plan()).eval(), tiny.guarded()
    assert layer_of(model).get_base_layer().weight.is_meta and layer_of(model).A.device.type == "cpu"
    assert close(tiny.logits(model), tiny.logits(tiny.base()))
    assert tiny.train(model) == pytest.approx(tiny.train(reference), rel=1e-5)
    drifts = [gk.certify(m, tiny.statistics()).max_drift for m in (model, reference)]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    fresh = tiny.guarded()
    fresh.load_adapter(tmp_path / "adapter")
    expected = tiny.logits(reference)
    assert close(tiny.logits(fresh), expected, 1e-5)
    with pytest.raises(ValueError, match=rf"layer {LAYER}: .*its weight is offloaded; use merge_adapter"):
        layer_of(model).merge()
    model.merge_adapter()
    assert close(tiny.logits(model), expected, 1e-5)
    model.unmerge_adapter()
    assert same_bits(layer_of(model).base_weight(), tiny.base().get_submodule(LAYER).weight.detach())
    assert close(tiny.logits(model.merge_and_unload()), expected, 1e-5)


def test_offloading_and_the_frozen_residual(tiny, offload):
    with pytest.raises(ValueError, match=r"residual=.frozen. would write into its weight, which is offloaded"):
        gk.attach_guard(offload(tiny.base()), tiny.plan(), residual="frozen")


def test_adapter_that_is_offloaded_itself_is_refused(tiny, offload, tmp_path):
    model = offload(tiny.guarded())
    for use in (
        lambda: tiny.logits(model),
        lambda: gk.certify(model, tiny.statistics()),
        lambda: gk.export_lora(model, tmp_path / "adapter"),
    ):
        with pytest.raises(
            RuntimeError,
            match=r"layer model\.layers\.0\..*: the adapter is on the meta device.*offload the base model before",
        ):
            use()


def test_model_on_the_meta_device_is_refused(tiny):
    model = tiny.guarded().to("meta")
    for use in (lambda: gk.certify(model, tiny.statistics()), lambda: gk.export_lora(model, "nowhere")):
        with pytest.raises(RuntimeError, match="adapter is on the meta device"):
            use()


def test_layer_that_no_hook_of_its_own_loads_is_refused():
    from guardspace_kernels.guard.attach import compute_device

    with pytest.raises(ValueError, match="layer a: its weight is on the meta device and no hook of its own loads it"):
        compute_device("a", nn.Linear(2, 2, device="meta"))


def test_a_layer_asks_little_in_each_forward_and_backward(tiny):
    """Of the layer and its op, in Python: what every layer of every step pays around the kernels."""
    layer = tiny.guarded().guarded_layers()[LAYER]
    x, calls = torch.randn(2, 3, 16), []

    def count(frame, event, _argument):
        file = frame.f_code.co_filename
        if (
            event == "call"
            and "guardspace_kernels" in file
            and file.endswith(("__init__.py", "_library.py", "layer.py"))
        ):
            calls.append(frame.f_code.co_name)

    layer(x).sum().backward()
    gc.disable()
    sys.setprofile(count)
    try:
        layer(x).sum().backward()
    finally:
        sys.setprofile(None)
        gc.enable()
    assert len(calls) <= 48, calls
