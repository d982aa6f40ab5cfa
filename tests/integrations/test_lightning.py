"""The Lightning callback: the fit does not notice it, and it reads what a Monitor in a plain loop reads."""

import csv
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from traces import Augmented, Seen, differing, go_offline, loader, network, seed_all, traces

from sharpscope.autodiff.objective import Objective
from sharpscope.integrations import named
from sharpscope.integrations.lightning import SharpnessCallback
from sharpscope.monitoring.meters import Step
from sharpscope.monitoring.monitor import Monitor
from sharpscope.records import RunLog

mse = nn.functional.mse_loss
QUIET = dict[str, Any](
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)
pytestmark = [
    # "The 'train_dataloader' does not have many workers": how many there should be depends on the machine
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning asks for LeafSpec, which torch 2.13 takes amiss
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    # it always is where a fit is resumed
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(tmp_path, monkeypatch)


class Module(lightning.pytorch.LightningModule):
    """A network with a schedule for every step; keeps the losses."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = network() if net is None else net
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = mse(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 12)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(callback: SharpnessCallback | None, data: Any, module: Any = None, package: Any = None, **options: Any) -> Any:
    """The trainer, after a fit."""
    package = package or lightning.pytorch
    callbacks = options.pop("callbacks", []) + ([] if callback is None else [callback])
    checkpoint = options.pop("ckpt_path", None)
    trainer = package.Trainer(callbacks=callbacks, **QUIET | {"max_epochs": 3} | options)
    trainer.fit(Module() if module is None else module, data, ckpt_path=checkpoint)
    return trainer


def left(trainer: Any) -> dict[str, Any]:
    return traces(trainer.lightning_module, trainer.optimizers[0], trainer.lightning_module.losses)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("persistent", [False, True], ids=["workers anew", "persistent workers"])
def test_a_watched_fit_is_the_unwatched_fit_to_the_last_bit(precision: str, persistent: bool) -> None:
    ends = []
    for callback in (None, SharpnessCallback(mse, every=2, batches=3)):
        seed_all()
        data = loader(Augmented(), persistent)
        ends.append(left(fit(callback, data, precision=precision, accumulate_grad_batches=2)))
    assert differing(*ends) == []
    assert callback is not None and callback.monitor is not None
    monitor = callback.monitor
    assert monitor.history.columns["step"] == [0, 2, 4, 6]  # 12 micro-batches
    assert monitor.planned_steps == 6
    assert {p.dtype for p in monitor.objective.model.parameters()} == {
        torch.float64 if precision == "64-true" else torch.float32
    }


@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_meters_get_the_loss_of_the_whole_step(accumulated: int) -> None:
    """It is the mean over its batches; four of them make an epoch, whose last step may be of one alone."""
    seen: list[Step] = []
    trainer = fit(
        SharpnessCallback(mse, every=3, meters=[Seen(seen)]), fixed_data(), accumulate_grad_batches=accumulated
    )
    losses = torch.tensor(trainer.lightning_module.losses).view(3, 4)
    wanted = [part.mean().item() for epoch in losses for part in epoch.split(accumulated)]
    assert [step.loss for step in seen] == pytest.approx(wanted, rel=1e-6)
    alone = [len(part) == 1 for epoch in losses for part in epoch.split(accumulated)]
    assert [step.batch is not None for step in seen] == alone


def own_loop(module: Module, data: Any, probe: Any, **options: Any) -> Monitor:
    """What a fit does, written out."""
    parts = module.configure_optimizers()
    sgd, schedule = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    monitor = Monitor(Objective(module, mse, probe, without_dropout=True), sgd, **options)
    for _ in range(3):
        for x, y in data:
            sgd.zero_grad()
            mse(module(x), y).backward()
            sgd.step()
            schedule.step()
            monitor.step()
    return monitor


def fixed_data(count: int = 16) -> DataLoader[Any]:
    examples = Augmented(count)
    return DataLoader(TensorDataset(examples.x, examples.y), batch_size=4)


def smooth_module() -> Module:
    seed_all()
    return Module(nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)))


CLOCKS = {"overhead"}


def timeless(monitor: Monitor) -> list[dict[str, Any]]:
    return [{n: v for n, v in row.items() if n not in CLOCKS} for row in monitor.history.rows]


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
def test_measurements_are_those_of_a_monitor_in_a_plain_loop(package: Any, tmp_path: Path) -> None:
    probe = list(fixed_data())[:2]
    callback = SharpnessCallback(mse, probe, every=3, k=2, report=tmp_path / "run.html")
    module: Any = smooth_module()
    if package is pytorch_lightning:
        module = foreign(module)
    fit(callback, fixed_data(), module, package)
    wanted = own_loop(smooth_module(), fixed_data(), probe, every=3, k=2)
    assert callback.monitor is not None
    assert timeless(callback.monitor) == timeless(wanted)
    assert "Sharpness of" in (tmp_path / "run.html").read_text(encoding="utf-8")


def foreign(module: Module) -> Any:
    """The same module as a class of the other package."""
    names = ("forward", "training_step", "configure_optimizers")
    kind = type("Foreign", (pytorch_lightning.LightningModule,), {name: getattr(Module, name) for name in names})
    other = kind()
    other.net, other.losses = module.net, []
    return other


def test_measurements_reach_the_loggers_of_the_trainer_and_other_sinks(tmp_path: Path) -> None:
    seen: dict[int, Any] = {}
    callback = SharpnessCallback(mse, every=5, sinks=[lambda step, values: seen.update({step: values})])
    log = lightning.pytorch.loggers.CSVLogger(str(tmp_path), name="log")
    fit(callback, fixed_data(), smooth_module(), logger=log, log_every_n_steps=1)
    with open(tmp_path / "log/version_0/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["sharpscope/sharpness"]]
    assert [int(row["step"]) for row in rows] == list(seen) == [0, 5, 10]
    for row, values in zip(rows, seen.values(), strict=True):
        assert {name: float(row[name]) for name in named(values)} == named(values)


def test_a_probe_is_spread_over_the_data_and_read_once() -> None:
    data = Augmented()
    callback = SharpnessCallback(mse, every=100, batches=2, model=lambda module: module.net)
    fit(callback, DataLoader(data, batch_size=4, shuffle=True), max_epochs=1)
    assert callback.monitor is not None
    assert "0.weight" in callback.monitor.objective.slices
    probe = list(callback.monitor.objective.data)
    assert torch.equal(torch.cat([y for _, y in probe]), data.y[::4])
    assert [len(x) for x, _ in probe] == [4, 4]


def test_a_probe_is_sent_through_the_hooks_of_the_module() -> None:
    class Scaled(Module):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] / 10, batch[1]

    callback = SharpnessCallback(mse, every=100, batches=4)
    fit(callback, fixed_data(), Scaled(), max_epochs=1)
    assert callback.monitor is not None
    assert torch.equal(next(iter(callback.monitor.objective.data))[0], next(iter(fixed_data()))[0] / 10)


def saving(folder: Path) -> dict[str, Any]:
    """Options that keep the last checkpoint in `folder`."""
    save = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_last=True, enable_version_counter=False)
    return {"callbacks": [save], "enable_checkpointing": True}


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_resumed_fit_goes_on_as_if_it_had_not_stopped(epochs: int, tmp_path: Path) -> None:
    whole = SharpnessCallback(mse, every=3)
    fit(whole, fixed_data(), smooth_module(), max_epochs=4)
    first = SharpnessCallback(mse, every=3)
    fit(first, fixed_data(), smooth_module(), max_epochs=epochs, **saving(tmp_path))
    steps: list[int] = []
    second = SharpnessCallback(mse, every=3, sinks=[lambda step, values: steps.append(step)])
    last = str(tmp_path / "last.ckpt")
    fit(second, fixed_data(), smooth_module(), max_epochs=4, ckpt_path=last, **saving(tmp_path))
    assert whole.monitor is not None and second.monitor is not None
    assert timeless(second.monitor) == timeless(whole.monitor)
    assert steps == [step for step in range(0, 17, 3) if step > 4 * epochs]  # only new ones reach the sinks


def test_a_fit_resumed_without_measurements_counts_from_where_it_is(tmp_path: Path) -> None:
    fit(None, fixed_data(), smooth_module(), max_epochs=2, **saving(tmp_path))
    callback, last = SharpnessCallback(mse, every=3), str(tmp_path / "last.ckpt")
    fit(callback, fixed_data(), smooth_module(), max_epochs=4, ckpt_path=last, **saving(tmp_path))
    assert callback.monitor is not None
    assert callback.monitor.history.columns["step"] == [8, 9, 12, 15]


# the compiler looks at the gradients of what is compiled, whether it is watched or not
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_module_is_measured_without_the_compiler() -> None:
    ends = []
    for callback in (None, SharpnessCallback(mse, every=2)):
        ends.append(
            left(fit(callback, fixed_data(), torch.compile(smooth_module(), backend="aot_eager"), max_epochs=1))
        )
    assert differing(*ends) == []
    plain = SharpnessCallback(mse, every=2)
    fit(plain, fixed_data(), smooth_module(), max_epochs=1)
    assert callback is not None and callback.monitor is not None and plain.monitor is not None
    assert timeless(callback.monitor) == timeless(plain.monitor)


def test_a_fit_that_fails_has_a_report(tmp_path: Path) -> None:
    class Failing(Module):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("out of luck")

    callback = SharpnessCallback(mse, every=2, report=tmp_path / "run.html", directory=tmp_path / "watched")
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(callback, fixed_data(), Failing())
    assert (tmp_path / "run.html").exists()
    assert "RuntimeError: out of luck" in "".join(p.read_text() for p in (tmp_path / "watched").glob("*.jsonl"))


class TwoOptimizers(Module):
    """Trains its net by two optimizers, and a critic by a third, in a loop of its own."""

    def __init__(self, trained: int = 100) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)))
        self.critic = nn.Linear(1, 1)
        self.automatic_optimization = False
        self.trained = trained

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        first, second, third = self.optimizers()
        loss = mse(self(batch[0]), batch[1])
        self.zero_grad()
        (loss + self.critic(batch[1]).mean()).backward()
        for optimizer in (first, second, third):
            optimizer.step()
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.net.parameters() if p.dim() == 2]
        others = [p for p in self.net.parameters() if p.dim() == 1][: self.trained]
        critic = torch.optim.SGD(self.critic.parameters(), lr=0.1)
        return [critic, torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(others, lr=0.01)]


def two_optimizers(trained: int = 100) -> TwoOptimizers:
    seed_all()
    return TwoOptimizers(trained)


def test_several_optimizers_are_watched_together(tmp_path: Path) -> None:
    alone, watched = two_optimizers(), two_optimizers()
    fit(None, fixed_data(), alone)
    callback = SharpnessCallback(mse, list(fixed_data()), every=4, model=lambda module: module.net)
    fit(callback, fixed_data(), watched)
    assert alone.losses == watched.losses
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), watched.parameters(), strict=True))
    monitor = callback.monitor
    assert monitor is not None
    assert [type(one).__name__ for one in monitor.optimizers] == ["SGD", "AdamW"]  # not that of the critic
    assert monitor.history.columns["step"] == [0, 4, 8, 12]
    assert len(monitor.history.series("training", "stability_ratio")) == 4  # SGD's at the start


def test_steps_of_a_resumed_fit_are_those_of_one_of_its_optimizers(tmp_path: Path) -> None:
    fit(None, fixed_data(), two_optimizers(), **saving(tmp_path))
    callback, last = SharpnessCallback(mse, every=4, model=lambda module: module.net), str(tmp_path / "last.ckpt")
    fit(callback, fixed_data(), two_optimizers(), max_epochs=5, ckpt_path=last, **saving(tmp_path))
    assert callback.monitor is not None
    assert callback.monitor.history.columns["step"] == [12, 16, 20]


class Stream(IterableDataset[Any]):
    """Goes on where it stopped, without end."""

    def __init__(self) -> None:
        self.at, self.draws = 0, np.random.default_rng(0)

    def next_numbers(self) -> list[float]:
        return [self.draws.random()]

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.at += 1
            x = torch.tensor(self.draws.standard_normal(4), dtype=torch.float32)
            yield x + self.at / 50, x[:1].tanh()


class OwnNoise(Augmented):
    """Draws its noise from generators of its own."""

    def __init__(self) -> None:
        super().__init__(32)
        self.draws, self.more = np.random.default_rng(0), [random.Random(0)]

    def next_numbers(self) -> list[float]:
        return [self.draws.random(), self.more[0].random()]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.1 * float(self.draws.normal()), self.y[i] + self.more[0].gauss(0, 0.1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [Stream, OwnNoise])
def test_data_with_a_state_are_left_where_they_are(kind: Any, workers: int) -> None:
    ends, states = [], []
    for callback in (None, SharpnessCallback(mse, every=2, batches=2)):
        seed_all()
        data = DataLoader(kind(), batch_size=8, num_workers=workers)
        ends.append(left(fit(callback, data, limit_train_batches=4, max_epochs=2)))
        states.append((getattr(data.dataset, "at", 0), vars(type(data.dataset))["next_numbers"](data.dataset)))
    assert differing(*ends) == []
    assert states[0] == states[1]
    assert callback is not None and callback.monitor is not None
    f = callback.monitor.objective
    if kind is Stream:
        expected = [x for (x, _), _ in zip(Stream(), range(16), strict=False)]
        assert torch.equal(torch.cat([x for x, _ in f.data]), torch.stack(expected))


def test_batches_of_another_form_and_weight() -> None:
    x, y = Augmented().x, Augmented().y
    data = DataLoader(TensorDataset(x, y, torch.arange(32.0) + 1), batch_size=4)
    callback = SharpnessCallback(mse, every=100, batch=lambda b: (b[0], b[1]), examples=lambda b: b[2].sum())
    fit(callback, data, Module(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))), max_epochs=1)
    assert callback.monitor is not None
    f = callback.monitor.objective
    losses = [(n.sum().item(), f.on([(x, y, n)]).value(f.weights()).item()) for x, y, n in f.data]
    expected = sum(n * loss for n, loss in losses) / sum(n for n, _ in losses)
    assert f.value(f.weights()).item() == pytest.approx(expected, rel=1e-6)  # single precision


def test_a_validation_batch_can_be_measured_after_the_validation() -> None:
    """Lightning validates in inference mode, in which tensors are made that gradients refuse."""

    class Keeping(Module):
        def validation_step(self, batch: Any, index: int) -> None:
            self.kept = [t + 0 for t in batch]

    module = Keeping(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)))
    lightning.pytorch.Trainer(**QUIET).validate(module, fixed_data(), verbose=False)
    x, y = module.kept
    assert x.is_inference()
    f = Objective(module.net, mse, [(x, y)])
    expected = torch.autograd.grad(mse(module.net(x.clone()), y.clone()), list(module.net.parameters()))
    assert torch.equal(f.grad(f.weights()), torch.cat([g.reshape(-1) for g in expected]))


def test_what_cannot_be_watched_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"the optimizer \(SGD, AdamW\) does not train 2\.bias"):
        fit(SharpnessCallback(mse, model=lambda module: module.net), fixed_data(), two_optimizers(trained=1))
    for odd in ([fixed_data()], DataLoader(fixed_data().dataset, batch_size=None)):
        with pytest.raises(ValueError, match=r"pass a few fixed batches: SharpnessCallback\(data="):
            fit(SharpnessCallback(mse), odd)
    stream = DataLoader(Stream(), batch_size=4)
    fit(SharpnessCallback(mse, list(fixed_data())), stream, limit_train_batches=4, max_epochs=1)


def test_sharded_parameters_are_refused() -> None:
    strategy = lightning.pytorch.strategies.ModelParallelStrategy()
    trainer = lightning.pytorch.Trainer(**QUIET)
    trainer._accelerator_connector.strategy = strategy
    with pytest.raises(ValueError, match="ModelParallelStrategy may spread the parameters over processes"):
        SharpnessCallback(mse).on_train_start(trainer, Module())


def test_several_processes_measure_and_the_first_one_writes(tmp_path: Path) -> None:
    ends = []
    for callback in (None, SharpnessCallback(mse, every=2, report=tmp_path / "run.html", directory=tmp_path)):
        options = dict[str, Any](devices=2, strategy="ddp_fork", max_epochs=2)
        ends.append(fit(callback, fixed_data(), smooth_module(), **options).lightning_module.state_dict())
    assert differing(*ends) == []
    assert (tmp_path / "run.html").exists()
    alone = SharpnessCallback(mse, every=2)
    fit(alone, fixed_data(), smooth_module(), max_epochs=1)
    assert alone.monitor is not None
    one, together = alone.monitor.history.rows[0], RunLog(tmp_path, "training").rows[0]
    for name in ("loss", "sharpness"):  # of the same examples and weights; single precision
        assert together[name] == pytest.approx(one[name], rel=1e-4)
