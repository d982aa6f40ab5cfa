"""A study under several seeds: what a claim's number comes to, and on how many of them it holds.

Nothing is assumed about how the numbers are spread.  The interval of the median is that between two order statistics
x_(k) and x_(n+1-k), which miss the median with probability 2 P(Bin(n, 1/2) < k); that of the share of seeds on which a
claim holds is the exact one of Clopper and Pearson.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .claims import CONTROL, Claim, Verdict

CONFIDENCE = 0.95

LEAST_FRACTION = 0.9
"""A claim holds over seeds if it holds on this share of them; a negative control on all."""

Key = tuple[str, str]
"""Part and sentence of a claim."""


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its median and range, and the interval of the median (None where seeds are too few)."""

    label: str
    median: float
    low: float
    high: float
    interval: tuple[float, float] | None
    missing: int  # seeds on which there is no such number


@dataclass(frozen=True)
class Repeated:
    """A claim over seeds: the verdict, and what it rests on."""

    verdict: Verdict
    spreads: tuple[Spread, ...]
    passes: int
    seeds: int
    fraction: tuple[float, float]  # interval of the share of seeds on which it holds


def repeated_claims(claims: Sequence[Claim], runs: Sequence[Sequence[Verdict]]) -> list[Repeated]:
    """The claims over the verdicts of several runs; those that some run did not decide are left out."""
    found = [{(v.part, v.claim): v for v in verdicts} for verdicts in runs]
    return [_repeated(c, [f[c.part, c.sentence] for f in found]) for c in claims if _decided(c, found)]


def _decided(claim: Claim, found: Sequence[Mapping[Key, Verdict]]) -> bool:
    return bool(found) and all((claim.part, claim.sentence) in f for f in found)


def _repeated(claim: Claim, verdicts: Sequence[Verdict]) -> Repeated:
    seen = [v.observed if isinstance(v.observed, tuple) else (v.observed,) for v in verdicts]
    pick = claim.criterion.pick
    if pick is not None or all(len(values) == 1 for values in seen):
        numbers = {"": [pick(v) if pick and v else v[0] if v else math.nan for v in seen]}
    else:  # every number has to meet the criterion: it is decided at the ends
        numbers = {
            "least": [min(v, default=math.nan) for v in seen],
            "greatest": [max(v, default=math.nan) for v in seen],
        }
    spreads = tuple(spread(label, values) for label, values in numbers.items())
    passes, n = sum(v.passed for v in verdicts), len(verdicts)
    needed = n if claim.kind == CONTROL else math.ceil(LEAST_FRACTION * n - 1e-9)
    verdict = dataclasses.replace(
        verdicts[0],
        observed=tuple(s.median for s in spreads) if len(spreads) > 1 else spreads[0].median,
        criterion=f"{claim.criterion.text}, on {needed} of {n} seeds",
        passed=passes >= needed,
    )
    return Repeated(verdict, spreads, passes, n, fraction_interval(passes, n))


def spread(label: str, values: Sequence[float]) -> Spread:
    """Median, range and interval of those values that are numbers."""
    there = sorted(v for v in values if not math.isnan(v))
    if not there:
        return Spread(label, math.nan, math.nan, math.nan, None, len(values))
    ends = median_interval(there)
    return Spread(label, statistics.median(there), there[0], there[-1], ends, len(values) - len(there))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The narrowest interval between order statistics that holds the median so often; None below six values.

    >>> median_interval([1, 2, 3, 4, 5]), median_interval([1, 2, 3, 4, 5, 6]), median_interval(range(1, 11))
    (None, (1, 6), (2, 9))
    """
    ordered, n = sorted(values), len(values)
    k = 0
    while 2 * sum(math.comb(n, i) for i in range(k + 1)) <= (1 - confidence) * 2**n:
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None


def fraction_interval(passes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of Clopper and Pearson for the probability of what happened `passes` times of `n`.

    >>> [round(end, 4) for end in fraction_interval(9, 10)], fraction_interval(0, 0)
    ([0.555, 0.9975], (0.0, 1.0))
    """
    miss = (1 - confidence) / 2

    def at_least(p: float) -> float:
        """The probability of at least `passes` among n."""
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(passes, n + 1))

    def at_most(p: float) -> float:
        """The probability of at most `passes` among n."""
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(passes + 1))

    low = 0.0 if passes == 0 else _crossing(lambda p: at_least(p) - miss)
    high = 1.0 if passes == n else _crossing(lambda p: miss - at_most(p))
    return low, high


def _crossing(rising: Callable[[float], float]) -> float:
    """Find the zero of a function that rises on [0, 1], by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
