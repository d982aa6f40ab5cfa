"""Measures: one equation each, from a point of training to a number.

Each takes an `Iterate`, or an `Objective` (then at its model's present weights).
"""

from ..autodiff.objective import Objective
from ..linalg.eigenpairs import Eigenpairs
from ..linalg.vectors import length
from ..symmetry.scale_groups import ScaleGroups
from .iterate import ERROR, Iterate


def loss(at: Objective | Iterate) -> float:
    """Loss of the objective at the weights, ``L(w)``."""
    return Iterate.of(at).expansion.value.item()


def radius(at: Objective | Iterate) -> float:
    """Norm of the jointly scale-invariant weights, ``‖w‖``."""
    return length(Iterate.of(at).invariant)


def sharpness(at: Objective | Iterate, *, error: float | None = None) -> float:
    """Largest eigenvalue of the Hessian, ``λ1(∇²L(w))`` [N2].

    Of an objective to a relative error of about 1e-3, or `error`; `top_eigenpairs` has the estimate and the bounds.
    It depends on the scale of normalized weights; `spherical_sharpness` does not.  Where gradients are stopped on the
    way there is no Hessian: then it is the largest real part of the eigenvalues of the Jacobian of the gradient.

    >>> from torch import nn, ones, zeros
    >>> net = nn.Linear(2, 1, bias=False)
    >>> f = Objective(net, nn.functional.mse_loss, [(ones(4, 2), zeros(4, 1))])
    >>> round(sharpness(f), 4)  # ∇²L = 2 x xᵀ with x = (1, 1)
    4.0
    """
    it = Iterate.of(at, error)
    return it.top.values[0].item() if it.objective.follows_gradient else it.rightmost.value.real


def spherical_sharpness(
    at: Objective | Iterate, *, error: float | None = None, groups: ScaleGroups | None = None
) -> float:
    """Sharpness at unit norm: ``λ1`` of the Hessian in the jointly scale-invariant weights at w/‖w‖ [N7].

    (Lyu, Li & Arora 2022, arXiv 2206.07085.)  `error` is that of `sharpness`.  `groups` are those of
    ``find_groups(f)``, to be found once by those who measure one network at many weights.

    Raises:
        ValueError: no weights are scale-invariant.

    >>> from torch import nn, randn
    >>> net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False, eps=0))
    >>> f = Objective(net, nn.functional.mse_loss, [(randn(9, 3), randn(9, 4))])
    >>> from sharpscope import find_groups
    >>> groups = find_groups(f)
    >>> before = spherical_sharpness(f, groups=groups)
    >>> _ = net[0].weight.data.mul_(10)  # the function is the same, and so is the number
    >>> abs(spherical_sharpness(f, groups=groups) - before) < 0.01 * before
    True
    """
    return Iterate.of(at, error, groups).spherical_top.values[0].item()


def product_sphere_sharpness(
    at: Objective | Iterate, *, error: float | None = None, groups: ScaleGroups | None = None
) -> float:
    """Sharpness with every invariant group at unit norm: ``λ1(Δ H Δ)``, Δ = diag(‖w_g‖) [N12].

    Unlike `spherical_sharpness` it does not change when groups are rescaled against each other.  `error` and `groups`
    are those of `spherical_sharpness`.
    """
    return Iterate.of(at, error, groups).product_sphere_top.values[0].item()


def effective_learning_rate(at: Objective | Iterate) -> float:
    """Step size of the rule seen on the unit sphere [N8]."""
    it = Iterate.of(at)
    return it.required_rule.effective_learning_rate(radius(it), it.state)


def eta_lambda(at: Objective | Iterate) -> float:
    """Effective learning rate times spherical sharpness, ``η̃ λ1``: 2 at the edge of gradient descent."""
    it = Iterate.of(at)
    return effective_learning_rate(it) * spherical_sharpness(it)


def stability_ratio(at: Objective | Iterate) -> float:
    """Sharpness over its threshold, ``λ1(∇²L(w)) / threshold``: 1 at the edge of stability of any rule.

    Where no one threshold exists (a learning rate for every weight, parameter groups that differ) it is
    ``λ1(M^-½ (∇²L + D) M^-½)``, in the metric of the steps [N34].
    """
    it = Iterate.of(at)
    threshold = it.criterion.threshold
    if threshold is None and not it.objective.follows_gradient:
        return it.effective_rightmost.value.real
    return it.effective_top.values[0].item() if threshold is None else sharpness(it) / threshold


def top_eigenpairs(
    at: Objective | Iterate, k: int = 1, *, error: float = ERROR, rtol: float | None = None
) -> Eigenpairs:
    """Compute the k largest eigenpairs of ``∇²L(w)``, with what is known of their errors [N4].

    One pair is found to a relative error of the value of about `error`, which its estimate says; with `rtol`, and for
    more pairs (there 1e-4 by default), residuals are at most `rtol` of the largest eigenvalue in magnitude.
    """
    it = Iterate.of(at)
    if rtol is not None or k > 1:
        return Iterate(it.objective, it.w, k=k, rtol=rtol or it.rtol, start=it.start).top
    return Iterate(it.objective, it.w, error=error).top
