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

GROWTH = 1e4
"""Growth of ‖v‖² from which a run does not count as converged: its steps have become too short to mean anything."""

MOST = 5000
"""Steps after which a run is given up."""


@dataclass(frozen=True)
class End:
    """Where a run ended: weights ``(P,)``, its steps, growth of ‖v‖², and whether it converged, ‖v‖² below `GROWTH`."""

    weights: Tensor
    steps: int
    growth: float
    converged: bool


@dataclass(frozen=True)
class ReluNet:
    """Inputs x ``(n, d)`` of norm 1, targets y ``(n,)``, signs c ``(m,)``, rows w ``(m, d)``, and α, if normalized."""

    x: Tensor
    y: Tensor
    signs: Tensor
    rows: Tensor
    scale: float | None

    @classmethod
    def draw(
        cls, width: int, seed: Sequence[int], scale: float | None, examples: int = 20, inputs: int = 10
    ) -> "ReluNet":
        """Networks of one seed compute the same function at the start, whatever α."""
        rng = np.random.default_rng([111, *seed])
        x, y = rng.standard_normal((examples, inputs)), rng.standard_normal(examples)
        signs, rows = rng.choice([-1.0, 1.0], width), rng.standard_normal((width, inputs))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        made = [torch.as_tensor(a) for a in (x, y / np.abs(y).max(), signs, rows)]
        return cls(made[0], made[1], made[2], made[3], scale)

    @property
    def start(self) -> Tensor:
        """``(αw, ‖w‖)`` flat ``(m d + m,)``, or w ``(m d,)``."""
        if self.scale is None:
            return self.rows.flatten()
        return torch.cat([self.scale * self.rows.flatten(), self.rows.norm(dim=1)])

    def split(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """v ``(R, m, d)`` and g ``(R, m)`` (unnormalized, of no columns) of weights ``(R, P)``."""
        size = self.rows.numel()
        return W[:, :size].reshape(len(W), *self.rows.shape), W[:, size:]

    def outputs(self, W: Tensor) -> Tensor:
        """``f(x_i)`` ``(R, n)``."""
        v, g = self.split(W)
        before = self.x @ v.mT
        if self.scale is not None:
            before = (g / v.norm(dim=2))[:, None, :] * before
        return before.relu() @ (self.signs / len(self.signs) ** 0.5)

    def losses(self, W: Tensor) -> Tensor:
        """``½‖r‖²`` ``(R,)``."""
        return 0.5 * (self.outputs(W) - self.y).square().sum(1)

    def parts(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """V and G ``(n, n)`` at weights ``(P,)``; unnormalized, ``s = 1`` and ``g = ‖v‖``."""
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
        """``Λ = V/α² + G`` ``(n, n)``, unnormalized ``V + G``."""
        V, G = self.parts(w)
        return V / (self.scale or 1.0) ** 2 + G

    def ends(self, w: Tensor) -> tuple[float, float]:
        """λ_min and λ_max of the kernel."""
        values = torch.linalg.eigvalsh(self.kernel(w))
        return float(values[0]), float(values[-1])

    def grown(self, w: Tensor) -> float:
        """``Σ_k ‖v_k‖²`` over its start."""
        size = self.rows.numel()
        return float(w[:size].square().sum() / self.start[:size].square().sum())

    def swept(self, rates: Sequence[float], share: float, most: int = MOST) -> list[End]:
        """One descent for each rate, to ``loss ≤ share·first``, in stretches: those that ended are left out."""
        f, w = BatchedRuns(self.losses), self.start
        first = float(f.value(w[None]))
        found: dict[int, End] = {}
        index, W, taken, length = list(range(len(rates))), w.expand(len(rates), -1), 0, 50
        while index:
            rules = [GD(rates[i]) for i in index]
            now = descend(f.slope, W, rules, min(length, most - taken), until=lambda losses: losses <= share * first)
            stay = []
            for row, i in enumerate(index):
                steps, growth = taken + int(now.steps[row]), self.grown(now.weights[row])
                over = not growth < GROWTH
                if now.reached[row] or now.diverged[row] or over or steps >= most:
                    found[i] = End(now.weights[row], steps, growth, bool(now.reached[row]) and not over)
                else:
                    stay.append(row)
            index, W, taken, length = [index[row] for row in stay], now.weights[stay], taken + length, 2 * length
        return [found[i] for i in range(len(rates))]

    def followed(self, rate: float, share: float, most: int = MOST) -> tuple[Array, Tensor]:
        """Losses over the first of a descent to `share`, one for each iterate, and the weights ``(P,)`` at its end."""
        f, w = BatchedRuns(self.losses), self.start
        first, curve = float(f.value(w[None])), list[float]()

        def watch(t: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
            curve.append(float(losses[0]) / first)

        end = descend(f.slope, w[None], GD(rate), most, until=lambda losses: losses <= share * first, watch=watch)
        return np.array(curve), end.weights[0]

    def drift(self, share: float) -> float:
        """``‖Λ_end - Λ_0‖₂ / λ_max(Λ_0)`` of a descent with steps of 1/λ_max to `share` of the first loss."""
        first = self.kernel(self.start)
        high = self.ends(self.start)[1]
        (end,) = self.swept([1 / high], share)
        return float(torch.linalg.matrix_norm(self.kernel(end.weights) - first, 2)) / high

    def lengthened(self, rate: float, steps: int) -> float:
        """``max_k |‖v_k‖² - ‖v_k'‖² - lr²‖∇_{v_k'}‖²| / ‖v_k‖²`` over the steps of a descent, primes before."""
        expected, gap = list[Tensor](), [0.0]

        def watch(t: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
            squares, slopes = (self.split(z)[0].square().sum(2) for z in (W, g))
            if expected:
                gap.append(float(((squares - expected.pop()) / squares).abs().max()))
            expected.append(squares + rate**2 * slopes)

        descend(BatchedRuns(self.losses).slope, self.start[None], GD(rate), steps, watch=watch)
        return max(gap)


def apart(a: Tensor, b: Tensor) -> float:
    """``max |a - b| / max |b|``."""
    return float((a - b).abs().max() / b.abs().max())
