"""State dicts of guarded models: what is refused leaves every parameter as it was."""

from __future__ import annotations

import pytest
import torch
from peft import set_peft_model_state_dict
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(torch|peft|transformers)")

LAYER = "model.layers.1.mlp.down_proj"  # the last one that is loaded
KEY = f"base_model.model.{LAYER}"


def everything(model):
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def unchanged(model, before):
    now = everything(model)
    return now.keys() == before.keys() and all(torch.equal(now[n], t) for n, t in before.items())


@pytest.fixture
def state(tiny):
    """Of a trained model, in which every parameter differs from a fresh one but the base weights of guarded layers."""
    model = tiny.guarded()
    tiny.train(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "embed" in name:
                p.add_(0.1)
    return {k: v.clone() for k, v in model.state_dict().items()}


def put(key, change):
    def apply(state):
        state[key] = change(state[key].clone() if key in state else None)

    return apply


def entry(row, column, value):
    def change(t):
        t[row, column] = value
        return t

    return change


A, B = f"{KEY}.lora_A.default.weight", f"{KEY}.lora_B.default.weight"
CHANGES = {
    "1e20 in A": (put(A, entry(0, 0, 1e20)), ValueError, "outside the null space"),
    "1e38 in A": (put(A, entry(0, 0, 1e38)), ValueError, "outside the null space"),
    "1e20 in the start": (put(A, entry(2, 0, 1e20)), ValueError, "another plan"),
    "1e20 in B0": (put(B, entry(0, 2, 1e20)), ValueError, "another plan"),
    "inf in B": (put(B, entry(0, 0, torch.inf)), ValueError, "non-finite"),
    "A is no matrix": (put(A, lambda t: t.sum()), ValueError, "4 adapter rows"),
    "A of integers": (put(A, lambda t: t.mul(1000).long()), ValueError, "(not of floating-point|another plan)"),
    "A is no tensor": (put(A, lambda t: t.tolist()), ValueError, "must be tensors, got list"),
    "A of another width": (put(A, lambda t: t[:, :3]), ValueError, r"(expected \(2, 24\)|another plan)"),
    "another base weight": (put(f"{KEY}.base_layer.weight", lambda t: t + 1e-3), ValueError, "state's weight is not"),
    "a base weight that is none": (put(f"{KEY}.base_layer.weight", lambda t: 3), ValueError, "state's weight is not"),
    "a norm that is none": (
        put("base_model.model.model.norm.weight", lambda t: t.tolist()),
        RuntimeError,
        "size mismatch",
    ),
    "an embedding of another size": (
        put("base_model.model.model.embed_tokens.weight", lambda t: t[:3]),
        RuntimeError,
        r"nothing of it was loaded\. size mismatch: .*model\.model\.embed_tokens",
    ),
}
STRICTLY = {
    "an unknown key": (
        put(f"{KEY}.projector.basis", lambda _: torch.rand(24, 3)),
        r"unknown: .*projector\.basis \(1\)",
    ),
    "a missing key": (lambda state: state.pop(f"{KEY}.base_layer.weight"), r"missing: .*base_layer\.weight \(1\)"),
}


def loads(case, strict):
    """Ways to load a state, as trainers wrap the model."""
    return {
        "model": lambda m, s: m.load_state_dict(s, strict=strict),
        "base_model": lambda m, s: m.base_model.load_state_dict(
            {k.removeprefix("base_model."): v for k, v in s.items()}, strict=strict
        ),
        "assign": lambda m, s: m.load_state_dict(s, strict=strict, assign=True),
        "wrapper": lambda m, s: nn.ModuleDict({"module": m}).load_state_dict(
            {f"module.{k}": v for k, v in s.items()}, strict=strict
        ),
        "peft": lambda m, s: set_peft_model_state_dict(m, {k.replace(".default", ""): v for k, v in s.items()}),
    }[case]


@pytest.mark.parametrize(
    "case, way, strict",
    [(case, "model", False) for case in CHANGES]
    + [
        (case, way, strict)
        for case in ("1e20 in A", "an embedding of another size")
        for way in ("model", "base_model", "assign", "wrapper")
        for strict in (True, False)
        if (way, strict) != ("model", False)
    ],
)
def test_refused_state_changes_nothing(tiny, state, case, strict, way):
    change, error, message = CHANGES[case]
    change(state)
    model = tiny.guarded()
    before = everything(model)
    with pytest.raises(error, match=message):
        loads(way, strict)(model, state)
    assert unchanged(model, before)


@pytest.mark.parametrize("way", ["model", "assign", "base_model"])
@pytest.mark.parametrize("case", STRICTLY)
def test_keys_that_do_not_fit_change_nothing(tiny, state, case, way):
    change, message = STRICTLY[case]
    change(state)
    model = tiny.guarded()
    before = everything(model)
    with pytest.raises(RuntimeError, match=message):
        loads(way, True)(model, state)
    assert unchanged(model, before)
    loads(way, False)(model, state)
    assert not unchanged(model, before)
    assert all(torch.equal(t, everything(model)[n]) for n, t in before.items() if "projector" in n or "frozen_" in n)


def test_adapter_alone_that_is_refused_changes_nothing(tiny, state):
    adapter = {k: v for k, v in state.items() if "lora_" in k}
    put(A, entry(0, 0, 1e20))(adapter)
    model = tiny.guarded()
    before = everything(model)
    with pytest.raises(ValueError, match="outside the null space"):
        loads("peft", False)(model, adapter)
    assert unchanged(model, before)


def test_wrapper_loads_a_state_that_fits(tiny, state):
    model = tiny.guarded()
    assert loads("wrapper", True)(model, state).missing_keys == []
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "lora_" not in k)


def test_state_before_a_cast_fits_after_it(tiny):
    model = tiny.guarded()
    tiny.train(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    cast = tiny.guarded().to(torch.bfloat16)
    cast.load_state_dict(state)
    assert (cast.guarded_layers()[LAYER].B - model.guarded_layers()[LAYER].B).abs().max() < 1e-2
    with pytest.raises(ValueError, match="state's weight is not that of the base model"):
        tiny.guarded().load_state_dict({k: v.clone() for k, v in cast.state_dict().items()})


def test_where_hooks_of_others_decide_torch_does(tiny, state):
    def rename(state_dict, prefix, *_):
        for key in [key for key in state_dict if key.startswith(f"{prefix}old.")]:
            state_dict[key.replace("old.", "")] = state_dict.pop(key)

    model = tiny.guarded()
    model.get_base_model().model.norm._register_load_state_dict_pre_hook(rename)
    key = "base_model.model.model.norm.weight"
    state["base_model.model.model.norm.old.weight"] = state.pop(key)
    model.load_state_dict(state)
    assert torch.equal(model.state_dict()[key], state["base_model.model.model.norm.old.weight"])
