"""Update rules of optimizers as values, and the curvature at which each becomes unstable."""

from .adaptive import Adam, RMSprop
from .base import PerWeight, Stability, UpdateRule
from .declared import same_steps
from .descend import descend
from .equivalences import ExponentialRate, ProjectedGD, as_decayed, as_exponential, as_projected, as_rmsprop, rescaled
from .from_torch import rule_of, rules_of, stability_of, state_of
from .gd import GD
from .laws import ASGD, Adadelta, Adafactor, Adagrad, Adamax, AMSGrad, CenteredRMSprop, NAdam, RAdam
from .scalar import ScalarRMSprop, SphericalRMSprop
from .weight_kinds import ParamGroups, param_groups

__all__ = [
    "ASGD",
    "GD",
    "AMSGrad",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "CenteredRMSprop",
    "ExponentialRate",
    "NAdam",
    "ParamGroups",
    "PerWeight",
    "ProjectedGD",
    "RAdam",
    "RMSprop",
    "ScalarRMSprop",
    "SphericalRMSprop",
    "Stability",
    "UpdateRule",
    "as_decayed",
    "as_exponential",
    "as_projected",
    "as_rmsprop",
    "descend",
    "param_groups",
    "rescaled",
    "rule_of",
    "rules_of",
    "same_steps",
    "stability_of",
    "state_of",
]
