"""What plain PEFT makes of a folder is what is certified, whatever was done to the folder."""

import copy
import dataclasses
import json
import shutil

import peft
import pytest
import torch
from guard_helpers import PROMPTS, collect, hand_made, perturb, plan_for, tiny_llama, weight_of
from safetensors.torch import load_file, save_file

import guardspace_kernels as gk
from guardspace_kernels.integrations.deployed import check_adapter_folder, deployed_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def stats(base):
    return collect(base)


@pytest.fixture(scope="module")
def plan(base, stats):
    return plan_for(base, stats)


@pytest.fixture(scope="module")
def saved(base, plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed") / "adapter"
    perturb(gk.attach_guard(copy.deepcopy(base), plan)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def configure(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change):
    tensors = {name: t.clone() for name, t in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def certified(base, folder, stats, **options):
    return gk.certify(deployed_adapter(copy.deepcopy(base), folder), stats, **options)


def true_drift(base, folder, stats):
    """Name -> relative drift of merging by PEFT alone, in float64, on hand-made inputs."""
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).double().merge_and_unload()
    made, found = hand_made(base, PROMPTS, stats.layers), {}
    for name in stats.layers:
        X, W = made[name][0], weight_of(base, name)
        found[name] = float((X @ (weight_of(merged, name) - W).T).norm() / (X @ W.T).norm())
    return found


def test_a_saved_folder_is_what_the_guarded_model_was(base, stats, plan, folder):
    report = certified(base, folder, stats, plan=plan, max_drift=10.0)
    guarded = gk.attach_guard(copy.deepcopy(base), plan)
    guarded.load_adapter(folder)
    for a, b in zip(report.layers, gk.certify(guarded, stats).layers, strict=True):
        assert a.drift == pytest.approx(b.drift, rel=1e-4) and a.bound == pytest.approx(b.bound, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 6000},
        {"use_rslora": True},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 60}},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 12}},
    ],
)
def test_scalings_are_those_that_peft_applies(base, stats, plan, folder, changes):
    before = certified(base, folder, stats, plan=plan)
    configure(folder, **changes)
    report = certified(base, folder, stats, plan=plan)
    truth = true_drift(base, folder, stats)
    for row in report.layers:
        assert row.drift == pytest.approx(truth[row.name], rel=1e-4)
    assert report.layers != before.layers
    with pytest.raises(gk.DriftExceededError):
        certified(base, folder, stats, plan=plan, max_drift=0.99 * max(truth.values()))


def add_head(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))


def add_tokens(tensors):
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = rows


def add_norm(tensors):
    tensors["base_model.model.model.norm.weight"] = torch.full((32,), 2.0)


@pytest.mark.parametrize(
    "changes, change, name",
    [
        ({"modules_to_save": ["lm_head"]}, add_head, "lm_head.weight"),
        ({}, add_head, "lm_head.weight"),  # PEFT loads it into the base model
        ({}, add_norm, "model.norm.weight"),
        ({"trainable_token_indices": [3, 5]}, add_tokens, "model.embed_tokens.weight"),
    ],
)
def test_weights_beside_the_factors_are_named(base, stats, plan, folder, changes, change, name):
    configure(folder, **changes)
    rewrite(folder, change)
    for options in ({}, {"plan": plan}):
        assert certified(base, folder, stats, **options).changed == {name: "changed"}
        with pytest.raises(gk.DriftExceededError, match=f"{name} .changed. beside the adapter: nothing is promised"):
            certified(base, folder, stats, max_drift=1e9, **options)


def add_magnitudes(tensors):
    for name, B in list(tensors.items()):
        if "lora_B" in name:
            tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = B.norm(dim=1) + 1


def add_biases(tensors):
    for name, B in list(tensors.items()):
        if "lora_B" in name:
            tensors[name.replace("weight", "bias")] = B[:, 0].clone()


@pytest.mark.parametrize(
    "changes, change, match",
    [
        ({"use_dora": True}, None, r"lacks .*lora_magnitude_vector.*, which starts at random"),
        ({"use_dora": True}, add_magnitudes, r"q_proj: only plain LoRA changes the weight by B A; DoRA"),
        ({"lora_bias": True}, None, r"lacks .*lora_B\.default\.bias, which starts at random"),
        ({"lora_bias": True}, add_biases, r"q_proj: its adapter has a bias \(lora_bias\)"),
        ({"modules_to_save": ["lm_head"]}, None, r"cannot be loaded onto the model by PEFT: KeyError"),
        ({"trainable_token_indices": [3, 5]}, None, r"cannot be loaded onto the model by PEFT: KeyError"),
        ({"target_modules": ["q_proj"]}, None, r"holds .*lora_A.*, for which its configuration has no place"),
        ({"exclude_modules": ["q_proj"]}, None, r"holds .*q_proj\.lora_A.*, for which its configuration has no place"),
        ({"layers_to_transform": [0]}, None, r"holds .*layers\.1\..*, for which its configuration has no place"),
        ({"layer_replication": [[0, 2], [1, 2]]}, None, r"lacks .*layers\.2\..*, which starts at random"),
        ({"r": 5}, None, r"cannot be loaded onto the model by PEFT: RuntimeError"),
        ({"future_gain": 2.0}, None, r"has the field 'future_gain', which this version of PEFT ignores"),
        ({"peft_type": "LOHA"}, None, r"is of peft_type 'LOHA'; a LoRA is needed"),
        ({"task_type": "NOTHING"}, None, r"cannot be loaded onto the model by PEFT: ValueError: Invalid task type"),
        (
            {},
            lambda t: t.update({Q + ".lora_C.weight": torch.ones(1)}),
            r"holds .*lora_C\.weight, for which its config",
        ),
        ({}, lambda t: t.update({Q + ".weight": torch.ones(32, 32)}), r"holds .*q_proj\.weight, for which its"),
        ({}, lambda t: t.pop(Q + ".lora_B.weight"), r"lacks .*q_proj\.lora_B\.default\.weight, which starts at random"),
        ({}, lambda t: t[Q + ".lora_A.weight"].fill_(float("nan")), r"q_proj: the adapter holds non-finite values"),
        ({}, lambda t: t[Q + ".lora_A.weight"].add_(0.1), r"q_proj: the adapter acts outside the null space"),
    ],
)
def test_what_cannot_be_judged_is_refused_by_name(base, stats, plan, folder, changes, change, match):
    configure(folder, **changes)
    if change is not None:
        rewrite(folder, change)
    with pytest.raises(ValueError, match=match):
        certified(base, folder, stats, plan=plan, max_drift=1e9)


# Values of every field of a LoRA's configuration that a folder may be given without any other change.
VALUES = {
    "alora_invocation_tokens": [[3, 7]],
    "alpha_pattern": [{"q_proj": 60}],
    "arrow_config": [{}],
    "auto_mapping": [{"base_model_class": "X", "parent_library": "os"}],
    "base_model_name_or_path": ["x/y"],
    "bias": ["all", "lora_only"],
    "corda_config": [{}],
    "ensure_weight_tying": [True],
    "eva_config": [{}],
    "exclude_modules": [["q_proj"], ".*q_proj"],
    "fan_in_fan_out": [True],
    "inference_mode": [False],
    "init_lora_weights": ["pissa", "olora", "gaussian", "eva", "corda", "loftq", "orthogonal", "kasa", False],
    "kasa_config": [{}],
    "layer_replication": [[[0, 2], [0, 2]]],
    "layers_pattern": ["layers"],
    "layers_to_transform": [[0], 0],
    "loftq_config": [{"loftq_bits": 4}],
    "lora_alpha": [1, 6000],
    "lora_bias": [True],
    "lora_dropout": [0.5],
    "lora_ga_config": [{}],
    "megatron_config": [{}],
    "megatron_core": ["x"],
    "modules_to_save": [["lm_head"], ["norm"]],
    "monteclora_config": [{}],
    "peft_type": ["LOHA"],
    "peft_version": ["0.1"],
    "qalora_group_size": [4],
    "r": [7],
    "rank_pattern": [{"q_proj": 6}, {"q_proj": 2}],
    "revision": ["abc"],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "target_modules": ["all-linear", ["q_proj"], ".*"],
    "target_parameters": [["mlp.gate_proj.weight"]],
    "task_type": ["SEQ_CLS", None, "FEATURE_EXTRACTION"],
    "trainable_token_indices": [[1, 2]],
    "use_bdlora": [{}],
    "use_dora": [True],
    "use_qalora": [True],
    "use_rslora": [True],
    "velora_config": [{}],
}


@torch.no_grad()
def logits(base, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(torch.tensor([PROMPTS[0]])).logits


@pytest.fixture(scope="module")
def judged(base, stats, saved):
    return certified(base, saved, stats).layers, logits(base, saved)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(peft.LoraConfig)])
def test_no_field_changes_the_model_and_not_the_certificate(base, stats, folder, judged, field):
    settings = json.loads((folder / CONFIG).read_text())
    for value in VALUES[field]:  # a field that PEFT has added is to be thought about
        configure(folder, **{**settings, field: value})
        try:
            report = certified(base, folder, stats)
        except (ValueError, RuntimeError):
            continue  # refused
        if report.layers == judged[0] and not report.failure():
            assert torch.equal(logits(base, folder), judged[1]), value
        else:
            truth = true_drift(base, folder, stats)
            assert [row.drift for row in report.layers] == pytest.approx(list(truth.values()), rel=1e-4), value


@pytest.mark.parametrize("name", ["adapter_model.bin", "new_embeddings.safetensors"])
def test_files_that_other_loaders_take_are_refused(folder, name):
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"holds {name} too, which other loaders take instead; remove one of them"):
        check_adapter_folder(folder)


@pytest.mark.parametrize(
    "text, match",
    [
        ("{", "is no configuration of PEFT: Expecting property name"),
        ("[1]", "is no configuration of PEFT: 'peft_type' is missing"),
        ("{}", "is no configuration of PEFT: 'peft_type' is missing"),
        ("[" * 100000, "is no configuration of PEFT: maximum recursion"),
    ],
)
def test_a_broken_configuration_is_refused(base, folder, text, match):
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=match):
        deployed_adapter(base, folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_not_looked_for_elsewhere(base, folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}; "):
        deployed_adapter(base, folder)


def test_fields_of_a_later_peft_that_are_off_are_no_matter(folder):
    configure(folder, later=None, latest=False, last={})
    assert check_adapter_folder(folder)["later"] is None
