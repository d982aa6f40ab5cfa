"""Tell invariance from chance: the Euler cosine falls like 1/c² where candidates are rescaled by c.

Where it is felt at the weights themselves it has to fall exactly so, as that of an eps does.

The one test of all searches, whatever their candidates are made of and their gradients kept as: they show these through
a `Probe`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

MAX_CANDIDATE_COSINE = 2e-2
"""Largest Euler cosine, at weights of ordinary size, of a candidate that is tested at larger weights."""

FACTOR = 300.0
"""Factor, give or take a half, at which the Euler cosine must have fallen like 1/c²."""

MAX_CHANGE = 0.5
"""Largest relative change of ``c ∇_g`` there.  Single examples may have a variance near eps."""

FELT = 1e-4
"""Euler cosine, at weights of ordinary size, from which it is looked at whether an eps leaves it."""

FARTHER = (5.0, 50.0)
"""Factors beyond the one of the test at which the cosine is compared."""

SAME = 0.02
"""Largest relative difference of the cosine times c² between them: rounding, and examples of little variance."""

DOUBLE, SINGLE = (1e-10, 1e-12), (3e-5, 1e-5)
"""Euler cosines, and gradients against the typical one, that are rounding."""


class Rescaled(Protocol):
    """The gradient after some candidates were rescaled."""

    def cosine(self, name: str) -> float:
        """Euler cosine of a candidate there."""

    def is_alive(self, name: str, c: float) -> bool:
        """True unless the gradient of a candidate that was rescaled by c has vanished."""

    def agrees(self, name: str, c: float) -> bool:
        """True where ``c ∇_g`` of a candidate that was rescaled by c is about the same as before."""


class Probe(Protocol):
    """Gradients near the weights, as the test of candidates sees them."""

    floor: float

    def cosine(self, name: str) -> float:
        """Largest Euler cosine of a candidate over all points."""

    def cosine_here(self, name: str) -> float:
        """Euler cosine of a candidate at the point that is rescaled."""

    def products(self, name: str) -> Tensor:
        """Euler products of a candidate at all points."""

    def rescaled(self, factors: Mapping[str, float]) -> Rescaled:
        """Rescale candidates by their factors, and evaluate the gradient there."""


def confirmed(probe: Probe, candidates: Iterable[str]) -> list[str]:
    """Keep the candidates whose Euler cosine falls like 1/c² when each is rescaled by its own c.

    The others are dropped, the clearest cases first, since they change the gradients of the rest.  Candidates with the
    same Euler product (layers that act as one) are rescaled in turns: together they fall twice as fast.  At the end
    ``c ∇_g`` must be the same as before; a set in which it is not is halved.
    """
    tested = list(candidates)
    turn, last = 0, 0
    while tested and turn <= last:
        turns = _turns(probe, tested)
        c = factors([name for name in tested if turns[name] == turn])
        after = probe.rescaled(c)
        slow = _slow(probe, after, c) or _bent(probe, after, c)
        if slow:
            tested = [name for name in tested if name not in slow]
            turn, last = 0, 0
        elif all(after.agrees(name, c.get(name, 1.0)) for name in tested):
            turn, last = turn + 1, max(turns.values())
        else:
            half = len(tested) // 2
            halves = (tested[:half], tested[half:]) if half else ()
            return [name for part in halves for name in confirmed(probe, part)]
    return tested


def _slow(probe: Probe, after: Rescaled, c: Mapping[str, float]) -> set[str]:
    """Find the candidates whose cosine does not fall; if all fall, those where it does like 1/c, alone or by eps.

    A gradient that has vanished (in what another has saturated) is no evidence.
    """
    alive = [name for name in c if after.is_alive(name, c[name])]
    cosines = {name: after.cosine(name) for name in alive}
    bounds = {name: (probe.cosine(name), probe.cosine_here(name)) for name in alive}
    for at, power, factor in ((0, -0.5, 1), (1, -1.5, 1), (1, -2, 10)):
        slow = {n for n in alive if cosines[n] > max(probe.floor, bounds[n][at] * c[n] ** power * factor)}
        if slow:
            return slow
    return set()


def _bent(probe: Probe, after: Rescaled, c: Mapping[str, float]) -> set[str]:
    """Find the candidates whose cosine, where it is felt at the weights, does not fall by the law of an eps.

    Activations that are homogeneous but for small inputs (GELU, SiLU, softplus) look like an eps from afar, but leave a
    cosine that counts the few inputs that are small still, or vanishes.  That of an eps times c² is one number.
    """
    felt = [name for name in c if probe.cosine(name) > FELT and after.is_alive(name, c[name])]
    if not felt or probe.floor > DOUBLE[0]:
        return set()
    near, far = (probe.rescaled({**c, **{name: k * c[name] for name in felt}}) for k in FARTHER)
    ratio = (FARTHER[1] / FARTHER[0]) ** 2
    return {n for n in felt if not abs(ratio * far.cosine(n) - near.cosine(n)) <= SAME * near.cosine(n)}


def factors(names: Sequence[str], typical: float = FACTOR) -> dict[str, float]:
    """Draw a factor for each of the candidates."""
    random = torch.rand(len(names), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return dict(zip(names, (typical * (0.5 + random)).tolist(), strict=True))


def _turns(probe: Probe, tested: Sequence[str]) -> dict[str, int]:
    """Count the candidates before each one that have the same Euler product, to more than rounding."""
    turns = dict.fromkeys(tested, 0)
    inexact = [name for name in tested if probe.cosine(name) > probe.floor]
    if inexact:
        products = torch.stack([probe.products(name) for name in inexact])
        same = ((products[:, None] - products).abs() <= 1e-3 * products[:, None].abs()).all(dim=2)
        turns |= dict(zip(inexact, same.tril(-1).sum(dim=1).tolist(), strict=True))
    return turns
