"""A callback for PyTorch Lightning.

from sharpscope.integrations.lightning import SharpnessCallback

callback = SharpnessCallback(nn.functional.cross_entropy, every=50, report="run.html")
Trainer(callbacks=[callback]).fit(module, loader)
print(callback.monitor.diagnosis())
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..autodiff import Objective
from ..autodiff.whole import Loss
from ..monitoring import Monitor, Sink
from . import named
from ._training import check_replicated, group_of, itself, monitor_of, part_of, probe, with_forward

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback


WHOLE = {"SingleDeviceStrategy", "DDPStrategy"}
"""Strategies with which every process holds all parameters."""


class SharpnessCallback(Callback):
    """Measures the module that is fitted; works with ``lightning`` and with ``pytorch_lightning``.

    Args:
        loss: ``loss(output, target)`` of what the module's ``forward`` returns, the mean over a batch; of a batch that
            is a dict, which goes to ``forward`` as keywords, the target is the batch.
        data: a few fixed batches to measure on, of several processes those of this one; otherwise examples spread
            evenly over the training data are taken.
        batches: how many batches of these; several processes divide them among themselves.
        batch, examples: of an `Objective`: what is input and what target in a batch of another form, and its weight.
        model: the part to measure, where that is not the whole module: ``lambda module: module.net``.
        report: where a report is written at the end, also if the training fails.
        sinks: functions that get every measurement; the trainer's loggers do in any case.
        options: those of `Monitor`, such as every, budget, k, point, rule, meters, directory.

    Meters get the loss of each step and its batch; where gradients are accumulated the mean loss alone, and those that
    need a batch measure the first of the data.  Of several optimizers, all that train the measured model are watched.
    Dropout is left out of what is measured.  Several processes measure together the loss of the batches of all, and the
    first one logs and writes.  The state is part of Lightning's checkpoints, and a resumed fit goes on with it.
    `monitor` is the Monitor, from the start of a fit on.

    Raises:
        ValueError: (at the start of a fit) parameters spread over processes, or trained by no optimizer; no probe can
            be taken from the training data.
    """

    def __init__(
        self,
        loss: Loss,
        data: Iterable[Any] | None = None,
        *,
        batches: int = 4,
        batch: Callable[[Any], Any] | None = None,
        examples: Callable[[Any], Any] | None = None,
        model: Callable[[Any], nn.Module] = itself,
        report: str | Path | None = None,
        sinks: Sequence[Sink] = (),
        **options: Any,
    ) -> None:
        self.loss = loss
        self.data = data
        self.batches = batches
        self.batch = batch
        self.examples = examples
        self.model = model
        self.report = report
        self.sinks = tuple(sinks)
        self.options = options
        self.monitor: Monitor | None = None
        self._state: Mapping[str, Any] | None = None
        self._losses: list[Any] = []  # of the batches since the last step of an optimizer
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the Monitor."""
        names = {base.__name__ for base in type(trainer.strategy).__mro__}
        check_replicated(bool(names & WHOLE), type(trainer.strategy).__name__)
        data = self.data
        if data is None:
            taken = probe(trainer.train_dataloader, self.batches, _sent(trainer))
            data = part_of(taken, trainer.global_rank, trainer.world_size)
        model, group = self.model(_uncompiled(pl_module)), group_of(trainer.world_size)
        form: dict[str, Any] = {"batch": self.batch, "examples": self.examples}
        objective = Objective(model, self.loss, data, **form, without_dropout=True, group=group)
        own = {id(p) for p in objective.parameters().values()}
        optimizers = [o for o in trainer.optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]
        planned = trainer.estimated_stepping_batches
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        options = {
            "steps": planned if isinstance(planned, int) and planned > 0 else None,
            "scheduler": schedulers[0] if schedulers else None,
        } | self.options
        sinks = (*self.sinks, *(_logged(logger) for logger in trainer.loggers))
        state, self._state = self._state, None
        self._losses, self._steps = [], trainer.global_step
        done = trainer.global_step // max(len(trainer.optimizers), 1)  # which counts the steps of every optimizer
        self.monitor = monitor_of(objective, optimizers or trainer.optimizers, state, done, sinks, **options)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure if it is time; the meters get the loss of the step, and its batch where there was but one."""
        if self.monitor is None:
            return
        self._losses.append(outputs.get("loss") if isinstance(outputs, Mapping) else outputs)
        if trainer.global_step == self._steps:
            return
        losses, self._losses, self._steps = self._losses, [], trainer.global_step
        automatic = pl_module.automatic_optimization
        if not all(isinstance(loss, Tensor) for loss in losses) or (len(losses) > 1 and not automatic):
            self.monitor.step()
            return
        divided = trainer.accumulate_grad_batches if automatic else 1  # so Lightning hands losses over
        mean = sum(losses[1:], losses[0]) * (divided / len(losses))
        self.monitor.step(mean, batch if len(losses) == 1 else None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the report."""
        self._finish("")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write the report of a training that failed or was interrupted."""
        self._finish(f"{type(exception).__name__}: {exception}")

    def state_dict(self) -> dict[str, Any]:
        """The state that Lightning writes into its checkpoints."""
        return {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep the state for the fit that resumes; Lightning calls this before it."""
        self._state = state_dict

    def _finish(self, note: str) -> None:
        if self.monitor is not None:
            self.monitor.close(note)
            if self.report is not None:
                self.monitor.report(self.report)


def _sent(trainer: Any) -> Callable[[Any], Any]:
    """Treat a batch as the trainer does before ``training_step``: precision, hooks of the module, device."""

    def convert(batch: Any) -> Any:
        batch = trainer.lightning_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
        return trainer.strategy.batch_to_device(batch)

    return convert


def _uncompiled(module: Any) -> Any:
    """The module without ``torch.compile``, through which there are no second derivatives."""
    compiled = module._compiler_ctx
    return module if compiled is None else with_forward(module, compiled["original_forward"])


def _logged(logger: Any) -> Sink:
    return lambda step, values: logger.log_metrics(named(values), step)
