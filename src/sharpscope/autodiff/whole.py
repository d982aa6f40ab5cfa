"""A model, its loss and the modules around them as one module, whose weights have names and can be replaced.

    whole = Whole(model, loss, around)
    contents = whole.contents()
    with contents.replaced({name: value, ...}):
        output, loss = whole(batch.args, batch.kwargs, batch.target)

The names are those of the model's parameters; those of a loss that is a module begin with ``loss.``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidType, InvalidValue
from .processes import number_of_processes
from .shards import is_sharded, reshard

Loss = Callable[[Any, Any], Tensor]

WHOLE_WEIGHTS = (
    "only those of torch.distributed.fsdp.fully_shard and of tensor parallel layers are gathered here. Gather them, as"
    " torch.distributed.checkpoint.state_dict.get_model_state_dict(model,"
    " options=StateDictOptions(full_state_dict=True)) does, load them into a plain copy of the model, and measure that"
    " with group="
)
"""Advice for a model whose weights are sharded in a form that cannot be gathered."""


class Whole(nn.Module):
    """A model, then a loss of its output; `around` are modules that the loss calls, whose weights are constants."""

    def __init__(self, model: nn.Module, loss: Loss, around: Iterable[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.loss: Loss = loss
        self.around = nn.ModuleList(around)
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

    def contents(self) -> "Contents":
        """Find all parameters, buffers and modules as they are now."""
        named = list(self.named_modules())
        reshard(module for _, module in named)
        found = Contents(modules=[module for _, module in named])
        names: dict[int, str] = {}
        for kind, spaces in (
            (found.parameters, [(key, module._parameters) for key, module in named]),
            (found.buffers, [(key, module._buffers) for key, module in named]),
        ):
            for key, space in spaces:
                for own, t in space.items():
                    if t is None:
                        continue
                    if id(t) not in names:
                        names[id(t)] = name = self.name(f"{key}.{own}")
                        kind[name] = t
                        if not key.startswith("model"):
                            found.beside.add(name)
                    found.places.setdefault(names[id(t)], []).append((space, own))
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of model and loss that may change, under their names."""
        reshard(self.modules())
        own = self.named_parameters()
        return {self.name(key): p for key, p in own if p.requires_grad and not key.startswith("around.")}


@dataclass(frozen=True)
class Contents:
    """The parameters and buffers of a `Whole` by name, tied ones once, and its modules, for one pass over the data."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    beside: set[str] = field(default_factory=set)  # names of those that are not the model's
    places: dict[str, list[tuple[dict[str, Any], str]]] = field(default_factory=dict)  # where each is read from
    modules: list[nn.Module] = field(default_factory=list)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {**self.parameters, **self.buffers}

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Put `values` in the places of the tensors of these names inside."""
        places = [(space, key, t) for name, t in values.items() for space, key in self.places[name]]
        before = [space[key] for space, key, _ in places]
        try:
            for space, key, t in places:
                space[key] = t
            yield
        finally:
            for (space, key, _), own in zip(reversed(places), reversed(before), strict=True):
                space[key] = own

    def now(self, name: str) -> Tensor:
        """Return what stands in the place of that name now."""
        space, key = self.places[name][0]
        found: Tensor = space[key]
        return found


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
    _refuse_sharded(model)
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


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse parameters that cannot be gathered, and layers that wait for other processes."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise InvalidValue(f"{_place(name)} is sharded over processes (FullyShardedDataParallel): {WHOLE_WEIGHTS}")
        if isinstance(module, nn.SyncBatchNorm) and module.training and number_of_processes() > 1:
            raise InvalidValue(
                f"{_place(name)} averages over processes (SyncBatchNorm), but each evaluates its own batches; use"
                " BatchNorm, or call .eval() on that module"
            )
    for name, t in _named_tensors(model):
        if hasattr(t, "ds_tensor"):
            raise InvalidValue(f"'{name}' is sharded over processes (a part, by ZeRO stage 3): {WHOLE_WEIGHTS}")
    for name, t in model.named_buffers():
        if is_sharded(t):
            raise InvalidValue(
                f"the buffer '{name}' is a DTensor, spread over processes; evaluating writes to buffers: keep it whole"
            )


def _place(name: str) -> str:
    return f"'{name}'" if name else "the model"


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
