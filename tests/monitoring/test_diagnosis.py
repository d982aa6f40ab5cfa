"""Diagnosis: each sentence appears where it holds, is absent where it does not, and carries its numbers."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from sharpscope.monitoring.diagnosis import AT_THE_EDGE, diagnose
from sharpscope.monitoring.finding import Finding
from sharpscope.monitoring.measurements import Facts, Now
from sharpscope.records.history import History

REGIMES = {"too few", "out of date", "observed", "edge", "above", "undecided", "below", "approaching", "sharpening"}
PLAIN = Facts(100)
INVARIANT = Facts(100, 60, 3e-16, {"a": 40, "b": 20})


def rows(count: int = 8, **columns: Any) -> list[dict[str, Any]]:
    """One row every ten steps; a column is one value or one for each row."""
    return [
        {"run": "r", "step": 10 * i} | {n: v[i] if isinstance(v, list) else v for n, v in columns.items()}
        for i in range(count)
    ]


def say(ratios: Sequence[float | None], facts: Facts = PLAIN, **columns: Any) -> dict[str, Finding]:
    """What is found on a run with these values of sharpness / threshold."""
    count = len(ratios)
    loss = [None if r is None else 1.0 + i % 2 for i, r in enumerate(ratios)]
    base: dict[str, Any] = {"tau": 0.0, "loss": loss, "stability_ratio": list(ratios), "sharpness": list(ratios)}
    base |= {"learning_rate": 0.1, "intrinsic_time_per_step": 0.0, "equilibrium": 0.0}
    found = diagnose(History(rows(count, **base | columns)), "r", facts)
    assert len({f.name for f in found}) == len(found)
    return {f.name: f for f in found}


def regime(ratios: Sequence[float | None], **columns: Any) -> Finding:
    found = [f for name, f in say(ratios, **columns).items() if name in REGIMES]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("ratios", "name", "numbers"),
    [
        (
            [0.2, 0.9, 1.02, 0.98, 1.0],
            "edge",
            "is 1.00 at the learning rate 0.1 (median of 3 measurements, steps 20 to 40)",
        ),
        ([1.0] * 9 + [1.04, 1.1, 1.05], "edge", "is 1.05 at the learning rate 0.1 (median of 3 measurements, "),
        ([0.5] * 9 + [1.2, 1.25, 1.31], "edge", "is 1.25 at"),
        ([1.0] * 4 + [1.06, 1.04, 1.05, 9.0], "undecided", "is 1.05 at the learning rate 0.1 (median of 3 measure"),
        ([0.5] * 9 + [1.2, 1.31, 1.32], "undecided", "between 1.25 and 1.31"),
        ([0.5] * 9 + [0.5, 0.94, 1.2], "undecided", "between 0.72 and 1.07"),
        ([0.5] * 9 + [1.4, 1.35, 1.36], "above", "is 1.36 at the learning rate 0.1 (median of 3 measurements,"),
        ([5.0], "too few", "At step 0 sharpness / threshold was 5.00, at a learning rate of 0.1: the only measurement"),
        (
            [0.5, 5.0],
            "too few",
            "At step 10 sharpness / threshold was 5.00, at a learning rate of 0.1: one measurement",
        ),
        ([0.5, 0.7, 5.0], "too few", "At step 20 sharpness / threshold was 5.00, at a learning rate of 0.1: two"),
        (
            [0.40, 0.5, 0.6, 0.7],
            "sharpening",
            "is 0.60 at the learning rate 0.1 (median of 3 measurements, steps 10 to 30), up from 0.40 at step 0",
        ),
        ([0.3, 0.6, *[0.7] * 10], "below", "it may grow 1.43-fold"),
        ([0.5] * 4, "below", "steps 10 to 30); it may grow 2-fold"),
        ([0.9, 0.9, 0.6, 0.25], "below", "grow 1.67-fold"),
        ([0.5, 0.0, 0.0, 0.0], "below", "steps 10 to 30); no direction curves upwards"),
        ([-0.5, -0.2, -0.1, -0.1], "below", "no direction curves upwards"),
    ],
)
def test_regimes(ratios: list[float], name: str, numbers: str) -> None:
    found = regime(ratios)
    assert found.name == name
    assert numbers in found.text
    assert found.source
    assert (found.severity == "warning") == (found.name == "above") == bool(found.remedy)


def test_regimes_meet_at_their_bounds() -> None:
    low, high = AT_THE_EDGE
    assert regime([low] * 4).name == regime([high] * 4).name == "edge"
    assert regime([math.nextafter(low, 0)] * 4).name == "below"
    assert regime([math.nextafter(high, 2)] * 4).name == "above"


def test_a_loss_that_grows_and_grows_is_no_edge() -> None:
    assert regime([1.05] * 8, loss=[2.0**i for i in range(8)]).name == "above"
    assert regime([1.05] * 8, loss=[2.0, 3.0, 4.0, 6.0, 5.0, 7.0, 8.0, 6.0]).name == "edge"
    assert regime([0.5] * 8, loss=[2.0**i for i in range(8)]).name == "below"


def test_an_approach_by_shrinking_norms_is_told_from_sharpening() -> None:
    up = [0.3 * 1.1**i for i in range(8)]
    constant, rising = [50.0] * 8, [50 * 1.1**i for i in range(8)]
    assert regime(up, spherical_sharpness=constant).name == "approaching"
    assert regime(up, spherical_sharpness=rising).name == "sharpening"
    assert "as the norm of the weights shrinks" in regime(up, spherical_sharpness=constant).text


def test_steps_that_grow_are_no_sharpening() -> None:
    up = [0.3 * 1.1**i for i in range(8)]
    assert regime(up, sharpness=[5 * 1.1**i for i in range(8)]).name == "sharpening"
    longer = regime(up, sharpness=5.0)
    assert longer.name == "below" and "the optimizer's steps that grow, not the curvature" in longer.text


def test_divergence_is_said_first() -> None:
    said = say([0.5, 0.6, 2.0, None, None])
    assert next(iter(said)) == "diverged"
    assert said["diverged"].text.startswith("The run diverged: at step 30 the loss was not finite")
    assert "diverged" not in say([0.5, 0.6, 2.0])


def test_measurements_without_curvature_are_counted() -> None:
    found = say([0.5, 0.6, 0.5], sharpness=[1.0, None, 1.0], stability_ratio=[1.0, None, 1.0])
    assert found["gaps"].text.startswith("At 1 of 3 measurements, first at step 10, no curvature was found")
    assert "gaps" not in say([0.5, 0.6, 0.5])


def test_no_threshold_no_regime() -> None:
    (found,) = [f for f in diagnose(History(rows(3, loss=1.0)), "r", Facts(10)) if f.name in REGIMES]
    assert found.name == "too few" and "no measurement of the curvature at a positive learning rate" in found.text


def test_where_the_curvature_lives() -> None:
    inside = say([1.0] * 4, INVARIANT, **{"fraction/a": 0.7, "fraction/b": 0.1})["top eigenvector"]
    assert (
        "80% of the top eigenvector lies in scale-invariant weights (most in a; 3 measurements, steps 10 to 30)"
        in inside.text
    )
    outside = say([1.0] * 4, INVARIANT, **{"fraction/a": 0.1, "fraction/b": 0.1})["top eigenvector"]
    assert "Only 20%" in outside.text and "that of the 40 other weights" in outside.text
    whole = Facts(60, 60, 3e-16, {"a": 40, "b": 20})
    assert "top eigenvector" not in say([1.0] * 4, whole, **{"fraction/a": 0.7, "fraction/b": 0.3})
    assert "top eigenvector" not in say([1.0] * 4)


def test_the_largest_stable_rate() -> None:
    found = say([0.5] * 4)["largest rate"]
    assert found.numbers["largest"] == pytest.approx(0.2)
    assert "3 measurements, steps 10 to 30, the largest stable learning rate is 0.2 (the rate is 0.1)" in found.text
    assert "largest rate" not in say([-0.5] * 4)
    assert "largest rate" not in say([0.5] * 4, learning_rate=0.0)


def test_twice_the_learning_rate() -> None:
    assert "would bring the ratio to 0.80, still below" in say([0.4] * 4)["twice the rate"].text
    assert "to 1.60, past the edge" in say([0.8] * 4)["twice the rate"].text
    plain = say([1.0] * 4)["twice the rate"].text
    assert "halve the sharpness" in plain and "jump" in plain
    adapting = say([1.0] * 4, INVARIANT, **{"fraction/a": 0.9})["twice the rate"].text
    assert "√2 times their norm" in adapting
    assert "twice the rate" not in say([-1.0] * 4)


def test_the_entry_formula() -> None:
    """τ = ½ ln 2 at half the threshold."""
    columns: dict[str, Any] = {"intrinsic_time_per_step": 1e-3, "fraction/a": 0.9}
    found = say([0.5] * 4, INVARIANT, **columns)["steps to the edge"]
    assert found.numbers["tau"] == pytest.approx(0.5 * math.log(2))
    assert found.numbers["steps"] == pytest.approx(500 * math.log(2))
    assert "347 steps away at the earliest" in found.text
    short = Facts(100, 60, 0.0, {"a": 60}, steps=200)
    assert "170 are left, so it will not get there" in say([0.5] * 4, short, **columns)["steps to the edge"].text
    long = Facts(100, 60, 0.0, {"a": 60}, steps=2000)
    assert "1970 are left." in say([0.5] * 4, long, **columns)["steps to the edge"].text
    assert "steps to the edge" not in say([1.0] * 4, INVARIANT, **columns)
    assert "steps to the edge" not in say([0.5] * 4, INVARIANT, **columns | {"radial/a": 1.0})
    assert "steps to the edge" not in say([0.5] * 4, INVARIANT, **columns | {"intrinsic_time_per_step": 0.0})
    assert "steps to the edge" not in say([0.5] * 4, INVARIANT, **columns | {"fraction/a": 0.2})


def test_invariant_weights_are_counted() -> None:
    assert say([1.0], INVARIANT)["invariance"].text.startswith("60 weights are scale-invariant (Euler cosine 3.0e-16)")
    assert say([1.0])["invariance"].text == "No weights are scale-invariant: the plain sharpness is the one to read."


def test_unknown_groups_are_not_counted() -> None:
    found = say([1.0], Facts(100, groups_known=False))
    assert "is not known yet" in found["unknown groups"].text and "invariance" not in found
    assert "unknown groups" not in say([1.0])


def test_weight_decay_that_only_rescales() -> None:
    found = say([1.0], INVARIANT, intrinsic_time_per_step=1e-3)["decay rescales"].text
    assert "On the 60 invariant weights weight decay penalizes nothing" in found and "no effect" not in found
    idle = Facts(100, 0, 1.0, {}, {"c.bias": 6}, decayed_null=6)
    assert (
        "6 parameters that have no effect on the loss (c.bias)"
        in say([1.0], idle, intrinsic_time_per_step=1e-3)["decay rescales"].text
    )
    paired = Facts(100, pairs=("a -> b", "c -> d"))
    assert (
        "In 2 pairs of tensors (a -> b, ..)" in say([1.0], paired, intrinsic_time_per_step=1e-3)["decay rescales"].text
    )
    assert (
        "In 1 pair of tensors (a -> b),"
        in say([1.0], Facts(100, pairs=("a -> b",)), intrinsic_time_per_step=1e-3)["decay rescales"].text
    )
    assert "decay rescales" not in say([1.0], INVARIANT)
    assert "decay rescales" not in say([1.0], intrinsic_time_per_step=1e-3)


def test_weight_decay_that_does_not_fit_the_kind_of_weights() -> None:
    decayed = {"scale-invariant": 40, "biases": 7, "gains and other vectors": 5, "no effect": 3}
    found = say([1.0], Facts(100, decayed=decayed, undecayed={"scale-invariant": 20, "matrices": 9}))["decay groups"]
    assert "7 weights that are biases, 5 weights that are gains and other vectors towards zero" in found.text
    assert "20 scale-invariant weights have no weight decay" in found.text and "matrices" not in found.text
    assert found.numbers == {"offsets": 12, "invariant": 20, "one-sided": 0}
    pairs = Facts(
        100, decayed={"rescaled in pairs": 4}, undecayed={"rescaled in pairs": 4}, one_sided=("a -> b", "c -> d")
    )
    assert "In 2 pairs of tensors (a -> b, ..) one side has weight decay" in say([1.0], pairs)["decay groups"].text
    fitting = Facts(100, decayed={"scale-invariant": 40, "matrices": 3}, undecayed={"biases": 7, "no effect": 3})
    assert "decay groups" not in say([1.0], fitting)
    assert "decay groups" not in say([1.0], Facts(100, undecayed={"scale-invariant": 40}))  # "no decay" says so


def test_the_intrinsic_time_of_weight_decay() -> None:
    assert "no decay" in say([1.0], INVARIANT)
    early = say([1.0], INVARIANT, intrinsic_time_per_step=0.002, tau=0.25)["intrinsic time"].text
    assert "τ = 0.25 by step 0 (0.002 a step at the last measurement)" in early
    assert "375 steps from now at this rate" in early and "time to settle" not in early
    late = say([1.0], INVARIANT, intrinsic_time_per_step=0.002, tau=1.5)["intrinsic time"].text
    assert late.startswith("Weight decay has acted for τ = 1.5 ") and late.endswith("norms have had time to settle.")
    for names in (
        say([1.0], INVARIANT, intrinsic_time_per_step=math.nan),
        say([1.0], intrinsic_time_per_step=0.002, tau=0.25),
    ):
        assert not {"intrinsic time", "no decay", "no time"} & set(names)


def test_weight_decay_without_time() -> None:
    facts = Facts(100, 60, 0.0, {"a": 60}, steps=50)
    found = say([0.5] * 4, facts, intrinsic_time_per_step=1e-3, tau=0.03)["no time"]
    assert found.numbers["tau at the end"] == pytest.approx(0.03 + 20 * 1e-3)
    assert "weight decay has no time to act in this run" in found.text
    enough = say([0.5] * 4, Facts(100, 60, 0.0, {"a": 60}, steps=500), intrinsic_time_per_step=1e-3, tau=0.03)
    assert (
        "no time" not in enough and "will have for τ = 0.5 after the 500 steps planned" in enough["intrinsic time"].text
    )
    assert "no time" not in say([0.5] * 4, INVARIANT, intrinsic_time_per_step=1e-3, tau=0.03)  # nobody knows the end


def test_a_schedule_that_is_known_gives_the_time_at_the_end() -> None:
    """Rate falling linearly to zero from step 30 of 130, by the schedule: half the time of a constant one."""
    points = tuple((30.0 + 10 * i, 0.1 * (1 - i / 10)) for i in range(11))
    facts = Facts(100, 60, 0.0, {"a": 60}, steps=130, schedule=points)
    found = say([0.5] * 4, facts, intrinsic_time_per_step=0.01, tau=0.3)["intrinsic time"]
    assert found.numbers["tau at the end"] == pytest.approx(0.3 + 0.5 * 100 * 0.01)
    assert "which this run does not reach" in found.text


def test_a_schedule_that_is_not_known_is_no_ground_for_a_forecast() -> None:
    """The rate fell: nothing is found about the end of the run, nor about the peak as if it were now."""
    falling = [0.1, 0.08, 0.06, 0.04, 0.02, 0.01, 0.005, 0.001]
    facts = Facts(100, 60, 0.0, {"a": 60}, steps=1000)
    found = say([rate * 9 for rate in falling], facts, learning_rate=falling, intrinsic_time_per_step=1e-3, tau=0.03)
    assert "how it goes on is not known here" in found["schedule"].text and found["schedule"].remedy
    assert math.isnan(found["intrinsic time"].numbers["tau at the end"])
    assert not {"twice the rate", "steps to the edge", "settling", "no time"} & set(found)
    below = found["below"]
    assert below.numbers["ratio"] == pytest.approx(0.009)
    assert below.numbers["ratio at largest rate"] == pytest.approx(0.9)
    assert "is 0.009 at the learning rate 0.001" in below.text
    assert "At the largest rate so far, 0.1, the same curvature would give 0.90." in below.text


def test_curvature_that_follows_a_falling_threshold_is_at_the_edge() -> None:
    falling = [0.1 * 0.85**i for i in range(12)]
    assert regime([0.7] * 3 + [1.0] * 9, learning_rate=falling).name == "edge"
    assert regime([0.7] * 3 + [0.5] * 9, learning_rate=falling).name == "below"


def test_a_rate_still_to_come_is_past_the_edge() -> None:
    warm_up = Facts(100, steps=100, schedule=tuple((30.0 + i, 0.1 + 0.01 * i) for i in range(20)))
    found = say([0.5] * 4, warm_up)["peak ahead"]
    assert found.numbers == pytest.approx({"peak": 0.29, "step": 49, "ratio": 1.45, "largest": 0.2})
    assert found.severity == "advice" and "lower the peak to 0.16" in found.remedy
    assert "peak ahead" not in say([0.2] * 4, warm_up)
    assert "peak ahead" not in say([0.5] * 4)
    cycles = Facts(100, schedule=tuple((30.0 + i, 0.1 - 0.01 * i if i < 9 else 0.3) for i in range(20)))
    assert "peak ahead" not in say([0.5] * 4, cycles)  # it may end before the next one


def test_old_measurements_are_told_as_such() -> None:
    history = History(rows(4, stability_ratio=5.0, learning_rate=0.1, loss=1.0, tau=0.0))
    (found, rate, *_) = diagnose(history, "r", PLAIN, Now(step=400, learning_rate=0.01, largest_rate=0.2))
    assert found.name == "out of date" and found.remedy
    assert found.text.startswith("At step 30, 370 steps ago, sharpness / threshold was 5.00, at a learning rate of 0.1")
    assert "at the present 0.01 the same curvature would give 0.50" in found.text
    assert rate.name == "largest rate" and "370 steps ago, the largest stable learning rate was 0.02;" in rate.text
    fresh = diagnose(history, "r", PLAIN, Now(step=45, learning_rate=0.1))
    assert fresh[0].name == "above"


def test_above_the_edge_while_the_loss_falls() -> None:
    falling = regime([3.0] * 4, loss=[8.0, 4.0, 2.0, 1.0])
    assert falling.name == "above" and "meanwhile the loss fell from 4 to 1" in falling.text
    assert falling.remedy == "Lower the learning rate from 0.1 to 0.0267, 0.8 of the largest stable one."
    assert "expect the loss to rise" in regime([3.0] * 4).text
    assert "are clipped" in regime([3.0] * 4, applied_gradient=1.0).text


def test_an_optimizer_without_a_law_gets_no_threshold() -> None:
    found = say([None] * 3, Facts(100, observed=("Lion",)), sharpness=[1.0, 2.0, 3.0], loss=1.0)
    assert "No threshold is known for Lion" in found["observed"].text and "sharpness is 3 " in found["observed"].text
    assert not {"largest rate", "twice the rate", "below", "too few"} & set(found)


@pytest.mark.parametrize(
    ("steps", "word"), [(100, "does not fit"), (1000, "only just fits"), (2000, "fits in its 2000")]
)
def test_time_to_balance(steps: int, word: str) -> None:
    found = say([0.5] * 4, Facts(100, 60, 0.0, {"a": 60}, steps=steps), intrinsic_time_per_step=1e-3, tau=0.03)[
        "settling"
    ]
    assert found.numbers["time"] == 500 and word in found.text
    assert "settling" not in say([0.5] * 4, INVARIANT, intrinsic_time_per_step=1e-3)
    assert "settling" not in say([0.5] * 4, Facts(100, 0, steps=steps), intrinsic_time_per_step=1e-3)


def test_twice_the_weight_decay() -> None:
    found = say([0.5] * 4, INVARIANT, intrinsic_time_per_step=1e-3, equilibrium=math.radians(1.0))[
        "twice the decay"
    ].text
    assert "by 1.4° a step instead of 1°" in found
    planned = say([0.5] * 4, Facts(100, 60, 0.0, {}, steps=530), intrinsic_time_per_step=1e-3, tau=0.5)[
        "twice the decay"
    ].text
    assert "(τ = 2 at the end)" in planned
    assert "twice the decay" not in say([0.5] * 4, INVARIANT)


def test_rotation_against_its_law() -> None:
    columns: dict[str, Any] = {"intrinsic_time_per_step": 1e-2, "tau": 2.0, "equilibrium": 0.1}
    balanced = say([0.5] * 4, INVARIANT, **columns, **{"rotation/a": 0.12, "rotation/b": 0.08})["rotation"]
    assert "all within a factor of two" in balanced.text
    unequal = say([0.5] * 4, INVARIANT, **columns, **{"rotation/a": 0.12, "rotation/b": 0.02})["rotation"]
    assert "from 0.2 of it in b to 1.2 in a" in unequal.text
    alone = say([0.5] * 4, INVARIANT, **columns, **{"rotation/a": 0.02})["rotation"]
    assert "0.2 times that" in alone.text and "unequal" not in alone.text
    assert "rotation" not in say([0.5] * 4, INVARIANT, **columns, **{"rotation/a": 0.12, "radial/a": 1.0})
    assert "rotation" not in say([0.5] * 4, INVARIANT, **columns | {"tau": 0.5}, **{"rotation/a": 0.12})
    assert "rotation" not in say([0.5] * 4, INVARIANT, **columns | {"equilibrium": math.nan}, **{"rotation/a": 0.12})


def test_eps_that_holds_a_layer_up() -> None:
    found = say([0.5] * 4, INVARIANT, **{"radial/a": 0.97, "radial/b": 0.01})["eps"]
    assert "keeps a from the edge: it balances 97% of its weight decay" in found.text
    assert "eps" not in say([1.0] * 4, INVARIANT, **{"radial/a": 0.97})
    assert "eps" not in say([0.5] * 4, INVARIANT, **{"radial/a": 0.2})


def test_clipped_gradients() -> None:
    found = say([0.5] * 4, applied_gradient=[3.0, 1.0, 1.0, 1.0])["clipping"]
    assert "clipped to norm 1 (3 measurements, steps 10 to 30):" in found.text
    assert "clipping" not in say([0.5] * 4, applied_gradient=[3.0, 1.0, 0.99, 1.0])
    assert "clipping" not in say([0.5] * 4, applied_gradient=1.0, loss=1.0)  # nothing changes at all


def test_the_price_of_measuring() -> None:
    assert say([0.5] * 4, overhead=0.0312)["cost"].text == "Measuring took 3.12% of the time of training so far."
    assert "cost" not in say([0.5] * 4)


@pytest.mark.parametrize(
    ("values", "meaning"),
    [
        (
            [0.1] * 8,
            "they are at 0.10 (median of 3 steps from 50 to 70): they pay, and steps of twice the length would",
        ),
        ([2.0] * 5 + [0.6, 0.8, 0.7], "at 0.70 (median of 3 steps from 50 to 70): they pay, but steps of twice"),
        ([0.1] * 5 + [0.9, 0.95, 1.3], "at 0.95 (median of 3 steps from 50 to 70): they are at the edge along the"),
        ([0.1] * 5 + [1.2, 1.3, None], "at 1.20 (median of 3 steps from 40 to 60): the loss of the very batch rises"),
        ([None] * 7 + [0.2], "at 0.20 (median of step 70); that is too few to judge by."),
    ],
)
def test_along_the_step(values: list[float | None], meaning: str) -> None:
    if values[-1] is None:
        values[4] = 0.3
    found = say([0.1] * 8, edge_along_step=values)["along the step"]
    assert meaning in found.text and "not on λ1" in found.text and "uphill" not in found.text
    above = "rises" in meaning
    assert (found.severity == "advice") == above and ("0.833 of their length" in found.remedy) == above
    late = sorted(v for v in values if v is not None)
    assert late[0] <= found.numbers["quarter"] <= found.numbers["median"] <= found.numbers["three quarters"] <= late[-1]


def test_steps_uphill_are_counted_along_the_step() -> None:
    values: list[float | None] = [0.2, None, 0.2, 0.2, None, 0.2, 0.2, 0.2]
    found = say([0.1] * 8, edge_along_step=values, slope_along_step=[-1.0, 1.0, -1.0, -1.0, 2.0, -1.0, -1.0, -1.0])
    assert "2 of 8 steps went uphill on their batch" in found["along the step"].text
    assert "along the step" not in say([0.1] * 8)
