"""One run of a study in its directory: its jobs, then verdicts, figures and the report.

A run directory holds ``config.json`` (study and configuration), ``log/`` (rows as they come, and the seconds of each
job), ``history.parquet`` (every row), ``verdicts.json``, ``figures/``, ``preview.png``, ``environment.json`` and
``report.html``.  Where a study raised, ``error.txt`` has the traceback.

What a run needs from earlier files is checked when it is read.  What is damaged and follows from the rows is made
again; rows that are damaged are computed again; a configuration that is damaged is refused.
"""

import dataclasses
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...errors import InvalidValue
from ...errors import Unusable as Unusable
from ...records.fields import from_fields
from ...records.files import is_draft, read_json, remove_drafts, write_json, write_whole
from ...records.history import History
from ...records.run_log import RunLog
from ...report.figures import save_figures, save_preview
from ...report.html import render, write_report
from .claims import Verdict
from .old_names import columns_of_today, fields_of_today
from .pages import about, chart_of, claims_section, opening, outcome, ranked
from .pool import Group, WorkItem
from .study import Job, Progress, Study, elsewhere, find, headings

CONFIG, HISTORY, ENVIRONMENT = "config.json", "history.parquet", "environment.json"
PACKAGES = ("sharpscope", "torch", "numpy", "scikit-learn", "pyarrow", "matplotlib", "safetensors")
ERROR = "error.txt"
PREVIEW = "preview.png"
RUNS = "that of a run of sharpscope"

SEEDS = "seeds.json"
"""Name of the file that describes repeats under several seeds, in the directory above theirs."""

SECONDS_PER_CHART = 0.25
"""Rough cost of a figure, for the progress bar."""


@dataclass(frozen=True)
class Run:
    """A study with one configuration, in a directory of its own."""

    study: str
    config: Any
    out: Path


def unfinished(run: Run, locks: ExitStack) -> Group:
    """Give the unfinished jobs of a run and its conclusion, and lock its directory.

    Raises:
        Unusable: the directory cannot be written, holds another run, or is being written by another process.
    """
    study = find(run.study)
    with explained(run.out):
        begun = (run.out / CONFIG).exists()
        _claim_directory(run.out, {"study": run.study, "config": dataclasses.asdict(run.config)})
        if not begun:
            _demand_jobs(study, run)
        (run.out / ERROR).unlink(missing_ok=True)
        tasks: list[WorkItem] = []
        if _gathered(run.out) is None:
            locks.enter_context(_alone(run.out))
            for folder in (run.out, run.out / "log", run.out / "figures"):
                remove_drafts(folder)
            tasks = [
                WorkItem(job.name, _work, (job, run.out), job.cost, _note(RunLog(run.out / "log", job.name)))
                for job in unfinished_jobs(run)
            ]
    return Group(
        tuple(tasks), WorkItem("verdicts and figures", _close, (run,), 1 + SECONDS_PER_CHART * len(study.CHARTS))
    )


def _demand_jobs(study: Study, run: Run) -> None:
    """Demand that the jobs can be formed; where data are missing the directory is free for another configuration."""
    try:
        study.jobs(run.config)
    except Unusable:
        (run.out / CONFIG).unlink()
        raise


def unfinished_jobs(run: Run) -> list[Job]:
    """The jobs of a run whose rows are not all there."""
    jobs: Sequence[Job] = find(run.study).jobs(run.config)
    log = run.out / "log"
    return [job for job in jobs if not (log.exists() and RunLog(log, job.name).finished)]


def damage(out: Path) -> str:
    """The sentence on a missing or damaged file of a finished run in `out`; empty where all is there."""
    try:
        History.load(out / HISTORY)
        _environment(out)
    except Unusable as error:
        return str(error)
    return ""


def _gathered(out: Path) -> tuple[History, dict[str, Any]] | None:
    """The rows of a finished run, and what is known of how it was made; None where either is missing or damaged."""
    try:
        return History.load(out / HISTORY), _environment(out)
    except Unusable:
        return None


def _environment(out: Path) -> dict[str, Any]:
    advice = "repeat the `sharpscope run` command of this run, which writes it again"
    found = read_json(out / ENVIRONMENT, {"stopped"}, "that of a finished run", advice)
    if not isinstance(found["stopped"], dict):
        raise Unusable(f"{out / ENVIRONMENT} is not that of a finished run: 'stopped' names no jobs; {advice}")
    return found


def _work(progress: Progress, job: Job, out: Path) -> None:
    with explained(out), _locked(out, job.name):
        log = RunLog(out / "log", job.name)
        if log.finished:  # by a process that was thought to be lost
            return
        began = time.process_time()
        job.work(log, progress, **job.arguments)
        if not log.finished:
            log.finish()
        write_whole(_spent(log), f"{time.process_time() - began:.2f}\n".encode())
        progress(1.0)


def _note(log: RunLog) -> Path:
    """Give the file that is there while somebody waits for a job, and says how far it is."""
    return log.path.with_suffix(".progress")


def _spent(log: RunLog) -> Path:
    """Give the file in which the processor seconds of a job are noted."""
    return log.path.with_suffix(".seconds")


def _close(progress: Progress, run: Run) -> list[Verdict]:
    """Gather the rows of all jobs, if need be, and conclude."""
    study = find(run.study)
    with explained(run.out):
        if _gathered(run.out) is None:
            _gather(run, study.jobs(run.config))
        return conclude(study, run.study, run.config, run.out, progress)


def _gather(run: Run, jobs: Sequence[Job]) -> None:
    """Write the rows of all jobs as one table, after what is known of how they were made."""
    logs = [RunLog(run.out / "log", job.name) for job in jobs]
    data = {name: sentence for job in jobs for name, sentence in job.data().items()}
    rows = History(row for log in logs for row in log.rows)
    stopped = {log.run: log.note for log in logs if log.note}
    seconds = round(sum(_seconds_of(log) for log in logs), 1)
    made = {"data": data} if data else {}
    write_json(run.out / ENVIRONMENT, environment(run.study) | made | {"seconds": seconds, "stopped": stopped})
    rows.save(run.out / HISTORY)
    for log in logs:
        log.state.unlink(missing_ok=True)  # where a kill came between the end of a job and this
        _note(log).unlink(missing_ok=True)


def _seconds_of(log: RunLog) -> float:
    with suppress(OSError, ValueError):
        return float(_spent(log).read_text())
    return 0.0


def conclude(
    study: Study, name: str, config: Any, out: Path, progress: Progress = lambda fraction: None
) -> list[Verdict]:
    """Verdicts, figures and report from the history in `out`."""
    history = columns_of_today(study, History.load(out / HISTORY))
    verdicts, page = _report(study, name, config, history, _environment(out))
    write_json(out / "verdicts.json", [dataclasses.asdict(v) for v in verdicts])
    for i, chart in enumerate(page["charts"], 1):
        save_figures([chart], history.columns, out / "figures")
        progress(i / (1 + len(page["charts"])))
    for chart in page["charts"]:
        if chart.rank == 1:
            save_preview(chart, history.columns, out / PREVIEW)
    write_report(out / "report.html", **page)
    return verdicts


def _report(
    study: Study, name: str, config: Any, history: History, environment: Mapping[str, Any]
) -> tuple[list[Verdict], dict[str, Any]]:
    """The verdicts on a history, and the parts of its page."""
    ran = set(history.runs)
    verdicts = [c.decide(name, history, config) for c in study.CLAIMS if set(c.runs) <= ran]
    left_out = [c.sentence for c in study.CLAIMS if not set(c.runs) <= ran]
    title, argument = headings(study)
    charts = ranked([chart for chart in study.CHARTS if _has_runs(chart, ran)])
    return verdicts, {
        "title": title,
        "subtitle": study.PAPER,
        "lead": opening(argument)[0],
        "tested": outcome(verdicts),
        "sections": [
            ("About", about(study)),
            ("Claims", claims_section(verdicts, {c.sentence: chart_of(c, charts) for c in study.CLAIMS})),
        ],
        "charts": charts,
        "columns": history.columns,
        "config": dataclasses.asdict(config) | ({"claims that need other sizes": left_out} if left_out else {}),
        "environment": environment,
    }


def page(out: Path) -> str | None:
    """The report of a finished run as HTML; before that the charts of the rows so far, or None while there are none.

    Raises:
        Unusable: a file of the run is damaged.
    """
    run = run_in(out)
    study = find(run.study)
    if (out / HISTORY).exists() and (out / "report.html").exists():
        history = columns_of_today(study, History.load(out / HISTORY))
        return render(**_report(study, run.study, run.config, history, _environment(out))[1])
    jobs = study.jobs(run.config)
    logs = [RunLog(out / "log", job.name) for job in jobs] if (out / "log").exists() else []
    history = History(row for log in logs for row in log.rows)
    if not len(history):
        return None
    done = sum(log.finished for log in logs)
    return render(
        title=headings(study)[0],
        subtitle=study.PAPER,
        lead=f"So far {done} of {len(jobs)} jobs are done. The verdicts come at the end.",
        charts=[chart for chart in study.CHARTS if _has_runs(chart, set(history.runs))],
        columns=history.columns,
        config=dataclasses.asdict(run.config),
        environment={},
    )


def run_in(out: Path) -> Run:
    """The run that `out` holds.

    Raises:
        Unusable: none, or its configuration does not fit the study.
        LookupError: there is no such study.
    """
    if not (out / CONFIG).exists():
        raise Unusable(f"{out} holds no run: there is no {CONFIG}; give the directory of a `sharpscope run`")
    request = stored_request(out)
    name, study = request["study"], find(request["study"])
    try:
        config: Any = from_fields(study.Config, fields_of_today(study, request["config"]))
    except InvalidValue as error:
        raise Unusable(
            f"{out / CONFIG} does not fit the study {name}: {error}. Put it back as it was, or run the study again"
            " into another --out"
        ) from error
    return Run(name, config, out)


def stopped(out: Path) -> dict[str, str]:
    """The jobs of a finished run that ended early, and why."""
    notes: dict[str, str] = _environment(out)["stopped"]
    return notes


def _claim_directory(out: Path, request: Mapping[str, Any]) -> None:
    path = out / CONFIG
    request = json.loads(json.dumps(request))
    if path.exists():
        there = stored_request(out)
        if there["study"] == request["study"]:
            study = find(request["study"])
            since_then = json.loads(json.dumps(dataclasses.asdict(study.Config())))  # fields of today at their defaults
            there["config"] = since_then | fields_of_today(study, there["config"])
        if there != request:
            raise Unusable(f"{out} holds a different run ({_difference(there, request)}); choose another --out")
    elif out.exists() and any(not _ours(file, out) for file in out.iterdir()):
        raise Unusable(f"{out} is not empty and holds no run of sharpscope; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, request)


def _ours(file: Path, out: Path) -> bool:
    """Tell whether a file is left by a run cut short at its start, or by repeats under other seeds beside it."""
    beside = (out / SEEDS).exists() and (file.name in (SEEDS, "index.html") or file.name.startswith("seed-"))
    return is_draft(file) or beside


def stored_request(out: Path) -> dict[str, Any]:
    """Study and configuration of the run in `out`.

    Raises:
        Unusable: what stands there is not that of a run.
    """
    request = read_json(out / CONFIG, {"study", "config"}, RUNS, "give another directory")
    if request.keys() != {"study", "config"} or not isinstance(request["study"], str):
        raise Unusable(f"{out / CONFIG} is not {RUNS}: it names no study; give another directory")
    if not isinstance(request["config"], dict):
        raise Unusable(f"{out / CONFIG} is not {RUNS}: its 'config' has no fields; give another directory")
    return request


def _difference(there: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    if there["study"] != request["study"]:
        return f"study {there['study']}, not {request['study']}"
    old, new = there["config"], request["config"]
    different = [f"{k} {old.get(k)!r}, not {new.get(k)!r}" for k in {**old, **new} if old.get(k) != new.get(k)]
    return "; ".join(different[:3])


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Refuse a directory that another process is running in."""
    try:
        with _locked(out):
            yield
    except BlockingIOError as error:
        raise Unusable(f"another process is running in {out}; wait for it, or choose another --out") from error


@contextmanager
def _locked(out: Path, job: str = "") -> Iterator[None]:
    """Lock a directory for those who start jobs in it, or wait for the lock of a job, which is one byte of that file.

    Where the system has no file locks the user is trusted.

    Raises:
        BlockingIOError: the directory is locked.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    (out / "log").mkdir(parents=True, exist_ok=True)
    with (out / "log" / "lock").open("a") as file:
        if job:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, int(hashlib.sha256(job.encode()).hexdigest()[:12], 16))
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _has_runs(chart: Any, ran: set[str]) -> bool:
    names = getattr(chart, "runs", None) or (chart.curve, *chart.paths)
    return any(name in ran for name in names)


def environment(study: str = "") -> dict[str, Any]:
    """Versions and machine, for a report; that of the package of a study from elsewhere is among them."""
    entry = elsewhere().get(study)
    versions = {}
    for name in (*PACKAGES, *([entry.dist.name] if entry and entry.dist else [])):
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


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Turn an error of the operating system into a sentence."""
    try:
        yield
    except OSError as error:
        raise Unusable(_explain(error, out)) from error


def _explain(error: OSError, out: Path) -> str:
    reason = re.sub(r"^\[Errno \d+\] ", "", str(error))
    return f"cannot write the run in {out}: {reason}; what is there is kept, and the same command goes on from it"
