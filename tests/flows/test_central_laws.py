"""What the central flow promises at the edge, where weights decay: against the dense Hessian."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import sharpscope as ss
from sharpscope.optimizers import UpdateRule
from sharpscope.optimizers.base import State


@dataclass(frozen=True)
class DecoupledDescent(UpdateRule):
    """Gradient descent whose weight decay does not pass through the gradient: ``w ← (1 - lr·wd) w - lr ∇L(w)``."""

    learning_rate: float
    weight_decay: float

    def init(self, w: Tensor) -> State:
        return {}

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        return (1 - self.decoupled_decay) * w - self.learning_rate * g, state

    def threshold(self, state: State) -> float:
        return 2 / self.learning_rate

    def effective_learning_rate(self, radius: float, state: State) -> float:
        return self.learning_rate / radius**2

    @property
    def edge(self) -> float:
        return 2.0

    @property
    def intrinsic_time_per_step(self) -> float:
        return self.decoupled_decay

    @property
    def decoupled_decay(self) -> float:
        return self.learning_rate * self.weight_decay

    def preconditioner(self, state: State) -> Tensor:
        return torch.tensor(1 / self.learning_rate, dtype=torch.float64)


def problem(seed: int) -> tuple[ss.Objective, Tensor, Tensor]:
    """A network, its weights, and its dense Hessian there."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.randn(30, 3, dtype=torch.float64)
    f = ss.Objective(net, nn.functional.mse_loss, [(x, (2 * x[:, :1]).sin())])
    w = f.weights()
    return f, w, ss.hessian(f, w).dense()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_decoupled_decay_is_part_of_what_holds_the_edge(seed: int) -> None:
    """The covariance is the one with which the curvature stays at the bound although decay moves the weights, too.

    Decay with a negative rate makes these networks sharper, so that the oscillation has something to hold against.
    """
    f, w, h = problem(seed)
    rate = 2 / torch.linalg.eigvalsh(h)[-1].item()
    rule = DecoupledDescent(rate, -0.5)
    flow = ss.flows.central(f, rule)
    motion = flow.local(w, {}).motion(w, {}, 1.0)
    assert motion.covariance.diagonal().sum() > 0  # it is held, and not merely below

    def top(step: float) -> float:
        return rate * torch.linalg.eigvalsh(ss.hessian(f, w + step * motion.velocity).dense())[-1].item()

    reach = 1e-4 / motion.velocity.norm().item()
    slope = (top(reach) - top(-reach)) / (2 * reach)
    free = -rate * f.grad(w) - rule.decoupled_decay * w
    unheld = ss.flows.stable(f, rule).local(w, {}).motion(w, {}, 1.0)
    assert torch.allclose(unheld.velocity, free, rtol=1e-12)
    growth = rate * torch.linalg.eigvalsh(ss.hessian(f, w + reach * free).dense())[-1].item()
    assert abs(slope) < 1e-3 * abs((growth - top(0.0)) / reach)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_mean_loss_is_that_of_the_loss_without_its_decay(weight_decay: float) -> None:
    """``L + ½⟨Σ, ∇²L⟩``, though the flow descends ``F = L + (wd/2)‖w‖²``."""
    f, w, h = problem(1)
    rule = ss.GD(2 / (torch.linalg.eigvalsh(h)[-1].item() + weight_decay), weight_decay)
    local = ss.flows.central(f, rule).local(w, {})
    covariance = 1e-3 * torch.eye(local.modes.shape[1], dtype=torch.float64)
    motion = local.motion_of(
        torch.zeros_like(w), covariance, value=f.value(w).item(), average_rates={}, curvatures=local.curvatures
    )
    sigma = motion.modes @ covariance @ motion.modes.T
    assert motion.modes.shape[1] >= 1
    assert motion.loss == pytest.approx(f.value(w).item() + 0.5 * (sigma * h).sum().item(), rel=1e-10)
