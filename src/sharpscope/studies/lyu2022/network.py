"""A small regression network, where flatness pays, and one change at a time.

20→48→48→1, batch normalization, tanh, a fixed readout; 80 training points of a smooth function.  Curvature, test error
and τ are read at midpoints of consecutive iterates.
"""

from dataclasses import replace
from typing import Any

from ...report.charts import Chart
from .._framework.claims import Claim, at_least, at_most, median, within
from .._framework.observe_runs import apart, drift, extreme, fall, farthest, over_seeds, peak, ratio, value
from .._framework.study import Job
from .._shared.networks import Variant
from .config import Config

PART = "A regression network and its ablations"
NORMS = ("LN", "RMSNorm", "GN", "WN")

BURSTING_SEEDS = 3
"""Group normalization bursts away from the edge now and then: it runs under at least so many seeds."""


def variants(config: Config, seed: int) -> dict[str, Variant]:
    """The base run "BN" and its relatives, under one seed for weights and data, counted from the first."""
    base = Variant(
        "regression",
        "BN",
        "squares",
        config.learning_rate,
        config.weight_decay,
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
    out = []
    for seed in range(max(config.network_seeds, BURSTING_SEEDS)):
        for name, variant in variants(config, seed).items():
            if seed < config.network_seeds or name == "GN":
                out.append(variant.job(f"{name}, seed {seed}" if seed else name))
    return out


def _claim(sentence: str, reading: Any, criterion: Any, kind: str, *runs: str, **more: Any) -> Claim:
    """A reading of the first run named, decided on the median over seeds."""
    return Claim(sentence, over_seeds(reading, *runs), median(criterion), kind, PART, runs, **more)


def _without(name: str, column: str, tau: float | None = 4) -> Any:
    """A column at τ over that of the run without weight decay."""
    return ratio(value(name, column, tau), value(f"{name}, no decay", column))


def _norm_claims(norm: str) -> tuple[Claim, ...]:
    runs = (norm, f"{norm}, no decay")
    return (
        _claim(
            f"{norm}: the run sits at the edge (η̃λ1 at τ = 1, 2, 4, the farthest from 2)",
            farthest(norm, 1, 2, 4),
            within(1.8, 2.6),
            "inequality",
            norm,
        ),
        _claim(
            f"{norm}: weight decay reduces sharpness (λ1 at τ = 4 over that without)",
            _without(norm, "spherical_sharpness"),
            at_most(0.4),
            "comparison",
            *runs,
        ),
        _claim(
            f"{norm}: … and the test error (at τ = 4 over that without)",
            _without(norm, "test_loss"),
            at_most(1),
            "comparison",
            *runs,
            deciding=False,
            note="Flatter is not always better: reported, not decided on.",
        ),
    )


CLAIMS = (
    _claim(
        "With BN and weight decay the run sits at the edge (η̃λ1 over τ from 1 to 6, the farthest from 2.2)",
        extreme("BN", "eta_lambda", 1, 6, centre=2.2),
        within(1.9, 2.5),
        "inequality",
        "BN",
    ),
    _claim("λ1 falls up to τ = 1 (by the factor)", fall("BN", 1), at_least(5), "inequality", "BN"),
    _claim("λ1 falls on from τ = 1 to 2 (by the factor)", fall("BN", 2, 1), at_least(1.5), "inequality", "BN"),
    _claim(
        "Weight decay improves generalization (test error at τ = 4 over that without)",
        _without("BN", "test_loss"),
        at_most(0.7),
        "comparison",
        "BN",
        "BN, no decay",
    ),
    _claim(
        "The test error falls on long after the fit (at τ = 6 over that at τ = 1)",
        ratio(value("BN", "test_loss", 6), value("BN", "test_loss", 1)),
        at_most(0.95),
        "comparison",
        "BN",
    ),
    _claim(
        "λ1 depends on τ alone (largest relative difference at τ = 1, 2, 3, 4 under a smaller il)",
        apart("BN", "BN, smaller il", 1, 2, 3, 4),
        at_most(0.1),
        "scaling",
        "BN",
        "BN, smaller il",
    ),
    _claim(
        "Without weight decay λ1 freezes (largest relative change over the second half)",
        drift("BN, no decay"),
        at_most(1e-3),
        "negative control",
        "BN, no decay",
    ),
    _claim(
        "Without weight decay the minimum is sharper (λ1 over that with weight decay at τ = 4)",
        ratio(value("BN, no decay", "spherical_sharpness"), value("BN", "spherical_sharpness", 4)),
        at_least(5),
        "negative control",
        "BN, no decay",
        "BN",
    ),
    *(claim for norm in NORMS for claim in _norm_claims(norm)),
    _claim(
        "Cross-entropy on soft labels: the run sits at the edge (η̃λ1 at τ = 1, 2, 4, the farthest from 2)",
        farthest("soft labels", 1, 2, 4),
        within(1.8, 2.6),
        "inequality",
        "soft labels",
    ),
    _claim(
        "Cross-entropy on soft labels: weight decay reduces sharpness (λ1 at τ = 4 over that without)",
        _without("soft labels", "spherical_sharpness"),
        at_most(0.2),
        "comparison",
        "soft labels",
        "soft labels, no decay",
    ),
    _claim(
        "Cross-entropy on hard labels: η̃λ1 at τ = 4, as the loss and its sharpness vanish together",
        value("hard labels", "eta_lambda", 4),
        within(1.8, 2.6),
        "inequality",
        "hard labels",
        deciding=False,
    ),
    _claim(
        "Scalar RMSprop on the sphere takes the same way (largest relative difference of λ1 at τ = 1, 2, 4)",
        apart("BN", "RMSprop on the sphere", 1, 2, 4),
        at_most(0.2),
        "comparison",
        "BN",
        "RMSprop on the sphere",
        deciding=False,
    ),
    _claim(
        "Heavy ball 0.5 moves the edge to 3 (η̃λ1/3 at τ = 2, 4, the farthest from 1)",
        lambda h, seed: farthest("heavy ball 0.5", 2, 4, centre=3.0)(h, seed) / 3,
        within(0.9, 1.2),
        "comparison",
        "heavy ball 0.5",
        deciding=False,
    ),
    _claim(
        "Mini-batches of 40: weight decay reduces sharpness (λ1 at τ = 4 over that without)",
        _without("batches of 40", "spherical_sharpness"),
        at_most(1 / 3),
        "comparison",
        "batches of 40",
        "batches of 40, no decay",
        deciding=False,
    ),
    _claim(
        "Mini-batches of 40 stay below the edge (η̃λ1 at τ = 4)",
        value("batches of 40", "eta_lambda", 4),
        at_most(2),
        "inequality",
        "batches of 40",
        deciding=False,
    ),
    _claim(
        "Mini-batches of 20 stay further below (η̃λ1 at τ = 4 over that of batches of 40)",
        ratio(value("batches of 20", "eta_lambda", 4), value("batches of 40", "eta_lambda", 4)),
        at_most(1),
        "comparison",
        "batches of 20",
        "batches of 40",
        deciding=False,
    ),
    _claim(
        "Without normalization the run stays off the edge (greatest lr·λ1)",
        peak("no normalization", "eta_lambda"),
        at_most(1),
        "negative control",
        "no normalization",
    ),
    _claim(
        "Without normalization weight decay does not reduce sharpness (λ1 with weight decay over without)",
        ratio(value("no normalization", "sharpness"), value("no normalization, no decay", "sharpness")),
        at_least(0.9),
        "negative control",
        "no normalization",
        "no normalization, no decay",
    ),
    _claim(
        "Without normalization weight decay still helps the test error (with it over without)",
        ratio(value("no normalization", "test_loss"), value("no normalization, no decay", "test_loss")),
        at_most(1),
        "comparison",
        "no normalization",
        "no normalization, no decay",
        deciding=False,
        note="What weight decay gains by itself, without any sharpness reduction.",
    ),
)


def _chart(name: str, title: str, x: str, y: str, y_label: str, *runs: str, **more: Any) -> Chart:
    x_label = "τ = lr · wd · steps" if x == "tau" else "step"
    return Chart(name, title, x, y, runs, x_label, y_label, log_y=True, part=PART, **more)


CHARTS = (
    _chart(
        "network-sharpness",
        "Spherical sharpness at equal τ",
        "tau",
        "spherical_sharpness",
        "λ1",
        "BN",
        "BN, smaller il",
        *NORMS,
        caption="Batch normalization at two intrinsic rates: one curve. LN, GN and WN leave it in bursts and return.",
    ),
    _chart(
        "network-edge",
        "Distance to the edge",
        "tau",
        "eta_lambda",
        "η̃ λ1",
        "BN",
        "BN, smaller il",
        "LN",
        "batches of 40",
        "heavy ball 0.5",
        lines=((2.0, "edge of stability"), (3.0, "edge with momentum 0.5")),
    ),
    _chart(
        "network-decay",
        "Spherical sharpness with and without weight decay",
        "step",
        "spherical_sharpness",
        "λ1",
        "BN",
        "BN, no decay",
        "LN",
        "LN, no decay",
    ),
    _chart(
        "network-test",
        "Test error with and without weight decay",
        "step",
        "test_loss",
        "mean squared error on 2000 points",
        "BN",
        "BN, no decay",
        "LN",
        "LN, no decay",
        "no normalization",
        "no normalization, no decay",
    ),
)
