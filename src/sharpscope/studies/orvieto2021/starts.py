"""Deep networks at a random start: chains of single weights, and norms that pass through ReLU layers.

    chain   f = ∏ w_i                       one weight a layer
    layer   ‖h_l‖² = ‖h_{l-1}‖² Y           He's start, width d: Y = (2/d) χ²_k with k ~ Bin(d, ½) units that are on

R runs, L layers, width d.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...autodiff.batched import BatchedRuns
from .._shared.deep import Stack
from .._shared.streams import stream

Array = NDArray[np.float64]


def chain_losses(W: Tensor) -> Tensor:
    """Losses of the chains, ``½ (∏ w_i - 1)²`` ``(R,)``."""
    return 0.5 * (W.prod(1) - 1).square()


def chain_derivatives(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of chains, their gradients, and the Hessians of the losses, for weights that are not zero.

    f ``(R,)``, s ``(R, L)``, H ``(R, L, L)``:  ``s_i = ∏_{j≠i} w_j``,  ``H_ii = s_i²``,  ``H_ij = s_i s_j (2 - 1/f)``
    """
    f, L = W.prod(1), W.shape[1]
    slope = W[:, None].expand(-1, L, -1).masked_fill(torch.eye(L, dtype=torch.bool), 1.0).prod(2)
    factor = (2 - 1 / f)[:, None, None].expand(-1, L, L).clone()
    factor.diagonal(dim1=1, dim2=2).fill_(1)
    return f, slope, slope[:, :, None] * slope[:, None] * factor


def chain_mismatch(W: Tensor) -> float:
    """Largest difference of gradient and Hessian in closed form from automatic ones, over the largest entry."""
    f, slope, H = chain_derivatives(W)
    automatic = BatchedRuns(chain_losses)
    pairs = ((automatic.grad(W), (f - 1)[:, None] * slope), (automatic.hessian(W), H))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def law(d: int) -> tuple[float, float]:
    """Mean and variance, times d, of the log of what a layer multiplies a squared norm by, if it is not dead.

    ``d·E log Y`` and ``d·Var log Y`` given k ≥ 1, for ``Y = (2/d) χ²_k``, k ~ Bin(d, ½).
    """
    from scipy.special import digamma, polygamma
    from scipy.stats import binom

    k = np.arange(1, d + 1)
    p = binom.pmf(k, d, 0.5) / (1 - 0.5**d)
    mean = digamma(k / 2) + np.log(4 / d)
    first = float(p @ mean)
    return d * first, d * float(p @ (polygamma(1, k / 2) + mean**2) - first**2)


def forward(d: int, depths: tuple[int, ...], runs: int, rng: np.random.Generator) -> dict[int, Array]:
    """Random draws of ``log ‖h_L‖²/‖h_0‖²`` ``(runs,)`` at depths L, without matrices.

    Each is a sum of ``log (2/d) χ²_k``, k ~ Bin(d, ½).
    """
    k = rng.binomial(d, 0.5, (runs, max(depths)))
    with np.errstate(divide="ignore"):  # a dead layer: minus infinity
        sums = np.log(2 / d * np.where(k > 0, rng.chisquare(np.maximum(k, 1)), 0)).cumsum(1)
    return {L: sums[:, L - 1] for L in depths}


def forward_mismatch(runs: int, seed: int, rng: np.random.Generator) -> float:
    """Distance of the mean without matrices from that of networks, 16 layers of 16, in standard errors."""
    stack = Stack(inputs=16, width=16, depth=16)
    x = torch.ones(1, 16, dtype=torch.float64) / 4
    logs = stack(stack.draw(runs, [903, seed]), x)[:, 0].square().sum(1).log().numpy()
    alive, other = (v[np.isfinite(v)] for v in (logs, forward(16, (16,), runs, rng)[16]))
    return float(abs(alive.mean() - other.mean()) / np.sqrt(alive.var() / len(alive) + other.var() / len(other)))


def sample(seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian inputs ``(32, 8)`` and the targets ``sin x₁ + .3 x₂`` ``(32, 1)``."""
    x = torch.randn(32, 8, generator=stream(904, seed), dtype=torch.float64)
    return x, (x[:, 0].sin() + 0.3 * x[:, 1])[:, None]
