"""The eigenvalue of largest real part of an operator that is not symmetric, by Arnoldi's method.

The Jacobian of an update that is no gradient (a loss with stop-gradients, two players) has complex eigenvalues, and the
one of largest real part tells growth from decay.  From a random vector the basis V grows by ``J v``, orthogonalized
against everything before (twice), so that

    J V = V H + q bᵀ,    q a unit vector orthogonal to V.

An eigenpair ``H y = μ y`` of the small matrix gives x = V y with ``‖J x - μ x‖ = |bᵀy|``.  A full basis is replaced by
the invariant subspace of H that belongs to its rightmost eigenvalues (Krylov-Schur; Stewart, 2001).

P parameters, m columns in the basis.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..display import progress, report
from ..errors import InvalidType, InvalidValue, NotConverged, NotFinite
from .operators import Linear, without_autocast
from .units import Unit

Matrix = NDArray[np.float64]

SETTLED = 2
"""Products in a row after which the answer has to be within the tolerance, and where it was before."""


@dataclass(frozen=True)
class Rightmost:
    """The eigenvalue of largest real part of a real operator J that need not be symmetric.

    Of a conjugate pair it is the one with positive imaginary part.  `residual` is measured by products of their own at
    the end.  It is a backward error: `value` is an eigenvalue of some J + E with ‖E‖ = residual.  It bounds no distance
    to an eigenvalue of J, since those of an operator that is far from normal move by much more than ‖E‖.
    """

    value: complex
    residual: float  # ‖J x - μ x‖
    vector: Tensor = field(repr=False)  # (P,), complex, of norm one
    num_matvecs: int


@without_autocast()
@progress("rightmost eigenvalue")
def rightmost(
    product: Linear, like: Tensor, *, rtol: float = 1e-3, steps: int = 60, restarts: int = 20, seed: int = 0
) -> Rightmost:
    """Find the eigenvalue of largest real part of the real operator ``v -> J v``, which need not be symmetric [N36].

    Products may be finite differences: with a relative error ε the residual ends near ε ‖J‖, and so it is reported.

    Args:
        product: J v for a vector ``(P,)``.
        like: any vector of the size, dtype and device of v.
        rtol: bound on the residual, relative to the largest eigenvalue in magnitude.
        steps: columns kept in memory before a restart keeps only the best of them.
        restarts: times that this may happen.
        seed: of the random start; torch's global generator is not used.

    Raises:
        NotConverged: with the residual reached.
        NotFinite: a ValueError, for an operator whose products are not finite.
        ValueError: steps, restarts or the size of `like` too small.

    >>> turn = torch.tensor([[1.0, -2.0], [2.0, 1.0]])
    >>> found = rightmost(lambda v: turn @ v, torch.zeros(2))
    >>> round(found.value.real, 3), round(found.value.imag, 3)
    (1.0, 2.0)
    """
    if not callable(product) or hasattr(product, "state_dict"):
        raise InvalidType(
            f"this {type(product).__name__} is no product; pass the function v -> J v, such as f.at(f.weights()).hvp"
        )
    if not isinstance(like, Tensor) or like.dim() != 1 or len(like) == 0 or steps < 4 or restarts < 0:
        raise InvalidValue(
            f"like of shape {tuple(getattr(like, 'shape', ()))} has to be a vector, steps={steps} at least 4 and"
            f" restarts={restarts} no less than 0"
        )
    space = _Arnoldi(product, like, steps, seed)
    answers: list[complex] = []
    while True:
        space.multiply()
        ritz = space.ritz()
        report(space.products, residual=float(ritz.residuals[0]) / (space.scale or 1.0))
        bound = max(rtol * np.abs(ritz.values).max(), 32 * space.eps * space.scale)
        met = ritz.residuals[0] <= bound
        answers = [*answers, ritz.values[0]] if met else []
        settled = len(answers) > SETTLED and abs(answers[-1] - answers[-1 - SETTLED]) <= bound
        if space.complete or settled:
            return space.answer(ritz)
        if space.size == space.columns:
            if restarts == 0:
                raise space.not_converged(ritz, bound)
            restarts -= 1
            space.restart()


class _Ritz(NamedTuple):
    """The eigenpairs of H, rightmost first."""

    values: NDArray[np.complex128]  # (m,)
    vectors: NDArray[np.complex128]  # (m, m), columns of norm one
    residuals: Matrix  # (m,)


class _Arnoldi:
    """A Krylov space from a random vector: rows of a basis V, and ``H = V J Vᵀ`` with one more row for what is left."""

    def __init__(self, product: Linear, like: Tensor, steps: int, seed: int) -> None:
        self.product, self.unit = product, Unit()
        self.columns = min(steps, len(like))
        self.size = self.products = 0
        self.eps = torch.finfo(like.dtype).eps
        self.v = like.new_empty((self.columns + 1, len(like)))
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(len(like), generator=generator, dtype=torch.float64)
        self.v[0] = (start / start.norm()).to(like)
        self.h = np.zeros((self.columns + 1, self.columns))
        self.complete = False  # J maps the space into itself

    @property
    def scale(self) -> float:
        """The largest norm of a product."""
        return float(np.linalg.norm(self.h[:, : self.size], axis=0).max())

    def multiply(self) -> None:
        """Multiply the last vector of the basis, and add what is new in the product."""
        m = self.size
        rest = self.apply(self.v[m])
        for _ in range(2):
            overlap = self.v[: m + 1] @ rest
            rest = rest - overlap @ self.v[: m + 1]
            self.h[: m + 1, m] += overlap.double().cpu().numpy()
        size = rest.norm().item()
        self.h[m + 1, m] = size
        self.size = m + 1
        self.complete = self.size == self.v.shape[1] or size <= 32 * self.eps * self.scale
        if not self.complete:
            self.v[m + 1] = rest / size

    def apply(self, v: Tensor) -> Tensor:
        """Multiply a vector, in units that are near the size of J."""
        image = self.product(v)
        self.products += 1
        if not bool(image.isfinite().all()):
            raise NotFinite("a product with the operator is not finite: its eigenvalues are not defined here")
        return self.unit.of(image.detach())

    def ritz(self) -> _Ritz:
        """Find the eigenpairs of H."""
        m = self.size
        values, vectors = np.linalg.eig(self.h[:m, :m])
        order = np.lexsort((-values.imag, -values.real))
        values, vectors = values[order].astype(complex), vectors[:, order].astype(complex)
        return _Ritz(values, vectors, np.abs(self.h[m, :m] @ vectors))

    def restart(self) -> None:
        """Keep the invariant subspace of H that belongs to its rightmost third of eigenvalues."""
        m = self.size
        q, keep = _rightmost_first(self.h[:m, :m], m // 3)
        turned = self.h[: m + 1, :m] @ q[:, :keep]
        self.v[:keep] = torch.as_tensor(q[:, :keep].T).to(self.v) @ self.v[:m]
        self.v[keep] = self.v[m]
        self.h[:] = 0
        self.h[:keep, :keep] = q[:, :keep].T @ turned[:m]
        self.h[keep, :keep] = turned[m]
        self.size = keep

    def not_converged(self, ritz: _Ritz, bound: float) -> NotConverged:
        """Say how far the first pair has come."""
        value, unit = complex(ritz.values[0]) * self.unit.size, self.unit.size
        return NotConverged(
            f"the residual of {value:.4g} is {ritz.residuals[0] * unit:.2g}, above {bound * unit:.2g}, after"
            f" {self.products} products; raise steps, restarts or rtol"
        )

    def answer(self, ritz: _Ritz) -> Rightmost:
        """Form the first vector, and measure its residual and its Rayleigh quotient by products of their own."""
        y = ritz.vectors[:, 0]
        parts = np.stack([y.real, y.imag]) if ritz.values[0].imag else y.real[None]
        x = torch.as_tensor(parts).to(self.v) @ self.v[: self.size]
        x = x / x.norm()
        image = torch.stack([self.apply(part) for part in x]).double()
        x = torch.cat([x, torch.zeros_like(x)])[:2]
        image = torch.cat([image, torch.zeros_like(image)])[:2]
        vector, image = torch.complex(*x.double()), torch.complex(*image)
        value = complex(ritz.values[0])
        residual = (image - value * vector).norm().item()
        return Rightmost(value * self.unit.size, residual * self.unit.size, torch.complex(*x), self.products)


def _rightmost_first(h: Matrix, wanted: int) -> tuple[Matrix, int]:
    """Find an orthogonal matrix whose first columns, `wanted` or one more, span an invariant subspace of `h`.

    One eigenvector after the other, or the two parts of a complex one, is taken out by a reflection: this is stable
    where the eigenvectors of `h` are nearly parallel.
    """
    q = np.eye(len(h))
    done = 0
    while done < wanted:
        rest = (q.T @ h @ q)[done:, done:]
        values, vectors = np.linalg.eig(rest)
        i = np.lexsort((-values.imag, -values.real))[0]
        parts = np.stack([vectors[:, i].real, vectors[:, i].imag], axis=1)[:, : 2 if values[i].imag else 1]
        q[:, done:] = q[:, done:] @ np.linalg.qr(parts, mode="complete")[0]
        done += parts.shape[1]
    return q, done
