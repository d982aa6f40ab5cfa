"""A network with batch normalization on digits, under weight decay: first smooth, then jumps."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...report.charts import Chart
from ...symmetry.sphere import direction
from .._framework.claims import comparison, control, inequality, labelled, scaling, under, wider_claim
from .._framework.observe import Quantity, joined, run
from .._framework.study import Job, Progress
from .._shared.nets import BatchNorm
from .._shared.networks import Variant, problem_of
from .._shared.recorded import recorded
from .._shared.train import LearningProblem
from .._shared.windows import FixedRate, Windows, descend
from .config import Config

PART = "Digits"
FAST, MIDDLE, SLOW = 0.003, 0.0015, 0.0005
"""Intrinsic rates; the slow one in the full size only."""

START = 1e-3
"""Effective learning rate at the start, far below that of the jumps."""

SMOOTH_EPS, STILL_EPS, LARGE_EPS = 2.0, 30.0, 90.0
"""Added to variances, in units of ``lr √il``: with the first there are no jumps, with the others no edge."""

STAIRS = (0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06)
"""Effective learning rates that are fixed one after the other, for the border of convergence on the sphere."""

JUMP, CALM = 10.0, 5.0
"""Loss over its median: larger is a jump, smaller is none; a jump has ended below twice the median."""

PLAIN_RATE = 0.1
"""Learning rate without normalization."""

EARLY = 0.02
"""Effective learning rate below which the run is taken to be in its smooth phase."""

STILL_NORM, NO_DECAY, PLAIN = "fixed effective rate", "no weight decay", "no normalization"
STAIRCASE = "rising fixed rate"


def named(il: float, eps: float = 0.0) -> str:
    """Name the run at an intrinsic rate, with eps in units of ``lr √il``."""
    return f"il = {il:g}" + (f", eps = {eps:g} lr √il" if eps else "")


def jobs(config: Config) -> list[Job]:
    variant = Variant("mlp", "BN", "half squares", 1.0, 0.0, train=config.train, seed=config.seed)
    decays = [(FAST, 0.0), (MIDDLE, 0.0), *[(il, eps) for il in (FAST, MIDDLE) for eps in (SMOOTH_EPS, STILL_EPS)]]
    decays.append((FAST, LARGE_EPS))
    if config.slow:
        decays.append((SLOW, 0.0))

    def job(name: str, work: Callable[..., None], steps: float, **more: Any) -> Job:
        return Job(name, work, {"variant": variant, "config": config, **more}, 1 + 1e-3 * steps, variant.describe_data)

    controls = (STILL_NORM, NO_DECAY, PLAIN)
    return [
        *(job(named(il, eps), _decay, config.tau / il, il=il, eps=eps) for il, eps in decays),
        *(job(name, _without, config.tau / FAST / 2, kind=name) for name in controls),
        job(STAIRCASE, _stairs, config.stair * len(STAIRS)),
    ]


def _problem(variant: Variant, eps: float = 0.0) -> LearningProblem:
    """Set up the network with eps in its normalizations."""
    problem = problem_of(variant)
    for module in problem.net.modules():
        if isinstance(module, BatchNorm):
            module.eps = eps
    return problem


def _follow(
    log: RunLog, progress: Progress, problem: LearningProblem, rule: Any, w: Tensor, steps: int, config: Config
) -> None:
    """Take steps, with the effective rate, τ and η̃λ1 in rows beside what a window has."""
    il = rule.intrinsic_rate if isinstance(rule, GD) else 0.0

    def append(step: int, **row: float) -> None:
        rate = rule.learning_rate / row["radius"] ** 2 if isinstance(rule, GD) else rule.effective_rate
        if "spherical_sharpness" in row:
            row["eta_lambda"] = rate * row["spherical_sharpness"]
        log.append(step=step, tau=il * step, effective_rate=rate, **row)

    plan = Windows(steps, config.every, curvature=10)
    descend(append, progress, recorded(problem.objective, steps), rule, w, plan)


def _decay(log: RunLog, progress: Progress, variant: Variant, config: Config, il: float, eps: float) -> None:
    """Descend with weight decay from a small effective rate."""
    log.resume()
    problem = _problem(variant, eps * math.sqrt(il))
    w = direction(problem.objective.weights()) / math.sqrt(START)
    tau = config.tau * (0.7 if eps else 1)
    _follow(log, progress, problem, GD(1.0, il), w, round(tau / il), config)


def _without(log: RunLog, progress: Progress, variant: Variant, config: Config, kind: str) -> None:
    """Take away what jumps come from: a norm that may change, weight decay, or normalization."""
    log.resume()
    problem = _problem(dataclasses.replace(variant, norm="none") if kind == PLAIN else variant)
    w, steps = problem.objective.weights(), round(config.tau / FAST / 2)
    rules = {STILL_NORM: FixedRate(EARLY), NO_DECAY: GD(1.0, 0.0), PLAIN: GD(PLAIN_RATE, MIDDLE / PLAIN_RATE)}
    starts = {STILL_NORM: direction(w), NO_DECAY: direction(w) / math.sqrt(EARLY), PLAIN: w}
    _follow(log, progress, problem, rules[kind], starts[kind], steps, config)


def _stairs(log: RunLog, progress: Progress, variant: Variant, config: Config) -> None:
    """Train on the sphere at one fixed effective rate after the other, each from where the last one ended."""
    log.resume()
    problem = _problem(variant)
    w = direction(problem.objective.weights())
    f = recorded(problem.objective, config.stair * len(STAIRS))
    for i, rate in enumerate(STAIRS):
        append = partial(log.append, effective_rate=rate)
        first = i * config.stair

        def shifted(step: int, append: Any = append, first: int = first, **row: float) -> None:
            append(step=first + step, **row)

        w = descend(shifted, progress, f, FixedRate(rate), w, Windows(config.stair, config.every))
        progress((i + 1) / len(STAIRS))


Array = NDArray[np.float64]


def jumps(rate: Array, loss: Array, peak: Array) -> list[int]:
    """Find the windows in which a jump begins, once the effective rate has reached `EARLY` for the first time.

    The loss has been below twice its median since the jump before.
    """
    usual, found, armed = float(np.median(loss[len(loss) // 2 :])), [], True
    for i in range(int(np.argmax(rate >= EARLY)) if (rate >= EARLY).any() else len(rate), len(rate)):
        if armed and peak[i] > JUMP * usual:
            found.append(i)
        armed = loss[i] < 2 * usual or (armed and peak[i] <= JUMP * usual)
    return found


def _jumps(name: str) -> Quantity:
    return run(name).reduce(lambda r, v, p: len(jumps(r, v, p)), "effective_rate", "loss", "peak")


def _rate_at_jumps(name: str) -> Quantity:
    """The median effective rate in the windows before jumps."""

    def rates(r: Array, v: Array, p: Array) -> float:
        found = jumps(r, v, p)
        return float(np.median(r[np.maximum(np.array(found) - 1, 0)])) if found else math.nan

    return run(name).reduce(rates, "effective_rate", "loss", "peak")


def _scatter(name: str) -> Quantity:
    """The standard deviation of the times between jumps over their mean, where there are three jumps at least."""

    def scatter(r: Array, v: Array, p: Array) -> float:
        between = np.diff(jumps(r, v, p))
        return float(between.std(ddof=1) / between.mean()) if len(between) >= 2 else math.nan

    return run(name).reduce(scatter, "effective_rate", "loss", "peak")


def _height(name: str) -> Quantity:
    """The largest loss in the second half of a run over the median."""
    return run(name).reduce(lambda v, p: p[len(p) // 2 :].max() / np.median(v[len(v) // 2 :]), "loss", "peak")


def _border() -> Quantity:
    """The first fixed effective rate at which the loss does not stay small, over the least one's."""

    def first(rate: Array, loss: Array) -> float:
        levels = {r: float(np.median(loss[rate == r][-20:])) for r in STAIRS}
        return next((r for r in STAIRS if levels[r] > 30 * levels[STAIRS[0]]), math.nan)

    return run(STAIRCASE).reduce(first, "effective_rate", "loss")


def _fall_before(name: str) -> Quantity:
    """The factor by which spherical sharpness falls before the effective rate is `EARLY`, and the largest loss."""
    rows = run(name).where("effective_rate", lambda r: np.arange(len(r)) < max(int(np.argmax(r >= EARLY)), 1))
    return rows["spherical_sharpness"].reduce(lambda s: s.max() / s[-1])


def _early_height(name: str) -> Quantity:
    """The largest loss over the median, from η̃ = EARLY/4 until it is EARLY for the first time."""
    return run(name).reduce(_height_between, "effective_rate", "loss", "peak")


def _height_between(rate: Array, loss: Array, peak: Array) -> float:
    chosen = slice(int(np.argmax(rate >= EARLY / 4)), int(np.argmax(rate >= EARLY)))
    return float(peak[chosen].max() / np.median(loss[chosen])) if len(peak[chosen]) else math.nan


JUMPING = (named(FAST), named(MIDDLE))
SMOOTH = (named(FAST, SMOOTH_EPS), named(MIDDLE, SMOOTH_EPS))
STILL = (named(FAST, STILL_EPS), named(MIDDLE, STILL_EPS))


def _settled(name: str) -> Quantity:
    return run(name)["effective_rate"].last()


def _late_edge(name: str) -> Quantity:
    return run(name)["eta_lambda"].second_half().median()


CLAIMS = under(
    PART,
    *(comparison(f"{name}: the loss jumps again and again (number of jumps)", _jumps(name) >= 2) for name in JUMPING),
    comparison(f"{named(SLOW)}: the loss jumps again and again (number of jumps)", _jumps(named(SLOW)) >= 2),
    scaling(
        "They begin at one effective rate, whatever il (median, at one il over half of it)",
        (_rate_at_jumps(JUMPING[0]) / _rate_at_jumps(JUMPING[1])).within(0.8, 1.25),
    ),
    scaling(
        "Namely where runs on the sphere cease to converge at fixed rates (rate at jumps over the first such)",
        joined(*(_rate_at_jumps(name) / _border() for name in JUMPING)).within(0.6, 1.4),
    ),
    inequality(
        f"Before η̃ = {EARLY} there is none (largest loss over its median)",
        joined(*(_early_height(name) for name in JUMPING)) <= CALM,
    ),
    comparison(
        f"And sharpness is reduced smoothly there (λ1, factor until η̃ = {EARLY})",
        joined(*(_fall_before(name) for name in JUMPING)) >= 5,
    ),
    *(comparison(f"{name}: at the edge (η̃λ1, median)", _late_edge(name) >= 1.8) for name in SMOOTH),
    control(
        f"eps = {SMOOTH_EPS:g} lr √il: no jumps (largest late loss over its median, at both il)",
        joined(*(_height(name) for name in SMOOTH)) <= CALM,
    ),
    control(
        f"eps = {STILL_EPS:g} lr √il: no jumps and no edge (η̃λ1, median, at both il)",
        joined(*(_late_edge(name) for name in STILL)) <= 1.5,
    ),
    scaling(
        f"eps = {STILL_EPS:g} lr √il: the effective rate it settles at depends on eps/√il alone (ratio of both il)",
        (_settled(STILL[0]) / _settled(STILL[1])).within(0.85, 1.15),
    ),
    scaling(
        "And falls as (eps/√il)^(-2/3), since r⁶ ∝ eps²/il (exponent)",
        (_settled(named(FAST, LARGE_EPS)) / _settled(STILL[0]))
        .reduce(lambda v: np.log(v) / np.log(LARGE_EPS / STILL_EPS))
        .within(-0.75, -0.55),
    ),
    control("At a fixed effective rate: no jumps (largest late loss over its median)", _height(STILL_NORM) <= CALM),
    control("Without weight decay: no jumps (largest late loss over its median)", _height(NO_DECAY) <= CALM),
    control("Without normalization: no jumps (largest late loss over its median)", _height(PLAIN) <= CALM),
    wider_claim(
        "The jumps are periodic (scatter of intervals over their mean)",
        joined(*(_scatter(name) for name in JUMPING)) <= 0.3,
    ),
)

CHARTS = under(
    PART,
    *labelled(
        {
            "tau": "τ = il·t",
            "step": "step",
            "loss": "training loss",
            "peak": "largest training loss in 10 steps",
            "effective_rate": "effective learning rate η̃",
            "spherical_sharpness": "spherical sharpness λ1",
            "eta_lambda": "η̃λ1",
        },
        Chart(
            "jumps",
            "Digits: smooth at first, then jumps; with eps, none",
            x="tau",
            y="peak",
            runs=(named(MIDDLE), *(named(MIDDLE, eps) for eps in (SMOOTH_EPS, STILL_EPS))),
            log="y",
            caption="Without eps the effective rate comes to where no minimum is stable; a large eps keeps it below.",
            rank=1,
        ),
        Chart(
            "rate",
            "Digits: effective learning rate",
            x="tau",
            y="effective_rate",
            runs=(*JUMPING, named(MIDDLE, SMOOTH_EPS), named(MIDDLE, STILL_EPS)),
            log="y",
            caption="It grows as exp(2τ) where gradients are small; a jump throws it back.",
            rank=3,
        ),
        Chart(
            "sharpness",
            "Digits: spherical sharpness",
            x="tau",
            y="spherical_sharpness",
            runs=(*JUMPING, named(MIDDLE, SMOOTH_EPS), named(MIDDLE, STILL_EPS)),
            log="y",
        ),
        Chart(
            "slower",
            "Digits: jumps at other intrinsic rates",
            x="tau",
            y="peak",
            runs=(named(FAST), named(SLOW)),
            log="y",
        ),
        Chart(
            "controls",
            "Digits: no jumps without a free norm, weight decay, or normalization",
            x="step",
            y="peak",
            runs=(named(MIDDLE), STILL_NORM, NO_DECAY, PLAIN),
            log="y",
        ),
        Chart(
            "stairs",
            "Digits: loss at rising fixed effective rates",
            x="effective_rate",
            y="loss",
            runs=(STAIRCASE,),
            log="y",
            markers=True,
        ),
    ),
)
