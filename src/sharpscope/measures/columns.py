"""Every column of the rows that the library writes: its name, the label of its axis, its unit, and its meaning.

A family of columns has a place ``{}`` in its name, for a group of weights (``radius/0.weight``) or a number
(``sharpness2``).  What a study measures for itself alone is not listed here.

>>> label_of("rotation/0.weight"), label_of("sharpness2")
('rotation of 0.weight per step (rad)', 'λ2 of the Hessian')
"""

from dataclasses import dataclass, replace

from ..errors import NoSuchColumn


@dataclass(frozen=True)
class Column:
    """A column of a history: `label` and `unit` are for the axis of a chart, `meaning` is a sentence."""

    name: str
    label: str
    meaning: str
    unit: str = ""


COLUMNS = (
    Column("run", "run", "Name of the run that the row belongs to."),
    Column("step", "step", "Number of steps that the optimizer has taken."),
    Column("tau", "τ", "Time in which weight decay has acted, the sum of the intrinsic times of the steps."),
    Column("loss", "loss", "Loss at the measured point; in studies at the iterate, in predictions a mean over steps."),
    Column("midpoint_loss", "loss at the midpoint", "Loss midway between two iterates, where curvature is measured."),
    Column("point_loss", "loss at one point", "Loss at averaged weights, unlike the average of the loss."),
    Column("learning_rate", "learning rate", "Learning rate of the optimizer at the step."),
    Column("intrinsic_time_per_step", "τ per step", "Intrinsic time of a step, lr·wd for plain gradient descent."),
    Column("equilibrium", "rotation at equilibrium", "Angle per step of weights whose norm has settled.", "rad"),
    Column("applied_gradient", "norm of the gradient", "Norm of the gradient that the optimizer applied."),
    Column("sharpness", "λ1 of the Hessian", "Largest eigenvalue of the Hessian of the loss."),
    Column("sharpness{}", "λ{} of the Hessian", "Further eigenvalue of the Hessian, by its number from the top."),
    Column("alignment", "step · top eigenvector", "Cosine between the step and the top eigenvector, without its sign."),
    Column("residual", "residual", "Residual of the top eigenpair."),
    Column("relative_residual", "residual / λ1", "Residual of the top eigenpair over its eigenvalue."),
    Column("spherical_sharpness", "λ1 at unit norm", "Sharpness in the scale-invariant weights, at unit norm."),
    Column("spherical_sharpness{}", "λ{} at unit norm", "Further eigenvalue at unit norm, by its number from the top."),
    Column("threshold", "threshold", "Sharpness at which the rule becomes unstable."),
    Column("spherical_threshold", "threshold at unit norm", "Spherical sharpness at the edge, at the present norm."),
    Column("stability_ratio", "sharpness / threshold", "Sharpness over its threshold: 1 at the edge of stability."),
    Column("uncertainty", "error of sharpness / threshold", "Estimated relative error of sharpness / threshold."),
    Column("eta_lambda", "η̃ λ1", "Effective learning rate times spherical sharpness: 2 at gradient descent's edge."),
    Column("radius", "‖w‖", "Norm of the scale-invariant weights; in studies and predictions of all weights."),
    Column("angle", "angle of a step", "Angle between the weights before and after the step.", "rad"),
    Column("radius/{}", "‖w‖ of {}", "Norm of a group of weights."),
    Column("fraction/{}", "fraction of the top eigenvector in {}", "Squared length of its part in a group of weights."),
    Column("rotation/{}", "rotation of {} per step", "Angle of a group between before and after the step.", "rad"),
    Column("rate/{}", "effective learning rate of {}", "Step size of a group of weights on its unit sphere."),
    Column("radial/{}", "radial gradient of {}", "Gradient along a group over weight decay: 1 where they balance."),
    Column("balance/{}", "growth / decay of {}", "Growth of the norm of a group by gradients over its weight decay."),
    Column("norm/{}", "norm of {}", "Norm of a tensor."),
    Column("gradient/{}", "gradient of {}", "Norm of the gradient of a tensor, as it was applied."),
    Column("update/{}", "update / weight of {}", "Rms of the change of a tensor in a step over that of its weights."),
    Column("turn/{}", "turn of {} per step", "Angle between a tensor before and after the step.", "rad"),
    Column("law/{}", "turn of {} at equilibrium", "Angle per step if the tensor is invariant and has settled.", "rad"),
    Column("effective_rate/{}", "effective learning rate of {}", "Learning rate over ‖w‖², or over ‖w‖ for Adam."),
    Column("time_left/{}", "τ left for {}", "Time in which weight decay will act on a tensor until the planned end."),
    Column(
        "unmoved/{}", "unmoved fraction of {}", "Fraction of weights with a gradient that a step left as they were."
    ),
    Column("signal/{}", "m/√v of {}", "Rms of Adam's average gradient over the root of its average square."),
    Column("age/{}", "age of v of {}", "Number of gradients that Adam's average of squares is made of."),
    Column("clipping", "applied / whole gradient", "Norm of the applied gradient over that before it was clipped."),
    Column("batch_loss", "loss of the batch", "Loss of the batch of the step, before the step."),
    Column("spike", "step of the spike", "Step at whose batch a spike of the loss began."),
    Column("spike_loss", "loss at the spike", "Highest loss of a batch in a spike so far."),
    Column("spike_base", "loss before the spike", "Median of the losses of the batches before a spike."),
    Column("spike_length", "length of the spike", "Steps from its begin until the loss was low again."),
    Column("spike_gradient", "gradient at the spike", "Norm of the gradient at the spike over its median before."),
    Column("spike_gradient_before", "gradient before", "Largest in the 8 steps before a spike, over the median."),
    Column("spike_lead", "lead of the gradient", "Steps by which high gradients came before a spike, 0 if none did."),
    Column("spike_rate", "learning rate before", "Largest in the 8 steps before a spike, over the median."),
    Column("spike_lag", "lag of v before", "Largest rms of g/√v of a tensor in the 8 steps before a spike."),
    Column("spike_probe", "loss of the fixed data", "Loss of the objective's data just after the step of a spike."),
    Column(
        "edge_along_step",
        "edge along the step",
        "One less the gain ratio of a step: 1 where it does not pay.",
    ),
    Column("slope_along_step", "slope along the step", "Change of the batch's loss by the step to first order."),
    Column("curvature_along_step", "curvature along the step", "Curvature over that at which it does not pay."),
    Column("critical_step", "critical length / step", "Factor by which a step may grow before it does not pay."),
    Column("update_cosine", "cosine of successive steps", "Cosine of the angle between a step and the one before."),
    Column("batch_sharpness", "batch sharpness", "Mean over batches of their curvature along their own gradient."),
    Column("batch_sharpness_error", "error of batch sharpness", "Standard error of the batch sharpness."),
    Column("noise_scale", "noise scale", "Number of examples at which noise and gradient balance."),
    Column("noise_scale_low", "noise scale, at least", "Lower end of the interval of the noise scale at 95 %."),
    Column("noise_scale_high", "noise scale, at most", "Upper end of the interval of the noise scale at 95 %."),
    Column("overhead", "time of measuring / training", "Time that measuring has taken over that of training."),
    Column("train_accuracy", "training accuracy", "Fraction of the training set that is classified correctly."),
    Column("test_accuracy", "test accuracy", "Fraction of the test set that is classified correctly."),
    Column("test_loss", "test loss", "Loss on the test set."),
    Column("checkpoint", "checkpoint", "Name of the file that holds the weights."),
    Column("digest", "digest", "Digest of the content of the checkpoint."),
    Column("kept", "buffers kept", "Buffers that the checkpoint lacks, so that those of the model were used."),
    Column("note", "note", "Reason why a row has no curvature."),
    Column("products", "products", "Number of products with the Hessian that the row took."),
    Column("moved", "distance moved", "Distance of the optimizer from its start."),
    Column("distance", "distance", "Distance of a flow from the optimizer that it predicts."),
    Column("error", "distance / distance moved", "Distance of a flow from the optimizer over the distance moved."),
    Column("variance", "size of the oscillation", "Mean squared distance of the iterates from their average."),
    Column("modes", "modes", "Number of eigenvectors that a flow keeps at the edge of stability or near it."),
    Column("gradients", "gradients", "Gradients that following a flow has cost so far."),
)

_BY_NAME = {column.name: column for column in COLUMNS}


def column_of(name: str) -> Column:
    """Look a column up by its name; one of a family with the label of its member.

    Raises:
        NoSuchColumn: the library writes no such column.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    group = name.find("/") + 1
    prefix = name[:group] if group else name.rstrip("0123456789")
    family, member = _BY_NAME.get(prefix + "{}"), name.removeprefix(prefix)
    if family is None or not member:
        raise NoSuchColumn(f"the library writes no column '{name}'")
    return replace(family, name=name, label=family.label.replace("{}", member))


def label_of(name: str) -> str:
    """Label of the axis that shows a column, with its unit."""
    column = column_of(name)
    return f"{column.label} ({column.unit})" if column.unit else column.label
