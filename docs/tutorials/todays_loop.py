"""A loop of today: Muon beside AdamW, warm-up and cosine, bf16, accumulation, a compiled model, and meters."""

import math

import torch
from torch import nn

import sharpscope as ss
from sharpscope.monitoring import AlongStep, Finding, LossWatch, TensorTable

torch.set_num_threads(1)  # so small a problem only gets slower with more
torch.manual_seed(0)
words = torch.randint(64, (256, 17))
words[:, 1::2] = words[:, :-1:2]  # every second token repeats the one before it: something to learn


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True, bias=False)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 2 * width, bias=False), nn.GELU(), nn.Linear(2 * width, width, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        y = self.before(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.perceptron(self.between(x))


net = nn.Sequential(nn.Embedding(64, 32), Block(32), Block(32), nn.RMSNorm(32), nn.Linear(32, 64, bias=False))


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def batch_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rows[:, :-1], rows[:, 1:]


# The objective is the model itself, in its own precision; what trains may be compiled, and run under autocast.
f = ss.Objective(net, loss_of, [batch_of(words[:32])])
compiled = torch.compile(net, backend="aot_eager")  # leave `backend` out where a compiler is installed

# Which weights should have weight decay, by evidence: each kind with its reason.
print(ss.param_groups(f, weight_decay=0.1))

# Muon has no threshold, since its steps have one length: with it the run is observed, and the meters say whether steps
# pay. Pass every optimizer, in a list.
matrices = [p for block in (net[1], net[2]) for p in block.parameters() if p.dim() == 2]
others = [p for p in net.parameters() if all(p is not m for m in matrices)]
optimizers = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=3e-3)]
steps, micro = 120, 2


def warm_up_and_cosine(step: int) -> float:
    return min((step + 1) / 20, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_cosine) for optimizer in optimizers]


def on_finding(finding: Finding, step: int) -> None:
    """Your own reaction: an alert, a stop, a smaller rate."""
    if finding.severity in ("warning", "alarm"):
        print(f"step {step}: {finding}")


monitor = ss.Monitor(
    f,
    optimizers,
    budget="50%",  # of a toy; leave it out on a network of yours, for 5 %
    steps=steps,
    scheduler=schedulers[0],
    meters=[AlongStep(every=10), TensorTable(every=20), LossWatch()],
    on_finding=on_finding,
)

for _step in range(steps):
    total = 0.0
    for _ in range(micro):  # gradients of two micro-batches are added up
        x, y = batch_of(words[torch.randint(len(words), (32,))])
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(compiled(x), y) / micro
        loss.backward()
        total += loss.item()
    for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    monitor.step(total)  # the loss of the whole step; its batch is in two parts, so the meters use the fixed one

print(monitor.diagnosis())
monitor.plot().savefig("run.svg")
monitor.report("run.html")
