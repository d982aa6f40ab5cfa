"""Rules with a rate for every weight: torch's own steps, and the curvature at which they become unstable."""

import math
from collections.abc import Iterable
from dataclasses import replace

import cases
import pytest
import torch
from torch import Tensor

from sharpscope.optimizers.adaptive import Adam, RMSprop
from sharpscope.optimizers.base import State, UpdateRule
from sharpscope.optimizers.from_torch import rule_of, state_of

RMSPROPS = [
    RMSprop(0.01),
    RMSprop(0.02, 0.9, 1e-3, 0.1),
    RMSprop(0.01, 0.95, 1e-8, 0.0, 0.9),
    RMSprop(0.01, 0.0, 1e-2, 0.3, 0.5),
]
ADAMS = [
    Adam(0.01),
    Adam(0.02, 0.8, 0.95, 1e-3, 0.1),
    Adam(0.01, 0.0, 0.9),
    Adam(0.01, 0.9, 0.99, 1e-8, 0.1, decoupled=True),
    Adam(0.05, 0.5, 0.9, 1e-2, 2.0, decoupled=True),
]
RULES: list[RMSprop | Adam] = [*RMSPROPS, *ADAMS]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def torch_optimizer(rule: RMSprop | Adam, params: Iterable[Tensor]) -> torch.optim.Optimizer:
    lr, eps, wd = rule.learning_rate, rule.eps, rule.weight_decay
    if isinstance(rule, RMSprop):
        return torch.optim.RMSprop(params, lr, rule.decay, eps, wd, rule.momentum)
    kind = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
    return kind(params, lr, (rule.beta1, rule.beta2), eps, wd)


@every_rule
def test_rules_take_the_steps_of_torch(rule: RMSprop | Adam) -> None:
    """20 steps, each side at its own gradients: rounding grows little at these rates."""
    f = cases.invariant()
    w = f.weights()
    p = w.clone().requires_grad_()
    optimizer, state = torch_optimizer(rule, [p]), rule.init(w)
    for _ in range(20):
        p.grad = f.grad(p.detach())
        optimizer.step()
        w, state = rule.step(w, f.grad(w), state)
    assert (p.detach() - w).norm() <= 1e-12 * w.norm()
    assert (w - f.weights()).norm() > 0.1  # the two do not agree by standing still
    kept = state_of(optimizer, [p])
    assert kept.keys() == state.keys()
    for name, value in state.items():
        assert torch.allclose(kept[name], value, rtol=1e-9, atol=1e-14)


def test_steps_in_single_precision_stay_there() -> None:
    for rule in (RMSprop(0.01, momentum=0.5), Adam(0.01)):
        w, state = rule.step(torch.ones(3), torch.ones(3), rule.init(torch.ones(3)))
        assert {w.dtype, state["v"].dtype, state["momentum"].dtype} == {torch.float32}


@every_rule
def test_optimizers_are_read_with_their_present_values(rule: RMSprop | Adam) -> None:
    optimizer = torch_optimizer(rule, [torch.nn.Parameter(torch.ones(2))])
    assert rule_of(optimizer) == rule
    optimizer.param_groups[0]["lr"] = torch.tensor(0.125)
    assert rule_of(optimizer) == replace(rule, learning_rate=0.125)


def test_a_rule_describes_one_parameter_group() -> None:
    two = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    two.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with pytest.raises(TypeError, match="2 parameter groups"):
        rule_of(two)


def test_parameters_of_different_age_have_no_state_in_common() -> None:
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([a, b])
    assert float(state_of(adam, [a, b])["step"]) == 0
    a.grad = torch.ones(2)
    adam.step()
    assert state_of(adam, [b, a])["v"].tolist() == pytest.approx([0.0, 0.0, 0.0, 1e-3, 1e-3])
    b.grad = torch.ones(3)
    adam.step()
    with pytest.raises(ValueError, match=r"differ in step, \[1.0, 2.0\]"):
        state_of(adam, [a, b])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RMSprop(0.0), "learning rate is 0.0"),
        (lambda: RMSprop(0.1, 1.0), "decay β is 1.0"),
        (lambda: RMSprop(0.1, momentum=1.0), "momentum is 1.0"),
        (lambda: RMSprop(0.1, eps=-1.0), "eps is -1.0"),
        (lambda: Adam(math.inf), "learning rate is inf"),
        (lambda: Adam(0.1, 1.0), "β1 is 1.0"),
        (lambda: Adam(0.1, 0.9, math.nan), "β2 is nan"),
        (lambda: Adam(0.1, weight_decay=-0.1), "weight decay -0.1"),
        (lambda: Adam(0.1, weight_decay=10.0, decoupled=True), "lr·wd = 1 of the weights"),
    ],
)
def test_constants_are_checked(make: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def settled(rule: RMSprop | Adam, v: Tensor) -> State:
    """A state long after the start, with averages v that hardly move any more, and no momentum."""
    return {
        **rule.init(v),
        "v": v,
        **({"step": torch.tensor(1e30, dtype=torch.float64)} if isinstance(rule, Adam) else {}),
    }


STILL = 1 - 1e-13  # decay of an average that stands still


@pytest.mark.parametrize(
    "rule",
    [
        RMSprop(0.01, STILL),
        RMSprop(0.02, STILL, 1e-3, 0.1),
        RMSprop(0.01, STILL, 1e-8, 0.0, 0.9),
        Adam(0.01, 0.0, STILL),
        Adam(0.01, 0.9, STILL, 1e-3),
        Adam(0.02, 0.9, STILL, 1e-3, 0.1),
        Adam(0.05, 0.5, STILL, 1e-3, 4.0, decoupled=True),
    ],
    ids=str,
)
def test_bound_separates_convergence_from_divergence(rule: RMSprop | Adam) -> None:
    """Quadratics whose curvature is 0.99 and 1.01 of the bound in the metric P, for two weights of different v."""
    v = torch.tensor([0.5, 0.5, 20.0, 20.0], dtype=torch.float64)
    state = settled(rule, v)
    F = torch.tensor([0.99, 1.01] * 2, dtype=torch.float64) * rule.bound * rule.preconditioner(state)
    curvature = F - rule.coupled_decay
    w = torch.full_like(v, 1e-6)
    for _ in range(5000):  # at mom = .9 the factor is 1 ± 5e-4 a step
        w, state = rule.step(w, curvature * w, state)
        if w[1].abs() > 1e-3 and w[3].abs() > 1e-3:
            break
    assert w[[0, 2]].abs().max() < 1e-6
    assert w[[1, 3]].abs().min() > 1e-5


@every_rule
def test_a_constant_force_moves_weights_by_force_over_preconditioner(rule: RMSprop | Adam) -> None:
    """The gradient of L makes that of F constant, so averages and momentum settle."""
    force, w = torch.tensor([1.0, -2.0, 0.1], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    state = rule.init(w)
    for _ in range(800):
        now, (w, state) = w, rule.step(w, force - rule.coupled_decay * w, state)
    expected = force / rule.preconditioner(state) + rule.decoupled_decay * now
    # .99^800 = 3e-4 of the average is still missing; Adam's is corrected for that
    assert torch.allclose(now - w, expected, rtol=2e-4 if isinstance(rule, RMSprop) else 1e-12, atol=1e-15)


@every_rule
def test_relax_is_the_change_of_the_averages_in_a_step(rule: RMSprop | Adam) -> None:
    w, g = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.1], dtype=torch.float64)
    _, state = rule.step(w, 3 * g, rule.init(w))
    _, after = rule.step(w, g, state)
    averages = rule.averages(state)
    rates = rule.relax(averages, (g + rule.coupled_decay * w).square())
    assert rates.keys() == averages.keys() == state.keys() - {"momentum"}
    for name, rate in rates.items():
        assert torch.allclose(after[name] - state[name], rate, rtol=1e-12, atol=1e-16)
    assert rule.preconditioner(averages).shape == (3,)


@every_rule
def test_there_is_no_preconditioner_before_the_first_step(rule: UpdateRule) -> None:
    with pytest.raises(ValueError, match="no gradient has been averaged yet"):
        rule.preconditioner(rule.init(torch.ones(3)))


@every_rule
def test_one_number_for_all_weights_is_refused(rule: UpdateRule) -> None:
    with pytest.raises(TypeError, match="no threshold on the eigenvalues of ∇²L; compare the eigenvalues of M"):
        rule.threshold({})
    with pytest.raises(TypeError, match="no effective learning rate"):
        rule.effective_learning_rate(1.0, {})
    with pytest.raises(TypeError, match="no effective learning rate"):
        _ = rule.edge


def test_clock_is_known_where_decay_is_decoupled_or_absent() -> None:
    assert RMSprop(0.1).intrinsic_time_per_step == 0 == Adam(0.1).intrinsic_time_per_step
    assert Adam(0.1, weight_decay=0.02, decoupled=True).intrinsic_time_per_step == pytest.approx(0.002)
    assert math.isnan(RMSprop(0.1, weight_decay=0.02).intrinsic_time_per_step)
    assert math.isnan(Adam(0.1, weight_decay=0.02).intrinsic_time_per_step)
