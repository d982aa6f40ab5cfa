"""Work of several groups on one engine, longest first.

A group is a run of a study: tasks that may go side by side, and a last one that needs them all.  A task that raises, or
is lost, fails its group; the others go on.  An engine is anything with ``submit(call, *arguments)`` whose futures have
``done()``, ``result()`` and ``cancel()``: `workers` here, an executor of `concurrent.futures`, those of `engines`.

A task has a file, its note, which is there as long as somebody waits for it.  A call that the engine cannot end ends
itself when it next says how far it is and finds no note.
"""

import math
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from ...errors import Unusable

PAUSE = 0.02
"""Seconds between two looks at the futures."""

BETWEEN_NOTES = 0.3
"""Seconds between two notes of a task on how far it is, and between two looks at them."""


class Future(Protocol):
    """A call that goes on elsewhere, as far as this file needs to know it."""

    def done(self) -> bool: ...
    def result(self) -> Any: ...
    def cancel(self) -> object: ...


class Engine(Protocol):
    """Whatever carries out calls: at most `slots` at once and each again for `retries` times, where it has these.

    Calls that are lost may have ended each other where they are ``together``: there each goes on by itself.  It may
    have a ``cancel(futures)`` for many of them.
    """

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future: ...


@dataclass(frozen=True)
class WorkItem:
    """One piece of work, ``call(progress, *arguments)`` of a module-level function.

    It calls ``progress(fraction)`` with the fraction of its work that is done.

    `cost` is its rough duration in seconds, for the order and the progress bar.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    cost: float = 1.0
    note: Path | None = None  # where it writes how far it is, while this is there


@dataclass(frozen=True)
class Group:
    """Tasks for any order, and the one that comes when all of them are done: its value is that of the group."""

    tasks: tuple[WorkItem, ...]
    last: WorkItem


@dataclass(frozen=True)
class Failed:
    """The reason why a group has no value, as a sentence, with a traceback if the error was not foreseen."""

    sentence: str
    trace: str = ""


@dataclass(eq=False)
class _Task:
    """A work item, the task that waits for it, and the number of those that it waits for."""

    group: str
    item: WorkItem
    then: "_Task | None" = None
    waits: int = 0
    losses: int = 0
    alone: bool = False  # it may be what has taken others down


def work_off(groups: Mapping[str, Group], engine: Engine, settle: Callable[[str, Any], None]) -> None:
    """Work off all groups on an engine; `settle` is called with the name of a group and its value, or `Failed`."""
    schedule = _Schedule(groups, engine, settle)
    with _bar(schedule):
        schedule.run()


class _Schedule:
    """The tasks that are ready, and those that run, each with its future."""

    def __init__(self, groups: Mapping[str, Group], engine: Engine, settle: Callable[[str, Any], None]) -> None:
        self.engine, self.settle = engine, settle
        self.slots = getattr(engine, "slots", math.inf)
        self.several = len(groups) > 1
        self.noting = sys.stderr.isatty()
        self.ready: list[_Task] = []
        self.running: dict[_Task, Future] = {}
        for name, group in groups.items():
            last = _Task(name, group.last, waits=len(group.tasks))
            self.ready += [_Task(name, item, last) for item in group.tasks] or [last]
        self.cost = sum(item.cost for group in groups.values() for item in (*group.tasks, group.last))

    def run(self) -> None:
        """Work off all tasks; on an error, Ctrl-C included, those that run are cancelled."""
        try:
            while self.ready or self.running:
                self._submit()
                while not (ended := [task for task, future in self.running.items() if future.done()]) and self.running:
                    time.sleep(PAUSE)
                for task in ended:
                    if task in self.running:  # if its group has not just failed
                        self._end(task, self._outcome(task, self.running.pop(task).result))
        finally:
            self._drop(list(self.running))

    def _submit(self) -> None:
        """Submit what is ready and there is room for: the last one of a group first, then the longest."""
        self.ready.sort(key=lambda task: (task.then is not None, -task.item.cost))
        while self.ready and len(self.running) < self.slots:
            if self.running and any(task.alone for task in (self.ready[0], *self.running)):
                return
            task = self.ready.pop(0)
            try:
                if task.item.note:
                    task.item.note.parent.mkdir(parents=True, exist_ok=True)
                    task.item.note.touch()
                self.running[task] = self.engine.submit(attempt, task.item)
            except BaseException as error:
                _withdraw(task.item)
                if not isinstance(error, Exception):
                    raise
                self._end(task, failed(f"'{task.item.name}'", error))  # its arguments are not such as can be sent

    def _outcome(self, task: _Task, result: Callable[[], Any]) -> Any:
        """Return what came of a task; None where its process was lost and it is ready again."""
        try:
            return result()  # which may be worked out once more, where the machine that has it dies
        except Exception as error:
            task.losses += 1
            task.alone = getattr(self.engine, "together", False)
            if task.losses > getattr(self.engine, "retries", 0):
                return failed(f"'{task.item.name}'", error, " on the way to a worker process")
            self.ready.append(task)
            return AGAIN
        finally:
            _withdraw(task.item)  # where the call was lost, too: it may be alive

    def _end(self, task: _Task, outcome: Any) -> None:
        """Settle a group that has failed or is done, and make ready what waits for the task."""
        if outcome is AGAIN:
            return
        if isinstance(outcome, Failed):  # nobody waits for the rest of its group any more
            self._drop([other for other in self.running if other.group == task.group])
            self.ready = [other for other in self.ready if other.group != task.group]
        if isinstance(outcome, Failed) or task.then is None:
            self.settle(task.group, outcome)
            return
        task.then.waits -= 1
        if not task.then.waits:
            self.ready.append(task.then)

    def _drop(self, tasks: Sequence[_Task]) -> None:
        """Cancel tasks that run; what an engine says to that helps nobody."""
        futures = [self.running.pop(task) for task in tasks]
        for task in tasks:
            _withdraw(task.item)
        if cancel := getattr(self.engine, "cancel", None):
            with suppress(Exception):
                cancel(futures)
            return
        for future in futures:
            with suppress(Exception):
                future.cancel()

    def left(self) -> float:
        """Cost of what is not done, by the notes of the tasks that run."""
        there = {id(t): t for task in (*self.ready, *self.running) for t in (task, task.then) if t}
        waiting = sum(t.item.cost for t in there.values())
        return waiting - sum(task.item.cost * _fraction(task.item) for task in list(self.running))


AGAIN = object()
"""Stands for the outcome of a task that will be submitted again."""


@contextmanager
def _bar(schedule: _Schedule) -> Iterator[None]:
    """Show how far the tasks are while they run, on a terminal."""
    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed} < {remaining}"
    ended = threading.Event()
    with tqdm(total=schedule.cost, disable=not schedule.noting, bar_format=form) as bar:

        def show() -> None:
            names = [f"{t.group}: {t.item.name}" if schedule.several else t.item.name for t in [*schedule.running]]
            bar.n = schedule.cost - schedule.left()
            bar.set_description_str(", ".join(names)[:48].ljust(48))

        def follow() -> None:
            while not ended.wait(BETWEEN_NOTES):
                show()

        thread = threading.Thread(target=follow, daemon=True)
        if schedule.noting:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if schedule.noting:
                thread.join()
                show()


def attempt(item: WorkItem) -> Any:
    """Carry out a work item where the engine wants it: one at a time in a process, on one thread."""
    last = -math.inf

    def progress(fraction: float) -> None:
        nonlocal last
        if item.note is None or time.monotonic() - last < BETWEEN_NOTES:
            return
        last = time.monotonic()
        try:
            with item.note.open("r+") as file:  # which makes none
                file.write(f"{fraction:.3f}")
        except FileNotFoundError as gone:
            raise Unusable(f"'{item.name}' was stopped: {item.note} is gone") from gone
        except OSError:  # it only says how far
            pass

    with _one_at_a_time:
        torch.set_num_threads(1)
        try:
            progress(0.0)
            return item.call(progress, *item.arguments)
        except (Exception, SystemExit) as error:
            return failed(f"'{item.name}'", error)


_one_at_a_time = threading.Lock()


def _fraction(item: WorkItem) -> float:
    with suppress(OSError, ValueError):
        return float(item.note.read_text()) if item.note else 0.0
    return 0.0


def _withdraw(item: WorkItem) -> None:
    with suppress(OSError):
        if item.note:
            item.note.unlink(missing_ok=True)


def failed(what: str, error: BaseException, where: str = "") -> Failed:
    """The failure of what has raised: its own sentence where the error was foreseen."""
    if isinstance(error, Unusable):
        return Failed(str(error))
    return Failed(f"{what} raised {_described(error)}{where}", "".join(traceback.format_exception(error)))


def _described(error: BaseException) -> str:
    """Describe an exception in a line: its kind, its message, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    text = textwrap.shorten(str(error), 300, placeholder=" ...")
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"
