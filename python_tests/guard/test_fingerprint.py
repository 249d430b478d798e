import copy
import json

import peft
import pytest
import torch
from guard_helpers import PlainModel, batch_of, collect, plan_for, tiny_gpt2, tiny_llama, weight_of
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.guard import fingerprint
from guardspace_kernels.guard.fingerprint import ModelFingerprint, TensorMark, tensor_fingerprint
from guardspace_kernels.guard.layers import find_layers, linear_weight

LLAMA_LAYERS = list(find_layers(tiny_llama()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensor_fingerprint_depends_on_the_bits_only(dtype):
    t = torch.randn(70, 90).to(dtype)
    mark = tensor_fingerprint(t)
    assert mark == tensor_fingerprint(t.clone())
    assert mark == tensor_fingerprint(t.T.contiguous().T)  # other strides
    buffer = torch.zeros(t.numel() + 1, dtype=dtype)
    buffer[1:] = t.reshape(-1)
    assert mark == tensor_fingerprint(buffer[1:].view(70, 90))  # unaligned, as in a flat buffer
    for position in ((0, 0), (69, 89), (35, 1)):
        changed = t.clone()
        changed[position] = torch.nextafter(changed[position], changed.new_tensor(9.0))
        assert mark != tensor_fingerprint(changed)
    assert mark != tensor_fingerprint(t.flip(0)) and mark != tensor_fingerprint(t.flip(1))
    assert mark != tensor_fingerprint(t.reshape(90, 70))
    swapped = t.clone()
    swapped[0, :2] = t[0, :2].flip(0)
    assert mark != tensor_fingerprint(swapped)


def test_tensor_fingerprint_of_odd_tensors():
    kinds = [torch.zeros(()), torch.zeros(0), torch.zeros(0, 3), torch.zeros(3), torch.zeros(3).half()]
    assert len({tensor_fingerprint(t) for t in kinds}) == len(kinds)
    assert tensor_fingerprint(torch.tensor([1.0, 2.0])) != tensor_fingerprint(torch.tensor([2.0, 1.0]))
    with pytest.raises(ValueError, match="on the meta device: load the model first"):
        tensor_fingerprint(torch.zeros(2, device="meta"))


def test_model_fingerprint_of_a_copy_and_of_changed_models():
    model = tiny_llama(tied=True)
    mine = ModelFingerprint.of(model, LLAMA_LAYERS)
    mine.check(ModelFingerprint.of(copy.deepcopy(model), LLAMA_LAYERS), "the statistics")
    mine.check(ModelFingerprint.of(tiny_llama(tied=True), LLAMA_LAYERS[3:5]), "the statistics")  # a subset

    for part, where in [
        ("model.layers.1.mlp.up_proj", r"layer model\.layers\.1\.mlp\.up_proj differs\. They"),
        ("model.embed_tokens", "a weight outside the guarded layers differs"),
        ("model.norm", "a weight outside the guarded layers differs"),
    ]:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_submodule(part).weight.view(-1)[7] += 1e-3
        with pytest.raises(ValueError, match=f"the statistics belong to another model: {where}"):
            mine.check(ModelFingerprint.of(other, LLAMA_LAYERS), "the statistics")
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj differs \(and 13 more\)"):
        mine.check(ModelFingerprint.of(tiny_llama(seed=1, tied=True), LLAMA_LAYERS), "the statistics")


def test_fingerprint_of_tied_layers():
    model = PlainModel(d=8)
    model.k.weight = model.q.weight
    mine = ModelFingerprint.of(model, ["q", "k"])
    assert mine.layers["q"] == mine.layers["k"]
    assert torch.equal(weight_of(model, "k"), linear_weight(model.k).double())


FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def test_hashes_of_today_are_those_of_tomorrow():
    """Files hold them: a change needs a new version."""
    t = torch.arange(5000, dtype=torch.float32).reshape(50, 100) / 7
    assert tensor_fingerprint(t) == "9385a8d156aaad8da8bc55fc4cd229c2"
    assert TensorMark.of(t) == TensorMark(
        (50, 100),
        ("float32",),
        {
            "bfloat16": "32e1c6e3f9af6d18231656d599b00960",
            "float16": "f7e8b5e890b0056173b276c3efd30321",
            "float32": "7d200c7659fc4a749133ca6ddfb23574",
        },
    )


@pytest.mark.parametrize("narrow", FLOATS)
def test_a_lossless_cast_has_the_same_mark(narrow):
    t = torch.randn(70, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(narrow)
    t[0, :5] = torch.tensor([0.0, -0.0, float("inf"), 2.0**-20, 2.0**-40])  # the last is zero in float16
    marks = [TensorMark.of(t.to(wide)) for wide in FLOATS if wide == narrow or wide.itemsize > narrow.itemsize]
    assert all(mark == marks[0] for mark in marks) and marks[0].exact == (str(narrow).removeprefix("torch."),)
    assert all(mark.difference(marks[0]) == "" for mark in marks)


@pytest.mark.parametrize("wide", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_told_from_a_change(wide):
    t = torch.randn(70, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(wide)
    t[0, 0] = 2.0**-24 / 3  # below what float16 resolves
    original = TensorMark.of(t)
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        rounded = t.to(narrow)
        if torch.equal(rounded.to(t.dtype), t):
            continue
        name = str(narrow).removeprefix("torch.")
        # Also where it was widened again, and whatever else holds the rounded values.
        for held in (rounded, rounded.float(), rounded.double()):
            assert TensorMark.of(held).difference(original) == f"rounded to {name}"
        held = rounded.double()
        held[5, 5] += 1e-3
        assert TensorMark.of(held).difference(original) == "changed"
    assert original.difference(TensorMark.of(t.bfloat16())) in ("", "changed")  # nothing gains precision
    assert TensorMark.of(t[:60]).difference(original) == "resized from (70, 90) to (60, 90)"


def test_a_rounding_that_two_dtypes_hold_is_recognised():
    t = torch.full((3, 3), 1.0 + 2.0**-20)
    ones = TensorMark.of(torch.ones(3, 3))
    assert ones.exact == ("bfloat16", "float16") and ones.difference(TensorMark.of(t)) == "rounded to bfloat16"
    t[0, 0] = 1.0 + 2.0**-9  # rounds in bfloat16, and is float16's
    assert TensorMark.of(t.half()).difference(TensorMark.of(t)) == "rounded to float16"


@pytest.mark.parametrize("dtype", FLOATS)
def test_marks_do_not_depend_on_strides_blocks_or_threads(dtype, monkeypatch):
    t = torch.randn(70, 90).to(dtype)
    mark, threads = TensorMark.of(t), torch.get_num_threads()
    buffer = torch.zeros(t.numel() + 1, dtype=dtype)
    buffer[1:] = t.reshape(-1)
    assert mark == TensorMark.of(t.T.contiguous().T) == TensorMark.of(buffer[1:].view(70, 90))
    monkeypatch.setattr(fingerprint, "_CPU_BLOCK", 4 * 512)
    try:
        torch.set_num_threads(1)
        assert mark == TensorMark.of(t)
    finally:
        torch.set_num_threads(threads)
    for position in ((0, 0), (69, 89), (35, 1)):
        changed = t.clone()
        changed[position] = torch.nextafter(changed[position], changed.new_tensor(9.0))
        assert mark.value != TensorMark.of(changed).value
    assert mark.value != TensorMark.of(t.flip(0)).value != TensorMark.of(t.flip(1)).value
    assert mark.value != TensorMark.of(t.reshape(90, 70)).value


def test_marks_of_odd_tensors():
    kinds = [torch.zeros(()), torch.zeros(0), torch.zeros(0, 3), torch.zeros(3), torch.ones(3), torch.zeros(3).long()]
    kinds += [torch.zeros(3).bool(), torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.float8_e4m3fn)]
    assert len({TensorMark.of(t).value for t in kinds}) == len(kinds)
    nan = torch.tensor([1.0, float("nan")])
    assert TensorMark.of(nan).difference(TensorMark.of(nan.clone())) == ""
    with pytest.raises(ValueError, match="on the meta device: load the model first"):
        TensorMark.of(torch.zeros(2, device="meta"))


def test_every_parameter_and_persistent_buffer_counts():
    class Normed(PlainModel):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("made_by_code", torch.zeros(3), persistent=False)

    mine = ModelFingerprint.of(Normed(), ["q"])
    assert {"norm.running_mean", "norm.weight", "embed.weight", "q.bias"} < set(mine.weights)
    assert "made_by_code" not in mine.weights
    other = Normed()
    other.norm.running_var.mul_(2.0)
    other.embed = nn.Embedding(62, 10)
    other.head = nn.Linear(2, 2, bias=False)
    other.out.bias = None
    changes = mine.differences(ModelFingerprint.of(other, ["q"]))
    assert changes == {
        "embed.weight": "resized from (60, 10) to (62, 10)",
        "head.weight": "added",
        "norm.running_var": "changed",
        "out.bias": "missing",
    }
    with pytest.raises(
        ValueError, match=r"outside the guarded layers differs: embed\.weight resized .* \(and 3 more\)"
    ):
        mine.check_model(other, ["q"], "the statistics")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_adapters_do_not_change_the_fingerprint_of_their_base(make):
    model = make()
    layers = list(find_layers(model))
    mine = ModelFingerprint.of(model, layers)
    guarded = gk.attach_guard(copy.deepcopy(model), plan_for(model))
    config = peft.LoraConfig(
        target_modules=[layers[0].rsplit(".", 1)[1]],
        modules_to_save=["lm_head"],
        trainable_token_indices=[3, 5],
        fan_in_fan_out=make is tiny_gpt2,
    )
    plain = peft.get_peft_model(copy.deepcopy(model), config)
    for adapted in (guarded, plain):
        assert ModelFingerprint.of(adapted, layers) == mine
        assert ModelFingerprint.of(adapted, layers, adapted=True) == mine
    old = ModelFingerprint.of(model, layers, version=1)
    assert ModelFingerprint.of(plain, layers, version=1) == old and old.weights is None
    head, tokens = (name for name in mine.weights if "embed" in name or "wte" in name or "lm_head" in name)
    if "lm_head" not in head:
        head, tokens = tokens, head
    with torch.no_grad():  # what takes the place of base weights while the adapter is active
        for name, parameter in plain.named_parameters():
            if "modules_to_save.default" in name or "trainable_tokens_delta.default" in name:
                parameter.add_(1.0)
    assert ModelFingerprint.of(plain, layers) == mine
    assert set(mine.differences(ModelFingerprint.of(plain, layers, adapted=True))) == {head, tokens}
    with plain.disable_adapter():
        assert ModelFingerprint.of(plain, layers, adapted=True) == mine


def test_other_adapters_are_named():
    model = tiny_llama()
    mine = ModelFingerprint.of(model, [])
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    changes = mine.differences(ModelFingerprint.of(peft.get_peft_model(copy.deepcopy(model), config), []))
    assert set(changes.values()) == {"added"} and "model.layers.0.self_attn.k_proj.ia3_l.default" in changes
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    changes = mine.differences(ModelFingerprint.of(peft.get_peft_model(model, prompt), []))
    assert "prompt_encoder.default.embedding.weight" in changes and set(changes.values()) == {"added"}


def test_a_widened_model_takes_the_same_statistics_and_plan():
    model = tiny_llama(dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = 2.0**-40  # zero in float16
    stats = collect(model)
    wide = copy.deepcopy(model).float()
    plan = plan_for(wide, stats)
    assert gk.certify(gk.attach_guard(wide, plan), stats, max_drift=1e-6).notes == []
    gk.attach_guard(copy.deepcopy(model).double(), plan)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj differs, rounded to float16"):
        gk.attach_guard(model.half(), plan)
    narrow = tiny_llama()
    stats = collect(narrow)
    with pytest.raises(ValueError, match=r"differs, rounded to bfloat16 \(and 13 more\)\. They are bound"):
        plan_for(narrow.bfloat16(), stats)


def test_files_with_fingerprints_of_the_first_version(tmp_path):
    model = tiny_llama()
    each = {name: tensor_fingerprint(p) for name, p in sorted(model.named_parameters(remove_duplicate=False))}
    old = {
        "model": fingerprint._hash_of(each),
        "layers": {name: each[f"{name}.weight"] for name in LLAMA_LAYERS},
    }
    made = collect(model)
    gk.CalibrationStatistics(made.inputs, ModelFingerprint(**old), made.prompts).save(tmp_path / "stats")
    stats = gk.CalibrationStatistics.load(tmp_path / "stats")
    assert stats.fingerprint.version == 1 and stats.fingerprint.to_header() == old
    plan = plan_for(model, stats)
    plan.save(tmp_path / "plan")
    loaded = gk.GuardPlan.load(tmp_path / "plan")
    assert loaded.model.version == 1 and loaded.fingerprint == plan.fingerprint

    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-3
    with pytest.raises(ValueError, match=r"a weight outside the guarded layers differs\. They are bound"):
        gk.attach_guard(other, loaded)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj differs \(and 13 more\)"):
        gk.attach_guard(tiny_llama().double(), loaded)  # the first version knew bits, not values
    guarded = gk.attach_guard(model, loaded)
    assert gk.certify(guarded, stats).max_drift < 1e-6
    with pytest.raises(ValueError, match="cannot be compared: fingerprints of versions 1 and 2; collect statistics"):
        stats.merge(collect(tiny_llama()))


def test_a_tensor_that_cannot_be_read_is_named():
    class Opaque(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError(f"{func} is not there")

    model = PlainModel()
    model.register_buffer("opaque", torch.Tensor._make_subclass(Opaque, torch.zeros(60, 10)))
    with pytest.raises(TypeError, match="weight opaque is a Opaque, whose values cannot be read; load the model"):
        ModelFingerprint.of(model, [])


def test_headers_that_contradict_themselves_are_refused():
    header = ModelFingerprint.of(tiny_llama(), LLAMA_LAYERS).to_header()
    assert ModelFingerprint.from_header(json.loads(json.dumps(header))).to_header() == header

    def altered(change):
        copied = json.loads(json.dumps(header))
        change(copied)
        return copied

    name = "model.norm.weight"
    for change, match in [
        (lambda h: h.update(version=3), r"model\.version is 3; this library reads 2, or none"),
        (lambda h: h.update(model="0" * 32), "contradicts itself; it was altered"),
        (lambda h: h["layers"].update({LLAMA_LAYERS[0]: "0" * 32}), "contradicts itself"),
        (lambda h: h["layers"].update(nowhere="0" * 32), "contradicts itself"),
        (lambda h: h["weights"].pop(name), "contradicts itself"),
        (lambda h: h["weights"][name].pop("exact"), r"model\.weights\.model\.norm\.weight lacks exact"),
        (lambda h: h["weights"][name].update(exact=[]), r"norm\.weight\.exact must be a list of 1 or more"),
        (lambda h: h["weights"][name].update(exact=["float64"]), r"norm\.weight lacks a hash of float64"),
        (lambda h: h.pop("layers"), "model lacks layers"),
    ]:
        with pytest.raises(ValueError, match=match):
            ModelFingerprint.from_header(altered(change), "model")
    with pytest.raises(ValueError, match=r"fingerprint must be an object, got \['model'\]"):
        ModelFingerprint.from_header(["model"])


def test_marks_are_made_of_a_model_whose_weights_were_rounded():
    model = tiny_llama()
    mine = ModelFingerprint.of(model, LLAMA_LAYERS)
    for dtype in (torch.bfloat16, torch.float16):
        changes = mine.differences(ModelFingerprint.of(copy.deepcopy(model).to(dtype), LLAMA_LAYERS))
        # Weights of ones, as norms start, lose nothing.
        assert set(changes.values()) == {f"rounded to {str(dtype).removeprefix('torch.')}"}
        assert {f"{name}.weight" for name in LLAMA_LAYERS} < set(changes)
    assert collect(model, [batch_of()]).fingerprint == mine


@pytest.mark.parametrize("threads", [1, 3])
def test_large_weights_are_marked_side_by_side_and_nothing_else_changes(threads, monkeypatch):
    model, before, seen = nn.Sequential(nn.Linear(256, 200), nn.Linear(200, 256)), torch.get_num_threads(), []
    model[1].weight = nn.Parameter(torch.arange(51200.0).view(256, 200) / 7)
    mark_of = TensorMark.of
    monkeypatch.setattr(TensorMark, "of", lambda t: seen.append((t.numel(), torch.get_num_threads())) or mark_of(t))
    torch.set_num_threads(threads)
    try:
        found = ModelFingerprint.of(model, ["0", "1"])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert sorted(seen) == [(200, threads), (256, threads), (51200, 1), (51200, 1)]
    assert found.weights == {name: mark_of(p) for name, p in model.named_parameters()}
    assert list(found.weights) == [name for name, _ in model.named_parameters()]
