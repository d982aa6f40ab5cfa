"""Rules with a learning rate for every weight, set by the mean square of its gradient: RMSprop, Adam, AdamW.

Their steps are those of torch's optimizers.  No single threshold on ∇²L decides when they are stable; the eigenvalues
of P^-1/2 ∇²F P^-1/2 do, with P their preconditioner of the moment (Cohen et al. 2022, arXiv 2207.14484).

P parameters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import Number, PerWeight, State, UpdateRule, demand, described, heavy_ball
from .laws import AMSGrad, CenteredRMSprop


@dataclass(frozen=True)
class RMSprop(PerWeight):
    """Gradient descent with a learning rate for every weight, from the mean square of its gradient [N28].

        v ← β v + (1-β) g∘g,      b ← mom·b + g/(√v + eps),      w ← w - lr·b

    with g = ∇L(w) + wd·w.  v starts at zero, as in torch (Tieleman & Hinton 2012).  While v changes little it is heavy
    ball in the metric P = diag(1-mom)(√v + eps)/lr, stable up to 2 (1 + mom)/(1 - mom).
    """

    learning_rate: float
    decay: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0

    reads = torch.optim.RMSprop
    entries: ClassVar[Mapping[str, str]] = {"v": "square_avg", "momentum": "momentum_buffer"}

    def __post_init__(self) -> None:
        _check(self.learning_rate, self.eps, self.weight_decay)
        demand(0 <= self.decay < 1, f"the decay β is {self.decay}; it lies in [0, 1)")
        demand(0 <= self.momentum < 1, f"momentum is {self.momentum}; it lies in [0, 1)")

    @property
    def bound(self) -> float:
        """Largest stable eigenvalue, ``2 (1 + mom)/(1 - mom)``."""
        return heavy_ball(self.momentum)

    @property
    def coupled_decay(self) -> float:
        return self.weight_decay

    def init(self, w: Tensor) -> State:
        return {name: torch.zeros_like(w) for name in (("v", "momentum") if self.momentum else ("v",))}

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        return self.step_with(w, g, state, learning_rate=self.learning_rate, weight_decay=self.weight_decay)

    def step_with(
        self, w: Tensor, g: Tensor, state: State, *, learning_rate: Number, weight_decay: Number
    ) -> tuple[Tensor, State]:
        g = g + weight_decay * w
        v = self.decay * state["v"] + (1 - self.decay) * g.square()
        b = g / (v.sqrt() + self.eps)
        if not self.momentum:
            return w - learning_rate * b, {"v": v}
        b = self.momentum * state["momentum"] + b
        return w - learning_rate * b, {"v": v, "momentum": b}

    def preconditioner(self, state: State) -> Tensor:
        """Diagonal of the preconditioner, ``(1 - mom)(√v + eps)/lr`` (P,)."""
        return (1 - self.momentum) * (_with_gradient(state["v"]).sqrt() + self.eps) / self.learning_rate

    def averages(self, state: State) -> State:
        return {"v": state["v"]}

    def relax(self, averages: State, square: Tensor) -> State:
        """Change of the average per step, ``(1 - β)(⟨g∘g⟩ - v)``."""
        return {"v": (1 - self.decay) * (square - averages["v"])}

    @classmethod
    def read(cls, optimizer: Optimizer) -> UpdateRule:
        group = described(optimizer)
        lr, decay, eps, wd, mom = (float(group[name]) for name in ("lr", "alpha", "eps", "weight_decay", "momentum"))
        if group["centered"]:
            return CenteredRMSprop(lr, wd, beta1=mom, beta2=decay, eps=eps)
        return cls(lr, decay, eps, wd, mom)


@dataclass(frozen=True)
class Adam(PerWeight):
    """Steps along an averaged gradient, with a learning rate for every weight; AdamW if `decoupled` [N29].

        m ← β1 m + (1-β1) g,     v ← β2 v + (1-β2) g∘g,     w ← w - lr m̂/(√v̂ + eps),
        m̂ = m/(1-β1^t),          v̂ = v/(1-β2^t)            at step t = 1, 2, ..

    (Kingma & Ba 2015); m̂ and v̂ are corrected for their start at zero.  Here g = ∇L(w) + wd·w or, if `decoupled`
    (Loshchilov & Hutter 2019), g = ∇L(w) and w ← (1 - lr·wd) w before the step.  In the metric P = diag(√v̂ + eps)/lr
    the first average is a heavy ball, stable up to ``(1 - β1^t)(2 - il)(1 + β1)/(1 - β1)``, il = lr·wd if decoupled,
    else 0 (Cohen et al. 2022, arXiv 2207.14484, for il = 0).
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    reads = (torch.optim.Adam, torch.optim.AdamW)
    entries: ClassVar[Mapping[str, str]] = {"v": "exp_avg_sq", "momentum": "exp_avg", "step": "step"}

    def __post_init__(self) -> None:
        _check(self.learning_rate, self.eps, self.weight_decay)
        for name, beta in (("β1", self.beta1), ("β2", self.beta2)):
            demand(0 <= beta < 1, f"{name} is {beta}; it lies in [0, 1)")
        il = self.decoupled_decay
        demand(il < 1, f"decoupled weight decay takes lr·wd = {il:g} of the weights a step; it lies in [0, 1)")

    @property
    def bound(self) -> float:
        """Largest stable eigenvalue, ``(2 - il)(1 + β1)/(1 - β1)``."""
        return heavy_ball(self.beta1, self.decoupled_decay)

    @property
    def coupled_decay(self) -> float:
        return 0.0 if self.decoupled else self.weight_decay

    @property
    def equilibrium(self) -> float:
        """Angle per step of settled weights, ``√(2 il (1 - β1)/(1 + β1))`` if decoupled; else not known."""
        if self.coupled_decay:
            return math.nan
        return math.sqrt(2 * self.decoupled_decay * (1 - self.beta1) / (1 + self.beta1))

    @property
    def decoupled_decay(self) -> float:
        """Fraction of the weights taken away in a step, ``lr·wd``, if decoupled."""
        return self.learning_rate * self.weight_decay if self.decoupled else 0.0

    def step(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        return self.step_with(w, g, state, learning_rate=self.learning_rate, weight_decay=self.weight_decay)

    def step_with(
        self, w: Tensor, g: Tensor, state: State, *, learning_rate: Number, weight_decay: Number
    ) -> tuple[Tensor, State]:
        coupled, decoupled = (0.0, learning_rate * weight_decay) if self.decoupled else (weight_decay, 0.0)
        g = g + coupled * w
        m = self.beta1 * state["momentum"] + (1 - self.beta1) * g
        v = self.beta2 * state["v"] + (1 - self.beta2) * g.square()
        t = state["step"] + 1
        move = m / (1 - self.beta1**t) / self._root(v, t)
        return (1 - decoupled) * w - learning_rate * move, {"momentum": m, "v": v, "step": t}

    def _root(self, v: Tensor, t: Tensor) -> Tensor:
        """Square root of the corrected average, ``√v̂ + eps``."""
        return (v / (1 - self.beta2**t)).sqrt() + self.eps

    def preconditioner(self, state: State) -> Tensor:
        """Diagonal of the preconditioner, ``(√v̂ + eps)/lr`` (P,); m̂ counts as the gradient."""
        return self._root(_with_gradient(state["v"]), state["step"]) / self.learning_rate

    def metric(self, state: State) -> Tensor:
        """Metric of its criterion, ``(1 - β1^t) bound·P`` (P,): the correction of m lengthens the first steps."""
        return (1 - self.beta1 ** state["step"].item()) * self.bound * self.preconditioner(state)

    def averages(self, state: State) -> State:
        return {"v": state["v"], "step": state["step"]}

    def relax(self, averages: State, square: Tensor) -> State:
        """Change of the averages per step, ``(1 - β2)(⟨g∘g⟩ - v)``, and 1 for the step count."""
        v, t = averages["v"], averages["step"]
        return {"v": (1 - self.beta2) * (square - v), "step": torch.ones_like(t)}

    @classmethod
    def read(cls, optimizer: Optimizer) -> UpdateRule:
        group = described(optimizer)
        decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
        lr, eps, wd = (float(group[name]) for name in ("lr", "eps", "weight_decay"))
        beta1, beta2 = map(float, group["betas"])
        if group["amsgrad"]:
            return AMSGrad(lr, wd, decoupled, beta1, beta2, eps)
        return cls(lr, beta1, beta2, eps=eps, weight_decay=wd, decoupled=decoupled)


def _check(learning_rate: float, eps: float, weight_decay: float) -> None:
    demand(0 < learning_rate < math.inf, f"the learning rate is {learning_rate}; it must be positive")
    demand(eps >= 0 and weight_decay >= 0, f"eps is {eps} and weight decay {weight_decay}; neither is negative")


def _with_gradient(v: Tensor) -> Tensor:
    """Return v; raise InvalidValue where no gradient has gone into it."""
    demand(bool(v.any()), "no gradient has been averaged yet, so the steps have no length; take a step before")
    return v
