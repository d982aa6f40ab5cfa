"""Weight decay in other words: rules that turn normalized networks in the same way, to rounding.

Tolerances as in test_theory: 1e-13 over 10 steps at a fifth of the edge of stability, 1e-12 over longer stable runs.
"""

import functools
import math

import cases
import pytest
import torch
from torch import Tensor

from sharpscope.autodiff.curvature import hessian
from sharpscope.autodiff.objective import Objective
from sharpscope.optimizers.base import UpdateRule
from sharpscope.optimizers.equivalences import (
    ExponentialRate,
    ProjectedGD,
    as_decayed,
    as_exponential,
    as_projected,
    as_rmsprop,
    rescaled,
)
from sharpscope.optimizers.gd import GD
from sharpscope.optimizers.scalar import SphericalRMSprop
from sharpscope.symmetry.sphere import direction, effective_learning_rate

NETS = [(norm, loss) for norm in cases.NORMS for loss in cases.LOSSES]
every_net = pytest.mark.parametrize(("norm", "loss"), NETS, ids=[f"{n}, {l}" for n, l in NETS])


@functools.cache
def problem(norm: str, loss: str) -> tuple[Objective, Tensor, float]:
    """A network, its weights, and a learning rate at a fifth of the edge."""
    f = cases.invariant(norm, loss)
    w = f.weights()
    return f, w, 0.4 / torch.linalg.eigvalsh(hessian(f, w).dense()).abs().max().item()


def follow(f: Objective, rule: UpdateRule, w: Tensor, steps: int) -> list[Tensor]:
    state, path = rule.init(w), [w]
    for _ in range(steps):
        w, state = rule.step(w, f.grad(w), state)
        path.append(w)
    return path


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest distance of directions along two paths."""
    return max((direction(x) - direction(y)).norm().item() for x, y in zip(a, b, strict=True))


@every_net
def test_one_path_in_four_descriptions(norm: str, loss: str) -> None:
    """Claims 11, 13, 15: projected descent, the exact quasi-RMSprop and the growing rate, against weight decay."""
    f, w, lr = problem(norm, loss)
    rule = GD(lr, 1e-2 / lr)
    path = follow(f, rule, w, 10)
    radii = [x.norm().item() for x in path]
    for other, start in (as_projected(rule, w, radii), as_rmsprop(rule, w), as_exponential(rule, w)):
        assert distance(follow(f, other, start, 10), path) <= 1e-13, other
    assert (direction(path[-1]) - direction(w)).norm() > 1e-3  # they do not agree by standing still


@pytest.mark.parametrize(("norm", "loss"), [("BN", "mse"), ("LN", "cross-entropy"), ("WN", "mse")])
def test_one_path_over_long_stable_runs(norm: str, loss: str) -> None:
    """300 steps that do not amplify rounding, in which weights shrink by a fifth; the approximate member drifts off."""
    f, w, lr = problem(norm, loss)
    rule = GD(lr / 4, 8e-4 / (lr / 4))
    path = follow(f, rule, w, 300)
    for other, start in (
        as_projected(rule, w, [x.norm().item() for x in path]),
        as_rmsprop(rule, w),
        as_exponential(rule, w),
    ):
        assert distance(follow(f, other, start, 300), path) <= 1e-12, other
    mimic = SphericalRMSprop.like(rule, w.norm().item())
    assert distance(follow(f, mimic, direction(w), 300), path) > 1e-12


@pytest.mark.parametrize(("norm", "loss"), [("BN", "mse"), ("LN", "cross-entropy")])
def test_rates_and_norms_are_those_of_the_run(norm: str, loss: str) -> None:
    f, w, lr = problem(norm, loss)
    rule = GD(2 * lr, 1e-2 / lr)
    path = follow(f, rule, w, 10)
    radii = [x.norm().item() for x in path]
    rates = [effective_learning_rate(rule.learning_rate, rule.weight_decay, r) for r in radii]
    projected, average, growing = as_projected(rule, w, radii)[0], as_rmsprop(rule, w)[0], as_exponential(rule, w)[0]
    states = [r.init(w) for r in (projected, average, growing)]
    theta, z = direction(w), w
    for t in range(10):
        g = f.grad(theta)
        assert projected.effective_learning_rate(1.0, states[0]) == rates[t]
        assert average.effective_learning_rate(1.0, states[1]) == pytest.approx(rates[t], rel=1e-13)
        norm_z = z.norm().item()
        assert growing.effective_learning_rate(norm_z, states[2]) == pytest.approx(rates[t], rel=1e-13)
        assert norm_z == pytest.approx((1 - rule.intrinsic_rate) ** -t * radii[t], rel=1e-13)
        assert average.threshold(states[1]) == pytest.approx(projected.threshold(states[0]), rel=1e-13)
        assert growing.threshold(states[2]) * norm_z**2 == pytest.approx(projected.threshold(states[0]), rel=1e-13)
        z, states[2] = growing.step(z, f.grad(z), states[2])
        _, states[1] = average.step(theta, g, states[1])
        theta, states[0] = projected.step(theta, g, states[0])
    assert growing.intrinsic_time_per_step == rule.intrinsic_time_per_step
    assert average.intrinsic_time_per_step == pytest.approx(
        rule.intrinsic_time_per_step, rel=2 * rule.intrinsic_time_per_step
    )


def test_there_and_back() -> None:
    """``as_decayed`` undoes ``as_rmsprop`` at unit norm, and ``as_exponential`` anywhere."""
    rule, w = GD(0.3, 0.01), torch.tensor([0.6, -0.8], dtype=torch.float64)
    for scale, convert in ((1.0, as_rmsprop), (7.0, as_exponential)):
        other, start = convert(rule, scale * w)
        back, w0 = as_decayed(other, start)
        assert torch.allclose(w0, scale * w, rtol=1e-15)
        assert back.learning_rate == pytest.approx(rule.learning_rate, rel=1e-14)
        assert back.weight_decay == pytest.approx(rule.weight_decay, rel=1e-12)  # of a β near 1: 1e-16/(1-β)


@every_net
def test_every_exact_member_is_some_weight_decay(norm: str, loss: str) -> None:
    """Its base rate only sets the unit of v, and weights may start at any norm."""
    f, w, lr = problem(norm, loss)
    member = SphericalRMSprop(0.7, 0.97, lr / (w @ w).item(), exact=True)
    rule, start = as_decayed(member, w)
    assert distance(follow(f, member, w, 10), follow(f, rule, start, 10)) <= 1e-13


@every_net
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rescaled_runs_are_rescaled(norm: str, loss: str, momentum: float) -> None:
    f, w, lr = problem(norm, loss)
    rule = GD(lr, 0.01 / lr, momentum)
    path = follow(f, rule, w, 10)
    quarter = follow(f, *rescaled(rule, w, 0.25), 10)
    assert all(torch.equal(b, 0.25 * a) for a, b in zip(path, quarter, strict=True))  # powers of two round nothing
    third = follow(f, *rescaled(rule, w, 1 / 3), 10)
    assert max((3 * b - a).norm() / a.norm() for a, b in zip(path, third, strict=True)) <= 1e-12


def test_without_weight_decay_the_growing_rate_does_not_grow() -> None:
    rule, w = as_exponential(GD(0.5), torch.ones(2))
    assert rule == ExponentialRate(0.5, 0.0)
    _, state = rule.step(w, w, rule.init(w))
    assert rule.threshold(state) == 4.0


def test_growing_rate_tells_a_flow_of_its_growth() -> None:
    rule = ExponentialRate(0.1, 0.01)
    w = torch.ones(3, dtype=torch.float64)
    state = rule.init(w)
    for t in range(5):
        assert rule.preconditioner(rule.averages(state)).item() == pytest.approx(0.99 ** (2 * t + 1) / 0.1, rel=1e-14)
        rates = rule.relax(rule.averages(state), w)
        after, stepped = rule.step(w, w, state)
        assert torch.allclose(w - after, w / rule.preconditioner(state))
        assert stepped["step"] == state["step"] + rates["step"]
        w, state = after, stepped


def test_what_has_no_equivalent_is_refused() -> None:
    w = torch.ones(2)
    heavy = GD(0.1, 0.1, 0.9)
    for convert in (as_rmsprop, as_exponential, lambda rule, w: as_projected(rule, w, [1.0])):
        with pytest.raises(ValueError, match=r"momentum is 0\.9: only plain gradient descent"):
            convert(heavy, w)
    with pytest.raises(ValueError, match="without weight decay"):
        as_rmsprop(GD(0.1), w)
    with pytest.raises(ValueError, match="only up to a term of higher order"):
        as_decayed(SphericalRMSprop(0.1, 0.9, 0.1), w)
    with pytest.raises(ValueError, match="c = 0"):
        rescaled(GD(0.1), w, 0.0)


def test_schedules_are_followed_and_checked() -> None:
    w = torch.tensor([1.0, 0.0], dtype=torch.float64)
    g = torch.tensor([0.0, 1.0], dtype=torch.float64)
    rule = ProjectedGD(lambda t: (0.5, 0.0, math.nan)[t])
    once, state = rule.step(2 * w, g / 2, rule.init(w))
    assert once.tolist() == pytest.approx([1 / math.sqrt(1.25), -0.5 / math.sqrt(1.25)], rel=1e-15)
    assert rule.threshold(state) == math.inf
    _, state = rule.step(once, g, state)
    with pytest.raises(ValueError, match="says nan at step 2"):
        rule.step(w, g, state)
    recorded, start = as_projected(GD(0.1), w, [1.0])
    _, state = recorded.step(start, g, recorded.init(start))
    with pytest.raises(ValueError, match="no rate for step 1"):
        recorded.step(start, g, state)
    with pytest.raises(ValueError, match="none were given"):
        as_projected(GD(0.1), w, [])
    with pytest.raises(ValueError, match=r"intrinsic rate is 1\.0"):
        ExponentialRate(0.1, 1.0)
