"""Shallow networks: closed forms by other ways, the bounds in small, and what replacing an example means."""

import pytest
import torch

from sharpscope.optimizers.descend import descend
from sharpscope.optimizers.gd import GD
from sharpscope.studies.lei2022 import Config
from sharpscope.studies.lei2022 import shallow as net
from sharpscope.studies.lei2022.sphere_data import (
    INPUTS,
    RATE,
    TIMES,
    draw,
    excess_risks,
    hessians_along_training,
    on_single_examples,
    replace_examples,
)

GENERATOR = torch.Generator().manual_seed(0)


def test_output_gradient_and_hessian_are_those_of_autograd() -> None:
    x, y = draw(9, GENERATOR)
    W = torch.randn(2, 8 * INPUTS, generator=GENERATOR, dtype=torch.float64)
    units = W.view(2, 8, INPUTS)
    mu = net.signs(8)
    by_hand = torch.stack([mu[k] * torch.tanh(x @ units[1, k]) for k in range(8)]).sum(0)
    assert torch.allclose(net.output(W, x)[1], by_hand, rtol=1e-12)
    assert net.derivatives_mismatch(W, x, y) < 1e-12


def test_the_start_computes_nothing() -> None:
    x, _ = draw(9, GENERATOR)
    W = net.start(8, INPUTS, GENERATOR)[None]
    assert net.output(W, x).abs().max() < 1e-15
    assert net.signs(8).square().sum().item() == pytest.approx(1)


def test_runs_have_data_of_their_own() -> None:
    (x, y), (other_x, other_y) = draw(6, GENERATOR), draw(6, GENERATOR)
    W = torch.randn(2, 4 * INPUTS, generator=GENERATOR, dtype=torch.float64)
    losses, slopes = net.slope(W, torch.stack([x, other_x]), torch.stack([y, other_y]))
    for r, (own_x, own_y) in enumerate(((x, y), (other_x, other_y))):
        loss, g = net.slope(W[r : r + 1], own_x, own_y)
        assert torch.allclose(losses[r], loss[0]) and torch.allclose(slopes[r], g[0], rtol=1e-12)


@pytest.mark.parametrize("m", [4, 32])
def test_the_least_eigenvalue_keeps_its_bound_at_random_weights(m: int) -> None:
    """λ_min ≥ -(B/√m) mean|r|, for inputs of norm one; |tanh''| takes B at tanh² = 1/3."""
    z = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    bend = (2 * torch.tanh(z) * (1 - torch.tanh(z).square())).max().item()
    assert bend == pytest.approx(net.MAX_BEND, rel=1e-6)
    for _ in range(5):
        x, y = draw(7, GENERATOR)
        W = 2 * torch.randn(1, m * INPUTS, generator=GENERATOR, dtype=torch.float64)
        least = torch.linalg.eigvalsh(net.hessian(W, x, y)[0])[0].item()
        assert least >= -net.MAX_BEND / m**0.5 * (net.output(W, x) - y).abs().mean().item() - 1e-12


def test_one_example_more_or_less_moves_less_among_more() -> None:
    """ε² is about as 1/n²: sixteenfold from 16 to 64, here within a factor of 3 on one draw each."""
    few, many = (replace_examples(n, torch.Generator().manual_seed(1))[10]["stability"] for n in (16, 64))
    assert 16 / 3 < few / many < 48
    first = replace_examples(16, torch.Generator().manual_seed(1))[10]
    assert 0 < first["walked"] <= 1


def test_replacing_is_training_again() -> None:
    """The gap by its definition, run by run: mean over both directions of loss as a fresh example less as its own."""
    x, y = draw(16, torch.Generator().manual_seed(2))
    seen = replace_examples(16, torch.Generator().manual_seed(2))[10]
    generator = torch.Generator().manual_seed(2)
    draw(16, generator)
    other_x, other_y = draw(16, generator)
    first = net.start(64, INPUTS, generator)[None]

    def trained(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return descend(lambda W, t: net.slope(W, x, y), first, GD(RATE), 10).weights

    def loss(W: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 0.5 * (net.output(W, x[None]) - y).square().sum()

    gaps, W = [], trained(x, y)
    for i in range(16):
        new_x, new_y = x.clone(), y.clone()
        new_x[i], new_y[i] = other_x[i], other_y[i]
        V = trained(new_x, new_y)
        gaps += [loss(V, x[i], y[i]) - loss(W, x[i], y[i]), loss(W, other_x[i], other_y[i])]
        gaps[-1] = gaps[-1] - loss(V, other_x[i], other_y[i])
    assert seen["gap"] == pytest.approx(torch.stack(gaps).mean().item(), rel=1e-9)


def test_single_examples_average_to_the_whole() -> None:
    x, y = draw(3, GENERATOR, 2)
    W = torch.randn(2, 4 * INPUTS, generator=GENERATOR, dtype=torch.float64)
    step = on_single_examples(x, y, torch.Generator().manual_seed(0))
    mean = torch.stack([step(W, t)[1] for t in range(4000)]).mean(0)
    assert torch.allclose(mean, net.slope(W, x, y)[1], atol=0.02)  # standard error of one entry: about .005


def test_risk_of_a_start_is_that_of_zero() -> None:
    x, y = draw(16, GENERATOR, 2)
    fresh, _ = draw(50, GENERATOR)
    first = torch.stack([net.start(8, INPUTS, GENERATOR) for _ in range(2)])
    still = excess_risks(lambda W, t: (torch.zeros(2, dtype=W.dtype), torch.zeros_like(W)), first, fresh)
    zero = 0.5 * (torch.sin(2 * fresh[:, 0]) + 0.5 * fresh[:, 1]).square().mean()
    assert still.shape == (len(TIMES), 2) and torch.allclose(still, zero.expand_as(still), rtol=1e-12)
    assert excess_risks(lambda W, t: net.slope(W, x, y), first, fresh).max() < zero


def test_along_training_the_bound_shrinks_with_the_residuals() -> None:
    x, y = draw(9, GENERATOR)
    steps, hessians, bounds = zip(*hessians_along_training(net.start(8, INPUTS, GENERATOR)[None], x, y), strict=True)
    assert steps == (0, 10, 30, 100) and bounds[-1] < bounds[0]
    assert bounds[0] == pytest.approx(net.MAX_BEND / 8**0.5 * y.abs().mean().item(), rel=1e-12)
    for H, bound in zip(hessians, bounds, strict=True):
        assert torch.linalg.eigvalsh(H)[0] >= -bound


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="draws is 0; it must be positive"):
        Config(draws=0)
    with pytest.raises(ValueError, match="16 examples are replaced one by one"):
        Config(sizes=(8, 32))
    with pytest.raises(ValueError, match="units come in pairs"):
        Config(widths=(15,))
