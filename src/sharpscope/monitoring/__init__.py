"""Watching a training loop: when to measure, what it means, and what to do."""

from .finding import Finding
from .meters import Meter
from .monitor import Monitor
from .recorder import Sink as Sink
from .schedules import log_spaced

__all__ = [
    "Finding",
    "Meter",
    "Monitor",
    "log_spaced",
]
