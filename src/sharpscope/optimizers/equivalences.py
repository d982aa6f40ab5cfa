"""Other rules that turn scale-invariant weights exactly as gradient descent with weight decay does.

With L(c w) = L(w) for every c > 0, w ← (1 - il) w - lr ∇L(w) and il = lr·wd, the direction θ = w/‖w‖ moves by [N31]

    θ ← Π(θ - η̃ ∇L(θ)),      η̃ = lr/((1 - il) ‖w‖²),      η̃ ← η̃ / ((1 - il)² (1 + η̃² ‖∇L(θ)‖²)).

So weight decay is projected descent whose rate is read off a run (`as_projected`) or follows its own average of squares
(`as_rmsprop`: v = η²/η̃²); or descent without weight decay, at a growing rate (`as_exponential`).  Of weights and rates
only il and ‖w‖²/lr count (`rescaled`).

Each function takes a rule and the weights it starts from, and returns another rule with its start.  The two agree but
for rounding, which runs above the edge of stability amplify.

P parameters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InvalidType, InvalidValue
from ..symmetry import sphere
from .base import State, UpdateRule, demand, require_rule
from .gd import GD
from .scalar import SphericalRMSprop


@dataclass(frozen=True)
class ProjectedGD(UpdateRule):
    """Gradient descent on the unit sphere by a schedule of rates: ``θ ← Π(θ - η̃_t ∇L(θ))``, η̃_t = `schedule` (t) [N31].

    >>> rule = ProjectedGD(lambda t: 0.1 / (1 + t))
    >>> w = torch.tensor([0.6, 0.8])
    >>> w, state = rule.step(w, torch.tensor([8.0, -6.0]), rule.init(w))
    >>> round(w.norm().item(), 6), rule.threshold(state)
    (1.0, 40.0)
    """

    schedule: Callable[[int], float]

    def rate(self, state: State) -> float:
        """Rate η̃_t of the next step."""
        t = int(state["step"])
        rate = self.schedule(t)
        demand(0 <= rate < math.inf, f"the schedule says {rate} at step {t}; a rate is finite and not negative")
        return rate

    def init(self, w: Tensor) -> State:
        return {"step": torch.zeros((), dtype=torch.float64)}

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        r = w.norm()
        theta, g = w / r, g * r
        return sphere.direction(theta - self.rate(state) * g), {"step": state["step"] + 1}

    def threshold(self, state: State) -> float:
        """Largest stable eigenvalue for weights of unit norm, ``2/η̃_t``."""
        rate = self.rate(state)
        return self.edge / rate if rate else math.inf

    def effective_learning_rate(self, radius: float, state: State) -> float:
        return self.rate(state)


@dataclass(frozen=True)
class ExponentialRate(UpdateRule):
    """Gradient descent at a growing rate: ``w ← w - lr (1-il)^(-2t-1) ∇L(w)`` at step t = 0, 1, .. [N31].

    It turns scale-invariant weights as weight decay does (Li & Arora 2020, arXiv 1910.07454).
    """

    learning_rate: float
    intrinsic_rate: float

    def __post_init__(self) -> None:
        demand(0 < self.learning_rate < math.inf, f"the learning rate is {self.learning_rate}; it must be positive")
        demand(0 <= self.intrinsic_rate < 1, f"the intrinsic rate is {self.intrinsic_rate}; it lies in [0, 1)")

    def rate(self, state: State) -> float:
        """Learning rate of the next step, ``lr (1-il)^(-2t-1)``."""
        return self.learning_rate * (1 - self.intrinsic_rate) ** -(2 * state["step"].item() + 1)

    @property
    def intrinsic_time_per_step(self) -> float:
        """Time τ per step, il, as of the weight decay that it replaces."""
        return self.intrinsic_rate

    def init(self, w: Tensor) -> State:
        return {"step": torch.zeros((), dtype=torch.float64)}

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        return w - self.rate(state) * g, {"step": state["step"] + 1}

    def threshold(self, state: State) -> float:
        """Largest stable eigenvalue of ``∇²L(w)``, ``2/lr_t``."""
        return self.edge / self.rate(state)

    def preconditioner(self, state: State) -> Tensor:
        """Preconditioner as one number, ``1/lr_t``."""
        return torch.tensor(1 / self.rate(state), dtype=torch.float64)

    def averages(self, state: State) -> State:
        return state

    def relax(self, averages: State, square: Tensor) -> State:
        return {"step": torch.ones_like(averages["step"])}


def as_projected(rule: GD, w: Tensor, radii: Sequence[float]) -> tuple[ProjectedGD, Tensor]:
    """Projected descent that follows a run of `rule` from w, ``η̃_t = lr/((1 - il) ‖w_t‖²)`` by its norms `radii` [N31].

    (Theory: Lyu, Li & Arora 2022, arXiv 2206.07085.)
    """
    _check_plain(rule)
    demand(len(radii) > 0, "a schedule needs the norms ‖w_t‖ of a run: none were given")
    rates = [sphere.effective_learning_rate(rule.learning_rate, rule.weight_decay, r) for r in radii]

    def recorded(t: int) -> float:
        demand(t < len(rates), f"the norms of {len(rates)} steps were recorded; there is no rate for step {t}")
        return rates[t]

    return ProjectedGD(recorded), sphere.direction(w)


def as_rmsprop(rule: GD, w: Tensor) -> tuple[SphericalRMSprop, Tensor]:
    """Adaptive descent on the sphere that turns weights as `rule` does from w [N9] [N31].

    ``v ← β v (1 + η̃² ‖∇L(θ)‖²)²``, η̃ = η/√v, with β = (1-il)⁴, η² = (1-β)/(2β).  It is scalar RMSprop and a term of
    higher order, ``β η⁴ ‖∇L(θ)‖⁴/v`` (Lyu, Li & Arora 2022, arXiv 2206.07085).
    """
    _check_plain(rule)
    demand(rule.weight_decay > 0, "without weight decay the average of squares never forgets: it is no RMSprop")
    return replace(SphericalRMSprop.like(rule, w.norm().item()), exact=True), sphere.direction(w)


def as_exponential(rule: GD, w: Tensor) -> tuple[ExponentialRate, Tensor]:
    """Descent without weight decay that turns weights as `rule` does from w, at a growing rate [N31].

    ``lr_t = lr (1-il)^(-2t-1)``: weights (1-il)^-t times as large (Li & Arora 2020, arXiv 1910.07454).
    """
    _check_plain(rule)
    return ExponentialRate(rule.learning_rate, rule.intrinsic_rate), w


def as_decayed(rule: SphericalRMSprop | ExponentialRate, w: Tensor) -> tuple[GD, Tensor]:
    """Gradient descent with weight decay that turns weights as `rule` does from w [N31].

    ``il = 1 - β^¼``, ``lr = (1-il) η̃₀ ‖w‖²``.  The inverse of `as_rmsprop`, whose w has unit norm, and of
    `as_exponential`.
    """
    _require(rule, SphericalRMSprop, ExponentialRate)
    if isinstance(rule, ExponentialRate):
        return GD(rule.learning_rate, rule.intrinsic_rate / rule.learning_rate), w
    demand(rule.exact, "without exact=True this rule is weight decay only up to a term of higher order")
    il = -math.expm1(math.log(rule.decay) / 4)
    lr = (1 - il) * rule.first_rate * (w @ w).item()
    return GD(lr, il / lr), w


def rescaled(rule: GD, w: Tensor, c: float) -> tuple[GD, Tensor]:
    """Rescale weights, learning rate and weight decay together, ``(w, lr, wd) → (c w, c² lr, wd/c²)``.

    Every later w is c times as large; exact in binary if c is a power of two.  Holds with momentum too.  In the middle
    of a run the momentum buffer is to be divided by c.

    >>> rescaled(GD(0.5, 0.25), torch.tensor([3.0, 4.0]), 2.0)
    (GD(learning_rate=2.0, weight_decay=0.0625, momentum=0.0, nesterov=False, dampening=0.0), tensor([6., 8.]))
    """
    _require(rule, GD)
    demand(0 < c < math.inf, f"weights are rescaled by c = {c}; it must be positive")
    return replace(rule, learning_rate=c**2 * rule.learning_rate, weight_decay=rule.weight_decay / c**2), c * w


def _check_plain(rule: GD) -> None:
    _require(rule, GD)
    if rule.momentum:
        raise InvalidValue(f"momentum is {rule.momentum}: only plain gradient descent has this equivalent")


def _require(rule: object, *kinds: type[UpdateRule]) -> None:
    require_rule(rule)
    if not isinstance(rule, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise InvalidType(f"this {type(rule).__name__} has no such equivalent; pass a rule of the kind {names}")
