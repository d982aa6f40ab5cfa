"""The measured quantities, one equation each, and what their numbers are worth."""

from .error_budget import ErrorBudget, error_budget
from .iterate import Iterate, midpoint
from .measures import product_sphere_sharpness, sharpness, spherical_sharpness, top_eigenpairs

__all__ = [
    "ErrorBudget",
    "Iterate",
    "error_budget",
    "midpoint",
    "product_sphere_sharpness",
    "sharpness",
    "spherical_sharpness",
    "top_eigenpairs",
]
