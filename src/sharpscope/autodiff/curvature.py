"""The Hessian and the Gauss-Newton matrix of an objective as symmetric operators."""

from torch import Tensor

from ..errors import NotSymmetric
from ..linalg.operators import SymmetricOperator
from .expansion import Expansion
from .objective import Objective, require_objective


def _expand(f: Objective | Expansion, w: Tensor | None) -> Expansion:
    if isinstance(f, Expansion):
        return f
    require_objective(f)
    return f.at(f.weights() if w is None else w)


def hessian(f: Objective | Expansion, w: Tensor | None = None) -> SymmetricOperator:
    """Return the Hessian ``∇²L(w)`` as an operator [N2]; `w` defaults to the model's weights.

    All products share one expansion.

    Raises:
        NotSymmetric: gradients are stopped on the way, so that there is a Jacobian of the gradient, but no Hessian.
    """
    at = _expand(f, w)
    if not at.symmetric:
        raise NotSymmetric(
            "gradients are stopped on the way (detach, no_grad, a backward of its own), so that training follows no"
            " gradient of one function, and its Jacobian is not symmetric; sharpness(f) is the largest real part of its"
            " eigenvalues, and f.using(sharpscope.autodiff.expansion.kept) has the products of autograd, which leaves"
            " out the stopped part"
        )
    return SymmetricOperator(at.hvp, at.grad, cost=at.cost)


def gauss_newton(f: Objective | Expansion, w: Tensor | None = None) -> SymmetricOperator:
    """Return the Gauss-Newton matrix ``Jᵀ ∇²ℓ J``, positive semidefinite for convex losses [N3]."""
    at = _expand(f, w)
    return SymmetricOperator(at.gauss_newton, at.grad)
