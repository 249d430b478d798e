"""Plans that are whole, signed with their own fingerprint, and wrong."""

import copy
import dataclasses
import time
from contextlib import suppress

import pytest
import torch
from guard_helpers import MODELS, PlainModel, plan_for, rewrite, tiny_gpt2, tiny_llama

import guardspace_kernels as gk
from guardspace_kernels.guard.null_space import EmptyNullSpaceError, NullSpace
from guardspace_kernels.guard.plan_check import _ENERGY, check_plan


def space(change):
    """Changes the space of layer q, the first one."""

    def apply(plan):
        change(plan.spaces[0])

    return apply


def setting(**fields):
    return space(lambda one: vars(one).update(fields))


def scaled(one):
    one.basis = one.basis * 1.01


def one_scaled(one):
    one.basis = one.basis.clone()
    one.basis[:, 0] *= 1.001


def repeated(one):
    one.basis = torch.cat([one.basis[:, :1], one.basis[:, :-1]], dim=1)


def random_basis(one):
    one.basis = torch.linalg.qr(torch.randn(one.basis.shape, generator=torch.Generator().manual_seed(0)))[0]


def not_a_number(one):
    one.basis = one.basis.clone()
    one.basis[0, 0] = torch.nan


def empty(one):
    d = one.basis.shape[0]
    vars(one).update(basis=torch.empty(d, 0), complement=True, protected=0, sink_directions=0)


def empty_and_says_so(one):
    empty(one)
    one.free_energy = 1.0


def flipped(one):
    one.complement = not one.complement


def flipped_with_counts(one):
    flipped(one)
    one.protected = one.basis.shape[0] - one.protected


def thicker(one):
    """Of the same space."""
    whole = torch.linalg.qr(one.basis.double(), mode="complete")[0].float()
    vars(one).update(basis=whole[:, one.basis.shape[1] :], complement=not one.complement)


def layer(**fields):
    def apply(plan):
        plan.layers["q"] = dataclasses.replace(plan.layers["q"], **{k: f(plan) for k, f in fields.items()})

    return apply


def outside(plan):
    A0 = plan.layers["q"].A0.clone()
    return A0 + 1e-3 * A0.norm() * torch.ones_like(A0)


def poked(factor, value):
    def change(plan):
        t = getattr(plan.layers["q"], factor).clone()
        t[0, 0] = value
        return t

    return change


def config(**fields):
    def apply(plan):
        plan.config = dataclasses.replace(plan.config, **fields)

    return apply


WRONG = {
    "an empty basis": (space(empty), "protects no dimension, yet leaves only a share"),
    "an empty basis that says so": (space(empty_and_says_so), "leaves a share 1 of the energy free with protect=0.9"),
    "a scaled basis": (space(scaled), r"not orthonormal \(‖QᵀQ z − z‖ / ‖z‖ = 2\.0e-02\)"),
    "one column scaled": (space(one_scaled), "not orthonormal"),
    "one column twice": (space(repeated), "not orthonormal"),
    "a random orthonormal basis": (space(random_basis), "A₀ is outside the null space"),
    "a NaN": (space(not_a_number), "not a finite matrix in float32"),
    "a basis of zeros": (space(lambda one: vars(one).update(basis=0 * one.basis)), "not orthonormal"),
    "a basis in bfloat16": (space(lambda one: vars(one).update(basis=one.basis.bfloat16())), "matrix in float32"),
    "a flipped complement": (space(flipped), "dimensions, for"),
    "a flipped complement that counts": (space(flipped_with_counts), "A₀ is outside the null space"),
    "the thicker basis": (space(thicker), r"basis, of \d protected and \d free dimensions, is not the thinner one"),
    "more protected than there are": (setting(protected=10**6), "dimensions, for 1000000 protected ones"),
    "more sinks than directions": (setting(sink_directions=9), "protects 9 directions of first tokens among"),
    "a negative energy": (setting(free_energy=-0.1), "a share -0.1 of the energy free"),
    "an energy that is NaN": (setting(free_energy=float("nan")), "a share nan of the energy free"),
    "too much energy": (setting(free_energy=0.3), "a share 0.3 of the energy free with protect=0.9"),
    "no space": (lambda plan: plan.spaces.__setitem__(0, None), "has no protected space with projector=True"),
    "no projector": (config(projector=False), "has protected space with projector=False"),
    "an index of -1": (layer(space=lambda _: -1), "space is number -1 of 2"),
    "an index beyond": (layer(space=lambda _: 2), "space is number 2 of 2"),
    "a true index": (layer(space=lambda _: True), "space is number True of 2"),
    "another space": (layer(space=lambda _: 1), r"the plan's basis is of 8 dimensions, the layer reads 10"),
    "A0 outside": (layer(A0=outside), r"A₀ is outside the null space \(‖A₀P − A₀‖ / ‖A₀‖ = "),
    "A0 NaN": (layer(A0=poked("A0", torch.nan)), r"starting factor is not a finite \(3, 10\) in float32"),
    "B0 inf": (layer(B0=poked("B0", torch.inf)), r"starting factor is not a finite \(8, 3\) in float32"),
    "A0 of another rank": (layer(A0=lambda plan: plan.layers["q"].A0[:2]), r"not a finite \(3, 10\) .*\(2, 10\)"),
    "another rank": (config(rank=2), r"not a finite \(2, 10\)"),
    "a rank above the layer's": (config(rank=9), r"rank 9 is above min\(d_out, d_in\) = 8"),
    "a start away from zero": (config(init="zero"), 'B₀ is not zero with init="zero"'),
    "another shape": (layer(shape=lambda _: (8, 11)), r"not a finite \(3, 11\)"),
    "another name": (layer(name=lambda _: "v"), "has it as v, with a hash of its weight"),
    "no hash": (lambda plan: plan.model.layers.pop("q"), "has it as q, without a hash of its weight"),
    "left out as well": (lambda plan: plan.left_out.update(q="?"), "has it as q"),
    "another rule": (config(rule="rank", protect_dims=1), "of them for first tokens, with protect_dims=1"),
}


@pytest.fixture(scope="module")
def plan():
    return plan_for(PlainModel())


@pytest.mark.parametrize("case", WRONG)
def test_wrong_plans_are_refused_at_attach_and_on_loading(plan, tmp_path, case):
    change, match = WRONG[case]
    wrong = copy.deepcopy(plan)
    change(wrong)
    model = PlainModel()
    with pytest.raises(ValueError, match=rf"layer q: .*{match}.*; it was altered. Take the original, or plan again"):
        gk.attach_guard(model, wrong)
    assert type(model.q) is torch.nn.Linear
    try:
        wrong.save(tmp_path / "plan")  # with a fingerprint of its own
    except (ValueError, KeyError, AttributeError, TypeError):
        return
    with pytest.raises(ValueError, match=str(tmp_path / "plan")):
        gk.GuardPlan.load(tmp_path / "plan")


def test_plans_without_layers_or_with_idle_spaces_are_refused(plan):
    none = copy.deepcopy(plan)
    none.layers.clear()
    with pytest.raises(ValueError, match="the plan has no layer"):
        none.check()
    idle = copy.deepcopy(plan)
    idle.spaces.append(idle.spaces[0])
    with pytest.raises(ValueError, match="the plan's coverage is of 2 of 3 spaces"):
        idle.check()
    idle.coverage = None
    with pytest.raises(ValueError, match="space 2 of the plan belongs to no layer"):
        idle.check()


def change(**fields):
    return lambda _, header: header.update(fields)


HEADERS = {
    "a layer twice": (lambda _, h: h["layers"][1].__setitem__(0, h["layers"][0][0]), "a layer is there twice"),
    "no layers": (change(layers=[]), r"header\.layers must be a list of 1 or more entries, got \[\]"),
    "layers of three": (lambda _, h: h["layers"][0].pop(), r"header\.layers\[0\] must be a list of 4 entries"),
    "a negative size": (lambda _, h: h["layers"][0][1].__setitem__(0, -8), r"layers\[0\]\[1\]\[0\] must be a whole n"),
    "a huge size": (
        lambda _, h: h["layers"][0][1].__setitem__(0, 2**50),
        r"B0' is .* expected .* \(1125899906842624, 3\)",
    ),
    "a space without a count": (lambda _, h: h["spaces"][0].pop("protected"), r"header\.spaces\[0\] lacks protected"),
    "another field": (change(more=1), "header has an unknown entry 'more'"),
    "no model": (lambda _, h: h.pop("model"), "header lacks model"),
    "a model of lists": (change(model=[]), r"header\.model must be an object, got \[\]"),
    "no rank": (lambda _, h: h["config"].pop("rank"), r"header\.config lacks rank"),
    "a rank of text": (lambda _, h: h["config"].update(rank="3"), r"config\.rank must be a whole number .* got '3'"),
    "no rank to speak of": (lambda _, h: h["config"].update(rank=0), r"is torch\.float32 of shape \(3, 10\)"),
    "protect above 1": (lambda _, h: h["config"].update(protect=1.5), "protect must be a share"),
    "an unknown rule": (lambda _, h: h["config"].update(rule="?"), "rule must be one of energy, rank, paper, got '?'"),
    "a tensor more": (lambda t, _: t.update(x=torch.ones(1)), "has a tensor 'x', which belongs to nothing"),
    "a tensor less": (lambda t, _: t.pop("layer.0.A0"), r"lacks the tensor 'layer\.0\.A0'"),
    "another dtype": (lambda t, _: t.update({"layer.0.A0": t["layer.0.A0"].double()}), "is torch.float64 of shape"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_wrong_headers_are_refused_by_name(plan, tmp_path, case):
    alter, match = HEADERS[case]
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    rewrite(path, alter)
    with pytest.raises(ValueError, match=match) as raised:
        gk.GuardPlan.load(path)
    assert str(raised.value).startswith(f"{path}")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"init": "zero"},
        {"init": "paper"},
        {"projector": False},
        {"protect": 1.0},
        {"protect": 0.3},
        {"rule": "rank", "protect_dims": 0},
        {"rule": "rank", "protect_dims": 5},
        {"rule": "paper"},
    ],
    ids=str,
)
def test_right_plans_pass(kind, config):
    with suppress(EmptyNullSpaceError):  # nothing is left of some layers
        plan_for(MODELS[kind](), **config).check()


def basis_of(d, k, seed):
    return torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed)))[0]


def test_wide_layers_pass_in_little_time():
    """As many and as wide spaces as a model of 135 million parameters has: 120, of 576 and 1536 dimensions."""
    plan = plan_for(tiny_llama(), rank=16)
    template = next(iter(plan.layers.values()))
    plan.layers, plan.spaces, plan.coverage = {}, [], None
    plan.model.layers.clear()
    bases = {d: basis_of(d, d // 2, 0) for d in (576, 1536)}
    for i in range(120):
        d = 1536 if i % 4 == 3 else 576
        Q = bases[d]
        A0 = torch.randn(16, d)
        A0 -= (A0 @ Q) @ Q.T
        plan.layers[f"{i}"] = dataclasses.replace(
            template, name=f"{i}", shape=(576, d), A0=A0, B0=torch.zeros(576, 16), space=i
        )
        plan.spaces.append(NullSpace(Q, True, d // 2, 0, 0.05))
        plan.model.layers[f"{i}"] = ""
    began = time.process_time()
    check_plan(plan)
    assert time.process_time() - began < 10
    plan.layers["7"].A0[3, 5] += 1e-3 * plan.layers["7"].A0.norm()
    with pytest.raises(ValueError, match="layer 7: the plan's A₀ is outside"):
        check_plan(plan)


def test_gpt2_and_energies_at_their_bounds():
    plan = plan_for(tiny_gpt2(), protect=0.5)
    for one in plan.spaces:
        one.free_energy = 0.5 + _ENERGY / 2
    plan.check()
