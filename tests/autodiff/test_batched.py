"""Runs side by side are the runs one after another."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from sharpscope.autodiff.batched import BatchedRuns, gram, jacobian
from sharpscope.autodiff.objective import Objective
from sharpscope.errors import CannotTrace
from sharpscope.optimizers.adaptive import Adam, RMSprop
from sharpscope.optimizers.base import UpdateRule
from sharpscope.optimizers.descend import descend, noisy, on_batches, stacked
from sharpscope.optimizers.gd import GD
from sharpscope.optimizers.scalar import ScalarRMSprop

RUNS = 5


def network(norm: type[nn.Module] = nn.BatchNorm1d) -> Objective:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), norm(6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    return Objective(net, nn.functional.mse_loss, [(x[:8], x[:8, :2].sin()), (x[8:], x[8:, :2].sin())])


def starts(f: Objective) -> Tensor:
    return f.weights() + 0.3 * torch.randn(RUNS, f.size, dtype=torch.float64)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_every_row_is_the_objective_at_that_row(norm: type[nn.Module]) -> None:
    f = network(norm)
    W, V = starts(f), torch.randn(RUNS, f.size, dtype=torch.float64)
    before = {name: b.clone() for name, b in f.model.named_buffers()}
    together = BatchedRuns.of(f)
    together.check(W)
    losses, slopes = together.value_and_grad(W)
    products, dense = together.hvp(W, V), together.hessian(W)
    for r in range(RUNS):
        assert losses[r].item() == pytest.approx(f.value(W[r]).item(), rel=1e-13)
        assert torch.allclose(slopes[r], f.grad(W[r]), rtol=1e-11, atol=1e-13)
        assert torch.allclose(products[r], f.hvp(W[r], V[r]), rtol=1e-10, atol=1e-12)
        assert torch.allclose(dense[r] @ V[r], products[r], rtol=1e-10, atol=1e-12)
    assert torch.equal(together.value(W), losses)
    assert all(torch.equal(b, before[name]) for name, b in f.model.named_buffers())


RULES: dict[str, Sequence[UpdateRule]] = {
    "GD": [GD(0.05 * (r + 1), 1e-3 * r) for r in range(RUNS)],
    "heavy ball": [GD(0.02 * (r + 1), 1e-3 * r, momentum=0.8) for r in range(RUNS)],
    "Adam": [Adam(1e-2 * (r + 1)) for r in range(RUNS)],
    "AdamW": [Adam(1e-2 * (r + 1), weight_decay=0.1 * r, decoupled=True) for r in range(RUNS)],
    "RMSprop": [RMSprop(1e-3 * (r + 1)) for r in range(RUNS)],
}


@pytest.mark.parametrize("name", RULES)
def test_a_sweep_is_the_same_as_its_runs_one_after_another(name: str) -> None:
    """Same operations in another grouping: rounding, which 40 steps of these short runs hardly enlarge.

    Not with batch normalization: a bias before it has only rounding for a gradient, of which Adam makes whole steps.
    """
    f = network(nn.LayerNorm)
    W, rules = starts(f), RULES[name]
    swept = descend(BatchedRuns.of(f).slope, W, rules, 40)
    for r, rule in enumerate(rules):
        w, state = W[r], rule.init(W[r])
        for _ in range(40):
            w, state = rule.step(w, f.grad(w), state)
        assert torch.allclose(swept.weights[r], w, rtol=0, atol=1e-10)
        assert swept.losses[r].item() == pytest.approx(f.value(w).item(), rel=1e-9)
    assert swept.steps.tolist() == [40] * RUNS and not swept.diverged.any() and not swept.reached.any()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_a_recorded_slope_is_the_slope(norm: type[nn.Module]) -> None:
    f = network(norm)
    before = {name: b.clone() for name, b in f.model.named_buffers()}
    together = BatchedRuns.of(f)
    slope = together.recorded(starts(f))
    for _ in range(2):
        W = starts(f)
        for found, expected in zip(slope(W, 0), together.slope(W), strict=True):
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(b, before[name]) for name, b in f.model.named_buffers())


def test_what_changes_from_call_to_call_is_not_recorded() -> None:
    count = iter(range(100))
    changing = BatchedRuns(lambda W: next(count) * W.square().sum(1))
    with pytest.raises(CannotTrace, match="other numbers"):
        changing.recorded(torch.ones(2, 3))
    branching = BatchedRuns(lambda W: W.sum(1) if W.sum() > 0 else -W.sum(1))
    with pytest.raises(CannotTrace, match="no fixed program"):
        branching.recorded(torch.ones(2, 3))


def bowls(curvature: Sequence[float]) -> BatchedRuns:
    c = torch.tensor(curvature, dtype=torch.float64)
    return BatchedRuns(lambda W: 0.5 * c * W.square().sum(1))


def test_a_run_ends_where_it_arrives_and_the_others_go_on() -> None:
    """``w ← (1 - lr·c) w`` from 1: loss ``c/2 (1 - lr·c)^2t``; beyond lr·c = 2 it grows."""
    seen: list[list[float]] = []
    rules = [GD(0.1), GD(0.5), GD(2.5)]
    found = descend(
        bowls([1, 1, 1]).slope,
        torch.ones(3, 1, dtype=torch.float64),
        rules,
        100,
        until=lambda loss: loss < 1e-3,
        watch=lambda t, W, loss, g: seen.append(W[:, 0].tolist()),
        limit=1e4,
    )
    assert found.reached.tolist() == [True, True, False] and found.diverged.tolist() == [False, False, True]
    assert found.steps.tolist() == [30, 5, 23]  # .9^60/2 < 1e-3, .5^10/2 < 1e-3, 1.5^23 > 1e4
    assert found.weights[:2, 0].tolist() == pytest.approx([0.9**30, 0.5**5], rel=1e-12)
    assert len(seen) == 31 and seen[0] == [1, 1, 1]
    assert all(row[1] == seen[5][1] for row in seen[5:])


def test_a_loss_that_is_not_a_number_is_divergence() -> None:
    f = BatchedRuns(lambda W: W[:, 0].log())
    found = descend(f.slope, torch.tensor([[1.0], [1e3]], dtype=torch.float64), GD(2.0), 3)
    assert found.diverged.tolist() == [True, False]


def test_noise_and_batches_come_from_their_seeds() -> None:
    f = bowls([0, 0])
    W = torch.zeros(2, 400, dtype=torch.float64)
    ends = [descend(noisy(f.slope, torch.tensor([[1.0], [3.0]]), seed), W, GD(0.5), 16).weights for seed in (1, 1, 2)]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    spread = ends[0].std(1) / (0.5 * 16**0.5)  # 400 draws: 3.5 % a standard error
    assert spread.tolist() == pytest.approx([1, 3], rel=0.15)
    net = network(nn.LayerNorm)
    x = torch.randn(12, 4, dtype=torch.float64)
    y = x[:, :2]
    slope = on_batches(net, x, y, 4, seed=0)
    W = starts(net)
    mean = torch.stack([slope(W, t)[1] for t in range(3)]).mean(0)  # an epoch: every example once
    assert torch.allclose(mean, BatchedRuns.of(net.on([(x, y)])).grad(W), rtol=1e-10, atol=1e-13)


def test_jacobian_and_kernel_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    a = torch.randn(3, 4, dtype=torch.float64)

    def outputs(X: Tensor) -> Tensor:
        return torch.tanh(X @ a.T) * X.square().sum(1, keepdim=True)

    X = torch.randn(6, 4, dtype=torch.float64)
    J = jacobian(outputs, X)
    for r in range(6):
        alone = torch.autograd.functional.jacobian(lambda x: outputs(x[None])[0], X[r])
        assert torch.allclose(J[r], alone, rtol=1e-12, atol=1e-14)
    rates = torch.rand(4, dtype=torch.float64)
    assert torch.allclose(gram(outputs, X, rates), torch.einsum("rip,p,rjp->rij", J, rates, J), rtol=1e-12)


def test_what_mixes_runs_is_refused() -> None:
    W = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="when the others were moved"):
        BatchedRuns(lambda W: (W - W.mean(0)).square().sum(1)).check(W)
    with pytest.raises(ValueError, match=r"losses of shape \(2, 3\)"):
        BatchedRuns(lambda W: W).check(W)
    with pytest.raises(ValueError, match="ScalarRMSprop mixes the runs"):
        descend(bowls([1, 2]).slope, W, ScalarRMSprop(0.1, 0.9, 1.0), 2)
    with pytest.raises(ValueError, match="momentum is"):
        stacked([GD(0.1), GD(0.1, momentum=0.5)], W)
    with pytest.raises(TypeError, match="one kind of rule; got Adam, GD"):
        stacked([GD(0.1), Adam(0.1)], W)
    with pytest.raises(ValueError, match="1 rules for 2 runs"):
        stacked([GD(0.1)], W)
    rule = ScalarRMSprop(0.1, 0.9, 1.0)
    with pytest.raises(TypeError, match="ScalarRMSprop takes one learning rate for all runs; define step_with"):
        rule.step_with(W, W, rule.init(W), learning_rate=W[:, :1], weight_decay=0.0)
