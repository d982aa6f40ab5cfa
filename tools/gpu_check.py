"""Checks that need a GPU: whether measuring is right there, changes nothing, waits for nothing, and what it costs.

    PYTHONPATH=src python tools/gpu_check.py                       # at most 8 minutes on one H100
    PYTHONPATH=src python tools/gpu_check.py --device cpu --small  # the same code in half a minute

Writes gpu_check.json and, for the documentation, the table gpu_check.md.  A check that fails or cannot run is recorded
with its numbers or its error, and the next one runs.
"""

import argparse
import json
import platform
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpscope as ss
from sharpscope.measures import Iterate
from sharpscope.monitoring import AlongStep, LossWatch, TensorTable
from sharpscope.studies._shared.deep_nets import resnet20

Numbers = dict[str, float | bool | str]


@dataclass(frozen=True)
class Size:
    """How large the checks are: width of the ResNet-20, examples, those of a batch, steps, and seconds for the run."""

    width: int = 16
    examples: int = 5000
    batch: int = 500
    steps: int = 2000
    every: int = 20
    side: int = 32
    seconds: float = 270.0


FULL = Size()
SMALL = Size(width=2, examples=16, batch=8, steps=6, every=6, side=8, seconds=15.0)
TINY = Size(width=2, examples=4, batch=4, steps=3, every=3, side=8, seconds=60.0)


@dataclass(frozen=True)
class Check:
    """A check: what it measured, and whether its criterion is met; None where that is only reported."""

    name: str
    criterion: str
    passed: bool | None
    numbers: Numbers
    seconds: float
    peak_mib: float | None


class Machine:
    """The device of the checks, and its clock."""

    def __init__(self, device: str, size: Size) -> None:
        self.device, self.size = torch.device(device), size
        self.is_gpu = self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int = 3) -> float:
        """Least time of a piece of work, after a first run that is not counted."""
        work()
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return min(times)

    def random_states(self) -> list[Tensor]:
        """States of the generators of torch."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if self.is_gpu else [])]

    def images(self) -> tuple[Tensor, Tensor]:
        """Images of CIFAR's shape, each class around its own mean, and their classes."""
        g, n, side = torch.Generator().manual_seed(1), self.size.examples, self.size.side
        y = torch.randint(10, (n,), generator=g)
        x = torch.randn(10, 3, side, side, generator=g)[y] + 2 * torch.randn(n, 3, side, side, generator=g)
        return x.to(self.device), y.to(self.device)

    def network(self) -> nn.Module:
        """ResNet-20 with batch normalization, as commonly trained, in single precision."""
        shape = (3, self.size.side, self.size.side)
        return resnet20("BN", 0, shape, 10, self.size.width, invariant=False).float().to(self.device)

    def objective(self, net: nn.Module) -> ss.Objective:
        """The cross-entropy on all images, in batches."""
        x, y = self.images()
        return ss.Objective(net, cross_entropy, [*zip(x.split(self.size.batch), y.split(self.size.batch), strict=True)])


def mixed(device: torch.device | str) -> ss.Objective:
    """A small network in double precision with two kinds of normalization, the same on every device."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 24, bias=False), nn.BatchNorm1d(24)]
    net = nn.Sequential(*layers, nn.Tanh(), nn.Linear(24, 5)).double()
    x, y = torch.randn(96, 12).double(), torch.randint(5, (96,))
    net.to(device)
    x, y = x.to(device), y.to(device)
    return ss.Objective(net, cross_entropy, [(x[:60], y[:60]), (x[60:], y[60:])])


def same_as_on_the_processor(m: Machine) -> tuple[bool, Numbers]:
    """Gradient, product, sharpness and groups in double precision, to 1e-9 of those on the processor."""
    here, there = mixed("cpu"), mixed(m.device)
    w = here.weights()
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(2), dtype=w.dtype)
    pairs = [
        (here.grad(w), there.grad(there.weights()).cpu()),
        (here.hvp(w, v), there.hvp(there.weights(), v.to(m.device)).cpu()),
    ]
    gradient, product = (((a - b).norm() / a.norm()).item() for a, b in pairs)
    top = abs(ss.top_eigenpairs(there, rtol=1e-8).values[0].item() / ss.top_eigenpairs(here, rtol=1e-8).values[0] - 1)
    groups = sorted(ss.find_groups(here).groups) == sorted(ss.find_groups(there).groups)
    passed = max(gradient, product, float(top)) <= 1e-9 and groups
    return passed, {"gradient": gradient, "product": product, "sharpness": float(top), "groups equal": groups}


def warm_starts_pay(m: Machine) -> tuple[bool, Numbers]:
    """A solve near an earlier one takes at most its products, and agrees with one afresh to 1e-3."""
    f = mixed(m.device)
    w = f.weights()
    first = Iterate(f, w)
    first.top  # noqa: B018 - solved when it is read
    near = w + 1e-4 * w.norm() * torch.randn_like(w) / w.numel() ** 0.5
    warm, fresh = Iterate(f, near, start=first.memories).top, Iterate(f, near).top
    difference = abs(warm.values[0].item() / fresh.values[0].item() - 1)
    numbers: Numbers = {"products afresh": fresh.num_matvecs, "products warm": warm.num_matvecs}
    return warm.num_matvecs <= fresh.num_matvecs and difference <= 1e-3, numbers | {"difference": difference}


def train(m: Machine, monitored: bool, autocast: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Train a few steps with dropout; weights, buffers and averages, then random states, at the end."""
    torch.manual_seed(0)
    random.seed(0)
    net = nn.Sequential(m.network(), nn.Dropout(0.1)).to(m.device)
    x, y = (t[: m.size.batch] for t in m.images())
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.1)
    monitor = None
    if monitored:
        f = ss.Objective(net, cross_entropy, [(x[: len(x) // 2], y[: len(x) // 2])], without_dropout=True)
        monitor = ss.Monitor(f, optimizer, every=3, meters=[AlongStep(every=2), TensorTable(every=2), LossWatch()])
    for _ in range(min(m.size.steps, 9)):
        optimizer.zero_grad()
        with torch.autocast(m.device.type, torch.bfloat16, enabled=autocast):
            loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        if monitor is not None:
            monitor.step(loss, (x, y))
    kept = [t.detach().clone() for state in optimizer.state.values() for t in state.values()]
    return [t.clone() for t in net.state_dict().values()] + kept, m.random_states()


def monitored_run_is_the_same_run(m: Machine) -> tuple[bool, Numbers]:
    """Weights, buffers, averages and random states after a monitored run are those without it, to the last bit."""
    numbers: Numbers = {}
    torch.use_deterministic_algorithms(True, warn_only=True)
    was, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        for autocast in (False, True):
            runs = [train(m, monitored, autocast) for monitored in (False, False, True)]
            name = "bf16" if autocast else "float32"
            numbers[f"{name} repeatable"] = all(map(torch.equal, runs[0][0], runs[1][0]))
            numbers[f"{name} same"] = all(map(torch.equal, runs[0][0], runs[2][0]))
            numbers[f"{name} same random states"] = all(map(torch.equal, runs[0][1], runs[2][1]))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = was
    return all(bool(value) for name, value in numbers.items() if "same" in name), numbers


def steps_between_measurements_do_not_wait(m: Machine) -> tuple[bool, Numbers]:
    """`monitor.step` waits for the device at no step between two measurements (counted where there is a GPU)."""
    net = m.network()
    x, y = (t[: m.size.batch] for t in m.images())
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    monitor = ss.Monitor(ss.Objective(net, cross_entropy, [(x, y)]), optimizer, every=10**6, meters=[LossWatch(100)])
    waits = 0
    for step in range(8):
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if m.is_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            monitor.step(loss)
            if m.is_gpu:
                torch.cuda.set_sync_debug_mode("default")
        waits += sum("synchroniz" in str(w.message) for w in caught) if step >= 3 else 0
    return waits == 0, {"waits in 5 steps": waits}


def resnet_run(m: Machine) -> tuple[bool, Numbers]:
    """ResNet-20 by mini-batch SGD with the sharpness of all examples now and then, all steps within the time."""
    torch.manual_seed(0)
    net = m.network()
    f = m.objective(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    gradient = m.seconds(lambda: f.grad(f.weights()))
    start, measuring = time.perf_counter(), 0.0
    monitor = ss.Monitor(f, optimizer, every=m.size.every, steps=m.size.steps)
    for step in range(m.size.steps):
        x, y = f.data[step % len(f.data)]
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
        m.wait()
        before = time.perf_counter()
        monitor.step()
        m.wait()
        measuring += time.perf_counter() - before
        if time.perf_counter() - start > m.size.seconds:
            break
    rows = monitor.history.series("training", "sharpness")
    measured = max(len(rows) - 1, 1)
    numbers: Numbers = {"steps": monitor.steps, "seconds": time.perf_counter() - start, "weights": f.size}
    numbers |= {"measurements": len(rows), "gradients a measurement": measuring / measured / gradient}
    numbers |= {"gradient of all examples, ms": 1e3 * gradient, "last sharpness": float(rows[-1])}
    return monitor.steps == m.size.steps and bool(torch.tensor(rows).isfinite().all()), numbers


def products_and_a_solve(m: Machine) -> tuple[bool, Numbers]:
    """A product costs at most 3 gradients, and so it is beside PyHessian, in the same run, where it is installed."""
    f = m.objective(m.network())
    w = f.weights()
    v = torch.randn_like(w)
    gradient, at = m.seconds(lambda: f.grad(w)), f.at(w)
    product = m.seconds(lambda: at.hvp(v))
    solve = m.seconds(lambda: ss.sharpness(f), 1)
    numbers: Numbers = {"a product in gradients": product / gradient, "a solve in gradients": solve / gradient}
    return product <= 3 * gradient, numbers | _pyhessian(m, f, gradient)


def _pyhessian(m: Machine, f: ss.Objective, gradient: float) -> Numbers:
    if find_spec("pyhessian") is None:
        return {"PyHessian": "not installed, so that it was not compared"}
    import pyhessian  # type: ignore[import-not-found, unused-ignore]

    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps the graph of a gradient
        other = pyhessian.hessian(f.model, cross_entropy, dataloader=f.data, cuda=m.is_gpu)  # which sets eval mode
        values, _ = other.eigenvalues(100, 1e-3)
    m.wait()
    spent = time.perf_counter() - start
    return {"a solve of PyHessian in gradients": spent / gradient, "difference": abs(values[0] / ss.sharpness(f) - 1)}


CHECKS = (
    same_as_on_the_processor,
    warm_starts_pay,
    monitored_run_is_the_same_run,
    steps_between_measurements_do_not_wait,
    products_and_a_solve,
    resnet_run,
)


def run(check: Callable[[Machine], tuple[bool, Numbers]], m: Machine) -> Check:
    """Run a check; an error is its result."""
    name = check.__name__.replace("_", " ")
    if m.is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        passed, numbers = check(m)
    except Exception as error:  # the other checks are still of use
        passed, numbers = False, {"error": f"{type(error).__name__}: {error}"[:500]}
    peak = torch.cuda.max_memory_allocated() / 2**20 if m.is_gpu else None
    return Check(name, check.__doc__ or "", passed, numbers, time.perf_counter() - start, peak)


def table(found: list[Check], device: str) -> str:
    """The results in Markdown."""
    lines = [f"Measured on {device}, PyTorch {torch.__version__}.", ""]
    lines += ["| check | criterion | passed | numbers | seconds | peak, MiB |", "|---|---|---|---|---|---|"]
    for c in found:
        numbers = "; ".join(f"{k}: {v:.3g}" if type(v) is float else f"{k}: {v}" for k, v in c.numbers.items())
        peak = "" if c.peak_mib is None else f"{c.peak_mib:.0f}"
        cells = (c.name, c.criterion, "yes" if c.passed else "no", numbers, f"{c.seconds:.1f}", peak)
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def check_all(device: str, size: Size, out: Path) -> list[Check]:
    """Run all checks, writing what is known after each."""
    m = Machine(device, size)
    what = torch.cuda.get_device_name() if m.is_gpu else f"the processor ({platform.machine()})"
    found: list[Check] = []
    out.mkdir(parents=True, exist_ok=True)
    for check in CHECKS:
        found.append(run(check, m))
        print(f"{'passed' if found[-1].passed else 'FAILED'}  {found[-1].name}: {found[-1].numbers}", flush=True)
        record = {
            "device": what,
            "torch": torch.__version__,
            "size": asdict(size),
            "checks": [asdict(c) for c in found],
        }
        (out / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "gpu_check.md").write_text(table(found, what))
    return found


def main() -> None:
    """Read the command line, and run all checks."""
    parser = argparse.ArgumentParser(description="Checks that need a GPU.")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="a small size, for a processor")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="where the results are written")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --device cpu --small rehearses the checks")
    if options.small:
        torch.set_num_threads(1)  # of so little work more would only wait for each other
    found = check_all(options.device, SMALL if options.small else FULL, options.out)
    raise SystemExit(0 if all(c.passed for c in found) else 1)


if __name__ == "__main__":
    main()
