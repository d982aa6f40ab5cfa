"""Checkpoints: what is read and refused, that numbers are those of the weights, and that a series goes on."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import sharpscope as ss
from sharpscope.cli import main
from sharpscope.errors import Unusable
from sharpscope.monitoring import checkpoint_series
from sharpscope.monitoring.checkpoint_series import RTOL, Analysis, analyze
from sharpscope.records.checkpoints import load_weights, series, step_of
from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog

ROOT = Path(__file__).parents[2]
MSE = nn.functional.mse_loss
HOSTILE = "<img src=x onerror=alert(1)>&amp;"


def net(seed: int = 0) -> nn.Sequential:
    """A scale-invariant layer, and a readout that is not."""
    torch.manual_seed(seed)
    layers = (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Linear(6, 1))
    return nn.Sequential(*layers).double()


def data(shift: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(32, 4, generator=g, dtype=torch.float64)
    return [(x, torch.sin(2 * x[:, :1]) + shift)]


def trained(steps: int = 6, lr: float = 0.2, stride: int = 5) -> list[dict[str, Tensor]]:
    """State dicts along gradient descent on the data."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    states = []
    for step in range(steps * stride):
        if step % stride == 0:
            states.append({name: t.detach().clone() for name, t in model.state_dict().items()})
        optimizer.zero_grad()
        ((x, y),) = data()
        MSE(model(x), y).backward()
        optimizer.step()
    return states


def measured(tmp_path: Path, *places: Path, model: nn.Module | None = None, **more: Any) -> Analysis:
    return analyze(model or net(), MSE, data(), places or (tmp_path / "w",), tmp_path / "out", **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six checkpoints of a training run, of both kinds."""
    (tmp_path / "w").mkdir()
    for i, state in enumerate(trained()):
        path = tmp_path / "w" / f"step{5 * i}"
        if i % 2:
            torch.save({"state_dict": state, "epoch": i}, path.with_suffix(".pt"))
        else:
            save_file(state, path.with_suffix(".safetensors"))
    return tmp_path / "w"


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_10.pt", 10),
        ("epoch=3-step=1200.ckpt", 1200),
        ("step=100-loss=0.25.ckpt", 100),
        ("lr0.1-iteration20.pth", 20),
        ("w0003.safetensors", 3),
        ("global_step40/model.bin", 40),
        ("run7/final.pt", None),
        ("final.pt", None),
    ],
)
def test_steps_are_read_in_names(name: str, step: int | None) -> None:
    assert step_of(Path(name)) == step


def test_a_directory_is_read_in_the_order_of_steps(tmp_path: Path) -> None:
    for name in ("step10.pt", "step2.pt", "step1.safetensors", "final.pt", "b2.pt", ".step3.pt", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "step4.pt").mkdir()
    names = ["step1.safetensors", "b2.pt", "step2.pt", "step10.pt", "final.pt"]
    assert [path.name for path in series([tmp_path])] == names
    assert [path.name for path in series([tmp_path / "step10.pt", tmp_path])] == names
    assert [path.name for path in series([tmp_path / "notes.txt"])] == ["notes.txt"]
    with pytest.raises(Unusable, match=r"no checkpoint in .*step4.pt \(looked for \*.safetensors, "):
        series([tmp_path / "step4.pt"])
    with pytest.raises(Unusable, match=r"no checkpoint .*none.pt"):
        series([tmp_path / "none.pt"])


def test_numbers_are_those_of_the_weights(folder: Path, tmp_path: Path) -> None:
    found = measured(tmp_path, k=2, rule=ss.GD(0.2, 0.01))
    history = found.history
    assert history.series("training", "step").tolist() == [0, 5, 10, 15, 20, 25]
    threshold = 2 / 0.2 - 0.01
    for i, state in enumerate(trained()):
        model = net(1)
        model.load_state_dict(state)
        f = ss.Objective(model, MSE, data())
        values = ss.top_eigenpairs(f, k=2).values
        exact = {
            "loss": f.value(f.weights()).item(),
            "sharpness": values[0].item(),
            "sharpness2": values[1].item(),
            "spherical_sharpness": ss.spherical_sharpness(f),
            "radius": model.get_parameter("0.weight").norm().item(),
            "stability_ratio": values[0].item() / threshold,
        }
        assert {n: history.columns[n][i] for n in exact} == pytest.approx(exact, rel=1e-4)  # RTOL², over the gap
        assert history.columns["residual"][i] <= 2 * RTOL * values[0].item()
    assert History.load(tmp_path / "out/history.parquet").columns == history.columns


def test_the_distance_to_the_edge_of_a_quadratic(tmp_path: Path) -> None:
    """λ1 of mean (wᵀx)² with x = (1, 1) is 4; with lr = 1/4 the threshold is 8, and lr = 1/2 is at the edge."""
    model = nn.Linear(2, 1, bias=False)
    save_file({"weight": torch.ones(1, 2)}, tmp_path / "w.safetensors")
    batches = [(torch.ones(4, 2), torch.zeros(4, 1))]
    found = analyze(model, MSE, batches, [tmp_path / "w.safetensors"], tmp_path / "out", rule=ss.GD(0.25))
    assert found.history.columns["stability_ratio"] == [pytest.approx(0.5)]
    assert "below the edge of stability, which this curvature meets at a learning rate of 0.5" in found.summary
    assert "spherical" not in found.table


WRAPS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "as it is": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "DDP": lambda state: {f"module.{n}": t for n, t in state.items()},
    "Lightning": lambda state: {"state_dict": {f"model.{n}": t for n, t in state.items()}, "callbacks": {}},
    "compiled in DDP": lambda state: {"model_state_dict": {f"module._orig_mod.{n}": t for n, t in state.items()}},
    "beside others": lambda state: {f"model.{n}": t for n, t in state.items()} | {"loss.weight": torch.ones(2)},
    "beside an average": lambda state: {f"{m}.{n}": t for n, t in state.items() for m in ("ema", "model")},
    "an unknown prefix": lambda state: {f"student.net.{n}": t for n, t in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_state_dicts_are_unwrapped(wrap: str, suffix: str, tmp_path: Path) -> None:
    state, path = trained(2)[1], tmp_path / f"w.{suffix}"
    wrapped = WRAPS[wrap](state)
    if suffix == "pt":
        torch.save(wrapped, path)
    elif all(isinstance(value, Tensor) for value in wrapped.values()):
        save_file({name: t.clone() for name, t in wrapped.items()}, path)
    else:
        path = tmp_path / "w.pth"
        torch.save(wrapped, path, _use_new_zipfile_serialization=False)
    f = ss.Objective(net(1), MSE, data())
    w = load_weights(f, path)
    assert torch.equal(w, torch.cat([state[name].flatten() for name in f.slices]))
    assert torch.equal(f.model.get_buffer("1.running_mean"), state["1.running_mean"])


def test_tied_weights_may_be_kept_under_either_name(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.last.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).tanh())

    f = ss.Objective(Tied(), MSE, [(torch.randn(8, 3), torch.randn(8, 3))])
    weight = torch.randn(3, 3)
    for name in ("first.weight", "last.weight"):
        save_file({f"module.{name}": weight}, tmp_path / "w.safetensors")
        assert torch.equal(load_weights(f, tmp_path / "w.safetensors"), weight.flatten())


def test_low_precision_is_converted(tmp_path: Path) -> None:
    state = {name: t.bfloat16() if t.is_floating_point() else t for name, t in trained(1)[0].items()}
    torch.save(state, tmp_path / "w.pt")
    w = load_weights(ss.Objective(net(), MSE, data()), tmp_path / "w.pt")
    assert w.dtype == torch.float64 and torch.equal(w[:24], state["0.weight"].double().flatten())


def test_buffers_are_loaded_on_a_copy(tmp_path: Path) -> None:
    """In evaluation mode the loss depends on the running statistics; a file without them has those of the task."""
    (tmp_path / "w").mkdir()
    first, last = trained(2, stride=40)
    bare = {name: t for name, t in last.items() if "running" not in name}
    for i, state in enumerate((first, last, bare)):
        save_file(state, tmp_path / f"w/step{i}.safetensors")
    model = net(3).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = measured(tmp_path, model=model)
    assert not model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    ((x, y),) = data()
    expected = []
    for state in (first, last, before | bare):
        model.load_state_dict(state)
        expected.append(MSE(model(x), y).item())
    assert found.history.columns["loss"] == pytest.approx(expected, rel=1e-12)
    assert abs(expected[1] / expected[2] - 1) > 0.1
    left = "Not in the checkpoints, and left as the task returns them: 1.running_mean, 1.running_var."
    assert left in found.summary


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if n != name}


class Bomb:
    """Loading this with pickle would make a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("exploded",))


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda s: without(s, "3.bias"), "bad.pt the parameter 3.bias of shape (1,) is missing; it holds 0.w"),
    "shape": (lambda s: s | {"0.weight": torch.ones(6, 5)}, "parameter 0.weight of shape (6, 4) has shape (6, 5)"),
    "buffer": (lambda s: s | {"1.running_var": torch.ones(5)}, "the buffer 1.running_var of shape (6,) has shape (5,)"),
    "integers": (lambda s: s | {"3.bias": torch.ones(1).int()}, "3.bias has numbers of another kind: torch.int32"),
    "sparse": (lambda s: s | {"0.weight": s["0.weight"].to_sparse()}, "0.weight is not a plain tensor"),
    "two models": (lambda s: {f"{m}.{n}": t for n, t in s.items() for m in "ab"}, "several models that fit (a., b.)"),
    "no tensors": (lambda s: {"epoch": 3, "lr": 0.1}, "is not a state dict: it holds epoch (int), lr (float)"),
    "a tensor": (lambda s: s["0.weight"], "is not a state dict but a Tensor"),
    "a list": (lambda s: list(s.values()), "is not a state dict but a list"),
    "a module": (
        lambda s: net(),
        "holds a pickled torch.nn.modules.container.Sequential, which only running code could",
    ),
    "a bomb": (lambda s: {"state_dict": s, "hook": Bomb()}, "holds a pickled posix.mkdir, which only running code"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoints_are_named_and_the_others_measured(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, sentence = BAD[kind]
    torch.save(make(trained(1)[0]), folder / "bad.pt")
    found = measured(tmp_path)
    assert len(found.history) == 6 and list(found.refused) == ["bad.pt"]
    assert sentence in found.refused["bad.pt"]
    assert "6 measured now, 0 known from before; 1 could not be measured." in found.summary
    assert sentence.partition("(")[0] in (tmp_path / "out/report.html").read_text()
    with pytest.raises(Unusable, match="no checkpoint could be measured: "):
        analyze(net(), MSE, data(), [folder / "bad.pt"], tmp_path / "other")
    assert not (tmp_path / "exploded").exists()


def test_a_torch_with_a_hole_reads_safetensors_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    found = measured(tmp_path)
    assert found.history.columns["step"] == [0, 10, 20]
    assert "step5.pt is no safetensors file, and torch 2.5.1+cpu reads others unsafely" in found.refused["step5.pt"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_cut_short_or_foreign_are_named(suffix: str, folder: Path, tmp_path: Path) -> None:
    whole = next(folder.glob(f"*.{suffix}")).read_bytes()
    contents = [
        b"",
        b"PK",
        whole[:100],
        whole[:-50],
        whole[:20] + b"\xff" * 30 + whole[50:],
        b"notes on this run\n" * 9,
    ]
    for i, content in enumerate(contents):
        (folder / f"bad{i}.{suffix}").write_bytes(content)
    found = measured(tmp_path)
    assert len(found.history) == 6 and len(found.refused) == len(contents)
    assert all(f"{name} is not a safetensors file" in why for name, why in found.refused.items())


def test_what_is_known_is_not_measured_again(folder: Path, tmp_path: Path) -> None:
    assert measured(tmp_path).measured == 6
    first = measured(tmp_path)
    assert (first.measured, len(first.history)) == (0, 6)
    assert "6 checkpoints: 0 measured now, 6 known from before." in first.summary
    state = trained(8)
    save_file(state[7], folder / "step35.safetensors")  # new
    save_file(state[6], folder / "step10.safetensors")  # changed
    (folder / "step5.pt").rename(folder / "step6.pt")
    then = measured(tmp_path)
    assert (then.measured, len(then.history)) == (2, 7)
    assert then.history.columns["step"] == [0, 6, 10, 15, 20, 25, 35]
    assert then.history.columns["loss"][1] == first.history.columns["loss"][1]
    assert then.history.columns["loss"][2] != first.history.columns["loss"][2]
    (folder / "step0.safetensors").unlink()
    assert measured(tmp_path).history.columns["step"] == [6, 10, 15, 20, 25, 35]
    assert len(RunLog(tmp_path / "out", "training").rows) == 8


def test_another_learning_rate_costs_nothing(folder: Path, tmp_path: Path) -> None:
    ratios = [measured(tmp_path, rule=rule).history.columns["stability_ratio"] for rule in (ss.GD(0.1), ss.GD(0.2))]
    assert ratios[1] == pytest.approx([2 * r for r in ratios[0]], rel=1e-12)
    again = measured(tmp_path)
    assert again.measured == 0 and "stability_ratio" not in again.history.columns


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"k": 2}, r"holds a different analysis \(k 1, not 2\); choose another --out"),
        ({"name": "other:task"}, r"holds a different analysis \(task Sequential, not other:task\)"),
        ({"data": data(shift=0.01)}, "the loss at .*step0.safetensors is .*, and was .*: the task has changed"),
    ],
)
def test_measurements_that_do_not_belong_together_are_refused(
    changes: dict[str, Any], sentence: str, folder: Path, tmp_path: Path
) -> None:
    measured(tmp_path)
    given = {"data": data(), **changes}
    with pytest.raises(Unusable, match=sentence):
        analyze(net(), MSE, given.pop("data"), [folder], tmp_path / "out", **given)


def test_a_line_cut_short_is_cut_away(folder: Path, tmp_path: Path) -> None:
    whole = measured(tmp_path).history
    log = RunLog(tmp_path / "out", "training").path
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]) + lines[3][:30])
    again = measured(tmp_path)
    assert again.measured == 3
    assert [json.loads(line)["digest"] for line in log.read_bytes().splitlines()] == whole.columns["digest"]
    for name in ("loss", "sharpness", "spherical_sharpness"):  # measured after another one: the solvers start elsewhere
        assert again.history.columns[name] == pytest.approx(whole.columns[name], rel=1e-5)  # RTOL², over the gap


@pytest.mark.parametrize("where", [(RunLog, "_write"), (History, "save"), (checkpoint_series, "write_report")])
def test_a_full_disk_keeps_what_is_there(where: tuple[Any, str], folder: Path, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    analyze(net(), MSE, data(), [folder / "step0.safetensors"], tmp_path / "out")
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(Unusable, match=r"No space left.*the same command goes on"),
    ):
        patch.setattr(*where, full)
        measured(tmp_path)
    assert measured(tmp_path).measured == (5 if where[0] is RunLog else 0)


def test_warm_starts_save_products(tmp_path: Path) -> None:
    """A step apart; each alone costs as much as the first."""
    torch.manual_seed(0)
    x = torch.randn(200, 20).double()
    batches = [(x, torch.sin(2 * x[:, :1]))]
    layers = (nn.Linear(20, 40, bias=False), nn.BatchNorm1d(40, affine=False), nn.Tanh(), nn.Linear(40, 1))
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    paths = [tmp_path / f"{step}.safetensors" for step in range(90, 100)]
    for step in range(100):
        if tmp_path / f"{step}.safetensors" in paths:
            save_file(model.state_dict(), tmp_path / f"{step}.safetensors")
        optimizer.zero_grad()
        MSE(model(x), batches[0][1]).backward()
        optimizer.step()
    warm = analyze(model, MSE, batches, paths, tmp_path / "warm").history.columns["products"]
    last = analyze(model, MSE, batches, paths[-1:], tmp_path / "cold").history.columns["products"]
    later = warm[3:]  # the tracker trusts its memory once it has seen it foretell two answers
    assert sum(later) < 0.5 * len(later) * last[0], (warm, last)


def test_a_diverged_checkpoint_has_a_row_without_curvature(folder: Path, tmp_path: Path) -> None:
    save_file(trained(1)[0] | {"3.bias": torch.full((1,), torch.inf).double()}, folder / "step30.safetensors")
    for _ in range(2):
        found = measured(tmp_path, rule=ss.GD(0.1))
        assert (found.history.columns["loss"][-1], found.history.columns["sharpness"][-1]) == (None, None)
        assert "There is no curvature at step 30: the loss is not finite." in found.summary
        assert found.table.splitlines()[-1].split() == ["step30.safetensors", "30", *"------"]


def test_names_without_steps_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    for name, state in zip(("early", "late", "mid1"), trained(3), strict=True):
        save_file(state, tmp_path / f"w/{name}.safetensors")
    found = measured(tmp_path)
    assert found.history.columns["step"] == [0, 1, 2]
    assert "Their names say no step each: they are numbered in their order." in found.summary


def test_names_are_escaped(folder: Path, tmp_path: Path) -> None:
    (folder / f"{HOSTILE}9.pt").write_bytes(b"no")
    save_file(trained(1)[0], folder / f"{HOSTILE}7.safetensors")
    found = measured(tmp_path, name=HOSTILE)
    assert f"{HOSTILE}7.safetensors" in found.history.columns["checkpoint"]
    html = (tmp_path / "out/report.html").read_text()
    assert "<img" not in html and "&lt;img src=x onerror=alert(1)&gt;&amp;amp;9.pt" in html


TASK = """
import time
from pathlib import Path

import torch
from torch import nn

def task():
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Linear(6, 1))
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return nn.Sequential(*layers).double(), nn.functional.mse_loss, [(x, torch.sin(2 * x[:, :1]))]

def slow():
    model, loss, data = task()
    model.register_forward_hook(lambda *_: time.sleep(0.02))
    return model, loss, data

def once():
    model, loss, data = task()
    return model, lambda z, y: loss(z.detach() + 0 * z, y), data

def wrong():
    return 3
"""


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with checkpoints in w/ and a task, as the working directory."""
    (tmp_path / "atask.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "atask", raising=False)
    return tmp_path


def test_the_command_prints_a_table_and_a_summary(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "w/bad.pt").write_bytes(b"no")
    command = ["analyze", "w", "--task", "atask:task", "--lr", "0.2", "--wd", "1e-3", "--momentum", "0.5"]
    assert main(command) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split() == [
        "checkpoint",
        "step",
        "loss",
        "sharpness",
        "residual",
        "spherical",
        "radius",
        "s/threshold",
    ]
    assert [line.split()[1] for line in lines[1:7]] == ["0", "5", "10", "15", "20", "25"]
    _, sharpness, residual, _, _, ratio = map(float, lines[6].split()[2:])
    assert ratio == pytest.approx(sharpness / (3 / 0.2 - 1e-3), rel=1e-3) and residual < 1e-2 * sharpness
    assert "6 checkpoints: 6 measured now, 0 known from before; 1 could not be measured." in said.out
    assert "Sharpness goes from " in said.out and "edge of stability" in said.out
    assert "report: runs/analysis/report.html" in said.out
    assert (
        said.err.startswith("sharpscope: not measured: w/bad.pt is not a safetensors file")
        and said.err.count("\n") == 1
    )
    page = (here / "runs/analysis/report.html").read_text()
    assert all(f'id="chart-{name}"' in page for name in ("stability", "sharpness", "spherical", "loss", "radius"))
    assert main(command) == 0
    assert "0 measured now, 6 known from before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("w", "the following arguments are required: --task"),
        ("--task atask:task", "the following arguments are required: CHECKPOINTS"),
        ("w --task atask:none", "there is no task 'atask:none'"),
        ("w --task atask:wrong", "it must return (model, loss, data)"),
        ("w --task atask:task --wd 1e-3", "--wd and --momentum say nothing without --lr"),
        ("w --task atask:task --lr -1", "the learning rate is -1.0; it must be positive"),
        ("w --task atask:task --k 0", "k=0: the number of eigenvalues is at least 1"),
        ("none --task atask:task", "there is no checkpoint none"),
        ("runs --task atask:task", "there is no checkpoint in runs (looked for *.safetensors, *.pt,"),
        ("atask.py --task atask:task", "no checkpoint could be measured: atask.py is not a safetensors file"),
        ("w --task atask:task --out w", "w is not empty and holds no analysis; choose another --out"),
        ("w --task atask:task --out atask.py", "atask.py is not empty and holds no analysis"),
        ("w --task atask:task --out atask.py/below", "cannot write the analysis in atask.py/below: Not a directory"),
    ],
)
def test_bad_usage_is_answered_with_a_sentence(
    arguments: str, sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "runs").mkdir()
    assert main(["analyze", *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("sharpscope: ") and said.count("\n") == 1


def test_a_foreign_analysis_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out").mkdir()
    for content in ("not JSON", "[]", "{}"):
        (here / "out/analysis.json").write_text(content)
        assert main(["analyze", "w", "--task", "atask:task", "--out", "out"]) == 2
        assert "out/analysis.json is not that of an analysis" in capsys.readouterr().err
        assert [path.name for path in (here / "out").iterdir()] == ["analysis.json"]


def test_a_killed_analysis_goes_on_to_the_last_bit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It loses the checkpoint in work alone."""
    command = ["analyze", "w", "--task", "atask:slow", "--out", "out"]
    code = f"import sys; from sharpscope.cli import main; sys.exit(main({command!r}))"
    settings = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    state = here / "out" / RunLog(here / "elsewhere", "training").state.name

    def kept() -> bytes:
        """The part of the log that the checkpoint counts."""
        if not state.with_suffix(".jsonl").exists() or not state.exists():
            return b""
        with safe_open(state, framework="pt") as file:
            return state.with_suffix(".jsonl").read_bytes()[: int(file.metadata()["log_bytes"])]

    before = b""
    for sign, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | settings, stderr=subprocess.PIPE)
        end = time.monotonic() + 60
        while len(kept()) <= len(before):
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(sign)
        _, said = process.communicate(timeout=60)
        assert process.returncode == status
        assert kept().startswith(before)
        before = kept()
    assert said.decode().strip() == "sharpscope: stopped; the same command goes on from the last one that was measured"
    done = before.count(b"\n")
    assert 2 <= done < 6
    assert main(command) == 0
    assert f"{6 - done} measured now, {done} known from before" in capsys.readouterr().out
    assert not state.exists()
    assert main([*command[:-1], "whole"]) == 0
    for name in ("history.parquet", "analysis.json", state.with_suffix(".jsonl").name):
        assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_values_of_large_models_are_those_of_small_ones_to_a_thousandth(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = measured(tmp_path, folder).history.columns
    monkeypatch.setattr(checkpoint_series, "LARGE", 1)
    rough = analyze(net(), MSE, data(), (folder,), tmp_path / "again").history.columns
    for name in ("sharpness", "spherical_sharpness"):
        assert rough[name] == pytest.approx(exact[name], rel=1e-3) and rough[name] != exact[name]
