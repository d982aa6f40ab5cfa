"""A diagonal linear net on one datum, where norm and sharpness pull in opposite directions.

β = u⊙v, weights w = (u, v), loss ``½ (⟨x, β⟩ - 1)²`` with x > 0.  Where the loss is zero,

    λ1 = Σ x_i² (u_i² + v_i²)  (= 2 Σ x_i² |β_i| for u = v),     ½ ‖w‖² ≥ ‖β‖₁
    least norm: all on the largest x_i          least sharpness: all on the smallest x_i

R runs side by side, d = 6 coordinates.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...autodiff.batched import BatchedRuns
from ...optimizers.descend import descend
from ...optimizers.gd import GD
from .._framework.fits import spearman
from .._shared.ode import flow

Array = NDArray[np.float64]
X = np.linspace(0.4, 2, 6)


def product(w: Array) -> Array:
    """``β = u⊙v`` ``(.., d)`` of weights ``(.., 2d)``."""
    return np.asarray(w[..., : len(X)] * w[..., len(X) :])


def losses(W: Tensor) -> Tensor:
    """``½ (⟨x, u⊙v⟩ - 1)²`` ``(R,)`` of weights ``(R, 2d)``."""
    u, v = W.split(len(X), dim=1)
    return 0.5 * ((u * v) @ torch.as_tensor(X) - 1).square()


def slopes(w: Array) -> Array:
    """``∂⟨x, u⊙v⟩/∂w = (x⊙v, x⊙u)``."""
    return np.asarray(np.concatenate([X, X]) * np.roll(w, len(X), axis=-1))


def field(w: Array) -> Array:
    """``-∇L = -(⟨x, β⟩ - 1) (x⊙v, x⊙u)``."""
    return np.asarray((1 - product(w) @ X)[..., None] * slopes(w))


def sharpness(w: Array) -> Array:
    """λ1 of the Hessian ``(..)``: the square of the slopes, and the residual times x_i between u_i and v_i."""
    s, d = slopes(w), len(X)
    H = s[..., :, None] * s[..., None, :]
    pairs = np.roll(np.diag(np.concatenate([X, X])), d, axis=0)
    H = H + (product(w) @ X - 1)[..., None, None] * pairs
    return np.asarray(np.linalg.eigvalsh(H)[..., -1])


def by_flow(start: Array) -> tuple[Array, float]:
    """Where the gradient flow ends, and the critical rate 2/(largest sharpness on its way)."""
    path = flow(field, start, 1e4, residual=lambda w: float(abs(product(w) @ X - 1)), small=1e-10)
    return path.end, float(2 / sharpness(path.states).max())


def dense(w: Array) -> float:
    """λ1 from automatic second derivatives."""
    return torch.linalg.eigvalsh(BatchedRuns(losses).hessian(torch.as_tensor(w)[None])[0])[-1].item()


@dataclass(frozen=True)
class Sweep:
    """Gradient descent from starts (rows) at rates (columns): which runs converged, and where they ended.

    `norm` and `sharp` are ‖w‖² and λ1 over those of the flow from the same start, `stability_ratio` is λ1·η/2.
    """

    kept: NDArray[np.bool_]
    ends: Array
    norm: Array
    sharp: Array
    stability_ratio: Array


def sweep(starts: Array, shares: Array, steps: int) -> Sweep:
    """All starts ``(k, 2d)`` at all rates, given in shares of the critical rate, to a residual of 1e-9."""
    flows = [by_flow(start) for start in starts]
    ended, critical = np.array([w for w, _ in flows])[:, None], np.array([c for _, c in flows])[:, None]
    rates = critical * shares
    W = torch.as_tensor(starts).repeat_interleave(len(shares), 0)
    rules = [GD(float(rate)) for rate in rates.ravel()]
    done = descend(BatchedRuns(losses).recorded(W), W, rules, steps, until=lambda loss: loss < 0.5e-18)
    kept = done.reached.numpy().reshape(rates.shape)
    ends = np.where(kept[..., None], done.weights.numpy().reshape(*rates.shape, -1), 0)
    norm, sharp = np.square(ends).sum(2), sharpness(ends)
    return Sweep(kept, ends, norm / np.square(ended).sum(2), sharp / sharpness(ended), sharp * rates / 2)


def summary(runs: Sweep, k: int, shares: Array, teachers: Array) -> dict[str, float]:
    """Of one start, below .9 and beyond 1.03 of the critical rate; teachers β* ``(T, d)`` are those for `interior`.

    `least_norm` is the least error over that at the smallest rate, for the teacher that has the least norm.
    """
    ok, norm, sharp, edge = runs.kept[k], runs.norm[k], runs.sharp[k], runs.stability_ratio[k]
    beta, low, high = product(runs.ends[k, ok]), ok & (shares < 0.9), ok & (shares > 1.03)
    simple = errors(beta, np.eye(len(X))[-1] / X[-1])
    return {
        "norm_apart": float(np.abs(norm[low] - 1).max()),
        "sharp_apart": float(np.abs(sharp[low] - 1).max()),
        "norm_order": spearman(shares[high], norm[high]),
        "sharp_order": spearman(shares[high], sharp[high]),
        "at_edge": float(((edge[high] >= 0.9) & (edge[high] <= 1.01)).mean()),
        "interior": float((gain(errors(beta, teachers[:, None])) <= 0.9).mean()),
        "least_norm": float(simple.min() / simple[0]),
    }


def errors(beta: Array, teacher: Array) -> Array:
    """``‖β - β*‖²`` for each rate."""
    return np.asarray(np.square(beta - teacher).sum(-1))


def gain(errors: Array) -> Array:
    """Least error over that of the better end of the range of rates: one where no rate in between is better."""
    return np.asarray(errors.min(-1) / np.minimum(errors[..., 0], errors[..., -1]))
