"""The oscillation at the edge on the toys: levels, energy, period, bursts.

With h the component of θ across Γ, δ = η̃λ1 - 2, u = h/η, ξ = ln((4 + K²) u²) and y = δ/η, to leading order
``dξ/ds = 2y``, ``dy/ds = 2 (1 - e^ξ)``, s = ηt, so that ``E = y²/2 + e^ξ - ξ`` is conserved over a period.
"""

import math
from functools import cache

import numpy as np
import pytest

from sharpscope.studies._shared import toys
from sharpscope.studies._shared.toys import Array, Toy

LR = 0.1


def toy(name: str) -> Toy:
    return Toy(*toys.NAMED[name])


@cache
def path(name: str, il: float, steps: int, u: float | None, h: float | None = None, edge: float = 2.0) -> Array:
    """Weights ``(steps + 1, 3)`` of gradient descent with weight decay from φ = 1, h given or in units of its mean."""
    t = toy(name)
    fixed = toys.rmsprop_rate(il) / math.sqrt(4 + float(toys.log_slope(t, 1.0)) ** 2)
    w = tuple(toys.edge_start(t, 1.0, LR, il, edge, fixed * u if u is not None else h).tolist())
    out = [w]
    for _ in range(steps):
        w = toys.gd_step(t, w, LR, il / LR)
        out.append(w)
    return np.array(out)


def seen(name: str, il: float, w: Array) -> dict[str, Array]:
    """What the laws are about, per step."""
    t, eta = toy(name), float(toys.rmsprop_rate(il))
    phi = toys.project(t, w)
    sharpness, K = toys.top_eigenvalue(t, phi), toys.log_slope(t, phi)
    rate = LR / ((1 - il) * np.sum(w * w, axis=1))
    h = np.sum((toys.unit(w) - toys.minimizer(t, phi)) * toys.top_direction(t, phi), axis=1)
    gradient = np.linalg.norm(toys.gradient(t, toys.unit(w)), axis=1)
    size, y = (4 + K**2) * (h / eta) ** 2, (rate * sharpness - 2) / eta
    return {
        "phi": phi,
        "sharpness": sharpness,
        "K": K,
        "eta_lambda": rate * sharpness,
        "h": h,
        "loss": toys.loss(t, w),
        "angle": rate * gradient,
        "size": size,  # e^ξ
        "y": y,
        "energy": y**2 / 2 + size - np.log(size),
        "radius": np.linalg.norm(w, axis=1),
    }


def lambert(energy: float) -> float:
    """The larger solution of ``x - ln x = E``: ``-W₋₁(-e^-E)``."""
    x = energy + 1
    for _ in range(50):
        x = energy + math.log(x)
    return x


def test_levels_at_the_edge() -> None:
    """Over 28 envelopes: mean η̃λ1 is 2, mean loss λ1 il/(4 + K²), RMS angle per step 2η/√(4 + K²); period two."""
    il = 1e-5
    r = seen("A3", il, path("A3", il, 20_000, 0.3))
    eta, spread = float(toys.rmsprop_rate(il)), 4 + r["K"] ** 2
    assert r["eta_lambda"].mean() == pytest.approx(2, abs=1e-3)
    assert (r["loss"] / (r["sharpness"] * il / spread)).mean() == pytest.approx(1, abs=0.02)
    assert math.sqrt((r["angle"] ** 2 * spread / (4 * eta**2)).mean()) == pytest.approx(1, abs=0.01)
    assert np.mean(r["h"][1:] * r["h"][:-1] < 0) >= 0.99


@pytest.mark.parametrize(("il", "tolerance"), [(1e-5, 2e-3), (1e-3, 2e-2)])
def test_squared_norm_is_a_sharpness_meter(il: float, tolerance: float) -> None:
    r = seen("A3", il, path("A3", il, round(0.1 / il), 1.0))
    assert (r["radius"] ** 2 / (LR * r["sharpness"] / 2)).mean() == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("u", [0.9, 0.2])
def test_energy_over_a_period(u: float) -> None:
    """Conserved to 2 %, and the highest amplitude is where it says, to 1 %."""
    il = 1e-7
    r = seen("A1", il, path("A1", il, 10_000, u))
    first = float(r["energy"][0])
    period = 2 * int(np.argmax(r["size"][: len(r["size"]) // 2 * 2]))
    assert 1000 < period <= 10_000
    assert np.abs(r["energy"][: period + 1] / first - 1).max() <= 0.02
    assert r["size"].max() == pytest.approx(lambert(first), rel=0.01)


def test_period_of_small_oscillations() -> None:
    """``π/√(2 il)`` steps within .5 %; its logarithm falls half as fast as that of il."""
    periods = []
    for il in (1e-5, 1e-6, 1e-7):
        r = seen("A1", il, path("A1", il, round(7 * math.pi / math.sqrt(2 * il)), 0.9))
        x = r["size"][::2] - r["size"][::2].mean()
        up = np.flatnonzero((x[:-1] < 0) & (x[1:] >= 0)) + (-x[:-1] / np.diff(x))[(x[:-1] < 0) & (x[1:] >= 0)]
        periods.append(2 * float(up[-1] - up[0]) / (len(up) - 1))
    assert periods[-1] == pytest.approx(math.pi / math.sqrt(2e-7), rel=5e-3)
    assert math.log10(periods[0] / periods[2]) / 2 == pytest.approx(-0.5, abs=0.01)


@pytest.mark.parametrize("h", [1e-5, 1e-8, 1e-12])
@pytest.mark.parametrize(("il", "tolerance"), [(1e-7, 0.03), (1e-5, 0.12)])
def test_first_burst(h: float, il: float, tolerance: float) -> None:
    """From η̃λ1 = 2 with a residual h: ``δ_max = η √(2 (E0 - 1))``, ``E0 = x0 - ln x0``, ``x0 = (4 + K²) h²/η²``."""
    eta = float(toys.rmsprop_rate(il))
    r = seen("A1", il, path("A1", il, round(10 / eta), None, h))
    x = (4 + 4) * (h / eta) ** 2
    assert eta * r["y"].max() == pytest.approx(eta * math.sqrt(2 * (x - math.log(x) - 1)), rel=tolerance)


def test_sharpness_never_falls_faster_than_weight_decay_allows() -> None:
    """``Δ log λ1 + 2 Δτ ≥ -5η`` between any two times."""
    il = 1e-4
    r = seen("A2", il, path("A2", il, 5000, 1.0))
    undecayed = np.log(r["sharpness"]) + 2 * il * np.arange(len(r["sharpness"]))
    assert (undecayed - np.maximum.accumulate(undecayed)).min() >= -5 * float(toys.rmsprop_rate(il))


@pytest.mark.parametrize("u", [1.5, 0.02])
def test_generic_starts_stay_near_the_flow(u: float) -> None:
    """Energies from 1.3 to 7: path error at most 3η over τ = 2."""
    il = 1e-4
    w = path("A3", il, 20_000, u)
    tau = np.linspace(0, 2, 201)
    flow = toys.flow(toy("A3"), 1.0, tau.tolist()).ravel()
    phi = toys.project(toy("A3"), w[::100])
    assert np.abs(phi - flow).max() <= 3 * float(toys.rmsprop_rate(il))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5])
def test_heavy_ball_follows_the_same_flow_on_its_own_clock(momentum: float) -> None:
    """From its fixed point, threshold 2 (1 + mom), over τ = il t/(1 - mom) = .1: the speed to 1e-4."""
    il, t, K = 1e-6, toy("A1"), 2.0
    edge = 2 * (1 + momentum)
    h = math.sqrt(2 * il / ((1 + momentum) * (4 + K**2)))
    w = toys.edge_start(t, 1.0, LR, il, edge, h)
    other = toys.edge_start(t, 1.0, LR, il, edge, -h)
    x, y, z = w.tolist()
    bx, by, bz = ((other - w) / LR).tolist()  # as if the last step had come from the other side
    wd = il / LR
    steps = round(0.1 * (1 - momentum) / il / 2) * 2
    for _ in range(steps):
        gx, gy, gz = toys.slope(t, x, y, z, math)
        bx, by, bz = momentum * bx + gx + wd * x, momentum * by + gy + wd * y, momentum * bz + gz + wd * z
        x, y, z = x - LR * bx, y - LR * by, z - LR * bz
    drift = 1.0 - float(toys.project(t, np.array([x, y, z])))
    assert drift / (il * steps / (1 - momentum)) == pytest.approx(2 * K / (4 + K**2), rel=1e-4)
