"""Monitor: measures a running training loop without changing it.

It decides when to measure, keeps the vectors that make the next measurement cheap, and collects the history.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import measures
from .diagnose import diagnose
from .eigen import Memory, NotConverged, NotFinite
from .history import History
from .invariance import ScaleGroups, find_groups
from .iterate import Iterate, midpoint
from .objective import Objective
from .plots import Chart
from .report import write_report
from .rules import UpdateRule, rule_of


class Monitor:
    """Measures `objective` every `every` steps of `optimizer`.

    Args:
        objective: loss of the model that is being trained, on data that stay the same (a few fixed batches will do).
        optimizer: the live optimizer; its rule is read at every measurement, so schedules are followed.
        every: steps between measurements.
        point: where to measure, from the weights before and after the last step; `midpoint` removes the
            oscillation of the edge of stability from the reading.
        k: eigenvalues to follow; those after the first are the columns sharpness2, sharpness3, ...
        rule: overrides what is read from the optimizer.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> f = Objective(net, torch.nn.functional.mse_loss, [(torch.randn(16, 4), torch.randn(16, 1))])
    >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> monitor = Monitor(f, sgd, every=5)
    >>> for _ in range(10):
    ...     sgd.zero_grad()
    ...     f.loss(net(f.data[0][0]), f.data[0][1]).backward()
    ...     sgd.step()
    ...     monitor.step()
    >>> monitor.history.series("training", "step").tolist()
    [0.0, 5.0, 10.0]
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 20,
        point: Callable[[Tensor, Tensor], Tensor] = midpoint,
        k: int = 1,
        rule: UpdateRule | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: the number of steps between measurements is at least 1")
        _check_trains(optimizer, objective)
        self.objective, self.optimizer, self.every, self.point, self.k = objective, optimizer, every, point, k
        self._fixed_rule = rule
        self.history = History()
        self.steps, self.tau = 0, 0.0
        self.groups: ScaleGroups = find_groups(objective)
        self._memories: dict[str, Memory] = {}
        self._before = objective.weights()
        self.measure(self._before)

    @property
    def rule(self) -> UpdateRule | None:
        """What the optimizer does at present; None while its learning rate is zero, as at the ends of a schedule."""
        if self._fixed_rule is not None:
            return self._fixed_rule
        return rule_of(self.optimizer) if any(group["lr"] for group in self.optimizer.param_groups) else None

    def step(self) -> None:
        """Call this after every step of the optimizer."""
        self.steps += 1
        self.tau += self.rule.clock if self.rule else 0.0
        if self.steps % self.every == 0:
            self.measure(self.point(self._before, self.objective.weights()))
        if (self.steps + 1) % self.every == 0:
            self._before = self.objective.weights()

    def measure(self, w: Tensor) -> Iterate:
        """Measure at `w` now, whatever the schedule, and add a row to the history.

        A run is never stopped by being watched: where the loss or a product with its Hessian is not finite, or the
        solver does not converge, the row has no curvature.
        """
        it = Iterate(self.objective, w, self.rule, step=self.steps, groups=self.groups, k=self.k, start=self._memories)
        row: dict[str, Any] = {"tau": self.tau, "loss": measures.loss(it)}
        if math.isfinite(row["loss"]):
            with contextlib.suppress(NotConverged, NotFinite):
                row |= self._curvature(it)
                self._memories = it.memories
        self.history.append(run=RUN, step=self.steps, **row)
        return it

    def _curvature(self, it: Iterate) -> dict[str, float]:
        row = {"sharpness": measures.sharpness(it)}
        row["residual"] = it.top.residuals[0].item()
        row |= {f"sharpness{i}": v for i, v in enumerate(it.top.values[1:].tolist(), start=2)}
        spherical = self.groups.joint.numel() > 0
        if spherical:
            row |= {"spherical_sharpness": measures.spherical_sharpness(it), "radius": measures.radius(it)}
        if it.rule is not None:
            row["stability_ratio"] = measures.stability_ratio(it)
            row |= {"edge": measures.spherical_edge(it)} if spherical else {}
        return row

    def diagnosis(self) -> str:
        """What the readings so far say about this run, one sentence a line."""
        return "\n".join(diagnose(self.history, RUN, self.rule, self.groups))

    def report(self, path: str | Path) -> Path:
        """Write the readings so far as one self-contained HTML page."""
        return write_report(
            Path(path),
            title="Sharpness of this training run",
            subtitle=f"{type(self.objective.model).__name__}, {self.objective.size} parameters",
            lead=" ".join(diagnose(self.history, RUN, self.rule, self.groups)),
            verdicts=(),
            charts=[chart for chart in CHARTS if chart.y in self.history.columns],
            columns=self.history.columns,
            config={"rule": str(self.rule), "every": self.every, "k": self.k},
            environment={"torch": torch.__version__},
        )


def _check_trains(optimizer: torch.optim.Optimizer, objective: Objective) -> None:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    params = dict(objective.model.named_parameters())
    idle = [name for name in objective.slices if id(params[name]) not in trained]
    if idle:
        raise ValueError(
            f"the optimizer does not train {', '.join(idle)}: pass the optimizer of this model, or freeze what is not"
            " trained by requires_grad_(False) before making the Objective"
        )


RUN = "training"

CHARTS = (
    Chart(
        "stability",
        "Distance to the edge of stability",
        "step",
        "stability_ratio",
        (RUN,),
        "step",
        "sharpness / threshold",
        lines=((1.0, "edge of stability"),),
    ),
    Chart("sharpness", "Sharpness", "step", "sharpness", (RUN,), "step", "λ1 of the Hessian", log_y=True),
    Chart(
        "spherical",
        "Spherical sharpness",
        "step",
        "spherical_sharpness",
        (RUN,),
        "step",
        "λ1 at unit norm",
        log_y=True,
        caption="Sharpness at w/‖w‖: the part that does not depend on the scale of normalized weights.",
    ),
    Chart("loss", "Loss", "step", "loss", (RUN,), "step", "loss at the measured point", log_y=True),
    Chart("radius", "Norm of the scale-invariant weights", "step", "radius", (RUN,), "step", "‖w‖"),
)
