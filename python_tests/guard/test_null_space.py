import pytest
import torch
from guard_helpers import dense_projector, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("scale", [1e-280, 1e-100, 1e-30, 1e30, 1e100, 1e300])
@pytest.mark.parametrize("options", [{"protect": 0.9}, {"rule": "rank", "protect_dims": 6}])
def test_a_covariance_in_float64_has_the_same_null_space_at_every_scale(options, scale, wide):
    C = wide_covariance() if wide else power_law()[0]
    sinks = torch.randn(2, len(C), dtype=torch.float64)
    plain, scaled = null_space(C, sinks, **options), null_space(scale * C, scale * sinks, **options)
    assert (scaled.protected, scaled.sink_directions) == (plain.protected, plain.sink_directions) and plain.protected
    assert relative_error(projector_of(scaled), projector_of(plain)) < 1e-4
    assert scaled.free_energy == pytest.approx(plain.free_energy, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25, 1e37])
def test_sinks_are_protected_at_every_scale_and_zero_ones_are_none(scale):
    C, sinks = wide_covariance().float(), torch.randn(2, 300)
    sinks = scale * sinks / sinks.abs().max()
    space = null_space(C, torch.cat([sinks, torch.zeros(1, 300)]))
    assert space.sink_directions == 2
    assert float(((sinks / scale).double() @ projector_of(space)).norm()) < 1e-4


def test_a_covariance_whose_small_entries_were_rounded_away_is_refused():
    C = power_law()[0]
    for dtype, scale in ((torch.float32, 1e-33), (torch.float64, 1e-300)):
        with pytest.raises(ValueError, match=rf"underflows {dtype}: its largest .* collect the statistics in float64"):
            null_space((scale * C).to(dtype), NO_SINKS)
        null_space((1e10 * scale * C).to(dtype), NO_SINKS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_non_finite_entry_is_found_wherever_it_is(value):
    for i in range(37 * 37):
        C = torch.zeros(37, 37)
        assert module.is_finite(C)
        C.view(-1)[i] = value
        assert not module.is_finite(C)
    assert module.is_finite(torch.full((37, 37), torch.finfo(torch.float64).max, dtype=torch.float64))
    assert module.is_finite(NO_SINKS)


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


WIDTH = 96


def few_tokens(T, d=WIDTH, decay=0.7, seed=0):
    """C of T tokens whose features decay as a power law, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(T, d, generator=generator, dtype=torch.float64) * torch.arange(1, d + 1).double() ** -decay
    X = X @ torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return X.T @ X


def sinks_of(count, d=WIDTH):
    return torch.randn(count, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.fixture
def solved(monkeypatch):
    """How many eigenvalues each solve brought."""
    widths, solve = [], module._solved

    def spy(*args):
        found = solve(*args)
        assert found.values.shape == (len(args[0]),)
        widths.append(found.solved)
        return found

    monkeypatch.setattr(module, "_solved", spy)
    return widths


def check_same(C, T, sinks, options, span=1e-6):
    """The answer in the range of C is that of the whole C, and what it says of itself is true."""
    thin, whole = null_space(C, sinks, tokens=T, **options), null_space(C, sinks, **options)
    assert (thin.protected, thin.complement, thin.sink_directions) == (
        whole.protected, whole.complement, whole.sink_directions
    )  # fmt: skip
    assert thin.basis.shape == whole.basis.shape and thin.basis.dtype == whole.basis.dtype == torch.float64
    Q, d = thin.basis, len(C)
    assert (Q.T @ Q - torch.eye(Q.shape[1])).abs().max() < 1e-12
    P, P_whole = projector_of(thin), projector_of(whole)
    assert thin.free_energy == pytest.approx(float((P @ C).trace() / C.trace()), abs=1e-12)
    assert thin.free_energy == pytest.approx(whole.free_energy, abs=1e-12)
    assert float(P.trace()) == pytest.approx(d - thin.protected, abs=1e-9)
    assert sinks.numel() == 0 or float((sinks @ P).norm() / sinks.norm()) < 1e-10
    assert float((P - P_whole).norm()) < span
    return thin


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("decay", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("T", [1, 2, 20, 38])
@pytest.mark.parametrize(
    "options",
    [{"protect": 0.5}, {"protect": 0.99}, {"protect": 0.9999}, {"rule": "rank", "protect_dims": 1}, {"rule": "paper"}],
    ids=str,
)
def test_few_tokens_are_solved_in_their_range(options, T, decay, sinks, solved):
    check_same(few_tokens(T, decay=decay), T, sinks_of(sinks), options)
    assert solved == [T + module._MORE, WIDTH]


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("dims", [21, 31, 46, 47, 48, 60, 92])
def test_more_dimensions_than_tokens_can_be_protected(dims, sinks, solved):
    """Beyond the range any directions do; the null basis is the thinner one from half of d on."""
    space = check_same(few_tokens(20), 20, sinks_of(sinks), {"rule": "rank", "protect_dims": dims}, span=float("inf"))
    assert space.protected == dims + sinks and space.complement == (dims + sinks <= WIDTH // 2)
    assert space.free_energy < 1e-12
    assert solved == [20 + module._MORE, WIDTH]


def test_sinks_can_make_the_null_basis_the_thinner_one(solved):
    """Then the directions of the range that the rule left free belong to it too."""
    space = check_same(few_tokens(38), 38, sinks_of(14), {"rule": "rank", "protect_dims": 37})
    assert not space.complement and space.protected == 51 and solved == [38 + module._MORE, WIDTH]


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 38),
    repeated=st.integers(0, 3),
    decay=st.floats(0.0, 2.0),
    protect=st.floats(0.3, 0.999),
    seed=st.integers(0, 10**6),
)
def test_any_spectrum_gives_the_same_answer_in_its_range(T, repeated, decay, protect, seed):
    """Tokens that repeat make the rank less than T."""
    C = few_tokens(max(1, T - repeated), decay=decay, seed=seed)
    thin, whole = (null_space(C, sinks_of(1), tokens=tokens, protect=protect) for tokens in (T, None))
    assert thin.protected == whole.protected
    assert thin.free_energy == pytest.approx(whole.free_energy, abs=1e-10)


@pytest.mark.parametrize(
    "C, T, options",
    [
        (few_tokens(38), 20, {"protect": 0.99}),  # more tokens than were said
        (few_tokens(20) + 1e-7 * torch.eye(WIDTH, dtype=torch.float64), 20, {"rule": "paper"}),
        (few_tokens(20) + 1e-9 * torch.eye(WIDTH)[:, :40] @ torch.eye(WIDTH)[:40], 20, {"protect": 1 - 1e-12}),
        (few_tokens(20).float(), 20, {"rule": "rank", "protect_dims": 30}),
        (few_tokens(40), 40, {"protect": 0.99}),  # too many to gain anything
    ],
    ids=["wrong count", "paper", "energy", "rank", "half"],
)
def test_a_covariance_with_more_than_its_range_is_solved_as_a_whole(C, T, options, solved):
    thin, whole = null_space(C, sinks_of(1), tokens=T, **options), null_space(C, sinks_of(1), **options)
    assert solved == [WIDTH, WIDTH]
    assert torch.equal(thin.basis, whole.basis) and thin.protected == whole.protected


@pytest.mark.parametrize("decay", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("protect", [0.9, 0.99])
@pytest.mark.parametrize("sinks", [0, 2])
def test_few_tokens_accumulated_in_float32(protect, decay, sinks, solved):
    """Rounding has given C full rank; what is protected is what float64 finds, up to close eigenvalues at the cut."""
    d, T = 512, 100
    exact = few_tokens(T, d, decay)
    # A square root of C: its tokens up to a rotation.
    values, E = torch.linalg.eigh(exact)
    X = (values[-T:].sqrt()[:, None] * E[:, -T:].T).float()
    C = sum((x.T @ x for x in X.split(7)), torch.zeros(d, d))
    space, truth = (
        null_space(C, sinks_of(sinks, d), tokens=T, protect=protect),
        null_space(exact.double(), sinks_of(sinks, d), protect=protect),
    )
    assert solved[0] == T + module._MORE and space.basis.dtype == torch.float32
    assert (space.protected, space.complement) == (truth.protected, truth.complement)
    Q = space.basis.double()
    assert (Q.T @ Q - torch.eye(Q.shape[1])).abs().max() < 2e-6
    left = 1 - float((Q.T @ exact @ Q).trace() / exact.trace())
    assert left == pytest.approx(truth.free_energy, abs=2e-6) and space.free_energy == pytest.approx(left, abs=2e-6)
