"""Products and lengths of long vectors, and random ones that are the same on every device."""

import math

import torch
from torch import Tensor

DRAWN = 2**20
"""Entries that are drawn at once, for the sake of memory."""


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


def gaussian(like: Tensor, seed: int) -> Tensor:
    """Draw standard normal numbers ``(P,)`` of the type of `like` ``(P,)``, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty_like(like)
    for part in out.split(DRAWN):
        if part.device.type == "cpu":
            part.normal_(generator=generator)
        else:
            part.copy_(torch.randn(len(part), generator=generator, dtype=like.dtype))
    return out
