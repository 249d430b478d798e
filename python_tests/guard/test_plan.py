import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

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
    plan_for,
    planned,
    relative_error,
    rewrite,
    tiny_gpt2,
    tiny_llama,
    weight_of,
)

import guardspace_kernels as gk
from guardspace_kernels.guard import planning as plan_module
from guardspace_kernels.guard.null_space import EmptyNullSpaceError
from guardspace_kernels.guard.statistics import CalibrationStatistics, InputStatistics


def altered(stats, index=0, **changes):
    """A copy of the statistics with one entry changed."""
    inputs = [
        InputStatistics(e.layers, *(getattr(e, n) for n in ("covariance", "tokens", "sinks", "sink_tokens")))
        for e in stats.inputs
    ]
    for name, value in changes.items():
        setattr(inputs[index], name, value)
    return CalibrationStatistics(inputs, stats.fingerprint, stats.prompts)


def textbook_start(W, C, rank, damping):
    """U_r U_rᵀ W through the thin SVD and the inverse, in float64."""
    C = C + damping * C.diagonal().mean() * torch.eye(C.shape[0], dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    return U[:, -rank:] @ torch.diag(S[-rank:]) @ Vh[-rank:] @ torch.linalg.inv(C)


def protected_projector(C, sinks, protect):
    """P by dense algebra: the fewest leading eigenvectors that hold the share, and the sinks."""
    values, E = torch.linalg.eigh(C)
    free = int((values.clamp_min(0).cumsum(0) <= (1 - protect) * values.clamp_min(0).sum()).sum())
    directions = torch.cat([E[:, free:], (sinks / sinks.norm(dim=1, keepdim=True)).T], dim=1)
    U, S, _ = torch.linalg.svd(directions, full_matrices=False)
    U = U[:, S > 1e-6]
    return torch.eye(C.shape[0], dtype=torch.float64) - U @ U.T


@pytest.mark.parametrize("init", ["balanced", "paper"])
@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "plain"])
def test_the_start_equals_the_textbook(kind, alpha, init):
    """s·B₀A₀ = U_r Σ_r V_rᵀ C⁻¹ P and W_res + s·B₀A₀P = W, every layer, from the tokens on."""
    model = MODELS[kind]().double()
    stats = collect(model, dtype=torch.float64)
    plan = plan_for(model, stats, alpha=alpha, init=init, protect=0.8)
    scale = plan.config.scale
    assert scale == (2.0 if alpha is None else 1.0)
    made = hand_made(model, PROMPTS, stats.layers)
    weights = {name: weight_of(model, name) for name in stats.layers}
    assert list(plan.layers) == stats.layers
    for name, (_, C, firsts) in made.items():
        layer, space = plan.layers[name], plan.space_of(name)
        P = dense_projector(space.basis, space.complement)
        assert relative_error(P, protected_projector(C, firsts, 0.8)) < 1e-5, name
        assert float((firsts @ P).norm() / firsts.norm()) < 1e-6  # the sink directions, exactly
        start = textbook_start(weights[name], C, 3, 0.01) @ P
        assert relative_error(scale * layer.B0.double() @ layer.A0.double(), start) < 1e-5, name
        assert relative_error(layer.A0.double() @ P, layer.A0) < 1e-6
        assert space.basis.dtype == layer.A0.dtype == layer.B0.dtype == torch.float32
        k = space.basis.shape[1]
        assert relative_error(space.basis.double().T @ space.basis.double(), torch.eye(k)) < 1e-6
        assert layer.shape == tuple(weights[name].shape)
    guarded = gk.attach_guard(model, plan, residual="frozen")
    for name, layer in guarded.guarded_layers().items():
        stored = layer.get_base_layer().weight.detach()
        residual = stored.T if kind == "gpt2" else stored
        start = scale * plan.layers[name].B0.double() @ plan.layers[name].A0.double()
        assert relative_error(residual + start, weights[name]) < 1e-12, name
        assert relative_error(residual, weights[name]) > 1e-3


def test_zero_init_starts_as_plain_lora():
    model = tiny_llama()
    stats = collect(model)
    plan = plan_for(model, stats, init="zero")
    assert not plan.has_frozen and plan_for(model, stats).has_frozen
    for layer in plan.layers.values():
        assert layer.B0.abs().max() == 0 and torch.all(layer.A0.norm(dim=1) > 0)
    again, other = plan_for(model, stats, init="zero"), plan_for(model, stats, init="zero", seed=1)
    assert again.fingerprint == plan.fingerprint != other.fingerprint
    name = stats.layers[3]
    assert torch.equal(again.layers[name].A0, plan_for(model, stats, init="zero").layers[name].A0)
    assert not torch.equal(other.layers[name].A0, plan.layers[name].A0)


def test_without_the_projector_nothing_is_protected():
    model = tiny_llama()
    plan = plan_for(model, projector=False)
    assert set(plan.spaces) == {None}
    C = hand_made(model, PROMPTS, ["model.layers.0.mlp.up_proj"])["model.layers.0.mlp.up_proj"][1]
    layer = plan.layers["model.layers.0.mlp.up_proj"]
    start = textbook_start(weight_of(model, layer.name), C, 3, 0.01)
    assert relative_error(2.0 * layer.B0.double() @ layer.A0.double(), start) < 1e-3
    assert "0.0% of the dimensions protected" in plan.summary()


def test_spaces_are_shared_by_layers_that_read_one_tensor():
    plan = plan_for(tiny_llama())
    assert len(plan.layers) == 14 and len(plan.spaces) == 8
    q, k, v, o = (plan.space_of(f"model.layers.0.self_attn.{x}_proj") for x in "qkvo")
    assert q is k is v and o is not q
    guarded = gk.attach_guard(tiny_llama(), plan).guarded_layers()
    assert len({id(layer.projector) for layer in guarded.values()}) == 8
    assert len(plan_for(PlainModel("other")).spaces) == 3


@pytest.mark.parametrize("config", [{"protect": 0.9}, {"rule": "rank", "protect_dims": 7, "protect": 0.99}])
def test_the_rules_reach_every_layer(config):
    model = tiny_llama()
    plan = plan_for(model, **config)
    for space in plan.spaces:
        if "protect_dims" in config:
            assert space.protected == 7 + space.sink_directions
        else:
            assert space.free_energy <= 0.1 + 1e-6
        assert space.sink_directions == 2


def test_paper_rule_with_few_tokens():
    model = tiny_llama()
    stats = collect(model, [batch_of(PROMPTS[:2])], dtype=torch.float64)
    plan = plan_for(model, stats, rule="paper")
    for entry, space in zip(stats.inputs, plan.spaces, strict=True):
        values = torch.linalg.eigvalsh(entry.covariance)
        assert space.protected == int((values > max(1e-8, 1e-6 * values[-1])).sum()) + space.sink_directions


def test_the_table_has_a_row_per_layer():
    model = tiny_llama()
    plan = plan_for(model, protect=0.95)
    told = str(plan.coverage).splitlines()
    shown = str(plan).splitlines()
    head, *rows, summary = shown[len(told) :]
    assert shown[: len(told)] == told
    assert head.split() == ["layer", "d_out", "d_in", "protected", "energy", "free", "capacity", "warnings"]
    assert [row.split()[0] for row in rows] == list(plan.layers)
    for row, (name, layer) in zip(rows, plan.layers.items(), strict=True):
        space = plan.space_of(name)
        shown = row.split()
        assert (int(shown[1]), int(shown[2]), int(shown[3])) == (*layer.shape, space.protected)
        assert float(shown[4].rstrip("%")) == pytest.approx(100 * (1 - space.free_energy), abs=1e-3)
        assert float(shown[5].rstrip("%")) == pytest.approx(100 * space.free_energy, abs=1e-3)
        assert float(shown[6].rstrip("%")) == pytest.approx(100 * (1 - space.protected / layer.shape[1]), abs=0.06)
        assert all(warning in row for warning in layer.warnings)
    shares = [plan.space_of(n).protected / x.shape[1] for n, x in plan.layers.items()]
    assert summary == plan.summary()
    assert summary.startswith(
        f"14 layers, rank 3, scale 2: on average {sum(shares) / 14:.1%} of the dimensions protected "
        f"(from {min(shares):.1%} to {max(shares):.1%})"
    )


def test_warnings():
    model = tiny_llama()
    few = plan_for(model, collect(model, [batch_of(PROMPTS[:2])]))
    tokens = len(PROMPTS[0]) + len(PROMPTS[1]) - 2
    for layer in few.layers.values():
        assert layer.warnings == [f"only {tokens} calibration tokens for {layer.shape[1]} dimensions"]
    assert few.summary().endswith("; 14 layers with warnings")
    many = [batch_of([torch.randint(2, 50, (40,)).tolist() for _ in range(4)])]
    plenty = plan_for(model, collect(model, many))
    assert all(not layer.warnings for layer in plenty.layers.values()) and "warnings" not in plenty.summary()
    tight = plan_for(model, collect(model, many), rule="rank", protect_dims=25, rank=5)
    name = "model.layers.0.self_attn.q_proj"
    free = 32 - tight.space_of(name).protected
    assert tight.layers[name].warnings == [f"{free} free dimensions for rank 5"]


def test_dead_starting_directions_are_warned_of():
    model = tiny_llama()
    name = "model.layers.1.mlp.gate_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[:, 2:] = 0  # rank 2
    plan = plan_for(model, rank=3)
    assert "3 of 3 starting directions carry no weight and start at zero" in plan.layers[name].warnings
    assert torch.all(plan.layers[name].B0.norm(dim=0) > 0)
    guarded = gk.attach_guard(model, plan)
    guarded(**batch_of(), labels=batch_of()["input_ids"]).loss.backward()
    assert float(guarded.guarded_layers()[name].A.grad.norm()) > 0  # such a row learns all the same


def test_target_modules_take_a_subset():
    model = tiny_llama()
    stats = collect(model)
    plan = planned(model, stats, gk.GuardConfig(rank=2), target_modules=["v_proj", "down_proj"])
    assert list(plan.layers) == [n for n in stats.layers if n.endswith(("v_proj", "down_proj"))]
    assert len(plan.spaces) == 4
    whole = plan_for(model, stats, rank=2, protect=0.99)
    for name, layer in plan.layers.items():
        assert torch.equal(layer.A0, whole.layers[name].A0) and torch.equal(layer.B0, whole.layers[name].B0)
    assert list(gk.attach_guard(model, plan).guarded_layers()) == list(plan.layers)


def test_layers_without_statistics_are_refused():
    model = tiny_llama()
    stats = collect(model, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.k_proj has no statistics; collect"):
        planned(model, stats, target_modules=["q_proj", "k_proj"])


def test_a_copy_of_the_model_is_accepted_and_other_models_are_not(tmp_path):
    model = tiny_llama()
    stats = collect(model)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    plans = [plan_for(m, stats) for m in (model, copy.deepcopy(model), tiny_llama(), reloaded)]
    assert len({plan.fingerprint for plan in plans}) == 1

    with torch.no_grad():
        reloaded.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    with pytest.raises(
        ValueError, match=r"another model: layer model\.layers\.1\.mlp\.up_proj differs\. They are bound"
    ):
        plan_for(reloaded, stats)
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj differs"):
        gk.attach_guard(reloaded, plans[0])
    embedding = tiny_llama()
    with torch.no_grad():
        embedding.model.embed_tokens.weight[3, 4] += 1e-6
    for refuses in (lambda: plan_for(embedding, stats), lambda: gk.attach_guard(embedding, plans[0])):
        with pytest.raises(ValueError, match="another model: a weight outside the guarded layers differs"):
            refuses()
    with pytest.raises(ValueError, match=r"another model: this one has no layer model\.layers\.0\.self_attn\.q_proj"):
        plan_for(tiny_gpt2(), stats)
    with pytest.raises(ValueError, match=r"another model: this one has no layer model\.layers\.1"):
        plan_for(tiny_llama(num_hidden_layers=1), stats)
    with pytest.raises(ValueError, match=r"another model: layer .*q_proj differs"):
        plan_for(tiny_llama(dtype=torch.bfloat16), stats)


def test_every_refusal_names_the_layer_and_what_to_change():
    model = tiny_llama()
    stats = collect(model)
    name = r"model\.layers\.0\.self_attn\."
    with pytest.raises(ValueError, match=rf"layer {name}k_proj: rank 17 is above min\(d_out, d_in\) = 16; lower rank"):
        plan_for(model, stats, rank=17)
    with pytest.raises(EmptyNullSpaceError, match=rf"layer {name}q_proj: .*32 dimensions.*lower protect_dims \(now 40"):
        plan_for(model, stats, rule="rank", protect_dims=40)
    flat = altered(stats, covariance=torch.eye(32))
    with pytest.raises(EmptyNullSpaceError, match=rf"layer {name}q_proj: .*could never learn; lower protect \(now 1.0"):
        plan_for(model, flat, protect=1.0)
    with pytest.raises(EmptyNullSpaceError, match=rf"layer {name}q_proj: .*use rule=\"energy\" \(an outlier"):
        plan_for(model, flat, rule="paper")
    many_sinks = altered(stats, index=1, sinks=torch.randn(40, 32))
    with pytest.raises(EmptyNullSpaceError, match=rf"layer {name}o_proj: .*first-token directions take them all"):
        plan_for(model, many_sinks)
    broken = stats.inputs[1].covariance.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=rf"layer {name}o_proj: the statistics hold non-finite values; collect them again"
    ):
        plan_for(model, altered(stats, index=1, covariance=broken))
    with pytest.raises(ValueError, match=rf"layer {name}o_proj: the statistics hold non-finite values; collect them"):
        plan_for(model, altered(stats, index=1, sinks=torch.full((1, 32), float("inf"))))
    with pytest.raises(ValueError, match=rf"layer {name}q_proj: no token was counted; .*longer prompts"):
        plan_for(model, collect(model, [batch_of([[5], [8]])]))
    five = InputStatistics(stats.inputs[0].layers, torch.diag(torch.arange(5.0)), 9, torch.empty(0, 5), 0)
    with pytest.raises(ValueError, match=rf"layer {name}q_proj: its statistics have 5 features but it reads 32"):
        plan_for(model, CalibrationStatistics([five, *stats.inputs[1:]], stats.fingerprint, stats.prompts), protect=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_statistics_are_refused_without_the_projector_too(value):
    model = tiny_llama()
    stats = collect(model)
    broken = stats.inputs[0].covariance.clone()
    broken[1, 1] = value
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj: .*non-finite"):
        plan_for(model, altered(stats, covariance=broken), projector=False)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"rank": 0}, "rank must be 1 or more, got 0"),
        ({"rank": 4.0}, r"rank must be an integer of 1 or more, got 4\.0"),
        ({"alpha": 0}, "alpha must be positive, got 0"),
        ({"alpha": float("inf")}, "alpha must be positive"),
        ({"alpha": float("nan")}, "alpha must be positive"),
        ({"protect": 0.0}, r"protect must be a share in \(0, 1\]"),
        ({"protect": 99}, r"protect must be a share in \(0, 1\], such as 0.99, got 99"),
        ({"protect": float("nan")}, "protect must be a share"),
        ({"rule": "best"}, "rule must be one of .* got 'best'"),
        ({"rule": "rank"}, 'protect_dims must be given with rule="rank"'),
        ({"protect_dims": 3}, 'protect_dims must be given with rule="rank", and only with it'),
        ({"rule": "rank", "protect_dims": -1}, "protect_dims must be 0 or more, got -1"),
        ({"init": "random"}, "init must be one of .* got 'random'"),
        ({"damping": -0.1}, "damping must be 0 or more"),
        ({"damping": float("nan")}, "damping must be 0 or more"),
        ({"damping": float("inf")}, "damping must be 0 or more"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dropout": float("nan")}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_config_validation(settings, match):
    with pytest.raises(TypeError if settings == {"rank": 4.0} else ValueError, match=match):
        gk.GuardConfig(**settings)


def test_defaults():
    config = gk.GuardConfig()
    assert (config.rank, config.scale, config.rule, config.protect, config.init) == (
        16,
        2.0,
        "energy",
        0.99,
        "balanced",
    )
    assert config.projector and gk.GuardConfig(rank=8, alpha=4).scale == 0.5


@pytest.mark.parametrize(
    "config", [{}, {"init": "zero"}, {"projector": False}, {"rule": "rank", "protect_dims": 25, "alpha": 5.5}]
)
def test_save_and_load(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    plan = plan_for(model, **config)
    plan.save("plan.safetensors")
    loaded = gk.GuardPlan.load("plan.safetensors")
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.config == plan.config and loaded.model == plan.model and str(loaded) == str(plan)
    ids = batch_of()
    a, b = (gk.attach_guard(tiny_llama(), p)(**ids).logits for p in (plan, loaded))
    assert torch.equal(a, b)


def test_fingerprint_covers_everything():
    model = PlainModel()
    plan = plan_for(model)
    marks = {plan.fingerprint}
    for change in (
        lambda p: p.layers["q"].A0.view(-1)[0].add_(1e-6),
        lambda p: p.layers["k"].B0.view(-1)[0].add_(1e-6),
        lambda p: p.spaces[0].basis.view(-1)[0].add_(1e-6),
        lambda p: setattr(p.spaces[0], "complement", not p.spaces[0].complement),
        lambda p: setattr(p.spaces[0], "free_energy", 0.0),
        lambda p: setattr(p.layers["q"], "space", 1),
        lambda p: p.layers["q"].warnings.clear(),
        lambda p: setattr(p, "config", dataclasses.replace(p.config, dropout=0.1)),
        lambda p: p.model.layers.update(q="0" * 32),
    ):
        other = copy.deepcopy(plan)
        change(other)
        marks.add(other.fingerprint)
    assert len(marks) == 10


def test_a_tampered_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "plan.safetensors"
    model = PlainModel()
    for change in (
        lambda tensors, _: tensors["layer.0.A0"][0, 0].mul_(1 + 1e-6),
        lambda _, header: header["config"].update(dropout=0.1),
    ):
        plan_for(model).save(path)
        rewrite(path, change)
        with pytest.raises(ValueError, match="does not match its fingerprint; it was altered"):
            gk.GuardPlan.load(path)
    collect(model).save(path)
    with pytest.raises(ValueError, match="is not a guard plan file of this library but a calibration statistics file"):
        gk.GuardPlan.load(path)


def test_planning_changes_nothing_and_leaves_the_thread_count(capsys):
    model = tiny_llama()
    state, threads = copy.deepcopy(model.state_dict()), torch.get_num_threads()
    plan_for(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.get_num_threads() == threads
    assert capsys.readouterr() == ("", "")


def solved_within(budget, monkeypatch, workers=4, meet=1):
    """The most bytes and the most solves at once of a plan under that budget; ``meet`` solves wait for each other."""
    model, running, lock = tiny_llama(), [], threading.Lock()
    stats = collect(model)
    for entry in stats.inputs:
        entry.held = None  # nothing is held out: a solve for each input
        entry.held_tokens = 0
    whole = plan_for(model, stats)
    most, together = [0, 0], threading.Barrier(meet, timeout=60)
    null_space = plan_module.null_space

    def watched(covariance, *args, **kwargs):
        with lock:
            running.append(len(covariance))
            most[0] = max(most[0], sum(plan_module.solve_bytes(d, d * 32) for d in running))  # at least that
            most[1] = max(most[1], len(running))
        together.wait()
        result = null_space(covariance, *args, **kwargs)
        with lock:
            running.remove(len(covariance))
        return result

    monkeypatch.setattr(plan_module, "null_space", watched)
    threads = torch.get_num_threads()
    torch.set_num_threads(workers)
    try:
        plan = planned(model, stats, whole.config, max_memory=budget)
    finally:
        torch.set_num_threads(threads)
    assert plan.fingerprint == whole.fingerprint
    return most


def test_without_a_budget_every_worker_solves(monkeypatch):
    assert solved_within(None, monkeypatch, meet=4)[1] == 4  # eight inputs: they meet twice, or the barrier breaks


def test_solves_keep_to_a_memory_budget(monkeypatch):
    assert solved_within(1, monkeypatch)[1] == 1
    two_wide = 2 * plan_module.solve_bytes(48, 32 * 48)
    size, _ = solved_within(two_wide, monkeypatch)
    assert size <= two_wide
    with pytest.raises(ValueError, match='max_memory must be a number of bytes such as "4GB"'):
        planned(tiny_llama(), collect(tiny_llama()), max_memory="much")


@pytest.mark.parametrize(
    "features, cores, threads", [(48, 4, 1), (1536, 2, 1), (2816, 2, 2), (8192, 4, 4), (8192, 1, 1)]
)
def test_wide_solves_take_more_cores(features, cores, threads):
    assert plan_module.solve_threads(features, cores) == threads


def test_solves_share_the_cores_and_wide_ones_are_not_overtaken():
    """Two cores: those of two threads run alone and first, then the others two at a time."""
    lock, running, begun, together = threading.Lock(), [], [], threading.Barrier(2, timeout=60)
    threads = [1, 2, 1, 2, 1, 1]

    def solve(item):
        with lock:
            running.append(item)
            begun.append(item)
            assert sum(threads[i] for i in running) <= 2
        assert torch.get_num_threads() == threads[item]
        if threads[item] == 1:
            together.wait()
        with lock:
            running.remove(item)
        return 10 * item

    found = plan_module._in_parallel(solve, range(6), lambda i: threads[i], None, 2, threads)
    assert found == [0, 10, 20, 30, 40, 50] and begun[:2] == [1, 3]


def test_plans_made_at_the_same_time_leave_the_number_of_threads_alone():
    """While solves run on one thread each, a thread that starts elsewhere gets all; and so it is afterwards."""
    entered, leave = threading.Barrier(3), threading.Barrier(3)

    def solve(_item):
        entered.wait()
        leave.wait()
        return torch.get_num_threads()

    def fresh():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(2) as pool:
            plans = [pool.submit(plan_module._in_parallel, solve, [0], lambda _: 1, None, 1, [1]) for _ in range(2)]
            entered.wait()
            assert fresh() == 3
            leave.wait()
            assert [plan.result() for plan in plans] == [[1], [1]]
            assert list(pool.map(lambda _: torch.get_num_threads(), range(2))) == [3, 3]
        assert fresh() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_solver_is_told_how_many_tokens_there_were(monkeypatch):
    model, told, solver = tiny_llama(), [], plan_module.null_space
    stats = collect(model)

    def spy(covariance, sinks, *, tokens, **options):
        told.append(tokens)
        return solver(covariance, sinks, tokens=tokens, **options)

    monkeypatch.setattr(plan_module, "null_space", spy)
    plan_for(model, stats)
    (held,) = (entry.tokens - entry.held_tokens for entry in stats.inputs if entry.held_tokens)
    assert sorted(told) == sorted([held, *(entry.tokens for entry in stats.inputs)]) and held > 0


def test_an_input_of_zeros_is_named_as_such():
    model = PlainModel()
    with torch.no_grad():
        model.embed.weight.zero_()
    stats = collect(model, target_modules=["q"])
    assert stats.for_layer("q").tokens == sum(map(len, PROMPTS)) - len(PROMPTS)
    with pytest.raises(
        ValueError, match=r"layer q: its input is zero at all \d+ tokens; leave it out of target_modules"
    ):
        plan_for(model, stats)
