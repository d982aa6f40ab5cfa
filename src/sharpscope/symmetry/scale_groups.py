"""Find scale-invariant weights from the gradient, by Euler's identity.

A group g of weights is scale-invariant when ``L(.., c w_g, ..) = L(w)`` for every c > 0.  Then

    w_gᵀ ∇_g L(w) = 0             (Euler)
    ∇_g L(.., c w_g, ..) = ∇_g L(w) / c

Both are tested near the weights, in double precision, at perturbed weights that are raised to ordinary size where they
are small.  An eps in a normalization leaves an Euler cosine ``|w_gᵀ∇_g| / (‖w_g‖ ‖∇_g‖)`` that falls like 1/c² when
w_g is multiplied by c; a side branch leaves one that falls like 1/c, chance one that does not fall.  So the verdict
does not depend on the size of the weights.  The cosine that eps leaves at the weights as they are is the *defect*.

Weights without any effect (a bias right before batch normalization) are *null*: they would enter the norm, and are kept
out of it.  Where no tensor or module is invariant alone, `relations` finds parts of it, or several together.

P parameters, n of them in a group.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..autodiff.objective import Objective, require_objective
from ..display import card, progress, report, text
from ..errors import InvalidValue
from .candidates import Candidates, module_grids, modules, parts, remaining, row_grids, tensors, thirds, units
from .confirmation import DOUBLE, MAX_CANDIDATE_COSINE, MAX_CHANGE, SINGLE, confirmed
from .large_search import Found, search_large
from .parts import indices as places
from .parts import views
from .points import at_ordinary_size, extinguishes, in_double_if_possible, noise, perturbed
from .relations import Sample, Sums, blocks, euler_cosine, joint_groups, read_by_several, rescaled_pairs, row_products

LARGE = 2**18
"""Number of parameters from which few examples and single precision are used (`large_search`)."""

EULER = 2e-3
"""Largest Euler cosine at the weights themselves at which numbers on the sphere may be believed: eps is felt above."""


@dataclass(frozen=True)
class ScaleGroups:
    """The weights that may be rescaled without a change of the loss.

    ``groups``: name -> indices ``(n,)`` into the flat vector of weights that are invariant on their own, but for an
    eps.  Gain and shift of a normalization are such a group (``bn.*``) where a rectifier and another normalization
    follow; so are the tensors that write to a residual stream which is normalized wherever it is read.
    ``defects``: name -> Euler cosine at the weights of every tensor and every group (0 is exact invariance).  In a
    group it measures eps against the variance.
    ``null``: name -> indices of weights without any effect on the loss.
    ``joint``: indices of all weights that may be rescaled together, ``joint_defect`` their Euler cosine.
    ``pairs``: ``"a -> b"`` -> defect of weights that may be rescaled by c and 1/c (positive homogeneity);
    ``"a -> b + c"`` where several maps read one gain, as queries, keys and values do.
    ``num_gradients``: cost of the search, gradients of the first batch alone included.
    """

    groups: Mapping[str, Tensor]
    defects: Mapping[str, float]
    null: Mapping[str, Tensor]
    joint: Tensor
    joint_defect: float
    pairs: Mapping[str, float] = field(default_factory=dict)
    num_gradients: int = 0

    def covers(self, size: int) -> bool:
        """True when every one of `size` parameters is in the joint group, so that the loss lives on one sphere."""
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

    def __repr__(self) -> str:
        names = ", ".join([*list(self.groups)[:3], *(["..."] if len(self.groups) > 3 else [])])
        return (
            f"ScaleGroups({len(self.groups)} groups: [{names}], joint={self.joint.numel()} weights,"
            f" null={len(self.null)} groups, pairs={len(self.pairs)}, num_gradients={self.num_gradients})"
        )

    def _repr_html_(self) -> str:
        return card("Scale-invariant weights", text(str(self)))


@progress("scale-invariant groups", "gradients")
def find_groups(f: Objective, w: Tensor | None = None, *, candidates: Candidates | None = None) -> ScaleGroups:
    """Find the scale-invariant groups of `f` near `w` (default: the model's weights).

    Tests each tensor, then (weight, bias) pairs of what is left, then blocks of rows or columns, then sums of tensors.
    With `candidates` (`rows`, `columns`) tests these, then pairs, then all that is left together with the groups.
    Costs three gradients where every tensor is invariant; else about ten, and one of the first batch for each that is
    not, all in double precision.  From `LARGE` parameters on, 20 to 80 gradients of one or a few examples in single
    precision look for candidates, and two to ten in double precision confirm them on two examples (four where
    examples see each other, as in batch normalization); one of all data confirms weights without effect.  That takes
    the time of 4 to 16 gradients of a usual batch, and memory for about nine vectors ``(P,)``, plus the indices.
    With `candidates` the size makes no difference.

    Raises:
        ValueError: the gradient there is not finite.
    """
    require_objective(f)
    w = f.weights() if w is None else w
    if candidates is None and f.size >= LARGE:
        return _from_parts(f, search_large(f, w))
    search = _Search(f, w)
    pairs: dict[str, float] = {}
    search.take((candidates or tensors)(f))
    search.take(modules(f, search.left))
    if candidates is None and bool(search.left.any()):
        pairs = _take_related(f, search)
    joint = torch.cat([torch.empty(0, dtype=torch.long), *search.groups.values()]).sort().values
    if candidates is not None and bool(search.left.any()):
        joint = search.confirmed({"": search.effective.nonzero().flatten()}).get("", joint)
    here = search.near_weights()
    tested = tensors(f) if candidates is None else candidates(f)
    defects = {name: euler_cosine(here, i) for name, i in (tested | search.groups).items() if name not in search.null}
    joint_defect = euler_cosine(here, joint) if joint.numel() else 1.0
    return ScaleGroups(
        search.groups, defects, search.null, joint, joint_defect, pairs=pairs, num_gradients=search.count
    )


def _from_parts(f: Objective, found: Found) -> ScaleGroups:
    """List the places of parts of a large network."""
    inside = torch.zeros(f.size, dtype=torch.bool)
    for part in found.groups.values():
        for v in views(f, inside, part):
            v.fill_(value=True)
    return ScaleGroups(
        {name: places(f, part) for name, part in found.groups.items()},
        found.defects,
        {name: places(f, part) for name, part in found.null.items()},
        inside.nonzero().flatten(),
        found.joint_defect,
        pairs=found.pairs,
        num_gradients=found.num_gradients,
    )


def _take_related(f: Objective, search: "_Search") -> dict[str, float]:
    """Add blocks of rows and sums of tensors to the groups; return what may be rescaled by c and 1/c."""
    grids, wide = row_grids(f, search.left), module_grids(f, search.left)
    sums, single = search.euler_sums({**grids, **wide, **units(f, search.left)}), len(search.groups)
    search.take(blocks(grids, sums))
    search.take(blocks(wide, sums))
    if len(search.groups) > single:
        sums = search.euler_sums(units(f, search.left))
    own = parts(f, search.left)
    wider = modules(f, search.left) | thirds(f, search.left)
    pairs, represented = rescaled_pairs(own, wider, sums)
    search.take(joint_groups({name: i for name, i in own.items() if name not in represented}, sums))
    readers = read_by_several(f.shapes, [*own, *wider], {p.partition(" -> ")[0] for p in pairs}, sums, search.floor)
    return pairs | {f"{vector} -> {' + '.join(maps)}": mismatch for (vector, *maps), mismatch in readers.items()}


class _Search:
    """Gradients of one objective and the result so far: `groups`, `null`, and which weights are `left`."""

    def __init__(self, f: Objective, w: Tensor) -> None:
        self.f, self.count = in_double_if_possible(f, w), 0
        self.given_in_double = w.dtype is torch.float64
        self.w = w.double() if self.f is not f else w
        self.start = at_ordinary_size(f, self.w)
        self.base = self.near(self.start)
        if not torch.equal(self.start, self.w):
            before, after = self.sample(perturbed(f, self.w, 0.1, 1)), self.base[0]
            if extinguishes(before.w, before.g, after.w, after.g):
                self.start, self.base = self.w, self.near(self.w)
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
        """Add the candidates that are invariant, as far as they are left, to the groups."""
        candidates = remaining(candidates, self.left)
        near = {name: i for name, i in candidates.items() if euler_cosine(self.base, i) <= MAX_CANDIDATE_COSINE}
        found = self.confirmed(near)
        self.groups |= found
        for indices in found.values():
            self.left[indices] = False

    def confirmed(self, candidates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the candidates that pass the test from both base points, or from one where that leaves no doubt."""
        found = set(confirmed(_Probe(self, self.base[0], candidates), candidates))
        exact = {name for name in found if euler_cosine(self.base, candidates[name]) <= self.floor}
        again = [name for name in candidates if name in found - exact]
        exact |= set(confirmed(_Probe(self, self.base[1], candidates), again))
        return {name: i for name, i in candidates.items() if name in exact}

    def euler_sums(self, grids: Mapping[str, Tensor]) -> dict[str, Sums]:
        """Euler products at points far from each other, two more than tensors are left, of the first batch alone."""
        first = self.f.on([_first_batch(self.f, self.w.device)])
        sums: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in grids}
        for i in range(2 + len(remaining(tensors(self.f), self.left))):
            s = self.sample(perturbed(self.f, self.start, 0.5, 10 + i), first)
            for name, grid in grids.items() if bool(s.g.isfinite().all()) else ():
                sums[name].append(row_products(s, grid))
        found = {name: some or [row_products(s, grids[name]) for s in self.base] for name, some in sums.items()}
        return {name: Sums(*(torch.stack(x) for x in zip(*some, strict=True))) for name, some in found.items()}

    def near_weights(self) -> list[Sample]:
        """Gradients near the weights as they are, small or not."""
        if torch.equal(self.start, self.w):
            return self.base
        return self.near(self.w)

    def near(self, w: Tensor) -> list[Sample]:
        """Gradients at two points near w."""
        return [self.sample(perturbed(self.f, w, 0.1, seed)) for seed in (1, 2)]

    def sample(self, w: Tensor, f: Objective | None = None) -> Sample:
        self.count += 1
        report(self.count)
        return Sample(w, (f or self.f).grad(w))

    def _is_double(self) -> bool:
        """True where rounding inside the model is that of double precision too: it may cast to single precision."""
        if self.w.dtype is not torch.float64 or self.given_in_double:
            return self.given_in_double
        step, (here, *_) = 1e-6 * noise(self.w, 4) * self.base[0].w, self.base
        ahead, behind = self.sample(here.w + step), self.sample(here.w - step)
        return bool((ahead.g - 2 * here.g + behind.g).norm() <= 1e-9 * here.g.norm())

    def _null(self) -> dict[str, Tensor]:
        """Find tensors, or runs of entries of a vector, with a gradient at rounding level, also when they are moved."""
        size = max(s.g.square().mean().sqrt().item() for s in self.base)
        quiet = torch.stack([s.g.abs() <= self.zero * size for s in self.base]).all(dim=0)
        quiet = _without_parts_of_matrices(self.f, quiet)
        if not bool(quiet.any()):
            return {}
        w, random = self.base[0].w, noise(self.w, 5)
        far = 3 * (1 + w.abs()) * (random + random.sign())
        for place in (0.1 * random, w + far, w - far):  # the bias of a unit that is off, or always on, here is not null
            quiet &= self.sample(torch.where(quiet, place, w)).g.abs() <= self.zero * size
        quiet = _without_parts_of_matrices(self.f, quiet)
        return {name: i for t, i in tensors(self.f).items() for name, i in _quiet_runs(t, i, quiet)}


class _Probe:
    """Candidates of a search, at one of its base points."""

    def __init__(self, search: _Search, before: Sample, candidates: Mapping[str, Tensor]) -> None:
        self.search, self.before, self.candidates, self.floor = search, before, candidates, search.floor

    def cosine(self, name: str) -> float:
        return euler_cosine(self.search.base, self.candidates[name])

    def cosine_here(self, name: str) -> float:
        return euler_cosine([self.before], self.candidates[name])

    def products(self, name: str) -> Tensor:
        i = self.candidates[name]
        return torch.stack([s.w[i].double() @ s.g[i].double() for s in self.search.base])

    def rescaled(self, factors: Mapping[str, float]) -> "_Rescaled":
        w = self.before.w.clone()
        for name, c in factors.items():
            w[self.candidates[name]] *= c
        return _Rescaled(self, self.search.sample(w))


class _Rescaled:
    """The gradient after candidates of a probe were rescaled."""

    def __init__(self, probe: _Probe, after: Sample) -> None:
        self.candidates, self.before, self.after = probe.candidates, probe.before, after

    def cosine(self, name: str) -> float:
        return euler_cosine([self.after], self.candidates[name])

    def is_alive(self, name: str, c: float) -> bool:
        i = self.candidates[name]
        return bool(c * self.after.g[i].norm() > 1e-6 * self.before.g[i].norm())

    def agrees(self, name: str, c: float) -> bool:
        i = self.candidates[name]
        return bool((c * self.after.g[i] - self.before.g[i]).norm() <= MAX_CHANGE * self.before.g[i].norm())


def _without_parts_of_matrices(f: Objective, quiet: Tensor) -> Tensor:
    """Take the matrices that are not quiet as a whole out of the mask `quiet` ``(P,)``."""
    quiet = quiet.clone()
    for name, indices in tensors(f).items():
        if len(f.shapes[name]) > 1 and not bool(quiet[indices].all()):
            quiet[indices] = False
    return quiet


def _quiet_runs(name: str, indices: Tensor, quiet: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the whole tensor where it is quiet, else the runs of its entries that are."""
    here = quiet[indices].long()
    if bool(here.all()):
        yield name, indices
        return
    edges = torch.diff(here, prepend=here.new_zeros(1), append=here.new_zeros(1))
    starts, stops = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    for start, stop in zip(starts, stops, strict=True):
        yield f"{name}[{start}:{stop}]", indices[start:stop]


def _first_batch(f: Objective, device: torch.device) -> object:
    batches = f.batches(device)
    with closing(batches):
        return next(batches).raw
