"""Linear regression with batch normalization, more dimensions than points: every claim in closed form.

Model σ_y X w/‖w‖_Σ on centred data, ‖w‖_Σ² = wᵀΣw, loss L(w) = (1/n) Σ_i (σ_y x_iᵀw/‖w‖_Σ - y_i)², scale-invariant.
With w* = X⁺y, the interpolant of least norm, the minimizers on the unit sphere are half a sphere Γ,
    θ = cos α w*/‖w*‖ + sin α n̂,   n̂ in null(X), |α| < π/2,
    λ1 = ‖w*‖² λ1(M)/cos²α,   M = 2 (Σ - Σw*w*ᵀΣ/σ_y²),   K = 2 tan α,   tan α(τ) = tan α(0) e^{-τ}.

n points in d > n - 1 dimensions; B starts in the leading axis of w (B, d).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .._shared.toys import Array, ProcessState, Real, ToyColumns, rmsprop_rate, unit


@dataclass(frozen=True)
class RegressionProblem:
    """Centred data ``X`` (n, d) and targets ``y`` (n,)."""

    X: Array = field(repr=False)
    y: Array = field(repr=False)

    @cached_property
    def w_star(self) -> Array:
        """The interpolant of least norm, ``w* = X⁺ y``."""
        return np.linalg.pinv(self.X) @ self.y

    @cached_property
    def sigma_y(self) -> float:
        """The root mean square of the targets, ``σ_y = √(mean y²)``."""
        return float(np.sqrt(np.mean(self.y**2)))

    @cached_property
    def Sigma(self) -> Array:
        """The covariance of the data, ``Σ = XᵀX/n``."""
        return self.X.T @ self.X / len(self.y)

    @cached_property
    def b(self) -> Array:
        """The covariance of data and targets, ``b = Xᵀy/n = Σw*``."""
        return self.X.T @ self.y / len(self.y)

    @cached_property
    def M(self) -> Array:
        """The Hessian on Γ up to a factor, ``M = 2 (Σ - Σw*w*ᵀΣ/σ_y²)``."""
        return 2 * (self.Sigma - np.outer(self.b, self.b) / self.sigma_y**2)

    @cached_property
    def N(self) -> Array:
        """The projector on the null space of the data."""
        return np.eye(self.X.shape[1]) - np.linalg.pinv(self.X) @ self.X

    @cached_property
    def flattest(self) -> float:
        """The least spherical sharpness on Γ, ``‖w*‖² λ1(M)`` at ``w*/‖w*‖``."""
        return float(self.w_star @ self.w_star * np.linalg.eigvalsh(self.M)[-1])


def random_problem(seed: int, n: int = 8, d: int = 12) -> RegressionProblem:
    """Draw X of N(0, 1) entries times column scales from 1.5 down to 0.5, y of N(0, 1) entries; both centred."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) * np.linspace(1.5, 0.5, d)
    y = rng.standard_normal(n)
    return RegressionProblem(X - X.mean(axis=0), y - y.mean())


def loss(p: RegressionProblem, w: Array) -> Array:
    """The loss ``L(w) = mean (σ_y Xw/‖w‖_Σ - y)²``, (B,)."""
    f = w @ p.X.T
    return np.mean((p.sigma_y * f / np.sqrt(np.mean(f**2, axis=-1, keepdims=True)) - p.y) ** 2, axis=-1)


def gradient(p: RegressionProblem, w: Array) -> Array:
    """The gradient of the loss, ``-2σ_y (b/q - Σw (bᵀw)/q³)`` with ``q = ‖w‖_Σ``, (B, d)."""
    Sw = w @ p.Sigma
    q = np.sqrt((w * Sw).sum(axis=-1, keepdims=True))
    return -2 * p.sigma_y / q * (p.b - (w @ p.b)[..., None] / q**2 * Sw)


def hessian(p: RegressionProblem, w: Array) -> Array:
    """The Hessian of the loss at any w, (B, d, d).

    ``∇²L(w) = (2σ_y/q³) (bᵀw Σ + Σw bᵀ + b wᵀΣ - 3 bᵀw Σw wᵀΣ/q²)``, ``q = ‖w‖_Σ``
    """
    Sw, bw = w @ p.Sigma, (w @ p.b)[..., None, None]
    q2 = np.sum(w * Sw, axis=-1)[..., None, None]
    cross = Sw[..., :, None] * p.b
    outer = Sw[..., :, None] * Sw[..., None, :]
    return 2 * p.sigma_y / q2**1.5 * (bw * p.Sigma + cross + np.swapaxes(cross, -1, -2) - 3 * bw / q2 * outer)


def hessian_on_minimizers(p: RegressionProblem, theta: Array) -> Array:
    """The Hessian of the loss on Γ, ``(2σ_y²/‖θ‖_Σ²) (Σ - Σθθᵀ Σ/‖θ‖_Σ²)``, (d, d)."""
    St = p.Sigma @ theta
    q2 = theta @ St
    return 2 * p.sigma_y**2 / q2 * (p.Sigma - np.outer(St, St) / q2)


def spherical_sharpness(p: RegressionProblem, w: Array) -> Array:
    """The spherical sharpness ``λ1(∇²L(w/‖w‖))`` [N7], (B,)."""
    return np.linalg.eigvalsh(hessian(p, unit(w)))[..., -1]


def angle(p: RegressionProblem, w: Array) -> Array:
    """The angle to w* of the point of Γ next to w/‖w‖, ``α = atan2(‖Nw‖, wᵀw*/‖w*‖)``, (B,)."""
    return np.arctan2(np.linalg.norm(w @ p.N, axis=-1), w @ unit(p.w_star))


def minimizer(p: RegressionProblem, alpha: Real) -> Array:
    """The point of Γ at an angle α to w*, with the first axis projected on null(X) as n̂, (d,)."""
    return np.cos(alpha) * unit(p.w_star) + np.sin(alpha) * unit(p.N[0])


def sharpness_on_minimizers(p: RegressionProblem, alpha: Real) -> Real:
    """The spherical sharpness on Γ at an angle α to w*, ``‖w*‖² λ1(M)/cos²α``."""
    return p.flattest / np.cos(alpha) ** 2


def log_slope(alpha: Real) -> Real:
    """The slope of the log sharpness along Γ, ``K = ‖∇_Γ log λ1‖ = 2 tan α``."""
    return 2 * np.tan(alpha)


def angle_law(alpha0: Real, tau: Real) -> Real:
    """The angle that the flow predicts at τ, ``tan α(τ) = tan α(0) e^{-τ}``."""
    return np.arctan(np.tan(alpha0) * np.exp(-tau))


def edge_start(p: RegressionProblem, alpha: float, lr: float, il: float) -> Array:
    """Weights at the fixed point of the oscillation over the point of Γ at α, (1, d).

    ``‖w‖ Π(θ + h v)`` with ``h = η/√(4+K²)``, v the top eigenvector of M, ``‖w‖² = lr λ1/(2(1-il))``
    """
    h = rmsprop_rate(il) / np.sqrt(4 + log_slope(alpha) ** 2)
    v = np.linalg.eigh(p.M)[1][:, -1]
    norm = np.sqrt(lr * sharpness_on_minimizers(p, alpha) / (2 * (1 - il)))
    return norm * unit(minimizer(p, alpha) + h * v)[None]


def random_starts(p: RegressionProblem, seed: int, count: int) -> Array:
    """Draw weights of unit norm, (count, d)."""
    return unit(np.random.default_rng(seed).standard_normal((count, p.X.shape[1])))


@dataclass(frozen=True)
class RegressionDescent:
    """Gradient descent with weight decay from B starts, ``w ← (1-il) w - lr ∇L(w)``; a `Process`.

    il = 0 is GD without weight decay.
    """

    problem: RegressionProblem
    initial: Array  # (B, d)
    lr: float
    il: float
    gradient: Callable[[RegressionProblem, Array], Array] = gradient

    def start(self) -> ProcessState:
        return {"w": self.initial, "step": np.array(0)}

    def advance(self, state: ProcessState, steps: int) -> ProcessState:
        w = state["w"]
        for _ in range(steps):
            w = (1 - self.il) * w - self.lr * self.gradient(self.problem, w)
        return {"w": w, "step": np.asarray(state["step"] + steps)}

    def measure(self, state: ProcessState) -> ToyColumns:
        """ToyColumns of length B: sharpness and cosine at the midpoint of two iterates, ``loss`` as their mean."""
        p, w, after = self.problem, state["w"], self.advance(state, 1)["w"]
        middle = (w + after) / 2
        sharpness = spherical_sharpness(p, middle)
        columns = {
            "step": state["step"],
            "tau": self.il * state["step"],
            "alpha": angle(p, w),
            "null_norm": np.linalg.norm(w @ p.N, axis=-1),
            "radius": np.linalg.norm(w, axis=-1),
            "loss": (loss(p, w) + loss(p, after)) / 2,
            "midpoint_loss": loss(p, middle),
            "spherical_sharpness": sharpness,
            "eta_lambda": self.lr / ((1 - self.il) * np.sum(middle**2, axis=-1)) * sharpness,
            "cosine": unit(middle) @ unit(p.w_star),
        }
        return {name: np.broadcast_to(column, len(w)) for name, column in columns.items()}


def linear_gradient(p: RegressionProblem, w: Array) -> Array:
    """The gradient of the regression without normalization, ``∇ mean (Xw - y)² = 2 (Σw - b)``."""
    return 2 * (w @ p.Sigma - p.b)
