"""Engines on other machines, by a line: ``dask://host:8786``, ``slurm:partition=gpu,time=60`` or ``module:name``.

They need a file system that all machines see, and an environment there in which the studies can be imported.  A call
whose process is lost is submitted again, and its job goes on from its last checkpoint.
"""

import importlib
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import MissingExtra, Unusable
from .pool import Engine, Future
from .workers import Here, Workers

RETRIES = 2
"""Times that a call which an engine has lost is submitted again."""

TIMEOUT = 10
"""Seconds that the scheduler of a Dask cluster may take to answer."""

SLURM = {"time": "timeout_min", "mem": "mem_gb", "cpus": "cpus_per_task"}
"""Names that submitit has for settings that do not depend on the cluster; others are those of sbatch."""

ADVICE = "dask://HOST:PORT, slurm:NAME=VALUE,... or MODULE:NAME of a function that returns an executor"


@dataclass(frozen=True)
class _Slurm:
    """Jobs of Slurm, by submitit."""

    executor: Any
    retries: int = RETRIES

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        """Queue a call, also where Ctrl-C comes meanwhile."""
        with _deaf_children():
            future: Future = self.executor.submit(call, *arguments)
            return future

    def cancel(self, jobs: Sequence[Any]) -> None:
        """Take jobs out of the queue, in one call: a call for each takes minutes where there are hundreds."""
        if jobs:
            subprocess.run(["scancel", *(job.job_id for job in jobs)], capture_output=True, check=False)


@dataclass(frozen=True)
class _Dask:
    """Workers of a Dask cluster.

    Its scheduler submits again what is lost, and gives up all that was on a worker that is the fourth to be lost.
    """

    client: Any
    retries: int = 1
    together: bool = True

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        """Put a call into the queue."""
        future: Future = self.client.submit(call, *arguments, pure=False)
        return future

    def cancel(self, futures: Sequence[Any]) -> None:
        """Take calls out of the queue, in one message."""
        self.client.cancel(futures)


class _Executor:
    """An executor of others, made again where one of its processes has died and it takes no more calls."""

    retries, together = RETRIES, True

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._submit = make().submit

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        """Put a call into the queue."""
        with _deaf_children():
            try:
                future: Future = self._submit(call, *arguments)
            except BrokenExecutor:
                self._submit = self._make().submit
                future = self._submit(call, *arguments)
            return future


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Let processes that begin here never hear of Ctrl-C, which is for their parent."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def local(workers: int) -> Iterator[Engine]:
    """Carry out calls in so many processes of this machine, or in this one."""
    if workers <= 1:
        yield Here()
        return
    engine = Workers(workers)
    try:
        yield engine
    finally:
        engine.shutdown()


@contextmanager
def engine_of(line: str, folder: Path) -> Iterator[Engine]:
    """Carry out calls where a line says; `folder` is for scripts and results on their way, where they are files.

    Raises:
        Unusable: there is no such engine.
        MissingExtra: a package is not installed.
    """
    with ExitStack() as stack:
        yield _found(line, folder, stack)


def _found(line: str, folder: Path, stack: ExitStack) -> Engine:
    kind, _, rest = line.partition(":")
    try:
        if kind == "dask":
            from distributed import Client

            return _Dask(stack.enter_context(Client(f"tcp://{rest.removeprefix('//')}", timeout=TIMEOUT)))
        if kind == "slurm":
            return _Slurm(_slurm(rest, folder))
        if rest and not rest.startswith("//"):
            return _Executor(getattr(importlib.import_module(kind), rest))
    except ModuleNotFoundError as missing:
        if missing.name not in ("distributed", "submitit"):
            raise Unusable(f"--on {line}: {missing}; give {ADVICE}") from missing
        raise MissingExtra(
            f"--on {kind} needs {missing.name}, which is not installed: pip install 'sharpscope[engines]'"
        ) from missing
    except Unusable:
        raise
    except Exception as error:  # whatever others raise
        raise Unusable(f"--on {line} does not answer: {type(error).__name__}: {error}; give {ADVICE}") from error
    raise Unusable(f"--on {line} is no engine; give {ADVICE}")


def _slurm(settings: str, folder: Path) -> Any:
    """Submit each call as a job of Slurm, by submitit, with ``partition=gpu,time=60``: minutes, gigabytes."""
    import submitit

    pairs = [part.partition("=") for part in settings.split(",") if part]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise Unusable(f"--on slurm:{settings}: '{wrong[0]}' has no value; write NAME=VALUE,NAME=VALUE")
    numbers = {name: int(value) if value.isdigit() else value for name, _, value in pairs}
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    executor.update_parameters(**{SLURM.get(name, f"slurm_{name}"): value for name, value in numbers.items()})
    return executor
