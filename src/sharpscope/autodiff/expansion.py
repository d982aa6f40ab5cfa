"""A loss around one point: its value, its gradient, and products with its second and third derivatives.

A *backend* is a function ``(objective, w) -> Expansion``.  The one here, `kept`, is reverse over reverse: the gradient
of each batch is kept as a graph, and a product differentiates it once more.  Graphs that do not fit into memory are
built anew for every product.  Others are in `hvp`.

P parameters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ..errors import InvalidValue, NoSecondDerivative
from ..linalg.operators import Linear
from ..linalg.vectors import length
from .data import map_tensors, tensors
from .differences import CentralDifferences
from .second_order import differentiating, ordinary
from .shards import is_sharded

STEPS = (2e-3, 1.2e-2)
"""Steps of forward differences over ``√eps ‖w‖``: where rounding and the third derivative weigh about the same."""


@dataclass(frozen=True)
class Expansion:
    """A loss around one point: its value, its gradient, and functions that multiply with its derivatives there."""

    value: Tensor  # L(w)
    grad: Tensor = field(repr=False)  # ∇L(w) (P,)
    hvp: Linear  # ∇²L(w) v
    third: Callable[[Tensor, Tensor], Tensor]  # ∇_w (uᵀ ∇²L(w) v), u and v held fixed
    gauss_newton: Linear  # Jᵀ ∇²ℓ J v
    examples: float  # that the loss is a mean over
    cost: float  # of `hvp`, in gradients: by counting operations, unless `tune` measured it
    drafts: tuple[Linear, ...] = ()  # nearly `hvp`, by forward differences of gradients with several steps: 1 gradient
    symmetric: bool = True  # False where `hvp` is the Jacobian of a gradient that is stopped on the way


class BatchLoss(NamedTuple):
    """The mean loss of one batch, and the output of the model that it comes from."""

    examples: float
    loss: Tensor
    output: Any
    loss_of: Callable[[Any, Mapping[str, Tensor]], Tensor]  # the loss as a function of outputs and weights


class MeanLoss(Protocol):
    """A mean of losses over batches, as far as this file needs to know it; an `Objective` is one."""

    memory_budget: int

    @property
    def graph_bytes_per_example(self) -> float: ...

    def unflatten(self, w: Tensor) -> Mapping[str, Tensor]: ...

    def losses(self, params: Mapping[str, Tensor]) -> Iterator[BatchLoss]: ...

    def require_second_derivative(self) -> None: ...

    def explained(self, error: RuntimeError) -> RuntimeError: ...


def kept(f: MeanLoss, w: Tensor) -> Expansion:
    """Multiply by reverse over reverse, on graphs that are kept within the memory budget: 2 gradients a product."""
    return on_graphs(f, w, f.memory_budget)


@differentiating()
def on_graphs(f: MeanLoss, w: Tensor, memory_budget: int) -> Expansion:
    """Multiply by reverse over reverse, on as many kept graphs as fit into `memory_budget` bytes.

    A product costs 2 gradients on a kept graph and 3 on one that is built anew.
    """
    w = w.detach().requires_grad_()
    value, slope = w.new_zeros(()), torch.zeros_like(w)
    batches, examples = 0, 0.0
    graphs: list[tuple[BatchLoss, GradientEdge | None]] = []
    for batch in f.losses(f.unflatten(w)):
        batches += 1
        examples += batch.examples
        keep = examples * f.graph_bytes_per_example <= memory_budget
        (g,) = torch.autograd.grad(batch.loss, w, create_graph=keep)
        value = value + batch.examples * batch.loss.detach()
        slope.add_(g.detach(), alpha=batch.examples)
        if keep:
            graphs.append((batch, _root(g)))
        del g  # P numbers that the graph does not need
    products = Graphs(f, w, batches, examples, tuple(graphs))
    return Expansion(
        value=value / examples,
        grad=slope.div_(examples),
        hvp=products.hvp,
        third=products.third,
        gauss_newton=products.gauss_newton,
        examples=examples,
        cost=3 - len(graphs) / batches,
        drafts=tuple(partial(products.difference, slope, step) for step in STEPS if len(graphs) < batches / 2),
    )


@dataclass(frozen=True)
class Graphs:
    """Products at w, a leaf of graphs, with the gradients of the first batches kept as functions of it.

    Of a gradient only its place in the graph is kept (None where it does not depend on w), not its P numbers.
    """

    f: MeanLoss
    w: Tensor
    batches: int
    examples: float
    kept: tuple[tuple[BatchLoss, GradientEdge | None], ...] = ()

    @cached_property
    def slopes(self) -> list[tuple[GradientEdge, float]]:
        """The kept gradients that depend on w, each with its weight in the mean."""
        return [(g, batch.examples / self.examples) for batch, g in self.kept if g is not None]

    @differentiating()
    def hvp(self, v: Tensor) -> Tensor:
        """Multiply by the Hessian.

        Raises:
            NoSecondDerivative: names what stands in the way.
        """
        self.f.require_second_derivative()
        v = ordinary(v)
        try:
            total = self._kept_product(v)
            for batch, g in self._rebuilt():
                total = _added(total, _vjp(g, self.w, v), batch.examples / self.examples)
        except RuntimeError as error:
            raise self.f.explained(error) from error
        return torch.zeros_like(v) if total is None else total

    @differentiating()
    def third(self, u: Tensor, v: Tensor) -> Tensor:
        """Differentiate the curvature ``uᵀ ∇²L(w) v`` in w, with u and v ``(P,)`` held fixed."""
        self.f.require_second_derivative()
        v = ordinary(v)
        total = torch.zeros_like(v)
        for batch, g in (*self.kept, *self._rebuilt()):
            curve = _root(_vjp(g, self.w, ordinary(u), differentiable=True))
            total = total + batch.examples / self.examples * _vjp(curve, self.w, v, retain=True)
        return total

    @differentiating()
    def gauss_newton(self, v: Tensor) -> Tensor:
        """Multiply by ``Jᵀ ∇²ℓ J``: forward products as reverse over reverse."""
        self.f.require_second_derivative()
        v = ordinary(v)
        total = torch.zeros_like(v)
        for batch, _ in self.kept:
            total = total + batch.examples / self.examples * _gauss_newton(self.f, batch, self.w, v)
        for batch, _ in self._rebuilt():
            total = total + batch.examples / self.examples * _gauss_newton(self.f, batch, self.w, v)
        return total

    @differentiating()
    def difference(self, slope: Tensor, step: float, v: Tensor) -> Tensor:
        """Divide ``∇L(w + h v) - ∇L(w)`` by h, such that ``‖h v‖`` is `step` of ``√eps ‖w‖`` [N38]."""
        v = ordinary(v)
        size, far = length(v), step * torch.finfo(v.dtype).eps ** 0.5 * max(length(self.w), 1e-3)
        total = torch.zeros_like(v)
        if size == 0:
            return total
        w = torch.add(self.w.detach(), v, alpha=far / size).requires_grad_()
        for batch in self.f.losses(self.f.unflatten(w)):
            (g,) = torch.autograd.grad(batch.loss, w, materialize_grads=True)
            total.add_(g, alpha=batch.examples / self.examples)
        return total.sub_(slope).mul_(size / far)

    def _kept_product(self, v: Tensor) -> Tensor | None:
        if not self.slopes:
            return None
        (out,) = torch.autograd.grad(
            [g for g, _ in self.slopes],
            self.w,
            [v if weight == 1 else weight * v for _, weight in self.slopes],
            retain_graph=True,
            allow_unused=True,
        )
        return out

    def _rebuilt(self) -> Iterator[tuple[BatchLoss, GradientEdge | None]]:
        """The batches that are not kept, each with its gradient as a function of w."""
        if len(self.kept) == self.batches:
            return
        for i, batch in enumerate(self.f.losses(self.f.unflatten(self.w))):
            if i >= len(self.kept):
                yield batch, _root(torch.autograd.grad(batch.loss, self.w, create_graph=True)[0])


@contextmanager
def counting_saved_bytes(leaves: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Count the bytes that graphs built inside keep alive, each storage once, `leaves` not at all."""
    seen = {s.data_ptr(): 0 for leaf in leaves if (s := storage_of(leaf)) is not None}

    def note(t: Tensor) -> Tensor:
        storage = storage_of(t)
        if storage is not None:  # sparse tensors are as a rule data, which are in memory anyway
            seen.setdefault(storage.data_ptr(), storage.nbytes())
        return t.detach()  # an output that its own graph holds is never freed

    with saved_tensors_hooks(note, lambda t: t):
        yield lambda: sum(seen.values())


def storage_of(t: Tensor) -> torch.UntypedStorage | None:
    """Return the memory of a tensor; None of a sparse or sharded one, or inside a transform of torch.func."""
    try:
        return t.untyped_storage() if t.layout == torch.strided and not is_sharded(t) else None
    except (NotImplementedError, RuntimeError):
        return None


def _root(y: Tensor) -> GradientEdge | None:
    """Return the place of `y` in its graph, which stands for it as an output; None where nothing leads to it."""
    return get_gradient_edge(y) if y.requires_grad else None


def _added(total: Tensor | None, x: Tensor, weight: float) -> Tensor:
    """Add ``weight x`` to a sum in place, or begin one with it."""
    return weight * x if total is None else total.add_(x, alpha=weight)


def _vjp(y: GradientEdge | None, x: Tensor, v: Tensor, *, retain: bool = False, differentiable: bool = False) -> Tensor:
    """Multiply by a transposed Jacobian, ``(∂y/∂x)ᵀ v``; zero where y does not depend on x."""
    if y is None:
        return torch.zeros_like(x)
    (out,) = torch.autograd.grad(
        y, x, v, retain_graph=retain or differentiable, create_graph=differentiable, materialize_grads=True
    )
    return out if differentiable else out.detach()


def _gauss_newton(f: MeanLoss, batch: BatchLoss, w: Tensor, v: Tensor) -> Tensor:
    """Multiply by ``Jᵀ ∇²ℓ J`` of one batch, with ∇²ℓ in outputs cut off from each other, and in w itself."""
    outputs = list({id(z): z for z in tensors(batch.output) if z.requires_grad}.values())
    inside = [z for z in outputs if z.dim() == 0]  # losses that the model computed of its other outputs
    if inside:
        return _gauss_newton_inside(batch, [z for z in outputs if z.dim() > 0], w, v)
    if not outputs:
        raise InvalidValue(
            f"the model's output ({type(batch.output).__name__}) holds no tensor that depends on the weights; the"
            " Gauss-Newton product needs one, alone or in tuples, lists, dicts or dataclasses"
        )
    leaves = {id(z): z.detach().requires_grad_() for z in outputs}
    cut = map_tensors(batch.output, lambda z: leaves.get(id(z), z))
    own = w.detach().requires_grad_()
    loss = batch.loss_of(cut, f.unflatten(own))
    if not loss.requires_grad:
        raise InvalidValue(
            f"the loss does not depend on the tensors of the output ({type(batch.output).__name__}); the Gauss-Newton"
            " product needs a loss that is computed from them"
        )
    dummies = [torch.zeros_like(z, requires_grad=True) for z in outputs]
    (pulled,) = torch.autograd.grad(outputs, w, dummies, create_graph=True)
    pushed = torch.autograd.grad(pulled, dummies, v, materialize_grads=True)
    points = [*leaves.values(), own]
    slopes = torch.autograd.grad(loss, points, create_graph=True, materialize_grads=True)
    pairs = [(s, p) for s, p in zip(slopes, (*pushed, v), strict=True) if s.requires_grad]
    if not pairs:
        return torch.zeros_like(v)
    curved, along = zip(*pairs, strict=True)
    *bent, direct = torch.autograd.grad(curved, points, along, materialize_grads=True)
    (out,) = torch.autograd.grad(outputs, w, bent, retain_graph=True)
    return out + direct


def _gauss_newton_inside(batch: BatchLoss, outputs: list[Tensor], w: Tensor, v: Tensor) -> Tensor:
    """Multiply by ``Jᵀ ∇²ℓ J`` where the model itself computes the loss, from the last of its `outputs`."""
    z = _last_before(batch.loss, outputs)
    dummy = torch.zeros_like(z, requires_grad=True)
    (pulled,) = torch.autograd.grad(z, w, dummy, create_graph=True)
    (pushed,) = torch.autograd.grad(pulled, dummy, v, materialize_grads=True)
    (slope,) = torch.autograd.grad(batch.loss, z, create_graph=True, materialize_grads=True)
    if not slope.requires_grad:
        return torch.zeros_like(v)
    (bent,) = torch.autograd.grad(slope, z, pushed, retain_graph=True, materialize_grads=True)
    return torch.autograd.grad(z, w, bent, retain_graph=True)[0]


def _last_before(loss: Tensor, outputs: list[Tensor]) -> Tensor:
    """Find the one output that a loss is computed from; those that are reached only through it do not count.

    Raises:
        ValueError: there is none, or several.
    """
    places = {(z.grad_fn, z.output_nr): z for z in outputs}
    stack, seen, found = [(loss.grad_fn, loss.output_nr)], set[Any](), dict[int, Tensor]()
    while stack:
        place = stack.pop()
        if place in seen or place[0] is None:
            continue
        seen.add(place)
        if place in places:
            found[id(places[place])] = places[place]
        else:
            stack += place[0].next_functions
    if len(found) != 1:
        raise InvalidValue(
            f"the model computes its loss from {len(found)} of its outputs; the Gauss-Newton product needs one: return"
            " it, or let the model return the outputs and pass the loss as a function of them"
        )
    return next(iter(found.values()))


def jacobian_of_field(f: Any, w: Tensor) -> Expansion:
    """Multiply by the Jacobian of a gradient that is stopped on the way, by differences: 4 gradients, not symmetric."""
    product = CentralDifferences(f, w)

    def refuse(*_: Any) -> Tensor:
        raise NoSecondDerivative(
            "gradients are stopped on the way (detach, no_grad, a backward of its own), so that training follows no"
            " gradient of one function: there are products with the Jacobian of the gradient, and its rightmost"
            " eigenvalue is sharpness(f), but no third derivatives and no Gauss-Newton matrix;"
            " f.using(sharpscope.autodiff.expansion.kept) has those of autograd, which leaves out the stopped part"
        )

    at = on_graphs(f, w, 0)
    return replace(
        at, hvp=lambda v: product(v)[0], third=refuse, gauss_newton=refuse, cost=4.0, drafts=(), symmetric=False
    )
