"""Measures points of one training after the other, each with the help of what was found at those before.

P parameters.
"""

import contextlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..autodiff.objective import Objective
from ..errors import NotConverged, NotFinite
from ..linalg.memory import Memory
from ..linalg.operators import without_autocast
from ..measures import measures
from ..measures.iterate import LARGE, Iterate
from ..measures.row import Setting, alignment, angles, curvature
from ..optimizers.base import Stability
from ..symmetry.scale_groups import ScaleGroups, find_groups
from .memory_plan import MemoryPlan, free_bytes, plan_memory
from .time_budget import ProbePlan, limited

UNKNOWN_GROUPS = ScaleGroups({}, {}, {}, torch.empty(0, dtype=torch.long), 1.0)
"""The scale-invariant groups before `find_groups` has run."""

ROUGH = 0.05
"""Estimated relative error of eigenvalues of large models, those of at least `LARGE` weights."""

LOOK_ERROR = 0.3
"""Estimated relative error of a first look, on a few examples."""

TURNS = 4
"""Number of measurements of a large model in which each of its two sharpnesses is measured once."""


@dataclass(frozen=True)
class Moment:
    """A point of training: weights ``(P,)`` after `step` steps at the intrinsic time `tau`, and the optimizer there.

    `turned` are the weights before and after the step, where they are known; `applied` says whether the gradients of
    the setting are those of the step.
    """

    w: Tensor
    step: int
    tau: float
    setting: Setting
    turned: tuple[Tensor, Tensor] | None = None
    applied: bool = False


class Measuring:
    """Measures one objective, and keeps between measurements its groups, its eigenvectors, and what fits."""

    def __init__(self, objective: Objective, k: int, *, searches: bool) -> None:
        self.objective = objective
        self.k = k
        self.searches = searches  # for the scale-invariant groups, at the first measurement
        self.plan: ProbePlan | None = None  # of a budget: which part of the objective is measured, and how much of it
        self.groups: ScaleGroups | None = None
        self._memories: dict[str, Memory] = {}
        self._directions: dict[str, Tensor] = {}  # top eigenvectors of large models
        self._turn = 0  # which of the quantities of a large model were measured last
        self._fitted: MemoryPlan | None = None  # what of the objective fits into memory

    @property
    def measured(self) -> Objective:
        """The objective that is measured: the part of the given one that was planned with a budget, or fits."""
        if self.plan is not None:
            return self.plan.objective
        fitted = None if self._fitted is None else self._fitted.objective
        return self.objective if fitted is None else fitted

    @property
    def known_groups(self) -> ScaleGroups:
        """The scale-invariant groups; none before they are found."""
        return UNKNOWN_GROUPS if self.groups is None else self.groups

    def follow(self, plan: ProbePlan) -> None:
        """Measure as planned from here on."""
        self.plan, self.k = plan, plan.k

    @without_autocast()
    def at(self, point: Moment, deadline: float | None = None) -> tuple[Iterate, dict[str, Any]]:
        """Measure a point; what is not finite, not converged or too late is left out of its row.

        The deadline is a time on the clock of `perf_counter`.
        """
        at, fits = point.setting, self._fits()
        if fits and self.groups is None and self.searches:
            self.groups = find_groups(self.objective)
        f = self.measured
        options: dict[str, Any] = {"k": self.k, "rtol": 1e-4, "start": self._memories, "stability": at.stability}
        if deadline is not None:
            f = f.using(limited(f.expand, deadline))
            options["rtol"] = 2e-2
        if f.size >= LARGE:
            options |= {"error": ROUGH, "rtol": 2e-2, "directions": self._directions}
        it = Iterate(f, point.w, at.rule, step=point.step, groups=self.known_groups, **options)
        row: dict[str, Any] = {"tau": point.tau, "loss": measures.loss(it)}
        if at.learning_rate is not None:
            row["learning_rate"] = at.learning_rate
        if at.rule is not None:
            row |= {"intrinsic_time_per_step": at.rule.intrinsic_time_per_step, "equilibrium": at.rule.equilibrium}
        if point.applied and at.gradient is not None:
            row["applied_gradient"] = at.gradient
        if fits and math.isfinite(row["loss"]):
            with contextlib.suppress(NotConverged, NotFinite):
                plain, sphere = self._wanted(it)
                curvature(it, at, row, plain=plain, sphere=sphere)
            self._memories |= it.memories
            if it.error is not None and it.k == 1:
                self._directions |= {name: pairs.vectors[:, 0] for name, pairs in it.found.items()}
            row |= alignment(it, point.turned)
            row |= {f"rotation/{name}": a for name, a in angles(it.scale_groups, point.turned).items()}
        return it, row

    def state(self) -> dict[str, Any]:
        """Tensors, numbers, lists and dicts, for `load_state`."""
        return {
            "memories": {name: memory.tensors() for name, memory in self._memories.items()},
            "directions": {name: v.cpu() for name, v in self._directions.items()},
            "groups": None if self.groups is None else asdict(self.groups),
            "turn": self._turn,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        like = self.objective.weights()
        self._memories = {name: Memory.of(tensors).to(like) for name, tensors in state["memories"].items()}
        self._directions = {name: v.to(like) for name, v in state.get("directions", {}).items()}
        self._turn = state.get("turn", 0)
        self.groups = None if state["groups"] is None else ScaleGroups(**state["groups"])

    def _wanted(self, it: Iterate) -> tuple[bool, bool]:
        """Say whether to measure the plain and the spherical sharpness: of large models in turns.

        What is measured every time is what says how stable the next step is.
        """
        if self.plan is not None:
            return self.plan.full, self.plan.full
        if it.error is None or it.k > 1:
            return True, True
        self._turn = (self._turn + 1) % TURNS
        return self._turn == 1, self._turn == TURNS - 1

    def _fits(self) -> bool:
        """Plan the memory of measurements, once; say whether there is enough, and warn where there is little."""
        if self._fitted is None:
            free = free_bytes(next(iter(self.objective.parameters().values())).device)
            self._fitted = plan_memory(self.objective, self.k, free)
            self.k = self._fitted.k
            if self._fitted.note:
                warnings.warn(self._fitted.note, stacklevel=5)
        return self._fitted.objective is not None


@dataclass(frozen=True)
class FirstLook:
    """Sharpness on a few examples, after so many steps: over its threshold where there is one, otherwise λ1."""

    step: int
    examples: int
    value: float
    name: str


def first_look(f: Objective, step: int, stability: Stability | None) -> FirstLook:
    """Solve one eigenvalue problem on a few examples, long before a measurement can be afforded."""
    with without_autocast():
        it = Iterate(f, f.weights(), step=step, error=LOOK_ERROR, stability=stability)
        examples = sum(f.processes.each(lambda: sum(map(f.form.size, f.data))))
        if stability is None:
            return FirstLook(step, examples, measures.sharpness(it), "λ1")
        return FirstLook(step, examples, measures.stability_ratio(it), "sharpness / threshold")
