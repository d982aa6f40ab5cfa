"""Pairs of weights on one sphere: the borders and the level of the loss against their formulas."""

from dataclasses import replace

import numpy as np

from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, inequality, labelled, scaling, under, wider_claim
from .._framework.observe import Rows, run
from .._framework.study import Job, Progress
from .._shared.walk import write
from .config import Config
from .pairs import Array, Pairs, levels, separation, starts

PART = "Pairs on a sphere"
RATES = (0.5, 1.0, 1.5, 1.9, 2.1, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 40.0, 100.0)
"""Effective learning rates times the sum of curvatures, η̃A: the border is at 2."""

ALONE = (1.5, 2.2, 3.0, 5.0, 8.0)
FREE_FROM, SLOW = 10.0, 10
"""The rate η̃A at first where the norm is free, and how many times the steps such runs take."""

TOGETHER, FOLLOWED = 1e-8, 3000
STABLE, CHAOTIC = 1.5, (6.0, 10.0)


def jobs(config: Config) -> list[Job]:
    cost = 2e-4 * config.toy_steps
    return [
        Job("pairs", _many, {"config": config}, cost),
        Job("one pair", _one, {"config": config}, cost / 4),
        Job("pairs, free norm", _free, {"config": config}, SLOW * cost / 4),
    ]


def curvatures(config: Config) -> Array:
    """Draw the curvatures of the pairs, from ½ to 4 on a logarithmic scale."""
    return np.exp(np.random.default_rng([1, config.seed]).uniform(np.log(0.5), np.log(4), config.pairs))


def _many(log: RunLog, progress: Progress, config: Config) -> None:
    """Write the level of the loss at every rate and start, and the distance of runs that began together."""
    log.resume()
    a, rng = curvatures(config), np.random.default_rng([2, config.seed])
    rates = np.repeat(RATES, config.starts)
    problem = Pairs(a, rates / a.sum())
    w = starts(rng, len(rates), config.pairs)
    columns = levels(problem, w, config.toy_steps)
    progress(0.8)
    settled = w
    for _ in range(FOLLOWED):
        settled = problem.step(settled)
    columns |= {
        "rate": rates,
        "step": np.full(len(w), config.toy_steps),
        "random": np.full(len(w), a.sum() / 4),
        "distance": separation(problem, settled, FOLLOWED, TOGETHER, rng),
    }
    write(log, ["pairs"] * len(w), columns)
    grid = np.geomspace(min(RATES), max(RATES), 50)
    write(log, ["formula"] * 50, {"rate": grid, "step": 0 * grid, "level": Pairs(a, grid / a.sum()).predicted()})


def _one(log: RunLog, progress: Progress, config: Config) -> None:
    """Write the level of one pair alone, whose orbit of period two is in closed form."""
    log.resume()
    problem = Pairs(np.ones(1), np.array(ALONE))
    w = starts(np.random.default_rng([3, config.seed]), len(ALONE), 1)
    columns = levels(problem, w, config.toy_steps)
    write(log, ["one pair"] * len(w), columns | {"rate": problem.rates, "step": np.full(len(w), config.toy_steps)})


def _free(log: RunLog, progress: Progress, config: Config) -> None:
    """Descend from the same starts without the sphere, at rates that are far above the border at first.

    What ends close below the border converges slowly: hence more steps.
    """
    log.resume()
    a, rng = curvatures(config), np.random.default_rng([2, config.seed])
    w = starts(rng, config.starts, config.pairs)
    problem = replace(Pairs(a, np.full(config.starts, FREE_FROM / a.sum())), free=True)
    steps = SLOW * config.toy_steps
    columns = levels(problem, w, steps)
    rates = {"rate": np.full(len(w), FREE_FROM), "step": np.full(len(w), steps)}
    write(log, ["pairs, free norm"] * len(w), columns | rates | {"random": np.full(len(w), a.sum() / 4)})


def _between(low: float, high: float) -> Rows:
    return run("pairs").between(rate=(low, high))


CLAIMS = under(
    PART,
    identity(
        "One pair: the level is that of its orbit of period two (difference)",
        run("one pair").reduce(lambda level, p: np.abs(level - p).max(), "level", "predicted") <= 1e-9,
    ),
    scaling(
        "Below the border 2/A every start converges (largest loss over that of random weights)",
        _between(0, 1.95).reduce(lambda level, r: (level / r).max(), "level", "random") <= 1e-6,
    ),
    inequality(
        "Above it none does (least loss over the formula)",
        _between(2.05, 1e3).reduce(lambda level, p: (level / p).min(), "level", "predicted") >= 0.9,
    ),
    scaling(
        "Above it the loss is A/4 - 1/(2η̃) (ratio, least and greatest)",
        _between(2.05, 1e3)
        .reduce(lambda level, p: np.array([(level / p).min(), (level / p).max()]), "level", "predicted")
        .within(0.95, 1.06),
    ),
    scaling(
        "Just above it all pairs have one effective rate: r_i² = a_i/A in the mean (largest deviation up to η̃A = 3)",
        _between(2.05, 3)["balance"].max() <= 0.02,
    ),
    wider_claim(
        "Far above it they still do (largest deviation at all rates)",
        _between(2.05, 1e3)["balance"].max() <= 0.1,
        note="The level keeps to its formula within a few per cent all the same.",
    ),
    comparison(
        f"Chaos at η̃A = {CHAOTIC[0]:g} and {CHAOTIC[1]:g} (least distance of two runs, {TOGETHER:g} at first)",
        _between(*CHAOTIC)["distance"].min() >= 1e-2,
    ),
    control(
        f"No chaos at η̃A = {STABLE:g}, below the border (largest distance)",
        _between(STABLE, STABLE)["distance"].max() <= 1e-6,
    ),
    control(
        f"With a free norm, η̃A = {FREE_FROM:g} at first, every start converges (loss over that of random weights)",
        run("pairs, free norm").reduce(lambda level, r: (level / r).max(), "level", "random") <= 1e-3,
    ),
)

CHARTS = under(
    PART,
    *labelled(
        {"rate": "η̃A", "level": "mean loss", "distance": "distance of two runs"},
        Chart(
            "levels",
            "Pairs on a sphere: the loss against its formula",
            x="rate",
            y="level",
            runs=("formula", "pairs"),
            log="x",
            marks=((2.0, "border"),),
            caption="Every dot is a start: zero below the border, A/4 - 1/(2η̃) above it.",
            markers=True,
            rank=1,
        ),
        Chart(
            "toy-chaos",
            "Pairs on a sphere: distance of runs that began together",
            x="rate",
            y="distance",
            runs=("pairs",),
            log="xy",
            markers=True,
        ),
    ),
)
