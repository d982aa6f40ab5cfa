"""Groups of weights: the eigenpairs of their blocks of an operator, and their fractions of a vector.

P parameters, k wanted pairs.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidType, InvalidValue
from .eigenpairs import Eigenpairs
from .lanczos import lanczos
from .operators import SymmetricOperator, require_operator, restricted, without_autocast


@without_autocast()
def block_eigenpairs(
    a: SymmetricOperator, slices: Mapping[str, slice | Tensor], k: int = 1, **options: Any
) -> dict[str, Eigenpairs]:
    """Find the k largest eigenpairs (all of a smaller block) of every diagonal block ``A_gg``, by name, with `lanczos`.

    No block's largest eigenvalue exceeds that of A (Cauchy's interlacing).  `slices` are those of an `Objective`, or
    index tensors as in ``ScaleGroups.groups``.

    >>> a = SymmetricOperator(lambda v: torch.arange(4.0) * v, torch.zeros(4))
    >>> found = block_eigenpairs(a, {"low": slice(2), "high": slice(2, 4)})
    >>> {name: round(pairs.values.item(), 3) for name, pairs in found.items()}
    {'low': 1.0, 'high': 3.0}
    """
    require_operator(a)
    blocks = {name: restricted(a, indices) for name, indices in _indices(a.size, slices).items()}
    return {name: lanczos(block, min(k, block.size), **options) for name, block in blocks.items()}


def group_fractions(v: Tensor, slices: Mapping[str, slice | Tensor]) -> dict[str, float]:
    """Return the fraction ``‖v_g‖²/‖v‖²`` of each group of entries of `v` ``(P,)``, and "elsewhere" for those in none.

    >>> group_fractions(torch.tensor([3.0, 0.0, 4.0]), {"weight": slice(2), "bias": slice(2, 3)})
    {'weight': 0.36, 'bias': 0.64}
    """
    if not isinstance(v, Tensor):
        raise InvalidType(f"this {type(v).__name__} is no vector; pass one, such as top_eigenpairs(f).vectors[:, 0]")
    size = v.abs().max().item() if v.numel() else 0.0
    if v.dim() != 1 or not 0 < size < math.inf:
        raise InvalidValue(f"fractions are those of a finite vector (P,) that is not zero; got shape {tuple(v.shape)}")
    square = (v.double() / size).square()
    total = square.sum().item()
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
