"""Sums of a gradient over rows and columns of tensors, from which the Euler products of all candidates follow.

P parameters, n rows or columns, m points.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..autodiff.objective import Objective
from .parts import Part, Piece, lines, runs
from .relations import Sums

MAX_REST = 3e-2
"""Largest sum of the Euler products of a set of tensors, against the root of the sum of their squares."""

Axes = Collection[tuple[str, int]]
"""Names of tensors, and 0 for their rows or 1 for their columns."""


class Tally:
    """Sums over each row or column of tensors at one point: ``wᵀ∇``, ``‖w‖²`` and ``‖∇‖²`` as ``(3, n)``."""

    def __init__(self, f: Objective, w: Tensor, g: Tensor, axes: Axes) -> None:
        self.sums: dict[tuple[str, int], Tensor] = {}
        names = dict.fromkeys(name for name, _ in axes)
        scratch = w.new_empty(max((f.shapes[name].numel() for name in names), default=0))
        for name in names:
            w_t, g_t = lines(f, w, name), lines(f, g, name)
            product = scratch[: w_t.numel()].view(w_t.shape)
            sums: dict[int, list[Tensor]] = {axis: [] for axis in (0, 1) if (name, axis) in axes}
            for a, b in ((w_t, g_t), (w_t, w_t), (g_t, g_t)):
                torch.mul(a, b, out=product)
                for axis, found in sums.items():
                    found.append(product.sum((1 - axis, 2)))
            self.sums |= {(name, axis): torch.stack(found).double().cpu() for axis, found in sums.items()}

    def of(self, part: Part) -> Tensor:
        """Sum over a part ``(3,)``."""
        return sum((self.sums[p.name, p.axis][:, p.start : p.stop].sum(dim=1) for p in part), torch.zeros(3).double())

    def cosine(self, part: Part) -> float:
        """Euler cosine of a part; 1 where its gradient vanishes or is not finite."""
        product, w, g = self.of(part).tolist()
        size = (w * g) ** 0.5
        return min(abs(product) / size, 1.0) if 0 < size < float("inf") else 1.0

    def is_finite(self) -> bool:
        """True where the gradient is."""
        return all(bool(sums.isfinite().all()) for sums in self.sums.values())

    def size(self) -> float:
        """Sum ``‖w‖²‖∇‖²`` over all rows, to which the size of the weights does not matter."""
        return sum(float((sums[1] * sums[2]).sum()) for (_, axis), sums in self.sums.items() if axis == 0)

    def quiet(self, f: Objective, zero: float) -> dict[str, Part]:
        """Find the tensors, or runs of entries of vectors, with gradients of at most `zero` against the typical one.

        Compared are means over each row.
        """
        rows = {name: sums[2] for (name, axis), sums in self.sums.items() if axis == 0}
        least = zero**2 * sum(float(squares.sum()) for squares in rows.values()) / f.size
        found: dict[str, Part] = {}
        for name, squares in rows.items():
            mask = squares <= least * (f.shapes[name][1:].numel() if f.shapes[name] else 1)
            pieces = tuple(Piece(name, 0, *run) for run in runs(mask))
            found |= {name: pieces} if pieces and (bool(mask.all()) or len(f.shapes[name]) < 2) else {}
        return found


def largest_cosine(points: Iterable[Tally], part: Part) -> float:
    """Find the largest Euler cosine of a part over points."""
    return max(t.cosine(part) for t in points)


def sums(points: Sequence[Tally], parts: Mapping[str, Part]) -> dict[str, Sums]:
    """Euler products and sizes of parts, as grids of one row."""
    found: dict[str, Sums] = {}
    for name, part in parts.items():
        products, w, g = torch.stack([t.of(part) for t in points]).T
        found[name] = Sums(products[:, None], (w * g).sqrt()[:, None])
    return found


def by_lines(points: Sequence[Tally], names: Sequence[str], axis: int) -> Sums:
    """Euler products and sizes of rows or columns of tensors side by side."""
    found = torch.stack([torch.stack([t.sums[name, axis] for name in names]).sum(dim=0) for t in points])
    return Sums(found[:, 0], (found[:, 1] * found[:, 2]).sqrt())


def cancel(points: Sequence[Tally], parts: Sequence[Part]) -> bool:
    """True where Euler products add up to little against these themselves, which are small for large tensors."""
    products = torch.stack([torch.stack([t.of(part)[0] for part in parts]) for t in points])
    return bool(products.sum(dim=1).norm() <= MAX_REST * products.norm())


def common(quiet: Sequence[Mapping[str, Part]]) -> dict[str, Part]:
    """Intersect runs of entries of vectors, and whole tensors."""
    found = dict(quiet[0])
    for other in quiet[1:]:
        for name, part in list(found.items()):
            pieces = [(max(p.start, q.start), min(p.stop, q.stop)) for p in part for q in other.get(name, ())]
            found[name] = tuple(Piece(name, 0, start, stop) for start, stop in sorted(pieces) if start < stop)
    return {name: part for name, part in found.items() if part}
