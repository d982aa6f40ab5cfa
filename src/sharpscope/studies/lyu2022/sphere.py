"""Toys on the sphere in three dimensions: a curve of minima in closed form, and the flow along it.

Gradient descent with weight decay at the edge should move along the curve by ``dζ/dτ = -2 ∇log λ1/(4 + K²)``,
K = ‖∇log λ1‖, up to errors of order il (FP start: at the fixed point of the oscillation).
"""

from typing import Any

import numpy as np

from ...records.history import History
from ...records.run_log import RunLog
from ...report.charts import Chart, SphereChart
from .._framework.claims import Claim, at_least, at_most
from .._framework.study import Job, Progress
from .._shared import toys
from .._shared.walk import walk, write
from .config import LR_CLOSED, Config

PART = "Toys on the sphere"
SPEEDS = np.array([0.5, 1.0, 2.0, 4.0, 8.0])
ABOVE, KICKED = 0.003, np.array([0.5, 2.0, 6.0])  # distance above the edge, and K, of the catapults
BELOW = (1.5, 1.9)
ETA = 1e-3
RMSPROP = [(c, k, first) for c in (0.5, 2.0, 8.0) for k in (2.0, 6.0) for first in (False, True)]


def jobs(config: Config) -> list[Job]:
    paths = [Job(f"toys, il {il:g}", _paths, {"il": il}, max(0.2, 1.3e-5 / il)) for il in config.toy_rates]
    return [
        *paths,
        Job("toy speeds", _speeds, {"il": config.speed_rate}, 5e-6 / config.speed_rate),
        Job("toy entry", _entry, {"il": config.toy_rates[-1]}, max(0.2, 1e-6 / config.toy_rates[-1])),
        Job("toy below the edge", _below, {"steps": config.frozen_steps}, 3e-6 * config.frozen_steps),
        Job("toy catapults", _catapults, {}, 0.3),
        Job("toy RMSprop", _rmsprop, {"steps": config.rmsprop_steps}, 2e-5 * config.rmsprop_steps),
        Job("toy portrait", _portrait, {}, 1.0),
    ]


def _paths(log: RunLog, progress: Progress, il: float) -> None:
    process = toys.descent(toys.named(*toys.NAMED), 1.0, LR_CLOSED, il)
    walk(log, progress, process, [f"{toy}, il {il:g}" for toy in toys.NAMED], toys.reading_steps(il))


def _speeds(log: RunLog, progress: Progress, il: float) -> None:
    process = toys.descent(toys.Toy(SPEEDS), 1.0, LR_CLOSED, il)
    walk(log, progress, process, [f"A1 with K {k:g}" for k in SPEEDS], _evenly(0.5 / il, 10))


def _entry(log: RunLog, progress: Progress, il: float) -> None:
    process = toys.descent(toys.named("A3"), 1.0, LR_CLOSED, il, edge=1.0, h=1e-2)
    walk(log, progress, process, ["A3 from below the edge"], _evenly(0.4 / il, 400))


def _below(log: RunLog, progress: Progress, steps: int) -> None:
    process = toys.descent(toys.named("A3", "A3"), 1.0, LR_CLOSED, 0.0, edge=np.array(BELOW), h=1e-2)
    walk(
        log,
        progress,
        process,
        [f"A3 without decay from {e}" for e in BELOW],
        [0, *np.geomspace(1000, steps, 4).round().astype(int).tolist()],
    )


def _catapults(log: RunLog, progress: Progress) -> None:
    process = toys.descent(toys.Toy(KICKED), 1.0, LR_CLOSED, 0.0, edge=2 + ABOVE, h=1e-6)
    walk(log, progress, process, [f"catapult, K {k:g}" for k in KICKED], range(0, 40_001, 400))


def _rmsprop(log: RunLog, progress: Progress, steps: int) -> None:
    c, k, first = (np.array(column) for column in zip(*RMSPROP, strict=True))
    process = toys.scalar_rmsprop(toys.Toy(k), 1.0, ETA, c, first)
    walk(log, progress, process, [_rmsprop_name(*row) for row in RMSPROP], _evenly(steps, 10))


def _rmsprop_name(c: float, k: float, first: bool) -> str:
    return f"RMSprop C {c:g}, K {k:g}, {'update, use' if first else 'use, update'}"


def _portrait(log: RunLog, progress: Progress) -> None:
    names = {"minimizers": "minimizers", "gd": "gradient descent", "flow": "sharpness-reduction flow"}
    log.resume()
    for run, columns in toys.portrait().items():
        flat = {name: np.ravel(values) for name, values in columns.items()}
        for i in range(len(flat["phi"])):
            write(
                log,
                [names[run]],
                {"step": np.array([i])} | {name: values[i : i + 1] for name, values in flat.items()},
            )


def _evenly(steps: float, count: int) -> list[int]:
    return np.linspace(0, steps, count + 1).round().astype(int).tolist()


def path_errors(h: History, config: Config, constant: float = 4.0) -> dict[str, np.ndarray]:
    """sup |φ - φ_flow| / il per toy, for each il; `constant` stands for the 4 of the flow."""
    out = {}
    for name in toys.NAMED:
        paths = [(il, h.table(f"{name}, il {il:g}", "tau", "phi")) for il in config.toy_rates]
        toy = toys.named(name)
        out[name] = np.array([toys.path_error(toy, 1.0, t, phi[:, None], constant)[0] / il for il, (t, phi) in paths])
    return out


def _largest_error(h: History, config: Config) -> float:
    return max(float(e.max()) for e in path_errors(h, config).values())


def _order(h: History, config: Config) -> float:
    return max(float(e.max() / e.min()) for e in path_errors(h, config).values())


def _wrong_flows(h: History, config: Config) -> tuple[float, ...]:
    return tuple(min(float(e.max()) for e in path_errors(h, config, c).values()) for c in (3.0, 5.0))


def speed_constants(h: History) -> tuple[float, float]:
    """A and B of ``speed = A K/(B + K²)``."""
    speeds = []
    for k in SPEEDS:
        tau, phi = h.table(f"A1 with K {k:g}", "tau", "phi")
        speeds.append((phi[0] - phi[-1]) / tau[-1])
    return toys.fit_speed(SPEEDS, np.array(speeds))


def _entry_error(h: History, config: Config) -> float:
    return float(abs(toys.entry_time(*h.table("A3 from below the edge", "tau", "eta_lambda")) / (0.5 * np.log(2)) - 1))


def _rmsprop_error(h: History, config: Config) -> float:
    errors = []
    for c, k, first in RMSPROP:
        step, phi = h.table(_rmsprop_name(c, k, first), "step", "phi")
        speed = (phi[0] - phi[-1]) / step[-1] / ETA**2
        errors.append(abs(speed / (c * k / (4 * c + 2 * k**2)) - 1))
    return float(max(errors))


def _motion(h: History, config: Config) -> float:
    phis = [h.series(f"A3 without decay from {edge}", "phi") for edge in BELOW]
    return max(float(np.abs(phi[1:] - phi[-1]).max()) for phi in phis)


def _catapult_error(h: History, config: Config) -> float:
    paths = [(k, h.series(f"catapult, K {k:g}", "phi")) for k in KICKED]
    return max(float(abs((phi[0] - phi[-1]) / (ABOVE * k / (4 + k**2)) - 1)) for k, phi in paths)


def _claim(sentence: str, observe: Any, criterion: Any, kind: str, run: str = "A1, il 0.001") -> Claim:
    return Claim(sentence, observe, criterion, kind, PART, (run,))


CLAIMS = (
    _claim(
        "Gradient descent with weight decay follows the sharpness-reduction flow (largest distance in φ, over il)",
        _largest_error,
        at_most(10),
        "scaling",
    ),
    _claim(
        "The distance is of first order in il (distance/il: largest over smallest)", _order, at_most(1.5), "scaling"
    ),
    _claim(
        "The speed along the minima is A K/(B + K²) with A = 2 (fitted A, distance from 2)",
        lambda h, config: abs(speed_constants(h)[0] - 2),
        at_most(1e-4),
        "identity",
    ),
    _claim(
        "… and with B = 4 (fitted B, distance from 4)",
        lambda h, config: abs(speed_constants(h)[1] - 4),
        at_most(1e-4),
        "identity",
    ),
    _claim(
        "From half way below, the edge is entered at τ = ½ ln 2 (relative error)",
        _entry_error,
        at_most(0.01),
        "identity",
    ),
    _claim(
        "Scalar RMSprop with decay 1 - Cη² moves at speed C K/(4C + 2K²), in either order of update and use"
        " (largest relative error)",
        _rmsprop_error,
        at_most(1e-4),
        "identity",
    ),
    _claim(
        "Without weight decay, a start just above the edge drifts once, as predicted (largest relative error)",
        _catapult_error,
        at_most(0.01),
        "identity",
    ),
    _claim(
        "Without weight decay, below the edge, nothing moves after convergence (change of φ after step 1000)",
        _motion,
        at_most(1e-12),
        "negative control",
    ),
    _claim(
        "A flow with 3 or 5 in place of the constant 4 is refuted (distance over il)",
        _wrong_flows,
        at_least(10),
        "negative control",
    ),
)

CHARTS = (
    SphereChart(
        "toy",
        "A toy on the sphere: oscillating across its minima, sliding along them",
        "minimizers",
        "spherical_sharpness",
        ("gradient descent", "sharpness-reduction flow"),
        "Toy A3, il = 1e-3; the coloured curve is the minima. Weight decay first only shrinks ‖w‖. At the edge of"
        " stability gradient descent begins to oscillate across the curve and drifts to its flattest part.",
        PART,
    ),
    Chart(
        "toy-path",
        "Position along the minima",
        "tau",
        "phi",
        tuple(f"{toy}, il 0.001" for toy in toys.NAMED),
        "τ = lr · wd · steps",
        "φ",
        caption="Four toys, projected on their curves of minima, at il = 1e-3.",
        part=PART,
    ),
)
