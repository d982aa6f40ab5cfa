"""A basis of everything that is not negligible, against the matrix."""

import pytest
import torch
from problems import DTYPE, symmetric
from torch import Tensor

from sharpscope.linalg import SymmetricOperator
from sharpscope.linalg.eigenbasis import eigenbasis


def of_low_rank(n: int, *values: float) -> tuple[Tensor, SymmetricOperator]:
    return symmetric(torch.cat([torch.tensor(values, dtype=DTYPE), torch.zeros(n - len(values), dtype=DTYPE)]))


@pytest.mark.parametrize("n", [40, 400])
def test_what_it_spans_is_all_there_is(n: int) -> None:
    matrix, a = of_low_rank(n, 5.0, 3.0, 2.0, -1.0)
    found = eigenbasis(a, 1e-9, 40)
    assert (found.vectors * found.values) @ found.vectors.T == pytest.approx(matrix, abs=1e-12)
    assert found.rest <= 1e-9


def test_a_space_that_is_exhausted_ends() -> None:
    """What is left is rounding, and a basis of it would be noise."""
    _, a = of_low_rank(400, 5.0, 3.0, 2.0, -1.0)
    found = eigenbasis(a, 0.0, 40)
    assert found.values.tolist() == pytest.approx([5.0, 3.0, 2.0, -1.0], abs=1e-12)


def test_what_is_left_out_is_as_small_as_it_says() -> None:
    matrix, a = symmetric(100 * 0.8 ** torch.arange(400, dtype=DTYPE))
    found = eigenbasis(a, 1e-3, 100)
    rest = matrix - (found.vectors * found.values) @ found.vectors.T
    assert found.rest <= 1e-3
    assert torch.linalg.matrix_norm(rest, 2) <= 5 * found.rest  # what lies beyond decays as 1, .8, .64, ...


@pytest.mark.parametrize("n", [40, 400])
def test_zero(n: int) -> None:
    found = eigenbasis(SymmetricOperator(lambda v: 0 * v, torch.zeros(n)), 1e-3, 20)
    assert not found.values.any() and found.rest == 0
    assert found.vectors.isfinite().all()
