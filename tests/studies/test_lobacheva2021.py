"""Jumps with batch normalization and weight decay: formulas against autograd, and small runs of every job."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import batch_norm
from whole_studies import made

from sharpscope.studies import lobacheva2021 as study
from sharpscope.studies._shared.nets import BatchNorm
from sharpscope.studies.lobacheva2021 import Config
from sharpscope.studies.lobacheva2021.network import EARLY, jumps
from sharpscope.studies.lobacheva2021.regression import (
    Stretched,
    border,
    curvature,
    exact_border,
    growth,
    minimum,
    rotation,
    windows,
)

K, IL, EPS = 0.8, 0.01, 0.07


def with_data(Q: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples ``X`` (4, 3) and targets (4,) with the moments of the regression: signs that are orthogonal."""
    signs = torch.tensor([[1.0, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]], dtype=torch.float64)
    return signs * torch.tensor([1.0, K, 0.0], dtype=torch.float64) @ torch.from_numpy(Q).T, signs[:, 0]


def regression_loss(w: torch.Tensor, Q: np.ndarray, eps: float) -> torch.Tensor:
    X, y = with_data(Q)
    return (batch_norm((X @ w)[:, None], None, None, training=True, eps=eps)[:, 0] - y).square().mean()


def test_loss_and_gradient_are_those_of_a_batch_normalization() -> None:
    Q = rotation(0)
    problem = Stretched(np.array([K]), np.array([IL]), np.array([EPS]), Q)
    w = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = regression_loss(w, Q, EPS)
    (g,) = torch.autograd.grad(loss, w)
    v = w.detach().numpy()[None]
    assert problem.loss(v).item() == pytest.approx(loss.item(), rel=1e-13)
    np.testing.assert_allclose(problem.gradient(v)[0], g.numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(problem.step(v)[0], (1 - IL) * v[0] - g.numpy(), rtol=1e-12)


def test_minimum_and_its_curvature() -> None:
    """The gradient of F vanishes there, and the Hessian by autograd has the curvature along the stretched feature."""
    Q, r = rotation(1), minimum(IL, EPS)
    w = r * torch.from_numpy(Q[:, 0].copy())

    def whole(w: torch.Tensor) -> torch.Tensor:
        return regression_loss(w, Q, EPS) + IL / 2 * w @ w

    g = torch.func.grad(whole)(w)
    assert g.norm().item() < 1e-12
    H, v = torch.func.hessian(whole)(w), torch.from_numpy(Q[:, 1].copy())
    assert (v @ H @ v).item() == pytest.approx(curvature(K, IL, EPS), rel=1e-9)
    assert torch.linalg.eigvalsh(H).max().item() >= (v @ H @ v).item() * (1 - 1e-12)


@pytest.mark.parametrize("k", [0.5, 1.0, 2.0])
def test_the_border_in_eps_tends_to_its_power_law(k: float) -> None:
    off = [exact_border(k, il) / border(k, il) - 1 for il in (1e-4, 1e-6)]
    assert curvature(k, 1e-4, exact_border(k, 1e-4)) == pytest.approx(2, rel=1e-10)
    assert off[1] == pytest.approx(off[0] / 10, rel=0.05)  # the next term goes as √il


@pytest.mark.parametrize(("k", "fraction"), [(0.8, 0.0), (0.8, 0.3), (1.5, 0.5)])
def test_small_bursts_grow_as_derived(k: float, fraction: float) -> None:
    il = 1e-4
    ones = np.ones(1)
    problem = Stretched(k * ones, il * ones, fraction * border(k, il) * ones, rotation(0))
    w = problem.starts(2.0, 0.0, 1.05 * np.sqrt(il / 2 * (1 - fraction**2)) * ones)
    rows, _ = windows(problem, w, 10000, 1000)
    measured = 2 * np.polyfit(0.1 * np.arange(10), np.log(rows["range"][:, 0]), 1)[0]
    assert measured == pytest.approx(growth(k, fraction), abs=0.1)  # windows hold no whole number of bursts


def test_the_null_component_only_decays() -> None:
    problem = Stretched(np.array([K]), np.array([IL]), np.array([0.0]), rotation(2))
    w = first = problem.starts(1.5, 1.0, np.array([1e-3]))
    _, w = windows(problem, w, 500, 500)
    assert problem.null(w).item() / problem.null(first).item() == pytest.approx((1 - IL) ** 500, rel=1e-10)


def test_normalization_with_eps_is_that_of_torch() -> None:
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = BatchNorm(3, eps=0.1)
    torch.testing.assert_close(layer(x), batch_norm(x, None, None, training=True, eps=0.1))
    torch.testing.assert_close(layer.eval()(x), batch_norm(x, layer.mean, layer.var, eps=0.1))


def test_jumps_are_counted_once() -> None:
    """A jump ends when the loss is small again, and those before the effective rate has risen do not count."""
    loss, rate = np.ones(40), np.full(40, EARLY)
    rate[:5] = EARLY / 2
    peak = loss.copy()
    peak[2], peak[[10, 12]], loss[10:13], peak[30] = 99, 99, 50, 99
    assert jumps(rate, loss, peak) == [10, 30]
    assert jumps(rate / 3, loss, peak) == []


def test_every_run_that_a_claim_or_chart_reads_is_made() -> None:
    history = made(study, "lobacheva2021", Config(tau=0.04, every=4, stair=8, train=90, toy_tau=1.5, seed=3))
    numbers = (v for column in history.columns.values() for v in column if isinstance(v, float))
    assert all(map(math.isfinite, numbers))
