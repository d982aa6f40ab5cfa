"""Checks which modules of a model have no second derivative, or a wrong one."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..linalg.operators import without_autocast
from .data import tensors
from .smooth import smooth


@contextmanager
def differentiating() -> Iterator[None]:
    """Turn gradients on and autocast off, whatever the caller's context: second derivatives run in it as well."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_autocast())
        yield


def ordinary(w: Tensor) -> Tensor:
    """Return a tensor that derivatives can be taken of: a copy of one that was made in inference mode."""
    if not w.is_inference():
        return w
    with torch.inference_mode(mode=False):
        return w.clone()


def holds_delayed_error(grads: Iterable[Tensor | None]) -> bool:
    """Tell whether a function marked ``once_differentiable`` is behind these gradients.

    Torch puts an error on its gradient that is raised only where a graph is run to all its leaves; a derivative in
    certain inputs leaves out the term without a warning.
    """
    stack = [g.grad_fn for g in grads if g is not None and g.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.name().rpartition("::")[2] in ("Error", "DelayedError"):
            return True
        fresh = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= fresh
        stack.extend(fresh)
    return False


@differentiating()
def says_missing(error: RuntimeError) -> bool:
    """Tell whether an error of torch is about a derivative that does not exist."""
    return re.search(r"not implemented|once_differentiable|does not require grad|retain_graph", str(error)) is not None


def modules_without_second_derivative(model: nn.Module, forward: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Name the innermost modules whose output has no second derivative, or a wrong one, as `forward` calls them."""
    seen: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: seen.append((name, module, args, kwargs))

    handles = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in model.named_modules()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    missing: dict[str, nn.Module] = {}
    wrong: dict[str, nn.Module] = {}
    for name, module, args, kwargs in reversed(seen):
        inside = any(m is not module and m in module.modules() for m in (*missing.values(), *wrong.values()))
        agrees = inside or _twice_differentiable(module, args, kwargs)
        if not agrees:
            (missing if agrees is None else wrong)[name] = module
    return _named(missing), _named(wrong)


def _named(modules: dict[str, nn.Module]) -> list[str]:
    return sorted(f"'{name}' ({type(m).__name__})" for name, m in modules.items() if name)


def _twice_differentiable(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | None:
    """Tell whether reverse over reverse of ``½ ‖output‖²`` in inputs and parameters agrees with differences.

    None: there is no such derivative.  Differences disagree across the kink of a rectifier, too.
    """
    leaves, spec = tree_flatten((args, kwargs))
    own = {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}
    moving = [name for name, p in module.named_parameters() if p.is_floating_point()]
    inputs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    point = [own[name] for name in moving] + [leaves[i].detach() for i in inputs]
    if not point:
        return True
    g = torch.Generator().manual_seed(0)
    along = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in point]

    def slope(h: float, differentiable: bool) -> tuple[list[Tensor], list[Tensor]]:
        at = [(t + h * d).requires_grad_() for t, d in zip(point, along, strict=True)]
        values = {**{name: t.clone() for name, t in own.items()}, **dict(zip(moving, at, strict=False))}
        filled = list(leaves)
        for i, t in zip(inputs, at[len(moving) :], strict=True):
            filled[i] = t
        with smooth():
            outputs = functional_call(module, values, *tree_unflatten(filled, spec))
        total = sum((z.square().sum() / 2 for z in tensors(outputs) if z.requires_grad), torch.zeros(()))
        if not total.requires_grad:
            return at, [torch.zeros_like(t) for t in at]
        return at, list(torch.autograd.grad(total, at, create_graph=differentiable, materialize_grads=True))

    try:
        at, slopes = slope(0.0, True)
        if holds_delayed_error(slopes):
            return None
        pairs = [(z, d) for z, d in zip(slopes, along, strict=True) if z.requires_grad]
        bent = (
            torch.autograd.grad([z for z, _ in pairs], at, [d for _, d in pairs], materialize_grads=True)
            if pairs
            else [torch.zeros_like(t) for t in at]
        )
    except RuntimeError as error:
        return None if says_missing(error) else True  # or the module does not run on inputs that ask for gradients
    h = torch.finfo(point[0].dtype).eps ** (1 / 3) * max(t.abs().max().item() for t in point)
    up, down = slope(h, False)[1], slope(-h, False)[1]
    expected = torch.cat([((a - b) / (2 * h)).flatten() for a, b in zip(up, down, strict=True)])
    found = torch.cat([b.flatten() for b in bent])
    return bool((found - expected).norm() <= 0.05 * expected.norm() + torch.finfo(found.dtype).eps ** 0.5)
