"""The section of the tensors: the numbers of the history, whatever the names of tensors are."""

import json
import math
import re
from typing import Any

import cases
import torch
from pages import HOSTILE, Elements

from sharpscope.monitoring.measurements import Facts
from sharpscope.monitoring.monitor import Monitor
from sharpscope.monitoring.page import render_run
from sharpscope.monitoring.tensor_kinds import layer_kinds
from sharpscope.monitoring.tensor_page import CELLS, tensor_section
from sharpscope.monitoring.tensor_table import TensorTable
from sharpscope.records.history import History


def history(names: list[str], count: int = 5) -> History:
    rows: list[dict[str, Any]] = []
    for i in range(count):
        row: dict[str, Any] = {"run": "training", "step": 10 * i}
        if i:  # the first is a measurement of curvature alone
            for k, name in enumerate(names):
                row |= {f"norm/{name}": 1.0 + k, f"update/{name}": 10.0 ** -(i + k), f"turn/{name}": math.pi / 180}
        rows.append(row | {"loss": 1.0})
    return History(rows)


def data(html: str) -> dict[str, Any]:
    found = re.search(r'id="tensor-data">(.*?)</script>', html)
    assert found is not None
    return dict(json.loads(found[1]))


def test_nothing_without_tensors() -> None:
    assert tensor_section(History([{"run": "training", "step": 0, "loss": 1.0}]), Facts()) == ""
    assert "Tensors" not in render_run(History([{"run": "training", "step": 0, "loss": 1.0}]), Facts(), {})


def test_the_numbers_are_those_of_the_history() -> None:
    facts = Facts(groups={"b": 3}, kinds={"a": "attention", "b": "linear", "c": "linear"})
    html = tensor_section(history(["a", "b", "c"]), facts)
    rows = re.findall(r'<tr><th scope="row" data-value="(\w)">.*?</tr>', html)
    assert rows == ["a", "b", "c"]
    assert '<td data-value="1">1</td>' in html  # the turn of one degree
    assert '<tr><th scope="row">linear</th><td>2</td><td>2.5</td>' in html  # the median of the norms 2 and 3
    found = data(html)
    assert found["names"] == ["a", "b", "c"] and found["kinds"] == ["attention", "linear", "linear"]
    assert found["steps"] == [10, 20, 30, 40]
    assert found["logs"]["update"] == [[-100 * (i + k) for i in range(1, 5)] for k in range(3)]
    assert "signal" not in found["logs"]


def test_the_law_stands_only_beside_invariant_tensors() -> None:
    h = history(["a", "b"])
    for name in ("a", "b"):
        h.columns[f"law/{name}"] = [None, math.pi / 90, None, None, None]
    html = tensor_section(h, Facts(groups={"b": 3}))
    assert html.count('<td data-value="2">2</td>') == 2  # in the row of b, and as the median of its kind
    assert "Its law" in html and "Its law" not in tensor_section(h, Facts())


def test_a_long_run_is_thinned_for_the_map() -> None:
    found = data(tensor_section(history(["a"], 1000), Facts()))
    assert len(found["steps"]) == CELLS and found["steps"][0] == 10 and found["steps"][-1] == 9990


def test_names_of_tensors_cannot_break_out() -> None:
    html = tensor_section(history([HOSTILE, "b"]), Facts(kinds={HOSTILE: "linear"}))
    elements = Elements(html)
    assert not {"img"} & {tag for tag, _ in elements.tags}
    assert html.count("<script") == html.count("</script>") == 2


def test_the_page_of_a_run_has_the_section_and_is_about_every_tensor() -> None:
    f = cases.affine()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1, weight_decay=1e-3)
    monitor = Monitor(f, sgd, every=2, meters=[TensorTable(2)])
    x, y = next(iter(f.data))
    for _ in range(4):
        sgd.zero_grad()
        f.loss(f.model(x), y).backward()
        sgd.step()
        monitor.step()
    html = render_run(monitor.history, monitor.facts, {})
    assert '<section id="tensors"><h2>Tensors</h2>' in html
    assert data(html)["names"] == list(f.slices) and monitor.facts.kinds == layer_kinds(f)
