"""One run of a study in its directory: its jobs, then verdicts, figures and the report.

A run directory holds ``config.json`` (study and configuration), ``log/`` (rows as they come, and the seconds of each
job), ``history.parquet`` (every row), ``verdicts.json``, ``figures/``, ``environment.json`` and ``report.html``.  Where
a study raised, ``error.txt`` has the traceback.
"""

import dataclasses
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...errors import Unusable as Unusable
from ...records.history import History
from ...records.run_log import RunLog
from ...report.figures import save_figures
from ...report.html import render, write_report
from .claims import Verdict
from .old_names import columns_of_today, fields_of_today
from .pages import claims_section
from .pool import Group, WorkItem
from .study import Job, Progress, Study, elsewhere, find, headings

PACKAGES = ("sharpscope", "torch", "numpy", "scikit-learn", "pyarrow", "matplotlib", "safetensors")
ERROR = "error.txt"

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
    study, log = find(run.study), run.out / "log"
    with explained(run.out):
        _claim_directory(run.out, {"study": run.study, "config": dataclasses.asdict(run.config)})
        (run.out / ERROR).unlink(missing_ok=True)
        tasks: list[WorkItem] = []
        if not (run.out / "history.parquet").exists():
            locks.enter_context(_alone(run.out))
            jobs = [job for job in study.jobs(run.config) if not RunLog(log, job.name).finished]
            tasks = [WorkItem(job.name, _work, (job, run.out), job.cost) for job in jobs]
    return Group(
        tuple(tasks), WorkItem("verdicts and figures", _close, (run,), 1 + SECONDS_PER_CHART * len(study.CHARTS))
    )


def _work(progress: Progress, job: Job, out: Path) -> None:
    with explained(out):
        log = RunLog(out / "log", job.name)
        began = time.process_time()
        job.work(log, progress, **job.arguments)
        if not log.finished:
            log.finish()
        _spent(log).write_text(f"{time.process_time() - began:.2f}\n")
        progress(1.0)


def _spent(log: RunLog) -> Path:
    """Give the file in which the processor seconds of a job are noted."""
    return log.path.with_suffix(".seconds")


def _close(progress: Progress, run: Run) -> list[Verdict]:
    """Gather the rows of all jobs, if need be, and conclude."""
    study = find(run.study)
    with explained(run.out):
        if not (run.out / "history.parquet").exists():
            logs = [RunLog(run.out / "log", job.name) for job in study.jobs(run.config)]
            spent = [float(_spent(t).read_text() or 0) for t in logs if _spent(t).exists()]
            stopped = {log.run: log.note for log in logs if log.note}
            facts = environment(run.study) | {"seconds": round(sum(spent), 1), "stopped": stopped}
            write_json(run.out / "environment.json", facts)
            History(row for log in logs for row in log.rows).save(run.out / "history.parquet")
        return conclude(study, run.study, run.config, run.out, progress)


def conclude(
    study: Study, name: str, config: Any, out: Path, progress: Progress = lambda fraction: None
) -> list[Verdict]:
    """Verdicts, figures and report from the history in `out`."""
    history = columns_of_today(study, History.load(out / "history.parquet"))
    ran = set(history.runs)
    verdicts = [c.decide(name, history, config) for c in study.CLAIMS if set(c.runs) <= ran]
    left_out = [c.sentence for c in study.CLAIMS if not set(c.runs) <= ran]
    write_json(out / "verdicts.json", [dataclasses.asdict(v) for v in verdicts])
    environment = json.loads((out / "environment.json").read_text())
    charts = [chart for chart in study.CHARTS if _has_runs(chart, ran)]
    for i, chart in enumerate(charts, 1):
        save_figures([chart], history.columns, out / "figures")
        progress(i / (1 + len(charts)))
    title, lead = headings(study)
    write_report(
        out / "report.html",
        title=title,
        subtitle=study.PAPER,
        lead=lead,
        sections=[("Claims", claims_section(verdicts))],
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
    request = stored_request(out)
    study = find(request["study"])
    jobs = study.jobs(config_from(study, request["config"]))
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
        config=request["config"],
        environment={},
    )


def run_in(out: Path) -> Run:
    """The run that `out` holds.

    Raises:
        Unusable: none.
    """
    if not (out / "config.json").exists():
        raise Unusable(f"{out} holds no run: there is no config.json; give the directory of a `sharpscope run`")
    request = stored_request(out)
    name, study = request["study"], find(request["study"])
    return Run(name, config_from(study, fields_of_today(study, request["config"])), out)


def stopped(out: Path) -> dict[str, str]:
    """The jobs of a finished run that ended early, and why."""
    notes: dict[str, str] = json.loads((out / "environment.json").read_text())["stopped"]
    return notes


def config_from(study: Study, values: Mapping[str, Any]) -> Any:
    """The study's Config with these values, lists turned back into tuples."""
    return study.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _claim_directory(out: Path, request: Mapping[str, Any]) -> None:
    path = out / "config.json"
    request = json.loads(json.dumps(request))
    if path.exists():
        there = stored_request(out)
        if there["study"] == request["study"]:
            there["config"] = fields_of_today(find(request["study"]), there["config"])
        if there != request:
            raise Unusable(f"{out} holds a different run ({_difference(there, request)}); choose another --out")
    elif out.exists() and any(not _ours(file, out) for file in out.iterdir()):
        raise Unusable(f"{out} is not empty and holds no run of sharpscope; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, request)


def _ours(file: Path, out: Path) -> bool:
    """Tell whether a file is left by a run cut short at its start, or by repeats under other seeds beside it."""
    beside = (out / SEEDS).exists() and (file.name in (SEEDS, "index.html") or file.name.startswith("seed-"))
    return file.name == "config.tmp" or beside


def stored_request(out: Path) -> dict[str, Any]:
    """Study and configuration of the run in `out`.

    Raises:
        Unusable: what stands there is not that of a run.
    """
    try:
        request = json.loads((out / "config.json").read_text())
    except ValueError:
        request = None
    if not isinstance(request, dict) or request.keys() != {"study", "config"}:
        raise Unusable(f"{out / 'config.json'} is not that of a run of sharpscope; give another directory")
    return request


def _difference(there: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    if there["study"] != request["study"]:
        return f"study {there['study']}, not {request['study']}"
    old, new = there["config"], request["config"]
    different = [f"{k} {old.get(k)!r}, not {new.get(k)!r}" for k in {**old, **new} if old.get(k) != new.get(k)]
    return "; ".join(different[:3])


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


def write_json(path: Path, value: Any) -> None:
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
