import pytest
import torch

from guardspace_kernels.ops import _cpu, _spectrum
from guardspace_kernels.ops._spectrum import Spectrum

own = pytest.mark.skipif(_cpu.extension is None, reason="the C++ extension is not built")
D = 130


def gram(X):
    return X.T @ X


def rows(n, d=D, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def power_law(d=D):
    return gram(rows(3 * d, d) * torch.arange(1, d + 1) ** -0.7 @ rows(d, d, 1))


def dead(d=D):
    X = rows(3 * d, d)
    X[:, ::2] = 0
    return gram(X)


def beside_one_another(d=D):
    """Wilkinson's matrix: pairs of eigenvalues that float64 can hardly tell apart."""
    off = torch.diag(torch.ones(d - 1), 1)
    return torch.diag((torch.arange(d) - d // 2).abs().float()) + off + off.T


MATRICES = {
    "power law": power_law(),
    "few tokens": gram(rows(30)),
    "dead features": dead(),
    "graded": gram(rows(400) * torch.logspace(3, -4, D)),
    "graded, large last": gram(rows(400) * torch.logspace(-4, 3, D)),
    "outlier": gram(rows(400) * torch.where(torch.arange(D) == 5, 1e4, 1.0)),
    "pairs": beside_one_another(),
    "identity": torch.eye(D),
    "diagonal": torch.diag(torch.arange(D).float()),
    "ones": torch.ones(D, D),
    "equal blocks": torch.block_diag(*[torch.ones(10, 10) + torch.eye(10)] * (D // 10)),
    "large": 1e18 * power_law(),
    "small": 1e-18 * dead(),
    "indefinite": rows(D) + rows(D).T,
}


def check(A, first, last):
    """Of A in float32: values and vectors are those of float64, to a few of float32's roundings of the largest."""
    spectrum, d = Spectrum(A), len(A)
    E, truth = spectrum.vectors(first, last), torch.linalg.eigvalsh(A.double())
    largest = float(truth.abs().max())
    assert spectrum.values.dtype == E.dtype == torch.float32 and E.shape == (d, last - first)
    assert float((spectrum.values.double() - truth).abs().max()) < 2e-6 * largest
    E = E.double()
    assert float((E.T @ E - torch.eye(last - first)).abs().max()) < 2e-6
    assert float((A.double() @ E - E * truth[first:last]).norm(dim=0).max()) < 4e-6 * largest
    return spectrum


@own
@pytest.mark.parametrize("first, last", [(0, D), (0, 60), (45, D), (20, 23)])
@pytest.mark.parametrize("name", MATRICES)
def test_values_and_the_vectors_that_are_asked_for(name, first, last):
    assert check(MATRICES[name], first, last)._E is None  # without LAPACK


@own
@pytest.mark.parametrize("d", [2, 3, 4, 5, 16, 31, 32, 33, 34, 64, 65, 257, 400])
def test_every_size(isa, d):
    for first, last in ((0, d), (d // 2, d), (0, 1)):
        assert check(power_law(d), first, last)._E is None


@own
def test_threads_change_rounding_alone_and_a_repetition_nothing():
    A, threads, found = power_law(400), torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            spectrum = check(A, 100, 300)
            found.append((spectrum.values, spectrum.vectors(100, 300)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(found[1], found[2], strict=True))


def test_one_entry_and_no_vector():
    spectrum = Spectrum(torch.tensor([[3.0]]))
    assert spectrum.values.tolist() == [3.0] and spectrum.vectors(0, 1).abs().tolist() == [[1.0]]
    assert Spectrum(power_law()).vectors(7, 7).shape == (D, 0)


def test_float64_and_a_build_without_kernels_ask_lapack(monkeypatch):
    A = power_law().double()
    spectrum, (values, E) = Spectrum(A), torch.linalg.eigh(A)
    assert torch.equal(spectrum.values, values) and torch.equal(spectrum.vectors(3, 50), E[:, 3:50])
    monkeypatch.setattr(_cpu, "extension", None)
    assert check(A.float(), 3, 50)._E is not None


@own
def test_what_fails_a_check_is_left_to_lapack(monkeypatch):
    A, vectors = power_law(), _spectrum._Tridiagonal.vectors

    def broken(form, first, last):
        E = vectors(form, first, last)
        return {"twice": torch.cat([E[:, :1], E[:, :-1]], dim=1), "others": torch.linalg.qr(rows(last - first).T).Q,
                "nothing": E * float("nan")}[how]  # fmt: skip

    for how in ("twice", "others", "nothing"):  # noqa: B007
        with monkeypatch.context() as patch:
            patch.setattr(_spectrum._Tridiagonal, "vectors", broken)
            assert check(A, 10, 70)._E is not None
    with monkeypatch.context() as patch:
        patch.setattr(_spectrum._Tridiagonal, "find_values", lambda form: False)
        assert check(A, 10, 70)._E is not None


@own
def test_nearly_orthonormal_vectors_are_made_so(monkeypatch):
    vectors = _spectrum._Tridiagonal.vectors
    monkeypatch.setattr(_spectrum._Tridiagonal, "vectors", lambda *args: (1 + 2e-4) * vectors(*args))
    assert check(power_law(), 10, 70)._E is None
