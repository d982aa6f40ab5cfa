"""The largest eigenvalue from one Krylov space: its error, its bounds and its memory, on matrices of known spectra."""

import math
from dataclasses import replace

import pytest
import torch
from problems import DTYPE
from test_lanczos import SPECTRA, line
from torch import Tensor

from sharpscope.errors import InvalidValue, NotConverged, NotFinite, OutOfTime
from sharpscope.linalg import SymmetricOperator
from sharpscope.linalg.largest import gaussian, largest_eigenpair
from sharpscope.linalg.vectors import dot, length

SEEDS = range(20)


def rotated(values: Tensor, seed: int = 0) -> tuple[SymmetricOperator, Tensor]:
    """An operator with these eigenvalues in a random orthonormal basis, which is returned as columns."""
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn((n, n), generator=torch.Generator().manual_seed(seed), dtype=values.dtype))
    matrix = q @ torch.diag(values) @ q.T
    return SymmetricOperator(lambda v: matrix @ v, values), q


def diagonal(values: Tensor) -> SymmetricOperator:
    return SymmetricOperator(lambda v: values * v, values)


@pytest.mark.parametrize("name", SPECTRA)
def test_values_are_right_to_the_error_and_lie_between_their_bounds(name: str) -> None:
    values = SPECTRA[name]
    a, _ = rotated(values)
    truth, size = values.max().item(), values.abs().max().item()
    right = 0
    for seed in SEEDS:
        found = largest_eigenpair(a, seed=seed)
        value = found.values.item()
        right += abs(value - truth) <= 1e-3 * max(abs(truth), 1e-3 * size)
        assert found.lower.item() <= truth <= found.upper, seed
        v = found.vectors[:, 0]
        residual = (a @ v - value * v).norm().item()
        assert v.norm().item() == pytest.approx(1, abs=1e-6)
        assert residual == pytest.approx(found.residuals.item(), abs=1e-6 * size + 1e-300)
    assert right >= len(SEEDS) - 1  # of two eigenvalues 1 % apart it may be the second, where the start is unlucky


@pytest.mark.parametrize("name", [name for name in SPECTRA if "tight" not in name])
def test_a_smaller_error_is_reached_and_not_above_its_estimate(name: str) -> None:
    values = SPECTRA[name]
    a, _ = rotated(values)
    found = largest_eigenpair(a, error=1e-9)
    truth, size = values.max().item(), values.abs().max().item()
    assert found.values.item() == pytest.approx(truth, abs=1e-9 * size + 1e-300)
    assert abs(found.values.item() - truth) <= found.error + found.floor


@pytest.mark.parametrize("name", ["even", "outliers over a bulk", "a tight cluster on top", "large negative end"])
def test_few_rows_and_none_give_the_same_value(name: str) -> None:
    values = SPECTRA[name]
    a, _ = rotated(values)
    whole = largest_eigenpair(a)
    few = largest_eigenpair(a, basis=8)
    none = largest_eigenpair(a, vectors=False)
    assert none.vectors.shape == (len(values), 0)
    for found in (few, none):
        assert found.values.item() == pytest.approx(whole.values.item(), abs=2e-3 * values.abs().max().item())
        assert found.lower.item() <= values.max().item() <= found.upper


@pytest.mark.parametrize("second", [0.7, 0.9, 0.95])
def test_two_eigenvalues_that_are_near_each_other_are_told_apart(second: float) -> None:
    """Where their mixture looks like one: the residual of it is much smaller than the distance to all others."""
    values = torch.cat([line(-0.2, 0.3, 300), torch.tensor([second, 1.0], dtype=DTYPE)])
    a, _ = rotated(values)
    assert sum(largest_eigenpair(a, seed=seed).values.item() >= 0.999 for seed in SEEDS) >= len(SEEDS) - 1


def test_the_start_points_to_the_gradient() -> None:
    values = torch.cat([line(0, 1, 400), torch.tensor([1.2], dtype=DTYPE)])
    a, q = rotated(values)
    toward = q[:, -1] + 0.1 * q[:, 5]
    helped, alone = largest_eigenpair(a, toward), largest_eigenpair(a)
    assert helped.num_matvecs < alone.num_matvecs
    misled = largest_eigenpair(a, q[:, 3])  # a vector without any part along the eigenvector does no harm
    assert misled.values.item() == pytest.approx(1.2, rel=1e-3)


def test_the_bound_from_above_is_as_likely_as_it_says_with_a_shifted_start() -> None:
    """An eigenvector that the shift does not see, above a value that converges at once: only chance can tell."""
    values = torch.cat([torch.tensor([1.0, 1.5], dtype=DTYPE), torch.zeros(300, dtype=DTYPE)])
    a, q = rotated(values)
    below = sum(largest_eigenpair(a, q[:, 0], gap=math.inf, seed=seed).upper < 1.5 for seed in range(400))
    assert below <= 4  # of 400, where .4 are expected of a bound that is true with .999


def test_a_rough_value_without_a_certificate_takes_fewer_products() -> None:
    values = torch.cat([line(0, 1, 400), torch.tensor([3.0], dtype=DTYPE)])
    a, q = rotated(values)
    rough = largest_eigenpair(a, q[:, -1], error=3e-2, gap=math.inf)
    assert rough.values.item() == pytest.approx(3, rel=3e-2)
    assert rough.num_matvecs <= 4


def test_rows_stay_orthogonal_enough_in_single_precision() -> None:
    """Of a long vector: converged pairs at both ends make a recurrence of three vectors lose its orthogonality."""
    n = 300_000
    values = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 0.5
    values[:4] = torch.tensor([1.0, 0.99, -2.0, -1.9])
    found = largest_eigenpair(diagonal(values), error=1e-6)
    assert found.values.item() == pytest.approx(1, rel=1e-5)
    assert length(found.vectors[:, 0]) == pytest.approx(1, rel=1e-3)
    assert found.lower.item() <= 1 <= found.upper


def test_memory_grows_with_the_products_and_stays_at_three_vectors_without_a_vector() -> None:
    n = 200_000
    values = torch.rand(n, generator=torch.Generator().manual_seed(0))
    values[0] = 1.5
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        largest_eigenpair(diagonal(values), vectors=False)
    now, most = 0, 0
    for event in p.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert most <= 5.1 * 4 * n  # two rows, a product, what is left of it, and one being scaled


def test_no_convergence_and_products_that_are_not_finite() -> None:
    values = line(0, 1, 300)
    with pytest.raises(NotConverged, match="raise max_matvecs or error"):
        largest_eigenpair(diagonal(values), error=1e-9, max_matvecs=5)
    with pytest.raises(NotFinite):
        largest_eigenpair(SymmetricOperator(lambda v: math.nan * v, values))


@pytest.mark.parametrize("vectors", [True, False])
def test_what_is_found_when_time_runs_out_is_returned_with_its_error(vectors: bool) -> None:
    """Five products where far more are wanted: a value from below, about as far from the truth as it says."""
    values = torch.linspace(0, 1, 200, dtype=torch.float64) ** 4
    left = 5

    def product(v: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise OutOfTime("it took too long")
        return values * v

    a = SymmetricOperator(product, values)
    found = largest_eigenpair(a, error=1e-9, vectors=vectors)
    assert found.num_matvecs == 5
    lacking = 1 - found.values[0].item()
    assert 0 < lacking < 3 * found.error and found.upper > 1
    if vectors:
        v = found.vectors[:, 0]
        assert (values * v - found.values[0] * v).norm().item() == pytest.approx(found.residuals[0].item(), rel=1e-6)
    left = 2
    with pytest.raises(OutOfTime):
        largest_eigenpair(a, error=1e-9)


def test_the_global_generator_is_not_touched_and_units_do_not_matter() -> None:
    values = SPECTRA["outliers over a bulk"]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    found = largest_eigenpair(diagonal(values))
    assert torch.equal(before, torch.random.get_rng_state())
    scaled = largest_eigenpair(diagonal(2.0**-300 * values))
    assert scaled.values.item() == 2.0**-300 * found.values.item()
    assert scaled.upper == 2.0**-300 * found.upper


def test_products_and_lengths_of_long_vectors_are_right_to_rounding() -> None:
    v = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    truth = torch.dot(v.double(), v.double()).item()
    assert dot(v, v) == pytest.approx(truth, rel=1e-6)
    assert length(v) == pytest.approx(truth**0.5, rel=1e-6)
    assert length(1e-30 * v) == pytest.approx(1e-30 * truth**0.5, rel=1e-5)
    assert length(torch.zeros(3)) == 0
    a = SymmetricOperator(lambda v: v, torch.zeros(2_000_000))
    assert torch.equal(gaussian(a, 3), gaussian(a, 3)) and abs(gaussian(a, 3).mean().item()) < 1e-2


def test_arguments_without_sense() -> None:
    a = diagonal(line(0, 1, 10))
    with pytest.raises(InvalidValue, match="error"):
        largest_eigenpair(a, error=0)
    with pytest.raises(InvalidValue, match="shape"):
        largest_eigenpair(a, torch.ones(3, dtype=DTYPE))


class Drafted:
    """A matrix of known eigenvalues with drafts that are off by these parts of its norm; counts products of either."""

    def __init__(self, values: Tensor, *errors: float) -> None:
        exact, _ = rotated(values)
        noise = torch.randn((len(values), len(values)), generator=torch.Generator().manual_seed(7), dtype=values.dtype)
        noise = (noise + noise.T) / torch.linalg.matrix_norm(noise + noise.T, 2) * values.abs().max()
        self.counts = [0] * (1 + len(errors))

        def counted(i: int, off: float) -> SymmetricOperator:
            def product(v: Tensor) -> Tensor:
                self.counts[i] += 1
                return exact @ v + off * (noise @ v)

            return SymmetricOperator(product, values, cost=1.0)

        drafts = tuple(counted(i, off) for i, off in enumerate(errors, start=1))
        self.operator = replace(counted(0, 0.0), cost=3.0, drafts=drafts)


OUTLIERS = torch.cat([line(-0.2, 0.3, 300), torch.tensor([0.7, 1.0], dtype=DTYPE)])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_draft_finds_the_vector_and_two_products_of_the_operator_the_value(seed: int) -> None:
    case = Drafted(OUTLIERS, 2e-3)
    found = largest_eigenpair(case.operator, seed=seed)
    v = found.vectors[:, 0]
    image = case.operator @ v
    assert found.values.item() == pytest.approx(1, rel=1e-3)
    assert found.values.item() == pytest.approx((v @ image).item(), rel=1e-12)
    assert found.residuals.item() == pytest.approx((image - found.values * v).norm().item(), rel=1e-9)
    assert found.lower.item() <= 1 <= found.upper
    assert case.counts[0] == 3 and found.num_matvecs == sum(case.counts) - 1
    assert found.num_gradients == 3 * 2 + case.counts[1]
    assert found.num_matvecs <= largest_eigenpair(replace(case.operator, drafts=()), seed=seed).num_matvecs + 4


def test_a_draft_that_disagrees_is_left_out_and_a_better_one_is_taken() -> None:
    alone = largest_eigenpair(Drafted(OUTLIERS).operator)
    wrong = Drafted(OUTLIERS, 3.0)
    found = largest_eigenpair(wrong.operator)
    assert wrong.counts[1] == 1 and found.num_matvecs == alone.num_matvecs + 1
    assert found.values.equal(alone.values) and found.upper == alone.upper and found.floor == alone.floor
    better = Drafted(OUTLIERS, 5e-2, 1e-3)
    largest_eigenpair(better.operator)
    assert better.counts[:2] == [2, 1] and better.counts[2] > 5


def test_what_a_draft_cannot_tell_apart_is_left_to_the_operator() -> None:
    values = torch.cat([line(-0.2, 0.3, 300), torch.tensor([0.95, 1.0], dtype=DTYPE)])
    left, right = 0, 0
    for seed in SEEDS:
        case = Drafted(values, 1e-2)
        found = largest_eigenpair(case.operator, seed=seed)
        left += case.counts[0] > 2
        right += found.values.item() >= 0.999
        assert found.lower.item() <= 1 <= found.upper
        assert found.num_gradients == 3 * case.counts[0] + case.counts[1]
    assert left >= 15 and right >= len(SEEDS) - 1


@pytest.mark.parametrize("left", range(4, 13))
def test_bounds_hold_whenever_time_runs_out_with_a_draft(left: int) -> None:
    case = Drafted(OUTLIERS, 2e-3)

    def limited(a: SymmetricOperator) -> SymmetricOperator:
        def product(v: Tensor) -> Tensor:
            if sum(case.counts) == left:
                raise OutOfTime("it took too long")
            return a @ v

        return replace(a, matvec=product, drafts=tuple(map(limited, a.drafts)))

    try:
        found = largest_eigenpair(limited(case.operator))
    except OutOfTime:
        assert left < 6
        return
    assert found.lower.item() <= 1 <= found.upper
    assert 1 - found.values.item() <= found.error + found.floor


def test_a_value_alone_has_no_vector_with_drafts_either() -> None:
    case = Drafted(OUTLIERS, 2e-3)
    found = largest_eigenpair(case.operator, vectors=False)
    assert found.vectors.shape == (len(OUTLIERS), 0)
    assert found.values.item() == pytest.approx(1, rel=1e-3) and case.counts[0] == 2
