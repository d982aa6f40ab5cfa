"""Gradients as fixed programs: where a network is small, much of a step goes into autograd, modules and modes.

A recorded objective is the same function with the same gradient to the last bit, in a third of the time on small
networks: its gradient is a list of the kernels that autograd would call.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...autodiff.data import Batch
from ...autodiff.hvp import on_batch
from ...autodiff.objective import Objective, by_batches
from ...autodiff.tracing import record
from ...errors import CannotTrace

WORTHWHILE = 1000
"""Gradients from which on a recording, of a second and more, pays."""

CHECKS = 20
"""Points at which a program has to give the same bits."""

LossProgram = Callable[..., tuple[Tensor, ...]]


class Recorded:
    """A backend for gradients: a program for each number of examples, checked on the data it was recorded with."""

    def __init__(self, f: Objective, x: Tensor, y: Tensor) -> None:
        self.weights = f.weights()
        self.x = x
        self.y = y
        self.training = f.model.training
        self.programs: dict[int, LossProgram | None] = {}

    def __call__(self, f: Objective, w: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate ``L(w)`` and its gradient ``(P,)``."""
        pair = _pair(f.data)
        if pair is None or f.model.training != self.training:
            return by_batches(f, w)
        x, y = pair
        if len(x) not in self.programs:
            self.programs[len(x)] = self._program(f, len(x))
        program = self.programs[len(x)]
        if program is None:
            return by_batches(f, w)
        value, g = program(w, x, y, *(b for _, b in f.model.named_buffers()))
        return value, g

    def _program(self, f: Objective, n: int) -> LossProgram | None:
        """Record the program for n examples; None where it would not give the same bits."""
        names = [name for name, _ in f.model.named_buffers()]
        w, x, y = self.weights, self.x[:n], self.y[:n]
        rest = (x, y, *(b for _, b in f.model.named_buffers()))

        def whole(w: Tensor, x: Tensor, y: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
            """Do the arithmetic of `by_batches` for one batch, operation by operation."""
            loss, g = on_batch(f, Batch((x,), {}, y, n), w, dict(zip(names, buffers, strict=True)))
            return (w.new_zeros(()) + n * loss) / n, torch.zeros_like(w).add(g, alpha=n) / n

        try:
            program = record(whole, (w, *rest), factored=())
        except CannotTrace:
            return None
        plain = f.on([(x, y)])
        for i in range(CHECKS):
            at = w.roll(i)
            pairs = zip(by_batches(plain, at), program(at, *rest), strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                return None
        return program


def recorded(f: Objective, gradients: int) -> Objective:
    """Give `f` a recorded gradient, if so many gradients are worth it and the program gives the same bits."""
    pair = _pair(f.data)
    if gradients < WORTHWHILE or pair is None:
        return f
    return f.using(gradient=Recorded(f, *pair))


def _pair(data: object) -> tuple[Tensor, Tensor] | None:
    """The one batch of the data, if it is one of two tensors."""
    if not isinstance(data, Sequence) or len(data) != 1 or not isinstance(data[0], tuple) or len(data[0]) != 2:
        return None
    x, y = data[0]
    return (x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else None
