"""Checks of a model: what has no curvature is refused, with what to do about it."""

from collections.abc import Iterable, Mapping
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidValue


def check_parameters(params: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse models with nothing to train, and parameters on several devices or of kinds without derivatives."""
    if not params:
        raise InvalidValue(f"{type(model).__name__} has no trainable parameter; set requires_grad on at least one")
    devices = sorted({str(p.device) for p in params.values()})
    if len(devices) > 1:
        raise InvalidValue(
            f"trainable parameters are on several devices ({', '.join(devices)}); bring them to one, or freeze those"
            " that are not trained"
        )


def work_dtype(params: Iterable[Tensor]) -> torch.dtype:
    """Return the precision in which weights are flattened: double where any is, else single, also for lower ones."""
    double = (torch.float64, torch.complex128)
    return torch.float64 if any(p.dtype in double for p in params) else torch.float32


def check_loss(loss: Any) -> None:
    """Refuse a loss that is not a finite differentiable scalar."""
    if not isinstance(loss, Tensor):
        raise InvalidValue(f"the loss is a {type(loss).__name__}, not a tensor; return the mean loss as a tensor")
    if loss.dim() != 0:
        raise InvalidValue(f"the loss has shape {tuple(loss.shape)}, not (); reduce it to a mean over the batch")
    if not loss.requires_grad:
        raise InvalidValue("the loss cannot be differentiated: nothing trainable leads to it (detach? no_grad?)")
    if not loss.isfinite():
        raise InvalidValue(f"the loss is {loss.item()} at the start; curvature needs a finite loss")


def droppers(model: nn.Module, recurrent_only: bool) -> list[tuple[str, nn.Module]]:
    """Find the modules that may drop at random; `smooth` cannot keep recurrent ones from it."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(_rate(m), float)]
    return [(name, m) for name, m in found if not recurrent_only or isinstance(m, nn.RNNBase)]


def check_deterministic(droppers: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse modules that drop at random now: the loss would be no function of the weights."""
    for name, module in droppers:
        p = _rate(module)
        if module.training and isinstance(p, float) and p > 0:
            cure = "call .eval() on that module or set its rate to 0"
            if not isinstance(module, nn.RNNBase):
                cure += ", or measure the loss without it: Objective(..., without_dropout=True)"
            raise InvalidValue(
                f"dropout is on in '{name}' ({type(module).__name__}, p={p}): the loss is random, so its curvature is"
                f" not defined; {cure}"
            )


def _rate(module: nn.Module) -> Any:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    return getattr_static(module, "dropout", None)  # what somebody else's class computes may warn
