"""Backends for products with the Hessian beside kept graphs: functions of an objective and a point to an `Expansion`.

    f.using(linearized())      # a copy of f whose products run a traced program

`kept`, the default, is in `expansion`; `tune` measures which backend suits a case best.  Costs are in gradients, by
counting operations.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import CannotTrace
from . import tracing
from .data import Batch
from .differences import CentralDifferences
from .expansion import Expansion, Graphs, kept, on_graphs
from .objective import Expand, Objective
from .second_order import differentiating
from .tracing import Program


def rebuilt(f: Objective, w: Tensor) -> Expansion:
    """Multiply on a graph built anew for every product: 3 gradients, one batch in memory."""
    return on_graphs(f, w, memory_budget=0)


def batched(f: Objective, w: Tensor) -> Expansion:
    """Multiply on kept graphs, columns in one pass over all of them."""
    return replace(kept(f, w), together=True)


def forward_over_reverse(f: Objective, w: Tensor) -> Expansion:
    """Multiply in forward mode, ``d/dt ∇L(w + t v)``: 3 gradients, one batch in memory, no graph kept."""
    at = rebuilt(f, w)
    leaf = w.detach().requires_grad_()

    @differentiating()
    def hvp(v: Tensor) -> Tensor:
        f.require_second_derivative()
        total = torch.zeros_like(v)
        buffers = {name: b.detach() for name, b in f.buffers().items()}
        for batch in f.batches(v.device):
            with forward_ad.dual_level():
                w = forward_ad.make_dual(leaf, v)
                own = {name: b.clone() for name, b in buffers.items()}
                loss = f.loss_on(batch, {**f.unflatten(w), **own})
                (g,) = torch.autograd.grad(loss, w, create_graph=True)
                bent = forward_ad.unpack_dual(g).tangent
                buffers = {name: forward_ad.unpack_dual(b).primal.detach() for name, b in own.items()}
            if bent is not None:
                total = total + batch.examples / at.examples * bent.detach()
        return total

    return replace(at, hvp=hvp, cost=3.0, columns=None)


def differences(f: Objective, w: Tensor) -> Expansion:
    """Multiply by differences of gradients, for what can be differentiated only once: 4 gradients."""
    product = CentralDifferences(f, w)
    return replace(rebuilt(f, w), hvp=lambda v: product(v)[0], cost=4.0, columns=None)


@differentiating()
def on_batch(f: Objective, batch: Batch, w: Tensor, buffers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Evaluate loss and gradient of one batch with these buffers, and read nothing else: for programs."""
    w = w.detach().requires_grad_()
    own = {name: b.clone() for name, b in buffers.items()}
    loss = f.loss_on(batch, {**f.unflatten(w), **own})
    (g,) = torch.autograd.grad(loss, w)
    return loss.detach(), g


@dataclass
class linearized:
    """Multiply by a program that is traced once per shape of the batches, cut at its dependence on the direction.

    What does not depend on the direction runs once per point and stays in memory within the objective's budget
    (beyond it, it runs again at every product).  A new program is traced for other shapes, modes of the modules or
    frozen parameters, and is used only after its products agree with reverse over reverse at two points; whatever
    else the model reads in Python is fixed then.  With `machine_code` products are compiled (see `compiled`).
    """

    machine_code: bool = False
    programs: dict[Any, "_Traced"] = field(default_factory=dict, repr=False)

    @property
    def seconds(self) -> float:
        """Seconds spent so far on tracing, verifying and compiling."""
        return sum(program.seconds for program in self.programs.values())

    def __call__(self, f: Objective, w: Tensor) -> Expansion:
        return _Linearization(f, w, self).expansion()

    def program(self, f: Objective, w: Tensor, batch: Batch, buffers: Sequence[Tensor]) -> "_Traced":
        key = _key(f, w, batch)
        if key not in self.programs:
            self.programs[key] = _Traced(f, w, batch, buffers, self.machine_code)
        return self.programs[key]


def compiled() -> linearized:
    """Compile the traced program: seconds to a minute for every new shape, then the fastest products.

    Raises:
        CannotTrace: (at the first point) there is no C++ compiler.
    """
    return linearized(machine_code=True)


class _Traced:
    """The program of one shape of batches, for one vector and, by number, for columns."""

    def __init__(self, f: Objective, w: Tensor, batch: Batch, buffers: Sequence[Tensor], machine_code: bool) -> None:
        f.require_second_derivative()
        began = time.perf_counter()
        self.f = f.on([])
        self.machine_code = machine_code
        self.names = list(f.buffers())
        self.frozen = list(f.constants())
        w = w.detach()
        g = torch.Generator().manual_seed(0)
        v, step = (torch.randn(w.shape, generator=g, dtype=torch.float64).to(w) for _ in range(2))
        self.parts: Program = tracing.trace(self._function(batch), self.inputs(w, buffers, batch), v)
        self._wide: dict[int, Callable[..., Tensor]] = {}
        self._fast: Callable[..., Tensor] | None = None
        self._verify([w, w + 0.1 * w.square().mean().sqrt() * step], v, buffers, batch)
        self.seconds = time.perf_counter() - began

    def inputs(self, w: Tensor, buffers: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        params = self.f.constants()
        tensors = [t for t in tree_flatten(batch[:3])[0] if isinstance(t, Tensor)]
        return [w, *(params[name].detach() for name in self.frozen), *buffers, *tensors]

    def each(self, residuals: Sequence[Tensor], v: Tensor) -> Tensor:
        """Multiply one vector ``(P,)``, or rows ``(k, P)``."""
        with torch.no_grad():
            if v.dim() == 2:
                return self._rows(residuals, v)(*residuals, v)
            if self._fast is None:
                self._fast = self._made(self.parts.each, residuals, v)
            return self._fast(*residuals, v)

    def _rows(self, residuals: Sequence[Tensor], v: Tensor) -> Callable[..., Tensor]:
        if len(v) not in self._wide:
            wide = self._made(tracing.batched(self.parts.each, residuals, v), residuals, v)
            found = wide(*residuals, v)[-1]
            expected = self.parts.each.forward(*residuals, v[-1])
            if not (found - expected).norm() <= torch.finfo(v.dtype).eps ** 0.6 * expected.norm():
                raise CannotTrace("the program for columns gave other numbers than the one for vectors")
            self._wide[len(v)] = wide
        return self._wide[len(v)]

    def _made(self, each: Any, residuals: Sequence[Tensor], v: Tensor) -> Callable[..., Tensor]:
        if not self.machine_code:
            return each.forward
        return tracing.compiled(each, [*residuals, v])

    def _function(self, batch: Batch) -> Callable[..., tuple[Tensor, ...]]:
        leaves, spec = tree_flatten(batch[:3])
        f, frozen, names, n = self.f, self.frozen, self.names, batch.examples

        def function(w: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            *others, v = rest
            queue = iter(others)
            fixed = {name: next(queue) for name in frozen}
            own = {name: next(queue).clone() for name in names}
            args, kwargs, target = tree_unflatten(
                [next(queue) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
            )
            with torch.enable_grad():
                w = w.detach().requires_grad_()
                tensors = {**f.unflatten(w), **fixed, **own}
                loss = f.loss_on(Batch(args, kwargs, target, n), tensors)
                (g,) = torch.autograd.grad(loss, w, create_graph=True)
                product = torch.zeros_like(v)
                if g.requires_grad:
                    (product,) = torch.autograd.grad(g, w, v, materialize_grads=True)
            return (loss.detach(), g.detach(), *(own[name].detach() for name in names), product)

        return function

    def _verify(self, points: Sequence[Tensor], v: Tensor, buffers: Sequence[Tensor], batch: Batch) -> None:
        """Compare the program with reverse over reverse on this batch, relative to the larger of the points."""
        found, expected = [], []
        for w in points:
            values, residuals = self.parts.start(self.inputs(w, buffers, batch))
            found.append((values[0], values[1], self.each(residuals, v)))
            expected.append(self._function(batch)(*self.inputs(w, buffers, batch), v))
        for i, name in enumerate(("value", "gradient", "product")):
            size = max(e[i if i < 2 else -1].norm().item() for e in expected)
            off = max((a[i] - b[i if i < 2 else -1]).norm().item() for a, b in zip(found, expected, strict=True))
            if not off <= torch.finfo(v.dtype).eps ** 0.6 * size:
                raise CannotTrace(f"no fixed program: its {name} is off by {off:.2g} of {size:.2g} at other weights")


class _Linearization:
    """One point of an objective whose products run traced programs."""

    @differentiating()
    def __init__(self, f: Objective, w: Tensor, tracer: linearized) -> None:
        self.f = f
        self.w = w.detach()
        self.tracer = tracer
        self.batches, self.examples = 0, 0.0
        self.kept: list[tuple[_Traced, list[Tensor], float]] = []
        self.batched = True  # until a program for columns is found not to exist
        total, slope, used = w.new_zeros(()), torch.zeros_like(w), 0
        for program, values, residuals, examples in self._started():
            self.batches += 1
            self.examples += examples
            total = total + examples * values[0]
            slope.add_(values[1], alpha=examples)
            used += _bytes(residuals)
            if used <= f.memory_budget and len(self.kept) == self.batches - 1:
                self.kept.append((program, residuals, examples))
        self.value = total / self.examples
        self.grad = slope / self.examples

    def expansion(self) -> Expansion:
        graphs = Graphs(self.f, self.w.detach().requires_grad_(), self.batches, self.examples)
        return Expansion(
            value=self.value,
            grad=self.grad,
            hvp=lambda v: self._product(v.contiguous()),
            third=graphs.third,
            gauss_newton=graphs.gauss_newton,
            examples=self.examples,
            cost=3.0 - len(self.kept) / self.batches,
            columns=self.columns,
        )

    def columns(self, V: Tensor) -> Tensor:
        """Multiply columns ``(P, k)``: by a program for rows, or one by one where there is none."""
        if self.batched:
            try:
                return self._product(V.T.contiguous()).T
            except CannotTrace:
                self.batched = False
        return torch.stack([self._product(v.contiguous()) for v in V.T], dim=1)

    @differentiating()
    def _product(self, v: Tensor) -> Tensor:
        if self.batches == 1 and self.kept:
            program, residuals, _ = self.kept[0]
            return program.each(residuals, v)
        total = torch.zeros_like(v)
        for program, residuals, examples in self.kept:
            total.add_(program.each(residuals, v), alpha=examples / self.examples)
        if len(self.kept) < self.batches:
            for i, (program, _, residuals, examples) in enumerate(self._started()):
                if i >= len(self.kept):
                    total.add_(program.each(residuals, v), alpha=examples / self.examples)
        return total

    def _started(self) -> Iterator[tuple[_Traced, list[Tensor], list[Tensor], float]]:
        """Run the first part of each batch's program: its values, its residuals, and the number of examples."""
        buffers = [b.detach() for b in self.f.buffers().values()]
        for batch in self.f.batches(self.w.device):
            program = self.tracer.program(self.f, self.w, batch, buffers)
            values, residuals = program.parts.start(program.inputs(self.w, buffers, batch))
            buffers = values[2:]
            yield program, values, residuals, batch.examples


@dataclass(frozen=True)
class Calibrated:
    """A backend with the cost of its products that was measured, and whether columns are faster together."""

    expand: Expand
    cost: float
    together: bool

    def __call__(self, f: Objective, w: Tensor) -> Expansion:
        return replace(self.expand(f, w), cost=self.cost, together=self.together)


def _bytes(tensors: Sequence[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _key(f: Objective, w: Tensor, batch: Batch) -> Any:
    """Name all that a program is traced for."""
    leaves, spec = tree_flatten(batch[:3])
    for leaf in leaves:
        if not isinstance(leaf, Tensor | int | float | str | bool | None):
            raise CannotTrace(f"no fixed program: a batch holds a {type(leaf).__name__}")
    tensors = [w, *f.buffers().values(), *f.parameters().values(), *f.constants().values()]
    return (
        id(f.model),  # the program itself keeps model and loss alive
        id(f.loss),
        tuple(f.slices),
        tuple(m.training for m in f.modules()),
        tuple((t.shape, t.dtype, t.device) for t in tensors),
        repr(spec),
        tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves),
    )
