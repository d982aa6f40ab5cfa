"""What a training leaves behind, and parts of trainings in which a measurement could leave a trace."""

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sharpscope.monitoring.meters import Meter, Step


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Examples with noise that is drawn anew, in a worker if there are any, whenever one is read."""

    def __init__(self, count: int = 32) -> None:
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 4, generator=g)
        self.y = torch.tanh(self.x[:, :1])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.1 * torch.randn(4) + 0.1 * random.random(), self.y[i]


def network() -> nn.Sequential:
    """Batch normalization in training mode, and dropout."""
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1))


def loader(data: Dataset[Any], persistent: bool = False) -> DataLoader[Any]:
    return DataLoader(data, batch_size=8, shuffle=True, num_workers=2, persistent_workers=persistent)


def seed_all() -> None:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)


def traces(model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> dict[str, Any]:
    """Everything of a training that measuring must leave as it was."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "model": model.state_dict(),
        "optimizer": [optimizer.state[p] for p in params],
        "hyper": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "grads": [p.grad for p in params],
        "modes": [m.training for m in model.modules()],
        "losses": losses,
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
    }


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names under which two traces are not the same to the last bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not same(a[name], b[name])]


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.layout != torch.strided:
            return a.layout == b.layout and same(a.to_dense(), b.to_dense())
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def go_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packages reach no network, and write nowhere but in `folder`."""
    home = folder / "home"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(home))
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HF_HOME", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(folder))
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    offline |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    for name, value in offline.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    assert os.getcwd() == str(folder)


class Seen(Meter):
    """Keeps what meters are given."""

    def __init__(self, seen: list[Step]) -> None:
        self.seen = seen

    def read(self, step: Step) -> dict[str, float]:
        self.seen.append(step)
        return {}
