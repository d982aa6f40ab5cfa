"""A fixed effective learning rate on the sphere decides between convergence, chaos and divergence.

Scale-invariant weights are trained on the unit sphere, so that the rate η̃ cannot change by itself.  Below a border the
loss goes to zero; above it, it stands still at a level of its own, whatever the start; far above, the weights are as
good as random ones.

That there are these three regimes is what the paper's abstract says; so are a toy, a network, and the use of the
regimes for better optima.  Derived here: pairs of weights on one sphere, for which the border is 2/A, with A
the sum of the curvatures, and the level above it A/4 - 1/(2η̃).  Chosen here: a network with batch normalization on
digits, full batches, and all criteria.  With a free norm, or without normalization, there are no such regimes.
"""

from .._framework.study import Job
from . import network, toy
from .config import QUICK, Config

__all__ = ["CHARTS", "CLAIMS", "PAPER", "QUICK", "Config", "jobs"]

PAPER = (
    "Kodryan, Lobacheva, Nakhodnov & Vetrov, Training Scale-Invariant Neural Networks on the Sphere Can Happen in Three"
    " Regimes (NeurIPS 2022, arXiv 2209.03695)"
)

CLAIMS = toy.CLAIMS + network.CLAIMS
CHARTS = toy.CHARTS + network.CHARTS


def jobs(config: Config) -> list[Job]:
    """Everything that can run side by side."""
    return toy.jobs(config) + network.jobs(config)
