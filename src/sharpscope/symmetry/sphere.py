"""Geometry of scale-invariant weights: they live on a sphere, and the radius sets the step size.

When ``L(c w) = L(w)`` for all c > 0, only the direction ``θ = w/‖w‖`` matters.  A step of gradient descent with
weight decay on w is a projected step on the unit sphere with the effective learning rate ``lr/((1 - lr wd) ‖w‖²)``.

P parameters.
"""

import math

import torch
from torch import Tensor

from ..linalg.operators import SymmetricOperator, projected, scaled
from ..linalg.vectors import dot


def direction(w: Tensor) -> Tensor:
    """Scale the weights to unit norm, ``θ = w/‖w‖`` ``(P,)`` [N5]."""
    return w / w.norm()


def tangent(w: Tensor, v: Tensor) -> Tensor:
    """Project v ``(P,)`` onto the tangent space of the sphere at θ = w/‖w‖, ``v - ⟨θ, v⟩ θ`` [N6]."""
    theta = direction(w)
    return v - (theta @ v) * theta


def angle(w: Tensor, z: Tensor) -> Tensor:
    """Angle between w and z in radians; exact for nearly parallel vectors, where arccos loses half the digits."""
    a, b = direction(w), direction(z)
    return 2 * torch.atan2((a - b).norm(), (a + b).norm())


def effective_learning_rate(lr: float, wd: float, radius: float) -> float:
    """Step size of gradient descent with weight decay on the unit sphere, ``lr / ((1 - lr wd) ‖w‖²)`` [N8]."""
    return lr / ((1 - lr * wd) * radius**2)


def rmsprop_constants(lr: float, wd: float) -> tuple[float, float]:
    """Constants of the RMSprop that weight decay amounts to, ``η = √((1-β)/(2β))`` and ``β = (1 - lr wd)⁴`` [N9]."""
    beta = (1 - lr * wd) ** 4
    return math.sqrt((1 - beta) / (2 * beta)), beta


def on_sphere(hessian: SymmetricOperator, w: Tensor) -> SymmetricOperator:
    """Scale the Hessian to that at w/‖w‖, ``‖w‖² ∇²L(w)``, for a scale-invariant L [N7]."""
    return scaled(hessian, dot(w, w))


def riemannian_hessian(hessian: SymmetricOperator, w: Tensor) -> SymmetricOperator:
    """Second derivatives along great circles, ``Π ∇²L(θ) Π`` with Π = I - θθᵀ, for a scale-invariant L."""
    return projected(on_sphere(hessian, w), lambda v: tangent(w, v))
