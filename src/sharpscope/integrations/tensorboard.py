"""Sends measurements to TensorBoard, as scalars.

from sharpscope.integrations.tensorboard import sink

writer = SummaryWriter("runs/first")
monitor = Monitor(f, optimizer, sinks=[sink(writer)])
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..monitoring import Finding, Sink
from . import named

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def sink(writer: "SummaryWriter") -> Sink:
    """Make a sink that writes to `writer`, whose closing remains yours."""

    return _Sink(writer)


class _Sink:
    """Writes numbers as scalars, and findings as text when they first hold."""

    def __init__(self, writer: "SummaryWriter") -> None:
        self._writer = writer

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in named(values).items():
            self._writer.add_scalar(name, value, step)

    def finding(self, finding: Finding, step: int) -> None:
        """Write the sentences of a finding, by its name."""
        self._writer.add_text(f"sharpscope/{finding.name}", str(finding), step)
