"""Find rescalings that change nothing, as linear relations between the Euler products of parts of the weights.

Rescaling parts t by c^{a_t} leaves L as it is for every c exactly when, at all weights,

    Σ_t a_t w_tᵀ ∇_t L(w) = 0

so gradients at a few random points show which sums of rows, pairs of tensors or sets of tensors do not see a scale:
a = 1 on a block of rows, a = (1, -1) on a pair, (1, -1, -1, -1) on a gain before queries, keys and values, a in {0, 1}
on tensors that may be rescaled together.

P parameters, n of them in a part, m points, T parts.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

MAX_BLOCK_COSINE = 1e-3
"""Largest Euler cosine, over all points, of a block of rows that is tried."""

MAX_PAIR_MISMATCH = 1e-4
"""Largest mismatch, over all points, between the Euler products of a pair."""

MAX_PAIR_DIFFERENCE = 1e-2
"""Largest difference between the Euler products of a pair, against these, which are small for large tensors."""

MAX_READERS, MAX_NEAR = 4, 12
"""Largest number of maps that read one vector, and of maps near it among which they are sought."""

MAX_NULL_VALUE = 1e-2
"""Largest singular value, against the first, of relations that are tried: eps leaves some."""

MIN_DROP = 10
"""Factor by which singular values drop where relations begin."""

MAX_JOINT_COSINE = 2e-2
"""Largest Euler cosine, over all points, of a set of tensors that is tried."""

MAX_ROWS = 2048
"""Number of rows beyond which only single rows are tried, since there are n² blocks."""

SLAB = 256
"""Number of rows from which runs are tried at once."""

MAX_MIXED = 12
"""Number of relations with other coefficients than 0 and 1 up to which all of their sums are tried."""


@dataclass(frozen=True)
class Sums:
    """Euler products ``wᵀ∇`` ``(m, rows)`` of the rows of a grid of weights, and ``‖w‖‖∇‖`` to compare them with."""

    products: Tensor
    sizes: Tensor


def place(start: int, stop: int) -> str:
    """Write a run of rows as it stands between brackets."""
    return f"{start}" if stop == start + 1 else f"{start}:{stop}"


def zero_runs(sums: Sums, free: Tensor) -> Iterator[tuple[int, int]]:
    """Find disjoint runs of free rows whose Euler products add up to zero at all points, the shortest first.

    A run adds up to zero where cumulated sums come back to what they were.
    """
    products, sizes = _cumulated(sums.products), _cumulated(sums.sizes.square())
    n, free = len(free), free.clone()
    fitting: list[Tensor] = []
    for begin in range(0, n, SLAB):
        end = n + 1 if n <= MAX_ROWS else min(begin + SLAB, n) + 1
        start, stop = _returns(products[0], sizes[0], slice(begin, min(begin + SLAB, n)), slice(begin, end))
        length = stop - start
        start, stop = (x[(length > 0) & (length < n) & ((length == 1) | (n <= MAX_ROWS))] for x in (start, stop))
        for product, size in zip(products[1:], sizes[1:], strict=True):  # most runs failed at the first point
            fits = _is_small(product[stop] - product[start], size[stop] - size[start])
            start, stop = start[fits], stop[fits]
        fitting.append(torch.stack([start, stop]))
    for start, stop in sorted(torch.cat(fitting, dim=1).T.tolist(), key=lambda run: (run[1] - run[0], run[0])):
        if bool(free[start:stop].all()):
            free[start:stop] = False
            yield start, stop


def _returns(products: Tensor, sizes: Tensor, starts: slice, stops: slice) -> tuple[Tensor, Tensor]:
    """Find where cumulated sums ``(rows + 1,)`` at one point are what they were at a start."""
    total, scale = (x[stops] - x[starts, None] for x in (products, sizes))
    start, stop = _is_small(total, scale).nonzero().T
    return start + starts.start, stop + stops.start


def _is_small(products: Tensor, squares: Tensor) -> Tensor:
    return (products.square() <= MAX_BLOCK_COSINE**2 * squares) & (squares > 0)


def _cumulated(rows: Tensor) -> Tensor:
    """Sum over the first 0, 1, .. rows, for each of the points ``(m, rows + 1)``."""
    return torch.cat([rows.new_zeros(len(rows), 1), rows.cumsum(dim=1)], dim=1)


def paired(
    names: Sequence[str], sums: Mapping[str, Sums], disjoint: Callable[[str, str], bool]
) -> dict[tuple[str, str], float]:
    """Pair each of the names with the next one that has the same Euler product and is disjoint; return the mismatch."""
    products, sizes = _side_by_side(sums, list(names))
    nonzero = (products.abs() > MAX_PAIR_MISMATCH * sizes).any(dim=0)
    mismatch = torch.zeros(len(names), len(names)).to(products)
    difference = mismatch.clone()
    for e, size in zip(products, sizes, strict=True):
        mismatch = torch.maximum(mismatch, (e[:, None] - e).abs() / torch.hypot(size[:, None], size))
        difference += (e[:, None] - e).square()
    scale = products.square().sum(dim=0)
    fits = (mismatch <= MAX_PAIR_MISMATCH) & (difference <= MAX_PAIR_DIFFERENCE**2 * scale) & nonzero[:, None] & nonzero
    found: dict[tuple[str, str], float] = {}
    for a, name in enumerate(names):
        later = (b for b in fits[a].nonzero().flatten().tolist() if b > a)
        b = next((b for b in later if disjoint(name, names[b])), None)
        if b is not None:
            found[name, names[b]] = mismatch[a, b].item()
    return found


def read_by_several(
    shapes: Mapping[str, torch.Size],
    names: Sequence[str],
    paired: Collection[str],
    sums: Mapping[str, Sums],
) -> dict[tuple[str, ...], float]:
    """Find vectors that may be rescaled by c, and two or more maps that read them by 1/c; return the mismatch.

    `names` are those of tensors and of modules ``m.*``, `paired` those that have a pair by now.  Tried are sets of maps
    of the vector's width in the module around its own, small sets and early maps first.
    """
    maps = {name: shapes[name][:2] for name in names if len(shapes.get(name, ())) > 1}
    found: dict[tuple[str, ...], float] = {}
    for vector, n in _vectors(shapes, [name for name in names if name not in paired]):
        around = f"{vector.rpartition('.')[0].rpartition('.')[0]}.".removeprefix(".")
        near = [name for name, shape in maps.items() if n in shape and name.startswith(around)]
        sets = [c for size in range(2, MAX_READERS + 1) for c in combinations(range(len(near)), size)]
        if not sets or len(near) > MAX_NEAR:
            continue
        chosen = torch.tensor([[float(i in c) for c in sets] for i in range(len(near))], dtype=torch.float64)
        products, sizes = (x.cpu() for x in _side_by_side(sums, [vector, *near]))
        own, size = products[:, :1], sizes[:, :1]
        rest = (own - products[:, 1:] @ chosen).abs()
        mismatch = (rest / (size.square() + sizes[:, 1:].square() @ chosen).sqrt()).max(dim=0).values
        fits = (mismatch <= MAX_PAIR_MISMATCH) & (rest.norm(dim=0) <= MAX_PAIR_DIFFERENCE * own.norm())
        if bool(fits.any()) and bool((own.abs() > MAX_PAIR_MISMATCH * size).any()):
            first = int(fits.nonzero()[0])
            found[(vector, *(near[i] for i in sets[first]))] = mismatch[first].item()
    return found


def _vectors(shapes: Mapping[str, torch.Size], names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield the vectors, and the modules that have nothing but vectors of one length, with that length."""
    for name in names:
        own = {shape for n, shape in shapes.items() if n == name or f"{n.rpartition('.')[0]}.*" == name}
        if len(own) == 1 and len(shape := own.pop()) == 1:
            yield name, shape[0]


def joint_sets(names: Sequence[str], sums: Mapping[str, Sums]) -> Iterator[list[str]]:
    """Find disjoint sets of names whose Euler products add up to zero, smallest first.

    Null vectors of the Euler products ``(m, T)`` in reduced form, with the pivots on the first names: where these are
    small tensors (gains), a relation through one of them does not mix with the others.
    """
    names = [n for n in names if bool(sums[n].products.any())]  # of others nothing is known
    if len(names) < 2:
        return
    matrix, sizes = (x.cpu() for x in _side_by_side(sums, names))
    known = matrix.any(dim=1)  # a point at which no product is left, since an example saturates all, says nothing
    matrix, sizes = matrix[known], sizes[known]
    free = torch.ones(len(names), dtype=torch.bool)
    for chosen in _zero_one(matrix):
        close = matrix[:, chosen].sum(dim=1).abs() <= MAX_JOINT_COSINE * sizes[:, chosen].norm(dim=1)
        if bool(free[chosen].all()) and bool(close.all()):
            free[chosen] = False
            yield [n for n, c in zip(names, chosen, strict=True) if c]


def title(members: Sequence[str]) -> str:
    """Name a set of parts."""
    return " + ".join(members) if len(members) <= 3 else f"{members[0]} + {len(members) - 1} more"


def _side_by_side(sums: Mapping[str, Sums], names: list[str]) -> tuple[Tensor, Tensor]:
    """Euler products and sizes ``(m, rows)`` of all rows of these grids."""
    return torch.cat([sums[n].products for n in names], dim=1), torch.cat([sums[n].sizes for n in names], dim=1)


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
