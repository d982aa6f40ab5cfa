"""Writes the page of a monitored run: its diagnosis, its charts, and how it was set up."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import torch

from ..measures.columns import label_of
from ..records.history import History
from ..records.run_log import RunLog
from ..report.charts import Chart
from ..report.html import number, render
from .diagnosis import diagnose
from .finding import Finding
from .measurements import Facts, Measurements, Now
from .recorder import FINDINGS, RUN, read_description
from .tensor_page import tensor_section


def _chart(name: str, title: str, y: str, **options: Any) -> Chart:
    return Chart(name, title, x="step", y=y, runs=(RUN,), y_label=label_of(y), **options)


CHARTS = (
    _chart(
        "stability",
        "Distance to the edge of stability",
        "stability_ratio",
        lines=((1.0, "edge of stability"),),
        rank=1,
    ),
    _chart(
        "along",
        "Edge along the step",
        "edge_along_step",
        lines=((1.0, "the step no longer pays"),),
        caption="One less the gain ratio of each step on its own batch.",
    ),
    _chart("sharpness", "Sharpness", "sharpness", log="y", rank=2),
    _chart(
        "spherical",
        "Spherical sharpness",
        "spherical_sharpness",
        log="y",
        caption="Sharpness at w/‖w‖: the part that does not depend on the scale of normalized weights.",
    ),
    _chart("loss", "Loss", "loss", log="y", rank=3),
    _chart("batch", "Loss of the batches of training", "batch_loss", log="y"),
    _chart("radius", "Norm of the scale-invariant weights", "radius"),
    _chart("rate", "Learning rate", "learning_rate"),
)
"""Charts of columns of the whole run."""

BY_GROUP = (
    ("fraction", "Fraction of the top eigenvector", False),
    ("rotation", "Rotation per step", True),
    ("radius", "Norm of each group", True),
    ("rate", "Effective learning rate of each group", True),
)
"""Charts of the columns of single groups: column prefix, title, and whether the axis is logarithmic."""

MAX_GROUPS = 6
"""Number of groups that are drawn: those with the largest fractions of the top eigenvector."""


EVENTS = (
    *("below", "sharpening", "approaching", "edge", "above"),
    *("diverged", "gaps", "loss spike", "along the step", "clipped", "settling"),
)
"""Names of the findings of which a chart shows when they began to hold."""


def charts_of(history: History, found: Sequence[Mapping[str, Any]] = ()) -> list[Chart]:
    """Choose the charts of columns that are there, marked where findings of an event began (`Recorder.found`).

    What holds at the first measurement is no event.
    """
    first = min((row["step"] for row in found), default=0)
    names = {row["name"]: row["step"] for row in reversed(found) if row["name"] in EVENTS}
    steps = sorted({step for step in names.values() if step > first})
    marks = tuple((float(s), ", ".join(name for name in reversed(names) if names[name] == s)) for s in steps)
    return [replace(chart, marks=marks) for chart in CHARTS if chart.y in history.columns]


def render_run(
    history: History,
    facts: Facts,
    config: Mapping[str, object],
    now: Now | None = None,
    found: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Make the HTML page of the measurements of a run, and of when its findings began to hold (`Recorder.found`)."""
    findings = diagnose(history, RUN, facts, now)
    first = next((i for i, f in enumerate(findings) if f.name != "gaps"), 0)
    lead = findings[first].text if findings else ""
    findings[first : first + 1] = [replace(f, text="") for f in findings[first : first + 1]]  # it stands once
    advice = [f for f in findings if f.remedy or f.severity != "note"]
    charts, rows = _by_group(history)
    whole = History([*history.rows, *rows])
    return render(
        title="Sharpness of this training run",
        subtitle=str(config.get("model", "")),
        lead=lead,
        tested=_items(advice),
        charts=[*charts_of(history, found), *charts],
        columns=whole.columns,
        config={name: value for name, value in config.items() if name != "model"},
        environment={"torch": torch.__version__},
        sections=[
            ("Diagnosis", _items([f for f in findings if f not in advice])),
            ("Tensors", tensor_section(history, facts)),
        ],
    )


def render_directory(directory: Path) -> str:
    """Make the page of the run that a `Monitor` writes, or wrote, into `directory`, from what is there so far.

    Raises:
        ValueError: no monitored run is there.
    """
    facts, config = read_description(directory)
    history = History({"run": RUN, **row} for row in RunLog(directory, RUN).rows)
    return render_run(history, facts, config, found=RunLog(directory, FINDINGS).rows)


def _by_group(history: History) -> tuple[list[Chart], list[dict[str, Any]]]:
    """Charts with a line for each of the groups that matter most, and the rows that they draw."""
    fractions = Measurements(history, RUN, Facts()).by_group("fraction")
    groups = tuple(sorted(fractions, key=lambda name: -fractions[name])[:MAX_GROUPS])
    if not groups:
        return [], []
    rows = [
        {"run": group, "step": row["step"]} | {f"{p} of a group": row.get(f"{p}/{group}") for p, *_ in BY_GROUP}
        for group in groups
        for row in history.rows
    ]
    part = "Scale-invariant groups"
    if len(fractions) > len(groups):
        part = f"The {len(groups)} of {len(fractions)} scale-invariant groups with the largest fractions"
    charts = [
        Chart(
            f"group-{prefix}",
            title,
            x="step",
            y=f"{prefix} of a group",
            runs=groups,
            y_label=label_of(f"{prefix}/the group"),
            log="y" if log else "",
            part=part,
        )
        for prefix, title, log in BY_GROUP
        if any(f"{prefix}/{group}" in history.columns for group in groups)
    ]
    return charts, rows


def _items(findings: Sequence[Finding]) -> str:
    """Each sentence, with the numbers its rule used and the source of the rule below it."""
    items = ""
    for finding in findings:
        used = ", ".join(f"{name} {number(value)}" for name, value in finding.numbers.items() if not math.isnan(value))
        evidence = " · ".join(filter(None, (used, finding.source)))
        small = f'<p class="evidence">{escape(evidence)}</p>' if evidence else ""
        remedy = f'<p class="remedy">{escape(finding.remedy)}</p>' if finding.remedy else ""
        text = f"<p>{escape(finding.text)}</p>" if finding.text else ""
        items += f'<li class="{finding.severity}">{text}{remedy}{small}</li>'
    return f'<ul class="findings">{items}</ul>' if items else ""
