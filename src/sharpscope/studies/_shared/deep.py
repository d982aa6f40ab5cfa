"""Deep stacks of equal layers: their outputs, the Jacobian of these in the inputs, and its bound.

    z_l = W_l h_{l-1},   h_l = φ(N_l(z_l)),   h_0 = x,   f = A h_L     or, residual,   h_l = h_{l-1} + φ(N_l(z_l))/L

N_l standardizes over the units of an example (LN) or, unit by unit, over the examples (BN), without parameters and with
eps = 0, or does nothing.  LN(z) = (z - z̄)/σ has the Jacobian (I - 11ᵀ/d - LN(z) LN(z)ᵀ/d)/σ of norm 1/σ, so that for φ
of slope at most one ``‖∂h_L/∂x‖ ≤ ∏_l ‖W_l‖ ∏_{l normalized} 1/σ_l``.

R sets of weights side by side, n examples, width d, depth L; weights ``(R, P)`` are W_1, .., W_L, A one after another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ...autodiff.batched import BatchedRuns, jacobian
from ...linalg.lanczos import both_ends
from ...linalg.operators import restricted
from .streams import stream


@dataclass(frozen=True)
class Stack:
    """L layers of width d on `inputs` numbers; without `outputs` there is no readout A, and f = h_L."""

    inputs: int
    width: int
    depth: int
    outputs: int = 0
    norm: str = "none"  # or LN, BN
    normalized: frozenset[int] | None = None  # the layers l = 1..L that have it; None: all
    activation: str = "relu"  # or tanh
    residual: bool = False

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of W_1, .., W_L and, if there is one, A."""
        d = self.width
        hidden = [(d, self.inputs if l == 0 else d) for l in range(self.depth)]
        return [*hidden, (self.outputs, d)] if self.outputs else hidden

    def draw(self, runs: int, seeds: Sequence[int], gain: float = 1.0, variance: float = 2.0) -> Tensor:
        """Random weights ``(R, P)``, by default those of He's start.

        ``W_l ~ gain·N(0, variance/fan-in)``, ``A ~ gain·N(0, 1/d)``.
        """
        generator = stream(*seeds)
        parts = [torch.randn(runs, p * q, generator=generator, dtype=torch.float64) / q**0.5 for p, q in self.shapes]
        scales = [gain * (variance**0.5 if l < self.depth else 1.0) for l in range(len(parts))]
        return torch.cat([scale * part for scale, part in zip(scales, parts, strict=True)], dim=1)

    def matrices(self, W: Tensor) -> list[Tensor]:
        """The matrices W_1, .., W_L and, if there is one, A, each ``(R, out, in)``."""
        parts = W.split([prod(shape) for shape in self.shapes], dim=1)
        return [part.view(len(W), *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def entries(self, layer: int) -> slice:
        """The entries of the matrix number `layer`, from 0, in a vector of all weights."""
        sizes = [prod(shape) for shape in self.shapes]
        return slice(sum(sizes[:layer]), sum(sizes[: layer + 1]))

    def __call__(self, W: Tensor, x: Tensor) -> Tensor:
        """The outputs f ``(R, n, outputs or d)`` for inputs ``(n, inputs)``."""
        *_, (_, _, h) = self.layers(W, x)
        return h @ self.matrices(W)[-1].mT if self.outputs else h

    def layers(self, W: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Layer by layer z_l, N_l(z_l) and h_l, each ``(R, n, d)``."""
        h = x.expand(len(W), *x.shape)
        for l, w in enumerate(self.matrices(W)[: self.depth]):
            z = h @ w.mT
            y = standardized(z, dim=2 if self.norm == "LN" else 1) if self.is_normalized(l) else z
            new = torch.tanh(y) if self.activation == "tanh" else y.clamp_min(0)
            h = h + new / self.depth if self.residual and l else new
            yield z, y, h

    def is_normalized(self, layer: int) -> bool:
        """Tell whether the layer, counted from 0, has a normalizer."""
        return self.norm != "none" and (self.normalized is None or layer + 1 in self.normalized)

    def deviations(self, W: Tensor, x: Tensor) -> Tensor:
        """Deviations before the normalizers, ``σ_l = ‖z_l - z̄_l‖/√d`` ``(layers, R, n)``; there may be none."""
        found = [z.std(2, correction=0) for l, (z, _, _) in enumerate(self.layers(W, x)) if self.is_normalized(l)]
        return torch.stack(found) if found else W.new_empty(0, len(W), len(x))

    def jacobian(self, W: Tensor, x: Tensor) -> Tensor:
        """The Jacobian ``∂f/∂x`` ``(R, n, out, inputs)`` of every example, layer by layer; not for BN."""
        J = torch.eye(self.inputs, dtype=W.dtype).expand(len(W), len(x), -1, -1)
        for l, ((z, y, _), w) in enumerate(zip(self.layers(W, x), self.matrices(W), strict=False)):
            D = w[:, None] @ J
            if self.is_normalized(l):
                D = D - D.mean(2, keepdim=True)
                D = (D - y[..., None] * (y[..., None, :] @ D) / self.width) / z.std(2, correction=0)[..., None, None]
            slope = 1 - torch.tanh(y).square() if self.activation == "tanh" else (y > 0).to(y)
            D = slope[..., None] * D
            J = J + D / self.depth if self.residual and l else D
        return self.matrices(W)[-1][:, None] @ J if self.outputs else J


def standardized(z: Tensor, dim: int) -> Tensor:
    """The numbers along one axis with mean 0 and variance 1, ``(z - z̄)/σ``."""
    z = z - z.mean(dim, keepdim=True)
    return z * torch.rsqrt(z.square().mean(dim, keepdim=True))


def losses(stack: Stack, x: Tensor, y: Tensor, W: Tensor) -> Tensor:
    """Losses of all runs, ``½ mean ‖f(x_i) - y_i‖²`` ``(R,)``, for targets ``(n, outputs)``."""
    return 0.5 * (stack(W, x) - y).square().sum(2).mean(1)


def log_norms(stack: Stack, W: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The log of ``‖∂f/∂x‖`` at every input, and that of its bound by norms and deviations, each ``(R, n)``."""
    norms = torch.linalg.matrix_norm(stack.jacobian(W, x), 2).log()
    gains = torch.stack([torch.linalg.matrix_norm(w, 2).log() for w in stack.matrices(W)]).sum(0)
    # a full matrix also without normalizers: torch 2.13 takes wrong medians along an expanded axis
    return norms, gains[:, None] - stack.deviations(W, x).log().sum(0)


def jacobian_mismatch(stack: Stack, W: Tensor, x: Tensor) -> float:
    """Largest difference of `Stack.jacobian` from automatic ones, at one set of weights, over the largest entry."""
    automatic = jacobian(lambda X: stack(W, X)[0], x)
    return ((automatic - stack.jacobian(W, x)[0]).abs().max() / automatic.abs().max()).item()


def largest_curvature(f: BatchedRuns, w: Tensor, fixed: int = 0) -> float:
    """Largest |eigenvalue| of the Hessian at w ``(P,)`` in all weights but the last `fixed`, to a few percent."""
    free = restricted(f.operator(w), torch.arange(len(w) - fixed))
    top, low = both_ends(free, rtol=3e-2)
    return max(abs(top.values[0].item()), abs(low[0].item()))
