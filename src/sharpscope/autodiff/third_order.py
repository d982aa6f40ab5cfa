"""Third derivatives: the change of the curvature along a few directions with the weights, as flows need it.

    G_ij = ∇_w (u_iᵀ ∇²L(w) u_j) = ∇³L(w)[u_i, u_j],      u_i, u_j held fixed

There are k (k + 1)/2 of them.  Two methods give them: autograd once more through the products (6 gradients each), and
second differences of gradients (2 each, and no graph), which by polarization are

    ∇³L[u, u] = (∇L(w + h u) - 2 ∇L(w) + ∇L(w - h u))/h² + O(h²),    2 ∇³L[u, v] = ∇³L[u+v, u+v] - ∇³L[u, u] - ∇³L[v, v]

Each checks the other: differences do not use the kernels whose double backward is wrong, autograd has no step h.
P parameters, k directions.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import WrongThirdDerivative
from .objective import Objective

Slopes = Callable[[Objective, Tensor, Tensor], Tensor]
"""A method: ``(f, w, U (P, k)) -> (k (k + 1)/2, P)``, in the order of `pairs`."""

AGREE = 1e-3
"""Largest relative difference between the two methods."""


def pairs(k: int) -> tuple[Tensor, Tensor]:
    """Return the indices i ≤ j of the k (k + 1)/2 different G_ij."""
    i, j = torch.triu_indices(k, k)
    return i, j


def unpacked(x: Tensor) -> Tensor:
    """Fill symmetric matrices ``(.., k, k)`` from the k (k + 1)/2 entries with i ≤ j in the last place."""
    k = (math.isqrt(8 * x.shape[-1] + 1) - 1) // 2
    i, j = pairs(k)
    out = x.new_zeros(*x.shape[:-1], k, k)
    out[..., i, j] = x
    out[..., j, i] = x
    return out


def combined(X: Tensor, G: Tensor) -> Tensor:
    """Sum ``Σ_ij X_ij G_ij`` (P,) for a symmetric X ``(k, k)``."""
    i, j = pairs(len(X))
    return torch.where(i == j, X[i, j], 2 * X[i, j]) @ G


def gram(G: Tensor, images: Tensor) -> Tensor:
    """Return ``⟨G_ij, images_lm⟩`` (k, k, k, k), where the images are those of the G_ij under a symmetric map."""
    return unpacked(unpacked(G @ images.T).movedim(0, -1)).permute(2, 3, 0, 1)


def by_autograd(f: Objective, w: Tensor, U: Tensor) -> Tensor:
    """Compute the ``G_ij`` by three nested derivatives."""
    at, (i, j) = f.at(w), pairs(U.shape[1])
    return (
        torch.stack([at.third(U[:, a], U[:, b]) for a, b in zip(i, j, strict=True)])
        if len(i)
        else U.new_zeros(0, len(w))
    )


class by_differences:
    """Compute the ``G_ij`` by second differences of gradients with a `step` of this length [N24].

    It takes k (k + 1) + 1 gradients.
    """

    def __init__(self, step: float) -> None:
        self.step = step

    def __call__(self, f: Objective, w: Tensor, U: Tensor) -> Tensor:
        k = U.shape[1]
        i, j = pairs(k)
        out, here = w.new_empty(len(i), len(w)), f.grad(w)

        def bent(u: Tensor) -> Tensor:
            size = u.norm()
            move = self.step / size * u
            return ((f.grad(w + move) - here) + (f.grad(w - move) - here)) * (size / self.step) ** 2

        own = [bent(u) for u in U.T]
        for row, (a, b) in enumerate(zip(i.tolist(), j.tolist(), strict=True)):
            if a == b:
                out[row] = own[a]
            else:
                # u and v of equal length, or the longer one drowns the other in rounding
                c = (U[:, a].norm() / U[:, b].norm()).item()
                out[row] = (bent(U[:, a] + c * U[:, b]) - own[a] - c * c * own[b]) / (2 * c)
        return out


def checked(f: Objective, w: Tensor, u: Tensor) -> Slopes:
    """Choose the cheaper method that is right here, after comparing both along `u` ``(P,)``.

    Differences in double precision, with the step that agrees best; autograd in single, where they are too coarse.

    Raises:
        WrongThirdDerivative: the two methods differ by more than a thousandth at every step.
        NoSecondDerivative: from the products.
    """
    u = u / u.norm()
    exact = f.third(w, u, u)
    eps = torch.finfo(w.dtype).eps
    size = exact.norm().item()
    length = max(w.norm().item(), 1e-3)
    tried = []
    for power in (0.25, 0.3, 0.35):
        method = by_differences(eps**power * length)
        tried.append(((method(f, w, u[:, None])[0] - exact).norm().item(), method))
    error, method = min(tried, key=lambda pair: pair[0])
    noise = 100 * eps * f.grad(w).norm().item() / method.step**2
    allowed = AGREE if eps < 1e-10 else 0.05
    if not error <= allowed * size + noise:
        raise WrongThirdDerivative(
            f"∇³L[u, u] by autograd and by differences of gradients differ by {error:.2g} of {size:.2g}: a kernel of"
            " this model has a wrong (or no) third derivative, so a flow would go astray; write the layer in"
            " elementary operations"
        )
    return method if eps < 1e-10 else by_autograd
