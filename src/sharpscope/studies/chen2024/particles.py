"""The flow of a scaled residual network's units, step by step, and how far it takes their law.

    R(t) ≤ R(0) exp(-λ_min(G_0) t/n)                             while λ_min(G_t) ≥ ½ λ_min(G_0)
    KL = mean(½‖ω_T/σ‖² - ½‖ω_0/σ‖²) - mean ∫ div ω̇ dt           from a normal law with deviations σ
    MSD = mean ‖(ω_T - ω_0)/σ‖²

The law of output units ω = (a, c, e) is followed along their paths: ``d/dt log ρ_t(ω_t) = -div ω̇``.

R runs, P weights, n inputs of d numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...autodiff.batched import gram, jacobian
from ...optimizers.descend import descend
from ...optimizers.gd import GD
from .._shared.streams import stream
from .meanfield import ResidualNet

STEP = 0.3
"""Length of a step in units of n/λ_max(G)."""

REFRESH = 50
"""Largest number of steps with one kernel, before it is computed again."""

MAX_STEPS = 100_000
"""Steps after which a run is given up."""


def examples(count: int, inputs: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw inputs ``(n, d)`` on the unit sphere and their targets ``y = 0.7 sin 3x_1 + 1.4 x_2 x_3`` ``(n,)``."""
    x = np.random.default_rng([104, *seed]).standard_normal((count, inputs))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = 0.7 * np.sin(3 * x[:, 0]) + 1.4 * x[:, 1] * x[:, 2]
    return torch.as_tensor(x), torch.as_tensor(y)


def starts(net: ResidualNet, *seed: int, count: int = 1) -> Tensor:
    """Draw the initial weights of several networks ``(count, P)``."""
    draw = stream(114, *seed)
    return torch.stack([net.start(draw) for _ in range(count)])


def velocity_jacobians(net: ResidualNet, W: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    """Compute ``∂ω̇_k/∂ω_k`` ``(K, d + 2, d + 2)`` of the output units of each run, their law fixed, by autograd."""
    strengths = torch.as_tensor(net.strength, dtype=W.dtype).expand(len(W), 1)[:, 0].tolist()
    units = [torch.cat([a[:, None], c, e[:, None]], 1) for a, c, e in zip(*net.split(W)[3:], strict=True)]
    fields = [replace(net, strength=strength).field(w[None], x, y) for strength, w in zip(strengths, W, strict=True)]
    return [jacobian(field, own) for field, own in zip(fields, units, strict=True)]


class ParticleFlow:
    """Euler steps of R runs, each until its loss is at most a fraction of the first.

    On its way it keeps for each run the greatest loss over its bound, the least λ_min(G_t)/λ_min(G_0), and the integral
    of the mean divergence of output units; with `volumes`, too, that of the mean of ``log |det(I + dt ∂ω̇/∂ω)|``, which
    is the same for short steps.
    """

    def __init__(
        self,
        net: ResidualNet,
        x: Tensor,
        y: Tensor,
        start: Tensor,
        *,
        fraction: float,
        step: float = STEP,
        volumes: bool = False,
    ) -> None:
        self.net, self.x, self.y = net, x, y
        self.step, self.volumes = step, volumes
        self.start = self.weights = start  # (R, P)
        self.first = self.losses = net.evaluate(start, x, y).losses
        self.level = fraction * self.first
        self.times, self.over_bound, self.outward, self.volume = torch.zeros(4, len(start), dtype=start.dtype)
        self.kernel_ratio = torch.full_like(self.times, torch.inf)
        self.spectrum = torch.linalg.eigvalsh(net.gram(start, x))
        self.least = self.spectrum[:, 0]
        self.curve: list[tuple[Tensor, Tensor]] = []  # times and losses
        self.kernels = [(self.times.clone(), torch.ones_like(self.times))]  # times and λ_min over its start

    def run(self) -> "ParticleFlow":
        """Follow the flow until all runs have arrived or one has diverged."""
        taken, self.num_steps = 0, 5  # the kernel changes most at the beginning
        while taken < MAX_STEPS:
            self.dt = self.step * len(self.y) / self.spectrum[:, -1]
            rules = [GD(float(dt)) for dt in self.dt]
            end = descend(self._slope, self.weights, rules, self.num_steps, until=self._arrived, watch=self._watch)
            self.weights, self.losses = end.weights, end.losses
            self.spectrum = torch.linalg.eigvalsh(self.net.gram(self.weights, self.x))
            ratio = self.spectrum[:, 0] / self.least
            self.kernel_ratio = torch.minimum(self.kernel_ratio, ratio)
            self.kernels.append((self.times.clone(), ratio))
            if bool((end.reached | end.diverged).all()):
                break
            taken, self.num_steps = taken + self.num_steps, min(2 * self.num_steps, REFRESH)
        return self

    @property
    def arrived(self) -> bool:
        """True once the losses of all runs have fallen far enough."""
        return bool(self._arrived(self.losses).all())

    def _arrived(self, losses: Tensor) -> Tensor:
        return losses <= self.level

    def _slope(self, W: Tensor, step: int) -> tuple[Tensor, Tensor]:
        self.now = self.net.evaluate(W, self.x, self.y)
        return self.now.losses, self.now.slopes

    def _watch(self, t: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
        over_bound = losses / self.first * torch.exp(self.least * self.times / len(self.y))
        self.over_bound = torch.where(self.times > 0, torch.maximum(self.over_bound, over_bound), self.over_bound)
        if t == self.num_steps:  # no step follows, and the next descent begins here
            return
        self.curve.append((self.times.clone(), losses))
        dt = torch.where(self._arrived(losses), 0.0, self.dt)
        self.times += dt
        self.outward += dt * self.now.output_divergence
        if self.volumes:
            for i, slopes in enumerate(velocity_jacobians(self.net, W, self.x, self.y)):
                step_map = torch.eye(slopes.shape[1], dtype=slopes.dtype) + dt[i] * slopes
                self.volume[i] += torch.linalg.slogdet(step_map)[1].mean()

    def movement(self, *, raw: bool = False) -> tuple[Tensor, Tensor]:
        """Compute KL and MSD of the output units of each run ``(R,)``; `raw` MSD is not in units of σ."""
        sigma = self.net.deviations()
        before, after, moved = (
            torch.cat([part.flatten(1) for part in self.net.split(w)[3:]], 1)
            for w in (self.start / sigma, self.weights / sigma, (self.weights - self.start) / (1 if raw else sigma))
        )
        kl = (after.square() - before.square()).sum(1) / (2 * self.net.units) - self.outward
        return kl, moved.square().sum(1) / self.net.units

    @property
    def evidence(self) -> dict[str, float]:
        """The worst over runs of what every run has to satisfy; a run that diverged satisfies nothing."""
        return {
            "arrived": float(self.arrived),
            "over_bound": float(self.over_bound.nan_to_num(1e9, posinf=1e9).max()),
            "kept": float(self.kernel_ratio.nan_to_num(-1).min()),
        }

    @property
    def gaps(self) -> dict[str, float]:
        """The greatest differences over runs between autograd and closed forms, of kernel and divergence at the end."""
        return {
            "kernel_gap": kernel_gap(self.net, self.weights, self.x),
            "divergence_gap": divergence_gap(self.net, self.weights, self.x, self.y),
        }

    @property
    def by_volume(self) -> float:
        """The KL divergence of a single run by determinants, over that by divergences."""
        return 1 + float((self.outward - self.volume) / self.movement()[0])

    @property
    def longest(self) -> float:
        """The longest time of a run in units of n/λ_min(G_0)."""
        return float((self.times * self.least).max()) / len(self.y)

    def curves(self, i: int) -> Iterator[dict[str, float]]:
        """Yield loss and λ_min of run i over their starts, against time in units of n/λ_min(G_0)."""
        unit = float(self.least[i]) / len(self.y)
        for times, losses in self.curve:
            if losses[i] > self.level[i]:
                yield {"t": float(times[i]) * unit, "loss": float(losses[i] / self.first[i])}
        for times, ratio in self.kernels:
            yield {"t": float(times[i]) * unit, "kernel": float(ratio[i])}


def divergence_gap(net: ResidualNet, W: Tensor, x: Tensor, y: Tensor) -> float:
    """Compare the mean divergence of output units in closed form with traces of Jacobians: the greatest over runs.

    It is relative to the mean of |trace|: units in pairs are nearly opposite, and their sum is far smaller.
    """
    traces = torch.stack([slopes.diagonal(dim1=1, dim2=2).sum(1) for slopes in velocity_jacobians(net, W, x, y)])
    gaps = (traces.mean(1) - net.evaluate(W, x, y).output_divergence).abs() / traces.abs().mean(1)
    return float(gaps.max())


def kernel_gap(net: ResidualNet, W: Tensor, x: Tensor) -> float:
    """Compare the kernel in closed form with that by autograd: the greatest relative difference over runs."""
    exact = gram(lambda W: net.outputs(W, x), W, net.rates())
    return float(((net.gram(W, x) - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2))).max())


def stretching(net: ResidualNet, w: Tensor, x: Tensor) -> tuple[float, float]:
    """Compute the median over inputs of the spectral norm of ``∂z_L/∂x``, and its relative distance from autograd."""
    found, exact = net.input_jacobian(w, x), jacobian(lambda x: net.features(w[None], x)[0], x)
    norms = torch.linalg.matrix_norm(found, 2)
    return float(norms.median()), float((found - exact).abs().max() / exact.abs().max())
