"""Normalization layers let weight decay reduce sharpness.

When a loss does not notice the scale of the weights, gradient descent with weight decay drives itself to the edge of
stability and then, instead of stopping at a minimum, slides along the minima towards flatter ones: the spherical
sharpness λ1 keeps falling while η̃λ1 stays near 2.  Without weight decay, or without normalization, it does not.

Measured here on toys whose minima are known in closed form, on linear regression and matrix completion with batch
normalization, on a small regression network, on handwritten digits, and on images of MNIST or of your own, where what
it gains on the test set is decided.
"""

from typing import Any

from .._framework.study import Job
from . import benefit, completion, digits, network, regression, sphere
from .config import QUICK, Config

__all__ = ["CHARTS", "CLAIMS", "PAPER", "QUICK", "Config", "jobs"]

PAPER = (
    "Lyu, Li & Arora, Understanding the Generalization Benefit of Normalization Layers: Sharpness Reduction"
    " (NeurIPS 2022, arXiv 2206.07085)"
)
PARTS: dict[str, Any] = {
    "sphere": sphere,
    "regression": regression,
    "completion": completion,
    "network": network,
    "digits": digits,
    "benefit": benefit,
}
OLD_COLUMNS = {
    "threshold": "spherical_threshold",
    "line": "spherical_threshold",
    "residual": "relative_residual",
}

CLAIMS = tuple(claim for part in PARTS.values() for claim in part.CLAIMS)
CHARTS = tuple(chart for part in PARTS.values() for chart in part.CHARTS)


def jobs(config: Config) -> list[Job]:
    """Everything that can run side by side."""
    return [job for name in config.parts for job in PARTS[name].jobs(config)]
