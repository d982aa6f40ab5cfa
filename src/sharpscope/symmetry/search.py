"""Search for scale-invariant weights: gradients at a few points, and sums of them over rows and columns of tensors.

Of a gradient only sums over rows and columns of tensors are kept, `Tally`: Euler products and squared norms, from which
those of every candidate follow.  All is done in double precision where the model allows it, on all data.  From `LARGE`
parameters on, candidates are screened in single precision before, on few examples; where examples do not see each other
one of them is enough for a point.  Relations among many tensors are sought among classes of tensors, which differ only
in the numbers in their names, since a stream is written by whole classes.

P parameters, n rows or columns, m points.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from ..autodiff.data import head
from ..autodiff.objective import Objective
from ..display import report
from ..errors import InvalidValue
from .confirmation import DOUBLE, MAX_CANDIDATE_COSINE, SINGLE, Probe, confirmed, factors
from .parts import Left, Part, first, inside, overlap, size, views, whole
from .points import at_ordinary_size, in_double_if_possible, perturbed_by_rank_one, perturbed_by_tensors
from .relations import joint_sets, paired, place, read_by_several, title, zero_runs
from .tally import Axes, Tally, by_lines, cancel, common, largest_cosine, sums

LARGE = 2**18
"""Number of parameters from which few examples and single precision are used at first."""

EXAMPLES = 8
"""Number of examples of most gradients where weights are many."""

LONG, LONG_EXAMPLES = 2**22, (4, 2)
"""Bytes of the graph of an example with many places (pixels, tokens), and how many of these are enough.

First where they see each other, as in batch normalization, then where they do not.
"""

MIN_POINTS = 8
"""Number of points at which runs of rows and pairs are sought."""

GENTLE_FACTOR, MAX_GENTLE = 4.0, 4
"""Factor, give or take a half, at which cosines must have fallen like 1/c at least, and how often it is tried."""

MAX_UNKNOWNS = 24
"""Number of tensors, or classes, up to which relations among them are sought; among the widest classes always."""

MAX_PAIR_CHANGE = {DOUBLE[0]: 1e-6, SINGLE[0]: 1e-4}
"""Largest relative change of the loss where pairs are rescaled by c and 1/c, by the Euler cosine that is rounding."""

MAX_QUIET = 300.0
"""Gradient against the rounding of a typical one, up to which it may be rounding itself."""

SMALL_STEP, MAX_ROUNDING = 1e-8, 1e-12
"""Relative size of a step, and of the second difference of the loss along it, which is rounding."""

LEAST_LEFT = 1e-3
"""Part of the gradient that is left where weights of ordinary size do not extinguish it."""

MAX_DIFFERENCE = 1e-3
"""Largest relative difference of the loss of two examples, together and one by one, that do not see each other."""


class Pair(NamedTuple):
    """Parts that may be rescaled by c and 1/c, and the mismatch of their Euler products."""

    a: Part
    b: Part
    mismatch: float


class Search:
    """Sums of gradients of one objective and the result so far: `groups`, `null`, `pairs`, and what is `left`.

    Raises:
        ValueError: the gradient near the weights is not finite.
    """

    def __init__(self, f: Objective, w: Tensor) -> None:
        self.f, self.count, self.screens = f, 0, f.size >= LARGE
        self.few = f if self.screens else in_double_if_possible(f, w)
        self.w = w.to(self.few.dtype)
        self.axes = [(name, axis) for name, shape in f.shapes.items() for axis in range(min(len(shape), 2) or 1)]
        self.groups: dict[str, Part] = {}
        self.pairs: dict[tuple[str, str], Pair] = {}
        self.joint: Part = ()
        self.raised = not torch.equal(self.w, at_ordinary_size(f, self.w))
        self.near: list[Tally] = []
        self._exact: _Exact | None = None
        self.base = self._base()
        if self.raised and self._is_extinguished():
            self.raised = False
            self.base = self._base()
        if not all(t.is_finite() for t in self.base):
            raise InvalidValue("the gradient near these weights is not finite: no telling what they are invariant to")
        self.left = Left(f)
        self.null = self._null()
        for part in self.null.values():
            self.left.take(part)

    def grad(self, w: Tensor, f: Objective | None = None) -> Tensor:
        """Evaluate a gradient ``(P,)``, on an example or two where nothing else is wanted, and count it."""
        self.count += 1
        report(self.count)
        return (f or self.few).grad(w)

    def tally(self, w: Tensor, f: Objective | None = None, axes: Axes | None = None) -> Tally:
        """Evaluate a gradient and keep its sums."""
        return Tally(self.f, w, self.grad(w, f), self.axes if axes is None else axes)

    def find(self, candidates: Mapping[str, Part] | None = None) -> None:
        """Find groups and pairs among the weights that have an effect, or groups among the candidates alone."""
        if candidates is None:
            self.take(self.left_tensors())
            self.take(self.left_modules())
            if self.left.names():
                self.take_related()
        else:
            null = tuple(p for part in self.null.values() for p in part)
            self.take({name: part for name, part in candidates.items() if not overlap(part, null)})
            self.take(self.left_modules())
        self.confirm()
        self.joint = tuple(p for part in self.groups.values() for p in part)
        rest = tuple(p for name in self.left.names() for p in self.left.rest(name))
        if candidates is not None and rest and self.confirmed({"": self.joint + rest}):
            self.joint += rest

    def take(self, candidates: Mapping[str, Part]) -> None:
        """Add the candidates that are invariant to the groups."""
        near = {n: part for n, part in candidates.items() if largest_cosine(self.base, part) <= MAX_CANDIDATE_COSINE}
        self.add(self._screened(near) if self.screens else near)

    def add(self, candidates: Mapping[str, Part]) -> None:
        """Add the candidates that are invariant in double precision to the groups."""
        for name, part in self.confirmed(candidates).items():
            self.groups[name] = part
            self.left.take(part)

    def confirmed(self, candidates: Mapping[str, Part]) -> Mapping[str, Part]:
        """Keep the candidates that are invariant in double precision, from two points."""
        return self.exact.confirmed_again(self.exact.confirmed(candidates)) if candidates else candidates

    def _screened(self, near: Mapping[str, Part]) -> Mapping[str, Part]:
        """Drop clear cases in single precision, most of them where all are rescaled a little: it saturates nothing."""
        for _ in range(MAX_GENTLE):
            c = factors(list(near), GENTLE_FACTOR)
            after, _ = self._rescale(near, c) if near else (self.base[0], {})
            bounds = {n: max(SINGLE[0], largest_cosine(self.base, part) / c[n]) for n, part in near.items()}
            kept = {n: part for n, part in near.items() if after.cosine(part) <= bounds[n]}
            if len(kept) == len(near):
                break
            near = kept
        probe = Probe(near, self.base, self.base[0], SINGLE[0], partial(self._rescale, near))
        return {name: near[name] for name in confirmed(probe, list(near))}

    def _rescale(self, candidates: Mapping[str, Part], c: Mapping[str, float]) -> tuple[Tally, dict[str, float]]:
        w = rescaled(self.f, self.at.clone(), ((candidates[name], x) for name, x in c.items()))
        after = self.tally(w, axes=_axes(candidates))
        norms = {n: [float(t.of(part)[2]) ** 0.5 for t in (self.base[0], after)] for n, part in candidates.items()}
        return after, {name: abs(c.get(name, 1.0) * there - here) for name, (here, there) in norms.items()}

    @property
    def exact(self) -> "_Exact":
        """Gradients in double precision."""
        if self._exact is None:
            self._exact = _Exact(self)
        return self._exact

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
        found = paired(list(units), sums(points, units), lambda a, b: not overlap(units[a], units[b]))
        self.pairs = {(a, b): Pair(units[a], units[b], mismatch) for (a, b), mismatch in found.items()}
        for pair in self.pairs.values():
            own.pop(next((n for n, part in own.items() if inside(part, pair.a)), ""), None)
        self.add(self._joint(own, points))
        readers = read_by_several(self.f.shapes, list(units), {a for a, _ in self.pairs}, sums(points, units))
        for (vector, *maps), mismatch in readers.items():
            read = tuple(p for name in maps for p in units[name])
            self.pairs[vector, " + ".join(maps)] = Pair(units[vector], read, mismatch)

    def _points(self, numbers: Iterable[int], axes: Axes) -> list[Tally]:
        """Gradients at points far from each other, of the first batch, or of the few examples in turns."""
        found = (
            self.tally(perturbed_by_rank_one(self.f, self.at, 0.5, 10 + i), self.single[i % len(self.single)], axes)
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
            for start, stop in zero_runs(by_lines(points, names, axis), free) if bool(free.any()) else ():
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
            for chosen in joint_sets(labels, sums(points, united)) if len(labels) + 2 <= len(points) else ():
                members = sorted((n for k in chosen for n in classes[k]), key=lambda n: first(self.f, own[n]))
                if cancel(points, [own[n] for n in members]):
                    found[title(members)] = tuple(p for n in members for p in left.pop(n))
        return found

    def confirm(self) -> None:
        """Keep of pairs and null weights those that are there in double precision, from another point, too."""
        if self.groups or self.null or self.pairs:
            if len(self.exact.base) == 1:
                self.exact.enter(2)
            self.base = self.exact.base
            quiet = self.exact.quiet()
            self.null = {n: part for n, part in self.null.items() if inside(part, quiet.get(part[0].name, ()))}
            self.pairs = self.exact.confirmed_pairs(self.pairs)

    def near_weights(self) -> list[Tally]:
        """Gradients near the weights as they are, small or not."""
        return [*self.near, self.tally(perturbed_by_tensors(self.f, self.w, 0.1, 2))] if self.raised else self.base

    def base_point(self, number: int) -> Tensor:
        """Perturb the weights a little, small ones raised to ordinary size where that leaves a gradient."""
        return perturbed_by_tensors(self.f, at_ordinary_size(self.f, self.w) if self.raised else self.w, 0.1, number)

    def _base(self) -> list[Tally]:
        """Choose examples, and form gradients at two points near the weights."""
        self.at, self._exact = self.base_point(1), None
        if not self.screens:
            self.single = [self.few.on([_first_batch(self.few, self.w.device)])]
            self.exact.enter(2)
            return self.exact.base
        for few, single in (few_examples(self.f, self.at), (self.f, [self.f])):
            self.few, self.single = few, single
            found = [self.tally(self.at), self.tally(self.base_point(2))]
            if all(t.is_finite() for t in found):
                break
        return found

    def _is_extinguished(self) -> bool:
        """True where hardly any gradient is left after weights were raised to ordinary size.

        Trained networks may have many small weights, which together decide everything once they are raised.  Compared
        are ``‖w‖‖∇‖`` of rows, to which the size of the weights does not matter.
        """
        self.near = [self.tally(perturbed_by_tensors(self.f, self.w, 0.1, 1))]
        return not self.base[0].size() >= LEAST_LEFT**2 * self.near[0].size()

    def _null(self) -> dict[str, Part]:
        """Find tensors, or runs of entries of a vector, with a gradient at rounding level, also when they are moved.

        Where they are near zero, all others are as they are: raised ones may saturate an output.  Few examples are not
        enough in the end: some weights matter to few of them.
        """
        rounding = SINGLE[1]
        quiet, silent = (
            common([t.quiet(self.f, zero) for t in self.base]) for zero in (MAX_QUIET * rounding, rounding)
        )
        quiet = common([quiet, self.exact.quiet()]) if quiet else quiet
        for keep, distance in ((0, 0.1), (1, 3), (1, -3)):
            quiet = self._quiet_far(quiet, keep, distance, self.exact.f, self.exact.zero)
        if self.screens:
            loud = {name: part for name, part in quiet.items() if name not in silent}
            quiet = loud | self._quiet_far(common([quiet, silent]), 1, 3, self.f, rounding)
        return {
            name if part == (whole(self.f, name),) else f"{name}[{p.start}:{p.stop}]": (p,)
            for name, part in quiet.items()
            for p in part
        }

    def _quiet_far(
        self, quiet: dict[str, Part], keep: float, distance: float, f: Objective, zero: float
    ) -> dict[str, Part]:
        """Keep what is quiet where it is moved: multiplied by `keep`, and some distance added."""
        if not quiet:
            return quiet
        w = (self.at if keep else perturbed_by_tensors(self.f, self.w, 0.1, 1)).to(f.dtype, copy=True)
        for v in views(self.f, w, tuple(p for part in quiet.values() for p in part)):
            random = torch.randn(v.shape, generator=torch.Generator().manual_seed(5)).to(v)
            step = (1 + v.abs()) * (random + random.sign()) if keep else random
            v.mul_(keep).add_(step, alpha=distance)
        t = self.tally(w, f, [(name, 0) for name in self.f.slices])
        return common([quiet, t.quiet(self.f, zero)])


class _Exact:
    """Gradients of a search in double precision where the model allows it, at the base points.

    At small sizes both gradients are kept, at large ones the last.
    """

    def __init__(self, search: Search) -> None:
        self.search, self.number = search, 0
        self.f = in_double_if_possible(search.few, search.at) if search.screens else search.few
        self.floor, self.zero = DOUBLE if self.f.dtype is torch.float64 else SINGLE
        self.tallies: dict[int, Tally] = {}
        self.gradients: dict[int, Tensor] = {}
        self.enter(1)

    @property
    def base(self) -> list[Tally]:
        """Sums at the points that were entered."""
        return list(self.tallies.values())

    def enter(self, number: int) -> None:
        """Go to a base point, and form the gradient there."""
        self.number, self.search.at = number, self.search.base_point(number)
        if number in self.gradients:
            return
        if self.search.screens:
            self.gradients.clear()
        w = self.search.at.to(self.f.dtype)
        g = self.search.grad(w, self.f)
        self.tallies[number] = Tally(self.search.f, w, g, self.search.axes)
        self.gradients[number] = g.to(self.search.at.dtype)

    def confirmed(self, candidates: Mapping[str, Part]) -> dict[str, Part]:
        """Keep the candidates that pass the test from this point."""
        found = confirmed(self._probe(candidates), list(candidates))
        if len(found) < len(candidates) and not self._rounds_in_double:
            self.floor, self.zero = SINGLE
            found = confirmed(self._probe(candidates), list(candidates))
        return {name: candidates[name] for name in found}

    def confirmed_again(self, groups: Mapping[str, Part]) -> dict[str, Part]:
        """Keep the groups that pass the test from the other point too, unless cosines leave no doubt."""
        doubtful = {name: part for name, part in groups.items() if largest_cosine(self.base, part) > self.floor}
        if doubtful:
            self.enter(3 - self.number)
        passed = self.confirmed(doubtful)
        return {name: part for name, part in groups.items() if name not in doubtful or name in passed}

    def quiet(self) -> dict[str, Part]:
        """Find what has a gradient at rounding level at all points, in the tensors and runs of entries of vectors."""
        quiet, louder = (common([t.quiet(self.search.f, zero) for t in self.base]) for zero in (self.zero, SINGLE[1]))
        if quiet == louder or self._rounds_in_double:
            return quiet
        self.floor, self.zero = SINGLE
        return louder

    def _probe(self, candidates: Mapping[str, Part]) -> Probe:
        return Probe(candidates, self.base, self.tallies[self.number], self.floor, partial(self._rescale, candidates))

    def _rescale(self, candidates: Mapping[str, Part], c: Mapping[str, float]) -> tuple[Tally, dict[str, float]]:
        f, before = self.search.f, self.gradients[self.number]
        w = rescaled(f, self.search.at.to(self.f.dtype, copy=True), ((candidates[name], x) for name, x in c.items()))
        g = self.search.grad(w, self.f)
        changes = {
            name: sum(
                torch.add(-v, after, alpha=c.get(name, 1.0)).square().sum().item()
                for after, v in zip(views(f, g, part), views(f, before, part), strict=True)
            )
            ** 0.5
            for name, part in candidates.items()
        }
        return Tally(f, w, g, _axes(candidates)), changes

    def confirmed_pairs(
        self, pairs: Mapping[tuple[str, str], Pair], before: float | None = None
    ) -> dict[tuple[str, str], Pair]:
        """Keep the pairs that leave the loss as it was `before` when rescaled together, or in ever smaller sets."""
        if not pairs:
            return {}
        moves: list[tuple[Part, float]] = []
        random = torch.rand(len(pairs), generator=torch.Generator().manual_seed(3)).tolist()
        for pair, r in zip(pairs.values(), random, strict=True):
            moves += [(pair.a, 2 + r), (pair.b, 1 / (2 + r))]
        w = self.search.at.to(self.f.dtype, copy=True)
        before = self.f.value(w).item() if before is None else before
        after = self.f.value(rescaled(self.search.f, w, moves)).item()
        if abs(after - before) <= MAX_PAIR_CHANGE[self.floor] * abs(before):
            return dict(pairs)
        names, half = list(pairs), len(pairs) // 2
        halves = (names[:half], names[half:]) if half else ()
        return {n: p for part in halves for n, p in self.confirmed_pairs({n: pairs[n] for n in part}, before).items()}

    @cached_property
    def _rounds_in_double(self) -> bool:
        """True where rounding inside the model is that of double precision: it may cast to single precision."""
        here = self.search.at.double()
        value, *around = (
            (
                self.f.value(w).item()
                for w in (here, *(perturbed_by_rank_one(self.f, here, step, 4) for step in (SMALL_STEP, -SMALL_STEP)))
            )
            if self.f.dtype is torch.float64
            else (0.0, 1.0)
        )
        return abs(sum(around) - 2 * value) <= MAX_ROUNDING * abs(value)


def few_examples(f: Objective, w: Tensor) -> tuple[Objective, list[Objective]]:
    """Choose a few examples for tests, and single ones for points in turns, where examples do not see each other."""
    long, form = f.graph_bytes_per_example >= LONG, f.form
    taken = head(f.source, LONG_EXAMPLES[0] if long else EXAMPLES, form)
    taken = [batch for batch in taken if form.size(batch) > 1] or taken  # batch normalization refuses one example
    together = f.on(taken)
    if not all(f.processes.each(lambda: all(form.can_be_cut(b) or form.size(b) == 1 for b in taken))):
        return together, [together]
    rows = [form.cut(batch, slice(i, i + 1)) for batch in taken for i in range(form.size(batch))]
    try:
        one_by_one, both = f.on(rows[:2]).value(w).item(), f.on(head(taken, 2, f.form)).value(w).item()
    except Exception:  # whatever a module raises that needs several examples
        return together, [together]
    if not abs(one_by_one - both) <= MAX_DIFFERENCE * abs(both):
        return together, [together]
    if long:
        together = f.on(head(taken, LONG_EXAMPLES[1], form))
    return together, [f.on(rows[i : i + 1]) for i in range(max(f.processes.each(lambda: len(rows))))]


def _first_batch(f: Objective, device: torch.device) -> object:
    batches = f.batches(device)
    with closing(batches):
        return next(batches).raw


def rescaled(f: Objective, w: Tensor, moves: Iterable[tuple[Part, float]]) -> Tensor:
    """Multiply parts of `w` in place."""
    for part, c in moves:
        for v in views(f, w, part):
            v.mul_(c)
    return w


def _axes(parts: Mapping[str, Part]) -> Axes:
    return {(p.name, p.axis) for part in parts.values() for p in part}


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
