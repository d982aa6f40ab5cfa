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

from .autodiff.batched import Replicas
from .autodiff.curvature import gauss_newton, hessian
from .autodiff.objective import Objective
from .autodiff.smooth import smooth
from .autodiff.tuning import Checkup, doctor
from .errors import FlowStuck, NoMinimizer, NotConverged, NotFinite, WrongThirdDerivative
from .flows.central import Flow, central_flow, gradient_flow, sphere_flow, stable_flow
from .flows.compare import Prediction, compare
from .flows.explicit import multirate
from .flows.implicit import implicit
from .flows.integrate import integrate
from .flows.path import Path
from .flows.sharpness_reduction import ReductionFlow, sharpness_reduction
from .linalg.bounds import Comparison
from .linalg.density import Density, density
from .linalg.eigenpairs import Eigenpairs
from .linalg.lanczos import block_tops, ends, lanczos, most_negative, shares
from .linalg.operators import SymmetricOperator, preconditioned, projected, restricted
from .linalg.trace import Estimate, diagonal, trace
from .linalg.warm_start import track
from .measures.error_budget import ErrorBudget, error_budget
from .measures.iterate import Iterate, midpoint
from .measures.measures import product_sphere_sharpness, sharpness, spherical_sharpness, top_eigenpairs
from .monitoring.diagnosis import Finding
from .monitoring.monitor import Monitor
from .monitoring.schedules import log_spaced
from .optimizers.adaptive import Adam, RMSprop
from .optimizers.base import Stability, UpdateRule
from .optimizers.descend import descend
from .optimizers.equivalences import (
    ExponentialRate,
    ProjectedGD,
    as_decayed,
    as_exponential,
    as_projected,
    as_rmsprop,
    rescaled,
)
from .optimizers.from_torch import rule_of, rules_of, stability_of, state_of
from .optimizers.gd import GD
from .optimizers.scalar import ScalarRMSprop, SphericalRMSprop
from .records.history import History
from .symmetry.scale_groups import ScaleGroups, find_groups
from .symmetry.transform import make_scale_invariant

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
