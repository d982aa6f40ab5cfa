"""Linear regression with batch normalization: the closed forms against autograd, and the exact laws of descent."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sharpscope.studies._shared.toys import columns_at, unit
from sharpscope.studies.lyu2022 import linear_regression as regression

P = regression.random_problem(0)
ALPHA = 0.7


def torch_loss(w: Tensor) -> Tensor:
    """The definition of the loss, for autograd."""
    f = torch.tensor(P.X) @ w
    return torch.mean((P.sigma_y * f / torch.sqrt(torch.mean(f**2)) - torch.tensor(P.y)) ** 2)


def test_gradient_and_hessian_are_those_of_autograd() -> None:
    for w in regression.random_starts(P, 1, 3) * 1.7:
        point = torch.tensor(w)
        gradient = torch.autograd.functional.jacobian(torch_loss, point).numpy()
        hessian = torch.autograd.functional.hessian(torch_loss, point).numpy()
        assert regression.loss(P, w) == pytest.approx(torch_loss(point).item(), rel=1e-13)
        assert np.linalg.norm(regression.gradient(P, w) - gradient) < 1e-13 * np.linalg.norm(gradient)
        assert np.linalg.norm(regression.hessian(P, w) - hessian) < 1e-12 * np.linalg.norm(hessian)


def test_gradient_is_the_slope_of_the_loss() -> None:
    w, h = regression.random_starts(P, 2, 1)[0], 1e-5
    steps = h * np.eye(len(w))
    slope = (regression.loss(P, w + steps) - regression.loss(P, w - steps)) / (2 * h)
    assert regression.gradient(P, w) == pytest.approx(slope, abs=1e-8)  # h² times a third derivative of order ten


def test_gradient_is_orthogonal_and_of_degree_minus_one() -> None:
    w = regression.random_starts(P, 3, 4)
    g = regression.gradient(P, w)
    assert np.all(np.abs(np.sum(w * g, axis=-1)) < 1e-14 * np.linalg.norm(g, axis=-1))
    assert 3.7 * regression.gradient(P, 3.7 * w) == pytest.approx(g, rel=1e-12)


def test_minimizers_have_the_closed_hessian_and_sharpness() -> None:
    theta = regression.minimizer(P, ALPHA)
    assert np.linalg.norm(theta) == pytest.approx(1, rel=1e-14)
    assert np.linalg.norm(regression.gradient(P, theta)) < 1e-13
    hessian = torch.autograd.functional.hessian(torch_loss, torch.tensor(theta)).numpy()
    closed = regression.hessian_on_minimizers(P, theta)
    assert np.max(np.abs(closed - hessian)) < 1e-10 * np.max(np.abs(hessian))
    sharpness = regression.sharpness_on_minimizers(P, ALPHA)
    assert np.linalg.eigvalsh(hessian)[-1] == pytest.approx(sharpness, rel=1e-10)
    assert regression.spherical_sharpness(P, 5 * theta) == pytest.approx(sharpness, rel=1e-10)
    assert regression.angle(P, 5 * theta) == pytest.approx(ALPHA, rel=1e-12)
    # the edge start is displaced along the top eigenvector of M: it must be that of the Hessian too
    v = np.linalg.eigh(P.M)[1][:, -1]
    assert closed @ v == pytest.approx(sharpness * v, abs=1e-10 * sharpness)


def test_slope_of_log_sharpness_along_the_minimizers() -> None:
    """``∇³L[v, v]/λ1`` on the null space of ∇²L is -2 along the radius and has length K = 2 tan α across it."""
    theta = torch.tensor(regression.minimizer(P, ALPHA))
    hessian = torch.autograd.functional.hessian(torch_loss, theta)
    values, vectors = torch.linalg.eigh(hessian)
    v = vectors[:, -1]

    def curvature(w: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(torch_loss(w), w, create_graph=True)
        (hv,) = torch.autograd.grad(g @ v, w, create_graph=True)
        return hv @ v

    w = theta.clone().requires_grad_()
    (third,) = torch.autograd.grad(curvature(w), w)
    flat = vectors[:, values.abs() < 1e-9]
    G = flat @ (flat.T @ third) / values[-1]
    assert (G @ theta).item() == pytest.approx(-2, rel=1e-10)
    K = (G - (G @ theta) * theta).norm().item()
    assert pytest.approx(regression.log_slope(ALPHA), rel=1e-10) == K


@pytest.mark.parametrize("il", [1e-2, 1e-3])
def test_null_component_only_decays(il: float) -> None:
    for start in (regression.random_starts(P, 4, 2), regression.edge_start(P, 1.2, 0.1, il)):
        steps = [round(tau / il) for tau in (0, 0.1, 1, 10)]
        norms = columns_at(regression.RegressionDescent(P, start, 0.1, il), steps)["null_norm"]
        for step, norm in zip(steps, norms, strict=True):
            # rounding puts some 1e-17 a step into null(X); what is left of the start by τ = 10 is 4e-5
            assert norm == pytest.approx((1 - il) ** step * norms[0], rel=1e-8)


def test_angle_falls_as_the_law_says() -> None:
    il = 1e-3
    c = columns_at(regression.RegressionDescent(P, regression.edge_start(P, 1.2, 0.1, il), 0.1, il), range(0, 3001, 25))
    assert np.max(np.abs(c["alpha"] - regression.angle_law(1.2, c["tau"]))) < 10 * il
    assert np.mean(c["eta_lambda"]) == pytest.approx(2, rel=0.02)  # midpoints keep an O(il) bias, some ten il here


def test_weight_decay_finds_the_interpolant_of_least_norm() -> None:
    run = regression.RegressionDescent(P, regression.random_starts(P, 5, 2), 0.1, 1e-3)
    c = run.measure(run.advance(run.start(), 12000))
    # il = 1e-3 leaves single modes a few times √il off, and their midpoints a few il
    assert np.all(c["cosine"] > 0.9998)
    assert c["spherical_sharpness"] == pytest.approx(P.flattest, rel=0.05)
    assert c["loss"] == pytest.approx(c["spherical_sharpness"] * 1e-3 / 4, rel=0.15)


def test_both_starts_end_at_one_point() -> None:
    run = regression.RegressionDescent(P, regression.random_starts(P, 5, 2), 0.1, 1e-3)
    state = run.advance(run.start(), 12000)
    one, other = unit(state["w"] + run.advance(state, 1)["w"])
    assert one @ other > 1 - 1e-6  # what is left of the starts is e^{-12}


def test_without_weight_decay_the_angle_freezes_above_the_minimum() -> None:
    c = columns_at(regression.RegressionDescent(P, regression.random_starts(P, 5, 1), 0.1, 0.0), [2000, 20000])
    assert np.ptp(c["alpha"]) < 1e-10
    assert np.all(c["spherical_sharpness"] > 1.5 * P.flattest)


def test_without_normalization_the_null_component_stays() -> None:
    run = regression.RegressionDescent(P, regression.random_starts(P, 5, 2), 0.1, 0.0, regression.linear_gradient)
    norms = columns_at(run, [0, 5000])["null_norm"]
    assert norms[1] == pytest.approx(norms[0], rel=1e-10)


def test_state_can_be_saved_anywhere(tmp_path: Path) -> None:
    run = regression.RegressionDescent(P, regression.random_starts(P, 5, 2), 0.1, 1e-3)
    for name, array in run.advance(run.start(), 300).items():
        np.save(tmp_path / f"{name}.npy", array)
    saved = {path.stem: np.load(path) for path in tmp_path.iterdir()}
    resumed = run.advance(saved, 200)
    straight = run.advance(run.start(), 500)
    assert all(np.array_equal(resumed[name], straight[name]) for name in straight)
