"""Top eigenpairs of an operator that changes a little from call to call, as along training.

A call is Rayleigh-Ritz with exact products, from remembered vectors, widened until the residuals are small.  What is
remembered beyond the wanted pairs keeps it from following the wrong eigenvalue.

Old images: ``A_s w`` from an earlier call s, for each remembered w.  To first order a product with one vector corrects
the whole matrix Wᵀ A W, so the Ritz pairs of old and new images together predict the next call (`_updated`), weigh the
directions of a residual by their distance from the eigenvalue (`_corrected`), and their misfit to new products measures
how fast the operator moves: the `drift` ``‖(A_t - A_s) w‖/(t - s)``.

Two calls: at the edge of stability weights oscillate with period two, A_t is 20 % from A_{t-1} and 1 % from A_{t-2}.
The memory whose images predict ``A_t v`` better is the one used.

Two products a call look for eigenvalues that rise.  One revisits a remembered vector: one that may have overtaken by
its drift or by the rate at which it rose, else the one that may have come the largest part of the distance.  The other
serves in turn the residual of a remembered vector that has not converged and a search: a Krylov space from a random
start, orthogonal to all that is remembered, one product a call, in the three vectors of locally optimal conjugate
gradients.  In n calls it amplifies an eigenvalue a part γ of the spread above the bulk by Tₙ(1 + 2γ) ~ exp(2n √γ)/2
against the bulk, the 1/√P of a random start included after n = ln(6√P)/(2√γ), with probability as in `bounds`.  So what
rises from the bulk to the top in no fewer than about 2n calls is found on its way (of the tested rises: .4 of λ1 in 13
calls, P = 300, n = 8).

The search cannot find what comes faster: within the space of one search, on vectors that are not remembered, while the
remembered ones hardly move.  If they move by more than a tenth of λ1 in a call, there is a solve from a random start,
and so there is every `verify` calls, which gives a bound from above.  Nor can one tell at once which of a continuum is
the k-th: an eigenvalue that leaves the bulk while the k-th lies at its edge is found 5 to 10 calls late.

Vectors of length P are read once to take inner products and once to form what is remembered.  In between, everything
is known by coefficients, and solved with small matrices in double precision.  Only residuals of wanted pairs are formed
on the way: a small one, as a difference of inner products, would keep half of its digits.

P parameters, k wanted pairs, m remembered ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import NotFinite
from .eigenpairs import Eigenpairs
from .lanczos import lanczos
from .memory import POOL, Memory, Numbers, Pool
from .operators import SymmetricOperator, require_operator, without_autocast
from .units import Unit, power_of_two

MAX_DRIFT = 0.1
"""Drift, relative to the largest eigenvalue, above which nothing is predicted."""

DRIFT_FRACTION = 0.5
"""Part of the drift by which an eigenvalue moves in a call; the moves of n calls add like √n where no rate is known."""

UNCONVERGED = 0.02
"""Residual, relative to the largest eigenvalue, above which a remembered pair is worth a product with its residual."""

ASSUMED_RATE = 2e-3
"""Rise per call, relative to the largest eigenvalue, that is allowed for where none was measured."""

UNIT_CHANGE = 2.0**20
"""Size of the largest remembered value, in units and either side of one, up to which the unit is kept."""

SEARCH_GROWTH = 0.6
"""The 2√γ of eigenvalues that a search is to find: it ends after ln(6√P)/SEARCH_GROWTH products."""


@without_autocast()
def warm_started(
    a: SymmetricOperator,
    last: Eigenpairs | Memory | None = None,
    k: int = 1,
    *,
    above: float | None = None,
    rtol: float = 3e-3,
    verify: int = 100,
    seed: int = 0,
) -> Eigenpairs:
    """Find the k largest eigenpairs of `a`, starting from those of a nearby operator [N22].

    Args:
        last: what the last call returned, or the memory in it; None at the first.
        above: widen k until every eigenvalue above this is among the pairs, and let it fall back to k.
        rtol: bound on every residual, relative to the largest eigenvalue in magnitude.
        verify: calls between solves from a random start.
        seed: of the random starts; pass the step, so that they differ.

    Raises:
        NotConverged, NotFinite, ValueError: as `lanczos`, which also takes over where the memory does not help.
    """
    require_operator(a)
    memory = last.memory if isinstance(last, Eigenpairs) else last
    target = _Target(a, k, above, rtol, seed)
    if memory is None or memory.last.vectors.shape[1] != a.size:
        return target.solve(k, gap=rtol / 3)
    memory = _in_near_unit(memory, a.like.dtype)
    unit = Unit(memory.unit)
    within = replace(target, unit=memory.unit)
    k = k if above is None else max(k, memory.k)
    space = _Space(unit.applied(a), memory.before if memory.lag == 2 else memory.last)
    start = _start(space, memory, within, k)
    space.add(torch.cat([space.pool.vectors[start.chosen], start.search]))
    if unit.size != memory.unit:  # the operator has quite another size: nothing is left of it
        return target.solve(target.k, gap=rtol / 3, spent=space.products)
    return _continued(space, start, memory, within, k, verify).scaled(unit.size)


def _in_near_unit(memory: Memory, dtype: torch.dtype) -> Memory:
    """Express a memory in a power of two that is near its values."""
    size = float(np.abs(memory.last.values).max())
    near = size == 0 or 1 / UNIT_CHANGE < size < UNIT_CHANGE
    return memory.in_unit(power_of_two(memory.unit if near else memory.unit * size, dtype))


def _continued(space: "_Space", start: "_Start", memory: Memory, target: "_Target", k: int, verify: int) -> Eigenpairs:
    """Go on from the first products, all in units of the memory."""
    lag = start.lag
    drift, rates = _change(space, start.chosen, lag)
    drift = min(drift, space.ritz.scale)  # of an operator that was larger, too
    unreliable = drift > MAX_DRIFT * space.ritz.scale and len(space.pool.values) < space.a.size
    unverified = memory.unverified + 1 / verify
    products, solved = 0, None
    searched = len(start.search) if start.unconverged is None else 0
    if unreliable or unverified >= 1:
        solved = target.solve(k, gap=3 * target.rtol)
        assert solved.memory is not None
        new = solved.memory.in_unit(1.0)
        products, unverified = space.products, 0.0
        k = max(k, new.k)
        lag = 0 if unreliable else lag
        space = _Space(space.a, new.last if unreliable else space.pool)
        space.append(list(new.last.vectors), list(new.last.images))
        searched, rates = 0, rates[:0]  # the space has none of these vectors
    found = _converged(space, target, k)
    products += space.products
    if found is None:
        products += solved.num_matvecs if solved else 0
        return target.solve(target.k, gap=target.rtol / 3, spent=products)
    best, moved = _better_lag(found, memory)
    drift = drift if best in (0, memory.lag) else moved
    updated = _updated(space, slice(len(start.chosen), len(start.chosen) + searched), rates, k=found.k, lag=lag)
    now = Memory(updated, memory.last, lag=best, unverified=unverified, k=found.k, drift=drift)
    return found.eigenpairs(products, space.a.cost, solved, now)


@dataclass(frozen=True)
class _Target:
    """The pairs that are wanted: at least k, and all above a limit, to a tolerance; answers are multiples of `unit`."""

    a: SymmetricOperator
    k: int
    above: float | None
    rtol: float
    seed: int
    unit: float = 1.0

    @property
    def limit(self) -> float:
        """The value above which everything is wanted."""
        return math.inf if self.above is None else self.above / self.unit

    def count(self, values: Numbers, k: int) -> int:
        """Count the pairs that are wanted of all those with these values: k, or more that lie above the limit."""
        return max(k, int((values >= self.limit).sum()))

    def lowest(self, values: Numbers, k: int) -> float:
        """Return the value below which nothing is wanted: that of the k-th pair, or the limit."""
        return float(min(values[k - 1], self.limit))

    def solve(self, k: int, gap: float, spent: int = 0) -> Eigenpairs:
        """Solve from a random start, with as many pairs as there are above the limit, after `spent` products."""
        products, tried = spent, k
        while True:
            pairs = min(tried + (self.above is not None), self.a.size)
            found = lanczos(self.a, pairs, rtol=self.rtol, gap=gap, seed=self.seed).scaled(1 / self.unit)
            products += found.num_matvecs
            if len(found.values) == self.a.size or found.values[-1] < self.limit:
                break
            tried = 2 * tried
        if self.above is not None:
            tried = self.count(found.values.double().cpu().numpy(), min(k, self.a.size))
        assert found.memory is not None
        return replace(
            found,
            values=found.values[:tried],
            vectors=found.vectors[:, :tried],
            residuals=found.residuals[:tried],
            num_matvecs=products,
            num_gradients=products * self.a.cost,
            memory=replace(found.memory, k=tried),
        )


class _Space:
    """Vectors v multiplied in this call, beside the remembered u of a pool, and all their inner products.

    Vectors and images are rows; what is made of them is known by its coefficients in u and v until it is formed.
    """

    def __init__(self, a: SymmetricOperator, pool: Pool) -> None:
        self.a = a
        self.pool = pool
        self.size = 0
        self.products = 0
        self.rows = pool.vectors.new_empty((8, a.size))  # v and A v in turn
        self.overlaps = np.eye(len(pool.vectors))  # of u, then v
        self.projected = pool.products  # u, then v, with the images of both
        self.images_gram = np.zeros((0, 0))  # of the new images

    @property
    def v(self) -> Tensor:
        return self.rows[: 2 * self.size : 2]

    @property
    def images(self) -> Tensor:
        return self.rows[1 : 2 * self.size : 2]

    def add(self, vectors: Tensor) -> None:
        """Widen the space by orthonormal rows ``(j, P)`` and their products."""
        vectors = vectors[: self.a.size - self.size]
        if self.a.matmat is not None and len(vectors) > 1:
            images = list(self.a.matmat(vectors.T).T)
        else:
            images = [self.a.matvec(v) for v in vectors]
        self.products += len(vectors)
        self.append(list(vectors), images)

    def append(self, vectors: Sequence[Tensor], images: Sequence[Tensor]) -> None:
        """Widen the space by rows whose images are known."""
        n, m = 2 * self.size, 2 * (self.size + len(vectors))
        if m > len(self.rows):
            self.rows = torch.cat([self.rows[:n], self.rows.new_empty((m, self.a.size))])
        for i, (vector, image) in enumerate(zip(vectors, images, strict=True), start=self.size):
            self.rows[2 * i], self.rows[2 * i + 1] = vector, image
        self.size = m // 2
        new = self.rows[n:m]
        known, ours = _numbers(new @ self.pool.vectors.T), _numbers(new @ self.rows[:m].T)
        olds = _numbers(new[::2] @ self.pool.images.T)
        if not np.isfinite(ours).all():
            raise NotFinite("a product with the operator is not finite: its curvature is not defined at these weights")
        overlap = np.concatenate([known[::2], ours[::2, ::2]], axis=1)
        there = np.concatenate([known[1::2], ours[1::2, ::2]], axis=1)
        back = np.concatenate([olds, ours[::2, 1::2]], axis=1)
        self.overlaps = _bordered(self.overlaps, overlap.T, overlap)
        self.projected = _bordered(self.projected, there.T, back)
        self.images_gram = _bordered(self.images_gram, ours[1::2, 1::2].T, ours[1::2, 1::2])
        self.ritz = self._diagonalized()

    def _diagonalized(self) -> "_Ritz":
        overlaps, t = self.overlaps[-self.size :, -self.size :], self.projected[-self.size :, -self.size :]
        basis = np.linalg.inv(np.linalg.cholesky(overlaps))
        values, s = _eigh(basis @ t @ basis.T)
        s = s @ basis
        squares = ((s @ self.images_gram) * s).sum(axis=1) - values * values
        scale = max(values[0], -values[-1], 1e-300)
        rounding = float(np.abs(t - t.T).max())
        floor = max(rounding, 16 * torch.finfo(self.rows.dtype).eps * scale)
        return _Ritz(values, s, np.sqrt(squares.clip(0)), scale, floor, basis)


def _bordered(a: Numbers, right: Numbers, below: Numbers) -> Numbers:
    """Add columns and rows to a square matrix; where both have an entry, that of the rows counts."""
    n, m = len(a), len(a) + len(below)
    wide = np.empty((m, m))
    wide[:n, :n], wide[:, n:] = a, right
    wide[n:] = below
    return wide


def _eigh(a: Numbers) -> tuple[Numbers, Numbers]:
    """Return eigenvalues, largest first, and eigenvectors as rows, of the symmetric part of a small matrix."""
    values, vectors = np.linalg.eigh((a + a.T) / 2)
    return values[::-1], vectors.T[::-1]


class _Ritz(NamedTuple):
    """The Ritz pairs of a space, largest first."""

    values: Numbers  # (n,)
    s: Numbers  # (n, n), coefficients of their vectors in v
    norms: Numbers  # (n,), of their residuals, to half of the digits
    scale: float  # the largest magnitude of a value
    floor: float  # rounding of the products
    basis: Numbers  # (n, n), coefficients of an orthonormal basis in v


def _numbers(small: Tensor) -> Numbers:
    """Take a small matrix to the processor in double precision."""
    found: Numbers = small.cpu().double().numpy()
    return found


def _combined(coefficients: Numbers, rows: Tensor) -> Tensor:
    """Form combinations ``(j, P)`` of rows."""
    return torch.as_tensor(coefficients).to(rows) @ rows


def _outside(new: Tensor, rows: Tensor) -> Tensor:
    """Make a vector ``(P,)`` orthogonal to orthonormal rows, and one long."""
    left, tiny = 0.0, torch.finfo(new.dtype).tiny
    while left < 0.1:  # what is left of less has too few digits
        before = new
        new = new - (rows @ new) @ rows
        size = max(new.norm().item(), tiny)
        new, left = new / size, size / max(before.norm().item(), tiny)
    return new


class _Start(NamedTuple):
    """The vectors that a call starts from."""

    lag: int  # calls since the pool was new
    chosen: list[int]  # indices of its vectors that are multiplied first
    unconverged: int | None  # the one whose residual is `search`
    search: Tensor  # (0 or 1, P)


def _start(space: _Space, memory: Memory, target: _Target, k: int) -> _Start:
    pool, lag = space.pool, memory.lag or 1
    m = len(pool.values)
    squares = _numbers(pool.images[:m].norm(dim=1)) ** 2 - 2 * pool.values * space.projected.diagonal()[:m]
    residuals = np.sqrt((squares + pool.values**2).clip(0))  # by the old images
    unconverged = _unconverged(pool, residuals, k) if pool.search_turn == 0 else None
    chosen = _candidates(pool, residuals, k, drift=memory.drift, lag=lag, above=target.limit, unconverged=unconverged)
    return _Start(lag, chosen, unconverged, _search_direction(pool, unconverged, target.seed))


def _change(space: _Space, chosen: list[int], lag: int) -> tuple[float, Numbers]:
    """Measure the change of the operator per call on the chosen vectors.

    The largest ``‖(A_t - A_s) w‖``, and ``wᵀ(A_t - A_s) w`` for each of them.
    """
    pool, chosen = space.pool, chosen[: space.size]
    calls = pool.ages[chosen] + lag
    change = torch.stack([(new - pool.images[i]).norm() for i, new in zip(chosen, space.images, strict=False)])
    values = space.projected.diagonal()[-space.size :][: len(chosen)]
    return float((_numbers(change) / calls).max()), (values - pool.values[chosen]) / calls


class _Converged(NamedTuple):
    """The wanted Ritz pairs of a space, whose residuals are small."""

    values: Tensor  # (k,)
    vectors: Tensor  # (k, P)
    images: Tensor  # (k, P)
    residuals: Tensor  # (k,), their norms
    floor: float

    @property
    def k(self) -> int:
        return len(self.values)

    def eigenpairs(self, products: int, cost: float, solved: Eigenpairs | None, memory: Memory) -> Eigenpairs:
        """Return the pairs; `solved` is the solve from a random start, if there was one in this call."""
        upper = math.inf
        if solved is not None:
            products += solved.num_matvecs
            upper = max(solved.upper, self.values[0].item())
        return Eigenpairs(
            self.values.to(self.vectors),
            self.vectors.T,
            self.residuals,
            products,
            upper=upper,
            floor=self.floor,
            num_gradients=products * cost,
            memory=memory,
        )


def _converged(space: _Space, target: _Target, k: int) -> _Converged | None:
    """Widen the space until the residuals of the wanted pairs are small; None where that takes too many products."""
    limit = space.products + 30 + 4 * k
    while True:
        ritz = space.ritz
        values, norms, scale = ritz.values, ritz.norms, ritz.scale
        bound = max(target.rtol * scale, 4 * ritz.floor)
        k = target.count(values, min(k, len(values)))
        attainable = values + 2 * norms**2 / scale  # where one more step would take them
        attainable[:k] = math.inf
        candidates = (attainable > target.lowest(values, k)).nonzero()[0]
        vectors = _combined(ritz.s[candidates], space.v)
        images = _combined(ritz.s[candidates], space.images)
        tops = torch.as_tensor(values[candidates])
        residuals = images - tops.to(images)[:, None] * vectors
        sizes = residuals.norm(dim=1)
        loose = (_numbers(sizes) > bound).nonzero()[0]
        if len(loose) == 0 or space.size >= space.a.size:
            break
        if space.products >= limit:
            return None
        new = _corrected(residuals[loose[0]], float(values[candidates[loose[0]]]), space.pool)
        space.add(_outside(new, space.v)[None])
    if target.above is not None:
        k = target.count(values, min(target.k, len(values)))
    return _Converged(tops[:k], vectors[:k], images[:k], sizes[:k], ritz.floor)


def _unconverged(pool: Pool, residuals: Numbers, k: int) -> int | None:
    """Find the highest pair beyond the wanted ones that has not converged."""
    large = (residuals[k:] > UNCONVERGED * np.abs(pool.values).max()).nonzero()[0]
    return k + int(large[0]) if len(large) else None


def _candidates(
    pool: Pool, residuals: Numbers, k: int, *, drift: float, lag: int, above: float, unconverged: int | None
) -> list[int]:
    """Choose the k best of the pool, and of the others those that may have overtaken, or else one to revisit."""
    values, calls = pool.values, pool.ages + lag
    k = min(k, len(values))
    wanted = list(range(k))
    risen = np.maximum(2 * pool.rates * calls, DRIFT_FRACTION * drift * np.sqrt(calls))
    possible = values + risen
    lowest = min(values[k - 1] - DRIFT_FRACTION * drift, above)
    room = 1 + k if above == math.inf else len(risen)
    likely = k + np.argsort(-possible[k:], kind="stable")[:room]
    likely = likely[possible[likely] >= lowest]
    if len(likely) > 0 or len(values) == k:
        return wanted + likely.tolist()
    if unconverged is not None:
        return [*wanted, unconverged]
    size = max(float(np.abs(values).max()), 1e-300)
    rise = 2 * residuals**2 / size + ASSUMED_RATE * size * calls
    gap = (values[k - 1] - values).clip(1e-6 * size)
    return [*wanted, k + int((rise / gap)[k:].argmax())]


def _search_direction(pool: Pool, unconverged: int | None, seed: int) -> Tensor:
    """Choose a new direction ``(1, P)``, or none ``(0, P)`` where the memory holds everything.

    It is the residual of the unconverged pair, or of the search, or a random vector with which a search starts.
    """
    count, size = pool.vectors.shape
    if count >= size:
        return pool.vectors[:0]
    if unconverged is not None:
        value = float(pool.values[unconverged])
        new = _corrected(pool.images[unconverged] - value * pool.vectors[unconverged], value, pool)
    elif count == len(pool.values):
        generator = torch.Generator().manual_seed(seed)
        new = torch.randn(size, generator=generator, dtype=torch.float64).to(pool.vectors)
    else:
        new = pool.images[len(pool.values)]
    return _outside(new, pool.vectors)[None]


def _corrected(residual: Tensor, value: float, pool: Pool) -> Tensor:
    """Weigh the directions of a residual by their distance from the eigenvalue (Davidson).

    ``Σ_w w wᵀr/(θ - λ_w)`` over remembered w, and what is left of r over .7 of the largest eigenvalue.
    """
    scale = max(float(np.abs(pool.values).max()), abs(value), 1e-300)
    weights = 0.7 * scale / np.abs(value - pool.values).clip(0.01 * scale) - 1
    w = pool.vectors[: len(weights)]
    return residual + _combined(weights * _numbers(w @ residual), w)


def _updated(space: _Space, searched: slice, rates: Numbers, *, k: int, lag: int) -> Pool:
    """Choose the best Ritz pairs of the space, where images are new, and of what the pool adds, where they are old."""
    pool, n = space.pool, space.size
    m, count = len(pool.values), len(pool.vectors)
    basis = space.ritz.basis
    added = np.eye(count, count + n)
    added[:, count:] = -space.overlaps[:count, count:] @ basis.T @ basis
    left, turn = _eigh(added @ space.overlaps @ added.T)
    turn = turn[left > 0.01] / np.sqrt(left[left > 0.01])[:, None]  # without what is mostly in the space
    x = np.zeros((n + len(turn), count + n))  # an orthonormal basis, as rows: of the space, then of what is added
    x[:n, count:], x[n:] = basis, turn @ added
    h = x @ space.projected @ x.T
    h[:n, n:] = h[n:, :n].T  # products with the space are new, on either side
    values, s = _eigh(h)
    top, values = s[: k + POOL], values[: k + POOL].copy()
    overlaps = x @ space.overlaps
    search = _search_vectors(np.concatenate([overlaps[:, m:count], overlaps[:, count:][:, searched]], axis=1), h, top)
    tried = pool.search_products + (searched.stop - searched.start)
    if len(search) == 0 or tried >= math.ceil(math.log(6 * space.a.size**0.5) / SEARCH_GROWTH):
        search, tried = search[:0], 0
    best = np.concatenate([top, search]) @ x
    ages = np.concatenate([pool.ages + lag, np.full(count - m, lag * (1.0 + pool.search_products))])
    new, parts = np.square(top[:, :n]), np.square(top[:, n:] @ turn)
    parts *= (1 - new.sum(axis=1, keepdims=True)) / parts.sum(axis=1, keepdims=True).clip(1e-300)
    return Pool(
        vectors=_formed(best, pool.vectors, space.v),
        images=_formed(best, pool.images, space.images),
        products=best @ space.projected @ best.T,
        values=values,
        ages=parts @ ages,
        rates=new[:, : len(rates)] @ rates + parts[:, :m] @ pool.rates,
        search_products=tried,
        search_turn=1 - pool.search_turn,
    )


def _formed(coefficients: Numbers, old: Tensor, new: Tensor) -> Tensor:
    """Form combinations of two sets of rows."""
    c = torch.as_tensor(coefficients).to(old)
    return (c[:, : len(old)] @ old).addmm_(c[:, len(old) :], new)


def _search_vectors(columns: Numbers, h: Numbers, top: Numbers) -> Numbers:
    """Find the next two vectors of the search in terms of the basis: the best orthogonal to `top`, and where it moved.

    All are given by their coefficients: those searched so far as columns, `top` and the answer as rows.
    """
    c = columns - top.T @ (top @ columns)
    q, size, _ = np.linalg.svd(c, full_matrices=False)
    if len(size) == 0 or size[0] < 0.3:
        return top[:0]
    q = q[:, size > 0.1]
    x = q @ np.linalg.eigh(q.T @ h @ q)[1][:, -1]
    if columns.shape[1] == 1:
        return x[None]
    old = c[:, 0] / max(float(np.linalg.norm(c[:, 0])), 1e-300)
    moved = x - old * (old @ x)
    moved = moved - x * (x @ moved)
    length = np.linalg.norm(moved)
    return np.stack([x, moved / length]) if length > 1e-6 else x[None]


def _better_lag(found: _Converged, memory: Memory) -> tuple[int, float]:
    """Tell which of the two memories predicted ``A v`` better, and its error per call; 0 while there is only one."""
    v, image = found.vectors[0], found.images[0]
    pools = [(p.vectors[: len(p.values)], p.images[: len(p.values)]) for p in (memory.last, memory.before)]
    last, before = ((image - (w @ v) @ images).norm().item() for w, images in pools)
    if len(memory.before.values) == 0:
        return 0, last
    return (2, before / 2) if before < 0.8 * last else (1, last)
