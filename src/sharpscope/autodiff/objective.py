"""Model + loss + data as one smooth function of one flat weight vector.

``L(w) = Σ_b n_b ℓ_b(w) / Σ_b n_b`` over the batches b of the data, each with mean loss ``ℓ_b`` and ``n_b`` examples,
where ``w`` holds every trainable parameter in the order of ``model.named_parameters()``.  Evaluating changes nothing:
weights are passed in, buffers are cloned, random states are put back, ``.grad`` and the training modes are never
touched.  How gradients and products are formed are functions that the objective carries (`Objective.using`): by default
one batch at a time, and on graphs of the gradient that are kept (`expansion`).

P parameters.
"""

import copy
import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import InvalidType, InvalidValue, NoSecondDerivative
from .checks import check_deterministic, check_loss, check_parameters, check_sparse, droppers
from .data import Batch, check_data, read
from .expansion import BatchLoss, Expansion, counting_saved_bytes, kept
from .second_order import differentiating, holds_delayed_error, modules_without_second_derivative
from .smooth import smooth

Loss = Callable[[Any, Any], Tensor]

Expand = Callable[["Objective", Tensor], Expansion]
"""A backend for products with second and third derivatives at w ``(P,)``."""

Gradient = Callable[["Objective", Tensor], tuple[Tensor, Tensor]]
"""A backend for the value and the gradient at w ``(P,)``."""


class Objective:
    """A loss ``L(w)`` of flat weights `w`, with its gradient and products with its higher derivatives [N1].

    Args:
        model: any module.  Its trainable parameters form `w`; buffers and frozen parameters are constants.
        loss: ``loss(output, target)`` with the *mean* over the batch as a scalar tensor.
        data: batches, iterable again and again (a list, a DataLoader).  What shuffles or augments is read under one
            fixed seed in every pass, so that L is one function; `check` says whether another seed would change it.
            A batch is a pair ``(inputs, target)``, where inputs are one tensor, a tuple (positional arguments) or a
            dict (keyword arguments) - or a dict, which goes to the model as keywords and to the loss as the target.
        memory_budget: bytes that the graphs kept for repeated products may hold; batches beyond it are recomputed
            at every product, which then costs 1.5 to 2.5 times as much.  The graph of one batch is always whole: use
            smaller batches where that is too much.
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
        if not isinstance(model, nn.Module):
            raise InvalidType(
                f"this {type(model).__name__} is no torch module; an objective is Objective(model, loss, batches)"
            )
        self.model = model
        self.loss = loss
        self.data = data
        self.memory_budget = memory_budget
        self.dropout = not without_dropout
        self.expand: Expand = kept
        self.gradient: Gradient = by_batches
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise InvalidValue(f"{type(model).__name__} has no trainable parameter; set requires_grad on at least one")
        check_parameters(trainable)
        check_sparse(model)
        self.shapes = {name: p.shape for name, p in trainable.items()}
        sizes = [p.numel() for p in trainable.values()]
        ends = np.cumsum(sizes).tolist()
        self.slices = {name: slice(end - n, end) for name, n, end in zip(trainable, sizes, ends, strict=True)}
        self.size: int = ends[-1]
        self._droppers = droppers(model, recurrent_only=without_dropout)
        check_data(data)
        reduction = getattr(loss, "reduction", "mean")
        if reduction != "mean":
            raise InvalidValue(f"the loss has reduction='{reduction}'; batches are weighted by size, so use 'mean'")
        self._seed = None if isinstance(data, list | tuple) else 0
        self.graph_bytes_per_example, self._once_differentiable = self._check_first_batch()

    def weights(self) -> Tensor:
        """Return the model's trainable parameters now, as a new flat vector ``(P,)``."""
        params = dict(self.model.named_parameters())
        return torch.cat([params[name].detach().reshape(-1) for name in self.slices])

    def unflatten(self, w: Tensor) -> dict[str, Tensor]:
        """Return views of `w` ``(P,)`` under the parameters' names and shapes."""
        parts = w.split([s.stop - s.start for s in self.slices.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def load(self, w: Tensor) -> None:
        """Write `w` into the model: the one method that changes it."""
        params = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self.unflatten(w).items():
                params[name].copy_(value)

    def on(self, data: Iterable[Any]) -> "Objective":
        """Put the same model and loss on other data (a mini-batch, say), without checking anything again."""
        other = copy.copy(self)
        other.data = data
        return other

    def using(self, expand: Expand | None = None, *, gradient: Gradient | None = None) -> "Objective":
        """Form products with another backend (see `hvp`), or gradients; the function stays the same."""
        other = copy.copy(self)
        other.expand = expand or self.expand
        other.gradient = gradient or self.gradient
        return other

    def _seeded(self, seed: int) -> "Objective":
        other = copy.copy(self)
        other._seed = seed
        return other

    def value(self, w: Tensor) -> Tensor:
        """Evaluate the loss ``L(w)``, a scalar."""
        with differentiating(), torch.no_grad():
            total, examples = w.new_zeros(()), 0
            for batch in self.losses(self.unflatten(w)):
                total = total + batch.examples * batch.loss.detach()
                examples += batch.examples
        return total / examples

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate ``L(w)`` and its gradient ``(P,)`` in one pass."""
        return self.gradient(self, w)

    def grad(self, w: Tensor) -> Tensor:
        """Evaluate the gradient ``∇L(w)`` ``(P,)``."""
        return self.value_and_grad(w)[1]

    def at(self, w: Tensor) -> Expansion:
        """Expand around `w`: use this for more than one product at a point."""
        return self.expand(self, w)

    def hvp(self, w: Tensor, v: Tensor) -> Tensor:
        """Multiply by the Hessian, ``∇²L(w) v`` ``(P,)``."""
        return self.at(w).hvp(v)

    def third(self, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Differentiate a curvature, ``∇_w (uᵀ ∇²L(w) v)`` ``(P,)``, with u and v held fixed."""
        return self.at(w).third(u, v)

    def gauss_newton(self, w: Tensor, v: Tensor) -> Tensor:
        """Multiply by the Gauss-Newton matrix, ``Jᵀ ∇²ℓ J v`` ``(P,)`` [N3].

        J is the Jacobian of the outputs, ∇²ℓ the Hessian of the loss in the outputs.
        """
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

    def batches(self, device: torch.device | None = None) -> Generator[Batch, None, None]:
        """Read the data once, under their seed, onto `device` (by default that of the weights)."""
        check_deterministic(self._droppers)
        if device is None:
            device = self.model.get_parameter(next(iter(self.slices))).device
        return read(self.data, self._seed, device)

    def losses(self, params: Mapping[str, Tensor]) -> Iterator[BatchLoss]:
        """Evaluate the loss of each batch as a function of `params`, with buffers cloned once per pass."""
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        for batch in self.batches(next(iter(params.values())).device):
            yield self._evaluate(batch, {**params, **buffers})

    def loss_on(self, batch: Batch, params: Mapping[str, Tensor]) -> Tensor:
        """Evaluate the loss of one batch with `params` in the place of parameters and buffers.

        It may write to the buffers among them.
        """
        return self._evaluate(batch, params).loss

    def _evaluate(self, batch: Batch, params: Mapping[str, Tensor]) -> BatchLoss:
        with smooth(dropout=self.dropout):
            output = functional_call(self.model, dict(params), batch.args, batch.kwargs)
            loss = self.loss(output, batch.target)
        return BatchLoss(batch.examples, loss, output)

    def require_second_derivative(self) -> None:
        """Raise NoSecondDerivative where an operation can be differentiated only once."""
        if self._once_differentiable:
            raise _missing(self, "an operation is marked as differentiable once")

    def explained(self, error: RuntimeError) -> RuntimeError:
        """Name the modules behind an error that says a second derivative is missing; others stay as they are."""
        if not re.search(r"not implemented|once_differentiable|does not require grad|retain_graph", str(error)):
            return error
        return _missing(self, str(error).splitlines()[0])

    @differentiating()
    def _check_first_batch(self) -> tuple[float, bool]:
        """Refuse what cannot be differentiated.

        Return the bytes of the gradient's graph per example, and whether an operation is differentiable only once.
        """
        leaves = {name: part.clone().requires_grad_() for name, part in self.unflatten(self.weights()).items()}
        with counting_saved_bytes([*leaves.values(), *self.model.parameters()]) as saved:
            batch = next(self.losses(leaves))
            check_loss(batch.loss)
            grads = torch.autograd.grad(batch.loss, list(leaves.values()), create_graph=True, allow_unused=True)
        unused = [name for name, g in zip(leaves, grads, strict=True) if g is None]
        if unused:
            raise InvalidValue(
                f"the loss does not depend on {', '.join(unused)}; freeze what is not trained by requires_grad_(False)"
            )
        return saved() / batch.examples, holds_delayed_error(grads)


@differentiating()
def by_batches(f: Objective, w: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate ``L(w)`` and its gradient with one batch in memory at a time."""
    w = w.detach().requires_grad_()
    total, slope, examples = w.new_zeros(()), torch.zeros_like(w), 0
    for batch in f.losses(f.unflatten(w)):
        (g,) = torch.autograd.grad(batch.loss, w)
        total = total + batch.examples * batch.loss.detach()
        slope = slope.add_(g, alpha=batch.examples)
        examples += batch.examples
    return total / examples, slope / examples


def _missing(f: Objective, reason: str) -> NoSecondDerivative:
    names = without_second_derivative(f)
    where = f"in {', '.join(names)}" if names else "in the loss or between the modules"
    return NoSecondDerivative(
        f"the second derivative does not exist {where} ({reason}); products by differences of gradients do:"
        " f.using(sharpscope.autodiff.hvp.differences)"
    )


def without_second_derivative(f: Objective) -> list[str]:
    """Name the innermost modules whose output on the first batch has no second derivative, or a wrong one."""
    w = f.weights()
    return modules_without_second_derivative(f.model, lambda: next(f.losses(f.unflatten(w.requires_grad_()))))


def require_objective(f: object) -> None:
    """Raise InvalidType unless `f` is an Objective."""
    if not isinstance(f, Objective):
        raise InvalidType(
            f"this {type(f).__name__} is no Objective; make one of a model, its loss and a few fixed batches:"
            " Objective(model, loss, batches). Of an Iterate it is .objective"
        )
