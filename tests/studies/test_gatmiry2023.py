"""Flat factorizations: the trace against the dense Hessian, its mean against draws, the law against random factors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sharpscope.autodiff.batched import BatchedRuns
from sharpscope.studies._shared.minimize import minimize
from sharpscope.studies._shared.oracles import least_nuclear_norm
from sharpscope.studies.gatmiry2023 import SHOWN, TOO_FEW, Config
from sharpscope.studies.gatmiry2023.factors import (
    MATRICES,
    MatrixSensing,
    balanced,
    distance,
    entrywise,
    flat_solutions,
    gaussian,
    least_trace,
    nuclear,
    plain_solution,
    solve,
    start,
    with_label_noise,
)

DEPTHS = (2, 3, 4)


def weights(p: MatrixSensing, rows: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, p.depth * p.truth.numel(), generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_trace_is_that_of_the_dense_hessian_at_any_weights(depth: int) -> None:
    p = gaussian(7, 4, depth, seed=0)
    W = weights(p, 2)
    f = BatchedRuns(p.losses)
    f.check(W)
    assert f.value(W).min() > 0.1  # nowhere near a fit
    torch.testing.assert_close(p.trace(W), p.dense_trace(W), rtol=1e-12, atol=0)


@pytest.mark.parametrize("depth", DEPTHS)
def test_losses_and_trace_are_their_sums(depth: int) -> None:
    p = gaussian(5, 4, depth, seed=1)
    W = weights(p, 1)
    layers = [w[0].numpy() for w in p.layers(W)]
    product = [np.eye(4)]
    for w in layers:
        product.append(w @ product[-1])
    a = p.a.view(-1, 4, 4).numpy()
    errors = [np.sum(m * (product[-1] - p.truth.numpy())) for m in a]
    assert p.losses(W).item() == pytest.approx(np.mean(np.square(errors)), rel=1e-12)
    total = 0.0
    for i in range(depth):
        above = np.linalg.multi_dot([*layers[:i:-1], np.eye(4), np.eye(4)])
        total += sum(np.sum((above.T @ m @ product[i].T) ** 2) for m in a)
    assert p.trace(W).item() == pytest.approx(2 / 5 * total, rel=1e-12)


def test_its_mean_over_measurements_is_the_mean_trace() -> None:
    p = gaussian(40000, 4, 3, seed=2)
    W = weights(p, 3)
    torch.testing.assert_close(p.trace(W), p.mean_trace(W), rtol=0.04, atol=0)  # four deviations: √(2/40000)·..
    isotropic = replace(p, a=4 * torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(isotropic.trace(W), p.mean_trace(W), rtol=1e-12, atol=0)


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_factorization_is_flatter_than_the_balanced_one(depth: int) -> None:
    p = gaussian(5, 4, depth, seed=3)
    W = weights(p, 200)
    ratios = p.mean_trace(W) / torch.tensor([least_trace(m.numpy(), depth) for m in p.matrix(W)])
    assert ratios.min() > 1.05
    m = np.random.default_rng(4).standard_normal((4, 4))
    w = balanced(m, depth)[None]
    np.testing.assert_allclose(p.matrix(w)[0].numpy(), m, rtol=0, atol=1e-13)
    assert p.mean_trace(w).item() == pytest.approx(least_trace(m, depth), rel=1e-13)


def test_the_flat_solution_is_the_convex_one_and_with_few_measurements_is_not() -> None:
    found = {}
    for n in (4, 15):
        p = gaussian(n, 4, 2, seed=5)
        w = start(p, 5)
        fitted, end = plain_solution(p, w), flat_solutions(p, w, (1e-2, 1e-3))[-1]
        assert fitted.loss < 1e-24 and end.gradient < 1e-6
        convex = least_nuclear_norm(p.a.numpy(), p.labels.numpy(), (4, 4))
        m, other = (p.matrix(v.weights[None])[0].numpy() for v in (end, fitted))
        assert nuclear(other) > 1.05 * nuclear(convex)
        found[n] = distance(m, convex)
    assert found[15] < 0.02 and found[4] > 0.05  # the penalty leaves an error in proportion to 1e-3


def test_enough_measurements_are_more_than_the_statistical_dimension() -> None:
    """The mean squared distance of a Gaussian matrix from the cone of subgradients of ‖·‖_* at a matrix of rank one.

    Beyond so many measurements the convex problem recovers the matrix in most draws (Amelunxen et al. 2014).
    """
    g = np.random.default_rng(8).standard_normal((1000, 10, 10))
    rest = np.linalg.svd(g[:, 1:, 1:], compute_uv=False)
    edges = np.square(g[:, 0, 1:]).sum(1) + np.square(g[:, 1:, 0]).sum(1)

    def distance_at(t: float) -> float:
        return float((edges + (g[:, 0, 0] - t) ** 2 + np.square((rest - t).clip(0)).sum(1)).mean())

    dimension = min(distance_at(t) for t in np.linspace(2, 5, 61))
    assert TOO_FEW < dimension < SHOWN and dimension == pytest.approx(36, abs=1)
    missed = {n: sum(_convex_error(n, seed) > 1e-2 for seed in range(3)) for n in (TOO_FEW, 60)}
    assert missed == {TOO_FEW: 3, 60: 0}


def _convex_error(n: int, seed: int) -> float:
    p = gaussian(n, 10, 2, seed)
    return distance(least_nuclear_norm(p.a.numpy(), p.labels.numpy(), (10, 10), iterations=1000), p.truth.numpy())


def test_what_is_solved_comes_in_rows_by_the_names_of_matrices() -> None:
    p, progress = gaussian(15, 4, 3, seed=7), list[float]()
    found = solve(p, start(p, 7), (1e-2, 1e-3), progress.append)
    rows = found.rows()
    assert [*rows] == ["start", *MATRICES] == ["start", *found.matrices] and progress == sorted(progress)
    assert max(rows[name]["trace_off"] for name in ("start", "plain", "flat")) < 1e-12
    assert rows["flat"]["nuclear"] == nuclear(found.matrices["flat"]) < rows["plain"]["nuclear"]
    assert rows["flat"]["trace"] == pytest.approx(p.trace(found.path[-1].weights[None]).item(), rel=1e-12)
    assert rows["least nuclear norm"]["nuclear_ratio"] == 1 < rows["least Frobenius norm"]["nuclear_ratio"]


def test_measured_entries_are_different_ones() -> None:
    p = entrywise(9, 4, 2, seed=0, draw=0)
    assert p.a.shape == (9, 16) and p.a.sum(0).max() == 1 and p.a.sum() == 9
    assert set(p.labels.tolist()) <= set(p.truth.flatten().tolist())
    assert not torch.equal(p.a, entrywise(9, 4, 2, seed=0, draw=1).a)
    assert nuclear(p.truth.numpy()) == pytest.approx(2)  # √d


def test_noise_on_the_labels_ends_in_time_and_exact_labels_leave_a_solution_alone() -> None:
    p = gaussian(8, 4, 2, seed=6)
    w = plain_solution(p, start(p, 6)).weights
    noise = torch.tensor([1.0, 0.0], dtype=torch.float64)
    slope = with_label_noise(p, noise, batch=4, rate=lambda step: 0.5, noisy_steps=10, seed=0)
    W = w.expand(2, -1).clone()
    _, loud = slope(W, 9)
    _, quiet = slope(W, 10)
    assert loud[0].norm() > 1e-2
    assert max(loud[1].norm().item(), quiet.norm().item()) < 1e-10
    mean = torch.stack([slope(weights(p, 2), 10)[1][1] for _ in range(1500)]).mean(0)
    full = BatchedRuns(p.losses).grad(weights(p, 2))[1]
    assert (mean - full / 2).norm() < 0.15 * full.norm()


def test_minimize_finds_the_minimum_of_a_stretched_bowl_and_of_the_banana() -> None:
    scales = torch.logspace(0, 6, 20, dtype=torch.float64)
    bowl = BatchedRuns(lambda W: 0.5 * ((W - 1).square() * scales).sum(1))
    found = minimize(bowl.slope, torch.zeros(20, dtype=torch.float64))
    torch.testing.assert_close(found.weights, torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-9)
    assert found.loss < 1e-15
    banana = BatchedRuns(lambda W: (1 - W[:, 0]).square() + 100 * (W[:, 1] - W[:, 0].square()).square())
    first = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    found = minimize(banana.slope, first, below=1e-25)
    assert found.loss <= 1e-25 and found.gradient < 1e-9 and first[0] == -1.2
    assert minimize(banana.slope, first, max_evaluations=5).loss > 1e-3


def test_nonsense_is_refused() -> None:
    cases: dict[str, Any] = {"repeats": 0, "penalties": (1e-2, -1.0), "sizes": (0,), "noise_steps": -1}
    for name, wrong in cases.items():
        with pytest.raises(ValueError, match=f"{name} is .*; it must be positive"):
            Config(**{name: wrong})
    with pytest.raises(ValueError, match="two layers at least"):
        Config(depths=(1, 2))
    with pytest.raises(ValueError, match="entries is 101; the matrix has 100"):
        Config(entries=101)
