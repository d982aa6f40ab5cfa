"""Update rules: the steps of torch's optimizers, and thresholds that separate stable from unstable."""

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from sharpscope.optimizers.base import State, UpdateRule
from sharpscope.optimizers.from_torch import rule_of, state_of
from sharpscope.optimizers.gd import GD
from sharpscope.optimizers.scalar import ScalarRMSprop, SphericalRMSprop
from sharpscope.studies._shared import toys
from sharpscope.symmetry.sphere import angle, direction, rmsprop_constants, tangent


def advance(rule: UpdateRule, w: Tensor, curvature: Tensor, steps: int) -> Tensor:
    """`steps` steps on the quadratic ``½ Σ λ_i w_i²``."""
    state = rule.init(w)
    for _ in range(steps):
        w, state = rule.step(w, curvature * w, state)
    return w


GDS = [
    *(GD(0.1), GD(0.1, 0.3), GD(0.1, 0.0, 0.9), GD(0.1, 0.3, 0.5), GD(2.0, 0.1)),
    *(GD(0.1, 0.3, 0.9, nesterov=True), GD(0.1, 0.0, 0.5, nesterov=True), GD(0.1, 0.3, 0.9, dampening=0.5)),
]


def sgd_of(rule: GD, params: list[Tensor]) -> torch.optim.SGD:
    return torch.optim.SGD(
        params,
        lr=rule.learning_rate,
        momentum=rule.momentum,
        weight_decay=rule.weight_decay,
        nesterov=rule.nesterov,
        dampening=rule.dampening,
    )


@pytest.mark.parametrize("rule", GDS, ids=str)
def test_gd_takes_the_steps_of_sgd(rule: GD) -> None:
    f = cases.invariant()
    w = f.weights()
    p = w.clone().requires_grad_()
    sgd, state = sgd_of(rule, [p]), rule.init(w)
    for _ in range(10):
        g = f.grad(w)
        p.grad = g.clone()
        sgd.step()
        w, state = rule.step(w, g, state)
        # the same three terms added in another order: a few roundings of the largest
        assert (p.detach() - w).abs().max() <= 1e-15 * (w.abs().max() + rule.learning_rate * g.abs().max())
        w = p.detach().clone()  # start the next step from the same weights: only one step is compared


@pytest.mark.parametrize(
    "rule",
    [
        *(GD(0.1), GD(0.3, 0.5), GD(0.1, 0.0, 0.9), GD(0.2, 1.0, 0.5), GD(0.01, 0.1, 0.99)),
        *(GD(0.1, 0.3, 0.9, True), GD(0.2, 0.0, 0.5, True), GD(0.1, 0.3, 0.9, dampening=0.5)),
    ],
    ids=str,
)
def test_threshold_separates_convergence_from_divergence(rule: GD) -> None:
    threshold = rule.threshold(rule.init(torch.ones(1)))
    curvature = torch.tensor([0.99, 1.01], dtype=torch.float64) * threshold
    # near the edge weights shrink or grow by a factor of about 1 ± .02 a step, faster with momentum
    below, above = advance(rule, torch.ones(2, dtype=torch.float64), curvature, 5000).abs().tolist()
    assert below < 1e-6
    assert not above < 1e6  # or not a number any more


@pytest.mark.parametrize("rule", [GD(0.1), GD(0.3, 0.5), GD(0.2, 1.0, 0.5)], ids=str)
def test_edge_is_the_threshold_in_units_of_the_learning_rate(rule: GD) -> None:
    assert rule.learning_rate * (rule.threshold({}) + rule.weight_decay) == pytest.approx(rule.edge, rel=1e-15)
    # seen on the sphere it is the same but for the factor 1 - il and the decay of the radius
    on_sphere = rule.effective_learning_rate(1.0, {}) * (1 - rule.intrinsic_rate)
    assert on_sphere * (rule.threshold({}) + rule.weight_decay) == pytest.approx(rule.edge, rel=1e-15)


@pytest.mark.parametrize("rule", GDS, ids=str)
def test_bound_is_the_threshold_in_units_of_the_preconditioner(rule: GD) -> None:
    threshold = rule.threshold({}) + rule.coupled_decay
    assert threshold / rule.preconditioner({}).item() == pytest.approx(rule.bound, rel=1e-15)


MOVING = [
    *(GD(0.1), GD(0.1, 0.0, 0.9), GD(0.1, 0.0, 0.9, True), GD(0.1, 0.0, 0.9, dampening=0.5)),
    *(ScalarRMSprop(0.02, 0.9, 0.5), ScalarRMSprop(0.02, 0.9, 0.5, update_first=True)),
]


@pytest.mark.parametrize("rule", MOVING, ids=str)
def test_a_constant_force_moves_weights_by_force_over_preconditioner(rule: UpdateRule) -> None:
    g = torch.tensor([1.0, -2.0, 0.1], dtype=torch.float64)
    w = torch.zeros_like(g)
    state = rule.init(w)
    for _ in range(500):  # .9^500 = 1e-23: buffers and averages have settled
        now, (w, state) = w, rule.step(w, g, state)
    assert torch.allclose(now - w, g / rule.preconditioner(state), rtol=1e-12, atol=0)


@pytest.mark.parametrize("first", [False, True])
def test_relax_is_the_change_of_the_average_in_a_step(first: bool) -> None:
    rule = ScalarRMSprop(0.02, 0.9, 0.5, first)
    g = torch.tensor([1.0, -2.0, 0.1], dtype=torch.float64)
    state = rule.init(g)
    _, after = rule.step(torch.zeros_like(g), g, state)
    change = rule.relax(rule.averages(state), g.square())["v"]
    assert (after["v"] - state["v"]).item() == pytest.approx(change.item(), rel=1e-13)


def test_rules_that_say_no_preconditioner_refuse_a_flow() -> None:
    rule = SphericalRMSprop(0.1, 0.9, 0.1)
    assert rule.averages(rule.init(torch.ones(2))) == {} == rule.relax({}, torch.ones(2))
    with pytest.raises(TypeError, match="SphericalRMSprop says no preconditioner"):
        rule.preconditioner(rule.init(torch.ones(2)))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_clock_is_the_time_of_weight_decay(momentum: float) -> None:
    rule = GD(0.1, 1e-2, momentum)
    steps = round(1 / rule.intrinsic_time_per_step)
    w = torch.ones(1, dtype=torch.float64)
    shrunk = advance(rule, w, torch.zeros(1, dtype=torch.float64), steps).item()
    # one unit of intrinsic time, up to terms of relative order il/(1-mom)² in the exponent and the buffer's warm-up
    assert math.log(shrunk) == pytest.approx(-1, rel=2 * rule.intrinsic_time_per_step / (1 - momentum))


@pytest.mark.parametrize("lr", [0.0, -0.1, math.nan, math.inf])
def test_learning_rate_is_positive_and_finite(lr: float) -> None:
    with pytest.raises(ValueError, match="learning rate is"):
        GD(lr)


@pytest.mark.parametrize("wd", [-1e-3, 10.0, 11.0, math.nan])
def test_weight_decay_leaves_weights_their_sign(wd: float) -> None:
    with pytest.raises(ValueError, match=r"weight decay is .*\[0, 10\)"):
        GD(0.1, wd)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, math.nan])
def test_momentum_is_below_one(momentum: float) -> None:
    with pytest.raises(ValueError, match=r"momentum is .*\[0, 1\)"):
        GD(0.1, 0.0, momentum)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((0.0, 0.9, 0.1), "rates must be positive"),
        ((0.1, 0.9, -1.0), "rates must be positive"),
        ((math.nan, 0.9, 0.1), "rates must be positive"),
        ((0.1, 1.0, 0.1), "decay β is 1.0"),
        ((0.1, 0.0, 0.1), "decay β is 0.0"),
        ((0.1, math.nan, 0.1), "decay β is nan"),
    ],
)
def test_rmsprop_constants_are_checked(rates: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SphericalRMSprop(*rates)
    with pytest.raises(ValueError, match=message):
        ScalarRMSprop(*rates)


def test_weight_decay_does_not_update_first() -> None:
    with pytest.raises(ValueError, match="choose exact or update_first"):
        SphericalRMSprop(0.1, 0.9, 0.1, update_first=True, exact=True)


@pytest.mark.parametrize("rule", GDS, ids=str)
def test_sgd_is_read_with_its_present_values(rule: GD) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    sgd = sgd_of(rule, [p])
    assert rule_of(sgd) == rule
    sgd.param_groups[0]["lr"] = 0.25
    assert rule_of(sgd) == replace(rule, learning_rate=0.25)
    sgd.param_groups[0]["lr"] = torch.tensor(0.125)
    assert rule_of(sgd) == replace(rule, learning_rate=0.125)


class LBFGS(torch.optim.LBFGS):
    """Inherits its step."""


class Lion(torch.optim.Optimizer):
    """Steps of one length."""


class Clipped(torch.optim.SGD):
    """Takes steps of its own."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        super().step(closure)


class Renamed(torch.optim.SGD):
    """Takes the steps of SGD."""


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            LBFGS,
            r"no update rule for LBFGS; subclass UpdateRule or.* same_steps\(LBFGS, torch.optim.AdamW\)\. Known: .*SGD",
        ),
        (Clipped, r"Clipped has another step than SGD: subclass UpdateRule .* same_steps\(Clipped, torch.optim.SGD\)"),
        (lambda p: Lion(p, {"lr": 0.1}), "Lion has no law of stability: its steps have one length whatever"),
        (lambda p: torch.optim.Rprop(p), "Rprop has no law of stability"),
    ],
)
def test_optimizers_without_a_law_are_named_with_the_reason(kind: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        rule_of(kind([torch.nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize("first", ["parent", "child"])
def test_a_subclass_that_inherits_its_step_has_the_rule_of_its_parent(first: str) -> None:
    """Torch wraps the step of a class when its first optimizer is made, in whichever order."""
    code = "import torch; from sharpscope.optimizers import rule_of; p = [torch.nn.Parameter(torch.ones(2))];"
    code += "Child = type('Child', (torch.optim.SGD,), {});"
    code += "torch.optim.SGD(p, lr=.1);" if first == "parent" else ""
    code += "print(rule_of(Child(p, lr=.2)).learning_rate)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "0.2"
    assert rule_of(Renamed([torch.nn.Parameter(torch.ones(2))], lr=0.1)) == GD(0.1)


def test_nesterov_needs_momentum_and_no_dampening() -> None:
    for options in ({"nesterov": True}, {"nesterov": True, "momentum": 0.5, "dampening": 0.1}):
        with pytest.raises(ValueError, match="Nesterov's step needs momentum and no dampening"):
            GD(0.1, **options)


def test_several_parameter_groups_are_refused() -> None:
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([a], lr=0.1)
    sgd.add_param_group({"params": [b], "lr": 0.5})
    with pytest.raises(TypeError, match="2 parameter groups"):
        rule_of(sgd)


def test_the_momentum_of_sgd_is_found_in_the_order_asked_for() -> None:
    a, b, c = (torch.nn.Parameter(torch.full((n,), float(n))) for n in (1, 2, 3))
    sgd = torch.optim.SGD([a, b, c], lr=0.1, momentum=0.5)
    assert state_of(sgd, [c, a])["momentum"].tolist() == [0.0] * 4
    a.grad, c.grad = 2 * a.detach(), 2 * c.detach()  # b has none, as a weight that the loss does not see
    sgd.step()
    assert state_of(sgd, [c, b, a])["momentum"].tolist() == [6.0, 6.0, 6.0, 0.0, 0.0, 2.0]
    assert state_of(torch.optim.SGD([a], lr=0.1), [a]) == {}


class SignDescent(torch.optim.Optimizer):
    """Somebody's own optimizer."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})


@dataclass(frozen=True)
class SignRule(UpdateRule):
    """Their rule for it."""

    learning_rate: float

    reads = SignDescent

    def threshold(self, state: State) -> float:
        return 4.0


def test_a_rule_of_ones_own_is_found_by_its_optimizer() -> None:
    optimizer = SignDescent([torch.nn.Parameter(torch.ones(2))], lr=0.3)
    assert rule_of(optimizer) == SignRule(0.3)
    with pytest.raises(TypeError, match=r"Known: .*SignDescent"):
        rule_of(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(2))]))


def test_what_a_rule_of_ones_own_leaves_out_has_a_value_or_a_sentence() -> None:
    rule, w = SignRule(0.3), torch.ones(2)
    assert (rule.init(w), rule.edge, rule.intrinsic_time_per_step) == ({}, 2.0, 0.0)
    assert rule.effective_learning_rate(2.0, {}) * 2.0**2 * 4.0 == rule.edge
    found = rule.stability({})
    assert found is not None and found.threshold == 4.0
    with pytest.raises(TypeError, match="SignRule says how steps are stable, not how they are taken; define step"):
        rule.step(w, w, {})


def test_a_rule_that_cannot_read_says_so() -> None:
    with pytest.raises(TypeError, match="SphericalRMSprop does not say how to read a SGD"):
        SphericalRMSprop.read(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.3))


AXES = torch.tensor([1.0, 2.0, 3.5, 7.0], dtype=torch.float64)
"""The loss wᵀAw/(2‖w‖²) with A = diag(AXES): least at e₀, where its curvatures on the sphere are AXES - 1."""


def quotient_grad(w: Tensor) -> Tensor:
    squared = w @ w
    return (AXES * w - (w @ (AXES * w)) / squared * w) / squared


def test_spherical_rmsprop_is_stable_below_its_threshold() -> None:
    rule = SphericalRMSprop(base_rate=0.05, decay=1 - 1e-9, first_rate=1.0)  # v stands still
    for factor, ends in ((0.99, "below"), (1.01, "above")):
        v = torch.tensor((rule.base_rate * (AXES[3] - 1).item() / factor / 2) ** 2, dtype=torch.float64)
        state: State = {"v": v}
        assert rule.threshold(state) * factor == pytest.approx((AXES[3] - 1).item(), rel=1e-14)
        assert rule.threshold(state) * rule.effective_learning_rate(1.0, state) == pytest.approx(rule.edge, rel=1e-15)
        w = direction(torch.tensor([1.0, 0.0, 0.0, 1e-7], dtype=torch.float64))
        for _ in range(400):  # .98^400 = 3e-4, 1.02^400 = 2755
            w, state = rule.step(w, quotient_grad(w), state)
        assert (w[3].abs().item() < 1e-10) if ends == "below" else (w[3].abs().item() > 1e-4)


def test_spherical_rmsprop_keeps_unit_norm_and_does_not_see_the_scale() -> None:
    rule = SphericalRMSprop(0.05, 0.99, 0.3)
    w = torch.tensor([1.0, -0.5, 0.2, 0.7], dtype=torch.float64)
    state = rule.init(w)
    assert rule.effective_learning_rate(1.0, state) == pytest.approx(0.3, rel=1e-15)
    once, after = rule.step(w, quotient_grad(w), state)
    scaled, after_scaled = rule.step(8 * w, quotient_grad(8 * w), state)
    assert torch.equal(once, scaled)
    assert torch.equal(after["v"], after_scaled["v"])
    assert once.norm().item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("C", [0.5, 2.0, 8.0])
def test_both_orders_take_the_steps_that_have_the_speed_of_the_flow(C: float, first: bool) -> None:
    """The toy's own scalar RMSprop, whose speed is tested against ``C K/(4C + 2K²)``, in plain floats."""
    toy, eta = toys.Toy(2.0, 0.3, 0.2, 1.0, 2.0), 0.02
    run = toys.scalar_rmsprop(toys.Toy(*(torch.tensor([c]).numpy() for c in (2.0, 0.3, 0.2, 1.0, 2.0))), 1.0, eta,
                              torch.tensor([C]).numpy(), torch.tensor([first]).numpy())  # fmt: skip
    particle = tuple(run.initial[0].tolist())
    w = torch.tensor(particle[:3], dtype=torch.float64)
    rule = SphericalRMSprop(eta, 1 - C * eta**2, eta / math.sqrt(particle[3]), first)
    assert rule.constant == pytest.approx(C, rel=1e-12)
    state = rule.init(w)
    for _ in range(50):
        particle = toys.rmsprop_step(toy, particle, eta, C, first)
        w, state = rule.step(w, torch.from_numpy(toys.gradient(toy, w.numpy())), state)
    assert w.tolist() == pytest.approx(particle[:3], abs=1e-12)
    assert state["v"].item() == pytest.approx(particle[3], rel=1e-12)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("C", [0.5, 2.0])
def test_scalar_rmsprop_follows_the_flow_on_a_loss_that_sees_the_scale(C: float, first: bool) -> None:
    """``L = e^{2 sin x}(s²/2 + .7 s³/3)``, s = z - ½ sin x: along s = 0 it moves by -η² C G/(4C + 2K²) a step."""
    eta = 0.03
    steps = round(4 / eta**2)

    def shape(x: float) -> tuple[float, float]:
        """K and dℓ/dx of ``log λ1 = 2 sin x + log(1 + ¼cos²x)`` along the curve of minimizers."""
        length = math.sqrt(1 + 0.25 * math.cos(x) ** 2)
        return (2 * math.cos(x) - 0.25 * math.sin(2 * x) / length**2) / length, length

    def velocity(x: float) -> float:
        K, length = shape(x)
        return -C * K / ((4 * C + 2 * K**2) * length)

    x, h = 1.0, 4 / 400
    for _ in range(400):  # the midpoint rule: an error of h² = 1e-4 of the distance at most, 3η² = 2.7e-3
        x += h * velocity(x + h / 2 * velocity(x))

    K, length = shape(1.0)
    normal = torch.tensor([-0.5 * math.cos(1.0), 1.0], dtype=torch.float64) / length
    start = torch.tensor([1.0, 0.5 * math.sin(1.0)], dtype=torch.float64)
    w = start + eta * math.sqrt(C / (4 * C + 2 * K**2)) * normal
    sharpness = math.exp(2 * math.sin(1.0)) * length**2
    rule = ScalarRMSprop(eta, 1 - C * eta**2, 2 / sharpness, first)
    state, path = rule.init(w), []
    assert rule.threshold(state) == pytest.approx(sharpness, rel=1e-14)
    assert rule.effective_learning_rate(2.0, state) == pytest.approx(0.25 * rule.edge / sharpness, rel=1e-14)
    for _ in range(steps + 1):
        a, z = w.tolist()
        s, e = z - 0.5 * math.sin(a), math.exp(2 * math.sin(a))
        by_s = e * s * (1 + 0.7 * s)
        along = 2 * math.cos(a) * e * s**2 * (0.5 + 0.7 * s / 3) - 0.5 * math.cos(a) * by_s
        w, state = rule.step(w, torch.tensor([along, by_s], dtype=torch.float64), state)
        path.append(w[0].item())
    assert abs((path[-1] + path[-2]) / 2 - x) <= 3 * eta**2
    assert abs(x - 1) > 0.1


def test_spherical_rmsprop_has_the_clock_of_what_it_mimics() -> None:
    gd = GD(0.2, 1e-5 / 0.2)
    mimic = SphericalRMSprop.like(gd, radius=2.0)
    assert mimic.intrinsic_time_per_step == pytest.approx(
        gd.intrinsic_time_per_step, rel=2 * gd.intrinsic_time_per_step
    )  # (1-(1-il)⁴)/4 = il - 1.5 il² + ...
    start = mimic.init(torch.ones(1, dtype=torch.float64))
    assert mimic.effective_learning_rate(1.0, start) == pytest.approx(gd.effective_learning_rate(2.0, {}), rel=1e-15)


@pytest.mark.parametrize("il", [1e-3, 1e-4])
def test_spherical_rmsprop_turns_weights_as_weight_decay_does(il: float) -> None:
    """Near a minimum, at distance η, at the edge: over τ = 1/20 directions differ by O(il), far less than they turn."""
    eta, _ = rmsprop_constants(0.1, il / 0.1)
    lr = 0.1
    radius = math.sqrt(lr * (AXES[3] - 1).item() / 2)  # effective learning rate × curvature = 2
    theta = direction(torch.tensor([1.0, 0.3 * eta, -0.4 * eta, 0.6 * eta], dtype=torch.float64))
    gd = GD(lr, il / lr)
    mimic = SphericalRMSprop.like(gd, radius)
    w, z, state, farthest, moved = radius * theta, theta, mimic.init(theta), 0.0, 0.0
    for _ in range(round(0.05 / il)):
        before = w
        w, _ = gd.step(w, quotient_grad(w), {})
        z, state = mimic.step(z, quotient_grad(z), state)
        farthest, moved = max(farthest, angle(w, z).item()), moved + angle(before, w).item()
    assert farthest <= il
    assert moved > 1e3 * il  # the two do not agree by standing still


def test_tangent_part_of_the_quotient_gradient_is_all_of_it() -> None:
    """The example above is scale-invariant."""
    w = torch.tensor([1.0, -0.5, 0.2, 0.7], dtype=torch.float64)
    assert (tangent(w, quotient_grad(w)) - quotient_grad(w)).norm() < 1e-15
