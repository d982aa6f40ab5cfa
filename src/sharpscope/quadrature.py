"""The distribution of an operator's eigenvalues by Lanczos quadrature, with bands that say what they cover.

A Gaussian probe of unit norm sees the eigenvalue λ_i with weight ``(u_iᵀv)²``, on average 1/P.  After m Lanczos steps
its weights are known by m nodes θ_j with weights τ_j, exactly for polynomials of degree 2m - 1.  Two errors remain:

    spread over probes: the weights are Dirichlet, so a mean of f over n probes has variance
        2 (mean f² - (mean f)²) / (n (P + 2))
    quadrature: Σ_{j<k} τ_j ≤ weight below θ_k ≤ weight up to θ_k ≤ Σ_{j≤k} τ_j  (Chebyshev, Markov, Stieltjes)

The first is turned into an interval by solving it for the mean (Wilson's interval), which also holds for the few
eigenvalues at an end of the spectrum; no spread is estimated.  P parameters, n probes, m steps.
"""

from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from .operators import SymmetricOperator
from .spectrum import multiply

Band = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Density:
    """Spectral density at `points`, and the share of eigenvalues up to them, each with a 95 % band at every point.

    ``density`` is broadened, ``1/P Σ_i N(t; λ_i, width²)``, and its band covers the broadened truth.  ``cumulative``
    is the share of eigenvalues ``λ_i ≤ t`` with no broadening, and so is what its band covers (points closer to an
    eigenvalue than rounding count on either side).  Bands hold the spread over probes and the error of the
    quadrature.  Over points and seeds they hold 95 times in 100 or more for the cumulative share and 94 to 97 times for
    the density, 90 times at the worst point seen there; misses at nearby points come together.
    """

    points: Tensor = field(repr=False)  # (n,), as all of these
    width: float
    density: Tensor = field(repr=False)
    density_band: Band = field(repr=False)
    cumulative: Tensor = field(repr=False)
    cumulative_band: Band = field(repr=False)
    num_matvecs: int


class _Rule(NamedTuple):
    nodes: Tensor  # (m,), ascending
    weights: Tensor  # (m,), sum 1
    reach: tuple[float, float]  # the outermost nodes, each moved out by its residual
    exact: bool  # the Krylov space is invariant: no error of the quadrature


def density(
    a: SymmetricOperator,
    *,
    steps: int = 64,
    probes: int = 4,
    width: float | None = None,
    points: Tensor | None = None,
    seed: int = 0,
) -> Density:
    """``1/P Σ_i N(t; λ_i, width²)`` and ``#{λ_i ≤ t}/P`` with bands [N18] (Ubaru, Chen & Saad, 2017).

    Args:
        steps: m, products with each probe, all kept in memory.
        probes: unit vectors; their spread falls with P: in a large network few are enough.
        width: of the broadening; by default 1.2/m of the spectrum's range.  A narrower one has a wider band.
        points: where to evaluate; by default 256 across the spectrum.

    Raises:
        NotFinite: for an operator whose products are not finite.
        ValueError: steps, probes or width that are not positive.
    """
    if steps < 1 or probes < 1 or (width is not None and width <= 0):
        raise ValueError(f"steps={steps}, probes={probes}, width={width}: all have to be positive")
    steps = min(steps, a.size)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn((a.size, probes), generator=generator, dtype=torch.float64).to(a.like)
    blocks = v.split(1 if a.matmat is None else probes, dim=1)
    rules = [rule for block in blocks for rule in _rules(a, block / block.norm(dim=0), steps)]
    low, high = min(r.reach[0] for r in rules), max(r.reach[1] for r in rules)
    scale = max(-low, high, torch.finfo(torch.float64).tiny)
    slack = 64 * torch.finfo(a.like.dtype).eps * scale
    span = high - low + 2 * slack
    sigma = 1.2 * span / steps if width is None else width
    if points is None:
        points = torch.linspace(low - 3 * sigma, high + 3 * sigma, 256, dtype=torch.float64)
    points = points.detach().double().cpu()

    first, second = (_mean(rules, points, sigma, power) for power in (1, 2))
    part = sum(not r.exact for r in rules) / probes
    error = part * _tail(points, sigma, (low - 0.01 * span, high + 0.01 * span), 2 * steps)
    ratio = torch.where(first > 0, second / first, 1 / sigma)  # E f²/E f, which an outlier's luck leaves as it is
    below, above = (first - error).clamp(min=0), first + error
    band = _wilson(below, ratio, probes, a.size)[0], _wilson(above, ratio, probes, a.size)[1]

    sides = [_bracket(r, points, slack) for r in rules]
    under, over = (torch.stack(side).mean(dim=0) for side in zip(*sides, strict=True))
    one = torch.ones_like(points)
    cumulative_band = _wilson(under, one, probes, a.size)[0], _wilson(over, one, probes, a.size)[1]
    return Density(points, sigma, first, band, (under + over) / 2, cumulative_band, probes * steps)


def _rules(a: SymmetricOperator, v: Tensor, steps: int) -> list[_Rule]:
    """Lanczos from each column of `v` ``(P, b)`` side by side, orthogonalized twice against all that came before.

    Where a Krylov space ends, its next vector is set to zero: the nodes that follow are zeros of no weight.
    """
    basis = v.new_zeros((steps, *v.shape))
    alpha, beta = (torch.zeros((v.shape[1], steps), dtype=torch.float64) for _ in range(2))
    size = torch.zeros(v.shape[1], dtype=torch.float64)  # of the operator, as far as it has shown
    for j in range(steps):
        basis[j] = v
        rest = multiply(a, v)
        alpha[:, j] = (v * rest).sum(dim=0).double().cpu()
        size = torch.maximum(size, rest.norm(dim=0).double().cpu())
        for _ in range(2):
            overlap = torch.einsum("jpb,pb->jb", basis[: j + 1], rest)
            rest = rest - torch.einsum("jpb,jb->pb", basis[: j + 1], overlap)
        norm = rest.norm(dim=0)
        going = norm.double().cpu() > 32 * torch.finfo(v.dtype).eps * size
        beta[:, j] = norm.double().cpu() * going
        v = torch.where(going.to(v.device), rest / norm.clamp(min=torch.finfo(v.dtype).tiny), 0)
    rules = []
    for diagonal, off in zip(alpha, beta, strict=True):
        matrix = torch.diag(diagonal) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
        nodes, s = torch.linalg.eigh(matrix)
        kept = s[0].square() > 0
        left = off[-1].item() * s[-1].abs()
        exact = bool((off == 0).any())
        kept = kept if exact else torch.ones_like(kept)
        nodes, left, weights = nodes[kept], left[kept], s[0, kept].square()
        reach = (nodes[0] - left[0]).item(), (nodes[-1] + left[-1]).item()
        rules.append(_Rule(nodes, weights, reach, exact))
    return rules


def _mean(rules: list[_Rule], t: Tensor, sigma: float, power: int) -> Tensor:
    """``Σ_j τ_j N(t; θ_j, σ²)^power``, averaged over the probes."""
    return torch.stack([_normal(t[:, None] - r.nodes, sigma) ** power @ r.weights for r in rules]).mean(dim=0)


def _normal(x: Tensor, sigma: float) -> Tensor:
    return torch.exp(-0.5 * (x / sigma) ** 2) / (sigma * (2 * torch.pi) ** 0.5)


def _tail(t: Tensor, sigma: float, interval: tuple[float, float], degree: int) -> Tensor:
    """``2 Σ_{j ≥ degree} |c_j|`` of the Chebyshev series of ``x -> N(t; x, σ²)`` on the interval [N19].

    No measure of unit weight on it integrates that function otherwise than the quadrature by more than this, nor by
    more than the height of the function.
    """
    centre, half = (interval[0] + interval[1]) / 2, max((interval[1] - interval[0]) / 2, 1e-300)
    n = min(max(4 * degree, int(24 * half / sigma)), 4096)
    angle = (torch.arange(n, dtype=torch.float64) + 0.5) * torch.pi / n
    cosines = torch.cos(angle * torch.arange(degree, n, dtype=torch.float64)[:, None])
    series = 2 / n * _normal(t[:, None] - centre - half * torch.cos(angle), sigma) @ cosines.T
    nearest = (t - centre).abs().sub(half).clamp(min=0)
    return torch.minimum(2 * series.abs().sum(dim=1), _normal(nearest, sigma))


def _bracket(rule: _Rule, t: Tensor, slack: float) -> Band:
    """Bounds of a probe's weight up to t: what lies left of the node before it, and of the node after it."""
    total = torch.cat([rule.weights.new_zeros(1), rule.weights.cumsum(0)])
    step = 0 if rule.exact else 1
    before = torch.searchsorted(rule.nodes, t - slack, right=True)
    after = torch.searchsorted(rule.nodes, t + slack, right=True)
    return total[(before - step).clamp(min=0)], total[(after + step).clamp(max=len(rule.nodes))].clamp(max=1)


def _wilson(x: Tensor, ratio: Tensor, probes: int, size: int) -> Band:
    """The means p with ``(x - p)² ≤ κ (ratio p - p²)``, ``κ = 2 z²/(n (P + 2))``: 95 % around the observed mean x."""
    kappa = 2 * NormalDist().inv_cdf(0.975) ** 2 / (probes * (size + 2))
    middle = 2 * x + kappa * ratio
    root = (middle.square() - 4 * (1 + kappa) * x.square()).clamp(min=0).sqrt()
    return (middle - root) / (2 * (1 + kappa)), (middle + root) / (2 * (1 + kappa))
