"""SGD stagnates near a minimum, in as many dimensions as there are examples.

Around a minimum that fits all examples only as many directions are curved as there are examples; the others are flat.
Gradient descent with Gaussian noise therefore keeps a loss that depends on the noise and on that number, however many
weights there are, and stays close to the minimum with a probability that falls from one to zero where the predicted
loss meets the width of the basin.  Where the noise comes from the labels, the weights themselves hardly leave these
directions; where it is the same in all directions, they do.  The gap between training and test accuracy of networks on
digits, finally, hardly changes with the number of weights, and rises with the product of spectral norms over the margin
when labels are made random; that part only correlates, and no bound is computed.

Curvatures λ_i of the minimum, step η, noise of deviation σ in each gradient entry, q_i = 1 - ηλ_i, T steps:

    V_i(T) = η²σ² (1 - q_i^{2T})/(1 - q_i²)      variance along direction i; η²σ²T where λ_i = 0
    E L - L* ≈ ½ Σ λ_i V_i(T)  →  (ησ²/2) Σ_{λ_i>0} 1/(2 - ηλ_i)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..claims import WIDER, Claim, Criterion, at_least, at_most, median, within
from ..history import Track
from ..plots import Chart
from ..replicas import Replicas, Slope, descend, jacobian, noisy
from ..rules import GD
from ._data import flat_digits
from ._minimize import minimize
from ._stats import Observer, by_seed, spearman
from ._study import Job, Report

PAPER = (
    "Imaizumi & Schmidt-Hieber, On Generalization Bounds for Deep Networks Based on Loss Surface Implicit"
    " Regularization (arXiv 2201.04545)"
)
Array = NDArray[np.float64]
NOISE, LABELS, ISOTROPIC, RANDOM = "noise in gradients", "noise on labels", "isotropic noise", "random labels"
PART = "Stagnation near a minimum"
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
        for name, value in vars(self).items():
            parts = value if isinstance(value, tuple) else (value,)
            if name == "fractions":
                if not all(0 <= v <= 1 for v in parts):
                    raise ValueError(f"{name} is {value}; a fraction is between 0 and 1")
            elif name != "seed" and not all(v > 0 for v in parts):
                raise ValueError(f"{name} is {value}; it must be positive")


QUICK = Config(repeats=1, widths=(8, 32), sizes=(32, 128, 256))


@dataclass(frozen=True)
class Fit:
    """``f(x) = aᵀ tanh(Vx + b)/√w`` fitted to (x, y) ``(n, d), (n,)``; weights W = (V, b, a) ``(R, w(d + 2))``."""

    x: Tensor
    y: Tensor
    width: int

    @classmethod
    def drawn(cls, width: int, examples: int, seed: int) -> "Fit":
        """``x ~ 1.5 N(0, I/8)`` in 8 dimensions, ``y = tanh 2x₁ + ½x₂x₃ + N(0, 0.2²)``."""
        rng = np.random.default_rng([101, seed])
        x = 1.5 * rng.standard_normal((examples, 8)) / np.sqrt(8)
        y = np.tanh(2 * x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.2 * rng.standard_normal(examples)
        return cls(torch.from_numpy(x), torch.from_numpy(y), width)

    @property
    def size(self) -> int:
        """P, the number of weights."""
        return self.width * (self.x.shape[1] + 2)

    def outputs(self, W: Tensor) -> Tensor:
        """``f(x_i)`` ``(R, n)``."""
        w, d = self.width, self.x.shape[1]
        V, b, a = W.split([w * d, w, w], dim=1)
        hidden = torch.tanh(self.x @ V.view(-1, w, d).mT + b[:, None])
        return (hidden @ a[:, :, None])[:, :, 0] / w**0.5

    def losses(self, W: Tensor) -> Tensor:
        """``½ mean (f(x_i) - y_i)²`` ``(R,)``."""
        return 0.5 * (self.outputs(W) - self.y).square().mean(1)

    def start(self, seed: int) -> Tensor:
        """``N(0, 1)`` ``(P,)``."""
        rng = np.random.default_rng([102, seed, self.width])
        return torch.from_numpy(rng.standard_normal(self.size))

    def relabelled(self, deviation: float, seed: int) -> Slope:
        """Gradients of the loss with new noise on all labels in each step."""
        draw = torch.Generator().manual_seed(seed)

        def slope(W: Tensor, step: int) -> tuple[Tensor, Tensor]:
            noise = deviation * torch.randn(len(W), len(self.y), generator=draw, dtype=W.dtype)
            f = Replicas(lambda W: 0.5 * (self.outputs(W) - self.y - noise).square().mean(1))
            return f.value_and_grad(W)

        return slope


def variances(eigenvalues: Tensor, rate: float, noise: float, steps: int) -> Tensor:
    """``V_i = η²σ² (1 - q_i^{2T})/(1 - q_i²)``, ``η²σ²T`` where flat: a geometric sum."""
    q2 = (1 - rate * eigenvalues).square()
    flat = (1 - q2).abs() < 1e-12
    total = torch.where(flat, float(steps), (1 - q2**steps) / torch.where(flat, 1.0, 1 - q2))
    return (rate * noise) ** 2 * total


def excess(eigenvalues: Tensor, rate: float, noise: float, steps: int) -> float:
    """``½ Σ λ_i V_i``: mean loss above the minimum after T steps."""
    return 0.5 * (eigenvalues @ variances(eigenvalues, rate, noise, steps)).item()


def share(moved: Tensor, directions: Tensor) -> float:
    """``Σ_r ‖UᵀΔ_r‖² / Σ_r ‖Δ_r‖²`` of displacements ``(R, P)`` in orthonormal directions U ``(P, n)``."""
    return ((moved @ directions).square().sum() / moved.square().sum()).item()


def shapes(width: int) -> tuple[tuple[int, int], ...]:
    """Of the matrices of the network 64→w→w→10 without biases."""
    return (width, 64), (width, width), (10, width)


def matrices(W: Tensor, width: int) -> list[Tensor]:
    """Its matrices, each ``(R, out, in)``."""
    parts = W.split([a * b for a, b in shapes(width)], dim=1)
    return [part.view(-1, *shape) for part, shape in zip(parts, shapes(width), strict=True)]


def scores(W: Tensor, x: Tensor, width: int) -> Tensor:
    """``W_3 relu(W_2 relu(W_1 x))`` ``(R, n, 10)``."""
    first, second, last = matrices(W, width)
    return torch.relu(torch.relu(x @ first.mT) @ second.mT) @ last.mT


def margins(s: Tensor, labels: Tensor) -> Tensor:
    """``s_y - max_{c≠y} s_c`` of scores ``(R, n, 10)`` and labels ``(R, n)``."""
    own = s.gather(2, labels[:, :, None])
    others = s.scatter(2, labels[:, :, None], -torch.inf)
    return own[:, :, 0] - others.amax(2)


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


def _near(track: Track, report: Report, seed: int, width: int, config: Config) -> None:
    """A minimum, its curvatures, and what noise in the gradients and in the labels makes of it."""
    track.resume()
    p = Fit.drawn(width, config.examples, seed)
    w = p.start(seed)
    best = minimize(Replicas(p.losses).recorded(w[None]), w, below=1e-15)
    at = best.weights[None]
    values, vectors = torch.linalg.eigh(Replicas(p.losses).hessian(at)[0])
    J = jacobian(p.outputs, at)[0]
    top = vectors[:, -config.examples :]
    rate = 1 / values[-1].item()
    n, own = config.examples, {"seed": seed, "width": width, "weights": p.size, "examples": config.examples}
    gauss = J.T @ J / n
    track.append(
        run="minimum",
        lowest=best.loss,
        sharpness=1 / rate,
        hessian_off=((vectors * values @ vectors.T - gauss).norm() / gauss.norm()).item(),
        rank=int((values > 1e-6 * values[-1]).sum()),
        **own,
    )
    report(0.1)

    sigma = torch.tensor(config.noises, dtype=w.dtype).repeat_interleave(config.replicas)[:, None]
    W = at.expand(len(sigma), -1).clone()
    highest = torch.zeros(len(sigma), dtype=w.dtype)
    first = seed == config.seed

    def groups(v: Tensor) -> Iterator[tuple[float, Tensor]]:
        return zip(config.noises, v.split(config.replicas), strict=True)

    def watch(step: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
        torch.maximum(highest, losses - best.loss, out=highest)
        if step % 50 == 0:
            report(0.1 + 0.7 * step / config.steps)

    slope = noisy(Replicas(p.losses).recorded(W), sigma, seed)
    end = descend(slope, W, GD(rate), config.steps, watch=watch)
    for (noise, rise), (_, height), (_, moved) in zip(
        groups(end.losses - best.loss), groups(highest), groups(end.weights - best.weights), strict=True
    ):
        predicted = excess(values, rate, noise, config.steps)
        single = ((moved @ top).square().mean(0) / variances(values[-n:], rate, noise, config.steps)).median()
        risen, stay = rise.mean().item(), (height < BASIN).double().mean().item()
        row = {"excess": risen, "predicted": predicted, "ratio": risen / predicted, "stay": stay}
        track.append(run=NOISE, noise=noise, single=single.item(), **row, **own)
        if first:
            track.append(run=f"{width} neurons", sigma=noise, rises=risen, depth=predicted / BASIN, stays=stay)
            track.append(run=f"{width} neurons: predicted", sigma=noise, rises=predicted)
    report(0.85)

    deviation = config.label_noise * (values.sum().item() / (n * p.size)) ** 0.5
    slopes = {
        LABELS: p.relabelled(config.label_noise, seed),
        ISOTROPIC: noisy(Replicas(p.losses).slope, deviation, seed),
    }
    for name, slope in slopes.items():
        seen: list[dict[str, float]] = []

        def follow(step: int, W: Tensor, losses: Tensor, g: Tensor, seen: list[dict[str, float]] = seen) -> None:
            if step and step % 10 == 0:
                moved = W - best.weights
                seen.append({"share": share(moved, top), "around": share(moved - moved.mean(0), top)})

        descend(slope, at.expand(32, -1).clone(), GD(rate), 500, watch=follow)
        track.append(run=name, even=n / p.size, **seen[-1], **own)
        for i, row in enumerate(seen if first else (), 1):
            track.append(run=f"{name} (w = {width})", step=10 * i, curved=row["share"], spread=row["around"])


def _digits(track: Track, report: Report, seed: int, size: int, fractions: tuple[float, ...], steps: int) -> None:
    """Networks of one width on digits, one for each fraction of random labels, side by side."""
    track.resume()
    data = flat_digits(200, 1000, 8, seed)
    x, test_x = data.x.float(), data.test_x.float()
    draw = torch.Generator().manual_seed(seed)
    chosen, others = torch.rand(1200, generator=draw), torch.randint(10, (1200,), generator=draw)
    true = torch.cat([data.labels, data.test_labels])
    labels = torch.stack([torch.where(chosen < fraction, others, true) for fraction in fractions])
    y, test_y = labels[:, :200], labels[:, 200:]
    w = torch.cat([torch.randn(a * b, generator=draw) * (2 / b) ** 0.5 for a, b in shapes(size)])

    def picks() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(200, generator=draw)[:192].split(32)

    batches = picks()

    def losses(W: Tensor, pick: Tensor) -> Tensor:
        s = scores(W, x[pick], size)
        return cross_entropy(s.flatten(0, 1), y[:, pick].flatten(), reduction="none").view(len(W), -1).mean(1)

    def slope(W: Tensor, step: int) -> tuple[Tensor, Tensor]:
        pick = next(batches)
        return Replicas(lambda W: losses(W, pick)).value_and_grad(W)

    def watch(step: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
        if step % 50 == 0:
            report(step / steps)

    end = descend(slope, w.expand(len(fractions), -1).clone(), GD(0.02, momentum=0.9), steps, watch=watch)
    W = end.weights
    fit, test = scores(W, x, size), scores(W, test_x, size)
    hits = [(s.argmax(2) == t).double().mean(1) for s, t in ((fit, y), (test, test_y))]
    spectral = torch.stack([torch.linalg.matrix_norm(m, 2) for m in matrices(W, size)]).prod(0)
    middle = margins(fit, y).median(1).values
    final = Replicas(lambda W: losses(W, torch.arange(200))).value(W)
    for r, fraction in enumerate(fractions):
        row = {
            "train_loss": final[r].item(),
            "train_accuracy": hits[0][r].item(),
            "test_accuracy": hits[1][r].item(),
            "norms": spectral[r].item(),
        }
        if row["train_loss"] < FITTED:
            row |= {"gap": (hits[0] - hits[1])[r].item(), "complexity": (spectral / middle)[r].item()}
        row |= {"seed": seed, "size": size, "weights": W.shape[1], "fraction": fraction}
        for run in ("widths",) * (fraction == SOME) + (RANDOM,) * (size == MIDDLE):
            track.append(run=run, **row)


def _between(low: float, high: float, reduce: Callable[..., float], *columns: str) -> Observer:
    """`reduce` of columns over the rows with noise in ``[low, high]``, once for each repeat."""

    def kept(noise: Array, *values: Array) -> float:
        picked = (noise >= low) & (noise <= high)
        return reduce(*(v[picked] for v in values))

    return by_seed(NOISE, kept, "noise", *columns)


def _stays(low: float, high: float, reduce: Callable[..., float]) -> Observer:
    """`reduce` of the shares that stay where the predicted rise over δ is between."""

    def kept(predicted: Array, stay: Array) -> float:
        return reduce(stay[(predicted > low * BASIN) & (predicted < high * BASIN)])

    return by_seed(NOISE, kept, "predicted", "stay")


def _each(run: str, column: str) -> Observer:
    """Every value."""
    return lambda h, config: tuple(h.series(run, column).tolist())


def _spread(noise: Array, risen: Array) -> float:
    """``max excess / min excess`` among widths, for the noise where that is greatest."""
    return max(risen[noise == n].max() / risen[noise == n].min() for n in np.unique(noise))


def _change(weights: Array, gap: Array) -> float:
    """``max gap / min gap`` over at least a factor of 20 in the number of weights."""
    return gap.max() / gap.min() if weights.max() >= 20 * weights.min() else np.nan


def _claim(
    sentence: str, observe: Observer, criterion: Criterion, kind: str, run: str, note: str = "", deciding: bool = True
) -> Claim:
    return Claim(sentence, observe, criterion, kind, PART, (run,), deciding, note)


def _claims() -> Iterator[Claim]:
    control, same = "negative control", "comparison"
    sentence = "At the minimum the Hessian is that of n squares, JᵀJ/n (relative error)"
    yield _claim(sentence, by_seed("minimum", max, "hessian_off"), at_most(1e-5), "identity", "minimum")
    sentence = "At most as many directions are curved as there are examples (curved directions over n)"
    share_curved = by_seed("minimum", lambda rank, n: max(rank / n), "rank", "examples")
    yield _claim(sentence, share_curved, at_most(1), "inequality", "minimum")

    for word, pick in (("least", min), ("greatest", max)):
        sentence = f"With little noise the loss rises as predicted (over the prediction, {word} over widths)"
        yield _claim(sentence, _between(0, LITTLE, pick, "ratio"), within(0.8, 1.25), "scaling", NOISE)
    sentence = "It hardly depends on the number of weights (greatest over least rise of the loss among widths)"
    yield _claim(sentence, _between(0, LITTLE, _spread, "noise", "excess"), at_most(2), "scaling", NOISE)
    sentence = "Where the predicted rise is below δ/5, runs stay (least share whose loss never rises by δ = 0.02)"
    yield _claim(sentence, _stays(0, 0.2, min), at_least(0.95), same, NOISE)
    sentence = "Where it is above δ, they do not (greatest share)"
    yield _claim(sentence, _stays(1, np.inf, max), at_most(0.2), same, NOISE)
    sentence = "From noise of 0.03 on, no minimum holds its runs (greatest share that stays)"
    yield _claim(sentence, _between(0.03, np.inf, max, "stay"), at_most(0.2), control, NOISE)

    sentence = "Noise on labels moves weights in n directions (share of the squared displacement, each minimum)"
    yield _claim(sentence, _each(LABELS, "share"), median(at_least(0.8)), same, LABELS)
    sentence = (
        "What leaves them is a drift that all runs share: around their mean, runs stay (share, least over widths)"
    )
    yield _claim(sentence, by_seed(LABELS, min, "around"), at_least(0.8), same, LABELS)
    sentence = "With that drift they stay, too, at every minimum (share of the squared displacement, least over widths)"
    note = "The share that the drift takes grows with the square of the noise."
    yield _claim(sentence, by_seed(LABELS, min, "share"), at_least(0.8), same, LABELS, note, False)
    sentence = "Noise alike in all directions does not (share over n/P, greatest from 320 weights on)"
    even = by_seed(ISOTROPIC, lambda p, share, even: (share / even)[p >= 320].max(), "weights", "share", "even")
    yield _claim(sentence, even, at_most(1), control, ISOTROPIC)

    sentence = "On digits the gap hardly depends on the number of weights (greatest over least gap)"
    yield _claim(sentence, by_seed("widths", _change, "weights", "gap"), at_most(1.5), same, "widths")
    sentence = "With random labels the gap rises with spectral norms over margin (rank correlation)"
    note = "A correlation over one knob; as a bound, such numbers say nothing at this size."
    rank = by_seed(RANDOM, spearman, "complexity", "gap")
    yield _claim(sentence, rank, at_least(0.8), same, RANDOM, note)

    sentence = "Every network on digits with random labels fits (training loss, greatest)"
    note = "Those that do not are left out."
    yield _claim(sentence, by_seed(RANDOM, max, "train_loss"), at_most(FITTED), same, RANDOM, note, False)
    sentence = "Single curved directions scatter as predicted, too (median variance over V_i at σ = 0.01, least)"
    note = "Drifting along flat directions turns the curved ones; only the sum weighted by curvature is predicted."
    yield _claim(sentence, _between(0.01, 0.01, min, "single"), within(0.5, 2), same, NOISE, note, False)
    sentence = "With Gaussian noise alike in all directions, too, the weights stay near n directions (share, least)"
    note = "The loss stays; the weights drift along the flat directions."
    yield _claim(sentence, by_seed(ISOTROPIC, min, "share"), at_least(0.8), WIDER, ISOTROPIC, note, False)


CLAIMS = tuple(_claims())

WIDTHS = tuple(f"{width} neurons" for width in (8, 32, 64))
CHARTS = (
    Chart(
        "excess",
        "Mean loss above the minimum after 1000 steps",
        "sigma",
        "rises",
        (*WIDTHS, *(f"{name}: predicted" for name in WIDTHS)),
        "noise σ in each entry of the gradient",
        "mean loss above the minimum",
        log_x=True,
        log_y=True,
        lines=((BASIN, "δ"),),
        part=PART,
        caption="Networks with 80 to 640 weights, 40 examples.  The loss follows the prediction and hardly depends on"
        " the number of weights.",
    ),
    Chart(
        "stay",
        "Share of runs that never rise by δ",
        "depth",
        "stays",
        WIDTHS,
        "predicted mean rise over δ",
        "share of 64 runs",
        log_x=True,
        markers=True,
        part=PART,
        caption="All stay where the predicted loss is a fifth of δ, none where it is δ.",
    ),
    Chart(
        "subspace",
        "In curved directions",
        "step",
        "curved",
        (f"{LABELS} (w = 32)", f"{ISOTROPIC} (w = 32)"),
        "step",
        "share of the squared displacement",
        beside=(("spread", "about mean"),),
        part=PART,
        caption="320 weights, 40 curved directions.  Noise of equal size moves the weights in the curved directions"
        " when it is on the labels, but for a slow drift of all runs, and in the flat ones when it is alike in all.",
    ),
    Chart(
        "gap-weights",
        "Digits: gap against the number of weights",
        "weights",
        "gap",
        ("widths",),
        "weights",
        "training minus test accuracy",
        log_x=True,
        markers=True,
        part=PART,
        caption="A fifth of the labels is random, in training and test.",
    ),
    Chart(
        "gap-norms",
        "Digits: gap against spectral norms over margin",
        "complexity",
        "gap",
        (RANDOM,),
        "∏‖W‖₂ over median margin",
        "training minus test accuracy",
        markers=True,
        part=PART,
        caption="Width 128; from no random label (left) to random labels only.  A correlation, not a bound.",
    ),
)
