"""SGD stagnates near a minimum, in as many dimensions as there are examples.

Around a minimum that fits all examples only as many directions are curved as there are examples; all others are flat.
Descent with Gaussian noise therefore stagnates at a loss that depends on the noise and on that number, however many
weights there are.  It stays near the minimum while this predicted loss is well below the depth of the basin, and leaves
once it is above.  Noise on labels hardly takes the weights out of the curved directions, and the less the weaker it is;
noise alike in all directions does, along the flat ones.  On digits the gap between training and test accuracy hardly
changes with the number of weights and rises with spectral norms over margin as labels are made random: a correlation,
for no bound is computed.

Curvatures λ_i of the minimum, step η, noise of deviation σ in each gradient entry, q_i = 1 - ηλ_i, T steps:

    V_i(T) = η²σ² (1 - q_i^{2T})/(1 - q_i²)      variance along direction i; η²σ²T where λ_i = 0
    E L - L* ≈ ½ Σ λ_i V_i(T)  →  (ησ²/2) Σ_{λ_i>0} 1/(2 - ηλ_i)

Noise of deviation s on labels moves the weights in the curved directions, in proportion to s.  What it moves along the
flat ones is of second order, the mean of products of two such displacements, and so in proportion to s²:

    squared displacement along flat directions over that along curved ones ∝ s²
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...autodiff.batched import BatchedRuns
from ...errors import InvalidValue
from ...optimizers.descend import noisy
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, inequality, labelled, scaling, under, wider_claim
from .._framework.config import demand_positive, seeds
from .._framework.fits import spearman
from .._framework.observe import run
from .._framework.study import Job, Progress
from .margins import RelabelledDigits
from .stagnation import FittedNet, Minimum

PAPER = (
    "Imaizumi & Schmidt-Hieber, On Generalization Bounds for Deep Networks Based on Loss Surface Implicit"
    " Regularization (arXiv 2201.04545)"
)
PART = "Stagnation near a minimum"
GRADIENT_NOISE, LABEL_NOISE, ISOTROPIC = "noise in gradients", "noise on labels", "isotropic noise"
WEAKER = 4  # noise on labels is divided by this for its scaling
WEAK_LABEL_NOISE = f"{LABEL_NOISE}, a quarter of it"
RANDOM_LABELS = "random labels"
BASIN = 0.02  # δ: a run has left when its loss rises by more
LITTLE = 0.003  # noise up to which the quadratic prediction has to hold
FITTED = 1e-2  # training loss; a network on digits that ends above is left out
SOME, MIDDLE = 0.2, 128  # fraction of random labels where the width varies, and width where the fraction varies
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are its full size."""

    seed: int = 0
    repeats: int = 2
    widths: tuple[int, ...] = (8, 32, 64)  # of the small network near its minimum
    examples: int = 40
    noises: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)  # σ
    replicas: int = 64
    steps: int = 1000
    label_noise: float = 0.05
    sizes: tuple[int, ...] = (32, 64, 128, 256, 512)  # widths of the networks on digits
    fractions: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of random labels, at width 128; 0.2 elsewhere
    training: int = 2500  # steps on digits

    def __post_init__(self) -> None:
        demand_positive(self, "fractions")
        if not all(0 <= fraction <= 1 for fraction in self.fractions):
            raise InvalidValue(f"fractions is {self.fractions}; a fraction is between 0 and 1")


QUICK = Config(repeats=1, widths=(8, 32), sizes=(32, 128, 256))


def jobs(config: Config) -> list[Job]:
    found = []
    for seed in seeds(config):
        for width in config.widths:
            own = {"seed": seed, "width": width, "config": config}
            cost = 1 + width * config.replicas * len(config.noises) * config.steps / 1e6
            found.append(Job(f"near a minimum, {width} neurons, seed {seed}", _near, own, cost=cost))
        for size in config.sizes:
            fractions = config.fractions if size == MIDDLE else (SOME,)
            own = {"seed": seed, "size": size, "fractions": fractions, "steps": config.training}
            cost = 1 + config.training * len(fractions) * size**2 / 5e7
            found.append(Job(f"digits, width {size}, seed {seed}", _digits, own, cost=cost))
    return found


def _near(log: RunLog, progress: Progress, seed: int, width: int, config: Config) -> None:
    """A minimum, its curvatures, and descent from it with noise in the gradients and on the labels."""
    log.resume()
    net, first = FittedNet.draw(width, config.examples, seed), seed == config.seed
    minimum = Minimum.near(net, net.start(seed))
    own = {"seed": seed, "width": width, "weights": net.size, "examples": config.examples}
    log.append(
        run="minimum",
        lowest=minimum.loss,
        sharpness=1 / minimum.rate,
        hessian_off=minimum.hessian_error(),
        rank=minimum.rank,
        **own,
    )
    progress(0.1)
    for row in minimum.noisy_descents(
        config.noises,
        runs=config.replicas,
        steps=config.steps,
        basin=BASIN,
        seed=seed,
        progress=lambda done: progress(0.1 + 0.7 * done),
    ):
        log.append(run=GRADIENT_NOISE, **row, **own)
        if first:
            name, noise, predicted = f"{width} neurons", row["noise"], row["predicted"]
            log.append(run=name, sigma=noise, rises=row["excess"], depth=predicted / BASIN, stays=row["stay"])
            log.append(run=f"{name}: predicted", sigma=noise, rises=predicted)
    progress(0.85)
    slopes = {
        LABEL_NOISE: net.with_noisy_labels(config.label_noise, seed),
        WEAK_LABEL_NOISE: net.with_noisy_labels(config.label_noise / WEAKER, seed),
        ISOTROPIC: noisy(BatchedRuns(net.losses).slope, minimum.isotropic_deviation(config.label_noise), seed),
    }
    for name, slope in slopes.items():
        seen = minimum.displacements(slope)
        log.append(run=name, even=config.examples / net.size, **seen[-1][1], **own)
        for step, row in seen if first else ():
            log.append(run=f"{name} (w = {width})", step=step, curved=row["share"], spread=row["around"])


def _digits(log: RunLog, progress: Progress, seed: int, size: int, fractions: tuple[float, ...], steps: int) -> None:
    """Networks of one width on digits, one for each fraction of random labels, side by side."""
    log.resume()
    generator = torch.Generator().manual_seed(seed)
    digits = RelabelledDigits.draw(fractions, seed, generator)
    W = digits.train(size, steps, generator, progress)
    for fraction, row in zip(fractions, digits.measure(W, size), strict=True):
        if not row["train_loss"] < FITTED:
            del row["gap"], row["complexity"]
        row |= {"seed": seed, "size": size, "weights": W.shape[1], "fraction": fraction}
        if fraction == SOME:
            log.append(run="widths", **row)
        if size == MIDDLE:
            log.append(run=RANDOM_LABELS, **row)


def _spread(noise: Array, excess: Array) -> float:
    """Greatest over least excess among widths, for the noise where that is greatest."""
    return max(excess[noise == n].max() / excess[noise == n].min() for n in np.unique(noise))


def _change(weights: Array, gap: Array) -> float:
    """Greatest over least gap, where the number of weights changes by a factor of 20 or more."""
    return gap.max() / gap.min() if weights.max() >= 20 * weights.min() else np.nan


def _outside_over_inside(fraction: Array) -> Array:
    """Squared displacement outside of the curved directions over that inside, from the fraction inside."""
    return (1 - fraction) / fraction


MINIMUM, NOISY = run("minimum"), run(GRADIENT_NOISE)
DRIFT, WEAK_DRIFT = (run(name)["share"].reduce(_outside_over_inside) for name in (LABEL_NOISE, WEAK_LABEL_NOISE))
LARGE_ISOTROPIC = run(ISOTROPIC).where("weights", lambda weights: weights >= 320)

CLAIMS = under(
    PART,
    identity(
        "At the minimum the Hessian is that of n squares, JᵀJ/n (relative error)", MINIMUM["hessian_off"].max() <= 1e-5
    ),
    inequality(
        "At most as many directions are curved as there are examples (curved directions over n)",
        (MINIMUM["rank"] / MINIMUM["examples"]).max() <= 1,
    ),
    scaling(
        "With little noise the loss rises as predicted (over the prediction, least over widths)",
        NOISY.between(noise=(0, LITTLE))["ratio"].min().within(0.8, 1.25),
    ),
    scaling(
        "With little noise the loss rises as predicted (over the prediction, greatest over widths)",
        NOISY.between(noise=(0, LITTLE))["ratio"].max().within(0.8, 1.25),
    ),
    scaling(
        "Over the step 1/λ_max it hardly depends on the number of weights (greatest over least among widths)",
        (NOISY.near(noise=LITTLE)["excess"] * MINIMUM["sharpness"]).reduce(lambda rise: rise.max() / rise.min()) <= 2,
    ),
    scaling(
        "It hardly depends on the number of weights (greatest over least rise of the loss among widths)",
        NOISY.between(noise=(0, LITTLE)).reduce(_spread, "noise", "excess") <= 2,
        deciding=False,
        note="The rise is in proportion to the step, which is smaller at a sharper minimum: about 1 of 10 seeds finds"
        " minima that differ by more than a factor of two in this.",
    ),
    comparison(
        "Where the predicted rise is below δ/5, runs stay (least share whose loss never rises by δ = 0.02)",
        NOISY.between(predicted=(0, 0.2 * BASIN))["stay"].min() >= 0.95,
    ),
    comparison(
        "Where it is above δ, they do not (greatest share)",
        NOISY.between(predicted=(BASIN, np.inf))["stay"].max() <= 0.2,
    ),
    control(
        "With noise of 0.1, far beyond that, no minimum holds its runs (greatest share that stays)",
        NOISY.near(noise=0.1)["stay"].max() <= 0.2,
    ),
    control(
        "From noise of 0.03 on, no minimum holds its runs (greatest share that stays)",
        NOISY.between(noise=(0.03, np.inf))["stay"].max() <= 0.2,
        deciding=False,
        note="Where minima are sharp the predicted rise at 0.03 is still below δ, so that some runs may stay.",
    ),
    comparison(
        "Noise on labels moves weights in n directions (share of the squared displacement, each minimum)",
        (run(LABEL_NOISE)["share"] >= 0.8).in_the_median(),
    ),
    comparison(
        "What leaves them is a drift that all runs share: around their mean, runs stay (share, least over widths)",
        run(LABEL_NOISE)["around"].min() >= 0.8,
    ),
    scaling(
        "This drift is of second order (squared displacement outside over inside: exponent in the noise, each minimum)",
        (DRIFT / WEAK_DRIFT).reduce(lambda factor: np.log(factor) / np.log(WEAKER)).within(1.8, 2.2),
    ),
    comparison(
        "With that drift they stay, too, at every minimum (share of the squared displacement, least over widths)",
        run(LABEL_NOISE)["share"].min() >= 0.8,
        deciding=False,
        note="How far a minimum's own drift goes at this noise no theory says: at w = 8 about 2 of 10 seeds miss this."
        "  Its share falls with the square of the noise.",
    ),
    control(
        "Noise alike in all directions does not (share over n/P, greatest from 320 weights on)",
        (LARGE_ISOTROPIC["share"] / LARGE_ISOTROPIC["even"]).max() <= 1,
    ),
    comparison(
        "On digits the gap hardly depends on the number of weights (greatest over least gap)",
        run("widths").reduce(_change, "weights", "gap") <= 1.5,
    ),
    comparison(
        "With random labels the gap rises with spectral norms over margin (rank correlation)",
        run(RANDOM_LABELS).reduce(spearman, "complexity", "gap") >= 0.8,
        note="A correlation over one knob; as a bound, such numbers say nothing at this size.",
    ),
    comparison(
        "Every network on digits with random labels fits (training loss, greatest)",
        run(RANDOM_LABELS)["train_loss"].max() <= FITTED,
        deciding=False,
        note="Those that do not are left out.",
    ),
    comparison(
        "Single curved directions scatter as predicted, too (median variance over V_i at σ = 0.01, least)",
        NOISY.near(noise=0.01)["single"].min().within(0.5, 2),
        deciding=False,
        note="Drifting along flat directions turns the curved ones; only the sum weighted by curvature is predicted.",
    ),
    wider_claim(
        "With Gaussian noise alike in all directions, too, the weights stay near n directions (share, least)",
        run(ISOTROPIC)["share"].min() >= 0.8,
        note="The loss stays; the weights drift along the flat directions.",
    ),
)

LABELS = {
    "step": "step",
    "curved": "share of the squared displacement",
    "sigma": "noise σ in each entry of the gradient",
    "rises": "mean loss above the minimum",
    "depth": "predicted mean rise over δ",
    "stays": "share of 64 runs",
    "weights": "weights",
    "complexity": "∏‖W‖₂ over median margin",
    "gap": "training minus test accuracy",
}
WIDTHS = tuple(f"{width} neurons" for width in Config.widths)

CHARTS = under(
    PART,
    *labelled(
        LABELS,
        Chart(
            "subspace",
            "Displacement in curved directions",
            x="step",
            y="curved",
            runs=(f"{LABEL_NOISE} (w = 32)", f"{ISOTROPIC} (w = 32)"),
            beside=(("spread", "about mean"),),
            caption="320 weights, 40 curved directions.  Noise of equal size moves the weights in the curved directions"
            " when it is on the labels, but for a slow drift of all runs, and in the flat ones when it is alike in"
            " all.",
        ),
        Chart(
            "excess",
            "Mean loss above the minimum after 1000 steps",
            x="sigma",
            y="rises",
            runs=(*WIDTHS, *(f"{name}: predicted" for name in WIDTHS)),
            log="xy",
            lines=((BASIN, "δ"),),
            caption="Networks with 80 to 640 weights, 40 examples.  The loss follows the prediction and hardly depends"
            " on the number of weights.",
        ),
        Chart(
            "stay",
            "Share of runs that never rise by δ",
            x="depth",
            y="stays",
            runs=WIDTHS,
            log="x",
            markers=True,
            caption="All stay where the predicted loss is a fifth of δ, none where it is δ.",
        ),
        Chart(
            "gap-weights",
            "Digits: gap against the number of weights",
            x="weights",
            y="gap",
            runs=("widths",),
            log="x",
            markers=True,
            caption="A fifth of the labels is random, in training and test.",
        ),
        Chart(
            "gap-norms",
            "Digits: gap against spectral norms over margin",
            x="complexity",
            y="gap",
            runs=(RANDOM_LABELS,),
            markers=True,
            caption="Width 128; from no random label (left) to random labels only.  A correlation, not a bound.",
        ),
    ),
)
