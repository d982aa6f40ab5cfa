"""Averaged SGD on linear regression: the recursion against dense moments, the bound against sums, the estimators."""

from dataclasses import replace

import numpy as np
import pytest

from sharpscope.studies.zou2021 import FALLING, FLAT, Config
from sharpscope.studies.zou2021.linear_sgd import (
    SPECTRA,
    LinearRegression,
    effective_dimension,
    expected_risks,
    expected_tail_risk,
    half_bound,
    least_squares_and_ridge,
    next_moments,
    ridge_risks,
    sampled_risks,
)


def problem(spectrum: str, dimension: int) -> LinearRegression:
    return LinearRegression.of(spectrum, dimension, noise=0.5, step=0.25)


def dense(p: LinearRegression, n: int, second: np.ndarray) -> float:
    """``½ tr H E (w̄ - w*)(w̄ - w*)ᵀ`` with whole d×d moments and one term for every pair of steps."""
    h = np.diag(p.eigenvalues)
    mean = np.eye(len(h)) - p.step * h
    moments = [second]
    for _ in range(n - 1):
        m = moments[-1]
        noise = 2 * h @ m @ h + h * np.trace(h @ m) + p.noise**2 * h  # E xxᵀMxxᵀ for Gaussian x, and the label noise
        moments.append(m - p.step * (h @ m + m @ h) + p.step**2 * noise)
    total = np.zeros_like(h)
    for t, m in enumerate(moments):
        for s in range(n):
            total += np.linalg.matrix_power(mean, s - t) @ m if s >= t else np.zeros_like(h)
            total += m @ np.linalg.matrix_power(mean, s - t) if s > t else np.zeros_like(h)
    return float(np.trace(h @ total)) / (2 * n**2)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_recursion_is_that_of_the_whole_moments(spectrum: str) -> None:
    p = problem(spectrum, 6)
    assert p.risk(p.start) == pytest.approx(0.5)
    assert p.eigenvalues.sum() == pytest.approx(1)
    for n, found in zip((1, 2, 9), expected_risks(p, (1, 2, 9)), strict=True):
        assert found == pytest.approx(dense(p, n, np.outer(p.start, p.start)), rel=1e-12)


def test_it_is_the_sum_over_steps_of_the_closed_form() -> None:
    """``Σ λ Σ_t a(t)(1 + 2(q - q^{N-t})/γλ) / 2N²``, and bias and variance add up."""
    p, n = problem("1/i²", 40), 60
    g, a, total = p.step * p.eigenvalues, p.start**2, 0.0
    for t in range(n):
        total += float(p.eigenvalues @ (a * (1 + 2 * ((1 - g) - (1 - g) ** (n - t)) / g))) / (2 * n**2)
        a = a * (1 - 2 * g + 2 * g**2) + p.step * g * (p.eigenvalues @ a + p.noise**2)
    (whole,) = expected_risks(p, [n])
    assert whole == pytest.approx(total, rel=1e-9)
    (bias,), (variance,) = (expected_risks(q, [n]) for q in (replace(p, noise=0.0), replace(p, start=0 * p.start)))
    assert bias + variance == pytest.approx(whole, rel=1e-12)


def test_the_second_half_starts_from_the_moments_of_the_first() -> None:
    p, rng = problem("1/i^1.5", 6), np.random.default_rng(1)
    a = next_moments(p, next_moments(p, p.start**2))
    assert expected_tail_risk(p, 5) == pytest.approx(expected_risks(p, [3], a)[0])
    v = np.tile(p.start, (20000, 1))
    seen = []
    for _ in range(5):
        seen.append(v)
        x = rng.standard_normal(v.shape) * np.sqrt(p.eigenvalues)
        error = (x * v).sum(1) - p.noise * rng.standard_normal(len(v))
        v = v - p.step * error[:, None] * x
    risks = p.risk(np.mean(seen[2:], axis=0))
    assert abs(risks.mean() - expected_tail_risk(p, 5)) < 4 * risks.std() / len(risks) ** 0.5


def test_sgd_itself_has_that_mean() -> None:
    p = problem("1/i^1.5", 6)
    risks = sampled_risks(p, (5, 20), 4000, np.random.default_rng(0))
    for risk, exact in zip(risks, expected_risks(p, (5, 20)), strict=True):
        assert abs(risk.mean() - exact) < 4 * risk.std() / len(risk) ** 0.5


@pytest.mark.parametrize("spectrum", FALLING)
def test_the_bound_holds_and_falls_with_the_spectrum(spectrum: str) -> None:
    p = problem(spectrum, 300)
    exact = expected_risks(p, (10, 40, 160))
    assert all(e <= 2 * half_bound(p, n) for e, n in zip(exact, (10, 40, 160), strict=True))
    assert effective_dimension(p, 160) < 0.6 * effective_dimension(p, 10)


def test_on_a_flat_spectrum_the_effective_dimension_grows() -> None:
    p = problem(FLAT, 300)
    assert effective_dimension(p, 100) == pytest.approx(100 / 16 / 300)  # Nγ²/d: no eigenvalue reaches 1/γN
    assert effective_dimension(p, 200) == pytest.approx(2 * effective_dimension(p, 100))
    proportional = [effective_dimension(problem(FLAT, n // 4), n) for n in (40, 400)]
    assert proportional == pytest.approx([0.25, 0.25])


def test_the_bound_is_its_sums() -> None:
    p, n = problem("1/i²", 5), 8  # 1/γN is a half: one eigenvalue is above
    lam, delta = p.eigenvalues, p.start**2
    assert (lam >= 0.5).sum() == 1
    dimension = 1 / 8 + 8 / 16 * (lam[1:] ** 2).sum()
    bias = delta[0] / lam[0] / 4 + (lam[1:] * delta[1:]).sum()
    variance = (0.25 + 3 * (delta[0] + 2 * (lam[1:] * delta[1:]).sum())) / (1 - 0.75) * dimension
    assert half_bound(p, n) == pytest.approx(bias + variance)


def test_least_squares_is_the_pseudoinverse() -> None:
    p, n = problem("1/i^1.5", 30), 12
    found = ridge_risks(p, n, [0.0, 0.3], np.random.default_rng(3))
    rng = np.random.default_rng(3)
    x = rng.standard_normal((n, 30)) * np.sqrt(p.eigenvalues)
    y = x @ -p.start + p.noise * rng.standard_normal(n)
    ridge = np.linalg.solve(x.T @ x + 0.3 * np.eye(30), x.T @ y)
    for value, w in zip(found, (np.linalg.pinv(x) @ y, ridge), strict=True):
        assert value == pytest.approx(float(p.risk(w + p.start)), rel=1e-8)


def test_the_best_of_six_penalties_is_no_worse_than_any() -> None:
    p, rng = problem("1/i²", 30), np.random.default_rng(3)
    least, ridge = least_squares_and_ridge(p, 12, 1, np.random.default_rng(3))
    risks = ridge_risks(p, 12, [0.0, *(10.0**j * 12 for j in range(-5, 1))], rng)
    assert (least, ridge) == pytest.approx((risks[0], min(risks[1:])))


def test_nonsense_is_refused() -> None:
    for wrong in ({"repeats": 0}, {"sizes": (50, -1)}, {"noise": float("nan")}, {"replicas": 0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} is .*; it must be positive"):
            Config(**wrong)
    with pytest.raises(ValueError, match="below one"):
        Config(step=0.5)
    with pytest.raises(ValueError, match="spectra has 'round'"):
        Config(spectra=("round",))
