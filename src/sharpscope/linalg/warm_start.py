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
remembered ones hardly move.  If they move by more than a tenth of λ1 in a call, or by so much that something below them
may have passed all of them, there is a solve from a random start, and so there is every `verify` calls, which gives a
bound from above.  Nor can one tell at once which of a continuum is the k-th: an eigenvalue that leaves the bulk while
the k-th lies at its edge is found 5 to 10 calls late.

P parameters, k wanted pairs, m remembered ones.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NotFinite
from .eigenpairs import Eigenpairs
from .lanczos import lanczos
from .memory import POOL, Memory, Pool
from .operators import SymmetricOperator, require_operator, without_autocast
from .units import Unit, power_of_two

FIRST_ERROR = 1e-3
"""Largest prediction error that is accepted from the first memory, before there are two to choose from."""

MAX_DRIFT = 0.1
"""Drift, relative to the largest eigenvalue, above which nothing is predicted."""

DRIFT_DECAY = 0.9
"""Fraction of the drift that is carried from one call to the next."""

DRIFT_FRACTION = 0.5
"""Part of the drift by which an eigenvalue moves in a call; the moves of n calls add like √n where no rate is known."""

OVERTAKING = 0.02
"""Distance, relative to the largest eigenvalue, by which something unknown must be able to overtake to be a concern."""

RESIDUAL_FRACTION = 0.3
"""Part of its residual by which a Ritz value that has not converged may be too low."""

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
    if memory is None or len(memory.last.vectors) != a.size:
        return target.solve(k, gap=rtol / 3)
    memory = _in_near_unit(memory, a.like.dtype)
    unit = Unit(memory.unit)
    within = replace(target, unit=memory.unit)
    k = k if above is None else max(k, memory.k)
    start = _start(memory, within, k)
    space = _Space(unit.applied(a), start.room(k))
    space.add(torch.cat([start.pool.vectors[:, start.chosen], start.search], dim=1))
    if unit.size != memory.unit:  # the operator has quite another size: nothing is left of it
        return target.solve(target.k, gap=rtol / 3, spent=space.products)
    return _continued(space, start, memory, within, k, verify).scaled(unit.size)


def _in_near_unit(memory: Memory, dtype: torch.dtype) -> Memory:
    """Express a memory in a power of two that is near its values."""
    size = memory.last.values.abs().max().item()
    near = size == 0 or 1 / UNIT_CHANGE < size < UNIT_CHANGE
    return memory.in_unit(power_of_two(memory.unit if near else memory.unit * size, dtype))


def _continued(space: "_Space", start: "_Start", memory: Memory, target: "_Target", k: int, verify: int) -> Eigenpairs:
    """Go on from the first products, all in units of the memory."""
    a, pool, lag, search = space.a, start.pool, start.lag, start.search
    change = _change(space, start, memory, target, k)
    rates = change.rates
    unverified = memory.unverified + 1 / verify + 10 * change.error
    products, solved = 0, None
    if change.unreliable or unverified >= 1:
        solved = target.solve(k, gap=3 * target.rtol)
        assert solved.memory is not None
        new = solved.memory.in_unit(1.0)
        products, unverified = space.products, 0.0
        k = max(k, new.k)
        space = _Space(a, start.room(k))
        space.append(new.last.vectors.T, new.last.images.T)
        search, rates = search[:, :0], rates[:0]  # the space has none of these vectors
        if change.unreliable:
            pool, lag = new.last, 0
    found = _converged(space, pool, target, k)
    products += space.products
    if found is None:
        products += solved.num_matvecs if solved else 0
        return target.solve(target.k, gap=target.rtol / 3, spent=products)
    searched = search if start.unconverged is None else search[:, :0]
    best, moved = _better_lag(found, memory)
    drift = change.drift if best in (0, memory.lag) else moved
    updated = _updated(pool, space, searched, rates, k=found.k, lag=lag)
    now = Memory(updated, memory.last, lag=best, unverified=unverified, k=found.k, drift=drift)
    return found.eigenpairs(products, a.cost, solved, now)


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

    def count(self, values: Tensor, k: int) -> int:
        """Count the pairs that are wanted of all those with these values: k, or more that lie above the limit."""
        return max(k, int((values >= self.limit).sum()))

    def lowest(self, values: Tensor, k: int) -> float:
        """Return the value below which nothing is wanted: that of the k-th pair, or the limit."""
        return min(values[k - 1].item(), self.limit)

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
            tried = self.count(found.values, min(k, self.a.size))
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
    """An orthonormal basis with its image, both as rows ``(m, P)``, and ``T = V A Vᵀ``."""

    def __init__(self, a: SymmetricOperator, room: int) -> None:
        self.a = a
        self.size = 0
        self.products = 0
        self.v = a.like.new_empty((room, a.size))
        self.image = a.like.new_empty((room, a.size))
        self.t = torch.zeros((room, room), dtype=torch.float64)
        self.asymmetry = 0.0

    def add(self, columns: Tensor) -> None:
        """Widen the space by what is new in `columns` ``(P, j)``; orthonormal ones stay what they are."""
        rows = columns.T / columns.norm(dim=0)[:, None].clamp_min(torch.finfo(columns.dtype).tiny)
        rows = rows[: min(len(self.v), self.a.size) - self.size]
        for _ in range(2):
            rows = rows - (rows @ self.v[: self.size].T) @ self.v[: self.size]
            q, r = torch.linalg.qr(rows.T)
            rows = torch.where(r.diagonal()[:, None] < 0, -q.T, q.T)
        image = (self.a @ rows.T).T
        if not bool(image.isfinite().all()):
            raise NotFinite("a product with the operator is not finite: its curvature is not defined at these weights")
        self.products += len(rows)
        self.append(rows, image)

    def append(self, rows: Tensor, image: Tensor) -> None:
        """Widen the space by orthonormal rows whose image is known."""
        n, m = self.size, self.size + len(rows)
        self.v[n:m], self.image[n:m] = rows, image
        block = (self.v[:m] @ self.image[n:m].T).double().cpu()
        back = (self.v[n:m] @ self.image[:n].T).double().cpu().T
        self.asymmetry = max(self.asymmetry, (block[:n] - back).norm().item())
        self.t[:n, n:m], self.t[n:m, :n] = block[:n], block[:n].T
        self.t[n:m, n:m] = (block[n:] + block[n:].T) / 2
        self.size = m

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values ``(m,)``, descending, and their vectors and residuals as rows ``(m, P)``."""
        values, s = torch.linalg.eigh(self.t[: self.size, : self.size])
        values, s = values.flip(0), s.flip(1).T.to(self.v)
        vectors = s @ self.v[: self.size]
        return values, vectors, s @ self.image[: self.size] - values[:, None].to(vectors) * vectors


class _Start(NamedTuple):
    """The vectors that a call starts from."""

    pool: Pool
    lag: int  # calls since the pool was new
    chosen: Tensor  # indices of its vectors that are multiplied first
    unconverged: int | None  # the one whose residual is `search`
    search: Tensor  # (P, 0 or 1)

    def room(self, k: int) -> int:
        return 40 + 4 * k + len(self.chosen) + POOL


def _start(memory: Memory, target: _Target, k: int) -> _Start:
    pool, lag = (memory.before, 2) if memory.lag == 2 else (memory.last, 1)
    unconverged = _unconverged(pool, k) if pool.search_turn == 0 else None
    chosen = _candidates(pool, k, drift=memory.drift, lag=lag, above=target.limit, unconverged=unconverged)
    return _Start(pool, lag, chosen, unconverged, _search_direction(pool, unconverged, target.seed))


class _Change(NamedTuple):
    """The difference between an operator and what the memory predicted."""

    drift: float
    rates: Tensor  # rise of each multiplied vector's value per call
    error: float  # squares of the first pair's residual and of its change of value, relative to the largest value
    unreliable: bool  # something unknown may have overtaken


def _change(space: _Space, start: _Start, memory: Memory, target: _Target, k: int) -> _Change:
    """Compare the first products with what the pool predicted."""
    pool = start.pool
    ritz, _, residuals = space.ritz()
    scale = max(ritz.abs().max().item(), 1e-300)
    drift, rates = _moved(space, pool, start.chosen, start.lag)
    drift = min(max(DRIFT_DECAY * memory.drift, drift), scale)  # of an operator that was larger, too
    residual = residuals[0].norm().item() / scale
    shift = (ritz[0] - pool.values[0]).item() / scale
    error = residual**2 + shift**2
    lowest = target.lowest(ritz, min(k, len(ritz)))
    unknown = pool.values[-1].item() + 2 * DRIFT_FRACTION * drift
    unreliable = memory.lag == 0 and error > FIRST_ERROR
    if len(pool.values) < space.a.size:
        unreliable |= drift > MAX_DRIFT * scale or unknown >= lowest + OVERTAKING * scale
    return _Change(drift, rates, error, unreliable)


class _Converged(NamedTuple):
    """The Ritz pairs of a space, of which the first k are wanted and have small residuals."""

    values: Tensor  # (m,)
    vectors: Tensor  # (m, P)
    residuals: Tensor  # (m, P)
    norms: Tensor  # (m,), of the residuals
    floor: float
    k: int

    def eigenpairs(self, products: int, cost: float, solved: Eigenpairs | None, memory: Memory) -> Eigenpairs:
        """Return the wanted pairs; `solved` is the solve from a random start, if there was one in this call."""
        upper = math.inf
        if solved is not None:
            products += solved.num_matvecs
            upper = max(solved.upper, self.values[0].item())
        return Eigenpairs(
            self.values[: self.k].to(self.vectors),
            self.vectors[: self.k].T,
            self.norms[: self.k].to(self.vectors),
            products,
            upper=upper,
            floor=self.floor,
            num_gradients=products * cost,
            memory=memory,
        )


def _converged(space: _Space, pool: Pool, target: _Target, k: int) -> _Converged | None:
    """Widen the space until the residuals of the wanted pairs are small; None where that takes too many products."""
    limit = space.products + 30 + 4 * k
    while True:
        ritz, vectors, residuals = space.ritz()
        norms = residuals.norm(dim=1).double().cpu()
        scale = ritz.abs().max().item()
        floor = max(space.asymmetry, 16 * torch.finfo(vectors.dtype).eps * scale)
        bound = max(target.rtol * scale, 4 * floor)
        k = target.count(ritz, min(k, len(ritz)))
        attainable = ritz + 2 * norms.square() / max(scale, 1e-300)  # where one more step would take them
        attainable[k : k + 1] = torch.maximum(attainable, ritz + RESIDUAL_FRACTION * norms)[k : k + 1]
        candidates = (torch.arange(len(ritz)) < k) | (attainable > target.lowest(ritz, k))
        loose = (norms > bound) & candidates
        if not bool(loose.any()) or space.size >= space.a.size:
            break
        if space.products >= limit:
            return None
        i = int(loose.nonzero()[0])
        space.add(_corrected(residuals[i], ritz[i].item(), pool)[:, None])
    if target.above is not None:
        k = target.count(ritz, min(target.k, len(ritz)))
    return _Converged(ritz, vectors, residuals, norms, floor, k)


def _residuals(pool: Pool) -> Tensor:
    """Return the norms ``(m,)`` of the residuals by the old images."""
    return (pool.images - pool.vectors * pool.values.to(pool.vectors)).norm(dim=0).double().cpu()


def _unconverged(pool: Pool, k: int) -> int | None:
    """Find the pair beyond the wanted ones that has not converged and may be highest."""
    residuals = _residuals(pool)
    highest = pool.values + RESIDUAL_FRACTION * residuals
    highest = highest.where(residuals > UNCONVERGED * pool.values.abs().max(), -math.inf)[k:]
    return k + int(highest.argmax()) if len(highest) and highest.max() > -math.inf else None


def _candidates(pool: Pool, k: int, *, drift: float, lag: int, above: float, unconverged: int | None) -> Tensor:
    """Choose the k best of the pool, and of the others those that may have overtaken, or else one to revisit."""
    k = min(k, len(pool.values))
    wanted = torch.arange(k)
    size = pool.values.abs().max().item()
    residuals = _residuals(pool)
    calls = pool.ages + lag
    risen = torch.maximum(2 * pool.rates * calls, DRIFT_FRACTION * drift * calls.sqrt())
    lowest = min(pool.values[k - 1].item() - DRIFT_FRACTION * drift, above)
    room = 1 + k if above == math.inf else len(risen)
    possible = pool.values + risen
    likely = possible[k:].argsort(descending=True)[:room] + k
    likely = likely[possible[likely] >= lowest]
    if len(likely) > 0 or len(possible) == k:
        return torch.cat([wanted, likely])
    revisited = unconverged
    if possible[k] + RESIDUAL_FRACTION * residuals[k] >= lowest:
        revisited = k
    if revisited is None:
        rise = 2 * residuals.square() / max(size, 1e-300) + risen + ASSUMED_RATE * size * calls
        gap = (pool.values[k - 1] - pool.values).clamp_min(1e-6 * size)
        revisited = k + int((rise / gap)[k:].argmax())
    return torch.cat([wanted, torch.tensor([revisited])])


def _search_direction(pool: Pool, unconverged: int | None, seed: int) -> Tensor:
    """Choose a new direction ``(P, 1)``, or none ``(P, 0)`` where the memory holds everything.

    It is the residual of the unconverged pair, or of the search, or a random vector with which a search starts.
    """
    known = torch.cat([pool.vectors, pool.search_vectors], dim=1)
    if known.shape[1] >= len(known):
        return known[:, :0]
    if unconverged is not None:
        value = pool.values[unconverged].item()
        new = _corrected(pool.images[:, unconverged] - value * pool.vectors[:, unconverged], value, pool)
    elif pool.search_vectors.shape[1] == 0:
        generator = torch.Generator().manual_seed(seed)
        new = torch.randn(len(known), generator=generator, dtype=torch.float64).to(known)
    else:
        new = pool.search_images[:, 0]
    for _ in range(2):
        new = new - known @ (known.T @ new)
        new = new / new.norm().clamp_min(torch.finfo(new.dtype).tiny)
    return new[:, None]


def _corrected(residual: Tensor, value: float, pool: Pool) -> Tensor:
    """Weigh the directions of a residual by their distance from the eigenvalue (Davidson).

    ``Σ_w w wᵀr/(θ - λ_w)`` over remembered w, and what is left of r over .7 of the largest eigenvalue.
    """
    scale = max(pool.values.abs().max().item(), abs(value), 1e-300)
    gap = (value - pool.values).abs().clamp_min(0.01 * scale).to(residual)
    return residual + pool.vectors @ ((pool.vectors.T @ residual) * (0.7 * scale / gap - 1))


def _moved(space: _Space, pool: Pool, chosen: Tensor, lag: int) -> tuple[float, Tensor]:
    """Measure the change of the operator per call on the chosen vectors.

    The largest ``‖(A_t - A_s) w‖``, and ``wᵀ(A_t - A_s) w`` for each of them.
    """
    n = min(len(chosen), space.size)
    chosen = chosen[:n]
    calls = pool.ages[chosen] + lag
    change = (space.image[:n] - pool.images[:, chosen].T).norm(dim=1).double().cpu()
    return (change / calls).max().item(), (space.t.diagonal()[:n] - pool.values[chosen]) / calls


def _updated(pool: Pool, space: _Space, searched: Tensor, rates: Tensor, *, k: int, lag: int) -> Pool:
    """Choose the best Ritz pairs of the space, where images are new, and of what the pool adds, where they are old."""
    n, j = space.size, pool.search_vectors.shape[1]
    v, image = space.v[:n], space.image[:n]
    more = torch.cat([pool.vectors, pool.search_vectors], dim=1).T
    more_image = torch.cat([pool.images, pool.search_images], dim=1).T
    ages = torch.cat([pool.ages + lag, pool.ages.new_full((j,), lag * (1.0 + pool.search_products))])
    overlap = more @ v.T
    more, more_image = more - overlap @ v, more_image - overlap @ image
    turn = _independent((more @ more.T).double().cpu())
    parts = turn.square() / turn.square().sum(dim=1, keepdim=True)
    ages = torch.cat([ages.new_zeros(n), parts @ ages])
    rates = torch.cat([rates, ages.new_zeros(n - len(rates)), parts @ torch.cat([pool.rates, ages.new_zeros(j)])])
    u = torch.cat([v, turn.to(v) @ more])
    image = torch.cat([image, turn.to(v) @ more_image])
    h = (u @ image.T).double().cpu()
    h[:n, n:] = h[n:, :n].T  # products with the space are new, on either side
    h = (h + h.T) / 2
    values, s = torch.linalg.eigh(h)
    top, values = s.flip(1)[:, : k + POOL], values.flip(0)[: k + POOL]
    search = _search_vectors(torch.cat([pool.search_vectors, searched], dim=1), u, h, top)
    products = pool.search_products + searched.shape[1]
    ended = products >= math.ceil(math.log(6 * len(pool.vectors) ** 0.5) / SEARCH_GROWTH) or search.shape[1] == 0
    if ended:
        search, products = search[:, :0], 0
    best, sought = top.T.to(u), search.T.to(u)
    return Pool(
        vectors=_columns(best @ u),
        images=_columns(best @ image),
        values=values,
        ages=top.square().T @ ages,
        rates=top.square().T @ rates,
        search_vectors=_columns(sought @ u),
        search_images=_columns(sought @ image),
        search_products=products,
        search_turn=1 - pool.search_turn,
    )


def _columns(rows: Tensor) -> Tensor:
    """Lay vectors out as they come back from a checkpoint: another layout rounds differently."""
    return rows.T.clone(memory_format=torch.contiguous_format)


def _independent(gram: Tensor) -> Tensor:
    """Find coefficients, as rows, of an orthonormal basis in terms of vectors with this Gram matrix.

    Gram-Schmidt in the given order, without vectors of which less than a third is left.
    """
    rows: list[Tensor] = []
    for unit in torch.eye(len(gram), dtype=gram.dtype):
        for row in rows:
            unit = unit - row * (row @ gram @ unit)
        size = (unit @ gram @ unit).item()
        if size > 0.1:
            rows.append(unit / size**0.5)
    return torch.stack(rows) if rows else gram.new_zeros((0, len(gram)))


def _search_vectors(columns: Tensor, u: Tensor, h: Tensor, top: Tensor) -> Tensor:
    """Find the next two vectors of the search in terms of u: the best orthogonal to `top`, and where it moved."""
    c = (u @ columns).double().cpu()
    c = c - top @ (top.T @ c)
    q, size, _ = torch.linalg.svd(c, full_matrices=False)
    if len(size) == 0 or size[0] < 0.3:
        return c[:, :0]
    q = q[:, size > 0.1]
    x = q @ torch.linalg.eigh(q.T @ h @ q)[1][:, -1]
    if columns.shape[1] == 1:
        return x[:, None]
    old = c[:, 0] / c[:, 0].norm().clamp_min(1e-300)
    moved = x - old * (old @ x)
    moved = moved - x * (x @ moved)
    size = moved.norm()
    return torch.stack([x, moved / size], dim=1) if size > 1e-6 else x[:, None]


def _better_lag(found: _Converged, memory: Memory) -> tuple[int, float]:
    """Tell which of the two memories predicted ``A v`` better, and its error per call; 0 while there is only one."""
    v = found.vectors[0]
    image = found.values[0].item() * v + found.residuals[0]
    pools = (memory.last, memory.before)
    last, before = ((image - p.images @ (p.vectors.T @ v)).norm().item() for p in pools)
    if memory.before.vectors.shape[1] == 0:
        return 0, last
    return (2, before / 2) if before < 0.8 * last else (1, last)
