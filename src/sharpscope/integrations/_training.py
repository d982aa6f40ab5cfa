"""Parts of the callbacks of training frameworks: a probe of the training data, and a Monitor that may be resumed."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, Subset

from ..autodiff import Objective
from ..autodiff.data import fresh_copy
from ..errors import InvalidValue
from ..monitoring import Monitor, Sink


def probe(loader: Any, batches: int, convert: Callable[[Any], Any]) -> list[Any]:
    """Pick `batches` batches of examples, spread evenly over the data set and put together as the loader does.

    They are read once, under a fixed seed, in this process and from a copy: the loader, its data set, its sampler, its
    workers and the random states do not notice.  Where examples are augmented, one version of each is taken.  Of a data
    set without indices the first batches are taken.
    """
    loader = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
    stream = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
    size = 0 if stream else _batch_size(loader)
    with fresh_copy(loader) as twin:
        if stream:
            vars(twin).update(num_workers=0, prefetch_factor=None, timeout=0)
            return [convert(batch) for batch in islice(iter(twin), batches)]
        count = len(twin.dataset)
        n = min(size * batches, count)
        spread = Subset(twin.dataset, [i * count // n for i in range(n)])
        return [convert(batch) for batch in DataLoader(spread, size, collate_fn=twin.collate_fn)]


def _batch_size(loader: Any) -> int:
    """Examples in a batch of a loader whose data set can be indexed."""
    plain = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) if plain else None
    if not isinstance(size, int):
        raise InvalidValue(
            f"no probe can be picked from a {type(loader).__name__} that is not a DataLoader with batches of one size;"
            " pass a few fixed batches: SharpnessCallback(data=[...])"
        )
    return size


def part_of(data: list[Any], rank: int, processes: int) -> list[Any]:
    """Deal the batches of a probe, the same on all processes, to them; where there are too few, each has all."""
    return data[rank::processes] if len(data) >= processes else data


def group_of(processes: int) -> Any:
    """Return the process group of a training on so many processes, None for one."""
    return dist.group.WORLD if processes > 1 else None


def monitor_of(
    objective: Objective,
    optimizer: Optimizer | Sequence[Optimizer],
    state: Mapping[str, Any] | None,
    done: int,
    sinks: Sequence[Sink],
    **options: Any,
) -> Monitor:
    """Make a Monitor of a training with `done` steps behind it, which goes on from `state` if there is one.

    Of several processes the first one's state and sinks count.
    """
    state = objective.processes.first(state)
    if not state and not done:
        return Monitor(objective, optimizer, sinks=sinks, **options)
    monitor = Monitor(objective, optimizer, **options)
    monitor.load_state_dict(state or _moved(monitor.state_dict(), done))
    if objective.processes.rank == 0:
        monitor.recorder.sinks = tuple(sinks)  # not before: the first measurement was not of step 0
    return monitor


def _moved(state: dict[str, Any], done: int) -> dict[str, Any]:
    return state | {"steps": done, "rows": [row | {"step": done} for row in state["rows"]]}


def itself(model: Any) -> nn.Module:
    """Measure the whole model."""
    return model


def check_replicated(whole: bool, how: str) -> None:
    """Raise ValueError unless every process holds all parameters."""
    if not whole:
        raise InvalidValue(
            f"{how} may spread the parameters over processes, but curvature needs them whole on each; train on one"
            " device or with plain data parallelism (DDP), or measure the checkpoints"
        )


def with_forward(model: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Make a twin of a module, sharing all parts, with the `forward` it had before a framework replaced it."""
    twin = type(model).__new__(type(model))
    twin.__dict__ = model.__dict__ | {"forward": forward}
    return twin
