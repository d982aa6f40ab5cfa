"""A batch of runs on one engine: one study, one study under several seeds, or all studies side by side.

The directory of all studies holds one directory per study, ``all.json`` (what was asked) and ``index.html``.  That of a
study under several seeds holds one per seed, ``seeds.json`` (seeds, and each claim over them) and ``index.html``.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...errors import InvalidValue, Unusable
from ...records.fields import from_fields
from ...records.files import is_draft, read_json, write_json, write_whole
from ...report.html import write_page
from .claims import Verdict
from .engines import local
from .pages import StudyRow, overview, seeds_page
from .pool import Engine, Failed, failed, work_off
from .run import (
    CONFIG,
    ENVIRONMENT,
    ERROR,
    HISTORY,
    PREVIEW,
    RUNS,
    SEEDS,
    Run,
    damage,
    explained,
    run_in,
    stopped,
    unfinished,
    unfinished_jobs,
)
from .seeds import Repeated, repeated_claims
from .study import find, headings
from .study import known as known
from .workers import KILLED

ALL = "all.json"
INDEX = "index.html"
UNFINISHED = "the run in {} is not finished; repeat its `sharpscope run` command to go on with it"

Outcome = list[Verdict] | Unusable
"""The verdicts on a run, or why there are none."""


@dataclass
class Entry:
    """A study of a batch, with its runs by seed (None: the one run it has), and what became of them."""

    study: str
    out: Path
    runs: Mapping[int | None, Run]
    note: str = ""
    outcomes: dict[int | None, Outcome] = field(default_factory=dict)
    trouble: str = ""  # with the page over seeds

    @property
    def seeds(self) -> int:
        """The number of seeds, or zero for a single run."""
        return 0 if None in self.runs else len(self.runs)

    @property
    def page(self) -> Path:
        """The page that a person opens."""
        return self.out / (INDEX if self.seeds else "report.html")

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts on the one run, or over all seeds that have ended."""
        if self.seeds:
            return [r.verdict for r in self.repeated]
        outcome = self.outcomes.get(None)
        return outcome if isinstance(outcome, list) else []

    @property
    def repeated(self) -> list[Repeated]:
        """The claims over the seeds that have ended."""
        ended = [o for o in self.outcomes.values() if isinstance(o, list)]
        return repeated_claims(find(self.study).CLAIMS, ended) if ended else []

    @property
    def failures(self) -> list[str]:
        """The reasons why a run has no verdicts, or the seeds no page."""
        found = [str(o) for o in self.outcomes.values() if isinstance(o, Unusable)]
        return list(dict.fromkeys([*found, self.trouble] if self.trouble else found))

    @property
    def seconds(self) -> float:
        """Processor time of all its runs, as far as they are concluded."""
        return sum(_seconds(run.out) for run in self.runs.values())

    @property
    def done(self) -> bool:
        """True when every run has an outcome."""
        return self.outcomes.keys() == self.runs.keys()

    @property
    def stopped(self) -> dict[str, str]:
        """The jobs that ended early, and why."""
        found: dict[str, str] = {}
        for seed, run in self.runs.items():
            if isinstance(self.outcomes.get(seed), list):
                suffix = "" if seed is None else f", seed {seed}"
                found |= {job + suffix: note for job, note in stopped(run.out).items()}
        return found


def entry(study: str, config: Any, out: Path, seeds: int | None) -> Entry:
    """One run in `out`, or one below it for each of `seeds` seeds from that of the configuration on.

    A study that repeats itself under following seeds leaves them out for the next run: no two share a draw.

    Raises:
        Unusable: the study has no field `seed`.
    """
    if seeds is None:
        return Entry(study, out, {None: Run(study, config, out)})
    if "seed" not in (f.name for f in dataclasses.fields(config)):
        raise Unusable(f"{study} has no field 'seed', so there is nothing to repeat; leave --seeds out")
    stride = getattr(config, "repeats", 1)
    numbers = range(config.seed, config.seed + seeds * stride, stride)
    runs: dict[int | None, Run] = {
        n: Run(study, dataclasses.replace(config, seed=n), out / f"seed-{n}") for n in numbers
    }
    return Entry(study, out, runs)


def all_entries(out: Path, *, quick: bool, seeds: int | None) -> list[Entry]:
    """Every study into a directory of its own in `out`; one that cannot be imported is an entry that has failed.

    Raises:
        Unusable: `out` cannot be written, or holds something else.
    """
    entries = []
    for name in known():
        try:
            study = find(name)
            config = study.QUICK if quick else study.Config()
            entries.append(entry(name, config, out / name, seeds))
        except Unusable:
            entries.append(entry(name, config, out / name, None))
            entries[-1].note = "Has no seed: ran once."
        except Exception as error:
            failure = Unusable(f"{name} cannot be imported: {type(error).__name__}: {error}")
            entries.append(Entry(name, out / name, {None: Run(name, None, out / name)}, "", {None: failure}))
    size = "quick" if quick else "full"
    with explained(out):
        if (out / ALL).exists():
            there = _size_there(out, size)
            if there != size:
                raise Unusable(f"{out} holds the {there} studies, not the {size} ones; choose another --out")
        elif out.exists() and any(not is_draft(file) for file in out.iterdir()):
            raise Unusable(f"{out} is not empty and holds no run of sharpscope; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / ALL, {"size": size, "studies": {e.study: list(e.runs) for e in entries}})
    return entries


def _size_there(out: Path, size: str) -> object:
    """The size of the studies in `out`; where that is damaged but there are runs, each is compared by itself."""
    try:
        return _stored(out / ALL, _All).size
    except Unusable:
        if not any((out / name / CONFIG).exists() for name in known()):
            raise
        return size


def stored_entries(out: Path) -> list[Entry]:
    """The batch that is stored in `out`, whatever it is; a run that is not finished is an entry that has failed.

    Raises:
        Unusable, LookupError: `out` holds none.
    """
    if (out / ALL).exists():
        studies = _stored(out / ALL, _All).studies
        return [_stored_entry(name, out / name, seeds) for name, seeds in studies.items()]
    if (out / SEEDS).exists() and not (out / CONFIG).exists():
        stored = _stored(out / SEEDS, _Seeds)
        return [_stored_entry(stored.study, out, stored.seeds)]
    return [_stored_entry(run_in(out).study, out, [None])]


def run_batch(
    entries: Sequence[Entry], *, workers: int = 1, engine: Engine | None = None, index: Path | None = None
) -> None:
    """Run what is not finished on one engine; each run is concluded as soon as its own jobs are done.

    That is so many `workers` of this machine, or anything with ``submit(call, *arguments)``.

    A run that cannot go on leaves the others alone: its outcome says why.  With `index` the page over all entries in
    that directory is kept up to date.

    Raises:
        Unusable: the page cannot be written at the end.
    """
    known_to_fail = [e for e in entries if e.done]
    for e in entries:
        _announce(e)
    owners = {_label(e, seed): (e, seed) for e in entries for seed in e.runs if seed not in e.outcomes}
    groups = {}

    with ExitStack() as stack:
        changed = stack.enter_context(_page_over(entries, index)) if index else lambda: None

        def settle(label: str, outcome: Any) -> None:
            owner, seed = owners[label]
            out = owner.runs[seed].out
            owner.outcomes[seed] = _unusable(outcome, out) if isinstance(outcome, Failed) else outcome
            if owner.done:
                _conclude(owner)
                changed()

        for label, (owner, seed) in owners.items():
            run = owner.runs[seed]
            try:
                groups[label] = unfinished(run, stack)
            except Unusable as error:
                settle(label, Failed(str(error)))
            except Exception as error:
                settle(label, failed(f"the study {run.study}", error))
        for e in known_to_fail:
            _conclude(e)
        jobs = sum(len(group.tasks) for group in groups.values())
        alone = jobs == 0 and len(groups) <= 1
        work_off(groups, engine or stack.enter_context(local(1 if alone else workers)), settle)


def _unusable(failure: Failed, out: Path) -> Unusable:
    """The sentence for a failure; its traceback is left in the run's directory."""
    if not failure.trace and failure.sentence != KILLED:
        return Unusable(failure.sentence)
    where = ""
    if failure.trace and (out / CONFIG).exists():
        with suppress(OSError):  # the sentence is what matters
            write_whole(out / ERROR, failure.trace.encode())
        where = f" (see {out / ERROR})"
    return Unusable(f"{failure.sentence}{where}; what is in {out} is kept, and the same command goes on from it")


def _announce(e: Entry) -> None:
    """Say in the directory of several seeds what it is, before the first of them is concluded."""
    if not e.seeds:
        return
    try:
        with explained(e.out):
            e.out.mkdir(parents=True, exist_ok=True)
            there = {file.name for file in e.out.iterdir() if not is_draft(file)}
            if there and not there & {SEEDS, CONFIG}:
                raise Unusable(f"{e.out} is not empty and holds no run of sharpscope; choose another --out")
        if not (e.out / SEEDS).exists():
            _write_seeds(e)
    except Unusable as error:
        e.outcomes.update(dict.fromkeys(e.runs, error))


def _conclude(e: Entry) -> None:
    """Write the page over seeds, if there are any; a page that cannot be written is noted."""
    if not e.seeds:
        return
    try:
        _write_seeds(e)
    except Unusable as error:
        e.trouble = str(error)


def _write_seeds(e: Entry) -> None:
    """Write ``seeds.json`` and the page of a study under several seeds."""
    repeated = e.repeated
    claims = [{**dataclasses.asdict(r.verdict), **dataclasses.asdict(r)} for r in repeated]
    for claim in claims:
        del claim["verdict"]
    with explained(e.out):
        write_json(e.out / SEEDS, {"study": e.study, "seeds": list(e.runs), "claims": claims})
        links = {seed: f"{run.out.name}/report.html" for seed, run in e.runs.items() if seed is not None}
        write_page(e.page, seeds_page(find(e.study), links, repeated, e.failures))


@contextmanager
def _page_over(entries: Sequence[Entry], out: Path) -> Iterator[Callable[[], None]]:
    """Keep the page over all entries up to date; one that cannot be written on the way is no reason to stop."""

    def write() -> None:
        write_page(out / INDEX, overview([_row(e, out) for e in entries]))

    def update() -> None:
        with suppress(OSError):
            write()

    update()
    yield update
    with explained(out):
        write()


def _row(e: Entry, out: Path) -> StudyRow:
    try:
        study = find(e.study)
        title, paper = headings(study)[0], study.PAPER
    except Exception:  # it is among the failures
        title, paper = e.study, ""
    return StudyRow(
        name=e.study,
        title=title,
        paper=paper,
        link=e.page.relative_to(out).as_posix() if e.page.exists() and e.verdicts else "",
        verdicts=e.verdicts,
        failures=e.failures,
        stopped=e.stopped,
        seconds=e.seconds,
        seeds=e.seeds,
        note=e.note,
        done=e.done,
        picture=_preview(e),
    )


def _preview(e: Entry) -> bytes:
    """Return the small picture of a study, under several seeds that of the first; nothing where there is none."""
    with suppress(OSError, StopIteration):
        return (next(iter(e.runs.values())).out / PREVIEW).read_bytes()
    return b""


def _label(e: Entry, seed: int | None) -> str:
    return e.study if seed is None else f"{e.study}, seed {seed}"


def _seconds(out: Path) -> float:
    try:
        return float(json.loads((out / ENVIRONMENT).read_bytes())["seconds"])
    except (OSError, ValueError, LookupError, TypeError):  # it only says how long
        return 0.0


def _stored_entry(study: str, out: Path, seeds: Sequence[int | None]) -> Entry:
    """An entry as it stands on disk."""
    runs: dict[int | None, Run] = {}
    outcomes: dict[int | None, Outcome] = {}
    for seed in seeds:
        place = out if seed is None else out / f"seed-{seed}"
        try:
            runs[seed] = run_in(place)
            _demand_whole(runs[seed])
        except (Unusable, LookupError) as error:
            outcomes[seed] = Unusable(str(error))
        except Exception as error:
            outcomes[seed] = Unusable(failed(f"the study {study}", error).sentence)
        runs.setdefault(seed, Run(study, None, place))
    return Entry(study, out, runs, "", outcomes)


def _demand_whole(run: Run) -> None:
    """Raise Unusable unless a run is finished, and what is damaged in it can be made again from its rows."""
    if not (run.out / HISTORY).exists():
        raise Unusable(UNFINISHED.format(run.out))
    if (why := damage(run.out)) and unfinished_jobs(run):
        raise Unusable(
            f"{why}. The rows in {run.out / 'log'} are not whole either; its `sharpscope run` command goes on"
        )


@dataclass(frozen=True)
class _All:
    """The content of ``all.json``."""

    size: str
    studies: Mapping[str, tuple[int | None, ...]]


@dataclass(frozen=True)
class _Seeds:
    """The content of ``seeds.json``."""

    study: str
    seeds: tuple[int, ...]
    claims: tuple[Any, ...]


Stored = TypeVar("Stored", _All, _Seeds)


def _stored(path: Path, kind: type[Stored]) -> Stored:
    """Read a file of a batch.

    Raises:
        Unusable: it is none.
    """
    advice = "give another directory, or repeat the `sharpscope run` command, which writes it again"
    found = read_json(path, {f.name for f in dataclasses.fields(kind)}, RUNS, advice)
    try:
        return from_fields(kind, found)
    except InvalidValue as error:
        raise Unusable(f"{path} is not {RUNS}: {error}; {advice}") from error
