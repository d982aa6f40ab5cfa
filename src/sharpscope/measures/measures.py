"""Measures: one equation each, from a point of training to a number.

Each takes an `Iterate`, or an `Objective` (then at its model's present weights).
"""

from ..autodiff.objective import Objective
from ..errors import InvalidValue
from ..linalg.eigenpairs import Eigenpairs
from ..optimizers.base import UpdateRule
from .iterate import Iterate


def loss(at: Objective | Iterate) -> float:
    """``L(w)``."""
    return Iterate.of(at).expansion.value.item()


def gradient_norm(at: Objective | Iterate) -> float:
    """``‖∇L(w)‖``."""
    return Iterate.of(at).expansion.grad.norm().item()


def radius(at: Objective | Iterate) -> float:
    """``‖w‖`` over the jointly scale-invariant weights."""
    return Iterate.of(at).invariant.norm().item()


def sharpness(at: Objective | Iterate) -> float:
    """``λ1(∇²L(w))`` [N2]: depends on the scale of normalized weights; see `spherical_sharpness`.

    >>> from torch import nn, ones, zeros
    >>> net = nn.Linear(2, 1, bias=False)
    >>> f = Objective(net, nn.functional.mse_loss, [(ones(4, 2), zeros(4, 1))])
    >>> round(sharpness(f), 4)  # ∇²L = 2 x xᵀ with x = (1, 1)
    4.0
    """
    return Iterate.of(at).top.values[0].item()


def spherical_sharpness(at: Objective | Iterate) -> float:
    """``λ1`` of the Hessian in the jointly scale-invariant weights at w/‖w‖ [N7] (Lyu, Li & Arora, arXiv 2206.07085).

    Raises:
        ValueError: no weights are scale-invariant.
    """
    return Iterate.of(at).spherical_top.values[0].item()


def product_sphere_sharpness(at: Objective | Iterate) -> float:
    """``λ1(Δ H Δ)``, Δ = diag(‖w_g‖): every invariant group at unit radius, a product of spheres [N12].

    Unlike `spherical_sharpness` it does not change when groups are rescaled against each other.
    """
    return Iterate.of(at).product_sphere_top.values[0].item()


def effective_learning_rate(at: Iterate) -> float:
    """Step size of the rule seen on the unit sphere [N8]."""
    return _rule(at).effective_learning_rate(radius(at), at.state)


def eta_lambda(at: Iterate) -> float:
    """``η̃ λ1``: effective learning rate × spherical sharpness; 2 at the edge for gradient descent."""
    return effective_learning_rate(at) * spherical_sharpness(at)


def stability_ratio(at: Iterate) -> float:
    """``λ1(∇²L(w)) / threshold``: one at the edge of stability, whatever the rule and the model.

    Where no one threshold exists (a learning rate for every weight, parameter groups that differ) it is
    ``λ1(M^-½ (∇²L + D) M^-½)``, in the metric of the steps [N34].
    """
    threshold = at.criterion.threshold
    return at.effective_top.values[0].item() if threshold is None else sharpness(at) / threshold


def top_eigenpairs(at: Objective | Iterate, k: int = 1) -> Eigenpairs:
    """The k largest eigenpairs of ``∇²L(w)``, with residuals [N4]."""
    it = Iterate.of(at)
    return Iterate(it.objective, it.w, k=k, rtol=it.rtol, start=it.start).top


def _rule(at: Iterate) -> UpdateRule:
    if at.rule is None:
        raise InvalidValue("this measure needs an update rule: Iterate(..., rule=GD(learning_rate=...))")
    return at.rule
