"""Read the update rule, its state and its stability from a live torch optimizer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import InvalidType
from .base import Stability, State, UpdateRule, demand

WRAPPERS = {"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"}
"""Classes that hold an optimizer and take its steps; others, such as Lookahead, take steps of their own."""


def rule_of(optimizer: Optimizer) -> UpdateRule:
    """The update rule of a live torch optimizer, with its present hyper-parameters.

    Raises:
        TypeError: no subclass of UpdateRule reads this optimizer, or it has several parameter groups (`rules_of`).
        ValueError: its hyper-parameters make no rule, such as a learning rate of zero.
    """
    optimizer = unwrapped(optimizer)
    rules = {kind: rule for rule in _leaves(UpdateRule) for kind in _kinds(rule)}
    _require_optimizer(optimizer)
    kind = type(optimizer)
    if kind not in rules:
        known = ", ".join(sorted(k.__name__ for k in rules))
        inside = wrapped(optimizer)
        if inside is not optimizer:
            raise InvalidType(
                f"{kind.__name__} wraps {type(inside).__name__}, and how its steps differ from those is not known here;"
                " pass the optimizer inside to compare with its threshold, or a rule= for the whole"
            )
        raise InvalidType(f"no update rule for {kind.__name__}; subclass UpdateRule. Known: {known}")
    return rules[kind].read(optimizer)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that accelerate or Lightning handed out in a wrapper, which takes the same steps."""
    while type(optimizer).__name__ in WRAPPERS and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """Split an optimizer into one for each of its parameter groups; state and groups are shared."""
    _require_optimizer(optimizer)
    parts = []
    optimizer = unwrapped(optimizer)
    for group in optimizer.param_groups:
        part = object.__new__(type(optimizer))
        part.__dict__ = {**optimizer.__dict__, "param_groups": [group]}
        parts.append(part)
    return parts


def rules_of(optimizer: Optimizer) -> list[UpdateRule | None]:
    """The update rule of each parameter group; None for a group whose learning rate is zero, as in a warm-up.

    Raises:
        TypeError, ValueError: as `rule_of`.
    """
    return [rule_of(part) if float(part.param_groups[0]["lr"]) else None for part in parts_of(optimizer)]


def state_of(optimizer: Optimizer, parameters: Sequence[Tensor], rule: UpdateRule | None = None) -> State:
    """The state of `rule`, flat over `parameters` in their order; zero where no step was taken yet.

    The rule is ``rule_of(optimizer)`` by default; another one finds what it keeps by its `entries`.
    """
    rule = rule_of(optimizer) if rule is None else rule
    start = rule.init(torch.cat([flat(p) for p in parameters]))
    state = {}
    for name, first in start.items():
        kept = [optimizer.state.get(p, {}).get(rule.entries.get(name, name)) for p in parameters]
        if first.dim():
            parts = [torch.zeros_like(p) if k is None else k for p, k in zip(parameters, kept, strict=True)]
            state[name] = torch.cat([flat(part) for part in parts])
        else:
            counts = {float(k) for k in kept if k is not None} or {first.item()}
            demand(len(counts) == 1, f"the parameters differ in {name}, {sorted(counts)}: no one state describes them")
            state[name] = torch.full_like(first, counts.pop())
    return state


def stability_of(
    optimizer: Optimizer, parameters: Sequence[Tensor], rules: Sequence[UpdateRule | None] | None = None
) -> Stability | None:
    """Criterion for a live optimizer to be stable, over `parameters` in their order [N34]; None while nothing can move.

    One number each where all parameter groups agree on one, otherwise diagonals ``(P,)``.  Where groups differ in
    momentum or decay the criterion still is exact: it is the curvature at which weights and buffers change sign
    together.  `rules`, one for each group, are those of `rules_of` by default.

    Raises:
        TypeError, ValueError: as `rule_of`; parameters that the optimizer does not train.
    """
    owners: dict[int, tuple[Optimizer, UpdateRule | None]] = {}
    for part, rule in zip(parts_of(optimizer), rules_of(optimizer) if rules is None else rules, strict=True):
        owners |= {id(p): (part, rule) for p in part.param_groups[0]["params"]}
    untrained = sum(id(p) not in owners for p in parameters)
    demand(untrained == 0, f"the optimizer does not train {untrained} of the {len(parameters)} parameters")
    found = [_stability(*owners[id(p)], p) for p in parameters]  # one by one: they may differ in age
    kinds = {None if s is None or s.metric.dim() else (s.metric.item(), s.decay.item()) for s in found}
    if all(s is None for s in found) or (len(kinds) == 1 and None not in kinds):
        return found[0]
    moving = [UNMOVED if s is None else s for s in found]
    pairs = list(zip(moving, parameters, strict=True))
    return Stability(
        torch.cat([s.metric.to(flat(p)).expand(flat(p).numel()) for s, p in pairs]),
        torch.cat([s.decay.to(flat(p)).expand(flat(p).numel()) for s, p in pairs]),
    )


UNMOVED = Stability(torch.tensor(math.inf), torch.tensor(0.0))
"""Criterion of weights that do not move: every curvature is stable."""


def _stability(part: Optimizer, rule: UpdateRule | None, parameter: Tensor) -> Stability | None:
    return None if rule is None else rule.stability(state_of(part, [parameter], rule))


def flat(t: Tensor) -> Tensor:
    """Flatten a tensor, complex numbers into pairs of real ones, low precision into single."""
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t).reshape(-1)


def wrapped(optimizer: Optimizer) -> Optimizer:
    """Take an optimizer out of wrappers that let it step: itself where there is none."""
    for name in ("base_optimizer", "optimizer", "_optimizer", "inner_optimizer"):
        inside = getattr(optimizer, name, None)
        if isinstance(inside, Optimizer) and inside is not optimizer:
            return wrapped(inside)
    return optimizer


def _kinds(rule: type[UpdateRule]) -> tuple[type[Optimizer], ...]:
    return rule.reads if isinstance(rule.reads, tuple) else (rule.reads,) if rule.reads else ()


def _leaves(cls: type[Any]) -> list[type[UpdateRule]]:
    return [leaf for sub in cls.__subclasses__() for leaf in [sub, *_leaves(sub)]]


def _require_optimizer(optimizer: object) -> None:
    if not isinstance(optimizer, Optimizer):
        raise InvalidType(
            f"this {type(optimizer).__name__} is no torch optimizer, of which an update rule could be read"
        )
