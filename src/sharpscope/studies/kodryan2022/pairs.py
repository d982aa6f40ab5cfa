"""Pairs of weights on one sphere, each with a scale-invariant loss of its own: every regime in closed form.

For p pairs (x_i, y_i) with r_i² = x_i² + y_i², on the sphere Σ r_i² = 1,

    L = ½ Σ a_i x_i²/r_i²,    A = Σ a_i.

Each pair is invariant by itself.  Its curvature at the minimum x_i = 0 is a_i/r_i², so that its own effective learning
rate is η̃/r_i², and c_i = η̃ a_i/r_i² is what decides.  With t = x/y a step is exactly

    t' = t (1 - c + t²)/(1 + (1 + c) t²),    r'² ∝ r² (1 + c² t²/(1 + t²)²).

- c ≤ 2 for all pairs can be met if and only if η̃ A ≤ 2, by r_i² = a_i/A.  A pair with c_i > 2 gains norm over the
  others until it is met: below the border η̃ = 2/A every start converges, above it no minimum is stable.
- Above, equal gains demand equal c_i = c = η̃ A; the orbit of period two has t² = (c - 2)/(c + 2), so

      L = A/4 - 1/(2 η̃),

  and A/4 is the loss of random weights: it is approached as η̃ grows.
- The multipliers of that orbit are 1 - 8/c² ± (4i/c)√(1 - 4/c²) up to a sign, of modulus one: it is neutral, and the
  cubic terms decide.  One pair alone (c fixed) has the multiplier -1 + 8/c² and comes to its orbit at every c.

B replicas; weights (B, 2p), the x first.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Curvatures ``a`` (p,) of pairs, and effective learning rates (B,)."""

    a: Array
    rates: Array
    free: bool = False  # the norm is not brought back to one: gradient descent

    @cached_property
    def total(self) -> float:
        """The sum of curvatures, A."""
        return float(self.a.sum())

    def loss(self, w: Array) -> Array:
        """Evaluate the losses of all replicas, ``½ Σ a_i x_i²/r_i²`` (B,)."""
        x, y = np.split(w, 2, axis=1)
        return np.asarray((self.a / 2 * x**2 / (x**2 + y**2)).sum(axis=1))

    def gradient(self, w: Array) -> Array:
        """Evaluate the gradients of all replicas (B, 2p), ``a_i x_i y_i (y_i, -x_i)/r_i⁴``."""
        x, y = np.split(w, 2, axis=1)
        turn = self.a * x * y / (x**2 + y**2) ** 2
        return np.hstack([turn * y, -turn * x])

    def step(self, w: Array) -> Array:
        """One step of every replica (B, 2p)."""
        w = w - self.rates[:, None] * self.gradient(w)
        return w if self.free else w / np.linalg.norm(w, axis=1, keepdims=True)

    def fractions(self, w: Array) -> Array:
        """The squared norms of the pairs over that of all, ``r_i²`` (B, p)."""
        squares = w**2 / (w**2).sum(axis=1, keepdims=True)
        return np.asarray(squares[:, : len(self.a)] + squares[:, len(self.a) :])

    def predicted(self) -> Array:
        """The level of the loss (B,): zero up to the border, ``A/4 - 1/(2 η̃)`` above."""
        return np.maximum(self.total / 4 - 1 / (2 * self.rates), 0)


def starts(rng: np.random.Generator, count: int, pairs: int) -> Array:
    """Draw weights of unit norm (count, 2p)."""
    w = rng.standard_normal((count, 2 * pairs))
    return np.asarray(w / np.linalg.norm(w, axis=1, keepdims=True))


def levels(problem: Pairs, w: Array, steps: int) -> dict[str, Array]:
    """Run all replicas, and average over the second half of the steps.

    `level` is the mean loss, `balance` the greatest relative deviation of the mean ``r_i²`` from ``a_i/A``.
    """
    loss, fractions = np.zeros(len(w)), np.zeros((len(w), len(problem.a)))
    for step in range(steps):
        if step >= steps // 2:
            loss += problem.loss(w)
            fractions += problem.fractions(w)
        w = problem.step(w)
    kept = steps - steps // 2
    balance = np.abs(fractions / kept * problem.total / problem.a - 1).max(axis=1)
    return {"level": loss / kept, "balance": balance, "predicted": problem.predicted()}


def separation(problem: Pairs, w: Array, steps: int, by: float, rng: Any) -> Array:
    """The distance (B,) after some steps of replicas that start at a distance `by`."""
    other = w + by * starts(rng, len(w), len(problem.a))
    for _ in range(steps):
        w, other = problem.step(w), problem.step(other)
    return np.asarray(np.linalg.norm(w - other, axis=1))
