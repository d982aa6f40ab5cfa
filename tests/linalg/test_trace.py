"""Estimates against dense matrices: what their bands promise is counted over a hundred seeds."""

import math
from collections.abc import Callable

import curvlinops
import problems
import pytest
import scipy.stats
import torch
from problems import DTYPE, normal, symmetric
from torch import Tensor

from sharpscope import find_groups, hessian
from sharpscope.errors import NotConverged, NotFinite
from sharpscope.linalg import (
    SymmetricOperator,
    block_eigenpairs,
    density,
    diagonal,
    group_fractions,
    lanczos,
    smallest_eigenpairs,
    trace,
)
from sharpscope.linalg.trace import student

SEEDS = range(100)
ENOUGH = 93  # of 100 at a nominal 95 %
ROUNDING = 1e-10  # of sums over some hundred entries, relative to the largest


def network_like() -> Tensor:
    bulk = torch.cat([0.3 * torch.linspace(0, 1, 150, dtype=DTYPE) ** 3, -0.15 * torch.linspace(0, 1, 60) ** 2])
    return symmetric(torch.cat([torch.logspace(0.5, 1.7, 10, dtype=DTYPE), bulk, torch.zeros(80)]))[0]


def power_law() -> Tensor:
    return symmetric(20 * torch.arange(1, 301, dtype=DTYPE) ** -1.5)[0]


def network() -> Tensor:
    h = hessian(problems.objective("BatchNorm2d", "cross-entropy")).dense()
    return (h + h.T) / 2


def even() -> Tensor:
    return symmetric(torch.linspace(0.5, 1.5, 300, dtype=DTYPE))[0]


MATRICES: dict[str, Callable[[], Tensor]] = {
    "outliers over a bulk": network_like,
    "power law": power_law,
    "Hessian": network,
    "even": even,
}


def operator(matrix: Tensor) -> SymmetricOperator:
    return SymmetricOperator(lambda v: matrix @ v, matrix[0], lambda v: matrix @ v)


def covered(truth: Tensor, band: tuple[Tensor, Tensor]) -> Tensor:
    slack = ROUNDING * truth.abs().max()
    return (band[0] - slack <= truth) & (truth <= band[1] + slack)


@pytest.mark.parametrize("rtol", [0.05, 0.005])
@pytest.mark.parametrize("name", MATRICES)
def test_the_interval_of_the_trace_holds_it(name: str, rtol: float) -> None:
    matrix = MATRICES[name]()
    found = [trace(operator(matrix), rtol=rtol, seed=seed) for seed in SEEDS]
    assert sum(bool(covered(matrix.trace(), e.interval)) for e in found) >= ENOUGH
    assert all(e.standard_error <= rtol * e.value.abs() for e in found)
    if all(e.probes > 0 for e in found):  # where some seeds go on to the exact trace, the others are the lucky ones
        spread = torch.stack([e.value - matrix.trace() for e in found]).square().mean().sqrt()
        stated = torch.stack([e.standard_error for e in found]).square().mean().sqrt()
        # The true spread over 100 seeds is itself known to 7 %, and stopping early prefers small spreads.
        assert 0.75 < stated / spread < 1.35


@pytest.mark.parametrize("name", MATRICES)
def test_the_intervals_of_the_diagonal_hold_its_entries(name: str) -> None:
    matrix = MATRICES[name]()
    found = [diagonal(operator(matrix), rtol=0.3, seed=seed) for seed in SEEDS]
    fraction = torch.stack([covered(matrix.diagonal(), e.interval) for e in found]).double().mean()
    assert fraction >= ENOUGH / 100
    assert all(e.standard_error.norm() <= 0.3 * e.value.norm() for e in found)
    error = max((e.value - matrix.diagonal()).norm().item() for e in found)
    assert error <= 0.6 * matrix.diagonal().norm()  # twice the error that rtol allows, at the worst of 100 seeds


def places(values: Tensor) -> Tensor:
    """Points along the spectrum and among most of the eigenvalues; not at an eigenvalue."""
    span = values[-1] - values[0]
    among = torch.quantile(values, torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98], dtype=DTYPE)) + 1e-5 * span
    along = values[0] + span * torch.linspace(-0.1, 1.05, 9, dtype=DTYPE)
    return torch.cat([along, among])


def broadened(values: Tensor, points: Tensor, width: float) -> Tensor:
    return torch.distributions.Normal(values, width).log_prob(points[:, None]).exp().mean(dim=1)


@pytest.mark.parametrize("steps", [12, 24])
@pytest.mark.parametrize("name", MATRICES)
def test_the_bands_of_the_density_hold_it(name: str, steps: int) -> None:
    matrix = MATRICES[name]()
    values = torch.linalg.eigvalsh(matrix)
    points = places(values)
    fraction = (values <= points[:, None]).double().mean(dim=1)
    smooth, sharp = [], []
    for seed in SEEDS:
        found = density(operator(matrix), steps=steps, probes=3, points=points, seed=seed)
        smooth.append(covered(broadened(values, points, found.width), found.density_band))
        sharp.append(covered(fraction, found.cumulative_band))
    for kind in (smooth, sharp):
        assert torch.stack(kind).double().sum(dim=0).min() >= ENOUGH  # at every point


def test_more_steps_and_more_probes_narrow_the_bands() -> None:
    a = operator(network_like())
    points = places(torch.linalg.eigvalsh(network_like()))

    def widths(steps: int, probes: int) -> list[float]:
        found = density(a, steps=steps, probes=probes, width=3.0, points=points)
        return [(high - low).mean().item() for low, high in (found.density_band, found.cumulative_band)]

    coarse, deep, wide = widths(12, 2), widths(60, 2), widths(12, 32)
    assert deep[0] < coarse[0] and deep[1] < 0.6 * coarse[1]
    assert wide[0] < coarse[0] and wide[1] < coarse[1]


def test_a_width_below_the_resolution_is_not_believed() -> None:
    a = operator(even())
    fine = density(a, steps=10, width=0.002, points=torch.linspace(0.4, 1.6, 40, dtype=DTYPE))
    assert ((fine.density_band[1] - fine.density_band[0]) > fine.density).all()


def test_the_density_integrates_to_one_and_the_fraction_is_monotone() -> None:
    found = density(operator(network_like()))
    assert torch.trapezoid(found.density, found.points).item() == pytest.approx(1, abs=3e-3)  # 3 σ beyond each end
    for side in (found.cumulative, *found.cumulative_band):
        assert (side.diff() >= -1e-12).all() and side.min() >= 0 and side.max() <= 1 + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_distinct_eigenvalues_are_seen_exactly_but_for_the_spread_of_probes(dtype: torch.dtype) -> None:
    values = torch.cat([torch.full((30,), 2.0), torch.zeros(60), torch.full((10,), -1.0)]).to(dtype)
    found = density(operator(symmetric(values)[0]), steps=8, probes=400, points=torch.tensor([-2.0, -0.5, 1.0, 3.0]))
    # √(2 · 0.7 · 0.3/(400 · 102)) is 0.003 for the spread
    assert found.cumulative.tolist() == pytest.approx([0, 0.1, 0.7, 1], abs=0.012)
    low, high = found.cumulative_band
    assert (high - low).max() < 0.015


def test_one_eigenvalue_and_one_row() -> None:
    for size in (1, 40):
        a = SymmetricOperator(lambda v: 2 * v, torch.zeros(size, dtype=DTYPE))
        found = density(a, points=torch.tensor([1.0, 3.0]), width=0.5)
        assert found.cumulative.tolist() == pytest.approx([0, 1], abs=1e-12)
        assert trace(a).value.item() == pytest.approx(2 * size, rel=1e-12)
        assert diagonal(a).value.tolist() == pytest.approx([2] * size, rel=1e-12)


def test_zero() -> None:
    a = SymmetricOperator(lambda v: 0 * v, torch.zeros(100, dtype=DTYPE))
    assert trace(a).value == 0 and diagonal(a).value.norm() == 0
    assert density(a, width=1.0, points=torch.tensor([-1.0, 1.0])).cumulative.tolist() == [0, 1]


def test_probes_of_one_column_or_of_many_give_one_density() -> None:
    matrix = power_law()
    one, many = (
        density(SymmetricOperator(lambda v: matrix @ v, matrix[0]), steps=20),
        density(operator(matrix), steps=20),
    )
    assert one.density.tolist() == pytest.approx(many.density.tolist(), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("n", [3, 5, 15, 200])
def test_students_quantile(n: int) -> None:
    assert student(n) == pytest.approx(scipy.stats.t.ppf(0.975, n), rel=1e-2)


def test_traces_of_curvlinops_agree() -> None:
    matrix = network_like()
    torch.manual_seed(0)
    theirs = curvlinops.xtrace(matrix, 100)
    assert theirs.item() == pytest.approx(matrix.trace().item(), rel=0.02)  # its error at 100 products, ten times over
    assert trace(operator(matrix)).value.item() == pytest.approx(theirs.item(), rel=0.05)
    theirs = curvlinops.xdiag(matrix, 200)
    ours = diagonal(operator(matrix), rtol=0.05).value
    assert problems.relative(ours, theirs) < 0.2


def test_products_are_counted_and_bounded() -> None:
    matrix, seen = power_law(), 0

    def columns(v: Tensor) -> Tensor:
        nonlocal seen
        seen += v.shape[1]
        return matrix @ v

    a = SymmetricOperator(lambda v: columns(v[:, None])[:, 0], matrix[0], columns)
    for estimate in (lambda: trace(a, rtol=0.003), lambda: diagonal(a, rtol=0.1), lambda: density(a, steps=9)):
        seen = 0
        assert estimate().num_matvecs == seen
    seen = 0
    with pytest.raises(NotConverged, match=r"standard error of .* after 60 products, not to .*; raise max_matvecs"):
        trace(a, rtol=1e-6, max_matvecs=60)
    assert seen == 60


def test_a_trace_near_zero_needs_an_absolute_target() -> None:
    matrix = symmetric(torch.linspace(-1, 1, 400, dtype=DTYPE))[0]
    assert trace(operator(matrix), atol=3.0).interval[0] < 0.1
    exact = trace(operator(matrix), rtol=1e-3)
    assert exact.probes == 0 and exact.standard_error == 0
    assert exact.value.item() == pytest.approx(0, abs=1e-10)


def test_the_lower_end() -> None:
    matrix = network_like()
    values = torch.linalg.eigvalsh(matrix)
    found = smallest_eigenpairs(operator(matrix), 2, rtol=1e-7)  # of the largest magnitude, 50
    assert found.values.tolist() == pytest.approx(values[:2].tolist(), abs=1e-6)
    image = matrix @ found.vectors - found.vectors * found.values
    assert image.norm(dim=0).tolist() == pytest.approx(found.residuals.tolist(), rel=1e-3, abs=1e-10)


def test_blocks_and_fractions_by_slices_and_by_groups() -> None:
    f = problems.objective("LayerNorm", "cross-entropy")
    a = hessian(f)
    dense, top = a.dense(), lanczos(a, rtol=1e-8)
    for groups in (f.slices, find_groups(f).groups):
        blocks = block_eigenpairs(a, groups, k=2, rtol=1e-8)
        assert list(blocks) == list(groups)
        for name, rows in groups.items():
            block = dense[rows][:, rows]
            true = torch.linalg.eigvalsh(block).flip(0)[:2]
            assert blocks[name].values.tolist() == pytest.approx(true.tolist(), abs=1e-8)
            assert blocks[name].values[0] <= top.values[0] + 1e-10
        parts = group_fractions(top.vectors[:, 0], groups)
        assert sum(parts.values()) == pytest.approx(1, abs=1e-12)
        assert ("elsewhere" in parts) == (groups is not f.slices)
        for name, rows in groups.items():
            assert parts[name] == pytest.approx(top.vectors[rows, 0].square().sum().item(), abs=1e-12)


@pytest.mark.parametrize("v", [torch.zeros(4), torch.full((4,), math.nan), torch.ones(4, 2)])
def test_fractions_of_what_is_no_direction(v: Tensor) -> None:
    with pytest.raises(ValueError, match="a finite vector"):
        group_fractions(v, {"all": slice(4)})


def test_groups_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        group_fractions(torch.ones(4), {"a": slice(3), "b": torch.tensor([2, 3])})


@pytest.mark.parametrize("estimate", [trace, diagonal, density])
def test_products_that_are_not_finite(estimate: Callable[[SymmetricOperator], object]) -> None:
    for size in (20, 100):
        with pytest.raises(NotFinite, match="spectrum is not defined"):
            estimate(SymmetricOperator(lambda v: v * math.inf, torch.ones(size)))


def test_settings_that_cannot_be_met_are_named() -> None:
    a = operator(even())
    with pytest.raises(ValueError, match="make one of them positive"):
        trace(a, rtol=0)
    with pytest.raises(ValueError, match="less than a sketch and its first probes"):
        diagonal(a, max_matvecs=5)
    with pytest.raises(ValueError, match="have to be positive"):
        density(a, probes=0)


def test_estimates_repeat_and_leave_the_global_generator_alone() -> None:
    a = operator(normal(60, 60, seed=0) + normal(60, 60, seed=0).T)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = trace(a, atol=30.0), diagonal(a, rtol=0.5), density(a)
    assert torch.get_rng_state().equal(before)
    second = trace(a, atol=30.0), diagonal(a, rtol=0.5), density(a)
    assert first[0].value == second[0].value and first[1].value.equal(second[1].value)
    assert first[2].density.equal(second[2].density)
    assert trace(a, atol=30.0, seed=1).value != first[0].value
