"""Points near the weights, of ordinary size, at which no gradient is zero by accident.

P parameters.
"""

import copy

import torch
from torch import Tensor

from ..autodiff.objective import Objective


def perturbed_by_tensors(f: Objective, w: Tensor, level: float, seed: int) -> Tensor:
    """Add noise relative to the size of each row, or entry of a vector, so that no gradient is zero by accident.

    Where that is zero the size of the tensor counts, where this is zero too one.
    """
    generator, out = torch.Generator(w.device).manual_seed(seed), w.clone()
    for part in f.unflatten(out).values():
        random = torch.randn(part.shape, generator=generator, dtype=w.dtype, device=w.device)
        part.addcmul_(_spread(part), random, value=level)
    return out


def perturbed_by_rank_one(f: Objective, w: Tensor, level: float, seed: int) -> Tensor:
    """Perturb as `perturbed_by_tensors` does, matrices by products ``a bᵀ`` of noise, which cost next to nothing."""
    generator, out = torch.Generator(w.device).manual_seed(seed), w.clone()

    def random(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=w.dtype, device=w.device)

    for part in f.unflatten(out).values():
        if part.dim() > 1:
            spread = _spread(part)
            part.addcmul_(spread * random(spread.shape), random(part.shape[1:]), value=level)
        else:
            part.addcmul_(_spread(part), random(part.shape), value=level)
    return out


def at_ordinary_size(f: Objective, w: Tensor) -> Tensor:
    """Raise rows and columns below half of 1/√fan-in to that size, and entries of vectors below a tenth to one."""
    out = w.clone()
    for part in f.unflatten(out).values():
        usual = 1 / part[0].numel() ** 0.5 if part.dim() > 1 else 1.0
        least = usual / 2 if part.dim() > 1 else usual / 10
        for axis in (0, 1) if part.dim() > 1 else (None,):
            others = [d for d in range(part.dim()) if d != axis]
            size = part.square().mean(others, keepdim=True).sqrt() if others else part.abs()
            part *= torch.where((size > 0) & (size < least), usual / size, 1)
    return out


def _spread(part: Tensor) -> Tensor:
    size = part.square().mean(list(range(1, part.dim())), keepdim=True).sqrt() if part.dim() > 1 else part.abs()
    whole = part.square().mean().sqrt()
    return torch.where(size > 0, size, torch.where(whole > 0, whole, 1))


def in_double_if_possible(f: Objective, w: Tensor) -> Objective:
    """Take `f` to double precision, or leave it as it is where it is there already or its model does not allow it."""
    if w.dtype is torch.float64:
        return f
    try:
        double = f.in_double()
        double.value(w.double())
    except (RuntimeError, TypeError, ValueError, copy.Error):
        return f
    return double
