"""Products with the Jacobian of a gradient by central differences, each with an error bar."""

from typing import Protocol

import torch
from torch import Tensor


class Field(Protocol):
    """A gradient as a function of the weights ``(P,)``."""

    def grad(self, w: Tensor) -> Tensor: ...


class CentralDifferences:
    """Products with the Hessian by central differences of gradients, extrapolated, each with its relative error bar.

    ``D(h) = (∇L(w + h v) - ∇L(w - h v)) / 2h`` at two steps gives ``(4 D(h/2) - D(h)) / 3`` with an error of order
    h⁴ [N13].  The step is chosen at the first product, from a ladder scaled to ‖w‖/‖v‖ and the precision, as the one
    with the least error estimate.
    """

    def __init__(self, f: Field, w: Tensor) -> None:
        self.f = f
        self.w = w.detach()
        self._step: float | None = None  # its length

    def __call__(self, v: Tensor) -> tuple[Tensor, float]:
        """Multiply by the Hessian; return the error bar beside the product."""
        size = v.norm().item()
        if size == 0:
            return torch.zeros_like(v), 0.0
        if self._step is None:
            start = torch.finfo(v.dtype).eps ** 0.2 * max(self.w.norm().item(), 1e-3)
            steps = [start / 4**i for i in range(6)]
            self._step = min((self._extrapolated(v, step / size)[1], step) for step in steps)[1]
        out, bar = self._extrapolated(v, self._step / size)
        return out, bar / max(out.norm().item(), torch.finfo(v.dtype).tiny)

    def _extrapolated(self, v: Tensor, h: float) -> tuple[Tensor, float]:
        def central(h: float) -> Tensor:
            return (self.f.grad(self.w + h * v) - self.f.grad(self.w - h * v)) / (2 * h)

        wide, near = central(h), central(h / 2)
        bar = (near - wide).norm().item() / 3
        return (4 * near - wide) / 3, bar if bar == bar else float("inf")
