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
from .meanfield import ResidualNet

STEP, REFRESH, MOST = 0.3, 50, 100_000
"""Steps of ``STEP·n/λ_max(G)``, how many of them at most from kernel to kernel, and in all."""


def examples(count: int, inputs: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """x ``(n, d)`` on the unit sphere and ``y = 0.7 sin 3x_1 + 1.4 x_2 x_3`` ``(n,)``."""
    x = np.random.default_rng([104, *seed]).standard_normal((count, inputs))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = 0.7 * np.sin(3 * x[:, 0]) + 1.4 * x[:, 1] * x[:, 2]
    return torch.as_tensor(x), torch.as_tensor(y)


def starts(net: ResidualNet, *seed: int, count: int = 1) -> Tensor:
    """Networks ``(count, P)`` at their start."""
    draw = torch.Generator().manual_seed(int(np.random.SeedSequence([114, *seed]).generate_state(1)[0]))
    return torch.stack([net.start(draw) for _ in range(count)])


def ways(net: ResidualNet, W: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    """``∂ω̇_k/∂ω_k`` ``(K, d + 2, d + 2)`` of the output units of each run, their law fixed, by autograd."""
    strengths = torch.as_tensor(net.strength, dtype=W.dtype).expand(len(W), 1)[:, 0].tolist()
    units = [torch.cat([a[:, None], c, e[:, None]], 1) for a, c, e in zip(*net.split(W)[3:], strict=True)]
    fields = [replace(net, strength=strength).field(w[None], x, y) for strength, w in zip(strengths, W, strict=True)]
    return [jacobian(field, own) for field, own in zip(fields, units, strict=True)]


class Flow:
    """Euler steps of R runs from `start` ``(R, P)``, each until its loss is at most `share` of the first.

    `weights`, `losses`, `times`, and over the way: the greatest loss over its bound, the least λ_min(G_t)/λ_min(G_0),
    and the integral of the mean divergence of output units; with `volumes`, too, that of the mean of
    ``log |det(I + dt ∂ω̇/∂ω)|``, the same for short steps.  `curve` has times and losses, `kernels` times and λ_min.
    """

    def __init__(
        self,
        net: ResidualNet,
        x: Tensor,
        y: Tensor,
        start: Tensor,
        share: float,
        *,
        step: float = STEP,
        volumes: bool = False,
    ) -> None:
        self.net, self.x, self.y, self.start, self.weights = net, x, y, start, start
        self.step, self.volumes = step, volumes
        self.losses = self.first = net.evaluate(start, x, y).losses
        self.level = share * self.first
        self.times, self.over_bound, self.outward, self.volume = torch.zeros(4, len(start), dtype=start.dtype)
        self.kept = torch.full_like(self.times, torch.inf)
        self.curve: list[tuple[Tensor, Tensor]] = []
        self.spectrum = torch.linalg.eigvalsh(net.gram(start, x))
        self.least = self.spectrum[:, 0]
        self.kernels = [(self.times.clone(), torch.ones_like(self.times))]

    def run(self) -> "Flow":
        """Until all runs have arrived, or one diverged."""
        taken, self.stretch = 0, 5  # the kernel changes most at the beginning
        while taken < MOST:
            self.steps = self.step * len(self.y) / self.spectrum[:, -1]
            rules = [GD(float(dt)) for dt in self.steps]
            end = descend(self._slope, self.weights, rules, self.stretch, until=self._arrived, watch=self._watch)
            self.weights, self.losses = end.weights, end.losses
            self.spectrum = torch.linalg.eigvalsh(self.net.gram(self.weights, self.x))
            kept = self.spectrum[:, 0] / self.least
            self.kept = torch.minimum(self.kept, kept)
            self.kernels.append((self.times.clone(), kept))
            if bool((end.reached | end.diverged).all()):
                break
            taken, self.stretch = taken + self.stretch, min(2 * self.stretch, REFRESH)
        return self

    @property
    def arrived(self) -> bool:
        """Whether all runs have."""
        return bool(self._arrived(self.losses).all())

    def _arrived(self, losses: Tensor) -> Tensor:
        return losses <= self.level

    def _slope(self, W: Tensor, step: int) -> tuple[Tensor, Tensor]:
        self.now = self.net.evaluate(W, self.x, self.y)
        return self.now.losses, self.now.slopes

    def _watch(self, t: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
        share = losses / self.first * torch.exp(self.least * self.times / len(self.y))
        self.over_bound = torch.where(self.times > 0, torch.maximum(self.over_bound, share), self.over_bound)
        if t < self.stretch:
            self.curve.append((self.times.clone(), losses))
            dt = torch.where(self._arrived(losses), 0.0, self.steps)
            self.times += dt
            self.outward += dt * self.now.output_divergence
            if self.volumes:
                for i, way in enumerate(ways(self.net, W, self.x, self.y)):
                    self.volume[i] += torch.linalg.slogdet(torch.eye(way.shape[1], dtype=way.dtype) + dt[i] * way)[
                        1
                    ].mean()

    def movement(self, *, raw: bool = False) -> tuple[Tensor, Tensor]:
        """KL and MSD of the output units of each run ``(R,)``; `raw` MSD is in units of one instead of σ."""
        sigma = self.net.deviations()
        before, after, moved = (
            torch.cat([part.flatten(1) for part in self.net.split(w)[3:]], 1)
            for w in (self.start / sigma, self.weights / sigma, (self.weights - self.start) / (1 if raw else sigma))
        )
        kl = (after.square() - before.square()).sum(1) / (2 * self.net.units) - self.outward
        return kl, moved.square().sum(1) / self.net.units

    @property
    def evidence(self) -> dict[str, float]:
        """What every run has to satisfy, the worst of those side by side: a run that diverged keeps nothing."""
        over_bound, kept = self.over_bound.nan_to_num(1e9, posinf=1e9).max(), self.kept.nan_to_num(-1).min()
        return {"arrived": float(self.arrived), "over_bound": float(over_bound), "kept": float(kept)}

    @property
    def gaps(self) -> dict[str, float]:
        """Kernel and divergence at the end, by autograd and in closed form: the greatest difference over runs."""
        divergence = divergence_gap(self.net, self.weights, self.x, self.y)
        return {"kernel_gap": kernel_gap(self.net, self.weights, self.x), "divergence_gap": divergence}

    @property
    def by_volume(self) -> float:
        """KL of a single run by determinants in place of divergences, over KL."""
        return 1 + float((self.outward - self.volume) / self.movement()[0])

    @property
    def longest(self) -> float:
        """The longest time in units of n/λ_min(G_0)."""
        return float((self.times * self.least).max()) / len(self.y)

    def curves(self, i: int) -> Iterator[dict[str, float]]:
        """Loss and λ_min of run i over their starts, against time in units of n/λ_min(G_0)."""
        unit = float(self.least[i]) / len(self.y)
        for times, losses in self.curve:
            if losses[i] > self.level[i]:
                yield {"t": float(times[i]) * unit, "loss": float(losses[i] / self.first[i])}
        for times, kept in self.kernels:
            yield {"t": float(times[i]) * unit, "kernel": float(kept[i])}


def divergence_gap(net: ResidualNet, W: Tensor, x: Tensor, y: Tensor) -> float:
    """Mean divergence of output units in closed form, less the traces of Jacobians: the greatest over runs, relative.

    Relative to the mean of |trace|: units in pairs are nearly opposite, and their sum is far smaller.
    """
    traces = torch.stack([way.diagonal(dim1=1, dim2=2).sum(1) for way in ways(net, W, x, y)])
    gaps = (traces.mean(1) - net.evaluate(W, x, y).output_divergence).abs() / traces.abs().mean(1)
    return float(gaps.max())


def kernel_gap(net: ResidualNet, W: Tensor, x: Tensor) -> float:
    """The kernel in closed form less that by autograd: the greatest over runs, relative."""
    exact = gram(lambda W: net.outputs(W, x), W, net.rates())
    return float(((net.gram(W, x) - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2))).max())


def stretching(net: ResidualNet, w: Tensor, x: Tensor) -> tuple[float, float]:
    """Median over inputs of the spectral norm of ``∂z_L/∂x``, and how far that Jacobian is from autograd, relative."""
    found, exact = net.input_jacobian(w, x), jacobian(lambda x: net.features(w[None], x)[0], x)
    norms = torch.linalg.matrix_norm(found, 2)
    return float(norms.median()), float((found - exact).abs().max() / exact.abs().max())
