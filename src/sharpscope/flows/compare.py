"""Compare flows with the optimizer that they describe, from the same point and at the same times.

The optimizer oscillates with period two, so the flow is compared with ``(w_{t-1} + 2 w_t + w_{t+1})/4``, and it starts
there.  The error of a prediction is the distance of the two paths relative to the distance moved.

P parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..autodiff.curvature import hessian
from ..autodiff.objective import Objective, require_objective
from ..display import card, percent, progress, sparkline, text
from ..errors import InvalidValue
from ..linalg.warm_start import warm_started
from ..measures.columns import label_of
from ..optimizers.base import State, UpdateRule, require_rule
from ..records.history import History
from ..report.charts import Chart
from ..report.figures import panels
from .central import Flow
from .integrate import integrate
from .path import Method, Trajectory

Evaluate = Callable[[Tensor], Mapping[str, float]]

MAX_ERROR = 0.25
"""Distance between the paths, relative to the distance moved, up to which a prediction counts as valid."""

RUNS = ("optimizer", "central flow", "stable flow")
"""Names of the runs of a prediction."""

TITLES = {
    "sharpness": "Sharpness",
    "loss": "Training loss, averaged over the oscillation",
    "radius": "Norm of the weights",
    "error": "Distance from the optimizer",
    "variance": "Size of the oscillation",
    "test_loss": "Test loss",
}

CHARTS = tuple(
    Chart(
        y.replace("_", "-"),
        title,
        x="step",
        y=y,
        runs=RUNS[1:] if y == "error" else RUNS,
        y_label=label_of(y),
    )
    for y, title in TITLES.items()
)
"""Charts of a prediction."""


@dataclass(frozen=True)
class Prediction:
    """An optimizer's path and its flows', as rows of a history: runs "optimizer", "central flow" and "stable flow".

    The columns are those of `measures.columns`, and those that `evaluate` returns.  Curvature is that at the averaged
    weights, steps count from the start, and the modes of a flow are those within 10 % of the edge.
    """

    history: History
    paths: Mapping[str, Trajectory] = field(repr=False)

    def error(self, flow: str = "central flow") -> float:
        """Distance between the ends of the paths over the distance moved."""
        return float(self.history.series(flow, "error")[-1])

    @property
    def skill(self) -> float:
        """Advantage of the central over the stable flow, ``1 - d_central/d_stable``, averaged over the path."""
        central, stable = (self.history.series(name, "distance")[1:] for name in ("central flow", "stable flow"))
        return float(np.mean(1 - central / np.maximum(stable, 1e-300)))

    @property
    def valid_until(self) -> float:
        """The last step at which the error is within `MAX_ERROR`, 0 where it never is.

        At the start, where the distance moved is as small as the oscillation, the error is large and means nothing.
        """
        step, error = self.history.table("central flow", "step", "error")
        good = step[(error <= MAX_ERROR) & (step > 0)]
        return float(good[-1]) if len(good) else 0.0

    def __repr__(self) -> str:
        return f"Prediction({len(self.history)} rows, error={self.error():.3g}, skill={self.skill:.3g})"

    def _repr_html_(self) -> str:
        curves = ""
        for run in self.history.runs:
            step, values = self.history.table(run, "step", "sharpness")
            curves += sparkline(f"sharpness, {run}", step.tolist(), values.tolist())
        return card("Prediction by the central flow", curves, text(str(self)))

    def plot(self) -> Any:
        """Draw the optimizer and its flows beside each other, as a figure of matplotlib.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        return panels([chart for chart in CHARTS if chart.y in self.history.columns], self.history.columns)

    def __str__(self) -> str:
        h, steps = self.history, self.history.series("optimizer", "step")[-1]

        def last(run: str, column: str) -> float:
            return float(h.series(run, column)[-1])

        def mean(run: str, column: str) -> float:
            return float(h.series(run, column)[1:].mean())

        gap = {c: last("central flow", c) / last("optimizer", c) - 1 for c in ("radius", "sharpness")}
        loss = mean("central flow", "loss") / mean("optimizer", "loss") - 1
        until = self.valid_until
        valid = "valid to the end" if until == steps else f"valid to step {until:g}" if until else "nowhere valid"
        return (
            f"after {steps:g} steps the central flow is {100 * self.error():.3g} % of the distance moved away (the"
            f" stable flow {100 * self.error('stable flow'):.3g} %): {valid}; norm {100 * gap['radius']:+.2g} %,"
            f" sharpness {100 * gap['sharpness']:+.2g} %, mean loss {100 * loss:+.2g} %; cost"
            f" {last('central flow', 'gradients') / steps:.3g} gradients per step"
        )


@progress("flow", "%")
def compare(
    f: Objective,
    rule: UpdateRule,
    w: Tensor,
    steps: int,
    *,
    state: State | None = None,
    points: int = 25,
    evaluate: Evaluate | None = None,
    method: Method | None = None,
    progress: Callable[[float], None] = percent,
) -> Prediction:
    """Run the optimizer from `w` ``(P,)`` and `state`, and its central and stable flows beside it, over `steps` steps.

    Args:
        points: measurements along the path, evenly spaced.
        evaluate: further columns at given weights, such as a test loss.
        method: of the central flow (`multirate()`, `implicit()`).
        progress: called with the fraction of the work that is done; by default shows a bar, where that takes long.

    Raises:
        ValueError: fewer steps than measurements.
        FlowStuck, WrongThirdDerivative: from the flow.
    """
    require_objective(f)
    require_rule(rule)
    if steps < max(points, 1):
        raise InvalidValue(f"{points} measurements do not fit into {steps} steps; ask for fewer points")
    measured = [round(i * steps / points) for i in range(points + 1)]
    run = _run(f, rule, w, rule.init(w) if state is None else state, measured, _from(progress, 0.0, 0.1))
    rows_of = partial(_rows, f, rule, steps=measured, truth=run.averaged, evaluate=evaluate)
    rows = rows_of("optimizer", weights=run.averaged, columns=run.columns)
    paths = {}
    for i, (name, band) in enumerate((("central flow", 0.1), ("stable flow", None))):
        path = integrate(
            Flow(f, rule, band),
            run.averaged[0],
            steps,
            averages=rule.averages(run.state),
            method=method if band else None,
            at=measured[1:-1],
            progress=_from(progress, 0.1 + 0.45 * i, 0.45),
        )
        t, end = np.array(path["t"]), path["t"][-1] + path["length"][-1]
        here = np.searchsorted(t, np.array(measured) + 1e-6).clip(1) - 1
        columns = {name: np.array(path[name])[here] for name in ("variance", "modes", "gradients")}
        columns["loss"] = _window_means(np.append(t, end), np.array(path["loss"]), measured)
        columns["gradients"][-1] = path.gradients
        rows += rows_of(name, weights=list(path.weights), columns=columns)
        paths[name] = path
    return Prediction(History(rows), paths)


def _from(progress: Callable[[float], None], start: float, part: float) -> Callable[[float], None]:
    """Report on a part of the work, which begins when the fraction `start` is done."""
    return lambda fraction: progress(start + part * fraction)


class _Run(NamedTuple):
    """The run of the optimizer itself."""

    averaged: list[Tensor]  # (w_{t-1} + 2 w_t + w_{t+1})/4 at the measured steps
    state: State  # of the rule at the first of them
    columns: Mapping[str, "np.ndarray"]


def _run(
    f: Objective,
    rule: UpdateRule,
    w: Tensor,
    state: State,
    measured: Sequence[int],
    progress: Callable[[float], None],
) -> _Run:
    """Run the optimizer from w over measured[-1] + 2 steps; time zero is one step after w."""
    averaged: list[Tensor] = []
    losses: list[float] = []
    variances: list[float] = []
    before, now, first = w, w, state
    for t in range(-1, measured[-1] + 1):
        value, g = f.value_and_grad(now)
        losses.append(value.item())
        after, state = rule.step(now, g, state)
        if t == -1:
            first = state
        else:
            mean = (before + 2 * now + after) / 4
            variances.append((now - mean).square().sum().item())
            if t in measured:
                averaged.append(mean)
        before, now = now, after
        if t % 10 == 0 or t == measured[-1]:
            progress((t + 2) / (measured[-1] + 2))
    if not bool(now.isfinite().all()):
        raise InvalidValue(
            f"the optimizer itself diverges within {measured[-1]} steps from here: its weights are not finite"
        )
    columns = {
        "loss": _window_means(np.arange(-1.5, measured[-1] + 1), np.array(losses), measured),
        "variance": _window_means(np.arange(-0.5, measured[-1] + 1), np.array(variances), measured),
    }
    return _Run(averaged, first, columns)


def _window_means(edges: "np.ndarray", values: "np.ndarray", measured: Sequence[int]) -> "np.ndarray":
    """Means of a function, constant between `edges` ``(n + 1,)``, from midway to midway of the measured steps."""
    total = np.concatenate([[0.0], np.cumsum(values * np.diff(edges))])
    middle = [(a + b) / 2 for a, b in pairwise(measured)]
    low, high = np.array([measured[0], *middle]), np.array([*middle, measured[-1]])
    return (np.interp(high, edges, total) - np.interp(low, edges, total)) / (high - low)


def _rows(
    f: Objective,
    rule: UpdateRule,
    name: str,
    *,
    steps: Sequence[int],
    weights: Sequence[Tensor],
    truth: Sequence[Tensor],
    columns: Mapping[str, "np.ndarray"],
    evaluate: Evaluate | None,
) -> list[dict[str, Any]]:
    """Rows of the run `name` at these weights, beside those of the optimizer (`truth`)."""
    rows, memory = [], None
    for i, (step, w, true) in enumerate(zip(steps, weights, truth, strict=True)):
        top = warm_started(hessian(f, w), memory, seed=step)
        memory = top.memory
        moved, distance = (true - truth[0]).norm().item(), (w - true).norm().item()
        rows.append(
            {
                "run": name,
                "step": step,
                "tau": step * rule.intrinsic_time_per_step,
                "point_loss": f.value(w).item(),
                "radius": w.norm().item(),
                "sharpness": top.values[0].item(),
                "moved": moved,
                "distance": distance,
                "error": distance / moved if moved else 0.0,
                **{c: float(v[i]) for c, v in columns.items()},
                **(dict(evaluate(w)) if evaluate else {}),
            }
        )
    return rows
