"""Laws of the solvers that single answers do not show: bounds as they are derived, orthogonality, rounding."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharpscope.linalg import SymmetricOperator, lanczos, shifted, warm_started
from sharpscope.linalg.bounds import GRID, RandomStart, least_norm
from sharpscope.linalg.density import _tail
from sharpscope.linalg.eigenpairs import CONFIDENCE
from sharpscope.linalg.trace import _Moments

Matrix = NDArray[np.float64]


def matrix(values: Tensor, seed: int) -> Tensor:
    """A symmetric matrix with these eigenvalues, in random directions."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    return (q * values) @ q.T


def operator(m: Tensor, *, together: bool = False) -> SymmetricOperator:
    return SymmetricOperator(lambda v: m @ v, m[0], (lambda V: m @ V) if together else None)


def bulk_with_edge(seed: int, size: int = 200) -> Tensor:
    """A spectrum whose top lies close: the kind on which a bound has to be earned."""
    g = torch.Generator().manual_seed(1000 + seed)
    return torch.rand(size, generator=g, dtype=torch.float64).sort().values


def test_a_diagonal_shift_acts_on_columns_as_on_each_vector() -> None:
    m = matrix(torch.linspace(-1, 2, 6, dtype=torch.float64), 0)
    d = torch.arange(6, dtype=torch.float64)
    for together in (False, True):
        a = shifted(operator(m, together=together), d)
        assert torch.allclose(a.dense(), m + torch.diag(d), rtol=0, atol=1e-14)
        assert torch.allclose(shifted(operator(m, together=together), 3.0).dense(), m + 3 * torch.eye(6), atol=1e-14)


def test_a_scaled_answer_keeps_its_bounds() -> None:
    found = lanczos(operator(matrix(bulk_with_edge(0), 0)), rtol=1e-2)
    scaled = found.scaled(3.0)
    assert math.isfinite(found.upper)
    for ours, theirs in (
        (scaled.upper, found.upper),
        (scaled.floor, found.floor),
        (scaled.lower[0].item(), found.lower[0].item()),
    ):
        assert ours == pytest.approx(3 * theirs, rel=1e-15)


@pytest.mark.parametrize("seed", range(40))
def test_the_bound_from_above_stands_above_rounding(seed: int) -> None:
    """In single precision, on a space so small that it is exhausted: what is left of the error is rounding alone."""
    m = matrix(torch.linspace(0, 1, 12, dtype=torch.float64), seed).float()
    top = torch.linalg.eigvalsh(m.double())[-1].item()
    found = lanczos(operator(m), rtol=1e-7, seed=seed)
    assert found.lower[0].item() <= top <= found.upper


def test_the_basis_stays_orthonormal_where_one_pass_would_not_do() -> None:
    """Eigenvalues that differ by 1e-8 of their size: one pass of Gram-Schmidt leaves 1e-8 of the last vector behind."""
    m = 1e8 * torch.eye(60) + matrix(torch.linspace(0, 1, 60, dtype=torch.float64), 0)
    found = lanczos(operator(m), k=6, rtol=1e-13)
    assert (found.vectors.T @ found.vectors - torch.eye(6)).abs().max() < 1e-13


class Spy:
    """Keeps the arguments of every evaluation of the bound."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[RandomStart, Matrix, Matrix, Matrix, float]] = []
        original = RandomStart.upper

        def upper(start: RandomStart, ritz: Matrix, s: Matrix, coupling: Matrix, p: float, scale: float) -> float:
            found = original(start, ritz, s, coupling, p, scale)
            assert p == pytest.approx(1 - CONFIDENCE)
            self.seen.append((start, ritz, s, coupling, found))
            return found

        monkeypatch.setattr(RandomStart, "upper", upper)


def phi(start: RandomStart, ritz: Matrix, s: Matrix, coupling: Matrix, shift: float) -> float:
    """``φ(λ) = ‖(I + K Kᵀ)^-½ K a‖`` with ``K = C S (λ - Θ)⁻¹``, from the matrices as they stand in [N21]."""
    a = s.T @ start.at(np.array([shift]), len(s))[0]
    k = coupling / (shift - ritz)
    values, turn = np.linalg.eigh(np.eye(len(k)) + k @ k.T)
    return float(np.linalg.norm((turn / np.sqrt(values)) @ turn.T @ k @ a, 2))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_the_bound_is_where_phi_meets_the_least_norm(k: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second way: φ on a much finer grid; the bound is the end of ``{λ: φ(λ) ≥ δ}``, at most one grid step above it."""
    spy = Spy(monkeypatch)
    lanczos(operator(matrix(bulk_with_edge(seed), seed)), k, rtol=1e-2, seed=seed)
    start, ritz, s, coupling, found = spy.seen[-1]
    scale, delta = float(np.abs(ritz).max()), least_norm(k, 1 - CONFIDENCE)
    distances = np.geomspace(1e-9, 1e3, 6000) * scale
    possible = [d for d in distances if phi(start, ritz, s, coupling, float(ritz[0] + d)) >= delta]
    step = float(GRID[1] / GRID[0])
    assert possible[-1] * 0.99 <= found - ritz[0] <= possible[-1] * step * 1.01


@pytest.mark.parametrize("seed", range(12))
def test_the_start_is_remembered_through_restarts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the derivation says of the true eigenvector holds for sure: ``‖uᵀG‖ ≤ φ(λ1)``, also after restarts."""
    spy = Spy(monkeypatch)
    m = matrix(bulk_with_edge(seed, 300) ** 0.25, seed)
    values, vectors = torch.linalg.eigh(m)
    top = lanczos(operator(m), rtol=1e-3, basis=12, max_matvecs=2000, seed=seed).values[0].item()
    start, ritz, s, coupling, _ = spy.seen[-1]
    unit = top / float(ritz[0])  # the solver's
    assert len(start.restarts) >= 1
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn((300, 1), generator=generator, dtype=torch.float64)
    seen = abs((vectors[:, -1] @ g).item())
    assert seen <= phi(start, ritz, s, coupling, values[-1].item() / unit) * (1 + 1e-6)


def test_moments_of_batches_are_those_of_all_samples_together() -> None:
    """Batches whose means differ: their distance is part of the spread, too."""
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, n, generator=g, dtype=torch.float64) + 5 * n for n in (4, 7, 2)]
    moments = _Moments(torch.zeros(3, dtype=torch.float64))
    for batch in batches:
        moments.add(batch)
    together = torch.cat(batches, dim=1)
    assert torch.allclose(moments.mean, together.mean(dim=1), rtol=1e-12)
    assert torch.allclose(moments.standard_error, together.std(dim=1) / 13**0.5, rtol=1e-12)


@pytest.mark.parametrize("degree", [8, 16, 24])
def test_the_error_of_a_quadrature_comes_near_its_bound(degree: int) -> None:
    """Two measures that agree on polynomials below `degree`: the extremes of a Chebyshev polynomial, every other one.

    A smooth function is integrated by them with a difference of almost ``2 |c_degree|``, and the bound must cover it.
    """
    x = torch.cos(torch.pi * torch.arange(degree + 1, dtype=torch.float64) / degree)
    weights = torch.full_like(x, 2 / degree)
    weights[0] = weights[-1] = 1 / degree
    width = 6 / degree
    t = torch.linspace(-0.9, 0.9, 41, dtype=torch.float64)
    heights = torch.exp(-(((t[:, None] - x) / width) ** 2) / 2) / (width * (2 * torch.pi) ** 0.5)
    difference = (heights[:, ::2] @ weights[::2] - heights[:, 1::2] @ weights[1::2]).abs()
    bound = _tail(t, width, (-1.0, 1.0), degree)
    assert bool((difference <= bound * (1 + 1e-9)).all())
    assert (difference / bound).max() > 0.6


def test_what_is_dropped_as_rounding_stays_in_the_floor() -> None:
    """An operator within rounding of the identity: every remainder is dropped, and the floor covers all of them."""
    eps, n, k = torch.finfo(torch.float32).eps, 64, 4
    diagonal = torch.ones(n, dtype=torch.float64)
    diagonal[::4] += 40 * eps
    a = SymmetricOperator(lambda v: diagonal.float() * v, torch.zeros(n))
    found = lanczos(a, k, seed=0)
    v = found.vectors.double()
    apart = (diagonal[:, None] * v - v * found.values.double()).norm().item()
    assert apart > 16 * eps  # more than the rounding of one product
    assert 0.99 * apart <= found.floor


def test_a_rival_that_overtakes_as_it_converges_is_found() -> None:
    """The remembered rival reads .98 at first, below the wanted 1; its eigenvalue has become 1.2."""
    n = 40
    before = torch.full((n,), 0.05, dtype=torch.float64)
    before[:2] = torch.tensor([1.0, 0.9], dtype=torch.float64)
    first = torch.diag(before)
    c, s = 0.8**0.5, 0.2**0.5
    turned = torch.zeros(n, 2, dtype=torch.float64)
    turned[1:3] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    after = first.clone()
    after[1:3] = after[:, 1:3] = 0.0
    after = after + turned @ torch.diag(torch.tensor([1.2, 0.1], dtype=torch.float64)) @ turned.T
    like = torch.zeros(n, dtype=torch.float64)
    old = warm_started(SymmetricOperator(lambda v: first @ v, like), None, 1)
    new = warm_started(SymmetricOperator(lambda v: after @ v, like), old.memory, 1)
    assert old.values[0].item() == pytest.approx(1.0, rel=1e-4)
    assert new.values[0].item() == pytest.approx(1.2, rel=1e-4)
