"""Measure and predict the sharpness of networks with normalization layers.

>>> import torch, sharpscope as ss
>>> from torch import nn
>>> net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16, affine=False), nn.Tanh(), nn.Linear(16, 1))
>>> batches = [(torch.randn(32, 8), torch.randn(32, 1)) for _ in range(3)]
>>> f = ss.Objective(net, nn.functional.mse_loss, batches)
>>> ss.sharpness(f) > 0, ss.spherical_sharpness(f) > 0
(True, True)
>>> sorted(ss.find_groups(f).groups)
['0.weight']
"""

from .bounds import Comparison
from .budget import ErrorBudget, error_budget
from .doctor import Checkup, doctor
from .eigen import Eigenpairs, NotConverged, NotFinite, ends, lanczos
from .history import History
from .invariance import ScaleGroups, find_groups
from .iterate import Iterate, midpoint
from .measures import product_sphere_sharpness, sharpness, spherical_sharpness, top_eigenpairs
from .monitor import Monitor
from .objective import Objective
from .operators import SymmetricOperator, gauss_newton, hessian, preconditioned, projected, restricted
from .quadrature import Density, density
from .rules import GD, SphericalRMSprop, UpdateRule, rule_of
from .smooth import smooth
from .spectrum import Estimate, block_tops, diagonal, most_negative, shares, trace
from .tracking import track

__all__ = [
    "GD",
    "Checkup",
    "Comparison",
    "Density",
    "Eigenpairs",
    "ErrorBudget",
    "Estimate",
    "History",
    "Iterate",
    "Monitor",
    "NotConverged",
    "NotFinite",
    "Objective",
    "ScaleGroups",
    "SphericalRMSprop",
    "SymmetricOperator",
    "UpdateRule",
    "block_tops",
    "density",
    "diagonal",
    "doctor",
    "ends",
    "error_budget",
    "find_groups",
    "gauss_newton",
    "hessian",
    "lanczos",
    "midpoint",
    "most_negative",
    "preconditioned",
    "product_sphere_sharpness",
    "projected",
    "restricted",
    "rule_of",
    "shares",
    "sharpness",
    "smooth",
    "spherical_sharpness",
    "top_eigenpairs",
    "trace",
    "track",
]
