"""Candidates for invariance: tensors, rows, columns, modules and parts of them, as indices into the flat weights.

Weights that belong to a group already are no candidates any more: `left` ``(P,)`` masks those that still are.

P parameters.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..autodiff.objective import Objective

Candidates = Callable[[Objective], dict[str, Tensor]]
"""A function from an objective to candidates: name -> indices ``(n,)``."""


def tensors(f: Objective) -> dict[str, Tensor]:
    """Each parameter tensor as a candidate."""
    return {name: torch.arange(s.start, s.stop) for name, s in f.slices.items()}


def rows(f: Objective) -> dict[str, Tensor]:
    """Each row (output unit or filter) of each tensor with two or more dimensions as a candidate."""
    return {
        f"{name}[{i}]": row
        for name, indices in tensors(f).items()
        if len(f.shapes[name]) > 1
        for i, row in enumerate(indices.view(f.shapes[name][0], -1))
    }


def columns(f: Objective) -> dict[str, Tensor]:
    """Each column (the second dimension) of each tensor with two or more dimensions as a candidate."""
    return {
        f"{name}[:, {j}]": column
        for name, indices in tensors(f).items()
        if len(f.shapes[name]) > 1
        for j, column in enumerate(indices.view(f.shapes[name]).transpose(0, 1).flatten(1))
    }


def remaining(candidates: Mapping[str, Tensor], left: Tensor) -> dict[str, Tensor]:
    """Cut the candidates to the weights that are left; those of which nothing is left are dropped."""
    cut = {name: i[left[i]] for name, i in candidates.items()}
    return {name: i for name, i in cut.items() if i.numel()}


def parts(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """Each tensor as far as it is left; the name says where that is not all of it."""
    size = {name: s.stop - s.start for name, s in f.slices.items()}
    return {n if len(i) == size[n] else f"{n} (rest)": i for n, i in remaining(tensors(f), left).items()}


def modules(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """Each module of which several tensors are left (weight and bias, say), as one candidate."""
    own = remaining(tensors(f), left)
    return {module: torch.cat([own[name] for name in names]) for module, names in _members(f, left).items()}


def thirds(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """Thirds of the rows of tensors and modules, for queries, keys and values that are one tensor."""
    found: dict[str, Tensor] = {}
    for name, grid in (row_grids(f, left) | module_grids(f, left)).items():
        n = len(grid) // 3
        if "[:" not in name and len(grid) == 3 * n > 3:
            found |= {name.format(f"{k * n}:{(k + 1) * n}"): grid[k * n : (k + 1) * n].flatten() for k in range(3)}
    return remaining(found, left)


def units(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """Parts, modules and thirds that are left, each as a grid of one row."""
    return {n: i[None] for n, i in (parts(f, left) | modules(f, left) | thirds(f, left)).items()}


def row_grids(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """Rows and columns of tensors that are left, as grids of indices ``(rows, entries)``.

    Their names have a place for the rows, as in ``"weight[{}]"``.
    """
    own = {name: i for name, i in _shaped(f, left).items() if len(f.shapes[name]) > 1}
    grids = {f"{name}[{{}}]": i.flatten(1) for name, i in own.items()}
    return grids | {f"{name}[:, {{}}]": i.transpose(0, 1).flatten(1) for name, i in own.items()}


def module_grids(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """Rows of the tensors of one module side by side (weight and bias, say), as grids like those of `row_grids`."""
    own = _shaped(f, left)
    grids: dict[str, Tensor] = {}
    for module, names in _members(f, left).items():
        if len({len(own[name]) for name in names}) == 1:
            grids[f"{module}[{{}}]"] = torch.cat([own[name].flatten(1) for name in names], dim=1)
    return grids


def _members(f: Objective, left: Tensor) -> dict[str, list[str]]:
    """Modules of which several tensors are left, and the names of these."""
    members: dict[str, list[str]] = {}
    for name in remaining(tensors(f), left):
        members.setdefault(name.rpartition(".")[0], []).append(name)
    return {f"{module}.*".removeprefix("."): names for module, names in members.items() if len(names) > 1}


def _shaped(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """Indices of the tensors of which something is left, in their shapes, vectors as one column."""
    own = {name: i for name, i in tensors(f).items() if bool(left[i].any())}
    return {name: i.view(f.shapes[name] if len(f.shapes[name]) > 1 else (-1, 1)) for name, i in own.items()}
