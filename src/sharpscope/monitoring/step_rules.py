"""Rules on single steps: what of the learning rate arrives in the weights, and spikes of the loss.

They read the columns of `TensorTable` and `LossWatch`, and have nothing to say where these were not used.
"""

from collections.abc import Callable

import numpy as np

from .finding import Finding
from .measurements import Measurements

ABSORBED = 0.1
"""Fraction of the weights of a tensor that stand still before it is worth a sentence."""

FAST, SLOW = 10.0, 0.01
"""Relative steps, over that of the median tensor, beyond which a tensor is an outlier."""

LAGS = 2.3
"""Rms of g/√v from which spikes were found to follow."""

WORTSMAN = "Wortsman et al. 2023, arXiv 2304.13013"


def clipped_steps(at: Measurements) -> Finding | None:
    """Say how much of the gradient is left after clipping."""
    left = at.late("clipping")
    if not len(left) or not float(np.median(left)) < 0.99:
        return None
    part, often = float(np.median(left)), float((left < 0.999).mean())
    text = (
        f"The step is not your learning rate: {often:.0%} of the late gradients were clipped, to {part:.2g} of their"
        " norm in the median"
    )
    if at.by_group("signal"):
        text += "; of Adam's steps a factor that stays the same cancels, one that changes does not."
    else:
        text += f", which is as if the rate were {part:.2g} of what it is."
    return Finding("clipped", text, {"left": part, "clipped": often})


def absorbed_steps(at: Measurements) -> Finding | None:
    """Name the tensors of which many weights stand still although they have a gradient."""
    still = at.by_group("unmoved")
    lost = {name: part for name, part in still.items() if part >= ABSORBED}
    if not lost:
        return None
    worst = max(lost, key=lambda name: lost[name])
    text = (
        f"Steps are lost in rounding: in {len(lost)} of {len(still)} tensors at least {ABSORBED:.0%} of the weights"
        f" with a gradient did not change in a step (most in {worst}, {lost[worst]:.0%})."
    )
    remedy = "Keep these weights in higher precision while they are trained."
    numbers = {"tensors": float(len(lost)), "most": lost[worst]}
    return Finding("absorbed", text, numbers, severity="warning", remedy=remedy)


def uneven_steps(at: Measurements) -> Finding | None:
    """Name the tensors whose relative step is far from that of the others; biases and gains are not compared."""
    gradients = at.by_group("gradient")
    small = {name for name, kind in at.facts.kinds.items() if kind in ("bias", "gain")}
    steps = {n: u for n, u in at.by_group("update").items() if n not in small and gradients.get(n, 1.0) > 0}
    if len(steps) < 4:
        return None
    median = float(np.median(list(steps.values())))
    far = {name: u / median for name, u in steps.items() if median > 0 and not SLOW <= u / median <= FAST}
    if not far:
        return None
    worst = sorted(far, key=lambda name: -abs(np.log(far[name] + 1e-30)))[:3]
    each = ", ".join(f"{name} {far[name]:.2g} times" for name in worst) + ", .." * (len(far) > 3)
    text = (
        f"Relative to their weights {len(far)} of {len(steps)} tensors take steps unlike the others: {each} the median,"
        f" which is {median:.2g} a step."
    )
    return Finding("uneven steps", text, {"median": median, "tensors": float(len(far)), worst[0]: far[worst[0]]})


def without_gradient(at: Measurements) -> Finding | None:
    """Name the tensors that had no gradient at any step that was read."""
    series = {
        name.removeprefix("gradient/"): at.series(name) for name in at.history.columns if name.startswith("gradient/")
    }
    without = [name for name, values in series.items() if len(values) >= 3 and not values.any()]
    if not without:
        return None
    count = max(len(series[name]) for name in without)
    names = ", ".join(without[:3]) + ", .." * (len(without) > 3)
    verb = "tensors have" if without[1:] else "tensor has"
    text = f"{len(without)} {verb} never received a gradient at the {count} steps that were looked at: {names}."
    numbers = {"tensors": float(len(without)), "steps": float(count)}
    return Finding("no gradient", text, numbers, severity="advice", remedy="Use them in the loss, or freeze them.")


def loss_spikes(at: Measurements) -> Finding | None:
    """Count the spikes of the loss, and say of the highest what is known of the steps before it."""
    spikes = _spikes(at)
    if not spikes:
        return None
    worst = max(spikes, key=lambda spike: spike["spike_loss"] - spike["spike_base"])
    count = "1 loss spike," if len(spikes) == 1 else f"{len(spikes)} loss spikes, the highest"
    text = f"{count} at step {worst['spike']:.0f}: the loss of the batch rose from {worst['spike_base']:.3g} to"
    text += f" {worst['spike_loss']:.3g}"
    if "spike_length" in worst:
        length = worst["spike_length"]
        text += f" and was low again after {length:.0f} step{'s' * (length != 1)}."
    else:
        text += ", and was not low again by the last measurement." if worst is spikes[-1] else ", and stayed high."
    sentences = [_gradients(worst), _rates(worst), _lags(worst), _fixed_data(at, worst), _ratio(at, worst)]
    numbers = {name.removeprefix("spike_"): value for name, value in worst.items() if name != "spike"}
    source = WORTSMAN if worst.get("spike_lag", 0.0) >= LAGS else ""
    return Finding(
        "loss spike",
        " ".join([text, *filter(None, sentences)]),
        {"spikes": float(len(spikes)), "step": worst["spike"]} | numbers,
        source,
        severity="note" if "spike_length" in spikes[-1] else "warning",
    )


def _spikes(at: Measurements) -> list[dict[str, float]]:
    """Columns of each spike, from the last row about it, in the order of their steps."""
    if "spike" not in at.history.columns:
        return []
    names = [name for name in at.history.columns if name == "spike" or name.startswith("spike_")]
    found: dict[float, dict[str, float]] = {}
    for run, *values in zip(*(at.history.columns[name] for name in ("run", *names)), strict=True):
        row = {name: float(value) for name, value in zip(names, values, strict=True) if value is not None}
        if run == at.run and "spike" in row:
            found[row["spike"]] = row
    return [found[step] for step in sorted(found)]


def _gradients(spike: dict[str, float]) -> str:
    own, lead = spike.get("spike_gradient"), spike.get("spike_lead")
    before = spike.get("spike_gradient_before")
    if own is None or lead is None or before is None:
        return ""
    if lead:
        steps = f"{lead:.0f} step{'s' * (lead > 1)}"
        return f"The gradient was large from {steps} before, up to {before:.2g} times its median."
    text = f"The gradient was as usual before, and that of the batch {own:.2g} times the median"
    return text + (" (as it was applied, so that clipping may hide more)." if own < 1.5 else ".")


def _rates(spike: dict[str, float]) -> str:
    rate = spike.get("spike_rate", 1.0)
    return f"The learning rate had been raised to {rate:.2g} times its median." if rate >= 1.5 else ""


def _lags(spike: dict[str, float]) -> str:
    lag = spike.get("spike_lag")
    if lag is None:
        return ""
    if lag < LAGS:
        return f"Adam's v had kept up with the gradient (g/√v of rms {lag:.2g} at most)."
    return f"Adam's v lagged behind the gradient before it (g/√v of rms {lag:.2g}): a smaller β2 follows faster."


def _fixed_data(at: Measurements, spike: dict[str, float]) -> str:
    """Say what the loss of the objective's data did, which is measured now and then, and was so just after the step."""
    after, before = spike.get("spike_probe"), _last_before(at, "loss", spike["spike"])
    if after is None or before is None or not before[1] > 0:
        return ""
    rise, whole = after / before[1] - 1, spike["spike_loss"] / spike["spike_base"] - 1
    since = f"the loss of the fixed data was {after:.3g}, and {before[1]:.3g} at step {before[0]:.0f}"
    if rise < 0.1 * whole:
        return f"The batch was unusual: after it {since}."
    return f"Not the batch alone: after it {since}."


def _ratio(at: Measurements, spike: dict[str, float]) -> str:
    found = _last_before(at, "stability_ratio", spike["spike"])
    return "" if found is None else f"Sharpness / threshold had been {found[1]:.2f} at step {found[0]:.0f}."


def _last_before(at: Measurements, name: str, step: float) -> tuple[float, float] | None:
    """Step and value of the last measurement of a column before a step."""
    if not len(at.series(name)):
        return None
    steps, values = at.history.table(at.run, "step", name)
    earlier = np.flatnonzero(steps < step)
    return (float(steps[earlier[-1]]), float(values[earlier[-1]])) if len(earlier) else None


STEP_RULES: tuple[Callable[[Measurements], Finding | None], ...] = (
    loss_spikes,
    clipped_steps,
    absorbed_steps,
    uneven_steps,
    without_gradient,
)
"""The rules on steps, in the order in which their findings are read."""
