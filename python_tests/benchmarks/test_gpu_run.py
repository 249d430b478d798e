"""The run on a GPU, without one: steps that end badly lose nothing, and all of it works in tiny sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_run, timing

PYTHON = [sys.executable, "-c"]


def rows_of(path):
    return timing.read_json([path])["rows"]


@pytest.mark.slow
def test_all_of_it_in_tiny_sizes_on_the_cpu(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gpu_run", "--smoke"]
    done = subprocess.run(command, cwd=gpu_run.ROOT, env=environment, capture_output=True, text=True)
    logs = "\n".join(path.read_text(encoding="utf-8")[-2000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    ended = {row["step"]: row["ended"] for row in rows_of(tmp_path / "gpu_run.json")}
    assert ended == dict.fromkeys(gpu_run.LIMITS, "ok")
    found = {step: rows_of(tmp_path / f"{step}.json") for step in gpu_run.LIMITS}
    assert not [row for rows in found.values() for row in rows if "failed" in row]

    assert {row["outcome"] for row in found["truth"]} <= {"passed", "skipped"} and len(found["truth"]) > 3
    trained = {row["by"] for row in found["training"]}
    assert {"PEFT LoRA", "ours", "ours, guard_optimizer", "ours, GuardedAdamW", "frozen base", "dense P"} <= trained
    assert {row["by"] for row in found["training"] if row["compiled"]} == {"PEFT LoRA", "ours"}
    assert all(row["ms"] > 0 and row["host_ms"] > 0 and row["tokens_per_second"] > 0 for row in found["training"])
    layer = {row["by"] for row in found["layers"] if row["work"].startswith("layer")}
    assert {"reference", "plain LoRA, no projector", "PEFT's layer", "guarded layer", "frozen layer"} <= layer
    tuned = {row.get("by") for row in found["tuning"]}
    assert {row["by"] for row in found["tuning"] if row.get("what") == "layer"} == {"library", "tma"}
    assert {"library", "tiles", "tma", "null_projection.onto_basis", "null_projection.from_basis"} <= tuned
    assert [row["K"] for row in found["tuning"] if row.get("best") == "library_from"]
    (row,) = found["ncu"]
    assert row["left_out"] == "ncu is not installed" or "csv" in row


def test_a_step_that_hangs_is_stopped_with_all_its_processes(tmp_path):
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    row = gpu_run.run_step("hangs", [*PYTHON, child], 2, tmp_path)
    assert row["ended"] == "stopped after 2 s" and 2 <= row["seconds"] < 20
    child = Path("/proc") / row["tail"][0]
    for _ in range(100):  # until somebody has waited for it
        if not child.exists():
            return
        time.sleep(0.1)
    assert child.joinpath("stat").read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    "code, ended",
    [("print('fine')", "ok"), ("raise SystemExit(3)", "exit 3"), ("import os; os.abort()", "exit -6")],
)
def test_how_a_step_ended(tmp_path, code, ended):
    row = gpu_run.run_step("step", [*PYTHON, code], 20, tmp_path)
    assert row["ended"] == ended and row["tail"] == (["fine"] if ended == "ok" else [])


def test_rows_outlive_the_process_that_wrote_them(tmp_path):
    code = f"""
import os, pathlib
from benchmarks.gpu_run import Record
record = Record(pathlib.Path({str(tmp_path)!r}) / "step.json", 60, chip="none")
record.attempt({{"what": 1}}, lambda: {{"ms": 0.5}})
record.attempt({{"what": 2}}, lambda: 1 / 0)
os.abort()
"""
    assert gpu_run.run_step("step", [*PYTHON, code], 60, tmp_path)["ended"] == "exit -6"
    kept = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    first, second = {"what": 1, "ms": 0.5}, {"what": 2, "failed": "ZeroDivisionError: division by zero"}
    assert kept == {"chip": "none", "rows": [first, second]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.json", "step.log"]


def test_without_time_nothing_is_tried(tmp_path):
    record = gpu_run.Record(tmp_path / "step.json", 5)
    record.attempt({"what": 1}, lambda: pytest.fail("was tried"), least=6)
    assert rows_of(tmp_path / "step.json") == [{"what": 1, "left_out": "no time was left"}]


def test_the_other_steps_follow_one_that_fails(tmp_path, monkeypatch, capsys):
    def run_step(name, command, limit, out):
        assert limit == gpu_run.LIMITS[name] and command[-1] == "--smoke"
        return {"step": name, "ended": "exit 1" if name == "truth" else "ok", "seconds": 1.0, "tail": []}

    monkeypatch.setattr(gpu_run, "run_step", run_step)
    assert gpu_run.main(["--smoke", "--out", str(tmp_path)]) == 1
    assert [row["step"] for row in rows_of(tmp_path / "gpu_run.json")] == list(gpu_run.LIMITS)
    assert "truth: exit 1, 1.0 s\ntraining: ok, 1.0 s\n" in capsys.readouterr().out
    assert gpu_run.main(["--smoke", "--out", str(tmp_path), "--steps", "layers,ncu"]) == 0
    with pytest.raises(SystemExit):
        gpu_run.main(["--steps", "layers,knitting"])
    assert "unknown steps ['knitting']; there are truth, training, layers, tuning, ncu" in capsys.readouterr().err


def test_the_limits_leave_time_to_start():
    assert sum(gpu_run.LIMITS.values()) <= 540


def test_what_did_not_pass_or_changed_comes_first():
    file = "python_tests/gpu/test_cuda.py"
    lora, drift = f"{file}::test_projected_lora[a]", f"{file}::test_squared_drift"
    changed = ["guardspace_kernels/ops/projected_lora/gpu.py", "guardspace_kernels/cli.py"]
    assert gpu_run.urgency(drift, set(), []) == 0
    assert gpu_run.urgency(lora, {lora, drift}, changed) == 1
    assert gpu_run.urgency(drift, {lora, drift}, changed) == 2
    assert gpu_run.urgency(drift, {drift}, [file]) == 1


def test_every_topic_has_sources_and_tests():
    paths = gpu_run.sources()
    tests = "".join(path.read_text(encoding="utf-8") for path in (gpu_run.ROOT / "python_tests/gpu").glob("test_*.py"))
    for folder, words in gpu_run.TOPICS.items():
        assert any(path.startswith(folder) for path in paths), folder
        assert folder == "csrc/cuda" or all(word in tests for word in words), folder


def test_the_slowest_kernels_of_ours():
    rows = [
        {"work": "a", "by": "triton", "kernels": {"linear": 30.0, "down": 5.0}},
        {"work": "b", "by": "cuda", "kernels": {"linear": 50.0, "guardspace::outer": 40.0}},
        {"work": "c", "by": "plain LoRA", "kernels": {}},
        {"work": "d", "by": "triton", "left_out": "no time was left"},
    ]
    first, second = gpu_run.slowest_kernels(rows)
    assert first == {"kernel": "linear", "work": "b", "by": "cuda", "microseconds": 50.0}
    assert second["kernel"] == "guardspace::outer"


@pytest.fixture
def tuning():
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks import gpu_tuning

    return gpu_tuning


def test_a_line_is_the_row(tuning):
    for row in tuning._triton_table.ROWS:
        assert eval(tuning.as_line(row), {"Row": tuning.Launch}) == row


def test_the_first_choice_ends(tuning):
    table, plans = tuning._triton_table, tuning._prepared._PLANS
    before = list(table.ROWS)
    for kernel in ("null_projection.onto_basis", "null_projection.from_basis"):
        rows = list(tuning.projection_rows(kernel, "sm90"))
        assert rows[0] in before and len({row.key for row in rows}) == len(rows) > 8
        plans["made by another row"] = None
        with tuning.first_choice(rows[3]):
            assert not plans
            assert table.rows_for(kernel, "sm90")[0].key == rows[3].key
    assert [row.key for row in table.ROWS] == [row.key for row in before]


def test_the_quickest_rows(tuning):
    rows = tuning._triton_table.rows_for("projected_lora.linear_tma", "sm90")
    first, second = map(tuning.as_line, rows)

    def timed(K, row, ms):
        return {"what": "product", "K": K, "by": "tma", "row": row, "ms": ms}

    times = [timed(1, first, 1.0), timed(1, second, 1.5), timed(2, first, 400.0), timed(2, second, 100.0)]
    assert tuning.quickest(times, rows) == rows[::-1] and tuning.quickest(times, rows, 1) == rows[1:]
    assert tuning.quickest(times[:3], rows) == rows and tuning.quickest([], rows) == []


def test_a_layer_takes_the_tma_form_only_while_it_is_told_to(tuning, monkeypatch):
    import torch

    row = tuning._triton_table.rows_for("projected_lora.linear_tma", "sm90")[0]
    passes = tuning.triton_kernels._PASSES
    monkeypatch.setattr(passes, "linear", lambda *arguments: "the backend's own")
    monkeypatch.setattr(tuning.triton_tma, "linear", lambda *arguments: "the TMA form")
    x, W, h, up = (torch.ones(8, 8).half() for _ in range(4))
    with tuning.base_product(row) as taken:
        assert passes.linear(x, W, None, h, up.T) == "the TMA form"
        assert passes.linear(x.float(), W, None, h, up.T) == "the backend's own"
        assert passes.linear(x, W, None, h, up.T, 3) == "the backend's own"
    assert passes.linear(x, W, None, h, up.T) == "the backend's own" and len(taken) == 1


def test_verdicts(tuning):
    def product(by, K, ms, row=None):
        return {"what": "product", "T": 64, "K": K, "N": 64, "backward": False, "by": by, "ms": ms, "row": row}

    rows = [
        product("library", 256, 2.0), product("tma", 256, 1.0, "line"), product("library", 512, 2.0),
        product("tma", 512, 3.0, "line"), {"what": "kernel", "by": "kernel", "row": "first", "ms": 4.0},
        {"what": "kernel", "by": "kernel", "row": "second", "ms": 1.0}, {"what": "kernel", "failed": "it raised"},
    ]  # fmt: skip
    narrow, wide, kernel, threshold = tuning.verdicts(rows)
    assert narrow == {"best": "product 64 256 64 False", "by": "tma", "line": "line", "of": 0.5}
    assert (wide["by"], wide["of"]) == ("library", 1.0)
    assert kernel == {"best": "kernel", "by": "kernel", "line": "second", "of": 0.25}
    assert threshold == {"best": "library_from", "K": 257, "won at": [512], "lost at": [256]}


def test_a_wrong_result_gets_no_time(tuning):
    import torch

    wanted = torch.ones(3)
    assert tuning.checked(lambda: wanted, wanted)["error"] == 0.0
    with pytest.raises(RuntimeError, match="the result is wrong, relative error 5"):
        tuning.checked(lambda: wanted / 2, wanted)
