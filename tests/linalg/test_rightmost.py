"""The rightmost eigenvalue of matrices that are not symmetric, against dense decompositions."""

from typing import Any

import numpy as np
import pytest
import torch
from problems import DTYPE, generator, normal
from torch import Tensor

from sharpscope.errors import InvalidValue, NotConverged, NotFinite
from sharpscope.linalg import Rightmost, rightmost
from sharpscope.linalg.operators import Linear


def gaussian(n: int, seed: int = 0) -> Tensor:
    """Eigenvalues fill the unit disk; the matrix is not normal, but not far from it."""
    return normal(n, n, seed=seed) / n**0.5


def with_outlier(value: float, n: int = 150) -> Tensor:
    return gaussian(n) + value * torch.ones(n, n, dtype=DTYPE) / n


def rotations(real: Tensor, imaginary: Tensor, seed: int = 0) -> Tensor:
    """A normal matrix with these eigenvalues, and their conjugates, in a random orthonormal basis."""
    blocks = [torch.tensor([[a, -b], [b, a]], dtype=DTYPE) for a, b in zip(real, imaginary, strict=True)]
    q = torch.linalg.qr(normal(2 * len(real), 2 * len(real), seed=seed)).Q
    return q @ torch.block_diag(*blocks) @ q.T


def gradient_and_curl(n: int = 120) -> Tensor:
    """A Hessian of a few outliers beside an antisymmetric part, as of two players."""
    q = torch.linalg.qr(normal(n, n, seed=1)).Q
    values = torch.cat([torch.tensor([10.0, 9.5, 7.0]), torch.linspace(-0.5, 0.5, n - 3)]).to(DTYPE)
    curl = 0.1 * normal(n, n, seed=2)
    return (q * values) @ q.T + curl - curl.T


def coupled_downwards(n: int = 60) -> Tensor:
    """Far from normal: eigenvalues between -1 and 1 on the diagonal, entries of size one beside it."""
    return torch.diag(torch.linspace(-1, 1, n, dtype=DTYPE)) + torch.triu(0.5 * normal(n, n, seed=3), 1)


MATRICES = {
    "one by one": gaussian(1),
    "two by two": gaussian(2),
    "smaller than the steps": gaussian(30),
    "disk": gaussian(150),
    "disk to the left": gaussian(150) - 3 * torch.eye(150, dtype=DTYPE),
    "outlier": with_outlier(2.0),
    "large on the left": 0.1 * gaussian(150) + torch.diag(torch.tensor([-3.0, -2.0, 0.8] + 147 * [0.0])).to(DTYPE),
    "complex pair": rotations(torch.linspace(-1, 1, 70).exp(), torch.linspace(2, 3, 70)),
    "gradient and curl": gradient_and_curl(),
    "the same to the left": -gradient_and_curl(),
    "three times the identity": 3 * torch.eye(50, dtype=DTYPE),
}


def products(matrix: Tensor, noise: float = 0.0) -> tuple[list[int], Linear]:
    """Products with a matrix, with a relative error of this size, and their count."""
    count, random = [0], generator(9)

    def product(v: Tensor) -> Tensor:
        count[0] += 1
        image = matrix @ v
        if noise:
            image += noise * image.norm() / len(v) ** 0.5 * torch.randn(len(v), generator=random, dtype=DTYPE).to(v)
        return image

    return count, product


def true_rightmost(matrix: Tensor) -> complex:
    values = np.linalg.eigvals(matrix.double().numpy())
    found = values[np.lexsort((-values.imag, -values.real.round(9)))[0]]
    return complex(found)


def true_residual(matrix: Tensor, found: Rightmost) -> float:
    x = found.vector.to(torch.complex128)
    assert x.norm().item() == pytest.approx(1, rel=1e-5)  # rounding of single precision
    return (matrix.to(x) @ x - found.value * x).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MATRICES)
def test_agrees_with_the_dense_decomposition(name: str, dtype: torch.dtype) -> None:
    matrix = MATRICES[name].to(dtype)
    count, product = products(matrix)
    found = rightmost(product, torch.zeros(len(matrix), dtype=dtype))
    modulus = np.abs(np.linalg.eigvals(matrix.double().numpy())).max()
    # Eigenvectors of these matrices have condition numbers of at most some ten.
    assert abs(found.value - true_rightmost(matrix)) <= 3e-3 * modulus
    norm = torch.linalg.matrix_norm(matrix.double(), 2).item()
    rounding = 1e3 * torch.finfo(dtype).eps * norm
    assert found.residual == pytest.approx(true_residual(matrix, found), abs=rounding)
    assert found.residual <= 1e-3 * modulus + rounding
    assert found.num_matvecs == count[0]
    assert found.value.imag >= 0


@pytest.mark.parametrize("name", MATRICES)
def test_a_tolerance_is_met(name: str) -> None:
    """Through many restarts, where the eigenvalues fill a disk."""
    matrix = MATRICES[name]
    found = rightmost(products(matrix)[1], matrix[0], rtol=1e-9, steps=40, restarts=100)
    true = true_rightmost(matrix)
    modulus = np.abs(np.linalg.eigvals(matrix.numpy())).max()
    assert abs(found.value - true) <= 1e-7 * modulus
    assert true_residual(matrix, found) <= 1e-9 * modulus


@pytest.mark.parametrize("matrix", [coupled_downwards(), torch.diag(torch.ones(49, dtype=DTYPE), 1)])
def test_far_from_normal_the_residual_is_a_backward_error(matrix: Tensor) -> None:
    """A perturbation of that norm has the eigenvalue: the least singular value of ``J - μ`` is no larger."""
    found = rightmost(products(matrix)[1], matrix[0])
    residual = true_residual(matrix, found)
    assert found.residual == pytest.approx(residual, rel=1e-6, abs=1e-12)
    eye = torch.eye(len(matrix), dtype=torch.complex128)
    assert torch.linalg.svdvals(matrix.to(eye) - found.value * eye)[-1] <= residual + 1e-12
    assert found.residual <= 1e-3 * torch.linalg.matrix_norm(matrix, 2)


@pytest.mark.parametrize("noise", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("name", ["outlier", "complex pair", "gradient and curl", "disk"])
def test_products_with_errors(name: str, noise: float) -> None:
    matrix = MATRICES[name].float()
    norm = torch.linalg.matrix_norm(matrix, 2).item()
    found = rightmost(products(matrix, noise)[1], matrix[0])
    assert abs(found.value - true_rightmost(matrix)) <= (3e-3 + 3 * noise) * norm
    # The basis holds up to 60 such errors, and the measured residual has one more.
    assert abs(found.residual - true_residual(matrix, found)) <= 8 * noise * norm + 1e-6
    assert found.residual <= (1e-3 + 8 * noise) * norm


@pytest.mark.parametrize("scale", [1e-34, 1e-24, 1e-10, 1e10, 1e20, 1e35])
def test_units_do_not_matter(scale: float) -> None:
    matrix = with_outlier(2.0).float()
    one = rightmost(products(matrix)[1], matrix[0])
    found = rightmost(products(matrix * scale)[1], matrix[0])
    assert found.num_matvecs == one.num_matvecs
    assert found.value / scale == pytest.approx(one.value, rel=1e-5)
    assert found.residual / scale == pytest.approx(one.residual, rel=1e-2)  # to rounding of λ1


@pytest.mark.parametrize("n", [1, 20, 100])
def test_zero(n: int) -> None:
    found = rightmost(lambda v: 0 * v, torch.zeros(n))
    assert found.value == 0 and found.residual == 0


def test_a_vector_that_is_complex_is_one_of_a_pair() -> None:
    turn = torch.tensor([[1.0, -2.0], [2.0, 1.0]])
    found = rightmost(lambda v: turn @ v, torch.zeros(2))
    assert found.vector.is_complex() and found.value == pytest.approx(1 + 2j, rel=1e-6)
    assert (turn.to(found.vector) @ found.vector).numpy() == pytest.approx(
        (found.value * found.vector).numpy(), rel=1e-5
    )


def test_what_does_not_converge() -> None:
    matrix = gaussian(150)
    with pytest.raises(NotConverged, match=r"the residual of .* after 12 products; raise steps, restarts or rtol"):
        rightmost(products(matrix)[1], matrix[0], rtol=1e-9, steps=12, restarts=0)


def test_products_that_are_not_finite() -> None:
    with pytest.raises(NotFinite, match="a product with the operator is not finite"):
        rightmost(lambda v: v / 0, torch.zeros(5))


@pytest.mark.parametrize("bad", [{"like": torch.zeros(2, 2)}, {"steps": 3}, {"restarts": -1}, {"like": torch.zeros(0)}])
def test_bad_input(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="has to be a vector"):
        rightmost(lambda v: v, **{"like": torch.zeros(5), **bad})


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    rightmost(lambda v: v.flip(0), torch.zeros(9))
    assert torch.get_rng_state().equal(state)
