"""What statistics say before a plan is made."""

from __future__ import annotations

import json

import pytest
import torch
from guard_helpers import MODELS, PROMPTS, collect, hand_made

from guardspace_kernels.cli import main
from guardspace_kernels.guard.inspection import LEVELS, inspect_statistics
from guardspace_kernels.guard.null_space import null_space


@pytest.fixture
def stats():
    return collect(MODELS["llama"]())


def test_levels_protect_what_a_plan_protects(stats):
    report = inspect_statistics(stats, progress=False)
    assert [one.layers for one in report.inputs] == [entry.layers for entry in stats.inputs]
    for one, entry in zip(report.inputs, stats.inputs, strict=True):
        for level, protected, outside in zip(LEVELS, one.protected, one.outside, strict=True):
            space = null_space(entry.covariance, entry.sinks[:0], protect=level)
            assert protected == space.protected
            assert outside**2 == pytest.approx(space.free_energy, abs=1e-6)


def test_curve_paper_threshold_and_sinks_from_activations_of_our_own():
    model = MODELS["llama"]()
    stats = collect(model)
    made = hand_made(model, PROMPTS, stats.layers)
    for one in inspect_statistics(stats, progress=False).inputs:
        X, _, first = made[one.layers[0]]
        energies = torch.linalg.svdvals(X).square()
        held = energies.cumsum(0) / energies.sum()
        for level, protected in zip(LEVELS, one.protected, strict=True):
            assert held[protected - 1] >= level - 1e-5
            assert protected == 1 or held[protected - 2] <= level + 1e-5
        distinct = stats.for_layer(one.layers[0]).sinks.double()
        sinks = distinct.square().sum(dim=1).mean() * len(first)
        assert one.sink_share == pytest.approx(float(sinks / (sinks + energies.sum())), rel=1e-4)
        # Float32 statistics: eigenvalues at the threshold itself may fall on either side.
        assert (energies > 2e-6 * energies[0]).sum() <= one.paper <= one.features


def test_report_prints_saves_and_warns_of_few_tokens(stats, tmp_path):
    report = inspect_statistics(stats, progress=False)
    stats.inputs[0].tokens = 3
    text = str(inspect_statistics(stats, progress=False))
    d = stats.inputs[0].covariance.shape[0]
    assert f"({3} for {d})" in text and len([x for x in text.splitlines() if x[:8].strip()[:2] == "0."]) == len(LEVELS)
    free = [report.free(i) for i in range(len(LEVELS))]
    assert free == sorted(free, reverse=True)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_unusable_covariances_are_refused_by_name(stats, value):
    stats.inputs[1].covariance = torch.full_like(stats.inputs[1].covariance, value)
    with pytest.raises(ValueError, match=f"layer {stats.inputs[1].layers[0]}: its covariance is zero or not finite"):
        inspect_statistics(stats, progress=False)


def test_no_inputs_are_refused(stats):
    stats.inputs.clear()
    with pytest.raises(ValueError, match="stats holds no inputs"):
        inspect_statistics(stats)


def test_command(stats, tmp_path, capsys):
    stats.save(tmp_path / "s.safetensors")
    assert main(["inspect", str(tmp_path / "s.safetensors"), "--json", str(tmp_path / "r.json")]) == 0
    assert "free dimensions" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["prompts"] == stats.prompts


@pytest.mark.parametrize("content, words", [(None, "does not exist"), (b"no safetensors", "s.safetensors")])
def test_command_refuses_other_files(content, words, tmp_path, capsys):
    if content is not None:
        (tmp_path / "s.safetensors").write_bytes(content)
    assert main(["inspect", str(tmp_path / "s.safetensors")]) == 2
    assert words in capsys.readouterr().err


def test_command_says_that_it_cannot_write(stats, tmp_path, capsys):
    stats.save(tmp_path / "s.safetensors")
    (tmp_path / "file").touch()
    assert main(["inspect", str(tmp_path / "s.safetensors"), "--json", str(tmp_path / "file" / "r.json")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("guardspace inspect: ")
