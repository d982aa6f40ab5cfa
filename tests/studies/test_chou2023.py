"""Weight-normalized sensing: both flows in other coordinates with autograd, what is conserved, and when it helps."""

import numpy as np
import pytest
import torch

from sharpscope.studies._shared.diagonal import Sensing, normalized_flow, plain_flow, shrinkage
from sharpscope.studies._shared.ode import Array, flow
from sharpscope.studies._shared.oracles import basis_pursuit
from sharpscope.studies.chou2023 import Config

PROBLEM = Sensing.draw(equations=7, unknowns=12, sparsity=1, rng=np.random.default_rng([106, 0]))
SCALE = float(PROBLEM.truth.sum())


def begin(radius: float) -> Array:
    """Uneven entries with ``‖u‖² = radius``."""
    u = np.exp(0.2 * np.random.default_rng(1).standard_normal(12))
    return np.asarray(u * np.sqrt(radius) / np.linalg.norm(u))


def gradient(u: Array, depth: int) -> Array:
    """``∇_u ½‖A u^L - y‖²`` by autograd."""
    w = torch.tensor(u, requires_grad=True)
    misfit = torch.tensor(PROBLEM.a) @ (w**depth - torch.tensor(PROBLEM.truth))
    (g,) = torch.autograd.grad(misfit.square().sum() / 2, w)
    return np.asarray(g.numpy())


@pytest.mark.parametrize("depth", [2, 3])
def test_the_plain_flow_is_that_of_u(depth: int) -> None:
    u = flow(lambda u: -gradient(u, depth), begin(0.5), 1.0).end
    assert plain_flow(PROBLEM, begin(0.5), depth, 1.0).x == pytest.approx(u**depth, rel=1e-6)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_normalized_flow_is_that_of_radius_and_direction(depth: int) -> None:
    rate, r0 = 0.3, np.sqrt(0.5)

    def field(y: Array) -> Array:
        r, v = y[0], y[1:]
        size = np.linalg.norm(v)
        unit = v / size
        g = gradient(r * unit, depth)
        return np.concatenate([[-rate * unit @ g], -r / size * (g - unit * (unit @ g))])

    end = flow(field, np.append(r0, begin(0.5) / r0), 1.0).end
    assert np.linalg.norm(end[1:]) == pytest.approx(1, abs=1e-8)
    found = normalized_flow(PROBLEM, begin(0.5), depth, rate, 1.0)
    assert found.radius == pytest.approx(end[0], rel=1e-6)
    assert found.x == pytest.approx((end[0] * end[1:]) ** depth, rel=1e-6)


@pytest.mark.parametrize(("depth", "radius"), [(2, 0.3), (2, 4.0), (3, 1.0), (3, 4.0)])
def test_it_ends_where_the_plain_flow_does_from_another_start(depth: int, radius: float) -> None:
    end = normalized_flow(PROBLEM, begin(radius * SCALE), depth, 0.5, 1e4)
    kappa = shrinkage(np.sqrt(radius * SCALE), end.radius, 0.5)
    other = plain_flow(PROBLEM, kappa * begin(radius * SCALE), depth, 1e4)
    assert end.settled and other.settled
    assert end.x == pytest.approx(other.x, abs=1e-6)
    assert end.x != pytest.approx(plain_flow(PROBLEM, begin(radius * SCALE), depth, 1e4).x, abs=1e-3)
    if depth == 2:
        assert end.moved < 1e-6
        assert end.radius**2 == pytest.approx(end.x.sum())


def test_the_start_shrinks_on_one_side_of_the_logarithmic_mean() -> None:
    for r0, r in ((0.2, 1.0), (2.0, 1.0)):
        mean = (r**2 - r0**2) / np.log(r**2 / r0**2)
        assert shrinkage(r0, r, mean) == pytest.approx(1)
        assert (shrinkage(r0, r, 0.9 * mean) < 1) == (r0 < r)
        assert (shrinkage(r0, r, 1.1 * mean) < 1) == (r0 > r)


def test_a_slow_radius_helps_from_a_moderate_start_and_a_fast_one_harms_from_a_small_one() -> None:
    def gain(radius: float, rate: float) -> float:
        start = begin(radius * SCALE)
        ends = normalized_flow(PROBLEM, start, 2, rate * SCALE, 1e4), plain_flow(PROBLEM, start, 2, 1e4)
        return PROBLEM.error(ends[0].x) / PROBLEM.error(ends[1].x)

    assert gain(0.2, 0.1) < 0.2
    assert gain(0.02, 1.0) > 1


def test_basis_pursuit_finds_what_was_measured() -> None:
    assert PROBLEM.error(basis_pursuit(PROBLEM.a, PROBLEM.a @ PROBLEM.truth)) < 1e-8
    assert np.count_nonzero(PROBLEM.truth) == 1
    assert np.linalg.norm(PROBLEM.misfit(PROBLEM.truth)) == 0
    assert PROBLEM.a @ PROBLEM.kernel == pytest.approx(np.zeros((7, 12)), abs=1e-12)
    assert np.trace(PROBLEM.kernel) == pytest.approx(12 - 7)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"radii is \(1.0, -1.0\); it must be positive"):
        Config(radii=(1.0, -1.0))
    with pytest.raises(ValueError, match="time is 0; it must be positive"):
        Config(time=0)
    with pytest.raises(ValueError, match="equations is 60; it must be at least sparsity and below unknowns"):
        Config(equations=60)
