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

What a first hour needs stands here; the rest is read through its wing, such as ``ss.linalg.trace``.  A wing is loaded
when it is first used, so that ``import sharpscope`` costs little beyond torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import autodiff as autodiff
    from . import errors as errors
    from . import flows as flows
    from . import linalg as linalg
    from . import measures as measures
    from . import monitoring as monitoring
    from . import optimizers as optimizers
    from . import records as records
    from . import report as report
    from . import symmetry as symmetry
    from .autodiff import Objective, hessian
    from .errors import SharpscopeError
    from .measures import sharpness, spherical_sharpness, top_eigenpairs
    from .monitoring import Monitor
    from .optimizers import GD, Adam, RMSprop, param_groups, rule_of
    from .records import History
    from .symmetry import find_groups, make_scale_invariant

__all__ = [
    "GD",
    "Adam",
    "History",
    "Monitor",
    "Objective",
    "RMSprop",
    "SharpscopeError",
    "find_groups",
    "hessian",
    "make_scale_invariant",
    "param_groups",
    "rule_of",
    "sharpness",
    "spherical_sharpness",
    "top_eigenpairs",
]

_WINGS = (
    "errors",
    "linalg",
    "autodiff",
    "symmetry",
    "records",
    "report",
    "optimizers",
    "measures",
    "flows",
    "monitoring",
)


def __getattr__(name: str) -> Any:
    """Load a wing, or the wing of a public name, at its first use."""
    if name in _WINGS:
        return import_module(f".{name}", __name__)
    if name in __all__:
        for wing in _WINGS:
            module = import_module(f".{wing}", __name__)
            if hasattr(module, name):
                globals()[name] = found = getattr(module, name)
                return found
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_WINGS])
