"""The page of a monitored run: what its readings say, its charts, and how it was set up."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidValue
from ..records.history import History
from ..records.run_log import RunLog
from ..report.charts import Chart
from ..report.html import number, render
from .diagnosis import Facts, Finding, Measurements, diagnose

RUN = "training"

CHARTS = (
    Chart(
        "stability",
        "Distance to the edge of stability",
        "step",
        "stability_ratio",
        (RUN,),
        "step",
        "sharpness / threshold",
        lines=((1.0, "edge of stability"),),
    ),
    Chart("sharpness", "Sharpness", "step", "sharpness", (RUN,), "step", "λ1 of the Hessian", log_y=True),
    Chart(
        "spherical",
        "Spherical sharpness",
        "step",
        "spherical_sharpness",
        (RUN,),
        "step",
        "λ1 at unit norm",
        log_y=True,
        caption="Sharpness at w/‖w‖: the part that does not depend on the scale of normalized weights.",
    ),
    Chart("loss", "Loss", "step", "loss", (RUN,), "step", "loss at the measured point", log_y=True),
    Chart("radius", "Norm of the scale-invariant weights", "step", "radius", (RUN,), "step", "‖w‖"),
    Chart("rate", "Learning rate", "step", "learning_rate", (RUN,), "step", "learning rate"),
)

BY_GROUP = (
    ("share", "Share in the top eigenvector", "share of its square", False),
    ("rotation", "Rotation per step", "angle in radians", True),
    ("radius", "Norm of each group", "‖w‖ of the group", True),
    ("rate", "Effective learning rate of each group", "lr/‖w‖²", True),
)
"""Column prefix, title, axis and whether it is logarithmic."""

SHOWN = 6
"""Groups that are drawn: those with the largest share in the top eigenvector."""


def render_run(history: History, facts: Facts, config: Mapping[str, object]) -> str:
    """The HTML page of the readings of a run."""
    findings = diagnose(history, RUN, facts)
    charts, rows = _by_group(history)
    whole = History([*history.rows, *rows])
    return render(
        title="Sharpness of this training run",
        subtitle=str(config.get("model", "")),
        lead=next((f.text for f in findings if f.name not in ("gaps",)), ""),
        charts=[*(chart for chart in CHARTS if chart.y in history.columns), *charts],
        columns=whole.columns,
        config={name: value for name, value in config.items() if name != "model"},
        environment={"torch": torch.__version__},
        sections=[("Diagnosis", _diagnosis(findings))],
    )


def page(directory: Path) -> str:
    """The page of the run that a `Monitor` writes, or wrote, into `directory`, from what is there so far.

    Raises:
        ValueError: no monitored run is there.
    """
    description = Path(directory) / "monitor.json"
    if not description.exists():
        raise InvalidValue(f"{directory} holds no monitored run (there is no monitor.json); pass directory= to Monitor")
    told = json.loads(description.read_text(encoding="utf-8"))
    history = History({"run": RUN, **row} for row in RunLog(Path(directory), RUN).rows)
    return render_run(history, Facts(**told["facts"]), told["config"])


def _by_group(history: History) -> tuple[list[Chart], list[dict[str, Any]]]:
    """Charts with a line for each of the groups that matter most, and the rows that they draw."""
    shares = Measurements(history, RUN, Facts()).each("share")
    groups = tuple(sorted(shares, key=lambda name: -shares[name])[:SHOWN])
    if not groups:
        return [], []
    rows = [
        {"run": group, "step": row["step"]} | {f"{p} of a group": row.get(f"{p}/{group}") for p, *_ in BY_GROUP}
        for group in groups
        for row in history.rows
    ]
    part = f"The {len(groups)} of {len(shares)} scale-invariant groups with the largest shares"
    present = [b for b in BY_GROUP if any(f"{b[0]}/{group}" in history.columns for group in groups)]
    charts = [
        Chart(f"group-{p}", title, "step", f"{p} of a group", groups, "step", label, log_y=log, part=part)
        for p, title, label, log in present
    ]
    return charts, rows


def _diagnosis(findings: Sequence[Finding]) -> str:
    """Each sentence, with the numbers its rule used and the source of the rule below it."""
    items = ""
    for finding in findings:
        used = ", ".join(f"{name} {number(value)}" for name, value in finding.numbers.items() if not math.isnan(value))
        evidence = " · ".join(filter(None, (used, finding.source)))
        small = f'<p class="evidence">{escape(evidence)}</p>' if evidence else ""
        items += f"<li><p>{escape(finding.text)}</p>{small}</li>"
    return f'<ul class="findings">{items}</ul>' if items else ""
