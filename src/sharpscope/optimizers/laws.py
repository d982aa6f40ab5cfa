"""Laws of stability of optimizers that are watched, and not descended here.

Each says by what a gradient is divided in a step, d, from what torch's optimizer keeps.  While d changes little, the
step is a heavy ball in the metric d/lr, stable on a quadratic up to [N37]

    λ1(M^-½ (∇²L + D) M^-½) = 1,      M = (2 - il)(1 + β1)/(1 - β1) d/lr,

with D the weight decay inside the gradient and il = lr·wd that outside of it (Cohen et al. 2022, arXiv 2207.14484, for
Adam without decay).  Steps of one length whatever the gradient, as those of Lion, Muon and Rprop, have no such law.

P parameters.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import PerWeight, State, UpdateRule, demand, described, heavy_ball


@dataclass(frozen=True)
class Law(PerWeight):
    """Hyper-parameters that the laws have in common: `beta1` is the momentum, zero where there is none."""

    learning_rate: float
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "eps"):
            demand(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it is not negative")
        for name, beta in (("β1", self.beta1), ("β2", self.beta2)):
            demand(0 <= beta < 1, f"{name} is {beta}; it lies in [0, 1)")
        il = self.decoupled_decay
        demand(il < 1, f"decoupled weight decay takes lr·wd = {il:g} of the weights a step; it lies in [0, 1)")

    @abstractmethod
    def divisor(self, state: State) -> Tensor:
        """Number d by which the averaged gradient of each weight is divided (P,)."""

    def metric(self, state: State) -> Tensor:
        """Metric of the criterion, ``M = bound·d/lr`` (P,) [N37]."""
        return self.bound / self.learning_rate * self.divisor(state)

    @property
    def bound(self) -> float:
        """Largest stable eigenvalue, ``(2 - il)(1 + β1)/(1 - β1)``."""
        return heavy_ball(self.beta1, self.decoupled_decay)

    @property
    def coupled_decay(self) -> float:
        return 0.0 if self.decoupled_weight_decay else self.weight_decay

    @property
    def decoupled_decay(self) -> float:
        """Fraction of the weights taken away in a step, ``lr·wd``, if decoupled."""
        return self.learning_rate * self.weight_decay if self.decoupled_weight_decay else 0.0

    def corrected(self, state: State) -> Tensor:
        """Root of the average of squares, corrected for its start at zero, ``√(v/(1 - β2^t)) + eps``."""
        return (state["v"] / (1 - self.beta2 ** state["step"])).sqrt() + self.eps

    def young(self, state: State) -> float:
        """Factor ``1 - β1^t`` by which the correction of the averaged gradient lengthens the first steps."""
        return 1 - self.beta1 ** float(state["step"])


class AMSGrad(Law):
    """Adam that divides by the largest average so far, ``d = (1 - β1^t)(√(max v/(1-β2^t)) + eps)``.

    (Reddi, Kale & Kumar 2018, arXiv 1904.09237.)  The maximum stands still between its records: its law is exact there.
    """

    entries: ClassVar[Mapping[str, str]] = {"v": "max_exp_avg_sq", "step": "step"}

    def divisor(self, state: State) -> Tensor:
        return self.young(state) * self.corrected(state)


class CenteredRMSprop(Law):
    """RMSprop that divides by the deviation of the gradient, ``d = (1 - mom)(√(v - ḡ∘ḡ) + eps)``, mom = `beta1`.

    ḡ averages the gradient as v does its square (Graves 2013, arXiv 1308.0850).
    """

    entries: ClassVar[Mapping[str, str]] = {"v": "square_avg", "mean": "grad_avg"}

    def divisor(self, state: State) -> Tensor:
        variance = (state["v"] - state["mean"].square()).clamp_min(0)
        return (1 - self.beta1) * (variance.sqrt() + self.eps)


@dataclass(frozen=True)
class NAdam(Law):
    """Adam with Nesterov's step and a momentum μ that warms up, ``μ_t = β1 (1 - ½ 0.96^(t ψ))``, ψ = `momentum_decay`.

        w ← w - lr (a g + c m)/(√v̂ + eps),      a = (1 - μ_t)/(1 - Π μ),      c = μ_{t+1}/(1 - μ_{t+1} Π μ)

    with the product over the steps so far (Dozat 2016).  Where w and m change sign, m = (1-β1)/(1+β1) g, so that
    ``M = (2 - il) d/(lr (a + c (1-β1)/(1+β1)))``; in the long run, for a = 1-β1 and c = β1, the law of `GD`'s Nesterov.
    """

    momentum_decay: float = 4e-3

    reads = torch.optim.NAdam
    entries: ClassVar[Mapping[str, str]] = {"v": "exp_avg_sq", "step": "step", "product": "mu_product"}

    def init(self, w: Tensor) -> State:
        return {"v": torch.zeros_like(w), "step": torch.zeros(()).double(), "product": torch.ones(()).double()}

    def divisor(self, state: State) -> Tensor:
        """Number by which it is divided, in units of the bound without Nesterov's step."""
        t, product = state["step"], state["product"]
        now, following = (self.beta1 * (1 - 0.5 * 0.96 ** (s * self.momentum_decay)) for s in (t, t + 1))
        a, c = (1 - now) / (1 - product), following / (1 - product * following)
        flip = (1 - self.beta1) / (1 + self.beta1)
        return self.corrected(state) * flip / (a + c * flip)


class RAdam(Law):
    """Adam with a rectified rate, ``d = (1 - β1^t)(√v + eps)/(r √(1-β2^t))``.

    While v is of too few gradients, ``d = 1 - β1^t``.

        ρ = 2/(1-β2) - 1,   ρ_t = ρ - 2t β2^t/(1-β2^t),   r² = (ρ_t-4)(ρ_t-2) ρ/((ρ-4)(ρ-2) ρ_t)   from ρ_t > 5 on

    (Liu et al. 2020, arXiv 1908.03265.)
    """

    reads = torch.optim.RAdam
    entries: ClassVar[Mapping[str, str]] = {"v": "exp_avg_sq", "step": "step"}

    def divisor(self, state: State) -> Tensor:
        t, v = state["step"].item(), state["v"]
        longest, debt = 2 / (1 - self.beta2) - 1, 1 - self.beta2**t
        length = longest - 2 * t * (1 - debt) / debt
        if length <= 5:
            return torch.full_like(v, self.young(state))
        square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return self.young(state) * (v.sqrt() + self.eps) / (square * debt) ** 0.5


@dataclass(frozen=True)
class Adagrad(Law):
    """Gradients divided by the root of the sum of their squares, ``d = (√Σ g∘g + eps)(1 + (t-1) lr_decay)``.

    (Duchi, Hazan & Singer 2011.)
    """

    lr_decay: float = 0.0

    reads = torch.optim.Adagrad
    entries: ClassVar[Mapping[str, str]] = {"v": "sum", "step": "step"}

    def divisor(self, state: State) -> Tensor:
        later = (state["step"] - 1).clamp_min(0)
        return (state["v"].sqrt() + self.eps) * (1 + later * self.lr_decay)


class Adadelta(Law):
    """Gradients times the root mean square of recent steps, over their own, ``d = √(v + eps)/√(u + eps)``.

    u averages the squares of the steps as v does those of the gradients (Zeiler 2012, arXiv 1212.5701).
    """

    reads = torch.optim.Adadelta
    entries: ClassVar[Mapping[str, str]] = {"v": "square_avg", "u": "acc_delta"}

    def divisor(self, state: State) -> Tensor:
        return ((state["v"] + self.eps) / (state["u"] + self.eps)).sqrt()


class Adamax(Law):
    """Adam that divides by the largest of recent gradients, ``d = (1 - β1^t) u``, ``u ← max(β2 u, |g| + eps)``.

    (Kingma & Ba 2015, section 7.1.)
    """

    reads = torch.optim.Adamax
    entries: ClassVar[Mapping[str, str]] = {"v": "exp_inf", "step": "step"}

    def divisor(self, state: State) -> Tensor:
        return self.young(state) * state["v"]


@dataclass(frozen=True)
class Adafactor(Law):
    """Gradients over the root of an average of squares kept by rows and columns, in steps relative to the weights.

        w ← (1 - lr·wd) w - α g/√V,      α = min(lr, 1/√t) max(`least`, rms(w)),      V = r cᵀ/mean(r) for a matrix

    so that ``d = lr √V/α`` (Shazeer & Stern 2018, arXiv 1804.04235, as torch does it).  Updates whose root mean square
    exceeds `d` of torch's optimizer are shortened to it, and then stable at larger ratios than one.
    """

    least: float = 1e-3
    floor: float | None = None  # of the root of an average; None is the eps of the weights' precision

    reads = torch.optim.Adafactor
    entries: ClassVar[Mapping[str, str]] = {"v": "variance", "scale": "scale"}

    def kept(self, entry: Mapping[str, Any], parameter: Tensor) -> Mapping[str, Any]:
        """Multiply the averages of rows and columns, and measure the weights."""
        if not entry:
            return {}
        floor = torch.finfo(parameter.dtype).eps if self.floor is None else self.floor
        rows, columns = entry.get("row_var"), entry.get("col_var")
        v = entry["variance"] if rows is None else rows @ columns / rows.mean(-2, keepdim=True).clamp_min(floor)
        size = max(self.least, parameter.detach().square().mean().sqrt().item())
        scale = size * min(1.0, 1 / (self.learning_rate * float(entry["step"]) ** 0.5))
        return {"v": v.clamp_min(floor**2), "scale": torch.full_like(v, scale)}

    def divisor(self, state: State) -> Tensor:
        return state["v"].sqrt() / state["scale"]

    @classmethod
    def read(cls, optimizer: Optimizer) -> "Adafactor":
        group = described(optimizer)
        floor, least = group["eps"]
        return cls(float(group["lr"]), float(group["weight_decay"]), True, least=least, floor=floor)


@dataclass(frozen=True)
class ASGD(UpdateRule):
    """Gradient descent at a falling rate, ``w ← (1 - λη) w - η (g + wd·w)``, ``η = lr/(1 + λ lr t)^α``, λ = `lambd`.

    On a quadratic it is `GD` at the rate η with weight decay λ + wd; the average of the weights that it keeps does not
    enter (Polyak & Juditsky 1992).
    """

    learning_rate: float
    weight_decay: float = 0.0
    lambd: float = 1e-4
    alpha: float = 0.75

    reads = torch.optim.ASGD
    entries: ClassVar[Mapping[str, str]] = {"step": "step"}

    def __post_init__(self) -> None:
        demand(self.learning_rate > 0, f"the learning rate is {self.learning_rate}; it must be positive")

    @property
    def coupled_decay(self) -> float:
        """Weight decay of both kinds, ``λ + wd``."""
        return self.lambd + self.weight_decay

    def threshold(self, state: State) -> float:
        """Largest stable eigenvalue of ``∇²L(w)``, ``2/η - λ - wd``."""
        rate = self.learning_rate / (1 + self.lambd * self.learning_rate * state["step"].item()) ** self.alpha
        return 2 / rate - self.coupled_decay
