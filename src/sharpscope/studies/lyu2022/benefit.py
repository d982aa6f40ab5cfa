"""The generalization benefit: test accuracy with weight decay and without, on real images.

By default 300 of the 5000 images of MNIST, 14×14, tested on 4000 others, and the MLP 196→64→64→10 with batch
normalization, also of the output; squares of standardized one-hot targets, lr 0.2, wd 1e-2.  Any other data and network
can be named in the configuration.  Every run ends with some steps at a tenth of the rate and without weight decay, so
that the iterates settle where they are: what is compared then is two minima.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ...report.charts import Chart
from .._framework.claims import Claim, comparison, control, in_the_median, inequality, labelled, under
from .._framework.fits import mean_interval, spearman
from .._framework.observe import Array, Quantity, joined, run
from .._framework.study import Job
from .._shared.data import demand
from .._shared.networks import Variant
from .config import Config
from .quantities import LABELS

PART = "The generalization benefit"
BN, CONV = "benefit", "benefit conv"


def variants(config: Config, seed: int) -> dict[str, Variant]:
    """The run "benefit" and its relatives, with a training set and a start of their own for each seed."""
    base = Variant(
        config.network,
        config.norm,
        "next token" if config.network == "language" else "half squares",
        learning_rate=config.benefit_rate,
        weight_decay=config.benefit_decay,
        steps=config.benefit_steps,
        cooling=config.benefit_steps // 4,
        seed=config.first_seed + seed,
        every=config.benefit_every,
        train=config.examples,
        test=config.tests,
        data=config.data,
        width=config.width,
        invariant=config.invariant,
        chunk=config.chunk or None,
        device=config.device,
        dtype=config.dtype,
    )
    still: dict[str, Any] = {"weight_decay": 0.0, "every": 2 * config.benefit_every}
    plain = replace(base, norm="none")
    out = {
        BN: base,
        f"{BN}, no decay": replace(base, **still),
        f"{BN}, norm only": replace(base, norm_only=True, every=2 * config.benefit_every),
        f"{BN}, no normalization": replace(plain, every=2 * config.benefit_every),
        f"{BN}, no normalization, no decay": replace(plain, **still),
    }
    if config.ablations:
        conv = replace(base, net="conv", dtype="float32")
        batches = replace(base, batch=max(config.examples // 3, 1))
        out |= {
            f"{BN}, on the sphere": replace(base, rmsprop=True),
            f"{BN}, batches": batches,
            f"{BN}, batches, no decay": replace(batches, **still),
            CONV: conv,
            f"{CONV}, no decay": replace(conv, **still),
        }
    return out


def jobs(config: Config) -> list[Job]:
    """The runs under every seed.

    Raises:
        Unusable: the files of the data are missing.
    """
    demand(config.data)
    return [
        variant.job(f"{name}, seed {seed}" if seed else name)
        for seed in range(config.benefit_seeds)
        for name, variant in variants(config, seed).items()
    ]


def settled(name: str, column: str) -> Quantity:
    """A column at the end of a run, where it has cooled."""
    return run(name)[column].last()


def warm(name: str, column: str) -> Quantity:
    """A column at the last row before a run cools, after four fifths of its steps."""
    return run(name).where("step", lambda step: step <= 0.8 * step.max())[column].last()


def points(name: str, other: str, when: Callable[[str, str], Quantity] = settled) -> Quantity:
    """Test accuracy of a run above that of another, in points of a hundred."""
    return 100 * (when(name, "test_accuracy") - when(other, "test_accuracy"))


def factor(name: str, column: str) -> Quantity:
    """The factor by which a column is smaller at the end with weight decay than without."""
    return settled(f"{name}, no decay", column) / settled(name, column)


def points_at_equal_loss(name: str, other: str) -> Quantity:
    """Points of test accuracy at the end of a run above those of another where its training loss was nearest."""
    end = joined(settled(name, "midpoint_loss"), settled(name, "test_accuracy"))
    path = run(other).reduce(lambda loss, accuracy: np.concatenate([loss, accuracy]), "midpoint_loss", "test_accuracy")

    def difference(numbers: Array) -> float:
        (loss, accuracy), (losses, accuracies) = numbers[:2], np.split(numbers[2:], 2)
        return 100 * float(accuracy - accuracies[np.abs(np.log(losses / loss)).argmin()])

    return joined(end, path).reduce(difference)


def mean(quantity: Quantity) -> Quantity:
    """The interval of the mean over all seeds, of 95 %."""
    return quantity.over_repeats(lambda v: np.array(mean_interval(v)))


def fraction_above(quantity: Quantity) -> Quantity:
    """The fraction of seeds on which a quantity is above zero."""
    return quantity.over_repeats(lambda v: np.mean(v > 0))


def pair(label: str, name: str) -> tuple[Claim, ...]:
    """The claims on a run with weight decay and its twin without."""
    gain = points(name, f"{name}, no decay")
    return (
        comparison(
            f"{label}: weight decay raises test accuracy (points, interval of the mean over seeds)", mean(gain) >= 0
        ),
        comparison(f"{label}: … on nearly every seed (fraction of seeds)", fraction_above(gain) >= 0.9),
        *in_the_median(
            comparison(
                f"{label}: weight decay reduces sharpness (λ1 without over with)",
                factor(name, "spherical_sharpness") >= 2,
            )
        ),
    )


NONE = f"{BN}, no normalization"
ALONG = run(BN).where("step", lambda step: step >= 10).reduce(spearman, "spherical_sharpness", "test_loss")
BEST = 100 * (settled(BN, "test_accuracy") - run(f"{BN}, no decay")["test_accuracy"].max())

PENALTY = (
    "It does, as a penalty on the norm, and by about as much.  A gain by itself does not tell sharpness reduction; that"
    " it is gone where the norm alone decays does."
)

CLAIMS = under(
    PART,
    *pair("Full batch", BN),
    comparison(
        "Full batch: … also where the run without it had the same training loss (points, interval of the mean)",
        mean(points_at_equal_loss(BN, f"{BN}, no decay")) >= 0,
        note="One run has come to this loss at a flat place, the other at a sharp one.",
    ),
    comparison(
        "Full batch: … and above the best that the run without weight decay has on its path (points, interval)",
        mean(BEST) >= 0,
        deciding=False,
        note="Stopping early, at the moment that is best for these very test images, is not all of the benefit.",
    ),
    *in_the_median(
        inequality(
            "Test loss falls with sharpness along the path (their rank correlation from step 10 on)", ALONG >= 0.5
        ),
        inequality(
            "All fit the training set: loss at the end, with weight decay", settled(BN, "midpoint_loss") <= 1e-2
        ),
    ),
    control(
        "Weight decay that changes the norm alone does nothing (points above no weight decay, the farthest seed)",
        points(f"{BN}, norm only", f"{BN}, no decay").over_repeats(lambda v: v[np.abs(v).argmax()]).within(-0.75, 0.75),
        note="The learning rate falls with the square of the norm, so that the effective one is that without weight"
        " decay.  The directions are then the same but for rounding.",
    ),
    control(
        "… and does not reduce sharpness (λ1 over that without weight decay, the farthest seed from 1)",
        (settled(f"{BN}, norm only", "spherical_sharpness") / settled(f"{BN}, no decay", "spherical_sharpness"))
        .over_repeats(lambda v: v[np.abs(v - 1).argmax()])
        .within(0.8, 1.25),
    ),
    *(
        comparison(
            f"Without normalization weight decay does not raise test accuracy ({label}; points, interval of the mean)",
            mean(points(NONE, f"{NONE}, no decay", when)) <= 0,
            deciding=False,
            note=note,
        )
        for label, when, note in (
            ("while it acts", warm, PENALTY),
            ("when it has ended and the run has cooled", settled, "A penalty that has ended is forgotten in part."),
        )
    ),
    *(
        comparison(
            f"The gain with normalization is greater than that without ({label}; points, interval of the mean)",
            mean(points(BN, f"{BN}, no decay", when) - points(NONE, f"{NONE}, no decay", when)) >= 0,
            deciding=False,
        )
        for label, when in (("while weight decay acts", warm), ("when it has ended", settled))
    ),
    *in_the_median(
        comparison(
            "Without normalization weight decay does not reduce sharpness (λ1 without over with)",
            factor(NONE, "sharpness") <= 1.1,
            deciding=False,
        ),
    ),
    comparison(
        "Normalized with weight decay is better than not normalized with weight decay (points, interval)",
        mean(points(BN, NONE)) >= 0,
        deciding=False,
    ),
    comparison(
        "The adaptive rate at a fixed norm has the benefit, without weight decay (points, interval of the mean)",
        mean(points(f"{BN}, on the sphere", f"{BN}, no decay")) >= 0,
    ),
    *pair("Mini-batches of a third", f"{BN}, batches"),
    *pair("A convolutional network", CONV),
)

CHARTS = under(
    PART,
    *labelled(
        LABELS | {"test_accuracy": "fraction of the test set", "test_loss": "loss on the test set"},
        Chart(
            "benefit-accuracy",
            "Test accuracy with and without weight decay",
            x="step",
            y="test_accuracy",
            runs=(BN, f"{BN}, no decay", f"{BN}, norm only", f"{BN}, no normalization", CONV, f"{CONV}, no decay"),
            log="x",
            caption="With weight decay it goes on rising for thousands of steps after the fit; without it falls while"
            " the training loss does.",
        ),
        Chart(
            "benefit-loss",
            "Test loss on real data",
            x="step",
            y="test_loss",
            runs=(BN, f"{BN}, no decay", f"{BN}, norm only", f"{BN}, no normalization"),
            log="y",
            caption="A batch-normalized network with weight decay (benefit) and without; where the norm alone decays"
            " the curve is that without weight decay.",
            rank=2,
        ),
        Chart(
            "benefit-sharpness",
            "Spherical sharpness with and without weight decay",
            x="step",
            y="spherical_sharpness",
            runs=(BN, f"{BN}, no decay", f"{BN}, norm only", f"{BN}, on the sphere"),
            log="y",
        ),
        Chart(
            "benefit-test-loss",
            "Test loss against spherical sharpness along the path",
            x="spherical_sharpness",
            y="test_loss",
            runs=(BN, f"{BN}, no decay", CONV, f"{CONV}, no decay"),
            log="xy",
        ),
    ),
)
