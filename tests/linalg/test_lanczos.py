"""Lanczos against dense decompositions: networks, and matrices of known and awkward spectra."""

import math
import re

import problems
import pytest
import torch
from problems import DTYPE, NORMS, symmetric
from torch import Tensor

from sharpscope import hessian
from sharpscope.errors import NotConverged
from sharpscope.linalg import Eigenpairs, SymmetricOperator, both_ends, lanczos

TIGHT = 1e-10


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=DTYPE)


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=DTYPE)


def line(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, n, dtype=DTYPE)


SPECTRA = {
    "even": line(-1, 10, 200),
    "outliers over a bulk": torch.cat([line(5, 10, 6), line(-0.1, 1, 250)]),
    "geometric": 10 * 0.8 ** torch.arange(120, dtype=DTYPE),
    "a tight cluster on top": torch.cat([2 + 1e-6 * line(0, 1, 3), line(0, 1, 100)]),
    "top pair equal": torch.cat([2 * ones(2), line(0, 1, 100)]),
    "top five equal": torch.cat([3 * ones(5), line(0, 1, 100)]),
    "a projection": torch.cat([ones(4), zeros(60)]),
    "rank one": torch.cat([ones(1), zeros(99)]),
    "mostly zeros": torch.cat([line(1, 2, 3), zeros(150), line(-2, -1, 3)]),
    "large negative end": torch.cat([line(0, 1, 100), torch.tensor([-1e3, -100.0], dtype=DTYPE)]),
    "all negative": line(-5, -1, 100),
    "identity": ones(30),
    "zero": zeros(20),
    "tiny numbers": 1e-30 * line(-1, 3, 60),
    "one by one": 2 * ones(1),
}


def dense_top(matrix: Tensor, k: int) -> Tensor:
    return torch.linalg.eigvalsh(matrix.double()).flip(0)[:k]


def assert_true(matrix: Tensor, found: Eigenpairs, *, eps: float = 1e-13, slack: float = 0.0) -> None:
    """Values, vectors and residuals are what they claim; `eps` is rounding times the number of rows."""
    scale = matrix.abs().sum(0).max().item()
    k = len(found.values)
    assert found.vectors.shape == (len(matrix), k) and found.residuals.shape == (k,)
    assert found.vectors.T @ found.vectors == pytest.approx(torch.eye(k), abs=100 * eps)
    image = matrix @ found.vectors
    assert (found.vectors * image).sum(0).tolist() == pytest.approx(found.values.tolist(), abs=eps * scale)
    true = (image - found.vectors * found.values).norm(dim=0)
    assert (true <= found.residuals + eps * scale).all()
    assert (found.residuals <= true + (slack + eps) * scale).all()
    assert (found.values.diff() <= 0).all()
    assert found.values[0] <= dense_top(matrix, 1)[0] + eps * scale


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name: str, k: int) -> None:
    values = SPECTRA[name]
    k = min(k, len(values))
    matrix, a = symmetric(values)
    # A cluster of width 1e-6 takes more products than the default allows: the gap ratio is 1e-6.
    found = lanczos(a, k, rtol=TIGHT, max_matvecs=3000)
    # Error of a value: the square of its residual over its gap, or the residual itself where there is no gap.
    assert found.values.tolist() == pytest.approx(dense_top(matrix, k).tolist(), abs=1e-8 * values.abs().max().item())
    assert_true(matrix, found)
    assert (found.residuals <= TIGHT * values.abs().max()).all()


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_hessians_of_networks(norm: str, k: int) -> None:
    f = problems.objective(norm, "cross-entropy")
    a = hessian(f)
    matrix = a.dense()
    found = lanczos(a, k, rtol=1e-6, max_matvecs=3000)
    assert found.values.tolist() == pytest.approx(dense_top(matrix, k).tolist(), rel=1e-8, abs=1e-8)
    assert_true(matrix, found)


def test_the_default_tolerance_squares_in_an_isolated_value() -> None:
    matrix, a = symmetric(SPECTRA["outliers over a bulk"])
    found = lanczos(a, 1)
    top = dense_top(matrix, 2)
    assert top[0] - found.values[0] <= (1e-4 * top[0]) ** 2 / (top[0] - top[1])


def test_products_are_counted() -> None:
    _, a = symmetric(SPECTRA["outliers over a bulk"])
    calls = []

    def counting(v: Tensor) -> Tensor:
        calls.append(v)
        return a.matvec(v)

    found = lanczos(SymmetricOperator(counting, a.like, cost=2.5), 2)
    assert found.num_matvecs == len(calls)
    assert found.num_gradients == 2.5 * len(calls)


def test_deterministic_and_free_of_the_global_generator() -> None:
    _, a = symmetric(SPECTRA["even"])
    state = torch.get_rng_state()
    first, second = lanczos(a, 2), lanczos(a, 2)
    assert first.values.equal(second.values) and first.vectors.equal(second.vectors)
    assert torch.get_rng_state().equal(state)
    other = lanczos(a, 2, seed=7, rtol=1e-6)
    assert other.values.tolist() == pytest.approx(lanczos(a, 2, rtol=1e-6).values.tolist(), rel=1e-8)


@pytest.mark.parametrize("basis", [8, 20])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["even", "outliers over a bulk", "top five equal", "large negative end"])
def test_restarts_with_a_small_basis(name: str, k: int, basis: int) -> None:
    matrix, a = symmetric(SPECTRA[name])
    found = lanczos(a, k, basis=basis, rtol=1e-7, max_matvecs=20000)
    if name == "even":
        assert found.num_matvecs > max(basis, 4 * k)  # it did restart
    # Residuals of 1e-7 over gaps of a twentieth, squared.
    assert found.values.tolist() == pytest.approx(
        dense_top(matrix, k).tolist(), abs=1e-8 * SPECTRA[name].abs().max().item()
    )
    assert_true(matrix, found)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["outliers over a bulk", "geometric", "mostly zeros", "large negative end"])
def test_single_precision(name: str, k: int) -> None:
    matrix, a = symmetric(SPECTRA[name].float())
    found = lanczos(a, k, rtol=1e-6)
    assert found.values.dtype == found.vectors.dtype == found.residuals.dtype == torch.float32
    scale = SPECTRA[name].abs().max().item()
    assert found.values.tolist() == pytest.approx(dense_top(matrix, k).tolist(), abs=1e-6 * scale)
    assert_true(matrix, found, eps=3e-6)  # 25 roundings of 1e-7


def test_a_tolerance_beyond_the_precision_is_met_at_the_precision() -> None:
    matrix, a = symmetric(SPECTRA["outliers over a bulk"].float())
    assert_true(matrix, lanczos(a, 2, rtol=0), eps=3e-6)


@pytest.mark.parametrize("k", [29, 30])
def test_all_pairs(k: int) -> None:
    matrix, a = symmetric(line(-1, 3, 30))
    found = lanczos(a, k, rtol=TIGHT)
    assert found.values.tolist() == pytest.approx(dense_top(matrix, k).tolist(), abs=1e-8)
    assert_true(matrix, found)


def test_not_converged_names_residuals_and_budget() -> None:
    _, a = symmetric(SPECTRA["even"])
    with pytest.raises(
        NotConverged, match=r"top-2 residuals \[[\d.]+, [\d.]+\] exceed rtol=1e-08 times .* after 8 products; raise"
    ):
        lanczos(a, 2, rtol=1e-8, max_matvecs=9)


@pytest.mark.parametrize("k", [0, -1, 31])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} eigenpairs asked of an operator of size 30; k lies between 1 and 30"):
        lanczos(symmetric(ones(30))[1], k)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_product_that_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="a product with the operator is not finite"):
        lanczos(SymmetricOperator(lambda v: bad * v, zeros(10)))


@pytest.mark.parametrize("name", ["even", "outliers over a bulk", "mostly zeros", "large negative end", "geometric"])
def test_both_ends_from_one_run(name: str) -> None:
    matrix, a = symmetric(SPECTRA[name])
    top, bottom = both_ends(a, 2, 3, rtol=1e-8)
    true = torch.linalg.eigvalsh(matrix)
    scale = SPECTRA[name].abs().max().item()
    assert top.values.tolist() == pytest.approx(true.flip(0)[:2].tolist(), abs=1e-8 * scale)
    assert bottom.tolist() == pytest.approx(true[:3].tolist(), abs=1e-8 * scale)
    two_runs = (
        lanczos(a, 2, rtol=1e-8, max_matvecs=2000).num_matvecs
        + lanczos(SymmetricOperator(lambda v: -(matrix @ v), a.like), 3, rtol=1e-8, max_matvecs=2000).num_matvecs
    )
    assert top.num_matvecs < two_runs


def test_an_operator_that_does_not_know_its_cost() -> None:
    assert math.isnan(lanczos(symmetric(line(0, 1, 20))[1]).num_gradients)


def test_noisy_products_show_in_the_floor() -> None:
    """A product with an error of size 1e-6, different each time, cannot be symmetric."""
    matrix, a = symmetric(SPECTRA["outliers over a bulk"])
    generator = torch.Generator().manual_seed(1)

    def noisy(v: Tensor) -> Tensor:
        return matrix @ v + 1e-6 * torch.randn(len(v), generator=generator, dtype=DTYPE)

    clean, rough = lanczos(a), lanczos(SymmetricOperator(noisy, a.like))
    assert clean.floor < 1e-13 * 10
    assert 1e-7 < rough.floor < 1e-4
    assert rough.lower[0] <= dense_top(matrix, 1)[0]


def test_eigenpairs_print_as_sentences() -> None:
    found = lanczos(symmetric(SPECTRA["outliers over a bulk"])[1], 2)
    first, second, last = str(found).splitlines()
    assert re.fullmatch(r"λ1 = 10, residual \d.\de-\d\d; at most 10[.\d]* with probability 99.9%", first)
    assert re.fullmatch(r"λ2 = 9, residual \d.\de-\d\d", second)
    assert last.startswith(f"{found.num_matvecs} products, rounding ")
    assert "vectors" not in repr(found)
