"""Jobs that train a network for a while and then predict what its optimizer does next."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...autodiff.objective import Objective
from ...errors import NotConverged, NotFinite
from ...flows.compare import compare
from ...flows.path import Method
from ...optimizers.base import UpdateRule
from ...optimizers.gd import GD
from ...records.history import History
from ...records.run_log import RunLog
from ...symmetry.sphere import effective_learning_rate
from .._framework.claims import Claim, at_least, at_most, within
from .._framework.study import Job, Progress
from .networks import SECONDS_PER_STEP, Variant, task_of
from .recorded import recorded

Observer = Callable[[History, Any], Any]
RUNS = ("optimizer", "central flow", "stable flow")


@dataclass(frozen=True)
class Forecast:
    """The flows of a variant's optimizer from step `start` on, over `steps` steps, read at `points` of them."""

    variant: Variant
    start: int
    steps: int
    points: int = 25
    rule: UpdateRule | None = None  # where it is not gradient descent with the variant's rates
    method: Method | None = None

    def job(self, name: str) -> Job:
        """Its job, with the runs "NAME: optimizer", "NAME: central flow" and "NAME: stable flow"."""
        cost = SECONDS_PER_STEP[self.variant.net] * (self.start + 12 * self.steps)
        return Job(name, run_forecast, {"name": name, "forecast": self}, cost)


def runs(name: str) -> tuple[str, ...]:
    """The runs of a forecast."""
    return tuple(f"{name}: {run}" for run in RUNS)


def run_forecast(log: RunLog, progress: Progress, name: str, forecast: Forecast) -> None:
    """Train, then compare; a run whose flow gets stuck ends with a note that says so."""
    log.resume()
    variant = forecast.variant
    task = task_of(variant)
    f = recorded(Objective(task.net, task.loss, [(task.x, task.y)]), forecast.start + forecast.steps)
    rule: UpdateRule = forecast.rule or GD(variant.learning_rate, variant.weight_decay, variant.momentum)
    w = f.weights()
    state = rule.init(w)
    for step in range(forecast.start):
        w, state = rule.step(w, f.grad(w), state)
        if step % 100 == 0:
            progress(0.1 * step / forecast.start)

    def evaluate(w: Tensor) -> Mapping[str, float]:
        f.load(w)
        columns = task.evaluate(task.net.train())
        task.net.train()
        radius = w.norm().item()
        rate = effective_learning_rate(variant.learning_rate, variant.weight_decay, radius)
        return {**columns, "line": rule.edge / rate}

    try:
        p = compare(
            f,
            rule,
            w,
            forecast.steps,
            state=state,
            points=forecast.points,
            evaluate=evaluate,
            method=forecast.method,
            report=lambda share: progress(0.1 + 0.9 * share),
        )
    except (ArithmeticError, NotConverged, NotFinite, ValueError) as error:
        log.finish(f"stopped after step {forecast.start}: {error}")
        return
    columns = p.history.columns
    for i in range(len(p.history)):
        row = {key: values[i] for key, values in columns.items() if values[i] is not None}
        sharpness = row["sharpness"] * row["radius"] ** 2
        log.append(**(row | {"run": f"{name}: {row['run']}", "spherical_sharpness": sharpness}))


def ends(name: str, flow: str = "central flow") -> Observer:
    """Distance of the ends of both paths over the distance moved."""
    return lambda h, config: float(h.series(f"{name}: {flow}", "error")[-1])


def beside(name: str, column: str, *, mean: bool = False, flow: str = "central flow") -> Observer:
    """A flow's column over the optimizer's after a tenth of the way: of the means, or the extremes of the ratios."""

    def read(h: History, config: Any) -> Any:
        pair = [h.series(f"{name}: {run}", column) for run in (flow, "optimizer")]
        of_flow, real = (values[len(values) // 10 + 1 :] for values in pair)
        ratios = of_flow / real
        return float(of_flow.mean() / real.mean()) if mean else (float(ratios.min()), float(ratios.max()))

    return read


def claims(name: str, part: str, *, control: bool = True) -> tuple[Claim, ...]:
    """What a prediction has to come up to; as a control, the stable flow does not."""

    def claim(what: str, observe: Observer, criterion: Any) -> Claim:
        return Claim(f"{name}: {what}", observe, criterion, "comparison", part, runs(name))

    missed = Claim(
        f"{name}: the stable flow, which knows of no oscillation, misses (distance over the distance moved)",
        ends(name, "stable flow"),
        at_least(0.25),
        "negative control",
        part,
        runs(name),
    )
    return (
        claim("distance of the flow's end over the distance moved", ends(name), at_most(0.12)),
        claim("norm, flow over optimizer", beside(name, "radius"), within(0.998, 1.002)),
        claim("time-averaged training loss, flow over optimizer", beside(name, "loss", mean=True), within(0.9, 1.1)),
        claim(
            "sharpness, flow over averaged weights of the optimizer, in the mean",
            beside(name, "sharpness", mean=True),
            within(0.95, 1.05),
        ),
        *((missed,) if control else ()),
    )
