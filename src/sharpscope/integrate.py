"""Follow a flow in time: explicitly with curvature foretold between looks, or implicitly, along the minimizers.

Near the edge a flow is stiff: an explicit step is bounded by about one step of the optimizer.  Two ways round that:

`multirate` looks at the modes and their G (some hundred gradients) only as often as the curvature foretold from the
last look goes wrong, and takes explicit steps of 1/c with true gradients between: about c gradients per unit of time.

`implicit` solves the flow of the local quadratic model exactly over a step of any length dt,

    w' = w - M (∇F + ½ Σ_ij X_ij G_ij),    M = dt P^-1/2 φ(dt P^-1/2 ∇²F P^-1/2) P^-1/2,    φ(z) = (1 - e^-z)/z,

an exponential Rosenbrock step whose X solves the complementarity problem with M in the place of dt P⁻¹ [N26].  For
large dt, M tends to dt times the projection onto the minimizers' tangent space plus a Newton step back to them, so that
the cost per τ does not depend on the intrinsic rate - as long as an eigenbasis of all that is stiff over a step, from
one Krylov space, stays small.

P parameters, T points of a path.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import complementarity, third
from .eigen import Memory
from .eigenbasis import eigenbasis
from .flows import Flow, Local, Slope, column, moved
from .rules import State


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
class Path:
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


class FlowStuck(ArithmeticError):
    """The steps of an integrator became too short, or the path left the finite numbers."""


def integrate(
    flow: Flow,
    w: Tensor,
    steps: float,
    *,
    averages: State | None = None,
    method: Method | None = None,
    at: Iterable[float] = (),
) -> Path:
    """The path of `flow` from `w` ``(P,)`` over a time of that many optimizer steps.

    Args:
        averages: of the rule's state at the start; by default those of a rule that starts here.
        method: `multirate()` (the default) or `implicit()`.
        at: times, besides the start and the end, at which the weights are kept.

    Raises:
        FlowStuck: it cannot go on; what was seen is in the message.
        WrongThirdDerivative: third derivatives of this model cannot be trusted.
    """
    if not steps > 0:
        raise ValueError(f"a path of {steps} steps has no length; steps must be positive")
    if averages is None:
        averages = flow.rule.averages(flow.rule.init(w))
    advance = multirate() if method is None else method
    stops = sorted({float(s) for s in at if 0 < s < steps} | {float(steps)})
    flow = flow.verified(w)
    point, kept = Point(0.0, w, averages, cost=20.0 if flow.slopes else 0.0), [w]
    rows: list[Row] = []
    for stop in stops:
        while point.t < stop * (1 - 1e-12):
            before = point
            try:
                point, row = advance(flow, point, stop)
            except complementarity.Unsolvable as error:
                raise FlowStuck(f"at t = {before.t:g} (in optimizer steps): {error}") from error
            if not bool(point.w.isfinite().all()):
                raise FlowStuck(f"the flow has no finite weights after t = {before.t:g} (in optimizer steps)")
            if row is None:
                rows = [r for r in rows if r["t"] < point.t * (1 - 1e-12)]
            else:
                rows.append(row)
        kept.append(point.w)
    names = rows[0].keys()
    return Path(torch.tensor([0.0, *stops]), torch.stack(kept), {n: [r[n] for r in rows] for n in names}, point)


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
            raise ValueError(
                f"implicit steps hold P fixed, and that of {type(flow.rule).__name__} moves: use multirate()"
            )
        rule, w = flow.rule, point.w
        longest = self.longest / rule.clock if rule.clock else math.inf
        reach = min(point.reach or (0.2 * longest if rule.clock else 10.0), longest, stop - point.t)
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
            X = complementarity.solve(gap + third.unpacked(A), third.gram(local.slopes, images) / 2).x
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
