"""Scaled residual networks as particles: forward, the velocity of each unit and its divergence, and the kernel.

L blocks of M units (u, w, b) move the features z of an input, K output units (a, c, e) read them.  Every unit is a
particle, and in the mean-field limit a block and the outputs are laws of particles.  Gradient flow with the gradient of
a unit multiplied by the number of units is the flow of particles in the velocity field of their own laws.

    z_l = z_{l-1} + s Σ_m u_lm tanh(w_lm·z_{l-1} + b_lm),  z_0 = x       s = 1/LM
    f = (β/K) Σ_k a_k tanh(c_k·z_L + e_k)
    ℓ = ‖f(x) - y‖²/2n
    θ̇_lm = -∇ℓ/s,   ω̇_k = -K ∇ℓ
    div ω̇_k = -(β/n) a_k Σ_i r_i tanh''(c_k·z_L(x_i) + e_k) (‖z_L(x_i)‖² + 1)
    div θ̇_lm = -Σ_i (u_lm·∂ℓ/∂z_l(x_i)) tanh''(w_lm·z_{l-1}(x_i) + b_lm) (‖z_{l-1}(x_i)‖² + 1)
    G = (1/s) Σ_l J_l J_lᵀ + K J_out J_outᵀ,   dℓ/dt = -rᵀG r/n²

R runs, P weights, n inputs of d numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

INNER_DEVIATION = 2.0
"""Standard deviation of w and c at the start; that of u, b, a and e is one."""


class UnitWeights(NamedTuple):
    """The weights of R networks by kind."""

    u: Tensor  # (R, L, M, d)
    w: Tensor  # (R, L, M, d)
    b: Tensor  # (R, L, M)
    a: Tensor  # (R, K)
    c: Tensor  # (R, K, d)
    e: Tensor  # (R, K)


@dataclass(frozen=True)
class Evaluation:
    """Losses, gradients and divergences of R runs at one point."""

    losses: Tensor  # (R,)
    slopes: Tensor  # (R, P): gradients times the rates, which are minus the velocities
    output_divergence: Tensor  # (R,): of the velocity, the mean over units
    block_divergence: Tensor  # (R,)


@dataclass(frozen=True)
class ResidualNet:
    """The shape and the scaling of a residual network."""

    inputs: int  # d
    depth: int  # L
    width: int  # M
    units: int  # K
    strength: float | Tensor  # β: one number, or one for each run (R, 1)
    block_scale: float  # s

    @classmethod
    def scaled(cls, inputs: int, depth: int, width: int, units: int, strength: float | Tensor) -> "ResidualNet":
        """Create a network whose blocks are divided by depth times width, ``s = 1/LM``."""
        return cls(inputs, depth, width, units, strength, block_scale=1 / (depth * width))

    def split(self, W: Tensor) -> UnitWeights:
        """View weights ``(R, P)``, or anything that has one number for each of them, by kind."""
        L, M, K, d = self.depth, self.width, self.units, self.inputs
        u, w, b, a, c, e = W.split([L * M * d, L * M * d, L * M, K, K * d, K], dim=1)
        R = len(W)
        return UnitWeights(u.view(R, L, M, d), w.view(R, L, M, d), b.view(R, L, M), a, c.view(R, K, d), e)

    def start(self, generator: torch.Generator) -> Tensor:
        """Draw weights ``(P,)`` with which the network is the zero function.

        Output units come in pairs (a, c, e), (-a, c, e).
        """
        L, M, K, d = self.depth, self.width, self.units, self.inputs

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        u, w, b = normal(L, M, d), INNER_DEVIATION * normal(L, M, d), normal(L, M)
        a, c, e = normal(K // 2), INNER_DEVIATION * normal(K // 2, d), normal(K // 2)
        parts = (u, w, b, torch.cat([a, -a]), torch.cat([c, c]), torch.cat([e, e]))
        return torch.cat([part.flatten() for part in parts])

    def deviations(self) -> Tensor:
        """Standard deviations of the weights at the start ``(P,)``."""
        L, M, K, d = self.depth, self.width, self.units, self.inputs
        sizes = [L * M * d, L * M * d, L * M, K, K * d, K]  # of u, w, b, a, c, e
        values = [1.0, INNER_DEVIATION, 1.0, 1.0, INNER_DEVIATION, 1.0]
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))

    def rates(self) -> Tensor:
        """Learning rates of the weights ``(P,)``: 1/s in blocks, K in output units."""
        blocks = self.depth * self.width * (2 * self.inputs + 1)
        outputs = self.units * (self.inputs + 2)
        return torch.tensor([1 / self.block_scale] * blocks + [float(self.units)] * outputs, dtype=torch.float64)

    def features(self, W: Tensor, x: Tensor) -> Tensor:
        """Compute the features after the last block, ``z_L(x_i)`` ``(R, n, d)``.

        Inputs are ``(n, d)``, the same for all runs, or ``(R, n, d)``.
        """
        return self._forward(self.split(W), x)[0][-1]

    def outputs(self, W: Tensor, x: Tensor) -> Tensor:
        """Compute the outputs of all runs, ``f(x_i)`` ``(R, n)``."""
        units = self.split(W)
        z = self._forward(units, x)[0][-1]
        return self._output(units, torch.tanh(torch.baddbmm(units.e[:, None], z, units.c.mT)))

    def _forward(self, units: UnitWeights, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Compute features z_0 to z_L ``(R, n, d)``, and ``tanh(w·z_{l-1} + b)`` ``(R, n, M)`` for l = 1 to L."""
        z, hidden = [x.expand(len(units.u), *x.shape[-2:])], list[Tensor]()
        for u, w, b in zip(units.u.unbind(1), units.w.unbind(1), units.b.unbind(1), strict=True):
            hidden.append(torch.tanh(torch.baddbmm(b[:, None], z[-1], w.mT)))
            z.append(torch.baddbmm(z[-1], hidden[-1], u, alpha=self.block_scale))
        return z, hidden

    def _output(self, units: UnitWeights, hidden: Tensor) -> Tensor:
        return (hidden @ units.a[..., None])[..., 0] * (self.strength / self.units)

    def _backward(self, units: UnitWeights, dh: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Propagate a derivative in the last features, ``∂/∂z_L`` ``(R, n, d)``, back through the blocks.

        The result is ``∂/∂z_l`` ``(R, L, n, d)`` and ``u_lm·∂/∂z_l`` ``(R, L, n, M)`` for l ≥ 1.
        """
        p, along = [last], list[Tensor]()
        for u, w, slope in zip(*(part.unbind(1)[::-1] for part in (units.u, units.w, dh)), strict=True):
            along.append(p[-1] @ u.mT)
            p.append(torch.baddbmm(p[-1], along[-1] * slope, w, alpha=self.block_scale))
        return torch.stack(p[-2::-1], 1), torch.stack(along[::-1], 1)

    def evaluate(self, W: Tensor, x: Tensor, y: Tensor) -> Evaluation:
        """Compute losses, velocities, and the mean divergence of the velocity over output and over block units."""
        units = self.split(W)
        z, hidden = self._forward(units, x)
        t = torch.tanh(torch.baddbmm(units.e[:, None], z[-1], units.c.mT))
        r = self._output(units, t) - y
        n = y.shape[-1]
        pull = (self.strength / n) * r  # -1 times it is what an output unit sees of an example
        dt = 1 - t.square()
        outer = pull[..., None] * units.a[:, None] * dt  # (R, n, K)
        slopes = [(pull[:, None] @ t)[:, 0], outer.mT @ z[-1], outer.sum(1)]
        size = z[-1].square().sum(2) + 1
        output_divergence = 2 * (outer * t * size[..., None]).sum((1, 2)) / self.units  # tanh'' = -2 tanh tanh'
        h, before = torch.stack(hidden, 1), torch.stack(z[:-1], 1)
        dh = 1 - h.square()
        p, along = self._backward(units, dh, outer @ units.c / self.units)
        inner = along * dh
        blocks = [h.mT @ p, inner.mT @ before, inner.sum(2)]
        size = before.square().sum(3) + 1
        block_divergence = 2 * (inner * h * size[..., None]).sum((1, 2, 3)) / (self.depth * self.width)
        g = torch.cat([part.flatten(1) for part in (*blocks, *slopes)], 1)
        return Evaluation(r.square().sum(1) / (2 * n), g, output_divergence, block_divergence)

    def field(self, W: Tensor, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Give the velocity of any output units ``(J, d + 2)`` in the law of one run.

        ``ω̇ = -(β/n) Σ_i r_i (t, a ṫ z_L(x_i), a ṫ)``
        """
        z, n = self.features(W, x)[0], len(y)
        pull = (self.strength / n * (self.outputs(W, x) - y))[0]

        def velocity(units: Tensor) -> Tensor:
            a, c, e = units[:, 0], units[:, 1:-1], units[:, -1]
            t = torch.tanh(c @ z.T + e[:, None])
            outer = a[:, None] * pull * (1 - t.square())
            return -torch.cat([(t @ pull)[:, None], outer @ z, outer.sum(1, keepdim=True)], 1)

        return velocity

    def input_jacobian(self, w: Tensor, x: Tensor) -> Tensor:
        """Compute the Jacobian of the blocks of one network ``(P,)`` at inputs ``(n, d)``.

        ``∂z_L/∂x = Π_l (I + s Σ_m ṫ_lm u_lm w_lmᵀ)`` ``(n, d, d)``
        """
        units = self.split(w[None])
        product = torch.eye(self.inputs, dtype=w.dtype).expand(len(x), -1, -1)
        _, hidden = self._forward(units, x)
        for u, v, h in zip(units.u[0], units.w[0], hidden, strict=True):
            block = torch.einsum("nm,md,me->nde", 1 - h[0].square(), u, v)
            product = product + self.block_scale * block @ product
        return product

    def gram(self, W: Tensor, x: Tensor) -> Tensor:
        """Compute the kernel of each run in closed form ``(R, n, n)`` [N33].

        ``G = s Σ_lm [t t' q·q' + (u·q)(u·q') ṫ ṫ' (z·z' + 1)] + (β²/K) Σ_k [t t' + a² ṫ ṫ' (z·z' + 1)]``,
        with ``q = ∂f/∂z_l``, t the tanh of a unit at an input, ṫ its derivative.
        """
        units = self.split(W)
        z, hidden = self._forward(units, x)
        t = torch.tanh(torch.baddbmm(units.e[:, None], z[-1], units.c.mT))
        outer = units.a[:, None] * (1 - t.square())
        strength = torch.as_tensor(self.strength, dtype=W.dtype).view(-1, 1, 1)
        kernel = t @ t.mT + (outer @ outer.mT) * (z[-1] @ z[-1].mT + 1)
        kernel = kernel * strength**2 / self.units
        h, before = torch.stack(hidden, 1), torch.stack(z[:-1], 1)
        dh = 1 - h.square()
        p, along = self._backward(units, dh, outer @ units.c * (strength / self.units))
        inner = along * dh
        blocks = (h @ h.mT) * (p @ p.mT) + (inner @ inner.mT) * (before @ before.mT + 1)
        return kernel + self.block_scale * blocks.sum(1)
