"""Lists of tensors that come again: on a GPU nothing is left to do in Python for each of them."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext

import pytest
import torch
from backends import automatic, calls, same_bits, use_cuda, use_triton
from oracle import orthonormal

from guardspace_kernels.ops import _cpu, _prepared, _triton_table, null_project_, projected_adamw_

pytestmark = automatic
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


class Compiled:
    """What Triton makes of a kernel: the first launch returns it, and it takes addresses; the interpreter runs it."""

    def __init__(self, function):
        self.function, self.arg_names, self.dtypes = function, function.arg_names, {}

    def __getitem__(self, grid):
        def run(**given):
            self.dtypes.update({name: t.dtype for name, t in given.items() if isinstance(t, torch.Tensor)})
            self.function[grid](**given)
            return Kernel(self)

        return run


class Kernel:
    """A compiled kernel."""

    def __init__(self, compiled):
        self.compiled = compiled

    def __getitem__(self, grid):
        return lambda *values: self.run(grid, values)

    def run(self, grid, values):
        given = dict(zip(self.compiled.arg_names, values, strict=True))
        for name, dtype in self.compiled.dtypes.items():
            memory = (ctypes.c_char * dtype.itemsize).from_address(given[name]) if given[name] else bytearray(8)
            given[name] = torch.frombuffer(memory, dtype=dtype, count=1)
        self.compiled.function[grid](**given)


@pytest.fixture(params=["triton", pytest.param("cuda", marks=pytest.mark.cuda_on_cpu)])
def gpu(request, monkeypatch):
    if request.param == "cuda":
        use_cuda(monkeypatch, 0)
        return
    use_triton(monkeypatch, watched=False)
    from guardspace_kernels.ops.null_projection import triton_kernels

    for name in ("onto_basis", "from_basis", "adamw_from_basis"):
        monkeypatch.setattr(triton_kernels, name, Compiled(getattr(triton_kernels, name)))


@pytest.fixture(params=[True, False], ids=["read in C++", "read in Python"])
def reading(request, monkeypatch):
    if request.param and not _cpu.READS_TENSORS:
        pytest.skip("the extension is not built, or PyTorch has no functions for it to read tensors")
    monkeypatch.setattr(_prepared, "READS_TENSORS", request.param)


def matrices(count, dtype=torch.float32, d=48):
    """Such that they are read where they lie."""
    basis = orthonormal(d, 20, torch.float32).contiguous()
    return [torch.randn(3, d).to(dtype) for _ in range(count)], [basis] * count


def refuse(monkeypatch):
    """From now on no list takes the long way."""
    from guardspace_kernels.ops import null_projection

    for name in ("_project_op", "_project_list_op", "_adamw_op"):
        monkeypatch.setattr(null_projection, name, None)


@pytest.mark.usefixtures("gpu", "reading")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("complement", [True, False, [True, False, True]], ids=str)
def test_the_same_list_is_projected_again_at_once(monkeypatch, complement, dtype):
    gs, bases = matrices(3, dtype)
    null_project_(gs, bases, complement)
    values = [torch.randn(3, 48).to(dtype) for _ in gs]
    expected = [value.clone() for value in values]
    null_project_(expected, bases, complement)
    refuse(monkeypatch)
    for g, value in zip(gs, values, strict=True):
        g.copy_(value)
    versions = [g._version for g in gs]
    null_project_(gs, bases, complement)
    assert all(same_bits(g, one) for g, one in zip(gs, expected, strict=True))
    assert [g._version for g in gs] == [version + 1 for version in versions]


@pytest.mark.usefixtures("gpu")
@pytest.mark.skipif(not _cpu.READS_TENSORS, reason="tensors are read one by one in Python")
def test_python_does_no_work_for_each_matrix():
    counts = set()
    for length in (2, 40):
        gs, bases = matrices(length)
        with torch.no_grad():
            null_project_(gs, bases)
            counts.add(calls(lambda: _prepared._described((gs, bases))))  # noqa: B023
            key = _prepared._key("null_project_", (gs, bases), [True] * length)
    again = _prepared._PLANS[key]
    assert len(counts) == 1 and callable(again)


@pytest.mark.usefixtures("gpu", "reading")
def test_one_matrix_comes_again_too(monkeypatch):
    (g,), (basis,) = matrices(1)
    null_project_(g, basis)
    g.normal_()
    expected = g.clone()
    null_project_(expected, basis)
    refuse(monkeypatch)
    null_project_(g, basis)
    assert same_bits(g, expected)


OTHERS = {
    "another address": lambda g: torch.randn(3, 48),
    "other strides": lambda g: torch.randn(48, 3).T,
    "another dtype": lambda g: torch.randn(3, 48).bfloat16(),
    "another shape": lambda g: torch.randn(5, 48),
}


@pytest.mark.usefixtures("gpu", "reading")
@pytest.mark.parametrize("other", OTHERS)
def test_what_a_tensor_was_replaced_with_is_projected(other):
    gs, bases = matrices(3)
    for _ in range(2):
        null_project_(gs, bases)
    value = OTHERS[other](gs[1])
    expected = value.clone()
    null_project_(expected, bases[1])
    gs[1].data = value
    for g in (gs[0], gs[2]):
        g.normal_()
    null_project_(gs, bases)
    torch.testing.assert_close(gs[1], expected)
    assert all((g @ bases[0]).abs().max() < 1e-5 for g in (gs[0], gs[2]))


@pytest.mark.usefixtures("gpu", "reading")
def test_a_basis_of_another_address_or_form_is_taken(monkeypatch):
    gs, bases = matrices(2)
    other = orthonormal(48, 7, torch.float32).contiguous()
    for form in (True, False):
        null_project_(gs, bases, form)
    for its, form in ((bases, True), ([other] * 2, True), (bases, False), ([other.bfloat16()] * 2, True)):
        for g in gs:
            g.normal_()
        expected = [g.clone() for g in gs]
        for one, basis in zip(expected, its, strict=True):
            null_project_(one, basis, form)
        null_project_(gs, its, form)
        for g, one in zip(gs, expected, strict=True):
            torch.testing.assert_close(g, one)


@pytest.mark.usefixtures("gpu")
def test_copies_that_kernels_read_are_not_taken_for_the_tensors():
    gs, _ = matrices(2)
    narrow = orthonormal(48, 20, torch.float32).bfloat16()
    for complement in (True, False):
        null_project_(gs, [narrow] * 2, complement)
        null_project_([g.t() for g in (torch.randn(48, 3), torch.randn(48, 3))], matrices(2)[1], complement)
    assert not _prepared._PLANS


@pytest.mark.usefixtures("gpu", "reading")
def test_errors_are_those_of_the_first_call(monkeypatch):
    gs, bases = matrices(2)
    null_project_(gs, bases)
    with pytest.raises(TypeError, match="complement must be True, False or a list of them"):
        null_project_(gs, bases, [1, 1])
    gs[0].requires_grad_()
    with pytest.raises(RuntimeError, match="requires grad"):
        null_project_(gs, bases)
    with pytest.raises((TypeError, RuntimeError), match="null_project_"):
        null_project_([1, 2], bases)


def updates(count):
    params, bases = matrices(count)
    lists = [params, *([torch.randn(3, 48) for _ in params] for _ in range(2)), [torch.rand(3, 48) for _ in params]]
    return [*lists, [torch.tensor(1.0) for _ in params], bases]


@pytest.mark.usefixtures("gpu", "reading")
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_of_adamw_is_made_again_with_other_settings(monkeypatch, count):
    lists = updates(count)
    twin = [[t.clone() for t in values] for values in lists]
    for ours in (lists, twin):
        projected_adamw_(*ours, **SETTINGS)
    later = {**SETTINGS, "lr": 1e-3, "weight_decay": 0.0}
    _prepared._PLANS.popitem()  # the twin's: it takes the long way twice
    for ours in (twin, lists):
        for step, grad in zip(ours[4], ours[1], strict=True):
            step += 1
            grad.mul_(-0.5)
        projected_adamw_(*ours, **later)
        refuse(monkeypatch)
    for i in (0, 2, 3):
        assert all(same_bits(ours, theirs) for ours, theirs in zip(lists[i], twin[i], strict=True))
    with pytest.raises(ValueError, match=r"lr must be 0 or more, and finite, got -1"):
        projected_adamw_(*lists, **{**SETTINGS, "lr": -1.0})


def test_the_least_recent_plan_goes_first(monkeypatch):
    monkeypatch.setattr(_prepared, "_PLANS", type(_prepared._PLANS)())
    monkeypatch.setattr(_prepared, "_MOST_PLANS", 2)
    lists, done = [([torch.randn(2, 3)], [torch.eye(3)]) for _ in range(3)], []
    for i in (0, 1):
        _prepared.keep("entry", lists[i], [True], lambda i=i: done.append(i))
    assert _prepared.run("entry", lists[0], [True])
    _prepared.keep("entry", lists[2], [True], lambda: done.append(2))
    assert [_prepared.run("entry", one, [True]) for one in lists] == [True, False, True] and done == [0, 0, 2]
    assert not _prepared.run("entry", lists[0], [False]) and not _prepared.run("another", lists[0], [True])
    assert not _prepared.run("entry", ([torch.randn(2, 3, device="meta")], lists[0][1]), [True])


def test_nothing_is_kept_for_a_captured_graph_nor_taken_from_another_stream(monkeypatch):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    capturing, stream = [False], [1]
    monkeypatch.setattr(_prepared, "_PLANS", type(_prepared._PLANS)())
    monkeypatch.setattr(_prepared, "_described", lambda lists: id(lists[0][0]))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: type("Stream", (), {"cuda_stream": stream[0]}))
    lists = ([torch.randn(2, 3).as_subclass(OnGpu)],)
    _prepared.keep("entry", lists, [True], lambda: None)
    assert _prepared.run("entry", lists, [True])
    stream[0] = 2
    assert not _prepared.run("entry", lists, [True])
    stream[0], capturing[0] = 1, True
    assert not _prepared.run("entry", lists, [True])
    _prepared.keep("captured", lists, [True], lambda: None)
    assert len(_prepared._PLANS) == 1


# ---- Triton's own launches, by a driver that only notes them


@pytest.fixture
def launched(monkeypatch):
    """What Triton gave the driver, the grid and the arguments, of kernels that nobody compiles."""
    runtime = pytest.importorskip("triton.runtime")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel

    noted = []

    class Driver:
        utils = type("Utils", (), {"unload_module": lambda self, module: None})()
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 7)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    def compiled(self, *_):
        kernel = object.__new__(type("Loaded", (CompiledKernel,), {"__del__": lambda self: None}))
        kernel.src = kernel.packed_metadata = None
        kernel.name, kernel.module, kernel.function = "kernel", "module", "function"
        kernel._run = lambda *arguments: noted.append((arguments[:4], arguments[9:]))
        return kernel

    monkeypatch.setattr(runtime.driver, "_active", Driver())
    monkeypatch.setattr(runtime.jit.JITFunction, "_do_compile", compiled)
    return noted


@pytest.mark.parametrize("count", [1, 3])
def test_triton_gets_the_same_arguments_again_and_binds_none_of_them(launched, monkeypatch, count):
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    from guardspace_kernels.ops import _triton_launch

    def double(X, size, TABLE, n, H, GROUPED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(X + i, tl.load(H + i, mask=i < size), mask=i < size)

    arguments = {"X": "*fp32", "size": "i32", "TABLE": "*i64", "n": "i32", "H": "*fp32"}
    kernel = _triton_table.Kernel(arguments, ("",), (), _triton_table._GROUPED)
    monkeypatch.setitem(_triton_table.KERNELS, "tools.double", kernel)
    row = _triton_table.Row("tools.double", ("sm80",), {"BLOCK": 16}, warps=4, stages=1)
    xs, H, other = [torch.randn(16) for _ in range(count)], torch.zeros(16), torch.ones(16)
    items = [(row, 2, {"X": x, "size": 20}) for x in xs]
    (again,) = _triton_launch.launch_items(JITFunction(double), items, {"H": H})
    (grid, first), _ = launched[-1], monkeypatch.setattr(JITFunction, "run", None)
    again(H=other)
    assert launched[-1][0] == grid == (2 * count, 1, 1, 7)
    H.set_(other)
    assert [t.data_ptr() if isinstance(t, torch.Tensor) else t for t in first] == list(launched[-1][1])
    alive = {id(value) for value in vars(again).values()}
    assert not alive & {id(x) for x in xs} and calls(lambda: again(H=other)) < 40
