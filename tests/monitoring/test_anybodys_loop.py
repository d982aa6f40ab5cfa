"""A Monitor beside anybody's loop: what changes is noticed, what fails is said, and the training is left alone."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import normal
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from sharpscope import GD, Monitor, Objective, rule_of, sharpness
from sharpscope.errors import InvalidType, InvalidValue
from sharpscope.monitoring import log_spaced

X, Y = normal(32, 4, seed=0), normal(32, 1, seed=1)


def small() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def here(before: Tensor, after: Tensor) -> Tensor:
    return after


def step(net: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    F.mse_loss(net(X), Y).backward()
    optimizer.step()


def top(net: nn.Module) -> float:
    """λ1 over what is trained now, by plain double autograd."""
    params = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(F.mse_loss(net(X), Y), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.autograd.grad(entry, params, retain_graph=True) for entry in flat]
    matrix = torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])
    return float(torch.linalg.eigvalsh(matrix.detach())[-1])


def unfreeze(net: nn.Sequential, optimizer: Optimizer) -> None:
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(net[0].parameters())})


def freeze(net: nn.Sequential, optimizer: Optimizer) -> None:
    net[0].requires_grad_(False)


def replace_head(net: nn.Sequential, optimizer: Optimizer) -> None:
    net[2] = nn.Linear(6, 1).double()
    optimizer.param_groups[0]["params"] = list(net.parameters())


def widen(net: nn.Sequential, optimizer: Optimizer) -> None:
    net[0], net[2] = nn.Linear(4, 7).double(), nn.Linear(7, 1).double()
    optimizer.param_groups[0]["params"] = list(net.parameters())


CHANGES: dict[str, tuple[Callable[[nn.Sequential, Optimizer], None], str]] = {
    "unfrozen": (unfreeze, "unfrozen or new: 0.weight, 0.bias"),
    "frozen": (freeze, "frozen or gone: 0.weight, 0.bias"),
    "replaced": (replace_head, "replaced by others of the same shape"),
    "resized": (widen, "of another shape: 0.weight, 0.bias, 2.weight"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_parameters_that_change_on_the_way_are_noticed_and_measured(kind: str) -> None:
    change, sentence = CHANGES[kind]
    net = small()
    if kind == "unfrozen":
        net[0].requires_grad_(False)
    sgd = SGD([p for p in net.parameters() if p.requires_grad], 0.05)
    monitor = Monitor(Objective(net, F.mse_loss, [(X, Y)]), sgd, every=2, point=here)
    for i in range(8):
        if i == 4:
            change(net, sgd)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(net, sgd)
            monitor.step()
        said = [str(w.message) for w in caught if "trainable parameters have changed" in str(w.message)]
        assert len(said) == (i == 4) and all(sentence in text for text in said)
    found = monitor.history.series("training", "sharpness")
    assert len(found) == 5
    assert found[-1] == pytest.approx(top(net), rel=1e-3)
    assert sharpness(monitor.objective) == pytest.approx(top(net), rel=1e-3)


def test_measuring_waits_for_weights_that_are_unfrozen_before_an_optimizer_trains_them() -> None:
    net = small()
    net[0].requires_grad_(False)
    sgd = SGD([p for p in net.parameters() if p.requires_grad], 0.05)
    monitor = Monitor(Objective(net, F.mse_loss, [(X, Y)]), sgd, every=2, point=here)
    said = []
    for i in range(12):
        if i == 3:
            net[0].requires_grad_(True)
        if i == 8:
            sgd.add_param_group({"params": list(net[0].parameters())})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(net, sgd)
            monitor.step()
        said += [(i, str(w.message)) for w in caught if "trainable parameters" in str(w.message)]
        assert len(caught) <= 1, [str(w.message) for w in caught]
    assert [i for i, _ in said] == [3, 8]
    assert "no optimizer trains 0.weight, 0.bias: measuring goes on when one does" in said[0][1]
    assert monitor.history.series("training", "step").tolist() == [0.0, 2.0, 10.0, 12.0]
    assert monitor.history.series("training", "sharpness")[-1] == pytest.approx(top(net), rel=1e-3)


def test_an_objective_of_weights_that_are_gone_says_so() -> None:
    net = small()
    f = Objective(net, F.mse_loss, [(X, Y)])
    net[0].requires_grad_(False)
    with pytest.raises(InvalidValue, match=r"frozen or gone: 0.weight, 0.bias.*f.renewed\(\)"):
        f.weights()
    assert sharpness(f.renewed()) == pytest.approx(top(net), rel=1e-3)


class TwoPhases(Optimizer):
    """Goes up, and then down from where it was: its own ``step`` is never called."""

    def __init__(self, params: Any, rho: float) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = SGD(self.param_groups, lr=0.1)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def descend(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize("rule", [None, GD(0.1)])
def test_steps_in_two_phases_are_those_of_the_optimizer_inside(rule: GD | None) -> None:
    net = small()
    optimizer = TwoPhases(net.parameters(), 0.05)
    f = Objective(net, F.mse_loss, [(X, Y)])
    with pytest.raises(InvalidType, match="TwoPhases wraps SGD, and how its steps differ"):
        rule_of(optimizer)
    monitor = Monitor(f, optimizer, every=2, rule=rule)
    assert monitor.facts.observed == (("TwoPhases",) if rule is None else ())
    for _ in range(4):
        F.mse_loss(net(X), Y).backward()
        optimizer.climb()
        net.zero_grad()
        F.mse_loss(net(X), Y).backward()
        optimizer.descend()
        net.zero_grad()
        monitor.step()
    assert monitor.steps == 4
    assert monitor.history.series("training", "step").tolist() == [0, 2, 4]


def test_weights_that_change_without_a_step_are_no_ground_for_a_diagnosis() -> None:
    net = small()
    idle = SGD(net.parameters(), 0.1)
    monitor = Monitor(Objective(net, F.mse_loss, [(X, Y)]), idle, every=1)
    for _ in range(3):
        step(net, SGD(net.parameters(), 0.1))
        monitor.step()
    (finding,) = monitor.findings()
    assert finding.name == "no steps" and finding.numbers == {"changes of the weights": 3.0}
    assert "pass the optimizer whose step() is called" in monitor.diagnosis()


def test_a_monitor_that_is_never_called_says_so() -> None:
    net = small()
    sgd = SGD(net.parameters(), 0.01)
    monitor = Monitor(Objective(net, F.mse_loss, [(X, Y)]), sgd, every=10)
    for _ in range(100):
        step(net, sgd)
    assert "monitor.step() was never called" in monitor.diagnosis()


@pytest.mark.parametrize("steps", [0, 8])
def test_a_run_whose_steps_are_all_skipped_says_so(steps: int) -> None:
    net = small()
    sgd = SGD(net.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monitor = Monitor(Objective(net, F.mse_loss, [(X, Y)]), sgd, every=4)

    def train(count: int, factor: float) -> None:
        for _ in range(count):
            sgd.zero_grad()
            scaler.scale(F.mse_loss(net(X), Y) * factor).backward()
            scaler.step(sgd)
            scaler.update()
            monitor.step()

    train(steps, 1.0)
    train(99, float("inf"))
    assert "no steps" not in {finding.name for finding in monitor.findings()}
    train(1, float("inf"))
    finding = monitor.findings()[0]
    assert finding.name == "no steps" and finding.numbers == {"calls": 100.0}
    assert f"since step {steps}: " in finding.text and "GradScaler" in finding.text
    assert bool(monitor.findings()[1:]) == (steps > 0)
    train(1, 1.0)
    assert "no steps" not in {finding.name for finding in monitor.findings()}


@pytest.mark.parametrize("kind", ["an error", "no memory"])
def test_what_measuring_raises_does_not_end_the_training(kind: str) -> None:
    class Failing(nn.Module):
        """Runs in training, and fails whenever it is asked at other weights than the model's own."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.fails = small(), False
            self.own = [id(p) for p in self.net.parameters()]

        def forward(self, x: Tensor) -> Tensor:
            if self.fails and [id(p) for p in self.net.parameters()] != self.own:
                raise MemoryError if kind == "no memory" else RuntimeError("out of luck")
            return self.net(x)

    def run(watched: bool) -> tuple[Tensor, int]:
        net = Failing()
        adam = Adam(net.parameters(), 0.01)
        monitor = Monitor(Objective(net, F.mse_loss, [(X, Y)]), adam, every=1) if watched else None
        net.fails = True
        said = 0
        for _ in range(5):
            step(net, adam)
            if monitor is not None:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    monitor.step()
                said += len(caught)
        return torch.cat([p.detach().reshape(-1) for p in net.parameters()]), said

    (alone, _), (watched, said) = run(False), run(True)
    assert torch.equal(alone, watched)
    assert said == 4  # that of the start, two that were left out, and the last one


def test_an_optimizer_of_weights_around_the_loss_is_refused() -> None:
    net, critic = small(), nn.Linear(1, 1).double()
    f = Objective(net, lambda out, y: F.softplus(critic(out) * y).mean(), [(X, Y)])
    Monitor(f, SGD(net.parameters(), 0.1)).close()
    with pytest.raises(InvalidValue, match="the optimizer also trains 2 parameters that the loss depends on"):
        Monitor(f, SGD([*net.parameters(), *critic.parameters()], 0.1))


def test_a_loss_with_weights_is_watched_whole() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return (self.scale * out - y).square().mean()

    net, loss = small(), Scaled()
    adam = AdamW([*net.parameters(), *loss.parameters()], 0.01)
    monitor = Monitor(Objective(net, loss, [(X, Y)]), adam, every=1)
    for _ in range(2):
        adam.zero_grad()
        loss(net(X), Y).backward()
        adam.step()
        monitor.step()
    assert len(monitor.history.series("training", "stability_ratio")) == 2
    assert monitor.objective.size == 37 + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128])
def test_weights_of_any_kind_are_watched_to_the_last_bit(dtype: torch.dtype) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()
            self.mix = nn.Parameter(torch.ones(4, 4, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            mixed = (x.to(self.mix.dtype) @ self.mix).abs()
            return self.net(mixed.to(self.net.get_parameter("0.weight").dtype))

    def run(watched: bool) -> tuple[list[Tensor], int]:
        net = Net()
        adam = AdamW(net.parameters(), 0.01)
        monitor = Monitor(Objective(net, F.mse_loss, [(X, Y)]), adam, every=2) if watched else None
        for _ in range(4):
            step(net, adam)
            if monitor is not None:
                monitor.step()
        rows = 0 if monitor is None else len(monitor.history.series("training", "stability_ratio"))
        return [p.detach().clone() for p in net.parameters()], rows

    (alone, _), (watched, rows) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert rows == 2


def test_validation_in_inference_mode_may_measure() -> None:
    net = small()
    sgd = SGD(net.parameters(), 0.05)
    monitor = Monitor(Objective(net, F.mse_loss, [(X, Y)]), sgd, every=1, point=here)
    step(net, sgd)
    with torch.inference_mode():
        monitor.step()
        assert monitor.history.series("training", "sharpness")[-1] == pytest.approx(
            sharpness(monitor.objective, error=1e-9)
        )
    assert monitor.history.series("training", "sharpness")[-1] == pytest.approx(top(net), rel=1e-3)
    step(net, sgd)


@pytest.mark.parametrize("every", [2, log_spaced(4)])
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_of_a_monitor_goes_on_by_itself(how: str, every: Any) -> None:
    net = small()
    sgd = SGD(net.parameters(), 0.05)
    monitor = Monitor(Objective(net, nn.MSELoss(), [(X, Y)]), sgd, every=every)
    for _ in range(2):
        step(net, sgd)
        monitor.step()
    other = pickle.loads(pickle.dumps(monitor)) if how == "pickle" else copy.deepcopy(monitor)
    for m in (monitor, other):
        for _ in range(4):
            step(m.objective.model, m.optimizer)
            m.step()
    assert monitor.steps == other.steps == 6
    columns = ("step", "loss", "sharpness", "stability_ratio")
    assert all(monitor.history.columns[name] == other.history.columns[name] for name in columns)
