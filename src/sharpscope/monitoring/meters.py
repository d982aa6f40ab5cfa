"""Meters: what can be read along every step of a training, beside the curvature that is measured now and then."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import warn

from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.objective import Objective


@dataclass(frozen=True)
class Step:
    """A step that the optimizer has taken: its number, and what the loop has handed over about it.

    `given` is the loss of the batch before the step, as it came, and `batch` the batch, in the form of the objective's
    own; None where the loop gives none.
    """

    number: int
    objective: Objective
    given: float | Tensor | None = None
    batch: Any = None

    @property
    def loss(self) -> float | None:
        """The loss as a number; waits for the device that it is on."""
        return self.given.item() if isinstance(self.given, Tensor) else self.given


class Meter:
    """Something that is read along the steps: subclass it, and hand it to ``Monitor(..., meters=[...])``.

    Nothing that it does may change the training: it reads weights, gradients and the optimizer's state, and draws no
    random numbers but from a generator of its own.
    """

    every: int = 1
    """Number of steps between two that are read."""

    def before(self, optimizer: Optimizer, objective: Objective) -> None:
        """Look at the weights and gradients that an optimizer is about to step from; called for each optimizer."""

    def after(self, optimizer: Optimizer, objective: Objective) -> None:
        """Look at the weights after the step of an optimizer, whose gradients are still those of the step."""

    def read(self, step: Step) -> Mapping[str, float]:
        """Columns of the row of this step, from what `before` and `after` saw."""
        return {}


class Meters:
    """The meters of a monitored run; one that fails is left out from then on, and the run goes on."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = list(meters)

    def __bool__(self) -> bool:
        return bool(self._meters)

    def before(self, step: int, optimizer: Optimizer, objective: Objective) -> None:
        """Let those that are due at this step look at what it starts from."""
        self._each(step, lambda meter: meter.before(optimizer, objective))

    def after(self, step: int, optimizer: Optimizer, objective: Objective) -> None:
        """Let those that are due at this step look at what it has changed."""
        self._each(step, lambda meter: meter.after(optimizer, objective))

    def read(self, step: Step) -> dict[str, float]:
        """Columns of all that are due at this step."""
        row: dict[str, float] = {}
        self._each(step.number, lambda meter: row.update(meter.read(step)))
        return row

    def _each(self, step: int, look: Callable[[Meter], None]) -> None:
        for meter in list(self._meters):
            if step % meter.every:
                continue
            try:
                look(meter)
            except Exception as error:  # a run is not stopped for being watched
                self._meters.remove(meter)
                warn(f"{type(meter).__name__} failed at step {step}, and reads no more: {error!r}", stacklevel=4)
