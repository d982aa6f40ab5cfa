"""Sends measurements to TensorBoard, as scalars.

from sharpscope.integrations.tensorboard import sink

writer = SummaryWriter("runs/first")
monitor = Monitor(f, optimizer, sinks=[sink(writer)])
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..monitoring import Sink
from . import named

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def sink(writer: "SummaryWriter") -> Sink:
    """Make a sink that writes to `writer`, whose closing remains yours."""

    def send(step: int, values: Mapping[str, float]) -> None:
        for name, value in named(values).items():
            writer.add_scalar(name, value, step)

    return send
