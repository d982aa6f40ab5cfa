"""One point of training, at which each expensive quantity is computed at most once.

P parameters, k eigenpairs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..autodiff.curvature import hessian, own_entries, sharded, whole_vectors
from ..autodiff.expansion import Expansion
from ..autodiff.objective import Objective, require_objective
from ..errors import InvalidType, InvalidValue
from ..linalg.eigenpairs import Eigenpairs
from ..linalg.largest import largest_eigenpair
from ..linalg.memory import Memory
from ..linalg.operators import SymmetricOperator, preconditioned, restricted, scaled, shifted
from ..linalg.rightmost import Rightmost, rightmost
from ..linalg.vectors import length
from ..linalg.warm_start import warm_started
from ..optimizers.base import Stability, State, UpdateRule
from ..symmetry.scale_groups import ScaleGroups, find_groups
from ..symmetry.sphere import on_sphere

ERROR = 1e-3
"""Relative error of a largest eigenvalue where nothing else is wanted."""

CERTIFIED = 1e-2
"""Largest error of a value at which nothing is to be far above it, too; rougher ones are cheaper without that."""

LARGE = 2**18
"""Number of parameters from which on runs are measured by solves afresh: what they cost is products, not memory."""

LONG = 2**20
"""Number of parameters from which on a value alone is found without the memory for its vector."""

NEARBY = 10.0
"""Length of the directions of a start, relative to its random part, where one of them is that of an earlier Iterate."""


def midpoint(before: Tensor, now: Tensor) -> Tensor:
    """Average two iterates, ``(w_{t-1} + w_t)/2``, which cancels their oscillation at the edge of stability."""
    if not isinstance(before, Tensor):
        raise InvalidType(f"this {type(before).__name__} is no vector of weights; of an objective f it is f.weights()")
    return (before + now) / 2


@dataclass(frozen=True)
class Iterate:
    """A point of training: weights `w` ``(P,)`` of `objective`, reached by `rule` in `state` after `step` steps.

    `k` and `rtol` are handed to the eigenvalue solver; `start` is the `memories` of an earlier Iterate.  With `error`,
    and for k = 1, values are instead found to about this relative error by `largest_eigenpair`, from the gradient and
    the `directions` of an earlier Iterate; if not `vectors`, without their vectors, in the least memory.  `stability`
    takes the place of the rule's own criterion, for an optimizer with several parameter groups (`stability_of`).
    """

    objective: Objective
    w: Tensor
    rule: UpdateRule | None = None
    state: State = field(default_factory=dict)
    step: int = 0
    groups: ScaleGroups | None = None
    k: int = 1
    rtol: float = 1e-4
    start: Mapping[str, Memory] = field(default_factory=dict)
    stability: Stability | None = None
    error: float | None = None
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    vectors: bool = True

    def __post_init__(self) -> None:
        require_objective(self.objective)

    @classmethod
    def of(cls, at: "Objective | Iterate", error: float | None = None, groups: ScaleGroups | None = None) -> "Iterate":
        """Return the Iterate itself, or the one at an objective's present weights; with this error, these groups."""
        if not isinstance(at, Iterate | Objective):
            raise InvalidType(f"a {type(at).__name__} has no sharpness by itself; make an Objective(model, loss, data)")
        if error is not None and not error > 0:
            raise InvalidValue(f"error={error}: give the relative error that is enough, such as 1e-3")
        if not isinstance(groups, ScaleGroups | None):
            raise InvalidType(f"groups are what find_groups(f) returns, not a {type(groups).__name__}")
        if isinstance(at, Iterate):
            it = at if error is None else replace(at, error=error)
            return it if groups is None else replace(it, groups=groups)
        return cls(at, at.weights(), error=ERROR if error is None else error, groups=groups, vectors=at.size < LONG)

    @cached_property
    def expansion(self) -> Expansion:
        return self.objective.at(self.w)

    @cached_property
    def hessian(self) -> SymmetricOperator:
        return hessian(self.expansion)

    @cached_property
    def scale_groups(self) -> ScaleGroups:
        return find_groups(self.objective, self.w) if self.groups is None else self.groups

    @cached_property
    def invariant(self) -> Tensor:
        """Jointly scale-invariant weights ``(n,)``.

        Raises:
            ValueError: there are none.
        """
        joint = self.scale_groups.joint
        if joint.numel() == 0:
            least = min(self.scale_groups.defects.items(), key=lambda item: item[1], default=("", 1.0))
            raise InvalidValue(
                "no scale-invariant weights: the least Euler cosine is"
                f" {least[1]:.2g} ({least[0]}); spherical measures need normalization, sharpness() does not"
            )
        return self.w[joint]

    @cached_property
    def top(self) -> Eigenpairs:
        """Top eigenpairs of the Hessian, ``∇²L(w)``."""
        return self._solve("top", self.hessian, self.expansion.grad)

    @cached_property
    def rightmost(self) -> Rightmost:
        """Rightmost eigenvalue of the Jacobian of the gradient, where gradients are stopped on the way."""
        return rightmost(self.expansion.hvp, self.expansion.grad, rtol=max(self.rtol, 1e-3), seed=self.step)

    @cached_property
    def effective_rightmost(self) -> Rightmost:
        """Rightmost eigenvalue of ``M^-½ (J + D) M^-½``, whose real part is 1 at the edge where it is real."""
        like, sign = self.expansion.grad, self.criterion.sign
        root = self.criterion.metric.to(like).sqrt()
        decay = self.criterion.decay.to(like)

        def product(v: Tensor) -> Tensor:
            x = v / root
            return (sign * self.expansion.hvp(x) + decay * x) / root

        return rightmost(product, like, rtol=max(self.rtol, 1e-3), seed=self.step)

    @property
    def required_rule(self) -> UpdateRule:
        """Update rule of this point; raises InvalidValue where there is none."""
        if self.rule is None:
            raise InvalidValue("this measure needs an update rule: Iterate(..., rule=GD(learning_rate=...))")
        return self.rule

    @cached_property
    def criterion(self) -> Stability:
        """Criterion for the next step to be stable.

        Raises:
            ValueError: there is no rule, or it has no step length yet.
        """
        if self.stability is not None:
            return self.stability
        found = self.required_rule.stability(self.state)
        if found is None:
            raise InvalidValue(f"{type(self.rule).__name__} has averaged no gradient yet: its steps have no length")
        return found

    @cached_property
    def effective_top(self) -> Eigenpairs:
        """Top eigenpairs of ``M^-½ (∇²L + D) M^-½``, whose largest eigenvalue is 1 at the edge of stability [N34]."""
        metric, decay = self.criterion.metric.to(self.w), self.criterion.decay.to(self.w)
        if not self.criterion.uniform:
            metric = metric.expand_as(self.w)
            h = self.hessian if self.criterion.sign > 0 else scaled(self.hessian, -1.0)
            a = shifted(preconditioned(h, metric), decay / metric)
            return self._solve("effective_top", a, self.expansion.grad / metric.sqrt())
        top, m = self.top, (metric[0] if metric.dim() else metric).item()
        # One step length for all weights: the vectors of ∇²L serve, and D counts as they see it.
        seen = (decay.expand_as(self.w)[:, None] * top.vectors.square()).sum(dim=0)
        return replace(top, values=top.values + seen, upper=top.upper + decay.max().item(), memory=None).scaled(1 / m)

    @cached_property
    def spherical_top(self) -> Eigenpairs:
        """Top eigenpairs of the Hessian in the jointly scale-invariant weights, at unit norm [N7]."""
        if self.scale_groups.covers(self.objective.size):
            return self.top.scaled(length(self.w) ** 2)
        if (known := self._top_in_sphere()) is not None:
            return known
        block = restricted(self.hessian, self.scale_groups.joint)
        return self._solve(
            "spherical_top", on_sphere(block, self.invariant), self.expansion.grad[self.scale_groups.joint]
        )

    def _top_in_sphere(self) -> Eigenpairs | None:
        """Take the pair of the Hessian for that of its block, where nearly all of its vector lies in the block.

        With a fraction ε of u outside, ``λ1`` of the block is at most that of H, and less by about 3 ε of it at most.
        """
        if self.error is None or "top" not in self.__dict__ or self.top.vectors.numel() == 0:
            return None
        top, joint = self.top, self.scale_groups.joint
        inside = top.vectors[joint]
        size = length(inside[:, 0])
        outside = max(1 - size**2, 0.0)
        if outside > self.error / 10:
            return None
        value = top.values[0].item()
        missing = 3 * outside * abs(value) + 2 * top.residuals[0].item() * outside**0.5
        pairs = replace(
            top, vectors=inside / size, floor=top.floor + missing, error=top.error + missing, num_matvecs=0, memory=None
        )
        return replace(pairs, num_gradients=0.0).scaled(length(self.invariant) ** 2)

    @cached_property
    def product_sphere_top(self) -> Eigenpairs:
        """Top eigenpairs of the Hessian in the invariant groups at unit norm each: ``Δ H Δ``, Δ = diag(‖w_g‖) [N12]."""
        groups = self.scale_groups.groups
        if not groups:
            raise InvalidValue("no group of weights is scale-invariant on its own; use spherical_sharpness()")
        inverse_square = self.w.new_ones(self.objective.size)
        for indices in groups.values():
            inverse_square[indices] = 1 / self.w[indices].square().sum()
        members = torch.cat(list(groups.values())).unique()
        a = restricted(preconditioned(self.hessian, inverse_square), members)
        return self._solve("product_sphere_top", a, (self.expansion.grad * inverse_square.rsqrt())[members])

    @property
    def found(self) -> dict[str, Eigenpairs]:
        """The pairs that were solved for so far, by the names of the problems."""
        names = ("top", "effective_top", "spherical_top", "product_sphere_top")
        return {name: self.__dict__[name] for name in names if name in self.__dict__}

    @property
    def memories(self) -> dict[str, Memory]:
        """Memories of the solvers that ran, to be the `start` of the next Iterate."""
        return {name: pairs.memory for name, pairs in self.found.items() if pairs.memory is not None}

    def _solve(self, name: str, a: SymmetricOperator, toward: Tensor) -> Eigenpairs:
        """Solve for the pairs of an operator; `toward` is the gradient in its coordinates."""
        if self.error is None or self.k > 1:
            return warm_started(a, self.start.get(name), min(self.k, a.size), rtol=self.rtol, seed=self.step)
        options: dict[str, Any] = {"error": self.error, "vectors": self.vectors, "seed": self.step}
        if self.error > CERTIFIED:
            options["gap"] = math.inf
        old = self.directions.get(name)
        if old is not None and len(old) == a.size:
            size = length(toward)
            toward = old if size == 0 else torch.add(old, toward, alpha=1 / size)
            options["weight"] = NEARBY
        if not (self.objective.is_sharded and self.vectors):  # without a basis parts save less than gathering takes
            return largest_eigenpair(a, toward, **options)
        parts = sharded(a, self.objective)
        found = largest_eigenpair(parts, own_entries(parts, toward), **options)
        return replace(found, vectors=whole_vectors(parts, found.vectors))
