"""Ways to form products with the Hessian; each takes an objective and a point to an `Expansion`.

    f.using(linearized())      # a copy of f whose products run a traced program

`Expansion` itself (reverse over reverse on kept graphs) is the default, `tune` measures which one a case is best
served by.  Costs are in gradients, by counting operations.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import CannotTrace
from . import tracing
from .data import Batch
from .objective import Expand, Expansion, Objective
from .second_order import differentiating
from .tracing import Program


def kept(f: Objective, w: Tensor) -> Expansion:
    """Reverse over reverse on graphs kept within the memory budget: 2 gradients."""
    return Expansion(f, w)


def rebuilt(f: Objective, w: Tensor) -> Expansion:
    """Reverse over reverse on a graph built anew for every product: 3 gradients, one batch in memory."""
    return Expansion(f, w, memory_budget=0)


def batched(f: Objective, w: Tensor) -> Expansion:
    """Kept graphs, with columns in one pass over all of them."""
    at = Expansion(f, w)
    at.together = True
    return at


class forward_over_reverse(Expansion):
    """``d/dt ∇L(w + t v)`` in forward mode: 3 gradients, one batch in memory, no graph kept."""

    cost = 3.0

    def __init__(self, f: Objective, w: Tensor) -> None:
        Expansion.__init__(self, f, w, memory_budget=0)
        self.cost = 3.0

    @differentiating()
    def hvp(self, v: Tensor) -> Tensor:
        """``∇²L(w) v`` for `v` ``(P,)``."""
        self.f._require_second()
        total, buffers = torch.zeros_like(v), {name: b.detach() for name, b in self.f.model.named_buffers()}
        for batch in self.f._batches(v.device):
            with forward_ad.dual_level():
                w = forward_ad.make_dual(self.w, v)
                own = {name: b.clone() for name, b in buffers.items()}
                loss = self.f._chunk({**self.f.unflatten(w), **own}, batch).loss
                (g,) = torch.autograd.grad(loss, w, create_graph=True)
                bent = forward_ad.unpack_dual(g).tangent
                buffers = {name: forward_ad.unpack_dual(b).primal.detach() for name, b in own.items()}
            if bent is not None:
                total = total + batch.examples / self.count * bent.detach()
        return total


class differences(Expansion):
    """Central differences of gradients, extrapolated: for what can be differentiated only once.  4 gradients.

    ``D(h) = (∇L(w + h v) - ∇L(w - h v)) / 2h`` at two steps gives ``(4 D(h/2) - D(h)) / 3`` with an error of order
    h⁴ [N13].  The step is chosen at the first product of a point, from a ladder scaled to ‖w‖/‖v‖ and the precision, as
    the one with the least error estimate.
    """

    cost = 4.0

    def __init__(self, f: Objective, w: Tensor) -> None:
        Expansion.__init__(self, f, w, memory_budget=0)
        self.cost = 4.0
        self.error = 0.0
        self._reach: float | None = None

    def hvp(self, v: Tensor) -> Tensor:
        """``∇²L(w) v`` for `v` ``(P,)``; `error` is its relative error bar."""
        size = v.norm().item()
        if size == 0:
            return torch.zeros_like(v)
        if self._reach is None:
            eps = torch.finfo(v.dtype).eps
            start = eps**0.2 * max(self.w.norm().item(), 1e-3)
            tried = [(self._extrapolated(v, start / 4**i / size)[1], start / 4**i) for i in range(6)]
            self._reach = min(tried)[1]
        out, bar = self._extrapolated(v, self._reach / size)
        self.error = bar / max(out.norm().item(), torch.finfo(v.dtype).tiny)
        return out

    def _extrapolated(self, v: Tensor, h: float) -> tuple[Tensor, float]:
        w = self.w.detach()

        def central(h: float) -> Tensor:
            return (self.f.grad(w + h * v) - self.f.grad(w - h * v)) / (2 * h)

        wide, near = central(h), central(h / 2)
        bar = (near - wide).norm().item() / 3
        return (4 * near - wide) / 3, bar if bar == bar else float("inf")


@dataclass
class linearized:
    """Products by a program that is traced once per shape of the batches, cut at its dependence on the direction.

    What does not depend on the direction runs once per point and stays in memory within the objective's budget
    (beyond it, it runs again at every product).  A new program is traced for other shapes, modes of the modules or
    frozen parameters, and is believed only after its products agree with reverse over reverse at two points; whatever
    else the model reads in Python is fixed then.  With `machine_code` products are compiled (see `compiled`).
    """

    machine_code: bool = False
    _programs: dict[Any, "_Traced"] = field(default_factory=dict, repr=False)

    @property
    def seconds(self) -> float:
        """Spent so far on tracing, verifying and compiling."""
        return sum(program.seconds for program in self._programs.values())

    def __call__(self, f: Objective, w: Tensor) -> "Linearization":
        return Linearization(f, w, self)

    def program(self, f: Objective, w: Tensor, batch: Batch, buffers: Sequence[Tensor]) -> "_Traced":
        key = _key(f, w, batch)
        if key not in self._programs:
            self._programs[key] = _Traced(f, w, batch, buffers, self.machine_code)
        return self._programs[key]


def compiled() -> linearized:
    """`linearized` through torch's compiler: seconds to a minute for every new shape, then the fastest products.

    Raises:
        CannotTrace: (at the first point) there is no C++ compiler.
    """
    return linearized(machine_code=True)


class _Traced:
    """The program of one shape of batches, for one vector and, by number, for columns."""

    def __init__(self, f: Objective, w: Tensor, batch: Batch, buffers: Sequence[Tensor], machine_code: bool) -> None:
        f._require_second()
        began = time.perf_counter()
        self.f, self.machine_code = f.on([]), machine_code
        self.names = [name for name, _ in f.model.named_buffers()]
        self.frozen = [name for name, p in f.model.named_parameters() if name not in f.slices]
        w = w.detach()
        g = torch.Generator().manual_seed(0)
        v, step = (torch.randn(w.shape, generator=g, dtype=torch.float64).to(w) for _ in range(2))
        self.parts: Program = tracing.trace(self._function(batch), self.inputs(w, buffers, batch), v)
        self._wide: dict[int, Callable[..., Tensor]] = {}
        self._fast: Callable[..., Tensor] | None = None
        self._verify([w, w + 0.1 * w.square().mean().sqrt() * step], v, buffers, batch)
        self.seconds = time.perf_counter() - began

    def inputs(self, w: Tensor, buffers: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        params = dict(self.f.model.named_parameters())
        tensors = [t for t in tree_flatten(batch[:3])[0] if isinstance(t, Tensor)]
        return [w, *(params[name].detach() for name in self.frozen), *buffers, *tensors]

    def each(self, residuals: Sequence[Tensor], v: Tensor) -> Tensor:
        """Of one vector ``(P,)``, or of rows ``(k, P)``."""
        with torch.no_grad():
            if v.dim() == 2:
                return self._rows(residuals, v)(*residuals, v)
            if self._fast is None:
                self._fast = self._made(self.parts.each, residuals, v)
            return self._fast(*residuals, v)

    def _rows(self, residuals: Sequence[Tensor], v: Tensor) -> Callable[..., Tensor]:
        if len(v) not in self._wide:
            wide = self._made(tracing.batched(self.parts.each, residuals, v), residuals, v)
            found, expected = wide(*residuals, v)[-1], self.parts.each.forward(*residuals, v[-1])
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
                loss = f._chunk(tensors, Batch(args, kwargs, target, n)).loss
                (g,) = torch.autograd.grad(loss, w, create_graph=True)
                product = torch.zeros_like(v)
                if g.requires_grad:
                    (product,) = torch.autograd.grad(g, w, v, materialize_grads=True)
            return (loss.detach(), g.detach(), *(own[name].detach() for name in names), product)

        return function

    def _verify(self, points: Sequence[Tensor], v: Tensor, buffers: Sequence[Tensor], batch: Batch) -> None:
        """The program against reverse over reverse, both on this batch, relative to the larger of the points."""
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


class Linearization(Expansion):
    """`Expansion` whose products run traced programs."""

    @differentiating()
    def __init__(self, f: Objective, w: Tensor, tracer: linearized) -> None:
        self.f, self.w = f, w.detach().requires_grad_()
        self.value, self.count, self.chunks = w.new_zeros(()), 0, 0
        self._kept, self._slopes = [], []
        self._tracer = tracer
        self._held: list[tuple[_Traced, list[Tensor], int]] = []
        slope, used, w = torch.zeros_like(w), 0, w.detach()
        for program, inputs, examples in self._runs():
            values, residuals = program.parts.start(inputs)
            self._buffers = values[2:]
            self.chunks += 1
            self.count += examples
            self.value = self.value + examples * values[0]
            slope.add_(values[1], alpha=examples)
            used += _bytes(residuals)
            if used <= f.memory_budget and len(self._held) == self.chunks - 1:
                self._held.append((program, residuals, examples))
        self.value, self.grad = self.value / self.count, slope / self.count
        self.cost = 2.0 + 1.0 - len(self._held) / self.chunks

    def hvp(self, v: Tensor) -> Tensor:
        """``∇²L(w) v`` for `v` ``(P,)``."""
        return self._product(v.contiguous())

    def columns(self, V: Tensor) -> Tensor:
        """``∇²L(w) V`` for columns ``(P, k)``."""
        if not self.together or V.shape[1] < 2:
            return torch.stack([self.hvp(v) for v in V.T], dim=1)
        try:
            return self._product(V.T.contiguous()).T
        except CannotTrace:
            self.together = False
            return self.columns(V)

    @differentiating()
    def _product(self, v: Tensor) -> Tensor:
        if self.chunks == 1 and self._held:
            program, residuals, _ = self._held[0]
            return program.each(residuals, v)
        total = torch.zeros_like(v)
        for program, residuals, examples in self._held:
            total.add_(program.each(residuals, v), alpha=examples / self.count)
        if len(self._held) < self.chunks:
            for i, (program, inputs, examples) in enumerate(self._runs()):
                values, residuals = program.parts.start(inputs)
                self._buffers = values[2:]
                if i >= len(self._held):
                    total.add_(program.each(residuals, v), alpha=examples / self.count)
        return total

    def _runs(self) -> Any:
        """Program and inputs of each batch; the buffers that a batch leaves are read from `_buffers`."""
        f, w = self.f, self.w.detach()
        self._buffers = [b.detach() for b in f.model.buffers()]
        for batch in f._batches(w.device):
            program = self._tracer.program(f, w, batch, self._buffers)
            yield program, program.inputs(w, self._buffers, batch), batch.examples


@dataclass(frozen=True)
class Calibrated:
    """A way of forming products with the cost that was measured, and whether columns are faster together."""

    expand: Expand
    cost: float
    together: bool

    def __call__(self, f: Objective, w: Tensor) -> Expansion:
        at = self.expand(f, w)
        at.cost, at.together = self.cost, self.together
        return at


def _bytes(tensors: Sequence[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _key(f: Objective, w: Tensor, batch: Batch) -> Any:
    """All that a program is traced for."""
    leaves, spec = tree_flatten(batch[:3])
    for leaf in leaves:
        if not isinstance(leaf, Tensor | int | float | str | bool | None):
            raise CannotTrace(f"no fixed program: a batch holds a {type(leaf).__name__}")
    tensors = [t for t in (w, *f.model.buffers(), *f.model.parameters())]
    return (
        id(f.model),  # the program itself keeps model and loss alive
        id(f.loss),
        tuple(f.slices),
        tuple(m.training for m in f.model.modules()),
        tuple((t.shape, t.dtype, t.device) for t in tensors),
        repr(spec),
        tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves),
        batch.examples,
    )
