"""The distribution of an operator's eigenvalues by Lanczos quadrature, with bands of known coverage.

A Gaussian probe v sees the eigenvalue λ_i with weight ``(u_iᵀv)²``.  The weights of n probes, added up and divided by
their sum, have the mean 1/P and a Dirichlet distribution with parameters n/2.  After m Lanczos steps the weights of a
probe are known by m nodes θ_j with weights τ_j, exactly for polynomials of degree 2m - 1.  Three errors remain:

    spread over probes: a mean of f over the eigenvalues is seen with variance 2 (mean f² - (mean f)²) / (n P + 2)
    quadrature: Σ_{j<k} τ_j ≤ weight below θ_k ≤ weight up to θ_k ≤ Σ_{j≤k} τ_j  (Chebyshev, Markov, Stieltjes)
    rounding: of nodes by eps ‖A‖, and of weights by eps √τ

The first is turned into an interval by solving it for the mean.  For a fraction, f is 0 or 1 and what is seen has a
beta distribution: nothing else is needed.  For a density f is a Gaussian, and there are two approximations by a
variable of two values, of which the band holds both intervals.  The values 0 and ``r = mean f² / mean f`` have the
variance: this is right where few eigenvalues count.  The same probes see r, low where the mean is; so r is taken at its
upper 98.75 %, and so are the quantiles, together 95 %.  The two values of Gauss quadrature have three
moments: this is right where all count, nearly alike.

Where all P steps were taken, the nodes are the eigenvalues, and only rounding is left.

P parameters, n probes, m steps.
"""

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..display import card, new_figure, progress, report, sparkline, style_axes, text
from ..errors import InvalidValue
from .operators import SymmetricOperator, require_operator, without_autocast
from .trace import multiply
from .units import Unit

Band = tuple[Tensor, Tensor]

BOTH = 0.05 / 4
"""Probability of each of the two ends of two intervals that hold together with 95 %."""

ROUNDING = 64
"""Errors of nodes and of roots of weights, in units of the last place."""


QUANTILES = (0.01, 0.5, 0.99)
"""Fractions of eigenvalues up to values that a density names."""


@dataclass(frozen=True)
class Density:
    """Spectral density at `points`, and the fraction of eigenvalues up to them, each with a 95 % band at every point.

    ``density`` is broadened, ``1/P Σ_i N(t; λ_i, width²)``, and its band covers the broadened truth.  ``cumulative``
    is the fraction of eigenvalues ``λ_i ≤ t`` with no broadening, and so is what its band covers (points closer to an
    eigenvalue than rounding count on either side).  Bands hold the spread over probes and the error of the
    quadrature, and always the estimate.  On the spectra of the tests they hold at least 95 times in 100 at every point;
    misses at nearby points come together.
    """

    points: Tensor = field(repr=False)  # (n,), as all of these
    width: float
    density: Tensor = field(repr=False)
    density_band: Band = field(repr=False)
    cumulative: Tensor = field(repr=False)
    cumulative_band: Band = field(repr=False)
    num_matvecs: int

    def __repr__(self) -> str:
        low, high = self.points[[0, -1]].tolist()
        return f"Density(from {low:.4g} to {high:.4g}, width={self.width:.3g}, num_matvecs={self.num_matvecs})"

    def __str__(self) -> str:
        fractions = [self.points[int((self.cumulative < q).sum().clamp(max=len(self.points) - 1))] for q in QUANTILES]
        lines = [f"{q:.0%} of the eigenvalues lie below {t:.4g}" for q, t in zip(QUANTILES, fractions, strict=True)]
        return "\n".join([*lines, f"broadened by {self.width:.3g}, {self.num_matvecs} products"])

    def _repr_html_(self) -> str:
        curve = sparkline("fraction of eigenvalues up to a value", self.points.tolist(), self.cumulative.tolist())
        return card("Density of eigenvalues", curve, text(str(self)))

    def plot(self) -> Any:
        """Draw the density, on a logarithmic scale, and the fraction up to each point, both with their bands.

        Returns a figure of matplotlib.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        fig = new_figure(7.2, 5.6)
        curves = ((self.density, self.density_band, "density"), (self.cumulative, self.cumulative_band, "fraction"))
        for ax, (curve, band, label) in zip(fig.subplots(2, 1, sharex=True), curves, strict=True):
            style_axes(ax, "", ("eigenvalue", label))
            ax.fill_between(self.points, *band, color="#0072b2", alpha=0.2, linewidth=0)
            ax.plot(self.points, curve, color="#0072b2", linewidth=1.6)
        top, _ = fig.axes
        top.set_yscale("log")
        top.set_ylim(bottom=1e-6 * float(self.density.max()))
        top.set_xlabel("")
        return fig


class _Rule(NamedTuple):
    """The quadrature of one probe."""

    nodes: Tensor  # (m,), ascending
    weights: Tensor  # (m,), sum 1
    reach: tuple[float, float]  # the outermost nodes, each moved out by its residual
    exact: bool  # the Krylov space is invariant: no error of the quadrature
    portion: float  # the probe's part of all weights: its squared norm


@without_autocast()
@progress("density of eigenvalues", "steps")
def density(
    a: SymmetricOperator,
    *,
    steps: int = 64,
    probes: int = 4,
    width: float | None = None,
    points: Tensor | None = None,
    seed: int = 0,
) -> Density:
    """Estimate the density of eigenvalues and the fraction below each point, with bands [N18].

    ``1/P Σ_i N(t; λ_i, width²)`` and ``#{λ_i ≤ t}/P`` (Ubaru, Chen & Saad, 2017).

    Args:
        steps: m, products with each probe, all kept in memory.
        probes: unit vectors; their spread falls with P: in a large network few are enough.
        width: of the broadening; by default 1.2/m of the spectrum's range.  A narrower one has a wider band.
        points: where to evaluate; by default 256 across the spectrum.

    Raises:
        NotFinite: for an operator whose products are not finite.
        ValueError: steps, probes or width that are not positive.
    """
    require_operator(a)
    if steps < 1 or probes < 1 or (width is not None and width <= 0):
        raise InvalidValue(f"steps={steps}, probes={probes}, width={width}: all have to be positive")
    steps = min(steps, a.size)
    generator = torch.Generator().manual_seed(seed)
    unit = Unit()
    v = torch.randn((a.size, probes), generator=generator, dtype=torch.float64)
    squares = v.square().sum(dim=0)
    v = (v / squares.sqrt()).to(a.like)
    blocks = v.split(1 if a.matmat is None else probes, dim=1)
    rules = [rule for i, block in enumerate(blocks) for rule in _rules(unit.applied(a), block, steps, i, len(blocks))]
    rules = [rule._replace(portion=part) for rule, part in zip(rules, (squares / squares.sum()).tolist(), strict=True)]
    found = _Spectrum(rules, a.size, steps, ROUNDING * torch.finfo(a.like.dtype).eps)
    sigma = 1.2 * found.span / steps if width is None else width / unit.size
    if points is None:
        points = torch.linspace(found.low - 3 * sigma, found.high + 3 * sigma, 256, dtype=torch.float64)
    else:
        points = points.detach().double().cpu() / unit.size
    height, height_band = found.density(points, sigma)
    fraction, fraction_band = found.cumulative(points)
    return Density(
        points=unit.size * points,
        width=unit.size * sigma,
        density=height / unit.size,
        density_band=(height_band[0] / unit.size, height_band[1] / unit.size),
        cumulative=fraction,
        cumulative_band=fraction_band,
        num_matvecs=probes * steps,
    )


class _Spectrum:
    """The rules of all probes, and what they say with which bands."""

    def __init__(self, rules: list[_Rule], size: int, steps: int, eps: float) -> None:
        complete = [rule for rule in rules if len(rule.nodes) == size and rule.exact]
        if complete:  # all eigenvalues are known, each has the same weight
            rules = [complete[0]._replace(weights=torch.full_like(complete[0].nodes, 1 / size), portion=1.0)]
        self.rules, self.steps, self.eps = rules, steps, 0.0 if complete else eps
        self.count = math.inf if complete else len(rules) * size / 2  # Dirichlet parameters in all
        self.low, self.high = min(r.reach[0] for r in rules), max(r.reach[1] for r in rules)
        self.slack = eps * max(-self.low, self.high)  # of a node
        self.span = max(self.high - self.low, 2 * self.slack, torch.finfo(torch.float64).tiny)
        self.inexact = sum(r.portion for r in rules if not r.exact)
        self.nodes = torch.cat([r.nodes for r in rules])
        self.weights = torch.cat([r.portion * r.weights for r in rules])

    def density(self, t: Tensor, sigma: float) -> tuple[Tensor, Band]:
        """Return the broadened density at t, and its band."""
        distance = (t[:, None] - self.nodes).abs()
        estimate = _normal(distance, sigma) @ self.weights
        error = self.eps * self.weights.sqrt()
        least = _normal(distance + self.slack, sigma) @ (self.weights - error).clamp(min=0)
        most = _normal((distance - self.slack).clamp(min=0), sigma) @ (self.weights + error + self.eps**2)
        interval = self.low - 0.01 * self.span, self.high + 0.01 * self.span
        missing = self.inexact * _tail(t, sigma, interval, 2 * self.steps)
        least, most = (least - missing).clamp(min=0), most + missing
        if math.isinf(self.count):
            return estimate, (least, most)
        nearest = distance.min(dim=1).values
        f = torch.exp((nearest[:, None] ** 2 - distance**2) / (2 * sigma**2))
        unit = _normal((nearest - self.slack).clamp(min=0), sigma).clamp(min=torch.finfo(t.dtype).tiny)  # of f
        ratio = torch.minimum(unit * self.ratio(f), _normal(t.new_zeros(1), sigma))
        lower, upper, portion = self.two_values(f)
        low, high = _means(
            torch.stack([least / ratio, portion]), torch.stack([most / ratio, portion]), self.count, BOTH
        )
        spread = unit * (upper - lower)
        low = torch.minimum(ratio * low[0], unit * lower + spread * low[1] - (estimate - least))
        high = torch.maximum(ratio * high[0], unit * lower + spread * high[1] + (most - estimate))
        low = torch.where(unit > torch.finfo(t.dtype).tiny, low, 0)
        return estimate, (torch.minimum(low, least).clamp(min=0), torch.maximum(high, most))

    def ratio(self, f: Tensor) -> Tensor:
        """Bound ``mean f² / mean f`` from above with 98.75 %, from the means of f, f², f³ and f⁴.

        To first order its logarithm has the variance ``2/(nP) E (f²/E f² - f/E f)²``.
        """
        f1, f2, f3, f4 = (f**power @ self.weights for power in (1, 2, 3, 4))
        spread = ((f4 / f2.square() - 2 * f3 / (f1 * f2) + f2 / f1.square()).clamp(min=0) / self.count).sqrt()
        return f2 / f1 * torch.exp(NormalDist().inv_cdf(1 - BOTH) * spread)

    def two_values(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find two values, and the fraction of the upper one, that have the mean, variance and skewness of f."""
        mean = f @ self.weights
        deviation = f - mean[:, None]
        spread = (deviation.square() @ self.weights).sqrt()
        skewness = (deviation**3 @ self.weights) / spread.clamp(min=1e-100) ** 3
        s = (1 + skewness.square() / 4).sqrt() + skewness.abs() / 2
        above = torch.where(skewness > 0, s, 1 / s)  # the mean, in units of the spread
        return mean - spread / above, mean + spread * above, 1 / (1 + above.square())

    def cumulative(self, t: Tensor) -> tuple[Tensor, Band]:
        """Return the fraction of eigenvalues up to t, and its band."""
        sides = [_bracket(r, t, self.slack) for r in self.rules]
        portions = torch.tensor([r.portion for r in self.rules], dtype=torch.float64)
        least, most = (portions @ torch.stack(side) for side in zip(*sides, strict=True))
        estimate = (least + most) / 2
        least, most = (least - self.eps).clamp(min=0), (most + self.eps).clamp(max=1)
        if math.isinf(self.count):
            return estimate, (least, most)
        low, high = _means(least, most, self.count, 0.025)
        return estimate, (torch.minimum(low, estimate), torch.maximum(high, estimate))


def _rules(a: SymmetricOperator, v: Tensor, steps: int, block: int, blocks: int) -> list[_Rule]:
    """Run Lanczos from each column of `v` ``(P, b)``, a block of several, orthogonalized twice against all before.

    Where a Krylov space ends, its next vector is set to zero: the nodes that follow are zeros of no weight.
    """
    basis = v.new_zeros((steps, *v.shape))
    alpha, beta = (torch.zeros((v.shape[1], steps), dtype=torch.float64) for _ in range(2))
    size = torch.zeros(v.shape[1], dtype=torch.float64)  # of the operator, as far as it has shown
    for j in range(steps):
        basis[j] = v
        rest = multiply(a, v)
        report(block * steps + j + 1, total=blocks * steps)
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
        weights = s[0, kept].square()
        nodes, left = nodes[kept], left[kept]
        reach = (nodes[0] - left[0]).item(), (nodes[-1] + left[-1]).item()
        rules.append(_Rule(nodes, weights, reach, exact, 1.0))
    return rules


def _normal(x: Tensor, sigma: float) -> Tensor:
    return torch.exp(-0.5 * (x / sigma) ** 2) / (sigma * (2 * torch.pi) ** 0.5)


def _tail(t: Tensor, sigma: float, interval: tuple[float, float], degree: int) -> Tensor:
    """Bound the error of the quadrature: ``2 Σ_{j ≥ degree} |c_j|`` of a Chebyshev series [N19].

    The series is that of ``x -> N(t; x, σ²)`` on the interval.  No measure of unit weight on it integrates that
    function otherwise than the quadrature by more than this, nor by more than the height of the function.
    """
    low, high = interval
    centre = (low + high) / 2
    half = (high - low) / 2
    n = min(max(4 * degree, int(24 * half / sigma)), 4096)
    angle = (torch.arange(n, dtype=torch.float64) + 0.5) * torch.pi / n
    heights = _normal(t[:, None] - centre - half * torch.cos(angle), sigma)
    turn = torch.exp(-0.5j * torch.pi * torch.arange(n, dtype=torch.float64) / n)
    series = (torch.fft.rfft(torch.cat([heights, heights.flip(1)], dim=1))[:, :n] * turn).real / n  # a cosine transform
    nearest = (t - centre).abs().sub(half).clamp(min=0)
    return torch.minimum(2 * series[:, degree:].abs().sum(dim=1), _normal(nearest, sigma))


def _bracket(rule: _Rule, t: Tensor, slack: float) -> Band:
    """Bound a probe's weight up to t: by what lies left of the node before it, and of the node after it."""
    total = torch.cat([rule.weights.new_zeros(1), rule.weights.cumsum(0)])
    step = 0 if rule.exact else 1
    before = torch.searchsorted(rule.nodes, t - slack, right=True)
    after = torch.searchsorted(rule.nodes, t + slack, right=True)
    return total[(before - step).clamp(min=0)], total[(after + step).clamp(max=len(rule.nodes))].clamp(max=1)


def _means(least: Tensor, most: Tensor, count: float, p: float) -> Band:
    """Find the means of which observed fractions `least` are the upper and `most` the lower `p`-quantile.

    A fraction has a beta distribution of parameters that add up to `count`.
    """
    x = torch.stack([least, most]).clamp(max=1)
    limit = x.new_tensor([1 - p, p]).view(2, *(1 for _ in least.shape))
    low, high = torch.zeros_like(x), torch.ones_like(x)
    for _ in range(44):  # to 1e-13
        mean = (low + high) / 2
        beyond = _beta(x, count * mean, count * (1 - mean)) > limit
        low, high = torch.where(beyond, mean, low), torch.where(beyond, high, mean)
    return low[0], high[1]


def _beta(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Approximate the distribution function of a beta variable (to .5 % of either tail for ``a + b ≥ 4``).

    By the normal one (Peizer & Pratt, 1968) where both parameters exceed one, else by a gamma variable of the smaller
    parameter, of which the other one makes little difference (Wise, 1950).
    """
    y, n = 1 - x, a + b - 1
    shift = a - 1 / 3 - (n + 1 / 3) * x + 0.02 * (y / a - x / b + (y - 0.5) / (a + b))
    bend = 1 + y * _bend((a - 0.5) / (n * x)) + x * _bend((b - 0.5) / (n * y))
    normal = torch.special.ndtr(-shift * (bend / ((n + 1 / 6) * x * y)).sqrt())
    near = (torch.minimum(a, b) <= 1) | (x <= 0) | (x >= 1)
    left, right = near & (a <= b), near & (a > b)
    u, v, z = a[left], b[left], x[left]
    normal[left] = torch.special.gammainc(u, -torch.log1p(-z) * (v + (u - 1) / 2))
    u, v, z = a[right], b[right], x[right]
    normal[right] = torch.special.gammaincc(v, -torch.log(z) * (u + (v - 1) / 2))
    return normal


def _bend(x: Tensor) -> Tensor:
    """Return ``(1 - x² + 2 x log x) / (1 - x)²``, near x = 1 by its series."""
    e = x - 1
    near = e.abs() < 1e-3
    far = torch.where(near, 2.0, x)
    return torch.where(near, -e / 3 + e**2 / 6, (1 - far**2 + 2 * far * far.log()) / (1 - far) ** 2)
