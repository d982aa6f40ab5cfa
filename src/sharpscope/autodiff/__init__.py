"""A model, a loss and data as one smooth function of the weights, and its derivatives."""

from .batched import BatchedRuns
from .curvature import gauss_newton, hessian, own_entries, sharded, whole_vectors
from .objective import Objective
from .smooth import smooth
from .tuning import Checkup, tune

__all__ = [
    "BatchedRuns",
    "Checkup",
    "Objective",
    "gauss_newton",
    "hessian",
    "own_entries",
    "sharded",
    "smooth",
    "tune",
    "whole_vectors",
]
