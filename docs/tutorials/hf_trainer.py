"""Sharpness along a training with the Trainer of Hugging Face transformers.

A causal language model of two layers, built from a config, learns to count; nothing is downloaded.  The optimizer is
the Trainer's own AdamW, whose edge of stability is not 2/lr: what must stay below one is the sharpness in the metric of
the steps, over its threshold.  Run this file as it is; it takes a few seconds.
"""

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from sharpscope.integrations.transformers import SharpnessCallback

torch.set_num_threads(1)  # a small problem is faster on one

# 1. Sequences that count up by one, two or three, modulo 16.  Batches are dicts with labels, as always with a Trainer.


class Counting(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 256

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (i + torch.arange(8) * (1 + i % 3)) % 16
        return {"input_ids": ids, "labels": ids}


# 2. The model and the Trainer.  Dropout, gradient accumulation and bf16 do no harm: what is measured is the loss
#    without dropout, in full precision, and a measurement belongs to an optimizer step, not to a micro-batch.

set_seed(0)
sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
arguments = TrainingArguments(
    "trainer_output",
    max_steps=40,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=3e-2,
    lr_scheduler_type="constant",
    weight_decay=0.1,
    bf16=True,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    logging_steps=20,
    disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=Counting())

# 3. The callback gets the trainer that it is added to: measurements go to its log, and from there to whatever it
#    reports to (`report_to="wandb"`, say).  Here it measures two batches of examples spread evenly over the
#    data, every 10 steps.

callback = SharpnessCallback(trainer, every=10, batches=2, report="hf_trainer.html")
trainer.add_callback(callback)
trainer.train()

# 4. What was seen.  hf_trainer.html has the curves; with checkpoints, the state is kept in them.

assert callback.monitor is not None
print(callback.monitor.diagnosis())
history = callback.monitor.history
for step, loss, ratio in zip(*history.table("training", "step", "loss", "stability_ratio"), strict=True):
    print(f"step {step:3.0f}   loss {loss:.3f}   {ratio:.2f} of the edge of stability")
callback.monitor.plot().savefig("hf_trainer.svg")
