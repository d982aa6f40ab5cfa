"""Minima of the loss of one run to high precision, by L-BFGS.

The line search of L-BFGS gives up where rounding hides the next decrease; a fresh start from there, without memory of
earlier curvature, often finds more, and this is repeated as long as it does.

P weights.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...autodiff.batched import GradientFunction

MEMORY = 50
"""Number of past steps from which the Hessian is approximated."""


@dataclass(frozen=True)
class LocalMinimum:
    """The point at which L-BFGS ended, and how good it is."""

    weights: Tensor  # (P,)
    loss: float
    gradient: float  # its norm
    num_evaluations: int


def minimize(slope: GradientFunction, w: Tensor, *, below: float = 0.0, max_evaluations: int = 20000) -> LocalMinimum:
    """Minimize the loss of one run from w ``(P,)`` on.

    It ends once the loss is at most `below`, no start finds a smaller one, or after so many evaluations.

    Args:
        slope: losses and gradients, ``W (1, P) -> (1,), (1, P)``.
    """
    from scipy.optimize import minimize as search

    evaluations = 0

    def value_and_grad(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        nonlocal evaluations
        evaluations += 1
        losses, g = slope(torch.from_numpy(x)[None].to(w.dtype), evaluations)
        return losses.item(), g[0].double().numpy()

    def stop_below(intermediate_result: Any) -> None:
        if intermediate_result.fun <= below:
            raise StopIteration

    x, loss = w.double().numpy(), np.inf
    options = {"maxcor": MEMORY, "maxiter": max_evaluations, "ftol": 0, "gtol": 0}
    while evaluations < max_evaluations:
        options["maxfun"] = max_evaluations - evaluations
        found = search(value_and_grad, x, jac=True, method="L-BFGS-B", callback=stop_below, options=options)
        better = found.fun < loss * (1 - 1e-6)
        if found.fun < loss:
            x, loss = found.x, float(found.fun)
        if loss <= below or not better:
            break
    _, g = value_and_grad(x)
    return LocalMinimum(torch.from_numpy(x).to(w.dtype), loss, float(np.linalg.norm(g)), evaluations)
