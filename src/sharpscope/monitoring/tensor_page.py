"""Section of a page on single tensors: medians by kind of layer, a table to sort, and a map over depth and time."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from ..measures.columns import column_of
from ..records.history import History
from ..report.html import asset, embedded, heads, number, sideways
from .measurements import Facts
from .recorder import RUN
from .tensor_kinds import KINDS

QUANTITIES = {
    "norm": "Norm",
    "gradient": "Gradient",
    "update": "Update / weight",
    "turn": "Turn (°)",
    "law": "Its law (°)",
    "effective_rate": "Effective rate",
    "time_left": "τ left",
    "signal": "m/√v",
    "age": "Age of v",
    "unmoved": "Unmoved",
}
"""Families of columns in the order of the table, with the heads of its columns."""

MAPPED = ("update", "turn", "gradient", "norm", "signal")
"""Families that the map can show."""

CELLS = 60
"""Largest number of moments that the map shows."""


def tensor_section(history: History, facts: Facts, run: str = RUN) -> str:
    """Make the section of the tensors of a run, as HTML with a script of its own; empty where none were read."""
    names = [name.removeprefix("norm/") for name in history.columns if name.startswith("norm/")]
    if not names or run not in history.runs:
        return ""
    kinds = [facts.kinds.get(name, "other") for name in names]
    latest = {name: _latest(history, run, name, name in facts.groups) for name in names}
    there = [q for q in QUANTITIES if any(q in values for values in latest.values())]
    mapped = [q for q in MAPPED if q in there]
    data = _map(history, run, names, mapped) | {"kinds": kinds}
    options = "".join(f'<option value="{q}">{escape(QUANTITIES[q])}</option>' for q in mapped)
    present = [kind for kind in KINDS if kind in kinds]
    only = '<option value="">all kinds</option>' + "".join(f"<option>{kind}</option>" for kind in present)
    return (
        f"{_by_kind(present, kinds, list(latest.values()), there)}"
        f"{_table(names, kinds, latest, there)}"
        "<h3>From the first layer to the last, over time</h3>"
        '<div class="tools"><label>Show <select id="tensor-quantity">'
        f'{options}</select></label> <label>of <select id="tensor-kind">{only}</select></label>'
        '<span class="bar" id="tensor-bar"></span></div>'
        '<div class="map"><canvas id="tensor-map" role="img" aria-label="Map of all tensors over the steps; the table'
        ' has the latest numbers"></canvas></div><output id="tensor-value"></output>'
        "<noscript>The map and the sorting of the table need scripts, which are switched off.</noscript>"
        f'<script type="application/json" id="tensor-data">{embedded(data)}</script>'
        f"<script>{asset('tensors.js')}</script>"
    )


def _latest(history: History, run: str, name: str, invariant: bool) -> dict[str, float]:
    """The latest value of each quantity of a tensor; angles in degrees, the law only where it holds."""
    found = {}
    for quantity in QUANTITIES:
        column = f"{quantity}/{name}"
        values = history.series(run, column) if column in history.columns else np.empty(0)
        if len(values) and (quantity != "law" or invariant):
            degrees = column_of(column).unit == "rad"
            found[quantity] = math.degrees(values[-1]) if degrees else float(values[-1])
    return found


def _by_kind(
    present: Sequence[str], kinds: Sequence[str], latest: Sequence[Mapping[str, float]], there: Sequence[str]
) -> str:
    """Medians over the tensors of each kind."""
    rows = ""
    for kind in present:
        own = [values for values, k in zip(latest, kinds, strict=True) if k == kind]
        medians = [[values[q] for values in own if q in values] for q in there]
        cells = "".join(f"<td>{_short(float(np.median(m))) if m else ''}</td>" for m in medians)
        rows += f'<tr><th scope="row">{kind}</th><td>{len(own)}</td>{cells}</tr>'
    head = heads("Kind", "Tensors", *(escape(QUANTITIES[q]) for q in there))
    caption = '<caption class="unseen">Medians over the tensors of a kind</caption>'
    table = f"<table>{caption}{head}<tbody>{rows}</tbody></table>"
    note = '<p class="note">Medians of the latest values.</p>'
    return f"<h3>By kind of layer</h3>{note}{sideways(table, 'By kind of layer')}"


def _table(
    names: Sequence[str], kinds: Sequence[str], latest: Mapping[str, Mapping[str, float]], there: Sequence[str]
) -> str:
    """A row for each tensor, those of a kind together, which the script sorts by any column."""
    order = sorted(range(len(names)), key=lambda i: KINDS.index(kinds[i]) if kinds[i] in KINDS else len(KINDS))
    rows = ""
    for name, kind in ((names[i], kinds[i]) for i in order):
        cells = f'<th scope="row" data-value="{escape(name)}">{escape(name)}</th>'
        cells += f'<td data-value="{escape(kind)}">{escape(kind)}</td>'
        for q in there:
            value = latest[name].get(q)
            cells += '<td data-value=""></td>' if value is None else f'<td data-value="{value:g}">{_short(value)}</td>'
        rows += f"<tr>{cells}</tr>"
    titles = ("Tensor", "Kind", *(QUANTITIES[q] for q in there))
    head = heads(*(f'<button type="button">{escape(title)}</button>' for title in titles))
    note = "Latest values; press a head to sort."
    if "law" in there:
        note += (
            " The law is that of tensors that are invariant as a whole and have settled; where only rows of one are,"
        )
        note += " or several together, it is not known."
    caption = '<caption class="unseen">The latest numbers of every tensor</caption>'
    table = f'<table id="tensor-table">{caption}{head}<tbody>{rows}</tbody></table>'
    return f'<h3>Every tensor</h3><p class="note">{note}</p><div class="wide tall">{table}</div>'


def _short(value: float) -> str:
    """Write a number to three digits."""
    return number(float(f"{value:.3g}"))


def _map(history: History, run: str, names: Sequence[str], mapped: Sequence[str]) -> dict[str, object]:
    """Hundredths of log10 of each quantity, tensor by step; at most `CELLS` steps, evenly spaced."""
    owners, norms = history.columns["run"], history.columns[f"norm/{names[0]}"]
    read = [i for i, owner in enumerate(owners) if owner == run and norms[i] is not None]
    picked = [read[round(k)] for k in np.linspace(0, len(read) - 1, min(len(read), CELLS))]
    empty = [None] * len(history)
    logs = {q: [[_log(history.columns.get(f"{q}/{name}", empty)[i]) for i in picked] for name in names] for q in mapped}
    return {"names": list(names), "steps": [history.columns["step"][i] for i in picked], "logs": logs}


def _log(value: float | None) -> int | None:
    return round(100 * math.log10(value)) if value is not None and 0 < value < math.inf else None
