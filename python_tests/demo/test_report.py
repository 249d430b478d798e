from types import SimpleNamespace

from guardspace_kernels.demo.experiment import GUARDED, PLAIN, DemoResult, Row
from guardspace_kernels.demo.report import _costs


def test_the_cost_of_a_guarded_step_is_told():
    rows = [Row("none", "aligned", object())]
    for task, seconds in (("a", {PLAIN: 2.0, GUARDED: 1.8}), ("b", {PLAIN: 1.0, GUARDED: 1.25})):
        rows += [Row(task, method, object(), step_seconds=step) for method, step in seconds.items()]
    result = SimpleNamespace(rows=rows)
    result.row = lambda *name: DemoResult.row(result, *name)
    cheaper, dearer = _costs(result)
    assert cheaper.startswith("a: ") and "took 0.90 times one of plain LoRA (1.80 s against 2.00 s" in cheaper
    assert dearer.startswith("b: ") and "took 1.25 times" in dearer
