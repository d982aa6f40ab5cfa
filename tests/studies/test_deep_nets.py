"""VGG-11, ResNet-20 and the language model: as published in size, and scale-invariant where they should be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sharpscope.autodiff.objective import Objective
from sharpscope.errors import Unusable
from sharpscope.records.run_log import RunLog
from sharpscope.studies._shared.deep_nets import language, resnet20, vgg11
from sharpscope.studies._shared.nets import half_squares, next_token
from sharpscope.studies._shared.networks import Variant, network_of, problem_of, run_variant
from sharpscope.symmetry.scale_groups import find_groups

G = torch.Generator().manual_seed(0)
X = torch.randn(6, 3, 9, 9, generator=G, dtype=torch.float64)
Y = torch.randn(6, 4, generator=G, dtype=torch.float64)
TOKENS = torch.randint(0, 11, (3, 9), generator=G)


def objective(kind: str, norm: str, invariant: bool) -> Objective:
    if kind == "language":
        net = language(norm, 0, (8,), 11, 16, invariant)
        return Objective(net, next_token, [(TOKENS[:, :-1], TOKENS[:, 1:])])
    make = vgg11 if kind == "vgg11" else resnet20
    return Objective(make(norm, 0, (3, 9, 9), 4, 4, invariant), half_squares, [(X, Y)])


CASES = [*((kind, norm) for kind in ("vgg11", "resnet20") for norm in ("BN", "GN", "LN", "none"))]
CASES += [("language", "LN"), ("language", "RMSNorm")]


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_every_weight_is_scale_invariant_or_as_commonly_trained(kind: str, norm: str) -> None:
    f = objective(kind, norm, True)
    w, groups = f.weights(), find_groups(f)
    if norm == "none":
        assert groups.joint.numel() == 0
    else:
        assert groups.covers(f.size)
        assert f.value(2.5 * w).item() == pytest.approx(f.value(w).item(), rel=1e-10)
    common = objective(kind, norm, False)
    assert not find_groups(common).covers(common.size)
    grad = common.grad(common.weights())
    assert torch.isfinite(grad).all() and all(grad[s].any() for s in common.slices.values())


def test_sizes_are_those_published() -> None:
    """At the usual width for CIFAR-10, as commonly trained: counts of other implementations, less what differs.

    ResNet-20 with shortcuts without weights has 269,722; a VGG-11 whose convolutions have biases as well 9,231,114.
    """
    shape = (3, 32, 32)
    assert sum(p.numel() for p in resnet20("BN", 0, shape, 10, 16, False).parameters()) == 269_722
    biases = 64 + 128 + 2 * 256 + 4 * 512
    assert sum(p.numel() for p in vgg11("BN", 0, shape, 10, 64, False).parameters()) == 9_231_114 - biases


@pytest.mark.parametrize("invariant", [True, False])
def test_the_language_model_sees_no_later_token(invariant: bool) -> None:
    net = language("LN", 0, (8,), 11, 16, invariant)
    other = TOKENS[:, :-1].clone()
    other[:, 5:] = 10 - other[:, 5:]
    first, second = net(TOKENS[:, :-1]), net(other)
    assert torch.allclose(first[:, :5], second[:, :5], rtol=0, atol=1e-13)  # sums of other lengths: rounding
    assert (first[:, 5:] - second[:, 5:]).abs().max() > 1e-3


VARIANT = Variant(
    "resnet20", "BN", "half squares", 0.1, 1e-2, steps=3, every=2, train=60, test=12, data="digits", width=2, chunk=30
)


def test_a_deep_network_trains_in_chunks_and_in_float32(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "deep")
    run_variant(log, lambda fraction: None, replace(VARIANT, dtype="float32"))
    assert not log.note and log.rows[-1]["step"] == 3
    problem = problem_of(VARIANT)
    f = problem.objective
    parts = [Objective(f.model, f.loss, [(x, y)]) for x, y in f.data]
    w = f.weights()
    assert len(parts) == 2
    mean = torch.stack([part.grad(w) for part in parts]).mean(0)
    assert torch.allclose(f.grad(w), mean, rtol=1e-10, atol=1e-14)


def test_text_trains(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "text")
    variant = Variant("language", "LN", "next token", 0.5, 1e-3, steps=2, train=4, test=4, data="text", width=16)
    run_variant(log, lambda fraction: None, variant)
    assert not log.note
    assert log.rows[0]["test_loss"] == pytest.approx(torch.log(torch.tensor(96.0)).item(), rel=0.5)  # chance


@pytest.mark.parametrize(("net", "loss", "shape"), [("conv", "half squares", (5,)), ("mlp", "next token", (64,))])
def test_a_network_that_does_not_fit_its_data_is_refused(net: str, loss: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(Unusable, match=f"the network {net} is not made for inputs"):
        network_of(Variant(net, "BN", loss, 0.1, 0.0), shape, 3)
