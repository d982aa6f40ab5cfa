"""Adam reduces the roots of the Hessian's diagonal where labels are noisy, and SGD its trace.

Both wander along the minimizers of the loss, pushed by their own scatter: SGD goes where tr(H) falls, and Adam where
tr(Diag(H)^½) does.  These two flows have no free constant, and both are run beside theirs.

On one datum they end on different weights; in sparse regression Adam comes to a sparse solution in fewer steps; on a
network on digits each is ahead in its own measure.  That SGD reduces tr(H) and Adam tr(Diag(H)^½) where labels are
noisy, and that this makes Adam better at sparse regression with diagonal linear nets, is what the abstract says.  The
flows, their closed forms, the part that eps plays and all bounds are derived here (`slow`).  For one datum,
``f = ⟨x, w∘w⟩`` and w > 0,

    Adam   dw/dτ = -½ (1/w - Σx/⟨x, w⟩)                  differences grow: all ends on the largest weight of the start
    SGD    dw/dτ = -2α x∘(x - c)∘w,  c = Σ x³w²/Σ x²w²   all ends on the smallest x, the flattest minimizer
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...autodiff.batched import BatchedRuns
from ...optimizers.adaptive import Adam
from ...optimizers.base import UpdateRule
from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, labelled, scaling, under, wider_claim
from .._framework.config import demand_positive, seeds
from .._framework.observe import Quantity, run
from .._framework.study import Job, Progress
from .._shared.oracles import basis_pursuit
from .network import Network, mismatch
from .slow import Array, drift, root_trace
from .squares import Squares, dense_start, one_datum, product, sensing

PAPER = (
    "Li, Wen & Lyu, Adam Reduces a Unique Form of Sharpness: Theoretical Insights Near the Minimizer Manifold"
    " (NeurIPS 2025, arXiv 2511.02773)"
)
DATUM, SPARSE, NET = "One datum", "Sparse regression", "A network on digits"
X = np.linspace(0.4, 2, 5)
EPS = 1e-3  # of Adam, well below √v
LARGE_EPS = 10.0  # far above it
POINTS = 40


@dataclass(frozen=True)
class Config:
    """The settings of the study; the defaults are its full size."""

    seed: int = 0
    repeats: int = 3
    starts: int = 8  # on one datum
    rates: tuple[float, ...] = (8e-3, 4e-3, 2e-3, 1e-3)  # of Adam there
    problems: int = 40  # of sparse regression
    sparse_steps: int = 40000
    net_steps: int = 20000
    flow_steps: int = 100  # of the flow of the network

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(repeats=1, rates=(8e-3, 4e-3, 2e-3), problems=20, sparse_steps=25000, net_steps=10000, flow_steps=50)


def jobs(config: Config) -> list[Job]:
    found = []
    for seed in seeds(config):
        common = {"seed": seed, "config": config}
        found.append(Job(f"one datum, seed {seed}", _one_datum, common, cost=1.7e-5 / min(config.rates) ** 2 + 6))
        sparse = 1.5e-4 * config.sparse_steps * (1 + config.problems / 40)
        found.append(Job(f"sparse regression, seed {seed}", _sparse, common, cost=sparse))
        found.append(Job(f"network, seed {seed}", _network, common, cost=5e-4 * config.net_steps + 4))
    return found


@dataclass(frozen=True)
class Along:
    """A rule on one datum, how many steps it takes, and the flow that it is compared with."""

    rule: Adam | GD
    tau: float  # η²·steps
    deviation: float
    beside: str

    @property
    def steps(self) -> int:
        return round(self.tau / self.rule.learning_rate**2)


NOISE, UNTIL, RATE, SGD_UNTIL = 0.1, 0.6, 0.08, 200.0  # σ; τ of Adam; rate and τ of SGD
ADAM, SGD, ADAM_HALF, SGD_HALF, EPS_RUN = (
    "Adam",
    "SGD",
    "Adam, half the noise",
    "SGD, half the noise",
    "Adam, large eps",
)
FLOWS: dict[str, tuple[UpdateRule, float, float]] = {
    ADAM: (Adam(1.0, eps=EPS), UNTIL, NOISE),
    SGD: (GD(1.0), SGD_UNTIL, NOISE),
    SGD_HALF: (GD(1.0), SGD_UNTIL, NOISE / 2),
}
"""Flows on one datum: rule, time and noise."""


def _runs(config: Config) -> list[tuple[str, Along]]:
    """All runs on one datum."""
    adams = [(ADAM, Along(Adam(rate, eps=EPS), UNTIL, NOISE, ADAM)) for rate in config.rates]
    half = Along(Adam(config.rates[-2], eps=EPS), UNTIL, NOISE / 2, ADAM)
    like_sgd = Along(Adam(RATE * LARGE_EPS, eps=LARGE_EPS), SGD_UNTIL * LARGE_EPS**2, NOISE, SGD)
    slow = [(name, Along(GD(RATE), SGD_UNTIL, FLOWS[name][2], name)) for name in (SGD, SGD_HALF)]
    return [*adams, (ADAM_HALF, half), *slow, (EPS_RUN, like_sgd)]


def _one_datum(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Run SGD and Adam from several minimizers side by side, and their flows from the same ones."""
    log.resume()
    problem, start = one_datum(X, config.starts, seed)
    flows = {}
    for name, (rule, until, noise) in FLOWS.items():
        at = np.linspace(0, until, POINTS + 1)
        paths = [problem.flow(k, w, rule, noise**2, at) for k, w in enumerate(start)]
        flows[name] = np.stack(paths, 1)
        _write_path(log, f"{name}: flow", problem, flows[name], seed)
    log.append(run="identities", seed=seed, **_identities(problem, start))
    for i, (name, along) in enumerate(_runs(config)):
        progress((i + 1) / (len(config.rates) + 5))
        W = torch.as_tensor(start)
        found = np.abs(problem.descend(W, along.rule, along.steps, along.deviation, (944, seed, i), POINTS))
        if name != ADAM or along.rule.learning_rate == min(config.rates):
            _write_path(log, name, problem, found, seed)
        for k, row in enumerate(_ends(problem, found, flows, along.beside)):
            log.append(run=f"{name}: starts", start=k, seed=seed, rate=along.rule.learning_rate, **row)
    _exact(log, problem, start, seed)


def _exact(log: RunLog, problem: Squares, start: Array, seed: int) -> None:
    """Descend without noise from beside the minimizers, and measure what the second nine tenths of the way change."""
    kick = 1 + 0.05 * np.random.default_rng([945, seed]).standard_normal(start.shape)
    path = problem.descend(torch.as_tensor(start * kick), GD(0.05), 5000, 0.0, (946, seed), 10)
    change = problem.curvature(path[-1]).sum(1) / problem.curvature(path[1]).sum(1) - 1
    log.append(run="exact labels", seed=seed, change=float(np.abs(change).max()))


def _write_path(log: RunLog, name: str, problem: Squares, states: Array, seed: int) -> None:
    """Write the two kinds of sharpness along the path from the first start; `states` are ``(points+1, R, P)``."""
    D = problem.curvature(states)[:, 0]
    for i, (trace, root) in enumerate(zip(D.sum(1), root_trace(D), strict=True)):
        log.append(run=name, seed=seed, part=i / POINTS, trace=float(trace), root_trace=float(root))


def _ends(problem: Squares, found: Array, flows: dict[str, Array], beside: str) -> list[dict[str, float]]:
    """For each start, how far the squares of weights are from a flow on average, and where they end."""
    squares, start, end = np.square(found), np.square(found[0]), np.square(found[-1])
    of_flow = {name: np.square(path) for name, path in flows.items()}
    moved = np.linalg.norm(of_flow[beside][-1] - start, axis=-1)
    error = np.linalg.norm(squares - of_flow[beside], axis=-1).mean(0) / moved
    other = of_flow[ADAM if beside != ADAM else SGD]
    nearest = np.linalg.norm(other - end, axis=-1).min(0) / np.linalg.norm(end - start, axis=-1)
    D, places, gains = problem.curvature(found), np.arange(len(start)), end / start
    columns = {
        "error": error,
        "nearest": nearest,
        "largest_gain": gains[places, start.argmax(-1)],
        "flattest_gain": gains[:, X.argmin()],
        "trace_change": D[-1].sum(-1) / D[0].sum(-1),
        "root_change": root_trace(D[-1]) / root_trace(D[0]),
    }
    if beside == SGD_HALF:
        columns["full_pace"] = np.linalg.norm(squares - of_flow[SGD], axis=-1).mean(0) / moved
    return [{name: float(v[k]) for name, v in columns.items()} for k in range(len(start))]


def _pull(w: Array, S: Array) -> Array:
    """Gradient of ``tr(S H)`` on one datum, with S constant in it."""
    return np.asarray(8 * S * X**2 * w)


def _identities(problem: Squares, start: Array) -> dict[str, float]:
    """Closed forms against automatic derivatives and against the general drift, greatest relative differences."""
    W = torch.as_tensor(start)
    dense = BatchedRuns(problem.losses).hessian(W).diagonal(dim1=1, dim2=2).numpy()
    D = problem.curvature(start)
    drifts = []
    for w in start:
        closed = -0.5 * (1 / w - X.sum() / (X @ w))
        general = drift(2 * X[None] * w, NOISE**2, Adam(1.0, eps=1e-12), partial(_pull, w))
        drifts.append(np.linalg.norm(general - closed) / np.linalg.norm(closed))
    return {"hessian_off": float(np.abs(D / dense - 1).max()), "drift_off": float(max(drifts))}


SIZE = (10, 20, 3)  # equations, unknowns, and how many of these are not zero


def _sparse(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Take equal numbers of steps of both on many problems, with sparse solutions and with dense ones."""
    log.resume()
    n, d, k = SIZE
    for ending, sparsity in (("", k), (", dense", d)):
        problem, known = sensing(n, d, sparsity, config.problems, seed)
        start = dense_start(known, seed)
        ends = {"start": product(start), "least ℓ₁": np.array([basis_pursuit(s.a, s.a @ s.truth) for s in known])}
        tau = 2.5
        rules: dict[str, tuple[UpdateRule, float]] = {
            ADAM: (Adam((tau / config.sparse_steps) ** 0.5, eps=EPS), 0.1),
            SGD: (GD(0.03), 0.4),
        }
        for i, (name, (rule, noise)) in enumerate(rules.items()):
            W, deviation = torch.as_tensor(start), noise * n**0.5
            states = problem.descend(W, rule, config.sparse_steps, deviation, (947, seed, i), POINTS)
            if not ending:
                _write_path(log, f"sparse: {name}", problem, states, seed)
                _write_errors(log, f"sparse: {name}", known[0].truth, product(states[:, 0]), seed)
            ends[name] = product(states[-4:]).mean(0)  # the scatter averages out
            progress((i + 1 + 2 * bool(ending)) / 4)
        for j, s in enumerate(known):
            for name, beta in ends.items():
                log.append(
                    run=f"{name}{ending}",
                    problem=j,
                    seed=seed,
                    recovery=s.error(beta[j]),
                    l1=float(np.abs(beta[j]).sum()),
                    half=float(np.sqrt(np.abs(beta[j])).sum()),
                )


def _write_errors(log: RunLog, name: str, truth: Array, path: Array, seed: int) -> None:
    for i, beta in enumerate(path):
        error = float(np.linalg.norm(beta - truth) / np.linalg.norm(truth))
        log.append(run=name, seed=seed, part=i / POINTS, sparse_error=error)


NET_TAU, NET_T, NET_EPS, NET_NOISE, NET_POINTS = 0.02, 200.0, 1e-4, 0.1, 8  # times of Adam and SGD, eps, √α, rows
LEVELS = 8  # of tr(H) at which two runs are compared


def _net_rules(config: Config) -> dict[str, tuple[UpdateRule, float]]:
    """Rules on the network, each with its √α; all take the same number of steps."""
    adam, sgd = ((until / config.net_steps) ** 0.5 for until in (NET_TAU, NET_T))
    return {
        ADAM: (Adam(adam, eps=NET_EPS), NET_NOISE),
        SGD: (GD(sgd), NET_NOISE),
        ADAM_HALF: (Adam(adam, eps=NET_EPS), NET_NOISE / 2),
        SGD_HALF: (GD(sgd), NET_NOISE / 2),
        EPS_RUN: (Adam(sgd * LARGE_EPS, eps=LARGE_EPS), NET_NOISE),
    }


def _network(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Train a network on 60 digits from one minimizer with each rule, and follow the flows from it."""
    log.resume()
    net = Network.on_digits(60, 16, seed)
    start = net.start(948, seed)
    rules, flows, found = _net_rules(config), {}, {}
    for name, until in ((ADAM, NET_TAU), (SGD, NET_T)):
        rule, noise = rules[name]
        flows[name] = net.flow(start, rule, noise**2, until, config.flow_steps)
        for i in range(0, config.flow_steps + 1, max(config.flow_steps // 25, 1)):
            log.append(run=f"network, {name}: flow", seed=seed, part=i / config.flow_steps, **net.row(flows[name][i]))
    for j, (name, (rule, noise)) in enumerate(rules.items()):
        progress((j + 1) / 6)
        deviation = noise * len(net.x) ** 0.5
        path = net.train(start, rule, config.net_steps, deviation, (949, seed, j), NET_POINTS)
        found[name] = [net.row(w) for w in path]
        for i, row in enumerate(found[name]):
            log.append(run=f"network, {name}", seed=seed, part=i / NET_POINTS, **row)
        if name in flows:
            log.append(run=f"network, {name}: end", seed=seed, **_distances(net, path[-1], name, flows))
    quarter = net.row(flows[SGD][config.flow_steps // 4])
    log.append(
        run="network: compared",
        seed=seed,
        adam=_at_equal_trace(found[ADAM], found[SGD]),
        large_eps=_at_equal_trace(found[EPS_RUN], found[SGD]),
        adam_half=found[ADAM_HALF][-1]["root_trace"] / found[ADAM][-1]["root_trace"],
        sgd_half=found[SGD_HALF][-1]["trace"] / quarter["trace"],
        sgd_full=found[SGD][-1]["trace"] / quarter["trace"],
    )


def _distances(net: Network, end: Tensor, name: str, flows: dict[str, Tensor]) -> dict[str, float]:
    """Distance of the outputs on test images from those of the flow's end, and of all of the other flow."""
    first, *targets = net.on_test(flows[SGD if name == ADAM else ADAM])
    last = net.on_test(end[None])[0]
    error = mismatch(last, net.on_test(flows[name][-1:])[0], first)
    nearest = min((last - target).norm() for target in targets) / (last - first).norm()
    return {"error": error, "nearest": float(nearest)}


def _at_equal_trace(rows: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    """Compare tr(D^½) of two runs at equal tr(H): a geometric mean over the last third of what both come through."""
    low, high = (choose(rows[at]["trace"], others[at]["trace"]) for at, choose in ((-1, max), (0, min)))
    levels = np.geomspace(low, low + (high - low) / 3, LEVELS)
    roots, other = (
        np.interp(-levels, [-row["trace"] for row in run], [row["root_trace"] for row in run]) for run in (rows, others)
    )
    return float(np.exp(np.log(roots / other).mean()))


STARTS = {name: run(f"{name}: starts") for name in (ADAM, SGD, ADAM_HALF, SGD_HALF, EPS_RUN)}
IDENTITIES, COMPARED = run("identities"), run("network: compared")
FINEST, COARSEST = (lambda rate: rate == rate.min()), (lambda rate: rate == rate.max())
FINE = STARTS[ADAM].where("rate", FINEST)


def _sparse_ratio(column: str, name: str, other: str) -> Quantity:
    """Median over problems of a column of one run over that of another."""
    return (run(name)[column] / run(other)[column]).median()


def _recovered(name: str) -> Quantity:
    """Part of the problems that are solved to a tenth."""
    return run(name)["recovery"].reduce(lambda v: np.mean(v <= 0.1))


CLAIMS = (
    *under(
        DATUM,
        identity(
            "The diagonal of the Hessian in closed form and by automatic derivatives (relative difference)",
            IDENTITIES["hessian_off"] <= 1e-10,
        ),
        identity(
            "Adam's flow in closed form and as projected drift, for eps → 0 (relative difference)",
            IDENTITIES["drift_off"] <= 1e-6,
        ),
        comparison(
            "Adam follows its flow at the smallest rate (mean distance of w² over distance moved, median)",
            FINE["error"].median() <= 0.15,
        ),
        scaling(
            "The smaller the rate, the nearer (distance at the smallest rate over that at the largest)",
            FINE["error"].median() / STARTS[ADAM].where("rate", COARSEST)["error"].median() <= 0.6,
        ),
        comparison("SGD follows its own flow (the same distance)", STARTS[SGD]["error"].median() <= 0.15),
        scaling(
            "With half the noise Adam follows the same flow at the same pace (the same distance)",
            STARTS[ADAM_HALF]["error"].median() <= 0.15,
        ),
        scaling(
            "With half the noise SGD follows its flow at a quarter of the pace (the same distance)",
            STARTS[SGD_HALF]["error"].median() <= 0.15,
        ),
        control(
            "And not at the full pace (the same distance)",
            STARTS[SGD_HALF]["full_pace"].median() >= 0.5,
        ),
        comparison(
            "Under Adam the weight that is largest at first gains from every start (its square over the first, least)",
            FINE["largest_gain"].min() >= 1.1,
        ),
        control(
            "Under SGD it does not (the same)",
            STARTS[SGD]["largest_gain"].min() <= 0.9,
        ),
        comparison(
            "Under SGD the flattest weight, that of the smallest x, gains from every start (the same)",
            STARTS[SGD]["flattest_gain"].min() >= 1.1,
        ),
        control("Under Adam it does not (the same)", FINE["flattest_gain"].min() <= 0.9),
        control(
            "Under Adam with eps far above √v it does, as under SGD (the same)",
            STARTS[EPS_RUN]["flattest_gain"].min() >= 1.1,
        ),
        comparison(
            "Adam reduces tr(Diag(H)^½) from every start (last over first, greatest)", FINE["root_change"].max() <= 0.95
        ),
        comparison(
            "Where the largest weight is the sharpest, Adam raises tr(H) (last over first)",
            FINE.where("start", lambda k: k == 0)["trace_change"] >= 1.1,
        ),
        control(
            "Adam is not on SGD's flow (least distance of its end, over distance moved, median)",
            FINE["nearest"].median() >= 0.3,
        ),
        control(
            "Nor SGD on Adam's (the same distance)",
            STARTS[SGD]["nearest"].median() >= 0.3,
        ),
        control(
            "Without noise on the labels gradient descent stays where it arrives (relative change of tr(H), greatest)",
            run("exact labels")["change"] <= 1e-6,
        ),
    ),
    *under(
        SPARSE,
        comparison(
            "In as many steps Adam comes nearer to the sparse solution (error over SGD's, median of the problems)",
            _sparse_ratio("recovery", ADAM, SGD) <= 0.5,
        ),
        comparison(
            "Its Σ√|β| is smaller (over SGD's, median)",
            _sparse_ratio("half", ADAM, SGD) <= 0.98,
        ),
        comparison(
            "SGD comes near the least ℓ₁ norm there is (its norm over the least, median)",
            _sparse_ratio("l1", SGD, "least ℓ₁").within(0.95, 1.1),
        ),
        control(
            "Where the solution is dense, Adam comes no nearer to it (error over SGD's, median)",
            _sparse_ratio("recovery", f"{ADAM}, dense", f"{SGD}, dense") >= 0.9,
        ),
        wider_claim(
            "Adam solves more problems than the least ℓ₁ norm, where SGD is going (difference of the fractions solved)",
            _recovered(ADAM) - _recovered("least ℓ₁") >= 0.05,
            note="Adam's measure has local minima, in which it stays; SGD's is convex, and SGD is only slow.",
        ),
    ),
    *under(
        NET,
        comparison(
            "Where tr(H) is the same, Adam's tr(Diag(H)^½) is smaller (over SGD's)",
            COMPARED["adam"] <= 0.95,
        ),
        control(
            "That of Adam with eps far above √v is not (over SGD's)",
            COMPARED["large_eps"] >= 0.97,
        ),
        comparison(
            "Adam ends where its flow does (outputs on test images: distance over distance moved)",
            run(f"network, {ADAM}: end")["error"] <= 0.3,
        ),
        comparison(
            "SGD ends where its own flow does (the same distance)",
            run(f"network, {SGD}: end")["error"] <= 0.3,
        ),
        scaling(
            "With half the noise Adam comes as far (tr(Diag(H)^½) over that with all of it)",
            COMPARED["adam_half"].within(0.9, 1.1),
        ),
        scaling(
            "With half the noise SGD comes a quarter as far (tr(H) over that of its flow then)",
            COMPARED["sgd_half"].within(0.9, 1.1),
        ),
        control("With all of it SGD is farther (the same ratio)", COMPARED["sgd_full"] <= 0.85),
        wider_claim(
            "Adam generalizes better here, too (test loss over SGD's)",
            run(f"network, {ADAM}")["test_loss"].last() / run(f"network, {SGD}")["test_loss"].last() <= 1,
            note="The abstract says so of sparse regression only.",
        ),
    ),
)

LABELS = {
    "part": "part of the way",
    "trace": "tr(H)",
    "root_trace": "tr(Diag(H)^½)",
    "sparse_error": "‖β - β*‖/‖β*‖",
    "rate": "learning rate",
    "error": "distance / distance moved",
    "test_loss": "test loss",
}
BOTH = (ADAM, SGD)

CHARTS = labelled(
    LABELS,
    *under(
        DATUM,
        Chart(
            "datum-trace",
            "SGD lowers the trace; Adam may raise it",
            x="part",
            y="trace",
            runs=(ADAM, f"{ADAM}: flow", SGD, f"{SGD}: flow"),
            repeats="first",
            rank=2,
            caption="One datum, from the start whose largest weight is the sharpest, with the flows beside.",
        ),
        Chart(
            "datum-root",
            "Both lower the roots",
            x="part",
            y="root_trace",
            runs=(ADAM, f"{ADAM}: flow", SGD, f"{SGD}: flow"),
            repeats="first",
            caption="The same runs.  Adam ends in a minimum of this measure, SGD in the least one.",
        ),
        Chart(
            "datum-error",
            "Distance from the flow",
            x="rate",
            y="error",
            runs=(f"{ADAM}: starts",),
            repeats="first",
            log="xy",
            markers=True,
            caption="Adam's weights, squared, against those of its flow, from all starts.",
        ),
    ),
    *under(
        SPARSE,
        Chart(
            "sparse-error",
            "Error of sparse regression",
            x="part",
            y="sparse_error",
            runs=tuple(f"sparse: {name}" for name in BOTH),
            repeats="first",
            log="y",
            rank=3,
            caption="10 equations, 20 unknowns, 3 of them not zero; one problem, equal numbers of steps.",
        ),
    ),
    *under(
        NET,
        Chart(
            "net-measures",
            "Two ways down on a network",
            x="trace",
            y="root_trace",
            runs=tuple(f"network, {name}{ending}" for name in BOTH for ending in ("", ": flow")),
            repeats="first",
            rank=1,
            caption="From the upper right, at minimizers.  At the same tr(H) Adam has the smaller tr(Diag(H)^½).",
        ),
        Chart(
            "net-test",
            "Test loss of the network",
            x="part",
            y="test_loss",
            runs=tuple(f"network, {name}" for name in BOTH),
            repeats="first",
            caption="Reported: here SGD's is the smaller one.",
        ),
    ),
)
