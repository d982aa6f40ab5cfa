"""The semidefinite linear complementarity problem of central flows.

Given a symmetric C and a positive semidefinite linear map B on symmetric matrices, find

    X ⪰ 0,      S = C + B X ⪰ 0,      ⟨X, S⟩ = 0,

the optimality condition of  min over X ⪰ 0 of ½⟨X, B X⟩ + ⟨C, X⟩.  Solved by an interior-point method: Newton steps on
X S = μ I, symmetrized by the matrix W with W S W = X (Nesterov & Todd 1997), with Mehrotra's choice of μ:

    (B + 𝒲) dX = μ X⁻¹ - C - B X,      𝒲 Y = W⁻¹ Y W⁻¹.

All matrices are k × k, and n = k (k + 1)/2 is the number of unknowns.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import InvalidValue, Unsolvable

ENOUGH = 1e-12
"""Residual at which no further step is taken."""


@dataclass(frozen=True)
class Solution:
    """X and S = C + B X, with the largest of their violations.

    `residual` is the largest of: the most negative eigenvalue of X over the largest of X, the most negative one of S
    over the largest in magnitude of S or of C, and |⟨X, S⟩| over the product of the two scales.
    """

    x: Tensor
    s: Tensor
    residual: float
    iterations: int


def solve(C: Tensor, B: Tensor, start: Tensor | None = None, *, rtol: float = 1e-8, max_steps: int = 100) -> Solution:
    """Find X ⪰ 0 with ``C + B X ⪰ 0`` and ``⟨X, C + B X⟩ = 0``, for C (k, k) and B (k, k, k, k) [N23].

    Args:
        start: the solution of a problem nearby, from which two or three plain Newton steps on XS + SX = 0 may suffice.
        rtol: largest residual that is returned.
        max_steps: of the interior-point method.

    Raises:
        ValueError: C or B has a wrong shape, is not finite or not symmetric, or B is indefinite.
        Unsolvable: there is no solution, or the residual stays above `rtol`.
    """
    k = len(C)
    _check(C, B, k)
    if k == 0:
        return Solution(C, C, 0.0, 0)
    c = (C.double() + C.double().T) / 2
    size = torch.linalg.matrix_norm(c, 2).item()
    if size == 0 or torch.linalg.eigvalsh(c)[0] >= 0:
        return Solution(torch.zeros_like(C), C, 0.0, 0)
    frame = _frame(k).to(c)
    b = frame @ B.double().reshape(k * k, k * k) @ frame.T
    spectrum = torch.linalg.eigvalsh((b + b.T) / 2)
    if spectrum[0] < -1e-8 * spectrum[-1].abs():
        raise InvalidValue(
            f"B has the eigenvalue {spectrum[0].item():.2g} beside {spectrum[-1].item():.2g}; it must be ⪰ 0"
        )
    if spectrum[-1] <= 0:
        raise _unsolvable(c)
    scale = spectrum[-1].item() / size  # X in units of 1/scale, S and C in units of size
    b, c = (b + b.T) / (2 * spectrum[-1]), c / size
    tried = None if start is None else _newton(c, b, frame, start.double() * scale, rtol)
    x, iterations = tried or _interior(c, b, frame, max_steps)
    s = c + _mat(b @ _vec(x, frame), frame)
    residual = _residual(x, s)
    if not residual <= rtol:
        raise (
            _unsolvable(c * size)
            if x.norm() > 1e6
            else Unsolvable(
                f"the complementarity residual is {residual:.2g} after {iterations} steps; it should be {rtol:.2g}"
            )
        )
    return Solution((x / scale).to(C.dtype), (s * size).to(C.dtype), residual, iterations)


def _interior(c: Tensor, b: Tensor, frame: Tensor, max_steps: int) -> tuple[Tensor, int]:
    """Take interior-point steps from X = S = I; return the best X and their number.  b and c have norm one."""
    k = len(c)
    x = s = found = torch.eye(k).to(c)
    best = math.inf
    step = 0

    def slack(x: Tensor) -> Tensor:
        return c + _mat(b @ _vec(x, frame), frame)

    while step < max_steps:
        step += 1
        try:
            low = torch.linalg.cholesky(x)
            squares, v = torch.linalg.eigh(low.T @ s @ low)
            d = squares.clamp_min(1e-300).sqrt()  # in the frame of `root` both X and S are diag(d)
            root = low @ v / d.sqrt()
            back = torch.linalg.inv(root)
            w = back.T @ back
            system = torch.linalg.cholesky(b + frame @ torch.kron(w, w) @ frame.T)
        except RuntimeError:  # LinAlgError
            break  # rounding has taken over: the best so far stands
        mu = (x * s).sum().item() / k
        fixed = -slack(x)

        def newton(right: Tensor, system: Tensor = system, x: Tensor = x, s: Tensor = s) -> tuple[Tensor, Tensor]:
            dx = _mat(torch.cholesky_solve(_vec(right, frame)[:, None], system)[:, 0], frame)
            return dx, slack(x + dx) - s

        dx, ds = newton(fixed)
        a = min(1.0, _longest(x, dx), _longest(s, ds))
        sigma = min(1.0, max(((x + a * dx) * (s + a * ds)).sum().item() / (k * mu), 0.0)) ** 3
        p, q = back @ dx @ back.T, root.T @ ds @ root
        bent = back.T @ ((p @ q + q @ p) / (d[:, None] + d)) @ back
        dx, ds = newton(fixed + sigma * mu * torch.cholesky_inverse(low) - bent)
        a = min(1.0, 0.99 * _longest(x, dx), 0.99 * _longest(s, ds))
        x, s = x + a * dx, s + a * ds
        x, s = (x + x.T) / 2, (s + s.T) / 2
        residual = _residual(x, slack(x))
        if residual < best:
            best, found = residual, x
        if best < ENOUGH or a < 1e-8:
            break
    return found, step


def _newton(c: Tensor, b: Tensor, frame: Tensor, x: Tensor, rtol: float) -> tuple[Tensor, int] | None:
    """Take Newton steps on ``X S + S X = 0`` from x; None unless they arrive at a solution at once."""
    eye = torch.eye(len(c)).to(c)

    def anticommutator(m: Tensor) -> Tensor:
        """Return the map ``Y -> M Y + Y M`` on the coordinates of Y."""
        return frame @ (torch.kron(m, eye) + torch.kron(eye, m)) @ frame.T

    for step in range(1, 6):
        s = c + _mat(b @ _vec(x, frame), frame)
        jacobian = anticommutator(s) + anticommutator(x) @ b
        wrong = x @ s + s @ x
        dx, info = torch.linalg.solve_ex(jacobian, -_vec(wrong, frame))
        if info:
            return None
        x = x + _mat(dx, frame)
        residual = _residual(x, c + _mat(b @ _vec(x, frame), frame))
        if residual <= 0.01 * rtol:
            return x, step
        if not residual < 1:
            return None
    return None


def _longest(x: Tensor, dx: Tensor) -> float:
    """Return the largest a with ``x + a dx ⪰ 0``, infinite where there is no end; 0 where x is not positive."""
    low, info = torch.linalg.cholesky_ex(x)
    if info:
        return 0.0
    half = torch.linalg.solve_triangular(low, dx, upper=False)
    least = torch.linalg.eigvalsh(torch.linalg.solve_triangular(low, half.T, upper=False))[0].item()
    return -1 / least if least < 0 else math.inf


def _residual(x: Tensor, s: Tensor) -> float:
    of_x, of_s = torch.linalg.eigvalsh(x), torch.linalg.eigvalsh(s)
    size_x = max(of_x.abs().max().item(), 1e-300)
    size_s = max(of_s.abs().max().item(), 1.0)
    return max(-of_x[0].item() / size_x, -of_s[0].item() / size_s, abs((x * s).sum().item()) / (size_x * size_s))


@cache
def _frame(k: int) -> Tensor:
    """Return an orthonormal basis of symmetric matrices as rows (n, k²)."""
    i, j = torch.triu_indices(k, k)
    out = torch.zeros(len(i), k, k, dtype=torch.float64)
    n = torch.arange(len(i))
    out[n, i, j] = out[n, j, i] = torch.where(i == j, 1.0, 0.5).double().sqrt()
    return out.reshape(len(i), -1)


def _vec(m: Tensor, frame: Tensor) -> Tensor:
    return frame @ m.reshape(-1)


def _mat(v: Tensor, frame: Tensor) -> Tensor:
    k = math.isqrt(frame.shape[1])
    return (v @ frame).view(k, k)


def _unsolvable(c: Tensor) -> Unsolvable:
    return Unsolvable(
        f"nothing holds the curvature back: B X vanishes along some X on which C is negative (its least eigenvalue is"
        f" {torch.linalg.eigvalsh(c)[0].item():.2g}), so that there is no solution"
    )


def _check(C: Tensor, B: Tensor, k: int) -> None:
    if C.shape != (k, k) or B.shape != (k, k, k, k):
        raise InvalidValue(f"C {tuple(C.shape)} and B {tuple(B.shape)} must be (k, k) and (k, k, k, k)")
    if not bool(C.isfinite().all() and B.isfinite().all()):
        raise InvalidValue("C and B must be finite")
    if k and (C - C.T).abs().max() > 1e-6 * C.abs().max():
        raise InvalidValue("C must be symmetric")
