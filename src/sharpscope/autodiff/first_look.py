"""The first look at a loss: what evidence says about it before anything is measured.

One gradient of the first batch, and another value of it, tell whether the loss is a function of the weights at all:
that it draws no random numbers, keeps no state that could not be put back, and reaches every weight by a road on which
it can be replaced.  Where gradients are stopped on the way, or a function brings its own backward, a product with the
Hessian is compared with differences of gradients.  The look costs about two gradients of one batch, and five more in
that case.
"""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from ..errors import InvalidValue, Random, SharpscopeError
from .checks import check_loss
from .data import Batch, map_tensors, tensors
from .expansion import BatchLoss, counting_saved_bytes, storage_of
from .neutral import user_hooks
from .reach import Surroundings
from .second_order import differentiating, holds_delayed_error


@dataclass(frozen=True)
class Look:
    """A record of what the first look at a loss has shown."""

    graph_bytes_per_example: float = 0.0  # that the graph of the gradient keeps alive
    once_differentiable: bool = False  # an operation is
    needs_grad: bool = False  # to be evaluated at all: the forward takes a gradient
    writes_weights: bool = False  # in place
    writes_inputs: bool = False
    writes_constants: bool = False  # frozen weights, such as those of an encoder that follows by momentum
    draws: bool = False  # random numbers, which make no difference
    hooks: tuple[Callable[..., Any], ...] = ()  # that are part of the function
    seen_hooks: tuple[Callable[..., Any], ...] = ()  # that the modules had, part of the function or not
    quiet: tuple[nn.Module, ...] = ()  # that would draw, and are held in eval mode
    captured: tuple[Tensor, ...] = ()  # weights of others that the loss depends on
    jacobian: bool = False  # training does not follow the gradient of one function


class Seen(Protocol):
    """An objective, as far as this file needs to know it."""

    @property
    def dropout(self) -> bool: ...
    def weights(self) -> Tensor: ...
    def unflatten(self, w: Tensor) -> dict[str, Tensor]: ...
    def parameters(self) -> Mapping[str, Tensor]: ...
    def constants(self) -> Mapping[str, Tensor]: ...
    def buffers(self) -> Mapping[str, Tensor]: ...
    def modules(self) -> list[nn.Module]: ...
    def named_modules(self) -> Iterable[tuple[str, nn.Module]]: ...
    def batches(self, device: torch.device | None = None) -> Any: ...
    def evaluate(self, batch: Batch, tensors: dict[str, Tensor], mode: Any = ...) -> BatchLoss: ...
    def seen(self, look: Look, *, dropout: bool | None = None) -> "Seen": ...
    def in_double(self) -> "Seen": ...


def first_look(f: Seen, around: Surroundings) -> Look:
    """Look at the loss of the first batch; raise InvalidValue where it has no curvature, with what to do.

    Nothing is left behind: buffers, other state and random states are as before.
    """
    with differentiating(), closing(f.batches()) as batches:
        batch = next(batches)
        with _global_randomness_put_back(), around.untouched():
            return _Looking(f, around, batch).look()


class _Looking:
    """The evidence about one batch, gathered step by step."""

    def __init__(self, f: Seen, around: Surroundings, batch: Batch) -> None:
        self.f = f
        self.around = around
        self.batch = batch
        self.w = f.weights()
        self.found = Look()
        self.spy = _Spy()
        self.custom = False  # whether a function brings its own backward

    def look(self) -> Look:
        hooks = tuple(user_hooks(self.f.modules()))
        try:
            loss, gradient = self._first_gradient()
        except SharpscopeError:
            raise
        except Exception:
            if not hooks:
                raise
            self.found = Look(hooks=hooks)  # the model does not run without them
            loss, gradient = self._first_gradient()
        self._evaluate_again(loss)
        if hooks and not self.found.hooks:
            self._try_hooks(hooks, loss, gradient)
        self._try_hooks_of_weights(gradient)
        if self.spy.stops or self.custom:
            self._compare_with_differences()
        return replace(self.found, seen_hooks=hooks)

    def _first_gradient(self) -> tuple[Tensor, Tensor]:
        """Evaluate loss and gradient on a copy of the batch, seeing what is written, drawn, reached and kept."""
        before = _randomness(self.w.device)
        leaves = {n: part.clone().requires_grad_() for n, part in self.f.unflatten(self.w).items()}
        args, kwargs, target = _cloned(self.batch[:3])
        own = self.batch._replace(args=args, kwargs=kwargs, target=target)
        self.spy = _Spy(tensors(list(leaves.values())), self.f.constants().values())
        with self.around.watched():
            batch, grads, size = self._differentiated(own, leaves)
            constants_written = self.spy.put_back()
        drawn = [name for name, state in _randomness(self.w.device).items() if state != before[name]]
        for name in drawn:
            if name in GLOBAL:
                self.around.add(GLOBAL[name])
        self.custom, captured = self._walk(batch.loss, leaves)
        pairs = zip(tensors(own[:3]), tensors(self.batch[:3]), strict=True)
        kept = self.f.unflatten(self.w)
        self.found = replace(
            self.found,
            graph_bytes_per_example=size / batch.examples,
            once_differentiable=holds_delayed_error(grads),
            writes_weights=self.spy.writes or not all(_same(leaves[n], kept[n]) for n in leaves),
            writes_constants=constants_written,
            writes_inputs=any(t._version or not _same(t, given) for t, given in pairs),
            captured=captured,
            draws=bool(drawn) or self.around.drew,
        )
        flat = [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(leaves.values(), grads, strict=True)]
        return batch.loss.detach(), torch.cat([g.reshape(-1) for g in flat])

    def _differentiated(
        self, batch: Batch, leaves: dict[str, Tensor]
    ) -> tuple[BatchLoss, tuple[Tensor | None, ...], float]:
        """Differentiate the loss once, with a graph; return the bytes that this graph keeps, too."""

        def gradient() -> tuple[BatchLoss, tuple[Tensor | None, ...]]:
            found = self.f.seen(self.found).evaluate(batch, self._tensors(leaves), self.spy)
            check_loss(found.loss)
            return found, torch.autograd.grad(found.loss, list(leaves.values()), create_graph=True, allow_unused=True)

        try:
            with counting_saved_bytes(
                [*leaves.values(), *self.f.parameters().values(), *self.f.constants().values()]
            ) as saved:
                found, grads = gradient()
            return found, grads, saved()
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
        found, grads = gradient()  # transforms of torch.func in the forward do not allow counting
        return found, grads, 4.0 * sum(t.nbytes for t in tensors((batch[:3], found.output)) if _is_dense(t))

    def _tensors(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**params, **{name: b.clone() for name, b in self.f.buffers().items()}}

    def _value(self, look: Look) -> Tensor:
        """Evaluate the loss once more at the same weights, as `look` would have it."""
        f, params = self.f.seen(look), self.f.unflatten(self.w)
        if look.needs_grad:
            params = {name: part.clone().requires_grad_() for name, part in params.items()}
            return f.evaluate(self.batch, self._tensors(params)).loss.detach()
        with torch.no_grad():
            return f.evaluate(self.batch, self._tensors(params)).loss

    def _evaluate_again(self, loss: Tensor) -> None:
        """Refuse a loss that is another one at a second evaluation, with other random numbers where it draws some."""
        if self.found.draws:
            self._reseed(1)
        try:
            again = self._value(self.found)
        except RuntimeError as error:
            if "require grad" not in str(error):
                raise
            self.found = replace(self.found, needs_grad=True)
            again = self._value(self.found)
        if self.found.draws:
            self._judge_randomness(loss, again)
        elif not _close(loss, again):
            raise InvalidValue(
                f"two evaluations at the same weights gave losses {loss.item():.8g} and {again.item():.8g}: the model"
                " or the loss keeps state from one to the next (a queue, a counter, an average) where it cannot be put"
                " back; keep it in buffers or attributes of a module, and pass a loss with state as an nn.Module"
            )

    def _judge_randomness(self, loss: Tensor, again: Tensor) -> None:
        """Refuse a loss to which the numbers that it draws make a difference, or hold the modules quiet that draw."""
        for seed in range(2, SEEDS):  # what drops one time in ten makes no difference most of the times
            if not _close(loss, again):
                break
            self._reseed(seed)
            again = self._value(self.found)
        idle = _close(loss, again)
        if idle and self.f.dropout:
            return
        names = self._drawing()
        look = replace(self.found, quiet=tuple(m for m in names.values() if m.training))
        try:
            first, second = (self._quietly(look, seed) for seed in (1, 2))
        except Exception:
            if idle:
                return  # these modules have no eval mode
            raise
        if idle:
            self.found = look if _close(first, loss) else self.found
        elif not _close(first, second):
            raise Random(
                f"the loss is random: {_named(names)} random numbers at every evaluation, in eval mode, too, so that"
                " its curvature is not defined; pass a model and a loss without noise (with its mean, say)"
            )
        elif self.f.dropout:
            raise Random(
                f"the loss is random: {_named(names)} random numbers at every evaluation, so that its curvature is not"
                " defined; call .eval() there, or measure the loss without: Objective(..., without_dropout=True)"
            )
        else:
            self.found = look

    def _quietly(self, look: Look, seed: int) -> Tensor:
        """Evaluate the loss without dropout, under a seed."""
        self._reseed(seed)
        with torch.set_grad_enabled(look.needs_grad):
            leaves = {n: part.clone().requires_grad_() for n, part in self.f.unflatten(self.w).items()}
            return self.f.seen(look, dropout=False).evaluate(self.batch, self._tensors(leaves)).loss.detach()

    def _drawing(self) -> dict[str, nn.Module]:
        """Find the modules that draw random numbers in their forward, outside of their parts."""
        found: dict[str, nn.Module] = {}
        stack: list[tuple[str, nn.Module]] = []
        before = self._all_randomness()

        def passed() -> None:
            nonlocal before
            now = self._all_randomness()
            if stack and now != before:
                found[stack[-1][0]] = stack[-1][1]
            before = now

        def enter(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any) -> None:
                passed()
                stack.append((name, module))

            return note

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            passed()
            stack.pop()

        handles = []
        for name, m in self.f.named_modules():
            handles += [m.register_forward_pre_hook(enter(name)), m.register_forward_hook(leave)]
        try:
            self._value(self.found)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _all_randomness(self) -> dict[str, bytes]:
        return _randomness(self.w.device) | {"own": repr(self.around.states()).encode()}

    def _reseed(self, seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.around.seed(seed)

    def _try_hooks(self, hooks: tuple[Callable[..., Any], ...], loss: Tensor, gradient: Tensor) -> None:
        """Find whether the hooks are part of the function: whether loss or gradient are others with them."""
        look = replace(self.found, hooks=hooks)
        leaves = {n: part.clone().requires_grad_() for n, part in self.f.unflatten(self.w).items()}
        with Surroundings(hooks, self.f.modules()).watched():
            with_hooks = self.f.seen(look).evaluate(self.batch, self._tensors(leaves)).loss
            parts = torch.autograd.grad(with_hooks, list(leaves.values()), materialize_grads=True)
        if not _close(loss, with_hooks):
            self.found = look
        elif not _close(gradient, torch.cat([g.reshape(-1) for g in parts])):
            warnings.warn(
                "a backward hook of the model changes its gradients: what is measured is the loss without this hook,"
                " while training follows the changed gradients",
                stacklevel=6,
            )

    def _try_hooks_of_weights(self, gradient: Tensor) -> None:
        """Say which weights have hooks that change their gradients: training follows these, L does not."""
        changed = []
        parts = self.f.unflatten(gradient)
        for name, p in self.f.parameters().items():
            hooks = tuple((getattr(p, "_backward_hooks", None) or {}).values())
            if not hooks or p.is_complex():
                continue
            with Surroundings(hooks, self.f.modules()).watched():
                found = [hook(parts[name].to(p.dtype)) for hook in hooks]
            changed += [name] * any(isinstance(g, Tensor) and not _close(g.to(gradient), parts[name]) for g in found)
        if changed:
            warnings.warn(
                f"a hook changes the gradient of {', '.join(changed)}: what is measured is the loss with its own"
                " gradient, while training follows the changed one",
                stacklevel=6,
            )

    def _walk(self, loss: Tensor, leaves: Mapping[str, Tensor]) -> tuple[bool, tuple[Tensor, ...]]:
        """Find functions with a backward of their own, and weights of others, in the graph of the loss.

        Raises:
            InvalidValue: some of the model's own weights are reached by a road on which they were not replaced.
        """
        given = {id(t) for t in leaves.values()}
        own = {id(p): name for name, p in self.f.parameters().items()}
        custom, stray, captured = False, set[str](), list[Tensor]()
        for node in nodes(loss):
            custom |= isinstance(node, torch.autograd.function.BackwardCFunction)
            variable = getattr(node, "variable", None)
            if variable is None or id(variable) in given:
                continue
            if id(variable) in own:
                stray.add(own[id(variable)])
            elif isinstance(variable, nn.Parameter):
                captured.append(variable)
        if stray:
            raise InvalidValue(
                f"the loss depends on {', '.join(sorted(stray))} by something that was computed before it was"
                " evaluated (a cached view or transform of these weights), where they cannot be replaced; compute it"
                " inside the forward or the loss"
            )
        return custom, tuple(captured)

    def _compare_with_differences(self) -> None:
        """Compare a product with differences of gradients, in double precision, to see if products follow the training.

        Where gradients are stopped the Jacobian of the gradient is another matrix than its derivative by autograd.
        Where a function brings a straight-through backward, the gradient is a staircase whose average slope is.
        """
        if self.found.once_differentiable:
            return
        f = self.f.seen(self.found).in_double()
        w = f.weights()
        noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=w.dtype).to(w)
        w = w + 0.01 * (w.abs() + w.square().mean().sqrt()) * noise  # away from where a rectifier sees exact zeros
        v = torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=w.dtype).to(w)
        v *= w.norm() / v.norm() if w.norm() > 0 else 1 / v.norm()

        def slope(at: Tensor, differentiable: bool = False) -> Tensor:
            loss = f.evaluate(self.batch, self._tensors(f.unflatten(at))).loss
            return torch.autograd.grad(loss, at, create_graph=differentiable)[0]

        leaf = w.clone().requires_grad_()
        try:
            g = slope(leaf, differentiable=True)
            product = torch.autograd.grad(g, leaf, v, materialize_grads=True)[0] if g.requires_grad else 0 * w
        except RuntimeError:
            return  # in double precision it does not run, or there is no second derivative: said at the first product

        def difference(h: float) -> Tensor:
            return (slope((w + h * v).requires_grad_()) - g.detach()) / h

        near = difference(1e-7)
        error = _distance(product, near)
        if error > 0.02:
            if _distance(product, difference(1e-9)) <= 0.02:
                return  # right where it stands; the longer step has crossed kinks, of which rectifiers have millions
            far = difference(1e-3)
            if _distance(product, far) > 0.02:
                self._disagreement(_distance(near, far))
        elif error > 1e-4 and _distance(near, difference(1e-5)) < 0.1 * error:
            self._disagreement(0.0)  # little here, but it is no rounding: it may be much at other weights

    def _disagreement(self, roughness: float) -> None:
        """Products by autograd are not the slope of the gradient: say what they are, or what to measure instead."""
        if self.spy.rounds:
            warnings.warn(
                "a rounding passes gradients straight through: its true slope is zero almost everywhere, and products"
                " follow the backward that it has instead, as training does on average",
                stacklevel=7,
            )
        elif roughness <= 0.2:
            self.found = replace(self.found, jacobian=True)
        else:
            raise InvalidValue(
                "the gradient of this loss jumps from place to place (gradients that are passed on past an operation"
                " that is not smooth), and products by autograd are not its slope: there is no curvature to measure;"
                " measure the loss without that operation"
            )


class _Spy(TorchFunctionMode):
    """Sees where gradients are stopped and weights are written; constants are saved before they are.

    Gradients are stopped where a number that was computed outside of the graph, from one inside, comes back into it.
    """

    def __init__(self, weights: Iterable[Tensor] = (), constants: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._constants = {s.data_ptr(): t for t in constants if (s := storage_of(t)) is not None}
        self._saved: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # a constant, its memory and what was in it
        self._weights = {s.data_ptr() for t in weights if (s := storage_of(t)) is not None}
        self._cut: dict[int, Tensor] = {}  # tensors by their ids, which live as long as they do
        self._cut_memory: set[int] = set()
        self.stops = False
        self.writes = False
        self.rounds = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        data = func in DATA
        inplace = (name.endswith("_") and not name.endswith("__")) or name in INPLACE or func == DATA[1]
        if inplace or data:
            self._save(args[0] if args and isinstance(args[0], list | tuple) else args[:1])
        given = _arguments((*args, *kwargs.values()) if kwargs else args)
        transformed = torch._C._functorch.maybe_current_level() is not None
        moving = transformed or any(t.requires_grad for t in given)
        cut = any(self._is_cut(t) for t in given)
        targets = _arguments(args[:1]) if inplace else []
        of_weights = any(map(self._is_weight, targets))
        bounds = of_weights and (data or not any(t.requires_grad for t in targets))  # weights behind autograd's back
        out = func(*args, **(kwargs or {}))
        self.writes |= of_weights
        self.rounds |= name in ROUNDING or "fake_quant" in name
        if (moving or cut) and name in STOPPING:
            self.stops = True
        elif not bounds and (cut or (moving and (data or name in DETACHING or not torch.is_grad_enabled()))):
            self._follow([*_arguments((out,)), *targets], written=inplace or "out" in (kwargs or {}))
            self.stops |= transformed  # where nothing can be followed
        return out

    def _is_weight(self, t: Tensor) -> bool:
        storage = storage_of(t)
        return storage is not None and storage.data_ptr() in self._weights

    def _is_cut(self, t: Tensor) -> bool:
        if id(t) in self._cut:
            return True
        storage = storage_of(t) if self._cut_memory else None
        return storage is not None and storage.data_ptr() in self._cut_memory

    def _follow(self, results: list[Tensor], written: bool) -> None:
        """Follow what no gradient goes through: it stops one where it comes back into the graph.

        Running averages and logs never do.
        """
        for t in results:
            if not t.is_floating_point() and not t.is_complex():
                continue  # a mask or an index, whose derivative is zero
            self.stops |= t.requires_grad and (written or torch.is_grad_enabled())  # views require it in any case
            self._cut[id(t)] = t
            storage = storage_of(t) if written else None
            if storage is not None:
                self._cut_memory.add(storage.data_ptr())

    def put_back(self) -> bool:
        """Put back the constants that were written, and tell whether there were any; follow nothing any more."""
        self._cut.clear()
        written = False
        for constant, memory, content in self._saved.values():
            if constant.data_ptr() != memory.data_ptr() or not _same(constant, content):
                written = True
                constant.data = memory
                memory.copy_(content)
        return written

    def _save(self, targets: Iterable[Any]) -> None:
        for t in targets:
            storage = storage_of(t) if isinstance(t, Tensor) else None
            constant = None if storage is None else self._constants.get(storage.data_ptr())
            if constant is not None and id(constant) not in self._saved:
                memory = constant.detach()
                self._saved[id(constant)] = constant, memory, memory.clone()


def _arguments(found: Iterable[Any]) -> list[Tensor]:
    """List the tensors among the arguments of an operation, which come alone or in lists."""
    out: list[Tensor] = []
    for a in found:
        if isinstance(a, Tensor):
            out.append(a)
        elif isinstance(a, list | tuple):
            out += _arguments(a)
    return out


DETACHING = frozenset({"detach", "detach_"})
"""Operations that give the same numbers outside of the graph."""

SEEDS = 10
"""Seeds of random numbers under which a loss that draws some is evaluated, where they seem to make no difference."""

STOPPING = frozenset({"item", "tolist", "numpy", "__float__", "__array__", "__dlpack__", "untyped_storage"})
"""Operations that take numbers out of tensors."""

INPLACE = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"})
"""Operations that write into their first argument, beside those with a name that ends in an underscore."""

DATA = (torch.Tensor.data.__get__, torch.Tensor.data.__set__)  # type: ignore[attr-defined]
"""Operations behind the data of a tensor, which autograd does not see."""

ROUNDING = frozenset({"round", "round_", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside"})
"""Operations that are flat almost everywhere."""

GLOBAL: dict[str, Any] = {"numpy": np.random.get_state.__self__, "random": random.getstate.__self__}  # type: ignore[attr-defined]
"""Global generators beside torch's own."""


def nodes(loss: Tensor) -> Iterator[Node]:
    """Yield every node of the graph of a loss once."""
    stack = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        fresh = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= fresh
        stack.extend(fresh)


def _randomness(device: torch.device) -> dict[str, bytes]:
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": _numpy_state(),
        "random": str(hash(random.getstate())).encode(),
    }
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states


def _numpy_state() -> bytes:
    state = tuple(np.random.get_state(legacy=True))
    return np.asarray(state[1]).tobytes() + str(state[2:]).encode()


@contextmanager
def _global_randomness_put_back() -> Iterator[None]:
    before = np.random.get_state()
    try:
        yield  # the others are put back after reading the data
    finally:
        np.random.set_state(before)


def _named(modules: Mapping[str, nn.Module]) -> str:
    if not modules:
        return "the loss function, or the model outside of its modules, draws"
    named = (
        f"'{name}' ({type(m).__name__})" if name else f"the model ({type(m).__name__})" for name, m in modules.items()
    )
    return f"{', '.join(named)} draw{'s' if len(modules) == 1 else ''}"


def _cloned(trees: Any) -> Any:
    return map_tensors(trees, lambda t: t.detach().clone().requires_grad_(t.requires_grad))


def _is_dense(t: Tensor) -> bool:
    return t.layout == torch.strided


def _same(a: Tensor, b: Tensor) -> bool:
    if not _is_dense(a):
        return True
    return torch.equal(a, b) or bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def _close(a: Tensor, b: Tensor) -> bool:
    """Tell whether two numbers, or vectors, are equal but for rounding."""
    bound = 100 * torch.finfo(a.dtype).eps * torch.maximum(a.norm(), b.norm())
    return bool((a - b).norm() <= bound) or bool((a.isnan() & b.isnan()).all())


def _distance(a: Tensor, b: Tensor) -> float:
    size = torch.maximum(a.norm(), b.norm()).item()
    return (a - b).norm().item() / size if size > 0 else 0.0
