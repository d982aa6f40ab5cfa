"""A network with one hidden layer whose output weights are fixed, side by side on data of its own for every run.

    f_W(x) = Σ_k μ_k tanh(w_k·x),   μ_k = ±m^(-1/2),   L = (1/2n) Σ_i (f(x_i) - y_i)²

Units come in pairs of equal w_k and opposite μ_k, so that f = 0 at the start.  The Hessian is that of least squares
plus a block for each unit, ``(1/n) Σ_i r_i μ_k tanh''(w_k·x_i) x_i x_iᵀ``, and |tanh''| ≤ B = 4/(3√3), so that for
‖x‖ = 1 ``λ_min ≥ -(B/√m) mean|r|``: the wider, the closer to convex.

R runs with weights W ``(R, m·d)``; inputs ``(R, n, d)`` or ``(n, d)``, targets ``(R, n)`` or ``(n,)``.
"""

import torch
from torch import Tensor

from ...autodiff.batched import BatchedRuns

MAX_BEND = 4 / (3 * 3**0.5)
"""The largest |tanh''|, B of the bound."""


def start(width: int, inputs: int, generator: torch.Generator) -> Tensor:
    """Weights ``(m·d,)`` in pairs of equal units ``w ~ N(0, 1)``."""
    half = torch.randn(width // 2, inputs, generator=generator, dtype=torch.float64)
    return torch.cat([half, half]).flatten()


def signs(width: int) -> Tensor:
    """Output weights μ ``(m,)``: plus for the first half, minus for its twins."""
    half = torch.full((width // 2,), width**-0.5, dtype=torch.float64)
    return torch.cat([half, -half])


def output(W: Tensor, x: Tensor) -> Tensor:
    """Outputs ``f(x_i)`` ``(R, n)`` of all runs."""
    w = W.view(len(W), -1, x.shape[-1])
    return torch.tanh(x @ w.mT) @ signs(w.shape[1])


def slope(W: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Losses L ``(R,)`` and gradients ``∇L`` ``(R, m·d)`` in closed form."""
    w = W.view(len(W), -1, x.shape[-1])
    mu = signs(w.shape[1])
    # tanh z = 2σ(2z) - 1, and Σμ = 0: a sigmoid takes a quarter of the time; in place, since this is every step.
    s = (w @ (2 * x).mT).sigmoid_()
    r = 2 * (mu @ s) - y
    bent = s.addcmul_(s, s, value=-1).mul_(r[:, None])
    return 0.5 * r.square().mean(1), ((bent @ x) * (4 / x.shape[-2] * mu[:, None])).flatten(1)


def hessian(W: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Hessians ``∇²L`` ``(R, m·d, m·d)`` in closed form, for one data set."""
    w = W.view(len(W), -1, x.shape[-1])
    m, (n, d) = w.shape[1], x.shape
    mu = signs(m)
    h = torch.tanh(x @ w.mT)
    r = h @ mu - y
    bent = mu * -2 * h * (1 - h.square())
    J = (mu * (1 - h.square()))[..., None] * x[:, None]
    J = J.reshape(len(W), n, m * d)
    blocks = torch.einsum("rik,ia,ib->rkab", r[..., None] * bent, x, x) / n
    H = J.mT @ J / n
    for k in range(m):
        H[:, k * d : k * d + d, k * d : k * d + d] += blocks[:, k]
    return H


def derivatives_mismatch(W: Tensor, x: Tensor, y: Tensor) -> float:
    """Largest difference of gradient and Hessian in closed form from automatic ones, over the largest entry."""
    f = BatchedRuns(lambda W: 0.5 * (output(W, x) - y).square().mean(1))
    pairs = ((f.grad(W), slope(W, x, y)[1]), (f.hessian(W), hessian(W, x, y)))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
