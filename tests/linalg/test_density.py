"""Bands of the density hold the truth and the estimate at every point, on spectra made to break them."""

import math

import pytest
import torch
from problems import DTYPE, normal
from scipy import special
from torch import Tensor

from sharpscope.linalg import SymmetricOperator, density
from sharpscope.linalg.density import _beta, _means

SEEDS = range(30)
ENOUGH = 25
"""Fewer of 30 has a probability of .003 where a band holds 95 %; bands of the density hold more."""


def line(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, n, dtype=DTYPE)


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=DTYPE)


SPECTRA = {
    "even": line(-1, 1, 200),
    "normal": normal(200, seed=0),
    "single outlier": torch.cat([line(-0.05, 0.3, 199), line(1, 1, 1)]),
    "zeros": torch.cat([zeros(180), line(0.2, 1, 20)]),
    "rank one": torch.cat([zeros(199), line(1, 1, 1)]),
    "clusters": torch.cat([0.005 * normal(100, seed=1), 0.5 + 0.005 * normal(20, seed=2), line(1, 1.01, 3)]),
    "negative outliers": torch.cat([0.05 * normal(200, seed=3).abs(), line(-1, -0.9, 2), line(0.4, 1, 5)]),
    "geometric": 0.9 ** torch.arange(150, dtype=DTYPE),
    "heavy tails": 0.02 * normal(300, seed=4) ** 3,
    "many": torch.cat([0.1 * normal(2000, seed=5), line(0.7, 1, 8)]),
    "identity": torch.ones(30, dtype=DTYPE),
    "two": line(0, 1, 2),
}


def diagonal_operator(values: Tensor) -> SymmetricOperator:
    """A random probe makes a diagonal matrix as good as any of that spectrum."""
    return SymmetricOperator(lambda v: values * v, values, lambda v: values[:, None] * v)


def broadened(values: Tensor, points: Tensor, width: float) -> Tensor:
    z = (points[:, None] - values) / width
    return torch.exp(-z.square() / 2).mean(dim=1) / (width * (2 * math.pi) ** 0.5)


@pytest.mark.parametrize("name", SPECTRA)
def test_bands_hold_the_truth_and_the_estimate(name: str) -> None:
    """Among eigenvalues, between them, and in tails where the density is 1e-15 or 1e-300 of its height."""
    values = SPECTRA[name]
    probes, width = (1, 0.04) if list(SPECTRA).index(name) % 2 else (4, 0.01)
    span = max((values.max() - values.min()).item(), 0.1)
    width = width * span
    points = torch.linspace(values.min() - 5 * width, values.max() + 5 * width, 25, dtype=DTYPE) + 1e-6 * span
    truth, fraction = broadened(values, points, width), (values <= points[:, None]).double().mean(dim=1)
    smooth, sharp = torch.zeros(len(points)), torch.zeros(len(points))
    for seed in SEEDS:
        a = diagonal_operator(values)
        found = density(a, steps=32, probes=probes, width=width, points=points, seed=seed)
        for estimate, (low, high) in (
            (found.density, found.density_band),
            (found.cumulative, found.cumulative_band),
        ):
            assert ((low <= estimate) & (estimate <= high)).all()
        smooth += (found.density_band[0] <= truth) & (truth <= found.density_band[1])
        sharp += (found.cumulative_band[0] <= fraction) & (fraction <= found.cumulative_band[1])
    assert smooth.min() >= ENOUGH
    assert sharp.min() >= ENOUGH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_all_steps_are_taken_the_answer_is_exact(dtype: torch.dtype) -> None:
    values = torch.tensor([-1.0, 0.2, 0.3, 1.0, 2.5], dtype=dtype)
    points = torch.linspace(-2, 3, 21, dtype=DTYPE) + 0.01
    found = density(diagonal_operator(values), probes=2, width=0.2, points=points)
    truth = broadened(values.double(), points, 0.2)
    rounding = 1e3 * torch.finfo(dtype).eps
    assert found.density.tolist() == pytest.approx(truth.tolist(), abs=rounding)
    fraction = (values <= points[:, None]).double().mean(dim=1)
    assert found.cumulative.tolist() == pytest.approx(fraction.tolist(), abs=1e-15)
    low, high = found.density_band
    assert (low <= truth).all() and (truth <= high).all() and (high - low).max() <= 10 * rounding


def test_a_band_is_as_narrow_as_its_probes_allow() -> None:
    """Of an even spectrum: ±2.24 standard deviations √(2 · (r - p) p/(nP)), with r = height/√2, and a third more."""
    values, width = line(-1, 1, 400), 0.1
    found = density(diagonal_operator(values), steps=64, probes=8, width=width, points=zeros(1))
    p, r = 0.5, 1 / (width * (2 * math.pi) ** 0.5) / 2**0.5
    expected = 2 * 2.24 * math.sqrt(2 * (r - p) * p / (8 * 400))
    low, high = found.density_band
    assert 0.8 * expected <= (high - low).item() <= 1.35 * expected


@pytest.mark.parametrize("count", [4, 30, 1e3, 1e6])
@pytest.mark.parametrize("fraction", [1e-3, 0.03, 0.3, 0.5, 0.9])
def test_the_beta_distribution(count: float, fraction: float) -> None:
    """Against SciPy, in both tails; a probability of .0125 is right to .001."""
    a, b = count * fraction, count * (1 - fraction)
    for p in (0.0125, 0.025, 0.5, 0.975, 0.9875):
        x = float(special.betaincinv(a, b, p))
        if 1e-200 < x < 1:
            found = _beta(*(torch.tensor([t], dtype=DTYPE) for t in (x, a, b)))
            assert found.item() == pytest.approx(p, abs=1e-3 if p != 0.5 else 5e-3)


def test_intervals_of_fractions_hold_what_they_should() -> None:
    """One of 300 eigenvalues, 20 and all but one, from four probes: 95 in 100, to three standard errors of 2000."""
    generator = torch.Generator().manual_seed(0)
    for k in (1, 20, 299):
        a, b = torch.full((2000,), 2.0 * k, dtype=DTYPE), torch.full((2000,), 2.0 * (300 - k), dtype=DTYPE)
        pair = torch._standard_gamma(torch.stack([a, b]), generator=generator)
        x = pair[0] / pair.sum(dim=0)
        low, high = _means(x, x, 600.0, 0.025)
        assert ((low <= k / 300) & (k / 300 <= high)).double().mean().item() == pytest.approx(0.95, abs=0.015)
