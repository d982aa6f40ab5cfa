"""Tell invariance from chance: the Euler cosine falls like 1/c² where candidates are rescaled by c.

Where it is felt at the weights themselves it has to fall exactly so, as that of an eps does.

The test is the same in single precision, where it screens, and in double precision, where it decides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .parts import Part
from .tally import Tally, largest_cosine

MAX_CANDIDATE_COSINE = 2e-2
"""Largest Euler cosine, at weights of ordinary size, of a candidate that is tested at larger weights."""

FACTOR = 300.0
"""Factor, give or take a half, at which the Euler cosine must have fallen like 1/c²."""

MAX_CHANGE = 0.5
"""Largest relative change of ``c ∇_g`` there, or from there on: single channels may have a variance below eps."""

FURTHER, MAX_RATIO = (5.0, 30.0, 12.0, 80.0), 0.3
"""Factors, in turns, by which candidates are rescaled once more where they fail, and the error of 1/c² from there on.

They differ, since what falls like 1/c² because two maps in a row fall like 1/c each then shows.
"""

MIN_ALIVE = 1e-6
"""Least relative size of ``c ∇_g`` there that is a gradient."""

FELT = 1e-4
"""Euler cosine, at weights of ordinary size, from which it is looked at whether an eps leaves it."""

FARTHER = (5.0, 50.0)
"""Factors beyond the one of the test at which the cosine is compared."""

SAME = 0.02
"""Largest relative difference of the cosine times c² between them: rounding, and examples of little variance."""

DOUBLE, SINGLE = (1e-10, 1e-12), (3e-5, 1e-5)
"""Euler cosines, and gradients against the typical one, that are rounding."""


Rescale = Callable[[Mapping[str, float]], tuple[Tally, Mapping[str, float]]]
"""Multiply candidates by factors c; return sums of the gradient there, and norms of the change of ``c ∇`` of each."""


@dataclass(frozen=True)
class Probe:
    """Candidates, sums of gradients at points near the weights, one of these, and how it is rescaled.

    `floor` is the Euler cosine that is rounding.
    """

    candidates: Mapping[str, Part]
    base: Sequence[Tally]
    here: Tally
    floor: float
    rescale: Rescale

    def cosine(self, name: str) -> float:
        """Largest Euler cosine of a candidate over all points."""
        return largest_cosine(self.base, self.candidates[name])

    def norm(self, t: Tally, name: str) -> float:
        """Norm of the gradient of a candidate."""
        return float(t.of(self.candidates[name])[2]) ** 0.5


def confirmed(probe: Probe, candidates: Sequence[str]) -> list[str]:
    """Keep the candidates whose Euler cosine falls like 1/c² when each is rescaled by its own c.

    The others are dropped, the clearest cases first, since they change the gradients of the rest.  Candidates with the
    same Euler product (layers that act as one) are rescaled in turns: together they fall twice as fast.  At the end
    ``c ∇_g`` must not change; a set in which it does is halved.  Where a variance is below eps both may hold from
    larger weights on only, so all are rescaled by `FURTHER` once more where some fail.
    A gradient that has vanished (in what another has saturated) is no evidence.
    """
    tested = list(candidates)
    turn, last = 0, 0
    while tested and turn <= last:
        turns = _turns(probe, tested)
        c = factors([name for name in tested if turns[name] == turn])
        after, changes = probe.rescale(c)
        dead = [n for n in tested if c.get(n, 1.0) * probe.norm(after, n) <= MIN_ALIVE * probe.norm(probe.here, n)]
        alive = {n: x for n, x in c.items() if n not in dead}
        slow = {n for n, x in alive.items() if _cosine(probe, after, n) > max(probe.floor, probe.cosine(n) / x**0.5)}
        late = [n for n, x in alive.items() if not _falls(probe, after, n, x)]
        changed = [n for n in tested if changes[n] > MAX_CHANGE * probe.norm(probe.here, n)]
        if not slow and (late or changed):
            more = {n: FURTHER[i % len(FURTHER)] for i, n in enumerate(c)}
            beyond, _ = probe.rescale({n: more[n] * x for n, x in c.items()})
            changed = dead or [
                n for n in tested if not _same(probe.norm(after, n), more.get(n, 1.0) * probe.norm(beyond, n))
            ]
            slow = {n for n in alive if not _steady(probe, after, beyond, n, more[n])}
        if not slow and not changed:
            slow = _bent(probe, alive)
        if slow:
            tested = [name for name in tested if name not in slow]
            turn, last = 0, 0
        elif changed:
            half = len(tested) // 2
            halves = (tested[:half], tested[half:]) if half else ()
            return [name for part in halves for name in confirmed(probe, part)]
        else:
            turn, last = turn + 1, max(turns.values())
    return tested


def _cosine(probe: Probe, t: Tally, name: str) -> float:
    return t.cosine(probe.candidates[name])


def _falls(probe: Probe, after: Tally, name: str, c: float) -> bool:
    """True where the Euler cosine of a candidate falls about like 1/c², or to rounding: alone or by eps it does."""
    bound = _cosine(probe, probe.here, name) * min(c**-1.5, 10 * c**-2)
    return _cosine(probe, after, name) <= max(probe.floor, bound)


def _steady(probe: Probe, after: Tally, beyond: Tally, name: str, c: float) -> bool:
    """True where the Euler cosine is rounding, or falls like 1/c² by its own factor alone."""
    here, there = _cosine(probe, after, name), _cosine(probe, beyond, name)
    return there <= probe.floor or abs(there * c**2 - here) <= MAX_RATIO * here


def _same(here: float, there: float) -> bool:
    return abs(there - here) <= MAX_CHANGE * here


def _bent(probe: Probe, c: Mapping[str, float]) -> set[str]:
    """Find the candidates whose cosine, where it is felt at the weights, does not fall by the law of an eps.

    Activations that are homogeneous but for small inputs (GELU, SiLU, softplus) look like an eps from afar, but leave a
    cosine that counts the few inputs that are small still, or vanishes.  That of an eps times c² is one number.
    """
    felt = [name for name in c if probe.cosine(name) > FELT]
    if not felt or probe.floor > DOUBLE[0]:
        return set()
    near, far = (probe.rescale({n: k * x if n in felt else x for n, x in c.items()})[0] for k in FARTHER)
    ratio = (FARTHER[1] / FARTHER[0]) ** 2
    return {
        n
        for n in felt
        if not abs(ratio * _cosine(probe, far, n) - _cosine(probe, near, n)) <= SAME * _cosine(probe, near, n)
    }


def factors(names: Sequence[str], typical: float = FACTOR) -> dict[str, float]:
    """Draw a factor for each of the candidates."""
    random = torch.rand(len(names), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return dict(zip(names, (typical * (0.5 + random)).tolist(), strict=True))


def _turns(probe: Probe, tested: Sequence[str]) -> dict[str, int]:
    """Count the candidates before each one that have the same Euler product, to more than rounding."""
    turns = dict.fromkeys(tested, 0)
    inexact = [name for name in tested if probe.cosine(name) > probe.floor]
    if inexact:
        products = torch.stack([torch.stack([t.of(probe.candidates[n])[0] for t in probe.base]) for n in inexact])
        same = ((products[:, None] - products).abs() <= 1e-3 * products[:, None].abs()).all(dim=2)
        turns |= dict(zip(inexact, same.tril(-1).sum(dim=1).tolist(), strict=True))
    return turns
