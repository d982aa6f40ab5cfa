"""Toys on the sphere in three dimensions: a curve of minima in closed form, and the flow along it.

Gradient descent with weight decay at the edge should move along the curve by ``dζ/dτ = -2 ∇log λ1/(4 + K²)``,
K = ‖∇log λ1‖, up to errors of order il.
"""

import math

import numpy as np

from ...records.history import History
from ...records.run_log import RunLog
from ...report.charts import Chart, SphereChart
from .._framework.claims import control, identity, labelled, scaling, under
from .._framework.observe import Quantity, joined, measured, run
from .._framework.study import Job, Progress
from .._shared import toys
from .._shared.walk import walk, write
from .config import LR_CLOSED, Config
from .quantities import LABELS

PART = "Toys on the sphere"
SPEEDS = np.array([0.5, 1.0, 2.0, 4.0, 8.0])
ABOVE, KICKED = 0.003, np.array([0.5, 2.0, 6.0])  # distance above the edge, and K, of the catapults
BELOW = (1.5, 1.9)
ETA = 1e-3
RMSPROP = [(c, k, first) for c in (0.5, 2.0, 8.0) for k in (2.0, 6.0) for first in (False, True)]
"""C, K and whether the average of squares is updated before its use, of the runs of scalar RMSprop."""


def jobs(config: Config) -> list[Job]:
    least_rate = config.toy_rates[-1]
    paths = [Job(f"toys, il {il:g}", _paths, {"il": il}, cost=max(0.2, 1.3e-5 / il)) for il in config.toy_rates]
    return [
        *paths,
        Job("toy speeds", _speeds, {"il": config.speed_rate}, cost=5e-6 / config.speed_rate),
        Job("toy entry", _entry, {"il": least_rate}, cost=max(0.2, 1e-6 / least_rate)),
        Job("toy below the edge", _below, {"steps": config.frozen_steps}, cost=3e-6 * config.frozen_steps),
        Job("toy catapults", _catapults, {}, cost=0.3),
        Job("toy RMSprop", _rmsprop, {"steps": config.rmsprop_steps}, cost=2e-5 * config.rmsprop_steps),
        Job("toy portrait", _portrait, {}, cost=1.0),
    ]


def _paths(log: RunLog, progress: Progress, il: float) -> None:
    process = toys.descent(toys.named(*toys.NAMED), 1.0, LR_CLOSED, il)
    names = [f"{toy}, il {il:g}" for toy in toys.NAMED]
    walk(log, progress, process, names, toys.measurement_steps(il))


def _speeds(log: RunLog, progress: Progress, il: float) -> None:
    process = toys.descent(toys.Toy(SPEEDS), 1.0, LR_CLOSED, il)
    names = [f"A1 with K {k:g}" for k in SPEEDS]
    walk(log, progress, process, names, _evenly(0.5 / il, 10))


def _entry(log: RunLog, progress: Progress, il: float) -> None:
    process = toys.descent(toys.named("A3"), 1.0, LR_CLOSED, il, edge=1.0, h=1e-2)
    walk(log, progress, process, ["A3 from below the edge"], _evenly(0.4 / il, 400))


def _below(log: RunLog, progress: Progress, steps: int) -> None:
    process = toys.descent(toys.named("A3", "A3"), 1.0, LR_CLOSED, 0.0, edge=np.array(BELOW), h=1e-2)
    names = [f"A3 without decay from {edge}" for edge in BELOW]
    walk(log, progress, process, names, [0, *np.geomspace(1000, steps, 4).round().astype(int).tolist()])


def _catapults(log: RunLog, progress: Progress) -> None:
    process = toys.descent(toys.Toy(KICKED), 1.0, LR_CLOSED, 0.0, edge=2 + ABOVE, h=1e-6)
    names = [f"catapult, K {k:g}" for k in KICKED]
    walk(log, progress, process, names, range(0, 40_001, 400))


def _rmsprop(log: RunLog, progress: Progress, steps: int) -> None:
    c, k, first = (np.array(column) for column in zip(*RMSPROP, strict=True))
    process = toys.scalar_rmsprop(toys.Toy(k), 1.0, ETA, c, first)
    names = [rmsprop_name(*setting) for setting in RMSPROP]
    walk(log, progress, process, names, _evenly(steps, 10))


def rmsprop_name(c: float, k: float, first: bool) -> str:
    """Name of a run of scalar RMSprop."""
    return f"RMSprop C {c:g}, K {k:g}, {'update, use' if first else 'use, update'}"


def _portrait(log: RunLog, progress: Progress) -> None:
    """Write the curve of minimizers, a run of gradient descent and the flow, as points on the sphere."""
    names = {"minimizers": "minimizers", "gd": "gradient descent", "flow": "sharpness-reduction flow"}
    log.resume()
    for curve, columns in toys.portrait().items():
        flat = {name: np.ravel(values) for name, values in columns.items()}
        for i in range(len(flat["phi"])):
            row = {"step": np.array([i])} | {name: values[i : i + 1] for name, values in flat.items()}
            write(log, [names[curve]], row)


def _evenly(steps: float, count: int) -> list[int]:
    return np.linspace(0, steps, count + 1).round().astype(int).tolist()


def path_errors(h: History, config: Config, constant: float = 4.0) -> dict[str, np.ndarray]:
    """Largest distance ``sup |φ - φ_flow| / il`` of each toy for each il; `constant` stands for the 4 of the flow."""
    out = {}
    for name in toys.NAMED:
        paths = [(il, h.table(f"{name}, il {il:g}", "tau", "phi")) for il in config.toy_rates]
        toy = toys.named(name)
        out[name] = np.array([toys.path_error(toy, 1.0, t, phi[:, None], constant)[0] / il for il, (t, phi) in paths])
    return out


def largest_error(h: History, config: Config) -> float:
    return max(float(e.max()) for e in path_errors(h, config).values())


def largest_over_smallest_error(h: History, config: Config) -> float:
    return max(float(e.max() / e.min()) for e in path_errors(h, config).values())


def errors_of_wrong_flows(h: History, config: Config) -> tuple[float, ...]:
    """The least over toys of the largest error, with a 3 and with a 5 in place of the constant 4."""
    return tuple(min(float(e.max()) for e in path_errors(h, config, c).values()) for c in (3.0, 5.0))


def speed(name: str, time: str) -> Quantity:
    """Mean speed at which φ falls over a run, with the column `time` as time."""
    return run(name).reduce(lambda t, phi: (phi[0] - phi[-1]) / t[-1], time, "phi")


def largest(*quantities: Quantity) -> Quantity:
    """The greatest of all values of several quantities."""
    return joined(*quantities).max()


A1_SPEEDS = joined(*(speed(f"A1 with K {k:g}", "tau") for k in SPEEDS))
ENTRY = run("A3 from below the edge").reduce(toys.entry_time, "tau", "eta_lambda")


def rmsprop_error(c: float, k: float, first: bool) -> Quantity:
    """Relative error of the speed C K/(4C + 2K²) of scalar RMSprop."""
    return abs(speed(rmsprop_name(c, k, first), "step") / ETA**2 / (c * k / (4 * c + 2 * k**2)) - 1)


def catapult_error(k: float) -> Quantity:
    """Relative error of the one drift after a start above the edge."""
    phi = run(f"catapult, K {k:g}")["phi"]
    return abs((phi.first() - phi.last()) / (ABOVE * k / (4 + k**2)) - 1)


def late_motion(edge: float) -> Quantity:
    """Largest distance of φ from its end after the first row, without weight decay."""
    phi = run(f"A3 without decay from {edge}").where("step", lambda step: step > 0)["phi"]
    return abs(phi - phi.last()).max()


PATHS = ("A1, il 0.001",)  # one for all: which others there are is up to the configuration

CLAIMS = under(
    PART,
    scaling(
        "Gradient descent with weight decay follows the sharpness-reduction flow (largest distance in φ, over il)",
        measured(largest_error, *PATHS) <= 10,
    ),
    scaling(
        "The distance is of first order in il (distance/il: largest over smallest)",
        measured(largest_over_smallest_error, *PATHS) <= 1.5,
    ),
    identity(
        "The speed along the minima is A K/(B + K²) with A = 2 (fitted A, distance from 2)",
        abs(A1_SPEEDS.reduce(lambda v: toys.fit_speed(SPEEDS, v)[0]) - 2) <= 1e-4,
    ),
    identity(
        "… and with B = 4 (fitted B, distance from 4)",
        abs(A1_SPEEDS.reduce(lambda v: toys.fit_speed(SPEEDS, v)[1]) - 4) <= 1e-4,
    ),
    identity(
        "From half way below, the edge is entered at τ = ½ ln 2 (relative error)",
        abs(ENTRY / (0.5 * math.log(2)) - 1) <= 0.01,
    ),
    identity(
        "Scalar RMSprop with decay 1 - Cη² moves at speed C K/(4C + 2K²), in either order of update and use"
        " (largest relative error)",
        largest(*(rmsprop_error(*setting) for setting in RMSPROP)) <= 1e-4,
    ),
    identity(
        "Without weight decay, a start just above the edge drifts once, as predicted (largest relative error)",
        largest(*(catapult_error(k) for k in KICKED)) <= 0.01,
    ),
    control(
        "Without weight decay, below the edge, nothing moves after convergence (change of φ after step 1000)",
        largest(*(late_motion(edge) for edge in BELOW)) <= 1e-12,
    ),
    control(
        "A flow with 3 or 5 in place of the constant 4 is refuted (distance over il)",
        measured(errors_of_wrong_flows, *PATHS) >= 10,
    ),
)

CHARTS = under(
    PART,
    SphereChart(
        "toy",
        "A toy on the sphere: oscillating across its minima, sliding along them",
        curve="minimizers",
        color="spherical_sharpness",
        paths=("gradient descent", "sharpness-reduction flow"),
        caption="Toy A3, il = 1e-3; the coloured curve is the minima. Weight decay first only shrinks ‖w‖. At the edge"
        " of stability gradient descent begins to oscillate across the curve and drifts to its flattest part.",
        rank=3,
    ),
    *labelled(
        LABELS,
        Chart(
            "toy-path",
            "Position along the minima",
            x="tau",
            y="phi",
            runs=tuple(f"{toy}, il 0.001" for toy in toys.NAMED),
            caption="Four toys, projected on their curves of minima, at il = 1e-3.",
        ),
    ),
)
