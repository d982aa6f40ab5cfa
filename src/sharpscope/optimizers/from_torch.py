"""Read the update rule, its state and its stability from a live torch optimizer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.shards import gathered
from ..errors import InvalidType
from .base import Stability, State, UpdateRule, demand
from .declared import has_same_step, seen_as_known

WRAPPERS = {"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"}
"""Classes that hold an optimizer and take its steps; others, such as Lookahead, take steps of their own."""

INSIDE = (
    *("base_optimizer", "optimizer", "_optimizer", "inner_optimizer", "base", "optim", "original_optimizer"),
    *("wrapped_optimizer", "_inner_optimizer"),
)
"""Names under which wrappers keep the optimizer inside."""

FIXED_LENGTH = {"Lion", "Muon", "Rprop", "SignSGD", "Signum"}
"""Optimizers whose steps have one length whatever the gradient: on a quadratic they neither converge nor diverge."""


def rule_of(optimizer: Optimizer) -> UpdateRule:
    """The update rule of a live torch optimizer, with its present hyper-parameters.

    A subclass that inherits its ``step`` has the rule of its parent.  An optimizer that maximizes L descends -L: that
    is the loss whose gradients its rule takes.

    Raises:
        TypeError: no subclass of UpdateRule reads this optimizer, or it has several parameter groups (`rules_of`).
        ValueError: its hyper-parameters make no rule, such as a learning rate of zero.
    """
    _require_optimizer(optimizer)
    optimizer = seen_as_known(unwrapped(optimizer))
    return _reader(optimizer, _known()).read(optimizer)


def _known() -> dict[type[Optimizer], type[UpdateRule]]:
    """The rules there are at present, by the optimizers that they read."""
    return {kind: rule for rule in _leaves(UpdateRule) for kind in _kinds(rule)}


def _reader(optimizer: Optimizer, rules: Mapping[type[Optimizer], type[UpdateRule]]) -> type[UpdateRule]:
    """Find the kind of rule that reads an optimizer; raise InvalidType with the reason where there is none."""
    parent = next((kind for kind in type(optimizer).__mro__ if kind in rules), None)
    if parent is not None and (type(optimizer) is parent or has_same_step(type(optimizer), parent)):
        return rules[parent]
    name, inside = type(optimizer).__name__, wrapped(optimizer)
    if inside is not optimizer:
        raise InvalidType(
            f"{name} wraps {type(inside).__name__}, and how its steps differ from those is not known here;"
            " pass the optimizer inside to compare with its threshold, or a rule= for the whole"
        )
    if parent is not None:
        raise InvalidType(
            f"{name} has another step than {parent.__name__}: subclass UpdateRule for it or, if it does the same,"
            f" declare it by same_steps({name}, torch.optim.{parent.__name__})"
        )
    if name in FIXED_LENGTH:
        raise InvalidType(f"{name} has no law of stability: its steps have one length whatever the gradient")
    known = ", ".join(sorted(k.__name__ for k in rules))
    raise InvalidType(
        f"no update rule for {name}; subclass UpdateRule or, if its steps are those of a known one, declare it by"
        f" same_steps({name}, torch.optim.AdamW). Known: {known}"
    )


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that accelerate or Lightning handed out in a wrapper, which takes the same steps."""
    while WRAPPERS & {kind.__name__ for kind in type(optimizer).__mro__}:
        inside = getattr(optimizer, "optimizer", None)
        if not isinstance(inside, Optimizer):
            break
        optimizer = inside
    return optimizer


def optimizers_of(optimizer: Optimizer | Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    """One or several optimizers, out of wrappers that take the same steps.

    Raises:
        TypeError: there is none, or one is no torch optimizer.
    """
    several = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    for one in several or (None,):
        _require_optimizer(one)
    return tuple(map(unwrapped, several))


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """Split an optimizer into one for each of its parameter groups; state and groups are shared."""
    _require_optimizer(optimizer)
    parts = []
    optimizer = seen_as_known(unwrapped(optimizer))
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
    parts = parts_of(optimizer)
    reader = _reader(parts[0], _known())
    return [None if number(part.param_groups[0].get("lr")) == 0 else reader.read(part) for part in parts]


def number(value: Any) -> float | None:
    """Read a hyper-parameter that is a number or a tensor with one; None where there is none."""
    single = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    return float(value) if single else None


def state_of(optimizer: Optimizer, parameters: Sequence[Tensor], rule: UpdateRule | None = None) -> State:
    """The state of `rule`, flat over `parameters` in their order; zero where no step was taken yet.

    The rule is ``rule_of(optimizer)`` by default; another one finds what it keeps by its `entries`.
    """
    rule = rule_of(optimizer) if rule is None else rule
    start = rule.init(torch.cat([flat(p) for p in parameters]))
    entries = [rule.kept(optimizer.state.get(p, {}), p) for p in parameters]
    needed = start.keys() & rule.entries
    lacking = {rule.entries[name] for entry in entries if entry for name in needed - entry.keys()}
    demand(not lacking, f"this optimizer keeps no {', '.join(sorted(lacking))} of its parameters, which the rule needs")
    state = {}
    for name, first in start.items():
        kept = [entry.get(name) for entry in entries]
        if first.dim():
            parts = [torch.zeros_like(p) if k is None else k for p, k in zip(parameters, kept, strict=True)]
            state[name] = torch.cat([flat(part) for part in parts])
        else:
            counts = {float(k) for k in kept if k is not None} or {first.item()}
            demand(len(counts) == 1, f"the parameters differ in {name}, {sorted(counts)}: no one state describes them")
            state[name] = torch.full_like(first, counts.pop())
    return state


def stability_of(
    optimizer: Optimizer | Sequence[Optimizer],
    parameters: Sequence[Tensor],
    rules: Sequence[UpdateRule | None] | None = None,
) -> Stability | None:
    """Criterion for a live optimizer to be stable, over `parameters` in their order [N34]; None while nothing can move.

    One number each where all parameter groups agree on one, otherwise diagonals ``(P,)``.  Where groups differ in
    momentum or decay the criterion still is exact: it is the curvature at which weights and buffers change sign
    together.  Several optimizers may train the parameters together.  `rules`, one for each group, are those of
    `rules_of` by default.

    Raises:
        TypeError, ValueError: as `rule_of`; parameters that no optimizer trains; some that maximize, and some that do
            not.
    """
    optimizers = optimizers_of(optimizer)
    parts = [part for one in optimizers for part in parts_of(one)]
    rules = [rule for one in optimizers for rule in rules_of(one)] if rules is None else rules
    owners: dict[int, tuple[Optimizer, UpdateRule | None]] = {}
    for part, rule in zip(parts, rules, strict=True):
        owners |= {id(p): (part, rule) for p in part.param_groups[0]["params"]}
    untrained = sum(id(p) not in owners for p in parameters)
    demand(untrained == 0, f"the optimizer does not train {untrained} of the {len(parameters)} parameters")
    found = [_stability(*owners[id(p)], p) for p in parameters]  # one by one: they may differ in age
    kinds = {None if s is None or s.metric.dim() else (s.metric.item(), s.decay.item(), s.sign) for s in found}
    if all(s is None for s in found) or (len(kinds) == 1 and None not in kinds):
        return found[0]
    signs = {s.sign for s in found if s is not None}
    demand(
        len(signs) == 1, "some parameters are trained to maximize the loss and some to minimize it: no one criterion"
    )
    moving = [UNMOVED if s is None else s for s in found]
    pairs = [(s, flat(p)) for s, p in zip(moving, parameters, strict=True)]
    return Stability(
        torch.cat([s.metric.to(p).expand(p.numel()) for s, p in pairs]),
        torch.cat([s.decay.to(p).expand(p.numel()) for s, p in pairs]),
        signs.pop(),
    )


UNMOVED = Stability(torch.tensor(math.inf), torch.tensor(0.0))
"""Criterion of weights that do not move: every curvature is stable."""


def _stability(part: Optimizer, rule: UpdateRule | None, parameter: Tensor) -> Stability | None:
    found = None if rule is None else rule.stability(state_of(part, [parameter], rule))
    return replace(found, sign=-1) if found and part.param_groups[0].get("maximize") else found


def flat(t: Tensor) -> Tensor:
    """Flatten a tensor, complex numbers into pairs of real ones, low precision into single; gather a sharded one."""
    t = gathered(t)
    t = torch.view_as_real(t) if t.is_complex() else t
    return (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t).reshape(-1)


def wrapped(optimizer: Any) -> Any:
    """Take an optimizer out of wrappers that let it step: itself where there are none."""
    for name in INSIDE:
        inside = getattr(optimizer, name, None)
        if isinstance(inside, Optimizer) and inside is not optimizer:
            return wrapped(inside)
    return optimizer


def _kinds(rule: type[UpdateRule]) -> tuple[type[Optimizer], ...]:
    return rule.reads if isinstance(rule.reads, tuple) else (rule.reads,) if rule.reads else ()


def _leaves(cls: type[Any]) -> list[type[UpdateRule]]:
    return [leaf for sub in cls.__subclasses__() for leaf in [sub, *_leaves(sub)]]


def _require_optimizer(optimizer: object) -> None:
    """Raise InvalidType unless this is a torch optimizer, or wraps one and has its parameter groups."""
    inside = wrapped(optimizer) if hasattr(optimizer, "param_groups") else optimizer
    if not isinstance(inside, Optimizer):
        raise InvalidType(
            f"this {type(optimizer).__name__} is no torch optimizer, of which an update rule could be read"
        )
