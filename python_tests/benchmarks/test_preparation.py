"""The benchmark of a whole preparation: what it counts, and how its rows are judged."""

import json

import pytest
import torch

from benchmarks import bench_planning, bench_preparation, run, targets, timing

WIDTHS = [*[24] * 6, 40] * 2  # the inputs of the tiny model's layers


@pytest.fixture(scope="module")
def measured():
    return {name: bench_preparation.run_contestant("tiny", name, None) for name in bench_preparation.CONTESTANTS}


def test_every_contestant_prepares_the_tiny_model(measured):
    for result in measured.values():
        assert all(result[key] > 0 for key in ("forward", "collect", "plan", "disk"))
    matrices = sum(4 * d * d for d in WIDTHS)
    assert measured["paper's way"]["disk"] == 2 * matrices
    assert measured["paper's way"]["kept"] == 0 and not measured["paper's way"]["one_per_shape"]
    ours = measured["ours"]["disk"]
    assert 0 < ours == pytest.approx(measured["ours, a quarter of the memory"]["disk"], rel=0.1)


def test_a_wide_model_is_extrapolated_from_one_layer_per_shape(monkeypatch):
    monkeypatch.setattr(bench_preparation, "SOLVE_ALL", 30)
    monkeypatch.setattr(bench_preparation, "_timed", lambda solve: (solve(), 1.0))
    result = bench_preparation.run_contestant("tiny", "paper's way", None)
    assert result["one_per_shape"] and result["plan"] == len(WIDTHS)
    # Formed were those of q and o, k and v, gate and up, down.
    assert result["kept"] == sum(4 * d * d for d in WIDTHS) - 4 * (3 * 24**2 + 40**2)


def test_prompts_are_padded_on_the_left_and_begin_alike():
    rows = bench_preparation.prompts(60)
    batches = bench_preparation.padded(rows)
    assert len(rows) == 120 and len(batches) == 15 and {int(row[0]) for row in rows} == {1}
    assert all(20 <= len(row) <= 45 for row in rows)
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(map(len, rows))
    assert all(bool(batch["attention_mask"][:, -1].all()) for batch in batches)


@pytest.mark.parametrize(
    "name, parameters",
    # 2 h² for q and o, 2 h·kv for k and v, 3 h·i for gate, up and down
    [("Qwen2.5-0.5B", 2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864), ("Llama-3.2-1B", 10 * 2048**2 // 4 + 3 * 2**24)],
)
def test_random_models_have_the_shapes_of_the_real_ones(name, parameters):
    with torch.device("meta"):
        model = bench_planning.build_model(name, 1)
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    assert sum(m.weight.numel() for m in linear) == parameters
    assert (linear[0].bias is not None) == name.startswith("Qwen")


def rows_of(model, *results):
    """(forward, collect, plan, peak) of each contestant."""
    rows = []
    for name, values in zip(bench_preparation.CONTESTANTS, results, strict=True):
        measured = dict(zip(("forward", "collect", "plan", "peak"), values, strict=True), disk=9)
        if name == "paper's way":
            measured |= {"kept": 20, "one_per_shape": model != "SmolLM2-135M"}
        rows.append(bench_preparation.row(model, name, None, measured))
    return rows


def test_rows_are_judged_as_every_other_result(tmp_path, capsys):
    rows = rows_of("SmolLM2-135M", (10, 12, 7, 50), (10, 13, 7, 20), (10, 30, 28, 80))
    rows += rows_of("Llama-3.2-1B", (10, 13, 100, 50), (10, 13, 7, 40), (10, 30, 200, 80))
    rows[0]["estimate"] = {"collect": 6, "plan": 14}
    found = {line[0]: line[2:] for line in targets.report(rows)}
    assert found["collecting statistics"][:2] == ["≤ 1.25×", "1.25×"]
    assert found["collecting statistics"][-1] == "met"
    assert found["seconds of the plan of SmolLM2"][:2] == ["≤ 8 s", "7.00 s"]
    assert found["plan of a model"][1] == "4.00×" and found["plan of a model"][-1] == "met"
    assert found["plan of a model with wide down-projections"][1] == "2.00×"
    assert found["plan of a model with wide down-projections"][-1] == "missed"
    memory = found["memory of a preparation under a budget"]
    assert memory[1] == "0.28×" and memory[2].startswith("0.40× (model=Llama-3.2-1B")
    path = tmp_path / "preparation.json"
    timing.write_json(path, {"environment": {}, "rows": rows})
    assert run.main(["--targets", str(path), "--compare", str(path)]) == 0
    assert "preparation  ours" in capsys.readouterr().out
    lines = bench_preparation.rows_of(json.loads(path.read_text())["rows"])
    assert lines[0][3] == "12 (1.20×)" and lines[0][-1] == "collect 0.50, plan 2.00"
    assert lines[2][5:7] == ["28", "0 MB"] and lines[5][5] == "200*"
    shortened = bench_preparation.row(
        "Llama-3.2-1B", "ours", 4, {"forward": 1, "collect": 1, "plan": 1, "peak": 1, "disk": 1}
    )
    assert bench_preparation.rows_of([shortened])[0][0] == "Llama-3.2-1B, 4 blocks"


def test_a_contestant_runs_in_a_process_of_its_own():
    ballast = torch.ones(2**26)  # 256 MiB here must not show there
    found = bench_preparation._run_in_process("tiny", "ours", 1)
    assert found["shape"]["blocks"] == 1 and 0 < found["peak"] < ballast.nbytes
