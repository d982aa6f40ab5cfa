"""Continuous flows that predict what training does at the edge of stability."""

from .central import Flow, central, gradient, sphere, stable
from .compare import Prediction, compare
from .explicit import multirate
from .implicit import implicit
from .integrate import integrate
from .path import Trajectory
from .sharpness_reduction import ReductionFlow, sharpness_reduction

__all__ = [
    "Flow",
    "Prediction",
    "ReductionFlow",
    "Trajectory",
    "central",
    "compare",
    "gradient",
    "implicit",
    "integrate",
    "multirate",
    "sharpness_reduction",
    "sphere",
    "stable",
]
