"""Explicit steps along a flow, with true gradients between refreshes of the modes."""

import math
from dataclasses import dataclass, replace

from .central import Flow, moved
from .path import Point, Row, next_reach, prediction_error, row_of


@dataclass(frozen=True)
class multirate:
    """Explicit steps of 1/c with true gradients; the modes are refreshed when their predicted curvature errs by `rtol`.

    No refresh is later than `longest` steps of the optimizer after the one before.
    """

    rtol: float = 3e-4
    longest: float = 200.0

    def __call__(self, flow: Flow, point: Point, stop: float) -> tuple[Point, Row | None]:
        local = flow.local(point.w, point.averages, point.memory, point.refreshes)
        cost = point.cost + local.cost + 2
        refreshes = point.refreshes + 1
        error = prediction_error(local, point.predicted)
        if error > 10 * self.rtol and point.before is not None and point.reach > 1:
            return replace(point.before, reach=point.reach / 4, cost=cost, refreshes=refreshes, before=None), None
        reach = next_reach(point.reach or 2.0, error, self.rtol, self.longest)
        length, dt = min(reach, stop - point.t), 1 / max(flow.rule.bound, local.largest)
        n = max(1, math.ceil(length / dt - 1e-9))
        dt = length / n
        w, averages = point.w, point.averages
        loss = 0.0
        X = None
        for _ in range(n):
            motion = local.motion(w, averages, dt, X)
            X = motion.covariance
            loss += motion.loss / n
            w = w + dt * motion.velocity
            averages = moved(averages, motion.average_rates, dt)
        after = Point(
            t=point.t + length,
            w=w,
            averages=averages,
            reach=reach,
            memory=local.memory,
            predicted=local.predicted(w, averages),
            cost=cost + n,
            refreshes=refreshes,
            before=replace(point, before=None),
        )
        return after, row_of(point, local, motion, length=length, loss=loss, error=error, cost=cost + n)
