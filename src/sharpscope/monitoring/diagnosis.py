"""Diagnoses a run: sentences, each with the numbers it rests on and where its rule comes from.

A rule is a function of the measurements that returns a `Finding`, or None where it has nothing to say; `RULES` holds
them in the order in which they are read.  They see columns of a history and `Facts` alone, so that a run on disk is
diagnosed like a live one.  r is the ratio of sharpness to its threshold, τ the intrinsic time of weight decay.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..records.history import History

AT_THE_EDGE = (0.95, 1.3)
"""Range of r called "at the edge": oscillation and several unstable modes push it above one."""

BURSTS = (0.7, 2.0)
"""Range in which the middle half of the late measurements lies for a run at the edge."""

LYU = "Lyu, Li & Arora 2022, arXiv 2206.07085"
COHEN = "Cohen et al. 2021, arXiv 2103.00065"
KOSSON = "Kosson et al. 2024, arXiv 2305.17212"


@dataclass(frozen=True)
class Facts:
    """Numbers that stay the same along a run: counts of weights, and the number of planned steps (None: unknown)."""

    size: int = 0
    invariant: int = 0
    defect: float = 1.0
    groups: Mapping[str, int] = field(default_factory=dict)
    null: Mapping[str, int] = field(default_factory=dict)
    decayed_null: int = 0
    pairs: tuple[str, ...] = ()  # "a -> b": what may be rescaled by c and 1/c
    steps: int | None = None
    overhead: float | None = (
        None  # time of measuring over time of training, where it is newer than the last measurement
    )
    groups_known: bool = True  # whether it is known which weights are invariant
    stops_gradients: bool = False  # on the way, so that training follows no gradient of one function


@dataclass(frozen=True)
class Finding:
    """A sentence or two on a run: `name` is its rule's, `numbers` what the rule used, `source` whose law it is."""

    name: str
    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    def __str__(self) -> str:
        return self.text


class Measurements:
    """The columns of one run, and the facts beside them."""

    def __init__(self, history: History, run: str, facts: Facts) -> None:
        self.history, self.run, self.facts = history, run, facts

    def series(self, name: str) -> np.ndarray:
        """The measured values of a column, none where there is no such column."""
        known = name in self.history.columns and self.run in self.history.runs
        return self.history.series(self.run, name) if known else np.empty(0)

    def last(self, name: str) -> float:
        """The latest value of a column; not a number where there is none."""
        values = self.series(name)
        return float(values[-1]) if len(values) else math.nan

    def late(self, name: str) -> np.ndarray:
        """The last quarter of the values of a column, at least three."""
        values = self.series(name)
        return values[-max(3, len(values) // 4) :]

    def by_group(self, name: str) -> dict[str, float]:
        """The median of the late values of the column ``name/GROUP``, by group."""
        prefix = f"{name}/"
        columns = [c for c in self.history.columns if c.startswith(prefix) and len(self.series(c))]
        return {c.removeprefix(prefix): float(np.median(self.late(c))) for c in columns}

    @property
    def ratio(self) -> float:
        """The median of the late r; not a number where there is none."""
        late = self.late("stability_ratio")
        return float(np.median(late)) if len(late) else math.nan

    @property
    def steps_left(self) -> float:
        """Number of steps that are still planned; not a number where it is unknown."""
        return math.nan if self.facts.steps is None else max(self.facts.steps - self.last("step"), 0.0)


def diagnose(history: History, run: str, facts: Facts) -> list[Finding]:
    """Say what the measurements of `run` mean, most urgent first."""
    measurements = Measurements(history, run, facts)
    return [finding for rule in RULES for finding in [rule(measurements)] if finding is not None]


def divergence(at: Measurements) -> Finding | None:
    """Report the step at which the loss was not finite."""
    steps, losses = at.history.columns.get("step", []), at.history.columns.get("loss", [])
    rows = zip(at.history.columns.get("run", []), steps, losses, strict=True)
    lost = [step for name, step, loss in rows if name == at.run and not np.isfinite(np.nan if loss is None else loss)]
    if not lost:
        return None
    text = f"The run diverged: at step {lost[0]} the loss was not finite; what follows is about the steps before."
    return Finding("diverged", text, {"step": float(lost[0])})


def stopped_gradients(at: Measurements) -> Finding | None:
    """Say what sharpness means where gradients are stopped on the way."""
    if not at.facts.stops_gradients:
        return None
    text = (
        "Gradients are stopped on the way (detach, no_grad), so that training follows no gradient of one function:"
        " sharpness is the largest real part of the eigenvalues of the Jacobian of its gradient, and the edge of"
        " stability is exact where that eigenvalue is real."
    )
    return Finding("stopped gradients", text)


def gaps(at: Measurements) -> Finding | None:
    """Count the measurements without curvature."""
    names = ("run", "step", "loss", "sharpness", "stability_ratio")
    rows = list(zip(*(at.history.columns.get(name, [None] * len(at.history)) for name in names), strict=True))
    finite = [row for row in rows if row[0] == at.run and row[2] is not None and np.isfinite(row[2])]
    missing = [step for _, step, _, sharpness, ratio in finite if sharpness is None and ratio is None]
    if not missing:
        return None
    text = (
        f"At {len(missing)} of {len(finite)} measurements, first at step {missing[0]}, no curvature was found (not"
        " finite, or not converged); what follows is about the others."
    )
    return Finding("gaps", text, {"missing": float(len(missing)), "of": float(len(finite))})


def regime(at: Measurements) -> Finding:
    """Say on which side of the edge of stability the run is, and whether it is approaching."""
    ratios, late = at.series("stability_ratio"), at.late("stability_ratio")
    if not len(ratios):
        text = (
            "There is no measurement of the curvature at a positive learning rate yet, so no threshold to compare with."
        )
        return Finding("undecided", text)
    r, count = at.ratio, len(late)
    low, high = (float(q) for q in np.quantile(late, (0.25, 0.75)))
    numbers = {"ratio": r, "quarter": low, "three quarters": high, "measurements": float(count)}
    seen = f"sharpness / threshold is {r:.2f} (median of the last {count} measurement{'s' * (count > 1)})"

    def found(name: str, text: str, source: str = COHEN) -> Finding:
        return Finding(name, text, numbers, source)

    floor, ceiling = AT_THE_EDGE
    if r >= floor and _blowing_up(at):
        text = (
            f"Above the edge of stability: {seen}, and the loss grows from measurement to measurement: lower the rate."
        )
        return found("above", text)
    if floor <= r <= ceiling and low >= BURSTS[0] and high <= BURSTS[1]:
        text = f"At the edge of stability: {seen}; the learning rate now sets the sharpness, not the other way round."
        return found("edge", text)
    if low > ceiling:
        text = f"Above the edge of stability: {seen}; expect the loss to rise, or a jump to a flatter place."
        return found("above", text)
    if high >= floor:
        text = (
            f"Undecided: {seen}, with half of them between {low:.2f} and {high:.2f}, on both sides of {floor:g} or"
            f" {ceiling:g}; a few more measurements will tell."
        )
        return found("undecided", text)
    if r <= 0:
        return found("below", f"Below the edge of stability: {seen}; no direction curves upwards.")
    if _rising(ratios):
        up = f"up from {ratios[0]:.2f}; the edge is not reached yet"
        if _by_norm(at):
            return found("approaching", f"Approaching the edge as the norm of the weights shrinks: {seen}, {up}.", LYU)
        return found("sharpening", f"Progressive sharpening: {seen}, {up}.")
    return found("below", f"Below the edge of stability: {seen}; it may grow {1 / r:.3g}-fold before steps overshoot.")


def _blowing_up(at: Measurements) -> bool:
    """Say whether the loss has grown at each of the late measurements, and doubled: at the edge it goes up and down."""
    losses = at.late("loss")
    losses = losses[np.isfinite(losses)]
    return len(losses) >= 3 and bool((np.diff(losses) > 0).all()) and bool(losses[-1] > 2 * losses[0] > 0)


def _rising(ratios: np.ndarray) -> bool:
    """Say whether r has grown by a fifth since the first, and still grows by two per cent over the last quarter."""
    n = max(1, len(ratios) // 4)
    if len(ratios) < 3 or ratios[-1] <= 1.2 * ratios[0]:
        return False
    return bool(np.median(ratios[-n:]) > 1.02 * np.median(ratios[-2 * n : -n]))


def _by_norm(at: Measurements) -> bool:
    """Say whether the norm explains more of the late rise than the spherical sharpness does."""
    if "spherical_sharpness" not in at.history.columns:
        return False
    ratio, spherical = at.history.table(at.run, "stability_ratio", "spherical_sharpness")
    n = max(1, len(ratio) // 4)
    if len(ratio) <= n or min(ratio[-1 - n], spherical[-1 - n], spherical[-1]) <= 0:
        return False
    return bool(math.log(spherical[-1] / spherical[-1 - n]) < 0.5 * math.log(ratio[-1] / ratio[-1 - n]))


def top_eigenvector(at: Measurements) -> Finding | None:
    """Say whether the curvature is that of the invariant or of the other weights, where there are both."""
    fractions = at.by_group("fraction")
    other = at.facts.size - at.facts.invariant - sum(at.facts.null.values())
    if not fractions or other <= 0 or not at.ratio > 0:
        return None
    inside = min(sum(fractions.values()), 1.0)
    largest = max(fractions, key=lambda name: fractions[name])
    numbers = {"fraction": inside, "other weights": float(other)}
    if inside >= 0.5:
        text = (
            f"{inside:.0%} of the top eigenvector lies in scale-invariant weights (most in {largest}): their norm can"
            " adapt to the curvature, and weight decay governs it."
        )
    else:
        text = (
            f"Only {inside:.0%} of the top eigenvector lies in scale-invariant weights: the curvature that meets the"
            f" edge is that of the {other} other weights, whose steps weight decay does not adapt."
        )
    return Finding("top eigenvector", text, numbers, LYU)


def largest_rate(at: Measurements) -> Finding | None:
    """Give the learning rate at which the present curvature is at the edge, lr/r."""
    if not (at.last("learning_rate") > 0 and at.ratio > 0):
        return None
    rates, ratios = at.history.table(at.run, "learning_rate", "stability_ratio")
    n = max(3, len(ratios) // 4)
    largest, lr = float(np.median(rates[-n:] / ratios[-n:])), at.last("learning_rate")
    text = f"At the present curvature the largest stable learning rate is {largest:.3g} (it is {lr:.3g} now)."
    return Finding("largest rate", text, {"largest": largest, "learning rate": lr}, COHEN)


def twice_the_rate(at: Measurements) -> Finding | None:
    """Say what doubling the learning rate would change."""
    r = at.ratio
    if not (r > 0 and at.last("learning_rate") > 0):
        return None
    if 2 * r < AT_THE_EDGE[0]:
        text = f"Twice the learning rate would bring the ratio to {2 * r:.2f}, still below the edge."
    elif r < AT_THE_EDGE[0]:
        text = (
            f"Twice the learning rate would bring the ratio to {2 * r:.2f}, past the edge: expect the loss to jump"
            " until the sharpness has fallen to the new threshold."
        )
    else:
        text = "Twice the learning rate would halve the sharpness that training can hold"
        inside = sum(at.by_group("fraction").values()) >= 0.5
        text += ": invariant weights get there by √2 times their norm." if inside else ": expect a jump first."
    return Finding("twice the rate", text, {"ratio": r, "doubled": 2 * r}, COHEN)


def steps_to_the_edge(at: Measurements) -> Finding | None:
    """Predict when shrinking norms reach the edge, if gradients have died: after τ = ½ ln(1/r) of weight decay."""
    r, rate = at.ratio, at.last("intrinsic_time_per_step")
    if not (0 < r < AT_THE_EDGE[0] and rate > 0) or sum(at.by_group("fraction").values()) < 0.5 or eps(at):
        return None
    tau = 0.5 * math.log(1 / r)
    steps = tau / rate
    text = f"By weight decay alone the edge is {steps:.0f} steps away at the earliest (τ = ½ ln(1/{r:.2f}) = {tau:.2g})"
    if at.steps_left > 0:
        text += f"; {at.steps_left:.0f} are left"
    text += ", so it will not get there." if steps > at.steps_left > 0 else "."
    numbers = {"ratio": r, "tau": tau, "steps": steps, "left": at.steps_left}
    return Finding("steps to the edge", text, numbers, LYU)


def invariance(at: Measurements) -> Finding:
    """Count the scale-invariant weights."""
    n = at.facts.invariant
    if not at.facts.groups_known:
        text = "Which weights are scale-invariant is not known yet: the budget has not allowed finding them."
        return Finding("unknown groups", text)
    if n == 0:
        return Finding("invariance", "No weights are scale-invariant: the plain sharpness is the one to read.")
    text = (
        f"{n} weights are scale-invariant (Euler cosine {at.facts.defect:.1e}):"
        " judge flatness by the spherical sharpness, since the plain one changes with their norm alone."
    )
    return Finding("invariance", text, {"weights": float(n), "defect": at.facts.defect}, LYU)


def decay_rescales(at: Measurements) -> Finding | None:
    """Say which weights weight decay only rescales, and which it only shrinks, without being a penalty."""
    n, idle, pairs = at.facts.invariant, at.facts.decayed_null, at.facts.pairs
    if not at.last("intrinsic_time_per_step") > 0 or not (n or idle or pairs):
        return None
    parts = []
    if n:
        parts.append(
            f"On the {n} invariant weights weight decay penalizes nothing: it rescales them, which raises their"
            " effective learning rate."
        )
    if idle:
        names = ", ".join(at.facts.null)
        parts.append(f"It also shrinks {idle} parameters that have no effect on the loss ({names}): leave these out.")
    if pairs:
        which = f"{len(pairs)} pairs of tensors ({pairs[0]}, ..)" if pairs[1:] else f"1 pair of tensors ({pairs[0]})"
        parts.append(f"In {which}, which may be rescaled against each other, it only evens out the norms of the two.")
    numbers = {"invariant": float(n), "idle": float(idle), "pairs": float(len(pairs))}
    return Finding("decay rescales", " ".join(parts), numbers, LYU)


def intrinsic_time(at: Measurements) -> Finding | None:
    """Say whether weight decay has had time to act: τ so far and at the end."""
    rate, tau = at.last("intrinsic_time_per_step"), at.last("tau")
    if at.facts.invariant == 0 or math.isnan(rate):
        return None
    if rate == 0:
        text = "There is no weight decay: the norm of the invariant weights can only grow, and their steps shrink."
        return Finding("no decay", text, {"intrinsic time per step": 0.0}, LYU)
    end = tau + rate * at.steps_left
    numbers = {"tau": tau, "intrinsic time per step": rate, "tau at the end": end}
    acted = f"Weight decay has acted for τ = {tau:.3g} (by now {rate:.2g} a step)"
    if at.steps_left > 0:
        acted += f", and will have for τ = {end:.3g} at the end"
    if end < 0.1:
        return Finding("no time", f"{acted}: weight decay has no time to act in this run.", numbers, LYU)
    if tau >= 1:
        return Finding("intrinsic time", f"{acted}: norms have had time to settle.", numbers, LYU)
    more = (1 - tau) / rate
    text = f"{acted}; it shapes the norms from about τ = 1 on, which at this rate takes {more:.0f} more steps."
    return Finding("intrinsic time", text, numbers | {"steps": more}, LYU)


def settling(at: Measurements) -> Finding | None:
    """Compare the steps until norm and rotation balance, 1/(2·lr·wd), with those of the run."""
    rate, tau, steps = at.last("intrinsic_time_per_step"), at.last("tau"), at.facts.steps
    if at.facts.invariant == 0 or not rate > 0 or steps is None or tau >= 1:
        return None
    time = 1 / (2 * rate)
    fits = "fits" if 3 * time <= steps else "does not fit" if time > steps else "only just fits"
    text = (
        f"Norm and rotation of invariant weights balance over about 1/(2·lr·wd) = {time:.0f} steps, which {fits} in the"
        f" {steps} of this run."
    )
    return Finding("settling", text, {"time": time, "steps": float(steps)}, KOSSON)


def twice_the_decay(at: Measurements) -> Finding | None:
    """Say what doubling weight decay would change."""
    rate = at.last("intrinsic_time_per_step")
    if at.facts.invariant == 0 or not rate > 0:
        return None
    end = at.last("tau") + rate * at.steps_left
    numbers = {"intrinsic time per step": rate, "tau at the end": end, "angle": at.last("equilibrium")}
    text = "Twice the weight decay would double the intrinsic time per step"
    if at.steps_left > 0:
        text += f" (τ = {2 * end:.3g} at the end)"
    if numbers["angle"] > 0:
        angle = math.degrees(numbers["angle"])
        text += f", and turn settled weights by {math.sqrt(2) * angle:.2g}° a step instead of {angle:.2g}°"
    return Finding("twice the decay", text + ".", numbers, KOSSON)


def rotation(at: Measurements) -> Finding | None:
    """Compare the angle per step of settled weights with its law."""
    angles, expected = at.by_group("rotation"), at.last("equilibrium")
    if not angles or not expected > 0 or not at.last("tau") >= 1 or eps(at):
        return None
    relative = {name: angle / expected for name, angle in angles.items()}
    slow, fast = (pick(relative, key=lambda name: relative[name]) for pick in (min, max))
    text = f"Invariant weights turn by {math.degrees(float(np.median(list(angles.values())))):.2g}° a step"
    text += f" (law of the equilibrium: {math.degrees(expected):.2g}°)"
    if len(angles) > 1 and (relative[slow] < 0.5 or relative[fast] > 2):
        text += f", from {relative[slow]:.2g} of it in {slow} to {relative[fast]:.2g} in {fast}: unequal layers."
    elif relative[slow] < 0.5 or relative[fast] > 2:
        text += f", {relative[fast]:.2g} times that: not the balance of step and decay."
    else:
        text += ", all within a factor of two of it."
    return Finding("rotation", text, {"least": relative[slow], "most": relative[fast], "law": expected}, KOSSON)


def eps(at: Measurements) -> Finding | None:
    """Name a weight whose norm is held up by the eps of a normalization: its radial gradient balances weight decay."""
    balanced = {name: force for name, force in at.by_group("radial").items() if force >= 0.5}
    if not balanced or not at.ratio < AT_THE_EDGE[0]:
        return None
    name = max(balanced, key=lambda n: balanced[n])
    text = (
        f"The eps of a normalization keeps {name} from the edge: it balances {balanced[name]:.0%} of its weight decay,"
        " since the variance it is added to has become as small. Use a smaller eps, or larger weights and rate."
    )
    return Finding("eps", text, {"balanced": balanced[name], "ratio": at.ratio}, LYU)


def clipping(at: Measurements) -> Finding | None:
    """Notice that the norm of the gradients that were applied is the same at all late measurements."""
    norms = at.late("applied_gradient")
    if len(norms) < 3 or not norms[-1] > 0 or np.ptp(norms) > 1e-4 * norms[-1]:
        return None
    if np.ptp(at.late("loss")) <= 1e-3 * abs(at.last("loss")):
        return None
    text = (
        f"The gradients seem to be clipped to norm {norms[-1]:.3g}: steps are shorter than the learning rate says, and"
        " training is stable at larger ratios than one."
    )
    return Finding("clipping", text, {"norm": float(norms[-1])})


def cost(at: Measurements) -> Finding | None:
    """Give the time of measuring, as a fraction of that of training."""
    overhead = at.last("overhead") if at.facts.overhead is None else at.facts.overhead
    if math.isnan(overhead):
        return None
    part = f"{overhead:.2%} of" if overhead < 1 else f"{overhead:.1f} times"
    return Finding("cost", f"Measuring took {part} the time of training so far.", {"overhead": overhead})


RULES: tuple[Callable[[Measurements], Finding | None], ...] = (
    divergence,
    stopped_gradients,
    gaps,
    regime,
    top_eigenvector,
    eps,
    clipping,
    largest_rate,
    twice_the_rate,
    invariance,
    decay_rescales,
    intrinsic_time,
    settling,
    steps_to_the_edge,
    twice_the_decay,
    rotation,
    cost,
)
"""All rules, in the order in which their findings are read."""
