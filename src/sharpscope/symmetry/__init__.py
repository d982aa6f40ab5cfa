"""Scale-invariant groups of weights, and the spheres they live on."""

from .scale_groups import ScaleGroups, find_groups
from .transform import make_scale_invariant

__all__ = [
    "ScaleGroups",
    "find_groups",
    "make_scale_invariant",
]
