"""Flows: what an optimizer does on average, as a motion of the weights in continuous time.

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
from ..autodiff.objective import Objective
from ..errors import InvalidValue
from ..linalg import complementarity
from ..linalg.eigenpairs import Memory
from ..linalg.operators import SymmetricOperator, preconditioned, scaled, shifted
from ..linalg.warm_start import warm_started
from ..optimizers.base import State, UpdateRule
from ..optimizers.gd import GD

MOST = 20
"""Modes that are held at the edge together, at most."""


@dataclass(frozen=True)
class Slope:
    """What a flow says at one point."""

    velocity: Tensor  # dw/dt, (P,)
    averages: State  # d/dt of the averages in the rule's state
    curvatures: Tensor  # C (k, k): of the modes near the edge, in units in which the bound is c
    covariance: Tensor  # X (k, k) of the oscillation along them
    modes: Tensor  # U (P, k)
    loss: float  # L averaged over the oscillation, L(w) + ½⟨Σ, ∇²L⟩
    point_loss: float  # L(w)

    @cached_property
    def variances(self) -> Tensor:
        """Eigenvalues of ``Σ = U X Uᵀ`` (k,), ascending: mean squared amplitudes."""
        U, X = self.modes, self.covariance
        if not len(X):
            return X.new_zeros(0)
        values, Q = torch.linalg.eigh(U.T @ U)
        root = Q * values.clamp_min(0).sqrt()
        return torch.linalg.eigvalsh(root.T @ X @ root)


@dataclass(frozen=True)
class Flow:
    """The central flow of a rule; without `band`, its stable flow.

    Modes with curvature above ``(1 - band) c`` take part, the `MOST` largest of them.  `slopes` is the way to their
    G_ij: by autograd, unless `verified` chose another.
    """

    objective: Objective
    rule: UpdateRule
    band: float | None = 0.1
    slopes: third_order.Slopes | None = None

    def verified(self, w: Tensor) -> "Flow":
        """The flow with the way to third derivatives that `third.checked` chooses along ``∇²L ∇²L ∇L(w)``.

        Raises:
            WrongThirdDerivative: none can be trusted.
        """
        if self.band is None or self.slopes is not None:
            return self
        at = self.objective.at(w)
        u = at.hvp(at.hvp(at.grad))
        if not u.norm() > 0:
            u = torch.ones_like(w)
        return replace(self, slopes=third_order.checked(self.objective, w, u))

    def local(self, w: Tensor, averages: State, memory: Memory | None = None, seed: int = 0) -> "Local":
        """The flow around w, with the modes at the edge tracked from `memory`."""
        inverse = self.inverse(w, averages)
        a, shift = self.curvature(w, inverse)
        edge = None if self.band is None else (1 - self.band) * self.rule.bound - shift
        found = warm_started(a, memory, 1, above=edge, seed=seed)
        local = self.around(w, inverse, found.values + shift, found.vectors)
        return replace(local, memory=found.memory, cost=local.cost + found.num_gradients)

    def inverse(self, w: Tensor, averages: State) -> Tensor:
        """The diagonal of P⁻¹, one number or ``(P,)``."""
        return 1 / torch.as_tensor(self.rule.preconditioner(averages)).to(w)

    def curvature(self, w: Tensor, inverse: Tensor) -> tuple[SymmetricOperator, float]:
        """An operator and a number that sum to ``P^-1/2 ∇²F P^-1/2``."""
        h, decay = hessian(self.objective, w), self.rule.coupled_decay
        if inverse.dim() == 0:
            return scaled(h, inverse.item()), decay * inverse.item()
        return preconditioned(shifted(h, decay), 1 / inverse), 0.0

    def around(self, w: Tensor, inverse: Tensor, values: Tensor, vectors: Tensor) -> "Local":
        """The flow around w, given eigenpairs of ``P^-1/2 ∇²F P^-1/2``, of which those in the band are its modes."""
        k = 0 if self.band is None else min(int((values >= (1 - self.band) * self.rule.bound).sum()), MOST)
        U = vectors[:, :k] * column(inverse.sqrt())
        way = self.slopes or third_order.by_autograd
        G = way(self.objective, w, U) if k else w.new_zeros(0, len(w))
        return Local(self, w, inverse, U, torch.diag(values[:k]), G, values[0].item(), None, 2.0 * len(G))


def column(x: Tensor) -> Tensor:
    """``x`` so that it multiplies columns: a number as it is, ``(P,)`` as ``(P, 1)``."""
    return x if x.dim() == 0 else x[:, None]


@dataclass(frozen=True)
class Local:
    """A flow around a point ``w0``: its modes held fixed, their curvature to first order in w - w0."""

    flow: Flow
    w0: Tensor
    inverse: Tensor  # the diagonal of P⁻¹, one number or (P,)
    modes: Tensor  # U (P, k)
    curvatures: Tensor  # at w0 (k, k)
    slopes: Tensor  # G_ij, i ≤ j, as rows (m, P)
    largest: float  # eigenvalue of P^-1/2 ∇²F P^-1/2
    memory: Memory | None
    cost: float  # in gradients

    def curvature(self, w: Tensor) -> Tensor:
        """``C(w) = C(w0) + ⟨G, w - w0⟩`` (k, k)."""
        return self.curvatures + third_order.unpacked(self.slopes @ (w - self.w0))

    def push(self, X: Tensor) -> Tensor:
        """``Σ_ij X_ij G_ij`` (P,)."""
        return third_order.combined(X, self.slopes)

    @cached_property
    def still_gram(self) -> Tensor:
        """B while P stands still."""
        return third_order.gram(self.slopes, self.slopes * self.inverse) / 2

    def slope(self, w: Tensor, averages: State, dt: float, start: Tensor | None = None) -> Slope:
        """The flow at w, near w0, for a step of length dt; `start` is the X of a step before."""
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
            A = third_order.unpacked(self.slopes @ (inverse * force + drift))
            B = self.still_gram
            if averages:
                A0, B0 = self._changing(averages, square)
                A, B = A + A0, B + B0
            X = complementarity.solve(eased(gap, dt) + dt * A, dt * B, start).x
            square = square + self._shaken(X)
        velocity = -inverse * (force + 0.5 * self.push(X)) - drift
        rates = rule.relax(averages, square) if averages else {}
        return Slope(velocity, rates, C, X, self.modes, *self.losses(value.item(), C, X))

    def metric(self, averages: State) -> Tensor:
        """``Uᵀ P U`` (k, k): the identity at w0, until P moves."""
        eye = torch.eye(self.modes.shape[1]).to(self.modes)
        if not averages:
            return eye
        change = 1 / self.flow.inverse(self.w0, averages) - 1 / self.inverse
        return eye + self.modes.T @ (column(change) * self.modes)

    def foretold(self, w: Tensor, averages: State) -> Tensor:
        """Eigenvalues of ``P^-1/2 ∇²F P^-1/2`` on the modes at w (k,), largest first."""
        low = torch.linalg.inv(torch.linalg.cholesky(self.metric(averages)))
        return torch.linalg.eigvalsh(low @ self.curvature(w) @ low.T).flip(0)

    def losses(self, value: float, C: Tensor, X: Tensor) -> tuple[float, float]:
        """``L + ½⟨Σ, ∇²L⟩`` and L."""
        own = C - self.flow.rule.coupled_decay * self.modes.T @ self.modes
        return value + 0.5 * (X * own).sum().item(), value

    def _shaken(self, X: Tensor) -> Tensor:
        """The diagonal of ``∇²F Σ ∇²F``, the mean square of the oscillation of the gradient; ``∇²F U = c P U``."""
        V = self.flow.rule.bound * self.modes / column(self.inverse)
        return ((V @ X) * V).sum(1)

    def _changing(self, averages: State, square: Tensor) -> tuple[Tensor, Tensor]:
        """What a moving P adds to A and B: ``c Uᵀ (dP/dt) U``, affine in X."""
        rule, U, c = self.flow.rule, self.modes, self.flow.rule.bound
        bends = _bends(rule, averages)

        def rate(rates: State) -> Tensor:
            """``c Uᵀ (dP/dt) U`` (k, k)."""
            p = sum((bends[name] * rates[name] for name in rates), U.new_zeros(()))
            return c * U.T @ (column(p) * U)

        still, V = rule.relax(averages, square), c * U / column(self.inverse)
        rows = []
        for i, j in zip(*third_order.pairs(U.shape[1]), strict=True):
            there = rule.relax(averages, square + V[:, i] * V[:, j])
            rows.append(rate({name: there[name] - still[name] for name in still}))
        return rate(still), third_order.unpacked(torch.stack(rows).movedim(0, -1))


def eased(gap: Tensor, dt: float) -> Tensor:
    """``c I - C`` with its negative part, curvature above the bound, to be worked off over a step of the optimizer."""
    values, Q = torch.linalg.eigh(gap)
    return (Q * torch.where(values < 0, min(dt, 1.0) * values, values)) @ Q.T


def _bends(rule: UpdateRule, averages: State) -> State:
    """``dp/dv`` of the preconditioner in each average v, entry by entry, by differences of relative size 1e-6."""
    out = {}
    for name, v in averages.items():
        h = 1e-6 * v.abs()
        up, down = (torch.as_tensor(rule.preconditioner({**averages, name: v + s * h})) for s in (1, -1))
        out[name] = torch.where(h > 0, (up - down) / (2 * h), 0.0)
    return out


def moved(averages: State, rates: State, dt: float) -> State:
    """The averages after dt at those rates; what has no rate stays."""
    return {name: v + dt * rates[name] if name in rates else v for name, v in averages.items()}


def gradient(f: Objective, rule: UpdateRule) -> Flow:
    """``dw/dt = -∇F(w)/p`` for a rule whose P stands still: gradient descent, its learning rate made continuous time.

    Raises:
        ValueError: P moves (RMSprop, Adam): that flow is `stable`.
    """
    if rule.averages(rule.init(f.weights())):
        raise InvalidValue(f"{type(rule).__name__} rescales its gradient as it goes; its flow is stable(f, rule)")
    return stable(f, rule)


def stable(f: Objective, rule: UpdateRule) -> Flow:
    """What the rule would do if it did not oscillate: the central flow with Σ = 0."""
    return Flow(f, rule, band=None)


def sphere(f: Objective, rate: float) -> Flow:
    """``dθ/dt = -rate ∇L(θ)``: for a scale-invariant loss it stays on the sphere on which it starts; ``rate`` is η̃."""
    return stable(f, GD(rate))


def central(f: Objective, rule: UpdateRule, *, band: float = 0.1) -> Flow:
    """The mean of the rule's path at the edge of stability [N25]; modes above ``(1 - band) c`` take part."""
    if not 0 < band < 1:
        raise InvalidValue(f"band is {band}; it is a share of the bound, between 0 and 1")
    return Flow(f, rule, band)
