"""What results show in a notebook, and the bars of long solves."""

import io
import subprocess
import sys
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from pages import HOSTILE, Elements

from sharpscope import Monitor, Objective, display, find_groups, rule_of
from sharpscope.autodiff import tune
from sharpscope.errors import InvalidValue, MissingExtra
from sharpscope.flows import Prediction, compare
from sharpscope.linalg import SymmetricOperator, density, diagonal, lanczos, largest_eigenpair, rightmost, trace
from sharpscope.monitoring import Finding, Findings
from sharpscope.records import History

VOID = {"img", "br", "hr"}


class Balance(HTMLParser):
    """Whether every element of HTML is closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.unclosed: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.unclosed += [tag] if tag not in VOID else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag


def problem() -> tuple[Objective, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8, affine=False), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )
    f = Objective(net, torch.nn.functional.mse_loss, [(torch.randn(16, 4), torch.randn(16, 1))])
    return f, torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)


def train(f: Objective, optimizer: torch.optim.Optimizer, monitor: Monitor, steps: int) -> None:
    x, y = next(iter(f.data))
    for _ in range(steps):
        optimizer.zero_grad()
        f.loss(f.model(x), y).backward()
        optimizer.step()
        monitor.step()


def watched(steps: int = 6) -> Monitor:
    f, optimizer = problem()
    monitor = Monitor(f, optimizer, every=2)
    train(f, optimizer, monitor, steps)
    return monitor


def matrix(n: int = 60) -> SymmetricOperator:
    d = torch.linspace(-1, 3, n, dtype=torch.float64)
    return SymmetricOperator(lambda v: d * v, d)


def predicted() -> Prediction:
    f, optimizer = problem()
    return compare(f, rule_of(optimizer), f.weights(), 10, points=5)


HOSTILE_ROWS: list[dict[str, Any]] = [{"run": HOSTILE, HOSTILE: HOSTILE, **{f"c{i}": float(i) for i in range(60)}}] * 20
RESULTS: dict[str, Callable[[], Any]] = {
    "eigenpairs": lambda: lanczos(matrix(), 3),
    "density": lambda: density(matrix(), steps=20),
    "groups": lambda: find_groups(problem()[0]),
    "checkup": lambda: tune(problem()[0], products=3, points=1, repeats=1),
    "prediction": predicted,
    "monitor": watched,
    "unused monitor": lambda: Monitor(*problem(), every=2),
    "budgeted monitor": lambda: Monitor(*problem(), budget="5%"),
    "history": lambda: watched().history,
    "hostile history": lambda: History(HOSTILE_ROWS),
    "empty history": History,
    "finding": lambda: Finding(HOSTILE, HOSTILE, remedy=HOSTILE),
    "findings": lambda: watched().findings(),
    "no findings": Findings,
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_shows_itself_in_a_little_html_and_in_one_line(name: str) -> None:
    result = RESULTS[name]()
    html = result._repr_html_()
    assert Balance(html).unclosed == []
    elements = Elements(html)
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in elements.tags}  # nothing is loaded or run
    assert not [a for _, attributes in elements.tags for a in attributes if a.startswith("on") or a in ("src", "href")]
    assert len(html) < 20_000
    if "finding" not in name:
        assert "\n" not in repr(result) and 10 < len(repr(result)) < 200 + len(HOSTILE)
        assert " at 0x" not in repr(result) and "tensor(" not in repr(result)


def test_the_html_has_the_numbers() -> None:
    top = lanczos(matrix(), 2)
    assert "λ1 = 3," in top._repr_html_()
    assert "0.weight (32) is invariant" in find_groups(problem()[0])._repr_html_()
    monitor = watched()
    assert all(finding.text.split("<")[0][:30] in monitor._repr_html_() for finding in monitor.findings())
    spectrum = density(matrix(), steps=60)
    assert "50% of the eigenvalues lie below 1." in str(spectrum)  # of -1 to 3, evenly


def test_showing_a_monitor_measures_nothing() -> None:
    monitor = Monitor(*problem(), every=2)
    before = torch.random.get_rng_state()
    monitor._repr_html_()
    assert "0 rows" in repr(monitor) and len(monitor.recorder.history) == 0
    assert torch.equal(before, torch.random.get_rng_state())


def test_figures_are_those_of_matplotlib_and_show_the_data() -> None:
    monitor = watched()
    curves = {ax.get_title(loc="left"): ax.lines[0].get_ydata() for ax in monitor.plot().axes}
    assert list(curves["Sharpness"]) == pytest.approx(monitor.history.series("training", "sharpness").tolist())
    prediction = predicted()
    curves = {ax.get_title(loc="left"): ax.lines[1].get_ydata() for ax in prediction.plot().axes}
    flow = prediction.history.series("central flow", "sharpness")
    assert list(curves["Sharpness"]) == pytest.approx(flow.tolist())
    found = density(matrix(), steps=20)
    heights, fractions = found.plot().axes
    assert heights.lines[0].get_ydata() == pytest.approx(found.density)
    assert fractions.lines[0].get_ydata() == pytest.approx(found.cumulative)
    for fig in (monitor.plot(), prediction.plot(), found.plot()):
        picture = io.BytesIO()
        fig.savefig(picture, format="png")
        assert picture.tell() > 10_000
    with pytest.raises(InvalidValue, match="nothing to draw yet"):
        Monitor(*problem(), budget="5%").plot()


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    found = density(matrix(), steps=20)
    with pytest.raises(MissingExtra, match="pip install matplotlib"):
        found.plot()
    with pytest.raises(MissingExtra, match="pip install pandas"):
        History().to_pandas()


def test_a_table_of_pandas_has_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = types.ModuleType("pandas")
    pandas.__dict__["DataFrame"] = dict
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    history = History([{"run": "a", "step": 0}, {"run": "a", "step": 1, "loss": 0.5}])
    assert history.to_pandas() == {"run": ["a", "a"], "step": [0, 1], "loss": [None, 0.5]}


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the cells of a notebook have shown, one list for each."""
    shown: list[list[str]] = []

    class Handle:
        def __init__(self, html: str) -> None:
            self.views = [html]
            shown.append(self.views)

        def update(self, html: str) -> None:
            self.views.append(html)

    ipython, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.__dict__["get_ipython"] = lambda: types.SimpleNamespace(kernel=object())
    module.__dict__.update(HTML=str, display=lambda html, display_id: Handle(html))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_a_live_monitor_updates_its_cell(cells: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharpscope.monitoring.monitor.SECONDS_BETWEEN_VIEWS", 0.0)
    f, optimizer = problem()
    monitor = Monitor(f, optimizer, every=2)
    monitor.live()
    train(f, optimizer, monitor, 6)
    monitor.close()
    (views,) = cells
    assert "step 0, 0 rows" in views[0] and "step 6, 4 rows" in views[-1]
    assert len(views) == 1 + 4 + 1  # at first, at each measurement, at the end
    monkeypatch.setattr("sharpscope.monitoring.monitor.SECONDS_BETWEEN_VIEWS", 60.0)
    monitor = Monitor(f, optimizer, every=1)
    monitor.live()
    train(f, optimizer, monitor, 6)
    assert len(cells[-1]) == 2  # not more often than one can look


def test_a_run_that_is_shown_live_is_the_run_alone(cells: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: weights, buffers and random state; and a cell that breaks does not end it."""
    monkeypatch.setattr("sharpscope.monitoring.monitor.SECONDS_BETWEEN_VIEWS", 0.0)
    states = []
    for live in ("no", "yes", "broken"):
        f, optimizer = problem()
        with Monitor(f, optimizer, every=2) as monitor:
            if live != "no":
                monitor.live()
            if live == "broken":
                monkeypatch.setattr("sharpscope.monitoring.monitor.update_cell", lambda handle, html: 1 / 0)
                with pytest.warns(UserWarning, match="a sink of the monitor failed"):
                    train(f, optimizer, monitor, 6)
                monitor.live()
            else:
                train(f, optimizer, monitor, 6)
        states.append([*f.model.state_dict().values(), torch.get_rng_state()])
    for other in states[1:]:
        assert all(map(torch.equal, states[0], other))
    assert len(cells) == 3 and len(cells[0]) > 4


def test_outside_a_notebook_live_does_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(*problem(), every=2)
    monitor.live()
    assert monitor.recorder.sinks == () and capfd.readouterr() == ("", "")


class Terminal(io.StringIO):
    """A terminal, as far as a bar can tell."""

    def isatty(self) -> bool:
        return True


def opened(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error as a terminal, with solves whose first report is late enough."""
    monkeypatch.setattr(display, "AFTER", 0.0)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    return screen


SOLVES: dict[str, tuple[str, Callable[[], Any]]] = {
    "lanczos": ("eigenpairs: 1 products", lambda: lanczos(matrix())),
    "largest": ("largest eigenpair: 1 products", lambda: largest_eigenpair(matrix())),
    "rightmost": ("rightmost eigenvalue: 1 products", lambda: rightmost(matrix().matvec, matrix().like)),
    "density": ("density of eigenvalues:   1%|1         | 1/80", lambda: density(matrix(), steps=20)),
    "trace": ("trace or diagonal: 40 products", lambda: trace(matrix(1000))),
    "diagonal": ("trace or diagonal: 40 products", lambda: diagonal(matrix(1000))),
    "flow": ("flow:", predicted),
    "tuning": ("backends: 1 trials", lambda: tune(problem()[0], products=3, points=1, repeats=1)),
    "groups": ("scale-invariant groups: 1 gradients", lambda: find_groups(problem()[0])),
}


@pytest.mark.parametrize("name", SOLVES)
def test_a_long_solve_has_a_bar_on_a_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    begins, solve = SOLVES[name]
    monkeypatch.setenv("TQDM_ASCII", " 123456789#")
    solve()
    views = terminal.getvalue().split("\r")
    assert begins in " ".join(views), views[:3]
    assert views[-1] == "" and not views[-2].strip()  # it goes at the end


def test_a_bar_says_what_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    with display.progress("a solve"):
        display.report(1, residual=0.5)
        display.report(2, residual=0.4)  # too soon to be shown
        time.sleep(1.1 * display.BETWEEN)
        display.report(7, residual=1.2e-3, standard_error=3e-2)
    assert ": 7 products" in terminal.getvalue() and ": 2 products" not in terminal.getvalue()
    assert "residual 1.2e-03, standard error 3.0e-02" in terminal.getvalue()


def test_nothing_is_shown_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    with display.silent():
        lanczos(matrix())
    watched()  # a measurement inside a training loop
    monkeypatch.setattr(display, "AFTER", 2.0)
    lanczos(matrix())  # short
    monkeypatch.setattr(display, "AFTER", 0.0)
    monkeypatch.setenv("RANK", "1")
    lanczos(matrix())  # the second of several processes
    monkeypatch.delenv("RANK")
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    lanczos(matrix())  # no tqdm
    assert terminal.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    monkeypatch.delitem(sys.modules, "tqdm.auto")
    lanczos(matrix())
    assert pipe.getvalue() == ""


def test_the_inner_solve_reports_and_the_outer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    with display.progress("outer"):
        display.report(1)
        with display.progress("inner"):
            display.report(5)
        display.report(2)
    shown = terminal.getvalue()
    assert "outer: 1" in shown and "inner: 5" in shown and "inner: 2" not in shown


def test_a_report_that_shows_nothing_costs_nothing() -> None:
    """Less than ten microseconds, also on a busy machine: a product of even a small network takes hundreds."""
    for context in (nullcontext(), display.silent()):
        with context, display.progress("a solve"):
            seconds = []
            for _ in range(5):
                began = time.process_time()
                for i in range(1000):
                    display.report(i, residual=0.5)
                seconds.append(time.process_time() - began)
    assert min(seconds) / 1000 < 1e-5


def test_a_solve_imports_neither_ipython_nor_tqdm() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import sharpscope as ss; d = torch.arange(9.);"
        " ss.linalg.lanczos(ss.linalg.SymmetricOperator(lambda v: d * v, d))._repr_html_();"
        " print(*({'IPython', 'pandas', 'matplotlib', 'tqdm.auto'} & set(sys.modules) - before))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
