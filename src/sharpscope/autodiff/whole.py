"""A model, its loss and the modules around them as one module, whose weights have names and can be replaced.

    whole = Whole(model, loss, around)
    output, loss = functional_call(whole, {whole.keys[name]: value, ...}, (batch.args, batch.kwargs, batch.target))

The names are those of the model's parameters; those of a loss that is a module begin with ``loss.``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidType, InvalidValue

Loss = Callable[[Any, Any], Tensor]


class Whole(nn.Module):
    """A model, then a loss of its output; `around` are modules that the loss calls, whose weights are constants."""

    def __init__(self, model: nn.Module, loss: Loss, around: Iterable[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.loss: Loss = loss
        self.around = nn.ModuleList(around)
        self._keys: dict[str, str] = {}
        clash = any(name.partition(".")[0] == "loss" for name, _ in model.named_children())
        self._prefixes = {"model.": "", "loss.": "criterion." if clash else "loss.", "around.": "<around>."}

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> tuple[Any, Tensor]:
        """Evaluate the output of the model and the loss."""
        output = self.model(*args, **kwargs)
        return output, self.loss(output, target)

    def name(self, key: str) -> str:
        """Return the name of a parameter or buffer from its key in this module."""
        inside = next(prefix for prefix in self._prefixes if key.startswith(prefix))
        return self._prefixes[inside] + key.removeprefix(inside)

    def key(self, name: str) -> str:
        """Return the key in this module of a parameter or buffer of that name."""
        if name not in self._keys:
            prefixes = {prefix: inside for inside, prefix in self._prefixes.items() if prefix}
            prefix = next((p for p in prefixes if name.startswith(p)), "")
            self._keys[name] = prefixes.get(prefix, "model.") + name.removeprefix(prefix)
        return self._keys[name]

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """All parameters, tied ones once, under their names."""
        return {self.name(key): p for key, p in self.named_parameters()}

    def buffers_by_name(self) -> dict[str, Tensor]:
        """All buffers under their names."""
        return {self.name(key): b for key, b in self.named_buffers()}

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of model and loss that may change, under their names."""
        own = self.named_parameters()
        return {self.name(key): p for key, p in own if p.requires_grad and not key.startswith("around.")}


class LossAlone(nn.Module):
    """The loss of a `Whole` as a function of given outputs."""

    def __init__(self, whole: Whole) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, output: Any, target: Any) -> Tensor:
        """Evaluate the loss."""
        return self.whole.loss(output, target)


def unwrapped(model: nn.Module) -> nn.Module:
    """Take a module out of wrappers that change how it is run, not what it computes; refuse what cannot be evaluated.

    Raises:
        ValueError: sharded, scripted, lazy and empty modules, each with what to do.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and isinstance(
            model.__dict__["_modules"].get("_orig_mod"), nn.Module
        ):
            model = model.get_submodule("_orig_mod")
        else:
            break
    _refuse_kinds(model)
    return model


def _refuse_kinds(model: nn.Module) -> None:
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise InvalidValue(
            f"{type(model).__name__} is scripted or traced by torch.jit, so that its weights cannot be replaced;"
            " make the Objective of the module before torch.jit.script or torch.jit.trace"
        )
    sharded = [name for name, m in model.named_modules() if type(m).__name__ == "FullyShardedDataParallel"]
    sharded += [name for name, p in model.named_parameters() if type(p).__name__ == "DTensor"]
    if sharded:
        raise InvalidValue(
            f"the parameters of '{sharded[0]}' are spread over processes, but curvature needs them whole on one;"
            " measure a checkpoint of the gathered model, or train with DistributedDataParallel"
        )
    for name, t in _named_tensors(model):
        if isinstance(t, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise InvalidValue(
                f"'{name}' is lazy and has no shape yet; run the model once on a batch before measuring it"
            )
        if t.is_meta:
            raise InvalidValue(
                f"'{name}' is on the meta device and has no values; load the weights, for example by"
                " model.to_empty(device='cpu') and load_state_dict, before measuring the model"
            )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_model(model: object) -> nn.Module:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise InvalidType(
            f"this {type(model).__name__} is no torch module; an objective is Objective(model, loss, batches), with the"
            " function that the model computes as an nn.Module"
        )
    return model
