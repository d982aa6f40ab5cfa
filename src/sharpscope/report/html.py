"""Writes one HTML page that needs nothing else: no network, no server, no second file.

Text comes first, in sections that are handed in, then the charts, then how it was made.  The page holds the points of
its charts as JSON; `assets/report.js` draws them, with the plotting library uPlot that is kept beside it.
"""

import json
import math
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from ..records.files import write_whole
from .charts import Chart, Columns, SphereChart, Trace, graticule, missing, traces, viewpoint
from .glossary import explained, glossary

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
HELP = "Point at a chart to read values, drag to zoom, double-click to see all again; press a name to hide that run."
UNSCRIPTED = "Interactive charts need scripts, which are switched off."
Drawn = tuple[Chart | SphereChart, list[Trace]]
Item = TypeVar("Item")
MARK = {True: '<span class="mark" aria-hidden="true">✓</span>', False: '<span class="mark" aria-hidden="true">✗</span>'}


def write_report(path: str | Path, **page: Any) -> Path:
    """Write `render(**page)` to the path, whole or not at all."""
    return write_page(path, render(**page))


def write_page(path: str | Path, html: str) -> Path:
    """Write a page to the path, whole or not at all; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, html.encode())
    return path


def render(
    *,
    title: str,
    subtitle: str,
    lead: str,
    charts: Sequence[Chart | SphereChart],
    columns: Columns,
    config: Mapping[str, object],
    environment: Mapping[str, object],
    figures: Mapping[str, bytes] | None = None,
    tested: str = "",
    sections: Sequence[tuple[str, str]] = (),
) -> str:
    """Make the page: the charts that have a rank, what was `tested` (HTML), `sections` (heading, HTML), further charts.

    `figures` (PNG bytes by chart name) stand in for the charts where scripts are switched off.
    """
    drawn = [(chart, traces(chart, columns)) for chart in charts]
    data = {chart.name: _data(chart, lines) for chart, lines in drawn if any(t.points for t in lines)}
    top = sorted((item for item in drawn if item[0].rank and item[0].name in data), key=lambda item: item[0].rank)
    below = [item for item in drawn if item not in top]
    pictures = "".join(_figure(chart, lines, columns, (figures or {}).get(chart.name, b""), 2) for chart, lines in top)
    words = (title, lead, *(word for c in charts for word in (c.title, c.caption)), *(html for _, html in sections))
    chapters = (
        *sections,
        ("Charts", _charts(below, columns, figures or {})),
        ("Glossary", glossary(words)),
        ("Configuration", _settings("What was set", config)),
        ("Environment", _settings("Where it ran", environment)),
    )
    scripts = Template(asset("scripts.html")).substitute(
        data=embedded(data),
        licence=asset("uPlot.LICENSE"),
        library=asset("uPlot.iife.min.js"),
        script=asset("report.js"),
    )
    if pictures:
        pictures = f'<div class="charts pictures" role="group" aria-label="The finding in pictures">{pictures}</div>'
    style = asset("uPlot.min.css")
    return chapters_page(title, subtitle, lead, chapters, top=pictures + tested, style=style, scripts=scripts)


def chapters_page(
    title: str,
    subtitle: str,
    lead: str,
    chapters: Sequence[tuple[str, str]],
    *,
    top: str = "",
    style: str = "",
    scripts: str = "",
) -> str:
    """Make a page in the look of the report: headings, what stands on top, and chapters; their content is HTML."""
    there = [(head, html) for head, html in chapters if html]
    return Template(asset("report.html")).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        lead=explained(lead) if any(head == "Glossary" for head, _ in there) else escape(lead),
        top=top,
        links="".join(f'<a href="#{head.lower()}">{head}</a>' for head, _ in there) if len(there) > 1 else "",
        body="".join(f'<section id="{head.lower()}"><h2>{head}</h2>{html}</section>' for head, html in there),
        style=style + asset("report.css"),
        footer=f"Made with sharpscope{'; charts drawn by uPlot' * bool(scripts)}.",
        scripts=scripts,
    )


def asset(name: str) -> str:
    """Read a file of the folder `assets`."""
    return (files("sharpscope.report") / "assets" / name).read_text(encoding="utf-8")


def embedded(data: object) -> str:
    """Write JSON that may stand inside a script element: no `<`, so neither `</script>` nor `<!--`."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def number(value: float) -> str:
    """Write whole numbers as they are, others to four digits, very large and small ones with a power of ten.

    >>> number(2.0499999), number(1797), number(0.00001)
    ('2.05', '1797', '10⁻⁵')
    """
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    whole = value == int(value) and abs(value) < 1e7
    rounded = value if whole else float(f"{value:.3e}")
    if whole or 1e-3 <= abs(rounded) < 1e5:
        text = f"{rounded:,.12g}" if abs(rounded) >= 1e4 else f"{rounded:.12g}"
    else:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        factor = {1.0: "", -1.0: "-"}.get(float(mantissa), f"{float(mantissa):g} × ")
        text = f"{factor}10{str(int(exponent)).translate(SUPERSCRIPT)}"
    return text.replace("-", "−").replace(",", "\u202f").replace(" ", "\u00a0")


def note(*sentences: str) -> str:
    """Set sentences small, below what they are about."""
    return "".join(f'<span class="note">{escape(sentence)}</span>' for sentence in sentences if sentence)


def folded(head: str, beside: str, html: str, *, unfolded: bool = False) -> str:
    """Fold a part of a chapter away below its heading, with what there is to say beside it."""
    summary = f'<summary><h3>{escape(head)}</h3> <span class="beside">{escape(beside)}</span></summary>'
    return f'<details class="part"{" open" * unfolded}>{summary}{html}</details>'


def heads(*names: str) -> str:
    """Make the head of a table."""
    return "<thead><tr>" + "".join(f'<th scope="col">{name}</th>' for name in names) + "</tr></thead>"


def _row(head: str, *cells: str) -> str:
    return f'<tr><th scope="row">{escape(head)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _charts(drawn: Sequence[Drawn], columns: Columns, figures: Mapping[str, bytes]) -> str:
    html = ""
    for part, group in grouped(drawn, lambda item: item[0].part):
        level = 4 if part else 3
        shown = "".join(_figure(chart, lines, columns, figures.get(chart.name, b""), level) for chart, lines in group)
        shown = f'<div class="charts">{shown}</div>'
        html += folded(part, f"{len(group)} chart{'s' * (len(group) > 1)}", shown) if part else shown
    return f'<p class="help">{HELP}</p>{html}' if "data-chart=" in html else html


def _figure(chart: Chart | SphereChart, lines: Sequence[Trace], columns: Columns, png: bytes, level: int) -> str:
    name, head = escape(chart.name), f"<h{level}>{escape(chart.title)}</h{level}>"
    thinned = "; ".join(f"{t.run}: {len(t.points)} of {t.total} points" for t in lines if len(t.points) < t.total)
    hidden = sum(t.hidden for t in lines)
    below = note(
        missing(chart, columns),
        thinned and f"Thinned for this page{', extremes kept' * isinstance(chart, Chart)} ({thinned}).",
        f"Not on a logarithmic axis: {number(hidden)} at or below zero." if hidden else "",
    )
    if not any(t.points for t in lines):
        return f'<figure id="chart-{name}">{head}<p class="missing">{below}</p></figure>'
    numbers = _numbers(chart, lines) if isinstance(chart, Chart) else ""
    label = escape(f"Chart: {chart.title}. Runs: {', '.join(t.run for t in lines if t.points)}.")
    encoded = b64encode(png).decode()
    picture = f'<img alt="{label}" src="data:image/png;base64,{encoded}">' if png else UNSCRIPTED
    caption = (explained if chart.rank else escape)(chart.caption)
    return (
        f'<figure id="chart-{name}">{head}'
        f'<div class="chart" data-chart="{name}" data-label="{label}"></div><noscript>{picture}</noscript>'
        f"<figcaption>{caption}{below}{numbers}</figcaption></figure>"
    )


def _numbers(chart: Chart, lines: Sequence[Trace]) -> str:
    """The chart for those who cannot see it: ends and extremes of every line."""
    rows = ""
    for t in (t for t in lines if t.points):
        y = [point[1] for point in t.points]
        rows += _row(t.run, *map(number, (t.total, y[0], y[-1], min(y), max(y))))
    head = heads("Run", "Points", "First", "Last", "Lowest", "Highest")
    caption = f'<caption class="unseen">{escape(chart.axis_labels[1])}</caption>'
    table = f"<table>{caption}{head}<tbody>{rows}</tbody></table>"
    return f"<details><summary>Numbers</summary>{sideways(table, f'Numbers of {chart.title}')}</details>"


def sideways(table: str, name: str) -> str:
    """Make room for a table that may be wider than the page: it scrolls, with the keyboard too."""
    return f'<div class="wide" role="group" tabindex="0" aria-label="{escape(name)}">{table}</div>'


def _data(chart: Chart | SphereChart, lines: Sequence[Trace]) -> dict[str, object]:
    """Collect what the script of the page needs to draw the chart."""
    if isinstance(chart, Chart):
        x_label, y_label = chart.axis_labels
        return {
            "title": chart.title,
            "runs": [{"name": t.run, "color": i, **_axes(t, "xy")} for i, t in enumerate(lines) if t.points],
            "lines": [line for line in chart.lines if math.isfinite(line[0])],
            "marks": chart.marks,
            "x_label": x_label,
            "y_label": y_label,
            "log_x": chart.log_x,
            "log_y": chart.log_y,
            "markers": chart.markers,
        }
    curve, *paths = lines
    return {
        "title": chart.title,
        "runs": [{"name": t.run, "color": i, **_axes(t, "xyz")} for i, t in enumerate(paths) if t.points],
        "curve": {"label": chart.color_label, **_axes(curve, "xyzv")},
        "grid": [_axes(Trace("", list(circle), 0), "xyz") for circle in graticule()],
        "view": viewpoint([point for t in paths for point in t.points] or curve.points),
    }


def _axes(trace: Trace, letters: str) -> dict[str, list[float]]:
    return {letter: [float(f"{point[i]:.8g}") for point in trace.points] for i, letter in enumerate(letters)}


def _settings(head: str, values: Mapping[str, object]) -> str:
    rows = "".join(_row(str(name), _words(value)) for name, value in values.items())
    table = f'<table class="facts"><caption class="unseen">{head}</caption><tbody>{rows}</tbody></table>'
    return f"<details><summary>{head}</summary>{table}</details>" if rows else ""


def _words(value: object) -> str:
    """Write a value of a configuration, exactly; containers without their brackets."""
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {_words(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ("; " if isinstance(value, list) else ", ").join(map(_words, value)) or "none"
    return str(value)


def grouped(items: Sequence[Item], part: Callable[[Item], str]) -> list[tuple[str, list[Item]]]:
    """Group items by part, with the parts in the order in which they first appear."""
    parts = dict.fromkeys(map(part, items))
    return [(name, [item for item in items if part(item) == name]) for name in parts]
