"""Studies: the names that each of them defines, and where they are found.

A study is a module of `sharpscope.studies`, or of any installed package that names it under the entry-point group
``sharpscope.studies``, with these names:

    PAPER     who claims what, in one line
    Config    a frozen dataclass: everything that turns; its defaults are the full size
    QUICK     the same with small sizes
    jobs      Config -> the independent runs it consists of
    CLAIMS    sentences as numbers, with criteria that can fail
    CHARTS    what to look at

Modules whose names begin with an underscore are shared by studies and are none themselves.
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from ...errors import NotFound
from ...report.charts import Chart, SphereChart
from .claims import Claim

STUDIES = "sharpscope.studies"
"""The package of the studies, and the entry-point group of those of other packages."""


@dataclass(frozen=True)
class Job:
    """One independent run: ``work(log, progress, **arguments)`` in a process of its own.

    `work` is a module-level function.  It appends rows to the log, leaves checkpoints, and calls
    ``progress(fraction)`` with the fraction of its work that is done.  `cost` is its rough duration in seconds, for the
    order of execution and the progress bar.  `data` says, when called, what the data are that it reads, by name, for
    the record of the run.
    """

    name: str
    work: Callable[..., None]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 1.0
    data: Callable[[], Mapping[str, str]] = dict


Progress = Callable[[float], None]


class Study(Protocol):
    """The names a study module defines."""

    __name__: str
    __doc__: str | None
    PAPER: str
    Config: type
    QUICK: Any
    CLAIMS: Sequence[Claim]
    CHARTS: Sequence[Chart | SphereChart]

    @staticmethod
    def jobs(config: Any) -> Sequence[Job]: ...


def known() -> list[str]:
    """The names of all studies, none of which is imported."""
    return sorted({*_own(), *elsewhere()})


def _own() -> set[str]:
    """The names of the studies of this package."""
    package = importlib.import_module(STUDIES)
    return {m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}


def elsewhere() -> dict[str, EntryPoint]:
    """The studies of other installed packages, by name; a name of this package's own is not among them."""
    own = _own()
    return {entry.name: entry for entry in entry_points(group=STUDIES) if entry.name not in own}


def discover() -> dict[str, Study]:
    """Every study of this package, by name."""
    return {name: find(name) for name in sorted(_own())}


def find(name: str) -> Study:
    """The study called `name`.

    Raises:
        LookupError: there is none; the message names the nearest.
    """
    names = known()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.3)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"
        raise NotFound(f"there is no study '{name}'; {hint}")
    others = elsewhere()
    module: Any = others[name].load() if name in others else importlib.import_module(f"{STUDIES}.{name}")
    return module


def headings(study: Study) -> tuple[str, str]:
    """Title and argument of a study: the first two paragraphs of its docstring, each in one line."""
    title, argument, *_ = [*paragraphs(study), "", ""]
    return " ".join(title.split()).rstrip("."), " ".join(argument.split())


def paragraphs(study: Study) -> list[str]:
    """Cut the docstring of a study into paragraphs; lines that are indented more than the rest are equations."""
    return inspect.cleandoc(study.__doc__ or "").split("\n\n")
