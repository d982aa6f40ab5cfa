"""Follow a flow in time: by explicit steps between refreshes of its modes, or by implicit steps along the minimizers.

Near the edge a flow is stiff: an explicit step is bounded by about one step of the optimizer.  Two methods avoid that:

`multirate` computes the modes and their G (some hundred gradients) anew only when the curvature that it predicts from
them goes wrong, and takes explicit steps of 1/c with true gradients between: about c gradients per unit of time.

`implicit` solves the flow of the local quadratic model exactly over a step of any length dt,

    w' = w - M (∇F + ½ Σ_ij X_ij G_ij),    M = dt P^-1/2 φ(dt P^-1/2 ∇²F P^-1/2) P^-1/2,    φ(z) = (1 - e^-z)/z,

an exponential Rosenbrock step whose X solves the complementarity problem with M in the place of dt P⁻¹ [N26].  For
large dt, M tends to dt times the projection onto the minimizers' tangent space plus a Newton step back to them, so that
the cost per τ does not depend on the intrinsic rate - as long as an eigenbasis of all that is stiff over a step, from
one Krylov space, stays small.

P parameters, T points of a path.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..display import percent, progress
from ..errors import FlowStuck, InvalidType, InvalidValue, Unsolvable
from ..optimizers.base import State
from .central import Flow
from .explicit import multirate
from .path import Method, Point, Row, Trajectory


@progress("flow", "%")
def integrate(
    flow: Flow,
    w: Tensor,
    steps: float,
    *,
    averages: State | None = None,
    method: Method | None = None,
    at: Iterable[float] = (),
    progress: Callable[[float], None] = percent,
) -> Trajectory:
    """Follow `flow` from `w` ``(P,)`` over a time of that many optimizer steps.

    Args:
        averages: of the rule's state at the start; by default those of a rule that starts here.
        method: `multirate()` (the default) or `implicit()`.
        at: times, besides the start and the end, at which the weights are kept.
        progress: called after every step with the fraction of the time that is done; by default shows a bar.

    Raises:
        FlowStuck: it cannot go on; the message says why.
        WrongThirdDerivative: third derivatives of this model cannot be trusted.
    """
    if not isinstance(flow, Flow):
        raise InvalidType(f"this {type(flow).__name__} is no flow; of an objective and a rule it is central(f, rule)")
    if not steps > 0:
        raise InvalidValue(f"a path of {steps} steps has no length; steps must be positive")
    if averages is None:
        averages = flow.rule.averages(flow.rule.init(w))
    advance = multirate() if method is None else method
    stops = sorted({float(s) for s in at if 0 < s < steps} | {float(steps)})
    flow = flow.verified(w)
    point, kept = Point(0.0, w, averages, cost=20.0 if flow.third_derivatives else 0.0), [w]
    rows: list[Row] = []
    for stop in stops:
        while point.t < stop * (1 - 1e-12):
            before = point
            try:
                point, row = advance(flow, point, stop)
            except Unsolvable as error:
                raise FlowStuck(f"at t = {before.t:g} (in optimizer steps): {error}") from error
            if not bool(point.w.isfinite().all()):
                raise FlowStuck(f"the flow has no finite weights after t = {before.t:g} (in optimizer steps)")
            if row is None:
                rows = [r for r in rows if r["t"] < point.t * (1 - 1e-12)]
            else:
                rows.append(row)
            progress(point.t / steps)
        kept.append(point.w)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Trajectory(torch.tensor([0.0, *stops]), torch.stack(kept), columns, end=point)
