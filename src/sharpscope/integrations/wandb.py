"""Sends measurements to a run of Weights & Biases, with the steps of the monitor as their axis.

from sharpscope.integrations.wandb import sink

with wandb.init(project="first") as run:
    monitor = Monitor(f, optimizer, sinks=[sink(run)])
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..monitoring import Sink
from . import named

if TYPE_CHECKING:
    from wandb import Run


def sink(run: "Run") -> Sink:
    """Make a sink that writes to `run` and does not move its step, whatever else is logged, and with which steps.

    A run drops what comes for an earlier step than its present one.  So a measurement joins the row that is still open,
    and closes it only if there is a measurement in it already.
    """
    axis = "sharpscope/step"
    run.define_metric(axis, hidden=True)
    run.define_metric("sharpscope/*", step_metric=axis)
    filled = -1

    def send(step: int, values: Mapping[str, float]) -> None:
        nonlocal filled
        if run.step == filled:
            run.log({}, commit=True)
        run.log(named(values) | {axis: step}, commit=False)
        filled = run.step

    return send
