"""A small regression network, where flatness pays, and one change at a time.

20→48→48→1, batch normalization, tanh, a fixed readout; 80 training points of a smooth function.  Curvature, test error
and τ are read at midpoints of consecutive iterates.
"""

from dataclasses import replace
from typing import Any

from ...report.charts import Chart
from .._framework.claims import Claim, comparison, control, in_the_median, inequality, labelled, scaling, under
from .._framework.observe import Quantity, run
from .._framework.study import Job
from .._shared.networks import Variant
from .config import Config
from .quantities import LABELS, fall, relative_difference

PART = "A regression network and its ablations"
NORMS = ("LN", "RMSNorm", "GN", "WN")

BURSTING_SEEDS = 3
"""Group normalization bursts away from the edge now and then: it runs under at least so many seeds."""

BURSTING_LATE = "WN"
AFTER_A_BURST = (
    "A burst away from the edge, which comes to most runs between τ = 2.5 and 3.8, leaves the law for a while: what is"
    " left of it at τ = 4 is chance.  At τ = 2, before it, the claim is decided on."
)


def variants(config: Config, seed: int) -> dict[str, Variant]:
    """The base run "BN" and its relatives, under one seed for weights and data, counted from the first."""
    base = Variant(
        "regression",
        "BN",
        "squares",
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        tau=4,
        seed=config.first_seed + seed,
        every=config.network_every,
    )
    none = replace(base, norm="none", learning_rate=config.learning_rate / 10, tau=0, steps=8000, every=200)
    out = {
        "BN": replace(base, tau=config.network_tau, every=min(100, config.network_every)),
        "BN, smaller il": replace(
            base, weight_decay=config.weight_decay / config.smaller, every=2 * config.network_every
        ),
        "soft labels": replace(base, loss="soft labels"),
        "batches of 40": replace(base, batch=40),
        **{norm: replace(base, norm=norm) for norm in NORMS},
    }
    if config.ablations:
        out["hard labels"] = replace(base, loss="hard labels")
    frozen: dict[str, Any] = {"weight_decay": 0.0, "tau": 0, "steps": 3000, "every": 200}
    out |= {f"{name}, no decay": replace(v, **frozen) for name, v in out.items() if name != "BN, smaller il"}
    out |= {
        "RMSprop on the sphere": replace(base, rmsprop=True),
        "heavy ball 0.5": replace(base, momentum=0.5),
        "no normalization": none,
        "no normalization, no decay": replace(none, weight_decay=0.0),
    }
    if config.ablations:
        out |= {"batches of 20": replace(base, batch=20), "heavy ball 0.9": replace(base, momentum=0.9)}
    return out


def jobs(config: Config) -> list[Job]:
    return [
        variant.job(f"{name}, seed {seed}" if seed else name)
        for seed in range(max(config.network_seeds, BURSTING_SEEDS))
        for name, variant in variants(config, seed).items()
        if seed < config.network_seeds or name == "GN"
    ]


def over_no_decay(name: str, column: str, tau: float = 4) -> Quantity:
    """A column at a time τ over its last value in the run without weight decay."""
    return run(name).at(tau=tau)[column] / run(f"{name}, no decay")[column].last()


def unnormalized(column: str) -> Quantity:
    """Last value of a column without normalization: that with weight decay over that without."""
    return run("no normalization")[column].last() / run("no normalization, no decay")[column].last()


def norm_claims(norm: str) -> tuple[Claim, ...]:
    """Claims on a normalization other than BN."""
    return (
        inequality(
            f"{norm}: the run sits at the edge (η̃λ1 over τ from 1 to 4, mean)",
            run(norm).between(tau=(1, 4))["eta_lambda"].mean().within(1.9, 2.5),
        ),
        comparison(
            f"{norm}: weight decay reduces sharpness (λ1 at τ = 4 over that without)",
            over_no_decay(norm, "spherical_sharpness") <= 0.4,
            deciding=norm != BURSTING_LATE,
            note=AFTER_A_BURST if norm == BURSTING_LATE else "",
        ),
        comparison(
            f"{norm}: … and the test error (at τ = 4 over that without)",
            over_no_decay(norm, "test_loss") <= 1,
            deciding=False,
            note="Flatter is not always better: reported, not decided on.",
        ),
    )


EARLY = comparison(
    f"{BURSTING_LATE}: weight decay reduces sharpness (λ1 at τ = 2 over that without)",
    over_no_decay(BURSTING_LATE, "spherical_sharpness", tau=2) <= 0.4,
)
AT_THE_EDGE = run("BN").between(tau=(1, 6))["eta_lambda"]
FROZEN = run("BN, no decay")["spherical_sharpness"]

CLAIMS = under(
    PART,
    *in_the_median(
        inequality(
            "With BN and weight decay the run sits at the edge (η̃λ1 over τ from 1 to 6, mean)",
            AT_THE_EDGE.mean().within(1.9, 2.5),
        ),
        inequality(
            "With BN and weight decay the run sits at the edge (η̃λ1 over τ from 1 to 6, the farthest from 2.2)",
            AT_THE_EDGE.farthest_from(2.2).within(1.9, 2.5),
            deciding=False,
            note="The law is about the mean over the oscillation; the largest of a hundred readings is beyond 2.5 in"
            " about half of all runs.",
        ),
        inequality(
            "λ1 falls up to τ = 1 (by the factor)",
            run("BN")["spherical_sharpness"].first() / run("BN").at(tau=1)["spherical_sharpness"] >= 5,
        ),
        inequality("λ1 falls on from τ = 1 to 2 (by the factor)", fall("BN", 1, 2) >= 1.5),
        comparison(
            "Weight decay improves generalization (test error at τ = 4 over that without)",
            over_no_decay("BN", "test_loss") <= 0.7,
        ),
        comparison(
            "The test error falls on long after the fit (at τ = 6 over that at τ = 1)",
            run("BN").at(tau=6)["test_loss"] / run("BN").at(tau=1)["test_loss"] <= 0.95,
        ),
        scaling(
            "λ1 depends on τ alone (largest relative difference at τ = 1, 2, 3, 4 under a smaller il)",
            relative_difference("BN", "BN, smaller il", 1, 2, 3, 4) <= 0.1,
        ),
        control(
            "Without weight decay λ1 freezes (largest relative change over the second half)",
            abs(FROZEN.second_half() / FROZEN.last() - 1).max() <= 1e-3,
        ),
        control(
            "Without weight decay the minimum is sharper (λ1 over that with weight decay at τ = 4)",
            FROZEN.last() / run("BN").at(tau=4)["spherical_sharpness"] >= 5,
        ),
        *(claim for norm in NORMS for claim in norm_claims(norm)),
        EARLY,
        inequality(
            "Cross-entropy on soft labels: the run sits at the edge (η̃λ1 over τ from 1 to 4, mean)",
            run("soft labels").between(tau=(1, 4))["eta_lambda"].mean().within(1.9, 2.5),
        ),
        comparison(
            "Cross-entropy on soft labels: weight decay reduces sharpness (λ1 at τ = 4 over that without)",
            over_no_decay("soft labels", "spherical_sharpness") <= 0.2,
            deciding=False,
            note="Late runs burst, and a reading may fall into a burst: what decides is the median of many.",
        ),
        comparison(
            "Cross-entropy on soft labels: weight decay reduces sharpness (median λ1 of τ = 2 to 4 over that without)",
            run("soft labels").between(tau=(2, 4))["spherical_sharpness"].median()
            / run("soft labels, no decay")["spherical_sharpness"].last()
            <= 0.2,
        ),
        inequality(
            "Cross-entropy on hard labels: η̃λ1 at τ = 4, as the loss and its sharpness vanish together",
            run("hard labels").at(tau=4)["eta_lambda"].within(1.8, 2.6),
            deciding=False,
        ),
        comparison(
            "Scalar RMSprop on the sphere takes the same way (largest relative difference of λ1 at τ = 1, 2, 4)",
            relative_difference("BN", "RMSprop on the sphere", 1, 2, 4) <= 0.2,
            deciding=False,
        ),
        comparison(
            "Heavy ball 0.5 moves the edge to 3 (η̃λ1/3 at τ = 2, 4, the farthest from 1)",
            (run("heavy ball 0.5").at(tau=(2, 4))["eta_lambda"].farthest_from(3) / 3).within(0.9, 1.2),
            deciding=False,
        ),
        comparison(
            "Mini-batches of 40: weight decay reduces sharpness (λ1 at τ = 4 over that without)",
            over_no_decay("batches of 40", "spherical_sharpness") <= 1 / 3,
            deciding=False,
        ),
        inequality(
            "Mini-batches of 40 stay below the edge (η̃λ1 at τ = 4)",
            run("batches of 40").at(tau=4)["eta_lambda"] <= 2,
            deciding=False,
        ),
        comparison(
            "Mini-batches of 20 stay further below (η̃λ1 at τ = 4 over that of batches of 40)",
            run("batches of 20").at(tau=4)["eta_lambda"] / run("batches of 40").at(tau=4)["eta_lambda"] <= 1,
            deciding=False,
        ),
        control(
            "Without normalization the run stays off the edge (greatest lr·λ1)",
            run("no normalization")["eta_lambda"].max() <= 1,
        ),
        control(
            "Without normalization weight decay does not reduce sharpness (λ1 with weight decay over without)",
            unnormalized("sharpness") >= 0.9,
        ),
        comparison(
            "Without normalization weight decay still helps the test error (with it over without)",
            unnormalized("test_loss") <= 1,
            deciding=False,
            note="What weight decay gains by itself, without any sharpness reduction.",
        ),
    ),
)

CHARTS = under(
    PART,
    *labelled(
        LABELS,
        Chart(
            "network-sharpness",
            "Spherical sharpness at equal τ",
            x="tau",
            y="spherical_sharpness",
            runs=("BN", "BN, smaller il", *NORMS),
            log="y",
            caption="Batch normalization at two intrinsic rates: one curve. LN, GN and WN leave it in bursts and"
            " return.",
        ),
        Chart(
            "network-edge",
            "Distance to the edge",
            x="tau",
            y="eta_lambda",
            runs=("BN", "BN, smaller il", "LN", "batches of 40", "heavy ball 0.5"),
            log="y",
            lines=((2.0, "edge of stability"), (3.0, "edge with momentum 0.5")),
        ),
        Chart(
            "network-decay",
            "Spherical sharpness with and without weight decay",
            x="step",
            y="spherical_sharpness",
            runs=("BN", "BN, no decay", "LN", "LN, no decay"),
            log="y",
            caption="A regression network with batch (BN) or layer normalization (LN): with weight decay the run stays"
            " at the edge of stability, and the minimum becomes flatter; without it nothing moves.",
            rank=1,
        ),
        Chart(
            "network-test",
            "Test error with and without weight decay",
            x="step",
            y="test_loss",
            runs=("BN", "BN, no decay", "LN", "LN, no decay", "no normalization", "no normalization, no decay"),
            log="y",
            caption="The test error falls with the sharpness, long after the training data are fitted.",
        ),
    ),
)
