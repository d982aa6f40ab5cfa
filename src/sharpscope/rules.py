"""Update rules: what an optimizer does to the weights, and the curvature at which it becomes unstable.

A rule is a value.  Its state (a momentum buffer, an average of squares) is a dict of tensors handed in and out.

P parameters.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import sphere

State = Mapping[str, Tensor]


class UpdateRule(ABC):
    """One optimizer.  Subclass it, frozen, to teach sharpscope another one; set `reads` to its torch counterpart."""

    reads: ClassVar[type[torch.optim.Optimizer] | None] = None

    @abstractmethod
    def init(self, w: Tensor) -> State:
        """The state before the first step from w ``(P,)``."""

    @abstractmethod
    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        """Next weights and state from weights w, gradient g of the loss (without weight decay) ``(P,)`` and state."""

    @abstractmethod
    def threshold(self, state: State) -> float:
        """Largest eigenvalue of ``∇²L(w)`` at which the rule is stable on a quadratic."""

    @abstractmethod
    def effective_learning_rate(self, radius: float, state: State) -> float:
        """Step size seen on the unit sphere by scale-invariant weights of norm `radius`."""

    def preconditioner(self, state: State) -> Tensor:
        """The diagonal p of P, one number or ``(P,)``: on average the weights move by ``-∇F/p`` a step [N25]."""
        raise TypeError(
            f"{type(self).__name__} says no preconditioner, which a flow needs; define preconditioner(state)"
        )

    @property
    def bound(self) -> float:
        """Largest eigenvalue of ``P^-1/2 ∇²F P^-1/2`` at which the rule is stable."""
        return 2.0

    @property
    def coupled_decay(self) -> float:
        """The a of ``F = L + (a/2) ‖w‖²``, which the rule descends."""
        return 0.0

    @property
    def decoupled_decay(self) -> float:
        """Share of the weights that decoupled weight decay takes away in a step."""
        return 0.0

    def averages(self, state: State) -> State:
        """Those entries of the state that average over gradients and so take part in a flow; not the momentum."""
        return {}

    def relax(self, averages: State, square: Tensor) -> State:
        """Change of the averages per step while the gradients' squares are `square` ``(P,)`` in the mean."""
        return {}

    @property
    @abstractmethod
    def edge(self) -> float:
        """Value of (effective learning rate × spherical sharpness) at the edge of stability."""

    @property
    @abstractmethod
    def clock(self) -> float:
        """τ per step: the time in which weight decay acts (τ = 1 decays a weight that nothing else holds by e)."""

    @classmethod
    def read(cls, optimizer: torch.optim.Optimizer) -> "UpdateRule":
        """The rule with the hyper-parameters of a live `optimizer`."""
        raise TypeError(f"{cls.__name__} does not say how to read a {type(optimizer).__name__}")


@dataclass(frozen=True)
class GD(UpdateRule):
    """Gradient descent with weight decay and heavy-ball momentum [N10]:

        b ← mom·b + ∇L(w) + wd·w,      w ← w - lr·b

    On a quadratic of curvature λ it is stable up to ``lr (λ + wd) = 2 (1 + mom)`` (Polyak 1964; Cohen et al. 2021,
    arXiv 2103.00065, section on momentum).
    """

    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0

    reads = torch.optim.SGD

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"the learning rate is {self.learning_rate}; it must be positive")
        if not 0 <= self.weight_decay < 1 / self.learning_rate:
            bound = f"[0, 1/lr) = [0, {1 / self.learning_rate:g})"
            raise ValueError(f"weight decay is {self.weight_decay}; it lies in {bound}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it lies in [0, 1)")

    @property
    def intrinsic_rate(self) -> float:
        """``lr·wd``: the rate at which weight decay shrinks a weight, per step."""
        return self.learning_rate * self.weight_decay

    @property
    def edge(self) -> float:
        """``2 (1 + mom)``."""
        return 2 * (1 + self.momentum)

    @property
    def clock(self) -> float:
        """``lr·wd/(1 - mom)``."""
        return self.intrinsic_rate / (1 - self.momentum)

    def preconditioner(self, state: State) -> Tensor:
        """``(1 - mom)/lr``."""
        return torch.tensor((1 - self.momentum) / self.learning_rate, dtype=torch.float64)

    @property
    def bound(self) -> float:
        """``2 (1 + mom)/(1 - mom)``."""
        return self.edge / (1 - self.momentum)

    @property
    def coupled_decay(self) -> float:
        return self.weight_decay

    def init(self, w: Tensor) -> State:
        return {"momentum": torch.zeros_like(w)} if self.momentum else {}

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.momentum:
            return (1 - self.intrinsic_rate) * w - self.learning_rate * g, state
        b = self.momentum * state["momentum"] + g + self.weight_decay * w
        return w - self.learning_rate * b, {"momentum": b}

    def threshold(self, state: State) -> float:
        """``2 (1 + mom)/lr - wd``."""
        return self.edge / self.learning_rate - self.weight_decay

    def effective_learning_rate(self, radius: float, state: State) -> float:
        return sphere.effective_learning_rate(self.learning_rate, self.weight_decay, radius)

    @classmethod
    def read(cls, optimizer: torch.optim.Optimizer) -> "GD":
        if len(optimizer.param_groups) != 1:
            raise TypeError(f"the optimizer has {len(optimizer.param_groups)} parameter groups; GD describes one")
        group = optimizer.param_groups[0]
        odd = [name for name in ("nesterov", "dampening", "maximize") if group[name]]
        if odd:
            raise TypeError(f"no update rule for SGD with {', '.join(odd)}; subclass UpdateRule and pass rule=")
        return cls(float(group["lr"]), float(group["weight_decay"]), float(group["momentum"]))


@dataclass(frozen=True)
class SphericalRMSprop(UpdateRule):
    """Projected gradient descent on the unit sphere with one adaptive rate for all weights [N11]:

        θ ← Π(θ - (η/√v) ∇L(θ)),      v ← β v + (1-β) ‖∇L(θ)‖²      (use v, then update it)

    With β = (1 - lr wd)⁴ and η² = (1-β)/(2β) it is what gradient descent with weight decay does to the direction of
    scale-invariant weights, up to a term of higher order.  Starts at v₀ = (η/`first_rate`)².
    """

    base_rate: float
    decay: float
    first_rate: float

    def __post_init__(self) -> None:
        if not (self.base_rate > 0 and self.first_rate > 0):
            raise ValueError(f"rates must be positive; got {self.base_rate} and {self.first_rate}")
        if not 0 < self.decay < 1:
            raise ValueError(f"the decay β is {self.decay}; it lies in (0, 1)")

    @classmethod
    def like(cls, rule: GD, radius: float) -> "SphericalRMSprop":
        """The member of the family that mimics `rule` on weights that start at norm `radius`."""
        eta, beta = sphere.rmsprop_constants(rule.learning_rate, rule.weight_decay)
        return cls(eta, beta, sphere.effective_learning_rate(rule.learning_rate, rule.weight_decay, radius))

    @property
    def edge(self) -> float:
        return 2.0

    @property
    def clock(self) -> float:
        """``(1 - β)/4``, the intrinsic rate of the gradient descent that this rule mimics."""
        return (1 - self.decay) / 4

    def init(self, w: Tensor) -> State:
        return {"v": (self.base_rate / self.first_rate) ** 2 * torch.ones_like(w[0])}

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        r = w.norm()
        theta, g = w / r, g * r
        rate = self.base_rate / state["v"].sqrt()
        return sphere.direction(theta - rate * g), {"v": self.decay * state["v"] + (1 - self.decay) * (g @ g)}

    def threshold(self, state: State) -> float:
        """``2 √v/η``, for weights of unit norm."""
        return 2 * state["v"].sqrt().item() / self.base_rate

    def effective_learning_rate(self, radius: float, state: State) -> float:
        return self.base_rate / state["v"].sqrt().item()


def rule_of(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """The update rule of a live torch optimizer, with its present hyper-parameters.

    Raises:
        TypeError: no subclass of UpdateRule reads this optimizer.
    """
    rules = {rule.reads: rule for rule in _leaves(UpdateRule) if rule.reads is not None}
    kind = type(optimizer)
    if kind not in rules:
        known = ", ".join(sorted(k.__name__ for k in rules))
        raise TypeError(f"no update rule for {kind.__name__}; subclass UpdateRule. Known: {known}")
    return rules[kind].read(optimizer)


def _leaves(cls: type[Any]) -> list[type[UpdateRule]]:
    return [leaf for sub in cls.__subclasses__() for leaf in [sub, *_leaves(sub)]]
