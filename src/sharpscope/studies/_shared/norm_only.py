"""Weight decay that changes the norm of the weights, and nothing else that a scale-invariant loss notices.

With w = c v and ``∇L(w) = ∇L(v)/c``, a step of gradient descent with weight decay at the rate η' is

    w - η' (∇L(w) + wd w) = c (1 - η' wd) [v - η'/(c² (1 - η' wd)) ∇L(v)]

so that ``η' = η c²/(1 + η c² wd)`` moves v as gradient descent at the rate η without weight decay does, while c shrinks
by ``1 - η' wd``.
"""

from dataclasses import dataclass

from torch import Tensor

from ...optimizers.base import State, UpdateRule


@dataclass(frozen=True)
class NormOnly(UpdateRule):
    """Gradient descent with weight decay at the effective learning rates of a run without it.

    The rate of a step is chosen so that the direction of scale-invariant weights is that of gradient descent at
    `learning_rate` without weight decay.
    """

    learning_rate: float
    weight_decay: float

    def init(self, w: Tensor) -> State:
        return {"scale": w.new_ones(())}

    def _rate(self, state: State) -> Tensor:
        """Learning rate of the next step."""
        rate = self.learning_rate * state["scale"] ** 2
        return rate / (1 + rate * self.weight_decay)

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        rate = self._rate(state)
        kept = 1 - rate * self.weight_decay
        return kept * w - rate * g, {"scale": kept * state["scale"]}

    def threshold(self, state: State) -> float:
        """Largest stable eigenvalue of ``∇²L(w)``, ``2/(η c²)``: weights that shrink do not count as motion."""
        return 2 / (self.learning_rate * state["scale"].item() ** 2)

    def effective_learning_rate(self, radius: float, state: State) -> float:
        return self.learning_rate * state["scale"].item() ** 2 / radius**2

    @property
    def edge(self) -> float:
        return 2.0

    @property
    def intrinsic_time_per_step(self) -> float:
        return 0.0
