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


@dataclass(frozen=True)
class Stability:
    """When steps are stable on a quadratic: ``λ1(M^-½ (∇²L + D) M^-½) ≤ 1`` [N34].

    M = P c, the preconditioner times the bound on the curvature in its metric; D, the weight decay inside the gradient.
    Both are diagonals, one number or ``(P,)``.  Where M is infinite, nothing moves.
    """

    metric: Tensor
    decay: Tensor

    @property
    def uniform(self) -> bool:
        """Whether M is one number, so that steps have one length for all weights."""
        return self.metric.dim() == 0 or bool((self.metric == self.metric[0]).all())

    @property
    def threshold(self) -> float | None:
        """Largest stable eigenvalue of ``∇²L``, ``M - D``, where both are one number; otherwise None."""
        return None if self.metric.dim() or self.decay.dim() else (self.metric - self.decay).item()


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

    def stability(self, state: State) -> Stability | None:
        """When its steps are stable; None as long as the rule has no step length."""
        decay = torch.tensor(self.coupled_decay, dtype=torch.float64)
        return Stability(decay + self.threshold(state), decay)

    @property
    def equilibrium(self) -> float:
        """Angle in radians by which scale-invariant weights turn in a step once their norm has settled [N35].

        Not a number where no law is known, zero without weight decay.
        """
        return math.nan

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

        b ← mom·b + (1-d) g,  g = ∇L(w) + wd·w,      w ← w - lr·b,  or  w ← w - lr (g + mom·b)  if `nesterov`

    with dampening d, which spares the first step as in torch.  On a quadratic of curvature λ it is stable up to
    ``lr (λ + wd) = 2 (1 + mom)/(1 - d)``, or ``2 (1 + mom)/(1 + 2 mom)`` with Nesterov's step: there b and w change
    sign (Polyak 1964; Cohen et al. 2021, arXiv 2103.00065, appendix on momentum).
    """

    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0

    reads = torch.optim.SGD
    entries: ClassVar[Mapping[str, str]] = {"momentum": "momentum_buffer"}

    def __post_init__(self) -> None:
        demand(0 < self.learning_rate < math.inf, f"the learning rate is {self.learning_rate}; it must be positive")
        most = 1 / self.learning_rate
        sentence = f"weight decay is {self.weight_decay}; it lies in [0, 1/lr) = [0, {most:g})"
        demand(0 <= self.weight_decay < most, sentence)
        demand(0 <= self.momentum < 1, f"momentum is {self.momentum}; it lies in [0, 1)")
        demand(0 <= self.dampening < 1, f"dampening is {self.dampening}; it lies in [0, 1)")
        plain = not self.nesterov or (self.momentum > 0 and self.dampening == 0)
        demand(plain, "Nesterov's step needs momentum and no dampening")

    @property
    def intrinsic_rate(self) -> float:
        """``lr·wd``: the rate at which weight decay shrinks a weight, per step."""
        return self.learning_rate * self.weight_decay

    @property
    def _undamped(self) -> float:
        """Share of a gradient that enters the buffer."""
        return 1 - self.dampening if self.momentum else 1.0

    @property
    def edge(self) -> float:
        """``2 (1 + mom)/(1 - d)``, or ``2 (1 + mom)/(1 + 2 mom)`` with Nesterov's step."""
        return 2 * (1 + self.momentum) / (1 + 2 * self.momentum if self.nesterov else self._undamped)

    @property
    def clock(self) -> float:
        """``(1 - d) lr·wd/(1 - mom)``."""
        return self._undamped * self.intrinsic_rate / (1 - self.momentum)

    def preconditioner(self, state: State) -> Tensor:
        """``(1 - mom)/((1 - d) lr)``."""
        return torch.tensor((1 - self.momentum) / (self._undamped * self.learning_rate), dtype=torch.float64)

    @property
    def bound(self) -> float:
        """``(1 - d)/(1 - mom)`` times the `edge`."""
        return self._undamped * self.edge / (1 - self.momentum)

    @property
    def equilibrium(self) -> float:
        """``√(2 (1 - d) lr·wd/(1 + mom))`` (Kosson et al. 2024, arXiv 2305.17212); not known for Nesterov's step."""
        return math.nan if self.nesterov else math.sqrt(2 * self._undamped * self.intrinsic_rate / (1 + self.momentum))

    @property
    def coupled_decay(self) -> float:
        return self.weight_decay

    def init(self, w: Tensor) -> State:
        return {"momentum": torch.zeros_like(w)} if self.momentum else {}

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.momentum:
            return (1 - self.intrinsic_rate) * w - self.learning_rate * g, state
        g, b = g + self.weight_decay * w, state["momentum"]
        b = self.momentum * b + (self._undamped if self.dampening and bool(b.any()) else 1.0) * g
        return w - self.learning_rate * (g + self.momentum * b if self.nesterov else b), {"momentum": b}

    def threshold(self, state: State) -> float:
        """``edge/lr - wd``."""
        return self.edge / self.learning_rate - self.weight_decay

    def effective_learning_rate(self, radius: float, state: State) -> float:
        return sphere.effective_learning_rate(self.learning_rate, self.weight_decay, radius)

    @classmethod
    def read(cls, optimizer: Optimizer) -> "GD":
        group = described(optimizer, "maximize")
        lr, wd, momentum, dampening = (float(group[n]) for n in ("lr", "weight_decay", "momentum", "dampening"))
        return cls(lr, wd, momentum, bool(group["nesterov"]), dampening if momentum else 0.0)


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
        TypeError: no subclass of UpdateRule reads this optimizer, or it has several parameter groups (`rules_of`).
        ValueError: its hyper-parameters make no rule, such as a learning rate of zero.
    """
    rules = {kind: rule for rule in _leaves(UpdateRule) for kind in _kinds(rule)}
    kind = type(optimizer)
    if kind not in rules:
        known = ", ".join(sorted(k.__name__ for k in rules))
        raise TypeError(f"no update rule for {kind.__name__}; subclass UpdateRule. Known: {known}")
    return rules[kind].read(optimizer)


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer once for each of its parameter groups, seen as if it had no other; state and groups are shared."""
    parts = []
    for group in optimizer.param_groups:
        part = object.__new__(type(optimizer))
        part.__dict__ = {**optimizer.__dict__, "param_groups": [group]}
        parts.append(part)
    return parts


def rules_of(optimizer: Optimizer) -> list[UpdateRule | None]:
    """The update rule of each parameter group; None for a group whose learning rate is zero, as in a warm-up.

    Raises:
        TypeError, ValueError: as `rule_of`.
    """
    return [rule_of(part) if float(part.param_groups[0]["lr"]) else None for part in parts_of(optimizer)]


def state_of(optimizer: Optimizer, parameters: Sequence[Tensor], rule: UpdateRule | None = None) -> State:
    """The state of `rule`, flat over `parameters` in their order; zero where no step was taken yet.

    The rule is ``rule_of(optimizer)`` by default; another one finds what it keeps by its `entries`.
    """
    rule = rule_of(optimizer) if rule is None else rule
    start = rule.init(torch.cat([p.detach().reshape(-1) for p in parameters]))
    state = {}
    for name, first in start.items():
        kept = [optimizer.state.get(p, {}).get(rule.entries.get(name, name)) for p in parameters]
        if first.dim():
            parts = [torch.zeros_like(p) if k is None else k for p, k in zip(parameters, kept, strict=True)]
            state[name] = torch.cat([part.detach().reshape(-1) for part in parts])
        else:
            counts = {float(k) for k in kept if k is not None} or {first.item()}
            demand(len(counts) == 1, f"the parameters differ in {name}, {sorted(counts)}: no one state describes them")
            state[name] = torch.full_like(first, counts.pop())
    return state


def stability_of(
    optimizer: Optimizer, parameters: Sequence[Tensor], rules: Sequence[UpdateRule | None] | None = None
) -> Stability | None:
    """When a live optimizer is stable, over `parameters` in their order [N34]; None as long as nothing can move.

    One number each where all parameter groups agree on one, otherwise diagonals ``(P,)``.  Where groups differ in
    momentum or decay the criterion still is exact: it asks at which curvature weights and buffers change sign together.
    `rules`, one for each group, are those of `rules_of` by default.

    Raises:
        TypeError, ValueError: as `rule_of`; parameters that the optimizer does not train.
    """
    owners: dict[int, tuple[Optimizer, UpdateRule | None]] = {}
    for part, rule in zip(parts_of(optimizer), rules_of(optimizer) if rules is None else rules, strict=True):
        owners |= {id(p): (part, rule) for p in part.param_groups[0]["params"]}
    untrained = sum(id(p) not in owners for p in parameters)
    demand(untrained == 0, f"the optimizer does not train {untrained} of the {len(parameters)} parameters")
    found = [_stability(*owners[id(p)], p) for p in parameters]  # one by one: they may differ in age
    kinds = {None if s is None or s.metric.dim() else (s.metric.item(), s.decay.item()) for s in found}
    if all(s is None for s in found) or (len(kinds) == 1 and None not in kinds):
        return found[0]
    moving = [STANDING if s is None else s for s in found]
    pairs = list(zip(moving, parameters, strict=True))
    return Stability(
        torch.cat([s.metric.to(p).expand(p.numel()) for s, p in pairs]),
        torch.cat([s.decay.to(p).expand(p.numel()) for s, p in pairs]),
    )


STANDING = Stability(torch.tensor(math.inf), torch.tensor(0.0))
"""Of weights that do not move."""


def _stability(part: Optimizer, rule: UpdateRule | None, parameter: Tensor) -> Stability | None:
    return None if rule is None else rule.stability(state_of(part, [parameter], rule))


def described(optimizer: Optimizer, *refused: str) -> Mapping[str, Any]:
    """The hyper-parameters of an optimizer's one parameter group, in which none of `refused` is on."""
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    if len(groups) != 1:
        raise TypeError(f"the optimizer has {len(groups)} parameter groups; a rule describes one: see rules_of")
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
