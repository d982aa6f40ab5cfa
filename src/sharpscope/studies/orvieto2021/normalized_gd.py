"""Normalized gradient descent, an update rule that only this study needs."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ...errors import InvalidType
from ...optimizers.base import Number, State, UpdateRule


@dataclass(frozen=True)
class NormalizedGD(UpdateRule):
    """Steps of one length whatever that of the gradient, ``w ← w - lr ∇L/‖∇L‖``, for one run or rows of them."""

    learning_rate: float

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        return self.step_with(w, g, state, learning_rate=self.learning_rate, weight_decay=0.0)

    def step_with(
        self, w: Tensor, g: Tensor, state: State, *, learning_rate: Number, weight_decay: Number
    ) -> tuple[Tensor, State]:
        size = g.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
        return w - learning_rate * g / size, state

    def threshold(self, state: State) -> NoReturn:
        raise InvalidType("NormalizedGD has no threshold: near a minimum it oscillates whatever the curvature")

    def effective_learning_rate(self, radius: float, state: State) -> float:
        return self.learning_rate / radius

    @property
    def edge(self) -> NoReturn:
        raise InvalidType("NormalizedGD has no edge of stability")
