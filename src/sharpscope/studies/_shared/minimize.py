"""Minima to high precision: L-BFGS on the loss of one run.

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

from ...autodiff.batched import Slope

MEMORY = 50
"""Pairs of steps that stand for the Hessian."""


@dataclass(frozen=True)
class Minimum:
    """Where L-BFGS ended, and how well: weights ``(P,)``, the loss there, and the norm of its gradient."""

    weights: Tensor
    loss: float
    gradient: float
    evaluations: int


def minimize(slope: Slope, w: Tensor, *, below: float = 0.0, evaluations: int = 20000) -> Minimum:
    """``argmin L`` near w ``(P,)``, from losses and gradients of one run: ``W (1, P) -> (1,), (1, P)``.

    It ends once the loss is at most `below`, no start finds a smaller one, or after so many `evaluations`.
    """
    from scipy.optimize import minimize as search

    counted = 0

    def value_and_grad(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        nonlocal counted
        counted += 1
        losses, g = slope(torch.from_numpy(x)[None].to(w.dtype), counted)
        return losses.item(), g[0].double().numpy()

    def arrived(intermediate_result: Any) -> None:
        if intermediate_result.fun <= below:
            raise StopIteration

    x, loss = w.double().numpy(), np.inf
    while counted < evaluations:
        options = {"maxcor": MEMORY, "maxiter": evaluations, "maxfun": evaluations - counted, "ftol": 0, "gtol": 0}
        found = search(value_and_grad, x, jac=True, method="L-BFGS-B", callback=arrived, options=options)
        better = found.fun < loss * (1 - 1e-6)
        if found.fun < loss:
            x, loss = found.x, float(found.fun)
        if loss <= below or not better:
            break
    _, g = value_and_grad(x)
    return Minimum(torch.from_numpy(x).to(w.dtype), loss, float(np.linalg.norm(g)), counted)
