"""Remove or freeze the parameters that break scale invariance, and report each change.

Parameters whose scale the loss depends on (shifts, gains, readouts, biases that meet no normalization) keep the weights
from living on one sphere; those without any effect (biases right before batch normalization) only add to their norm.
`find_groups` tells them apart from the gradient, before and after every cut.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..autodiff.objective import Objective
from ..autodiff.whole import Loss
from ..errors import InvalidType, InvalidValue
from .scale_groups import ScaleGroups, find_groups


def make_scale_invariant(
    model: nn.Module | Objective, loss: Loss | None = None, data: Iterable[Any] | None = None
) -> tuple[nn.Module, list[str]]:
    """Copy `model` so that its trainable weights are scale-invariant together; every change is reported in a sentence.

    First parameters without effect are removed; then biases, gains and shifts that are not invariant (without them a
    module works as with zeros or ones; where it does not, they are frozen as they are); then other tensors, such as
    the readout, are frozen as they are.  `model` is left alone.  It comes with its `loss` and `data`, since gradients
    are needed, or as an `Objective`.

    Raises:
        TypeError: a model without loss or data.
        ValueError: no weights are scale-invariant, also without biases; or what is left is not one sphere.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    >>> data = [(torch.randn(16, 4), torch.randn(16, 1))]
    >>> invariant, report = make_scale_invariant(net, nn.functional.mse_loss, data)
    >>> [name for name, p in invariant.named_parameters() if p.requires_grad]
    ['0.weight', '0.bias']
    >>> [sentence.split(":")[0] for sentence in report[:-1]]
    ['Removed 1.weight', 'Removed 1.bias', 'Froze 3.weight', 'Removed 3.bias']
    """
    f, changes = _copied(model, loss, data), list[str]()
    for cut in (_without_null, _without_vectors, _with_the_rest_frozen):
        groups = find_groups(f)
        f = cut(f, groups, changes)
    groups = find_groups(f)
    if not groups.covers(f.size):
        raise InvalidValue(
            f"what is left does not live on one sphere: {_closest_to_invariant(groups)}; add normalization first"
        )
    return f.model, [*changes, *(line for line in str(groups).splitlines() if "rescaled together" in line)]


def _copied(model: nn.Module | Objective, loss: Loss | None, data: Iterable[Any] | None) -> Objective:
    if isinstance(model, Objective):
        return _rebuilt(model, copy.deepcopy(model.model))
    if loss is None or data is None:
        raise InvalidType(
            "which weights are scale-invariant depends on loss and data: make_scale_invariant(model, loss, data) or"
            " make_scale_invariant(Objective(model, loss, data))"
        )
    return Objective(copy.deepcopy(model), loss, data)


def _rebuilt(f: Objective, model: nn.Module) -> Objective:
    """Make the objective anew, for a model whose parameters have changed in number."""
    return Objective(
        model,
        f.loss,
        f.data,
        batch=f.form.split,
        examples=f.form.weigh,
        memory_budget=f.memory_budget,
        without_dropout=not f.dropout,
        group=f.group,
    )


def _without_null(f: Objective, groups: ScaleGroups, changes: list[str]) -> Objective:
    for name in [name for name in groups.null if name in f.slices]:
        f = _removed(f, name, "it has no effect on the loss", changes)
    return f


def _without_vectors(f: Objective, groups: ScaleGroups, changes: list[str]) -> Objective:
    """Remove biases, gains, shifts and factors (tensors with one long axis) that have no part in the joint group."""
    for name, outside in _not_invariant(f, groups).items():
        if len(outside) == f.shapes[name].numel() == max(f.shapes[name], default=1):
            f = _removed(f, name, _reason(name, groups), changes)
    return f


def _with_the_rest_frozen(f: Objective, groups: ScaleGroups, changes: list[str]) -> Objective:
    if not groups.groups:
        raise InvalidValue(f"no weights are scale-invariant: {_closest_to_invariant(groups)}; add normalization first")
    for name, outside in _not_invariant(f, groups).items():
        if len(outside) == f.shapes[name].numel():
            f = _frozen(f, name, _reason(name, groups), changes)
        else:
            f = _frozen_in_part(f, name, outside, changes)
    return f


def _not_invariant(f: Objective, groups: ScaleGroups) -> dict[str, Tensor]:
    """Find the tensors of which not all is in the joint group, and which of their entries are not."""
    inside = torch.zeros(f.size, dtype=torch.bool)
    inside[groups.joint] = True
    outside = {name: (~inside[s]).nonzero().flatten() for name, s in f.slices.items()}
    return {name: entries for name, entries in outside.items() if len(entries)}


def _reason(name: str, groups: ScaleGroups) -> str:
    if name not in groups.defects:
        return "it has no effect on the loss"
    return f"the loss depends on its scale (Euler cosine {groups.defects[name]:.2g})"


def _closest_to_invariant(groups: ScaleGroups) -> str:
    outside = {name: defect for name, defect in groups.defects.items() if name not in groups.groups}
    name, defect = min(outside.items(), key=lambda item: item[1], default=("", 1.0))
    return f"the least Euler cosine of what is not invariant is {defect:.2g} ({name})"


def _removed(f: Objective, name: str, reason: str, changes: list[str]) -> Objective:
    """Remove the parameter, or freeze it where its module does not work without."""
    parameter = f.model.get_parameter(name)
    owners = [(m, leaf) for m in f.model.modules() for leaf, p in m._parameters.items() if p is parameter]
    for module, leaf in owners:
        setattr(module, leaf, None)
    try:
        smaller = _rebuilt(f, f.model)
    except Exception:  # whatever a module raises that does not work without it
        for module, leaf in owners:
            setattr(module, leaf, parameter)
        return _frozen(f, name, reason, changes)
    changes.append(f"Removed {name}: {reason}.")
    return smaller


def _frozen(f: Objective, name: str, reason: str, changes: list[str]) -> Objective:
    parameter = f.model.get_parameter(name).requires_grad_(False)
    changes.append(f"Froze {name}: {reason}; its norm stays {parameter.detach().norm().item():.3g}.")
    return _rebuilt(f, f.model)


class _Filled(nn.Module):
    """Parametrize a tensor whose entries `rest` are fixed; the others are the parameter."""

    fixed: Tensor
    moving: Tensor

    def __init__(self, whole: Tensor, rest: Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed", whole.detach().clone())
        moving = torch.ones(whole.numel(), dtype=torch.bool, device=whole.device)
        moving[rest] = False
        self.register_buffer("moving", moving.view(whole.shape))

    def forward(self, entries: Tensor) -> Tensor:
        return self.fixed.masked_scatter(self.moving, entries)

    def right_inverse(self, whole: Tensor) -> Tensor:
        return whole[self.moving]


def _frozen_in_part(f: Objective, name: str, rest: Tensor, changes: list[str]) -> Objective:
    """Fix the entries `rest` of the parameter; the others become a vector, ``parametrizations.*.original``."""
    module_name, _, leaf = name.rpartition(".")
    module, parameter = f.model.get_submodule(module_name), f.model.get_parameter(name)
    parametrize.register_parametrization(module, leaf, _Filled(parameter, rest), unsafe=True)
    changes.append(
        f"Froze part of {name}: {len(rest)} of {f.shapes[name].numel()} entries; only the others are invariant."
    )
    return _rebuilt(f, f.model)
