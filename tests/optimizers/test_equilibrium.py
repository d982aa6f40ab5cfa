"""The angle at which settled scale-invariant weights turn [N35]: against a simulation with random gradients."""

import math

import pytest
import torch
from torch import Tensor

from sharpscope.optimizers import GD, Adam, UpdateRule
from sharpscope.symmetry.sphere import angle

SIZE = 4000
"""Weights: in so many dimensions random gradients are orthogonal to each other and to the weights, to 2 %."""


def settled_angle(rule: UpdateRule, steps: int, norm: float) -> float:
    """Root mean square of the angle per step over the last quarter of a run from weights of this norm.

    The loss is scale-invariant: its gradient is orthogonal to w and falls like 1/‖w‖.
    """
    g = torch.Generator().manual_seed(0)
    w = torch.randn(SIZE, generator=g, dtype=torch.float64)
    w *= norm / w.norm()
    state, squares = rule.init(w), []
    for step in range(steps):
        noise: Tensor = torch.randn(SIZE, generator=g, dtype=torch.float64)
        noise -= (noise @ w) / (w @ w) * w
        new, state = rule.step(w, noise / (SIZE**0.5 * w.norm()), state)
        if step > 0.75 * steps:
            squares.append(angle(w, new).item() ** 2)
        w = new
    return math.sqrt(sum(squares) / len(squares))


@pytest.mark.parametrize(
    "rule",
    [
        GD(0.1, 0.05),
        GD(0.1, 0.05, 0.5),
        GD(0.1, 0.05, 0.5, dampening=0.4),
        GD(0.1, 0.05, 0.9, dampening=0.9),
    ],
    ids=str,
)
def test_gradient_descent_turns_as_predicted(rule: GD) -> None:
    """From the norm that balances growth and decay, ``‖w‖⁴ = (lr/2wd) ..``; the law is of first order in il = 5e-3."""
    norm = (0.1 / (2 * 0.05)) ** 0.25
    assert settled_angle(rule, 1600, norm) == pytest.approx(rule.equilibrium, rel=0.04)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_adamw_turns_as_predicted(beta1: float) -> None:
    """Steps have equal length, so that ``‖w‖ = √(P lr/2wd)`` in balance; β2 is near one, so that v stands still."""
    rule = Adam(1e-2, beta1, 0.9999, weight_decay=0.5, decoupled=True)
    norm = math.sqrt(SIZE * 1e-2 / (2 * 0.5))
    assert settled_angle(rule, 1200, norm) == pytest.approx(rule.equilibrium, rel=0.05)
