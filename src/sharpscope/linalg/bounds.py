"""Upper bounds on the largest eigenvalue from a random start, and comparison with a threshold.

A Ritz value never exceeds the largest eigenvalue λ1 and its residual only says that *some* eigenvalue is near.  What
bounds λ1 from above is that the start was random.  Let V be the orthonormal basis of a Krylov space of G, a block of b
Gaussian columns, so that ``A V = V T + Q C`` with Q orthonormal and orthogonal to V, and let u be the eigenvector of
λ1.  Multiplying by uᵀ gives ``uᵀV = (uᵀQ) C (λ1 - T)⁻¹``, and with ``G = V a`` and ``‖uᵀV‖² + ‖uᵀQ‖² ≤ 1``

    ‖uᵀG‖ ≤ φ(λ1),   φ(λ) = ‖(I + K Kᵀ)^-½ K a‖,   K = C (λ - T)⁻¹.

The left side is the norm of b standard normal numbers, whatever A is: it is below δ with probability p only.  Hence λ1
lies in {λ: φ(λ) ≥ δ} with probability 1 - p.  φ falls like the Lanczos polynomial grows, so that set ends close above
the largest Ritz value.  (For b = 1 and without the first factor this is the bound of van Dorsselaer, Hochstenbach & van
der Vorst, 2000; Kuczyński & Woźniakowski, 1992, bound the same event before anything is computed.)

b random columns, m columns in the basis.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

GRID = np.logspace(-10, 6, 320)
"""Distances above the largest Ritz value, in units of ‖A‖, at which φ is evaluated: 12 % from one to the next."""


@dataclass
class RandomStart:
    """The random start G in terms of the basis; restarts make its coefficients functions of λ."""

    coefficients: Matrix  # (c, b): G = V[:, :c] coefficients before the first restart
    restarts: list[tuple[Matrix, Matrix, Matrix, int]] = field(default_factory=list)

    def restart(self, ritz: Matrix, s: Matrix, coupling: Matrix, keep: int) -> None:
        """Replace the basis by its first `keep` Ritz vectors and the remainder Q; ``coupling`` is C S, (b, m)."""
        self.restarts.append((ritz, s, coupling, keep))

    def at(self, shift: Matrix, columns: int) -> Matrix:
        """Return the coefficients a(λ) of G, ``(N, columns, b)`` for N values of λ."""
        a = np.broadcast_to(self.coefficients, (len(shift), *self.coefficients.shape))
        for ritz, s, coupling, keep in self.restarts:
            turned = s[: a.shape[1]].T @ a
            dropped = turned[:, keep:] / (shift[:, None] - ritz[keep:])[..., None]
            a = np.concatenate([turned[:, :keep], coupling[:, keep:] @ dropped], axis=1)
        return np.pad(a, ((0, 0), (0, columns - a.shape[1]), (0, 0)))

    def upper(self, ritz: Matrix, s: Matrix, coupling: Matrix, p: float, scale: float) -> float:
        """Return a number that λ1 exceeds with probability `p` at most [N21].

        `ritz` ``(m,)`` is descending, `s` holds the vectors of T and ``coupling`` is C S.
        """
        if scale == 0:
            return 0.0
        shift = ritz[0] + scale * GRID
        inverse = 1 / (shift[:, None] - ritz)
        a = s.T @ self.at(shift, len(s))
        k = coupling * inverse[:, None, :]  # (N, b', m)
        if len(coupling) == 1 and a.shape[2] == 1:
            size = np.abs(k @ a)[:, 0, 0] / np.sqrt(1 + np.square(k[:, 0]).sum(1))
        else:
            weights, turn = np.linalg.eigh(np.eye(len(coupling)) + k @ np.swapaxes(k, 1, 2))
            inward = np.swapaxes(turn, 1, 2) @ (k @ a) / np.sqrt(np.maximum(weights, 1))[..., None]
            size = np.linalg.norm(inward, 2, axis=(1, 2))
        possible = np.flatnonzero(size >= least_norm(a.shape[2], p))
        if len(possible) == 0:
            return float(shift[0])
        return float(shift[possible[-1] + 1]) if possible[-1] + 1 < len(shift) else math.inf


def least_norm(b: int, p: float) -> float:
    """Return a norm that b standard normal numbers fall below with probability p at most.

    The δ of ``δ^b 2^(1 - b/2) / (b Γ(b/2)) = p``, whose left side is at least ``P(χ_b < δ)``.
    """
    return math.exp((math.log(p * b) + math.lgamma(b / 2) + (b / 2 - 1) * math.log(2)) / b)


@dataclass(frozen=True)
class Comparison:
    """The answer to whether a largest eigenvalue is above a threshold.

    `answer` is "above" (proved, up to rounding), "below" (with probability `confidence`) or "undecided"; then
    `more_matvecs` products are a rough guess of what it would take to decide.
    """

    answer: str
    threshold: float
    lower: float
    upper: float
    confidence: float
    more_matvecs: int = 0

    def __str__(self) -> str:
        bounds = f"{self.lower:.6g} ≤ λ1" + (f" ≤ {self.upper:.6g}" if math.isfinite(self.upper) else "")
        if self.answer == "above":
            return f"above {self.threshold:.6g}: {bounds} (proved, up to rounding)"
        if self.answer == "below":
            return f"below {self.threshold:.6g}: {bounds} (with probability {self.confidence:.1%})"
        return f"undecided at {self.threshold:.6g}: {bounds}; some {self.more_matvecs} more products may decide"


def compare_to_threshold(
    threshold: float, *, lower: float, value: float, upper: float, confidence: float, num_matvecs: int
) -> Comparison:
    """Compare λ1, known to lie between two bounds, with a threshold.

    The guess of further products uses that the distance that Lanczos leaves open falls as one over products².
    """
    answered = partial(Comparison, threshold=threshold, lower=lower, upper=upper, confidence=confidence)
    if threshold < lower:
        return answered("above")
    if threshold > upper:
        return answered("below")
    if not math.isfinite(upper):
        return answered("undecided", more_matvecs=max(20, num_matvecs))
    distance = max(abs(threshold - value), 1e-3 * abs(value), 1e-300)
    more = max(1, math.ceil(num_matvecs * (math.sqrt(max(1.0, (upper - value) / distance)) - 1)))
    return answered("undecided", more_matvecs=more)
