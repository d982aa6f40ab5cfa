"""State that a model and a loss reach beside parameters and buffers, and a guard that puts all of it back.

A step counter as an attribute, a moving average in a plain tensor, a queue in a closure, a generator of one's own, a
discriminator that a loss function calls: evaluating a loss may change any of these.  `Surroundings` finds them once,
through attributes, closures, defaults, bound objects and the global names that a function uses; ``with
surroundings.untouched():`` leaves them as they were.
"""

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from functools import cache, partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LARGEST_CONTAINER = 10_000
"""Entries of a list, dict or set beyond which it is taken for data, not for state."""

MOST_OBJECTS = 20_000
"""Objects that are looked at, at most."""

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


class Surroundings:
    """State around a model and a loss that are evaluated: found once, and put back after every evaluation.

    ``modules`` are those that are no part of the `known` ones, such as a discriminator in the closure of a loss.
    """

    def __init__(self, roots: Iterable[Any], known: Iterable[nn.Module]) -> None:
        self._known = {id(m._parameters) for m in known}  # which a twin of a module shares with it
        self.modules: list[nn.Module] = []
        self._spaces: list[dict[str, Any]] = []  # attributes of modules and objects
        self._classes: list[type] = []
        self._globals: list[tuple[dict[str, Any], str]] = []
        self._cells: list[CellType] = []
        self._containers: list[Any] = []
        self._generators: list[Generator] = []
        self._written: set[int] = set()  # plain tensors that were seen to be written in place
        self._seen: set[int] = set()
        self.drew = False  # whether the latest evaluation drew from one of the generators
        self._find(list(roots))

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Put back what changes inside: attributes, entries of containers, closures, globals and generators.

        Plain tensors that were seen to be written in place are replaced by copies inside.
        """
        self.drew = False
        spaces = [(space, dict(space)) for space in self._spaces]
        named = [(space, name, space[name]) for space, name in self._globals if name in space]
        classes = [(c, dict(vars(c))) for c in self._classes]
        cells = [(cell, cell.cell_contents) for cell in self._cells if _filled(cell)]
        containers = [(c, _copied(c)) for c in self._containers]
        states = [(g, _state(g)) for g in self._generators]
        if self._written:
            self._replace_written(spaces, named, cells, containers)
        try:
            yield
        finally:
            for container, before in containers:
                _restore(container, before)
            for space, attributes in spaces:
                _restore_space(space, attributes)
            for kind, attributes in classes:
                _restore_class(kind, attributes)
            for space, name, value in named:
                if space.get(name) is not value:
                    space[name] = value
            for cell, value in cells:
                if not _filled(cell) or cell.cell_contents is not value:
                    cell.cell_contents = value
            for generator, state in states:
                if not _equal_states(_state(generator), state):
                    self.drew = True
                    _set_state(generator, state)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """As `untouched`, for a first evaluation: plain tensors that it writes in place are found and put back."""
        before = [(t, t.detach().clone(), t._version) for t in self.tensors()]
        with self.untouched():
            yield
        for t, content, version in before:
            if t._version != version or not _same(t, content):
                self._written.add(id(t))
                with torch.no_grad():
                    t.detach().copy_(content)

    def states(self) -> list[Any]:
        """The states of all generators."""
        return [_state(g).tolist() if isinstance(g, torch.Generator) else _state(g) for g in self._generators]

    def add(self, generator: Generator) -> None:
        """Put back this generator, too, such as a global one that evaluations draw from."""
        if all(g is not generator for g in self._generators):
            self._generators.append(generator)

    def seed(self, seed: int) -> None:
        """Seed all generators."""
        for g in self._generators:
            if isinstance(g, torch.Generator):
                g.manual_seed(seed)
            elif isinstance(g, np.random.Generator):
                g.bit_generator.state = type(g.bit_generator)(seed).state
            else:
                g.seed(seed)

    def tensors(self) -> list[Tensor]:
        """Plain tensors that are neither parameters nor buffers: attributes, entries of containers, in closures."""
        values = [v for space in self._spaces for v in space.values()]
        values += [space.get(name) for space, name in self._globals]
        values += [cell.cell_contents for cell in self._cells if _filled(cell)]
        for c in self._containers:
            values += c.values() if isinstance(c, MutableMapping) else c
        unique = {id(v): v for v in values if _plain(v)}
        return list(unique.values())

    def _replace_written(self, spaces: Any, named: Any, cells: Any, containers: Any) -> None:
        """Put copies where the plain tensors are that are written in place."""
        copies: dict[int, Tensor] = {}

        def fresh(t: Tensor) -> Tensor:
            return copies.setdefault(id(t), t.detach().clone())

        for space, attributes in spaces:
            space.update({name: fresh(v) for name, v in attributes.items() if id(v) in self._written})
        for space, name, value in named:
            if id(value) in self._written:
                space[name] = fresh(value)
        for cell, value in cells:
            if id(value) in self._written:
                cell.cell_contents = fresh(value)
        for container, before in containers:
            if isinstance(container, MutableMapping):
                container.update({k: fresh(v) for k, v in before.items() if id(v) in self._written})
            elif isinstance(container, MutableSequence):
                for i, v in enumerate(before):
                    if id(v) in self._written:
                        container[i] = fresh(v)

    def _find(self, queue: list[Any]) -> None:
        while queue and len(self._seen) < MOST_OBJECTS:
            value = queue.pop()
            if id(value) in self._seen or value is None or isinstance(value, int | float | str | bytes | Tensor):
                continue
            self._seen.add(id(value))
            queue += self._neighbours(value)

    def _neighbours(self, value: Any) -> list[Any]:
        """Note what kind of state a value is, and return what it leads to."""
        if isinstance(value, nn.Module):
            return self._inside_module(value)
        if isinstance(value, FunctionType):
            return self._inside_function(value)
        if isinstance(value, type):
            return self._inside_class(value)
        if isinstance(value, MethodType):
            return [value.__self__, value.__func__]
        if isinstance(value, BuiltinMethodType):
            return [] if isinstance(value.__self__, ModuleType | type) else [value.__self__]
        if isinstance(value, partial):
            return [value.func, *value.args, *value.keywords.values()]
        if isinstance(value, Generator):
            self._generators.append(value)
            return []
        if isinstance(value, MutableMapping | MutableSequence | MutableSet | tuple):
            return self._inside_container(value)
        if _foreign(value) or not isinstance(getattr(value, "__dict__", None), dict):
            return []
        self._spaces.append(vars(value))
        call = getattr(type(value), "__call__", None)  # noqa: B004 - the method itself is looked into
        return [*vars(value).values(), call]

    def _inside_module(self, module: nn.Module) -> list[Any]:
        if id(module._parameters) not in self._known:
            self.modules.append(module)
            self._known |= {id(m._parameters) for m in module.modules()}
        found: list[Any] = []
        for m in module.modules():
            self._seen.add(id(m))
            self._spaces.append(m.__dict__)
            found += [v for name, v in m.__dict__.items() if name not in INTERNAL]
            found += [hook for hooks in hooks_of(m) for hook in hooks.values()]
            if not _foreign(m):
                found += [type(m).forward, type(m)]
        return found

    def _inside_function(self, function: FunctionType) -> list[Any]:
        if _is_library(function.__module__):
            return [c.cell_contents for c in function.__closure__ or () if _filled(c)]
        space = function.__globals__
        used = [name for name in _names(function) if name in space and not isinstance(space[name], ModuleType)]
        self._globals += [(space, name) for name in used if not isinstance(space[name], type | FunctionType)]
        self._cells += function.__closure__ or ()
        inside = [c.cell_contents for c in function.__closure__ or () if _filled(c)]
        return [
            *inside,
            *(space[n] for n in used),
            *(function.__defaults__ or ()),
            *(function.__kwdefaults__ or {}).values(),
        ]

    def _inside_class(self, kind: type) -> list[Any]:
        if _is_library(kind.__module__):
            return []
        self._classes.append(kind)
        return [v for v in vars(kind).values() if isinstance(v, MutableMapping | MutableSequence | MutableSet)]

    def _inside_container(self, value: Any) -> list[Any]:
        if len(value) > LARGEST_CONTAINER:
            return []
        if isinstance(value, MutableMapping):
            if isinstance(value, dict):
                self._containers.append(value)
            return list(value.values())
        if isinstance(value, list | deque | set):
            self._containers.append(value)
        return list(value)


INTERNAL = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has: parameters, buffers, submodules and hooks are treated by themselves."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def hooks_of(module: nn.Module) -> list[OrderedDict[int, Callable[..., Any]]]:
    """The hooks of a module, by kind."""
    return [module.__dict__[kind] for kind in HOOKS if module.__dict__.get(kind)]


def _names(function: FunctionType) -> set[str]:
    """Global names that a function and the functions inside it use."""
    codes, names = [function.__code__], set[str]()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [c for c in code.co_consts if hasattr(c, "co_names")]
    return names


def _foreign(value: Any) -> bool:
    """Tell whether a value is of a library's class: such objects are no state of a loss, and some reach everything."""
    return _is_library(type(value).__module__)


def _is_library(module: str | None) -> bool:
    root = (module or "builtins").partition(".")[0]
    return root == "sharpscope" or root in sys.stdlib_module_names - {"__main__"} or _is_installed(root)


@cache
def _is_installed(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.grad_fn is None


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _copied(container: Any) -> Any:
    return container.copy() if len(container) <= LARGEST_CONTAINER else None


def _restore(container: Any, before: Any) -> None:
    if before is None:
        return
    if isinstance(container, MutableMapping):
        if list(map(id, container.values())) != list(map(id, before.values())) or container.keys() != before.keys():
            container.clear()
            container.update(before)
    elif len(container) != len(before) or list(map(id, container)) != list(map(id, before)):
        container.clear()
        if isinstance(container, MutableSet):
            for value in before:
                container.add(value)
        else:
            container.extend(before)


def _restore_space(space: dict[str, Any], before: dict[str, Any]) -> None:
    if len(space) == len(before) and all(map(_is, space.values(), before.values())):
        return
    for name in space.keys() - before.keys():
        del space[name]
    for name, value in before.items():
        if name not in space or space[name] is not value:
            space[name] = value


def _restore_class(kind: type, before: dict[str, Any]) -> None:
    now = vars(kind)
    if len(now) == len(before) and all(map(_is, now.values(), before.values())):
        return
    for name in now.keys() - before.keys():
        delattr(kind, name)
    for name, value in before.items():
        if vars(kind).get(name) is not value:
            setattr(kind, name, value)


def _is(a: object, b: object) -> bool:
    return a is b


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach(), b) or bool(torch.allclose(a.detach(), b, rtol=0, atol=0, equal_nan=True))


def _state(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.getstate()


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)


def _equal_states(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else repr(a) == repr(b)
