"""Model + loss + data as one smooth function of one flat weight vector.

``L(w) = Σ_b n_b ℓ_b(w) / Σ_b n_b`` over the batches b of the data, each with mean loss ``ℓ_b`` and ``n_b`` examples,
where ``w`` holds every trainable parameter in the order of ``model.named_parameters()``.  Evaluating changes nothing:
weights are passed in, buffers are cloned, random states are put back, ``.grad`` and the training modes are never
touched.  How products with derivatives are formed is a function that the objective carries (`Objective.using`): here by
graphs of the gradient that are kept, in other ways in `products`.

P parameters.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from ..errors import InvalidValue, NoSecondDerivative
from .data import Batch, check_data, read, tensors
from .second_order import differentiating, holds_delayed_error, modules_without_second_derivative
from .smooth import smooth

Loss = Callable[[Any, Any], Tensor]
Expand = Callable[["Objective", Tensor], "Expansion"]


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
        without_dropout: measure the loss without dropout, of modules and of attention, whatever mode these are in.

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

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Iterable[Any],
        *,
        memory_budget: int = 2 << 30,
        without_dropout: bool = False,
    ) -> None:
        self.model, self.loss, self.data, self.memory_budget = model, loss, data, memory_budget
        self.dropout = not without_dropout
        self.expand: Expand = Expansion
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise InvalidValue(f"{type(model).__name__} has no trainable parameter; set requires_grad on at least one")
        _check_kind(trainable)
        self.shapes = {name: p.shape for name, p in trainable.items()}
        sizes = [p.numel() for p in trainable.values()]
        ends = np.cumsum(sizes).tolist()
        self.slices = {name: slice(end - n, end) for name, n, end in zip(trainable, sizes, ends, strict=True)}
        self.size: int = ends[-1]
        droppers = [(name, m) for name, m in model.named_modules() if isinstance(_rate(m), float)]
        self._droppers = [(n, m) for n, m in droppers if self.dropout or isinstance(m, nn.RNNBase)]
        sparse = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
        if sparse:
            raise InvalidValue(f"'{sparse[0]}' has sparse gradients, which have no derivative; use sparse=False")
        check_data(data)
        reduction = getattr(loss, "reduction", "mean")
        if reduction != "mean":
            raise InvalidValue(f"the loss has reduction='{reduction}'; batches are weighted by size, so use 'mean'")
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

    def using(self, expand: Expand) -> "Objective":
        """The same function with products formed in another way: `at` returns ``expand(self, w)``; see `products`."""
        other = copy.copy(self)
        other.expand = expand
        return other

    def _seeded(self, seed: int) -> "Objective":
        other = copy.copy(self)
        other._seed = seed
        return other

    def value(self, w: Tensor) -> Tensor:
        """``L(w)``, a scalar."""
        with differentiating(), torch.no_grad():
            total, count = w.new_zeros(()), 0
            for chunk in self._chunks(self.unflatten(w)):
                total, count = total + chunk.examples * chunk.loss.detach(), count + chunk.examples
        return total / count

    @differentiating()
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

    @differentiating()
    def of_batch(self, w: Tensor, batch: Batch, buffers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss and gradient of one batch with these buffers, of which it reads nothing else: to be recorded."""
        w = w.detach().requires_grad_()
        own = {name: b.clone() for name, b in buffers.items()}
        loss = self._chunk({**self.unflatten(w), **own}, batch).loss
        (g,) = torch.autograd.grad(loss, w)
        return loss.detach(), g

    def at(self, w: Tensor) -> "Expansion":
        """The derivatives around `w`: use this for more than one product at a point."""
        return self.expand(self, w)

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
        """Read the data under two seeds and raise InvalidValue unless the loss is the same (to rounding) and finite."""
        w = self.weights()
        first, second = (self._seeded(seed).value(w).item() for seed in (1, 2))
        if not math.isfinite(first):
            raise InvalidValue(f"the loss is {first} at the current weights; curvature needs a finite loss")
        if abs(first - second) > torch.finfo(w.dtype).eps ** 0.5 * max(abs(first), torch.finfo(w.dtype).tiny):
            raise InvalidValue(
                f"two passes over the same weights gave losses {first:.8g} and {second:.8g}: data that are shuffled or"
                " augmented anew (or a random model) have no curvature; fix the batches, for example as a list"
            )

    def _require_second(self) -> None:
        if self._once:
            raise _missing(self, "an operation is marked as differentiable once")

    def _chunks(self, params: Mapping[str, Tensor]) -> Iterator["_Chunk"]:
        """The loss of each batch as a function of `params`, with buffers cloned once per pass."""
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        for batch in self._batches(next(iter(params.values())).device):
            yield self._chunk({**params, **buffers}, batch)

    def _chunk(self, values: Mapping[str, Tensor], batch: Batch) -> "_Chunk":
        """The loss of one batch, with `values` in the place of parameters and buffers; it may write to the latter."""
        with smooth(dropout=self.dropout):
            output = functional_call(self.model, dict(values), batch.args, batch.kwargs)
            loss = self.loss(output, batch.target)
        return _Chunk(batch.examples, loss, output)

    def _batches(self, device: torch.device) -> Iterator[Batch]:
        """One pass over the data, under their seed."""
        _check_deterministic(self._droppers)
        return read(self.data, self._seed, device)

    @differentiating()
    def _check_first_batch(self) -> float:
        """Refuse what cannot be differentiated; return the bytes of the gradient's graph per example."""
        leaves = {name: part.clone().requires_grad_() for name, part in self.unflatten(self.weights()).items()}
        with _counting_saved_bytes([*leaves.values(), *self.model.parameters()]) as saved:
            chunk = next(self._chunks(leaves))
            loss = chunk.loss
            if not isinstance(loss, Tensor):
                raise InvalidValue(
                    f"the loss is a {type(loss).__name__}, not a tensor; return the mean loss as a tensor"
                )
            if loss.dim() != 0:
                raise InvalidValue(
                    f"the loss has shape {tuple(loss.shape)}, not (); reduce it to a mean over the batch"
                )
            if not loss.requires_grad:
                raise InvalidValue(
                    "the loss cannot be differentiated: nothing trainable leads to it (detach? no_grad?)"
                )
            if not loss.isfinite():
                raise InvalidValue(f"the loss is {loss.item()} at the start; curvature needs a finite loss")
            grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
        unused = [name for name, g in zip(leaves, grads, strict=True) if g is None]
        if unused:
            raise InvalidValue(
                f"the loss does not depend on {', '.join(unused)}; freeze what is not trained by requires_grad_(False)"
            )
        self._once = holds_delayed_error(grads)
        return saved() / chunk.examples


class Expansion:
    """``L`` around one point: value, gradient, and any number of products, sharing the graph of the gradient.

    The product ``Hv`` is reverse over reverse on the kept graph; batches whose graphs do not fit the memory budget (by
    default the objective's) are rebuilt at every product.  `kept` of `chunks` batches are held.  `cost` of a product
    is in gradients, by counting operations (2 for a kept graph, 3 for a rebuilt one) unless `tune` measured it, and
    `columns` are multiplied together if `together`.  A subclass forms products in another way.
    """

    cost: float = 2.0
    together: bool = False

    @differentiating()
    def __init__(self, f: Objective, w: Tensor, *, memory_budget: int | None = None) -> None:
        budget = f.memory_budget if memory_budget is None else memory_budget
        self.f = f
        self.w = w.detach().requires_grad_()
        self.value, self.count, self.chunks = w.new_zeros(()), 0, 0
        self._kept: list[tuple[_Chunk, Tensor]] = []
        slope = torch.zeros_like(w)
        for chunk in f._chunks(f.unflatten(self.w)):
            self.chunks += 1
            self.count += chunk.examples
            keep = self.count * f._graph_bytes_per_example <= budget
            (g,) = torch.autograd.grad(chunk.loss, self.w, create_graph=keep)
            self.value = self.value + chunk.examples * chunk.loss.detach()
            slope.add_(g.detach(), alpha=chunk.examples)
            if keep:
                self._kept.append((chunk, g))
        self.value = self.value / self.count
        self.grad = slope / self.count
        self._slopes = [(g, chunk.examples / self.count) for chunk, g in self._kept if g.requires_grad]
        if self.kept < self.chunks:
            self.cost = 3 - self.kept / self.chunks

    @property
    def kept(self) -> int:
        """Batches whose graphs are in memory."""
        return len(self._kept)

    @differentiating()
    def hvp(self, v: Tensor) -> Tensor:
        """``∇²L(w) v`` for `v` ``(P,)``.

        Raises:
            NoSecondDerivative: names what stands in the way.
        """
        self.f._require_second()
        try:
            total = self._kept_product(v)
            for chunk, g in self._rebuilt():
                total = total + chunk.examples / self.count * _vjp(g, self.w, v)
        except RuntimeError as error:
            raise _named(self.f, error) from error
        return total

    @differentiating()
    def columns(self, V: Tensor) -> Tensor:
        """``∇²L(w) V`` for columns ``(P, k)``: together, in one batched pass through the kept graph, or one by one."""
        if not self.together or self.kept < self.chunks or V.shape[1] < 2:
            return torch.stack([self.hvp(v) for v in V.T], dim=1)
        self.f._require_second()
        if not self._slopes:
            return torch.zeros_like(V)
        rows = V.T.contiguous()
        (out,) = torch.autograd.grad(
            [g for g, _ in self._slopes],
            self.w,
            [rows if share == 1 else share * rows for _, share in self._slopes],
            retain_graph=True,
            is_grads_batched=True,
            materialize_grads=True,
        )
        return out.T

    @differentiating()
    def third(self, u: Tensor, v: Tensor) -> Tensor:
        """``∇_w (uᵀ ∇²L(w) v)`` with u and v ``(P,)`` held fixed."""
        self.f._require_second()
        total = torch.zeros_like(v)
        for chunk, g in (*self._kept, *self._rebuilt()):
            curve = _vjp(g, self.w, u, differentiable=True)
            total = total + chunk.examples / self.count * _vjp(curve, self.w, v, retain=True)
        return total

    @differentiating()
    def gauss_newton(self, v: Tensor) -> Tensor:
        """``Jᵀ ∇²ℓ J v`` for `v` ``(P,)``: forward products as reverse over reverse."""
        self.f._require_second()
        total = torch.zeros_like(v)
        for chunk, _ in self._kept:
            total = total + chunk.examples / self.count * _gauss_newton(chunk, self.w, v)
        for chunk, _ in self._rebuilt():
            total = total + chunk.examples / self.count * _gauss_newton(chunk, self.w, v)
        return total

    def _kept_product(self, v: Tensor) -> Tensor:
        if not self._slopes:
            return torch.zeros_like(v)
        (out,) = torch.autograd.grad(
            [g for g, _ in self._slopes],
            self.w,
            [v if share == 1 else share * v for _, share in self._slopes],
            retain_graph=True,
            allow_unused=True,
        )
        return torch.zeros_like(v) if out is None else out

    def _rebuilt(self) -> Iterator[tuple["_Chunk", Tensor]]:
        """The batches that are not kept, each with its gradient as a function of w."""
        if self.kept == self.chunks:
            return
        for i, chunk in enumerate(self.f._chunks(self.f.unflatten(self.w))):
            if i >= self.kept:
                yield chunk, torch.autograd.grad(chunk.loss, self.w, create_graph=True)[0]


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


def _named(f: Objective, error: RuntimeError) -> RuntimeError:
    """The error of a product with second derivatives, with the modules in the way; others as they are."""
    if not re.search(r"not implemented|once_differentiable|does not require grad|retain_graph", str(error)):
        return error
    return _missing(f, str(error).splitlines()[0])


def _missing(f: Objective, reason: str) -> NoSecondDerivative:
    names = without_second_derivative(f)
    where = f"in {', '.join(names)}" if names else "in the loss or between the modules"
    return NoSecondDerivative(
        f"the second derivative does not exist {where} ({reason}); products by differences of gradients do:"
        " f.using(sharpscope.autodiff.hvp.differences)"
    )


def without_second_derivative(f: Objective) -> list[str]:
    """Modules, the innermost ones, whose output on the first batch has no second derivative, or a wrong one."""
    w = f.weights()
    return modules_without_second_derivative(f.model, lambda: next(f._chunks(f.unflatten(w.requires_grad_()))))


def _gauss_newton(chunk: _Chunk, w: Tensor, v: Tensor) -> Tensor:
    outputs = list({id(z): z for z in tensors(chunk.output) if z.requires_grad}.values())
    if not outputs:
        raise InvalidValue(
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


def _check_kind(params: Mapping[str, Tensor]) -> None:
    kinds = {(p.dtype, p.device) for p in params.values()}
    if len(kinds) > 1:
        seen = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise InvalidValue(f"trainable parameters are of several kinds ({seen}); bring them to one dtype and device")
    ((dtype, _),) = kinds
    if dtype not in (torch.float32, torch.float64):
        raise InvalidValue(f"trainable parameters are {dtype}; curvature needs float32 or float64: call model.float()")


def _rate(module: nn.Module) -> Any:
    return module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", None)


def _check_deterministic(droppers: Iterable[tuple[str, nn.Module]]) -> None:
    for name, module in droppers:
        p = _rate(module)
        if module.training and isinstance(p, float) and p > 0:
            cure = "call .eval() on that module or set its rate to 0"
            if not isinstance(module, nn.RNNBase):
                cure += ", or measure the loss without it: Objective(..., without_dropout=True)"
            raise InvalidValue(
                f"dropout is on in '{name}' ({type(module).__name__}, p={p}): the loss is random, so its curvature is"
                f" not defined; {cure}"
            )
