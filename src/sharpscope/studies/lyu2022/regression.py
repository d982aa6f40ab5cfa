"""Linear regression with batch normalization and more dimensions than points: everything in closed form.

At the edge the angle α between w and the least-norm solution obeys ``tan α(τ) = tan α(0) e^{-τ}``, from any start.
"""

import numpy as np

from ...records.history import History
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, labelled, scaling, under
from .._framework.observe import Quantity, measured, run
from .._framework.study import Job, Progress
from .._shared.toys import ProcessState, ToyColumns, measurement_steps, unit
from .._shared.walk import walk
from . import linear_regression as reg
from .config import LR_CLOSED, Config
from .quantities import LABELS

PART = "Linear regression with batch normalization"
IL = 1e-3  # of the random starts
MET = 2e-4  # 1 - cosine, up to which a direction counts as that of the least-norm solution
CONTROLS = {"regression without decay": reg.gradient, "regression without BN": reg.linear_gradient}
CONTROL_STEPS = (0, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


def jobs(config: Config) -> list[Job]:
    data, first = range(config.regression_data), config.first_seed
    angles = [
        Job(on_data(f"angle, il {il:g}", i), _angle, {"il": il, "seed": first + i}, cost=max(0.2, 5.5e-5 / il))
        for il in config.regression_rates
        for i in data
    ]
    starts = [Job(on_data("random starts", i), _random_starts, {"data": i, "first": first}, cost=0.5) for i in data]
    controls = [Job(name, _control, {"name": name, "first": first}, cost=1.5) for name in CONTROLS]
    return angles + starts + controls


def on_data(name: str, data: int) -> str:
    """Name of a run on one of the data sets."""
    return f"{name}, data {data}" if data else name


def _angle(log: RunLog, progress: Progress, il: float, seed: int) -> None:
    """Descend from α = 1.2 at the edge to τ = 3."""
    p = reg.random_problem(seed)
    process = reg.RegressionDescent(p, reg.edge_start(p, 1.2, LR_CLOSED, il), LR_CLOSED, il)
    walk(log, progress, process, [log.run], measurement_steps(il, 3.0))


class _Pair(reg.RegressionDescent):
    """Descent from two starts, which also measures how far they agree, and the flattest minimum."""

    def measure(self, state: ProcessState) -> ToyColumns:
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
    """Descend from two random starts to τ = 12, where they should have met."""
    p = reg.random_problem(first + data)
    process = _Pair(p, reg.random_starts(p, first + 5, 2), LR_CLOSED, IL)
    walk(log, progress, process, [on_data(f"start {i}", data) for i in (1, 2)], range(0, round(12 / IL) + 1, 100))


def _control(log: RunLog, progress: Progress, name: str, first: int) -> None:
    p = reg.random_problem(first)
    process = _Pair(p, reg.random_starts(p, first + 5, 1), LR_CLOSED, 0.0, CONTROLS[name])
    walk(log, progress, process, [name], CONTROL_STEPS)


def angle_error(h: History, il: float, data: int) -> float:
    """Largest error of the law of the angle on one data set, over il."""
    tau, alpha = h.table(on_data(f"angle, il {il:g}", data), "tau", "alpha")
    return float(np.abs(alpha - reg.angle_law(alpha[0], tau)).max() / il)


def angle_errors(h: History, config: Config) -> tuple[float, ...]:
    return tuple(angle_error(h, il, 0) for il in config.regression_rates)


def angle_errors_elsewhere(h: History, config: Config) -> tuple[float, ...]:
    """Errors of the law of the angle on all data sets but the first."""
    others = range(1, config.regression_data)
    return tuple(angle_error(h, il, data) for il in config.regression_rates for data in others)


def null_decay_error(h: History, config: Config) -> float:
    """Largest relative error of ``‖N w_t‖ = (1 - il)^t ‖N w_0‖``."""
    largest = 0.0
    for il in config.regression_rates:
        step, null = h.table(f"angle, il {il:g}", "step", "null_norm")
        largest = max(largest, float(np.abs(null / (null[0] * (1 - il) ** step) - 1).max()))
    return largest


def ends(column: str) -> Quantity:
    """The last value of a column from both starts on all data sets."""

    def last_values(h: History, config: Config) -> list[float]:
        starts = [on_data(f"start {i}", data) for data in range(config.regression_data) for i in (1, 2)]
        return [float(h.series(name, column)[-1]) for name in starts]

    return measured(last_values, "start 1")


LATE_ANGLE = run("regression without decay").where("step", lambda step: step >= 2000)["alpha"]
NULL_NORM = run("regression without BN")["null_norm"]

CLAIMS = under(
    PART,
    scaling(
        "The angle to the least-norm solution obeys tan α = tan α₀ e^(-τ) (largest error, over il)",
        measured(angle_errors, "start 1") <= 10,
    ),
    scaling(
        "The angle law on three further data sets (largest error, over il)",
        measured(angle_errors_elsewhere, "angle, il 0.001, data 1") <= 10,
        deciding=False,
        note="On each of them the error is of first order in il; its constant depends on the data.",
    ),
    identity(
        "The part of w in the null space of the data decays as (1 - il)^t (largest relative error)",
        measured(null_decay_error, "start 1") <= 1e-8,
    ),
    comparison(
        "From random starts the direction becomes that of the least-norm solution (1 - cosine)",
        ends("from_least_norm") <= MET,
    ),
    comparison(
        "… with it the spherical sharpness becomes the least on all minima (ratio)",
        ends("relative").within(0.95, 1.05),
    ),
    comparison(
        "… while the oscillation holds the mean loss at λ1 il/4 (ratio)",
        ends("relative_loss").within(0.85, 1.15),
    ),
    comparison("… and two starts end in one place (1 - cosine between them)", ends("apart") <= 1e-6),
    control(
        "Without weight decay the angle freezes (change after step 2000)",
        abs(LATE_ANGLE - LATE_ANGLE.last()).max() <= 1e-10,
    ),
    control(
        "Without weight decay the direction does not become that of the least-norm solution (1 - cosine)",
        run("regression without decay")["from_least_norm"].last() >= 10 * MET,
        note="The part of w in the null space of the data stays as it was, so that the angle never vanishes.",
    ),
    control(
        "Without weight decay the minimum reached is sharper than need be (sharpness over the least)",
        run("regression without decay")["relative"].last() >= 1.5,
        deciding=False,
        note="The ratio is 1/cos²α, with the angle α at which a start freezes: with random ones it is a coin toss.",
    ),
    control(
        "Without normalization gradient descent keeps the null part of its start (relative change)",
        abs(NULL_NORM / NULL_NORM.first() - 1).max() <= 1e-10,
    ),
)

CHARTS = under(
    PART,
    *labelled(
        LABELS,
        Chart(
            "regression-sharpness",
            "Spherical sharpness, over its least value on the minima",
            x="tau",
            y="relative",
            runs=("start 1", "start 2"),
            log="y",
            lines=((1.0, "least-norm solution"),),
            caption="Two random starts on the same data.",
        ),
        Chart(
            "regression-angle",
            "Angle to the least-norm solution",
            x="tau",
            y="alpha",
            runs=("angle, il 0.001", "angle, il 0.0001"),
            caption="Runs at different il lie on one curve, tan α = tan α₀ e^(-τ).",
        ),
    ),
)
