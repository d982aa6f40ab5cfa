"""Rows as a page of Markdown."""

import datetime
import math
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median

from .measure import Row
from .problems import Problem

PACKAGES = ("torch", "numpy", "scipy", "curvlinops-for-pytorch", "PyHessian", "hessian-eigenthings", "sharpscope")

GUIDE = """
*The limit* is the least time that a method on a kept graph can take: building it, and the fewest products after which
the Ritz value of Lanczos is right to 1e-3 from the best of five starts (two on large problems), by knowing the answer.

**How to read this.** *ms* is the time of one processor thread that one measurement takes (cold: median over seeds
with its range, everything from the package's own objects on; tracked: mean over steps, what is done once before the
first step being listed as *set-up*, with the search of `tune`, which cold rows do not pay for); *gradients* is the
same in plain gradients of the same loss, timed in the same rounds. Ratios carry over to other machines, times do not.
*Products* counts gradients of gradients; curvlinops multiplies twice more to check that the model is deterministic.
*Error* is relative to the truth: ARPACK to 1e-10 (tracked: 1e-5) in float64, from two starts that agree. *MiB* is the
highest point of one measurement at the edge above what was there before, tensors by torch's profiler and numpy arrays
and Python objects by tracemalloc: the maximum resident set only ever rises within a process, so it cannot tell
contenders apart; *vectors* is the same in numbers per weight. *Tuned* rows have the cheapest of several settings that
is right to 1e-3 on these very seeds, chosen by knowing the answer, which a user does not; where none is right, the
tightest. † marks a model rewritten by hand, because the package fails on the model as it is or measures another
function: PyHessian puts it in eval mode, curvlinops needs forward mode and no writing of buffers, and fused attention
has no second derivative. *Warm* peers start from the last eigenvector; those that cannot are measured every few
steps, and all errors of tracked runs are taken there. Bold errors are wrong beyond 1e-3. Power iteration, and
hessian-eigenthings' Lanczos by default, seek the eigenvalue largest in magnitude: errors near 2 at the start are that
other, negative one. Where a number is wrong or missing, the row stays.
"""


@dataclass(frozen=True)
class Section:
    """The rows of one problem at one stage, cold or tracked."""

    problem: Problem
    stage: str
    mode: str
    rows: list[Row]
    gradient: float
    edge: float  # lr·λ1/2
    took: float  # seconds to measure it


@dataclass(frozen=True)
class Crowd:
    """What is said where several eigenvalues are close to 2/lr; `others` are λ2 and λ3 over λ1."""

    problem: Problem
    exact: float
    others: list[float]
    rows: list[Row]


def cost(row: Row, mode: str) -> float:
    return (median if mode == "cold" else fmean)(row.seconds) if row.seconds else math.inf


def fastest(section: Section, *kinds: str, tuned: bool | None = None) -> Row | None:
    """The cheapest right row of these kinds."""
    rows = [r for r in section.rows if r.kind in kinds and r.right and tuned in (None, r.tuned)]
    return min(rows, key=lambda r: cost(r, section.mode), default=None)


def ours(section: Section) -> list[Row]:
    return [r for r in section.rows if r.kind == "ours" and (section.mode == "cold" or r.every == 1)]


def _over(section: Section, peer: Row | None, mine: Row) -> str:
    if peer is None:
        return "none is right"
    return f"{cost(peer, section.mode) / cost(mine, section.mode):.1f} ({peer.label})"


def headline(section: Section) -> str:
    parts = [
        f"{r.label}: {_over(section, fastest(section, 'package'), r)}, {_over(section, fastest(section, 'by hand'), r)}"
        for r in ours(section)
    ]
    return f"{section.problem.name}, {section.stage}, {section.mode}: " + "; ".join(parts)


def _limits(sections: list[Section]) -> list[str]:
    """Everybody's time over the limit's, one line for each problem and stage."""
    lines = [
        "| problem | stage | weights | the limit: products, gradients | ours cold | ours tracked | best default peer |"
        " best tuned peer | vectors: ours, best default peer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    tracked = {s.problem.name: s for s in sections if s.mode == "tracked"}
    for s in sections:
        floor = next((r for r in s.rows if r.kind == "limit" and r.right), None)
        if s.mode != "cold" or floor is None:
            continue
        least = cost(floor, "cold")
        mine, later = ours(s)[0], tracked.get(s.problem.name) if s.stage == "edge" else None
        peers = [fastest(s, "package", "by hand", tuned=tuned) for tuned in (False, True)]
        cells = [
            f"{s.problem.name} | {s.stage} | {s.problem.size:.1e}",
            f"{fmean(floor.products):.0f}, {least / s.gradient:.0f}",
            f"{cost(mine, 'cold') / least:.1f}{'' if mine.right else ' (wrong)'}",
            f"{cost(later.rows[0], 'tracked') / least:.2f}" if later else "",
            *("none is right" if r is None else f"{cost(r, 'cold') / least:.1f} ({r.label})" for r in peers),
            ", ".join("-" if r is None else _vectors(r, s.problem) or "-" for r in (mine, peers[0])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _vectors(r: Row, p: Problem) -> str:
    return "" if math.isnan(r.memory) else f"{r.memory * 2**20 / (p.size * p.dtype.itemsize):.1f}"


def _summary(sections: list[Section], mode: str) -> list[str]:
    lines = [
        "| problem | stage | lr·λ1/2 | sharpscope | worst error | over fastest default package |"
        " over fastest package | over fastest by hand |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in sections:
        if s.mode != mode:
            continue
        for r in ours(s):
            edge = "" if math.isnan(s.edge) else f"{s.edge:.3f}"
            wrong = f"{max(r.errors):.0e}" if r.errors else r.failure
            peers = (fastest(s, "package", tuned=False), fastest(s, "package"), fastest(s, "by hand"))
            ratios = " | ".join(_over(s, peer, r) for peer in peers)
            lines.append(f"| {s.problem.name} | {s.stage} | {edge} | {r.label} | {wrong} | {ratios} |")
    return lines


def _row(r: Row, s: Section) -> str:
    name = f"{r.label}{', tuned' if r.tuned else ''}"
    if r.failure:
        return f"| {name} | {r.failure} | | | | | | |"
    took = cost(r, s.mode)
    spread = f"{min(r.seconds) * 1e3:.0f} to {max(r.seconds) * 1e3:.0f}"
    wrong = f"{max(r.errors):.1e}" if r.right else f"**{max(r.errors):.1e}**"
    last = r.memory if s.mode == "cold" else r.setup * 1e3
    last_column = "" if math.isnan(last) else f"{last:.1f}"
    products = f"{fmean(r.products):.0f}"
    return (
        f"| {name} | {wrong} | {median(r.errors):.1e} | {products} | {took / s.gradient:.0f} |"
        f" {took * 1e3:.0f} ({spread}) | {last_column} | {_vectors(r, s.problem)} |"
    )


def _table(s: Section) -> list[str]:
    where = s.stage if math.isnan(s.edge) else f"{s.stage} (lr·λ1/2 = {s.edge:.3f})"
    lines = [
        f"### {s.problem.name}, {where}, {s.mode}",
        "",
        "| contender | worst error | median | products | gradients | ms (range) |"
        f" {'MiB' if s.mode == 'cold' else 'set-up ms'} | vectors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return [*lines, *(_row(r, s) for r in s.rows), ""]


def _crowd(c: Crowd) -> list[str]:
    p, exact = c.problem, c.exact
    threshold = 2 / p.lr
    side = "above" if exact > threshold else "below"
    lines = [
        "## Which side of the edge",
        "",
        f"{p.about}, at the first midpoint of two steps with λ1 .3 to 1.5 % above 2/lr and λ3 within 3 % of it: λ1 is"
        f" {abs(exact / threshold - 1):.2%} *{side}* 2/lr, λ2 and λ3 are {c.others[0]:.3f} and {c.others[1]:.3f} of it."
        " What the defaults say, one word per seed:",
        "",
        "| contender | says | worst error |",
        "|---|---|---|",
    ]
    for r in c.rows:
        says = r.failure or ", ".join("above" if v > threshold else "below" for v in r.values)
        lines.append(f"| {r.label} | {says} | {f'{max(r.errors):.1e}' if r.errors else ''} |")
    return [*lines, ""]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def page(sections: list[Section], crowd: Crowd | None, seeds: int, steps: int) -> str:
    problems = {s.problem.name: s.problem for s in sections}
    lines = [
        "# The top Hessian eigenvalue: sharpscope and its peers",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores of {_processor()}, one thread, Python"
        f" {platform.python_version()}; " + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + f". {seeds}"
        f" seeds, {steps} tracked steps, {sum(s.took for s in sections) / 60:.0f} minutes. Made by `make bench`.",
        "",
        "Seconds over those of the limit (1 is the best possible on a kept graph; peers only where right to 1e-3):",
        "",
        *_limits(sections),
        "",
        *(
            f"- **{p.name}**: {p.about}; {p.size} weights, {str(p.dtype)[6:]}, lr {p.lr:g}, wd {p.wd:g}"
            for p in problems.values()
        ),
        GUIDE,
        "## Seconds of the fastest peer that is right to 1e-3, over those of sharpscope",
        "",
        "Cold, one number from nothing; the goal is 3 times a right default.",
        "",
        *_summary(sections, "cold"),
        "",
        "Tracked, consecutive steps from the edge; the goal is 8 times a right default.",
        "",
        *_summary(sections, "tracked"),
        "",
        *(_crowd(crowd) if crowd else ()),
        "## All rows",
        "",
        *(line for s in sections for line in _table(s)),
    ]
    return "\n".join(lines)
