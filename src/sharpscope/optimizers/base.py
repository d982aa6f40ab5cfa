"""Update rules: how an optimizer changes the weights, and the curvature at which it becomes unstable.

A rule is a value.  Its state (a momentum buffer, an average of squares, a step count) is a dict of tensors handed in
and out.  F is the loss with the weight decay inside the gradient, ``L + (wd/2)‖w‖²``; P, the preconditioner, is what
divides the gradient in a step.

P parameters.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, ClassVar, NoReturn

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
    Both are diagonals, one number or ``(P,)``.  Where M is infinite, nothing moves.  `sign` is -1 for an optimizer that
    maximizes L, and so descends -L: it stands before ``∇²L``.
    """

    metric: Tensor
    decay: Tensor
    sign: int = 1

    @property
    def uniform(self) -> bool:
        """True where L is descended and M is one number, so that steps have one length for all weights."""
        return self.sign > 0 and (self.metric.dim() == 0 or bool((self.metric == self.metric[0]).all()))

    @property
    def threshold(self) -> float | None:
        """Largest stable eigenvalue of ``∇²L``, ``M - D``, where both are one number; otherwise None."""
        plain = self.sign > 0 and not self.metric.dim() and not self.decay.dim()
        return (self.metric - self.decay).item() if plain else None


class UpdateRule(ABC):
    """Rule by which an optimizer moves the weights.

    Subclass it as a frozen dataclass to teach sharpscope another optimizer: `reads` is its torch counterpart, the
    fields are those hyper-parameters that its law needs, by their names in the parameter groups (`learning_rate` for
    lr, `beta1` and `beta2` for betas), and `threshold` is the law.  Where every weight has a step length of its own the
    law is a `preconditioner`, in a subclass of `PerWeight`.  `step` is for rules that are descended here, too.

    `preconditioner` and what follows it describe the mean motion, which is what a flow of the rule needs.
    """

    reads: ClassVar[type[Optimizer] | tuple[type[Optimizer], ...] | None] = None
    entries: ClassVar[Mapping[str, str]] = {}
    """Names in the rule's state of tensors that the torch optimizer keeps for each parameter under another name."""

    def init(self, w: Tensor) -> State:
        """State of the rule before the first step from w ``(P,)``: zeros for its entries, a number for `step`."""
        count = torch.zeros((), dtype=torch.float64)
        return {name: count if name == "step" else torch.zeros_like(w) for name in self.entries}

    def kept(self, entry: Mapping[str, Any], parameter: Tensor) -> Mapping[str, Any]:
        """Pick the rule's state of a parameter from the `entry` that torch's optimizer keeps of it, as far as it does.

        Define it where the optimizer keeps something in another form than one number for each weight.
        """
        return {**entry, **{name: entry[kept] for name, kept in self.entries.items() if kept in entry}}

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        """Next weights and state from weights w, gradient g of the loss (without weight decay) ``(P,)`` and state."""
        raise InvalidType(f"{type(self).__name__} says how steps are stable, not how they are taken; define step")

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

    def effective_learning_rate(self, radius: float, state: State) -> float:
        """Step size seen on the unit sphere by scale-invariant weights of norm `radius`.

        Unless a rule knows better, that at which the threshold is the `edge`, ``edge/((threshold + a) ‖w‖²)``.
        """
        return self.edge / ((self.threshold(state) + self.coupled_decay) * radius**2)

    @property
    def edge(self) -> float:
        """Value of (effective learning rate × spherical sharpness) at the edge of stability."""
        return 2.0

    @property
    def intrinsic_time_per_step(self) -> float:
        """Time τ per step in which weight decay acts: over τ = 1 a weight that nothing else holds decays by e.

        Unless a rule knows better, that of decoupled weight decay; not a number with decay inside the gradient.
        """
        return math.nan if self.coupled_decay else self.decoupled_decay

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
        """The rule with the hyper-parameters of a live `optimizer`: its fields, by their names in the group."""
        group = described(optimizer)
        known = {"learning_rate": group.get("lr"), **group}
        known |= {f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), 1)}
        own: tuple[Field[Any], ...] = fields(cls) if is_dataclass(cls) else ()
        missing = [f.name for f in own if f.default is MISSING and known.get(f.name) is None]
        if missing or not own:
            raise InvalidType(
                f"{cls.__name__} does not say how to read a {type(optimizer).__name__}, whose parameter groups have no"
                f" {', '.join(missing) or 'field of a dataclass'}; define read(optimizer)"
            )
        return cls(**{f.name: _plain(known[f.name]) for f in own if f.name in known})


class PerWeight(UpdateRule):
    """A rule with a step length for every weight, whose stability shows in ``M^-½ (∇²L + D) M^-½`` alone.

    A subclass defines the `preconditioner`, and with momentum the `bound`; or, for both, the `metric`.
    """

    def threshold(self, state: State) -> NoReturn:
        raise InvalidType(self._none("threshold on the eigenvalues of ∇²L"))

    def effective_learning_rate(self, radius: float, state: State) -> NoReturn:
        raise InvalidType(self._none("effective learning rate on the sphere"))

    @property
    def edge(self) -> NoReturn:
        raise InvalidType(self._none("effective learning rate on the sphere"))

    def metric(self, state: State) -> Tensor:
        """Metric M of its criterion, ``bound·P`` (P,)."""
        return self.bound * self.preconditioner(state)

    def stability(self, state: State) -> Stability | None:
        """Criterion in the metric M; None before the first gradient."""
        averages = [t for t in state.values() if t.dim()]
        if averages and not any(bool(t.any()) for t in averages):
            return None
        return Stability(self.metric(state), torch.tensor(self.coupled_decay, dtype=torch.float64))

    def _none(self, what: str) -> str:
        return (
            f"{type(self).__name__} takes steps of another length for each weight and has no {what}; compare the"
            " eigenvalues of M^-1/2 (∇²L + D) M^-1/2 with 1, where M and D are those of stability(state)"
        )


def _plain(value: Any) -> Any:
    """Turn a number or a tensor with one into a float; leave anything else as it is."""
    return value if isinstance(value, bool) or not isinstance(value, int | float | Tensor) else float(value)


def described(optimizer: Optimizer) -> Mapping[str, Any]:
    """Read the hyper-parameters of an optimizer's one parameter group."""
    groups = optimizer.param_groups
    if len(groups) != 1:
        raise InvalidType(f"the optimizer has {len(groups)} parameter groups; a rule describes one: see rules_of")
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


def heavy_ball(momentum: float, decoupled_decay: float = 0.0) -> float:
    """Largest stable eigenvalue of P^-1/2 ∇²F P^-1/2 under momentum, ``(2 - il)(1 + mom)/(1 - mom)``.

    There -1 is an eigenvalue of the map ``b' = mom·b + (1 - mom) λw,  w' = (1 - il) w - b'``: iterates change sign.
    """
    return (2 - decoupled_decay) * (1 + momentum) / (1 - momentum)
