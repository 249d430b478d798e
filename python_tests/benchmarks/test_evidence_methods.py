from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import guardspace_kernels as gk
from benchmarks.evidence import cells, curves, running
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.methods.base import factors
from benchmarks.evidence.setting import Setting, energy, linear_weights

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
EXAMPLES = [([3, 4, 5], [6, 1]), ([7, 8], [9, 10, 1]), ([11] * 6, [12, 1]), ([5, 9], [6, 1])] * 2


class TinySetting(Setting):
    """A tiny model instead of the aligned one; the rest is the setting's own."""

    def __init__(self):
        self.pad, self._lowest = 1, None
        torch.manual_seed(0)
        self.before, self.aligned = (
            LlamaForCausalLM(LlamaConfig(vocab_size=20, initializer_range=0.2, **SIZES)).eval() for _ in range(2)
        )
        with torch.no_grad():  # the alignment moved each weight by a matrix of rank 2
            for name, module in self.aligned.named_modules():
                if isinstance(module, torch.nn.Linear):
                    d_out, d_in = module.weight.shape
                    base = self.before.get_submodule(name).weight
                    module.weight.copy_(base + 0.1 * torch.randn(d_out, 2) @ torch.randn(2, d_in))

    def load(self):
        model = LlamaForCausalLM(self.aligned.config).eval().requires_grad_(False)
        model.load_state_dict(self.aligned.state_dict())
        return model

    base_weights = property(lambda self: linear_weights(self.before))

    @property
    def calibration(self):
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(2, 20, (5,), generator=generator).tolist() for _ in range(20)]

    @property
    def refusals(self):
        return [(prompt, [2, 3, 1]) for prompt in self.calibration]

    @property
    def statistics(self):
        return self.__dict__.setdefault(
            "collected", gk.collect_statistics(self.load(), self.batches(self.calibration), progress=False)
        )

    def plan(self, **options):
        config = gk.GuardConfig(rank=8, alpha=16, **options)
        return gk.plan_guard(self.load(), self.statistics, config, allow_few_prompts=True)


@pytest.fixture(scope="module")
def setting():
    return TinySetting()


def trained(setting, name, knob=None, steps=4):
    method = METHODS[name](setting, METHODS[name].knobs[0] if knob is None else knob, 0)
    model = method.build()
    one = cells.Cell("tiny", name, 0, "task", "0", 0, steps)
    told = running.train(model, method, EXAMPLES, one)
    return method, model, told


def change(setting, model):
    return {name: W - setting.weights[name] for name, W in linear_weights(model.merge_and_unload()).items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_at_the_aligned_model_and_trains(setting, name):
    method = METHODS[name](setting, METHODS[name].knobs[0], 0)
    start = change(setting, method.build())
    assert max(float(W.abs().max()) for W in start.values()) < 1e-5
    _, model, told = trained(setting, name)
    assert len(told["losses"]) == 4
    assert told["trained_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert max(float(W.abs().max()) for W in change(setting, model).values()) > 1e-5


def test_drift_is_the_norm_of_what_the_layers_put_out_of_calibration_tokens(setting):
    _, model, _ = trained(setting, "plain LoRA")
    merged = model.merge_and_unload()
    name = "model.layers.0.mlp.down_proj"
    inputs = []
    base = setting.load()
    base.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0][:, 1:].flatten(0, 1)))
    base(torch.tensor(setting.calibration))
    X, W, after = inputs[0], setting.weights[name], linear_weights(merged)[name]
    relative, norm = setting.drift(merged)[name]
    assert relative == pytest.approx(float((X @ (after - W).T).norm() / (X @ W.T).norm()), rel=1e-3)
    assert norm == pytest.approx(float((after - W).norm()))
    assert energy(W, X.T @ X) == pytest.approx(float((X @ W.T).square().sum()), rel=1e-4)


def test_replay_adds_the_loss_of_refusals(setting):
    method = METHODS["replay"](setting, 2, 0)
    model = method.build()
    rows = method.safety_rows(2, 0)
    with torch.no_grad():
        expected = method.cross_entropy(model, EXAMPLES[:2]) + method.cross_entropy(model, rows)
        assert torch.equal(method.loss(model, EXAMPLES[:2]), expected)
        assert not torch.equal(method.loss(model, EXAMPLES[:2]), expected)  # other rows come next
    count = len(setting.refusals)
    assert sorted(row for step in range(count) for row in method.safety_rows(1, step)) == sorted(setting.refusals)


def test_asft_penalises_what_leaves_the_direction_of_the_alignment(setting):
    method, model, _ = trained(setting, "AsFT", 10.0)
    expected = method.cross_entropy(model, EXAMPLES)
    for name, (A, B) in factors(model).items():
        V = setting.weights[name] - setting.base_weights[name]
        C = V @ V.T / V.norm()
        expected = expected + 10.0 * ((B - C @ B) @ A).square().sum()
    torch.testing.assert_close(method.loss(model, EXAMPLES), expected)


def test_safe_lora_projects_the_layers_that_point_elsewhere(setting):
    method, model, _ = trained(setting, "plain LoRA")
    before = {name: (A.clone(), B.clone()) for name, (A, B) in factors(model).items()}
    cosines = {}
    for name, (A, B) in before.items():
        V = setting.weights[name] - setting.base_weights[name]
        cosines[name] = float(torch.cosine_similarity((V @ V.T @ B @ A).flatten(), (B @ A).flatten(), dim=0).detach())
    threshold = sorted(cosines.values())[3]
    METHODS["Safe LoRA"](setting, threshold + 1e-6, 0).change_trained(model)
    for name, (A, B) in factors(model).items():
        V = setting.weights[name] - setting.base_weights[name]
        old = before[name][1]
        expected = V @ (V.T @ old) / V.norm() if cosines[name] <= threshold else old
        torch.testing.assert_close(B, expected)
        assert torch.equal(A, before[name][0])
    assert method.name == METHODS["Safe LoRA"].after


def test_sbr_holds_the_hidden_states_of_anchors(setting):
    method = METHODS["SBR"](setting, 50.0, 0)
    model = method.build()
    with torch.no_grad():
        torch.testing.assert_close(method.loss(model, EXAMPLES), method.cross_entropy(model, EXAMPLES))
    method, model, _ = trained(setting, "SBR")
    prompts = sorted(setting.calibration, key=len)
    chosen = [prompts[i * len(prompts) // 8] for i in range(8)]
    with torch.no_grad():
        base = setting.load().model
        distances = [
            (model.get_base_model().model(torch.tensor([p]))[0][0, -1] - base(torch.tensor([p]))[0][0, -1]).square()
            for p in chosen
        ]
        expected = method.cross_entropy(model, EXAMPLES) + 50.0 * torch.stack(distances).mean()
        torch.testing.assert_close(method.loss(model, EXAMPLES), expected)


def test_lora_null_acts_on_the_lowest_directions_alone(setting):
    _, model, _ = trained(setting, "LoRA-Null v2", 4)
    assert all(not A.requires_grad and B.requires_grad for A, B in factors(model).values())
    for name, W in change(setting, model).items():
        entry = setting.statistics.for_layer(name)
        sinks = entry.sinks.double()  # GuardSpace protects first tokens too
        C = setting.covariance(name).double() + entry.sink_tokens / len(sinks) * sinks.T @ sinks
        vectors = torch.linalg.eigh(C).eigenvectors.float()
        assert float((W @ entry.sinks.T).norm()) < 0.3 * float(W.norm() * entry.sinks.norm())
        assert float((W @ vectors[:, :4]).norm()) > 1e-4
        assert float((W @ vectors[:, 4:]).norm()) < 1e-3 * float((W @ vectors[:, :4]).norm())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_safegrad_takes_out_what_conflicts(setting, monkeypatch, sign):
    method = METHODS["SafeGrad"](setting, 0.5, 0)
    model = method.build()
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(3)
    alignment = [torch.randn_like(p) for p in parameters]
    for p, a in zip(parameters, alignment, strict=True):
        p.grad = sign * a + 0.3 * torch.randn_like(a)
    g, a = (torch.cat([t.flatten() for t in ts]) for ts in ([p.grad for p in parameters], alignment))
    linear = lambda *_: sum((p * a).sum() for p, a in zip(parameters, alignment, strict=True))  # noqa: E731
    monkeypatch.setattr(method, "divergence", linear)
    method.change_gradients(model)
    expected = (g if sign > 0 else g - (g @ a) / (a @ a) * a) + 0.5 * a
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in parameters]), expected, rtol=1e-4, atol=1e-5)


def test_safegrad_measures_the_divergence_from_the_start(setting):
    method, model, _ = trained(setting, "SafeGrad")
    rows = setting.refusals[:3]
    at_start = METHODS["SafeGrad"](setting, 1.0, 0).build()
    assert float(method.divergence(at_start, rows).detach()) == pytest.approx(0, abs=1e-6)
    assert float(method.divergence(model, rows).detach()) > 1e-6


def test_projecting_afterwards_leaves_nothing_in_protected_directions(setting):
    method, model, _ = trained(setting, "projected afterwards", 0.9)
    before = {name: A.clone() for name, (A, _) in factors(model).items()}
    method.change_trained(model)
    plan = setting.plan(protect=0.9, init="zero")
    for name, (A, _) in factors(model).items():
        projector = gk.nn.NullSpaceProjector(plan.space_of(name).basis, plan.space_of(name).complement)
        torch.testing.assert_close(A.detach(), projector.project_(before[name].detach().clone()))
        assert not torch.allclose(A, before[name])


def test_guardspace_drifts_less_than_plain_lora(setting):
    plain, guarded = (
        setting.drift(trained(setting, name)[1].merge_and_unload()) for name in ("plain LoRA", "GuardSpace")
    )
    assert sum(d for d, _ in guarded.values()) < 0.5 * sum(d for d, _ in plain.values())


def test_a_small_rate_is_the_knob(setting):
    assert METHODS["small learning rate"](setting, 5e-5, 0).learning_rate == 5e-5
    assert METHODS["plain LoRA"](setting, 4e-4, 0).learning_rate == 4e-4


def test_curves_have_a_row_for_every_fifth_step(setting, tmp_path, monkeypatch):
    def evaluator(*_, **__):
        def evaluated(model):
            return SimpleNamespace(refuses=SimpleNamespace(count=7, n=9))

        evaluated.set_base = evaluated
        return evaluated

    monkeypatch.setattr(curves, "RefusalEvaluator", evaluator)
    laboratory = SimpleNamespace(
        setting=lambda seed: setting, prompts=SimpleNamespace(harmful={"x": ["a"]}), examples=lambda one: EXAMPLES
    )
    setting.tokenizer = None
    curves.run(laboratory, tmp_path)
    found = curves.json.loads((tmp_path / "drift_curves.json").read_text())
    for rows in found.values():
        assert [row["step"] for row in rows] == list(range(0, 31, 5))
        assert rows[0]["drift_mean"] < 1e-6 < rows[-1]["drift_mean"]
    assert found["GuardSpace"][-1]["drift_mean"] < found["plain LoRA"][-1]["drift_mean"]
    assert (tmp_path / "drift_curves.png").read_bytes().startswith(b"\x89PNG")
