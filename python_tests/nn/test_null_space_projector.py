"""NullSpaceProjector: the thin basis as a module."""

from __future__ import annotations

import pytest
import torch
from oracle import dense_projector, error, orthonormal
from torch import nn

from guardspace_kernels.nn import NullSpaceProjector

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
        (torch.ones(3, 2).long(), TypeError, r"basis must be float64.*got torch.int64 of shape \(3, 2\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(basis, exception, message):
    with pytest.raises(exception, match=message):
        NullSpaceProjector(basis)
