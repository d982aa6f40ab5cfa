"""A notebook, run by Jupyter where it is installed, and otherwise cell by cell as it would run it."""

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = (
    """import torch, sharpscope as ss
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8, affine=False), nn.Tanh(), nn.Linear(8, 1))
f = ss.Objective(net, nn.functional.mse_loss, [(torch.randn(16, 4), torch.randn(16, 1))])
sgd = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)
ss.find_groups(f)""",
    "ss.top_eigenpairs(f, k=2)",
    """monitor = ss.Monitor(f, sgd, every=2)
monitor.live()
for _ in range(6):
    sgd.zero_grad()
    f.loss(net(f.data[0][0]), f.data[0][1]).backward()
    sgd.step()
    monitor.step()
monitor.close()""",
    "monitor.plot()",
    "monitor.findings()",
    "monitor.history",
    "ss.linalg.density(ss.hessian(f), steps=20)",
    "ss.linalg.density(ss.hessian(f), steps=20).plot()",
)


def shown_by_jupyter(tmp_path: Path) -> list[list[dict[str, Any]]]:
    """The outputs of each cell, by type of content."""
    import nbclient
    import nbformat

    cells = [nbformat.v4.new_code_cell(code) for code in NOTEBOOK]
    path = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(path), *cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    return [[output.get("data", dict(output)) for output in cell["outputs"]] for cell in notebook.cells[1:]]


def shown_by_hand() -> list[list[dict[str, Any]]]:
    """The same for the last expression of each cell, which shows itself."""
    space: dict[str, Any] = {}
    outputs = []
    for code in NOTEBOOK:
        *body, last = ast.parse(code).body
        exec(compile(ast.Module(body, []), "a cell", "exec"), space)
        value = eval(compile(ast.Expression(last.value), "a cell", "eval"), space) if isinstance(last, ast.Expr) else 0
        kinds = {"text/plain": repr(value)}
        for kind, method in (("text/html", "_repr_html_"), ("image/png", "_repr_png_")):
            if hasattr(value, method):
                kinds[kind] = getattr(value, method)()
        outputs.append([kinds] if value is not None else [])
    return outputs


def test_a_notebook_shows_its_results(tmp_path: Path) -> None:
    jupyter = all(find_spec(name) for name in ("nbclient", "nbformat", "ipykernel"))
    outputs = shown_by_jupyter(tmp_path) if jupyter else shown_by_hand()
    groups, top, live, figure, findings, history, density, curve = outputs
    (groups_shown,), (top_shown,), (findings_shown,) = groups, top, findings
    assert "0.weight (32) is invariant" in groups_shown["text/html"]
    assert groups_shown["text/plain"].startswith("ScaleGroups(") and "\n" not in groups_shown["text/plain"]
    assert "λ2 = " in top_shown["text/html"]
    assert "<table>" in findings_shown["text/html"]
    assert "4 rows" in history[0]["text/html"] and "<svg" in density[0]["text/html"]
    for (shown,) in (figure, curve):
        assert len(shown["image/png"]) > 10_000
    if jupyter:
        assert "step 6, 4 rows" in live[0]["text/html"]  # of the views the last one
    assert len(live) == jupyter


@pytest.mark.parametrize("name", ["IPython", "pandas", "tqdm.auto"])
def test_the_library_does_not_need_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    shown_by_hand()
