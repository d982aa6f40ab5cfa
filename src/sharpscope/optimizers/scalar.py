"""RMSprop with one scalar second moment, in the plane and on the sphere."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..symmetry import sphere
from .base import State, UpdateRule, demand
from .gd import GD


@dataclass(frozen=True)
class ScalarRMSprop(UpdateRule):
    """Gradient descent with one adaptive rate for all weights, from the mean square of the whole gradient [N30].

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

    def init(self, w: Tensor) -> State:
        return {"v": (self.base_rate / self.first_rate) ** 2 * torch.ones_like(w[0])}

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        v = self.decay * state["v"] + (1 - self.decay) * (g @ g)
        return w - self.base_rate / (v if self.update_first else state["v"]).sqrt() * g, {"v": v}

    def preconditioner(self, state: State) -> Tensor:
        """Preconditioner as one number, ``√v/η``."""
        return state["v"].sqrt() / self.base_rate

    def averages(self, state: State) -> State:
        return {"v": state["v"]}

    def relax(self, averages: State, square: Tensor) -> State:
        """Change of the average per step, ``(1 - β)(⟨‖g‖²⟩ - v)``."""
        return {"v": (1 - self.decay) * (square.sum() - averages["v"])}

    def threshold(self, state: State) -> float:
        """Largest stable eigenvalue of ``∇²L(w)``, ``2 √v/η``."""
        return 2 * state["v"].sqrt().item() / self.base_rate


@dataclass(frozen=True)
class SphericalRMSprop(UpdateRule):
    """Gradient descent on the unit sphere with one adaptive rate for all weights [N11].

        θ ← Π(θ - (η/√v) ∇L(θ)),      v ← β v + (1-β) ‖∇L(θ)‖²

    in this order, or with the updated v in the step if `update_first`.  With β = (1 - lr wd)⁴ and η² = (1-β)/(2β) it is
    the motion that gradient descent with weight decay gives to the direction of scale-invariant weights, up to a term
    of higher order; with that term, ``v ← β v (1 + (η²/v) ‖∇L(θ)‖²)²``, it is the same if `exact`.  Starts at v₀ =
    (η/`first_rate`)².
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
        """Choose the constants that mimic `rule` on weights that start at norm `radius`."""
        eta, beta = sphere.rmsprop_constants(rule.learning_rate, rule.weight_decay)
        return cls(eta, beta, sphere.effective_learning_rate(rule.learning_rate, rule.weight_decay, radius))

    @property
    def constant(self) -> float:
        """Constant C of ``β = 1 - C η²``; about 2 for rules that mimic weight decay."""
        return (1 - self.decay) / self.base_rate**2

    @property
    def intrinsic_time_per_step(self) -> float:
        """Intrinsic rate of the gradient descent that this rule mimics, ``(1 - β)/4``."""
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
        """Largest stable eigenvalue for weights of unit norm, ``2 √v/η``."""
        return 2 * state["v"].sqrt().item() / self.base_rate

    def effective_learning_rate(self, radius: float, state: State) -> float:
        return self.base_rate / state["v"].sqrt().item()


def _check_average(base_rate: float, decay: float, first_rate: float) -> None:
    demand(base_rate > 0 and first_rate > 0, f"rates must be positive; got {base_rate} and {first_rate}")
    demand(0 < decay < 1, f"the decay β is {decay}; it lies in (0, 1)")
