"""The choice of a backend: preference, predicates, the environment variable and the context manager."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import guardspace_kernels as gk
from guardspace_kernels import dispatch
from guardspace_kernels.ops import covariance_update_, null_project_, projected_lora, symmetrize_

BASIS = torch.eye(3)[:, :1]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The reference alone, in a registry that is thrown away."""
    references = {key: value for key, value in dispatch._registry.items() if key[1] == "reference"}
    monkeypatch.setattr(dispatch, "_registry", references)
    monkeypatch.setattr(dispatch, "_missing", {})
    return references


@pytest.fixture
def fake():
    """A preferred backend that runs null_projection for float32 only, and writes 7; returns the lists it was given."""
    calls = []

    def accepts(g, basis):
        return (True, "") if g.dtype == torch.float32 else (False, f"g is {g.dtype}, only float32 is built")

    def null_project_(projections):
        calls.append(projections)
        for g, _basis, _complement in projections:
            g.fill_(7)

    dispatch.register("null_projection", "triton", accepts, null_project_=null_project_)
    return calls


def result(dtype=torch.float32):
    g = torch.ones(2, 3, dtype=dtype)
    null_project_(g, BASIS)
    return g[0].tolist()


REFERENCE, FAKE = [0, 1, 1], [7, 7, 7]


def test_every_op_has_a_reference(registry):
    assert set(registry) == {(op, "reference") for op in dispatch.OPS}
    for op in dispatch.OPS:
        assert dispatch.can_use(op, backend="reference")[0]


def test_the_preferred_backend_runs_what_it_accepts(fake):
    assert result() == FAKE
    assert result(torch.float64) == REFERENCE


def test_the_reference_is_the_least_preferred_backend():
    assert dispatch.BACKENDS[-1] == "reference"


def test_a_backend_is_given_the_items_of_one_device_at_a_time(fake):
    items = [(torch.ones(2, 3, device=device), BASIS, True) for device in ("cpu", "meta", "cpu")]
    dispatch.call_all("null_projection", "null_project_", items, lambda item: item[:2])
    assert [[g.device.type for g, *_ in members] for members in fake] == [["cpu", "cpu"], ["meta"]]


def test_each_member_of_a_list_is_dispatched_by_itself_and_each_backend_called_once(fake):
    gs = [torch.ones(2, 3, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float32, torch.float64)]
    null_project_(gs, [BASIS] * 4, [True, True, False, False])
    assert [g[0].tolist() for g in gs] == [FAKE, REFERENCE, FAKE, [1, 0, 0]]
    (members,) = fake
    assert [g.data_ptr() for g, _, _ in members] == [gs[0].data_ptr(), gs[2].data_ptr()]
    assert [complement for _, _, complement in members] == [True, False]
    assert all(torch.equal(basis, BASIS) for _, basis, _ in members)


def test_covariances_of_a_list_reach_the_backend_in_one_call_with_mask_and_scale():
    calls = []
    dispatch.register("covariance", "cpu", covariance_update_=calls.append)
    Cs, xs = [torch.zeros(3, 3), torch.zeros(2, 2)], [torch.ones(4, 3), torch.ones(5, 2)]
    covariance_update_(Cs, xs, [None, torch.ones(5).bool()], 0.5)
    covariance_update_(Cs[0], xs[0])
    seen = [[(len(C), len(x), mask is None, scale) for C, x, mask, scale in call] for call in calls]
    assert seen == [[(3, 4, True, 0.5), (2, 5, False, 0.5)], [(3, 4, True, 1.0)]]


def test_call_all_calls_each_function_once_with_its_items_in_order():
    calls = []

    def even(t):
        return len(t) % 2 == 0, "odd"

    dispatch.register("covariance", "cpu", even, entry=lambda items: calls.append(("cpu", items)))
    dispatch.register("covariance", "reference", entry=lambda items: calls.append(("reference", items)))
    dispatch.call_all("covariance", "entry", [], lambda item: (torch.ones(len(item)),))
    assert calls == []
    dispatch.call_all("covariance", "entry", ["a", "bb", "ccc", "dddd"], lambda item: (torch.ones(len(item)),))
    assert calls == [("reference", ["a", "ccc"]), ("cpu", ["bb", "dddd"])]


def test_call_all_runs_nothing_where_one_item_is_refused(fake):
    gs = [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)]
    with gk.use_backend("triton"), pytest.raises(RuntimeError, match=r"g is torch\.float64, only float32"):
        null_project_(gs, [BASIS, BASIS])
    assert fake == [] and gs[0].eq(1).all()


@pytest.mark.parametrize("how", ["environment", "context"])
def test_a_requested_backend_runs_or_raises_with_its_reason(fake, monkeypatch, how):
    def ask(name, call):
        if how == "environment":
            monkeypatch.setenv("GUARDSPACE_BACKEND", name)
            return call()
        with gk.use_backend(name):
            return call()

    assert ask("reference", result) == REFERENCE
    assert ask("triton", result) == FAKE
    with pytest.raises(
        RuntimeError, match=r"'triton' was requested but cannot run null_projection: g is torch.float64, "
    ):
        ask("triton", lambda: result(torch.float64))
    with pytest.raises(
        RuntimeError, match=r"'cuda' was requested .*: this build has no cuda implementation of null_proj"
    ):
        ask("cuda", result)


@pytest.mark.parametrize(
    "op, call",
    [
        ("covariance", lambda: covariance_update_(torch.zeros(3, 3), torch.ones(2, 3))),
        ("covariance", lambda: symmetrize_(torch.zeros(3, 3))),
        ("null_projection", result),
        ("null_projection", lambda: null_project_([torch.ones(2, 3)], [BASIS])),
        (
            "projected_lora",
            lambda: projected_lora(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)),
        ),
    ],
)
def test_every_op_asks_the_dispatcher(op, call):
    with gk.use_backend("triton"), pytest.raises(RuntimeError, match=f"no triton implementation of {op}"):
        call()


def test_both_passes_run_on_the_chosen_backend(registry):
    plain, called = registry["projected_lora", "reference"].functions["primitives"](), []

    def spy(x, M, *rest):
        called.append(tuple(M.shape))
        return plain.linear(x, M, *rest)

    dispatch.register("projected_lora", "cpu", primitives=lambda: plain._replace(linear=spy))
    x = torch.ones(2, 3, requires_grad=True)
    projected_lora(x, torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)).sum().backward()
    assert called == [(3, 4), (4, 3)]


@pytest.mark.parametrize("value", ["", "auto"])
def test_an_empty_or_automatic_environment_variable_requests_nothing(fake, monkeypatch, value):
    monkeypatch.setenv("GUARDSPACE_BACKEND", value)
    assert dispatch.requested_backend() is None
    assert result() == FAKE


def test_the_context_overrides_the_environment_nests_and_ends(fake, monkeypatch):
    monkeypatch.setenv("GUARDSPACE_BACKEND", "reference")
    with gk.use_backend("auto"):
        assert result() == FAKE
        with gk.use_backend("reference"):
            assert result() == REFERENCE
        assert result() == FAKE
    assert result() == REFERENCE


def test_the_context_ends_with_an_exception():
    with pytest.raises(KeyError), gk.use_backend("cuda"):
        raise KeyError
    assert dispatch.requested_backend() is None


def test_the_context_holds_on_every_thread():
    seen = []
    with gk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


class Contexts:
    """use_backend on a thread of its own, entered and left as the test says."""

    def __init__(self):
        self.pool, self.stack = ThreadPoolExecutor(1), contextlib.ExitStack()

    def enter(self, name):
        return self.pool.submit(self.stack.enter_context, gk.use_backend(name)).result()

    def leave(self):
        self.pool.submit(self.stack.close).result()
        self.pool.shutdown()


@pytest.mark.parametrize("first_out", [0, 1])
def test_equal_choices_of_threads_overlap_in_any_order(first_out):
    contexts = [Contexts(), Contexts()]
    for one in contexts:
        one.enter("reference")
    contexts[first_out].leave()
    assert dispatch.requested_backend() == "reference"
    contexts[1 - first_out].leave()
    assert dispatch.requested_backend() is None


def test_another_choice_of_another_thread_is_refused_and_changes_nothing():
    one, other = Contexts(), Contexts()
    one.enter("reference")
    with pytest.raises(RuntimeError, match=r"use_backend\('auto'\): another thread or task is within .*'reference'"):
        other.enter("auto")
    with pytest.raises(RuntimeError, match="another thread or task"), gk.use_backend("cpu"):
        pass
    other.enter("reference")
    with pytest.raises(RuntimeError, match="another thread or task"):
        one.enter("cpu")  # nested: the other one would get it too
    one.leave()
    assert dispatch.requested_backend() == "reference"
    other.leave()
    assert dispatch.requested_backend() is None
    with gk.use_backend("cpu"):
        assert dispatch.requested_backend() == "cpu"
    assert dispatch.requested_backend() is None


def test_generators_that_end_in_another_order_leave_nothing_behind():
    def generator(name):
        with gk.use_backend(name):
            yield

    first, second = generator("cpu"), generator("reference")
    next(first), next(second)
    first.close()
    assert dispatch.requested_backend() == "reference"
    with gk.use_backend("cuda"):
        assert dispatch.requested_backend() == "cuda"
    second.close()
    assert dispatch.requested_backend() is None


def test_tasks_of_one_thread_are_told_apart_and_nest_in_what_they_were_started_in():
    async def task(name, entered, leave, seen):
        with gk.use_backend(name):
            entered.set()
            await leave.wait()
            seen.append(dispatch.requested_backend())

    async def main():
        entered, leave, seen = asyncio.Event(), asyncio.Event(), []
        with gk.use_backend("cpu"):
            first = asyncio.create_task(task("reference", entered, leave, seen))
            await entered.wait()
            with pytest.raises(RuntimeError, match="another thread or task"):
                await task("auto", asyncio.Event(), leave, seen)
            leave.set()
            await first
            assert dispatch.requested_backend() == "cpu"
        return seen

    assert asyncio.run(main()) == ["reference"]
    assert dispatch.requested_backend() is None


def test_no_backend_at_all_says_what_to_import(registry):
    registry.clear()
    with pytest.raises(RuntimeError, match=r"no backend can run null_projection; import guardspace_kernels\.ops"):
        result()


def test_can_use_answers_with_a_reason(fake):
    ok, reason = dispatch.can_use("null_projection", torch.ones(2, 3).double(), BASIS, backend="triton")
    assert not ok and reason == "g is torch.float64, only float32 is built"
    assert dispatch.can_use("null_projection", torch.ones(2, 3), BASIS, backend="triton")[0]
    assert dispatch.can_use("covariance", backend="triton") == (
        False,
        "this build has no triton implementation of covariance",
    )


def test_the_reason_why_a_backend_is_missing_is_told_everywhere():
    dispatch.unavailable("covariance", "cuda", "nvcc was not found")
    assert dispatch.can_use("covariance", backend="cuda") == (False, "nvcc was not found")
    assert ("covariance", "cuda", False, "nvcc was not found") in dispatch.status()
    assert ("projected_lora", "cuda", False, "this build has no cuda implementation of projected_lora") in (
        dispatch.status()
    )
    with gk.use_backend("cuda"), pytest.raises(RuntimeError, match="cannot run covariance: nvcc was not found"):
        covariance_update_(torch.zeros(3, 3), torch.ones(2, 3))
    covariance_update_(torch.zeros(3, 3), torch.ones(2, 3))  # automatic choice passes over it


def test_a_registered_backend_is_not_missing():
    dispatch.unavailable("covariance", "cpu", "no compiler")
    dispatch.register("covariance", "cpu", covariance_update_=lambda items: None)
    assert dispatch.can_use("covariance", backend="cpu")[0]
    assert ("covariance", "cpu", True, "registered") in dispatch.status()


def test_status_lists_every_pair(fake):
    rows = {(op, backend): registered for op, backend, registered, _ in dispatch.status()}
    assert set(rows) == {(op, backend) for op in dispatch.OPS for backend in dispatch.BACKENDS}
    assert {key for key, registered in rows.items() if registered} == {
        *((op, "reference") for op in dispatch.OPS),
        ("null_projection", "triton"),
    }


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"op must be one of \('covariance', .*got 'attention'"):
        dispatch.register("attention", "cpu")
    with pytest.raises(ValueError, match=r"backend must be one of \('triton', .*got 'tpu'"):
        dispatch.register("covariance", "tpu")
    with pytest.raises(ValueError, match=r"op must be one of \('covariance', .*got 'attention'"):
        dispatch.unavailable("attention", "cpu", "")
    with pytest.raises(ValueError, match=r"backend must be one of \('triton', .*got 'tpu'"):
        dispatch.unavailable("covariance", "tpu", "")
    with (
        pytest.raises(ValueError, match=r"name must be 'auto' or one of \('triton', .*got 'tpu'"),
        gk.use_backend("tpu"),
    ):
        pass
    monkeypatch.setenv("GUARDSPACE_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"GUARDSPACE_BACKEND must be 'auto' or one of \('triton', .*got 'tpu'"):
        result()
