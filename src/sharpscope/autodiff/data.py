"""Batches of data as arguments of a model and a loss, read without leaving a trace in any random state."""

import dataclasses
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import InvalidValue


class Batch(NamedTuple):
    """The arguments of a model, the target of the loss, and the number of examples."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    examples: int

    @property
    def raw(self) -> tuple[Any, Any]:
        """The batch as a pair (inputs, target), in which form an Objective takes it."""
        return self.kwargs or self.args, self.target


def read(data: Iterable[Any], seed: int | None, device: torch.device) -> Generator[Batch, None, None]:
    """Read `data` once onto `device`; all that draws is seeded by `seed` (None: left as it is)."""
    batch = None
    with _own_randomness(data, seed):
        for batch in data:
            args, kwargs, target = _split(_to(batch, device))
            yield Batch(args, kwargs, target, _count(target, (args, kwargs)))
    if batch is None:
        raise InvalidValue("the data hold no batch, or not a second time; pass a list of pairs (inputs, target)")


def head(data: Iterable[Any], n: int) -> list[Any]:
    """Return the first n examples of `data`, in its batches, read under a fixed seed; the last batch is cut."""
    taken: list[Any] = []
    with _own_randomness(data, None if isinstance(data, list | tuple) else 0):
        for batch in data:
            count = examples(batch)
            taken.append(batch if count <= n else _cut(batch, count, n))
            n -= count
            if n <= 0:
                break
    return taken


def examples(batch: Any) -> int:
    """Count the examples of a batch."""
    args, kwargs, target = _split(batch)
    return _count(target, (args, kwargs))


def _cut(tree: Any, count: int, n: int) -> Any:
    """Cut every tensor that holds one row per example, of `count` ones, to its first n."""
    return map_tensors(tree, lambda t: t[:n] if t.dim() > 0 and t.shape[0] == count else t)


def check_data(data: Iterable[Any]) -> None:
    if isinstance(data, Tensor) or (isinstance(data, tuple) and any(isinstance(part, Tensor) for part in data)):
        raise InvalidValue("the data are one batch, not an iterable of batches; pass [(inputs, target)]")
    if not isinstance(data, Iterable):
        raise InvalidValue(
            f"the data are a {type(data).__name__}, not an iterable of batches; pass a list of pairs (inputs, target),"
            " or a DataLoader around a data set of single examples"
        )
    if isinstance(data, Iterator):
        raise InvalidValue(
            f"the data are a {type(data).__name__}, which can be read only once; pass a list or a DataLoader"
        )


def tensors(tree: Any) -> Iterator[Tensor]:
    """Find the tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors(item)
    elif dataclasses.is_dataclass(tree):
        yield from tensors(vars(tree))


def _to(tree: Any, device: torch.device) -> Any:
    return map_tensors(tree, lambda t: t.to(device))


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested tuples, lists, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        return change(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        parts = {part.name: getattr(tree, part.name) for part in dataclasses.fields(tree) if part.init}
        return dataclasses.replace(tree, **{name: map_tensors(part, change) for name, part in parts.items()})
    if isinstance(tree, Mapping):
        return {key: map_tensors(item, change) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [map_tensors(item, change) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def _split(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Split a batch into positional arguments, keyword arguments and target."""
    if isinstance(batch, Mapping):
        return (), dict(batch), batch
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise InvalidValue(
            f"a batch is a {type(batch).__name__}, not a pair (inputs, target) or a dict; for one batch pass [(x, y)]"
        )
    inputs, target = batch
    if isinstance(inputs, Mapping):
        return (), dict(inputs), target
    return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}, target


def _count(*trees: Any) -> int:
    """Count examples: the first dimension of the first tensor that has one."""
    return next((t.shape[0] for t in tensors(trees) if t.dim() > 0), 1)


@contextmanager
def _own_randomness(data: Iterable[Any], seed: int | None) -> Iterator[None]:
    """Draw from generators seeded by `seed` (None: as they stand), and put every random state back at the end.

    Loaders draw a seed when they are iterated, data sets and models when they are read.  NumPy's state is slow to copy
    (0.1 ms), and lists of tensors do not draw from it: without a seed it is left alone.
    """
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    cpu, python = torch.get_rng_state(), random.getstate()
    legacy = None if seed is None else np.random.get_state()
    own = [(generator, generator.get_state()) for generator in _generators(data)]
    on_devices = [torch.cuda.get_rng_state(d) for d in cuda]
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        for generator in (torch.default_generator, *(torch.cuda.default_generators[d] for d in cuda)):
            generator.manual_seed(seed)  # torch.manual_seed would also seed devices that are not in use yet
        for generator, _ in own:
            generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if legacy is not None:
            np.random.set_state(legacy)
        for generator, before in own:
            generator.set_state(before)
        for device, state in zip(cuda, on_devices, strict=True):
            torch.cuda.set_rng_state(state, device)


def _generators(data: Iterable[Any]) -> list[torch.Generator]:
    """Find the generators that a loader and its sampler draw from instead of the global one."""
    if not isinstance(data, DataLoader):
        return []
    owners = (data, data.sampler, getattr(data.batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if isinstance(generator, torch.Generator)]
