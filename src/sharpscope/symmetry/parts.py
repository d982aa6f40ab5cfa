"""Parts of the weights as rows and columns of tensors: views of flat vectors, no index for each weight.

A tensor is seen as ``(rows, columns, entries)``: its first axis, its second one, and all others; a vector has one
column.

P parameters.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..autodiff.objective import Objective


class Piece(NamedTuple):
    """Rows (axis 0) or columns (axis 1) `start` to `stop` of one tensor."""

    name: str
    axis: int
    start: int
    stop: int

    def overlaps(self, other: "Piece") -> bool:
        """True where both may contain the same weight."""
        if self.name != other.name:
            return False
        return self.axis != other.axis or (self.start < other.stop and other.start < self.stop)


Part = tuple[Piece, ...]
"""Weights that are tested together: disjoint pieces."""


def lines(f: Objective, v: Tensor, name: str, axis: int = 0) -> Tensor:
    """View a tensor of the flat vector `v` ``(P,)`` by its rows or columns, ``(n, others, entries)``."""
    shape = f.shapes[name]
    columns = shape[1] if len(shape) > 1 else 1
    grid = v[f.slices[name]].view(shape[0] if shape else 1, columns, -1)
    return grid.transpose(0, 1) if axis else grid


def views(f: Objective, v: Tensor, part: Part) -> Iterator[Tensor]:
    """View the pieces of a part in the flat vector `v` ``(P,)``."""
    return (lines(f, v, p.name, p.axis)[p.start : p.stop] for p in part)


def whole(f: Objective, name: str) -> Piece:
    """Take all rows of a tensor as one piece."""
    return Piece(name, 0, 0, f.shapes[name][0] if f.shapes[name] else 1)


def size(f: Objective, part: Part) -> int:
    """Count the weights of a part."""
    along = {(p.name, p.axis): whole(f, p.name).stop if p.axis == 0 else f.shapes[p.name][1] for p in part}
    return sum(f.shapes[p.name].numel() // along[p.name, p.axis] * (p.stop - p.start) for p in part)


def first(f: Objective, part: Part) -> int:
    """Find the place of the first weight of a part in the flat vector."""
    return min(f.slices[p.name].start + p.start * (1 if p.axis else _row_size(f, p.name)) for p in part)


def indices(f: Objective, part: Part) -> Tensor:
    """List the places ``(n,)`` of the weights of a part in the flat vector."""
    found = [torch.empty(0, dtype=torch.long)]
    for p in part:
        s, rows = f.slices[p.name], whole(f, p.name).stop
        if p.axis == 0:
            n = _row_size(f, p.name)
            found.append(torch.arange(s.start + p.start * n, s.start + p.stop * n))
        else:
            grid = torch.arange(s.start, s.stop).view(rows, f.shapes[p.name][1], -1).transpose(0, 1)
            found.append(grid[p.start : p.stop].flatten())
    return torch.cat(found)


def overlap(a: Part, b: Part) -> bool:
    """True where two parts have weights in common."""
    return any(p.overlaps(q) for p in a for q in b)


def inside(a: Part, b: Part) -> bool:
    """True where every piece of `a` lies in one of `b`."""
    return all(any(p[:2] == q[:2] and q.start <= p.start and p.stop <= q.stop for q in b) for p in a)


class Left:
    """The rows and columns of each tensor that belong to no part yet; their places of meeting are left of it."""

    def __init__(self, f: Objective) -> None:
        self.masks = {
            name: [
                torch.ones(n, dtype=torch.bool) for n in (shape[0] if shape else 1, shape[1] if len(shape) > 1 else 1)
            ]
            for name, shape in f.shapes.items()
        }

    def take(self, part: Part) -> None:
        """Take a part away."""
        for p in part:
            self.masks[p.name][p.axis][p.start : p.stop] = False

    def free(self, name: str, axis: int) -> Tensor:
        """Mask the rows or columns of which nothing is taken."""
        mask, other = self.masks[name][axis], self.masks[name][1 - axis]
        return mask if bool(other.all()) else torch.zeros_like(mask)

    def rest(self, name: str) -> Part:
        """Return what is left of a tensor; nothing where both rows and columns were taken from it."""
        axis = next((axis for axis in (0, 1) if bool(self.masks[name][1 - axis].all())), None)
        return () if axis is None else tuple(Piece(name, axis, *run) for run in runs(self.masks[name][axis]))

    def names(self) -> list[str]:
        """Name the tensors of which something is left."""
        return [name for name in self.masks if self.rest(name)]

    def is_whole(self, name: str) -> bool:
        """True where nothing is taken from a tensor."""
        return all(bool(mask.all()) for mask in self.masks[name])

    def between(self, name: str, axis: int, start: int, stop: int) -> Part:
        """Return what is left of the rows or columns `start` to `stop` of a tensor."""
        mask = self.free(name, axis).clone()
        mask[:start] = mask[stop:] = False
        return tuple(Piece(name, axis, *run) for run in runs(mask))

    def copy(self) -> "Left":
        """Copy, to take parts away for a while."""
        return copy.deepcopy(self)


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """Find the runs of True in a mask ``(n,)``, as pairs of their start and stop."""
    here = mask.long()
    edges = torch.diff(here, prepend=here.new_zeros(1), append=here.new_zeros(1))
    return list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True))


def _row_size(f: Objective, name: str) -> int:
    return f.shapes[name][1:].numel()
