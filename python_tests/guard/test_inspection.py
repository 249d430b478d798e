"""What statistics say before a plan is made."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from guard_helpers import MODELS, PROMPTS, batch_of, collect, hand_made

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


def test_other_statistics_from_activations_of_our_own():
    model = MODELS["llama"]()
    other = [[30, 31, 32, 33, 34], [35, 36, 37]]
    parts = [collect(model, [batch_of(PROMPTS[:1])]), collect(model, [batch_of(PROMPTS[1:2])])]
    parts.append(collect(model, [batch_of(PROMPTS[2:])]))
    seen = collect(model, [batch_of(other)])
    report = inspect_statistics(parts, task=seen, heldout=seen, rank=1, progress=False)
    made, unseen = hand_made(model, PROMPTS, seen.layers), hand_made(model, other, seen.layers)
    for one in report.inputs:
        X, Y = made[one.layers[0]][0], unseen[one.layers[0]][0]
        directions = torch.linalg.svd(X, full_matrices=False).Vh
        for level, protected in enumerate(one.protected):
            Q = directions[:protected]
            share = float((Y - Y @ Q.T @ Q).square().sum() / Y.square().sum())
            assert one.task[level] == pytest.approx(share, rel=1e-3)
            assert one.heldout[level] == pytest.approx(share**0.5, rel=1e-3)
    assert [prompts for prompts, _ in report.prompt_curve] == [1, 2, 5]
    at = LEVELS.index(report.recommended)
    first = []
    for layers in (one.layers for one in report.inputs):
        X, Y = hand_made(model, PROMPTS[:1], seen.layers)[layers[0]][0], unseen[layers[0]][0]
        values, directions = torch.linalg.svd(X, full_matrices=False)[1:]
        held = values.square().cumsum(0) / values.square().sum()
        Q = directions[: int((held < LEVELS[at]).sum()) + 1]
        first.append(float(((Y - Y @ Q.T @ Q).square().sum() / Y.square().sum()).sqrt()))
    assert report.prompt_curve[0][1] == pytest.approx(sum(first) / len(first), rel=1e-3)
    assert "held-out" in str(report) and "in reach" not in str(report) and "prompts" in report.enough_prompts()


def test_the_advice(stats):
    report = inspect_statistics(stats, rank=1, progress=False)
    at = LEVELS.index(report.recommended)
    assert report.free(at) >= 1 / 3 and (at + 1 == len(LEVELS) or report.free(at + 1) < 1 / 3)
    narrow = min(one.features - one.protected[0] for one in report.inputs)
    assert inspect_statistics(stats, rank=narrow, progress=False).recommended is not None
    hopeless = inspect_statistics(stats, rank=narrow + 1, progress=False)
    assert hopeless.recommended is None and "lower the rank" in str(hopeless)
    for curve, words in (
        ([(10, 0.5), (20, 0.44)], "lowered it by 12%: more prompts would help"),
        ([(10, 0.5), (15, 0.47), (20, 0.46)], "lowered it by 8% only: enough prompts"),
        ([(15, 0.5), (20, 0.46)], "give parts of half as many prompts"),
    ):
        report.prompt_curve = curve
        assert words in str(report)


def test_statistics_of_another_model_are_refused(stats):
    with pytest.raises(ValueError, match="the statistics given as task belong to another model"):
        inspect_statistics(stats, task=collect(MODELS["llama"](seed=1)), progress=False)


@pytest.mark.parametrize("others", [False, True])
def test_the_figure(stats, others, tmp_path, capsys):
    paths = [tmp_path / name for name in ("a", "b", "c.png")]
    stats.save(paths[0])
    collect(MODELS["llama"](), [batch_of([[30, 31, 32], [33, 34]])]).save(paths[1])
    extra = ["--task", str(paths[1]), "--heldout", str(paths[1])] if others else []
    command = ["inspect", str(paths[0]), *([str(paths[0])] if others else []), *extra, "--rank", "1"]
    assert main([*command, "--png", str(paths[2])]) == 0
    assert paths[2].read_bytes()[:4] == b"\x89PNG" and "recommended: protect=" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 3


def test_the_figure_needs_matplotlib(stats, tmp_path, capsys, monkeypatch):
    stats.save(tmp_path / "s")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["inspect", str(tmp_path / "s"), "--png", str(tmp_path / "f.png")]) == 2
    assert "--png needs matplotlib" in capsys.readouterr().err


def test_eigenvectors_are_found_once_per_input_and_only_where_they_are_needed(stats, monkeypatch):
    calls = []
    for name in ("eigh", "eigvalsh"):
        solve = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda C, name=name, solve=solve: calls.append(name) or solve(C))
    alone = inspect_statistics(stats, progress=False)
    held = sum(entry.held is not None for entry in stats.inputs)
    # Where prompts can be held out, of all prompts and of the others.
    assert sorted(calls) == sorted(["eigvalsh"] * (len(stats.inputs) - held) + ["eigh"] * 2 * held) and held == 1
    calls.clear()
    both = inspect_statistics(stats, task=stats, heldout=stats, progress=False)
    assert calls == ["eigh"] * (len(stats.inputs) + held)
    for a, b in zip(alone.inputs, both.inputs, strict=True):
        assert a.protected == b.protected and a.outside == pytest.approx(b.outside, abs=1e-6)
