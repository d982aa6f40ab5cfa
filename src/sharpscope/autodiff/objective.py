"""Model + loss + data as one smooth function of one flat weight vector.

``L(w) = Σ_b n_b ℓ_b(w) / Σ_b n_b`` over the batches b of the data, each with mean loss ``ℓ_b`` and ``n_b`` examples,
where ``w`` holds every trainable parameter in the order of ``model.named_parameters()``, those of a loss that is a
module after them.  Evaluating changes nothing: weights are passed in wherever model and loss read them, buffers are
cloned, other state is put back (`reach`), random states too, ``.grad`` and the training modes are never touched, and
hooks that only record do not run (`neutral`).  How gradients and products are formed are functions that the objective
carries (`Objective.using`): by default one batch at a time, and on graphs of the gradient that are kept (`expansion`).

P parameters.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Diverged, InvalidType, InvalidValue, NoSecondDerivative, Random
from .checks import check_deterministic, check_parameters, droppers, work_dtype
from .data import Batch, BatchForm, Source, first_batch, map_tensors, read, undisturbed
from .expansion import BatchLoss, Expansion, jacobian_of_field, kept
from .first_look import Look, first_look
from .neutral import plainly, quiet, user_hooks
from .processes import (
    ALONE,
    UNDECIDED,
    Part,
    Processes,
    Together,
    fingerprint,
    joined,
    number_of_processes,
    processes_of,
)
from .reach import Surroundings
from .second_order import differentiating, modules_without_second_derivative, ordinary, says_missing
from .shards import gathered, is_sharded, like
from .smooth import is_lower, smooth
from .weighting import check_mean, check_weights
from .whole import Contents, Loss, Whole, check_model, unwrapped

Expand = Callable[["Objective", Tensor], Expansion]
"""A backend for products with second and third derivatives at w ``(P,)``."""

Gradient = Callable[["Objective", Tensor], tuple[Tensor, Tensor]]
"""A backend for the value and the gradient at w ``(P,)``."""


class Objective:
    """A loss ``L(w)`` of flat weights `w`, with its gradient and products with its higher derivatives [N1].

    Args:
        model: any module, wrapped for data parallelism or compiled or not.  Its trainable parameters form `w`; buffers
            and frozen parameters are constants.
        loss: ``loss(output, target)`` with the *mean* over the batch as a scalar tensor.  The trainable parameters of a
            loss that is a module are part of `w`, named ``loss.*``; a function may use the model or its parameters.
        data: batches, iterable again and again (a list, a DataLoader).  What shuffles or augments is read under one
            fixed seed in every pass, so that L is one function; `check` says whether another seed would change it.
            Data sets, samplers and streams with a state are copied, and every pass reads a copy of how they were when
            the objective was made; loaders are read through twins with workers of their own.
            A batch is a pair ``(inputs, target)``, where inputs are one tensor or object, a tuple (positional
            arguments) or a dict (keyword arguments, or the one argument where no key is the name of one) - or a dict,
            which goes to the model as such inputs and to the loss as the target.
        batch: what is what in batches of another form: a function of the batch that returns ``(inputs, target)``,
            such as ``lambda b: ((b[0], b[1]), b[2])``.
        examples: a function of the batch that returns its weight ``n_b``; by default that is the first dimension of the
            first tensor of the target, or of the inputs where there is none.  The mean over all data needs the number
            that the loss of a batch is divided by: ``lambda b: int((b[1] != -100).sum())`` where some targets are
            ignored, ``lambda b: b[0].shape[1]`` where time comes first.  `check` finds out whether it is right.
        memory_budget: bytes that the graphs kept for repeated products may hold; batches beyond it are recomputed
            at every product, which then costs 1.5 to 2.5 times as much.  The graph of one batch is always whole: use
            smaller batches where that is too much.
        without_dropout: measure the loss without dropout, of modules and of attention, whatever mode these are in, and
            with other modules that draw random numbers (stochastic depth, noise) in eval mode.
        group: the process group (``torch.distributed.group.WORLD``) over whose processes the batches are spread.  Every
            process makes the objective of the same weights and its own batches, calls the same measures, and gets what
            one process with the batches of all would get; a product costs one all-reduce.  None: the batches of this
            process alone, which has to be chosen where there are several.

    Weights of low precision are measured in float32, without autocast; complex ones as pairs of real ones.  Gradient
    checkpoints, compiled code and hooks that only record are left out of the evaluation.  Products follow autograd.
    Where a training stops gradients (``detach``, a target network of its own weights), its gradient is not that of one
    function: then `follows_gradient` is False, and products are those of the Jacobian of that gradient.

    Raises:
        ValueError: nothing to train; a model that is sharded, scripted, lazy or without values; a loss that is not a
            finite differentiable scalar, that sums, or that changes from one evaluation to the next; active dropout and
            other randomness; weights that reach the loss by a road on which they cannot be replaced; data that are
            empty or can be read only once, cannot be copied or begin with another batch when they are read again;
            several processes and no `group`.
        OtherProcess, Diverged: another process of the group cannot make its part, or has other weights.

    >>> net = nn.Linear(3, 1)
    >>> f = Objective(net, nn.functional.mse_loss, [(torch.ones(4, 3), torch.zeros(4, 1))])
    >>> f.size, f.slices
    (4, {'weight': slice(0, 3, None), 'bias': slice(3, 4, None)})
    """

    model: nn.Module
    form: BatchForm
    source: Source
    _look: Look

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Iterable[Any],
        *,
        batch: Callable[[Any], Any] | None = None,
        examples: Callable[[Any], Any] | None = None,
        memory_budget: int = 2 << 30,
        without_dropout: bool = False,
        group: Any = UNDECIDED,
    ) -> None:
        self.processes = ALONE  # until all of them are ready
        self._gathered: Tensor | None = None  # the weights, while the objective is being made of sharded ones
        self.group = group
        processes = processes_of(group)
        self.loss = loss
        self.data = data
        self.memory_budget = memory_budget
        self.dropout = not without_dropout
        self.expand: Expand = kept
        self.gradient: Gradient = by_batches

        def lay_out() -> None:
            self.model = unwrapped(check_model(model))
            self.form = BatchForm(self.model, batch, examples)
            self._lay_out()

        self._together(processes, lay_out, lambda: self._prepare(examples is None))

    def _prepare(self, by_size: bool) -> None:
        """Check the loss and the data of this process; batches are weighted `by_size` or as the user wants."""
        self.source = Source(self.data)
        reduction = getattr(self.loss, "reduction", "mean")
        if reduction == "none" or (reduction != "mean" and by_size):
            raise InvalidValue(f"the loss has reduction='{reduction}'; batches are weighted by size, so use 'mean'")
        self._seed = self.source.seed
        self._take_first_look()
        first = first_batch(self.source, self._planned[0].device, self.form)
        if self.source.several and by_size:
            check_mean(self, first.raw)

    def _together(self, processes: Processes, lay_out: Callable[[], None], prepare: Callable[[], None]) -> None:
        """Lay out the weights and prepare the objective on all processes, or on none.

        Weights that are sharded are gathered in between, before anything that may fail on one process only.

        Raises:
            OtherProcess: another one cannot.
            Diverged: they have other parameters, or other values of them.
        """

        def prepared() -> tuple[Any, float, bool]:
            prepare()
            return ([*self.shapes.items()], self.dtype, self.dropout), fingerprint(self.weights()), self._look.jacobian

        processes.each(lay_out)
        sharded = [name for name, p in self._whole.contents().parameters.items() if is_sharded(p)]
        if sharded and processes is ALONE and number_of_processes() > 1:
            raise InvalidValue(
                f"'{sharded[0]}' is sharded over processes, which have to measure together: give all of them"
                " group=torch.distributed.group.WORLD"
            )
        self._gathered = self.weights() if sharded else None
        found = processes.each(prepared)
        self._gathered = None
        (layout, mark, _), eps = found[0], torch.finfo(self.dtype).eps
        for rank, (other, number, _) in enumerate(found):
            if other != layout:
                raise Diverged(f"processes 0 and {rank} have parameters of other names, shapes or precision: {other}")
            if not abs(number - mark) <= eps**0.7 * max(abs(mark), 1.0):
                raise Diverged(
                    f"processes 0 and {rank} have other weights; measure after DistributedDataParallel has sent those"
                    " of the first to all, or with group=None"
                )
        if any(jacobian for *_, jacobian in found) and not self._look.jacobian:
            self._look = replace(self._look, jacobian=True)
            self.expand = jacobian_of_field
        self.processes = processes

    def _lay_out(self) -> None:
        """Lay out the weights: once, and again when the model has changed."""
        known = list(self.model.modules()) + (list(self.loss.modules()) if isinstance(self.loss, nn.Module) else [])
        self._around = Surroundings([self.model, self.loss], known)
        self._whole = Whole(self.model, self.loss, self._around.modules)
        trainable = self._whole.trainable()
        check_parameters(trainable, self.model)
        self.dtype = work_dtype(trainable.values())
        self.shapes = {name: _real_shape(p) for name, p in trainable.items()}
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        ends = np.cumsum(sizes).tolist()
        self.slices = {name: slice(end - n, end) for name, n, end in zip(trainable, sizes, ends, strict=True)}
        self.size: int = ends[-1]
        self._planned = list(trainable.values())
        self._frozen: dict[str, Tensor] = {}  # that are sharded, as they were when the weights were gathered
        self._complex = [name for name, p in trainable.items() if p.is_complex()]
        lower = any(is_lower(p, self.dtype) for p in self._whole.parameters())
        self._raised_to = self.dtype if lower else None
        self._droppers = droppers(self.model, recurrent_only=not self.dropout)

    def _take_first_look(self) -> None:
        self._look = Look()
        self._look = first_look(self, self._around)
        if self.expand in (kept, jacobian_of_field):
            self.expand = jacobian_of_field if self._look.jacobian else kept

    @property
    def graph_bytes_per_example(self) -> float:
        """Bytes that the graph of the gradient keeps alive per example, from the first batch."""
        return self._look.graph_bytes_per_example

    @property
    def follows_gradient(self) -> bool:
        """False where gradients are stopped on the way, so that training follows no gradient of one function."""
        return not self._look.jacobian

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of model and loss now, under their names, in the order of `w`."""
        return self._whole.trainable()

    def constants(self) -> dict[str, Tensor]:
        """The frozen parameters of the model, the loss and the modules that it calls, under their names."""
        return self._constants(self._whole.contents())

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of the model, the loss and the modules that it calls, under their names."""
        return self._whole.contents().buffers

    def modules(self) -> list[nn.Module]:
        """The model, the loss and the modules that it calls, with all their parts."""
        return list(self._whole.modules())[1:]

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The modules of `modules`, under their names; those of the model as it names them itself."""
        named = ((self._whole.name(f"{key}."), m) for key, m in self._whole.named_modules() if key and key != "around")
        return [(name.removesuffix("."), m) for name, m in named]

    @property
    def is_sharded(self) -> bool:
        """True where a weight is spread over processes, as by FSDP2 or tensor parallel layers."""
        return any(map(is_sharded, self._planned))

    @property
    def captured(self) -> list[Tensor]:
        """Trainable weights on which the loss depends and that are neither the model's nor those of a loss module."""
        return list(self._look.captured)

    def changes(self) -> str:
        """Say how the trainable parameters differ from those when this objective was made; empty if not at all."""
        now = self.parameters()
        here = list(now.values())
        same = len(here) == len(self._planned) and all(map(_is, here, self._planned))
        if same and all(_real_shape(p) == shape for p, shape in zip(here, self.shapes.values(), strict=True)):
            return "" if work_dtype(here) == self.dtype else "their precision has changed"
        parts = {
            "unfrozen or new": [name for name in now if name not in self.shapes],
            "frozen or gone": [name for name in self.shapes if name not in now],
            "of another shape": [n for n, p in now.items() if n in self.shapes and _real_shape(p) != self.shapes[n]],
        }
        sentence = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in parts.items() if names)
        return sentence or "some were replaced by others of the same shape"

    def renewed(self) -> "Objective":
        """Make the objective anew, for the trainable parameters that the model has now."""
        other = self.local()
        other._together(self.processes, other._lay_out, other._take_first_look)
        return other

    def weights(self) -> Tensor:
        """Return the trainable parameters now, as a new flat vector ``(P,)``.

        Where they are sharded over processes, all of these have to call this.

        Raises:
            ValueError: they are not those any more for which the objective was made (`renewed`).
        """
        if self._gathered is not None:
            return self._gathered.clone()
        params = list(self.parameters().values())
        if list(map(_real_shape, params)) != list(self.shapes.values()):
            raise InvalidValue(
                f"the trainable parameters are not those of this objective any more ({self.changes()}); go on with"
                " f.renewed()"
            )
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, p in self._whole.contents().parameters.items():
                if is_sharded(p) and name not in self.slices:
                    self._frozen[name] = gathered(p)
            return torch.cat([_real(gathered(p)).reshape(-1).to(self.dtype) for p in params])

    def unflatten(self, w: Tensor) -> dict[str, Tensor]:
        """Return views of `w` ``(P,)`` under the parameters' names and shapes; complex ones as pairs of numbers."""
        parts = w.split([s.stop - s.start for s in self.slices.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def load(self, w: Tensor) -> None:
        """Write `w` into the model, on all processes over which that is sharded: the one method that changes it."""
        params = self.parameters()
        with torch.no_grad():
            for name, value in self.unflatten(w).items():
                _real(params[name]).copy_(like(params[name], value))

    def on(self, data: Iterable[Any]) -> "Objective":
        """Put the same model and loss on other data (a mini-batch, say), without checking anything again."""
        other = self._copy()
        other.data = data
        other.source = Source(data, self.source.quiet)
        other._seed = other.source.seed if self._seed is None else self._seed
        return other

    def using(self, expand: Expand | None = None, *, gradient: Gradient | None = None) -> "Objective":
        """Form products with another backend (see `hvp`), or gradients; the function stays the same."""
        other = self._copy()
        other.expand = expand or self.expand
        other.gradient = gradient or self.gradient
        return other

    def in_double(self) -> "Objective":
        """Return the same function in double precision.

        Weights, constants, buffers and data are converted as they are read.  Model and data stay in memory once, and as
        they are; integers stay integers.  Conversions to single precision inside the model are left out.
        """
        double = self._copy()
        double.dtype = torch.float64
        double._raised_to = torch.float64
        double._look = replace(self._look, graph_bytes_per_example=2 * self._look.graph_bytes_per_example)
        return double

    def local(self) -> "Objective":
        """Return the objective of the batches of this process alone."""
        other = self._copy()
        other.processes = ALONE
        return other

    def seen(self, look: Look, *, dropout: bool | None = None) -> "Objective":
        """Return the objective as another first look would have it, and with or without dropout."""
        other = self._copy()
        other._look = look
        other.dropout = self.dropout if dropout is None else dropout
        return other

    def _copy(self) -> "Objective":
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_around"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._around = Surroundings([self.model, self.loss], self._whole.modules())

    def _seeded(self, seed: int) -> "Objective":
        other = self._copy()
        other._seed = seed
        return other

    def value(self, w: Tensor) -> Tensor:
        """Evaluate the loss ``L(w)``, a scalar."""
        if isinstance(self.processes, Together):
            total, weight = self.processes.sum(lambda: self._weighted(lambda f: [f.value(w)]), 2, w)
            return total / weight
        with differentiating(), nullcontext() if self._look.needs_grad else torch.no_grad():
            total, examples = w.new_zeros(()), 0.0
            for batch in self.losses(self.unflatten(ordinary(w))):
                total = total + batch.examples * batch.loss.detach()
                examples += batch.examples
        return total / examples

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate ``L(w)`` and its gradient ``(P,)`` in one pass."""
        w = ordinary(w)
        if isinstance(self.processes, Together):
            out = self.processes.sum(
                lambda: self._weighted(lambda f: f.value_and_grad(w)[::-1]), len(w) + 2, w
            )  # the gradient, the value, the weight
            return out[-2] / out[-1], out[:-2].div_(out[-1])
        return self.gradient(self, w)

    def _weighted(self, evaluate: Callable[["Objective"], Sequence[Tensor]]) -> Part:
        """Evaluate means over the batches of this process; with their weight, and a one that stands for it in a sum."""
        if self._empty:
            return 0.0, ()
        means = evaluate(self.local())
        return self._weight, (*means, means[0].new_ones(1))

    @property
    def _weight(self) -> float:
        """Number of examples in the batches of this process."""
        if self.source.weight is None and not self._empty:
            self.source.weight = sum(batch.examples for batch in self.batches())
        return self.source.weight or 0.0

    @property
    def _empty(self) -> bool:
        """True where none of the batches that are measured is one of this process."""
        return isinstance(self.data, list) and not self.data

    def grad(self, w: Tensor) -> Tensor:
        """Evaluate the gradient ``∇L(w)`` ``(P,)``."""
        return self.value_and_grad(w)[1]

    def at(self, w: Tensor) -> Expansion:
        """Expand around `w`: use this for more than one product at a point."""
        w = ordinary(w)
        if isinstance(self.processes, Together):
            own = self.local()
            return joined(self.processes, w, lambda: None if self._empty else own.expand(own, w))
        return self.expand(self, w)

    def hvp(self, w: Tensor, v: Tensor) -> Tensor:
        """Multiply by the Hessian, ``∇²L(w) v`` ``(P,)``."""
        return self.at(w).hvp(v)

    def third(self, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Differentiate a curvature, ``∇_w (uᵀ ∇²L(w) v)`` ``(P,)``, with u and v held fixed."""
        return self.at(w).third(u, v)

    def gauss_newton(self, w: Tensor, v: Tensor) -> Tensor:
        """Multiply by the Gauss-Newton matrix, ``Jᵀ ∇²ℓ J v`` ``(P,)`` [N3].

        J is the Jacobian of the outputs, ∇²ℓ the Hessian of the loss in the outputs; weights that the loss reads itself
        (a penalty) count as outputs, too.
        """
        return self.at(w).gauss_newton(v)

    def check(self) -> str:
        """Raise InvalidValue unless the loss is finite, and the same (to rounding) when the data are read anew.

        They are read under two seeds.  Where there are several batches, parts of them are compared with their union:
        InvalidValue says so where another `examples` gives the loss of all data.  Where none does, as with batch
        normalization in training mode, a sentence about it is returned; otherwise that is empty.
        """
        w = self.weights()
        first, second = (self._seeded(seed).value(w).item() for seed in (1, 2))
        if not math.isfinite(first):
            raise InvalidValue(f"the loss is {first} at the current weights; curvature needs a finite loss")
        if abs(first - second) > torch.finfo(w.dtype).eps ** 0.5 * max(abs(first), torch.finfo(w.dtype).tiny):
            raise InvalidValue(
                f"two passes over the same weights gave losses {first:.8g} and {second:.8g}: data that are shuffled or"
                " augmented anew (or a random model) have no curvature; fix the batches, for example as a list"
            )
        own = self.local()
        return next(filter(None, self.processes.each(lambda: check_weights(own) if own.source.several else "")), "")

    def batches(self, device: torch.device | None = None) -> Generator[Batch, None, None]:
        """Read the data once, under their seed, onto `device` (by default that of the weights)."""
        check_deterministic(self._droppers)
        if device is None:
            device = self._planned[0].device
        return read(self.source, self._seed, device, self.form)

    def losses(self, params: Mapping[str, Tensor]) -> Iterator[BatchLoss]:
        """Evaluate the loss of each batch as a function of `params`, with buffers cloned once per pass.

        Where the modules have other hooks than at the first look, another one is taken.

        Raises:
            ValueError: an evaluation draws random numbers.
        """
        contents = self._whole.contents()
        hooks, seen = user_hooks(contents.modules), self._look.seen_hooks
        if not self._empty and (len(hooks) != len(seen) or not all(map(_is, hooks, seen))):
            self._take_first_look()
        tensors = {**params, **{name: b.clone() for name, b in contents.buffers.items()}}
        device = next(iter(params.values())).device
        for batch in self.batches(device):
            before = random_state(device)
            loss = self.evaluate(batch, tensors, contents=contents)
            if not self._look.draws and (random_state(device) != before or self._around.drew):
                raise Random(
                    "the model or the loss has begun to draw random numbers (a module in training mode?), so that its"
                    " curvature is not defined; call .eval() on it, or measure without: Objective(...,"
                    " without_dropout=True)"
                )
            yield loss

    def loss_on(self, batch: Batch, params: Mapping[str, Tensor]) -> Tensor:
        """Evaluate the loss of one batch with `params` in the place of parameters and buffers.

        It may write to the buffers among them.
        """
        return self.evaluate(batch, dict(params)).loss

    def evaluate(
        self,
        batch: Batch,
        tensors: dict[str, Tensor],
        mode: AbstractContextManager[Any] | None = None,
        contents: Contents | None = None,
    ) -> BatchLoss:
        """Evaluate model and loss on one batch; `tensors` are used wherever these read a weight or a buffer.

        Buffers among them may be written or replaced.  A `mode` sees the operations of model and loss; `contents` are
        what the model holds, where that is known already.
        """
        contents = contents or self._whole.contents()
        called = self._as_called(tensors, contents)
        state = {name: called[name].clone() for name in contents.beside & called.keys() - self.slices.keys()}
        args = _inputs((batch.args, batch.kwargs, batch.target), self._raised_to, self._look.writes_inputs)
        with self._evaluating(called, contents), mode or nullcontext():
            output, loss = self._whole(*args)
            after = {name: contents.now(name) for name in tensors.keys() - self.slices.keys()}
        tensors.update({name: t.detach() for name, t in after.items()})

        def loss_of(outputs: Any, params: Mapping[str, Tensor]) -> Tensor:
            with self._evaluating(self._as_called({**state, **params}, contents), contents):
                return self._whole.loss(outputs, args[2])

        return BatchLoss(batch.examples, loss, output, loss_of)

    @contextmanager
    def _evaluating(self, called: Mapping[str, Tensor], contents: Contents) -> Iterator[None]:
        """Evaluate inside as a plain function of the tensors `called`, leaving nothing behind."""
        own = contents.tensors
        instead = {id(own[name]): t for name, t in called.items()}
        for name, t in called.items():
            if isinstance(own[name], nn.Parameter):
                t._is_param = True  # what isinstance(t, nn.Parameter) asks for
        if self._raised_to is not None:
            plain = (t for t in self._around.tensors() if id(t) not in instead)
            instead |= {id(t): _up(t, self._raised_to) for t in plain if is_lower(t, self._raised_to)}
        lowest = self._raised_to or torch.float32
        with ExitStack() as stack:
            stack.enter_context(self._around.untouched())
            stack.enter_context(plainly(contents.modules, self._look.hooks))
            stack.enter_context(quiet(self._look.quiet))
            stack.enter_context(smooth(dropout=self.dropout, lowest=lowest, instead=instead))
            stack.enter_context(contents.replaced(called))
            yield

    def _constants(self, contents: Contents) -> dict[str, Tensor]:
        return {n: self._frozen.get(n, p) for n, p in contents.parameters.items() if n not in self.slices}

    def _as_called(self, tensors: Mapping[str, Tensor], contents: Contents) -> dict[str, Tensor]:
        """Bring flat parameters and buffers into the form in which the modules hold them."""
        level = self._raised_to
        tensors = {**self._frozen, **tensors}
        fixed = {} if level is None else {**self._constants(contents), **contents.buffers}
        lower = {name: t.detach() for name, t in fixed.items() if level is not None and is_lower(t, level)}
        called = {**lower, **tensors}
        if self._look.writes_constants:
            called = {**{name: t.detach().clone() for name, t in self._constants(contents).items()}, **called}
        for name in self._complex:
            called[name] = torch.complex(*called[name].unbind(-1))
        if self._look.writes_weights:
            called |= {name: called[name].clone() for name in self.slices}
        return called if level is None else {name: _up(t, level) for name, t in called.items()}

    def require_second_derivative(self) -> None:
        """Raise NoSecondDerivative where an operation can be differentiated only once."""
        if self._look.once_differentiable:
            raise _missing(self, "an operation is marked as differentiable once")

    def explained(self, error: RuntimeError) -> RuntimeError:
        """Name the modules behind an error that says a second derivative is missing; others stay as they are."""
        if not says_missing(error):
            return error
        return _missing(self, str(error).splitlines()[0])


@differentiating()
def by_batches(f: Objective, w: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate ``L(w)`` and its gradient with one batch in memory at a time."""
    w = w.detach().requires_grad_()
    total, slope, examples = w.new_zeros(()), torch.zeros_like(w), 0.0
    for batch in f.losses(f.unflatten(w)):
        (g,) = torch.autograd.grad(batch.loss, w)
        total = total + batch.examples * batch.loss.detach()
        slope.add_(g, alpha=batch.examples)
        examples += batch.examples
    return total / examples, slope.div_(examples)


def random_state(device: torch.device) -> bytes:
    """Return the state of the random numbers that an evaluation on `device` may draw."""
    state = torch.get_rng_state().numpy().tobytes()
    return state + torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else state


def _inputs(trees: tuple[Any, ...], level: torch.dtype | None, copied: bool) -> tuple[Any, ...]:
    """Stand in for the tensors of a batch: gradients may be taken in them and, if `copied`, they may be written."""

    def stand_in(t: Tensor) -> Tensor:
        if level is not None:
            t = _up(t, level)
        own = t.clone() if copied or t.is_inference() else t.detach()
        return own.requires_grad_() if t.requires_grad else own

    return tuple(map_tensors(tree, stand_in) for tree in trees)


def _up(t: Tensor, level: torch.dtype) -> Tensor:
    """Raise a tensor of lower precision to `level`."""
    return t.to(level.to_complex() if t.is_complex() else level) if is_lower(t, level) else t


def _real(p: Tensor) -> Tensor:
    return torch.view_as_real(p) if p.is_complex() else p


def _real_shape(p: Tensor) -> torch.Size:
    return torch.Size((*p.shape, 2)) if p.is_complex() else p.shape


def _is(a: object, b: object) -> bool:
    return a is b


def _missing(f: Objective, reason: str) -> NoSecondDerivative:
    names, _ = without_second_derivative(f)
    where = f"in {', '.join(names)}" if names else "in the loss or between the modules"
    return NoSecondDerivative(
        f"the second derivative does not exist {where} ({reason}); products by differences of gradients do:"
        " f.using(sharpscope.autodiff.hvp.differences)"
    )


def without_second_derivative(f: Objective) -> tuple[list[str], list[str]]:
    """Name the innermost modules without a second derivative on the first batch, and those with a wrong one.

    They run by themselves, with their dropout; nothing of that is left behind.
    """
    w = f.weights().requires_grad_()
    with undisturbed(f.source), f._around.untouched():
        return modules_without_second_derivative(f.model, lambda: next(f.losses(f.unflatten(w))))


def require_objective(f: object) -> None:
    """Raise InvalidType unless `f` is an Objective."""
    if not isinstance(f, Objective):
        raise InvalidType(
            f"this {type(f).__name__} is no Objective; make one of a model, its loss and a few fixed batches:"
            " Objective(model, loss, batches). Of an Iterate it is .objective"
        )
