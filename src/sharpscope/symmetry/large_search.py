"""Search for scale-invariant weights of large networks, on few examples and in single precision.

Of a gradient only sums over rows and columns of tensors are kept, `Tally`: Euler products and squared norms, from which
those of every candidate follow.  Where examples do not see each other one of them is enough for a point.  Relations
among many tensors are sought among classes of tensors, which differ only in the numbers in their names, since a stream
is written by whole classes.  Whatever is found is confirmed in double precision at the end, or dropped.

P parameters, n rows or columns, m points.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from ..autodiff.data import head
from ..autodiff.objective import Objective
from ..display import report
from ..errors import InvalidValue
from .confirmation import DOUBLE, MAX_CANDIDATE_COSINE, MAX_CHANGE, SINGLE, confirmed, factors
from .parts import Left, Part, Piece, first, inside, lines, overlap, runs, size, views, whole
from .points import at_ordinary_size, extinguishes, in_double_if_possible, perturbed_by_rank_one, perturbed_by_tensors
from .relations import MAX_PAIR_MISMATCH, Sums, joint_sets, paired, place, read_by_several, title, zero_runs

EXAMPLES = 4
"""Number of examples that are used together where they see each other, as in batch normalization."""

MIN_POINTS = 8
"""Number of points at which runs of rows and pairs are sought."""

GENTLE_FACTOR, MAX_GENTLE = 4.0, 4
"""Factor, give or take a half, at which cosines must have fallen like 1/c at least, and how often it is tried."""

MAX_UNKNOWNS = 24
"""Number of tensors, or classes, up to which relations among them are sought; among the widest classes always."""

MAX_REST = 3e-2
"""Largest sum of the Euler products of a set of tensors, against the root of the sum of their squares."""

MAX_PAIR_CHANGE = {DOUBLE[0]: 1e-6, SINGLE[0]: 1e-4}
"""Largest relative change of the loss where pairs are rescaled by c and 1/c, by the Euler cosine that is rounding."""

MAX_QUIET = 300.0
"""Gradient of a vector against the rounding of a typical one, up to which it may be rounding itself."""

SMALL_STEP, MAX_ROUNDING = 1e-8, 1e-12
"""Relative size of a step, and of the second difference of the loss along it, which is rounding."""

MAX_DIFFERENCE = 1e-3
"""Largest relative difference of the loss of two examples, together and one by one, that do not see each other."""

Axes = Collection[tuple[str, int]]
"""Names of tensors, and 0 for their rows or 1 for their columns."""


class Tally:
    """Sums over each row or column of tensors at one point: ``wᵀ∇``, ``‖w‖²`` and ``‖∇‖²`` as ``(3, n)``."""

    def __init__(self, f: Objective, w: Tensor, g: Tensor, axes: Axes) -> None:
        self.sums: dict[tuple[str, int], Tensor] = {}
        names = dict.fromkeys(name for name, _ in axes)
        scratch = w.new_empty(max((f.shapes[name].numel() for name in names), default=0))
        for name in names:
            w_t, g_t = lines(f, w, name), lines(f, g, name)
            product = scratch[: w_t.numel()].view(w_t.shape)
            sums: dict[int, list[Tensor]] = {axis: [] for axis in (0, 1) if (name, axis) in axes}
            for a, b in ((w_t, g_t), (w_t, w_t), (g_t, g_t)):
                torch.mul(a, b, out=product)
                for axis, found in sums.items():
                    found.append(product.sum((1 - axis, 2)))
            self.sums |= {(name, axis): torch.stack(found).double().cpu() for axis, found in sums.items()}

    def of(self, part: Part) -> Tensor:
        """Sum over a part ``(3,)``."""
        return sum((self.sums[p.name, p.axis][:, p.start : p.stop].sum(dim=1) for p in part), torch.zeros(3).double())

    def cosine(self, part: Part) -> float:
        """Euler cosine of a part; 1 where its gradient vanishes or is not finite."""
        product, w, g = self.of(part).tolist()
        size = (w * g) ** 0.5
        return min(abs(product) / size, 1.0) if 0 < size < float("inf") else 1.0

    def is_finite(self) -> bool:
        """True where the gradient is."""
        return all(bool(sums.isfinite().all()) for sums in self.sums.values())


@dataclass(frozen=True)
class Found:
    """The result of a search: groups and null weights as parts, defects at the weights, and pairs."""

    groups: Mapping[str, Part]
    null: Mapping[str, Part]
    defects: Mapping[str, float]
    joint_defect: float
    pairs: Mapping[str, float]
    num_gradients: int


def search_large(f: Objective, w: Tensor) -> Found:
    """Find what may be rescaled near `w`, at the cost of a few gradients of `f`.

    Raises:
        ValueError: the gradient there is not finite.
    """
    search = _LargeSearch(f, w)
    search.take(search.left_tensors())
    search.take(search.left_modules())
    if search.left.names():
        search.take_related()
    search.confirm()
    here, groups = search.near_weights(), search.groups
    tested = {name: (whole(f, name),) for name in f.slices if name not in search.null} | groups
    joint = tuple(p for part in groups.values() for p in part)
    return Found(
        groups,
        search.null,
        {name: _largest_cosine(here, part) for name, part in tested.items()},
        _largest_cosine(here, joint) if joint else 1.0,
        {f"{a} -> {b}": pair.mismatch for (a, b), pair in search.pairs.items()},
        search.count,
    )


class _Pair(NamedTuple):
    """Parts that may be rescaled by c and 1/c, and the mismatch of their Euler products."""

    a: Part
    b: Part
    mismatch: float


class _LargeSearch:
    """Sums of gradients of one objective and the result so far: `groups`, `null`, and what is `left`."""

    def __init__(self, f: Objective, w: Tensor) -> None:
        self.f, self.w, self.count = f, w, 0
        self.rows = [(name, 0) for name in f.slices]
        self.groups: dict[str, Part] = {}
        self.pairs: dict[tuple[str, str], _Pair] = {}
        self.raised = not torch.equal(w, at_ordinary_size(f, w))
        self.at = self.base_point(1)
        self.few, self.single = few_examples(f, self.at)
        if self.raised and self._is_extinguished():
            self.raised = False
            self.at = self.base_point(1)
            self.few, self.single = few_examples(f, self.at)
        self.base = self._base()
        if not self.base:
            self.few, self.single = f, [f]
            self.base = self._base()
        if not self.base:
            raise InvalidValue("the gradient near these weights is not finite: no telling what they are invariant to")
        self.left = Left(f)
        self.null = self._null()
        for part in self.null.values():
            self.left.take(part)

    def grad(self, w: Tensor, f: Objective | None = None) -> Tensor:
        """Evaluate a gradient ``(P,)``, on an example or two where nothing else is wanted, and count it."""
        self.count += 1
        report(self.count)
        return (f or self.single[0]).grad(w)

    def tally(self, w: Tensor, axes: Axes, f: Objective | None = None) -> Tally:
        """Evaluate a gradient and keep its sums."""
        return Tally(self.f, w, self.grad(w, f), axes)

    def take(self, candidates: Mapping[str, Part]) -> None:
        """Add the candidates that are invariant to the groups; clear cases are dropped in single precision.

        Most are dropped where all are rescaled a little, which saturates nothing.
        """
        near = {n: part for n, part in candidates.items() if _largest_cosine(self.base, part) <= MAX_CANDIDATE_COSINE}
        for _ in range(MAX_GENTLE):
            probe, c = _Screening(self, near), factors(list(near), GENTLE_FACTOR)
            after = probe.rescaled(c) if near else None
            kept = [n for n in near if after and after.cosine(n) <= max(probe.floor, probe.cosine(n) / c[n])]
            if len(kept) == len(near):
                break
            near = {name: near[name] for name in kept}
        self.add({name: near[name] for name in confirmed(_Screening(self, near), near)})

    def add(self, candidates: Mapping[str, Part]) -> None:
        """Add the candidates that are invariant in double precision to the groups."""
        for name, part in (self.exact.confirmed(candidates) if candidates else {}).items():
            self.groups[name] = part
            self.left.take(part)

    @cached_property
    def exact(self) -> "_Exact":
        """Gradients in double precision."""
        return _Exact(self)

    def left_tensors(self) -> dict[str, Part]:
        """Each tensor as far as it is left; the name says where that is not all of it."""
        return {n if self.left.is_whole(n) else f"{n} (rest)": self.left.rest(n) for n in self.left.names()}

    def left_modules(self) -> dict[str, Part]:
        """Each module of which several tensors are left (weight and bias, say), as one candidate."""
        return {m: tuple(p for n in names for p in self.left.rest(n)) for m, names in self._members().items()}

    def left_thirds(self) -> dict[str, Part]:
        """Thirds of the rows of tensors and modules, for queries, keys and values that are one tensor."""
        own = {n: [n] for n in self.left.names() if len(self.f.shapes[n]) > 1}
        found: dict[str, Part] = {}
        for name, names in (own | self._modules_by_rows()).items():
            rows = whole(self.f, names[0]).stop
            for k in range(3) if rows % 3 == 0 and rows > 3 else ():
                start, stop = k * rows // 3, (k + 1) * rows // 3
                part = tuple(p for n in names for p in self.left.between(n, 0, start, stop))
                found |= {f"{name}[{start}:{stop}]": part} if part else {}
        return found

    def _members(self) -> dict[str, list[str]]:
        members: dict[str, list[str]] = {}
        for name in self.left.names():
            members.setdefault(f"{name.rpartition('.')[0]}.*".removeprefix("."), []).append(name)
        return {module: names for module, names in members.items() if len(names) > 1}

    def _modules_by_rows(self) -> dict[str, list[str]]:
        """Find the modules of which several tensors are left that have the same number of rows."""
        return {m: names for m, names in self._members().items() if len({whole(self.f, n).stop for n in names}) == 1}

    def take_related(self) -> None:
        """Add runs of rows or columns and sums of tensors to the groups, and pairs by c and 1/c."""
        names = self.left.names()
        grids = [(n, axis) for axis in (0, 1) for n in names if len(self.f.shapes[n]) > 1]
        points = self._points(range(MIN_POINTS), {*grids, *((n, 0) for n in names)})
        if len(points) < MIN_POINTS:
            return
        self.add(self._runs(points, grids))
        own, wider = self.left_tensors(), self.left_modules() | self.left_thirds()
        units = dict(sorted({**own, **wider}.items(), key=lambda item: first(self.f, item[1])))
        found = paired(list(units), _sums(points, units), lambda a, b: not overlap(units[a], units[b]))
        self.pairs = {(a, b): _Pair(units[a], units[b], mismatch) for (a, b), mismatch in found.items()}
        for pair in self.pairs.values():
            own.pop(next((n for n, part in own.items() if inside(part, pair.a)), ""), None)
        self.add(self._joint(own, points))
        readers = read_by_several(
            self.f.shapes, list(units), {a for a, _ in self.pairs}, _sums(points, units), MAX_PAIR_MISMATCH
        )
        for (vector, *maps), mismatch in readers.items():
            read = tuple(p for name in maps for p in units[name])
            self.pairs[vector, " + ".join(maps)] = _Pair(units[vector], read, mismatch)

    def _points(self, numbers: Iterable[int], axes: Axes) -> list[Tally]:
        """Gradients at points far from each other, of the few examples in turns."""
        found = (
            self.tally(perturbed_by_rank_one(self.f, self.at, 0.5, 10 + i), axes, self.single[i % len(self.single)])
            for i in numbers
        )
        return [t for t in found if t.is_finite()]

    def _runs(self, points: Sequence[Tally], grids: Iterable[tuple[str, int]]) -> dict[str, Part]:
        """Find runs of rows or columns, then of rows of modules, whose Euler products add up to zero."""
        found: dict[str, Part] = {}
        left = self.left.copy()
        labelled = [(f"{n}[{{}}]" if axis == 0 else f"{n}[:, {{}}]", axis, [n]) for n, axis in grids]
        labelled += [(f"{m}[{{}}]", 0, names) for m, names in self._modules_by_rows().items()]
        for label, axis, names in labelled if points else ():
            free = torch.stack([left.free(n, axis) for n in names]).any(dim=0)
            for start, stop in zero_runs(_by_lines(points, names, axis), free) if bool(free.any()) else ():
                part = tuple(p for n in names for p in left.between(n, axis, start, stop))
                found[label.format(place(start, stop))] = part
                left.take(part)
        return found

    def _joint(self, own: Mapping[str, Part], points: list[Tally]) -> dict[str, Part]:
        """Find sets of parts whose Euler products add up to zero, among all of them or among classes of them."""
        axes = {(p.name, p.axis) for part in own.values() for p in part}
        unknowns = max((len(grouping) for grouping in _groupings(self.f, own)), default=0)
        points = points + self._points(range(MIN_POINTS, unknowns + 2), axes)
        left, found = dict(own), dict[str, Part]()
        for grouping in _groupings(self.f, own):
            classes = {k: [n for n in names if n in left] for k, names in grouping.items()}
            united = {k: tuple(p for n in names for p in left[n]) for k, names in classes.items() if names}
            labels = sorted(united, key=lambda k: min(size(self.f, left[n]) for n in classes[k]))
            for chosen in joint_sets(labels, _sums(points, united)) if len(labels) + 2 <= len(points) else ():
                members = sorted((n for k in chosen for n in classes[k]), key=lambda n: first(self.f, own[n]))
                if _cancel(points, [own[n] for n in members]):
                    found[title(members)] = tuple(p for n in members for p in left.pop(n))
        return found

    def confirm(self) -> None:
        """Keep of what was found that which is there from another point, too."""
        if self.groups or self.null or self.pairs:
            self.groups = self.exact.confirmed_again(self.groups)
            self.null = self.exact.confirmed_null(self.null)
            self.pairs = self.exact.confirmed_pairs(self.pairs)
            self.base = self.exact.base

    def near_weights(self) -> list[Tally]:
        """Gradients near the weights as they are, small or not."""
        if not self.raised:
            return self.base
        axes = {*self.rows, *((p.name, p.axis) for part in self.groups.values() for p in part)}
        return [self.tally(perturbed_by_tensors(self.f, self.w, 0.1, seed), axes) for seed in (1, 2)]

    def base_point(self, seed: int) -> Tensor:
        """Perturb the weights a little, small ones raised to ordinary size where that leaves a gradient."""
        return perturbed_by_tensors(self.f, at_ordinary_size(self.f, self.w) if self.raised else self.w, 0.1, seed)

    def _is_extinguished(self) -> bool:
        before = perturbed_by_tensors(self.f, self.w, 0.1, 1)
        return extinguishes(before, self.grad(before), self.at, self.grad(self.at))

    def _base(self) -> list[Tally]:
        """Gradients at two points near the weights; none if they are not finite."""
        found = [self.tally(self.at, self.rows), self.tally(self.base_point(2), self.rows)]
        return found if all(t.is_finite() for t in found) else []

    def _null(self) -> dict[str, Part]:
        """Find tensors, or runs of entries of a vector, with a gradient at rounding level, also when they are moved.

        The last gradient is that of all examples: some weights matter to few of them.  The gradient of a vector
        may be nothing but rounding that is louder (a bias of keys, under a sharp softmax): double precision decides.
        """
        least = SINGLE[1] * max(_typical_gradient(self.f, t) for t in self.base)
        quiet = self._quiet_far(_both(*(_quiet(self.f, t, least) for t in self.base)), least, self.single[0], self.f)
        rounding = [n for n, part in self._small_vectors(MAX_QUIET * least).items() if quiet.get(n) != part]
        if rounding and self.exact.floor == DOUBLE[0]:
            t = self.exact.base[0]
            least = DOUBLE[1] * _typical_gradient(self.f, t)
            silent = {n: p for n, p in _quiet(self.f, t, least).items() if n in rounding and p == (whole(self.f, n),)}
            quiet = {**quiet, **self._quiet_far(silent, least, self.exact.f)}
        return {
            name if len(part) == 1 and part[0] == whole(self.f, name) else f"{name}[{p.start}:{p.stop}]": (p,)
            for name, part in quiet.items()
            for p in part
        }

    def _small_vectors(self, least: float) -> dict[str, Part]:
        """Find the vectors with gradients of at most `least` in the mean of their entries."""
        small = {name: (whole(self.f, name),) for name, shape in self.f.shapes.items() if len(shape) == 1}
        squares = {name: max(t.of(part)[2].item() for t in self.base) for name, part in small.items()}
        return {name: part for name, part in small.items() if squares[name] <= least**2 * self.f.shapes[name].numel()}

    def _quiet_far(
        self, quiet: Mapping[str, Part], least: float, f: Objective, last: Objective | None = None
    ) -> Mapping[str, Part]:
        """Keep what is quiet wherever it is moved, at gradients of `f`, and far away of `last`."""
        points = [(0, 0.1, f), (1, 3, f), (1, -3, f), *([(1, 3, last)] if last else [])]
        for keep, distance, one in points if quiet else ():
            w = self.at.to(one.dtype, copy=True)
            for v in views(self.f, w, tuple(p for part in quiet.values() for p in part)):
                random = torch.randn(v.shape, generator=torch.Generator().manual_seed(5)).to(v)
                step = (1 + v.abs()) * (random + random.sign()) if keep else random
                v.mul_(keep).add_(step, alpha=distance)
            quiet = _both(quiet, _quiet(self.f, self.tally(w, [(name, 0) for name in quiet], one), least))
        return quiet


class _Screening:
    """Candidates of a search, in single precision: sums are all that is compared."""

    floor = SINGLE[0]

    def __init__(self, search: _LargeSearch, candidates: Mapping[str, Part]) -> None:
        self.search, self.candidates = search, candidates

    def cosine(self, name: str) -> float:
        return _largest_cosine(self.search.base, self.candidates[name])

    def cosine_here(self, name: str) -> float:
        return self.search.base[0].cosine(self.candidates[name])

    def products(self, name: str) -> Tensor:
        return torch.stack([t.of(self.candidates[name])[0] for t in self.search.base])

    def rescaled(self, factors: Mapping[str, float]) -> "_Rescaled":
        w = _rescaled(
            self.search.f, self.search.at.clone(), ((self.candidates[name], c) for name, c in factors.items())
        )
        after = self.search.tally(w, {(p.name, p.axis) for part in self.candidates.values() for p in part})
        return _Rescaled(self.candidates, self.search.base[0], after)


@dataclass(frozen=True)
class _Rescaled:
    """Sums of a gradient before and after candidates were rescaled; `changes` of ``c ∇``, where these are known."""

    candidates: Mapping[str, Part]
    before: Tally
    after: Tally
    changes: Mapping[str, float] | None = None

    def cosine(self, name: str) -> float:
        return self.after.cosine(self.candidates[name])

    def is_alive(self, name: str, c: float) -> bool:
        before, after = self._norms(name)
        return c * after > 1e-6 * before

    def agrees(self, name: str, c: float) -> bool:
        before, after = self._norms(name)
        change = abs(c * after - before) if self.changes is None else self.changes[name]
        return change <= MAX_CHANGE * before

    def _norms(self, name: str) -> tuple[float, float]:
        part = self.candidates[name]
        return self.before.of(part)[2].item() ** 0.5, self.after.of(part)[2].item() ** 0.5


class _Exact:
    """Gradients of a search in double precision where the model allows it, on few examples, at `at`."""

    def __init__(self, search: _LargeSearch) -> None:
        self.search, self.at = search, search.at
        self.f = in_double_if_possible(search.few, search.at)
        self.floor, self.zero = DOUBLE if self.f.dtype is torch.float64 else SINGLE
        self.axes = {(name, axis) for name, shape in search.f.shapes.items() for axis in range(min(len(shape), 2) or 1)}
        self.base: list[Tally] = []
        self.g = self._entered()

    def confirmed(self, candidates: Mapping[str, Part]) -> dict[str, Part]:
        """Keep the candidates that pass the test from this point."""
        found = confirmed(_ExactProbe(self, candidates), candidates)
        if len(found) < len(candidates) and not self._rounds_in_double:
            self.floor, self.zero = SINGLE
            found = confirmed(_ExactProbe(self, candidates), candidates)
        return {name: candidates[name] for name in found}

    def confirmed_again(self, groups: Mapping[str, Part]) -> dict[str, Part]:
        """Keep the groups that pass the test from another point too, unless cosines leave no doubt."""
        self.g = self.g.new_empty(0)
        self.at = self.search.at = self.search.base_point(2)
        self.g = self._entered()
        doubtful = {name: part for name, part in groups.items() if _largest_cosine(self.base, part) > self.floor}
        passed = self.confirmed(doubtful)
        return {name: part for name, part in groups.items() if name not in doubtful or name in passed}

    def confirmed_null(self, null: Mapping[str, Part]) -> dict[str, Part]:
        """Keep the null weights whose gradient is rounding at the base points."""
        f = self.search.f
        for zero in (self.zero, SINGLE[1]):
            quiet = [_quiet(f, t, zero * _typical_gradient(f, t)) for t in self.base]
            found = {n: part for n, part in null.items() if all(inside(part, q.get(part[0].name, ())) for q in quiet)}
            if len(found) == len(null) or self._rounds_in_double:
                break
        return found

    def confirmed_pairs(self, pairs: Mapping[tuple[str, str], _Pair]) -> dict[tuple[str, str], _Pair]:
        """Keep the pairs that leave the loss as it is when they are rescaled together, or in ever smaller sets."""
        if not pairs:
            return {}
        moves: list[tuple[Part, float]] = []
        random = torch.rand(len(pairs), generator=torch.Generator().manual_seed(3)).tolist()
        for pair, r in zip(pairs.values(), random, strict=True):
            moves += [(pair.a, 2 + r), (pair.b, 1 / (2 + r))]
        w = self.at.to(self.f.dtype, copy=True)
        before, after = self.f.value(w).item(), self.f.value(_rescaled(self.search.f, w, moves)).item()
        if abs(after - before) <= MAX_PAIR_CHANGE[self.floor] * abs(before):
            return dict(pairs)
        names, half = list(pairs), len(pairs) // 2
        halves = (names[:half], names[half:]) if half else ()
        return {n: p for part in halves for n, p in self.confirmed_pairs({n: pairs[n] for n in part}).items()}

    def _entered(self) -> Tensor:
        """Enter the sums of the gradient at this point; return it in single precision."""
        w = self.at.to(self.f.dtype)
        g = self.search.grad(w, self.f)
        self.base.append(Tally(self.search.f, w, g, self.axes))
        return g.to(self.at.dtype)

    @cached_property
    def _rounds_in_double(self) -> bool:
        """True where rounding inside the model is that of double precision: it may cast to single precision."""
        if self.f.dtype is not torch.float64 or self.f is self.search.few:
            return self.f.dtype is torch.float64
        here = self.at.double()
        value, *around = (
            self.f.value(w).item()
            for w in (
                here,
                *(perturbed_by_rank_one(self.search.f, here, step, 4) for step in (SMALL_STEP, -SMALL_STEP)),
            )
        )
        return abs(sum(around) - 2 * value) <= MAX_ROUNDING * abs(value)


class _ExactProbe:
    """Candidates of a search in double precision."""

    def __init__(self, exact: _Exact, candidates: Mapping[str, Part]) -> None:
        self.exact, self.candidates, self.floor = exact, candidates, exact.floor

    def cosine(self, name: str) -> float:
        return _largest_cosine(self.exact.base, self.candidates[name])

    def cosine_here(self, name: str) -> float:
        return self.exact.base[-1].cosine(self.candidates[name])

    def products(self, name: str) -> Tensor:
        return torch.stack([t.of(self.candidates[name])[0] for t in self.exact.base])

    def rescaled(self, factors: Mapping[str, float]) -> "_Rescaled":
        f, at = self.exact.search.f, self.exact.at
        moves = ((self.candidates[name], c) for name, c in factors.items())
        w = _rescaled(f, at.to(self.exact.f.dtype, copy=True), moves)
        g = self.exact.search.grad(w, self.exact.f)
        changes = {
            name: sum(
                torch.add(-before, after, alpha=factors.get(name, 1.0)).square().sum().item()
                for after, before in zip(views(f, g, part), views(f, self.exact.g, part), strict=True)
            )
            ** 0.5
            for name, part in self.candidates.items()
        }
        axes = {(p.name, p.axis) for part in self.candidates.values() for p in part}
        return _Rescaled(self.candidates, self.exact.base[-1], Tally(f, w, g, axes), changes)


def few_examples(f: Objective, w: Tensor) -> tuple[Objective, list[Objective]]:
    """Choose a few examples for tests, and single ones for points in turns, where examples do not see each other."""
    taken = head(f.source, EXAMPLES, f.form)
    together, form = f.on(taken), f.form
    if not all(f.processes.each(lambda: all(form.can_be_cut(b) or form.size(b) == 1 for b in taken))):
        return together, [together]
    rows = [form.cut(batch, slice(i, i + 1)) for batch in taken for i in range(form.size(batch))]
    two = f.on(head(taken, 2, f.form))
    try:
        one_by_one, both = f.on(rows[:2]).value(w).item(), two.value(w).item()
    except Exception:  # whatever a module raises that needs several examples
        return together, [together]
    if not abs(one_by_one - both) <= MAX_DIFFERENCE * abs(both):
        return together, [together]
    return two, [f.on(rows[i : i + 1]) for i in range(max(f.processes.each(lambda: len(rows))))]


def _rescaled(f: Objective, w: Tensor, moves: Iterable[tuple[Part, float]]) -> Tensor:
    """Multiply parts of `w` in place."""
    for part, c in moves:
        for v in views(f, w, part):
            v.mul_(c)
    return w


def _largest_cosine(points: Iterable[Tally], part: Part) -> float:
    return max(t.cosine(part) for t in points)


def _typical_gradient(f: Objective, t: Tally) -> float:
    return (sum(t.sums[name, 0][2].sum().item() for name in f.slices) / f.size) ** 0.5


def _quiet(f: Objective, t: Tally, least: float) -> dict[str, Part]:
    """Find the tensors, or runs of entries of vectors, whose gradient is at most `least` in the mean of each row."""
    quiet: dict[str, Part] = {}
    for name, axis in t.sums:
        if axis == 0:
            mask = t.sums[name, 0][2] <= least**2 * (f.shapes[name][1:].numel() if f.shapes[name] else 1)
            found = tuple(Piece(name, 0, *run) for run in runs(mask))
            quiet |= {name: found} if found and (bool(mask.all()) or len(f.shapes[name]) < 2) else {}
    return quiet


def _both(a: Mapping[str, Part], b: Mapping[str, Part]) -> dict[str, Part]:
    """Intersect runs of entries of vectors, and whole tensors."""
    common: dict[str, Part] = {}
    for name in (name for name in a if name in b):
        pieces = [(max(p.start, q.start), min(p.stop, q.stop)) for p in a[name] for q in b[name]]
        found = tuple(Piece(name, 0, start, stop) for start, stop in sorted(pieces) if start < stop)
        common |= {name: found} if found else {}
    return common


def _sums(points: Sequence[Tally], parts: Mapping[str, Part]) -> dict[str, Sums]:
    """Euler products and sizes of parts, as grids of one row."""
    found: dict[str, Sums] = {}
    for name, part in parts.items():
        products, w, g = torch.stack([t.of(part) for t in points]).T
        found[name] = Sums(products[:, None], (w * g).sqrt()[:, None])
    return found


def _by_lines(points: Sequence[Tally], names: Sequence[str], axis: int) -> Sums:
    """Euler products and sizes of rows or columns of tensors side by side."""
    sums = torch.stack([torch.stack([t.sums[name, axis] for name in names]).sum(dim=0) for t in points])
    return Sums(sums[:, 0], (sums[:, 1] * sums[:, 2]).sqrt())


def _cancel(points: Sequence[Tally], parts: Sequence[Part]) -> bool:
    """True where Euler products add up to little against these themselves, which are small for large tensors."""
    products = torch.stack([torch.stack([t.of(part)[0] for part in parts]) for t in points])
    return bool(products.sum(dim=1).norm() <= MAX_REST * products.norm())


def _groupings(f: Objective, parts: Mapping[str, Part]) -> list[dict[str, list[str]]]:
    """Sort names into classes for relations among these, at most `MAX_UNKNOWNS` where there is a choice.

    First the names of one layer, each its own class, for all layers; then all names, those in one class that have one
    shape and differ in their numbers, in all of these or all but the first.
    """
    layers: dict[str, list[str]] = {}
    for name in parts:
        for end in (m.end() for m in re.finditer(r"[^.]*\d[^.]*\.", name)):
            layers.setdefault(name[:end], []).append(name)
    found = [{name: [name] for name in own} for own in sorted(layers.values(), key=len)]
    for label in (str, lambda name: _without_numbers(name, keep=1), _without_numbers):
        classes: dict[str, list[str]] = {}
        for name, part in parts.items():
            classes.setdefault(f"{label(name)} {f.shapes[part[0].name]}", []).append(name)
        found.append(classes)
    most = max(MAX_UNKNOWNS, len(found[-1]))
    return [grouping for grouping in found if 2 <= len(grouping) <= most]


def _without_numbers(name: str, keep: int = 0) -> str:
    """Replace all numbers in a name but the first ones.

    >>> _without_numbers("layer2.0.bn1.weight", keep=1)
    'layer2.#.bn#.weight'
    """
    seen = count()
    return re.sub(r"\d+", lambda m: m.group() if next(seen) < keep else "#", name)
