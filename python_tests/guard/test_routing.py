"""Mixture-of-experts models, from the statistics to the exported adapter."""

import copy
import json
import pickle
import re

import peft
import pytest
import torch
from guard_helpers import (
    PROMPTS,
    PlainModel,
    assert_same_bits,
    batch_of,
    collect,
    dense_projector,
    hand_made,
    perturb,
    plan_for,
    planned,
    relative_error,
    rewrite,
    tiny_gpt2,
    tiny_llama,
    weight_of,
)
from test_interrupted_statistics import Stop
from test_statistics import check_equal, same_statistics
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.guard.collection import plan_collection
from guardspace_kernels.guard.estimate import estimate_preparation
from guardspace_kernels.guard.inspection import inspect_statistics
from guardspace_kernels.guard.layers import find_layers
from guardspace_kernels.guard.routing import Routing, grouped_as_siblings
from guardspace_kernels.guard.tokens import Tokens

D, WIDTH = 32, 12
SEEDED = torch.Generator().manual_seed(3)
MANY = [[first, *torch.randint(2, 50, (n,), generator=SEEDED).tolist()] for n in range(4, 16) for first in (5, 8)]
HELD_OUT = ([7, 9, 4, 4], [5, 14, 3, 8, 2, 6], [22, 5, 3])
BATCHES = [batch_of(MANY[:8]), batch_of(MANY[8:15], "left", 19), batch_of(MANY[15:])]


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, WIDTH, bias=False), nn.Linear(D, WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, D, bias=False)

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """``order``: of an expert's rows; "place": those that chose it first come first. ``idle``: experts never chosen,
    which are called with no rows if ``calls_idle``. ``scaled``: rows are multiplied by the router's weights.
    ``shared``: one that every token is given to."""

    def __init__(self, experts=5, top=2, order="token", idle=(), calls_idle=False, scaled=False, shared=False):
        super().__init__()
        self.shared = Expert() if shared else None
        self.router = nn.Linear(D, experts, bias=False)
        self.experts = nn.ModuleList([Expert() for _ in range(experts)])
        self.top, self.order, self.idle, self.calls_idle, self.scaled = top, order, list(idle), calls_idle, scaled

    def route(self, rows):
        never = torch.tensor(self.idle, dtype=torch.long, device=rows.device)
        logits = self.router(rows).index_fill(1, never, -torch.inf)
        return torch.topk(logits.softmax(dim=-1), self.top, dim=-1)

    def forward(self, hidden_states):
        rows = hidden_states.reshape(-1, D)
        weights, chosen = self.route(rows)
        out = self.shared(rows) if self.shared else torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(chosen == e)
            if self.order == "place":
                place, token = torch.where((chosen == e).T)
            if self.calls_idle or len(token):
                weight = weights[token, place, None]
                read = rows[token] * weight if self.scaled else rows[token]
                out.index_add_(0, token, expert(read) * weight)
        return out.reshape(hidden_states.shape)


def tiny_moe(seed=0, layers=2, **options):
    model = tiny_llama(seed, num_hidden_layers=layers)
    for block in model.model.layers:
        block.mlp = Experts(**options)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def hand_routed(model, prompts):
    """Layer of an expert -> (X, C, first-token inputs) in float64, from the router and the blocks' inputs alone: every
    prompt without padding, and without a hook in an expert."""
    made = {}
    for name, block in model.named_modules():
        if not isinstance(block, Experts):
            continue
        rows = [[[], []] for _ in block.experts]
        for prompt in prompts:
            seen = []
            handle = block.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0][0]))
            model(torch.tensor([prompt]))
            handle.remove()
            for t, (x, chosen) in enumerate(zip(seen[0], block.route(seen[0]).indices.tolist(), strict=True)):
                for e in chosen:
                    rows[e][t == 0].append(x.double())
        for e in range(len(block.experts)):
            x, first = (torch.stack(part) if part else torch.empty(0, D, dtype=torch.float64) for part in rows[e])
            gate, up = (weight_of(model, f"{name}.experts.{e}.{which}_proj") for which in ("gate", "up"))
            for layer in ("gate_proj", "up_proj", "down_proj"):
                X, firsts = x, first
                if layer == "down_proj":
                    X, firsts = (torch.nn.functional.silu(z @ gate.T) * (z @ up.T) for z in (x, first))
                made[f"{name}.experts.{e}.{layer}"] = X, X.T @ X, firsts
    return made


def experts_of(stats):
    return [name for name in stats.layers if ".experts." in name]


KINDS = {
    "in the order of the tokens": {},
    "by place": {"order": "place"},
    "every token to both experts": {"order": "place", "experts": 2},
    "idle": {"idle": [1, 4]},
    "called without rows": {"idle": [1, 4], "calls_idle": True},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_covariances_equal_those_of_the_routed_rows(kind, side):
    model = tiny_moe(**KINDS[kind])
    made = hand_routed(model, PROMPTS)
    for batches in ([batch_of(side=side)], [batch_of([prompt], side, 11) for prompt in PROMPTS]):
        stats = collect(model, batches, target_modules=r".*\.experts\..*")
        check_equal(stats, made)
        for entry in stats.inputs:
            X, _, firsts = made[entry.layers[0]]
            assert entry.routed and entry.sink_tokens == len(firsts) and (len(entry.sinks) > 0) == (len(firsts) > 0)
            assert (entry.tokens == 0) >= (len(X) == 0)
        groups = [["gate_proj", "up_proj"], ["down_proj"]] * (2 * len(model.model.layers[0].mlp.experts))
        assert [[name.rsplit(".", 1)[1] for name in entry.layers] for entry in stats.inputs] == groups
    whole = collect(model, [batch_of(side=side)], separate_sink=False).for_layer("model.layers.1.mlp.experts.0.up_proj")
    X, _, firsts = made["model.layers.1.mlp.experts.0.up_proj"]
    assert whole.tokens == len(X) + len(firsts) and len(whole.sinks) == 0
    assert relative_error(whole.covariance, X.T @ X + firsts.T @ firsts) < 2e-5


def test_dense_layers_of_such_a_model_are_as_ever():
    model = tiny_moe(shared=True)
    stats = collect(model, BATCHES)
    dense = [name for name in stats.layers if ".experts." not in name]
    assert {name.split(".", 4)[4] for name in dense} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "router"),
        *("shared.gate_proj", "shared.up_proj", "shared.down_proj"),
    }
    check_equal(collect(model, target_modules=dense), hand_made(model, PROMPTS, dense))
    same = collect(model, BATCHES, target_modules=dense)
    assert all(not entry.routed for entry in same.inputs)
    assert [entry.layers for entry in stats.inputs if not entry.routed] == [entry.layers for entry in same.inputs]
    for entry in same.inputs:
        mine = stats.for_layer(entry.layers[0])
        assert torch.equal(mine.covariance, entry.covariance) and torch.equal(mine.sinks, entry.sinks)
    assert all(entry.tokens == sum(map(len, MANY)) - len(MANY) for entry in same.inputs)


class Around(nn.Module):
    """A module that is called with x, and hands ``picked`` rows of it to a layer."""

    def __init__(self, picked):
        super().__init__()
        self.picked, self.experts = picked, nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x):
        return self.experts[0](self.picked(x))


def looked_up(mask, x, picked, dtype=torch.float32):
    """(real, first) of the rows that the layer read."""
    module, found = Around(picked).to(dtype), []
    outer = nn.Sequential(module)
    routing = Routing(outer)
    module.experts[0].register_forward_pre_hook(
        lambda _, args: found.extend(routing.tokens("0.experts.0", args[0]))
    )  # fmt: skip
    with routing.watching({"input_ids": Tokens(torch.tensor(mask, dtype=torch.bool))}):
        outer(torch.tensor(x, dtype=dtype))
    assert all(not hooks for m in outer.modules() for hooks in (m._forward_hooks,)) and not routing.calls
    return [t.tolist() for t in found]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equal_rows_count_as_often_as_their_places_are_real_and_first(dtype):
    a, b, c, pad = [1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]
    mask = [[0, 1, 1, 1], [0, 0, 1, 1]]  # the first ones are a and b
    x = [[b, a, c, b], [pad, c, b, a]]  # b: padding, first, later. c: padding and later. a: first and later

    def rows_of(*places):
        return looked_up(mask, x, lambda x: x.reshape(-1, 2)[list(places)], dtype)

    assert rows_of(4, 2, 5, 0) == [[False, True, False, True], [False, False, False, True]]
    x = [[b, a, c, c], [pad, a, b, c]]  # a: padding and first. b: padding and first
    assert rows_of(1, 5, 0, 6, 4, 3) == [[True, False, True, False, False, True], [True, False, True] + [False] * 3]
    assert rows_of() == [[], []]


def test_rows_are_compared_bit_by_bit():
    nan, mask = float("nan"), [[1, 1, 0]]
    x = [[[0.0, 1.0], [2.0, 3.0], [nan, 4.0]]]
    assert looked_up(mask, x, lambda x: x[0, [2, 1]]) == [[False, True], [False, False]]
    assert looked_up(mask, x, lambda x: x[0, [1, 0]]) == [[True, True], [False, True]]
    for other in (lambda x: -x[0, :1], lambda x: x[0, :2] + 1e-6, lambda x: x[0, :2].double()):
        with pytest.raises(ValueError, match=r"layer 0\.experts\.0: input of shape"):
            looked_up(mask, x, other)
    # As many rows as there are tokens, none of them known: prompts flattened to rows, in order.
    assert looked_up(mask, x, lambda x: x[0] + 1) == [[True, True, False], [True, False, False]]
    assert looked_up(mask, x, lambda x: x[0, [2, 1, 0]]) == [[False, True, True], [False, False, True]]


def test_experts_that_read_something_else_are_refused_by_name():
    name = r"layer model\.layers\.0\.mlp\.experts\.\d\.gate_proj: input of shape \(\d+, 32\) does not match the "
    wanted = name + r"attention mask \(2, \d\): its rows are not those of an enclosing.*leave them out of target_mod"
    for options in ({}, {"max_memory": "1MB"}):
        with pytest.raises(ValueError, match=wanted):
            collect(tiny_moe(scaled=True), **options)
    with pytest.raises(ValueError, match=r"does not match the attention mask \(2, \d\)"):
        collect(tiny_moe(scaled=True), target_modules=["down_proj"])
    stats = collect(tiny_moe(scaled=True), target_modules=["q_proj", "router"])
    assert len(stats.inputs) == 4 and not any(entry.routed for entry in stats.inputs)


def test_only_experts_beside_reached_ones_may_be_unreached():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.spare = Experts(), nn.Linear(D, D)

        def forward(self, x):
            return self.mlp(x)

    model = tiny_moe()
    model.model.layers[0].mlp = Spare()
    for options in ({}, {"max_memory": "100kB"}):
        with pytest.raises(ValueError, match=r"layer model\.layers\.0\.mlp\.spare was never reached"):
            collect(model, **options)
    names = r"model\.layers\.0\.mlp\.experts\.1\.gate_proj, .*, model\.layers\.1\.mlp\.experts\.1\.down_proj"
    with pytest.raises(ValueError, match=rf"6 layers were never reached by the forward pass: {names}; leave them out"):
        collect(tiny_moe(idle=[1]), target_modules=r".*\.experts\.1\..*")


def test_unreached_layers_are_grouped_as_their_siblings():
    groups = [["b.q"], ["b.experts.0.up", "b.experts.0.gate"], ["b.experts.0.down"]]
    names = ["b.k", "b.experts.1.down", "b.experts.1.gate", "b.experts.2.other", "b.experts.1.up", "b.v"]
    got = grouped_as_siblings(names, groups, {"b.experts."})
    assert got == [
        ["b.k"],
        ["b.experts.1.down"],
        ["b.experts.1.up", "b.experts.1.gate"],
        ["b.experts.2.other"],
        ["b.v"],
    ]


def test_statistics_of_other_tokens_merge_though_other_experts_saw_them():
    model = tiny_moe(experts=12)
    parts = [collect(model, [batch_of([prompt])]) for prompt in PROMPTS]
    reached = [{entry.layers[0] for entry in part.inputs if entry.tokens} for part in parts]
    assert any(a != b for a in reached for b in reached)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    same_statistics(merged, collect(model))
    check_equal(collect(model, target_modules=experts_of(merged)), hand_routed(model, PROMPTS))
    assert [entry.routed for entry in merged.inputs] == [entry.routed for entry in collect(model).inputs]
    assert {entry.routed for entry in merged.inputs} == {True, False}
    assert_same_bits(parts[0].merge(parts[1]), parts[1].merge(parts[0]))


def test_all_reduce_keeps_what_is_routed(tmp_path):
    import torch.distributed as dist

    stats = collect(tiny_moe(idle=[2]))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        reduced = stats.all_reduce()
    finally:
        dist.destroy_process_group()
    same_statistics(reduced, stats, 1e-12)
    assert [entry.routed for entry in reduced.inputs] == [entry.routed for entry in stats.inputs]


def test_files_say_what_is_routed_and_older_ones_are_read(tmp_path):
    stats = collect(tiny_moe(idle=[2]))
    routed = [entry.routed for entry in stats.inputs]
    assert 0 < sum(routed) < len(routed)
    path = tmp_path / "statistics"
    stats.save(path)
    for other in (gk.CalibrationStatistics.load(path), copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert_same_bits(other, stats)
        assert [entry.routed for entry in other.inputs] == routed
    rewrite(path, lambda _, header: [entry.pop("routed") for entry in header["inputs"]], earlier=True)
    with pytest.warns(UserWarning, match="written by an earlier version and holds no hashes"):
        older = gk.CalibrationStatistics.load(path)
    assert_same_bits(older, stats)
    assert not any(entry.routed for entry in older.inputs)


@pytest.mark.parametrize("options", [{}, {"answer_tokens": 2}], ids=str)
@pytest.mark.parametrize("budget", [None, 60_000])
def test_checkpoints_and_passes_give_the_bits_of_one_run(tmp_path, budget, options):
    settings = {"experts": 12, "idle": [3]}
    batches = [batch_of([prompt], "left", 17) for prompt in MANY[:5]]
    whole = collect(tiny_moe(**settings), batches, **options)
    first = collect(tiny_moe(**settings), batches[:1], **options)
    late = [entry.layers[0] for entry in first.inputs if entry.tokens < whole.for_layer(entry.layers[0]).tokens == 0]
    assert not late and any(not x.tokens and y.tokens for x, y in zip(first.inputs, whole.inputs, strict=True))
    if budget:
        plan = plan_collection(tiny_moe(**settings), batches, max_memory=budget)
        assert len(plan.passes) > 2
        assert {one.layers for part in plan.passes for one in part} == {tuple(entry.layers) for entry in whole.inputs}
    path = tmp_path / "checkpoint"

    def stopping():
        yield from batches[:2]
        raise Stop

    if budget:  # batches are listed first: the second pass is what stops
        runs = []
        model = tiny_moe(**settings)

        def stop(*_):
            runs.append(1)
            if len(runs) == 2 + len(batches) + 2:
                raise Stop

        model.model.layers[0].register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            collect(model, batches, checkpoint=path, max_memory=budget, **options)
    else:
        with pytest.raises(Stop):
            collect(tiny_moe(**settings), stopping(), checkpoint=path, **options)
    for _ in range(2):  # the second time nothing is left to do
        again = collect(tiny_moe(**settings), batches, checkpoint=path, max_memory=budget, **options)
        assert_same_bits(again, whole)
        assert [entry.routed for entry in again.inputs] == [entry.routed for entry in whole.inputs]
    assert_same_bits(collect(tiny_moe(**settings), batches, max_memory=budget, **options), whole)


def test_experts_that_saw_too_few_tokens_get_no_adapter():
    model = tiny_moe(idle=[1, 4])
    stats = collect(model, BATCHES)
    plan = plan_for(model, stats, rank=2)
    unseen = [name for name in experts_of(stats) if ".experts.1." in name or ".experts.4." in name]
    assert plan.left_out == dict.fromkeys(unseen, "saw no calibration token")
    assert list(plan.layers) == [name for name in stats.layers if name not in unseen]
    assert set(plan.model.layers) == set(plan.layers)
    for entry in stats.inputs:
        for name in entry.layers:
            if name not in unseen:  # every index into the spaces is that of its own input
                space = plan.space_of(name)
                assert relative_error(1 - held(space, entry.covariance), torch.tensor(space.free_energy)) < 1e-4


def held(space, C):
    outside = dense_projector(space.basis, space.complement)
    return 1 - (outside @ C.double()).trace() / C.double().trace()


@pytest.mark.parametrize("config", [{"rule": "rank", "protect_dims": 5}, {"protect": 0.8}, {"projector": False}])
def test_the_rule_is_two_tokens_for_each_direction(config):
    model, name = tiny_moe(), "model.layers.1.mlp.experts.3.down_proj"
    stats = collect(model, BATCHES)
    dense, entry = stats.for_layer("model.layers.0.self_attn.q_proj"), stats.for_layer(name)
    space = plan_for(model, stats, rank=2, **config).space_of(name)
    directions = space.protected - space.sink_directions if space else 0
    assert space is None or min(directions, space.sink_directions) > 0
    for tokens, kept in ((2 * directions, True), (2 * directions - 1, False), (0, False)):
        if tokens < 0 or (tokens == 0 and kept):
            continue
        entry.tokens = tokens
        plan = plan_for(model, stats, rank=2, **config)
        assert (name in plan.layers) == kept and (name in plan.left_out) != kept
        if not kept and tokens:
            reason = f"{directions} directions to protect, but only {tokens} calibration tokens"
            assert plan.left_out == {name: reason}
        assert "model.layers.0.self_attn.q_proj" in plan.layers
    if space is None:
        entry.tokens = 1  # nothing is protected: nothing is undetermined
        assert name in plan_for(model, stats, rank=2, **config).layers
    dense.tokens = 1  # not routed: warned of, as ever
    warnings = plan_for(model, stats, rank=2, **config).layers["model.layers.0.self_attn.q_proj"].warnings
    assert warnings == ([] if space is None else ["only 1 calibration tokens for 32 dimensions"])
    dense.tokens = 0
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj: no token was counted"):
        plan_for(model, stats, rank=2, **config)


def test_a_plan_lists_saves_and_signs_what_it_leaves_out(tmp_path):
    model = tiny_moe(idle=[1])
    stats = collect(model, BATCHES)
    plan = plan_for(model, stats, rank=2)
    rows = str(plan).splitlines()[len(str(plan.coverage).splitlines()) + 1 :]
    assert [row.split()[0] for row in rows[:-1]] == [*plan.layers, *plan.left_out] and len(plan.left_out) == 6
    assert all(row.endswith("left out: saw no calibration token") for row in rows[len(plan.layers) : -1])
    assert rows[-1] == plan.summary() and plan.summary().endswith("; 6 layers left out, which stay frozen")
    plan.save(tmp_path / "plan")
    loaded = gk.GuardPlan.load(tmp_path / "plan")
    assert loaded.left_out == plan.left_out and str(loaded) == str(plan) and loaded.fingerprint == plan.fingerprint
    other = copy.deepcopy(plan)
    other.left_out.popitem()
    assert other.fingerprint != plan.fingerprint
    rewrite(tmp_path / "plan", lambda _, header: header["left_out"].clear())
    with pytest.raises(ValueError, match="does not match its fingerprint"):
        gk.GuardPlan.load(tmp_path / "plan")
    # A plan that leaves nothing out has the fingerprint and the file that it had before there were experts.
    dense = plan_for(model, stats, rank=2)
    dense.left_out = {}
    dense.save(tmp_path / "dense")
    rewrite(tmp_path / "dense", lambda _, header: header.pop("left_out"), earlier=True)
    with pytest.warns(UserWarning, match="holds no hashes"):
        dense = gk.GuardPlan.load(tmp_path / "dense")
    assert dense.left_out == {}


def test_a_plan_without_layers_is_refused():
    model = tiny_moe(idle=[1])
    stats = collect(model, [batch_of(PROMPTS[:1])])
    names = [name for name in experts_of(stats) if ".experts.1." in name]
    wanted = (
        r"every layer is left out, first model\.layers\.0\.mlp\.experts\.1\.gate_proj \(saw no calibration token\); "
    )
    with pytest.raises(
        ValueError, match=wanted + r"collect .* on more prompts, lower protect \(now 0\.99\), or add layers"
    ):
        planned(model, stats, gk.GuardConfig(rank=2), target_modules=names)


def test_a_rank_above_the_routers_outputs_names_it():
    model = tiny_moe()
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.\d\.mlp\.router: rank 6 is above min\(d_out, d_in\) = 5"
    ):
        plan_for(model, collect(model, BATCHES), rank=6)


def trained(guarded, steps=4, step_mode=False):
    """A few steps on batches that some experts do not see."""
    optimizer = torch.optim.AdamW([p for p in guarded.parameters() if p.requires_grad], lr=3e-2)
    if step_mode:
        gk.guard_optimizer(optimizer, guarded)
    for i in range(steps):
        batch = batch_of(HELD_OUT[i % 2 :])
        guarded(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return guarded.eval()


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
@pytest.mark.parametrize("calls_idle", [True, False])
def test_training_export_and_merge(calls_idle, residual, tmp_path):
    base = tiny_moe(idle=[1], calls_idle=calls_idle)
    stats = collect(base, BATCHES)
    plan = plan_for(base, stats, rank=2, rule="rank", protect_dims=8)
    guarded = gk.attach_guard(copy.deepcopy(base), plan, residual=residual)
    ids = batch_of(MANY[:5])
    assert torch.allclose(guarded(**ids).logits, base(**ids).logits, atol=1e-4)
    trained(guarded, step_mode=not calls_idle)
    assert set(guarded.guarded_layers()) == set(plan.layers) and plan.left_out
    moved = (guarded(**ids).logits - base(**ids).logits).norm() / base(**ids).logits.norm()
    assert moved > 1e-3
    with torch.no_grad():
        for name in plan.layers:
            layer, old, space = guarded.guarded_layers()[name], base.get_submodule(name), plan.space_of(name)
            d = layer.in_features
            protected = torch.eye(d) - dense_projector(space.basis, space.complement).float()
            x = torch.cat([torch.randn(30, d) @ protected, stats.for_layer(name).sinks])
            assert relative_error(layer(x), old(x)) < 2e-5
            assert layer(x[:0]).shape == (0, layer.out_features)
        for name in plan.left_out:
            assert type(guarded.get_base_model().get_submodule(name)) is nn.Linear
            assert torch.equal(weight_of(guarded.get_base_model(), name), weight_of(base, name))
    report = gk.export_lora(guarded, tmp_path / "lora", stats=stats)
    assert max(report.leak.values()) < 1e-5 and set(report.drift) == set(plan.layers)
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora")).eval()
    assert torch.allclose(plain(**ids).logits, guarded(**ids).logits, atol=1e-4)
    guarded.save_pretrained(tmp_path / "saved")
    again = gk.attach_guard(copy.deepcopy(base), plan, residual=residual)
    again.load_adapter(tmp_path / "saved")
    for name, layer in again.guarded_layers().items():
        assert torch.equal(layer.A, guarded.guarded_layers()[name].A)
        assert torch.equal(layer.B, guarded.guarded_layers()[name].B)
    assert torch.allclose(again.eval()(**ids).logits, guarded(**ids).logits, atol=1e-5)
    logits = guarded(**ids).logits
    assert torch.allclose(guarded.merge_and_unload()(**ids).logits, logits, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_certificate_of_held_out_prompts(kind):
    base = tiny_moe(**KINDS[kind])
    stats = collect(base, BATCHES)
    plan = plan_for(base, stats, rank=2, rule="rank", protect_dims=5)
    guarded = perturb(gk.attach_guard(copy.deepcopy(base), plan))
    report = gk.certify(guarded, stats, heldout=[batch_of(HELD_OUT[:2]), batch_of(HELD_OUT[2:], "left", 7)])
    assert [row.name for row in report.layers] == list(plan.layers)
    answers = []
    for prompt in HELD_OUT:
        ids = torch.tensor([prompt])
        answers.append(base.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids)))
    heldout = hand_routed(base, [row[0].tolist() for row in answers])
    made = hand_routed(base, MANY)
    for row in report.layers:
        if ".experts." not in row.name:
            assert row.heldout_drift > 0
            continue
        F, G = (t.double() for t in guarded.guarded_layers()[row.name].delta_factors())
        W = weight_of(base, row.name)
        space = plan.space_of(row.name)
        P = dense_projector(space.basis, space.complement)
        X, Y = made[row.name][0], heldout[row.name][0]
        assert row.drift == pytest.approx(float((X @ G.T @ F.T).norm() / (X @ W.T).norm()), rel=1e-3)
        if len(Y):
            assert row.heldout_drift == pytest.approx(float((Y @ G.T @ F.T).norm() / (Y @ W.T).norm()), rel=1e-3)
            assert row.heldout_outside == pytest.approx(float((Y @ P).norm() / Y.norm()), rel=1e-3)
    left_out = [note for note in report.notes if "left out" in note]
    assert left_out == (
        [f"{len(plan.left_out)} layers are left out of the plan and stay frozen"] if plan.left_out else []
    )


def test_a_certificate_says_which_layers_saw_nothing():
    base = tiny_moe(experts=12)
    stats = collect(base, BATCHES)
    guarded = perturb(gk.attach_guard(copy.deepcopy(base), plan_for(base, stats, rank=2, rule="rank", protect_dims=2)))
    few = collect(base, [batch_of(PROMPTS[3:4])])
    report = gk.certify(guarded, few, heldout=[batch_of(PROMPTS[3:4])], answer_tokens=1)
    unseen = [row for row in report.layers if few.for_layer(row.name).tokens == 0]
    assert unseen and all(row.drift == 0 for row in unseen)
    assert f"{len(unseen)} layers read none of the calibration tokens: their drift says nothing" in report.notes
    blank = [row.name for row in report.layers if row.heldout_drift is None]
    assert blank and set(blank) < {row.name for row in report.layers}
    assert {row.heldout_outside is None for row in report.layers if row.name in blank} == {True}
    assert str(report) and json.dumps(report.to_dict())
    assert not any("read none" in note for note in gk.certify(guarded, stats).notes)


def test_inspection_lists_the_experts_that_saw_nothing():
    base = tiny_moe(idle=[1])
    stats = collect(base, BATCHES)
    report = inspect_statistics(stats, rank=2, progress=False)
    assert [one.layers for one in report.inputs] == [entry.layers for entry in stats.inputs if entry.tokens]
    assert report.left_out == [name for name in stats.layers if not stats.for_layer(name).tokens]
    first = report.left_out[0]
    assert f"left out: 6 layers of experts to which some of the statistics routed no token, first {first}" in str(
        report
    )
    few = collect(base, [batch_of(PROMPTS[3:4])])
    missed = [name for name in stats.layers if not few.for_layer(name).tokens]
    assert set(report.left_out) < set(missed)
    for statistics, others in (([few, stats], {"heldout": stats}), (stats, {"heldout": few}), (stats, {"task": few})):
        assert inspect_statistics(statistics, rank=2, progress=False, **others).left_out == missed
    assert "left out" not in str(inspect_statistics(collect(tiny_llama()), rank=2, progress=False))


def tiny_fused(kind):
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    settings = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 60, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        "initializer_range": 0.3, "num_experts_per_tok": 2,
    }  # fmt: skip
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **settings)).eval()
    config = Qwen3MoeConfig(num_experts=4, moe_intermediate_size=16, head_dim=8, mlp_only_layers=[0], **settings)
    return Qwen3MoeForCausalLM(config).eval()


FUSED = {
    "mixtral": ("model.layers.0.mlp.experts", "(4, 96, 32)"),
    "qwen3": ("model.layers.1.mlp.experts", "(4, 32, 32)"),
}


@pytest.mark.parametrize(
    "target",
    ["all-linear", ".*_proj", r".*mlp\.experts", ["q_proj", "gate_up_proj"], ["experts"], ["v_proj", "mlp.experts"]],
    ids=str,
)
@pytest.mark.parametrize("kind", FUSED)
def test_experts_in_one_parameter_are_refused_by_name(kind, target):
    model, (name, shape) = tiny_fused(kind), FUSED[kind]
    wanted = re.escape(f"target_modules={target!r} includes {name}.gate_up_proj, the weights of all experts as one ")
    wanted += re.escape(f"parameter of shape {shape}, which cannot be guarded; name the other layers in target_modules")
    with pytest.raises(TypeError, match=wanted + ".*stay frozen"):
        collect(model, target_modules=target)


def test_one_name_for_dense_layers_and_experts_is_refused_and_a_longer_one_is_not():
    model = tiny_fused("qwen3")
    with pytest.raises(TypeError, match=r"\['down_proj'\] includes model\.layers\.1\.mlp\.experts\.down_proj"):
        find_layers(model, ["down_proj"])
    assert list(find_layers(model, ["mlp.down_proj"])) == ["model.layers.0.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"\['gate'\] matches no Linear"):  # its router is no Linear
        find_layers(model, ["gate"])


def test_other_parameters_of_three_dimensions_are_no_experts():
    class Convolved(PlainModel):
        def __init__(self):
            super().__init__()
            self.experts_mix, self.places = nn.Conv1d(10, 10, 3), nn.Parameter(torch.zeros(2, 3, 4))

    assert list(find_layers(Convolved())) == ["q", "k", "out"]
    assert len(find_layers(tiny_gpt2())) == 8


@pytest.mark.parametrize("target", [["q_proj", "v_proj", "o_proj"], r".*self_attn\.(q|v|o)_proj"], ids=str)
@pytest.mark.parametrize("kind", FUSED)
def test_attention_alone_is_guarded_in_such_models(kind, target, tmp_path):
    base = tiny_fused(kind)
    stats = collect(base, BATCHES, target_modules=target)
    assert len(stats.layers) == 6 and not any(entry.routed for entry in stats.inputs)
    plan = plan_for(base, stats)
    assert not plan.left_out
    guarded = trained(gk.attach_guard(copy.deepcopy(base), plan))
    report = gk.certify(guarded, stats, heldout=[batch_of(HELD_OUT)], answer_tokens=2)
    assert not report.notes and report.max_drift > 0 and report.heldout.kl > 0
    ids = batch_of(MANY[:5])
    gk.export_lora(guarded, tmp_path, stats=stats)
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.allclose(plain(**ids).logits, guarded(**ids).logits, atol=1e-4)
    assert not torch.allclose(guarded(**ids).logits, base(**ids).logits, atol=1e-3)
    for name, p in base.named_parameters():
        if ".mlp." in name:
            assert torch.equal(p, guarded.get_base_model().get_parameter(name))


def test_an_estimate_counts_experts_that_its_few_tokens_do_not_reach():
    base = tiny_moe(experts=16)
    estimate = estimate_preparation(base, prompts=4, tokens_per_prompt=8, rank=2)
    assert sum(map(len, estimate.collection.passes)) == len(collect(base, BATCHES).inputs)
    for model in (base, tiny_fused("mixtral")):
        with pytest.raises(
            TypeError, match=r"forward does not run on the meta device, without values .*load the model's weights"
        ):
            estimate_preparation(model.to("meta"), prompts=4, tokens_per_prompt=8, rank=2, target_modules=["q_proj"])
