"""Linear regression with batch normalization and more dimensions than points: everything in closed form.

At the edge the angle α between w and the least-norm solution obeys ``tan α(τ) = tan α(0) e^{-τ}``, from any start.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ...records.history import History
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import Claim, at_least, at_most, within
from .._framework.observe_runs import last
from .._framework.study import Job, Progress
from .._shared.toys import Columns, State, reading_steps, unit
from .._shared.walk import walk
from . import linear_regression as reg
from .config import LR_CLOSED, Config

PART = "Linear regression with batch normalization"
IL = 1e-3  # of the random starts
CONTROLS = {"regression without decay": reg.gradient, "regression without BN": reg.linear_gradient}


def jobs(config: Config) -> list[Job]:
    data, first = range(config.regression_data), config.first_seed
    angles = [
        Job(_on(f"angle, il {il:g}", i), _angle, {"il": il, "seed": first + i}, max(0.2, 5.5e-5 / il))
        for il in config.regression_rates
        for i in data
    ]
    starts = [Job(_on("random starts", i), _random_starts, {"data": i, "first": first}, 0.5) for i in data]
    return [*angles, *starts, *(Job(name, _control, {"name": name, "first": first}, 1.5) for name in CONTROLS)]


def _on(name: str, data: int) -> str:
    return f"{name}, data {data}" if data else name


def _angle(log: RunLog, progress: Progress, il: float, seed: int) -> None:
    """From α = 1.2 at the edge to τ = 3."""
    p = reg.random_problem(seed)
    process = reg.Descent(p, reg.edge_start(p, 1.2, LR_CLOSED, il), LR_CLOSED, il)
    walk(log, progress, process, [log.run], reading_steps(il, 3.0))


class _Pair(reg.Descent):
    """Two starts; also how far they agree, and the sharpness relative to the flattest minimum."""

    def measure(self, state: State) -> Columns:
        columns = super().measure(state)
        middle = unit((state["w"] + self.advance(state, 1)["w"]) / 2)
        flattest = np.full(len(middle), self.problem.flattest)
        return columns | {
            "from_least_norm": 1 - columns["cosine"],
            "apart": 1 - middle @ middle[-1],
            "relative": columns["spherical_sharpness"] / flattest,
            "relative_loss": columns["loss"] / (flattest * max(self.il, 1e-300) / 4),
        }


def _random_starts(log: RunLog, progress: Progress, data: int, first: int) -> None:
    """Two random starts, to τ = 12, where they should have met."""
    p = reg.random_problem(first + data)
    process = _Pair(p, reg.random_starts(p, first + 5, 2), LR_CLOSED, IL)
    walk(log, progress, process, [_on(f"start {i}", data) for i in (1, 2)], range(0, round(12 / IL) + 1, 100))


def _control(log: RunLog, progress: Progress, name: str, first: int) -> None:
    p = reg.random_problem(first)
    process = _Pair(p, reg.random_starts(p, first + 5, 1), LR_CLOSED, 0.0, CONTROLS[name])
    walk(log, progress, process, [name], [0, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000])


def _angle_error(h: History, il: float, data: int) -> float:
    tau, alpha = h.table(_on(f"angle, il {il:g}", data), "tau", "alpha")
    return float(np.abs(alpha - reg.angle_law(alpha[0], tau)).max() / il)


def _angle_errors(h: History, config: Config) -> tuple[float, ...]:
    return tuple(_angle_error(h, il, 0) for il in config.regression_rates)


def _angle_errors_elsewhere(h: History, config: Config) -> tuple[float, ...]:
    others = range(1, config.regression_data)
    return tuple(_angle_error(h, il, data) for il in config.regression_rates for data in others)


def _null_law(h: History, config: Config) -> float:
    """Largest relative error of ``‖N w_t‖ = (1 - il)^t ‖N w_0‖``."""
    worst = 0.0
    for il in config.regression_rates:
        step, null = h.table(f"angle, il {il:g}", "step", "null_norm")
        worst = max(worst, float(np.abs(null / (null[0] * (1 - il) ** step) - 1).max()))
    return worst


def _ends(column: str) -> Callable[[History, Config], tuple[float, ...]]:
    """The last value of a column from both starts on all data sets."""
    return lambda h, config: tuple(
        last(h, _on(f"start {i}", data), column) for data in range(config.regression_data) for i in (1, 2)
    )


def _frozen(h: History, config: Config) -> float:
    step, alpha = h.table("regression without decay", "step", "alpha")
    return float(np.abs(alpha[step >= 2000] - alpha[-1]).max())


def _null_kept(h: History, config: Config) -> float:
    null = h.series("regression without BN", "null_norm")
    return float(np.abs(null / null[0] - 1).max())


def _claim(sentence: str, observe: Any, criterion: Any, kind: str, *, run: str = "start 1", **more: Any) -> Claim:
    return Claim(sentence, observe, criterion, kind, PART, (run,), **more)


CLAIMS = (
    _claim(
        "The angle to the least-norm solution obeys tan α = tan α₀ e^(-τ) (largest error, over il)",
        _angle_errors,
        at_most(10),
        "scaling",
    ),
    _claim(
        "The angle law on three further data sets (largest error, over il)",
        _angle_errors_elsewhere,
        at_most(10),
        "scaling",
        run="angle, il 0.001, data 1",
        deciding=False,
        note="On each of them the error is of first order in il; its constant depends on the data.",
    ),
    _claim(
        "The part of w in the null space of the data decays as (1 - il)^t (largest relative error)",
        _null_law,
        at_most(1e-8),
        "identity",
    ),
    _claim(
        "From random starts the direction becomes that of the least-norm solution (1 - cosine)",
        _ends("from_least_norm"),
        at_most(2e-4),
        "comparison",
    ),
    _claim(
        "… with it the spherical sharpness becomes the least on all minima (ratio)",
        _ends("relative"),
        within(0.95, 1.05),
        "comparison",
    ),
    _claim(
        "… while the oscillation holds the mean loss at λ1 il/4 (ratio)",
        _ends("relative_loss"),
        within(0.85, 1.15),
        "comparison",
    ),
    _claim("… and two starts end in one place (1 - cosine between them)", _ends("apart"), at_most(1e-6), "comparison"),
    _claim(
        "Without weight decay the angle freezes (change after step 2000)", _frozen, at_most(1e-10), "negative control"
    ),
    _claim(
        "Without weight decay the minimum reached is sharper than need be (sharpness over the least)",
        lambda h, config: last(h, "regression without decay", "relative"),
        at_least(1.5),
        "negative control",
        note="For one fixed start: the ratio depends on how far from the least-norm solution a start lies.",
    ),
    _claim(
        "Without normalization gradient descent keeps the null part of its start (relative change)",
        _null_kept,
        at_most(1e-10),
        "negative control",
    ),
)

CHARTS = (
    Chart(
        "regression-sharpness",
        "Spherical sharpness, over its least value on the minima",
        "tau",
        "relative",
        ("start 1", "start 2"),
        "τ = lr · wd · steps",
        "λ1 / least λ1",
        log_y=True,
        lines=((1.0, "least-norm solution"),),
        caption="Two random starts on the same data.",
        part=PART,
    ),
    Chart(
        "regression-angle",
        "Angle to the least-norm solution",
        "tau",
        "alpha",
        ("angle, il 0.001", "angle, il 0.0001"),
        "τ = lr · wd · steps",
        "α",
        caption="Runs at different il lie on one curve, tan α = tan α₀ e^(-τ).",
        part=PART,
    ),
)
