import json
import math

import pytest

from guardspace_kernels.guard.drift import DriftReport, HeldOut, LayerDrift
from guardspace_kernels.guard.export import ExportReport


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sink", [False, True])
def test_a_drift_that_is_not_finite_exceeds_any_bound(bad, sink, tmp_path):
    row = LayerDrift("bad", 1e-9 if sink else bad, 1.0, bad if sink else 1e-9)
    rows = [LayerDrift("first", 0.5, 1.0, 0.1), row, LayerDrift("last", 0.2, 1.0, 0.1)]
    for order in (rows, rows[::-1]):
        report = DriftReport(order, 3, 1, "model")
        assert report.worst is row and not math.isfinite(report.max_drift)
        for bound in (None, 0.1, math.inf):
            wanted = f"layer bad drifts by {bad} on harmful prompts: nothing is promised of it"
            assert report.failure(bound) == wanted
    report.save(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    said = "NaN" if math.isnan(bad) else "Infinity"
    assert read["max_drift"] == read["layers"][1]["sink_drift" if sink else "drift"] == said
    exported = ExportReport("path", "float32", 2, {"a": 0.1, "bad": bad, "c": 0.2}, {"a": bad, "b": 0.1})
    assert f"worst leak {bad}, worst drift {bad}" in str(exported)
    good = DriftReport(rows[::2], 3, 1, "model")
    assert good.failure() == good.failure(0.5) == ""
    assert good.failure(0.4) == "layer first drifts by 5.00e-01 on harmful prompts, above max_drift = 4.00e-01"
    assert "above max_drift" in good.failure(math.nan)
    good.heldout = HeldOut(1, 1, math.nan, 0.0)
    assert "held-out prompts are not finite" in good.failure()
