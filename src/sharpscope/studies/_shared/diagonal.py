"""Diagonal linear networks: gradient flows of their layers, of their product, and of a layer in polar coordinates.

w = u_1⊙…⊙u_L, g = ∇ℓ(w), v̂ = v/‖v‖, η the rate of a radius r over that of its direction:

    u̇_l = -g ⊙ ∏_{k≠l} u_k                                 layers
    d/dt log|w_i| = -L g_i sign(w_i) |w_i|^(1-2/L)            their product, if they are balanced: |u_l| = |w|^(1/L)
    d/dt log u_i = -L u_i^(L-2) g_i                           L equal layers u > 0
    ṙ = -η v̂ᵀ∇,  v̇ = -(r/‖v‖)(I - v̂v̂ᵀ)∇,  ∇ = L u^(L-1) g   the same with u = r v̂
    κ = (r_∞/r_0) exp(-(r_∞² - r_0²)/2η)                      its end is that of equal layers from κ·u_0

Weights that keep their signs are followed in their logarithms, so that no solver steps through zero.

L layers, d weights, T times, n equations.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .ode import Curve, descent, flow

Array = NDArray[np.float64]
LayerGradient = Callable[[Array], Array]
Field = Callable[[Array], Array]


def balanced(w: Array, depth: int) -> Array:
    """Split weights into balanced layers ``|w|^(1/L)`` ``(L, d)``, the signs in the first."""
    layers = np.tile(np.abs(w) ** (1 / depth), (depth, 1))
    layers[0] *= np.sign(w)
    return layers


def layered(gradient: LayerGradient, depth: int) -> Field:
    """Give the velocity of the layers ``(L·d,)`` under gradient flow, ``u̇_l = -g ⊙ ∏_{k≠l} u_k``."""
    others = [[k for k in range(depth) if k != l] for l in range(depth)]

    def field(y: Array) -> Array:
        u = y.reshape(depth, -1)
        g = gradient(u.prod(0))
        return np.concatenate([-g * u[rest].prod(0) for rest in others])

    return field


def reduced(gradient: LayerGradient, depth: int, signs: Array) -> Field:
    """Give the velocity of the logarithm of the product, ``d/dt log|w_i| = -L g_i sign(w_i) |w_i|^(1-2/L)``."""

    def field(y: Array) -> Array:
        return np.asarray(-depth * signs * gradient(signs * np.exp(y)) * np.exp(y * (1 - 2 / depth)))

    return field


def flow_of_layers(gradient: LayerGradient, layers: Array, at: Array, max_quasi_norm: float = np.inf) -> Curve:
    """Follow layers along their flow ``(T, L, d)`` to the times `at`, until ``Σ|w_i|^(2/L) >= max_quasi_norm``."""

    def residual(y: Array) -> float:
        return max_quasi_norm - float(quasi(y.reshape(layers.shape).prod(0), 2 / len(layers)))

    field = layered(gradient, len(layers))
    found = flow(field, layers.ravel(), float(at[-1]), at=at, residual=residual, small=0.0, rtol=1e-10)
    return replace(found, states=found.states.reshape(-1, *layers.shape))


def flow_of_product(
    gradient: LayerGradient,
    start: Array,
    depth: int,
    until: float,
    at: Array | None = None,
    residual: Callable[[Array], float] = lambda w: 1.0,
) -> Curve:
    """Follow the product w ``(d,)`` of balanced layers along their flow, until ``residual(w) <= 0``."""
    if depth == 1:
        return flow(layered(gradient, 1), start, until, at=at, residual=residual, small=0.0, rtol=1e-10)
    signs = np.sign(start)
    field = reduced(gradient, depth, signs)

    def residual_of_log(y: Array) -> float:
        return residual(signs * np.exp(y))

    logs = np.log(np.abs(start))
    found = flow(field, logs, until, at=at, residual=residual_of_log, small=0.0, rtol=1e-10)
    return replace(found, states=signs * np.exp(found.states))


def growth_by_descent(gradient: LayerGradient, layers: Array, rate: float, steps: int) -> tuple[float, float]:
    """Measure how much gradient descent makes ``Σ|w_i|^(2/L)`` grow, relative, and how far its steps are from the law.

    The law is ``‖u_l‖² ← ‖u_l‖² + rate²‖∇‖²``, where the loss does not depend on the scale of w; the distance is the
    greatest of all steps, relative to ‖u_l‖².
    """
    field = layered(gradient, len(layers))
    states = descent(field, layers.ravel(), rate, steps)
    slopes = np.array([field(y) for y in states[:-1]])
    norms, pushes = (np.square(v.reshape(-1, *layers.shape)).sum(2) for v in (states, slopes))
    mismatch = np.diff(norms, axis=0) / norms[:-1] - rate**2 * pushes / norms[:-1]
    total = quasi(states[[0, -1]].reshape(2, *layers.shape).prod(1), 2 / len(layers))
    return float(total[1] / total[0] - 1), float(np.abs(mismatch).max())


def quasi(w: Array, p: float) -> Array:
    """Sum powers of absolute values over the last axis, ``Σ_i |w_i|^p``."""
    return np.asarray((np.abs(w) ** p).sum(-1))


def drift(v: Array) -> float:
    """Measure how far numbers move from their first value, ``max_t |v(t)/v(0) - 1|``, the greatest over columns."""
    return float(np.abs(v / v[0] - 1).max())


def spread(w: Array) -> float:
    """Count over how many weights w is spread, ``(‖w‖₁/‖w‖₂)²``."""
    return float((np.abs(w).sum() / np.linalg.norm(w)) ** 2)


@dataclass(frozen=True)
class Sensing:
    """Fewer linear equations than unknowns, with a sparse solution: ``A x* = y``, ``ℓ = ½‖Ax - y‖²``."""

    a: Array  # A (n, d)
    truth: Array  # x* (d,)

    @classmethod
    def draw(cls, equations: int, unknowns: int, sparsity: int, rng: np.random.Generator) -> "Sensing":
        """Draw A from N(0, 1/n), and the entries of x* that are not zero from U(½, 3/2)."""
        truth = np.zeros(unknowns)
        truth[rng.choice(unknowns, sparsity, replace=False)] = rng.uniform(0.5, 1.5, sparsity)
        return cls(rng.standard_normal((equations, unknowns)) / np.sqrt(equations), truth)

    @cached_property
    def kernel(self) -> Array:
        """The projection on the kernel of A, ``I - A⁺A`` ``(d, d)``."""
        return np.asarray(np.eye(len(self.truth)) - np.linalg.pinv(self.a) @ self.a)

    def misfit(self, x: Array) -> Array:
        """Compute the residuals of the equations, ``Ax - y``."""
        return np.asarray(self.a @ (x - self.truth))

    def error(self, x: Array) -> float:
        """Compute the relative distance from the sparse solution, ``‖x - x*‖/‖x*‖``."""
        return float(np.linalg.norm(x - self.truth) / np.linalg.norm(self.truth))


@dataclass(frozen=True)
class FlowEnd:
    """The end of a flow of equal layers."""

    x: Array  # (d,)
    radius: float
    settled: bool  # Ax = y
    moved: float = 0.0  # greatest change of an entry of the invariant


def plain_flow(s: Sensing, start: Array, depth: int, until: float, small: float = 1e-8) -> FlowEnd:
    """Follow equal layers from `start` ``(d,)`` until ``‖Ax - y‖ <= small``.

    ``d/dt log u_i = -L u_i^(L-2) g_i``
    """

    def field(z: Array) -> Array:
        return np.asarray(-depth * np.exp((depth - 2) * z) * (s.a.T @ s.misfit(np.exp(depth * z))))

    def residual(z: Array) -> float:
        return float(np.linalg.norm(s.misfit(np.exp(depth * z))))

    found = flow(field, np.log(start), until, residual=residual, small=small, method="LSODA")
    u = np.exp(found.end)
    return FlowEnd(u**depth, float(np.linalg.norm(u)), found.settled)


def normalized_flow(s: Sensing, start: Array, depth: int, rate: float, until: float, small: float = 1e-8) -> FlowEnd:
    """Follow equal layers in polar coordinates from `start` ``(d,)`` until ``‖Ax - y‖ <= small``.

    ``ṙ = -η v̂ᵀ∇``, ``d/dt log v_i = -(r/‖v‖)(∇_i - v̂_i v̂ᵀ∇)/v_i`` with ``∇ = L u^(L-1) g``, ``‖v_0‖ = 1``
    """

    def parts(y: Array) -> tuple[float, Array, float]:
        v = np.exp(y[1:])
        size = float(np.linalg.norm(v))
        return float(y[0]), v / size, size

    def field(y: Array) -> Array:
        r, v, size = parts(y)
        pull = depth * (r * v) ** (depth - 2) * r * (s.a.T @ s.misfit((r * v) ** depth))  # ∇_i / v̂_i
        radial = float(v**2 @ pull)
        return np.concatenate([[-rate * radial], -(r / size**2) * (pull - radial)])

    def residual(y: Array) -> float:
        r, v, _ = parts(y)
        return float(np.linalg.norm(s.misfit((r * v) ** depth)))

    r0 = float(np.linalg.norm(start))
    found = flow(field, np.append(r0, np.log(start / r0)), until, residual=residual, small=small, method="LSODA")
    r, v, _ = parts(found.end)
    logs = found.states[:, 1:] - np.log(np.linalg.norm(np.exp(found.states[:, 1:]), axis=1, keepdims=True))
    conserved = (logs + found.states[:, :1] ** 2 / (2 * rate)) @ s.kernel
    return FlowEnd((r * v) ** depth, r, found.settled, float(np.abs(conserved - conserved[0]).max()))


def shrinkage(r0: float, r: float, rate: float) -> float:
    """Compute the factor on the start that replaces normalization, ``κ = (r/r_0) exp(-(r² - r_0²)/2η)``."""
    return float(r / r0 * np.exp(-(r**2 - r0**2) / (2 * rate)))
