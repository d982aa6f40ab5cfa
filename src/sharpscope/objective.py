"""Model + loss + data as one smooth function of one flat weight vector.

``L(w) = Σ_b n_b ℓ_b(w) / Σ_b n_b`` over the batches b of the data, each with mean loss ``ℓ_b`` and ``n_b`` examples,
where ``w`` holds every trainable parameter in the order of ``model.named_parameters()``.  This is the only file that
calls autograd.  Evaluating changes nothing: weights are passed in, buffers are cloned, random states are put back,
``.grad`` and the training modes are never touched.

P parameters.
"""

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.data import DataLoader

from .smooth import smooth

Loss = Callable[[Any, Any], Tensor]


class Objective:
    """``L(w)``, its gradient and its products with second and third derivatives, at any flat `w` [N1].

    Args:
        model: any module.  Its trainable parameters form `w`; buffers and frozen parameters are constants.
        loss: ``loss(output, target)`` with the *mean* over the batch as a scalar tensor.
        data: batches, iterable again and again (a list, a DataLoader).  What shuffles or augments is read under one
            fixed seed in every pass, so that L is one function; `check` says whether another seed would change it.
            A batch is a pair ``(inputs, target)``, where inputs are one tensor, a tuple (positional arguments) or a
            dict (keyword arguments) - or a dict, which goes to the model as keywords and to the loss as the target.
        memory_budget: bytes that the graphs kept for repeated products may hold; batches beyond it are recomputed
            at every product (1.5 to 2.5 times as dear).  The graph of one batch is always whole: use smaller batches
            where that is too much.

    Products follow autograd: where a layer's backward is not the derivative of its forward (spectral normalization in
    training mode, an embedding's ``padding_idx``) they are those of the backward.

    Raises:
        ValueError: nothing to train, parameters of several or of low precisions, a loss that is not a finite
            differentiable scalar, parameters that the loss does not reach, active dropout modules, data that are
            empty or can be read only once, a loss module that sums.

    >>> net = nn.Linear(3, 1)
    >>> f = Objective(net, nn.functional.mse_loss, [(torch.ones(4, 3), torch.zeros(4, 1))])
    >>> f.size, f.slices
    (4, {'weight': slice(0, 3, None), 'bias': slice(3, 4, None)})
    """

    def __init__(self, model: nn.Module, loss: Loss, data: Iterable[Any], *, memory_budget: int = 2 << 30) -> None:
        self.model, self.loss, self.data, self.memory_budget = model, loss, data, memory_budget
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(f"{type(model).__name__} has no trainable parameter; set requires_grad on at least one")
        _check_kind(trainable)
        self.shapes = {name: p.shape for name, p in trainable.items()}
        sizes = [p.numel() for p in trainable.values()]
        ends = np.cumsum(sizes).tolist()
        self.slices = {name: slice(end - n, end) for name, n, end in zip(trainable, sizes, ends, strict=True)}
        self.size: int = ends[-1]
        self._droppers = [(name, m) for name, m in model.named_modules() if isinstance(_rate(m), float)]
        _check_data(data)
        reduction = getattr(loss, "reduction", "mean")
        if reduction != "mean":
            raise ValueError(f"the loss has reduction='{reduction}'; batches are weighted by size, so use 'mean'")
        self._seed = None if isinstance(data, list | tuple) else 0
        self._graph_bytes_per_example = self._check_first_batch()

    def weights(self) -> Tensor:
        """The model's trainable parameters now, as a new flat vector ``(P,)``."""
        params = dict(self.model.named_parameters())
        return torch.cat([params[name].detach().reshape(-1) for name in self.slices])

    def unflatten(self, w: Tensor) -> dict[str, Tensor]:
        """Views of `w` ``(P,)`` under the parameters' names and shapes."""
        parts = w.split([s.stop - s.start for s in self.slices.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def load(self, w: Tensor) -> None:
        """Write `w` into the model: the one method that changes it."""
        params = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self.unflatten(w).items():
                params[name].copy_(value)

    def on(self, data: Iterable[Any]) -> "Objective":
        """The same model and loss on other data (a mini-batch, say), without checking anything again."""
        other = copy.copy(self)
        other.data = data
        return other

    def _seeded(self, seed: int) -> "Objective":
        other = copy.copy(self)
        other._seed = seed
        return other

    def value(self, w: Tensor) -> Tensor:
        """``L(w)``, a scalar."""
        with torch.no_grad():
            total, count = w.new_zeros(()), 0
            for chunk in self._chunks(self.unflatten(w)):
                total, count = total + chunk.examples * chunk.loss.detach(), count + chunk.examples
        return total / count

    @torch.enable_grad()
    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``L(w)`` and ``∇L(w)`` ``(P,)`` in one pass, one batch in memory at a time."""
        w = w.detach().requires_grad_()
        total, slope, count = w.new_zeros(()), torch.zeros_like(w), 0
        for chunk in self._chunks(self.unflatten(w)):
            (g,) = torch.autograd.grad(chunk.loss, w)
            total, slope = total + chunk.examples * chunk.loss.detach(), slope.add_(g, alpha=chunk.examples)
            count += chunk.examples
        return total / count, slope / count

    def grad(self, w: Tensor) -> Tensor:
        """``∇L(w)`` ``(P,)``."""
        return self.value_and_grad(w)[1]

    def at(self, w: Tensor) -> "Expansion":
        """The derivatives around `w`, with the graphs kept: use this for more than one product at a point."""
        return Expansion(self, w)

    def hvp(self, w: Tensor, v: Tensor) -> Tensor:
        """``∇²L(w) v`` ``(P,)``."""
        return self.at(w).hvp(v)

    def third(self, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """``∇_w (uᵀ ∇²L(w) v)`` ``(P,)`` with u and v held fixed."""
        return self.at(w).third(u, v)

    def gauss_newton(self, w: Tensor, v: Tensor) -> Tensor:
        """``Jᵀ ∇²ℓ J v`` ``(P,)``: J the Jacobian of the outputs, ∇²ℓ the Hessian of the loss in the outputs [N3]."""
        return self.at(w).gauss_newton(v)

    def check(self) -> None:
        """Read the data under two seeds and raise ValueError unless the loss is the same (to rounding) and finite."""
        w = self.weights()
        first, second = (self._seeded(seed).value(w).item() for seed in (1, 2))
        if not math.isfinite(first):
            raise ValueError(f"the loss is {first} at the current weights; curvature needs a finite loss")
        if abs(first - second) > torch.finfo(w.dtype).eps ** 0.5 * max(abs(first), torch.finfo(w.dtype).tiny):
            raise ValueError(
                f"two passes over the same weights gave losses {first:.8g} and {second:.8g}: data that are shuffled or"
                " augmented anew (or a random model) have no curvature; fix the batches, for example as a list"
            )

    def _chunks(self, params: Mapping[str, Tensor]) -> Iterator["_Chunk"]:
        """The loss of each batch as a function of `params`, with buffers cloned once per pass."""
        _check_deterministic(self._droppers)
        device = next(iter(params.values())).device
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        batch = None
        with _own_randomness(self.data, self._seed):
            for batch in self.data:
                args, kwargs, target = _split(_to(batch, device))
                with smooth():
                    output = functional_call(self.model, {**params, **buffers}, args, kwargs)
                    loss = self.loss(output, target)
                yield _Chunk(_count(target, (args, kwargs)), loss, output)
        if batch is None:
            raise ValueError("the data hold no batch, or not a second time; pass a list of pairs (inputs, target)")

    @torch.enable_grad()
    def _check_first_batch(self) -> float:
        """Refuse what cannot be differentiated; return the bytes of the gradient's graph per example."""
        leaves = {name: part.clone().requires_grad_() for name, part in self.unflatten(self.weights()).items()}
        with _counting_saved_bytes([*leaves.values(), *self.model.parameters()]) as saved:
            chunk = next(self._chunks(leaves))
            loss = chunk.loss
            if not isinstance(loss, Tensor):
                raise ValueError(f"the loss is a {type(loss).__name__}, not a tensor; return the mean loss as a tensor")
            if loss.dim() != 0:
                raise ValueError(f"the loss has shape {tuple(loss.shape)}, not (); reduce it to a mean over the batch")
            if not loss.requires_grad:
                raise ValueError("the loss cannot be differentiated: nothing trainable leads to it (detach? no_grad?)")
            if not loss.isfinite():
                raise ValueError(f"the loss is {loss.item()} at the start; curvature needs a finite loss")
            grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
        unused = [name for name, g in zip(leaves, grads, strict=True) if g is None]
        if unused:
            raise ValueError(
                f"the loss does not depend on {', '.join(unused)}; freeze what is not trained by requires_grad_(False)"
            )
        return saved() / chunk.examples


class Expansion:
    """``L`` around one point: value, gradient, and any number of products, sharing the graph of the gradient.

    The product ``Hv`` is reverse over reverse on the kept graph; batches whose graphs do not fit the objective's
    memory budget are rebuilt at every product.  `kept` of `chunks` batches are held.
    """

    @torch.enable_grad()
    def __init__(self, f: Objective, w: Tensor) -> None:
        self.f = f
        self.w = w.detach().requires_grad_()
        self.value, self.count = w.new_zeros(()), 0
        self.chunks = 0
        self._kept: list[_Chunk] = []
        slope, self._slope = torch.zeros_like(w), torch.zeros_like(w)
        for chunk, g in self._graphs():
            self.chunks += 1
            self.count += chunk.examples
            self.value = self.value + chunk.examples * chunk.loss.detach()
            slope.add_(g.detach(), alpha=chunk.examples)
            if self.count * f._graph_bytes_per_example <= f.memory_budget:
                self._kept.append(chunk)
                self._slope = self._slope + chunk.examples * g
        self.value = self.value / self.count
        self.grad = slope / self.count
        self._slope = self._slope / self.count

    @property
    def kept(self) -> int:
        """Batches whose graphs are in memory."""
        return len(self._kept)

    @torch.enable_grad()
    def hvp(self, v: Tensor) -> Tensor:
        """``∇²L(w) v`` for `v` ``(P,)``."""
        total = _vjp(self._slope, self.w, v, retain=True)
        for chunk, g in self._rebuilt():
            total = total + chunk.examples / self.count * _vjp(g, self.w, v)
        return total

    @torch.enable_grad()
    def third(self, u: Tensor, v: Tensor) -> Tensor:
        """``∇_w (uᵀ ∇²L(w) v)`` with u and v ``(P,)`` held fixed."""
        total = _vjp(_vjp(self._slope, self.w, u, retain=True, differentiable=True), self.w, v, retain=True)
        for chunk, g in self._rebuilt():
            total = total + chunk.examples / self.count * _vjp(_vjp(g, self.w, u, differentiable=True), self.w, v)
        return total

    @torch.enable_grad()
    def gauss_newton(self, v: Tensor) -> Tensor:
        """``Jᵀ ∇²ℓ J v`` for `v` ``(P,)``: forward products as reverse over reverse."""
        total = torch.zeros_like(v)
        for chunk in self._kept:
            total = total + chunk.examples / self.count * _gauss_newton(chunk, self.w, v)
        for chunk, _ in self._rebuilt():
            total = total + chunk.examples / self.count * _gauss_newton(chunk, self.w, v)
        return total

    def _graphs(self, start: int = 0) -> Iterator[tuple["_Chunk", Tensor]]:
        """Each batch from number `start` on, with its gradient as a function of w."""
        for i, chunk in enumerate(self.f._chunks(self.f.unflatten(self.w))):
            if i >= start:
                yield chunk, torch.autograd.grad(chunk.loss, self.w, create_graph=True)[0]

    def _rebuilt(self) -> Iterator[tuple["_Chunk", Tensor]]:
        return self._graphs(self.kept) if self.kept < self.chunks else iter(())


class _Chunk(NamedTuple):
    examples: int
    loss: Tensor
    output: Any


def _vjp(y: Tensor, x: Tensor, v: Tensor, *, retain: bool = False, differentiable: bool = False) -> Tensor:
    """``(∂y/∂x)ᵀ v``, zero where y does not depend on x."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    (out,) = torch.autograd.grad(
        y, x, v, retain_graph=retain or differentiable, create_graph=differentiable, materialize_grads=True
    )
    return out if differentiable else out.detach()


def _gauss_newton(chunk: _Chunk, w: Tensor, v: Tensor) -> Tensor:
    outputs = list({id(z): z for z in _tensors(chunk.output) if z.requires_grad}.values())
    if not outputs:
        raise ValueError(
            f"the model's output ({type(chunk.output).__name__}) holds no tensor that depends on the weights; the"
            " Gauss-Newton product needs one, alone or in tuples, lists, dicts or dataclasses"
        )
    dummies = [torch.zeros_like(z, requires_grad=True) for z in outputs]
    (pulled,) = torch.autograd.grad(outputs, w, dummies, create_graph=True)
    pushed = torch.autograd.grad(pulled, dummies, v, materialize_grads=True)
    slopes = torch.autograd.grad(chunk.loss, outputs, create_graph=True, materialize_grads=True)
    curved = [s for s in slopes if s.requires_grad]
    if not curved:
        return torch.zeros_like(v)
    along = [p for s, p in zip(slopes, pushed, strict=True) if s.requires_grad]
    bent = torch.autograd.grad(curved, outputs, along, retain_graph=True, materialize_grads=True)
    (out,) = torch.autograd.grad(outputs, w, bent, retain_graph=True)
    return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from _tensors(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(tree):
        yield from _tensors(vars(tree))


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {key: _to(item, device) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_to(item, device) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def _split(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """A batch as positional arguments, keyword arguments and target."""
    if isinstance(batch, dict):
        return (), batch, batch
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ValueError(
            f"a batch is a {type(batch).__name__}, not a pair (inputs, target) or a dict; for one batch pass [(x, y)]"
        )
    inputs, target = batch
    if isinstance(inputs, dict):
        return (), inputs, target
    return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}, target


def _count(*trees: Any) -> int:
    """Number of examples: the first dimension of the first tensor that has one."""
    return next((t.shape[0] for t in _tensors(trees) if t.dim() > 0), 1)


@contextmanager
def _counting_saved_bytes(leaves: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Counts the bytes that graphs built inside keep alive, each storage once, `leaves` not at all."""
    seen = {leaf.untyped_storage().data_ptr(): 0 for leaf in leaves}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen.setdefault(storage.data_ptr(), storage.nbytes())
        return t

    with saved_tensors_hooks(note, lambda t: t):
        yield lambda: sum(seen.values())


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
    """What a loader and its sampler draw from instead of the global generator."""
    if not isinstance(data, DataLoader):
        return []
    owners = (data, data.sampler, getattr(data.batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _check_kind(params: Mapping[str, Tensor]) -> None:
    kinds = {(p.dtype, p.device) for p in params.values()}
    if len(kinds) > 1:
        seen = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"trainable parameters are of several kinds ({seen}); bring them to one dtype and device")
    ((dtype, _),) = kinds
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"trainable parameters are {dtype}; curvature needs float32 or float64: call model.float()")


def _check_data(data: Iterable[Any]) -> None:
    if isinstance(data, Tensor) or (isinstance(data, tuple) and any(isinstance(part, Tensor) for part in data)):
        raise ValueError("the data are one batch, not an iterable of batches; pass [(inputs, target)]")
    if not isinstance(data, Iterable):
        raise ValueError(
            f"the data are a {type(data).__name__}, not an iterable of batches; pass a list of pairs (inputs, target),"
            " or a DataLoader around a data set of single examples"
        )
    if isinstance(data, Iterator):
        raise ValueError(
            f"the data are a {type(data).__name__}, which can be read only once; pass a list or a DataLoader"
        )


def _rate(module: nn.Module) -> Any:
    return module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", None)


def _check_deterministic(droppers: Iterable[tuple[str, nn.Module]]) -> None:
    for name, module in droppers:
        p = _rate(module)
        if module.training and isinstance(p, float) and p > 0:
            raise ValueError(
                f"dropout is on in '{name}' ({type(module).__name__}, p={p}): the loss is random, so its curvature is"
                " not defined; call .eval() on that module or set its rate to 0"
            )
