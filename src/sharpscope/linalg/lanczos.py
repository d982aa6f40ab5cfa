"""Top eigenpairs of a symmetric operator, with the residuals that say how good they are.

Block Lanczos: from a block Q₀ of b columns the basis grows by ``A Q_j``, orthogonalized against everything before
(twice), so that ``A V = V T + R Eᵀ`` with T the small projected matrix and R the last block's remainder.  A Ritz pair
``(θ, V s)`` of T then has the residual ``‖R s_last‖``, at no further product.  A block as wide as the number of wanted
pairs finds eigenvalues of that multiplicity.

The start is random: that is what bounds the largest eigenvalue from above (`bounds`), and the asymmetry of ``VᵀAV``,
which exact products would not have, shows the rounding of the products.

P parameters, k wanted pairs, m columns in the basis.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..display import progress, report
from ..errors import InvalidValue, NotConverged, NotFinite
from .bounds import RandomStart
from .eigenpairs import CONFIDENCE, Eigenpairs
from .memory import POOL, Memory, Pool
from .operators import SymmetricOperator, require_operator, scaled, without_autocast
from .units import Unit
from .vectors import DRAWN

AT_FIRST = 24
"""Rows that a basis has room for at first."""


@without_autocast()
def lanczos(
    a: SymmetricOperator,
    k: int = 1,
    *,
    rtol: float = 1e-4,
    gap: float = math.inf,
    max_matvecs: int | None = None,
    basis: int = 96,
    seed: int = 0,
) -> Eigenpairs:
    """Find the k algebraically largest eigenpairs of `a` by block Lanczos with thick restarts [N4].

    Args:
        rtol: bound on every residual, relative to the largest eigenvalue in magnitude.  An isolated eigenvalue is
            then right to about rtol² relative to its gap.
        gap: bound on ``upper - values[0]``, relative to the same: go on until nothing larger is likely to exist.
        max_matvecs: products allowed; by default 40 per pair and at least 400.
        basis: columns kept in memory before a restart keeps only the best of them.
        seed: of the random start; torch's global generator is not used.

    Raises:
        NotConverged: with the residuals reached.
        NotFinite: a ValueError, for an operator whose products are not finite.
        ValueError: k outside 1..P.
    """
    budget = max(400, 40 * k) if max_matvecs is None else max_matvecs
    return _block_lanczos(a, k, 0, rtol=rtol, gap=gap, budget=budget, basis=basis, seed=seed)[0]


@without_autocast()
def both_ends(
    a: SymmetricOperator, k: int = 1, low: int = 1, *, rtol: float = 1e-4, seed: int = 0
) -> tuple[Eigenpairs, Tensor]:
    """Find the k largest eigenpairs and the `low` smallest eigenvalues, ascending, in one run.

    The residuals of both meet `rtol`; arguments and errors otherwise as in `lanczos`.
    """
    budget = max(400, 40 * (k + low))
    return _block_lanczos(a, k, low, rtol=rtol, gap=math.inf, budget=budget, basis=96, seed=seed)


@progress("eigenpairs")
def _block_lanczos(
    a: SymmetricOperator, k: int, low: int, *, rtol: float, gap: float, budget: int, basis: int, seed: int
) -> tuple[Eigenpairs, Tensor]:
    require_operator(a, spread=True)
    if not 1 <= k <= a.size:
        raise InvalidValue(f"k={k} eigenpairs asked of an operator of size {a.size}; k lies between 1 and {a.size}")
    if not 0 <= low <= a.size:
        raise InvalidValue(f"{low} smallest eigenvalues asked of an operator of size {a.size}")
    space = _Krylov(a, k, columns=max(basis, 4 * k + low), seed=seed)
    while True:
        space.multiply()
        ritz = space.ritz()
        m = len(ritz.values)
        report(space.products, residual=ritz.residuals[min(k, m) - 1].item() / (ritz.scale or 1.0))
        bound = max(rtol, 8 * space.eps * m**0.5) * ritz.scale
        met = bool((ritz.residuals[:k] <= bound).all() and (ritz.residuals[m - low :] <= bound).all())
        complete = len(ritz.rows) == 0
        upper = space.upper(ritz) if met or complete else math.inf
        if complete or (met and upper - ritz.values[0].item() <= max(gap * ritz.scale, 2 * ritz.floor)):
            unit = space.unit.size
            return space.eigenpairs(ritz, k, upper).scaled(unit), (unit * ritz.values[m - low :].flip(0)).to(a.like)
        if space.products + len(ritz.rows) > budget:
            if met:
                raise space.not_bounded(ritz, upper, gap)
            raise space.not_converged(ritz, k, rtol)
        space.extend(ritz, k, low)


class _Ritz(NamedTuple):
    """The eigenpairs ``(θ, V s)`` of T, largest first, and the next block of the basis."""

    values: Tensor  # θ (m,)
    s: Tensor  # (m, m)
    rows: Tensor  # (b', P), orthonormal
    coefficients: Tensor  # of the remainder in these rows
    coupling: Tensor  # C S (b, m): the part of A V s along the next block
    residuals: Tensor  # (m,)
    scale: float  # the largest magnitude of a Ritz value
    floor: float  # rounding of the products


class _Krylov:
    """A Krylov space from a random block of k columns: rows of a basis V, and ``T = V A Vᵀ`` on those multiplied."""

    def __init__(self, a: SymmetricOperator, k: int, *, columns: int, seed: int) -> None:
        self.unit = Unit()
        self.a = self.unit.applied(a)
        self.columns = min(a.size, columns)  # most rows of the basis, beside a block that has just been found
        block, self.start = _start_block(a, k, seed)
        self.v = a.like.new_empty((min(self.columns, AT_FIRST) + k, len(a.like)))  # grows as it is needed
        self.v[:k] = block.T
        self.t = torch.zeros((self.columns + k, self.columns + k), dtype=torch.float64)
        self.eps = torch.finfo(self.v.dtype).eps
        self.old, self.new = 0, k  # rows [0, old) were multiplied, rows [old, new) are the current block
        self.remainder = self.v[:k]  # the part of the last block's image outside the basis
        self.products = 0
        self.left_out = 0.0  # squared norms of the parts of remainders that were dropped as rounding
        self.asymmetry = 0.0  # largest difference of VᵀAV from its transpose

    def multiply(self) -> None:
        """Multiply the current block, and split the image into its part in the space and the remainder."""
        old, new = self.old, self.new
        image = (self.a @ self.v[old:new].T).T
        self.products += new - old
        expected = self.t[:old, old:new].clone()
        self.remainder = _project_out(self.a, self.v[:new], image, self.t, old, new)
        if not bool(self.t[:new, old:new].isfinite().all()):
            raise NotFinite("a product with the operator is not finite: its curvature is not defined at these weights")
        self.asymmetry = max(self.asymmetry, (self.t[:old, old:new] - expected).norm().item())

    def ritz(self) -> _Ritz:
        """Diagonalize T; residuals follow from the remainder of the current block."""
        values, s = torch.linalg.eigh(self.t[: self.new, : self.new])
        values, s = values.flip(0), s.flip(1)
        scale = values.abs().max().item()
        rows, coefficients, left_out = _orthonormal_rows(
            self.a, self.remainder, self.v[: self.new], 32 * self.eps * scale
        )
        coupling = coefficients @ s[self.old : self.new]
        residuals = (coupling.square().sum(dim=0) + self.left_out).sqrt()
        self.left_out += left_out
        floor = max(self.asymmetry + self.left_out**0.5, 16 * self.eps * scale)
        return _Ritz(values, s, rows, coefficients, coupling, residuals, scale, floor)

    def upper(self, ritz: _Ritz) -> float:
        """Bound λ1 from above with probability `CONFIDENCE`, by the randomness of the start."""
        values, s, coupling = ritz.values.numpy(), ritz.s.numpy(), ritz.coupling.numpy()
        return self.start.upper(values, s, coupling, 1 - CONFIDENCE, ritz.scale) + ritz.floor

    def extend(self, ritz: _Ritz, k: int, low: int) -> None:
        """Take the next block into the basis, after a restart where there is no room for it."""
        size = len(ritz.rows)
        if self.new + size > self.columns:
            self.restart(ritz, k, low)
        else:
            block = slice(self.new - len(ritz.coefficients), self.new)
            self.t[block, self.new : self.new + size] = ritz.coefficients[:size].T
            self.old = self.new
        self.new = self.old + size
        if self.new > len(self.v):
            grown = self.v.new_empty((min(2 * len(self.v), self.columns + size), len(self.a.like)))
            grown[: self.old] = self.v[: self.old]
            self.v = grown
        self.v[self.old : self.new] = ritz.rows

    def restart(self, ritz: _Ritz, k: int, low: int) -> None:
        """Keep only the best Ritz vectors of either end; the next block couples to all of them."""
        m, size = len(ritz.values), len(ritz.rows)
        keep = min(m - 1, max(k + low + 2, self.columns // 2), self.columns - size)
        top = torch.arange(keep - low)
        order = torch.cat([top, torch.arange(m - low, m), torch.arange(keep - low, m - low)])
        values, s, coupling = ritz.values[order], ritz.s[:, order], ritz.coupling[:size, order]
        self.start.restart(values.numpy(), s.numpy(), coupling.numpy(), keep)
        turn = s[:, :keep].T.to(self.v)
        for part in self.v.split(DRAWN, dim=1):
            part[:keep] = turn @ part[:m]
        self.t.zero_()
        self.t[:keep, :keep] = torch.diag(values[:keep])
        self.t[:keep, keep : keep + size] = coupling[:, :keep].T
        self.old = keep

    def not_converged(self, ritz: _Ritz, k: int, rtol: float) -> NotConverged:
        """Say how large the residuals still are."""
        residuals, scale = (self.unit.size * ritz.residuals[:k]).tolist(), self.unit.size * ritz.scale
        return NotConverged(
            f"top-{k} residuals {residuals} exceed rtol={rtol:g} times {scale:.4g} after {self.products} products;"
            " raise max_matvecs or rtol"
        )

    def not_bounded(self, ritz: _Ritz, upper: float, gap: float) -> NotConverged:
        """Say how far above the largest Ritz value the bound still lies."""
        value, most, scale = (self.unit.size * x for x in (ritz.values[0].item(), upper, ritz.scale))
        return NotConverged(
            f"λ1 = {value:.6g} may be {most:.6g}, which exceeds gap={gap:g} times {scale:.4g}, after {self.products}"
            " products; raise max_matvecs or gap"
        )

    def eigenpairs(self, ritz: _Ritz, k: int, upper: float) -> Eigenpairs:
        """Form the vectors of the first k Ritz pairs, and those that a warm start remembers beyond them."""
        m = min(k + POOL, len(ritz.values))
        values = ritz.values[:m]
        vectors = (ritz.s[:, :m].T.to(self.v) @ self.v[: self.new]).T
        outside = ritz.rows.T @ ritz.coupling[: len(ritz.rows), :m].to(self.v)
        memory = None
        if self.a.layout is None:
            pool = Pool.of(vectors, values.to(self.v) * vectors + outside, values)
            memory = Memory(pool, Pool.of(vectors[:, :0], vectors[:, :0], values[:0]), k=k)
        return Eigenpairs(
            values[:k].to(self.v),
            vectors[:, :k],
            ritz.residuals[:k].to(self.v),
            self.products,
            upper=upper,
            floor=ritz.floor,
            num_gradients=self.products * self.a.cost,
            memory=memory,
        )


def _start_block(a: SymmetricOperator, k: int, seed: int) -> tuple[Tensor, RandomStart]:
    """Draw orthonormal columns ``(P, k)`` that span Gaussian ones, and express these in them."""
    q, r = a.qr(a.gaussian(k, torch.Generator().manual_seed(seed)))
    return q, RandomStart(r.double().cpu().numpy())


def _project_out(a: SymmetricOperator, v: Tensor, image: Tensor, t: Tensor, old: int, new: int) -> Tensor:
    """Remove the span of the basis from `image`, and write the new columns of T.

    Done twice, for orthogonality to rounding.
    """
    h = a.inner(v, image)
    rest = image - h.T.to(v) @ v
    again = a.inner(v, rest)
    rest = rest - again.T.to(v) @ v
    columns = h + again
    t[:new, old:new] = columns
    t[old:new, :new] = columns.T
    t[old:new, old:new] = (columns[old:] + columns[old:].T) / 2
    return rest


def _orthonormal_rows(a: SymmetricOperator, rest: Tensor, v: Tensor, small: float) -> tuple[Tensor, Tensor, float]:
    """Find rows that span `rest` but for directions of norm up to `small`, with the coefficients of `rest` in them.

    The coefficients ``C (b, b)`` give ``‖C s‖ = ‖restᵀ s‖``; the last number is the squared norm of what was left out.
    """
    tiny = torch.finfo(rest.dtype).tiny
    if len(rest) == 1:
        size = a.length(rest[0])
        rows = rest / max(size, tiny)
        rows = rows - a.inner(rows, v).to(v) @ v
        rows = rows / max(a.length(rows[0]), tiny)
        coefficients = torch.full((1, 1), size, dtype=torch.float64)
        return rows[: int(size > small)], coefficients, 0.0 if size > small else size**2
    q, r = a.qr(rest.T)
    turn, norms, coefficients = torch.linalg.svd(r.double().cpu())
    keep = norms > max(small, tiny)
    rows = (q @ turn[:, keep].to(q)).T
    for _ in range(2):
        rows = rows - a.inner(rows, v).to(v) @ v
        q, r = a.qr(rows.T)
        rows = (q * r.diagonal().sign()).T  # Q R with R ≈ 1: the rows keep their signs, as the coefficients do
    return rows, norms[:, None] * coefficients, norms[~keep].square().sum().item()


def smallest_eigenpairs(a: SymmetricOperator, k: int = 1, **options: Any) -> Eigenpairs:
    """Find the k algebraically smallest eigenpairs, smallest first: `lanczos` on ``-A``, its options and errors [N4].

    Bounds and memory, which are those of ``-A``, are left out; `both_ends` finds values at both ends in one run.
    """
    require_operator(a, spread=True)
    found = lanczos(scaled(a, -1), k, **options)
    return replace(found, values=-found.values, upper=math.inf, memory=None)
