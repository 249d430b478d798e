"""The suite itself: nothing wrong gets a number, and what is stored is what was measured."""

import json

import pytest
import torch
from torch.utils._pytree import tree_leaves

import guardspace_kernels as gk
from benchmarks import bench_covariance, bench_projected_lora, bench_training_step, run, targets, timing

PEAKS = {"flops": {"float32": 1e9, "bfloat16": 1e9}, "flops_source": "made up", "copy": 1e9}
TURNS = {"budget": 0.0, "least": 2, "most": 2}


@pytest.fixture
def case():
    return bench_projected_lora.build(**bench_projected_lora.cases("tiny", ("float32",))[0])


def rows_of(case):
    return {row["contestant"]: row for row in timing.measure(case, PEAKS, **TURNS)}


def wrong(change):
    """A contestant's outputs with the first entry of dA changed."""

    def spoil(outputs):
        def spoilt():
            result = outputs()
            result["dA"].view(-1)[0] = change(result["dA"].view(-1)[0])
            return result

        return spoilt

    return spoil


def dropped(outputs):
    return lambda: {key: value for key, value in outputs().items() if key != "dA"}


def reshaped(outputs):
    return lambda: {key: value[:1] for key, value in outputs().items()}


def raising(_outputs):
    def fail():
        raise MemoryError("no room\nfor it")

    return fail


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (wrong(lambda v: v * 1.001 + 1e-3), "error of dA"),
        (wrong(lambda v: v * float("nan")), "error of dA nan"),
        (dropped, "gave"),
        (reshaped, "error of"),
        (raising, "raised MemoryError: no room"),
    ],
)
@pytest.mark.parametrize("name", ["ours", "dense P per token"])
def test_a_wrong_contestant_gets_a_reason_instead_of_a_number(case, name, spoil, reason):
    contestant = case.contestants[name]
    contestant.outputs = spoil(contestant.outputs)
    contestant.run = lambda: pytest.fail("a refused contestant was timed")
    rows = rows_of(case)
    assert reason in rows[name]["refused"]
    assert not {"seconds", "of_peak", "saved", "leak"} & rows[name].keys()
    assert all(row["refused"] is None and row["seconds"] > 0 for other, row in rows.items() if other != name)
    table = run.case_table(list(rows.values()), markdown=False)
    line = next(line for line in table.splitlines() if line.startswith(f"{name}  "))
    assert reason in line and " – " in line


def test_the_yardstick_is_checked_too(case):
    plain = case.contestants["plain LoRA"]  # bounds its own error, so only the ceiling can refuse it
    plain.outputs = wrong(lambda v: v * 2 + 1)(plain.outputs)
    assert "error of dA" in rows_of(case)["plain LoRA"]["refused"]


def test_contestants_take_turns():
    calls = []
    times = timing.time_by_turns(
        {name: lambda name=name: calls.append(name) for name in "abc"}, budget=0.0, least=3, most=9, block=0.0
    )
    assert calls == ["a", "a", "b", "b", "c", "c", *"abc", *"bca", *"cab"]
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abc", 3)


def test_rounds_go_on_while_the_budget_lasts():
    assert len(timing.time_by_turns({"a": lambda: None}, budget=60.0, least=1, most=7)["a"]) == 7


def test_run_stores_what_it_measured_and_draws_it(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    out = tmp_path / "results.json"
    arguments = ["--tiny", "--op", "covariance", "projected_lora", "null_projection", "--out", str(out)]
    assert run.main([*arguments, "--threads", str(torch.get_num_threads())]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert {row["op"] for row in result["rows"]} == {"covariance", "projected_lora", "null_projection"}
    ours = [row for row in result["rows"] if row["contestant"] == "ours"]
    assert all(row["seconds"] > 0 and row["rounds"] == 2 and row["of_peak"] > 0 for row in ours)
    assert all("leak" in row for row in ours if row["op"] != "covariance")
    refused = [row for row in result["rows"] if row["refused"]]
    assert [row["contestant"] for row in refused] == ["own dtype"] and refused[0]["refused"] in printed
    environment = result["environment"]
    assert environment["threads"] == torch.get_num_threads() and environment["versions"]["torch"] in torch.__version__
    assert {"cpu", "flags", "cores", "date", "commit", "load"} <= environment.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert "not measured" in printed  # the table of targets

    assert run.main(["--targets", str(out), "--compare", str(out), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| covariance | ours | geometric mean |  |  | 1.00 |" in printed

    plot.main([str(out)])
    for name in ("tokens.png", "rank.png", "baselines.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def fake_events(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(FakeEvent.now))
    return waits


def test_a_gpu_is_timed_by_events_after_its_cache_is_flushed(fake_events, monkeypatch):
    clock, slept = timing.CudaClock(timing.CPU), []
    assert clock.flush.nbytes == 2**28
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)

    def run():
        assert not clock.flush.any()
        clock.flush[0] = 1
        FakeEvent.now += 0.25

    assert clock(run, 3) == 0.25
    assert len(fake_events) == 1  # all calls are queued before anything is waited for
    assert len(slept) == 3  # before each call, for Python to get ahead


def test_cases_are_measured_by_the_clock_of_the_device(fake_events, case, monkeypatch):
    monkeypatch.setattr(timing, "clock_of", lambda device: lambda run, calls: (run(), 3.0)[1])
    rows = timing.measure(case, PEAKS, timing.CPU, **TURNS)
    assert {row["seconds"] for row in rows} == {3.0}
    assert timing.peaks(1, small=True)["copy"] == 2 * 2**20 / 3.0


@pytest.mark.parametrize("op", run.ON_GPU)
def test_what_is_timed_is_on_the_device(op, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)  # it does not know meta
    with torch.device("meta"):
        case = run.MODULES[op].build(**run.MODULES[op].cases("tiny", ("float32",))[0])
    result = case.contestants["ours"].run()  # a tensor of another device would raise
    devices = {t.device.type for t in tree_leaves(result) if t is not None}
    assert devices == (set() if op == "covariance" else {"meta"})


def test_a_gpu_that_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])
    assert "--device cuda: there is no CUDA device; `make bench` measures the CPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda", "--op", "covariance", "planning"])
    assert "--op planning: measured on the CPU only; on a GPU covariance, projected_lora" in capsys.readouterr().err


def test_cases_are_chosen_by_their_labels_and_called_as_often_as_asked(tmp_path, monkeypatch, capsys):
    calls, plan = [], gk.plan_guard
    monkeypatch.setattr(gk, "plan_guard", lambda *args, **kwargs: calls.append(1) or plan(*args, **kwargs))
    out = tmp_path / "results.json"
    command = ["--tiny", "--op", "planning", "covariance", "--only", "ours", "--out", str(out)]
    for rounds in (1, 3):
        assert run.main([*command, "--case", "model=tiny r", "--rounds", str(rounds)]) == 0
        (row,) = json.loads(out.read_text())["rows"]
        assert row["shape"]["model"] == "tiny" and row["contestant"] == "ours"
        assert row["rounds"] == rounds
        assert rounds <= len(calls) <= (1 if rounds == 1 else rounds + 3)  # beside them the check and the warm-up
        calls.clear()
    assert "\n\ncovariance\n" not in capsys.readouterr().out  # the heading of an op
    for wrong, message in (
        (["--case", "d_in=7777"], "--case: 'd_in=7777' is in the label of no case; with this size and these ops there"),
        (["--rounds", "0"], "--rounds: must be a whole number of at least 1, got '0'"),
    ):
        with pytest.raises(SystemExit):
            run.main([*command, *wrong])
        assert message in capsys.readouterr().err


def test_one_call_that_gives_the_wrong_result_gets_no_number(case):
    contestant = case.contestants["ours"]
    contestant.outputs = wrong(lambda v: v + 1.0)(contestant.outputs)
    rows = {row["contestant"]: row for row in timing.measure(case, PEAKS, budget=0.0, least=1, most=1)}
    assert "error of dA" in rows["ours"]["refused"] and "seconds" not in rows["ours"]
    assert rows["plain LoRA"]["rounds"] == 1


def test_results_of_several_runs_are_read_as_one(tmp_path):
    paths = [tmp_path / f"{i}.json" for i in range(2)]
    for i, path in enumerate(paths):
        timing.write_json(path, {"environment": {"run": i}, "rows": [{"op": str(i)}]})
    assert timing.read_json(paths) == {"environment": {"run": 0}, "rows": [{"op": "0"}, {"op": "1"}]}


def test_a_failed_write_leaves_the_old_results(tmp_path):
    path = tmp_path / "results.json"
    timing.write_json(path, {"rows": []})
    with pytest.raises(TypeError):
        timing.write_json(path, {"rows": [object()]})
    assert timing.read_json([path]) == {"rows": []} and list(tmp_path.iterdir()) == [path]


def row(contestant, seconds, T=256, dtype="bfloat16", refused=None, **more):
    shape = {"T": T, "d": 576, "dtype": dtype}
    found = {"op": "covariance", "shape": shape, "contestant": contestant, "refused": refused, **more}
    return found if refused else {**found, "seconds": seconds}


def verdict(rows, what="covariance bfloat16"):
    return next((*line[3:5], line[-1]) for line in targets.report(rows) if line[0] == what)


def test_targets_are_judged_by_the_geometric_mean_and_the_worst_shape():
    rows = [row("ours", 1.0), row("addmm_ float32", 4.0), row("ours", 1.0, T=1024), row("addmm_ float32", 9.0, T=1024)]
    assert verdict(rows) == ("6.00×", "4.00× (T=256 d=576 dtype=bfloat16)", "met")
    short = [row("ours", 1.0, T=8), row("addmm_ float32", 0.1, T=8)]
    assert verdict(rows + short)[0] == "6.00×"  # shown elsewhere, not judged
    slow = [row("ours", 1.0, T=4096), row("addmm_ float32", 0.9, T=4096)]
    fast = [row("ours", 1.0, T=512), row("addmm_ float32", 90.0, T=512)]
    assert verdict(rows + slow + fast)[1:] == ("0.90× (T=4096 d=576 dtype=bfloat16)", "missed")
    assert verdict(rows + [row("ours", 0, T=4096, refused="error of C")])[-1] == "missed"
    assert verdict([]) == ("–", "–", "not measured")


def test_the_ideal_is_the_frozen_layer_times_its_flops():
    shape = {"T": 256, "d_in": 576, "d_out": 576, "r": 16, "dtype": "float32"}
    frozen = {"seconds": 10.0, "rho": 0.1, "flops": 100}
    ours = {"seconds": 12.1, "rho": 0.1, "flops": 110, "saved": 50}
    naive = {"seconds": 22.0, "rho": 0.1, "flops": 220}
    named = {"frozen linear": frozen, "ours": ours, "dense P per token": naive}
    rows = [
        {"op": "projected_lora", "shape": shape, "contestant": name, "refused": None, **values}
        for name, values in named.items()
    ]
    found = {tuple(line[:2]): line[3] for line in targets.report(rows)}
    assert found["LoRA layer float32", "frozen linear · (1 + ρ)"] == "1.10×"
    assert found["LoRA layer float32", "dense P, of the FLOP ratio"] == "0.91×"


def test_comparison_with_an_earlier_run():
    old = [row("ours", 2.0), row("ours", 8.0, T=1024), row("own dtype", 0, refused="error of C")]
    new = [row("ours", 1.0), row("ours", 1.0, T=1024), row("own dtype", 1.0), row("ours", 1.0, T=4096)]
    lines = run.comparison(new, old, markdown=True).splitlines()
    assert len(lines) == 2 + 2 + 1
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["2.00 |", "8.00 |", "4.00 |"]


def test_a_refused_kernel_fails_the_run(tmp_path, capsys):
    timing.write_json(tmp_path / "r.json", {"rows": [row("ours", 0, refused="error of C 1e-1 > 1e-6")]})
    assert run.main(["--targets", str(tmp_path / "r.json")]) == 1


@pytest.mark.parametrize("module", [bench_covariance, bench_projected_lora])
def test_the_full_set_is_the_grid_of_the_targets(module):
    shapes = module.cases("full", ("bfloat16", "float32"))
    assert {s["T"] for s in shapes} == {1, 8, 32, 256, 1024, 4096}
    long = [s for s in shapes if s["T"] >= 256]
    assert len(long) == 2 * 3 * (3 if module is bench_covariance else 5 * 4)


def test_training_step_end_to_end(monkeypatch):
    """A two-layer model: the checks, the facts and the guard's share, with the processes for memory left out."""
    monkeypatch.setattr(bench_training_step, "peak_memory", lambda *_: 1.0)
    case = bench_training_step.build(**bench_training_step.cases("tiny", ("bfloat16",))[0])
    rows = rows_of(case)
    assert all(r["refused"] is None for r in rows.values()), rows
    assert all(rows[name]["leak"] < 1e-5 for name in rows if name.startswith("ours"))
    assert all(rows[name]["saved"] <= rows["PEFT LoRA"]["saved"] for name in rows if name.startswith("ours"))
    assert rows["naive GuardSpace"]["flops"] > rows["ours"]["flops"] > rows["PEFT LoRA"]["flops"]


def test_peak_memory_is_that_of_another_process(tmp_path):
    shape = bench_training_step.cases("tiny", ("float32",))[0]
    bench_training_step._plan("tiny", shape["r"]).save(tmp_path / "plan.safetensors")
    ballast = torch.ones(2**28)  # 1 GiB here must not show there
    assert 50e6 < bench_training_step.peak_memory("ours", shape, tmp_path / "plan.safetensors") < ballast.nbytes


def test_a_part_of_a_case_is_extrapolated_and_says_so(monkeypatch):
    """And a case that takes minutes is timed once."""
    ones = {"y": torch.ones(3, dtype=torch.float64)}
    monkeypatch.setattr(timing, "clock_of", lambda device: lambda run, calls: 3.0)

    def contestant(name, share):
        return timing.Contestant(lambda: None, lambda: ones, lambda: ones, name, 0, share=share)

    shape = {"model": "some", "dtype": "float32"}
    contestants = {name: contestant(name, share) for name, share in (("ours", 1.0), ("paper's route", 0.25))}
    case = timing.Case("planning", shape, contestants, torch.float32, 0, rounds=1)
    found = {"flops": {"float32": 1.0}, "copy": 1.0}
    whole, part = timing.measure(case, found, budget=0.0, least=5)
    assert "share" not in whole and part["share"] == 0.25
    assert whole["seconds"] == 3.0 and part["seconds"] == 12.0 and part["rounds"] == 1
    assert "25%" in run.case_table([whole, part], False)


def test_a_table_of_contestants_without_their_yardstick_has_their_facts(case):
    table = run.case_table([rows_of(case)["ours"]], False)
    assert "saved" in table and not any(f"× {name}" in table for name in run.YARDSTICKS["projected_lora"])
