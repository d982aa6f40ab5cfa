"""Long full-batch runs, one row for a window of steps: where losses jump, single steps say little.

The loss of a row is the median over its window, `peak` and `low` are the largest and the least; sharpness is that of
the midpoint of the last step, scaled to unit norm.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...autodiff.objective import Objective
from ...errors import NotConverged, NotFinite
from ...linalg.memory import Memory
from ...measures import measures
from ...measures.iterate import Iterate, midpoint
from ...optimizers.base import State, UpdateRule
from ...symmetry.sphere import angle, direction

UNBOUNDED = 1e6
"""A run ends where its loss is larger, or not finite."""


@dataclass(frozen=True)
class FixedRate(UpdateRule):
    """Gradient descent on the unit sphere at a fixed effective learning rate, ``w ← Π(w - η̃ ∇L(w))`` [N5]."""

    effective_rate: float

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        return direction(w - self.effective_rate * g), state

    def threshold(self, state: State) -> float:
        """Largest stable eigenvalue at unit norm, ``2/η̃``."""
        return 2 / self.effective_rate


@dataclass(frozen=True)
class Windows:
    """The length of a run and what is measured on the way: a row for every `every` steps.

    `curvature` is the number of rows between two that have the spherical sharpness (0: none has), `evaluate` gives
    further columns at weights ``(P,)``.
    """

    steps: int
    every: int
    curvature: int = 0
    evaluate: Callable[[Tensor], Mapping[str, float]] = lambda w: {}


def descend(
    append: Callable[..., None],
    progress: Callable[[float], None],
    f: Objective,
    rule: UpdateRule,
    w: Tensor,
    plan: Windows,
) -> Tensor:
    """Take the steps of a plan from w ``(P,)``, with a row for every window; return the last weights.

    A row has `step`, `loss`, `peak` and `low`, the `radius` of the weights and the `angle` of the last step.
    """
    state, memories = rule.init(w), dict[str, Memory]()
    losses: list[float] = []
    for step in range(1, plan.steps + 1):
        before = w
        loss, g = f.value_and_grad(w)
        w, state = rule.step(w, g, state)
        losses.append(loss.item())
        bounded = losses[-1] < UNBOUNDED and bool(w.isfinite().all())
        if step % plan.every and bounded:
            continue
        row = {"loss": statistics.median(losses), "peak": max(losses), "low": min(losses)}
        row |= {"radius": before.norm().item(), "angle": angle(before, w).item()}
        if not bounded:
            append(step=step, **{name: v for name, v in row.items() if math.isfinite(v)} | {"peak": UNBOUNDED})
            return before
        if plan.curvature and step // plan.every % plan.curvature == 0:
            row |= spherical_sharpness(f, midpoint(before, w), memories)
        append(step=step, **row, **plan.evaluate(w))
        losses.clear()
        progress(step / plan.steps)
    return w


def spherical_sharpness(f: Objective, w: Tensor, memories: dict[str, Memory]) -> dict[str, float]:
    """The column `spherical_sharpness` at w ``(P,)``; none where the eigenvalue is not found."""
    it = Iterate(f, w, rtol=1e-2, start=memories)
    try:
        value = measures.sharpness(it) * torch.dot(w, w).item()
    except (NotConverged, NotFinite):
        return {}
    memories |= it.memories
    return {"spherical_sharpness": value}
