"""Two classes and Fisher's ratio of a direction: the squared distance of their means along it, over the variance.

S the covariance within classes, Δ between their means:

    J(w) = (wᵀΔ)²/(wᵀSw),   wᵀ∇J = 0              the scale of w does not matter
    max J = ΔᵀS⁻¹Δ                                  over all directions; less within an orthant

n examples of d numbers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._shared.oracles import within_orthant

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Classes:
    """A sample of two classes: inputs ``(n, d)``, labels ±1 ``(n,)``, and their S ``(d, d)`` and Δ ``(d,)``."""

    x: Array
    y: Array
    within: Array
    between: Array

    @classmethod
    def draw(cls, means: tuple[float, ...], d: int, n: int, rng: np.random.Generator) -> "Classes":
        """Draw two classes of equal size, N(∓μ/2, I + .15·11ᵀ), where μ begins with `means`."""
        mu = np.concatenate([means, np.zeros(d - len(means))])
        y = np.where(np.arange(n) % 2, 1.0, -1.0)
        x = rng.standard_normal((n, d)) + np.sqrt(0.15) * rng.standard_normal((n, 1)) + y[:, None] * mu / 2
        middle = np.where(y[:, None] > 0, x[y > 0].mean(0), x[y < 0].mean(0))
        rest = x - middle
        return cls(x, y, rest.T @ rest / n, x[y > 0].mean(0) - x[y < 0].mean(0))

    def ratio(self, w: Array) -> float:
        """Fisher's ratio of a direction, ``J = (wᵀΔ)²/(wᵀSw)``."""
        return float((w @ self.between) ** 2 / (w @ self.within @ w))

    def fisher(self, w: Array) -> Array:
        """Gradient of -J: ``-2 (wᵀΔ)/(wᵀSw) · (Δ - (wᵀΔ)/(wᵀSw) Sw)``."""
        sw = self.within @ w
        quotient = (w @ self.between) / (w @ sw)
        return np.asarray(-2 * quotient * (self.between - quotient * sw))

    def squares(self, w: Array) -> Array:
        """Gradient of ``‖Xw - y‖²/2n``, which depends on the scale of w."""
        return np.asarray(self.x.T @ (self.x @ w - self.y) / len(self.y))

    def difference(self, w: Array) -> Array:
        """Gradient of ``wᵀ(S - ΔΔᵀ)w``, which depends on the scale of w."""
        return np.asarray(2 * (self.within @ w - self.between * (self.between @ w)))

    def best_ratio(self) -> float:
        """The ratio of the best of all directions, ``ΔᵀS⁻¹Δ``."""
        return float(self.between @ np.linalg.solve(self.within, self.between))

    def best_ratio_within(self, start: Array) -> float:
        """The ratio of the best direction with the signs of `start`."""
        return self.ratio(within_orthant(lambda w: (-self.ratio(w), self.fisher(w)), start))
