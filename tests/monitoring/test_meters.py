"""Meters: called before and after every step, their columns stand in the history, and they never stop a run."""

from collections.abc import Mapping

import cases
import pytest
import torch
from torch.optim import Optimizer

from sharpscope.autodiff.objective import Objective
from sharpscope.monitoring.meters import Meter, Step
from sharpscope.monitoring.monitor import Monitor


class Lengths(Meter):
    """Length of a step, with the loss that the loop hands over."""

    def __init__(self, every: int = 1, fails_at: int = -1) -> None:
        self.every, self.fails_at = every, fails_at

    def before(self, optimizer: Optimizer, objective: Objective) -> None:
        self.start = objective.weights()

    def after(self, optimizer: Optimizer, objective: Objective) -> None:
        self.length = (objective.weights() - self.start).norm().item()

    def read(self, step: Step) -> Mapping[str, float]:
        if step.number == self.fails_at:
            raise ValueError("no more")
        return {"angle": self.length, "midpoint_loss": -1.0 if step.loss is None else step.loss}


def train(meter: Meter, every: int = 4) -> tuple[Monitor, list[float]]:
    f = cases.plain()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    monitor = Monitor(f, sgd, every=every, meters=[meter])
    x, y = next(iter(f.data))
    lengths = []
    for _ in range(8):
        before = f.weights()
        sgd.zero_grad()
        loss = f.loss(f.model(x), y)
        loss.backward()
        sgd.step()
        monitor.step(loss, (x, y))
        lengths.append((f.weights() - before).norm().item())
    return monitor, lengths


@pytest.mark.parametrize("every", [1, 2])
def test_columns_stand_in_the_history(every: int) -> None:
    monitor, lengths = train(Lengths(every))
    history = monitor.history
    assert history.series("training", "angle").tolist() == lengths[every - 1 :: every]
    assert len(history.series("training", "sharpness")) == 3
    assert len(history) == 1 + 8 // every  # the row of a measurement holds both
    steps, losses = history.table("training", "step", "midpoint_loss")
    assert steps.tolist() == list(range(every, 9, every)) and (losses > 0).all()


def test_a_meter_that_fails_is_left_out() -> None:
    with pytest.warns(UserWarning, match="Lengths failed at step 3, and reads no more"):
        monitor, lengths = train(Lengths(fails_at=3))
    assert monitor.history.series("training", "angle").tolist() == lengths[:2]
    assert len(monitor.history.series("training", "sharpness")) == 3
