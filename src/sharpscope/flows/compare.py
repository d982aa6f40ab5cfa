"""A flow beside the optimizer it describes: both from the same point, read at the same times.

The optimizer oscillates with period two, so the flow is compared with ``(w_{t-1} + 2 w_t + w_{t+1})/4``, and it starts
there.  What decides is the distance of the two paths relative to the distance moved.

P parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..autodiff.curvature import hessian
from ..autodiff.objective import Objective
from ..errors import InvalidValue
from ..linalg.warm_start import warm_started
from ..optimizers.base import State, UpdateRule
from ..records.history import History
from .central import Flow
from .integrate import integrate
from .path import Method, Trajectory

Evaluate = Callable[[Tensor], Mapping[str, float]]

APART = 0.25
"""Distance between the paths, relative to the distance moved, up to which a prediction counts as valid."""


@dataclass(frozen=True)
class Prediction:
    """An optimizer's path and its flows', as rows of a history: runs "optimizer", "central flow" and "stable flow".

    Columns: step (of the optimizer, from the start), tau, loss (mean over the steps around), point_loss (at the
    averaged weights), radius, sharpness (of ∇²L there), variance (mean squared distance of iterates to their average;
    predicted by the flow), modes (of the flow, within 10 % of the edge), moved (distance of the optimizer from the
    start), distance (of the flow from the optimizer), error (distance/moved), gradients, and what `evaluate` returns.
    """

    history: History
    paths: Mapping[str, Trajectory] = field(repr=False)

    def error(self, flow: str = "central flow") -> float:
        """Distance between the ends of the paths over the distance moved."""
        return float(self.history.series(flow, "error")[-1])

    @property
    def skill(self) -> float:
        """``1 - d_central/d_stable``, mean over the path: what the central flow knows beyond the stable flow."""
        central, stable = (self.history.series(name, "distance")[1:] for name in ("central flow", "stable flow"))
        return float(np.mean(1 - central / np.maximum(stable, 1e-300)))

    @property
    def valid_until(self) -> float:
        """The last step at which the error is within `APART`, 0 where it never is.

        At the start, where the distance moved is as small as the oscillation, the error is large and says nothing.
        """
        step, error = self.history.table("central flow", "step", "error")
        good = step[(error <= APART) & (step > 0)]
        return float(good[-1]) if len(good) else 0.0

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
    report: Callable[[float], None] = lambda share: None,
) -> Prediction:
    """Run the optimizer from `w` ``(P,)`` and `state`, and its central and stable flows beside it, over `steps` steps.

    Args:
        points: readings along the way, evenly spaced.
        evaluate: further columns at given weights, such as a test loss.
        method: of the central flow (`multirate()`, `implicit()`).
        report: is told the share of the work that is done.

    Raises:
        ValueError: fewer steps than readings.
        FlowStuck, WrongThirdDerivative: from the flow.
    """
    if steps < max(points, 1):
        raise InvalidValue(f"{points} readings do not fit into {steps} steps; ask for fewer points")
    reading = [round(i * steps / points) for i in range(points + 1)]
    run = _run(f, rule, w, rule.init(w) if state is None else state, reading)
    report(0.1)
    rows = _rows(f, rule, "optimizer", reading, run.averaged, run.averaged, run.columns, evaluate)
    paths = {}
    for i, (name, band) in enumerate((("central flow", 0.1), ("stable flow", None))):
        way = method if band else None
        start = run.averaged[0]
        path = integrate(
            Flow(f, rule, band), start, steps, averages=rule.averages(run.state), method=way, at=reading[1:-1]
        )
        t, end = np.array(path["t"]), path["t"][-1] + path["length"][-1]
        here = np.searchsorted(t, np.array(reading) + 1e-6).clip(1) - 1
        columns = {name: np.array(path[name])[here] for name in ("variance", "modes", "gradients")}
        columns["loss"] = _windows(np.append(t, end), np.array(path["loss"]), reading)
        columns["gradients"][-1] = path.gradients
        rows += _rows(f, rule, name, reading, list(path.weights), run.averaged, columns, evaluate)
        paths[name] = path
        report(0.1 + 0.45 * (i + 1))
    return Prediction(History(rows), paths)


class _Run(NamedTuple):
    """What the optimizer did."""

    averaged: list[Tensor]  # (w_{t-1} + 2 w_t + w_{t+1})/4 at the readings
    state: State  # of the rule at the first reading
    columns: Mapping[str, "np.ndarray"]


def _run(f: Objective, rule: UpdateRule, w: Tensor, state: State, reading: Sequence[int]) -> _Run:
    """From w over reading[-1] + 2 steps; time zero is one step after w."""
    wanted, averaged, losses, spread, first = set(reading), [], [], [], state
    before, now = w, w
    for t in range(-1, reading[-1] + 1):
        value, g = f.value_and_grad(now)
        losses.append(value.item())
        after, state = rule.step(now, g, state)
        if t == -1:
            first = state
        else:
            mean = (before + 2 * now + after) / 4
            spread.append((now - mean).square().sum().item())
            if t in wanted:
                averaged.append(mean)
        before, now = now, after
    if not bool(now.isfinite().all()):
        raise InvalidValue(
            f"the optimizer itself diverges within {reading[-1]} steps from here: its weights are not finite"
        )
    columns = {
        "loss": _windows(np.arange(-1.5, reading[-1] + 1), np.array(losses), reading),
        "variance": _windows(np.arange(-0.5, reading[-1] + 1), np.array(spread), reading),
    }
    return _Run(averaged, first, columns)


def _windows(edges: "np.ndarray", values: "np.ndarray", reading: Sequence[int]) -> "np.ndarray":
    """Means of a function, constant between `edges` ``(n + 1,)``, from half-way to half-way of the readings."""
    total = np.concatenate([[0.0], np.cumsum(values * np.diff(edges))])
    middle = [(a + b) / 2 for a, b in pairwise(reading)]
    low, high = np.array([reading[0], *middle]), np.array([*middle, reading[-1]])
    return (np.interp(high, edges, total) - np.interp(low, edges, total)) / (high - low)


def _rows(
    f: Objective,
    rule: UpdateRule,
    name: str,
    reading: Sequence[int],
    weights: Sequence[Tensor],
    truth: Sequence[Tensor],
    columns: Mapping[str, "np.ndarray"],
    evaluate: Evaluate | None,
) -> list[dict[str, Any]]:
    rows, memory = [], None
    for i, (step, w, true) in enumerate(zip(reading, weights, truth, strict=True)):
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
