"""The slow drift of SGD and Adam along a manifold of minimizers, where labels are noisy.

With noise of deviation σ on the labels of n examples the gradient at a minimizer has the covariance αH, H = ∇²L and
α = σ²/n.  A rule that moves weights by ``-η S∇L`` then scatters around the minimizers with the covariance ``αη/2 S`` in
all directions that the loss sees, and this pushes it along them.  With f_i the outputs, J their slopes,
D = diag(H) = mean_i J_i² and Π the projection along S Jᵀ on the null space of J, in the time τ = η²·steps:

    dw/dτ = -(α/4) Π S ∇tr(S H),   S constant in the gradient
    SGD    S = 1                  dw/dτ = -(α/4) Π ∇tr(H)
    Adam   S = 1/(√(αD) + eps)    dw/dτ = -½ Π D^(-1/2) ∇tr(D^(1/2)) for eps = 0: the noise cancels

for √v → √(αD), which takes β2 near 1 and v that forgets faster than w moves.  Momentum changes nothing at this order.

n examples, P weights.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...optimizers.adaptive import Adam
from ...optimizers.base import UpdateRule

Array = NDArray[np.float64]


def step_sizes(J: Array, alpha: float, rule: UpdateRule) -> Array:
    """The diagonal of S ``(P,)`` of SGD or Adam at a minimizer, from the slopes J ``(n, P)``."""
    D = np.square(J).mean(0)
    return np.asarray(1 / (np.sqrt(alpha * D) + rule.eps)) if isinstance(rule, Adam) else np.ones_like(D)


def drift(J: Array, alpha: float, rule: UpdateRule, pull: Callable[[Array], Array]) -> Array:
    """The velocity ``-(α/4) Π S ∇tr(S H)`` ``(P,)``; `pull` takes S to the gradient of the trace, S constant in it."""
    S = step_sizes(J, alpha, rule)
    v = S * pull(S)
    SJ = S[:, None] * J.T
    return np.asarray(-alpha / 4 * (v - SJ @ np.linalg.lstsq(J @ SJ, J @ v, rcond=1e-12)[0]))


def root_trace(D: Array) -> Array:
    """Sum the roots of D over the last axis, ``tr(D^(1/2))``, which Adam reduces."""
    return np.asarray(np.sqrt(D).sum(-1))
