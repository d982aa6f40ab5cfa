"""Jobs that train a network for a while and then predict what its optimizer does next."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...errors import NotConverged, NotFinite
from ...flows.compare import RUNS, compare
from ...optimizers.base import UpdateRule
from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...symmetry.sphere import effective_learning_rate
from .._framework.claims import Claim, comparison, control
from .._framework.observe import Quantity, run
from .._framework.study import Job, Progress
from .networks import SECONDS_PER_STEP, Variant, problem_of
from .recorded import recorded


@dataclass(frozen=True)
class Forecast:
    """The flows of a variant's optimizer from step `start` on, over `steps` steps, measured at `points` of them."""

    variant: Variant
    start: int
    steps: int
    points: int = 25

    def job(self, name: str) -> Job:
        """The job of this forecast, with the runs "NAME: optimizer", "NAME: central flow" and "NAME: stable flow"."""
        cost = SECONDS_PER_STEP[self.variant.net] * (self.start + 12 * self.steps)
        return Job(name, run_forecast, {"name": name, "forecast": self}, cost)


def runs(name: str) -> tuple[str, ...]:
    """The names of the runs of a forecast."""
    return tuple(f"{name}: {path}" for path in RUNS)


def run_forecast(log: RunLog, progress: Progress, name: str, forecast: Forecast) -> None:
    """Train, then compare; a run whose flow gets stuck ends with a note that says so."""
    log.resume()
    variant = forecast.variant
    problem = problem_of(variant)
    f = recorded(problem.objective, forecast.start + forecast.steps)
    rule: UpdateRule = GD(variant.learning_rate, variant.weight_decay, variant.momentum)
    w = f.weights()
    state = rule.init(w)
    for step in range(forecast.start):
        w, state = rule.step(w, f.grad(w), state)
        if step % 100 == 0:
            progress(0.1 * step / forecast.start)

    def evaluate(w: Tensor) -> Mapping[str, float]:
        rate = effective_learning_rate(variant.learning_rate, variant.weight_decay, w.norm().item())
        return {**problem.columns_at(w), "spherical_threshold": rule.edge / rate}

    try:
        p = compare(
            f,
            rule,
            w,
            forecast.steps,
            state=state,
            points=forecast.points,
            evaluate=evaluate,
            progress=lambda fraction: progress(0.1 + 0.9 * fraction),
        )
    except (ArithmeticError, NotConverged, NotFinite, ValueError) as error:
        log.finish(f"stopped after step {forecast.start}: {error}")
        return
    columns = p.history.columns
    for i in range(len(p.history)):
        row = {key: values[i] for key, values in columns.items() if values[i] is not None}
        sharpness = row["sharpness"] * row["radius"] ** 2
        log.append(**(row | {"run": f"{name}: {row['run']}", "spherical_sharpness": sharpness}))


def end_error(name: str, flow: str = "central flow") -> Quantity:
    """Distance of the ends of both paths over the distance moved."""
    return run(f"{name}: {flow}")["error"].last()


def late(name: str, path: str, column: str) -> Quantity:
    """A column of one of the paths of a forecast, after a tenth of the way."""
    return run(f"{name}: {path}")[column].reduce(lambda values: values[len(values) // 10 + 1 :])


def mean_ratio(name: str, column: str) -> Quantity:
    """The mean of a column of the central flow, after a tenth of the way, over that of the optimizer."""
    return late(name, "central flow", column).mean() / late(name, "optimizer", column).mean()


def claims(name: str, *, with_control: bool = True) -> tuple[Claim, ...]:
    """Claims that a prediction comes true; as a control, that the one of the stable flow does not."""
    missed = control(
        f"{name}: the stable flow, which knows of no oscillation, misses (distance over the distance moved)",
        end_error(name, "stable flow") >= 0.25,
    )
    return (
        comparison(f"{name}: distance of the flow's end over the distance moved", end_error(name) <= 0.12),
        comparison(
            f"{name}: norm, flow over optimizer",
            (late(name, "central flow", "radius") / late(name, "optimizer", "radius")).extent().within(0.998, 1.002),
        ),
        comparison(
            f"{name}: time-averaged training loss, flow over optimizer", mean_ratio(name, "loss").within(0.9, 1.1)
        ),
        comparison(
            f"{name}: sharpness, flow over averaged weights of the optimizer, in the mean",
            mean_ratio(name, "sharpness").within(0.95, 1.05),
        ),
        *((missed,) if with_control else ()),
    )
