"""Several runs as one: all studies side by side, or one study under several seeds, with a page over all of them.

The directory of `run all` holds one directory per study, ``all.json`` (what was asked) and ``index.html``.  That of a
study under several seeds holds one per seed, ``seeds.json`` (seeds, and each claim over them) and ``index.html``.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import Unusable
from ...report.html import write_page
from .claims import Verdict
from .pages import Row, overview, seeds_page
from .run import SEEDS, Outcome, Run, explained, run_in, run_side_by_side, stopped, write_json
from .seeds import Repeated, over_seeds
from .study import find, headings
from .study import known as known

ALL = "all.json"
INDEX = "index.html"


@dataclass
class Entry:
    """A study among several, with its runs by seed (None: one run), and what became of them."""

    study: str
    out: Path
    runs: Mapping[int | None, Run]
    note: str = ""
    outcomes: dict[int | None, Outcome] = field(default_factory=dict)
    trouble: str = ""  # with the page over seeds

    @property
    def verdicts(self) -> list[Verdict]:
        """On the one run, or over all seeds that have ended."""
        if None in self.runs:
            outcome = self.outcomes.get(None)
            return outcome if isinstance(outcome, list) else []
        return [r.verdict for r in self.repeated]

    @property
    def repeated(self) -> list[Repeated]:
        """The claims over the seeds that have ended."""
        ended = [o for o in self.outcomes.values() if isinstance(o, list)]
        return over_seeds(find(self.study).CLAIMS, ended) if ended else []

    @property
    def failures(self) -> list[str]:
        """Why a run has no verdicts, or the seeds no page."""
        found = [str(o) for o in self.outcomes.values() if isinstance(o, Unusable)]
        return list(dict.fromkeys([*found, self.trouble] if self.trouble else found))

    @property
    def seconds(self) -> float:
        """Processor time of all its runs, as far as they are concluded."""
        return sum(_seconds(run.out) for run in self.runs.values())

    @property
    def done(self) -> bool:
        return self.outcomes.keys() == self.runs.keys()

    @property
    def stopped(self) -> dict[str, str]:
        """Jobs that ended early, and why."""
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
    """Every study into a directory of its own in `out`; what cannot be imported is an entry that has failed."""
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
    return entries


def run_entries(entries: Sequence[Entry], *, workers: int, changed: Callable[[], None]) -> None:
    """All runs on one pool; `changed` is called whenever an entry is done, and its page over seeds is there."""
    for e in entries:
        _announce(e)
    runs = {_label(e, seed): run for e in entries for seed, run in e.runs.items() if seed not in e.outcomes}
    owners = {_label(e, seed): (e, seed) for e in entries for seed in e.runs}

    def settled(label: str, outcome: Outcome) -> None:
        owner, seed = owners[label]
        owner.outcomes[seed] = outcome
        if owner.done:
            try:
                conclude_seeds(owner)
            except Unusable as error:
                owner.trouble = str(error)
            changed()

    run_side_by_side(runs, workers=workers, settled=settled)


def _announce(e: Entry) -> None:
    """Say in the directory of several seeds what it is, before the first of them is concluded."""
    if None in e.runs:
        return
    try:
        with explained(e.out):
            e.out.mkdir(parents=True, exist_ok=True)
            there = {file.name for file in e.out.iterdir()} - {"seeds.tmp"}
            if there and not there & {SEEDS, "config.json"}:
                raise Unusable(f"{e.out} is not empty and holds no run of sharpscope; choose another --out")
        if not (e.out / SEEDS).exists():
            conclude_seeds(e)
    except Unusable as error:
        e.outcomes.update(dict.fromkeys(e.runs, error))


def _label(e: Entry, seed: int | None) -> str:
    return e.study if seed is None else f"{e.study}, seed {seed}"


def conclude_seeds(e: Entry) -> None:
    """Write ``seeds.json`` and the page of a study under several seeds; nothing for a single run."""
    if None in e.runs:
        return
    repeated = e.repeated
    told = {"study": e.study, "seeds": list(e.runs), "claims": [_plain(r) for r in repeated]}
    with explained(e.out):
        write_json(e.out / SEEDS, told)
        links = {seed: f"{run.out.name}/report.html" for seed, run in e.runs.items() if seed is not None}
        write_page(e.out / INDEX, seeds_page(find(e.study), links, repeated, e.failures))


def _plain(r: Repeated) -> dict[str, Any]:
    """A claim over seeds for JSON."""
    told = dataclasses.asdict(r.verdict)
    return told | {key: value for key, value in dataclasses.asdict(r).items() if key != "verdict"}


def run_all(out: Path, *, quick: bool, seeds: int | None, workers: int) -> list[Entry]:
    """Every study side by side, and the page over them, which is up to date while they run.

    Raises:
        Unusable: `out` cannot be written, or holds something else.
    """
    entries = all_entries(out, quick=quick, seeds=seeds)
    asked = {"size": "quick" if quick else "full", "studies": {e.study: list(e.runs) for e in entries}}
    with explained(out):
        if (out / ALL).exists():
            there = _asked(out)
            if there["size"] != asked["size"]:
                raise Unusable(
                    f"{out} holds the {there['size']} studies, not the {asked['size']} ones; choose another --out"
                )
        elif out.exists() and any(file.name != "all.tmp" for file in out.iterdir()):
            raise Unusable(f"{out} is not empty and holds no run of sharpscope; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / ALL, asked)
    with _page_over(entries, out) as changed:
        run_entries(entries, workers=workers, changed=changed)
    return entries


@contextmanager
def _page_over(entries: Sequence[Entry], out: Path) -> Iterator[Callable[[], None]]:
    """Keeps the page over all entries up to date; one that cannot be written on the way is no reason to stop."""

    def write() -> None:
        write_page(out / INDEX, overview([_row(e, out) for e in entries]))

    def update() -> None:
        with suppress(OSError):
            write()

    update()
    yield update
    with explained(out):
        write()


def _row(e: Entry, out: Path) -> Row:
    try:
        study = find(e.study)
        title, paper = headings(study)[0], study.PAPER
    except Exception:  # it is among the failures
        title, paper = e.study, ""
    page = e.out / ("report.html" if None in e.runs else INDEX)
    return Row(
        name=e.study,
        title=title,
        paper=paper,
        link=page.relative_to(out).as_posix() if page.exists() and e.verdicts else "",
        verdicts=e.verdicts,
        failures=e.failures,
        stopped=e.stopped,
        seconds=e.seconds,
        seeds=0 if None in e.runs else len(e.runs),
        note=e.note,
        done=e.done,
    )


def _seconds(out: Path) -> float:
    try:
        return float(json.loads((out / "environment.json").read_text())["seconds"])
    except (OSError, ValueError, KeyError):
        return 0.0


def reread_all(out: Path, *, workers: int) -> list[Entry]:
    """The pages of a directory of `run all`, and of every finished run in it, made again.

    Raises:
        Unusable: `out` holds none, or cannot be written.
    """
    studies = _asked(out)["studies"]
    entries = [_found(name, out / name, seeds) for name, seeds in studies.items()]
    with _page_over(entries, out) as changed:
        run_entries(entries, workers=workers, changed=changed)
    return entries


def reread_seeds(out: Path, *, workers: int) -> Entry:
    """The same for a study under several seeds."""
    told = _json(out / SEEDS, "study", "seeds", "claims")
    e = _found(told["study"], out, told["seeds"])
    run_entries([e], workers=workers, changed=lambda: None)
    if e.failures:
        conclude_seeds(e)
    return e


def _found(study: str, out: Path, seeds: Sequence[int | None]) -> Entry:
    """An entry as it stands on disk: what is not finished has failed."""
    runs: dict[int | None, Run] = {}
    outcomes: dict[int | None, Outcome] = {}
    for seed in seeds:
        place = out if seed is None else out / f"seed-{seed}"
        try:
            runs[seed] = run_in(place)
            if not (place / "history.parquet").exists():
                raise Unusable(
                    f"the run in {place} is not finished; repeat its `sharpscope run` command to go on with it"
                )
        except (Unusable, LookupError) as error:
            runs.setdefault(seed, Run(study, None, place))
            outcomes[seed] = Unusable(str(error))
    return Entry(study, out, runs, "", outcomes)


def _asked(out: Path) -> dict[str, Any]:
    return _json(out / ALL, "size", "studies")


def _json(path: Path, *keys: str) -> dict[str, Any]:
    """What we wrote there.

    Raises:
        Unusable: it was not us.
    """
    try:
        told = json.loads(path.read_text())
    except ValueError:
        told = None
    if not isinstance(told, dict) or told.keys() != set(keys):
        raise Unusable(f"{path} is not that of a run of sharpscope; give another directory")
    return told
