"""Two processes with batches of their own give what one process with the batches of both gives.

All checks run in one pair of processes, one after the other: starting them takes most of the time.  Where a check
compares, both processes also compute the numbers of one process, with ``group=None`` and all batches.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from several import together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sharpscope as ss
from sharpscope.autodiff import hvp, sharded, third_order
from sharpscope.autodiff.expansion import kept
from sharpscope.autodiff.processes import Together, processes_of
from sharpscope.linalg import density, lanczos, largest_eigenpair, trace, warm_started
from sharpscope.measures import error_budget
from sharpscope.measures.along_step import batch_sharpness, noise_scale
from sharpscope.monitoring import AlongStep, BatchSharpness, LossWatch, timetable
from sharpscope.symmetry import search

SIZES = (7, 5, 3)
"""Examples of the batches: two are those of the first process, the last that of the second."""
BACKENDS: dict[str, Callable[[], Any]] = {
    "kept": lambda: kept,
    "rebuilt": lambda: hvp.rebuilt,
    "forward over reverse": lambda: hvp.forward_over_reverse,
    "linearized": hvp.linearized,
    "differences": lambda: hvp.differences,
}
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}  # sums in another order; a product adds a hundred numbers
ROUGH = {torch.float64: 1e-10, torch.float32: 5e-5}  # differences divide rounding by their step

Batches = list[tuple[Tensor, Tensor]]


def network(dtype: torch.dtype = torch.float64, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def batches(rank: int, dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = SIZES) -> tuple[Batches, Batches]:
    """The batches of all, and those of one process."""
    g = torch.Generator().manual_seed(3)
    found = [(torch.randn(n, 6, generator=g), torch.randn(n, 2, generator=g)) for n in sizes]
    everything = [(x.to(dtype), y.to(dtype)) for x, y in found]
    return everything, everything[:-1] if rank == 0 else everything[-1:]


def objectives(rank: int, model: nn.Module, **options: Any) -> tuple[ss.Objective, ss.Objective]:
    """The objective of both processes, and the same in one."""
    everything, own = batches(rank, next(model.parameters()).dtype, **options)
    loss = nn.functional.mse_loss
    return ss.Objective(model, loss, own, group=dist.group.WORLD), ss.Objective(model, loss, everything, group=None)


def off(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@contextmanager
def counted() -> Iterator[list[int]]:
    """Lengths of the vectors that are reduced inside."""
    seen: list[int] = []
    whole = dist.all_reduce

    def reduce(t: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(t.numel())
        return whole(t, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", reduce)
        yield seen


def products(rank: int) -> dict[tuple[torch.dtype, str], tuple[float, int]]:
    """The error of a product with each backend, and the reductions that it took."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        f, one = objectives(rank, network(dtype))
        w, v = f.weights(), torch.randn(f.size, generator=torch.Generator().manual_seed(1)).to(dtype)
        for name, backend in BACKENDS.items():
            at, alone = f.using(backend()).at(w), one.using(backend()).at(w)
            with counted() as seen:
                error = off(at.hvp(v), alone.hvp(v))
            found[dtype, name] = max(error, off(at.grad, alone.grad)), len(seen)
            assert len(at.drafts) == len(alone.drafts) == (0 if name in ("kept", "linearized") else 2), name
        at, alone = f.at(w), one.at(w)
        with counted() as seen:
            errors = [
                off(f.value(w), one.value(w)),
                off(f.grad(w), one.grad(w)),
                off(at.third(v, w), alone.third(v, w)),
                off(at.gauss_newton(v), alone.gauss_newton(v)),
            ]
        found[dtype, "others"] = max(errors), len(seen) // 4
    return found


def solvers(rank: int) -> dict[str, tuple[float, int, int]]:
    """The error of what solvers find, and the products that they needed: of two processes, and of one."""
    f, one = objectives(rank, network())
    w, found = f.weights(), {}
    a, b = ss.hessian(f), ss.hessian(one)
    for name, solve in {
        "lanczos": lambda a, f: lanczos(a, 3),
        "largest": lambda a, f: largest_eigenpair(a, f.grad(w)),
        "with drafts": lambda a, f: largest_eigenpair(ss.hessian(f.using(hvp.rebuilt)), f.grad(w)),
        "sphere": lambda a, f: ss.measures.Iterate(f, w).spherical_top,
    }.items():
        left, right = solve(a, f), solve(b, one)
        found[name] = off(left.values, right.values), left.num_matvecs, right.num_matvecs
    memories: list[Any] = [None, None]
    step = 0.01 * torch.randn(f.size, generator=torch.Generator().manual_seed(2), dtype=w.dtype)
    for i in range(3):
        pairs = [warm_started(ss.hessian(g, w + i * step), m, 2) for g, m in zip((f, one), memories, strict=True)]
        memories = [p.memory for p in pairs]
        found[f"warm {i}"] = off(pairs[0].values, pairs[1].values), pairs[0].num_matvecs, pairs[1].num_matvecs
    traces = trace(a, rtol=0.1), trace(b, rtol=0.1)
    found["trace"] = off(traces[0].value, traces[1].value), traces[0].num_matvecs, traces[1].num_matvecs
    curves = density(a), density(b)
    found["density"] = off(curves[0].density, curves[1].density), curves[0].num_matvecs, curves[1].num_matvecs
    return found


def estimates(rank: int) -> dict[str, tuple[float, float]]:
    """Numbers that are about batches: of two processes, and of one."""
    f, one = objectives(rank, network(), sizes=(4, 4, 4, 4, 2))
    w, found = f.weights(), {}
    for name, of in {
        "error of the sample": lambda g: error_budget(g).standard_error,
        "bias": lambda g: error_budget(g).bias,
        "products": lambda g: error_budget(g).num_matvecs,
        "batch sharpness": lambda g: batch_sharpness(g, w).value,
        "noise scale": lambda g: noise_scale(g, w).value,
        "examples": lambda g: g.at(w).examples,
    }.items():
        found[name] = of(f), of(one)
    f, one = objectives(rank, network())  # three batches are cut into parts
    found["bias of parts"] = error_budget(f).bias, error_budget(one).bias
    checkup = ss.autodiff.tune(f, products=3, points=1, repeats=1)
    names = [t.name for t in checkup.trials if not t.problem]
    found["backends that can be believed"] = len(names), 5
    found["the choice"] = float(f.processes.first(checkup.choice) == checkup.choice), 1.0
    return found


def groups(rank: int) -> dict[str, bool]:
    """Whether the groups are those of one process."""
    found = {}
    for norm in (nn.LayerNorm, nn.BatchNorm1d):
        for large in (False, True):
            f, one = objectives(rank, network(norm=norm))
            search.LARGE = 1 if large else 500_000
            left, right = ss.find_groups(f), ss.find_groups(one)
            same = {name: i.tolist() for name, i in left.groups.items()} == {
                name: i.tolist() for name, i in right.groups.items()
            }
            found[f"{norm.__name__}, {large}"] = (
                same and left.joint.numel() > 0 and left.null.keys() == right.null.keys()
            )
    search.LARGE = 500_000
    return found


def flow(rank: int) -> tuple[float, float]:
    """The end of a central flow, and third derivatives by differences."""
    f, one = objectives(rank, network())
    ends = []
    for g in (f, one):
        ends.append(ss.flows.integrate(ss.flows.central(g, ss.GD(0.05)), g.weights(), 1.0).weights[-1])
    u = torch.randn(f.size, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    w = f.weights()
    slopes = [third_order.checked(g, w, u[:, 0])(g, w, u) for g in (f, one)]
    return off(*ends), off(*slopes)


class Fails(nn.Module):
    """Cannot be evaluated from a call on, in one of the processes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls <= 0:
            raise ZeroDivisionError("on one process")
        return x


def failing(rank: int, at: str) -> Any:
    """Something that goes wrong on one of the processes only."""
    model, loss, group = network(), nn.functional.mse_loss, dist.group.WORLD
    _, own = batches(rank)
    if at == "weights" and rank == 1:
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1e-3
    if at == "shapes" and rank == 1:
        model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 2)).double()
    if at == "empty" and rank == 1:
        own = []
    if at == "refused" and rank == 0:
        model[3].requires_grad_(requires_grad=False)
        loss = nn.MSELoss(reduction="sum")
    if at == "no group":
        return ss.Objective(model, loss, own)
    layer = Fails()
    f = ss.Objective(nn.Sequential(model, layer), loss, own, group=group)
    w = f.weights()
    if at == "seeds":
        return lanczos(ss.hessian(f), seed=rank)
    if at == "steps":
        return f.grad(w + 1e-4 * rank)
    if at == "later" and rank == 1:
        layer.calls = 1
    return f.using(hvp.rebuilt).grad(w)


CAUSES = {
    "weights": "Diverged",
    "shapes": "Diverged",
    "seeds": "Diverged",
    "steps": "Diverged",
    "empty": "InvalidValue",
    "refused": "InvalidValue",
    "no group": "InvalidValue",
    "later": "OtherProcess",
}


def failures(rank: int) -> dict[str, tuple[str, str, float]]:
    """Errors and their seconds, and that the processes can go on after them."""
    found = {}
    for at in CAUSES:
        began = time.perf_counter()
        try:
            failing(rank, at)
        except Exception as error:
            found[at] = type(error).__name__, str(error), time.perf_counter() - began
        else:
            found[at] = "nothing", "", 0.0
    f, one = objectives(rank, network())
    found["after"] = str(off(f.grad(f.weights()), one.grad(f.weights())) < 1e-12), "", 0.0
    return found


def train(steps: int, pause: float = 0.0, **options: Any) -> tuple[dict[str, Tensor], Any, Any]:
    """Train by DistributedDataParallel, watched or not: what is left of it, and the rows."""
    own = batches(dist.get_rank(), torch.float32, sizes=(16, 16))[1]
    ddp = DistributedDataParallel(network(torch.float32, nn.BatchNorm1d))
    sgd = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    monitor = None
    if options:
        f = ss.Objective(ddp, nn.functional.mse_loss, own, group=dist.group.WORLD)
        monitor = ss.Monitor(f, sgd, **options)
    for _ in range(steps):
        sgd.zero_grad()
        loss = nn.functional.mse_loss(ddp(own[0][0]), own[0][1])
        loss.backward()
        sgd.step()
        time.sleep(pause)
        if monitor is not None:
            monitor.step(loss, own[0])
    left = {**{n: t.clone() for n, t in ddp.state_dict().items()}, "random": torch.get_rng_state()}
    return left, monitor, [] if monitor is None else monitor.history.rows


def monitors(rank: int) -> dict[str, Any]:
    """Whether training is the same to the bit, and the rows."""
    plain, _, _ = train(40)
    found: dict[str, Any] = {}
    timetable.RARELY = 5  # these steps are short beside a message
    for name in ("every", "budget"):
        options: dict[str, Any] = {"every": 10} if name == "every" else {"budget": "100%"}
        if name == "every":
            options["meters"] = [AlongStep(5), BatchSharpness(20), LossWatch()]
        left, monitor, rows = train(40 if name == "every" else 300, 0 if name == "every" else 5e-3 * rank, **options)
        found[name] = rows, list(monitor.groups.groups), [finding.name for finding in monitor.findings()]
        if name == "every":
            found["same"] = all(torch.equal(plain[key], left[key]) for key in plain)
    return found


def between(rank: int) -> dict[str, tuple[str, str, float]]:
    """Errors on one process where the others wait in a message: of a product, of objects, of numbers, of a nested one.

    A second one comes while the first is on its way out; what both compute after it is right.
    """
    f, one = objectives(rank, network())
    w, found = f.weights(), {}

    def fails(then: Callable[[], Any], times: int = 0) -> Any:
        for _ in range(times):
            f.grad(w)
        if rank == 1:
            raise ZeroDivisionError("between two messages")
        return then()

    each, waiting = f.processes.each, lambda: f.grad(w)
    for name, call in {
        "product": lambda: each(lambda: fails(waiting, 2)),
        "objects": lambda: each(lambda: fails(lambda: each(lambda: 0))),
        "long": lambda: each(lambda: fails(lambda: f.processes.first("x" * 5000))),
        "numbers": lambda: each(lambda: fails(lambda: f.processes.mean(1.0))),
        "parts": lambda: each(lambda: fails(lambda: sharded(ss.hessian(f), f) @ w[: -(-f.size // 2)])),
        "nested": lambda: each(lambda: [each(lambda: fails(waiting)), f.grad(w)]),
        "on the way out": lambda: each(lambda: [fails(lambda: each(lambda: each(waiting)))]),
        "at the end": lambda: each(lambda: fails(lambda: None)),
        "on both": lambda: each(lambda: 1 / 0),
    }.items():
        began = time.perf_counter()
        try:
            call()
        except Exception as error:
            found[name] = type(error).__name__, str(error), time.perf_counter() - began
    found["after"] = str(off(f.grad(w), one.grad(w)) < 1e-12), "x" * 5000, 0.0
    assert f.processes.each(lambda: found["after"][1]) == ["x" * 5000] * 2
    return found


def pointless(rank: int) -> tuple[list[int], list[str], float]:
    """A function of the user that fails on one process: the steps that are measured, the warnings and the seconds."""

    def point(before: Tensor, now: Tensor) -> Tensor:
        if rank == 1:
            raise ZeroDivisionError("on one process")
        return now

    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, _, rows = train(40, every=10, point=point)
    words = [str(w.message) for w in caught if "ZeroDivisionError" in str(w.message)]
    return [row["step"] for row in rows], words, time.perf_counter() - began


def files(rank: int) -> tuple[bool, bool, int]:
    """Whether a process wrote rows and a report, and what its sink got."""
    got: list[int] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        _, monitor, _ = train(10, every=5, directory=folder, sinks=[lambda step, values: got.append(step)])
        monitor.report(folder / "report.html")
        return (folder / "monitor.json").exists(), (folder / "report.html").exists(), len(got)


def lost(rank: int) -> Any:
    """A process goes away, and the other is told."""
    f, _ = objectives(rank, network())
    return None if rank == 1 else f.grad(f.weights())


def at_once(rank: int) -> dict[str, tuple[str, str, float]]:
    """Errors on several processes of four at once, in or between messages, at one depth or at several."""
    p, v, found = processes_of(dist.group.WORLD), torch.ones(3), {}
    assert isinstance(p, Together)

    def fails(*ranks: int, after: float = 0.0) -> Any:
        time.sleep(after)
        if rank in ranks:
            raise ZeroDivisionError(f"on process {rank}")

    def total(*ranks: int) -> Any:
        return p.sum(lambda: (fails(*ranks), (1.0, (v,)))[1], 3, v)

    for name, call in {
        "in one product": lambda: p.each(lambda: [total(), total(1, 2)]),
        "between products": lambda: p.each(lambda: [total(), fails(1, 2), total()]),
        "in a product and before it": lambda: p.each(lambda: [fails(1), total(2)]),
        "in a product and after it": lambda: p.each(lambda: [total(2), fails(1), total()]),
        "at two depths": lambda: p.each(lambda: [fails(1), p.each(lambda: [fails(2), total()])]),
        "at the ends of two": lambda: p.each(lambda: [p.each(lambda: fails(2)), fails(1), total()]),
        "in turn": lambda: p.each(lambda: [p.each(lambda: [fails(1, 2, after=0.15 * rank)]), total()]),
        "on all": lambda: p.each(lambda: [fails(0, 1, 2, 3), total()]),
    }.items():
        began = time.perf_counter()
        try:
            call()
        except Exception as error:
            found[name] = type(error).__name__, str(error), time.perf_counter() - began
        assert p.total(v).tolist() == [4.0] * 3  # they are together again
    return found


def ended_at_once(rank: int) -> Any:
    """A process fails, one ends at the same time, and the others wait for both."""
    p, v = processes_of(dist.group.WORLD), torch.ones(3)
    assert isinstance(p, Together)
    p.total(v)
    if rank == 3:
        return None

    def whole() -> Any:
        if rank == 1:
            raise ZeroDivisionError("on process 1")
        return p.total(v)

    return p.each(whole)


CHECKS = (products, solvers, estimates, groups, flow, failures, between, monitors, pointless, files)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return together(2, tmp_path_factory.mktemp("two"), *CHECKS)


def test_a_product_with_every_backend_is_that_of_one_process(found: dict[str, list[Any]]) -> None:
    for own in found["products"]:
        for (dtype, name), (error, reductions) in own.items():
            assert error <= (ROUGH if name == "differences" else BOUNDS)[dtype], (dtype, name)
            assert reductions == 1, (dtype, name)


def test_solvers_find_the_same_with_the_same_number_of_products(found: dict[str, list[Any]]) -> None:
    assert found["solvers"][0] == found["solvers"][1]
    for name, (error, several, one) in found["solvers"][0].items():
        assert error <= 1e-9, name  # residuals of 1e-4 are where they were to rounding
        assert several == one, name


def test_what_counts_batches_counts_those_of_all_processes(found: dict[str, list[Any]]) -> None:
    assert found["estimates"][0] == found["estimates"][1]
    for name, (several, one) in found["estimates"][0].items():
        assert several == pytest.approx(one, rel=1e-6), name  # differences of nearly equal numbers


def test_groups_are_those_of_one_process(found: dict[str, list[Any]]) -> None:
    for own in found["groups"]:
        assert all(own.values()), own


def test_flows_go_where_they_go_in_one_process(found: dict[str, list[Any]]) -> None:
    for end, third in found["flow"]:
        assert end <= 1e-9
        assert third <= 1e-5  # a second difference divides rounding by the square of its step


def test_an_error_on_one_process_is_an_error_on_all(found: dict[str, list[Any]]) -> None:
    for rank, own in enumerate(found["failures"]):
        for at, kind in CAUSES.items():
            own_kind = "ZeroDivisionError" if at == "later" and rank == 1 else kind
            assert own[at][0] == own_kind, own[at]
            assert own[at][2] < 10, at
        assert own["after"][0] == "True"
    assert "process 1 failed: ZeroDivisionError: on one process" in found["failures"][0]["later"][1]
    assert "group=torch.distributed.group.WORLD" in found["failures"][0]["no group"][1]


def test_an_error_between_messages_is_an_error_on_all_within_seconds(found: dict[str, list[Any]]) -> None:
    for rank, own in enumerate(found["between"]):
        assert len(own) == 10, own
        for name, (kind, text, seconds) in own.items():
            assert seconds < 5, (name, seconds)
            own_kind = "OtherProcess" if rank == 0 and name != "on both" else "ZeroDivisionError"
            assert kind == ("True" if name == "after" else own_kind), (name, text)
            if kind == "OtherProcess":
                assert "process 1 failed: ZeroDivisionError: between two messages" in text, (name, text)


def test_monitors_measure_at_the_same_steps_and_leave_the_training_alone(found: dict[str, list[Any]]) -> None:
    first, second = found["monitors"]
    assert first["same"] and second["same"]
    for name in ("every", "budget"):
        rows, groups, words = first[name]
        assert rows == second[name][0]
        assert groups == second[name][1]
        assert words == second[name][2]
        assert len([row for row in rows if row.get("sharpness") or row.get("stability_ratio")]) >= 2, name
    assert [row["step"] for row in first["every"][0] if row["sharpness"] is not None] == [0, 10, 20, 30, 40]
    assert {"edge_along_step", "batch_sharpness", "batch_loss"} <= {key for row in first["every"][0] for key in row}


def test_a_measurement_that_fails_on_one_process_fails_on_all(found: dict[str, list[Any]]) -> None:
    for steps, words, seconds in found["pointless"]:
        assert steps == [0]  # after three failures no more are taken
        assert len(words) == 3 and words[-1].startswith("no more measurements are taken")
        assert seconds < 10


def test_the_first_process_writes(found: dict[str, list[Any]]) -> None:
    assert found["files"] == [(True, True, 3), (False, False, 0)]


def test_a_process_that_has_ended_is_missed(tmp_path: Path) -> None:
    kind, text, seconds = together(2, tmp_path, lost)["lost"][0]
    assert kind == "OtherProcess"
    assert "every process has to make the same calls" in text
    assert seconds < 10


def test_errors_on_several_processes_at_once_are_errors_on_all(tmp_path: Path) -> None:
    found = together(4, tmp_path, at_once)["at_once"]
    for rank, own in enumerate(found):
        assert len(own) == 8, own
        for name, (kind, text, seconds) in own.items():
            assert seconds < 5, (name, seconds)  # 0.4 s on an idle machine, where messages time out after 20 s
            if kind == "OtherProcess":
                assert rank in (0, 3) or name in ("in a product and after it", "at the ends of two"), (rank, name)
                assert "failed" in text, text
            else:
                assert (kind, text) == ("ZeroDivisionError", f"on process {rank}"), (name, kind, text)


def test_an_error_while_another_process_ends_is_an_error_on_all(tmp_path: Path) -> None:
    first, own, other, _ = together(4, tmp_path, ended_at_once)["ended_at_once"]
    assert own[:2] == ("ZeroDivisionError", "on process 1")
    assert first[0] == other[0] == "OtherProcess"
    assert max(first[2], own[2], other[2]) < 5  # 0.3 s on an idle machine
