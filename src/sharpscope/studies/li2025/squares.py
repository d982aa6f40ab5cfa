"""Regression in the squares of weights, ``f = B (w∘w)``: diagonal linear nets, many of them side by side.

One layer used twice is ``β = w∘w``; two layers with outputs of both signs are ``β = u∘u - v∘v`` with B = [A, -A].

    D = diag(H) = 4 s∘w∘w,  s = mean_i b_i²      tr(H) = 4 Σ s w²      tr(D^(1/2)) = 2 Σ √s |w|     at zero loss

R problems, n examples, P weights, d unknowns.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...optimizers.base import UpdateRule
from .._shared.diagonal import Sensing
from .._shared.ode import flow
from .._shared.streams import stream
from .slow import Array, drift

BLOCK = 500
"""Steps whose noise is drawn at once."""


@dataclass(frozen=True)
class Squares:
    """Problems ``B (w∘w) = y`` with loss ``½ mean_i r_i²``."""

    b: Tensor  # (R, n, P), or (1, n, P) for the same in all
    y: Tensor  # (R, n)

    @cached_property
    def squares(self) -> Array:
        """Mean squares of the columns of B, s ``(R or 1, P)``."""
        return self.b.square().mean(1).numpy()

    def residuals(self, W: Tensor) -> Tensor:
        """Residuals ``(R, n)`` at weights ``(R, P)``."""
        return (self.b @ W.square()[..., None])[..., 0] - self.y

    def losses(self, W: Tensor) -> Tensor:
        """Compute the losses of all problems ``(R,)``."""
        return 0.5 * self.residuals(W).square().mean(1)

    def curvature(self, W: Array) -> Array:
        """The diagonal of the Hessian at zero loss, D ``(.., R, P)``."""
        return 4 * self.squares * np.square(W)

    def descend(
        self, W: Tensor, rule: UpdateRule, steps: int, deviation: float, seeds: tuple[int, ...], points: int
    ) -> Array:
        """Follow a rule with fresh noise on all labels at every step; states at intervals ``(points+1, R, P)``."""
        draw = stream(*seeds)
        back = 2 / self.y.shape[1] * self.b.mT.contiguous()
        state, states = rule.init(W), [W]
        noise = torch.empty(0)
        for t in range(steps // points * points):
            if t % BLOCK == 0:
                noise = deviation * torch.randn(BLOCK, *self.y.shape, generator=draw, dtype=W.dtype)
            r = self.residuals(W) + noise[t % BLOCK]
            W, state = rule.step(W, (back @ r[..., None])[..., 0] * W, state)
            if (t + 1) % (steps // points) == 0:
                states.append(W)
        return torch.stack(states).numpy()

    def flow(self, k: int, w: Array, rule: UpdateRule, alpha: float, at: Array) -> Array:
        """Follow the slow flow of problem k from a minimizer w ``(P,)``: states at the times ``at`` ``(T, P)``."""
        b, s = self.b[k % len(self.b)].numpy(), self.squares[k % len(self.b)]

        def field(y: Array) -> Array:
            return drift(2 * b * y, alpha, rule, lambda S: np.asarray(8 * S * s * y))

        return flow(field, w, float(at[-1]), at=at, method="LSODA", rtol=1e-7, atol=1e-9).states


def one_datum(x: Array, starts: int, seed: int) -> tuple[Squares, Array]:
    """One datum with ``⟨x, w∘w⟩ = 1``, and minimizers ``(starts, d)`` whose squares are spread as U(.1, 1.9).

    The largest square of a start is a quarter larger still.  In the first start weights grow with x, and the largest is
    the sharpest.
    """
    z = np.random.default_rng([941, seed]).uniform(0.1, 1.9, (starts, len(x)))
    z[np.arange(starts), z.argmax(1)] *= 1.25
    z[0] = np.sort(z[0])
    problem = Squares(torch.as_tensor(x)[None, None], torch.ones(starts, 1, dtype=torch.float64))
    return problem, np.sqrt(z / (z @ x)[:, None])


def sensing(equations: int, unknowns: int, sparsity: int, problems: int, seed: int) -> tuple[Squares, list[Sensing]]:
    """Random equations with columns of mean square one, n of them in d unknowns, few of which are not zero."""
    rng, found = np.random.default_rng([942, seed]), []
    for _ in range(problems):
        s = Sensing.draw(equations, unknowns, sparsity, rng)
        signs = rng.choice([-1, 1], unknowns)
        found.append(Sensing(s.a / np.sqrt(np.square(s.a).mean(0)), s.truth * signs))
    a = torch.as_tensor(np.array([s.a for s in found]))
    y = torch.as_tensor(np.array([s.a @ s.truth for s in found]))
    return Squares(torch.cat([a, -a], 2), y), found


def dense_start(problems: list[Sensing], seed: int) -> Array:
    """Minimizers ``(R, 2d)`` with ``u∘u - v∘v`` the solution of least ℓ₂ norm and v of .3 to .6 or more."""
    rng = np.random.default_rng([943, seed])
    least = np.array([np.linalg.pinv(s.a) @ (s.a @ s.truth) for s in problems])
    extra = np.square(rng.uniform(0.3, 0.6, least.shape))
    return np.sqrt(np.concatenate([np.maximum(least, 0) + extra, np.maximum(-least, 0) + extra], 1))


def product(W: Array) -> Array:
    """The vector ``β = u∘u - v∘v`` ``(.., d)`` of weights ``(.., 2d)``."""
    u, v = np.split(np.square(W), 2, axis=-1)
    return np.asarray(u - v)
