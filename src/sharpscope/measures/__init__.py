"""The measured quantities, one equation each, and what their numbers are worth."""

from .columns import label_of
from .error_budget import ErrorBudget, error_budget
from .iterate import Iterate, midpoint
from .measures import product_sphere_sharpness, sharpness, spherical_sharpness, top_eigenpairs

__all__ = [
    "ErrorBudget",
    "Iterate",
    "error_budget",
    "label_of",
    "midpoint",
    "product_sphere_sharpness",
    "sharpness",
    "spherical_sharpness",
    "top_eigenpairs",
]
