"""Directories of analyses and of monitors after a kill or a power cut, and with any file damaged in any way."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import simulated_disk
import torch
from safetensors.torch import save_file
from simulated_disk import DAMAGES, Disk, Stopped, damage
from torch import Tensor, nn

import sharpscope as ss
from sharpscope.cli import _watch, main
from sharpscope.errors import SharpscopeError, Unusable
from sharpscope.monitoring.checkpoint_series import Analysis, analyze
from sharpscope.monitoring.page import render_directory
from sharpscope.monitoring.recorder import RUN, read_description
from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog

MSE = nn.functional.mse_loss
LOG = RunLog(Path("/tmp"), RUN).path.name


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 1))
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return x, torch.sin(2 * x[:, :1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    x, y = data()
    MSE(model(x), y).backward()
    optimizer.step()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated_disk.undisturbed(monkeypatch)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a training run."""
    folder, model = tmp_path_factory.mktemp("series"), net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        save_file({name: t.clone() for name, t in model.state_dict().items()}, folder / f"step{step}.safetensors")
        train(model, sgd)
    return folder


def analyzed(series: Path, out: Path) -> Analysis:
    return analyze(net(), MSE, [data()], [series], out)


@pytest.fixture(scope="module")
def whole(series: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An analysis that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    analyzed(series, out)
    return out


@pytest.fixture(scope="module")
def begun(series: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An analysis that was killed after two of its measurements."""
    out, append = tmp_path_factory.mktemp("begun") / "out", RunLog.append

    def killed(self: RunLog, **row: Any) -> None:
        if len(self.rows) == 2:
            raise Stopped
        append(self, **row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "append", killed)
        with pytest.raises(Stopped):
            analyzed(series, out)
    assert {path.suffix for path in out.iterdir()} == {".json", ".jsonl", ".safetensors"}
    yield out


@pytest.mark.parametrize("loss", ["none", "zeros for what was not on the disk"])
def test_an_analysis_that_stops_between_any_two_writes_goes_on_to_the_last_bit(
    loss: str, series: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = 0
    while True:
        out, disk = tmp_path / f"after {stops}", Disk(stops)
        with monkeypatch.context() as patch:
            disk.patch(patch)
            try:
                analyzed(series, out)
                break
            except Stopped:
                pass
        if loss != "none":
            disk.lose_power(out, zeros=True)
        analyzed(series, out)
        assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}, stops
        for name in (LOG, "history.parquet", "analysis.json"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), (stops, name)
        stops += 1
    assert stops > 20


def answered(series: Path, out: Path, whole: Path, *, exact: bool) -> None:
    """Demand the numbers of an undisturbed analysis, or a sentence about its directory."""
    try:
        found = analyzed(series, out)
    except SharpscopeError as error:
        assert str(out) in str(error) and len(str(error)) > 40
        return
    expected = History.load(whole / "history.parquet").columns
    for name, column in expected.items():
        if exact or name in ("run", "step", "checkpoint", "digest"):
            assert found.history.columns[name] == column
        elif name in ("loss", "sharpness", "spherical_sharpness", "radius"):
            # Measured anew from other starts of the solvers: RTOL² over the gap
            assert found.history.columns[name] == pytest.approx(column, rel=1e-5)
    assert History.load(out / "history.parquet").columns == found.history.columns
    assert (out / "report.html").read_text().endswith("</html>\n")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["analysis.json", LOG, "history.parquet", "report.html"])
def test_damaged_files_of_an_analysis_are_made_again_or_named(
    file: str, kind: str, series: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    damage(out / file, kind)
    answered(series, out, whole, exact=file != LOG)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["analysis.json", LOG, LOG.replace("jsonl", "safetensors")])
def test_an_analysis_goes_on_from_damaged_files(
    file: str, kind: str, series: Path, begun: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(begun, out)
    damage(out / file, kind)
    answered(series, out, whole, exact=False)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a monitored run."""
    out = tmp_path_factory.mktemp("watched") / "run"
    watch(out).close()
    return out


def watch(out: Path) -> ss.Monitor:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ss.Monitor(ss.Objective(model, MSE, [data()]), sgd, every=2, directory=out)
    for _ in range(4):
        train(model, sgd)
        monitor.step()
    return monitor


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["monitor.json", LOG])
def test_damaged_files_of_a_monitored_run_are_named(file: str, kind: str, watched: Path, tmp_path: Path) -> None:
    """Or the page shows the rows that are left, none of which is wrong; a new run there is not bothered."""
    out = tmp_path / "run"
    shutil.copytree(watched, out)
    rows = RunLog(out, RUN).rows
    damage(out / file, kind)
    if (file, kind) == ("monitor.json", "missing"):
        assert _watch.page(out) is None
    else:
        try:
            assert "Sharpness of this training run" in str(_watch.page(out))
            assert all(row in rows for row in RunLog(out, RUN).rows)
        except SharpscopeError as error:
            assert str(out / file) in str(error) and len(str(error)) > 40
    monitor = watch(out)
    monitor.close()
    assert [row["step"] for row in RunLog(out, RUN).rows] == [0, 2, 4] and _watch.finished(out)
    assert "Sharpness of this training run" in render_directory(out)


def test_a_description_of_an_earlier_version_is_read(watched: Path, tmp_path: Path) -> None:
    """It has no checksum, and says "asked" for what is now "groups_known"."""
    old = json.loads((watched / "monitor.json").read_text())
    del old["crc32"]
    old["facts"]["asked"] = not old["facts"].pop("groups_known")
    (tmp_path / "monitor.json").write_text(json.dumps(old))
    facts, config = read_description(tmp_path)
    new, as_before = read_description(watched)
    assert (facts.groups_known, new.groups_known) == (False, True)
    assert (facts.size, facts.groups, config) == (new.size, new.groups, as_before)


FOREIGN = {
    "not JSON": ("monitors = 2", "it is empty, cut short or no JSON"),
    "a list": ("[1, 2]", "it is no JSON object"),
    "other keys": ('{"width": 1920}', "it has no 'config'"),
    "another kind": ('{"kind": "display", "facts": {}, "config": {}}', "is not that of a monitored run"),
    "an unknown fact": ('{"kind": "monitor", "facts": {"colour": 1}, "config": {}}', "there is no field 'colour'"),
    "a wrong fact": ('{"kind": "monitor", "facts": {"size": "big"}, "config": {}}', "size is 'big'; it should be int"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_description_is_named(kind: str, tmp_path: Path) -> None:
    content, sentence = FOREIGN[kind]
    (tmp_path / "monitor.json").write_text(content)
    with pytest.raises(Unusable) as caught:
        read_description(tmp_path)
    assert f"{tmp_path / 'monitor.json'} is not that of a monitored run" in str(caught.value)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("when", ["first", "later"])
def test_a_full_disk_does_not_stop_a_training_run(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = RunLog.append

    def full(self: RunLog, **row: Any) -> None:
        if when == "first" or row["step"] > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, **row)

    monkeypatch.setattr(RunLog, "append", full)
    with pytest.warns(UserWarning, match=r"cannot write into .*run \(No space left on device\), and writes no more"):
        monitor = watch(tmp_path / "run")
    assert monitor.history.series(RUN, "step").tolist() == [0, 2, 4]
    monitor.close()
    assert len(RunLog(tmp_path / "run", RUN).rows) == (0 if when == "first" else 1)


def test_a_cut_checkpoint_is_named_with_what_to_do(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cuttask.py").write_text(
        "import torch\nfrom torch import nn\n\ndef task():\n"
        "    x = torch.ones(4, 3).double()\n"
        "    return nn.Linear(3, 1).double(), nn.functional.mse_loss, [(x, x[:, :1])]\n"
    )
    monkeypatch.chdir(tmp_path)
    for length in (0, 5, 60, 200):
        (tmp_path / "w.safetensors").write_bytes((series / "step0.safetensors").read_bytes()[:length])
        for command in (["predict", "--lr", "0.1", "--checkpoint"], ["analyze"]):
            assert main([*command, "w.safetensors", "--task", "cuttask:task", "--out", "out"]) == 2
            said = capsys.readouterr().err
            assert "w.safetensors is not a safetensors file" in said and said.count("\n") == 1
            assert "it may have been cut short; write or copy it again, or leave it out" in said
            shutil.rmtree("out", ignore_errors=True)
