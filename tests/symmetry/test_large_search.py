"""The search for large networks gives the answers that are exact on small ones."""

import pytest
import torch
from architectures import INVARIANT, PLAIN
from problems import generator
from torch import Tensor

from sharpscope import Objective, find_groups
from sharpscope.autodiff.objective import by_batches
from sharpscope.symmetry import ScaleGroups, large_search, scale_groups

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
    monkeypatch.setattr(scale_groups, "LARGE", 0)


@pytest.mark.parametrize("name", SEVERAL)
def test_the_answers_are_those_of_the_search_in_double_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f = ALL[name].objective(seed=1, dtype=torch.float32)
    expected = find_groups(f)
    monkeypatch.setattr(scale_groups, "LARGE", 0)
    assert_same(find_groups(f), expected)


@pytest.mark.parametrize("name", ["BN", "Llama", "two pre-LN layers"])
def test_the_answers_do_not_depend_on_the_size_of_the_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group by another factor between a thousandth and a thousand."""
    f = ALL[name].objective(seed=1, dtype=torch.float32)
    expected, w, g = find_groups(f), f.weights(), generator(5)
    for indices in expected.groups.values():
        w[indices] *= 10 ** (6 * torch.rand(1, generator=g).item() - 3)
    monkeypatch.setattr(scale_groups, "LARGE", 0)
    assert_same(find_groups(f, w), expected)


@pytest.mark.usefixtures("every_size_is_large")
def test_relations_among_more_tensors_than_unknowns_are_sought_among_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    f = INVARIANT["two pre-LN layers"].objective(dtype=torch.float32)
    expected = find_groups(f)
    monkeypatch.setattr(large_search, "MAX_UNKNOWNS", 10)  # 30 tensors are left, in 18 classes
    assert_same(find_groups(f), expected)
    assert len(expected.groups) == 1


@pytest.mark.usefixtures("every_size_is_large")
def test_gradients_are_counted_and_few_are_of_all_examples() -> None:
    """Beyond one, to confirm that weights have no effect, gradients are of at most four examples."""
    seen: list[float] = []

    def counted(f: Objective, w: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(sum(batch.examples for batch in f.batches()))
        return by_batches(f, w)

    f = INVARIANT["two pre-LN layers"].objective(dtype=torch.float32).using(gradient=counted)
    assert find_groups(f).num_gradients == len(seen)
    assert sum(n > large_search.EXAMPLES for n in seen) == 1


def test_examples_that_see_each_other_stay_together() -> None:
    together, single = large_search.few_examples(f := INVARIANT["BN"].objective(), f.weights())
    assert single == [together] and sum(batch.examples for batch in together.batches()) == large_search.EXAMPLES
    two, single = large_search.few_examples(f := INVARIANT["Llama"].objective(), f.weights())
    assert sum(batch.examples for batch in two.batches()) == 2
    assert [sum(batch.examples for batch in one.batches()) for one in single] == [1] * large_search.EXAMPLES
