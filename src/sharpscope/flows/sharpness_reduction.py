"""The sharpness-reduction flow of scale-invariant losses, along the minimizers Γ on the unit sphere.

For a rule of the quasi-RMSprop family, with base rate η and decay β = 1 - C η² (gradient descent with weight decay has
C = 2 and η² = 2 il), the direction of the weights oscillates about a point ζ of Γ that moves, per step, by

    dζ/dt = -η² Σ_ij p_ij g_ij,      g_ij = Π ∇(u_iᵀ ∇²L u_j)/λ1,

with Π the projection onto the tangent space of Γ and p ⪰ 0 the second moments of the oscillation in units of η², which
solve  S = 4 tr(p) I + (2/C) Σ_lm ⟨g_ij, g_lm⟩ p_lm - I + slack ⪰ 0,  ⟨p, S⟩ = 0  [N27].  With one eigenvalue and C = 2
that is dζ/dτ = -2 G/(4 + K²), G = ∇_Γ log λ1, K = ‖G‖, τ = il t (Lyu, Li & Arora 2022, arXiv 2206.07085).

P parameters, k eigenvalues.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..autodiff import third_order
from ..autodiff.curvature import hessian
from ..autodiff.objective import Objective, require_objective
from ..errors import InvalidType, InvalidValue, NoMinimizer
from ..linalg import complementarity
from ..linalg.eigenbasis import Basis, eigenbasis
from ..optimizers.base import UpdateRule
from ..optimizers.gd import GD
from ..optimizers.scalar import SphericalRMSprop
from ..symmetry.sphere import direction

MAX_RANGE = 500
"""Number of dimensions of a Hessian's range, at most."""


@dataclass(frozen=True)
class Reduction:
    """Motion of the flow at a point of Γ, and the oscillation that it averages over."""

    velocity: Tensor  # dζ/dt (P,), tangent to Γ, per step of the rule
    eigenvalues: Tensor  # of the spherical Hessian, the k largest (k,)
    log_slopes: Tensor  # g_ij, i ≤ j, as rows (k (k + 1)/2, P)
    moments: Tensor  # ⟨h hᵀ⟩/η² (k, k) of the oscillation along their eigenvectors

    @property
    def K(self) -> float:
        """Slope of the log of sharpness along Γ, ``‖∇_Γ log λ1‖``."""
        return self.log_slopes[0].norm().item()


@dataclass(frozen=True)
class ReductionFlow:
    """The sharpness-reduction flow of a loss that is scale-invariant in all its weights, with k eigenvalues.

    `rate` is η², `C` the constant of the decay β = 1 - C η².  Minimizers are where the gradient (at unit norm) is below
    `tol`, and curvature below ``floor λ1`` counts as zero.
    """

    objective: Objective
    rate: float
    C: float = 2.0
    k: int = 1
    tol: float = 1e-11
    floor: float = 1e-6

    def __post_init__(self) -> None:
        require_objective(self.objective)

    def minimizer(self, w: Tensor) -> Tensor:
        """Find the point of Γ near w/‖w‖ (P,), by Gauss-Newton steps ``θ ← θ - H⁺ ∇L(θ)`` in the range of H = ∇²L.

        Raises:
            NoMinimizer: the gradient does not vanish.
        """
        theta = direction(w)
        for _ in range(20):
            g = self.objective.grad(theta)
            if g.norm() <= self.tol:
                return theta
            near = self._range(theta)
            keep = near.values > self.floor * near.values[0]
            V = near.vectors[:, keep]
            theta = direction(theta - V @ ((V.T @ g) / near.values[keep]))
        if (size := self.objective.grad(theta).norm().item()) <= self.tol:
            return theta
        raise NoMinimizer(
            f"after 20 Gauss-Newton steps the gradient at unit norm is still {size:.2g}: there is no minimizer near"
            " this point, or no smooth manifold of them; the central flow needs neither"
        )

    def at(self, zeta: Tensor, dtau: float | None = None) -> Reduction:
        """Motion at a point of Γ; with `dtau`, eigenvalues below the first may rise to it within that time.

        Without it all k count as equal.
        """
        near = self._range(zeta)
        top, k = near.values[0], self.k
        U = near.vectors[:, :k]
        V = near.vectors[:, near.values.abs() > self.floor * top]
        g = third_order.by_autograd(self.objective, zeta, U) / top
        for flat in (V, zeta[:, None]):
            g = g - (g @ flat) @ flat.T
        eye = torch.eye(k).to(g)
        B = 4 * torch.einsum("ij,lm->ijlm", eye, eye) + 2 / self.C * third_order.gram(g, g)
        slack = torch.zeros_like(eye) if dtau is None else torch.diag(1 - near.values[:k] / top) / (2 * dtau)
        p = complementarity.solve(slack - eye, B).x
        return Reduction(-self.rate * third_order.combined(p, g), near.values[:k], g, p)

    def _range(self, theta: Tensor) -> Basis:
        """Compute an eigenbasis of the Hessian at θ."""
        a = hessian(self.objective, theta)
        return eigenbasis(a, 1e-3 * self.floor, min(a.size, MAX_RANGE))


def sharpness_reduction(f: Objective, rule: UpdateRule, k: int = 1) -> ReductionFlow:
    """Sharpness-reduction flow that `rule` follows at the edge: `GD` with weight decay or `SphericalRMSprop`.

    Raises:
        TypeError, ValueError: the rule is not of the quasi-RMSprop family.
    """
    if isinstance(rule, SphericalRMSprop):
        return ReductionFlow(f, rate=rule.base_rate**2, C=rule.constant, k=k)
    if not isinstance(rule, GD):
        raise InvalidType(
            f"{type(rule).__name__} is not in the quasi-RMSprop family: it has no sharpness-reduction flow"
        )
    if not rule.weight_decay:
        raise InvalidValue("without weight decay nothing drives the sharpness down; pass a rule with weight_decay > 0")
    return ReductionFlow(f, rate=2 * rule.intrinsic_time_per_step, k=k)


def follow(flow: ReductionFlow, w: Tensor, steps: float, *, pieces: int = 50) -> tuple[Tensor, Tensor]:
    """Follow the flow; return times ``(pieces + 1,)`` in steps, and points of Γ ``(pieces + 1, P)``.

    By Runge-Kutta steps of order 4, projected on Γ.  With several eigenvalues, whose velocity jumps where they meet,
    Euler steps with the gaps as slack.
    """
    zeta, h = flow.minimizer(w), steps / pieces
    out = [zeta]
    dtau = h * flow.rate / 2
    for _ in range(pieces):
        if flow.k > 1:
            zeta = zeta + h * flow.at(zeta, dtau).velocity
        else:
            a = flow.at(zeta).velocity
            b = flow.at(flow.minimizer(zeta + h / 2 * a)).velocity
            c = flow.at(flow.minimizer(zeta + h / 2 * b)).velocity
            d = flow.at(flow.minimizer(zeta + h * c)).velocity
            zeta = zeta + h / 6 * (a + 2 * b + 2 * c + d)
        zeta = flow.minimizer(zeta)
        out.append(zeta)
    return torch.linspace(0, steps, pieces + 1), torch.stack(out)
