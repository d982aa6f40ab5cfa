"""Any optimizer may be watched: its steps stay what they are, and what is not known about them is left out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from problems import normal
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpscope import Monitor, Objective
from sharpscope.errors import InvalidType, InvalidValue
from sharpscope.measures.iterate import Iterate
from sharpscope.monitoring import TensorTable
from sharpscope.optimizers import GD
from sharpscope.optimizers.from_torch import stability_of

Parameters = list[nn.Parameter]
X, Y = normal(32, 4, seed=0), normal(32, 1, seed=1)


def network() -> nn.Sequential:
    """Matrices alone, so that Muon can train all of it; the first is scale-invariant."""
    layers = [nn.Linear(4, 6, bias=False), nn.LayerNorm(6, elementwise_affine=False), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(6, 1, bias=False)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(normal(*p.shape, seed=5 + i) / 2)
    return net


class Lion(Optimizer):
    """Signs of an average, with decoupled weight decay."""

    def __init__(self, params: Parameters, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m.lerp(p.grad, 0.1).sign())
                m.lerp_(p.grad, 0.01)


class WithoutRate(Lion):
    """Knows no learning rate."""

    def __init__(self, params: Parameters) -> None:
        Optimizer.__init__(self, params, {"scale": torch.ones(3)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.01)


class Wrapper(Optimizer):
    """Lets an optimizer inside step, and pulls the weights back to their average after it."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.defaults = base, base.defaults

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()
        for p in self.param_groups[0]["params"]:
            p.lerp_(self.state[p].setdefault("average", p.clone()), 0.1)
            self.state[p]["average"].lerp_(p, 0.2)


class ByNorm(Optimizer):
    """Climbs to a neighbour first, as sharpness-aware minimization does: two gradients a step."""

    def __init__(self, params: Parameters) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.05, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        params = self.param_groups[0]["params"]
        moves = [0.05 * p.grad for p in params]
        torch._foreach_add_(params, moves)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(params, moves)
        self.base_optimizer.step()


class Adam8bit(torch.optim.Adam):
    """Keeps its state in a form of its own, in the step of its parent."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for kept in self.state.values():
            kept["codes"] = (kept["exp_avg_sq"] * 255).to(torch.uint8)
        return found


class Inherited(torch.optim.RMSprop):
    """Takes the steps of its parent."""


def torch_optimizer(kind: type[Optimizer]) -> Callable[[Parameters], Optimizer]:
    return lambda p: kind(p, lr=0.01) if kind is not torch.optim.LBFGS else kind(p, lr=0.1, max_iter=3)  # type: ignore[call-arg]


KINDS = [k for k in vars(torch.optim).values() if isinstance(k, type) and issubclass(k, Optimizer)]
FLAGS: dict[str, Callable[[Parameters], Any]] = {
    f"{kind.__name__}, {flag}": partial(kind, lr=torch.tensor(0.01), **{flag: True})
    for flag, kinds in {
        "foreach": (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax, torch.optim.ASGD),
        "fused": (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad),
        "maximize": (torch.optim.SGD, torch.optim.Adam),
        "amsgrad": (torch.optim.Adam, torch.optim.AdamW),
        "centered": (torch.optim.RMSprop,),
    }.items()
    for kind in kinds
}
WATCHED: dict[str, Callable[[Parameters], Any]] = {
    **{k.__name__: torch_optimizer(k) for k in KINDS if k not in (Optimizer, torch.optim.SparseAdam)},
    **FLAGS,
    "Lion": Lion,
    "WithoutRate": WithoutRate,
    "ByNorm": ByNorm,
    "Adam8bit": Adam8bit,
    "Inherited": Inherited,
    "Wrapper": lambda p: Wrapper(torch.optim.AdamW(p, lr=0.01)),
    "Muon and AdamW": lambda p: [torch.optim.Muon(p[:1], lr=0.01), torch.optim.AdamW(p[1:], lr=0.01)],
    "SGD and AdamW": lambda p: [torch.optim.SGD(p[:1], lr=0.01), torch.optim.AdamW(p[1:], lr=0.02)],
}
OBSERVED = {
    **{name: (name,) for name in ("LBFGS", "Muon", "Rprop", "Lion", "WithoutRate", "ByNorm", "Adam8bit", "Wrapper")},
    "Muon and AdamW": ("Muon",),
}


def train(make: Callable[[Parameters], Any], monitored: bool, steps: int = 6) -> tuple[Any, Monitor | None]:
    """Train, and return everything that is left, with the monitor."""
    torch.manual_seed(0)
    net = network()
    optimizer = make(list(net.parameters()))
    several = optimizer if isinstance(optimizer, list) else [optimizer]
    f = Objective(net, F.mse_loss, [(X, Y)], without_dropout=True)
    monitor = Monitor(f, optimizer, every=2, meters=[TensorTable(2)]) if monitored else None

    def closure() -> Tensor:
        for one in several:
            one.zero_grad()
        loss = F.mse_loss(net(X), Y)
        loss.backward()
        return loss

    for _ in range(steps):
        if not isinstance(optimizer, torch.optim.LBFGS | ByNorm):
            closure()
        for one in several:
            one.step(closure) if isinstance(one, torch.optim.LBFGS | ByNorm) else one.step()
        if monitor is not None:
            monitor.step()
    states = [[one.state[p] for group in one.param_groups for p in group["params"]] for one in several]
    left = [*net.parameters(), *(p.grad for p in net.parameters()), torch.random.get_rng_state()]
    return [left, states], monitor


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize("name", WATCHED)
def test_any_optimizer_is_watched_to_the_last_bit(name: str) -> None:
    plain, _ = train(WATCHED[name], monitored=False)
    left, monitor = train(WATCHED[name], monitored=True)
    assert same(plain, left)
    assert monitor is not None
    assert monitor.history.columns["step"] == [0, 2, 4, 6]
    columns = {"loss", "sharpness", "spherical_sharpness", "radius", "rotation/0.weight", "fraction/0.weight"}
    columns |= {f"{column}/{name}.weight" for column in ("update", "turn") for name in ("0", "4")}  # of the table
    assert columns <= monitor.history.columns.keys()
    assert len(monitor.history.series("training", "sharpness")) == 4
    observed = OBSERVED.get(name, ())
    assert monitor.facts.observed == observed
    assert ("stability_ratio" in monitor.history.columns) == (not observed)
    assert ("learning_rate" in monitor.history.columns) == (name != "WithoutRate")
    if observed:
        assert not {"equilibrium", "intrinsic_time_per_step", "eta_lambda"} & monitor.history.columns.keys()
        assert set(monitor.optimizer_state.rules) == {None}
    assert monitor.findings()
    assert monitor.diagnosis()


def test_the_ratio_of_two_optimizers_is_that_of_both_metrics() -> None:
    """Against the dense matrix with M = 2/lr of SGD and 2 (1 + β1)/(1 - β1) (1 - β1^t)(√v̂ + eps)/lr of AdamW."""
    net = network()
    first, second = net.parameters()
    sgd, adam = torch.optim.SGD([first], lr=0.02), torch.optim.AdamW([second], lr=0.01, weight_decay=0.0)
    f = Objective(net, F.mse_loss, [(X, Y)], without_dropout=True)
    monitor = Monitor(f, [sgd, adam], every=3, point=lambda before, after: after)
    for _ in range(3):
        net.zero_grad()
        F.mse_loss(net(X), Y).backward()
        sgd.step()
        adam.step()
        monitor.step()
    state = adam.state[second]
    root = (state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8
    young = 1 - 0.9 ** float(state["step"])
    metric = torch.cat([torch.full((24,), 2 / 0.02).double(), (young * 2 * 1.9 / 0.1 * root / 0.01).flatten()])
    scale = metric.rsqrt()
    exact = cases.dense_top(scale[:, None] * Iterate(f, f.weights()).hessian.dense() * scale)
    assert monitor.steps == 3
    assert monitor.history.series("training", "stability_ratio")[-1] == pytest.approx(exact, rel=1e-6)
    assert monitor.history.series("training", "learning_rate").tolist() == [0.02, 0.02]  # of the invariant weights
    assert monitor.rule == GD(0.02)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_steps_are_those_of_the_optimizer_that_takes_most(order: Sequence[int]) -> None:
    net = network()
    several = [torch.optim.SGD([p], lr=0.01) for p in net.parameters()]
    f = Objective(net, F.mse_loss, [(X, Y)], without_dropout=True)
    monitor = Monitor(f, several, every=2)
    for t in range(6):
        F.mse_loss(net(X), Y).backward()
        for i in order:
            if i == 0 or t % 3 == 0:
                several[i].step()
        monitor.step()
    assert monitor.steps == 6
    assert monitor.history.columns["step"] == [0, 2, 4, 6]


def test_optimizers_must_train_all_parameters_together() -> None:
    net = network()
    f = Objective(net, F.mse_loss, [(X, Y)], without_dropout=True)
    first, second = net.parameters()
    with pytest.raises(InvalidValue, match=r"\(SGD\) does not train 4\.weight: .* as a list, Monitor\(f, \["):
        Monitor(f, torch.optim.SGD([first], lr=0.1))
    both = torch.optim.SGD([first, second], lr=0.1)
    foreign = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    with pytest.raises(InvalidValue, match="Adam trains none of the objective's parameters; leave it out of the list"):
        Monitor(f, [both, foreign])
    for nothing in ([], [both, 0.1], "SGD"):
        with pytest.raises(InvalidType, match="is no torch optimizer"):
            Monitor(f, nothing)  # type: ignore[arg-type]
    assert Monitor(f, [both, torch.optim.Adam([second])]).facts.observed == ("SGD", "Adam")  # which step twice


def accelerated(optimizer: Optimizer) -> Any:
    from accelerate import Accelerator  # type: ignore[import-untyped]

    return Accelerator(cpu=True).prepare(optimizer)


def of_lightning(optimizer: Optimizer) -> Any:
    from lightning.pytorch.core.optimizer import LightningOptimizer

    return LightningOptimizer(optimizer)


def of_fabric(optimizer: Optimizer) -> Any:
    from lightning.fabric import Fabric

    return Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


@pytest.mark.parametrize("wrap", [accelerated, of_lightning, of_fabric])
def test_wrappers_that_take_the_same_steps_have_the_law_of_the_optimizer_inside(wrap: Any) -> None:
    net = network()
    inside = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    monitor = Monitor(Objective(net, F.mse_loss, [(X, Y)], without_dropout=True), wrap(inside), every=1)
    F.mse_loss(net(X), Y).backward()
    inside.step()  # as the wrapper does, in a training of its framework
    monitor.step()
    assert monitor.optimizer is inside
    assert (monitor.rule, monitor.facts.observed, monitor.steps) == (GD(0.05, 0.0, 0.9), (), 1)


def test_a_warm_up_from_zero_says_nothing_new() -> None:
    net = network()
    several = [torch.optim.SGD(list(net.parameters())[:1], lr=0.0), Lion(list(net.parameters())[1:], lr=0.0)]
    f = Objective(net, F.mse_loss, [(X, Y)], without_dropout=True)
    monitor = Monitor(f, several, every=1)
    assert monitor.facts.observed == ("Lion",)
    for one in several:  # a warning would be an error
        one.param_groups[0]["lr"] = 0.1
    assert monitor.optimizer_state.rules == [None, None]
    assert monitor.history.columns["learning_rate"] == [0.0]


def test_a_state_in_another_form_is_observed_with_a_warning() -> None:
    """A subclass that inherits the step but not what it keeps: there is no criterion, and the run goes on."""

    class Encoded(torch.optim.SGD):
        pass

    net = network()
    sgd = Encoded(net.parameters(), lr=0.01, momentum=0.9)
    monitor = Monitor(Objective(net, F.mse_loss, [(X, Y)], without_dropout=True), sgd, every=1)
    assert not monitor.facts.observed
    F.mse_loss(net(X), Y).backward()
    sgd.state[next(net.parameters())]["momentum_buffer"] = "codes"
    with pytest.warns(UserWarning, match="no criterion of stability was found"):
        monitor.measure(monitor.objective.weights())
    assert monitor.facts.observed == ("Encoded",)


def test_a_maximized_objective_is_stable_by_its_negative_curvature() -> None:
    net = network()
    f = Objective(net, F.mse_loss, [(X, Y)], without_dropout=True)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3, maximize=True)
    monitor = Monitor(f, adam, every=1, point=lambda before, after: after)
    F.mse_loss(net(X), Y).backward()
    adam.step()
    monitor.step()
    found = stability_of(adam, list(net.parameters()))
    assert found is not None
    assert found.sign == -1
    scale = found.metric.rsqrt()
    exact = cases.dense_top(scale[:, None] * -Iterate(f, f.weights()).hessian.dense() * scale)
    assert monitor.history.series("training", "stability_ratio")[-1] == pytest.approx(exact, rel=1e-6)
