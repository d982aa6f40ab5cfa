"""Diagnosis: each sentence appears where it holds, is absent where it does not, and carries its numbers."""

import math
from collections.abc import Sequence

import pytest
import torch

from sharpscope.diagnose import AT_THE_EDGE, diagnose
from sharpscope.history import History
from sharpscope.invariance import ScaleGroups
from sharpscope.rules import GD

REGIMES = ("The run diverged", "Above the edge", "At the edge", "Progressive sharpening", "Below the edge")
PLAIN = GD(0.1)


def groups(count: int) -> ScaleGroups:
    return ScaleGroups({}, {}, {}, torch.arange(count), 3e-16 if count else 1.0)


def say(ratios: Sequence[float | None], *, rule: GD = PLAIN, invariant: int = 0, tau: float = 0.0) -> list[str]:
    """The sentences on a run with these readings of sharpness / threshold, every tenth step."""
    rows = [
        {
            "run": "r",
            "step": 10 * i,
            "tau": tau,
            "loss": None if ratio is None else 1.0,
            "sharpness": ratio,
            "stability_ratio": ratio,
        }
        for i, ratio in enumerate(ratios)
    ]
    return diagnose(History(rows), "r", rule, groups(invariant))


@pytest.mark.parametrize(
    ("ratios", "regime", "numbers"),
    [
        ([0.2, 0.9, 1.02, 0.98, 1.0], "At the edge", "is 1.00 (median of the last 1 readings)"),
        ([1.0] * 4 + [1.06, 1.04, 1.05, 9.0], "Above the edge", "is 5.03 (median of the last 2 readings)"),
        ([1.0] * 9 + [1.04, 9.0, 1.05], "At the edge", "is 1.05 (median of the last 3 readings)"),
        ([0.5] * 9 + [1.2, 1.25, 1.31], "At the edge", "is 1.25 (median of the last 3 readings)"),
        ([0.5] * 9 + [1.2, 1.31, 1.32], "Above the edge", "is 1.31 (median of the last 3 readings)"),
        ([0.40, 0.5, 0.6, 0.7], "Progressive sharpening", "is 0.70 (median of the last 1 readings), up from 0.40"),
        ([0.5, 0.5, 0.5], "Below the edge", "is 0.50 (median of the last 1 readings); it may grow 2-fold"),
        ([0.5, 0.8], "Below the edge", "grow 1.25-fold"),
        ([0.9, 0.6, 0.25], "Below the edge", "grow 4-fold"),
        ([0.5], "Below the edge", "grow 2-fold"),
        ([0.5, 0.0], "Below the edge", "is 0.00 (median of the last 1 readings); no direction curves upwards"),
        ([-0.5, -0.2, -0.1], "Below the edge", "no direction curves upwards"),
    ],
)
def test_regimes(ratios: list[float], regime: str, numbers: str) -> None:
    said = say(ratios)
    assert [r for r in REGIMES if said[0].startswith(r)] == [regime]
    assert numbers in said[0]
    assert len(said) == 2


def test_regimes_meet_at_their_bounds() -> None:
    low, high = AT_THE_EDGE
    assert say([low])[0].startswith("At the edge")
    assert say([high])[0].startswith("At the edge")
    assert say([math.nextafter(low, 0)])[0].startswith("Below the edge")
    assert say([math.nextafter(high, 2)])[0].startswith("Above the edge")


def test_divergence_is_said_first() -> None:
    said = say([0.5, 0.6, 2.0, None, None])
    assert said[0] == "The run diverged: at step 30 the loss was not finite; what follows is about the steps before."
    assert said[1].startswith("Above the edge")
    assert not any("diverged" in sentence for sentence in say([0.5, 0.6, 2.0]))


def test_invariant_weights_are_counted() -> None:
    assert say([1.0], invariant=60)[1].startswith("60 weights are scale-invariant (Euler cosine 3.0e-16)")
    assert say([1.0], invariant=0)[1:] == ["No weights are scale-invariant: the plain sharpness is the one to read."]


def test_the_clock_of_weight_decay() -> None:
    without = say([1.0], invariant=60)
    assert without[2].startswith("There is no weight decay")

    rule = GD(0.1, 0.01, 0.5)  # lr wd/(1 - mom) = .002 a step
    early = say([1.0], invariant=60, rule=rule, tau=0.25)
    assert "τ = 0.25 (by now 0.002 a step)" in early[2]
    assert "takes 375 more steps" in early[2]
    assert "time to settle" not in early[2]

    late = say([1.0], invariant=60, rule=rule, tau=1.5)
    assert late[2].startswith("Weight decay has acted for τ = 1.5 ")
    assert late[2].endswith("norms have had time to settle.")
    assert "more steps" not in late[2]

    assert not any("decay" in sentence for sentence in say([1.0], rule=rule, tau=0.25))
    assert [len(s) for s in (without, early, late)] == [3, 3, 3]
