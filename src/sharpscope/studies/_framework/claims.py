"""Claims of a study: sentences with numbers, and the criteria that decide them.

>>> within(1.9, 2.5)((2.05, 2.27)), within(1.9, 2.5).text
(True, 'within [1.9, 2.5]')
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ...errors import InvalidValue
from ...records.history import History
from ...report.charts import Chart, SphereChart

Observed = float | tuple[float, ...]
WIDER = "wider claim"  # of the paper, beyond what decides: where it fails, a report says "not supported here"
KINDS = ("identity", "inequality", "scaling", "comparison", "negative control", WIDER)


@dataclass(frozen=True)
class Criterion:
    """A test of an observed number (where there are several: of every one, or of what `pick` makes of them)."""

    text: str
    test: Callable[[float], bool]
    pick: Callable[[tuple[float, ...]], float] | None = None

    def __call__(self, observed: Observed) -> bool:
        values = observed if isinstance(observed, tuple) else (observed,)
        if self.pick is not None and values:
            values = (self.pick(values),)
        return len(values) > 0 and all(math.isfinite(v) and self.test(v) for v in values)


def at_most(bound: float) -> Criterion:
    return Criterion(f"at most {bound:g}", lambda v: v <= bound)


def at_least(bound: float) -> Criterion:
    return Criterion(f"at least {bound:g}", lambda v: v >= bound)


def within(low: float, high: float) -> Criterion:
    return Criterion(f"within [{low:g}, {high:g}]", lambda v: low <= v <= high)


def median(criterion: Criterion) -> Criterion:
    """The criterion on the median of several numbers: for repeats of a chaotic run under other seeds."""
    return Criterion(f"median {criterion.text}", criterion.test, statistics.median)


@dataclass(frozen=True)
class Tested:
    """A number with the criterion that it has to meet, such as ``run("BN")["loss"].last() <= 1``."""

    observe: Callable[[History, Any], Observed]
    criterion: Criterion

    def in_the_median(self) -> "Tested":
        """Test the median over the repeats instead, which scatter in chaotic runs."""
        return replace(self, criterion=median(self.criterion))


@dataclass(frozen=True)
class Claim:
    """A sentence, the number that decides it, and the criterion the number has to meet.

    `observe` takes the history and the configuration as it was run: a `Quantity` of `observe`, or a function.  `runs`
    are the runs it reads, which a quantity knows itself: where a configuration leaves one of them out, the claim is not
    decided, and the report says so.  A wider claim never decides.
    """

    sentence: str
    observe: Callable[[History, Any], Observed]
    criterion: Criterion
    kind: str
    part: str = ""  # heading under which the report groups it
    runs: tuple[str, ...] = ()
    deciding: bool = True
    note: str = ""  # one sentence on how to read it

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidValue(f"kind '{self.kind}' of the claim '{self.sentence}' is none of {', '.join(KINDS)}")
        runs = self.runs or tuple(getattr(self.observe, "runs", ()))
        if not runs:
            raise InvalidValue(f"the claim '{self.sentence}' does not say which runs it reads; give runs=")
        object.__setattr__(self, "runs", runs)
        object.__setattr__(self, "deciding", self.deciding and self.kind != WIDER)

    def decide(self, study: str, history: History, config: Any) -> "Verdict":
        """The verdict on this claim; a quantity that cannot be formed (a run that broke off) does not pass."""
        try:
            observed = self.observe(history, config)
        except (KeyError, IndexError, ValueError, ZeroDivisionError):
            observed = math.nan
        return Verdict(
            study,
            self.sentence,
            observed,
            self.criterion.text,
            self.kind,
            self.criterion(observed),
            self.part,
            self.deciding,
            self.note,
        )


@dataclass(frozen=True)
class Verdict:
    """One claim, the number that was observed for it, and whether it holds."""

    study: str
    claim: str
    observed: Observed
    criterion: str
    kind: str
    passed: bool
    part: str = ""  # heading under which the report groups it
    deciding: bool = True  # False: reported, does not decide
    note: str = ""  # one sentence on how to read it

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Verdict":
        """From JSON, where tuples have become lists and what is not finite None."""
        seen = fields["observed"]
        many = isinstance(seen, list)
        values = tuple(math.nan if v is None else float(v) for v in (seen if many else [seen]))
        return cls(**{**fields, "observed": values if many else values[0]})


CONTROL = "negative control"


def identity(sentence: str, test: Tested, **more: Any) -> Claim:
    """Claim that two ways to compute a number agree, or that a law holds to rounding."""
    return Claim(sentence, test.observe, test.criterion, "identity", **more)


def inequality(sentence: str, test: Tested, **more: Any) -> Claim:
    """Claim that a number keeps a bound that theory gives."""
    return Claim(sentence, test.observe, test.criterion, "inequality", **more)


def scaling(sentence: str, test: Tested, **more: Any) -> Claim:
    """Claim that a number depends on another in a certain power, or not at all."""
    return Claim(sentence, test.observe, test.criterion, "scaling", **more)


def comparison(sentence: str, test: Tested, **more: Any) -> Claim:
    """Claim that one run comes out above or below another."""
    return Claim(sentence, test.observe, test.criterion, "comparison", **more)


def control(sentence: str, test: Tested, **more: Any) -> Claim:
    """Claim, as a negative control, that the effect is absent where the hypothesis is broken."""
    return Claim(sentence, test.observe, test.criterion, CONTROL, **more)


def wider_claim(sentence: str, test: Tested, **more: Any) -> Claim:
    """Claim what a paper says beyond what decides: where it fails, a report says "not supported here"."""
    return Claim(sentence, test.observe, test.criterion, WIDER, **more)


Presented = TypeVar("Presented", bound="Claim | Chart | SphereChart")


def under(part: str, *items: Presented) -> tuple[Presented, ...]:
    """Claims or charts with `part` as the heading under which a report shows them."""
    return tuple(replace(item, part=part) for item in items)


def in_the_median(*claims: Claim) -> tuple[Claim, ...]:
    """Claims that are decided by the median over the repeats, which scatter in chaotic runs."""
    return tuple(replace(claim, criterion=median(claim.criterion)) for claim in claims)


def labelled(labels: Mapping[str, str], *charts: Chart) -> tuple[Chart, ...]:
    """Charts whose axes, where they have no label yet, are labelled by their columns."""
    return tuple(
        replace(chart, x_label=chart.x_label or labels[chart.x], y_label=chart.y_label or labels[chart.y])
        for chart in charts
    )
