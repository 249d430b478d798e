"""null_project_ and projected_adamw_ against G P with a dense float64 projector and AdamW of torch."""

from __future__ import annotations

import pytest
import torch
from backends import automatic
from oracle import DTYPES, assert_as_exact_as_plain, dense_projector, error, orthonormal
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.library import opcheck

from guardspace_kernels.ops import null_project_, projected_adamw_

OPS = torch.ops.guardspace
D, K = 31, 9

LAYOUTS = {
    "ragged": lambda: torch.randn(7, D, dtype=torch.float64),
    "one row": lambda: torch.randn(1, D, dtype=torch.float64),
    "one vector": lambda: torch.randn(D, dtype=torch.float64),
    "3-D": lambda: torch.randn(3, 5, D, dtype=torch.float64),
    "no row": lambda: torch.randn(0, D, dtype=torch.float64),
    "no matrix": lambda: torch.randn(2, 0, D, dtype=torch.float64),
    "column-major": lambda: torch.randn(D, 7, dtype=torch.float64).T,
    "every second column": lambda: torch.randn(7, 2 * D, dtype=torch.float64)[:, ::2],
}


def with_strides_of(source, dtype):
    """A copy in ``dtype`` whose memory is laid out, holes included, as that of ``source``."""
    copy = torch.empty_strided(source.shape, source.stride(), dtype=dtype)
    return copy.copy_(source)


@pytest.mark.parametrize("basis_dtype", [None, torch.float32], ids=["basis in dtype of g", "float32 basis"])
@pytest.mark.parametrize("complement", [True, False], ids=["range basis", "null basis"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_dense_projection(dtype, layout, complement, basis_dtype):
    g = with_strides_of(LAYOUTS[layout](), dtype)
    basis = orthonormal(D, K, basis_dtype or dtype)
    P = dense_projector(basis, complement, D)
    truth, plain = g.double() @ P, g @ P.to(dtype)
    assert null_project_(g, basis, complement) is None
    assert_as_exact_as_plain(g, plain, truth)


@pytest.mark.parametrize("complement", [True, False], ids=["range basis", "null basis"])
@pytest.mark.parametrize("k", [0, D])
def test_an_empty_and_a_full_basis(k, complement):
    g = torch.randn(4, D, dtype=torch.float64)
    before = g.clone()
    null_project_(g, orthonormal(D, k), complement)
    expected = before if (k == D) != complement else torch.zeros_like(g)
    torch.testing.assert_close(g, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("precision", ["highest", "medium", "bf16 for one backend"])
def test_rounding_happens_once_whatever_the_settings(precision, autocast, matmul_precision):
    g, Q = torch.randn(64, 192), orthonormal(192, 80, torch.float32)
    expected = g.clone()
    null_project_(expected, Q)
    assert error(expected, g.double() @ dense_projector(Q, True, 192)) < 1e-6
    matmul_precision(precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        null_project_(g, Q)
    assert torch.equal(g, expected)


def test_nothing_beyond_the_view_is_written():
    storage = torch.ones(6, 2 * D)
    null_project_(storage[1:4, ::2], orthonormal(D, K, torch.float32))
    untouched = torch.ones(6, 2 * D).bool()
    untouched[1:4, ::2] = False
    assert (storage[untouched] == 1).all() and (storage[~untouched] != 1).any()


def test_a_matrix_that_overlaps_itself_is_refused():
    g = torch.ones(1, D)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory"):
        null_project_(g.expand(3, D), orthonormal(D, K, torch.float32))
    assert g.eq(1).all()


@pytest.mark.parametrize("shape", [(2, 3, 0), (3, 0), (0,)], ids=str)
def test_no_column_at_all(shape):
    g = torch.ones(shape)
    null_project_(g, torch.ones(0, 0))
    assert g.shape == shape


@pytest.mark.parametrize("complement", [True, False, [True, False, True]], ids=str)
def test_a_list_equals_one_call_each(complement):
    gs = [torch.randn(3, D), torch.randn(2, 5, 17).bfloat16(), torch.randn(D, dtype=torch.float64)]
    bases = [orthonormal(g.shape[-1], 4, torch.float32) for g in gs]
    singly = [g.clone() for g in gs]
    for i, (g, basis) in enumerate(zip(singly, bases, strict=True)):
        null_project_(g, basis, complement if isinstance(complement, bool) else complement[i])
    null_project_(gs, bases, complement)
    assert all(torch.equal(g, one) for g, one in zip(gs, singly, strict=True))


def test_an_empty_list_is_no_error():
    null_project_([], [])


@pytest.mark.parametrize("as_list", [False, True], ids=["one", "list"])
def test_a_leaf_that_requires_grad_is_refused_in_grad_mode(as_list):
    g, basis = torch.nn.Parameter(torch.randn(3, D)), orthonormal(D, K, torch.float32)
    arguments = ([torch.zeros(1, D), g], [basis, basis]) if as_list else (g, basis)
    before = g.detach().clone()
    with pytest.raises(RuntimeError, match=r"null_project_: .*requires grad.*torch\.no_grad\(\).*\.grad"):
        null_project_(*arguments)
    assert torch.equal(g, before)
    with torch.no_grad():
        null_project_(*arguments)
    assert error(g.detach(), before.double() @ dense_projector(basis, True, D)) < 1e-6


@pytest.mark.parametrize("as_list", [False, True])
def test_a_tensor_with_a_tangent_is_refused(as_list):
    basis = orthonormal(D, K, torch.float32)
    with torch.no_grad(), forward_ad.dual_level():
        g = forward_ad.make_dual(torch.ones(3, D), torch.ones(3, D))
        with pytest.raises(RuntimeError, match=r"null_project_: the tensor to be written .*has a tangent"):
            null_project_(*([g], [basis]) if as_list else (g, basis))
        null_project_(torch.ones(3, D), basis)


def test_a_basis_that_requires_grad_leaves_g_a_constant():
    g = torch.randn(3, D)
    null_project_(g, orthonormal(D, K, torch.float32).requires_grad_())
    assert not g.requires_grad


def test_autograd_notices_the_write():
    g = torch.randn(3, D)
    y = (g * torch.ones(3, D, requires_grad=True)).sum()
    null_project_(g, orthonormal(D, K, torch.float32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


SAMPLES = {
    "range basis": lambda: (torch.randn(4, D), orthonormal(D, K, torch.float32)),
    "null basis": lambda: (torch.randn(4, D), orthonormal(D, K, torch.float32), False),
    "float32 basis beside half": lambda: (torch.randn(4, D).bfloat16(), orthonormal(D, K, torch.float32)),
    "basis with grad": lambda: (torch.randn(4, D), orthonormal(D, K, torch.float32).requires_grad_()),
    "no row": lambda: (torch.randn(0, D), orthonormal(D, K, torch.float32)),
    "strided": lambda: (torch.randn(D, 4).T, orthonormal(D, K, torch.float32)),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_passes_opcheck(sample):
    opcheck(OPS.null_project_.default, SAMPLES[sample]())


def test_the_list_form_passes_opcheck():
    gs = [torch.randn(4, D), torch.randn(2, 3, 7)]
    opcheck(
        OPS.null_project_list_.default, (gs, [orthonormal(g.shape[-1], 3, torch.float32) for g in gs], [True, False])
    )


@automatic
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_for_every_row_count(compiler):
    counter = CompileCounterWithBackend(compiler)
    basis = orthonormal(D, K, torch.float32)

    def step(g, more):
        g = g * 2
        null_project_(g, basis)
        null_project_([more, g], [basis, basis], [False, True])
        return g + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 8):
        g, more = torch.randn(rows, D), torch.randn(rows, 2, D)
        expected_more = more.clone()
        expected = step(g, expected_more)
        torch.testing.assert_close(compiled(g, more), expected)
        torch.testing.assert_close(more, expected_more)
    assert counter.frame_count == 1


Q3 = torch.eye(3)[:, :2]


@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        ((torch.ones(2, 3).long(), Q3), TypeError, r": g must be float64.*got torch.int64 of shape \(2, 3\)"),
        ((torch.tensor(1.0), Q3), ValueError, r": g must be \(\.\.\., d\), got a scalar"),
        ((torch.ones(2, 3), Q3.long()), TypeError, r": basis must be float64.*got torch.int64 of shape \(3, 2\)"),
        ((torch.ones(2, 4), Q3), ValueError, r": basis must be \(d, k\) with d = 4 .* of g.*got shape \(3, 2\)"),
        ((torch.ones(2, 3), torch.ones(3)), ValueError, r": basis must be \(d, k\) with d = 3 .*got shape \(3,\)"),
        ((torch.ones(2, 3), torch.ones(3, 4)), ValueError, r": basis must be \(d, k\) .*k <= d, got shape \(3, 4\)"),
        ((torch.ones(2, 3), torch.ones(3, 2, device="meta")), ValueError, ": basis is on meta but g is on cpu"),
        ((torch.ones(2, 3), [Q3]), TypeError, ": with one tensor g, basis must be one tensor and complement one bool"),
        ((torch.ones(2, 3), Q3, [True]), TypeError, ": with one tensor g, basis must be one tensor and complement"),
        (
            ([torch.ones(2, 3)], Q3),
            TypeError,
            r": with a list g, basis must be a list, got one tensor of shape \(3, 2\)",
        ),
        (([torch.ones(2, 3)], [Q3, Q3]), ValueError, ": .* must be lists of one length, got 1, 2 and 1"),
        (([torch.ones(2, 3)], [Q3], [True, True]), ValueError, ": .* must be lists of one length, got 1, 1 and 2"),
        (([torch.ones(2, 3), torch.ones(2, 4)], [Q3, Q3]), ValueError, r"\[1\]: basis must be \(d, k\) with d = 4"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, exception, message):
    with pytest.raises(exception, match=f"null_project_{message}"):
        null_project_(*arguments)


# ---- AdamW

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(5, D), (D,), (2, 3, D), (0, D)]


def states(dtype=torch.float64, basis_dtype=None):
    """Lists of params, grads, first and second moments, steps and bases."""
    lists = [[torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(4)]
    lists[3] = [t.abs() for t in lists[3]]
    steps = [torch.tensor(float(i + 1)) for i in range(len(SHAPES))]
    return [*lists, steps, [orthonormal(D, K, basis_dtype or dtype) for _ in SHAPES]]


def copied(lists, dtype=None):
    return [*([t.to(dtype or t.dtype, copy=True) for t in values] for values in lists[:4]), *lists[4:]]


def adamw_of_torch(lists, complement):
    """The same by torch.optim.AdamW, in place, between products with a dense P."""
    params, grads, exp_avgs, exp_avg_sqs, steps, bases = lists
    settings = {"lr": SETTINGS["lr"], "eps": SETTINGS["eps"], "weight_decay": SETTINGS["weight_decay"]}
    for p, grad, m, v, step, basis in zip(params, grads, exp_avgs, exp_avg_sqs, steps, bases, strict=True):
        P = dense_projector(basis, complement, D).to(p.dtype)
        p.grad = grad @ P
        optimizer = torch.optim.AdamW([p], betas=(0.9, 0.999), foreach=False, **settings)
        optimizer.state[p] = {"step": step - 1, "exp_avg": m, "exp_avg_sq": v}
        optimizer.step()
        p.copy_(p @ P)


@pytest.mark.parametrize("basis_dtype", [None, torch.float32], ids=["basis in dtype of A", "float32 basis"])
@pytest.mark.parametrize("complement", [True, False], ids=["range basis", "null basis"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_is_that_of_torch_between_projections(dtype, complement, basis_dtype):
    lists = states(dtype, basis_dtype)
    before, truth, plain = copied(lists), copied(lists, torch.float64), copied(lists)
    adamw_of_torch(truth, complement)
    adamw_of_torch(plain, complement)
    assert projected_adamw_(*lists, complement, **SETTINGS) is None
    for i in (0, 2, 3):
        for result, one, exact in zip(lists[i], plain[i], truth[i], strict=True):
            assert_as_exact_as_plain(result, one, exact)
    assert all(torch.equal(grad, old) for grad, old in zip(lists[1], before[1], strict=True))


def test_adamw_of_strided_matrices_and_mixed_complements():
    lists = [values[:1] * 2 if i > 3 else [values[0], values[0].clone()] for i, values in enumerate(states())]
    expected = copied(lists)
    for i, complement in enumerate([True, False]):
        projected_adamw_(*[values[i : i + 1] for values in expected], complement, **SETTINGS)
    for layout in ("column-major", "every second column"):
        views = [
            [LAYOUTS[layout]()[:5].copy_(t) for t in values] if i < 4 else values for i, values in enumerate(lists)
        ]
        projected_adamw_(*views, [True, False], **SETTINGS)
        for i in (0, 2, 3):
            for view, one in zip(views[i], expected[i], strict=True):
                torch.testing.assert_close(view, one, rtol=0, atol=1e-13)
    projected_adamw_([], [], [], [], [], [], **SETTINGS)


def test_adamw_passes_opcheck():
    arguments = (*states(torch.float32), [True] * len(SHAPES), *SETTINGS.values())
    opcheck(OPS.projected_adamw_.default, arguments)


@automatic
@pytest.mark.usefixtures("fresh_compiler")
def test_adamw_compiles_to_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    lists = states(torch.float32)
    expected = copied(lists)
    compiled = torch.compile(lambda *lists: projected_adamw_(*lists, **SETTINGS), fullgraph=True, backend=counter)
    compiled(*lists)
    projected_adamw_(*expected, **SETTINGS)
    for i in (0, 2, 3):
        for result, one in zip(lists[i], expected[i], strict=True):
            torch.testing.assert_close(result, one)
    assert counter.frame_count == 1


def test_adamw_of_a_leaf_that_requires_grad_is_refused_in_grad_mode():
    lists = states(torch.float32)
    lists[0][1] = torch.nn.Parameter(lists[0][1])
    with pytest.raises(RuntimeError, match=r"projected_adamw_: .*requires grad.*torch\.no_grad\(\)"):
        projected_adamw_(*lists, **SETTINGS)
    before = lists[0][1].detach().clone()
    with torch.no_grad():
        projected_adamw_(*lists, **SETTINGS)
    assert not torch.equal(lists[0][1], before)


@pytest.mark.parametrize(
    "column, value, exception, message",
    [
        (0, torch.ones(5, D).long(), TypeError, r"\[0\]: param must be float64.*got torch.int64"),
        (0, torch.tensor(1.0), ValueError, r"\[0\]: param must be \(\.\.\., d\), got a scalar"),
        (
            1,
            torch.ones(5, D - 1),
            ValueError,
            rf"\[0\]: grad must be as param, torch.float32 of shape \(5, {D}\) on cpu",
        ),
        (2, torch.ones(5, D).double(), ValueError, r"\[0\]: exp_avg must be as param.*got torch.float64"),
        (3, torch.ones(5, D, device="meta"), ValueError, r"\[0\]: exp_avg_sq must be as param.*on meta"),
        (2, torch.ones(1, D).expand(5, D), ValueError, r"\[0\]: exp_avg: .*share memory; give it memory of its own"),
        (
            4,
            torch.ones(1),
            ValueError,
            r"\[0\]: step must be a 0-d float32 tensor on cpu.*got torch.float32 of shape \(1,",
        ),
        (4, torch.tensor(1), ValueError, r"\[0\]: step must be a 0-d float32 tensor on cpu.*got torch.int64"),
        (5, torch.ones(D - 1, 2), ValueError, r"\[0\]: basis must be \(d, k\) with d = 31 .* of param"),
    ],
)
def test_bad_arguments_of_adamw_are_refused_by_name(column, value, exception, message):
    lists = states(torch.float32)
    lists[column] = [value, *lists[column][1:]]
    with pytest.raises(exception, match=f"projected_adamw_{message}"):
        projected_adamw_(*lists, **SETTINGS)


def test_lists_and_betas_of_adamw_that_do_not_fit_are_refused():
    lists = states(torch.float32)
    with pytest.raises(ValueError, match="projected_adamw_: a matrix occurs twice among params; give each one once"):
        projected_adamw_(*[[values[0], values[0]] for values in lists], **SETTINGS)
    for column, name in enumerate(("grads", "exp_avgs", "exp_avg_sqs", "steps", "bases"), start=1):
        shorter = [values[:-1] if i == column else values for i, values in enumerate(lists)]
        with pytest.raises(ValueError, match=f"projected_adamw_: {name} must be as many as params, 4, got 3"):
            projected_adamw_(*shorter, **SETTINGS)
    with pytest.raises(ValueError, match="projected_adamw_: complements must be as many as params, 4, got 2"):
        projected_adamw_(*lists, [True, False], **SETTINGS)
    with pytest.raises(ValueError, match=r"projected_adamw_: beta1 and beta2 must be in \[0, 1\), got 0.9 and 1.0"):
        projected_adamw_(*lists, **{**SETTINGS, "beta2": 1.0})
