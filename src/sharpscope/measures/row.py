"""Columns of one measurement of a running training, from an iterate and the optimizer's setting.

`columns` says what each of them is.

P parameters.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.shards import gathered, is_sharded
from ..optimizers.base import PerWeight, Stability, UpdateRule
from ..optimizers.from_torch import number, state_of
from ..symmetry.scale_groups import ScaleGroups
from ..symmetry.sphere import angle
from . import measures
from .iterate import Iterate


@dataclass(frozen=True)
class Setting:
    """Setting of the optimizers at a step: their leading parameter group, and the stability of all of them.

    `learning_rate` is None where the group has none; `rate_at` is the effective learning rate at a radius, where steps
    have one length for all weights; `gradient` the norm of the gradient that was applied.
    """

    rule: UpdateRule | None
    stability: Stability | None
    learning_rate: float | None
    weight_decay: float
    rate_at: Callable[[float], float] | None
    gradient: float | None


def setting_of(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    rule: UpdateRule | None,
    stability: Stability | None,
) -> Setting:
    """Read the setting of live optimizers that train `parameters`; the leading `group` is one of `optimizer`."""
    gradient = applied_gradient(parameters)
    norm = None if gradient is None else gradient.item()
    rate, decay = number(group.get("lr")), number(group.get("weight_decay")) or 0.0
    if rule is None or stability is None or not stability.uniform or isinstance(rule, PerWeight):
        return Setting(rule, stability, rate, decay, None, norm)
    state = state_of(optimizer, group["params"][:1] or parameters[:1], rule)  # of one, since their ages may differ
    return Setting(rule, stability, rate, decay, partial(rule.effective_learning_rate, state=state), norm)


def applied_gradient(parameters: Iterable[Tensor]) -> Tensor | None:
    """Norm of the gradients that these parameters have now, as a scalar on their device; None where they have none.

    Where some are sharded over processes, all of these have to call this.
    """
    grads = [g.detach() for p in parameters if (g := p.grad) is not None and not g.is_sparse]
    kinds = ([g for g in grads if is_sharded(g) == sharded] for sharded in (False, True))
    norms = [gathered(torch.stack(torch._foreach_norm(some)).norm()) for some in kinds if some]
    return torch.stack(norms).norm() if norms[1:] else norms[0] if norms else None


def curvature(it: Iterate, at: Setting, row: dict[str, Any], *, plain: bool, sphere: bool) -> None:
    """Add to `row` the columns that need eigenvalues, as far as these are found.

    If not `plain`, or not `sphere`, that sharpness is left out where it needs a problem of its own.

    Raises:
        NotConverged, NotFinite: as `warm_started`; the columns found before are in the row.
    """
    if not it.objective.follows_gradient:
        row |= _of_jacobian(it, plain=plain)
        return
    if it.stability is not None:
        row["stability_ratio"] = measures.stability_ratio(it)
        if math.isfinite(error := it.effective_top.error) and row["stability_ratio"]:
            row["uncertainty"] = error / abs(row["stability_ratio"])
    groups, whole = it.scale_groups, it.scale_groups.covers(it.objective.size)
    uniform = it.stability is None or it.stability.uniform
    if plain or uniform:
        row |= {"sharpness": measures.sharpness(it), "residual": it.top.residuals[0].item()}
        row |= {f"sharpness{i}": v for i, v in enumerate(it.top.values[1:].tolist(), start=2)}
    if groups.joint.numel() > 0:
        row["radius"] = measures.radius(it)
        if sphere or (uniform and whole):
            row["spherical_sharpness"] = measures.spherical_sharpness(it)
            if at.rate_at is not None:
                row["eta_lambda"] = at.rate_at(row["radius"]) * row["spherical_sharpness"]
    row |= _by_group(it, at)


def _of_jacobian(it: Iterate, *, plain: bool) -> dict[str, float]:
    """Columns of a training with stopped gradients, whose Jacobian is not symmetric."""
    row: dict[str, float] = {}
    if plain or it.stability is None or it.stability.uniform:
        row |= {"sharpness": measures.sharpness(it), "residual": it.rightmost.residual}
    if it.stability is not None:
        row["stability_ratio"] = measures.stability_ratio(it)
    return row


def _by_group(it: Iterate, at: Setting) -> dict[str, float]:
    """Columns of each invariant group: its radius, fraction of the top eigenvector, rate and radial gradient.

    The last is ``-⟨w_g, ∇_g L⟩/(wd ‖w_g‖²)``, zero for exact invariance; at one it balances weight decay.
    """
    row: dict[str, float] = {}
    top = (it.effective_top if it.stability is not None else it.top).vectors[:, 0]
    for name, indices in it.scale_groups.groups.items():
        w, g = it.w[indices].double(), it.expansion.grad[indices].double()
        radius = w.norm().item()
        row |= {f"radius/{name}": radius, f"fraction/{name}": top[indices].double().square().sum().item()}
        if at.rate_at is not None and radius > 0:
            row[f"rate/{name}"] = at.rate_at(radius)
            if at.weight_decay > 0:
                row[f"radial/{name}"] = -(w @ g).item() / (at.weight_decay * radius**2)
    return row


def angles(groups: ScaleGroups, turned: tuple[Tensor, Tensor] | None) -> dict[str, float]:
    """Angle by which each group has turned between weights before and after a step, in radians."""
    if turned is None:
        return {}
    before, after = turned
    return {name: angle(before[i].double(), after[i].double()).item() for name, i in groups.groups.items()}


def alignment(it: Iterate, turned: tuple[Tensor, Tensor] | None) -> dict[str, float]:
    """Cosine between a step and the top eigenvector, of ∇²L where that was solved for, else in the steps' metric."""
    pairs = it.found.get("top", it.found.get("effective_top"))
    if turned is None or pairs is None or not pairs.vectors.numel():
        return {}
    vector, step = pairs.vectors[:, 0].double(), (turned[1] - turned[0]).double()
    if "top" not in it.found:
        vector = vector / it.criterion.metric.to(vector).sqrt()
    size = vector.norm() * step.norm()
    return {"alignment": (vector @ step).abs().div(size).item()} if size > 0 else {}
