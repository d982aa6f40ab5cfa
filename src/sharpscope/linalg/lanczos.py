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
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidValue, NotConverged, NotFinite
from .bounds import RandomStart
from .eigenpairs import CONFIDENCE, POOL, Eigenpairs, Memory, Pool
from .operators import SymmetricOperator, restricted, scaled


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
    """The k algebraically largest eigenpairs of `a` by block Lanczos with thick restarts [N4].

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
    return _block_lanczos(a, k, 0, rtol, gap, max_matvecs, basis, seed)[0]


def both_ends(
    a: SymmetricOperator, k: int = 1, low: int = 1, *, rtol: float = 1e-4, seed: int = 0
) -> tuple[Eigenpairs, Tensor]:
    """Both ends of the spectrum from one run: the k largest eigenpairs, and the `low` smallest eigenvalues ascending.

    The residuals of both meet `rtol`; arguments and errors otherwise as in `lanczos`.
    """
    return _block_lanczos(a, k, low, rtol, math.inf, None, 96, seed)


def _block_lanczos(
    a: SymmetricOperator,
    k: int,
    low: int,
    rtol: float,
    gap: float,
    max_matvecs: int | None,
    basis: int,
    seed: int,
) -> tuple[Eigenpairs, Tensor]:
    size = a.size
    if not 1 <= k <= size:
        raise InvalidValue(f"k={k} eigenpairs asked of an operator of size {size}; k lies between 1 and {size}")
    if not 0 <= low <= size:
        raise InvalidValue(f"{low} smallest eigenvalues asked of an operator of size {size}")
    budget = max(400, 40 * (k + low)) if max_matvecs is None else max_matvecs
    block, random = _start_block(a.like, k, seed)
    basis = min(size, max(basis, 3 * block.shape[1] + k + low))
    v = a.like.new_empty((basis + block.shape[1], size))  # rows are basis vectors
    t = torch.zeros((len(v), len(v)), dtype=torch.float64)
    v[: block.shape[1]] = block.T
    old, new, used = 0, block.shape[1], 0  # rows [0, old) were multiplied, rows [old, new) are the current block
    eps = torch.finfo(v.dtype).eps
    lost, noise = 0.0, 0.0  # ‖·‖² of the remainders left out so far; largest asymmetry seen
    while True:
        image = (a @ v[old:new].T).T
        used += new - old
        if not bool(image.isfinite().all()):
            raise NotFinite("a product with the operator is not finite: its curvature is not defined at these weights")
        foreseen = t[:old, old:new].clone()
        remainder = _project_out(v[:new], image, t, old, new)
        noise = max(noise, (t[:old, old:new] - foreseen).norm().item())
        ritz, s = torch.linalg.eigh(t[:new, :new])
        ritz, s = ritz.flip(0), s.flip(1)
        scale = ritz.abs().max().item()
        rows, coefficients, left_out = _orthonormal_rows(remainder, v[:new], 32 * eps * scale)
        coupling = coefficients @ s[old:new]
        residuals = (coupling.square().sum(dim=0) + lost).sqrt()
        lost += left_out
        bound = max(rtol, 8 * eps * new**0.5) * scale
        floor = max(noise + lost**0.5, 16 * eps * scale)
        done = bool((residuals[:k] <= bound).all() and (residuals[new - low :] <= bound).all())
        upper = math.inf
        if done or len(rows) == 0:
            p = 1 - CONFIDENCE
            upper = random.upper(ritz.numpy(), s.numpy(), coupling.numpy(), p, scale) + floor
        if len(rows) == 0 or (done and upper - ritz[0].item() <= max(gap * scale, 2 * floor)):
            m = min(k + POOL, new)
            vectors = (s[:, :m].T.to(v) @ v[:new]).T
            images = ritz[:m].to(v) * vectors + rows.T @ coupling[: len(rows), :m].to(v)
            pool, none = Pool.of(vectors, images, ritz[:m]), Pool.of(vectors[:, :0], vectors[:, :0], ritz[:0])
            top = Eigenpairs(
                ritz[:k].to(v),
                vectors[:, :k],
                residuals[:k].to(v),
                used,
                upper,
                floor,
                used * a.cost,
                Memory(pool, none, k=k),
            )
            return top, ritz[new - low :].flip(0).to(v)
        if used + len(rows) > budget:
            reached = f"top-{k} residuals {residuals[:k].tolist()} exceed rtol={rtol:g} times {scale:.4g}"
            if done:
                reached = f"λ1 = {ritz[0]:.6g} may be {upper:.6g}, which exceeds gap={gap:g} times {scale:.4g},"
            raise NotConverged(f"{reached} after {used} products; raise max_matvecs or {'gap' if done else 'rtol'}")
        old, new = new, new + len(rows)
        if new > basis:
            keep = min(old - 1, max(k + low + 2, basis // 2), basis - len(rows))
            order = torch.cat(
                [torch.arange(keep - low), torch.arange(old - low, old), torch.arange(keep - low, old - low)]
            )
            ritz, s, coupling = ritz[order], s[:, order], coupling[:, order]
            random.restart(ritz.numpy(), s.numpy(), coupling[: len(rows)].numpy(), keep)
            v[:keep] = s[:, :keep].T.to(v) @ v[:old]
            t.zero_()
            t[:keep, :keep] = torch.diag(ritz[:keep])
            t[:keep, keep : keep + len(rows)] = coupling[: len(rows), :keep].T
            old, new = keep, keep + len(rows)
        else:
            t[old - coefficients.shape[1] : old, old:new] = coefficients[: len(rows)].T
        v[old:new] = rows


def _start_block(like: Tensor, k: int, seed: int) -> tuple[Tensor, RandomStart]:
    """Orthonormal columns ``(P, k)`` spanning Gaussian ones, and those in terms of them."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn((like.numel(), k), generator=generator, dtype=torch.float64).to(like))
    return q, RandomStart(r.double().cpu().numpy())


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
    if len(rest) == 1:
        size = rest.norm().item()
        rows = rest / max(size, torch.finfo(rest.dtype).tiny)
        rows = rows - (rows @ v.T) @ v
        rows = rows / rows.norm().clamp_min(torch.finfo(rest.dtype).tiny)
        coefficients = torch.full((1, 1), size, dtype=torch.float64)
        return rows[: int(size > small)], coefficients, 0.0 if size > small else size**2
    q, r = torch.linalg.qr(rest.T)
    turn, norms, coefficients = torch.linalg.svd(r.double().cpu())
    keep = norms > max(small, torch.finfo(rest.dtype).tiny)
    rows = (q @ turn[:, keep].to(q)).T
    for _ in range(2):
        rows = rows - (rows @ v.T) @ v
        q, r = torch.linalg.qr(rows.T)
        rows = (q * r.diagonal().sign()).T  # Q R with R ≈ 1: the rows keep their signs, as the coefficients do
    return rows, norms[:, None] * coefficients, norms[~keep].square().sum().item()


def smallest_eigenpairs(a: SymmetricOperator, k: int = 1, **options: Any) -> Eigenpairs:
    """The k algebraically smallest eigenpairs, smallest first: `lanczos` on ``-A``, its options and errors [N4].

    Bounds and memory, which are those of ``-A``, are left out; `both_ends` finds values at both ends in one run.
    """
    found = lanczos(scaled(a, -1), k, **options)
    return replace(found, values=-found.values, upper=math.inf, memory=None)


def block_eigenpairs(
    a: SymmetricOperator, slices: Mapping[str, slice | Tensor], k: int = 1, **options: Any
) -> dict[str, Eigenpairs]:
    """The k largest eigenpairs (all of a smaller block) of every diagonal block ``A_gg`` by name, with `lanczos`.

    No block's largest eigenvalue exceeds that of A (Cauchy's interlacing).  `slices` are those of an `Objective`, or
    index tensors as in ``ScaleGroups.groups``.

    >>> a = SymmetricOperator(lambda v: torch.arange(4.0) * v, torch.zeros(4))
    >>> found = block_eigenpairs(a, {"low": slice(2), "high": slice(2, 4)})
    >>> {name: round(pairs.values.item(), 3) for name, pairs in found.items()}
    {'low': 1.0, 'high': 3.0}
    """
    blocks = {name: restricted(a, indices) for name, indices in _indices(a.size, slices).items()}
    return {name: lanczos(block, min(k, block.size), **options) for name, block in blocks.items()}


def group_fractions(v: Tensor, slices: Mapping[str, slice | Tensor]) -> dict[str, float]:
    """``‖v_g‖²/‖v‖²`` of each group of entries of `v` ``(P,)``; they sum to 1, "elsewhere" for what is in none.

    >>> group_fractions(torch.tensor([3.0, 0.0, 4.0]), {"weight": slice(2), "bias": slice(2, 3)})
    {'weight': 0.36, 'bias': 0.64}
    """
    square = v.double().square()
    total = square.sum().item()
    if v.dim() != 1 or not 0 < total < math.inf:
        raise InvalidValue(f"shares are those of one finite vector (P,) that is not zero; got shape {tuple(v.shape)}")
    groups = _indices(len(v), slices)
    taken = torch.cat([v.new_empty(0, dtype=torch.long), *groups.values()])
    if len(taken.unique()) < len(taken):
        raise InvalidValue(f"groups {', '.join(groups)} overlap; an entry counts once")
    found = {name: square[indices].sum().item() / total for name, indices in groups.items()}
    square[taken] = 0
    return found if len(taken) == len(v) else {**found, "elsewhere": square.sum().item() / total}


def _indices(size: int, slices: Mapping[str, slice | Tensor]) -> dict[str, Tensor]:
    everything = torch.arange(size)
    return {name: everything[s if isinstance(s, slice) else s.cpu()] for name, s in slices.items()}
