"""Spikes of the loss: found where they were made, not where there is only noise, and what was seen before them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from traces import differing, network, seed_all, traces

from sharpscope.autodiff.objective import Objective
from sharpscope.errors import InvalidValue
from sharpscope.measures.columns import column_of
from sharpscope.monitoring.loss_watch import LossAt, LossWatch, SpikeFinder, lag_of_squares
from sharpscope.monitoring.meters import Step
from sharpscope.monitoring.monitor import Monitor
from sharpscope.monitoring.tensor_table import TensorTable

Spikes = list[dict[str, float]]


@dataclass
class Run:
    """A training of a small network, or of a linear map, with what is done to it at some steps."""

    make: Callable[[Any], torch.optim.Optimizer]
    steps: int
    batch: int = 16
    seed: int = 0
    squares: bool = False
    factor: Callable[[int], float] = lambda step: 1.0  # of the learning rate
    labels: Callable[[int, Tensor], Tensor] = lambda step, y: y
    rows: int = 10**6

    def spikes(self) -> Spikes:
        """Train, and return what is known of each spike in the end."""
        g = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        x = torch.randn(256, 8, generator=g)
        y = (x @ torch.randn(8, 4, generator=g) + 0.5 * torch.randn(256, 4, generator=g)).argmax(1)
        loss = squared if self.squares else cross_entropy
        optimizer = self.make(net.parameters())
        rate = optimizer.param_groups[0]["lr"]
        watch = LossWatch(self.rows)
        monitor = Monitor(Objective(net, loss, [(x[:64], y[:64])]), optimizer, every=10**6, meters=[watch])
        for step in range(1, self.steps + 1):
            optimizer.param_groups[0]["lr"] = rate * self.factor(step)
            picked = torch.randint(256, (self.batch,), generator=g) if self.batch < 256 else torch.arange(256)
            optimizer.zero_grad()
            value = loss(net(x[picked]), self.labels(step, y[picked]))
            value.backward()
            optimizer.step()
            monitor.step(value)
        return known(monitor)


def squared(output: Tensor, y: Tensor) -> Tensor:
    return (output - nn.functional.one_hot(y, 4)).square().mean()


def known(monitor: Monitor) -> Spikes:
    """The last row about each spike."""
    for name in monitor.history.columns:
        column_of(name)
    rows = [{n: v for n, v in row.items() if v is not None and n.startswith("spike")} for row in monitor.history.rows]
    return list({row["spike"]: row for row in rows if "spike" in row}.values())


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda p: torch.optim.SGD(p, lr=lr)


def adam(lr: float, beta2: float = 0.999) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda p: torch.optim.Adam(p, lr=lr, betas=(0.9, beta2))


def after_quiet(seed: int, beta2: float) -> Spikes:
    """Half of the inputs of a linear map are zero for 200 steps, so that Adam's v of their weights is zero, too.

    The loss has a floor of one, so that what these inputs add to it, 2 %, is no spike in itself.
    """
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(256, 256, generator=g), torch.randn(256, 1, generator=g) * 0.2 / 16
    net = nn.Linear(256, 1)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return 1 + (output - y).square().mean()

    optimizer = adam(2e-2, beta2)(net.parameters())
    monitor = Monitor(Objective(net, loss, [(x, x @ w)]), optimizer, every=10**6, meters=[LossWatch(50)])
    for step in range(1, 261):
        batch = x[torch.randint(256, (32,), generator=g)].clone()
        batch[:, 128:] *= step > 200
        optimizer.zero_grad()
        value = loss(net(batch), batch @ w)
        value.backward()
        optimizer.step()
        monitor.step(value)
    return known(monitor)


NOISE = {
    "batches of 1": Run(sgd(0.1), 500, 1),
    "batches of 4": Run(sgd(0.1), 500, 4),
    "batches of 16": Run(sgd(0.1), 500, 16),
    "Adam": Run(adam(1e-3), 500, 16),
    "warm-up": Run(adam(3e-3), 500, 16, factor=lambda step: min(1.0, step / 300)),
    "edge of stability": Run(sgd(1.5), 500, 256, squares=True),
}
"""Runs without a spike."""


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_no_spike(name: str) -> None:
    """At most 1 % of the steps with batches of one, .4 % with batches of four, and otherwise none are false alarms.

    Counted under twelve other seeds, each of 1000 steps (warm-up: 600, edge: 800): 22 in 12000 steps for batches of 1,
    19 for batches of 2, 10 for batches of 4, none for batches of 16 and of 64, for Adam and for a warm-up of 300 steps.
    At the edge of stability none in 9600 steps that oscillate; 5 of the 12 runs have one alarm, where they meet the
    edge for the first time and the loss jumps to four times what it was: a spike.
    """
    found = NOISE[name].spikes()
    assert len(found) <= {"batches of 1": 5, "batches of 4": 2}.get(name, 0)


SPIKES = {
    "wrong labels, Adam": Run(adam(3e-3), 340, labels=lambda step, y: (y + 1) % 4 if step == 300 else y),
    "wrong labels, SGD": Run(sgd(0.1), 340, labels=lambda step, y: (y + 1) % 4 if step == 300 else y),
    "raised rate, SGD": Run(sgd(0.1), 340, factor=lambda step: 100.0 if 299 <= step < 302 else 1.0),
    "raised rate, Adam": Run(adam(1e-3), 340, factor=lambda step: 500.0 if 299 <= step < 302 else 1.0),
}
"""Runs in which the labels of the batch of step 300 are wrong, or the rate is raised for the steps 299 to 301."""


@pytest.mark.parametrize("name", SPIKES)
def test_spikes_that_were_made_are_found(name: str) -> None:
    """A batch with wrong labels and a rate that is raised for three steps.

    Counted under twenty other seeds each: wrong labels 20 of 20 for Adam and for SGD, at the very step and without any
    other alarm; raised rate 20 of 20 for SGD.  For Adam, whose loss goes up and down between .2 and 2.5 after that from
    .7, 12 of 20 within six steps, 15 of 20 in all, and 6 more alarms while the loss is as unsteady.
    """
    spike, *_ = [s for s in SPIKES[name].spikes() if 300 <= s["spike"] <= 305]
    assert spike["spike_loss"] > 1.2 * spike["spike_base"]
    if "labels" in name:  # the weights are as they were: it was the batch
        assert spike["spike"] == 300 and spike["spike_length"] <= 3
        assert spike["spike_lead"] == 0.0 and spike["spike_rate"] == 1.0 and spike["spike_gradient"] > 2
        assert spike["spike_probe"] < 1.2 * spike["spike_base"]
    else:
        assert spike["spike_rate"] == pytest.approx(100.0 if "SGD" in name else 500.0)
        assert spike["spike_probe"] > 1.2 * spike["spike_base"]


def test_adam_after_a_quiet_phase() -> None:
    """With β2 = .999 v lags behind the gradients that return, and the loss jumps a few steps later; with .9 neither.

    Counted under twenty other seeds: 18 with β2 = .999, 4 with .9.
    """
    (spike,) = after_quiet(0, 0.999)
    assert 202 <= spike["spike"] <= 210 and spike["spike_lead"] >= 1
    # the first gradient after 200 without: v̂ = g² (1 - β2)/(1 - β2^201), in one half of the weights
    first = math.sqrt(0.5 * (1 - 0.999**201) / (1 - 0.999))
    assert spike["spike_lag"] == pytest.approx(first, rel=0.01)  # the other half adds about one to its square
    assert not after_quiet(0, 0.9)


def test_the_jump_over_the_edge_is_announced_by_the_gradient() -> None:
    """Gradient descent that meets its edge for the first time: gradients grow for many steps before the loss does."""
    (spike,) = Run(sgd(2.0), 200, 256, squares=True).spikes()
    assert spike["spike_lead"] >= 5 and spike["spike_gradient_before"] > 5 and spike["spike_rate"] == 1.0


def see(losses: list[float], gradients: list[float] | None = None) -> tuple[SpikeFinder, list[dict[str, float]]]:
    finder = SpikeFinder()
    moments = [LossAt(i, loss, gradients[i] if gradients else math.nan) for i, loss in enumerate(losses)]
    return finder, [dict(found) for found in map(finder.see, moments) if found]


QUIET = [1.0 + 0.01 * (i % 3) for i in range(60)]


def test_a_spike_by_hand() -> None:
    """Median 1.01, margin a fifth of it: begins at 60 with 1.3, and is low from 64 on, four steps later."""
    gradients = [1.0] * 57 + [1.5, 3.0, 4.0, 9.0] + [1.0] * 12
    finder, found = see([*QUIET, 1.3, 2.0, 1.4, 1.2, 1.05, *[1.0] * 8], gradients)
    began, ended = found
    assert began == {
        **{"spike": 60.0, "spike_loss": 1.3, "spike_base": pytest.approx(1.01), "spike_lead": 2.0},
        **{"spike_gradient": 9.0, "spike_gradient_before": 4.0, "spike_lag": pytest.approx(math.nan, nan_ok=True)},
    }
    assert ended["spike_loss"] == 2.0 and ended["spike_length"] == 4.0 and finder.spike is None
    assert max(m.loss for m in finder.quiet) < 1.1  # a spike is no part of what the next one is compared with


@pytest.mark.parametrize(
    "losses",
    [
        [*QUIET, *(1.0 + 0.01 * i for i in range(60))],  # a slow rise
        [*QUIET, 1.2, 1.2, 1.0],  # within the margin
        [*QUIET[:19], 5.0, *QUIET],  # too early to tell
        [1.0 + (i % 2) for i in range(80)] + [2.5],  # within the margin of an oscillation
        [*QUIET, math.nan, math.inf],
        [3.0 * 0.95**i for i in range(100)],
    ],
)
def test_what_is_no_spike(losses: list[float]) -> None:
    assert see(losses)[1] == []


def test_a_new_level_is_a_spike_that_does_not_end() -> None:
    finder, found = see([*QUIET, *[2.0] * 300])
    assert [row["spike"] for row in found] == [60.0, 60.0] and "spike_length" not in found[-1]
    assert finder.spike is None and len(finder.quiet) == 50


def test_the_lag_of_v_against_its_formula() -> None:
    """Rms of g/(√v̂ + eps) of the matrices, by hand; none for other rules."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(8, 3).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, betas=(0.9, 0.95))
    for step in range(1, 4):
        optimizer.zero_grad()
        (net(x) * 10.0**step).square().mean().backward()
        optimizer.step()
    expected = []
    for p in (p for p in net.parameters() if p.dim() > 1):
        v, grad = optimizer.state[p]["exp_avg_sq"] / (1 - 0.95**3), p.grad
        assert grad is not None
        expected.append((grad / (v.sqrt() + 1e-8)).square().mean().sqrt().item())
    found = lag_of_squares(optimizer)
    assert found is not None and found.item() == pytest.approx(max(expected), rel=1e-6)  # the same, with eps moved
    assert max(expected) > 1.5
    assert lag_of_squares(torch.optim.SGD(net.parameters(), lr=0.1)) is None


def test_rows_with_the_loss_and_the_gradient() -> None:
    net = nn.Linear(3, 1).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    f = Objective(net, nn.functional.mse_loss, [(x, y)])
    monitor = Monitor(f, optimizer, every=100, meters=[LossWatch(3)])
    losses, norms = [], []
    for _ in range(7):
        optimizer.zero_grad()
        value = f.loss(net(x), y)
        value.backward()
        norms.append(torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None]).norm().item())
        optimizer.step()
        monitor.step(value)
        losses.append(value.item())
    steps, batch, norm = monitor.history.table("training", "step", "batch_loss", "applied_gradient")
    assert steps.tolist() == [3, 6]
    assert batch == pytest.approx([losses[2], losses[5]], rel=1e-6)  # seven digits are kept
    assert norm == pytest.approx([norms[2], norms[5]], rel=1e-6)
    with pytest.raises(InvalidValue, match="rows=0"):
        LossWatch(0)


def test_a_loop_that_hands_over_no_loss_is_told_so() -> None:
    net = nn.Linear(3, 1)
    f = Objective(net, nn.functional.mse_loss, [(torch.randn(8, 3), torch.randn(8, 1))])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = Monitor(f, optimizer, every=100, meters=[LossWatch(1)])
    for _ in range(2):
        optimizer.zero_grad()
        f.loss(net(f.data[0][0]), f.data[0][1]).backward()  # type: ignore[index]
        optimizer.step()
        if monitor.steps > 1:
            monitor.step()
        else:
            with pytest.warns(UserWarning, match=r"LossWatch failed at step 1.*call monitor.step\(loss\)"):
                monitor.step()
    watch = LossWatch(1)
    watch.read(Step(1, f, 2.0))
    assert watch.read(Step(2, f)) == {}  # now and then it may be missing


def test_gradients_before_clipping_are_those_that_are_compared() -> None:
    net = nn.Linear(3, 1)
    f = Objective(net, nn.functional.mse_loss, [(torch.randn(8, 3), torch.randn(8, 1))])
    watch, found = LossWatch(10**6), []
    for step in range(1, 101):
        watch.after(torch.optim.SGD(net.parameters(), lr=0.1), f)
        watch.unclipped(torch.tensor(7.0 if step in (98, 99, 100) else 1.0))
        found.append(watch.read(Step(step, f, 1.0 if step < 100 else 5.0)))
    assert found[-1]["spike"] == 100 and not any(found[:-1])
    assert found[-1]["spike_lead"] == 2 and found[-1]["spike_gradient"] == 7.0


def test_on_an_accelerator_losses_are_read_when_a_row_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same spike is found, up to `rows` steps later; one that has passed has no loss of the fixed data."""
    now = Run(sgd(0.1), 340, labels=lambda step, y: (y + 1) % 4 if step == 290 else y, rows=20)
    (early,) = now.spikes()
    monkeypatch.setattr("sharpscope.monitoring.loss_watch.on_accelerator", lambda numbers: True)
    (late,) = now.spikes()
    assert early.pop("spike_probe") > 0 and late == early


@pytest.mark.parametrize("make", [sgd(0.1), adam(1e-3)], ids=["SGD", "Adam"])
def test_a_run_that_is_watched_at_a_spike_is_the_same_to_the_last_bit(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    def run(monitored: bool) -> dict[str, Any]:
        seed_all()
        net, losses = network(), []
        x, y = torch.randn(32, 4), torch.randn(32, 1)
        optimizer = make(net.parameters())
        if monitored:
            f = Objective(net, nn.functional.mse_loss, [(x, y)], without_dropout=True)
            monitor = Monitor(f, optimizer, every=20, meters=[TensorTable(7), LossWatch(5)])
        for step in range(40):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y + 20.0 * (step == 30))
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            losses.append(loss.item())
            if monitored:
                monitor.step(loss, (x, y))
        if monitored:
            assert known(monitor)[0]["spike"] == 31 and "spike_probe" in known(monitor)[0]
        return traces(net, optimizer, losses)

    assert differing(run(False), run(True)) == []
