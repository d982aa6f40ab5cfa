"""`find_groups` names exactly the weights that may be rescaled."""

from collections.abc import Iterable
from typing import Any

import architectures
import problems
import pytest
import torch
import torch.nn.functional as F
from architectures import INVARIANT, PLAIN, Architecture, SideBranch
from problems import DTYPE, generator, normal
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

from sharpscope import Objective, find_groups, make_scale_invariant
from sharpscope.studies._shared import nets
from sharpscope.symmetry import ScaleGroups
from sharpscope.symmetry.candidates import columns, rows
from sharpscope.symmetry.scale_groups import EULER

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
        make = nets.GroupNorm(2) if norm == "GN" else nets.NORMS[norm](8)
        parts += [nets.Weights((8, 8), g, unit_rows=norm == "WN"), make, nn.Tanh()]
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


def test_native_weight_norm_is_invariant_in_its_directions() -> None:
    with torch.random.fork_rng(devices=[]):
        layers = weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 2)
    found = find_groups(objective(*layers))
    assert set(found.groups) == {"0.parametrizations.weight.original1"} and not found.null


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


@pytest.mark.parametrize(
    ("activation", "seed", "expected"), [(nn.GELU, 4, []), (nn.SiLU, 3, []), (nn.ReLU, 4, ["0.*"])]
)
def test_activations_that_are_homogeneous_from_afar_are_no_eps(
    activation: type[nn.Module], seed: int, expected: list[str]
) -> None:
    """Before a norm, GELU(c x) / c is a rectifier for large c, and the Euler cosine falls like 1/c² on average.

    With these seeds it fell fast enough between the weights and 300 times the weights.
    """
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(32, 32), activation(), nn.LayerNorm(32), nn.Linear(32, 40)).double()
    x, labels = torch.randn(400, 32), torch.randint(40, (400,))
    f = Objective(net, F.cross_entropy, [(F.layer_norm(x.double(), (32,)), labels)])
    assert list(find_groups(f).groups) == expected


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
    assert list(found.groups) == ["0.a.weight + 0.b.weight"] and not found.null
    assert found.joint.tolist() == list(range(f.size)) and found.covers(f.size)
    assert found.joint_defect <= EULER < min(found.defects["0.a.weight"], found.defects["0.b.weight"])


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


def test_nearly_is_not_invariant() -> None:
    """Smaller than many defects that eps leaves, but it falls like 1/c and not like 1/c²."""
    found = find_groups(objective(SideBranch(1e-3)))
    assert not found.groups
    assert 1e-6 < found.defects["0.stem.weight"] < 5e-4


class DeepStem(nn.Module):
    """A side branch beside two maps that act as one: rescaling both makes it vanish like 1/c²."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.first, self.second, self.branch, self.readout = linear(8, 8), linear(8, 8), linear(8, 8), linear(8, 2)
        self.level = level

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.relu(self.first(x)))
        return self.readout(F.layer_norm(h + self.level * torch.tanh(self.branch(F.layer_norm(h, (8,)))), (8,)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("level", [1e-1, 1e-2, 1e-3])
def test_two_maps_beside_a_weak_branch_are_not_invariant(level: float, seed: int) -> None:
    assert not find_groups(objective(DeepStem(level), seed=seed)).groups


def test_a_gradient_that_is_not_finite_is_no_answer() -> None:
    f = objective(linear(8, 2))
    with pytest.raises(ValueError, match="the gradient near these weights is not finite"):
        find_groups(f, f.weights() * float("inf"))


ALL = INVARIANT | PLAIN


def assert_exact(a: Architecture, f: Objective, found: ScaleGroups) -> None:
    """No miss and no false alarm, in groups and null parameters; all pairs that were worked out by hand."""
    groups = {tuple(sorted(i.tolist())): name for name, i in found.groups.items()}
    expected = {architectures.indices(f, names): names for names in a.groups}
    missed = [names for i, names in expected.items() if i not in groups]
    alarms = [name for i, name in groups.items() if i not in expected]
    assert not missed and not alarms
    assert {tuple(i.tolist()) for i in found.null.values()} == {architectures.indices(f, (name,)) for name in a.null}
    assert found.joint.tolist() == sorted(i for g in expected for i in g)
    assert set(a.pairs) <= set(found.pairs)


def test_there_are_enough_architectures() -> None:
    assert len(INVARIANT) >= 25 and all(a.groups for a in INVARIANT.values())
    assert len(PLAIN) >= 10 and not any(a.groups for a in PLAIN.values())


@pytest.mark.parametrize("fresh", [False, True], ids=["random", "fresh"])
@pytest.mark.parametrize("name", ALL)
def test_groups_are_exact(name: str, fresh: bool) -> None:
    """At random weights, and as they come from the constructor (zero gains, layer scales of 1e-6, zero biases).

    The cost is about a dozen gradients, and two for each tensor that is not invariant on its own.
    """
    f = ALL[name].objective(fresh=fresh)
    found = find_groups(f)
    assert_exact(ALL[name], f, found)
    others = [n for n in f.slices if n not in found.groups and n not in found.null]
    assert found.num_gradients <= 12 + 2 * len(others)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("name", INVARIANT)
def test_groups_are_exact_after_rescaling_each_by_up_to_a_thousand(name: str, dtype: torch.dtype) -> None:
    """Also where the variance falls far below eps: that is a defect at these weights, not a property of the network."""
    a = INVARIANT[name]
    f = a.objective(seed=1, dtype=dtype)
    w, g = f.weights(), generator(5)
    for names in a.groups:
        w[list(architectures.indices(f, names))] *= 10 ** (6 * torch.rand(1, generator=g).item() - 3)
    assert_exact(a, f, find_groups(f, w))


@pytest.mark.parametrize("name", [*PLAIN, "Llama", "ResNet with zero gains"])
def test_groups_are_exact_in_single_precision_and_nothing_is_touched(name: str) -> None:
    f = ALL[name].objective(seed=1, dtype=torch.float32)
    before, random = {n: t.clone() for n, t in f.model.state_dict().items()}, torch.get_rng_state()
    assert_exact(ALL[name], f, find_groups(f))
    after = f.model.state_dict()
    assert all(torch.equal(t, after[n]) and t.dtype == after[n].dtype for n, t in before.items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in f.model.parameters())


class CastingNorm(nn.Module):
    """Root mean squares in single precision, whatever the input is, as language models have it."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("seed", range(3))
def test_rounding_inside_the_model_is_noticed(seed: int) -> None:
    f = objective(linear(8, 8), CastingNorm(), nn.Tanh(), linear(8, 2), seed=seed, dtype=torch.float32)
    assert_found(f, find_groups(f), ["0.weight"])


class InsistsOnSingle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            raise TypeError("single precision only")
        return F.layer_norm(x, (8,))


@pytest.mark.parametrize("seed", range(3))
def test_single_precision_has_to_do_where_double_is_refused(seed: int) -> None:
    f = objective(linear(8, 8), InsistsOnSingle(), nn.Tanh(), linear(8, 2), seed=seed, dtype=torch.float32)
    assert_found(f, find_groups(f), ["0.weight"])


def test_an_eps_is_a_defect_of_the_weights_as_they_are() -> None:
    """``eps/(q + eps)`` with variances q ~ c²: the Euler cosine falls like 1/c², and is of order one far below eps."""
    f = objective(linear(8, 8), nn.LayerNorm(8, eps=1e-5), nn.Tanh(), linear(8, 2))
    defects = {}
    for c in (1.0, 1e-1, 1e-2, 1e-4):
        w = f.weights()
        w[f.slices["0.weight"]] *= c
        found = find_groups(f, w)
        assert set(found.groups) == {"0.weight"}
        defects[c] = found.defects["0.weight"]
        assert found.joint_defect == defects[c]
        assert (found.broken == ["0.weight"]) == (defects[c] > EULER)
        assert ("0.weight has met an eps" in str(found)) == (defects[c] > EULER)
    assert defects[1e-1] / defects[1.0] == pytest.approx(100, rel=0.1)  # to first order in eps/q
    assert defects[1.0] < 1e-4 and defects[1e-4] > EULER


def test_an_eps_beyond_weights_of_ordinary_size_is_no_invariance() -> None:
    """Inputs of 1e-3 under an eps of 1e-5: at no ordinary size of the weights does the normalization act."""
    f = objective(linear(8, 8), nn.LayerNorm(8), nn.Tanh(), linear(8, 2))
    small = f.on([(1e-3 * x, y) for x, y in DATA])
    found = find_groups(small)
    assert not found.groups and found.defects["0.weight"] > 0.1


def rescaled(f: Objective, found: ScaleGroups, name: str) -> list[int]:
    """Indices behind one side of a pair: a part, a module's tensors, some rows of these, a rest, or several."""
    if " + " in name:
        return [i for one in name.split(" + ") for i in rescaled(f, found, one)]
    module, star, rows_of = name.partition(".*")
    taken = {i for part in (*found.groups.values(), *found.null.values()) for i in part.tolist()}
    if star:
        own = [n for n in f.slices if n.rpartition(".")[0] == module]
        return [i for n in own for i in architectures.part(f, n + rows_of) if i not in taken]
    return [i for i in architectures.part(f, name.removesuffix(" (rest)")) if i not in taken or "(" not in name]


PAIRED = ("pre-LN transformer of torch", "Llama", "ConvNeXt", "normalized queries and keys in one tensor")


@pytest.mark.parametrize("name", ["rectifiers", "linear", "transformer without norm", *PAIRED])
def test_pairs_may_be_rescaled_by_c_and_its_inverse(name: str) -> None:
    f = ALL[name].objective()
    found, w = find_groups(f), f.weights()
    assert found.pairs and max(found.pairs.values()) < 1e-10
    for pair in found.pairs:
        moved = w.clone()
        for part, c in zip(pair.split(" -> "), (3, 1 / 3), strict=True):
            moved[rescaled(f, found, part)] *= c
        assert f.value(moved).item() == pytest.approx(f.value(w).item(), rel=1e-9), pair


def test_null_parameters_may_be_anything() -> None:
    f = INVARIANT["vision transformer"].objective()
    found, w = find_groups(f), f.weights()
    assert list(found.null) == ["a.attention.mha.in_proj_bias[8:16]"]
    moved = w.clone()
    moved[found.null["a.attention.mha.in_proj_bias[8:16]"]] += 5 * normal(8, seed=3)
    assert f.value(moved).item() == pytest.approx(f.value(w).item(), rel=1e-12)


def test_a_loader_is_left_as_it_was() -> None:
    f = INVARIANT["pre-LN transformer"].objective()
    examples, own = TensorDataset(*(torch.cat(x) for x in zip(*architectures.SERIES, strict=True))), generator(3)
    loader = DataLoader(examples, batch_size=6, shuffle=True, generator=own)
    before, random = own.get_state(), torch.get_rng_state()
    g = Objective(f.model, f.loss, loader)
    assert_exact(INVARIANT["pre-LN transformer"], g, find_groups(g))
    assert torch.equal(before, own.get_state()) and torch.equal(random, torch.get_rng_state())


def test_columns_as_candidates() -> None:
    f = INVARIANT["columns normalized"].objective()
    found = find_groups(f, candidates=columns)
    assert set(found.groups) == {f"weight[:, {j}]" for j in range(6)}
    assert found.joint.tolist() == joined(f, ["weight"])


def test_gradients_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    f, points = ALL["Llama"].objective(), list[Tensor]()
    honest = Objective.grad

    def counted(self: Objective, w: Tensor) -> Tensor:
        points.append(w)
        return honest(self, w)

    monkeypatch.setattr(Objective, "grad", counted)
    assert find_groups(f).num_gradients == len(points)


@pytest.mark.parametrize("name", INVARIANT)
def test_a_copy_can_be_made_scale_invariant(name: str) -> None:
    f = INVARIANT[name].objective()
    before = {n: t.clone() for n, t in f.model.state_dict().items()}
    model, report = make_scale_invariant(f)
    g = Objective(model, f.loss, f.data)
    found = find_groups(g)
    assert found.covers(g.size) and found.joint_defect <= EULER
    assert report[-1].startswith(f"{g.size} weights may be rescaled together")
    gone = {n for n, _ in f.model.named_parameters()} - set(g.slices)
    assert {sentence.split(":")[0].split()[-1] for sentence in report[:-1]} == gone
    assert all(torch.equal(t, f.model.state_dict()[n]) for n, t in before.items())
    assert all(p.requires_grad for p in f.model.parameters())
    kept = sum(len(architectures.indices(f, names)) for names in INVARIANT[name].groups)
    assert g.size >= kept  # what was invariant before is still trained


@pytest.mark.parametrize("name", PLAIN)
def test_no_copy_of_a_network_without_normalization_is_scale_invariant(name: str) -> None:
    with pytest.raises(ValueError, match="add normalization first"):
        make_scale_invariant(PLAIN[name].objective())


def test_what_was_cut_is_said() -> None:
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).to(DTYPE)
    model, report = make_scale_invariant(net, F.mse_loss, DATA)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.weight"]
    assert report[0] == "Removed 0.bias: it has no effect on the loss."
    assert report[1].startswith("Removed 1.weight: the loss depends on its scale (Euler cosine 0.")
    assert [sentence.split(":")[0] for sentence in report[2:4]] == ["Removed 1.bias", "Removed 3.bias"]
    assert report[4].startswith("Froze 3.weight: the loss depends on its scale (Euler cosine 0.")
    assert len(report) == 6 and len(list(net.parameters())) == 6
    with pytest.raises(TypeError, match="depends on loss and data"):
        make_scale_invariant(net)


def test_a_tensor_may_be_frozen_in_part() -> None:
    f = INVARIANT["rows normalized in part"].objective()
    model, report = make_scale_invariant(f)
    assert report[0] == "Froze part of weight: 40 of 64 entries; only the others are invariant."
    assert [(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad] == [
        ("parametrizations.weight.original", 24)
    ]
    g = Objective(model, f.loss, f.data)
    assert g.value(g.weights()).item() == pytest.approx(f.value(f.weights()).item(), rel=1e-12)
    assert g.value(7 * g.weights()).item() == pytest.approx(f.value(f.weights()).item(), rel=1e-12)
