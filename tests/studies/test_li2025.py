"""Adam's form of sharpness: drifts and measures against automatic derivatives and ensembles, steps against torch's."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import hessian, jacrev

from sharpscope.optimizers.adaptive import Adam
from sharpscope.optimizers.gd import GD
from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog
from sharpscope.studies import li2025 as study
from sharpscope.studies.li2025 import EPS, QUICK, Config, X, _at_equal_trace, jobs
from sharpscope.studies.li2025.network import Network, mismatch
from sharpscope.studies.li2025.slow import Array, drift, root_trace, step_sizes
from sharpscope.studies.li2025.squares import Squares, dense_start, one_datum, product, sensing

RULES = (GD(1.0), Adam(1.0, eps=EPS))
ALPHA = 0.01


def small_sensing() -> tuple[Squares, np.ndarray]:
    problem, known = sensing(3, 6, 2, 2, seed=0)
    return problem, dense_start(known, seed=0)


def test_starts_are_minimizers_and_their_curvature_that_of_the_dense_hessian() -> None:
    for problem, start in (small_sensing(), one_datum(X, 2, seed=0)):
        W = torch.as_tensor(start)
        assert problem.losses(W).max() < 1e-25
        for k in range(2):
            dense = hessian(lambda w, k=k, p=problem: p.losses(w.expand(2, -1))[k])(W[k])
            torch.testing.assert_close(
                torch.as_tensor(problem.curvature(start)[k]), dense.diagonal(), rtol=1e-10, atol=0
            )
    problem, known = sensing(3, 6, 2, 2, seed=0)
    beta = product(dense_start(known, seed=0))
    assert beta == pytest.approx(np.array([np.linalg.pinv(s.a) @ s.a @ s.truth for s in known]), abs=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_the_drift_is_the_projected_gradient_of_the_frozen_trace(rule: GD | Adam) -> None:
    problem, start = small_sensing()
    w, b = torch.as_tensor(start[0]), problem.b[0]
    J = (2 * b * w).numpy()
    S = torch.as_tensor(step_sizes(J, ALPHA, rule))
    trace = jacrev(lambda w: (S * ((2 * b * w).square().mean(0))).sum())(w).numpy()
    velocity = drift(J, ALPHA, rule, lambda S: 8 * S * problem.squares[0] * start[0])
    assert np.abs(J @ velocity).max() <= 1e-10 * np.abs(velocity).max()  # along the minimizers
    rest = velocity + ALPHA / 4 * S.numpy() * trace  # and what is missing is normal to them in the metric 1/S
    fitted = (S.numpy()[:, None] * J.T) @ np.linalg.lstsq(S.numpy()[:, None] * J.T, rest, rcond=None)[0]
    assert fitted == pytest.approx(rest, abs=1e-9 * np.abs(velocity).max())


def test_adam_s_flow_lowers_the_roots_at_a_pace_free_of_the_noise() -> None:
    problem, start = small_sensing()
    at = np.linspace(0, 0.02, 5)
    paths = [problem.flow(0, start[0], Adam(1.0, eps=1e-9), alpha, at) for alpha in (0.01, 0.04)]
    assert paths[0] == pytest.approx(paths[1], rel=1e-4)
    assert (np.diff(root_trace(problem.curvature(paths[0][:, None].repeat(2, 1)))[:, 0]) < 0).all()
    slow, fast = (problem.flow(0, start[0], GD(1.0), alpha, at * 100) for alpha in (0.01, 0.04))
    assert slow[4] == pytest.approx(fast[1], rel=1e-5)


@pytest.mark.parametrize("rule", [GD(0.02), Adam(0.02, eps=EPS)], ids=lambda rule: type(rule).__name__)
def test_a_step_is_one_of_torch_s_optimizers_on_noisy_labels(rule: GD | Adam) -> None:
    problem, start = small_sensing()
    states = problem.descend(torch.as_tensor(start), rule, 4, 0.3, (1, 2), points=4)
    noise = 0.3 * torch.randn(500, 2, 3, generator=torch_stream(1, 2), dtype=torch.float64)
    w = torch.nn.Parameter(torch.as_tensor(start))
    known = torch.optim.SGD([w], lr=0.02) if isinstance(rule, GD) else torch.optim.Adam([w], lr=0.02, eps=EPS)
    for t in range(4):
        assert states[t] == pytest.approx(w.detach().numpy(), rel=1e-12)
        known.zero_grad()
        (0.5 * (problem.residuals(w) + noise[t]).square().mean(1)).sum().backward()
        known.step()


def torch_stream(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def test_sgd_scatters_and_drifts_as_derived() -> None:
    """Mean over many chains of one datum: ⟨δδᵀ⟩ = αη/2 on the normal, and the flow along the minimizers."""
    problem, start = one_datum(X, 1, seed=3)
    many, rule, tau = replace(problem, y=torch.ones(4000, 1, dtype=torch.float64)), GD(0.02), 8.0
    W = torch.as_tensor(start).expand(4000, -1).clone()
    end = many.descend(W, rule, round(tau / rule.learning_rate**2 / 100), 0.1, (4,), 1)[-1]
    r = many.residuals(torch.as_tensor(end)).numpy()
    curvature = problem.curvature(start).sum()
    assert np.mean(r**2) == pytest.approx(ALPHA * rule.learning_rate / 2 * curvature, rel=0.15)  # corrections ~ ηλ/2
    end_of_flow = problem.flow(0, start[0], rule, ALPHA, np.array([0, tau / 100]))[-1]
    moved = np.square(end).mean(0) - np.square(start[0])
    assert moved == pytest.approx(np.square(end_of_flow) - np.square(start[0]), abs=3e-3)  # 0.02/√4000, and scatter


def _always(known: Array, S: Array) -> Array:
    return known


def test_the_drift_of_a_network_is_the_gradient_of_the_trace() -> None:
    net = Network.on_digits(6, 3, seed=0)
    w = net.start(5)
    assert net.losses(w[None], net.y[None]).item() <= 1e-14
    J = jacrev(lambda w: net.stack(w[None], net.x)[0, :, 0])
    D = J(w).square().mean(0)
    assert net.curvature(w) == pytest.approx(D.numpy(), rel=1e-9, abs=1e-18)
    for rule in RULES:
        S = torch.as_tensor(step_sizes(J(w).numpy(), ALPHA, rule))
        known = (J(w)[:, :, None] * jacrev(J)(w)).mul(2).mean(0).T.matmul(S).numpy()  # of Σ_i S_i mean_k J_ki²
        expected = drift(J(w).numpy(), ALPHA, rule, partial(_always, known))
        assert net.field(w, rule, ALPHA).numpy() == pytest.approx(expected, rel=1e-6, abs=1e-9 * np.abs(expected).max())


def test_a_flow_of_a_network_stays_at_zero_loss() -> None:
    net = Network.on_digits(6, 3, seed=0)
    path = net.flow(net.start(5), GD(1.0), ALPHA, 20.0, 10)
    losses = net.clean().value(path[-1:]).item()
    assert losses < 1e-6 and net.row(path[-1])["trace"] < net.row(path[0])["trace"]
    assert mismatch(path[-1], path[-1], path[0]) == 0 and mismatch(path[0], path[-1], path[0]) == 1


def test_measures_are_compared_at_the_same_trace() -> None:
    rows = [{"trace": t, "root_trace": r} for t, r in ((4.0, 8.0), (2.0, 2.0))]
    others = [{"trace": t, "root_trace": r} for t, r in ((4.0, 8.0), (3.0, 6.0))]
    levels = np.geomspace(3, 3 + 1 / 3, 8)  # the last third of 3 to 4: roots are 3 t - 4 and 2 t there
    assert _at_equal_trace(rows, others) == pytest.approx(np.exp(np.log((3 * levels - 4) / (2 * levels)).mean()))


def test_jobs_write_every_column_that_claims_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Network.on_digits(6, 3, 0)
    monkeypatch.setattr(Network, "on_digits", lambda *sizes: small)
    for name, value in {"NET_TAU": 1e-5, "NET_T": 0.1, "NET_POINTS": 1, "POINTS": 4}.items():
        monkeypatch.setattr(study, name, value)
    config = replace(QUICK, starts=2, rates=(0.04, 0.03, 0.02), problems=2, sparse_steps=40, net_steps=4, flow_steps=4)
    rows = []
    for job in jobs(config):
        if job.name.startswith("one datum"):
            continue  # its SGD takes tens of thousands of steps
        log = RunLog(tmp_path, job.name)
        job.work(log, lambda fraction: None, **job.arguments)
        rows += [{"run": job.name, **row} for row in log.rows]
    history = History(rows)
    for claim in study.CLAIMS:
        if set(claim.runs) <= set(history.runs):
            assert np.isfinite(claim.decide("li2025", history, config).observed), claim.sentence


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="problems is 0; it must be positive"):
        Config(problems=0)
