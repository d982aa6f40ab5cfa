"""The callback of the Hugging Face Trainer: training does not notice it, and it reads what a plain loop would."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from traces import Seen, differing, go_offline, seed_all, traces
from transformers import (
    BatchEncoding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from sharpscope.autodiff.objective import Objective
from sharpscope.integrations.transformers import SharpnessCallback, _load, _save
from sharpscope.monitoring import AlongStep, LossWatch, TensorTable
from sharpscope.monitoring.meters import Step
from sharpscope.monitoring.monitor import Monitor
from sharpscope.optimizers.from_torch import rule_of, rules_of


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(tmp_path, monkeypatch)


class Text(Dataset[dict[str, Tensor]]):
    """Sequences of 8 out of 16 tokens that count up from a number, one of them replaced anew whenever it is read."""

    def __init__(self, count: int = 32, noisy: bool = True) -> None:
        self.count, self.noisy = count, noisy

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = (torch.arange(8) * (1 + i % 3) + i) % 16
        if self.noisy:
            ids[int(torch.randint(8, ()))] = random.randrange(16)
        return {"input_ids": ids, "labels": ids}


def gpt2(dropout: float = 0.1) -> GPT2LMHeadModel:
    sizes = dict[str, Any](vocab_size=16, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0))


def llama() -> LlamaForCausalLM:
    sizes = dict[str, Any](vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    heads = dict[str, Any](num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_dropout=0.1))


MODELS = {"GPT-2": gpt2, "Llama": llama}


class Kept(Trainer):
    """A Trainer that keeps the losses of its micro-batches."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def trainer_of(folder: Path, model: Any, data: Any, **options: Any) -> Kept:
    quiet = dict[str, Any](report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no", use_cpu=True)
    some = dict[str, Any](per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, weight_decay=0.1)
    return Kept(model, TrainingArguments(str(folder), **quiet | some | options), train_dataset=data)


def left(trainer: Kept) -> dict[str, Any]:
    assert trainer.model is not None
    return traces(trainer.model, trainer.optimizer.optimizer, trainer.losses)


def train(folder: Path, model: Any, data: Any, **options: Any) -> tuple[SharpnessCallback, Kept]:
    """A watched training; options of the callback are named watch."""
    watch, resume = options.pop("watch", {}), options.pop("resume", None)
    trainer = trainer_of(folder, model, data, **options)
    callback = SharpnessCallback(trainer, **watch)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return callback, trainer


@pytest.mark.parametrize(("name", "bf16"), [("GPT-2", False), ("GPT-2", True), ("Llama", True)])
def test_a_watched_training_is_the_unwatched_one_to_the_last_bit(name: str, bf16: bool, tmp_path: Path) -> None:
    options = dict[str, Any](bf16=bf16, gradient_accumulation_steps=2, dataloader_num_workers=2, max_steps=4)
    seed_all()
    alone = trainer_of(tmp_path, MODELS[name](), Text(), **options)
    alone.train()
    seed_all()
    callback, watched = train(tmp_path, MODELS[name](), Text(), watch={"every": 2, "batches": 1}, **options)
    assert differing(left(watched), left(alone)) == []
    assert len(watched.losses) == 8
    assert callback.monitor is not None
    assert callback.monitor.history.columns["step"] == [0, 2, 4]
    assert callback.monitor.planned_steps == 4
    assert None not in callback.monitor.history.columns["stability_ratio"][1:]  # before the first step Adam has none


@pytest.mark.parametrize("accumulated", [1, 2])
def test_meters_get_losses_and_batches_and_the_training_does_not_notice(accumulated: int, tmp_path: Path) -> None:
    """The loss of a step is the sum of what the trainer made of its micro-batches."""
    options = dict[str, Any](gradient_accumulation_steps=accumulated, max_steps=4)
    seed_all()
    alone = trainer_of(tmp_path, gpt2(), Text(), **options)
    alone.train()
    seed_all()
    seen: list[Step] = []
    meters = [AlongStep(), LossWatch(rows=1), TensorTable(every=1), Seen(seen)]
    watch = {"every": 4, "batches": 1, "meters": meters}
    callback, watched = train(tmp_path, gpt2(), Text(), watch=watch, **options)
    assert differing(left(watched), left(alone)) == []
    assert "training_step" not in vars(watched)
    assert callback.monitor is not None
    columns = callback.monitor.history.columns
    losses = [value for value in columns["batch_loss"] if value is not None]
    sums = torch.tensor(watched.losses).view(4, accumulated).sum(dim=1)
    assert losses == pytest.approx(sums.tolist(), rel=1e-6)  # seven digits are kept
    assert [s.batch is not None for s in seen] == [accumulated == 1] * 4
    assert sum(value is not None for value in columns["edge_along_step"]) == 4
    assert sum(value is not None for value in columns["norm/transformer.wte.weight"]) == 4


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_measurements_are_those_of_the_model_in_full_precision_without_dropout(bf16: bool, tmp_path: Path) -> None:
    model, probe = gpt2(), [{name: torch.stack([Text()[i][name] for i in range(4)]) for name in Text()[0]}]
    wanted: list[float] = []
    start = {name: t.clone() for name, t in model.state_dict().items()}

    def note(step: int, values: Any) -> None:
        f = Objective(twin, lambda output, batch: output.loss, probe)
        twin.load_state_dict(model.state_dict() if step else start)  # the start is measured after the first step
        wanted.append(f.value(f.weights()).item())

    twin = gpt2(dropout=0.0)
    watch = dict[str, Any](data=probe, every=2, point=lambda before, after: after, sinks=[note])
    callback, _ = train(tmp_path, model, Text(), watch=watch, max_steps=4, bf16=bf16)
    assert callback.monitor is not None
    assert callback.monitor.history.columns["loss"] == wanted
    assert len(wanted) == 3


def test_measurements_reach_the_log_of_the_trainer_which_stays_complete(tmp_path: Path) -> None:
    seen: dict[int, Any] = {}
    watch = dict[str, Any](every=2, batches=1, sinks=[lambda step, values: seen.update({step: values})])
    options = dict[str, Any](max_steps=4, logging_strategy="steps", logging_steps=1)
    _, trainer = train(tmp_path, gpt2(), Text(), watch=watch, **options)
    own = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert own == [1, 2, 3, 4]
    rows = [row for row in trainer.state.log_history if "sharpscope/sharpness" in row]
    assert [row["step"] for row in rows] == [1, 2, 4]  # the first measurement is logged with the first step
    assert [row["sharpscope/sharpness"] for row in rows] == [values["sharpness"] for values in seen.values()]
    assert list(seen) == [0, 2, 4]
    rates = [row["sharpscope/learning_rate"] for row in rows]  # of the step that was taken, not of the next one
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.25e-2], rel=1e-12)


def timeless(monitor: Monitor | None) -> list[dict[str, Any]]:
    assert monitor is not None
    return [{n: v for n, v in row.items() if n != "overhead"} for row in monitor.history.rows]


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def run(every: int, **options: Any) -> SharpnessCallback:
        seed_all()
        watch = dict[str, Any](every=every, batches=1, sinks=[lambda step, values: steps.append(step)])
        return train(tmp_path, gpt2(dropout=0.0), Text(noisy=False), watch=watch, max_steps=6, **options)[0]

    steps: list[int] = []
    whole = run(2, save_strategy="steps", save_steps=3)
    assert steps == [0, 2, 4, 6]
    steps.clear()
    saved = tmp_path / "checkpoint-3"
    second = run(2, resume=str(saved))
    assert timeless(second.monitor) == timeless(whole.monitor)
    assert steps == [4, 6]
    (saved / "sharpscope.safetensors").unlink()
    late = run(5, resume=str(saved))
    assert [row["step"] for row in timeless(late.monitor)] == [3, 5]


def test_a_probe_is_spread_over_the_data_and_collated_as_in_training(tmp_path: Path) -> None:
    def collate(examples: list[dict[str, Tensor]]) -> BatchEncoding:
        """What tokenizers return is a mapping, not a dict."""
        return BatchEncoding({name: torch.stack([e[name] for e in examples]) for name in examples[0]})

    trainer = trainer_of(tmp_path, gpt2(), Text(noisy=False), max_steps=1)
    trainer.data_collator = collate
    callback = SharpnessCallback(trainer, batches=2, every=100, report=tmp_path / "run.html")
    trainer.add_callback(callback)
    trainer.train()
    assert callback.monitor is not None
    probe = list(callback.monitor.objective.data)
    assert [batch["labels"].shape for batch in probe] == [(4, 8), (4, 8)]
    spread = torch.stack([Text(noisy=False)[i]["labels"] for i in range(0, 32, 4)])
    assert torch.equal(torch.cat([batch["labels"] for batch in probe]), spread)
    assert "GPT2LMHeadModel" in (tmp_path / "run.html").read_text(encoding="utf-8")


class Stream(IterableDataset[Any]):
    """Goes on where it stopped, without end."""

    def __init__(self) -> None:
        self.at, self.draws = 0, random.Random(0)

    def __iter__(self) -> Any:
        while True:
            self.at += 1
            ids = (torch.arange(8) * self.at + self.draws.randrange(16)) % 16
            yield {"input_ids": ids, "labels": ids}


class OwnNoise(Text):
    def __init__(self) -> None:
        super().__init__(noisy=False)
        self.draws = np.random.default_rng(0)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = super().__getitem__(i)["labels"].roll(int(self.draws.integers(8)))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", [Stream, OwnNoise])
def test_data_with_a_state_are_left_where_they_are(kind: Any, tmp_path: Path) -> None:
    seed_all()
    alone = trainer_of(tmp_path, gpt2(), data := kind(), max_steps=4)
    alone.train()
    seed_all()
    callback, watched = train(tmp_path, gpt2(), twin := kind(), watch={"every": 2, "batches": 2}, max_steps=4)
    assert differing(left(watched), left(alone)) == []
    assert getattr(twin, "at", 0) == getattr(data, "at", 0)
    assert (twin.draws.random(), callback.monitor is None) == (data.draws.random(), False)


def test_tokens_weigh_what_they_are_counted_as(tmp_path: Path) -> None:
    """The loss of two batches with padding is that of all their tokens."""
    ids = torch.arange(64).view(8, 8) % 16
    labels = torch.where(torch.arange(64).view(8, 8) < 20, -100, ids)
    probe = [{"input_ids": ids[i : i + 4], "labels": labels[i : i + 4]} for i in (0, 4)]
    watch = dict[str, Any](data=probe, every=100, examples=lambda b: int((b["labels"][:, 1:] != -100).sum()))
    callback, _ = train(tmp_path, gpt2(dropout=0.0), Text(), watch=watch, max_steps=1)
    assert callback.monitor is not None
    f = callback.monitor.objective
    assert f.value(f.weights()).item() == pytest.approx(f.model(ids, labels=labels).loss.item(), rel=1e-6)


def test_a_prepared_optimizer_is_the_one_inside() -> None:
    accelerator = Accelerator(cpu=True)
    seed_all()
    inner = torch.nn.Linear(4, 1)
    adam = torch.optim.AdamW(inner.parameters(), lr=0.1)
    net, prepared = accelerator.prepare(inner, adam)
    x, y = torch.ones(8, 4), torch.zeros(8, 1)
    f = Objective(net, torch.nn.functional.mse_loss, [(x, y)])
    monitor = Monitor(f, prepared, every=1)
    assert rule_of(prepared) == rule_of(adam)
    assert rules_of(prepared) == rules_of(adam) == [monitor.rule]
    for _ in range(2):
        prepared.zero_grad()
        accelerator.backward(torch.nn.functional.mse_loss(net(x), y))
        prepared.step()
        monitor.step()
    assert monitor.steps == 2 and monitor.history.columns["step"] == [0, 1, 2]
    assert monitor.optimizer is adam


def test_a_model_in_low_precision_is_watched_in_single(tmp_path: Path) -> None:
    seed_all()
    alone = trainer_of(tmp_path, gpt2().to(torch.bfloat16), Text(), max_steps=2)
    alone.train()
    seed_all()
    callback, watched = train(
        tmp_path, gpt2().to(torch.bfloat16), Text(), watch={"every": 1, "batches": 1}, max_steps=2
    )
    assert differing(left(watched), left(alone)) == []
    assert callback.monitor is not None
    assert callback.monitor.objective.dtype == torch.float32
    assert None not in callback.monitor.history.columns["sharpness"]


@pytest.mark.parametrize("damage", ["cut", "empty", "no state"])
def test_a_damaged_state_is_named(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "sharpscope.safetensors"
    _save({"steps": 3, "memory": {"x": torch.ones(3)}}, file)
    assert _load(file) is not None
    if damage == "no state":
        save_file({"x": torch.ones(2)}, file)
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"sharpscope.safetensors is damaged .* remove it"):
        _load(file)
