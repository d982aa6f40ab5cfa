"""Linear regression with batch normalization and its eps: where bursts begin, in closed form.

Three features: one in proportion to the target, one stretched by k, one that is always zero (null), in a rotated basis.
With Σ = Q diag(1, k², 0) Qᵀ, b = Q e_1, q = wᵀΣw, s² = q + eps and learning rate one (only eps/lr and il matter),

    L(w) = mean (Xw/s - y)² = 1 + q/s² - 2 bᵀw/s,    F = L + (il/2) ‖w‖².

*eps = 0.*  L is scale-invariant, F has no minimum, and gradient descent comes to its edge, where the component h along
the stretched feature oscillates.  With E its energy (the Lyapunov function of slow oscillations of h and of the edge
about h² = il/2), the local map of the angle, b' = -(1+δ) b + 3k² b³, makes it grow or shrink over τ = il·t by

    d log(E - 1)/dτ = γ = 4 - 3k².

So bursts grow for k² < 4/3 and fade for k² > 4/3, whatever il.  The null component is multiplied by (1-il) a step in
both cases: bursts do not stop the reduction of sharpness, λ1 = 2k²/cos²α.

*eps > 0.*  On the interpolants L ≈ eps²/(4q²), which pushes against weight decay.  F has a minimum, at ‖w‖⁶ ≈ eps²/il;
it is stable, so that no edge is ever reached, if eps > eps* with

    eps* ≈ k³ √il    (in units of the learning rate; exactly where λ1(∇²F) = 2 at the minimum).

Below, with ρ = eps/eps*, the push takes a part ρ² of what drives the edge, and damps it:

    h² = (il/2)(1 - ρ²),    γ(ρ) = (4 - 3k²)(1 - ρ²) - 6ρ²,

so that bursts persist for eps < eps* √(γ/(γ + 6)), fade up to eps*, and there is no oscillation above.

B replicas; weights (B, 3).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def growth(k: Any, fraction: Any = 0.0) -> Any:
    """The rate at which bursts grow, ``γ(ρ) = (4 - 3k²)(1 - ρ²) - 6ρ²`` per unit of τ, at ``ρ = eps/eps*``."""
    return (4 - 3 * k**2) * (1 - fraction**2) - 6 * fraction**2


def border(k: Any, il: Any) -> Any:
    """The eps above which no edge is reached, ``eps* = k³ √il`` to leading order."""
    return k**3 * np.sqrt(il)


def minimum(il: float, eps: float) -> float:
    """The norm r at the minimum of F along the target: ``2 eps/s³ - 2 r eps/s⁴ = il r`` with ``s² = r² + eps``."""
    from scipy.optimize import brentq

    def slope(log_r: float) -> float:
        r = math.exp(log_r)
        s = math.sqrt(r * r + eps)
        return il * r - 2 * eps / s**3 * (1 - r / s)

    guess = math.log(eps**2 / il) / 6
    return math.exp(brentq(slope, guess - 5, guess + 2, xtol=1e-14))


def curvature(k: float, il: float, eps: float) -> float:
    """The curvature of F along the stretched feature at its minimum, ``2k² (r/s³ + eps/s⁴) + il``."""
    r = minimum(il, eps)
    s = math.sqrt(r * r + eps)
    return 2 * k**2 * (r / s**3 + eps / s**4) + il


def exact_border(k: float, il: float) -> float:
    """The eps at which the curvature of F at its minimum is 2, the largest that is stable."""
    from scipy.optimize import brentq

    guess = math.log(border(k, il))
    return math.exp(brentq(lambda log_eps: curvature(k, il, math.exp(log_eps)) - 2, guess - 1, guess + 1, xtol=1e-13))


@dataclass(frozen=True)
class Stretched:
    """Regressions side by side: ``k``, ``il`` and ``eps`` (B,), and the rotation ``Q`` (3, 3)."""

    k: Array
    il: Array
    eps: Array
    Q: Array

    def loss(self, w: Array) -> Array:
        """Evaluate the losses of all replicas (B,)."""
        v = w @ self.Q
        s2 = self._spread(v) + self.eps
        return np.asarray(1 + self._spread(v) / s2 - 2 * v[:, 0] / np.sqrt(s2))

    def gradient(self, w: Array) -> Array:
        """The gradients ``2 (eps/s⁴ + bᵀw/s³) Σw - 2 b/s`` (B, 3)."""
        v = w @ self.Q
        s = np.sqrt(self._spread(v) + self.eps)
        pull = 2 * (self.eps / s**4 + v[:, 0] / s**3)
        g = np.stack([pull * v[:, 0] - 2 / s, pull * self.k**2 * v[:, 1], 0 * s], axis=1)
        return np.asarray(g @ self.Q.T)

    def step(self, w: Array) -> Array:
        """One step of gradient descent with weight decay (B, 3)."""
        return np.asarray((1 - self.il)[:, None] * w - self.gradient(w))

    def null(self, w: Array) -> Array:
        """The components (B,) along the feature that is always zero."""
        return np.asarray(w @ self.Q[:, 2])

    def target(self, w: Array) -> Array:
        """The components (B,) along the target."""
        return np.asarray(w @ self.Q[:, 0])

    def stretched(self, w: Array) -> Array:
        """The components (B,) along the stretched feature over that along the target."""
        v = w @ self.Q
        return np.asarray(v[:, 1] / v[:, 0])

    def starts(self, edge: float, alpha: float, h: Array) -> Array:
        """Weights (B, 3) at the angle α to the target, h along the stretched feature, and ``2k²/(r cos α)² = edge``."""
        r = np.sqrt(2 * self.k**2 / edge) / math.cos(alpha)
        v = r[:, None] * np.stack([np.full_like(h, math.cos(alpha)), h, np.full_like(h, math.sin(alpha))], axis=1)
        return np.asarray(v @ self.Q.T)

    def _spread(self, v: Array) -> Array:
        """The variance before normalization, ``q = v_1² + k² v_2²`` (B,)."""
        return np.asarray(v[:, 0] ** 2 + self.k**2 * v[:, 1] ** 2)


def rotation(seed: int) -> Array:
    """Draw a random rotation of the features (3, 3)."""
    return np.asarray(np.linalg.qr(np.random.default_rng([1, seed]).standard_normal((3, 3)))[0])


def windows(problem: Stretched, w: Array, steps: int, every: int) -> tuple[dict[str, Array], Array]:
    """Run all replicas; give the range of the loss in each window of steps, its mean and that of h² (T, B)."""
    T, B = steps // every, len(w)
    low, high, mean, square = np.full((T, B), np.inf), np.full((T, B), -np.inf), np.zeros((T, B)), np.zeros((T, B))
    for step in range(T * every):
        loss, i = problem.loss(w), step // every
        np.minimum(low[i], loss, out=low[i])
        np.maximum(high[i], loss, out=high[i])
        mean[i] += loss / every
        square[i] += problem.stretched(w) ** 2 / every
        w = problem.step(w)
    return {"range": high - low, "mean": mean, "square": square}, w
