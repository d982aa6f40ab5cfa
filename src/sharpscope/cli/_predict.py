"""The predictions of ``sharpscope predict``: the central flow of an optimizer, and then the optimizer itself."""

import difflib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from ..autodiff import Objective
from ..errors import NotConverged, NotFinite, Unusable
from ..flows import Prediction, compare
from ..flows.compare import CHARTS, RUNS
from ..optimizers import GD
from ..records import History, RunLog
from ..records.checkpoints import load_task, load_weights
from ..records.files import is_draft
from ..report import write_report
from ..studies._framework.run import environment
from ..studies._framework.study import find
from ..studies._shared.forecast import Forecast, run_forecast
from ..studies._shared.networks import Variant

SECONDS_BETWEEN_LINES = 15.0
"""Time after which a command whose output is no terminal says again how far it is."""


def predict_study(name: str, config: Any, job: str, start: int, steps: int, points: int, out: Path) -> str:
    """Train the run `job` of a study for `start` steps, predict `steps` more; return what is printed.

    Raises:
        Unusable: the study has no such run, or the flow got stuck.
    """
    known = network_runs(find(name), config)
    if job not in known:
        near = difflib.get_close_matches(job, known, 3, 0.3) or list(known)[:3]
        some = ", ".join(f"'{k}'" for k in near)
        raise Unusable(
            f"{name} has no network run '{job}' to predict; some it has: {some or 'none'}"
            f" (`sharpscope predict {name} --help` lists all)"
        )
    variant = known[job]
    if not _is_described(variant):
        raise Unusable(f"'{job}' is not full-batch gradient descent, which the flow describes; choose another run")
    log = _log(_fresh_directory(out))
    run_forecast(log, progress(), "", Forecast(variant, start, steps, points))
    if log.note:
        raise Unusable(log.note)
    history = History(row | {"run": row["run"].removeprefix(": ")} for row in log.rows)
    log.path.unlink()
    outcome = f"{job} of {name} from step {start}: {Prediction(history, {})}"
    return _write(out, outcome, history, {"study": name, "run": job, "start": start, "steps": steps})


def network_runs(study: Any, config: Any) -> dict[str, Variant]:
    """List the runs of a study that train a network, by name."""
    return {job.name: job.arguments["variant"] for job in study.jobs(config) if "variant" in job.arguments}


def predictable_runs(study: Any) -> str:
    """Name the runs of a study that can be predicted, in one sentence; those under other seeds as a kind."""
    names = [name for name, variant in network_runs(study, study.Config()).items() if _is_described(variant)]
    first = [repr(name) for name in names if ", seed " not in name]
    others = "; some also under other seeds, as 'NAME, seed 1'" if len(first) < len(names) else ""
    return f"runs of this study: {', '.join(first)}{others}" if names else "this study has no run to predict"


def _is_described(variant: Variant) -> bool:
    """Say whether a run is full-batch gradient descent."""
    return variant.batch is None and not variant.rmsprop and not variant.norm_only


def predict_checkpoint(task: str, checkpoint: Path | None, rule: GD, steps: int, points: int, out: Path) -> str:
    """Predict `steps` steps of `rule` for the model, loss and data of a task; return what is printed.

    Raises:
        Unusable: the task or the checkpoint cannot be used, or the flow got stuck.
    """
    model, loss, data = load_task(task)
    f = Objective(model, loss, data)
    w = f.weights() if checkpoint is None else load_weights(f, checkpoint)
    _fresh_directory(out)
    try:
        p = compare(f, rule, w, steps, points=points, progress=progress())
    except (ArithmeticError, NotConverged, NotFinite, ValueError) as error:
        raise Unusable(str(error)) from error
    chosen = {"task": task, "checkpoint": str(checkpoint or "as the task returns it"), **vars(rule), "steps": steps}
    return _write(out, f"{task}: {p}", p.history, chosen)


def table(history: History) -> str:
    """Make a table of a few measurements of the optimizer and of the central flow, side by side."""
    heads = f"{'':8}  {'sharpness':^19}  {'mean loss':^21}  {'norm':^17}  {'distance/':>9}"
    under = f"{'run':>9} {'flow':>9}  {'run':>10} {'flow':>10}  {'run':>8} {'flow':>8}"
    lines = [heads, f"{'step':>8}  {under}  {'moved':>9}"]
    names = ("sharpness", "loss", "radius")
    real, flow = ([history.series(run, c) for c in names] for run in RUNS[:2])
    step, error = history.table("central flow", "step", "error")
    for i in sorted({round(j * (len(step) - 1) / 5) for j in range(6)}):
        (s, loss, r), (s2, loss2, r2) = ([c[i] for c in columns] for columns in (real, flow))
        pairs = f"{s:9.4g} {s2:9.4g}  {loss:10.4g} {loss2:10.4g}  {r:8.5g} {r2:8.5g}"
        lines.append(f"{step[i]:8g}  {pairs}  {error[i]:9.1%}")
    return "\n".join(lines)


def _write(out: Path, outcome: str, history: History, config: dict[str, Any]) -> str:
    """Write history and report; return the outcome as a sentence, with a table."""
    history.save(out / "history.parquet")
    write_report(
        out / "report.html",
        title="A prediction",
        subtitle="The optimizer beside its central flow",
        lead=outcome[0].upper() + outcome[1:] + ".",
        charts=[chart for chart in CHARTS if chart.y in history.columns],
        columns=history.columns,
        config=config,
        environment=environment(),
    )
    return f"{outcome}\n\n{table(history)}"


def _log(out: Path) -> RunLog:
    return RunLog(out, "prediction")


def _fresh_directory(out: Path) -> Path:
    """Make the directory; that of an earlier prediction, also of one that was cut short, is written over."""
    begun = out.exists() and ((out / "history.parquet").exists() or _log(out).path.exists())
    if out.exists() and not begun and any(not is_draft(file) for file in out.iterdir()):
        raise Unusable(f"{out} is not empty and holds no prediction; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


def progress() -> Callable[[float], None]:
    """Show a bar on the terminal, moved by the fraction that is done; into a file or a pipe, a line now and then."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        return _lines()
    bar = tqdm(total=100, bar_format="{percentage:3.0f}% |{bar}| {elapsed} < {remaining}")

    def show(fraction: float) -> None:
        bar.n = math.floor(100 * fraction)
        bar.refresh()
        if fraction >= 1:
            bar.close()

    return show


def _lines() -> Callable[[float], None]:
    """Print a line to stderr when `SECONDS_BETWEEN_LINES` have passed since the last one."""
    began = last = perf_counter()

    def show(fraction: float) -> None:
        nonlocal last
        if (now := perf_counter()) - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(f"{fraction:4.0%} done after {now - began:.0f} s", file=sys.stderr, flush=True)

    return show
