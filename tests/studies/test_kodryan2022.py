"""Training on the sphere: pairs of weights against their closed forms, and small runs of every job."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from whole_studies import made

from sharpscope.optimizers.gd import GD
from sharpscope.studies import kodryan2022 as study
from sharpscope.studies._shared.networks import Variant, problem_of
from sharpscope.studies._shared.windows import UNBOUNDED, FixedRate, Windows, descend
from sharpscope.studies.kodryan2022 import Config
from sharpscope.studies.kodryan2022.pairs import Pairs, levels, starts

RNG = np.random.default_rng(0)
A = np.array([0.7, 1.3, 3.0])


def test_the_gradient_of_pairs_is_that_of_their_loss() -> None:
    problem, w = Pairs(A, np.ones(2)), starts(RNG, 2, 3)
    W = torch.from_numpy(w).requires_grad_()
    x, y = W.chunk(2, dim=1)
    loss = (torch.from_numpy(A) / 2 * x**2 / (x**2 + y**2)).sum(1)
    (g,) = torch.autograd.grad(loss.sum(), W)
    np.testing.assert_allclose(problem.loss(w), loss.detach().numpy(), rtol=1e-14)
    np.testing.assert_allclose(problem.gradient(w), g.numpy(), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose((w * problem.gradient(w)).sum(1), 0, atol=1e-15)  # scale-invariant
    np.testing.assert_allclose(problem.fractions(w).sum(1), 1, rtol=1e-14)


def test_a_step_is_the_map_of_the_tangent() -> None:
    """``t' = t (1 - c + t²)/(1 + (1 + c) t²)`` for each pair, with its own c."""
    rate = 1.7
    problem, w = Pairs(A, np.array([rate])), starts(RNG, 1, 3)
    t, c = w[:, :3] / w[:, 3:], rate * A / problem.fractions(w)
    after = problem.step(w)
    expected = t * (1 - c + t**2) / (1 + (1 + c) * t**2)
    np.testing.assert_allclose(after[:, :3] / after[:, 3:], expected, rtol=1e-11)
    assert np.linalg.norm(after) == pytest.approx(1, rel=1e-14)


def test_the_orbit_of_period_two_and_its_multipliers() -> None:
    """One pair has ``t² = (c-2)/(c+2)`` and -1 + 8/c²; equal pairs have multipliers of modulus one."""
    c = 3.0
    t = math.sqrt((c - 2) / (c + 2))

    def step(t: float) -> float:
        return t * (1 - c + t * t) / (1 + (1 + c) * t * t)

    assert step(t) == pytest.approx(-t, rel=1e-14)
    assert (step(t + 1e-6) - step(t - 1e-6)) / 2e-6 == pytest.approx(1 - 8 / c**2, abs=1e-8)  # of -t': -1 + 8/c²
    matrix = np.array([[-1 + 8 / c**2, -8 / c], [2 * (1 - 4 / c**2) / c, -1 + 8 / c**2]])
    np.testing.assert_allclose(np.abs(np.linalg.eigvals(matrix)), 1, rtol=1e-14)
    assert levels(Pairs(np.ones(1), np.array([c])), starts(RNG, 1, 1), 2000)["level"] == pytest.approx(1 / 4 - 1 / 6)


def test_the_level_of_equal_pairs_in_equilibrium() -> None:
    """The multipliers say that it is neutral, so that it is the mean that is compared, to a per cent."""
    problem = Pairs(A, np.array([2.5, 3.0]) / A.sum())
    found = levels(problem, starts(RNG, 2, 3), 8000)
    np.testing.assert_allclose(found["level"], problem.predicted(), rtol=0.01)
    assert levels(Pairs(A, np.array([1.8]) / A.sum()), starts(RNG, 1, 3), 4000)["level"].item() < 1e-8
    free = Pairs(A, np.array([10.0]) / A.sum(), free=True)
    w = starts(RNG, 1, 3)
    assert np.linalg.norm(free.step(w)) > 1  # the gradient is a tangent


def test_a_fixed_rate_is_descent_with_a_norm_of_one() -> None:
    f = problem_of(Variant("mlp", "BN", "half squares", 0.1, 0.0, train=50)).objective
    w = f.weights() / f.weights().norm()
    g = f.grad(w)
    after, _ = FixedRate(0.01).step(w, g, {})
    plain, _ = GD(0.01, 0.0).step(w, g, {})
    torch.testing.assert_close(after, plain / plain.norm(), rtol=1e-14, atol=0)
    assert FixedRate(0.01).threshold({}) == 200


def test_windows_of_a_run() -> None:
    f = problem_of(Variant("plain", "none", "squares", 0.1, 0.0, train=50)).objective
    rows: list[dict[str, Any]] = []
    w = f.weights()
    end = descend(lambda **row: rows.append(row), lambda done: None, f, GD(0.1, 0.0), w, Windows(7, 3, curvature=1))
    losses = []
    for _ in range(7):
        losses.append(f.value(w).item())
        w = w - 0.1 * f.grad(w)
    torch.testing.assert_close(end, w, rtol=1e-12, atol=1e-14)
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[1]["loss"] == pytest.approx(sorted(losses[3:6])[1], rel=1e-12)
    assert (rows[1]["peak"], rows[1]["low"]) == (
        pytest.approx(max(losses[3:6]), rel=1e-12),
        pytest.approx(min(losses[3:6]), rel=1e-12),
    )
    assert rows[0]["spherical_sharpness"] > 0
    rows.clear()
    descend(lambda **row: rows.append(row), lambda done: None, f, GD(1e4, 0.0), f.weights(), Windows(50, 5))
    assert rows[-1]["peak"] == UNBOUNDED and rows[-1]["step"] < 50
    assert all(math.isfinite(v) for row in rows for v in row.values())


def test_every_run_that_a_claim_or_chart_reads_is_made() -> None:
    made(study, "kodryan2022", Config(steps=12, every=2, train=90, starts=2, toy_steps=40, seed=3))
