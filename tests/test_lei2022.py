"""Shallow networks: closed forms by other ways, the bounds in small, and what replacing an example means."""

import pytest
import torch

from sharpscope.replicas import Replicas
from sharpscope.studies import _shallow as net
from sharpscope.studies.lei2022 import INPUTS, Config, draw, replaced, singly, two_ways

GENERATOR = torch.Generator().manual_seed(0)


def test_output_gradient_and_hessian_are_those_of_autograd() -> None:
    x, y = draw(9, GENERATOR)
    W = torch.randn(2, 8 * INPUTS, generator=GENERATOR, dtype=torch.float64)
    units = W.view(2, 8, INPUTS)
    mu = net.signs(8)
    by_hand = torch.stack([mu[k] * torch.tanh(x @ units[1, k]) for k in range(8)]).sum(0)
    assert torch.allclose(net.output(W, x)[1], by_hand, rtol=1e-12)
    assert two_ways(W, x, y) < 1e-12


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
    assert bend == pytest.approx(net.BEND, rel=1e-6)
    for _ in range(5):
        x, y = draw(7, GENERATOR)
        W = 2 * torch.randn(1, m * INPUTS, generator=GENERATOR, dtype=torch.float64)
        least = torch.linalg.eigvalsh(net.hessian(W, x, y)[0])[0].item()
        assert least >= -net.BEND / m**0.5 * (net.output(W, x) - y).abs().mean().item() - 1e-12


def test_one_example_more_or_less_moves_less_among_more() -> None:
    """ε² is about as 1/n²: sixteenfold from 16 to 64, here within a factor of 3 on one draw each."""
    few, many = (replaced(n, torch.Generator().manual_seed(1))[10]["stability"] for n in (16, 64))
    assert 16 / 3 < few / many < 48
    first = replaced(16, torch.Generator().manual_seed(1))[10]
    assert 0 < first["walked"] <= 1


def test_single_examples_average_to_the_whole() -> None:
    x, y = draw(6, GENERATOR)
    W = torch.randn(1, 4 * INPUTS, generator=GENERATOR, dtype=torch.float64)
    step = singly(x, y, torch.arange(6))
    mean = torch.stack([step(W, t)[1] for t in range(6)]).mean(0)
    assert torch.allclose(mean, Replicas(lambda W: 0.5 * (net.output(W, x) - y).square().mean(1)).grad(W), rtol=1e-10)


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="draws is 0; it must be positive"):
        Config(draws=0)
    with pytest.raises(ValueError, match="16 examples are replaced one by one"):
        Config(sizes=(8, 32))
    with pytest.raises(ValueError, match="units come in pairs"):
        Config(widths=(15,))
