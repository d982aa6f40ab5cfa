"""Rows and columns of tensors as candidates for invariance, by name.

P parameters.
"""

from collections.abc import Callable

from ..autodiff.objective import Objective
from .parts import Part, Piece

Candidates = Callable[[Objective], dict[str, Part]]
"""A function from an objective to disjoint candidates."""


def rows(f: Objective) -> dict[str, Part]:
    """Each row (output unit or filter) of each tensor with two or more dimensions as a candidate."""
    return {
        f"{name}[{i}]": (Piece(name, 0, i, i + 1),)
        for name, shape in f.shapes.items()
        if len(shape) > 1
        for i in range(shape[0])
    }


def columns(f: Objective) -> dict[str, Part]:
    """Each column (the second dimension) of each tensor with two or more dimensions as a candidate."""
    return {
        f"{name}[:, {j}]": (Piece(name, 1, j, j + 1),)
        for name, shape in f.shapes.items()
        if len(shape) > 1
        for j in range(shape[1])
    }
