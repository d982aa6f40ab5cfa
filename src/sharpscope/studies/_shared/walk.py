"""Runs of many replicas side by side, whose steps are known in closed form."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ...records.run_log import RunLog
from .._framework.study import Progress
from .toys import ProcessState, ToyColumns

INTERVAL = 0.5
"""Seconds between two checkpoints: each is brought to the disk, which takes longer than a step."""


class Process(Protocol):
    """B replicas that advance together; the state is a dict of arrays, columns have length B."""

    def start(self) -> ProcessState: ...
    def advance(self, state: ProcessState, steps: int) -> ProcessState: ...
    def measure(self, state: ProcessState) -> ToyColumns: ...


def walk(log: RunLog, progress: Progress, process: Process, names: Sequence[str], steps: Sequence[int]) -> None:
    """Measure the replicas `names` at `steps` (0 first), a row each; an interrupted run goes on."""
    saved = log.resume()
    done = int(saved["step"]) if saved else -1
    state = {name: t.numpy() for name, t in saved.items()} or process.start()
    kept = time.monotonic()
    for i, step in enumerate(steps):
        if step <= done:
            continue
        state = process.advance(state, step - int(state["step"]))
        write(log, names, process.measure(state))
        if time.monotonic() - kept > INTERVAL:
            log.checkpoint(**{name: torch.as_tensor(value) for name, value in state.items()})
            kept = time.monotonic()
        progress((i + 1) / len(steps))


def write(log: RunLog, names: Sequence[str], columns: Mapping[str, Any]) -> None:
    """Append one row for each replica."""
    for i, name in enumerate(names):
        row = {column: values[i].item() for column, values in columns.items()}
        log.append(**(row | {"run": name, "step": int(row["step"])}))
