"""Flows: the average motion of an optimizer, in continuous time.

One unit of time t is one step of the optimizer.  With F = L + (a/2)‖w‖² (a the coupled weight decay), P the rule's
preconditioner and c the bound on the eigenvalues of P^-1/2 ∇²F P^-1/2 below which the rule is stable,

    stable flow     dw/dt = -P⁻¹ ∇F(w)
    central flow    dw/dt = -P⁻¹ (∇F(w) + ½ ∇⟨Σ, ∇²F(w)⟩),     Σ = U X Uᵀ ⪰ 0

where Σ is the covariance of the oscillation along the modes U at the edge, the least one that keeps their curvature
from passing the bound (Cohen et al. 2025, arXiv 2410.24206).  With ``U`` the k modes nearest to the edge, UᵀPU = I,
``C = Uᵀ∇²F U`` and ``G_ij = ∇(u_iᵀ∇²F u_j)``, a step of length dt changes C by ``-dt (A + B X)``,

    A_ij = ⟨G_ij, P⁻¹∇F⟩,     B_ij,lm = ½⟨G_ij, P⁻¹ G_lm⟩,

so X solves  X ⪰ 0,  c I - C + dt (A + B X) ⪰ 0,  ⟨X, ·⟩ = 0  [N25].  The slack ``c I - C`` lets modes enter and leave.
A P that changes (RMSprop, Adam) adds its own rate to A and B.

P parameters, k modes, m = k (k + 1)/2 pairs of them.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..autodiff import third_order
from ..autodiff.curvature import hessian
from ..autodiff.objective import Objective, require_objective
from ..errors import InvalidValue
from ..linalg import complementarity
from ..linalg.memory import Memory
from ..linalg.operators import SymmetricOperator, preconditioned, scaled, shifted
from ..linalg.warm_start import warm_started
from ..optimizers.base import State, UpdateRule, require_rule
from ..optimizers.gd import GD

MAX_MODES = 20
"""Number of modes that are kept at the edge together, at most."""


@dataclass(frozen=True)
class Motion:
    """Motion of a flow at one point, and the oscillation that it averages over."""

    velocity: Tensor  # dw/dt, (P,)
    average_rates: State  # d/dt of the averages in the rule's state
    curvatures: Tensor  # C (k, k): of the modes near the edge, in units in which the bound is c
    covariance: Tensor  # X (k, k) of the oscillation along them
    modes: Tensor  # U (P, k)
    loss: float  # L averaged over the oscillation, L(w) + ½⟨Σ, ∇²L⟩
    point_loss: float  # L(w)

    @cached_property
    def variances(self) -> Tensor:
        """Mean squared amplitudes of the oscillation, the eigenvalues of ``Σ = U X Uᵀ`` (k,), ascending."""
        U, X = self.modes, self.covariance
        if not len(X):
            return X.new_zeros(0)
        values, Q = torch.linalg.eigh(U.T @ U)
        root = Q * values.clamp_min(0).sqrt()
        return torch.linalg.eigvalsh(root.T @ X @ root)


@dataclass(frozen=True)
class Flow:
    """The central flow of a rule; without `band`, its stable flow.

    Modes with curvature above ``(1 - band) c`` take part, the `MAX_MODES` largest of them.  `third_derivatives` is the
    method for their G_ij: autograd, unless `verified` chose another.
    """

    objective: Objective
    rule: UpdateRule
    band: float | None = 0.1
    third_derivatives: third_order.Slopes | None = None

    def __post_init__(self) -> None:
        require_objective(self.objective)
        require_rule(self.rule)

    def verified(self, w: Tensor) -> "Flow":
        """Choose the method for third derivatives by a check along ``∇²L ∇²L ∇L(w)``.

        Raises:
            WrongThirdDerivative: none can be trusted.
        """
        if self.band is None or self.third_derivatives is not None:
            return self
        at = self.objective.at(w)
        u = at.hvp(at.hvp(at.grad))
        if not u.norm() > 0:
            u = torch.ones_like(w)
        return replace(self, third_derivatives=third_order.checked(self.objective, w, u))

    def local(self, w: Tensor, averages: State, memory: Memory | None = None, seed: int = 0) -> "LocalModel":
        """Model the flow around w, with its modes tracked from `memory`."""
        inverse = self.inverse(w, averages)
        a, shift = self.curvature(w, inverse)
        above = None if self.band is None else (1 - self.band) * self.rule.bound - shift
        found = warm_started(a, memory, 1, above=above, seed=seed)
        local = self.around(w, inverse, found.values + shift, found.vectors)
        return replace(local, memory=found.memory, cost=local.cost + found.num_gradients)

    def inverse(self, w: Tensor, averages: State) -> Tensor:
        """Diagonal of P⁻¹, one number or ``(P,)``."""
        return 1 / torch.as_tensor(self.rule.preconditioner(averages)).to(w)

    def curvature(self, w: Tensor, inverse: Tensor) -> tuple[SymmetricOperator, float]:
        """Curvature in the metric of the rule, ``P^-1/2 ∇²F P^-1/2``, as the sum of an operator and a number."""
        h, decay = hessian(self.objective, w), self.rule.coupled_decay
        if inverse.dim() == 0:
            return scaled(h, inverse.item()), decay * inverse.item()
        return preconditioned(shifted(h, decay), 1 / inverse), 0.0

    def around(self, w: Tensor, inverse: Tensor, values: Tensor, vectors: Tensor) -> "LocalModel":
        """Model the flow around w, given eigenpairs of ``P^-1/2 ∇²F P^-1/2``; those in the band are its modes."""
        k = 0 if self.band is None else min(int((values >= (1 - self.band) * self.rule.bound).sum()), MAX_MODES)
        U = vectors[:, :k] * column(inverse.sqrt())
        third_derivatives = self.third_derivatives or third_order.by_autograd
        G = third_derivatives(self.objective, w, U) if k else w.new_zeros(0, len(w))
        return LocalModel(
            flow=self,
            w0=w,
            inverse=inverse,
            modes=U,
            curvatures=torch.diag(values[:k]),
            curvature_gradients=G,
            largest=values[0].item(),
            memory=None,
            cost=2.0 * len(G),
        )


def column(x: Tensor) -> Tensor:
    """Shape x so that it multiplies columns: a number as it is, ``(P,)`` as ``(P, 1)``."""
    return x if x.dim() == 0 else x[:, None]


@dataclass(frozen=True)
class LocalModel:
    """Local model of a flow around a point ``w0``: fixed modes, and their curvature to first order in w - w0."""

    flow: Flow
    w0: Tensor
    inverse: Tensor  # the diagonal of P⁻¹, one number or (P,)
    modes: Tensor  # U (P, k)
    curvatures: Tensor  # at w0 (k, k)
    curvature_gradients: Tensor  # G_ij, i ≤ j, as rows (m, P)
    largest: float  # eigenvalue of P^-1/2 ∇²F P^-1/2
    memory: Memory | None
    cost: float  # in gradients

    def curvature(self, w: Tensor) -> Tensor:
        """Curvature of the modes at w, ``C(w) = C(w0) + ⟨G, w - w0⟩`` (k, k)."""
        return self.curvatures + third_order.unpacked(self.curvature_gradients @ (w - self.w0))

    def push(self, X: Tensor) -> Tensor:
        """Force of an oscillation on the weights, ``Σ_ij X_ij G_ij`` (P,)."""
        return third_order.combined(X, self.curvature_gradients)

    @cached_property
    def still_gram(self) -> Tensor:
        """Matrix B of the complementarity problem while P stands still."""
        return third_order.gram(self.curvature_gradients, self.curvature_gradients * self.inverse) / 2

    def motion(self, w: Tensor, averages: State, dt: float, start: Tensor | None = None) -> Motion:
        """Motion at w, near w0, for a step of length dt; `start` is the X of the step before."""
        rule = self.flow.rule
        value, g = self.flow.objective.value_and_grad(w)
        force, drift = g + rule.coupled_decay * w, rule.decoupled_decay * w
        C, M = self.curvature(w), self.metric(averages)
        inverse = self.flow.inverse(w, averages) if averages else self.inverse
        square = force.square()
        if len(C) == 0:
            X = C
        else:
            gap = rule.bound * M - C
            A = third_order.unpacked(self.curvature_gradients @ (inverse * force + drift))
            B = self.still_gram
            if averages:
                A0, B0 = self._changing_metric(averages, square)
                A, B = A + A0, B + B0
            X = complementarity.solve(eased(gap, dt) + dt * A, dt * B, start).x
            square = square + self._gradient_variance(X)
        velocity = -inverse * (force + 0.5 * self.push(X)) - drift
        rates = rule.relax(averages, square) if averages else {}
        return self.motion_of(velocity, X, value=value.item(), average_rates=rates, curvatures=C)

    def motion_of(
        self, velocity: Tensor, X: Tensor, *, value: float, average_rates: State, curvatures: Tensor
    ) -> Motion:
        """Complete the record of a motion by the loss ``L + ½⟨Σ, ∇²L⟩``, from the loss `value` at the point."""
        own = curvatures - self.flow.rule.coupled_decay * self.modes.T @ self.modes
        return Motion(
            velocity=velocity,
            average_rates=average_rates,
            curvatures=curvatures,
            covariance=X,
            modes=self.modes,
            loss=value + 0.5 * (X * own).sum().item(),
            point_loss=value,
        )

    def metric(self, averages: State) -> Tensor:
        """Metric of the modes, ``Uᵀ P U`` (k, k): the identity at w0, until P moves."""
        eye = torch.eye(self.modes.shape[1]).to(self.modes)
        if not averages:
            return eye
        change = 1 / self.flow.inverse(self.w0, averages) - 1 / self.inverse
        return eye + self.modes.T @ (column(change) * self.modes)

    def predicted(self, w: Tensor, averages: State) -> Tensor:
        """Predict the eigenvalues of ``P^-1/2 ∇²F P^-1/2`` on the modes at w (k,), largest first."""
        low = torch.linalg.inv(torch.linalg.cholesky(self.metric(averages)))
        return torch.linalg.eigvalsh(low @ self.curvature(w) @ low.T).flip(0)

    def _gradient_variance(self, X: Tensor) -> Tensor:
        """Mean square of the oscillation of the gradient, the diagonal of ``∇²F Σ ∇²F``; here ``∇²F U = c P U``."""
        V = self.flow.rule.bound * self.modes / column(self.inverse)
        return ((V @ X) * V).sum(1)

    def _changing_metric(self, averages: State, square: Tensor) -> tuple[Tensor, Tensor]:
        """Terms that a moving P adds to A and B: ``c Uᵀ (dP/dt) U``, affine in X."""
        rule, U, c = self.flow.rule, self.modes, self.flow.rule.bound
        derivatives = _preconditioner_derivatives(rule, averages)

        def rate(rates: State) -> Tensor:
            """Rate of change of the metric of the modes, ``c Uᵀ (dP/dt) U`` (k, k)."""
            p = sum((derivatives[name] * rates[name] for name in rates), U.new_zeros(()))
            return c * U.T @ (column(p) * U)

        still, V = rule.relax(averages, square), c * U / column(self.inverse)
        rows = []
        for i, j in zip(*third_order.pairs(U.shape[1]), strict=True):
            there = rule.relax(averages, square + V[:, i] * V[:, j])
            rows.append(rate({name: there[name] - still[name] for name in still}))
        return rate(still), third_order.unpacked(torch.stack(rows).movedim(0, -1))


def eased(gap: Tensor, dt: float) -> Tensor:
    """Ease the gap ``c I - C``: its negative part, curvature above the bound, is to vanish over an optimizer's step."""
    values, Q = torch.linalg.eigh(gap)
    return (Q * torch.where(values < 0, min(dt, 1.0) * values, values)) @ Q.T


def _preconditioner_derivatives(rule: UpdateRule, averages: State) -> State:
    """Derivatives of the preconditioner in each average, entry by entry, by differences of relative size 1e-6."""
    out = {}
    for name, v in averages.items():
        h = 1e-6 * v.abs()
        up, down = (torch.as_tensor(rule.preconditioner({**averages, name: v + s * h})) for s in (1, -1))
        out[name] = torch.where(h > 0, (up - down) / (2 * h), 0.0)
    return out


def moved(averages: State, rates: State, dt: float) -> State:
    """Move the averages by dt at those rates; those without a rate stay."""
    return {name: v + dt * rates[name] if name in rates else v for name, v in averages.items()}


def gradient(f: Objective, rule: UpdateRule) -> Flow:
    """Gradient flow ``dw/dt = -∇F(w)/p`` of a rule whose P stands still: gradient descent in continuous time.

    Raises:
        ValueError: P moves (RMSprop, Adam): that flow is `stable`.
    """
    require_objective(f)
    require_rule(rule)
    if rule.averages(rule.init(f.weights())):
        raise InvalidValue(f"{type(rule).__name__} rescales its gradient as it goes; its flow is stable(f, rule)")
    return stable(f, rule)


def stable(f: Objective, rule: UpdateRule) -> Flow:
    """Stable flow of the rule, as if it did not oscillate: the central flow with Σ = 0."""
    return Flow(f, rule, band=None)


def sphere(f: Objective, rate: float) -> Flow:
    """Gradient flow of a scale-invariant loss, ``dθ/dt = -rate ∇L(θ)``, which stays on its sphere; ``rate`` is η̃."""
    return stable(f, GD(rate))


def central(f: Objective, rule: UpdateRule, *, band: float = 0.1) -> Flow:
    """Central flow, the mean of the rule's path at the edge [N25]; modes above ``(1 - band) c`` take part."""
    if not 0 < band < 1:
        raise InvalidValue(f"band is {band}; it is a fraction of the bound, between 0 and 1")
    return Flow(f, rule, band)
