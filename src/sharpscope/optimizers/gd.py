"""Gradient descent with momentum and weight decay as an update rule."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..symmetry import sphere
from .base import Number, State, UpdateRule, demand


@dataclass(frozen=True)
class GD(UpdateRule):
    """Gradient descent with weight decay and momentum, as torch's SGD does it [N10].

        b ← mom·b + (1-d) g,  g = ∇L(w) + wd·w,      w ← w - lr·b,  or  w ← w - lr (g + mom·b)  if `nesterov`

    with dampening d, which spares the first step.  On a quadratic of curvature λ it is stable up to
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
        max_decay = 1 / self.learning_rate
        sentence = f"weight decay is {self.weight_decay}; it lies in [0, 1/lr) = [0, {max_decay:g})"
        demand(0 <= self.weight_decay < max_decay, sentence)
        demand(0 <= self.momentum < 1, f"momentum is {self.momentum}; it lies in [0, 1)")
        demand(0 <= self.dampening < 1, f"dampening is {self.dampening}; it lies in [0, 1)")
        plain = not self.nesterov or (self.momentum > 0 and self.dampening == 0)
        demand(plain, "Nesterov's step needs momentum and no dampening")

    @property
    def intrinsic_rate(self) -> float:
        """Rate per step at which weight decay shrinks a weight, ``lr·wd``."""
        return self.learning_rate * self.weight_decay

    @property
    def _undamped(self) -> float:
        """Fraction of a gradient that enters the buffer."""
        return 1 - self.dampening if self.momentum else 1.0

    @property
    def edge(self) -> float:
        """Value at the edge, ``2 (1 + mom)/(1 - d)``, or ``2 (1 + mom)/(1 + 2 mom)`` with Nesterov's step."""
        return 2 * (1 + self.momentum) / (1 + 2 * self.momentum if self.nesterov else self._undamped)

    @property
    def intrinsic_time_per_step(self) -> float:
        """Time τ per step, ``(1 - d) lr·wd/(1 - mom)``."""
        return self._undamped * self.intrinsic_rate / (1 - self.momentum)

    def preconditioner(self, state: State) -> Tensor:
        """Preconditioner as one number, ``(1 - mom)/((1 - d) lr)``."""
        return torch.tensor((1 - self.momentum) / (self._undamped * self.learning_rate), dtype=torch.float64)

    @property
    def bound(self) -> float:
        """Largest stable eigenvalue, ``(1 - d)/(1 - mom)`` times the `edge`."""
        return self._undamped * self.edge / (1 - self.momentum)

    @property
    def equilibrium(self) -> float:
        """Angle per step of settled weights, ``√(2 (1 - d) lr·wd/(1 + mom))``; not known for Nesterov's step."""
        return math.nan if self.nesterov else math.sqrt(2 * self._undamped * self.intrinsic_rate / (1 + self.momentum))

    @property
    def coupled_decay(self) -> float:
        return self.weight_decay

    def init(self, w: Tensor) -> State:
        return {"momentum": torch.zeros_like(w)} if self.momentum else {}

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        return self.step_with(w, g, state, learning_rate=self.learning_rate, weight_decay=self.weight_decay)

    def step_with(
        self, w: Tensor, g: Tensor, state: State, *, learning_rate: Number, weight_decay: Number
    ) -> tuple[Tensor, State]:
        if not self.momentum:
            return (1 - learning_rate * weight_decay) * w - learning_rate * g, state
        g, b = g + weight_decay * w, state["momentum"]
        b = self.momentum * b + (self._undamped if self.dampening and bool(b.any()) else 1.0) * g
        return w - learning_rate * (g + self.momentum * b if self.nesterov else b), {"momentum": b}

    def threshold(self, state: State) -> float:
        """Largest stable eigenvalue of ``∇²L(w)``, ``edge/lr - wd``."""
        return self.edge / self.learning_rate - self.weight_decay

    def effective_learning_rate(self, radius: float, state: State) -> float:
        return sphere.effective_learning_rate(self.learning_rate, self.weight_decay, radius)
