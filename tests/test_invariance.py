"""`find_groups` names exactly the weights that may be rescaled."""

from collections.abc import Iterable
from typing import Any

import problems
import pytest
import torch
import torch.nn.functional as F
from problems import DTYPE, generator, normal
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sharpscope import Objective, ScaleGroups, find_groups
from sharpscope.invariance import EULER, rows
from sharpscope.studies import _nets

DATA = [(normal(n, 8, seed=10 + i), normal(n, 2, seed=20 + i)) for i, n in enumerate((16, 24))]
OWN = ("BN", "LN", "GN", "RMSNorm", "WN")
NATIVE = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(8),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "RMSNorm": lambda: nn.RMSNorm(8, eps=1e-5),
}


def objective(*layers: nn.Module, seed: int = 0, dtype: torch.dtype = DTYPE, gain: float = 1.0) -> Objective:
    """The layers in a row under mean squares, weights N(0, gain²/fan-in), vectors of order one."""
    net = nn.Sequential(*layers).to(dtype)
    g = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            spread = gain / p[0].numel() ** 0.5 if p.dim() > 1 else 0.5
            p.copy_(spread * torch.randn(p.shape, generator=g, dtype=DTYPE) + (0 if p.dim() > 1 else 0.3))
    return Objective(net, F.mse_loss, [(x.to(dtype), y.to(dtype)) for x, y in DATA])


def linear(inside: int, out: int, *, bias: bool = False) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        return nn.Linear(inside, out, bias=bias)


def own(norm: str, *, seed: int = 0, layers: int = 2) -> Objective:
    """Two (or more) normalized layers of our own and a trained readout."""
    g, parts = generator(seed), list[nn.Module]()
    for _ in range(layers):
        # Groups of four: standardizing a group of two leaves its signs alone, which have no gradient.
        make = _nets.GroupNorm(2) if norm == "GN" else _nets.NORMS[norm](8)
        parts += [_nets.Weights((8, 8), g, unit_rows=norm == "WN"), make, nn.Tanh()]
    return Objective(nn.Sequential(*parts, linear(8, 2).to(DTYPE)), F.mse_loss, DATA)


def joined(f: Objective, names: Iterable[str]) -> list[int]:
    return sorted(i for name in names for i in range(f.size)[f.slices[name]])


def assert_found(f: Objective, found: ScaleGroups, names: Iterable[str], null: Iterable[str] = ()) -> None:
    """Exactly these groups, their union as the joint group, defects on the right side of the bound."""
    assert set(found.groups) == set(names)
    for name, indices in found.groups.items():
        assert indices.tolist() == joined(f, [name])
    assert set(found.null) == set(null)
    assert found.joint.tolist() == joined(f, names)
    assert found.joint_defect <= EULER or not found.groups
    for name, defect in found.defects.items():
        assert (defect <= EULER) == (name in found.groups), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", OWN)
def test_weights_before_our_own_norms_and_not_the_readout(norm: str, seed: int) -> None:
    f = own(norm, seed=seed)
    found = find_groups(f)
    assert_found(f, found, ["0.weight", "3.weight"])
    assert max(found.defects[name] for name in found.groups) < 1e-12  # eps = 0: invariance is exact
    assert not found.covers(f.size)


@pytest.mark.parametrize("norm", OWN)
def test_rescaling_invariant_weights_changes_no_answer(norm: str) -> None:
    f = own(norm, layers=3)
    w = f.weights()
    for seed in range(5):
        factors = 10 ** (4 * torch.rand(3, generator=generator(seed)) - 2)  # 1e-2 to 1e2
        scaled = w.clone()
        for factor, name in zip(factors.tolist(), ("0.weight", "3.weight", "6.weight"), strict=True):
            scaled[f.slices[name]] *= factor
        assert_found(f, find_groups(f, scaled), ["0.weight", "3.weight", "6.weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", NATIVE)
def test_native_norms_with_gain_and_shift(norm: str, seed: int, dtype: torch.dtype) -> None:
    """Gain, shift and readout do not qualify; eps of 1e-5 beside variances of order one leaves a defect near 1e-5."""
    make = NATIVE[norm]
    f = objective(
        linear(8, 8), make(), nn.Tanh(), linear(8, 8), make(), nn.Tanh(), linear(8, 2), seed=seed, dtype=dtype
    )
    assert_found(f, find_groups(f), ["0.weight", "3.weight"])


@pytest.mark.parametrize("factor", [1.0, 100.0])
@pytest.mark.parametrize("norm", NATIVE)
def test_native_norms_of_larger_weights(norm: str, factor: float) -> None:
    f = objective(linear(8, 8), NATIVE[norm](), nn.Tanh(), linear(8, 2), gain=1.0)
    w = f.weights()
    w[f.slices["0.weight"]] *= factor
    assert_found(f, find_groups(f, w), ["0.weight"])


def test_native_weight_norm_is_invariant_in_its_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the readout's Euler cosine is small by chance, and must not drag the true group down with it."""
    monkeypatch.setattr("sharpscope.invariance.EULER", 5e-3)
    with torch.random.fork_rng(devices=[]):
        layers = weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 2)
    f = objective(*layers)
    found = find_groups(f)
    assert set(found.groups) == {"0.parametrizations.weight.original1"} and not found.null
    assert found.defects["2.weight"] < 5e-3


def test_a_normalized_readout_is_invariant_too_and_everything_is_one_sphere() -> None:
    norms = nn.BatchNorm1d(8, affine=False), nn.BatchNorm1d(2, affine=False)
    f = objective(linear(8, 8), norms[0], nn.Tanh(), linear(8, 2), norms[1])
    found = find_groups(f)
    assert_found(f, found, ["0.weight", "3.weight"])
    assert found.covers(f.size)


@pytest.mark.parametrize("affine", [True, False])
def test_biases_before_batch_normalization_are_null(affine: bool) -> None:
    norm = nn.BatchNorm1d(8, affine=affine)
    f = objective(linear(8, 8, bias=True), norm, nn.Tanh(), linear(8, 2, bias=True))
    assert_found(f, find_groups(f), ["0.weight"], null=["0.bias"])


@pytest.mark.parametrize("norm", ["LayerNorm", "GroupNorm", "RMSNorm"])
def test_weight_and_bias_before_a_norm_of_examples_are_invariant_as_a_pair(norm: str) -> None:
    f = objective(linear(8, 8, bias=True), NATIVE[norm](), nn.Tanh(), linear(8, 2, bias=True))
    found = find_groups(f)
    assert list(found.groups) == ["0.*"]
    assert found.groups["0.*"].tolist() == found.joint.tolist() == joined(f, ["0.weight", "0.bias"])
    assert found.defects["0.weight"] > EULER and found.defects["0.*"] <= EULER
    assert not found.null


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
@pytest.mark.parametrize("bias", [True, False])
def test_no_alarm_in_a_plain_net(activation: type[nn.Module], bias: bool, seed: int) -> None:
    f = objective(
        linear(8, 8, bias=bias), activation(), linear(8, 8, bias=bias), activation(), linear(8, 2, bias=bias), seed=seed
    )
    found = find_groups(f)
    assert_found(f, found, [])
    assert found.joint.numel() == 0 and found.joint_defect == 1.0


def test_batch_normalization_in_eval_mode_is_a_plain_net() -> None:
    f = objective(linear(8, 8), nn.BatchNorm1d(8).eval(), nn.Tanh(), linear(8, 2))
    assert_found(f, find_groups(f), [])


def test_many_weights_are_not_invariant_by_chance() -> None:
    """The cosine of two random directions among n is about 1/√n: with 1e5 weights below the bound by chance."""
    wide = normal(40, 300, seed=0)
    first, second = nn.utils.skip_init(nn.Linear, 300, 300, bias=False), nn.utils.skip_init(nn.Linear, 300, 2)
    net = nn.Sequential(first, nn.Tanh(), second).to(DTYPE)
    for seed in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator(seed), dtype=DTYPE) / 300**0.5)
        f = Objective(net, F.mse_loss, [(wide, normal(40, 2, seed=1))])
        assert not find_groups(f).groups


class Residual(nn.Module):
    """``norm(A x + relu(B x))``: neither map alone may be rescaled, both together may."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.readout = linear(8, 8), linear(8, 8), linear(8, 2)
        self.readout.requires_grad_(False)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.norm(self.a(x) + torch.relu(self.b(x)))))


def test_a_joint_group_of_weights_that_are_not_invariant_alone() -> None:
    f = objective(Residual())
    found = find_groups(f)
    assert not found.groups and not found.null
    assert found.joint.tolist() == list(range(f.size)) and found.covers(f.size)
    assert found.joint_defect <= EULER < min(found.defects.values())


@pytest.mark.parametrize("norm", ["BN", "WN"])
def test_rows_are_invariant_one_by_one_where_each_has_its_own_moments(norm: str) -> None:
    f = own(norm)
    found = find_groups(f, candidates=rows)
    assert set(found.groups) == {f"{layer}.weight[{i}]" for layer in (0, 3) for i in range(8)}
    assert found.joint.tolist() == joined(f, ["0.weight", "3.weight"])
    start = f.slices["3.weight"].start
    assert found.groups["3.weight[2]"].tolist() == list(range(start + 16, start + 24))


@pytest.mark.parametrize("norm", ["LN", "RMSNorm"])
def test_rows_are_not_invariant_one_by_one_where_they_share_moments(norm: str) -> None:
    assert not find_groups(own(norm), candidates=rows).groups


def test_images_and_filters() -> None:
    f = problems.objective("BatchNorm2d")
    assert_found(f, find_groups(f), ["0.weight"])
    assert set(find_groups(f, candidates=rows).groups) == {f"0.weight[{i}]" for i in range(4)}


def test_laws_of_the_groups_that_were_found() -> None:
    """Euler's relation, and gradients of degree -1, at the weights themselves."""
    f = own("BN")
    w = f.weights()
    g = f.grad(w)
    for indices in find_groups(f).groups.values():
        scaled = w.clone()
        scaled[indices] *= 3
        assert abs(w[indices] @ g[indices]) <= 1e-12 * w[indices].norm() * g[indices].norm()  # rounding
        assert problems.relative(3 * f.grad(scaled)[indices], g[indices]) < 1e-12
        assert f.value(scaled).item() == pytest.approx(f.value(w).item(), rel=1e-12)


def test_a_point_without_gradient_is_not_taken_for_invariant() -> None:
    """At an exact fit every gradient is zero: the answer comes from perturbed weights."""
    net: Any = nn.Sequential(linear(8, 8), nn.Tanh(), linear(8, 2)).to(DTYPE)
    with torch.no_grad():
        fit = [(x, net(x)) for x, _ in DATA]
    f = Objective(net, F.mse_loss, fit)
    assert f.grad(f.weights()).norm() == 0
    found = find_groups(f)
    assert not found.groups and not found.null and found.joint.numel() == 0


class SideBranch(nn.Module):
    """A residual stream with a weak branch that is blind to its scale: nearly invariant, but not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.readout = linear(8, 8), linear(8, 8), linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.readout(F.layer_norm(h + 0.05 * torch.tanh(self.branch(F.layer_norm(h, (8,)))), (8,)))


def test_nearly_is_not_invariant() -> None:
    found = find_groups(objective(SideBranch()))
    assert not found.groups
    assert 2e-3 < found.defects["0.stem.weight"] < 5e-3


def test_a_gradient_that_is_not_finite_is_no_answer() -> None:
    f = objective(linear(8, 2))
    with pytest.raises(ValueError, match="the gradient near these weights is not finite"):
        find_groups(f, f.weights() * float("inf"))
