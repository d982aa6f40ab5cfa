"""Tensors of which every process has a part: their entries are gathered before anything is computed of them.

That is how FSDP2 (``fully_shard``) and tensor parallel layers hold parameters, gradients and states of optimizers, as
``DTensor``.  A model is evaluated with whole weights in the place of these, and without the hooks that gather and
scatter while training, so that derivatives of any order are those of the plain model.
"""

from collections.abc import Iterable

from torch import Tensor, nn


def is_sharded(t: Tensor) -> bool:
    """Tell whether a tensor is spread over processes."""
    return hasattr(t, "full_tensor")


def gathered(t: Tensor) -> Tensor:
    """Return all entries of a tensor, detached; of one that is spread over processes all of these have to call this."""
    t = t.detach()
    return t.full_tensor().detach() if is_sharded(t) else t  # type: ignore[attr-defined]


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor, or this process's part of it where the parameter is spread like that."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor  # which takes time to import

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def is_fully_sharded(module: nn.Module) -> bool:
    """Tell whether a module was given to ``fully_shard``."""
    return hasattr(module, "set_requires_gradient_sync")


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let go of whole weights that a forward pass of FSDP2 has left in the place of the parameters that are trained."""
    for module in modules:
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]
