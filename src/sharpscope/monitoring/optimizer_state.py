"""The rules, the setting and the stability of live optimizers, followed along a run.

P parameters.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.objective import Objective
from ..errors import InvalidValue
from ..measures.row import Setting, setting_of
from ..optimizers.base import Stability, UpdateRule
from ..optimizers.from_torch import number, rules_of, stability_of
from ..symmetry.scale_groups import ScaleGroups


class OptimizerState:
    """Follows the optimizers that train an objective together, one update rule for each of their parameter groups.

    The rules are read anew when a hyper-parameter has changed, so that schedules are followed; `fixed_rule` stands in
    for all of them.  Where one optimizer has no rule there is no criterion for the whole, and it is only observed.  The
    leading parameter group is the one that the columns of a row describe.

    Raises:
        ValueError: they do not train the objective's parameters.
    """

    def __init__(self, optimizers: Sequence[Optimizer], objective: Objective, fixed_rule: UpdateRule | None) -> None:
        _check_trains(optimizers, objective)
        self._optimizers = optimizers
        self._objective = objective
        self._fixed_rule = fixed_rule
        self._groups: ScaleGroups | None = None
        self._leading = 0
        self._rules: list[UpdateRule | None] = []
        self._observed: tuple[str, ...] = ()
        self._failed = False  # to find the criterion, the last time
        self._hyper_parameters: list[Any] | None = None  # those that `_rules` were read from
        self._refresh()

    @property
    def observed(self) -> tuple[str, ...]:
        """The names of the optimizers without a law of stability."""
        self._refresh()
        return tuple(type(o).__name__ for o in self._optimizers) if self._failed else self._observed

    @property
    def rules(self) -> list[UpdateRule | None]:
        """The rule of every parameter group at present; None where the learning rate is zero, or nothing is known."""
        self._refresh()
        return self._rules

    @property
    def rule(self) -> UpdateRule | None:
        """The rule of the leading parameter group at present."""
        return self.rules[self._leading]

    @property
    def descriptions(self) -> list[str]:
        """The rule of every parameter group in words; of one that has none at present, its optimizer."""
        kinds = [type(one).__name__ for one in self._optimizers for _ in one.param_groups]
        at_rest = [number(group.get("lr")) == 0 for group in self._param_groups()]
        words = [kind + ", at a learning rate of zero" * rest for kind, rest in zip(kinds, at_rest, strict=True)]
        return [word if rule is None else str(rule) for word, rule in zip(words, self.rules, strict=True)]

    @property
    def leading_group(self) -> dict[str, Any]:
        """The parameter group that the columns of a row describe."""
        return self._param_groups()[self._leading]

    @property
    def learning_rate(self) -> float | None:
        """The present learning rate of the leading parameter group, if it has one."""
        return number(self.leading_group.get("lr"))

    @property
    def decayed(self) -> set[str]:
        """The names of the parameters on which weight decay acts."""
        groups = [group for group in self._param_groups() if number(group.get("weight_decay"))]
        ids = {id(p) for group in groups for p in group["params"]}
        return {name for name, p in self._objective.parameters().items() if id(p) in ids}

    def use_groups(self, groups: ScaleGroups | None) -> None:
        """Choose the leading parameter group by these scale-invariant weights; the first one where they are unknown."""
        self._groups = groups
        self._leading = self._largest_group()

    def stability(self) -> Stability | None:
        """The stability of the optimizers at present; None as long as nothing can move, or nothing is known."""
        rules = self.rules
        if self._observed or untrained(self._optimizers, self._objective):
            return None
        try:
            found = stability_of(self._optimizers, self._parameters(), rules)
        except Exception as error:  # such as a subclass that keeps its state in a form of its own
            if not self._failed:
                warnings.warn(f"no criterion of stability was found: {type(error).__name__}: {error}", stacklevel=5)
            self._failed = True
            return None
        self._failed = False
        return found

    def setting(self) -> Setting:
        """The setting of the optimizers at present; right after a step it is that of the step."""
        stability, rule = self.stability(), self.rule
        owners = [(one, group) for one in self._optimizers for group in one.param_groups]
        return setting_of(*owners[self._leading], self._parameters(), rule, stability)

    def _parameters(self) -> list[Tensor]:
        return list(self._objective.parameters().values())

    def _param_groups(self) -> list[dict[str, Any]]:
        return [group for one in self._optimizers for group in one.param_groups]

    def _refresh(self) -> None:
        """Read the rules where a hyper-parameter has changed since they were read."""
        groups = self._param_groups()
        present = [_plain(v) for group in groups for name, v in group.items() if name != "params"]
        if present == self._hyper_parameters:
            return
        rules, observed, reason = self._read()
        if observed and not self._observed and self._hyper_parameters is not None:
            warnings.warn(f"the optimizer was set to what no rule describes: {reason}", stacklevel=5)
        self._rules, self._observed = [None] * len(groups) if observed else rules, observed
        self._leading = self._largest_group()
        self._hyper_parameters = present

    def _read(self) -> tuple[list[UpdateRule | None], tuple[str, ...], str]:
        """The rules of all parameter groups, the names of optimizers that have none, and a reason."""
        rules: list[UpdateRule | None] = []
        if self._fixed_rule is not None:
            return [self._fixed_rule] * len(self._param_groups()), (), ""
        trained = Counter(id(p) for group in self._param_groups() for p in group["params"])
        if max(trained.values()) > 1:
            return rules, tuple(type(o).__name__ for o in self._optimizers), "two of them train the same parameter"
        observed, reason = [], ""
        for optimizer in self._optimizers:
            try:
                rules += rules_of(optimizer)
            except Exception as error:  # a run is not stopped for being watched
                observed.append(type(optimizer).__name__)
                reason = str(error)
        return rules, tuple(observed), reason

    def _largest_group(self) -> int:
        """The parameter group that holds most of the scale-invariant weights, or of all where there are none."""
        groups = self._param_groups()
        if len(groups) == 1 or self._groups is None:
            return 0
        params = self._objective.parameters()
        slices = self._objective.slices
        joint = torch.zeros(self._objective.size, dtype=torch.bool)
        joint[self._groups.joint] = True
        weights = {id(params[name]): int(joint[s].sum()) for name, s in slices.items()}
        if not any(weights.values()):
            weights = {id(params[name]): s.stop - s.start for name, s in slices.items()}
        counts = [sum(weights.get(id(p), 0) for p in group["params"]) for group in groups]
        return counts.index(max(counts))


def _plain(value: Any) -> Any:
    """Turn a hyper-parameter into what can be compared."""
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else id(value)


def untrained(optimizers: Sequence[Optimizer], objective: Objective) -> list[str]:
    """Name the trainable parameters that none of the optimizers trains."""
    trained = set().union(*map(_trained, optimizers))
    return [name for name, p in objective.parameters().items() if id(p) not in trained]


def listed(names: Sequence[str]) -> str:
    """List the first of these names, and count the others."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "")


def _trained(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _check_trains(optimizers: Sequence[Optimizer], objective: Objective) -> None:
    """Raise InvalidValue unless the optimizers together train the objective's parameters, each of them some."""
    if idle := untrained(optimizers, objective):
        who = ", ".join(type(one).__name__ for one in optimizers)
        raise InvalidValue(
            f"the optimizer ({who}) does not train {listed(idle)}: pass the optimizer of this model, or if it has"
            " several, all of them as a list, Monitor(f, [first, second]); what none of them trains is left out of the"
            " objective by requires_grad_(False) before making it"
        )
    of_each = [_trained(one) for one in optimizers]
    own = {id(p) for p in objective.parameters().values()}
    strangers = [type(one).__name__ for one, ids in zip(optimizers, of_each, strict=True) if not ids & own]
    if strangers:
        raise InvalidValue(
            f"{', '.join(strangers)} trains none of the objective's parameters; leave it out of the list"
        )
    others = sum(id(p) in set().union(*of_each) for p in objective.captured)
    if others:
        raise InvalidValue(
            f"the optimizer also trains {others} parameters that the loss depends on and that belong neither to the"
            " model nor to a loss that is a module; make them part of one of these: Objective(model, loss_module, data)"
        )
