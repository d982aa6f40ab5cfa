"""Flows and their integrators, on networks small enough for dense derivatives."""

import math

import problems
import pytest
import torch
from cases import invariant, plain
from torch import Tensor, nn

import sharpscope as ss
from sharpscope.autodiff import third_order
from sharpscope.autodiff.objective import Objective
from sharpscope.flows.central import eased
from sharpscope.flows.implicit import _relaxed
from sharpscope.flows.path import Point
from sharpscope.optimizers.adaptive import Adam, RMSprop
from sharpscope.optimizers.base import UpdateRule
from sharpscope.optimizers.gd import GD
from sharpscope.studies._shared.data import digits
from sharpscope.studies._shared.nets import half_squares, mlp, squares


def some(w: Tensor, k: int, seed: int = 0) -> Tensor:
    """k columns like w, of lengths 1, 10, 100, ..."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(w), k, generator=g, dtype=w.dtype) * 10.0 ** torch.arange(k)


def settled(f: Objective, rule: UpdateRule, steps: int) -> Tensor:
    """Weights after some steps of the rule."""
    w, state = f.weights(), rule.init(f.weights())
    for _ in range(steps):
        w, state = rule.step(w, f.grad(w), state)
    return w


class Quadratic(nn.Module):
    """``½ Σ h_i w_i²``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(size, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        return 0.5 * (h * self.w.square()).sum()


CURVED = torch.tensor([5.0, 1.0, 1e-3, 0.0], dtype=torch.float64)


def quadratic(h: Tensor = CURVED) -> Objective:
    return Objective(Quadratic(len(h)), lambda output, target: output, [(h, torch.zeros(1))])


@pytest.mark.parametrize("norm", ["BN", "LN", "RMSNorm", "GN", "WN", "torch BN", "torch LN"])
def test_slopes_of_curvature_two_ways(norm: str) -> None:
    f = invariant(norm)
    w = f.weights()
    U = some(w, 3)
    exact, found = third_order.by_autograd(f, w, U), third_order.checked(f, w, U[:, 0])(f, w, U)
    assert exact.shape == (6, len(w))
    # second differences: h² in truncation, 1e-16/h² in rounding, h = 1e-4 ‖w‖
    assert ((exact - found).norm(dim=1) / exact.norm(dim=1)).max() < 1e-5
    h = 1e-5 / U[:, 1].norm()
    slope = (f.hvp(w + h * U[:, 1], U[:, 2]) - f.hvp(w - h * U[:, 1], U[:, 2])) / (2 * h)
    assert torch.allclose(exact[4], slope, rtol=1e-4, atol=1e-5 * slope.norm().item())


class Naive(torch.autograd.Function):
    """``x³`` whose second derivative is right and whose third is not: a saved tensor counts as a constant."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return NaiveSlope.apply(x, g)


class NaiveSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, g)
        return 3 * x**2 * g

    @staticmethod
    def backward(ctx, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        x, g = ctx.saved_tensors
        return 6 * x.detach() * g * h, 3 * x**2 * h


class Cubed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return Naive.apply(self.map(x))


def test_a_wrong_kernel_is_refused_before_the_first_step() -> None:
    torch.manual_seed(0)
    f = Objective(Cubed(), squares, [(torch.randn(8, 3).double(), torch.randn(8, 2).double())])
    w = f.weights()
    flow = ss.flows.central(f, GD(3.0 / ss.sharpness(f)))
    with pytest.raises(ss.errors.WrongThirdDerivative, match="by autograd and by differences"):
        ss.flows.integrate(flow, w, 5)


def test_packed_pairs() -> None:
    x = torch.arange(6.0)
    assert third_order.unpacked(x).tolist() == [[0, 1, 2], [1, 3, 4], [2, 4, 5]]


def test_local_model_against_dense_derivatives() -> None:
    f = invariant("BN")
    w = f.weights()
    rule = GD(2.2 / ss.sharpness(f), 1e-3)
    local = ss.flows.central(f, rule, band=0.5).local(w, {})
    k = local.modes.shape[1]
    assert k >= 2
    U, p = local.modes, float(rule.preconditioner({}))
    assert torch.allclose(U.T @ U * p, torch.eye(k).double(), atol=1e-10)
    H = ss.hessian(f, w).dense() + rule.weight_decay * torch.eye(len(w))
    assert torch.allclose(local.curvatures, U.T @ H @ U, atol=1e-5)  # residuals of the tracked pairs, squared
    G = torch.stack([torch.stack([f.third(w, U[:, i], U[:, j]) for j in range(k)]) for i in range(k)])
    X = torch.eye(k).double() + 0.3
    assert torch.allclose(local.push(X), torch.einsum("ij,ijp->p", X, G), rtol=1e-4, atol=1e-6)
    assert torch.allclose(local.still_gram, 0.5 / p * torch.einsum("ijp,lmp->ijlm", G, G), rtol=1e-3, atol=1e-6)
    step = 1e-4 * some(w, 1)[:, 0]
    there = ss.hessian(f, w + step).dense() + rule.weight_decay * torch.eye(len(w))
    assert torch.allclose(local.curvature(w + step), U.T @ there @ U, atol=1e-5)


def test_a_refresh_of_ten_modes_costs_at_most_250_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: gradients as one, products as two.  Its own account of the cost is not below that."""
    data = digits(100)
    count = [0.0]

    def product() -> None:
        count[0] += 2

    f = problems.observed(Objective(mlp("BN", 0), half_squares, [(data.x, data.y)]), product)
    rule = GD(0.2, 5e-4)
    w = settled(f, rule, 300)
    values = ss.linalg.lanczos(ss.hessian(f, w), 11).values * 0.2
    flow = ss.flows.central(f, rule, band=1 - (values[9] + values[10]).item() / 4).verified(w)
    before = flow.local(w, {})
    w = rule.step(w, f.grad(w), {})[0]
    value_and_grad = Objective.value_and_grad

    def counted(self: Objective, w: Tensor) -> tuple[Tensor, Tensor]:
        count[0] += 1
        return value_and_grad(self, w)

    monkeypatch.setattr(Objective, "value_and_grad", counted)
    count[0] = 0.0
    local = before.flow.local(w, {}, before.memory, 1)
    local.motion(w, {}, 0.5)
    assert 9 <= local.modes.shape[1] <= 11
    assert count[0] <= 250
    assert count[0] <= local.cost + 2


def test_one_mode_in_closed_form() -> None:
    """``x = max(0, (dt a + gap)/(dt b))`` with a = -⟨G, P⁻¹∇F⟩, b = ½⟨G, P⁻¹G⟩."""
    f = invariant("BN")
    w = f.weights()
    rule = GD(1.95 / ss.sharpness(f), 1e-3)
    local = ss.flows.central(f, rule, band=0.03).local(w, {})
    assert local.modes.shape[1] == 1
    (G,), lr, dt = local.curvature_gradients, rule.learning_rate, 30.0
    force = f.grad(w) + rule.weight_decay * w
    gap = 2 - local.curvatures.item()
    x = max(0.0, -(gap + dt * lr * (G @ force).item()) / (dt * lr * 0.5 * (G @ G).item()))
    found = local.motion(w, {}, dt)
    assert found.covariance.item() == pytest.approx(x, rel=1e-6, abs=1e-12)
    assert torch.allclose(found.velocity, -lr * (force + 0.5 * x * G))
    assert found.variances.item() == pytest.approx(x * lr, rel=1e-9, abs=1e-15)
    assert found.loss - found.point_loss == pytest.approx(0.5 * x * (local.curvatures.item() - lr * 1e-3), rel=1e-6)


def test_stable_flow_of_a_quadratic() -> None:
    """``w(t) = exp(-lr h t)``: exact in one implicit step, to second order in steps by the explicit one."""
    f, rule = quadratic(), GD(0.1)
    exact = torch.exp(-0.1 * CURVED * 40)
    flow = ss.flows.stable(f, rule)
    one = ss.flows.integrate(flow, f.weights(), 40, method=ss.flows.implicit(corrections=0))
    assert torch.allclose(one.weights[-1], exact, atol=1e-9)
    slow = ss.flows.integrate(flow, f.weights(), 40)
    assert torch.allclose(slow.weights[-1][2:], exact[2:], atol=1e-4)
    assert torch.equal(ss.flows.integrate(ss.flows.gradient(f, rule), f.weights(), 40).weights, slow.weights)


def test_flow_on_the_sphere_stays_there() -> None:
    f = invariant("BN")
    theta = f.weights() / f.weights().norm()
    flow = ss.flows.sphere(f, 0.5 / ss.spherical_sharpness(f))
    path = ss.flows.integrate(flow, theta, 50)
    assert f.value(path.weights[-1]) < f.value(theta)
    assert path.weights[-1].norm().item() == pytest.approx(1, abs=0.02)  # Euler steps drift outwards, by |step|²/2 each


def test_weight_decay_of_what_nothing_holds() -> None:
    f, rule = quadratic(), GD(0.1, 1e-2)
    path = ss.flows.integrate(ss.flows.stable(f, rule), f.weights(), 500, method=ss.flows.implicit())
    assert path.weights[-1][3].item() == pytest.approx(math.exp(-0.5), rel=1e-3)


@pytest.mark.parametrize("reach", [10.0, 1e-6])
def test_an_implicit_step_however_short_knows_all_modes_near_the_edge(reach: float) -> None:
    """A basis that gets coarser as steps get shorter would miss modes, err, and make them shorter still."""
    near = torch.tensor([19.5, 19, 18.2, 17.9, 17.1, 16.4], dtype=torch.float64)  # the bound is 2/lr = 20, the band .2
    f = quadratic(torch.cat([near, torch.linspace(0, 5, 394, dtype=torch.float64)]))
    after, row = ss.flows.implicit()(ss.flows.central(f, GD(0.1)), Point(0.0, f.weights(), {}, reach=reach), 20.0)
    assert row is not None and row["modes"] == len(near)
    assert after.predicted is not None  # third derivatives vanish: they stay; to second order in what is left, .03²
    assert after.predicted.tolist() == pytest.approx((near / 10).tolist(), abs=2e-3)


def test_relaxation_function() -> None:
    z = torch.tensor([0.0, 1e-12, 1e-3, 1.0, 1e6, -1.0], dtype=torch.float64)
    expected = [1.0, 1.0, 0.9995001666, 1 - math.exp(-1), 1e-6, math.e - 1]
    assert _relaxed(z).tolist() == pytest.approx(expected, rel=1e-9)


def test_excess_curvature_is_worked_off_over_a_step() -> None:
    gap = torch.diag(torch.tensor([0.5, -0.2], dtype=torch.float64))
    assert torch.allclose(eased(gap, 0.1), torch.diag(torch.tensor([0.5, -0.02], dtype=torch.float64)))
    assert torch.allclose(eased(gap, 50.0), gap)


def test_central_flow_holds_the_edge_where_the_stable_flow_leaves_it() -> None:
    f = invariant("BN")
    rule = GD(0.5, 1e-3)
    p = ss.flows.compare(f, rule, settled(f, rule, 2000), 500, points=5)
    late = [
        c for t, c in zip(p.paths["central flow"]["t"], p.paths["central flow"]["curvature"], strict=True) if t > 20
    ]
    assert max(late) <= 2 * 1.003
    assert p.paths["stable flow"]["curvature"][-1] > 2.5
    assert p.error() < p.error("stable flow") / 4
    assert p.skill > 0.5 and p.valid_until == 500
    assert "valid to the end" in str(p)
    h = p.history
    assert h.runs == ["optimizer", "central flow", "stable flow"]
    assert h.series("optimizer", "step").tolist() == [0, 100, 200, 300, 400, 500]
    assert h.series("central flow", "variance")[1:] == pytest.approx(h.series("optimizer", "variance")[1:], rel=0.3)
    assert h.series("optimizer", "distance").tolist() == [0] * 6


def test_two_integrators_agree() -> None:
    """At il = 1e-3 the implicit path, in steps of up to 50, ends where the explicit one does."""
    f = invariant("BN")
    rule = GD(0.5, 2e-3)
    flow, w = ss.flows.central(f, rule), settled(f, rule, 2000)
    explicit = ss.flows.integrate(flow, w, 1000, at=[500], method=ss.flows.multirate(rtol=1e-4))
    implicit = ss.flows.integrate(flow, w, 1000, at=[500], method=ss.flows.implicit())
    assert explicit.times.tolist() == implicit.times.tolist() == [0, 500, 1000]
    moved = (explicit.weights[-1] - w).norm()
    assert (explicit.weights[-1] - implicit.weights[-1]).norm() < 0.03 * moved


def test_steps_do_not_depend_on_where_the_path_is_read() -> None:
    f = invariant("LN")
    rule = GD(0.5, 1e-3)
    w = settled(f, rule, 500)
    few = ss.flows.integrate(ss.flows.central(f, rule), w, 100)
    many = ss.flows.integrate(ss.flows.central(f, rule), w, 100, at=[10, 33, 70])
    assert (few.weights[-1] - many.weights[-1]).norm() < 0.02 * (few.weights[-1] - w).norm()


@pytest.mark.parametrize(
    "rule", [RMSprop(5e-3, 0.95), Adam(1e-2, 0.5, 0.95), GD(0.1, 1e-3, 0.5)], ids=["RMSprop", "Adam", "mom"]
)
def test_central_flow_of_other_rules(rule: UpdateRule) -> None:
    """Beside the optimizer at its edge; P and its rate enter the complementarity problem."""
    f = plain() if not isinstance(rule, GD) else invariant("BN")
    w = f.weights()
    state = rule.init(w)
    for _ in range(1500):
        w, state = rule.step(w, f.grad(w), state)
    p = ss.flows.compare(f, rule, w, 100, state=state, points=5)
    curvature = p.paths["central flow"]["curvature"]
    assert max(curvature[len(curvature) // 2 :]) <= 1.01 * rule.bound
    assert p.error() <= 1.1 * p.error("stable flow") + 0.05


def test_what_cannot_be_done() -> None:
    f = invariant("BN")
    w = f.weights()
    with pytest.raises(ValueError, match="steps must be positive"):
        ss.flows.integrate(ss.flows.central(f, GD(0.1)), w, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        ss.flows.central(f, GD(0.1), band=2)
    with pytest.raises(ValueError, match="stable"):
        ss.flows.gradient(f, RMSprop(1e-3))
    rule = RMSprop(1e-3)
    averages = rule.averages(rule.step(w, f.grad(w), rule.init(w))[1])
    with pytest.raises(ValueError, match="multirate"):
        ss.flows.implicit()(ss.flows.central(f, rule), Point(0.0, w, averages), 1.0)
    with pytest.raises(ValueError, match="fewer points"):
        ss.flows.compare(f, GD(0.1), w, 3, points=5)
    with pytest.raises(ValueError, match="diverges"):
        ss.flows.compare(plain(), GD(50.0), plain().weights(), 200, points=5)
