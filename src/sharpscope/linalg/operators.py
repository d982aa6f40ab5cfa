"""Symmetric linear operators, known by their products with vectors.

An operator is composed from smaller ones:

    restricted(preconditioned(hessian(f, w), p), indices)

P parameters.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidType, InvalidValue, MissingExtra

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SymmetricOperator:
    """A symmetric linear operator, given by its product with a vector, ``v -> A v``.

    Args:
        matvec: product with one vector ``(P,)``.
        like: any vector of the operator's size, dtype and device.
        matmat: product with columns ``(P, k)`` at once, where that is faster than one by one.
        cost: of one product, in gradients; not a number where it is unknown.
    """

    matvec: Linear
    like: Tensor = field(repr=False)
    matmat: Linear | None = None
    cost: float = math.nan

    @property
    def size(self) -> int:
        """The number of rows, P."""
        return self.like.numel()

    def __matmul__(self, v: Tensor) -> Tensor:
        """Multiply a vector ``(P,)`` or columns ``(P, k)``."""
        if v.shape[:1] != (self.size,) or v.dim() > 2:
            raise InvalidValue(f"an operator of size {self.size} cannot act on a tensor of shape {tuple(v.shape)}")
        if v.dim() == 1:
            return self.matvec(v)
        if self.matmat is not None and v.shape[1] > 1:
            return self.matmat(v)
        return torch.stack([self.matvec(column) for column in v.T], dim=1)

    def sandwiched(self, like: Tensor, before: Linear, after: Linear) -> "SymmetricOperator":
        """Compose the operator with a linear map on either side, ``after ∘ A ∘ before``.

        Both maps take vectors ``(n,)`` and columns ``(n, k)`` alike.
        """
        matmat = self.matmat
        return SymmetricOperator(
            lambda v: after(self.matvec(before(v))),
            like,
            None if matmat is None else lambda v: after(matmat(before(v))),
            self.cost,
        )

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.linalg.LinearOperator``, which takes and returns NumPy arrays."""
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as missing:
            raise MissingExtra("to_scipy() needs SciPy, which is not installed: pip install scipy") from missing

        def product(x: Any) -> Any:
            y = self @ torch.as_tensor(x).to(self.like)
            return y.detach().cpu().numpy()

        def vector(x: Any) -> Any:
            return product(x.reshape(-1))

        dtype = self.like.new_empty(0).cpu().numpy().dtype
        shape = (self.size, self.size)
        return LinearOperator(shape, matvec=vector, rmatvec=vector, matmat=product, rmatmat=product, dtype=dtype)

    def dense(self) -> Tensor:
        """Return the matrix ``(P, P)``, for tests and small problems."""
        return self @ torch.eye(self.size, dtype=self.like.dtype, device=self.like.device)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn autocast off: products of vectors in a solver would run in its low precision, too."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def require_operator(a: object) -> None:
    """Raise InvalidType unless `a` is a SymmetricOperator."""
    if not isinstance(a, SymmetricOperator):
        raise InvalidType(
            f"this {type(a).__name__} is no SymmetricOperator; of an objective f it is hessian(f), of a matrix M"
            " SymmetricOperator(lambda v: M @ v, M[0])"
        )


def preconditioned(a: SymmetricOperator, p: Tensor) -> SymmetricOperator:
    """Measure an operator in a diagonal metric: ``P^-1/2 A P^-1/2`` with ``P = diag(p)``, p positive ``(P,)``."""
    require_operator(a)
    if p.shape != a.like.shape or not bool((p > 0).all()):
        raise InvalidValue(
            f"a preconditioner for size {a.size} has {a.size} positive entries; got {int((p > 0).sum())} among"
            f" {p.numel()}"
        )
    s = p.rsqrt()

    def scale(v: Tensor) -> Tensor:
        return s * v if v.dim() == 1 else s[:, None] * v

    return a.sandwiched(a.like, scale, scale)


def restricted(a: SymmetricOperator, indices: Tensor) -> SymmetricOperator:
    """Restrict an operator to the coordinates `indices` ``(n,)``: one of its diagonal blocks."""
    require_operator(a)
    indices = indices.to(a.like.device)

    def padded(v: Tensor) -> Tensor:
        return v.new_zeros((a.size, *v.shape[1:])).index_copy(0, indices, v)

    return a.sandwiched(a.like[indices], padded, lambda v: v[indices])


def projected(a: SymmetricOperator, project: Callable[[Tensor], Tensor]) -> SymmetricOperator:
    """Project an operator onto a subspace, ``Π A Π``; directions that are removed get eigenvalue zero.

    Π is an orthogonal projection, given as a function.
    """
    require_operator(a)
    return SymmetricOperator(lambda v: project(a.matvec(project(v))), a.like, cost=a.cost)


def scaled(a: SymmetricOperator, c: float) -> SymmetricOperator:
    """Multiply an operator by a number."""
    require_operator(a)
    return a.sandwiched(a.like, lambda v: c * v, lambda v: v)


def shifted(a: SymmetricOperator, c: float | Tensor) -> SymmetricOperator:
    """Add ``c I`` for a number c, or ``diag(c)`` for c of shape ``(P,)``."""
    require_operator(a)
    if not isinstance(c, Tensor):
        if c == 0:
            return a
        c = a.like.new_tensor(c)
    matmat = a.matmat
    columns = c[:, None] if c.dim() else c
    return SymmetricOperator(
        lambda v: a.matvec(v) + c * v,
        a.like,
        None if matmat is None else lambda V: matmat(V) + columns * V,
        a.cost,
    )
