"""The claims on the generalization benefit, on histories whose answer is known."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from sharpscope.errors import InvalidValue, Unusable
from sharpscope.records.history import History
from sharpscope.studies._framework.fits import mean_interval
from sharpscope.studies._framework.run import Run, unfinished
from sharpscope.studies.lyu2022 import QUICK, Config, benefit

GAINS = [0.02, 0.031, 0.008, 0.025, 0.012]


def history() -> History:
    """Five seeds; the run without weight decay passes the other's last training loss at an accuracy of .81."""
    rows: list[dict[str, float | int | str | None]] = []
    for seed, gain in enumerate(GAINS):
        ending = f", seed {seed}" if seed else ""
        for name, accuracies in (("benefit", [0.7, 0.8 + gain]), ("benefit, no decay", [0.7, 0.81, 0.8])):
            for step, accuracy in enumerate(accuracies):
                rows.append(
                    {
                        "run": name + ending,
                        "step": step,
                        "test_accuracy": accuracy,
                        "midpoint_loss": 10.0 ** (-2 * step),
                    }
                )
    return History(rows)


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    found = benefit.mean(benefit.points("benefit", "benefit, no decay"))(history(), None)
    low, high = ttest_1samp(100 * np.array(GAINS), 0).confidence_interval(0.95)
    assert found == pytest.approx((low, high), rel=1e-9)
    assert benefit.fraction_above(benefit.points("benefit", "benefit, no decay") - 1)(history(), None) == 0.8
    with pytest.raises(InvalidValue, match="needs two numbers"):
        mean_interval([1.0])


def test_at_equal_loss_the_nearest_row_counts() -> None:
    found = benefit.points_at_equal_loss("benefit", "benefit, no decay")(history(), None)
    assert found == pytest.approx([100 * (gain - 0.01) for gain in GAINS], abs=1e-9)


def test_twins_differ_in_weight_decay_alone() -> None:
    for config in (Config(), QUICK):
        for seed in (0, 3):
            variants = benefit.variants(config, seed)
            for name in variants.keys() & {
                other.removesuffix(", no decay") for other in variants if "no decay" in other
            }:
                with_decay, without = (dict(vars(variants[n])) for n in (name, f"{name}, no decay"))
                different = {key for key in with_decay if with_decay[key] != without[key]}
                assert "weight_decay" in different <= {"weight_decay", "every"}
    seeds = {variant.seed for seed in range(3) for variant in benefit.variants(Config(), seed).values()}
    assert seeds == {0, 1, 2}
    assert len(benefit.jobs(QUICK)) == 5 * len(benefit.variants(QUICK, 0))


def test_a_directory_is_free_again_where_data_were_missing(tmp_path: Path) -> None:
    config = replace(QUICK, parts=("benefit",), benefit_seeds=1)
    with ExitStack() as locks:
        with pytest.raises(Unusable, match=r"there is no file 'none\.csv', which the data 'csv:none\.csv' name"):
            unfinished(Run("lyu2022", replace(config, data="csv:none.csv"), tmp_path), locks)
        assert list(tmp_path.iterdir()) == []
        group = unfinished(Run("lyu2022", replace(config, data="digits"), tmp_path), locks)
        assert len(group.tasks) == len(benefit.variants(config, 0))
