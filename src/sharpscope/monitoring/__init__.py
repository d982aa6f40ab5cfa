"""Watching a training loop: when to measure, what it means, and what to do."""

from .diagnosis import Finding
from .monitor import Monitor
from .recorder import Sink as Sink
from .schedules import log_spaced

__all__ = [
    "Finding",
    "Monitor",
    "log_spaced",
]
