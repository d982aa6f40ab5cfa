"""Tracking operators that move: slowly, back and forth, and so that their eigenvalues cross."""

import gc
import math

import problems
import pytest
import torch
from problems import DTYPE, normal, symmetric
from torch import Tensor

from sharpscope import Eigenpairs, NotFinite, SymmetricOperator, hessian, lanczos, track
from sharpscope.eigen import Memory, Pool

Q = torch.linalg.qr(normal(300, 300, seed=5)).Q
BULK = torch.linspace(-0.1, 0.6, 300, dtype=DTYPE)


def moving(values: Tensor, angle: float) -> tuple[Tensor, SymmetricOperator]:
    """A matrix of the given spectrum whose eigenvectors turn by `angle` from a fixed basis."""
    turn = torch.linalg.matrix_exp(angle * (GENERATOR - GENERATOR.T))
    q = Q @ turn
    matrix = (q * values) @ q.T
    return matrix, SymmetricOperator(lambda v: matrix @ v, torch.zeros_like(values))


GENERATOR = normal(300, 300, seed=6) / 300**0.5


def crossing(t: int) -> Tensor:
    """λ rises from the middle of the outliers through the top one, while another falls."""
    values = BULK.clone()
    values[-1], values[-2], values[-3] = 1.0, 0.7 + 0.004 * t, 1.15 - 0.003 * t
    values[-4] = 0.99 + 0.005 * math.sin(t / 5)
    return values


def from_the_bulk(t: int) -> Tensor:
    """One eigenvalue leaves the bulk and passes the others, with a solve from a random start on its way."""
    values = BULK.clone()
    values[-1], values[-2], values[-3] = 1.0, 0.97, 0.93
    values[100] = 0.3 + 0.0072 * max(0, t - 20)
    return values


def alternating(t: int) -> Tensor:
    """Odd and even calls have different top eigenvectors."""
    values = BULK.clone()
    values[-1], values[-2], values[-3] = (1.0, 0.9, 0.8) if t % 2 else (0.93, 1.03, 0.8)
    return values


PATHS = {"crossing": crossing, "from the bulk": from_the_bulk, "alternating": alternating}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", PATHS)
def test_never_locked_on_a_wrong_eigenvalue(name: str, k: int) -> None:
    found: Eigenpairs | None = None
    used, worst = 0, 0.0
    for t in range(120):
        matrix, a = moving(PATHS[name](t), 2e-4 * t)
        found = track(a, found, k, seed=t)
        true = torch.linalg.eigvalsh(matrix).flip(0)[:k]
        assert (found.lower <= true).all()
        worst = max(worst, ((true - found.values) / true[0]).max().item())
        if t:
            used += found.num_matvecs
    assert worst <= 1e-3
    assert used / 119 <= 5 * k


def test_what_comes_back_is_what_it_says() -> None:
    found: Eigenpairs | None = None
    for t in range(12):
        matrix, a = moving(crossing(t), 1e-3 * t)
        found = track(a, found, 3, seed=t)
        image = matrix @ found.vectors
        assert found.vectors.T @ found.vectors == pytest.approx(torch.eye(3), abs=1e-12)
        assert (found.vectors * image).sum(0).tolist() == pytest.approx(found.values.tolist(), abs=1e-12)
        assert (image - found.vectors * found.values).norm(dim=0).tolist() == pytest.approx(
            found.residuals.tolist(), abs=1e-12
        )
        assert (found.residuals <= 3e-3 * found.values[0]).all()


def test_a_solve_from_a_random_start_now_and_then() -> None:
    found: Eigenpairs | None = None
    bounded = []
    for t in range(13):
        found = track(symmetric(crossing(0))[1], found, verify=5, seed=t)
        bounded.append(math.isfinite(found.upper))
    assert bounded == [t % 5 == 0 for t in range(13)]


def test_a_memory_that_foretells_badly_is_not_relied_on() -> None:
    found = track(symmetric(crossing(0))[1])
    for seed in range(1, 6):  # operators that have nothing to do with each other
        found = track(symmetric(crossing(0), seed)[1], found, seed=seed)
        assert math.isfinite(found.upper)
        assert found.values.item() == pytest.approx(1.15, rel=1e-3)


def test_a_memory_of_wrong_eigenvectors_is_found_out() -> None:
    """Eigenvectors of smaller eigenvalues have no residual: the random directions and the solves tell."""
    matrix, a = symmetric(crossing(0))
    vectors = torch.linalg.eigh(matrix).eigenvectors.flip(1)
    pool = Pool(vectors[:, 5:7], torch.tensor([0.6, 0.6], dtype=DTYPE), torch.zeros(2, dtype=DTYPE))
    found: Eigenpairs | Memory = Memory(pool, pool, lag=1)
    for t in range(50):
        found = track(a, found, seed=t)
    assert isinstance(found, Eigenpairs)
    assert found.values[0].item() == pytest.approx(1.15, rel=1e-4)


def test_the_block_follows_the_number_of_eigenvalues_above() -> None:
    found: Eigenpairs | None = None
    for t in [*range(0, 60, 3), *range(60, 0, -3)]:
        values = BULK.clone()
        values[-8:] = 0.7 + 0.01 * t * torch.linspace(0, 1, 8, dtype=DTYPE)
        matrix, a = moving(values, 1e-4 * t)
        found = track(a, found, 1, above=1.0, seed=t)
        true = torch.linalg.eigvalsh(matrix).flip(0)
        count = max(1, int((found.values >= 1.0).sum()))
        # Values within the tolerance of the limit may fall on either side.
        assert int((true > 1.0 + 1e-4).sum()) <= count <= max(1, int((true > 1).sum()))
        assert len(found.values) == max(1, int((found.values >= 1.0).sum()))


def test_a_memory_survives_a_checkpoint() -> None:
    found = track(symmetric(crossing(0))[1])
    found = track(symmetric(crossing(1))[1], found, seed=1)
    assert found.memory is not None
    stored = Memory.of({name: t.clone() for name, t in found.memory.tensors().items()})
    a = symmetric(crossing(2))[1]
    one, other = track(a, found, seed=2), track(a, stored, seed=2)
    assert one.values.equal(other.values) and one.vectors.equal(other.vectors)


def test_an_operator_of_another_size_starts_afresh() -> None:
    found = track(symmetric(crossing(0))[1])
    assert track(symmetric(torch.linspace(0, 1, 40, dtype=DTYPE))[1], found).values.item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_small_operators(n: int) -> None:
    _, a = symmetric(torch.linspace(1, 2, n, dtype=DTYPE))
    found: Eigenpairs | None = None
    for t in range(4):
        found = track(a, found, min(2, n), seed=t)
        assert found.values[0].item() == pytest.approx(2 if n > 1 else 1, rel=1e-5)


def test_products_that_are_not_finite() -> None:
    found = track(symmetric(torch.linspace(0, 1, 10, dtype=DTYPE))[1])
    with pytest.raises(NotFinite, match="a product with the operator is not finite"):
        track(SymmetricOperator(lambda v: v * torch.nan, torch.zeros(10, dtype=DTYPE)), found)


@pytest.mark.parametrize("norm", ["BatchNorm1d", "LayerNorm", "own GN"])
def test_along_training(norm: str) -> None:
    f = problems.objective(norm, "cross-entropy")
    w = f.weights()
    found: Eigenpairs | None = None
    for t in range(60):
        found = track(hessian(f, w), found, seed=t)
        if t % 10 == 0:
            true = lanczos(hessian(f, w), rtol=1e-8, seed=1).values[0]
            assert found.values[0].item() == pytest.approx(true.item(), rel=1e-3)
        w = w - 0.1 * f.grad(w)


def test_two_hundred_measurements_leave_nothing_behind() -> None:
    """Memory is flat; weights, buffers, gradients and random states are bit for bit what they were."""
    f = problems.objective("BatchNorm2d", "cross-entropy")
    before = {name: t.clone() for name, t in f.model.state_dict().items()}
    state, w = torch.get_rng_state(), f.weights()
    found: Eigenpairs | None = None
    alive = 0
    for t in range(200):
        found = track(hessian(f, w + 1e-3 * math.sin(t) * w), found, seed=t)
        if t in (60, 199):
            gc.collect()
            tensors = sum(type(thing) is Tensor for thing in gc.get_objects())
            assert alive == 0 or tensors <= alive + 2
            alive = tensors
    assert all(t.equal(before[name]) for name, t in f.model.state_dict().items())
    assert all(p.grad is None for p in f.model.parameters())
    assert torch.get_rng_state().equal(state)
