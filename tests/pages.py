"""Pages for tests: a small one with every kind of content, what stands in it, and a server of it."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sharpscope.records.run_log import RunLog
from sharpscope.report.charts import Chart, SphereChart
from sharpscope.report.html import render
from sharpscope.report.server import Live, server
from sharpscope.studies._framework.claims import Verdict
from sharpscope.studies._framework.pages import claims_section, outcome

HOSTILE = """</script><script>alert(1)</script><img src=x onerror="alert('2')">&amp;""" + 80 * "x"


def verdict(claim: str = "it holds", passed: bool = True, **fields: Any) -> Verdict:
    given = {"observed": 1.0, "criterion": "at most 2", "kind": "inequality", "part": "One", **fields}
    return Verdict("study", claim, passed=passed, **given)


def page(name: str = "run", **changes: Any) -> dict[str, Any]:
    """The arguments of a small page with every kind of content; `name` goes wherever a name can stand."""
    turns = [math.tau * k / 60 for k in range(61)]
    rows: list[dict[str, Any]] = []
    for k in range(120):
        rows.append({"run": name, "step": k, "loss": math.exp(-k / 9), "edge": 2 + math.sin(k) / 9})
        rows.append({"run": "other", "step": 1.5 * k, "loss": math.exp(-k / 30), "edge": 1.5})
    rows += [
        {"run": "curve", "x": math.cos(t), "y": math.sin(t), "z": 0.0, "sharpness": 2 + math.cos(t)} for t in turns
    ]
    rows += [{"run": "path", "x": math.cos(t), "y": math.sin(t), "z": 0.0} for t in turns[:9]]
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    runs = (name, "other")
    charts = [
        Chart(
            "loss",
            f"Loss {name}",
            x="step",
            y="loss",
            runs=runs,
            y_label=name,
            log="y",
            caption=name,
            part=name,
        ),
        Chart(
            "edge",
            "Edge",
            x="step",
            y="edge",
            runs=runs,
            lines=((2.0, name), (1.99, "near")),
            marks=((60.0, name),),
            rank=1,
        ),
        Chart("dots", "Dots", x="loss", y="edge", runs=runs, log="xy", markers=True),
        SphereChart("sphere", "Sphere", curve="curve", color="sharpness", paths=("path",), caption=name),
        Chart("absent", "Absent", x="step", y="accuracy", runs=runs),
    ]
    verdicts = [
        verdict(name, part=name, note=name, criterion=name),
        verdict("it fails", passed=False, observed=(2.05, 2.2701)),
        verdict("it fails aside", passed=False, deciding=False),
        verdict("the control behaves", kind="negative control"),
    ]
    facts: dict[str, Any] = {"name": name, name: 0.0005, "seeds": (0, 1), "stopped": {}}
    given: dict[str, Any] = {
        "title": name,
        "subtitle": name,
        "lead": name,
        "verdicts": verdicts,
        "charts": charts,
        "columns": columns,
    }
    given = {**given, "config": facts, "environment": facts, **changes}
    verdicts = given.pop("verdicts")
    links = {name: "loss", "it fails": "edge"}
    return {**given, "tested": outcome(verdicts), "sections": [("Claims", claims_section(verdicts, links))]}


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(html)

    @property
    def data(self) -> str:
        """The JSON that the charts are drawn from."""
        there = [attributes for tag, attributes in self.tags if tag == "script"]
        return next(text for text, a in zip(self.scripts, there, strict=True) if a.get("id") == "data")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data


def rows_of(directory: Path) -> str | None:
    """A page of the rows of one log, for tests; None while there are none."""
    rows = RunLog(directory, "training").rows
    given = page("training", title=f"{len(rows)} rows", columns={"run": [], "step": []}, verdicts=[], charts=[])
    return render(**given) if rows else None


@contextmanager
def serving(
    directory: Path, make: Callable[[Path], str | None] = rows_of, finished: Callable[[Path], bool] = lambda _: False
) -> Iterator[int]:
    """The port of a server of the directory."""
    with server(Live(directory, make, finished, max_fraction=1)) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield served.server_port
        finally:
            served.shutdown()
            thread.join()
