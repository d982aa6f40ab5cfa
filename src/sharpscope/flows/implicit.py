"""Implicit steps along the minimizers, whose cost does not grow as weight decay gets weaker."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..autodiff import third_order
from ..errors import FlowStuck, InvalidValue
from ..linalg import complementarity
from ..linalg.eigenbasis import eigenbasis
from .central import Flow, Slope, column
from .path import Point, Row, _defect, _next, _row


@dataclass(frozen=True)
class implicit:
    """Exponential steps of the local quadratic model, as long as the curvature foretold errs by less than `rtol`.

    No step is longer than `longest` in τ, nor so long that what the eigenbasis (of at most `most` vectors) leaves out
    becomes stiff.  After each step `corrections` Newton steps in the stiff directions, one gradient each, lead back to
    where the flow is slow.

    Raises:
        ValueError: the rule has averages that move (RMSprop, Adam): use `multirate`.
        FlowStuck: the basis leaves out so much that a step is shorter than one of the optimizer.
    """

    rtol: float = 5e-3
    longest: float = 0.05
    most: int = 200
    corrections: int = 3

    def __call__(self, flow: Flow, point: Point, stop: float) -> tuple[Point, Row | None]:
        if point.averages:
            raise InvalidValue(
                f"implicit steps hold P fixed, and that of {type(flow.rule).__name__} moves: use multirate()"
            )
        rule, w = flow.rule, point.w
        longest = self.longest / rule.intrinsic_time_per_step if rule.intrinsic_time_per_step else math.inf
        reach = min(point.reach or (0.2 * longest if rule.intrinsic_time_per_step else 10.0), longest, stop - point.t)
        if flow.band is not None:  # what can rise to the bound within the step belongs to the modes
            flow = replace(flow, band=max(flow.band, 4 * self.longest))
        inverse = flow.inverse(w, point.averages)
        a, shift = flow.curvature(w, inverse)
        whole = eigenbasis(a, 0.1 / reach, self.most, seed=point.looks)
        values, root = whole.values + shift, column(inverse.sqrt())
        local = flow.around(w, inverse, values, whole.vectors)
        cost = point.cost + local.cost + whole.num_matvecs * a.cost + 2
        error = _defect(local, point.foretold, rule.bound)
        if point.before is not None and not len(local.curvatures):  # no mode says how far the quadratic model reaches
            error = ((w - point.before.w).norm() / w.norm()).item() / 20
        if error > 4 * self.rtol and point.before is not None and point.before.t + 1 < point.t:
            return replace(point.before, reach=(point.t - point.before.t) / 3, cost=cost, looks=point.looks + 1), None
        if point.foretold is not None:
            reach = _next(point.reach, error, self.rtol, longest)
        if whole.rest * reach > 1:
            reach = 1 / whole.rest
            if reach < 1:
                raise FlowStuck(
                    f"beside {len(values)} eigenvectors the curvature is still {whole.rest:.2g}, so that steps would be"
                    " shorter than the optimizer's: use multirate(), or implicit(most=...) larger"
                )
        dt = min(reach, stop - point.t)
        slow = _relaxed(torch.tensor(dt * shift).to(w))

        def spread(x: Tensor) -> Tensor:
            """``M x`` of columns ``(P, n)``."""
            y = root * x
            stiff = (_relaxed(dt * values) - slow)[:, None] * (whole.vectors.T @ y)
            return dt * root * (slow * y + whole.vectors @ stiff)

        value, g = flow.objective.value_and_grad(w)
        force = g + rule.coupled_decay * w + rule.decoupled_decay * w / inverse
        C, X = local.curvatures, local.curvatures
        if len(C):
            A, images = local.slopes @ spread(force[:, None])[:, 0], spread(local.slopes.T).T
            gap = rule.bound * torch.eye(len(C)).to(C) - C
            X = complementarity.solve(gap + third_order.unpacked(A), third_order.gram(local.slopes, images) / 2).x
        push = 0.5 * local.push(X)
        new = w - spread((force + push)[:, None])[:, 0]
        stiff = dt * values > 3
        for _ in range(self.corrections):
            left = flow.objective.grad(new) + rule.coupled_decay * new + rule.decoupled_decay * new / inverse + push
            along = whole.vectors[:, stiff].T @ (root * left[:, None])
            new = new - (root * (whole.vectors[:, stiff] @ (along / values[stiff, None])))[:, 0]
        cost += 1 + self.corrections
        s = Slope((new - w) / dt, {}, C, X, local.modes, *local.losses(value.item(), C, X))
        after = Point(
            point.t + dt,
            new,
            {},
            reach,
            None,
            local.foretold(new, {}),
            cost,
            point.looks + 1,
            replace(point, before=None),
        )
        return after, _row(point, local, s, dt, s.loss, error, cost)


def _relaxed(z: Tensor) -> Tensor:
    """``φ(z) = (1 - e^-z)/z``, one at zero."""
    small = z.abs() < 1e-8
    return torch.where(small, 1 - z / 2, -torch.expm1(-z) / torch.where(small, torch.ones_like(z), z))
