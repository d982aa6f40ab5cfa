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
    """Multiply the layers of weights ``(.., 2d)``, ``β = u⊙v`` ``(.., d)``."""
    return np.asarray(w[..., : len(X)] * w[..., len(X) :])


def losses(W: Tensor) -> Tensor:
    """Compute the losses ``½ (⟨x, u⊙v⟩ - 1)²`` ``(R,)`` of weights ``(R, 2d)``."""
    u, v = W.split(len(X), dim=1)
    return 0.5 * ((u * v) @ torch.as_tensor(X) - 1).square()


def slopes(w: Array) -> Array:
    """Compute the gradient of the output, ``∂⟨x, u⊙v⟩/∂w = (x⊙v, x⊙u)``."""
    return np.asarray(np.concatenate([X, X]) * np.roll(w, len(X), axis=-1))


def field(w: Array) -> Array:
    """Compute the velocity of gradient flow, ``-∇L = -(⟨x, β⟩ - 1) (x⊙v, x⊙u)``."""
    return np.asarray((1 - product(w) @ X)[..., None] * slopes(w))


def sharpness(w: Array) -> Array:
    """Compute λ1 of the Hessian in closed form ``(..)``.

    The Hessian is the square of the slopes, and the residual times x_i between u_i and v_i.
    """
    s, d = slopes(w), len(X)
    H = s[..., :, None] * s[..., None, :]
    pairs = np.roll(np.diag(np.concatenate([X, X])), d, axis=0)
    H = H + (product(w) @ X - 1)[..., None, None] * pairs
    return np.asarray(np.linalg.eigvalsh(H)[..., -1])


def flow_end(start: Array) -> tuple[Array, float]:
    """Follow the gradient flow to its end, and find the critical rate, 2/(largest sharpness on the way)."""
    path = flow(field, start, 1e4, residual=lambda w: float(abs(product(w) @ X - 1)), small=1e-10)
    return path.end, float(2 / sharpness(path.states).max())


def dense_sharpness(w: Array) -> float:
    """Compute λ1 of the Hessian from automatic second derivatives."""
    return torch.linalg.eigvalsh(BatchedRuns(losses).hessian(torch.as_tensor(w)[None])[0])[-1].item()


@dataclass(frozen=True)
class RateSweep:
    """The ends of gradient descent from several starts (rows) at several rates (columns)."""

    converged: NDArray[np.bool_]
    ends: Array
    norm: Array  # ‖w‖² over that of the flow from the same start
    sharp: Array  # λ1 over that of the flow
    stability_ratio: Array  # λ1·η/2


def sweep(starts: Array, fractions: Array, steps: int) -> RateSweep:
    """Descend from all starts ``(k, 2d)`` at all fractions of their critical rates, to a residual of 1e-9."""
    flows = [flow_end(start) for start in starts]
    ended = np.array([end for end, _ in flows])[:, None]
    critical = np.array([rate for _, rate in flows])[:, None]
    rates = critical * fractions
    W = torch.as_tensor(starts).repeat_interleave(len(fractions), 0)
    rules = [GD(float(rate)) for rate in rates.ravel()]
    done = descend(BatchedRuns(losses).recorded(W), W, rules, steps, until=lambda loss: loss < 0.5e-18)
    converged = done.reached.numpy().reshape(rates.shape)
    ends = np.where(converged[..., None], done.weights.numpy().reshape(*rates.shape, -1), 0)
    norm, sharp = np.square(ends).sum(2), sharpness(ends)
    return RateSweep(
        converged,
        ends,
        norm=norm / np.square(ended).sum(2),
        sharp=sharp / sharpness(ended),
        stability_ratio=sharp * rates / 2,
    )


def shared_losses(W: Tensor) -> Tensor:
    """Compute the losses of the net with shared weights, ``½ (⟨x, w⊙w⟩ - 1)²`` ``(R,)``, of weights ``(R, d)``."""
    return 0.5 * (W.square() @ torch.as_tensor(X) - 1).square()


def from_shared(start: Array, fractions: Array, steps: int) -> tuple[float, float]:
    """Compare with the net with shared weights ``w = (u + v)/2`` at half of the rates.

    Its steps are ``w ← w - η (⟨x, w⊙w⟩ - 1) x⊙w``, those of u = v = w.  The result is how far the products of these two
    end from each other, and how far ‖(u, v)‖² from `start` ends from that of u = v, relative: medians over the rates at
    which both converge.
    """
    w = start.reshape(2, -1).mean(0)
    both = np.stack([np.concatenate([w, w]), start])
    runs = sweep(both, fractions, steps)
    rules = [GD(float(0.5 * fraction * flow_end(both[0])[1])) for fraction in fractions]
    W = torch.as_tensor(w).expand(len(fractions), -1).clone()
    f = BatchedRuns(shared_losses)
    ends = descend(f.recorded(W), W, rules, steps, until=lambda loss: loss < 0.5e-18).weights.numpy()
    ok = runs.converged.all(0)
    off = np.abs(product(runs.ends[0, ok]) - np.square(ends[ok])).max(1)
    norms = np.square(runs.ends[:, ok]).sum(2)
    return float(np.median(off)), float(np.median(np.abs(norms[1] / norms[0] - 1)))


def summary(runs: RateSweep, k: int, fractions: Array, teachers: Array) -> dict[str, float]:
    """Summarize the runs from one start, below .9 and beyond 1.03 of the critical rate.

    Teachers β* ``(T, d)`` are those for `interior`.  `least_norm` is the least error over that at the smallest rate,
    for the teacher that has the least norm.
    """
    ok, norm, sharp, edge = runs.converged[k], runs.norm[k], runs.sharp[k], runs.stability_ratio[k]
    low, high = ok & (fractions < 0.9), ok & (fractions > 1.03)
    beta = product(runs.ends[k, ok])
    to_least_norm = errors(beta, np.eye(len(X))[-1] / X[-1])
    return {
        "norm_apart": float(np.abs(norm[low] - 1).max()),
        "sharp_apart": float(np.abs(sharp[low] - 1).max()),
        "norm_order": spearman(fractions[high], norm[high]),
        "sharp_order": spearman(fractions[high], sharp[high]),
        "at_edge": float(((edge[high] >= 0.9) & (edge[high] <= 1.01)).mean()),
        "interior": float((gain(errors(beta, teachers[:, None])) <= 0.9).mean()),
        "least_norm": float(to_least_norm.min() / to_least_norm[0]),
    }


def errors(beta: Array, teacher: Array) -> Array:
    """Compute the squared distance from a teacher for each rate, ``‖β - β*‖²``."""
    return np.asarray(np.square(beta - teacher).sum(-1))


def gain(errors: Array) -> Array:
    """Divide the least error by that at the better end of the range of rates.

    It is one where no rate in between is better.
    """
    return np.asarray(errors.min(-1) / np.minimum(errors[..., 0], errors[..., -1]))
