"""What the readings of a run mean: sentences, each with the numbers it rests on."""

import numpy as np

from .history import History
from .invariance import ScaleGroups
from .rules import UpdateRule

AT_THE_EDGE = (0.95, 1.3)
"""Range of sharpness / threshold called "at the edge": oscillation and several unstable modes push it above one."""


def diagnose(history: History, run: str, rule: UpdateRule | None, groups: ScaleGroups) -> list[str]:
    """Sentences on the regime, the invariant weights and the weight-decay clock of `run`."""
    return [
        *_divergence(history, run),
        *_gaps(history, run),
        _regime(history, run),
        _invariance(groups),
        *_clock(history, run, rule, groups),
    ]


def _divergence(history: History, run: str) -> list[str]:
    rows = zip(history.columns["run"], history.columns["step"], history.columns["loss"], strict=True)
    lost = [step for name, step, loss in rows if name == run and not np.isfinite(np.nan if loss is None else loss)]
    if not lost:
        return []
    return [f"The run diverged: at step {lost[0]} the loss was not finite; what follows is about the steps before."]


def _gaps(history: History, run: str) -> list[str]:
    names = ("run", "step", "loss", "sharpness")
    rows = list(zip(*(history.columns.get(name, [None] * len(history)) for name in names), strict=True))
    finite = [row for row in rows if row[0] == run and row[2] is not None and np.isfinite(row[2])]
    gaps = [step for _, step, _, sharpness in finite if sharpness is None]
    if not gaps:
        return []
    return [
        f"At {len(gaps)} of {len(finite)} readings, first at step {gaps[0]}, no curvature was found (not finite, or not"
        " converged); what follows is about the others."
    ]


def _regime(history: History, run: str) -> str:
    if "stability_ratio" not in history.columns:
        return (
            "There is no reading of the curvature at a positive learning rate yet, and so no threshold to compare with."
        )
    ratios = history.series(run, "stability_ratio")
    late = ratios[-max(1, len(ratios) // 4) :]
    ratio, count = float(np.median(late)), len(late)
    seen = f"sharpness / threshold is {ratio:.2f} (median of the last {count} readings)"
    low, high = AT_THE_EDGE
    if ratio <= 0:
        return f"Below the edge of stability: {seen}; no direction curves upwards."
    if ratio > high:
        return f"Above the edge of stability: {seen}; expect the loss to rise, or a jump to a flatter place."
    if ratio >= low:
        return f"At the edge of stability: {seen}; the learning rate now sets the sharpness, not the other way round."
    if len(ratios) > 2 and ratio > 1.2 * ratios[0]:
        return f"Progressive sharpening: {seen}, up from {ratios[0]:.2f}; the edge is not reached yet."
    return f"Below the edge of stability: {seen}; it may grow {1 / ratio:.3g}-fold before training is unstable."


def _invariance(groups: ScaleGroups) -> str:
    n = groups.joint.numel()
    if n == 0:
        return "No weights are scale-invariant: the plain sharpness is the one to read."
    return (
        f"{n} weights are scale-invariant (Euler cosine {groups.joint_defect:.1e}):"
        " judge flatness by the spherical sharpness, since the plain one changes with their norm alone."
    )


def _clock(history: History, run: str, rule: UpdateRule | None, groups: ScaleGroups) -> list[str]:
    if groups.joint.numel() == 0 or rule is None:
        return []
    if rule.clock == 0:
        return ["There is no weight decay: the norm of the invariant weights can only grow, and their steps shrink."]
    tau = float(history.series(run, "tau")[-1])
    acted = f"Weight decay has acted for τ = {tau:.3g} (by now {rule.clock:.2g} a step)"
    if tau >= 1:
        return [f"{acted}: norms have had time to settle."]
    left = (1 - tau) / rule.clock
    return [f"{acted}; it shapes the norms from about τ = 1 on, which at this rate takes {left:.0f} more steps."]
