"""Find rescalings that change nothing, as linear relations between the Euler products of parts of the weights.

Rescaling parts t by c^{a_t} leaves L as it is for every c exactly when, at all weights,

    Σ_t a_t w_tᵀ ∇_t L(w) = 0

so gradients at a few random points show which sums of rows, pairs of tensors or sets of tensors do not see a scale:
a = 1 on a block of rows, a = (1, -1) on a pair, a in {0, 1} on tensors that may be rescaled together.

P parameters, n of them in a part, m points, T parts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

MAX_BLOCK_COSINE = 1e-3
"""Largest Euler cosine, over all points, of a block of rows that is tried."""

MAX_PAIR_MISMATCH = 1e-4
"""Largest mismatch, over all points, between the Euler products of a pair."""

MAX_NULL_VALUE = 1e-2
"""Largest singular value, against the first, of relations that are tried: eps leaves some."""

MIN_DROP = 10
"""Factor by which singular values drop where relations begin."""

MAX_JOINT_COSINE = 2e-2
"""Largest Euler cosine, over all points, of a set of tensors that is tried."""

MAX_ROWS = 2048
"""Number of rows beyond which only single rows are tried, since there are n² blocks."""

MAX_MIXED = 12
"""Number of relations with other coefficients than 0 and 1 up to which all of their sums are tried."""


@dataclass(frozen=True)
class Sample:
    """A point `w` ``(P,)`` and the gradient `g` ``(P,)`` there."""

    w: Tensor
    g: Tensor


@dataclass(frozen=True)
class Sums:
    """Euler products ``wᵀ∇`` ``(m, rows)`` of the rows of a grid of weights, and ``‖w‖‖∇‖`` to compare them with."""

    products: Tensor
    sizes: Tensor


def euler_cosine(samples: list[Sample], indices: Tensor) -> float:
    """Largest ``|w_gᵀ∇_g| / (‖w_g‖‖∇_g‖)`` over the samples; 1 where a gradient vanishes or is not finite."""
    worst = 0.0
    for s in samples:
        w_g, g_g = s.w[indices].double(), s.g[indices].double()
        size = (w_g.norm() * g_g.norm()).item()
        worst = max(worst, abs((w_g @ g_g).item()) / size if 0 < size < float("inf") else 1.0)
    return worst


def row_products(s: Sample, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``w_rᵀ∇_r`` and ``‖w_r‖‖∇_r‖`` of the rows r of a grid of indices ``(rows, entries)``."""
    w, g = s.w[grid].double(), s.g[grid].double()
    return (w * g).sum(dim=1), w.norm(dim=1) * g.norm(dim=1)


def blocks(grids: Mapping[str, Tensor], sums: Mapping[str, Sums]) -> dict[str, Tensor]:
    """Find the shortest disjoint runs of rows whose Euler products add up to zero.

    `grids`: a name with a place for the rows, as in ``"weight[{}]"`` -> indices ``(rows, entries)``.
    """
    found: dict[str, Tensor] = {}
    taken = torch.zeros(1 + max((int(grid.max()) for grid in grids.values()), default=0), dtype=torch.bool)
    for name, grid in grids.items():
        for start, stop in _zero_runs(sums[name], ~taken[grid].any(dim=1)):
            place = f"{start}" if stop == start + 1 else f"{start}:{stop}"
            found[name.format(place)] = grid[start:stop].flatten()
            taken[grid[start:stop]] = True
    return found


def _zero_runs(sums: Sums, free: Tensor) -> Iterator[tuple[int, int]]:
    products, sizes = _cumulated(sums.products), _cumulated(sums.sizes.square())
    n = len(free)
    for length in range(1, n if n <= MAX_ROWS else 2):
        product, size = (x[:, length:] - x[:, :-length] for x in (products, sizes))
        fits = ((product.abs() <= MAX_BLOCK_COSINE * size.clamp_min(0).sqrt()) & (size > 0)).all(dim=0)
        for start in fits.nonzero().flatten().tolist():
            if bool(free[start : start + length].all()):
                free[start : start + length] = False
                yield start, start + length


def _cumulated(rows: Tensor) -> Tensor:
    """Sum over the first 0, 1, .. rows, for each of the points ``(m, rows + 1)``."""
    return torch.cat([rows.new_zeros(len(rows), 1), rows.cumsum(dim=1)], dim=1)


def rescaled_pairs(
    parts: Mapping[str, Tensor], wider: Mapping[str, Tensor], sums: Mapping[str, Sums]
) -> tuple[dict[str, float], set[str]]:
    """Find pairs that may be rescaled by c and 1/c, and the parts that the other side of a pair represents in sums.

    The pairs are ``"a -> b"`` -> mismatch: ``a`` is `wider` (a weight and its bias) or one of the parts, ``b`` the next
    one with the same Euler product.
    """
    units = sorted({**parts, **wider}.items(), key=lambda item: int(item[1].min()))
    products, sizes = _side_by_side(sums, [name for name, _ in units])
    nonzero = (products.abs() > MAX_PAIR_MISMATCH * sizes).any(dim=0)
    mismatch = torch.zeros(len(units), len(units)).to(products)
    for e, size in zip(products, sizes, strict=True):
        mismatch = torch.maximum(mismatch, (e[:, None] - e).abs() / torch.hypot(size[:, None], size))
    fits = (mismatch <= MAX_PAIR_MISMATCH) & nonzero[:, None] & nonzero
    pairs: dict[str, float] = {}
    represented: set[str] = set()
    for a, (name, indices) in enumerate(units):
        later = [b for b in fits[a].nonzero().flatten().tolist() if b > a]
        b = next((b for b in later if not bool(torch.isin(units[b][1], indices).any())), None)
        if b is not None:
            pairs[f"{name} -> {units[b][0]}"] = mismatch[a, b].item()
            represented.update([n for n, i in parts.items() if bool(torch.isin(i, indices).all())][:1])
    return pairs, represented


def joint_groups(parts: Mapping[str, Tensor], sums: Mapping[str, Sums]) -> dict[str, Tensor]:
    """Find disjoint sets of parts whose Euler products add up to zero, smallest first.

    Null vectors of the Euler products ``(m, T)`` in reduced form, with the pivots on small tensors (gains) where
    possible: a relation through a gain then does not mix with the others.
    """
    names = sorted(parts, key=lambda name: parts[name].numel())
    if len(names) < 2:
        return {}
    matrix, sizes = (x.cpu() for x in _side_by_side(sums, names))
    found: dict[str, Tensor] = {}
    free = torch.ones(len(names), dtype=torch.bool)
    for chosen in _zero_one(matrix):
        close = matrix[:, chosen].sum(dim=1).abs() <= MAX_JOINT_COSINE * sizes[:, chosen].norm(dim=1)
        if bool(free[chosen].all()) and bool(close.all()):
            free[chosen] = False
            members = sorted((n for n, c in zip(names, chosen, strict=True) if c), key=lambda n: int(parts[n].min()))
            found[_title(members)] = torch.cat([parts[n] for n in members])
    return found


def _side_by_side(sums: Mapping[str, Sums], names: list[str]) -> tuple[Tensor, Tensor]:
    """Euler products and sizes ``(m, rows)`` of all rows of these grids."""
    return torch.cat([sums[n].products for n in names], dim=1), torch.cat([sums[n].sizes for n in names], dim=1)


def _title(members: list[str]) -> str:
    return " + ".join(members) if len(members) <= 3 else f"{members[0]} + {len(members) - 1} more"


def _relations(matrix: Tensor) -> Iterator[Tensor]:
    """Yield null vectors of ``(m, T)`` as rows ``(k, T)`` in reduced form, for every k where singular values drop.

    Relations that eps disturbs are null to some 1e-5, others to rounding.
    """
    scaled = matrix / matrix.norm(dim=1, keepdim=True)
    size = scaled.norm(dim=0)
    _, values, vectors = torch.linalg.svd(scaled / size)
    values = (values / values[0]).clamp_min(1e-14)
    for first in range(1, len(values)):
        if values[first] <= MAX_NULL_VALUE and values[first - 1] > MIN_DROP * values[first]:
            yield _reduced(vectors[first:] / size)


def _reduced(relations: Tensor) -> Tensor:
    """Bring relations to reduced row echelon form, with entries of one on the earliest columns that serve."""
    out, k = relations.clone(), 0
    for column in range(out.shape[1]):
        if k == len(out):
            break
        size = out[k:].abs().max(dim=1).values.max()
        best = k + int(out[k:, column].abs().argmax())
        if out[best, column].abs() < 1e-2 * size:
            continue
        out[[k, best]] = out[[best, k]]
        out[k] = out[k] / out[k, column]
        others = torch.arange(len(out)) != k
        out[others] -= out[others, column][:, None] * out[k]
        k += 1
    return out


def _zero_one(matrix: Tensor) -> list[Tensor]:
    """Find null vectors with all coefficients 0 or 1 among relations and sums of a few, as masks ``(T,)``.

    Those with the fewest ones come first.
    """
    plain: list[Tensor] = []
    for relations in _relations(matrix):
        plain += [r for r in relations if _is_zero_one(r)]
        mixed = [r for r in relations if not _is_zero_one(r)]
        for count in range(2, len(mixed) + 1 if len(mixed) <= MAX_MIXED else 3):
            added = (torch.stack(some).sum(dim=0) for some in combinations(mixed, count))
            plain += [r for r in added if _is_zero_one(r)]
    return sorted((r > 0.5 for r in plain), key=lambda mask: int(mask.sum()))


def _is_zero_one(relation: Tensor) -> bool:
    return bool((torch.minimum(relation.abs(), (relation - 1).abs()) < 0.1).all())
