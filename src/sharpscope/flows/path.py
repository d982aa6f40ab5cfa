"""Points and rows along an integrated flow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..linalg.memory import Memory
from ..optimizers.base import State
from .central import Flow, LocalModel, Motion


@dataclass(frozen=True)
class Point:
    """A point of a flow, and the state of the integrator that has come to it."""

    t: float
    w: Tensor
    averages: State
    reach: float = 0.0  # length of the next step, as far as is known
    memory: Memory | None = None
    predicted: Tensor | None = None  # curvatures that the last step predicts here, (k,) descending
    cost: float = 0.0  # gradients so far
    refreshes: int = 0  # local models so far
    before: "Point | None" = None  # where the last step began, for another try


Row = dict[str, float]
Method = Callable[[Flow, Point, float], tuple[Point, Row | None]]
"""A step of an integrator towards a time: the point it reaches and its row, or a point before to try again from."""


@dataclass(frozen=True)
class Trajectory:
    """A flow's path: `columns` with a number for every step taken, `weights` ``(T, P)`` at `times` ``(T,)``.

    Columns: t, length, loss (averaged over the oscillation), point_loss, radius, curvature (the largest, at the bound
    when at the edge), modes, active (those of them that oscillate), variance (mean squared distance to the flow),
    error (relative error of the predicted curvature), gradients (spent so far).
    """

    times: Tensor
    weights: Tensor = field(repr=False)
    columns: dict[str, list[float]] = field(repr=False)
    end: Point = field(repr=False)

    @property
    def gradients(self) -> float:
        """Cost of the path in gradients."""
        return self.end.cost

    def __getitem__(self, name: str) -> list[float]:
        return self.columns[name]


def prediction_error(local: LocalModel, predicted: Tensor | None) -> float:
    """Error of the largest predicted curvatures at a new local model, relative to the bound."""
    here = local.curvatures.diagonal()
    if predicted is None or not len(here) or not len(predicted):
        return 0.0
    n = min(len(here), len(predicted), 3)
    return ((here[:n] - predicted[:n]).abs().max() / local.flow.rule.bound).item()


def next_reach(reach: float, error: float, rtol: float, longest: float) -> float:
    """Length of the next step: the error of a linear prediction grows with the square of the distance."""
    factor = 0.8 * math.sqrt(rtol / max(error, 1e-3 * rtol))
    return min(longest, reach * min(2.0, max(0.25, factor)))


def row_of(
    point: Point, local: LocalModel, motion: Motion, *, length: float, loss: float, error: float, cost: float
) -> Row:
    """Row of a step of that length from a point, with the loss averaged over it and the cost at its end."""
    variances = motion.variances
    return {
        "t": point.t,
        "length": length,
        "loss": loss,
        "point_loss": motion.point_loss,
        "radius": point.w.norm().item(),
        "curvature": local.largest,
        "modes": len(local.curvatures),
        "active": int((variances > 1e-6 * variances.max().clamp_min(1e-300)).sum()) if len(variances) else 0,
        "variance": variances.sum().item(),
        "error": error,
        "gradients": cost,
    }
