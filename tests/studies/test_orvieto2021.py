"""Random deep networks: their laws by other ways, and what the study counts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2

from sharpscope.autodiff.batched import BatchedRuns
from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog
from sharpscope.studies._shared.deep import Stack, largest_curvature, losses
from sharpscope.studies._shared.streams import stream
from sharpscope.studies.orvieto2021 import QUICK, RATES, Config, jobs
from sharpscope.studies.orvieto2021.normalized_gd import NormalizedGD
from sharpscope.studies.orvieto2021.starts import chain_derivatives, chain_losses, forward, law, sample


@pytest.mark.parametrize("depth", [2, 5, 12])
def test_derivatives_of_a_chain_in_closed_form(depth: int) -> None:
    W = torch.randn(6, depth, generator=torch.Generator().manual_seed(depth), dtype=torch.float64)
    f, slope, H = chain_derivatives(W)
    automatic = BatchedRuns(chain_losses)
    assert torch.allclose(automatic.value(W), 0.5 * (f - 1).square(), rtol=1e-12)
    assert torch.allclose(automatic.grad(W), (f - 1)[:, None] * slope, rtol=1e-10)
    assert torch.allclose(automatic.hessian(W), H, rtol=1e-9, atol=1e-12)


def test_a_typical_chain_is_far_below_the_mean() -> None:
    """E f² = 1, and log|f| has mean -(γ + ln 2)/2 a layer: 20000 draws of 16 layers, standard error .03."""
    W = torch.randn(20000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logs = W.abs().log().sum(1)
    assert logs.mean().item() == pytest.approx(-16 * (np.euler_gamma + np.log(2)) / 2, abs=0.15)
    assert logs.median().item() < -9


@pytest.mark.parametrize("d", [4, 16, 64])
def test_the_law_of_a_layer_is_that_of_its_density(d: int) -> None:
    """Mean and variance of log Y by adding up χ² densities over a fine grid, in place of ψ and its derivative."""
    u = np.linspace(-40, 8, 20_001)
    p = binom.pmf(np.arange(1, d + 1), d, 0.5) / (1 - 0.5**d)
    density = sum(w * chi2.pdf(np.exp(u), k) * np.exp(u) for k, w in enumerate(p, 1))
    mean = float((density * (u + np.log(2 / d))).sum() * (u[1] - u[0]))
    square = float((density * (u + np.log(2 / d)) ** 2).sum() * (u[1] - u[0]))
    first, second = law(d)
    assert first == pytest.approx(d * mean, rel=1e-5) and second == pytest.approx(d * (square - mean**2), rel=1e-4)
    if d == 64:
        assert first == pytest.approx(-2.567, abs=1e-3) and second == pytest.approx(5.31, abs=0.01)


def test_networks_follow_the_law_without_matrices() -> None:
    """Width 8, 4 layers, 4000 of each: means within 4 standard errors, as many dead ones."""
    stack = Stack(8, 8, 4)
    x = torch.ones(1, 8, dtype=torch.float64) / 8**0.5
    sizes = stack(stack.draw(4000, [1]), x)[:, 0].square().sum(1)
    logs = sizes[sizes > 0].log().numpy()
    other = forward(8, (4,), 4000, np.random.default_rng(1))[4]
    dead = 1 - (1 - 0.5**8) ** 4
    assert (sizes == 0).double().mean().item() == pytest.approx(dead, abs=4 * (dead / 4000) ** 0.5)
    other = other[np.isfinite(other)]
    error = np.sqrt(logs.var() / len(logs) + other.var() / len(other))
    assert abs(logs.mean() - other.mean()) < 4 * error


def test_largest_eigenvalue_of_the_hidden_weights_is_that_of_the_dense_hessian() -> None:
    x, y = sample(0)
    stack = Stack(8, 4, 3, 1)
    f = BatchedRuns(lambda W: losses(stack, x, y, W))
    w = stack.draw(1, [2])
    dense = f.hessian(w)[0][:-4, :-4]
    assert largest_curvature(f, w[0], 4) == pytest.approx(torch.linalg.eigvalsh(dense).abs().max().item(), rel=0.02)


def test_dead_networks_and_single_draws_are_data(tmp_path: Path) -> None:
    """One network in five of width 8 and 64 layers is dead, that of seed 2 is: the log of its curvature is empty."""
    config = replace(QUICK, chains=1, nets=1, seed=2)
    for job in jobs(config):
        if job.name in ("chains, seed 2", "d = 8, seed 2"):
            job.work(RunLog(tmp_path, job.name), lambda share: None, **job.arguments)
    rows = RunLog(tmp_path, "d = 8, seed 2").rows
    assert [row["depth"] for row in rows if row["curvature"] is not None] == [8, 16, 32]
    assert rows[-1]["depth"] == 64 and rows[-1]["middle"] == 0
    size = History(RunLog(tmp_path, "chains, seed 2").rows).series("chain, largest |λ|", "size")
    assert len(size) == 6 and np.isfinite(size).all()


def test_chains_escape_under_every_method(tmp_path: Path) -> None:
    """Runs side by side that differ in their learning rates, for each rule of the study."""
    (job,) = [job for job in jobs(replace(QUICK, steps=60)) if job.name == "escape, L = 4, seed 0"]
    log = RunLog(tmp_path, job.name)
    job.work(log, lambda fraction: None, **job.arguments)
    rows = {row["run"]: row for row in log.rows}
    assert rows.keys() == set(RATES) and rows["normalized GD"]["escaped"] > 0.5


def test_normalized_steps_have_one_length_in_every_row() -> None:
    W, g = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    new, _ = NormalizedGD(0.3).step(W, g, {})
    assert (new - W).norm(dim=1).tolist() == pytest.approx([0.3] * 3)
    assert torch.equal(NormalizedGD(0.3).step(W, torch.zeros_like(g), {})[0], W)


def test_the_same_seeds_are_the_same_start() -> None:
    stack = Stack(3, 4, 2, 1)
    assert torch.equal(stack.draw(2, [5, 1]), stack.draw(2, [5, 1]))
    assert torch.equal(2 * stack.draw(2, [5, 1]), stack.draw(2, [5, 1], gain=2))
    assert stream(5, 1).initial_seed() != stream(5, 2).initial_seed()


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="chains is 0; it must be positive"):
        Config(chains=0)
    names = {job.name for job in jobs(QUICK)}
    assert {f"escape, L = {L}, seed 0" for L in (8, 16)} <= names and set(RATES) == {"GD", "Adam", "normalized GD"}
