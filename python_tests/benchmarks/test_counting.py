"""What a guarded layer costs the host, gated beside PEFT's LoRA layer in the same run; time is not tested."""

import pytest
import torch

from benchmarks import bench_host, counting, run, targets, timing

LAYERS = [case for case in bench_host.cases("default", run.DTYPES) if "layers" in case]
#: Our contestant, what is counted -> of PEFT's, at most: in bfloat16 on x (1, T, d) and (T, d), and in float32. What is
#: reached, so that one op or check more a call shows; targets.HOST says what is wanted.
GATES = {
    ("ours", "instructions"): (0.44, 0.526, 0.574, 0.725),
    ("ours, step mode", "instructions"): (0.422, 0.518, 0.557, 0.706),
    ("ours", "calls"): (0.112, 0.133, 0.136, 0.17),
    ("ours, step mode", "calls"): (0.112, 0.133, 0.136, 0.17),
    ("ours", "launches"): (0.118, 0.118, 0.167, 0.167),
    ("ours, step mode", "launches"): (0.118, 0.118, 0.167, 0.167),
}


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Not here: writing NaN into what is allocated would be counted."""


def over(kind, case, counted):
    """The contestants that are above their gate, with their shares."""

    def total(name):
        return sum(counted[name][key] for key in targets.COUNTED[kind])

    gates = {ours: most[LAYERS.index(case)] for (ours, what), most in GATES.items() if what == kind}
    shares = {ours: total(ours) / total("PEFT LoRA") for ours in gates}
    return {ours: share for ours, share in shares.items() if share > gates[ours]}


@pytest.mark.parametrize("case", LAYERS, ids=timing.label)
def test_what_a_layer_calls_and_launches_beside_pefts(case):
    counted = {name: counting.calls(run) for name, run in bench_host.runs(**case).items()}
    assert not over("calls", case, counted)
    assert not over("launches", case, counted)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute, alone on the machine
def test_the_instructions_of_a_layer_beside_pefts():
    if reason := counting.why_not():
        pytest.skip(reason)
    found = zip(LAYERS, counting.instructions("benchmarks.bench_host", LAYERS), strict=True)
    rows = [(case, {name: {"instructions": n} for name, n in counted.items()}) for case, counted in found]
    assert not {timing.label(case): above for case, row in rows if (above := over("instructions", case, row))}


def test_calls_are_those_of_forward_and_backward():
    W, dy = torch.randn(3, 4), torch.randn(5, 3)
    A = torch.randn(5, 4, requires_grad=True)
    # A product and its scale, and their gradients.
    found = counting.calls(lambda: torch.autograd.grad((A @ W.t()) * 2.0, A, dy))
    assert found["launches"] == 4 and found["kernels"] == 0  # the number 2.0 is made a float32 on the host
    assert found["aten"] > 8 and found["python"] >= 2


def test_a_composite_launches_what_it_calls_and_a_view_nothing():
    x, b = torch.randn(2, 3, 4), torch.randn(4)
    launched = {
        "linear": lambda: torch.nn.functional.linear(x[0], torch.ones(2, 4)),  # ones is filled; one product
        "addmm": lambda: torch.addmm(b, x[0], torch.empty(4, 4)),  # copies b first
        "views": lambda: x.view(6, 4).t().expand(1, 4, 6).detach(),
        "to": lambda: b.double(),
        "zeros": lambda: torch.zeros(3),
    }
    found = {name: counting.calls(launch)["launches"] for name, launch in launched.items()}
    assert found == {"linear": 2, "addmm": 2, "views": 0, "to": 1, "zeros": 1}


def test_without_valgrind_instructions_are_left_out_or_demanded(monkeypatch):
    monkeypatch.setattr(counting.shutil, "which", lambda name: None)
    counting.why_not.cache_clear()
    try:
        monkeypatch.delenv("GUARDSPACE_REQUIRE_VALGRIND", raising=False)
        assert "install valgrind" in counting.why_not()
        case = bench_host.build(**bench_host.cases("tiny", ("float32",))[0])
        assert "instructions" not in case.contestants["ours"].facts()
        counting.why_not.cache_clear()
        monkeypatch.setenv("GUARDSPACE_REQUIRE_VALGRIND", "1")
        with pytest.raises(RuntimeError, match=r"must be counted .*valgrind and vgdb not on the PATH"):
            counting.why_not()
    finally:
        counting.why_not.cache_clear()


@pytest.mark.parametrize("dtype", run.DTYPES)
def test_every_contestant_computes_the_case(dtype):
    for params in bench_host.cases("tiny", (dtype,)):
        case = bench_host.build(**params)
        assert {name: case.refusal(name) for name in case.contestants} == dict.fromkeys(case.contestants)


def counted_row(contestant, dtype="float32", **counts):
    shape = {"layers": 4, "dims": 3, "dtype": dtype}
    return {"op": "host", "shape": shape, "contestant": contestant, "refused": None, "seconds": 1.0, **counts}


def test_counts_are_judged_against_pefts():
    plain = {"instructions": 1000, "aten": 100, "kernels": 0, "launches": 10}
    ours = {"instructions": 790, "aten": 90, "kernels": 11, "launches": 10}
    rows = [counted_row("PEFT LoRA", **plain), counted_row("ours", **ours), counted_row("ours, step mode", **ours)]
    found = {line[0]: (line[3], line[-1]) for line in targets.report(rows)}
    assert found["instructions of a small layer float32"] == ("0.79×", "met")
    assert found["instructions of a small layer float32, step mode"] == ("0.79×", "missed")
    assert found["calls of a small layer float32"] == ("1.01×", "missed")
    assert found["launches of a small layer float32"] == ("1.00×", "met")
    assert found["instructions of a small layer bfloat16"] == ("–", "not measured")


def test_the_verdict_names_the_cpu_and_what_a_step_takes():
    environment = {"cpu": "Some CPU", "torch_level": "AVX512", "flags": ["avx512_bf16"], "threads": 2, "cores": 4}
    shape = {"model": "m", "text": "demo", "dtype": "float32"}
    rows = [
        {"op": "training_step", "shape": shape, "contestant": name, "refused": None, "seconds": seconds}
        for name, seconds in (("ours", 0.9), ("PEFT LoRA", 1.0))
    ]
    told = targets.verdict(rows, environment)
    assert told.startswith(
        "On this CPU (Some CPU, AVX-512 with bf16, 2 of 4 threads) a guarded training step takes 0.90×"
    )
    assert timing.cpu_line({**environment, "flags": []}).startswith("Some CPU, AVX-512, 2")
    assert timing.cpu_line({**environment, "torch_level": "AVX2"}).startswith("Some CPU, AVX2, 2")
    assert targets.verdict(rows[:1], environment) == ""
