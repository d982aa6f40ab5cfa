"""Sharpness along a fit of PyTorch Lightning.

A classifier of handwritten digits with batch normalization, trained with weight decay: the loss does not notice the
scale of its first weights, so what matters is their sharpness on the sphere.  Lightning does the training; one callback
measures.  Run this file as it is; it takes a few seconds.
"""

import lightning.pytorch as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sharpscope.integrations.lightning import SharpnessCallback

torch.set_num_threads(1)  # a small problem is faster on one

# 1. A module like any other.  The callback needs only its `forward`, and the loss as a function of (output, target):
#    `training_step` also logs, and may not be called when nothing is trained.


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 32, bias=False),
            nn.BatchNorm1d(32, affine=False),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(32, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=2.0, weight_decay=5e-3)


# 2. The data.

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16.0, dtype=torch.float32)
y = torch.tensor(labels)
loader = DataLoader(TensorDataset(x, y), batch_size=256, shuffle=True)

# 3. The callback.  It picks four batches of examples spread evenly over the training data, reads them once and measures
#    the loss on them every 15 steps, without dropout and in full precision.  The training does not notice: weights,
#    buffers and random numbers end up the same to the last bit.  `SharpnessCallback(loss, data=[...])` measures on
#    batches of your own instead, and `budget="5%"` in the place of `every` keeps the cost to a fraction of the time.

callback = SharpnessCallback(nn.functional.cross_entropy, every=15, report="lightning.html")

# 4. Training.  The measurements also go to the trainer's loggers (TensorBoard, Weights & Biases, ...), as
#    sharpscope/..., and the callback's state into Lightning's checkpoints: a fit that resumes goes on with the same
#    history.

L.seed_everything(0)
trainer = L.Trainer(
    max_epochs=15,
    accelerator="cpu",
    callbacks=[callback],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Digits(), loader)

# 5. What was seen: sentences with their numbers, the columns they come from, and lightning.html with the curves.

monitor = callback.monitor
assert monitor is not None
print(monitor.diagnosis())
for step, value in zip(*monitor.history.table("training", "step", "spherical_sharpness"), strict=True):
    print(f"step {step:3.0f}   spherical sharpness {value:8.1f}")
monitor.plot().savefig("lightning.svg")
