"""Checks of a model: what has no curvature is refused, with what to do about it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidValue


def check_parameters(params: Mapping[str, Tensor]) -> None:
    """Refuse parameters of several kinds, or of a precision too low for curvature."""
    kinds = {(p.dtype, p.device) for p in params.values()}
    if len(kinds) > 1:
        seen = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise InvalidValue(f"trainable parameters are of several kinds ({seen}); bring them to one dtype and device")
    ((dtype, _),) = kinds
    if dtype not in (torch.float32, torch.float64):
        raise InvalidValue(f"trainable parameters are {dtype}; curvature needs float32 or float64: call model.float()")


def check_sparse(model: nn.Module) -> None:
    """Refuse modules whose gradients are sparse."""
    sparse = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
    if sparse:
        raise InvalidValue(f"'{sparse[0]}' has sparse gradients, which have no derivative; use sparse=False")


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
    return module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", None)
