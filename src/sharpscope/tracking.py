"""Top eigenpairs of an operator that changes a little from call to call, as along training.

Rayleigh-Ritz on what is remembered, widened by residuals until they are small: a Krylov space when one vector is
remembered.  Three things keep it from following the wrong eigenvalue.

It remembers two calls.  At the edge of stability the weights oscillate with period two, and the vectors of the call
before last foretell the answer better than the last ones; how well each foretold the last answer decides.

It remembers a pool: the Ritz pairs next to the wanted ones, each with its value and the number of calls since it was
multiplied.  Those that may have overtaken, at the rate at which eigenvalues have changed lately, take part.

Every `verify` calls, and sooner where the memory foretells badly, it solves from a random start, which renews the pool
and gives a bound from above.  What it cannot see is an eigenvalue that rises from the bulk to the top between two such
solves.

P parameters, k wanted pairs, m columns in the space.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from .eigen import POOL, Eigenpairs, Memory, NotFinite, Pool, lanczos
from .operators import SymmetricOperator

FRESH = 0.03
"""Random part of the last column, from which one call after another filters what nobody knew of."""

UNPROVEN = 1e-3
"""Square of the surprise that is accepted from the first memory, before there are two to choose from."""


def track(
    a: SymmetricOperator,
    last: Eigenpairs | Memory | None = None,
    k: int = 1,
    *,
    above: float | None = None,
    rtol: float = 3e-3,
    verify: int = 50,
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
    pool = memory.before if memory.lag == 2 else memory.last
    space, chosen = _begun(a, pool, k, memory, above, seed)
    ritz, _, residuals = space.ritz()
    scale = max(ritz.abs().max().item(), 1e-300)
    turned, changed = residuals[0].norm().item() / scale, (ritz[0] - pool.values[0]).item() / scale
    surprise = turned**2 + changed**2
    doubt = memory.doubt + 1 / verify + 10 * surprise
    fresh, used, before = None, 0, memory.last
    if doubt >= 1 or (memory.lag == 0 and surprise > UNPROVEN):
        used = space.used
        fresh = _afresh(a, k, above, rtol, 3 * rtol, seed)
        assert fresh.memory is not None
        pool, before = _joined(fresh.memory.last, pool, k), _joined(before, fresh.memory.last, k)
        k, doubt = max(k, fresh.memory.k), 0.0
        space, chosen = _begun(a, pool, k, memory, above, seed)
    moved = _moved(space, pool, chosen, max(memory.lag, 1))
    limit = 30 + 4 * k
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
        lowest = ritz[k - 1] if above is None else min(ritz[k - 1].item(), above)
        loose = (norms > bound) & ((torch.arange(len(ritz)) < k) | (rivals > lowest))
        if not bool(loose.any()) or space.size >= a.size:
            break
        if space.used >= limit:
            found = _afresh(a, wanted, above, rtol, rtol / 3, seed)
            return _with_more(found, used + space.used, a.cost)
        space.add(residuals[loose][:1].T)
    if above is not None:
        k = max(min(wanted, len(ritz)), int((ritz >= above).sum()))
    now = Memory(
        _renewed(pool, chosen, vectors, residuals, ritz, k, max(memory.lag, 1)),
        before,
        _lag(vectors[0], memory),
        doubt,
        k,
        max(0.98 * memory.drift, moved),
    )
    used, upper = used + space.used, math.inf
    if fresh is not None:
        used, upper = used + fresh.num_matvecs, max(fresh.upper, ritz[0].item())
    return Eigenpairs(
        ritz[:k].to(vectors),
        vectors[:k].T,
        norms[:k].to(vectors),
        used,
        upper,
        floor,
        used * a.cost,
        now,
    )


class _Space:
    """An orthonormal basis with its image, both as rows ``(m, P)``, and ``T = V A Vᵀ``."""

    def __init__(self, a: SymmetricOperator, room: int) -> None:
        self.a, self.size, self.used = a, 0, 0
        self.v, self.image = a.like.new_empty((room, a.size)), a.like.new_empty((room, a.size))
        self.t = torch.zeros((room, room), dtype=torch.float64)
        self.asymmetry = 0.0

    def add(self, columns: Tensor) -> None:
        """Widen the space by what is new in `columns` ``(P, j)``."""
        rows = columns.T / columns.norm(dim=0)[:, None].clamp_min(torch.finfo(columns.dtype).tiny)
        rows = rows[: min(len(self.v), self.a.size) - self.size]
        for _ in range(2):
            rows = rows - (rows @ self.v[: self.size].T) @ self.v[: self.size]
            rows = torch.linalg.qr(rows.T).Q.T
        n, m = self.size, self.size + len(rows)
        self.v[n:m] = rows
        self.image[n:m] = (self.a @ rows.T).T
        if not bool(self.image[n:m].isfinite().all()):
            raise NotFinite("a product with the operator is not finite: its curvature is not defined at these weights")
        block = (self.v[:m] @ self.image[n:m].T).double().cpu()
        back = (self.v[n:m] @ self.image[:n].T).double().cpu().T
        self.asymmetry = max(self.asymmetry, (block[:n] - back).norm().item())
        self.t[:n, n:m], self.t[n:m, :n] = block[:n], block[:n].T
        self.t[n:m, n:m] = (block[n:] + block[n:].T) / 2
        self.size, self.used = m, self.used + len(rows)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ``(m,)`` descending, vectors and residuals as rows ``(m, P)``."""
        values, s = torch.linalg.eigh(self.t[: self.size, : self.size])
        values, s = values.flip(0), s.flip(1).T.to(self.v)
        vectors = s @ self.v[: self.size]
        return values, vectors, s @ self.image[: self.size] - values[:, None].to(vectors) * vectors


def _begun(
    a: SymmetricOperator, pool: Pool, k: int, memory: Memory, above: float | None, seed: int
) -> tuple[_Space, Tensor]:
    """A space of those of the pool that matter, which are returned too, the last with a random part."""
    chosen = _candidates(pool, k, memory, above)
    columns = pool.vectors[:, chosen]
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(a.size, generator=generator, dtype=torch.float64).to(columns)
    if len(chosen) > k:
        columns[:, -1] += FRESH * fresh / fresh.norm()
    space = _Space(a, 30 + 4 * k + len(chosen) + POOL)
    space.add(columns)
    return space, chosen


def _candidates(pool: Pool, k: int, memory: Memory, above: float | None) -> Tensor:
    """Of the pool the k best, and of the others those most likely to have overtaken them, or else the oldest."""
    k = min(k, len(pool.values))
    reach = pool.values + 2 * memory.drift * (1 + memory.lag + pool.ages)
    lowest = pool.values[k - 1].item() - memory.drift
    room = 1 + k // 2
    if above is not None:
        lowest, room = min(lowest, above), len(reach)
    likely = reach[k:].argsort(descending=True)[:room] + k
    likely = likely[reach[likely] >= lowest]
    if len(likely) == 0 and len(reach) > k:
        likely = pool.ages[k:].argmax()[None] + k
    return torch.cat([torch.arange(k), likely])


def _moved(space: _Space, pool: Pool, chosen: Tensor, lag: int) -> float:
    """The largest change of a Rayleigh quotient since it was taken, per call."""
    n = min(space.size, len(chosen))
    change = (space.t.diagonal()[:n] - pool.values[chosen][:n]).abs()
    return (change / (lag + pool.ages[chosen][:n])).max().item()


def _renewed(pool: Pool, chosen: Tensor, vectors: Tensor, residuals: Tensor, ritz: Tensor, k: int, lag: int) -> Pool:
    """The Ritz pairs of this call, and what of the pool they do not hold, best values first.

    Those beyond the wanted ones take a step of the power method, at no further product.
    """
    others = [i for i in range(len(pool.values)) if i not in chosen.tolist()]
    stale = pool.vectors[:, others]
    stale = stale - vectors.T @ (vectors @ stale)
    left = stale.norm(dim=0)
    far = (left > 0.7).cpu()
    values = torch.cat([ritz, pool.values[others][far]])
    ages = torch.cat([torch.zeros(len(ritz), dtype=torch.float64), pool.ages[others][far] + lag])
    stepped = vectors[k:] + residuals[k:] / ritz.abs().max().clamp_min(1e-300).to(vectors)
    stepped = stepped / stepped.norm(dim=1, keepdim=True)
    columns = torch.cat([vectors[:k].T, stepped.T, (stale / left)[:, far]], dim=1)
    best = values.argsort(descending=True)
    best = torch.cat([torch.arange(k), best[best >= k][:POOL]])
    return Pool(columns[:, best], values[best], ages[best])


def _lag(v: Tensor, memory: Memory) -> int:
    """Which of the two remembered spaces holds more of the new top vector; 0 while there is only one."""
    if memory.before.vectors.shape[1] == 0:
        return 0
    shares = [(pool.vectors[:, : memory.k].T @ v).norm().item() for pool in (memory.last, memory.before)]
    return 2 if 1 - shares[1] < 0.8 * (1 - shares[0]) - 1e-6 else 1


def _joined(first: Pool, second: Pool, k: int) -> Pool:
    """The k best of the first pool, then what the rest of it and the second add, best values first."""
    more = second.vectors - first.vectors @ (first.vectors.T @ second.vectors)
    left = more.norm(dim=0)
    far = (left > 0.1).cpu()  # what is left of a pair that both hold is of no use
    columns = torch.cat([first.vectors, (more / left)[:, far]], dim=1)
    values = torch.cat([first.values, second.values[far]])
    ages = torch.cat([first.ages, second.ages[far]])
    best = torch.cat([torch.arange(k), values[k:].argsort(descending=True) + k])
    return Pool(columns[:, best], values[best], ages[best])


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
