"""The sharpness-reduction flow against closed forms, and against the optimizer on losses with known minimizers."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_models import coupled_modes, objective, on_curve, one_mode, plane, two_modes, vector

import sharpscope as ss
from sharpscope.autodiff import third_order
from sharpscope.autodiff.objective import Objective
from sharpscope.errors import NoMinimizer
from sharpscope.flows.sharpness_reduction import follow
from sharpscope.optimizers.gd import GD
from sharpscope.optimizers.scalar import ScalarRMSprop, SphericalRMSprop
from sharpscope.studies._shared import toys
from sharpscope.studies.lyu2022 import linear_regression
from sharpscope.symmetry.sphere import direction

LR = 0.1


def edge_start(f: Objective, flow: ss.flows.ReductionFlow, il: float, others: float = 0.0) -> Tensor:
    """Weights at the fixed point of the edge: ``θ = Π(ζ + h v1)``, ``h = η/√(4+K²)``, ``‖w‖² = lr λ1/(2 (1-il))``."""
    zeta = flow.minimizer(f.weights())
    top = ss.linalg.lanczos(ss.hessian(f, zeta), 2)
    h = math.sqrt(2 * il / (4 + flow.at(zeta).K ** 2))
    theta = direction(zeta + h * top.vectors[:, 0] + others * top.vectors[:, 1])
    return theta * math.sqrt(LR * top.values[0].item() / (2 * (1 - il)))


def descend(
    f: Objective, w: Tensor, il: float, steps: int, every: int, place: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient descent with weight decay; n = x/‖x‖ and q/‖w‖ every so many steps, all q kept above 1e-7."""
    places, modes = [], []
    for step in range(steps + 1):
        if step % every == 0:
            places.append(direction(w[:place]))
        modes.append(w[place:] / w.norm())
        w = (1 - il) * w - LR * f.grad(w)
        q = w[place:]
        w[place:] = torch.where(q.abs() < 1e-7, torch.copysign(torch.full_like(q, 1e-7), q), q)
    return places, modes


@pytest.mark.parametrize("name", toys.NAMED)
def test_flow_on_a_curve_is_the_closed_form(name: str) -> None:
    """K and λ1 to rounding; the path to the error of 40 Runge-Kutta steps."""
    toy = toys.named(name)
    toy = replace(toy, **{k: float(v[0]) for k, v in vars(toy).items()})
    f = on_curve(toy)
    flow = ss.flows.sharpness_reduction(f, GD(LR, 1e-3))
    here = flow.at(flow.minimizer(f.weights()))
    assert pytest.approx(abs(float(toys.log_slope(toy, 1.0))), rel=1e-10) == here.K
    assert here.eigenvalues[0].item() == pytest.approx(float(toys.top_eigenvalue(toy, 1.0)), rel=1e-10)
    assert here.moments.item() == pytest.approx(1 / (4 + here.K**2), rel=1e-8)
    times, points = follow(flow, f.weights(), 1e4, pieces=40)  # τ = 1
    phi = torch.atan2(points[:, 1], points[:, 0]).numpy()
    assert np.abs(phi - toys.flow(toy, 1.0, (1e-4 * times).tolist())).max() < 1e-6


@pytest.mark.parametrize("C", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("K", [2.0, 6.0])
def test_other_members_of_the_family(C: float, K: float) -> None:
    """Speed per η²: ``C K/(4 C + 2 K²)``."""
    f = on_curve(toys.Toy(K))
    rule = SphericalRMSprop(1e-2, 1 - C * 1e-4, 0.1)
    flow = ss.flows.sharpness_reduction(f, rule)
    speed = flow.at(flow.minimizer(f.weights())).velocity.norm().item() / 1e-4
    assert speed == pytest.approx(C * K / (4 * C + 2 * K**2), rel=1e-8)


def test_two_dimensional_manifold() -> None:
    """Trajectory error at most il; log λ1 falls."""
    il, steps, every = 3e-4, 10_000, 500
    f = one_mode()
    flow = ss.flows.sharpness_reduction(f, GD(LR, il / LR))
    places, _ = descend(f, edge_start(f, flow, il), il, steps, every, 3)
    _, path = follow(flow, f.weights(), steps, pieces=steps // every)
    error = max((n - direction(p[:3])).norm().item() for n, p in zip(places, path, strict=True))
    assert error <= il
    assert (path[-1] - path[0]).norm() > 0.5
    sharpness = [ss.linalg.lanczos(ss.hessian(f, p), 1).values[0].item() for p in path]
    assert all(b < a for a, b in pairwise(sharpness))


def test_two_modes_that_cross() -> None:
    """Trajectory error at most 3η over τ = 3.5; after the crossing log λ1 and log λ2 stay within 5η."""
    il, steps, pieces = 1e-4, 35_000, 70
    eta, f = math.sqrt(2e-4), two_modes()
    flow = ss.flows.sharpness_reduction(f, GD(LR, il / LR), k=2)
    single = ss.flows.sharpness_reduction(f, GD(LR, il / LR))
    places, _ = descend(f, edge_start(f, single, il, others=1e-7), il, steps, steps // pieces, 3)
    _, path = follow(flow, f.weights(), steps, pieces=4 * pieces)
    error = max((n - direction(p[:3])).norm().item() for n, p in zip(places, path[::4], strict=True))
    assert error <= 3 * eta
    gaps = [float(np.diff(torch.linalg.eigvalsh(ss.hessian(f, p).dense()).log()[-2:])[0]) for p in path]
    met = next(i for i, gap in enumerate(gaps) if gap <= 5 * eta)
    assert 0 < met < 9 * len(path) // 10
    assert max(gaps[met:]) <= 5 * eta


def test_coupled_modes_and_their_moments() -> None:
    """Trajectory error at most 3η; the second moments of the oscillation in windows of .1 in τ within 15 %."""
    il, steps, pieces = 1e-4, 20_000, 40
    eta, f = math.sqrt(2e-4), coupled_modes()
    flow = ss.flows.sharpness_reduction(f, GD(LR, il / LR), k=2)
    zeta = flow.minimizer(f.weights())
    top = ss.linalg.lanczos(ss.hessian(f, zeta), 2)
    theta = direction(zeta + 0.4 * eta * top.vectors[:, 0] + 1e-6 * top.vectors[:, 1])
    w = theta * math.sqrt(LR * top.values[0].item() / (2 * (1 - il)))
    places, modes = descend(f, w, il, steps, steps // pieces, 4)
    _, path = follow(flow, f.weights(), steps, pieces=4 * pieces)
    error = max((n - direction(p[:4])).norm().item() for n, p in zip(places, path[::4], strict=True))
    assert error <= 3 * eta
    squares = torch.stack(modes).square().sum(1)
    for tau in (1.2, 1.5, 1.8):
        low, high = round((tau - 0.05) / il), round((tau + 0.05) / il)
        p = flow.at(path[round(tau / il / steps * 4 * pieces)], steps * il / (4 * pieces)).moments
        assert squares[low:high].mean().item() / (2 * il) == pytest.approx(p.trace().item(), rel=0.15)


@pytest.mark.parametrize("C", [0.5, 2.0])
def test_scalar_rmsprop_off_the_sphere(C: float) -> None:
    """End-point error at most 3η²: of the closed form over 4/η² steps, of the central flow from it over a tenth."""
    eta = 3e-2
    f, steps = plane(), round(4 / eta**2)

    def slope(x: float) -> tuple[float, float]:
        """Slope of log λ1 along the valley, and the length per x; ``λ1 = e^{2 sin x} (1 + q²)``, ``q = ½ cos x``."""
        q = 0.5 * math.cos(x)
        length = math.sqrt(1 + q**2)
        return (2 * math.cos(x) - q * math.sin(x) / (1 + q**2)) / length, length

    def speed(x: float) -> float:
        K, length = slope(x)
        return -(eta**2) * C * K / ((4 * C + 2 * K**2) * length)

    def closed_form(steps: int) -> float:
        x, h = 1.0, steps / 400
        for _ in range(400):
            x += h * speed(x + h / 2 * speed(x))
        return x

    K, _ = slope(1.0)
    q = 0.5 * math.cos(1.0)
    normal = vector(-q, 1) / math.sqrt(1 + q**2)
    rate = math.exp(2 * math.sin(1.0)) * (1 + q**2)
    rule = ScalarRMSprop(eta, 1 - C * eta**2, 2 / rate)
    w = f.weights() + eta * math.sqrt(C / (4 * C + 2 * K**2)) * normal
    state = rule.init(w)
    valley = f.weights()
    for _ in range(steps):
        before = w
        w, state = rule.step(w, f.grad(w), state)
    end = (w + before) / 2
    assert abs(end[0].item() - closed_form(steps)) <= 3 * eta**2
    flow, averages = ss.flows.central(f, rule), rule.averages(rule.init(valley))
    path = ss.flows.integrate(flow, valley, steps // 10, averages=averages, method=ss.flows.multirate(rtol=1e-5))
    assert abs(path.weights[-1][0].item() - closed_form(steps // 10)) <= 3 * eta**2


def regression() -> tuple[linear_regression.RegressionProblem, Objective]:
    p = linear_regression.random_problem(0)
    X, y = torch.as_tensor(p.X), torch.as_tensor(p.y)

    class Normalized(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.as_tensor(linear_regression.minimizer(p, 1.2)).clone())

        def forward(self, x: Tensor) -> Tensor:
            z = x @ self.w
            return p.sigma_y * z / z.square().mean().sqrt()

    return p, Objective(Normalized(), torch.nn.functional.mse_loss, [(X, y)])


def test_regression_follows_the_angle_law() -> None:
    """``tan α(τ) = tan α(0) e^{-τ}``, and K = 2 tan α."""
    p, f = regression()
    flow = ss.flows.sharpness_reduction(f, GD(LR, 1e-2))
    assert pytest.approx(2 * math.tan(1.2), rel=1e-8) == flow.at(flow.minimizer(f.weights())).K
    _, path = follow(flow, f.weights(), 2000, pieces=20)  # τ = 2
    alpha = linear_regression.angle(p, path.numpy())
    assert np.abs(alpha - np.arctan(math.tan(1.2) * np.exp(-np.linspace(0, 2, 21)))).max() < 1e-5


def test_slope_of_sharpness_on_the_cone_of_minimizers() -> None:
    """The radial part of ``P⁺ ∇_w log λ1`` is -2/‖w‖, and ``‖P⁺ ∇_w log λ1‖² ‖w‖² = 4 + K²``."""
    _, f = regression()
    theta = direction(f.weights())
    w = 1.7 * theta
    values, vectors = torch.linalg.eigh(ss.hessian(f, w).dense())
    v, flat = vectors[:, -1:], vectors[:, values.abs() < 1e-9 * values[-1]]
    slope = third_order.by_autograd(f, w, v)[0] / values[-1]
    assert (slope @ theta).item() * 1.7 == pytest.approx(-2, abs=1e-6)
    assert (flat.T @ slope).square().sum().item() * 1.7**2 == pytest.approx(4 + 4 * math.tan(1.2) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("method", "il"),
    [(ss.flows.multirate(), 1e-3), (ss.flows.implicit(longest=0.01), 1e-3), (ss.flows.implicit(longest=0.01), 1e-5)],
)
def test_central_flow_contains_the_reduction_flow(method: ss.flows.multirate | ss.flows.implicit, il: float) -> None:
    """From α = 1.2 on Γ: the angle law within 10 il, and X/‖w‖² = 2il/(4 + K²) within 3 % from τ = .25 on."""
    steps = round(1 / il)
    p, f = regression()
    theta = direction(f.weights())
    sharpness = float(linear_regression.spherical_sharpness(p, theta.numpy()))
    w = theta * math.sqrt(LR * sharpness / 2)
    at = np.linspace(0, steps, 21)[1:-1].tolist()
    path = ss.flows.integrate(ss.flows.central(f, GD(LR, il / LR)), w, steps, at=at, method=method)
    law = linear_regression.angle_law(1.2, il * path.times.numpy())
    assert np.abs(linear_regression.angle(p, path.weights.numpy()) - law).max() <= 10 * il
    t, variance, radius = (np.array(path[c]) for c in ("t", "variance", "radius"))
    K = linear_regression.log_slope(linear_regression.angle_law(1.2, il * t))
    assert (variance / radius**2 / (2 * il / (4 + K**2)))[il * t >= 0.25] == pytest.approx(1, abs=0.03)


def test_what_has_no_reduction_flow() -> None:
    f = one_mode()
    with pytest.raises(TypeError, match="quasi-RMSprop"):
        ss.flows.sharpness_reduction(f, ss.Adam(1e-3))
    with pytest.raises(ValueError, match="weight_decay"):
        ss.flows.sharpness_reduction(f, GD(0.1))
    slanted = objective(vector(1, 0), lambda w: w[0] + w[1])
    with pytest.raises(NoMinimizer, match="no minimizer near"):
        ss.flows.ReductionFlow(slanted, 1e-3).minimizer(vector(1, 0))
