"""The search gives the answers that are exact on small networks where it screens candidates on few examples, too."""

import pytest
import torch
from architectures import INVARIANT, PLAIN
from problems import generator
from torch import Tensor, nn

from sharpscope import Objective, find_groups
from sharpscope.autodiff.objective import by_batches
from sharpscope.symmetry import ScaleGroups, search

ALL = INVARIANT | PLAIN
SEVERAL = (
    *("BN", "LN", "ResNet with zero gains", "preactivation ResNet", "ConvNeXt", "two pre-LN layers", "Llama"),
    *("pre-LN transformer of torch", "post-LN transformer with rectifiers", "vision transformer", "two streams"),
    *("normalized queries and keys in one tensor", "rows normalized in part", "columns normalized in part"),
    *("tied weights", "very weak side branch", "norm beside what it normalizes", "rectifiers", "weight norm"),
)


def places(parts: dict[str, Tensor]) -> set[tuple[int, ...]]:
    return {tuple(sorted(i.tolist())) for i in parts.values()}


def assert_same(found: ScaleGroups, expected: ScaleGroups) -> None:
    assert places(dict(found.groups)) == places(dict(expected.groups))
    assert places(dict(found.null)) == places(dict(expected.null))
    assert found.joint.tolist() == expected.joint.tolist()
    assert set(found.pairs) == set(expected.pairs)


@pytest.fixture
def every_size_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LARGE", 0)


@pytest.mark.parametrize("name", SEVERAL)
def test_the_answers_are_those_of_the_search_in_double_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f = ALL[name].objective(seed=1, dtype=torch.float32)
    expected = find_groups(f)
    monkeypatch.setattr(search, "LARGE", 0)
    assert_same(find_groups(f), expected)


@pytest.mark.parametrize("name", ["BN", "Llama", "two pre-LN layers"])
def test_the_answers_do_not_depend_on_the_size_of_the_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group by another factor between a thousandth and a thousand."""
    f = ALL[name].objective(seed=1, dtype=torch.float32)
    expected, w, g = find_groups(f), f.weights(), generator(5)
    for indices in expected.groups.values():
        w[indices] *= 10 ** (6 * torch.rand(1, generator=g).item() - 3)
    monkeypatch.setattr(search, "LARGE", 0)
    assert_same(find_groups(f, w), expected)


@pytest.mark.usefixtures("every_size_is_large")
def test_relations_among_more_tensors_than_unknowns_are_sought_among_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    f = INVARIANT["two pre-LN layers"].objective(dtype=torch.float32)
    expected = find_groups(f)
    monkeypatch.setattr(search, "MAX_UNKNOWNS", 10)  # 30 tensors are left, in 18 classes
    assert_same(find_groups(f), expected)
    assert len(expected.groups) == 1


@pytest.mark.usefixtures("every_size_is_large")
def test_gradients_are_counted_and_few_are_of_all_examples() -> None:
    """Beyond one, to confirm that weights have no effect, gradients are of at most eight examples."""
    seen: list[float] = []

    def counted(f: Objective, w: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(sum(batch.examples for batch in f.batches()))
        return by_batches(f, w)

    f = INVARIANT["two pre-LN layers"].objective(dtype=torch.float32).using(gradient=counted)
    assert find_groups(f).num_gradients == len(seen)
    assert sum(n > search.EXAMPLES for n in seen) == 1


def test_examples_that_see_each_other_stay_together() -> None:
    together, single = search.few_examples(f := INVARIANT["BN"].objective(), f.weights())
    assert single == [together] and sum(batch.examples for batch in together.batches()) == search.EXAMPLES
    few, single = search.few_examples(f := INVARIANT["Llama"].objective(), f.weights())
    assert sum(batch.examples for batch in few.batches()) == search.EXAMPLES
    assert [sum(batch.examples for batch in one.batches()) for one in single] == [1] * search.EXAMPLES


class Kinks(nn.Module):
    """Two million rectifiers before a normalization: one is stepped across its kink, however small the step."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.readout = nn.Linear(4, 600), nn.Linear(600, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(nn.functional.layer_norm(torch.relu(self.map(x)), (600,)))


def kinks(dtype: torch.dtype) -> Objective:
    """Weights of a thousand times the size of biases: the weight alone has an Euler cosine that falls like 1/c."""
    torch.manual_seed(1)
    net = Kinks().to(dtype)
    with torch.no_grad():
        net.map.weight.mul_(1000)
    return Objective(
        net, nn.functional.mse_loss, [(torch.randn(4000, 4, dtype=dtype), torch.randn(4000, 2, dtype=dtype))]
    )


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinks_are_not_taken_for_rounding(dtype: torch.dtype, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second differences of gradients across a kink are not small in double precision either.

    Taken for rounding, they make a bias beside large weights invisible.
    """
    monkeypatch.setattr(search, "LARGE", 0 if large else 10**9)
    found = find_groups(kinks(dtype))
    assert list(found.groups) == ["map.*"]


@pytest.mark.parametrize("width", [502, 522])
def test_the_answer_does_not_change_at_the_limit(width: int) -> None:
    """Two layers of batch normalization, of weights a little fewer, and a little more, than the limit."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width)]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 2))
    f = Objective(net, nn.functional.mse_loss, [(torch.randn(16, 8), torch.randn(16, 2))])
    assert (f.size >= search.LARGE) == (width == 522)
    found = find_groups(f)
    assert set(found.groups) == {"0.weight", "3.weight", "1.*"} and set(found.null) == {"0.bias", "3.bias"}
    assert set(found.pairs) == {"4.* -> 6.weight"}


@pytest.mark.usefixtures("every_size_is_large")
def test_the_last_of_few_batches_is_not_cut_to_one_example() -> None:
    """Batch normalization refuses one example, which eight of batches of seven would end with."""
    f = INVARIANT["BN"].objective(dtype=torch.float32)
    x, y = next(iter(f.data))
    sevens = f.on([(x[:7], y[:7]), (x[7:14], y[7:14])])
    assert set(find_groups(sevens).groups) == {"0.weight", "3.weight"}
