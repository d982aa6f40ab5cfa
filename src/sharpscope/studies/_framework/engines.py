"""Engines on other machines, by a line: ``dask://host:8786``, ``slurm:partition=gpu,time=60`` or ``module:name``.

They need a file system that all machines see, and an environment there in which the studies can be imported.  A call
whose process is lost is submitted again, and its job goes on from its last checkpoint.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import MissingExtra, Unusable
from .pool import Engine, Future
from .workers import Here, Workers

RETRIES = 2
"""Times that a call which an engine has lost is submitted again."""

SLURM = {"time": "timeout_min", "mem": "mem_gb", "cpus": "cpus_per_task"}
"""Names that submitit has for settings that do not depend on the cluster; others are those of sbatch."""

ADVICE = "dask://HOST:PORT, slurm:NAME=VALUE,... or MODULE:NAME of a function that returns an executor"


@dataclass(frozen=True)
class _Elsewhere:
    """An executor of others, which queues as many calls as one likes."""

    submit: Callable[..., Future]
    retries: int = RETRIES


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
    kind, _, rest = line.partition(":")
    try:
        if kind == "dask":
            from distributed import Client

            with Client(f"tcp://{rest.removeprefix('//')}") as client:
                yield _Elsewhere(client.get_executor(pure=False).submit)
        elif kind == "slurm":
            yield _Elsewhere(_slurm(rest, folder).submit)
        elif rest and not rest.startswith("//"):
            yield _Elsewhere(getattr(importlib.import_module(kind), rest)().submit)
        else:
            raise Unusable(f"--on {line} is no engine; give {ADVICE}")
    except ModuleNotFoundError as missing:
        if missing.name not in ("distributed", "submitit"):
            raise Unusable(f"--on {line}: {missing}; give {ADVICE}") from missing
        raise MissingExtra(
            f"--on {kind} needs {missing.name}, which is not installed: pip install 'sharpscope[engines]'"
        ) from missing
    except (AttributeError, OSError, RuntimeError) as error:
        raise Unusable(f"--on {line} does not answer: {type(error).__name__}: {error}") from error


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
