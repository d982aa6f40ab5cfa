"""The rows of a monitored run: in memory, on disk, and sent to sinks."""

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import InvalidValue, Unusable
from ..records.fields import from_fields
from ..records.files import read_json, write_json
from ..records.history import History, Value
from ..records.run_log import RunLog
from .finding import Finding
from .measurements import Facts

RUN = "training"
"""The name of a monitored run in its history."""

FINDINGS = "findings"
"""The name of the log that says when findings began to hold."""

DESCRIPTION = "monitor.json"
"""The file that says what a page of the run needs beside the rows."""

KIND, MONITORED = "monitor", "that of a monitored run"

OLD_FACTS = {"asked": "groups_known"}
"""Names of facts in directories of earlier versions."""

Sink = Callable[[int, Mapping[str, float]], None]
"""A function that gets the numbers of every measurement, ``sink(step, values)``."""


class Recorder:
    """Keeps the rows of a run, writes them into a directory where one is given, and sends their numbers to sinks."""

    def __init__(self, sinks: Sequence[Sink], directory: str | Path | None) -> None:
        self.history = History()
        self.found: list[dict[str, Any]] = []  # step, name, severity and text of findings, each when it began to hold
        self.sinks = tuple(sinks)
        self._log = None if directory is None else _fresh_log(Path(directory), RUN)
        if directory is not None:
            _fresh_log(Path(directory), FINDINGS)
        self.described = self._log is None  # whether the description on disk, if there is to be one, is up to date

    def append(self, step: int, row: Mapping[str, Value]) -> None:
        """Add a row to the history and to the log, and send its numbers to the sinks."""
        self.history.append(run=RUN, step=step, **row)
        self._on_disk(lambda log: log.append(step=step, **row))
        numbers = {name: float(v) for name, v in row.items() if isinstance(v, float) and math.isfinite(v)}
        for sink in self.sinks:
            try:
                sink(step, numbers)
            except Exception as error:  # somebody else's code, which must not stop a run for being watched
                self.sinks = tuple(s for s in self.sinks if s is not sink)
                warnings.warn(f"a sink of the monitor failed, and gets no more measurements: {error!r}", stacklevel=4)

    @property
    def takes_findings(self) -> bool:
        """True where somebody wants to know of findings: a directory, or a sink with a method `finding`."""
        return self._log is not None or any(hasattr(sink, "finding") for sink in self.sinks)

    def report(self, finding: Finding, step: int) -> None:
        """Keep a new finding, in memory and on disk, and hand it to the sinks that take some."""
        row: dict[str, Value] = {"step": step, "name": finding.name, "severity": finding.severity, "text": finding.text}
        self.found.append(row)
        self._on_disk(lambda log: _findings_beside(log).append(**row))
        for sink in self.sinks:
            try:
                getattr(sink, "finding", _ignore)(finding, step)
            except Exception as error:  # as in `append`
                self.sinks = tuple(s for s in self.sinks if s is not sink)
                warnings.warn(f"a sink of the monitor failed, and gets nothing more: {error!r}", stacklevel=4)

    def _on_disk(self, write: Callable[[RunLog], None]) -> None:
        """Write into the directory, if there is one; where that fails, warn, and write no more: the run goes on."""
        if self._log is None:
            return
        try:
            write(self._log)
        except OSError as error:
            where = self._log.path.parent
            self._log, self.described = None, True
            warnings.warn(
                f"the monitor cannot write into {where} ({error.strerror or error}), and writes no more there; its rows"
                " stay in memory, and monitor.report(path) makes a page of them",
                stacklevel=5,
            )

    def outdate_description(self) -> None:
        """Have the description written again: more is known now, such as which weights are scale-invariant."""
        self.described = self._log is None

    def describe(self, title: str, facts: Facts, config: Mapping[str, object]) -> None:
        """Write the description, whole or not at all."""
        self.described = True
        written = asdict(replace(facts, overhead=None))  # that of the latest row counts
        described = {"kind": KIND, "title": title, "facts": written, "config": config}
        plain = json.loads(json.dumps(described, default=str))
        self._on_disk(lambda log: write_json(log.path.with_name(DESCRIPTION), plain))

    def restore(self, rows: Sequence[Mapping[str, Value]], found: Sequence[Mapping[str, Any]]) -> None:
        """Replace the rows and the findings, in memory and on disk."""
        self.found = [dict(row) for row in found]
        self._on_disk(lambda log: _findings_beside(log).replace_rows(self.found))
        self.history = History(rows)
        own = [{name: value for name, value in row.items() if name != "run"} for row in rows]
        self._on_disk(lambda log: log.replace_rows(own))
        self.outdate_description()

    def close(self, note: str) -> None:
        """Mark a run on disk as finished."""
        if self._log is not None and not self._log.finished:
            self._on_disk(lambda log: log.finish(note))


def read_description(directory: Path) -> tuple[Facts, dict[str, Any]]:
    """Read the facts and the configuration that `Recorder.describe` wrote.

    Raises:
        ValueError: no monitored run is there.
        Unusable: the file is damaged, or somebody else's.
    """
    path = directory / DESCRIPTION
    if not path.exists():
        raise InvalidValue(
            f"{directory} holds no monitored run (there is no {DESCRIPTION}); pass directory= to Monitor"
        )
    advice = "give the directory of a Monitor; one that is running writes the file again with new groups"
    found = read_json(path, {"kind", "facts", "config"}, MONITORED, advice)
    if found["kind"] != KIND or not isinstance(found["config"], dict) or not isinstance(found["facts"], dict):
        raise Unusable(f"{path} is not {MONITORED}; {advice}")
    try:
        facts = from_fields(Facts, {OLD_FACTS.get(name, name): value for name, value in found["facts"].items()})
    except InvalidValue as error:
        raise Unusable(f"{path} is not {MONITORED}: {error}; {advice}") from error
    return facts, found["config"]


def _fresh_log(directory: Path, run: str) -> RunLog:
    """An empty log; the one of an earlier run is moved aside."""
    log = RunLog(directory, run)
    if log.path.exists() and log.path.stat().st_size:
        n = 1
        while (aside := log.path.with_suffix(f".{n}.jsonl")).exists():
            n += 1
        os.replace(log.path, aside)
    return log


def _findings_beside(log: RunLog) -> RunLog:
    return RunLog(log.path.parent, FINDINGS)


def _ignore(finding: Finding, step: int) -> None:
    """Take no findings."""
