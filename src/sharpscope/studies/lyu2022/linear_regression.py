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

from .._shared.toys import Array, Columns, Real, State, intrinsic_rate, unit


@dataclass(frozen=True)
class Problem:
    """Centred data ``X`` (n, d) and targets ``y`` (n,)."""

    X: Array = field(repr=False)
    y: Array = field(repr=False)

    @cached_property
    def w_star(self) -> Array:
        """``w* = X⁺ y``, the interpolant of least norm."""
        return np.linalg.pinv(self.X) @ self.y

    @cached_property
    def sigma_y(self) -> float:
        """``σ_y = √(mean y²)``."""
        return float(np.sqrt(np.mean(self.y**2)))

    @cached_property
    def Sigma(self) -> Array:
        """``Σ = XᵀX/n``."""
        return self.X.T @ self.X / len(self.y)

    @cached_property
    def b(self) -> Array:
        """``b = Xᵀy/n = Σw*``."""
        return self.X.T @ self.y / len(self.y)

    @cached_property
    def M(self) -> Array:
        """``M = 2 (Σ - Σw*w*ᵀΣ/σ_y²)``."""
        return 2 * (self.Sigma - np.outer(self.b, self.b) / self.sigma_y**2)

    @cached_property
    def N(self) -> Array:
        """Projector on null(X)."""
        return np.eye(self.X.shape[1]) - np.linalg.pinv(self.X) @ self.X

    @cached_property
    def flattest(self) -> float:
        """``‖w*‖² λ1(M)``: the least spherical sharpness on Γ, at ``w*/‖w*‖``."""
        return float(self.w_star @ self.w_star * np.linalg.eigvalsh(self.M)[-1])


def random_problem(seed: int, n: int = 8, d: int = 12) -> Problem:
    """X of N(0, 1) entries times column scales from 1.5 down to 0.5, y of N(0, 1) entries; both centred."""
    rng = np.random.default_rng(seed)
    X, y = rng.standard_normal((n, d)) * np.linspace(1.5, 0.5, d), rng.standard_normal(n)
    return Problem(X - X.mean(axis=0), y - y.mean())


def loss(p: Problem, w: Array) -> Array:
    """``L(w) = mean (σ_y Xw/‖w‖_Σ - y)²``, (B,)."""
    f = w @ p.X.T
    return np.mean((p.sigma_y * f / np.sqrt(np.mean(f**2, axis=-1, keepdims=True)) - p.y) ** 2, axis=-1)


def gradient(p: Problem, w: Array) -> Array:
    """``∇L(w) = -2σ_y (b/q - Σw (bᵀw)/q³)``, ``q = ‖w‖_Σ``, (B, d)."""
    Sw = w @ p.Sigma
    q = np.sqrt((w * Sw).sum(axis=-1, keepdims=True))
    return -2 * p.sigma_y / q * (p.b - (w @ p.b)[..., None] / q**2 * Sw)


def hessian(p: Problem, w: Array) -> Array:
    """``∇²L(w) = (2σ_y/q³) (bᵀw Σ + Σw bᵀ + b wᵀΣ - 3 bᵀw Σw wᵀΣ/q²)`` at any w, (B, d, d)."""
    Sw, bw = w @ p.Sigma, (w @ p.b)[..., None, None]
    q2 = np.sum(w * Sw, axis=-1)[..., None, None]
    cross = Sw[..., :, None] * p.b
    outer = Sw[..., :, None] * Sw[..., None, :]
    return 2 * p.sigma_y / q2**1.5 * (bw * p.Sigma + cross + np.swapaxes(cross, -1, -2) - 3 * bw / q2 * outer)


def hessian_on_minimizers(p: Problem, theta: Array) -> Array:
    """``∇²L = (2σ_y²/‖θ‖_Σ²) (Σ - Σθθᵀ Σ/‖θ‖_Σ²)`` for θ on Γ, (d, d)."""
    St = p.Sigma @ theta
    q2 = theta @ St
    return 2 * p.sigma_y**2 / q2 * (p.Sigma - np.outer(St, St) / q2)


def spherical_sharpness(p: Problem, w: Array) -> Array:
    """``λ1(∇²L(w/‖w‖))``, (B,)."""
    return np.linalg.eigvalsh(hessian(p, unit(w)))[..., -1]


def angle(p: Problem, w: Array) -> Array:
    """``α = atan2(‖Nw‖, wᵀw*/‖w*‖)``: angle to w* of the point of Γ next to w/‖w‖, (B,)."""
    return np.arctan2(np.linalg.norm(w @ p.N, axis=-1), w @ unit(p.w_star))


def minimizer(p: Problem, alpha: Real) -> Array:
    """``θ = cos α w*/‖w*‖ + sin α n̂``, n̂ the projection on null(X) of the first axis, (d,)."""
    return np.cos(alpha) * unit(p.w_star) + np.sin(alpha) * unit(p.N[0])


def sharpness_on_minimizers(p: Problem, alpha: Real) -> Real:
    """``λ1 = ‖w*‖² λ1(M)/cos²α``."""
    return p.flattest / np.cos(alpha) ** 2


def log_slope(alpha: Real) -> Real:
    """``K = ‖∇_Γ log λ1‖ = 2 tan α``."""
    return 2 * np.tan(alpha)


def angle_law(alpha0: Real, tau: Real) -> Real:
    """``tan α(τ) = tan α(0) e^{-τ}``."""
    return np.arctan(np.tan(alpha0) * np.exp(-tau))


def edge_start(p: Problem, alpha: float, lr: float, il: float) -> Array:
    """``‖w‖ Π(θ + h v)``, ``h = η/√(4+K²)``, v the top eigenvector of M, ``‖w‖² = lr λ1/(2(1-il))``, (1, d)."""
    h = intrinsic_rate(il) / np.sqrt(4 + log_slope(alpha) ** 2)
    v = np.linalg.eigh(p.M)[1][:, -1]
    return np.sqrt(lr * sharpness_on_minimizers(p, alpha) / (2 * (1 - il))) * unit(minimizer(p, alpha) + h * v)[None]


def random_starts(p: Problem, seed: int, count: int) -> Array:
    """Unit vectors, (count, d)."""
    return unit(np.random.default_rng(seed).standard_normal((count, p.X.shape[1])))


@dataclass(frozen=True)
class Descent:
    """``w ← (1-il) w - lr ∇L(w)`` from B starts: ``start``, ``advance``, ``measure``. The state is a dict of arrays.

    il = 0 is GD without weight decay.
    """

    problem: Problem
    initial: Array  # (B, d)
    lr: float
    il: float
    gradient: Callable[[Problem, Array], Array] = gradient

    def start(self) -> State:
        return {"w": self.initial, "step": np.array(0)}

    def advance(self, state: State, steps: int) -> State:
        w = state["w"]
        for _ in range(steps):
            w = (1 - self.il) * w - self.lr * self.gradient(self.problem, w)
        return {"w": w, "step": np.asarray(state["step"] + steps)}

    def measure(self, state: State) -> Columns:
        """Columns of length B. Sharpness, edge, cosine: at the midpoint of two iterates; ``loss``: their mean."""
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


def linear_gradient(p: Problem, w: Array) -> Array:
    """``∇ mean (Xw - y)² = 2 (Σw - b)``: the regression without normalization, for the control run."""
    return 2 * (w @ p.Sigma - p.b)
