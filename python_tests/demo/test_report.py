from types import SimpleNamespace

from guardspace_kernels.demo.experiment import GUARDED, PLAIN, DemoResult, Row
from guardspace_kernels.demo.report import _costs


def test_the_cost_of_a_guarded_step_is_told_by_steps_on_the_same_batch():
    rows = [Row("none", "aligned", object())]
    # In the first task the machine slows down on the way: the medians alone would tell another ratio.
    steps = {"a": {PLAIN: [1.0, 2.0, 6.0], GUARDED: [0.9, 1.8, 9.0]}, "b": {PLAIN: [1.0], GUARDED: [1.25]}}
    for task, seconds in steps.items():
        rows += [Row(task, method, object(), step_seconds=taken) for method, taken in seconds.items()]
    result = SimpleNamespace(rows=rows)
    result.row = lambda *name: DemoResult.row(result, *name)
    cheaper, dearer = _costs(result)
    assert cheaper.startswith("a: ") and "took 0.90 times one of plain LoRA on the same batch" in cheaper
    assert "(1.80 s against 2.00 s; medians of 3 steps, made in turn)" in cheaper
    assert dearer.startswith("b: ") and "took 1.25 times" in dearer
