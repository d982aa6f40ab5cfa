"""The answers for c A are c times those for A, from the smallest to the largest numbers of single precision."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from problems import symmetric
from torch import Tensor

from sharpscope.errors import NotConverged
from sharpscope.linalg import (
    Eigenpairs,
    SymmetricOperator,
    block_eigenpairs,
    both_ends,
    density,
    diagonal,
    group_fractions,
    lanczos,
    preconditioned,
    rightmost,
    scaled,
    shifted,
    smallest_eigenpairs,
    trace,
    warm_started,
)
from sharpscope.linalg.eigenbasis import eigenbasis
from sharpscope.linalg.units import Unit, power_of_two

SIZE = 320
SCALES = [1e-34, 1e-28, 1e-22, 1e-15, 1e15, 1e19, 1e25, 1e31, 1e34]
VALUES = torch.cat([torch.tensor([40.0, 35.0, 30.0, -20.0]), torch.linspace(-1, 2, SIZE - 4)])
MATRIX = symmetric(VALUES.double())[0]

Solver = Callable[[SymmetricOperator, float], Sequence[Tensor | float]]


def operator(scale: float, together: bool = False) -> SymmetricOperator:
    """The same matrix times a power of two near `scale`, whose entries round as those of the matrix do."""
    matrix = (MATRIX * power_of_two(scale, torch.float32)).float()
    return SymmetricOperator(lambda v: matrix @ v, matrix[0], (lambda V: matrix @ V) if together else None)


def evidence(found: Eigenpairs) -> Sequence[Tensor | float]:
    return found.values, found.residuals, found.lower, found.upper, found.floor


def along_a_path(a: SymmetricOperator, scale: float) -> Sequence[Tensor | float]:
    """A few calls on an operator that changes, so that everything remembered is used."""
    found: Eigenpairs | None = None
    for t in range(6):
        shift = torch.linspace(0, 0.1 * t * scale, SIZE)
        found = warm_started(shifted(a, shift), found, 2, above=25 * scale, seed=t, verify=4)
    assert found is not None
    return evidence(found)


def density_of(a: SymmetricOperator, scale: float) -> Sequence[Tensor | float]:
    """Everything in units of the operator: densities times its scale squared, fractions times its scale."""
    found = density(a, steps=20, probes=2)
    there = density(a, steps=20, probes=2, width=0.5 * scale, points=scale * torch.linspace(-25, 45, 9))
    parts: list[Tensor | float] = []
    for x in (found, there):
        densities = (x.density, *x.density_band)
        parts += [x.points, x.width, *(t.double() * scale * scale for t in densities), x.cumulative * scale]
        parts += [t * scale for t in x.cumulative_band]
    return parts


SOLVERS: dict[str, Solver] = {
    "lanczos": lambda a, scale: evidence(lanczos(a, 3, gap=1e-2)),
    "with restarts": lambda a, scale: evidence(lanczos(a, 2, basis=10, rtol=1e-5)),
    "smallest": lambda a, scale: evidence(smallest_eigenpairs(a))[:3],
    "both ends": lambda a, scale: [*evidence(both_ends(a, 2, 2)[0]), both_ends(a, 2, 2)[1]],
    "blocks": lambda a, scale: evidence(block_eigenpairs(a, {"block": slice(0, 50)})["block"]),
    "warm started": along_a_path,
    "trace": lambda a, scale: [trace(a).value, *trace(a).interval],
    "trace to a tolerance": lambda a, scale: [trace(a, rtol=0, atol=40 * scale).value],
    "exact trace": lambda a, scale: [trace(a, rtol=1e-9).value],
    "diagonal": lambda a, scale: [diagonal(a).value, diagonal(a).standard_error],
    "density": density_of,
    "eigenbasis": lambda a, scale: [eigenbasis(a, 0.1 * scale, 60).values, eigenbasis(a, 0.1 * scale, 60).rest],
    "rightmost": lambda a, scale: [rightmost(a.matvec, a.like).value.real, rightmost(a.matvec, a.like).residual],
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SOLVERS)
def test_units_do_not_matter(name: str, scale: float) -> None:
    """Bit for bit, but for products that fall among the numbers below 1.2e-38, which have fewer digits."""
    power = power_of_two(scale, torch.float32)
    one = SOLVERS[name](operator(1.0), 1.0)
    found = SOLVERS[name](operator(scale), power)
    for ours, theirs in zip(found, one, strict=True):
        ours, theirs = torch.as_tensor(ours).double() / power, torch.as_tensor(theirs).double()
        size = theirs.abs().max().item()
        # Where entries of products fall below 1.2e-38 (of the bulk, at 1e-34), they have fewer digits.
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6 * (40 if scale < 1e-33 else size)), (ours, theirs)


@pytest.mark.parametrize("scale", SCALES)
def test_columns_at_once(scale: float) -> None:
    power = power_of_two(scale, torch.float32)
    one, found = (lanczos(operator(c, together=True), 3) for c in (1.0, scale))
    assert (found.values / power).tolist() == pytest.approx(one.values.tolist(), rel=1e-6)
    assert found.num_matvecs == one.num_matvecs


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_a_bound_that_holds_where_squares_are_no_numbers(scale: float) -> None:
    """One large eigenvalue over smaller ones: a first Ritz value is far below it."""
    values = torch.linspace(0, 1, SIZE) * scale
    found = lanczos(SymmetricOperator(lambda v: values * v, values))
    assert found.lower[0] <= values.max() <= found.upper <= 1.01 * scale
    assert 0 < found.residuals[0] <= 1e-4 * scale


@pytest.mark.parametrize("power", [-300, -200, 200, 300])
def test_double_precision_has_the_same_law(power: int) -> None:
    scale = math.ldexp(1.0, int(power / math.log10(2)))
    a = SymmetricOperator(lambda v: MATRIX @ v, MATRIX[0])
    one, found = lanczos(a, 2), lanczos(scaled(a, scale), 2)
    assert (found.values / scale).tolist() == pytest.approx(one.values.tolist(), rel=1e-12)
    assert found.upper / scale == pytest.approx(one.upper, rel=1e-12)


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e-7, 1e7, 1e12, 1e30])
def test_an_operator_that_changes_its_size_in_one_call(factor: float) -> None:
    count = [0]

    def product(v: Tensor) -> Tensor:
        count[0] += 1
        return (MATRIX.float() * factor) @ v

    a = SymmetricOperator(product, torch.zeros(SIZE))
    found = warm_started(a, warm_started(operator(1.0)), seed=1)
    assert found.values[0].item() / factor == pytest.approx(40, rel=1e-3)
    assert found.residuals[0].item() <= 3e-3 * 40 * factor
    assert found.upper / factor >= 40 * (1 - 1e-6)
    assert found.num_matvecs == count[0]
    for t in range(2, 30):
        found = warm_started(a, found, seed=t)
        assert found.values[0].item() / factor == pytest.approx(40, rel=1e-3)
    assert found.num_matvecs <= 4  # and in the end the change is forgotten


def test_growth_step_by_step() -> None:
    """Through seventy powers of ten, as in a run that diverges, from one memory to the next."""
    found: Eigenpairs | None = None
    for t in range(-34, 35):
        c = 10.0**t
        found = warm_started(scaled(operator(1.0), c), found, seed=t + 34)
        assert found.values[0].item() / c == pytest.approx(40, rel=3e-3)
        assert 0 < found.residuals[0].item() <= 3e-3 * 40 * c * 1.01


def test_a_memory_of_scaled_pairs_serves_the_scaled_operator() -> None:
    found = warm_started(operator(1.0)).scaled(3.0)
    a = operator(1.0)
    again = warm_started(SymmetricOperator(lambda v: 3 * a.matvec(v), a.like), found, seed=1)
    assert again.values[0].item() == pytest.approx(120, rel=1e-4)
    assert again.num_matvecs <= 4  # nothing seemed to move


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e30])
def test_errors_speak_of_the_operator(scale: float) -> None:
    with pytest.raises(NotConverged) as raised:
        lanczos(operator(scale), rtol=1e-9, max_matvecs=5)
    assert float(str(raised.value).split("times ")[1].split()[0]) == pytest.approx(40 * scale, rel=0.9)


@pytest.mark.parametrize("scale", [1e-34, 1e34])
def test_a_preconditioner_near_the_operators_size(scale: float) -> None:
    """Neither is near one, and their ratio is."""
    a = operator(scale)
    found = lanczos(preconditioned(a, torch.full((SIZE,), power_of_two(scale, torch.float32))))
    assert found.values[0].item() == pytest.approx(40, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fractions_of_a_vector_of_any_length(scale: float, dtype: torch.dtype) -> None:
    scale = scale if dtype == torch.float32 else math.copysign(abs(scale) ** 9, scale)
    v = torch.tensor([3.0, 0.0, 4.0], dtype=dtype) * scale
    found = group_fractions(v, {"weight": slice(2), "bias": slice(2, 3)})
    assert found == pytest.approx({"weight": 0.36, "bias": 0.64}, rel=1e-6)


def test_zero_has_no_unit() -> None:
    unit = Unit()
    assert not unit.of(torch.zeros(3)).any()
    assert unit.of(torch.tensor([0.0, 3.0])).tolist() == [0.0, 1.5] and unit.size == 2
    assert unit.of(torch.tensor([64.0])).item() == 32  # the first product decides


@pytest.mark.parametrize("size", [0.7, 1.0, 5.0, 1e-37, 3e38])
def test_a_unit_and_its_inverse_are_ordinary_numbers(size: float) -> None:
    power = power_of_two(size, torch.float32)
    assert math.frexp(power)[0] == 0.5
    ordinary = torch.tensor([power, 1 / power])
    assert ordinary.isfinite().all() and (ordinary >= torch.finfo(torch.float32).tiny).all()
    assert power <= size or size < 1e-36


@pytest.mark.parametrize("solve", [lanczos, trace, density, diagonal])
def test_solvers_leave_autocast(solve: Any) -> None:
    """Inner products in bfloat16 would be off by some 1e-3."""
    m = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    a = SymmetricOperator(lambda v: m @ (m.T @ v.float()), m[0])
    expected = solve(a)
    with torch.autocast("cpu", torch.bfloat16):
        found = solve(a)
        assert torch.is_autocast_enabled("cpu")
    values = [next(iter(vars(x).values())) for x in (found, expected)]
    assert torch.equal(*values)
