"""Products and lengths of long vectors."""

import math

import torch
from torch import Tensor

DRAWN = 2**20
"""Random entries that are drawn at once, for the sake of memory."""


SUMMED = 2**16
"""Products that are summed at once on a processor.

In single precision its dot product of ten million squares is off by 3e-4, and torch's own norm likewise; in parts of
this size they are right to rounding.
"""


def dot(x: Tensor, y: Tensor) -> float:
    """Return ``xᵀ y`` of vectors ``(P,)``, right to rounding."""
    if x.device.type != "cpu" or len(x) <= SUMMED:
        return torch.dot(x, y).item()
    return sum(torch.dot(a, b).item() for a, b in zip(x.split(SUMMED), y.split(SUMMED), strict=True))


def length(v: Tensor) -> float:
    """Return ``‖v‖`` of a vector ``(P,)``, right to rounding."""
    square = dot(v, v)
    if square > 0 and math.isfinite(square):
        return math.sqrt(square)
    size = v.abs().max().item() if v.numel() else 0.0
    if size == 0 or not math.isfinite(size):
        return size
    v = v / size
    return size * math.sqrt(dot(v, v))
