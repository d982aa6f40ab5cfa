"""Watching a training loop: when to measure, what it means, and what to do."""

from .along_step import AlongStep, BatchSharpness, GradientNoise, StepMeter, UpdateCosine
from .finding import Finding, Findings
from .loss_watch import LossWatch
from .meters import Meter
from .monitor import Monitor
from .recorder import Sink as Sink
from .schedules import log_spaced
from .tensor_table import TensorTable

__all__ = [
    "AlongStep",
    "BatchSharpness",
    "Finding",
    "Findings",
    "GradientNoise",
    "LossWatch",
    "Meter",
    "Monitor",
    "StepMeter",
    "TensorTable",
    "UpdateCosine",
    "log_spaced",
]
