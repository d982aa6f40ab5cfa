"""A model, a loss and data as one smooth function of the weights, and its derivatives."""

from .batched import BatchedRuns
from .curvature import gauss_newton, hessian
from .objective import Objective
from .smooth import smooth
from .tuning import Checkup, tune

__all__ = [
    "BatchedRuns",
    "Checkup",
    "Objective",
    "gauss_newton",
    "hessian",
    "smooth",
    "tune",
]
