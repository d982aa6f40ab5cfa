"""Watching a training loop: when to measure, what it means, and what to do."""

from .along_step import AlongStep, BatchSharpness, GradientNoise, StepMeter, UpdateCosine
from .finding import Finding
from .meters import Meter
from .monitor import Monitor
from .recorder import Sink as Sink
from .schedules import log_spaced

__all__ = [
    "AlongStep",
    "BatchSharpness",
    "Finding",
    "GradientNoise",
    "Meter",
    "Monitor",
    "StepMeter",
    "UpdateCosine",
    "log_spaced",
]
