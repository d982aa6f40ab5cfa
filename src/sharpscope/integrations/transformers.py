"""A callback for the Trainer of Hugging Face transformers.

from sharpscope.integrations.transformers import SharpnessCallback

callback = SharpnessCallback(trainer, every=50, report="run.html")
trainer.add_callback(callback)
trainer.train()
print(callback.monitor.diagnosis())
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..autodiff import Objective
from ..autodiff.whole import Loss
from ..errors import InvalidType, InvalidValue
from ..monitoring import Monitor, Sink
from . import named
from ._training import check_replicated, group_of, itself, monitor_of, part_of, probe, with_forward

FILE = "sharpscope.safetensors"
"""The file that is added to every checkpoint folder."""


def output_loss(output: Any, batch: Any) -> Tensor:
    """The loss that a model returns when the batch has labels."""
    return output.loss


class SharpnessCallback(TrainerCallback):
    """Measures the model that `trainer` trains.

    Args:
        trainer: to which the callback is then added; measurements go to its log and so to whatever it reports to.
        data: a few fixed batches (dicts) to measure on, of several processes those of this one; otherwise examples
            spread evenly over the training data are taken and collated as in training.
        loss: ``loss(output, batch)``, the mean over a batch; as a rule what the model returns as its loss.
        batches: how many batches of the training data; several processes divide them among themselves.
        batch, examples: of an `Objective`: what is input and what target in a batch of another form, and its weight,
            such as ``examples=lambda b: int((b["labels"][:, 1:] != -100).sum())`` for a mean over tokens.
        model: the part to measure, where that is not the whole model: ``lambda model: model.encoder``.
        report: where a report is written at the end.
        sinks: functions that get every measurement with all its columns; the trainer's log leaves those of groups out.
        options: those of `Monitor`, such as every, budget, k, point, rule, meters, directory.

    Meters get the loss that the trainer computed for each step, and its batch unless gradients are accumulated, where
    those that need one measure the first of the data.  Dropout and autocast are left out of what is measured.  Several
    processes measure together the loss of the batches of all, and the first one logs and writes.  The state is kept in
    the checkpoints; training that resumes from one in ``output_dir`` goes on with it.  `monitor` is the Monitor, from
    the start of training on.

    Raises:
        ValueError: (at the start of training) parameters spread over processes; no probe can be taken from the data.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: Iterable[Any] | None = None,
        *,
        loss: Loss = output_loss,
        batches: int = 4,
        batch: Callable[[Any], Any] | None = None,
        examples: Callable[[Any], Any] | None = None,
        model: Callable[[Any], nn.Module] = itself,
        report: str | Path | None = None,
        sinks: Sequence[Sink] = (),
        **options: Any,
    ) -> None:
        self.trainer = trainer
        self.data = data
        self.loss = loss
        self.batches = batches
        self.batch = batch
        self.examples = examples
        self.model = model
        self.report = report
        self.sinks = tuple(sinks)
        self.options = options
        self.monitor: Monitor | None = None
        self._unlogged: list[dict[str, float]] = []
        self._handed: Handed | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Make the Monitor."""
        kind = self.trainer.accelerator.distributed_type.value
        whole = kind == "NO" or kind.startswith("MULTI_")
        check_replicated(whole, f"training with {kind}")
        data = self.data
        if data is None:
            data = part_of(probe(parts["train_dataloader"], self.batches, dict), args.process_index, args.world_size)
        model, group = self.model(_without_autocast(parts["model"])), group_of(args.world_size)
        form: dict[str, Any] = {"batch": self.batch, "examples": self.examples}
        objective = Objective(model, self.loss, data, **form, without_dropout=True, group=group)
        planned = state.max_steps if state.max_steps > 0 else None
        options = {"steps": planned, "scheduler": parts.get("lr_scheduler")} | self.options
        saved = _load(_checkpoint(args, state) / FILE)
        optimizer = parts["optimizer"].optimizer  # accelerate wraps it
        sinks = (*self.sinks, self._keep)
        self.monitor = monitor_of(objective, optimizer, saved, state.global_step, sinks, **options)
        self._watch_losses()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Measure if it is time: here, because the schedule changes the learning rate next."""
        if self.monitor is not None:
            self.monitor.step(*(self._handed.take() if self._handed is not None else ()))

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Log the measurement, now that the trainer has counted the step."""
        due = control.should_log
        while self._unlogged:
            self.trainer.log(self._unlogged.pop(0))
        control.should_log = due  # which every log switches off

    def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Add the Monitor's state to the checkpoint."""
        folder = _checkpoint(args, state)
        first = state.is_world_process_zero
        if self.monitor is not None and first and folder.is_dir():  # a search for hyper-parameters saves elsewhere
            _save(self.monitor.state_dict(), folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Write the report."""
        if self._handed is not None:
            self._handed.stop()
        if self.monitor is not None:
            self.monitor.close()
            if self.report is not None:
                self.monitor.report(self.report)

    def _watch_losses(self) -> None:
        """Have the losses and batches of training steps kept for the meters, where there are any."""
        if self._handed is not None:  # of a training that has failed
            self._handed.stop()
        self._handed = Handed(self.trainer) if self.options.get("meters") else None

    def _keep(self, step: int, values: Mapping[str, float]) -> None:
        self._unlogged.append(named({name: value for name, value in values.items() if "/" not in name}))


class Handed:
    """The losses and batches of the training steps of a trainer since the last step of its optimizer.

    Its `training_step` is wrapped until `stop`, by what calls it and keeps references to what goes in and comes out.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._before = vars(trainer).get("training_step")  # as a rule none: the method of the class
        self._losses: list[Tensor] = []
        self._batch: Any = None
        original = trainer.training_step

        def watched(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = original(model, inputs, *args, **kwargs)
            self._losses.append(loss)
            self._batch = inputs
            return loss

        vars(trainer)["training_step"] = watched

    def take(self) -> tuple[Tensor | None, Any]:
        """The loss of the step, and its batch where there was but one."""
        losses, batch = self._losses, self._batch
        self._losses, self._batch = [], None
        if not losses:
            return None, None
        return sum(losses[1:], losses[0]).detach(), batch if len(
            losses
        ) == 1 else None  # each is divided by their number

    def stop(self) -> None:
        """Put the trainer's own `training_step` back."""
        if self._before is None:
            vars(self._trainer).pop("training_step", None)
        else:
            vars(self._trainer)["training_step"] = self._before


def _without_autocast(model: nn.Module) -> nn.Module:
    """The model before accelerate put autocast into its `forward`, which is for training in low precision."""
    original = model.__dict__.get("_original_forward")
    return model if original is None else with_forward(model, original)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _save(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors as such, and what holds them as JSON in the header."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}

    def separated(value: Any) -> Any:
        if not isinstance(value, Tensor):
            raise InvalidType(f"a {type(value).__name__} cannot be saved")
        tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()
        return {"tensor": str(len(tensors) - 1), "strides": value.stride()}

    text = json.dumps(state, default=separated)
    save_file(tensors, path, metadata={"state": text})


def _load(path: Path) -> Mapping[str, Any] | None:
    """Read what `_save` wrote; None if there is nothing.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:

            def restored(value: dict[str, Any]) -> Any:
                if value.keys() != {"tensor", "strides"}:
                    return value
                t = file.get_tensor(value["tensor"])
                return torch.empty_strided(t.shape, value["strides"], dtype=t.dtype).copy_(t)  # sums depend on it

            return json.loads(file.metadata()["state"], object_hook=restored)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InvalidValue(
            f"{path} is damaged ({error}); remove it, and the measurements go on afresh from this checkpoint"
        ) from error
