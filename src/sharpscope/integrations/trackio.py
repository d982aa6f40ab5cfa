"""Sends measurements to a trackio run, as metrics.

from sharpscope.integrations.trackio import sink

run = trackio.init(project="first")
monitor = Monitor(f, optimizer, sinks=[sink(run)])
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..monitoring import Sink
from . import named

if TYPE_CHECKING:
    from trackio import Run


def sink(run: "Run") -> Sink:
    """Make a sink that writes to `run`, whose end (``trackio.finish()``) remains yours."""

    def send(step: int, values: Mapping[str, float]) -> None:
        run.log(named(values), step=step)

    return send
