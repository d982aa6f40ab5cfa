"""Handwritten digits: an MLP and a convolutional network, scale-invariant in all weights.

The reference is the MLP with batch normalization, 500 images, squares of standardized one-hot targets, lr 0.2,
wd 5e-4.  Flatness changes a lot here, accuracy hardly at all, and both are reported as they are.
"""

import math
from dataclasses import replace

from ...report.charts import Chart
from .._framework.claims import comparison, control, inequality, labelled, scaling, under
from .._framework.fits import spearman
from .._framework.observe import Quantity, run
from .._framework.study import Job
from .._shared.forecast import Forecast, claims, runs
from .._shared.networks import Variant
from .config import Config
from .quantities import LABELS, fall, relative_difference

PART = "Handwritten digits"
FORECAST, FORECAST_FROM = "forecast of digits BN", 1000


def variants(config: Config) -> dict[str, Variant]:
    """The reference run "digits BN" (il = 1e-4) and its relatives, most of them at twice its intrinsic rate."""
    n, every = config.digits_steps, config.digits_every
    base = Variant(
        "mlp",
        "BN",
        "half squares",
        learning_rate=0.2,
        weight_decay=5e-4,
        steps=n,
        every=every,
        seed=config.first_seed,
    )
    fast = replace(base, weight_decay=1e-3, steps=n // 2)
    wide = replace(fast, learning_rate=1.0, weight_decay=2e-4)  # the same il, for losses with small gradients
    still = replace(base, weight_decay=0.0, steps=n // 2, every=4 * every)
    conv = replace(fast, net="conv", weight_decay=2e-3, train=250)
    none = replace(base, norm="none", steps=n // 2)
    out = {
        "BN": base,
        "BN, larger il": fast,
        "BN, no decay": still,
        "LN": replace(fast, norm="LN"),
        "RMSNorm": replace(fast, norm="RMSNorm"),
        "GN": replace(fast, norm="GN"),
        "WN": replace(wide, norm="WN"),
        "cross-entropy": replace(wide, loss="cross-entropy"),
        "batches of 250": replace(fast, batch=250),
        "heavy ball 0.5": replace(fast, momentum=0.5),
        "RMSprop on the sphere": replace(fast, rmsprop=True),
        "no normalization": none,
        "no normalization, no decay": replace(none, weight_decay=0.0),
        "conv BN": conv,
        "conv BN, no decay": replace(conv, weight_decay=0.0, steps=n // 4, every=2 * every),
    }
    if config.ablations:
        out |= {f"{norm}, no decay": replace(still, norm=norm) for norm in ("LN", "RMSNorm", "GN")}
        out |= {f"conv {norm}": replace(conv, norm=norm) for norm in ("LN", "RMSNorm", "GN")}
        out["conv WN"] = replace(conv, norm="WN", learning_rate=1.0, weight_decay=4e-4)
        out["conv no normalization"] = replace(conv, norm="none")
    return {f"digits {name}": variant for name, variant in out.items()}


def jobs(config: Config) -> list[Job]:
    trained = variants(config)
    forecast = Forecast(trained["digits BN"], FORECAST_FROM, config.forecast_steps)
    return [*(variant.job(name) for name, variant in trained.items()), forecast.job(FORECAST)]


def digits(*names: str) -> tuple[str, ...]:
    """Names of the runs of variants."""
    return tuple(f"digits {name}" for name in names)


FALLS = (
    # label, run, from τ, to τ, least factor
    ("BN", "BN", 0.02, 0.29, 1.3),
    ("LN", "LN", 0.04, 0.29, 1.3),
    ("RMSNorm", "RMSNorm", 0.04, 0.29, 1.3),
    ("GN", "GN", 0.04, 0.29, 1.3),
    ("WN", "WN", 0.04, 0.29, 1.1),
    ("Cross-entropy", "cross-entropy", 0.04, 0.29, 1.3),
    ("Mini-batches of 250", "batches of 250", 0.04, 0.29, 1.3),
    ("Heavy ball 0.5", "heavy ball 0.5", 0.08, 0.56, 1.3),
    ("Scalar RMSprop on the sphere", "RMSprop on the sphere", 0.04, 0.29, 1.3),
    ("Convolutions with BN", "conv BN", 0.12, 0.52, 1.3),
    ("Convolutions with LN", "conv LN", 0.12, 0.52, 1.3),
    ("Convolutions with RMSNorm", "conv RMSNorm", 0.12, 0.52, 1.3),
    ("Convolutions with GN", "conv GN", 0.12, 0.52, 1.3),
    ("Convolutions with WN", "conv WN", 0.12, 0.52, 1.1),
)
SLOW = "WN"
SCATTERED = (
    "It falls by a tenth only, and what two single readings of an oscillating run say of that scatters.  The law gives"
    " the sign, which is decided on below."
)
WITHOUT_DECAY = (("BN", "BN"), ("Convolutions with BN", "conv BN"), ("LN", "LN"), ("GN", "GN"))  # label, run


def late_fall(name: str) -> Quantity:
    """Factor by which the spherical sharpness of a run falls over the second half of its steps.

    Rows are dense at the start, so that half of them are not half of the steps.
    """
    late = run(name).where("step", lambda step: step >= step.max() / 2)["spherical_sharpness"]
    return late.first() / late.last()


ACCURACY = run("digits BN")["test_accuracy"].last()

CLAIMS = under(
    PART,
    inequality(
        "BN: the run sits at the edge from τ = 0.02 on (η̃λ1)",
        run("digits BN").between(tau=(0.02, math.inf))["eta_lambda"].extent().within(1.9, 2.5),
    ),
    *(
        inequality(
            f"{label}: λ1 falls from τ = {start} to {end} (by the factor)",
            fall(f"digits {name}", start, end) >= factor,
            deciding=name != SLOW,
            note=SCATTERED if name == SLOW else "",
        )
        for label, name, start, end, factor in FALLS
    ),
    inequality(
        "WN: λ1 falls (rank correlation with τ, from τ = 0.04 on)",
        run(f"digits {SLOW}").between(tau=(0.04, math.inf)).reduce(spearman, "tau", "spherical_sharpness") <= -0.8,
    ),
    scaling(
        "BN: λ1 depends on τ alone (largest relative difference at τ = 0.1, 0.2, 0.29 under twice the il)",
        relative_difference("digits BN", "digits BN, larger il", 0.1, 0.2, 0.29) <= 0.1,
    ),
    comparison(
        "BN: test accuracy while λ1 falls (at the end minus at τ = 0.02)",
        ACCURACY - run("digits BN").at(tau=0.02)["test_accuracy"] >= 0,
        deciding=False,
        note="On this task flatness changes a lot and accuracy hardly at all.",
    ),
    comparison(
        "BN: weight decay against none (test accuracy at the end, difference)",
        ACCURACY - run("digits BN, no decay")["test_accuracy"].last() >= 0,
        deciding=False,
    ),
    *(
        control(
            f"{label}, without weight decay: λ1 does not fall (factor over the second half)",
            late_fall(f"digits {name}, no decay") <= 1.05,
        )
        for label, name in WITHOUT_DECAY
    ),
    control(
        "Without normalization the run is off the edge most of the time (median lr·λ1)",
        run("digits no normalization")["eta_lambda"].median() <= 1.9,
    ),
    comparison(
        "Without normalization the run stays off the edge (greatest lr·λ1)",
        run("digits no normalization")["eta_lambda"].max() <= 1.9,
        deciding=False,
        note="Sharpness rises without normalization, too, and on some seeds it comes to the edge by the end.",
    ),
    control(
        "Without normalization weight decay does not reduce sharpness (λ1 with weight decay over without)",
        run("digits no normalization")["sharpness"].last()
        / run("digits no normalization, no decay")["sharpness"].last()
        >= 0.9,
    ),
    *claims(FORECAST),
)

CHARTS = under(
    PART,
    *labelled(
        LABELS,
        Chart(
            "digits-sharpness",
            "Spherical sharpness at equal τ",
            x="tau",
            y="spherical_sharpness",
            runs=digits("BN", "BN, larger il", "LN", "RMSNorm", "GN", "conv BN"),
            log="y",
        ),
        Chart(
            "digits-threshold",
            "Sharpness rides on the threshold",
            x="step",
            y="spherical_sharpness",
            runs=digits("BN", "BN, no decay"),
            log="y",
            beside=(("spherical_threshold", "2/η̃"),),
            caption="Spherical sharpness beside 2/η̃, at which it is at the edge. Weight decay lowers 2/η̃, and λ1"
            " follows.",
        ),
        Chart(
            "digits-edge",
            "Distance to the edge",
            x="tau",
            y="eta_lambda",
            runs=digits("BN", "BN, larger il", "LN", "conv BN", "cross-entropy", "no normalization"),
            log="y",
            lines=((2.0, "edge of stability"),),
            caption="Without normalization: lr·λ1 of the plain Hessian.",
        ),
        Chart(
            "digits-forecast",
            "A forecast: spherical sharpness",
            x="step",
            y="spherical_sharpness",
            runs=runs(FORECAST),
            x_label=f"steps after step {FORECAST_FROM}",
            caption="The optimizer's averaged weights, the central flow that predicts them, and the flow without Σ.",
        ),
        Chart(
            "digits-forecast-loss",
            "A forecast: training loss averaged over the oscillation",
            x="step",
            y="loss",
            runs=runs(FORECAST),
            x_label=f"steps after step {FORECAST_FROM}",
        ),
        Chart(
            "digits-loss",
            "Training loss of the iterates",
            x="step",
            y="loss",
            runs=digits("BN", "BN, no decay", "LN", "no normalization"),
            log="y",
        ),
        Chart(
            "digits-accuracy",
            "Test accuracy",
            x="step",
            y="test_accuracy",
            runs=digits("BN", "BN, no decay", "LN", "no normalization"),
            log="x",
        ),
        Chart(
            "digits-norm",
            "Norm of the weights",
            x="step",
            y="radius",
            runs=digits("BN", "BN, larger il", "BN, no decay"),
            caption="At the edge the squared norm is a sharpness meter: ‖w‖² = lr λ1/2.",
        ),
    ),
)
