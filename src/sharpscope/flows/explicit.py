"""Explicit steps along a flow, with true gradients between refreshes of the modes."""

import math
from dataclasses import dataclass, replace

from .central import Flow, moved
from .path import Point, Row, _defect, _next, _row


@dataclass(frozen=True)
class multirate:
    """Explicit steps of 1/c with true gradients; a new look at the modes when the curvature foretold errs by `rtol`.

    No look is later than `longest` steps of the optimizer after the one before.
    """

    rtol: float = 3e-4
    longest: float = 200.0

    def __call__(self, flow: Flow, point: Point, stop: float) -> tuple[Point, Row | None]:
        local = flow.local(point.w, point.averages, point.memory, point.looks)
        cost = point.cost + local.cost + 2
        error = _defect(local, point.foretold, flow.rule.bound)
        if error > 10 * self.rtol and point.before is not None and point.reach > 1:
            retry = replace(point.before, reach=point.reach / 4, cost=cost, looks=point.looks + 1, before=None)
            return retry, None
        reach = _next(point.reach or 2.0, error, self.rtol, self.longest)
        length, dt = min(reach, stop - point.t), 1 / max(flow.rule.bound, local.largest)
        n = max(1, math.ceil(length / dt - 1e-9))
        dt = length / n
        w, averages, loss, X = point.w, point.averages, 0.0, None
        for _ in range(n):
            s = local.slope(w, averages, dt, X)
            X = s.covariance
            loss += s.loss / n
            w = w + dt * s.velocity
            averages = moved(averages, s.averages, dt)
        row = _row(point, local, s, length, loss, error, cost + n)
        return Point(
            point.t + length,
            w,
            averages,
            reach,
            local.memory,
            local.foretold(w, averages),
            cost + n,
            point.looks + 1,
            replace(point, before=None),
        ), row
