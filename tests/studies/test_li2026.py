"""Deep linear discriminants: closed forms against autograd, the conserved quantities, and what breaks them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sharpscope.studies._shared.diagonal import (
    balanced,
    drift,
    flow_of_layers,
    flow_of_product,
    growth_by_descent,
    layered,
    quasi,
    reduced,
    spread,
)
from sharpscope.studies._shared.ode import descent, flow
from sharpscope.studies.li2026 import Config
from sharpscope.studies.li2026.fisher import Classes

W = np.array([0.7, -0.4, 0.5, 0.3, -0.6])


@pytest.fixture
def classes() -> Classes:
    return Classes.draw((1.0, -0.8, 0.6, 0.5), 5, 40, np.random.default_rng(0))


def losses(c: Classes) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    x, y = torch.tensor(c.x), torch.tensor(c.y)
    means = [x[y < 0].mean(0), x[y > 0].mean(0)]
    rest = x - torch.where(y[:, None] > 0, means[1], means[0])

    def inner(w: torch.Tensor) -> torch.Tensor:
        return (rest @ w).square().mean()

    def between(w: torch.Tensor) -> torch.Tensor:
        return ((means[1] - means[0]) @ w).square()

    return {
        "fisher": lambda w: -between(w) / inner(w),
        "squares": lambda w: (x @ w - y).square().mean() / 2,
        "difference": lambda w: inner(w) - between(w),
    }


@pytest.mark.parametrize("name", ["fisher", "squares", "difference"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_field_is_minus_the_gradient_of_the_layers(classes: Classes, name: str, depth: int) -> None:
    u = torch.tensor(balanced(W, depth) * np.random.default_rng(1).uniform(0.5, 2, (depth, 5)), requires_grad=True)
    (g,) = torch.autograd.grad(losses(classes)[name](u.prod(0)), u)
    field = layered(getattr(classes, name), depth)
    assert field(u.detach().numpy().ravel()) == pytest.approx(-g.numpy().ravel(), rel=1e-10)


def test_only_the_ratio_is_of_degree_zero(classes: Classes) -> None:
    assert W @ classes.fisher(W) == pytest.approx(0, abs=1e-12)
    assert classes.ratio(3 * W) == pytest.approx(classes.ratio(W))
    assert -losses(classes)["fisher"](torch.tensor(W)).item() == pytest.approx(classes.ratio(W))
    assert min(abs(W @ classes.squares(W)), abs(W @ classes.difference(W))) > 1e-2


@pytest.mark.parametrize("depth", [2, 3])
def test_layers_and_multiplicative_steps_go_the_same_way(classes: Classes, depth: int) -> None:
    at = np.linspace(0, 3, 11)
    w = flow_of_layers(classes.fisher, balanced(W, depth), at).states.prod(1)
    assert flow_of_product(classes.fisher, W, depth, 3.0, at).states == pytest.approx(w, rel=1e-6)
    logs = flow(reduced(classes.fisher, depth, np.sign(W)), np.log(np.abs(W)), 3.0, at=at, rtol=1e-10)
    assert np.sign(W) * np.exp(logs.states) == pytest.approx(w, rel=1e-6)
    assert drift(quasi(w, 2 / depth)) < 1e-8
    assert drift(quasi(w, 2 / depth + 0.3)) > 1e-3


def test_unbalanced_layers_keep_their_norms_and_lose_the_quasi_norm(classes: Classes) -> None:
    skew = np.exp(np.random.default_rng(2).standard_normal(5))
    layers = balanced(W, 2) * np.array([skew, 1 / skew])
    assert layers.prod(0) == pytest.approx(W)
    states = flow_of_layers(classes.fisher, layers, np.linspace(0, 3, 11)).states
    assert drift(np.square(states).sum(2)) < 1e-8
    assert drift(quasi(states.prod(1), 1.0)) > 1e-2


def test_a_step_grows_the_norms_by_that_of_the_gradient(classes: Classes) -> None:
    field = layered(classes.fisher, 3)
    before, after = descent(field, balanced(W, 3).ravel(), 0.1, 1)
    push = np.square(field(before).reshape(3, 5)).sum(1)
    grown = np.square(after.reshape(3, 5)).sum(1) - np.square(before.reshape(3, 5)).sum(1)
    assert grown == pytest.approx(0.01 * push, rel=1e-10)
    growth, off = growth_by_descent(classes.fisher, balanced(W, 3), 0.1, 1)
    total = [quasi(y.reshape(3, 5).prod(0), 2 / 3) for y in (before, after)]
    assert growth == pytest.approx(float(total[1] / total[0] - 1))
    assert off < 1e-14
    assert growth_by_descent(classes.squares, balanced(W, 3), 0.1, 1)[1] > 1e-3


def test_one_layer_is_plain_gradient_flow(classes: Classes) -> None:
    end = flow(lambda w: -classes.fisher(w), W, 2.0, rtol=1e-10).end
    assert flow_of_product(classes.fisher, W, 1, 2.0).end == pytest.approx(end, rel=1e-8)


@pytest.mark.parametrize("depth", [1, 2])
def test_flows_stop_where_they_are_told_to(classes: Classes, depth: int) -> None:
    early = flow_of_product(classes.squares, W, depth, 50.0, residual=lambda w: float(w[0] - 0.8 * W[0]))
    assert early.settled
    assert early.end[0] == pytest.approx(0.8 * W[0])
    most = 2 * float(quasi(W, 2 / depth))
    found = flow_of_layers(classes.difference, balanced(W, depth), np.linspace(0, 5, 6), most)
    assert found.settled and found.times[-1] < 5
    assert quasi(found.states[-1].prod(0), 2 / depth) == pytest.approx(most)


def test_spread_counts_equal_weights() -> None:
    assert spread(np.array([3.0, 0, -3, 3])) == pytest.approx(3)


def test_two_layers_end_at_the_best_of_their_orthant(classes: Classes) -> None:
    free = np.asarray(np.linalg.solve(classes.within, classes.between), np.float64)
    assert classes.fisher(free) == pytest.approx(np.zeros(5), abs=1e-12)
    start = W * [1, 1, 1, -np.sign(W[3] * free[3]), 1]
    best = classes.best_ratio_within(start)
    end = flow_of_product(classes.fisher, start, 2, 200.0).end
    assert classes.ratio(end) == pytest.approx(best, rel=1e-6)
    assert classes.ratio(free) == pytest.approx(classes.best_ratio())
    assert classes.best_ratio() > 1.01 * best


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rates is \(0.1, 0\); it must be positive"):
        Config(rates=(0.1, 0))
    with pytest.raises(ValueError, match="repeats is -1; it must be positive"):
        Config(repeats=-1)
    with pytest.raises(ValueError, match="dimension is 3"):
        Config(dimension=3)
