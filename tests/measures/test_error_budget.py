"""The parts of the error budget against problems in which each is known."""

import problems
import pytest
import torch
from problems import DTYPE, generator, normal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sharpscope import Objective, hessian
from sharpscope.measures import error_budget

P, N = 6, 400
SCALES = torch.tensor([2.0, 1.0, 0.8, 0.6, 0.5, 0.4])  # of the inputs: λ1 of unlimited data is 2 · 2² for the MSE


def regression(seed: int, n: int = N, batches: int = 8, dtype: torch.dtype = DTYPE) -> Objective:
    """Least squares: ``H = 2 XᵀX/n``."""
    net = nn.Linear(P, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        net.weight.zero_()
    x = normal(n, P, seed=seed) * SCALES
    return Objective(net, nn.functional.mse_loss, [(c.to(dtype), c[:, :1].to(dtype)) for c in x.chunk(batches)])


def test_the_sample_error_is_the_spread_over_samples() -> None:
    found = [error_budget(regression(seed)) for seed in range(100, 160)]
    seen = torch.tensor([b.sharpness for b in found])
    stated = torch.tensor([b.standard_error for b in found]).square().mean().sqrt()
    # The spread of 60 samples is known to 9 %, eight groups state theirs to 27 % each.
    assert 0.75 < stated / seen.std() < 1.3
    inside = sum(low <= 8 <= high for low, high in (b.interval for b in found))
    assert inside >= 54  # of 60 at 95 %: fewer happens once in 100


def test_the_bias_of_small_samples_is_seen_and_taken_off() -> None:
    """Equal scales: λ1 of few examples is far above that of unlimited data, which is 2."""
    found = []
    for seed in range(30):
        net = nn.Linear(20, 1, bias=False, dtype=DTYPE)
        x = normal(400, 20, seed=seed)
        found.append(error_budget(Objective(net, nn.functional.mse_loss, [(c, c[:, :1]) for c in x.chunk(8)])))
    pairs = [(b.sharpness, b.corrected) for b in found]
    raw, corrected = (torch.tensor(v).mean() for v in zip(*pairs, strict=True))
    assert raw > 2.6  # 2 (1 + √(20/400))² is 2.99 in high dimension
    assert abs(corrected - 2) < 0.4 * (raw - 2)


def test_a_small_subset_never_reads_lower_on_average() -> None:
    for seed in range(5):
        whole, halves, quarters = error_budget(regression(seed)).means.values()
        assert whole <= halves * (1 + 1e-9) and halves <= quarters * (1 + 1e-9)


def test_the_solver_error_is_an_error_bound() -> None:
    f = problems.objective("LayerNorm", "cross-entropy")
    true = torch.linalg.eigvalsh(hessian(f).dense())[-1].item()
    for rtol in (1e-1, 1e-2, 1e-4):
        found = error_budget(f, rtol=rtol)
        assert true - found.sharpness <= found.solver + 1e-12
    assert found.solver < 1e-6 * true


def test_rounding_is_that_of_single_precision() -> None:
    single, double = (error_budget(regression(0, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert single.rounding < 1e-5 * single.sharpness  # some eps of 1.2e-7
    assert double.rounding < 1e-13 * double.sharpness
    assert double.sharpness == pytest.approx(single.sharpness, abs=10 * single.rounding + 1e-5)


def test_rounding_accounts_for_the_distance_from_exact_arithmetic() -> None:
    for seed in range(10):
        f = regression(seed, dtype=torch.float32)
        x = torch.cat([batch for batch, _ in f.data]).double()
        exact = torch.linalg.eigvalsh(2 * x.T @ x / N)[-1].item()
        found = error_budget(f)
        # The quotient of the vector misses λ1 by solver; what float32 did to it is rounding, and nothing else is left.
        assert abs(found.sharpness - exact) <= found.solver + found.rounding + 1e-12
        assert abs(found.sharpness - exact) >= found.rounding - found.solver - 1e-12


def test_one_batch_is_cut_and_said_so() -> None:
    found = error_budget(regression(0, batches=1))
    assert "fewer than 4 batches" in found.note and found.note in str(found)
    assert found.groups == 8 and found.examples == N
    # The same examples dealt to batches beforehand give the same λ1, and about the same error.
    other = error_budget(regression(0, batches=8))
    assert other.note == "" and found.sharpness == pytest.approx(other.sharpness, rel=1e-8)
    assert found.standard_error == pytest.approx(other.standard_error, rel=1)


def test_batches_stay_whole_for_batch_normalization() -> None:
    f = Objective(
        problems.model("BatchNorm1d"), problems.LOSSES["MSE"].loss, problems.batches("BatchNorm1d", sizes=[8] * 6)
    )
    found = error_budget(f)
    whole, halves, quarters = found.means.values()
    assert found.note == "" and whole <= halves + 1e-9 and halves <= quarters + 1e-9
    assert found.groups == 6


def test_dictionaries_and_several_inputs_are_cut() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1, dtype=DTYPE)

        def forward(self, x: Tensor, y: Tensor, label: Tensor | None = None) -> Tensor:
            return self.layer(x + y)

    x, y = normal(12, 3, seed=1), normal(12, 1, seed=2)
    mse = nn.functional.mse_loss
    plain = error_budget(Objective(Two(), mse, [((x, x), y)]))
    named = error_budget(Objective(Two(), mse, [({"x": x, "y": x}, y)]))
    mapped = error_budget(Objective(Two(), lambda out, b: mse(out, b["label"]), [{"x": x, "y": x, "label": y}]))
    assert plain.standard_error == named.standard_error == mapped.standard_error > 0


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 examples; the data hold 3"):
        error_budget(regression(0, n=3, batches=1))


def test_the_advice_names_the_largest_error_and_the_means_against_it() -> None:
    assert "four times the" in error_budget(regression(0)).advice
    same = [(normal(9, 5, seed=1).float(), normal(9, 3, seed=2).float())] * 4
    f = Objective(problems.model("LayerNorm").float(), nn.functional.mse_loss, same)
    loose, tight = error_budget(f, rtol=0.2), error_budget(f, rtol=1e-6)
    assert loose.standard_error < 1e-5 * loose.sharpness and "lower rtol from 0.2 to 0.02" in loose.advice
    assert "float64" in tight.advice
    text = str(loose)
    for word in ("solver", "sample", "bias", "rounding", "unlimited data", loose.advice):
        assert word in text


def test_measuring_changes_nothing() -> None:
    torch.manual_seed(1)
    data = TensorDataset(normal(32, 5, seed=1).float(), normal(32, 3, seed=2).float())
    net = problems.model("BatchNorm1d").float()
    f = Objective(net, nn.functional.mse_loss, DataLoader(data, 8, shuffle=True, generator=generator(5)))
    state = {name: t.clone() for name, t in net.state_dict().items()}
    before = torch.get_rng_state()
    first, second = error_budget(f), error_budget(f)
    assert torch.get_rng_state().equal(before)
    assert all(t.equal(state[name]) for name, t in net.state_dict().items()) and net.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in net.parameters())
    assert first == second


def test_batch_normalization_is_given_two_examples_at_least() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = normal(12, 5, seed=0), normal(12, 1, seed=1)
    budget = error_budget(Objective(net, nn.functional.mse_loss, [(x, y)]))
    assert budget.groups == 6 and budget.standard_error > 0
    with pytest.raises(ValueError, match="cannot be cut into 4 parts"):
        error_budget(Objective(net, nn.functional.mse_loss, [(x[:6], y[:6])]))
    with pytest.raises(ValueError, match="needs more than one value per channel"):
        Objective(net, nn.functional.mse_loss, [(x[:1], y[:1])])
