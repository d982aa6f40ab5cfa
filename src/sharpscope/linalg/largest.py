"""The largest eigenvalue alone, from one Krylov space, stopped when the error of the value is small enough.

An eigenvalue converges like the square of its vector.  With θ the largest Ritz value, r its residual and θ' the next
one, ``r²/(θ - θ')`` estimates what θ lacks, so that a residual of a few percent is enough for a value to three digits,
where `lanczos` goes on until the vector is good and nothing larger is likely to exist.  The estimate takes θ' for the
next eigenvalue, which it is not while two that are close look like one: their mixture has a residual of up to half of
their distance.  So the residual has to be small by itself, too.

The start is Gaussian plus a vector that points to what is looked for, such as the gradient, at the same length.  For a
bound from above the start may be shifted: by Anderson's inequality a shift that does not depend on the random numbers
lowers ``P(|uᵀ start| < δ)``, so that the bound of `bounds` is true with the Gaussian's own δ.

Vectors are orthogonalized against the two before them.  That is enough until a Ritz pair has converged to about √eps
(Paige): only then the whole basis is gone through, or, where none is kept, is the bound from above given up.

Where the operator has drafts, all products but the first are those of one that agrees with it there [N38].  Errors E of
the products turn the vector by E over the gap, and change its Rayleigh quotient by the square of that.  So the vector
comes from the draft, and value, residual and bound from below from one product of the operator with it.  If that
residual is too large for the error that is allowed, the operator itself goes on from the vector.

P parameters, m rows in the basis.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..display import progress, report
from ..errors import InvalidValue, NotConverged, NotFinite, OutOfTime
from .bounds import RandomStart
from .eigenpairs import CONFIDENCE, Eigenpairs
from .operators import SymmetricOperator, require_operator, without_autocast
from .units import Unit
from .vectors import DRAWN

Matrix = NDArray[np.float64]

ROOM = 2**30
"""Bytes that a basis may take by default."""

FEWEST, MOST = 8, 96
"""Rows of the smallest and the largest basis that is kept."""

BLOCK = 8
"""Rows of the basis that are allocated at once."""

LOOSEST = 0.3
"""Largest residual, relative to the largest magnitude of a Ritz value, with which an estimate is believed."""

RESOLVED, FINEST = 3.0, 1e-3
"""Largest residual at the end, in errors that are allowed, and relative to the value where that is less."""

PRUDENCE = 0.3
"""Part of the error that is allowed at which the estimate stops the solver."""

LIKELY = 0.95
"""Probability with which nothing may be far above the answer before it is given."""

FAR = 0.25
"""Distance above the answer, relative to it, that is far."""

GOOD, USABLE = 0.01, 0.05
"""Errors of a draft at the start, relative to the product there: with which it is taken at once, and at most."""

TIMES = 3.0
"""Error of a draft where it was not measured, over the one at the start."""

LOST = 0.03
"""Product of two rows that is too large for drafts."""

SMALL = 1e-3
"""Size of the largest eigenvalue, relative to the largest in magnitude, from which on errors are relative to it."""


@without_autocast()
@progress("largest eigenpair")
def largest_eigenpair(
    a: SymmetricOperator,
    toward: Tensor | None = None,
    *,
    error: float = 1e-3,
    weight: float = 1.0,
    gap: float = FAR,
    vectors: bool = True,
    basis: int | None = None,
    max_matvecs: int = 400,
    seed: int = 0,
) -> Eigenpairs:
    """Find the largest eigenvalue of `a` to a relative error of about `error`, from one Krylov space [N4].

    The error is an estimate: of eigenvalues near the largest one, another may be found where the start hardly sees it,
    or a mixture of those that are nearer than about three times the error.  How far above the answer λ1 may be at most
    is `upper`.

    Args:
        toward: a vector ``(P,)`` that may have a part along the eigenvector, such as the gradient.
        error: estimated error of the value, relative to it (or to a thousandth of the largest in magnitude).
        weight: length of `toward` in the start, relative to its random part.
        gap: distance above the value, relative to the same, at which nothing may be with probability `LIKELY`.
        vectors: whether the vector is wanted, too; without it, and without drafts, three vectors of memory are enough.
        basis: rows in memory before a restart keeps only the best of them; by default as many as `ROOM` bytes hold.
        max_matvecs: products allowed, those of drafts among them.
        seed: of the random start; torch's global generator is not used.

    Raises:
        NotConverged: with the estimate reached.  Where a product of the operator raises OutOfTime, what has been found
            by then is returned, with its residual as its error, if this is an estimate at all.
        NotFinite: a ValueError, for an operator whose products are not finite.
    """
    require_operator(a, spread=True)
    if not error > 0:
        raise InvalidValue(f"error={error}: give the relative error that is enough, such as 1e-3")
    if toward is not None and toward.shape != a.like.shape:
        raise InvalidValue(
            f"a start of shape {tuple(toward.shape)} for an operator of size {a.size}; give ({len(a.like)},)"
        )
    rows = _rows(a.like, basis, least=FEWEST if vectors else 0)
    if not vectors and (rows < FEWEST or not a.drafts):
        rows = 0
    found = _solved(a, toward, weight, rows, seed, _Wanted(error, gap, max_matvecs))
    return found if vectors else replace(found, vectors=found.vectors[:, :0])


class _Wanted(NamedTuple):
    """The accuracy that ends a solve, and the products after which it is given up."""

    error: float
    gap: float
    max_matvecs: int


def _solved(
    a: SymmetricOperator, toward: Tensor | None, weight: float, rows: int, seed: int, wanted: _Wanted
) -> Eigenpairs:
    """Find the largest eigenpair, with a basis of so many rows or none."""
    unit = Unit()
    space = _Krylov(unit.applied(a), toward, weight, rows, seed)
    ritz: _Ritz | None = None
    while True:
        try:
            space.multiply()
        except OutOfTime:  # what has been found is worth its residual: the estimate needs a Ritz value that stands out
            if ritz is None or not space.believed(ritz) or not space.shrink(ritz):
                raise
            return space.unfinished(ritz).scaled(unit.size)
        ritz = space.ritz()
        report(space.products, residual=float(ritz.residuals[0]) / (ritz.scale or 1.0))
        if space.done(ritz, wanted):
            break
        if space.products >= wanted.max_matvecs:
            raise NotConverged(
                f"λ1 = {unit.size * ritz.values[0]:.6g} is known to about {unit.size * ritz.error:.2g} after"
                f" {space.products} products, not to {wanted.error:g} of it; raise max_matvecs or error"
            )
        space.extend(ritz)
    if space.draft is None:
        return space.answer(ritz).scaled(unit.size)
    try:
        ritz = space.confirmed(ritz)
        if ritz.error <= space.allowed(ritz, wanted.error):
            return space.answer(ritz).scaled(unit.size)
        left = wanted._replace(max_matvecs=max(1, wanted.max_matvecs - space.products))
        found = _solved(replace(a, drafts=()), space.vector, 1.0, rows, seed + 1, left)  # a start with its own numbers
    except OutOfTime:
        return space.unfinished(ritz).scaled(unit.size)
    products, gradients = found.num_matvecs + space.products, found.num_gradients + space.gradients
    return replace(found, num_matvecs=products, num_gradients=gradients)


def gaussian(a: SymmetricOperator, seed: int) -> Tensor:
    """Draw standard normal numbers ``(P,)`` for an operator, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return a.drawn(1, lambda shape: torch.randn(shape, generator=generator, dtype=a.like.dtype))[:, 0]


def _rows(like: Tensor, basis: int | None, least: int) -> int:
    """Count the rows of a basis that is kept."""
    fitting = ROOM // (like.numel() * like.element_size()) if basis is None else basis
    return min(max(fitting, least), MOST)


class _Ritz(NamedTuple):
    """Ritz values, largest first, with the vectors of T and the residuals; and what the first one may lack."""

    values: Matrix  # (m,)
    s: Matrix  # (m, m)
    residuals: Matrix  # (m,)
    scale: float  # the largest magnitude of a value
    error: float  # estimated, of the first value


def _missing(values: Matrix, residual: float) -> float:
    """Estimate what the first value lacks."""
    gap = float(values[0] - values[min(1, len(values) - 1)])
    return float(min(residual, residual**2 / gap) if gap > 0 else residual)


class _Krylov:
    """A Krylov space from one vector: orthonormal rows, of which the last is about to be multiplied, and T = V A Vᵀ.

    With `most` = 0 only the last two rows are kept.
    """

    def __init__(self, a: SymmetricOperator, toward: Tensor | None, weight: float, most: int, seed: int) -> None:
        self.a = a
        start = gaussian(a, seed)
        if toward is not None and 0 < (size := a.length(toward)) < math.inf:
            start.add_(toward, alpha=weight * a.length(start) / size)
        size = a.length(start)
        self.start = RandomStart(np.array([[size]]))
        self.basis = _Basis(a, min(most, a.size)) if most else None
        self.drafts = a.drafts if self.basis else ()
        self.draft: SymmetricOperator | None = None  # the one whose products are taken
        self.off = 0.0  # its error
        self.first: Tensor | None = None  # what the operator makes of the first row, where there is a draft
        self.vector: Tensor | None = None  # the first one, where it was confirmed
        self.row = self._place(start.div_(size))
        self.before: Tensor | None = None  # the row before it, unless a restart is between
        self.coupling = np.zeros(0)  # the part of A row along each row before it
        self.t = np.zeros((0, 0))
        self.remainder = start  # of the last product outside the space, and its length
        self.beta = 0.0
        self.products = 0
        self.gradients = 0.0
        self.asymmetry = 0.0
        self.eps = torch.finfo(a.like.dtype).eps
        self.loss = np.zeros(0)  # estimated products of the last row with those before it
        self.loss_before = np.zeros(0)  # and of the row before it
        self.due = 0  # rows, from the next one on, that are orthogonalized against the whole basis
        self.bounded = True  # whether the space is orthogonal enough for a bound from above

    def _place(self, v: Tensor) -> Tensor:
        if self.basis is None:
            return v
        return self.basis.next().copy_(v)

    def multiply(self) -> None:
        """Multiply the last row, and split the image into its part in the space and the remainder."""
        v = self.row
        image = self._image(v)
        alpha = self.a.dot(v, image)
        w = torch.sub(image, v, alpha=alpha)
        del image
        if self.before is not None:
            found = self.a.dot(self.before, w)
            self.asymmetry = max(self.asymmetry, abs(found - self.coupling[-1]))
            w.sub_(self.before, alpha=found)
        self.beta = self.a.length(w)
        loss = self._coming_loss(alpha)
        limit = self.eps**0.5 / 2 if self.draft is None else LOST
        if self.due == 0 and float(np.abs(loss).max(initial=0.0)) > limit:
            self.due = 2
            self.bounded = self.basis is not None
        if self.due and self.basis is not None:
            self.basis.remove(w)
            self.beta = self.a.length(w)
            self.due -= 1
            loss = np.full_like(loss, 2 * self.eps)
        if not math.isfinite(alpha) or not math.isfinite(self.beta):
            raise NotFinite("a product with the operator is not finite: its curvature is not defined at these weights")
        self.t = np.block([[self.t, self.coupling[:, None]], [self.coupling[None], np.array([[alpha]])]])
        self.remainder = w
        self.loss, self.loss_before = loss, np.append(self.loss, 1.0)

    def _image(self, v: Tensor) -> Tensor:
        """Multiply a row by the draft, or by the operator: the first, to choose the draft by it."""
        if self.draft is not None:
            return self._product(self.draft, v)
        image = self._product(self.a, v)
        if self.products == 1 and self.drafts:
            self._choose(v, image)
        return image

    def _product(self, a: SymmetricOperator, v: Tensor) -> Tensor:
        image = a.matvec(v)
        self.products += 1
        self.gradients += a.cost
        return image

    def _choose(self, v: Tensor, image: Tensor) -> None:
        """Take the first draft whose product with the first row is good, or the best that is usable."""
        size = self.a.length(image)
        self.off = math.inf
        for draft in self.drafts:
            off = self.a.length(self._product(draft, v).sub_(image))
            if off < self.off:
                self.draft, self.off = draft, off
            if off <= GOOD * size or not off < size:
                break
        if self.off <= USABLE * size:
            self.first = image.clone()
        else:
            self.draft, self.off = None, 0.0

    def _coming_loss(self, alpha: float) -> Matrix:
        """Estimate the products of the next row with all rows so far, as rounding grows in the recurrence (Simon)."""
        rows = len(self.t)
        if rows == 0 or self.beta == 0:
            return np.full(rows + 1, self.eps)
        now = self.loss  # with rows before the last one
        turned = self.t @ now - alpha * now
        if self.before is not None:
            turned += self.coupling - self.coupling[-1] * self.loss_before
        scale = max(float(np.abs(self.t).max()), abs(alpha), self.beta)
        grown = turned / self.beta
        noise = 2 * self.eps * scale + self.asymmetry
        return np.append(grown + np.copysign(noise / self.beta, grown), self.eps)

    def ritz(self) -> _Ritz:
        """Diagonalize T; residuals follow from the remainder."""
        values, s = np.linalg.eigh(self.t)
        values, s = values[::-1], s[:, ::-1]
        scale = float(np.abs(values).max())
        residuals = self.beta * np.abs(s[-1])
        return _Ritz(values, s, residuals, scale, _missing(values, residuals[0]))

    def confirmed(self, ritz: _Ritz) -> _Ritz:
        """Replace value and residual of the first pair, which a draft found, by those of the operator itself."""
        assert self.basis is not None
        v = self.basis.combined(ritz.s[:, :1].T)[0]
        v /= self.a.length(v)
        image = self._product(self.a, v)
        value = self.a.dot(v, image)
        if self.first is not None:
            self.asymmetry = abs(self.a.dot(self.basis.blocks[0][0], image) - self.a.dot(self.first, v))
        residual = self.a.length(image.sub_(v, alpha=value))
        self.vector, self.off = v, max(self.off, math.sqrt(max(residual**2 - ritz.residuals[0] ** 2, 0.0)))
        values, residuals = ritz.values.copy(), ritz.residuals.copy()
        values[0], residuals[0] = value, residual
        return _Ritz(values, ritz.s, residuals, ritz.scale, _missing(values, residual))

    def done(self, ritz: _Ritz, wanted: _Wanted) -> bool:
        """Say whether the estimate is small enough, and nothing is likely to be far above; or the space complete."""
        if self._complete(ritz):
            return True
        size = self._size(ritz)
        if not self.believed(ritz) or ritz.error > self.allowed(ritz, wanted.error):
            return False
        if ritz.residuals[0] > max(RESOLVED * wanted.error, FINEST) * size:
            return False
        far = ritz.values[0] + wanted.gap * size
        return wanted.gap == math.inf or not self.bounded or self._upper(ritz, 1 - LIKELY) <= far

    def allowed(self, ritz: _Ritz, error: float) -> float:
        """Return the estimated error at which the solver stops."""
        return max(PRUDENCE * error * self._size(ritz), 8 * self.eps * ritz.scale)

    def _size(self, ritz: _Ritz) -> float:
        """Return what errors are relative to."""
        return max(abs(float(ritz.values[0])), SMALL * ritz.scale)

    def believed(self, ritz: _Ritz) -> bool:
        """Say whether the estimate of the error means something."""
        return len(ritz.values) >= 3 and bool(ritz.residuals[0] <= LOOSEST * ritz.scale)

    def shrink(self, ritz: _Ritz) -> bool:
        """Take back the last `extend`, whose row was never multiplied; say whether that can be done."""
        if self.basis is not None:
            self.basis.size -= 1
        return len(self.t) == len(ritz.values)

    def _complete(self, ritz: _Ritz) -> bool:
        return self.beta <= 32 * self.eps * ritz.scale or len(ritz.values) == self.a.size

    def _upper(self, ritz: _Ritz, p: float) -> float:
        coupling = self.beta * ritz.s[-1:]
        return self.start.upper(ritz.values, ritz.s, coupling, p, ritz.scale)

    def extend(self, ritz: _Ritz) -> None:
        """Take the remainder into the space, after a restart where there is no room for it."""
        coupling = self.beta * ritz.s[-1]
        if self.basis is not None and self.basis.size == self.basis.most:
            keep = self.basis.most // 2
            self.start.restart(ritz.values, ritz.s, coupling[None], keep)
            self.basis.keep(ritz.s[:, :keep].T)
            self.t, self.coupling, self.before = np.diag(ritz.values[:keep]), coupling[:keep], None
            self.loss, self.due, self.first = np.full(keep, self.eps), 2, None
        else:
            self.coupling = np.append(np.zeros(len(self.t) - 1), self.beta)
            self.before = self.row
        self.row = self._place(self.remainder.div_(self.beta))

    def answer(self, ritz: _Ritz) -> Eigenpairs:
        """Form the first pair, with its bounds."""
        like = self.a.like
        floor = max(self.asymmetry, 16 * self.eps * ritz.scale)
        vectors = like.new_empty((like.numel(), 0))
        if self.vector is not None:
            vectors = self.vector[:, None]
        elif self.basis is not None:
            vectors = self.basis.combined(ritz.s[:, :1].T).T
        return Eigenpairs(
            like.new_tensor(ritz.values[:1].copy()),
            vectors,
            like.new_tensor(ritz.residuals[:1].copy()),
            self.products,
            upper=self._upper(ritz, 1 - CONFIDENCE) + max(floor, self.off) if self.bounded else math.inf,
            floor=floor,
            num_gradients=self.gradients,
            error=ritz.error,
        )

    def unfinished(self, ritz: _Ritz) -> Eigenpairs:
        """Form the first pair with its residual as its error, and that of a draft, which was not confirmed, on top."""
        found, residual = self.answer(ritz), float(ritz.residuals[0])
        if self.vector is None and self.draft is not None:
            residual += TIMES * self.off
            found = replace(found, residuals=found.residuals.new_tensor([residual]), floor=residual)
        return replace(found, error=residual)


class _Basis:
    """Up to `most` rows of length P, allocated a block at a time."""

    def __init__(self, a: SymmetricOperator, most: int) -> None:
        self.a = a
        self.like = a.like
        self.most = most
        self.size = 0
        self.blocks: list[Tensor] = []

    def next(self) -> Tensor:
        """Return the place of the next row ``(P,)``."""
        block, row = divmod(self.size, BLOCK)
        if block == len(self.blocks):
            self.blocks.append(self.like.new_empty((min(BLOCK, self.most - self.size), self.like.numel())))
        self.size += 1
        return self.blocks[block][row]

    def components(self, v: Tensor) -> Tensor:
        """Multiply all rows with a vector, ``(m,)``."""
        return self.a.sum(torch.cat([torch.mv(rows, v) for rows in self._rows()]))

    def remove(self, v: Tensor) -> Tensor:
        """Remove the span of the rows from `v`, in place; return the components that it had."""
        found = self.components(v)
        for rows, part in zip(self._rows(), found.split(BLOCK), strict=True):
            v.addmv_(rows.T, part, alpha=-1)
        return found

    def combined(self, s: Matrix) -> Tensor:
        """Combine the rows with coefficients ``(j, m)`` to ``(j, P)``."""
        out = self.like.new_zeros((len(s), self.like.numel()))
        for i, rows in enumerate(self._rows()):
            out.addmm_(torch.from_numpy(s[:, BLOCK * i : BLOCK * i + len(rows)].copy()).to(rows), rows)
        return out

    def keep(self, s: Matrix) -> None:
        """Replace the rows by combinations of them with coefficients ``(j, m)``, in place."""
        turn = torch.from_numpy(s.copy()).to(self.like)
        for start in range(0, self.like.numel(), DRAWN):
            part = slice(start, start + DRAWN)
            new = turn @ torch.cat([rows[:, part] for rows in self._rows()])
            for i, rows in enumerate(self._rows()):
                count = len(new) - BLOCK * i
                if count > 0:
                    rows[:count, part] = new[BLOCK * i : BLOCK * i + BLOCK]
        self.size = len(s)

    def _rows(self) -> list[Tensor]:
        return [rows[: self.size - BLOCK * i] for i, rows in enumerate(self.blocks) if self.size > BLOCK * i]
