"""The Hessian and the Gauss-Newton matrix of an objective as symmetric operators, with whole or sharded vectors."""

from dataclasses import dataclass

from torch import Tensor

from ..errors import InvalidValue, NotSymmetric
from ..linalg.operators import SymmetricOperator, require_operator
from .expansion import Expansion
from .objective import Objective, require_objective
from .processes import Together


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
    drafts = tuple(SymmetricOperator(draft, at.grad, cost=1.0) for draft in at.drafts)
    return SymmetricOperator(at.hvp, at.grad, cost=at.cost, drafts=drafts)


def gauss_newton(f: Objective | Expansion, w: Tensor | None = None) -> SymmetricOperator:
    """Return the Gauss-Newton matrix ``Jᵀ ∇²ℓ J``, positive semidefinite for convex losses [N3]."""
    at = _expand(f, w)
    return SymmetricOperator(at.gauss_newton, at.grad)


@dataclass(frozen=True)
class _Parts:
    """A layout in which each process has as many consecutive entries as any other, but for the last ones."""

    processes: Together
    size: int

    @property
    def rank(self) -> int:
        return self.processes.rank

    @property
    def count(self) -> int:
        return self.processes.size

    @property
    def width(self) -> int:
        return -(-self.size // self.count)

    @property
    def start(self) -> int:
        return min(self.rank * self.width, self.size)

    def sum(self, numbers: Tensor) -> Tensor:
        return self.processes.total(numbers)

    def own(self, whole: Tensor) -> Tensor:
        """Copy the entries ``(n,)`` of this process."""
        return whole[self.start : self.start + self.width].clone()

    def whole(self, own: Tensor) -> Tensor:
        """Gather the entries of all processes."""
        return self.processes.concatenated(own.contiguous(), self.size)


def sharded(a: SymmetricOperator, f: Objective) -> SymmetricOperator:
    """Spread the vectors of an operator over the processes of an objective: each holds ``⌈P/W⌉`` entries of every one.

    The bases of `lanczos`, `largest_eigenpair` and `trace` take one W-th of the memory then; a product takes one more
    message, which gathers the vector.  Vectors that are found are the entries of this process; `whole_vectors` gathers
    them, and `own_entries` takes these of a whole one.  With one process this is `a` itself.

    Raises:
        InvalidValue: more processes than parts of vectors.
    """
    require_operator(a)
    require_objective(f)
    if not isinstance(f.processes, Together):
        return a
    parts = _Parts(f.processes, a.size)
    if (parts.count - 1) * parts.width >= a.size:
        raise InvalidValue(f"{a.size} entries of a vector are too few for {parts.count} processes")
    like = parts.own(a.like)
    drafts = tuple(sharded(draft, f) for draft in a.drafts)
    return SymmetricOperator(lambda v: parts.own(a.matvec(parts.whole(v))), like, None, a.cost, parts, drafts)


def own_entries(a: SymmetricOperator, v: Tensor) -> Tensor:
    """Copy the entries of a whole vector ``(P,)`` that this process holds of the vectors of an operator."""
    require_operator(a, spread=True)
    return a.layout.own(v) if isinstance(a.layout, _Parts) else v


def whole_vectors(a: SymmetricOperator, columns: Tensor) -> Tensor:
    """Gather vectors ``(P, k)`` of an operator from the entries that each process holds; all of them call this."""
    require_operator(a, spread=True)
    if not isinstance(a.layout, _Parts):
        return columns
    whole = columns.new_empty((a.size, columns.shape[1]))
    for i, column in enumerate(columns.T):
        whole[:, i] = a.layout.whole(column)
    return whole
