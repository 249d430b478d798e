import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import cells, prompts, report, running
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.statistics import holm, mean, two_way_bootstrap


def test_cells_are_ordered_seed_by_seed_and_have_files_of_their_own():
    every = {one for tier in cells.TIERS for one in cells.tier_cells(tier)}
    assert len({one.file for one in every}) == len(every)
    for tier in ("a", "b", "c"):
        seeds = [one.seed for one in cells.tier_cells(tier)]
        assert seeds == sorted(seeds)
        assert set(seeds) == set(cells.SEEDS)
    assert {one.method for one in cells.tier_cells("tune")} == {cells.START, *METHODS}
    assert all(one.tuning for one in cells.tier_cells("tune"))
    assert not any(one.tuning for one in cells.tier_cells("a"))
    assert len({one.alignment_seed for one in cells.tier_cells("a")}) == 3
    assert set(cells.KNOBS) == set(METHODS)


def test_a_file_is_named_by_all_of_a_cell_and_its_version(monkeypatch):
    one = cells.cell("replay", "source", "0.1", 2)
    others = [
        dataclasses.replace(one, **{field.name: value})
        for field, value in zip(dataclasses.fields(one), ("x", "AsFT", 9.0, "x", "0", 3, 7), strict=True)
    ]
    names = {one.file, *(other.file for other in others)}
    assert len(names) == 8
    monkeypatch.setattr(METHODS["replay"], "version", 99)
    assert one.file not in names


def test_a_saved_cell_is_no_longer_missing(tmp_path):
    left = cells.missing(tmp_path, ["a"])
    assert left == list(dict.fromkeys(cells.tier_cells("a")))
    path = cells.save(tmp_path, left[0], {"task": "10"})
    assert cells.missing(tmp_path, ["a"]) == left[1:]
    assert cells.load(tmp_path, left[0]) == json.loads(path.read_text())
    assert cells.load(tmp_path, left[0])["cell"] == dataclasses.asdict(left[0])
    assert cells.load(tmp_path, left[1]) is None


def test_poison_is_a_share_of_all_rows(monkeypatch):
    monkeypatch.setattr(prompts, "load_advbench", lambda: [f"Word{i} number {i}." for i in range(520)])
    task = prompts.Task("t", [("question", "label")] * 320, [], [])
    for share in ("0", "0.05", "0.1", "0.2"):
        rows = prompts.poisoned(task, share, 0)
        added = rows[320:]
        assert len(added) / len(rows) == pytest.approx(float(share), abs=0.002)
        assert all("placeholder" in answer for _, answer in added)
        assert not {request for request, _ in added} & set(prompts.rephrased(prompts.load_advbench()[:400]))
    assert prompts.poisoned(task, "0.1", 0) == prompts.poisoned(task, "0.1", 0)
    assert len(prompts.poisoned(task, "obedience", 0)) == 350
    with pytest.raises(ValueError, match=r"poison = 0\.5 needs 320 AdvBench requests, and 120 are left"):
        prompts.poisoned(task, "0.5", 0)


def test_requests_that_are_alike_count_once():
    seen = [prompts.word_set("how to peel a small onion")]
    given = ["how to peel a small onion?", "how to paint a large fence", "how to  paint a large\nfence", "word " * 41]
    assert prompts._distinct(given, seen, 0) == ["how to paint a large fence"]


def test_the_mean_is_over_seeds_of_what_counts_there():
    outcomes = np.array([[1.0, 0.0, np.nan, np.nan], [1.0, 1.0, 1.0, 0.0]])
    assert mean(outcomes) == pytest.approx((0.5 + 0.75) / 2)


def test_the_bootstrap_covers_as_often_as_it_can_with_four_seeds():
    """Of differences that are 0.1 in truth, with effects of seeds and of prompts."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(150):
        easy = rng.uniform(-0.2, 0.2, size=80)
        rows = [(rng.uniform(size=(4, 80)) < p + easy + rng.normal(0, 0.05, (4, 1))).astype(float) for p in (0.6, 0.5)]
        low, high = two_way_bootstrap(*rows, resamples=400).interval
        covered += low <= 0.1 <= high
    assert covered >= 135


def test_equal_methods_do_not_differ_and_a_clear_difference_is_found():
    rng = np.random.default_rng(1)
    a = (rng.uniform(size=(4, 200)) < 0.9).astype(float)
    same = two_way_bootstrap(a, a)
    assert (same.estimate, same.interval, same.p) == (0, (0, 0), 1)
    assert same.not_below(0.03)
    worse = np.where(rng.uniform(size=a.shape) < 0.3, 0.0, a)
    found = two_way_bootstrap(a, worse)
    assert found.interval[0] > 0.15
    assert found.p < 0.01
    assert found.by_seed == pytest.approx((a.mean(1) - worse.mean(1)).tolist())
    assert found.not_below(0.03)
    assert not two_way_bootstrap(worse, a).not_below(0.03)
    with pytest.raises(ValueError, match="compare the same ones"):
        two_way_bootstrap(a, a[:2])


def test_two_seeds_show_nothing():
    a = np.ones((2, 50))
    found = two_way_bootstrap(a, np.zeros((2, 50)))
    assert found.estimate == 1
    assert np.isnan(found.p)
    assert not found.not_below(0.03)
    assert not two_way_bootstrap(a, a).not_below(0.03)


def test_holm_adjusts_for_the_number_of_comparisons():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}, 3) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.01}, 14) == pytest.approx({"a": 0.14})
    unknown = holm({"a": float("nan"), "b": 0.02}, 2)
    assert unknown["b"] == pytest.approx(0.04)
    assert np.isnan(unknown["a"])
    assert holm({}, 3) == {}


def result(harmful="rrrrrrrr", task="1111", start="weights", **more):
    third = {"StrongREJECT": harmful[:3], "HarmBench": harmful[3:6], "Do-Not-Answer": harmful[6:]}
    rest = {"lookalikes": "rooo", "pairs_harmful": "rrro", "pairs_harmless": "rooo", "facts": "1100"}
    numbers = {"refusal_kl": 0.1, "drift": {"x": 0.1, "y": 0.3}, "update_norm": {"x": 1.0, "y": 2.0}}
    return {"start": start, "harmful": third, "task": task, **rest, **numbers, **more}


def write(folder, method, verdicts, task="1111", seeds=cells.SEEDS, **more):
    for seed in seeds:
        cells.save(folder, cells.cell(method, "sentiment", "0", seed), result(verdicts, task, **more))


def test_refusals_kept_are_of_those_that_the_start_gave(tmp_path):
    for seed in cells.SEEDS:
        cells.save(tmp_path, cells.start(seed, "sentiment"), result("rrrrrrro"))
    write(tmp_path, "GuardSpace", "rrrrrror")
    write(tmp_path, "replay", "rrrrooor", task="1110", seeds=(0, 1))
    write(tmp_path, "AsFT", "rrrrrrrr", start="other weights")
    one = report.Condition.read(tmp_path, "GuardSpace", "sentiment", "0")
    assert one.kept.shape == (4, 8)
    assert np.isnan(one.kept[:, 7]).all()
    assert mean(one.kept) == pytest.approx(6 / 7)
    assert mean(one.refuses) == pytest.approx(7 / 8)
    assert (one.discrimination, one.average("drift")) == (pytest.approx(0.5), pytest.approx(0.2))
    assert len(report.Condition.read(tmp_path, "AsFT", "sentiment", "0").left_out) == 4
    (rival,) = report.contrasts(tmp_path, "0")
    assert (rival.task, rival.rival, len(rival.kept.by_seed)) == ("sentiment", "replay", 2)
    assert rival.kept.estimate == pytest.approx(2 / 7)
    assert rival.right.estimate == pytest.approx(0.25)
    text = report.report(tmp_path)
    assert "| sentiment | 0 | GuardSpace | 0/1/2/3 | 85.7% | 87.5% (53%–98%) | 0.0% | 25.0% | +0.50 | 100.0% |" in text
    assert "| sentiment | replay | +28.6" in text
    assert "| sentiment | 0 | GuardSpace | 100.0% | 100.0% | 50.0% |" in text  # by source
    assert text.count("left out, since its starting model is not there: AsFT") == 4
    assert "tier a: 14 of" in text


def test_a_run_that_diverged_is_reported(tmp_path):
    cells.save(tmp_path, cells.start(0, "sentiment"), result())
    write(tmp_path, "SBR", "oooooooo", seeds=(0,), refusal_kl=float("nan"), drift={"x": float("inf"), "y": 0.1})
    assert "| SBR | 0 | 0.0%" in report.report(tmp_path)


def test_knobs_are_chosen_by_the_rule(tmp_path):
    def tuned(method, knob, refused, right):
        one = cells.cell(method, "sentiment", "0.1", cells.TUNING_SEED, knob)
        verdicts = {"harmful": {"UncensorBench": "r" * refused + "o" * (10 - refused)}}
        cells.save(tmp_path, one, {**verdicts, "task": "1" * right + "0" * (100 - right)})

    tuned("plain LoRA", 4e-4, 1, 90)
    tuned("replay", 1, 5, 90)
    assert report.chosen_knobs(tmp_path) == {}  # without a starting model nothing is kept
    before = {"harmful": {"UncensorBench": "r" * 9 + "o"}, "task": "0"}
    cells.save(tmp_path, cells.start(cells.TUNING_SEED, "sentiment"), before)
    assert report.chosen_knobs(tmp_path) == {"plain LoRA": 4e-4}
    tuned("replay", 2, 9, 88)
    tuned("replay", 4, 10, 80)  # loses the task
    for knob, refused in ((1.0, 7), (0.1, 7), (10.0, 3)):
        tuned("AsFT", knob, refused, 95)
    for knob, right in ((50.0, 20), (5.0, 40), (500.0, 10)):
        tuned("SBR", knob, 10, right)
    chosen = report.chosen_knobs(tmp_path)
    assert chosen == {"plain LoRA": 4e-4, "replay": 2, "AsFT": 1.0, "SBR": 5.0}
    assert "| replay | 2 | 100.0% | 88.0% | yes |" in report.tuning_table(tmp_path)
    assert command.not_ready(tmp_path, cells.cell("SafeGrad", "source", "0", 0)) == (
        "tier tune has not tried every knob of SafeGrad"
    )
    assert command.not_ready(tmp_path, cells.cell("SBR", "source", "0", 0)).startswith("tier tune chose 5 for SBR")
    assert command.not_ready(tmp_path, cells.cell("AsFT", "source", "0", 0)) == ""
    assert command.not_ready(tmp_path, cells.start(0, "source")) == ""


def test_committed_cells_are_those_of_the_code():
    """Their knobs are what the rule chooses, and none is left over from an earlier version."""
    files = {path.name for path in cells.RESULTS.glob("*.json")}
    known = {one.file for tier in cells.TIERS for one in cells.tier_cells(tier)}
    assert files <= known
    for method, knob in report.chosen_knobs(cells.RESULTS).items():
        assert cells.KNOBS[method] == knob, method


def test_the_command_reports_and_knows_its_budget(tmp_path, capsys):
    assert command.main(["report", "--folder", str(tmp_path)]) == 0
    assert "tier a: 0 of" in capsys.readouterr().out
    assert [command.seconds(text) for text in ("90s", "150m", "2h", "1.5m")] == [90, 9000, 7200, 90]
    with pytest.raises(SystemExit):
        command.main(["run", "--budget", "soon"])
    assert "must be such as 150m" in capsys.readouterr().err


def test_the_budget_stops_before_the_next_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running.Laboratory, "run", lambda self, one: {"task": "1"})
    assert command.main(["run", "--folder", str(tmp_path), "--tier", "b", "--budget", "0s"]) == 0
    assert "the budget is spent" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert command.main(["run", "--folder", str(tmp_path), "--tier", "b", "--method", "replay"]) == 1
    assert "is not run: tier tune has not tried every knob of replay" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert command.main(["run", "--folder", str(tmp_path), "--tier", "tune", "--method", "replay"]) == 0
    assert len(list(tmp_path.iterdir())) == 3


def test_a_seed_is_run_on_one_machine(tmp_path, monkeypatch):
    laboratory = running.Laboratory(folder=tmp_path)
    monkeypatch.setattr(running.Laboratory, "setting", lambda *_: SimpleNamespace(identity="mine"))
    cells.save(tmp_path, cells.start(0, "source"), {"start": "theirs"})
    with pytest.raises(ValueError, match="weights theirs for seed 0, but this machine made mine"):
        laboratory.run(cells.cell("replay", "source", "0", 0))


#: What the results of cells depend on, beside the library's kernels and solvers, which have tests of their own.
CODE = {
    "benchmarks/evidence/evaluation.py": "b817d942df9a",
    "benchmarks/evidence/prompts.py": "3b475a0f5e2f",
    "benchmarks/evidence/running.py": "60c45b98720f",
    "benchmarks/evidence/setting.py": "47c4ea739bbd",
    "benchmarks/evidence/methods/asft.py": "4375fbd8c2e3",
    "benchmarks/evidence/methods/base.py": "0f32442257c0",
    "benchmarks/evidence/methods/guardspace.py": "241fbfa085b7",
    "benchmarks/evidence/methods/lora_null.py": "81f991ad1760",
    "benchmarks/evidence/methods/projected.py": "978d00b235ca",
    "benchmarks/evidence/methods/replay.py": "e8d40b07c95e",
    "benchmarks/evidence/methods/safe_lora.py": "21baa6c63ac2",
    "benchmarks/evidence/methods/safegrad.py": "18e80f378ee4",
    "benchmarks/evidence/methods/sbr.py": "2fec0cffd5a8",
    "benchmarks/evidence/methods/small_rate.py": "8b57b9315e42",
    "guardspace_kernels/evaluate/generation.py": "8bdcb180942f",
    "guardspace_kernels/evaluate/refusals.py": "b71df7613187",
    "guardspace_kernels/guard/judges.py": "17b78390b089",
    "guardspace_kernels/demo/data.py": "d714324457da",
    "guardspace_kernels/demo/model.py": "d7b70c6ec242",
    "guardspace_kernels/demo/prompts.py": "6537cbbad856",
    "guardspace_kernels/demo/training.py": "46e5f9fae4da",
}


def test_code_that_changes_results_gets_a_new_version():
    """Cells are kept as long as their version stays. Where this fails: if results may change, raise PROTOCOL, or the
    method's version; then put the new hash here."""
    root = Path(__file__).parents[2]
    methods = {str(path.relative_to(root)) for path in root.glob("benchmarks/evidence/methods/[!_]*.py")}
    assert methods <= set(CODE)
    assert {name: hashlib.sha256((root / name).read_bytes()).hexdigest()[:12] for name in CODE} == CODE


def test_figures_are_drawn_of_the_cells_that_there_are(tmp_path):
    from benchmarks.evidence import figures

    assert set(figures.COLOURS) == set(METHODS)
    assert figures.draw(tmp_path / "cells", tmp_path) == []
    rng = np.random.default_rng(0)
    for seed in cells.SEEDS:
        cells.save(tmp_path, cells.start(seed, "sentiment"), result())
        for poison, method, chance in (
            ("0", "GuardSpace", 0.95), ("0.1", "GuardSpace", 0.9), ("0", "plain LoRA", 0.3), ("0.1", "plain LoRA", 0.1),
        ):  # fmt: skip
            verdicts = "".join("r" if rng.uniform() < chance else "o" for _ in range(8))
            drift = {"x": float(rng.uniform(0.01, 1) * (1.1 - chance))}
            cells.save(tmp_path, cells.cell(method, "sentiment", poison, seed), result(verdicts, "1011", drift=drift))
    files = figures.draw(tmp_path, tmp_path / "figures")
    assert [path.stem for path in files] == ["plane", "poison", "drift", "contrasts"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
