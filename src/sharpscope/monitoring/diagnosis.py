"""Diagnoses a run: sentences, each with the numbers it rests on and where its rule comes from.

A rule is a function of the measurements that returns a `Finding`, or None where it does not apply; `RULES` holds them
in the order in which they are read.  They see columns of a history, `Facts` and `Now` alone, so that a run on disk is
diagnosed like a live one.  r is the ratio of sharpness to its threshold at the present learning rate, τ the intrinsic
time of weight decay.
"""

import math
from collections.abc import Callable

import numpy as np

from ..optimizers.from_torch import FIXED_LENGTH
from ..optimizers.weight_kinds import INVARIANT, KINDS, NULL
from ..records.history import History
from .finding import Finding, Findings
from .measurements import ENOUGH, Facts, Measurements, Now, ago
from .step_rules import STEP_RULES
from .time_budget import ADVANCE

AT_THE_EDGE = (0.95, 1.3)
"""Range of r called "at the edge": oscillation and several unstable modes push it above one."""

BURSTS = (0.7, 2.0)
"""Range in which the middle half of the late measurements lies for a run at the edge."""

SAFE = 0.8
"""Fraction of the largest stable rate that remedies advise."""

LYU = "Lyu, Li & Arora 2022, arXiv 2206.07085"
COHEN = "Cohen et al. 2021, arXiv 2103.00065"
KOSSON = "Kosson et al. 2024, arXiv 2305.17212"
CONN = "gain ratio of trust-region methods: Conn, Gould & Toint 2000"

ALONG_STEP = (
    (0.5, "they pay, and steps of twice the length would, too"),
    (0.9, "they pay, but steps of twice the length would not"),
    (1.1, "they are at the edge along the step, where a step no longer lowers the loss of its batch"),
    (math.inf, "the loss of the very batch rises"),
)
"""Meanings of one less the gain ratio, each with its upper end."""


def diagnose(history: History, run: str, facts: Facts, now: Now | None = None) -> Findings:
    """Say what the measurements of `run` mean, most urgent first."""
    measurements = Measurements(history, run, facts, now)
    return Findings(finding for rule in RULES for finding in [rule(measurements)] if finding is not None)


def divergence(at: Measurements) -> Finding | None:
    """Report the step at which the loss was not finite."""
    names = ("run", "step", "loss", "learning_rate")
    rows = zip(*(at.history.columns.get(name, [None] * len(at.history)) for name in names), strict=True)
    measured = [(step, loss) for run, step, loss, rate in rows if run == at.run and rate is not None]  # not by meters
    lost = [step for step, loss in measured if not np.isfinite(np.nan if loss is None else loss)]
    if not lost:
        return None
    text = f"The run diverged: at step {lost[0]} the loss was not finite; what follows is about the steps before."
    remedy = "Go back to weights from before, with a lower learning rate" if math.isnan(at.stable_rate) else ""
    remedy = remedy or f"Go back to weights from before, with a learning rate below {_n(at.stable_rate)}"
    return Finding("diverged", text, {"step": float(lost[0])}, severity="alarm", remedy=f"{remedy}.")


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
    return Finding("gaps", text, {"missing": float(len(missing)), "of": float(len(finite))}, severity="warning")


def regime(at: Measurements) -> Finding:
    """Say on which side of the edge of stability the run is, and whether it is approaching."""
    if at.facts.observed:
        return _observed(at)
    if not len(at.curvature[0]):
        text = "There is no measurement of the curvature at a positive learning rate, so no threshold to compare with."
        return Finding("too few", text)
    if not at.decided:
        return _number_only(at)
    name, text, source = _side(at)
    own, present = at.curvature[1][at.window], at.at_rate(at.rate)[at.window]
    numbers = {"ratio": at.ratio, "learning rate": at.rate, "step": at.step, "measurements": float(at.count)}
    numbers |= {"first step": float(at.curvature[0][at.window][0]), "last step": float(at.curvature[0][-1])}
    numbers |= {"quarter": float(np.quantile(present, 0.25)), "three quarters": float(np.quantile(present, 0.75))}
    if at.varied:
        at_peak = float(np.median(at.at_rate(at.largest_rate)[at.window]))
        numbers |= {"largest rate": at.largest_rate, "ratio at largest rate": at_peak}
        numbers |= {"ratio when measured": float(np.median(own))}
        if at.rate < at.largest_rate:
            text += f" At the largest rate so far, {_n(at.largest_rate)}, the same curvature would give {_r(at_peak)}."
    if name != "above":
        return Finding(name, text, numbers, source)
    remedy = f"Lower the learning rate from {_n(at.rate)} to {_n(SAFE * at.stable_rate)}"
    return Finding(name, text, numbers, source, "warning", f"{remedy}, {SAFE:g} of the largest stable one.")


def _observed(at: Measurements) -> Finding:
    """Say that there is no threshold, and what is measured instead."""
    kinds = ", ".join(at.facts.observed)
    text = (
        f"No threshold is known for {kinds}: what is measured is the curvature itself, and how weights move, but not"
        " how far the edge of stability is."
    )
    if (sharpness := at.last("sharpness")) == sharpness:
        text += f" The sharpness is {sharpness:.3g} ({at.when('sharpness')})."
    own = [kind for kind in at.facts.observed if kind not in FIXED_LENGTH]
    remedy = f"If {own[0]} takes the steps of AdamW, say: optimizers.same_steps({own[0]}, AdamW)." if own else ""
    return Finding("observed", text, {"sharpness": sharpness} if sharpness == sharpness else {}, remedy=remedy)


def _number_only(at: Measurements) -> Finding:
    """Give the last number without a verdict, where measurements are too few or too old."""
    steps, ratios, rates = (float(column[-1]) for column in at.curvature)
    numbers = {"ratio": ratios, "learning rate": rates, "step": steps, "age": at.age, "measurements": float(at.count)}
    when = f"At step {steps:.0f}{f', {ago(at.age)},' if at.age > 0 else ''}"
    text = f"{when} sharpness / threshold was {_r(ratios)}, at a learning rate of {_n(rates)}"
    if at.rate > 0 and not math.isclose(at.rate, rates, rel_tol=1e-6):
        text += f" (at the present {_n(at.rate)} the same curvature would give {_r(ratios * at.rate / rates)})"
    if at.count < ENOUGH:
        have = ("the only measurement, of the start, gives", "one measurement gives", "two measurements give")[at.count]
        return Finding("too few", f"{text}: {have} a number and no verdict; {ENOUGH} will.", numbers, COHEN)
    text += ": too long ago for a verdict on the present."
    remedy = "Measure more often (every=), or with a larger budget."
    return Finding("out of date", text, numbers, COHEN, remedy=remedy)


def _side(at: Measurements) -> tuple[str, str, str]:
    """Name, sentence and source of the regime, from enough fresh measurements."""
    present, r = at.at_rate(at.rate)[at.window], at.ratio
    low, high = (float(q) for q in np.quantile(present, (0.25, 0.75)))
    seen = f"sharpness / threshold is {_r(r)} at the learning rate {_n(at.rate)} (median of {at.when()}{_error(at)})"
    floor, ceiling = AT_THE_EDGE
    if at.rate <= 0:
        return "below", f"Below the edge of stability: the learning rate is zero now ({at.when()}).", COHEN
    if r >= floor and _blowing_up(at):
        text = f"Above the edge of stability: {seen}, and the loss grows from measurement to measurement."
        return "above", text, COHEN
    if _at_edge(present) or (not at.steady and _at_edge(at.curvature[1][at.window]) and present[-1] >= floor):
        text = f"At the edge of stability: {seen}; the learning rate now sets the sharpness, not the other way round."
        return "edge", text, COHEN
    if low > ceiling:
        return "above", f"Above the edge of stability: {seen}; {_above(at)}", COHEN
    if high >= floor:
        text = (
            f"Undecided: {seen}, but half of them lie between {_r(low)} and {_r(high)}, on both sides of"
            f" {floor:g} to {ceiling:g}, the range of the edge; a few more measurements will tell."
        )
        return "undecided", text, COHEN
    if r <= 0:
        return "below", f"Below the edge of stability: {seen}; no direction curves upwards.", COHEN
    if _rising(at.at_rate(at.rate)) and _rising(at.curvature[1]):  # neither the rate alone nor against it
        up = f"up from {_r(at.at_rate(at.rate)[0])} at step {at.curvature[0][0]:.0f}; the edge is not reached yet"
        if _by_norm(at):
            text = f"Approaching the edge as the norm of the weights shrinks: {seen}, {up}."
            return "approaching", text, LYU
        if not _by_steps(at):
            return "sharpening", f"Progressive sharpening: {seen}, {up}.", COHEN
        text = f"Below the edge of stability: {seen}, {up}; it is the optimizer's steps that grow, not the curvature."
        return "below", text, COHEN
    text = f"Below the edge of stability: {seen}; it may grow {1 / r:.3g}-fold before steps overshoot."
    return "below", text, COHEN


def _error(at: Measurements) -> str:
    """Say how rough the late values are, where they are rougher than the bounds of regimes."""
    late = at.late("uncertainty")
    rough = float(np.median(late)) if len(late) else 0.0
    return f", each to about {rough:.0%}" if rough > 0.1 else ""


def _above(at: Measurements) -> str:
    """Say what being above the edge does to this run, as its loss has it."""
    if clipping(at):
        return "steps overshoot, but are clipped, which keeps them short."
    losses = at.late_losses
    if len(losses) >= ENOUGH and losses[-1] < losses[0]:
        return (
            f"steps overshoot along that direction, but meanwhile the loss fell from {losses[0]:.3g} to"
            f" {losses[-1]:.3g} ({len(losses)} measurements)."
        )
    return "expect the loss to rise, or a jump to a flatter place."


def _at_edge(ratios: np.ndarray) -> bool:
    low, high = (float(q) for q in np.quantile(ratios, (0.25, 0.75)))
    median = float(np.median(ratios))
    return AT_THE_EDGE[0] <= median <= AT_THE_EDGE[1] and low >= BURSTS[0] and high <= BURSTS[1]


def _blowing_up(at: Measurements) -> bool:
    """Say whether the loss has grown at each of the late measurements, and doubled: at the edge it goes up and down."""
    losses = at.late_losses
    return len(losses) >= ENOUGH and bool((np.diff(losses) > 0).all()) and bool(losses[-1] > 2 * losses[0] > 0)


def _rising(ratios: np.ndarray) -> bool:
    """Say whether r has grown by a fifth since the first, and still grows by two per cent over the last quarter."""
    n = max(1, len(ratios) // 4)
    if len(ratios) < 3 or ratios[-1] <= 1.2 * ratios[0]:
        return False
    return bool(np.median(ratios[-n:]) > 1.02 * np.median(ratios[-2 * n : -n]))


def _by_norm(at: Measurements) -> bool:
    """Say whether the norm explains more of the late rise than the spherical sharpness does."""
    ratio, rates, spherical = at.table("stability_ratio", "learning_rate", "spherical_sharpness")
    if not (rates > 0).all():
        return False
    ratio = ratio * (at.rate / rates)
    n = max(1, len(ratio) // 4)
    if len(ratio) <= n or min(ratio[-1 - n], spherical[-1 - n], spherical[-1]) <= 0:
        return False
    return bool(math.log(spherical[-1] / spherical[-1 - n]) < 0.5 * math.log(ratio[-1] / ratio[-1 - n]))


def _by_steps(at: Measurements) -> bool:
    """Say whether the sharpness explains less than half of the rise of r: the rest is the metric of the steps."""
    ratio, rates, sharpness = at.table("stability_ratio", "learning_rate", "sharpness")
    if len(ratio) < ENOUGH or not (rates > 0).all() or min(ratio[0], sharpness[0], sharpness[-1]) <= 0:
        return False
    rise = math.log(ratio[-1] * rates[0] / (rates[-1] * ratio[0]))
    return bool(math.log(sharpness[-1] / sharpness[0]) < 0.5 * rise)


def top_eigenvector(at: Measurements) -> Finding | None:
    """Say whether the curvature is that of the invariant or of the other weights, where there are both."""
    fractions = at.by_group("fraction")
    other = at.facts.size - at.facts.invariant - sum(at.facts.null.values())
    if not fractions or other <= 0 or not (at.stable_rate > 0 or at.facts.observed):
        return None
    inside = min(sum(fractions.values()), 1.0)
    largest = max(fractions, key=lambda name: fractions[name])
    numbers = {"fraction": inside, "other weights": float(other)}
    when = at.when(f"fraction/{largest}")
    if inside >= 0.5:
        text = (
            f"{inside:.0%} of the top eigenvector lies in scale-invariant weights (most in {largest}; {when}): their"
            " norm can adapt to the curvature, and weight decay governs it."
        )
    else:
        text = (
            f"Only {inside:.0%} of the top eigenvector lies in scale-invariant weights ({when}): the curvature that"
            f" meets the edge is that of the {other} other weights, whose steps weight decay does not adapt."
        )
    return Finding("top eigenvector", text, numbers, LYU)


def largest_rate(at: Measurements) -> Finding | None:
    """Give the learning rate at which the measured curvature is at the edge, lr/r."""
    largest, rate, peak = at.stable_rate, at.rate, at.largest_rate
    if not (largest > 0 and peak > 0):
        return None
    numbers = {"largest": largest, "learning rate": rate, "largest so far": peak}
    verb = "is" if at.decided else "was"
    text = f"At the curvature of {at.when()}, the largest stable learning rate {verb} {_n(largest)}"
    if not at.varied:
        return Finding("largest rate", f"{text} (the rate is {_n(rate)}).", numbers, COHEN)
    times = f", {_r(rate / largest)} of it" if rate > 0 else ""
    text += f"; the rate is {_n(rate)} now{times}"
    text += f", and was at most {_n(peak)}, {_r(peak / largest)} of it." if rate < peak else "."
    return Finding("largest rate", text, numbers, COHEN)


def peak_ahead(at: Measurements) -> Finding | None:
    """Notice that a learning rate that is still to come is past the edge of the present curvature."""
    step, peak = at.peak_ahead
    if not (at.decided and peak > 1.02 * at.rate and peak > AT_THE_EDGE[1] * SAFE * at.stable_rate):
        return None
    ratio = peak / at.stable_rate
    text = (
        f"The learning rate will rise to {_n(peak)} at step {step:.0f}, where the curvature of {at.when()} would make"
        f" the ratio {_r(ratio)}: {'past' if ratio > 1 else 'at'} the edge, unless the curvature falls until then."
    )
    numbers = {"peak": peak, "step": step, "ratio": ratio, "largest": at.stable_rate}
    remedy = f"Where the loss jumps there, lower the peak to {_n(SAFE * at.stable_rate)}, or warm up for longer."
    return Finding("peak ahead", text, numbers, COHEN, "advice", remedy)


def schedule(at: Measurements) -> Finding | None:
    """Say that the learning rate follows a schedule which is not known here."""
    if not at.varied or len(at.coming[0]) or at.steps_left == 0:
        return None
    text = (
        f"The learning rate has changed, to {_n(at.rate)} by step {at.step:.0f} with {_n(at.largest_rate)} as the"
        " largest, and how it goes on is not known here: what is found holds at the rate of now."
    )
    remedy = "Monitor(..., scheduler=..., steps=...) takes it into account."
    return Finding("schedule", text, {"learning rate": at.rate, "largest": at.largest_rate}, remedy=remedy)


def twice_the_rate(at: Measurements) -> Finding | None:
    """Say what doubling the learning rate would change; not where a schedule has brought it far down."""
    r = at.ratio
    if not (at.decided and r > 0 and at.rate >= 0.5 * at.largest_rate > 0):
        return None
    doubled = f"Twice the present learning rate, {_n(2 * at.rate)},"
    if 2 * r < AT_THE_EDGE[0]:
        text = f"{doubled} would bring the ratio to {_r(2 * r)}, still below the edge."
    elif r < AT_THE_EDGE[0]:
        text = (
            f"{doubled} would bring the ratio to {_r(2 * r)}, past the edge: expect the loss to jump until the"
            " sharpness has fallen to the new threshold."
        )
    else:
        text = f"{doubled} would halve the sharpness that training can hold"
        inside = sum(at.by_group("fraction").values()) >= 0.5
        text += ": invariant weights get there by √2 times their norm." if inside else ": expect a jump first."
    return Finding("twice the rate", f"{text[:-1]} ({at.when()}).", {"ratio": r, "doubled": 2 * r}, COHEN)


def steps_to_the_edge(at: Measurements) -> Finding | None:
    """Predict when shrinking norms reach the edge, if gradients have died: after τ = ½ ln(1/r) of weight decay."""
    r, rate = at.ratio, at.last("intrinsic_time_per_step")
    if not (at.decided and 0 < r < AT_THE_EDGE[0] and rate > 0) or not at.steady:
        return None
    if sum(at.by_group("fraction").values()) < 0.5 or eps(at) or at.rate < 0.5 * at.largest_rate:
        return None
    tau = 0.5 * math.log(1 / r)
    steps = tau / rate
    text = (
        f"By weight decay alone, at the learning rate {_n(at.rate)}, the edge is {steps:.0f} steps away at the earliest"
        f" (τ = ½ ln(1/{_r(r)}) = {tau:.2g})"
    )
    if at.steps_left > 0:
        text += f"; {at.steps_left:.0f} are left"
    text += ", so it will not get there." if steps > at.steps_left > 0 else "."
    numbers = {"ratio": r, "tau": tau, "steps": steps, "left": at.steps_left}
    return Finding("steps to the edge", text, numbers, LYU)


def invariance(at: Measurements) -> Finding:
    """Count the scale-invariant weights."""
    n = at.facts.invariant
    if not at.facts.groups_known:
        reason = (
            "no measurement has found them" if at.facts.budget is None else "the budget has not allowed finding them"
        )
        text = f"Which weights are scale-invariant is not known yet: {reason}."
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
        parts.append(f"It also shrinks {idle} parameters that have no effect on the loss ({names}).")
    if pairs:
        which = f"{len(pairs)} pairs of tensors ({pairs[0]}, ..)" if pairs[1:] else f"1 pair of tensors ({pairs[0]})"
        parts.append(
            f"In {which}, one may be made larger and the other smaller without effect on the loss: there weight decay"
            " only evens out the norms of the two."
        )
    numbers = {"invariant": float(n), "idle": float(idle), "pairs": float(len(pairs))}
    remedy = "Leave out of weight decay what has no effect on the loss." if idle else ""
    return Finding("decay rescales", " ".join(parts), numbers, LYU, "advice" if idle else "note", remedy)


def decay_groups(at: Measurements) -> Finding | None:
    """Name the kinds of weights whose weight decay is not what their kind calls for, where any has weight decay."""
    decayed, undecayed, pairs = at.facts.decayed, at.facts.undecayed, at.facts.one_sided
    if not decayed:
        return None
    parts = []
    offsets = {kind: n for kind, n in decayed.items() if not KINDS[kind].decays and kind != NULL}
    if offsets:
        counts = ", ".join(f"{n} weights that are {kind}" for kind, n in offsets.items())
        parts.append(f"Weight decay also pulls {counts} towards zero: by convention these are left out.")
    if bare := undecayed.get(INVARIANT, 0):
        text = f"{bare} scale-invariant weights have no weight decay: their steps shrink as their norm grows"
        mixed = "; in a group with weights that have it, these shrink against them"
        parts.append(f"{text}{mixed * (INVARIANT in decayed)}.")
    if pairs:
        count = "a pair of tensors" if len(pairs) == 1 else f"{len(pairs)} pairs of tensors"
        parts.append(
            f"In {count} ({pairs[0]}{', ..' * bool(pairs[1:])}) one side has weight decay and the other has none: it"
            " shrinks while the other makes up for it, and no penalty is left."
        )
    numbers = {"offsets": float(sum(offsets.values())), "invariant": float(bare), "one-sided": float(len(pairs))}
    remedy = "Make the groups of the optimizer by sharpscope.param_groups(objective, weight_decay)."
    serious = "advice" if bare or pairs else "note"
    return Finding("decay groups", " ".join(parts), numbers, "", serious, remedy) if parts else None


def intrinsic_time(at: Measurements) -> Finding | None:
    """Say whether weight decay has had time to act: τ so far and at the end."""
    rate, tau, end = at.last("intrinsic_time_per_step"), at.tau, at.tau_at_end
    if at.facts.invariant == 0 or math.isnan(rate):
        return None
    if rate == 0 and tau == 0:
        text = "There is no weight decay: the norm of the invariant weights can only grow, and their steps shrink."
        return Finding("no decay", text, {"intrinsic time per step": 0.0}, LYU)
    numbers = {"tau": tau, "intrinsic time per step": rate, "tau at the end": end}
    acted = (
        f"Weight decay has acted for τ = {tau:.3g} by step {at.step:.0f} ({rate:.2g} a step at the last measurement)"
    )
    if at.steps_left > 0 and end >= 0:
        acted += f", and will have for τ = {end:.3g} after the {at.facts.steps} steps planned"
    if end < 0.1:
        text = f"{acted}: weight decay has no time to act in this run."
        remedy = f"For τ = 1 at the end, weight decay would have to be {1 / end:.2g} times as large." if end > 0 else ""
        return Finding("no time", text, numbers, LYU, "advice", remedy)
    if tau >= 1:
        return Finding("intrinsic time", f"{acted}: norms have had time to settle.", numbers, LYU)
    if end >= 0:
        text = f"{acted}; it shapes the norms from about τ = 1 on{', which this run does not reach' * (end < 1)}."
    elif at.varied or rate <= 0:
        text = f"{acted}; it shapes the norms from about τ = 1 on."
    else:
        numbers |= {"steps": (1 - tau) / rate}
        text = f"{acted}; it shapes the norms from about τ = 1 on, {numbers['steps']:.0f} steps from now at this rate."
    return Finding("intrinsic time", text, numbers, LYU)


def settling(at: Measurements) -> Finding | None:
    """Compare the τ of the whole run with the one over which norm and rotation balance, τ = ½."""
    rate, end, steps = at.last("intrinsic_time_per_step"), at.tau_at_end, at.facts.steps
    if at.facts.invariant == 0 or not rate > 0 or steps is None or not end >= 0 or at.tau >= 1:
        return None
    fits = "fits" if end >= 1.5 else "does not fit" if end < 0.5 else "only just fits"
    time = steps * 0.5 / end if end > 0 else math.inf
    text = (
        f"Norm and rotation of invariant weights balance over about τ = ½, that is {time:.0f} steps at the mean rate of"
        f" this run, which {fits} in its {steps}."
    )
    return Finding("settling", text, {"time": time, "steps": float(steps), "tau at the end": end}, KOSSON)


def twice_the_decay(at: Measurements) -> Finding | None:
    """Say what doubling weight decay would change."""
    rate, end = at.last("intrinsic_time_per_step"), at.tau_at_end
    if at.facts.invariant == 0 or not rate > 0:
        return None
    numbers = {"intrinsic time per step": rate, "tau at the end": end, "angle": at.last("equilibrium")}
    text = "Twice the weight decay would double the intrinsic time per step"
    if at.steps_left > 0 and end >= 0:
        text += f" (τ = {2 * end:.3g} at the end)"
    if numbers["angle"] > 0:
        angle = math.degrees(numbers["angle"])
        text += f", and turn settled weights by {math.sqrt(2) * angle:.2g}° a step instead of {angle:.2g}°"
        text += f", at the rate of step {at.last('step'):.0f}" * at.varied
    return Finding("twice the decay", text + ".", numbers, KOSSON)


def rotation(at: Measurements) -> Finding | None:
    """Compare the angle per step of settled weights with its law."""
    angles, expected = at.by_group("rotation"), at.last("equilibrium")
    if not angles or not expected > 0 or not at.tau >= 1 or eps(at):
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
        f"The eps of a normalization keeps {name} from the edge: it balances {balanced[name]:.0%} of its weight decay"
        f" ({at.when(f'radial/{name}')}), since the variance it is added to has become as small."
    )
    remedy = "Use a smaller eps, or larger weights and a larger rate."
    return Finding("eps", text, {"balanced": balanced[name], "ratio": at.ratio}, LYU, "warning", remedy)


def clipping(at: Measurements) -> Finding | None:
    """Notice that the norm of the gradients that were applied is the same at all late measurements."""
    norms = at.late("applied_gradient")
    if len(at.series("clipping")) or len(norms) < 3 or not norms[-1] > 0 or np.ptp(norms) > 1e-4 * norms[-1]:
        return None
    if np.ptp(at.late("loss")) <= 1e-3 * abs(at.last("loss")):
        return None
    text = (
        f"The gradients seem to be clipped to norm {norms[-1]:.3g} ({at.when('applied_gradient')}): steps are shorter"
        " than the learning rate says, and training is stable at larger ratios than one."
    )
    return Finding("clipping", text, {"norm": float(norms[-1])})


def along_step(at: Measurements) -> Finding | None:
    """Say whether the latest steps paid, by the change of the loss of their own batch against its slope."""
    steps, values = at.table("step", "edge_along_step")
    if not len(values):
        return None
    late = at.late("edge_along_step")
    value, count = float(np.median(late)), len(late)
    low, high = (float(q) for q in np.quantile(late, (0.25, 0.75)))
    when = f"{count} steps from {steps[-count]:.0f} to {steps[-1]:.0f}" if count > 1 else f"step {steps[-1]:.0f}"
    text = f"Along the steps the edge is at 1, and they are at {_r(value)} (median of {when})"
    decided = count >= ENOUGH
    meaning = next(meaning for end, meaning in ALONG_STEP if value < end)
    text += f": {meaning}." if decided else "; that is too few to judge by."
    text += " This rests on the direction and the batch of each step, not on λ1, which may say otherwise."
    slopes = at.series("slope_along_step")
    uphill = int((slopes > 0).sum())
    if uphill:
        text += f" {uphill} of {len(slopes)} steps went uphill on their batch, and do not count."
    numbers = {"median": value, "quarter": low, "three quarters": high, "steps": float(count), "uphill": float(uphill)}
    if not decided or value < ALONG_STEP[-2][0]:
        return Finding("along the step", text, numbers, CONN)
    remedy = f"With {_n(1 / value)} of their length the steps would be at the edge."
    return Finding("along the step", text, numbers, CONN, severity="advice", remedy=remedy)


def cost(at: Measurements) -> Finding | None:
    """Give the time of measuring, as a fraction of that of training."""
    overhead = at.last("overhead") if at.facts.overhead is None else at.facts.overhead
    if math.isnan(overhead):
        return None
    part = f"{overhead:.2%} of" if overhead < 1 else f"{overhead:.1f} times"
    text, numbers = f"Measuring took {part} the time of training so far.", {"overhead": overhead}
    if at.facts.budget is not None:
        kept = f" The first steps had an advance: from step {ADVANCE} on, {at.facts.budget:.0%} are kept."
        return Finding("cost", text + kept * (overhead > at.facts.budget), numbers)
    if overhead < 0.5:
        return Finding("cost", text, numbers)
    return Finding(
        "cost", text, numbers, severity="advice", remedy='Monitor(..., budget="5%") keeps it to a twentieth.'
    )


RULES: tuple[Callable[[Measurements], Finding | None], ...] = (
    divergence,
    stopped_gradients,
    gaps,
    regime,
    top_eigenvector,
    eps,
    clipping,
    largest_rate,
    peak_ahead,
    schedule,
    twice_the_rate,
    invariance,
    decay_rescales,
    decay_groups,
    intrinsic_time,
    settling,
    steps_to_the_edge,
    twice_the_decay,
    rotation,
    along_step,
    *STEP_RULES,
    cost,
)
"""All rules, in the order in which their findings are read."""


def _n(value: float) -> str:
    return f"{value:.3g}"


def _r(ratio: float) -> str:
    """Show a ratio with two decimals, or with two digits where these would not show it."""
    return f"{ratio:.2f}" if ratio == 0 or 0.095 <= abs(ratio) < 1000 else f"{ratio:.2g}"
