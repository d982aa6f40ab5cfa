"""The measured quantities, one equation each, and what their numbers are worth."""

from .along_step import StepGain, batch_sharpness, critical_step, curvature_along_step, noise_scale, step_gain
from .columns import label_of
from .error_budget import ErrorBudget, error_budget
from .iterate import Iterate, midpoint
from .measures import (
    eta_lambda,
    product_sphere_sharpness,
    sharpness,
    spherical_sharpness,
    stability_ratio,
    top_eigenpairs,
)

__all__ = [
    "ErrorBudget",
    "Iterate",
    "StepGain",
    "batch_sharpness",
    "critical_step",
    "curvature_along_step",
    "error_budget",
    "eta_lambda",
    "label_of",
    "midpoint",
    "noise_scale",
    "product_sphere_sharpness",
    "sharpness",
    "spherical_sharpness",
    "stability_ratio",
    "step_gain",
    "top_eigenpairs",
]
