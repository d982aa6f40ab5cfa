"""Batches of data as arguments of a model and a loss, read without leaving a trace in any random state."""

import copy
import dataclasses
import inspect
import math
import random
from collections import OrderedDict, UserDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from ..errors import InvalidValue
from .pristine import Pristine, keeps_iterator

MAX_BATCHES = 4096
"""Batches after which data without a length are taken to have no end."""

FIXED = (Tensor, nn.Parameter, np.ndarray, str, bytes, int, float, bool, type(None))
"""Kinds of parts of a batch that are the same whenever they are read."""


class Batch(NamedTuple):
    """The arguments of a model, the target of the loss, and the weight of the batch in the mean."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    examples: float
    raw: Any = None  # the batch in the form in which an Objective takes it


class Cut(NamedTuple):
    """A rule for cutting a batch: its number of rows, and the axes of its tensors to look for them, in this order."""

    rows: int
    axes: tuple[int, ...]


class BatchForm:
    """Reads a batch: what of it is the input of `model` and what the target, and how much it weighs.

    `split` and `weigh` are functions of the batch as the data give it, the arguments `batch` and `examples` of an
    Objective.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        split: Callable[[Any], Any] | None = None,
        weigh: Callable[[Any], Any] | None = None,
    ) -> None:
        self.split = split
        self.weigh = weigh
        try:
            self._signature: inspect.Signature | None = None if model is None else inspect.signature(model.forward)
        except (TypeError, ValueError):
            self._signature = None

    def read(self, raw: Any, device: torch.device) -> Batch:
        """Read one batch onto `device`."""
        moved = moved_to(raw, device) if self.split is None else raw
        args, kwargs, target = self._parts(moved)
        if self.split is not None:
            args, kwargs, target = moved_to((args, kwargs, target), device)
        examples = _count(target, (args, kwargs)) if self.weigh is None else self.weight(raw)
        return Batch(args, kwargs, target, examples, moved)

    def weight(self, raw: Any) -> float:
        """Weight of a batch in the mean over batches: its number of examples, or what `weigh` says."""
        if self.weigh is None:
            args, kwargs, target = self._parts(raw)
            return _count(target, (args, kwargs))
        found = self.weigh(raw)
        weight = found.item() if isinstance(found, np.number | Tensor) and found.ndim == 0 else found
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise InvalidValue(
                f"examples= gives {found!r} for a batch; it has to give the weight of the batch, a positive finite"
                " number"
            )
        return weight

    def size(self, raw: Any) -> int:
        """Count the rows that a batch can be cut into; one that cannot be cut counts by its weight."""
        cut = self._cut(raw)
        return cut.rows if cut else max(math.ceil(self.weight(raw)), 1)

    def cut(self, raw: Any, rows: slice) -> Any:
        """Pick rows of a batch; where it is not clear which those are, it stays whole."""
        cut = self._cut(raw)
        return _picked(raw, cut, rows) if cut else raw

    def can_be_cut(self, raw: Any) -> bool:
        """Tell whether a batch has several rows that belong to different examples."""
        return self._cut(raw) is not None

    def _cut(self, raw: Any) -> Cut | None:
        """Find rows into which all tensors of a batch can be cut, such that the weights of the parts add up."""
        weight = self.weight(raw)
        counts = [round(weight)] if weight == round(weight) else []
        if self.weigh is not None:
            counts += [count for count in _first_sizes(raw) if count not in counts]
        for rows in counts:
            for axes in ((0,),) if self.weigh is None else ((0,), (0, 1), (1, 0)):
                cut = Cut(rows, axes)
                if rows > 1 and _fits(raw, cut) and self._adds_up(raw, cut, weight):
                    return cut
        return None

    def _adds_up(self, raw: Any, cut: Cut, whole: float) -> bool:
        half = cut.rows // 2
        try:
            parts = [self.weight(_picked(raw, cut, rows)) for rows in (slice(half), slice(half, None))]
        except (InvalidValue, LookupError, RuntimeError, TypeError):
            return False
        return math.isclose(sum(parts), whole, rel_tol=1e-6)

    def _parts(self, raw: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Split a batch into positional arguments, keyword arguments and target."""
        if self.split is not None:
            pair = self.split(raw)
            if not _is_pair(pair):
                raise InvalidValue(f"batch= returns a {type(pair).__name__}, not a pair (inputs, target)")
        elif isinstance(raw, Mapping):
            return *self._mapping(raw), dict(raw)
        elif not _is_pair(raw):
            raise InvalidValue(
                f"a batch is a {type(raw).__name__}, not a pair (inputs, target) or a dict; {_remedy(raw)}for one batch"
                " pass [(x, y)]"
            )
        else:
            pair = raw
        inputs, target = pair
        if isinstance(inputs, Mapping):
            return *self._mapping(inputs), target
        several = isinstance(inputs, list | tuple) and not hasattr(inputs, "_fields")
        return (tuple(inputs) if several else (inputs,)), {}, target

    def _mapping(self, inputs: Mapping[Any, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pass a mapping as keywords, or as the one argument where no key is the name of an argument."""
        if all(isinstance(key, str) for key in inputs):
            names = {} if self._signature is None else self._signature.parameters
            open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
            if not names or open_ended or any(key in names for key in inputs) or not self._takes_one():
                return (), dict(inputs)
        return (inputs,), {}

    def _takes_one(self) -> bool:
        try:
            return self._signature is not None and bool(self._signature.bind(None))
        except TypeError:
            return False


class Source:
    """Data that an objective reads again and again, each time as they were when this was made.

    Raises:
        ValueError: the data are no iterable of batches, or cannot be read again without being changed.
    """

    def __init__(self, data: Iterable[Any], quiet: bool | None = None) -> None:
        check_data(data)
        self.data = data
        self.fixed = type(data) in (list, tuple) and all(_is_fixed(batch) for batch in data)
        self.quiet = quiet  # whether the first pass drew nothing from NumPy; None before it
        self.weight: float | None = None  # of all batches, once they were read to the end
        self._pristine: Pristine | None = None
        self._length: int | None = None  # of a loader whose one iterator has no end
        if not self.fixed:
            loader = getattr(data, "base_dataloader", data)  # accelerate wraps it
            if isinstance(loader, DataLoader) and keeps_iterator(loader):
                self._length = len(loader)
            with _own_randomness(None, self), suppress(*[InvalidValue] * (type(data) in (list, tuple))):
                self._pristine = Pristine(loader)
        self.limit = MAX_BATCHES if _length(data) is None else None

    @property
    def seed(self) -> int | None:
        """Seed of every pass; none where nothing is drawn."""
        return None if self.fixed else 0

    @property
    def several(self) -> bool:
        """Tell whether there may be more than one batch."""
        return _length(self.data) != 1

    @contextmanager
    def opened(self, seed: int | None) -> Iterator[Iterator[Any]]:
        """Begin a pass over a fresh copy of the data, with random numbers drawn from `seed`."""
        with _own_randomness(seed, self), self.copied(seed) as data:
            yield iter(data) if self._length is None else islice(iter(data), self._length)

    @contextmanager
    def copied(self, seed: int | None) -> Iterator[Any]:
        """Copy the data as they were when this was made."""
        if self._pristine is None:
            yield self.data
        else:
            with self._pristine.fresh(seed) as data:
                yield data


def read(source: Source, seed: int | None, device: torch.device, form: BatchForm) -> Generator[Batch, None, None]:
    """Read data once onto `device`; all that draws is seeded by `seed` (None: left as it is)."""
    end, count, weight = object(), 0, 0.0
    with source.opened(seed) as batches:
        while True:
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                raw = next(batches, end)
                batch = None if raw is end else form.read(raw, device)
            if batch is None:
                break
            count += 1
            weight += batch.examples
            if source.limit is not None and count > source.limit:
                raise InvalidValue(
                    f"the data ({type(source.data).__name__}) have no length, and no end within {source.limit} batches;"
                    " pass a few fixed batches as a list, list(itertools.islice(data, 16)), or give them a __len__"
                )
            yield batch
    source.weight = weight
    if count == 0:
        raise InvalidValue("the data hold no batch, or not a second time; pass a list of pairs (inputs, target)")


def first_batch(source: Source, device: torch.device, form: BatchForm) -> Batch:
    """Read the first batch, and make sure that it is the same when it is read again.

    Raises:
        ValueError: it is not, so that the loss is no function of the weights alone.
    """

    def once() -> Batch:
        with closing(read(source, source.seed, device, form)) as batches:
            return next(batches)

    batch = once()
    if not source.fixed and not _same(batch[:3], once()[:3]):
        raise InvalidValue(
            f"the data ({type(source.data).__name__}) begin with another batch when they are read again, though every"
            " generator that was found in them is put back: the loss would be a new function at every pass; pass a few"
            " fixed batches as a list, list(itertools.islice(data, 16))"
        )
    return batch


def head(data: Iterable[Any] | Source, n: int, form: BatchForm | None = None) -> list[Any]:
    """Return the first n examples of the data, in their batches, read under a fixed seed; the last batch is cut."""
    source = data if isinstance(data, Source) else Source(data)
    form = form or BatchForm()
    taken: list[Any] = []
    with source.opened(source.seed) as batches:
        for batch in batches:
            rows = form.size(batch)
            taken.append(batch if rows <= n else form.cut(batch, slice(n)))
            n -= rows
            if n <= 0:
                break
    return taken


def undisturbed(source: Source) -> AbstractContextManager[None]:
    """Put every global generator back at the end, where batches are looked at outside of a pass."""
    return _own_randomness(0, source)


@contextmanager
def keeping_random_states() -> Iterator[None]:
    """Put every global generator back at the end, whatever draws from it inside."""
    with _own_randomness(None, None):
        yield


@contextmanager
def fresh_copy(data: Iterable[Any]) -> Iterator[Any]:
    """Copy data for one pass outside of an objective, with every global generator seeded by zero meanwhile."""
    source = Source(data)
    with _own_randomness(0, source), source.copied(0) as copied:
        yield copied


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
    """Find the tensors in nested tuples, lists, mappings, dataclasses and batch objects."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors(item)
    elif not isinstance(tree, type) and (dataclasses.is_dataclass(tree) or _is_object(tree)):
        yield from tensors(_attributes(tree))


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested tuples, lists, mappings, dataclasses and batch objects.

    Containers keep their kind, and the originals are left as they are.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, PackedSequence):
        order = (None if i is None else change(i) for i in (tree.sorted_indices, tree.unsorted_indices))
        sizes = tree.batch_sizes  # which torch wants on the processor
        return PackedSequence(change(tree.data), sizes.clone() if sizes.is_inference() else sizes, *order)
    if _is_object(tree) and callable(getattr(tree, "apply", None)):
        return copy.copy(tree).apply(change)  # graphs and dicts of tensors that know how their tensors are changed
    if isinstance(tree, Mapping):
        return _map_mapping(tree, change)
    if isinstance(tree, list | tuple):
        items = [map_tensors(item, change) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, type) or not (dataclasses.is_dataclass(tree) or _is_object(tree)):
        return tree
    other = copy.copy(tree)
    for name, value in _attributes(tree).items():
        object.__setattr__(other, name, map_tensors(value, change))
    return other


def _map_mapping(tree: Mapping[Any, Any], change: Callable[[Tensor], Tensor]) -> Any:
    items = {key: map_tensors(item, change) for key, item in tree.items()}
    if not isinstance(tree, UserDict | OrderedDict):
        return items
    try:
        other = copy.copy(tree)
        for key, item in items.items():
            other[key] = item
    except Exception:  # whatever a mapping raises whose items cannot be replaced
        return items
    return other


def moved_to(tree: Any, device: torch.device) -> Any:
    """Move every tensor to `device`; those made in inference mode become ordinary ones."""

    def move(t: Tensor) -> Tensor:
        t = t.to(device)
        return t.clone() if t.is_inference() else t

    return map_tensors(tree, move)


def _is_object(tree: Any) -> bool:
    """Tell whether this is an object that holds tensors and knows devices, as batches of graphs are."""
    return (
        callable(getattr(tree, "to", None)) and not isinstance(tree, Tensor | nn.Module) and hasattr(tree, "__dict__")
    )


def _attributes(tree: Any) -> dict[str, Any]:
    """Return what a data class or an object holds, by name."""
    slots = [f.name for f in dataclasses.fields(tree)] if dataclasses.is_dataclass(tree) else []
    return {name: getattr(tree, name) for name in slots if hasattr(tree, name)} | getattr(tree, "__dict__", {})


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, list | tuple) and len(batch) == 2


def _remedy(batch: Any) -> str:
    """Show how `batch=` would say what is input and what is target in a batch like this one."""
    pair = ""
    if isinstance(batch, Tensor):
        pair = "(b, b)"
    elif isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        parts = [f"b[{i}]" for i in range(len(batch))]
        pair = f"(({', '.join(parts[:-1])}), {parts[-1]})" if len(parts) > 1 else "(b[0], b[0])" if parts else ""
    elif not isinstance(batch, type | str | PackedSequence) and next(tensors(batch), None) is not None:
        names = list(getattr(batch, "_fields", None) or _attributes(batch))
        target = next((name for name in ("y", "target", "targets", "label", "labels") if hasattr(batch, name)), None)
        if _is_object(batch) and not dataclasses.is_dataclass(batch):
            pair = f"(b, b.{target or names[-1].lstrip('_')})"
        else:
            target = target or names[-1]
            inputs = [f"b.{name}" for name in names if name != target]
            pair = f"({inputs[0] if len(inputs) == 1 else '(' + ', '.join(inputs) + ')'}, b.{target})"
    return f"say what is what by Objective(..., batch=lambda b: {pair}), or " if pair else ""


def _is_fixed(part: Any) -> bool:
    """Tell whether a part of a batch is the same whenever it is read."""
    if type(part) in FIXED:
        return True
    if type(part) is dict:
        return all(_is_fixed(item) for item in part.values())
    named = isinstance(part, tuple) and hasattr(part, "_fields") and type(part).__iter__ is tuple.__iter__
    return (type(part) in (list, tuple) or named) and all(_is_fixed(item) for item in part)


def _length(data: Iterable[Any]) -> int | None:
    """Return the number of batches where the data know it."""
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except (TypeError, NotImplementedError, AttributeError):
        return None


def _same(a: Any, b: Any) -> bool:
    """Compare the tensors and arrays of two batches bit for bit, not-a-number being equal to itself."""
    left, right = list(_arrays(a)), list(_arrays(b))
    return len(left) == len(right) and all(_equal(x, y) for x, y in zip(left, right, strict=True))


def _arrays(tree: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(tree, note)
    yield from found


def _equal(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype or x.layout != y.layout:
        return False
    if x.layout != torch.strided:
        x, y = x.to_dense(), y.to_dense()
    return torch.equal(x, y) or bool(((x == y) | ((x != x) & (y != y))).all())


def _count(*trees: Any) -> int:
    """Count examples: the first dimension of the first tensor that has one."""
    for tree in trees:
        if isinstance(tree, PackedSequence):
            return int(tree.batch_sizes[0])
        if isinstance(tree, Mapping | list | tuple) and any(_holds_packed(part) for part in _items(tree)):
            counts = [_count(part) for part in _items(tree) if next(tensors(part), None) is not None]
            return counts[0]
        for t in tensors(tree):
            if t.dim() > 0:
                return t.shape[0]
    return 1


def _items(tree: Any) -> list[Any]:
    return list(tree.values()) if isinstance(tree, Mapping) else list(tree)


def _holds_packed(tree: Any) -> bool:
    if isinstance(tree, PackedSequence):
        return True
    return isinstance(tree, Mapping | list | tuple) and any(_holds_packed(part) for part in _items(tree))


def _leaves(tree: Any) -> Iterator[Any]:
    """Find tensors, packed sequences, and whatever else cannot be cut."""
    if isinstance(tree, Tensor | PackedSequence):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for item in _items(tree):
            yield from _leaves(item)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        yield from _leaves(_attributes(tree))
    elif not isinstance(tree, str | int | float | bool | None):
        yield tree


def _first_sizes(raw: Any) -> list[int]:
    sizes = [len(leaf) for leaf in _leaves(raw) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return [*dict.fromkeys([*sizes, *(int(p.batch_sizes[0]) for p in _leaves(raw) if isinstance(p, PackedSequence))])]


def _fits(raw: Any, cut: Cut) -> bool:
    """Tell whether every part of a batch has these rows, and none may be a matrix between them."""
    return any(True for _ in _leaves(raw)) and all(_has_rows(leaf, cut) for leaf in _leaves(raw))


def _has_rows(leaf: Any, cut: Cut) -> bool:
    if isinstance(leaf, PackedSequence):
        return int(leaf.batch_sizes[0]) == cut.rows
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
        return False
    return leaf.dim() == 0 or leaf.shape[0] == 1 or _axis(leaf, cut) is not None


def _axis(leaf: Tensor, cut: Cut) -> int | None:
    return next((axis for axis in cut.axes if axis < leaf.dim() and leaf.shape[axis] == cut.rows), None)


def _picked(tree: Any, cut: Cut, rows: slice) -> Any:
    """Pick rows of everything in a batch that has them."""
    if isinstance(tree, PackedSequence):
        padded, lengths = pad_packed_sequence(tree, batch_first=True)
        in_order = tree.sorted_indices is None
        return pack_padded_sequence(padded[rows], lengths[rows], batch_first=True, enforce_sorted=in_order)
    if isinstance(tree, Tensor):
        axis = _axis(tree, cut) if tree.dim() > 0 else None
        return tree if axis is None else tree[(*[slice(None)] * axis, rows)]
    if isinstance(tree, Mapping):
        return {key: _picked(item, cut, rows) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_picked(item, cut, rows) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        other = copy.copy(tree)
        for name, value in _attributes(tree).items():
            object.__setattr__(other, name, _picked(value, cut, rows))
        return other
    return tree


@contextmanager
def _own_randomness(seed: int | None, source: Source | None) -> Iterator[None]:
    """Draw from generators seeded by `seed` (None: as they stand), and put every random state back at the end.

    Loaders draw a seed when they are iterated, data sets and models when they are read.  NumPy's state is slow to copy
    (0.06 ms): without a seed it is left alone once model and loss were seen not to draw from it.
    """
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    cpu, python = torch.get_rng_state(), random.getstate()
    legacy: Any = None if seed is None and source and source.quiet else np.random.get_state()
    on_devices = [torch.cuda.get_rng_state(d) for d in cuda]
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        for generator in (torch.default_generator, *(torch.cuda.default_generators[d] for d in cuda)):
            generator.manual_seed(seed)  # torch.manual_seed would also seed devices that are not in use yet
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if legacy is not None:
            after: Any = np.random.get_state()
            if source and source.quiet is None and source.fixed:
                source.quiet = after[2:] == legacy[2:] and bool((after[1] == legacy[1]).all())
            np.random.set_state(legacy)
        for device, state in zip(cuda, on_devices, strict=True):
            torch.cuda.set_rng_state(state, device)
