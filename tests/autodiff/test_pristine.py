"""Data with a state of their own: the training that is watched is the unwatched one, and every pass reads the same."""

import copy
import gc
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset
from traces import differing, seed_all, traces

from sharpscope import Objective
from sharpscope.autodiff import data as data_module
from sharpscope.autodiff.pristine import COPIED_BYTES, Pristine
from sharpscope.monitoring.monitor import Monitor

mse = nn.functional.mse_loss
GLOBAL_DRAWS = np.random.default_rng(0)
X = torch.linspace(-1, 1, 24)[:, None]


def normal(g: np.random.Generator) -> Tensor:
    return torch.tensor(g.standard_normal(1), dtype=torch.float32)


class Noise:
    """A transform that draws from a generator of its own."""

    def __init__(self, kind: str) -> None:
        own: dict[str, Any] = {
            "NumPy": np.random.default_rng(0),
            "Python": random.Random(0),
            "torch": torch.Generator().manual_seed(0),
            "old NumPy": np.random.RandomState(0),
        }
        self.draws = own[kind]

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.draws, torch.Generator):
            return x + torch.randn(1, generator=self.draws)
        return x + (self.draws.gauss(0, 1) if isinstance(self.draws, random.Random) else float(self.draws.normal()))


class ModuleNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise("torch")
        self.lock = threading.Lock()  # which cannot be copied

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(x)


class Examples(Dataset[Any]):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.transforms = [change]

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> Any:
        x = X[i]
        for change in self.transforms:
            x = change(x)
        return x, X[i].sin()


class ClassDraws(Examples):
    draws = np.random.default_rng(1)

    def __getitem__(self, i: int) -> Any:
        return X[i] + normal(self.draws), X[i].sin()


class ModuleDraws(Examples):
    def __getitem__(self, i: int) -> Any:
        return X[i] + normal(GLOBAL_DRAWS), X[i].sin()


class Order(Sampler[int]):
    def __init__(self) -> None:
        self.order, self.draws = list(range(len(X))), random.Random(0)

    def __iter__(self) -> Iterator[int]:
        self.draws.shuffle(self.order)
        return iter(self.order)

    def __len__(self) -> int:
        return len(X)


class Stream(IterableDataset[Any]):
    """Goes on where it stopped."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(24):
            self.at += 1
            yield torch.tensor([self.at / 50]), torch.tensor([self.at / 50]).sin()


class Lines(IterableDataset[Any]):
    """Reads on in an open file, which begins anew at its end."""

    def __init__(self, path: Path) -> None:
        self.file = open(path)  # noqa: SIM115
        self.file.readline()

    def __iter__(self) -> Iterator[Any]:
        for _ in range(8):
            line = self.file.readline()
            if not line:
                self.file.seek(0)
                line = self.file.readline()
            x = torch.tensor([float(line)])
            yield x, x.sin()


class Lazy(list[Any]):
    """Batches that are computed when they are read, with NumPy's own numbers."""

    def __iter__(self) -> Iterator[Any]:
        return ((x + np.random.randn(), y) for x, y in super().__iter__())


class LazyPart(dict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key) + np.random.randn()

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def values(self) -> Any:
        return [self[key] for key in self]


class Calls:
    """Batches from a generator function, anew for each pass."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return self.make()


class Wrapped:
    """Reads from a loader inside."""

    def __init__(self) -> None:
        self.loader = DataLoader(Examples(Noise("NumPy")), 8, num_workers=1, persistent_workers=True)

    def __iter__(self) -> Iterator[Any]:
        for x, y in self.loader:
            yield 2 * x, y


class Endless(DataLoader[Any]):
    """Goes on with one iterator over a sampler without end, so that its workers last."""

    def __init__(self) -> None:
        super().__init__(Examples(Noise("torch")), 8, num_workers=1)
        object.__setattr__(self, "batch_sampler", Again(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        for _ in range(3):
            yield next(self.iterator)


class Again:
    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.sampler


def batches() -> list[Any]:
    return [(X[i : i + 8], X[i : i + 8].sin()) for i in range(0, 24, 8)]


def counting() -> Calls:
    """A generator function with a counter and a generator in the scope around it."""
    count, draws = 0, np.random.default_rng(3)

    def make() -> Iterator[Any]:
        nonlocal count
        for x, y in batches():
            count += 1
            yield x + count / 100 + normal(draws), y

    return Calls(make)


def with_default(draws: np.random.Generator) -> Callable[..., Any]:
    def collate(examples: list[Any], draws: np.random.Generator = draws) -> Any:
        x, y = (torch.stack(part) for part in zip(*examples, strict=True))
        return x + normal(draws), y

    return collate


def seed_worker(worker: int, offset: int) -> None:
    torch.manual_seed(worker + offset)
    np.random.seed(worker + offset)


def drawing(x: Tensor) -> Tensor:
    return x + np.random.randn() + torch.randn(1)


PLAIN = TensorDataset(X, X.sin())
KINDS: dict[str, Callable[[Path], Any]] = {
    **{f"own {kind}": partial(lambda kind, path: DataLoader(Examples(Noise(kind)), 8), kind) for kind in ("NumPy",)},
    "own Python": lambda path: DataLoader(Examples(Noise("Python")), 8, shuffle=True),
    "own torch": lambda path: DataLoader(Examples(Noise("torch")), 8, generator=torch.Generator().manual_seed(1)),
    "own old NumPy": lambda path: DataLoader(Examples(Noise("old NumPy")), 8),
    "own in a module": lambda path: DataLoader(Examples(ModuleNoise()), 8),
    "own in a scope": lambda path: DataLoader(Examples((lambda n: lambda x: n(x))(Noise("Python"))), 8),
    "own in a default": lambda path: DataLoader(PLAIN, 8, collate_fn=with_default(np.random.default_rng(5))),
    "own in a class": lambda path: DataLoader(ClassDraws(drawing), 8),
    "own in the module": lambda path: DataLoader(ModuleDraws(drawing), 8),
    "sampler": lambda path: DataLoader(PLAIN, 8, sampler=Order()),
    "stream": lambda path: DataLoader(Stream(), 8),
    "file": lambda path: DataLoader(Lines(path), 4),
    "persistent workers": lambda path: DataLoader(PLAIN, 8, num_workers=2, persistent_workers=True, shuffle=True),
    "workers that are seeded": lambda path: DataLoader(
        Examples(drawing), 8, num_workers=2, worker_init_fn=partial(seed_worker, offset=7)
    ),
    "list that draws": lambda path: Lazy(batches()),
    "parts that draw": lambda path: [(LazyPart(input=x), y) for x, y in batches()],
    "generator function": lambda path: counting(),
    "loader inside": lambda path: Wrapped(),
    "one iterator": lambda path: Endless(),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))


def trained(kind: str, path: Path, watched: bool) -> dict[str, Any]:
    """Everything that a training of two epochs leaves behind, and a list of losses as long as it was."""
    seed_all()
    GLOBAL_DRAWS.bit_generator.state = np.random.default_rng(0).bit_generator.state
    ClassDraws.draws = np.random.default_rng(1)
    net, data, losses = network(), KINDS[kind](path), list[float]()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    monitor = Monitor(Objective(net, mse, data), optimizer, every=2) if watched else None
    for _ in range(2):
        for x, y in data:
            loss = mse(net(x["input"] if isinstance(x, dict) else x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if monitor is not None:
                monitor.step()
    return traces(net, optimizer, losses) | {"after": (GLOBAL_DRAWS.random(), ClassDraws.draws.random())}


@pytest.fixture
def numbers(tmp_path: Path) -> Iterator[Path]:
    """A file of numbers; readers that nobody closes are collected here, and not in the middle of another test."""
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(str(i / 10) for i in range(-9, 10)) + "\n")
    yield path
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # open files
def test_a_watched_training_reads_what_the_unwatched_one_reads(kind: str, numbers: Path) -> None:
    alone, watched = (trained(kind, numbers, watched) for watched in (False, True))
    assert differing(alone, watched) == []
    assert len(alone["losses"]) >= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # open files
def test_every_pass_reads_the_same(kind: str, numbers: Path) -> None:
    """Also after the training has gone on with the data."""
    seed_all()
    data = KINDS[kind](numbers)
    f = Objective(network(), mse, data)
    w = f.weights()
    value, slope = f.value_and_grad(w)
    for _ in zip(range(2), data, strict=False):
        random.random(), np.random.rand(), torch.rand(1)
    again, once_more = f.value_and_grad(w)
    assert torch.equal(value, again) and torch.equal(slope, once_more)


@pytest.mark.parametrize("kind", ["own NumPy", "own torch", "own old NumPy", "sampler", "stream", "generator function"])
def test_a_pass_reads_what_the_data_would_give_next(kind: str, numbers: Path) -> None:
    """The value is that of a copy of the data, read once from where they were."""
    data, net = KINDS[kind](numbers), network()
    f = Objective(net, mse, data)
    read = [(x, y) for x, y in data]  # the first pass of the user
    losses = [len(y) * mse(net(x), y).item() for x, y in read]
    expected = sum(losses) / sum(len(y) for _, y in read)
    assert f.value(f.weights()).item() == pytest.approx(expected, rel=1e-6)  # single precision


def test_another_seed_reaches_the_generators_of_the_data() -> None:
    data = DataLoader(Examples(Noise("NumPy")), 8)
    with pytest.raises(ValueError, match="augmented anew"):
        Objective(network(), mse, data).check()
    assert Objective(network(), mse, DataLoader(Stream(), 8)).check() == ""  # nothing drawn


class Clock:
    """A state outside of everything that can be copied."""

    ticks = 0

    def __iter__(self) -> Iterator[Any]:
        Clock.ticks += 1
        return iter([(x + Clock.ticks, y) for x, y in batches()])


def test_data_that_change_at_every_pass_are_refused() -> None:
    with pytest.raises(ValueError, match=r"begin with another batch when they are read again.*islice\(data, 16\)"):
        Objective(network(), mse, Clock())


def test_what_can_be_read_only_once_is_refused() -> None:
    class Holding(IterableDataset[Any]):
        def __init__(self) -> None:
            self.rest = (pair for pair in batches())

        def __iter__(self) -> Iterator[Any]:
            return self.rest

    data = DataLoader(Holding(), batch_size=None)
    with pytest.raises(ValueError, match=r"cannot be copied .*pass a few fixed batches as a list"):
        Objective(network(), mse, data)
    assert len(list(data)) == 3


class Forever(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield X[0], X[0].sin()


def test_data_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "MAX_BATCHES", 50)
    f = Objective(network(), mse, DataLoader(Forever(), 8))
    with pytest.raises(ValueError, match="have no length, and no end within 50 batches; pass a few fixed batches"):
        f.value(f.weights())

    class Long(Stream):
        def __len__(self) -> int:
            return 24

    f = Objective(network(), mse, DataLoader(Long(), 8))
    assert f.value(f.weights()).isfinite()


def test_large_arrays_and_long_lists_are_not_copied() -> None:
    """A copy costs what the state costs: one of a million numbers and names takes less than a hundredth of a second."""
    big, table = torch.zeros(COPIED_BYTES), np.zeros(COPIED_BYTES)
    small, names = torch.zeros(3), [("a path", i) for i in range(1000)]
    data = {"big": [big, table], "small": small, "names": names, "view": big[:2], "weights": nn.Parameter(small)}
    pristine = Pristine(data)
    small += 1
    names.clear()
    with pristine.fresh() as one, pristine.fresh() as two:
        assert one["big"][0] is big and one["big"][1] is table and one["view"] is data["view"]
        assert one["weights"] is data["weights"]
        assert one["small"].tolist() == [0, 0, 0] and len(one["names"]) == 1000
        one["small"] += 1
        one["names"].clear()
        assert two["small"].tolist() == [0, 0, 0] and len(two["names"]) == 1000


def test_a_copy_has_the_parts_of_a_deep_copy() -> None:
    class Node:
        __slots__ = ("items", "next")
        items: Any
        next: Any

    node = Node()
    node.next, node.items = node, [copy, len, {1, 2}, (node,), Noise("NumPy")]
    with Pristine(node).fresh() as other:
        assert other is not node and other.next is other and other.items[3][0] is other
        assert other.items[:3] == [copy, len, {1, 2}]
        assert other.items[4].draws is not node.items[4].draws
        assert other.items[4].draws.random() == np.random.default_rng(0).random()
