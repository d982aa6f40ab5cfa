"""Claims and charts of a study in few words: what all of them share is said once."""

from collections.abc import Callable, Mapping
from typing import Any

from ...report.charts import Chart
from .claims import WIDER, Claim, Criterion
from .observe_old import Observer


def claiming(part: str) -> Callable[..., Claim]:
    """``claim(sentence, observe, criterion, kind, *runs)``; a wider claim never decides, others do unless `aside`."""

    def claim(
        sentence: str,
        observe: Observer,
        criterion: Criterion,
        kind: str,
        *runs: str,
        aside: bool = False,
        note: str = "",
    ) -> Claim:
        return Claim(sentence, observe, criterion, kind, part, runs, not (aside or kind == WIDER), note)

    return claim


def charting(part: str, labels: Mapping[str, str], captions: Mapping[str, str]) -> Callable[..., Chart]:
    """``chart(name, title, x, y, runs, log="xy")``: axes are labelled by column, captions found by the chart's name."""

    def chart(name: str, title: str, x: str, y: str, runs: tuple[str, ...], log: str = "", **more: Any) -> Chart:
        more |= {"log_x": "x" in log, "log_y": "y" in log, "part": part, "caption": captions[name]}
        return Chart(name, title, x, y, runs, labels[x], labels[y], **more)

    return chart
