"""Symmetric linear operators, known by their products with vectors.

An operator is composed from smaller ones:

    restricted(preconditioned(hessian(f, w), p), indices)

P parameters.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InvalidType, InvalidValue, needing
from .vectors import DRAWN, dot, length

Linear = Callable[[Tensor], Tensor]


class Layout(Protocol):
    """Several processes, each of which has consecutive entries of every vector."""

    @property
    def size(self) -> int:
        """Number of entries of a whole vector, P."""

    @property
    def start(self) -> int:
        """Number of entries that are those of processes before this one."""

    @property
    def rank(self) -> int:
        """Number of processes before this one."""

    @property
    def count(self) -> int:
        """Number of processes."""

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum a small tensor over the processes."""


@dataclass(frozen=True)
class SymmetricOperator:
    """A symmetric linear operator, given by its product with a vector, ``v -> A v``.

    Args:
        matvec: product with one vector ``(P,)``.
        like: any vector of the operator's size, dtype and device.
        matmat: product with columns ``(P, k)`` at once, where that is faster than one by one.
        cost: of one product, in gradients; not a number where it is unknown.
        layout: of vectors that are spread over processes: then `like`, and all vectors, are the entries of this one.
        drafts: nearly the same operator, with products that cost less; the first that agrees well enough is used by
            `largest_eigenpair` until its answer is to be confirmed.
    """

    matvec: Linear
    like: Tensor = field(repr=False)
    matmat: Linear | None = None
    cost: float = math.nan
    layout: Layout | None = None
    drafts: "tuple[SymmetricOperator, ...]" = field(default=(), repr=False)

    @property
    def size(self) -> int:
        """The number of rows, P."""
        return self.like.numel() if self.layout is None else self.layout.size

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum a small tensor over the processes over which vectors are spread."""
        return numbers if self.layout is None else self.layout.sum(numbers)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiply rows ``(i, P)`` and ``(j, P)`` with each other, ``X Yᵀ``, in float64 on the processor."""
        return self.sum((x @ y.T).double().cpu())

    def dot(self, x: Tensor, y: Tensor) -> float:
        """Return ``xᵀ y`` of vectors ``(P,)``, right to rounding."""
        own = dot(x, y)
        return own if self.layout is None else self.layout.sum(torch.tensor([own], dtype=torch.float64)).item()

    def length(self, v: Tensor) -> float:
        """Return ``‖v‖`` of a vector ``(P,)``, right to rounding."""
        own = length(v)
        return own if self.layout is None else math.sqrt(self.sum(torch.tensor([own**2], dtype=torch.float64)).item())

    def qr(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Factor columns ``(P, k)`` into orthonormal ones and a triangle, of parts by their triangles (TSQR)."""
        q, r = torch.linalg.qr(columns)
        if self.layout is None:
            return q, r
        k = columns.shape[1]
        triangles = torch.zeros((self.layout.count, k, k), dtype=torch.float64)
        triangles[self.layout.rank, : len(r)] = r
        turn, whole = torch.linalg.qr(self.sum(triangles).view(-1, k))
        start = self.layout.rank * k
        return q @ turn[start : start + len(r)].to(q), whole.to(r)

    def drawn(self, k: int, draw: Callable[[tuple[int, int]], Tensor]) -> Tensor:
        """Draw columns ``(P, k)`` by blocks of rows, which are the same on any number of processes."""
        out = self.like.new_empty((self.like.numel(), k))
        start = 0 if self.layout is None else self.layout.start
        rows = max(1, DRAWN // k)
        for first in range(-start, self.size - start, rows):
            block = draw((min(rows, self.size - start - first), k))
            own = out[max(first, 0) : max(first + len(block), 0)]
            own.copy_(block[max(-first, 0) :][: len(own)])
        return out

    def gaussian(self, k: int, generator: torch.Generator) -> Tensor:
        """Draw columns ``(P, k)`` of standard normal numbers."""
        return self.drawn(k, lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64))

    def __matmul__(self, v: Tensor) -> Tensor:
        """Multiply a vector ``(P,)`` or columns ``(P, k)``."""
        if v.shape[:1] != self.like.shape or v.dim() > 2:
            raise InvalidValue(f"an operator of size {len(self.like)} cannot act on a tensor of shape {tuple(v.shape)}")
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
            self.layout,
            tuple(draft.sandwiched(like, before, after) for draft in self.drafts),
        )

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.linalg.LinearOperator``, which takes and returns NumPy arrays."""
        with needing("scipy", "to_scipy()"):
            from scipy.sparse.linalg import LinearOperator

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


def require_operator(a: object, *, spread: bool = False) -> None:
    """Raise InvalidType unless `a` is a SymmetricOperator, and InvalidValue where its vectors may not be `spread`."""
    if not isinstance(a, SymmetricOperator):
        raise InvalidType(
            f"this {type(a).__name__} is no SymmetricOperator; of an objective f it is hessian(f), of a matrix M"
            " SymmetricOperator(lambda v: M @ v, M[0])"
        )
    if a.layout is not None and not spread:
        raise InvalidValue(
            "the vectors of this operator are spread over processes, which lanczos, largest_eigenpair and trace take,"
            " and a preconditioner, a factor or a shift; use the operator before it was spread"
        )


def preconditioned(a: SymmetricOperator, p: Tensor) -> SymmetricOperator:
    """Measure an operator in a diagonal metric: ``P^-1/2 A P^-1/2`` with ``P = diag(p)``, p positive ``(P,)``."""
    require_operator(a, spread=True)
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
    drafts = tuple(projected(draft, project) for draft in a.drafts)
    return SymmetricOperator(lambda v: project(a.matvec(project(v))), a.like, cost=a.cost, drafts=drafts)


def scaled(a: SymmetricOperator, c: float) -> SymmetricOperator:
    """Multiply an operator by a number."""
    require_operator(a, spread=True)
    return a.sandwiched(a.like, lambda v: c * v, lambda v: v)


def shifted(a: SymmetricOperator, c: float | Tensor) -> SymmetricOperator:
    """Add ``c I`` for a number c, or ``diag(c)`` for c of shape ``(P,)``."""
    require_operator(a, spread=True)
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
        a.layout,
        tuple(shifted(draft, c) for draft in a.drafts),
    )
