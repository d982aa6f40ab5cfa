"""A curve of minimizers on the unit sphere of R³, and the dynamics that slide along it.

With φ = atan2(y, x) and s = z/‖w‖ - a sin 2φ,
    L(w) = e^{g(φ)} (s²/2 + κ s³/3 + μ s⁴/4),      g(φ) = c1 φ + c2 sin φ
is scale-invariant, and Γ = {s = 0} is a curve of minimizers known in closed form. With f = a sin 2φ, c² = 1 - f²,
    dℓ/dφ = √q,   q = c² + f'²/c²,   λ1 = e^g q,   K = (d log λ1/dφ)/(dℓ/dφ).

B replicas: fields of a Toy, φ, λ1, K are (B,) or one number; weights are (B, 3); τ = il·t with il = lr·wd, η ≈ √(2 il).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidValue

Array = NDArray[Any]
Real = Any  # a float or an array of floats: the equations below are the same for both
Particle = tuple[float, ...]  # the coordinates of one replica
ProcessState = dict[str, Array]
ToyColumns = dict[str, Array]
ARRAYS = SimpleNamespace(sqrt=np.sqrt, exp=np.exp, atan2=np.arctan2)
NAMED = {"A1": (2, 0, 0, 0, 0), "A2": (6, 0, 0, 0, 0), "A3": (0, 2, 0.3, 1, 2), "A4": (0, 0.3, 0.3, 2, 6)}


@dataclass(frozen=True)
class Toy:
    """The constants of a loss, ``L = e^{c1 φ + c2 sin φ} (s²/2 + κ s³/3 + μ s⁴/4)`` with ``s = z/‖w‖ - a sin 2φ``."""

    c1: Real
    c2: Real = 0.0
    a: Real = 0.0
    kappa: Real = 0.0
    mu: Real = 0.0

    def replicas(self, size: int) -> list["Toy"]:
        """The B = `size` toys one by one, their constants as Python floats."""
        columns = [np.broadcast_to(np.asarray(getattr(self, field.name), float), size) for field in fields(self)]
        return [Toy(*constants) for constants in np.column_stack(columns).tolist()]


def named(*names: str) -> Toy:
    """Toys of these names side by side: ``named("A1", "A3")`` has B = 2."""
    return Toy(*np.array([NAMED[name] for name in names], dtype=float).T)


def height(toy: Toy, w: Array) -> Array:
    """The height over Γ, ``s = z/‖w‖ - a sin 2φ``."""
    return w[..., 2] / np.linalg.norm(w, axis=-1) - toy.a * np.sin(2 * np.arctan2(w[..., 1], w[..., 0]))


def loss(toy: Toy, w: Array) -> Array:
    """The loss of each replica, ``L(w) = e^{g(φ)} (s²/2 + κ s³/3 + μ s⁴/4)``, (B,)."""
    s, phi = height(toy, w), np.arctan2(w[..., 1], w[..., 0])
    return np.exp(toy.c1 * phi + toy.c2 * np.sin(phi)) * s**2 * (1 / 2 + toy.kappa * s / 3 + toy.mu * s**2 / 4)


def slope(toy: Toy, x: Real, y: Real, z: Real, lib: Any) -> tuple[Real, Real, Real]:
    """The gradient of the loss by coordinates; `lib` is ARRAYS for arrays and math for floats.

    ``∇L = e^g (ℓ'(s) ∇s + ℓ(s) g'(φ) ∇φ)``, ``∇φ = (-y, x, 0)/ρ²``, ``∇s = ẑ/r - z w/r³ - 2a cos 2φ ∇φ``
    """
    rho2 = x * x + y * y
    r2 = rho2 + z * z
    rho, r = lib.sqrt(rho2), lib.sqrt(r2)
    cos, sin = x / rho, y / rho
    s = z / r - 2 * toy.a * sin * cos
    e = lib.exp(toy.c1 * lib.atan2(y, x) + toy.c2 * sin)
    by_s = e * s * (1 + s * (toy.kappa + s * toy.mu))
    by_phi = e * s * s * (1 / 2 + s * (toy.kappa / 3 + s * toy.mu / 4)) * (toy.c1 + toy.c2 * cos)
    turn = (by_phi - 2 * toy.a * (cos * cos - sin * sin) * by_s) / rho2
    lift = by_s / (r * r2)
    return -lift * z * x - turn * y, -lift * z * y + turn * x, lift * rho2


def gradient(toy: Toy, w: Array) -> Array:
    """The gradient of the loss, ``∇L(w)`` (B, 3)."""
    return np.stack(slope(toy, w[..., 0], w[..., 1], w[..., 2], ARRAYS), axis=-1)


def minimizer(toy: Toy, phi: Real) -> Array:
    """The point of Γ at φ, ``n(φ) = (c cos φ, c sin φ, f)``."""
    f = toy.a * np.sin(2 * phi)
    c = np.sqrt(1 - f**2)
    return np.stack(np.broadcast_arrays(c * np.cos(phi), c * np.sin(phi), f), axis=-1)


def arc_speed(toy: Toy, phi: Real) -> Real:
    """The length of Γ per unit of φ, ``dℓ/dφ = √(c² + f'²/c²)``."""
    f, df = toy.a * np.sin(2 * phi), 2 * toy.a * np.cos(2 * phi)
    return np.sqrt(1 - f**2 + df**2 / (1 - f**2))


def top_eigenvalue(toy: Toy, phi: Real) -> Real:
    """The spherical sharpness at n(φ), ``λ1 = e^g (dℓ/dφ)²``."""
    return np.exp(toy.c1 * phi + toy.c2 * np.sin(phi)) * arc_speed(toy, phi) ** 2


def log_slope(toy: Toy, phi: Real) -> Real:
    """The slope of log λ1 along Γ, with its sign.

    ``K = (g' + q'/q)/√q``, ``q' = 2 f f' (f'²/c⁴ - 4/c² - 1)``
    """
    f, df = toy.a * np.sin(2 * phi), 2 * toy.a * np.cos(2 * phi)
    c2, q = 1 - f**2, arc_speed(toy, phi) ** 2
    return (toy.c1 + toy.c2 * np.cos(phi) + 2 * f * df * (df**2 / c2**2 - 4 / c2 - 1) / q) / np.sqrt(q)


def unit(w: Array) -> Array:
    """The direction of the weights, ``Π(w) = w/‖w‖`` [N5]."""
    return w / np.linalg.norm(w, axis=-1, keepdims=True)


def height_gradient(toy: Toy, w: Array) -> Array:
    """The gradient of the height at ‖w‖ = 1, ``∇s = ẑ - z w - 2a cos 2φ (-y, x, 0)/ρ²``."""
    x, y, z = w[..., 0], w[..., 1], w[..., 2]
    turn = 2 * toy.a * (x * x - y * y) / (x * x + y * y) ** 2
    return np.stack(np.broadcast_arrays(turn * y - z * x, -turn * x - z * y, 1 - z * z), axis=-1)


def top_direction(toy: Toy, phi: Real) -> Array:
    """The top eigenvector at n(φ), ``v1 = Π(∇s)``, since ``∇²L = e^g ∇s ∇sᵀ``."""
    return unit(height_gradient(toy, minimizer(toy, phi)))


def project(toy: Toy, w: Array) -> Array:
    """The φ of the point of Γ that four Newton steps reach, ``θ ← Π(θ - s ∇s/‖∇s‖²)``."""
    theta = unit(w)
    for _ in range(4):
        ds = height_gradient(toy, theta)
        theta = unit(theta - (height(toy, theta) / np.sum(ds * ds, axis=-1))[..., None] * ds)
    return np.arctan2(theta[..., 1], theta[..., 0])


def flow(toy: Toy, phi0: Real, taus: Iterable[float], constant: float = 4.0, dtau: float = 0.01) -> Array:
    """Solve ``dφ/dτ = -2K/((4 + K²) dℓ/dφ)`` by Runge-Kutta steps; φ(τ), (T, B); `constant` stands for the 4."""

    def velocity(phi: Real) -> Real:
        K = log_slope(toy, phi)
        return -2 * K / ((constant + K**2) * arc_speed(toy, phi))

    path = []
    phi, tau = phi0 + 0 * velocity(phi0), 0.0
    for target in taus:
        count = math.ceil((target - tau) / dtau)
        for h in [(target - tau) / count] * count if count else ():
            k1 = velocity(phi)
            k2 = velocity(phi + h / 2 * k1)
            k3 = velocity(phi + h / 2 * k2)
            phi = phi + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(phi + h * k3))
        path.append(phi)
        tau = target
    return np.stack(path)


def rmsprop_rate(il: Real) -> Real:
    """The learning rate of the equivalent RMSprop, ``η = √((1 - β)/(2β)) ≈ √(2 il)`` with ``β = (1 - il)⁴`` [N9]."""
    return np.sqrt(((1 - il) ** -4 - 1) / 2)


def edge_start(toy: Toy, phi: Real, lr: Real, il: Real, edge: Real = 2.0, h: Real = None) -> Array:
    """Weights off n(φ) by h where η̃λ1 is `edge`: by default the fixed point of the oscillation, (B, 3).

    ``‖w‖ Π(n + h v1)``, ``‖w‖² = lr λ1/((1-il) edge)``; at the fixed point the edge is 2 and ``h = η/√(4+K²)``
    """
    if h is None:
        h = rmsprop_rate(il) / np.sqrt(4 + log_slope(toy, phi) ** 2)
    theta = unit(minimizer(toy, phi) + np.asarray(h)[..., None] * top_direction(toy, phi))
    norm = np.sqrt(lr * top_eigenvalue(toy, phi) / ((1 - il) * edge))
    return theta * np.asarray(norm)[..., None]


def gd_step(toy: Toy, w: Particle, lr: float, wd: float) -> Particle:
    """One step of gradient descent with weight decay, ``w ← (1 - lr wd) w - lr ∇L(w)`` [N10]."""
    x, y, z = w
    dx, dy, dz = slope(toy, x, y, z, math)
    keep = 1 - lr * wd
    return keep * x - lr * dx, keep * y - lr * dy, keep * z - lr * dz


def rmsprop_step(toy: Toy, theta_v: Particle, eta: float, C: float, update_first: bool) -> Particle:
    """One step of scalar RMSprop on the sphere [N11], with the v before its update or the one after it.

    ``θ ← Π(θ - (η/√v) ∇L(θ))``, ``v ← β v + (1-β)‖∇L(θ)‖²``, ``β = 1 - C η²``
    """
    x, y, z, v = theta_v
    dx, dy, dz = slope(toy, x, y, z, math)
    updated = v + C * eta**2 * (dx * dx + dy * dy + dz * dz - v)
    lr = eta / math.sqrt(updated if update_first else v)
    x, y, z = x - lr * dx, y - lr * dy, z - lr * dz
    r = math.sqrt(x * x + y * y + z * z)
    return x / r, y / r, z / r, updated


@dataclass(frozen=True)
class ToyProcess:
    """B particles under B rules, a `Process` whose state is ready to be saved.

    Each particle walks alone on Python floats: with three coordinates, arrays over replicas are slower below B = 20.
    """

    toy: Toy
    initial: Array  # (B, 3): w; under scalar RMSprop (B, 4): θ and v
    rules: tuple[Callable[[Particle], Particle], ...]
    effective_rate: Callable[[Array], Array]  # particles to lr_eff, (B,)
    tau_per_step: float

    def start(self) -> ProcessState:
        return {"particle": self.initial, "step": np.array(0)}

    def advance(self, state: ProcessState, steps: int) -> ProcessState:
        ends = []
        for rule, coordinates in zip(self.rules, state["particle"].tolist(), strict=True):
            particle = tuple(coordinates)
            for _ in range(steps):
                particle = rule(particle)
            ends.append(particle)
        return {"particle": np.array(ends), "step": np.asarray(state["step"] + steps)}

    def measure(self, state: ProcessState) -> ToyColumns:
        """ToyColumns of length B: φ and λ1 of the projection n on Γ, and the height over it, ``h = (θ - n)ᵀ v1``."""
        w = state["particle"][:, :3]
        theta, phi = unit(w), project(self.toy, w)
        sharpness = top_eigenvalue(self.toy, phi)
        columns = dict(zip("xyz", theta.T, strict=True)) | {
            "step": state["step"],
            "tau": self.tau_per_step * state["step"],
            "phi": phi,
            "h": np.sum((theta - minimizer(self.toy, phi)) * top_direction(self.toy, phi), axis=-1),
            "loss": loss(self.toy, w),
            "spherical_sharpness": sharpness,
            "eta_lambda": self.effective_rate(state["particle"]) * sharpness,
            "radius": np.linalg.norm(w, axis=-1),
        }
        return {name: np.broadcast_to(column, len(w)) for name, column in columns.items()}


def descent(toy: Toy, phi: Real, lr: float, il: float, edge: Real = 2.0, h: Real = None) -> ToyProcess:
    """Gradient descent with weight decay from `edge_start`, ``lr_eff = lr/((1-il)‖w‖²)`` [N8]; without it at il = 0."""
    w = np.atleast_2d(edge_start(toy, phi, lr, il, edge, h))
    rules = tuple(partial(gd_step, one, lr=lr, wd=il / lr) for one in toy.replicas(len(w)))
    return ToyProcess(toy, w, rules, lambda w: lr / ((1 - il) * np.sum(w * w, axis=-1)), il)


def scalar_rmsprop(toy: Toy, phi: Real, eta: float, C: Array, update_first: Array) -> ToyProcess:
    """Scalar RMSprop on the sphere from its fixed point ``h = η √(C/(4C + 2K²))``, ``√v = η λ1/2``; τ = η² t/2."""
    h = eta * np.sqrt(C / (4 * C + 2 * log_slope(toy, phi) ** 2))
    theta = unit(edge_start(toy, phi, 1.0, 0.0, h=h))
    v = np.broadcast_to((eta * top_eigenvalue(toy, phi) / 2) ** 2, len(theta))
    each = zip(toy.replicas(len(theta)), C.tolist(), update_first.tolist(), strict=True)
    rules = tuple(partial(rmsprop_step, one, eta=eta, C=c, update_first=first) for one, c, first in each)
    return ToyProcess(toy, np.column_stack([theta, v]), rules, lambda p: eta / np.sqrt(p[:, 3]), eta**2 / 2)


def columns_at(process: Any, steps: Iterable[int]) -> ToyColumns:
    """The columns that a `Process` measures at those steps, (T, B)."""
    state, rows = process.start(), []
    for step in steps:
        state = process.advance(state, step - int(state["step"]))
        rows.append(process.measure(state))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def measurement_steps(il: float, end: float = 2.0, count: int = 100) -> list[int]:
    """Steps from 0 to end/il: even ones, and 40 within the first and within the last ``2π/η``, two oscillations.

    The error of a path swings with the oscillation: an even grid alone misses its peaks by a factor of two.
    """
    total, burst = round(end / il), np.linspace(0, 2 * math.pi / rmsprop_rate(il), 40)
    times = np.concatenate([np.linspace(0, total, count + 1), burst, total - burst])
    return sorted({round(t) for t in times.tolist() if 0 <= t <= total})


def path_error(toy: Toy, phi0: Real, tau: Array, phi: Array, constant: float = 4.0) -> Array:
    """The largest distance of ``phi`` (T, B) at ``tau`` (T,) from the flow, ``sup_τ |φ - φ_flow|``, (B,)."""
    return np.max(np.abs(phi - flow(toy, phi0, tau, constant)), axis=0)


def fit_speed(K: Array, speed: Array) -> tuple[float, float]:
    """Fit A and B of ``speed = A K/(B + K²)`` by the straight line ``K/speed = B/A + K²/A``."""
    inverse, offset = np.polyfit(K**2, K / speed, 1)
    return float(1 / inverse), float(offset / inverse)


def entry_time(tau: Array, edge: Array) -> float:
    """The τ at which one replica's lr_eff·λ1 first passes 2, log-linear between two measurements."""
    i = int(np.argmax(edge > 2))
    if i == 0:
        raise InvalidValue(
            f"lr_eff·λ1 does not pass 2: it starts at {edge[0]:.4g} and its largest value is {edge.max():.4g}"
        )
    return float(np.interp(math.log(2), np.log(edge[i - 1 : i + 1]), tau[i - 1 : i + 1]))


def portrait(il: float = 1e-3, end: float = 2.3) -> dict[str, ToyColumns]:
    """Toy A3 on the sphere: ``minimizers`` (Γ), ``gd`` from below the edge and through its entry, ``flow`` from there.

    GD is shown at every step while it is off Γ, so that the oscillation is seen, and at every 15th otherwise.
    """
    toy = named("A3")
    every = columns_at(descent(toy, 1.0, 0.1, il, edge=1.9, h=0.02), range(round(end / il)))
    shown = (np.abs(every["h"]) > 0.01) | (every["step"] % 15 == 0)
    gd = {name: column[shown] for name, column in every.items()}
    tau = np.linspace(0, end - entry_time(gd["tau"], gd["eta_lambda"]), 200)
    curves = {"minimizers": np.linspace(-math.pi, math.pi, 361), "flow": flow(toy, 1.0, tau)[:, 0]}
    return {"gd": gd} | {
        run: dict(zip("xyz", minimizer(toy, phi).T, strict=True), phi=phi, spherical_sharpness=top_eigenvalue(toy, phi))
        for run, phi in curves.items()
    }
