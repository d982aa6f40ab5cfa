"""Checks whether the loss of several batches is that of all their examples, by comparing parts with their union.

With the weights n and the losses ℓ of two parts, the loss of their union is

    ℓ(A ∪ B) = (n_A ℓ(A) + n_B ℓ(B)) / (n_A + n_B)

where n is what each loss was divided by.  Parts are the halves of a batch, and whole batches.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import InvalidType, InvalidValue
from .data import BatchForm, Source, undisturbed

Weight = Callable[[Any], float]

CROSSING = (nn.modules.batchnorm._BatchNorm,)
"""Layers whose outputs for one example depend on the others, in training mode."""


class _Objective(Protocol):
    """An objective, as far as this file needs to know it."""

    model: nn.Module
    loss: Any
    form: BatchForm
    source: Source

    def weights(self) -> Tensor: ...

    def value(self, w: Tensor) -> Tensor: ...

    def on(self, data: list[Any]) -> "_Objective": ...

    def batches(self) -> Any: ...


@dataclass(frozen=True)
class _Union:
    """Two parts, their union, and the loss of each."""

    parts: tuple[Any, Any]
    losses: tuple[float, float]
    whole: float

    def mean(self, weight: Weight) -> float:
        """Mean of the losses of the parts."""
        n, m = (weight(part) for part in self.parts)
        return (n * self.losses[0] + m * self.losses[1]) / (n + m)


def check_mean(f: _Objective, raw: Any) -> None:
    """Raise InvalidValue if the loss of a batch is the sum of the losses of its halves, at the cost of two of them."""
    with undisturbed(f.source):
        unions = list(_halves(f, raw))
    for union in unions:
        if _close(f, sum(union.losses), union.whole) and not _close(f, union.mean(f.form.weight), union.whole):
            raise InvalidValue(
                f"the loss sums over the examples (it is {union.whole:.6g} for a batch, {union.losses[0]:.6g} and"
                f" {union.losses[1]:.6g} for its halves), but batches are weighted by size: use the mean, or say by"
                " Objective(..., examples=lambda b: 1) that all batches weigh the same"
            )


def check_weights(f: _Objective) -> str:
    """Raise InvalidValue where another weight of the batches is right; say so where none is."""
    with undisturbed(f.source):
        return _weights_in_words(f, list(_unions(f)))


def _weights_in_words(f: _Objective, unions: list[_Union]) -> str:
    wrong = [union for union in unions if not _close(f, union.mean(f.form.weight), union.whole)]
    if not wrong:
        return ""
    mean = wrong[0].mean(f.form.weight)
    seen = f"the loss of a batch is {wrong[0].whole:.6g}, and the mean over two parts of it {mean:.6g}"
    for text, weight in _candidates(f, wrong[0].parts[0]):
        if all(_reproduces(f, union, weight) for union in unions):
            raise InvalidValue(
                f"{seen}: the parts do not weigh what {_present(f)}; examples={text} gives the loss of all data"
            )
    crossing = sorted({type(m).__name__ for m in f.model.modules() if isinstance(m, CROSSING) and m.training})
    reason = f"{', '.join(crossing)} in training mode makes" if crossing else "model or loss make"
    unless = "" if crossing else " (unless batches of this form cannot be cut or joined like others)"
    return (
        f"{seen}: {reason} the examples of a batch depend on each other{unless}, so that the loss depends on how the"
        " data are divided into batches; it is the mean over these batches that is measured"
    )


def _present(f: _Objective) -> str:
    return "examples= says" if f.form.weigh else "the first dimension of a tensor says"


def _close(f: _Objective, found: float, wanted: float) -> bool:
    """Tell whether two losses are the same but for the rounding of sums."""
    return abs(found - wanted) <= torch.finfo(f.weights().dtype).eps ** 0.6 * max(abs(found), abs(wanted))


def _reproduces(f: _Objective, union: _Union, weight: Weight) -> bool:
    try:
        return _close(f, union.mean(weight), union.whole)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return False


def _unions(f: _Objective) -> Iterator[_Union]:
    """Put together halves of the first batch, the first two batches, and the first with the last."""
    raws: list[Any] = []
    with closing(f.batches()) as batches:
        for batch in batches:
            raws = [*raws[:2], batch.raw]
    yield from _halves(f, raws[0])
    for other in raws[1:]:
        yield from _joined(f, raws[0], other)


def _halves(f: _Objective, raw: Any) -> Iterator[_Union]:
    rows = f.form.size(raw)
    if rows > 1 and f.form.can_be_cut(raw):
        parts = f.form.cut(raw, slice(rows // 2)), f.form.cut(raw, slice(rows // 2, None))
        yield from _evaluated(f, parts, raw)


def _joined(f: _Objective, a: Any, b: Any) -> Iterator[_Union]:
    for axis in (0, 1):
        try:
            whole = _concatenated(a, b, axis)
        except (LookupError, RuntimeError, TypeError, ValueError):
            continue
        yield from _evaluated(f, (a, b), whole)
        return


def _evaluated(f: _Objective, parts: tuple[Any, Any], whole: Any) -> Iterator[_Union]:
    """Evaluate the losses, where the model takes batches of these sizes."""
    w = f.weights()
    try:
        first, second, union = (f.on([raw]).value(w).item() for raw in (*parts, whole))
    except Exception:  # whatever a model raises that wants batches of one size
        return
    if all(loss == loss and abs(loss) != float("inf") for loss in (first, second, union)):
        yield _Union(parts, (first, second), union)


def _concatenated(a: Any, b: Any, axis: int) -> Any:
    """Put two batches together along an axis; vectors hold one number for each example."""
    if isinstance(a, Tensor):
        return torch.cat([a, b], min(axis, a.dim() - 1)) if a.dim() > 0 else _equal(a, b)
    if isinstance(a, Mapping):
        return {key: _concatenated(item, b[key], axis) for key, item in a.items()}
    if type(a) in (list, tuple) or hasattr(a, "_make"):
        items = [_concatenated(x, y, axis) for x, y in zip(a, b, strict=True)]
        return type(a)(*items) if hasattr(a, "_make") else type(a)(items)
    return _equal(a, b)


def _equal(a: Any, b: Any) -> Any:
    if isinstance(a, str | int | float | Tensor | None) and bool(a == b):
        return a
    raise InvalidType(f"a {type(a).__name__} cannot be put together with another one")


def _candidates(f: _Objective, raw: Any) -> Iterator[tuple[str, Weight]]:
    """List weights that losses are divided by, with the text of each as a function."""
    ignored = getattr(f.loss, "ignore_index", -100)
    weight = getattr(f.loss, "weight", None)
    for path, get, leaf in _leaves(raw, "b", lambda b: b):
        for axis in range(min(leaf.dim(), 3)):
            yield f"lambda b: {path}.shape[{axis}]", _of(get, partial(_size, axis=axis))
        if not leaf.is_floating_point() and leaf.dim() > 0:
            for index in dict.fromkeys((ignored, 0)):
                yield f"lambda b: int(({path} != {index}).sum())", _of(get, partial(_differing, index=index))
            if leaf.dim() == 2:
                text = f"lambda b: int(({path}[:, 1:] != {ignored}).sum())"
                yield text, _of(get, lambda t: _differing(t[:, 1:], ignored))
            if isinstance(weight, Tensor) and weight.dim() == 1:
                yield (
                    f"lambda b: float(loss.weight[{path}].sum())",
                    _of(get, lambda t: float(_weights(weight, t, ignored))),
                )
        yield f"lambda b: float({path}.sum())", _of(get, lambda t: float(t.sum()))
    yield "lambda b: 1", lambda b: 1.0


def _item(get: Callable[[Any], Any], key: Any, b: Any) -> Any:
    return get(b)[key]


def _size(t: Tensor, axis: int) -> int:
    return t.shape[axis]


def _differing(t: Tensor, index: int) -> int:
    return int((t != index).sum())


def _weights(weight: Tensor, t: Tensor, ignored: int) -> Tensor:
    return weight[t[t != ignored]].sum()


def _of(get: Callable[[Any], Tensor], count: Callable[[Tensor], float]) -> Weight:
    def weight(raw: Any) -> float:
        found = count(get(raw))
        if not found > 0:
            raise InvalidValue("a weight is not positive")
        return found

    return weight


def _leaves(tree: Any, path: str, get: Callable[[Any], Any]) -> Iterator[tuple[str, Callable[[Any], Any], Tensor]]:
    """Find the tensors of a batch: the text that names each, a function that picks it, and the tensor."""
    if isinstance(tree, Tensor):
        yield path, get, tree
    elif isinstance(tree, Mapping | list | tuple):
        for key in tree if isinstance(tree, Mapping) else range(len(tree)):
            text = f"{path}[{key!r}]".replace("'", '"')
            yield from _leaves(tree[key], text, partial(_item, get, key))
