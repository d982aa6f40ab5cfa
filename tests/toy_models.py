"""Losses whose minimizers are known in closed form, as torch modules; n = x/‖x‖ is the place on Γ."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sharpscope.autodiff.objective import Objective
from sharpscope.studies._shared import toys


class Weights(nn.Module):
    """``L(w)`` of one vector of weights, given as a function."""

    def __init__(self, w: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.loss = nn.Parameter(w.clone()), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.w)


def objective(w: Tensor, loss: Callable[[Tensor], Tensor]) -> Objective:
    return Objective(Weights(w, loss), lambda output, target: output, [(torch.zeros(1), torch.zeros(1))])


def on_curve(toy: toys.Toy, phi: float = 1.0) -> Objective:
    """The toys A1 to A4, at φ."""

    def loss(w: Tensor) -> Tensor:
        x, y, z = w
        angle = torch.atan2(y, x)
        s = z / w.norm() - toy.a * torch.sin(2 * angle)
        size = torch.exp(toy.c1 * angle + toy.c2 * torch.sin(angle))
        return size * s**2 * (1 / 2 + toy.kappa * s / 3 + toy.mu * s**2 / 4)

    return objective(torch.as_tensor(toys.minimizer(toy, phi)), loss)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def start(n: Tensor, modes: int) -> Tensor:
    """The point of Γ at n, as unit weights (n, 0)."""
    return torch.cat([n / n.norm(), n.new_zeros(modes)])


def one_mode() -> Objective:
    """B: Γ is a sphere, one eigenvalue at the edge and one below, coupled by a cubic term."""

    def loss(w: Tensor) -> Tensor:
        x, q, r = w[:3], w[3:], w.norm()
        n = x / x.norm()
        log_a = (vector(1, 0.3, -0.5) * n) @ n + vector(0.2, -0.4, 0.3) @ n
        square = torch.exp(log_a) * q[0] ** 2 + math.exp(-2) * q[1] ** 2
        return square / (2 * r**2) + q[0] ** 2 * q[1] / (2 * r**3)

    return objective(start(vector(0.8, -0.5, 0.33), 2), loss)


def two_modes() -> Objective:
    """C: two eigenvalues that cross and do not mix."""

    def loss(w: Tensor) -> Tensor:
        x, q, r = w[:3], w[3:], w.norm()
        n = x / x.norm()
        a = torch.exp(torch.stack([vector(2, 0.5, 0) @ n, vector(-1, 1, 0.5) @ n + 0.8]))
        return a @ q**2 / (2 * r**2)

    return objective(start(vector(0.9, 0.3, -0.3), 2), loss)


BASIS = [((0.8, 0), (0, 0.8)), ((1.2, 0.2), (0.2, -1.2)), ((0.2, 1.2), (1.2, -0.2)), ((0.3, -0.15), (-0.15, 0.4))]


def coupled_modes() -> Objective:
    """D: the two eigenvalues are those of a matrix that moves, so that they repel and mix."""

    def loss(w: Tensor) -> Tensor:
        x, q, r = w[:4], w[4:], w.norm()
        matrix = 1.6 * torch.eye(2).double() + torch.einsum("i,ijk->jk", x / x.norm(), torch.tensor(BASIS).double())
        return q @ matrix @ q / (2 * r**2)

    return objective(start(vector(0.55, 0.18, 0.12, 0.85), 2), loss)


def plane() -> Objective:
    """E: a valley in the plane, not scale-invariant."""

    def loss(w: Tensor) -> Tensor:
        x, z = w
        s = z - 0.5 * torch.sin(x)
        return torch.exp(2 * torch.sin(x)) * (s**2 / 2 + 0.7 * s**3 / 3)

    return objective(vector(1.0, 0.5 * math.sin(1.0)), loss)
