"""The theory of scale-invariant losses at unit level, on normalized networks with 60 weights.

Tolerances are those of float64: a handful of roundings where two sides are the same sum in another order, and the error
of a central difference (h² + 1e-16/h) where a derivative is taken by differences.
"""

import functools
import itertools
import math
from collections.abc import Callable

import cases
import pytest
import torch
from torch import Tensor

from sharpscope.autodiff.curvature import hessian
from sharpscope.autodiff.objective import Objective
from sharpscope.linalg.lanczos import lanczos
from sharpscope.optimizers.gd import GD
from sharpscope.symmetry.sphere import direction, effective_learning_rate, rmsprop_constants, tangent

NETS = [(norm, loss) for norm in cases.NORMS for loss in cases.LOSSES]
every_net = pytest.mark.parametrize(("norm", "loss"), NETS, ids=[f"{n}, {l}" for n, l in NETS])


@functools.cache
def problem(norm: str, loss: str) -> tuple[Objective, Tensor]:
    f = cases.invariant(norm, loss)
    return f, f.weights()


@functools.cache
def dense(norm: str, loss: str, c: float = 1.0) -> Tensor:
    """``∇²L(c w)``."""
    f, w = problem(norm, loss)
    return hessian(f, c * w).dense()


def error(a: Tensor, b: Tensor) -> float:
    """Relative to the size of b."""
    return ((a - b).norm() / b.norm()).item()


def unit(like: Tensor, seed: int = 1) -> Tensor:
    return direction(torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype))


def follow(f: Objective, w: Tensor, rule: Callable[[int], GD], steps: int) -> list[Tensor]:
    """The weights of `steps` steps of gradient descent, rule(t) at step t, from w on."""
    path = [w]
    for t in range(steps):
        w, _ = rule(t).step(w, f.grad(w), {})
        path.append(w)
    return path


def gentle(norm: str, loss: str) -> float:
    """A learning rate at a fifth of the edge of stability."""
    return 0.2 * 2 / torch.linalg.eigvalsh(dense(norm, loss)).abs().max().item()


@every_net
def test_loss_does_not_see_the_scale(norm: str, loss: str) -> None:
    """Multiplying all weights by c leaves the loss as it is, ``L(c w) = L(w)``."""
    f, w = problem(norm, loss)
    for c in cases.SCALES:
        value = f.value(w).item()
        assert abs(f.value(c * w).item() - value) <= 1e-13 * (1 + abs(value))


@every_net
def test_gradient_is_orthogonal_to_the_weights(norm: str, loss: str) -> None:
    """Moving along the weights changes nothing, for all of them and for each map alone."""
    f, w = problem(norm, loss)
    g = f.grad(w)
    for part in (slice(None), *f.slices.values()):
        assert abs((w[part] @ g[part]).item()) <= 1e-14 * (w[part].norm() * g[part].norm()).item()


@every_net
def test_gradient_is_of_degree_minus_one(norm: str, loss: str) -> None:
    """Weights c times as large have a gradient c times as small."""
    f, w = problem(norm, loss)
    for c in cases.SCALES:
        assert error(c * f.grad(c * w), f.grad(w)) <= 1e-13


@every_net
def test_hessian_is_of_degree_minus_two(norm: str, loss: str) -> None:
    """... and a Hessian c² times as small."""
    for c in cases.SCALES:
        assert error(c**2 * dense(norm, loss, c), dense(norm, loss)) <= 1e-12


@every_net
def test_hessian_times_weights_is_minus_the_gradient(norm: str, loss: str) -> None:
    """``∇²L w = -∇L``: Euler's identity differentiated once."""
    f, w = problem(norm, loss)
    assert error(dense(norm, loss) @ w, -f.grad(w)) <= 1e-12
    assert error(f.hvp(w, w), -f.grad(w)) <= 1e-12


@every_net
def test_curvature_falls_along_the_weights(norm: str, loss: str) -> None:
    """``∇³L[w, v, v] = -2 vᵀ∇²L v``, by a third derivative and by a difference of curvatures."""
    f, w = problem(norm, loss)
    v, h = unit(w), 1e-4
    curvature = (v @ f.hvp(w, v)).item()
    assert (f.third(w, v, v) @ w).item() == pytest.approx(-2 * curvature, rel=1e-8)
    # along c w the curvature is exactly c⁻²: the central difference is off by 4h² of it, here 4e-8
    slope = (v @ (f.hvp((1 + h) * w, v) - f.hvp((1 - h) * w, v))).item() / (2 * h)
    assert slope == pytest.approx(-2 * curvature, rel=1e-6)


@every_net
def test_squared_norm_times_sharpness_is_that_of_the_direction(norm: str, loss: str) -> None:
    """``‖w‖² λ1(∇²L(w))`` is ``λ1`` at unit norm, whatever the scale of the weights [N7]."""
    f, w = problem(norm, loss)
    at_unit_norm = cases.dense_top(hessian(f, direction(w)).dense())
    for c in (1.0, *cases.SCALES):
        scaled = (c**2 * w @ w).item() * cases.dense_top(dense(norm, loss, c))
        assert scaled == pytest.approx(at_unit_norm, rel=1e-10)


@every_net
def test_second_derivative_along_great_circles_is_the_hessian(norm: str, loss: str) -> None:
    """On the sphere no term is added to ``vᵀ∇²L(θ)v``, since the gradient has no radial part [N5] [N6]."""
    f, w = problem(norm, loss)
    theta = direction(w)
    v, h = direction(tangent(theta, unit(w))), 1e-5

    def slope(t: float) -> float:
        """dL/dt along cos t θ + sin t v."""
        return (f.grad(math.cos(t) * theta + math.sin(t) * v) @ (math.cos(t) * v - math.sin(t) * theta)).item()

    # h² ~ 1e-10 and rounding 1e-16/h ~ 1e-11, times the size of the fourth derivative and of the gradient
    assert (slope(h) - slope(-h)) / (2 * h) == pytest.approx((v @ f.hvp(theta, v)).item(), rel=1e-5)


@every_net
def test_leaving_out_the_radius_lowers_sharpness_little(norm: str, loss: str) -> None:
    """``0 ≤ λ1(H) - λ1(ΠHΠ) ≤ ‖∇L‖²/λ1(ΠHΠ)`` at unit norm: nothing at a minimum."""
    f, w = problem(norm, loss)
    for theta in (direction(w), unit(w, 2)):
        h, along = hessian(f, theta).dense(), torch.eye(f.size, dtype=theta.dtype) - torch.outer(theta, theta)
        whole, tangential = cases.dense_top(h), cases.dense_top(along @ h @ along)
        assert tangential > 0
        assert -1e-10 <= whole - tangential <= f.grad(theta).square().sum().item() / tangential + 1e-10


@every_net
def test_lanczos_finds_the_dense_eigenvalues(norm: str, loss: str) -> None:
    """The three largest eigenvalues from products alone [N4]."""
    f, w = problem(norm, loss)
    expected = torch.linalg.eigvalsh(dense(norm, loss)).flip(0)[:3]
    # the error of a Ritz value is the square of its residual over a gap
    found = lanczos(hessian(f, w), 3, rtol=1e-7).values
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-8)


def mismatch(f: Objective, w: Tensor, rule: GD, steps: int) -> float:
    """Largest distance between descent with weight decay and projected descent with the effective learning rate."""
    theta, largest = direction(w), 0.0
    for now in follow(f, w, lambda t: rule, steps):
        largest = max(largest, (direction(now) - theta).norm().item())
        rate = effective_learning_rate(rule.learning_rate, rule.weight_decay, now.norm().item())
        theta = direction(theta - rate * f.grad(theta))
    return largest


@every_net
def test_weight_decay_is_projected_descent(norm: str, loss: str) -> None:
    """Descent with weight decay turns the weights as projected descent with the effective rate does [N8] [N31]."""
    f, w = problem(norm, loss)
    lr = gentle(norm, loss)
    assert mismatch(f, w, GD(lr, 1e-3 / lr), 10) <= 1e-13


@pytest.mark.parametrize(("norm", "loss"), [("BN", "mse"), ("LN", "cross-entropy"), ("WN", "mse")])
def test_weight_decay_is_projected_descent_over_long_stable_runs(norm: str, loss: str) -> None:
    """The same over 300 steps that do not amplify rounding."""
    f, w = problem(norm, loss)
    lr = gentle(norm, loss) / 4
    assert mismatch(f, w, GD(lr, 1e-4 / lr), 300) <= 1e-12


@every_net
def test_norms_follow_their_recursion(norm: str, loss: str) -> None:
    """``‖w'‖² = (1-il)²‖w‖² + lr²‖∇L(w)‖²``, for all weights and for each map alone."""
    f, w = problem(norm, loss)
    rule = GD(3 * gentle(norm, loss), 1e-2 / gentle(norm, loss))
    for now, after in itertools.pairwise(follow(f, w, lambda t: rule, 10)):
        g = f.grad(now)
        for part in (slice(None), *f.slices.values()):
            kept = (1 - rule.intrinsic_rate) ** 2 * now[part].square().sum()
            expected = (kept + rule.learning_rate**2 * g[part].square().sum()).item()
            assert after[part].square().sum().item() == pytest.approx(expected, rel=1e-14)


@every_net
def test_effective_rate_obeys_an_rmsprop_recursion(norm: str, loss: str) -> None:
    """``v' = β v (1 + lr_eff²‖∇L(θ)‖²)²``, lr_eff = η/√v: scalar RMSprop and a term of higher order [N9] [N11]."""
    f, w = problem(norm, loss)
    rule = GD(2 * gentle(norm, loss), 1e-2 / gentle(norm, loss))
    eta, beta = rmsprop_constants(rule.learning_rate, rule.weight_decay)

    def rate(w: Tensor) -> float:
        return effective_learning_rate(rule.learning_rate, rule.weight_decay, w.norm().item())

    for now, after in itertools.pairwise(follow(f, w, lambda t: rule, 10)):
        v, squared = (eta / rate(now)) ** 2, f.grad(direction(now)).square().sum().item()
        assert (eta / rate(after)) ** 2 == pytest.approx(beta * v * (1 + rate(now) ** 2 * squared) ** 2, rel=1e-13)
        expanded = beta * v + (1 - beta) * squared + beta * eta**4 * squared**2 / v
        assert (eta / rate(after)) ** 2 == pytest.approx(expanded, rel=1e-13)


@every_net
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_doubled_weights_take_the_doubled_path(norm: str, loss: str, momentum: float) -> None:
    """``(w, lr, wd) → (2w, 4lr, wd/4)`` doubles every iterate to the last bit: doubling rounds nothing [N31]."""
    f, w = problem(norm, loss)
    lr, wd = 4 * gentle(norm, loss), 0.01 / gentle(norm, loss)

    def run(w: Tensor, rule: GD) -> Tensor:
        state = rule.init(w)
        for _ in range(20):
            w, state = rule.step(w, f.grad(w), state)
        return w

    once, twice = run(w, GD(lr, wd, momentum)), run(2 * w, GD(4 * lr, wd / 4, momentum))
    assert torch.equal(twice, 2 * once)


@every_net
def test_weight_decay_is_a_growing_learning_rate(norm: str, loss: str) -> None:
    """Without weight decay, but with the rate ``lr (1-il)^(-2t-1)``, the weights turn in the same way [N31]."""
    f, w = problem(norm, loss)
    lr = gentle(norm, loss) / 2
    il = 5e-3
    decayed = follow(f, w, lambda t: GD(lr, il / lr), 40)
    grown = follow(f, w, lambda t: GD(lr * (1 - il) ** (-2 * t - 1)), 40)
    assert max((direction(a) - direction(b)).norm().item() for a, b in zip(decayed, grown, strict=True)) <= 1e-12


@every_net
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_weight_decay_norms_never_fall(norm: str, loss: str, momentum: float) -> None:
    """Orthogonal steps only add to the norm, so the effective rate can only fall; heavy ball is no exception."""
    f, w = problem(norm, loss)
    rule = GD(6 * gentle(norm, loss), momentum=momentum)
    state, norms = rule.init(w), [w.norm().item()]
    for _ in range(30):
        w, state = rule.step(w, f.grad(w), state)
        norms.append(w.norm().item())
    rates = [effective_learning_rate(rule.learning_rate, 0.0, r) for r in norms]
    assert all(after >= (1 - 1e-15) * now for now, after in itertools.pairwise(norms))
    assert all(after <= (1 + 1e-15) * now for now, after in itertools.pairwise(rates))


@pytest.mark.parametrize(("norm", "loss"), [("BN", "mse"), ("LN", "cross-entropy")])
def test_forms_of_weight_decay_agree_for_plain_descent_only(norm: str, loss: str) -> None:
    """Decay inside the gradient or outside is the same for gradient descent, not with momentum, not for Adam."""
    f, w = problem(norm, loss)
    lr = 2 * gentle(norm, loss)
    wd = 0.02 / lr

    def run(make: Callable[[list[Tensor]], torch.optim.Optimizer], shrink: float = 0.0) -> Tensor:
        """20 steps of an optimizer; with `shrink`, the weights are decayed outside of it."""
        p = w.clone().requires_grad_()
        optimizer = make([p])
        for _ in range(20):
            p.grad = f.grad(p.detach())
            with torch.no_grad():
                p.mul_(1 - shrink)
            optimizer.step()
        return p.detach()

    def distance(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / w.norm()).item()

    coupled = run(lambda p: torch.optim.SGD(p, lr, weight_decay=wd))
    assert distance(coupled, run(lambda p: torch.optim.SGD(p, lr), shrink=lr * wd)) <= 1e-13  # the order of three terms
    heavy = run(lambda p: torch.optim.SGD(p, lr, momentum=0.5, weight_decay=wd))
    assert distance(heavy, run(lambda p: torch.optim.SGD(p, lr, momentum=0.5), shrink=lr * wd)) > 1e-2
    adam = run(lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1))
    assert distance(adam, run(lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1))) > 1e-2
