"""Top eigenpairs of an operator that changes a little from call to call, as along training.

A call is Rayleigh-Ritz with exact products, from remembered vectors, widened until the residuals are small.  What is
remembered beyond the wanted pairs keeps it from following the wrong eigenvalue.

Old images: ``A_s w`` from an earlier call s, for each remembered w.  To first order a product with one vector corrects
the whole matrix Wᵀ A W, so the Ritz pairs of old and new images together foretell the next call (`_renewed`), weigh the
directions of a residual by their distance from the eigenvalue (`_corrected`), and their misfit to new products measures
how fast the operator moves: the `drift` ``‖(A_t - A_s) w‖/(t - s)``.

Two calls: at the edge of stability weights oscillate with period two, A_t is 20 % from A_{t-1} and 1 % from A_{t-2}.
The memory whose images foretell ``A_t v`` better is the one used.

A patrol of two products a call.  One revisits a remembered vector: one that may have overtaken by its drift or by the
rate at which it rose, else the one that may have come the largest part of the way.  The other builds a scout, in turn
with the residual of a remembered vector that has not converged: a Krylov space from a random start, orthogonal to all
that is remembered, one product a call, in the three vectors of locally optimal conjugate gradients.  In n calls it
amplifies an eigenvalue a part γ of the spread above the bulk by Tₙ(1 + 2γ) ~ exp(2n √γ)/2 against the bulk, the 1/√P
of a random start included after n = ln(6√P)/(2√γ), with probability as in `bounds`.  So what rises from the bulk to the
top in no fewer than about 2n calls is seen on its way (of the tested rises: .4 of λ1 in 13 calls, P = 300, n = 8).

It cannot see what comes faster: within a scout's space, on vectors it does not remember, while the remembered ones
hardly move.  If they move by more than a tenth of λ1 in a call, or by so much that something below them may have passed
all of them, it solves from a random start, and so it does every `verify` calls, which gives a bound from above.  Nor
can it tell at once which of a continuum is the k-th: an eigenvalue that leaves the bulk while the k-th lies at its edge
is seen 5 to 10 calls late.

P parameters, k wanted pairs, m remembered ones.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NotFinite
from .eigenpairs import POOL, Eigenpairs, Memory, Pool
from .lanczos import lanczos
from .operators import SymmetricOperator

UNPROVEN = 1e-3
"""Square of the surprise that is accepted from the first memory, before there are two to choose from."""

FAST = 0.1
"""Drift, relative to the largest eigenvalue, above which nothing is foretold."""

FADE = 0.9
"""Of the drift, from one call to the next."""

SHARE = 0.5
"""Part of the drift by which an eigenvalue moves in a call; the moves of n calls add like √n where no rate is known."""

OVERTAKEN = 0.02
"""Of the largest eigenvalue: by how much something unseen must be able to overtake before it is searched for."""

REACH = 0.3
"""Part of its residual by which a Ritz value that has not converged may be too low."""

LOOSE = 0.02
"""Residual, relative to the largest eigenvalue, above which a remembered pair is worth a product with its residual."""

RATE = 2e-3
"""Rise per call, relative to the largest eigenvalue, that the patrol allows for where it has seen none."""

GROWTH = 0.6
"""2√γ of what a scout is to find: it ends after ln(6√P)/GROWTH products."""


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
    """The k largest eigenpairs of `a`, given the result of the same call on an operator nearby [N22].

    Args:
        last: what the last call returned, or the memory in it; None at the first.
        above: widen k until every eigenvalue above this is among the pairs, and let it fall back to k.
        rtol: bound on every residual, relative to the largest eigenvalue in magnitude.
        verify: calls between solves from a random start.
        seed: of the random starts; pass the step, so that they differ.

    Raises:
        NotConverged, NotFinite, ValueError: as `lanczos`, which also takes over where the memory does not help.
    """
    memory = last.memory if isinstance(last, Eigenpairs) else last
    if memory is None or len(memory.last.vectors) != a.size:
        return _afresh(a, k, above, rtol, rtol / 3, seed)
    wanted = k
    if above is not None:
        k = max(k, memory.k)
    pool, lag = (memory.before, 2) if memory.lag == 2 else (memory.last, 1)
    weak = _weakest(pool, k) if pool.searches == 0 else None
    chosen = _candidates(pool, k, memory.drift, lag, above, weak)
    scout = _scouting(pool, weak, seed)
    space = _Space(a, 40 + 4 * k + len(chosen) + POOL)
    space.add(torch.cat([pool.vectors[:, chosen], scout], dim=1))
    ritz, _, residuals = space.ritz()
    scale = max(ritz.abs().max().item(), 1e-300)
    drift, rates = _moved(space, pool, chosen, lag)
    drift = max(FADE * memory.drift, drift)
    turned, changed = residuals[0].norm().item() / scale, (ritz[0] - pool.values[0]).item() / scale
    surprise = turned**2 + changed**2
    doubt = memory.doubt + 1 / verify + 10 * surprise
    lowest = min(ritz[min(k, len(ritz)) - 1].item(), math.inf if above is None else above)
    unseen = pool.values[-1].item() + 2 * SHARE * drift
    lost = memory.lag == 0 and surprise > UNPROVEN
    lost |= len(pool.values) < a.size and (drift > FAST * scale or unseen >= lowest + OVERTAKEN * scale)
    fresh, used = None, 0
    if lost or doubt >= 1:
        used = space.used
        fresh = _afresh(a, k, above, rtol, 3 * rtol, seed)
        assert fresh.memory is not None
        known, k, doubt = fresh.memory.last, max(k, fresh.memory.k), 0.0
        pool, lag = (known, 0) if lost else (pool, lag)
        space, scout, rates = _Space(a, 40 + 4 * k + len(chosen) + POOL), scout[:, :0], rates[:0]
        space.take(known.vectors.T, known.images.T)
    limit = space.used + 30 + 4 * k
    while True:
        ritz, vectors, residuals = space.ritz()
        norms = residuals.norm(dim=1).double().cpu()
        scale = ritz.abs().max().item()
        floor = max(space.asymmetry, 16 * torch.finfo(vectors.dtype).eps * scale)
        bound = max(rtol * scale, 4 * floor)
        k = min(k, len(ritz))
        if above is not None:
            k = max(k, int((ritz >= above).sum()))
        rivals = ritz + 2 * norms.square() / max(scale, 1e-300)  # where one more step would take them
        rivals[k : k + 1] = torch.maximum(rivals, ritz + REACH * norms)[k : k + 1]
        lowest = min(ritz[k - 1].item(), math.inf if above is None else above)
        loose = (norms > bound) & ((torch.arange(len(ritz)) < k) | (rivals > lowest))
        if not bool(loose.any()) or space.size >= a.size:
            break
        if space.used >= limit:
            found = _afresh(a, wanted, above, rtol, rtol / 3, seed)
            return _with_more(found, used + space.used, a.cost)
        i = int(loose.nonzero()[0])
        space.add(_corrected(residuals[i], ritz[i].item(), pool)[:, None])
    if above is not None:
        k = max(min(wanted, len(ritz)), int((ritz >= above).sum()))
    best, moved = _lag(vectors[0], ritz[0].item() * vectors[0] + residuals[0], memory)
    now = Memory(
        _renewed(pool, space, scout[:, : int(weak is None)], rates, k, lag),
        memory.last,
        best,
        doubt,
        k,
        drift if best in (0, memory.lag) else moved,
    )
    used, upper = used + space.used, math.inf
    if fresh is not None:
        used, upper = used + fresh.num_matvecs, max(fresh.upper, ritz[0].item())
    return Eigenpairs(
        ritz[:k].to(vectors), vectors[:k].T, norms[:k].to(vectors), used, upper, floor, used * a.cost, now
    )


class _Space:
    """An orthonormal basis with its image, both as rows ``(m, P)``, and ``T = V A Vᵀ``."""

    def __init__(self, a: SymmetricOperator, room: int) -> None:
        self.a, self.size, self.used = a, 0, 0
        self.v, self.image = a.like.new_empty((room, a.size)), a.like.new_empty((room, a.size))
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
        self.used += len(rows)
        self.take(rows, image)

    def take(self, rows: Tensor, image: Tensor) -> None:
        """Widen it by orthonormal rows whose image is known."""
        n, m = self.size, self.size + len(rows)
        self.v[n:m], self.image[n:m] = rows, image
        block = (self.v[:m] @ self.image[n:m].T).double().cpu()
        back = (self.v[n:m] @ self.image[:n].T).double().cpu().T
        self.asymmetry = max(self.asymmetry, (block[:n] - back).norm().item())
        self.t[:n, n:m], self.t[n:m, :n] = block[:n], block[:n].T
        self.t[n:m, n:m] = (block[n:] + block[n:].T) / 2
        self.size = m

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ``(m,)`` descending, vectors and residuals as rows ``(m, P)``."""
        values, s = torch.linalg.eigh(self.t[: self.size, : self.size])
        values, s = values.flip(0), s.flip(1).T.to(self.v)
        vectors = s @ self.v[: self.size]
        return values, vectors, s @ self.image[: self.size] - values[:, None].to(vectors) * vectors


def _apart(pool: Pool) -> Tensor:
    """``(m,)``: residuals by the old images."""
    return (pool.images - pool.vectors * pool.values.to(pool.vectors)).norm(dim=0).double().cpu()


def _weakest(pool: Pool, k: int) -> int | None:
    """Of those remembered beyond the wanted ones that have not converged, the one that may be highest."""
    apart = _apart(pool)
    highest = (pool.values + REACH * apart).where(apart > LOOSE * pool.values.abs().max(), -math.inf)[k:]
    return k + int(highest.argmax()) if len(highest) and highest.max() > -math.inf else None


def _candidates(pool: Pool, k: int, drift: float, lag: int, above: float | None, weak: int | None) -> Tensor:
    """Of the pool the k best; and of the others those that may have overtaken, or else one to revisit."""
    k = min(k, len(pool.values))
    wanted, size, apart, calls = torch.arange(k), pool.values.abs().max().item(), _apart(pool), pool.ages + lag
    risen = torch.maximum(2 * pool.rates * calls, SHARE * drift * calls.sqrt())
    lowest, room = pool.values[k - 1].item() - SHARE * drift, 1 + k
    if above is not None:
        lowest, room = min(lowest, above), len(risen)
    reach = pool.values + risen
    likely = reach[k:].argsort(descending=True)[:room] + k
    likely = likely[reach[likely] >= lowest]
    if len(likely) > 0 or len(reach) == k:
        return torch.cat([wanted, likely])
    if reach[k] + REACH * apart[k] >= lowest:
        weak = k
    if weak is None:
        way = 2 * apart.square() / max(size, 1e-300) + risen + RATE * size * calls
        gap = (pool.values[k - 1] - pool.values).clamp_min(1e-6 * size)
        weak = k + int((way / gap)[k:].argmax())
    return torch.cat([wanted, torch.tensor([weak])])


def _scouting(pool: Pool, weak: int | None, seed: int) -> Tensor:
    """``(P, 1)``: the residual of the weak pair, or of the scout, or a random vector for it to start from.

    None ``(P, 0)`` where the memory holds everything.
    """
    known = torch.cat([pool.vectors, pool.scout], dim=1)
    if known.shape[1] >= len(known):
        return known[:, :0]
    if weak is not None:
        value = pool.values[weak].item()
        new = _corrected(pool.images[:, weak] - value * pool.vectors[:, weak], value, pool)
    elif pool.scout.shape[1] == 0:
        generator = torch.Generator().manual_seed(seed)
        new = torch.randn(len(known), generator=generator, dtype=torch.float64).to(known)
    else:
        new = pool.scout_images[:, 0]
    for _ in range(2):
        new = new - known @ (known.T @ new)
        new = new / new.norm().clamp_min(torch.finfo(new.dtype).tiny)
    return new[:, None]


def _corrected(residual: Tensor, value: float, pool: Pool) -> Tensor:
    """``Σ_w w wᵀr/(θ - λ_w)`` over remembered w, and what is left of r over .7 of the largest eigenvalue (Davidson)."""
    scale = max(pool.values.abs().max().item(), abs(value), 1e-300)
    gap = (value - pool.values).abs().clamp_min(0.01 * scale).to(residual)
    return residual + pool.vectors @ ((pool.vectors.T @ residual) * (0.7 * scale / gap - 1))


def _moved(space: _Space, pool: Pool, chosen: Tensor, lag: int) -> tuple[float, Tensor]:
    """``‖(A_t - A_s) w‖`` and ``wᵀ(A_t - A_s) w``, per call: the largest of the first, and all of the second."""
    n = min(len(chosen), space.size)
    chosen = chosen[:n]
    calls = pool.ages[chosen] + lag
    change = (space.image[:n] - pool.images[:, chosen].T).norm(dim=1).double().cpu()
    return (change / calls).max().item(), (space.t.diagonal()[:n] - pool.values[chosen]) / calls


def _renewed(pool: Pool, space: _Space, scout: Tensor, rates: Tensor, k: int, lag: int) -> Pool:
    """The best Ritz pairs of the space, where images are new, and of what the pool adds, where they are old."""
    n = space.size
    v, image = space.v[:n], space.image[:n]
    more = torch.cat([pool.vectors, pool.scout], dim=1).T
    more_image = torch.cat([pool.images, pool.scout_images], dim=1).T
    j = pool.scout.shape[1]
    ages = torch.cat([pool.ages + lag, pool.ages.new_full((j,), lag * (1.0 + pool.products))])
    overlap = more @ v.T
    more, more_image = more - overlap @ v, more_image - overlap @ image
    turn = _independent((more @ more.T).double().cpu())
    share = turn.square() / turn.square().sum(dim=1, keepdim=True)
    ages = torch.cat([ages.new_zeros(n), share @ ages])
    rates = torch.cat([rates, ages.new_zeros(n - len(rates)), share @ torch.cat([pool.rates, ages.new_zeros(j)])])
    u, image = torch.cat([v, turn.to(v) @ more]), torch.cat([image, turn.to(v) @ more_image])
    h = (u @ image.T).double().cpu()
    h[:n, n:] = h[n:, :n].T  # products with the space are new, on either side
    h = (h + h.T) / 2
    values, s = torch.linalg.eigh(h)
    top, values = s.flip(1)[:, : k + POOL], values.flip(0)[: k + POOL]
    ahead, products = _ahead(torch.cat([pool.scout, scout], dim=1), u, h, top), pool.products + scout.shape[1]
    ended = products >= math.ceil(math.log(6 * len(pool.vectors) ** 0.5) / GROWTH) or ahead.shape[1] == 0
    if ended:
        ahead, products = ahead[:, :0], 0
    weights, there = top.T.to(u), ahead.T.to(u)
    return Pool(
        _columns(weights @ u),
        _columns(weights @ image),
        values,
        top.square().T @ ages,
        top.square().T @ rates,
        _columns(there @ u),
        _columns(there @ image),
        products,
        1 - pool.searches,
    )


def _columns(rows: Tensor) -> Tensor:
    """Laid out as they come back from a checkpoint: another layout rounds differently."""
    return rows.T.clone(memory_format=torch.contiguous_format)


def _independent(gram: Tensor) -> Tensor:
    """Rows of coefficients: Gram-Schmidt in the given order, without vectors of which less than a third is left."""
    rows: list[Tensor] = []
    for unit in torch.eye(len(gram), dtype=gram.dtype):
        for row in rows:
            unit = unit - row * (row @ gram @ unit)
        size = (unit @ gram @ unit).item()
        if size > 0.1:
            rows.append(unit / size**0.5)
    return torch.stack(rows) if rows else gram.new_zeros((0, len(gram)))


def _ahead(columns: Tensor, u: Tensor, h: Tensor, top: Tensor) -> Tensor:
    """The scout's next two vectors in terms of u: the best of its three orthogonal to `top`, and where it moved."""
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


def _lag(v: Tensor, image: Tensor, memory: Memory) -> tuple[int, float]:
    """Which of the two memories foretold ``A v`` better, and its error per call; 0 while there is only one."""
    pools = (memory.last, memory.before)
    last, before = ((image - p.images @ (p.vectors.T @ v)).norm().item() for p in pools)
    if memory.before.vectors.shape[1] == 0:
        return 0, last
    return (2, before / 2) if before < 0.8 * last else (1, last)


def _with_more(found: Eigenpairs, used: int, cost: float) -> Eigenpairs:
    total = found.num_matvecs + used
    return replace(found, num_matvecs=total, num_gradients=total * cost)


def _afresh(a: SymmetricOperator, k: int, above: float | None, rtol: float, gap: float, seed: int) -> Eigenpairs:
    """From a random start, with as many pairs as there are above the limit."""
    used, wanted = 0, k
    while True:
        found = lanczos(a, min(k + (above is not None), a.size), rtol=rtol, gap=gap, seed=seed)
        used += found.num_matvecs
        if above is None or len(found.values) == a.size or found.values[-1] < above:
            break
        k = 2 * k
    if above is not None:
        k = max(min(wanted, a.size), int((found.values >= above).sum()))
    assert found.memory is not None
    return replace(
        found,
        values=found.values[:k],
        vectors=found.vectors[:, :k],
        residuals=found.residuals[:k],
        num_matvecs=used,
        num_gradients=used * a.cost,
        memory=replace(found.memory, k=k),
    )
