"""Update rules: what an optimizer does to the weights, and the curvature at which it becomes unstable.

A rule is a value.  Its state (a momentum buffer, an average of squares, a step count) is a dict of tensors handed in
and out.  F is the loss with the weight decay inside the gradient, ``L + (wd/2)‖w‖²``; P, the preconditioner, is what
divides the gradient in a step.

P parameters.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import sphere

State = Mapping[str, Tensor]


class UpdateRule(ABC):
    """One optimizer.  Subclass it, frozen, to teach sharpscope another one; set `reads` to its torch counterpart.

    `preconditioner` and what follows it describe the mean motion, which is what a flow of the rule needs.
    """

    reads: ClassVar[type[Optimizer] | tuple[type[Optimizer], ...] | None] = None
    entries: ClassVar[Mapping[str, str]] = {}
    """Names in the rule's state of what the torch optimizer keeps for each parameter under another name."""

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

    @property
    @abstractmethod
    def edge(self) -> float:
        """Value of (effective learning rate × spherical sharpness) at the edge of stability."""

    @property
    @abstractmethod
    def clock(self) -> float:
        """τ per step: the time in which weight decay acts (τ = 1 decays a weight that nothing else holds by e)."""

    def preconditioner(self, state: State) -> Tensor:
        """The diagonal p of P, one number or ``(P,)``: on average the weights move by ``-∇F/p`` a step [N25].

        A momentum buffer does not enter: it has settled on the gradient, which changes little between steps.
        """
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
        """What `preconditioner` reads in the state: averages of squares, a step count; not the momentum."""
        return {}

    def relax(self, averages: State, square: Tensor) -> State:
        """Change of the averages per step, where the squares of the entries of ∇F are `square` ``(P,)`` in the mean."""
        return {}

    @classmethod
    def read(cls, optimizer: Optimizer) -> "UpdateRule":
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
    entries: ClassVar[Mapping[str, str]] = {"momentum": "momentum_buffer"}

    def __post_init__(self) -> None:
        demand(0 < self.learning_rate < math.inf, f"the learning rate is {self.learning_rate}; it must be positive")
        most = 1 / self.learning_rate
        sentence = f"weight decay is {self.weight_decay}; it lies in [0, 1/lr) = [0, {most:g})"
        demand(0 <= self.weight_decay < most, sentence)
        demand(0 <= self.momentum < 1, f"momentum is {self.momentum}; it lies in [0, 1)")

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
        return heavy_ball(self.momentum)

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
    def read(cls, optimizer: Optimizer) -> "GD":
        group = described(optimizer, "nesterov", "dampening", "maximize")
        return cls(float(group["lr"]), float(group["weight_decay"]), float(group["momentum"]))


@dataclass(frozen=True)
class ScalarRMSprop(UpdateRule):
    """Gradient descent with one adaptive rate for all weights [N30]:

        w ← w - (η/√v) ∇L(w),      v ← β v + (1-β) ‖∇L(w)‖²

    in this order, or with the updated v in the step if `update_first`, as in torch's RMSprop.  The mean motion is the
    same; the oscillation at the edge grows in the first order and is damped in the second.  Starts at
    v₀ = (η/`first_rate`)².
    """

    base_rate: float
    decay: float
    first_rate: float
    update_first: bool = False

    def __post_init__(self) -> None:
        _check_average(self.base_rate, self.decay, self.first_rate)

    @property
    def edge(self) -> float:
        return 2.0

    @property
    def clock(self) -> float:
        return 0.0

    def init(self, w: Tensor) -> State:
        return {"v": (self.base_rate / self.first_rate) ** 2 * torch.ones_like(w[0])}

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        v = self.decay * state["v"] + (1 - self.decay) * (g @ g)
        return w - self.base_rate / (v if self.update_first else state["v"]).sqrt() * g, {"v": v}

    def preconditioner(self, state: State) -> Tensor:
        """``√v/η``."""
        return state["v"].sqrt() / self.base_rate

    def averages(self, state: State) -> State:
        return {"v": state["v"]}

    def relax(self, averages: State, square: Tensor) -> State:
        """``(1 - β)(⟨‖g‖²⟩ - v)``."""
        return {"v": (1 - self.decay) * (square.sum() - averages["v"])}

    def threshold(self, state: State) -> float:
        """``2 √v/η``."""
        return 2 * state["v"].sqrt().item() / self.base_rate

    def effective_learning_rate(self, radius: float, state: State) -> float:
        return self.base_rate / (state["v"].sqrt().item() * radius**2)


@dataclass(frozen=True)
class SphericalRMSprop(UpdateRule):
    """Projected gradient descent on the unit sphere with one adaptive rate for all weights [N11]:

        θ ← Π(θ - (η/√v) ∇L(θ)),      v ← β v + (1-β) ‖∇L(θ)‖²

    in this order, or with the updated v in the step if `update_first`.  With β = (1 - lr wd)⁴ and η² = (1-β)/(2β) it is
    what gradient descent with weight decay does to the direction of scale-invariant weights, up to a term of higher
    order; with that term, ``v ← β v (1 + (η²/v) ‖∇L(θ)‖²)²``, it is the same if `exact`.  Starts at
    v₀ = (η/`first_rate`)².
    """

    base_rate: float
    decay: float
    first_rate: float
    update_first: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        _check_average(self.base_rate, self.decay, self.first_rate)
        either = not (self.exact and self.update_first)
        demand(either, "weight decay uses a rate, then updates it: choose exact or update_first, not both")

    @classmethod
    def like(cls, rule: GD, radius: float) -> "SphericalRMSprop":
        """The member of the family that mimics `rule` on weights that start at norm `radius`."""
        eta, beta = sphere.rmsprop_constants(rule.learning_rate, rule.weight_decay)
        return cls(eta, beta, sphere.effective_learning_rate(rule.learning_rate, rule.weight_decay, radius))

    @property
    def constant(self) -> float:
        """The C of ``β = 1 - C η²``; about 2 for what weight decay does."""
        return (1 - self.decay) / self.base_rate**2

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
        r, v = w.norm(), state["v"]
        theta, g = w / r, g * r
        square = g @ g
        if self.exact:
            after = self.decay * v * (1 + self.base_rate**2 * square / v) ** 2
        else:
            after = self.decay * v + (1 - self.decay) * square
        rate = self.base_rate / (after if self.update_first else v).sqrt()
        return sphere.direction(theta - rate * g), {"v": after}

    def threshold(self, state: State) -> float:
        """``2 √v/η``, for weights of unit norm."""
        return 2 * state["v"].sqrt().item() / self.base_rate

    def effective_learning_rate(self, radius: float, state: State) -> float:
        return self.base_rate / state["v"].sqrt().item()


def rule_of(optimizer: Optimizer) -> UpdateRule:
    """The update rule of a live torch optimizer, with its present hyper-parameters.

    Raises:
        TypeError: no subclass of UpdateRule reads this optimizer.
    """
    rules = {kind: rule for rule in _leaves(UpdateRule) for kind in _kinds(rule)}
    kind = type(optimizer)
    if kind not in rules:
        known = ", ".join(sorted(k.__name__ for k in rules))
        raise TypeError(f"no update rule for {kind.__name__}; subclass UpdateRule. Known: {known}")
    return rules[kind].read(optimizer)


def state_of(optimizer: Optimizer, parameters: Sequence[Tensor]) -> State:
    """The state of `rule_of(optimizer)`, flat over `parameters` in their order; zero where no step was taken yet."""
    rule = rule_of(optimizer)
    start = rule.init(torch.cat([p.detach().reshape(-1) for p in parameters]))
    state = {}
    for name, first in start.items():
        kept = [optimizer.state.get(p, {}).get(rule.entries.get(name, name)) for p in parameters]
        if first.dim():
            parts = [torch.zeros_like(p) if k is None else k for p, k in zip(parameters, kept, strict=True)]
            state[name] = torch.cat([part.detach().reshape(-1) for part in parts])
        else:
            counts = {float(k) for k in kept if k is not None} or {0.0}
            demand(len(counts) == 1, f"the parameters differ in {name}, {sorted(counts)}: no one state describes them")
            state[name] = torch.full_like(first, counts.pop())
    return state


def described(optimizer: Optimizer, *refused: str) -> Mapping[str, Any]:
    """The hyper-parameters of an optimizer's one parameter group, in which none of `refused` is on."""
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    if len(groups) != 1:
        raise TypeError(f"the optimizer has {len(groups)} parameter groups; a rule describes one")
    odd = [name for name in refused if groups[0][name]]
    if odd:
        raise TypeError(f"no update rule for {kind} with {', '.join(odd)}; subclass UpdateRule and pass rule=")
    return groups[0]


def heavy_ball(momentum: float, decoupled_decay: float = 0.0) -> float:
    """``(2 - il)(1 + mom)/(1 - mom)``: the largest stable eigenvalue of P^-1/2 ∇²F P^-1/2 under momentum.

    There -1 is an eigenvalue of the map ``b' = mom·b + (1 - mom) λw,  w' = (1 - il) w - b'``: iterates change sign.
    """
    return (2 - decoupled_decay) * (1 + momentum) / (1 - momentum)


def demand(ok: bool, sentence: str) -> None:
    if not ok:
        raise ValueError(sentence)


def _check_average(base_rate: float, decay: float, first_rate: float) -> None:
    demand(base_rate > 0 and first_rate > 0, f"rates must be positive; got {base_rate} and {first_rate}")
    demand(0 < decay < 1, f"the decay β is {decay}; it lies in (0, 1)")


def _kinds(rule: type[UpdateRule]) -> tuple[type[Optimizer], ...]:
    return rule.reads if isinstance(rule.reads, tuple) else (rule.reads,) if rule.reads else ()


def _leaves(cls: type[Any]) -> list[type[UpdateRule]]:
    return [leaf for sub in cls.__subclasses__() for leaf in [sub, *_leaves(sub)]]
