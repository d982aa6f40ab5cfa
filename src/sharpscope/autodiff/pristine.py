"""Copies of data that can be read again and again, while the original stays where it is.

Data sets, samplers and streams keep a state: generators of random numbers, counters, positions in files.  A `Pristine`
holds them as they were when it was made, and gives a fresh copy for every pass.  What is large and not written to (most
tensors and arrays, models, tables, connections) is in all copies the same object; files are opened anew; loaders become
twins that have workers of their own.  State that no copy reaches, a generator in a module or a class, is put back.
"""

import copy
import io
import logging
import multiprocessing.context
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..errors import InvalidValue

COPIED_BYTES = 1 << 20
"""Tensors and arrays are copied, the smallest first, up to so many bytes together; larger ones hold data, not state."""

COPIED_ARRAYS = 1000
"""At most so many tensors and arrays are copied."""

LONG = 1000
"""Lists and dicts of so many items hold data, not state: their items are copied only where they hold objects."""

LIBRARIES = {"torch", "numpy", "builtins", "abc", "typing", "collections", "transformers", "datasets", "torchvision"}
"""Packages whose classes and functions draw from no generator in a module but the global ones."""

FRAMEWORKS = {"lightning", "pytorch_lightning", "accelerate"}
"""Packages whose objects run the training, and are never copied."""

NUMBERS = {int, float, bool, str, bytes, type(None)}
"""The most frequent kinds of objects that have no state."""

ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, PurePath, torch.dtype, torch.device, np.dtype),
    *(np.number, np.bool_, type, BuiltinFunctionType, CodeType),
)
"""Kinds of objects that have no state."""

WHOLE = (ModuleType, Optimizer, multiprocessing.context.BaseContext, logging.Filterer, threading.Thread)
"""Kinds of objects that are never copied."""

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


class Pristine:
    """Data as they were when this was made.

    Raises:
        ValueError: they hold something that can be read only once and not copied, such as a generator.
    """

    def __init__(self, data: Any) -> None:
        self._data, self._plan = _planned(data)

    @contextmanager
    def fresh(self, seed: int | None = None) -> Iterator[Any]:
        """Copy the data for one pass.

        Generators are as they were, those of loaders and their samplers seeded by `seed`; with another seed than zero
        all of them are.
        """
        outside = [(generator, state_of(generator)) for generator, _ in self._plan.outside]
        data, memo = self._plan.copied(self._data)
        for generator, state in self._plan.outside:
            set_state(generator, state)
        if seed is not None:
            for generator in self._plan.drawing(everywhere=seed != 0):
                seed_generator(memo.get(id(generator), generator), seed)
        try:
            yield data
        finally:
            for file in self._plan.files:
                memo[id(file)].close()
            for generator, state in outside:
                set_state(generator, state)


@dataclass
class _Plan:
    """A plan for copying data: how each object that they are made of is copied."""

    same: dict[int, Any] = field(default_factory=dict)  # what stands for an object in every copy, as a rule itself
    arrays: dict[int, Any] = field(default_factory=dict)  # tensors and arrays, before it is known which are copied
    flat: list[Any] = field(default_factory=list)  # lists, sets and dicts that are copied on one level, which is fast
    files: list[Any] = field(default_factory=list)
    functions: list[FunctionType] = field(default_factory=list)  # with variables of their own
    changing: list[Any] = field(default_factory=list)  # lists and dicts that give other items than they hold
    loaders: list[DataLoader[Any]] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)
    outside: list[tuple[Any, Any]] = field(default_factory=list)  # generators in modules and classes, and their states
    unusual: list[Any] = field(default_factory=list)  # objects that say themselves how they are copied
    seen: dict[int, Any] = field(default_factory=dict)  # parts of the data
    used: dict[int, Any] = field(default_factory=dict)  # classes and functions, and what their modules hold

    def drawing(self, everywhere: bool) -> list[Any]:
        """Return the generators of loaders and their samplers, or all there are."""
        found: list[Any] = [g for loader in self.loaders for g in loader_generators(loader)]
        return [*found, *self.generators, *(g for g, _ in self.outside)] if everywhere else found

    def of_copy(self, memo: Mapping[int, Any]) -> "_Plan":
        """Return the plan for a copy that was made by this one."""

        def moved(things: list[Any]) -> list[Any]:
            return [memo[id(thing)] for thing in things if id(thing) in memo]

        return _Plan(
            same=self.same,
            flat=moved(self.flat),
            files=moved(self.files),
            functions=moved(self.functions),
            changing=moved(self.changing),
            loaders=moved(self.loaders),
            generators=moved(self.generators),
            outside=self.outside,
        )

    def copied(self, data: Any) -> tuple[Any, dict[int, Any]]:
        """Copy data; return also the copy of every object by the `id` of the original."""
        memo: dict[int, Any] = dict(self.same)
        memo |= {id(plain): copy.copy(plain) for plain in self.flat}
        memo |= {id(file): _opened_again(file) for file in self.files}
        cells: dict[int, CellType] = {}
        for function in self.functions:
            memo[id(function)] = _with_own_cells(function, cells)
        memo |= {id(thing): _empty(type(thing)) for thing in self.changing}
        for function in self.functions:
            _fill(memo[id(function)], function, memo)
        for thing in self.changing:
            _fill_container(memo[id(thing)], thing, memo)
        data = copy.deepcopy(data, memo)
        for loader in self.loaders:
            if id(loader) in memo:
                _become_twin(memo[id(loader)], loader)
        return data, memo

    def keep_large_arrays(self) -> None:
        """Decide which tensors and arrays are copied."""
        sizes = sorted((_bytes(a), i) for i, a in self.arrays.items())
        total = 0.0
        for number, (size, i) in enumerate(sizes):
            total += size
            if total > COPIED_BYTES or number >= COPIED_ARRAYS:
                self.same[i] = self.arrays[i]


def _planned(data: Any) -> tuple[Any, _Plan]:
    """Copy some data, and plan how this copy is copied in turn."""
    plan = _Plan()
    stack = [data]
    while stack:
        thing = stack.pop()
        if not isinstance(thing, ATOMS) and id(thing) not in plan.seen:
            plan.seen[id(thing)] = thing
            stack.extend(_visit(thing, plan))
    plan.keep_large_arrays()
    try:
        copied, memo = plan.copied(data)
    except Exception:  # whatever an object raises that cannot be copied
        for thing in reversed(plan.unusual):  # parts before what they are in
            if thing is not data and not _copyable(thing, plan):
                plan.same[id(thing)] = thing
        try:
            copied, memo = plan.copied(data)
        except Exception as error:
            raise _not_copyable(data, f"{type(error).__name__}: {error}") from error
    return copied, plan.of_copy(memo)


def _not_copyable(data: Any, reason: str) -> InvalidValue:
    return InvalidValue(
        f"the data ({type(data).__name__}) cannot be copied ({reason}), so that measuring would move the state that"
        " training goes on from; pass a few fixed batches as a list, [(inputs, target), ...]"
    )


def _copyable(thing: Any, plan: _Plan) -> bool:
    try:
        plan.copied(thing)
    except Exception:
        return False
    return True


def _visit(thing: Any, plan: _Plan) -> Iterable[Any]:
    """Enter one object into the plan; return what it is made of."""
    if isinstance(thing, Tensor | np.ndarray):
        plan.arrays[id(thing)] = thing
    elif isinstance(thing, WHOLE) or hasattr(type(thing), "__array__") or _runs_training(type(thing)):
        plan.same[id(thing)] = thing
    elif isinstance(thing, GENERATORS):
        if is_global(thing) or isinstance(thing, random.SystemRandom):
            plan.same[id(thing)] = thing
        else:
            plan.generators.append(thing)
    elif isinstance(thing, io.IOBase) and not isinstance(thing, io.BytesIO | io.StringIO):
        _visit_file(thing, plan)
    elif isinstance(thing, FunctionType):
        _look_into(thing, plan)
        inner = _variables(thing)
        if inner:
            plan.functions.append(thing)
        return inner
    elif isinstance(thing, MethodType):
        return thing.__self__, thing.__func__
    elif isinstance(thing, DataLoader):
        return _visit_loader(thing, plan)
    elif isinstance(thing, list | tuple | set | frozenset | deque | dict):
        return _visit_container(thing, plan)
    else:
        return _visit_object(thing, plan)
    return ()


def _visit_container(thing: Any, plan: _Plan) -> Iterable[Any]:
    items = _items(thing)
    depth = 1 if len(items) < LONG else 6
    if type(thing) in (list, dict, set) and all(_is_flat(item, depth) for item in items):
        plan.flat.append(thing)
        return ()
    own = getattr(thing, "__dict__", {})
    if own:
        _look_into_class(type(thing), plan)
    if _changes_items(thing):
        plan.changing.append(thing)
    return [*items, *own.values()]


def _changes_items(thing: Any) -> bool:
    """Tell whether a list or dict may give other items than it holds: one that draws, or computes, when it is read."""
    if isinstance(thing, dict):
        return type(thing).items not in (dict.items, OrderedDict.items) and not isinstance(thing, OrderedDict)
    return isinstance(thing, list) and type(thing).__iter__ is not list.__iter__


def _items(thing: Any) -> list[Any]:
    """Return what a container holds, not what it makes of it when it is read."""
    if isinstance(thing, dict):
        return [*dict.keys(thing), *dict.values(thing)]
    kinds: tuple[Any, ...] = (list, tuple, set, frozenset, deque)
    return next(list(kind.__iter__(thing)) for kind in kinds if isinstance(thing, kind))


def _empty(kind: Any) -> Any:
    return kind.__new__(kind)


def _fill_container(own: Any, thing: Any, memo: dict[int, Any]) -> None:
    """Copy the items and attributes that a container holds into its copy."""
    if isinstance(thing, dict):
        for key, value in dict.items(thing):
            dict.__setitem__(own, copy.deepcopy(key, memo), copy.deepcopy(value, memo))
    else:
        list.extend(own, [copy.deepcopy(item, memo) for item in list.__iter__(thing)])
    own.__dict__.update(copy.deepcopy(vars(thing), memo))


def _is_flat(item: Any, depth: int) -> bool:
    """Tell whether an item needs no copy: a tuple of atoms, and in long lists nested data of no other kinds."""
    kind = type(item)
    if kind in NUMBERS:
        return True
    if kind is tuple or (depth > 1 and kind in (list, dict)):
        parts = item.values() if kind is dict else item
        return NUMBERS.issuperset(map(type, parts)) or (depth > 0 and all(_is_flat(part, depth - 1) for part in parts))
    return isinstance(item, ATOMS) or (depth > 1 and kind in (Tensor, np.ndarray))


def _visit_loader(loader: DataLoader[Any], plan: _Plan) -> Iterable[Any]:
    plan.loaders.append(loader)
    for thing in vars(loader).values():
        if isinstance(thing, Iterator):
            plan.same[id(thing)] = None  # the pass that is under way, and its workers
            plan.seen[id(thing)] = thing
    _look_into_class(type(loader), plan)
    return vars(loader).values()


def _visit_file(file: Any, plan: _Plan) -> None:
    if file.closed or not file.readable() or file.writable() or isinstance(getattr(file, "name", 0), int):
        plan.same[id(file)] = file  # nothing is read from it, or it belongs to the process
        return
    try:
        _opened_again(file).close()
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise _not_copyable(file, f"it is open, and cannot be opened again at its position: {error}") from error
    plan.files.append(file)


def _opened_again(file: Any) -> Any:
    """Open a file once more, at the position of the first one."""
    again: Any
    if isinstance(file, io.TextIOWrapper):
        again = io.TextIOWrapper(_opened_again(file.buffer), encoding=file.encoding, errors=file.errors)
    elif isinstance(file, io.BufferedReader | io.FileIO):
        again = open(file.name, "rb")  # noqa: SIM115
    else:
        again = type(file)(file.name)  # compressed
    again.seek(file.tell())
    return again


def _visit_object(thing: Any, plan: _Plan) -> Iterable[Any]:
    kind = type(thing)
    _look_into_class(kind, plan)
    slots = [name for base in kind.__mro__ for name in _slots(base)]
    inner = [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, s) for s in slots if hasattr(thing, s))]
    plain = all(getattr(kind, name) is getattr(object, name) for name in ("__reduce_ex__", "__reduce__"))
    own_rule = any(hasattr(kind, name) for name in ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__"))
    if not plain or own_rule or isinstance(thing, nn.Module):
        plan.unusual.append(thing)
    if not inner and not _copyable(thing, _Plan()):
        if isinstance(thing, Iterator):
            raise _not_copyable(thing, "it can be read only once")
        plan.same[id(thing)] = thing  # a lock, a connection
    with suppress(TypeError, ValueError, AttributeError):
        if not plain:
            inner += _reduced(thing)
    return inner


def _reduced(thing: Any) -> list[Any]:
    """Return the parts that an object of a library says it is made of."""
    parts = thing.__reduce_ex__(4)
    return list(parts[1:3]) if isinstance(parts, tuple) else []


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _runs_training(kind: type) -> bool:
    named = any(base.__name__ in ("PreTrainedTokenizerBase", "Trainer") for base in kind.__mro__)
    loads = issubclass(kind, DataLoader)
    return not loads and (named or any(base.__module__.partition(".")[0] in FRAMEWORKS for base in kind.__mro__))


def _look_into_class(kind: type, plan: _Plan) -> None:
    """Find the generators that a class holds, or that its methods use."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in LIBRARIES or id(base) in plan.used:
            continue
        plan.used[id(base)] = base
        for member in vars(base).values():
            _look_at(getattr(member, "__func__", getattr(member, "fget", member)), plan)


def _look_into(function: FunctionType, plan: _Plan) -> None:
    """Find the generators in its module, and in modules that it names, that a function uses."""
    if (function.__module__ or "").partition(".")[0] in LIBRARIES:
        return
    names = _names(function.__code__)
    for name in names:
        thing = function.__globals__.get(name)
        for part in [vars(thing).get(other) for other in names] if isinstance(thing, ModuleType) else [thing]:
            _look_at(part, plan)


def _look_at(thing: Any, plan: _Plan) -> None:
    """Note a generator that is part of no data, or find those that a function or an object uses."""
    if isinstance(thing, ATOMS) or id(thing) in plan.used:
        return
    plan.used[id(thing)] = thing
    if isinstance(thing, GENERATORS):
        if not is_global(thing) and not isinstance(thing, random.SystemRandom):
            plan.same[id(thing)] = thing
            plan.outside.append((thing, state_of(thing)))
    elif isinstance(thing, FunctionType):
        _look_into(thing, plan)
    elif type(thing).__module__.partition(".")[0] not in LIBRARIES | FRAMEWORKS:
        for part in getattr(thing, "__dict__", {}).values():
            if isinstance(part, GENERATORS):
                _look_at(part, plan)


def _names(code: CodeType) -> list[str]:
    """Return the global names that a function uses, and those defined inside it."""
    return [*code.co_names, *(name for c in code.co_consts if isinstance(c, CodeType) for name in _names(c))]


def _variables(function: FunctionType) -> list[Any]:
    """Return what a function keeps from call to call: variables of the scope around it, and defaults."""
    kept = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not assigned yet
            kept.append(cell.cell_contents)
    return kept if function.__closure__ or not all(isinstance(thing, ATOMS) for thing in kept) else []


def _with_own_cells(function: FunctionType, cells: dict[int, CellType]) -> FunctionType:
    closure = tuple(cells.setdefault(id(cell), CellType()) for cell in function.__closure__ or ())
    own = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure or None)
    own.__qualname__, own.__module__ = function.__qualname__, function.__module__
    own.__dict__.update(function.__dict__)
    return own


def _fill(own: FunctionType, function: FunctionType, memo: dict[int, Any]) -> None:
    """Copy defaults and surrounding variables of a function into its copy."""
    own.__defaults__ = copy.deepcopy(function.__defaults__, memo)
    own.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
    for mine, cell in zip(own.__closure__ or (), function.__closure__ or (), strict=True):
        with suppress(ValueError):
            mine.cell_contents = copy.deepcopy(cell.cell_contents, memo)


def _become_twin(twin: DataLoader[Any], loader: DataLoader[Any]) -> None:
    """Make the copy of a loader read in order, with workers that last as long as a pass."""
    twin.__dict__.update(persistent_workers=False, in_order=True, _iterator=None)
    if keeps_iterator(loader):
        twin.__class__ = DataLoader


def keeps_iterator(loader: DataLoader[Any]) -> bool:
    """Tell whether a loader of another class goes on with one iterator that it made at the start."""
    return any(isinstance(thing, Iterator) for name, thing in vars(loader).items() if name != "_iterator")


def loader_generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """Find the generators that a loader and its sampler draw from instead of the global one."""
    owners = (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if isinstance(generator, torch.Generator) and not is_global(generator)]


def _bytes(array: Any) -> float:
    """Bytes that a copy of a tensor or an array would take; infinite where it cannot be copied."""
    if isinstance(array, np.ndarray):
        return float("inf") if isinstance(array, np.memmap) or array.dtype.hasobject else array.nbytes
    if not array.is_leaf or array.device.type != "cpu" or array.layout != torch.strided or array.requires_grad:
        return float("inf")
    try:
        return array.untyped_storage().nbytes()  # of a view, all of what it is a view of is copied
    except (NotImplementedError, RuntimeError):
        return float("inf")


def is_global(generator: Any) -> bool:
    """Tell whether this is one of the generators that everybody draws from."""
    if isinstance(generator, torch.Generator):
        return any(generator is g for g in (torch.default_generator, *torch.cuda.default_generators))
    numpy = np.random.mtrand._rand
    return generator in (getattr(random, "_inst", None), numpy, numpy._bit_generator)


def state_of(generator: Any) -> Any:
    """Copy the state of a generator of any kind."""
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return copy.deepcopy(_bits(generator).state)


def set_state(generator: Any, state: Any) -> None:
    """Put a generator into a state that `state_of` returned."""
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        _bits(generator).state = state


def seed_generator(generator: Any, seed: int) -> None:
    """Seed a generator of any kind."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random | np.random.RandomState):
        generator.seed(seed)
    else:
        bits = _bits(generator)
        kind: Callable[[int], Any] = type(bits)
        bits.state = kind(seed).state


def _bits(generator: Any) -> Any:
    return generator.bit_generator if isinstance(generator, np.random.Generator) else generator
