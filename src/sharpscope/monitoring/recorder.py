"""The rows of a monitored run: in memory, on disk, and sent to sinks."""

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import InvalidValue
from ..records.history import History, Value
from ..records.run_log import RunLog
from .diagnosis import Facts

RUN = "training"
"""The name of a monitored run in its history."""

DESCRIPTION = "monitor.json"
"""The file that says what a page of the run needs beside the rows."""

Sink = Callable[[int, Mapping[str, float]], None]
"""A function that gets the numbers of every measurement, ``sink(step, values)``."""


class Recorder:
    """Keeps the rows of a run, writes them into a directory where one is given, and sends their numbers to sinks."""

    def __init__(self, sinks: Sequence[Sink], directory: str | Path | None) -> None:
        self.history = History()
        self.sinks = tuple(sinks)
        self._log = None if directory is None else _fresh_log(Path(directory))
        self.described = self._log is None  # whether the description on disk, if there is to be one, is up to date

    def append(self, step: int, row: Mapping[str, Value]) -> None:
        """Add a row to the history and to the log, and send its numbers to the sinks."""
        self.history.append(run=RUN, step=step, **row)
        if self._log is not None:
            self._log.append(step=step, **row)
        numbers = {name: float(v) for name, v in row.items() if isinstance(v, float) and math.isfinite(v)}
        for sink in self.sinks:
            try:
                sink(step, numbers)
            except Exception as error:  # somebody else's code, which must not stop a run for being watched
                self.sinks = tuple(s for s in self.sinks if s is not sink)
                warnings.warn(f"a sink of the monitor failed, and gets no more measurements: {error!r}", stacklevel=4)

    def outdate_description(self) -> None:
        """Have the description written again: more is known now, such as which weights are scale-invariant."""
        self.described = self._log is None

    def describe(self, title: str, facts: Facts, config: Mapping[str, object]) -> None:
        """Write the description, whole or not at all."""
        assert self._log is not None
        self.described = True
        written = asdict(replace(facts, overhead=None))  # that of the latest row
        written["asked"] = written.pop("groups_known")  # its name on disk
        text = json.dumps({"kind": "monitor", "title": title, "facts": written, "config": config}, default=str)
        temporary = self._log.path.with_name(f".monitor.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self._log.path.with_name(DESCRIPTION))

    def restore(self, rows: Sequence[Mapping[str, Value]]) -> None:
        """Replace the rows, in memory and on disk."""
        self.history = History(rows)
        if self._log is not None:
            self._log.path.write_bytes(b"")
            for row in rows:
                self._log.append(**{name: value for name, value in row.items() if name != "run"})
        self.outdate_description()

    def close(self, note: str) -> None:
        """Mark a run on disk as finished."""
        if self._log is not None and not self._log.finished:
            self._log.finish(note)


def read_description(directory: Path) -> tuple[Facts, dict[str, Any]]:
    """Read the facts and the configuration that `Recorder.describe` wrote.

    Raises:
        ValueError: no monitored run is there.
    """
    path = directory / DESCRIPTION
    if not path.exists():
        raise InvalidValue(
            f"{directory} holds no monitored run (there is no {DESCRIPTION}); pass directory= to Monitor"
        )
    description = json.loads(path.read_text(encoding="utf-8"))
    facts = description["facts"]
    facts["groups_known"] = facts.pop("asked")
    return Facts(**facts), description["config"]


def _fresh_log(directory: Path) -> RunLog:
    """An empty log; the one of an earlier run is moved aside."""
    log = RunLog(directory, RUN)
    if log.path.exists() and log.path.stat().st_size:
        n = 1
        while (aside := log.path.with_suffix(f".{n}.jsonl")).exists():
            n += 1
        os.replace(log.path, aside)
    return log
