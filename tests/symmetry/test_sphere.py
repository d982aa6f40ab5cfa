"""The sphere that scale-invariant weights live on: identities of geometry, and step sizes seen on it."""

import math

import cases
import pytest
import torch
from torch import Tensor

from sharpscope.autodiff.curvature import hessian
from sharpscope.symmetry.sphere import (
    angle,
    direction,
    effective_learning_rate,
    on_sphere,
    riemannian_hessian,
    rmsprop_constants,
    tangent,
)


def vector(seed: int, size: int = 40) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_direction_has_unit_norm_and_forgets_the_scale() -> None:
    w = vector(1)
    assert direction(w).norm().item() == pytest.approx(1, abs=1e-15)
    assert torch.equal(direction(4 * w), direction(w))  # a power of two rounds nothing
    assert (direction(-w) + direction(w)).norm() == 0


def test_tangent_is_the_orthogonal_projection() -> None:
    w, v, z = 1e3 * vector(1), vector(2), vector(3)
    along = tangent(w, v)
    assert abs((along @ direction(w)).item()) < 1e-14
    assert (tangent(w, along) - along).norm() < 1e-14  # once is enough
    assert (along @ z).item() == pytest.approx((v @ tangent(w, z)).item(), rel=1e-13)  # symmetric
    assert tangent(w, w).norm() < 1e-12  # rounding of 40 numbers of size 1e3


@pytest.mark.parametrize("t", [0.3, 1e-3, 1e-6, 1e-9, 1e-12])
def test_angle_is_accurate_near_zero_and_near_pi(t: float) -> None:
    theta = direction(vector(1))
    v = direction(tangent(theta, vector(2)))
    turned = 3.7 * (math.cos(t) * theta + math.sin(t) * v)
    # unit vectors are known to 1e-16 absolutely; arccos of their product would be off by 1e-8
    assert angle(theta, turned).item() == pytest.approx(t, abs=5e-16, rel=1e-14)
    assert angle(theta, -turned).item() == pytest.approx(math.pi - t, rel=1e-15)
    assert angle(turned, theta).item() == angle(theta, turned).item()


def test_angle_of_special_pairs() -> None:
    w = vector(1)
    assert angle(w, w) == 0
    assert angle(w, 8 * w) == 0
    assert angle(w, -w).item() == pytest.approx(math.pi, rel=1e-15)
    assert angle(w, tangent(w, vector(2))).item() == pytest.approx(math.pi / 2, rel=1e-15)


def test_effective_learning_rate_keeps_its_symmetries() -> None:
    rate = effective_learning_rate(0.5, 0.02, 3.0)
    assert rate == pytest.approx(0.5 / (0.99 * 9), rel=1e-15)
    assert effective_learning_rate(0.5, 0.0, 1.0) == 0.5
    assert effective_learning_rate(4 * 0.5, 0.02 / 4, 2 * 3.0) == rate  # weights, rate and decay rescaled together


@pytest.mark.parametrize("il", [1e-2, 1e-4, 1e-6])
def test_rmsprop_constants_belong_to_the_decay(il: float) -> None:
    eta, beta = rmsprop_constants(0.1, il / 0.1)
    assert beta == pytest.approx((1 - il) ** 4, rel=1e-15)
    assert beta * (1 + 2 * eta**2) == pytest.approx(1, rel=1e-15)
    assert eta**2 == pytest.approx(2 * il, rel=3 * il)  # 2 il + 5 il² + ...


@pytest.mark.parametrize("norm", ["BN", "LN", "WN"])
def test_hessian_brought_to_the_sphere_is_that_at_unit_norm(norm: str) -> None:
    f = cases.invariant(norm)
    w = 3.7 * f.weights()
    at_unit_norm = hessian(f, direction(w)).dense()
    assert (on_sphere(hessian(f, w), w).dense() - at_unit_norm).norm() < 1e-12 * at_unit_norm.norm()


@pytest.mark.parametrize("loss", cases.LOSSES)
@pytest.mark.parametrize("norm", ["BN", "LN", "WN"])
def test_riemannian_hessian_is_the_second_difference_along_great_circles(norm: str, loss: str) -> None:
    f = cases.invariant(norm, loss)
    w = 3.7 * f.weights()
    theta, v = direction(w), direction(tangent(w, vector(5, f.size)))
    a = riemannian_hessian(hessian(f, w), w)

    def second(h: float) -> float:
        values = [f.value(math.cos(t) * theta + math.sin(t) * v).item() for t in (-h, 0.0, h)]
        return (values[0] - 2 * values[1] + values[2]) / h**2

    h = 2e-3
    extrapolated = (4 * second(h) - second(2 * h)) / 3
    # h⁴ ~ 2e-11 times a sixth derivative of up to 1e5, and rounding 4e-16/h² ~ 1e-10
    assert extrapolated == pytest.approx((v @ (a @ v)).item(), rel=1e-5, abs=1e-5)


def test_riemannian_hessian_ignores_the_radius() -> None:
    f = cases.invariant()
    w = f.weights()
    a, v = riemannian_hessian(hessian(f, w), w), vector(5, f.size)
    assert (a @ w).norm() < 1e-12 * w.norm() * cases.dense_top(a.dense())
    assert abs((w @ (a @ v)).item()) < 1e-11
    assert (riemannian_hessian(hessian(f, 8 * w), 8 * w) @ v - a @ v).norm() < 1e-11 * (a @ v).norm()
