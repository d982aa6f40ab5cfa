"""Rescalings that change nothing, as linear relations between the Euler products of parts of the weights.

Rescaling parts t by c^{a_t} leaves L as it is for every c exactly when, at all weights,

    Σ_t a_t w_tᵀ ∇_t L(w) = 0

so gradients at a few random points say which sums of rows, pairs of tensors or sets of tensors are blind to scale:
a = 1 on a block of rows, a = (1, -1) on a pair, a in {0, 1} on tensors that may be rescaled together.

P parameters, n of them in a part, m points, T parts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

BLOCK = 1e-3
"""Largest Euler cosine, over all points, of a block of rows that is tried."""

PAIR = 1e-4
"""Largest mismatch, over all points, between the Euler products of a pair."""

NULL_SPACE = 1e-2
"""Largest singular value, against the first, of relations that are tried: eps leaves some."""

DROP = 10
"""Factor by which singular values drop where relations begin."""

JOINT = 2e-2
"""Largest Euler cosine, over all points, of a set of tensors that is tried."""

LONGEST = 2048
"""Rows beyond which only single rows are tried, since blocks are n²."""

MIXED = 12
"""Relations with other coefficients than 0 and 1 of which sums are tried."""


@dataclass(frozen=True)
class Sample:
    """Weights `w` ``(P,)`` and the gradient `g` ``(P,)`` there."""

    w: Tensor
    g: Tensor


@dataclass(frozen=True)
class Sums:
    """Euler products ``(m, rows)`` of the rows of a grid of weights, and the sizes ``‖w‖‖∇‖`` to compare them with."""

    products: Tensor
    sizes: Tensor


def euler(samples: list[Sample], indices: Tensor) -> float:
    """Largest ``|w_gᵀ∇_g| / (‖w_g‖‖∇_g‖)`` over the samples; 1 where a gradient vanishes or is not finite."""
    worst = 0.0
    for s in samples:
        w_g, g_g = s.w[indices].double(), s.g[indices].double()
        size = (w_g.norm() * g_g.norm()).item()
        worst = max(worst, abs((w_g @ g_g).item()) / size if 0 < size < float("inf") else 1.0)
    return worst


def row_sums(s: Sample, grid: Tensor) -> tuple[Tensor, Tensor]:
    """``w_rᵀ∇_r`` and ``‖w_r‖‖∇_r‖`` of the rows r of a grid of indices ``(rows, entries)``."""
    w, g = s.w[grid].double(), s.g[grid].double()
    return (w * g).sum(dim=1), w.norm(dim=1) * g.norm(dim=1)


def blocks(grids: Mapping[str, Tensor], seen: Mapping[str, Sums]) -> dict[str, Tensor]:
    """The shortest disjoint runs of rows whose Euler products add up to zero.

    `grids`: a name with a place for the rows, as in ``"weight[{}]"`` -> indices ``(rows, entries)``.
    """
    found: dict[str, Tensor] = {}
    taken = torch.zeros(1 + max((int(grid.max()) for grid in grids.values()), default=0), dtype=torch.bool)
    for name, grid in grids.items():
        for start, stop in _runs(seen[name], ~taken[grid].any(dim=1)):
            place = f"{start}" if stop == start + 1 else f"{start}:{stop}"
            found[name.format(place)] = grid[start:stop].flatten()
            taken[grid[start:stop]] = True
    return found


def _runs(seen: Sums, free: Tensor) -> Iterator[tuple[int, int]]:
    products, sizes = _cumulated(seen.products), _cumulated(seen.sizes.square())
    n = len(free)
    for length in range(1, n if n <= LONGEST else 2):
        product, size = (x[:, length:] - x[:, :-length] for x in (products, sizes))
        fits = ((product.abs() <= BLOCK * size.clamp_min(0).sqrt()) & (size > 0)).all(dim=0)
        for start in fits.nonzero().flatten().tolist():
            if bool(free[start : start + length].all()):
                free[start : start + length] = False
                yield start, start + length


def _cumulated(rows: Tensor) -> Tensor:
    """Sums over the first 0, 1, .. rows, for each of the points ``(m, rows + 1)``."""
    return torch.cat([rows.new_zeros(len(rows), 1), rows.cumsum(dim=1)], dim=1)


def rescaled_pairs(
    parts: Mapping[str, Tensor], wider: Mapping[str, Tensor], seen: Mapping[str, Sums]
) -> tuple[dict[str, float], set[str]]:
    """``"a -> b"`` -> mismatch of what may be rescaled by c and 1/c, and the parts that b therefore speaks for.

    ``a`` is `wider` (a weight and its bias) or one of the parts, ``b`` the next one with the same Euler product.
    """
    units = sorted({**parts, **wider}.items(), key=lambda item: int(item[1].min()))
    products, sizes = (
        torch.cat(x, dim=1) for x in zip(*((seen[n].products, seen[n].sizes) for n, _ in units), strict=True)
    )
    lively = (products.abs() > PAIR * sizes).any(dim=0)
    mismatch = torch.zeros(len(units), len(units)).to(products)
    for e, size in zip(products, sizes, strict=True):
        mismatch = torch.maximum(mismatch, (e[:, None] - e).abs() / torch.hypot(size[:, None], size))
    fits = (mismatch <= PAIR) & lively[:, None] & lively
    pairs: dict[str, float] = {}
    spare: set[str] = set()
    for a, (name, indices) in enumerate(units):
        later = [b for b in fits[a].nonzero().flatten().tolist() if b > a]
        b = next((b for b in later if not bool(torch.isin(units[b][1], indices).any())), None)
        if b is not None:
            pairs[f"{name} -> {units[b][0]}"] = mismatch[a, b].item()
            spare.update([n for n, i in parts.items() if bool(torch.isin(i, indices).all())][:1])
    return pairs, spare


def joint_groups(parts: Mapping[str, Tensor], seen: Mapping[str, Sums]) -> dict[str, Tensor]:
    """Disjoint sets of parts whose Euler products add up to zero, smallest first.

    Null vectors of the Euler products ``(m, T)`` in reduced form, with the pivots on small tensors (gains) where
    possible: a relation through a gain then does not mix with the others.
    """
    names = sorted(parts, key=lambda name: parts[name].numel())
    if len(names) < 2:
        return {}
    matrix, sizes = (
        torch.cat(x, dim=1).cpu() for x in zip(*((seen[n].products, seen[n].sizes) for n in names), strict=True)
    )
    found: dict[str, Tensor] = {}
    free = torch.ones(len(names), dtype=torch.bool)
    for chosen in _zero_one(matrix):
        close = matrix[:, chosen].sum(dim=1).abs() <= JOINT * sizes[:, chosen].norm(dim=1)
        if bool(free[chosen].all()) and bool(close.all()):
            free[chosen] = False
            members = sorted((n for n, c in zip(names, chosen, strict=True) if c), key=lambda n: int(parts[n].min()))
            found[_title(members)] = torch.cat([parts[n] for n in members])
    return found


def _title(members: list[str]) -> str:
    return " + ".join(members) if len(members) <= 3 else f"{members[0]} + {len(members) - 1} more"


def _relations(matrix: Tensor) -> Iterator[Tensor]:
    """Null vectors of ``(m, T)`` as rows ``(k, T)`` in reduced form, for every k at which the singular values drop.

    Relations that eps disturbs are null to some 1e-5, others to rounding.
    """
    scaled = matrix / matrix.norm(dim=1, keepdim=True)
    size = scaled.norm(dim=0)
    _, values, vectors = torch.linalg.svd(scaled / size)
    values = (values / values[0]).clamp_min(1e-14)
    for first in range(1, len(values)):
        if values[first] <= NULL_SPACE and values[first - 1] > DROP * values[first]:
            yield _reduced(vectors[first:] / size)


def _reduced(relations: Tensor) -> Tensor:
    """Reduced row echelon form: entries of one on the earliest columns that serve."""
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
    """Null vectors with all coefficients 0 or 1, as masks ``(T,)``, fewest ones first: relations or sums of a few."""
    plain: list[Tensor] = []
    for relations in _relations(matrix):
        plain += [r for r in relations if _is_zero_one(r)]
        mixed = [r for r in relations if not _is_zero_one(r)]
        for count in range(2, len(mixed) + 1 if len(mixed) <= MIXED else 3):
            sums = (torch.stack(some).sum(dim=0) for some in combinations(mixed, count))
            plain += [r for r in sums if _is_zero_one(r)]
    return sorted((r > 0.5 for r in plain), key=lambda mask: int(mask.sum()))


def _is_zero_one(relation: Tensor) -> bool:
    return bool((torch.minimum(relation.abs(), (relation - 1).abs()) < 0.1).all())
