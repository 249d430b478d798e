import copy
import dataclasses
import json
import math

import peft
import pytest
import torch
from guard_helpers import (
    MODELS,
    PROMPTS,
    PlainModel,
    batch_of,
    collect,
    gather_inputs,
    hand_made,
    perturb,
    plan_for,
    tiny_gpt2,
    tiny_llama,
    weight_of,
)

import guardspace_kernels as gk
from guardspace_kernels.guard.certificate import relative_drift, squared_output
from guardspace_kernels.guard.statistics import InputStatistics
from guardspace_kernels.nn import ProjectedLoraLinear
from guardspace_kernels.ops import squared_drift

HELD_OUT = ([7, 9, 4, 4], [5, 14, 3, 8, 2, 6], [22, 5, 3])


def merged_delta(guarded, base, names):
    """Name -> ΔW (d_out, d_in), float64: what merging would add, through PEFT and not through our factors."""
    merged = copy.deepcopy(guarded).double().merge_and_unload()
    return {name: weight_of(merged, name) - weight_of(base, name) for name in names}


def ratio(moved, kept):
    return float(moved.norm() / kept.norm())


@pytest.mark.parametrize(
    "config", [{}, {"init": "zero"}, {"projector": False}, {"alpha": 1.0, "rule": "rank", "protect_dims": 4}]
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "plain"])
def test_drift_equals_the_directly_computed_one(kind, config):
    base = MODELS[kind]()
    stats = collect(base)
    guarded = perturb(gk.attach_guard(copy.deepcopy(base), plan_for(base, stats, **config)))
    made = hand_made(base, PROMPTS, stats.layers)
    delta = merged_delta(guarded, base, stats.layers)
    report = gk.certify(guarded, stats)
    assert [row.name for row in report.layers] == stats.layers
    for row in report.layers:
        X, _, firsts = made[row.name]
        W, dW = weight_of(base, row.name), delta[row.name]
        assert row.drift == pytest.approx(ratio(X @ dW.T, X @ W.T), rel=1e-4, abs=1e-6), row.name
        sink = ((firsts @ dW.T).norm(dim=1) / (firsts @ W.T).norm(dim=1)).max()
        assert row.sink_drift == pytest.approx(float(sink), rel=1e-4, abs=1e-5)
        assert row.drift > 1e-3
        assert row.drift <= row.bound
        assert (row.sink_drift < 1e-5) == ("projector" not in config)
        assert row.heldout_drift is None and row.heldout_outside is None
    assert report.max_drift == max(max(row.drift, row.sink_drift) for row in report.layers)
    assert report.tokens == len(made[stats.layers[0]][0]) and report.prompts == len(PROMPTS)
    assert bool(report.notes) == (config.get("projector") is False)


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("init", ["balanced", "paper", "zero"])
def test_no_drift_at_the_start(init, residual):
    model = tiny_llama()
    stats = collect(model)
    guarded = gk.attach_guard(model, plan_for(model, stats, init=init), residual=residual)
    report = gk.certify(guarded, stats, heldout=[batch_of(HELD_OUT)], answer_tokens=3)
    assert report.max_drift < 1e-6
    assert abs(report.heldout.kl) < 1e-6 and abs(report.heldout.answer_logprob_change) < 1e-4
    assert max(row.heldout_drift for row in report.layers) < 1e-6


def test_full_protection_leaves_no_drift_on_the_calibration_tokens():
    model = tiny_llama(dtype=torch.float64)
    stats = collect(model, [batch_of(PROMPTS[:2])], dtype=torch.float64)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats, protect=1.0)), size=3.0)
    report = gk.certify(guarded, stats, heldout=[batch_of(PROMPTS[:2])], answer_tokens=1)
    assert 0 < report.max_drift < 1e-6  # float32 bases: never exactly zero
    # Both are rounding here, of float32 bases, and either may be the larger.
    assert all(row.drift - 1e-6 <= row.bound < 2e-3 for row in report.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_are_only_read(dtype, tmp_path):
    model = tiny_llama()
    stats = collect(model, dtype=dtype)
    before = copy.deepcopy(stats)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats)))
    first = gk.certify(guarded, stats)
    gk.export_lora(guarded, tmp_path, stats=stats)
    assert gk.certify(guarded, stats) == first
    for a, b in zip(stats.inputs, before.inputs, strict=True):
        assert torch.equal(a.covariance, b.covariance) and torch.equal(a.sinks, b.sinks)


def test_virtual_and_frozen_residual_certify_alike():
    model = tiny_llama()
    stats = collect(model)
    plan = plan_for(model, stats)
    reports = [
        gk.certify(perturb(gk.attach_guard(copy.deepcopy(model), plan, residual=residual)), stats)
        for residual in ("virtual", "frozen")
    ]
    for a, b in zip(reports[0].layers, reports[1].layers, strict=True):
        assert a.drift == pytest.approx(b.drift, rel=1e-4) and a.bound == pytest.approx(b.bound, rel=1e-4)


def test_the_bound_holds_for_any_adapter_of_the_same_norm():
    model = tiny_llama()
    stats = collect(model)
    base = copy.deepcopy(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats)))
    layers = guarded.guarded_layers()
    report = gk.certify(guarded, stats)
    generator = torch.Generator().manual_seed(0)
    delta = merged_delta(guarded, base, stats.layers)
    worst = {}
    for row in report.layers:
        assert row.drift <= row.bound
        entry, W, projector = stats.for_layer(row.name), weight_of(base, row.name), layers[row.name].projector
        norm = torch.linalg.matrix_norm(delta[row.name], ord=2)
        output = math.sqrt(squared_output(W, entry.covariance))
        d = W.shape[1]
        P = torch.eye(d, dtype=torch.float64)
        projector.project_(P)
        top = torch.linalg.eigh(P @ entry.covariance.double() @ P).eigenvectors[:, -1:]
        others = [torch.randn(W.shape[0], d, generator=generator, dtype=torch.float64) @ P for _ in range(3)]
        others.append(torch.eye(W.shape[0], 1, dtype=torch.float64) @ top.T)  # the worst one of rank one
        others.append((torch.linalg.qr(torch.randn(max(W.shape[0], d), d, dtype=torch.float64)).Q[: W.shape[0]]) @ P)
        for other in others:
            other = other * norm / torch.linalg.matrix_norm(other, ord=2)
            drift = math.sqrt(float(squared_drift(entry.covariance, other, torch.eye(d, dtype=torch.float64)))) / output
            assert drift <= row.bound * (1 + 1e-6)
            worst[row.name] = max(worst.get(row.name, 0.0), drift / row.bound)
        free = float((P @ entry.covariance.double()).trace())
        assert row.bound == pytest.approx(float(norm) * math.sqrt(free) / output, rel=1e-4)
    assert max(worst.values()) > 0.4  # and is not a bound that anything satisfies


def test_traces_against_the_tokens():
    torch.manual_seed(0)
    X, F, G = (torch.randn(n, m, dtype=torch.float64) for n, m in ((50, 7), (9, 3), (3, 7)))
    W = torch.randn(9, 7, dtype=torch.float64)
    C = X.T @ X
    assert float(squared_drift(C, F, G)) == pytest.approx(float((X @ G.T @ F.T).square().sum()), rel=1e-12)
    assert squared_output(W, C) == pytest.approx(float((X @ W.T).square().sum()), rel=1e-12)
    assert relative_drift(F, G, W, C) == pytest.approx(ratio(X @ G.T @ F.T, X @ W.T), rel=1e-12)
    assert relative_drift(F, G, torch.zeros(9, 7), C) == math.inf
    assert relative_drift(0 * F, G, torch.zeros(9, 7), C) == 0.0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_plain_peft_lora_is_certified_for_comparison(kind):
    base = MODELS[kind]()
    stats = collect(base)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[n.rsplit(".", 1)[1] for n in stats.layers], fan_in_fan_out=kind == "gpt2"
    )
    plain = perturb(peft.get_peft_model(copy.deepcopy(base), config))
    report = gk.certify(plain, stats, heldout=[batch_of(HELD_OUT)], answer_tokens=2)
    delta = merged_delta(plain, base, stats.layers)
    made = hand_made(base, PROMPTS, stats.layers)
    for row in report.layers:
        X, C, _ = made[row.name]
        W, dW = weight_of(base, row.name), delta[row.name]
        assert row.drift == pytest.approx(ratio(X @ dW.T, X @ W.T), rel=1e-4)
        whole = float(torch.linalg.matrix_norm(dW, ord=2)) * math.sqrt(float(C.trace())) / float((X @ W.T).norm())
        assert row.bound == pytest.approx(whole, rel=1e-4) and row.drift <= row.bound
        assert row.heldout_outside == pytest.approx(1.0)
        assert row.sink_drift > 1e-2
    assert report.notes == ["no projector: an ordinary adapter, whose drift is bounded only by its norm"]


def test_variants_and_several_adapters_are_refused():
    model = tiny_llama()
    stats = collect(model)
    dora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj: only plain LoRA .*DoRA"):
        gk.certify(dora, stats)
    two = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    two.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"q_proj: exactly one LoRA adapter must be active, got \['default', 'second'"):
        gk.certify(two, stats)


def test_models_that_cannot_be_certified():
    model = tiny_llama()
    stats = collect(model, target_modules=["q_proj"])
    everything = collect(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapted layer; nothing to certify"):
        gk.certify(model, everything)
    guarded = perturb(gk.attach_guard(copy.deepcopy(model), plan_for(model, everything)))
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.k_proj has no statistics; collect them"):
        gk.certify(guarded, stats)
    guarded.merge_adapter()
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj: its adapter is merged; certify"):
        gk.certify(guarded, everything)
    guarded.unmerge_adapter()
    gk.attach_guard(tiny_llama(), plan_for(model, everything))
    with torch.no_grad():  # a non-finite layer must not hide behind the comparison with max_drift
        guarded.guarded_layers()["model.layers.1.self_attn.q_proj"].B[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.1\.self_attn\.q_proj: the adapter holds non-finite val"
    ):
        gk.certify(guarded, everything, max_drift=1e9)


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
def test_statistics_of_other_weights_are_refused(residual):
    model = tiny_llama()
    plan = plan_for(model)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    embedding = copy.deepcopy(model)
    with torch.no_grad():
        embedding.model.embed_tokens.weight[0, 0] += 1e-3
    others, mine, elsewhere = collect(changed), collect(model), collect(embedding)
    guarded = gk.attach_guard(model, plan, residual=residual)
    gk.certify(guarded, mine)
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj(: its base weight is not| differs)"):
        gk.certify(guarded, others)
    with pytest.raises(ValueError, match="a weight outside the guarded layers differs"):
        gk.certify(guarded, elsewhere)


def test_plain_lora_on_other_weights_is_refused():
    stats = collect(tiny_gpt2())
    other = tiny_gpt2()
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-3
    plain = peft.get_peft_model(other, peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match=r"layer transformer\.h\.1\.mlp\.c_fc: its base weight is not the one"):
        gk.certify(plain, stats)


def test_modules_without_peft_are_certified():
    model = PlainModel()
    stats = collect(model)
    space = plan_for(model, stats).space_of("q")
    W = weight_of(model, "q")
    made = hand_made(model, PROMPTS, ["q"])["q"]
    model.q = ProjectedLoraLinear.from_linear(model.q, 2, space.basis, complement=space.complement)
    perturb(model)
    (row,) = gk.certify(model, stats).layers
    F, G = model.q.delta_factors()
    assert row.name == "q" and row.drift > 0
    assert row.drift == pytest.approx(ratio(made[0] @ (F @ G).double().T, made[0] @ W.T), rel=1e-4)
    with pytest.raises(TypeError, match=r"heldout needs a peft\.PeftModel"):
        gk.certify(model, stats, heldout=[batch_of()])


def test_max_drift():
    model = tiny_llama()
    stats = collect(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats)))
    report = gk.certify(guarded, stats)
    assert gk.certify(guarded, stats, max_drift=report.max_drift).max_drift == report.max_drift
    worst = max(report.layers, key=lambda row: max(row.drift, row.sink_drift))
    with pytest.raises(gk.DriftExceededError, match=rf"layer {worst.name} drifts by .* above max_drift") as caught:
        gk.certify(guarded, stats, max_drift=0.99 * report.max_drift)
    assert caught.value.report.to_dict() == report.to_dict() and caught.value.report.worst == worst


def test_a_drifting_sink_counts_for_max_drift():
    model = tiny_llama()
    stats = collect(model)
    guarded = gk.attach_guard(model, plan_for(model, stats))
    foreign = copy.deepcopy(stats)
    for entry in foreign.inputs:  # first tokens that the plan did not protect
        entry.sinks = torch.randn(1, entry.covariance.shape[0], generator=torch.Generator().manual_seed(0)) * 100
        entry.covariance *= 1.0
    report = gk.certify(perturb(guarded, size=1.0), foreign)
    assert report.max_drift == max(max(row.drift, row.sink_drift) for row in report.layers)
    assert any(row.sink_drift > row.drift for row in report.layers)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_heldout_numbers_equal_hand_computed_ones(kind, eos):
    """Every prompt alone, greedy decoding by hand, in float64."""
    n = 4
    base = MODELS[kind](dtype=torch.float64)
    stats = collect(base, dtype=torch.float64)
    answers = {tuple(p): [] for p in HELD_OUT}
    for prompt, answer in answers.items():
        for _ in range(n):
            answer.append(int(base(torch.tensor([[*prompt, *answer]])).logits[0, -1].argmax()))
    if eos:  # every answer ends at its second token or before: fewer columns than asked for
        ends = sorted({answer[1] for answer in answers.values()})
        base.generation_config.eos_token_id = ends
        for answer in answers.values():
            del answer[next(i for i, token in enumerate(answer) if token in ends) + 1 :]
    guarded = perturb(gk.attach_guard(copy.deepcopy(base), plan_for(base, stats)))
    batches = [batch_of(HELD_OUT[:2]), batch_of(HELD_OUT[2:], "left", 7)]
    report = gk.certify(guarded, stats, heldout=batches, answer_tokens=n)

    whole = [[*prompt, *answer] for prompt, answer in answers.items()]
    kl, change, positions = 0.0, 0.0, 0
    with torch.no_grad():
        for ids, answer in zip(whole, answers.values(), strict=True):
            here = slice(len(ids) - len(answer) - 1, len(ids) - 1)
            p, q = (m(torch.tensor([ids])).logits[0, here].log_softmax(-1) for m in (base, guarded))
            kl += float((p.exp() * (p - q)).sum())
            change += sum(float(q[i, token] - p[i, token]) for i, token in enumerate(answer))
            positions += len(answer)
    assert (report.heldout.prompts, report.heldout.positions) == (len(HELD_OUT), positions)
    assert report.heldout.kl == pytest.approx(kl / positions, rel=1e-3)
    assert report.heldout.answer_logprob_change == pytest.approx(change / len(HELD_OUT), rel=1e-3)
    assert kl > 1e-3 and abs(change) > 1e-3

    def with_own(prompts):  # the same answers, given
        pairs = [(prompt, answers[tuple(prompt)]) for prompt in prompts]
        kinds = [[1] * len(prompt) + [2] * len(answer) for prompt, answer in pairs]
        batch = batch_of([[*prompt, *answer] for prompt, answer in pairs], "left", 12)
        return {**batch, "token_kinds": batch_of(kinds, "left", 12)["input_ids"]}

    guarded.get_base_model().generate = None
    given = gk.certify(guarded, stats, heldout=[with_own(HELD_OUT[:2]), with_own(HELD_OUT[2:])], answer_tokens=n)
    assert dataclasses.astuple(given.heldout) == pytest.approx(dataclasses.astuple(report.heldout), rel=1e-6)
    for row, same in zip(given.layers, report.layers, strict=True):
        assert dataclasses.astuple(row)[1:] == pytest.approx(dataclasses.astuple(same)[1:], rel=1e-6)

    delta = merged_delta(guarded, base, stats.layers)
    rows = gather_inputs(base, whole, stats.layers)
    for row in report.layers:
        X = torch.cat([x[1:] for x in rows[row.name]])
        P = torch.eye(X.shape[1], dtype=torch.float64)
        guarded.guarded_layers()[row.name].projector.project_(P)
        assert row.heldout_drift == pytest.approx(
            ratio(X @ delta[row.name].T, X @ weight_of(base, row.name).T), rel=1e-4
        )
        assert row.heldout_outside == pytest.approx(ratio(X @ P, X), rel=1e-4)
        assert row.heldout_drift > 1e-3 and row.heldout_outside > 1e-3


def test_heldout_leaves_the_model_as_it_was():
    model = tiny_llama()
    stats = collect(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats))).train()
    guarded.get_base_model().model.layers[0].eval()
    modes = {name: m.training for name, m in guarded.named_modules()}
    gk.certify(guarded, stats, heldout=[batch_of(HELD_OUT)], answer_tokens=2)
    bad = [batch_of(HELD_OUT), {"input_ids": torch.full((1, 3), 999)}]
    with pytest.raises(ValueError, match="batch 1: prompt 0 holds token 999, but the model knows 60 tokens"):
        gk.certify(guarded, stats, heldout=bad, answer_tokens=2)
    runs = iter(range(3))  # and where the model itself fails, in the middle
    handle = guarded.get_base_model().lm_head.register_forward_pre_hook(lambda *_: None if next(runs) < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gk.certify(guarded, stats, heldout=[batch_of(HELD_OUT)], answer_tokens=2)
    handle.remove()
    assert {name: m.training for name, m in guarded.named_modules()} == modes
    assert not any(m._forward_hooks for m in guarded.modules())
    assert not any(layer.disable_adapters for layer in guarded.guarded_layers().values())
    trainable = {name for name, p in guarded.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in guarded.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    "heldout, answer_tokens, match",
    [
        ([], 2, "heldout is empty"),
        ([batch_of()], 0, "answer_tokens must be 1 or more, got 0"),
        ([{"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2).long()}], 2, "all padding"),
        *(
            ([{**batch_of(HELD_OUT[:2], "left"), "token_kinds": torch.tensor(kinds)}], 2, match)
            for kinds, match in (
                ([[1] * 5 + [2], [1] * 6], "batch 0: token_kinds mark answers .* prompt 1 are none"),
                ([[1, 1, 2, 2, 2, 2], [1] * 5 + [2]], "batch 0: token_kinds mark answers .* prompt 0 .* first token"),
                ([[1] * 5 + [3]] * 2, r"batch 0: token_kinds must be 0 \(template\), 1 \(request\) or 2 \(answer\)"),
                ([[2] * 5] * 2, "batch 0: token_kinds must be integers of the shape of the mask"),
            )
        ),
    ],
)
def test_unusable_heldout(heldout, answer_tokens, match):
    model = tiny_llama()
    stats = collect(model)
    guarded = gk.attach_guard(model, plan_for(model, stats))
    with pytest.raises(ValueError, match=match):
        gk.certify(guarded, stats, heldout=heldout, answer_tokens=answer_tokens)


@pytest.mark.parametrize("heldout", [None, [batch_of(HELD_OUT)]])
def test_json_and_table(heldout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    stats = collect(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats)))
    report = gk.certify(guarded, stats, heldout=heldout, answer_tokens=2)
    report.save("report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read == {**dataclasses.asdict(report), "max_drift": report.max_drift}
    assert read["model"] == stats.fingerprint.model and len(read["layers"]) == 14

    head, *lines = str(report).splitlines()
    assert head.split() == ["layer", "drift", "bound", "sink", *(["held-out", "outside"] if heldout else [])]
    for line, row in zip(lines, report.layers, strict=False):
        wanted = [row.drift, row.bound, row.sink_drift] + ([row.heldout_drift, row.heldout_outside] if heldout else [])
        assert line.split() == [row.name, *(f"{value:.2e}" for value in wanted)]
    assert "\n".join(lines[14:]) == report.summary()
    assert f"worst {report.max_drift:.2e} at {report.worst.name}" in report.summary()
    if heldout:
        assert f"next-token KL {report.heldout.kl:.3g} nats" in report.summary()
    assert "safe" not in str(report)


def beside(guarded, name):
    """A parameter of the base model in a guarded one."""
    return guarded.get_base_model().get_parameter(name)


TRAINED = {
    "norm": (["model.norm.weight"], {"model.norm.weight": "changed"}),
    "embedding": (["model.embed_tokens.weight"], {"model.embed_tokens.weight": "changed"}),
    "head": (["lm_head.weight"], {"lm_head.weight": "changed"}),
    "two": (["lm_head.weight", "model.norm.weight"], {"lm_head.weight": "changed", "model.norm.weight": "changed"}),
}


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_trained_beside_the_adapter_is_named_and_nothing_is_promised(kind, residual, tmp_path):
    trained, changed = TRAINED[kind]
    model = tiny_llama()
    stats = collect(model)
    guarded = gk.attach_guard(model, plan_for(model, stats), residual=residual)
    assert gk.certify(guarded, stats, max_drift=1e-5).changed == {}
    with torch.no_grad():
        for name in trained:
            beside(guarded, name).add_(1e-2)
    report = gk.certify(guarded, stats)
    assert report.changed == changed and report.max_drift < 1e-5
    wanted = f"the model differs from the base model in {', '.join(f'{n} (changed)' for n in changed)} beside the "
    assert wanted + "adapter: nothing is promised of this model" in str(report)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["changed"] == changed
    with pytest.raises(gk.DriftExceededError, match=r"differs from the base .*: nothing is promised") as caught:
        gk.certify(guarded, stats, max_drift=1e9)
    assert caught.value.report.changed == changed
    first = next(iter(changed))
    with pytest.raises(ValueError, match=rf"heldout compares with the base model, but {first} \(changed\) is"):
        gk.certify(guarded, stats, heldout=[batch_of(HELD_OUT)])


def test_a_trained_bias_and_a_resized_embedding_are_named():
    model = tiny_gpt2()
    stats = collect(model)
    guarded = gk.attach_guard(model, plan_for(model, stats))
    with torch.no_grad():
        guarded.guarded_layers()["transformer.h.0.attn.c_attn"].get_base_layer().bias[3] += 1e-3
    assert gk.certify(guarded, stats).changed == {"transformer.h.0.attn.c_attn.bias": "changed"}
    model = tiny_llama()
    guarded = gk.attach_guard(model, plan_for(model, stats := collect(model)))
    guarded.resize_token_embeddings(64)
    shapes = "resized from (60, 32) to (64, 32)"
    report = gk.certify(guarded, stats)
    assert report.changed == {"lm_head.weight": shapes, "model.embed_tokens.weight": shapes}
    assert report.failure(1e9)


def test_buffers_count_for_the_certificate():
    model = PlainModel()
    model.norm = torch.nn.BatchNorm1d(4)
    stats = collect(model)
    guarded = gk.attach_guard(model, plan_for(model, stats))
    guarded.get_base_model().norm.running_mean[0] = 1.0
    assert gk.certify(guarded, stats).changed == {"norm.running_mean": "changed"}


@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}])
def test_trained_copies_and_rows_are_changes_while_they_are_active(extra):
    base = tiny_llama()
    stats = collect(base)
    plain = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=["q_proj"], **extra))
    assert gk.certify(plain, stats, max_drift=1e9).changed == {}  # as long as they are what they replace
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.mul_(1.5)
    name = "lm_head.weight" if "modules_to_save" in extra else "model.embed_tokens.weight"
    # The base model is there while the adapter is off, so that held-out numbers are against it.
    report = gk.certify(plain, stats, heldout=[batch_of(HELD_OUT)], answer_tokens=2)
    assert report.changed == {name: "changed"} and report.heldout.kl > 1e-3
    with pytest.raises(gk.DriftExceededError, match=rf"in {name} \(changed\) beside the adapter"):
        gk.certify(plain, stats, max_drift=1e9)


def test_other_adapters_beside_the_guard_are_named():
    model = tiny_llama()
    stats = collect(model)
    guarded = gk.attach_guard(model, plan_for(model, stats))
    prompted = peft.get_peft_model(guarded, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "prompt_encoder.default.embedding.weight" in gk.certify(prompted, stats).changed
    plain = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    plain.base_model.model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2, bias=False)
    assert gk.certify(plain, stats).changed == {"model.layers.0.mlp.extra.weight": "added"}


@pytest.mark.parametrize(
    "config, match",
    [
        ({"target_modules": ["q_proj"], "lora_bias": True}, r"q_proj: its adapter has a bias \(lora_bias\)"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"model\.embed_tokens: its adapter changes a Embedding; only"),
    ],
)
def test_adapters_that_are_no_low_rank_change_of_a_weight_are_refused(config, match):
    stats = collect(tiny_llama())
    plain = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config))
    with pytest.raises(ValueError, match=match):
        gk.certify(plain, stats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ["balanced", "zero"])
def test_a_guarded_model_that_was_cast_is_certified(dtype, init):
    model = tiny_llama()
    stats = collect(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats, init=init))).to(dtype)
    report = gk.certify(guarded, stats, heldout=[batch_of(HELD_OUT)], answer_tokens=2, max_drift=10.0)
    (note,) = report.notes
    name = str(dtype).removeprefix("torch.")
    assert note.startswith("16 base weights were rounded to " + name) and report.changed == {}
    # The numbers are those of the weights as they are: ΔW of the rounded factors against the rounded W.
    made = hand_made(tiny_llama(), PROMPTS, stats.layers)
    rounded = tiny_llama().to(dtype)
    for row in report.layers:
        layer = guarded.guarded_layers()[row.name]
        F, G = (t.double() for t in layer.delta_factors())
        X, W = made[row.name][0], weight_of(rounded, row.name)
        assert row.drift == pytest.approx(ratio(X @ (F @ G).T, X @ W.T), rel=1e-4)
    with torch.no_grad():  # what was changed beyond the cast still counts
        beside(guarded, "lm_head.weight")[0, 0] += 1.0
    assert gk.certify(guarded, stats).changed == {"lm_head.weight": "changed"}


def test_statistics_of_the_rounded_base_are_taken_for_a_model_that_was_cast():
    model = tiny_llama()
    rounded = collect(copy.deepcopy(model).bfloat16())
    plan = plan_for(model)
    guarded = perturb(gk.attach_guard(model, plan))
    with pytest.raises(ValueError, match="q_proj: its base weight is not the one the statistics were collected on"):
        gk.certify(guarded, rounded)
    report = gk.certify(guarded.bfloat16(), rounded, heldout=[batch_of(HELD_OUT)], answer_tokens=2, max_drift=10.0)
    assert report.changed == {} and report.notes == [
        "the statistics are of the base model rounded to bfloat16, the plan is of the one before: it protects that "
        "one's inputs"
    ]
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1.0
    with pytest.raises(ValueError, match="up_proj: its base weight is not the one the statistics were collected on"):
        gk.certify(guarded, collect(other.bfloat16()))


def test_a_guarded_model_that_was_widened_is_certified_as_before():
    model = tiny_llama(dtype=torch.bfloat16)
    stats = collect(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats)))
    before = gk.certify(guarded, stats)
    after = gk.certify(guarded.float(), stats, max_drift=10.0)
    assert after.notes == [] and after.changed == {}
    assert after.max_drift == pytest.approx(before.max_drift, rel=1e-4)


def altered(stats, change):
    """Statistics of which each entry was changed."""
    copied = copy.deepcopy(stats)
    for entry in copied.inputs:
        change(entry)
    return copied


def poisoned(value, where=(0, 0)):
    def change(entry):
        C = entry.covariance
        C[where] = C[where[::-1]] = value
        entry.covariance = C

    return change


def no_tokens(entry):
    entry.tokens, entry.covariance = 0, torch.zeros_like(entry.covariance)


@pytest.mark.parametrize(
    "change, match",
    [
        (poisoned(math.nan), "q_proj: the statistics hold non-finite values; collect them again"),
        (poisoned(math.inf, (3, 5)), "q_proj: the statistics hold non-finite values"),
        (lambda entry: entry.sinks.fill_(math.nan), "q_proj: the statistics hold non-finite values"),
        (poisoned(-1.0), "q_proj: the statistics of 19 tokens have a negative variance"),
        (
            lambda entry: setattr(entry, "covariance", torch.zeros_like(entry.covariance)),
            "q_proj: the statistics of 19 tokens have no energy",
        ),
        (no_tokens, "q_proj: no token was counted"),
    ],
)
@pytest.mark.parametrize("bound", [None, 1e9])
def test_statistics_that_tell_nothing_certify_nothing(change, match, bound, tmp_path):
    model = tiny_llama()
    stats = collect(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats)))
    with pytest.raises(ValueError, match=rf"layer model\.layers\.0\.self_attn\.{match}"):
        gk.certify(guarded, altered(stats, change), max_drift=bound)
    with pytest.raises(ValueError, match=rf"layer model\.layers\.0\.self_attn\.{match}"):
        gk.export_lora(guarded, tmp_path, stats=altered(stats, change))


def test_statistics_of_experts_alone_that_read_nothing_certify_nothing():
    model = tiny_llama()
    stats = collect(model)
    plain = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))

    def unread(entry):
        no_tokens(entry)
        entry.routed = True

    with pytest.raises(ValueError, match="no adapted layer read a calibration token, so that nothing can be told"):
        gk.certify(plain, altered(stats, unread), max_drift=1e9)


def test_adapters_that_are_switched_off_certify_nothing():
    model = tiny_llama()
    stats = collect(model)
    guarded = perturb(gk.attach_guard(copy.deepcopy(model), plan_for(model, stats)))
    plain = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for adapted in (guarded, plain):
        with (
            adapted.disable_adapter(),
            pytest.raises(ValueError, match=r"q_proj: its adapter is switched off; certify"),
        ):
            gk.certify(adapted, stats, max_drift=1e9)
        gk.certify(adapted, stats)


def test_a_layer_that_overflows_exceeds_any_bound():
    model = tiny_llama()
    stats = collect(model)
    guarded = gk.attach_guard(model, plan_for(model, stats))
    with torch.no_grad():
        layer = guarded.guarded_layers()["model.layers.1.self_attn.q_proj"]
        layer.A.fill_(1e30)
        layer.B.fill_(1e30)
    assert gk.certify(guarded, stats).worst.name == "model.layers.1.self_attn.q_proj"
    with pytest.raises(gk.DriftExceededError, match=r"model\.layers\.1\.self_attn\.q_proj drifts by"):
        gk.certify(guarded, stats, max_drift=1e9)


def test_an_adapter_without_values_is_refused():
    stats = collect(tiny_llama())
    plain = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"])).to("meta")
    with pytest.raises(ValueError, match=r"q_proj: its adapter is on the meta device, without values; load it first"):
        gk.certify(plain, stats)


def test_a_token_that_the_base_model_excludes_adds_nothing_to_the_divergence():
    model = tiny_llama()
    stats = collect(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats)))

    def exclude(_module, _args, logits):
        logits[..., 7] = -math.inf
        return logits

    guarded.get_base_model().lm_head.register_forward_hook(exclude)
    report = gk.certify(guarded, stats, heldout=[batch_of(HELD_OUT)], answer_tokens=2)
    assert 1e-4 < report.heldout.kl < 10 and report.failure() == ""


def test_an_exported_lora_is_certified_under_its_plan(tmp_path):
    model = tiny_llama()
    stats = collect(model)
    plan = plan_for(model, stats)
    guarded = perturb(gk.attach_guard(copy.deepcopy(model), plan))
    gk.export_lora(guarded, tmp_path)
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    ours, theirs = gk.certify(guarded, stats), gk.certify(plain, stats, plan=plan, max_drift=10.0)
    assert theirs.notes == []
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert b.drift == pytest.approx(a.drift, rel=1e-4) and b.bound == pytest.approx(a.bound, rel=1e-4)
    some = plan_for(model, collect(model, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="k_proj carries an adapter, but the plan has none for it"):
        gk.certify(plain, stats, plan=some)
    with pytest.raises(ValueError, match="guarded by another plan than the one given; leave plan out"):
        gk.certify(guarded, stats, plan=some)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "layers.1.mlp.up_proj.lora_A" in name:
                parameter.add_(0.05)
    with pytest.raises(ValueError, match=r"up_proj: the adapter acts outside the null space .*not trained under this"):
        gk.certify(plain, stats, plan=plan)


def test_layers_that_read_one_input_share_its_covariance(monkeypatch):
    model = tiny_llama()
    stats = collect(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats)))
    read, made = [], InputStatistics.lower_on
    monkeypatch.setattr(InputStatistics, "lower_on", lambda e, device: read.append(e.layers) or made(e, device))
    rows = gk.certify(guarded, stats).layers
    assert sorted(read) == sorted(entry.layers for entry in stats.inputs)
    assert [row.name for row in rows] == list(guarded.guarded_layers())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # without and with biases
def test_hooks_of_others_do_not_change_what_is_measured_of_a_layer(kind):
    model = MODELS[kind]()
    stats = collect(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats)))
    name, layer = list(guarded.guarded_layers().items())[-1]
    expected = gk.certify(guarded, stats, heldout=[batch_of(HELD_OUT)], answer_tokens=1).layers[-1]
    longest = max(map(len, HELD_OUT)) + 1  # where answers are read, not where they are made
    layer.register_forward_hook(lambda _module, _args, output: output + 100 * (output.shape[1] == longest))
    found = gk.certify(guarded, stats, heldout=[batch_of(HELD_OUT)], answer_tokens=1).layers[-1]
    assert found.name == name and found.heldout_drift == pytest.approx(expected.heldout_drift, rel=1e-5)
