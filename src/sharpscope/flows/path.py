"""Points and readings along an integrated flow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..linalg.eigenpairs import Memory
from ..optimizers.base import State
from .central import Flow, Local, Slope


@dataclass(frozen=True)
class Point:
    """Where a flow is, and what its integrator wants to know about the way there."""

    t: float
    w: Tensor
    averages: State
    reach: float = 0.0  # length of the next step, as far as is known
    memory: Memory | None = None
    foretold: Tensor | None = None  # curvatures that the last step predicts here, (k,) descending
    cost: float = 0.0  # gradients so far
    looks: int = 0  # local models so far
    before: "Point | None" = None  # where the last step began, for another try


Row = dict[str, float]
Method = Callable[[Flow, Point, float], tuple[Point, Row | None]]


@dataclass(frozen=True)
class Trajectory:
    """A flow's path: `columns` with a number for every step taken, `weights` ``(T, P)`` at `times` ``(T,)``.

    Columns: t, length, loss (averaged over the oscillation), point_loss, radius, curvature (the largest, at the bound
    when at the edge), modes, active (those of them that oscillate), variance (mean squared distance to the flow),
    error (relative defect of the curvature foretold), gradients (spent so far).
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


def _defect(local: Local, foretold: Tensor | None, bound: float) -> float:
    """Relative error of the largest curvatures foretold."""
    here = local.curvatures.diagonal()
    if foretold is None or not len(here) or not len(foretold):
        return 0.0
    n = min(len(here), len(foretold), 3)
    return ((here[:n] - foretold[:n]).abs().max() / bound).item()


def _next(reach: float, error: float, rtol: float, longest: float) -> float:
    """The error of a linear prediction grows with the square of the distance."""
    factor = 0.8 * math.sqrt(rtol / max(error, 1e-3 * rtol))
    return min(longest, reach * min(2.0, max(0.25, factor)))


def _row(point: Point, local: Local, s: Slope, length: float, loss: float, error: float, cost: float) -> Row:
    spread = s.variances
    return {
        "t": point.t,
        "length": length,
        "loss": loss,
        "point_loss": s.point_loss,
        "radius": point.w.norm().item(),
        "curvature": local.largest,
        "modes": len(local.curvatures),
        "active": int((spread > 1e-6 * spread.max().clamp_min(1e-300)).sum()) if len(spread) else 0,
        "variance": spread.sum().item(),
        "error": error,
        "gradients": cost,
    }
