"""torch.ops.guardspace.* check as the public functions do: no kernel gets a pointer that does not fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import automatic, gpu_kernels  # noqa: F401
from wrong_arguments import ACCEPTED, GOOD, OPS, lora, lora_backward

import guardspace_kernels as gk
from guardspace_kernels.ops import _library

#: What only looks wrong: any number of tokens or rows, any float dtype of small matrices, any width of a basis.
TOKENS = {"longer", "shorter", "one more dimension"}
FLOATS = {"float16", "float64"}
FINE = {
    **{f"projected_lora{kind} x": TOKENS for kind in ("", "_forward")},
    **{
        f"projected_lora{kind} {name}": more | FLOATS
        for kind in ("", "_forward", "_backward")
        for name, more in {
            "lora_A": set(), "lora_B": set(), "frozen_A": set(), "frozen_B": set(),
            "basis": {"wider", "narrower", "None"},
        }.items()
    },
    **{f"projected_lora{kind} bias": {"None"} for kind in ("", "_forward")},
    "null_project_ g": TOKENS | FLOATS,
    "null_project_ basis": {"wider", "narrower"} | FLOATS,
    "null_project_list_ g": {f"first {name}" for name in TOKENS | FLOATS},
    "null_project_list_ basis": {f"first {name}" for name in {"wider", "narrower"} | FLOATS},
    "projected_adamw_ bases": {f"first {name}" for name in {"wider", "narrower"} | FLOATS},
    "covariance_update_ covariance": {"transposed", "float64"},
    "covariance_update_ x": FLOATS,
    "covariance_update_ mask": {"int32", "bool", "None"},
    "covariance_update_list_ covariance": {"first transposed", "first float64"},
    "covariance_update_list_ x": {f"first {name}" for name in FLOATS},
    "covariance_update_list_ mask": {"first int32", "first bool", "first None"},
    "symmetrize_ covariance": {"transposed", "float64", "on meta"},
    "squared_drift covariance": {"transposed", "float64"},
    "squared_drift F": {"longer", "shorter"} | FLOATS,
    "squared_drift G": FLOATS,
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes():
    """(op, argument, change, outcome, outcome of the fake kernel) on the reference, and on what is chosen."""
    script = Path(__file__).with_name("wrong_arguments.py")
    runs = [
        subprocess.Popen([sys.executable, str(script), name], stdout=subprocess.PIPE, text=True)
        for name in ("reference", "auto")
    ]
    rows = []
    for run in runs:
        lines = [json.loads(line) for line in run.communicate()[0].splitlines()]
        assert run.returncode == 0, f"ended by {run.returncode} at {lines[-1]}"
        rows += [line for line in lines if len(line) == 5]
    return rows


@automatic
def test_every_registered_op_is_in_the_table():
    assert set(GOOD) == {name.removeprefix("guardspace::") for name in _library.LIBRARY._op_defs}


@automatic
@pytest.mark.parametrize("op", GOOD)
def test_wrong_arguments_are_refused_by_name_and_by_the_fake_kernel_alike(op, outcomes):
    rows = [row[1:] for row in outcomes if row[0] == op]
    assert len(rows) >= 2 * 17
    for argument, change, real, fake in rows:
        where = f"{argument} {change}: {real!r} | {fake!r}"
        if not argument or change in FINE.get(f"{op} {argument}", ()):
            assert real == fake == ACCEPTED, where
            continue
        assert re.match("(TypeError|ValueError|RuntimeError): ", real), where
        singular = {"bases": "basis"}.get(argument, argument.removesuffix("s"))
        if argument == "weight" and "wid" not in change:  # what does not fit beside it is named
            singular = "weight|bias|lora_B"
        assert re.search(rf"\b({argument}|{singular})\b", real), where
        # The dispatcher's own refusals print the value.
        assert real == fake or all("Expected a value of type" in text for text in (real, fake)), where


def test_a_gradient_of_another_length_is_refused_before_a_kernel_reads_it():
    call = lora_backward()
    for tokens in (1, 4, 5000):
        with pytest.raises(ValueError, match=r"dy must be torch\.float32 of shape \(5, 3, 6\) on cpu .*, got"):
            OPS.projected_lora_backward(*{**call, "dy": torch.randn(tokens, 3, 6)}.values())


def test_saved_tensors_that_come_back_changed_are_refused():
    """A hook that packs activations must give back what it took: backward reads them by address."""
    call = {**lora(), "x": torch.randn(5, 3, 8, requires_grad=True)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.half() if t.dim() == 3 else t):
        y = gk.ops.projected_lora(**call)
    with pytest.raises((TypeError, ValueError), match=r"projected_lora: .*torch\.float16"):
        y.sum().backward()


@pytest.mark.parametrize("seed", [torch.tensor(3, device="meta"), torch.tensor(3).to_sparse()])
def test_a_seed_without_a_value_is_refused(seed):
    with pytest.raises((TypeError, ValueError), match=r"seed must be (on the CPU or on cpu|a dense tensor)"):
        gk.ops.projected_lora(**{**lora(), "seed": seed})


def strided(t):
    """Equal, with strides that nothing else has."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
    return wide[..., ::2].copy_(t)


def check_strides(op, call):
    expected = op(*call.values())
    for name, value in call.items():
        if isinstance(value, torch.Tensor) and value.dim():
            actual = op(*{**call, name: strided(value)}.values())
            for a, b in zip(actual, expected, strict=True):
                assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name


def test_tensors_of_any_strides_are_read():
    check_strides(OPS.projected_lora_forward, lora())
    check_strides(OPS.projected_lora_backward, lora_backward())


@automatic
def test_tensors_of_any_strides_are_read_on_a_gpu(gpu_kernels):  # noqa: F811
    check_strides(OPS.projected_lora_forward, lora())
    check_strides(OPS.projected_lora_backward, lora_backward())


@automatic
@pytest.mark.parametrize("autocast", [False, True])
def test_the_public_functions_name_what_is_not_a_tensor(autocast):
    ops = gk.ops
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for name in ("x", "weight", "lora_A", "lora_B"):
            with pytest.raises((TypeError, RuntimeError), match=f"{name} must be a tensor, got None"):
                ops.projected_lora(**{**lora(), name: None})
        for call, message in (
            (lambda: ops.projected_lora([[1.0]], *list(lora().values())[1:4]), "x must be a tensor, got list"),
            (lambda: ops.null_project_(None, torch.eye(3)), "g must be a tensor or a list of them, got NoneType"),
            (lambda: ops.null_project_(torch.eye(3), None), "basis must be one tensor"),
            (lambda: ops.null_project_([torch.eye(3)], None), "basis must be a list"),
            (lambda: ops.covariance_update_(None, torch.eye(3)), "covariance must be a tensor or a list of them"),
            (lambda: ops.covariance_update_([torch.eye(3)], None), "x and mask must be lists"),
            (lambda: ops.covariance_update_(torch.eye(3), None), "x must be one tensor"),
            (lambda: ops.symmetrize_(None), "covariance must be a tensor, got None"),
            (lambda: ops.squared_drift(torch.eye(3), None, torch.eye(3)), "F must be a tensor, got None"),
        ):
            with pytest.raises(TypeError, match=message):
                call()
