import pytest
import torch
from guard_helpers import dense_projector, relative_error

from guardspace_kernels.guard import null_space as module
from guardspace_kernels.guard.null_space import EmptyNullSpaceError, null_space

D = 24
NO_SINKS = torch.empty(0, D)


def spectrum(eigenvalues, seed=0):
    """(C, E) with the given eigenvalues, ascending."""
    generator = torch.Generator().manual_seed(seed)
    E = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64)).Q
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    return E @ torch.diag(values) @ E.T, E


def power_law():
    return spectrum(torch.arange(D, 0, -1).double() ** -3.0)


def directions(n, seed=5):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projector_of(space):
    return dense_projector(space.basis, space.complement)


def check_structure(space, C):
    """What holds whatever the rule: orthonormal, the thinner basis, honest numbers."""
    P = projector_of(space)
    k = space.basis.shape[1]
    assert space.basis.dtype == torch.float64
    assert relative_error(space.basis.T @ space.basis, torch.eye(k)) < 1e-12 if k else True
    assert k == min(space.protected, D - space.protected)
    assert space.complement == (space.protected <= D - space.protected)
    assert float(P.trace()) == pytest.approx(D - space.protected, abs=1e-9)
    assert space.free_energy == pytest.approx(float((P @ C).trace() / C.trace()), abs=1e-12)
    return P


@pytest.mark.parametrize("protect", [0.3, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_energy_protects_the_fewest_directions_that_hold_it(protect):
    C, E = power_law()
    space = null_space(C, NO_SINKS, protect=protect)
    values = torch.arange(D, 0, -1).double() ** -3.0
    tail = [float(values[:free].sum() / values.sum()) for free in range(D + 1)]
    free = max(n for n in range(D + 1) if tail[n] <= 1 - protect)
    assert space.protected == D - free and space.sink_directions == 0
    assert space.free_energy == pytest.approx(tail[free], abs=1e-12)
    assert tail[free] <= 1 - protect < tail[free + 1]
    assert relative_error(check_structure(space, C), E[:, :free] @ E[:, :free].T) < 1e-10


@pytest.mark.parametrize("dims", [0, 1, D // 2 - 1, D // 2, D // 2 + 1, D - 1])
def test_rank_protects_that_many_in_either_basis(dims):
    C, E = power_law()
    space = null_space(C, NO_SINKS, rule="rank", protect_dims=dims)
    assert space.protected == dims
    Q = E[:, D - dims :]
    assert relative_error(check_structure(space, C), torch.eye(D) - Q @ Q.T) < 1e-10
    assert space.complement == (dims <= D // 2)


def test_protect_everything_leaves_the_exact_null_space():
    values = torch.cat([torch.zeros(10), torch.logspace(-3, 3, D - 10)])
    C, E = spectrum(values)
    space = null_space(C, NO_SINKS, protect=1.0)
    assert space.protected == D - 10
    assert relative_error(check_structure(space, C), E[:, :10] @ E[:, :10].T) < 1e-8
    assert float((projector_of(space) @ C).norm()) < 1e-9


@pytest.mark.parametrize("largest, threshold", [(1.0, 1e-6), (1e-4, 1e-8), (1e4, 1e-2)])
def test_the_papers_threshold(largest, threshold):
    values = torch.full((D,), largest)
    values[:9] = threshold * torch.tensor([0.0, 0.0, 0.1, 0.5, 0.9, 1.1, 2.0, 3.0, 4.0])
    C, E = spectrum(values)
    space = null_space(C, NO_SINKS, rule="paper")
    assert space.protected == D - 5
    assert relative_error(check_structure(space, C), E[:, :5] @ E[:, :5].T) < 1e-3  # a gap of 20% at the threshold


def test_one_outlier_defeats_the_papers_threshold_and_not_the_energy_of_the_rest():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, D, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, D)
    C = X.T @ X
    with pytest.raises(EmptyNullSpaceError, match="all 24 dimensions are protected"):
        null_space(C, NO_SINKS, rule="paper")  # plentiful tokens: nothing is null
    sink = 1e5 * torch.randn(1, D, generator=generator, dtype=torch.float64)
    space = null_space(C + 200 * sink.T @ sink, NO_SINKS, rule="paper")
    assert space.protected == 1  # the outlier alone: every other direction is called null
    P = projector_of(space)
    assert float((P @ C).trace() / C.trace()) > 0.9
    apart = null_space(C, sink, protect=0.99)
    P = projector_of(apart)
    assert float((P @ C).trace() / C.trace()) < 0.011 and apart.protected < D
    assert float((sink @ P).norm() / sink.norm()) < 1e-10


@pytest.mark.parametrize("dims", [2, 8, 12, 17])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_sinks_are_protected_exactly(dims, count, size):
    C, E = power_law()
    sinks = size * directions(count)
    space = null_space(C, sinks, rule="rank", protect_dims=dims)
    assert (space.protected, space.sink_directions) == (dims + count, count)
    P = check_structure(space, C)
    assert float((sinks @ P).norm() / sinks.norm()) < 1e-12
    Q = E[:, D - dims :]
    assert float((Q.T @ P).norm()) < 1e-10  # and nothing lost of the others
    span = torch.linalg.qr(torch.cat([Q, sinks.T / size], dim=1)).Q
    assert relative_error(P, torch.eye(D) - span @ span.T) < 1e-10


def test_sinks_that_add_nothing():
    C, E = power_law()
    inside = (E[:, -4:] @ torch.randn(4, 2, dtype=torch.float64)).T
    plain = null_space(C, NO_SINKS, rule="rank", protect_dims=4)
    space = null_space(C, inside, rule="rank", protect_dims=4)
    assert (space.protected, space.sink_directions) == (4, 0)
    assert relative_error(projector_of(space), projector_of(plain)) < 1e-12
    one = directions(1)
    repeated = torch.cat([one, 3 * one, -one, one * (1 + 1e-9), torch.zeros(1, D)])
    assert null_space(C, repeated, rule="rank", protect_dims=4).sink_directions == 1
    dependent = torch.cat([directions(2), directions(2).sum(dim=0, keepdim=True)])
    assert null_space(C, dependent, rule="rank", protect_dims=4).sink_directions == 2


def test_float32_covariance_is_solved_in_float64():
    C, E = power_law()
    space = null_space(C.float(), NO_SINKS.float(), rule="rank", protect_dims=6)
    assert space.basis.dtype == torch.float64
    assert relative_error(projector_of(space), torch.eye(D) - E[:, -6:] @ E[:, -6:].T) < 1e-4


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"rule": "rank", "protect_dims": D}, "leaves no null space: all 24 dimensions are protected"),
        ({"rule": "rank", "protect_dims": D + 5}, "leaves no null space"),
        ({"protect": 1.0}, "leaves no null space"),
        ({"sinks": directions(3), "rule": "rank", "protect_dims": D - 3}, "leaves 3 dimensions and 3 distinct first"),
        ({"sinks": directions(D + 4), "protect": 0.5}, "first-token directions take them all"),
    ],
)
def test_an_empty_null_space_raises(kwargs, match):
    kwargs = {"sinks": NO_SINKS, **kwargs}
    with pytest.raises(EmptyNullSpaceError, match=match):
        null_space(power_law()[0], **kwargs)


def test_unusable_covariances_and_rules():
    C = power_law()[0]
    for value in (float("nan"), float("inf")):
        broken = C.clone()
        broken[2, 3] = broken[3, 2] = value
        with pytest.raises(ValueError, match="non-finite"):
            null_space(broken, NO_SINKS)
    with pytest.raises(ValueError, match="no token was counted"):
        null_space(torch.zeros(D, D), NO_SINKS)
    with pytest.raises(ValueError, match=r"rule must be one of .*'energy'.*got 'best'"):
        null_space(C, NO_SINKS, rule="best")
    with pytest.raises(ValueError, match='rule="rank" needs protect_dims'):
        null_space(C, NO_SINKS, rule="rank")


def wide_covariance(d=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, d).double()
    X = X @ torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    return X.T @ X


@pytest.mark.parametrize("protect", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("sinks", [0, 2])
def test_wide_inputs_are_solved_in_float32_to_the_same_answer(protect, sinks, monkeypatch):
    C = wide_covariance()
    sinks = torch.randn(sinks, len(C), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = null_space(C, sinks, protect=protect)
    monkeypatch.setattr(module, "_WIDE", 10**9)
    exact = null_space(C, sinks, protect=protect)
    assert fast.basis.dtype == torch.float32 and exact.basis.dtype == torch.float64
    assert (fast.protected, fast.complement, fast.sink_directions) == (
        exact.protected, exact.complement, exact.sink_directions
    )  # fmt: skip
    assert abs(fast.free_energy - exact.free_energy) < 1e-5
    Q, true = fast.basis.double(), exact.basis
    assert (Q.T @ Q - torch.eye(Q.shape[1])).abs().max() < 2e-6
    assert (Q @ Q.T - true @ true.T).norm() < 1e-3  # eigenvalues beside the cut are close to each other


@pytest.mark.parametrize(
    "options",
    [{"protect": 1.0}, {"protect": 1 - 1e-7}, {"rule": "paper"}, {"rule": "rank", "protect_dims": 7}],
    ids=str,
)
def test_what_float32_cannot_resolve_is_solved_in_float64(options):
    C = wide_covariance()
    C[:, :50] = C[:50] = 0.0
    assert null_space(C, torch.empty(0, len(C)), **options).basis.dtype == torch.float64
