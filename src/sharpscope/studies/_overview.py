"""The pages over several runs, in the look of a report: all studies, and one study under several seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..claims import WIDER, Verdict
from ..report import CONTROL, MARK, chapters_page, claimed, claims_table, heads, note, number, observed, state, summary
from ._seeds import CONFIDENCE, LEAST_SHARE, Repeated, Spread
from ._study import Study, headings

UNSUPPORTED = "Not supported here"


@dataclass(frozen=True)
class Row:
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

    @property
    def failed(self) -> list[Verdict]:
        """Deciding claims that do not hold, controls included."""
        return [v for v in self.verdicts if v.deciding and not v.passed]

    @property
    def unsupported(self) -> list[Verdict]:
        """Wider claims of the paper that were not borne out."""
        return [v for v in self.verdicts if v.kind == WIDER and not v.passed]


def overview(rows: Sequence[Row]) -> str:
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
    said = summary(verdicts) if verdicts else "There are no verdicts yet."
    said += f" {waiting} {'studies are' if waiting > 1 else 'study is'} still running." * bool(waiting)
    kind = "waits" if waiting and good else "holds" if good else "fails"
    box = f'<div class="summary {kind}"><p>{"" if kind == "waits" else MARK[good]} {said}</p>'
    box += f"<ul>{links}</ul></div>" if links else "</div>"
    head = heads("Study", "Deciding claims", "Negative controls", "Wider claims", "Processor time")
    bodies = "".join(map(_study, rows))
    table = f'<table class="studies"><caption class="unseen">All studies</caption>{head}{bodies}</table>'
    lead = (
        "Each study repeats what a paper argues, as sentences with numbers and criteria that can fail. Negative"
        " controls break the hypothesis, and the effect has to be absent. Wider claims of a paper do not decide."
    )
    return chapters_page("Studies side by side", _count(rows), lead, [("Studies", box + table)])


def _count(rows: Sequence[Row]) -> str:
    total = sum(row.seconds for row in rows)
    seeds = max((row.seeds for row in rows), default=0)
    parts = [f"{len(rows)} {'studies' if len(rows) > 1 else 'study'}", f"under {seeds} seeds" if seeds else ""]
    return " ".join(filter(None, parts)) + f", {duration(total)} of processor time"


def _study(row: Row) -> str:
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


def _anchor(row: Row, v: Verdict) -> str:
    return f"{row.name}-{list(row.verdicts).index(v) + 1}"


def _tally(head: str, verdicts: Sequence[Verdict], words: str, done: bool) -> str:
    if not verdicts:
        return f'<td data-head="{head}">{"–" if done else "running"}</td>'
    good = all(v.passed for v in verdicts)
    said = f"<span>{MARK[good]} {_of(verdicts, words)}</span>"
    return f'<td data-head="{head}" class="{"good" if good else "bad"}">{said}</td>'


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
    """What each claim of a study comes to under several seeds."""
    title, _ = headings(study)
    verdicts = [r.verdict for r in repeated]
    failed = [r for r in repeated if r.verdict.deciding and not r.verdict.passed]
    good = bool(repeated) and not failed and not failures
    said = summary(verdicts) if verdicts else "There are no verdicts yet."
    lines = [f"<li>Fails: {escape(r.verdict.claim)}</li>" for r in failed]
    lines += [f"<li>Could not run: {escape(sentence)}</li>" for sentence in failures]
    html = f'<div class="summary {"holds" if good else "fails"}"><p>{MARK[good]} {said}</p>'
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
    share = f"{100 * CONFIDENCE:g} %"
    ends = (
        f"Below a median, its {share} interval between order statistics, which assumes nothing about the spread"
        if n >= 6
        else f"With {n} seeds there is no {share} interval of a median that assumes nothing: at least 6 are needed, and"
        " only the range is given"
    )
    return (
        f"{ends}. Below a count, the {share} interval of Clopper and Pearson for the share of seeds. A claim holds if"
        f" it holds on {100 * LEAST_SHARE:g} % of the seeds; a negative control has to behave on all."
    )


def _repeated(r: Repeated) -> str:
    kind, words = state(r.verdict)
    low, high = (f"{100 * end:.0f}" for end in r.share)
    return (
        f'<tr class="{kind}"><td class="verdict">{words}</td>{claimed(r.verdict)}'
        f'<td data-head="Median" class="number"><div>{"".join(map(_median, r.spreads))}</div></td>'
        f'<td data-head="Range"><div>{"".join(map(_range, r.spreads))}</div></td>'
        f'<td data-head="Holds on"><div>{r.held} of {r.seeds}{note(f"{low} to {high} %")}</div></td>'
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
