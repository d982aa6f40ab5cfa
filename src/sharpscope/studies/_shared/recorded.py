"""Gradients as fixed programs: where a network is small, much of a step goes into autograd, modules and modes.

A recorded objective is the same function with the same gradient to the last bit, in a third of the time on small
networks: its gradient is a list of the kernels that autograd would call.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...autodiff.data import Batch
from ...autodiff.objective import Objective
from ...autodiff.tracing import interpreted, record
from ...errors import CannotTrace

WORTHWHILE = 1000
"""Gradients from which on a recording, of a second and more, pays."""

CHECKS = 20
"""Points at which a program has to give the same bits."""

Program = Callable[..., tuple[Tensor, ...]]


class Recorded(Objective):
    """An objective whose `value_and_grad` runs a program for a batch of that shape; made by `recorded`."""

    programs: dict[int, Program | None]
    first: tuple[Tensor, Tensor, Tensor]  # weights, inputs and targets that programs are recorded and checked on
    training: bool

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The loss ``L(w)`` and its gradient ``∇L(w)`` ``(P,)``."""
        pair = _pair(self.data)
        if pair is None or self.model.training != self.training:
            return Objective.value_and_grad(self, w)
        x, y = pair
        if len(x) not in self.programs:
            self.programs[len(x)] = _program(self, len(x))
        program = self.programs[len(x)]
        if program is None:
            return Objective.value_and_grad(self, w)
        with torch.no_grad():
            value, g = program(w, x, y, *(b for _, b in self.model.named_buffers()))
        return value, g


def recorded(f: Objective, gradients: int) -> Objective:
    """The objective with a recorded gradient if so many are worth it, used where it gives the same bits."""
    pair = _pair(f.data)
    if gradients < WORTHWHILE or pair is None:
        return f
    other = object.__new__(Recorded)
    other.__dict__ = {**f.__dict__, "programs": {}, "first": (f.weights(), *pair), "training": f.model.training}
    return other


def _pair(data: object) -> tuple[Tensor, Tensor] | None:
    """The one batch of the data, if it is one of two tensors."""
    if not isinstance(data, Sequence) or len(data) != 1 or not isinstance(data[0], tuple) or len(data[0]) != 2:
        return None
    x, y = data[0]
    return (x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else None


def _program(f: Recorded, n: int) -> Program | None:
    """The program for n examples; None where it would not give the same bits."""
    names = [name for name, _ in f.model.named_buffers()]
    w, x, y = f.first[0], f.first[1][:n], f.first[2][:n]
    rest = (x, y, *(b for _, b in f.model.named_buffers()))

    def whole(w: Tensor, x: Tensor, y: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
        """The arithmetic of `Objective.value_and_grad` for one batch, operation by operation."""
        loss, g = f.of_batch(w, Batch((x,), {}, y, n), dict(zip(names, buffers, strict=True)))
        return (w.new_zeros(()) + n * loss) / n, torch.zeros_like(w).add(g, alpha=n) / n

    try:
        program = interpreted(record(whole, (w, *rest), factored=()), (w, *rest))
    except CannotTrace:
        return None
    plain = Objective.on(f, [(x, y)])
    for i in range(CHECKS):
        at = w.roll(i)
        with torch.no_grad():
            pairs = zip(Objective.value_and_grad(plain, at), program(at, *rest), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            return None
    return program
