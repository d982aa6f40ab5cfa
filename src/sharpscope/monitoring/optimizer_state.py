"""The rules, the setting and the stability of a live optimizer, followed along a run.

P parameters.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.objective import Objective
from ..errors import InvalidValue
from ..measures.row import Setting, setting_of
from ..optimizers.base import Stability, UpdateRule
from ..optimizers.from_torch import rules_of, stability_of
from ..symmetry.scale_groups import ScaleGroups


class OptimizerState:
    """Follows the optimizer that trains an objective, one update rule for each of its parameter groups.

    The rules are read anew when a hyper-parameter has changed, so that schedules are followed; `fixed_rule` stands in
    for all of them.  The leading parameter group is the one that the columns of a row describe.

    Raises:
        TypeError: no rule describes the optimizer.
        ValueError: it does not train the objective's parameters.
    """

    def __init__(self, optimizer: Optimizer, objective: Objective, fixed_rule: UpdateRule | None) -> None:
        _check_trains(optimizer, objective)
        self._optimizer = optimizer
        self._objective = objective
        self._fixed_rule = fixed_rule
        self._groups: ScaleGroups | None = None
        self._leading = 0
        self._rules: list[UpdateRule | None] = []
        self._hyper_parameters: list[Any] | None = None  # those that `_rules` were read from
        self._refresh()

    @property
    def rules(self) -> list[UpdateRule | None]:
        """The rule of every parameter group at present; None where the learning rate is zero."""
        self._refresh()
        return self._rules

    @property
    def rule(self) -> UpdateRule | None:
        """The rule of the leading parameter group at present."""
        return self.rules[self._leading]

    @property
    def leading_group(self) -> dict[str, Any]:
        """The parameter group that the columns of a row describe."""
        return self._optimizer.param_groups[self._leading]

    @property
    def learning_rate(self) -> float:
        """The present learning rate of the leading parameter group."""
        return float(self.leading_group["lr"])

    @property
    def decayed(self) -> set[str]:
        """The names of the parameters on which weight decay acts."""
        groups = [group for group in self._optimizer.param_groups if group.get("weight_decay")]
        ids = {id(p) for group in groups for p in group["params"]}
        return {name for name, p in self._objective.parameters().items() if id(p) in ids}

    def use_groups(self, groups: ScaleGroups | None) -> None:
        """Choose the leading parameter group by these scale-invariant weights; the first one where they are unknown."""
        self._groups = groups
        self._leading = self._largest_group()

    def stability(self) -> Stability | None:
        """The stability of the optimizer at present; None as long as nothing can move."""
        return stability_of(self._optimizer, self._parameters(), self.rules)

    def setting(self) -> Setting:
        """The setting of the optimizer at present; right after a step it is that of the step."""
        rules = self.rules
        return setting_of(self._optimizer, self._parameters(), rules[self._leading], rules, self._leading)

    def _parameters(self) -> list[Tensor]:
        return list(self._objective.parameters().values())

    def _refresh(self) -> None:
        """Read the rules where a hyper-parameter has changed since they were read."""
        groups = self._optimizer.param_groups
        present = [_plain(v) for group in groups for name, v in group.items() if name != "params"]
        if present == self._hyper_parameters:
            return
        fixed: list[UpdateRule | None] = [self._fixed_rule] * len(groups)
        try:
            self._rules = rules_of(self._optimizer) if self._fixed_rule is None else fixed
        except (TypeError, ValueError) as error:
            if not self._rules:
                raise
            warnings.warn(f"the optimizer was set to what no rule describes: {error}", stacklevel=5)
            self._rules = [None] * len(groups)  # a run is not stopped for being watched
        self._leading = self._largest_group()
        self._hyper_parameters = present

    def _largest_group(self) -> int:
        """The parameter group that holds most of the scale-invariant weights, or of all where there are none."""
        groups = self._optimizer.param_groups
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
    return value.item() if isinstance(value, Tensor) else value


def _check_trains(optimizer: Optimizer, objective: Objective) -> None:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    idle = [name for name, p in objective.parameters().items() if id(p) not in trained]
    if idle:
        raise InvalidValue(
            f"the optimizer does not train {', '.join(idle)}: pass the optimizer of this model, or freeze what is not"
            " trained by requires_grad_(False) before making the Objective"
        )
    others = sum(id(p) in trained for p in objective.captured)
    if others:
        raise InvalidValue(
            f"the optimizer also trains {others} parameters that the loss depends on and that belong neither to the"
            " model nor to a loss that is a module; make them part of one of these: Objective(model, loss_module, data)"
        )
