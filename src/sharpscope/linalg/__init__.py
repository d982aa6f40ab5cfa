"""Linear algebra of a symmetric operator: eigenpairs, trace and density, each with its error."""

from .blocks import block_eigenpairs, group_fractions
from .bounds import Comparison
from .density import Density, density
from .eigenpairs import Eigenpairs
from .lanczos import both_ends, lanczos, smallest_eigenpairs
from .largest import largest_eigenpair
from .operators import SymmetricOperator, preconditioned, projected, restricted, scaled, shifted
from .rightmost import Rightmost, rightmost
from .trace import Estimate, diagonal, trace
from .warm_start import warm_started

__all__ = [
    "Comparison",
    "Density",
    "Eigenpairs",
    "Estimate",
    "Rightmost",
    "SymmetricOperator",
    "block_eigenpairs",
    "both_ends",
    "density",
    "diagonal",
    "group_fractions",
    "lanczos",
    "largest_eigenpair",
    "preconditioned",
    "projected",
    "restricted",
    "rightmost",
    "scaled",
    "shifted",
    "smallest_eigenpairs",
    "trace",
    "warm_started",
]
