"""Weight-normalized ReLU networks: the kernel against dense sums, gradients in closed form, steps that diverge."""

import numpy as np
import pytest
import torch

from sharpscope.autodiff.batched import BatchedRuns, gram
from sharpscope.optimizers.descend import descend
from sharpscope.optimizers.gd import GD
from sharpscope.studies.dukler2020 import Config
from sharpscope.studies.dukler2020.weightnorm import MAX_GROWTH, ReluNet, relative_difference


def network(scale: float | None, width: int = 40) -> ReluNet:
    return ReluNet.draw(width, (0,), scale, examples=6, inputs=4)


def moved(net: ReluNet, seed: int = 1) -> torch.Tensor:
    """Weights away from the start, some lengths of either sign."""
    w = net.start
    return w + 0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=w.dtype) * w.abs().mean()


@pytest.mark.parametrize("scale", (0.3, 1.0, 5.0))
def test_alpha_does_not_change_the_first_function(scale: float) -> None:
    net, plain = network(scale), network(None)
    assert torch.allclose(net.outputs(net.start[None]), plain.outputs(plain.start[None]), rtol=1e-12)
    assert float(net.x.norm(dim=1).max()) == pytest.approx(1) and float(net.y.abs().max()) == 1


@pytest.mark.parametrize("scale", (0.3, 1.0, 5.0))
def test_the_kernel_is_that_of_autograd_and_of_sums_over_rows(scale: float) -> None:
    net = network(scale)
    w = moved(net)
    assert relative_difference(net.kernel(w), gram(net.outputs, w[None])[0]) < 1e-12
    v, g = w[:160].view(40, 4).numpy(), w[160:].numpy()
    x, V, G = net.x.numpy(), np.zeros((6, 6)), np.zeros((6, 6))
    for row, length in zip(v, g, strict=True):
        unit = row / np.linalg.norm(row)
        on = (length * x @ unit > 0).astype(float)
        across = x - np.outer(x @ unit, unit)
        V += (scale * length / np.linalg.norm(row)) ** 2 * np.outer(on, on) * (across @ across.T) / 40
        G += np.outer(on * (x @ unit), on * (x @ unit)) / 40
    for found, dense in zip(net.kernel_parts(w), (V, G), strict=True):
        assert np.allclose(found.numpy(), dense, rtol=1e-12, atol=1e-14)


def test_at_the_start_the_two_halves_make_the_plain_kernel() -> None:
    plain = network(None)
    kernel = gram(plain.outputs, plain.start[None])[0]
    active = (plain.x @ plain.rows.T > 0).double()
    assert torch.allclose(kernel, (active @ active.T) * (plain.x @ plain.x.T) / 40, rtol=1e-12)
    assert relative_difference(plain.kernel(moved(plain)), gram(plain.outputs, moved(plain)[None])[0]) < 1e-12
    for net in map(network, (0.5, 4.0)):
        V, G = net.kernel_parts(net.start)
        assert relative_difference(V + G, kernel) < 1e-12
        assert relative_difference(net.kernel(net.start), kernel) > 0.1  # but with α the sum is another


def test_the_gradient_in_closed_form_is_orthogonal_to_the_rows() -> None:
    net = network(0.5)
    w = moved(net)
    losses, (slope,) = BatchedRuns(net.losses).value_and_grad(w[None])
    r = net.outputs(w[None])[0] - net.y
    assert float(losses) == pytest.approx(0.5 * float(r @ r))
    (v,), (g,) = net.split(w[None])
    size = v.norm(dim=1, keepdim=True)
    unit = v / size
    pull = net.signs[:, None] / 40**0.5 * (((g * (net.x @ unit.T) > 0) * r[:, None]).T @ net.x)
    radial = (pull * unit).sum(1)
    across = (g / size[:, 0])[:, None] * (pull - radial[:, None] * unit)
    assert torch.allclose(slope, torch.cat([across.flatten(), radial]), atol=1e-14)
    assert float((across * v).sum(1).abs().max()) < 1e-14


def test_lengths_follow_their_law_and_without_normalization_they_do_not() -> None:
    for scale, low, high in ((0.5, 0, 1e-13), (4.0, 0, 1e-13), (None, 1e-3, 100)):
        net = network(scale)
        assert low <= net.length_mismatch(1 / net.kernel_range(net.start)[1], 20) < high


def test_a_wide_network_keeps_below_its_bound() -> None:
    for scale in (0.5, 4.0):
        net = network(scale, 600)
        low, high = net.kernel_range(net.start)
        loss, end = net.descent(1 / high, 1e-3)
        assert loss[-1] <= 1e-3 and net.kernel_range(end)[0] > low / 2
        assert (loss[1:] * np.exp(low * np.arange(1, len(loss)) / high)).max() < 1
        end = descend(BatchedRuns(net.losses).slope, net.start[None], GD(1 / high), len(loss) - 1).weights[0]
        change = torch.linalg.matrix_norm(net.kernel(end) - net.kernel(net.start), 2)
        assert net.kernel_drift(1e-3) == pytest.approx(float(change) / high)


def test_a_sweep_is_each_descent_alone_and_counts_no_run_that_exploded() -> None:
    net = network(1.0, 200)
    high = net.kernel_range(net.start)[1]
    rates = [k * 2 / high for k in (0.1, 0.5, 30.0)]
    slow, fast, wild = net.descents(rates, 1e-3, 1000)
    for end, rate in ((slow, rates[0]), (fast, rates[1])):
        loss, alone = net.descent(rate, 1e-3, 1000)
        assert end.converged and end.steps == len(loss) - 1
        assert torch.allclose(end.weights, alone, rtol=1e-10)
        assert end.growth == pytest.approx(net.growth(alone))
    assert slow.steps > 50 > fast.steps  # one of them needs more than the first stretch
    assert not wild.converged and wild.growth > MAX_GROWTH
    (short,) = net.descents(rates[:1], 1e-3, 7)
    assert short.steps == 7 and not short.converged


def test_small_alpha_stands_longer_steps_and_large_alpha_does_not() -> None:
    longest, factors = {}, (0.5, 1.2, 2.0, 4.0, 8.0)
    for scale in (None, 0.5, 4.0):
        net = network(scale, 200)
        edge = 2 / net.kernel_range(net.start)[1]
        found = net.descents([k * edge for k in factors], 1e-3, 500)
        longest[scale] = max(k for k, end in zip(factors, found, strict=True) if end.converged)
    assert longest[0.5] > longest[None] and longest[4.0] <= longest[None]


def test_nonsense_is_refused() -> None:
    for wrong in ({"repeats": 0}, {"scales": (0.5, -1.0)}, {"width": -3}, {"factors": (float("nan"),)}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} is .*; it must be positive"):
            Config(**wrong)
