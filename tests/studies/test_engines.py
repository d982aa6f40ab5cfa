"""Runs on executors of others: the same histories to the last byte, whatever happens to a worker."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from test_run import PATIENCE, ROOT, STOPPED, same_history, until, waiting

from sharpscope.cli import main
from sharpscope.errors import Unusable
from sharpscope.records.run_log import RunLog
from sharpscope.studies._framework.engines import engine_of, local
from sharpscope.studies._framework.pool import Failed, Group, WorkItem, work_off

NAMES = ("small", "tiny")

CLUSTER = """
import sys
sys.path.insert(0, {tests!r})
import run_tiny
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, *(w.pid for w in cluster.workers.values()), flush=True)
        sys.stdin.read()
"""
"""A Dask cluster whose workers know the tiny studies; it ends with its standard input."""


def begin(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """The command line in a process group of its own, with the tiny studies."""
    command = [sys.executable, str(ROOT / "tests/run_tiny.py"), "run", *arguments]
    own = os.environ | {"TINY_ALL": " ".join(NAMES), "OMP_NUM_THREADS": "1"} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=own, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The same to its end."""
    process = begin(*arguments, **environment)
    try:
        out, said = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, said)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both studies, run here."""
    out = tmp_path_factory.mktemp("whole") / "all"
    done = run("all", "--quick", "--workers", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[int]]]:
    """The address of a Dask cluster and the process numbers of its two workers."""
    (tmp_path / "cluster.py").write_text(CLUSTER.format(tests=str(ROOT / "tests")))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "cluster.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    try:
        address, *pids = process.stdout.readline().split()
        yield address.removeprefix("tcp://"), [int(pid) for pid in pids]
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def verdicts(out: Path, name: str) -> bytes:
    return (out / name / "verdicts.json").read_bytes()


def same(out: Path, whole: Path) -> bool:
    """Whether histories and verdicts are those of the run here."""
    return all(same_history(out / n, whole / n) and verdicts(out, n) == verdicts(whole, n) for n in NAMES)


def test_a_dask_cluster_that_loses_a_worker_gives_the_same_histories(
    whole: Path, cluster: tuple[str, list[int]], tmp_path: Path
) -> None:
    address, workers = cluster
    out = tmp_path / "all"

    def kill() -> None:
        end = time.monotonic() + 60
        while not any(out.glob("*/log/*.jsonl")) and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(workers[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    done = run("all", "--quick", "--on", f"dask://{address}", "--out", str(out))
    killer.join()
    assert done.returncode == 0, done.stderr
    assert same(out, whole)
    again = run("all", "--quick", "--on", f"dask://{address}", "--out", str(out))  # finished: verdicts alone
    assert again.returncode == 0 and again.stdout == done.stdout


SBATCH = """#!{python}
import os, subprocess, sys
job = str(1000 + len(os.listdir({folder!r})))
text = open(sys.argv[-1]).read()
open(os.path.join({folder!r}, job), "w").write(text)
here = dict(SLURM_JOB_ID=job, SLURM_JOBID=job, SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0",
    SLURM_LOCALID="0", SLURM_PROCID="0", SLURM_JOB_NODELIST="here", SLURM_NNODES="1")
quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
if len(os.listdir({folder!r})) <= int(os.environ.get("ROOM", "9")):
    subprocess.Popen(["sh", sys.argv[-1]], env=os.environ | here, **quiet)
print("Submitted batch job", job)
"""
"""A stand-in for Slurm's command, which begins the first ROOM jobs at once on this machine and no other."""

SRUN = """#!/bin/sh
while [ "$1" != {python} ]; do shift; done
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a stand-in for Slurm; its scripts are in ``jobs``, what was cancelled in ``cancelled``."""
    commands, jobs = tmp_path / "bin", tmp_path / "jobs"
    commands.mkdir()
    jobs.mkdir()
    scripts = {
        "sbatch": SBATCH.format(python=sys.executable, folder=str(jobs)),
        "sacct": "#!/bin/sh\nprintf 'JobID|State|NodeList\\n'\n",
        "squeue": "#!/bin/sh\n",
        "scancel": f"#!/bin/sh\necho $* >> {tmp_path / 'cancelled'}\n",  # those that run are left alone
        "srun": SRUN.format(python=sys.executable),
    }
    for name, text in scripts.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755 | stat.S_IXUSR)
    (tmp_path / "sitecustomize.py").write_text(
        f"import sharpscope.studies as s; s.__path__.append({str(ROOT / 'tests/tiny_studies')!r})"
    )
    python = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": python}


def test_slurm_gives_the_same_history(whole: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    line = "slurm:partition=tests,time=5"
    done = run("small", "--quick", "--on", line, "--out", str(tmp_path / "small"), **slurm)
    assert done.returncode == 0, done.stderr
    assert same_history(tmp_path / "small", whole / "small")
    jobs = list((tmp_path / "jobs").iterdir())
    assert len(jobs) == 4  # three walks, and the verdicts
    first = min(jobs).read_text()
    assert "--partition=tests" in first and "--time=5" in first


def stopped(
    number: signal.Signals, out: Path, on: str, queued: Callable[[], bool] = lambda: True, **environment: str
) -> float:
    """Stop a run on an engine with room for two of its three jobs while they work on and on; the seconds it takes."""
    process = begin("small", "--quick", "--on", on, "--out", str(out), TINY_WAITS="once", **environment)
    until(lambda: (waiting(out) and queued()) or process.poll() is not None)
    time.sleep(0.3)  # the others are on their way
    began = time.monotonic()
    os.killpg(process.pid, number)  # as a terminal does: to all of them
    _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said.strip()) == (128 + number, STOPPED)
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("kind", "number"),
    [("ThreadPoolExecutor", signal.SIGINT), ("ProcessPoolExecutor", signal.SIGINT), ("ProcessPoolExecutor", 15)],
)
def test_a_run_on_an_executor_is_stopped_and_goes_on(kind: str, number: int, whole: Path, tmp_path: Path) -> None:
    out, on = tmp_path / "small", f"concurrent.futures:{kind}"
    assert stopped(signal.Signals(number), out, on) < 5  # 0.2 s on an idle machine
    done = run("small", "--quick", "--on", on, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert same_history(out, whole / "small")
    assert not list(out.glob("log/*.progress"))


def test_a_run_on_slurm_is_stopped_with_all_its_jobs_and_goes_on(
    whole: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "small"

    def queued() -> bool:
        return len(list((tmp_path / "small.jobs").glob("*_submitted.pkl"))) == 3

    assert stopped(signal.SIGTERM, out, "slurm:", queued, ROOM="2", **slurm) < 5
    assert sorted((tmp_path / "cancelled").read_text().split()) == ["1000", "1001", "1002"]
    assert len(waiting(out)) <= 2
    done = run("small", "--quick", "--on", "slurm:", "--out", str(out), **slurm)  # waits until they have ended
    assert done.returncode == 0, done.stderr
    assert same_history(out, whole / "small")


def test_a_run_on_dask_is_stopped_with_all_its_jobs_and_goes_on(
    whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("TINY_WAITS", "once")
    address, _ = request.getfixturevalue("cluster")
    out = tmp_path / "small"
    assert stopped(signal.SIGINT, out, f"dask://{address}") < 15  # 3 s on an idle machine
    assert len(waiting(out)) <= 2
    for i in range(3):  # all of them have waited
        RunLog(out / "log", f"walk {i}").path.with_suffix(".waits").touch()
    done = run("small", "--quick", "--on", f"dask://{address}", "--out", str(out))  # waits until they have ended
    assert done.returncode == 0, done.stderr
    assert same_history(out, whole / "small")


def _double(progress: Callable[[float], None], n: int) -> int:
    progress(1.0)
    return 2 * n


class Unreliable:
    """An executor of threads that loses the first calls."""

    retries = 2

    def __init__(self, lost: int) -> None:
        self.threads, self.lost = ThreadPoolExecutor(2), lost

    def submit(self, call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        self.lost -= 1
        if self.lost >= 0:
            future: Future[Any] = Future()
            future.set_exception(ConnectionError("a worker is gone"))
            return future
        return self.threads.submit(call, *arguments)


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_any_executor_will_do_and_what_it_loses_is_submitted_again(lost: int) -> None:
    items = [WorkItem(str(n), _double, (n,)) for n in range(4)]
    groups = {"one": Group(tuple(items), WorkItem("last", _double, (10,))), "two": Group((), items[1])}
    found: dict[str, Any] = {}
    work_off(groups, Unreliable(lost), found.__setitem__)
    assert found == {"one": 20, "two": 2}


def test_what_is_lost_again_and_again_fails_with_a_sentence() -> None:
    found: dict[str, Any] = {}
    work_off({"one": Group((), WorkItem("last", _double, (1,)))}, Unreliable(9), found.__setitem__)
    assert isinstance(found["one"], Failed)
    assert found["one"].sentence.startswith("'last' raised ConnectionError: a worker is gone")


class _Forgetful:
    """An engine whose results are gone when they are asked for: it works each out again, as Dask does."""

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Any:
        call(*arguments)
        return Mock(done=lambda: True, result=lambda: call(*arguments))


def test_somebody_waits_for_a_result_until_it_is_here(tmp_path: Path) -> None:
    item = WorkItem("it", _double, (4,), note=tmp_path / "it.progress")
    found: dict[str, Any] = {}
    work_off({"one": Group((), item)}, _Forgetful(), found.__setitem__)
    assert found == {"one": 8}
    assert not list(tmp_path.iterdir())


def _killed(progress: Callable[[float], None]) -> None:
    time.sleep(0.2)  # the others have come
    os.kill(os.getpid(), signal.SIGKILL)


def _exits(progress: Callable[[float], None]) -> None:
    sys.exit("no more")


TROUBLES = {
    "killed": (WorkItem("it", _killed), "'it' raised BrokenProcessPool: A process in the process pool was terminated"),
    "exits": (WorkItem("it", _exits), "'it' raised SystemExit: no more"),
    "cannot be sent": (WorkItem("it", _double, (threading.Lock(),)), "'it' raised TypeError: cannot pickle"),
}


def troubles() -> None:
    """Print what becomes of tasks that fail in their ways, and of others beside them, in two processes."""
    for name, (item, _) in TROUBLES.items():
        groups = {"bad": Group((item,), item)} | {f"good {n}": Group((), WorkItem("it", _double, (n,))) for n in "ab"}
        found: dict[str, Any] = {}
        with engine_of("test_engines:pool", Path()) as engine:
            work_off(groups, engine, found.__setitem__)
        print(json.dumps([name, found.pop("bad").sentence, found]))


def pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2)


def test_who_fails_on_an_executor_of_processes_fails_alone() -> None:
    command = [sys.executable, "-c", "import test_engines; test_engines.troubles()"]
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests/studies"), str(ROOT / "src")])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    lines = list(map(json.loads, done.stdout.splitlines()))
    assert [name for name, _, _ in lines] == list(TROUBLES)
    for name, sentence, others in lines:
        assert sentence.startswith(TROUBLES[name][1])
        assert others == {"good a": "aa", "good b": "bb"}


def test_an_executor_is_named_by_its_module(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = run("small", "--quick", "--on", "concurrent.futures:ThreadPoolExecutor", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert same_history(out, whole / "small")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("moon", "--on moon is no engine; give dask://HOST:PORT, slurm:NAME=VALUE,..."),
        ("ray://host:1", "--on ray://host:1 is no engine"),
        ("nowhere.to:be", "--on nowhere.to:be: No module named 'nowhere'"),
        ("math:pie", "--on math:pie does not answer: AttributeError"),
        ("math:pi", "--on math:pi does not answer: TypeError: 'float' object is not callable"),
        ("dask://host", "--on dask://host does not answer: ValueError: missing port number"),
        ("slurm:gpu", "'gpu' has no value; write NAME=VALUE"),
    ],
)
def test_an_engine_that_is_none_is_refused(line: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(Unusable) as caught, engine_of(line, tmp_path):
        pass
    assert sentence in str(caught.value)


def test_one_worker_is_this_process() -> None:
    with local(1) as engine:
        assert engine.submit(os.getpid).result() == os.getpid()
    with local(2) as engine:
        assert engine.submit(os.getpid).result() != os.getpid()
    assert main(["run", "tiny-that-is-none", "--on", "moon"]) == 2
