"""The monitor in a training loop of your own: three lines, and a report at the end."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import sharpscope as ss

torch.set_num_threads(1)  # so small a problem only gets slower with more
torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)

net = nn.Sequential(
    nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 10)
)  # fmt: skip
optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)

# First line: what is measured. The loss on a few batches that stay the same; with a `Monitor` these need not be all the
# data, but what is reported about the edge of stability is about the loss on them. Dropout makes a loss random, which
# has no curvature: leave it out of the measured loss. Your modules are not touched.
f = ss.Objective(net, nn.functional.cross_entropy, [(x[:256], y[:256])], without_dropout=True)

# Second line: when. Here every 25 steps, since the problem is a toy. Leave `every` out on a network of yours: then
# measuring takes at most 5 % of the time (or `budget="20%"`); how often, and on how many of these examples, is planned.
# `steps` is how long the run will be; what is reported about its end needs it.
steps = 1000
monitor = ss.Monitor(f, optimizer, every=25, steps=steps)

for _ in range(steps):
    picked = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x[picked]), y[picked]).backward()
    optimizer.step()
    monitor.step()  # third line: the run is the same with it and without it, to the last bit

print(monitor.diagnosis())
print("columns:", ", ".join(list(monitor.history.columns)[:12]), "...")
monitor.plot().savefig("run.svg")  # in a notebook `monitor.plot()` alone
monitor.report("run.html")  # one page that works offline: every sentence with its numbers and its source, and charts
