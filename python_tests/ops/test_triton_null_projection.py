"""How the Triton kernels of the null projection are launched, under Triton's interpreter."""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager, nullcontext

import pytest
import torch
from backends import automatic, same_bits, triton_kernels  # noqa: F401
from oracle import orthonormal
from test_gpu_null_projection import (
    DTYPES,
    SETTINGS,
    assert_exact,
    assert_same_update,
    mixed,
    project_list,
    projected,
    states,
    wider,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from guardspace_kernels.ops import _triton_table, null_project_, projected_adamw_

pytestmark = [automatic, pytest.mark.usefixtures("triton_kernels")]


@pytest.fixture
def launched(monkeypatch, triton_kernels):  # noqa: F811
    """The module of launches, and a list of (kernel, variant, slices) of what is launched."""
    from guardspace_kernels.ops import _triton_launch

    calls, launch = [], _triton_launch.launch

    def counted(function, row, grid, arguments, **variant):
        calls.append((row.kernel.split(".")[1], variant, arguments.get("slices")))
        launch(function, row, grid, arguments, **variant)

    monkeypatch.setattr(_triton_launch, "launch", counted)
    monkeypatch.setattr(_triton_launch, "_TABLES", type(_triton_launch._TABLES)())
    return _triton_launch, calls


@pytest.mark.parametrize("group", [256, 2])
def test_a_list_of_all_kinds(launched, monkeypatch, group):
    launch, calls = launched
    monkeypatch.setattr(launch, "GROUP", group)
    items = mixed()
    results = project_list(items)
    for result, item in zip(results, items, strict=True):
        assert_exact(result, *item, f"{tuple(result.shape)}:")
    assert all(same_bits(a, b) for a, b in zip(project_list(items), results, strict=True))
    variants = {tuple(variant.values()) for _, variant, _ in calls}
    assert variants == {(True, True), (True, False), (False, False)}
    # In each of the two calls two launches for each dtype, alignment and height; three are more than a group of two.
    assert len(calls) == 2 * 2 * 3 * (4 if group == 256 else 5)


def test_a_model_takes_two_launches_without_slices(launched):
    _, calls = launched
    items = [(torch.randn(2, 48), orthonormal(48, 20, torch.float32), True) for _ in range(140)]
    for result, item in zip(project_list(items), items, strict=True):
        assert_exact(result, *item)
    assert [(name, slices) for name, _, slices in calls] == [("onto_basis", 1), ("from_basis", None)]


def test_few_matrices_are_split_into_slices(launched):
    _, calls = launched
    block = _triton_table.rows_for("null_projection.onto_basis", "sm80")[-1].constants["BLOCK_D"]
    for d, slices in ((12 * block, 8), (block + 1, 2), (block, 1)):  # none without a block of d
        g, basis = torch.randn(4, d), orthonormal(d, 20, torch.float32)
        calls.clear()
        assert_exact(projected(g, basis), g, basis, True)
        assert [count for name, _, count in calls if name == "onto_basis"] == [slices]


def test_the_same_numbers_are_sent_once(launched, monkeypatch):
    launch, _ = launched
    items = [(torch.randn(3, 16), orthonormal(16, 5, torch.float32).contiguous(), True) for _ in range(4)]
    arguments = [list(column) for column in zip(*items, strict=True)]
    null_project_(*arguments)
    tables = list(launch._TABLES.values())
    assert [tuple(t.shape) for t in tables] == [(4, 9), (4, 12)]
    null_project_(*arguments)
    assert [id(t) for t in launch._TABLES.values()] == [id(t) for t in tables]


def test_the_least_recently_used_table_goes_first(launched, monkeypatch):
    launch, _ = launched
    monkeypatch.setattr(launch, "_MOST_TABLES", 2)
    cpu = torch.device("cpu")
    one, two = launch.table([[1]], cpu), launch.table([[2]], cpu)
    assert launch.table([[1]], cpu) is one
    assert launch.table([[3]], cpu).tolist() == [[3]] and len(launch._TABLES) == 2
    assert launch.table([[1]], cpu) is one
    assert launch.table([[2]], cpu) is not two


def test_a_captured_graph_sends_new_tables_from_memory_that_stays(launched, monkeypatch):
    launch, _ = launched
    capturing, pinned, stream = [False], [], ["first"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream[0])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *_, **__: t)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(launch, "_current", lambda _device: nullcontext())
    monkeypatch.setattr(launch, "_CAPTURED", [])
    monkeypatch.setattr(launch, "_SPARE", [])
    monkeypatch.setattr(launch, "_SPARES", 1)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **kwargs: empty(*shape, **kwargs))
    device = torch.device("cuda", 0)
    capturing[0] = True
    assert launch.table([[1, 2]], device) is None  # nothing was set aside yet
    capturing[0] = False
    sent = launch.table([[1, 2]], device)
    assert sent.tolist() == [[1, 2]] and launch._CAPTURED == []
    stream[0] = "second"
    other = launch.table([[1, 2]], device)
    assert other is not sent and other.tolist() == [[1, 2]]  # it would not wait for what the first stream sent
    assert launch.table([[1, 2]], device) is other
    capturing[0], stream[0] = True, "third"
    assert launch.table([[1, 2]], device) is sent
    new = launch.table([[3, 4]], device)
    assert new.tolist() == [[3, 4]]
    kept, host = launch._CAPTURED
    assert kept is sent and host.tolist() == [[3, 4]] and host.data_ptr() in {t.data_ptr() for t in pinned}
    assert launch.table([[5, 6]], device) is None  # no more is left
    assert len(launch._TABLES) == 2  # the graph's own memory is for its replays


def test_a_grouped_kernel_is_not_compiled_for_the_sizes_of_the_first_item(launched, monkeypatch):
    launch, _ = launched
    seen = []
    original = launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda f, row, grid, given, **v: seen.append(given) or original(f, row, grid, given, **v)
    )
    project_list([(torch.randn(r, 16), orthonormal(16, 5, torch.float32), True) for r in (1, 3)])
    assert [(given["r"], given["d"], given["k"], given["h"]) for given in seen] == [(0, 0, 0, 0)] * 2


def test_without_a_table_every_item_is_launched_alone(launched, monkeypatch):
    launch, calls = launched
    monkeypatch.setattr(launch, "table", lambda *_: None)
    items = mixed()[:12]
    for result, item in zip(project_list(items), items, strict=True):
        assert_exact(result, *item)
    assert {tuple(variant.values()) for _, variant, _ in calls} == {(False, False)} and len(calls) == 24


def test_a_launch_unlike_the_table_is_refused():
    from guardspace_kernels.ops import _triton_launch

    row = _triton_table.rows_for("null_projection.onto_basis", "sm80")[0]
    arguments = dict.fromkeys(_triton_table.KERNELS[row.kernel].arguments, 0)
    for called, variant in (
        ({**arguments, "more": 1}, {"GROUPED": True, "ALIGNED": True}),
        (dict(reversed(arguments.items())), {"GROUPED": True, "ALIGNED": True}),
        (arguments, {"GROUPED": False, "ALIGNED": True}),
    ):
        with pytest.raises(AssertionError, match=r"null_projection.onto_basis: called with .*unlike the table"):
            _triton_launch.launch(None, row, 1, called, **variant)


def test_a_launch_is_made_on_the_device_of_its_tensors(monkeypatch, triton_kernels):  # noqa: F811
    from guardspace_kernels.ops import _triton_launch

    devices, current = [], [torch.device("cuda", 0)]

    @contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda **_: devices.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device", on)
    row = _triton_table.rows_for("null_projection.onto_basis", "sm80")[0]
    arguments = dict.fromkeys(_triton_table.KERNELS[row.kernel].arguments, 0)
    with FakeTensorMode():
        arguments["G"] = torch.empty(1, device="cuda:1")
    _triton_launch.launch(Kernel(), row, 1, arguments, GROUPED=True, ALIGNED=True)
    assert devices == [torch.device("cuda", 1)]


ROWS = [
    _triton_table.Row("kernel", ("sm80",), {"BLOCK": 64}, 8, 3, least=(100, 10)),
    _triton_table.Row("kernel", ("sm80",), {"BLOCK": 16}, 4, 3, least=(1,)),
    _triton_table.Row("kernel", ("sm90",), {"BLOCK": 32}, 4, 3),
    _triton_table.Row("kernel", ("sm80",), {"BLOCK": 8}, 4, 3),
]


def test_the_first_row_whose_sizes_are_reached_is_chosen(launched, monkeypatch):
    launch, _ = launched
    monkeypatch.setattr(_triton_table, "ROWS", ROWS)
    cpu = torch.device("cpu")
    for sizes, block in (((100, 10), 64), ((100, 9), 16), ((99, 10), 16), ((0, 0), 8), ((1,), 16)):
        assert launch.choose("kernel", cpu, sizes).constants["BLOCK"] == block


def test_the_quickest_row_is_remembered_in_a_file(launched, monkeypatch, tmp_path):
    launch, _ = launched
    monkeypatch.setattr(_triton_table, "ROWS", ROWS)
    monkeypatch.setattr(launch, "target", lambda device: "sm80")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(launch, "_current", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("GUARDSPACE_AUTOTUNE", "1")
    tried = []

    def seconds(run):
        run()
        return {64: 3.0, 16: 2.0, 8: 1.0}[tried[-1]]

    monkeypatch.setattr(launch, "_seconds", seconds)
    capturing, cuda = True, torch.device("cuda", 0)

    def chosen(*sizes):
        return launch.choose("kernel", cuda, sizes, lambda row: tried.append(row.constants["BLOCK"])).constants["BLOCK"]

    assert chosen(100, 10) == 64 and not tried  # nothing is timed during a capture
    capturing = False
    assert chosen(100, 10) == 8 and tried == [64, 16, 8]
    assert chosen(127, 15) == 8 and len(tried) == 3  # sizes of the same powers of two
    (path,) = (tmp_path / "guardspace_kernels").iterdir()  # and no temporary file
    assert json.loads(path.read_text()) == {"kernel [7, 4]": "BLOCK=8 warps=4 stages=3"}
    launch._choices.cache_clear()
    assert chosen(100, 10) == 8 and len(tried) == 3  # another process
    damaged = "broken", "[1, 2]", '{"kernel [7, 4]": ["BLOCK=16"]}', "[" * 100_000
    for text in ('{"kernel [7, 4]": "BLOCK=16 warps=4 stages=3"}', '{"kernel [7, 4]": "of another version"}', *damaged):
        path.write_text(text)
        launch._choices.cache_clear()
        known = '"BLOCK=16 ' in text
        assert chosen(100, 10) == (16 if known else 8) and len(tried) == (3 if known else 6)
        del tried[3:]
    monkeypatch.setenv("GUARDSPACE_AUTOTUNE", "0")
    assert chosen(100, 10) == 64 and len(tried) == 3
    launch._choices.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_of_one_and_of_all(launched, dtype):
    _, calls = launched
    sizes = [(1, 31, 9), (16, 64, 64), (33, 48, 0), (20, 160, 48), (2, 1, 1)]
    lists = states(sizes, dtype)
    before = wider(lists, dtype)
    projected_adamw_(*lists, **SETTINGS)
    assert_same_update(lists, before)
    kernels = [name for name, _ in itertools.groupby(name for name, *_ in calls)]
    assert kernels == ["onto_basis", "adamw_from_basis", "onto_basis", "from_basis"]
    assert all(same_bits(g, old) for g, old in zip(lists[1], before[1], strict=True))
    assert lists[4] == before[4]
    for u in zip(*wider(before, dtype), strict=True):
        one = [[value] for value in u]
        old = wider(one, dtype)
        projected_adamw_(*one, **SETTINGS)
        assert_same_update(one, old)
