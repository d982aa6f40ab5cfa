"""The pages over several runs, in the look of a report: all studies, and one study under several seeds."""

import math
import re
import statistics
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate

from ...report.charts import Chart, SphereChart
from ...report.glossary import explained
from ...report.html import MARK, asset, chapters_page, folded, grouped, heads, note, number
from .claims import CONTROL, WIDER, Claim, Verdict
from .seeds import CONFIDENCE, LEAST_FRACTION, Repeated, Spread
from .study import Study, headings, paragraphs

STATES = {"": "all claims", "holds": "what holds", "fails": "what fails", "aside": "what does not decide"}
"""Classes of the rows of a table of claims, by which it can be filtered."""

UNSUPPORTED = "Not supported here"

FIRST_SCREEN = 345
"""Letters above the pictures of a page that leave room for one of them on the first screen of a phone."""


@dataclass(frozen=True)
class StudyRow:
    """A study in the overview."""

    name: str
    title: str
    paper: str
    link: str  # of its page, relative; empty where there is none
    verdicts: Sequence[Verdict]
    failures: Sequence[str]
    stopped: Mapping[str, str]
    seconds: float
    seeds: int  # zero for a single run
    note: str
    done: bool
    picture: bytes = b""  # PNG

    @property
    def failed(self) -> list[Verdict]:
        """Deciding claims that do not hold, controls included."""
        return [v for v in self.verdicts if v.deciding and not v.passed]

    @property
    def unsupported(self) -> list[Verdict]:
        """Wider claims of the paper that were not borne out."""
        return [v for v in self.verdicts if v.kind == WIDER and not v.passed]


def overview(rows: Sequence[StudyRow]) -> str:
    """A table with a row for each study, below it what failed and, folded, every claim."""
    verdicts = [v for row in rows for v in row.verdicts]
    missing = [row for row in rows if row.failures]
    waiting = sum(not row.done for row in rows)
    good = not missing and not any(row.failed for row in rows)
    links = "".join(
        f'<li>Fails: <a href="#study-{escape(row.name)}">{escape(v.claim)}</a> ({escape(row.title)})</li>'
        for row in rows
        for v in row.failed
    )
    links += "".join(
        f'<li>Could not run: <a href="#study-{escape(row.name)}">{escape(row.title)}</a></li>' for row in missing
    )
    text = summary(verdicts) if verdicts else "There are no verdicts yet."
    text += f" {waiting} {'studies are' if waiting > 1 else 'study is'} still running." * bool(waiting)
    kind = "waits" if waiting and good else "holds" if good else "fails"
    box = f'<div class="summary {kind}"><p>{"" if kind == "waits" else MARK[good]} {text}</p>'
    box += f"<ul>{links}</ul></div>" if links else "</div>"
    head = heads("Study", "Deciding claims", "Negative controls", "Wider claims", "Processor time")
    bodies = "".join(map(_study, rows))
    table = f'<table class="studies"><caption class="unseen">All studies</caption>{head}{bodies}</table>'
    lead = (
        "Each study repeats what a paper argues, as sentences with numbers and criteria that can fail. Negative"
        " controls break the hypothesis, and the effect has to be absent. Wider claims of a paper do not decide."
    )
    return chapters_page(_headline(rows), _count(rows), lead, [("Studies", table)], top=box + _previews(rows))


def _previews(rows: Sequence[StudyRow]) -> str:
    """Show a small picture of every study that has one, as a link to its page."""
    shown = "".join(
        f'<a href="{escape(row.link)}"><img alt="" loading="lazy" src="data:image/png;base64,'
        f'{b64encode(row.picture).decode()}"><span>{escape(row.title)}</span></a>'
        for row in rows
        if row.picture and row.link
    )
    return f'<div class="previews" role="group" aria-label="The studies in pictures">{shown}</div>' if shown else ""


def _headline(rows: Sequence[StudyRow]) -> str:
    """Say in a sentence what has come of the studies."""
    failed = sum(len(row.failed) for row in rows)
    missing = sum(bool(row.failures) for row in rows)
    if missing or failed:
        claims = f"{failed} deciding claim{'s fail' if failed > 1 else ' fails'}" if failed else ""
        broken = f"{missing} {'studies' if missing > 1 else 'study'} could not run" if missing else ""
        return f"Of {len(rows)} studies: {' and '.join(filter(None, (claims, broken)))}"
    done = sum(row.done for row in rows)
    if done < len(rows):
        return f"{done} of {len(rows)} studies are done, and nothing fails so far"
    return f"What {len(rows)} studies claim holds" if len(rows) > 1 else "What the study claims holds"


def _count(rows: Sequence[StudyRow]) -> str:
    total = sum(row.seconds for row in rows)
    seeds = max((row.seeds for row in rows), default=0)
    parts = [f"{len(rows)} {'studies' if len(rows) > 1 else 'study'}", f"under {seeds} seeds" if seeds else ""]
    return " ".join(filter(None, parts)) + f", {duration(total)} of processor time"


def _study(row: StudyRow) -> str:
    deciding = [v for v in row.verdicts if v.deciding]
    claims = [v for v in deciding if v.kind != CONTROL]
    controls = [v for v in deciding if v.kind == CONTROL]
    wider = [v for v in row.verdicts if v.kind == WIDER]
    title = f'<a href="{escape(row.link)}">{escape(row.title)}</a>' if row.link else escape(row.title)
    seeds = f"On {row.seeds} seeds." if row.seeds else ""
    first = "".join(
        (
            f'<th scope="row">{title}{note(row.paper, " ".join(filter(None, (seeds, row.note))))}</th>',
            _tally("Deciding claims", claims, "hold", row.done),
            _tally("Negative controls", controls, "behave", row.done),
            f'<td data-head="Wider claims">{_of(wider, "supported") if wider else "none"}</td>',
            f'<td data-head="Processor time">{duration(row.seconds) if row.seconds else "–"}</td>',
        )
    )
    bad = "fails" if row.failed or row.failures else "holds" if row.done else "waits"
    more = [f"<li><b>Could not run:</b> {escape(sentence)}</li>" for sentence in row.failures]
    more += [_line("Fails", v) for v in row.failed] + [_line(UNSUPPORTED, v) for v in row.unsupported]
    more += [f"<li><b>Stopped:</b> {escape(job)}: {escape(why)}</li>" for job, why in row.stopped.items()]
    html = f"<ul>{''.join(more)}</ul>" if more else ""
    if row.verdicts:
        table = claims_table(
            f'<span class="unseen">{escape(row.title)}</span>', [(_anchor(row, v), v) for v in row.verdicts]
        )
        html += f"<details><summary>All {len(row.verdicts)} claims of {escape(row.name)}</summary>{table}</details>"
    below = f'<tr class="more"><td colspan="5">{html}</td></tr>' if html else ""
    return f'<tbody data-state="{bad}"><tr id="study-{escape(row.name)}">{first}</tr>{below}</tbody>'


def _anchor(row: StudyRow, v: Verdict) -> str:
    return f"{row.name}-{list(row.verdicts).index(v) + 1}"


def _tally(head: str, verdicts: Sequence[Verdict], words: str, done: bool) -> str:
    if not verdicts:
        return f'<td data-head="{head}">{"–" if done else "running"}</td>'
    good = all(v.passed for v in verdicts)
    text = f"<span>{MARK[good]} {_of(verdicts, words)}</span>"
    return f'<td data-head="{head}" class="{"good" if good else "bad"}">{text}</td>'


def _of(verdicts: Sequence[Verdict], words: str) -> str:
    return f"{sum(v.passed for v in verdicts)} of {len(verdicts)} {words}"


def _line(word: str, v: Verdict) -> str:
    return f"<li><b>{word}:</b> {escape(v.claim)}: {observed(v.observed)} ({escape(v.criterion)})</li>"


def duration(seconds: float) -> str:
    """Seconds as one reads them.

    >>> duration(3.2), duration(75), duration(3720)
    ('3 s', '1 min 15 s', '1 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def seeds_page(study: Study, links: Mapping[int, str], repeated: Sequence[Repeated], failures: Sequence[str]) -> str:
    """Make the page of one study under several seeds: what each claim comes to."""
    title, _ = headings(study)
    verdicts = [r.verdict for r in repeated]
    failed = [r for r in repeated if r.verdict.deciding and not r.verdict.passed]
    good = bool(repeated) and not failed and not failures
    text = summary(verdicts) if verdicts else "There are no verdicts yet."
    lines = [f"<li>Fails: {escape(r.verdict.claim)}</li>" for r in failed]
    lines += [f"<li>Could not run: {escape(sentence)}</li>" for sentence in failures]
    html = f'<div class="summary {"holds" if good else "fails"}"><p>{MARK[good]} {text}</p>'
    html += f"<ul>{''.join(lines)}</ul></div>" if lines else "</div>"
    n = max((r.seeds for r in repeated), default=0)
    html += f'<p class="how">{_how(n)}</p>' if n else ""
    for part in dict.fromkeys(v.part for v in verdicts):
        rows = "".join(_repeated(r) for r in repeated if r.verdict.part == part)
        head = heads("Verdict", "Claim", "Median", "Range", "Holds on", "Criterion")
        caption = f"<caption><h3>{escape(part or 'All claims')}</h3></caption>"
        html += f'<table class="claims seeds">{caption}{head}<tbody>{rows}</tbody></table>'
    reports = "".join(f'<li><a href="{escape(link)}">seed {seed}</a></li>' for seed, link in links.items())
    chapters = [("Claims", html), ("Reports", f'<ul class="reports">{reports}</ul>')]
    lead = f"One study under {len(links)} seeds: data, starts and mini-batches are drawn anew."
    return chapters_page(title, study.PAPER, lead, chapters)


def _how(n: int) -> str:
    percent = f"{100 * CONFIDENCE:g} %"
    ends = (
        f"Below a median, its {percent} interval between order statistics, which assumes nothing about the spread"
        if n >= 6
        else f"With {n} seeds there is no {percent} interval of a median that assumes nothing: at least 6 are needed,"
        " and only the range is given"
    )
    return (
        f"{ends}. Below a count, the {percent} interval of Clopper and Pearson for the share of seeds. A claim holds if"
        f" it holds on {100 * LEAST_FRACTION:g} % of the seeds; a negative control has to behave on all."
    )


def _repeated(r: Repeated) -> str:
    kind, words = state(r.verdict)
    low, high = (f"{100 * end:.0f}" for end in r.fraction)
    return (
        f'<tr class="{kind}"><td class="verdict">{words}</td>{claimed(r.verdict)}'
        f'<td data-head="Median" class="number"><div>{"".join(map(_median, r.spreads))}</div></td>'
        f'<td data-head="Range"><div>{"".join(map(_range, r.spreads))}</div></td>'
        f'<td data-head="Holds on"><div>{r.passes} of {r.seeds}{note(f"{low} to {high} %")}</div></td>'
        f'<td data-head="Criterion"><div>{escape(r.verdict.criterion)}{note(r.verdict.kind)}</div></td></tr>'
    )


def _median(s: Spread) -> str:
    ends = f"{number(s.interval[0])} to {number(s.interval[1])}" if s.interval else ""
    absent = f"no number on {s.missing}" if s.missing else ""
    label = f"{s.label} " if s.label else ""
    return f"<div>{label}{number(s.median)}{note(ends, absent)}</div>"


def _range(s: Spread) -> str:
    label = f"{s.label} " if s.label else ""
    return f"<div>{label}{number(s.low)} to {number(s.high)}</div>"


WORDS = {CONTROL: ("as it should", "not as it should"), WIDER: ("supported here", "not supported here")}


def observed(value: float | tuple[float, ...]) -> str:
    """One number, the range of two, or the median and range of more.

    >>> observed((2.2701, 2.05)), observed((3.0, 1.0, 1.5))
    ('2.05 to 2.27', '1.5 (1 to 3)')
    """
    values = value if isinstance(value, Sequence) else (value,)
    if not values or any(math.isnan(v) for v in values):
        return "not a number"
    span = " to ".join(dict.fromkeys((number(min(values)), number(max(values)))))
    return f"{number(statistics.median(values))} ({span})" if len(values) > 2 and " to " in span else span


def summary(verdicts: Sequence[Verdict]) -> str:
    """The verdicts in one sentence."""
    claims = [v.passed for v in verdicts if v.deciding and v.kind != CONTROL]
    controls = [v.passed for v in verdicts if v.deciding and v.kind == CONTROL]
    others = sum(not v.deciding for v in verdicts)
    text = []
    if claims:
        text.append(f"{sum(claims)} of {len(claims)} deciding claim{'s hold' if len(claims) > 1 else ' holds'}")
    if controls:
        behave = "s behave as they" if len(controls) > 1 else " behaves as it"
        text.append(f"{sum(controls)} of {len(controls)} negative control{behave} should")
    if others:
        text.append(f"{others} more {'are' if others > 1 else 'is'} reported without deciding")
    return "; ".join(text) + "."


def opening(argument: str) -> tuple[str, str]:
    """Split an argument into the sentences above the pictures, one at least, and those below."""
    sentences = re.split(r"(?<=[.?!]) ", argument)
    lengths = accumulate(len(sentence) + 1 for sentence in sentences)
    above = max(1, sum(length <= FIRST_SCREEN + 1 for length in lengths))
    return " ".join(sentences[:above]), " ".join(sentences[above:])


def about(study: Study) -> str:
    """Show what the docstring of a study says beyond its opening: the rest of the argument, and equations, as HTML."""
    _, rest = opening(headings(study)[1])
    html = [f"<p>{explained(rest)}</p>"] if rest else []
    for paragraph in paragraphs(study)[2:]:
        equations = any(line.startswith("    ") for line in paragraph.splitlines())
        text = escape(paragraph if equations else " ".join(paragraph.split()))
        html.append(f'<pre tabindex="0">{text}</pre>' if equations else f"<p>{text}</p>")
    return re.sub(r"(`{1,2})([^`]+)\1", r"<code>\2</code>", "".join(html))


def outcome(verdicts: Sequence[Verdict]) -> str:
    """Say in a line what was tested, with links to what fails."""
    if not verdicts:
        return ""
    failed = [(i, v) for i, v in _numbered(verdicts) if v.deciding and not v.passed]
    links = "".join(f'<li>Fails: <a href="#{i}">{escape(v.claim)}</a></li>' for i, v in failed)
    html = f'<div class="summary {"fails" if failed else "holds"}"><p>{MARK[not failed]} {summary(verdicts)}</p>'
    return html + (f"<ul>{links}</ul></div>" if failed else "</div>")


def _numbered(verdicts: Sequence[Verdict]) -> list[tuple[str, Verdict]]:
    return [(f"claim-{i}", v) for i, v in enumerate(verdicts, 1)]


def claims_section(verdicts: Sequence[Verdict], charts: Mapping[str, str] | None = None) -> str:
    """All verdicts, folded part by part, those parts open in which one fails; `charts` are names, by claim."""
    if not verdicts:
        return ""
    many = len({v.study for v in verdicts}) > 1
    html = _filters(verdicts)
    numbered = _numbered(verdicts)
    for part, group in grouped(numbered, lambda item: f"{item[1].study}: {item[1].part}" if many else item[1].part):
        deciding = [v for _, v in group if v.deciding]
        beside, bad = _of(deciding, "hold") if deciding else "", not all(v.passed for v in deciding)
        caption = f'<span class="unseen">{escape(part or "All claims")}</span>'
        html += folded(part or "All claims", beside, claims_table(caption, group, charts or {}), unfolded=bad)
    return f"{html}<script>{asset('claims.js')}</script>"


def _filters(verdicts: Sequence[Verdict]) -> str:
    """Two lists by which a script shows only some of the claims."""
    kinds = "".join(f"<option>{kind}</option>" for kind in dict.fromkeys(v.kind for v in verdicts))
    states = "".join(f'<option value="{value}">{words}</option>' for value, words in STATES.items())
    return (
        f'<div class="tools" id="claim-filters" hidden><label>Show <select id="claim-state">{states}</select></label>'
        f' <label>of <select id="claim-kind"><option value="">all kinds</option>{kinds}</select></label>'
        ' <output id="claim-count"></output></div>'
    )


def chart_of(claim: Claim, charts: Sequence[Chart | SphereChart]) -> str:
    """Name the chart of the claim's part that shares most words with it, then most runs; empty where none has any."""

    def words(text: str) -> set[str]:
        return set(re.findall(r"\w{4,}|\w\d", text.lower()))

    def fit(chart: Chart | SphereChart) -> tuple[int, int, int]:
        runs = chart.runs if isinstance(chart, Chart) else (chart.curve, *chart.paths)
        shown = words(f"{chart.title} {' '.join(getattr(chart, 'axis_labels', ()))}")
        return len(shown & words(claim.sentence)), len({*runs} & {*claim.runs}), -len(runs)

    there = [chart for chart in charts if chart.part == claim.part and any(fit(chart)[:2])]
    return max(there, key=fit).name if there else ""


def ranked(charts: Sequence[Chart | SphereChart]) -> list[Chart | SphereChart]:
    """Charts of which some are on top of the page: the first two, where the study ranks none."""
    if any(chart.rank for chart in charts):
        return list(charts)
    return [replace(chart, rank=i if i <= 2 else 0) for i, chart in enumerate(charts, 1)]


def claims_table(caption: str, verdicts: Sequence[tuple[str, Verdict]], charts: Mapping[str, str] | None = None) -> str:
    """The verdicts, each with the id of its row; the caption is HTML, and `charts` are names, by claim."""
    rows = "".join(_claim(name, v, (charts or {}).get(v.claim, "")) for name, v in verdicts)
    head = heads("Verdict", "Claim", "Observed", "Criterion", "Kind")
    return f'<table class="claims"><caption>{caption}</caption>{head}<tbody>{rows}</tbody></table>'


def state(v: Verdict) -> tuple[str, str]:
    """The class of a verdict, and its words with a mark (HTML)."""
    words = WORDS.get(v.kind, ("holds", "fails"))
    kind = ("holds" if v.passed else "fails") + ("" if v.deciding else " aside")
    return kind, f"{MARK[v.passed]} {words[not v.passed]}"


def claimed(v: Verdict, chart: str = "") -> str:
    """Make the head of a row: the claim, with what there is to say about it, and a link to its chart."""
    aside = "" if v.deciding else '<span class="tag">reported, does not decide</span>'
    link = f' <a class="to" href="#chart-{escape(chart)}">chart</a>' if chart else ""
    return f'<th scope="row">{escape(v.claim)}{link} {aside}{note(v.note)}</th>'


def _claim(name: str, v: Verdict, chart: str) -> str:
    kind, words = state(v)
    return (
        f'<tr id="{escape(name)}" class="{kind}" data-kind="{escape(v.kind)}"><td class="verdict">{words}</td>'
        f"{claimed(v, chart)}"
        f'<td data-head="Observed" class="number">{observed(v.observed)}</td>'
        f'<td data-head="Criterion">{escape(v.criterion)}</td>'
        f'<td data-head="Kind" class="kind">{escape(v.kind)}</td></tr>'
    )
