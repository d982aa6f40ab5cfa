"""Work of several groups on one set of processes, longest first.

A group is a run of a study: tasks that may go side by side, and a last one that needs them all.  A task that raises, or
whose process is killed, fails its group; the others go on.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...errors import Unusable

KILLED = "a worker process was killed (out of memory? --workers 1 needs the least)"

MESSAGE_INTERVAL = 0.2
"""Seconds between two reports of a worker on how far it is."""


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


Settle = Callable[[str, Any], None]
"""Is last_message the name of a group and its value, or `Failed`."""


def work_off(groups: Mapping[str, Group], workers: int, settle: Settle) -> None:
    """All groups, on `workers` processes of one thread each, or in this one; progress is shown on a terminal."""
    plan = _Queue(groups, settle)
    jobs = sum(len(group.tasks) for group in groups.values())
    if not groups:
        return
    with _bar(plan) as show:
        if workers <= 1 or (jobs == 0 and len(groups) == 1):
            _here(plan, show)
        else:
            _side_by_side(plan, min(workers, max(jobs, len(groups))), show)


class _Queue:
    """The items that are left, those being worked on, and how far these are."""

    def __init__(self, groups: Mapping[str, Group], settle: Settle) -> None:
        self.groups, self.settle = groups, settle
        todo = [(name, task) for name, group in groups.items() for task in group.tasks]
        self.todo = sorted(todo, key=lambda item: -item[1].cost)
        self.left = {name: len(group.tasks) for name, group in groups.items()}
        self.ends = [(name, group.last) for name, group in groups.items() if not group.tasks]
        self.running: dict[tuple[str, str], float] = {}
        self.done = 0.0
        self.cost = sum(task.cost for _, task in [*todo, *((name, g.last) for name, g in groups.items())])

    def take(self) -> tuple[str, WorkItem] | None:
        """Take the next item, if there is any: the last one of a group first."""
        queue = self.ends or self.todo
        if not queue:
            return None
        item = queue.pop(0)
        self.running[item[0], item[1].name] = 0.0
        return item

    def end(self, name: str, task: WorkItem, outcome: Any) -> None:
        """Note what became of a task."""
        self.running.pop((name, task.name), None)
        self.done += task.cost
        group = self.groups[name]
        if self.left[name] < 0:  # has failed before
            return
        if isinstance(outcome, Failed):
            self.left[name] = -1
            dropped = [t for n, t in self.todo if n == name] + ([group.last] if task is not group.last else [])
            self.done += sum(t.cost for t in dropped)
            self.todo = [item for item in self.todo if item[0] != name]
            self.settle(name, outcome)
        elif task is group.last:
            self.settle(name, outcome)
        else:
            self.left[name] -= 1
            if not self.left[name]:
                self.ends.append((name, group.last))


@contextmanager
def _bar(plan: _Queue) -> Iterator[Callable[[], None]]:
    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed} < {remaining}"
    with tqdm(total=plan.cost, disable=not sys.stderr.isatty(), bar_format=form) as bar:

        def show() -> None:
            costs = {(n, t.name): t.cost for n, g in plan.groups.items() for t in (*g.tasks, g.last)}
            bar.n = min(plan.cost, plan.done + sum(costs[key] * fraction for key, fraction in plan.running.items()))
            names = [f"{n}: {task}" if len(plan.groups) > 1 else task for n, task in plan.running]
            bar.set_description_str(", ".join(names)[:48].ljust(48))

        yield show if not bar.disable else lambda: None
        show()


def _here(plan: _Queue, show: Callable[[], None]) -> None:
    """Work off all items in this process, one after the other."""
    torch.set_num_threads(1)
    while (item := plan.take()) is not None:
        name, task = item

        def progress(fraction: float, key: tuple[str, str] = (name, task.name)) -> None:
            plan.running[key] = fraction
            show()

        plan.end(name, task, _attempt(task, progress))


@dataclass
class _Worker:
    process: BaseProcess
    item: tuple[str, WorkItem] | None = None


def _side_by_side(plan: _Queue, size: int, show: Callable[[], None]) -> None:
    workers: dict[Connection[Any, Any], _Worker] = {}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        while True:
            _assign(plan, workers, size)
            busy = [connection for connection, worker in workers.items() if worker.item]
            if not busy:
                break
            for connection in wait(busy, timeout=0.3):
                assert isinstance(connection, Connection)
                _receive(plan, workers, connection)
            show()
        for connection in workers:
            with suppress(OSError):  # killed while it had nothing to do
                connection.send(None)
        for worker in workers.values():
            worker.process.join()
    except BaseException:
        for worker in workers.values():
            worker.process.terminate()
        raise


def _assign(plan: _Queue, workers: "dict[Connection[Any, Any], _Worker]", size: int) -> None:
    """Assign items to idle workers, starting new ones as needed."""
    idle = [connection for connection, worker in workers.items() if not worker.item]
    while (idle or len(workers) < size) and (item := plan.take()) is not None:
        connection = idle.pop() if idle else _start_worker(workers)
        try:
            connection.send(item[1])
        except OSError:  # its process was killed while it had nothing to do
            _stop_worker(workers, connection)
            plan.end(*item, Failed(KILLED))
        except Exception as error:  # its arguments are not such as can be sent
            plan.end(*item, failed(f"'{item[1].name}'", error))
            idle.append(connection)
        else:
            workers[connection].item = item


def _start_worker(workers: "dict[Connection[Any, Any], _Worker]") -> "Connection[Any, Any]":
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it inherits this: Ctrl-C is for its parent
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, interrupt)
    theirs.close()
    workers[ours] = _Worker(process)
    return ours


def _stop_worker(workers: "dict[Connection[Any, Any], _Worker]", connection: "Connection[Any, Any]") -> None:
    worker = workers.pop(connection)
    worker.process.terminate()
    worker.process.join()
    connection.close()


def _receive(plan: _Queue, workers: "dict[Connection[Any, Any], _Worker]", connection: "Connection[Any, Any]") -> None:
    """Receive a message of a worker: how far it is, its result, or that its process has ended."""
    worker = workers.get(connection)
    if worker is None or worker.item is None:
        return
    name, task = worker.item
    try:
        done, outcome = connection.recv()
    except (EOFError, OSError):
        done, outcome = True, Failed(KILLED)
        _stop_worker(workers, connection)
    except Exception as error:
        done, outcome = True, failed(f"'{task.name}'", error)
    if not done:
        plan.running[name, task.name] = outcome
        return
    worker.item = None
    plan.end(name, task, outcome)
    if isinstance(outcome, Failed):  # nobody waits for the rest of its group any more
        for other in [c for c, w in workers.items() if w.item and w.item[0] == name]:
            plan.end(*(workers[other].item or (name, task)), None)
            _stop_worker(workers, other)


def _serve(connection: "Connection[Any, Any]") -> None:
    """A worker: takes tasks, one after the other."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    last_message = 0.0

    def progress(fraction: float) -> None:
        nonlocal last_message
        if time.monotonic() - last_message > MESSAGE_INTERVAL:
            last_message = time.monotonic()
            connection.send((False, fraction))

    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        except Exception as error:  # a study that cannot be imported here
            text = f"{_described(error)} on the way to a worker process"
            connection.send((True, Failed(text, traceback.format_exc())))
            continue
        if task is None:
            return
        connection.send((True, _attempt(task, progress)))


def _end_with_parent() -> None:
    """A worker whose parent was killed must not write on, beside the run that goes on in its place."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _attempt(task: WorkItem, progress: Callable[[float], None]) -> Any:
    try:
        return task.call(progress, *task.arguments)
    except Exception as error:
        return failed(f"'{task.name}'", error)


def failed(what: str, error: Exception) -> Failed:
    """The failure of what has raised: its own sentence where the error was foreseen."""
    if isinstance(error, Unusable):
        return Failed(str(error))
    return Failed(f"{what} raised {_described(error)}", "".join(traceback.format_exception(error)))


def _described(error: Exception) -> str:
    """Describe an exception: its kind, its message, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}" if str(error) else f"{type(error).__name__}{place}"
