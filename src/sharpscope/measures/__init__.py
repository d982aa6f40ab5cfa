"""The measured quantities, one equation each, and what their numbers are worth."""

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
    "error_budget",
    "eta_lambda",
    "label_of",
    "midpoint",
    "product_sphere_sharpness",
    "sharpness",
    "spherical_sharpness",
    "stability_ratio",
    "top_eigenpairs",
]
