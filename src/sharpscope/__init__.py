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

from .adaptive import Adam, RMSprop
from .bounds import Comparison
from .budget import ErrorBudget, error_budget
from .diagnose import Finding
from .doctor import Checkup, doctor
from .eigen import Eigenpairs, NotConverged, NotFinite, ends, lanczos
from .equivalences import (
    ExponentialRate,
    ProjectedGD,
    as_decayed,
    as_exponential,
    as_projected,
    as_rmsprop,
    rescaled,
)
from .flows import Flow, central_flow, gradient_flow, sphere_flow, stable_flow
from .history import History
from .integrate import FlowStuck, Path, implicit, integrate, multirate
from .invariance import ScaleGroups, find_groups
from .iterate import Iterate, midpoint
from .measures import product_sphere_sharpness, sharpness, spherical_sharpness, top_eigenpairs
from .monitor import Monitor
from .objective import Objective
from .operators import SymmetricOperator, gauss_newton, hessian, preconditioned, projected, restricted
from .pace import log_spaced
from .predict import Prediction, compare
from .quadrature import Density, density
from .reduction import NoMinimizer, ReductionFlow, sharpness_reduction
from .replicas import Replicas, descend
from .rules import (
    GD,
    ScalarRMSprop,
    SphericalRMSprop,
    Stability,
    UpdateRule,
    rule_of,
    rules_of,
    stability_of,
    state_of,
)
from .smooth import smooth
from .spectrum import Estimate, block_tops, diagonal, most_negative, shares, trace
from .surgery import make_scale_invariant
from .third import WrongThirdDerivative
from .tracking import track

__all__ = [
    "GD",
    "Adam",
    "Checkup",
    "Comparison",
    "Density",
    "Eigenpairs",
    "ErrorBudget",
    "Estimate",
    "ExponentialRate",
    "Finding",
    "Flow",
    "FlowStuck",
    "History",
    "Iterate",
    "Monitor",
    "NoMinimizer",
    "NotConverged",
    "NotFinite",
    "Objective",
    "Path",
    "Prediction",
    "ProjectedGD",
    "RMSprop",
    "ReductionFlow",
    "Replicas",
    "ScalarRMSprop",
    "ScaleGroups",
    "SphericalRMSprop",
    "Stability",
    "SymmetricOperator",
    "UpdateRule",
    "WrongThirdDerivative",
    "as_decayed",
    "as_exponential",
    "as_projected",
    "as_rmsprop",
    "block_tops",
    "central_flow",
    "compare",
    "density",
    "descend",
    "diagonal",
    "doctor",
    "ends",
    "error_budget",
    "find_groups",
    "gauss_newton",
    "gradient_flow",
    "hessian",
    "implicit",
    "integrate",
    "lanczos",
    "log_spaced",
    "make_scale_invariant",
    "midpoint",
    "most_negative",
    "multirate",
    "preconditioned",
    "product_sphere_sharpness",
    "projected",
    "rescaled",
    "restricted",
    "rule_of",
    "rules_of",
    "shares",
    "sharpness",
    "sharpness_reduction",
    "smooth",
    "sphere_flow",
    "spherical_sharpness",
    "stability_of",
    "stable_flow",
    "state_of",
    "top_eigenpairs",
    "trace",
    "track",
]
