import pytest
import torch
from guard_helpers import relative_error

from guardspace_kernels.guard import safety_subspace
from guardspace_kernels.guard.safety_subspace import DampedCovariance, starting_factors, trailing_subspace

SHAPES = [(20, 12), (12, 20), (16, 16)]  # tall, wide, square
SCALES = [0.5, 1.0, 2.0, 8.0]


def problem(d_out, d_in, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    X = torch.randn(3 * d_in, d_in, generator=generator, dtype=torch.float64) * torch.logspace(1, -1, d_in).double()
    return W, X.T @ X


def textbook(W, C, rank, damping):
    """(U_r, σ_r, B₀A₀ for s = 1): thin SVD and explicit inverse."""
    C_damped = C + damping * C.diagonal().mean() * torch.eye(C.shape[0], dtype=C.dtype)
    U, sigma, Vh = torch.linalg.svd(W @ C_damped, full_matrices=False)
    U, sigma, Vh = U[:, -rank:], sigma[-rank:], Vh[-rank:]
    return U, sigma, U @ torch.diag(sigma) @ Vh @ torch.linalg.inv(C_damped)


@pytest.mark.parametrize("init", ["balanced", "paper"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_factors_equal_the_textbook_formula(shape, scale, init, rank):
    W, C = problem(*shape)
    U, sigma = trailing_subspace(W, C, rank, damping=0.01)
    A0, B0, dead = starting_factors(W, U, sigma, scale, init)
    U_true, sigma_true, product = textbook(W, C, rank, 0.01)
    assert dead == 0
    assert relative_error(sigma, sigma_true) < 1e-10
    assert relative_error(U @ U.T, U_true @ U_true.T) < 1e-8
    assert relative_error(scale * B0 @ A0, product) < 1e-8
    assert relative_error(scale * B0 @ A0, U @ U.T @ W) < 1e-12
    assert relative_error(U.T @ U, torch.eye(rank)) < 1e-12
    assert B0.shape == (shape[0], rank) and A0.shape == (rank, shape[1])
    assert torch.all(A0.norm(dim=1) > 1e-3)  # alive: trailing columns of a full U of a tall W would give zeros


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_norms_of_the_two_inits(shape, scale):
    W, C = problem(*shape)
    U, sigma = trailing_subspace(W, C, 4)
    A0, B0, _ = starting_factors(W, U, sigma, scale, "balanced")
    torch.testing.assert_close(A0.norm(dim=1), B0.norm(dim=0), rtol=1e-12, atol=0)
    A0, B0, _ = starting_factors(W, U, sigma, scale, "paper")
    torch.testing.assert_close(B0.norm(dim=0), (sigma / scale).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_the_energy_is_the_smallest_possible(shape, damping):
    W, C = problem(*shape)
    M = W @ C + damping * C.diagonal().mean() * W
    U, sigma = trailing_subspace(W, C, 5, damping)
    values = torch.linalg.svdvals(M)
    torch.testing.assert_close(sigma, values[-5:], rtol=1e-8, atol=0)
    torch.testing.assert_close((U.T @ M).square().sum(), values[-5:].square().sum(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_lower_precision_are_taken_as_they_are(dtype):
    W, C = problem(16, 16)
    W, C = W.to(dtype), C.float()
    U, sigma = trailing_subspace(W, C, 4)
    A0, B0, _ = starting_factors(W, U, sigma, 2.0, "balanced")
    assert relative_error(2.0 * B0 @ A0, textbook(W.double(), C.double(), 4, 0.01)[2]) < 1e-8


def test_a_bfloat16_weight_has_no_dead_rows():
    # Its trailing rows are smaller than bfloat16's epsilon times the whole weight, and yet not rounding noise.
    torch.manual_seed(0)
    W = torch.randn(300, 300).bfloat16()
    U, sigma = trailing_subspace(W, torch.eye(300), 8)
    assert starting_factors(W, U, sigma, 2.0, "balanced")[2] == 0


@pytest.mark.parametrize("init", ["balanced", "paper"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alive", [0, 2])
def test_dead_rows_of_a_rank_deficient_weight(shape, init, alive):
    """rank W = min(shape) − 4 + alive, adapter rank 4: 4 − alive rows carry no weight."""
    W, C = problem(*shape)
    left, S, right = torch.linalg.svd(W, full_matrices=False)
    deficient = min(shape) - 4 + alive
    W = left[:, :deficient] @ torch.diag(S[:deficient]) @ right[:deficient]
    U, sigma = trailing_subspace(W, C, 4)
    A0, B0, dead = starting_factors(W, U, sigma, 2.0, init)
    assert dead == 4 - alive
    zero = A0.norm(dim=1) == 0
    assert int(zero.sum()) == dead
    assert torch.isfinite(B0).all() and torch.all(B0.norm(dim=0) > 1e-3)  # kept: such a row can still learn
    assert float((2.0 * B0 @ A0 - U @ U.T @ W).norm() / W.norm()) < 1e-10


def test_a_zero_weight_starts_at_zero_with_finite_factors():
    W = torch.zeros(6, 6, dtype=torch.float64)
    U, sigma = trailing_subspace(W, torch.eye(6), 2)
    A0, B0, dead = starting_factors(W, U, sigma, 2.0, "balanced")
    assert dead == 2 and A0.abs().max() == 0 and torch.isfinite(B0).all() and torch.all(B0.norm(dim=0) > 0)


@pytest.mark.parametrize("rank", [0, -1, 13])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"rank must be from 1 to min\(d_out, d_in\) = 12, got {rank}"):
        trailing_subspace(*problem(20, 12), rank)


def layer(d_out, d_in, kind, seed=0):
    """A float32 weight and covariance as of a real layer: activations of decaying energy in random directions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W = normal(d_out, d_in) / d_in**0.5
    X = normal(3 * d_in, d_in) * torch.logspace(0, -3, d_in).double() @ torch.linalg.qr(normal(d_in, d_in))[0]
    if kind == "outlier":
        X[:, 5] *= 50
    elif kind == "few tokens":
        X = X[: d_in // 4]
    elif kind == "heavy-tailed weight":
        W = W * torch.logspace(0, -4, d_in).double()
    elif kind == "rank-deficient":
        W = normal(d_out, min(d_out, d_in) // 2) @ normal(min(d_out, d_in) // 2, d_in) / d_in
    return W.float(), (X.T @ X).float()


KINDS = ["plain", "outlier", "few tokens", "heavy-tailed weight", "rank-deficient"]
WIDE = [(192, 192), (384, 160), (160, 384)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_the_krylov_space_holds_the_trailing_subspace(shape, rank, kind):
    """Energy at most 1% above that of a float64 SVD; for a singular W, above the SVD's rounding."""
    W, C = layer(*shape, kind)
    U, sigma = trailing_subspace(W, C, rank)
    M = W.double() @ DampedCovariance(C).matrix
    values = torch.linalg.svdvals(M)
    smallest, rounding = values[-rank:].square().sum(), (1e-14 * values[0]) ** 2 * rank
    assert (U.T @ M).square().sum() <= 1.01 * smallest + rounding
    assert (U.T @ U - torch.eye(rank)).abs().max() < 1e-12
    assert (sigma.square().sum() - (U.T @ M).square().sum()).abs() <= 1e-6 * smallest + rounding
    assert (sigma.diff() <= 0).all()
    if shape[0] > shape[1] and kind != "rank-deficient":  # within the range of W, as float32 finds it
        Q, _ = torch.linalg.qr(W.double())
        assert (U - Q @ (Q.T @ U)).norm() < 1e-5


def test_float32_is_kept_only_where_float64_confirms_it(monkeypatch):
    tried = []
    by_krylov = safety_subspace._by_krylov

    def spy(weight, C, rank, dtype):
        found = by_krylov(weight, C, rank, dtype)
        tried.append((dtype, found is not None))
        return found

    monkeypatch.setattr(safety_subspace, "_by_krylov", spy)
    for shape, kind, expected in (
        ((160, 384), "outlier", [(torch.float32, True)]),
        ((384, 160), "heavy-tailed weight", [(torch.float32, False), (torch.float64, True)]),
        ((192, 192), "plain", [(torch.float64, True)]),  # square: float64 at once
    ):
        tried.clear()
        trailing_subspace(*layer(*shape, kind), 8)
        assert tried == expected


def test_a_wrong_answer_is_not_kept(monkeypatch):
    """The check is of the answer itself: other columns of the same space do not pass."""
    W, C = layer(160, 384, "plain")
    smallest = safety_subspace._smallest

    def worse(inverse, rank, tolerance):
        V, energy = smallest(inverse, rank, tolerance)
        return torch.linalg.qr(V + 1e-2 * torch.randn_like(V)).Q, energy

    monkeypatch.setattr(safety_subspace, "_smallest", worse)
    assert safety_subspace._by_krylov(W, DampedCovariance(C), 8, torch.float32) is None
    values = torch.linalg.svdvals(W.double() @ DampedCovariance(C).matrix)
    torch.testing.assert_close(trailing_subspace(W, C, 8)[1], values[-8:], rtol=1e-8, atol=0)


def test_an_answer_that_another_application_changes_is_not_kept(monkeypatch):
    """Though its energy is the one that is promised."""
    W, C = layer(160, 384, "plain")
    C = DampedCovariance(C)

    def anything(inverse, rank, tolerance):
        V = torch.linalg.qr(torch.randn(inverse.size, rank, generator=torch.Generator().manual_seed(2))).Q
        return V, float((V.double().T @ W.double() @ C.matrix).square().sum())

    monkeypatch.setattr(safety_subspace, "_smallest", anything)
    assert safety_subspace._by_krylov(W, C, 8, torch.float32) is None


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_degenerate_wide_problems_end(value):
    W, C = layer(160, 384, "plain")
    if value == value:
        U, sigma = trailing_subspace(torch.zeros_like(W), C, 8)
        assert sigma.abs().max() == 0 and (U.T @ U - torch.eye(8)).abs().max() < 1e-12
    else:
        with pytest.raises(torch.linalg.LinAlgError):
            trailing_subspace(torch.full_like(W, value), C, 8)


def test_without_damping_a_singular_covariance_still_has_its_subspace():
    W, C = layer(192, 192, "few tokens")
    U, _ = trailing_subspace(W, C, 8, damping=0.0)
    M = W.double() @ C.double()
    assert (U.T @ M).norm() <= 1e-6 * M.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_that_fails_the_check_is_refined(dtype, monkeypatch):
    W = torch.randn(704, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    X = torch.randn(512, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -3, 256)
    C = X.T @ X
    coarse = trailing_subspace(W, C, 16)[1].square().sum()
    monkeypatch.setattr(safety_subspace, "_SAME_ENERGY", 5e-4)
    monkeypatch.setattr(safety_subspace, "_by_svd", lambda *_: pytest.fail("given up"))
    fine = trailing_subspace(W, C, 16)[1].square().sum()
    damped = safety_subspace.DampedCovariance(C).matrix
    best = torch.linalg.svdvals(W.double() @ damped)[-16:].square().sum()
    assert best * (1 - 1e-9) <= fine <= min(coarse, best * 1.0006)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("shape", WIDE)
def test_the_residuals_tell_what_is_left_to_gain(shape, tolerance):
    """And the answer is better than its Ritz values, which a Ritz vector's own energy never is."""
    W, C = layer(*shape, "plain")
    C = DampedCovariance(C)
    inverse = safety_subspace._Inverse(W, C, torch.float64)
    V, promised = safety_subspace._smallest(inverse, 8, tolerance)
    U = torch.linalg.qr(inverse.lift(V)).Q
    M = W.double() @ C.matrix
    best, found = torch.linalg.svdvals(M)[-8:].square().sum(), (U.T @ M).square().sum()
    assert (V.T @ V - torch.eye(8)).abs().max() < 1e-12
    assert best * (1 - 1e-9) <= found <= promised <= best * (1 + 4 * tolerance)
