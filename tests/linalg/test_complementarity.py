"""The complementarity problem of central flows, against closed forms, enumeration and a conic solver."""

import itertools

import clarabel
import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from sharpscope.errors import Unsolvable
from sharpscope.linalg.complementarity import solve

CASES = [(1, 1), (2, 3), (3, 2), (5, 15), (5, 4), (10, 55), (10, 6), (20, 210)]
"""Modes and the dimension of the slopes: where it is below k (k + 1)/2, B has a kernel."""


def problem(k: int, dims: int, seed: int) -> tuple[Tensor, Tensor]:
    """C of mixed inertia; B a Gram matrix that holds the trace, so that the problem has a solution."""
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(k, k, dims, generator=g, dtype=torch.float64)
    G = G + G.transpose(0, 1)
    G[..., 0] = torch.eye(k)
    C = torch.randn(k, k, generator=g, dtype=torch.float64)
    return C + C.T, 0.5 * torch.einsum("ijp,lmp->ijlm", G, G)


def least(m: Tensor) -> float:
    return torch.linalg.eigvalsh(m)[0].item()


def apply(B: Tensor, X: Tensor) -> Tensor:
    return torch.einsum("ijlm,lm->ij", B, X)


def objective(C: Tensor, B: Tensor, X: Tensor) -> float:
    return (0.5 * (X * apply(B, X)).sum() + (C * X).sum()).item()


def conic(C: Tensor, B: Tensor) -> tuple[Tensor, float]:
    """The same as a quadratic program over the cone, in scaled upper-triangular coordinates."""
    k = len(C)
    rows = [(i, j) for j in range(k) for i in range(j + 1)]
    frame = np.zeros((len(rows), k * k))
    for n, (i, j) in enumerate(rows):
        frame[n, i * k + j] = frame[n, j * k + i] = 1 if i == j else 0.5**0.5
    P = frame @ B.reshape(k * k, k * k).numpy() @ frame.T
    q = frame @ C.reshape(-1).numpy()
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    n = len(rows)
    solver = clarabel.DefaultSolver(
        sparse.csc_matrix(np.triu(P)),
        q,
        -sparse.eye(n, format="csc"),
        np.zeros(n),
        [clarabel.PSDTriangleConeT(k)],
        settings,
    )
    found = solver.solve()
    X = torch.tensor((np.array(found.x) @ frame).reshape(k, k))
    return X, found.obj_val


@pytest.mark.parametrize(("k", "dims"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_solution_is_certified(k: int, dims: int, seed: int) -> None:
    C, B = problem(k, dims, seed)
    found = solve(C, B)
    S = C + apply(B, found.x)
    scale = max(found.x.norm().item(), 1e-12) * max(S.norm().item(), C.norm().item())
    assert least(found.x) >= -1e-8 * found.x.norm()
    assert least(S) >= -1e-8 * C.norm() - 1e-8 * S.norm()
    assert abs((found.x * S).sum().item()) <= 1e-8 * scale
    assert torch.allclose(found.s, S, rtol=1e-8, atol=1e-8 * C.norm().item())
    assert found.residual <= 1e-8


@pytest.mark.parametrize(("k", "dims"), [case for case in CASES if case[0] > 1])
def test_agrees_with_a_conic_solver(k: int, dims: int) -> None:
    C, B = problem(k, dims, 7)
    ours, (theirs, value) = solve(C, B).x, conic(C, B)
    assert objective(C, B, ours) == pytest.approx(value, rel=1e-7)
    if dims >= k * (k + 1) // 2:  # B is definite: X is unique
        assert (ours - theirs).norm() <= 1e-4 * ours.norm()


@pytest.mark.parametrize("c", [-2.0, -1e-9, 0.0, 3.0])
def test_one_mode_in_closed_form(c: float) -> None:
    found = solve(torch.tensor([[c]], dtype=torch.float64), torch.full((1, 1, 1, 1), 4.0, dtype=torch.float64))
    assert found.x.item() == pytest.approx(max(0.0, -c / 4), rel=1e-8, abs=1e-20)


def test_no_mode() -> None:
    assert solve(torch.zeros(0, 0), torch.zeros(0, 0, 0, 0)).x.shape == (0, 0)


def test_a_semidefinite_c_needs_no_oscillation() -> None:
    C, B = problem(4, 10, 0)
    assert solve(C @ C, B).x.norm() == 0


def test_modes_that_are_not_coupled() -> None:
    """A diagonal B and C: nonnegative least squares, by trying every active set."""
    g = torch.Generator().manual_seed(3)
    k = 4
    for _ in range(5):
        h = torch.randn(k, k, generator=g, dtype=torch.float64)
        M, c = h @ h.T, torch.randn(k, generator=g, dtype=torch.float64)
        B = torch.zeros(k, k, k, k, dtype=torch.float64)
        i = torch.arange(k)
        B[i[:, None], i[:, None], i, i] = M
        for a, b in itertools.combinations(range(k), 2):  # off-diagonal entries only cost
            B[a, b, a, b] = B[a, b, b, a] = B[b, a, a, b] = B[b, a, b, a] = 5.0
        found = solve(torch.diag(c), B).x
        best = None
        for active in itertools.chain.from_iterable(itertools.combinations(range(k), n) for n in range(k + 1)):
            x = torch.zeros(k, dtype=torch.float64)
            if active:
                at = list(active)
                x[at] = torch.linalg.solve(M[at][:, at], -c[at])
            if (x >= 0).all() and (c + M @ x >= -1e-12).all():
                best = x
        assert best is not None
        assert torch.allclose(found, torch.diag(best), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_degenerate_problems(seed: int) -> None:
    """X and S are both singular in one direction: strict complementarity fails."""
    g = torch.Generator().manual_seed(seed)
    k = 6
    Q = torch.linalg.qr(torch.randn(k, k, generator=g, dtype=torch.float64)).Q
    x = torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    s = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    X, S = (Q * x) @ Q.T, (Q * s) @ Q.T
    _, B = problem(k, 30, seed)
    found = solve(S - apply(B, X), B)
    assert found.residual <= 1e-8
    assert (found.x - X).norm() <= 1e-3 * X.norm()  # X itself is only known to the root of the residual here


def test_a_turned_basis_turns_the_solution() -> None:
    C, B = problem(4, 12, 1)
    g = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    turned = torch.einsum("ai,bj,cl,dm,ijlm->abcd", Q, Q, Q, Q, B)
    assert torch.allclose(solve(Q @ C @ Q.T, turned).x, Q @ solve(C, B).x @ Q.T, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-34, 1e-12, 1e-3, 1e6, 1e12, 1e34])
def test_units_do_not_matter(scale: float) -> None:
    C, B = problem(4, 12, 2)
    X = solve(C, B).x
    assert torch.allclose(solve(scale * C, B).x, scale * X, rtol=1e-6, atol=1e-6 * scale)
    assert torch.allclose(solve(C, scale * B).x, X / scale, rtol=1e-6, atol=1e-6 / scale)


def test_a_start_nearby_saves_steps() -> None:
    C, B = problem(8, 36, 0)
    found = solve(C, B)
    there = solve(C + 1e-3 * torch.eye(8), B, found.x)
    assert there.iterations <= 5 < found.iterations
    assert torch.allclose(there.x, solve(C + 1e-3 * torch.eye(8), B).x, atol=1e-5)


def test_a_useless_start_does_no_harm() -> None:
    C, B = problem(5, 15, 0)
    assert torch.allclose(solve(C, B, -10 * torch.eye(5).double()).x, solve(C, B).x, atol=1e-6)


def test_curvature_that_nothing_holds() -> None:
    """B sees only the first mode, and the second rises."""
    B = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    B[0, 0, 0, 0] = 1.0
    with pytest.raises(Unsolvable, match=r"nothing holds|residual"):
        solve(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)), B)
    with pytest.raises(Unsolvable, match="nothing holds"):
        solve(-torch.eye(2).double(), torch.zeros_like(B))


@pytest.mark.parametrize(
    ("C", "B", "words"),
    [
        (torch.eye(2), torch.zeros(2, 2, 2), "must be"),
        (torch.full((1, 1), torch.nan), torch.zeros(1, 1, 1, 1), "finite"),
        (torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.zeros(2, 2, 2, 2), "symmetric"),
        (-torch.ones(1, 1), -torch.ones(1, 1, 1, 1), "⪰ 0"),
    ],
)
def test_bad_input(C: Tensor, B: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        solve(C, B)
