"""Implicit steps along the minimizers, whose cost does not grow as weight decay gets weaker."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..autodiff import third_order
from ..errors import FlowStuck, InvalidValue
from ..linalg import complementarity
from ..linalg.eigenbasis import Basis, eigenbasis
from .central import Flow, LocalModel, Motion, column, eased
from .path import Point, Row, next_reach, prediction_error, row_of

COARSEST = 0.015
"""Curvature outside of the eigenbasis, over the bound, however short the step.

A coarser basis misses modes near the edge.  Their prediction then errs, so that steps get shorter and, if the basis got
coarser with them, shorter again, down to nothing.
"""


@dataclass(frozen=True)
class implicit:
    """Exponential steps of the local quadratic model, as long as its predicted curvature errs by less than `rtol`.

    No step is longer than `longest` in τ, nor so long that curvature outside of the eigenbasis (of at most
    `max_vectors` vectors) becomes stiff.  After each step `corrections` Newton steps in the stiff directions, one
    gradient each, lead back to where the flow is slow.

    Raises:
        ValueError: the rule has averages that move (RMSprop, Adam): use `multirate`.
        FlowStuck: the basis leaves out so much that a step is shorter than one of the optimizer.
    """

    rtol: float = 5e-3
    longest: float = 0.05
    max_vectors: int = 200
    corrections: int = 3

    def __call__(self, flow: Flow, point: Point, stop: float) -> tuple[Point, Row | None]:
        if point.averages:
            raise InvalidValue(
                f"implicit steps hold P fixed, and that of {type(flow.rule).__name__} moves: use multirate()"
            )
        tau_per_step, w = flow.rule.intrinsic_time_per_step, point.w
        longest = self.longest / tau_per_step if tau_per_step else math.inf
        reach = min(point.reach or (0.2 * longest if tau_per_step else 10.0), longest, stop - point.t)
        if flow.band is not None:  # modes that can rise to the bound within the step take part
            flow = replace(flow, band=max(flow.band, 4 * self.longest))
        inverse = flow.inverse(w, point.averages)
        a, shift = flow.curvature(w, inverse)
        floor = min(0.1 / reach, COARSEST * flow.rule.bound)
        basis = eigenbasis(a, floor, self.max_vectors, seed=point.refreshes)
        local = flow.around(w, inverse, basis.values + shift, basis.vectors)
        cost = point.cost + local.cost + basis.num_matvecs * a.cost + 2
        refreshes = point.refreshes + 1
        error = prediction_error(local, point.predicted)
        if point.before is not None and not len(local.curvatures):  # no mode shows how far the quadratic model reaches
            error = ((w - point.before.w).norm() / w.norm()).item() / 20
        if error > 4 * self.rtol and point.before is not None and point.before.t + 1 < point.t:
            return replace(point.before, reach=(point.t - point.before.t) / 3, cost=cost, refreshes=refreshes), None
        if point.predicted is not None:
            reach = next_reach(point.reach, error, self.rtol, longest)
        reach = _not_stiff(reach, basis)
        dt = min(reach, stop - point.t)
        new, motion = _exponential_step(local, basis, shift, dt, self.corrections)
        cost += 1 + self.corrections
        after = Point(
            t=point.t + dt,
            w=new,
            averages={},
            reach=reach,
            predicted=local.predicted(new, {}),
            cost=cost,
            refreshes=refreshes,
            before=replace(point, before=None),
        )
        return after, row_of(point, local, motion, length=dt, loss=motion.loss, error=error, cost=cost)


def _not_stiff(reach: float, basis: Basis) -> float:
    """Shorten a step so that curvature outside of the basis does not become stiff over it."""
    if basis.rest * reach <= 1:
        return reach
    if basis.rest > 1:
        raise FlowStuck(
            f"beside {len(basis.values)} eigenvectors the curvature is still {basis.rest:.2g}, so that steps would be"
            " shorter than the optimizer's: use multirate(), or implicit(max_vectors=...) larger"
        )
    return 1 / basis.rest


def _exponential_step(
    local: LocalModel, basis: Basis, shift: float, dt: float, corrections: int
) -> tuple[Tensor, Motion]:
    """Take a step of length dt in the local quadratic model [N26]; return the weights it leads to, and its motion."""
    flow, rule, w = local.flow, local.flow.rule, local.w0
    values = basis.values + shift
    root = column(local.inverse.sqrt())
    slow = _relaxed(torch.tensor(dt * shift).to(w))

    def spread(x: Tensor) -> Tensor:
        """Multiply columns ``(P, n)`` by ``M = dt P^-½ φ(dt P^-½ ∇²F P^-½) P^-½``."""
        y = root * x
        stiff = (_relaxed(dt * values) - slow)[:, None] * (basis.vectors.T @ y)
        return dt * root * (slow * y + basis.vectors @ stiff)

    value, g = flow.objective.value_and_grad(w)
    force = g + rule.coupled_decay * w + rule.decoupled_decay * w / local.inverse
    C, G = local.curvatures, local.curvature_gradients
    X = C
    if len(C):
        A, images = G @ spread(force[:, None])[:, 0], spread(G.T).T
        gap = rule.bound * torch.eye(len(C)).to(C) - C
        X = complementarity.solve(eased(gap, dt) + third_order.unpacked(A), third_order.gram(G, images) / 2).x
    push = 0.5 * local.push(X)
    new = w - spread((force + push)[:, None])[:, 0]
    stiff = dt * values > 3
    for _ in range(corrections):
        force = flow.objective.grad(new) + rule.coupled_decay * new + rule.decoupled_decay * new / local.inverse + push
        along = basis.vectors[:, stiff].T @ (root * force[:, None])
        new = new - (root * (basis.vectors[:, stiff] @ (along / values[stiff, None])))[:, 0]
    return new, local.motion_of((new - w) / dt, X, value=value.item(), average_rates={}, curvatures=C)


def _relaxed(z: Tensor) -> Tensor:
    """Fraction of a relaxation that is left on average, ``φ(z) = (1 - e^-z)/z``, one at zero."""
    small = z.abs() < 1e-8
    return torch.where(small, 1 - z / 2, -torch.expm1(-z) / torch.where(small, torch.ones_like(z), z))
