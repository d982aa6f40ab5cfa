"""Two-layer ReLU networks whose rows are split into length and direction, their kernel, and descents from one start.

n inputs x of norm 1, m rows, c = ±1 fixed, w_k ~ N(0, I), r the residuals, loss ½‖r‖²:

    f = m^-½ Σ_k c_k relu(g_k v̂_k·x),   v̂ = v/‖v‖         normalized: at the start v = αw and g = ‖w‖
    f = m^-½ Σ_k c_k relu(v_k·x)                           unnormalized: v = w, the same function
    Λ = V/α² + G,   s_k = αg_k/‖v_k‖,   1_ik = [f depends on row k at x_i]
    V_ij = (1/m) Σ_k s_k² 1_ik 1_jk (x_i·x_j - (v̂_k·x_i)(v̂_k·x_j))
    G_ij = (1/m) Σ_k 1_ik 1_jk (v̂_k·x_i)(v̂_k·x_j)
    ‖v_k‖² ← ‖v_k‖² + lr²‖∇_{v_k}‖²                        at every step of a normalized network

R runs, n inputs of d numbers, m rows, P weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...autodiff.batched import BatchedRuns
from ...optimizers.descend import descend
from ...optimizers.gd import GD

Array = NDArray[np.float64]

MAX_GROWTH = 1e4
"""Growth of ‖v‖² from which a run does not count as converged: its steps have become too short to mean anything."""

MAX_STEPS = 5000
"""Steps after which a run is given up."""


@dataclass(frozen=True)
class DescentEnd:
    """The end of a descent, and how it was reached."""

    weights: Tensor  # (P,)
    steps: int
    growth: float  # of ‖v‖²
    converged: bool  # to the loss that was asked for, with a growth below MAX_GROWTH


@dataclass(frozen=True)
class ReluNet:
    """A two-layer network with its examples, at its start."""

    x: Tensor  # (n, d), of norm 1
    y: Tensor  # (n,)
    signs: Tensor  # c (m,)
    rows: Tensor  # w (m, d)
    scale: float | None  # α; None: not normalized

    @classmethod
    def draw(
        cls, width: int, seed: Sequence[int], scale: float | None, examples: int = 20, inputs: int = 10
    ) -> "ReluNet":
        """Draw a network and examples; those of one seed are the same function at the start, whatever α."""
        rng = np.random.default_rng([111, *seed])
        x, y = rng.standard_normal((examples, inputs)), rng.standard_normal(examples)
        signs, rows = rng.choice([-1.0, 1.0], width), rng.standard_normal((width, inputs))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        y /= np.abs(y).max()
        return cls(torch.as_tensor(x), torch.as_tensor(y), torch.as_tensor(signs), torch.as_tensor(rows), scale)

    @property
    def start(self) -> Tensor:
        """The weights at the start, flat: ``(αw, ‖w‖)`` ``(m d + m,)``, without normalization w ``(m d,)``."""
        if self.scale is None:
            return self.rows.flatten()
        return torch.cat([self.scale * self.rows.flatten(), self.rows.norm(dim=1)])

    def split(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Split weights ``(R, P)`` into v ``(R, m, d)`` and g ``(R, m)``, which is empty without normalization."""
        size = self.rows.numel()
        return W[:, :size].reshape(len(W), *self.rows.shape), W[:, size:]

    def outputs(self, W: Tensor) -> Tensor:
        """Compute the outputs of all runs, ``f(x_i)`` ``(R, n)``."""
        v, g = self.split(W)
        before = self.x @ v.mT
        if self.scale is not None:
            before = (g / v.norm(dim=2))[:, None, :] * before
        return before.relu() @ (self.signs / len(self.signs) ** 0.5)

    def losses(self, W: Tensor) -> Tensor:
        """Compute the losses of all runs, ``½‖r‖²`` ``(R,)``."""
        return 0.5 * (self.outputs(W) - self.y).square().sum(1)

    def kernel_parts(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the kernels of directions and of lengths, V and G ``(n, n)``, at weights ``(P,)``.

        Without normalization, ``s = 1`` and ``g = ‖v‖``.
        """
        (v,), (g,) = self.split(w[None])
        size, m = v.norm(dim=1), len(self.rows)
        along = self.x @ (v / size[:, None]).T
        g = size if self.scale is None else g
        s = (self.scale or 1.0) * g / size
        active = (g * along > 0).double()
        masks, radial = active * s, active * along
        V = (masks @ masks.T) * (self.x @ self.x.T) - (radial * s) @ (radial * s).T
        return V / m, radial @ radial.T / m

    def kernel(self, w: Tensor) -> Tensor:
        """Compute the kernel in closed form, ``Λ = V/α² + G`` ``(n, n)``, without normalization ``V + G``."""
        V, G = self.kernel_parts(w)
        return V / (self.scale or 1.0) ** 2 + G

    def kernel_range(self, w: Tensor) -> tuple[float, float]:
        """Compute the least and the largest eigenvalue of the kernel."""
        values = torch.linalg.eigvalsh(self.kernel(w))
        return float(values[0]), float(values[-1])

    def growth(self, w: Tensor) -> float:
        """Compute ``Σ_k ‖v_k‖²`` over its start."""
        size = self.rows.numel()
        return float(w[:size].square().sum() / self.start[:size].square().sum())

    def descents(self, rates: Sequence[float], fraction: float, max_steps: int = MAX_STEPS) -> list[DescentEnd]:
        """Descend with each step size until the loss is at most a fraction of the first.

        All run side by side in stretches, after each of which those that ended are left out.
        """
        f, w = BatchedRuns(self.losses), self.start
        target = fraction * float(f.value(w[None]))
        found: dict[int, DescentEnd] = {}
        running, W = list(range(len(rates))), w.expand(len(rates), -1)
        taken, stretch = 0, 50
        while running:
            rules = [GD(rates[i]) for i in running]
            now = descend(f.slope, W, rules, min(stretch, max_steps - taken), until=lambda losses: losses <= target)
            rest = []
            for row, i in enumerate(running):
                steps, growth = taken + int(now.steps[row]), self.growth(now.weights[row])
                exploded = not growth < MAX_GROWTH
                if now.reached[row] or now.diverged[row] or exploded or steps >= max_steps:
                    converged = bool(now.reached[row]) and not exploded
                    found[i] = DescentEnd(now.weights[row], steps, growth, converged)
                else:
                    rest.append(row)
            running, W = [running[row] for row in rest], now.weights[rest]
            taken, stretch = taken + stretch, 2 * stretch
        return [found[i] for i in range(len(rates))]

    def descent(self, rate: float, fraction: float, max_steps: int = MAX_STEPS) -> tuple[Array, Tensor]:
        """Descend to a fraction of the first loss: the losses of all iterates over the first, and the last weights."""
        f, w = BatchedRuns(self.losses), self.start
        first, curve = float(f.value(w[None])), list[float]()

        def watch(t: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
            curve.append(float(losses[0]) / first)

        def until(losses: Tensor) -> Tensor:
            return losses <= fraction * first

        end = descend(f.slope, w[None], GD(rate), max_steps, until=until, watch=watch)
        return np.array(curve), end.weights[0]

    def kernel_drift(self, fraction: float) -> float:
        """Measure how far the kernel moves in a descent with steps of 1/λ_max to a fraction of the first loss.

        ``‖Λ_end - Λ_0‖₂ / λ_max(Λ_0)``
        """
        first = self.kernel(self.start)
        high = self.kernel_range(self.start)[1]
        (end,) = self.descents([1 / high], fraction)
        return float(torch.linalg.matrix_norm(self.kernel(end.weights) - first, 2)) / high

    def length_mismatch(self, rate: float, steps: int) -> float:
        """Measure how far the steps of a descent are from the law of the lengths of v, the greatest, relative.

        ``max_k |‖v_k‖² - ‖v_k'‖² - lr²‖∇_{v_k'}‖²| / ‖v_k‖²``, primes before the step
        """
        expected, mismatches = list[Tensor](), [0.0]

        def watch(t: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
            squares, slopes = (self.split(z)[0].square().sum(2) for z in (W, g))
            if expected:
                mismatches.append(float(((squares - expected.pop()) / squares).abs().max()))
            expected.append(squares + rate**2 * slopes)

        descend(BatchedRuns(self.losses).slope, self.start[None], GD(rate), steps, watch=watch)
        return max(mismatches)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Compute the largest difference of entries over the largest entry, ``max |a - b| / max |b|``."""
    return float((a - b).abs().max() / b.abs().max())
