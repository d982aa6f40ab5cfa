"""Update rules: how an optimizer changes the weights, and the curvature at which it becomes unstable.

A rule is a value.  Its state (a momentum buffer, an average of squares, a step count) is a dict of tensors handed in
and out.  F is the loss with the weight decay inside the gradient, ``L + (wd/2)‖w‖²``; P, the preconditioner, is what
divides the gradient in a step.

P parameters.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import InvalidType, InvalidValue

State = Mapping[str, Tensor]
Number = float | Tensor


@dataclass(frozen=True)
class Stability:
    """Criterion for steps to be stable on a quadratic, ``λ1(M^-½ (∇²L + D) M^-½) ≤ 1`` [N34].

    M = P c, the preconditioner times the bound on the curvature in its metric; D, the weight decay inside the gradient.
    Both are diagonals, one number or ``(P,)``.  Where M is infinite, nothing moves.
    """

    metric: Tensor
    decay: Tensor

    @property
    def uniform(self) -> bool:
        """True where M is one number, so that steps have one length for all weights."""
        return self.metric.dim() == 0 or bool((self.metric == self.metric[0]).all())

    @property
    def threshold(self) -> float | None:
        """Largest stable eigenvalue of ``∇²L``, ``M - D``, where both are one number; otherwise None."""
        return None if self.metric.dim() or self.decay.dim() else (self.metric - self.decay).item()


class UpdateRule(ABC):
    """Rule by which an optimizer moves the weights.

    Subclass it, frozen, to teach sharpscope another optimizer; set `reads` to its torch counterpart.

    `preconditioner` and what follows it describe the mean motion, which is what a flow of the rule needs.
    """

    reads: ClassVar[type[Optimizer] | tuple[type[Optimizer], ...] | None] = None
    entries: ClassVar[Mapping[str, str]] = {}
    """Names in the rule's state of tensors that the torch optimizer keeps for each parameter under another name."""

    @abstractmethod
    def init(self, w: Tensor) -> State:
        """State of the rule before the first step from w ``(P,)``."""

    @abstractmethod
    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        """Next weights and state from weights w, gradient g of the loss (without weight decay) ``(P,)`` and state."""

    def step_with(
        self, w: Tensor, g: Tensor, state: State, *, learning_rate: Number, weight_decay: Number
    ) -> tuple[Tensor, State]:
        """Take a `step` with another learning rate and weight decay: numbers, or columns ``(R, 1)`` for R runs."""
        raise InvalidType(
            f"{type(self).__name__} takes one learning rate for all runs; define step_with to let them differ"
        )

    @abstractmethod
    def threshold(self, state: State) -> float:
        """Largest eigenvalue of ``∇²L(w)`` at which the rule is stable on a quadratic."""

    @abstractmethod
    def effective_learning_rate(self, radius: float, state: State) -> float:
        """Step size seen on the unit sphere by scale-invariant weights of norm `radius`."""

    @property
    @abstractmethod
    def edge(self) -> float:
        """Value of (effective learning rate × spherical sharpness) at the edge of stability."""

    @property
    @abstractmethod
    def intrinsic_time_per_step(self) -> float:
        """Time τ per step in which weight decay acts: over τ = 1 a weight that nothing else holds decays by e."""

    def preconditioner(self, state: State) -> Tensor:
        """Diagonal p of P, one number or ``(P,)``: on average the weights move by ``-∇F/p`` a step [N25].

        A momentum buffer does not enter: it has settled on the gradient, which changes little between steps.
        """
        raise InvalidType(
            f"{type(self).__name__} says no preconditioner, which a flow needs; define preconditioner(state)"
        )

    @property
    def bound(self) -> float:
        """Largest eigenvalue of ``P^-1/2 ∇²F P^-1/2`` at which the rule is stable."""
        return 2.0

    @property
    def coupled_decay(self) -> float:
        """Weight decay inside the gradient, the a of ``F = L + (a/2) ‖w‖²``, which the rule descends."""
        return 0.0

    @property
    def decoupled_decay(self) -> float:
        """Fraction of the weights that decoupled weight decay takes away in a step."""
        return 0.0

    def stability(self, state: State) -> Stability | None:
        """Criterion for its steps to be stable; None as long as the rule has no step length."""
        decay = torch.tensor(self.coupled_decay, dtype=torch.float64)
        return Stability(decay + self.threshold(state), decay)

    @property
    def equilibrium(self) -> float:
        """Angle in radians by which scale-invariant weights turn in a step once their norm has settled [N35].

        Not a number where no law is known, zero without weight decay (Kosson et al. 2024, arXiv 2305.17212).
        """
        return math.nan

    def averages(self, state: State) -> State:
        """Parts of the state that `preconditioner` reads: averages of squares, a step count; not the momentum."""
        return {}

    def relax(self, averages: State, square: Tensor) -> State:
        """Change of the averages per step, where the squares of the entries of ∇F are `square` ``(P,)`` in the mean."""
        return {}

    @classmethod
    def read(cls, optimizer: Optimizer) -> "UpdateRule":
        """The rule with the hyper-parameters of a live `optimizer`."""
        raise InvalidType(f"{cls.__name__} does not say how to read a {type(optimizer).__name__}")


def described(optimizer: Optimizer, *refused: str) -> Mapping[str, Any]:
    """Read the hyper-parameters of an optimizer's one parameter group, in which none of `refused` may be on."""
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    if len(groups) != 1:
        raise InvalidType(f"the optimizer has {len(groups)} parameter groups; a rule describes one: see rules_of")
    active = [name for name in refused if groups[0][name]]
    if active:
        raise InvalidType(f"no update rule for {kind} with {', '.join(active)}; subclass UpdateRule and pass rule=")
    return groups[0]


def demand(ok: bool, sentence: str) -> None:
    if not ok:
        raise InvalidValue(sentence)


def require_rule(rule: object) -> None:
    """Raise InvalidType unless `rule` is an UpdateRule."""
    if not isinstance(rule, UpdateRule):
        raise InvalidType(
            f"this {type(rule).__name__} is no update rule; pass one, such as GD(0.1) or rule_of(optimizer)"
        )
