"""Operators against dense matrices of the same name."""

import sys
from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from problems import DTYPE, normal, relative, symmetric
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

import sharpscope as ss
from sharpscope import hessian
from sharpscope.autodiff import gauss_newton
from sharpscope.linalg import SymmetricOperator, lanczos, preconditioned, projected, restricted
from sharpscope.linalg.operators import scaled

EXACT = 1e-12  # rounding of products with matrices of 50 rows
MATRIX, OPERATOR = symmetric(torch.linspace(-1, 3, 50, dtype=DTYPE))
U = normal(50, seed=3) / normal(50, seed=3).norm()
P = normal(50, seed=4).square() + 0.1
SOME = torch.tensor([4, 0, 31, 7])

COMPOSED: dict[str, tuple[Callable[[], SymmetricOperator], Callable[[], Tensor]]] = {
    "preconditioned": (
        lambda: preconditioned(OPERATOR, P),
        lambda: torch.diag(P**-0.5) @ MATRIX @ torch.diag(P**-0.5),
    ),
    "restricted": (lambda: restricted(OPERATOR, SOME), lambda: MATRIX[SOME][:, SOME]),
    "projected": (
        lambda: projected(OPERATOR, lambda v: v - (U @ v) * U),
        lambda: (torch.eye(50, dtype=DTYPE) - torch.outer(U, U)) @ MATRIX @ (torch.eye(50) - torch.outer(U, U)),
    ),
    "scaled": (lambda: scaled(OPERATOR, -2.5), lambda: -2.5 * MATRIX),
    "restricted and preconditioned": (
        lambda: restricted(preconditioned(OPERATOR, P), SOME),
        lambda: MATRIX[SOME][:, SOME] / (P[SOME][:, None] * P[SOME]).sqrt(),
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_operators_are_the_matrices_they_say(name: str) -> None:
    build, matrix = COMPOSED[name]
    dense = build().dense()
    assert relative(dense, matrix()) < EXACT
    assert relative(dense.T, dense) < EXACT
    assert build().size == len(dense)


@pytest.mark.parametrize("norm", ["LayerNorm", "BatchNorm2d"])
def test_curvature_operators_are_symmetric_matrices(norm: str) -> None:
    f = problems.objective(norm, "cross-entropy")
    w = f.weights()
    at = f.at(w)
    curvature, outer = hessian(at).dense(), gauss_newton(at).dense()
    bound = 1e-10  # rounding, with the conditioning of normalization over few examples
    assert relative(curvature, torch.func.jacrev(torch.func.grad(problems.reference(norm, "cross-entropy")))(w)) < bound
    assert relative(curvature.T, curvature) < bound and relative(outer.T, outer) < bound
    # Cross-entropy is convex in the outputs: Jᵀ (convex) J has no negative eigenvalue but by rounding.
    assert torch.linalg.eigvalsh(outer).min() > -1e-12


@pytest.mark.parametrize("make", [hessian, gauss_newton])
def test_an_objective_an_expansion_and_a_point_give_one_operator(make: Callable[..., SymmetricOperator]) -> None:
    f = problems.objective("LayerNorm")
    w, v = f.weights(), normal(f.size, seed=1)
    assert (make(f) @ v).equal(make(f, w) @ v)
    assert (make(f) @ v).equal(make(f.at(w)) @ v)


def test_points_other_than_the_models_weights() -> None:
    f = problems.objective("LayerNorm")
    w, v = f.weights() + 0.1, normal(f.size, seed=1)
    assert (hessian(f, w) @ v).equal(f.hvp(w, v))
    assert (gauss_newton(f, w) @ v).equal(f.gauss_newton(w, v))


def test_vectors_and_columns() -> None:
    columns = normal(50, 3, seed=1)
    assert relative(OPERATOR @ columns, MATRIX @ columns) < EXACT
    assert relative(OPERATOR @ columns[:, 0], MATRIX @ columns[:, 0]) < EXACT


@pytest.mark.parametrize("shape", [(49,), (3, 50), (50, 2, 2), ()])
def test_other_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"an operator of size 50 cannot act on a tensor of shape \("):
        OPERATOR @ torch.zeros(shape, dtype=DTYPE)


@pytest.mark.parametrize("p", [-P, P * 0, P[:-1], P * torch.nan])
def test_preconditioners_are_positive_and_of_the_right_size(p: Tensor) -> None:
    with pytest.raises(ValueError, match="a preconditioner for size 50 has 50 positive entries"):
        preconditioned(OPERATOR, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy_takes_an_operator(dtype: torch.dtype) -> None:
    matrix = MATRIX.to(dtype)
    linear = SymmetricOperator(lambda v: matrix @ v, matrix[0]).to_scipy()
    assert linear.shape == (50, 50) and linear.dtype == matrix.numpy().dtype
    bound = 100 * torch.finfo(dtype).eps
    for x in (normal(50, seed=1), normal(50, 1, seed=1), normal(50, 3, seed=1)):
        for found in (linear @ x.numpy(), linear.T @ x.numpy()):
            assert found.shape == tuple(x.shape) and relative(torch.as_tensor(found), matrix @ x.to(dtype)) < bound
    values = eigsh(linear, k=3, which="LA", return_eigenvectors=False)
    true = torch.linalg.eigvalsh(matrix)[-3:]
    assert sorted(values.tolist()) == pytest.approx(true.tolist(), rel=bound)


def test_arpack_and_lanczos_find_the_same_in_a_network() -> None:
    a = hessian(problems.objective("LayerNorm", "cross-entropy"))
    values = eigsh(a.to_scipy(), k=2, which="LA", return_eigenvectors=False)
    assert sorted(values.tolist()) == pytest.approx(lanczos(a, 2, rtol=1e-8).values.flip(0).tolist(), rel=1e-10)


def test_a_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"to_scipy\(\) needs scipy, which is not installed"):
        OPERATOR.to_scipy()


@pytest.mark.parametrize(
    "solve",
    [
        ss.linalg.lanczos,
        ss.linalg.both_ends,
        ss.linalg.smallest_eigenpairs,
        ss.linalg.trace,
        ss.linalg.diagonal,
        ss.linalg.density,
        lambda a: ss.linalg.warm_started(a, None),
    ],
)
def test_an_objective_in_the_place_of_its_hessian_is_a_sentence(solve: Callable[[Any], object]) -> None:
    f = ss.Objective(nn.Linear(2, 1), nn.functional.mse_loss, [(torch.ones(4, 2), torch.zeros(4, 1))])
    with pytest.raises(ss.errors.InvalidType, match=r"this Objective is no SymmetricOperator; .* it is hessian\(f\)"):
        solve(f)
