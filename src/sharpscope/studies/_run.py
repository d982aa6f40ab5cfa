"""Runs a study: its jobs in processes of their own, then verdicts, figures and the report.

A run directory holds ``config.json`` (what was asked), ``log/`` (rows as they come), ``history.parquet`` (every row),
``verdicts.json``, ``figures/``, ``environment.json`` and ``report.html``.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoints import Unusable as Unusable
from ..claims import Verdict
from ..history import History, Track
from ..plots import save_figures
from ..report import render, write_report
from ._study import Job, Study, find

PACKAGES = ("sharpscope", "torch", "numpy", "scikit-learn", "pyarrow", "matplotlib", "safetensors")


def run_study(name: str, config: Any, out: Path, *, workers: int) -> list[Verdict]:
    """Run study `name` with `config` into `out`, going on where an earlier run of the same command stopped.

    Raises:
        Unusable: the directory cannot be written, holds another run or is being written by another process, the disk
            is full, or a worker was killed.
    """
    study = find(name)
    asked = {"study": name, "config": dataclasses.asdict(config)}
    try:
        _claim_directory(out, asked)
        if not (out / "history.parquet").exists():
            began = time.monotonic()
            jobs = study.jobs(config)
            with _alone(out):
                _run_jobs(jobs, out / "log", workers)
            tracks = [Track(out / "log", job.name) for job in jobs]
            stopped = {track.run: track.note for track in tracks if track.note}
            facts = environment() | {"seconds": round(time.monotonic() - began, 1), "stopped": stopped}
            _write_json(out / "environment.json", facts)
            History(row for track in tracks for row in track.rows).save(out / "history.parquet")
        return conclude(study, name, config, out)
    except OSError as error:
        raise Unusable(_explain(error, out)) from error
    except BrokenProcessPool as error:
        reason = "a worker process was killed (out of memory? --workers 1 needs the least)"
        raise Unusable(f"{reason}; what is in {out} is kept, and the same command goes on from it") from error


def conclude(study: Study, name: str, config: Any, out: Path) -> list[Verdict]:
    """Verdicts, figures and report from the history in `out`."""
    history = History.load(out / "history.parquet")
    ran = set(history.runs)
    verdicts = [c.decide(name, history, config) for c in study.CLAIMS if set(c.runs) <= ran]
    left_out = [c.sentence for c in study.CLAIMS if not set(c.runs) <= ran]
    _write_json(out / "verdicts.json", [dataclasses.asdict(v) for v in verdicts])
    environment = json.loads((out / "environment.json").read_text())
    charts = [chart for chart in study.CHARTS if _has_runs(chart, ran)]
    for chart in tqdm(charts, "figures", disable=not sys.stderr.isatty()):
        save_figures([chart], history.columns, out / "figures")
    title, lead = _headings(study)
    write_report(
        out / "report.html",
        title=title,
        subtitle=study.PAPER,
        lead=lead,
        verdicts=verdicts,
        charts=charts,
        columns=history.columns,
        config={k: v for k, v in dataclasses.asdict(config).items()}
        | ({"claims that need other sizes": left_out} if left_out else {}),
        environment=environment,
    )
    return verdicts


def page(out: Path) -> str | None:
    """The report of a finished run as HTML; before that the charts of the rows so far, or None while there are none."""
    if (out / "history.parquet").exists() and (out / "report.html").exists():
        return (out / "report.html").read_text(encoding="utf-8")
    asked = asked_of(out)
    study = find(asked["study"])
    jobs = study.jobs(config_from(study, asked["config"]))
    tracks = [Track(out / "log", job.name) for job in jobs] if (out / "log").exists() else []
    history = History(row for track in tracks for row in track.rows)
    if not len(history):
        return None
    done = sum(track.finished for track in tracks)
    return render(
        title=_headings(study)[0],
        subtitle=study.PAPER,
        lead=f"So far {done} of {len(jobs)} jobs are done. The verdicts come at the end.",
        verdicts=(),
        charts=[chart for chart in study.CHARTS if _has_runs(chart, set(history.runs))],
        columns=history.columns,
        config=asked["config"],
        environment={},
    )


def _headings(study: Study) -> tuple[str, str]:
    """Title and lead of a study's page: the first two paragraphs of its docstring."""
    summary = (study.__doc__ or "").strip().split("\n\n")
    return summary[0].rstrip("."), " ".join(summary[1].split()) if len(summary) > 1 else ""


def reread(out: Path) -> list[Verdict]:
    """Verdicts, figures and report of a finished run directory, made again.

    Raises:
        Unusable: `out` is not a finished run, or cannot be written.
    """
    if not (out / "config.json").exists():
        raise Unusable(f"{out} holds no run: there is no config.json; give the directory of a `sharpscope run`")
    if not (out / "history.parquet").exists():
        raise Unusable(f"the run in {out} is not finished; repeat its `sharpscope run` command to go on with it")
    asked = asked_of(out)
    study = find(asked["study"])
    try:
        return conclude(study, asked["study"], config_from(study, asked["config"]), out)
    except OSError as error:
        raise Unusable(_explain(error, out)) from error


def stopped(out: Path) -> dict[str, str]:
    """The jobs of a finished run that ended early, and why."""
    notes: dict[str, str] = json.loads((out / "environment.json").read_text())["stopped"]
    return notes


def config_from(study: Study, values: Mapping[str, Any]) -> Any:
    """The study's Config with these values, lists turned back into tuples."""
    return study.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _claim_directory(out: Path, asked: Mapping[str, Any]) -> None:
    path = out / "config.json"
    asked = json.loads(json.dumps(asked))
    if path.exists():
        there = asked_of(out)
        if there != asked:
            raise Unusable(f"{out} holds a different run ({_difference(there, asked)}); choose another --out")
    elif out.exists() and any(file.name != "config.tmp" for file in out.iterdir()):  # that one is ours, cut short
        raise Unusable(f"{out} is not empty and holds no run of sharpscope; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(path, asked)


def asked_of(out: Path) -> dict[str, Any]:
    """Study and configuration of the run in `out`.

    Raises:
        Unusable: what stands there is not that of a run.
    """
    try:
        asked = json.loads((out / "config.json").read_text())
    except ValueError:
        asked = None
    if not isinstance(asked, dict) or asked.keys() != {"study", "config"}:
        raise Unusable(f"{out / 'config.json'} is not that of a run of sharpscope; give another directory")
    return asked


def _difference(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    if there["study"] != asked["study"]:
        return f"study {there['study']}, not {asked['study']}"
    old, new = there["config"], asked["config"]
    odd = [f"{k} {old.get(k)!r}, not {new.get(k)!r}" for k in {**old, **new} if old.get(k) != new.get(k)]
    return "; ".join(odd[:3])


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Refuse a directory that another process is running in; where the system has no file locks, trust the user."""
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    (out / "log").mkdir(parents=True, exist_ok=True)
    with (out / "log" / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Unusable(f"another process is running in {out}; wait for it, or choose another --out") from error
        yield


def _run_jobs(jobs: Sequence[Job], log: Path, workers: int) -> None:
    """All unfinished jobs, longest first; progress is shown on a terminal."""
    log.mkdir(parents=True, exist_ok=True)
    todo = sorted((j for j in jobs if not Track(log, j.name).finished), key=lambda j: -j.cost)
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    shares: Any = context.Array("d", len(todo))
    with tqdm(
        total=round(sum(j.cost for j in todo), 1),
        disable=not sys.stderr.isatty(),
        bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed} < {remaining}",
    ) as bar:

        def show() -> None:
            bar.n = sum(j.cost * share for j, share in zip(todo, shares, strict=True))
            running = [j.name for j, s in zip(todo, shares, strict=True) if 0 < s < 1]
            bar.set_description_str(", ".join(running)[:48].ljust(48))

        if workers <= 1:
            torch.set_num_threads(1)
            for i, job in enumerate(todo):
                _work(job, log, shares, i, show)
            return
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_worker, initargs=(shares,))
        try:
            interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is for their parent
            waiting: set[Future[None]] = {pool.submit(_work_in_process, job, log, i) for i, job in enumerate(todo)}
            signal.signal(signal.SIGINT, interrupt)
            while waiting:
                done, waiting = wait(waiting, timeout=0.3, return_when="FIRST_COMPLETED")
                for future in done:
                    future.result()
                show()
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()


_shares: Any


def _worker(shares: Any) -> None:
    global _shares
    _shares = shares
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed must not write on, beside the run that goes on in its place."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work_in_process(job: Job, log: Path, i: int) -> None:
    _work(job, log, _shares, i, lambda: None)


def _work(job: Job, log: Path, shares: Any, i: int, show: Any) -> None:
    def report(share: float) -> None:
        shares[i] = share
        show()

    track = Track(log, job.name)
    job.work(track, report, **job.arguments)
    if not track.finished:
        track.finish()
    report(1.0)


def _has_runs(chart: Any, ran: set[str]) -> bool:
    names = getattr(chart, "runs", None) or (chart.curve, *chart.paths)
    return any(name in ran for name in names)


def environment() -> dict[str, Any]:
    """Versions and machine, for a report."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **versions,
    }


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _explain(error: OSError, out: Path) -> str:
    reason = re.sub(r"^\[Errno \d+\] ", "", str(error))
    return f"cannot write the run in {out}: {reason}; what is there is kept, and the same command goes on from it"
