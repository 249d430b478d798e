"""The Triton kernels of the null projection and of AdamW within it, under Triton's interpreter, against float64."""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager, nullcontext

import pytest
import torch
from backends import Guarded, automatic, same_bits, triton_kernels  # noqa: F401
from oracle import FLOOR, dense_projector, orthonormal
from torch._subclasses.fake_tensor import FakeTensorMode

from guardspace_kernels.ops import _triton_table, null_project_, projected_adamw_
from guardspace_kernels.ops.null_projection import reference

pytestmark = [automatic, pytest.mark.usefixtures("triton_kernels")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: (r, d, k): one row to several tiles; ragged and aligned; no column, one, all.
SIZES = [(1, 31, 9), (16, 64, 64), (20, 48, 0), (33, 130, 97), (128, 64, 32), (3, 1, 1), (1, 1, 0), (16, 160, 48)]
FORMS = pytest.mark.parametrize("complement", [True, False], ids=["range basis", "null basis"])


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


def projected(g, basis, complement=True):
    g = g.clone()
    null_project_(g, basis, complement)
    return g


def assert_close(result, plain, truth, largest, case=""):
    """At most twice the error of plain PyTorch, relative to the largest entry of the input."""
    errors = [(t.double() - truth).abs().max().item() / largest if t.numel() else 0.0 for t in (result, plain)]
    assert result.dtype == plain.dtype
    assert errors[0] <= 2 * errors[1] + FLOOR[result.dtype], f"{case} {errors[0]:.2e}, plain {errors[1]:.2e}"


def assert_exact(result, g, basis, complement, case=""):
    truth = g.double() @ dense_projector(basis, complement, g.shape[-1])
    plain = reference.project(g, basis, complement).to(g.dtype)
    assert_close(result, plain, truth, g.double().abs().max().item() if g.numel() else 1.0, case)


@FORMS
@pytest.mark.parametrize(
    "dtype, basis_dtype", [*((dtype, torch.float32) for dtype in DTYPES), (torch.float32, torch.bfloat16)], ids=str
)
def test_every_rank_and_basis(dtype, basis_dtype, complement):
    for r, d, k in SIZES:
        g, basis = torch.randn(r, d).to(dtype), orthonormal(d, k, basis_dtype)
        result = projected(g, basis, complement)
        assert_exact(result, g, basis, complement, f"r, d, k = {r, d, k}:")
        assert same_bits(projected(g, basis, complement), result)


def mixed():
    """Items of every dtype, alignment and height of tile, as (g, basis, complement)."""
    sizes = [(1, 31, 9), (5, 17, 3), (20, 130, 97), (16, 64, 64), (32, 48, 0), (33, 35, 3), (40, 64, 32)]
    return [
        (torch.randn(r, d).to(dtype), orthonormal(d, k, torch.float32), i % 3 == 0)
        for i, ((r, d, k), dtype) in enumerate(itertools.product(sizes, DTYPES))
    ]


def project_list(items):
    gs = [g.clone() for g, *_ in items]
    null_project_(gs, [basis for _, basis, _ in items], [complement for *_, complement in items])
    return gs


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


def test_one_matrix_twice_in_a_list_is_projected_twice():
    g, one, two = torch.randn(20, 60), orthonormal(60, 7, torch.float32), orthonormal(60, 9, torch.float32)
    expected = projected(projected(g, one), two, False)
    other = torch.randn(3, 60)
    null_project_([g, other, g], [one, one, two], [True, True, False])
    assert same_bits(g, expected) and (other @ one).abs().max() < 1e-5


LAYOUTS = {
    "wide rows": lambda r, d: torch.full((r, d + 9), torch.nan)[:, 4 : 4 + d],
    "every third row": lambda r, d: torch.full((3 * r, d), torch.nan)[1::3],
    "every second column": lambda r, d: torch.full((r, 2 * d), torch.nan)[:, 1::2],
    "column-major": lambda r, d: torch.full((d, r), torch.nan).T,
}


@FORMS
@pytest.mark.parametrize("of", ["g", "basis"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout, of, complement):
    for r, d, k in ((1, 7, 3), (50, 48, 16)):
        g, basis = torch.randn(r, d), orthonormal(d, k, torch.float32)
        expected = projected(g, basis, complement)
        source = g if of == "g" else basis
        view = LAYOUTS[layout](*source.shape).copy_(source)
        before = view._base.clone()
        result, its_basis = (view, basis) if of == "g" else (g, view)
        null_project_(result, its_basis, complement)
        assert same_bits(result, expected)
        view.copy_(source)
        assert same_bits(view._base, before)


def test_other_dimensions_than_two():
    basis = orthonormal(31, 9, torch.float32)
    for g in (torch.randn(3, 5, 31), torch.randn(31), torch.randn(2, 0, 31), torch.randn(5, 3, 31).transpose(0, 1)):
        expected = projected(g.reshape(-1, 31).clone(), basis).view(g.shape)
        assert same_bits(projected(g, basis), expected)
        null_project_(g, basis)
        assert same_bits(g, expected)
    empty = torch.ones(3, 0)
    null_project_([empty, torch.ones(0, 4)], [torch.ones(0, 0), torch.ones(4, 2)])
    null_project_([], [])


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_the_operands_is_read_or_written(dtype, complement):
    guarded = [
        (Guarded.around(torch.randn(r, d).to(dtype)), Guarded.around(orthonormal(d, k, torch.float32)))
        for r, d, k in ((1, 1, 1), (3, 13, 5), (50, 49, 47), (16, 128, 96))
    ]
    for items in ([pair] for pair in guarded), [guarded]:
        for pairs in items:
            expected = [projected(g.matrix.clone(), basis.matrix.clone(), complement) for g, basis in pairs]
            null_project_([g.matrix for g, _ in pairs], [basis.matrix for _, basis in pairs], complement)
            for (g, basis), one in zip(pairs, expected, strict=True):
                torch.testing.assert_close(g.matrix, one, rtol=0, atol=2 * FLOOR[dtype])
                assert g.matrix.isfinite().all() and g.intact() and basis.intact()


@FORMS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_entry_shows_in_its_row_only(bad, complement):
    for r, d, k, i, j in ((1, 13, 3, 0, 12), (50, 49, 24, 31, 0), (49, 140, 131, 32, 139)):
        g, basis = torch.randn(r, d), orthonormal(d, k, torch.float32)
        g[i, j] = bad
        finite = projected(g, basis, complement).isfinite()
        assert not finite[i].any() and finite[torch.arange(r) != i].all()


def test_an_empty_basis_keeps_the_bits():
    g = torch.tensor([[0.0, -0.0, 1.5, torch.inf]])
    assert same_bits(projected(g, torch.empty(4, 0)), g)
    assert same_bits(projected(g, torch.empty(4, 0), False), torch.zeros(1, 4))


def test_autograd_notices_the_write():
    g = torch.randn(3, 31)
    y = (g * torch.ones(3, 31, requires_grad=True)).sum()
    null_project_(g, orthonormal(31, 9, torch.float32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# ---- launches


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
    capturing, pinned = [False], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
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
    capturing[0] = True
    assert launch.table([[1, 2]], device) is sent
    new = launch.table([[3, 4]], device)
    assert new.tolist() == [[3, 4]]
    kept, host = launch._CAPTURED
    assert kept is sent and host.tolist() == [[3, 4]] and host.data_ptr() in {t.data_ptr() for t in pinned}
    assert launch.table([[5, 6]], device) is None  # no more is left
    assert len(launch._TABLES) == 1  # the graph's own memory is for its replays


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
    for text in ('{"kernel [7, 4]": "BLOCK=16 warps=4 stages=3"}', '{"kernel [7, 4]": "of another version"}', "broken"):
        path.write_text(text)
        launch._choices.cache_clear()
        known = "BLOCK=16" in text
        assert chosen(100, 10) == (16 if known else 8) and len(tried) == (3 if known else 6)
        del tried[3:]
    monkeypatch.setenv("GUARDSPACE_AUTOTUNE", "0")
    assert chosen(100, 10) == 64 and len(tried) == 3
    launch._choices.cache_clear()


# ---- AdamW

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def states(sizes, dtype, start=3):
    """Lists of params, grads, first and second moments, steps, bases and complements."""
    lists = [[], [], [], [], [], [], []]
    for i, (r, d, k) in enumerate(sizes):
        tensors = [torch.randn(r, d).to(dtype) for _ in range(3)]
        tensors += [torch.rand(r, d).to(dtype), torch.tensor(float(start + i)), orthonormal(d, k, torch.float32)]
        for values, value in zip(lists, [*tensors, i % 3 != 1], strict=True):
            values.append(value)
    return lists


def wider(lists, dtype):
    return [[t.to(dtype, copy=True) if i < 4 else t for t in values] for i, values in enumerate(lists)]


def reference_adamw(lists, settings=SETTINGS):
    reference.projected_adamw_([reference.Update(*u, tuple(settings.values())) for u in zip(*lists, strict=True)])
    return lists


def assert_same_update(lists, before, settings=SETTINGS):
    truth = reference_adamw(wider(before, torch.float64), settings)
    plain = reference_adamw(wider(before, before[0][0].dtype), settings)
    for i, name in ((0, "param"), (2, "exp_avg"), (3, "exp_avg_sq")):
        for result, one, exact in zip(lists[i], plain[i], truth[i], strict=True):
            assert_close(result, one, exact, exact.abs().max().item() if exact.numel() else 1.0, name)


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


@pytest.mark.parametrize("beta1, beta2", [(0.0, 0.0), (0.5, 0.9), (0.999, 0.99999)])
@pytest.mark.parametrize("step", [1, 2, 30, 40, 100000])
def test_bias_correction_is_exact_in_float32(beta1, beta2, step):
    lists = states([(3, 17, 4)], torch.float32, step)
    before = wider(lists, torch.float32)
    settings = {**SETTINGS, "beta1": beta1, "beta2": beta2, "eps": 0.1}
    projected_adamw_(*lists, **settings)
    assert_same_update(lists, before, settings)


def test_the_first_step_of_adamw():
    """Its moments are ``1 − beta`` times what float32 makes of the gradient: ``1 − 0.9999`` in float32 is 2e-4 off."""
    params, grads, firsts, seconds, *rest = states([(3, 17, 4)], torch.float32, 1)
    lists = [params, grads, [firsts[0].zero_()], [seconds[0].zero_()], *rest]
    before = wider(lists, torch.float32)
    settings = {**SETTINGS, "beta2": 0.9999}
    projected_adamw_(*lists, **settings)
    assert_same_update(lists, before, settings)


def test_adamw_of_strided_matrices():
    lists = states([(7, 17, 4)], torch.float32)
    expected = wider(lists, torch.float32)
    projected_adamw_(*expected, **SETTINGS)
    for layout in LAYOUTS.values():
        views = [[layout(7, 17).copy_(t) for t in values] if i < 4 else values for i, values in enumerate(lists)]
        outside = [values[0]._base.isnan().sum() for values in views[:4]]
        projected_adamw_(*views, **SETTINGS)
        for i in (0, 2, 3):
            assert same_bits(views[i][0], expected[i][0])
        assert [values[0]._base.isnan().sum() for values in views[:4]] == outside


def test_adamw_counts_as_a_write():
    lists = states([(3, 17, 4)], torch.float32)
    versions = [lists[i][0]._version for i in range(4)]
    projected_adamw_(*lists, **SETTINGS)
    assert [lists[i][0]._version > version for i, version in enumerate(versions)] == [True, False, True, True]
