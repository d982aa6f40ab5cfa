"""Linear regression with batch normalization: where bursts grow, fade, or cannot be, against formulas."""

import math
from collections.abc import Mapping

import numpy as np

from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, inequality, labelled, scaling, under
from .._framework.fits import exponent, slope
from .._framework.observe import Quantity, joined, run
from .._framework.study import Job, Progress
from .._shared.walk import write
from .config import Config
from .regression import Stretched, border, exact_border, growth, rotation, windows

PART = "Regression with batch normalization"
FINE, COARSE = 1e-4, (1e-2, 1e-3)
"""Intrinsic rates: of the rates of growth, and of the phases."""

STRETCHES, FRACTIONS = (0.5, 0.8, 1.0, 1.15, 1.3, 2.0), (0.0, 0.3, 0.6)
BURSTS, SMOOTH, STILL = "bursts go on", "bursts fade", "no oscillation"
LARGE, SMALL = 5.0, 1e-3
"""Range of the loss over its mean level, and h² over il/2: above the first are bursts, below the second nothing."""

CLEAR = 1.0
"""Rates of growth that are larger decide within the length of a run."""

JUMPY, CALM = 0.8, 2.0  # k of two runs that are shown over time
LEVELS = (1e-2, 1e-3, 1e-4, 1e-5)  # il of the exact border


def shown(k: float) -> str:
    """Name the run over time at a stretch."""
    return f"k = {k:g}"


NO_DECAY, BIG_EPS = "no weight decay", "eps above the border"
OVER_TIME: Mapping[str, tuple[float, float, float]] = {
    # run: k, il, eps over its border
    shown(JUMPY): (JUMPY, COARSE[1], 0.0),
    shown(CALM): (CALM, COARSE[1], 0.0),
    NO_DECAY: (JUMPY, 0.0, 0.0),
    BIG_EPS: (JUMPY, COARSE[1], 1.1),
}


def jobs(config: Config) -> list[Job]:
    cost = 0.1 * config.toy_tau
    return [
        Job("growth", _growth, {"config": config}, 2.0),
        Job("phases", _phases, {"config": config}, 2 * cost),
        Job("borders", _borders, {"config": config}, cost),
        Job("over time", _over_time, {"config": config}, cost),
    ]


def _growth(log: RunLog, progress: Progress, config: Config) -> None:
    """Measure how fast a small burst grows or fades over τ = 1, for some k and eps."""
    log.resume()
    k, fraction = (v.ravel() for v in np.meshgrid(STRETCHES, FRACTIONS))
    problem = Stretched(k, np.full_like(k, FINE), fraction * border(k, FINE), rotation(config.seed))
    h = 1.05 * np.sqrt(FINE / 2 * (1 - fraction**2))
    rows, _ = windows(problem, problem.starts(2.0, 0.0, h), round(1 / FINE), round(0.1 / FINE))
    times = 0.1 * np.arange(10)
    columns = {
        "stretch": k,
        "fraction": fraction,
        "predicted": growth(k, fraction),
        "growth": np.array([2 * slope(times, np.log(column)) for column in rows["range"].T]),
        "square": rows["square"].mean(0) / (FINE / 2 * (1 - fraction**2)),
        "step": np.full_like(k, 1 / FINE),
    }
    for value in FRACTIONS:
        chosen = fraction == value
        write(log, [_at(value)] * len(STRETCHES), {name: v[chosen] for name, v in columns.items()})
    grid = np.linspace(min(STRETCHES), max(STRETCHES), 30)
    for value in FRACTIONS:
        law = {"stretch": grid, "growth": growth(grid, value), "step": 0 * grid}
        write(log, [f"formula, {_at(value)}"] * len(grid), law)


def _at(fraction: float) -> str:
    return f"eps = {fraction:g} eps*"


def _phases(log: RunLog, progress: Progress, config: Config) -> None:
    """Say for a grid of k and eps what is left of the bursts at the end of a run."""
    log.resume()
    grid = np.linspace(0.4, 1.5, config.grid), np.linspace(0, 1.2, config.grid)
    k, fraction = (v.ravel() for v in np.meshgrid(*grid))
    for il in COARSE:
        problem = Stretched(k, np.full_like(k, il), fraction * border(k, il), rotation(config.seed))
        steps = round(config.toy_tau / il)
        start = problem.starts(1.9, 0.0, np.full_like(k, 1e-3))
        rows, _ = windows(problem, start, steps, steps // 6)
        last, square = rows["range"][-1] / (k**2 * il / 2), rows["square"][-1] / (il / 2)
        names = [_phase(a, b) for a, b in zip(last, square, strict=True)]
        ends = {"stretch": k, "fraction": fraction, "il": np.full_like(k, il), "step": np.full_like(k, steps)}
        write(log, names, ends | {"range": last, "square": square, "predicted": growth(k, fraction)})
        progress(1.0 if il == COARSE[-1] else 0.1)
    curve = np.linspace(0.4, math.sqrt(4 / 3), 40)
    rate = np.maximum(growth(curve), 0)
    write(log, ["formula"] * 40, {"stretch": curve, "fraction": np.sqrt(rate / (rate + 6)), "step": 0 * curve})


def _phase(last: float, square: float) -> str:
    if last >= LARGE:
        return BURSTS
    return SMOOTH if square >= SMALL else STILL


def _borders(log: RunLog, progress: Progress, config: Config) -> None:
    """Compare the exact border in eps with its power law, and see on which side runs oscillate."""
    log.resume()
    k = JUMPY
    for il in LEVELS:
        exact = exact_border(k, il)
        row = {"il": il, "eps": exact, "ratio": exact / border(k, il), "step": 0}
        if il in COARSE:
            eps = exact * np.array([0.9, 1.05])
            problem = Stretched(np.full(2, k), np.full(2, il), eps, rotation(config.seed))
            steps = round(config.toy_tau / il)
            rows, _ = windows(problem, problem.starts(1.9, 0.0, np.full(2, 1e-3)), steps, steps // 6)
            row |= dict(zip(("inside", "outside"), (rows["square"][-1] / (il / 2)).tolist(), strict=True))
        log.append(run="border", **row)


def _over_time(log: RunLog, progress: Progress, config: Config) -> None:
    """Follow some runs from an angle of one to the target, where sharpness can fall."""
    log.resume()
    steps, every = round(config.toy_tau / COARSE[1]), 50
    k, il, fraction = (np.array(v) for v in zip(*OVER_TIME.values(), strict=True))
    problem = Stretched(k, il, fraction * border(k, COARSE[1]), rotation(config.seed))
    w = problem.starts(1.5, 1.0, np.full_like(k, 1e-3))
    first = problem.null(w)
    level = k**2 * COARSE[1] / 2
    for i in range(steps // every):
        rows, w = windows(problem, w, every, every)
        null = problem.null(w)
        columns = {
            "step": np.full_like(k, (i + 1) * every),
            "tau": np.full_like(k, (i + 1) * every * COARSE[1]),
            "range": rows["range"][0] / level,
            "spherical_sharpness": 2 * k**2 * (1 + (null / problem.target(w)) ** 2),
            "off": np.abs(null / first / (1 - il) ** ((i + 1) * every) - 1),
        }
        write(log, list(OVER_TIME), columns)
        progress((i + 1) * every / steps)


def _late_range(name: str) -> Quantity:
    """The largest range of the loss, over its mean level, in the second half of a run."""
    return run(name).where("tau", lambda v: v >= v.max() / 2)["range"].max()


def _wrong(name: str, sign: int) -> Quantity:
    """Count the points of a phase whose predicted rate is clearly of the sign of another, below the border in eps."""
    return run(name).reduce(lambda g, f: np.sum((sign * g >= CLEAR) & (f <= 0.95)), "predicted", "fraction")


MEASURED = joined(
    *(run(_at(value)).reduce(lambda g, p: np.abs(g - p).max(), "growth", "predicted") for value in FRACTIONS)
)

CLAIMS = under(
    PART,
    scaling(
        "A small burst grows as e^{γτ}, γ = (4 - 3k²)(1 - ρ²) - 6ρ², ρ = eps/eps* (largest difference of γ at each ρ)",
        MEASURED <= 0.15,
    ),
    scaling(
        "The oscillation has h² = (il/2)(1 - ρ²) (ratio, least and greatest)",
        joined(*(run(_at(value))["square"] for value in FRACTIONS)).extent().within(0.97, 1.03),
    ),
    inequality(
        "Where bursts go on, γ is not clearly negative (points that are wrong, at both il)", _wrong(BURSTS, -1) <= 0
    ),
    inequality("Where they fade, γ is not clearly positive (points that are wrong)", _wrong(SMOOTH, 1) <= 0),
    inequality(
        "No oscillation above the border in eps, and some below (least and greatest eps/eps* of the two)",
        joined(run(STILL)["fraction"].min(), joined(run(BURSTS)["fraction"], run(SMOOTH)["fraction"]).max()).within(
            0.9, 1.1
        ),
    ),
    scaling(
        "The exact border in eps is a power of il (exponent)",
        run("border").reduce(exponent, "il", "eps").within(0.49, 0.51),
    ),
    scaling("And close to k³ √il (largest relative difference)", run("border")["ratio"].farthest_from(1) <= 1.1),
    comparison(
        "Just inside the exact border runs oscillate (least h² over il/2)", run("border")["inside"].min() >= 0.1
    ),
    control("Just outside they do not (largest h² over il/2)", run("border")["outside"].max() <= SMALL),
    comparison(
        f"Bursts go on at {shown(JUMPY)} (range of the loss over its mean level)", _late_range(shown(JUMPY)) >= 20
    ),
    control(f"They have faded at {shown(CALM)} (range)", _late_range(shown(CALM)) <= 1),
    control("No bursts without weight decay (range)", _late_range(NO_DECAY) <= 1e-3),
    control("No bursts with eps above its border (range)", _late_range(BIG_EPS) <= 1e-3),
    identity(
        "Bursts or not, the null component decays by (1-il) a step (largest relative difference)",
        joined(*(run(shown(k))["off"].max() for k in (JUMPY, CALM))) <= 1e-8,
    ),
    comparison(
        "So sharpness falls through bursts as without them (its last value over the least there is)",
        joined(*(run(shown(k))["spherical_sharpness"].last() * (1 / (2 * k**2)) for k in (JUMPY, CALM))) <= 1.001,
    ),
)

CHARTS = under(
    PART,
    *labelled(
        {
            "tau": "τ = il·t",
            "range": "range of the loss over its mean level",
            "stretch": "stretch k",
            "fraction": "eps/eps*",
            "growth": "growth of a burst per unit of τ",
            "spherical_sharpness": "spherical sharpness λ1",
            "il": "il = lr·wd",
            "eps": "eps*/lr",
        },
        Chart(
            "phases",
            "Regression: where bursts go on",
            x="stretch",
            y="fraction",
            runs=("formula", BURSTS, SMOOTH, STILL),
            marks=((math.sqrt(4 / 3), "k² = 4/3"),),
            markers=True,
            caption=(
                "Each dot is a run, at two intrinsic rates.  eps* = lr k³ √il is where the edge can no longer be"
                " reached; the curve is where γ = 0."
            ),
            rank=2,
        ),
        Chart(
            "bursts",
            "Regression: bursts go on or fade",
            x="tau",
            y="range",
            runs=(shown(JUMPY), shown(CALM), BIG_EPS),
            log="y",
        ),
        Chart(
            "growth",
            "Regression: growth of small bursts",
            x="stretch",
            y="growth",
            runs=tuple(name for value in FRACTIONS for name in (f"formula, {_at(value)}", _at(value))),
            lines=((0.0, "border"),),
            markers=True,
        ),
        Chart(
            "falls",
            "Regression: sharpness falls through bursts",
            x="tau",
            y="spherical_sharpness",
            runs=tuple(OVER_TIME),
            log="y",
        ),
        Chart(
            "eps-border",
            "Regression: the border in eps",
            x="il",
            y="eps",
            runs=("border",),
            log="xy",
            markers=True,
        ),
    ),
)
