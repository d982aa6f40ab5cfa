"""SGD stagnates near a minimum, in as many dimensions as there are examples.

Around a minimum that fits all examples only as many directions are curved as there are examples; all others are flat.
Descent with Gaussian noise therefore stagnates at a loss that depends on the noise and on that number, however many
weights there are.  It stays near the minimum while this predicted loss is well below the depth of the basin, and leaves
once it is above.  Noise on labels hardly takes the weights out of the curved directions; noise alike in all directions
does, along the flat ones.  On digits the gap between training and test accuracy hardly changes with the number of
weights and rises with spectral norms over margin as labels are made random: a correlation, for no bound is computed.

Curvatures λ_i of the minimum, step η, noise of deviation σ in each gradient entry, q_i = 1 - ηλ_i, T steps:

    V_i(T) = η²σ² (1 - q_i^{2T})/(1 - q_i²)      variance along direction i; η²σ²T where λ_i = 0
    E L - L* ≈ ½ Σ λ_i V_i(T)  →  (ησ²/2) Σ_{λ_i>0} 1/(2 - ηλ_i)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...autodiff.batched import BatchedRuns
from ...errors import InvalidValue
from ...optimizers.descend import noisy
from ...records.run_log import RunLog
from .._framework.claiming import charting, claiming
from .._framework.claims import WIDER, Claim, at_least, at_most, median, within
from .._framework.config import demand_positive
from .._framework.fits import spearman
from .._framework.observe_old import Observer, Reduce, by_seed
from .._framework.study import Job, Progress
from .margins import Relabelled
from .stagnation import Fit, Minimum

PAPER = (
    "Imaizumi & Schmidt-Hieber, On Generalization Bounds for Deep Networks Based on Loss Surface Implicit"
    " Regularization (arXiv 2201.04545)"
)
Array = NDArray[np.float64]
PART, CONTROL = "Stagnation near a minimum", "negative control"
NOISE, LABELS, ISOTROPIC, RANDOM = "noise in gradients", "noise on labels", "isotropic noise", "random labels"
BASIN = 0.02  # δ: a run has left when its loss rises by more
LITTLE = 0.003  # up to which the quadratic prediction has to hold
FITTED = 1e-2  # training loss; a network on digits that ends above is left out
SOME, MIDDLE = 0.2, 128  # fraction of random labels where the width varies, and width where the fraction varies


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

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
    for seed in range(config.seed, config.seed + config.repeats):
        for width in config.widths:
            own = {"seed": seed, "width": width, "config": config}
            cost = 1 + width * config.replicas * len(config.noises) * config.steps / 1e6
            found.append(Job(f"near a minimum, {width} neurons, seed {seed}", _near, own, cost))
        for size in config.sizes:
            fractions = config.fractions if size == MIDDLE else (SOME,)
            own = {"seed": seed, "size": size, "fractions": fractions, "steps": config.training}
            cost = 1 + config.training * len(fractions) * size**2 / 5e7
            found.append(Job(f"digits, width {size}, seed {seed}", _digits, own, cost))
    return found


def _near(log: RunLog, progress: Progress, seed: int, width: int, config: Config) -> None:
    """A minimum, its curvatures, and what noise in the gradients and in the labels makes of it."""
    log.resume()
    fit, first = Fit.drawn(width, config.examples, seed), seed == config.seed
    at = Minimum.near(fit, fit.start(seed))
    own = {"seed": seed, "width": width, "weights": fit.size, "examples": config.examples}
    row = {"lowest": at.loss, "sharpness": 1 / at.rate, "hessian_off": at.off(), "rank": at.rank}
    log.append(run="minimum", **row, **own)
    progress(0.1)
    asked = (config.noises, config.replicas, config.steps, BASIN, seed)
    for row in at.shaken(*asked, lambda done: progress(0.1 + 0.7 * done)):
        log.append(run=NOISE, **row, **own)
        if first:
            run, noise, predicted = f"{width} neurons", row["noise"], row["predicted"]
            log.append(run=run, sigma=noise, rises=row["excess"], depth=predicted / BASIN, stays=row["stay"])
            log.append(run=f"{run}: predicted", sigma=noise, rises=predicted)
    progress(0.85)
    alike = noisy(BatchedRuns(fit.losses).slope, at.alike(config.label_noise), seed)
    for run, slope in {LABELS: fit.relabelled(config.label_noise, seed), ISOTROPIC: alike}.items():
        seen = at.shares(slope)
        log.append(run=run, even=config.examples / fit.size, **seen[-1][1], **own)
        for step, row in seen if first else ():
            log.append(run=f"{run} (w = {width})", step=step, curved=row["share"], spread=row["around"])


def _digits(log: RunLog, progress: Progress, seed: int, size: int, fractions: tuple[float, ...], steps: int) -> None:
    """Networks of one width on digits, one for each fraction of random labels, side by side."""
    log.resume()
    draw = torch.Generator().manual_seed(seed)
    digits = Relabelled.drawn(fractions, seed, draw)
    W = digits.trained(size, steps, draw, progress)
    for fraction, row in zip(fractions, digits.measured(W, size), strict=True):
        if not row["train_loss"] < FITTED:
            del row["gap"], row["complexity"]
        row |= {"seed": seed, "size": size, "weights": W.shape[1], "fraction": fraction}
        for run in ("widths",) * (fraction == SOME) + (RANDOM,) * (size == MIDDLE):
            log.append(run=run, **row)


def _where(name: str, low: float, high: float, reduce: Reduce, *columns: str) -> Observer:
    """`reduce` of columns over the rows of noise in gradients with `name` in ``[low, high]``, once for each repeat."""

    def kept(chosen: Array, *values: Array) -> float:
        return reduce(*(v[(chosen >= low) & (chosen <= high)] for v in values))

    return by_seed(NOISE, kept, name, *columns)


def _every(run: str, column: str) -> Observer:
    """All values."""
    return lambda h, config: tuple(h.series(run, column).tolist())


def _spread(noise: Array, risen: Array) -> float:
    """``max excess / min excess`` among widths, for the noise where that is greatest."""
    return max(risen[noise == n].max() / risen[noise == n].min() for n in np.unique(noise))


def _change(weights: Array, gap: Array) -> float:
    """``max gap / min gap`` over at least a factor of 20 in the number of weights."""
    return gap.max() / gap.min() if weights.max() >= 20 * weights.min() else np.nan


def _claims() -> Iterator[Claim]:
    claim, same = claiming(PART), "comparison"
    sentence = "At the minimum the Hessian is that of n squares, JᵀJ/n (relative error)"
    yield claim(sentence, by_seed("minimum", max, "hessian_off"), at_most(1e-5), "identity", "minimum")
    sentence = "At most as many directions are curved as there are examples (curved directions over n)"
    curved = by_seed("minimum", lambda rank, n: max(rank / n), "rank", "examples")
    yield claim(sentence, curved, at_most(1), "inequality", "minimum")
    for word, pick in (("least", min), ("greatest", max)):
        sentence = f"With little noise the loss rises as predicted (over the prediction, {word} over widths)"
        yield claim(sentence, _where("noise", 0, LITTLE, pick, "ratio"), within(0.8, 1.25), "scaling", NOISE)
    sentence = "It hardly depends on the number of weights (greatest over least rise of the loss among widths)"
    yield claim(sentence, _where("noise", 0, LITTLE, _spread, "noise", "excess"), at_most(2), "scaling", NOISE)
    sentence = "Where the predicted rise is below δ/5, runs stay (least share whose loss never rises by δ = 0.02)"
    yield claim(sentence, _where("predicted", 0, 0.2 * BASIN, min, "stay"), at_least(0.95), same, NOISE)
    sentence = "Where it is above δ, they do not (greatest share)"
    yield claim(sentence, _where("predicted", BASIN, np.inf, max, "stay"), at_most(0.2), same, NOISE)
    sentence = "From noise of 0.03 on, no minimum holds its runs (greatest share that stays)"
    yield claim(sentence, _where("noise", 0.03, np.inf, max, "stay"), at_most(0.2), CONTROL, NOISE)
    sentence = "Noise on labels moves weights in n directions (share of the squared displacement, each minimum)"
    yield claim(sentence, _every(LABELS, "share"), median(at_least(0.8)), same, LABELS)
    sentence = (
        "What leaves them is a drift that all runs share: around their mean, runs stay (share, least over widths)"
    )
    yield claim(sentence, by_seed(LABELS, min, "around"), at_least(0.8), same, LABELS)
    sentence = "With that drift they stay, too, at every minimum (share of the squared displacement, least over widths)"
    note = (
        "At w = 8 a drift that all runs share leaves the n directions, so that about 2 of 10 seeds miss this;"
        " its share grows with the square of the noise."
    )
    yield claim(sentence, by_seed(LABELS, min, "share"), at_least(0.8), same, LABELS, note=note)
    sentence = "Noise alike in all directions does not (share over n/P, greatest from 320 weights on)"
    even = by_seed(ISOTROPIC, lambda p, share, even: (share / even)[p >= 320].max(), "weights", "share", "even")
    yield claim(sentence, even, at_most(1), CONTROL, ISOTROPIC)
    sentence = "On digits the gap hardly depends on the number of weights (greatest over least gap)"
    yield claim(sentence, by_seed("widths", _change, "weights", "gap"), at_most(1.5), same, "widths")
    sentence = "With random labels the gap rises with spectral norms over margin (rank correlation)"
    note = "A correlation over one knob; as a bound, such numbers say nothing at this size."
    yield claim(sentence, by_seed(RANDOM, spearman, "complexity", "gap"), at_least(0.8), same, RANDOM, note=note)
    sentence = "Every network on digits with random labels fits (training loss, greatest)"
    note = "Those that do not are left out."
    yield claim(sentence, by_seed(RANDOM, max, "train_loss"), at_most(FITTED), same, RANDOM, aside=True, note=note)
    sentence = "Single curved directions scatter as predicted, too (median variance over V_i at σ = 0.01, least)"
    note = "Drifting along flat directions turns the curved ones; only the sum weighted by curvature is predicted."
    single = _where("noise", 0.01, 0.01, min, "single")
    yield claim(sentence, single, within(0.5, 2), same, NOISE, aside=True, note=note)
    sentence = "With Gaussian noise alike in all directions, too, the weights stay near n directions (share, least)"
    note = "The loss stays; the weights drift along the flat directions."
    yield claim(sentence, by_seed(ISOTROPIC, min, "share"), at_least(0.8), WIDER, ISOTROPIC, note=note)


CLAIMS = tuple(_claims())

AXES = {
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

CAPTIONS = {
    "subspace": "320 weights, 40 curved directions.  Noise of equal size moves the weights in the curved directions"
    " when it is on the labels, but for a slow drift of all runs, and in the flat ones when it is alike in all.",
    "excess": "Networks with 80 to 640 weights, 40 examples.  The loss follows the prediction and hardly depends on"
    " the number of weights.",
    "stay": "All stay where the predicted loss is a fifth of δ, none where it is δ.",
    "gap-weights": "A fifth of the labels is random, in training and test.",
    "gap-norms": "Width 128; from no random label (left) to random labels only.  A correlation, not a bound.",
}
WIDTHS = tuple(f"{width} neurons" for width in Config.widths)
PREDICTED = tuple(f"{name}: predicted" for name in WIDTHS)
BOTH, BESIDE = tuple(f"{name} (w = 32)" for name in (LABELS, ISOTROPIC)), (("spread", "about mean"),)
EXCESS, chart = "Mean loss above the minimum after 1000 steps", charting(PART, AXES, CAPTIONS)

CHARTS = (
    chart("subspace", "Displacement in curved directions", "step", "curved", BOTH, beside=BESIDE),
    chart("excess", EXCESS, "sigma", "rises", (*WIDTHS, *PREDICTED), "xy", lines=((BASIN, "δ"),)),
    chart("stay", "Share of runs that never rise by δ", "depth", "stays", WIDTHS, "x", markers=True),
    chart("gap-weights", "Digits: gap against the number of weights", "weights", "gap", ("widths",), "x", markers=True),
    chart("gap-norms", "Digits: gap against spectral norms over margin", "complexity", "gap", (RANDOM,), markers=True),
)
