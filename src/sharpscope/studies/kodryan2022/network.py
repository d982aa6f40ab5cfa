"""A network with batch normalization on digits, trained on the sphere at fixed effective learning rates."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...report.charts import Chart
from ...symmetry.sphere import direction
from .._framework.claims import comparison, control, inequality, labelled, scaling, under, wider_claim
from .._framework.fits import spearman
from .._framework.observe import Array, Quantity, joined, run
from .._framework.study import Job, Progress
from .._shared.networks import Variant, problem_of
from .._shared.recorded import recorded
from .._shared.windows import FixedRate, Windows, descend
from .config import Config

PART = "Digits"
CONVERGES, EQUILIBRIUM, DIVERGES = (0.002, 0.005, 0.01), (0.045, 0.06, 0.08), (0.3, 1.0, 3.0)
"""Effective learning rates of the three regimes, for this network and these data."""

LONGER = 6
"""Times as many steps, in windows as much longer, at rates of equilibrium: near the border the loss wanders slowly."""

RATES = (*CONVERGES, *EQUILIBRIUM, *DIVERGES)
MIDDLE, SMALL = EQUILIBRIUM[1], 3e-5
TWINS = (SMALL, MIDDLE, DIVERGES[1])
FROM_MINIMUM, COOLED, DIRECT = "equilibrium, from a minimum", "cooled from equilibrium", "not cooled"
FREE = (MIDDLE, DIVERGES[1])
PLAIN = "no normalization"
PLAIN_RATES = (0.1, 3.0)  # learning rates: below and far above the edge
TOGETHER = 1e-8
"""Distance of two runs at their start."""

RANDOM_DRAWS = 100
OTHER_DRAWS = 1000
"""Added to the seed where the draws must not be those of the network's weights."""


def named(rate: float) -> str:
    """Name the run at an effective learning rate."""
    return f"η̃ = {rate:g}"


def twins(rate: float) -> str:
    """Name the run that follows the distance of two others."""
    return f"two runs, {named(rate)}"


def free(rate: float) -> str:
    """Name the run whose norm is free."""
    return f"free norm, {named(rate)} at first"


def plain(rate: float) -> str:
    """Name the run without normalization."""
    return f"{PLAIN}, lr = {rate:g}"


def jobs(config: Config) -> list[Job]:
    variant = Variant("mlp", "BN", "half squares", 0.1, 0.0, train=config.train, seed=config.seed)
    cost, arguments = 1.0 + 0.8e-3 * config.steps, {"variant": variant, "config": config}

    def job(name: str, work: Any, count: float, **more: Any) -> Job:
        return Job(name, work, {**arguments, **more}, count * cost, variant.describe_data)

    return [
        *(job(named(rate), _fixed, _length(rate), rate=rate) for rate in RATES),
        job("random weights", _random, 0.2),
        job("two runs", _twins, 2),
        job("other starts", _others, 4),
        job("free norm", _free, 2),
        job(PLAIN, _plain, 2),
    ]


def _length(rate: float) -> int:
    """Count how many times the steps of the configuration are taken at a rate."""
    return LONGER if rate in EQUILIBRIUM else 1


def _run(log: RunLog, progress: Progress, name: str, rule: Any, w: Tensor, problem: Any, config: Config) -> Tensor:
    """Take all steps at a rule, with rows of curvature and accuracy; return the last weights."""
    plan = Windows(config.steps, config.every, 5, problem.columns_at)
    return descend(partial(log.append, run=name), progress, recorded(problem.objective, config.steps), rule, w, plan)


def _fixed(log: RunLog, progress: Progress, variant: Variant, config: Config, rate: float) -> None:
    log.resume()
    problem, times = problem_of(variant), _length(rate)
    config = dataclasses.replace(config, steps=times * config.steps, every=times * config.every)
    _run(log, progress, named(rate), FixedRate(rate), direction(problem.objective.weights()), problem, config)


def _random(log: RunLog, progress: Progress, variant: Variant, config: Config) -> None:
    """Draw weights, and write the mean of their losses."""
    log.resume()
    f = problem_of(variant).objective
    generator = torch.Generator().manual_seed(OTHER_DRAWS + variant.seed)
    drawn = [torch.randn(f.size, generator=generator, dtype=f.dtype) for _ in range(RANDOM_DRAWS)]
    log.append(run="random weights", step=0, loss=sum(f.value(w).item() for w in drawn) / RANDOM_DRAWS)


def _twins(log: RunLog, progress: Progress, variant: Variant, config: Config) -> None:
    """Follow the distance of two runs from starts that are close."""
    log.resume()
    steps = config.steps // 3
    whole = problem_of(variant).objective
    f = recorded(whole, 2 * steps * len(TWINS))
    generator = torch.Generator().manual_seed(OTHER_DRAWS + variant.seed)
    start = direction(f.weights())
    away = TOGETHER * direction(torch.randn(f.size, generator=generator, dtype=f.dtype))
    for i, rate in enumerate(TWINS):
        rule, first, second = FixedRate(rate), start, direction(start + away)
        for step in range(steps + 1):
            if step % config.every == 0:
                log.append(run=twins(rate), step=step, distance=(first - second).norm().item())
            first, second = (rule.step(w, f.value_and_grad(w)[1], {})[0] for w in (first, second))
        progress((i + 1) / len(TWINS))


def _others(log: RunLog, progress: Progress, variant: Variant, config: Config) -> None:
    """Go to the equilibrium from a minimum, and from the equilibrium back to small rates."""
    log.resume()
    problem = problem_of(variant)
    start = direction(problem.objective.weights())
    quiet = dataclasses.replace(config, every=config.steps)

    def go(name: str, rate: float, w: Tensor, config: Config = config) -> Tensor:
        return _run(log, progress, name, FixedRate(rate), w, problem, config)

    minimum = go("to a minimum", CONVERGES[1], start, quiet)
    go(FROM_MINIMUM, MIDDLE, minimum)
    chaotic = go("to equilibrium", MIDDLE, start, quiet)
    go(COOLED, CONVERGES[0], chaotic)
    first = go("at a small rate", CONVERGES[0], start, quiet)
    go(DIRECT, CONVERGES[0], first)


def _free(log: RunLog, progress: Progress, variant: Variant, config: Config) -> None:
    """Descend without weight decay and without the sphere: the effective rate falls as the norm grows."""
    log.resume()
    problem = problem_of(variant)
    for rate in FREE:
        start = direction(problem.objective.weights())
        _run(log, progress, free(rate), GD(rate, 0.0), start, problem, config)


def _plain(log: RunLog, progress: Progress, variant: Variant, config: Config) -> None:
    """Descend without normalization, below and far above the edge."""
    log.resume()
    problem = problem_of(dataclasses.replace(variant, norm="none"))
    for rate in PLAIN_RATES:
        _run(log, progress, plain(rate), GD(rate, 0.0), problem.objective.weights(), problem, config)


def late(name: str, column: str = "loss") -> Quantity:
    """The median of a column over the last quarter of the rows of a run."""
    return run(name)[column].reduce(lambda v: v[-(len(v) + 3) // 4 :]).median()


def _second_quarter(name: str) -> Quantity:
    return run(name)["loss"].reduce(lambda v: v[len(v) // 4 : len(v) // 2]).median()


def _drift(name: str) -> Quantity:
    """The mean loss of the last three eighths of the rows of a run over that of the three before."""

    def halves(v: Array) -> float:
        n = 3 * len(v) // 8
        return float(v[-n:].mean() / v[-2 * n : -n].mean())

    return run(name)["loss"].reduce(halves)


RANDOM = run("random weights")["loss"].last()


def _in_each(rates: tuple[float, ...], quantity: Callable[[str], Quantity]) -> Quantity:
    """Join a quantity of the runs at several rates."""
    return joined(*(quantity(named(rate)) for rate in rates))


CLAIMS = under(
    PART,
    scaling(
        "Convergence: the loss goes on falling (last quarter over second, at each rate)",
        _in_each(CONVERGES, lambda name: late(name) / _second_quarter(name)) <= 0.6,
    ),
    scaling(
        "Convergence: each rate finds minima at its own edge on the sphere (η̃λ1)",
        joined(*(rate * late(named(rate), "spherical_sharpness") for rate in CONVERGES)).within(1.8, 2.3),
    ),
    scaling(
        "Equilibrium: the loss stands still (mean of the later half over the earlier, at each rate)",
        _in_each(EQUILIBRIUM, _drift).within(0.85, 1.15),
    ),
    inequality(
        "Equilibrium: above the minima, below random weights (loss over that of random weights)",
        _in_each(EQUILIBRIUM, lambda name: late(name) / RANDOM).within(0.15, 0.92),
    ),
    comparison(
        "Between the two the loss jumps (smallest rate of equilibrium over largest of convergence)",
        late(named(EQUILIBRIUM[0])) / late(named(CONVERGES[-1])) >= 100,
    ),
    scaling(
        "Equilibrium: the level does not depend on the start (from a minimum over from random weights)",
        (late(FROM_MINIMUM) / late(named(MIDDLE))).within(0.85, 1.15),
    ),
    comparison(
        f"Equilibrium: it is chaotic (distance of two runs on the sphere, {TOGETHER:g} at first)",
        run(twins(MIDDLE))["distance"].last() >= 0.5,
    ),
    scaling(
        "Divergence: the loss is that of random weights (ratio, at each rate)",
        _in_each(DIVERGES, lambda name: late(name) / RANDOM).within(0.93, 1.07),
    ),
    scaling(
        "Divergence: every step leads to another direction (angle of a step over π/2, at each rate)",
        _in_each(DIVERGES, lambda name: late(name, "angle") * (2 / math.pi)).within(0.95, 1.05),
    ),
    scaling(
        "From the border on the loss rises with the rate (rank correlation)",
        _in_each(RATES[len(CONVERGES) - 1 :], late).reduce(lambda v: spearman(RATES[len(CONVERGES) - 1 :], v)) >= 0.9,
    ),
    comparison(
        "The largest rate that converges ends flatter than the smallest (λ1, ratio)",
        late(named(CONVERGES[-1]), "spherical_sharpness") / late(named(CONVERGES[0]), "spherical_sharpness") <= 0.4,
    ),
    wider_claim(
        "The largest rate that converges ends with the better test accuracy (difference)",
        late(named(CONVERGES[-1]), "test_accuracy") - late(named(CONVERGES[0]), "test_accuracy") >= 0,
    ),
    wider_claim(
        "First in equilibrium, then at a small rate ends flatter (λ1 over without equilibrium)",
        late(COOLED, "spherical_sharpness") / late(DIRECT, "spherical_sharpness") <= 0.9,
        note="At a small rate the edge sets λ1 to 2/η̃, whatever was before.",
    ),
    wider_claim(
        "First in equilibrium, then at a small rate ends with the better test accuracy (difference)",
        late(COOLED, "test_accuracy") - late(DIRECT, "test_accuracy") >= 0,
    ),
    control(
        "At a small rate two runs stay together (their distance)",
        run(twins(SMALL))["distance"].last() <= 1e-6,
    ),
    *(
        control(
            f"With a free norm there is no equilibrium, {named(rate)} at first (loss over that on the sphere)",
            late(free(rate)) / late(named(rate)) <= 0.1,
        )
        for rate in FREE
    ),
    control(
        "Without normalization the loss leaves all bounds far above the edge (largest over that of random weights)",
        run(plain(PLAIN_RATES[1]))["peak"].max() / RANDOM >= 1e3,
    ),
    comparison(
        "Without normalization it converges below the edge (loss over that of random weights)",
        late(plain(PLAIN_RATES[0])) / RANDOM <= 0.1,
    ),
)

LABELS = {
    "step": "step",
    "loss": "training loss",
    "angle": "angle of a step (radians)",
    "distance": "distance of two runs",
    "spherical_sharpness": "spherical sharpness λ1",
    "test_accuracy": "test accuracy",
}

CHARTS = under(
    PART,
    *labelled(
        LABELS,
        Chart(
            "regimes",
            "Training loss at fixed effective learning rates",
            x="step",
            y="loss",
            runs=(named(0.002), named(0.01), named(0.045), named(0.06), named(0.08), named(1.0)),
            log="y",
            caption="Medians over windows of steps.  The smallest two converge, the largest is at random weights.",
            rank=2,
        ),
        Chart(
            "twins",
            "Two runs from nearly the same weights",
            x="step",
            y="distance",
            runs=tuple(twins(rate) for rate in TWINS),
            log="y",
            caption="From 1e-8 on: at the small rate they stay together, at the others they are soon orthogonal.",
            rank=3,
        ),
        Chart(
            "free-norm",
            "Fixed rate against a free norm",
            x="step",
            y="loss",
            runs=(named(MIDDLE), FROM_MINIMUM, free(MIDDLE), free(DIVERGES[1])),
            log="y",
            caption="Where the norm may grow, the effective rate falls until the run converges.",
        ),
        Chart(
            "sharpness",
            "Spherical sharpness of the minima",
            x="step",
            y="spherical_sharpness",
            runs=(*(named(rate) for rate in CONVERGES), COOLED),
            log="y",
            lines=tuple((2 / rate, f"2/η̃ at {rate:g}") for rate in CONVERGES),
            caption="Each rate ends where its own edge is.",
        ),
        Chart(
            "steps",
            "Angle of a step",
            x="step",
            y="angle",
            runs=tuple(named(rate) for rate in (0.01, *EQUILIBRIUM, 1.0)),
            log="y",
            lines=((math.pi / 2, "right angle"),),
        ),
        Chart(
            "accuracy",
            "Test accuracy at fixed rates",
            x="step",
            y="test_accuracy",
            runs=(*(named(rate) for rate in CONVERGES), named(MIDDLE), COOLED, DIRECT),
        ),
    ),
)
