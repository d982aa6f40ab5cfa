"""Which weights the loss does not notice being rescaled: asked of the gradient, not of a table of layers.

A group g of weights is scale-invariant when ``L(.., c w_g, ..) = L(w)`` for every c > 0.  Then

    w_gᵀ ∇_g L(w) = 0             (Euler)
    ∇_g L(.., c w_g, ..) = ∇_g L(w) / c

Both are asked of the function near the weights, in double precision, at perturbed weights that are raised to ordinary
size where they are small.  An eps in a normalization leaves an Euler cosine ``|w_gᵀ∇_g| / (‖w_g‖ ‖∇_g‖)`` that falls
like 1/c² when w_g is multiplied by c; a side branch leaves one that falls like 1/c, chance one that does not fall.  So
the verdict does not depend on the size of the weights.  What eps does at the weights as they are is the *defect*.

Weights without any effect (a bias right before batch normalization) are *null*: they would enter the norm and are kept
apart.  Where no tensor or module is invariant alone, parts of it or several together may be: `symmetries` finds them.

P parameters, n of them in a group.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..autodiff.data import Batch
from ..autodiff.objective import Objective
from ..errors import InvalidValue
from .relations import Sample, Sums, blocks, euler, joint_groups, rescaled_pairs, row_sums

Candidates = Callable[[Objective], dict[str, Tensor]]

EULER = 2e-3
"""Largest Euler cosine at the weights themselves at which numbers on the sphere may be believed: eps is felt above."""

NEAR = 2e-2
"""Largest Euler cosine, at weights of ordinary size, of a candidate that is tried at larger weights."""

RAISE = 300.0
"""Factor, give or take a half, at which the Euler cosine must have fallen like 1/c²."""

SAME = 0.5
"""Largest relative change of ``c ∇_g`` there.  Single examples may have a variance near eps."""

DOUBLE, SINGLE = (1e-10, 1e-12), (3e-5, 1e-5)
"""Euler cosines, and gradients against the typical one, that are rounding."""


@dataclass(frozen=True)
class ScaleGroups:
    """What the loss is blind to.

    ``groups``: name -> indices ``(n,)`` into the flat vector of weights that are invariant on their own, but for an
    eps.  Gain and shift of a normalization are such a group (``bn.*``) where a rectifier and another normalization
    follow; what writes to a residual stream that is normalized wherever it is read is one too (named by its tensors).
    ``defects``: name -> Euler cosine at the weights of every tensor and every group (0 is exact invariance).  In a
    group it measures eps against the variance.
    ``null``: name -> indices of weights without any effect on the loss.
    ``joint``: indices of all weights that may be rescaled together, ``joint_defect`` their Euler cosine.
    ``pairs``: ``"a -> b"`` -> defect of what may be rescaled by c and 1/c (positive homogeneity).
    ``num_gradients``: what the answer cost, gradients of the first batch alone included.
    """

    groups: Mapping[str, Tensor]
    defects: Mapping[str, float]
    null: Mapping[str, Tensor]
    joint: Tensor
    joint_defect: float
    pairs: Mapping[str, float] = field(default_factory=dict)
    num_gradients: int = 0

    def covers(self, size: int) -> bool:
        """True when every one of `size` parameters is in the joint group: the loss lives on one sphere."""
        return self.joint.numel() == size

    @property
    def broken(self) -> list[str]:
        """Groups whose invariance eps breaks at these weights (defect above `EULER`); larger weights restore it."""
        return [name for name in self.groups if self.defects[name] > EULER]

    def __str__(self) -> str:
        cosine = f" (Euler cosine {self.joint_defect:.1e})" if self.joint.numel() else ""
        lines = [f"{self.joint.numel()} weights may be rescaled together{cosine}."]
        lines += [f"{name} ({i.numel()}) is invariant, to {self.defects[name]:.1e}." for name, i in self.groups.items()]
        lines += [
            f"{name} has met an eps: its Euler cosine is {self.defects[name]:.2g} here, and less at larger weights."
            for name in self.broken
        ]
        lines += [f"{name} ({i.numel()}) has no effect on the loss." for name, i in self.null.items()]
        lines += [f"{name} by c and 1/c changes nothing, to {defect:.1e}." for name, defect in self.pairs.items()]
        return "\n".join(lines)


def tensors(f: Objective) -> dict[str, Tensor]:
    """Each parameter tensor as a candidate."""
    return {name: torch.arange(s.start, s.stop) for name, s in f.slices.items()}


def rows(f: Objective) -> dict[str, Tensor]:
    """Each row (output unit or filter) of each tensor with two or more dimensions as a candidate."""
    return {
        f"{name}[{i}]": row
        for name, indices in tensors(f).items()
        if len(f.shapes[name]) > 1
        for i, row in enumerate(indices.view(f.shapes[name][0], -1))
    }


def columns(f: Objective) -> dict[str, Tensor]:
    """Each column (the second dimension) of each tensor with two or more dimensions as a candidate."""
    return {
        f"{name}[:, {j}]": column
        for name, indices in tensors(f).items()
        if len(f.shapes[name]) > 1
        for j, column in enumerate(indices.view(f.shapes[name]).transpose(0, 1).flatten(1))
    }


def find_groups(f: Objective, w: Tensor | None = None, *, candidates: Candidates | None = None) -> ScaleGroups:
    """The scale-invariant groups of `f` near `w` (default: the model's weights).

    Tests each tensor, then (weight, bias) pairs of what is left, then blocks of rows or columns, then sums of tensors.
    With `candidates` (`rows`, `columns`) tests these, then pairs, then all that is left together with the groups.
    Costs three gradients where every tensor is invariant; else about ten, and one of the first batch for each that is
    not.

    Raises:
        ValueError: the gradient there is not finite.
    """
    w = f.weights() if w is None else w
    hunt = _Hunt(f, w)
    pairs: dict[str, float] = {}
    hunt.take((candidates or tensors)(f))
    hunt.take(_together(f, hunt.left))
    if candidates is None and bool(hunt.left.any()):
        grids, wide = _grids(f, hunt.left), _wide_grids(f, hunt.left)
        seen, single = hunt.measured({**grids, **wide, **_units(f, hunt.left)}), len(hunt.groups)
        hunt.take(blocks(grids, seen))
        hunt.take(blocks(wide, seen))
        if len(hunt.groups) > single:
            seen = hunt.measured(_units(f, hunt.left))
        parts = _parts(f, hunt.left)
        pairs, spare = rescaled_pairs(parts, _together(f, hunt.left) | _thirds(f, hunt.left), seen)
        hunt.take(joint_groups({name: i for name, i in parts.items() if name not in spare}, seen))
    joint = torch.cat([torch.empty(0, dtype=torch.long), *hunt.groups.values()]).sort().values
    if candidates is not None and bool(hunt.left.any()):
        joint = hunt.confirmed({"": hunt.effective.nonzero().flatten()}).get("", joint)
    here = hunt.here()
    tested = tensors(f) if candidates is None else candidates(f)
    defects = {name: euler(here, i) for name, i in (tested | hunt.groups).items() if name not in hunt.null}
    joint_defect = euler(here, joint) if joint.numel() else 1.0
    return ScaleGroups(hunt.groups, defects, hunt.null, joint, joint_defect, pairs, hunt.count)


class _Hunt:
    """Gradients of one objective and what they have shown so far: `groups`, `null`, and which weights are `left`."""

    def __init__(self, f: Objective, w: Tensor) -> None:
        self.asked, self.f, self.count = f, _in_double(f, w), 0
        self.w = w.double() if self.f is not f else w
        self.start = _raised(f, self.w)
        self.base = [self._sample(_moved(f, self.start, 0.1, seed)) for seed in (1, 2)]
        if not all(bool(s.g.isfinite().all()) for s in self.base):
            raise InvalidValue("the gradient near these weights is not finite: no telling what they are invariant to")
        self.floor, self.zero = DOUBLE if self._is_double() else SINGLE
        self.null = self._null()
        self.effective = torch.ones(f.size, dtype=torch.bool)
        for indices in self.null.values():
            self.effective[indices] = False
        self.left = self.effective.clone()
        self.groups: dict[str, Tensor] = {}

    def take(self, candidates: Mapping[str, Tensor]) -> None:
        """Add those of the candidates, as far as they are left, that are invariant."""
        candidates = _left(candidates, self.left)
        found = self.confirmed({name: i for name, i in candidates.items() if euler(self.base, i) <= NEAR})
        self.groups |= found
        for indices in found.values():
            self.left[indices] = False

    def confirmed(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the candidates that stand the test from both base points, or one where the first leaves no doubt."""
        found = self._confirmed(held, self.base[0])
        exact = {n: i for n, i in found.items() if euler(self.base, i) <= self.floor}
        again = self._confirmed({n: i for n, i in found.items() if n not in exact}, self.base[1])
        return {n: i for n, i in found.items() if n in exact or n in again}

    def _confirmed(self, held: Mapping[str, Tensor], before: Sample) -> dict[str, Tensor]:
        """Those of the candidates whose Euler cosine falls like 1/c² when each is rescaled by its own c.

        What does not is dropped, the clearest cases first, since they change the gradients of the others.  Candidates
        with the same Euler product (layers that act as one) are rescaled in turns: together they fall twice as fast.
        At the end ``c ∇_g`` must be what it was; a set in which it is not is halved.
        """
        held, turn, last = dict(held), 0, 0
        while held and turn <= last:
            turns = self._turns(held)
            scale, c = self._factors({name: i for name, i in held.items() if turns[name] == turn})
            after = self._sample(scale * before.w)
            slow = self._slow({name: held[name] for name in c}, c, before, after)
            if slow:
                held, turn, last = {n: i for n, i in held.items() if n not in slow}, 0, 0
            elif _same(held, scale, before, after):
                turn, last = turn + 1, max(turns.values())
            else:
                names, half = list(held), len(held) // 2
                parts = (names[:half], names[half:]) if half else ()
                return {n: i for part in parts for n, i in self._confirmed({n: held[n] for n in part}, before).items()}
        return held

    def _slow(self, held: Mapping[str, Tensor], c: Mapping[str, float], before: Sample, after: Sample) -> list[str]:
        """Those of the rescaled whose cosine does not fall; if all do, those where it falls like 1/c, alone or by eps.

        A gradient that has vanished (in what another has saturated) says nothing.
        """
        alive = {n: i for n, i in held.items() if bool(c[n] * after.g[i].norm() > 1e-6 * before.g[i].norm())}
        bounds: tuple[Callable[[Tensor, float], float], ...] = (
            lambda i, c: euler(self.base, i) * c**-0.5,
            lambda i, c: euler([before], i) * c**-1.5,
            lambda i, c: euler([before], i) * c**-2 * 10,
        )
        for bound in bounds:
            slow = [n for n, i in alive.items() if euler([after], i) > max(self.floor, bound(i, c[n]))]
            if slow:
                return slow
        return []

    def _factors(self, held: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """A factor for each of the candidates, and for each of the weights ``(P,)``."""
        random = torch.rand(len(held), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        factors = dict(zip(held, (RAISE * (0.5 + random)).tolist(), strict=True))
        scale = torch.ones_like(self.w)
        for name, indices in held.items():
            scale[indices] = factors[name]
        return scale, factors

    def _turns(self, held: Mapping[str, Tensor]) -> dict[str, int]:
        """How many candidates before each one have the same Euler product."""
        products = {n: torch.stack([s.w[i].double() @ s.g[i].double() for s in self.base]) for n, i in held.items()}
        exact = {n for n, i in held.items() if euler(self.base, i) <= self.floor}
        turns: dict[str, int] = {}
        for name, e in products.items():
            before = [] if name in exact else [n for n in turns if n not in exact]
            turns[name] = sum(bool(((products[n] - e).abs() <= 1e-3 * e.abs()).all()) for n in before)
        return turns

    def measured(self, grids: Mapping[str, Tensor]) -> dict[str, Sums]:
        """Euler products at points far apart, two more than there are tensors left, of the first batch alone."""
        first = self.f.on([_first(self.f, self.w.device)])
        sums: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in grids}
        for i in range(2 + len(_left(tensors(self.asked), self.left))):
            s = self._sample(_moved(self.f, self.start, 0.5, 10 + i), first)
            for name, grid in grids.items() if bool(s.g.isfinite().all()) else ():
                sums[name].append(row_sums(s, grid))
        found = {name: some or [row_sums(s, grids[name]) for s in self.base] for name, some in sums.items()}
        return {name: Sums(*(torch.stack(x) for x in zip(*some, strict=True))) for name, some in found.items()}

    def here(self) -> list[Sample]:
        """Gradients near the weights as they are."""
        if torch.equal(self.start, self.w):
            return self.base
        return [self._sample(_moved(self.f, self.w, 0.1, seed)) for seed in (1, 2)]

    def _sample(self, w: Tensor, f: Objective | None = None) -> Sample:
        self.count += 1
        return Sample(w, (f or self.f).grad(w))

    def _is_double(self) -> bool:
        """Is rounding inside the model as small as that of the weights?  A model may cast to single precision."""
        if self.w.dtype is not torch.float64:
            return False
        if self.f is self.asked:
            return True
        step, (here, *_) = 1e-6 * _noise(self.w, 4) * self.base[0].w, self.base
        ahead, behind = self._sample(here.w + step), self._sample(here.w - step)
        return bool((ahead.g - 2 * here.g + behind.g).norm() <= 1e-9 * here.g.norm())

    def _null(self) -> dict[str, Tensor]:
        """Tensors, or runs of entries of a vector, with a gradient at rounding level, also when they are moved."""
        size = max(s.g.square().mean().sqrt().item() for s in self.base)
        quiet = torch.stack([s.g.abs() <= self.zero * size for s in self.base]).all(dim=0)
        if not _narrowed(self.asked, quiet):
            return {}
        w, noise = self.base[0].w, _noise(self.w, 5)
        far = 3 * (1 + w.abs()) * (noise + noise.sign())
        for place in (0.1 * noise, w + far, w - far):  # the bias of a unit that is off, or always on, here is not null
            quiet &= self._sample(torch.where(quiet, place, w)).g.abs() <= self.zero * size
        _narrowed(self.asked, quiet)
        return {name: i for t, i in tensors(self.asked).items() for name, i in _quiet_runs(t, i, quiet)}


def _same(held: Mapping[str, Tensor], scale: Tensor, before: Sample, after: Sample) -> bool:
    """Is ``c ∇_g`` what it was?"""
    change = scale * after.g - before.g
    return all(bool(change[i].norm() <= SAME * before.g[i].norm()) for i in held.values())


def _narrowed(f: Objective, quiet: Tensor) -> bool:
    """Take matrices out of `quiet` that are not quiet as a whole; is anything?"""
    for name, indices in tensors(f).items():
        if len(f.shapes[name]) > 1 and not bool(quiet[indices].all()):
            quiet[indices] = False
    return bool(quiet.any())


def _quiet_runs(name: str, indices: Tensor, quiet: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The whole tensor, or the runs of entries, where `quiet`."""
    here = quiet[indices].long()
    if bool(here.all()):
        yield name, indices
        return
    edges = torch.diff(here, prepend=here.new_zeros(1), append=here.new_zeros(1))
    starts, stops = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    for start, stop in zip(starts, stops, strict=True):
        yield f"{name}[{start}:{stop}]", indices[start:stop]


def _left(candidates: Mapping[str, Tensor], left: Tensor) -> dict[str, Tensor]:
    """The candidates without what is not left, and without those of which nothing is."""
    cut = {name: i[left[i]] for name, i in candidates.items()}
    return {name: i for name, i in cut.items() if i.numel()}


def _parts(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """What is left of each tensor; its name says where that is not all."""
    whole = {name: s.stop - s.start for name, s in f.slices.items()}
    return {n if len(i) == whole[n] else f"{n} (rest)": i for n, i in _left(tensors(f), left).items()}


def _members(f: Objective, left: Tensor) -> dict[str, list[str]]:
    """Modules of which several tensors are left, and these."""
    members: dict[str, list[str]] = {}
    for name in _left(tensors(f), left):
        members.setdefault(name.rpartition(".")[0], []).append(name)
    return {f"{module}.*".removeprefix("."): names for module, names in members.items() if len(names) > 1}


def _together(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """All that is left of one module (weight and bias) as one candidate, where there are several tensors."""
    own = _left(tensors(f), left)
    return {module: torch.cat([own[name] for name in names]) for module, names in _members(f, left).items()}


def _shaped(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """Indices of tensors of which something is left, in their shapes, vectors as one column."""
    own = {name: i for name, i in tensors(f).items() if bool(left[i].any())}
    return {name: i.view(f.shapes[name] if len(f.shapes[name]) > 1 else (-1, 1)) for name, i in own.items()}


def _grids(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """Rows and columns of what is left, as `blocks` takes them."""
    own = {name: i for name, i in _shaped(f, left).items() if len(f.shapes[name]) > 1}
    grids = {f"{name}[{{}}]": i.flatten(1) for name, i in own.items()}
    return grids | {f"{name}[:, {{}}]": i.transpose(0, 1).flatten(1) for name, i in own.items()}


def _wide_grids(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """Rows of weight and bias side by side."""
    own, grids = _shaped(f, left), dict[str, Tensor]()
    for module, names in _members(f, left).items():
        if len({len(own[name]) for name in names}) == 1:
            grids[f"{module}[{{}}]"] = torch.cat([own[name].flatten(1) for name in names], dim=1)
    return grids


def _thirds(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """Thirds of the rows: where queries, keys and values are one tensor."""
    found: dict[str, Tensor] = {}
    for name, grid in (_grids(f, left) | _wide_grids(f, left)).items():
        n = len(grid) // 3
        if "[:" not in name and len(grid) == 3 * n > 3:
            found |= {name.format(f"{k * n}:{(k + 1) * n}"): grid[k * n : (k + 1) * n].flatten() for k in range(3)}
    return _left(found, left)


def _units(f: Objective, left: Tensor) -> dict[str, Tensor]:
    """What is left of tensors, modules and thirds, each as one row."""
    return {n: i[None] for n, i in (_parts(f, left) | _together(f, left) | _thirds(f, left)).items()}


def _noise(w: Tensor, seed: int) -> Tensor:
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(w)


def _moved(f: Objective, w: Tensor, share: float, seed: int) -> Tensor:
    """w plus noise of a share of the size of each row, or entry of a vector, so that no gradient is zero by accident.

    Where that is zero the size of the tensor counts, where this is zero too one.
    """
    noise, out = f.unflatten(_noise(w, seed)), w.clone()
    for name, part in f.unflatten(out).items():
        size = part.square().mean(list(range(1, part.dim())), keepdim=True).sqrt() if part.dim() > 1 else part.abs()
        whole = part.square().mean().sqrt()
        part += share * torch.where(size > 0, size, torch.where(whole > 0, whole, 1)) * noise[name]
    return out


def _raised(f: Objective, w: Tensor) -> Tensor:
    """w with rows and columns below half of 1/√fan-in brought to that size, and vectors below a tenth to one."""
    out = w.clone()
    for part in f.unflatten(out).values():
        usual = 1 / part[0].numel() ** 0.5 if part.dim() > 1 else 1.0
        least = usual / 2 if part.dim() > 1 else usual / 10
        for axis in (0, 1) if part.dim() > 1 else (None,):
            others = [d for d in range(part.dim()) if d != axis]
            size = part.square().mean(others, keepdim=True).sqrt() if others else part.abs()
            part *= torch.where((size > 0) & (size < least), usual / size, 1)
    return out


def _in_double(f: Objective, w: Tensor) -> Objective:
    """`f` in double precision, on a copy of the model, or `f` itself where that is not possible."""
    if w.dtype is torch.float64:
        return f
    try:
        double = copy.copy(f)
        double.model = copy.deepcopy(f.model).double()
        double.data = _Double(f, w.device)
        double.value(w.double())
    except (RuntimeError, TypeError, ValueError, copy.Error):
        return f
    return double


@dataclass(frozen=True)
class _Double:
    """The data of `f`, their floating point tensors in double precision."""

    f: Objective
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.f._batches(self.device):
            yield tree_map(_doubled, _raw(batch))


def _doubled(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _raw(batch: Batch) -> Any:
    return batch.target if batch.kwargs is batch.target else (batch.kwargs or batch.args, batch.target)


def _first(f: Objective, device: torch.device) -> Any:
    """The first batch, as it came."""
    batches = f._batches(device)
    with closing(batches):  # type: ignore[type-var]
        return _raw(next(batches))
