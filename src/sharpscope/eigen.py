"""Top eigenpairs of a symmetric operator, with the residuals that say how good they are.

Block Lanczos: from a block Q₀ of b columns the basis grows by ``A Q_j``, orthogonalized against everything before
(twice), so that ``A V = V T + R Eᵀ`` with T the small projected matrix and R the last block's remainder.  A Ritz pair
``(θ, V s)`` of T then has the residual ``‖R s_last‖``, at no further product.  A block as wide as the number of wanted
pairs finds eigenvalues of that multiplicity.

A warm start may hold eigenvectors of smaller eigenvalues, whose residuals are zero at once.  Hence a random column in
every start, and a warm result is believed only after ``1 + ln √P`` blocks, in which the random column's share of an
unseen larger eigenvector (``1/√P`` of it) has grown to order one, and when the next unconverged Ritz pair is far from
reaching the wanted ones.  Directions that have converged leave the block, so that those extra products are mostly one
per step.  Copies of an exactly multiple eigenvalue need a column each: start cold to count them.

P parameters, k wanted pairs, m columns in the basis.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import SymmetricOperator


class NotConverged(RuntimeError):
    """A solver used up its products before its residuals met the tolerance."""


class NotFinite(ValueError):
    """A product with the operator overflowed, or is not a number."""


@dataclass(frozen=True)
class Eigenpairs:
    """The k algebraically largest eigenpairs, largest first.

    ``values[i]`` is the Rayleigh quotient of ``vectors[:, i]``, hence never above the largest eigenvalue; some
    eigenvalue lies within ``residuals[i]`` of it.
    """

    values: Tensor  # (k,)
    vectors: Tensor  # (P, k), orthonormal columns
    residuals: Tensor  # (k,)  ‖A v - λ v‖; after a warm start up to rtol/2 more, never less
    num_matvecs: int


def lanczos(
    a: SymmetricOperator,
    k: int = 1,
    *,
    start: Tensor | None = None,
    rtol: float = 1e-4,
    max_matvecs: int | None = None,
    basis: int = 96,
    seed: int = 0,
) -> Eigenpairs:
    """The k algebraically largest eigenpairs of `a` by block Lanczos with thick restarts [N4].

    Args:
        start: columns ``(P, j)`` near the wanted eigenvectors (those of the last call, say); a random one is added.
        rtol: bound on every residual, relative to the largest eigenvalue in magnitude.  An isolated eigenvalue is
            then right to about rtol² relative to its gap.
        max_matvecs: products allowed; by default 40 per pair and at least 400.
        basis: columns kept in memory before a restart keeps only the best of them.
        seed: of the random start; torch's global generator is not used.

    Raises:
        NotConverged: with the residuals reached.
        NotFinite: a ValueError, for an operator whose products are not finite.
        ValueError: k outside 1..P, or a start of another size.
    """
    size = a.size
    if not 1 <= k <= size:
        raise ValueError(f"k={k} eigenpairs asked of an operator of size {size}; k lies between 1 and {size}")
    if start is not None and start.shape[:1] != (size,):
        raise ValueError(f"a start of shape {tuple(start.shape)} does not fit an operator of size {size}")
    budget = max(400, 40 * k) if max_matvecs is None else max_matvecs
    block = _start_block(a.like, k, start, seed)
    basis = min(size, max(basis, 3 * block.shape[1] + k))
    v = a.like.new_empty((basis + block.shape[1], size))  # rows are basis vectors
    t = torch.zeros((len(v), len(v)), dtype=torch.float64)
    v[: block.shape[1]] = block.T
    old, new, used = 0, block.shape[1], 0  # rows [0, old) were multiplied, rows [old, new) are the current block
    warm = start is not None
    blocks = 1 + round(math.log(size) / 2) if warm else 1  # still to be seen before a result is believed
    leave = max(rtol / 2 / block.shape[1] ** 0.5 if warm else 0.0, 32 * torch.finfo(v.dtype).eps)
    lost = 0.0  # ‖·‖² of the remainders left out so far
    while True:
        image = torch.stack([a.matvec(q) for q in v[old:new]])
        used += new - old
        if not bool(image.isfinite().all()):
            raise NotFinite("a product with the operator is not finite: its curvature is not defined at these weights")
        blocks -= 1
        remainder = _project_out(v[:new], image, t, old, new)
        ritz, s = torch.linalg.eigh(t[:new, :new])
        ritz, s = ritz.flip(0), s.flip(1)
        scale = ritz.abs().max().item()
        rows, coefficients, left_out = _orthonormal_rows(remainder, v[:new], leave * scale)
        residuals = ((coefficients @ s[old:new]).square().sum(dim=0) + lost).sqrt()
        lost += left_out
        bound = max(rtol, 8 * torch.finfo(v.dtype).eps * new**0.5) * scale
        done = blocks <= 0 and bool((residuals[:k] <= bound).all())
        if done and warm:
            reach = (ritz + 2 * residuals)[residuals > bound][:1]  # of the first pair that has not converged
            done = bool((reach <= ritz[k - 1] + bound).all())
        if done or len(rows) == 0:
            return Eigenpairs(ritz[:k].to(v), (s[:, :k].T.to(v) @ v[:new]).T, residuals[:k].to(v), used)
        if used + len(rows) > budget:
            raise NotConverged(
                f"top-{k} residuals {residuals[:k].tolist()} exceed rtol={rtol:g} times {scale:.4g} after"
                f" {used} products; raise max_matvecs or rtol"
            )
        old, new = new, new + len(rows)
        if new > basis:
            keep = min(old - 1, max(k + 2, basis // 2), basis - len(rows))
            v[:keep] = s[:, :keep].T.to(v) @ v[:old]
            t.zero_()
            t[:keep, :keep] = torch.diag(ritz[:keep])
            old, new = keep, keep + len(rows)
        v[old:new] = rows


def _start_block(like: Tensor, k: int, start: Tensor | None, seed: int) -> Tensor:
    """Orthonormal columns ``(P, b)``: the given ones and one random, or as many random ones as pairs are wanted."""
    given = like.new_empty((like.numel(), 0)) if start is None else start.reshape(like.numel(), -1).to(like)
    given = given[:, : like.numel()]
    wanted = min(like.numel(), max(k, given.shape[1] + 1))
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn((like.numel(), wanted - given.shape[1]), generator=generator, dtype=torch.float64).to(like)
    return torch.linalg.qr(torch.cat([given, fresh], dim=1)).Q


def _project_out(v: Tensor, image: Tensor, t: Tensor, old: int, new: int) -> Tensor:
    """Remove the span of the basis rows from `image` (twice, for orthogonality to rounding); record T's new columns."""
    h = v @ image.T
    rest = image - h.T @ v
    again = v @ rest.T
    rest = rest - again.T @ v
    columns = (h + again).double().cpu()
    t[:new, old:new] = columns
    t[old:new, :new] = columns.T
    t[old:new, old:new] = (columns[old:] + columns[old:].T) / 2
    return rest


def _orthonormal_rows(rest: Tensor, v: Tensor, small: float) -> tuple[Tensor, Tensor, float]:
    """Rows spanning `rest` but for directions of norm up to `small`, coefficients, and what was left out.

    The coefficients ``C (b, b)`` give ``‖C s‖ = ‖restᵀ s‖``; what was left out is the sum of its squared norms.
    """
    q, r = torch.linalg.qr(rest.T)
    turn, norms, coefficients = torch.linalg.svd(r.double().cpu())
    keep = norms > max(small, torch.finfo(rest.dtype).tiny)
    rows = (q @ turn[:, keep].to(q)).T
    for _ in range(2):
        rows = rows - (rows @ v.T) @ v
        rows = torch.linalg.qr(rows.T).Q.T
    return rows, norms[:, None] * coefficients, norms[~keep].square().sum().item()
