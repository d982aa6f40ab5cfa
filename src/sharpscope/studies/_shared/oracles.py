"""Convex and constrained problems solved by themselves, for comparison with what training finds."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...errors import Unsolvable

Array = NDArray[np.float64]


def basis_pursuit(a: Array, y: Array) -> Array:
    """Find the solution of least ℓ₁ norm, ``argmin ‖x‖₁`` subject to ``A x = y``, A ``(n, d)``.

    It is a linear program in ``x = p - q`` with ``p, q ≥ 0``.
    """
    from scipy.optimize import linprog

    d = a.shape[1]
    found = linprog(np.ones(2 * d), A_eq=np.hstack([a, -a]), b_eq=y, bounds=(0, None), method="highs")
    if found.status != 0:
        raise Unsolvable(f"basis pursuit has no answer: {found.message}")
    return found.x[:d] - found.x[d:]


def least_nuclear_norm(
    a: Array, b: Array, shape: tuple[int, int], *, step: float = 0.5, iterations: int = 4000
) -> Array:
    """Find the matrix of least nuclear norm, ``argmin ‖M‖_*`` subject to ``⟨A_i, M⟩ = b_i``, A ``(n, p·q)``.

    By Douglas-Rachford splitting: soft thresholding of singular values by `step`, then projection on the affine set.
    The result is the last projection.
    """
    inverse = np.linalg.pinv(a)
    z = inverse @ b
    x = z
    for _ in range(iterations):
        x = z - inverse @ (a @ z - b)
        u, s, vt = np.linalg.svd((2 * x - z).reshape(shape), full_matrices=False)
        z = z + ((u * np.maximum(s - step, 0)) @ vt).ravel() - x
    return (z - inverse @ (a @ z - b)).reshape(shape)


def least_frobenius_norm(a: Array, b: Array, shape: tuple[int, int]) -> Array:
    """Find the matrix of least Frobenius norm, ``argmin ‖M‖_F`` subject to ``⟨A_i, M⟩ = b_i``, A ``(n, p·q)``."""
    return (np.linalg.pinv(a) @ b).reshape(shape)


def within_orthant(value_and_grad: Callable[[Array], tuple[float, Array]], start: Array) -> Array:
    """Minimize a smooth function by L-BFGS-B from `start`, keeping its signs; zero is allowed."""
    from scipy.optimize import minimize

    signs = np.sign(start)

    def of_absolute_values(x: Array) -> tuple[float, Array]:
        value, g = value_and_grad(signs * x)
        return value, signs * g

    found = minimize(
        of_absolute_values,
        np.abs(start),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * len(start),
        options={"maxiter": 100000, "maxfun": 100000, "ftol": 1e-15, "gtol": 1e-10},
    )
    return signs * found.x
