"""Train many independent runs as one computation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..autodiff.batched import BatchedRuns, GradientFunction
from ..autodiff.objective import Objective
from ..errors import InvalidType, InvalidValue
from .base import Number, State, UpdateRule

Step = Callable[[Tensor, Tensor, State], tuple[Tensor, State]]
"""Next weights and state of all runs from their weights ``(R, P)``, gradients and state, as `UpdateRule.step`."""

MAY_DIFFER = ("learning_rate", "weight_decay")
"""Fields in which the rules of runs side by side may differ."""


def noisy(gradients: GradientFunction, deviation: float | Tensor, seed: int) -> GradientFunction:
    """Add independent normal noise to gradients; `deviation` is one number or one for each run, ``(R, 1)``."""
    draws: dict[torch.device, torch.Generator] = {}

    def noise(W: Tensor, step: int) -> tuple[Tensor, Tensor]:
        draw = draws.setdefault(W.device, torch.Generator(W.device).manual_seed(seed))
        losses, g = gradients(W, step)
        return losses, g + deviation * torch.randn(g.shape, generator=draw, dtype=g.dtype, device=g.device)

    return noise


def on_batches(f: Objective, x: Tensor, y: Tensor, size: int, seed: int) -> GradientFunction:
    """Draw `size` examples anew at every step, without replacement within an epoch; all runs see the same ones."""
    draw = torch.Generator().manual_seed(seed)

    def epochs() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(len(x), generator=draw)[: len(x) // size * size].split(size)

    picks = epochs()

    def gradients(W: Tensor, step: int) -> tuple[Tensor, Tensor]:
        pick = next(picks)
        return BatchedRuns.of(f.on([(x[pick], y[pick])])).value_and_grad(W)

    return gradients


@dataclass(frozen=True)
class Descent:
    """The end of R runs: weights ``(R, P)``, and for each of them ``(R,)`` its loss, its steps, and how it ended."""

    weights: Tensor
    losses: Tensor
    steps: Tensor
    reached: Tensor  # it met the criterion `until`
    diverged: Tensor


def descend(
    gradients: GradientFunction,
    W: Tensor,
    rules: UpdateRule | Sequence[UpdateRule],
    steps: int,
    *,
    until: Callable[[Tensor], Tensor] | None = None,
    watch: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    limit: float = 1e6,
) -> Descent:
    """Take at most `steps` steps of R runs from `W` ``(R, P)``; a run that is done stays while others go on.

    Args:
        gradients: losses and gradients, such as `BatchedRuns.slope`, `on_batches` or `noisy`.
        rules: one for all, or one a run; these may differ in learning rate and weight decay.
        until: losses ``(R,)`` to booleans: which runs have arrived.
        watch: called with step t, W, losses and gradients at every iterate, before step t and after the last.
        limit: a run has diverged when its loss is not finite or its weights have grown by this factor (if not from 0).

    Raises:
        TypeError, ValueError: rules of several kinds, or a rule whose step mixes runs.
    """
    if not callable(gradients) or isinstance(gradients, nn.Module):
        raise InvalidType(
            f"this {type(gradients).__name__} gives no losses and gradients of several runs; pass a function of step"
            " and weights (R, P), such as BatchedRuns(losses).slope"
        )
    rule, step = (rules, rules.step) if isinstance(rules, UpdateRule) else (rules[0], stacked(rules, W))
    state = rule.init(W)
    first = W.norm(dim=1)
    max_norm = torch.where(first > 0, limit * first, torch.inf)
    ended = torch.zeros((3, len(W)), dtype=torch.bool, device=W.device)
    reached, diverged, done = ended.unbind()
    taken = torch.zeros(len(W), dtype=torch.long, device=W.device)
    for t in range(steps + 1):
        losses, g = gradients(W, t)
        lost = ~(losses.isfinite() & (W.norm(dim=1) <= max_norm))
        diverged |= lost & ~done
        if until is not None:
            reached |= until(losses) & ~lost & ~done
        done |= reached | diverged
        if watch is not None:
            watch(t, W, losses, g)
        if t == steps or bool(done.all()):
            break
        if t == 0:
            _check_rows(step, rules, W, g)
        new, state = step(W, g, state)
        W = torch.where(done[:, None], W, new)
        taken += ~done
    return Descent(W, losses, taken, reached, diverged)


def stacked(rules: Sequence[UpdateRule], W: Tensor) -> Step:
    """Step all runs at once, with learning rates and weight decays as columns ``(R, 1)`` where they differ."""
    first, *others = rules
    if len(rules) != len(W):
        raise InvalidValue(f"{len(rules)} rules for {len(W)} runs; give one rule, or one a run")
    if {type(rule) for rule in others} - {type(first)}:
        raise InvalidType(
            f"runs side by side need one kind of rule; got {', '.join(sorted({type(r).__name__ for r in rules}))}"
        )
    columns: dict[str, Number] = {}
    for name in vars(first):
        values = [getattr(r, name) for r in rules]
        if any(v != values[0] for v in values):
            if name not in MAY_DIFFER:
                raise InvalidValue(
                    f"{name} is {values}; runs side by side may differ in {' and '.join(MAY_DIFFER)} only"
                )
            columns[name] = torch.tensor(values, dtype=W.dtype, device=W.device)[:, None]
    if not columns:
        return first.step
    rates: dict[str, Number] = {name: getattr(first, name, 0.0) for name in MAY_DIFFER} | columns
    return lambda W, g, state: first.step_with(W, g, state, **rates)


def _check_rows(step: Step, rules: UpdateRule | Sequence[UpdateRule], W: Tensor, g: Tensor) -> None:
    """Raise InvalidValue unless the first and the last run step as they would alone."""
    for r in {0, len(W) - 1}:
        own = rules if isinstance(rules, UpdateRule) else rules[r]
        error = 1e3 * torch.finfo(W.dtype).eps * W[r].abs().max().item()
        try:
            alone, together = own.step(W[r], g[r], own.init(W[r]))[0], step(W, g, own.init(W))[0][r]
            same = torch.allclose(alone, together, rtol=0, atol=error, equal_nan=True)
        except RuntimeError:  # of shapes that do not fit
            same = False
        if not same:
            raise InvalidValue(
                f"a step of {type(own).__name__} mixes the runs: it reads a norm of all weights together"
            )
