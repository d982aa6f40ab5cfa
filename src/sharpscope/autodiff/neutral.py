"""Evaluation of modules as plain functions: without what training adds around them and derivatives cannot pass.

Inside ``plainly(modules)`` gradient checkpoints run their blocks directly (the same function; the recomputation would
read other weights), autocast and compiled code do nothing, caches of parametrizations are empty, and hooks are
suspended but for those that belong to the function.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any

import torch
import torch.nn.modules.module as torch_module
import torch.utils.checkpoint as torch_checkpoint
from torch import nn
from torch.nn.utils import parametrize

from .reach import HOOKS, hooks_of

BELONGING = ("torch.nn.utils", "torch.ao")
"""Modules of torch whose hooks form weights: weight and spectral normalization of old, pruning, fake quantization."""

SPREADING = "torch.distributed"
"""Module of torch whose hooks gather and scatter weights and activations while training; here weights are whole."""

_lock = RLock()


class _Direct:
    """Stands in for a checkpointed function, and applies the function itself."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _no_checkpoint(*args: Any, **kwargs: Any) -> Generator[None]:
    yield


def _nothing(*args: Any) -> None:
    return None


PATCHES: tuple[tuple[Any, str, Any], ...] = (
    (torch_checkpoint, "CheckpointFunction", _Direct),
    (torch_checkpoint, "_checkpoint_without_reentrant_generator", _no_checkpoint),
    (torch.autocast, "__enter__", lambda self: self),
    (torch.autocast, "__exit__", _nothing),
    (parametrize, "_cache_enabled", 0),
    *((torch_module, name, OrderedDict()) for name in vars(torch_module) if name.startswith("_global_forward_")),
    *((torch_module, name, OrderedDict()) for name in vars(torch_module) if name.startswith("_global_backward_")),
)
"""Replacements while a loss is evaluated: owner, name and new value."""


@contextmanager
def plainly(modules: Iterable[nn.Module], hooks: Collection[Callable[..., Any]] = ()) -> Iterator[None]:
    """Run modules as plain functions inside; of their hooks these run, and those that form weights.

    Hooks that a forward registers itself run, and are gone afterwards.
    """
    with _lock, ExitStack() as stack:
        before = [(owner, name, vars(owner)[name]) for owner, name, _ in PATCHES]
        modules = list(modules)
        suspended = [(m, m.__dict__.copy()) for m in modules if _is_dressed(m)]
        for owner, name, value in PATCHES:
            setattr(owner, name, value)
        for m, attributes in suspended:
            m.__dict__["_compiled_call_impl"] = None
            m.__dict__.update({kind: _chosen(attributes.get(kind, {}), hooks) for kind in HOOKS})
        try:
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
        finally:
            for m in modules:
                for fresh in hooks_of(m):
                    fresh.clear()
            for m, attributes in suspended:
                for name in (*HOOKS, "_compiled_call_impl"):
                    m.__dict__.pop(name, None)
                    m.__dict__.update({name: attributes[name]} if name in attributes else {})
            for owner, name, value in before:
                setattr(owner, name, value)


@contextmanager
def quiet(modules: Collection[nn.Module]) -> Iterator[None]:
    """Hold these modules, not their parts, in eval mode inside."""
    modes = [m.training for m in modules]
    for m in modules:
        m.training = False
    try:
        yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode


def user_hooks(modules: Iterable[nn.Module]) -> list[Callable[..., Any]]:
    """Find the hooks of modules that may be either part of the function or somebody's recording."""
    found = (h for m in modules for hooks in hooks_of(m) for h in hooks.values())
    return [h for h in found if not _belongs(h) and not _is_of(h, SPREADING)]


def _is_dressed(m: nn.Module) -> bool:
    return m.__dict__.get("_compiled_call_impl") is not None or bool(hooks_of(m))


def _chosen(present: Mapping[int, Any], chosen: Collection[Callable[..., Any]]) -> OrderedDict[int, Any]:
    return OrderedDict((key, h) for key, h in present.items() if _belongs(h) or any(h is c for c in chosen))


def _belongs(hook: Any) -> bool:
    return type(hook).__module__.startswith(BELONGING) or _is_of(hook, __package__)


def _is_of(hook: Any, package: str) -> bool:
    return (getattr(hook, "__module__", "") or "").startswith(package)
