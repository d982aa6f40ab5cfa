"""Which weights the loss does not notice being rescaled: asked of the gradient, not of a table of layers.

A group g of weights is scale-invariant when ``L(.., c w_g, ..) = L(w)`` for every c > 0.  Then

    w_gᵀ ∇_g L(w) = 0             (Euler)
    ∇_g L(.., c w_g, ..) = ∇_g L(w) / c

The first is tested by the cosine ``|w_gᵀ∇_g| / (‖w_g‖ ‖∇_g‖)`` at perturbed weights, where the gradient is not small;
the second confirms it by rescaling all candidates at once, since in high dimension a small cosine may be chance.
Weights without any effect (a bias right before batch normalization) are *null*: they would enter the norm and are kept
apart.

P parameters, n of them in a group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .objective import Objective

Candidates = Callable[[Objective], dict[str, Tensor]]

EULER = 2e-3
"""Largest Euler cosine that counts as invariant.

With eps = 1e-5 and weights of ordinary size, invariant weights are seen at ≤ 1e-3.  Others are mostly above 1e-2, but
chance (in high dimension) and weak side branches (an embedding before a residual stream) bring some down to 3e-3.
"""


@dataclass(frozen=True)
class ScaleGroups:
    """What the loss is blind to.

    ``groups``: name -> indices ``(n,)`` into the flat vector of weights that are invariant on their own.  Gain and
    shift of a normalization are such a group (``bn.*``) where a rectifier and another normalization follow.
    ``defects``: name -> Euler cosine of every candidate, invariant or not (0 is exact invariance).
    ``null``: name -> indices of weights without any effect on the loss.
    ``joint``: indices of all weights that may be rescaled together, ``joint_defect`` their Euler cosine.
    """

    groups: Mapping[str, Tensor]
    defects: Mapping[str, float]
    null: Mapping[str, Tensor]
    joint: Tensor
    joint_defect: float

    def covers(self, size: int) -> bool:
        """True when every one of `size` parameters is in the joint group: the loss lives on one sphere."""
        return self.joint.numel() == size


def tensors(f: Objective) -> dict[str, Tensor]:
    """Each parameter tensor as a candidate."""
    return {name: torch.arange(s.start, s.stop) for name, s in f.slices.items()}


def rows(f: Objective) -> dict[str, Tensor]:
    """Each row (output unit or filter) of each tensor with two or more dimensions as a candidate."""
    return {
        f"{name}[{i}]": row
        for name, s in f.slices.items()
        if len(f.shapes[name]) > 1
        for i, row in enumerate(torch.arange(s.start, s.stop).view(f.shapes[name][0], -1))
    }


def pairs(f: Objective) -> dict[str, Tensor]:
    """All parameters of one module (weight and bias) as one candidate, where there are several."""
    members: dict[str, list[Tensor]] = {}
    for name, s in f.slices.items():
        members.setdefault(name.rpartition(".")[0], []).append(torch.arange(s.start, s.stop))
    return {f"{module}.*": torch.cat(parts) for module, parts in members.items() if len(parts) > 1}


def find_groups(f: Objective, w: Tensor | None = None, *, candidates: Candidates = tensors) -> ScaleGroups:
    """The scale-invariant groups of `f` near `w` (default: the model's weights), in about eight gradients.

    Tests each of `candidates` (`tensors` or `rows`), then (weight, bias) pairs of what is left, then all that is left
    together with the groups found.

    Raises:
        ValueError: the gradient there is not finite.
    """
    w = f.weights() if w is None else w
    points = [_perturbed(f, w, seed) for seed in (1, 2)]
    slopes = [f.grad(p) for p in points]
    if not all(bool(g.isfinite().all()) for g in slopes):
        raise ValueError("the gradient near these weights is not finite: nothing can be said about their invariance")
    null = _null(f, points, slopes)
    left = torch.ones(f.size, dtype=torch.bool)
    for indices in null.values():
        left[indices] = False
    groups: dict[str, Tensor] = {}
    defects: dict[str, float] = {}
    for kind in (candidates, pairs):
        found = {name: i for name, i in kind(f).items() if bool(left[i].all())}
        cosines = {name: _euler(points, slopes, i) for name, i in found.items()}
        held = {name: i for name, i in found.items() if cosines[name] <= EULER}
        held = _confirmed(f, points[0], slopes[0], held)
        groups |= held
        defects |= cosines if kind is candidates else {name: cosines[name] for name in held}
        for indices in held.values():
            left[indices] = False
    everything = torch.ones(f.size, dtype=torch.bool)
    for indices in null.values():
        everything[indices] = False
    joint = _union(list(groups.values()))
    rest = everything.nonzero().flatten()
    if bool(left.any()) and _euler(points, slopes, rest) <= EULER and _confirmed(f, points[0], slopes[0], {"": rest}):
        joint = rest
    return ScaleGroups(groups, defects, null, joint, _euler(points, slopes, joint) if joint.numel() else 1.0)


def _perturbed(f: Objective, w: Tensor, seed: int) -> Tensor:
    """w plus noise of a tenth of each tensor's size, so that no gradient is zero by accident."""
    noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(w)
    out = w.clone()
    for s in f.slices.values():
        size = w[s].square().mean().sqrt()
        out[s] += 0.1 * torch.where(size > 0, size, torch.ones_like(size)) * noise[s]
    return out


def _euler(points: list[Tensor], slopes: list[Tensor], indices: Tensor) -> float:
    """Largest ``|w_gᵀ∇_g| / (‖w_g‖‖∇_g‖)`` over the points; 1 where a gradient vanishes."""
    worst = 0.0
    for w, g in zip(points, slopes, strict=True):
        w_g, g_g = w[indices].double(), g[indices].double()
        size = (w_g.norm() * g_g.norm()).item()
        worst = max(worst, abs((w_g @ g_g).item()) / size if size > 0 else 1.0)
    return worst


def _confirmed(f: Objective, w: Tensor, g: Tensor, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the candidates, those whose gradient turns into ``∇_g/c_g`` when every one is rescaled by its own c_g.

    A wrong candidate spoils the others' gradients, so a set that fails is halved: k wrong ones among n cost about
    2 k log₂ n gradients.
    """
    if not held:
        return held
    factors = torch.rand(len(held), generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1.25
    scale = torch.ones_like(w)
    for c, indices in zip(factors.tolist(), held.values(), strict=True):
        scale[indices] = c
    change = scale * f.grad(scale * w) - g
    if all((change[i].norm() <= 0.1 * g[i].norm()).item() for i in held.values()):
        return held
    if len(held) == 1:
        return {}
    names, half = list(held), len(held) // 2
    first, second = ({name: held[name] for name in part} for part in (names[:half], names[half:]))
    return _confirmed(f, w, g, first) | _confirmed(f, w, g, second)


def _null(f: Objective, points: list[Tensor], slopes: list[Tensor]) -> dict[str, Tensor]:
    """Tensors with a gradient at rounding level that leave the loss as it is when they are moved."""
    out = {}
    for name, indices in tensors(f).items():
        typical = max(g.square().mean().sqrt().item() for g in slopes)
        if max(g[indices].square().mean().sqrt().item() for g in slopes) > 1e-5 * typical:
            continue
        moved = points[0].clone()
        moved[indices] += 1.0
        before, after = f.value(points[0]).item(), f.value(moved).item()
        if abs(after - before) <= 1e-5 * abs(before):
            out[name] = indices
    return out


def _union(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).sort().values if parts else torch.empty(0, dtype=torch.long)
