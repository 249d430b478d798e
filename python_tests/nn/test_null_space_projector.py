"""NullSpaceProjector: the thin basis as a module."""

from __future__ import annotations

import pytest
import torch
from oracle import dense_projector, error, orthonormal
from torch import nn

from guardspace_kernels.nn import NullSpaceProjector
from guardspace_kernels.nn.null_space_projector import is_orthonormal

D, K = 17, 5
FORMS = pytest.mark.parametrize("complement", [True, False], ids=["range basis", "null basis"])


@FORMS
def test_forward_and_project_apply_the_dense_projector(complement):
    basis = orthonormal(D, K)
    projector, P = NullSpaceProjector(basis, complement), dense_projector(basis, complement, D)
    x = torch.randn(3, 4, D, dtype=torch.float64)
    assert error(projector(x), x @ P) < 1e-14
    g = x.clone()
    assert projector.project_(g) is g and error(g, x @ P) < 1e-14
    assert projector.protected == (K if complement else D - K)


@FORMS
def test_forward_is_differentiable(complement):
    projector = NullSpaceProjector(orthonormal(D, K), complement)
    assert torch.autograd.gradcheck(projector, torch.randn(2, D, dtype=torch.float64, requires_grad=True))


@FORMS
@pytest.mark.parametrize(
    "dtype, autocast, bound",
    [
        (torch.float32, True, 1e-6),
        (torch.float32, False, 1e-6),
        (torch.bfloat16, False, 4e-3),
        (torch.float16, True, 5e-4),
    ],
    ids=str,
)
def test_forward_is_rounded_once(dtype, autocast, bound, complement):
    basis, x = orthonormal(D, K, torch.float32), torch.randn(50, D, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = NullSpaceProjector(basis, complement)(x)
    exact = x.double() @ dense_projector(basis, complement, D)
    assert y.dtype == dtype and error(y, exact) < bound


@pytest.mark.usefixtures("fresh_compiler")
def test_forward_compiles_to_one_graph():
    projector = NullSpaceProjector(orthonormal(D, K, torch.float32))
    compiled = torch.compile(projector, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 7):
        x = torch.randn(tokens, D)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(compiled(x), projector(x).double()) < 1e-6


@FORMS
def test_the_output_may_be_changed_in_place(complement):
    projector = NullSpaceProjector(orthonormal(D, K), complement)

    def changed(x):
        return projector(x).mul_(2.0).add_(x)

    assert torch.autograd.gradcheck(changed, torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True))


def test_project_works_on_parameters_in_grad_mode():
    projector, parameter = NullSpaceProjector(orthonormal(D, K)), nn.Parameter(torch.randn(3, D, dtype=torch.float64))
    assert torch.is_grad_enabled() and projector.project_(parameter) is parameter
    assert parameter.requires_grad and parameter.is_leaf
    assert (parameter.detach() @ projector.basis).norm() < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_a_model_leaves_the_basis_in_its_dtype(dtype):
    basis = orthonormal(D, K, torch.float32)
    model = nn.Sequential(nn.Linear(D, D), NullSpaceProjector(basis)).to(dtype)
    assert model[0].weight.dtype == dtype and torch.equal(model[1].basis, basis)
    assert model(torch.randn(2, D, dtype=dtype)).dtype == dtype


def test_moving_a_model_moves_the_basis():
    projector = NullSpaceProjector(orthonormal(D, K)).to("meta", torch.float32)
    assert projector.basis.is_meta and projector.basis.dtype == torch.float64


@FORMS
@pytest.mark.parametrize("width", [K, K + 3])
def test_the_state_dict_brings_width_and_form(width, complement):
    source = NullSpaceProjector(orthonormal(D, K), complement)
    target = nn.Sequential(NullSpaceProjector(orthonormal(D, width), not complement))
    target.load_state_dict(nn.Sequential(source).state_dict())
    assert torch.equal(target[0].basis, source.basis) and target[0].complement == complement
    assert target[0].basis.data_ptr() != source.basis.data_ptr()


def test_a_basis_of_another_layer_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for basis"):
        NullSpaceProjector(orthonormal(D, K)).load_state_dict(NullSpaceProjector(orthonormal(D + 1, K)).state_dict())


def altered(basis, entry=0.01):
    basis = basis.clone()
    basis[1, 1] += entry
    return basis


FORM = "_extra_state"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s | {"basis": altered(s["basis"])}, r"basis is not orthonormal \(max \|QᵀQ z − z\| = \d\.\de-0"),
        (lambda s: s | {"basis": altered(s["basis"], 1e20)}, "basis is not orthonormal"),
        (lambda s: s | {"basis": altered(s["basis"], torch.nan)}, r"basis is not orthonormal \(.* = nan\)"),
        (lambda s: s | {"basis": torch.zeros_like(s["basis"])}, "basis is not orthonormal"),
        (lambda s: s | {"basis": s["basis"].bfloat16()}, "basis is not orthonormal .*rounded when saved"),
        (lambda s: s | {"basis": s["basis"].long()}, "basis must be a floating-point tensor, got torch.int64"),
        (lambda s: s | {"basis": [1.0]}, "basis must be a floating-point tensor, got list"),
        (lambda s: s | {"basis": s["basis"].T}, r"size mismatch for (0\.)?basis: saved with shape \(5, 17\), ours"),
        (lambda s: s | {"basis": torch.eye(D + 1)}, r"size mismatch for (0\.)?basis: saved with shape \(18, 18\)"),
        (lambda s: s | {FORM: torch.tensor(2)}, r"_extra_state must be one boolean, .*got tensor\(2\)"),
        (lambda s: s | {FORM: None}, "basis and (0.)?_extra_state, its form, are loaded together"),
        (lambda s: {"basis": s["basis"]}, "basis and (0.)?_extra_state, its form, are loaded together"),
        (lambda s: {FORM: s[FORM]}, "basis and (0.)?_extra_state, its form, are loaded together"),
    ],
)
def test_a_state_that_is_no_projector_is_refused_and_changes_nothing(change, message, strict, nested):
    target = NullSpaceProjector(orthonormal(D, K + 3), complement=False)
    before = target.basis.clone()
    state = change(dict(NullSpaceProjector(orthonormal(D, K)).state_dict()))
    module = nn.Sequential(target) if nested else target
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict({f"0.{k}": v for k, v in state.items()} if nested else state, strict=strict)
    assert torch.equal(target.basis, before) and target.complement is False


def test_a_state_that_is_refused_elsewhere_leaves_no_uninitialised_basis():
    source, target = NullSpaceProjector(orthonormal(D, K)), NullSpaceProjector(orthonormal(D, K + 3))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        nn.Sequential(target).load_state_dict({f"0.{k}": v for k, v in source.state_dict().items()} | {"1.x": None})
    assert torch.equal(target.basis, source.basis)


@pytest.mark.parametrize("strict", [False, True])
def test_a_basis_that_is_not_saved_is_not_loaded(strict):
    """It is a plan's: neither a basis nor another form comes from a state dict."""
    target = NullSpaceProjector(orthonormal(D, K), persistent=False)
    before, state = target.basis.clone(), dict(NullSpaceProjector(orthonormal(D, K + 2)).state_dict())
    if strict:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            target.load_state_dict(state)
    else:
        target.load_state_dict(state, strict=False)
    assert torch.equal(target.basis, before) and target.complement
    with pytest.raises(RuntimeError, match="_extra_state: the state is of the other form"):
        target.load_state_dict({FORM: torch.tensor(False)}, strict=strict)
    assert target.complement


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_basis_of_any_dtype_round_trips(dtype):
    source, target = (NullSpaceProjector(orthonormal(D, k, dtype)) for k in (K, K + 2))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.basis, source.basis) and target.basis.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d, k", [(3, 0), (1, 1), (4, 4), (600, 300)])
def test_rounding_is_no_error_and_a_wrong_column_is(d, k, dtype):
    basis = orthonormal(d, k, dtype)
    for _ in range(20):
        assert is_orthonormal(basis)
        for wrong in (2 * basis, basis.roll(1, 1) + basis) if k > 1 else ():
            assert not is_orthonormal(wrong)
    if k > 1:
        repeated = basis.clone()
        repeated[:, 0] = repeated[:, 1]
        assert not is_orthonormal(repeated)


@pytest.mark.filterwarnings("ignore:for basis.*no-op")
@pytest.mark.parametrize("assign", [False, True])
def test_states_are_loaded_onto_meta_and_by_assignment(assign):
    source, target = NullSpaceProjector(orthonormal(D, K)), NullSpaceProjector(orthonormal(D, K + 2)).to("meta")
    target.load_state_dict(source.state_dict(), assign=assign)
    assert target.basis.shape == (D, K) and target.basis.is_meta != assign


def test_the_basis_is_a_buffer_without_grad_that_need_not_be_saved():
    projector = NullSpaceProjector(orthonormal(D, K).requires_grad_(), persistent=False)
    assert not list(projector.parameters()) and not projector.basis.requires_grad
    assert "basis" not in projector.state_dict()


def test_repr_names_what_matters():
    assert f"features={D}, protected={K}" in repr(NullSpaceProjector(orthonormal(D, K)))
    assert f"features={D}, protected={D - K}" in repr(NullSpaceProjector(orthonormal(D, K), complement=False))


@pytest.mark.parametrize(
    "basis, exception, message",
    [
        (torch.ones(D), ValueError, rf"basis must be \(d, k\), got shape \({D},\)"),
        (torch.ones(3, 4), ValueError, r"basis must be \(d, k\) with d = 3 .*k <= d, got shape \(3, 4\)"),
        (
            torch.ones(3, 2),
            ValueError,
            r"basis \(3, 2\) must be finite with orthonormal columns, .* = [15]\.0e\+00; take",
        ),
        (torch.full((3, 2), torch.nan), ValueError, r"must be finite with orthonormal columns, .* = nan"),
        (torch.ones(3, 2).long(), TypeError, r"basis must be float64.*got torch.int64 of shape \(3, 2\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(basis, exception, message):
    with pytest.raises(exception, match=message):
        NullSpaceProjector(basis)
