"""Anybody's training, watched: the same to the last bit, and its curvature the right one, or refused in words.

Every kind of model meets every kind of data, and every loop meets every one of both.
"""

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from anybody import DATA, MODELS, Case, Data, Kind
from torch import Tensor, nn
from traces import differing, seed_all, traces

from sharpscope import Objective
from sharpscope.errors import SharpscopeError
from sharpscope.monitoring.monitor import Monitor

STEPS = 4


class Training:
    """One loop of a few steps over a loader, from a seed; watched, or not."""

    def __init__(self, kind: Kind, make_data: Callable[[], Data], watched: bool) -> None:
        seed_all()
        self.kind, self.watched = kind, watched
        self.case, self.data = kind.make(), make_data()
        self.losses: list[float] = []
        self.monitor: Monitor | None = None
        self.refusal = ""

    def sgd(self, momentum: float = 0.9) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.case.parameters(), lr=0.05, momentum=momentum)

    def watch(self, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        """Make the monitor; what it refuses is kept."""
        if not self.watched:
            return
        said = {**self.data.options, **self.kind.options}
        try:
            f = Objective(self.case.model, self.case.loss, self.data.batches, **said)
            self.monitor = Monitor(f, optimizer, every=2, point=lambda before, after: after, **options)
        except SharpscopeError as error:
            self.refusal = str(error)

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        epochs = itertools.chain.from_iterable(self.data.batches for _ in itertools.count())
        return (self.data.split(raw) for raw in itertools.islice(epochs, count))

    def backward(self, x: Tensor, y: Tensor, share: float = 1.0) -> None:
        loss = self.case.evaluate(x, y)
        (share * loss).backward()
        self.losses.append(loss.item())
        for p in self.case.parameters():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.to_dense()

    def stepped(self, optimizer: torch.optim.Optimizer, by: Callable[..., Any] | None = None) -> None:
        optimizer.step() if by is None else by(optimizer)
        optimizer.zero_grad()
        if self.monitor is not None:
            self.monitor.step()

    def left_behind(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        own = {name: read() for name, read in self.case.keeps.items()}
        loss = self.case.loss.state_dict() if isinstance(self.case.loss, nn.Module) else {}
        return traces(self.case.model, optimizer, self.losses) | {"own": own, "data": self.data.state(), "loss": loss}


def with_validation(run: Training) -> torch.optim.Optimizer:
    optimizer, case = run.sgd(), run.case
    run.watch(optimizer)
    for x, y in run.batches(STEPS):
        modes = [(m, m.training) for part in case.modules() for m in part.modules()]
        for part in case.modules():
            part.eval()
        with torch.enable_grad() if run.kind.needs_grad else torch.inference_mode():
            case.model(x + 0.5)
        for m, mode in modes:
            m.training = mode
        run.backward(x, y)
        run.stepped(optimizer)
    return optimizer


def scheduled(run: Training) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(run.case.parameters(), lr=0.01, weight_decay=0.1)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    run.watch(optimizer)
    for x, y in run.batches(STEPS):
        run.backward(x, y)
        run.stepped(optimizer)
        warm_up.step()
        cosine.step()
    return optimizer


def accumulating(run: Training) -> torch.optim.Optimizer:
    optimizer = run.sgd(momentum=0.0)
    run.watch(optimizer)
    for i, (x, y) in enumerate(run.batches(2 * STEPS)):
        run.backward(x, y, share=0.5)
        if i % 2:
            nn.utils.clip_grad_norm_(run.case.parameters(), 0.5)
            run.stepped(optimizer)
    return optimizer


def in_two_phases(run: Training) -> torch.optim.Optimizer:
    optimizer = run.sgd(momentum=0.5)
    first, *_, last = run.case.trainable()
    last.requires_grad_(False)
    run.watch(optimizer)
    for i, (x, y) in enumerate(run.batches(STEPS)):
        if i == STEPS // 2:
            first.requires_grad_(False), last.requires_grad_(True)
        run.backward(x, y)
        run.stepped(optimizer)
    return optimizer


def under_autocast(run: Training) -> torch.optim.Optimizer:
    optimizer, scaler = run.sgd(), torch.amp.GradScaler("cpu", enabled=False)
    with torch.autocast("cpu", torch.bfloat16):
        run.watch(optimizer)
        for x, y in run.batches(STEPS):
            run.backward(x, y)
            scaler.unscale_(optimizer)
            run.stepped(optimizer, by=scaler.step)
            scaler.update()
    return optimizer


def resumed(run: Training) -> torch.optim.Optimizer:
    optimizer = run.sgd()
    run.watch(optimizer, k=2)
    for i, (x, y) in enumerate(run.batches(STEPS)):
        run.backward(x, y)
        run.stepped(optimizer)
        if i == 0 and run.monitor is not None:
            state = copy.deepcopy(run.monitor.state_dict())
            run.monitor.close()
            run.monitor = Monitor(run.monitor.objective, optimizer, every=2, k=2, point=run.monitor.point)
            run.monitor.load_state_dict(state)
    return optimizer


LOOPS = (with_validation, scheduled, accumulating, in_two_phases, under_autocast, resumed)


def all_pairs(seed: int) -> list[tuple[str, str, int]]:
    """Every model with every data, and loops in a random order such that each model meets each of them."""
    draws, rows = random.Random(seed), []
    for model in MODELS:
        loops = draws.sample(range(len(LOOPS)), len(LOOPS)) + draws.choices(range(len(LOOPS)), k=len(DATA))
        rows += [(model, data, loop) for data, loop in zip(draws.sample(list(DATA), len(DATA)), loops, strict=False)]
    return rows


ROWS = all_pairs(seed=15)


def flat(parts: Any) -> Tensor:
    """One vector; complex numbers are pairs of real ones."""
    return torch.cat([(torch.view_as_real(t) if t.is_complex() else t).reshape(-1) for t in parts])


def total_loss(case: Case, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean loss of all examples; buffers move on from batch to batch, what is no buffer starts anew."""
    total = torch.zeros(())
    for x, y in batches:
        before = [(owner, name, getattr(owner, name)) for owner, name in case.plain]
        before += [(p, "data", p.data.clone()) for p in case.parameters() if not p.requires_grad]
        total = total + len(y) * case.evaluate(x.clone(), y)
        for owner, name, value in before:
            setattr(owner, name, value)
    return total / sum(len(y) for _, y in batches)


def gradient(case: Case, batches: list[tuple[Tensor, Tensor]], graph: bool = False) -> Tensor:
    kept = [(part, copy.deepcopy(dict(part.named_buffers()))) for part in case.modules()]
    loss = total_loss(case, batches)
    found = torch.autograd.grad(loss, case.trainable(), create_graph=graph, materialize_grads=True)
    for part, buffers in kept:
        for name in buffers:
            owner, _, leaf = name.rpartition(".")
            part.get_submodule(owner)._buffers[leaf] = buffers[name]
    return flat(found)


def hessian(case: Case, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """By plain autograd, twice, in the live parameters."""
    g = gradient(case, batches, graph=True)
    params = case.trainable()
    rows = [flat(torch.autograd.grad(e, params, retain_graph=True, materialize_grads=True)) for e in g]
    return torch.stack(rows).double()


def jacobian(case: Case, batches: list[tuple[Tensor, Tensor]], h: float = 1e-5) -> Tensor:
    """Central differences of the gradient that training follows."""
    columns = []
    for p in case.trainable():
        for i in range(p.numel()):
            start = p.data.clone()
            ends = []
            for sign in (1, -1):
                p.data.view(-1)[i] += sign * h
                ends.append(gradient(case, batches))
                p.data.copy_(start)
            columns.append((ends[0] - ends[1]) / (2 * h))
    return torch.stack(columns, dim=1)


def first_pass(make_data: Callable[[], Data]) -> list[tuple[Tensor, Tensor]]:
    """What an objective reads: the data as they were at the start, once, under seed 0."""
    data = make_data()
    torch.manual_seed(0)
    return [data.split(raw) for raw in data.batches]


def compare(run: Training, make_data: Callable[[], Data]) -> None:
    """The last row against a dense matrix."""
    assert run.monitor is not None
    case, batches = run.case.twin(run.case), first_pass(make_data)
    single = any(p.dtype != torch.float64 for p in case.trainable() if not p.is_complex())
    if run.kind.stops:
        matrix = jacobian(case, batches)
        expected = torch.linalg.eigvals(matrix).real.sort().values
    else:
        matrix = hessian(case, batches)
        expected = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    history = run.monitor.history
    assert history.columns["step"] == [0, 2, 4]
    tolerance = (2e-3 if single or run.kind.stops else 2e-4) * torch.linalg.matrix_norm(matrix, 2).item()
    found = float(history.series("training", "sharpness")[-1])
    assert found == pytest.approx(expected[-1].item(), abs=tolerance)
    if run.monitor.measuring.k > 1 and not run.kind.stops:
        second = float(history.series("training", "sharpness2")[-1])
        assert second == pytest.approx(expected[-2].item(), abs=tolerance)


@pytest.mark.parametrize(("model", "data", "loop"), ROWS, ids=lambda v: v if isinstance(v, str) else LOOPS[v].__name__)
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.trace",
    "ignore:Lazy modules",
    "ignore:.*lr_scheduler.step",
    "ignore:None of the inputs have requires_grad",
)
def test_a_watched_training_is_the_same_and_measured_or_refused(model: str, data: str, loop: int) -> None:
    kind, make_data = MODELS[model], DATA[data]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the trainable parameters have changed")
        if kind.warning:
            warnings.filterwarnings("ignore", kind.warning)
        alone = Training(kind, make_data, watched=False)
        before = alone.left_behind(LOOPS[loop](alone))
        watched = Training(kind, make_data, watched=True)
        after = watched.left_behind(LOOPS[loop](watched))
    assert differing(before, after) == []
    if kind.refused:
        assert kind.refused in watched.refusal and len(watched.refusal) >= 40
    else:
        assert watched.refusal == ""
        compare(watched, make_data)


def test_every_pair_of_kinds_occurs() -> None:
    pairs = {pair for row in ROWS for pair in itertools.combinations(row, 2)}
    assert len(pairs) == len(MODELS) * len(DATA) + (len(MODELS) + len(DATA)) * len(LOOPS)
    assert len(MODELS) >= 40 and len(DATA) == 8 and len(LOOPS) == 6 and len(ROWS) >= 320
