"""Backends for products with the Hessian beside kept graphs: functions of an objective and a point to an `Expansion`.

    f.using(linearized())      # a copy of f whose products run a traced program

`kept`, the default, is in `expansion`; `tune` measures which backend suits a case best.  Costs are in gradients, by
counting operations.
"""

import contextlib
import itertools
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
from .expansion import Expansion, Graphs, on_graphs
from .objective import Objective
from .second_order import differentiating
from .tracing import Program, interpreted


def rebuilt(f: Objective, w: Tensor) -> Expansion:
    """Multiply on a graph built anew for every product: 3 gradients, one batch in memory."""
    return on_graphs(f, w, memory_budget=0)


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

    return replace(at, hvp=hvp, cost=3.0)


def differences(f: Objective, w: Tensor) -> Expansion:
    """Multiply by differences of gradients, for what can be differentiated only once: 4 gradients.

    They are taken in double precision where the model runs in it: the steps of single precision cross kinks.
    """
    product = CentralDifferences(f, w)
    if w.dtype is not torch.float64:
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            f.in_double().value(w.double())
            product = CentralDifferences(f.in_double(), w.double())
    return replace(rebuilt(f, w), hvp=lambda v: product(v.to(product.w))[0].to(v), cost=4.0)


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
    else the model reads in Python is fixed then.  It is run by torch's interpreter where that knows all operations;
    with `machine_code` products are compiled (see `compiled`).
    """

    machine_code: bool = False
    programs: dict[Any, Program] = field(default_factory=dict, init=False, repr=False)
    seconds: float = field(default=0.0, init=False)  # spent so far on tracing, verifying and compiling
    _alive: list[Any] = field(default_factory=list, init=False, repr=False)  # models and losses that keys name

    @differentiating()
    def __call__(self, f: Objective, w: Tensor) -> Expansion:
        w = w.detach()
        kept: list[tuple[Program, list[Tensor], float]] = []
        value, slope = w.new_zeros(()), torch.zeros_like(w)
        batches, examples, used = 0, 0.0, 0
        for program, values, residuals, n in self._started(f, w):
            batches += 1
            examples += n
            value = value + n * values[0]
            slope.add_(values[1], alpha=n)
            used += _bytes(residuals)
            if used <= f.memory_budget and len(kept) == batches - 1:
                kept.append((program, residuals, n))
            del values, residuals

        @differentiating()
        def hvp(v: Tensor) -> Tensor:
            v = v.contiguous()
            if batches == len(kept) == 1:
                return kept[0][0].product(kept[0][1], v)
            total = torch.zeros_like(v)
            for program, residuals, n in kept:
                total.add_(program.product(residuals, v), alpha=n / examples)
            if len(kept) < batches:
                for program, _, residuals, n in itertools.islice(self._started(f, w), len(kept), None):
                    total.add_(program.product(residuals, v), alpha=n / examples)
            return total

        graphs = Graphs(f, w.detach().requires_grad_(), batches, examples)
        return Expansion(
            value=value / examples,
            grad=slope.div_(examples),
            hvp=hvp,
            third=graphs.third,
            gauss_newton=graphs.gauss_newton,
            examples=examples,
            cost=3.0 - len(kept) / batches,
        )

    def __reduce__(self) -> tuple[type["linearized"], tuple[bool]]:
        """Leave programs behind in copies: they are known by objects that others do not have."""
        return linearized, (self.machine_code,)

    def _started(self, f: Objective, w: Tensor) -> Iterator[tuple[Program, list[Tensor], list[Tensor], float]]:
        """Run the first part of each batch's program: its values, its residuals, and the number of examples."""
        where, buffers = _where(f, w), [b.detach() for b in f.buffers().values()]
        constants = [t.detach() for t in f.constants().values()]
        for batch in f.batches(w.device):
            inputs = [w, *constants, *buffers, *(t for t in tree_flatten(batch[:3])[0] if isinstance(t, Tensor))]
            program = self._program(f, (where, _shape(batch)), inputs, batch)
            values, residuals = program.start(inputs)
            buffers = values[2:]
            yield program, values, residuals, batch.examples

    def _program(self, f: Objective, key: Any, inputs: Sequence[Tensor], batch: Batch) -> Program:
        if key not in self.programs:
            f.require_second_derivative()
            began = time.perf_counter()
            self.programs[key] = _verified(_function(f.on([]), batch), inputs, self.machine_code)
            self._alive += (f.model, f.loss)
            self.seconds += time.perf_counter() - began
        return self.programs[key]


def compiled() -> linearized:
    """Compile the traced program: seconds to a minute for every new shape, then the fastest products.

    Raises:
        CannotTrace: (at the first point) there is no C++ compiler.
    """
    return linearized(machine_code=True)


def _function(f: Objective, batch: Batch) -> Callable[..., tuple[Tensor, ...]]:
    """Return the function to trace: ``(*inputs, v) -> (loss, gradient, *buffers, product)``.

    The inputs are the weights, constants and buffers of the objective, and the tensors of the batch.
    """
    leaves, spec = tree_flatten(batch[:3])
    frozen, names, n = list(f.constants()), list(f.buffers()), batch.examples

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


def _verified(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], machine_code: bool) -> Program:
    """Trace a program, and return its fastest form that agrees with `function` at two points."""
    w, *rest = inputs
    g = torch.Generator().manual_seed(0)
    v, step = (torch.randn(w.shape, generator=g, dtype=torch.float64).to(w) for _ in range(2))
    traced = tracing.trace(function, inputs, v)
    points = [[at, *rest] for at in (w, w + 0.1 * w.square().mean().sqrt() * step)]
    expected = [function(*point, v) for point in points]
    if machine_code:
        _, residuals = traced.start(inputs)
        program = replace(traced, each=tracing.compiled(traced.each, [*residuals, v]))
    else:
        try:
            program = replace(traced, once=interpreted(traced.once), each=interpreted(traced.each))
            _compare(program, points, v, expected)
        except RuntimeError:  # of the interpreter, which does not know every operation
            program = traced
        else:
            return program
    _compare(program, points, v, expected)
    return program


def _compare(
    program: Program, points: Sequence[Sequence[Tensor]], v: Tensor, expected: Sequence[Sequence[Tensor]]
) -> None:
    """Raise CannotTrace unless a program gives the expected results, relative to the larger of the points."""
    found = []
    for point in points:
        values, residuals = program.start(point)
        found.append((values[0], values[1], program.product(residuals, v)))
    pairs = [(a, (e[0], e[1], e[-1])) for a, e in zip(found, expected, strict=True)]
    for i, name in enumerate(("value", "gradient", "product")):
        size = max(e[i].norm().item() for _, e in pairs)
        off = max((a[i] - e[i]).norm().item() for a, e in pairs)
        if not off <= torch.finfo(v.dtype).eps ** 0.6 * size:
            raise CannotTrace(f"no fixed program: its {name} is off by {off:.2g} of {size:.2g} at other weights")


def _bytes(tensors: Sequence[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _where(f: Objective, w: Tensor) -> Any:
    """Name all of an objective that its programs are traced for."""
    tensors = [w, *f.buffers().values(), *f.parameters().values(), *f.constants().values()]
    return (
        id(f.model),
        id(f.loss),
        tuple(f.slices),
        tuple(m.training for m in f.modules()),
        tuple((t.shape, t.dtype, t.device) for t in tensors),
    )


def _shape(batch: Batch) -> Any:
    """Name all of a batch that its program is traced for."""
    leaves, spec = tree_flatten(batch[:3])
    for leaf in leaves:
        if not isinstance(leaf, Tensor | int | float | str | bool | None):
            raise CannotTrace(f"no fixed program: a batch holds a {type(leaf).__name__}")
    kinds = ((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return repr(spec), tuple(kinds)
