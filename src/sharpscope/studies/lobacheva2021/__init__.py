"""With batch normalization and weight decay training is smooth up to a border, and jumps from there on.

Weight decay shrinks the norm and so raises the effective learning rate.  At first sharpness gives way, and training
rides its edge smoothly.  Where it cannot be reduced further the loss jumps, the norm grows, and a new period begins;
with a large enough eps in the normalization it does not come so far.

That destabilizations recur without divergence, and that equilibrium and instability are two sides of this, is what the
paper's abstract says.  Derived here, for linear regression with batch normalization: bursts grow by
γ = (4 - 3k²)(1 - ρ²) - 6ρ² per unit of τ = il·t, with ρ = eps/eps* and eps* = lr k³ √il, above which there is no edge.
So whether bursts go on is decided by the loss (k² against 4/3) and by eps/(lr √il), not by il alone.  Measured here, on
a network: jumps begin at one effective rate, near that at which training on the sphere ceases to converge.
"""

from .._framework.study import Job
from . import network, toy
from .config import QUICK, Config

__all__ = ["CHARTS", "CLAIMS", "PAPER", "QUICK", "Config", "jobs"]

PAPER = (
    "Lobacheva, Kodryan, Chirkova, Malinin & Vetrov, On the Periodic Behavior of Neural Network Training with Batch"
    " Normalization and Weight Decay (NeurIPS 2021, arXiv 2106.15739)"
)

CLAIMS = network.CLAIMS + toy.CLAIMS
CHARTS = network.CHARTS + toy.CHARTS


def jobs(config: Config) -> list[Job]:
    """Everything that can run side by side."""
    return network.jobs(config) + toy.jobs(config)
