"""Scaled residual networks as particles: closed forms against autograd, the density along paths, the flow's rate."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sharpscope.autodiff.batched import BatchedRuns, gram, jacobian
from sharpscope.optimizers.descend import descend
from sharpscope.optimizers.gd import GD
from sharpscope.studies.chen2024 import Config
from sharpscope.studies.chen2024.meanfield import ResidualNet
from sharpscope.studies.chen2024.particles import ParticleFlow, divergence_gap, examples, starts, velocity_jacobians

X, Y = examples(7, 4, (0,))
BETA = torch.tensor([[2.0], [6.0]], dtype=torch.float64)
BLOCK_SCALES = {"scaled": lambda L, M: 1 / (L * M), "1/M": lambda L, M: 1 / M, "1/√M": lambda L, M: M**-0.5}
NET = ResidualNet.scaled(4, 3, 5, 6, BETA)


def weights(net: ResidualNet = NET, rows: int = 2, noise: float = 0.3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    W = torch.stack([net.start(draw) for _ in range(rows)])
    return W + noise * torch.randn(W.shape, generator=draw, dtype=W.dtype)


def test_the_forward_pass_is_its_sums() -> None:
    W = weights()
    found = NET.outputs(W, X)
    for r in range(2):
        u, w, b, a, c, e = (part[r].numpy() for part in NET.split(W))
        for i, x in enumerate(X.numpy()):
            z = x.copy()
            for l in range(3):
                z = z + sum(u[l, m] * np.tanh(w[l, m] @ z + b[l, m]) for m in range(5)) / 15
            f = float(BETA[r]) / 6 * sum(a[k] * np.tanh(c[k] @ z + e[k]) for k in range(6))
            assert float(found[r, i]) == pytest.approx(f, rel=1e-12)


def test_the_start_is_the_zero_function_with_the_stated_deviations() -> None:
    net = ResidualNet.scaled(4, 3, 5, 2000, 3.0)
    w = net.start(torch.Generator().manual_seed(1))[None]
    assert float(net.outputs(w, X).abs().max()) < 1e-12
    sigma = net.deviations()
    assert torch.allclose((w[0] / sigma)[-12000:].std(), torch.ones((), dtype=w.dtype), atol=0.03)
    assert sorted(set(sigma.tolist())) == [1.0, 2.0]


def test_velocities_are_scaled_gradients() -> None:
    W = weights()
    losses, g = BatchedRuns(lambda W: (NET.outputs(W, X) - Y).square().sum(1) / 14).value_and_grad(W)
    found = NET.evaluate(W, X, Y)
    assert torch.allclose(found.losses, losses, rtol=1e-12)
    assert torch.allclose(found.slopes, g * NET.rates(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("scale", (1 / 15, 1 / 5, 5**-0.5))
def test_the_kernel_is_that_of_autograd_and_the_speed_of_the_loss(scale: float) -> None:
    net, W = replace(NET, block_scale=scale), weights()
    G = net.gram(W, X)
    assert torch.allclose(G, gram(lambda W: net.outputs(W, X), W, net.rates()), rtol=1e-10, atol=1e-13)
    now = net.evaluate(W, X, Y)
    r = net.outputs(W, X) - Y
    speed = -(now.slopes.square() / net.rates()).sum(1)
    assert torch.allclose(speed, -torch.einsum("ri,rij,rj->r", r, G, r) / 49, rtol=1e-10)


def test_the_divergence_of_output_units_is_the_trace_of_a_jacobian_in_a_fixed_law() -> None:
    W = weights()
    now = NET.evaluate(W, X, Y)
    velocity, found = NET.split(now.slopes), velocity_jacobians(NET, W, X, Y)
    for r in range(2):
        a, c, e = (part[r] for part in NET.split(W)[3:])
        field = replace(NET, strength=float(BETA[r])).field(W[r : r + 1], X, Y)
        there = torch.cat([velocity.a[r][:, None], velocity.c[r], velocity.e[r][:, None]], 1)
        units = torch.cat([a[:, None], c, e[:, None]], 1)
        assert torch.allclose(-field(units), there, rtol=1e-12)
        assert torch.equal(jacobian(field, units), found[r])
        trace = found[r].diagonal(dim1=1, dim2=2).sum(1).mean()
        assert float(now.output_divergence[r]) == pytest.approx(float(trace), rel=1e-9)
    assert divergence_gap(NET, W, X, Y) < 1e-12


def test_the_divergence_of_block_units_is_that_of_a_visitor_who_leaves_the_law_as_it_is() -> None:
    """A copy of a unit and its mirror (-u, w, b) add up to nothing: moved together they feel a fixed field."""
    net, W, h = replace(NET, strength=3.0), weights(rows=1), 1e-5
    u, w, b, *rest = (part[0] for part in net.split(W))
    rows, places = [], []
    for l, m, j, sign in ((l, m, j, s) for l in range(3) for m in range(5) for j in range(9) for s in (1, -1)):
        visitor = torch.cat([u[l, m], w[l, m], b[l, m, None]])
        visitor[j] += sign * h
        more = torch.zeros(3, 2, 9, dtype=W.dtype)
        more[l] = visitor
        more[l, 1, :4] *= -1
        blocks = (torch.cat([u, more[..., :4]], 1), torch.cat([w, more[..., 4:8]], 1), torch.cat([b, more[..., 8]], 1))
        rows.append(torch.cat([part.flatten() for part in (*blocks, *rest)]))
        places.append((l, j, sign))
    crowded = replace(net, width=7)
    now = crowded.evaluate(torch.stack(rows), X, Y)
    assert torch.allclose(now.losses, net.evaluate(W, X, Y).losses, rtol=1e-12)
    parts = crowded.split(now.slopes)
    slopes = torch.cat([parts.u[:, :, 5], parts.w[:, :, 5], parts.b[:, :, 5, None]], 2)
    total = sum(-sign * float(slopes[row, l, j]) / (2 * h) for row, (l, j, sign) in enumerate(places))
    assert float(net.evaluate(W, X, Y).block_divergence) == pytest.approx(total / 15, rel=1e-6)  # h² + 1e-16/h


@pytest.mark.parametrize("scaling", BLOCK_SCALES)
def test_the_jacobian_of_the_blocks_is_that_of_autograd(scaling: str) -> None:
    net, w = replace(NET, block_scale=BLOCK_SCALES[scaling](3, 5)), weights(rows=1)
    found = jacobian(lambda x: net.features(w, x)[0], X)
    assert torch.allclose(net.input_jacobian(w[0], X), found, rtol=1e-10, atol=1e-13)


def test_without_the_depth_in_the_divisor_deep_networks_stretch_inputs() -> None:
    longest = {}
    for scaling, scale in BLOCK_SCALES.items():
        for depth in (4, 32):
            net = ResidualNet(4, depth, 16, 2, strength=1.0, block_scale=scale(depth, 16))
            slopes = net.input_jacobian(net.start(torch.Generator().manual_seed(2)), X)
            longest[scaling, depth] = float(torch.linalg.matrix_norm(slopes, 2).median())
    assert longest["scaled", 32] < 1.2 * longest["scaled", 4]
    assert longest["1/√M", 32] > 5 * longest["1/√M", 4]


def test_the_flow_keeps_below_its_bound_and_stops_in_time() -> None:
    net = ResidualNet.scaled(4, 3, 8, 16, torch.tensor([[4.0], [32.0]], dtype=torch.float64))
    flow = ParticleFlow(net, X, Y, starts(net, 0).expand(2, -1), fraction=0.1).run()
    assert flow.arrived and bool((flow.losses > 0.5 * flow.level).all())
    assert flow.evidence["over_bound"] <= 1 and flow.evidence["kept"] > 0.5
    kl, msd = flow.movement()
    assert 20 < float(msd[0] / msd[1]) < 100 and 20 < float(kl[0] / kl[1]) < 100  # β⁻²: 64
    assert float(flow.times[0] / flow.times[1]) == pytest.approx(64, rel=0.5)


def test_a_flow_is_descent_with_the_rates_of_units() -> None:
    net = ResidualNet.scaled(4, 3, 8, 16, 4.0)
    start = starts(net, 0)
    flow = ParticleFlow(net, X, Y, start, fraction=0.7).run()  # before the kernel is computed again
    assert len(flow.curve) <= 6 and len(flow.kernels) == 2
    f = BatchedRuns(lambda W: (net.outputs(W, X) - Y).square().sum(1) / 14)
    dt = 0.3 * 7 / float(torch.linalg.eigvalsh(net.gram(start, X))[0, -1])
    steps = round(float(flow.times) / dt)

    def slope(W: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        losses, g = f.value_and_grad(W)
        return losses, g * net.rates()

    assert torch.allclose(descend(slope, start, GD(dt), steps).weights, flow.weights, rtol=1e-9)


def test_divergences_sum_to_the_volume_of_the_map_as_steps_become_short() -> None:
    net = ResidualNet.scaled(4, 2, 8, 8, 4.0)

    def error(step: float) -> float:
        flow = ParticleFlow(net, X, Y, starts(net, 0), fraction=0.3, step=step, volumes=True)
        return abs(flow.run().by_volume - 1)

    assert error(0.05) < 0.6 * error(0.1) < 0.03


def test_the_divergence_of_laws_is_that_of_normal_laws_for_a_map_that_is_known() -> None:
    """Units moved by ω → 2ω in a flow of constant divergence log 2 per coordinate: KL of N(0, 4) from N(0, 1)."""
    net = ResidualNet.scaled(4, 2, 8, 40000, 4.0)
    flow = ParticleFlow(net, X[:1], Y[:1], starts(net, 0), fraction=0.9)
    flow.weights, flow.outward = 2 * flow.start, flow.outward + 6 * np.log(2)
    assert float(flow.movement()[0]) == pytest.approx(6 * (3 / 2 - np.log(2)), rel=0.03)  # half the units are drawn
    assert float(flow.movement()[1]) == pytest.approx(6, rel=0.03)


def test_a_run_that_diverges_is_no_evidence() -> None:
    net = ResidualNet.scaled(4, 2, 8, 8, 4.0)
    flow = ParticleFlow(net, X, Y, starts(net, 0), fraction=0.3, step=1e9).run()
    assert not flow.arrived
    assert flow.evidence["arrived"] == 0


def test_lazy_units_stand_still_and_others_do_not() -> None:
    moved = {}
    for units, beta in ((32, 4.0), (512, 4.0), (512, 16.0)):
        net = ResidualNet.scaled(4, 2, 8, units, beta)
        flow = ParticleFlow(net, X, Y, starts(net, 0, count=32), fraction=0.3).run()
        moved[units, beta] = float(flow.movement(raw=True)[1].mean())
    assert moved[512, 16.0] < 0.2 * moved[32, 4.0] < 0.4 * moved[512, 4.0]


def test_examples_are_on_the_sphere_and_their_targets_follow_the_formula() -> None:
    x, y = examples(50, 5, (3,))
    assert torch.allclose(x.norm(dim=1), torch.ones(50, dtype=x.dtype))
    assert float(y[4]) == pytest.approx(0.7 * np.sin(3 * float(x[4, 0])) + 1.4 * float(x[4, 1] * x[4, 2]))


def test_nonsense_is_refused() -> None:
    for wrong in ({"repeats": 0}, {"sizes": (20, -1)}, {"strengths": (float("nan"),)}, {"outputs": (0,)}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} is .*; it must be positive"):
            Config(**wrong)
