"""Optimizers of others that take the steps of one of torch's: fused, 8-bit and rewritten ones.

Whoever declares two classes to take the same steps lets the second one's rule be read from the first, everywhere.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InvalidType, InvalidValue

_known_as: dict[type[Optimizer], Optimizer] = {}
"""For each class that was declared, an optimizer of the one whose steps it takes, with the defaults of that."""

TRIED_STEPS = 5
"""Steps that both optimizers take from one point with the same gradients, where the declaration is tried."""

MAX_DIFFERENCE = 1e-3
"""Largest difference of the weights after these, relative to how far they have come."""


def same_steps(kind: type[Optimizer], known: type[Optimizer], *, check: bool = True) -> None:
    """Declare that optimizers of class `kind` take the steps of `known`, so that rules are read from them.

    Hyper-parameters are read from the groups of the optimizer under the names that `known` has for them, its defaults
    where there are none; the state under its names, too, in any floating point precision.

    Args:
        kind: a class of optimizers, such as a fused AdamW.
        known: one of torch's whose rule is known.
        check: whether both take five steps with the same gradients, and are compared.

    Raises:
        InvalidType: these are no classes of optimizers.
        InvalidValue: the steps differ, or could not be taken.

    >>> class FusedAdam(torch.optim.AdamW):
    ...     def step(self, closure=None):
    ...         return super().step(closure)
    >>> same_steps(FusedAdam, torch.optim.AdamW)
    """
    for given in (kind, known):
        if not (isinstance(given, type) and issubclass(given, Optimizer)):
            raise InvalidType(f"{given!r} is no class of optimizers; pass two, such as (FusedAdam, torch.optim.AdamW)")
    if check:
        _compare(kind, known)
    _known_as[kind] = _made(known, [nn.Parameter(torch.zeros(1))], {})


def seen_as_known(optimizer: Optimizer) -> Optimizer:
    """View an optimizer as one of the class whose steps it takes, where that was declared."""
    own = type(optimizer)
    kind = next((k for k in own.__mro__ if k in _known_as and has_same_step(own, k)), None)
    if kind is None:
        return optimizer
    known = _known_as[kind]
    view = object.__new__(type(known))
    groups = [{**known.defaults, **group} for group in optimizer.param_groups]
    steps = {id(p): group.get("step") for group in optimizer.param_groups for p in group["params"]}
    state = {p: _entry(kind, entry, steps.get(id(p))) for p, entry in optimizer.state.items()}
    view.__dict__ = {**optimizer.__dict__, "param_groups": groups, "state": state}
    return view


def has_same_step(kind: type[Optimizer], parent: type[Optimizer]) -> bool:
    """Say whether a class inherits ``step``, whatever torch has wrapped around it."""
    return inspect.unwrap(kind.step) is inspect.unwrap(parent.step)


def _entry(kind: type[Optimizer], entry: dict[str, Any], step: Any) -> dict[str, Any]:
    """Complete what an optimizer keeps of a parameter by the count of its group; refuse numbers in a code."""
    coded = [n for n, t in entry.items() if isinstance(t, Tensor) and t.dim() and not t.is_floating_point()]
    if coded:
        raise InvalidType(f"{kind.__name__} keeps {', '.join(coded)} in a code of its own, which is not read here")
    return entry if step is None or "step" in entry else {**entry, "step": torch.tensor(float(step))}


def _compare(kind: type[Optimizer], known: type[Optimizer]) -> None:
    """Raise InvalidValue unless both take the same steps."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 4), (5,))]
    gradients = [[torch.randn(t.shape, generator=generator) for t in start] for _ in range(TRIED_STEPS)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    both = {"lr": 0.01, "weight_decay": 0.1}.items()
    common = {name: value for name, value in both if all(_takes(one, name) for one in (kind, known))}
    ends = []
    for one in (kind, known):
        parameters = [nn.Parameter(t.to(device, copy=True)) for t in start]
        try:
            optimizer = _made(one, parameters, common)
            for gs in gradients:
                for p, g in zip(parameters, gs, strict=True):
                    p.grad = g.to(device, copy=True)
                optimizer.step()
        except Exception as error:  # whatever classes of others raise
            raise InvalidValue(
                f"{one.__name__} could not be tried: {type(error).__name__}: {error}; check=False declares it untried"
            ) from error
        ends.append(torch.cat([p.detach().cpu().double().reshape(-1) for p in parameters]))
    path = ends[1] - torch.cat([t.double().reshape(-1) for t in start])
    difference = float((ends[0] - ends[1]).norm() / path.norm())
    if not difference <= MAX_DIFFERENCE:
        raise InvalidValue(
            f"{kind.__name__} does not take the steps of {known.__name__}: after {TRIED_STEPS} of them, with"
            f" {', '.join(f'{n}={v}' for n, v in common.items())} and defaults, the weights differ by {difference:.2g}"
            " of their path"
        )


def _takes(kind: type[Optimizer], name: str) -> bool:
    return name in inspect.signature(kind).parameters


def _made(kind: type[Optimizer], parameters: list[nn.Parameter], common: dict[str, float]) -> Optimizer:
    make: Any = kind
    made: Optimizer = make(parameters, **({"lr": 0.01} if _takes(kind, "lr") else {}) | common)
    return made
