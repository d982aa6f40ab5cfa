"""SGD on linear regression, each example used once: its expected excess risk, a bound, and other estimators.

``y = w*ᵀx + σξ``, x ~ N(0, H) with eigenvalues λ of H, step γ, Δ = w_0 - w*, q = 1 - γλ, a = E (w - w*)², w̄ the mean
of N iterates; coordinates are those in which H is diagonal:

    a ← a(1 - 2γλ + 2γ²λ²) + γ²λ Σλa + γ²σ²λ
    E ½‖w̄ - w*‖²_H = Σ λ (A + 2C) / 2N²        A ← A + a,  C ← q(C + A)
    D = k/N + Nγ² Σ_{i>k} λ²                    k eigenvalues are at least 1/γN
    excess ≤ 2 (EB + EV)
    EB = Σ_{i≤k} Δ²/λ /(γN)² + Σ_{i>k} λΔ²
    EV = (σ² + 6 (Σ_{i≤k} Δ² + Nγ Σ_{i>k} λΔ²)/Nγ) / (1 - 3γ tr H) · D
    Xᵀ(XXᵀ + μ)⁻¹y                              ridge, and least squares of least norm if μ = 0

d weights, N examples.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SPECTRA: dict[str, Callable[[Array], Array]] = {
    "1/(i log²)": lambda i: 1 / (i * np.log(i + 1) ** 2),
    "1/i^1.5": lambda i: i**-1.5,
    "1/i²": lambda i: i**-2.0,
    "flat": lambda i: np.ones_like(i),
}


@dataclass(frozen=True)
class LinearRegression:
    """A problem of linear regression, and the start and step of SGD on it.

    Eigenvalues λ ``(d,)``, Δ = w_0 - w* ``(d,)``, σ and γ.
    """

    eigenvalues: Array
    start: Array
    noise: float
    step: float

    @classmethod
    def of(cls, spectrum: str, dimension: int, noise: float, step: float) -> "LinearRegression":
        """A problem with eigenvalues in proportion to a spectrum.

        ``tr H = 1``, ``w_0 = 0``, and ``w*_i ∝ 1/i`` with ``w*ᵀHw* = 1``.
        """
        i = np.arange(1, dimension + 1, dtype=float)
        eigenvalues = SPECTRA[spectrum](i)
        eigenvalues = eigenvalues / eigenvalues.sum()
        start = -1 / i / np.sqrt(eigenvalues @ i**-2)
        return cls(eigenvalues, start, noise, step)

    def risk(self, difference: Array) -> Array:
        """Excess risk ``½‖w - w*‖²_H`` of differences w - w* along the last axis."""
        return np.asarray(difference**2 @ self.eigenvalues / 2)


def next_moments(p: LinearRegression, a: Array) -> Array:
    """Second moments of w - w* after one more step, ``a(1 - 2γλ + 2γ²λ²) + γ²λ Σλa + γ²σ²λ``."""
    g = p.step * p.eigenvalues
    return a * (1 - 2 * g + 2 * g**2) + p.step * g * (p.eigenvalues @ a + p.noise**2)


def expected_risks(p: LinearRegression, sizes: Collection[int], first: Array | None = None) -> list[float]:
    """Expected risk ``E ½‖w̄ - w*‖²_H`` of the average at every N of `sizes`, smallest first.

    It starts from second moments `first` ``(d,)``, or else from Δ².  It is linear in Δ² and σ²: without noise it is the
    bias, and from Δ = 0 the variance.
    """
    q = 1 - p.step * p.eigenvalues
    a = p.start**2 if first is None else first
    total, crossed = np.zeros_like(a), np.zeros_like(a)
    found = []
    for n in range(1, max(sizes, default=0) + 1):
        crossed = q * (crossed + total)
        total = total + a
        a = next_moments(p, a)
        if n in sizes:
            found.append(float(p.eigenvalues @ (total + 2 * crossed)) / (2 * n**2))
    return found


def expected_tail_risk(p: LinearRegression, n: int) -> float:
    """The expected risk of the average over the second half of n iterates."""
    a = p.start**2
    for _ in range(n // 2):
        a = next_moments(p, a)
    return expected_risks(p, [n - n // 2], a)[0]


def effective_dimension(p: LinearRegression, n: int) -> float:
    """The effective dimension ``D = k/N + Nγ² Σ_{i>k} λ²``, where k eigenvalues are at least 1/γN."""
    head = p.eigenvalues >= 1 / (p.step * n)
    return float(head.sum() / n + n * p.step**2 * (p.eigenvalues[~head] ** 2).sum())


def half_bound(p: LinearRegression, n: int) -> float:
    """Half of the bound on the excess risk, ``EB + EV``."""
    scale, delta = p.step * n, p.start**2
    head = p.eigenvalues >= 1 / scale
    top, tail = delta[head], (p.eigenvalues * delta)[~head].sum()
    bias = (top / p.eigenvalues[head]).sum() / scale**2 + tail
    level = p.noise**2 + 6 * (top.sum() + scale * tail) / scale
    return float(bias + level / (1 - 3 * p.step * p.eigenvalues.sum()) * effective_dimension(p, n))


def sampled_risks(p: LinearRegression, sizes: Sequence[int], replicas: int, rng: np.random.Generator) -> Array:
    """Excess risks ``½‖w̄ - w*‖²_H`` ``(sizes, replicas)`` of SGD itself, each example drawn once."""
    scale = np.sqrt(p.eigenvalues)
    v = np.tile(p.start, (replicas, 1))
    total = np.zeros_like(v)
    found = []
    for n in range(1, max(sizes) + 1):
        total += v
        x = rng.standard_normal(v.shape)
        x *= scale
        error = np.einsum("rd,rd->r", x, v) - p.noise * rng.standard_normal(replicas)
        x *= p.step * error[:, None]
        v -= x
        if n in sizes:
            found.append(p.risk(total / n))
    return np.array(found)


def ridge_risks(p: LinearRegression, n: int, penalties: Sequence[float], rng: np.random.Generator) -> list[float]:
    """Excess risks of ridge, ``Xᵀ(XXᵀ + μ)⁻¹y``, for every penalty μ, on one sample of n examples; 0 interpolates."""
    x = rng.standard_normal((n, len(p.eigenvalues))) * np.sqrt(p.eigenvalues)
    y = -x @ p.start + p.noise * rng.standard_normal(n)
    values, vectors = np.linalg.eigh(x @ x.T)
    turned = vectors.T @ y
    return [float(p.risk(x.T @ (vectors @ (turned / (values + m))) + p.start)) for m in penalties]


def least_squares_and_ridge(p: LinearRegression, n: int, samples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Mean excess risk of least squares, and of ridge with the best of six penalties, chosen by that risk itself."""
    penalties = [0.0, *(10.0**j * n for j in range(-5, 1))]
    risks = np.array([ridge_risks(p, n, penalties, rng) for _ in range(samples)])
    return float(risks[:, 0].mean()), float(risks[:, 1:].min(axis=1).mean())
