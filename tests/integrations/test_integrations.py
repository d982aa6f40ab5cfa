"""Sinks of loggers: what they write is what the Monitor read, and the training does not notice."""

import importlib
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from traces import Augmented, differing, go_offline, loader, network, seed_all, traces

from sharpscope.autodiff.objective import Objective
from sharpscope.integrations import named
from sharpscope.monitoring.monitor import Monitor
from sharpscope.monitoring.recorder import Sink

Rows = dict[str, list[tuple[int, float]]]
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(tmp_path, monkeypatch)


def training(sinks: list[Sink] | None, bf16: bool, own: Any = lambda step, loss: None) -> tuple[dict[str, Any], Any]:
    """Two epochs of everything a measurement could disturb, and the Monitor unless `sinks` is None."""
    seed_all()
    net, data = network(), Augmented()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 8)
    monitor, losses = None, []
    if sinks is not None:
        f = Objective(net, nn.functional.mse_loss, [(data.x, data.y)], without_dropout=True)
        monitor = Monitor(f, sgd, every=3, sinks=sinks)
    for _ in range(2):
        for x, y in loader(data):
            sgd.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            sgd.step()
            if monitor is not None:
                monitor.step()
            schedule.step()
            losses.append(loss.item())
            own(len(losses), losses[-1])
    return traces(net, sgd, losses), monitor


@contextmanager
def logger(name: str, folder: Path) -> Iterator[tuple[Sink, Any]]:
    """A sink of the real package, and a function that reads back what it wrote, once the run has ended."""
    sink = importlib.import_module(f"sharpscope.integrations.{name}").sink
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "board")) as writer:
            yield sink(writer), lambda: read_tensorboard(folder / "board")
    elif name == "wandb":
        with wandb_run() as run:
            yield sink(run), lambda: read_wandb(folder)
    elif name == "trackio":
        import trackio

        run = trackio.init(project="p", auto_log_cpu=False)
        yield sink(run), lambda: read_trackio(run.name)
        trackio.finish()
    else:
        import mlflow

        mlflow.set_tracking_uri((folder / "mlruns").as_uri())
        with mlflow.start_run() as run:
            yield sink(run), lambda: read_mlflow(run.info.run_id)


@contextmanager
def wandb_run() -> Iterator[Any]:
    """A run in the present folder, with a service of its own, which reads its settings anew."""
    import wandb

    with wandb.init(project="p") as run:
        yield run
    wandb.teardown()


def read_tensorboard(folder: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_mlflow(run: str) -> Rows:
    import mlflow

    client = mlflow.MlflowClient()
    names = client.get_run(run).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run, name)] for name in names}


def read_trackio(run: str) -> Rows:
    from trackio.sqlite_storage import SQLiteStorage

    rows: Rows = {}
    for entry in SQLiteStorage.get_logs("p", run):
        for name in (name for name in entry if name.startswith("sharpscope/")):
            rows.setdefault(name, []).append((entry["step"], entry[name]))
    return rows


def read_wandb(folder: Path) -> Rows:
    """The rows of the only offline run, under the monitor's steps (rows without: under the run's)."""
    import json

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows: Rows = {}
    for record in wandb_records(path.read_bytes()):
        if record.WhichOneof("record_type") == "history":
            items = {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            for name in (name for name in items if name.startswith("sharpscope/") or name == "own"):
                step = items["_step"] if name == "own" else items["sharpscope/step"]
                rows.setdefault(name, []).append((step, items[name]))
    return rows


def wandb_records(content: bytes) -> Iterator[Any]:
    """LevelDB's log format: blocks of 32 KB, in them parts with a checksum, a length, and a kind (1 whole, 4 last)."""
    from wandb.proto import wandb_internal_pb2

    at, whole = 7, b""
    while at + 7 <= len(content):
        if (room := -at % 32768) and room < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def expected(monitor: Monitor) -> Rows:
    rows: Rows = {}
    for row in monitor.history.rows:
        numbers = {name: v for name, v in row.items() if isinstance(v, float) and math.isfinite(v)}
        for name, value in named(numbers).items():
            rows.setdefault(name, []).append((row["step"], value))
    return rows


@pytest.mark.parametrize("name", LOGGERS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_measurements_arrive_and_the_training_does_not_notice(name: str, bf16: bool, tmp_path: Path) -> None:
    alone, _ = training(None, bf16)
    with logger(name, tmp_path) as (sink, read):
        watched, monitor = training([sink], bf16)
    assert differing(watched, alone) == []
    found, wanted = read(), expected(monitor)
    found.pop("sharpscope/step", None)  # the axis in wandb
    assert found.keys() == wanted.keys() >= {"sharpscope/sharpness", "sharpscope/stability_ratio"}
    if name == "tensorboard":  # keeps float32
        wanted = {column: [(step, np.float32(v).item()) for step, v in rows] for column, rows in wanted.items()}
    assert found == wanted


@pytest.mark.parametrize("explicit", [True, False], ids=["own steps", "counted by wandb"])
def test_wandb_rows_of_the_user_stay_where_they_were(explicit: bool, tmp_path: Path) -> None:
    """Rows are dropped where a step is logged after a later one: neither those of the user nor measurements are."""
    from sharpscope.integrations.wandb import sink

    with wandb_run() as run:

        def own(step: int, loss: float) -> None:
            if step % 2 == 0:
                run.log({"own": loss}, step=step if explicit else None)

        watched, monitor = training([sink(run)], False, own)
    rows = read_wandb(tmp_path)
    assert [step for step, _ in rows["own"]] == ([2, 4, 6, 8] if explicit else [0, 1, 2, 3])
    assert [value for _, value in rows["own"]] == watched["losses"][1::2]
    assert rows["sharpscope/sharpness"] == expected(monitor)["sharpscope/sharpness"]


def test_sinks_import_their_package_when_they_are_made_at_the_earliest() -> None:
    code = "import sys, torch, numpy, sharpscope.monitoring; had = set(sys.modules); "
    code += "".join(f"import sharpscope.integrations.{name}; " for name in LOGGERS)
    code += "print(*(set(sys.modules) - had))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {module.split(".")[0] for module in found} == {"sharpscope"}
