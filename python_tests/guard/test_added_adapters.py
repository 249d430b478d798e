"""Exported adapters added up by PEFT: which sums keep the guarantee of a plan, and that certify knows."""

import copy

import peft
import pytest
import torch
from guard_helpers import MODELS, PROMPTS, collect, hand_made, perturb, plan_for, weight_of

import guardspace_kernels as gk

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WEIGHTS = [0.7, -0.4]


class Sums:
    """Two adapters of one plan, one of another and one without a guard, in one PeftModel."""

    def __init__(self, kind, folder, dtype=torch.float32, **config):
        self.base = MODELS[kind]()
        self.stats = collect(self.base)
        self.plan = plan_for(self.base, self.stats, **config)
        other = plan_for(self.base, self.stats, **{**config, "protect": 0.6})
        fan = kind == "gpt2"
        lora = peft.LoraConfig(r=3, target_modules=[*self.plan.layers], fan_in_fan_out=fan, init_lora_weights=False)
        for seed, (name, plan) in enumerate({"one": self.plan, "two": self.plan, "other": other}.items(), 1):
            guarded = perturb(gk.attach_guard(copy.deepcopy(self.base), plan), seed=seed)
            gk.export_lora(guarded, folder / name, dtype=dtype)
        peft.get_peft_model(copy.deepcopy(self.base), lora).save_pretrained(folder / "plain")
        self.model = peft.PeftModel.from_pretrained(copy.deepcopy(self.base), folder / "one", adapter_name="one")
        for name in ("two", "other", "plain"):
            self.model.load_adapter(folder / name, name)

    def add(self, kind, names=("one", "two"), weights=WEIGHTS, **options):
        self.model.add_weighted_adapter(list(names), weights, f"{kind} of {names}", kind, **options)
        self.model.set_adapter(f"{kind} of {names}")

    def certify(self):
        return gk.certify(self.model, self.stats, plan=self.plan)

    def changes(self):
        """Layer -> ΔW in float64, by merging."""
        merged = copy.deepcopy(self.model).double().merge_and_unload()
        return {name: weight_of(merged, name) - weight_of(self.base, name) for name in self.plan.layers}


@pytest.mark.parametrize("config", [{}, {"init": "zero"}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["cat", "linear", "svd", "svd of more ranks than the sum has"])
def test_sums_of_one_plan_are_certified(kind, how, config, tmp_path):
    sums = Sums(kind, tmp_path, **config)
    sums.add(how.split()[0], **({"svd_rank": 12} if " " in how else {}))
    report = sums.certify()
    inputs = hand_made(sums.base, PROMPTS, sums.stats.layers)
    for row, (name, change) in zip(report.layers, sums.changes().items(), strict=True):
        X, W = inputs[name][0], weight_of(sums.base, name)
        assert row.name == name
        assert row.drift == pytest.approx(float((X @ change.T).norm() / (X @ W.T).norm()), rel=1e-4)
        assert 1e-4 < row.drift <= row.bound and row.sink_drift < 1e-5
    assert report.notes == []


def test_a_cat_is_the_sum_and_a_linear_one_is_not(tmp_path):
    """Both keep the guarantee; what they are worth for the task is another question."""
    sums = Sums("llama", tmp_path)
    parts = []
    for name in ("one", "two"):
        sums.model.set_adapter(name)
        parts.append(sums.changes())
    added = {name: WEIGHTS[0] * parts[0][name] + WEIGHTS[1] * parts[1][name] for name in sums.plan.layers}
    errors = {}
    for how in ("cat", "svd", "linear"):
        sums.add(how, **({"svd_rank": 12} if how == "svd" else {}))
        found = sums.changes()
        errors[how] = max(float((found[n] - added[n]).norm() / added[n].norm()) for n in added)
    assert errors["cat"] < 1e-6 and errors["svd"] < 1e-5 < 0.1 < errors["linear"]


@pytest.mark.parametrize("how", ["cat", "linear", "svd"])
@pytest.mark.parametrize("mixed_in", ["other", "plain"])
def test_another_plan_or_none_mixed_in_is_refused(how, mixed_in, tmp_path):
    sums = Sums("llama", tmp_path, init="zero")  # so that all have one rank, which linear needs
    sums.add(how, ("one", mixed_in), [1.0, 0.01])
    with pytest.raises(
        ValueError, match=r"^layer \S+: the adapter acts outside the null space .*of one plan in float32"
    ):
        sums.certify()
    report = gk.certify(sums.model, sums.stats)  # of a plain LoRA: numbers, and no promise
    assert report.notes == ["no projector: an ordinary adapter, whose drift is bounded only by its norm"]


def test_two_adapters_switched_on_together_are_refused(tmp_path):
    sums = Sums("llama", tmp_path)
    sums.model.base_model.set_adapter(["one", "plain"])
    with pytest.raises(ValueError, match=r"exactly one LoRA adapter must be active, got \['one', 'plain'\]"):
        sums.certify()


@pytest.mark.parametrize("how", ["ties", "magnitude_prune", "dare_linear"])
def test_ways_that_drop_entries_leave_the_null_space(how, tmp_path):
    sums = Sums("llama", tmp_path)
    sums.add(how, density=0.5)
    with pytest.raises(ValueError, match="the adapter acts outside the null space"):
        sums.certify()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_rounded_is_certified_alone_and_refused_in_sums(dtype, tmp_path):
    """PEFT loads into float32, where a sum no longer shows that its parts were rounded."""
    sums = Sums("llama", tmp_path, dtype)
    sums.model.set_adapter("one")
    layer = sums.model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.lora_A["one"].weight.dtype == torch.float32
    assert sums.certify().max_drift > 1e-3
    sums.add("cat")
    with pytest.raises(ValueError, match="made of adapters that had been rounded"):
        sums.certify()


def test_a_large_row_that_acts_on_nothing_hides_no_other(tmp_path):
    sums = Sums("llama", tmp_path)
    sums.model.set_adapter("one")
    layer = sums.model.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        A, B = layer.lora_A["one"].weight, layer.lora_B["one"].weight
        A[0] *= 1e7
        B[:, 0] = 0
        A[1] += 0.1 * A[1].flip(0)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: the adapter acts outside the null space"):
        sums.certify()
