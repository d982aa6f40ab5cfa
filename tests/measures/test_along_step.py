"""Measures along a step, against closed forms of parabolas and dense Hessians by plain autograd."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPE, generator, normal, objective, reference
from torch import Tensor, nn

from sharpscope import Objective
from sharpscope.errors import InvalidValue, NotConverged
from sharpscope.measures.along_step import (
    StepGain,
    batch_sharpness,
    critical_step,
    curvature_along_step,
    noise_scale,
    step_gain,
)

NETS = ["BatchNorm1d", "GroupNorm of images", "MultiheadAttention"]


def line(loss: nn.Module, at: float) -> Objective:
    """A loss of one weight, the output of a module without data."""
    net = nn.Linear(1, 1, bias=False, dtype=DTYPE)
    nn.init.constant_(net.weight, at)
    one = torch.ones(1, 1, dtype=DTYPE)
    return Objective(net, lambda output, target: loss(output).mean(), [(one, one)])


class Power(nn.Module):
    """``|x|^p / p``."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().pow(self.p) / self.p


@pytest.mark.parametrize("norm", NETS)
def test_gain_and_curvature_along_a_step(norm: str) -> None:
    f, total = objective(norm), reference(norm)
    w = f.weights()
    g, h = torch.autograd.functional.jacobian(total, w), torch.autograd.functional.hessian(total, w)
    for scale in (1e-3, 0.1):
        step = -scale * g + 0.1 * scale * normal(f.size, seed=1) * g.norm() / f.size**0.5
        gain, slope = step_gain(f, w, step), (g @ step).item()
        assert gain.loss == pytest.approx(total(w).item(), rel=1e-12)
        assert gain.slope == pytest.approx(slope, rel=1e-12)
        assert gain.edge == pytest.approx(1 - (total(w + step) - total(w)).item() / slope, abs=1e-9)  # rounding / slope
        assert gain.ratio == 1 - gain.edge
        curvature = (step @ h @ step).item() / (-2 * slope)
        assert curvature_along_step(f, w, step) == pytest.approx(curvature, rel=1e-10)
    assert step_gain(f, w, -1e-4 * g).edge == pytest.approx(curvature_along_step(f, w, -1e-4 * g), rel=1e-2)  # O(‖Δ‖²)
    assert math.isnan(step_gain(f, w, g).edge) and math.isnan(curvature_along_step(f, w, g))  # uphill
    assert math.isnan(step_gain(f, w, torch.zeros_like(w)).edge)


def test_there_is_no_value_where_rounding_hides_the_change() -> None:
    assert StepGain(1.0, -1e-3, -2e-3, 9e-5).edge == 0.5
    assert math.isnan(StepGain(1.0, -1e-3, -2e-3, 1.1e-4).edge)  # 5 % of the slope
    assert StepGain(1.0, 0.0, -2e-3, 9e-5).edge == 1.0  # the change itself may be zero: that is the edge
    assert math.isnan(StepGain(1.0, math.inf, -2e-3, 0.0).edge) and math.isnan(StepGain(1.0, math.nan, -1.0, 0.0).edge)


@pytest.mark.parametrize("loss", [F.mse_loss, F.cross_entropy])
def test_the_estimate_of_rounding_covers_the_error(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Also of a loss that is fitted, whose logarithms cancel.

    The estimate is the largest of three samples of the noise: one in a hundred errors may be five times as large.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 2))
    x, y = normal(32, 8, seed=1).float(), torch.tanh(normal(32, 2, seed=2)).float()
    batch = (x, y if loss is F.mse_loss else (y[:, 0] > 0).long())
    f, adam = Objective(net, loss, [batch]), torch.optim.Adam(net.parameters(), lr=0.02)
    double, errors = f.in_double(), []
    for _ in range(150):
        before = f.weights()
        adam.zero_grad()
        loss(net(batch[0]), batch[1]).backward()
        adam.step()
        now, gain = f.weights(), step_gain(f, before, f.weights() - before)
        value, g = double.value_and_grad(before.double())
        change, slope = double.value(now.double()) - value, g @ (now.double() - before.double())
        errors.append(abs(gain.change - change.item()) / gain.rounding)
        if not math.isnan(gain.edge):
            assert gain.edge == pytest.approx(1 - (change / slope).item(), abs=0.1)  # twice `ROUNDING`
    errors.sort()
    assert 0.1 < errors[75] < 1 and errors[148] < 5


@pytest.mark.parametrize("p", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("reach", [0.03, 0.4, 3.0])
def test_critical_length(p: float, reach: float) -> None:
    """A step of a fraction `reach` of the distance from w = 1 to the minimum at 0: the old loss is met at w = -1."""
    f = line(Power(p), 1.0)
    step = torch.tensor([-reach], dtype=DTYPE)
    found = critical_step(f, torch.ones(1, dtype=DTYPE), step)
    assert found == pytest.approx(2 / reach, rel=0.02)  # the ratio there has slope -1/c for parabolas, more for p > 2


def test_a_critical_length_that_does_not_exist() -> None:
    f = line(nn.Softplus(), 0.0)
    with pytest.raises(NotConverged, match="12 forward passes"):
        critical_step(f, f.weights(), torch.full((1,), -1.0, dtype=DTYPE))
    with pytest.raises(InvalidValue, match="downhill"):
        critical_step(f, f.weights(), torch.full((1,), 1.0, dtype=DTYPE))
    with pytest.raises(InvalidValue, match=r"weights \(1,\) and step \(2,\) must be the flat vectors \(1,\)"):
        step_gain(f, f.weights(), torch.ones(2, dtype=DTYPE))


def test_batch_sharpness_is_the_mean_over_batches() -> None:
    f = objective("LayerNorm")
    w, found = f.weights(), []
    for batch in f.data:
        one = Objective(f.model, f.loss, [batch])
        g, h = one.grad(w), torch.stack([one.hvp(w, e) for e in torch.eye(f.size, dtype=DTYPE)])
        found.append(((g @ h @ g) / (g @ g)).item())
    values = torch.tensor(found, dtype=DTYPE)
    measured = batch_sharpness(f, w)
    assert measured.value == pytest.approx(values.mean().item(), rel=1e-10)
    assert measured.standard_error == pytest.approx(values.std().item() / 3**0.5, rel=1e-10)
    assert measured.batches == 3


def gaussian_gradients(k: int, b: int, size: int, spread: float, seed: int) -> Objective:
    """Examples x_i ~ N(0, spread² I) of ``‖w - x‖²/2``: G = w - mean, tr Σ = size · spread²."""
    x = spread * torch.randn(k, b, size, generator=generator(seed), dtype=DTYPE)
    net = nn.Linear(size, 1, bias=False, dtype=DTYPE)
    nn.init.constant_(net.weight, 0.1)
    return Objective(
        net, lambda output, target: (net.weight - target).square().sum() / (2 * len(target)), [(t, t) for t in x]
    )


def test_noise_scale_and_its_interval() -> None:
    """tr Σ/‖G‖² = 20 · 1/(20 · .01) = 100 examples, inside the intervals of 95 % for at least 9 in 10 draws."""
    inside, values = 0, []
    for seed in range(60):
        found = noise_scale(gaussian_gradients(8, 32, 20, 1.0, seed), torch.full((20,), 0.1, dtype=DTYPE))
        inside += found.interval[0] <= 100 <= found.interval[1]
        values.append(found.value)
        assert found.interval[0] <= found.value <= found.interval[1]
    assert inside >= 54
    assert sorted(values)[30] == pytest.approx(100, rel=0.2)


def test_a_gradient_that_is_not_told_from_zero_has_no_upper_end() -> None:
    found = noise_scale(gaussian_gradients(4, 4, 20, 10.0, 0), torch.full((20,), 0.1, dtype=DTYPE))
    assert found.interval[1] == math.inf and found.interval[0] < 1e6


def test_noise_scale_needs_batches_of_one_size() -> None:
    with pytest.raises(InvalidValue, match=r"one size; these have \[4, 7, 5\]"):
        noise_scale(objective(), objective().weights())
    f = gaussian_gradients(4, 8, 5, 1.0, 0)
    shorter = f.on([*f.data, tuple(t[:3] for t in next(iter(f.data)))])
    assert noise_scale(shorter, f.weights()) == noise_scale(f, f.weights())
