"""Independent runs side by side: one computation for a sweep over seeds, step sizes or data.

R runs with P weights each are one tensor ``W`` ``(R, P)``, and their losses ``L_r(w_r)`` one tensor ``(R,)``.  Where
rows do not mix, the gradient of ``Σ_r L_r`` in W holds the gradient of every run in its row, so that one backward pass,
one Hessian product and one step of the optimizer serve all; on small problems, where most of the time goes into
starting operations, R runs then cost little more than one.

Rows may be inputs as well as weights: `jacobian` is that of outputs in the weights of each run, or in each input.

R runs, P weights, n outputs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..linalg.operators import SymmetricOperator
from .objective import Objective
from .second_order import differentiating
from .smooth import smooth
from .tracing import record

RowFunction = Callable[[Tensor], Tensor]
"""A function of each row: ``(R, P)`` to ``(R,)`` or ``(R, n)``."""

GradientFunction = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Losses ``(R,)`` and gradients ``(R, P)`` at weights ``(R, P)`` before step t."""


class BatchedRuns:
    """The losses ``L_r(w_r)`` of R runs, from a function `losses` of all rows, ``(R, P) -> (R,)`` [N32].

    >>> bowls = BatchedRuns(lambda W: 0.5 * (torch.tensor([1.0, 4.0]) * W.square().sum(1)))
    >>> bowls.grad(torch.ones(2, 3)).tolist()
    [[1.0, 1.0, 1.0], [4.0, 4.0, 4.0]]
    """

    def __init__(self, losses: Callable[..., Tensor], constants: Sequence[Tensor] = ()) -> None:
        self.losses = losses  # of W and the constants
        self.constants = tuple(constants)

    @classmethod
    def of(cls, f: Objective) -> "BatchedRuns":
        """Evaluate an objective at R weights at once; normalization keeps R sets of statistics.

        A module that draws random numbers is refused by torch: runs would share them or not, and neither is meant.

        Raises:
            ValueError: its batches are spread over processes.
        """
        if f.processes.size > 1:
            raise InvalidValue(
                f"the batches are spread over {f.processes.size} processes, but runs side by side are computed in one;"
                " deal the runs to the processes, each with an Objective(..., group=None)"
            )

        buffers = f.buffers()

        def losses(W: Tensor, *kept: Tensor) -> Tensor:
            fresh = {name: b.expand(len(W), *b.shape).clone() for name, b in zip(buffers, kept, strict=True)}

            def one(w: Tensor, own: dict[str, Tensor]) -> Tensor:
                params = {**f.unflatten(w), **own}
                parts = [(batch.examples, f.loss_on(batch, params)) for batch in f.batches(w.device)]
                count = sum(n for n, _ in parts)
                return torch.stack([n / count * loss for n, loss in parts]).sum()

            return torch.vmap(one)(W, fresh)

        return cls(losses, tuple(buffers.values()))

    @differentiating()
    def value(self, W: Tensor) -> Tensor:
        """Evaluate the losses ``(R,)``."""
        with smooth(), torch.no_grad():
            return self.losses(W, *self.constants)

    def value_and_grad(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the losses ``(R,)`` and their gradients ``(R, P)`` in one pass."""
        return self._value_and_grad(W, *self.constants)

    @differentiating()
    def _value_and_grad(self, W: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        W = W.detach().requires_grad_()
        with smooth():
            losses = self.losses(W, *constants)
        (g,) = torch.autograd.grad(losses, W, torch.ones(losses.shape, dtype=W.dtype, device=W.device))
        return losses.detach(), g

    def grad(self, W: Tensor) -> Tensor:
        """Evaluate the gradients ``∇L_r(w_r)`` ``(R, P)``."""
        return self.value_and_grad(W)[1]

    def slope(self, W: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """Return losses and gradients, the same at every step: full-batch descent."""
        return self.value_and_grad(W)

    def recorded(self, W: Tensor) -> GradientFunction:
        """Record `slope` as a fixed program for weights of this shape: nothing but the arithmetic is left of a step.

        On small problems it is several times faster.  Whatever else the losses read, data above all, is fixed with it.

        Raises:
            CannotTrace: the losses branch on values, or change from call to call.
        """
        program = record(lambda *inputs: self._value_and_grad(*inputs), (W, *self.constants))

        def slope(now: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
            losses, g = program(now, *self.constants)
            return losses, g

        return slope

    @differentiating()
    def hvp(self, W: Tensor, V: Tensor) -> Tensor:
        """Multiply by the Hessian of each run, ``∇²L_r(w_r) v_r`` ``(R, P)``."""
        return self.products(W)(V)

    @differentiating()
    def products(self, W: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the map ``V -> ∇²L_r(w_r) v_r`` on a graph that is kept, for more than one product at a point."""
        W = W.detach().requires_grad_()
        with smooth():
            total = self.losses(W, *self.constants).sum()
        (g,) = torch.autograd.grad(total, W, create_graph=True)

        def product(V: Tensor) -> Tensor:
            with differentiating():
                return torch.autograd.grad(g, W, V, retain_graph=True, materialize_grads=True)[0]

        return product

    def operator(self, w: Tensor) -> SymmetricOperator:
        """Return the Hessian of one run at w ``(P,)``, for the solvers of eigenvalues."""
        product = self.products(w[None])
        return SymmetricOperator(lambda v: product(v[None])[0], w)

    def hessian(self, W: Tensor) -> Tensor:
        """Return dense Hessians ``(R, P, P)``, column by column for all runs at once."""
        product = self.products(W)
        units = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        return torch.stack([product(unit.expand_as(W)) for unit in units], dim=2)

    def check(self, W: Tensor) -> None:
        """Raise ValueError where the losses are not one number for each row, or a loss depends on another row."""
        R = len(W)
        losses = self.value(W)
        if losses.shape != (R,):
            raise InvalidValue(
                f"losses of shape {tuple(losses.shape)} from weights {tuple(W.shape)}; one a row is needed"
            )
        if R > 1:
            other = W.clone()
            other[1:] = W[1:] + 0.01 * (1 + W[1:].abs())
            first = losses[0].item()
            again = self.value(other)[0].item()
            if not abs(first - again) <= 1e-3 * torch.finfo(W.dtype).eps ** 0.5 * max(abs(first), 1e-30):
                raise InvalidValue(
                    f"the loss of one run went from {first:.8g} to {again:.8g} when the others were moved"
                )


@differentiating()
def jacobian(outputs: RowFunction, X: Tensor) -> Tensor:
    """Return Jacobians ``∂ outputs_r / ∂ x_r`` ``(R, n, P)`` of a function of each row, by n backward passes.

    >>> jacobian(lambda X: X.cumsum(1)[:, 1:], torch.zeros(1, 3)).tolist()
    [[[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]]
    """
    X = X.detach().requires_grad_()
    with smooth():
        out = outputs(X)
    rows = [
        torch.autograd.grad(column.sum(), X, retain_graph=True, materialize_grads=True)[0] for column in out.unbind(1)
    ]
    return torch.stack(rows, dim=1)


def gram(outputs: RowFunction, W: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return neural tangent kernels ``(R, n, n)``, with learning rates s ``(P,)`` [N33].

    ``Σ_p s_p ∂_p f_i ∂_p f_j``.
    """
    J = jacobian(outputs, W)
    return (J if scale is None else J * scale) @ J.mT
