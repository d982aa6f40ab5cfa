"""Weight decay inside the gradient, as the stability of a step sees it: against the dense problem."""

import pytest
import torch
from torch import Tensor, nn

import sharpscope as ss
from sharpscope.measures import Iterate
from sharpscope.optimizers import Stability


def problem() -> ss.Objective:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(24, 3, dtype=torch.float64)
    return ss.Objective(net, nn.functional.mse_loss, [(x, x[:, :1].sin())])


def dense_top(f: ss.Objective, metric: Tensor, decay: Tensor) -> float:
    """``λ1(M^-½ (∇²L + D) M^-½)`` from the matrix."""
    h = ss.hessian(f).dense()
    shifted = (h + h.T) / 2 + torch.diag(decay.expand(f.size))
    root = metric.expand(f.size).sqrt()
    return torch.linalg.eigvalsh(shifted / root[:, None] / root)[-1].item()


@pytest.mark.parametrize("weight_decay", [0.05, 0.5])
def test_decay_of_gradient_descent_counts_in_the_effective_curvature(weight_decay: float) -> None:
    """Value and bound from above: the decay is as large as the curvature, so leaving it out would be seen."""
    f, rule = problem(), ss.GD(0.1, weight_decay)
    top = Iterate(f, f.weights(), rule, rtol=1e-7).effective_top
    exact = dense_top(f, torch.tensor(2 / 0.1, dtype=torch.float64), torch.tensor(weight_decay, dtype=torch.float64))
    assert top.values[0].item() == pytest.approx(exact, rel=1e-7)
    assert exact <= top.upper < 1.05 * exact  # the bound is close where the solver has converged


def test_decay_that_differs_between_weights_counts_as_the_eigenvector_sees_it() -> None:
    """To first order in the differences, since the vectors are those of the Hessian alone: the error is of second."""
    f = problem()
    metric = torch.tensor(20.0, dtype=torch.float64)
    errors = []
    for size in (2e-2, 1e-2):
        decay = size * torch.linspace(0, 1, f.size, dtype=torch.float64)
        it = Iterate(f, f.weights(), rtol=1e-9, stability=Stability(metric, decay))
        exact = dense_top(f, metric, decay)
        plain = dense_top(f, metric, torch.zeros(1, dtype=torch.float64))
        errors.append(abs(it.effective_top.values[0].item() - exact))
        assert errors[-1] < 0.1 * (exact - plain)
        assert exact <= it.effective_top.upper
    assert errors[1] < 0.35 * errors[0]
